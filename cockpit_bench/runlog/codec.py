"""One record, one line of strict JSON, and back.

JSON has no non-finite numbers, and parsers disagree about bare `NaN`, so such floats are always the strings `"NaN"`,
`"Infinity"`, `"-Infinity"`. Where a string could also stand (event details, provenance) a text that happens to be
spelled like one of them gets a leading backslash, so both come back as what they were.
Arrays of more than 16 elements become `{"dtype", "shape", "base64"}`, little-endian; smaller ones become nested lists
and come back as lists.
"""

import base64
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from cockpit_bench.runlog.reading import Ending, Event, Metrics, Outcome, Reading, Record, Source, Status

LARGEST_LIST = 16
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_NEEDS_ESCAPE = re.compile(r"\\*(NaN|Infinity|-Infinity)")
_ARRAY_KEYS = {"dtype", "shape", "base64"}
_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"bare {name} is not JSON; a log spells it as a string")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _pack(array: npt.NDArray[Any]) -> dict[str, Any]:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {
        "dtype": little.dtype.str,
        "shape": list(array.shape),
        "base64": base64.b64encode(little.tobytes()).decode("ascii"),
    }


def _unpack(body: Mapping[str, Any]) -> npt.NDArray[Any]:
    try:
        dtype = np.dtype(body["dtype"])
        flat = np.frombuffer(base64.b64decode(body["base64"], validate=True), dtype)
        return flat.reshape(body["shape"]).astype(dtype.newbyteorder("="))
    except TypeError as error:
        raise ValueError(f"broken array: {error}") from error


def spell_number(value: Any) -> Any:
    """The JSON form of a number, an array, or nested lists of numbers."""
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, int):
        return value
    if isinstance(value, list | tuple):
        return [spell_number(item) for item in value]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        if value.size > LARGEST_LIST:
            return _pack(np.asarray(value))
        return spell_number(value.tolist())
    raise TypeError(
        f"expected a number, a real numpy array or lists of numbers, got {type(value).__name__}; "
        "convert it first (a tensor with .tolist()); a record that holds it cannot be written"
    )


def parse_number(value: Any) -> Any:
    """Inverse of `spell_number`; ValueError for anything it never writes."""
    if isinstance(value, int | float):
        return value
    if isinstance(value, str) and value in NON_FINITE:
        return NON_FINITE[value]
    if isinstance(value, list):
        return [parse_number(item) for item in value]
    if isinstance(value, dict) and value.keys() == _ARRAY_KEYS:
        return _unpack(value)
    raise ValueError(f"expected a number, got {value!r}")


