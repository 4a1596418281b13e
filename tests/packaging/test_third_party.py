"""An instrument of somebody else, found by its entry point; and one that is broken, which is a message."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cockpit_bench import Cockpit, cli
from instruments import catalogue

MODULE = """\
from instruments import Gauge, Output

class Weights(Gauge):
    outputs = {"number": Output("1", "trained scalars")}
    needs = frozenset()
    reference = "none"

    def price(self, view):
        return 0.0

    def read(self, view):
        return {"number": float(view.layout.size)}
"""
ENTRY_POINTS = """\
[cockpit_bench.instruments]
acme/weights = acme_instruments:Weights
acme/broken = acme_absent:Nothing
acme/function = acme_instruments:Output
"""


@pytest.fixture(autouse=True)
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution as pip would leave it: a module and a dist-info folder on the path."""
    (tmp_path / "acme_instruments.py").write_text(MODULE, encoding="utf-8")
    info = tmp_path / "acme_instruments-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-instruments\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_instruments", raising=False)


def small_cockpit(**settings: object) -> tuple[Cockpit, nn.Module]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Cockpit(model, optimizer, loss=nn.MSELoss(), panel=None, sinks=[], **settings), model  # type: ignore[arg-type]


def test_it_is_listed_without_being_imported(capsys: pytest.CaptureFixture[str]) -> None:
    assert "acme/weights" in catalogue.names()
    assert cli.main(["list", "instruments"]) == 0
    listed = capsys.readouterr().out
    assert "acme/weights" in listed
    assert "acme/broken" in listed
    assert "acme_instruments" not in sys.modules


def test_it_is_read() -> None:
    cockpit, model = small_cockpit(instruments={"acme/weights": 1})
    batch = torch.randn(4, 3), torch.randn(4, 2)
    with cockpit:
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        loss.backward()
        cockpit.observe(batch, loss)
    assert cockpit.last["acme/weights"] == {"number": 8.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acme/broken", "acme/broken.*cannot be imported: No module named 'acme_absent'"),
        ("acme/function", "expected a subclass of instruments.Instrument"),
        ("acme/wieghts", "did you mean acme/weights"),
    ],
)
def test_what_cannot_be_made_says_so(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_cockpit(instruments={name: 1})


def test_without_the_distribution_there_is_no_such_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "test_without" not in entry])
    assert "acme/weights" not in catalogue.names()
