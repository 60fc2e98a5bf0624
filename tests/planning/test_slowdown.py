"""Why a sweep was slow: memory before others before the disk, and nothing without a reason."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from slowllm.planning.slowdown import SLOW, SweepFacts, why_slow

# Of a machine whose disk gives 2 GB/s: a sweep of 80 GB that should take 40 s, and took as long.
FINE = SweepFacts(
    seconds=40.0, expected_seconds=40.0, read_bytes=80 * 10**9, wait_seconds=35.0, disk=2e9, memory_stall_seconds=0.0,
    other_cores=0.1, num_cores=4,
)  # fmt: skip
SLOW_SWEEP = replace(FINE, seconds=80.0, wait_seconds=75.0)


def test_a_slow_disk_is_named_with_both_rates() -> None:
    assert why_slow(SLOW_SWEEP) == (
        "disk",
        "the last sweep took 80 s instead of 40 s: the disk gives 1 GB/s, and gave 2 GB/s when it was measured",
    )


def test_memory_comes_first_and_other_processes_before_the_disk() -> None:
    both = replace(SLOW_SWEEP, other_cores=3.0, memory_stall_seconds=40.0)
    cause, sentence = why_slow(both) or ("", "")
    assert cause == "memory"
    assert "waited for it during 50% of the time; a smaller --ram" in sentence
    cause, sentence = why_slow(replace(both, memory_stall_seconds=1.0)) or ("", "")
    assert cause == "processes"
    assert sentence.endswith("other processes use 3.0 of the 4 cores")


def test_what_has_no_reason_is_not_explained() -> None:
    assert why_slow(FINE) is None
    assert why_slow(replace(SLOW_SWEEP, wait_seconds=1.0)) is None  # it computed all the time
    assert why_slow(replace(SLOW_SWEEP, disk=None)) is None
    assert why_slow(replace(SLOW_SWEEP, expected_seconds=0.0)) is None  # nobody knows what to expect
    assert why_slow(replace(SLOW_SWEEP, seconds=0.8, expected_seconds=0.4)) is None
    unknown = replace(SLOW_SWEEP, memory_stall_seconds=None, other_cores=None)
    assert (why_slow(unknown) or ("",))[0] == "disk"


@given(
    seconds=st.floats(0, 1e5), expected=st.floats(0, 1e5), wait=st.floats(0, 1e5), stall=st.floats(0, 1e5),
    others=st.floats(0, 64), num_bytes=st.integers(0, 10**13),
)  # fmt: skip
def test_only_slow_sweeps_are_explained_and_more_trouble_never_less(
    seconds: float, expected: float, wait: float, stall: float, others: float, num_bytes: int
) -> None:
    facts = SweepFacts(seconds, expected, num_bytes, wait, 2e9, stall, others, 4)
    found = why_slow(facts)
    if found is not None:
        assert seconds >= SLOW * expected
        assert why_slow(replace(facts, memory_stall_seconds=stall + seconds, other_cores=64.0)) is not None
