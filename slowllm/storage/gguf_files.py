"""Which GGUF files make a model? Reads names only, and imports no torch, so that a wrong name is refused before it is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from slowllm.errors import CheckpointError

SUFFIX = ".gguf"
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# Of a folder whose weights are these, whatever else lies there.
_OTHERS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def gguf_files(path: Path) -> list[Path]:
    """Return the GGUF files of a model: the one that is named with the others of its set, or those of a folder.

    A folder with safetensors or pickled weights is no GGUF model, even if GGUF files lie there as well.

    Raises:
        CheckpointError: a file of a set is missing, or a folder has several models.
    """
    if path.suffix == SUFFIX and not path.is_dir():
        return _set_of(path)
    if not any(path.glob(f"*{SUFFIX}")) or any(
        any(path.glob(pattern))
        for pattern in ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
    ):
        return []
    firsts = sorted({_set_of(file)[0] for file in _without_projectors(path)})
    if len(firsts) != 1:
        names = ", ".join(file.name for file in firsts[:4])
        raise CheckpointError(
            f"{path}: has {len(firsts)} GGUF models ({names}); name one of the files as the model"
        )
    return _set_of(firsts[0])


def _without_projectors(folder: Path) -> Iterator[Path]:
    """Yield the GGUF files of a folder, without those of vision towers."""
    files = list(folder.glob(f"*{SUFFIX}"))
    models = [file for file in files if not file.name.startswith("mmproj")]
    yield from models or files


def names_of_set(name: str) -> list[str]:
    """Return the names of the files that belong to one with this name, its own among them."""
    match = _SPLIT.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{number:05}-of-{count:05}{SUFFIX}" for number in range(1, count + 1)]


def _set_of(file: Path) -> list[Path]:
    files = [file.with_name(name) for name in names_of_set(file.name)]
    for one in files:
        if len(files) > 1 and not one.is_file():
            raise CheckpointError(
                f"{one.name}: missing, though {file.name} says that it is there; fetch this file"
            )
    return files
