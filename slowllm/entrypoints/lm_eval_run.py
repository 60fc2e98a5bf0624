"""Run lm-eval's command line with slowllm's model, and tell a report what came of it."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slowllm.entrypoints.lm_eval_command import ALLOW_DOWNLOADS, check_arguments, values_of
from slowllm.entrypoints.lm_eval_model import FOLLOWER
from slowllm.entrypoints.report.recorder import RunReport
from slowllm.entrypoints.report.results import TaskMeasured
from slowllm.errors import InputError, first_line

log = logging.getLogger(__name__)


def main(arguments: Sequence[str], report: RunReport | None = None) -> None:
    """Run lm-eval's command line with this model; `lm_eval_command.stay_offline` shuts off the hub before.

    Args:
        arguments: of lm-eval's command line, such as ``--tasks boolq --model_args pretrained=DIR,ram=16GiB``.
        report: that follows the model, and is told the figures of all tasks.
    Raises:
        InputError: another model is named, or lm-eval refuses its arguments, such as a task that it does not have; or
            data of a task are not on this machine.
    """
    arguments = check_arguments(arguments)
    if not report:
        _run(arguments)
        return
    token = FOLLOWER.set(report)
    try:
        # lm-eval hands its figures to a file only.
        with tempfile.TemporaryDirectory(prefix="slowllm-") as own:
            given = list(values_of(arguments, "--output_path", "-o"))
            if not given and may_write_results(arguments):
                arguments += ["--output_path", own]
            place = Path(given[-1] if given else own)
            folder = place.parent if place.suffix == ".json" else place
            before = set(folder.rglob("*.json"))
            _run(arguments)
            for file in sorted(set(folder.rglob("*.json")) - before):
                for figure in figures_of(json.loads(file.read_text(encoding="utf-8"))):
                    report.add(figure)
    finally:
        FOLLOWER.reset(token)


def may_write_results(arguments: Sequence[str]) -> bool:
    """Return whether lm-eval is asked to evaluate, and no other words of it depend on where results go.

    A config file may name a folder, which the command line would overrule; and samples are refused without one.
    """
    names = {argument.partition("=")[0] for argument in arguments}
    return bool(names & {"--model", "-M"}) and not names & {"--config", "-C", "--log_samples", "-s"}


def figures_of(document: Any) -> Iterator[TaskMeasured]:
    """Yield the figures in a file of lm-eval's results; none where the file is another one."""
    results = document.get("results") if isinstance(document, dict) else None
    for task, metrics in (results or {}).items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if metric in ("sample_len", "sample_count"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            words = metric if filtered in ("", "none") else f"{metric} ({filtered})"
            yield TaskMeasured(
                task, words, float(value), float(stderr) if isinstance(stderr, int | float) else None
            )


def _run(arguments: Sequence[str]) -> None:
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-untyped]

    before, sys.argv = sys.argv, ["lm-eval", *arguments]  # where lm-eval looks for them
    try:
        cli_evaluate()
    except ConnectionError as error:
        log.debug("lm-eval's own words:", exc_info=True)
        advice = ""
        if "OfflineModeIsEnabled" in str(error):
            advice = (
                f"; nothing is downloaded without {ALLOW_DOWNLOADS}: give it once to fetch what the task needs, or use "
                "a task whose data are local files"
            )
        raise InputError(f"lm-eval: {first_line(error)}{advice}") from error
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        log.debug("lm-eval's own words:", exc_info=True)
        raise InputError(f"lm-eval: {error}") from error
    finally:
        sys.argv = before
