"""Checkpoints of compressed-tensors are read as they are, and compute what the package's own weights compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import slowllm
from slowllm.errors import CheckpointError
from slowllm.modeling.native.formats import find_native
from slowllm.storage.codecs.registry import CODECS
from tests.support.cases import crossed
from tests.support.compressed_checkpoints import CASES, settings_of, store_compressed, store_decompressed
from tests.support.damaged_checkpoints import change_settings, change_tensors, damaged_spans, spans_of
from tests.support.families import save_tiny
from tests.support.native_checkpoints import plain_copy, quantised
from tests.support.properties import num_examples

IDS = torch.arange(5, 25)[None]
MODULE = "model.layers.1.mlp.up_proj"
IN_BFLOAT16 = ("int4 groups", "int8 channels", "plain int8", "float8 tensors", "float8 blocks")
FAMILIES = [
    ("mixtral", "int4 groups"), ("mixtral", "float8 channels"), ("deepseek-v3", "nvfp4"), ("qwen3-moe", "int8 channels"),
    ("olmoe", "int4 groups with zeros"),
]  # fmt: skip


def compressed(name: str, case: str, tmp_path: Path) -> Path:
    save_tiny(name, tmp_path / "plain", torch.bfloat16)
    return quantised(tmp_path / "plain", tmp_path / "stored", settings_of(case), store_compressed(case))


def assert_same(name: str, case: str, dtype: str, resident: bool, tmp_path: Path) -> None:
    folder = compressed(name, case, tmp_path)
    back = plain_copy(tmp_path / "plain", tmp_path / "back", store_decompressed(case))
    model = AutoModelForCausalLM.from_pretrained(
        back, dtype=getattr(torch, dtype), experts_implementation="eager"
    )
    with torch.no_grad(), slowllm.load(folder, dtype=dtype, resident=resident) as lm:
        assert torch.equal(lm.model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("case", "dtype"),
    crossed(
        CASES,
        ["float32", "bfloat16"],
        # What is rounded to the dtype of the scales shows in float32 only.
        quick=[(case, "bfloat16" if case in IN_BFLOAT16 else "float32") for case in CASES],
    ),
)
def test_logits_are_those_of_the_decompressed_model(case: str, dtype: str, tmp_path: Path) -> None:
    assert_same("llama-2", case, dtype, False, tmp_path)


@pytest.mark.parametrize(
    ("family", "resident"),
    crossed(FAMILIES, [True, False], quick=[(FAMILIES[0], True), (FAMILIES[1], False), (FAMILIES[2], False)]),
)
def test_mixtures_are_those_of_the_decompressed_model(
    family: tuple[str, str], resident: bool, tmp_path: Path
) -> None:
    name, case = family
    assert_same(name, case, "bfloat16", resident, tmp_path)


@pytest.mark.parametrize("case", ["int4 groups with zeros", "nvfp4"])
def test_tokens_and_gradients_are_those_of_the_decompressed_model(case: str, tmp_path: Path) -> None:
    folder = compressed("llama-2", case, tmp_path)
    back = plain_copy(tmp_path / "plain", tmp_path / "back", store_decompressed(case))
    found = []
    for one in (folder, back):
        with slowllm.load(one, dtype="float32", resident=False) as lm:
            embedded = lm.model.get_input_embeddings()(IDS).detach().requires_grad_()
            loss = lm.model(inputs_embeds=embedded, labels=IDS).loss
            loss.backward()
            tokens = lm.model.generate(IDS, max_new_tokens=5, do_sample=False)
            found.append((loss.detach(), embedded.grad, tokens))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_groups_of_several_kinds_are_told_apart(tmp_path: Path) -> None:
    """Attention in float8, the rest in integers whose groups the names in config.json decide."""
    save_tiny("llama-2", tmp_path / "plain", torch.bfloat16)
    kinds = {"self_attn": "float8 channels", "up_proj": "int4 channels", "": "int8 channels"}

    def case_of(name: str) -> str:
        return next(case for part, case in kinds.items() if part in name)

    settings = settings_of("int8 channels")
    for part, case in kinds.items():
        group = settings_of(case)["config_groups"]["group_0"]
        form = CASES[case][0]
        targets = [f"re:.*{part}.*"] if part else ["Linear"]
        settings["config_groups"][part or "rest"] = {**group, "format": form, "targets": targets}
    del settings["config_groups"]["group_0"]
    settings["format"] = "mixed-precision"
    folder = quantised(
        tmp_path / "plain",
        tmp_path / "stored",
        settings,
        lambda name, w: store_compressed(case_of(name))(name, w),
    )
    back = plain_copy(
        tmp_path / "plain", tmp_path / "back", lambda name, w: store_decompressed(case_of(name))(name, w)
    )
    model = AutoModelForCausalLM.from_pretrained(back, dtype=torch.bfloat16, experts_implementation="eager")
    with torch.no_grad(), slowllm.load(folder, dtype="bfloat16") as lm:
        assert torch.equal(lm.model(IDS).logits, model(IDS).logits)


def test_blocks_of_columns_may_have_an_order_of_their_own(tmp_path: Path) -> None:
    """As older versions stored it (actorder "group"); the order of the file, all -1, is none."""
    case = "int4 groups"
    folder = compressed("llama-2", case, tmp_path)
    found = []
    for order in (torch.full((64,), -1), torch.arange(64) // 16, torch.arange(64) % 4):

        def add(tensors: dict[str, torch.Tensor], order: torch.Tensor = order) -> None:
            if f"{MODULE}.weight_packed" in tensors:
                tensors[f"{MODULE}.weight_g_idx"] = order.int()

        change_tensors(folder, add)
        with torch.no_grad(), slowllm.load(folder, resident=False) as lm:
            found.append(lm.model(IDS).logits)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("wrong", [4, 99, -2])
def test_a_block_that_there_is_not_is_refused_by_name(wrong: int, tmp_path: Path) -> None:
    folder = compressed("llama-2", "int4 groups", tmp_path)
    order = (torch.arange(64) // 16).int()
    order[17] = wrong
    packed, name = f"{MODULE}.weight_packed", f"{MODULE}.weight_g_idx"
    change_tensors(folder, lambda tensors: packed in tensors and tensors.update({name: order}))
    message = rf"model-\d+-of-\d+\.safetensors: {name} names group {wrong} of a matrix that has 4"
    with slowllm.load(folder, resident=False) as lm, pytest.raises(CheckpointError, match=message):
        lm.model(IDS)


@pytest.mark.parametrize(
    ("case", "width"),
    crossed(
        ["int4 channels", "int8 channels", "int4 groups", "int4 groups with zeros"],
        [70, 81, 90],
        quick=[("int4 channels", 81), ("int8 channels", 70), ("int4 groups", 90)],
    ),
)
def test_rows_need_not_fill_their_words(
    case: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs of down_proj are as many as an odd width; the groups of other cases divide it by 10 or 9."""
    form, weights, dtype = CASES[case]
    if "group_size" in weights:
        size = {70: 14, 81: 27, 90: 18}[width]
        monkeypatch.setitem(CASES, case, (form, {**weights, "group_size": size}, dtype))
    save_tiny("llama-2", tmp_path / "plain", torch.bfloat16, intermediate_size=width)

    def only_down(store: Any) -> Any:
        return lambda name, weight: store(name, weight) if "down_proj" in name else {name: weight}

    settings, store, back = settings_of(case), store_compressed(case), store_decompressed(case)
    folder = quantised(tmp_path / "plain", tmp_path / "stored", settings, only_down(store))
    plain = plain_copy(tmp_path / "plain", tmp_path / "back", only_down(back))
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    with torch.no_grad(), slowllm.load(folder, dtype="bfloat16", resident=False) as lm:
        assert torch.equal(lm.model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "shape",
    [
        torch.tensor([96, 640]),
        torch.tensor([95, 64]),
        torch.tensor([96, 0]),
        torch.tensor([96]),
        torch.ones(2),
    ],
    ids=str,
)
def test_a_shape_that_lies_is_refused_by_name(shape: torch.Tensor, tmp_path: Path) -> None:
    folder = compressed("llama-2", "int4 channels", tmp_path)
    change_tensors(folder, _changed("weight_shape", lambda _: shape))
    with pytest.raises(
        CheckpointError, match=rf"{MODULE}.weight_shape is \w+ of shape .* which is no shape for"
    ):
        slowllm.load(folder)


