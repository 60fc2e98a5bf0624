"""Check a server's answer by one block that this client computes itself; no second server is asked.

The server has answered before it can know that it is checked. Then it is asked for the same work once more, with the hidden
states behind every block; the last ones must be those of its answer. Of one block, which the server is never told, the
client computes these itself. A session has a twin at its server, which has had all steps up to the last one that was
checked, and the client keeps the keys and values of one block of it.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from slowllm.errors import CheckpointError, NonFiniteError, PeerError, PlanError, SlowLLMError
from slowllm.modeling.remote_spans import Hop, Kept
from slowllm.modeling.span import SpanCall, part_of
from slowllm.swarm.own_blocks import OwnBlocks
from slowllm.swarm.records import ServerRecord
from slowllm.swarm.tolerances import difference, tolerance
from slowllm.swarm.verdicts import Replicated, Verdicts, record_of, was_not_checked

log = logging.getLogger(__name__)

Outputs = Mapping[int, Tensor]


@dataclass
class _Twin:
    """A session that may be checked.

    Attributes:
        hop: at whose server.
        block: that is computed here.
        name: of its twin there, and of what is kept here.
        steps: the calls since the last check, each with its answer where that has the outputs of all blocks.
    """

    hop: Hop
    block: int
    name: str
    steps: list[tuple[SpanCall, Outputs | None]] = field(default_factory=list)


class HomeCheck:
    """Checks servers by blocks of the client's own folder.

    Args:
        servers: that are asked.
        own: the blocks.
        rate: share of the steps of sessions after which these are checked.
        draw: returns a number from 0 to 1.
        verdicts: where it is counted what was found.
    """

    def __init__(
        self, servers: Replicated, own: OwnBlocks, rate: float, draw: Callable[[], float], verdicts: Verdicts
    ) -> None:
        self._servers, self._own, self._verdicts = servers, own, verdicts
        self._rate, self._draw = rate, draw
        self._lock = threading.Lock()
        self._twins: dict[str, _Twin] = {}
        self._is_over = False

    def was_right(self, call: SpanCall, hop: Hop, found: Outputs, deadline: float) -> bool:
        """Whether the answer to a call without a session was checked, and is right.

        Args:
            call: that was asked.
            hop: at whose server.
            found: that it has answered.
            deadline: as for `AsksServers.forward`.
        Raises:
            PeerError: it was wrong; its server is not asked again.
        """
        record = record_of(self._servers, hop)
        blocks = self._blocks_of(hop, record)

        def problem() -> str:
            assert record is not None, "it has blocks that are here"
            outputs = found
            if not _has_all(found, call):
                outputs = self._servers.forward(replace(call, returns_all=True), hop, None, deadline)
            block = self._chosen(blocks)  # not before the server has answered
            return _twice(call, found, outputs, record) or self._here(call, block, outputs, record, None)

        return bool(blocks) and self._is_checked(problem, hop)

    def begin(self, session: str, hop: Hop, call: SpanCall, calls: Sequence[SpanCall] = ()) -> bool:
        """Note the steps of a session from now on, if a block of its hop is here, and the server has room for a twin.

        Args:
            session: of the client.
            hop: at whose server.
            call: its last one so far, by which it is known how large the session becomes.
            calls: that it was filled by, if it was.
        Returns:
            whether they are noted.
        """
        record = record_of(self._servers, hop)
        blocks = self._blocks_of(hop, record)
        most = len(call.hidden) * max(call.final_length, call.length + call.hidden.shape[1])
        # Otherwise the twin would take the room that the session itself needs.
        if record is None or not blocks or (hop.end - hop.first > 1 and 2 * most > record.cache_tokens):
            return False
        with self._lock:
            steps: list[tuple[SpanCall, Outputs | None]] = [(one, None) for one in calls]
            self._twins[session] = _Twin(hop, self._chosen(blocks), uuid.uuid4().hex, steps)
        return True

    def follows(self, session: str) -> bool:
        """Whether the steps of a session are noted."""
        with self._lock:
            return session in self._twins

    def check_step(self, session: str, call: SpanCall, hop: Hop, found: Outputs, deadline: float) -> None:
        """Note a step of a session, and perhaps check it with all steps since the last one that was checked.

        A session that cannot be checked is not followed any more.

        Raises:
            PeerError: one of them was wrong; its server is not asked again.
        """
        with self._lock:
            twin = self._twins[session]
        twin.steps.append((call, found if _has_all(found, call) else None))
        if self._draw() >= self._rate:
            return
        record, is_checked = None if self._is_over else record_of(self._servers, hop), False
        try:
            is_checked = record is not None and self._is_checked(
                lambda: self._problem_of(twin, record, found, deadline), hop
            )
        finally:
            if not is_checked:
                self.end(session)
        if not is_checked:
            self._verdicts.num_unchecked += 1

    def _problem_of(self, twin: _Twin, record: ServerRecord, found: Outputs, deadline: float) -> str:
        """Return what is wrong with a session's steps since the last check; nothing where all are right."""
        calls = [call for call, _ in twin.steps]
        outputs: list[Outputs] = [known for _, known in twin.steps if known is not None]
        # Of a hop of one block the client has everything, unless the session was filled anew; then the twin fills as well.
        if twin.hop.end - twin.hop.first > 1 or len(outputs) < len(calls):
            asked = [replace(call, returns_all=True) for call in calls]
            outputs = list(self._servers.replay(asked, twin.hop, twin.name, deadline, returns=True))
        twin.steps.clear()
        if problem := _twice(calls[-1], found, outputs[-1], record):
            return problem
        problems = (
            self._here(call, twin.block, own, record, twin.name)
            for call, own in zip(calls, outputs, strict=True)
        )
        return next(filter(None, problems), "")

    def end(self, session: str) -> None:
        """Forget a session, here and at its server; it need not be noted."""
        with self._lock:
            twin = self._twins.pop(session, None)
        if twin is not None:
            self._own.end_session(twin.name)
            self._servers.end_session(Kept(twin.hop, twin.name))

    def close(self) -> None:
        """Check nothing any more, and give back the memory of the blocks that are here. Idempotent."""
        self._is_over = True
        self._own.close()

    def _blocks_of(self, hop: Hop, record: ServerRecord | None) -> list[int]:
        """Return the blocks of a hop that are here as its server says it has them."""
        if record is None or self._is_over:
            return []
        hashes = self._own.hashes
        return [
            number for number in range(hop.first, hop.end) if hashes.get(number) == record.hash_of(number)
        ]

    def _is_checked(self, find_problem: Callable[[], str], hop: Hop) -> bool:
        """Whether a server's answer could be checked; of one that was wrong, the server is not asked again.

        Raises:
            PeerError: it was wrong.
        """
        try:
            problem = find_problem()
        except (PlanError, CheckpointError, OSError) as error:
            if not self._is_over:
                log.warning(
                    "spot checks ask second servers from now on, as no block can be computed here: %s", error
                )
            self.close()
            return False
        except SlowLLMError as error:
            if not was_not_checked(error):
                raise
            log.info("an answer of %s could not be checked here (%s)", self._servers.name_of(hop.peer), error)
            return False
        self._verdicts.num_checked += 1
        self._verdicts.num_here += 1
        if problem:
            self._verdicts.num_wrong += 1
            self._verdicts.banish(self._servers, hop.peer, problem)
            raise PeerError(hop.peer, "was wrong at a spot check")
        return True

    def _chosen(self, blocks: Sequence[int]) -> int:
        return blocks[int(self._draw() * len(blocks)) % len(blocks)]

    def _here(
        self, call: SpanCall, block: int, outputs: Outputs, record: ServerRecord, session: str | None
    ) -> str:
        """Return how a server's block differs from that block here."""
        hidden = call.hidden if block == call.first else outputs[block - 1]
        asked = replace(part_of(call, block, block + 1, hidden.detach()), returns_all=False)
        try:
            off = difference({block: self._own.forward(asked, session)}, {block: outputs[block]}, call.mask)
        except NonFiniteError:  # of numbers that no honest server has
            off = float("inf")
        if off <= _allowed(call, record):
            return ""
        return (
            f"{record.label} computes block {block} otherwise than this machine with the weights in {self._own.folder}, by "
            f"{off:.1g} of the largest value,"
        )


def _twice(call: SpanCall, found: Outputs, outputs: Outputs, record: ServerRecord) -> str:
    """Return how a server's answer differs from what it says of the same work when it is asked again."""
    last = call.end - 1
    off = difference({last: found[last]}, {last: outputs[last]}, call.mask)
    if off <= _allowed(call, record):
        return ""
    return (
        f"{record.label} gave two answers to the same work in blocks {call.first}:{call.end}, which differ by {off:.1g} of the "
        "largest value,"
    )


def _has_all(found: Outputs, call: SpanCall) -> bool:
    return len(found) == call.end - call.first


def _allowed(call: SpanCall, record: ServerRecord) -> float:
    # What goes into the block was rounded as well as what came out of it.
    return tolerance(str(call.hidden.dtype).removeprefix("torch."), record.compression, record.compression)
