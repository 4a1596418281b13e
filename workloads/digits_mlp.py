"""Multilayer perceptron on 8 x 8 digits, 17,226 parameters: its full Hessian is within reach."""

from torch import nn

from workloads.data.digits import digits
from workloads.evaluation import classification
from workloads.target import at_least
from workloads.workload import Data, Workload

TARGET = 0.97


def mlp(data: Data) -> nn.Module:
    """64-128-64-10 with ReLU and torch's default initialisation: images_N64 -> logits_N10."""
    return nn.Sequential(
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


WORKLOAD = Workload(
    name="digits_mlp",
    summary="Multilayer perceptron on 8 x 8 digits, 17,226 parameters: its full Hessian is within reach.",
    load=lambda: digits(shape=(64,)),
    make_model=mlp,
    loss=nn.CrossEntropyLoss(),
    evaluate=classification,
    target=lambda data: at_least("valid_accuracy", TARGET),
    batch_size=64,
    steps=600,
    evaluate_every=20,
    baselines={
        "sgd": {"lr": 0.5},
        "momentum": {"lr": 0.15, "momentum": 0.9},
        "nesterov": {"lr": 0.2, "momentum": 0.9},
        "adam": {"lr": 0.01},
        "adamw": {"lr": 0.01, "weight_decay": 0.01},
        "rmsprop": {"lr": 0.003},
    },
)
