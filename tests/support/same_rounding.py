"""Ask MKL for one way of rounding. Imported before torch, or it comes too late.

On processors of other makers than Intel, MKL's fp32 products round differently by where in memory a matrix begins: at
a multiple of 16 bytes or not. A resident model whose weights are moved by 4 bytes differs from itself.
"""

from __future__ import annotations

import os

with open("/proc/cpuinfo", encoding="utf-8") as _file:
    _cpuinfo = _file.read()
if "GenuineIntel" not in _cpuinfo:
    # AVX2 multiplies three times as fast as what runs everywhere.
    os.environ.setdefault("MKL_CBWR", "AVX2" if " avx2 " in _cpuinfo else "COMPATIBLE")
