"""Every record comes back from its line as it went in."""

import json
import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cockpit_bench.runlog import Event, Metrics, Outcome, Reading, Record, decode, encode

READING = Reading("gradient/norm", 3, 0.5, "ok", {"norm": 1.0})
DTYPES = ("<f2", "<f4", ">f4", "<f8", "|i1", "<i8", ">i4", "|u1", "<u4", "|b1")

texts = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["NaN", "Infinity", "-Infinity", "\\NaN", "\\\\NaN", "\n"]
)
floats = st.floats(allow_nan=True, allow_infinity=True)
numbers = floats | st.integers(-(2**70), 2**70)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)
arrays = st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, shapes))
transposed = arrays.map(lambda array: array.T)
values = st.dictionaries(texts, numbers | st.lists(numbers, max_size=20) | arrays | transposed, max_size=4)
scalars = st.dictionaries(texts, numbers, max_size=4)
facts = st.dictionaries(texts, texts | numbers | st.booleans() | st.none() | st.lists(texts, max_size=4), max_size=4)
details = st.dictionaries(
    texts,
    st.recursive(texts | numbers | st.none() | arrays, lambda inner: st.lists(inner) | st.dictionaries(texts, inner)),
    max_size=3,
)
steps = st.integers(0, 2**40)
seconds = st.floats(0, 1e9)
records = st.one_of(
    st.builds(
        Reading,
        texts,
        steps,
        seconds,
        st.sampled_from(["ok", "skipped", "failed"]),
        values,
        scalars,
        scalars,
        facts,
        texts,
    ),
    st.builds(Metrics, steps, floats, scalars, st.sampled_from(["evaluation", "user"])),
    st.builds(Event, steps, seconds, texts, details),
    st.builds(
        Outcome,
        st.sampled_from(["hit", "miss", "diverged", "out_of_memory", "error", "timeout", "interrupted"]),
        steps,
        seconds,
        steps | st.none(),
        floats | st.none(),
        floats | st.none(),
        texts,
        scalars,
        seconds,
        scalars,
    ),
)


def as_read(value: Any) -> Any:
    """What a value is after the round trip: small arrays are lists, tuples too, the rest is itself."""
    if isinstance(value, np.ndarray) and value.size <= 16:
        return value.tolist()
    if isinstance(value, dict):
        return {key: as_read(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_read(item) for item in value]
    return value


def same(left: Any, right: Any) -> bool:
    """Equal to the bit: NaN is itself, -0.0 is not 0.0, 1 is not 1.0."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        if left.dtype.newbyteorder("=") != right.dtype or left.shape != right.shape:
            return False
        return same(left.tolist(), right.tolist())
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (
            left == right and math.copysign(1, left) == math.copysign(1, right)
        )
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


@settings(deadline=None)
@given(records)
@example(replace(READING, values={"h": np.full(17, np.nan, np.float32), "zero": -0.0}))
@example(Event(0, 0.0, "x", {"a": "NaN", "b": math.nan, "c": "\\NaN", "d": ["-Infinity", -math.inf]}))
def test_round_trip(record: Record) -> None:
    line = encode(record)
    assert line.isascii()
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    back = decode(line)
    assert type(back) is type(record)
    for entry in fields(record):
        before, after = as_read(getattr(record, entry.name)), getattr(back, entry.name)
        assert same(before, after), f"{entry.name}: {before!r} came back as {after!r}"


def test_non_finite_numbers_have_one_spelling() -> None:
    line = encode(replace(READING, values={"a": math.nan, "b": [math.inf, -math.inf], "c": np.float32("nan")}))
    assert json.loads(line)["values"] == {"a": "NaN", "b": ["Infinity", "-Infinity"], "c": "NaN"}


def test_arrays_beyond_16_elements_are_packed_little_endian() -> None:
    big = np.arange(17, dtype=">i4")
    body = json.loads(encode(replace(READING, values={"small": np.arange(16.0).reshape(4, 4), "big": big})))["values"]
    assert body["small"] == np.arange(16.0).reshape(4, 4).tolist()
    assert body["big"]["dtype"] == "<i4"
    assert body["big"]["shape"] == [17]


def test_arrays_come_back_writable_and_native() -> None:
    back = decode(encode(replace(READING, values={"h": np.arange(20, dtype=">f8")})))
    assert isinstance(back, Reading)
    array = back.values["h"]
    assert isinstance(array, np.ndarray)
    assert array.dtype.isnative
    array[0] = 5.0


def test_empty_optional_fields_are_left_out() -> None:
    assert set(json.loads(encode(READING))) == {"kind", "instrument", "step", "seconds", "status", "values"}


def test_unknown_kinds_and_fields_are_passed_over() -> None:
    body = json.loads(encode(READING)) | {"color": "red"}
    assert decode(json.dumps(body)) == READING
    assert decode('{"kind":"hologram","step":1}') is None


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[1]",
        '"reading"',
        "{}",
        '{"kind":1}',
        encode(READING)[:-1],
        encode(READING).replace("1.0", "NaN"),
        encode(READING).replace("1.0", '"one"'),
        encode(READING).replace("1.0", "null"),
        encode(READING).replace('"ok"', '"fine"'),
        encode(READING).replace('"step":3', '"step":"3"'),
        encode(READING).replace('{"norm":1.0}', "[1.0]"),
        encode(READING).replace('"seconds":0.5,', ""),
        encode(READING).replace("1.0", '{"dtype":"<f8","shape":[3],"base64":"AAAA"}'),
        encode(READING).replace("1.0", '{"dtype":"O","shape":[1],"base64":"AAAAAAAAAAA="}'),
        encode(READING).replace("1.0", '{"dtype":7,"shape":null,"base64":[]}'),
        "[" * 100_000,
        b'{"kind":"event\xff"}',
    ],
)
def test_lines_that_are_no_record_raise_value_error(line: str | bytes) -> None:
    with pytest.raises(ValueError):
        decode(line)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (replace(READING, values={"norm": object()}), "'values'.*expected a number.*got object"),
        (replace(READING, values={"norm": "1.0"}), "'values'.*got str"),
        (replace(READING, values={"norm": None}), "'values'.*got NoneType"),
        (replace(READING, values={"norm": np.ones(3, complex)}), "'values'.*real numpy array"),
        (replace(READING, values={"norm": np.ones(3, np.longdouble)}), "'values'.*real numpy array"),
        (replace(READING, values={1: 2.0}), "'values'.*expected a text"),
        (replace(READING, step=1.5), "'step'"),
        (replace(READING, status="fine"), "'status'.*expected one of ok, skipped, failed"),
        (Event(0, 0.0, "x", {"a": {1: 2}}), "'detail'.*expected a text"),
    ],
)
def test_what_cannot_be_written_is_named(record: Record, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        encode(record)
