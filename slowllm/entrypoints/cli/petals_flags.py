"""The flags of Petals' run_server and run_dht under their old names: each is obeyed under its new name, or refused.

A pure function from arguments to arguments and lines. Flags that slowllm has under the same name pass as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from slowllm.errors import InputError

# Of hivemind's compressions: the compression here that takes as many bytes.
COMPRESSIONS = {
    "NONE": "none", "FLOAT16": "float16", "MEANSTD_16BIT": "float16", "UNIFORM_8BIT": "int8", "QUANTILE_8BIT": "int8",
    "BLOCKWISE_8BIT": "int8",
}  # fmt: skip
_STORE = "write a store with `slowllm convert MODEL OUT --store int8` and serve that"
_ONE_PROCESS = "one process answers all requests"
_HUB = "files are read from the local cache; fetch them with `slowllm download`"


@dataclass
class _Line:
    """A command line as it is translated.

    Attributes:
        arguments: those of slowllm.
        said: what each flag is here.
        model: behind the flags.
        revision: of the model.
        port: to listen at.
        public_ip: to announce.
    """

    arguments: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    model: str | None = None
    revision: str | None = None
    port: str | None = None
    public_ip: str | None = None


@dataclass(frozen=True)
class Flag:
    """A flag of Petals.

    Attributes:
        values: how many it takes: none (``0``), one (``1``) or several (``+``).
        option: what it is called here; empty for one that is not taken over.
        words: what it is here, for the table of docs/petals.md; of one that is refused, what to do instead.
        is_refused: whether it is an error.
        table: of the values that have other names here.
    """

    values: str
    option: str
    words: str
    is_refused: bool = False
    table: dict[str, str] | None = None


def _same(option: str, values: str = "1") -> Flag:
    return Flag(values, option, f"`{option}`")


def _refused(words: str, values: str = "1") -> Flag:
    return Flag(values, "", words, is_refused=True)


_PEERS = {
    "--initial_peers": _same("--initial-peers", "+"),
    "--host_maddrs": _same("--host-maddrs", "+"),
    "--announce_maddrs": _same("--announce-maddrs", "+"),
    "--identity_path": _same("--identity"),
}
SERVER_FLAGS: dict[str, Flag] = {
    **_PEERS,
    "--converted_model_name_or_path": Flag("1", "MODEL", "the argument MODEL"),
    "-c": Flag("1", "--config", "`--config`, a TOML file of slowllm's options"),
    "--public_name": _same("--public-name"),
    "--num_blocks": Flag("1", "--blocks", "`--blocks N`"),
    "--block_indices": Flag("1", "--blocks", "`--blocks A:B`"),
    "--port": Flag("1", "--host-maddrs", "`--host-maddrs /ip4/0.0.0.0/tcp/PORT` and `/ip6/::/tcp/PORT`"),
    "--public_ip": Flag("1", "--announce-maddrs", "`--announce-maddrs /ip4/IP/tcp/PORT`, with `--port`"),
    "--no_auto_relay": Flag("0", "--no-relay", "`--no-relay`"),
    "--new_swarm": Flag("0", "", "the default: without `--initial-peers` a new swarm begins"),
    "--compression": Flag(
        "1", "--compression", "`--compression`: float16 and MEANSTD_16BIT are float16, the 8-bit ones int8 with a scale for each position",
        table=COMPRESSIONS,
    ),
    "--inference_max_length": _same("--max-length"),
    "--max_batch_size": _same("--max-batch-tokens"),
    "--attn_cache_tokens": _same("--attn-cache-tokens"),
    "--attn_cache_size": Flag("1", "--attn-cache-size", "`--attn-cache-size`: bytes of the keys and values of all sessions, in the blocks that are served"),
    "--throughput": Flag("1", "--throughput", "`--throughput`: `auto` and `eval` measure at each start, `dry_run` prints that and ends, a number is announced as tokens a second"),
    "--step_timeout": Flag("1", "--session-timeout", "`--session-timeout`: how long a session may be idle"),
    "--torch_dtype": _same("--dtype"),
    "--tensor_parallel_devices": Flag("+", "--device", "`--device`, devices with commas; they take turns at blocks"),
    "--revision": Flag("1", "MODEL@", "`MODEL@REVISION`"),
    "--skip_reachability_check": Flag("0", "", "the default: nobody is asked whether the server can be reached"),
    "--load_in_8bit": _refused(_STORE, "0"),
    "--quant_type": _refused(_STORE),
    "--adapters": _refused("merge the adapter into a checkpoint and serve that", "+"),
    "--dht_prefix": _refused("servers are found by a hash of the model's config"),
    "--token": _refused(_HUB),
    "--use_auth_token": _refused(_HUB, "0"),
    "--cache_dir": _refused("set HF_HUB_CACHE, or give the folder"),
    "--max_disk_space": _refused("nothing is downloaded while a server runs; fetch its blocks with `slowllm download --blocks`"),
    "--daemon_startup_timeout": _refused("joining takes a minute at most"),
    "--num_handlers": _refused(_ONE_PROCESS),
    "--prefetch_batches": _refused(_ONE_PROCESS),
    "--sender_threads": _refused(_ONE_PROCESS),
    "--min_batch_size": _refused("requests of any size are taken"),
    "--max_chunk_size_bytes": _refused("a request is bounded by `--max-batch-tokens`"),
    "--max_alloc_timeout": _refused("a server that has no room says so at once, and the client asks another one"),
    "--update_period": _refused("servers announce themselves in time"),
    "--expiration": _refused("servers announce themselves in time"),
    "--request_timeout": _refused("clients bound their requests: `--timeout` and `--step-timeout` there"),
    "--session_timeout": _refused("a session lasts as long as it is used; `--session-timeout` ends one that is idle"),
    "--increase_file_limit": _refused("set it with `ulimit -n`"),
    "--stats_report_interval": _refused("ask a server with `lm.swarm.status(peer)`"),
    "--custom_module_path": _refused("only transformers' own classes are used"),
    "--balance_quality": _refused("a server moves where the swarm gains a quarter; `--no-rebalance` keeps it where it is"),
    "--mean_balance_check_period": _refused("a server looks every two minutes whether it should move; `--no-rebalance` keeps it where it is"),
}  # fmt: skip
DHT_FLAGS: dict[str, Flag] = {
    **_PEERS,
    "--no_relay": Flag("0", "--no-relay", "`--no-relay`"),
    "--use_auto_relay": Flag("0", "", "the default, unless `--no-relay` is given"),
    "--use_ipfs": _refused("nobody but the given peers is asked", "0"),
    "--refresh_period": _refused("the directory is kept fresh as it is used"),
}
# Which of a verb's options take no value, to tell the argument MODEL from a value.
WITHOUT_VALUE = {
    "--resident", "--stream-all", "--backward", "--forward-only", "--no-relay", "--relay", "--rebalance", "--no-rebalance", "--verbose", "-v", "--help",
    "-h", "--quiet", "-q", "--log-json",
}  # fmt: skip


def from_petals(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command line with Petals' flags translated, and a line for each that says what it is here.

    Args:
        arguments: the verb first. Verbs but ``serve`` and ``dht`` are returned as they are.
    Raises:
        InputError: a flag has no meaning here, lacks its value, or contradicts another; the message says what to use instead.
    """
    flags = {"serve": SERVER_FLAGS, "dht": DHT_FLAGS}.get(arguments[0] if arguments else "", {})
    if not any(argument.partition("=")[0] in flags for argument in arguments[1:]):
        return list(arguments), []
    line, left = _Line(), list(arguments[1:])
    while left:
        argument = left.pop(0)
        name, has_value, value = argument.partition("=")
        flag = flags.get(name)
        if flag is None:
            _keep(line, argument, left)
            continue
        values = [value] if has_value else _take(name, flag, left)
        if not (
            flag.option == "--compression"
            and values[0] not in COMPRESSIONS
            and values[0] in COMPRESSIONS.values()
        ):
            _translate(line, name, flag, values)
        else:  # slowllm's own option has the same name
            line.arguments += ["--compression", *values]
    _settle(line)
    model = (
        []
        if line.model is None
        else [line.model if line.revision is None else f"{line.model}@{line.revision}"]
    )
    return [arguments[0], *model, *line.arguments], line.said


