"""Sequence classification on remote blocks computes and trains as plain transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from slowllm.errors import InputError, UnsupportedError
from slowllm.swarm.petals import (
    DistributedBloomForSequenceClassification,
    DistributedBloomModel,
    classification,
)
from tests.support.petals import FAMILIES, Case, ids

LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_classifier_has_the_logits_of_plain_transformers(name: str, tmp_path: Path) -> None:
    with Case(name, tmp_path) as case:
        model = case.classifier(3)
        plain: Any = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, num_labels=3, dtype=torch.float32
        )
        plain.eval().requires_grad_(False)
        plain.score.weight.copy_(model.score.weight)
        model.config.pad_token_id = plain.config.pad_token_id = 0
        tokens = ids()
        tokens[1, 5:] = 0
        mask = (tokens != 0).long()
        with torch.no_grad():
            ours = model(input_ids=tokens, attention_mask=mask, labels=LABELS)
            theirs = plain(input_ids=tokens, attention_mask=mask, labels=LABELS)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-6, rtol=1e-5)
        assert model.transformer.h(torch.zeros(1, 1, model.config.hidden_size)).shape == (
            1,
            1,
            model.config.hidden_size,
        )


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_a_classifier_with_a_prompt_learns_its_labels(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with Case("bloom", tmp_path, tuning_mode=mode, pre_seq_len=4) as case:
        model = case.classifier(3).float().to("cpu")
        assert isinstance(model, DistributedBloomForSequenceClassification)
        assert isinstance(model.transformer, DistributedBloomModel)
        model.config.pad_token_id = 3
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        model.train()
        before = [tensor.detach().clone() for tensor in model.transformer.soft_prompt().tensors]
        for _ in range(6):
            loss = model(input_ids=ids(), labels=LABELS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.3 * losses[0]
        after = model.transformer.soft_prompt().tensors
        assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        with pytest.raises(UnsupportedError, match="a streamed model stays on cpu in torch"):
            model.half()


def test_a_family_without_a_classifier_is_refused(tmp_path: Path) -> None:
    with (
        Case("xglm-scaled-embedding", tmp_path) as case,
        pytest.raises(
            InputError, match="transformers has no sequence classification for models of type xglm"
        ),
    ):
        case.classifier(2)


class WithoutScore(nn.Module):
    """A classifier of another form than those of transformers' decoders."""

    base_model_prefix = "model"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model, self.classifier = nn.Identity(), nn.Linear(2, config.num_labels)


def test_a_classifier_of_another_form_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Case("llama-2", tmp_path) as case:
        classes = {type(case.swarm.lm.config): WithoutScore}
        monkeypatch.setattr(classification, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", classes)
        with pytest.raises(InputError, match="WithoutScore: has no score behind a base model"):
            case.classifier(2)
