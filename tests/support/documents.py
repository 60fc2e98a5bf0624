"""Run what a document shows: its Python examples and its commands, in order, in one folder.

    python -m tests.support.documents DOCUMENT FOLDER

In a block marked `console`, a line that begins with `$ slowllm` is a command of the command line, and `$ cat FILE` shows
the first lines of a file of the repository. Each block marked `python` is a program. All runs in this process, which
so imports torch and transformers once. Prints one JSON list of `Done`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.paths import ROOT

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Done:
    """What became of one command or example."""

    source: str
    code: int
    stdout: str
    stderr: str


def examples_of(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield kind (`slowllm`, `file` or `python`), command or file name or program, and a file's content."""
    for kind, body in _BLOCK.findall(text):
        if kind == "python":
            yield "python", body, ""
        for command, shown in (
            re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", body, re.MULTILINE) if kind == "console" else ()
        ):
            if command.startswith("cat "):
                yield "file", command.removeprefix("cat "), shown
            else:
                assert command.startswith("slowllm "), f"cannot be run here: {command}"
                yield "slowllm", command, ""


def _run(kind: str, source: str) -> None:
    from slowllm.cli import run

    if kind == "python":
        exec(compile(source, "<example>", "exec"), {"__name__": "__main__"})
        return
    before, sys.argv = sys.argv, shlex.split(source)
    try:
        run()
    finally:
        sys.argv = before


def run_document(path: Path, folder: Path) -> list[Done]:
    """Run all that a document shows in a folder, in order."""
    for name in ("weights", "examples", "sentences.txt", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    os.chdir(folder)
    done = []
    for kind, source, content in examples_of(path.read_text()):
        if kind == "file":
            assert Path(source).read_text().startswith(content), (
                f"{source} does not begin as {path.name} shows"
            )
            continue
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                _run(kind, source)
            except SystemExit as leaving:
                code = int(leaving.code or 0)
            except Exception:
                code = 1
                traceback.print_exc()
        done.append(Done(source, code, out.getvalue(), err.getvalue()))
    return done


if __name__ == "__main__":
    print(json.dumps([asdict(one) for one in run_document(Path(sys.argv[1]), Path(sys.argv[2]))]))
