"""The command line's entry point: exit codes, and what is loaded for which purpose."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from slowllm.entrypoints.cli.app import app
from slowllm.entrypoints.cli.defaults import verbs_of
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


def verbs() -> list[tuple[tuple[str, ...], Any]]:
    return list(verbs_of(typer.main.get_command(app)))


@pytest.mark.parametrize("verb", [words for words, _ in verbs()], ids=" ".join)
def test_every_verbs_help_ends_with_an_example_that_can_be_parsed(verb: tuple[str, ...]) -> None:
    root = typer.main.get_command(app)
    (command,) = [command for words, command in verbs_of(root) if words == verb]
    epilog = command.epilog or ""
    assert epilog.startswith(f"Example: slowllm {' '.join(verb)}"), f"add_verb(..., example) for {verb}"
    shown = CliRunner().invoke(app, [*verb, "--help"], terminal_width=200).output
    assert shown.rstrip().endswith(epilog)
    words = shlex.split(epilog.removeprefix("Example: slowllm "))[len(verb) :]
    parent = root.make_context("slowllm", [], resilient_parsing=True)
    command.make_context(verb[-1], words, parent=parent)


def completed(words: str, number: int, tmp_path: Path) -> list[str]:
    """Return what bash is told to complete the last of some words with."""
    code = "import sys; sys.argv = ['slowllm']\nfrom slowllm.cli import run; run()"
    environment = {
        **ENVIRONMENT, "_SLOWLLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number),
        # A file that cannot be read must not disturb the completion.
        "XDG_CONFIG_HOME": str(tmp_path),
    }  # fmt: skip
    (tmp_path / "slowllm").mkdir(exist_ok=True)
    (tmp_path / "slowllm" / "config.yaml").write_text("{")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not names & {"torch", "transformers", "numpy", "huggingface_hub"}
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "last", "expected"),
    [
        ("slowllm forward --preset bloom-1", 3, "bloom-176b-16gb"),
        pytest.param("slowllm fo", 1, "forward", marks=pytest.mark.long),
        pytest.param("slowllm forward --save", 2, "--save-every", marks=pytest.mark.long),
    ],
)
def test_a_shell_completes_verbs_options_and_presets_without_loading_anything_heavy(
    words: str, last: int, expected: str, tmp_path: Path
) -> None:
    assert completed(words, last, tmp_path) == [expected]


@pytest.mark.long
def test_completion_is_installed_for_bash(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    (tmp_path / "slowllm").write_text(
        f"#!{sys.executable}\nimport sys\nsys.argv[0] = 'slowllm'\nfrom slowllm.cli import run\nrun()\n"
    )
    (tmp_path / "slowllm").chmod(0o755)
    environment = {**ENVIRONMENT, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = """
        slowllm --install-completion bash || slowllm --install-completion || exit 3
        source "$HOME/.bash_completions/slowllm.sh"
        COMP_WORDS=(slowllm gen); COMP_CWORD=1
        _slowllm_completion slowllm
        echo "completed: ${COMPREPLY[*]}"
    """
    done = subprocess.run([bash, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "completed: generate" in done.stdout, done.stdout + done.stderr
    assert ".bash_completions/slowllm.sh" in (tmp_path / ".bashrc").read_text()
