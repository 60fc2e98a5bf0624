"""Who takes part in a ride: parties of riders, the riders' threads, the visits that wait, and the baton.

Knows no weights, and of stops only their numbers. A rider boards when its thread starts, and leaves when its job has
ended. The holder of the baton is the only rider that runs its own code: it puts the baton down when it waits for a
stop or leaves, and has it again when it is served. Torch's generators change hands with the baton.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterable

import torch

from slowllm.errors import RideError
from slowllm.streaming.riders import Course, Party, Rider, ThreadState, Visit
from slowllm.streaming.rng_state import SharedGenerators, fork

# Timeout before a call from outside the ride (a guest) that waits at another stop preempts the running rider. It
# prevents a deadlock: the rider may be blocked on that guest, and we cannot tell. Where it is not, the riders' stop
# is read once more, so the timeout is about as long as reading a stop takes.
GUEST_PATIENCE_SECONDS = 0.5
# Callers wait in pieces of this length: a signal that arrives just before a thread blocks on a lock is not handled
# until the wait ends.
SIGNAL_SECONDS = 1.0


class Boarding:
    """The parties of a carousel and the visits that wait for it. Owns the riders' threads.

    Attributes:
        changed: the carousel's one lock, and the condition that anything here has changed.
        waiting: visits that are not served yet.
        parties: those that have not ended.
        baton: the rider that runs, None where every rider waits.
        over: why the carousel has ended, if it has.
    """

    def __init__(self, generators: SharedGenerators) -> None:
        self.changed, self.local = threading.Condition(), ThreadState()
        self.waiting: list[Visit] = []
        self.parties: list[Party] = []
        self.baton: Rider | None = None
        self.over: RideError | None = None
        self._generators = generators
        self._dismissed: list[Visit] = []  # of riders, which raise their errors one at a time
        self._last_order, self._runs_since = 0, 0.0

    # Called by callers' and riders' threads, without the lock.

    def wait(self, visit: Visit) -> None:
        """Block until a visit has been served or dismissed; raise if the carousel or the ride has ended."""
        try:
            with self.changed:
                self._refuse_if_over(visit.rider)
                self.waiting.append(visit)
                self._put_baton_down(visit.rider)
                self.changed.notify_all()
            while not visit.done.wait(SIGNAL_SECONDS):
                pass
        except BaseException:  # an interrupt: a visit whose thread has gone must not be served
            with self.changed:
                if visit in self.waiting:
                    self.waiting.remove(visit)
            raise

    def admit(self, party: Party) -> None:
        """Let the riders of a party board from now on; raise if the carousel has ended."""
        with self.changed:
            self._refuse_if_over(None)
            # During another ride the generator has the state of some rider, which would draw the same numbers.
            if self.parties:
                source, party.random_state = self._generators.forked(self.parties[0].seeds)
            else:
                source, party.random_state = torch.default_generator, self._generators.get()
            party.seeds = fork(source)
            self.parties.append(party)
            self.changed.notify_all()

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
        reason = RideError("the ride was cancelled")
        party.cancelled = True
        party.stop_boarding(reason)
        if not may_wait:
            return
        with self.changed:
            self._dismiss([v for v in self.waiting if v.rider and v.rider.party is party], reason)
            self._end_parties()
        while self.next_ended(party) is not None:
            pass

    def end(self, reason: RideError) -> None:
        """End the carousel: every visit that waits raises `reason`, and nobody boards any more."""
        with self.changed:
            self.over = self.over or reason
            for party in self.parties:
                party.cancelled = True
                party.stop_boarding(_twin(reason))
            self._dismiss(self.waiting, reason)
            self._end_parties()
            self.changed.notify_all()

    def _refuse_if_over(self, rider: Rider | None) -> None:
        if self.over is not None:
            raise _twin(self.over)
        if rider is not None and rider.party.cancelled:
            raise RideError("the ride was cancelled")

    def _run_rider(self, rider: Rider) -> None:
        self.local.rider = rider
        try:
            rider.result.append((rider.job, rider.party.run(rider.job)))
        except BaseException as caught:  # raised again by the call that began the ride
            rider.error = caught
        del rider.job
        with self.changed:
            self._leave(rider)

    # Called by the carousel's thread.

    def settle(self, course: Course | None = None) -> list[Visit]:
        """Let every rider board that can, and wait until none runs. Return the visits to serve; none at the end.

        Guests may be served while a rider runs, because the rider may be blocked on that very guest: a guest at
        the stop of `course`, where the carousel is, at once; others only after a timeout, because the carousel may
        have to come back for riders that are still to pass here. Without a course, wait until there is a visit.
        The lock must not be held recursively, so that it can be released while a job is drawn.
        """
        while self.over is None:
            self._end_parties()
            patience = None
            if self.baton is None:
                if self._draw() or self._board():
                    continue
                if self.waiting or course is not None:
                    return self.waiting
            elif guests := [visit for visit in self.waiting if visit.rider is None]:
                patience = self._runs_since + GUEST_PATIENCE_SECONDS - time.monotonic()
                is_here = course is not None and any(v.stop == course.stop for v in course.due(guests))
                if is_here or patience <= 0:
                    return guests
            self.changed.wait(patience)
        return []

    def begin(self, visit: Visit) -> None:
        """Take a visit from those that wait, to be served; called with the lock held."""
        self.waiting.remove(visit)
        self._hand_baton(visit.rider)

    def finish(self, visit: Visit) -> None:
        """Let the thread of a visit that was served go on."""
        if visit.rider is not None:
            self._runs_since = time.monotonic()
        visit.done.set()

    def dismiss_at(self, stop: int, error: BaseException) -> None:
        """Let every visit that waits at a stop raise an error."""
        with self.changed:
            self._dismiss([visit for visit in self.waiting if visit.stop == stop], error)

    # What follows runs with the lock held.

    def _draw(self) -> bool:
        """Take the next job from a caller's iterable; return False where no party needs one."""
        party = next((party for party in self.parties if not party.drawn and not party.exhausted), None)
        if party is None:
            return False
        self._generators.set(party.random_state)
        # Without the lock: it is the caller's code, and may take its time.
        self.changed.release()
        try:
            job = party.run(next, party.jobs)
        except BaseException as error:  # the iterable has ended or failed
            party.stop_boarding(None if isinstance(error, StopIteration) else error)
        finally:
            self.changed.acquire()
        party.random_state = self._generators.get()
        if not party.exhausted:  # nor cancelled meanwhile
            party.drawn.append(job)
        return True

    def _board(self) -> bool:
        """Start the next job for which there is a seat; return False where there is none."""
        party = next((party for party in self.parties if party.has_seat), None)
        if party is None:
            return False
        has_callers = party.num_boarded == 0 and not party.is_stream
        random_state = party.random_state if has_callers else self._generators.forked(party.seeds)[1]
        self._last_order += 1
        rider = Rider(party, self._last_order, party.drawn.pop(), random_state)
        party.num_boarded += 1
        party.active.add(rider)
        self._hand_baton(rider)
        name = f"slowllm-rider-{rider.index}"
        thread = threading.Thread(target=self._run_rider, args=(rider,), name=name, daemon=True)
        try:
            thread.start()
            rider.thread = thread
        except RuntimeError as error:  # the system has no more threads
            rider.error = error
            self._leave(rider)
        return True

    def _leave(self, rider: Rider) -> None:
        party = rider.party
        party.active.discard(rider)
        party.ended[rider.index] = rider
        self._put_baton_down(rider)
        if rider.index == 0 and not party.is_stream:
            party.random_state = rider.random_state
        if rider.error is not None and party.is_stream:
            party.stop_boarding(None)
        self._end_parties()
        self.changed.notify_all()

    def _end_parties(self) -> None:
        """Remove parties that are complete. After the last one, the caller has its generator back."""
        for party in [p for p in self.parties if p.exhausted and not p.drawn and not p.active]:
            self.parties.remove(party)
            if not self.parties:
                self._generators.set(party.random_state)
                if party.num_boarded > 1 or party.is_stream:
                    fork(torch.default_generator)  # past the number of the seeds, or they would come again
            self.changed.notify_all()

    def _hand_baton(self, rider: Rider | None) -> None:
        if rider is not None:  # a guest holds no baton
            # Sampling draws from the one global generator, so while the rider runs, its state is the rider's own.
            self._generators.set(rider.random_state)
            self.baton = rider
            self._runs_since = time.monotonic()

    def _put_baton_down(self, rider: Rider | None) -> None:
        if rider is not None:
            rider.random_state = self._generators.get()
            self.baton = None
            self._notify_dismissed()

    def _dismiss(self, visits: Iterable[Visit], error: BaseException) -> None:
        """End visits unserved. Riders raise the error one at a time, before another visit is served."""
        for visit in sorted(visits, key=lambda visit: visit.order):
            self.waiting.remove(visit)
            visit.error = _twin(error)
            if visit.rider is not None:
                self._dismissed.append(visit)
            else:  # at once: the running rider may be blocked on this guest
                visit.done.set()
        self._notify_dismissed()

    def _notify_dismissed(self) -> None:
        if self._dismissed and self.baton is None:
            visit = self._dismissed.pop(0)
            self._hand_baton(visit.rider)
            visit.done.set()


def _twin(error: BaseException) -> BaseException:
    """Copy an error: threads that raise one object would mix their tracebacks and notes in it."""
    try:
        twin = copy.copy(error)
    except Exception:  # its class takes other arguments than it keeps; then all threads share the one
        return error
    twin.__cause__, twin.__context__ = error.__cause__, error.__context__
    twin.__suppress_context__ = error.__suppress_context__
    return twin.with_traceback(error.__traceback__)
