"""Memory that libraries hold is bounded: oneDNN's kernels, and holes in glibc's heap."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from slowllm.malloc import MOST_KERNELS, free_heap_bytes

# Products in bfloat16 with as many numbers of rows as experts have; prints by how much the process has grown, in bytes.
_PRODUCTS = """
import psutil, torch
from slowllm.malloc import keep_few_kernels, keep_together
keep_together()
keep_few_kernels()
weight, rows = torch.ones(256, 256, dtype=torch.bfloat16), torch.ones(300, 256, dtype=torch.bfloat16)
torch.nn.functional.linear(rows, weight)
before = psutil.Process().memory_info().rss
for count in range(1, 300):
    torch.nn.functional.linear(rows[:count], weight)
print(psutil.Process().memory_info().rss - before)
"""
# Holes that small pieces keep open, as whatever outlives a micro-batch does; prints what is held before and after.
_HOLES = """
import psutil
from slowllm.malloc import keep_together
keep_together()
import torch
from slowllm.planning.budget import Budget
from slowllm.runtime.heap_watch import HeapWatch
rss = lambda: psutil.Process().memory_info().rss
budget = Budget(1 << 40, rss() + (200 << 20))
watch = HeapWatch(budget)
held = []
for _ in range(12):
    large, small = torch.ones(8 << 20), torch.ones(1 << 10)
    held.append((large, small))
watch.look()
in_use, num_early = rss(), watch.num_given_back
held = [small for _, small in held]
del large
watch._next_look = 0.0
watch.look()
print(in_use, rss(), num_early, watch.num_given_back, held[3].sum().item())
"""


def run(program: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program], env=kept | environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_products_of_many_shapes_keep_few_kernels() -> None:
    # 299 kernels took 300 MB and more here, where the processor multiplies in bfloat16; elsewhere there are none.
    assert int(run(_PRODUCTS)) < MOST_KERNELS * (6 << 20)


def test_what_the_environment_says_of_kernels_stays() -> None:
    program = (
        "from slowllm.malloc import keep_few_kernels; import os; keep_few_kernels(); "
        "print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'], os.environ['LRU_CACHE_CAPACITY'])"
    )
    assert run(program).split() == [str(MOST_KERNELS), "1"]
    assert run(program, ONEDNN_PRIMITIVE_CACHE_CAPACITY="7").split() == ["7", "1"]


@pytest.mark.skipif(free_heap_bytes() == 0, reason="this C library does not say what is free in its heap")
def test_holes_in_the_heap_are_given_back_where_more_is_held_than_planned() -> None:
    in_use, afterwards, num_early, num_given_back, kept = run(_HOLES).split()
    assert (int(num_early), int(num_given_back), float(kept)) == (0, 1, 1024.0)
    assert int(in_use) - int(afterwards) > 300 << 20
