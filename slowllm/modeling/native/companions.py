"""Which weight does an array of a quantised checkpoint belong to, by its name alone?

An index tells of names only; the finders of formats, which see shapes as well, check what was fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from slowllm.storage.spans import Span

# Behind the name of a module: what formats store instead of a weight, or beside it.
_OF_MODULE = re.compile(
    r"\.(weight[._].+|scale|qscale_weight|qscale_act|qweight|qzeros|scales|g_idx|SCB"
    r"|(input|output|activation)_(scale|scale_inv|scale_ub|zero_point|global_scale|g_idx))$"
)
# Behind the name of experts that are one parameter.
_OF_EXPERTS = re.compile(r"(experts\.\w+?)_(blocks|scales|scale_inv|scale)$")


def weight_of(name: str) -> str:
    """Return the name that the weight would have if it were plain; the name itself of an array that is none's companion."""
    found = _OF_EXPERTS.sub(r"\1", name)
    return _OF_MODULE.sub(".weight", name) if found == name else found


def whole_ones(spans: Mapping[str, Span], absent: Iterable[str]) -> dict[str, Span]:
    """Return the arrays of those weights none of whose arrays is absent: the rest of a weight is of no use.

    Args:
        spans: of the shards that are there, by name on disk.
        absent: names of arrays whose shards are not there.
    """
    broken = {weight_of(name) for name in absent}
    return {name: span for name, span in spans.items() if weight_of(name) not in broken}
