"""A session grows by steps, calls and generate, is rolled back and reordered, and has the bits of a local cache."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from slowllm.errors import InputError, SessionError, SessionLengthError
from tests.support.petals import Case, embedded, greedy, ids

Pair = tuple[Any, Any]


def test_steps_compute_what_a_local_cache_computes(pair: Pair) -> None:
    model, plain = pair
    base, hidden, cache = model.transformer, embedded(model, ids()), DynamicCache()
    with base.h.inference_session(max_length=7) as session, torch.no_grad():
        for part in ((0, 3), (3, 3), (3, 4), (4, 7)):
            columns = slice(*part)
            got = model.lm_head(base.ln_f(session.step(hidden[:, columns])))
            if part[0] < part[1]:
                assert torch.equal(got, plain(ids()[:, columns], past_key_values=cache).logits)
            assert session.position == part[1]
        with pytest.raises(
            SessionLengthError, match="Maximum length exceeded: the session has 7 of 7 positions, and 1 more"
        ):
            session.step(hidden[:, :1])
        with pytest.raises(ValueError, match="Maximum length exceeded"):
            base.h(hidden[:, :1])
        assert session.num_blocks == 3


def test_a_session_of_some_blocks_is_one_of_its_own(pair: Pair) -> None:
    model, _ = pair
    blocks, hidden = model.transformer.h, embedded(model, ids())
    with torch.no_grad(), blocks.inference_session(max_length=9) as whole:
        expected = [whole.step(hidden[:, :3]), whole.step(hidden[:, 3:])]
        with (
            blocks[:1].inference_session(max_length=9) as lower,
            blocks[1:].inference_session(max_length=9) as upper,
        ):
            for columns, right in zip((slice(0, 3), slice(3, 7)), expected, strict=True):
                assert torch.equal(upper.step(lower.step(hidden[:, columns])), right)
            assert (whole.position, lower.position, upper.position, upper.num_blocks) == (7, 7, 7, 2)


def test_a_session_is_rolled_back_to_any_position(pair: Pair) -> None:
    model, _ = pair
    hidden = embedded(model, ids())
    with torch.no_grad(), model.transformer.h.inference_session(max_length=20) as session:
        first = session.step(hidden[:, :3])
        second = session.step(hidden[:, 3:5])
        session.step(hidden[:, 5:])
        session.position = 3
        assert torch.equal(session.step(hidden[:, 3:5]), second)
        session.position = 0
        assert torch.equal(session.step(hidden[:, :3]), first)
        for wrong in (4, -1, 1.5, "x", None, True):
            with pytest.raises(
                InputError, match=f"a session of 3 positions cannot be rolled back to {wrong!r};"
            ):
                session.position = wrong


def test_rows_are_reordered_and_multiplied(pair: Pair) -> None:
    model, plain = pair
    base, hidden, order = model.transformer, embedded(model, ids()), torch.tensor([1, 0, 1])
    cache = DynamicCache()
    with torch.no_grad(), base.h.inference_session(max_length=20) as session:
        session.step(hidden[:, :4], hypo_ids=torch.tensor([0, 1]))
        plain(ids()[:, :4], past_key_values=cache)
        cache.batch_select_indices(order)
        got = session.step(hidden[order, 4:], hypo_ids=order)
        assert torch.equal(
            model.lm_head(base.ln_f(got)), plain(ids()[order, 4:], past_key_values=cache).logits
        )
        with pytest.raises(InputError, match="hypo_ids name row 3, but the session has 3 rows"):
            session.step(hidden[order, :1], hypo_ids=torch.tensor([0, 1, 3]))
        with pytest.raises(InputError, match="hypo_ids name row -1, but the session has 3 rows"):
            session.step(hidden[order, :1], hypo_ids=torch.tensor([0, -1, 2]))
        with pytest.raises(InputError, match="hypo_ids of type list were given; give a tensor of int64"):
            session.step(hidden[order, :1], hypo_ids=[0, 1, 2])
        with pytest.raises(
            InputError, match=r"hypo_ids of shape \[2\] and torch.int64 were given; 3 rows of inputs"
        ):
            session.step(hidden[order, :1], hypo_ids=torch.tensor([0, 1]))


def test_a_step_of_other_rows_needs_hypo_ids(pair: Pair) -> None:
    model, _ = pair
    base, hidden = model.transformer, embedded(model, ids())
    with torch.no_grad(), base.h.inference_session(max_length=20) as session:
        first = session.step(hidden[:, :4])
        with pytest.raises(
            InputError, match="the call has 1 row, but the cache that it continues has 2 rows"
        ):
            session.step(hidden[:1, 4:])
        assert session.position == 4
        second = session.step(hidden[:1, 4:], hypo_ids=torch.tensor([0]))
    assert (len(first), len(second)) == (2, 1)


def test_a_steps_prompts_are_added_to_the_first_positions_of_the_step(pair: Pair) -> None:
    model, _ = pair
    blocks, hidden = model.transformer.h, embedded(model, ids())
    prompts = torch.randn(3, 2, 2, hidden.shape[-1], generator=torch.Generator().manual_seed(1)) * 0.1
    with torch.no_grad(), blocks.inference_session(max_length=20) as session:
        first = session.step(hidden[:, :4], prompts=prompts)
        second = session.step(hidden[:, 4:], prompts=prompts)
    with torch.no_grad():
        assert torch.equal(first, blocks(hidden[:, :4], prompts=prompts))
        # By hand, a session for each block.
        state = [hidden[:, :4], hidden[:, 4:]]
        for number in range(3):
            with blocks[number].inference_session(max_length=20) as own:
                state = [
                    own.step(torch.cat([part[:, :2] + prompts[number], part[:, 2:]], 1)) for part in state
                ]
        assert torch.equal(second, state[1])


def test_generate_goes_on_within_a_session(pair: Pair) -> None:
    model, plain = pair
    whole = plain.generate(ids(), **greedy(9))
    with model.inference_session(max_length=30) as session:
        first = model.generate(ids(), **greedy(4))
        second = model.generate(None, **greedy(1))
        third = model.generate(**greedy(4))
        assert torch.equal(torch.cat([first, second, third], 1), whole)
        assert session.position == whole.shape[1] - 1
        assert torch.equal(session.output_ids, whole)
        more = ids(length=3, seed=1)
        answer = model.generate(more, **greedy(3))
        assert torch.equal(
            answer, plain.generate(torch.cat([whole, more], 1), **greedy(3))[:, whole.shape[1] :]
        )
        assert model.active_session is session
    assert model.active_session is None
    with pytest.raises(SessionError, match="the session is closed"):
        session.step(embedded(model, ids()))
    session.close()


def test_a_session_is_named_by_its_argument(pair: Pair) -> None:
    model, plain = pair
    whole = plain.generate(ids(), **greedy(6))
    with model.inference_session(max_length=30) as session, model.use_session(None):
        assert model.active_session is None
        assert torch.equal(model.generate(ids(), **greedy(6)), whole)
        assert session.position == 0
        assert session.last_token_id is None
        model.generate(ids(), session=session, **greedy(2))
        result = model.generate(None, session=session, return_dict_in_generate=True, **greedy(4))
        assert torch.equal(result.sequences, whole[:, -4:])
        assert torch.equal(session.last_token_id, whole[:, -1:])


def test_generate_goes_on_from_a_position_that_was_set(pair: Pair) -> None:
    model, plain = pair
    whole = plain.generate(ids(), **greedy(6))
    with model.inference_session(max_length=30) as session:
        model.generate(ids(), **greedy(6))
        session.position = 9
        assert torch.equal(model.generate(None, **greedy(4)), whole[:, 9:])
        session.position = 5
        other = ids(length=2, seed=1)
        expected = plain.generate(torch.cat([whole[:, :5], other], 1), **greedy(3))
        assert torch.equal(model.generate(other, **greedy(3)), expected[:, 5:])
        session.last_token_id = torch.full((2, 1), 7)
        expected[:, -1] = 7
        assert torch.equal(model.generate(None, **greedy(2)), plain.generate(expected, **greedy(2))[:, -2:])


def test_beams_samples_and_drafts_are_continued_as_well(pair: Pair) -> None:
    model, plain = pair
    with model.inference_session(max_length=60):
        first = model.generate(ids(), num_beams=3, **greedy(4))
        assert torch.equal(first, plain.generate(ids(), num_beams=3, **greedy(4)))
        second = model.generate(None, num_beams=2, **greedy(3))
        assert torch.equal(second, plain.generate(first, num_beams=2, **greedy(3))[:, -3:])
        third = model.generate(None, **greedy(2))
        so_far = torch.cat([first, second], 1)
        assert torch.equal(third, plain.generate(so_far, **greedy(2))[:, -2:])
    one = ids(1).repeat(1, 3)
    with model.inference_session(max_length=60):
        torch.manual_seed(3)
        ours = [
            model.generate(one, **{**greedy(4), "do_sample": 1}),
            model.generate(None, prompt_lookup_num_tokens=2, **greedy(5)),
        ]
        torch.manual_seed(3)
        sampled = plain.generate(one, **{**greedy(4), "do_sample": True})
        assert torch.equal(torch.cat(ours, 1), plain.generate(sampled, **greedy(5)))


def test_padding_on_the_left_is_kept_apart_in_a_session(pair: Pair) -> None:
    model, plain = pair
    mask = torch.ones_like(ids())
    mask[1, :3] = 0
    whole = plain.generate(ids(), attention_mask=mask, **greedy(6))
    with model.inference_session(max_length=30):
        first = model.generate(ids(), attention_mask=mask, **greedy(3))
        assert torch.equal(torch.cat([first, model.generate(None, **greedy(3))], 1), whole)
        more = ids(length=3, seed=1)
        mask_of_all = torch.cat([mask, torch.ones(2, 9, dtype=torch.int64)], 1)
        expected = plain.generate(torch.cat([whole, more], 1), attention_mask=mask_of_all, **greedy(2))
        answer = model.generate(more, attention_mask=torch.ones_like(more), **greedy(2))
        assert torch.equal(answer, expected[:, whole.shape[1] :])
        with pytest.raises(InputError, match="an attention_mask of 2 positions was given for 3 new tokens"):
            model.generate(more, attention_mask=torch.ones(2, 2), **greedy(2))


def test_calls_of_the_model_continue_a_session(pair: Pair) -> None:
    model, plain = pair
    cache = DynamicCache()
    with model.inference_session(max_length=8) as session:
        for columns in (slice(0, 4), slice(4, 7)):
            with torch.no_grad():
                expected = plain(ids()[:, columns], past_key_values=cache).logits
            assert torch.equal(model(ids()[:, columns]).logits, expected)
        assert session.position == 7
        with pytest.raises(SessionLengthError, match="Maximum length exceeded"):
            model(ids()[:, :2])
        with pytest.raises(InputError, match="the session has positions whose tokens are not known"):
            model.generate(ids(), **greedy(1))


def test_what_does_not_fit_a_session_is_refused(pair: Pair) -> None:
    model, _ = pair
    for wrong in (0, -3, 2.5, True):
        with (
            pytest.raises(InputError, match=f"max_length={wrong} is no number of positions"),
            model.inference_session(max_length=wrong),
        ):
            pass
    with model.inference_session(max_length=12) as session:
        with pytest.raises(SessionError, match="last_token_id cannot be set before"):
            session.last_token_id = ids(1, 1)
        model.generate(ids(), **greedy(2))
        with pytest.raises(InputError, match="the session has 2 texts, but 3 were given"):
            model.generate(ids(3), **greedy(2))
        with pytest.raises(SessionLengthError, match="Maximum length exceeded"):
            model.generate(None, **greedy(9))


def test_what_are_no_hidden_states_is_refused_with_its_shape(pair: Pair) -> None:
    model, _ = pair
    blocks = model.transformer.h
    hidden = embedded(model, ids())
    width = hidden.shape[-1]
    with blocks.inference_session(max_length=12) as session:
        for wrong, said in (
            (hidden[0], rf"shape \[7, {width}\]"), (hidden[:, :, 1:], rf"shape \[2, 7, {width - 1}\]"), (ids(), "torch.int64"),
            ("x", "type str"), (None, "type NoneType"),
        ):  # fmt: skip
            with pytest.raises(
                InputError, match=rf"inputs of .*{said}.* give .*\(rows, positions, {width}\)"
            ):
                session.step(wrong)
            with blocks.use_session(None), pytest.raises(InputError, match=f"inputs of .*{said}"):
                blocks(wrong)
        with pytest.raises(InputError, match="prompts of type str were given"):
            session.step(hidden, prompts="x")
        assert session.position == 0


def test_a_session_that_was_not_begun_is_refused(pair: Pair) -> None:
    model, _ = pair
    with pytest.raises(InputError, match="the session is a _GeneratorContextManager, not one that was begun"):
        model.generate(ids(), session=model.inference_session(max_length=12), **greedy(1))


def test_nothing_is_left_at_the_servers_behind_a_session(pair: Pair) -> None:
    model, _ = pair
    spans = model.transformer.h._remote.spans
    gc.collect()
    before = len(spans.sessions)
    with model.inference_session(max_length=30):
        model.generate(ids(), **greedy(2))
        assert len(spans.sessions) > before
    assert len(spans.sessions) == before


def test_a_session_is_rolled_back_behind_sliding_windows(tmp_path: Path) -> None:
    with Case("gemma-3-sliding", tmp_path) as case:  # windows of 8 positions
        model, whole = case.model, case.plain.generate(ids(), **greedy(14))
        with model.inference_session(max_length=60) as session:
            parts = [model.generate(ids(), **greedy(6)), model.generate(None, **greedy(8))]
            assert torch.equal(torch.cat(parts, 1), whole)
            for position in (15, 9, 20):
                session.position = min(position, session.position)
                start = session.position
                assert torch.equal(model.generate(None, **greedy(21 - start)), whole[:, start:])
