"""`slowllm download --blocks` and `--ends` against a small hub on the loopback: the shards of the part, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from slowllm.errors import CheckpointError
from slowllm.modeling.parts import Part
from slowllm.options import format_bytes
from slowllm.runtime.load import open_model
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.storage.checkpoint import INDEX, SINGLE
from tests.support.downloads import Result, environment, run_all, snapshot
from tests.support.fake_hub import FakeHub, Repo
from tests.support.families import save_tiny
from tests.support.parted import OUTSIDE, parted, shard_of, tensors_of, write
from tests.support.processes import Processes

SMALL = {"config.json", "generation_config.json", INDEX}
# Case: the repository, its options, and the shards that are fetched or what is said.
CASES: dict[str, tuple[str, list[str], set[str] | str]] = {
    "span": ("mixtral", ["--blocks", "1:3"], {shard_of(1), shard_of(2)}),
    "ends": ("mixtral", ["--ends", "--revision", "0123456789abcdef0123456789abcdef01234567"], {OUTSIDE}),
    "both": ("tied", ["--blocks", "0:1", "--ends", "--to", "{to}"], {shard_of(0), OUTSIDE}),
    "first": ("tied", ["--blocks", "2:3", "--to", "{to}"], {shard_of(2)}),
    "single": ("single", ["--blocks", "0:1"], {SINGLE}),
    "outside": ("mixtral", ["--blocks", "1:4"], "blocks 1 to 3: the model has 3 blocks, numbered from 0 to 2"),
    "number": ("mixtral", ["--blocks", "2"], "--blocks 2 is a number of blocks; say which, such as 0:2"),
    "auto": ("mixtral", ["--blocks", "auto"], "--blocks auto is for servers; say which blocks, such as 0:8"),
    "words": ("mixtral", ["--blocks", "all"], "'all' names no blocks; write 8:16"),
    "no tensors": ("strange", ["--blocks", "0:1"], "index.json names no tensor of block 0"),
    "no config": ("unknown", ["--ends"], "someone/no-config/config.json: names no model_type"),
    "no index": ("damaged", ["--ends"], f"someone/no-index: {INDEX} has no weight_map of tensor names"),
    "incomplete": ("incomplete", ["--blocks", "1:2"], "model.layers.1.self_attn.q_proj.weight: missing from the checkpoint"),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def results(
    processes: Processes, server: FakeHub, home: Path, tiny: Callable[..., Path]
) -> dict[str, tuple[Result, set[str]]]:
    mixtral = contents(parted(tiny("mixtral"), home / "mixtral"))
    tied = contents(parted(tiny("llama-tied"), home / "tied"))
    save_tiny("llama-2", home / "single", shard="1GB")
    weight_map = json.loads(tied[INDEX])["weight_map"]
    tensors = {key: t for key, t in tensors_of(home / "tied").items() if "1.self_attn.q_proj" not in key}
    strange = {f"strange.{key}": file for key, file in weight_map.items()}
    repos = {
        "mixtral": mixtral,
        "tied": tied,
        "single": contents(home / "single"),
        "strange": tied | {INDEX: json.dumps({"weight_map": strange}).encode()},
        "unknown": tied | {"config.json": b"{}"},
        "damaged": tied | {INDEX: b"[]"},
        "incomplete": contents(write(home / "tied", home / "lacking", tensors)),
    }
    todo = {}
    for case, (repo, options, _) in CASES.items():
        # A repository of its own, so that what is fetched is known.
        server.repos[f"someone/{case.replace(' ', '-')}"] = Repo(repos[repo])
        name = f"someone/{case.replace(' ', '-')}"
        todo[case] = (
            [name, *(option.replace("{to}", str(home / "to" / case)) for option in options)],
            None,
            {},
        )
    todo["more"] = (["someone/span", "--blocks", "0:2"], None, {})
    todo["all"] = (["someone/span"], None, {})
    found = run_all(processes, todo, environment(server, home))
    return {
        case: (found[case], {file for file, _ in server.fetched(f"someone/{case.replace(' ', '-')}")})
        for case in CASES
    } | {case: (found[case], set()) for case in ("more", "all")}


@pytest.mark.parametrize("case", [name for name, (_, _, wanted) in CASES.items() if isinstance(wanted, set)])
def test_the_shards_of_the_part_are_fetched(
    case: str, results: dict[str, tuple[Result, set[str]]], server: FakeHub, home: Path
) -> None:
    result, fetched = results[case]
    repo, _, wanted = CASES[case]
    assert result.code == 0, result.err
    if case != "span":  # which others go on with
        shards = {name for name in fetched if name.endswith(".safetensors")}
        assert shards == wanted
    assert SMALL - ({INDEX} if repo == "single" else set()) <= fetched
    folder = Path(result.out.strip())
    assert folder == (home / "to" / case if case in ("both", "first") else snapshot(home, f"someone/{case}"))


def test_what_is_fetched_opens_as_the_part(results: dict[str, tuple[Result, set[str]]]) -> None:
    parts = {
        "ends": Part.ends(3), "both": Part(0, 1, has_ends=True), "first": Part.span(2, 3), "single": Part.span(0, 1),
    }  # fmt: skip
    for case, part in parts.items():
        with open_model(StreamedLM, results[case][0].out.strip(), part=part) as lm:
            assert lm.part == part
    with pytest.raises(
        CheckpointError, match=r"block-0\.safetensors: named by .* but missing; fetch this shard"
    ):
        open_model(StreamedLM, results["first"][0].out.strip())


def test_the_sizes_are_said_before_and_parts_complete_each_other(
    results: dict[str, tuple[Result, set[str]]], server: FakeHub, home: Path
) -> None:
    files = server.repos["someone/span"].files
    small = sum(len(content) for name, content in files.items() if not name.endswith(".safetensors"))
    blocks = sum(len(files[shard_of(block)]) for block in (1, 2))
    said = results["span"][0].err
    assert (
        f"{format_bytes(sum(map(len, files.values())))} in all, of which blocks 1 to 2 (of 3 blocks): "
        in said
    )
    assert f"{len(files) - 2} files, {format_bytes(small + blocks)}; 0 B here, " in said
    assert f", {format_bytes(len(files[shard_of(0)]))} to fetch, " in results["more"][0].err
    assert f", {format_bytes(len(files[OUTSIDE]))} to fetch, " in results["all"][0].err
    assert [name for name, _ in server.fetched("someone/span") if name.startswith("block-")].count(
        shard_of(1)
    ) == 1
    with open_model(StreamedLM, snapshot(home, "someone/span")) as lm:
        assert lm.part == Part.whole(3)


@pytest.mark.parametrize("case", [name for name, (_, _, wanted) in CASES.items() if isinstance(wanted, str)])
def test_what_cannot_be_fetched_in_part_is_refused_in_one_sentence(
    case: str, results: dict[str, tuple[Result, set[str]]]
) -> None:
    result, fetched = results[case]
    assert result.code == 2
    assert result.out == ""
    assert CASES[case][2] in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    if case != "incomplete":
        assert not any(name.endswith(".safetensors") for name in fetched), "before the first shard is fetched"
