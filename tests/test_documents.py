"""README and docs tell the truth: their commands and examples run, and what they name exists."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from slowllm.entrypoints.cli.app import app
from slowllm.entrypoints.cli.petals_flags import DHT_FLAGS, SERVER_FLAGS
from slowllm.entrypoints.settings.presets import preset_names
from tests.support.documents import examples_of
from tests.support.fake_hub import FakeHub, Repo
from tests.support.paths import ROOT
from tests.support.processes import Processes

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_EXAMPLES = [path for path in DOCUMENTS if any(examples_of(path.read_text()))]
# Documents that fetch a model, from a small hub on the loopback that calls the embedded one bigscience/bloom.
FETCHING = {"plan-and-download.md", "stores.md"}
# Besides those, what takes long: all tasks that lm-eval brings are looked at twice; a store is made, and `datasets` loaded.
LONG = FETCHING | {"evaluation.md", "teach.md"}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.long] * (path.name in LONG)) for path in WITH_EXAMPLES],
    ids=lambda path: path.name,
)
def test_every_command_and_example_runs(path: Path, processes: Processes, tmp_path: Path) -> None:
    module = ("tests.support.documents", path, tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    if path.name in FETCHING:
        files = {file.name: file.read_bytes() for file in (ROOT / "weights" / "tiny-bloom").iterdir()}
        with FakeHub() as hub:
            hub.repos["bigscience/bloom"] = Repo(files)
            # A process that imports huggingface_hub itself, which reads the address of the hub as it is imported.
            env = {
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
            }
            fetched = subprocess.run(
                [sys.executable, "-c", "import sys, slowllm.cli; sys.argv[1:] = ['download', 'bigscience/bloom']; slowllm.cli.run()"],
                cwd=ROOT, env=env, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert fetched.returncode == 0, fetched.stderr
            ended = subprocess.run(
                [sys.executable, "-m", *map(str, module)],
                cwd=ROOT,
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )
    else:
        ended = processes.run("-m", *module)
    assert ended.returncode == 0, ended.stderr
    done = json.loads(ended.stdout.splitlines()[-1])
    assert done
    for one in done:
        assert one["code"] == 0, f"{one['source']}\n{one['stderr']}"
        assert one["stdout"].strip() or " --out " in one["source"], f"{one['source']} printed nothing"


def test_the_readme_counts_the_families_as_their_page_does() -> None:
    counted = re.search(r"(\d+) of (\d+) architectures", README)
    families = (ROOT / "docs" / "families.md").read_text()
    listed = [int(number) for number in re.findall(r"^## .*\((\d+)\)$", families, re.MULTILINE)]
    assert counted is not None
    assert (int(counted[1]), int(counted[2])) == (listed[0], sum(listed))


def test_the_readme_is_short_and_its_example_too() -> None:
    assert len(README.split()) <= 1200
    (example,) = [source for kind, source, _ in examples_of(README) if kind == "python"]
    assert len(example.strip().splitlines()) <= 10


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda path: path.name
)
def test_what_a_document_names_exists(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
    for name in re.findall(r"`((?:slowllm|tests|benchmarks|scripts)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


INPUT = re.compile(r"[\w./-]+\.(?:txt|jsonl|json|yaml|parquet|csv)")


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.name)
def test_every_file_that_a_command_reads_is_in_the_repository(path: Path) -> None:
    for kind, command, _ in examples_of(path.read_text()):
        words = shlex.split(command) if kind == "slowllm" else [command]
        written = {after for before, after in itertools.pairwise(words) if before == "--out"}
        read = {word for word in words if INPUT.fullmatch(word)} if kind != "python" else set()
        for file in read - written:
            assert (ROOT / file).is_file(), f"{path.name}: {command} reads {file}"


def test_every_example_is_used_by_a_document() -> None:
    commands = "".join(path.read_text() for path in DOCUMENTS)
    for file in (ROOT / "examples").rglob("*"):
        used = f"examples/{file.relative_to(ROOT / 'examples').parts[0]}"
        assert file.name == "README.md" or used in commands, f"no document uses {file.name}"


def options_of(command: click.Command, name: str = "slowllm") -> Iterator[tuple[str, set[str]]]:
    """Yield the name and the options of each verb."""
    yield (
        name,
        {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)},
    )
    for verb, inner in getattr(command, "commands", {}).items():
        yield from options_of(inner, f"{name} {verb}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_verbs_and_options_that_a_document_names_exist(path: Path) -> None:
    verbs = dict(options_of(typer.main.get_command(app)))
    known = set().union(*verbs.values(), SERVER_FLAGS, DHT_FLAGS)
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)):
        if code.startswith("slowllm "):
            named = re.match(r"slowllm(?: (?:eval )?[a-z]+)?", code)
            assert named is not None
            assert named[0] in verbs, f"{path.name}: {code}"
        if code.startswith(("--", "slowllm ")):
            for option in re.findall(r"(?<!\w)--[a-z][\w-]*", code):
                assert option in known | {"--version", "--help", "--model_args"}, f"{path.name}: {code}"


def test_the_table_shows_what_forward_prints() -> None:
    from slowllm import load
    from slowllm.inference import lines

    shown = (ROOT / "docs" / "scoring.md").read_text()
    rows = re.findall(r"^ +(\d+) +(\d+) +(-[\d.]+) +[\d.]+ +[\d.]+  (.*)$", shown, re.MULTILINE)
    assert len(rows) == 2
    sentences = (ROOT / "sentences.txt").read_text().splitlines()
    with load(ROOT / "weights" / "tiny-bloom", dtype="fp32") as lm:
        for number, num_tokens, log_likelihood, text in rows:
            assert sentences[int(number) - 1] == text
            (line,) = lines.encode(lm, [(int(number), text)], max_tokens=100, truncate=False)
            ((_, likelihood),) = lines.score_lines(lm, [line], prefix=1)
            assert len(line.ids) == int(num_tokens)
            # The document shows bf16.
            assert likelihood.log_likelihood == pytest.approx(float(log_likelihood), rel=0.01)


@pytest.mark.parametrize("target", ["forward", "test", "test-long"])
def test_the_commands_of_make_are_targets_of_the_makefile(target: str) -> None:
    assert f"make {target}" in README + (ROOT / "CONTRIBUTING.md").read_text()
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def built_wheel(folder: Path) -> Path:
    """Build the wheel without a network."""
    pytest.importorskip("hatchling", reason="building the wheel without a network needs hatchling here")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_carries_the_embedded_models_and_the_presets(tmp_path: Path) -> None:
    names = zipfile.ZipFile(built_wheel(tmp_path)).namelist()
    for model in ("tiny-bloom", "tiny-bloom-draft"):
        assert f"slowllm/weights/{model}/config.json" in names
        assert any(name.startswith(f"slowllm/weights/{model}/model") for name in names)
    assert "slowllm/py.typed" in names
    assert "slowllm/entrypoints/report/template.html.j2" in names
    for preset in preset_names():
        assert f"slowllm/presets/{preset}.yaml" in names


@pytest.mark.long
def test_the_wheel_runs_in_a_clean_environment(tmp_path: Path) -> None:
    wheel, folder = built_wheel(tmp_path / "dist"), tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
    python = folder / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel)
    # Its dependencies are those of this environment, without this environment's slowllm: the lines of such a file are
    # folders to import from, whose own files of this kind are not read.
    here = sysconfig.get_path("purelib")
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{here}\n")
    place = run(python, "-c", "import slowllm; print(slowllm.__file__)")
    assert place.startswith(str(folder))
    command = folder / "bin" / "slowllm"
    (tmp_path / "in.txt").write_text("The value is returned.\n")
    assert json.loads(run(command, "forward", "in.txt", "--preset", "tiny-bloom", "--json"))["line"] == 1
    assert "bloom-176b-16gb" in run(command, "config", "presets")
    assert "Usage: slowllm" in run(command, "--help")
    # Every requirement that it names without an extra is met by what it ran with.
    assert "slowllm" not in run(python, "-c", CHECK)


# Prints the requirements of the installed package that are not met.
CHECK = """
import importlib.metadata as metadata
from packaging.requirements import Requirement
for line in metadata.requires("slowllm"):
    need = Requirement(line)
    if need.marker is None and metadata.version(need.name) not in need.specifier:
        print("slowllm needs", need)
"""


def test_the_container_is_made_of_files_that_are_there() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    ignored = (ROOT / ".dockerignore").read_text()
    for line in lines:
        if line.startswith("COPY "):
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists()
                assert f"!{name}\n" in ignored
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "ARG EXTRAS=store" in lines
    assert "store" in extras
