"""Read a small YAML file that people write by hand, and say what is wrong with it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from slowllm.errors import InputError
from slowllm.files import read_description


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; an empty file holds an empty one.

    Only plain data are read: no tag makes an object, and no reference is followed.

    Raises:
        InputError: it cannot be read, is too large, is no YAML or no mapping with texts as keys, or has a key twice.
    """
    yaml: Any = importlib.import_module("yaml")  # which takes its time, and has types or not

    def construct_mapping(loader: Any, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping of which every key is a text and stands in it once; PyYAML would keep the last value."""
        found: set[str] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in found:
                problem = (
                    f"the key {key!r} stands in it twice" if key in found else f"the key {key!r} is no text"
                )
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            found.add(key)
        return cast("dict[Any, Any]", yaml.SafeLoader.construct_mapping(loader, node, deep))

    def compose_node(loader: Any, parent: Any, index: Any) -> Any:
        """Return a node that is written where it stands: with references, a few lines may stand for gigabytes."""
        if loader.check_event(yaml.events.AliasEvent):
            event = loader.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the reference *{event.anchor} is not followed; write the value where it belongs",
                event.start_mark,
            )  # fmt: skip
        return yaml.SafeLoader.compose_node(loader, parent, index)

    changed = {"construct_mapping": construct_mapping, "compose_node": compose_node}
    loader = type("Loader", (yaml.SafeLoader,), changed)
    try:
        document = yaml.load(read_description(path, InputError).decode("utf-8"), loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read as YAML ({reason[:200]})") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise InputError(
            f"{path}: holds a {type(document).__name__}; write a mapping, one `name: value` a line"
        )
    return document


def nearest(word: str, known: Collection[str]) -> str:
    """Return the known word that looks most like another one.

    Args:
        word: that is not known.
        known: at least one.
    """
    return difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.0)[0]
