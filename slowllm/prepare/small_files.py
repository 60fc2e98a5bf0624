"""Copy the config and the tokenizer of a checkpoint into a store, or make them of a GGUF file."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from slowllm.errors import StoreError
from slowllm.files import replace_file, replacing, system_errors
from slowllm.modeling.native.gguf_tokenizer import TOKENS, gguf_tokenizer
from slowllm.prepare.hub import is_small
from slowllm.storage.checkpoint import INDEX
from slowllm.storage.gguf import read_set
from slowllm.storage.gguf_files import gguf_files

_CONFIG = "config.json"


def copy_small_files(source: Path, out: Path, config: Any) -> None:
    """Copy what stands beside the weights of a checkpoint; of a GGUF file, write what its metadata say.

    Args:
        source: a folder, or a GGUF file.
        out: folder of the store.
        config: of the source.
    Raises:
        StoreError: a file cannot be written.
        CheckpointError: a GGUF file has a vocabulary that transformers does not convert.
    """
    files = gguf_files(source)
    if not files:
        _copy(source, out, {INDEX})
        return
    table = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    with system_errors(StoreError, out / _CONFIG):
        replace_file(out / _CONFIG, json.dumps(table, indent=2) + "\n", is_shared=True)
    if source.is_dir():
        _copy(source, out, {INDEX, _CONFIG})
    if not (source / "tokenizer.json").is_file() and isinstance(read_set(files).metadata.get(TOKENS), list):
        with tempfile.TemporaryDirectory() as made:
            gguf_tokenizer(files).save_pretrained(made)
            _copy(Path(made), out, {INDEX, _CONFIG})


def hashes_of_small_files(out: Path) -> dict[str, str]:
    """Return the hash of each config and tokenizer file of a store, by name."""
    names = [path.relative_to(out).as_posix() for path in sorted(out.rglob("*")) if path.is_file()]
    return {n: hashlib.sha256((out / n).read_bytes()).hexdigest() for n in names if is_small(n)}


def _copy(source: Path, out: Path, but: set[str]) -> None:
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if name not in but and path.is_file() and is_small(name):
            target = out / name
            target.parent.mkdir(exist_ok=True)
            with system_errors(StoreError, target), replacing(target, is_shared=True) as partial:
                shutil.copyfile(path, partial)
