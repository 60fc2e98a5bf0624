"""Prompts that come at any time, from any thread, and share the sweeps."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.errors import BusyError, InputError, RideError
from slowllm.inference import generation
from slowllm.inference.generation_types import Continuation, Prompt, Settings, encode_prompt
from slowllm.inference.service import Service
from slowllm.inference.service_types import Ask, PartialContinuation, service_job
from tests.support.families import family_cases, save_tiny, speaking
from tests.support.memory_stops import until

TEXTS = [
    "The carousel",
    "A",
    "Two riders share a sweep when they",
    "Weights are read",
    "If a server dies, the client",
]


@pytest.fixture(scope="module")
def lm() -> Iterator[Any]:
    with slowllm.load(
        "embedded:tiny-bloom", dtype="float32", job=slowllm.Job(num_tokens=4096, longest=512, repeated=True)
    ) as loaded:
        yield loaded


@pytest.fixture
def service(lm: Any) -> Iterator[Service]:
    with Service(lm) as made:
        yield made
        until(lambda: made.status().held_tokens == 0)


def alone(lm: Any, prompt: Prompt) -> tuple[Continuation, ...]:
    """What transformers' `generate` makes of a prompt that nobody rides with."""
    ((found),) = generation.generate(lm, [prompt])
    return found


def mixed(lm: Any, number: int) -> Prompt:
    draw = random.Random(number)
    choices: list[dict[str, Any]] = [
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 0, "seed": number},
        {"do_sample": True, "top_p": 0.7, "top_k": 20, "seed": number},
        {"repetition_penalty": 1.3},
        {"stop": ("a",)},
        {"top_log_probs": 3},
        {"num_beams": 2},
        {"min_new_tokens": 4},
    ]
    settings = Settings(**{"max_new_tokens": draw.randint(4, 12), **choices[number % len(choices)]})
    return encode_prompt(lm, draw.choice(TEXTS), settings)


def test_whoever_comes_gets_what_it_would_get_alone(lm: Any, service: Service) -> None:
    prompts = [mixed(lm, number) for number in range(16)]
    wanted = [alone(lm, prompt) for prompt in prompts]
    before = service.status().num_sweeps
    rides = [service.submit(Ask(prompt)) for prompt in prompts]
    found = [ride.result(60).continuations for ride in rides]
    for one, other in zip(found, wanted, strict=True):
        assert [(c.ids, c.text, c.finish_reason) for c in one] == [
            (c.ids, c.text, c.finish_reason) for c in other
        ]
        for ours, theirs in zip(one, other, strict=True):
            if theirs.log_probs is not None and ours.log_probs is not None:
                torch.testing.assert_close(torch.tensor(ours.log_probs), torch.tensor(theirs.log_probs))
    assert service.status().num_sweeps - before < sum(len(one[0].ids) for one in wanted) / 4


def test_a_choice_of_several_is_the_one_of_its_seed(lm: Any, service: Service) -> None:
    settings = Settings(max_new_tokens=6, do_sample=True, seed=7, num_return_sequences=3, top_k=0)
    found = service.submit(Ask(encode_prompt(lm, TEXTS[0], settings))).result(60).continuations
    each = [Settings(max_new_tokens=6, do_sample=True, seed=7 + n, top_k=0) for n in range(3)]
    assert [one.ids for one in found] == [alone(lm, encode_prompt(lm, TEXTS[0], own))[0].ids for own in each]


def test_an_exact_service_gives_the_bits_of_each_prompt_alone(lm: Any) -> None:
    prompts = [encode_prompt(lm, text, Settings(max_new_tokens=4, top_log_probs=2)) for text in TEXTS]
    with Service(lm, is_exact=True) as service:
        rides = [service.submit(Ask(prompt)) for prompt in prompts]
        assert [ride.result(60).continuations for ride in rides] == [alone(lm, prompt) for prompt in prompts]


def test_tokens_are_told_as_they_come(lm: Any, service: Service) -> None:
    told: list[PartialContinuation] = []
    prompt = encode_prompt(lm, TEXTS[2], Settings(max_new_tokens=5, min_new_tokens=5, top_log_probs=2))
    (found,) = service.submit(Ask(prompt), told.append).result(60).continuations
    assert found.log_probs is not None
    assert found.top_log_probs is not None
    assert told == [
        PartialContinuation(0, found.ids[:n], found.log_probs[:n], found.top_log_probs[:n])
        for n in range(1, 6)
    ]
    told.clear()
    beams = Prompt(prompt.ids, Settings(max_new_tokens=3, num_beams=2))
    service.submit(Ask(beams), told.append).result(60)
    assert all(partial.log_probs is None for partial in told)  # rides alone, and knows them at the end


