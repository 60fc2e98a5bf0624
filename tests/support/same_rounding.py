"""Ask MKL for one way of rounding. Imported before torch, or it comes too late.

On processors of other makers than Intel, MKL's fp32 products round differently by where in memory a matrix begins:
at a multiple of 16 bytes or not. A resident model differs from itself so, when its weights are moved by 4 bytes.
"""

from __future__ import annotations

import os

with open("/proc/cpuinfo", encoding="utf-8") as _cpuinfo:
    if "GenuineIntel" not in _cpuinfo.read():
        os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
