"""For which attention has torch no fused kernel on a processor, so that all scores of a sequence are written to memory?

`scaled_dot_product_attention` falls back to plain products where keys and values have heads of different sizes (DeepSeek's latent
attention: 192 and 128), or different numbers of heads (Falcon-7B). 128 heads of 2,000 tokens then take 5 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


class UnfusedAttention(TorchFunctionMode):
    """Watches calls of `scaled_dot_product_attention`, on tensors of any device, as a context.

    Attributes:
        num_heads: of the call with the most heads that no fused kernel takes; 0 if all are fused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Pass a call on, and note whether it is attention without a fused kernel."""
        del types
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            if query.dim() == 4 and query.shape[1] > self.num_heads and not _is_fused(args, kwargs):
                self.num_heads = int(query.shape[1])
        return func(*args, **kwargs)


def _is_fused(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether torch has a fused kernel for a call whose tensors lie in the processor's memory as these do elsewhere."""

    def here(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")

    args, kwargs = tree_map_only(Tensor, here, (args, dict(kwargs)))
    with torch.no_grad():
        return bool(torch._fused_sdp_choice(*args, **kwargs))
