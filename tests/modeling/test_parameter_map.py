"""Every parameter is found on disk, byte for byte as transformers itself loads it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightRenaming,
)
from transformers.core_model_loading import WeightConverter as Converter

from slowllm.errors import ArchitectureError, CheckpointError
from slowllm.modeling import parameter_map
from slowllm.modeling.fused_parameters import MAX_RUNS, _covering, _probe_scale, place_fused
from slowllm.modeling.parameter_map import place
from slowllm.modeling.skeleton import build_skeleton, read_config
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.shard import read_header
from slowllm.storage.spans import Placement, Run, Span
from tests.support.families import family_cases, resident, save_tiny
from tests.support.properties import num_examples

Tensors = dict[str, Tensor]


def build(placement: Placement) -> Tensor:
    """Fill a parameter by following its runs, one after the other."""
    filled = bytearray()
    for run in placement.runs:
        assert run.target == len(filled), "runs lie in order, without holes or overlap"
        assert 0 <= run.source <= run.source + run.num_bytes <= run.span.num_bytes
        with open(run.span.path, "rb") as file:
            file.seek(run.span.offset + run.source)
            filled += file.read(run.num_bytes)
    assert len(filled) == placement.num_bytes
    if not filled:
        return torch.empty(placement.shape, dtype=placement.dtype)
    return torch.frombuffer(filled, dtype=placement.dtype).view(placement.shape)


def placements_of(folder: Path) -> dict[str, Placement]:
    model = build_skeleton(read_config(folder), folder, torch.float32)
    return place(model, Checkpoint.open(folder).spans)


def check(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Placement]:
    """Compare every parameter and persistent buffer with what from_pretrained makes of the same folder."""
    found = placements_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    wanted = model.state_dict()
    tied = model.all_tied_weights_keys
    assert found.keys() <= wanted.keys()
    for name, tensor in wanted.items():
        if name not in found:
            assert tied.get(name) in found, name
            continue
        assert found[name].name == name
        assert torch.equal(build(found[name]).to(tensor.dtype), tensor), name
    return found


def tensors_of(folder: Path) -> Tensors:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def rewrite(folder: Path, shards: Sequence[Tensors], index: bool = True) -> None:
    """Replace the weights of a folder."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    names = (
        [f"part-{number}.safetensors" for number in range(len(shards))] if index else ["model.safetensors"]
    )
    for name, shard in zip(names, shards, strict=True):
        contiguous = {key: tensor.contiguous() for key, tensor in shard.items()}
        save_file(contiguous, folder / name, {"format": "pt"})
    if index:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )


