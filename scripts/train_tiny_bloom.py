"""Train the small BLOOM checkpoint of this repository, and its two-block draft, on documentation prose.

Writes `tiny-bloom` (10 blocks, five shards) and `tiny-bloom-draft` (2 blocks, distilled from it) in the
layout of `bigscience/bloom` on the hub: bfloat16, keys without the `transformer.` prefix, no `lm_head`, and
the tokenizer beside them. Needs transformers; knows nothing about slowllm. weights/README.md has the command.
"""

import argparse
import hashlib
import json
import math
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
BOS, EOS, PAD = 1, 2, 3  # the order above, which is also BLOOM's
BATCH_TOKENS = 2048
# Where to cut the large checkpoint, as fractions of its bytes: uneven, and never between two blocks.
SHARD_CUTS = (0.19, 0.31, 0.64, 0.71)

PARAGRAPH_TAGS = {"p", "li"}
SKIPPED_TAGS = {"pre", "script", "style", "nav", "button", "table", "h1", "h2", "h3", "h4"}
MARKDOWN_RULES = [
    (r"(?ms)^```.*?^```|<!--.*?-->", "\n\n"),
    (r"(?m)^(#|\||\[[^]\n]+\]:).*$", "\n"),  # headings, tables, link targets
    (r"(?m)^\s*([*+-]|\d+\.)\s+", "\n\n"),  # each list item is a paragraph
    (r"!?\[((?:`[^`]*`|[^]`[])*)\](\([^)]*\)|\[[^]]*\])?", r"\1"),  # links become their text
    (r"(?m)[`*\\]|^>", ""),
]
PLAIN_WORD = re.compile(r"[\"'“‘(]*[A-Za-z]+(?:['’-][A-Za-z]+)*[\"'”’)]*[.,;:!?]*[\"'”’)]*$")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'“(]?[A-Z])")


class ParagraphParser(HTMLParser):
    """Collect the text of <p> and <li>, without code listings, tables and navigation."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs = [""]
        self._num_skipped = 0
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SKIPPED_TAGS | PARAGRAPH_TAGS:
            self.paragraphs.append("")
            self._inside = tag in PARAGRAPH_TAGS
            self._num_skipped += tag in SKIPPED_TAGS

    def handle_endtag(self, tag: str) -> None:
        if tag in SKIPPED_TAGS:
            self._num_skipped = max(0, self._num_skipped - 1)
        elif tag in PARAGRAPH_TAGS:
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside and not self._num_skipped:
            self.paragraphs[-1] += data


def paragraphs_of(path: Path) -> list[str]:
    """Return the paragraphs of an .html, .md or .txt file, markup removed, whitespace as it was."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".html":
        parser = ParagraphParser()
        parser.feed(text)
        return parser.paragraphs
    for pattern, replacement in MARKDOWN_RULES if path.suffix == ".md" else []:
        text = re.sub(pattern, replacement, text)
    return re.split(r"\n\s*\n", text)


def is_prose(sentence: str) -> bool:
    words = sentence.split()
    num_plain = sum(1 for word in words if PLAIN_WORD.match(word))
    return 3 <= len(words) <= 60 and num_plain >= 0.8 * len(words) and sentence[-1] in '.!?:"”)'


def lines_of(paragraph: str, seen: set[str]) -> Iterator[str]:
    """Yield what fits in 60 words of the paragraph's consecutive new sentences; add those to `seen`.

    A sentence that differs from another only in digits or punctuation is not new. No sentence is therefore
    in two lines, and a held-out line shares none with the training text.
    """
    line: list[str] = []
    for sentence in [*SENTENCE_END.split(" ".join(paragraph.split())), ""]:  # "" closes the last line
        key = re.sub(r"\w*\d\w*|\W", "", sentence.lower())
        is_new = is_prose(sentence) and key not in seen
        words = sentence.split()
        if not is_new or len(line) + len(words) > 60:
            if len(line) >= 6:
                yield " ".join(line)
            line = []
        if is_new:
            seen.add(key)
            line += words


def read_lines(sources: list[Path]) -> dict[str, str]:
    """Return the lines of prose in the given files and folders, each with the name of its source."""
    seen: set[str] = set()
    lines: dict[str, str] = {}
    for source in sources:
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            # print.html repeats a whole book; Node.js ships every page both as .html and as .md.
            if path.name == "print.html" or (path.suffix == ".md" and path.with_suffix(".html").exists()):
                continue
            if path.suffix in {".html", ".md", ".txt"}:
                for paragraph in paragraphs_of(path):
                    lines |= dict.fromkeys(lines_of(paragraph, seen), source.name)
    return lines


