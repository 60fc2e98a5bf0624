"""Where the repository and its embedded model lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY_BLOOM = ROOT / "weights" / "tiny-bloom"
