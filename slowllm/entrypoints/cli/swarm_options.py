"""The options by which a verb lets a swarm compute the blocks, for all verbs alike."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import typer

from slowllm.entrypoints.cli import options
from slowllm.errors import InputError
from slowllm.swarm.addresses import check_swarm

if TYPE_CHECKING:
    from slowllm.swarm.client import SwarmOptions

V = TypeVar("V", bound=Callable[..., None])

_Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--swarm",
        help="Let a swarm compute the blocks: the multiaddress of one of its peers, as `slowllm dht` or `slowllm serve` prints "
        "it; may be given several times. The model needs only its config, tokenizer, embedding, norm and head here.",
        metavar="MADDR",
    ),
]
_Allowed = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-peers",
        help="With --swarm: id of a server that may be asked; others are not.",
        metavar="ID",
    ),
]
_Blocked = Annotated[
    list[str] | None,
    typer.Option("--blocked-peers", help="With --swarm: id of a server that is not asked.", metavar="ID"),
]
_Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        help="With --swarm: seconds after which a passage through a server's blocks is given up, with all retries.",
        min=1.0,
    ),
]
_StepTimeout = Annotated[
    float,
    typer.Option(
        "--step-timeout",
        help="With --swarm: seconds of silence after which a server counts as dead. One that works says so all the while.",
        min=1.0,
    ),
]
_Identity = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        help="With --swarm: file of this client's key, made if it is not there, for servers that were told whom to serve.",
        show_default="a new one each time",
    ),
]

_Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        help="With --swarm: ask only servers with these blocks, by the word that `slowllm swarm status` and `slowllm serve` print.",
        metavar="HASH",
        show_default="the client's own, or those of most servers",
    ),
]
_SpotCheck = Annotated[
    float,
    typer.Option(
        "--spot-check",
        help="With --swarm: compute this share of the forward calls at a second server, too, and leave out servers that are wrong.",
        min=0.0,
        max=1.0,
        metavar="RATE",
    ),
]
_Replay = Annotated[
    str,
    typer.Option(
        "--replay",
        help="With --swarm: how a session is rebuilt that a server has lost: by the steps in which it grew, with the same bits, "
        "or fast, in one pass over all positions, which rounds otherwise.",
        metavar="steps|fast",
    ),
]


@dataclass(frozen=True)
class SwarmChoice:
    """Which swarm computes the blocks.

    Attributes:
        peers: multiaddresses of some of its peers; empty where the blocks are computed here.
        allowed: ids of the only servers that may be asked; empty for all.
        blocked: ids of servers that are not asked.
        timeout: seconds for one passage through a server's blocks, with all retries.
        step_timeout: seconds of silence after which a server counts as dead.
        replay: how sessions that were lost are rebuilt, ``steps`` or ``fast``.
        token_file: of the swarm's shared secret; None for a swarm that is open to all.
        identity: file of this client's key; None for one that is forgotten.
        weights: word for the blocks that servers must have; empty for any.
        spot_check: share of the forward calls that are computed twice.
    """

    peers: tuple[str, ...] = ()
    allowed: frozenset[str] = frozenset()
    blocked: frozenset[str] = frozenset()
    timeout: float = 600.0
    step_timeout: float = 20.0
    replay: Literal["steps", "fast"] = "steps"
    token_file: Path | None = None
    identity: Path | None = None
    weights: str = ""
    spot_check: float = 0.0

    def to_options(self) -> SwarmOptions | None:
        """Return how the swarm is used; None where the blocks are computed here."""
        if not self.peers:
            return None
        from slowllm.swarm.client import SwarmOptions
        from slowllm.swarm.routing import Wishes

        return SwarmOptions(
            self.peers, Wishes(allowed=self.allowed or None, blocked=self.blocked), timeout=self.timeout,
            step_timeout=self.step_timeout, replay=self.replay, identity=_expanded(self.identity), token_file=_expanded(self.token_file),
            weights=self.weights, spot_check=self.spot_check,
        )  # fmt: skip


def _expanded(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser()


_OPTIONS: tuple[tuple[str, Any, Any], ...] = (
    ("swarm", _Peers, None),
    ("allowed_peers", _Allowed, None),
    ("blocked_peers", _Blocked, None),
    ("timeout", _Timeout, SwarmChoice.timeout),
    ("step_timeout", _StepTimeout, SwarmChoice.step_timeout),
    ("replay", _Replay, SwarmChoice.replay),
    ("token_file", options.TokenFile, None),
    ("identity", _Identity, None),
    ("weights", _Weights, ""),
    ("spot_check", _SpotCheck, 0.0),
)


def takes_swarm(verb: V) -> V:
    """Give a verb the options of a swarm; its own parameter `swarm` gets a `SwarmChoice`.

    Raises:
        InputError: when called, if servers are chosen without a swarm, or what is given is no address or peer id.
    """
    hints = typing.get_type_hints(verb, include_extras=True)
    own = inspect.signature(verb).parameters
    parameters: list[inspect.Parameter] = []
    for name, parameter in own.items():
        if name != "swarm":
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        for option, kind, default in _OPTIONS:
            parameters.append(parameter.replace(name=option, annotation=kind, default=default))

    @functools.wraps(verb)
    def call(*args: Any, **kwargs: Any) -> None:
        given = {option: kwargs.pop(option, default) for option, _, default in _OPTIONS}
        choice = SwarmChoice(
            tuple(given.pop("swarm") or ()),
            frozenset(given.pop("allowed_peers") or ()),
            frozenset(given.pop("blocked_peers") or ()),
            **given,
        )
        if choice.replay not in ("steps", "fast"):
            raise InputError(f"--replay is steps or fast, not {choice.replay!r}")
        if not choice.peers and (choice.allowed or choice.blocked):
            raise InputError(
                "--allowed-peers and --blocked-peers choose among the servers of a swarm; name it with --swarm"
            )
        check_swarm(choice.peers, choice.allowed, choice.blocked)
        if not choice.peers and (choice.token_file or choice.identity or choice.weights or choice.spot_check):
            raise InputError(
                "--token-file, --identity, --weights and --spot-check are for a swarm; name it with --swarm"
            )
        verb(*args, swarm=choice, **kwargs)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {
        "return": None
    }
    return cast(V, call)
