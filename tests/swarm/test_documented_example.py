"""The example of docs/swarm.md runs as it is written, but for ports and ids."""

from __future__ import annotations

import json
import re
import shlex

import pytest

import slowllm
from tests.support.documents import examples_of
from tests.support.paths import ROOT, TINY_BLOOM
from tests.support.swarm_processes import LOOPBACK, SwarmProcesses

DOCUMENT = (ROOT / "docs" / "swarm.md").read_text()
ADDRESS = re.compile(r"/ip4/[\d.]+/tcp/\d+/p2p/\w+")
PORT = re.compile(r"/ip4/127\.0\.0\.1/tcp/313\d\d(?!/)\b")


def commands() -> list[tuple[list[str], list[str]]]:
    """Return the commands that are shown with a prompt, as words, and what they print."""
    shown = re.findall(r"^```text\n\$ slowllm (.*)\n((?:.*\n)*?)```$", DOCUMENT, re.MULTILINE)
    return [(shlex.split(command), output.splitlines()) for command, output in shown]


@pytest.mark.long
def test_two_servers_and_a_client_print_what_the_document_shows(swarm: SwarmProcesses) -> None:
    assert not list(examples_of(DOCUMENT)), "what needs servers is not run by itself"
    *serving, (asking, printed) = commands()
    began: list[str] = []

    def here(words: list[str]) -> list[str]:
        """Put the addresses of this run in the place of those that the document shows."""
        words = [began[0] if ADDRESS.fullmatch(word) else word for word in words]
        return [PORT.sub(LOOPBACK, word) for word in words]

    for words, lines in serving:
        server = swarm.start("-m", "slowllm", *here(words), "--no-relay", "--ram", "3GiB")
        assert ADDRESS.fullmatch(lines[0])
        assert ADDRESS.fullmatch(server.address)
        began.append(server.address)
        spans = re.match(r"serves blocks (\d+:\d+) of 10 .* in float32, with gradients", lines[1])
        assert spans is not None
    ended = swarm.run("-m", "slowllm", *here(asking), "--ram", "3GiB")
    assert ended.returncode == 0, ended.stderr
    assert [json.loads(line) for line in ended.stdout.splitlines()] == [json.loads(line) for line in printed]
    route = re.search(r"^ +(route: .*)$", DOCUMENT, re.MULTILINE)
    assert route is not None
    assert re.sub(r"\(\w+\)", "()", route[1]) in re.sub(r"\(\w+\)", "()", ended.stderr)
    program = re.search(r"^In Python:\n\n((?:    .*\n|\n)+)", DOCUMENT, re.MULTILINE)
    assert program is not None
    code = ADDRESS.sub(began[0], re.sub(r"^    ", "", program[1], flags=re.MULTILINE))
    ran = swarm.run("-c", code)
    assert ran.returncode == 0, ran.stderr
    with slowllm.load(TINY_BLOOM, dtype="fp32", ram="3GiB") as local:
        first, second, *servers = ran.stdout.splitlines()
        assert float(first) == local.score(["The value is returned."])[0].log_likelihood
        assert second == local.generate(["The value is"], max_new_tokens=6)[0][0].text
    assert [re.sub(r"\(\w+\)", "()", line).split()[:4] for line in servers] == [
        ["desk", "()", "0", "6"], ["lamp", "()", "6", "10"],
    ]  # fmt: skip