def line_hash(line: str) -> int:
    return int.from_bytes(hashlib.sha256(line.encode()).digest()[:8], "big")


def train_tokenizer(lines: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the lines. Like BLOOM's, it adds no BOS and pads on the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **SPECIAL_TOKENS)


def encode(tokenizer: PreTrainedTokenizerFast, line: str) -> list[int]:
    return [BOS, *tokenizer(line)["input_ids"], EOS]


def make_batches(lines: list[list[int]], rng: random.Random) -> Iterator[Tensor]:
    """Yield one epoch of (B, T) token ids, lines of similar length together, padded on the right."""
    groups: list[list[list[int]]] = [[]]
    for ids in sorted(lines, key=lambda ids: len(ids) + 4 * rng.random()):
        if (len(groups[-1]) + 1) * len(ids) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(ids)
    rng.shuffle(groups)
    for group in groups:
        longest = max(len(ids) for ids in group)
        yield torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in group])


def logits_and_targets(model: BloomForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (N, V) float32 and the targets (N,) of the positions that are not padding."""
    # Padding stands on the right, so a causal model needs no attention mask for the positions before it.
    hidden = model.transformer(ids[:, :-1], use_cache=False).last_hidden_state
    scored = ids[:, 1:] != PAD
    return model.lm_head(hidden[scored]).float(), ids[:, 1:][scored]


def loss_of(model: BloomForCausalLM, ids: Tensor, teacher: BloomForCausalLM | None) -> Tensor:
    """Return the mean cross-entropy with the text; with a teacher, half of it plus KL(teacher || model)."""
    logits, targets = logits_and_targets(model, ids)
    if teacher is None:
        return F.cross_entropy(logits, targets)
    with torch.no_grad():
        wanted = logits_and_targets(teacher, ids)[0].log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    divergence = F.kl_div(log_probs, wanted, log_target=True, reduction="batchmean")
    return divergence + 0.5 * F.nll_loss(log_probs, targets)


def train(
    model: BloomForCausalLM,
    teacher: BloomForCausalLM | None,
    lines: list[list[int]],
    minutes: float,
    autocast: bool,
    rng: random.Random,
) -> None:
    """Train for the given time: AdamW, 100 steps of warm-up, then a cosine over the wall clock to zero."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    model.train()
    for block in model.transformer.h:
        # The same function as BloomGelu in one kernel instead of a dozen: 20 % of the step's time.
        block.mlp.gelu_impl = torch.nn.GELU(approximate="tanh")
    num_tokens, recent = 0, 0.0
    start = time.monotonic()
    endless = (ids for _ in iter(int, 1) for ids in make_batches(lines, rng))
    for step, ids in enumerate(endless, start=1):
        seconds = time.monotonic() - start
        if (progress := seconds / (60 * minutes)) >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(model, ids, teacher)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        num_tokens += int((ids[:, 1:] != PAD).sum())
        recent = loss.item() if step == 1 else 0.98 * recent + 0.02 * loss.item()
        if step % 50 == 0:
            log(f"{seconds:5.0f} s  step {step}  loss {recent:.3f}  {num_tokens / seconds:,.0f} tokens/s")
    model.eval()
    log(f"{num_tokens:,} tokens in {seconds:.0f} s, {num_tokens / seconds:,.0f} tokens/s, loss {recent:.3f}")


def save(model: BloomForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, cuts: tuple) -> None:
    """Save in bfloat16 under a temporary name and rename, so that a reader never sees half a checkpoint."""
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in model.transformer.state_dict().items()}
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(len(cuts) + 1)]
    offset = 0
    for name, tensor in tensors.items():
        shards[sum(offset >= cut * total_size for cut in cuts)][name] = tensor
        offset += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors" if cuts else "model.safetensors"
        save_file(shard, partial / name, metadata={"format": "pt"})
        (partial / name).chmod(0o644)  # save_file leaves 0600
        weight_map |= dict.fromkeys(shard, name)
    if cuts:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    model.config.architectures, model.config.dtype = ["BloomForCausalLM"], torch.bfloat16
    model.config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def total_loss(model: BloomForCausalLM, ids: Tensor) -> tuple[float, int]:
    """Return the negative log-likelihood in nats of all tokens after BOS, and their number."""
    logits, targets = logits_and_targets(model, ids)
    return F.cross_entropy(logits, targets, reduction="sum").item(), len(targets)


