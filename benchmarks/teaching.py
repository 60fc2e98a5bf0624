"""What the likeliest tokens cost: `slowllm teach` beside `slowllm forward`, on the same texts and model, in turn.

    python -m benchmarks.teaching --geometry bloom-7b1 --blocks 1 --texts 100 --tokens 999 --top 64 --repeat 1
    python -m benchmarks.teaching --checkpoint ./bloom-560m --texts 32 --tokens 48 --top 64 --repeat 3

Both run in this process, after a short pass of each that is not counted, with the model in memory, where the disk hides
nothing; of a streamed model the share can only be smaller. Texts are random tokens. Before anything is reported, the
log-likelihoods of both must agree, and what teach kept of the first text must be what the model that transformers loads into
memory says of it, by `topk(log_softmax)`. Wall time is compared, and the processor's time, which other work on the machine
changes less. The resident memory of the process is sampled while teach runs: the peak of its first and its last third. The
last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from benchmarks import sides
from benchmarks.make_checkpoint import GEOMETRIES
from benchmarks.report import add_report_option, finish
from slowllm import load
from slowllm.inference.lines import Line, score_lines
from slowllm.inference.shard_files import ShardRow, ShardWriter
from slowllm.inference.teach import TENSORS, top_tokens
from slowllm.inference.text_files import Text
from slowllm.planning.job import Job
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM

# Rows are packed otherwise, and summed in another order: of the log-likelihood of a text, a token; and of one log-probability.
TOLERANCE = 0.001
TOP_TOLERANCE = 0.05
SAMPLE_SECONDS = 0.1


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


class ResidentMemory:
    """Samples the resident memory of this process from its start to its end."""

    def __init__(self) -> None:
        self._samples: list[int] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> ResidentMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self._samples.append(process.memory_info().rss)
            if self._is_over.wait(SAMPLE_SECONDS):
                return

    def peaks(self) -> tuple[int, int]:
        """Return the largest of the first third, and of the last."""
        third = max(1, len(self._samples) // 3)
        return max(self._samples[:third]), max(self._samples[-third:])


def check_top(checkpoint: Path, dtype: torch.dtype, text: Text, result: dict[str, Any]) -> float:
    """Compare what was kept of a text with what the model in memory says of it; return the largest difference.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    with torch.no_grad():
        logits = model(torch.tensor([text.ids])).logits[0, :-1]
    reference = logits.float().log_softmax(-1)
    ids, values = (torch.as_tensor(result[name]) for name in ("top_ids", "top_log_probs"))
    best = reference.topk(ids.shape[1]).values
    # Neighbours may change places by rounding; then both are as likely.
    worst = max(
        float((values.float() - best).abs().max()),
        float((values.float() - reference.gather(1, ids.long())).abs().max()),
    )
    if not worst <= TOP_TOLERANCE:
        sys.exit(f"not verified: a kept log-probability differs from the resident model's by {worst:.3g}")
    return worst


def teach(
    lm: StreamedLM, texts: Sequence[Text], num_top: int, kept: list[dict[str, Any]] | None = None
) -> list[float]:
    """Write the texts' shards as `teach` does, and return their log-likelihoods; also keep the first result in `kept`."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), "parquet", TENSORS, {})
        with State(Path(folder) / ".state", {"kind": "benchmark"}) as state:
            passes = top_tokens(lm, texts, num_top, state=state)
            for text, result in passes:
                if kept is not None and not kept:
                    kept.append(dict(result))
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
        kept: list[dict[str, Any]] = []
        measured_sides: dict[str, Callable[[], list[float]]] = {
            "forward": lambda: forward(lm, texts),
            "teach": lambda: teach(lm, texts, arguments.top, kept),
        }
        forward(lm, texts[:2])
        teach(lm, texts[:2], arguments.top)
        walls: dict[str, list[float]] = {name: [] for name in measured_sides}
        processors: dict[str, list[float]] = {name: [] for name in measured_sides}
        results: dict[str, list[float]] = {}
        peaks = []
        for _ in range(arguments.repeat):
            for name, side in measured_sides.items():
                wall, processor = time.perf_counter(), time.process_time()
                with ResidentMemory() as memory:
                    results[name] = side()
                if name == "teach":
                    peaks.append(memory.peaks())
                walls[name].append(time.perf_counter() - wall)
                processors[name].append(time.process_time() - processor)
                print(
                    f"{name}: {walls[name][-1]:.2f} s, processor {processors[name][-1]:.2f} s",
                    file=sys.stderr,
                )
            worst = max(abs(a - b) for a, b in zip(results["forward"], results["teach"], strict=True))
            if not worst <= TOLERANCE * (arguments.tokens + 1):
                sys.exit(f"not verified: a text's log-likelihoods differ by {worst:.3g}")
        wall_s, processor_s = (
            {name: statistics.median(times) for name, times in measured.items()}
            for measured in (walls, processors)
        )
        done = {
            "checkpoint": str(arguments.checkpoint), "texts": arguments.texts, "tokens": num_tokens, "top": arguments.top,
            "first_third_rss_bytes": statistics.median(first for first, _ in peaks),
            "last_third_rss_bytes": statistics.median(last for _, last in peaks),
            "vocabulary": lm.config.get_text_config().vocab_size, "dtype": str(lm.model.dtype), "verified": True,
            "repeat": arguments.repeat, "forward_s": wall_s["forward"], "teach_s": wall_s["teach"],
            "ratio": wall_s["teach"] / wall_s["forward"], "forward_processor_s": processor_s["forward"],
            "teach_processor_s": processor_s["teach"],
            "processor_ratio": processor_s["teach"] / processor_s["forward"],
        }  # fmt: skip
        dtype = lm.model.dtype
    # The streamed model's memory is free again.
    return {**done, "largest_difference": check_top(arguments.checkpoint, dtype, texts[0], kept[0])}


def main(argv: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="folder of the checkpoint; written where it is missing"
    )
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), help="of a checkpoint of random weights")
    parser.add_argument("--blocks", type=int, default=1, help="number of blocks of that checkpoint")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a text, without the prefix")
    parser.add_argument("--top", type=int, default=64)
    parser.add_argument("--ram", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeat", type=int, default=3)
    add_report_option(parser)
    arguments = parser.parse_args(argv)
    if arguments.geometry:
        arguments.checkpoint = sides.checkpoint(arguments.checkpoint, arguments.geometry, arguments.blocks)
    if arguments.checkpoint is None:
        parser.error("give --checkpoint or --geometry")
    report = measure(arguments)
    print(
        f"teach takes {report['ratio']:.3f} of the time of forward, {report['processor_ratio']:.3f} of the processor's; "
        f"resident at most {report['first_third_rss_bytes'] / 2**20:,.0f} MiB in the first third of it and "
        f"{report['last_third_rss_bytes'] / 2**20:,.0f} MiB in the last"
    )
    finish("teaching", report, arguments.report)


if __name__ == "__main__":
    main()
