"""What coded weights are counted in, and whether their loops are compiled; says so without importing the compiler."""

from __future__ import annotations

import importlib.util

# Importing numba takes 80 MB and half a second, so only what decodes does.
IS_COMPILED = importlib.util.find_spec("numba") is not None

# Weights that are coded together: their exponents count from one base, and 128 KB of output stay in a core's cache.
CHUNK = 1 << 16
# A machine word holds four bf16 numbers, and one word of exponents serves four words of output.
STEP = 16
