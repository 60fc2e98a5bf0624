"""Every architecture of transformers' causal language models is streamed bit for bit, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.census import ARCHITECTURES, HEADINGS, TABLE, judge, rows

# Of each kind of block and of each verdict that `test_families` does not have; the whole takes minutes.
SAMPLE = ("apertus", "bart", "bert", "cpmant", "gemma3", "hrm_text", "jamba", "musicgen", "openai-gpt", "xlm")


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in SAMPLE else [pytest.mark.long]) for name in ARCHITECTURES],
)
def test_an_architecture_is_streamed_bit_for_bit_or_refused_as_the_table_says(
    architecture: str, tmp_path: Path
) -> None:
    verdict = judge(architecture, tmp_path)
    assert verdict.kind != "different", verdict.reason
    assert verdict == rows(TABLE.read_text())[architecture]


def test_the_table_lists_every_architecture_once_and_counts_them() -> None:
    text = TABLE.read_text()
    listed = rows(text)
    assert sorted(listed) == ARCHITECTURES
    for kind, heading in HEADINGS.items():
        names = [name for name, verdict in listed.items() if verdict.kind == kind]
        assert names == sorted(names)
        assert f"## {heading} ({len(names)})\n" in text
    # What can be neither tried nor refused by name says nothing of slowllm; too many of them would hide it.
    assert sum(verdict.kind == "equal" for verdict in listed.values()) >= 170
