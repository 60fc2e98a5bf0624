"""The console script's address: `slowllm.cli:run`."""

from __future__ import annotations

from slowllm.entrypoints.cli.app import run

__all__ = ["run"]
