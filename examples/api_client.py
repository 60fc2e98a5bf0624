"""Ask a server of OpenAI's API for a completion, a chat and log-probabilities.

    python examples/api_client.py [BASE_URL] [--model FOLDER_OR_HUB_ID]

Without a base URL, such as http://127.0.0.1:8000/v1, this starts `slowllm api` on a free port and ends it afterwards. Asks
by the `openai` package where it is installed, and otherwise by urllib.
"""

import argparse
import contextlib
import importlib.util
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def served(model: str) -> Iterator[str]:
    """Start a server, yield its base URL, and end it."""
    command = [sys.executable, "-m", "slowllm", "api", model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            # It prints the base URL when it serves, and nothing if it cannot; stderr says why.
            url = server.stdout.readline().strip()
            if not url:
                raise OSError(f"the server has ended before it served {model}")
            yield url
        finally:
            server.terminate()


class RefusedError(Exception):
    """The server says what is wrong with a request."""


def ask(base_url: str, path: str, **body: Any) -> dict[str, Any]:
    """Return the answer to a request, by whichever client is there."""
    if importlib.util.find_spec("openai") is not None:
        return ask_by_openai(base_url, path, body)
    return ask_by_urllib(base_url, path, body)


def ask_by_openai(base_url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask by the official client."""
    import openai

    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        call = client.chat.completions if path == "chat/completions" else client.completions
        try:
            answer: dict[str, Any] = call.create(**body).model_dump()
        except openai.APIStatusError as error:
            raise RefusedError(error.message) from error
        except openai.APIConnectionError as error:
            raise OSError(f"{base_url}: {error}") from error
    return answer


def ask_by_urllib(base_url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask by what Python itself has."""
    request = urllib.request.Request(
        f"{base_url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as reply:
            answer: dict[str, Any] = json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            raise RefusedError(json.load(error)["error"]["message"]) from error
    return answer


def show(base_url: str) -> None:
    """Ask three things, and print the answers."""
    # The server has one model, whatever a request calls it.
    answer = ask(base_url, "completions", model="any", prompt="The value is", max_tokens=6, temperature=0)
    print(f"completion: The value is{answer['choices'][0]['text']}")

    messages = [{"role": "user", "content": "What is returned?"}]
    try:
        answer = ask(
            base_url, "chat/completions", model="any", messages=messages, max_tokens=6, temperature=0
        )
        print(f"chat: {answer['choices'][0]['message']['content']}")
    except RefusedError as error:
        # A base model, as the embedded one is, has no chat template.
        print(f"chat: the server refuses: {error}")

    # `echo` scores the prompt itself; of `max_tokens`, 0 make no new token.
    answer = ask(
        base_url, "completions", model="any", prompt="The value is returned.", max_tokens=0, echo=True, logprobs=1
    )  # fmt: skip
    log_probs = answer["choices"][0]["logprobs"]
    for token, log_prob in zip(log_probs["tokens"], log_probs["token_logprobs"], strict=True):
        print(f"log-probability of {token!r}: {'none' if log_prob is None else f'{log_prob:.3f}'}")


def main() -> None:
    """Find a server, and ask it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "base_url", nargs="?", metavar="BASE_URL", help="of a server that runs; by default one is started"
    )
    parser.add_argument(
        "--model", default="embedded:tiny-bloom", help="that is served, by default the embedded one"
    )
    options = parser.parse_args()
    with contextlib.nullcontext(options.base_url) if options.base_url else served(options.model) as base_url:
        show(base_url)


if __name__ == "__main__":
    try:
        main()
    except (RefusedError, OSError) as error:
        print(f"api_client.py: {error}", file=sys.stderr)
        sys.exit(2)
