"""A killed job goes on where it was, gives the same bytes, and belongs to nobody else."""

from __future__ import annotations

import json
import math
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.errors import SlowLLMError, StateError
from slowllm.inference.lines import Line, Lines, job_of, score_lines
from slowllm.runtime.state import ResumedWay, State, read_inputs, read_job
from slowllm.streaming.call_context import current_call
from slowllm.streaming.way import Way
from tests.support.families import VOCAB, family_cases
from tests.support.paths import TINY_BLOOM
from tests.support.processes import Processes

TEXTS = [
    f"The value number {n} is returned as it was given to the caller{' again' * (n % 7)}." for n in range(60)
]
JOB = {"kind": "test", "model": "a"}


def lives(
    processes: Processes, folder: Path, num_kills: int, seed: int, texts: list[str] = TEXTS
) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    (folder / "in.txt").write_text("\n".join(texts))
    done = processes.run(
        "-m", "tests.support.killed", "stops", num_kills, seed,
        "forward", folder / "in.txt", "--model", TINY_BLOOM, "--dtype", "fp32", "--ram", "2GiB", "--stream-all",
        "--out", folder / "out.jsonl", "--state", folder / "state", "--save-every", 0,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("num_kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_many_moments_it_gives_the_same_bytes_and_passes_no_stop_twice(
    tmp_path: Path, processes: Processes, num_kills: int
) -> None:
    texts = TEXTS[: 3 * num_kills]
    whole = lives(processes, tmp_path / "whole", 0, 0, texts)
    killed = lives(processes, tmp_path / "killed", num_kills, 1, texts)
    assert killed["codes"] == [-signal.SIGKILL] * num_kills + [0]
    assert (tmp_path / "killed" / "out.jsonl").read_bytes() == (tmp_path / "whole" / "out.jsonl").read_bytes()
    # A stop is told when everybody has passed it, and saved by then: what a kill costs is the stop under way.
    assert len(whole["lives"]) == 1
    num_passed = sum(map(len, killed["lives"]))
    assert len(whole["lives"][0]) - num_kills <= num_passed <= len(whole["lives"][0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, processes: Processes) -> Path:
    """The state of a job that was killed once and then ended."""
    folder = tmp_path_factory.mktemp("finished")
    lives(processes, folder, 1, 2, TEXTS[:20])
    return folder


def test_a_finished_job_reads_nothing_and_gives_the_same_bytes(finished: Path, processes: Processes) -> None:
    before = (finished / "out.jsonl").read_bytes()
    (finished / "out.jsonl").unlink()
    again = lives(processes, finished, 0, 0, TEXTS[:20])
    assert again == {"lives": [[]], "codes": [0]}
    assert (finished / "out.jsonl").read_bytes() == before
    assert not list((finished / "state" / "riders").iterdir())


def test_other_lines_are_another_job(finished: Path, tmp_path: Path, processes: Processes) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Something else.\n")
    done = processes.run(
        "-m", "slowllm", "forward", other, "--dtype", "fp32", "--ram", "2GiB", "--state", finished / "state"
    )
    assert done.returncode == 2
    assert "is the state of another job (other lines" in done.stderr
    assert done.stderr.count("\n") == 1


# The folder


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    with State(tmp_path / "s", JOB, 0.0) as opened:
        yield opened


def test_results_come_back_whatever_their_order(tmp_path: Path) -> None:
    with State(tmp_path, JOB) as state:
        state.finish(3, [0.1, -1e-30])
        state.finish(0, "first")
        state.finish(0, "not again")
        assert state.result(1) is None
    with State(tmp_path, JOB) as state:
        assert (state.result(3), state.result(0), state.result(1)) == ([0.1, -1e-30], "first", None)
        assert state.num_resumed == 2


@pytest.mark.parametrize("cut", [1, 5, 20])
@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_a_result_that_was_not_written_to_its_end_is_done_again(
    tmp_path: Path, cut: int, damage: str
) -> None:
    with State(tmp_path, JOB) as state:
        state.finish(0, "whole")
        state.finish(1, "torn, and long enough to be cut anywhere")
    file = tmp_path / "results.jsonl"
    data = file.read_bytes()
    file.write_bytes(data[:-cut] + (b"\0" * cut if damage == "zeros" else b""))
    with State(tmp_path, JOB) as state:
        assert (state.result(0), state.result(1)) == ("whole", None)
        state.finish(1, "anew")
    with State(tmp_path, JOB) as state:
        assert (state.result(0), state.result(1)) == ("whole", "anew")


@pytest.mark.parametrize("other", [{"model": "b"}, {"more": 1}, {"versions": {"torch": "3"}}])
def test_the_state_of_another_job_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    State(tmp_path, JOB).close()
    with pytest.raises(
        StateError, match=r"is the state of another job \(\w+ was .* and is .*\); name another"
    ):
        State(tmp_path, {**JOB, **other})
    State(tmp_path, JOB).close()


def test_inputs_belong_to_the_job_that_was_begun_with_them(tmp_path: Path) -> None:
    assert read_inputs(tmp_path) is None
    State(tmp_path, JOB, inputs={"1": [5, 6]}).close()
    State(tmp_path, JOB, inputs={"1": [7]}).close()
    assert read_inputs(tmp_path) == {"1": [5, 6]}
    (tmp_path / "inputs.json").write_text("{")
    assert read_inputs(tmp_path) is None
    # A process that died before it named the job leaves its inputs to nobody.
    (tmp_path / "job.json").unlink()
    assert read_job(tmp_path) is None
    State(tmp_path, JOB).close()
    assert not (tmp_path / "inputs.json").exists()


def test_a_state_can_be_begun_anew_and_deleted(tmp_path: Path) -> None:
    with State(tmp_path / "s", JOB, inputs=[1]) as state:
        state.finish(0, "of the first job")
    with State(tmp_path / "s", {**JOB, "model": "b"}, is_new=True) as state:
        assert state.result(0) is None
        assert read_inputs(state.folder) is None
        assert type(state.way(0)) is ResumedWay
        state.delete()
    assert not (tmp_path / "s").exists()
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("years of work")
    with pytest.raises(StateError, match=r"is no state of slowllm"):
        State(tmp_path / "s", JOB, is_new=True)


def test_without_saves_a_rider_leaves_nothing_behind(tmp_path: Path) -> None:
    with State(tmp_path, JOB, math.inf) as state:
        state.way(0).pass_block(0, torch.zeros(1))
        assert state.way(0).output_of(0) is None
        assert not list((tmp_path / "riders").iterdir())


def test_two_processes_cannot_share_a_state(state: State, tmp_path: Path, processes: Processes) -> None:
    code = "import sys; from pathlib import Path; from slowllm.runtime.state import State; State(Path(sys.argv[1]), {})"
    done = processes.run("-c", code, tmp_path / "s")
    assert "StateError" in done.stderr
    assert "another run is using this state" in done.stderr


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StateError, match=r"is no state of slowllm \(it has thesis\.tex\)"):
        read_job(tmp_path)
    with pytest.raises(StateError, match=r"is no folder"):
        read_job(tmp_path / "thesis.tex")
    with pytest.raises(StateError, match=r"is no state of slowllm"):
        State(tmp_path, JOB)
    for text in ("[]", "{}", "{", "\xff"):
        (tmp_path / "job.json").write_text(text, encoding="latin-1")
        with pytest.raises(StateError, match=r"job\.json (is damaged|cannot be read)"):
            read_job(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"Not a directory|File exists"):
        State(tmp_path / "file" / "s", JOB)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_with_a_sentence_and_costs_no_result(small_disk: Path) -> None:
    with State(small_disk / "s", JOB, 0.0) as state:
        state.finish(0, "kept")
        with pytest.raises(StateError, match=r"cannot be saved \(.*[Nn]o space.*\); free some space"):
            state.way(1).pass_block(0, torch.zeros(1 << 20))
        with pytest.raises(StateError, match=r"No space left on device; free some space"):
            state.finish(1, "x" * (1 << 20))
    with State(small_disk / "s", JOB, 0.0) as state:
        assert (state.result(0), state.result(1)) == ("kept", None)


# Riders


def test_a_damaged_rider_starts_over(state: State) -> None:
    book = state.way(0)
    book.pass_block(2, (torch.arange(6.0), None))
    assert state.way(0).output_of(2)[0].tolist() == list(range(6))
    assert state.way(0).output_of(2)[1] is None
    assert state.way(0).output_of(3) is None
    path = state.folder / "riders" / "00000000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    for damaged in (bytes(data), bytes(data[:40]), b""):
        path.write_bytes(damaged)
        assert state.way(0).output_of(0) is None


def test_a_rider_of_another_number_place_or_job_is_not_taken(state: State, tmp_path: Path) -> None:
    state.way(0).pass_block(2, torch.arange(6.0))
    path = state.folder / "riders" / "00000000.safetensors"
    data = path.read_bytes()
    (state.folder / "riders" / "00000001.safetensors").write_bytes(data)
    assert state.way(1).output_of(0) is None
    path.write_bytes(data.replace(b'"block":"2"', b'"block":"3"'))
    assert path.read_bytes() != data
    assert state.way(0).output_of(0) is None
    with State(tmp_path / "other", {**JOB, "model": "b"}) as other:
        (other.folder / "riders" / "00000000.safetensors").write_bytes(data)
        assert other.way(0).output_of(0) is None


def test_results_without_their_job_are_not_taken_for_anothers(tmp_path: Path) -> None:
    with State(tmp_path, JOB, 0.0) as state:
        state.finish(0, "of the first job")
        state.way(1).pass_block(0, torch.zeros(1))
    results = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "job.json").unlink()
    with State(tmp_path, {**JOB, "model": "b"}) as state:
        assert state.result(0) is None
        assert state.way(1).output_of(0) is None
    (tmp_path / "results.jsonl").write_bytes(results)
    with State(tmp_path, {**JOB, "model": "b"}) as state:
        assert state.result(0) is None


