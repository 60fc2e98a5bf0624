"""Which models a swarm serves: under one key of the directory each server names the one whose blocks it has.

An entry comes from a stranger, like a server's record: it is bounded, checked, and counts only if the peer that it names
has signed it. It says of a model what its key and its config's type say, and nothing of where its files lie.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from slowllm.errors import ProtocolError
from slowllm.swarm.bounded_json import dump_json, load_json
from slowllm.swarm.directory import Directory, signer_of
from slowllm.swarm.records import FORMAT, MAX_BLOCKS

log = logging.getLogger(__name__)

# No model has this key: those of models end in their number of blocks.
MODELS = "models"
MAX_ENTRY_BYTES = 1024
MAX_MODELS = 256
_MODEL = re.compile(r"[0-9a-z]{8,64}-([1-9][0-9]{0,3})", re.ASCII)
_KIND = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class ModelEntry:
    """A model of which some peer serves blocks.

    Attributes:
        peer: id of the server that says so.
        model: key under which the model's servers are found.
        kind: the type that the model's config names, such as ``bloom``.
    """

    peer: str
    model: str
    kind: str

    def __post_init__(self) -> None:
        """Refuse what no server may say.

        Raises:
            ProtocolError: a field is not what the class says.
        """
        for name in ("peer", "model", "kind"):
            if not isinstance(getattr(self, name), str):
                raise ProtocolError(f"an entry of the list of models has no {name}")
        key = _MODEL.fullmatch(self.model)
        if key is None or int(key[1]) > MAX_BLOCKS:
            raise ProtocolError(
                f"an entry of the list of models has the impossible model {self.model[:80]!r}"
            )
        if not _KIND.fullmatch(self.kind):
            raise ProtocolError(f"an entry of the list of models has the impossible kind {self.kind[:80]!r}")

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model."""
        return int(self.model.rpartition("-")[2])

    def to_bytes(self) -> bytes:
        """Return the entry as JSON."""
        return dump_json(
            {"format": FORMAT, **asdict(self)}, "an entry of the list of models", MAX_ENTRY_BYTES
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> ModelEntry:
        """Return the entry that `to_bytes` gave; fields that this version does not know are left out.

        Raises:
            ProtocolError: it is too large, damaged, or of a newer format.
        """
        said = load_json(data, "an entry of the list of models", MAX_ENTRY_BYTES)
        if said.get("format") != FORMAT:
            raise ProtocolError(
                f"an entry of the list of models has the format {str(said.get('format'))[:20]}, not {FORMAT}"
            )
        fields: dict[str, Any] = {name: said.get(name) for name in ("peer", "model", "kind")}
        return cls(**fields)


async def list_model(directory: Directory, entry: ModelEntry, ttl: float) -> None:
    """Put a server's entry into the list for `ttl` seconds.

    Raises:
        NetworkError: no peer took it.
    """
    await directory.put(MODELS, entry.to_bytes(), ttl, "the entry in the list of models")


async def models_of(directory: Directory) -> list[ModelEntry]:
    """Return one entry for each model that servers name, in the order of their keys, at most `MAX_MODELS`.

    Raises:
        NetworkError: nobody answers any more.
    """
    return check_entries(await directory.entries(MODELS))


def check_entries(found: Iterable[tuple[object, object, float]]) -> list[ModelEntry]:
    """Return one entry for each model, leaving out those that are malformed, expired, or not signed by their peer.

    Args:
        found: subkeys, values, and when they expire.
    """
    models: dict[str, ModelEntry] = {}
    for subkey, value, expires in found:
        try:
            signer, data = signer_of(subkey, value, expires)
            entry = ModelEntry.from_bytes(data)
            if entry.peer != signer:
                raise ProtocolError(f"forged: peer {signer} signed an entry of peer {entry.peer[:80]!r}")
        except ProtocolError as error:
            log.info("an entry of the list of models is left out (%s)", error)
            continue
        models.setdefault(entry.model, entry)
    if len(models) > MAX_MODELS:
        log.warning("the swarm lists %d models, of which %d are looked at", len(models), MAX_MODELS)
    return [models[key] for key in sorted(models)[:MAX_MODELS]]