def test_a_shape_of_other_words_is_refused_by_name(tmp_path: Path) -> None:
    folder = compressed("llama-2", "int4 channels", tmp_path)
    change_tensors(folder, _changed("weight_shape", lambda _: torch.tensor([96, 50])))
    with pytest.raises(CheckpointError, match=rf"{MODULE} has .*go with no group of config.json"):
        slowllm.load(folder)


def _without(kind: str) -> Any:
    return lambda tensors: tensors.pop(f"{MODULE}.{kind}", None)


def _changed(kind: str, change: Any) -> Any:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        if (name := f"{MODULE}.{kind}") in tensors:
            tensors[name] = change(tensors[name]).clone()

    return apply


def _doubled(tensors: dict[str, torch.Tensor]) -> None:
    if f"{MODULE}.weight_packed" in tensors:
        tensors[f"{MODULE}.weight"] = torch.ones(96, 64)


def _with_zeros(tensors: dict[str, torch.Tensor]) -> None:
    if f"{MODULE}.weight_packed" in tensors:
        tensors[f"{MODULE}.weight_zero_point"] = torch.zeros(12, 4, dtype=torch.int32)


INT4, ZEROS, FLOAT8, NVFP4 = "int4 groups", "int4 groups with zeros", "float8 channels", "nvfp4"


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (INT4, _without("weight_scale"), rf"{MODULE}.weight_packed is stored as I32 but has no scale \({MODULE}.weight_scale\)"),
        (INT4, _without("weight_packed"), rf"{MODULE}.weight_s\w+ belongs to no quantised weight"),
        (INT4, _changed("weight_scale", lambda t: t[:, :-1]), rf"{MODULE} has weight_packed I32 \[96, 8\], weight_scale BF16 \[96, 3\]"),
        (INT4, _changed("weight_scale", lambda t: t.int()), rf"{MODULE} has .*weight_scale I32 \[96, 4\], .*go with no group"),
        (INT4, _changed("weight_packed", lambda t: t.float()), rf"{MODULE}.weight_packed is F32, which no format"),
        (INT4, _changed("weight_packed", lambda t: t.view(-1)), rf"{MODULE}.weight_packed is I32 but is no matrix"),
        (INT4, _doubled, rf"{MODULE}.weight stands in the checkpoint twice, packed and not"),
        (INT4, _with_zeros, rf"{MODULE} has .*weight_zero_point I32 \[12, 4\]"),
        (ZEROS, _without("weight_zero_point"), rf"{MODULE} has .*go with no group"),
        (ZEROS, _changed("weight_zero_point", lambda t: t[1:]), rf"{MODULE} has .*weight_zero_point I32 \[11, 2\]"),
        (FLOAT8, _changed("weight_scale", lambda t: t[1:]), rf"{MODULE} has weight F8_E4M3 \[96, 64\], weight_scale BF16 \[95, 1\]"),
        (FLOAT8, _changed("weight_scale", lambda t: t[:1]), rf"{MODULE} has weight F8_E4M3 \[96, 64\], weight_scale BF16 \[1, 1\]"),
        (FLOAT8, _changed("weight", lambda t: t.view(torch.int8)), rf"{MODULE} has weight I8 \[96, 64\], .*go with no group"),
        ("plain int8", _changed("weight", lambda t: t.view(torch.float8_e4m3fn)), rf"{MODULE} has weight F8_E4M3 .*go with no group"),
        ("float8 tensors", _changed("weight_scale", lambda t: t.expand(96, 1)), rf"{MODULE} has .*weight_scale BF16 \[96, 1\]"),
        (FLOAT8, _without("weight"), rf"{MODULE}.weight_scale belongs to no quantised weight"),
        (NVFP4, _without("weight_global_scale"), rf"{MODULE}.weight_scale is F8_E4M3 of shape \[96, 4\] which are no scales"),
        (NVFP4, _changed("weight_global_scale", lambda t: t.half()), rf"{MODULE}.weight_global_scale F16 \[1\], which are no scales"),
    ],
)  # fmt: skip
def test_half_a_format_is_refused_by_name(case: str, change: Any, message: str, tmp_path: Path) -> None:
    folder = compressed("llama-2", case, tmp_path)
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(folder)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    ("case", "kind", "value", "message"),
    [
        (NVFP4, "weight_global_scale", 0, "is zero, and its divisor is divided by"),
        (NVFP4, "weight_scale", 0x7F, "has NaN among its scales"),
        (NVFP4, "weight_scale", 0xFF, "has NaN among its scales"),
        ("mxfp4", "weight_scale", 0xFF, "has NaN among its scales"),
    ],
)
def test_scales_that_make_no_numbers_are_refused_by_name(
    case: str, kind: str, value: int, message: str, resident: bool, tmp_path: Path
) -> None:
    def damage(scales: torch.Tensor) -> torch.Tensor:
        scales.view(-1)[:1].view(torch.uint8)[:] = value
        return scales

    folder = compressed("llama-2", case, tmp_path)
    change_tensors(folder, _changed(kind, damage))
    named = rf"model-\d+-of-\d+\.safetensors: {MODULE}\.{kind} {message}; fetch this shard again"
    with slowllm.load(folder, resident=resident) as lm, pytest.raises(CheckpointError, match=named):
        lm.model(IDS)


