"""Replace files whole, lock files and folders, and read lines and JSON objects.

Knows nothing of the files' content. Callers name the class and the words of errors.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from slowllm.errors import InputError, SlowLLMError

MAX_SHOWN_LETTERS = 60
# The folder of a job's state in its folder of results; what begins with a dot is no data for `datasets`.
STATE_NAME = ".state"
# Descriptions of models, tokenizers and templates are smaller; a sparse file of gigabytes is not read.
MAX_DESCRIPTION_BYTES = 256 << 20
# Between two looks whether a lock is free.
LOOK_SECONDS = 0.02


@contextlib.contextmanager
def system_errors(kind: type[SlowLLMError], where: object, advice: str = "") -> Iterator[None]:
    """Raise an OSError of the block as an error of class `kind`: where, the system's reason, and advice."""
    try:
        yield
    except OSError as error:
        raise kind(f"{where}: {error.strerror or error}{advice}") from error


def read_description(path: Path, kind: type[SlowLLMError]) -> bytes:
    """Return the bytes of a file that describes something, after a look at its size.

    Raises:
        SlowLLMError: of class `kind`, where it cannot be read or is larger than `MAX_DESCRIPTION_BYTES`.
    """
    with system_errors(kind, path):
        refuse_large(path, kind)
        return path.read_bytes()


def refuse_large(path: Path, kind: type[SlowLLMError]) -> None:
    """Raise an error of class `kind` for a file that is larger than `MAX_DESCRIPTION_BYTES`."""
    if (size := path.stat().st_size) > MAX_DESCRIPTION_BYTES:
        raise kind(f"{path}: has {size:,} bytes, too many for a file of its kind")


def part_of(path: Path, process: int | None = None) -> Path:
    """Return the path under which a file is written before it gets the name `path`."""
    return path.with_name(path.name + ("" if process is None else f".{process}") + ".part")


def state_of(path: Path) -> Path:
    """Return the folder that keeps the work behind `part_of(path)` until the file gets its name."""
    partial = part_of(path)
    return partial.with_name(partial.name + ".state")


def sync(file: IO[Any]) -> None:
    """Write what is in Python's and the system's buffers to the disk."""
    file.flush()
    os.fsync(file.fileno())


def put_in_place(file: IO[Any], partial: Path, path: Path) -> None:
    """Rename an open file from `partial` to `path`, after its bytes are on the disk."""
    sync(file)  # after a power cut the name must not be there without the bytes
    os.replace(partial, path)


@contextlib.contextmanager
def replacing(path: Path, *, is_shared: bool = False) -> Iterator[Path]:
    """Yield a path to write a file to, which is renamed to `path` when the block ends without an error.

    With `is_shared` several processes may write the same content at the same time.
    """
    partial = part_of(path, os.getpid() if is_shared else None)
    yield partial
    with open(partial, "rb") as file:
        put_in_place(file, partial, path)


def replace_file(path: Path, content: bytes | str, *, is_shared: bool = False) -> None:
    """Write a file so that a reader finds the old content or the new, even after a power cut; a failure leaves nothing."""
    with replacing(path, is_shared=is_shared) as partial:
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError:  # such as of a full disk, which stays full of what is left there
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def replacing_alone(path: Path, kind: type[SlowLLMError]) -> Iterator[IO[bytes]]:
    """Yield an empty, locked file, which is renamed to `path` when the block ends without an error.

    Before that, and after an error, it is `part_of(path)`.

    Raises:
        SlowLLMError: of class `kind`, where another run writes the file.
    """
    partial = part_of(path)
    # Not in append mode, in which pwrite() appends whatever offset it is given.
    with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        lock(file.fileno(), kind(f"{partial}: another run is writing it"))
        if not partial.exists() or not os.path.samestat(partial.stat(), os.fstat(file.fileno())):
            raise kind(f"{partial}: another run has just written it; run the same command again")
        file.truncate(0)
        yield file
        put_in_place(file, partial, path)


def lock(file: int, refusal: SlowLLMError) -> None:
    """Lock an open file or folder, given by its descriptor, until it is closed; raise `refusal` if it is locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise refusal from error


@contextlib.contextmanager
def locked_folder(folder: Path, wait_seconds: float) -> Iterator[bool]:
    """Lock a folder as long as the context lasts, and say whether nobody else has it.

    Args:
        folder: that is there.
        wait_seconds: for whoever has it.
    Raises:
        OSError: it cannot be opened or locked.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_ours = True
                break
            except BlockingIOError:
                if (left := until - time.monotonic()) <= 0:
                    is_ours = False
                    break
                time.sleep(min(left, LOOK_SECONDS))
        yield is_ours
    finally:
        os.close(handle)


