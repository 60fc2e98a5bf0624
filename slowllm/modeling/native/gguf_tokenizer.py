"""Make the tokenizer that a GGUF file describes, by transformers' own conversion."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TokenizersBackend
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from slowllm.errors import CheckpointError, first_line
from slowllm.modeling.native.gguf_config import config_of
from slowllm.storage.gguf import read_set

TOKENS = "tokenizer.ggml.tokens"
# Of each token, where they are there.
_OF_TOKENS = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
# One of them says how tokens are put together.
_RULES = ("tokenizer.ggml.merges", "tokenizer.ggml.scores")
# Others that are beyond the vocabulary are left out by llama.cpp, and occur.
_IDS = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")


def gguf_tokenizer(files: Sequence[Path]) -> Any:
    """Return the tokenizer of a GGUF model.

    Args:
        files: of the model; the first has the vocabulary.
    Raises:
        CheckpointError: the file has no vocabulary, or one that transformers does not convert.
    """
    header, file = read_set(files), files[0]
    if not isinstance(header.metadata.get(TOKENS), list):
        raise CheckpointError(
            f"{file.name}: has no tokenizer ({TOKENS}), so no text can be encoded; put a tokenizer.json into its folder and "
            "name the folder as the model, or fetch another file"
        )
    _refuse_lying(file.name, header.metadata)
    # The class that transformers' AutoTokenizer takes for a GGUF file. It is asked itself, because AutoTokenizer reads the
    # config by the package gguf, which is not needed otherwise.
    kind: Any = TOKENIZER_MAPPING.get(type(config_of(file.name, header)), None) or TokenizersBackend
    try:
        return kind.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    except Exception as error:  # a damaged vocabulary may raise anything
        raise CheckpointError(f"{file.name}: its tokenizer cannot be made ({first_line(error)})") from error


def _refuse_lying(name: str, metadata: Mapping[str, Any]) -> None:
    """Refuse a vocabulary whose lists do not go together; transformers would leave some of it out, or raise anything.

    Raises:
        CheckpointError: they do not.
    """
    tokens = metadata[TOKENS]
    if not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{name}: {TOKENS} is no list of strings; fetch the file again")
    if not any(isinstance(metadata.get(key), list) for key in _RULES):
        raise CheckpointError(
            f"{name}: has neither {' nor '.join(_RULES)}, so no tokenizer can be made of it"
        )
    for key in _OF_TOKENS:
        value = metadata.get(key, tokens)
        if not isinstance(value, list) or len(value) != len(tokens):
            said = f"has {len(value):,} entries" if isinstance(value, list) else "is no list"
            raise CheckpointError(
                f"{name}: {key} {said}, but there are {len(tokens):,} tokens; fetch the file again"
            )
    for key in _IDS:
        value = metadata.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(tokens):
            raise CheckpointError(
                f"{name}: {key} is {reprlib.repr(value)}, which is none of its {len(tokens):,} tokens; fetch the file again"
            )
