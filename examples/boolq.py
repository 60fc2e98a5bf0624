"""How often does a model answer yes/no questions about a passage rightly, and how sure is that number?

    python examples/boolq.py [--model FOLDER_OR_HUB_ID] [--ram 16GiB] [--file QUESTIONS.jsonl]

Each line of the file has "question", "passage" and "answer", as in BoolQ (Clark et al., 2019).
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import slowllm

HERE = Path(__file__).parent


def interval(num_right: int, num_all: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95% interval of an accuracy by Wilson (1927), which holds for few questions, too."""
    share, weight = num_right / num_all, z * z / num_all
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / num_all + weight / num_all / 4) / (1 + weight)
    return middle - half, middle + half


def read(file: Path) -> list[dict[str, Any]]:
    """Return the questions of a file."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found = [{name: row[name] for name in ("question", "passage", "answer")} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise slowllm.SlowLLMError(
            f"{file}: a line is no JSON object with question, passage and answer"
        ) from error
    if not found:
        raise slowllm.SlowLLMError(f"{file}: has no questions")
    return found


def main() -> None:
    """Ask all questions, in as few sweeps as they fit into, and count the right answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded:tiny-bloom", help="by default the embedded one, a toy")
    parser.add_argument("--ram", default="auto", help="what the process may take, such as 16GiB")
    parser.add_argument(
        "--file", default=HERE / "boolq.jsonl", help="by default the four questions beside this program"
    )
    options = parser.parse_args()
    rows = read(Path(options.file))

    prompts = [f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:" for row in rows]
    with slowllm.load(options.model, ram=options.ram, progress=True) as lm:
        shares = lm.yes_no(prompts, template="{question}")
    num_right = 0
    for row, share in zip(rows, shares, strict=True):
        is_right = (share > 0.5) == row["answer"]
        num_right += is_right
        print(f"{'right' if is_right else 'wrong'}  yes {share:.3f}  {row['question']}")
    low, high = interval(num_right, len(rows))
    always = max(sum(row["answer"] for row in rows), sum(not row["answer"] for row in rows)) / len(rows)
    print(
        f"accuracy {num_right / len(rows):.3f}, 95% interval {low:.3f} to {high:.3f}, {len(rows)} questions"
    )
    print(f"whoever always gives the commoner answer has {always:.3f}")


if __name__ == "__main__":
    try:
        main()
    except (slowllm.SlowLLMError, OSError) as error:
        print(f"boolq.py: {error}", file=sys.stderr)
        sys.exit(2)
