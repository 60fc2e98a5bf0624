"""The texts of single tokens, and where in a text they begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# So many tokens before one show how it is written there: a tokenizer may drop the blank before the first that it decodes,
# and letters are cut between tokens.
_WINDOW = 8


def token_text(tokenizer: Any, token: int) -> str:
    """Return the text of one token, with its blank before it."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    # A SentencePiece tokenizer drops the blank before its first token.
    is_behind_blank = str(tokenizer.convert_ids_to_tokens(token)).startswith("\N{LOWER ONE EIGHTH BLOCK}")
    return " " + text if is_behind_blank and not text.startswith(" ") else text


def offsets_in(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Return where each token begins in the text of all, in characters; special tokens have no length there.

    Takes a time in proportion to the number of tokens: each is looked at in a window.
    """
    offsets, length, begin, num_read = list[int](), 0, 0, 0

    def decoded(start: int, end: int) -> str:
        return str(
            tokenizer.decode(
                list(ids[start:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    for place in range(len(ids)):
        offsets.append(length)
        before, whole = decoded(begin, num_read), decoded(begin, place + 1)
        # A letter that is not complete yet counts with the token that completes it.
        if len(whole) > len(before) and not whole.endswith("\N{REPLACEMENT CHARACTER}"):
            length += len(whole) - len(before)
            begin, num_read = max(begin, place + 1 - _WINDOW), place + 1
    return offsets
