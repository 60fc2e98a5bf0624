"""How often earlier runs chose each expert of a model: one small file a model in the user's cache folder.

Knows files and counts; what is done with the counts is decided where experts are read and planned. Nothing here ends a run: a file
that cannot be used is not used, a folder that cannot be written is not written, and either is said in one sentence.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slowllm.errors import InputError, SlowLLMError
from slowllm.files import locked_folder, parse_object, replace_file, shown
from slowllm.planning.experts import popularity_of
from slowllm.streaming.kept_stops import ENOUGH_COUNTS

log = logging.getLogger(__name__)

# Set to one of these, in letters of either case, nothing is remembered: whoever writes "off" does not want files of what was needed.
SWITCH = "SLOWLLM_EXPERT_COUNTS"
_OFF = ("0", "false", "no", "off")
VERSION = 1
# A file of the largest models, of 23,000 experts, has a hundredth of it.
MAX_BYTES = 16 << 20
# The most work that a killed process forgets.
SAVE_SECONDS = 180.0
# How long a model that is being closed waits for others that are as well. Each takes milliseconds.
CLOSE_SECONDS = 2.0


@dataclass(frozen=True)
class ModuleCounts:
    """What was chosen of the experts of one module.

    Attributes:
        num_sweeps: that passed the module.
        chosen: how many of them needed each expert.
    """

    num_sweeps: int
    chosen: tuple[int, ...]

    def plus(self, other: ModuleCounts) -> ModuleCounts:
        """Return the sum, which later choices can outweigh: where it is large it is halved."""
        sweeps = self.num_sweeps + other.num_sweeps
        chosen = [one + more for one, more in zip(self.chosen, other.chosen, strict=True)]
        while sum(chosen) > ENOUGH_COUNTS * len(chosen):
            sweeps, chosen = sweeps // 2, [count // 2 for count in chosen]
        return ModuleCounts(sweeps, tuple(chosen))


def counts_folder() -> Path | None:
    """Return the folder of the files, which need not be there; None where nothing is to be remembered.

    It is ``slowllm/experts`` in ``$XDG_CACHE_HOME``, or in ``~/.cache`` where that is not set or no absolute path, as the XDG base
    directory specification says.
    """
    if os.environ.get(SWITCH, "").strip().lower() in _OFF:
        return None
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not named.is_absolute():
        try:
            named = Path.home() / ".cache"
        except RuntimeError:  # nobody has a home here
            return None
    # A relative home would have it written into whatever folder the process runs in.
    if not named.is_absolute():
        return None
    return named / "slowllm" / "experts"


# A verb may open a model several times, to find out what fits, and it is the same file each time.
@functools.cache
def _warn_of(path: Path, reason: str) -> None:
    """Say once a process that a file cannot be used."""
    log.warning(
        "%s: is not used to tell which experts will be needed, and is replaced when the model is closed: it %s",
        path, reason,
    )  # fmt: skip


class ExpertHistory:
    """What earlier runs chose of a model's experts, to which this run adds what it chooses.

    Args:
        folder: of the files.
        fingerprint: returns the model's; called once, when it is needed.
        sizes: how many experts each module has, by its name, in the order of the model.
        is_whole: whether these are all modules of the model, and not those of a part of it.
    """

    def __init__(
        self, folder: Path, fingerprint: Callable[[], str], sizes: Mapping[str, int], *, is_whole: bool
    ) -> None:
        self._folder, self._fingerprint_of = folder, fingerprint
        self._sizes, self._is_whole = dict(sizes), is_whole
        self._saved = self._none()
        self._saved_at = time.monotonic()
        self._has_warned = False

    @functools.cached_property
    def fingerprint(self) -> str:
        """The model's."""
        return self._fingerprint_of()

    @property
    def path(self) -> Path:
        """The model's file, which need not be there."""
        return self._folder / f"{self.fingerprint}.json"

    @functools.cached_property
    def earlier(self) -> Mapping[str, ModuleCounts]:
        """What earlier runs chose, by the modules' names; nothing where it is not known."""
        # A fingerprint takes a look at all shards, in vain where there is no file at all.
        try:
            if not self._folder.is_dir():
                return {}
        except OSError:  # nobody may look there, which is said when it is to be written
            return {}
        try:
            path = self.path
        except OSError:  # of a shard, which is said when it is read
            return {}
        try:
            return self._read()
        except InputError as error:
            # A folder in its place is not replaced, which is said when the model is closed.
            if not os.path.isdir(path):
                _warn_of(path, str(error))
            return {}

    def counts(self) -> np.ndarray:
        """Return how many sweeps of earlier runs needed each expert, (U,) int64, zero where it is not known."""
        modules = (self.earlier.get(name, none) for name, none in self._none().items())
        return np.array([count for module in modules for count in module.chosen], dtype=np.int64)

    def popularity(self) -> tuple[float, ...]:
        """Return how popular the experts of a block are; see `popularity_of`. Nothing where modules differ in size."""
        known = [self.earlier[name] for name in self._sizes if name in self.earlier]
        if len(set(self._sizes.values())) > 1:
            return ()
        return popularity_of([module.chosen for module in known], [module.num_sweeps for module in known])

    def save(
        self, chosen: np.ndarray, num_sweeps: Sequence[int], *, wait_seconds: float = CLOSE_SECONDS
    ) -> None:
        """Add what this run has chosen since the last time to the file, and to what others have written there meanwhile.

        Args:
            chosen: how many sweeps of this run needed each expert so far, (U,) int64.
            num_sweeps: of this run that passed each module so far.
            wait_seconds: for others that are writing; what is not written then is written next time.
        """
        now = self._now(chosen, num_sweeps)
        new = {
            name: ModuleCounts(
                one.num_sweeps - self._saved[name].num_sweeps,
                tuple(
                    count - before for count, before in zip(one.chosen, self._saved[name].chosen, strict=True)
                ),
            )
            for name, one in now.items()
        }
        self._saved_at = time.monotonic()
        if not any(one.num_sweeps for one in new.values()):
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked_folder(self._folder, wait_seconds) as is_ours:
                if is_ours:
                    self._write(new)
                    self._saved = now
        except (OSError, SlowLLMError) as error:
            if not self._has_warned:
                log.warning(
                    "%s: which experts were needed cannot be written there for the next start (%s); %s=0 switches it off",
                    self._folder, getattr(error, "strerror", None) or error, SWITCH,
                )  # fmt: skip
            self._has_warned = True

    def save_if_due(self, chosen: np.ndarray, num_sweeps: Sequence[int]) -> None:
        """Save where the last time is long enough ago and nobody else is writing; see `save`."""
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.save(chosen, num_sweeps, wait_seconds=0.0)

    def leave_out(self, chosen: np.ndarray, num_sweeps: Sequence[int]) -> None:
        """Do not save what this run has chosen so far; see `save`."""
        self._saved = self._now(chosen, num_sweeps)

    def _none(self) -> dict[str, ModuleCounts]:
        return {name: ModuleCounts(0, (0,) * size) for name, size in self._sizes.items()}

    def _now(self, chosen: np.ndarray, num_sweeps: Sequence[int]) -> dict[str, ModuleCounts]:
        found, first = {}, 0
        for (name, size), sweeps in zip(self._sizes.items(), num_sweeps, strict=True):
            found[name] = ModuleCounts(sweeps, tuple(chosen[first : first + size].tolist()))
            first += size
        return found

    def _write(self, new: Mapping[str, ModuleCounts]) -> None:
        try:
            there = self._read()
        except InputError:  # which was said when the model was opened, or has become so since
            there = {}
        none = self._none()
        modules = there | {name: there.get(name, none[name]).plus(one) for name, one in new.items()}
        table = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "modules": {
                name: {"num_sweeps": one.num_sweeps, "chosen": one.chosen} for name, one in modules.items()
            },
        }
        if self.path.is_dir() and not self.path.is_symlink():
            raise InputError(f"{self.path.name} is a folder; delete it")
        replace_file(self.path, json.dumps(table))

    def _read(self) -> dict[str, ModuleCounts]:
        """Return what is in the file; nothing where there is none.

        Raises:
            InputError: it cannot be used; the message says what it is or has.
        """
        try:
            if not self.path.exists():
                return {}
            if not self.path.is_file() or self.path.stat().st_size > MAX_BYTES:
                raise InputError("is no ordinary file, or too large for one of its kind")
            table = parse_object(self.path.read_bytes(), "is no JSON object")
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror or error})") from error
        if table.get("version") != VERSION:
            raise InputError(f"is of version {shown(table.get('version'))}, and this slowllm reads {VERSION}")
        modules = table.get("modules")
        if table.get("fingerprint") != self.fingerprint or not isinstance(modules, dict):
            raise InputError("was made for another model")
        if self._is_whole and (others := sorted(set(modules) - set(self._sizes))):
            raise InputError(f"was made for another model, which has experts in {others[0]}")
        return {name: self._counts_of(name, value) for name, value in modules.items()}

    def _counts_of(self, name: str, value: object) -> ModuleCounts:
        chosen = value.get("chosen") if isinstance(value, dict) else None
        sweeps = value.get("num_sweeps") if isinstance(value, dict) else None
        if (
            not isinstance(chosen, list)
            or type(sweeps) is not int
            or not all(type(count) is int and 0 <= count <= sweeps < 1 << 40 for count in chosen)
        ):
            raise InputError(f"has no counts of experts for {name}")
        if len(chosen) != (size := self._sizes.get(name, len(chosen))):
            raise InputError(
                f"was made for another model, which has {len(chosen)} experts in {name} and not {size}"
            )
        return ModuleCounts(sweeps, tuple(chosen))
