"""`slowllm serve`: compute a span of a model's blocks for a swarm."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.defaults import GIVEN_FILE, given_of
from slowllm.entrypoints.cli.log_format import log_as_others, write_line
from slowllm.entrypoints.cli.told_to_end import END, has_been_told_to_end, may_end_while_starting
from slowllm.errors import InputError, counted, first_line
from slowllm.options import parse_bytes

if TYPE_CHECKING:
    from slowllm.swarm.server_options import ServerOptions

# Between looks whether the sessions of a server that leaves have ended, or whether one that moved has failed.
_LOOK_SECONDS = 0.2


def _read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Take the options of a file as defaults, so that those of the command line win."""
    if file is None:
        return None
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{file}: cannot be read as TOML ({first_line(error)})") from error
    known = {parameter.name: parameter for parameter in context.command.params}
    defaults: dict[str, Any] = {}
    for name, value in table.items():
        parameter = known.get(name.replace("-", "_"))
        if parameter is None or parameter.name in ("config", "model"):
            names = ", ".join(
                sorted(str(other).replace("_", "-") for other in known if other not in ("config", "model"))
            )
            raise InputError(f"{file}: {name!r} is no option of serve; there are {names}")
        if isinstance(value, dict) or (isinstance(value, list) and not parameter.multiple):
            raise InputError(f"{file}: {name} takes one value")
        if parameter.multiple:
            texts = value if isinstance(value, list) else [value]
            if not all(isinstance(text, str) for text in texts):
                raise InputError(f"{file}: {name} takes a text, or a list of texts")
            defaults[str(parameter.name)] = texts
        else:
            defaults[str(parameter.name)] = value
    given_of(context).lay(GIVEN_FILE, str(file), defaults)
    return file


