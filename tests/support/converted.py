"""A parent that pays the imports once, and forks children that convert: shares at once, or one that is killed.

    python -m tests.support.converted ranks OUT WORLD_SIZE
    python -m tests.support.converted killed OUT NUM_KILLS SEED [SOURCE]

Prints one JSON document: how each child ended, and how many files were finished when it did.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba  # noqa: F401 (paid once)
from torch import Tensor

from slowllm.prepare import encode
from slowllm.prepare.convert import convert
from tests.support.paths import TINY_BLOOM


def fork(job: Callable[[], object]) -> int:
    """Run a job in a child; nothing that has threads may have run here before."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        job()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def slowly(source: Path, out: Path) -> None:
    """Convert so slowly that a kill comes in the middle of a file."""
    append = encode._Array.append

    def late(own: Any, tensor: Tensor) -> None:
        time.sleep(0.002)
        append(own, tensor)

    encode._Array.append = late  # type: ignore[method-assign]
    convert(source, out, store="lossless", workers=1)


def main() -> None:
    """Fork, wait, and tell."""
    what, out, *numbers = sys.argv[1:]
    codes, finished = [], []

    def wait(child: int) -> None:
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        finished.append(len(list(Path(out).glob("*.safetensors.json"))))

    if what == "ranks":
        size = int(numbers[0])
        shares = [
            fork(
                lambda rank=rank: convert(
                    TINY_BLOOM, out, store="int4", workers=1, rank=rank, world_size=size
                )
            )
            for rank in range(size)
        ]
        for child in shares:
            wait(child)
    else:
        generator = random.Random(int(numbers[1]))
        for _ in range(int(numbers[0])):
            before = finished[-1] if finished else 0
            child = fork(lambda: slowly(Path(numbers[2]) if numbers[2:] else TINY_BLOOM, Path(out)))
            # Until it has finished a file more, and then a moment, so that it is in the middle of the next.
            while (
                len(list(Path(out).glob("*.safetensors.json"))) == before
                and not os.waitpid(child, os.WNOHANG)[0]
            ):
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            wait(child)
    print(json.dumps({"codes": codes, "finished": finished}))


if __name__ == "__main__":
    main()
