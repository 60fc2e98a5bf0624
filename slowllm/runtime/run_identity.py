"""What a job's results depend on: whatever must be the same when a state is resumed."""

from __future__ import annotations

from typing import Any


def computed_by(model: Any) -> dict[str, str]:
    """Return what a streamed model's numbers depend on beside its weights, for the description of a state."""
    found = {"dtype": str(model.dtype).removeprefix("torch.")}
    # Left out for the processor, as in states that are older than devices.
    return found if model.device.type == "cpu" else {**found, "device": model.device.type}
