"""Names of the optimizers, known without importing torch; a test keeps them equal to what torch.optim has."""

from collections.abc import Mapping

ALGORITHMS: Mapping[str, str] = {
    "adadelta": "torch.optim.Adadelta",
    "adafactor": "torch.optim.Adafactor",
    "adagrad": "torch.optim.Adagrad",
    "adam": "torch.optim.Adam",
    "adamax": "torch.optim.Adamax",
    "adamw": "torch.optim.AdamW",
    "asgd": "torch.optim.ASGD",
    "momentum": "torch.optim.SGD with momentum 0.9",
    "muon": "torch.optim.Muon, for models of matrices only",
    "nadam": "torch.optim.NAdam",
    "nesterov": "torch.optim.SGD with Nesterov momentum 0.9",
    "radam": "torch.optim.RAdam",
    "rmsprop": "torch.optim.RMSprop",
    "rprop": "torch.optim.Rprop, for full batches",
    "sgd": "torch.optim.SGD",
    "sparseadam": "torch.optim.SparseAdam, for sparse gradients only",
}
