"""The options by which a verb lets a swarm compute the blocks, for all verbs alike."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import typer

from slowllm.entrypoints.cli import options
from slowllm.errors import InputError
from slowllm.swarm.addresses import check_swarm
from slowllm.swarm.patience import check_seconds, check_share
from slowllm.swarm.weights import parse_weights

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
    float | None,
    typer.Option(
        "--timeout",
        help="With --swarm: seconds after which a call of the model through all servers is given up, with all retries.",
        min=1.0,
        show_default="600",
    ),
]
_StepTimeout = Annotated[
    float | None,
    typer.Option(
        "--step-timeout",
        help="With --swarm: seconds of silence after which a server counts as dead. One that works says so all the while.",
        min=1.0,
        show_default="20",
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
    str | None,
    typer.Option(
        "--weights",
        help="With --swarm: ask only servers with these blocks, by the word that `slowllm swarm status` and `slowllm serve` print.",
        metavar="HASH",
        show_default="the client's own, or those of most servers",
    ),
]
_SpotCheck = Annotated[
    float | None,
    typer.Option(
        "--spot-check",
        help="With --swarm: check this share of the forward calls, by a block whose weights are here or at a second server, and leave "
        "out servers that are wrong.",
        min=0.0,
        max=1.0,
        metavar="RATE",
        show_default="0",
    ),
]
_Replay = Annotated[
    str | None,
    typer.Option(
        "--replay",
        help="With --swarm: how a session is rebuilt that a server has lost: by the steps in which it grew, with the same bits, "
        "or fast, in one pass over all positions, which rounds otherwise.",
        metavar="steps|fast",
        show_default="steps",
    ),
]


@dataclass(frozen=True)
class SwarmChoice:
    """Which swarm computes the blocks.

    Attributes:
        peers: multiaddresses of some of its peers; empty where the blocks are computed here.
        allowed: ids of the only servers that may be asked; empty for all.
        blocked: ids of servers that are not asked.
        timeout: seconds for one call of the model through all servers, with all retries.
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


# None by default, so that what was given without a swarm is known.
_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("swarm", _Peers),
    ("allowed_peers", _Allowed),
    ("blocked_peers", _Blocked),
    ("timeout", _Timeout),
    ("step_timeout", _StepTimeout),
    ("replay", _Replay),
    ("token_file", options.TokenFile),
    ("identity", _Identity),
    ("weights", _Weights),
    ("spot_check", _SpotCheck),
)


def choice_of(given: Mapping[str, Any], option: str = "--") -> SwarmChoice:
    """Return what the options say that were given, by their names.

    Args:
        given: values by the names of options, with _ for -.
        option: what stands before a name where people write it; empty where they write it as it is.

    Raises:
        InputError: they are given without a swarm, or cannot mean anything.
    """

    def named(name: str) -> str:
        return f"{option}{name.replace('_', '-')}" if option else name

    if not given.get("swarm") and given:
        names = [named(name) for name in given]
        raise InputError(
            f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} for a swarm; name it with {named('swarm')}"
        )
    values = dict(given)
    peers, allowed, blocked = (
        values.pop(name, None) or () for name in ("swarm", "allowed_peers", "blocked_peers")
    )
    if (replay := values.get("replay", "steps")) not in ("steps", "fast"):
        raise InputError(f"{named('replay')} is steps or fast, not {replay!r}")
    check_swarm(peers, allowed, blocked, named)
    for name in ("timeout", "step_timeout"):
        if name in values:
            check_seconds(named(name), values[name])
    if "spot_check" in values:
        check_share(named("spot_check"), values["spot_check"])
    if "weights" in values:
        values["weights"] = parse_weights(values["weights"], named("weights"))
    return SwarmChoice(tuple(peers), frozenset(allowed), frozenset(blocked), **values)


def takes_swarm(verb: V) -> V:
    """Give a verb the options of a swarm; its own parameter `swarm` gets a `SwarmChoice`.

    Raises:
        InputError: when called, if options of a swarm are given without one, or cannot mean anything.
    """
    hints = typing.get_type_hints(verb, include_extras=True)
    own = inspect.signature(verb).parameters
    parameters: list[inspect.Parameter] = []
    for name, parameter in own.items():
        if name != "swarm":
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        for option, kind in _OPTIONS:
            parameters.append(parameter.replace(name=option, annotation=kind, default=None))

    @functools.wraps(verb)
    def call(*args: Any, **kwargs: Any) -> None:
        asked = {option: kwargs.pop(option, None) for option, _ in _OPTIONS}
        choice = choice_of({name: value for name, value in asked.items() if value not in (None, [])})
        verb(*args, swarm=choice, **kwargs)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {
        "return": None
    }
    return cast(V, call)