# Every family, every layout


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensors]:
    """Return the tensors of a tiny family as save_pretrained names them, and leave its config in `folder`."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(folder: Path, name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Tensors:
        key = (name, dtype, *overrides.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("saved")
            save_tiny(name, made[key], dtype, **overrides)
        for path in made[key].glob("*.json"):
            if "index" not in path.name:
                (folder / path.name).write_bytes(path.read_bytes())
        return tensors_of(made[key])

    return get


Saved = Callable[..., Tensors]


def prefix_of(folder: Path) -> str:
    return f"{build_skeleton(read_config(folder), folder, torch.float32).base_model_prefix}."


def dealt(tensors: Tensors, num_shards: int) -> list[Tensors]:
    """Deal tensors out like cards: each block lies in every shard."""
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[start::num_shards]} for start in range(num_shards)]


def block_of(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def paired(tensors: Tensors) -> list[Tensors]:
    """What stands outside the blocks in one shard, all blocks in another."""
    return [
        {name: tensor for name, tensor in tensors.items() if (block_of(name) < 0) == outside}
        for outside in (True, False)
    ]


def unprefixed(tensors: Tensors, prefix: str) -> Tensors:
    short = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert short.keys() != tensors.keys()
    return short


# Single tensors on disk for each of so many experts.
EXPERTS = {"mixtral": 4, "qwen3-moe": 4, "olmoe": 4, "deepseek-v3": 16}


@pytest.mark.parametrize("name", family_cases())
def test_a_block_may_lie_across_three_shards(saved: Saved, tmp_path: Path, name: str) -> None:
    tensors = saved(tmp_path, name)
    rewrite(tmp_path, dealt(tensors, 3))
    found = check(tmp_path)
    shards = {run.span.path for name, p in found.items() if block_of(name) == 1 for run in p.runs}
    assert len(shards) == 3


@pytest.mark.parametrize("name", ["bloom", "llama-2", "mixtral", "gpt2", "opt"])
def test_three_blocks_may_lie_in_one_shard(saved: Saved, tmp_path: Path, name: str) -> None:
    rewrite(tmp_path, paired(saved(tmp_path, name)))
    check(tmp_path)


# On disk the multimodal model's names begin with the part that they belong to.
@pytest.mark.parametrize("name", family_cases(leave_out={"gemma-3-with-a-tower"}))
def test_names_may_lack_the_prefix(saved: Saved, tmp_path: Path, name: str) -> None:
    tensors = saved(tmp_path, name)
    rewrite(tmp_path, [unprefixed(tensors, prefix_of(tmp_path))], index=False)
    check(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bloom", "mixtral", "gpt2", "gemma-2-soft-cap", "qwen3-moe", "opt"])
def test_half_precision_is_placed_as_stored(
    saved: Saved, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    rewrite(tmp_path, dealt(saved(tmp_path, name, dtype), 2))
    assert {placement.dtype for placement in check(tmp_path, dtype).values()} == {dtype}


def test_dtypes_may_differ_from_tensor_to_tensor(saved: Saved, tmp_path: Path) -> None:
    tensors = saved(tmp_path, "llama-2", torch.bfloat16)
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    rewrite(tmp_path, [mixed])
    found = check(tmp_path)
    assert found["model.norm.weight"].dtype == torch.float32
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_a_name_that_is_right_already_is_kept_though_a_renaming_would_change_it(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(tmp_path, [saved(tmp_path, "llama-2")])
    renaming = WeightRenaming("mlp.up_proj", "mlp.nowhere")
    monkeypatch.setattr(parameter_map, "get_model_conversion_mapping", lambda model: [renaming])
    found = placements_of(tmp_path)
    assert found["model.layers.1.mlp.up_proj.weight"].runs[0].span.name == "model.layers.1.mlp.up_proj.weight"


# Fused experts


@pytest.mark.parametrize("cut", [dealt, lambda tensors, _: [tensors]], ids=["dealt", "together"])
@pytest.mark.parametrize("name", EXPERTS)
def test_single_experts_are_fused_in_place(
    saved: Saved, tmp_path: Path, name: str, cut: Callable[[Tensors, int], list[Tensors]]
) -> None:
    tensors = saved(tmp_path, name)
    assert sum("experts.1." in key for key in tensors), "save_pretrained writes single experts"
    rewrite(tmp_path, cut(tensors, 3))
    found = check(tmp_path)
    fused = [placement for key, placement in found.items() if "experts.gate_up_proj" in key]
    # Gate and up of each expert.
    assert fused
    assert {len(placement.runs) for placement in fused} == {2 * EXPERTS[name]}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_may_be_fused_already(saved: Saved, tmp_path: Path, name: str) -> None:
    saved(tmp_path, name)
    rewrite(tmp_path, [saved(tmp_path, name)])
    resident(tmp_path).save_pretrained(tmp_path / "fused", save_original_format=False, max_shard_size="60KB")
    found = check(tmp_path / "fused")
    assert {len(placement.runs) for placement in found.values()} == {1}


def test_ten_and_more_experts_keep_their_order(saved: Saved, tmp_path: Path) -> None:
    # As text, experts.10 comes before experts.2.
    tensors = saved(tmp_path, "mixtral", num_local_experts=12, num_hidden_layers=1)
    rewrite(tmp_path, dealt(tensors, 2))
    check(tmp_path)


# Tied heads

TIED = ["bloom", "llama-tied", "gpt2", "opt", "gemma-2-soft-cap", "falcon-new-decoder"]


def names_of_tied(folder: Path) -> tuple[str, str]:
    tied = build_skeleton(read_config(folder), folder, torch.float32).all_tied_weights_keys
    ((head, embedding),) = tied.items()
    return head, embedding


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_may_be_absent(saved: Saved, tmp_path: Path, name: str) -> None:
    tensors = saved(tmp_path, name)
    head, embedding = names_of_tied(tmp_path)
    assert head not in tensors
    rewrite(tmp_path, [tensors])
    found = check(tmp_path)
    assert head not in found
    assert embedding in found


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_may_be_present(saved: Saved, tmp_path: Path, name: str) -> None:
    tensors = saved(tmp_path, name)
    head, embedding = names_of_tied(tmp_path)
    rewrite(tmp_path, dealt({**tensors, head: tensors[embedding].clone()}, 2))
    assert {head, embedding} <= check(tmp_path).keys()


@pytest.mark.parametrize("name", ["bloom", "llama-tied"])
def test_a_tied_embedding_may_stand_under_the_heads_name(saved: Saved, tmp_path: Path, name: str) -> None:
    tensors = saved(tmp_path, name)
    head, embedding = names_of_tied(tmp_path)
    tensors[head] = tensors.pop(embedding)
    rewrite(tmp_path, [tensors])
    found = placements_of(tmp_path)
    assert head in found
    assert embedding not in found


# What is wrong with a checkpoint, in its own words

UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2"


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(names)}


def also(**changes: Callable[[Tensors], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{name: make(tensors) for name, make in changes.items()}}


BROKEN: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "missing tensor": (
        "llama-2", without(UP), r"^model\.layers\.1\.mlp\.up_proj\.weight: missing from the checkpoint \(part-0.*others\)"
    ),
    "missing tensors": (
        "llama-2", without(UP, "model.norm.weight", "lm_head"), r"lm_head\.weight and 2 more: missing|and 2 more: missing"
    ),
    "missing head": ("llama-2", without("lm_head"), r"^lm_head\.weight: missing from the checkpoint"),
    "missing block": ("llama-2", without("model.layers.2."), r"^model\.layers\.2\.\S+ and 8 more: missing"),
    "missing expert": (
        "mixtral", without(EXPERT),
        r"layers\.1\.mlp\.experts\.\w+ needs shape \[4, \d+, \d+\], which parts such as \S+1\.block\S+ .* one is missing",
    ),
    "missing half of the experts": (
        "mixtral", without(EXPERT, EXPERT.replace("2", "3")),
        r"layers\.1\.mlp\.experts\.\w+ needs shape \[4, \d+, \d+\], which parts such as",
    ),
    "missing all experts": (
        "mixtral", without("model.layers.1.block_sparse_moe.experts"), r"layers\.1\.mlp\.experts\.\w+ and 1 more: missing"
    ),
    "missing part of an expert": (
        "mixtral", without(f"{EXPERT}.w1"), r"layers\.1\.mlp\.experts\.gate_up_proj: its 7 parts do not fit together"
    ),
    "expert beyond the config": (
        "mixtral",
        lambda t: {**t, **{f"{EXPERT.replace('.2', '.4')}.w{i}.weight": t[f"{EXPERT}.w{i}.weight"].clone() for i in (1, 2, 3)}},
        r"needs shape \[4, \d+, \d+\], which parts such as .* do not make",
    ),
    "wrong shape": (
        "llama-2", also(**{UP: lambda t: t[UP][:, 1:]}),
        r"^part-\d\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight has shape \[96, 63\] but \S+ needs \[96, 64\]",
    ),
    "transposed": ("llama-2", also(**{UP: lambda t: t[UP].T}), r"has shape \[64, 96\] but \S+ needs \[96, 64\]"),
    "wrong shape of an expert": (
        "mixtral", also(**{f"{EXPERT}.w2.weight": lambda t: t[f"{EXPERT}.w2.weight"][1:]}), r"its 4 parts do not fit together"
    ),
    "twins": (
        "llama-2", also(**{UP.removeprefix("model."): lambda t: t[UP].clone()}),
        r"model\.layers\.1\.mlp\.up_proj\.weight and \S+ are both model\.layers\.1\.mlp\.up_proj\.weight; one must go"
        r"|layers\.1\.mlp\.up_proj\.weight and model\S+ are both",
    ),
    "twin of an expert": (
        "mixtral", also(**{f"{EXPERT}.w2.weight".removeprefix("model."): lambda t: t[f"{EXPERT}.w2.weight"].clone()}),
        r"experts\.down_proj needs shape \[4, \d+, \d+\], which parts such as",
    ),
    "fused and single experts": (
        "mixtral", also(**{"model.layers.1.mlp.experts.down_proj": lambda t: torch.zeros(4, 64, 96)}),
        r"^model\.layers\.1\.mlp\.experts\.down_proj is filled twice",
    ),
    "block beyond the config": (
        "llama-2", also(**{UP.replace("1", "3"): lambda t: t[UP].clone()}),
        r"^model\.layers\.3\.mlp\.up_proj\.weight belongs to a block beyond the 3 that config\.json names",
    ),
    "dtypes of the parts": (
        "mixtral", also(**{f"{EXPERT}.w3.weight": lambda t: t[f"{EXPERT}.w3.weight"].bfloat16()}),
        r"experts\.gate_up_proj: its parts are stored in different dtypes, \['torch\.bfloat16', 'torch\.float32'\]",
    ),
    "dtype that cannot be computed with": (
        "llama-2", also(**{UP: lambda t: t[UP].to(torch.float8_e4m3fn)}), r"up_proj\.weight is stored as F8_E4M3, and the checkpoint has no scales"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "words"), BROKEN.values(), ids=BROKEN)
def test_a_checkpoint_is_refused_with(
    saved: Saved, tmp_path: Path, name: str, change: Callable[[Tensors], Tensors], words: str
) -> None:
    rewrite(tmp_path, dealt(change(saved(tmp_path, name)), 2))
    with pytest.raises(CheckpointError, match=words):
        placements_of(tmp_path)


def test_tensors_that_belong_to_nothing_are_told_and_left(
    saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = saved(tmp_path, "llama-2")
    rewrite(tmp_path, [{**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}])
    with caplog.at_level("WARNING", logger="slowllm.modeling.parameter_map"):
        check(tmp_path)
    assert (
        "1 tensors belong to no parameter and are not read: model.layers.0.self_attn.rotary_emb"
        in caplog.text
    )


def test_what_the_models_class_ignores_is_left_in_silence(
    saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = saved(tmp_path, "gpt2")
    rewrite(tmp_path, [{**tensors, "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}])
    with caplog.at_level("WARNING", logger="slowllm.modeling.parameter_map"):
        check(tmp_path)
    assert not caplog.text


# The arithmetic of boxes and runs


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For hypothesis, which writes over what its last example left."""
    return tmp_path_factory.mktemp("examples")


