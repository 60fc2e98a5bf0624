"""What the buttons of the page do, without a browser."""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from slowllm.entrypoints.web import answers, texts
from slowllm.entrypoints.web.answers import Shown
from slowllm.entrypoints.web.completing import settings_of
from slowllm.entrypoints.web.files import MAX_FILES
from slowllm.errors import InputError, RideError
from slowllm.inference import generation
from slowllm.inference.choices import Item, choose, encode_item
from slowllm.inference.generation_types import Prompt, Settings, encode_prompt
from slowllm.inference.pieces import pieces_of
from slowllm.inference.scoring import score_queries
from slowllm.inference.service_types import Ask
from slowllm.inference.text import encode_pair
from tests.support.memory_stops import until
from tests.support.web_page import Counter, all_of, counter, result_of

TEXT = "The value is the value of the object."
# Two requests together round otherwise than each alone, in float32.
NATS = 2e-4


def text_in(body: str) -> str:
    """The text that HTML shows."""
    return html.unescape(re.sub(r"<[^>]*>", "", body))


def test_a_completion_grows_to_what_generate_returns(at: Counter) -> None:
    form = {"max_new_tokens": 8.0, "min_new_tokens": 8}
    shown = all_of(answers.completed(at.desk, "me", "The value is", form))
    settings = Settings(max_new_tokens=8, min_new_tokens=8)
    ((wanted,),) = generation.generate(at.lm, [encode_prompt(at.lm, "The value is", settings)])
    assert text_in(shown[-1].body) == "The value is" + wanted.text
    lengths = [len(text_in(one.body)) for one in shown]
    assert lengths == sorted(lengths)
    assert [one.is_over for one in shown] == [False] * (len(shown) - 1) + [True]
    assert re.search(
        r"8 tokens, [\d.e-]+ s a token, the first after [\d.e-]+ s; ended by max_new_tokens", shown[-1].status
    )


def test_tokens_are_told_before_the_completion_is_over(at: Counter) -> None:
    async def watch() -> str:
        found = answers.completed(
            at.desk, "me", "The value is", {"max_new_tokens": 200, "min_new_tokens": 200}
        )
        async for shown in found:
            if "tokens, " in shown.status and not shown.is_over:
                at.desk.leave("me")
                return shown.status
        raise AssertionError("nothing came before the end")

    assert "s a token" in asyncio.run(watch())


def test_a_completion_of_several_with_likelihoods_shows_each_token(at: Counter) -> None:
    form = {
        "max_new_tokens": 5, "num_return_sequences": 2, "do_sample": True, "temperature": 0.9, "top_k": 0, "seed": "7",
        "top_log_probs": "2",
    }  # fmt: skip
    *_, last = all_of(answers.completed(at.desk, "me", "The value is", form))
    settings = Settings(
        max_new_tokens=5, num_return_sequences=2, do_sample=True, temperature=0.9, top_k=0, seed=7, top_log_probs=2
    )  # fmt: skip
    ride = at.service.submit(Ask(encode_prompt(at.lm, "The value is", settings)))
    wanted = ride.result(60).continuations
    boxes = re.findall(r'<div class="tokens">(.*?)</div>', last.body, re.DOTALL)
    assert [text_in(box) for box in boxes] == [one.text for one in wanted]
    numbers = [[float(nats) for nats in re.findall(r'data-nats="([\d.]+)"', box)] for box in boxes]
    for of_box, one in zip(numbers, wanted, strict=True):
        assert of_box == pytest.approx([-value for value in one.log_probs or ()], abs=1e-3)


