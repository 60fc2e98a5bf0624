"""The errors a user can cause or meet, each one clear sentence.

The command line prints them without a traceback and exits with code 2.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import PurePath


class SlowLLMError(Exception):
    """Base of every error that names something the user, a file or the machine got wrong."""


class CheckpointError(SlowLLMError):
    """The files of a checkpoint are missing, damaged, or of a kind that cannot be streamed."""


class StoreError(CheckpointError):
    """A store is not finished, damaged, newer than this version, or cannot be written."""


class ArchitectureError(SlowLLMError):
    """The model's architecture does not fit the carousel; the message says which and why."""


class PlanError(SlowLLMError):
    """The job does not fit the budget; the message has the numbers."""


class InputError(SlowLLMError):
    """The text or option given by the user cannot be used."""


class LimitError(InputError):
    """A request or a session is larger than one server takes, or of a kind that it does not compute; others may."""


class NonFiniteError(SlowLLMError):
    """The output of a block or the head has a NaN, or an infinity where none is legal.

    Attributes:
        row: row of the batch, where it is known.
    """

    row: int | None = None


class RouterError(SlowLLMError):
    """A router chose an expert that there is not; the message names the module of experts."""


class UnsupportedError(SlowLLMError):
    """A transformers operation that has no meaning on a streamed model."""


class RideError(SlowLLMError):
    """A ride was started where none can start, or the carousel was closed during a ride."""


class StateError(SlowLLMError):
    """A state folder belongs to another job or process, is damaged, or cannot be written."""


class OtherJobError(StateError):
    """A state folder belongs to another job.

    Attributes:
        difference: what the two jobs differ in, with both values.
    """

    def __init__(self, folder: object, difference: str, advice: str) -> None:
        super().__init__(f"{folder}: is the state of another job ({difference}); {advice}")
        self.difference = difference


class SessionError(SlowLLMError):
    """What other machines keep of a cache does not fit the call that continues it."""


class SessionLengthError(SessionError, ValueError):
    """A session has no room for a step; a ValueError as well, which code written for Petals may catch."""


class TuningError(SlowLLMError):
    """A soft prompt cannot be tuned further: a loss or gradient is NaN or grows without bound."""


class DownloadError(SlowLLMError):
    """The hub cannot be reached or refuses, the disk is too small, or a file differs from the hub's."""


class NetworkError(SlowLLMError):
    """The swarm cannot be joined or asked; the message names the addresses that were given, or the peer."""


class DirectoryError(NetworkError):
    """The swarm's directory does not answer; servers that are known may work all the same."""


class ProtocolError(NetworkError):
    """A message or record of a peer is damaged, too large, of another version, or cannot be sent as it is."""


class PeerError(NetworkError):
    """A request failed at one peer.

    Attributes:
        peer: the peer's id.
    """

    def __init__(self, peer: str, problem: str) -> None:
        super().__init__(f"peer {peer}: {problem}")
        self.peer = peer


class PeerLostError(PeerError):
    """A peer cannot be reached, or its connection ended before it had answered."""


class PeerTimeoutError(PeerError):
    """A peer is silent, or has not answered in the time that it was given."""


class RemoteError(PeerError):
    """A peer answered with an error.

    Attributes:
        kind: the error's name at the peer, such as ``InputError``.
        sentence: what the peer says about it.
    """

    def __init__(self, peer: str, kind: str, sentence: str) -> None:
        super().__init__(peer, f"answers {kind}: {sentence}")
        self.kind, self.sentence = kind, sentence


class RefusedError(PeerError):
    """A peer does not belong to this swarm: it does not prove the token, or is none of those that are served.

    Attributes:
        problem: the sentence without the peer's name, as it is told to the peer.
    """

    def __init__(self, peer: str, problem: str) -> None:
        super().__init__(peer, problem)
        self.problem = problem


class BusyError(NetworkError):
    """A server takes no more requests for now, or no new sessions, because it is leaving."""


class MissingBlocksError(NetworkError):
    """Some blocks of a model are served by nobody who may be asked.

    Attributes:
        blocks: their numbers.
        is_full: whether servers that have them would do, but for the sessions that fill them now.
    """

    def __init__(self, blocks: tuple[int, ...], problem: str, *, is_full: bool = False) -> None:
        super().__init__(problem)
        self.blocks, self.is_full = blocks, is_full


class DisagreementError(NetworkError):
    """Servers of the same weights give different answers, and it cannot be known which one is right."""


@contextlib.contextmanager
def forward_errors(model: object) -> Iterator[None]:
    """Raise what fails inside a model's forward or backward pass as an ArchitectureError in one sentence.

    A file that cannot be read any more is a CheckpointError, which names it without its folder.
    """
    try:
        yield
    except (SlowLLMError, MemoryError):
        raise
    except OSError as error:
        where = f"{PurePath(error.filename).name}: " if isinstance(error.filename, str) else ""
        raise CheckpointError(
            f"{where}{error.strerror or error}; look at the disk, or fetch the file again"
        ) from error
    except Exception as error:  # whatever transformers and torch may raise on a config that does not fit
        raise ArchitectureError(
            f"{type(model).__name__}: its pass fails ({type(error).__name__}: {first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, to quote it in a sentence; the second, too, if the first ends in a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [
        type(error).__name__
    ]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, in the plural (by default with an s) unless it is 1: ``1 line``, ``1,024 tokens``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def twin(error: BaseException) -> BaseException:
    """Copy an error: threads that raise one object would mix their tracebacks and notes in it."""
    try:
        copied = copy.copy(error)
    except Exception:  # its class takes other arguments than it keeps; then all threads share the one
        return error
    copied.__cause__, copied.__context__ = error.__cause__, error.__context__
    copied.__suppress_context__ = error.__suppress_context__
    return copied.with_traceback(error.__traceback__)