class Op(ConversionOps):
    """A conversion of our own: what it does with the list of source tensors is given."""

    def __init__(self, make: Callable[[list[Tensor]], Tensor | dict[str, Tensor]]) -> None:
        self.make = make

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
        made = self.make(list(itertools.chain.from_iterable(input_dict.values())))
        return made if isinstance(made, dict) else {target_patterns[0]: made}

    def __deepcopy__(self, memo: Any) -> Op:
        return self


def spans_of(folder: Path, tensors: Sequence[Tensor]) -> list[Span]:
    path = folder / "model.safetensors"
    save_file({f"source.{number}": tensor.contiguous() for number, tensor in enumerate(tensors)}, path)
    spans = read_header(path)
    return [spans[f"source.{number}"] for number in range(len(tensors))]


def fuse(
    spans: Sequence[Span],
    wanted: Mapping[str, tuple[int, ...]],
    operations: list[ConversionOps],
    patterns: Sequence[str] = ("source",),
    of_pattern: Callable[[int], str] = lambda _: "source",
) -> Iterator[Placement]:
    model: Any = SimpleNamespace(config=None)
    empty = {name: torch.empty(shape, device="meta") for name, shape in wanted.items()}
    converter = Converter([*patterns], [*wanted], operations)
    sources = [(of_pattern(number), span) for number, span in enumerate(spans)]
    return place_fused(model, next(iter(wanted)), converter, sources, empty)