def test_the_score_of_a_text_is_that_of_the_engine_token_by_token(at: Counter) -> None:
    *_, last = all_of(answers.scored(at.desk, "me", TEXT))
    (wanted,) = score_queries(at.lm, [encode_pair(at.lm, "", TEXT)])
    (box,) = re.findall(r'<div class="tokens">(.*?)</div>', last.body, re.DOTALL)
    assert text_in(box) == TEXT
    numbers = [float(nats) for nats in re.findall(r'data-nats="([\d.]+)"', box)]
    assert numbers == pytest.approx([-value for value in wanted.log_probs], abs=1e-3)
    said = re.search(r"(\d+) tokens: log-likelihood (-[\d.]+) nats.*perplexity ([\d.]+)", last.status)
    assert said is not None
    assert int(said[1]) == len(wanted.tokens)
    assert float(said[2]) == pytest.approx(wanted.log_likelihood, abs=2e-3)
    assert float(said[3]) == pytest.approx(wanted.perplexity, rel=1e-3)


@pytest.mark.parametrize("normalize", ["none", "tokens", "characters", "unconditional"])
def test_choices_have_the_probabilities_of_the_engine(at: Counter, normalize: Any) -> None:
    *_, last = all_of(
        answers.chosen(at.desk, "me", "The value is", "the\n\nnot set\n zebra", True, normalize)
    )
    item = encode_item(at.lm, Item("The value is", (" the", " not set", " zebra")), normalize)
    (wanted,) = choose(at.lm, [item])
    shares = [float(share) for share in re.findall(r'class="share">([\d.]+)<', last.body)]
    assert shares == pytest.approx(list(wanted.probabilities), abs=NATS)
    assert re.findall(r'class="name">([^<]*)<', last.body) == ["the", "not set", "zebra"]


def test_a_question_is_answered_with_one_of_two_words(at: Counter) -> None:
    template = r"Question: {question}\nAnswer:"
    *_, last = all_of(answers.yes_or_no(at.desk, "me", "Is it? ", template, "yes", "no"))
    item = encode_item(at.lm, Item("Question: Is it?\nAnswer:", (" yes", " no")))
    (wanted,) = choose(at.lm, [item])
    shares = [float(share) for share in re.findall(r'class="share">([\d.]+)<', last.body)]
    assert shares == pytest.approx(list(wanted.probabilities), abs=NATS)


def test_the_lines_of_a_file_are_scored_in_their_order(at: Counter, tmp_path: Path) -> None:
    lines = [f"The value is number {number}." for number in range(40)]
    (upload := tmp_path / "lines.txt").write_text("\n\n".join(lines))
    shown = all_of(answers.file_answered(at.desk, "me", str(upload), "score", None, tmp_path))
    rows = [json.loads(row) for row in result_of(shown[-1]).read_text().splitlines()]
    assert [row["text"] for row in rows] == lines
    assert [row["line"] for row in rows] == list(range(1, 80, 2))
    wanted = list(score_queries(at.lm, [encode_pair(at.lm, "", line) for line in lines]))
    assert [row["log_likelihood"] for row in rows] == pytest.approx(
        [one.log_likelihood for one in wanted], abs=50 * NATS
    )
    assert [row["num_tokens"] for row in rows] == [len(one.tokens) for one in wanted]
    assert "40 of 40 lines" in shown[-1].status


def test_json_lines_are_scored_by_their_parts_and_continued(at: Counter, tmp_path: Path) -> None:
    (upload := tmp_path / "some.jsonl").write_text(
        '{"context": "The value is", "continuation": " the value", "other": 1}\n{"text": "The value"}\n'
    )
    *_, last = all_of(answers.file_answered(at.desk, "me", str(upload), "score", None, tmp_path))
    first, second = map(json.loads, result_of(last).read_text().splitlines())
    (wanted,) = score_queries(at.lm, [encode_pair(at.lm, "The value is", " the value")])
    assert first["log_likelihood"] == pytest.approx(wanted.log_likelihood, abs=10 * NATS)
    assert (first["context"], first["continuation"], second["text"]) == (
        "The value is",
        " the value",
        "The value",
    )
    upload.write_text('{"prompt": "The value is"}\n')
    *_, last = all_of(answers.file_answered(at.desk, "me", str(upload), "continue", 4, tmp_path))
    (row,) = map(json.loads, result_of(last).read_text().splitlines())
    ((found,),) = generation.generate(
        at.lm, [encode_prompt(at.lm, "The value is", Settings(max_new_tokens=4))]
    )
    assert row["continuations"] == [
        {"text": found.text, "finish_reason": found.finish_reason, "num_tokens": 4}
    ]


