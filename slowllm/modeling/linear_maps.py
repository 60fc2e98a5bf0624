"""Which parameters of blocks are the matrices that quantised formats store otherwise: linear maps and experts, but no routers.

Knows transformers' models by their parts; reads no weight.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def linear_maps(
    model: PreTrainedModel, blocks_name: str, blocks: nn.ModuleList
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the names and parameters of the linear maps of blocks and of fused experts.

    Args:
        model: a skeleton.
        blocks_name: of the list of its blocks.
        blocks: the list.
    """
    config = model.config.get_text_config()
    counts = {
        getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")
    }
    for number, block in enumerate(blocks):
        for name, module in block.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                is_linear = isinstance(module, nn.Linear | Conv1D) and parameter.dim() == 2
                is_router = is_linear and parameter.shape[0] in counts
                if (is_linear and not is_router) or parameter.dim() == 3:
                    yield ".".join(filter(None, (blocks_name, str(number), name, key))), parameter
