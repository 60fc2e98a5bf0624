"""The decoded copy of a coded matrix that several riders share while they pass one stop."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class KeptMatrix:
    """Room for a decoded matrix, which is valid from the first operation that needs it until the stop is left.

    Only `LazyWeight` asks for it, below autograd, which saves the `LazyWeight` and never what is in here.

    Args:
        memory: (R, K), contiguous, of the compute dtype.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory: Tensor | None = memory
        self._is_decoded = False

    def to_fill(self) -> Tensor | None:
        """Return the room (R, K) where nothing has been decoded to it yet, for somebody who does; else None.

        Call `filled` afterwards.
        """
        return None if self._is_decoded else self._memory

    def filled(self) -> None:
        """Say that all rows were decoded."""
        self._is_decoded = self._memory is not None

    def rows(self, decode: Callable[[Tensor], object]) -> Tensor | None:
        """Return the decoded matrix (R, K), decoded by `decode` if it is not there; None where the stop was left."""
        if self._memory is not None and not self._is_decoded:
            decode(self._memory)
            self._is_decoded = True
        return self._memory

    def leave(self) -> None:
        """Forget the matrix; others will be decoded to the same memory."""
        self._memory, self._is_decoded = None, False
