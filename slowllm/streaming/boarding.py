"""Who takes part in a ride: parties of riders, the riders' threads, the visits that wait, and the baton.

Knows no weights, and of stops only their numbers. A rider boards when its thread starts, and leaves when its job has
ended. The holder of the baton is the only rider that runs its own code: it puts the baton down when it waits for a
stop or leaves, and has it again when it is served. Torch's generators change hands with the baton.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from slowllm.errors import RideError, twin
from slowllm.streaming.alone import Alone
from slowllm.streaming.baton import Baton
from slowllm.streaming.ride import SIGNAL_SECONDS, Ride
from slowllm.streaming.rider_threads import RiderThreads
from slowllm.streaming.riders import Course, Party, PartyGroup, Rider, RiderJob, ThreadState, Turn, Visit
from slowllm.streaming.rng_state import SharedGenerators, past_seeds

T = TypeVar("T")

# Timeout before a call from outside the ride (a guest) that waits at another stop preempts the running rider. It
# prevents a deadlock: the rider may be blocked on that guest, and we cannot tell. Where it is not, the riders' stop
# is read once more, so the timeout is about as long as reading a stop takes.
GUEST_PATIENCE_SECONDS = 0.5


class Boarding:
    """The parties of a carousel and the visits that wait for it. Owns the riders' threads.

    Attributes:
        changed: the carousel's one lock, and the condition that anything here has changed.
        waiting: visits that are not served yet.
        returning: riders that were away, and wait for the baton.
        parties: those that have not ended.
        baton: who runs.
        over: why the carousel has ended, if it has.
        alone: which thread computes at a stop by itself, while the carousel waits.
    """

    def __init__(self, generators: SharedGenerators) -> None:
        self.changed, self.local = threading.Condition(), ThreadState()
        self.waiting: list[Visit] = []
        self.returning: list[Turn] = []
        self.parties: list[Party] = []
        self.baton = Baton(generators)
        self.over: RideError | None = None
        self.alone, self._num_begun = Alone(self.changed), 0
        self._last_order = self._last_party = 0
        # Of jobs that were boarded alone, and so are joined by no caller.
        self._threads = RiderThreads()

    # Called by callers' and riders' threads, without the lock.

    def wait(self, visit: Visit) -> None:
        """Block until a visit has been served or dismissed; raise if the carousel or the ride has ended."""
        try:
            with self.changed:
                self._refuse_if_over(visit.rider)
                self.waiting.append(visit)
                self.baton.put_down(visit.rider)
                self.changed.notify_all()
            while not visit.done.wait(SIGNAL_SECONDS):
                pass
        except BaseException:  # an interrupt: a visit whose thread has gone must not be served
            with self.changed:
                if visit in self.waiting:
                    self.waiting.remove(visit)
            raise

    def claim(self, rider: Rider | None) -> bool:
        """Let this thread compute by itself until it calls `release`, if nobody else has anything to do.

        Raises:
            RideError: the carousel or the ride has ended.
        """
        with self.changed:
            self._refuse_if_over(rider)
            is_free = self.alone.thread is None and not self._num_begun and self.baton.holder is rider
            if not is_free or self.waiting or self.returning or self.baton.has_dismissed:
                return False
            if any(party.has_seat or not (party.drawn or party.exhausted) for party in self.parties):
                return False
            self.alone.take()
            return True

    def release(self) -> None:
        """Let the carousel go on, if this thread has computed by itself."""
        if self.alone.give_back():
            self.baton.runs_since = time.monotonic()

    def away(self, rider: Rider, work: Callable[[], T]) -> T:
        """Do a rider's work without the baton, and wait for it again; raise if the carousel or the ride has ended."""
        with self.changed:
            self._refuse_if_over(rider)
            rider.is_away = True
            self.baton.put_down(rider)
            self.changed.notify_all()
        try:
            return work()
        finally:
            self._come_back(rider)

    def _come_back(self, rider: Rider) -> None:
        turn = Turn(rider)
        with self.changed:
            if self.over is not None or rider.party.cancelled:
                self.baton.dismiss([turn], self.over or _cancelled())
            else:
                self.returning.append(turn)
                self.changed.notify_all()
        turn.done.wait()
        error, turn.error = turn.error, None
        if error is not None:
            try:
                raise error
            finally:
                error = None  # its traceback holds this frame

    def admit(self, party: Party) -> None:
        """Let the riders of a party board from now on; raise if the carousel has ended."""
        with self.changed:
            self._refuse_if_over(None)
            if (group := self.local.group) is not None:
                group.parties = [*group.under_way(self.parties), party]
            self.baton.seed(party, self._first_drawing())
            self._add(party)

    def board(
        self, jobs: Sequence[RiderJob], seed: int | None, refuse_to_wait: Callable[[], None]
    ) -> list[Ride[Any]]:
        """Let jobs board together as soon as the running rider waits; raise if the carousel has ended."""
        rides: list[Ride[Any]] = [Ride(refuse_to_wait) for _ in jobs]
        with self.changed:
            self._refuse_if_over(None)
            for job, ride in zip(jobs, rides, strict=True):
                party = Party.of_one(job, ride, None if seed is None else self.baton.seeded(seed))
                ride.on_cancel = functools.partial(self._cancel_one, party)
                self._add(party)
        return rides

    def next_ended(self, party: Party) -> Rider | None:
        """Wait for the next rider in order, and join its thread; return None where the party has ended."""
        with self.changed:
            while not self.changed.wait_for(
                lambda: party.num_taken in party.ended or party not in self.parties, SIGNAL_SECONDS
            ):
                pass
            rider = party.ended.pop(party.num_taken, None)
            party.num_taken += 1
            self.changed.notify_all()
        if rider is not None and rider.thread is not None:
            rider.thread.join()
        return rider

    def cancel(self, party: Party, *, may_wait: bool) -> None:
        """End a party that has not ended by itself, and if it `may_wait`, wait until its riders have left."""
        reason = _cancelled()
        party.cancelled = True
        party.stop_boarding(reason)
        if not may_wait:
            return
        with self.changed:
            self._dismiss_party(party, reason)
            self._end_parties()
        while self.next_ended(party) is not None:
            pass

    def cancel_group(self, group: PartyGroup) -> None:
        """Cancel the rides and streams of a group, and those that would still begin in it, without waiting for them."""
        with self.changed:
            group.is_cancelled = True
            for party in group.under_way(self.parties):
                self._leave_behind(party)
                party.error = _cancelled()  # where every rider ends well, too
                self._dismiss_party(party, _cancelled())
            self._end_parties()

    def _cancel_one(self, party: Party) -> None:
        """Cancel a job that was boarded alone, without waiting for it."""
        with self.changed:
            if party.cancelled or party not in self.parties:
                return
            left = self._leave_behind(party)
            self._dismiss_party(party, _cancelled())
            self._end_parties()
        if left is not None:
            left.end(None, _cancelled())

    def end(self, reason: RideError) -> None:
        """End the carousel: every visit that waits raises `reason`, and nobody boards any more."""
        with self.changed:
            self.over = self.over or reason
            left = [ride for party in self.parties if (ride := self._leave_behind(party, reason)) is not None]
            self._dismiss([*self.waiting, *self.returning], reason)
            self._end_parties()
            self.changed.notify_all()
        for ride in left:
            ride.end(None, twin(reason))

    def join(self) -> None:
        """After the end, join the threads of jobs that were boarded alone, but for those that are away."""
        self._threads.join()

    @staticmethod
    def _leave_behind(party: Party, reason: RideError | None = None) -> Ride[Any] | None:
        """Let no other rider of a party board; return the ride of a job that was to board alone and never does."""
        party.cancelled = True
        left = party.ride if party.drawn else None
        party.stop_boarding(None if reason is None else twin(reason))
        return left

    def _refuse_if_over(self, rider: Rider | None) -> None:
        if self.over is not None:
            raise twin(self.over)
        group = self.local.group
        if (rider is not None and rider.party.cancelled) or (group is not None and group.is_cancelled):
            raise _cancelled()

    def _run_rider(self, rider: Rider, is_kept: bool = False) -> None:
        self.local.begin(rider, is_kept=is_kept)
        try:
            rider.result.append((rider.job, rider.party.run(rider.job)))
        except BaseException as caught:  # raised again by the call that began the ride
            rider.error = caught
        del rider.job
        with self.changed:
            self._leave(rider)
        if rider.party.ride is not None:
            self.local.rider = None  # whoever calls the model from here on is a guest
            rider.hand_over(rider.party.ride)

    # Called by the carousel's thread.

    def settle(self, course: Course | None = None) -> list[Visit]:
        """Let every rider board that can, and wait until none runs. Return the visits to serve; none at the end.

        Guests may be served while a rider runs, because the rider may be blocked on that very guest: a guest at
        the stop of `course`, where the carousel is, at once; others only after a timeout, because the carousel may
        have to come back for riders that are still to pass here. Without a course, wait until there is a visit.
        The lock must not be held recursively, so that it can be released while a job is drawn.
        """
        # Those that come later wait for the next call, as do riders that return once more: jobs that end at once and
        # board again and again, or are away again and again, must not keep the carousel from its visits.
        newest, returned = self._last_party, set[Rider]()
        while self.over is None:
            if self.alone.thread is not None:
                self.alone.wait()
                continue
            self._end_parties()
            patience = None
            if self.baton.holder is None:
                if self._return(returned) or self._draw() or self._board(newest):
                    continue
                if self.waiting or course is not None:
                    return self.waiting
                if self.returning or newest != self._last_party:
                    newest, returned = self._last_party, set()
                    continue
            elif guests := [visit for visit in self.waiting if visit.rider is None]:
                patience = self.baton.runs_since + GUEST_PATIENCE_SECONDS - time.monotonic()
                is_here = course is not None and any(v.stop == course.stop for v in course.due(guests))
                if is_here or patience <= 0:
                    return guests
            is_idle = self.baton.holder is None
            self.changed.wait(patience)
            if is_idle:
                newest, returned = self._last_party, set()
        return []

    def begin(self, visit: Visit) -> None:
        """Take a visit from those that wait, to be served; called with the lock held."""
        self.waiting.remove(visit)
        self.baton.hand(visit.rider)
        self._num_begun += 1

    def finish(self, visit: Visit) -> None:
        """Let the thread of a visit that was served go on."""
        if visit.rider is not None:
            self.baton.runs_since = time.monotonic()
        self._num_begun -= 1
        visit.done.set()

    def dismiss_at(self, stop: int, error: BaseException) -> None:
        """Let every visit that waits at a stop raise an error."""
        with self.changed:
            self._dismiss([visit for visit in self.waiting if visit.stop == stop], error)

    # What follows runs with the lock held.

    def _return(self, returned: set[Rider]) -> bool:
        """Hand the baton to the first rider that comes back and has not `returned`; False where there is none."""
        turns = [turn for turn in self.returning if turn.rider not in returned]
        if not turns:
            return False
        turn = min(turns, key=lambda turn: turn.order)
        assert turn.rider is not None, "a guest is never away"
        returned.add(turn.rider)
        self.returning.remove(turn)
        self.baton.hand(turn.rider)
        turn.done.set()
        return True

    def _draw(self) -> bool:
        """Take the next job from a caller's iterable; return False where no party needs one."""
        party = next((party for party in self.parties if not party.drawn and not party.exhausted), None)
        if party is None:
            return False
        self.baton.set_outer_state(party.random_state)
        # Without the lock: it is the caller's code, and may take its time.
        self.changed.release()
        try:
            job = party.run(next, party.jobs)
        except BaseException as error:  # the iterable has ended or failed
            party.stop_boarding(None if isinstance(error, StopIteration) else error)
        finally:
            self.changed.acquire()
        party.random_state = self.baton.outer_state()
        if not party.exhausted:  # nor cancelled meanwhile
            party.drawn.append(job)
        return True

    def _board(self, newest: int) -> bool:
        """Start the next job, of the parties up to `newest`, for which there is a seat; False where there is none."""
        party = next((party for party in self.parties if party.number <= newest and party.has_seat), None)
        if party is None:
            return False
        self._last_order += 1
        rider = Rider(party, self._last_order, party.drawn.pop(), self.baton.first_state(party))
        party.num_boarded += 1
        party.active.add(rider)
        self.baton.hand(rider)
        run = functools.partial(self._run_rider, rider)
        try:
            if party.ride is not None:
                self._threads.run(rider, run)
            else:
                thread = threading.Thread(target=run, name=f"slowllm-rider-{rider.index}", daemon=True)
                thread.start()
                rider.thread = thread
        except RuntimeError as error:  # the system has no more threads
            rider.error = error
            self._leave(rider)
            if party.ride is not None:
                # Without the lock: callbacks may board and cancel.
                self.changed.release()
                try:
                    rider.hand_over(party.ride)
                finally:
                    self.changed.acquire()
        return True

    def _leave(self, rider: Rider) -> None:
        party = rider.party
        party.active.discard(rider)
        self.baton.put_down(rider)
        if party.ride is None:
            party.ended[rider.index] = rider
            if rider.index == 0 and not party.is_stream and rider.random_state is not None:
                party.random_state = rider.random_state
        if rider.error is not None and party.is_stream:
            party.stop_boarding(None)
        self._end_parties()
        self.changed.notify_all()

    def _end_parties(self) -> None:
        """Remove parties that are complete. After the last `ride` or `stream`, the caller has its generator back."""
        for party in [p for p in self.parties if p.exhausted and not p.drawn and not p.active]:
            self.parties.remove(party)
            if party.ride is None and self._first_drawing() is None:
                is_alone = party.num_boarded <= 1 and not party.is_stream
                self.baton.set_outer_state(party.random_state if is_alone else past_seeds(party.random_state))
            self.changed.notify_all()

    def _add(self, party: Party) -> None:
        self._last_party += 1
        party.number = self._last_party
        self.parties.append(party)
        self.changed.notify_all()

    def _first_drawing(self) -> Party | None:
        """Return the first `ride` or `stream`, from whose generator those that are admitted later are seeded."""
        return next((party for party in self.parties if party.ride is None), None)

    def _dismiss(self, turns: Collection[Turn], error: BaseException) -> None:
        self.waiting = [visit for visit in self.waiting if visit not in turns]
        self.returning = [turn for turn in self.returning if turn not in turns]
        self.baton.dismiss(turns, error)

    def _dismiss_party(self, party: Party, error: BaseException) -> None:
        turns = [*self.waiting, *self.returning]
        self._dismiss([turn for turn in turns if turn.rider and turn.rider.party is party], error)


def _cancelled() -> RideError:
    return RideError("the ride was cancelled")
