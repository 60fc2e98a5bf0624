"""Checkpoints with a tensor that is missing, stands there twice, or has another shape or dtype."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.spans import DTYPE_BITS, Span

_DTYPES = ("U8", "I8", "I32", "I64", "F32", "BF16", "F16", "F8_E4M3", "F8_E8M0", "F8_E5M2")


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Let `change` alter the tensors of each shard, and write the shards and their index anew."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        before = set(tensors)
        change(tensors)
        index = folder / "model.safetensors.index.json"
        if index.exists():
            listed = json.loads(index.read_text())
            for name in before - set(tensors):
                del listed["weight_map"][name]
            listed["weight_map"] |= dict.fromkeys(set(tensors) - before, path.name)
            index.write_text(json.dumps(listed))
        save_file(tensors, path, {"format": "pt"})


def change_settings(folder: Path, settings: object) -> None:
    """Let config.json say something else of the quantised format."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def spans_of(folder: Path) -> dict[str, Span]:
    """Return the spans of a checkpoint by name."""
    with Checkpoint.open(folder) as checkpoint:
        return dict(checkpoint.spans)


@st.composite
def damaged_spans(draw: st.DrawFn, spans: Mapping[str, Span]) -> dict[str, Span]:
    """Draw the spans of a checkpoint one of whose tensors is not as its maker wrote it."""
    name = draw(st.sampled_from(sorted(spans)))
    others = {other: span for other, span in spans.items() if other != name}
    span, way = spans[name], draw(st.sampled_from(["gone", "dtype", "shape", "renamed", "doubled"]))
    if way == "gone":
        return others
    if way == "dtype":
        changed = replace(span, dtype=draw(st.sampled_from(_DTYPES)))
    elif way == "shape":
        shape = list(span.shape)
        for _ in range(draw(st.integers(1, 2))):
            if shape and draw(st.booleans()):
                shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 200))
            elif shape and draw(st.booleans()):
                del shape[draw(st.integers(0, len(shape) - 1))]
            else:
                shape.insert(draw(st.integers(0, len(shape))), draw(st.integers(0, 3)))
        changed = replace(span, shape=tuple(shape))
    else:
        other = draw(st.sampled_from(sorted(spans)))
        stem, suffix = name.rpartition(".")[0], other.rpartition(".")[2]
        target = draw(st.sampled_from([f"{stem}.{suffix}", f"{name}_scale", other]))
        kept = spans if way == "doubled" else others
        return {**kept, target: replace(span, name=target)}
    changed = replace(changed, num_bytes=math.prod(changed.shape) * DTYPE_BITS[changed.dtype] // 8)
    return {**others, name: changed}
