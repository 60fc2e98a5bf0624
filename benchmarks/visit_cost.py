"""What the carousel costs where there is nothing to read: decoding by a model that lies in memory, against transformers.

    python -m benchmarks.visit_cost --blocks 24 --width 1024 --heads 16 --dtype float32

A BLOOM of random weights decodes token by token with a cache: by plain transformers, which is the limit, through slowllm
as a plain call (a guest), as a rider, and as several riders that share the sweeps. All are in one process and in turn, and
of many rounds the fastest counts, so that other work on the machine disturbs the ratios little. Before a speed is
reported, the logits of all sides must have equal bits. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, DynamicCache

import slowllm
from benchmarks.report import add_report_option, finish

NUM_TOGETHER = 4


def make_model(folder: Path, blocks: int, width: int, heads: int, vocab: int, dtype: torch.dtype) -> None:
    """Write a BLOOM of random weights, stored in the dtype that it is computed in."""
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=width, n_layer=blocks, n_head=heads, vocab_size=vocab)
    BloomForCausalLM(config).to(dtype).save_pretrained(folder)


def decode(model: Any, ids: Tensor, num_tokens: int) -> tuple[float, Tensor]:
    """Continue a prompt (1, T) token by token; return the processor's wall seconds of a token, and the last logits (V,)."""
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        output = model(ids, past_key_values=cache)
        started = time.perf_counter()
        for _ in range(num_tokens):
            output = model(output.logits[:, -1:].argmax(-1), past_key_values=cache)
        return (time.perf_counter() - started) / num_tokens, output.logits[0, -1]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Decode by all sides in turn and return the report."""
    dtype = getattr(torch, arguments.dtype)
    ids = torch.arange(5, 5 + arguments.prompt_tokens)[None] % arguments.vocab
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    best: dict[str, float] = {}
    with slowllm.load(folder, dtype=arguments.dtype, ram=arguments.ram) as lm:
        if lm.plan.ring_bytes:
            sys.exit("not measured: the model does not lie in memory; allow more --ram")

        def ours() -> tuple[float, Tensor]:
            return decode(lm.model, ids, arguments.tokens)

        def together() -> tuple[float, Tensor]:
            found = lm.ride([ours] * NUM_TOGETHER)  # each waits while the others compute
            return max(seconds for seconds, _ in found) / NUM_TOGETHER, found[-1][1]

        sides: dict[str, Callable[[], tuple[float, Tensor]]] = {
            "plain": lambda: decode(plain, ids, arguments.tokens),
            "guest": ours,
            "rider": lambda: lm.ride([ours])[0],
            "together": together,
        }
        wanted = sides["plain"]()[1]
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                seconds, logits = side()
                if not torch.equal(logits, wanted):
                    sys.exit(f"not verified: the logits of {name} are not those of plain transformers")
                best[name] = min(seconds, best.get(name, seconds))
        num_stops = lm.num_stops
    return {
        "verified": True, "blocks": arguments.blocks, "width": arguments.width, "dtype": arguments.dtype,
        "num_threads": torch.get_num_threads(), "rounds": arguments.rounds, "stops": num_stops,
        **{f"{name}_token_ms": 1e3 * seconds for name, seconds in best.items()},
        **{f"{name}_visit_us": 1e6 * (best[name] - best["plain"]) / num_stops for name in best if name != "plain"},
        **{f"{name}_speed": best["plain"] / best[name] for name in best if name != "plain"},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Make the model, measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16, help="tokens that are decoded in a round")
    parser.add_argument("--rounds", type=int, default=10, help="of which the fastest counts")
    parser.add_argument("--ram", default="auto", help="slowllm's budget, large enough for the whole model")
    add_report_option(parser)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(
            folder, arguments.blocks, arguments.width, arguments.heads, arguments.vocab,
            getattr(torch, arguments.dtype),
        )  # fmt: skip
        report = measure(arguments, folder)
    print(f"plain transformers: {report['plain_token_ms']:.2f} ms a token, the limit")
    for side in ("guest", "rider", "together"):
        print(
            f"{side}: {report[f'{side}_token_ms']:.2f} ms a token, {report[f'{side}_speed']:.2f} of the limit; "
            f"a visit costs {report[f'{side}_visit_us']:.0f} us"
        )
    finish("visit_cost", report, arguments.report)


if __name__ == "__main__":
    main()
