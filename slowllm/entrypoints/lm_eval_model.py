"""A language model for lm-eval: all requests of a call share as few sweeps as the plan allows.

Importing this module registers the model ``slowllm`` with lm-eval; ``python -m slowllm.harness`` (or ``slowllm eval
lm``) is lm-eval's own command line with it. Tokens, prefixes, truncation from the left and stop strings are those of
lm-eval's ``hf`` model, so that both give the same figures.
"""

from __future__ import annotations

import contextvars
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slowllm.entrypoints.lm_eval_settings import checkpoint_options, settings_of, swarm_options
from slowllm.entrypoints.progress import progress
from slowllm.entrypoints.report.recorder import RunReport
from slowllm.errors import InputError
from slowllm.inference import generation, scoring
from slowllm.inference.chat_templates import chat_text
from slowllm.inference.generation_types import Prompt
from slowllm.inference.likelihood import Likelihood
from slowllm.inference.text import Query, prefix_id
from slowllm.options import parse_dtype
from slowllm.planning.job import Job, Rates
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.rates import quick_rates
from slowllm.runtime.streamed_lm import StreamedLM

try:
    from lm_eval import utils  # type: ignore[import-untyped]
    from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]
    from lm_eval.api.registry import register_model  # type: ignore[import-untyped]
    from lm_eval.models.utils import (  # type: ignore[import-untyped]
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
        resolve_max_length,
    )
except ModuleNotFoundError as error:
    raise InputError(f"lm-eval is not installed ({error}); pip install lm-eval") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance  # type: ignore[import-untyped]

log = logging.getLogger(__name__)
# What follows the models that lm-eval makes in this context; lm-eval passes them nothing but the words of its command line.
FOLLOWER: contextvars.ContextVar[RunReport] = contextvars.ContextVar("FOLLOWER")


