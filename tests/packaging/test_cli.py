"""The command line as scripts and people meet it: exit codes, messages, and what goes to which stream."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from cockpit_bench import cli
from cockpit_bench.runlog import LogWriter, Outcome, new_header

QUICK = ["--steps", "2", "--panel", "none", "--threads", "1"]


class Said(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Said]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls the command line in a folder of its own, and says what came of it."""
    monkeypatch.chdir(tmp_path)

    def act(*words: str) -> Said:
        capsys.readouterr()
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return act


def folders() -> list[Path]:
    return sorted(Path("runs").iterdir()) if Path("runs").exists() else []


def test_a_missed_target_is_a_result(call: Call) -> None:
    said = call("run", "quadratic", "--algorithm", "sgd", *QUICK)
    assert said.code == 0
    assert "miss" in said.out
    assert len(folders()) == 1


MISUSE = [
    (["run", "digits_2d2c"], "did you mean digits_2c2d"),
    (["run", "quadratic", "--algorithm", "adm"], "did you mean .*adam"),
    (["run", "quadratic", "--panel", "standart"], "did you mean standard"),
    (["run", "quadratic", "--set", "momentun=0.9", "--algorithm", "sgd"], "did you mean momentum"),
    (["run", "quadratic", "--set", "lr"], "NAME=VALUE"),
    (["run", "quadratic", "--set", "lr=fast"], "adam refuses its hyperparameters"),
    (["run", "quadratic", "--set", "lr=-1"], "Invalid learning rate"),
    (["run", "quadratic", "--batch-size", "0"], "batch_size .*>= 1, got 0"),
    (["run", "quadratic", "--batch-size", "1000000"], "at least one batch of 1000000"),
    (["run", "quadratic", "--steps", "0"], "steps .*>= 1, got 0"),
    (["run", "quadratic", "--seed", "-1"], "seed"),
    (["run", "quadratic", "--threads", "0"], "--threads >= 1"),
    (["run", "quadratic", "--timeout-seconds", "0"], "timeout_seconds > 0"),
    (["run", "quadratic", "--runs", "a_file"], "a_file"),
    (["run", "absent.toml"], "absent.toml"),
    (["run", "unknown_key.toml"], "did you mean workload"),
    (["show", "nowhere"], "nothing there"),
    (["show", "."], "a folder without it"),
    (["show", "a_file"], "a file"),
    (["list", "everything"], "invalid choice"),
    (["fly"], "invalid choice"),
    ([], "COMMAND"),
]


@pytest.mark.parametrize(("words", "message"), MISUSE, ids=["_".join(words) or "nothing" for words, _ in MISUSE])
def test_misuse_is_two_with_a_remedy_and_no_run(call: Call, words: list[str], message: str) -> None:
    Path("a_file").write_text("text", encoding="utf-8")
    Path("unknown_key.toml").write_text('worklod = "quadratic"\n', encoding="utf-8")
    quick = ["--threads", "1"] if words[:1] == ["run"] and "--threads" not in words else []
    said = call(*words, *quick)
    assert said.code == 2, said
    assert re.search(message, said.err), said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    assert folders() == []


def test_misuse_in_json(call: Call) -> None:
    said = call("run", "digits_2d2c", "--json")
    assert said.code == 2
    assert "digits_2c2d" in json.loads(said.out)["error"]


def test_run_and_show_in_json(call: Call) -> None:
    said = call("run", "quadratic", "--set", "lr=0.1", *QUICK[:2], "--panel", "full", "--json")
    assert said.code == 0
    facts = json.loads(said.out, parse_constant=pytest.fail)
    assert facts["outcome"]["status"] == "miss"
    assert facts["trial"]["hyperparameters"] == {"lr": 0.1}
    assert facts["instruments"]["curvature/sharpness"]["readings"]["ok"] == 2
    assert facts["instruments"]["curvature/sharpness"]["values"]["sharpness"] > 0
    shown = json.loads(call("show", facts["folder"], "--json").out, parse_constant=pytest.fail)
    assert shown == facts
    text = call("show", facts["folder"]).out
    assert all(name in text for name in facts["instruments"])


def test_show_a_folder_of_runs(call: Call) -> None:
    for seed in ("1", "2"):
        assert call("run", "quadratic", "--seed", seed, *QUICK).code == 0
    said = call("show", "runs")
    assert said.code == 0
    assert str(folders()[-1]) in said.out
    assert "seed=2" in said.out


def test_a_finished_trial_is_shown_unless_again(call: Call) -> None:
    words = ["run", "quadratic", *QUICK]
    first = call(*words)
    second = call(*words)
    assert second.code == 0
    assert "finished before" in second.out
    assert str(folders()[0]) in second.out
    assert len(folders()) == 1
    assert "finished before" not in first.out
    assert "finished before" not in call(*words, "--again").out
    assert len(folders()) == 2
    assert "finished before" not in call(*words, "--seed", "7").out  # another trial
    assert len(folders()) == 3


def test_a_trial_file_is_the_trial(call: Call) -> None:
    assert call("run", "quadratic", "--algorithm", "sgd", "--set", "lr=0.01", *QUICK).code == 0
    said = call("run", str(folders()[0] / "trial.toml"))
    assert said.code == 0, said.err
    assert "finished before" in said.out
    assert len(folders()) == 1


def test_list_in_json(call: Call) -> None:
    everything = json.loads(call("list", "--json").out)
    assert tuple(everything) == cli.LISTS
    assert all(everything.values())
    assert json.loads(call("list", "panels", "--json").out).keys() == {"panels"}


def test_a_run_that_failed_is_one(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from cockpit_bench.bench import runner

    def out_of_memory(*_: object, **__: object) -> runner.Result:
        folder = Path("runs/failed")
        folder.mkdir(parents=True)
        log = LogWriter(folder / "log.jsonl", new_header("failed"))
        outcome = Outcome("out_of_memory", 3, 0.1, None, None, None, "too large", {}, 0.1, {})
        log.write(outcome)
        log.close()
        return runner.Result(outcome, folder, fresh=True)

    monkeypatch.setattr(runner, "prepare", out_of_memory)
    said = call("run", "quadratic", *QUICK)
    assert said.code == 1
    assert "out_of_memory: too large" in said.out


def test_the_installed_command(tmp_path: Path) -> None:
    """Results on stdout, progress on stderr, by the script that pip installs."""
    command = [Path(sys.executable).with_name("cockpit-bench"), "run", "quadratic", *QUICK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stderr
    assert "outcome   miss" in done.stdout
    assert "step 2/2" not in done.stdout


def test_version(call: Call) -> None:
    said = call("--version")
    assert said.code == 0
    assert said.out.startswith("cockpit-bench 0.")