def fused(spans: Sequence[Span], shape: tuple[int, ...], *operations: ConversionOps) -> Placement:
    (placement,) = fuse(spans, {"target": shape}, [*operations])
    return placement


@st.composite
def plans(draw: st.DrawFn) -> tuple[tuple[int, int], int, Callable[[list[Tensor]], Tensor], bool]:
    """Shape and number of the sources, how they are nested, and whether one of them is cut."""
    cut = draw(st.integers(0, 3)) == 0
    # Powers of two where a source is cut in half, so that its probe can be cut too.
    lengths = st.sampled_from([8, 16]) if cut else st.sampled_from([1, 2, 3, 4, 6, 8, 12, 35])
    shape = (draw(lengths), draw(lengths))
    number = draw(st.integers(1, 6))
    steps: list[tuple[Any, ...]] = [("halve", draw(st.integers(0, 1)))] if cut else []
    count, dims = number * (2 if cut else 1), 2
    while count > 1 or not steps:
        steps.append(("order", draw(st.permutations(range(count)))))
        size = draw(
            st.sampled_from([n for n in range(1, count + 1) if count % n == 0 and (n > 1 or count == 1)])
        )
        kind = draw(st.sampled_from(["stack", "cat"]))
        steps.append((kind, size, draw(st.integers(0, dims if kind == "stack" else dims - 1))))
        count //= size
        dims += kind == "stack"

    def make(pool: list[Tensor]) -> Tensor:
        for kind, *more in steps:
            if kind == "halve":
                pool = [half for tensor in pool for half in tensor.chunk(2, dim=more[0])]
            elif kind == "order":
                pool = [pool[place] for place in more[0]]
            else:
                size, dim = more
                join = torch.stack if kind == "stack" else torch.cat
                pool = [join(pool[at : at + size], dim=dim) for at in range(0, len(pool), size)]
        return pool[0]

    return shape, number, make, cut


