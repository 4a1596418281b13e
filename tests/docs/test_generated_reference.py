"""docs/instruments.md says what the instruments declare, no more and no less."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from instruments import Output, catalogue
from instruments.gradient.norm import Norm

DOCS = Path(__file__).parents[2] / "docs"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", DOCS / "generate_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_current() -> bool:
    module = generator()
    return bool(module.PAGE.read_text(encoding="utf-8") == module.page())


def test_the_page_is_current() -> None:
    assert is_current(), "docs/instruments.md is out of date: run `make reference` and look at the difference"


def test_the_page_has_every_instrument() -> None:
    page = (DOCS / "instruments.md").read_text(encoding="utf-8")
    assert [name for name in catalogue.builtin_names() if f"## {name}\n" not in page] == []


def test_a_changed_declaration_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Norm, "outputs", {"norm": Output("loss / parameter", "something else")})
    assert not is_current()


def test_price_text() -> None:
    module = generator()
    assert module.price_text(catalogue.make("gradient/norm")) == "0 g"
    assert module.price_text(catalogue.make("batch/loss")) == "`0.0 if view.loss_given else 1 / 3` g"
