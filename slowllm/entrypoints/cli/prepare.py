"""`slowllm download`, `convert` and `verify`: get a checkpoint, make a store of it, and check either."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.output import STDOUT
from slowllm.errors import InputError, counted


def convert(
    model: Annotated[
        str, typer.Argument(help="Folder of a checkpoint, or hub id of a model in the local cache.")
    ],
    out: Annotated[Path, typer.Argument(help="New or empty folder for the store.")],
    store: Annotated[
        str,
        typer.Option(
            "--store",
            help="How the matrices of blocks are stored, in bits a weight: bf16 (16), lossless (about 12), int8 (8) or int4 "
            "(about 4.5).",
            metavar="bf16|lossless|int8|int4",
        ),
    ],
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            help="Number of processes that encode, each of which takes a few times 16 MiB.",
            show_default="one for each 2 GiB of weights, at most one for each core",
        ),
    ] = None,
    rank: Annotated[
        int,
        typer.Option(
            "--rank", help="Which of the --world-size shares of the files this run writes, counted from 0."
        ),
    ] = 0,
    world_size: Annotated[
        int,
        typer.Option(
            "--world-size",
            help="Number of shares that the files are divided into, each written by a run of its own on the same disk.",
        ),
    ] = 1,
    requantise: Annotated[
        bool,
        typer.Option(
            "--requantise",
            help="Round the matrices of blocks again that the checkpoint has quantised; by default they are kept as they are.",
        ),
    ] = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a store: a copy of a checkpoint with fewer bytes to stream.

    lossless: about 12 bits a weight, decoded to the bits of a bfloat16 checkpoint, so the answers are the same.

    int8: half the bytes (LLM.int8(): 8-bit products, outliers in 16 bits).

    int4: about 0.28 of the bytes (64 weights share a scale and an offset).

    bf16: not quantised, one file a block; other dtypes are rounded.

    Matrices that the checkpoint has quantised (float8, mxfp4, GPTQ, AWQ, bitsandbytes, GGUF and others) are kept byte for
    byte, unless --requantise rounds them a second time. A GGUF file becomes a folder with a config and a tokenizer.

    Embeddings, norms, routers and the head are not quantised. All verbs take a store where they take a model. What is
    written is read back and compared. After an interrupt, a crash or a full disk, the same command resumes where it
    stopped. The checkpoint is not changed. It may also consist of pytorch_model*.bin files, which are read without
    running the code that a pickle may contain.
    """
    options.log_to_stderr(verbose)
    from slowllm.options import format_bytes
    from slowllm.runtime.model_folder import find_folder

    _refuse_stdout(out)
    folder = find_folder(model)
    from slowllm.storage.manifest import STORES

    if store not in STORES:
        raise InputError(f"--store {store!r} is unknown; use one of {', '.join(STORES)}")
    import transformers

    transformers.logging.set_verbosity_error()
    from slowllm.entrypoints.progress import byte_progress, duration
    from slowllm.prepare.convert import convert as make
    from slowllm.prepare.workers import Progress

    started = time.perf_counter()
    with byte_progress(f"{store} store") as tell:

        def on_progress(progress: Progress) -> None:
            if progress.is_start:
                print(
                    f"{store} store: {counted(progress.num_files, 'file')} from {format_bytes(progress.source_bytes)}, about "
                    f"{format_bytes(progress.estimated_bytes)} to write",
                    file=sys.stderr,
                )
            tell(progress.done_bytes, progress.source_bytes)

        try:
            done = make(
                folder, out, store=store, workers=workers, rank=rank, world_size=world_size,
                name=None if folder.name == Path(model).name else model, requantise=requantise, on_progress=on_progress,
            )  # fmt: skip
        except KeyboardInterrupt:
            print("slowllm: interrupted; the same command goes on where it stopped", file=sys.stderr)
            raise
    seconds = time.perf_counter() - started
    if done.manifest is None:
        print(
            f"share {rank} of {world_size} is done in {duration(seconds)}; the store is finished when all are",
            file=sys.stderr,
        )
    elif done.was_there:
        print(f"the {store} store of {done.manifest.source_name} is finished already", file=sys.stderr)
    else:
        print(
            f"{store} store of {done.manifest.source_name}: {format_bytes(done.num_bytes)} from "
            f"{format_bytes(done.source_bytes)} in {duration(seconds)}, read back and compared",
            file=sys.stderr,
        )
    for sentence in _about_quantised(store, done.num_kept, done.num_requantised):
        print(sentence, file=sys.stderr)
    typer.echo(done.folder)


