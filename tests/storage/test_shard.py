"""Headers agree with the safetensors library; every way of being wrong has its own sentence."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.numpy import save as save_numpy
from safetensors.torch import save as save_torch

from slowllm.errors import CheckpointError
from slowllm.storage.shard import read_header
from slowllm.storage.spans import DTYPE_BITS
from tests.support.headers import contents, entry, header_of
from tests.support.properties import num_examples

fuzz = num_examples(
    200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def by_oracle(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        tensors = safetensors.deserialize(file)
    except Exception:  # whatever it is, the library refuses
        return None
    return {name: (found["dtype"], tuple(found["shape"]), bytes(found["data"])) for name, found in tensors}


def by_us(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        spans = read_header(path)
    except CheckpointError as error:
        return None if str(error).startswith(path.name) else pytest.fail(f"no file is named: {error}")
    file = path.read_bytes()
    for name, span in spans.items():
        assert (span.name, span.path) == (name, path)
    return {
        name: (span.dtype, span.shape, file[span.offset : span.offset + span.num_bytes])
        for name, span in spans.items()
    }


def stricter(text: bytes) -> bool:
    """Whether a header has one of the things that `read_header` says it refuses and the library does not."""
    if not text.startswith(b"{"):
        return True
    found = False

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        found |= len(dict(items)) < len(items)
        return dict(items)

    header = json.loads(text, object_pairs_hook=pairs)
    tensors = [value for name, value in header.items() if name != "__metadata__"]
    return found or any(isinstance(value, list) or isinstance(value["dtype"], dict) for value in tensors)


def agrees(path: Path, file: bytes) -> None:
    path.write_bytes(file)
    ours, theirs = by_us(path), by_oracle(file)
    if theirs is not None and ours is None:
        assert stricter(file[8 : 8 + struct.unpack("<Q", file[:8])[0]]), file
    else:
        assert ours == theirs, file


# The library as oracle

NUMPY_DTYPES = ["bool", "uint8", "int8", "int16", "uint16", "float16", "int32", "float32", "int64", "float64"]
names = st.text(st.characters(codec="utf-8"), max_size=6)
shapes = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def saved(draw: st.DrawFn) -> bytes:
    """A file as the library writes it."""
    # Not an empty table: without tensors, safetensors 0.8 writes a header for it that it cannot read itself.
    metadata = draw(st.none() | st.dictionaries(names, names, min_size=1, max_size=2))
    tensors = draw(st.dictionaries(names, st.tuples(st.sampled_from(NUMPY_DTYPES), shapes), max_size=4))
    tensors.pop("__metadata__", None)
    made = {
        name: (np.arange(math.prod(shape)) + 3).reshape(shape).astype(dtype)
        for name, (dtype, shape) in tensors.items()
    }
    if draw(st.booleans()):
        return save_numpy(made, metadata)
    unsigned = {"uint16", "bool"}
    return save_torch(
        {
            name: torch.from_numpy(array).to(torch.bfloat16 if array.dtype.name in unsigned else None)
            for name, array in made.items()
        },
        metadata,
    )


BIG = [2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 10**19, 10**25, -1, -(2**63)]
sizes = st.integers(0, 9) | st.sampled_from(BIG)
odd = st.one_of(
    st.sampled_from(
        [None, True, False, 1.0, 4.0, -0.0, 1e300, math.inf, -math.inf, math.nan, "4", "", [], {}, "\ud800"]
    ),
    sizes,
)


TENSOR_FAULTS = [
    "offset", "offsets", "shape", "length", "dtype", "field", "extra", "whole", "twice", "swap", "name",
]  # fmt: skip
METADATA = [{"a": "b"}, None, {"a": 1}, [], "a", {}, {"a": "\ud800"}, {"a": "\ud83d\ude00"}]


@st.composite
def by_hand(draw: st.DrawFn) -> bytes:
    """A file that is right but for two things at most."""
    tensors: list[tuple[str, Any]] = []
    position = 0
    for name in draw(st.lists(st.sampled_from(["a", "b", "c", "é", "", "a.b"]), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(shapes)
        num_bytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        tensors.append((name, entry(dtype, shape, [position, position + num_bytes])))
        position += num_bytes
    metadata, end, lie, longer = [], "", 0, 0
    for fault in draw(st.lists(st.sampled_from([*TENSOR_FAULTS, *TENSOR_FAULTS, *"melo"]), max_size=2)):
        match fault:
            case "m":
                metadata.append(("__metadata__", draw(st.sampled_from(METADATA))))
            case "e":
                end = draw(st.sampled_from([" ", "\n\t\r ", "\0", "\x0c", ","]))
            case "l":
                lie = draw(st.sampled_from([1, -1, 8, 2**40, 10**8]))
            case "o":
                longer = draw(st.sampled_from([1, -1]))
            case _ if tensors:
                _spoil(draw, tensors, fault)
    pairs = draw(st.permutations(metadata + tensors))
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs) + "}" + end
    encoded = text.encode("utf-8", "surrogatepass")
    data = (bytes(range(256)) * 32)[: max(position + longer, 0)]
    return contents(encoded, data, max(len(encoded) + lie, 0))


def _spoil(draw: st.DrawFn, tensors: list[tuple[str, Any]], fault: str) -> None:
    index = draw(st.integers(0, len(tensors) - 1))
    name, value = tensors[index]
    value = dict(value) if isinstance(value, dict) else entry()
    shape = value.get("shape", [4])
    match fault:
        case "offset":
            offsets = value.get("data_offsets", [0, 4])
            value["data_offsets"] = [draw(odd), *offsets[1:]] if isinstance(offsets, list) else [0, 4]
            if draw(st.booleans()):
                value["data_offsets"] = value["data_offsets"][::-1]
        case "offsets":
            value["data_offsets"] = draw(st.lists(odd, max_size=3) | odd)
        case "shape":
            value["shape"] = draw(st.lists(odd, max_size=3) | odd)
        case "length" if isinstance(shape, list):
            value["shape"] = draw(st.permutations([*shape, draw(st.sampled_from([0, 1, 2, 2**32, 2**63]))]))
        case "dtype":
            known = sorted(DTYPE_BITS)
            value["dtype"] = draw(st.sampled_from([*known, "F33", "f32", "C128", {"U8": None}]) | odd)
        case "field" if value:
            del value[draw(st.sampled_from(sorted(value)))]
        case "extra":
            value["more"] = draw(st.recursive(odd, lambda inner: st.lists(inner, max_size=2), max_leaves=3))
        case "whole":
            value = draw(st.sampled_from([["U8", [4], [0, 4]], None, 3, "U8", [], {}]))
        case "twice":
            tensors.append((draw(st.sampled_from([name, "again"])), value))
        case "swap":  # the bytes of one tensor under the name of another
            other = draw(st.integers(0, len(tensors) - 1))
            tensors[other], value = (tensors[other][0], value), tensors[other][1]
        case "name":
            name = draw(st.sampled_from(["\ud800", "\udc00\ud800", "\ud83d\ude00", "x\x00", "__metadata__"]))
    tensors[index] = (name, value)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@fuzz
@given(file=saved())
def test_what_the_library_writes_is_read(shard: Path, file: bytes) -> None:
    shard.write_bytes(file)
    found = by_us(shard)
    assert found is not None
    assert found == by_oracle(file)


@num_examples(700, suppress_health_check=fuzz.suppress_health_check)
@given(file=by_hand())
def test_spoiled_headers_are_judged_as_by_the_library(shard: Path, file: bytes) -> None:
    agrees(shard, file)


@fuzz
@given(
    file=saved() | by_hand(),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
    cut=st.integers(-3, 400),
)
def test_flipped_bytes_and_cut_files_are_judged_as_by_the_library(
    shard: Path, file: bytes, flips: list[tuple[int, int]], cut: int
) -> None:
    changed = bytearray(file)
    for position, value in flips:
        if position < len(changed):
            changed[position] = value
    # Once in four, cut short; else as it is, or longer.
    agrees(shard, bytes(changed[:cut]) if 0 < cut < 100 else bytes(changed) + b"\0" * -min(cut, 0))


@fuzz
@given(
    text=st.text(st.sampled_from('{}[]":,0123456789.eE-+ \\untrlafs\n'), max_size=40),
    data=st.binary(max_size=4),
)
def test_text_that_is_almost_json_is_judged_as_by_the_library(shard: Path, text: str, data: bytes) -> None:
    agrees(shard, contents('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":' + text + "}}", b"data"))
    agrees(shard, contents("{" + text, data))


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
@pytest.mark.parametrize("shape", [[8], [1], [3], [0], [], [2, 2]])
def test_every_dtype_has_the_librarys_size(shard: Path, dtype: str, shape: list[int]) -> None:
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    agrees(shard, contents(header_of(a=entry(dtype, shape, [0, bits // 8])), bytes(bits // 8)))
    agrees(shard, contents(header_of(a=entry(dtype, shape, [0, -(-bits // 8)])), bytes(-(-bits // 8))))


def test_no_dtype_of_the_library_is_unknown() -> None:
    try:
        safetensors.deserialize(contents(header_of(a=entry("no such"))))
    except safetensors.SafetensorError as error:
        known = str(error).partition("expected one of")[2].partition(" at line")[0]
        assert {word.strip("` ") for word in known.split(",")} == DTYPE_BITS.keys()
    else:
        pytest.fail("the library takes any dtype")


def test_depth_and_range_end_where_the_librarys_do(shard: Path) -> None:
    def accepted(more: str) -> bool:
        file = contents('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":' + more + "}}", b"data")
        agrees(shard, file)
        return by_us(shard) is not None

    assert accepted("[" * 125 + "]" * 125)
    assert not accepted("[" * 126 + "]" * 126)
    assert accepted('{"x":' * 125 + "1" + "}" * 125)
    assert not accepted('{"x":' * 126 + "1" + "}" * 126)
    assert not accepted("[" * 100_000)
    assert accepted("9" * 300)
    assert not accepted("9" * 400)
    assert accepted("-1e308")
    assert not accepted("-1e309")


def test_a_deep_shape_is_one_short_sentence(shard: Path) -> None:
    for depth in (90, 900):
        shard.write_bytes(
            contents('{"a":{"dtype":"U8","shape":' + "[" * depth + "]" * depth + ',"data_offsets":[0,4]}}')
        )
        with pytest.raises(CheckpointError) as caught:
            read_header(shard)
        assert len(str(caught.value)) < 200


STRICTER = {
    "name twice": '{"a":%s,"a":%s}',
    "ignored field twice": '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":1,"x":1}}',
    "metadata key twice": '{"__metadata__":{"k":"v","k":"v"},"a":%s}',
    "blank before": ' {"a":%s}',
    "entry as a list": '{"a":["U8",[4],[0,4]]}',
    "dtype as a table": '{"a":{"dtype":{"U8":null},"shape":[4],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("header", STRICTER.values(), ids=STRICTER)
def test_what_is_refused_beyond_the_library_is_as_stated(shard: Path, header: str) -> None:
    file = contents(header.replace("%s", json.dumps(entry())), b"data")
    assert by_oracle(file) is not None
    shard.write_bytes(file)
    assert by_us(shard) is None


# Each refusal of a header, in its own words

A = '"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
REFUSALS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"model\.safetensors: has 0 bytes, too few"),
    "seven bytes": (b"1234567", r"has 7 bytes, too few"),
    "huge header": (contents("{}", b"", 100_000_001), r"claims a header of 100,000,001 bytes; this is not"),
    "negative header": (b"\xff" * 20, r"claims a header of 18,446,744,073,709,551,615 bytes; this is not"),
    "git-LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 12345\n",
        r"is a git-LFS pointer, not the file itself; fetch the file with `git lfs pull`, or the model with `slowllm",
    ),
    "other text": (b"version 2 of the weights, to come", r"claims a header of 2,336,927,755,350,992,246 bytes; this"),
    "header cut": (contents("{}", b"", 3), r"claims a header of 3 bytes but the file has 10\. The download"),
    "no header": (contents(""), r"its header is not a JSON object"),
    "list": (contents("[]"), r"its header is not a JSON object"),
    "not JSON": (contents("{a"), r"its header is not valid JSON \(Expecting property name"),
    "not UTF-8": (contents(b'{"\xff"}'), r"its header is not valid JSON \('utf-8' codec"),
    "UTF-16": (contents('{"a":1}'.encode("utf-16-le")), r"its header is not valid JSON"),
    "lone surrogate": (contents('{"\\ud800":1}'), r"its header is not valid JSON \('utf-8' codec can't encode"),
    "NaN": (contents('{"a":NaN}'), r"its header is not valid JSON \(NaN is not JSON\)"),
    "too large": (contents('{"a":1e999}'), r"its header is not valid JSON \(number out of range\)"),
    "too deep": (contents("{" + A[:-1] + ',"x":' + "[" * 126 + "]" * 126 + "}}"), r"JSON \(nested too deeply\)"),
    "endless": (contents('{"a":' + "[" * 100_000), r"its header is not valid JSON \(.*recursion"),
    "twice": (contents("{" + A + "," + A + "}", b"data"), r"a stands twice in the header"),
    "metadata": (contents('{"__metadata__":{"a":1}}'), r"its __metadata__ is not a table of strings"),
    "entry": (contents('{"a":7}'), r"a has no dtype, shape and data_offsets"),
    "no offsets": (contents('{"a":{"dtype":"U8","shape":[4]}}'), r"a has no dtype, shape and data_offsets"),
    "dtype": (contents(header_of(a=entry("F33"))), r"a has the unknown dtype 'F33'"),
    "negative": (contents(header_of(a=entry(shape=[-4]))), r"a has the impossible shape \[-4\]"),
    "bool": (contents(header_of(a=entry(shape=[True, 4]))), r"a has the impossible shape \[True, 4\]"),
    "minus zero": (contents(header_of(a=entry()).replace("[0, 4]", "[-0, 4]"), b"data"), r"data_offsets \[-0\.0, 4\]"),
    "float": (contents(header_of(a=entry(shape=[4.0]))), r"a has the impossible shape \[4\.0\]"),
    "overflow": (contents(header_of(a=entry(shape=[2**40, 2**40, 0]))), r"a has the impossible shape \[109"),
    "offsets": (contents(header_of(a=entry(offsets=[0, 4, 8]))), r"a has the impossible data_offsets \[0, 4, 8\]"),
    "negative offset": (contents(header_of(a=entry(offsets=[-4, 0]))), r"impossible data_offsets \[-4, 0\]"),
    "backwards": (contents(header_of(a=entry(offsets=[4000, 0]))), r"a ends at byte 0 before it begins at 4,000"),
    "half a byte": (contents(header_of(a=entry("F4", [3], [0, 1]))), r"a of shape \[3\] and dtype F4 does not fill"),
    "size": (contents(header_of(a=entry("F32"))), r"shape \[4\] and dtype F32 needs 16 bytes but has 4"),
    "overlap": (
        contents(header_of(a=entry(), b=entry(offsets=[3, 7]))),
        r"b starts at byte 131, inside a; the header is damaged",
    ),
    "hole": (contents(header_of(a=entry(offsets=[1, 5]))), r"1 bytes before a belong to no tensor"),
    "short": (contents("{" + A + "}", b"dat"), r"a ends at byte 65 but the file has 64\. The download is incomplete"),
    "long": (contents("{" + A + "}", b"data!"), r"the last tensor ends at byte 65 but the file has 66; it is too"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "words"), REFUSALS.values(), ids=REFUSALS)
def test_a_header_is_refused_with(tmp_path: Path, file: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file)
    with pytest.raises(CheckpointError, match=words):
        read_header(path)
    assert by_oracle(file) is None or words.endswith("stands twice in the header")


def test_a_shard_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: No such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_header(tmp_path)


def test_many_names_are_checked_in_linear_time(shard: Path) -> None:
    # A quadratic search for the name that stands twice would take hours.
    header = "{" + ",".join(f'"{i}":0' for i in (*range(300_000), 299_999)) + "}"
    shard.write_bytes(contents(header))
    with pytest.raises(CheckpointError, match="299999 stands twice"):
        read_header(shard)


# Folders
