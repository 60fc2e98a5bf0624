"""The commands of docs/swarm-guide.md run in their order, with loopback addresses in the place of its machines'."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from benchmarks.swarm_servers import free_ports
from slowllm.entrypoints.cli.app import app
from tests.support.paths import ROOT
from tests.support.swarm_processes import SwarmProcess, SwarmProcesses

GUIDE = (ROOT / "docs" / "swarm-guide.md").read_text()
SECTIONS = {
    name: body
    for name, body in re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", GUIDE, re.MULTILINE)
    if "\n$ " in body
}
MACHINES = {"192.0.2.10": "127.0.0.1", "192.0.2.20": "127.0.0.2", "203.0.113.7": "127.0.0.1"}
LISTENED = re.compile(r"/ip4/([\d.]+)/tcp/(\d+)")
PEER = re.compile(r"\bQm\w{44}\b")
# The embedded model's server would else plan with all of the machine's memory, beside those of other tests.
RAM = ("--ram", "3GiB")


@dataclass(frozen=True)
class Shown:
    """A command, and the lines that the document shows below it."""

    command: str
    lines: tuple[str, ...]


def shown_in(section: str) -> list[Shown]:
    found = []
    for block in re.findall(r"^```text\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
        for command, lines in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            found.append(Shown(command, tuple(lines.splitlines())))
    return found


class Reader:
    """Does what a section says, and keeps what its ids and ports are here."""

    def __init__(self, swarm: SwarmProcesses, folder: Path) -> None:
        self._swarm, self._folder = swarm, folder
        self._ids: dict[str, str] = {}
        self._ports: dict[str, int] = {}
        self._running: dict[str, SwarmProcess] = {}
        self._last: tuple[list[str], Shown] | None = None

    def here(self, text: str) -> str:
        """Put this machine's addresses, and the ids of those that run, in the place of those that are shown."""

        def listened(match: re.Match[str]) -> str:
            host = MACHINES[match[1]]
            # A port of both addresses, as an address that is announced has the port of the one listened at.
            if match[2] not in self._ports:
                self._ports[match[2]] = free_ports(1)[0]
            return f"/ip4/{host}/tcp/{self._ports[match[2]]}"

        return PEER.sub(lambda match: self._ids.get(match[0], match[0]), LISTENED.sub(listened, text))

    def do(self, shown: Shown) -> None:
        if not shown.command.startswith("slowllm "):
            subprocess.run(shown.command, shell=True, check=True, cwd=self._folder)
            return
        words = shlex.split(self.here(shown.command))[1:]
        if words[0] in ("serve", "dht"):
            self._start(words, shown)
        else:
            self._run(words, shown)

    def _start(self, words: list[str], shown: Shown) -> None:
        key = words[words.index("--identity") + 1] if "--identity" in words else shown.lines[0]
        if key in self._running:
            self._running.pop(key).stop()
            assert self._last is not None, "a restart comes behind a command that needs nobody in particular"
            self._run(*self._last)
        memory = RAM if words[0] == "serve" else ()
        process = self._swarm.start("-m", "slowllm", *words, *memory, "--no-relay")
        self._running[key] = process
        before, after = PEER.findall(shown.lines[0])[0], PEER.findall(process.address)[0]
        assert self._ids.setdefault(before, after) == after, "an identity stays the same"
        assert process.address == self.here(shown.lines[0])

    def _run(self, words: list[str], shown: Shown) -> None:
        self._last = words, shown
        memory = RAM if words[0] == "generate" else ()
        ended = self._swarm.run("-m", "slowllm", *words, *memory)
        for line in shown.lines:
            if line.startswith("this client is peer "):
                said = re.search(r"this client is peer (\w+)", ended.stderr)
                assert said is not None, ended.stderr
                self._ids[line.split()[-1]] = said[1]
                assert "nobody serves blocks 5:10" in ended.stderr
                return
        assert ended.returncode == 0, ended.stderr
        assert list(shown.lines) == ended.stdout.splitlines() or not shown.lines

    def stop(self) -> None:
        for process in self._running.values():
            process.stop()


@pytest.fixture
def reader(swarm: SwarmProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = Reader(swarm, tmp_path)
    yield made
    made.stop()


@pytest.mark.long
@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_does_what_it_says(name: str, reader: Reader) -> None:
    for shown in shown_in(SECTIONS[name]):
        if " --device " not in shown.command:  # needs a GPU
            reader.do(shown)


def test_commands_of_the_guide_have_options_that_there_are() -> None:
    commands = [shown.command for body in SECTIONS.values() for shown in shown_in(body)]
    root = typer.main.get_command(app)
    for command in commands:
        _, *words = shlex.split(command)
        group, context = root, root.make_context("slowllm", [], resilient_parsing=True)
        while command.startswith("slowllm ") and hasattr(group, "commands"):
            group = group.commands[words.pop(0)]
            if not hasattr(group, "commands"):
                group.make_context(str(group.name), words, parent=context)
    assert len([command for command in commands if " --device " in command]) == 2


def test_every_machine_of_the_guide_has_an_address_here() -> None:
    assert {host for host, _ in LISTENED.findall(GUIDE)} == set(MACHINES)
