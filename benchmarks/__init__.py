"""Benchmarks. Each run is measured as the first one on a machine."""

import os

# Otherwise what earlier runs needed decides which experts stay, and the second run is faster than the first.
os.environ.setdefault("SLOWLLM_EXPERT_COUNTS", "0")
