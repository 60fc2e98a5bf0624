"""Run slowllm in the network namespace of another process: `python -m tests.support.in_namespace PID serve ...`."""

from __future__ import annotations

import ctypes
import os
import sys

CLONE_NEWNET = 0x40000000


def enter(pid: int) -> None:
    """Enter the network namespace of a process. Needs root, and a process that has no threads yet."""
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(namespace)


if __name__ == "__main__":
    enter(int(sys.argv[1]))
    from slowllm.entrypoints.cli import app

    sys.argv = ["slowllm", *sys.argv[2:]]
    app.run()