async def stopped_when_riding(at: Counter, found: AsyncIterator[Shown], stop: Any) -> list[Shown]:
    """All that is shown of what is stopped while the carousel stands."""
    at.gate.close()
    try:
        shown = [await anext(found)]
        assert at.service.status().num_riding
        await asyncio.to_thread(stop)
        return shown + [one async for one in found]
    finally:
        at.gate.open()


@pytest.mark.parametrize("kind", ["complete", None])
def test_who_stops_or_leaves_gives_the_seat_back(at: Counter, kind: str | None) -> None:
    found = answers.completed(at.desk, "me", "The value is", {"max_new_tokens": 400})
    shown = asyncio.run(stopped_when_riding(at, found, lambda: at.desk.leave("me", kind)))
    assert shown[-1].is_over
    assert shown[-1].problem is None
    assert "It was stopped." in shown[-1].status
    assert at.service.status().num_riding == at.service.status().held_tokens == 0
    assert at.desk.rows() == []


def test_others_are_not_stopped_with_one(at: Counter) -> None:
    async def both() -> None:
        others = asyncio.create_task(kept())
        mine = answers.completed(at.desk, "me", "The value", {"max_new_tokens": 400})
        await stopped_when_riding(at, mine, lambda: at.desk.leave("me"))
        assert "stopped" not in await others

    async def kept() -> str:
        found = answers.completed(at.desk, "you", "The value is", {"max_new_tokens": 3})
        return [one async for one in found][-1].status

    asyncio.run(both())


def test_a_generator_that_is_closed_gives_the_seat_back(at: Counter) -> None:
    async def closed() -> None:
        at.gate.close()
        found: Any = answers.completed(at.desk, "me", "The value is", {"max_new_tokens": 400})
        await anext(found)
        assert at.service.status().held_tokens
        await found.aclose()
        assert at.service.status().held_tokens == 0

    asyncio.run(closed())


def test_a_file_that_is_stopped_ends_with_what_was_done(at: Counter, tmp_path: Path) -> None:
    (upload := tmp_path / "lines.txt").write_text("The value is\n" * 200)

    async def stopped() -> list[Shown]:
        found = answers.file_answered(at.desk, "me", str(upload), "continue", 4, tmp_path)
        shown = []
        async for one in found:
            shown.append(one)
            if "width: 0.00%" not in one.body:
                at.desk.leave("me", "file")
        return shown

    shown = asyncio.run(stopped())
    assert "it was stopped" in shown[-1].status
    assert 0 < len(result_of(shown[-1]).read_text().splitlines()) < 200


def test_an_errand_that_was_stopped_asks_nothing_more(at: Counter) -> None:
    with at.desk.errand("me", "score") as errand:
        errand.stop()
        with pytest.raises(RideError, match="it was stopped"):
            errand.submit(Ask(Prompt((5, 6)), 1, only_prompt=True))


def problem_of(found: AsyncIterator[Shown]) -> str:
    """What was wrong; it is shown on the page, without markup of its own."""
    *_, last = all_of(found)
    assert last.is_over
    assert last.problem is not None
    assert html.escape(last.problem) in last.status
    return last.problem


def test_what_cannot_be_continued_is_said_in_one_sentence(at: Counter) -> None:
    def said(text: str, **form: Any) -> str:
        return problem_of(answers.completed(at.desk, "me", text, form))

    assert said("") == "a prompt is empty: the tokenizer makes no tokens of it"
    assert "but memory was planned for 16 rows and" in said("word " * 600, max_new_tokens=4)
    assert "but the model takes" in said("word " * 5000, max_new_tokens=4)
    assert "temperature must be a number of at least" in said("a", do_sample=True, temperature=0)
    assert "min_new_tokens 9 is more than 4 at most" in said("a", max_new_tokens=4, min_new_tokens=9)
    assert said("a" * (texts.MAX_CHARACTERS + 1)).startswith("the text has 500,001 characters")


