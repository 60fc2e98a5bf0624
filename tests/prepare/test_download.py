"""`slowllm download` against a small hub on the loopback, in processes of its own: there the hub is not offline."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import save
from torch import ones

import slowllm
from slowllm.errors import CheckpointError
from slowllm.prepare import hub
from tests.support.command_line import refused
from tests.support.downloads import Result, blob, environment, run_all, snapshot
from tests.support.fake_hub import COMMIT, FakeHub, Repo, etag
from tests.support.paths import TINY_BLOOM
from tests.support.processes import Processes

BLOOM = {path.name: path.read_bytes() for path in TINY_BLOOM.iterdir()}
STRAYS = dict.fromkeys(
    [
        "README.md", ".gitattributes", "pytorch_model.bin", "original/model.safetensors", "onnx/config.json",
        "consolidated.safetensors", "model-00001-of-00009.safetensors", "model.gguf", "modeling_evil.py",
        "training_args.bin", "optimizer.pt", "original/tokenizer.model",
    ],
    b"not wanted",
)  # fmt: skip
SMALL = {"config.json": b"{}", "model.safetensors": save({"weight": ones(3, 5)})}
# Larger than the 10 MiB that huggingface_hub writes at once.
LARGE = {"config.json": b"{}", "model.safetensors": save({"weight": ones(6_000_000)})}
WEIGHTS = SMALL["model.safetensors"]
DAMAGED = WEIGHTS[:-1] + b"!"


def test_a_model_is_fetched_once_and_loaded_offline_by_its_id(
    server: FakeHub, processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos["someone/tiny"] = Repo({**BLOOM, **STRAYS, "chat_template.jinja": b"{{ x }}"})
    env, call = environment(server, tmp_path), (["someone/tiny"], None, {})
    once, again = run_all(processes, {"once": call, "again": call}, env).values()
    assert once.code == again.code == 0, once.err + again.err
    folder = snapshot(tmp_path, "someone/tiny")
    assert once.out == again.out == f"{folder}\n"
    num_bytes = sum(map(len, BLOOM.values())) + len(b"{{ x }}")
    assert f"someone/tiny main ({COMMIT[:8]}): 10 files, {num_bytes / 1e6:.3g} MB; 0 B here, " in once.err
    assert "MB here, 0 B to fetch" in again.err
    assert {path.name for path in folder.iterdir()} == {*BLOOM, "chat_template.jinja"}
    assert all((folder / name).read_bytes() == content for name, content in BLOOM.items())
    # The index twice: before anything is written, it says which shards to count.
    assert sorted(server.fetched("someone/tiny")) == sorted(
        (name, 0) for name in (*BLOOM, "chat_template.jinja", hub.INDEX)
    )
    # The token is for the hub only, not for the host that it redirects to.
    tokens = {(request.host, request.token) for request in server.requests if "tiny" in request.path}
    assert tokens == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}
    # A list of all files, as `hf download --include` leaves it: that the pickles are missing is no matter.
    trees = folder.parent.parent / "trees"
    trees.mkdir()
    listed = {"pytorch_model.bin": {"size": 10, "blob_id": "0" * 40}}
    (trees / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": listed}))
    # What HF_HOME and HF_ENDPOINT would have set; tests are offline.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert constants.is_offline_mode()
    with slowllm.load("someone/tiny") as lm:
        assert lm.name == "someone/tiny"
        assert lm.tokenizer("a")["input_ids"]


def test_an_interrupted_and_a_killed_download_go_on_where_they_were(
    server: FakeHub, processes: Processes, tmp_path: Path
) -> None:
    name, content = "model.safetensors", LARGE["model.safetensors"]
    server.repos["someone/large"] = Repo(dict(LARGE), stalls=[12_000_000, 23_000_000])
    partial = blob(tmp_path, "someone/large", name, content)
    partial = partial.with_name(f"{partial.name}.slowllm.incomplete")
    env, have = environment(server, tmp_path), [0]
    for ending, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(
            [sys.executable, "-m", "slowllm", "download", "someone/large"],
            env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert server.stalled.acquire(timeout=60)
        while process.poll() is None and not (
            partial.exists() and partial.stat().st_size > have[-1] + 5_000_000
        ):
            pass  # until more of it has been written; the rest does not come
        process.send_signal(ending)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert ("slowllm: interrupted; what has arrived is kept" in errors) == (ending == signal.SIGINT)
        assert "Traceback" not in errors
        have.append(partial.stat().st_size)
    assert run_all(processes, {"": (["someone/large"], None, {})}, env)[""].code == 0
    assert [start for file, start in server.fetched("someone/large") if file == name] == have
    assert (snapshot(tmp_path, "someone/large") / name).read_bytes() == content
    assert not partial.exists()


@dataclass(frozen=True)
class Case:
    """A repository, how it is asked for, what is in its place before, and what is said of it.

    Attributes:
        says: on stderr, in the last line where it is refused.
        arguments: of the command; ``{to}`` is a folder of the case's own.
        before: content of files in that folder, or in the cache where `arguments` name none.
        after: the same afterwards; None where the command succeeds with every file as the hub has it.
        fetched: files that were asked for.
    """

    repo: Repo
    says: str
    code: int = 2
    arguments: tuple[str, ...] = ()
    before: dict[str, bytes] = field(default_factory=dict)
    after: dict[str, bytes] | None = None
    fetched: tuple[str, ...] | None = None
    free: int | None = None
    patches: dict[str, Any] = field(default_factory=dict)


TO = ("--to", "{to}")
BOTH = ("config.json", "model.safetensors")
GATED = Repo(SMALL, refusal=(403, "GatedRepo"), only_files_refused=True)
CASES = {
    # What the hub refuses or is not.
    "missing": Case(Repo(SMALL, refusal=(404, "RepoNotFound")), "someone/missing: no such model at {url}, or a private"),
    "private": Case(Repo(SMALL, refusal=(401, "RepoNotFound")), "or a private one; check the name, or log in"),
    "token": Case(Repo(SMALL, refusal=(401, "")), "{url} answered with error 401; log in with `hf auth login`"),
    "gated": Case(GATED, "someone/gated: is gated: ask for access at {url}/someone/gated, then log in"),
    "revision": Case(Repo(SMALL), "someone/revision: has no revision 'v2'", arguments=("--revision", "v2")),
    "broken": Case(Repo(SMALL, refusal=(500, "")), "{url} answered with error 500"),
    "portal": Case(Repo(SMALL, listing={"config.json": {"size": None}}), "{url}: does not answer as the hub does (no size"),
    "paths": Case(Repo(SMALL, listing={"config.json": {"blobId": "../../../x"}}), "no hash of config.json"),
    "commit": Case(Repo(SMALL, commit="../x"), "does not answer as the hub does (no commit)"),
    "down": Case(Repo(SMALL), "no connection to http://127.0.0.1:9 (", patches={"ENDPOINT": "http://127.0.0.1:9"}),
    # What does not fit.
    "space": Case(
        Repo(SMALL), "someone/space main (01234567) needs {more} B more ({more} bytes), but {home}/hub has 100 B free (100 bytes)",
        free=100, fetched=(),
    ),
    "rest": Case(Repo(SMALL), "{size} B here, 2 B to fetch, 2 B free", 0, before={"model.safetensors": WEIGHTS}, free=2),
    "giant": Case(
        Repo(SMALL, listing={"model.safetensors": {"lfs": {"sha256": "0" * 64, "size": 10**11, "pointerSize": 1}}}),
        "model.safetensors has 100 GB, but this command fetches no file above 50 GB", fetched=(),
    ),
    # What comes is not what is listed. What came is removed, so that the same command can mend it.
    "hash": Case(
        Repo(SMALL, served={"model.safetensors": DAMAGED}), "model.safetensors: what came has the SHA-256 ",
    ),
    "small": Case(
        Repo(SMALL, served={"config.json": b"[]"}), "config.json: what came has the git id ", arguments=("--no-verify",)
    ),
    "short": Case(
        Repo(SMALL, served={"model.safetensors": WEIGHTS[:70]}),
        "model.safetensors: what came has 70 bytes, but the hub says {size}; removed, run the same command again",
        arguments=("--no-verify",), after={},
    ),
    "long": Case(
        Repo(SMALL, served={"model.safetensors": WEIGHTS + b"!"}), "model.safetensors: what came has {longer} bytes", after={}
    ),
    "no-rest": Case(
        Repo(SMALL, served={"model.safetensors": WEIGHTS[:70]}), "what came ends before byte 90, but the hub says {size}",
        before={"model.safetensors.partial": WEIGHTS[:90]}, after={},
    ),
    "trusted": Case(
        Repo(SMALL, served={"model.safetensors": DAMAGED}), "", 0, arguments=("--no-verify",), after={"model.safetensors": DAMAGED},
    ),
    # What is there already.
    "cut": Case(Repo(LARGE, cuts=[12_000_000]), "", 0, fetched=(*BOTH, "model.safetensors")),
    "too-much": Case(Repo(SMALL), "", 0, before={"model.safetensors.partial": WEIGHTS + b"!"}, fetched=BOTH),
    "damaged": Case(
        Repo(SMALL), "model.safetensors: the cached copy has the SHA-256 ", 0, before={"model.safetensors": DAMAGED}, fetched=BOTH
    ),
    "truncated": Case(
        Repo(SMALL), "model.safetensors: the cached copy has 60 bytes, but the hub says {size}; removed, and fetched again", 0,
        before={"model.safetensors": WEIGHTS[:60]}, fetched=BOTH,
    ),
    "trusting": Case(
        Repo(SMALL), "", 0, arguments=("--no-verify",), before={"model.safetensors": DAMAGED}, after={"model.safetensors": DAMAGED},
    ),
    "locked": Case(Repo(SMALL), "model.safetensors: another run is fetching it", after={"model.safetensors.partial": b"12"}),
    "twins": Case(Repo({f"vocab.{end}": b"{}" for end in ("json", "txt")} | SMALL), "", 0),
    # A folder of the user's.
    "folder": Case(Repo(SMALL), "", 0, TO, before={"notes.txt": b"x"}, fetched=BOTH),
    "resumed-folder": Case(
        Repo(SMALL), "", 0, TO, before={"config.json": b"{}", "model.safetensors.partial": WEIGHTS[:90]}, fetched=BOTH[1:]
    ),
    "other-size": Case(
        Repo(SMALL), "{to}/config.json: has 9 bytes, but the hub says 2; move or delete it", 2, TO,
        before={"config.json": b"{'my': 1}"}, after={"config.json": b"{'my': 1}"}, fetched=(),
    ),
    "other-content": Case(
        Repo(SMALL), "{to}/model.safetensors: has the SHA-256 ", 2, (*TO, "--no-verify"),
        before={"model.safetensors": DAMAGED}, after={"model.safetensors": DAMAGED},
    ),
    "file": Case(Repo(SMALL), "{to}/notes: is a file; name a folder", 2, ("--to", "{to}/notes"), before={"notes": b"x"}),
    "no-folder": Case(Repo(SMALL), "{to}/notes", 2, ("--to", "{to}/notes/x"), before={"notes": b"x"}, fetched=()),
    # What is no whole model, though every file is as the hub has it.
    "header": Case(Repo(SMALL | {"model.safetensors": b"12345678"}), "model.safetensors: "),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def place_of(case: Case, home: Path, repo: str, name: str) -> Path:
    """Where a file of a case lies, or with .partial after its name, where it lies until it is whole."""
    whole = name.removesuffix(".partial")
    content = case.repo.files.get(whole, b"")
    if "--to" in case.arguments:
        folder = home / repo
        return folder / (f"{whole}.{etag(whole, content)[:16]}.incomplete" if whole != name else name)
    path = blob(home, repo, whole, content)
    return path.with_name(f"{path.name}.slowllm.incomplete") if whole != name else path


@pytest.fixture(scope="module")
def results(processes: Processes, server: FakeHub, home: Path) -> dict[str, Result]:
    todo = {}
    for name, case in CASES.items():
        repo = f"someone/{name}"
        server.repos[repo] = replace(case.repo, served=dict(case.repo.served), cuts=list(case.repo.cuts))
        arguments = [repo, *(argument.replace("{to}", str(home / repo)) for argument in case.arguments)]
        todo[name] = (arguments, case.free, case.patches)
        for file, content in case.before.items():
            path = place_of(case, home, repo, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    locked = place_of(CASES["locked"], home, "someone/locked", "model.safetensors.partial")
    locked.parent.mkdir(parents=True)
    with open(locked, "wb", buffering=0) as other:
        other.write(b"12")
        fcntl.flock(other, fcntl.LOCK_EX)
        todo["hash again"] = todo["hash"]
        return run_all(processes, todo, environment(server, home))


@pytest.mark.parametrize("name", CASES)
def test_a_download_ends_well_or_in_one_sentence(
    name: str, results: dict[str, Result], server: FakeHub, home: Path
) -> None:
    case, result, repo = CASES[name], results[name], f"someone/{name}"
    to = home / repo if "--to" in case.arguments else snapshot(home, repo)
    says = case.says.format(
        url=server.url,
        home=home,
        to=home / repo,
        size=len(WEIGHTS),
        longer=len(WEIGHTS) + 1,
        more=len(WEIGHTS) + 2,
    )
    assert result.code == case.code, result.err
    assert "Traceback" not in result.err
    if case.code:
        assert result.out == ""
        assert result.err.splitlines()[-1].startswith("slowllm: ")
        assert says in result.err.splitlines()[-1]
    else:
        assert result.out == f"{to}\n"
        assert says in result.err
        for file, content in (case.repo.files | (case.after or {})).items():
            assert (to / file).read_bytes() == content
    for file in ("model.safetensors", "model.safetensors.partial"):
        place = place_of(case, home, repo, file)
        left = place.read_bytes() if place.exists() else None
        if case.code and case.after is not None:
            assert left == case.after.get(file)
        elif case.code == 0 and file.endswith(".partial"):
            assert left is None
    if case.fetched is not None:
        assert sorted(file for file, _ in server.fetched(repo)) == sorted(case.fetched)


def test_a_broken_connection_is_taken_up_where_it_broke(results: dict[str, Result], server: FakeHub) -> None:
    assert results["cut"].code == 0
    starts = [start for file, start in server.fetched("someone/cut") if file == "model.safetensors"]
    assert starts == [0, 10 * 2**20]


def test_a_revision_keeps_its_name_until_the_new_one_is_whole(results: dict[str, Result], home: Path) -> None:
    for name, exists in (("too-much", True), ("short", False)):
        ref = snapshot(home, f"someone/{name}").parent.parent / "refs" / "main"
        assert (ref.read_text() == COMMIT) if exists else not ref.exists()


def test_a_damaged_download_is_mended_by_the_same_command(results: dict[str, Result], home: Path) -> None:
    assert [results[name].code for name in ("hash", "hash again")] == [2, 0]
    assert (snapshot(home, "someone/hash") / "model.safetensors").read_bytes() == WEIGHTS


def test_an_answer_that_is_no_listing_is_refused(monkeypatch: Any, capsys: Any) -> None:
    def answer(*_: Any, **__: Any) -> Any:
        raise ValueError("Expecting value: line 1 column 1")  # what the login page of a hotel comes to

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", answer)
    assert "does not answer as the hub does (Expecting value" in refused(
        ["download", "a/b"], monkeypatch, capsys
    )


@pytest.mark.parametrize("repo", ["a/b/c", "../x", "a--b", "", "https://huggingface.co/a/b"])
def test_what_is_no_hub_id_is_refused(repo: str, monkeypatch: Any, capsys: Any) -> None:
    assert f"{repo!r} is not the id of a model" in refused(["download", repo], monkeypatch, capsys)


def test_offline_mode_is_named(monkeypatch: Any, capsys: Any) -> None:
    assert "a/b: HF_HUB_OFFLINE is set" in refused(["download", "a/b"], monkeypatch, capsys)


def listing(*names: str) -> dict[str, hub.HubFile]:
    return {name: hub.HubFile(name, 1, "0" * 40) for name in names}


@pytest.mark.parametrize(
    ("names", "index", "sentence"),
    [
        (["model.safetensors"], "", "has no config.json, so it is not a transformers model"),
        (
            ["config.json", "pytorch_model-1-of-2.bin"],
            "",
            "has only pickled weights, which are never loaded here",
        ),
        (["config.json", "consolidated.00.pth"], "", "has only pickled weights"),
        (["config.json"], "", "has neither model.safetensors nor model.safetensors.index.json"),
        (
            ["config.json", "x.gguf", "y-00001-of-00002.gguf", "y-00002-of-00002.gguf", "mmproj-x.gguf"],
            "",
            "has 2 GGUF models (x.gguf, y-00001-of-00002.gguf); choose one with --gguf FILE",
        ),
        (
            ["y-00002-of-00002.gguf"],
            "",
            "has no y-00001-of-00002.gguf, which belongs to y-00001-of-00002.gguf",
        ),
        (["config.json", hub.INDEX], "]", "index.json has no weight_map"),
        (["config.json", hub.INDEX], "{}", "index.json has no weight_map"),
        (["config.json", hub.INDEX], '{"weight_map": {}}', "index.json has no weight_map"),
        (["config.json", hub.INDEX], '{"weight_map": {"a": 1}}', "index.json has no weight_map"),
        (
            ["config.json", hub.INDEX],
            '{"weight_map": {"a": "gone"}}',
            "names 'gone', which is not a file beside it",
        ),
        (
            ["config.json", hub.INDEX, "a/b"],
            '{"weight_map": {"a": "a/b"}}',
            "names 'a/b', which is not a file",
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused_before_a_shard_is_fetched(
    names: list[str], index: str, sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=f"someone/x: .*{re.escape(sentence)}"):
        hub.choose("someone/x", listing(*names), lambda file: index.encode())


def test_only_what_the_index_names_is_chosen() -> None:
    index = b'{"weight_map": {"a": "b-1.safetensors", "b": "b-2.safetensors", "c": "b-1.safetensors"}}'
    wanted = ["additional_chat_templates/tool.jinja", "config.json", hub.INDEX, "tokenizer.model"]
    strays = [
        "model.safetensors",
        "b-3.safetensors",
        "a/tokenizer.model",
        "a/additional_chat_templates/x.jinja",
    ]
    shards = ["b-1.safetensors", "b-2.safetensors"]
    files = hub.choose("someone/x", listing(*strays, *shards, *wanted), lambda file: index)
    assert [file.name for file in files] == [*wanted, *shards]
