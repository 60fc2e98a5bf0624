"""The text of each token, so that together they are the text of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