def test_prompts_are_scored_beside_others_that_are_continued(lm: Any, service: Service) -> None:
    prompts = [encode_prompt(lm, text, Settings(max_new_tokens=3)) for text in TEXTS]
    rides = [service.submit(Ask(prompt, 2, only_prompt=n % 2 == 0)) for n, prompt in enumerate(prompts)]
    for number, (prompt, ride) in enumerate(zip(prompts, rides, strict=True)):
        answer = ride.result(60)
        scores = answer.prompt_scores
        assert scores is not None
        with torch.no_grad():
            wanted = lm.model(torch.tensor([prompt.ids])).logits[0].float().log_softmax(-1)
        for place, token in enumerate(prompt.ids[1:]):
            assert scores.log_probs[place] == pytest.approx(float(wanted[place, token]), abs=2e-4)
            best = wanted[place].topk(2)
            assert list(scores.top_log_probs[place]) == best.indices.tolist()
            assert scores.is_likeliest[place] == (token == int(best.indices[0]))
        assert len(scores.log_probs) == len(prompt.ids) - 1
        assert answer.continuations == (() if number % 2 == 0 else alone(lm, prompt))


def test_one_token_alone_has_no_scores(lm: Any, service: Service) -> None:
    answer = service.submit(Ask(Prompt((5,), Settings()), 3, only_prompt=True)).result(60)
    assert answer.prompt_scores is not None
    assert answer.prompt_scores.log_probs == ()


class Held:
    """Keeps the carousel at a stop until it is opened."""

    def __init__(self, lm: Any) -> None:
        self.is_there, self._may_go, self._lm = threading.Event(), threading.Event(), lm

    def __enter__(self) -> Held:
        def work(_: Any) -> None:
            self.is_there.set()
            assert self._may_go.wait(60)

        self._thread = threading.Thread(target=lambda: self._lm._carousel.visit(0, "up", work))
        self._thread.start()
        assert self.is_there.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._may_go.set()
        self._thread.join()


def test_who_is_cancelled_leaves_and_the_others_go_on(lm: Any, service: Service) -> None:
    prompts = [encode_prompt(lm, text, Settings(max_new_tokens=12, min_new_tokens=12)) for text in TEXTS]
    with Held(lm):
        rides = [service.submit(Ask(prompt)) for prompt in prompts]
        rides[0].cancel()
        rides[3].cancel()
        assert rides[3].done()
    for number, (prompt, ride) in enumerate(zip(prompts, rides, strict=True)):
        if number in (0, 3):
            with pytest.raises(RideError, match="was cancelled"):
                ride.result(60)
        else:
            assert ride.result(60).continuations == alone(lm, prompt)


def test_a_rider_that_works_for_nobody_leaves_at_the_next_stop(lm: Any, service: Service) -> None:
    told = threading.Event()
    settings = Settings(max_new_tokens=60, min_new_tokens=60)
    ride = service.submit(Ask(encode_prompt(lm, TEXTS[1], settings)), lambda *_: told.set())
    assert told.wait(60)
    ride.cancel()
    until(
        lambda: not any(batch.is_riding for batch in service._batches.values()) and not service._first_passes
    )
    assert service.status().num_new_tokens < 60
    # Its seat is free, and its batch takes others.
    prompt = encode_prompt(lm, TEXTS[2], Settings(max_new_tokens=60, min_new_tokens=60))
    assert len(service.submit(Ask(prompt)).result(60).continuations[0].ids) == 60


def test_what_waits_too_long_in_a_full_queue_is_refused(lm: Any) -> None:
    prompt = encode_prompt(lm, TEXTS[0], Settings(max_new_tokens=2))
    with Service(lm, max_waiting=2) as service, Held(lm):
        rides = [service.submit(Ask(prompt)) for _ in range(3)]
        with pytest.raises(BusyError, match="2 requests wait already"):
            service.submit(Ask(prompt))
        rides[2].cancel()
        rides.append(service.submit(Ask(prompt)))
        assert service.status().num_waiting == 2
        assert service.status().num_riding == 1


