"""e4m3 numbers in 7 bits and escapes: every byte comes out again, on the processor and by torch's operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slowllm.rounding import ceil_div
from slowllm.storage.codecs import torch_kernels
from slowllm.storage.codecs.base import OneThread, Parts, Team
from slowllm.storage.codecs.fp8 import Fp8
from slowllm.storage.codecs.fp8_packed import FP8_PACKED, pack, starts_of, unpack
from slowllm.storage.codecs.layout_constants import CHUNK
from slowllm.storage.codecs.rounded import Fp8Rounded
from tests.support.native_checkpoints import fp8_of
from tests.support.properties import num_examples


def packed(codes: torch.Tensor) -> dict[str, torch.Tensor]:
    arrays = pack(codes.reshape(-1))
    return {"starts": starts_of(arrays.pop("counts")), **arrays}


@num_examples(30)
@given(data=st.data())
def test_every_byte_comes_out_again(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, 63, 64, 65, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 700]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    codes = torch.full((count,), data.draw(st.integers(0, 255)), dtype=torch.uint8)
    others = torch.rand(count, generator=generator) < data.draw(st.sampled_from([0, 1e-4, 0.01, 0.5, 1]))
    codes = torch.where(
        others, torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8), codes
    )
    arrays = packed(codes)
    assert torch.equal(unpack(arrays, 0, ceil_div(count, CHUNK), OneThread())[:count], codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("number", [0, 1])
def test_rows_have_the_bits_of_the_unpacked_codec(number: int, dtype: torch.dtype) -> None:
    rows, width, group = 300, 520, (128, 128)
    weight = torch.distributions.StudentT(4.0).sample((rows, width))
    codes, scales = fp8_of(weight, group, torch.bfloat16)
    bits = codes.view(torch.uint8)
    plain = Parts({"scales": scales, "codes": bits}, rows, width, group)
    ours = Parts({"scales": scales, **packed(bits)}, rows, width, group)
    shapes = {name: (str(names[array.dtype]), tuple(array.shape)) for name, array in ours.arrays.items()}
    assert FP8_PACKED[number].has_parts(shapes, rows, width, group)
    assert not FP8_PACKED[number].has_parts(shapes, rows, width + 1, group)
    assert not FP8_PACKED[number].has_parts(shapes, rows, width, (64, 128))
    team = Team(2)
    for first, last in ((0, rows), (17, 290), (128, 129), (5, 5)):
        wanted, found, other = (torch.empty(last - first, width, dtype=dtype) for _ in range(3))
        (Fp8(), Fp8Rounded())[number].decode(plain, wanted, first, last, team)
        FP8_PACKED[number].decode(ours, found, first, last, team)
        assert torch.equal(found, wanted)
        if first < last:
            torch_kernels.decode(FP8_PACKED[number].name, ours, other, first, last)
            assert torch.equal(other, wanted)
    team.close()


names = {
    torch.uint8: "U8", torch.int16: "I16", torch.int64: "I64", torch.bfloat16: "BF16", torch.float32: "F32",
}  # fmt: skip


@pytest.mark.parametrize(("name", "least"), [("normal", 0.09), ("heavy tails", 0.07)])
def test_scaled_weights_take_fewer_bytes(name: str, least: float) -> None:
    """What docs/stores.md says of the gain."""
    torch.manual_seed(0)
    draw = (
        torch.distributions.StudentT(4.0) if name == "heavy tails" else torch.distributions.Normal(0.0, 1.0)
    )
    codes, _ = fp8_of(draw.sample((512, 1024)), (128, 128), torch.float32)
    num_bytes = sum(array.nbytes for array in packed(codes.view(torch.uint8)).values())
    assert least < 1 - num_bytes / codes.numel() < least + 0.02


def test_damaged_escapes_write_nowhere_else() -> None:
    codes = torch.randint(0, 256, (CHUNK + 900,), dtype=torch.uint8)
    arrays = packed(codes)
    arrays["starts"] = torch.tensor([-5, 1 << 40, -(1 << 40)])
    arrays["escapes"] = torch.full_like(arrays["escapes"], -1)
    arrays["bases"] = torch.full_like(arrays["bases"], 255)
    assert len(unpack(arrays, 0, 2, OneThread())) == 2 * CHUNK
