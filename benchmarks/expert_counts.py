"""Count the different experts of a mixture that a text's tokens choose in each block.

    python -m benchmarks.expert_counts --checkpoint DIR --tokens 1,16,149,512

The model's own routers choose, in passes of slowllm over the checkpoint. Token ids are drawn by Zipf's law, as words of a text are.
Printed is a row for each number of tokens: experts in the mean of the blocks that have any, in the block with the fewest and that with
the most, and as a share of all. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slowllm

# Of the tokens' ranks, as in Mandelbrot's form of Zipf's law.
OFFSET = 2.7
# Below it are tokens of a special meaning.
FIRST_ID = 5


def zipf_ids(num_tokens: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Return token ids (num_tokens,) int64 whose frequencies fall with their ranks; ranks are no order of ids."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / (torch.arange(vocab_size - FIRST_ID) + OFFSET)
    ranks = torch.multinomial(weights, num_tokens, replacement=True, generator=generator)
    return FIRST_ID + torch.randperm(vocab_size - FIRST_ID, generator=generator)[ranks]


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the routers of a model by name: modules that have a number of experts and choose some of them."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "top_k") and hasattr(module, "num_experts") and not list(module.children())
    }


def count(lm: slowllm.StreamedLM, lengths: Sequence[int]) -> dict[int, dict[str, int]]:
    """Return the number of different experts for each number of tokens, by routers' names.

    Args:
        lm: an opened mixture.
        lengths: numbers of tokens of texts, each passed by itself.
    Raises:
        SystemExit: the model has no routers.
    """
    routers = routers_of(lm.model)
    if not routers:
        raise SystemExit("the model has no routers")
    vocab_size = lm.model.config.get_text_config().vocab_size
    return {length: _count_once(lm, routers, zipf_ids(length, vocab_size)) for length in lengths}


def _count_once(lm: slowllm.StreamedLM, routers: dict[str, nn.Module], ids: Tensor) -> dict[str, int]:
    counts: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def count_chosen(_module: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
            counts[name] = output[2].unique().numel()

        return count_chosen

    hooks = [module.register_forward_hook(note(name)) for name, module in routers.items()]
    with torch.no_grad():
        lm.model(ids[None], logits_to_keep=1, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(counts) == len(routers), "every router was asked"
    return counts


def table(found: dict[int, dict[str, int]], num_experts: int) -> str:
    """Return the counts as text, a row for each number of tokens."""
    lines = [f"{'tokens':>7} {'mean':>7} {'least':>6} {'most':>6} {'of ' + str(num_experts):>7}"]
    for length, counts in found.items():
        mean, least, most = statistics.mean(counts.values()), min(counts.values()), max(counts.values())
        lines.append(f"{length:>7} {mean:>7.1f} {least:>6} {most:>6} {mean / num_experts:>7.0%}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Count, and print a table and the JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a mixture of experts")
    parser.add_argument("--tokens", default="1,16,149,512", help="numbers of tokens, separated by commas")
    parser.add_argument("--ram", default="8GiB", help="slowllm's budget")
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", arguments.tokens):
        parser.error(f"--tokens {arguments.tokens} is no list of numbers such as 1,16,149")
    lengths = [int(length) for length in arguments.tokens.split(",")]
    with slowllm.load(arguments.checkpoint, ram=arguments.ram) as lm:
        found = count(lm, lengths)
        num_experts = max(int(router.num_experts) for router in routers_of(lm.model).values())
    print(table(found, num_experts))
    print(json.dumps({"num_experts": num_experts, "counts": found}))


if __name__ == "__main__":
    main()
