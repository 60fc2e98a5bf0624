"""The options of a streamed model, and byte sizes, devices and dtypes as people write them.

Knows nothing about files or models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal

from slowllm.errors import InputError
from slowllm.rounding import ceil_div

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DTYPE_ALIASES: dict[str, DTypeName] = {
    "auto": "auto",
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}

# Of hidden states on the wire of a swarm.
COMPRESSIONS = ("none", "bfloat16", "float16", "int8")
# Of soft prompts.
PromptKind = Literal["shallow", "deep", "prefix"]

_UNITS = {
    "": 1,
    "B": 1,
    **{unit: 1000**power for power, unit in enumerate(("KB", "MB", "GB", "TB"), 1)},
    **{unit: 1024**power for power, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), 1)},
    # As in `--memory 16g` of other tools: a bare letter is a binary unit.
    **{unit: 1024**power for power, unit in enumerate(("K", "M", "G", "T"), 1)},
}


# As a memory budget: what the machine and its container allow, less a reserve. As blocks: as many as stay in memory.
AUTO: Final = "auto"


def parse_bytes(size: str | int) -> int:
    """Return the bytes meant by a size such as ``16GiB``, ``500MB``, ``8g`` or a plain number.

    Raises:
        InputError: the size cannot be read, or is not positive.
    """
    # At most 18 digits: sizes beyond that are slips, and Python refuses to read thousands of digits.
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise InputError(f"{size!r} is not a size; write it like 16GiB, 500MB or 8g")
    num_bytes = int(Fraction(match[1]) * _UNITS[match[2].upper()])
    if num_bytes <= 0:
        raise InputError(f"{size!r} is not a positive size")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """Return a size in decimal units with three figures, as disks are sold: ``352 GB``."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(num_bytes) >= 999.5 and len(units) > 1:
        num_bytes /= 1000
        units.pop(0)
    unit = units[0]
    return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 99.95 else f"{num_bytes:.3g} {unit}"


def format_binary(num_bytes: int) -> str:
    """Return a size that `parse_bytes` reads back as at least as many bytes: ``1.25GiB``."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= unit:
            whole, hundredths = divmod(ceil_div(num_bytes * 100, unit), 100)
            return f"{whole}.{hundredths:02}".rstrip("0").rstrip(".") + name
    return f"{num_bytes}B"


@dataclass(frozen=True)
class Options:
    """How a model is loaded and streamed.

    Attributes:
        ram_bytes: the budget for the whole process.
        dtype: compute dtype; ``auto`` takes the checkpoint's bfloat16 where this CPU multiplies it fast.
        device: where blocks compute: ``cpu``, or one or more of ``cuda:0``, ``cuda:1``, ..., separated by commas.
        vram_bytes: the budget on each GPU; None for its free memory less a reserve.
        keep_resident: whether blocks that fit the budget stay in memory after the first sweep.
    """

    ram_bytes: int = 16 * GIB
    dtype: DTypeName = "auto"
    device: str = "cpu"
    vram_bytes: int | None = None
    keep_resident: bool = True

    def __post_init__(self) -> None:
        if parse_devices(self.device) == ("cpu",) and self.vram_bytes is not None:
            raise InputError("a vram budget is for a GPU; name one with device='cuda', or leave out vram")
        if self.dtype not in DTYPE_ALIASES.values():
            raise InputError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPE_ALIASES)}")


def parse_devices(device: str) -> tuple[str, ...]:
    """Return the names of the devices meant by ``cpu``, ``cuda``, ``cuda:1`` or ``cuda:0,cuda:1``.

    The devices need not exist.

    Raises:
        InputError: the name cannot be read, or a device is named twice.
    """
    names = tuple("cuda:0" if name.strip() == "cuda" else name.strip() for name in str(device).split(","))
    if names == ("cpu",):
        return names
    if not all(re.fullmatch(r"cuda:[0-9]{1,3}", name) for name in names):
        raise InputError(
            f"device {device!r} is unknown; use cpu, cuda, cuda:1, or several as in cuda:0,cuda:1"
        )
    names = tuple(f"cuda:{int(name[5:])}" for name in names)
    if len(set(names)) < len(names):
        raise InputError(f"device {device!r} names a device twice")
    return names


def parse_span(text: str) -> tuple[int, int] | int | Literal["auto"]:
    """Return what an option says of blocks.

    Args:
        text: ``A:B`` for the numbers from A to B - 1, ``N`` for how many, which the caller chooses, and ``auto`` for as many
            as the caller finds room for.
    Raises:
        InputError: it is none of these.
    """
    if text.strip() == AUTO:
        return AUTO
    if match := re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text.strip()):
        return int(match[1]), int(match[2])
    if not re.fullmatch(r"[0-9]{1,6}", text.strip()):
        raise InputError(
            f"{text!r} names no blocks; write 8:16 for the blocks 8 to 15, 8 for any eight, or auto for as many as stay in memory"
        )
    return int(text)


def parse_dtype(name: str) -> DTypeName:
    """Return the full name of a dtype written as ``bf16``, ``fp32``, ``bfloat16`` and so on.

    Raises:
        InputError: no such dtype.
    """
    try:
        return DTYPE_ALIASES[str(name).removeprefix("torch.").lower()]
    except KeyError:
        raise InputError(f"dtype {name!r} is unknown; use one of {', '.join(DTYPE_ALIASES)}") from None


def by_field_name(settings: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return settings under the names of fields, where some were given under those of the command line's options.

    Args:
        settings: by either name.
        names: of fields, by the options' names.
    Raises:
        InputError: a setting is given under both names.
    """
    if twice := [name for name in settings if names.get(name) in settings]:
        raise InputError(f"{twice[0]} and {names[twice[0]]} are one setting; give it once")
    return {names.get(name, name): value for name, value in settings.items()}
