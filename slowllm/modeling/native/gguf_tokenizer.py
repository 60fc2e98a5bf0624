"""Make the tokenizer that a GGUF file describes, by transformers' own conversion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TokenizersBackend
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from slowllm.errors import CheckpointError, first_line
from slowllm.modeling.native.gguf_config import config_of
from slowllm.storage.gguf import read_set

TOKENS = "tokenizer.ggml.tokens"


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
    # The class that transformers' AutoTokenizer takes for a GGUF file. It is asked itself, because AutoTokenizer reads the
    # config by the package gguf, which is not needed otherwise.
    kind: Any = TOKENIZER_MAPPING.get(type(config_of(file.name, header)), None) or TokenizersBackend
    try:
        return kind.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    except Exception as error:  # a damaged vocabulary may raise anything
        raise CheckpointError(f"{file.name}: its tokenizer cannot be made ({first_line(error)})") from error
