"""The command line's entry point: exit codes, and what is loaded for which purpose."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from slowllm.entrypoints.cli.app import app
from tests.support.command_line import run
from tests.support.paths import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def test_an_unknown_option_exits_with_2(monkeypatch: Any, capsys: Any) -> None:
    assert run(["forward", "x", "--frobnicate"], monkeypatch) == 2
    assert "No such option: --frobnicate" in capsys.readouterr().err


@pytest.mark.parametrize("group", [[], ["eval"]])
def test_help_cuts_no_verbs_sentence_short(group: list[str]) -> None:
    shown = CliRunner().invoke(app, [*group, "--help"], terminal_width=80).output
    verbs = shown.partition("Commands:\n")[2].splitlines()
    assert len(verbs) > 2
    assert all(line.endswith(".") and not line.endswith("...") for line in verbs if line)


def imported(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_importing_slowllm_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "rich", "typer"}
    assert not imported("import slowllm; dir(slowllm); slowllm.__version__") & heavy


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = "import sys; sys.argv = ['slowllm', '--help']\nfrom slowllm.cli import run\ntry: run()\nexcept SystemExit: pass"
    assert not imported(code) & {"torch", "transformers", "numpy"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    import slowllm

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = slowllm.nonsense


VERBS = [[name] for name in typer.main.get_command(app).commands]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "verb", [[], *VERBS, ["eval", "boolq"], ["eval", "task"], ["eval", "lm"]], ids=" ".join
)
def test_help_prints_no_markup(verb: list[str]) -> None:
    shown = CliRunner().invoke(app, [*verb, "--help"], terminal_width=80)
    assert shown.exit_code == 0
    assert shown.output.startswith("Usage: ")
    assert not re.search(r"\\b|[\b\f]|\[/?(bold|dim)|``", shown.output)
