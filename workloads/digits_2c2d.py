"""Two convolutions and two dense layers on 8 x 8 digits: 13,706 parameters.

The small sibling of the 2c2d network of DeepOBS (Schneider, Balles and Hennig, ICLR 2019).
"""

from torch import nn

from workloads.data.digits import digits
from workloads.evaluation import classification
from workloads.target import at_least
from workloads.workload import Data, Workload

TARGET = 0.975


def conv_net(data: Data) -> nn.Module:
    """conv 16 - pool - conv 32 - pool - dense 64 - dense 10, ReLU, 3 x 3 kernels: images_N1x8x8 -> logits_N10."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


WORKLOAD = Workload(
    name="digits_2c2d",
    summary="Two convolutions and two dense layers on 8 x 8 digits: 13,706 parameters.",
    load=lambda: digits(shape=(1, 8, 8)),
    make_model=conv_net,
    loss=nn.CrossEntropyLoss(),
    evaluate=classification,
    target=lambda data: at_least("valid_accuracy", TARGET),
    batch_size=64,
    steps=600,
    evaluate_every=20,
    baselines={
        "sgd": {"lr": 0.3},
        "momentum": {"lr": 0.07, "momentum": 0.9},
        "nesterov": {"lr": 0.07, "momentum": 0.9},
        "adam": {"lr": 0.007},
        "adamw": {"lr": 0.007, "weight_decay": 0.01},
        "rmsprop": {"lr": 0.003},
    },
)
