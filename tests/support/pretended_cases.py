"""What is run on the pretended device, case by case; see `pretended`."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

import slowllm
from slowllm.errors import NonFiniteError
from slowllm.inference import generation, speculative
from slowllm.inference.generation_types import Settings, encode_prompt
from slowllm.inference.lines import Line, score_lines
from slowllm.modeling import layout, losses
from slowllm.modeling.parts import Part
from slowllm.planning.device_plan import DEVICE_SLACK_BYTES
from slowllm.prepare.convert import convert
from slowllm.runtime import load, survey
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.run_identity import computed_by
from slowllm.runtime.state import ResumedWay, State
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.call_context import call_context
from slowllm.streaming.way import StopAfterBlocks, StopForward
from tests.support import pretended_device as pretended
from tests.support.families import FAMILIES, resident, save_tiny
from tests.support.native_checkpoints import fp8_settings, quantised, store_fp8, store_mxfp4
from tests.support.parted import Inside, Known
from tests.support.paths import TINY_BLOOM

CASES: dict[str, Callable[[], None]] = {}
IDS = torch.tensor([[5, 7, 11, 13, 17, 3], [2, 9, 4, 8, 6, 1]])
# Other kernels than a resident model's, such as attention written out, round otherwise.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


@cache
def folder(name: str, dtype: torch.dtype = torch.float32) -> Path:
    made = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    save_tiny(name, made, dtype)
    return made


@cache
def short_bloom() -> Path:
    """The first three blocks of the embedded model, and its tokenizer: a third of the operations, each of which is slow."""
    made = Path(tempfile.mkdtemp(prefix="short-bloom-"))
    model: Any = resident(TINY_BLOOM, torch.bfloat16)
    model.transformer.h = model.transformer.h[:3]
    model.config.n_layer = 3
    model.save_pretrained(made, max_shard_size="1MB")
    AutoTokenizer.from_pretrained(TINY_BLOOM).save_pretrained(made)
    return made


@contextmanager
def pretending() -> Iterator[None]:
    """Let the names of CUDA's devices stand for the pretended ones."""
    opened = load.open_devices
    load.open_devices = lambda names: [
        pretended.PretendedDevice(int(name[5:])) for name in names if name != "cpu"
    ]
    try:
        yield
    finally:
        load.open_devices = opened


@contextmanager
def loaded(path: Path, device: str = "cuda", **options: Any) -> Iterator[slowllm.LM]:
    """Load on the pretended device, all stops streamed and slots poisoned unless told otherwise."""
    options = {"dtype": "fp32", "keep_resident": False, "poison": True, "ram": "4GiB", **options}
    with pretending():
        lm = slowllm.load(path, device=device, **options)
    with lm:
        yield lm


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu(), wanted, **CLOSE)


def forward_of(name: str, device: str = "cuda") -> None:
    wanted = resident(folder(name))(input_ids=IDS).logits
    with loaded(folder(name), device) as lm, torch.no_grad():
        assert lm.model.device == torch.device("pretend:0")
        found = lm.model(input_ids=IDS).logits
        assert found.device == torch.device("pretend:0")
        close(found, wanted)
        scores = slowllm.log_probs(
            lm.model, torch.roll(IDS, -1, 1), input_ids=IDS, attention_mask=torch.ones_like(IDS)
        )
        close(scores, wanted.log_softmax(-1).gather(-1, torch.roll(IDS, -1, 1)[..., None])[..., 0])


for _name in FAMILIES:
    CASES[f"forward_of_{_name}"] = lambda name=_name: forward_of(name)


@case
def a_left_over_tensor_is_found() -> None:
    there = torch.zeros(3, device="pretend:0")
    for wrong in (torch.zeros(3), torch.zeros(3, device="pretend:1")):
        try:
            there + wrong
        except RuntimeError:
            continue
        raise AssertionError("mixed devices went through")


@case
def two_devices_take_turns() -> None:
    for name in ("bloom", "llama-3-scaled-rope", "gemma-2-soft-cap", "gpt-neo-local-attention"):
        forward_of(name, "cuda:0,cuda:1")
    with loaded(folder("llama-3-scaled-rope"), "cuda:0,cuda:1") as lm:
        assert [home.device.index for home in lm.device_placement.homes] == [0, 1, 0]
        generated(lm)
        gradients(lm, folder("llama-3-scaled-rope"), rides_only=True)


