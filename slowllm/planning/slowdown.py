"""Why a sweep took longer than it should have: a pure decision from what was counted meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from slowllm.options import format_bytes

# A sweep is slow if it takes so many times as long as expected; forecasts and machines vary by less.
SLOW = 1.3
# Shorter sweeps vary for reasons that nobody needs to know.
LEAST_SECONDS = 5.0
# Shares of a sweep's time, and of the cores, that explain it.
STALLED, WAITED, TAKEN = 0.1, 0.5, 0.25
# A disk is slow below this share of its measured rate.
SLOW_DISK = 0.75


@dataclass(frozen=True)
class SweepFacts:
    """What was counted during a sweep.

    Attributes:
        seconds: that it took.
        expected_seconds: by the forecast, or of sweeps before it.
        read_bytes: from disk.
        wait_seconds: that the carousel waited for weights.
        disk: bytes a second that were measured before, None where nobody measured.
        memory_stall_seconds: in which some task of the system waited for memory; None where the system does not say.
        other_cores: cores that other processes used, on average; None where the system does not say.
        num_cores: of the machine.
    """

    seconds: float
    expected_seconds: float
    read_bytes: int
    wait_seconds: float
    disk: float | None
    memory_stall_seconds: float | None
    other_cores: float | None
    num_cores: int


def why_slow(facts: SweepFacts) -> tuple[str, str] | None:
    """Return why a sweep was slow; None where it was not, or nothing explains it.

    Memory comes first, for a system that is short of it also reads more slowly; then other processes, which may be
    what reads from the disk; then the disk.

    Returns:
        the cause in one word, by which it is said once: ``memory``, ``processes`` or ``disk``; and a sentence.
    """
    seconds, expected = facts.seconds, facts.expected_seconds
    if expected <= 0 or seconds < LEAST_SECONDS or seconds < SLOW * expected:
        return None
    took = f"the last sweep took {seconds:.3g} s instead of {expected:.3g} s"
    stalled = facts.memory_stall_seconds
    if stalled is not None and stalled >= STALLED * seconds:
        return (
            "memory",
            f"{took}: the system is short of memory, and waited for it during {stalled / seconds:.0%} of the time; a smaller "
            "--ram leaves more to others",
        )
    if facts.other_cores is not None and facts.other_cores >= TAKEN * facts.num_cores:
        return (
            "processes",
            f"{took}: other processes use {facts.other_cores:.1f} of the {facts.num_cores} cores",
        )
    if facts.disk is not None and facts.wait_seconds >= WAITED * seconds:
        rate = facts.read_bytes / seconds
        if rate < SLOW_DISK * facts.disk:
            return (
                "disk",
                f"{took}: the disk gives {format_bytes(rate)}/s, and gave {format_bytes(facts.disk)}/s when it was measured",
            )
    return None
