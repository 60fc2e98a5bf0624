"""The README tells the truth: its Python runs, its commands exist, its claims are counted."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.families import FAMILIES
from tests.support.paths import ROOT
from tests.support.processes import Processes

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_python_examples_run(number: int, processes: Processes) -> None:
    done = processes.run("-c", EXAMPLES[number])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 4
    assert len(EXAMPLES[0].strip().splitlines()) <= 8


def test_families_are_counted_right() -> None:
    counted = re.search(r"(\d+) configurations of (\d+) families", README)
    assert counted is not None
    assert int(counted[1]) == len(FAMILIES)
    assert int(counted[2]) == len({model_type for model_type, _ in FAMILIES.values()})


def test_the_table_shows_what_forward_prints() -> None:
    from slowllm import load
    from slowllm.inference import lines

    rows = re.findall(r"^ {4} +(\d+) +(\d+) +(-[\d.]+) +[\d.]+ +[\d.]+  (.*)$", README, re.MULTILINE)
    assert len(rows) == 2
    sentences = (ROOT / "sentences.txt").read_text().splitlines()
    with load(ROOT / "weights" / "tiny-bloom", dtype="fp32") as lm:
        for number, num_tokens, log_likelihood, text in rows:
            assert sentences[int(number) - 1] == text
            (line,) = lines.encode(lm, [(int(number), text)], max_tokens=100, truncate=False)
            ((_, likelihood),) = lines.score_lines(lm, [line], prefix=1)
            assert len(line.ids) == int(num_tokens)
            # The README was printed in bf16.
            assert likelihood.log_likelihood == pytest.approx(float(log_likelihood), rel=0.01)


@pytest.mark.parametrize("command", ["forward", "test"])
def test_the_two_commands_are_targets_of_the_makefile(command: str) -> None:
    assert f"make {command}" in README
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_wheel_carries_the_embedded_models(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="building the wheel without a network needs hatchling here")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for model in ("tiny-bloom", "tiny-bloom-draft"):
        assert f"slowllm/weights/{model}/config.json" in names
        assert any(name.startswith(f"slowllm/weights/{model}/model") for name in names)
    assert "slowllm/py.typed" in names
