"""Converted weights: how they lie on disk, how they are made, and how they are decoded again."""