def _keep(line: _Line, argument: str, left: list[str]) -> None:
    """Keep an argument of slowllm's own with its value."""
    if not argument.startswith("-"):
        if line.model is not None:
            line.arguments.append(argument)
        line.model = line.model or argument
        return
    line.arguments.append(argument)
    if "=" not in argument and argument not in WITHOUT_VALUE and left:
        line.arguments.append(left.pop(0))


def _take(name: str, flag: Flag, left: list[str]) -> list[str]:
    """Take a flag's values from what is left of the command line."""
    if flag.values == "0":
        return [""]
    values: list[str] = []
    while left and not left[0].startswith("--") and (flag.values == "+" or not values):
        values.append(left.pop(0))
    if not values and not flag.is_refused:
        raise InputError(f"{name} takes a value; it is {_plain(flag.words)} here")
    return values


def _translate(line: _Line, name: str, flag: Flag, values: list[str]) -> None:
    if flag.is_refused:
        raise InputError(f"{name} has no meaning here: {_plain(flag.words)}")
    if flag.table is not None:
        # A value that Petals does not know either is refused by slowllm, with its own names.
        values = [flag.table.get(values[0].upper(), values[0])]
    handlers: dict[str, Callable[[], None]] = {
        "MODEL": lambda: setattr(line, "model", values[0]),
        "MODEL@": lambda: setattr(line, "revision", values[0]),
    }
    if name == "--port":
        line.port = values[0]
    elif name == "--public_ip":
        line.public_ip = values[0]
    elif flag.option in handlers:
        handlers[flag.option]()
    elif name == "--tensor_parallel_devices":
        line.arguments += [flag.option, ",".join(values)]
    elif flag.values == "0":
        line.arguments += [flag.option] * bool(flag.option)
    else:
        for value in values:
            line.arguments += [flag.option, value]
    line.said.append(f"{name} is {_plain(flag.words)} here")


def _settle(line: _Line) -> None:
    """Write the addresses of a port, and refuse what contradicts itself."""
    given = set(line.arguments)
    if line.port is not None:
        if "--host-maddrs" in given:
            raise InputError("--port and --host_maddrs both say where to listen; give one of them")
        line.arguments += [
            "--host-maddrs",
            f"/ip4/0.0.0.0/tcp/{line.port}",
            "--host-maddrs",
            f"/ip6/::/tcp/{line.port}",
        ]
    if line.public_ip is not None:
        if line.port in (None, "0"):
            raise InputError(
                "--public_ip needs a --port that is not chosen anew at each start; give --port 31330"
            )
        if "--announce-maddrs" in given:
            raise InputError(
                "--public_ip and --announce_maddrs both say what others are told; give one of them"
            )
        line.arguments += ["--announce-maddrs", f"/ip4/{line.public_ip}/tcp/{line.port}"]
    if "--initial-peers" in given and any(said.startswith("--new_swarm ") for said in line.said):
        raise InputError("--new_swarm begins a swarm and --initial_peers joins one; give one of them")
    if line.revision is not None and line.model is None:
        raise InputError("--revision needs the argument MODEL, which is missing")


def _plain(words: str) -> str:
    return words.replace("`", "")
