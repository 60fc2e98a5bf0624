"""The text of each token, so that together they are the text of all."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, overload

# A tokenizer may drop the blank before the first token that it decodes, so each is decoded behind a few others.
_WINDOW = 8
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def pieces_of(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> list[str]:
    """Return the text of each token; a letter that several tokens make belongs to the last of them.

    Args:
        tokenizer: of the model.
        before: what stands before them.
        ids: whose texts are wanted.
    """
    every, pieces = [*before, *ids], list[str]()

    def decoded(begin: int, end: int) -> str:
        return str(tokenizer.decode(every[begin:end], clean_up_tokenization_spaces=False))

    done = len(before)
    for end in range(len(before) + 1, len(every) + 1):
        begin = max(0, done - _WINDOW)
        old, new = decoded(begin, done), decoded(begin, end)
        if new.endswith(_INCOMPLETE) and end < len(every):
            pieces.append("")
            continue
        pieces.append(new[len(old) :] if new.startswith(old) else decoded(done, end))
        done = end
    return pieces


class TokenTexts(Sequence[str]):
    """The texts of a text's tokens, made when they are first asked for. Neither pickled nor copied: None is in their place.

    Args:
        tokenizer: of the model.
        before: what stands before the tokens.
        ids: whose texts these are.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> None:
        self._tokenizer, self._before, self._ids = tokenizer, before, ids

    @functools.cached_property
    def _texts(self) -> list[str]:
        return pieces_of(self._tokenizer, self._before, self._ids)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._texts[index]

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return repr(self._texts)

    def __reduce__(self) -> tuple[Any, ...]:
        # The tokenizer is the model's, and making all texts of many results would take long.
        return type(None), ()
