"""A stranger's template neither hangs the process nor fills its memory."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from slowllm.entrypoints.conversation import Conversation
from slowllm.errors import InputError, PlanError
from slowllm.inference import bounded_calls
from slowllm.inference.bounded_calls import BoundedCalls
from slowllm.inference.chat_templates import chat_ids, chat_text
from slowllm.inference.prompt_templates import Template, make_questions
from tests.support.paths import TINY_BLOOM

BOMBS = {
    "a constant of 10 GB": ("{{ 'a' * 10**10 }}", "memory"),
    "a text that grows": ("{% set ns = namespace(t='ab') %}{% for i in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}", "memory|longer"),
    "a wide format": ("{{ '%0999999999d' % 5 }}", "memory"),
    "a wide centre": ("{{ 'a' | center(9999999999) }}", "memory"),
    "nested loops": (
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
        "longer than 1 s",
    ),
    "a huge power": ("{{ (9 ** (9 ** 9)) % 7 }}", "longer than 1 s"),
}  # fmt: skip


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    # Default arguments of the constructor.
    monkeypatch.setattr(BoundedCalls.__init__, "__defaults__", (1, 64 << 20))


def children() -> list[psutil.Process]:
    return psutil.Process().children()


@pytest.mark.parametrize(
    "bomb", [bomb if bomb != "a huge power" else pytest.param(bomb, marks=pytest.mark.long) for bomb in BOMBS]
)
def test_a_bomb_in_a_prompt_template_is_one_sentence(bomb: str, one_second: None) -> None:
    jinja, match = BOMBS[bomb]
    with pytest.raises(InputError, match=match):
        make_questions([Template("bomb", jinja + "q ||| Yes", "No ||| Yes")], [(1, {})])
    with pytest.raises(InputError, match=match):
        make_questions([Template("bomb", "q ||| Yes", "No ||| Yes" + jinja)], [(1, {})])


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_in_a_chat_template_is_one_sentence(bomb: str, one_second: None) -> None:
    jinja, match = BOMBS[bomb]
    tokenizer = AutoTokenizer.from_pretrained(TINY_BLOOM)
    tokenizer.chat_template = jinja
    conversation = Conversation(tokenizer)
    conversation.ask("Hello")
    with pytest.raises(InputError, match=f"chat template refuses the conversation.*{match}"):
        conversation.prompt_ids()


@pytest.mark.long
def test_a_chat_template_gives_what_transformers_gives() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_BLOOM)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    messages = [{"role": "user", "content": "The cat <s> sat."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat_ids(tokenizer, messages) == tuple(ids)
    assert chat_text(tokenizer, messages) == tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer.chat_template = "changed"
    assert chat_text(tokenizer, messages) == "changed"
    before = len(children())
    del tokenizer
    gc.collect()
    assert len(children()) < before


def test_a_call_returns_raises_and_ends_with_its_owner() -> None:
    def work(value: Any) -> Any:
        if value is None:
            raise PlanError("it does not fit")
        if value == "foreign":
            raise subprocess.CalledProcessError(1, "false")
        if value == "unpicklable":
            return lambda: value
        return value * 2

    bounded = BoundedCalls[Any, Any](work)
    assert bounded("ab") == "abab"
    with pytest.raises(PlanError, match="it does not fit"):
        bounded(None)
    with pytest.raises(InputError, match="'false' returned"):
        bounded("foreign")
    with pytest.raises(InputError, match="function cannot be handed on"):
        bounded("unpicklable")
    (child,) = [process for process in children() if process.pid == bounded._child[0].pid]  # type: ignore[index]
    bounded.close()
    assert not child.is_running()
    assert bounded([1]) == [1, 1]
    bounded.close()


def test_another_child_takes_the_call_after_one_that_was_killed() -> None:
    bounded = BoundedCalls[Any, int](
        lambda kill: os.kill(os.getpid(), signal.SIGKILL) if kill else os.getpid()
    )  # type: ignore[arg-type,return-value]
    first = bounded(False)
    with pytest.raises(InputError, match="exit code -9"):
        bounded(True)
    assert bounded(False) != first
    bounded.close()


def test_the_child_of_a_killed_owner_holds_no_lock_and_ends(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    program = textwrap.dedent(f"""
        import fcntl, os, signal
        from slowllm.inference.bounded_calls import BoundedCalls
        file = open({str(lock)!r}, "w")
        fcntl.flock(file, fcntl.LOCK_EX)
        bounded = BoundedCalls(lambda _: os.getpid())
        print(bounded(None), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    owner = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert owner.returncode == -signal.SIGKILL
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # run() has returned, so nobody holds the owner's standard output: the child has ended.


def test_the_limits_are_the_documented_ones() -> None:
    assert (bounded_calls.MAX_SECONDS, bounded_calls.MAX_BYTES) == (10, 256 << 20)