def test_results_that_are_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(StateError, match=r"[Dd]irectory"):
        State(tmp_path, JOB)


@pytest.mark.parametrize("begun", [{}, {"packing": [True, True, 1]}, {"packing": [1, 1, 1], "dtype": None}])
def test_a_packing_that_is_damaged_is_refused(begun: dict[str, Any]) -> None:
    lines = Lines([Line(1, "", (5, 6))])
    with pytest.raises(StateError, match="another job's or version's, or damaged"):
        job_of(lines, None, slowllm.Rates(), begun)


def test_a_rider_is_saved_no_more_often_than_asked(tmp_path: Path) -> None:
    with State(tmp_path, JOB, 3600.0) as state:
        state.way(0).pass_block(0, torch.zeros(1))
        assert state.way(0).output_of(0) is None


class Killed(SlowLLMError):
    pass


@pytest.mark.parametrize(("name", "granularity"), family_cases(["blocks", "leaves"]))
def test_every_family_goes_on_from_any_block_with_the_same_bits(
    name: str, granularity: Any, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slowllm.modeling.layout.MIN_LEAF_BYTES", 0)
    generator = torch.Generator().manual_seed(3)
    lines = [
        Line(n, "", tuple(torch.randint(5, VOCAB, (9 + n,), generator=generator).tolist())) for n in range(3)
    ]
    save = ResumedWay._save
    with slowllm.load(
        tiny(name), dtype="fp32", keep_resident=False, granularity=granularity, poison=True
    ) as lm:
        whole = [likelihood.log_probs for _, likelihood in score_lines(lm, lines, prefix=None)]
        num_blocks = lm.config.get_text_config().num_hidden_layers
        for block in range(num_blocks):

            def save_and_die(book: ResumedWay, block: int = block) -> None:
                save(book)
                if book._block == block:
                    raise Killed

            folder = tmp_path / str(block)
            with monkeypatch.context() as patch, State(folder, JOB, 0.0) as state:
                patch.setattr(ResumedWay, "_save", save_and_die)
                with pytest.raises(Killed):
                    list(score_lines(lm, lines, prefix=None, state=state))
            before = lm.report.num_passages
            with State(folder, JOB, 0.0) as state:
                found = [
                    likelihood.log_probs for _, likelihood in score_lines(lm, lines, prefix=None, state=state)
                ]
            assert found == whole
            passed = lm.report.num_passages - before
            done = tuple(f"{lm.layout.blocks_name}.{n}." for n in range(block + 1))
            num_done = sum(f"{module}.".startswith(done) for module in lm.layout.modules)
            assert passed == lm.num_stops - num_done
            assert num_done > block
    assert type(current_call().way) is Way


def test_the_state_of_another_verb_is_told_as_such(tmp_path: Path) -> None:
    with State(tmp_path / "state", {"kind": "tune"}):
        pass
    assert read_job(tmp_path / "state", "tune") == {"kind": "tune"}
    with pytest.raises(
        StateError, match=r"is the state of another job \(slowllm tune, not forward\); name another"
    ):
        read_job(tmp_path / "state", "forward")
