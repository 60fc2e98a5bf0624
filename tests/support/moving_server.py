"""A server that moves back and forth in the smallest budget that it accepts, as ``slowllm serve`` would in a process of its own.

``python -m tests.support.moving_server FOLDER`` prints, as JSON, the budget, the resident set each time that no blocks are
open, and each time that others are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from slowllm.malloc import keep_few_kernels, keep_together

SPANS = ((2, 4), (0, 2), (1, 3), (2, 4), (0, 2))


def main(folder: Path) -> dict[str, Any]:
    """Return what is printed."""
    import psutil

    from slowllm.errors import PlanError
    from slowllm.options import parse_bytes
    from tests.support.serving import serving

    def rss() -> int:
        return int(psutil.Process().memory_info().rss)

    options = {"backward": False}
    ram = ""
    try:
        with serving(folder, "0:2", ram="64MiB", **options):
            pass
    except PlanError as error:
        ram = str(error).partition("the smallest that would do is ")[2].partition(" ")[0]
    between, opened = list[int](), list[int]()
    with serving(folder, "0:2", ram=ram, **options) as server:
        open_span = server._open

        def look_and_open(part: Any) -> None:
            between.append(rss())
            open_span(part)

        server._open = look_and_open  # type: ignore[method-assign]
        for span in SPANS:
            assert server.move(*span) == "moved"
            opened.append(rss())
    return {"ram": parse_bytes(ram), "between": between, "opened": opened}


if __name__ == "__main__":
    keep_together()  # as the command line does, before other threads have a heap
    keep_few_kernels()
    print(json.dumps(main(Path(sys.argv[1]))))
