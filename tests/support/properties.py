"""How many examples a property test tries: always the same ones, and five times as many in the long form of the tests."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

LONG_FACTOR = 5


def register_profiles() -> None:
    """Register the profiles ``short`` and ``long`` and load the short one; `--hypothesis-profile` loads the other.

    Examples are derandomized: a failure can be repeated, and no test fails because of a change that it does not see.
    They have no time limit: the machine may be busy.
    """
    for name, factor in (("short", 1), ("long", LONG_FACTOR)):
        settings.register_profile(
            name, derandomize=True, deadline=None, max_examples=100 * factor,
            suppress_health_check=[HealthCheck.too_slow],
        )  # fmt: skip
    settings.load_profile("short")


def num_examples(number: int, **options: Any) -> settings:
    """Return settings with this number of examples, times `LONG_FACTOR` in the long profile."""
    factor = LONG_FACTOR if settings.get_current_profile_name() == "long" else 1
    return settings(max_examples=number * factor, **options)
