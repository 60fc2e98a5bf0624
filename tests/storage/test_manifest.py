"""Stores that are unfinished, damaged, newer or mixed are refused when they are opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.errors import StoreError
from slowllm.prepare.verify import verify
from slowllm.storage.manifest import MANIFEST, UNFINISHED
from tests.support.families import save_tiny
from tests.support.stores import make_store

Tiny = Callable[..., Path]


def test_stores_that_cannot_be_used_are_refused(embedded: Callable[[str], Path], tmp_path: Path) -> None:
    store = tmp_path / "store"

    def refused(change: Callable[[dict[str, Any]], object], match: str) -> None:
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(embedded("int4"), store)
        table = json.loads((store / MANIFEST).read_text())
        change(table)
        (store / MANIFEST).write_text(json.dumps(table))
        with pytest.raises(StoreError, match=match):
            slowllm.load(store)

    block = "block-00003.safetensors"
    refused(
        lambda t: t.update(format=2),
        r"was written by slowllm .* in format 2, but this version reads format 1",
    )
    refused(lambda t: t.update(files={}), "its manifest is damaged .*it names no files")
    refused(lambda t: t.pop("files"), r"its manifest is damaged \(KeyError")
    refused(lambda t: t["files"][block].pop("sha256"), "its manifest is damaged")
    refused(lambda t: (store / block).unlink(), rf"^{block}: is missing from the store")
    other = "block-00004.safetensors"
    refused(
        lambda t: shutil.copy(store / other, store / block),
        rf"^{block}: is not the file that the manifest of .* tells of; it belongs to another store$",
    )
    name = "transformer.h.3.mlp.dense_h_to_4h.weight"

    def tensors(t: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = t["files"][block]["tensors"][name]
        return found

    refused(
        lambda t: tensors(t).update(shape=[640, 400]), r"its parts do not make a matrix of shape \[640, 400\]"
    )
    refused(lambda t: tensors(t).update(codec="int3"), rf"^{block}: has no tensor {name}.int3.codes")
    refused(lambda t: tensors(t).update(dtype="F32"), "is said to decode to F32, but codecs give BF16")
    (store / MANIFEST).write_text("{")
    with pytest.raises(StoreError, match="its manifest is damaged"):
        slowllm.load(store)
    (store / MANIFEST).unlink()
    (store / UNFINISHED).write_text("{}")
    with pytest.raises(StoreError, match="this store is not finished"):
        verify(store)


def test_a_file_of_another_models_store_is_found_when_it_is_opened(tiny: Tiny, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_tiny("bloom", other, torch.bfloat16, initializer_range=0.03)
    make_store(tiny("bloom", torch.bfloat16), tmp_path / "a", "int8")
    make_store(other, tmp_path / "b", "int8")
    shutil.copy(tmp_path / "b" / "block-00001.safetensors", tmp_path / "a")
    with pytest.raises(StoreError, match=r"^block-00001\.safetensors: is not the file"):
        slowllm.load(tmp_path / "a")
