"""Presets: options for a known model on a known machine, in a YAML file that comes with the package or of one's own.

Such a file has the keys ``about`` (one line), ``model`` (a folder or hub id), ``config`` (what the model's config.json
says, by transformers' names) and ``options`` (as in the user's own file).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slowllm.entrypoints.settings.yaml_files import nearest, read_yaml
from slowllm.errors import InputError
from slowllm.files import read_description, shown

_KEYS: Mapping[str, type] = {"about": str, "model": str, "config": dict, "options": dict}
# A config.json of an older transformers, or of its author, has other names for the same.
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embed", "n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
}


@dataclass(frozen=True)
class Preset:
    """Options for a known model on a known machine.

    Attributes:
        name: of the preset, or the path of its file.
        about: one line for people.
        model: folder, hub id or embedded model.
        config: what the model's config.json says, by transformers' names.
        options: as in a user's file: by their names, and in sections by verb.
    """

    name: str
    about: str
    model: str
    config: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def source(self) -> str:
        """What a message calls it."""
        return f"preset {self.name}"


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package, sorted."""
    return sorted(file.stem for file in _folder().glob("*.yaml"))


def read_preset(name: str) -> Preset:
    """Return a preset by its name, or from a file of one's own, whose path ends in .yaml or .yml.

    Raises:
        InputError: there is no such preset, or its file is not one.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    elif name in (names := preset_names()):
        path = _folder() / f"{name}.yaml"
    else:
        raise InputError(
            f"--preset {name!r} is unknown; the nearest is {nearest(name, names)}, `slowllm config presets` lists all, and a "
            "file of your own ends in .yaml"
        )
    table = read_yaml(path)
    for key, value in table.items():
        if key not in _KEYS:
            raise InputError(f"{path}: {key!r} is no key of a preset; the nearest is {nearest(key, _KEYS)}")
        if not isinstance(value, _KEYS[key]):
            kind = "mapping" if _KEYS[key] is dict else "text"
            raise InputError(f"{path}: {key} takes a {kind}, not {value!r}")
    return Preset(
        name,
        table.get("about", ""),
        table.get("model", ""),
        table.get("config", {}),
        table.get("options", {}),
    )


def mismatches(preset: Preset, config: Mapping[str, Any]) -> list[str]:
    """Return in words each value of a preset's config that a checkpoint's config contradicts.

    A name that the config has in no spelling is left aside, for then transformers' default holds there.

    Args:
        preset: whose `config` is compared.
        config: the object of a config.json; of a multimodal model, its ``text_config`` counts as well.
    """
    text = config.get("text_config")
    places = (config, text) if isinstance(text, Mapping) else (config,)
    found = []
    for name, expected in preset.config.items():
        spellings = (name, *_OTHER_NAMES.get(name, ()))
        values = [(key, place[key]) for place in places for key in spellings if place.get(key) is not None]
        if values and all(value != expected for _, value in values):
            key, value = values[0]
            found.append(f"{key} is {shown(value)} and not {shown(expected)}")
    return found


def check_preset(preset: Preset, folder: Path) -> None:
    """Refuse a checkpoint of another shape than the preset's model; a folder without a config.json passes.

    Raises:
        InputError: with every mismatch.
    """
    path = folder / "config.json"
    if not preset.config or not path.is_file():
        return
    try:
        config = json.loads(read_description(path, InputError))
    except (ValueError, RecursionError):
        return  # whoever opens the model says what is wrong with it
    if isinstance(config, dict) and (found := mismatches(preset, config)):
        raise InputError(
            f"{path}: is not of the model of {preset.source}: {'; '.join(found)}; leave out --preset, or name its model"
            + (f" ({preset.model})" if preset.model else "")
        )


def _folder() -> Path:
    return Path(__file__).resolve().parents[2] / "presets"
