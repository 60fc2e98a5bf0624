"""A parent that pays the imports once, and forks children that run one command until they are killed.

    python -m tests.support.killed MOMENT NUM_KILLS SEED COMMAND...

Each child runs the command line and tells every stop that it has passed through a pipe. With the MOMENT `stops`, the
parent kills it after a random number of them; with `writes`, the child dies in the middle of writing its state. Then
the parent starts the next one, which must go on. The last child is left to end. Prints one JSON document: how many
stops were passed in each life, and how each ended.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
from typing import Any

from slowllm.entrypoints.cli import app
from slowllm.planning import host_plan
from slowllm.runtime import state, streamed_lm

# The most stops that a child passes before it is killed. That is enough where riders are saved at every stop; work of
# which only finished micro-batches are kept needs a longer life now and then.
MOST_STOPS, MOST_STOPS_OF_LONG_LIVES, LONG_LIVES = 6, 40, 4


def live(arguments: list[str], told: int, dies_at_write: int) -> None:
    """Run the command line; write a byte for every stop."""
    report = streamed_lm._report_passage

    def tell_parent(handle: Any, passage: Any) -> None:
        report(handle, passage)
        os.write(told, bytes([passage.stop]))

    streamed_lm._report_passage = tell_parent
    # Several riders a sweep and several sweeps, of few tokens; and riders that are saved at every stop.
    host_plan.MAX_RIDER_TOKENS, host_plan.MAX_SWEEP_TOKENS = 64, 192
    state.SAVE_SECONDS = 0.0
    if dies_at_write:
        die_at_write(dies_at_write)
    sys.argv = ["slowllm", *arguments]
    app.run()


def die_at_write(number: int) -> None:
    """Kill this process at its write of that number to the state: half of a result, or a file without its name."""
    write, rename, num_writes = os.write, os.replace, 0

    def is_last() -> bool:
        nonlocal num_writes
        num_writes += 1
        return num_writes == number

    def write_half(file: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{file}").endswith("results.jsonl") and is_last():
            write(file, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data)

    def leave_unnamed(source: Any, target: Any) -> None:
        if is_last():
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.write, os.replace = write_half, leave_unnamed


def main() -> None:
    """Kill and start again."""
    moment, num_kills, seed, *arguments = sys.argv[1:]
    if arguments[0] == "eval":
        importlib.import_module("datasets")
    generator = random.Random(int(seed))
    lives, codes = [], []
    for number in range(int(num_kills) + 1):
        is_killed = number < int(num_kills)
        dies_at_write = generator.randint(1, 4) if is_killed and moment == "writes" else 0
        reading, told = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            code = 70
            try:
                live(arguments, told, dies_at_write)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(told)
        is_long = arguments[0] != "forward" and number % LONG_LIVES == 0
        most = MOST_STOPS_OF_LONG_LIVES if is_long else MOST_STOPS
        until = generator.randint(1, most) if is_killed and moment == "stops" else 1 << 30
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
