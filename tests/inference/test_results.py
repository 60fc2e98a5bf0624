"""Results are a list for programs, and a table in a notebook."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest

import slowllm
from slowllm import Continuation, Likelihood
from slowllm.inference.results import MOST_ROWS, Results
from tests.support.paths import TINY_BLOOM

EVIL = "Return <script>alert(1)</script>\n & more."


@pytest.fixture(scope="module")
def lm() -> Iterator[slowllm.LM]:
    with slowllm.load(TINY_BLOOM, dtype="fp32", resident=False) as lm:
        yield lm


@pytest.fixture(scope="module")
def scored(lm: slowllm.LM) -> Results[Likelihood]:
    return lm.score([EVIL, "The value is returned."])


@pytest.fixture(scope="module")
def shown(lm: slowllm.LM, scored: Results[Likelihood]) -> dict[str, str]:
    """Return the HTML of everything that has some."""
    continued = lm.generate(["The value is"] * 2, max_new_tokens=2, log_probs=1)
    tuned = slowllm.tune(TINY_BLOOM, [EVIL, "The value."], [EVIL], steps=3, tokens=2, dtype="fp32")
    found = {
        "likelihood": scored[0], "scored": scored, "continuation": Continuation((1,), EVIL, "stop"),
        "continued": continued, "trial": tuned[0], "tuned": tuned, "failed": replace(tuned[0], failure=EVIL), "plan": lm.plan, "model": lm,
        "of anything": Results([EVIL]), "empty": Results(),
    }  # fmt: skip
    return {name: one._repr_html_() for name, one in found.items()}


def test_results_are_a_list(scored: Results[Likelihood]) -> None:
    assert isinstance(scored, list)
    assert scored == list(scored)
    assert isinstance(scored[:1], Results)
    assert scored[:1] == [scored[0]]
    assert scored[-1].tokens
    assert type(pickle.loads(pickle.dumps(scored))) is list
    assert pickle.loads(pickle.dumps(scored)) == scored == copy.deepcopy(scored)


def test_a_likelihood_knows_the_texts_of_its_tokens(lm: slowllm.LM, scored: Results[Likelihood]) -> None:
    texts = scored[0].texts
    assert texts is not None
    assert "".join(texts) == EVIL
    assert len(texts) == len(scored[0].tokens)
    assert (texts[0], list(texts[:1])) == ("Return", ["Return"])
    (after,) = lm.score(["The value"], [" is returned."])
    assert after.texts is not None
    assert list(after.texts) == [" is", " returned", "."]
    assert repr(after.texts) == "[' is', ' returned', '.']"


def test_texts_are_no_part_of_what_is_compared_or_kept(scored: Results[Likelihood]) -> None:
    plain = Likelihood(scored[0].log_probs, scored[0].tokens, scored[0].is_greedy)
    assert plain == scored[0]
    assert hash(plain) == hash(scored[0])
    assert "texts" not in repr(scored[0])
    assert pickle.loads(pickle.dumps(scored[0])).texts is None
    assert asdict(scored[0])["texts"] is None
    assert f">{plain.tokens[0]} </span>" in plain._repr_html_()


def test_html_has_no_tags_of_texts_no_references_and_no_fixed_background(shown: dict[str, str]) -> None:
    for name, made in shown.items():
        assert "<script" not in made, name
        assert not re.search(r"https?:|src=|href=|url\(|class=", made), name
        assert set(re.findall(r"background[^;\"]*", made)) <= set(
            re.findall(r"background-color: rgba\(224, 80, 32, 0\.\d+\)", made)
        ), name
        assert not re.search(r"[\"; ]color:", made), name
        assert made.count("<table") == made.count("</table>")
        assert made.count("<div") == made.count("</div>")


def test_html_says_what_a_reader_wants_to_know(shown: dict[str, str]) -> None:
    assert ">Return</span>" in shown["likelihood"]
    assert "perplexity" in shown["likelihood"]
    assert shown["scored"].count("<tr>") == 3
    assert shown["continued"].count("<tr>") == 3
    assert "log-likelihood" in shown["continued"]
    assert "&lt;script&gt;" in shown["continuation"]
    assert "<polyline" in shown["trial"]
    assert "best validation loss" in shown["tuned"]
    assert "failure</td>" in shown["failed"]
    for word in ("tiny-bloom", "BloomForCausalLM", "10 blocks", "float32", "0 of 11 stops", "budget", "disk"):
        assert word in shown["model"]
    assert "at assumed rates" in shown["plan"]
    assert shown["empty"] == "<div>no results</div>"


def test_long_lists_are_cut(scored: Results[Likelihood]) -> None:
    many = Results([scored[1]] * (MOST_ROWS + 7))
    assert many._repr_html_().count("<tr>") == MOST_ROWS + 1
    assert "and 7 more" in many._repr_html_()


def test_a_closed_model_says_that_it_is() -> None:
    with slowllm.load("embedded:tiny-bloom-draft") as lm:
        assert '<td style="text-align: left">all</td>' in lm._repr_html_()
    assert (
        lm._repr_html_()
        == '<div><span style="white-space: pre-wrap">&lt;LM tiny-bloom-draft, closed&gt;</span></div>'
    )
