"""What a server opens for its blocks, and what it says of them: room for sessions in bytes, and its rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from slowllm.entrypoints.cli.app import app
from slowllm.errors import InputError
from slowllm.modeling.parts import Part
from slowllm.options import parse_bytes
from slowllm.runtime.description import ModelInfo
from slowllm.swarm.opened_span import OpenedSpan, measured, with_cache_tokens
from slowllm.swarm.server_options import ServerOptions, parse_throughput
from tests.support.command_line import refused
from tests.support.parted import parted, shard_of
from tests.support.served import save_model

GIVEN: dict[str, Any] = {"ram": "3GiB", "dtype": "float32", "max_batch_tokens": 64}


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    return ModelInfo(save_model(tmp_path_factory.mktemp("model")))


def token_bytes(info: ModelInfo, num_blocks: int) -> int:
    config = info.config
    return (
        num_blocks * 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 4
    )


def test_bytes_of_a_cache_are_as_many_tokens_as_they_hold_in_these_blocks(info: ModelInfo) -> None:
    for num_blocks in (1, 4):
        num_bytes = 100 * token_bytes(info, num_blocks) + 5
        options = ServerOptions(f"1:{1 + num_blocks}", cache_bytes=num_bytes, **GIVEN)
        found = with_cache_tokens(info, options, Part.span(1, 1 + num_blocks))
        assert (found.cache_tokens, found.cache_bytes) == (100, None)
    assert measured(info, options).cache_tokens == 100


def test_bytes_that_hold_no_token_are_refused(info: ModelInfo) -> None:
    with pytest.raises(
        InputError, match=r"--attn-cache-size 100B holds no token: .* 1,024 bytes in blocks 0 to 1"
    ):
        with_cache_tokens(info, ServerOptions("0:2", cache_bytes=100, **GIVEN), Part.span(0, 2))
    with pytest.raises(
        InputError, match=r"--blocks auto takes .* give --attn-cache-tokens in place of --attn-cache-size"
    ):
        ServerOptions("auto", cache_bytes=100)


def test_a_rate_is_announced_in_place_of_the_measured_one(info: ModelInfo) -> None:
    record = measured(info, ServerOptions("0:2", **GIVEN))
    assert record.forward_tokens_per_second > 0
    assert record.decode_seconds > 0
    options = ServerOptions("0:2", tokens_per_second=5.0, **GIVEN)
    with OpenedSpan(info, options, Part.span(0, 2), record) as opened:
        assert opened.record.forward_tokens_per_second == 5.0
        # The server itself goes by what it has measured.
        assert opened.spans.block_seconds < opened.record.decode_seconds


def test_blocks_are_measured_that_are_here(info: ModelInfo, tmp_path: Path) -> None:
    folder = parted(info.folder, tmp_path, shard_of(1), shard_of(3), shard_of(4))
    record = measured(ModelInfo(folder), ServerOptions("2", **GIVEN))
    assert (record.first, record.end) == (3, 5)
    with pytest.raises(InputError, match="has no 3 blocks in a row"):
        measured(ModelInfo(folder), ServerOptions("3", **GIVEN))


@pytest.mark.parametrize("text", ["fast", "-1", "0", "inf", "nan"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--throughput is auto, eval, dry_run or tokens a second, not"):
        parse_throughput(text)
    with pytest.raises(InputError, match="cannot compute -1 tokens a second"):
        ServerOptions("0:1", tokens_per_second=-1)


def test_words_mean_that_the_rate_is_measured() -> None:
    assert [parse_throughput(text) for text in ("auto", "eval", "dry_run", "2.5")] == [0, 0, 0, 2.5]
    assert parse_bytes("1.0 GiB") == 1 << 30


def test_the_command_line_prints_the_rates_and_ends(info: ModelInfo) -> None:
    arguments = "--num_blocks 2 --attn_cache_size 64KiB --throughput dry_run --ram 3GiB --dtype fp32 --max_batch_size 64"
    from slowllm.entrypoints.cli.petals_flags import from_petals

    translated, _ = from_petals(["serve", str(info.folder), *arguments.split()])
    result = CliRunner().invoke(app, translated)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["blocks"], said["dtype"], said["cache_tokens"]) == ("0:2", "float32", 64)
    assert said["forward_tokens_per_second"] > 0


def test_a_cache_in_tokens_and_in_bytes_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    arguments = ["serve", "m", "--blocks", "2", "--attn-cache-tokens", "4", "--attn-cache-size", "1GiB"]
    assert "--attn-cache-tokens and --attn-cache-size both say" in refused(arguments, monkeypatch, capsys)