def test_more_rows_or_tokens_than_there_is_room_for_wait_in_their_order(lm: Any) -> None:
    settings = Settings(max_new_tokens=3, min_new_tokens=3)
    ended: list[int] = []
    with Service(lm, max_rows=2) as service:
        rides = []
        for number, text in enumerate(TEXTS * 2):
            rides.append(service.submit(Ask(encode_prompt(lm, text, settings))))
            rides[-1].add_done_callback(lambda _, number=number: ended.append(number))
            assert service.status().num_riding <= 2
        for ride in rides:
            ride.result(60)
        assert [number // 2 for number in ended] == [number // 2 for number in range(10)]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_new_tokens": 510}, "memory was planned for 64 rows"),
        ({"num_return_sequences": 65, "do_sample": True}, "memory was planned for 64 rows"),
        ({"max_new_tokens": 1 << 20}, "the model takes"),
    ],
)
def test_what_never_fits_is_refused_at_once(lm: Any, service: Service, settings: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        service.submit(Ask(encode_prompt(lm, TEXTS[0], Settings(**settings))))


def test_a_job_for_asks_that_nobody_knows_yet(lm: Any) -> None:
    job = service_job(lm, 1024, 128, 8)
    with (
        slowllm.load("embedded:tiny-bloom", dtype="float32", job=job) as own,
        Service(own, max_rows=8) as service,
    ):
        prompt = encode_prompt(own, TEXTS[0], Settings(max_new_tokens=2))
        assert service.submit(Ask(prompt)).result(60).continuations == alone(lm, prompt)
    with pytest.raises(InputError, match="longer than the"):
        service_job(lm, 1 << 30, 1 << 20, 1)
    with pytest.raises(InputError, match="cannot hold 0 rows"):
        service_job(lm, 64, 64, 0)


def test_a_service_that_drains_answers_what_it_has_and_takes_nothing_new(lm: Any) -> None:
    prompt = encode_prompt(lm, TEXTS[0], Settings(max_new_tokens=3))
    with Service(lm) as service:
        rides = [service.submit(Ask(prompt)) for _ in range(5)]
        service.drain(60)
        assert all(ride.done() for ride in rides)
        with pytest.raises(BusyError, match="takes nothing new"):
            service.submit(Ask(prompt))
        assert [ride.result().continuations for ride in rides] == [alone(lm, prompt)] * 5


def test_closing_cancels_what_is_left(lm: Any) -> None:
    prompt = encode_prompt(lm, TEXTS[0], Settings(max_new_tokens=100, min_new_tokens=100))
    with Service(lm) as service, Held(lm):
        rides = [service.submit(Ask(prompt)) for _ in range(3)]
        service.drain(0)
        for ride in rides:
            with pytest.raises(RideError, match="was cancelled"):
                ride.result(60)


@pytest.mark.long
def test_asks_come_from_many_threads_at_any_time(lm: Any, service: Service) -> None:
    prompts = [mixed(lm, number) for number in range(12)]
    wanted = [[one.ids for one in alone(lm, prompt)] for prompt in prompts]
    found: dict[int, list[tuple[int, ...]]] = {}

    def ask(number: int) -> None:
        for place in range(number, len(prompts), 4):
            found[place] = [one.ids for one in service.submit(Ask(prompts[place])).result(60).continuations]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(len(prompts))] == wanted


