"""`python -m slowllm`."""

from slowllm.cli import run

run()
