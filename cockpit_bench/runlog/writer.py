"""Appending records to a log so that a crash at any moment costs at most the record being written.

One `os.write` on an O_APPEND descriptor per record: a killed process loses nothing that was written, two writers do
not mix their lines. A record counts with its newline; what a full disk or a power cut tore off is given its own
newline before the next record, never cut away.
"""

import errno
import os
import time
from pathlib import Path

from cockpit_bench.runlog.codec import encode, parse_line
from cockpit_bench.runlog.header import Header, SchemaError, encode_header, header_of
from cockpit_bench.runlog.modules import ModuleNames
from cockpit_bench.runlog.reading import Record


class LogWriter:
    """An open log. Opening writes a header line, also into a log that is continued.

    The file reaches the disk itself (fsync) at most every `sync_seconds`, on `sync()` and on closing: a killed
    process loses nothing, a power cut at most that much.
    """

    def __init__(self, path: str | os.PathLike[str], header: Header, *, sync_seconds: float = 5.0) -> None:
        self.path = Path(path)
        self._sync_seconds = sync_seconds
        self._modules = ModuleNames()
        _check_schema(self.path)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._torn = _ends_torn(self._fd)
            self._synced = time.monotonic()
            self._append(encode_header(header))
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, record: Record) -> None:
        """Append one record, and before it the names of its modules where they are new.

        OSError when it did not fit: it is lost, and the next one starts on its own line.
        """
        if self._fd < 0:
            raise ValueError(f"expected an open log, got {self.path} after close(); open it again to continue it")
        for part in self._modules.shortened(record):
            self._append(encode(part))

    def _append(self, text: str) -> None:
        line = b"\n" * self._torn + text.encode("ascii") + b"\n"
        written = os.write(self._fd, line)
        if written < len(line):
            self._torn = self._torn or written > 0
            raise OSError(
                errno.ENOSPC,
                f"expected to write {len(line)} bytes, the file took {written}; free some space. "
                "This record is lost, later ones are not affected",
                str(self.path),
            )
        self._torn = False
        if time.monotonic() - self._synced >= self._sync_seconds:
            self.sync()

    def sync(self) -> None:
        """Force what was written onto the disk. Call it with every checkpoint, so that both tell the same story."""
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close; a second call does nothing."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _ends_torn(fd: int) -> bool:
    size = os.fstat(fd).st_size
    return size > 0 and os.pread(fd, 1, size - 1) != b"\n"


def _check_schema(path: Path) -> None:
    """Refuse to continue a log of a newer schema; any other first line is left for readers to judge."""
    try:
        with path.open("rb") as handle:
            header_of(parse_line(handle.readline()))
    except SchemaError:
        raise
    except (FileNotFoundError, ValueError):
        return
