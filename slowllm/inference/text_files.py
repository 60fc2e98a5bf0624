"""The texts of any number of files as token ids, read again for every pass over them, so that few are in memory.

Text files have a text in each line; JSON Lines, CSV and Parquet have one in a column. What cannot be read twice, such
as standard input, is copied to a temporary file. Knows tokenizers; knows nothing of what is done with the texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from slowllm.errors import InputError
from slowllm.files import parse_object, system_errors
from slowllm.inference.lines import Line, encode
from slowllm.inference.text import TextSide
from slowllm.planning.host_plan import MAX_RIDER_TOKENS
from slowllm.tables import kind_of, stream_column


class TextFiles:
    """Texts with their files and numbers, read again at each iteration. A context manager, which owns copies.

    Args:
        files: text files, or JSON Lines, CSV or Parquet by the end of their names; ``-`` is standard input.
        column: of those that have columns.
        texts: further texts, numbered from 1, as of a file of the name `texts_name`.
        texts_name: what they are called.
    """

    def __init__(
        self, files: Sequence[str], column: str = "text", texts: Sequence[str] = (), texts_name: str = "text"
    ) -> None:
        self._files, self._column, self._texts, self._texts_name = tuple(files), column, texts, texts_name
        self._owned = contextlib.ExitStack()
        self._copies: dict[str, IO[bytes]] = {}

    def __iter__(self) -> Iterator[tuple[str, int, str]]:
        """Yield the file, number and text of each.

        Raises:
            InputError: a file cannot be read, has no text, or no such column.
        """
        for number, text in enumerate(self._texts, 1):
            if not text.strip():
                raise InputError(f"{self._texts_name} {number} is empty")
            yield self._texts_name, number, text
        for file in self._files:
            found = False
            for number, text in self._read(file):
                found = True
                yield file, number, text
            if not found:
                raise InputError(f"{name_of(file)}: has no text")

    def _read(self, file: str) -> Iterator[tuple[int, str]]:
        kind = kind_of(file)
        if kind in ("csv", "parquet"):
            for number, cell in stream_column(file, self._column):
                yield number, self._checked(file, number, cell)
            return
        for number, raw in self._lines(file):
            if kind == "text":
                yield number, raw.strip()
                continue
            try:
                row = parse_object(raw, "must be an object")
            except InputError as error:
                raise InputError(f"{name_of(file)}: line {number} {error}") from error
            yield number, self._checked(file, number, row.get(self._column))

    def _checked(self, file: str, number: int, cell: Any) -> str:
        if not isinstance(cell, str) or not cell.strip():
            raise InputError(f"{name_of(file)}: line {number} has no text in the column {self._column}")
        return cell.strip()

    def _lines(self, file: str) -> Iterator[tuple[int, str]]:
        with system_errors(InputError, name_of(file)), contextlib.ExitStack() as stack:
            opened = self._copies.get(file) or self._copied(file)
            if opened is None:
                opened = stack.enter_context(open(file, "rb"))
            opened.seek(0)
            for number, raw in enumerate(opened, 1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if (zero := line.find(0)) >= 0:
                    raise InputError(
                        f"{name_of(file)}: is a binary file and not text in UTF-8 (byte {zero + 1:,} of line {number:,} "
                        "is zero)"
                    )
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{name_of(file)}: line {number} is not UTF-8 (byte {error.start + 1} is "
                        f"0x{line[error.start]:02x}); convert it first"
                    ) from error
                if text.strip():
                    yield number, text

    def _copied(self, file: str) -> IO[bytes] | None:
        """Return a copy of what can be read only once; None for a file."""
        if file != "-" and (Path(file).is_file() or not Path(file).exists()):
            return None
        # TemporaryFile has no name: it is gone with the process.
        copy = self._owned.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (closed with the stack)
        with contextlib.ExitStack() as stack:
            source = sys.stdin.buffer if file == "-" else stack.enter_context(open(file, "rb"))
            shutil.copyfileobj(source, copy)
        self._copies[file] = copy
        return copy

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owned.close()


def name_of(file: str) -> str:
    """Return what messages call a file."""
    return "standard input" if file == "-" else file


@dataclass(frozen=True)
class Text:
    """One text as token ids.

    Attributes:
        file: that it is from.
        line: of that file.
        ids: those of the line, after the prefix if there is one.
    """

    file: str
    line: Line
    ids: tuple[int, ...]


class Texts(Iterable[Text]):
    """The texts of files as token ids; each iteration reads and encodes them again.

    Args:
        side: whose tokenizer and vocabulary.
        files: read once for the attributes.
        max_tokens: of a text, without the prefix.
        truncate: whether to cut longer ones.
        prefix: token that is put before every text, if any.
    Attributes:
        num_texts: of all files.
        num_tokens: of them, prefixes included.
        longest: tokens of the longest, prefix included.
        num_truncated: texts that are cut.
        digest: a hash of files, numbers and tokens, to know them again.
    Raises:
        InputError: a text cannot be read, has no tokens, or too many.
    """

    def __init__(
        self, side: TextSide, files: TextFiles, *, max_tokens: int, truncate: bool, prefix: int | None
    ) -> None:
        self._side, self._files, self._prefix = side, files, prefix
        self._max_tokens, self._truncate = max_tokens, truncate
        self.num_texts = self.num_tokens = self.longest = self.num_truncated = 0
        self._lengths: Counter[int] = Counter()  # how many texts have so many tokens
        found = hashlib.sha256()
        for text in self._encoded():
            self.num_texts += 1
            self.num_tokens += len(text.ids)
            self._lengths[len(text.ids)] += 1
            self.longest = max(self.longest, len(text.ids))
            self.num_truncated += text.line.truncated
            _add_text(found, text)
        if not self.num_texts:
            raise InputError("there are no texts")
        self.digest = found.hexdigest()

    def _encoded(self) -> Iterator[Text]:
        for file, number, text in self._files:
            try:
                (line,) = encode(
                    self._side, [(number, text)], max_tokens=self._max_tokens, truncate=self._truncate,
                    prefix=self._prefix,
                )  # fmt: skip
            except InputError as error:
                raise InputError(f"{name_of(file)}: {error}") from error
            yield Text(file, line, line.ids if self._prefix is None else (self._prefix, *line.ids))

    def __iter__(self) -> Iterator[Text]:
        """Yield the texts.

        Raises:
            InputError: the files are no longer what they were.
        """
        found = hashlib.sha256()
        for text in self._encoded():
            if len(text.ids) > self.longest:
                raise InputError(f"{name_of(text.file)}: has changed since it was read first")
            _add_text(found, text)
            yield text
        if found.hexdigest() != self.digest:
            raise InputError("the texts have changed since they were read first; run it again")

    def padded_tokens(self, num_dropped: int, padding_tokens: int | None) -> int:
        """Return how many tokens the texts have in micro-batches, padding included, if all are packed together.

        Args:
            num_dropped: tokens at the end of each text that the model does not see.
            padding_tokens: as for `pack`.
        """
        total = width = num_rows = padding = 0
        for length in sorted(self._lengths, reverse=True):
            own = max(1, length - num_dropped)
            for _ in range(self._lengths[length]):  # as `pack` does, which would need a number for each text
                padding += width - own
                is_full = (num_rows + 1) * width > MAX_RIDER_TOKENS
                if not num_rows or is_full or (padding_tokens is not None and padding > padding_tokens):
                    width, num_rows, padding = own, 0, 0
                num_rows += 1
                total += width
        return total


def _add_text(found: Any, text: Text) -> None:
    found.update(f"{text.file}\n".encode(errors="surrogateescape"))
    found.update(struct.pack(f"<{len(text.ids) + 2}q", text.line.number, len(text.ids), *text.ids))
