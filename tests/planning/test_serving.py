"""What a server plans for: requests, sessions, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import InputError, PlanError
from slowllm.options import GIB, KIB, MIB
from slowllm.planning.device_plan import HOST_SLACK_BYTES, DeviceBudget, device_rates, plan_devices, plan_host
from slowllm.planning.host_plan import least_bytes, make_plan, session_bytes, working_bytes
from slowllm.planning.job import Job, Rates, Sizes, StopSize
from slowllm.planning.plan import Plan
from tests.support.properties import num_examples

# Four of ten blocks, as a part has them: the stops of the others are empty.
NOTHING = StopSize(0, 0)
SPAN = Sizes(
    "blocks", (*[NOTHING] * 3, *[StopSize(GIB, GIB // 4, 1e9)] * 4, *[NOTHING] * 3), MIB, 8 * KIB, 16, 4 * KIB,
    checkpoint_token_bytes=KIB, replay_token_bytes=32 * KIB, cache_token_bytes=64 * KIB, num_blocks=4,
)  # fmt: skip
JOB = Job.serving(cache_tokens=8192, batch_tokens=512, max_batch_tokens=2048, backward=True, longest=2048)


def plan_of(job: Job, free_bytes: int, keep_resident: bool = True) -> Plan:
    return make_plan(
        [SPAN], free_bytes=free_bytes, total_bytes=free_bytes, job=job, keep_resident=keep_resident
    )


def test_sessions_are_counted_with_the_copy_by_which_one_of_their_layers_grows() -> None:
    assert session_bytes(SPAN, JOB) == 8192 * 64 * KIB + 2048 * 64 * KIB // 4
    assert session_bytes(SPAN, replace(JOB, cache_tokens=1024)) == 1024 * 64 * KIB * 5 // 4
    assert (
        session_bytes(SPAN, Job.serving(cache_tokens=0, batch_tokens=1, max_batch_tokens=1, backward=False))
        == 0
    )


def test_requests_and_sessions_are_planned_for_as_they_were_named() -> None:
    plan = plan_of(JOB, 16 * GIB)
    assert (plan.rider_tokens, plan.sweep_tokens) == (512, 2048)
    assert plan.ring_bytes == 0
    assert plan.peak_bytes >= 4 * GIB + working_bytes(SPAN, JOB, 512, 2048)
    without = working_bytes(SPAN, replace(JOB, cache_tokens=0), 512, 2048)
    assert working_bytes(SPAN, JOB, 512, 2048) - without == session_bytes(SPAN, JOB)
    backward = 2048 * KIB + 512 * 32 * KIB
    assert working_bytes(SPAN, JOB, 512, 2048) - working_bytes(
        SPAN, replace(JOB, forward_only=True), 512, 2048
    ) == (backward)


def test_the_longest_sequence_is_the_most_that_a_cache_can_hold_where_it_is_not_named() -> None:
    job = Job.serving(cache_tokens=8192, batch_tokens=512, max_batch_tokens=512, backward=False)
    assert job.longest == 8192
    assert working_bytes(SPAN, job, 512, 512) - session_bytes(SPAN, job) == (
        512 * (8 * KIB + 8192 * 16) + 512 * 4 * KIB
    )


def test_a_span_larger_than_memory_streams() -> None:
    least = least_bytes(SPAN, JOB)
    plan = plan_of(JOB, least)
    assert plan.ring_bytes == SPAN.smallest_ring_bytes
    assert plan.peak_bytes <= least
    assert plan.forecast.read_bytes == 4 * GIB, "the stops of others are not counted"


@st.composite
def serving_jobs(draw: st.DrawFn) -> Job:
    batch = draw(st.integers(1, 4096))
    return Job.serving(
        cache_tokens=draw(st.integers(0, 1 << 17)),
        batch_tokens=batch,
        max_batch_tokens=batch * draw(st.integers(1, 8)),
        backward=draw(st.booleans()),
        longest=draw(st.none() | st.integers(1, 1 << 17)),
    )


@num_examples(100)
@given(serving_jobs(), st.integers(0, 64 * GIB), st.booleans())
def test_a_server_keeps_its_budget_or_is_refused(job: Job, free_bytes: int, keep_resident: bool) -> None:
    if free_bytes < least_bytes(SPAN, job, keep_resident):
        with pytest.raises(PlanError, match="tokens in the caches of sessions"):
            plan_of(job, free_bytes, keep_resident)
        return
    plan = plan_of(job, free_bytes, keep_resident)
    assert plan.peak_bytes <= free_bytes
    assert (plan.rider_tokens, plan.sweep_tokens) == job.packing[:2]  # type: ignore[index]


def test_a_server_that_does_not_fit_is_refused_with_its_numbers() -> None:
    numbers = (
        r"544MiB for 8,192 tokens in the caches of sessions, .* for 2,048 tokens under way, 512 in a request"
    )
    with pytest.raises(PlanError, match=f"{numbers}, with backward"):
        plan_of(JOB, least_bytes(SPAN, JOB) - 1)
    with pytest.raises(PlanError, match="forward only"):
        plan_of(replace(JOB, forward_only=True), GIB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_tokens": 0}, r"batch_tokens of 0; use 1 at least"),
        ({"max_batch_tokens": 511}, r"max_batch_tokens of 511; use 512 at least"),
        ({"cache_tokens": -1}, r"cache_tokens of -1; use 0 at least"),
        ({"cache_tokens": 1.5}, r"cache_tokens of 1\.5"),
        ({"longest": 0}, r"the longest sequence cannot have 0 tokens"),
    ],
)
def test_what_are_no_numbers_of_tokens_are_refused(change: dict[str, int], message: str) -> None:
    given = {"cache_tokens": 64, "batch_tokens": 512, "max_batch_tokens": 512, "backward": True, **change}
    with pytest.raises(InputError, match=message):
        Job.serving(**given)  # type: ignore[arg-type]


def test_with_a_device_sessions_take_its_memory_and_none_of_the_hosts() -> None:
    rates, job = device_rates(Rates()), replace(JOB, forward_only=True)
    blocks = [[*range(10)]]
    budget = [DeviceBudget("cuda:0", 12 * GIB)]
    (with_sessions,) = plan_devices([SPAN], blocks, budget, job=job, rates=rates)
    (without,) = plan_devices([SPAN], blocks, budget, job=replace(job, cache_tokens=0), rates=rates)
    assert with_sessions.used_bytes[0] - without.used_bytes[0] == session_bytes(SPAN, job)
    host = plan_host(SPAN, with_sessions, free_bytes=8 * GIB, total_bytes=8 * GIB, job=job, rates=rates)
    assert host.peak_bytes < HOST_SLACK_BYTES + 3 * GIB
