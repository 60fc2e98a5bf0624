"""A tokenizer's chat template applied to messages, within limits of time and memory."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

from slowllm.inference.bounded_calls import BoundedCalls

# One child process for each tokenizer, as long as it is in use.
_children: weakref.WeakKeyDictionary[Any, BoundedCalls[Any, Any]] = weakref.WeakKeyDictionary()


def chat_ids(tokenizer: Any, messages: Sequence[Any]) -> tuple[int, ...]:
    """Return the token ids of a conversation that ends where the next answer begins.

    Raises:
        InputError: the template refuses the messages, or takes too long or too much memory.
    """
    return tuple(_apply(tokenizer, messages, {"add_generation_prompt": True, "tokenize": True}))


def chat_text(tokenizer: Any, messages: Sequence[Any], **options: Any) -> str:
    """Return a conversation as text; `options` are those of transformers' `apply_chat_template`.

    Raises:
        InputError: the template refuses the messages, or takes too long or too much memory.
    """
    return str(_apply(tokenizer, messages, {**options, "tokenize": False}))


def _apply(tokenizer: Any, messages: Sequence[Any], options: dict[str, Any]) -> Any:
    if tokenizer not in _children:
        # By a weak reference: the dictionary's values must not keep its keys.
        _children[tokenizer] = BoundedCalls(functools.partial(_call, weakref.ref(tokenizer)))
    return _children[tokenizer]((tokenizer.chat_template, list(messages), options))


def _call(reference: weakref.ref[Any], call: tuple[Any, list[Any], dict[str, Any]]) -> Any:
    tokenizer: Any = reference()
    tokenizer.chat_template, messages, options = call
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)
