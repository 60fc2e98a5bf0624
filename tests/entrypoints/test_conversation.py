"""A conversation: what is put to the model, and what of an answer is shown while it comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slowllm.entrypoints.conversation import Conversation, Incoming
from slowllm.errors import InputError


def test_a_conversation_without_template_is_a_transcript(tokenizer: Any) -> None:
    talk = Conversation(tokenizer, "Be brief.")
    talk.ask("What is a heap?")
    talk.answer("Memory.")
    talk.ask("And a stack?")
    assert (
        talk.transcript()
        == "Be brief.\nUser: What is a heap?\nAssistant: Memory.\nUser: And a stack?\nAssistant:"
    )
    assert talk.prompt_ids() == tuple(tokenizer(talk.transcript())["input_ids"])
    assert talk.stop == ("\nUser:",)


def test_a_conversation_goes_through_the_chat_template(lm: Any) -> None:
    talk = Conversation(lm.tokenizer)
    talk.ask("The value")
    talk.answer("is")
    assert talk.prompt_ids() == tuple(lm.tokenizer("The value is ")["input_ids"])
    assert talk.stop == ()


def test_a_question_without_an_answer_is_taken_back(tokenizer: Any) -> None:
    talk = Conversation(tokenizer)
    talk.ask("What?")
    talk.answer("")
    assert talk.messages == []


def test_a_reset_leaves_the_system_message(tokenizer: Any) -> None:
    talk = Conversation(tokenizer, "Be brief.")
    talk.ask("What?")
    talk.answer("That.")
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_a_conversation_is_saved_and_replaces_no_file(tokenizer: Any, tmp_path: Path) -> None:
    talk = Conversation(tokenizer)
    talk.ask("Größe?")
    talk.answer("8")
    talk.save(tmp_path / "talk.json")
    assert json.loads((tmp_path / "talk.json").read_text()) == {"messages": talk.messages}
    with pytest.raises(InputError, match=r"talk\.json: is there already; name another file"):
        talk.save(tmp_path / "talk.json")
    with pytest.raises(InputError, match="No such file or directory"):
        talk.save(tmp_path / "missing" / "talk.json")


def test_what_the_template_refuses_is_one_sentence(lm: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(lm.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    talk = Conversation(lm.tokenizer)
    talk.ask("What?")
    with pytest.raises(InputError, match=r"refuses the conversation \(roles must alternate"):
        talk.prompt_ids()


def test_text_is_shown_once_it_is_certain() -> None:
    incoming = Incoming(("\nUser:",))
    assert incoming.add(" A") == "A"  # the blank before an answer is none of it
    assert incoming.add(" A\N{REPLACEMENT CHARACTER}") == ""
    assert incoming.add(" Aé") == "é"
    assert incoming.add(" Aé b\nUs") == " b"
    assert incoming.add(" Aé b\nUses") == "\nUses"
    assert incoming.add(" Aé b\nUses\nUser: more") == ""
    assert incoming.finish() == ""
    assert incoming.text == "Aé b\nUses"


def test_what_was_held_back_comes_at_the_end() -> None:
    incoming = Incoming(("\nUser:",))
    assert incoming.add("A\nUser") == "A"
    assert incoming.finish() == "\nUser"
