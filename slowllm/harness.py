"""The public address of lm-eval's model: `import slowllm.harness`, `python -m slowllm.harness`."""

from __future__ import annotations

import sys

from slowllm.entrypoints.lm_eval_command import stay_offline
from slowllm.errors import SlowLLMError

if __name__ == "__main__":  # before huggingface_hub is imported
    sys.argv[1:] = stay_offline(sys.argv[1:])

from slowllm.entrypoints.lm_eval_model import SlowLM
from slowllm.entrypoints.lm_eval_run import main

__all__ = ["SlowLM", "main"]

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SlowLLMError as error:
        print(f"slowllm: {error}", file=sys.stderr)
        sys.exit(2)
