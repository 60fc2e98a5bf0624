"""Where a report may go: what is wrong with its file is said before anything is loaded."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from slowllm.errors import InputError
from slowllm.files import part_of, system_errors

_SUFFIXES = (".html",)


def check_installed_for_reports() -> None:
    """Refuse a report where what makes it is not installed.

    Raises:
        InputError: a package is not there; the message says what to install.
    """
    for module in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"--report needs {module}, which is not installed: pip install 'slowllm[report]'"
            )


def check_report(
    report: Path | None, out: str | Path | None, *files: str | Path | None, dry_run: bool = False
) -> Path | None:
    """Return the file of the report with links resolved, None where none is wanted.

    Args:
        report: the file.
        out: where the results go; ``-`` is standard output.
        files: the input files.
        dry_run: whether nothing is done that could be reported.
    Raises:
        InputError: it cannot be written, writing it would destroy something, or what makes it is not installed.
    """
    if report is None:
        return None
    if dry_run:
        raise InputError("--dry-run does nothing that --report could show; leave one of them out")
    check_installed_for_reports()
    if report.suffix.lower() not in _SUFFIXES:
        raise InputError(f"--report {report}: is a page of HTML; give its file a name that ends in .html")
    with system_errors(InputError, report):
        try:
            report = report.expanduser().resolve()
        except RuntimeError as error:  # no such user, or a circle of links
            raise InputError(f"{report}: {error}") from error
        if not report.parent.is_dir():
            raise InputError(f"{report.parent}: no such folder to write {report.name} to")
        for target in (report, part_of(report)):
            if target.is_dir():
                raise InputError(f"{target}: is a folder; name a file with --report")
            if target.exists() and not target.is_file():
                raise InputError(f"{target}: is no ordinary file; name another one with --report")
        for file, what in ((out, "the file of --out"), *((file, "the input") for file in files)):
            if file is None or str(file) == "-":
                continue
            if report == Path(file).expanduser().resolve() or _is_same(report, Path(file).expanduser()):
                raise InputError(f"{report}: is {what}; name another file with --report")
    with system_errors(InputError, report.parent, "; name another folder with --report"):
        # Not os.access, which knows neither read-only file systems nor what root may do.
        tempfile.TemporaryFile(dir=report.parent).close()
    return report


def _is_same(report: Path, file: Path) -> bool:
    return report.exists() and file.exists() and report.samefile(file)
