"""Configs that carry, beside transformers' own fields, how a client uses a swarm."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, ClassVar

from slowllm.errors import InputError
from slowllm.modeling.skeleton import read_config
from slowllm.runtime.model_folder import find_folder
from slowllm.swarm.petals.client_config import CLIENT_FIELDS, ClientConfig, read_call


class DistributedConfig:
    """Mixin for transformers' config of a family, which also answers for the fields of `ClientConfig`.

    These are in no file and no hash that is made of the config.

    Attributes:
        family: the only `model_type` that a subclass takes; None for any.
    """

    family: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(cls, model_name_or_path: Any, **arguments: Any) -> Any:
        """Return the config of a checkpoint, with the client's fields among the arguments.

        Args:
            model_name_or_path: a folder, or a hub id that is in the local cache.
            arguments: fields of `ClientConfig`, and those of transformers' `from_pretrained`.
        Raises:
            InputError: an argument cannot be used, or the checkpoint is of another family.
            CheckpointError: there is no such checkpoint.
        """
        call = read_call(model_name_or_path, arguments)
        config = read_config(find_folder(call.model))
        check_family(cls, config)
        return with_client(config, call.client)

    @property
    def client(self) -> ClientConfig:
        """How the swarm is used."""
        client: ClientConfig = self.__dict__["_client"]
        return client

    def __getattr__(self, name: str) -> Any:
        if name in CLIENT_FIELDS and "_client" in self.__dict__:
            return getattr(self.client, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CLIENT_FIELDS:
            self.__dict__["_client"] = replace(self.client, **{name: value})
        else:
            super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return transformers' own fields."""
        table: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        table.pop("_client", None)
        return table


def check_family(kind: type[Any], config: Any) -> None:
    """Refuse a checkpoint of another family than a class is for.

    Raises:
        InputError: it is.
    """
    family = kind.family
    if family is not None and config.model_type != family:
        raise InputError(
            f"{kind.__name__} is for models of type {family}, but this one is of type {config.model_type}; use the class of its "
            "family, or an AutoDistributed class"
        )


def class_for(kind: type[Any], config: Any) -> type[Any]:
    """Return the class of a model's own family, among those derived from a class for any; itself where there is none."""
    found = (own for own in kind.__subclasses__() if own.family == config.model_type)
    return kind if kind.family is not None else next(found, kind)


def with_client(config: Any, client: ClientConfig) -> Any:
    """Return a config that carries the client's fields; the given one stays as it is."""
    made = copy.deepcopy(config)
    kind = type(made)
    if not isinstance(made, DistributedConfig):
        family = next((own for own in CONFIGS if own.family == made.model_type), DistributedConfig)
        made.__class__ = type(f"Distributed{kind.__name__}", (family, kind), {"__module__": __name__})
    made.__dict__["_client"] = client
    return made


class AutoDistributedConfig(DistributedConfig):
    """The config of a checkpoint of any family, by `from_pretrained`."""


class DistributedBloomConfig(DistributedConfig):
    """The config of a BLOOM."""

    family = "bloom"


class DistributedFalconConfig(DistributedConfig):
    """The config of a Falcon."""

    family = "falcon"


class DistributedLlamaConfig(DistributedConfig):
    """The config of a Llama."""

    family = "llama"


class DistributedMixtralConfig(DistributedConfig):
    """The config of a Mixtral."""

    family = "mixtral"


CONFIGS: tuple[type[DistributedConfig], ...] = (
    DistributedBloomConfig, DistributedFalconConfig, DistributedLlamaConfig, DistributedMixtralConfig,
)  # fmt: skip