def _group(**weights: Any) -> dict[str, Any]:
    settings = settings_of(INT4)
    group = settings["config_groups"]["group_0"]
    return {**settings, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **weights}}}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "compressed-tensors"}, "quantization_config has no config_groups"),
        (
            {**settings_of(INT4), "transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
            "config.json: its transform_config says that activations are rotated",
        ),
        ({**settings_of(INT4), "transform_config": "hadamard"}, "its transform_config says that activations are rotated"),
        ({**settings_of(INT4), "format": "marlin-24"}, "the format 'marlin-24' of compressed-tensors is not read"),
        (_group(num_bits=3), "group_0: num_bits is 3, which is not read"),
        (_group(num_bits="4" * 5000), "group_0: num_bits is '4{12}[.]{3}4{13}', which is not read"),
        (_group(group_size=0), "group_0: group_size is 0, not a number"),
        (_group(group_size=None), "group_0: has groups, but group_size is None"),
        (_group(strategy="block"), "group_0: block_structure is None, not two numbers"),
        (_group(group_size=32), "go with no group of config.json's quantization_config"),
        (_group(symmetric=False), "go with no group of config.json's quantization_config"),
        (_group(num_bits=8), "go with no group of config.json's quantization_config"),
        (
            {**settings_of(INT4), "config_groups": {"a": {"targets": "Linear", "weights": {}}}},
            "config_groups.a: targets is 'Linear', not a list",
        ),
        (
            {**settings_of(INT4), "config_groups": {"a": {"targets": ["re:("], "weights": {}}}},
            r"config_groups.a: the target 're:\(' is no pattern",
        ),
    ],
)  # fmt: skip
def test_a_config_that_lies_is_refused(settings: Any, message: str, saved: Path) -> None:
    # transformers' own class refuses some of these before; what is asked here is ours.
    spans = spans_of(saved)
    config = AutoConfig.from_pretrained(saved)
    config.quantization_config = settings
    with pytest.raises(CheckpointError, match=message):
        find_native(config, spans)


