"""Which texts the page takes before a tokenizer sees them."""

from __future__ import annotations

from slowllm.errors import InputError

# Far more than any model takes; a tokenizer would be busy with more for seconds.
MAX_CHARACTERS = 500_000


def refuse_long(text: str, what: str = "the text") -> None:
    """Refuse a text that is longer than the page takes.

    Raises:
        InputError: says how long it is.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"{what} has {len(text):,} characters, and this page takes {MAX_CHARACTERS:,}; shorten it"
        )
