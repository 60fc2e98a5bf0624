"""Progress of the Python API's calls: who is told what, and what becomes of the model when that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import slowllm
from slowllm import JobProgress
from slowllm.entrypoints.progress import steps
from slowllm.errors import InputError
from slowllm.planning import slowdown
from slowllm.planning.forecast import Forecast
from slowllm.planning.job import Job, Rates
from tests.support.paths import TINY_BLOOM
from tests.support.processes import Processes
from tests.support.terminal import lines_on_screen, run_python_on_terminal

EXAMPLES = [
    {"prompt": "The value is", "answer": " returned."},
    {"prompt": "Return the", "answer": " number."},
]


@pytest.fixture(scope="module")
def lm() -> Iterator[slowllm.LM]:
    with slowllm.load(TINY_BLOOM, dtype="fp32", resident=False, poison=True) as lm:
        yield lm


def words(lm: slowllm.LM) -> list[str]:
    return [word for word in (" the", " a", " is", " of") if len(lm.tokenizer(word)["input_ids"]) == 1][:2]


CALLS: dict[str, tuple[Callable[..., object], int]] = {
    "score": (lambda lm, **told: lm.score(["The value is returned."], **told), 11),
    "choose": (lambda lm, **told: lm.choose("The value is", [" returned.", " of bytes"], **told), 11),
    "choose single tokens": (lambda lm, **told: lm.choose("The value is", words(lm), **told), 10),
    "yes_no": (lambda lm, **told: lm.yes_no(["Is it returned?"], no=" perhaps not", **told), 11),
    "generate": (lambda lm, **told: lm.generate(["The value is"], max_new_tokens=3, **told), 33),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_is_told_of_every_stop(lm: slowllm.LM, name: str) -> None:
    call, num_passages = CALLS[name]
    told: list[JobProgress] = []
    assert call(lm, progress=told.append) == call(lm)
    assert told[0] == replace(
        told[0], sweep=1, stop=0, num_stops=11, done=0, total=num_passages, read_bytes=0
    )
    assert [one.done for one in told[:-1]] == list(range(len(told) - 1))
    assert all(one.total == num_passages and one.num_sweeps == (num_passages + 9) // 11 for one in told)
    assert (told[-1].done, told[-1].sweep) == (num_passages, told[-1].num_sweeps)
    assert told[-1].read_bytes > 0
    assert told[1].stop == 1


def test_a_call_of_nothing_tells_nothing(lm: slowllm.LM) -> None:
    told: list[JobProgress] = []
    assert lm.score([], progress=told.append) == []
    assert lm.generate([], progress=told.append) == []
    assert not told


def test_tuning_tells_of_its_steps_phase_by_phase() -> None:
    told: list[JobProgress] = []
    options: dict[str, Any] = {"steps": 2, "tokens": 2, "dtype": "fp32", "resident": False}
    slowllm.tune(TINY_BLOOM, EXAMPLES, progress=told.append, **options)
    assert {one.num_sweeps for one in told} == {2}
    assert (told[0].done, told[-1].sweep) == (0, 2)
    assert told[-1].done == told[-1].total == 2 * (10 + 1 + 10)
    told.clear()
    slowllm.tune(TINY_BLOOM, EXAMPLES, progress=told.append, kind="deep", top=3, **options)
    starts = [number for number, one in enumerate(told) if not one.done]
    assert [told[number].num_sweeps for number in starts] == [1, 2]
    assert [told[number].total for number in starts] == [11, 2 * (3 + 1 + 3)]


def test_without_being_asked_nothing_is_shown(lm: slowllm.LM, capfd: pytest.CaptureFixture[str]) -> None:
    for call, _ in CALLS.values():
        call(lm)
    slowllm.tune(TINY_BLOOM, EXAMPLES, steps=1, dtype="fp32")
    assert capfd.readouterr() == ("", "")


def test_off_a_terminal_one_line_says_what_a_call_takes(
    lm: slowllm.LM, capsys: pytest.CaptureFixture[str]
) -> None:
    lm.generate(["The value is"], max_new_tokens=3, progress=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("0 of 11 stops stay in memory; 6 tokens with padding in at most 3 sweeps")
    slowllm.tune(TINY_BLOOM, EXAMPLES, steps=1, dtype="fp32", progress=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert "; steps of up to " in line


def test_a_terminal_shows_a_bar_while_a_call_goes_on(processes: Processes) -> None:
    code = f"""
import slowllm
with slowllm.load({str(TINY_BLOOM)!r}, dtype="fp32", resident=False, progress=True) as lm:
    lm.generate(["The value is", "Return the"], max_new_tokens=3)
