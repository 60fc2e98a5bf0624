"""Count the bytes a weight that the lossless codec needs, by how weights are spread.

    python -m benchmarks.lossless_size --rows 2048 --width 8192

Encoded are a matrix of normal numbers, one of Student's t with 4.5 degrees of freedom, and one whose rows and columns differ in size as
well (`heavy_tails`), all in bfloat16. Bits of entropy are those of the exponents: sign and mantissa take 8 bits beside them. Sizes do
not depend on the machine. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor

from benchmarks import heavy_tails
from slowllm.storage.codecs.lossless import Lossless

# Weights that are encoded at once, as when a store is made; a whole number of the codec's units.
PIECE = 1 << 20


def bytes_a_weight(weights: Tensor) -> float:
    """Return the bytes a weight of a matrix (rows, width) in bfloat16, all arrays of its store together."""
    codec, width = Lossless(), weights.shape[1]
    pieces = [codec.encode(piece, width) for piece in weights.view(-1).split(PIECE)]
    dense = codec.layout(len(weights), width)
    loose = {name: [piece[name] for piece in pieces] for name in pieces[0] if name not in dense}
    arrays = [piece[name] for piece in pieces for name in dense]
    arrays += codec.finish(loose).values()
    return sum(array.numel() * array.element_size() for array in arrays) / weights.numel()


def exponent_entropy(weights: Tensor) -> float:
    """Return the bits of information in the exponents of weights in bfloat16."""
    exponents = weights.view(torch.int16).view(-1).int() >> 7 & 0xFF
    shares = exponents.bincount(minlength=256).double() / exponents.numel()
    return float(-(shares[shares > 0] * shares[shares > 0].log2()).sum())


def measure(num_rows: int, width: int) -> dict[str, dict[str, float]]:
    """Return the figures of each kind of weights."""
    generator = torch.Generator().manual_seed(0)
    kinds = {
        "normal": torch.randn(num_rows, width, generator=generator),
        "Student's t": heavy_tails.heavy_tailed(num_rows, width, generator=generator),
        "t, unequal rows and columns": heavy_tails.matrix(num_rows, width, 1.0, generator),
    }
    found = {}
    for name, weights in kinds.items():
        rounded = weights.mul_(width**-0.5).to(torch.bfloat16)
        size, entropy = bytes_a_weight(rounded), exponent_entropy(rounded)
        found[name] = {"bytes_a_weight": size, "of_bf16": size / 2, "exponent_bits": entropy}
    return found


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, and print a table and the JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048, help="number of rows of a matrix")
    parser.add_argument("--width", type=int, default=8192, help="number of weights of a row")
    arguments = parser.parse_args(argv)
    if arguments.rows * arguments.width % PIECE:
        parser.error(f"--rows times --width must be a multiple of {PIECE}")
    found = measure(arguments.rows, arguments.width)
    print(f"{'weights':<28} {'bytes a weight':>14} {'of bf16':>8} {'exponent bits':>14}")
    for name, row in found.items():
        print(
            f"{name:<28} {row['bytes_a_weight']:>14.5f} {row['of_bf16']:>8.5f} {row['exponent_bits']:>14.2f}"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
