"""A conversation: what is put to the model, what is shown of an answer, and a terminal with its keys."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slowllm
from slowllm.entrypoints.cli import app, chat
from slowllm.entrypoints.cli.screen import Screen
from slowllm.entrypoints.conversation import Conversation, Incoming
from slowllm.errors import InputError, NonFiniteError
from slowllm.inference.generation_types import Settings
from tests.support.paths import ROOT, TINY_BLOOM

# The bare words of the conversation, so that a model that was never taught to chat goes on with them.
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
CONTEXT = 200


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template and an EOS that never comes."""
    folder = tmp_path_factory.mktemp("models") / "talkative"
    shutil.copytree(TINY_BLOOM, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_BLOOM)


@pytest.fixture(scope="module")
def lm(talkative: Path) -> Iterator[slowllm.StreamedLM]:
    with slowllm.load(talkative, dtype="fp32", keep_resident=False) as opened:
        yield opened


# Conversation


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


# What is shown


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


def test_control_characters_do_not_reach_the_terminal() -> None:
    file = io.StringIO()
    Screen(file).write("a\033[31mb\tc\n")
    assert file.getvalue() == "a\N{REPLACEMENT CHARACTER}[31mb    c\n"


# The loop, without a terminal


def talk(lm: Any, text: str, monkeypatch: Any, capsys: Any, context: int = CONTEXT, **settings: Any) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat.converse(
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
    assert re.match(
        r"talkative, 7\.5 MB: about \S+ s a token, the first \S+ s\. /help lists the commands", head
    )
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

    monkeypatch.setattr(chat, "generate", fail)
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
    monkeypatch.setattr(chat, "generate", end)
    shown = talk(lm, "a\nb\n", monkeypatch, capsys)
    assert shown.count("has no chat template, so the model continues a plain transcript (User: ...") == 1
    assert [prompt.settings.stop for prompt in seen] == [("\nUser:",)] * 2
    assert shown.count("(the model ended at once; the question is taken back)") == 2


def test_a_system_message_that_leaves_no_room_is_refused(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["slowllm", "chat", "--context", "20", "--system", "word " * 30])
    with pytest.raises(SystemExit, match="2"):
        app.run()
    assert "--system alone takes all 20 tokens" in capsys.readouterr().err


# A terminal

SLOWLY = """
import sys, time
from slowllm import cli
from slowllm.runtime import streamed_lm
report = streamed_lm._report_passage
def report_slowly(handle, passage):
    report(handle, passage)
    time.sleep(0.05)
streamed_lm._report_passage = report_slowly
cli.run()
"""


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, arguments: list[str]) -> None:
        self.child, self.file = pty.fork()
        if not self.child:
            os.chdir(ROOT)
            os.environ.update({"TERM": "xterm", "COLUMNS": "100", "LINES": "30", "PYTHONPATH": str(ROOT)})
            os.execv(sys.executable, [sys.executable, "-c", SLOWLY, *arguments])
        self.seen = ""

    def wait_for(self, text: str) -> str:
        """Return what was written since the last call, up to the text that is waited for."""
        deadline = time.monotonic() + 60
        while text not in self.seen:
            ready, _, _ = select.select([self.file], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} never came: {self.seen!r}"
            try:
                self.seen += os.read(self.file, 4096).decode(errors="replace")
            except OSError as error:  # the other end is closed
                raise AssertionError(f"it ended before {text!r} came: {self.seen!r}") from error
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def send(self, keys: str) -> None:
        os.write(self.file, keys.encode())

    def close(self) -> int:
        """Wait for the end and return the exit code."""
        try:
            while os.read(self.file, 4096):
                pass
        except OSError:
            pass
        os.close(self.file)
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


def test_a_terminal_stops_answers_keeps_what_came_and_leaves(talkative: Path, tmp_path: Path) -> None:
    terminal = Terminal(
        ["chat", "--model", str(talkative), "--dtype", "fp32", "--stream-all", "--max-new-tokens", "150",
         "--temperature", "0"]
    )  # fmt: skip
    terminal.wait_for("Ctrl-D leaves.")
    terminal.wait_for("> ")
    terminal.send("The value\r")
    # A status behind the text tells of the stop; with the fourth token under way three have been shown.
    shown = terminal.wait_for("token 4")
    assert re.search(r"token 1, about \S+ s: stop \d+/11", shown)
    terminal.send("\x03")
    assert "Traceback" not in terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.send(f"/save {tmp_path / 'first.json'}\r")
    terminal.wait_for("2 messages are in")
    messages = json.loads((tmp_path / "first.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert 0 < len(messages[1]["content"].split()) < 20
    # The model answers again after an answer was stopped, with what came of it in its history.
    terminal.wait_for("> ")
    terminal.send("Another\r")
    terminal.wait_for("token 3")
    terminal.send("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.send("/reset\r")
    terminal.wait_for("The conversation is forgotten.")
    terminal.wait_for("> ")
    # Stopped before the first token, the question is as if it had not been asked.
    terminal.send("The value\r")
    terminal.wait_for("token 1")
    terminal.send("\x03")
    terminal.wait_for("(stopped before anything came")
    terminal.wait_for("> ")
    terminal.send(f"/save {tmp_path / 'second.json'}\r")
    terminal.wait_for("0 messages are in")
    terminal.wait_for("> ")
    # At the prompt Ctrl-C only says how to leave; the arrow brings the last line back.
    terminal.send("half a line\x03")
    terminal.wait_for("Ctrl-D or /quit leaves.")
    terminal.wait_for("> ")
    terminal.send("\x1b[A")
    terminal.wait_for("second.json")
    terminal.send("\x15\x04")
    assert terminal.close() == 0
