"""Files are replaced whole, kept to one process, and read a line or an object at a time, with errors that name the place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from slowllm.errors import InputError, StateError, StoreError
from slowllm.files import (
    lock,
    parse_object,
    part_of,
    read_lines,
    read_raw_lines,
    replace_file,
    replacing,
    replacing_alone,
    shown,
    system_errors,
)


def test_system_errors_become_ours_with_the_place_and_the_advice() -> None:
    with (
        pytest.raises(StateError, match=r"^here: No space left on device; make room$") as caught,
        system_errors(StateError, "here", "; make room"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert isinstance(caught.value.__cause__, OSError)


def test_errors_of_ours_and_of_other_kinds_pass_through() -> None:
    for error in (InputError("ours"), ValueError("another")):
        with pytest.raises(type(error), match=str(error)), system_errors(StateError, "here"):
            raise error


def test_a_file_is_replaced_by_bytes_and_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_file(path, b"old")
    replace_file(path, "neu: \N{LATIN SMALL LETTER U WITH DIAERESIS}")
    assert path.read_bytes() == b"neu: \xc3\xbc"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_bytes_are_on_the_disk_before_they_get_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every way to replace a file: a power cut may leave the old file or the new one, but no empty one."""
    events: list[str] = []
    sync, rename = os.fsync, os.replace

    def seen_sync(number: int) -> None:
        events.append(f"sync {os.fstat(number).st_size}")
        sync(number)

    def seen_rename(partial: Path, path: Path) -> None:
        events.append(f"{partial.name} -> {path.name}")
        rename(partial, path)

    monkeypatch.setattr(os, "fsync", seen_sync)
    monkeypatch.setattr(os, "replace", seen_rename)
    replace_file(tmp_path / "a", b"123")
    assert events == ["sync 3", "a.part -> a"]
    replace_file(tmp_path / "a", b"1234", is_shared=True)
    assert events[2:] == ["sync 4", f"a.{os.getpid()}.part -> a"]
    with replacing_alone(tmp_path / "a", StoreError) as file:
        file.write(b"12345")
    assert events[4:] == ["sync 5", "a.part -> a"]


