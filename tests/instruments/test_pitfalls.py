"""Where curvature is easily read wrong: right, refused by name, or read by a route that says what it costs.

| pitfall | tests |
|---|---|
| a negative eigenvalue dominates | `a_negative_eigenvalue_dominates`, `a_large_negative_eigenvalue_does_not_win` |
| near-ties, of either sign | `near_ties`, `a_near_tie_of_opposite_sign_is_resolved` |
| sitting on a lower eigenvector | `sitting_on_a_lower_eigenvector` |
| loss of orthogonality, ghosts | `orthogonality_survives_float32`, `single_precision_finds_no_ghosts` |
| small matrices in low precision | `half_precision_says_what_it_costs`, `bfloat16_parameters_read_nearly_as_single` |
| BatchNorm in both modes | `hessian_equals_differences_of_the_gradient`, `eval_mode_reads_another_loss` |
| dropout | `dropout_is_one_fixed_matrix`, `products_repeat_bit_for_bit_and_are_symmetric` |
| fused attention | `fused_attention_that_the_forward_insists_on`, `fused_attention_alone_has_no_second_derivative` |
| flex attention | `flex_attention_is_refused_by_its_name` |
| torch.compile | `what_is_compiled_is_run_as_written`, `a_compiled_model_reads_as_the_module_inside` |
| checkpoints that hide parameters | `checkpoints_that_hide_parameters`, `a_checkpoint_that_is_not_reentrant` |
| a backward without a derivative | `a_backward_without_a_derivative`, `a_derivative_that_is_a_constant` |
| recurrent layers (on a CPU) | `recurrent_layers` |
| DistributedDataParallel | `without_a_group_a_reading_is_of_the_batch_of_its_own_process`, `the_sum_over_processes` |
| FSDP, sharded parameters | `sharded_parameters_are_refused_by_name` |
| unused parameters, all-linear losses | `hessian_equals_differences_of_the_gradient`, `all_linear_loss_has_zero` |
| a step between graph and product | `a_step_between_the_graph_and_the_product`, `an_operator_of_an_earlier_step` |
| sparse embeddings | `sparse_bags`, `sparse_embedding_gradients_are_made_dense` |
| tied weights | `hessian_equals_differences_of_the_gradient`, `a_tied_weight_is_chosen_by_any_of_its_names` |
| in-place activations | `in_place_activations` |
| kinks under differences | `kinks_under_differences_show_in_the_reading`, `kinks_show_in_the_estimated_error` |
| unequal batches, ignored targets | `unequal_batches_are_one_loss`, `tokens_that_count_weigh_the_batches` |
| the bias of small batches | `small_batches_read_sharper` |
| autocast | `autocast_around_a_reading_changes_no_bit`, `a_loop_under_autocast_reads_nearly_as_single` |
| hooks, gradient reversal | `a_mask_on_a_gradient`, `gradients_that_are_all_scaled`, `directions_that_are_the` |
| graphs that are kept alive | `steps_that_were_observed_are_let_go`, `many_readings_leave_memory_flat` |
| host synchronisation | `the_host_waits_once_a_product` |
| eval(), RNG, buffers, .grad left changed | `training_is_the_same_with_and_without` |
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, build
from gauss_newton_twin import matrix_of
from test_last_resort import Fused
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from twins import dense_hessian
from zoo import Checkpointed, N

from instruments import Probe, Refusal, View
from instruments.curvature.sharpness import Sharpness
from instruments.curvature.smallest import Smallest
from instruments.held import HeldBatches
from instruments.instrument import Instrument
from instruments.meter import Meter
from instruments.objective import as_objective

CROSS_ENTROPY = nn.CrossEntropyLoss()
MATRICES = ["hessian", "gauss_newton", "fisher"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4, dtype=torch.float64), torch.randint(0, 3, (N,))


def sequences() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 3, 4, dtype=torch.float64), torch.randint(0, 3, (N,))


def probe_of(model: nn.Module, batch: Any, loss: Any = CROSS_ENTROPY, **rest: Any) -> Probe:
    return Probe(model, as_objective(loss), [], [batch], held=HeldBatches([batch]), **rest)


def read(
    instrument: Instrument, model: nn.Module, batch: Any, *, loss: Any = CROSS_ENTROPY, state: Any = None, step: int = 0
) -> tuple[dict[str, float], Any, dict[str, Any]]:
    """Values, memory and provenance."""
    with probe_of(model, batch, loss, step=step) as probe:
        view = View(probe, instrument.needs)
        values, state = instrument.advance(view, instrument.init() if state is None else state)
    return {name: float(v) for name, v in values.items()}, state, view.meter.provenance  # type: ignore[arg-type]


def hessian_of(model: nn.Module, batch: Any) -> tuple[Tensor, str, float | None]:
    """The matrix, its route and the error that is given for a product."""
    with probe_of(model, batch) as probe:
        operator = probe.curvatures.hessian(Meter())
        return matrix_of(operator), operator.route, operator.error


def same_weights(one: nn.Module, other: nn.Module) -> tuple[nn.Module, nn.Module]:
    other.load_state_dict(one.state_dict())
    return one.double(), other.double()


def test_every_row_of_the_table_is_a_test() -> None:
    files = Path(__file__).parents[1].rglob("test_*.py")
    tests = "\n".join(re.findall(r"def test_\w+", "".join(file.read_text(encoding="utf8") for file in files)))
    rows_ = [line for line in (__doc__ or "").splitlines() if line.startswith("| ")][1:]
    assert len(rows_) >= 28
    for row in rows_:
        names = re.findall(r"`(\w+)`", row)
        assert names, row
        assert [name for name in names if f"def test_{name}" not in tests] == [], row


# What power iteration gets wrong.


def test_a_negative_eigenvalue_dominates() -> None:
    """Scaled-up weights: the most negative eigenvalue is the larger in size, and neither reading mistakes it."""
    built = build(BY_NAME["residual"], seed=7)
    with torch.no_grad():
        for p in built.model.parameters():
            p.mul_(4)
    values_D = torch.linalg.eigvalsh(dense_hessian(built.model, built.loss, built.batch))
    assert -values_D[0] > 1.5 * values_D[-1] > 0
    top, _, _ = read(Sharpness(tol=1e-4), built.model, built.batch)
    low, _, _ = read(Smallest(tol=1e-4), built.model, built.batch)
    assert top["sharpness"] == pytest.approx(float(values_D[-1]), rel=1e-3)
    assert low["smallest"] == pytest.approx(float(values_D[0]), rel=1e-3)


class Quadratic(nn.Module):
    """1/2 theta'A theta: the Hessian is A, and the gradient A theta has no part along eigenvectors that theta lacks."""

    def __init__(self, matrix_DD: Tensor, theta_D: Tensor) -> None:
        super().__init__()
        self.matrix_DD, self.theta = matrix_DD, nn.Parameter(theta_D)

    def forward(self, x: Tensor) -> Tensor:
        return (self.theta @ self.matrix_DD @ self.theta / 2).expand(len(x))


