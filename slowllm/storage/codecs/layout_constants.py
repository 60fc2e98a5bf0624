"""How many weights are coded together, and are the loops compiled? Imports no compiler to say so."""

from __future__ import annotations

import importlib.util

# Importing numba takes 80 MB and half a second, so only modules that decode import it.
IS_COMPILED = importlib.util.find_spec("numba") is not None

# The package gguf has the tables of GGUF's types IQ1 to IQ3.
HAS_GRIDS = importlib.util.find_spec("gguf") is not None

# Weights whose exponents count from one base; their 128 KB of output stay in a core's cache.
CHUNK = 1 << 16
# A machine word holds four bf16 numbers, and one word of exponents serves four words of output.
STEP = 16