"""
    ended, written = run_python_on_terminal(processes, "-c", code, columns=240)
    assert ended.returncode == 0
    for fact in ("sweep 1 of 3", " of 11, 0 of 2 prompts, ", " elapsed"):
        assert fact in written
    line, *others = [line for line in lines_on_screen(written) if line.strip()]
    assert line.startswith("tiny-bloom: 7.5 MB a sweep")
    # The line may be broken, and on a busy machine another one may say why sweeps became slow.
    assert not any(" elapsed" in one for one in (line, *others)), "the bar is gone"


def test_where_the_machine_was_measured_the_line_says_how_long_a_call_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rates = Rates(disk=7e6, disk_measured=True, compute_measured=True)
    with slowllm.load(TINY_BLOOM, dtype="fp32", resident=False, rates=rates, progress=True) as lm:
        lm.score(["The value is"])
        assert capsys.readouterr().err.endswith("in one sweep, about 1.1 s\n")
        lm.score(["The value is"], progress=False)
        assert not capsys.readouterr().err
        assert '<td style="text-align: left">7 MB/s; ' in lm._repr_html_()
        assert "at measured rates" in lm.plan._repr_html_()


def test_the_model_may_be_told_for_all_calls() -> None:
    told: list[JobProgress] = []
    with slowllm.load(TINY_BLOOM, dtype="fp32", progress=told.append) as lm:
        lm.score(["The value"])
    assert told[-1].done == 11


@pytest.mark.parametrize("name", CALLS)
def test_an_error_of_the_function_ends_the_call_and_leaves_the_model_usable(
    lm: slowllm.LM, name: str
) -> None:
    call, _ = CALLS[name]
    expected, before = call(lm), lm.report.num_passages

    def tell(at: JobProgress) -> None:
        if at.done == 4:
            raise ValueError("seen enough")

    with pytest.raises(ValueError, match="seen enough"):
        call(lm, progress=tell)
    # The carousel may have been on its way to the next stop.
    assert lm.report.num_passages - before in (4, 5)
    assert call(lm) == expected


def test_a_rider_that_computes_by_itself_ends_with_the_functions_error_too() -> None:
    def tell(at: JobProgress) -> None:
        if at.done == 15:
            raise ValueError("seen enough")

    with slowllm.load(TINY_BLOOM, dtype="fp32") as lm:
        expected = lm.generate(["The value"], max_new_tokens=5)
        with pytest.raises(ValueError, match="seen enough"):
            lm.generate(["The value"], max_new_tokens=5, progress=tell)
        assert lm.generate(["The value"], max_new_tokens=5) == expected


def test_an_error_before_the_first_stop_or_after_the_last_is_raised_too(lm: slowllm.LM) -> None:
    def at_once(_: JobProgress) -> None:
        raise KeyError("at once")

    def at_the_end(at: JobProgress) -> None:
        if at.done == at.total:
            raise KeyError("at the end")

    with pytest.raises(KeyError, match="at once"):
        lm.score(["The value"], progress=at_once)
    with pytest.raises(KeyError, match="at the end"):
        lm.score(["The value"], progress=at_the_end)
    assert lm.score(["The value"])


def test_an_error_of_the_function_ends_tuning() -> None:
    recorded: list[object] = []

    def tell(at: JobProgress) -> None:
        if at.sweep == 2:
            raise ValueError("seen enough")

    with pytest.raises(ValueError, match="seen enough"):
        slowllm.tune(
            TINY_BLOOM,
            EXAMPLES,
            steps=9,
            dtype="fp32",
            resident=False,
            progress=tell,
            on_record=recorded.append,
        )
    assert len(recorded) == 1


def test_what_is_neither_a_yes_or_no_nor_a_function_is_refused(lm: slowllm.LM) -> None:
    for call in (
        lambda: lm.score(["a"], progress=3),  # type: ignore[arg-type]
        lambda: slowllm.tune(TINY_BLOOM, EXAMPLES, progress=3),  # type: ignore[arg-type]
        lambda: slowllm.load(TINY_BLOOM, progress=3),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match="progress must be True, False or a function, not 3"):
            call()


# Interrupts itself from the function that is told, and then uses the model again.
INTERRUPTED = f"""
import os, signal, slowllm
with slowllm.load({str(TINY_BLOOM)!r}, dtype="fp32", resident=False) as lm:
    calls = [lambda **told: lm.score(["The value is"], **told), lambda **told: lm.generate(["The"], max_new_tokens=9, **told)]
    for call in calls:
        expected = call()
        def tell(at):
            if at.done == 4:
                os.kill(os.getpid(), signal.SIGINT)
        try:
            call(progress=tell)
        except KeyboardInterrupt:
            print("interrupted", call() == expected)
"""


def test_an_interrupt_leaves_the_model_usable(processes: Processes) -> None:
    ended = processes.run("-c", INTERRUPTED)
    assert (ended.returncode, ended.stdout) == (0, "interrupted True\n" * 2), ended.stderr


def test_slow_sweeps_of_tuning_are_explained(
    lm: slowllm.LM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Any sweep counts as slow, and any wait explains it.
    monkeypatch.setattr(slowdown, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(slowdown, "WAITED", 0.0)
    forecast = Forecast(1, 1e-6, 1e-6, 1e-6, 1e-6, 0.0, 10**12, is_measured=True)
    monkeypatch.setattr(lm, "plan", replace(lm.plan, forecast=forecast))
    ids = lm.tokenizer("The value is returned.", return_tensors="pt")["input_ids"]

    def step() -> None:
        embedded = lm.model.get_input_embeddings()(ids).requires_grad_()
        lm.model(inputs_embeds=embedded, labels=ids).loss.backward()

    with steps(lm, Job(64, 64, turns=True), "steps"):
        for _ in range(2):  # the last stop of a ride may be reported after its end
            lm.ride([step])
    assert capsys.readouterr().err.startswith("slowllm: the last sweep took ")
