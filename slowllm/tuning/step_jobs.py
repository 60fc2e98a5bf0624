"""What the plan must know of tuning steps: tokens, riders and the memory of trials."""

from __future__ import annotations

# Tokens of a micro-batch: as many as reach the processor's rate, or fewer where memory is short.
RIDER_TOKENS = (512, 256, 128, 64)


PADDING_TOKENS = 64


# What a trial holds of each of its numbers: itself, where it began, the last good one, two of AdamW, and while a step
# ends the copies of riders, gradients, and what goes to the state.
TRIAL_COPIES = 12
