"""Every byte of a store, and of a snapshot from the hub, is compared with its hash."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import slowllm
from slowllm.errors import CheckpointError, StoreError
from slowllm.prepare.verify import verify
from slowllm.storage.manifest import MANIFEST
from tests.support.paths import TINY_BLOOM


def test_a_damaged_byte_is_found_in_every_file(embedded: Callable[[str], Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(embedded("int8"), store)
    told: list[tuple[int, int]] = []
    good = verify(store, lambda done, total: told.append((done, total)))
    assert good.num_files == 11 + 3  # and the config and the tokenizer
    assert good.num_bytes == sum(p.stat().st_size for p in store.iterdir() if p.name != MANIFEST)
    assert max(told) == (good.num_bytes, good.num_bytes)
    for path in sorted(store.glob("*.safetensors")):
        data = path.read_bytes()
        path.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
        with pytest.raises(
            StoreError, match=rf"^{path.name}: its [\d,]+ bytes have the hash .* was expected"
        ):
            verify(store)
        path.write_bytes(data[:-1])
        with pytest.raises(StoreError, match=rf"^{path.name}: has [\d,]+ bytes, but [\d,]+ were written$"):
            verify(store)
        with pytest.raises(CheckpointError, match=rf"^{path.name}: .* ends at byte"):
            slowllm.load(store)
        path.write_bytes(data)
    (store / "config.json").write_bytes((store / "config.json").read_bytes() + b" ")
    with pytest.raises(StoreError, match=r"^config\.json: its [\d,]+ bytes have the hash"):
        verify(store)


def test_a_snapshot_of_the_hub_is_verified_by_its_names(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in TINY_BLOOM.iterdir():
        data = path.read_bytes()
        git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        etag = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else git
        (blobs / etag).write_bytes(data)
        (snapshot / path.name).symlink_to(blobs / etag)
    assert verify(snapshot).num_files == len(list(TINY_BLOOM.iterdir()))
    for name in ("model-00002-of-00005.safetensors", "config.json"):
        blob = (snapshot / name).resolve()
        data = blob.read_bytes()
        blob.write_bytes(data[:-2] + b"  ")
        with pytest.raises(CheckpointError, match=rf"^{name}: its [\d,]+ bytes have the hash"):
            verify(snapshot)
        blob.write_bytes(data)
    with pytest.raises(CheckpointError, match="nothing says which hash it should have"):
        verify(TINY_BLOOM)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        verify(tmp_path)
