"""What the likeliest tokens cost: `slowllm teach` beside `slowllm forward`, on the same texts and model, in turn.

    python -m benchmarks.teaching --checkpoint ./bloom-560m --texts 32 --tokens 48 --top 64 --repeat 3

Both run in this process, after one pass of each that is not counted, with the model in memory, where the disk hides
nothing; of a streamed model the share can only be smaller. Texts are random tokens. The log-likelihoods of both must agree before anything is
reported. Wall time is compared, and the processor's time, which other work on the machine changes less. The last line
of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from slowllm import load
from slowllm.inference.lines import Line, score_lines
from slowllm.inference.shard_files import ShardRow, ShardWriter
from slowllm.inference.teach import TENSORS, top_tokens
from slowllm.inference.text_files import Text
from slowllm.planning.job import Job
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM

# Rows are packed otherwise, and summed in another order.
TOLERANCE = 0.05


def texts_of(num_texts: int, num_tokens: int, vocabulary: int) -> list[Text]:
    """Return texts of random tokens, each behind the prefix 1."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(1, num_texts + 1):
        ids = tuple(torch.randint(5, vocabulary, (num_tokens,), generator=generator).tolist())
        found.append(Text("texts", Line(number, "", ids), (1, *ids)))
    return found


def forward(lm: StreamedLM, texts: Sequence[Text]) -> list[float]:
    """Score the texts as `forward` does, and return their log-likelihoods."""
    return [found.log_likelihood for _, found in score_lines(lm, [text.line for text in texts], prefix=1)]


def teach(lm: StreamedLM, texts: Sequence[Text], num_top: int) -> list[float]:
    """Write the texts' shards as `teach` does, and return their log-likelihoods."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), "parquet", TENSORS, {})
        with State(Path(folder) / ".state", {"kind": "benchmark"}) as state:
            passes = top_tokens(lm, texts, num_top, state=state)
            for text, result in passes:
                found.append(float(result["log_probs"].double().sum()))
                if writer.add(ShardRow(text.file, text.line.number, text.line.text, result)):
                    passes.forget(writer.num_done)
            writer.finish()
            passes.forget(writer.num_done)
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run both sides in turn, and return the report of the medians."""
    num_tokens = arguments.texts * (arguments.tokens + 1)
    job = Job(num_tokens=num_tokens, longest=arguments.tokens + 1, forward_only=True, keeps_results=False)
    with load(arguments.checkpoint, ram=arguments.ram, dtype=arguments.dtype, job=job) as lm:
        texts = texts_of(arguments.texts, arguments.tokens, lm.config.get_text_config().vocab_size)
        sides: dict[str, Callable[[], list[float]]] = {
            "forward": lambda: forward(lm, texts),
            "teach": lambda: teach(lm, texts, arguments.top),
        }
        results = {name: side() for name, side in sides.items()}
        worst = max(abs(a - b) for a, b in zip(results["forward"], results["teach"], strict=True))
        if not worst <= TOLERANCE:
            sys.exit(f"not verified: a text's log-likelihoods differ by {worst:.3g}")
        walls: dict[str, list[float]] = {name: [] for name in sides}
        processors: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.repeat):
            for name, side in sides.items():
                wall, processor = time.perf_counter(), time.process_time()
                side()
                walls[name].append(time.perf_counter() - wall)
                processors[name].append(time.process_time() - processor)
                print(
                    f"{name}: {walls[name][-1]:.2f} s, processor {processors[name][-1]:.2f} s",
                    file=sys.stderr,
                )
        wall_s, processor_s = (
            {name: statistics.median(times) for name, times in measured.items()}
            for measured in (walls, processors)
        )
        return {
            "checkpoint": str(arguments.checkpoint), "texts": arguments.texts, "tokens": num_tokens, "top": arguments.top,
            "vocabulary": lm.config.get_text_config().vocab_size, "dtype": str(lm.model.dtype), "verified": True,
            "repeat": arguments.repeat, "forward_s": wall_s["forward"], "teach_s": wall_s["teach"],
            "ratio": wall_s["teach"] / wall_s["forward"], "forward_processor_s": processor_s["forward"],
            "teach_processor_s": processor_s["teach"],
            "processor_ratio": processor_s["teach"] / processor_s["forward"],
        }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a text, without the prefix")
    parser.add_argument("--top", type=int, default=64)
    parser.add_argument("--ram", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeat", type=int, default=3)
    report = measure(parser.parse_args(argv))
    print(
        f"teach takes {report['ratio']:.3f} of the time of forward, {report['processor_ratio']:.3f} of the processor's"
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
