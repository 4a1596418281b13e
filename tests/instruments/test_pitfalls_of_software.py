"""The rest of the table of test_pitfalls: compilers, shards, exotic attention, and who waits for whom."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pitfalls import CROSS_ENTROPY, Attention, hessian_of, probe_of, read, rows, sequences
from torch import Tensor, distributed, nn
from torch.overrides import TorchFunctionMode
from twins import dense_hessian

from instruments import Refusal, View
from instruments.curvature.sharpness import Sharpness
from instruments.meter import Meter


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Calls(nn.Module):
    """A layer, a function, a layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 5), nn.Linear(5, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def tanh(h: Tensor) -> Tensor:
    return torch.tanh(h) * 2


def compiled_part() -> nn.Module:
    model = net()
    model[0] = torch.compile(model[0], backend="aot_eager")
    return model


def compiled_in_place() -> nn.Module:
    model = net()
    model.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize(
    "make",
    [compiled_part, compiled_in_place, lambda: Calls(torch.compile(tanh, backend="aot_eager")).double()],
    ids=["a part", "in place", "a function"],
)
def test_what_is_compiled_is_run_as_written(make: Any) -> None:
    """Without it, backward through compiled code cannot be differentiated, which torch says when it is tried."""
    model, batch = make(), rows()
    hessian_DD, route, _ = hessian_of(model, batch)
    with torch.compiler.set_stance("force_eager"):
        true_DD = dense_hessian(model, CROSS_ENTROPY, batch)
    assert route == "double backward, graph kept"
    assert (hessian_DD - true_DD).norm() < 1e-7 * true_DD.norm()


class Flex(Attention):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (t.unsqueeze(1) for t in self.inward(x).chunk(3, -1))
        return self.out(flex_attention(q, k, v).squeeze(1).mean(1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU has no backward of it")
def test_flex_attention_is_refused_by_its_name() -> None:
    with (
        probe_of(Flex(None).double(), sequences()) as probe,
        pytest.raises(NotImplementedError, match="FlexAttention does not support backward on CPU"),
    ):
        probe.curvatures.hessian(Meter())


@pytest.mark.parametrize("matrix", ["hessian", "step_hessian", "gauss_newton", "fisher"])
def test_sharded_parameters_are_refused_by_name(tmp_path: Path, matrix: str) -> None:
    """A shard of one process is the whole, and yet its Hessian would be read as zero."""
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = net()
        fully_shard(model, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
        with probe_of(model, rows()) as probe, pytest.raises(Refusal, match=r"got '0\.weight' as a shard"):
            getattr(probe.curvatures, matrix)(Meter())
    finally:
        distributed.destroy_process_group()


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for the device, and how many numbers come over."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.largest = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
            self.count[name] += 1
            self.largest = max(self.largest, args[0].numel())
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_a_product_and_gets_few_numbers() -> None:
    """Vectors stay on the device: what comes over does not grow with the model."""
    found, instrument = [], Sharpness(tol=1e-5)
    for width in (8, 64):
        model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
        x, y = rows()
        waits, plans = Waits(), {}
        with probe_of(model, (x.float(), y), plans=plans) as probe:
            probe.curvatures.hessian(Meter())  # what is looked for once a run
        with probe_of(model, (x.float(), y), plans=plans) as probe, waits:
            view = View(probe, instrument.needs)
            instrument.advance(view, instrument.init())
        assert view.meter.products >= 4
        assert waits.count.total() <= 2 * view.meter.products + 4, waits.count
        found.append(waits.largest)
    assert max(found) <= 64


def test_the_count_sees_who_waits() -> None:
    """The reading above would be caught if it handed a vector to the host."""
    waits = Waits()
    with waits:
        torch.ones(100).cpu().tolist()
        float(torch.ones(()))
    assert (waits.count.total(), waits.largest) == (3, 100)
    assert read(Sharpness(), net(), rows())[0]["converged"] == 1.0
