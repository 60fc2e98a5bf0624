"""`slowllm hidden`: write hidden states behind chosen blocks, for probes, embeddings and calibration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from slowllm.entrypoints.cli import inputs, into_shards, options
from slowllm.entrypoints.cli.runner import Runner
from slowllm.errors import InputError

if TYPE_CHECKING:
    from slowllm.inference.hidden import Pool
    from slowllm.inference.text_batches import TextPasses
    from slowllm.runtime.state import State
    from slowllm.runtime.streamed_lm import StreamedLM


def hidden(
    files: into_shards.Files = None,
    text: inputs.Texts = None,
    model: options.Model = None,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    dtype: options.DType = "auto",
    blocks: Annotated[
        str | None,
        typer.Option(
            help="Numbers of the blocks, from 0, behind which hidden states are kept, such as 10,20.",
            metavar="N,N,...",
            show_default=False,
        ),
    ] = None,
    pool: Annotated[
        str,
        typer.Option(
            help="Keep the hidden state of a text's last token, the mean over its tokens, or all.",
            metavar="last|mean|all",
        ),
    ] = "last",
    out: into_shards.OutFolder = None,
    format: into_shards.ShardFormat = "parquet",
    column: into_shards.Column = "text",
    prefix: into_shards.Prefix = True,
    max_tokens: into_shards.MaxTokens = None,
    truncate: into_shards.Truncate = False,
    resident: options.Resident = True,
    exact: options.Exact = True,
    dry_run: options.DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print the plan as JSON.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Write the hidden states of texts behind chosen blocks.

    A row of the shards has a text's file, line, text and input_ids, and hidden_N for each block N: what transformers
    returns as output_hidden_states[N + 1]. Blocks behind the last chosen one are not read. After a kill, the same
    command goes on, and writes the same bytes.

    Example: slowllm hidden texts.txt --model ./Llama-3.1-70B --blocks 10,20 --pool mean --out states
    """
    options.log_to_stderr(verbose)
    where = into_shards.shard_job(files, text, column, out, format)
    if blocks is None:
        raise InputError("name the blocks with --blocks, such as 10,20")
    if pool not in ("last", "mean", "all"):
        raise InputError(f"--pool {pool!r} is unknown; use last, mean or all")
    runner = Runner(
        model,
        ram,
        device,
        vram,
        dtype,
        resident=resident,
        state=where.state,
        kind="hidden",
        dry_run=dry_run,
        exact=exact,
    )
    where.check()
    runner.load_libraries()
    from slowllm.inference.hidden import (
        describe,
        job_of,
        parse_block_numbers,
        part_of_blocks,
        pass_hidden,
        tensor_names,
    )

    config = runner.info.config.get_text_config()
    num_blocks = int(config.num_hidden_layers)
    numbers = parse_block_numbers(blocks, num_blocks)
    how = cast("Pool", pool)
    runner.part = part_of_blocks(numbers, num_blocks)
    with where.texts(runner, prefix, max_tokens, truncate) as texts:
        job = job_of(texts, len(numbers), int(config.hidden_size), how, runner.rates, runner.begun)
        if dry_run:
            where.print_plan(runner, job, as_json=as_json)
            return

        def about(lm: StreamedLM) -> dict[str, Any]:
            return describe(lm, texts, blocks=list(numbers), pool=pool, format=format)

        def passes(lm: StreamedLM, state: State | None, num_done: int) -> TextPasses:
            return pass_hidden(lm, texts, numbers, how, state=state, num_done=num_done)

        grows = ("input_ids", *(tensor_names(numbers) if pool == "all" else ()))
        # The activations of riders under way are not saved: what blocks have returned on the way would be missing.
        into_shards.write_shards(runner, job, where, texts, grows, about, passes, math.inf)
