"""Pickled checkpoints are converted without running what is in them, and refused where they hold more than tensors."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import slowllm
from slowllm.errors import CheckpointError, StoreError
from slowllm.storage import pickles
from slowllm.storage.pickles import open_pickled
from slowllm.storage.spans import Span
from tests.support.stores import make_store, passed

Tiny = Callable[..., Path]


def save_pickled(folder: Path, out: Path, shards: int = 2) -> None:
    """Write a checkpoint as older ones lie on the hub."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(safetensors.torch.load_file(path))
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin" if shards > 1 else "pytorch_model.bin"
        own = names[number::shards]
        torch.save({name: tensors[name] for name in own}, out / file)
        weight_map.update(dict.fromkeys(own, file))
    if shards > 1:
        (out / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["bloom", "mixtral"])
def test_pickled_checkpoints_are_converted_and_nothing_in_them_is_run(
    name: str, shards: int, tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny(name, torch.bfloat16)
    save_pickled(source, tmp_path / "pickled", shards)
    with pytest.raises(CheckpointError, match="slowllm convert"):
        slowllm.load(tmp_path / "pickled")
    make_store(tmp_path / "pickled", tmp_path / "store", "lossless")
    assert torch.equal(passed(tmp_path / "store")[0], passed(source)[0])


def repack(
    path: Path,
    method: int = zipfile.ZIP_STORED,
    edit: Callable[[str, bytes], bytes] = lambda name, data: data,
) -> None:
    """Pack an archive anew, without torch's alignment, and with another file before the others."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{next(iter(records)).partition('/')[0]}/readme", b"packed by somebody else")
        for name, data in records.items():
            archive.writestr(name, edit(name, data))


def flip_a_bit(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda record: record.file_size)
    content = bytearray(path.read_bytes())
    content[record.header_offset + record.file_size // 2 + 100] ^= 16
    path.write_bytes(content)


def test_an_archive_that_was_packed_anew_is_read_as_torch_reads_it(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("bloom", torch.bfloat16)
    save_pickled(source, tmp_path / "pickled", 1)
    path = tmp_path / "pickled" / "pytorch_model.bin"
    repack(path)
    wanted = torch.load(path, weights_only=True)
    for name, span in open_pickled(tmp_path / "pickled").spans.items():
        content = path.read_bytes()[span.offset : span.offset + span.num_bytes]
        assert content == wanted[name].view(torch.uint8).numpy().tobytes()
    make_store(tmp_path / "pickled", tmp_path / "store", "lossless")
    assert torch.equal(passed(tmp_path / "store")[0], passed(source)[0])


def test_tensors_that_share_a_storage_lie_where_torch_says(tmp_path: Path) -> None:
    whole = torch.arange(60.0)
    torch.save(
        {"a": whole[:12].view(3, 4), "b": whole[20:50], "c": torch.ones(2, dtype=torch.int8)},
        tmp_path / "pytorch_model.bin",
    )
    (tmp_path / "config.json").write_text("{}")
    spans = open_pickled(tmp_path).spans
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    for name, tensor in {"a": whole[:12], "b": whole[20:50], "c": torch.ones(2, dtype=torch.int8)}.items():
        span = spans[name]
        assert content[span.offset : span.offset + span.num_bytes] == tensor.numpy().tobytes()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/slowllm-was-run",))


def test_bad_pickles_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("bloom", torch.bfloat16)

    def refused(spoil: Callable[[Path], object], match: str) -> None:
        shutil.rmtree(tmp_path / "pickled", ignore_errors=True)
        save_pickled(source, tmp_path / "pickled")
        spoil(tmp_path / "pickled")
        with pytest.raises(CheckpointError, match=match):
            make_store(tmp_path / "pickled", tmp_path / "store", "int8")
        assert not (tmp_path / "store").exists()

    first = "pytorch_model-00001-of-00002.bin"
    refused(lambda p: torch.save({"a": Evil()}, p / first), rf"^{first}: its tensors cannot be read \(")
    assert not Path("/tmp/slowllm-was-run").exists()
    refused(lambda p: torch.save({}, p / first), rf"^{first}: holds no tensors$")
    sparse = {"a": torch.eye(3).to_sparse()}
    refused(lambda p: torch.save(sparse, p / first), rf"^{first}: (a is sparse|its tensors cannot be read)")
    refused(lambda p: torch.save([1], p / first), rf"^{first}: is not a table of tensors by name$")
    transposed = {"a": torch.ones(3, 4).t()}
    refused(
        lambda p: torch.save(transposed, p / first), rf"^{first}: a \(torch.float32\) does not lie in one run"
    )
    refused(lambda p: (p / first).write_bytes(b"PK\x03\x04 no"), rf"^{first}: its tensors cannot be read")
    refused(lambda p: (p / first).unlink(), rf"^{first}: named by pytorch_model.bin.index.json but missing")
    refused(lambda p: os.truncate(p / first, 5000), rf"^{first}: its tensors cannot be read")
    refused(lambda p: repack(p / first, zipfile.ZIP_DEFLATED), rf"^{first}: is compressed")
    refused(
        lambda p: repack(p / first, edit=lambda name, data: b"big" if name.endswith("byteorder") else data),
        rf"^{first}: was written on a big-endian machine",
    )
    refused(lambda p: flip_a_bit(p / first), rf"^{first}: .*data/\d+ is damaged \(its checksum differs\)")
    old = {"_use_new_zipfile_serialization": False}
    refused(lambda p: torch.save({"a": torch.ones(3)}, p / first, **old), rf"^{first}: ")
    refused(
        lambda p: torch.save({"a": torch.ones(3)}, p / first), r"is missing, though pytorch_model.bin.index"
    )


def test_a_store_is_compared_with_what_torch_loads(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pickled(tiny("mixtral", torch.bfloat16), tmp_path / "pickled")
    read = pickles._read_spans

    def shifted(path: Path) -> dict[str, Span]:
        """Read as a reader with a fault would: one tensor from the place of another of its shape."""
        spans = read(path)
        for name, span in spans.items():
            if name.endswith("layers.1.input_layernorm.weight"):
                other = next(s for n, s in spans.items() if n != name and s.shape == span.shape)
                spans[name] = replace(
                    span, offset=other.offset + 2 if other.offset == span.offset else other.offset
                )
        return spans

    monkeypatch.setattr(pickles, "_read_spans", shifted)
    source = {path: torch.load(path) for path in (tmp_path / "pickled").glob("*.bin")}
    for path, tensors in source.items():  # a norm of ones would hide a wrong place
        torch.save({name: torch.randn_like(t) for name, t in tensors.items()}, path)
    with pytest.raises(
        StoreError, match=r"layers\.1\.input_layernorm\.weight: was read otherwise than torch\.load"
    ):
        make_store(tmp_path / "pickled", tmp_path / "store", "bf16")
    monkeypatch.setattr(pickles, "_read_spans", read)
    assert make_store(tmp_path / "pickled", tmp_path / "other", "bf16").manifest is not None
