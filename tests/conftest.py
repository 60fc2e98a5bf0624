"""Checkpoints that many tests share, made once."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported.
import tests.support.same_rounding  # noqa: F401

# Processes that share a machine's cores, as those of `pytest -n 2` do, get their part of them, and so do those that
# they start: as many threads in each as the machine has cores spend their time waiting for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    _num_threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _num_threads)))

# A job in the background of a shell ignores SIGINT, and so would every process that tests interrupt.
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    and threading.current_thread() is threading.main_thread()
):
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

# Set before transformers is imported anywhere: tests reach no network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

# Whoever runs the tests may have options in a file of their own.
os.environ["XDG_CONFIG_HOME"] = "/nonexistent"
if _set := [name for name in os.environ if name.startswith("SLOWLLM_")]:
    for _name in _set:
        del os.environ[_name]
# And which experts they need is none of what the user's models need.
os.environ["SLOWLLM_EXPERT_COUNTS"] = "0"

import transformers

import slowllm
from tests.support.families import save_tiny
from tests.support.paths import TINY_BLOOM
from tests.support.processes import Processes
from tests.support.properties import register_profiles
from tests.support.stores import make_store
from tests.support.swarm_processes import SwarmProcesses

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
register_profiles()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Look for no garbage among the modules and the more than a million objects of the tests, now or later: each search would take most of a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of a tiny checkpoint of a family, made on first use."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp(name)
            save_tiny(name, made[name, dtype], dtype)
        return made[name, dtype]

    return get


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a store of the embedded model, made on first use."""
    folder = tmp_path_factory.mktemp("stores")

    def get(store: str) -> Path:
        if not (folder / store).exists():
            make_store(TINY_BLOOM, folder / store, store)
        return folder / store

    return get


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """What starts processes whose imports are paid for."""
    with Processes() as started:
        yield started


@pytest.fixture(scope="session")
def swarm() -> Iterator[SwarmProcesses]:
    """What starts peers of swarms in processes of their own."""
    with SwarmProcesses() as processes:
        yield processes


@pytest.fixture
def tiny_bloom() -> Iterator[slowllm.StreamedLM]:
    """The embedded model in fp32, every block streamed, released weights poisoned."""
    with slowllm.load(TINY_BLOOM, dtype="fp32", keep_resident=False, poison=True) as lm:
        yield lm


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    """Put torch's default dtype back: transformers changes it for all threads while it loads a model, and some tests have several."""
    yield
    torch.set_default_dtype(torch.float32)
