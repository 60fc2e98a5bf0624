"""What `slowllm tune` writes of a run: what a phase takes, its log, and a line for each step."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from slowllm.entrypoints.cli.output import prints_text
from slowllm.entrypoints.report.recorder import RunReport
from slowllm.errors import counted
from slowllm.options import format_bytes

if TYPE_CHECKING:
    from slowllm.planning.job import Job
    from slowllm.runtime.streamed_lm import StreamedLM


def announce(
    lm: StreamedLM, job: Job, what: str, peak_bytes: int, status: contextlib.ExitStack, told: RunReport
) -> None:
    """Print what a phase takes; then show where the carousel is, and tell a report, instead of what `status` does."""
    from slowllm.entrypoints.progress import line_of_steps, steps

    print(line_of_steps(lm, job, what, peak_bytes), file=sys.stderr)
    status.close()
    status.enter_context(steps(lm, job, what))
    status.enter_context(told.watching(lm, job, title=what))


@contextlib.contextmanager
def writing_log(out: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that writes a record to the log, and to TensorBoard's log where that is installed.

    Nothing is written before the first record: only then is everything checked, and the folder belongs to this run.
    """
    with contextlib.ExitStack() as stack:
        file: IO[str] | None = None
        board: Any = None

        def write(record: dict[str, Any]) -> None:
            nonlocal file, board
            if file is None:
                file = stack.enter_context(open(out / "log.jsonl", "w", encoding="utf-8"))
                board = _board(out)
                if board is not None:
                    stack.callback(board.close)
            file.write(json.dumps(record) + "\n")
            file.flush()
            for name, value in record.items():
                if board is not None and name not in ("trial", "step"):
                    board.add_scalar(f"{record['trial']}/{name}", value, record["step"])

        yield write


def _board(out: Path) -> Any:
    """Return TensorBoard's writer, None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    for old in out.glob("events.out.tfevents.*"):  # of a run that this one resumes or replaces
        old.unlink()
    return SummaryWriter(str(out))


def record_printer(as_json: bool, *, many: bool) -> Callable[[dict[str, Any]], None]:
    """Return a function that prints a record: on a terminal as a line of a table, otherwise as a JSON line."""
    if not prints_text(None, as_json):
        return lambda record: print(json.dumps(record), flush=True)

    def line(record: dict[str, Any]) -> None:
        parts = [record["trial"]] if many else []
        parts.append(f"step {record['step']:>4}")
        if "loss" in record:
            parts += [
                f"loss {record['loss']:.4f}", f"gradient {record['grad_norm']:.3g}",
                f"rate {record['learning_rate']:.3g}", f"{counted(record['num_tokens'], 'token')}",
                f"{record['seconds']:.2f} s", f"{format_bytes(record['read_bytes'])} read",
            ]  # fmt: skip
        else:
            parts.append(f"validation {record['validation_loss']:.4f}")
            parts += [f"accuracy {record['accuracy']:.3f}"] if "accuracy" in record else []
        print("  ".join(parts), flush=True)

    return line
