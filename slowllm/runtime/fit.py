"""How models fit this machine, by plans of the same jobs for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from slowllm.errors import PlanError
from slowllm.options import format_binary, parse_dtype
from slowllm.planning.job import Job, Rates
from slowllm.runtime.blueprint import Blueprint, measure_blueprint, stored_dtype_of
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.rates import dtype_for
from slowllm.runtime.survey import Survey, smallest_budget, survey, survey_blueprint
from slowllm.storage.spans import DTYPE_NAMES

# The models that `slowllm doctor` plans where none is named, small ones first.
TWELVE = (
    "bigscience/bloom-560m", "tiiuae/falcon-7b", "openai/gpt-oss-20b", "meta-llama/Llama-3.1-8B", "openai/gpt-oss-120b",
    "meta-llama/Llama-3.1-70B", "Qwen/Qwen3-235B-A22B-FP8", "mistralai/Mixtral-8x22B-v0.1", "bigscience/bloom",
    "tiiuae/falcon-180B", "deepseek-ai/DeepSeek-V3", "meta-llama/Llama-3.1-405B",
)  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """How one model fits this machine.

    Attributes:
        name: of the model.
        weight_bytes: of a sweep.
        dtype: compute dtype.
        smallest_bytes: the smallest budget in which all of the jobs run.
        surveys: of the jobs, in their order; empty where one of them does not fit the budget.
        faster: what would make the first job faster, with the seconds that it would then take; the best first.
    """

    name: str
    weight_bytes: int
    dtype: str
    smallest_bytes: int
    surveys: tuple[Survey, ...]
    faster: tuple[tuple[str, float], ...] = ()


def fit_of(
    blueprint: Blueprint,
    jobs: Sequence[Job],
    *,
    ram_bytes: int,
    process_bytes: int,
    dtype: str,
    rates_of: Callable[[torch.dtype], Rates],
    asks_for_faster: bool = False,
) -> Fit:
    """Plan jobs of a model by its configuration alone.

    Args:
        blueprint: of the model.
        jobs: forward only.
        ram_bytes: the budget.
        process_bytes: what the process holds before the model is opened.
        dtype: as for `load`.
        rates_of: returns the rates of this machine for a compute dtype.
        asks_for_faster: whether to plan the first job on better machines, too.
    Raises:
        ArchitectureError: the model does not fit the carousel.
    """
    stored = stored_dtype_of(blueprint)
    compute = dtype_for(parse_dtype(dtype), DTYPE_NAMES[stored])
    sizes = measure_blueprint(blueprint, stored, compute, forward_only=True)
    smallest = max(smallest_budget(sizes.choices, job, process_bytes) for job in jobs)
    rates, name = rates_of(compute), str(compute).removeprefix("torch.")
    fit = Fit(blueprint.name, sizes.weight_bytes, name, smallest, ())

    def planned(job: Job, rates: Rates) -> Survey:
        return survey_blueprint(blueprint, ram=ram_bytes, dtype=dtype, job=job, rates=rates, sizes=sizes)

    try:
        fit = replace(fit, surveys=tuple(planned(job, rates) for job in jobs))
    except PlanError:
        return fit
    if not asks_for_faster:
        return fit
    faster_disk = planned(jobs[0], replace(rates, disk=2 * rates.disk))
    faster_cores = planned(jobs[0], replace(rates, compute=2 * rates.compute, memory=2 * rates.memory))
    return replace(fit, faster=improvements(fit.surveys[0], faster_disk, faster_cores))


def fit_of_store(info: ModelInfo, jobs: Sequence[Job], *, ram_bytes: int, dtype: str) -> Fit:
    """Plan jobs of a store, whose bytes its configuration does not say, by opening it.

    Args:
        info: of the store.
        jobs: forward only.
        ram_bytes: the budget.
        dtype: as for `load`.
    Raises:
        PlanError: one of the jobs does not fit the budget; the message names the smallest that would do.
    """
    found = tuple(survey(info, ram=ram_bytes, dtype=dtype, job=job) for job in jobs)
    first, smallest = found[0], max(one.smallest_bytes for one in found)
    return Fit(info.name, first.weight_bytes, first.dtype, smallest, found, improvements(first))


def improvements(
    now: Survey, faster_disk: Survey | None = None, faster_cores: Survey | None = None
) -> tuple[tuple[str, float], ...]:
    """Return what would save a twentieth of a job's time or more, the best first.

    Args:
        now: the job on this machine.
        faster_disk: the same on a disk that is twice as fast, where that was planned.
        faster_cores: the same on a processor that is.
    Returns:
        words and seconds.
    """
    found = [] if faster_disk is None else [("a disk twice as fast", faster_disk.plan.forecast.seconds)]
    found += (
        [] if faster_cores is None else [("a processor twice as fast", faster_cores.plan.forecast.seconds)]
    )
    if now.can_be_halved:
        found.append(("a store of 8 bits (`slowllm convert`)", now.halved_seconds))
    found += [(f"--ram {format_binary(ram)}", seconds) for ram, seconds in now.larger[-1:]]
    seconds = now.plan.forecast.seconds
    return tuple(sorted((one for one in found if one[1] < 0.95 * seconds), key=lambda one: one[1]))
