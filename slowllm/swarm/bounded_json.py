"""Read and write JSON that strangers send: bounded in bytes and depth, without numbers, names or letters that do harm.

Knows nothing of what the JSON is about.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from slowllm.errors import ProtocolError

MAX_DEPTH = 12
# Python's big integers of thousands of digits cost quadratic time.
MAX_DIGITS = 20


def dump_json(value: object, what: str, max_bytes: int) -> bytes:
    """Return a value as ASCII JSON without spaces.

    Raises:
        ProtocolError: it has other types than JSON's, names that are not strings, a number that is not finite, or more
            than `max_bytes`.
    """
    try:
        _check(value)
        text = _ENCODER.encode(value).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} cannot be written as JSON ({error})") from error
    if len(text) > max_bytes:
        raise ProtocolError(f"{what} has {len(text):,} bytes of JSON, more than the {max_bytes:,} allowed")
    return text


def load_json(text: bytes, what: str, max_bytes: int) -> dict[str, Any]:
    """Return the JSON object of a text.

    Args:
        text: UTF-8.
        what: the text's name for the message of an error.
        max_bytes: how long it may be; values take up to 30 times as much memory.
    Raises:
        ProtocolError: it is too long, too deep, no JSON object, or has a name twice, a lone surrogate or a number
            that is not finite.
    """
    if len(text) > max_bytes:
        raise ProtocolError(f"{what} has {len(text):,} bytes of JSON, more than the {max_bytes:,} allowed")
    try:
        # Not json.loads(bytes), which guesses UTF-16 and UTF-32.
        value = _DECODER.decode(text.decode("utf-8"))
        _check(value)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} is not a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice in it")
    return table


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number is out of range")
    return number


def _integer(digits: str) -> int | float:
    if len(digits) > MAX_DIGITS:
        raise ValueError("a number is out of range")
    # "-0" is no unsigned integer to other readers of JSON.
    return int(digits) if digits != "-0" else _finite(digits)


def _check(value: object) -> None:
    """Refuse what is nested too deeply, names that are not strings, and strings that cannot be written as UTF-8."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[object] = []
        for part in level:
            if isinstance(part, str):
                part.encode()  # raises on a lone surrogate, which is a ValueError
            elif isinstance(part, dict):
                if not all(isinstance(name, str) for name in part):
                    raise ValueError("a name is not a string")
                inner += part
                inner += part.values()
            elif isinstance(part, list | tuple):
                inner += part
        if not inner:
            return
        level = inner
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


# Made once: `json.dumps` and `json.loads` make theirs anew at each call that has options.
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_duplicates,
    parse_constant=_no_constant,
    parse_float=_finite,
    parse_int=_integer,
)
