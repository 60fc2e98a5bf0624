"""Files that `score`, `yesno` and `eval` read, and the likelihoods that plain transformers gives."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from tests.support.families import resident
from tests.support.paths import TINY_BLOOM

# In fp32 a product of another shape sums in another order; these log-likelihoods are tens of nats.
TOLERANCE = 1e-4
BOOLQ = [
    {"question": "is the value returned", "passage": "The value is returned.", "answer": True, "title": "t"},
    {"question": "is the heap cold", "passage": "The heap holds memory on the right.", "answer": False, "title": "t"},
    {"question": "does the compiler check", "passage": "The compiler checks every reference.", "answer": True, "title": "t"},
]  # fmt: skip
TEMPLATES = """\
dataset: mine
templates:
  a: !Template
    answer_choices: no ||| yes
    id: a
    jinja: "{{ passage }} {{ question }}? ||| {{ answer_choices[label] }}"
    metadata: !TemplateMetadata {original_task: true, choices_in_prompt: null, metrics: [Accuracy], languages: [en]}
    name: plain
    reference: ''
  b: !Template
    answer_choices: not at all ||| yes
    id: b
    jinja: "{{ question }}? ||| {% if answer %}yes{% else %}not at all{% endif %}"
    metadata: !TemplateMetadata {}
    name: longer
    reference: ''
"""


def save(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSON lines, texts as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def printed(capsys: Any) -> list[Any]:
    """Return the JSON lines on stdout."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def likelihood(context: str, continuation: str) -> float:
    """Return the log-likelihood that plain transformers gives, the first token after BOS."""
    tokenizer, model = plain()
    before = tokenizer(context)["input_ids"] or [1]
    whole = (before if not context else []) + tokenizer(context + continuation)["input_ids"]
    logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, whole[place]]) for place in range(len(before), len(whole)))


@functools.cache
def plain() -> tuple[Any, Any]:
    """Return the embedded model's tokenizer, and transformers' own model in memory."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(TINY_BLOOM), resident(TINY_BLOOM)


def softmax(scores: list[float]) -> list[float]:
    """Return probabilities in float64."""
    return torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