def test_a_number_that_is_not_finite_ends_its_own_prompt_only(
    lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slowllm.errors import NonFiniteError
    from slowllm.inference.live_batch import BatchModel

    start, prompts = (
        BatchModel.start,
        [Prompt((number,), Settings(max_new_tokens=3)) for number in range(5, 9)],
    )

    def failing(self: BatchModel, given: Any, kept: Any) -> Any:
        if any(prompt.ids == (6,) for prompt in given):
            raise NonFiniteError("block 1 returned NaN")
        return start(self, given, kept)

    monkeypatch.setattr(BatchModel, "start", failing)
    with Service(lm) as service:
        with Held(lm):
            rides = [service.submit(Ask(prompt)) for prompt in prompts]
        for prompt, ride in zip(prompts, rides, strict=True):
            if prompt.ids == (6,):
                with pytest.raises(NonFiniteError, match="block 1 returned NaN"):
                    ride.result(60)
            else:
                assert ride.result(60).continuations == alone(lm, prompt)


def test_nan_behind_a_new_token_ends_its_own_row_only(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from slowllm.errors import NonFiniteError

    save_tiny("llama-2", tmp_path / "model")
    folder = speaking(tmp_path / "model", tmp_path / "speaking")
    job = slowllm.Job(num_tokens=2048, longest=64, repeated=True)
    settings = Settings(max_new_tokens=6, min_new_tokens=6)
    prompts = [Prompt((number, number + 1), settings) for number in range(5, 15)]
    with slowllm.load(folder, dtype="float32", job=job) as lm:
        wanted = [alone(lm, prompt)[0] for prompt in prompts]
    # The first new token of one prompt, and of no other's text, has an embedding that is not a number.
    others = [{*prompt.ids, *one.ids} for prompt, one in zip(prompts, wanted, strict=True)]
    damaged = next(
        place
        for place, one in enumerate(wanted)
        if not any(one.ids[0] in ids for other, ids in enumerate(others) if other != place)
        and one.ids[0] not in prompts[place].ids
    )
    name = "model.embed_tokens.weight"
    for shard in Path(folder).glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][wanted[damaged].ids[0]] = torch.nan
            save_file(tensors, shard, {"format": "pt"})
    with slowllm.load(folder, dtype="float32", job=job) as lm, Service(lm) as service:
        with Held(lm):
            rides = [service.submit(Ask(prompt)) for prompt in prompts]
        for place, ride in enumerate(rides):
            if place == damaged:
                with pytest.raises(NonFiniteError, match="NaN in the output"):
                    ride.result(60)
            else:
                assert ride.result(60).continuations[0].ids == wanted[place].ids


@pytest.mark.parametrize("name", family_cases())
def test_families_continue_rows_that_come_and_go(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / "model")
    folder = speaking(tmp_path / "model", tmp_path / "speaking")
    with slowllm.load(
        folder, dtype="float32", job=slowllm.Job(num_tokens=2048, longest=64, repeated=True)
    ) as own:
        draw = random.Random(name)
        prompts = [
            Prompt(
                tuple(draw.randrange(3, 300) for _ in range(draw.randint(1, 20))),
                Settings(max_new_tokens=draw.randint(1, 8)),
            )
            for _ in range(7)
        ]
        wanted = [alone(own, prompt) for prompt in prompts]
        with Service(own, max_rows=4) as service:
            rides = [service.submit(Ask(prompt, 1)) for prompt in prompts]
            answers = [ride.result(120) for ride in rides]
        assert [[one.ids for one in answer.continuations] for answer in answers] == [
            [one.ids for one in own_] for own_ in wanted
        ]
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.prompt_scores is not None
            assert len(answer.prompt_scores.log_probs) == len(prompt.ids) - 1


@pytest.mark.parametrize("name", ["gemma-3-sliding", "gpt-oss"])
def test_rows_longer_than_a_window_share_a_batch(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / "model")  # with windows of 8 tokens
    folder = speaking(tmp_path / "model", tmp_path / "speaking")
    settings = Settings(max_new_tokens=10, min_new_tokens=10)
    prompts = [Prompt(tuple(range(40 + width, 40 + 3 * width)), settings) for width in (1, 4, 9, 11)]
    job = slowllm.Job(num_tokens=2048, longest=64, repeated=True)
    with slowllm.load(folder, dtype="float32", job=job) as lm:
        wanted = [alone(lm, prompt) for prompt in prompts]
        passages: list[Any] = []
        with Service(lm) as service, lm.watching(passages.append):
            with Held(lm):
                rides = [service.submit(Ask(prompt)) for prompt in prompts]
            assert [ride.result(60).continuations for ride in rides] == wanted
    # One rider for all rows, but for what was under way when they came.
    assert sum(one.num_passed for one in passages) < 2 * lm.num_stops * 10


def test_a_conversation_goes_on_from_what_was_kept_of_it(lm: Any) -> None:
    settings, prompt = (
        Settings(max_new_tokens=20, min_new_tokens=20),
        encode_prompt(lm, TEXTS[2] * 2, Settings()),
    )
    with Service(lm, kept_tokens=100) as service:
        (first,) = service.submit(Ask(Prompt(prompt.ids, settings))).result(60).continuations
        longer = Prompt(prompt.ids + first.ids + (5, 6, 7), settings)
        before = service.status().num_prompt_tokens
        assert service.submit(Ask(longer)).result(60).continuations == alone(lm, longer)
        # The last token of the answer has not passed the model yet.
        assert service.status().num_prompt_tokens - before == 4
        # Another conversation with the same beginning finds that.
        other = Prompt((*prompt.ids, 9, 9), settings)
        before = service.status()
        assert service.submit(Ask(other)).result(60).continuations == alone(lm, other)
        assert service.status().num_prompt_tokens - before.num_prompt_tokens == 2
        assert service.status().num_found_tokens - before.num_found_tokens == len(prompt.ids)
        assert service._kept.num_tokens <= 100
