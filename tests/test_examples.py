"""The programs and the notebook of examples/ run as they are."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.api_server import ApiServer, api_server
from tests.support.paths import ROOT, TINY_BLOOM
from tests.support.processes import Ended, Processes

EXAMPLES = ROOT / "examples"
PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "tour.ipynb"


@pytest.fixture
def run(processes: Processes) -> Callable[..., Ended]:
    return lambda name, *arguments: processes.run("-m", f"examples.{name}", *arguments)


@pytest.fixture(scope="module")
def server(processes: Processes) -> Iterator[ApiServer]:
    with api_server(processes, TINY_BLOOM) as server:
        yield server


def good(ended: Ended) -> str:
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_list_of_examples_names_every_program() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert PROGRAMS == ["api_client", "boolq", "scoring", "tuning"]
    for name in (*(f"{program}.py" for program in PROGRAMS), NOTEBOOK.name):
        assert f"`{name}`" in listed


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_explains_itself(run: Callable[..., Ended], name: str) -> None:
    shown = good(run(name, "--help"))
    assert f"python examples/{name}.py" in shown
    assert "--model" in shown


def test_texts_are_scored(run: Callable[..., Ended]) -> None:
    shown = good(run("scoring"))
    assert shown.count("nats a token, perplexity ") == 3
    assert re.search(r"^ +' value' +\d+\.\d{3} #+$", shown, re.MULTILINE)
    assert "The end." in good(run("scoring", "The end.", "--model", "embedded:tiny-bloom-draft"))


def test_questions_are_answered(run: Callable[..., Ended]) -> None:
    shown = good(run("boolq")).splitlines()
    assert len(shown) == 6
    found = re.fullmatch(r"accuracy (\S+), 95% interval (\S+) to (\S+), 4 questions", shown[-2])
    assert found is not None
    accuracy, low, high = map(float, found.groups())
    assert accuracy == sum(line.startswith("right") for line in shown) / 4
    assert 0 < low < accuracy < high < 1


def test_an_interval_is_wilsons() -> None:
    # The examples of Brown, Cai and DasGupta (2001) begin with no success: the interval then ends at z^2/(n + z^2).
    interval = importlib.import_module("examples.boolq").interval
    assert interval(0, 10) == pytest.approx((0.0, 1.96**2 / (10 + 1.96**2)))
    assert interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_a_prompt_is_learned(run: Callable[..., Ended], tmp_path: Path) -> None:
    shown = good(run("tuning", "--steps", "4", "--out", tmp_path / "prompt"))
    assert re.search(r"^accuracy before: \d\.\d{3}$", shown, re.MULTILINE)
    assert re.search(r"^accuracy after: \d\.\d{3}$", shown, re.MULTILINE)
    first, last = re.findall(r"(\d+\.\d+) at ", shown)
    assert float(last) < float(first)
    assert (tmp_path / "prompt" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("has_openai", [True, False])
def test_a_server_is_asked(processes: Processes, server: ApiServer, has_openai: bool) -> None:
    # The same answers by both clients.
    hide = "" if has_openai else "import sys; sys.modules['openai'] = None\n"
    code = f"""{hide}
import sys, runpy
sys.argv = ["api_client.py", {server.url!r}]
runpy.run_path("examples/api_client.py", run_name="__main__")
"""
    shown = good(processes.run("-c", code)).splitlines()
    assert shown[0] == "completion: The value is the value of the value of"
    assert re.match("chat: the server refuses: .*no chat template", shown[1])
    assert shown[2] == "log-probability of 'The': none"
    assert re.fullmatch(r"log-probability of ' value': -\d+\.\d{3}", shown[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scoring", "--model", "nowhere"], "scoring.py: nowhere: no such folder"),
        (["scoring", "--ram", "much"], "scoring.py: "),
        (
            ["boolq", "--file", "README.md"],
            "README.md: a line is no JSON object with question, passage and answer",
        ),
        (["boolq", "--file", "/dev/null"], "/dev/null: has no questions"),
        (["boolq", "--file", "nowhere"], "No such file"),
        (["tuning", "--steps", "0"], "tuning.py: "),
        (["api_client", "http://127.0.0.1:9/v1"], "api_client.py: http://127.0.0.1:9/v1: "),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    run: Callable[..., Ended], arguments: list[str], message: str
) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.long
def test_a_program_starts_a_server_and_ends_it(run: Callable[..., Ended]) -> None:
    ended = run("api_client")
    assert good(ended).startswith("completion: The value is")
    assert "\nended" in ended.stderr
    refused = run("api_client", "--model", "nowhere")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "api_client.py: the server has ended before it served nowhere" in refused.stderr


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    return found


def test_the_notebook_is_kept_without_outputs() -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert code
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.long
def test_the_notebook_runs_and_shows_progress_and_results(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    kinds: list[tuple[int, str]] = []
    process = client.process_message

    def noting(message: dict[str, Any], cell: Any, index: int) -> Any:
        kinds.append((index, message["msg_type"]))
        return process(message, cell, index)

    client.process_message = noting
    client.execute()
    shown = {
        cell.source: "".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    calls = [
        number
        for number, cell in enumerate(notebook.cells)
        if re.search(r"lm\.(score|choose|yes_no|generate)\(|tune\(", cell.source)
    ]
    silent = [number for number in calls if "progress=told" in notebook.cells[number].source]
    for number in calls:
        changes = (number, "update_display_data") in kinds
        assert changes == (number not in silent), notebook.cells[number].source
    (scored,) = [made for source, made in shown.items() if source.startswith("scored =")]
    assert "in one sweep" in scored, "the plan"
    assert "2 of 2 texts" in scored, "the last state of the bar"
    assert "rgba(224, 80, 32" in scored, "the result"
    assert "not measured" in next(
        made for source, made in shown.items() if source.startswith("import slowllm")
    )
    assert "closed" in shown["lm.close()\nlm"]
    assert "plan of " in shown["lm.plan"]
