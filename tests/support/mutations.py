"""Damaged JSON, drawn from a seed: values of wrong types, missing and doubled fields, changed and lost bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, -5, 2**31, 2**31 - 1, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308,
    float("inf"), float("-inf"), float("nan"), "", "x", "1", "none", "a" * 100_000, "\ud800", "\0", "../../etc/passwd",
    [], [1], [None], [[[]]], ["x"] * 1000, [-1, 2**40], {}, {"a": 1}, {"type": "x"}, {"__class__": "x"},
)  # fmt: skip


def mutated(text: bytes, seed: int) -> bytes:
    """Return a damaged form of a JSON text, or of JSON lines; every seed gives another, mostly one fault at a time."""
    rng = random.Random(seed)
    if rng.random() < 0.15:
        return _bytes(text, rng)
    lines = text.splitlines() if _is_lines(text) else [text]
    place = rng.randrange(len(lines))
    value = json.loads(lines[place])
    for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
        value = _change(value, rng)
    lines[place] = json.dumps(value).encode()
    return b"\n".join(lines)


def _is_lines(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return True
    return False


def _bytes(text: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(text))
    match rng.randrange(5):
        case 0:
            return text[:place]
        case 1:
            return text[:place] + bytes([rng.randrange(256)]) + text[place + 1 :]
        case 2:
            return text[:place] + rng.randbytes(rng.randrange(1, 9)) + text[place:]
        case 3:
            return text[:place] + text[place + rng.randrange(1, 200) :]
        case _:
            return rng.choice(
                (b"", b"[]", b"null", b"{}", b"\xff\xfe", b"{" * 100_000, b"[" * 100_000, b'"', b"0")
            )


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        items: Any = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))[:50]  # of a vocabulary, a part
    else:
        return
    for key, inner in items[:500]:
        yield from _places(inner, (*path, key))


def _change(value: Any, rng: random.Random) -> Any:
    value = copy.deepcopy(value)
    path = rng.choice([path for path in _places(value) if path] or [()])
    if not path:
        return rng.choice(NASTY)
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    key, old = path[-1], owner[path[-1]]
    match rng.randrange(8):
        case 0:
            del owner[key]
        case 1 if isinstance(owner, dict):
            owner[rng.choice(("x", "", str(key) + "_", "model_type"))] = owner.pop(key)
        case 2 if isinstance(old, int | float) and not isinstance(old, bool):
            owner[key] = rng.choice(
                (old + 1, old - 1, old * 2, old // 2, -old, float(old), str(old), old * 10**6)
            )
        case 3 if isinstance(old, list | str) and old:
            owner[key] = rng.choice((old + old, old[:-1], old[:1]))
        case 4:
            owner[key] = rng.choice(([old], {"x": old}))
        case _:
            owner[key] = rng.choice(NASTY)
    return value
