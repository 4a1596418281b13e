"""The header line: which run this is, which schema its records follow, which versions wrote it.

Every opening of a log writes one, so a resumed run shows what it was resumed with. Within a schema number fields and
kinds may be added, and readers pass over what they do not know; the number grows when an old field changes meaning.
"""

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cockpit_bench.runlog.codec import dump_line, parse, spell

SCHEMA = 1
_PACKAGES = ("cockpit-bench", "torch", "backpack-for-pytorch", "numpy", "scipy", "tensorboard", "scikit-learn")


class SchemaError(ValueError):
    """The log was written by a newer schema than this version can read."""


@dataclass(frozen=True)
class Header:
    """`created` is UTC in ISO form; `extra` holds every field beyond the fixed ones."""

    run: str
    created: str
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA


def new_header(run: str, **extra: Any) -> Header:
    """A header for a log that is opened now."""
    created = datetime.datetime.now(datetime.UTC).isoformat()
    return Header(run=run, created=created, versions=installed_versions(), extra=extra)


def installed_versions() -> dict[str, str]:
    """Versions that a number may depend on, from package metadata: nothing is imported for it."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def encode_header(header: Header) -> str:
    """The header's line, without its newline."""
    fixed = {"kind": "header", "schema": header.schema, "created": header.created, "run": header.run}
    return dump_line({**spell(header.extra), **fixed, "versions": spell(header.versions)})


def header_of(body: Mapping[str, Any]) -> Header:
    """The header on a parsed line; SchemaError when it announces a newer schema, ValueError when it is no header."""
    schema = body.get("schema")
    if body["kind"] != "header" or not isinstance(schema, int):
        raise ValueError("expected a header line with a schema number")
    if schema > SCHEMA:
        raise SchemaError(
            f"this log follows schema {schema}, this version of cockpit-bench reads up to {SCHEMA}; upgrade it "
            "(pip install -U cockpit-bench), because read as it is the records could mean something else"
        )
    extra = {
        key: parse(item) for key, item in body.items() if key not in ("kind", "schema", "created", "run", "versions")
    }
    versions = body.get("versions", {})
    return Header(
        run=str(body.get("run", "unknown")),
        created=str(body.get("created", "unknown")),
        versions=dict(versions) if isinstance(versions, dict) else {},
        extra=extra,
        schema=schema,
    )