_NO_LINE = "has no non-empty line"


def read_lines(file: str | Path, missing: str = _NO_LINE) -> list[tuple[int, str]]:
    """Return the non-empty lines of a text file with their numbers, stripped of surrounding blanks.

    Args:
        file: its path; the string ``-`` is standard input.
        missing: what is said of a file without such a line.
    Raises:
        InputError: it cannot be read, is binary, has no such line, or a line is not UTF-8.
    """
    lines = []
    for number, raw in read_raw_lines(file, missing):
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{_name_of(file)}: line {number} is not UTF-8 (byte {error.start + 1} is "
                f"0x{raw[error.start]:02x}); convert it first"
            ) from error
        if text:
            lines.append((number, text))
    if not lines:
        raise InputError(f"{_name_of(file)}: {missing}")
    return lines


def read_raw_lines(file: str | Path, missing: str = _NO_LINE) -> list[tuple[int, bytes]]:
    """Return the lines of a file that are not blank, as bytes, with their numbers.

    Raises:
        InputError: the file cannot be read, is binary, or has no such line, which `missing` says.
    """
    data = read_text_bytes(file)
    # Not splitlines(): a form feed or a Unicode separator inside a line does not end it.
    numbered = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
    lines = [(number, raw) for number, raw in numbered if raw.strip()]
    if not lines:
        raise InputError(f"{_name_of(file)}: {missing}")
    return lines


def read_text_bytes(file: str | Path) -> bytes:
    """Return the bytes of a text file.

    Args:
        file: its path; the string ``-`` is standard input.
    Raises:
        InputError: it cannot be read, or is binary: a byte of it is zero, as in UTF-16, or in no text at all.
    """
    with system_errors(InputError, _name_of(file)):
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    if (zero := data.find(0)) >= 0:
        raise InputError(
            f"{_name_of(file)}: is a binary file and not text in UTF-8 (byte {zero + 1:,} is zero)"
        )
    return data


def _name_of(file: str | Path) -> str:
    return "standard input" if file == "-" else str(file)


def parse_object(text: str | bytes, otherwise: str) -> dict[str, Any]:
    """Return the JSON object in a text of UTF-8.

    Raises:
        InputError: it is not JSON, as with NaN, infinities and numbers that a float cannot hold; it has a key twice, or
            half of a surrogate pair; or it is no object, which `otherwise` says.
    """
    try:
        # Not json.loads(bytes), which guesses UTF-16 and UTF-32.
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            object_pairs_hook=_without_repeats,
        )
        # Half of a surrogate pair can be written in JSON, but neither tokenized nor written as UTF-8.
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise InputError(
            f"has \\u{half:04x}, half of a surrogate pair, which alone is no character"
        ) from error
    except RecursionError as error:
        raise InputError("is not JSON (it is nested too deeply)") from error
    except ValueError as error:
        reason = "a number has too many digits" if "int_max_str_digits" in str(error) else error
        raise InputError(f"is not JSON ({reason})") from error
    if not isinstance(value, dict):
        raise InputError(f"{otherwise}: {shown(value)}")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite_float(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:MAX_SHOWN_LETTERS]} is too large a number")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; Python would keep the last value of a key that stands in it twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"has the key {shown(key)} twice")
        found[key] = value
    return found


def shown(value: Any) -> str:
    """Return a value as JSON for a message, truncated to `MAX_SHOWN_LETTERS`."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN_LETTERS else text[: MAX_SHOWN_LETTERS - 3] + "..."


def read_secret(path: Path, max_bytes: int, make: str) -> bytes:
    """Return the first bytes of a file that only its owner may read, at most one more than `max_bytes`.

    Args:
        path: of the file.
        max_bytes: that the secret may have.
        make: says how to make such a file, for the errors.
    Raises:
        InputError: it cannot be read, is no ordinary file, or others than its owner may read or write it.
    """
    with system_errors(InputError, path):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode):
                raise InputError(f"{path}: is no ordinary file; {make}")
            if mode & 0o077:
                raise InputError(
                    f"{path}: may be read or written by others (mode {stat.S_IMODE(mode):o}), so it is no secret; "
                    f"`chmod 600 {path}`, or make a new one where others may have read it"
                )
            return os.read(handle, max_bytes + 1)
        finally:
            os.close(handle)
