"""The commands that show a run: TensorBoard on loopback, and the picture."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from cockpit_bench import cli
from cockpit_bench.runlog import LogWriter, Reading, new_header

COMMAND = [sys.executable, "-c", "import sys; from cockpit_bench.cli import main; sys.exit(main())"]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    writer = LogWriter(folder / "log.jsonl", new_header("one", target=None))
    writer.write(Reading("batch/loss", 0, 0.0, "ok", {"loss": 1.0}))
    writer.close()
    return folder


def test_dash_serves_on_loopback_until_interrupted(run_folder: Path) -> None:
    words = [*COMMAND, "dash", str(run_folder.parent), "--port", "0", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url.partition("#")[0], timeout=20) as page:
            assert b"TensorBoard" in page.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


def test_dash_wants_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dash", str(tmp_path)]) == 2
    assert "holds no log.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_plot_writes_beside_the_log_or_where_it_is_told(
    run_folder: Path, ending: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["plot", str(run_folder.parent), "--format", ending]) == 0
    assert capsys.readouterr().out.strip() == str(run_folder / "figures" / f"panel.{ending}")
    out = tmp_path / "deep" / f"x.{ending}"
    assert cli.main(["plot", str(run_folder), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"figure": str(out)}
    assert out.stat().st_size > 1000


def test_plot_of_an_instrument(run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["plot", str(run_folder), "--instrument", "batch/loss", "--format", "svg"]) == 0
    path = run_folder / "figures" / "batch_loss.svg"
    assert capsys.readouterr().out.strip() == str(path)
    assert "<svg" in path.read_text()
    out = tmp_path / "x.png"
    assert cli.main(["plot", str(run_folder), "--instrument", "batch/loss", "--out", str(out)]) == 0
    assert out.stat().st_size > 1000


def test_plot_of_an_unknown_instrument_names_the_nearest(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", str(run_folder), "--instrument", "batch/los"]) == 2
    said = capsys.readouterr()
    assert "'batch/los'" in said.err
    assert "nearest: batch/loss" in said.err
    assert said.out == ""
    assert not (run_folder / "figures").exists()


def test_plot_refuses_what_it_cannot_write(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", str(run_folder), "--out", "x.jpg"]) == 2
    assert "png, pdf, svg" in capsys.readouterr().err
    assert cli.main(["plot", str(run_folder / "nowhere")]) == 2


def test_showing_a_run_imports_no_torch(run_folder: Path) -> None:
    drawing = ["plot", str(run_folder)]
    for words in (["show", str(run_folder)], drawing, [*drawing, "--instrument", "batch/loss"]):
        code = f"import sys; from cockpit_bench.cli import main; main({words!r}); assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
