"""Presets are made of the facts that models publish, and fit the machines that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from slowllm.entrypoints.settings.presets import check_preset, mismatches, preset_names, read_preset
from slowllm.entrypoints.settings.user_file import user_file
from slowllm.entrypoints.settings.yaml_files import nearest
from slowllm.errors import InputError
from slowllm.options import parse_bytes
from slowllm.planning.job import Job
from slowllm.runtime.blueprint import known_blueprint, measure_blueprint
from slowllm.runtime.known_models import find_known
from slowllm.runtime.survey import smallest_budget
from tests.support.paths import TINY_BLOOM

KNOWN = [name for name in preset_names() if name != "tiny-bloom"]


@pytest.mark.parametrize("name", KNOWN)
def test_a_preset_says_what_the_table_of_known_models_says(name: str) -> None:
    preset = read_preset(name)
    found = find_known(preset.model)
    assert found is not None
    hub_id, known = found
    assert hub_id == preset.model
    assert len(preset.config) >= 5
    assert not mismatches(preset, {"model_type": known.model_type, **known.options})


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) for name in KNOWN])
def test_a_preset_fits_the_machine_that_it_names(name: str) -> None:
    preset = read_preset(name)
    budget = parse_bytes(preset.options["ram"])
    machine = re.search(r"-(\d+)gb$", name)
    assert machine is not None
    assert budget < int(machine[1]) * 10**9 * 7 / 8
    blueprint = known_blueprint(preset.model)
    for dtype in (torch.bfloat16, torch.float32):
        sizes = measure_blueprint(blueprint, blueprint.dtype, dtype, forward_only=True)
        job = Job(100_000, 512, forward_only=True, keeps_results=False)
        assert smallest_budget(sizes.choices, job, 600 << 20) < budget


def test_the_embedded_models_preset_is_of_it() -> None:
    check_preset(read_preset("tiny-bloom"), TINY_BLOOM)


def test_a_config_by_other_names_or_inside_another_one_is_compared(tmp_path: Path) -> None:
    preset = read_preset("bloom-176b-16gb")
    published = {"model_type": "bloom", "n_layer": 70, "n_embed": 14336, "n_head": 112, "vocab_size": 250880}
    assert not mismatches(preset, published)
    assert not mismatches(preset, {"model_type": "something", "text_config": published})
    assert mismatches(preset, {**published, "n_layer": 69}) == ["n_layer is 69 and not 70"]
    assert not mismatches(preset, {"model_type": "bloom"})
    (tmp_path / "config.json").write_text(json.dumps({**published, "n_embed": 7}))
    with pytest.raises(InputError, match="is not of the model of preset bloom-176b-16gb: n_embed is 7"):
        check_preset(preset, tmp_path)
    (tmp_path / "config.json").write_text("{")  # whoever opens the model says so
    check_preset(preset, tmp_path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.yaml: No such file"):
        read_preset(str(tmp_path / "nothing.yaml"))


def test_the_nearest_word_is_the_one_that_looks_alike() -> None:
    assert nearest("batchsize", ["lr", "batch_size", "steps"]) == "batch_size"
    assert nearest("zzz", ["lr"]) == "lr"


@pytest.mark.parametrize(
    ("xdg", "home", "expected"),
    [
        ("/x", "/h", "/x/slowllm/config.yaml"),
        ("", "/h", "/h/.config/slowllm/config.yaml"),
        ("relative", "/h", "/h/.config/slowllm/config.yaml"),
    ],
)
def test_the_users_file_is_where_xdg_says(
    xdg: str, home: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", xdg)
    monkeypatch.setenv("HOME", home)
    assert user_file() == Path(expected)