def _about_quantised(store: str, num_kept: int, num_requantised: int) -> Iterator[str]:
    """Yield what became of matrices that were quantised already."""
    if num_requantised:
        yield f"{counted(num_requantised, 'quantised matrix', 'quantised matrices')}: rounded a second time, to {store}"
    if num_kept:
        again = (
            "" if num_requantised or store == "lossless" else "; --requantise rounds those of blocks again"
        )
        yield f"{counted(num_kept, 'quantised matrix', 'quantised matrices')}: kept as the checkpoint has them{again}"


def verify(
    model: Annotated[
        str,
        typer.Argument(help="Folder of a store, or hub id or snapshot of a model in the hub's local cache."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a sentence.")] = False,
) -> None:
    """Check the files of a store or of a cached model by their hashes.

    Reads every byte of a store, or of a model in the hub's local cache.
    """
    from slowllm.options import format_bytes
    from slowllm.runtime.model_folder import find_folder

    folder = find_folder(model)
    from slowllm.entrypoints.progress import byte_progress
    from slowllm.prepare.verify import verify as check

    with byte_progress("reading") as tell:
        checked = check(folder, tell)
    if as_json:
        document = {"folder": str(folder), "num_files": checked.num_files, "num_bytes": checked.num_bytes}
        typer.echo(json.dumps(document))
    else:
        size = format_bytes(checked.num_bytes)
        typer.echo(f"{folder}: {counted(checked.num_files, 'file')}, {size}, all as they should be")


def download(
    repo: Annotated[str, typer.Argument(help="Hub id of a model, such as bigscience/bloom.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit to fetch.")] = "main",
    to: Annotated[
        Path | None,
        typer.Option(help="Folder to write the files to.", show_default="the Hugging Face cache"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the SHA-256 of LFS files with the hub's.")
    ] = True,
    blocks: Annotated[
        str | None,
        typer.Option(
            help="Fetch only the shards that have tensors of the blocks A to B - 1, counted from 0.",
            metavar="A:B",
            show_default="all blocks",
        ),
    ] = None,
    ends: Annotated[
        bool,
        typer.Option(
            "--ends",
            help="Fetch only the shards that have tensors outside the blocks: embedding, norms, head. With --blocks, both.",
        ),
    ] = False,
    gguf: Annotated[
        str | None,
        typer.Option(
            "--gguf",
            help="Fetch this GGUF file, of a set any, and those that belong to it.",
            metavar="FILE",
            show_default="the only GGUF model, where there are no safetensors",
        ),
    ] = None,
) -> None:
    """Fetch the files of a model on the hub that streaming needs.

    Prints their folder. Fetches the safetensors, the tokenizer and the configs, but no pickles and no other copies of
    the weights. The free space is checked first. After an interrupt, a crash or a lost connection, the same command
    resumes where it stopped. File sizes are always compared with the hub's. Afterwards `slowllm forward --model REPO`
    finds the model in the cache; with --to, or with a --revision other than main, give it the folder that is printed.
    Of a GGUF model the file is printed, which is given as the model.

    For gated models, log in with `hf auth login` or set HF_TOKEN.
    """
    _refuse_stdout(to)
    from slowllm.prepare.download import download as fetch

    if blocks is not None or ends:
        import transformers

        transformers.logging.set_verbosity_error()
    typer.echo(fetch(repo, revision=revision, to=to, verify=verify, blocks=blocks, ends=ends, gguf=gguf))


def _refuse_stdout(folder: Path | None) -> None:
    """Refuse the name by which other verbs mean standard output."""
    if folder == STDOUT:
        raise InputError("- is standard output and no folder; name a folder")
