"""`slowllm download` of checkpoints that are quantised, whole and in part, and of GGUF files, from a small hub on the loopback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from slowllm.errors import CheckpointError
from slowllm.modeling.native.companions import weight_of
from slowllm.modeling.parts import Part
from slowllm.prepare.verify import verify
from slowllm.runtime.load import open_model
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.storage.checkpoint import INDEX
from tests.support.downloads import Result, environment, run_all, snapshot
from tests.support.fake_hub import FakeHub, Repo
from tests.support.gguf_checkpoints import write_gguf
from tests.support.native_sources import save_native
from tests.support.parted import shard_of, tensors_of, write
from tests.support.processes import Processes

NATIVE = {
    "fp8": "fp8 experts",
    "mxfp4": "mxfp4",
    "gptq": "gptq",
    "bnb": "bnb nf4",
    "nvfp4": "compressed nvfp4",
}
SET = [f"big-Q8_0-0000{number}-of-00002.gguf" for number in (1, 2)]


@pytest.fixture(scope="module")
def results(processes: Processes, server: FakeHub, home: Path) -> dict[str, Result]:
    todo = {}
    for repo, name in NATIVE.items():
        source = save_native(name, home / repo)
        folder = write(source, home / repo / "parted", tensors_of(source))
        server.repos[f"someone/{repo}"] = Repo({path.name: path.read_bytes() for path in folder.iterdir()})
        server.repos[f"someone/part-{repo}"] = server.repos[f"someone/{repo}"]
        todo[repo] = ([f"someone/{repo}"], None, {})
        todo[f"part-{repo}"] = ([f"someone/part-{repo}", "--blocks", "1:2"], None, {})
    small = write_gguf(home / "small-Q4_K_M.gguf")
    parts = [
        write_gguf(
            home / name, kinds="q8_0", part=(number, 2), metadata={"split.no": number, "split.count": 2}
        )
        for number, name in enumerate(SET)
    ]
    files = {path.name: path.read_bytes() for path in (small, *parts)}
    server.repos["someone/gguf"] = Repo({**files, "README.md": b"x"})
    server.repos["someone/one"] = Repo({small.name: small.read_bytes(), "mmproj-F16.gguf": b"x"})
    todo["set"] = (["someone/gguf", "--gguf", SET[1]], None, {})
    todo["one"] = (["someone/one", "--to", str(home / "to")], None, {})
    todo["none named"] = (["someone/gguf"], None, {})
    todo["no such"] = (["someone/gguf", "--gguf", "x.gguf"], None, {})
    todo["in part"] = (["someone/one", "--blocks", "0:1"], None, {})
    todo["no gguf"] = (["someone/fp8", "--gguf", "x.gguf"], None, {})
    return run_all(processes, todo, environment(server, home))


@pytest.mark.parametrize("repo", NATIVE)
def test_a_quantised_checkpoint_is_fetched_opened_and_verified(
    repo: str, results: dict[str, Result], home: Path
) -> None:
    assert results[repo].code == 0, results[repo].err
    folder = snapshot(home, f"someone/{repo}")
    assert results[repo].out == f"{folder}\n"
    assert verify(folder).num_files == len(list(folder.iterdir()))
    with open_model(StreamedLM, folder) as lm:
        assert lm.part == Part.whole(3)
    blob = (folder / shard_of(1)).resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"^block-1\.safetensors: its [\d,]+ bytes have the hash"):
        verify(folder)
    blob.write_bytes(data)


@pytest.mark.parametrize("repo", NATIVE)
def test_blocks_come_with_their_scales(
    repo: str, results: dict[str, Result], server: FakeHub, home: Path
) -> None:
    assert results[f"part-{repo}"].code == 0, results[f"part-{repo}"].err
    fetched = {name for name, _ in server.fetched(f"someone/part-{repo}")}
    assert {name for name in fetched if name.endswith(".safetensors")} == {shard_of(1)}
    with open_model(StreamedLM, snapshot(home, f"someone/part-{repo}"), part=Part.span(1, 2)) as lm:
        assert lm.part == Part.span(1, 2)


def test_a_scale_in_another_shard_is_fetched_and_half_a_weight_of_another_block_is_no_matter(
    tmp_path: Path, server: FakeHub, processes: Processes
) -> None:
    source = save_native("fp8", tmp_path)
    folder = write(source, tmp_path / "parted", tensors_of(source))
    index = json.loads((folder / INDEX).read_text())
    moved = "model.layers.0.mlp.up_proj.weight_scale_inv"
    first, second = (load_file(folder / shard_of(number)) for number in (0, 1))
    second[moved] = first.pop(moved)
    index["weight_map"][moved] = shard_of(1)
    for number, tensors in enumerate((first, second)):
        save_file(tensors, folder / shard_of(number), {"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))
    server.repos["someone/moved"] = Repo({path.name: path.read_bytes() for path in folder.iterdir()})
    run = run_all(
        processes, {"": (["someone/moved", "--blocks", "0:1"], None, {})}, environment(server, tmp_path)
    )[""]
    assert run.code == 0, run.err
    fetched = {name for name, _ in server.fetched("someone/moved") if name.endswith(".safetensors")}
    assert fetched == {shard_of(0), shard_of(1)}
    (folder / shard_of(0)).unlink()
    with open_model(StreamedLM, folder, part=Part.span(1, 2)) as lm:
        assert lm.part == Part.span(1, 2)
    with pytest.raises(CheckpointError, match=r"missing; the index says that it is in block-0"):
        open_model(StreamedLM, folder, part=Part.span(0, 1))


def test_a_gguf_file_is_fetched_with_its_set_and_verified(
    results: dict[str, Result], server: FakeHub, home: Path
) -> None:
    assert results["set"].code == 0, results["set"].err
    path = Path(results["set"].out.strip())
    assert path == snapshot(home, "someone/gguf") / SET[0]
    assert {name for name, _ in server.fetched("someone/gguf")} == set(SET)
    assert verify(path).num_files == 2
    with open_model(StreamedLM, path) as lm:
        assert lm.num_stops
    assert results["one"].code == 0, results["one"].err
    one = Path(results["one"].out.strip())
    assert one == home / "to" / "small-Q4_K_M.gguf"
    with pytest.raises(CheckpointError, match=r"small-Q4_K_M\.gguf: nothing says which hash it should have"):
        verify(one)


def test_what_is_not_one_gguf_model_is_refused_in_one_sentence(results: dict[str, Result]) -> None:
    for case, said in {
        "none named": f"has 2 GGUF models ({SET[0]}, small-Q4_K_M.gguf); choose one with --gguf FILE",
        "no such": f"has no GGUF file 'x.gguf'; there are {SET[0]}, small-Q4_K_M.gguf",
        "in part": "a GGUF model is fetched whole; leave out --blocks and --ends",
        "no gguf": "has no GGUF file 'x.gguf'; there are none",
    }.items():
        assert results[case].code == 2
        assert said in results[case].err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("a.q_proj.weight_scale_inv", "a.q_proj.weight"), ("a.q_proj.qweight", "a.q_proj.weight"),
        ("a.q_proj.weight.quant_state.bitsandbytes__nf4", "a.q_proj.weight"), ("a.experts.down_proj_blocks", "a.experts.down_proj"),
        ("a.experts.gate_up_proj_bias", "a.experts.gate_up_proj_bias"), ("a.input_layernorm.weight", "a.input_layernorm.weight"),
        ("a.q_proj.input_scale", "a.q_proj.weight"), ("a.q_proj.bias", "a.q_proj.bias"),
    ],
)  # fmt: skip
def test_companions_are_known_by_their_names(name: str, weight: str) -> None:
    assert weight_of(name) == weight
