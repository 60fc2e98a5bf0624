"""`slowllm teach`: write the likeliest tokens of every place of texts, from which a student is distilled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli import inputs, into_shards, options
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.swarm_options import SwarmChoice, takes_swarm

if TYPE_CHECKING:
    from slowllm.inference.text_batches import TextPasses
    from slowllm.runtime.state import State
    from slowllm.runtime.streamed_lm import StreamedLM


@takes_swarm
def teach(
    files: into_shards.Files = None,
    text: inputs.Texts = None,
    model: options.Model = None,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    dtype: options.DType = "auto",
    top: Annotated[
        int, typer.Option(help="Number of the likeliest tokens that are kept of every place.")
    ] = 64,
    out: into_shards.OutFolder = None,
    format: into_shards.ShardFormat = "parquet",
    column: into_shards.Column = "text",
    prefix: into_shards.Prefix = True,
    max_tokens: into_shards.MaxTokens = None,
    truncate: into_shards.Truncate = False,
    resident: options.Resident = True,
    swarm: SwarmChoice = SwarmChoice(),  # noqa: B008 (frozen)
    save_every: into_shards.SaveEvery = 30.0,
    exact: options.Exact = True,
    dry_run: options.DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print the plan as JSON.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Write the likeliest tokens of each place of texts, for a student.

    A row of the shards has a text's file, line, text and input_ids; and for every token but the first its log_probs,
    and the top_ids and top_log_probs of its place, from the likeliest on. Parquet is what `datasets` loads. After a kill,
    the same command goes on, and writes the same bytes.

    Example: slowllm teach texts.txt --model ./Llama-3.1-70B --top 64 --out teacher
    """
    options.log_to_stderr(verbose)
    where = into_shards.shard_job(files, text, column, out, format)
    runner = Runner(
        model,
        ram,
        device,
        vram,
        dtype,
        resident=resident,
        swarm=swarm,
        state=where.state,
        kind="teach",
        dry_run=dry_run,
        exact=exact,
    )
    where.check()
    runner.load_libraries()
    from slowllm.inference.teach import TENSORS, check_num_top, describe, job_of, top_tokens

    check_num_top(top, runner.info.config.get_text_config().vocab_size)
    with where.texts(runner, prefix, max_tokens, truncate) as texts:
        job = job_of(texts, top, runner.rates, runner.begun)
        if dry_run:
            where.print_plan(runner, job, as_json=as_json)
            return

        def about(lm: StreamedLM) -> dict[str, Any]:
            return describe(lm, texts, top=top, format=format)

        def passes(lm: StreamedLM, state: State | None, num_done: int) -> TextPasses:
            return top_tokens(lm, texts, top, state=state, num_done=num_done)

        into_shards.write_shards(runner, job, where, texts, TENSORS, about, passes, save_every)
