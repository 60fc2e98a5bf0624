"""Show what a benchmark measured on a page of HTML: ours, the limit and the peer as bars, and the JSON document."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slowllm.entrypoints.report.destination import check_report
from slowllm.entrypoints.report.page import PlotShown, ReportPage, Section
from slowllm.entrypoints.report.recorder import command_line, program_figures, write_page
from slowllm.errors import SlowLLMError

# What is drawn of a document, in this order, by its keys.
SECONDS = {
    "wall_s": "ours", "first_epoch_s": "ours, first epoch", "later_epoch_s": "ours, later epoch",
    "whole_s": "ours, each by itself", "predicted_s": "ours, as planned",
    "limit_s": "limit", "disk_limit_s": "limit of the disk", "gemm_limit_s": "limit of the processor",
    "resident_compute_s": "computing in memory", "teach_s": "ours, teach", "forward_s": "ours, forward",
    "peer_wall_s": "peer", "peer_padded_s": "peer, padded", "peer_batch_s": "peer, one batch",
    "peer_one_by_one_s": "peer, one by one",
}  # fmt: skip
RATES = {
    "one_tokens_per_s": "ours, one client", "limit_one_tokens_per_s": "limit of the disk, one client",
    "all_tokens_per_s": "ours, all clients",
}  # fmt: skip


def report_file(name: str) -> Path:
    """Return the file of the report that an option names; as `type` of argparse.

    Raises:
        argparse.ArgumentTypeError: it cannot be written, or what makes it is not installed.
    """
    try:
        file = check_report(Path(name), None)
    except SlowLLMError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    assert file is not None, "a file was named"
    return file


def add_report_option(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark's command line name the file of a report."""
    parser.add_argument(
        "--report", type=report_file, metavar="FILE.html", help="also write a page with plots to this file"
    )


def bars_of(document: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, float]]:
    """Return the named figures of a document that it has, in the order of the names."""
    found = [(word, document.get(key)) for key, word in names.items()]
    return [(word, float(value)) for word, value in found if isinstance(value, int | float)]


def finish(name: str, document: Mapping[str, Any], file: Path | None) -> None:
    """Print a benchmark's JSON document as the last line, and write its report if one is wanted.

    Args:
        name: of the benchmark's module.
        document: what it measured.
        file: from `report_file`.
    """
    print(json.dumps(document))
    if file is not None:
        write_page(file, page_of(name, document))


def page_of(name: str, document: Mapping[str, Any]) -> ReportPage:
    """Return the page of a benchmark."""
    # Here, because a benchmark without a report needs no matplotlib.
    from slowllm.entrypoints.report import plots

    colours = {"ours": plots.READING, "peer": plots.WAITING}
    measured = Section("Ours, limit and peer")
    for title, names, unit in (("Seconds", SECONDS, "seconds"), ("Tokens a second", RATES, "tokens/s")):
        if bars := bars_of(document, names):
            drawn = [
                plots.Bar(word, value, colours.get(word.split(",")[0], plots.GREY)) for word, value in bars
            ]
            measured.plots.append(
                PlotShown(plots.bars(title, drawn, unit), f"{title}; medians over the runs of each side.")
            )
    measured.figures = [
        (key, f"{document[key]:.4g}")
        for key in ("efficiency", "speedup", "speedup_later", "disk_gb_per_s", "gemm_tflop_per_s")
        if isinstance(document.get(key), int | float)
    ]
    whole, about = Section("Document"), Section("Program")
    whole.verbatim = json.dumps(document, indent=2, ensure_ascii=False)
    about.figures = program_figures()
    command = command_line().replace("slowllm", f"python -m benchmarks.{name}", 1)
    return ReportPage(f"Benchmark {name}", command, [measured, whole, about])