def test_what_cannot_be_judged_is_said_in_one_sentence(at: Counter) -> None:
    assert problem_of(answers.scored(at.desk, "me", "  ")) == "give a text to score"
    few = answers.chosen(at.desk, "me", "a", "one\n", True, "none")
    assert problem_of(few) == "give at least two choices, one a line"

    def said(*given: str) -> str:
        return problem_of(answers.yes_or_no(at.desk, "me", *given))

    assert said(" ", "{question}", "yes", "no") == "give a question"
    assert said("Is it?", "{q}", "yes", "no") == "the template '{q}' has no {question}"
    assert "must be two different words" in said("Is it?", "{question}", "yes", "yes ")


@pytest.mark.parametrize(
    ("name", "content", "what", "message"),
    [
        ("a.txt", b"one\xff\n", "score", "a.txt: line 1 is not UTF-8"),
        ("a.txt", b"\x00\x01", "score", "a.txt: is a binary file and not text"),
        ("a.txt", b" \n", "score", "a.txt: has no non-empty line"),
        ("a.parquet", b"PAR1", "score", "a.parquet: is no file of lines; upload a text file"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "score", "a.jsonl: line 2: is JSON, but no object"),
        ("a.jsonl", b'{"prompt": "a"}\n', "score", 'a.jsonl: line 1: has no "text", or "context" and'),
        ("a.jsonl", b'{"prompt": 1}\n', "continue", 'a.jsonl: line 1: has no "prompt" that is a text'),
        ("a.txt", b"a\n" * 10_001, "score", "a.txt: has 10,001 lines, and this page takes 10,000; divide it"),
        ("a.txt", b"fine\n" + b"word " * 600, "score", "a.txt: line 2: the request has 1 times"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_as_a_whole(
    at: Counter, tmp_path: Path, name: str, content: bytes, what: Any, message: str
) -> None:
    (upload := tmp_path / name).write_bytes(content)
    before = at.service.status().num_prompt_tokens
    said = problem_of(answers.file_answered(at.desk, "me", str(upload), what, 4, tmp_path))
    assert said.startswith(message)
    assert str(tmp_path) not in said
    assert at.service.status().num_prompt_tokens == before


def test_so_many_files_at_once_are_enough(at: Counter, tmp_path: Path) -> None:
    (upload := tmp_path / "lines.txt").write_text("The value is\n")
    with contextlib.ExitStack() as others:
        for number in range(MAX_FILES):
            others.enter_context(at.desk.errand(f"visitor {number}", "file"))
        said = problem_of(answers.file_answered(at.desk, "me", str(upload), "score", 4, tmp_path))
        assert said == "4 files of visitors are under way already; ask again later"


def test_no_file_is_no_file(at: Counter, tmp_path: Path) -> None:
    said = problem_of(answers.file_answered(at.desk, "me", None, "score", 4, tmp_path))
    assert said == "upload a file of lines first"


def test_a_full_service_says_so_and_a_file_waits_its_turn(tmp_path: Path) -> None:
    (upload := tmp_path / "lines.txt").write_text("The value is\n" * 30)
    with counter(max_waiting=2) as small:
        # Lines for which there is no room among those that wait are asked for when others have ended.
        *_, last = all_of(answers.file_answered(small.desk, "me", str(upload), "score", 4, tmp_path))
        assert "30 of 30 lines" in last.status

        async def crowd() -> str | None:
            small.gate.close()
            texts = ["The value", "of it", "and more", "than that"]
            first = [answers.completed(small.desk, text, text, {"max_new_tokens": 9}) for text in texts]
            started = [asyncio.create_task(anext(one)) for one in first]
            await asyncio.to_thread(until, lambda: small.service.status().num_waiting == 2)
            found = answers.file_answered(small.desk, "me", str(upload), "score", 4, tmp_path)
            *_, last = [one async for one in found]
            for visitor in texts:
                small.desk.leave(visitor)
            small.gate.open()
            await asyncio.gather(*started, return_exceptions=True)
            for one in first:
                await one.aclose()  # type: ignore[attr-defined]
            return last.problem

        said = asyncio.run(crowd())
        assert said == "2 requests wait already; ask again later"


def test_a_service_that_closes_says_so() -> None:
    with counter() as closing:
        closing.service.drain(0.0)
        said = problem_of(answers.scored(closing.desk, "me", TEXT))
        assert said == "the service is closing and takes nothing new"


def test_texts_stand_for_themselves(at: Counter, tmp_path: Path) -> None:
    evil = '<img src=x onerror="x()">'
    form = {"max_new_tokens": 2, "stop": evil}
    for found in (
        answers.completed(at.desk, "me", evil, form),
        answers.scored(at.desk, "me", evil),
        answers.chosen(at.desk, "me", evil, f"{evil}\nb", True, "none"),
        answers.yes_or_no(at.desk, "me", evil, evil, "yes", "no"),
    ):
        assert all("<img" not in one.body + one.status for one in all_of(found))


def test_pieces_of_tokens_are_the_whole_text(at: Counter) -> None:
    text = "Größe  von\n日本 🎠!"
    ids = encode_pair(at.lm, "", text).continuation
    pieces = pieces_of(at.lm.tokenizer, (), ids)
    assert "".join(pieces) == text
    assert len(pieces) == len(ids)


def test_a_form_becomes_settings() -> None:
    form = {
        "max_new_tokens": 7.0, "num_beams": None, "do_sample": False, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": "4",
        "top_log_probs": "", "stop": "\\n\n\nEnd", "repetition_penalty": 1.5,
    }  # fmt: skip
    assert settings_of(form) == Settings(max_new_tokens=7, stop=("\n", "End"), repetition_penalty=1.5)
    drawn = settings_of({**form, "do_sample": True})
    assert (drawn.temperature, drawn.top_k, drawn.top_p, drawn.seed) == (0.5, 3, 0.9, 4)
    for name, value in (("max_new_tokens", 1.5), ("top_log_probs", "few"), ("num_beams", float("inf"))):
        with pytest.raises(InputError, match=f"{name} must be a whole number"):
            settings_of({name: value})


def test_the_machine_says_where_the_carousel_is_and_who_rides(at: Counter) -> None:
    assert "Nobody rides." in at.machine.live_html("me")
    plan = at.machine.plan_html()
    assert "tiny-bloom, 10 blocks, computed in float32" in text_in(plan)
    assert "streamed" in plan
    assert at.machine.live_html("me").count("<path") == at.lm.num_stops

    async def looked() -> str:
        at.gate.close()
        mine = answers.completed(at.desk, "me", "The value is", {"max_new_tokens": 400})
        yours = answers.scored(at.desk, "you", TEXT)
        await anext(mine)
        await anext(yours)
        live = at.machine.live_html("me")
        at.desk.leave("me")
        at.desk.leave("you")
        at.gate.open()
        for one in (mine, yours):
            await one.aclose()  # type: ignore[attr-defined]
        return live

    live = asyncio.run(looked())
    rows = re.findall(r"<tr><td>visitor \d+( \(you\))?</td><td>(\w+)</td><td>(\d)</td><td>(\d)</td>", live)
    assert [row[:2] for row in rows] == [(" (you)", "complete"), ("", "score")]
    assert sum(int(riding) + int(waiting) for *_, riding, waiting in rows) == 2
    assert live.count(" here") == 1
    until(lambda: at.service.status().held_tokens == 0)
    assert "Nobody rides." in at.machine.live_html("me")
