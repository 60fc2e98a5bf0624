"""Let those who are at one stop wait for one another in the middle of their work, and be served together.

A visit's work may need what no stop of the carousel brings, and what others who are at the same stop need as well: the
experts that a router chose. It says so by `gather`, in any depth of its own calls; its work pauses there until everybody
at the stop has paused or passed, then one call serves them all, and each goes on with its own result.

The work of a visit runs in a greenlet, all of them on the carousel's one thread, so that one team of OpenMP threads
computes for all. Knows no weights and no riders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from greenlet import getcurrent, greenlet

from slowllm.errors import twin

Item_contra = TypeVar("Item_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


class Gathering(Protocol[Item_contra, Result_co]):
    """What serves all who have come to the same point of their work."""

    def serve(self, items: Sequence[Item_contra]) -> Sequence[Result_co | BaseException]:
        """Return what comes of each item, in order: a result, or the error that its owner is to raise.

        Raises:
            BaseException: that all of them are to raise.
        """

    @property
    def wait_seconds(self) -> float:
        """How long it has waited for bytes so far, in all calls together."""


@dataclass(frozen=True)
class Paused:
    """A piece of work that waits to be served with others.

    Attributes:
        work: that goes on when it is resumed.
        gathering: that serves it.
        item: what it asks for.
    """

    work: PausableWork
    gathering: Gathering[Any, Any]
    item: Any

    def resume(self, outcome: Any) -> Any:
        """Let the work go on with its result, or raise the error that it is given; return as `PausableWork.start` does."""
        return self.work.switch(outcome)


class PausableWork(greenlet):
    """A call that may pause, on the thread that makes it."""

    def start(self) -> Any:
        """Run until the end or the first pause; return what the call returns, or `Paused`.

        Raises:
            BaseException: what the call raises.
        """
        return self.switch()


def pausable(work: Callable[[], Any]) -> PausableWork:
    """Return a call in the form in which it may pause."""
    return PausableWork(work)


def gather(gathering: Gathering[Any, Any], item: Any) -> Any:
    """Have an item served together with those of others at this stop; alone, where nobody can be waited for.

    Raises:
        BaseException: the item, or all of them, could not be served.
    """
    here = getcurrent()
    # Under autocast products have another dtype, which the others have not asked for.
    is_autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    if not isinstance(here, PausableWork) or here.parent is None or is_autocast:
        (outcome,) = gathering.serve([item])
    else:
        with _outside():
            outcome = here.parent.switch(Paused(here, gathering, item))
    if isinstance(outcome, BaseException):
        raise twin(outcome)  # others may have the same error
    return outcome


def serve_all(paused: Sequence[Paused]) -> list[Any]:
    """Serve those that wait, each gathering with all of its own; return the outcome for each, in order."""
    outcomes: list[Any] = [None] * len(paused)
    for gathering in dict.fromkeys(one.gathering for one in paused):
        places = [place for place, one in enumerate(paused) if one.gathering is gathering]
        try:
            results = gathering.serve([paused[place].item for place in places])
        except BaseException as error:  # raised by each of them
            results = [error] * len(places)
        for place, result in zip(places, results, strict=True):
            outcomes[place] = result
    return outcomes


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Leave the modes that torch keeps for a thread, which this work has set, for as long as others run."""
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(True),
        torch.autograd.set_multithreading_enabled(True),
    ):
        yield
