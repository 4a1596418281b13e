"""The run folder: made, refused, resumed; its small files replaced in one move."""

import json
import os
from pathlib import Path

import pytest

from cockpit_bench.runlog import RunFolder


def test_a_new_folder_with_its_parents(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a" / "b", resume=False)
    assert folder.path.is_dir()
    assert folder.log_path == tmp_path / "a" / "b" / "log.jsonl"
    assert list(folder.path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_without_a_log_is_taken(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "notes.txt").touch()
    RunFolder.create(tmp_path, resume=resume)


def test_an_existing_run_is_refused_unless_resumed(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(FileExistsError, match=r"resume=True.*another logdir"):
        RunFolder.create(tmp_path, resume=False)
    assert RunFolder.create(tmp_path, resume=True).path == tmp_path


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/run"):
        with pytest.raises(OSError, match=r"expected a folder that can be written.*another logdir"):
            RunFolder.create(tmp_path / place, resume=False)


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):  # root may write anywhere
        denied = PermissionError(13, "Permission denied", str(tmp_path))

        def refuse(**_: object) -> None:
            raise denied

        monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"expected a folder that can be written \(Permission denied\)"):
        RunFolder.create(tmp_path, resume=False)


def test_sub_folders_appear_when_asked_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not (tmp_path / "figures").exists()
    assert folder.figures.is_dir()
    assert folder.checkpoints.is_dir()
    assert folder.figures == tmp_path / "figures"


def test_status_is_strict_json_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for state in ("running", "done"):
        folder.write_status({"state": state, "loss": float("nan")})
    body = json.loads((tmp_path / "status.json").read_text())
    assert body == {"state": "done", "loss": "NaN"}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_failed_replacement_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_text("report.html", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write_text("report.html", "new")
    assert (tmp_path / "report.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
