"""What an instrument may ask of a step, by name, and which of these run the model."""

from typing import Literal

Need = Literal[
    "batch", "loss", "example_losses", "gradient", "samples", "second_moment", "inner_products", "gram", "hessian",
    "step_hessian", "gauss_newton", "fisher", "drawn_fisher", "drawn_diagonal", "backpack_diagonal", "preconditioner",
    "parameters", "groups", "states", "activations", "forward", "change", "update", "line", "step_examples",
    "example_gradients",
]  # fmt: skip
SAMPLES: frozenset[Need] = frozenset({"samples", "second_moment", "inner_products", "gram"})
WATCHED: frozenset[Need] = SAMPLES | {"step_examples", "update"}  # for which the training's own pass is as good
CURVATURES: frozenset[Need] = frozenset(
    {"hessian", "gauss_newton", "fisher", "drawn_fisher", "drawn_diagonal", "backpack_diagonal"}
)  # on held batches
AFTER_STEP: frozenset[Need] = frozenset({"change", "update", "line", "step_examples"})
RUNS_STEP: frozenset[Need] = frozenset(
    {"step_hessian", "example_losses", "example_gradients", "activations", "forward", "update", "line", "step_examples"}
)  # on the step's batches
RUNS_MODEL = SAMPLES | CURVATURES | RUNS_STEP
