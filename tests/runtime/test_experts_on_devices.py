"""Experts that are read on demand where blocks are computed on devices: copied to the block that asks, and to no other.

The devices are the processor's own memory, so the reference is exact; what would be left on a wrong device, pretended ones show.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.errors import CheckpointError, PlanError
from slowllm.options import format_binary, parse_bytes
from slowllm.planning.budget import Budget
from slowllm.planning.device_plan import DEVICE_SLACK_BYTES
from slowllm.planning.job import Job
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.survey import survey
from slowllm.storage.codecs.registry import codec_of
from slowllm.streaming import device_stops
from tests.support.families import resident, save_tiny
from tests.support.host_device import HostDevice
from tests.support.native_checkpoints import fp8_settings, quantised, store_fp8, store_mxfp4

IDS = torch.arange(5, 35).view(2, 15)
TEXTS = [IDS[:1, :4], IDS, IDS[1:, :9]]
Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        if name == "gpt-oss":
            save_tiny(name, folder / "plain", torch.bfloat16)
            return quantised(folder / "plain", folder / "coded", {"quant_method": "mxfp4"}, store_mxfp4)
        if name == "deepseek-v3":
            save_tiny(name, folder / "plain", torch.bfloat16)
            return quantised(folder / "plain", folder / "coded", fp8_settings((8, 16)), store_fp8((8, 16)))
        save_tiny(name, folder)
        return folder

    return make


def dtype_of(name: str) -> str:
    return "bfloat16" if name in ("gpt-oss", "deepseek-v3") else "float32"


@contextmanager
def loaded(
    folder: Path, num_devices: int = 1, *, kind: type[HostDevice] = HostDevice, **options: Any
) -> Iterator[Any]:
    """Load on devices that are the processor's memory, all stops streamed and slots poisoned unless told otherwise."""
    names = ",".join(f"cuda:{number}" for number in range(num_devices))
    options = {
        "granularity": "experts", "dtype": "float32", "resident": False, "poison": True, "ram": "4GiB", **options
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slowllm.runtime.load.open_devices", lambda names: [kind() for _ in names])
        lm = slowllm.load(folder, device=names, **options)
    with lm:
        yield lm


class CountingDevice(HostDevice):
    allocated_bytes = 0

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self.allocated_bytes += num_bytes
        return super().allocate(num_bytes)


def gradient(model: Any, embedded: torch.Tensor) -> torch.Tensor:
    own = embedded.clone().requires_grad_()
    model(inputs_embeds=own, labels=IDS).loss.backward()
    assert own.grad is not None
    return own.grad


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_logits_tokens_and_gradients_are_those_of_whole_blocks(
    name: str, num_devices: int, tiny: Tiny
) -> None:
    folder, dtype = tiny(name), dtype_of(name)
    plain: Any = resident(folder, getattr(torch, dtype))
    embedded = plain.get_input_embeddings()(IDS).detach()
    with torch.no_grad():
        wanted = plain(IDS).logits
    found: list[list[torch.Tensor]] = []
    for granularity in ("experts", "blocks"):
        with loaded(folder, num_devices, granularity=granularity, dtype=dtype) as lm:
            assert lm.plan.granularity == granularity
            with torch.no_grad():
                logits = lm.model(IDS).logits
                tokens = lm.model.generate(IDS, max_new_tokens=3, do_sample=False)
            job = functools.partial(gradient, lm.model, embedded)
            found.append([logits, tokens, *lm.ride([job, job]), job()])
            if granularity == "experts":
                assert lm.experts.read_bytes
                assert lm.device_placement.plan.num_expert_slots == (2,) * num_devices
    assert all(map(torch.equal, *found))
    # On the processor as a device, these are the bits of transformers' `eager`.
    assert torch.equal(found[0][0], wanted)
    assert torch.equal(found[0][1], plain.generate(IDS, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_riders_share_what_is_copied_and_keep_their_bits(name: str, num_devices: int, tiny: Tiny) -> None:
    plain: Any = resident(tiny(name), getattr(torch, dtype_of(name)))
    with torch.no_grad():
        wanted = [plain(ids).logits for ids in TEXTS]
        for exact in (True, False):
            with loaded(tiny(name), num_devices, dtype=dtype_of(name), exact=exact) as lm:
                lm.experts.forecast.ahead_of = lambda first, chosen: []  # nothing is read ahead of a router
                found = lm.ride([lambda ids=ids, lm=lm: lm.model(ids).logits for ids in TEXTS])
                stats = lm.experts.settings.stats
                assert stats.num_distinct < stats.num_wanted
                # Each was copied once for all who want it, and no other was.
                assert lm.experts.kept.counts.sum() == lm.experts.demand.num_asked == stats.num_distinct
                assert bool(stats.num_together) != exact
            for ours, theirs in zip(found, wanted, strict=True):
                if exact:
                    assert torch.equal(ours, theirs)
                else:
                    torch.testing.assert_close(ours, theirs, atol=2e-4 if name == "mixtral" else 2e-2, rtol=0)


def test_coded_experts_are_decoded_once_for_all_riders(tiny: Tiny) -> None:
    with loaded(tiny("gpt-oss"), dtype="bfloat16") as lm, torch.no_grad():
        decoded: list[int] = []
        codec = type(codec_of(lm.layout.units[0][0].coding))
        inner = codec.decode

        def decode(*given: Any) -> None:
            decoded.append(1)
            inner(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(codec, "decode", decode)
            lm.ride([lambda: lm.model(IDS).logits] * 3)
        assert len(decoded) == 2 * lm.experts.settings.stats.num_distinct


def test_only_what_routers_choose_is_read_and_copied(tiny: Tiny) -> None:
    with loaded(tiny("qwen3-moe")) as lm, torch.no_grad():
        read: list[int] = []
        lm.experts.watch_reads(lambda stop: read.append(stop.stop))
        lm.model(torch.tensor([[7]]))
        chosen = lm.experts.forecast.chosen.nonzero()[0].tolist()
        assert len(chosen) < len(lm.layout.units)
        assert sorted(read) == chosen
        assert lm.experts.kept.counts.nonzero()[0].tolist() == chosen
        assert lm.experts.look_ahead is None


def test_experts_that_stay_in_memory_are_copied_and_not_read_again(tiny: Tiny) -> None:
    plain: Any = resident(tiny("mixtral"))
    for num_devices in (1, 2):
        with loaded(tiny("mixtral"), num_devices, resident=True, poison=False) as lm, torch.no_grad():
            assert lm.plan.kept_units == len(lm.layout.units)
            assert torch.equal(lm.model(IDS).logits, plain(IDS).logits)
            before = lm.read_bytes
            for _ in range(3):
                assert torch.equal(lm.model(IDS).logits, plain(IDS).logits)
            assert lm.read_bytes == before
            assert lm.experts.kept.num_hits


def failing_read(lm: Any, broken: set[int], patch: pytest.MonkeyPatch) -> None:
    inner = lm.experts.kept.visit

    def visit(unit: int, upcoming: Sequence[int] = ()) -> Any:
        if unit in broken:
            raise CheckpointError(f"unit {unit} cannot be brought")
        return inner(unit, upcoming)

    patch.setattr(lm.experts.kept, "visit", visit)


def failing_copy(lm: Any, broken: set[int], patch: pytest.MonkeyPatch) -> None:
    inner, units = device_stops._copy_into, lm.layout.units

    def copy_into(memory: torch.Tensor, stored: Mapping[str, torch.Tensor], device: Any) -> Any:
        for unit in broken:
            if units[unit][0].name in stored:
                raise RuntimeError(f"unit {unit} cannot be brought")
        return inner(memory, stored, device)

    patch.setattr(device_stops, "_copy_into", copy_into)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("fail", [failing_read, failing_copy])
@pytest.mark.parametrize("num_broken", [1, 3])
def test_experts_that_cannot_be_brought_end_those_who_need_them(
    exact: bool, fail: Any, num_broken: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Any = resident(tiny("olmoe"))
    texts = [torch.tensor([[number]]) for number in range(5, 21)]
    with torch.no_grad():
        wanted = [plain(ids).logits for ids in texts]
        with loaded(tiny("olmoe"), exact=exact) as lm:
            needed: list[set[int]] = []
            for ids in texts:
                before = lm.experts.forecast.chosen.copy()
                lm.model(ids)
                needed.append(set((lm.experts.forecast.chosen - before).nonzero()[0].tolist()))
            first = sum(len(experts.units) for experts in lm.layout.experts[:-1])
            broken = set(range(first, len(lm.layout.units))) & needed[0]
            broken = set(sorted(broken)[:num_broken])
            fail(lm, broken, monkeypatch)

            def job(ids: torch.Tensor) -> Any:
                try:
                    return lm.model(ids).logits
                except (CheckpointError, RuntimeError) as error:
                    return str(error)

            outcomes: list[Any] = lm.ride([lambda ids=ids: job(ids) for ids in texts])
            monkeypatch.undo()
            again = lm.ride([lambda ids=ids: job(ids) for ids in texts])
    assert isinstance(outcomes[0], str)
    assert not all(isinstance(outcome, str) for outcome in outcomes)
    for outcome, after, units, logits in zip(outcomes, again, needed, wanted, strict=True):
        torch.testing.assert_close(after, logits, atol=0 if exact else 2e-4, rtol=0)
        if units & broken:
            assert outcome in {f"unit {unit} cannot be brought" for unit in units & broken}
        else:
            torch.testing.assert_close(outcome, logits, atol=0 if exact else 2e-4, rtol=0)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts (6 MiB each) count beside what a device takes anyway."""
    folder = tmp_path_factory.mktemp("wide")
    save_tiny(
        "mixtral", folder, shard="1GB", intermediate_size=8192, num_local_experts=8, num_hidden_layers=2
    )
    return folder


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_that_works(wide: Path) -> None:
    job = Job(num_tokens=16, longest=16, forward_only=True)
    plain: Any = resident(wide)
    for granularity, other in (("experts", {}), (None, {}), ("experts", {"num_devices": 2})):
        options = {"granularity": granularity, "job": job, "kind": CountingDevice, **other}
        with (
            pytest.raises(PlanError, match="the smallest that would do is") as refused,
            loaded(wide, vram=DEVICE_SLACK_BYTES, **options),
        ):
            pass
        smallest = parse_bytes(re.findall(r"that would do is ([\d.]+\w+)", str(refused.value))[0])
        with loaded(wide, vram=smallest, **options) as lm, torch.no_grad():
            assert lm.plan.granularity == "experts"
            for number, device in enumerate(lm.device_placement.devices):
                fixed = DEVICE_SLACK_BYTES + lm.sizes.kept_bytes
                assert device.allocated_bytes <= lm.device_placement.plan.used_bytes[number] - fixed
            assert torch.equal(lm.model(IDS[:1]).logits, plain(IDS[:1]).logits)
            unit = max(sum(p.num_bytes for p in unit) for unit in lm.layout.units)
            assert smallest - DEVICE_SLACK_BYTES > 2 * unit
        with (
            pytest.raises(PlanError, match=r"are too few for this model"),
            loaded(wide, vram=smallest - (6 << 20), **options),
        ):
            pass
        with (
            pytest.raises(PlanError, match="a budget of 300MiB is too small") as refused,
            loaded(wide, ram="300MiB", **options),
        ):
            pass
        smallest = parse_bytes(re.findall(r"that would do is ([\d.]+\w+)", str(refused.value))[0])
        with loaded(wide, ram=format_binary(smallest + (64 << 20)), **options) as lm, torch.no_grad():
            assert torch.equal(lm.model(IDS[:1]).logits, plain(IDS[:1]).logits)


def test_a_plan_names_experts_where_blocks_do_not_fit_the_device(wide: Path) -> None:
    job = Job(num_tokens=16, longest=16, forward_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slowllm.runtime.load.open_devices", lambda names: [HostDevice() for _ in names])
        for vram, granularity in ((DEVICE_SLACK_BYTES + (40 << 20), "experts"), (None, "blocks")):
            found = survey(ModelInfo(wide), ram="4GiB", device="cuda", vram=vram, dtype="float32", job=job)
            assert found.plan.granularity == granularity
            assert bool(found.token_costs) == (granularity == "experts")


def test_a_device_without_room_for_experts_leaves_nothing_open(tiny: Tiny) -> None:
    class Full(HostDevice):
        num_left = 2  # the slots of the blocks

        def allocate(self, num_bytes: int) -> torch.Tensor:
            self.num_left -= 1
            if self.num_left < 0:
                raise PlanError("the device is full")
            return super().allocate(num_bytes)

    budget, threads = Budget(4 << 30, 0), set(threading.enumerate())
    with pytest.raises(PlanError, match="the device is full"), loaded(tiny("mixtral"), kind=Full, ram=budget):
        pass
    assert budget.used_bytes == 0
    assert set(threading.enumerate()) <= threads


def test_a_parameter_of_all_experts_can_be_looked_at(tiny: Tiny) -> None:
    plain: Any = resident(tiny("mixtral"))
    with loaded(tiny("mixtral"), 2) as lm:
        for name in lm.layout.experts[1].full_names:
            assert torch.equal(lm.weights(name), plain.get_parameter(name))
