"""What an optimizer multiplies the gradient with, coordinate by coordinate, at the edge of stability.

For an update  x+ = (1 - omega) x - (eta / p) F[g],  g = (H + diag c) x,  with learning rate eta, momentum filter F,
preconditioner p, decoupled decay omega = eta * weight_decay and coupled (L2) decay c, a direction whose sign alternates
every step meets the gain F(-1), and

    D_i = eta_i F_i(-1) / (p_i (1 - omega_i / 2)),     rho = 1/2 lambda_max( D^1/2 (H + diag c) D^1/2 ).

With p held fixed and H positive definite the iteration decays exactly when rho < 1, for any mix of parameter groups.
Known cases: gradient descent 2/eta, heavy ball (2 + 2 mu)/eta (Cohen et al. 2021, "Gradient descent on neural networks
typically occurs at the edge of stability"), Adam 38/eta at beta1 = 0.9 (Cohen et al. 2022, "Adaptive gradient methods
at the edge of stability").

p is read after the second moment has taken in the gradient that stands in `.grad`, on copies: it is the one of the
step about to be taken, and exists at the first step. Optimizer state is never written, nor created.

An optimizer of your own is made known by one function:

    @reads(MyOptimizer)
    def mine(group, state, p, grad):
        v = average(state.get("v"), grad.square(), group["beta2"])
        return Scale(group["lr"] * edge_gain(group["beta"]) / (v.sqrt() + group["eps"]), second_moment=v)

A preconditioner that is no diagonal but has one in another basis (Shampoo, SOAP, K-FAC: the eigenvectors of their
factors) gives that basis too: `Scale(step_size, basis=(Q_rows, Q_columns))`.
"""

from instruments.preconditioners import torch_optimizers as torch_optimizers  # the import registers them
from instruments.preconditioners.basis import Basis as Basis
from instruments.preconditioners.reading import Preconditioner as Preconditioner
from instruments.preconditioners.reading import headroom as headroom
from instruments.preconditioners.reading import read_preconditioner as read_preconditioner
from instruments.preconditioners.reading import sharpness_edge as sharpness_edge
from instruments.preconditioners.registry import Scale as Scale
from instruments.preconditioners.registry import Settings as Settings
from instruments.preconditioners.registry import average as average
from instruments.preconditioners.registry import edge_gain as edge_gain
from instruments.preconditioners.registry import reader_of as reader_of
from instruments.preconditioners.registry import reads as reads
