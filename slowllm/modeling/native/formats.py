"""Find the tensors that a checkpoint stores in its maker's format, by what config.json says of it.

Nothing is written or converted: a tensor in such a format is decoded when it is used, as one of a store is. Quantised
activations, which some formats imply on GPUs, are not imitated: they stay in the compute dtype.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from slowllm.errors import CheckpointError
from slowllm.modeling.native import bnb, compressed, fbgemm, fp8, gguf, modelopt, mxfp4, packed
from slowllm.modeling.native.coded_tensor import CodedTensor
from slowllm.modeling.native.companions import whole_ones
from slowllm.storage.spans import Span


@dataclass(frozen=True)
class NativeTensors:
    """The tensors of a checkpoint.

    Attributes:
        plain: by name, those that are stored as they are.
        coded: by name, those that are stored in a maker's format.
        orders: by name, of those plain ones whose elements lie in another order than the model's, as `Coding.group` has it.
    """

    plain: Mapping[str, Span]
    coded: Mapping[str, CodedTensor]
    orders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


# Given the settings and the spans: the coded tensors, and the names of all spans that belong to them or to nothing.
_Finder = Callable[[Mapping[str, Any], Mapping[str, Span]], tuple[list[CodedTensor], set[str]]]
_FINDERS: Mapping[str, _Finder] = {
    "compressed-tensors": compressed.find,
    "fp8": fp8.find,
    "modelopt": modelopt.find,
    "mxfp4": mxfp4.find,
    "fbgemm_fp8": fbgemm.find,
    "gptq": packed.find_gptq,
    "awq": packed.find_awq,
    "bitsandbytes": bnb.find,
}
# A longer name of a format is cut short in messages.
_LONGEST_NAME = 40


def refuse_unknown(where: str, settings: object) -> None:
    """Refuse a quantised format that is not read.

    Args:
        where: the file that names it.
        settings: what its quantization_config says.
    Raises:
        CheckpointError: it is.
    """
    method = settings.get("quant_method", "?") if isinstance(settings, Mapping) else settings
    if not isinstance(settings, Mapping) or not isinstance(method, str) or method not in _FINDERS:
        said = method if isinstance(method, str) and len(method) <= _LONGEST_NAME else reprlib.repr(method)
        raise CheckpointError(
            f"{where}: is already quantised ({said}), which is not read; there are {', '.join(sorted(_FINDERS))}; "
            "or use the original checkpoint in bfloat16 or float16"
        )


def settings_of(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """Return what a checkpoint says of its quantised format; None where it has none."""
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings:
            table = settings if isinstance(settings, Mapping) else settings.to_dict()
            return dict(table)
    return None


def format_name(config: PreTrainedConfig) -> str | None:
    """Return the name of a checkpoint's quantised format; None where it has none."""
    settings = settings_of(config)
    return None if settings is None else str(settings.get("quant_method"))


def find_native(config: PreTrainedConfig, spans: Mapping[str, Span]) -> NativeTensors:
    """Return the tensors of a checkpoint, those that are stored as several as one.

    Args:
        config: of the checkpoint.
        spans: by name on disk.
    Raises:
        CheckpointError: an array is missing, or does not go with its tensor.
    """
    settings = settings_of(config)
    if any(span.in_store for span in spans.values()):  # which has made them parameters already
        return NativeTensors(spans, {})
    if settings is None:
        _refuse_leftovers(spans.values())
        return NativeTensors(spans, {})
    if settings.get("quant_method") == "gguf":
        found, plain_ones, orders = gguf.find(settings, spans)
        return NativeTensors(plain_ones, {tensor.name: tensor for tensor in found}, orders)
    coded, used = _FINDERS[str(settings.get("quant_method"))](settings, spans)
    plain = {name: span for name, span in spans.items() if name not in used}
    _refuse_leftovers(plain.values())
    by_name = {tensor.name: tensor for tensor in coded}
    if both := sorted(by_name.keys() & plain.keys()):
        raise CheckpointError(
            f"{plain[both[0]].path.name}: {both[0]} stands in the checkpoint twice, quantised and plain"
        )
    return NativeTensors(plain, by_name)


def refuse_lying(config: PreTrainedConfig, spans: Iterable[Span]) -> None:
    """Refuse a config that names a quantised format, where no tensor is stored in it and they are not those of a store.

    Raises:
        CheckpointError: it does.
    """
    spans = list(spans)
    if (name := format_name(config)) is not None and not any(span.in_store for span in spans):
        file = next((span.path.name for span in spans), "the checkpoint")
        raise CheckpointError(
            f"{file}: config.json says that weights are quantised ({name}), but none is; config.json and the weights do not belong "
            "together"
        )


def native_codecs(
    config: PreTrainedConfig, spans: Mapping[str, Span], absent: Iterable[str] = ()
) -> set[str]:
    """Return the names of the codecs that a checkpoint in its maker's format needs.

    Args:
        config: of the checkpoint.
        spans: of the shards that are there, by name on disk.
        absent: names of arrays whose shards are not there.
    """
    if settings_of(config) is None:
        return set()
    spans = whole_ones(spans, absent)
    return {tensor.codec for tensor in find_native(config, spans).coded.values()}


def _refuse_leftovers(spans: Iterable[Span]) -> None:
    """Refuse numbers of 8 bits that are to be computed with as they are: their scales are missing."""
    for span in spans:
        if span.dtype.startswith(("F8_", "F4", "F6_")):
            raise CheckpointError(
                f"{span.path.name}: {span.name} is stored as {span.dtype}, and the checkpoint has no scales for it; fetch "
                "config.json and all shards again, or use a checkpoint in bfloat16"
            )