def losses(call: Any, x: Any) -> Tensor:
    return call(x)


def axes(size: int = 60) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


@pytest.mark.parametrize("second", [0.98, -0.98])
def test_near_ties(second: float) -> None:
    """Stopped by the residual: the answer is an eigenvalue within its bound of the top, whichever of the two it is."""
    q_DD, x = axes(), torch.zeros(1, 1, dtype=torch.float64)
    spectrum = torch.cat([torch.tensor([1.0, second]), torch.linspace(-0.5, 0.5, 58)]).double()
    model = Quadratic(q_DD @ torch.diag(spectrum) @ q_DD.T, torch.randn(60, dtype=torch.float64))
    for tol in (0.0675, 1e-3):
        values, _, _ = read(Sharpness(tol=tol), model, x, loss=losses)
        assert 0 <= 1 - values["sharpness"] <= values["bound"]


AUDIT = 10  # readings, by docs/architecture.md


def test_sitting_on_a_lower_eigenvector() -> None:
    """Both eigenvectors stay, but another takes the lead; the gradient has no part of it, nor has the memory."""
    q_DD, x = axes(), torch.zeros(1, 1, dtype=torch.float64)

    def spectrum(first: float, second: float) -> Tensor:
        return (
            q_DD @ torch.diag(torch.cat([torch.tensor([first, second]), torch.linspace(0, 0.4, 58)]).double()) @ q_DD.T
        )

    model, state = Quadratic(spectrum(0.5, 1.0), q_DD[:, 1].clone()), None
    for step in range(7):
        values, state, _ = read(Sharpness(), model, x, loss=losses, state=state, step=step)
    assert values["sharpness"] == pytest.approx(1.0, rel=1e-2)
    model.matrix_DD = spectrum(2.0, 1.0)
    right = []
    for step in range(7, 7 + 2 * AUDIT):
        values, state, _ = read(Sharpness(), model, x, loss=losses, state=state, step=step)
        right.append(0 <= 2.0 - values["sharpness"] <= values["bound"])
    assert all(right[AUDIT - 1 :]), right


