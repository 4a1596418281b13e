"""Reading a log, whole or while it grows."""

import json
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from cockpit_bench.runlog.codec import parse, parse_line, record_of
from cockpit_bench.runlog.folder import ENVIRONMENT, LOG, STATUS, TRIAL
from cockpit_bench.runlog.header import Header, SchemaError, header_of
from cockpit_bench.runlog.modules import ModuleNames
from cockpit_bench.runlog.reading import Event, Outcome, Record
from cockpit_bench.runlog.run import Run

_HEAD_BYTES = 256


def current(records: Iterable[Record]) -> list[Record]:
    """The records that still count, in order: those no later `superseded` event has taken back.

    The events themselves stay, so applying this to a list that was polled in pieces gives the same answer.
    """
    kept: list[Record] = []
    for record in records:
        from_step = _from_step(record)
        if from_step is not None:
            kept = [
                earlier
                for earlier in kept
                if _from_step(earlier) is not None or (earlier.step < from_step and not isinstance(earlier, Outcome))
            ]
        kept.append(record)
    return kept


def _from_step(record: Record) -> int | None:
    if not isinstance(record, Event) or record.name != "superseded":
        return None
    step = record.detail.get("from_step")
    return step if isinstance(step, int) else None


class Follower:
    """Reads what was added to a log since the last look, whole lines only.

    The place is kept by file identity and byte offset. A file that was replaced or shrank is read again from its
    start; `restarts` then grows, and what was polled before belongs to another log. The first bytes are compared
    too, because file systems reuse the inode of a deleted file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.header: Header | None = None
        self.bad_lines = 0
        self.restarts = 0
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._head = b""
        self._modules = ModuleNames()

    def poll(self) -> list[Record]:
        """New records that still count among each other; none while the file does not exist.

        A `superseded` event among them takes back records of earlier polls: use `current` on the joined list.
        SchemaError when the log is of a newer schema.
        """
        try:
            handle = self.path.open("rb")
        except FileNotFoundError:
            return []
        with handle:
            self._find_place(handle)
            handle.seek(self._offset)
            data = handle.read()
        whole = data[: data.rfind(b"\n") + 1]
        records = self._take(whole)
        self._offset += len(whole)
        self._head += whole[: _HEAD_BYTES - len(self._head)]
        return current(records)

    def _find_place(self, handle: BinaryIO) -> None:
        stat = os.fstat(handle.fileno())
        identity = (stat.st_dev, stat.st_ino)
        same = identity == self._identity and stat.st_size >= self._offset
        if same and handle.read(len(self._head)) == self._head:
            return
        if self._identity is not None:
            self.restarts += 1
        self._identity, self._offset, self._head = identity, 0, b""
        self.header, self.bad_lines, self._modules = None, 0, ModuleNames()

    def _take(self, whole: bytes) -> list[Record]:
        records, header, bad_lines = [], self.header, 0
        for line in whole.split(b"\n"):
            if not line:
                continue
            try:
                body = parse_line(line)
                if body["kind"] == "header":
                    found = header_of(body)
                    header = header or found
                elif (record := record_of(body)) is not None:
                    records.append(self._modules.restored(record))
            except SchemaError:
                raise
            except ValueError:
                bad_lines += 1
        self.header = header
        self.bad_lines += bad_lines
        return records


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run folder, finished or still running.

    FileNotFoundError when it holds no log, ValueError when the log holds nothing that can be read.
    """
    path = Path(folder)
    log = path / LOG
    if not log.is_file():
        found = "a folder without it" if path.is_dir() else "a file" if path.exists() else "nothing there"
        raise FileNotFoundError(
            f"expected a run folder with {LOG} at {path}, got {found}; pass the logdir of a run. Nothing can be read"
        )
    follower = Follower(log)
    records = follower.poll()
    if follower.header is None and not records:
        raise ValueError(
            f"expected records in {log}, got {log.stat().st_size} bytes and {follower.bad_lines} unreadable lines; "
            "the run died before its first record, or this is another program's file. Delete the folder or run again"
        )
    return Run(
        folder=path,
        header=follower.header,
        records=records,
        bad_lines=follower.bad_lines,
        trial=_read_toml(path / TRIAL),
        status=_read_json(path / STATUS),
        environment=_read_json(path / ENVIRONMENT),
    )


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected TOML in {path}: {error}; mend or delete the file to read this run") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(parse(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"expected a JSON object in {path}: {error}; mend or delete the file to read this run"
        ) from error
