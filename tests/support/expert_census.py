"""Every architecture of transformers' causal language models that has experts, as a toy: who computes them, and to which bits.

    python -m tests.support.expert_census

prints the section of docs/families.md.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tests.support.same_rounding  # noqa: F401  (before torch)

# isort: split
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slowllm.modeling.experts import expert_modules
from tests.support.census import ARCHITECTURES, IDS, NO_TOYS, NotShrinkableError, make_toy
from tests.support.paths import ROOT

TABLE = ROOT / "docs" / "families.md"
HEADING = "Experts: one at a time, or as the family has them"
# With two experts a token the order in which their outputs are added does not show.
PER_TOKEN = 3
PER_TOKEN_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
# How experts are computed that transformers' interface does not reach.
OTHERWISE = {
    "dbrx": "a loop over the chosen experts; the matrices of all lie in one of two dimensions",
    "doge": "embeddings of single columns, picked for each token",
    "jetmoe": "a loop over all experts, one product each, in the feed-forward and in the attention",
    "llama4": "one batched product of every token with every expert; inputs of experts not chosen are zero",
    "llama4_text": "one batched product of every token with every expert; inputs of experts not chosen are zero",
    "longcat_flash": "a loop over the chosen experts, some of which return their input",
}
INTERFACE = "interface"
CLASS_OF_EXPERTS = re.compile(r"Experts?(GLU)?$|MoE$|Moe$")


@dataclass(frozen=True)
class ExpertKind:
    """A row of the table.

    Attributes:
        classes: of the modules that hold experts.
        way: `INTERFACE`, or how the experts are computed.
    """

    classes: str
    way: str


def with_experts(config: PreTrainedConfig) -> None:
    """Change a toy's config such that it has experts, if it can, of which each token chooses three."""
    text = config.get_text_config()
    if getattr(text, "enable_moe_block", None) is False:
        text.enable_moe_block, text.num_experts, text.top_k_experts, text.moe_intermediate_size = (
            True,
            8,
            3,
            32,
        )
    for name in PER_TOKEN_NAMES:
        value = getattr(text, name, None)
        if isinstance(value, list):
            setattr(text, name, [PER_TOKEN for _ in value])
        elif value is not None:
            setattr(text, name, PER_TOKEN)


def expert_toy(architecture: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a random toy with experts, frozen, as streamed weights are.

    Weights that the class keeps in fp32 stay in fp32.
    """
    model = make_toy(architecture, with_experts)
    strict = "|".join(model._keep_in_fp32_modules_strict or ()) or "$^"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("tid2eid"):  # a table of experts by token, zeros in a new model
            tensor.random_(8, generator=torch.Generator().manual_seed(3))
        elif tensor.is_floating_point() and not re.search(strict, name):
            tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(False)


def kind_of(architecture: str, model: nn.Module) -> ExpertKind | None:
    """Return what a model says of its experts; None if it has none."""
    decorated = {type(module).__name__ for module in expert_modules(model).values()}
    named = {type(module).__name__ for module in model.modules()}
    found = decorated or {name for name in named if CLASS_OF_EXPERTS.search(name)}
    if not found:
        return None
    return ExpertKind(", ".join(sorted(found)), INTERFACE if decorated else OTHERWISE[architecture])


def introspect() -> dict[str, ExpertKind]:
    """Return the architectures that have experts, found in the modules of their toys."""
    found = {}
    for name in ARCHITECTURES:
        if name in NO_TOYS:
            continue
        try:
            with torch.device("meta"):
                kind = kind_of(name, make_toy(name, with_experts))
        except NotShrinkableError:
            continue
        if kind is not None:
            found[name] = kind
    return found


def expert_rows(text: str) -> dict[str, ExpertKind]:
    """Return the rows of the section in a page."""
    section = next(part for part in text.split("\n## ") if part.startswith(HEADING))
    return {
        name: ExpertKind(classes, way)
        for name, classes, way in re.findall(r"^\| ([\w-]+) \| ([\w, ]+) \| (.+) \|$", section, re.MULTILINE)
        if name != "architecture"
    }


def section(kinds: dict[str, ExpertKind]) -> str:
    """Return the section of docs/families.md."""
    reached = sum(kind.way == INTERFACE for kind in kinds.values())
    head = INTRODUCTION.format(heading=HEADING, number=len(kinds), reached=reached)
    rows = [f"| {name} | {kind.classes} | {kind.way} |\n" for name, kind in sorted(kinds.items())]
    return head + "".join(rows)


INTRODUCTION = """## {heading}

Of {number} architectures with experts, transformers lets one choose for {reached} how these are computed (`interface`).
For each of these, slowllm's own way of computing one chosen expert after the other (`compute_one_by_one`) has the bits
of the family's own loop (`eager`) in fp32 and in bf16: logits, gradients with respect to the embeddings, and greedy
tokens. All models are opened with it ([experts](experts.md)). The rows are written by `python -m tests.support.expert_census`.

| architecture | classes | how its experts are computed |
| --- | --- | --- |
"""


def computed(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's logits, their gradient with respect to the embeddings, and 4 greedy tokens, each with a name."""
    leaves: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    logits = model(IDS, use_cache=False).logits
    hook.remove()
    # Rows that differ, or a mistake in who gets which gradient might cancel out.
    factor = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    (gradient,) = torch.autograd.grad((logits.float() * factor).sum(), leaves[:1])
    yield "logits", logits.detach()
    yield "gradient", gradient
    with torch.no_grad():
        yield (
            "tokens",
            model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None),
        )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    print(section(introspect()), end="")