# What autograd gets wrong.


class Attention(nn.Module):
    """`kernel` is forced inside the forward, where nothing outside has a say; None writes the products out."""

    def __init__(self, kernel: SDPBackend | None) -> None:
        super().__init__()
        self.inward, self.out, self.kernel = nn.Linear(4, 12), nn.Linear(4, 3), kernel

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in self.inward(x).chunk(3, -1))
        if self.kernel is None:
            h = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
        else:
            with sdpa_kernel(self.kernel):
                h = F.scaled_dot_product_attention(q, k, v)
        return self.out(h.squeeze(1).mean(1))


def test_fused_attention_that_the_forward_insists_on() -> None:
    (fused, plain), batch = same_weights(Attention(SDPBackend.FLASH_ATTENTION), Attention(None)), sequences()
    hessian_DD, route, error = hessian_of(fused, batch)
    true_DD = dense_hessian(plain, CROSS_ENTROPY, batch)
    assert "last resort" in route
    assert "_scaled_dot_product_flash_attention" in route
    assert error is not None
    assert (hessian_DD - true_DD).norm() < 1e-6 * true_DD.norm()
    for matrix in MATRICES[1:]:
        with probe_of(fused, batch) as probe:
            operator = getattr(probe.curvatures, matrix)(Meter())
            with pytest.raises(
                Refusal, match=r"_scaled_dot_product_flash_attention.*the Hessian is read by differences"
            ):
                operator.matvec(torch.ones(operator.size, dtype=torch.float64))


class _OwnCheckpoint(torch.autograd.Function):
    """As libraries write it: the backward runs a backward of its own, into `.grad` of what `run` uses."""

    @staticmethod
    def forward(ctx, run, x):  # type: ignore[no-untyped-def]
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.run(x), g)
        return None, x.grad


class OwnCheckpoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(_OwnCheckpoint.apply(lambda h: self.inner(h).tanh(), self.first(x)))


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("make", [lambda: Checkpointed(reentrant=True), OwnCheckpoint], ids=["torch", "own"])
def test_checkpoints_that_hide_parameters(make: Callable[[], nn.Module], matrix: str) -> None:
    model = make().double()
    with probe_of(model, rows()) as probe, pytest.raises(Refusal, match="use_reentrant=False"):
        getattr(probe.curvatures, matrix)(Meter())


@pytest.mark.parametrize("matrix", MATRICES[1:])
def test_a_backward_without_a_derivative_is_refused_where_there_is_no_last_resort(matrix: str) -> None:
    """The Hessian is read by differences; without the check these would lose a share in silence."""
    with (
        probe_of(Fused(fused=True).double(), rows()) as probe,
        pytest.raises(Refusal, match=r"got an autograd\.Function"),
    ):
        getattr(probe.curvatures, matrix)(Meter())


class LastOf(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.recurrent, self.out = kind(4, 3, batch_first=True, num_layers=2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.recurrent(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: Callable[..., nn.Module]) -> None:
    """In single precision too, which has kernels of its own."""
    single, batch = LastOf(kind), sequences()
    true_DD = dense_hessian(copy.deepcopy(single).double(), CROSS_ENTROPY, batch)
    for model, x, allowed in ((copy.deepcopy(single).double(), batch[0], 1e-8), (single, batch[0].float(), 1e-5)):
        hessian_DD, route, _ = hessian_of(model, (x, batch[1]))
        assert route == "double backward, graph kept"
        assert (hessian_DD - true_DD).norm() < allowed * true_DD.norm()