def test_a_disk_that_is_full_is_left_as_it_was(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from slowllm.files import replace_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    replace_file(Path({str(tmp_path / "file")!r}), bytes(5000))
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "File too large"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    for error in (ValueError, KeyboardInterrupt):
        with contextlib.suppress(error), replacing(path) as partial:
            partial.write_text("ne")
            raise error
        with contextlib.suppress(error), replacing_alone(path, StoreError) as file:
            file.write(b"new")
            raise error
    assert path.read_text() == "old"
    assert part_of(path).read_text() == "new", "what was written before an interrupt is kept beside it"


def test_what_an_earlier_run_left_is_not_in_the_new_file(tmp_path: Path) -> None:
    part_of(tmp_path / "a").write_text("far more than is written now")
    with replacing_alone(tmp_path / "a", StoreError) as file:
        file.write(b"new")
    assert (tmp_path / "a").read_text() == "new"


def test_a_second_run_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replacing_alone(path, StoreError) as file:
        file.write(b"first")
        file.flush()
        with (
            pytest.raises(InputError, match=r"a\.part: another run is writing it"),
            replacing_alone(path, InputError),
        ):
            pass
    assert path.read_text() == "first"


def test_a_run_that_opens_the_part_while_another_renames_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the lock, but of a file that is the finished one by now, which it must not truncate."""
    path = tmp_path / "a"
    flock = fcntl.flock

    def late(number: int, operation: int) -> None:
        flock(number, operation)
        os.replace(part_of(path), path)

    monkeypatch.setattr(fcntl, "flock", late)
    part_of(path).write_text("finished")
    with (
        pytest.raises(StoreError, match="another run has just written it; run the same command again"),
        replacing_alone(path, StoreError),
    ):
        pass
    assert path.read_text() == "finished"


def test_a_locked_folder_refuses_the_second_with_its_sentence(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    try:
        lock(first, StateError("is used"))
        with pytest.raises(StateError, match=r"^is used$"):
            lock(second, StateError("is used"))
    finally:
        os.close(first)
    lock(second, StateError("is used"))
    os.close(second)


def test_a_file_system_without_locks_is_no_second_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none_left(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none_left)
    with open(tmp_path / "a", "wb") as file, pytest.raises(OSError, match="No locks available"):
        lock(file.fileno(), StateError("is used"))


def test_lines_have_their_numbers_and_no_blanks_around_them(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf one\r\n\n \t\ntwo\x0cthree\n\xc2\xa0\n")
    assert read_lines(str(path)) == [(1, "one"), (4, "two\x0cthree")]
    assert read_raw_lines(path) == [(1, b" one\r"), (4, b"two\x0cthree"), (5, b"\xc2\xa0")]


def test_a_line_that_is_not_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ncaf\xe9\n")
    with pytest.raises(InputError, match=r"a\.txt: line 3 is not UTF-8 \(byte 4 is 0xe9\); convert it first"):
        read_lines(str(path))
    assert read_raw_lines(path)[1] == (3, b"caf\xe9")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf\n"])
def test_a_file_without_a_line_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    for read in (read_lines, read_raw_lines):
        with pytest.raises(InputError, match=r"a\.txt: has no non-empty line"):
            read(str(path))
    with pytest.raises(InputError, match=r"a\.txt: has no examples"):
        read_raw_lines(path, missing="has no examples")
    path.write_bytes(b"\xc2\xa0\n")  # a blank in Unicode, not in ASCII
    with pytest.raises(InputError, match=r"a\.txt: has no non-empty line"):
        read_lines(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"b\.txt: No such file or directory"):
        read_lines(str(tmp_path / "b.txt"))


@pytest.mark.parametrize("content", [b"PAR1\x00\x15", "a line\n".encode("utf-16")])
def test_a_binary_file_is_no_text(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"b\.bin: is a binary file .* \(byte \d is zero\)"):
        read_lines(tmp_path / "b.bin")


def test_a_dash_is_standard_input_but_a_path_of_that_name_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"typed\n")))
    assert read_lines("-") == [(1, "typed")]
    with pytest.raises(InputError, match="standard input: has no non-empty line"):
        read_lines("-")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^-: No such file"):
        read_raw_lines(Path("-"))


def test_an_object_is_read_from_bytes_and_text() -> None:
    assert parse_object('{"a": "\N{SNOWMAN}"}', "no object") == {"a": "\N{SNOWMAN}"}
    assert parse_object(b'{"a": "\xe2\x98\x83"}', "no object") == {"a": "\N{SNOWMAN}"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{bad", r"^is not JSON \(Expecting"),
        ('{"a": NaN}', r"^is not JSON \(NaN is no number\)"),
        ('{"a": -Infinity}', r"^is not JSON \(-Infinity is no number\)"),
        ('{"a": "\\ud800"}', r"^has \\ud800, half of a surrogate pair, which alone is no character$"),
        ('{"a": 1e999}', r"^is not JSON \(1e999 is too large a number\)"),
        ('{"a": [-1e400]}', r"^is not JSON \(-1e400 is too large a number\)"),
        ('{"a": {"b": 1, "b": 2}}', r'^has the key "b" twice$'),
        ('{"\\ud800": 1, "\\ud800": 2}', r"^has"),
        ("[" * 100_000, r"^is not JSON \("),
        ('{"a": 1}'.encode("utf-16"), r"^is not JSON \("),
        (b'{"a": "\xe9"}', r"^is not JSON \(.*can't decode byte 0xe9"),
        ('["\N{SNOWMAN}", null]', r'^wants an object: \["\N{SNOWMAN}", null\]$'),
    ],
)  # fmt: skip
def test_what_is_no_object_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_object(text, "wants an object")


def test_a_long_value_is_cut_off() -> None:
    assert shown("a" * 58) == f'"{"a" * 58}"'
    assert shown("a" * 59) == f'"{"a" * 56}...'
