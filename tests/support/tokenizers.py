"""Small tokenizers of many manners, made here: byte-level BPE, Unigram and WordPiece, with all sorts of special tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["the cat and the dog and the other cats sat on the mat, is it so? yes no " * 3]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "[gMASK]", "<sop>", "<en>"]


def _bpe(prefix_space: bool = False) -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )


def _unigram(prepend: str = "always") -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    made.decoder = decoders.Metaspace(prepend_scheme=prepend)
    return made, trainers.UnigramTrainer(
        vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )


def _wordpiece() -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)


def _made(
    base: Callable[[], tuple[Tokenizer, Any]],
    leading: tuple[str, ...] = (),
    trailing: tuple[str, ...] = (),
    **special: str,
) -> PreTrainedTokenizerFast:
    tokenizer, trainer = base()
    tokenizer.train_from_iterator(CORPUS, trainer)
    if leading or trailing:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*leading, "$A", *trailing]),
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in (*leading, *trailing)],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **special)


BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
# Name: how it is made. BOS that only a chat template writes is "no BOS by itself".
MANNERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "BPE with BOS": lambda: _made(_bpe, ("<s>",), **BOTH),
    "BPE without special tokens": lambda: _made(_bpe, eos_token="</s>"),
    "BPE with BOS that it does not write": lambda: _made(_bpe, **BOTH),
    "BPE with two leading tokens": lambda: _made(_bpe, ("[gMASK]", "<sop>"), eos_token="</s>"),
    "BPE with BOS and a language": lambda: _made(_bpe, ("<s>", "<en>"), **BOTH),
    "BPE with EOS before": lambda: _made(_bpe, ("</s>",), eos_token="</s>"),
    "BPE with a blank before": lambda: _made(lambda: _bpe(prefix_space=True), ("<s>",), **BOTH),
    "Unigram with BOS": lambda: _made(_unigram, ("<s>",), **BOTH),
    "Unigram without BOS": lambda: _made(_unigram, eos_token="</s>"),
    "Unigram with a blank at the first word only": lambda: _made(lambda: _unigram("first"), ("<s>",), **BOTH),
    "Unigram with a language": lambda: _made(_unigram, ("<s>", "<en>"), **BOTH),
    "WordPiece with BOS": lambda: _made(_wordpiece, ("<s>",), **BOTH),
}
# What each writes before a text.
LEADING = {
    "BPE with BOS": ("<s>",), "BPE with two leading tokens": ("[gMASK]", "<sop>"), "BPE with BOS and a language": ("<s>", "<en>"),
    "BPE with EOS before": ("</s>",), "BPE with a blank before": ("<s>",), "Unigram with BOS": ("<s>",),
    "Unigram with a blank at the first word only": ("<s>",), "Unigram with a language": ("<s>", "<en>"),
    "WordPiece with BOS": ("<s>",),
}  # fmt: skip
