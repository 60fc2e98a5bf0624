"""A budget of bytes that several models of one process share."""

from __future__ import annotations

import threading

from slowllm.errors import PlanError
from slowllm.options import format_binary


class Budget:
    """Bytes of memory that the models of one process may take together.

    Args:
        total_bytes: for the whole process, the interpreter included.
        used_bytes: what the process holds already.
    """

    def __init__(self, total_bytes: int, used_bytes: int) -> None:
        self.total_bytes, self.used_bytes = total_bytes, used_bytes
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """Bytes that can still be taken."""
        return self.total_bytes - self.used_bytes

    def take(self, num_bytes: int) -> None:
        """Take a part of the budget.

        Raises:
            PlanError: less is left.
        """
        with self._lock:
            if num_bytes > self.free_bytes:
                raise PlanError(
                    f"{format_binary(num_bytes)} are needed but only {format_binary(max(self.free_bytes, 0))} "
                    f"of the budget of {format_binary(self.total_bytes)} are left"
                )
            self.used_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Return bytes that were taken."""
        with self._lock:
            self.used_bytes -= num_bytes
