"""Evaluate a model on BoolQ with promptsource's templates: `slowllm eval boolq` under a name of its own.

python scripts/eval_boolq.py --data dev.jsonl --model MODEL --template-file templates.yaml --templates all
"""

import sys

from slowllm.entrypoints.cli.app import run

if __name__ == "__main__":
    sys.argv[1:1] = ["eval", "boolq"]
    run()