@num_examples(250)
@given(plan=plans(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
def test_any_nest_of_stacks_and_concatenations_is_placed_right(
    shared_folder: Path, plan: Any, dtype: torch.dtype
) -> None:
    shape, number, make, cut = plan
    size = math.prod(shape)
    sources = [(torch.arange(size) + i * size).remainder(251).view(shape).to(dtype) for i in range(number)]
    wanted = make(sources)
    spans = spans_of(shared_folder, sources)
    try:
        placement = fused(spans, tuple(wanted.shape), Op(make))
    except (ArchitectureError, CheckpointError):
        assert cut, "only halves that part ways cannot be read in place"
        return
    assert torch.equal(build(placement), wanted)


@num_examples(100)
@given(
    halves=st.integers(1, 12),
    other=st.integers(1, 12),
    num_targets=st.integers(2, 4),
    dim=st.integers(0, 1),
)
def test_a_tensor_is_cut_into_parameters(
    shared_folder: Path, halves: int, other: int, num_targets: int, dim: int
) -> None:
    # With 11 times 2 by 8, a probe cut to the common divisor alone would have 11 rows, and no two equal parts.
    shape = (halves * num_targets, other) if dim == 0 else (other, halves * num_targets)
    source = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    parts = source.chunk(num_targets, dim=dim)
    wanted = {f"target.{number}": tuple(part.shape) for number, part in enumerate(parts)}
    found = list(fuse(spans_of(shared_folder, [source]), wanted, [Chunk(dim=dim)]))
    assert [placement.name for placement in found] == [*wanted]
    for placement, part in zip(found, parts, strict=True):
        assert torch.equal(build(placement), part)


def test_the_conversions_of_transformers_chain(tmp_path: Path) -> None:
    sources = [torch.randn(6, 4) for _ in range(6)]
    (placement,) = fuse(
        spans_of(tmp_path, sources),
        {"experts": (3, 12, 4)},
        [MergeModulelist(dim=0), Concatenate(dim=1)],
        patterns=("w1", "w3"),
        of_pattern=lambda number: ("w1", "w3")[number % 2],
    )
    wanted = torch.cat([torch.stack(sources[0::2]), torch.stack(sources[1::2])], dim=1)
    assert torch.equal(build(placement), wanted)
    assert len(placement.runs) == 6


def test_scalars_are_stacked_and_empty_tensors_skipped(tmp_path: Path) -> None:
    scalars = [torch.tensor(float(number)) for number in range(3)]
    placement = fused(spans_of(tmp_path, scalars), (3,), MergeModulelist(dim=0))
    assert build(placement).tolist() == [0.0, 1.0, 2.0]
    parts = [torch.zeros(0, 4), torch.ones(2, 4)]
    placement = fused(spans_of(tmp_path, parts), (2, 4), Concatenate(dim=0))
    assert torch.equal(build(placement), parts[1])


def test_neighbours_on_disk_and_in_memory_are_one_run(tmp_path: Path) -> None:
    (span,) = spans_of(tmp_path, [torch.randn(8, 4)])
    (run,) = fused([span], (8, 4), Op(lambda pool: torch.cat(pool[0].chunk(2)))).runs
    assert (run.source, run.target, run.num_bytes) == (0, 0, 8 * 4 * 4)


@pytest.mark.parametrize("shape", [(6, 4), (8, 8), (2, 3), (35, 21), (16, 2)])
def test_a_transposition_is_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    words = r"target: transformers reorders source\.0 on loading, which cannot be read in place; save"
    with pytest.raises(ArchitectureError, match=words):
        fused(spans_of(tmp_path, [torch.zeros(shape)]), shape[::-1], Transpose(0, 1))


def test_a_transposition_that_moves_nothing_is_read(tmp_path: Path) -> None:
    source = torch.randn(8, 1)
    assert torch.equal(build(fused(spans_of(tmp_path, [source]), (1, 8), Transpose(0, 1))), source.T)


def test_reversed_and_repeated_elements_are_refused(tmp_path: Path) -> None:
    spans = spans_of(tmp_path, [torch.zeros(4, 4)])
    with pytest.raises(ArchitectureError, match="transformers reorders"):
        fused(spans, (4, 4), Op(lambda pool: pool[0].flip(0)))
    with pytest.raises(ArchitectureError, match="transformers reorders"):
        fused(spans, (8, 4), Op(lambda pool: torch.cat([pool[0], pool[0]])))


def test_a_conversion_that_leaves_a_hole_is_refused(tmp_path: Path) -> None:
    spans = spans_of(tmp_path, [torch.zeros(4, 4)])
    with pytest.raises(
        CheckpointError, match=r"target: the 1 parts found fill 0 of its 128 bytes; a tensor is missing"
    ):
        fused(spans, (8, 4), Op(lambda pool: torch.cat([torch.full_like(pool[0], -1), pool[0]])))


def test_bytes_that_are_covered_twice_are_refused() -> None:
    # As many bytes as are needed, and half of them not filled.
    runs = [Run(far(4, name=name), 0, 0, 4) for name in ("source.0", "source.1")]
    with pytest.raises(CheckpointError, match=r"target: the 2 parts found fill 4 of its 8 bytes"):
        _covering("target", runs, 8, [("source", run.span) for run in runs])


def test_a_conversion_into_an_unknown_parameter_is_refused(tmp_path: Path) -> None:
    spans = spans_of(tmp_path, [torch.zeros(4, 4)])
    with pytest.raises(
        ArchitectureError, match="other: transformers' conversion makes it, but the model has no such"
    ):
        fused(spans, (4, 4), Op(lambda pool: {"other": pool[0]}))


def test_parts_of_the_wrong_size_are_refused(tmp_path: Path) -> None:
    spans = spans_of(tmp_path, [torch.zeros(4, 4)])
    for shape in ((8, 8), (4, 5), (16,), (4, 4, 1), (2, 8)):
        with pytest.raises(
            CheckpointError, match=r"target needs shape \[.*\], which parts such as source\.0 \[4, 4\] do not"
        ):
            fused(spans, shape, Concatenate(dim=0))


def far(*shape: int, name: str = "source.0") -> Span:
    """A span that no file is needed for."""
    return Span(name, Path("model.safetensors"), "U8", shape, 0, math.prod(shape))


def test_a_tensor_in_too_many_pieces_is_refused() -> None:
    side = math.isqrt(MAX_RUNS)
    interleaved = Op(lambda pool: torch.stack(pool, dim=-1))
    spans = [far(side, 2 * side, name=f"source.{number}") for number in range(2)]
    words = (
        rf"a tensor of shape \[{side}, {2 * side}, 2\] would have to be read in {2 * side * side:,} pieces"
    )
    with pytest.raises(ArchitectureError, match=words):
        fused(spans, (side, 2 * side, 2), interleaved)
    # Each just within the limit, both together beyond it.
    spans = [far(side, side, name=f"source.{number}") for number in range(2)]
    with pytest.raises(
        ArchitectureError, match=rf"target: would have to be read in {2 * side * side:,} pieces"
    ):
        fused(spans, (side, side, 2), interleaved)


def test_shapes_without_a_common_divisor_are_refused_when_large() -> None:
    with pytest.raises(ArchitectureError, match="target: its parts have shapes that cannot be traced"):
        fused([far(4099, 4111)], (4099, 4111), Concatenate(dim=0))


@num_examples(200)
@given(lengths=st.lists(st.integers(1, 60).map(lambda n: n * 12 if n > 5 else n), max_size=5))
def test_a_probe_keeps_two_of_every_side(lengths: list[int]) -> None:
    scale = _probe_scale(lengths)
    assert all(length % scale == 0 for length in lengths)
    assert all(length // scale >= 2 for length in lengths if length > 1)
    larger = range(scale + 1, max(lengths, default=1) + 1)
    for other in larger:
        assert any(length % other for length in lengths) or any(1 < n < 2 * other for n in lengths)
