"""`slowllm chat`: talk with a model in the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.left_aside import name_settings_left_aside
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.swarm_options import SwarmChoice, takes_swarm
from slowllm.errors import InputError
from slowllm.planning.job import Job
from slowllm.runtime.model_folder import DEFAULT, find_folder

TOY = (
    "This is the embedded toy model, trained on sentences of reference manuals: it finishes such sentences, answers no "
    "questions, and often ends at once. Name another with --model."
)


@takes_swarm
def chat(
    model: options.Model = None,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    dtype: options.DType = "auto",
    system: Annotated[
        str | None, typer.Option("--system", help="System message before the conversation.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens of an answer.", min=1)
    ] = 128,
    context: Annotated[
        int,
        typer.Option(
            help="Maximum number of tokens of the conversation with the next answer; memory is planned for them.",
            min=2,
        ),
    ] = 1024,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 takes the most likely token.", min=0.0)
    ] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(help="Sample from the most likely tokens that have this share of the probability.", max=1.0),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Sample from this many most likely tokens; 0 for all.", min=0)
    ] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Penalty on tokens that occurred before; 1 for none.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first answer; later answers count up from it.", min=0)
    ] = None,
    resident: options.Resident = True,
    swarm: SwarmChoice = SwarmChoice(),  # noqa: B008 (frozen)
    exact: options.Exact = True,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Talk with a model in the terminal.

    Each token of an answer takes a sweep. The expected time of a token is shown before the first question. /help lists
    the commands. Ctrl-C stops an answer, and what has come of it stays in the conversation; Ctrl-D exits. A model whose
    tokenizer has no chat template continues a plain transcript.
    """
    options.log_to_stderr(verbose)
    runner = Runner(model, ram, device, vram, dtype, resident=resident, swarm=swarm, exact=exact)
    runner.load_libraries()
    from slowllm.entrypoints.cli.chat_loop import converse
    from slowllm.entrypoints.conversation import Conversation
    from slowllm.inference.generation import row_of
    from slowllm.inference.generation_types import Settings
    from slowllm.inference.text import max_line_tokens

    info = runner.info
    sampling: dict[str, Any] = {}
    if temperature:
        sampling = {
            "do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed,
        }  # fmt: skip
    settings = Settings(max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty, **sampling)
    context = min(context, max_line_tokens(info))
    conversation = Conversation(info.tokenizer, system)
    if system is not None and len(info.tokenizer(system, verbose=False)["input_ids"]) >= context:
        raise InputError(f"--system alone takes all {context} tokens of the conversation")
    job = Job(
        num_tokens=context, longest=context, repeated=True, forward_only=True, keeps_results=False,
        num_passes=min(settings.max_new_tokens, context), rows=((row_of(1, settings), 1),),
    )  # fmt: skip
    name_settings_left_aside(runner.info)
    with runner.open(job) as lm:
        if info.folder == find_folder(DEFAULT):
            print(TOY)
        converse(lm, conversation, settings, context=context, rates=runner.rates)
