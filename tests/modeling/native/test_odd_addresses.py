"""Arrays of a quantised checkpoint may lie at any address of a file, as writers that do not sort them leave them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import slowllm
from tests.support.bnb_checkpoints import BnbLayer
from tests.support.families import save_tiny
from tests.support.packed_checkpoints import PackedLayer, packed_pair

IDS = torch.arange(5, 25)[None]
DTYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8", torch.int32: "I32",
}  # fmt: skip


def write_at_odd_addresses(path: Path) -> None:
    """Write a shard again, behind three bytes that belong to nothing, the narrowest arrays first."""
    tensors = {f"three of {path.stem}": torch.zeros(3, dtype=torch.uint8)}
    tensors |= dict(sorted(load_file(path).items(), key=lambda item: item[1].element_size()))
    header, body = {}, b""
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        shape, dtype = list(tensor.shape), DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("layer", [BnbLayer(), PackedLayer(is_ordered=True)], ids=["nf4", "gptq"])
@pytest.mark.parametrize("name", ["llama-2", pytest.param("mixtral", marks=pytest.mark.long)])
def test_logits_do_not_depend_on_addresses(name: str, layer: BnbLayer | PackedLayer, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / "plain", torch.bfloat16)
    folder, _ = packed_pair(tmp_path, layer, layer.settings)
    with slowllm.load(folder) as lm, torch.no_grad():
        wanted = lm.model(IDS).logits
    for path in folder.glob("*.safetensors"):
        write_at_odd_addresses(path)
    for resident in (True, False):
        with slowllm.load(folder, resident=resident) as lm, torch.no_grad():
            assert torch.equal(lm.model(IDS).logits, wanted)
