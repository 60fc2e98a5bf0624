"""The loop of a conversation, without a terminal."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import slowllm
from slowllm.entrypoints.cli import chat_loop
from slowllm.entrypoints.conversation import Conversation
from slowllm.errors import NonFiniteError
from slowllm.inference.generation_types import Settings

CONTEXT = 200


def talk(lm: Any, text: str, monkeypatch: Any, capsys: Any, context: int = CONTEXT, **settings: Any) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat_loop.converse(
        lm, Conversation(lm.tokenizer), Settings(**settings), context=context, rates=slowllm.Rates()
    )
    return capsys.readouterr().out


def test_answers_are_those_of_transformers(lm: Any, talkative: Path, monkeypatch: Any, capsys: Any) -> None:
    plain = AutoModelForCausalLM.from_pretrained(talkative, dtype=torch.float32)
    text = "The value "
    for question in ("", "This function "):
        text += question
        ids = lm.tokenizer(text, return_tensors="pt")
        new = plain.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        text += lm.tokenizer.decode(new).strip() + " "
    shown = talk(lm, "The value\n\nThis function\n", monkeypatch, capsys, max_new_tokens=6)
    head, *rest = shown.splitlines()
    assert re.match(r"talkative, 7\.5 MB: a sweep a token\. /help lists the commands", head)
    assert rest[1::2] == ["(cut at 6 tokens)"] * 2
    assert f"The value {rest[0]} This function {rest[2]} " == text


def test_drawn_answers_differ_and_a_seed_gives_them_again(lm: Any, monkeypatch: Any, capsys: Any) -> None:
    settings = {"max_new_tokens": 6, "do_sample": True, "top_k": 0, "seed": 3}
    shown = [
        talk(lm, "The value\n/reset\nThe value\n", monkeypatch, capsys, **settings).splitlines()[1:]
        for _ in range(2)
    ]
    assert shown[0] == shown[1]
    assert shown[0][0] != shown[0][3]


def test_a_conversation_that_is_too_long_is_said_and_the_loop_goes_on(
    lm: Any, monkeypatch: Any, capsys: Any
) -> None:
    text = f"{'many words ' * 20}\nThe value\nmore\n/reset\nThe value\n"
    shown = talk(lm, text, monkeypatch, capsys, context=12, max_new_tokens=30)
    assert "tokens with this question, and no more than 12 with the answer are taken; /reset" in shown
    assert shown.count("(cut at 9 tokens)") == 2  # the answer has what room there is
    assert shown.count("/reset begins a new one") == 2


def test_commands_that_cannot_be_done_say_so(lm: Any, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text("")
    shown = talk(
        lm, f"/what\n/save\n/save {file}\n/reset all\n/help\n/quit\nThe value\n", monkeypatch, capsys
    )
    assert "/what: no such command; /help lists them\n" in shown
    assert "/save needs the name of a file\n" in shown
    assert "is there already" in shown
    assert "/reset all: no such command" in shown
    assert shown.endswith("stays in the conversation.\n")  # of the help; nothing after /quit


def test_a_model_that_gives_no_numbers_is_said_and_the_loop_goes_on(
    lm: Any, monkeypatch: Any, capsys: Any
) -> None:
    def fail(*_: Any, **__: Any) -> Iterator[Any]:
        yield ()
        raise NonFiniteError("block 3: NaN")

    monkeypatch.setattr(chat_loop, "generate", fail)
    assert talk(lm, "The value\n/reset\n", monkeypatch, capsys).endswith(
        "block 3: NaN\nThe conversation is forgotten.\n"
    )


def test_a_model_without_template_is_said_once_and_stops_at_the_next_question(
    lm: Any, monkeypatch: Any, capsys: Any
) -> None:
    seen = []

    def end(lm: Any, prompts: Any, **_: Any) -> Iterator[Any]:
        seen.extend(prompts)
        yield from ()

    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    monkeypatch.setattr(chat_loop, "generate", end)
    shown = talk(lm, "a\nb\n", monkeypatch, capsys)
    assert shown.count("has no chat template, so the model continues a plain transcript (User: ...") == 1
    assert [prompt.settings.stop for prompt in seen] == [("\nUser:",)] * 2
    assert shown.count("(the model ended at once; the question is taken back)") == 2
