"""One message of the swarm: 8 bytes of length, big endian, and a safetensors blob whose metadata is one JSON text.

    length (8, big endian) | header length (8, little endian) | header | tensors

The length counts what comes after it. It is compared with a limit before anything is read or allocated. The header is
safetensors' own, so that any library reads a message; `__metadata__` has the one key ``slowllm`` with the JSON text
``{"protocol": 1, "meta": {...}, "compressed": {name: [how, dtype]}}``. What is not exactly so is a `ProtocolError`.

Tensors are views of the message's bytes, not copies: a blob read into place is the memory that the model computes on.
This is why the library does not read it (it copies each tensor); the tests hold that it would read all that is
accepted here, and find the same tensors.

Knows no peers and no requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slowllm.errors import InputError, ProtocolError
from slowllm.storage.spans import DTYPE_NAMES, TORCH_DTYPES
from slowllm.swarm.bounded_json import dump_json, load_json
from slowllm.swarm.compression import FLOATING, compress, restore

PROTOCOL = 1
PREFIX_BYTES = 8
# Names and shapes of tensors, and the meta in them; what is long belongs in a tensor.
MAX_HEADER_BYTES = 256 << 10
MAX_META_BYTES = 64 << 10
MAX_MESSAGE_BYTES = 256 << 20
MAX_TENSORS = 1024
MAX_DIMENSIONS = 8
MAX_NAME_LETTERS = 256
_METADATA_KEY = "slowllm"
_SCALES = "scales:"
_FIELDS = {"dtype", "shape", "data_offsets"}
_HIGHEST = 1 << 62

Meta = dict[str, Any]
Tensors = dict[str, Tensor]


def encode(
    meta: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    compression: Mapping[str, str] | None = None,
    max_bytes: int = MAX_MESSAGE_BYTES,
) -> list[bytes | memoryview]:
    """Return the parts of a message, to be written one after the other.

    Args:
        meta: what the message says; JSON types only, at most `MAX_META_BYTES`.
        tensors: by name, of any device. The parts are views of tensors that are contiguous on the host, which must not
            be changed before the parts are written.
        compression: how floating tensors are compressed, by their names, see `slowllm.swarm.compression`.
        max_bytes: the limit of the peer.
    Raises:
        InputError: a compression is unknown, or named for a tensor that is not there or not floating.
        ProtocolError: something cannot be sent; the message says what.
    """
    compressed: dict[str, list[str]] = {}
    sent = dict(tensors or {})
    for name, how in (compression or {}).items():
        if name not in sent:
            raise InputError(
                f"{name} is to be compressed but is none of the tensors {', '.join(sent) or '(none)'}"
            )
        short, scales = compress(name, sent[name].detach(), how)
        if how == "none":
            continue
        compressed[name] = [how, str(sent[name].dtype).removeprefix("torch.")]
        sent[name] = short
        if scales is not None:
            assert _SCALES + name not in sent, f"a tensor has the reserved name {_SCALES + name}"
            sent[_SCALES + name] = scales
    text = dump_json(
        {"protocol": PROTOCOL, "meta": meta, "compressed": compressed}, "the message's meta", MAX_META_BYTES
    )
    header: dict[str, Any] = {"__metadata__": {_METADATA_KEY: text.decode("ascii")}}
    parts: list[bytes | memoryview] = []
    offset = 0
    if len(sent) > MAX_TENSORS:
        raise ProtocolError(f"the message has {len(sent)} tensors, more than the {MAX_TENSORS} allowed")
    # The widest dtypes first, so that every tensor is aligned to its own.
    for name, tensor in sorted(sent.items(), key=lambda item: -item[1].element_size()):
        if tensor.dtype not in DTYPE_NAMES:
            raise ProtocolError(f"{name} has the dtype {tensor.dtype}, which a message cannot carry")
        if tensor.dim() > MAX_DIMENSIONS or not name or len(name) > MAX_NAME_LETTERS:
            raise ProtocolError(
                f"{name[:MAX_NAME_LETTERS]!r} of shape {list(tensor.shape)} has no name, a name of more than "
                f"{MAX_NAME_LETTERS} letters, or more than {MAX_DIMENSIONS} dimensions"
            )
        num_bytes = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
        if num_bytes:
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            parts.append(flat.numpy().data)
    head = dump_json(header, "the message's header", MAX_HEADER_BYTES)
    head += b" " * (-len(head) % 8)
    length = PREFIX_BYTES + len(head) + offset
    if length > max_bytes:
        raise ProtocolError(
            f"the message has {length:,} bytes, more than the {max_bytes:,} that the peer takes"
        )
    return [length.to_bytes(PREFIX_BYTES, "big") + len(head).to_bytes(8, "little") + head, *parts]


def body_bytes(prefix: bytes, max_bytes: int = MAX_MESSAGE_BYTES) -> int:
    """Return the number of bytes that follow a message's first `PREFIX_BYTES`.

    Raises:
        ProtocolError: these are more than `max_bytes`; nothing more of the message may be read.
    """
    length = int.from_bytes(prefix, "big")
    if length > max_bytes:
        raise ProtocolError(f"a message claims {length:,} bytes, more than the {max_bytes:,} allowed")
    return length


def decode(body: bytes | bytearray, *, max_bytes: int = MAX_MESSAGE_BYTES) -> tuple[Meta, Tensors]:
    """Return the meta and the tensors of a message without its first `PREFIX_BYTES`.

    Args:
        body: all of it. Tensors that are not compressed are views of it, if it is a bytearray.
        max_bytes: what the tensors may take after they are restored from a compression.
    Raises:
        ProtocolError: the message is damaged, of another version, or takes more than `max_bytes`.
    """
    body = bytearray(body) if isinstance(body, bytes) else body  # torch wants memory that it could write to
    if body[8:9] != b"{":
        raise ProtocolError(f"a message of {len(body):,} bytes has no header")
    head_bytes = int.from_bytes(body[:8], "little")
    start = 8 + head_bytes
    if head_bytes > MAX_HEADER_BYTES or start > len(body):
        raise ProtocolError(
            f"a message of {len(body):,} bytes claims a header of {head_bytes:,}; at most {MAX_HEADER_BYTES:,} are allowed"
        )
    header = load_json(bytes(body[8:start]), "a message's header", MAX_HEADER_BYTES)
    meta, compressed = _read_metadata(header.pop("__metadata__", None))
    if len(header) > MAX_TENSORS:
        raise ProtocolError(f"a message has {len(header)} tensors, more than the {MAX_TENSORS} allowed")
    spans = sorted((*_read_entry(name, entry), name) for name, entry in header.items())
    position, tensors = 0, {}
    for begin, end, dtype, shape, name in spans:
        if begin != position:
            raise ProtocolError(f"{name} begins at byte {begin:,} of the tensors, not at {position:,}")
        position = end
        tensors[name] = _view(body, start + begin, end - begin, TORCH_DTYPES[dtype], shape, name)
    if position != len(body) - start:
        raise ProtocolError(
            f"the tensors end at byte {position:,}, but the message has {len(body) - start:,} of them"
        )
    _restore_all(tensors, compressed, max_bytes)
    return meta, tensors


def _read_metadata(metadata: object) -> tuple[Meta, dict[str, Any]]:
    if not isinstance(metadata, dict) or list(metadata) != [_METADATA_KEY]:
        raise ProtocolError(f"a message has no metadata with the one key {_METADATA_KEY}")
    if not isinstance(text := metadata[_METADATA_KEY], str):
        raise ProtocolError("a message's metadata is not a string")
    said = load_json(text.encode(), "a message's meta", MAX_META_BYTES)
    if said.get("protocol") != PROTOCOL:
        raise ProtocolError(
            f"the peer speaks protocol {said.get('protocol')!r:.20}, and this slowllm protocol {PROTOCOL}; use the same version"
        )
    meta, compressed = said.get("meta"), said.get("compressed")
    if not isinstance(meta, dict) or not isinstance(compressed, dict):
        raise ProtocolError("a message lacks meta or compressed")
    return meta, compressed


def _read_entry(name: str, entry: object) -> tuple[int, int, str, tuple[int, ...]]:
    """Return the first and the last byte, dtype and shape of one tensor."""
    if not name or len(name) > MAX_NAME_LETTERS or not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ProtocolError(
            f"tensor {name[:MAX_NAME_LETTERS]!r} is not described by dtype, shape and data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise ProtocolError(f"{name} has the unknown dtype {str(dtype)[:20]!r}")
    size = TORCH_DTYPES[dtype].itemsize
    # Torch multiplies in 64 bits even where a zero makes the product small.
    if (
        not _are_sizes(shape)
        or len(shape) > MAX_DIMENSIONS
        or size * math.prod(max(n, 1) for n in shape) >= _HIGHEST
    ):
        raise ProtocolError(f"{name} has the impossible shape {str(shape)[:80]}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ProtocolError(f"{name} has the impossible data_offsets {str(offsets)[:80]}")
    begin, end = offsets
    if math.prod(shape) * size != end - begin:
        raise ProtocolError(
            f"{name} of shape {shape} and dtype {dtype} does not fill the bytes {begin:,} to {end:,}"
        )
    if begin % size:
        raise ProtocolError(f"{name} of dtype {dtype} begins at byte {begin:,}, which is not aligned")
    return begin, end, dtype, tuple(shape)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < _HIGHEST for size in value)


def _view(
    body: bytearray, offset: int, num_bytes: int, dtype: torch.dtype, shape: tuple[int, ...], name: str
) -> Tensor:
    if offset + num_bytes > len(body):
        raise ProtocolError(f"{name} ends behind the message's end")
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    # A bool of another value than 0 and 1 makes torch's kernels do what nobody expects.
    if dtype is torch.bool and body[offset : offset + num_bytes].strip(b"\0\1"):
        raise ProtocolError(f"{name} of dtype BOOL has a value other than 0 and 1")
    return torch.frombuffer(body, dtype=dtype, count=num_bytes // dtype.itemsize, offset=offset).view(shape)


def _restore_all(tensors: Tensors, compressed: dict[str, Any], max_bytes: int) -> None:
    """Restore what was compressed, in place; the limit is checked before anything is allocated."""
    restored_bytes = 0
    for name, said in compressed.items():
        if name not in tensors or not isinstance(said, list) or [type(word) for word in said] != [str, str]:
            raise ProtocolError(
                f"{name[:MAX_NAME_LETTERS]!r} is said to be compressed, but not how, or it is not there"
            )
        dtype = FLOATING.get(said[1], torch.float64)
        restored_bytes += tensors[name].numel() * dtype.itemsize
    if restored_bytes > max_bytes:
        raise ProtocolError(
            f"a message has {restored_bytes:,} bytes when restored, more than the {max_bytes:,} allowed"
        )
    for name, (how, dtype_name) in compressed.items():
        scales = tensors.pop(_SCALES + name, None)
        if name not in tensors:
            raise ProtocolError(
                f"{name[:MAX_NAME_LETTERS]!r} is the scales of another tensor, and compressed itself"
            )
        tensors[name] = restore(name, tensors[name], scales, how, dtype_name)
