"""Arguments of lm-eval's model that say how a swarm is used, as lm-eval reads them from its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.utils import simple_parse_args_string

import slowllm
from slowllm.entrypoints.lm_eval_model import SlowLM
from slowllm.entrypoints.lm_eval_settings import swarm_options
from slowllm.errors import InputError
from slowllm.swarm.client import SwarmOptions
from slowllm.swarm.routing import Wishes
from tests.support.paths import TINY_BLOOM

A, B = (f"Qm{letter * 44}" for letter in "ab")
ADDRESSES = tuple(f"/ip4/127.0.0.1/tcp/1/p2p/{peer}" for peer in (A, B))


def read(text: str) -> SwarmOptions | None:
    """Return the options of what stands behind ``--model_args``."""
    arguments: dict[str, Any] = simple_parse_args_string(text)
    options = swarm_options(arguments.pop("swarm", None), arguments)
    assert not arguments, "what is of a swarm is taken out"
    return options


def test_all_options_of_a_swarm_can_be_given() -> None:
    text = (
        f"swarm={'+'.join(ADDRESSES)},allowed_peers={A}+{B},blocked_peers={B},timeout=30,step_timeout=2.5,replay=fast,"
        f"token_file=swarm.token,identity=peer.key,weights={'0aB4' * 8},spot_check=0.25"
    )
    assert read(text) == SwarmOptions(
        ADDRESSES, Wishes(allowed=frozenset([A, B]), blocked=frozenset([B])), timeout=30, step_timeout=2.5, replay="fast",
        token_file=Path("swarm.token"), identity=Path("peer.key"), weights="0ab4" * 8, spot_check=0.25,
    )  # fmt: skip
    assert read(f"swarm={ADDRESSES[0]}") == SwarmOptions(ADDRESSES[:1], Wishes(blocked=frozenset()))
    assert read("") is None


def test_a_word_for_weights_may_be_read_as_a_number() -> None:
    options = read(f"swarm={ADDRESSES[0]},weights={'01' * 16}")
    assert options is not None
    assert options.weights == "01" * 16


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("spot_check=0.5,token_file=x", "token_file and spot_check are for a swarm; name it with swarm"),
        (f"swarm={ADDRESSES[0]},spot_check=2", "spot_check=2 is no share; give a number from 0 to 1"),
        (f"swarm={ADDRESSES[0]},weights=abc", "weights 'abc' is no word of 32 hexadecimal digits"),
        (f"swarm={ADDRESSES[0]},timeout=soon", "timeout"),
        (f"swarm={ADDRESSES[0]},replay=now", "replay is steps or fast, not 'now'"),
        (f"swarm={ADDRESSES[0]},blocked_peers=desk", "blocked_peers 'desk' is no peer id"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_name(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        read(text)
    with pytest.raises(InputError, match=why):
        SlowLM(pretrained=str(TINY_BLOOM), **simple_parse_args_string(text))


def test_a_token_file_reaches_the_swarm(tmp_path: Path) -> None:
    model = SlowLM(pretrained=str(TINY_BLOOM), swarm=ADDRESSES[0], token_file=str(tmp_path / "none"))
    try:
        with pytest.raises(InputError, match="No such file"):
            model.loglikelihood_rolling([_Request("a text")])
    finally:
        model.close()
    options = SwarmOptions(ADDRESSES[:1], token_file=tmp_path / "none")
    with pytest.raises(InputError, match="No such file"):
        slowllm.load(TINY_BLOOM, swarm=options)


class _Request:
    """A request of lm-eval."""

    def __init__(self, text: str) -> None:
        self.args = (text,)
