"""A parent that pays the imports once, and forks children that score a file until they are killed.

    python -m tests.support.killed MODEL FILE FOLDER NUM_KILLS SEED

Each child runs the command line with --state and tells every stop that it has passed through a pipe; the parent
kills it after a random number of them, and starts the next one, which must go on. The last child is left to end.
Prints one JSON document: how many stops were passed in each life, and how each ended.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from slowllm.entrypoints.cli import app
from slowllm.planning import host_plan
from slowllm.runtime import streamed_lm


def live(arguments: list[str], told: int) -> None:
    """Run the command line; write a byte for every stop."""
    report = streamed_lm._report_passage

    def tell_parent(handle: Any, passage: Any) -> None:
        report(handle, passage)
        os.write(told, bytes([passage.stop]))

    streamed_lm._report_passage = tell_parent
    # Several riders a sweep and several sweeps, of few tokens.
    host_plan.MAX_RIDER_TOKENS, host_plan.MAX_SWEEP_TOKENS = 64, 192
    sys.argv = ["slowllm", *arguments]
    app.run()


def main() -> None:
    """Kill and start again."""
    checkpoint, file, folder, num_kills, seed = sys.argv[1:]
    generator = random.Random(int(seed))
    out = Path(folder) / "out.jsonl"
    arguments = [
        "forward", file, "--model", checkpoint, "--dtype", "fp32", "--ram", "2GiB", "--stream-all", "--out", str(out),
        "--state", str(Path(folder) / "state"), "--save-every", "0",
    ]  # fmt: skip
    lives, codes = [], []
    for number in range(int(num_kills) + 1):
        reading, told = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            code = 70
            try:
                live(arguments, told)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(told)
        until = generator.randint(1, 6) if number < int(num_kills) else 1 << 30
        stops = b""
        while len(stops) < until and (more := os.read(reading, 1)):
            stops += more
        if len(stops) == until:
            os.kill(child, signal.SIGKILL)
        while more := os.read(reading, 4096):
            stops += more
        _, status = os.waitpid(child, 0)
        os.close(reading)
        lives.append(list(stops))
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1] != -signal.SIGKILL:
            break
    print(json.dumps({"lives": lives, "codes": codes}))


if __name__ == "__main__":
    main()
