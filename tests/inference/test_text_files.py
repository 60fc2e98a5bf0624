"""Texts of files: read again for every pass, of whatever kind, with little memory; and one sentence for what is wrong."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import InputError
from slowllm.inference.text_files import TextFiles, Texts
from slowllm.planning.host_plan import MAX_RIDER_TOKENS
from slowllm.planning.packing import pack
from slowllm.runtime.description import ModelInfo
from tests.support.paths import TINY_BLOOM
from tests.support.properties import num_examples


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return ModelInfo(str(TINY_BLOOM))


def test_each_kind_of_file_has_its_texts(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    table, columns = tmp_path / "a.csv", tmp_path / "a.parquet"
    plain.write_bytes(b"\xef\xbb\xbf one \r\n\n  two\nthree")
    lines.write_text('{"text": " one "}\n\n{"text": "two", "id": 4}\n')
    table.write_text('id,text\n1,"one"\n2,two\n')
    parquet.write_table(pyarrow.table({"text": ["one", "two"] * 1000, "id": [1] * 2000}), columns)
    files = [str(file) for file in (plain, lines, table, columns)]
    with TextFiles(files, texts=["said"]) as found:
        first, second = list(found), list(found)
    assert first == second
    assert [(Path(file).name, number, text) for file, number, text in first[:10]] == [
        ("text", 1, "said"), ("a.txt", 1, "one"), ("a.txt", 3, "two"), ("a.txt", 4, "three"),
        ("a.jsonl", 1, "one"), ("a.jsonl", 3, "two"), ("a.csv", 2, "one"), ("a.csv", 3, "two"),
        ("a.parquet", 1, "one"), ("a.parquet", 2, "two"),
    ]  # fmt: skip
    assert first[-1][1:] == (2000, "two")


def test_what_can_be_read_once_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    with TextFiles(["-"]) as found:
        assert list(found) == list(found) == [("-", 1, "one"), ("-", 2, "two")]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(b"three\n"))
    writer.start()
    with TextFiles([str(pipe)]) as found:
        assert list(found) == list(found) == [(str(pipe), 1, "three")]
    writer.join()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", None, "No such file or directory"),
        ("a.txt", b"", "a.txt: has no text"),
        ("a.txt", b" \n\n", "a.txt: has no text"),
        ("a.txt", b"a\nb\0\n", "is a binary file and not text in UTF-8 .byte 2 of line 2"),
        ("a.txt", b"a\ncaf\xe9\n", "line 2 is not UTF-8 .byte 4 is 0xe9"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2 has no text in the column text"),
        ("a.jsonl", b"a\n", "line 1 is not JSON"),
        ("a.csv", b"id\n1\n", "has no column text; there are id"),
        ("a.csv", b"text,id\n ,1\n", "line 2 has no text in the column text"),
        ("a.parquet", b"PAR1 this is none", "is no Parquet file that can be read"),
        ("a.parquet", None, "No such file or directory"),
    ],
)
def test_what_has_no_texts_is_refused(
    name: str, content: bytes | None, sentence: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with TextFiles([str(tmp_path / name)]) as files, pytest.raises(InputError, match=sentence):
        list(files)


def test_parquet_without_the_column_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "a.parquet")
    with TextFiles([str(tmp_path / "a.parquet")], "question") as files:  # noqa: SIM117
        with pytest.raises(InputError, match="has no column question; there are id"):
            list(files)


def test_an_empty_text_is_refused() -> None:
    with TextFiles([], texts=["a", " "]) as files, pytest.raises(InputError, match="text 2 is empty"):
        list(files)


def texts_of(info: ModelInfo, files: Any, **options: Any) -> Texts:
    return Texts(info, files, **{"max_tokens": 100, "truncate": False, "prefix": 1, **options})


def test_texts_begin_with_the_prefix_and_are_counted(info: ModelInfo, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("The compiler checks every reference.\nA value.\n")
    with TextFiles([str(file)]) as files:
        found = texts_of(info, files)
        assert [text.ids[0] for text in found] == [1, 1]
        assert [text.ids[1:] for text in found] == [text.line.ids for text in found]
        lengths = [len(text.ids) for text in found]
        assert (found.num_texts, found.num_tokens, found.longest) == (2, sum(lengths), max(lengths))
        bare = texts_of(info, files, prefix=None)
        assert [text.ids for text in bare] == [text.line.ids for text in found]
        assert bare.digest != found.digest
        with pytest.raises(InputError, match=r"a.txt: line 1 has \d+ tokens but the limit is 2"):
            texts_of(info, files, max_tokens=2)
        assert texts_of(info, files, max_tokens=2, truncate=True).num_truncated == 2 - (lengths[1] <= 3)


@pytest.mark.parametrize("content", ["one\n", "one\nthree\n", "one\ntwo and more than there was before\n"])
def test_texts_that_change_are_noticed(content: str, info: ModelInfo, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n")
    with TextFiles([str(file)]) as files:
        found = texts_of(info, files)
        file.write_text(content)
        with pytest.raises(InputError, match=r"ha(s|ve) changed since"):
            list(found)


def test_no_texts_are_refused(info: ModelInfo) -> None:
    with TextFiles([]) as files, pytest.raises(InputError, match="there are no texts"):
        texts_of(info, files)


class Lengths:
    """Texts of given numbers of tokens."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __iter__(self) -> Iterator[tuple[str, int, str]]:
        for number, length in enumerate(self.lengths, 1):
            yield "a", number, " a" * length


@num_examples(20)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30), dropped=st.integers(0, 1),
    padding=st.none() | st.integers(1, 200),
)  # fmt: skip
def test_padding_is_counted_as_it_is_packed(
    info: ModelInfo, lengths: list[int], dropped: int, padding: int | None
) -> None:
    found = texts_of(info, Lengths(lengths), max_tokens=1000)
    own = [max(1, len(text.ids) - dropped) for text in found]
    batches = pack(own, MAX_RIDER_TOKENS, padding)
    assert found.padded_tokens(dropped, padding) == sum(len(b) * max(own[n] for n in b) for b in batches)


def test_jsonl_needs_objects(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(["a"]))
    with TextFiles([str(tmp_path / "a.jsonl")]) as files:  # noqa: SIM117
        with pytest.raises(InputError, match="line 1 must be an object"):
            list(files)