@case
def stops_stay_on_the_device() -> None:
    with loaded(folder("bloom"), keep_resident=True, poison=False) as lm, torch.no_grad():
        wanted = resident(folder("bloom"))(input_ids=IDS).logits
        for _ in range(2):
            close(lm.model(input_ids=IDS).logits, wanted)
        read = lm.report.read_bytes
        lm.model(input_ids=IDS)
        assert lm.report.read_bytes == read


@case
def a_budget_divides_the_stops() -> None:
    path = Path(tempfile.mkdtemp())
    save_tiny("llama-2", path, shard="1GB", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    job = slowllm.Job(num_tokens=256, longest=64, repeated=True, forward_only=True, keeps_results=False)
    options = {"keep_resident": True, "poison": False, "job": job, "ram": "2GiB"}
    with loaded(path, vram=DEVICE_SLACK_BYTES + (75 << 20), **options) as lm, torch.no_grad():
        assert 0 < len(lm.device_placement.plan.kept) < lm.num_stops
        assert lm.device_placement.plan.num_slots == (2,)
        assert lm.plan.resident
        wanted = resident(path)(input_ids=IDS).logits
        for _ in range(2):
            close(lm.model(input_ids=IDS).logits, wanted)
        before = lm.report.read_bytes
        close(lm.model(input_ids=IDS).logits, wanted)
        stays = sum(p.num_bytes for stop in lm.resident for p in lm.layout.stops[stop])
        # The reader may be a stop ahead at either end.
        most = max(sum(p.num_bytes for p in stop) for stop in lm.layout.stops)
        assert lm.report.read_bytes - before <= lm.weight_bytes - stays + most


def generated(lm: slowllm.LM) -> None:
    path = lm.folder
    plain = resident(path)
    options: dict[str, Any] = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
    for extra in (
        {"do_sample": False},
        {"num_beams": 2, "do_sample": False},
        {"do_sample": True, "top_k": 20},
    ):
        torch.manual_seed(3)
        wanted = plain.generate(input_ids=IDS, **options, **extra)
        torch.manual_seed(3)
        assert torch.equal(
            lm.model.generate(input_ids=IDS.to(lm.model.device), **options, **extra).cpu(), wanted
        )
        torch.manual_seed(3)
        assert torch.equal(lm.model.generate(input_ids=IDS, **options, **extra).cpu(), wanted)


@case
def continuations() -> None:
    for name in ("bloom", "llama-3-scaled-rope"):
        with loaded(folder(name)) as lm:
            generated(lm)
    with loaded(short_bloom()) as lm, slowllm.load(short_bloom(), dtype="fp32") as plain:
        for settings in (
            {"max_new_tokens": 4, "top_log_probs": 2},
            {"max_new_tokens": 4, "num_beams": 2},
            {"max_new_tokens": 4, "do_sample": True, "seed": 1, "stop": (".",)},
        ):
            texts = ["The cat", "I am a very"]
            assert [[c.ids for c in group] for group in lm.generate(texts, **settings)] == [
                [c.ids for c in group] for group in plain.generate(texts, **settings)
            ]


@case
def scores_choices_and_shared_beginnings() -> None:
    with loaded(short_bloom()) as lm, slowllm.load(short_bloom(), dtype="fp32") as plain:
        texts = ["A cat sat.", "The dog barks at night."]
        for found, wanted in zip(lm.score(texts), plain.score(texts), strict=True):
            close(torch.tensor(found.log_probs), torch.tensor(wanted.log_probs))
        context = "One day, a little girl named Lily found a needle in her room. " * 4
        for choices in ([" yes", " no"], [" a long answer", " another one"]):
            close(
                torch.tensor(lm.choose([context, context], choices)),
                torch.tensor(plain.choose([context, context], choices)),
            )


def gradients(lm: slowllm.LM, path: Path, *, rides_only: bool = False) -> None:
    """Of a soft prompt on the processor, by the model's own loss; and of a plain call outside a ride.

    That takes autograd's threads for devices, of which a pretended one has a single one.
    """
    torch.manual_seed(0)
    start = torch.randn(1, 3, 64) * 0.1

    def loss_of(net: Any, prompt: torch.Tensor) -> torch.Tensor:
        text = net.get_input_embeddings()(IDS)
        embeds = torch.cat([prompt.expand(2, -1, -1).to(text.device), text], 1)
        labels = torch.cat([torch.full((2, 3), -100), IDS], 1)
        return net(inputs_embeds=embeds, labels=labels.to(text.device)).loss

    wanted = start.clone().requires_grad_(True)
    loss_of(resident(path), wanted).backward()

    def job() -> torch.Tensor:
        own = start.clone().requires_grad_(True)
        loss_of(lm.model, own).backward()
        assert own.grad is not None
        return own.grad

    for found in (*lm.ride([job, job]), *([] if rides_only else [job()])):
        close(found, wanted.grad)


@case
def soft_prompt_gradients() -> None:
    for name in ("bloom", "llama-3-scaled-rope", "mixtral"):
        with loaded(folder(name)) as lm:
            gradients(lm, folder(name))


@case
def prompts_of_every_kind() -> None:
    torch.manual_seed(0)
    with slowllm.load(short_bloom(), dtype="fp32") as probe:
        config = probe.config
    width, blocks, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    rows = torch.randn(3, width) * 0.1
    prompts = [
        slowllm.SoftPrompt("shallow", rows),
        slowllm.SoftPrompt("deep", rows, tuple(torch.randn(3, width) * 0.1 for _ in range(blocks))),
        slowllm.SoftPrompt(
            "prefix", pairs=tuple(torch.randn(2, heads, 3, width // heads) * 0.1 for _ in range(blocks))
        ),
    ]
    for prompt in prompts:
        for device in ("cuda", "cuda:0,cuda:1"):
            with (
                loaded(short_bloom(), device, prompt=prompt) as lm,
                slowllm.load(short_bloom(), dtype="fp32", prompt=prompt) as plain,
            ):
                for found, wanted in zip(lm.score(["A cat sat."]), plain.score(["A cat sat."]), strict=True):
                    close(torch.tensor(found.log_probs), torch.tensor(wanted.log_probs))
                assert lm.generate(["The cat"], max_new_tokens=3) == plain.generate(
                    ["The cat"], max_new_tokens=3
                )


@case
def tuning() -> None:
    rows = ["The value is returned.", "The name of the file.", "A list of numbers."]
    settings: dict[str, Any] = {"num_steps": 2, "batch_size": 2, "num_tokens": 2}
    for kind in ("shallow", "deep", "prefix"):
        for extra in ({}, {"top": 2}) if kind == "deep" else ({},):
            options = {**settings, "kind": kind, "dtype": "fp32", "keep_resident": False, **extra}
            with pretending():
                (found,) = slowllm.tune(short_bloom(), rows, rows[:1], device="cuda", **options)
            (wanted,) = slowllm.tune(short_bloom(), rows, rows[:1], **options)
            tensors = zip(tensors_of(found.prompt), tensors_of(wanted.prompt), strict=True)
            for ours, theirs in tensors:
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
            assert all(tensor.device.type == "cpu" for tensor in tensors_of(found.prompt))
            for ours, theirs in zip(found.records, wanted.records, strict=True):
                for key in ("loss", "validation_loss", "grad_norm"):
                    if key in theirs:
                        assert math.isclose(ours[key], theirs[key], rel_tol=1e-3), (kind, key)
    texts = [{"prompt": "It is", "label": " good"}, {"prompt": "That was", "label": " bad"}]
    labelled = {"labels": (" good", " bad"), "dtype": "fp32", **settings}
    with pretending():
        (found,) = slowllm.tune(short_bloom(), texts, device="cuda", **labelled)
    (wanted,) = slowllm.tune(short_bloom(), texts, **labelled)
    for ours, theirs in zip(found.records, wanted.records, strict=True):
        assert math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-3)


def tensors_of(prompt: slowllm.SoftPrompt) -> list[torch.Tensor]:
    return [t for t in (prompt.embeddings, *prompt.vectors, *prompt.pairs) if t is not None]


@case
def states_go_to_the_host_and_back() -> None:
    class Killed(BaseException):
        pass

    lines = [Line(n, "", tuple(range(5 + n, 14 + 2 * n))) for n in range(3)]
    save = ResumedWay._save
    for device in ("cuda", "cuda:0,cuda:1"):
        with loaded(folder("bloom"), device) as lm:
            whole = [likelihood.log_probs for _, likelihood in score_lines(lm, lines, prefix=None)]
            for stop in ("block", "chunk"):

                def save_and_die(book: ResumedWay, stop: str = stop) -> None:
                    save(book)
                    if (book._chunk if stop == "chunk" else book._block - 1) >= 0:
                        raise Killed

                kept = Path(tempfile.mkdtemp())
                ResumedWay._save = save_and_die
                try:
                    with State(kept, {"job": 1}, 0.0) as state:
                        list(score_lines(lm, lines, prefix=None, state=state))
                    raise AssertionError("was not killed")
                except Killed:
                    pass
                finally:
                    ResumedWay._save = save
                before = lm.report.num_passages
                with State(kept, {"job": 1}, 0.0) as state:
                    found = [
                        likelihood.log_probs
                        for _, likelihood in score_lines(lm, lines, prefix=None, state=state)
                    ]
                assert found == whole
                assert lm.report.num_passages - before < lm.num_stops
    assert computed_by(lm.model)["device"] == "pretend"


@case
def stores_decode_on_the_device() -> None:
    source = folder("llama-3-scaled-rope", torch.bfloat16)
    for name in ("bf16", "lossless", "int8", "int4"):
        store = Path(tempfile.mkdtemp()) / name
        convert(source, store, store=name, workers=1)
        for dtype in ("fp32", "bf16"):
            with slowllm.load(store, dtype=dtype) as plain, torch.no_grad():
                wanted = plain.model(input_ids=IDS).logits
            for options in ({}, {"keep_resident": True, "poison": False}):
                with loaded(store, dtype=dtype, **options) as lm, torch.no_grad():
                    found = lm.model(input_ids=IDS).logits.cpu()
                    # int8 multiplies integers where the processor may multiply rounded numbers.
                    loose = {"rtol": 0.05, "atol": 0.05} if dtype == "bf16" else CLOSE
                    torch.testing.assert_close(found, wanted, **loose)


@case
def weights_are_cast_on_the_device() -> None:
    path = folder("bloom", torch.bfloat16)
    wanted = resident(path, torch.float32)(input_ids=IDS).logits
    for device in ("cuda", "cuda:0,cuda:1"):
        with loaded(path, device) as lm:
            close(lm.model(input_ids=IDS).logits.detach(), wanted)
            gradients(lm, path, rides_only="," in device)


@case
def leaves_of_blocks() -> None:
    layout.MIN_LEAF_BYTES = 0
    for name in ("bloom", "llama-3-scaled-rope", "mixtral"):
        for device in ("cuda", "cuda:0,cuda:1"):
            with loaded(folder(name), device, granularity="leaves") as lm, torch.no_grad():
                assert lm.plan.granularity == "leaves"
                close(lm.model(input_ids=IDS).logits, resident(folder(name))(input_ids=IDS).logits)
    layout.MIN_LEAF_BYTES = 1 << 20


@cache
def coded_mixture(name: str) -> Path:
    """A mixture in the quantised format of its makers."""
    made = Path(tempfile.mkdtemp(prefix=f"coded-{name}-")) / "coded"
    settings, store = (
        ({"quant_method": "mxfp4"}, store_mxfp4)
        if name == "gpt-oss"
        else (fp8_settings((8, 16)), store_fp8((8, 16)))
    )
    return quantised(folder(name, torch.bfloat16), made, settings, store)


def experts_of(path: Path, device: str, dtype: str) -> None:
    """Experts that are read on demand have the bits of whole blocks on the same devices."""
    found = []
    for granularity in ("experts", "blocks"):
        with loaded(path, device, granularity=granularity, dtype=dtype) as lm:
            assert lm.plan.granularity == granularity
            embedded = lm.model.get_input_embeddings()(IDS).detach()

            def gradient(lm: Any = lm, embedded: torch.Tensor = embedded) -> torch.Tensor:
                own = embedded.clone().requires_grad_()
                lm.model(inputs_embeds=own, labels=IDS.to(lm.model.device)).loss.backward()
                assert own.grad is not None
                return own.grad.cpu()

            with torch.no_grad():
                tokens = lm.model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
                texts = [IDS, IDS[:1, :4], IDS[1:, :3]]
                jobs = [lambda ids=ids, lm=lm: lm.model(input_ids=ids).logits.cpu() for ids in texts]
                found.append([*lm.ride(jobs), jobs[0](), tokens.cpu()])
            found[-1] += lm.ride([gradient, gradient])
            if granularity == "experts":
                assert lm.experts.look_ahead is None
                name = lm.layout.experts[-1].full_names[0]
                assert lm.weights(name).device.type == "cpu"
    assert all(map(torch.equal, *found))
    with loaded(path, device, granularity="experts", dtype=dtype, exact=False) as lm, torch.no_grad():
        together = lm.ride([lambda ids=ids: lm.model(input_ids=ids).logits.cpu() for ids in texts])
        assert lm.experts.settings.stats.num_together
        for ours, theirs in zip(together, found[0], strict=False):
            torch.testing.assert_close(ours, theirs, atol=2e-4 if dtype == "fp32" else 0.02, rtol=0)


@case
def experts_on_demand() -> None:
    for device in ("cuda", "cuda:0,cuda:1"):
        experts_of(folder("mixtral"), device, "fp32")


@case
def experts_in_float4_on_demand() -> None:
    for device in ("cuda", "cuda:0,cuda:1"):
        experts_of(coded_mixture("gpt-oss"), device, "bf16")


@case
def experts_in_float8_on_demand() -> None:
    for device in ("cuda", "cuda:0,cuda:1"):
        experts_of(coded_mixture("deepseek-v3"), device, "bf16")


@case
def gradients_through_experts_on_demand() -> None:
    for device in ("cuda", "cuda:0,cuda:1"):
        with loaded(folder("mixtral"), device, granularity="experts") as lm:
            gradients(lm, folder("mixtral"), rides_only="," in device)


@case
def an_expert_that_cannot_be_brought() -> None:
    with loaded(folder("mixtral"), "cuda:0,cuda:1", granularity="experts") as lm, torch.no_grad():
        texts = [IDS[:1, :1], IDS[1:, 2:3], IDS[:1, 3:4], IDS[1:, 4:5]]
        wanted, needed = [], []
        for ids in texts:
            before = lm.experts.forecast.chosen.copy()
            wanted.append(lm.model(input_ids=ids).logits)
            needed.append(set((lm.experts.forecast.chosen - before).nonzero()[0].tolist()))
        (broken, *_) = needed[0] - set.intersection(*needed)
        inner = lm.experts.kept.visit

        def visit(unit: int, upcoming: Any = ()) -> Any:
            if unit == broken:
                raise OSError("the disk failed")
            return inner(unit, upcoming)

        lm.experts.kept.visit = visit

        def job(ids: torch.Tensor) -> torch.Tensor | None:
            try:
                return lm.model(input_ids=ids).logits
            except OSError:
                return None

        for found, logits, units in zip(
            lm.ride([lambda ids=ids: job(ids) for ids in texts]), wanted, needed, strict=True
        ):
            assert (found is None) == (broken in units)
            assert found is None or torch.equal(found.cpu(), logits.cpu())


@case
def drafts_of_both_kinds() -> None:
    texts = ["The value is the value of the value", "A list of"]
    with loaded(TINY_BLOOM) as lm, slowllm.load(TINY_BLOOM, dtype="fp32") as small:
        prompts = [encode_prompt(lm, text, Settings(5)) for text in texts]
        plain = list(generation.generate(lm, prompts))
        assert list(speculative.generate(lm, prompts, small)) == plain
        assert list(speculative.generate(lm, prompts, "lookup")) == plain


@case
def peft_prompts() -> None:
    import peft

    kinds = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    for config in kinds.values():
        found = []
        plain = resident(folder("llama-3-scaled-rope"))
        with loaded(folder("llama-3-scaled-rope")) as lm:
            for net in (plain, lm.model):
                torch.manual_seed(0)
                adapted = peft.get_peft_model(net, config(task_type="CAUSAL_LM", num_virtual_tokens=3))
                if net is lm.model:
                    adapted.prompt_encoder.to(lm.model.device)
                where = net.device
                adapted(
                    input_ids=IDS.to(where),
                    labels=IDS.to(where),
                    attention_mask=torch.ones_like(IDS).to(where),
                ).loss.backward()
                found.append([p.grad.cpu() for p in adapted.parameters() if p.requires_grad])
        assert found[0]
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)


@case
def whole_logits_where_the_head_cannot_be_parted() -> None:
    with loaded(folder("bloom")) as lm, slowllm.load(folder("bloom"), dtype="fp32") as plain:
        targets = torch.roll(IDS, -1, 1)
        for each in (lm, plain):
            each.model.get_output_embeddings().logit_transform = None
        close(
            slowllm.log_probs(lm.model, targets, input_ids=IDS),
            slowllm.log_probs(plain.model, targets, input_ids=IDS),
        )
        rows, positions = torch.tensor([0, 1]), torch.tensor([2, 4])
        for function in (losses.token_losses,):
            close(
                function(lm.model, rows, positions, torch.tensor([3, 4]), input_ids=IDS).detach(),
                function(plain.model, rows, positions, torch.tensor([3, 4]), input_ids=IDS).detach(),
            )
        choices = torch.tensor([7, 8])
        close(
            losses.choice_logits(lm.model, rows, positions, choices, {"input_ids": IDS}).detach(),
            losses.choice_logits(plain.model, rows, positions, choices, {"input_ids": IDS}).detach(),
        )


@case
def an_infinite_number_is_named() -> None:
    with loaded(folder("bloom")) as lm, torch.no_grad():
        embeds = lm.model.get_input_embeddings()(IDS).clone()
        embeds[1, 2], named = float("nan"), ""
        try:
            lm.model(inputs_embeds=embeds, attention_mask=torch.ones_like(IDS))
        except NonFiniteError as error:
            named = str(error)
    assert named.startswith("transformer.h.0: NaN in the output at position [1, ")


@case
def a_survey_names_the_devices() -> None:
    with pretending():
        job = slowllm.Job(num_tokens=64, longest=32, forward_only=True)
        found = survey.survey(ModelInfo(TINY_BLOOM), ram="4GiB", device="cuda", dtype="fp32", job=job)
    assert [name for name, _, _ in found.devices] == ["pretend:0"]
    assert found.devices[0][2] == found.num_stops
    assert found.smallest_bytes < found.ram_bytes


@case
def parts_of_a_model() -> None:
    path, there = folder("llama-3-scaled-rope"), torch.device("pretend:0")

    def part(part: Part | None, device: str) -> StreamedLM:
        with pretending():
            return load.open_model(
                StreamedLM,
                path,
                part=part,
                device=device,
                dtype="fp32",
                keep_resident=False,
                poison=True,
                ram="4GiB",
            )

    def output_after(lm: StreamedLM, way: Any) -> Any:
        with torch.no_grad(), call_context(way=way):
            try:
                lm.model(input_ids=IDS, use_cache=False)
            except StopForward:
                return way.output
        raise AssertionError("the pass did not end")

    with part(None, "cpu") as whole, torch.no_grad():
        known, wanted, last = (output_after(whole, StopAfterBlocks(number)) for number in (1, 2, 3))
        logits = whole.model(input_ids=IDS).logits
    for names in ("cuda", "cuda:0,cuda:1"):
        with part(Part.span(1, 2), names) as lm:
            found = output_after(lm, Inside(1, 2, known.to(there)))
            assert found.device.type == there.type
            close(found, wanted)
            assert lm.model.get_input_embeddings().weight.stride() == (0, 0)
    with part(Part.ends(3), "cuda") as lm, torch.no_grad(), call_context(way=Known(last.to(there))):
        close(lm.model(input_ids=IDS).logits, logits)


def main() -> None:
    """Run the cases named, or all, and print what failed."""
    transformers.logging.set_verbosity_error()
    pretended.register()
    chosen = sys.argv[1:] or list(CASES)
    failed: dict[str, str | None] = {}
    for name in chosen:
        try:
            CASES[name]()
            failed[name] = None
        except BaseException:
            failed[name] = traceback.format_exc()
    print(json.dumps(failed))