@torch.inference_mode()
def check(out: Path, train_lines: list[str], heldout: list[str]) -> None:
    """Measure the two saved checkpoints with plain transformers in fp32 and print what they reach."""
    tokenizer = AutoTokenizer.from_pretrained(out / "tiny-bloom")
    loaded = {}
    for name in ("tiny-bloom", "tiny-bloom-draft"):
        model, info = BloomForCausalLM.from_pretrained(
            out / name, dtype=torch.float32, output_loading_info=True
        )
        assert info["missing_keys"] | info["unexpected_keys"] == set(), info
        loaded[name] = model.eval()
        size = sum(file.stat().st_size for file in (out / name).glob("*.safetensors"))
        print(f"{name}: {size:,} bytes, {sum(p.numel() for p in model.parameters()):,} parameters")
        for split, lines in (("training", random.Random(0).sample(train_lines, 1000)), ("held-out", heldout)):
            batches = make_batches([encode(tokenizer, line) for line in lines], random.Random(0))
            nats, counts = zip(*(total_loss(model, ids) for ids in batches), strict=True)
            loss = sum(nats) / sum(counts)
            print(f"  {split} loss {loss:.3f}, perplexity {math.exp(loss):.2f} ({len(lines)} lines)")
        rng, wins = random.Random(0), 0
        for line in heldout:
            words = line.split()
            shuffled = " ".join(rng.sample(words, len(words)))
            # Without </s>, which would tell a sentence's end from a shuffled word.
            real_loss, shuffled_loss = (
                total_loss(model, torch.tensor([encode(tokenizer, text)[:-1]]))[0]
                for text in (line, shuffled)
            )
            wins += real_loss < shuffled_loss
        print(f"  real line above its shuffled words: {wins} of {len(heldout)} ({wins / len(heldout):.1%})")
    same = []
    for ids in make_batches([encode(tokenizer, line) for line in heldout], random.Random(0)):
        draft_best, best = (
            logits_and_targets(loaded[n], ids)[0].argmax(-1) for n in ("tiny-bloom-draft", "tiny-bloom")
        )
        same.append(draft_best == best)
    share = torch.cat(same).float().mean().item()
    print(f"draft and model agree on the likeliest token at {share:.1%} of the held-out positions")


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="folders or files: html, md, txt")
    parser.add_argument("--out", type=Path, default=Path("weights"))
    parser.add_argument("--heldout", type=Path, default=Path("tests/data/heldout.txt"))
    parser.add_argument(
        "--minutes", type=float, default=20, help="for the model; the draft takes 0.3 as long"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autocast", action="store_true", help="bf16 products; for a CPU with bf16 units")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    lines = read_lines(args.text)
    train_lines = [line for line in lines if line_hash(line) % 50]
    candidates = [line for line in lines if line_hash(line) % 50 == 0 and 8 <= len(line.split()) <= 40]
    if len(candidates) < 300:
        parser.error(
            f"--text holds {len(lines)} lines of prose; about 25,000 are needed for 300 held-out ones"
        )
    heldout = sorted(sorted(candidates, key=line_hash)[:300])
    args.heldout.write_text("".join(f"{line}\n" for line in heldout), encoding="utf-8")
    log(f"{len(lines):,} lines, {sum(map(len, lines)):,} characters")
    num_heldout = Counter(lines[line] for line in heldout)
    for source, count in Counter(lines.values()).most_common():
        log(f"  {source}: {count} lines, {num_heldout[source]} in {args.heldout.name}")

    tokenizer = train_tokenizer(train_lines, vocab_size=4096)
    ids = [encode(tokenizer, line) for line in train_lines]
    log(f"{sum(map(len, ids)):,} training tokens, longest line {max(map(len, ids))}")
    common = {"vocab_size": len(tokenizer), "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    model = BloomForCausalLM(BloomConfig(hidden_size=160, n_layer=10, n_head=8, **common))
    draft = BloomForCausalLM(BloomConfig(hidden_size=128, n_layer=2, n_head=4, **common))
    train(model, None, ids, args.minutes, args.autocast, rng)
    save(model, tokenizer, args.out / "tiny-bloom", SHARD_CUTS)
    train(draft, model, ids, 0.3 * args.minutes, args.autocast, rng)
    save(draft, tokenizer, args.out / "tiny-bloom-draft", ())
    check(args.out, train_lines, heldout)


if __name__ == "__main__":
    main()