def spell(value: Any) -> Any:
    """The JSON form of numbers, texts, None, and lists and mappings of them."""
    if isinstance(value, str):
        return "\\" + value if _NEEDS_ESCAPE.fullmatch(value) else value
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {_text(key): spell(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [spell(item) for item in value]
    return spell_number(value)


def parse(value: Any) -> Any:
    """Inverse of `spell`."""
    if isinstance(value, str):
        if value in NON_FINITE:
            return NON_FINITE[value]
        return value[1:] if _NEEDS_ESCAPE.fullmatch(value) else value
    if isinstance(value, list):
        return [parse(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == _ARRAY_KEYS:
            return _unpack(value)
        return {key: parse(item) for key, item in value.items()}
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {type(value).__name__} {value!r}; a record that holds it is not written")
    return value


class _Place(NamedTuple):
    """What may stand in one field: how it is written and how it is read back."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _mapping(write: Callable[[Any], Any], read: Callable[[Any], Any]) -> _Place:
    return _Place(
        lambda value: {_text(key): write(item) for key, item in value.items()},
        lambda value: {key: read(item) for key, item in value.items()},
    )


def _choice(literal: Any) -> _Place:
    options = get_args(literal)

    def check(value: Any) -> Any:
        if value not in options:
            raise ValueError(f"expected one of {', '.join(options)}, got {value!r}; the record would be unreadable")
        return value

    return _Place(check, check)


_TEXT = _Place(_text, _text)
_COUNT = _Place(operator.index, operator.index)
_NUMBER = _Place(lambda value: spell_number(float(value)), lambda value: float(parse_number(value)))
_MAYBE_COUNT = _Place(*((lambda value, act=act: None if value is None else act(value)) for act in _COUNT))
_MAYBE_NUMBER = _Place(*((lambda value, act=act: None if value is None else act(value)) for act in _NUMBER))
_NUMBERS = _mapping(spell_number, parse_number)
_FREE = _mapping(spell, parse)

_KINDS: dict[str, tuple[type[Any], dict[str, _Place]]] = {
    "reading": (
        Reading,
        {
            "instrument": _TEXT,
            "step": _COUNT,
            "seconds": _NUMBER,
            "status": _choice(Status),
            "values": _NUMBERS,
            "stderr": _NUMBERS,
            "cost": _NUMBERS,
            "provenance": _FREE,
            "reason": _TEXT,
        },
    ),
    "metrics": (Metrics, {"step": _COUNT, "seconds": _NUMBER, "values": _NUMBERS, "source": _choice(Source)}),
    "event": (Event, {"step": _COUNT, "seconds": _NUMBER, "name": _TEXT, "detail": _FREE}),
    "outcome": (
        Outcome,
        {
            "status": _choice(Ending),
            "step": _COUNT,
            "seconds": _NUMBER,
            "hit_step": _MAYBE_COUNT,
            "hit_seconds": _MAYBE_NUMBER,
            "best": _MAYBE_NUMBER,
            "reason": _TEXT,
            "buckets": _NUMBERS,
            "wall": _NUMBER,
            "tax": _NUMBERS,
            "skips": _NUMBERS,
        },
    ),
}
_KIND_OF = {cls: kind for kind, (cls, _) in _KINDS.items()}
_OPTIONAL = {
    kind: {entry.name for entry in fields(cls) if entry.default_factory is not MISSING or entry.default is not MISSING}
    for kind, (cls, _) in _KINDS.items()
}


def dump_line(body: Mapping[str, Any]) -> str:
    """Strict JSON on one line of ASCII; `body` is already spelled."""
    return _ENCODER.encode(body)


def parse_line(line: str | bytes) -> dict[str, Any]:
    """The JSON object on a line, still spelled; ValueError when there is none (a torn or foreign line)."""
    try:
        body = _DECODER.decode(line.decode("utf-8") if isinstance(line, bytes) else line)
    except RecursionError as error:
        raise ValueError("nested too deeply for a log line") from error
    if not isinstance(body, dict) or not isinstance(body.get("kind"), str):
        raise ValueError("expected a JSON object with a kind")
    return body


def encode(record: Record) -> str:
    """The line of a record, without its newline. Empty optional fields are left out.

    TypeError or ValueError when a value has no place in the log, naming the field.
    """
    kind = _KIND_OF[type(record)]
    body: dict[str, Any] = {"kind": kind}
    optional = _OPTIONAL[kind]
    for name, place in _KINDS[kind][1].items():
        value = getattr(record, name)
        if name in optional and not value:
            continue
        try:
            body[name] = place.write(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{kind} field {name!r}: {error}") from error
    return dump_line(body)


def record_of(body: Mapping[str, Any]) -> Record | None:
    """The record of a parsed line; None for a kind this version does not know. Unknown fields are passed over."""
    if body["kind"] not in _KINDS:
        return None
    cls, places = _KINDS[body["kind"]]
    try:
        record: Record = cls(**{name: place.read(body[name]) for name, place in places.items() if name in body})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a {body['kind']}: {error}") from error
    return record


def decode(line: str | bytes) -> Record | None:
    """Inverse of `encode`; None for an unknown kind, ValueError for a line that is not whole."""
    return record_of(parse_line(line))
