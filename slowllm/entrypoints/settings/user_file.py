"""Where a user keeps options that hold for all commands."""

from __future__ import annotations

import os
from pathlib import Path


def user_file() -> Path:
    """Return the path of the user's file of options, which need not be there.

    It is ``slowllm/config.yaml`` in ``$XDG_CONFIG_HOME``, or in ``~/.config`` where that is not set or no absolute path,
    as the XDG base directory specification says.
    """
    named = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not named.is_absolute():
        try:
            named = Path.home() / ".config"
        except RuntimeError:  # nobody has a home here
            named = Path("/nonexistent")
    return named / "slowllm" / "config.yaml"