def serve(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of the model, or a store; it needs only the shards of its blocks.")
    ],
    blocks: Annotated[
        str,
        typer.Option(
            "--blocks",
            help="Blocks to serve: A:B for those from A to B - 1; or how many, of which the swarm then gets those that it "
            "lacks most; or auto, as many as stay in memory.",
            metavar="A:B|N|auto",
        ),
    ],
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    resident: options.Resident = True,
    dtype: options.DType = "auto",
    attn_cache_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that the sessions of all clients hold together.", min=0, show_default="4096"),
    ] = None,
    attn_cache_size: Annotated[
        str | None,
        typer.Option(
            help="The same in bytes: of the keys and values of all sessions, in the blocks that are served.", metavar="SIZE",
            show_default="that of the tokens",
        ),
    ] = None,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens of one request.", min=1)] = 2048,
    max_length: Annotated[
        int, typer.Option(help="Tokens of one sequence, with what its session holds.", min=1)
    ] = 2048,
    max_waiting_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of all requests that are under way or wait; more are refused.", min=1, show_default="four requests"
        ),
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward/--forward-only", help="Compute gradients as well, which takes more memory.")
    ] = True,
    compression: Annotated[
        str,
        typer.Option(
            help="How hidden states and gradients are sent: as they are, or in fewer bytes with rounding; int8 has a scale for "
            "each position.",
            metavar="none|bfloat16|float16|int8",
        ),
    ] = "none",
    rebalance: Annotated[
        bool,
        typer.Option(
            "--rebalance/--no-rebalance",
            help="Move to other blocks where the swarm gains much by that and nobody uses the server; only where --blocks does "
            "not say which.",
        ),
    ] = True,
    throughput: Annotated[
        str,
        typer.Option(
            help="Tokens a second that are announced, by which clients choose: auto and eval measure at each start; a number is "
            "announced as it is; dry_run prints what was measured as JSON and ends, without a swarm.",
            metavar="auto|eval|dry_run|NUMBER",
        ),
    ] = "auto",
    session_timeout: Annotated[
        float, typer.Option(help="Seconds after which a session that is not used ends.", min=1.0)
    ] = 600.0,
    drain: Annotated[
        float, typer.Option(help="Seconds that sessions get to end after SIGTERM or Ctrl-C.", min=0.0)
    ] = 0.0,
    public_name: Annotated[str, typer.Option(help="Name that others see beside the peer's id.")] = "",
    token_file: options.TokenFile = None,
    allow_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-keys", help="Id of a peer that is served; others are refused; may be given several times.", metavar="ID",
            show_default="all peers",
        ),
    ] = None,
    peer_sessions: Annotated[
        int, typer.Option(help="Sessions that one peer may have open.", min=1)
    ] = 128,
    peer_requests: Annotated[
        int, typer.Option(help="Requests that one peer may have under way.", min=1)
    ] = 48,
    peer_cache_share: Annotated[
        float, typer.Option(help="Share of the cache that one peer may hold while others want room.", min=0.0, max=1.0)
    ] = 0.5,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics", help="Answer GET /metrics at this address, in Prometheus's text format; to whoever reaches it.",
            metavar="HOST:PORT",
        ),
    ] = None,
    identity: options.Identity = None,
    host_maddrs: options.HostMaddrs = None,
    announce_maddrs: options.AnnounceMaddrs = None,
    initial_peers: options.InitialPeers = None,
    relay: options.Relay = True,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="TOML file of these options, by their names; the command line's win.", is_eager=True,
            callback=_read_config,
        ),
    ] = None,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Compute a span of a model's blocks for the clients of a swarm.

    Prints the multiaddresses by which clients and other servers join, one a line, when it serves. The span's blocks stay in
    memory as far as the budget allows, and the others stream; requests of several clients share the sweeps. Memory for
    sessions and requests is planned before the start. Ends at Ctrl-C or SIGTERM. Anybody who can reach the addresses can use
    the server.
    """
    options.log_to_stderr(verbose)
    # Before anything large is imported: what cannot be right is refused at once.
    from slowllm.swarm.metrics_http import parse_host_port, serving_metrics
    from slowllm.swarm.quotas import PeerQuotas
    from slowllm.swarm.server_options import ServerOptions, parse_throughput

    if attn_cache_tokens is not None and attn_cache_size is not None:
        raise InputError(
            "--attn-cache-tokens and --attn-cache-size both say how much sessions hold; give one of them"
        )
    if not math.isfinite(drain):
        raise InputError(f"--drain {drain:g}: sessions cannot get that long; give a number of seconds")
    if metrics is not None:
        parse_host_port(metrics)
    options.check_identity(identity)
    chosen = ServerOptions(
        blocks, ram=ram, dtype=dtype, device=device, vram=vram, cache_tokens=4096 if attn_cache_tokens is None else attn_cache_tokens,
        cache_bytes=None if attn_cache_size is None else parse_bytes(attn_cache_size),
        tokens_per_second=parse_throughput(throughput),
        max_batch_tokens=max_batch_tokens, max_length=max_length, max_waiting_tokens=max_waiting_tokens,
        backward=backward, compression=compression, name=public_name, session_seconds=session_timeout,
        identity=None if identity is None else identity.expanduser(),
        host_maddrs=tuple(host_maddrs or [options.ANY_ADDRESS]), announce_maddrs=tuple(announce_maddrs or []),
        initial_peers=tuple(initial_peers or []), use_relay=relay, keep_resident=resident,
        token_file=None if token_file is None else token_file.expanduser(), allowed=tuple(allow_keys or ()),
        quotas=PeerQuotas(peer_sessions, peer_requests, peer_cache_share), rebalances=rebalance,
    )  # fmt: skip
    if throughput == "dry_run":
        _print_measured(model, chosen)
        return
    # Blocked before any thread begins, so that none of them is interrupted, and waited for below.
    signal.pthread_sigmask(signal.SIG_BLOCK, END)
    try:
        from slowllm.swarm.metrics import CONTENT_TYPE
        from slowllm.swarm.server import Server

        log_as_others()
        with contextlib.ExitStack() as held:
            with may_end_while_starting():
                server = held.enter_context(Server(model, chosen))
            if metrics is not None:
                url = held.enter_context(serving_metrics(metrics, CONTENT_TYPE, server.metrics))
                write_line(f"metrics at {url}")
            for address in server.network.addresses:
                print(address, flush=True)
            write_line(_described(server))
            while not has_been_told_to_end(_LOOK_SECONDS):
                server.check()
            if drain and server.is_in_use:
                server.drain()
                write_line(
                    f"leaving when the sessions have ended or moved, in {drain:g} s, or at the next signal"
                )
                deadline = time.monotonic() + drain
                while server.is_in_use and (left := deadline - time.monotonic()) > 0:
                    if has_been_told_to_end(min(left, _LOOK_SECONDS)):
                        break
        write_line("left the swarm")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END)


def _print_measured(model: str, chosen: ServerOptions) -> None:
    """Print, as JSON, the rates of a server that does not begin."""
    from slowllm.runtime.description import ModelInfo
    from slowllm.swarm.opened_span import measured

    record = measured(ModelInfo(model), chosen)
    said = {
        "blocks": f"{record.first}:{record.end}", "dtype": record.dtype, "cache_tokens": record.cache_tokens,
        "forward_tokens_per_second": record.forward_tokens_per_second, "decode_seconds": record.decode_seconds,
    }  # fmt: skip
    print(json.dumps(said), flush=True)


def _described(server: Any) -> str:
    served, plan = server.spans.served, server.lm.plan
    stays = len([stop for stop in plan.resident if served.first <= stop < served.end])
    where = "all in memory" if not plan.streams else f"{stays} of them in memory, the others streamed"
    weights = f"the model's weights are {server.weights}; " if server.weights else ""
    gradients = "with" if served.has_backward else "without"
    return (
        f"serves blocks {served.first}:{served.end} of {server.num_blocks} ({where}) in {server.record().dtype}, {gradients} "
        f"gradients, sessions of {counted(served.cache_tokens, 'token')}, requests of {counted(served.max_batch_tokens, 'token')}; "
        f"{weights}peer {server.network.peer}. Clients take --swarm, other servers --initial-peers, and one of these addresses. "
        "Ctrl-C ends it."
    )
