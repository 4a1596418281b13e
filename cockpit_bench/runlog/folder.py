"""The folder of one run and the small files beside its log."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cockpit_bench.runlog.codec import spell

LOG = "log.jsonl"
TRIAL = "trial.toml"
STATUS = "status.json"
ENVIRONMENT = "env.json"


@dataclass(frozen=True)
class RunFolder:
    """A folder that exists and can be written. Files in it, other than the log, are replaced in one move."""

    path: Path

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, resume: bool) -> "RunFolder":
        """Make the folder, or take an existing one that holds no log yet; one that does only when resuming.

        FileExistsError for a run that is already there, OSError for a place that cannot be written. Resuming where
        nothing is yet starts a new run, so that a job that may be preempted can always ask for it.
        """
        folder = cls(Path(path))
        if folder.log_path.exists() and not resume:
            raise FileExistsError(
                f"expected a new run folder, got {folder.path}, which already holds {LOG}; pass resume=True to "
                "continue that run, or another logdir to start a new one. Writing on would mix two runs in one log"
            )
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder.path):
                pass
        except OSError as error:
            raise type(error)(
                error.errno,
                f"expected a folder that can be written ({error.strerror}); choose another logdir or mend its "
                "permissions. Without it nothing is logged",
                str(folder.path),
            ) from error
        return folder

    @property
    def log_path(self) -> Path:
        """Where the log is, or will be."""
        return self.path / LOG

    @property
    def figures(self) -> Path:
        """The folder for figures, made on first use."""
        return self._made("figures")

    @property
    def checkpoints(self) -> Path:
        """The folder for checkpoints, made on first use."""
        return self._made("checkpoints")

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Replace status.json: what the run is doing now, for whoever looks from outside."""
        self._write_json(STATUS, status)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Replace env.json: versions, commit, host, device, seeds."""
        self._write_json(ENVIRONMENT, environment)

    def write_text(self, name: str, text: str) -> None:
        """Replace a file as a whole: a reader sees the old text or the new one, never a part."""
        temporary = self.path / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.path / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _write_json(self, name: str, body: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(spell(body), indent=2, allow_nan=False) + "\n")

    def _made(self, name: str) -> Path:
        path = self.path / name
        path.mkdir(exist_ok=True)
        return path
