"""`python -m slowllm`."""

from slowllm.entrypoints.cli.app import run

run()
