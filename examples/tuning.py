"""Teach a model a task by a few virtual tokens before its texts: a soft prompt (Lester et al., 2021).

    python examples/tuning.py [--model FOLDER_OR_HUB_ID] [--ram 16GiB] [--steps 20] [--out FOLDER]

The weights stay as they are. What is learned are 8 vectors, which are saved in PEFT's format, loaded again, and judged by
the accuracy on examples that were not learned from.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import slowllm

HERE = Path(__file__).parent
LABELS = [" yes", " no"]


def accuracy(model: str, ram: str, prompt: Path | None) -> float:
    """Return the share of the test's examples whose label is the likelier one."""
    rows = [json.loads(line) for line in (HERE / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    with slowllm.load(model, ram=ram, prompt=prompt) as lm:
        found = lm.choose([row["prompt"] for row in rows], LABELS)
    right = [
        LABELS[shares.index(max(shares))] == row["label"] for row, shares in zip(rows, found, strict=True)
    ]
    return sum(right) / len(right)


def main() -> None:
    """Judge, learn, save, load and judge again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded:tiny-bloom", help="by default the embedded one, a toy")
    parser.add_argument("--ram", default="auto", help="what the process may take, such as 16GiB")
    parser.add_argument(
        "--steps", type=int, default=20, help="updates of the prompt, each a sweep up and down"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the prompt; by default one that is deleted at the end"
    )
    options = parser.parse_args()

    print(f"accuracy before: {accuracy(options.model, options.ram, None):.3f}")
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary) / "prompt"
        (tuned,) = slowllm.tune(
            options.model, HERE / "train.jsonl", labels=LABELS, steps=options.steps, ram=options.ram, out=out, progress=True
        )  # fmt: skip
        losses = [record["loss"] for record in tuned.records if "loss" in record]
        print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at step {len(losses)}")
        files = ", ".join(sorted(file.name for file in out.iterdir() if file.is_file()))
        print(f"saved in {out.name}: {files}")
        print(f"accuracy after: {accuracy(options.model, options.ram, out):.3f}")


if __name__ == "__main__":
    try:
        main()
    except (slowllm.SlowLLMError, OSError) as error:
        print(f"tuning.py: {error}", file=sys.stderr)
        sys.exit(2)
