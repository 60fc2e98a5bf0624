"""What `slowllm.load` returns: a loaded model that scores, chooses, answers and continues texts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

from slowllm.errors import InputError
from slowllm.inference.choices import Item, Normalize, choose, encode_item
from slowllm.inference.generation import Continuation, Prompt, Settings, generate
from slowllm.inference.prefix_sharing import Query
from slowllm.inference.scoring import answer, encode_pair, safe_exp
from slowllm.runtime.streamed_lm import StreamedLM


@dataclass(frozen=True)
class Likelihood:
    """How likely a text is.

    Attributes:
        log_probs: natural logarithms, one for each token.
        tokens: the tokens' ids.
        is_greedy: whether each token was the likeliest of its place.
    """

    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]
    is_greedy: bool

    @property
    def log_likelihood(self) -> float:
        """Sum over the tokens, in nats."""
        return math.fsum(self.log_probs)

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood of a token."""
        return safe_exp(-self.log_likelihood / len(self.log_probs))


class LM(StreamedLM):
    """A loaded model. Every method takes any number of texts, and reads the weights as seldom as the plan allows."""

    def score(self, texts: Sequence[str], continuations: Sequence[str] | None = None) -> list[Likelihood]:
        """Return how likely texts are, or continuations after their contexts.

        The first token of a text is scored after BOS, or EOS where the tokenizer has no BOS.

        Args:
            texts: to be scored; or contexts, which are not scored.
            continuations: one for each context, with the blank that they begin with.
        Raises:
            InputError: a text has no tokens, or too many; it is named by its number, from 0.
        """
        _refuse_other_than_texts(texts, "texts")
        if continuations is None:
            pairs = [("", text) for text in texts]
        else:
            _refuse_other_than_texts(continuations, "continuations")
            if len(texts) != len(continuations):
                raise InputError(
                    f"{len(texts)} contexts have {len(continuations)} continuations; give one for each"
                )
            pairs = list(zip(texts, continuations, strict=True))
        queries: list[Query] = []
        for number, pair in enumerate(pairs):
            with _named("text", number):
                queries.append(encode_pair(self, *pair))
        return [
            Likelihood(found.log_probs, query.continuation, found.is_greedy)
            for query, found in zip(queries, answer(self, queries), strict=True)
        ]

    @overload  # a str is a sequence of str as well; the first that fits is taken
    def choose(  # type: ignore[overload-overlap]
        self, context: str, choices: Sequence[str], normalize: Normalize = "none"
    ) -> list[float]: ...

    @overload
    def choose(
        self,
        context: Sequence[str],
        choices: Sequence[str] | Sequence[Sequence[str]],
        normalize: Normalize = "none",
    ) -> list[list[float]]: ...

    def choose(
        self,
        context: str | Sequence[str],
        choices: Sequence[str] | Sequence[Sequence[str]],
        normalize: Normalize = "none",
    ) -> list[float] | list[list[float]]:
        """Return the probabilities of choices after a context, against one another.

        Where every choice is a single token, only their own rows of the head are read.

        Args:
            context: one, or any number of them.
            choices: what may follow, with the blank that it begins with; for several contexts the same choices for
                all, or a list for each.
            normalize: what is compared: log-likelihoods as they are (``none``), a share of each of their ``tokens`` or
                ``characters``, or less the log-likelihood without the context (``unconditional``).
        Returns:
            probabilities that sum to 1, in the order of the choices; for several contexts a list for each.
        Raises:
            InputError: there are no choices, one has no tokens, or they are too long.
        """
        contexts: Any = [context] if isinstance(context, str) else context
        if isinstance(choices, str) or not isinstance(choices, list | tuple):
            raise InputError("choices must be a list of texts, or for several contexts a list for each")
        _refuse_other_than_texts(contexts, "contexts")
        each: list[Sequence[str]] = [choices] * len(contexts)
        if choices and not isinstance(choices[0], str):
            if len(choices) != len(contexts):
                raise InputError(
                    f"{len(contexts)} contexts have {len(choices)} lists of choices; give one for each"
                )
            each = list(choices)
        items = []
        for number, (text, own) in enumerate(zip(contexts, each, strict=True)):
            with _named("context", number):
                _refuse_other_than_texts(own, "choices")
                items.append(encode_item(self, Item(text, tuple(own)), normalize))
        relative = all(item.is_relative for item in items)
        found = [list(chosen.probabilities) for chosen in choose(self, items, relative=relative)]
        return found[0] if isinstance(context, str) else found

    def yes_no(
        self,
        questions: Sequence[str],
        *,
        template: str = "Question: {question}\nAnswer:",
        yes: str = " yes",
        no: str = " no",
    ) -> list[float]:
        """Return the probability of yes, against no, for each question.

        Args:
            questions: any number of them.
            template: in which ``{question}`` stands for the question.
            yes: the one answer.
            no: the other.
        Raises:
            InputError: the template has no ``{question}``, or a question is too long.
        """
        _refuse_other_than_texts(questions, "questions")
        if "{question}" not in template:
            raise InputError(f"the template {template!r} has no {{question}}")
        contexts = [template.replace("{question}", question) for question in questions]
        return [probabilities[0] for probabilities in self.choose(contexts, [yes, no])]

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[tuple[Continuation, ...]]:
        """Return continuations of prompts; one sweep for each token of all of them.

        Args:
            prompts: any number of them; BOS is put before each where the tokenizer does so by itself.
            settings: fields of `Settings`, such as ``max_new_tokens``.
        Raises:
            InputError: a setting cannot be used, or a prompt is empty or too long.
            NonFiniteError: NaN came out of the model for a prompt; `generation.generate` hands over the others' results
                before that.
        """
        _refuse_other_than_texts(prompts, "prompts")
        known = [field.name for field in fields(Settings)]
        if wrong := sorted(set(settings) - set(known)):
            raise InputError(f"no such setting: {', '.join(wrong)}; there are {', '.join(known)}")
        chosen = Settings(**settings)
        encoded = [self.tokenizer(text, verbose=False)["input_ids"] for text in prompts]
        return list(generate(self, [Prompt(tuple(ids), chosen) for ids in encoded]))


load = LM.open


@contextlib.contextmanager
def _named(kind: str, number: int) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{kind} {number}: {error}") from error


def _refuse_other_than_texts(texts: Any, name: str) -> None:
    """Refuse what is no list of texts that a tokenizer takes."""
    if isinstance(texts, str):
        raise InputError(f"{name} must be a list of texts, not one text")
    if not isinstance(texts, list | tuple):
        raise InputError(f"{name} must be a list of texts, not {type(texts).__name__}")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{name} must be texts, but number {number} is {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{name}: number {number} cannot be encoded as UTF-8 ({error.reason})"
            ) from error
