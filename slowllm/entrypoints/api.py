"""What `slowllm.load` returns: a loaded model that scores, chooses, answers and continues texts."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, overload

from slowllm.entrypoints.job_progress import Gauge, ShowProgress, check_show, telling
from slowllm.errors import InputError, counted
from slowllm.html import facts_html, text_html
from slowllm.inference.choices import Item, Normalize, choose, encode_item
from slowllm.inference.generation import generate, job_of
from slowllm.inference.generation_types import SAMPLING, Continuation, Settings, encode_prompt
from slowllm.inference.likelihood import Likelihood
from slowllm.inference.pieces import TokenTexts
from slowllm.inference.results import Results
from slowllm.inference.scoring import job_of_queries, score_queries
from slowllm.inference.text import Query, encode_pair
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.options import by_field_name, format_binary, format_bytes, parse_dtype
from slowllm.planning.budget import Budget
from slowllm.planning.forecast import forecast_of
from slowllm.planning.job import Granularity, Job, Rates
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.rates import quick_rates
from slowllm.runtime.streamed_lm import StreamedLM

if TYPE_CHECKING:
    from slowllm.swarm.client import SwarmOptions

# What options of `slowllm generate` are called in `Settings`, where transformers' names are used.
_OPTIONS = {
    "beams": "num_beams", "sample": "do_sample", "num_sequences": "num_return_sequences", "log_probs": "top_log_probs",
}  # fmt: skip


class LM(StreamedLM):
    """A loaded model. Every method takes any number of texts, and reads the weights as seldom as the plan allows.

    Every method has an argument `progress`. True writes on stderr what the call takes, and shows a bar on a terminal and
    in a notebook. A function is called with a `JobProgress` before the first stop, after each, and when the call has
    ended: in between on the thread that computes, so it must not call the model. When it raises, the call ends with its
    error, and the model is as usable as before.

    Attributes:
        progress: of the calls that are not told themselves: False, unless `load` was told otherwise.
        rates: of this machine, where they were measured or given, for the time that a call takes.
    """

    progress: ShowProgress = False
    rates: Rates | None = None

    def score(
        self,
        texts: Sequence[str],
        continuations: Sequence[str] | None = None,
        *,
        progress: ShowProgress | None = None,
    ) -> Results[Likelihood]:
        """Return how likely texts are, or continuations after their contexts.

        The first token of a text is scored after BOS, or EOS where the tokenizer has no BOS.

        Args:
            texts: to be scored; or contexts, which are not scored.
            continuations: one for each context, with the blank that they begin with.
            progress: see `LM`.
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
        found = Results[Likelihood]()
        plan_of = functools.partial(job_of_queries, queries, self)
        with self._showing(progress, plan_of, "text", len(queries)) as count:
            for query, one in zip(queries, score_queries(self, queries), strict=True):
                texts_of_tokens = TokenTexts(self.tokenizer, query.context, query.continuation)
                found.append(replace(one, texts=texts_of_tokens))
                count(len(query.continuation))
        return found

    @overload  # a str is a sequence of str as well; the first that fits is taken
    def choose(  # type: ignore[overload-overlap]
        self,
        context: str,
        choices: Sequence[str],
        normalize: Normalize = "none",
        *,
        progress: ShowProgress | None = None,
    ) -> list[float]: ...

    @overload
    def choose(
        self,
        context: Sequence[str],
        choices: Sequence[str] | Sequence[Sequence[str]],
        normalize: Normalize = "none",
        *,
        progress: ShowProgress | None = None,
    ) -> list[list[float]]: ...

    def choose(
        self,
        context: str | Sequence[str],
        choices: Sequence[str] | Sequence[Sequence[str]],
        normalize: Normalize = "none",
        *,
        progress: ShowProgress | None = None,
    ) -> list[float] | list[list[float]]:
        """Return the probabilities of choices after a context, against one another.

        Where every choice is a single token, only their own rows of the head are read.

        Args:
            context: one, or any number of them.
            choices: what may follow, with the blank that it begins with; for several contexts the same choices for
                all, or a list for each.
            normalize: what is compared: log-likelihoods as they are (``none``), a share of each of their ``tokens`` or
                ``characters``, or less the log-likelihood without the context (``unconditional``).
            progress: see `LM`.
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
        plan_of = functools.partial(job_of_queries, [query for item in items for query in item.queries], self)
        # Single tokens are compared by their own rows of the head, none of whose stops is then visited.
        stops_a_sweep = len(self.layout.modules) if relative else None
        found = []
        with self._showing(progress, plan_of, "context", len(items), stops_a_sweep) as count:
            for chosen in choose(self, items, relative=relative):
                found.append(list(chosen.probabilities))
                count(0)
        return found[0] if isinstance(context, str) else found

    def yes_no(
        self,
        questions: Sequence[str],
        *,
        template: str = "Question: {question}\nAnswer:",
        yes: str = " yes",
        no: str = " no",
        progress: ShowProgress | None = None,
    ) -> list[float]:
        """Return the probability of yes, against no, for each question.

        Args:
            questions: any number of them.
            template: in which ``{question}`` stands for the question.
            yes: the one answer.
            no: the other.
            progress: see `LM`.
        Raises:
            InputError: the template has no ``{question}``, or a question is too long.
        """
        _refuse_other_than_texts(questions, "questions")
        if "{question}" not in template:
            raise InputError(f"the template {template!r} has no {{question}}")
        contexts = [template.replace("{question}", question) for question in questions]
        return [probabilities[0] for probabilities in self.choose(contexts, [yes, no], progress=progress)]

    def generate(
        self, prompts: Sequence[str], *, progress: ShowProgress | None = None, **settings: Any
    ) -> Results[tuple[Continuation, ...]]:
        """Return continuations of prompts; one sweep for each token of all of them.

        Args:
            prompts: any number of them; BOS is put before each where the tokenizer does so by itself.
            progress: see `LM`.
            settings: fields of `Settings`, such as ``max_new_tokens``, or the options of `slowllm generate` that have
                other names: ``beams``, ``sample``, ``num_sequences``, ``log_probs``.
        Raises:
            InputError: a setting cannot be used or needs sampling, or a prompt is empty or too long.
            NonFiniteError: NaN came out of the model for a prompt; `generation.generate` hands over the others' results
                before that.
        """
        _refuse_other_than_texts(prompts, "prompts")
        settings = by_field_name(settings, _OPTIONS)
        known = [field.name for field in fields(Settings)]
        if wrong := sorted(set(settings) - set(known)):
            raise InputError(f"no such setting: {', '.join(wrong)}; there are {', '.join(known)}")
        chosen = Settings(**settings)
        if (given := next((name for name in SAMPLING if name in settings), None)) and not settings.get(
            "do_sample"
        ):
            raise InputError(f"{given} needs do_sample=True")
        encoded = [encode_prompt(self, text, chosen) for text in prompts]
        results = Results[tuple[Continuation, ...]]()
        plan_of = functools.partial(job_of, self, encoded)
        with self._showing(progress, plan_of, "prompt", len(encoded)) as count:
            for found in generate(self, encoded):
                results.append(found)
                count(sum(len(one.ids) for one in found))
        return results

    @contextlib.contextmanager
    def _showing(
        self,
        show: ShowProgress | None,
        plan_of: Callable[[Rates], Job],
        noun: str,
        total: int,
        stops_a_sweep: int | None = None,
    ) -> Iterator[Callable[[int], None]]:
        """Show the progress of a call, and yield what counts its results with their new tokens.

        Args:
            show: as the call was told; None for what the model was.
            plan_of: returns the call's job.
            noun: what a result is, in the singular.
            total: number of results.
            stops_a_sweep: that the call visits in a sweep; by default all.
        """
        show = self.progress if show is None else show
        check_show(show)
        if show is False or not total:
            yield lambda _: None
            return
        rates, plan = self.rates or Rates(), self.plan
        job = plan_of(rates)
        forecast = forecast_of(
            self.sizes, plan.resident, plan.ring_bytes, plan.rider_tokens, plan.sweep_tokens, job, rates,
            plan.kept_units,
        )  # fmt: skip
        if show is True:
            from slowllm.entrypoints.progress import progress

            shown = progress(
                self, job, noun=noun, total=total, forecast=forecast, stops_a_sweep=stops_a_sweep
            )
            with shown as count:
                yield count
            return
        with telling(self, Gauge(self, forecast.num_sweeps, stops_a_sweep), show):
            yield lambda _: None

    def _repr_html_(self) -> str:
        if not self._finalizer.alive:
            return f"<div>{text_html(repr(self))}</div>"
        plan, config = self.plan, self.config.get_text_config()
        held = plan.held(len(self.resident), self.num_stops)
        facts = [
            ("model", type(self.model).__name__),
            ("size", f"{self.part_name}, hidden size {config.hidden_size:,}, vocabulary {config.vocab_size:,}"),
            ("compute dtype", str(self.model.dtype).removeprefix("torch.")),
            ("a sweep", format_bytes(self.weight_bytes)),
            ("budget", f"{format_binary(self.budget_bytes)}, of which the model takes {format_binary(plan.peak_bytes)}"),
            ("in memory", f"{held}, {format_bytes(plan.resident_bytes)}" if plan.streams else "all"),
        ]  # fmt: skip
        if plan.streams:
            is_known = self.rates is not None and self.rates.disk_measured
            disk = f"{format_bytes(self.rates.disk)}/s" if self.rates and is_known else "not measured"
            facts.append(("disk", f"{disk}; {format_bytes(self.report.read_bytes)} read so far"))
        if self.soft_prompt is not None:
            facts.append(("soft prompt", counted(self.num_virtual_tokens, "token")))
        if self.swarm is not None:
            facts.append(("blocks", "in the swarm"))
        return facts_html(self.name, facts)


def load(
    model: str | os.PathLike[str] | ModelInfo,
    *,
    ram: str | int | Budget = "auto",
    dtype: str = "auto",
    device: str = "cpu",
    vram: str | int | None = None,
    resident: bool = True,
    keep_resident: bool | None = None,
    job: Job | None = None,
    rates: Rates | None = None,
    granularity: Granularity | None = None,
    prompt: str | os.PathLike[str] | SoftPrompt | None = None,
    exact: bool = True,
    poison: bool = False,
    swarm: str | Sequence[str] | SwarmOptions = (),
    progress: ShowProgress = False,
) -> LM:
    """Open a Hugging Face checkpoint for streaming. Reads headers and small tensors only.

    Args:
        model: a folder with config.json and safetensors, or a hub id that is in the local cache; ``embedded:tiny-bloom``
            for the small model that comes with the package; or a `ModelInfo`.
        ram: budget for the whole process, such as ``16GiB``; ``auto`` is what the machine and its container allow, less
            a reserve; or a `Budget` that several models share.
        dtype: compute dtype: ``auto``, ``bfloat16`` or ``float32`` (also ``bf16``, ``fp32``).
        device: where blocks are computed: ``cpu``, ``cuda``, ``cuda:1``, or several, which take turns, as in
            ``cuda:0,cuda:1``.
        vram: budget on each GPU; by default what is free there, less a reserve.
        resident: whether stops that fit the budget stay in memory.
        keep_resident: the former name of `resident`.
        job: what the model is opened for; by default a session of any calls, gradients among them.
        rates: of this machine, for the plan; assumed where nobody measured.
        granularity: stream whole ``blocks``; blocks whose ``experts`` are read when a router asks for them; or their
            ``leaves``, which takes less memory and cannot run backward; by default what is fastest, by the plan.
        prompt: a soft prompt that stands before every text that is scored or continued, or its folder; a
            `ModelInfo` has its own.
        exact: of experts that are read on demand, whether each rider's rows are multiplied by themselves, with the bits that
            they have alone; else those of several riders together, which is faster where each has few.
        poison: overwrite weights with NaN when they are given back, to find code that keeps them.
        swarm: multiaddress of a peer of a swarm that computes the blocks, as `slowllm serve` prints it, several of them, or
            `SwarmOptions`. The folder then needs only config, tokenizer, embedding, norm and head, and all that is said
            here of blocks and budgets holds for these.
        progress: of the model's calls, see `LM`. With True, disk and processor are measured where nobody did, which
            takes about a second with a large model, so that a call can say how long it takes.
    Raises:
        CheckpointError: a file is missing, damaged or of a kind that is not streamed.
        ArchitectureError: the model does not fit the carousel.
        PlanError: the budget is too small; the message names the smallest that would do.
        InputError: an option cannot be used.
    """
    options: dict[str, Any] = {
        "ram": ram, "dtype": dtype, "device": device, "vram": vram, "job": job, "rates": rates,
        "keep_resident": resident if keep_resident is None else keep_resident, "granularity": granularity,
        "prompt": prompt, "exact": exact, "poison": poison,
    }  # fmt: skip
    check_show(progress)
    if progress is True and rates is None and not swarm and device == "cpu":
        # Before the model takes its memory. The plan does not depend on it, and so no rounding does.
        info = model if isinstance(model, ModelInfo) else ModelInfo(model, prompt)
        rates = quick_rates(info.folder, parse_dtype(dtype))
    lm = _open(model, swarm, options)
    lm.progress, lm.rates = progress, rates
    return lm


def _open(
    model: str | os.PathLike[str] | ModelInfo,
    swarm: str | Sequence[str] | SwarmOptions,
    options: dict[str, Any],
) -> LM:
    if not swarm:
        return open_model(LM, model, **options)
    from slowllm.swarm.client import open_client, options_of

    return open_client(LM, model, options_of(swarm), **options)


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
