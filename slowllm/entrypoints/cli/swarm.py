"""`slowllm swarm`: see what a swarm serves, who is in it, and who can be reached."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.log_format import log_as_others
from slowllm.entrypoints.cli.output import printable
from slowllm.entrypoints.cli.verb import add_verb
from slowllm.errors import InputError, counted

if TYPE_CHECKING:
    from slowllm.swarm.network import Network
    from slowllm.swarm.overview import ModelView, ServerView

swarm_app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="See what a swarm serves, and who is in it."
)
_WHY_LETTERS = 60


@swarm_app.callback()
def _swarm() -> None:
    """See what a swarm serves, and who is in it."""


def status(
    initial_peers: options.InitialPeers = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Folder or hub id of a model whose servers are shown; it needs only its config.json.",
            show_default="all models that servers have named",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
    token_file: options.TokenFile = None,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Show the models of a swarm: which blocks are served, how often, by whom, and who can be reached.

    Joins as a client that listens nowhere, asks each server for its status, and lets another server dial it. Servers of one
    block whose weights differ are named.
    """
    options.log_to_stderr(verbose)
    if not initial_peers:
        raise InputError(
            "name a peer of the swarm with --initial-peers, as `slowllm dht` or `slowllm serve` prints it"
        )
    from slowllm.swarm.network import Network
    from slowllm.swarm.shared_token import read_token

    log_as_others()

    token = None if token_file is None else read_token(token_file.expanduser())
    with Network.open(host_maddrs=(), initial_peers=initial_peers, token=token) as network:
        views = _views(network, model)
    if as_json:
        print(json.dumps({"models": [view.to_json() for view in views]}))
        return
    if not views:
        print("no server of this swarm has named a model")
    for view in views:
        _print(view)


add_verb(
    swarm_app,
    status,
    "slowllm swarm status --initial-peers /ip4/203.0.113.7/tcp/31330/p2p/QmW11AesEZBsQMwuZYzujBuqVfbUKMvUJgX9icaKqEhcT7",
)


def _views(network: Network, model: str | None) -> list[ModelView]:
    from slowllm.swarm.overview import look

    if model is None:
        return [look(network, entry.model, entry.kind, entry.num_blocks) for entry in network.models()]
    from slowllm.runtime.description import ModelInfo
    from slowllm.swarm.client import config_key

    config = ModelInfo(model).config
    num_blocks = int(config.get_text_config().num_hidden_layers)
    return [look(network, config_key(config), str(config.model_type), num_blocks)]


def _print(view: ModelView) -> None:
    """Print a model's table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    print(f"{view.kind} of {counted(view.num_blocks, 'block')}, {view.model}")
    served = ", ".join(f"{first}:{end} by {n}" for first, end, n in view.coverage if n)
    print(f"  served: {served or 'nothing'}")
    if view.missing:
        print(f"  missing: {', '.join(f'{first}:{end}' for first, end in view.missing)}")
    if view.weights:
        more = f"; other sets of blocks: {', '.join(view.weights[1:])}" if len(view.weights) > 1 else ""
        print(f"  weights: {view.weights[0]}{more}")
    for server in view.servers:
        if server.odd_blocks:
            spans = ", ".join(f"{first}:{end}" for first, end in server.odd_blocks)
            print(f"  {printable(server.record.label)} has other weights than most in blocks {spans}")
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    numbers = ("tokens/s", "cache left", "sessions")
    for name in ("server", "blocks", "state", "version", "dtype", "hash", *numbers, "reached", "by others"):
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for server in view.servers:
        table.add_row(*(Text(printable(cell)) for cell in _cells(server)))
    # A file or a pipe has no width; a table that is cut to 80 columns could not be searched.
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(table)


def _cells(server: ServerView) -> list[str]:
    from slowllm.swarm.overview import SHORT_LETTERS
    from slowllm.swarm.weights import weights_hash

    record, answer = server.record, server.answer
    found = answer.status
    free = record.cache_tokens_free if found is None else found.cache_tokens_free
    reached = f"{1000 * answer.seconds:.0f} ms" if found is not None else f"no: {answer.why}"[:_WHY_LETTERS]
    others = {None: "not known", True: f"by {answer.asked}", False: f"not by {answer.asked}"}[
        answer.reached_by
    ]
    return [
        record.label, f"{record.first}:{record.end}", record.state, record.version, record.dtype,
        weights_hash(record.block_hashes)[:SHORT_LETTERS] if record.block_hashes else "-",
        f"{record.forward_tokens_per_second:,.0f}", f"{free:,}", "-" if found is None else str(found.num_sessions),
        reached, others,
    ]  # fmt: skip
