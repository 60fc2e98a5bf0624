"""Headers of safetensors files, written by hand."""

from __future__ import annotations

import json
import struct
from typing import Any


def contents(header: str | bytes, data: bytes = b"", header_bytes: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def header_of(**tensors: Any) -> str:
    return json.dumps(tensors)
