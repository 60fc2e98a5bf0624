"""The options that several verbs have, and what can be checked about them before a model is opened."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from slowllm.entrypoints.cli.log_format import StderrHandler
from slowllm.entrypoints.cli.output import STDOUT
from slowllm.errors import InputError
from slowllm.files import part_of

Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Log what slowllm chooses by itself, and why.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Folder of a checkpoint or store, hub id of a model in the local cache, or embedded:tiny-bloom.",
        show_default="the embedded tiny-bloom",
    ),
]
Ram = Annotated[
    str,
    typer.Option(
        "--ram",
        help="Memory budget for the whole process, such as 16GiB; auto is what the machine and its container allow, less a reserve.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="Device that computes the blocks: cpu, cuda, cuda:1, or several GPUs that take turns, as in "
        "cuda:0,cuda:1.",
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram", help="Memory budget on each GPU.", show_default="the memory that is free there, less a reserve"
    ),
]  # fmt: skip
DType = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Dtype that weights are computed in: bf16, fp32, fp16, or auto, which takes bf16 for a bf16 checkpoint if it "
        "is the faster one here, and otherwise fp32.",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        help="Folder of a soft prompt, written by `slowllm tune` or by PEFT, that is put before every text.",
        metavar="DIR",
    ),
]
Resident = Annotated[
    bool,
    typer.Option(
        "--resident/--stream-all",
        help="Keep the blocks that fit the budget in memory, or read every block in every sweep.",
    ),
]
_TOGETHER = "the bits that it has alone; together they take less time and round otherwise."
Exact = Annotated[
    bool,
    typer.Option(
        "--exact/--no-exact",
        help=f"In experts that are read on demand, give each micro-batch {_TOGETHER}",
    ),
]
# Of verbs that answer whoever comes, whose prompts share micro-batches as well.
ExactPrompts = Annotated[
    bool, typer.Option("--exact/--no-exact", help=f"Let each prompt ride alone, with {_TOGETHER}")
]
ANY_ADDRESS = "/ip4/0.0.0.0/tcp/0"
Identity = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        help="File of this peer's key, made if it is not there; with it, and a port, addresses stay the same after a "
        "restart.",
        show_default="a new one each time",
    ),
]
HostMaddrs = Annotated[
    list[str] | None,
    typer.Option(
        "--host-maddrs",
        help="Multiaddress to listen at, such as /ip4/0.0.0.0/tcp/31330; may be given several times.",
        show_default=f"{ANY_ADDRESS}: all interfaces, a free port",
    ),
]
AnnounceMaddrs = Annotated[
    list[str] | None,
    typer.Option(
        "--announce-maddrs",
        help="Multiaddress that others are told, such as /ip4/203.0.113.7/tcp/31330 behind a router that forwards the "
        "port; may be given several times.",
        show_default="those listened at",
    ),
]
InitialPeers = Annotated[
    list[str] | None,
    typer.Option(
        "--initial-peers",
        help="Multiaddress of a peer of the swarm to join, as `slowllm dht` printed it there; may be given several times.",
        show_default="none: begin a new swarm",
    ),
]
Relay = Annotated[
    bool,
    typer.Option(
        "--relay/--no-relay",
        help="Allow libp2p's circuit relay: pass on the traffic of peers that others cannot reach directly, and be reached "
        "so through the initial peers.",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        help="File of the swarm's shared secret, at least 16 bytes and private (chmod 600): peers prove to one another that they "
        "have it, and never send it.",
        show_default="none: a swarm that is open to all",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check the input and print the job's plan, as `plan` does; do nothing else."),
]  # fmt: skip
State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        help="Save finished work in this folder; after a crash or kill, the same command resumes from it.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Write the results to this file as JSON lines; after an interrupt or kill, the same command resumes. - is "
        "standard output.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Begin anew where --out's partial file, FILE.part, holds lines of another job that was not finished.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        help="Write a report to this HTML file, with figures, plots and the first results; it needs no other file and no "
        "network.",
        metavar="FILE.html",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")]
PerToken = Annotated[
    bool, typer.Option("--per-token", help="Also give every scored token with its log-probability.")
]
NORMALIZE = ("none", "tokens", "characters", "unconditional")
Normalize = Annotated[
    str,
    typer.Option(
        help="Compare the choices' log-likelihoods as they are (none), divided by the number of their tokens or of "
        "their characters, or minus the log-likelihood without the context (unconditional).",
        metavar="|".join(NORMALIZE),
    ),
]


def log_to_stderr(verbose: bool) -> None:
    """Log warnings to stderr; with `verbose`, also what slowllm chooses by itself, and why."""
    logging.basicConfig(handlers=[StderrHandler()], format="%(message)s", level=logging.WARNING)
    logging.getLogger("slowllm").setLevel(logging.INFO if verbose else logging.WARNING)


def check_identity(identity: Path | None) -> None:
    """Refuse an identity file in a folder that is not there.

    Raises:
        InputError: names the folder.
    """
    if identity is not None and not identity.expanduser().parent.is_dir():
        raise InputError(f"{identity.parent}: no such folder for --identity {identity.name}")


def check_normalize(normalize: str) -> None:
    """Refuse an unknown normalization.

    Raises:
        InputError: the name is none of `NORMALIZE`.
    """
    if normalize not in NORMALIZE:
        raise InputError(f"--normalize {normalize!r} is unknown; use one of {', '.join(NORMALIZE)}")


def check_output(out: Path | None, *files: str | Path | None) -> Path | None:
    """Return the file to write with links resolved, `STDOUT` for ``-``, None where there is none.

    Args:
        out: the file to write.
        files: the input files, which must not be overwritten; ``-`` for standard input.
    Raises:
        InputError: it cannot be written, or writing it would destroy something.
    """
    if out is None or out == STDOUT:
        return out
    try:
        out = out.expanduser().resolve()
        if not out.parent.is_dir():
            raise InputError(f"{out.parent}: no such folder to write {out.name} to")
        if out.is_dir():
            raise InputError(f"{out}: is a folder; name a file")
        if out.name.endswith(".part"):
            raise InputError(f"{out}: has the name of an unfinished file; name it otherwise")
        for target in (out, part_of(out)):
            if target.exists() and not target.is_file():
                raise InputError(f"{target}: is no ordinary file; leave out --out to print")
            for file in files:
                given = None if file is None or str(file) == "-" else Path(file).expanduser()
                if given is not None and given.is_file() and target.exists() and target.samefile(given):
                    raise InputError(f"{target}: is the input; name another file")
    except (OSError, RuntimeError) as error:
        raise InputError(f"{out}: {getattr(error, 'strerror', None) or error}") from error
    return out