@register_model("slowllm")
class SlowLM(TemplateLM):  # type: ignore[misc]
    """A streamed model behind lm-eval's interface.

    The model is opened at the first call, planned for its requests, and again for a later call that needs more.

    Args:
        pretrained: folder, or hub id from the local cache; or a loaded model, which is used as it is.
        ram: memory budget of the whole process.
        dtype: ``auto``, ``bf16`` or ``fp32``.
        prompt: folder of a soft prompt that stands before every text.
        device: where blocks are computed, as for `load`.
        vram: memory budget on each GPU.
        swarm: multiaddresses of peers of the swarm that computes the blocks, with + between them or as a list.
        allowed_peers, blocked_peers, timeout, step_timeout, replay, token_file, identity, weights, spot_check: of the swarm, as
            the options of the command line; several ids with + between them.
        exact: of experts that are read on demand, whether each micro-batch has the bits that it has alone, as it has by default.
        max_length: tokens that the model takes, if not the number in its config.
        max_gen_toks: new tokens where a task sets no limit.
        add_bos_token: whether texts begin with BOS; by default the tokenizer decides.
        prefix_token_id: token before an empty context; by default BOS, or EOS where there is none.
        truncation: passed to the tokenizer when prompts of generation are encoded.
        enable_thinking: passed to the chat template.
        think_end_token: text or id of the token after which the answer begins.
        chat_template_args: further arguments of the chat template.
        batch_size, max_batch_size: ignored; the plan decides how micro-batches are packed.
        trust_remote_code: only False.
    Raises:
        InputError: an argument cannot be used.
    """

    def __init__(
        self,
        pretrained: str | Path | StreamedLM | None = None,
        ram: str = "auto",
        dtype: str = "auto",
        prompt: str | None = None,
        device: str | None = None,
        vram: str | None = None,
        swarm: str | Sequence[str] | None = None,
        exact: bool | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        truncation: bool = False,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if pretrained is None:
            raise InputError("no model is named; give its folder with --model_args pretrained=DIR")
        self._swarm = swarm_options(swarm, unknown)
        if unknown:
            raise InputError(f"slowllm's model has no argument {', '.join(sorted(unknown))}")
        if trust_remote_code:
            raise InputError("remote code is never run; leave trust_remote_code out")
        if enable_thinking and think_end_token is None:
            raise InputError("enable_thinking needs think_end_token, after which the answer begins")
        parse_dtype(dtype)
        self._lm: StreamedLM | None = None
        self._job: Job | None = None
        self._info: ModelInfo | StreamedLM
        if isinstance(pretrained, StreamedLM):
            for name, given in (("soft prompt", prompt), ("swarm", swarm), ("choice of exact", exact)):
                if given is not None:
                    raise InputError(f"a loaded model has its own {name}; give it to load()")
            self._info = self._lm = pretrained
        else:
            self._info = ModelInfo(pretrained, prompt)
        self._ram, self._dtype, self._device, self._vram = ram, dtype, device or "cpu", vram
        self._exact = exact is None or exact
        self.tokenizer: Any = self._info.tokenizer
        self._max_length, self._max_gen_toks = max_length, max_gen_toks
        self.add_bos_token, self.custom_prefix_token_id = add_bos_token, prefix_token_id
        self.truncation, self.enable_thinking = truncation, enable_thinking
        is_id = isinstance(think_end_token, str) and think_end_token.isdigit()
        self.think_end_token = int(think_end_token) if think_end_token and is_id else think_end_token
        self._default_options = checkpoint_options(self._info.folder)
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking

    @property
    def config(self) -> Any:
        """Transformers' config."""
        return self._info.config

    @property
    def lm(self) -> StreamedLM | None:
        """The open model, if there is one."""
        return self._lm

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's EOS, if it has one."""
        return None if self.tokenizer.eos_token_id is None else int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before an empty context, and before a text whose every token is scored."""
        if self.custom_prefix_token_id is not None:
            return self.custom_prefix_token_id
        return prefix_id(self.tokenizer)

    @property
    def max_length(self) -> int:
        """Tokens that the model takes beside a soft prompt."""
        limit = self._max_length or resolve_max_length(self.config, self.tokenizer)
        return int(limit) - self._info.num_virtual_tokens

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task sets no limit."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, under which lm-eval caches requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def close(self) -> None:
        """Close the model, unless the caller opened it. Idempotent."""
        if self._lm is not None and self._lm is not self._info:
            self._lm.close()
            self._lm = self._job = None

    def get_model_info(self) -> dict[str, Any]:
        """Return the description of the model that lm-eval writes beside its results."""
        info: dict[str, Any] = {"model_name": self._info.name}
        if self._lm is not None:
            info |= {
                "model_num_parameters": self._lm.model.num_parameters(),
                "model_dtype": str(self._lm.model.dtype),
                "model_fingerprint": self._lm.fingerprint(),
            }
        return info

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Return a text's token ids.

        Args:
            string: the text.
            add_special_tokens: by default as `add_bos_token` says, unless the text begins with BOS.
            options: ignored.
        """
        if add_special_tokens is None:
            add_special_tokens = self._adds_special(string, self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, **_special(add_special_tokens)))

    def _adds_special(self, text: str, bos: str | None) -> bool | None:
        """Return whether the tokenizer adds special tokens to a text; None where it decides."""
        return False if has_bos_prefix(text, bos) else self.add_bos_token

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether every token was the likeliest) of each request's continuation."""
        if self.enable_thinking:
            raise InputError("enable_thinking is for tasks that generate; this one compares likelihoods")
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        queries = [
            self._query(before, after, f"{context[-40:]!r} followed by {continuation!r}")
            for (context, continuation), before, after in requests
        ]
        results = []
        for request, likelihood in zip(requests, self._score(queries), strict=True):
            results.append((likelihood.log_likelihood, likelihood.is_greedy))
            self.cache_hook.add_partial("loglikelihood", request[0], results[-1])
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of the model's length."""
        queries: list[Query] = []
        counts = []
        for request in requests:
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            before = len(queries)
            for window in windows:
                context, continuation = utils.make_disjoint_window(window)
                queries.append(self._query(context, continuation, repr(text[:40])))
            counts.append(len(queries) - before)
        likelihoods = self._score(queries)
        results = []
        for request, count in zip(requests, counts, strict=True):
            results.append(sum(next(likelihoods).log_likelihood for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def _query(self, context: list[int], continuation: list[int], what: str) -> Query:
        if not continuation or len(continuation) > self.max_length:
            raise InputError(
                f"{what}: the tokenizer makes {len(continuation)} tokens of what is to be scored, "
                f"where the model takes 1 to {self.max_length}"
            )
        vocabulary = self.config.get_text_config().vocab_size
        if (highest := max(*context, *continuation)) >= vocabulary:
            raise InputError(f"{what}: token {highest} is beyond the model's vocabulary of {vocabulary}")
        # The last token is no input of the model, so there is room for one more.
        num_context = max(1, self.max_length + 1 - len(continuation))
        return Query(tuple(context[-num_context:]), tuple(continuation))

    def _score(self, queries: Sequence[Query]) -> Iterator[Likelihood]:
        if not queries:
            return
        job = scoring.job_of_queries(queries, self._info, self._rates)
        lm = self._opened(job)
        with FOLLOWER.get(RunReport(None)).watching(lm, job, title="log-likelihoods"), progress(lm, job):
            yield from scoring.score_queries(lm, queries)

    @functools.cached_property
    def _rates(self) -> Rates:
        return quick_rates(self._info.folder, parse_dtype(self._dtype))

    def _opened(self, job: Job) -> StreamedLM:
        """Return the model, opened for this job or for an earlier one that covers it."""
        if isinstance(self._info, StreamedLM):
            return self._info
        if self._lm is None or self._job is None or not self._job.covers(job):
            self.close()
            options: dict[str, Any] = {
                "ram": self._ram, "dtype": self._dtype, "device": self._device, "vram": self._vram, "job": job,
                "rates": self._rates, "exact": self._exact,
            }  # fmt: skip
            if self._swarm is not None:
                from slowllm.swarm.client import open_client

                self._lm = open_client(StreamedLM, self._info, self._swarm, **options)
            else:
                self._lm = open_model(StreamedLM, self._info, **options)
            self._job = job
        return self._lm

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each request's context, up to its stop strings."""
        if not requests:
            return []
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        stops, prompts = [], []
        for request in requests:
            context, given = request.args
            options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            until, max_new_tokens = (
                handle_stop_sequences(options.pop("until"), eos),
                options.pop("max_gen_toks"),
            )
            settings = settings_of(options, self._default_options, max_new_tokens, until)
            prompts.append(Prompt(self._prompt_ids(context, max_new_tokens), settings))
            stops.append(until)
        job = generation.job_of(self._info, prompts, self._rates)
        lm = self._opened(job)
        texts = []
        with FOLLOWER.get(RunReport(None)).watching(lm, job, title="generation"), progress(lm, job):
            for request, until, (continuation, *_) in zip(
                requests, stops, generation.generate(lm, prompts), strict=True
            ):
                texts.append(self._text(continuation.ids, until))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _prompt_ids(self, context: str, num_new: int) -> tuple[int, ...]:
        room = self.max_length - num_new
        if room < 1:
            raise InputError(
                f"max_gen_toks {num_new} leaves no room for a prompt: the model takes {self.max_length} tokens"
            )
        special = self._adds_special(context, getattr(self.tokenizer, "bos_token", None))
        ids = self.tokenizer(context, truncation=self.truncation, **_special(special))["input_ids"]
        return tuple(ids[-room:]) or (self.prefix_token_id,)

    def _text(self, ids: Sequence[int], until: list[str]) -> str:
        end = self.think_end_token
        if isinstance(end, int) and end in ids:
            ids = ids[len(ids) - list(reversed(ids)).index(end) :]
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        if isinstance(end, int):
            return str(postprocess_generated_text(text.lstrip(), until, None))
        return str(postprocess_generated_text(text, until, end))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as one text, by the tokenizer's chat template."""

        def apply(history: list[dict[str, str]]) -> str:
            return chat_text(
                self.tokenizer,
                history,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.chat_template_args,
            )

        try:
            return apply(chat_history)
        except Exception:  # a template is a program, and raises what it likes
            without_system = [message for message in chat_history if message["role"] != "system"]
            if len(without_system) == len(chat_history):
                raise
            log.warning("the chat template refuses the conversation; it is tried without the system's role")
            return apply(without_system)


def _special(add: bool | None) -> dict[str, bool]:
    """Return the argument of a tokenizer, none where it decides itself."""
    return {} if add is None else {"add_special_tokens": add}
