"""Headers of GGUF files are read as the maker's own package reads them, and nothing in them is trusted before it is checked."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import CheckpointError
from slowllm.storage.gguf import read_gguf, read_set
from slowllm.storage.gguf_files import gguf_files
from tests.support.properties import num_examples


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def entry(name: str, shape: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dimensions + struct.pack("<IQ", kind, offset)


def file_of(
    pairs: list[bytes],
    entries: list[bytes],
    data: int = 32,
    start: bytes = b"GGUF\x03\0\0\0",
    counts: tuple[int, int] | None = None,
) -> bytes:
    num_tensors, num_pairs = counts or (len(entries), len(pairs))
    header = start + struct.pack("<QQ", num_tensors, num_pairs) + b"".join(pairs) + b"".join(entries)
    return header + bytes(-len(header) % 32 + data)


def written(path: Path) -> Path:
    """Write a small file with the maker's package."""
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "Ω"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    writer.add_string("general.name", "tiny")
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(6, dtype=np.float16).reshape(1, 6))
    writer.add_tensor(
        "three", np.zeros((3, 68), np.uint8), raw_shape=(3, 68), raw_dtype=GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def seen_by_us(path: Path) -> dict[str, tuple[tuple[int, ...], int, int]]:
    return {name: (span.shape, span.offset, span.num_bytes) for name, span in read_gguf(path).spans.items()}


def seen_by_the_maker(path: Path) -> dict[str, tuple[tuple[int, ...], int, int]]:
    reader = GGUFReader(path)
    return {
        tensor.name: (tuple(map(int, reversed(tensor.shape))), int(tensor.data_offset), int(tensor.n_bytes))
        for tensor in reader.tensors
    }


def test_a_file_is_read_as_its_maker_reads_it(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf")
    header = read_gguf(path)
    assert seen_by_us(path) == seen_by_the_maker(path)
    assert header.metadata["tokenizer.ggml.tokens"] == ["a", "", "Ω"]
    assert header.metadata["tokenizer.ggml.scores"] == [0.5, -1.0, 2.0]
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert header.metadata["llama.block_count"] == 3
    assert header.spans["one"].dtype == "F32"
    coding = header.spans["three"].coding
    assert coding is not None
    assert (coding.codec, coding.parts[0].shape) == ("gguf-q8_0", (3, 68))


@num_examples(80)
@given(
    st.lists(st.tuples(st.integers(0, 560), st.integers(0, 255)), min_size=1, max_size=3), st.integers(0, 40)
)
def test_a_damaged_header_is_refused_or_read_as_its_maker_reads_it(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, int]], cut: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    data = bytearray(written(folder / "whole.gguf").read_bytes())
    for place, value in damage:
        data[place % len(data)] = value
    path = folder / "m.gguf"
    path.write_bytes(bytes(data[: len(data) - cut]))
    try:
        ours = seen_by_us(path)
    except CheckpointError:
        return
    assert ours == seen_by_the_maker(path)


HUGE = struct.pack("<Q", 1 << 60)
REFUSED: dict[str, tuple[bytes, str]] = {
    "another format": (b"PK\x03\x04" + bytes(40), r"m\.gguf: does not begin with GGUF, so it is not a GGUF file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a git-LFS pointer, not the file itself"),
    "short": (b"GGUF\x03\0\0\0", "has 8 bytes, too few for a GGUF header"),
    "big-endian": (file_of([], [], start=b"GGUF\0\0\0\x03"), "is a big-endian GGUF file, which is not read"),
    "version": (file_of([], [], start=b"GGUF\x01\0\0\0"), "is of version 1 of GGUF, which is not read; there are 2 and 3"),
    "version 0": (file_of([], [], start=b"GGUF\0\0\0\0"), "is of version 0 of GGUF, which is not read; there are 2 and 3"),
    "version with a flag": (file_of([], [], start=b"GGUF\0\0\0\x80"), "is of version 2147483648 of GGUF, which is not read"),
    "too many tensors": (file_of([], [], counts=(1 << 60, 0)), "claims 1,152,921,504,606,846,976 tensors, more than"),
    "too many keys": (file_of([], [], counts=(0, 1 << 60)), "claims 1,152,921,504,606,846,976 keys, more than"),
    "long string": (file_of([pair("a", 8, HUGE)], []), r"a ends at byte 1,152,\d+.* but the file has"),
    "long name of a tensor": (file_of([], [HUGE]), "the name of a tensor ends at byte"),
    "long list": (file_of([pair("a", 9, struct.pack("<I", 4) + HUGE)], []), "a ends at byte"),
    "long list of strings": (
        file_of([pair("a", 9, struct.pack("<I", 8) + HUGE)], []),
        "a claims 1,152,921,504,606,846,976 strings, more than the file can hold",
    ),
    "list of lists": (file_of([pair("a", 9, struct.pack("<IQ", 9, 1))], []), "'a' is a list of the type 9, which is not read"),
    "unknown value": (file_of([pair("a", 13, b"")], []), "'a' has a value of the unknown type 13"),
    "no bool": (file_of([pair("a", 7, b"\x02")], []), r"a is said to be true or false but is \[2\]"),
    "no UTF-8": (file_of([pair("a", 8, string(b"\xff"))], []), "a is not UTF-8"),
    "key twice": (file_of([pair("a", 0, b"\0")] * 2, []), "'a' stands twice in its metadata"),
    "alignment": (
        file_of([pair("general.alignment", 4, struct.pack("<I", 24))], []),
        "its general.alignment is 24, which is no power of two",
    ),
    "alignment of another type": (
        file_of([pair("general.alignment", 8, string("32"))], []), "its general.alignment is '32', which is no power of two",
    ),
    "tensor twice": (file_of([], [entry("t"), entry("t", offset=32)], 64), "t stands twice in its list of tensors"),
    "dimensions": (file_of([], [entry("t", (1,) * 5)]), "t has 5 dimensions; there are 1 to 4"),
    "no dimension": (file_of([], [entry("t", ())]), "t has 0 dimensions"),
    "empty": (file_of([], [entry("t", (0, 3))]), r"t has the impossible shape \[3, 0\]"),
    "overflow": (file_of([], [entry("t", (1 << 40, 1 << 40))]), "t has the impossible shape"),
    "unknown type": (file_of([], [entry("t", kind=99)]), "t has the unknown type 99; there are F32, F16, BF16, Q4_0"),
    "type that is not read": (file_of([], [entry("t", kind=34)]), "t has the type TQ1_0, which is not read"),
    "no blocks": (file_of([], [entry("t", (40, 2), kind=8)]), r"t has rows of 40 weights, which are no blocks of 32 \(Q8_0\)"),
    "odd place": (file_of([], [entry("t", offset=8)], 64), "t begins at byte 8 of the data, which is no multiple of 32"),
    "overlap": (file_of([], [entry("t", (16, 2)), entry("u", offset=32)], 160), r"u begins at byte \d+, inside t"),
    "out of the file": (
        file_of([], [entry("t", (100, 2))]), r"t ends at byte 8\d\d but the file has 128; the download is incomplete",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_that_lies_is_refused_by_name(name: str, tmp_path: Path) -> None:
    data, message = REFUSED[name]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(tmp_path / "m.gguf")


def test_a_header_has_a_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of([pair("a", 8, struct.pack("<Q", 1 << 29))], []))
    with open(path, "r+b") as file:
        file.truncate(1 << 30)  # takes no room on the disk
    with pytest.raises(CheckpointError, match=r"a ends at byte 536,.* of a header that may have 268,435,456"):
        read_gguf(path)


def split_file(path: Path, number: int, count: int, names: list[str], total: int) -> None:
    pairs = [
        pair("split.no", 2, struct.pack("<H", number)), pair("split.count", 2, struct.pack("<H", count)),
        pair("split.tensors.count", 5, struct.pack("<i", total)),
    ]  # fmt: skip
    path.write_bytes(file_of(pairs, [entry(name) for name in names]))


def test_a_set_of_files_is_one_model(tmp_path: Path) -> None:
    files = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    split_file(files[0], 0, 2, ["a"], 2)
    split_file(files[1], 1, 2, ["b"], 2)
    assert gguf_files(tmp_path) == gguf_files(files[1]) == files
    assert {name: span.path for name, span in read_set(files).spans.items()} == {"a": files[0], "b": files[1]}
    (tmp_path / "mmproj-m.gguf").touch()
    assert gguf_files(tmp_path) == files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: b.unlink(), "m-00002-of-00002.gguf: missing, though m-00001-of-00002.gguf says that it is there"),
        (lambda a, b: split_file(b, 0, 2, ["b"], 2), "m-00002-of-00002.gguf: says that it is file 0 of 2, counted from 0"),
        (lambda a, b: split_file(b, 1, 2, ["a"], 2), "a stands in m-00001-of-00002.gguf and again in m-00002-of-00002.gguf"),
        (lambda a, b: split_file(a, 0, 2, ["a"], 3), "belongs to a set of 2 files with 3 tensors, but 2 with 2 are there"),
        (lambda a, b: a.rename(a.with_name("x.gguf")) and b.unlink(), "x.gguf: belongs to a set of 2 files with 2 tensors"),
        (lambda a, b: b.rename(b.with_name("z.gguf")) and a.rename(a.with_name("y.gguf")), "has 2 GGUF models"),
    ],
)  # fmt: skip
def test_half_a_set_is_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    files = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    split_file(files[0], 0, 2, ["a"], 2)
    split_file(files[1], 1, 2, ["b"], 2)
    change(*files)
    with pytest.raises(CheckpointError, match=message):
        read_set(gguf_files(tmp_path))


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(file_of([], []))
    with pytest.raises(CheckpointError, match=r"m\.gguf: holds no tensors"):
        read_set(gguf_files(tmp_path))


def test_a_folder_with_safetensors_is_no_gguf_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    (tmp_path / "model.safetensors").touch()
    assert gguf_files(tmp_path) == []
    assert gguf_files(tmp_path / "nothing") == []
