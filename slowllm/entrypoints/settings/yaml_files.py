"""Read a small YAML file that people write by hand, and say what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from slowllm.errors import InputError
from slowllm.files import read_description


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; an empty file holds an empty one.

    Only plain data are read: no tag makes an object.

    Raises:
        InputError: it cannot be read, is too large, is no YAML or no mapping with texts as keys, or has a key twice.
    """
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Plain data, with every key of a mapping once."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """Return the mapping; PyYAML would keep the last value of a key that stands in it twice."""
            found: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} is no text", key_node.start_mark
                    )
                if key in found:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands in it twice", key_node.start_mark
                    )
                found.add(key)
            return super().construct_mapping(node, deep)  # type: ignore[no-any-return]

    try:
        document = yaml.load(read_description(path, InputError).decode("utf-8"), Loader)
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
