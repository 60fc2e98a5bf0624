"""Which bytes are read to their place, and which through another buffer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from slowllm.modeling.expert_units import cut_experts
from slowllm.storage.codecs.registry import CODECS
from slowllm.storage.spans import CodedArray, CodedRows, Coding, Placement, Run, Span
from slowllm.streaming.read_requests import PAGE, lead_of, requests_of

NUM_EXPERTS, ROWS, WIDTH = 3, 256, 7168
# Bytes of the codes and of the scales of one matrix.
CODES, SCALES = ROWS * WIDTH, 4 * (ROWS // 128) * (WIDTH // 128)


def bounced(placement: Placement) -> int:
    """Return how many of a tensor's bytes go through another buffer; check that each arrives once."""
    arrived = torch.zeros(placement.num_bytes, dtype=torch.uint8)
    through = 0
    for request in requests_of(placement, 1 << 20):
        first, skipped = request.at - lead_of(placement), 0
        if not request.bounce and first < 0:  # bytes before the tensor, on its first page
            first, skipped = 0, -first
        arrived[first : first + request.needed - skipped] += 1
        through += request.needed if request.bounce else 0
    assert bool((arrived == 1).all())
    return through


@pytest.mark.parametrize("at", [0, 96, 4000, 8192 + 1000])
def test_codes_are_read_to_their_place_wherever_they_begin(at: int) -> None:
    """The scales come first in memory, and the codes are what matters."""
    path = Path("model.safetensors")
    scales = Span("w_scale_inv", path, "F32", (ROWS // 128, WIDTH // 128), at, SCALES)
    codes = Span("w", path, "F8_E4M3", (ROWS, WIDTH), at + SCALES + 12, CODES)
    parts = (
        CodedArray("scales", "F32", scales.shape, 0),
        CodedArray("codes", "U8", (ROWS, WIDTH), SCALES),
    )
    runs = (Run(scales, 0, 0, SCALES), Run(codes, 0, SCALES, CODES))
    placement = Placement("w", (ROWS, WIDTH), torch.bfloat16, runs, Coding("fp8", parts, (128, 128)))
    assert lead_of(placement) % placement.unit == 0
    assert bounced(placement) <= SCALES + 2 * PAGE


def fused(is_side_by_side: bool) -> Placement:
    """Return the two matrices of some experts as one parameter, each after its scales or all scales before all codes."""
    path, at = Path("model.safetensors"), 1000
    sizes = {"codes": CODES, "scales": SCALES}
    names = [(expert, half, part) for expert in range(NUM_EXPERTS) for half in range(2) for part in sizes]
    if not is_side_by_side:
        names.sort(key=lambda name: name[2] != "scales")
    spans = {}
    for expert, half, part in names:
        shape = (ROWS, WIDTH) if part == "codes" else (ROWS // 128, WIDTH // 128)
        dtype = "F8_E4M3" if part == "codes" else "F32"
        spans[expert, half, part] = Span(f"{expert}.{half}.{part}", path, dtype, shape, at, sizes[part])
        at += sizes[part]
    # In the parameter all scales come first, so that each begins at a multiple of four.
    runs, rows, offsets, target = list[Run](), list[CodedRows](), dict[tuple[int, int, str], int](), 0
    for part in ("scales", "codes"):
        for expert in range(NUM_EXPERTS):
            for half in range(2):
                offsets[expert, half, part] = target
                runs.append(Run(spans[expert, half, part], 0, target, sizes[part]))
                target += sizes[part]
    for expert in range(NUM_EXPERTS):
        for half in range(2):
            parts = (
                CodedArray("scales", "F32", (ROWS // 128, WIDTH // 128), offsets[expert, half, "scales"]),
                CodedArray("codes", "U8", (ROWS, WIDTH), offsets[expert, half, "codes"]),
            )
            rows.append(CodedRows((2 * expert + half) * ROWS, ROWS, Coding("fp8", parts, (128, 128))))
    coding = Coding("stacked", (), rows=tuple(rows))
    return Placement("experts", (NUM_EXPERTS, 2 * ROWS, WIDTH), torch.bfloat16, tuple(runs), coding)


@pytest.mark.parametrize("is_side_by_side", [True, False])
def test_the_parts_of_an_expert_lie_in_memory_as_on_disk(is_side_by_side: bool) -> None:
    whole = fused(is_side_by_side)
    for number, one in enumerate(cut_experts(whole)):
        assert bounced(one) <= 2 * SCALES + 4 * PAGE
        assert {run.span.name.split(".")[0] for run in one.runs} == {str(number)}
        assert one.coding is not None
        for rows in one.coding.rows:
            shapes = {array.name: (array.dtype, array.shape) for array in rows.coding.parts}
            assert CODECS["fp8"].has_parts(shapes, ROWS, WIDTH, (128, 128))
            for array in rows.coding.parts:
                begin, half = array.offset, rows.first // ROWS
                (run,) = [run for run in one.runs if run.target <= begin < run.target + run.num_bytes]
                assert (run.span.name, run.source + begin - run.target) == (
                    f"{number}.{half}.{array.name}",
                    0,
                )
                assert math.prod(array.shape) * (4 if array.dtype == "F32" else 1) == run.num_bytes
