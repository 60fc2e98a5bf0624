"""How likely are some texts, and which of their tokens surprise the model?

python examples/scoring.py [--model FOLDER_OR_HUB_ID] [--ram 16GiB] [TEXT ...]
"""

import argparse
import sys

import slowllm

TEXTS = ["The value is returned.", "Return the number of bytes.", "Returned is value The."]


def main() -> None:
    """Score texts, in one sweep for all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="by default three sentences")
    parser.add_argument("--model", default="embedded:tiny-bloom", help="by default the embedded one, a toy")
    parser.add_argument("--ram", default="auto", help="what the process may take, such as 16GiB")
    options = parser.parse_args()
    texts = options.texts or TEXTS

    # The bar, and before it what the sweep takes, are written to stderr.
    with slowllm.load(options.model, ram=options.ram, progress=True) as lm:
        found = lm.score(texts)
    for text, likelihood in sorted(zip(texts, found, strict=True), key=lambda pair: pair[1].mean_nll):
        print(f"{likelihood.mean_nll:.3f} nats a token, perplexity {likelihood.perplexity:,.1f}: {text}")
        tokens = zip(likelihood.texts or likelihood.tokens, likelihood.log_probs, strict=True)
        for token, log_prob in tokens:
            # A bar of one character for each nat of surprisal.
            print(f"    {token!r:>16} {-log_prob:7.3f} {'#' * round(-log_prob)}")


if __name__ == "__main__":
    try:
        main()
    except slowllm.SlowLLMError as error:
        print(f"scoring.py: {error}", file=sys.stderr)
        sys.exit(2)