@pytest.mark.parametrize("transforms", [None, {}, {"config_groups": {}}])
def test_a_table_without_transforms_is_read(transforms: object, saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    config.quantization_config = {**settings_of(INT4), "transform_config": transforms}
    assert find_native(config, spans_of(saved)).coded


def _with_pattern(pattern: str) -> dict[str, Any]:
    settings = settings_of(INT4)
    return {
        **settings, "config_groups": {"a": {**settings["config_groups"]["group_0"], "targets": [f"re:{pattern}"]}}
    }  # fmt: skip


def test_a_pattern_with_many_ways_to_match_is_decided(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    config.quantization_config = _with_pattern(r"^(([a-z_.0-9])+)+$X")  # with the module re: 2^length ways
    assert find_native(config, spans_of(saved)).coded


@pytest.mark.long  # which waits until the time for a pattern is over
def test_a_pattern_without_end_is_refused(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    config.quantization_config = _with_pattern(r"(.|[a-z_.0-9]|[\w.])*\d\d\d")
    with pytest.raises(
        CheckpointError, match=r"the target 're:.*' is not matched with model\..* in 2 s; write it"
    ):
        find_native(config, spans_of(saved))


def test_a_format_that_is_not_read_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    folder = compressed("llama-2", INT4, tmp_path)
    change_settings(folder, {**settings_of(INT4), "format": "marlin-24"})
    with pytest.raises(CheckpointError, match="the format 'marlin-24' of compressed-tensors is not read"):
        slowllm.load(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed("llama-2", INT4, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def all_saved(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, plain = tmp_path_factory.mktemp("all"), saved.parent / "plain"
    return {
        case: quantised(plain, folder / str(number), settings_of(case), store_compressed(case))
        for number, case in enumerate(CASES)
    }


@num_examples(150)
@given(st.sampled_from(sorted(CASES)), st.data())
def test_damaged_arrays_are_refused_or_make_the_same_tensor(
    all_saved: dict[str, Path], case: str, data: st.DataObject
) -> None:
    spans = {name: span for name, span in spans_of(all_saved[case]).items() if ".1.mlp." in name}
    config = AutoConfig.from_pretrained(all_saved[case])
    try:
        native = find_native(config, data.draw(damaged_spans(spans)))
    except CheckpointError:
        return
    for tensor in native.coded.values():
        parts = {part.name: (part.dtype, part.shape) for part in tensor.parts}
        assert CODECS[tensor.codec].has_parts(parts, *tensor.shape, tensor.group)


@pytest.mark.parametrize("case", ["int8 channels", "nvfp4"])
def test_a_quantised_head_and_embedding_are_read(case: str, tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path / "plain", torch.bfloat16)
    folders = []
    for number, store in enumerate((store_compressed(case), store_decompressed(case))):

        def change(tensors: dict[str, torch.Tensor], store: Any = store) -> None:
            for name in ("lm_head.weight", "model.embed_tokens.weight"):
                if name in tensors:
                    tensors.update(store(name, tensors.pop(name)))

        folder = tmp_path / str(number)
        if number:
            plain_copy(tmp_path / "plain", folder, store)
        else:
            quantised(tmp_path / "plain", folder, settings_of(case), store)
        change_tensors(folder, change)
        folders.append(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folders[1], dtype=torch.bfloat16, experts_implementation="eager"
    )
    for resident in (True, False):
        with torch.no_grad(), slowllm.load(folders[0], dtype="bfloat16", resident=resident) as lm:
            assert torch.equal(lm.model(IDS).logits, model(IDS).logits)
