"""The Python API: scores and choices equal plain transformers', and cost as few sweeps as can be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import slowllm
from slowllm.errors import CheckpointError, InputError
from slowllm.inference import choices, scoring
from slowllm.inference.text import Query
from tests.support.families import resident
from tests.support.paths import TINY_BLOOM

TEXTS = ["The value is returned.", "value returned is The.", "Return the number of bytes in the buffer."]
HEADER = "The following are questions about the manual. Answer each of them. " * 6


@pytest.fixture(scope="module")
def lm() -> Iterator[slowllm.LM]:
    with slowllm.load(TINY_BLOOM, dtype="fp32", keep_resident=False, poison=True) as lm:
        yield lm


def plain_log_probs(lm: slowllm.LM, context: list[int], continuation: list[int]) -> torch.Tensor:
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        found = resident(lm.folder)(ids).logits[0].log_softmax(-1)
    first = len(context)
    return found[torch.arange(first - 1, ids.shape[1] - 1), ids[0, first:]]


def sweeps(lm: slowllm.LM, work: Callable[[], object]) -> float:
    before = lm.report.num_passages
    work()
    return (lm.report.num_passages - before) / lm.num_stops


def test_texts_are_scored_after_bos(lm: slowllm.LM) -> None:
    for text, found in zip(TEXTS, lm.score(TEXTS), strict=True):
        ids = lm.tokenizer(text)["input_ids"]
        expected = plain_log_probs(lm, [1], ids)
        assert found.tokens == tuple(ids)
        assert torch.allclose(torch.tensor(found.log_probs), expected, rtol=0, atol=1e-5)
        assert found.log_likelihood == pytest.approx(float(expected.sum()), abs=1e-4)
        assert found.perplexity == pytest.approx(math.exp(-float(expected.mean())), rel=1e-5)


def test_continuations_are_scored_after_their_contexts(lm: slowllm.LM) -> None:
    contexts = ["The value ", "The value", ""]
    endings = ["is returned.", " is returned.", "The value"]
    found = lm.score(contexts, endings)
    whole = lm.tokenizer("The value is returned.")["input_ids"]
    start = len(lm.tokenizer("The value")["input_ids"])
    expected = plain_log_probs(lm, whole[:start], whole[start:])
    for one in found[:2]:  # blanks at the end of a context belong to what follows
        assert torch.allclose(torch.tensor(one.log_probs), expected, rtol=0, atol=1e-5)
    assert torch.allclose(
        torch.tensor(found[2].log_probs), plain_log_probs(lm, [1], whole[:start]), rtol=0, atol=1e-5
    )


def test_greedy_continuations_are_known_as_such(lm: slowllm.LM) -> None:
    ids = torch.tensor([lm.tokenizer("Return the number")["input_ids"]])
    new = resident(lm.folder).generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    greedy = lm.tokenizer.decode(new)
    assert [found.is_greedy for found in lm.score(["Return the number"] * 2, [greedy, " of xylophones"])] == [
        True,
        False,
    ]


@pytest.mark.parametrize("normalize", ["none", "tokens", "characters", "unconditional"])
def test_choices_are_weighed_as_plain_transformers_would(
    lm: slowllm.LM, normalize: choices.Normalize
) -> None:
    context, options = "Return the number of", [" bytes in the buffer.", " is.", " the"]
    start = lm.tokenizer(context)["input_ids"]
    scores = []
    for option in options:
        ids = lm.tokenizer(context + option)["input_ids"][len(start) :]
        score = float(plain_log_probs(lm, start, ids).sum())
        if normalize == "tokens":
            score /= len(ids)
        elif normalize == "characters":
            score /= len(option.strip())
        elif normalize == "unconditional":
            score -= float(plain_log_probs(lm, [1], lm.tokenizer(option)["input_ids"]).sum())
        scores.append(score)
    expected = torch.tensor(scores).softmax(0)
    assert torch.allclose(torch.tensor(lm.choose(context, options, normalize)), expected, rtol=0, atol=1e-5)
    assert lm.choose([context], options, normalize) == [lm.choose(context, options, normalize)]


def single_tokens(lm: slowllm.LM) -> list[str]:
    found = [word for word in (" the", " a", " is", " of") if len(lm.tokenizer(word)["input_ids"]) == 1]
    assert len(found) >= 2
    return found[:2]


@pytest.mark.parametrize("normalize", ["none", "tokens", "unconditional"])
def test_single_tokens_are_compared_without_the_head(lm: slowllm.LM, normalize: choices.Normalize) -> None:
    options = single_tokens(lm)
    context = lm.tokenizer("Return the number")["input_ids"]
    expected = torch.tensor(
        [
            float(plain_log_probs(lm, context, ids))
            - (normalize == "unconditional") * float(plain_log_probs(lm, [1], ids))
            for ids in (lm.tokenizer(option)["input_ids"] for option in options)
        ]
    ).softmax(0)
    before = lm.report.num_passages
    found = lm.choose("Return the number", options, normalize)
    assert torch.allclose(torch.tensor(found), expected, rtol=0, atol=1e-5)
    assert lm.report.num_passages - before == len(lm.layout.blocks), (
        "blocks once each, and no chunk of the head"
    )


def test_the_head_is_not_read_for_single_tokens() -> None:
    with slowllm.load(TINY_BLOOM, dtype="fp32", keep_resident=False) as lm:
        lm.choose("Return the number", single_tokens(lm))
        blocks = sum(p.num_bytes for stop in lm.layout.stops[: len(lm.layout.blocks)] for p in stop)
        head = sum(chunk.num_bytes for chunk in lm.layout.chunks)
        # Reads are of whole pages, beginning and end of each tensor.
        assert lm.report.read_bytes < blocks + head / 2


@pytest.mark.parametrize(
    "family", ["gemma-2-soft-cap", "cohere-scaled-logits", "granite-scaled-logits", "llama-tied"]
)
def test_single_tokens_are_compared_as_the_model_finishes_its_logits(
    family: str, tiny: Callable[..., Path]
) -> None:
    folder = tiny(family)
    reference = resident(folder)
    with slowllm.load(folder, dtype="fp32", keep_resident=False) as lm:
        queries = [Query((5, 9, 17), (token,)) for token in (3, 200, 306)]
        found = [a.log_likelihood for a in scoring.score_queries(lm, queries, relative=True)]
    logits = reference(torch.tensor([[5, 9, 17]])).logits[0, -1, [3, 200, 306]]
    assert torch.allclose(torch.tensor(found).softmax(0), logits.softmax(0), rtol=0, atol=1e-6)


def test_two_hundred_questions_ride_one_sweep(lm: slowllm.LM) -> None:
    questions = [f"{HEADER}Is {number} the number of bytes?" for number in range(200)]
    assert sweeps(lm, lambda: lm.yes_no(questions, template="{question}")) <= 2


def test_yes_and_no_are_weighed_against_each_other(lm: slowllm.LM) -> None:
    (found,) = lm.yes_no(["Is it returned?"])
    assert found == lm.choose("Question: Is it returned?\nAnswer:", [" yes", " no"])[0]
    (swapped,) = lm.yes_no(["Is it returned?"], yes=" no", no=" yes")
    assert found + swapped == pytest.approx(1)


def test_nothing_is_asked_of_nothing(lm: slowllm.LM) -> None:
    assert lm.score([]) == []
    assert lm.choose([], [" a"]) == []
    assert lm.yes_no([]) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.score("a text"), "texts must be a list of texts"),
        (lambda lm: lm.score(["a"], "b"), "continuations must be a list"),
        (lambda lm: lm.score(["a", "b"], ["c"]), "2 contexts have 1 continuations"),
        (lambda lm: lm.score(["a", ""]), "text 1: '': the tokenizer makes no tokens of it"),
        (lambda lm: lm.score(["a"], [""]), "text 0: '': the tokenizer makes no tokens"),
        (
            lambda lm: lm.score(["the " * 3000]),
            r"text 0: \d+ tokens are more than the 2048 that this model takes",
        ),
        (lambda lm: lm.choose("a", []), "context 0: there are no choices"),
        (lambda lm: lm.choose("a", " b"), "choices must be a list"),
        (lambda lm: lm.choose(["a", "b"], [["c"]]), "2 contexts have 1 lists of choices"),
        (lambda lm: lm.choose("a", [" b", ""]), "context 0: '': the tokenizer makes no tokens"),
        (lambda lm: lm.choose("a", [" b"], "words"), "normalize 'words' is unknown"),
        (lambda lm: lm.yes_no("Is it?"), "questions must be a list"),
        (lambda lm: lm.yes_no(["Is it?"], template="Q:"), r"the template 'Q:' has no \{question\}"),
        (lambda lm: lm.generate("a"), "prompts must be a list"),
        (lambda lm: lm.score(None), "texts must be a list of texts, not NoneType"),
        (lambda lm: lm.score({"a": 1}), "texts must be a list of texts, not dict"),
        (lambda lm: lm.score(["a", b"a"]), "texts must be texts, but number 1 is bytes"),
        (lambda lm: lm.score(["\ud800"]), "texts: number 0 cannot be encoded as UTF-8"),
        (lambda lm: lm.choose(None, [" a"]), "contexts must be a list of texts, not NoneType"),
        (lambda lm: lm.choose([1], [" a"]), "contexts must be texts, but number 0 is int"),
        (lambda lm: lm.choose(["a"], [[1]]), "context 0: choices must be texts, but number 0 is int"),
        (lambda lm: lm.generate([None]), "prompts must be texts, but number 0 is NoneType"),
        (lambda lm: lm.generate(["a"], max_tokens=3), "no such setting: max_tokens"),
    ],
)
def test_what_cannot_be_asked_is_said(
    lm: slowllm.LM, call: Callable[[slowllm.LM], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(lm)


def test_an_item_without_probability_has_equal_shares() -> None:
    assert choices.chosen([-math.inf, -math.inf]).probabilities == (0.5, 0.5)
    found = choices.chosen([-1.0, -1000.0, -1.0])
    assert found.probabilities == pytest.approx((0.5, 0.0, 0.5))
    assert found.best == 0


def test_a_text_that_memory_was_not_planned_for_is_refused_and_takes_a_job() -> None:
    text = "the value " * 500
    with (
        slowllm.load(TINY_BLOOM, dtype="fp32") as lm,
        pytest.raises(InputError, match=r"sequences of 512; load the"),
    ):
        lm.score([text])
    with slowllm.load(TINY_BLOOM, dtype="fp32", job=slowllm.Job(1100, 1100, repeated=True)) as lm:
        assert len(lm.score([text])[0].log_probs) > 900


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": "END"}, "stop must be a list of strings"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1"),
        ({"temperature": 0.5}, "^temperature needs do_sample=True$"),
        ({"top_k": 50, "sample": False}, "^top_k needs do_sample=True$"),
        ({"beams": 2, "num_beams": 2}, "beams and num_beams are one setting; give it once"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(
    lm: slowllm.LM, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        lm.generate(["The value"], **settings)


def test_settings_may_have_the_names_of_the_command_lines_options(lm: slowllm.LM) -> None:
    by_option = lm.generate(["The value"], sample=True, seed=3, top_k=9, num_sequences=2, log_probs=1)
    by_field = {"do_sample": True, "num_return_sequences": 2, "top_log_probs": 1}
    assert by_option == lm.generate(["The value"], seed=3, top_k=9, **by_field)


def test_a_loaded_model_says_what_it_is(lm: slowllm.LM) -> None:
    assert repr(lm).startswith("<LM tiny-bloom: BloomForCausalLM, 10 blocks, float32, 7.5 MB")
    assert re.search(r" a sweep, budget [\d.]+GiB, 0 of \d+ stops resident>$", repr(lm))
    with slowllm.load("embedded:tiny-bloom-draft", ram="4GiB", resident=True) as small:
        assert repr(small).endswith("budget 4GiB, all in memory>")
    assert repr(small) == "<LM tiny-bloom-draft, closed>"


def test_a_model_has_to_be_named() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        slowllm.load()  # type: ignore[call-arg]
    with pytest.raises(InputError, match="not as NoneType; the embedded one is called embedded:tiny-bloom"):
        slowllm.load(None)  # type: ignore[arg-type]
    with pytest.raises(
        CheckpointError, match="no such embedded model; there are tiny-bloom, tiny-bloom-draft"
    ):
        slowllm.load("embedded:bloom")


def test_stop_strings_may_be_a_list(lm: slowllm.LM) -> None:
    ((found,),) = lm.generate(["The value is"], max_new_tokens=8, stop=["value"])
    assert found.finish_reason == "stop"
    assert "value" not in found.text


def test_what_came_before_an_error_in_the_source_is_answered(lm: slowllm.LM) -> None:
    def source() -> Iterator[Query]:
        yield Query((1,), (5, 6))
        raise OSError("the source broke")

    found = scoring.score_queries(lm, source())
    assert len(next(found).log_probs) == 2
    with pytest.raises(OSError, match="the source broke"):
        next(found)


def test_leaves_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each rider would hold what it took of another's keys and values while it waits inside the block.
    monkeypatch.setattr("slowllm.modeling.layout.MIN_LEAF_BYTES", 1)
    queries = [Query((*range(10, 60), number), (5,)) for number in range(60)]
    with slowllm.load(TINY_BLOOM, dtype="fp32", granularity="leaves") as lm:
        passed: list[int] = []
        lm.model.transformer.word_embeddings.register_forward_hook(lambda *a: passed.append(a[1][0].numel()))
        list(scoring.score_queries(lm, queries))
    assert sum(passed) == 60 * 51
