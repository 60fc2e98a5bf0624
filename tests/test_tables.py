"""Rows of CSV and Parquet files, and one sentence for what is none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from slowllm.errors import InputError
from slowllm.tables import kind_of, read_table


def test_the_name_says_what_a_file_holds() -> None:
    names = ("a.jsonl", "a.NDJSON", "a.csv", "b/a.Parquet", "a.txt", "csv", "-")
    assert [kind_of(name) for name in names] == ["json", "json", "csv", "parquet", "text", "text", "text"]


def test_rows_of_csv_have_the_lines_that_they_begin_on(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'\xef\xbb\xbftext,id\r\n"two\nlines, one cell",1\r\n\r\n"say ""so""",\r\n,3\r\n')
    assert read_table(file, ["text"]) == [
        (2, {"text": "two\nlines, one cell", "id": "1"}),
        (5, {"text": 'say "so"', "id": ""}),
        (6, {"id": "3"}),
    ]


def test_a_cell_may_be_a_list_in_json(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('choices\n"["" a"", "" b""]"\n')
    assert read_table(file, ["choices"], lists=["choices"]) == [(2, {"choices": [" a", " b"]})]
    file.write_text("choices\na;b\n")
    with pytest.raises(InputError, match=r"line 2: choices must be a list in JSON, .* not 'a;b'"):
        read_table(file, ["choices"], lists=["choices"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"text,id\n", "has no rows"),
        (b"id,name\n1,a\n", "has none of the columns text, prompt; there are id, name"),
        (b"text,text\na,b\n", "has the column 'text' twice"),
        (b"text,id\na\n", "line 2 has 1 cell, but the header has 2"),
        (b'text\n"a" b\n', r"is not CSV at line 2 \("),
        (b"text\ncaf\xe9\n", r"is not UTF-8 \(byte 9 is 0xe9\)"),
        (b"text\na\x00\n", "is a binary file"),
    ],
)
def test_what_is_no_table_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_table(file, ["text", "prompt"])


def test_rows_of_parquet_keep_their_types(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    rows = [{"context": "a", "choices": [" b", " c"], "id": 7}, {"context": "", "choices": None, "id": 8}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert read_table(file, ["context", "choices"]) == [(1, rows[0]), (2, {"id": 8})]
    parquet.write_table(pyarrow.table({"text": ["a"], "raw": [b"b"]}), file)
    with pytest.raises(InputError, match=r"line 1 has a value that JSON cannot hold .*bytes"):
        read_table(file, ["text"])
    file.write_text("PAR1, but text")
    with pytest.raises(InputError, match=r"a\.parquet: is no Parquet file that can be read"):
        read_table(file, ["text"])
    with pytest.raises(InputError, match=r"b\.parquet: No such file"):
        read_table(tmp_path / "b.parquet", ["text"])


def test_parquet_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    with pytest.raises(InputError, match=r"reading Parquet needs pyarrow .*; pip install pyarrow"):
        read_table(tmp_path / "a.parquet", ["text"])
