"""`cockpit-bench list --prices`: the price list of a panel on a workload, in text and JSON."""

import json
from pathlib import Path

import pytest

from cockpit_bench import cli, panels

QUICK = ["list", "--prices", "quadratic"]


def test_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*QUICK, "--panel", "full"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith("quadratic, panel full: one step's gradient takes")
    assert [line.split()[0] for line in lines[2 : 2 + len(panels.PANELS["full"])]] == list(panels.PANELS["full"])
    assert "on top of the training time; no budget is set" in said.out
    assert said.err == ""
    assert list(tmp_path.iterdir()) == [], "a preview leaves no run behind"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*QUICK, "--panel", "light", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["panel"] == "light"
    assert [row["label"] for row in found["rows"]] == list(panels.LIGHT)
    assert {row["how"] for row in found["rows"]} == {"measured", "declared"}
    share = sum(row["seconds"] * row["due"] for row in found["rows"]) / found["gradient_seconds"]
    assert found["share"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "--prices", "quadratik"], "did you mean quadratic"),
        ([*QUICK, "--panel", "fool"], "did you mean full"),
        (["list", "--panel", "full"], "--panel together with --prices"),
        (["list", "panels", "--prices", "quadratic"], "one at a time"),
    ],
)
def test_misuse(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_an_empty_panel(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*QUICK, "--panel", "none"]) == 0
    assert "no instruments, no price" in capsys.readouterr().out


def test_switched_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COCKPIT", "off")
    assert cli.main(QUICK) == 2
    assert "COCKPIT=off" in capsys.readouterr().err
