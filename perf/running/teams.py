"""The contenders of a duel, and the processes that run them.

Contenders that share a tree of sources and a directory of kernels are a team: a process of their
own, or one per GPU, in which all of them are held ready, so that two recipes are compared in the
same processes. A team runs from a folder of links: `perf` is this one, all other packages are
those of its tree. So an older version of the layer is measured by the same code, which asks it for
no more than `MegaMoE` and `quantize_weights` (`perf.running.teammate`).

One team works at a time; the others wait for a message and leave the GPU alone.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from megamoe.precision import PRECISIONS
from perf.arguments import nearest
from perf.recording.environment import REPOSITORY
from perf.running.messages import Batch, Failed, Orders, Ready

#: Seconds until a team is ready, for one batch, and until it has ended.
READY_S, BATCH_S, END_S = 600, 120, 30
#: What torchrun would say to a process.
JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class TeamFailed(RuntimeError):
    """A process of a team failed, or did not answer in time."""


@dataclass(frozen=True)
class Entry:
    """What stands for a contender on the command line. kernel_dir: None where kernels are built or
    cached. precision: None for that of the command.
    """

    text: str
    tree: Path
    kernel_dir: Path | None
    precision: str | None

    @property
    def own(self) -> bool:
        """Whether it runs the sources of this tree."""
        return self.tree == REPOSITORY


def entry_of(text: str) -> Entry:
    """`[TREE:][KERNEL_DIR][@RECIPE]`; ValueError if that cannot be."""
    where, at, recipe = text.rpartition("@")
    if not at or "/" in recipe:  # a directory may have such a name
        where, recipe = text, ""
    elif recipe not in PRECISIONS:
        raise ValueError(f"{text!r}: {recipe!r} is no recipe; {nearest(recipe, PRECISIONS)}")
    first, colon, last = where.partition(":")
    tree = Path(first).resolve() if colon else REPOSITORY
    kernels = last if colon else first
    if not (colon or kernels or recipe) or (colon and not first):
        raise ValueError(f"{text!r} is no [TREE:][KERNEL_DIR][@RECIPE]")
    if not (tree / "megamoe" / "__init__.py").is_file():
        raise ValueError(f"{text!r}: {tree} has no package megamoe")
    if kernels and not Path(kernels).is_dir():
        raise ValueError(f"{text!r}: {kernels} is no directory")
    return Entry(text, tree, Path(kernels).resolve() if kernels else None, recipe or None)


def teams_of(entries: Sequence[Entry]) -> list[list[int]]:
    """Numbers of the entries of each team, in the order of their first."""
    teams: dict[tuple[Path, Path | None], list[int]] = {}
    for number, entry in enumerate(entries):
        teams.setdefault((entry.tree, entry.kernel_dir), []).append(number)
    return list(teams.values())


def link_packages(tree: Path, folder: Path) -> None:
    """`perf` of this repository and the other packages of `tree`, as links in `folder`."""
    for package in sorted(tree.iterdir()):
        if (package / "__init__.py").is_file() and package.name not in ("perf", "tests"):
            (folder / package.name).symlink_to(package.resolve())
    (folder / "perf").symlink_to(REPOSITORY / "perf")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environments(folder: Path, gpus: int) -> list[dict[str, str]]:
    """The environment of each process of a team."""
    base = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    base["PYTHONPATH"] = str(folder)
    if gpus == 1:
        return [base]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(gpus)}
    return [base | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(gpus)]


class Team:
    """The processes of a team, started; `prepare`, then `batch`."""

    def __init__(self, name: str, tree: Path, gpus: int, folder: Path):
        self.name = name
        self.processes: list[subprocess.Popen] = []
        self.lines: list[Connection] = []
        link_packages(tree, folder)
        for environ in environments(folder, gpus):
            ours, theirs = Pipe()
            descriptor = theirs.fileno()
            command = [sys.executable, "-m", "perf.running.teammate", str(descriptor)]
            self.processes.append(
                subprocess.Popen(command, cwd=folder, env=environ, pass_fds=[descriptor])
            )
            theirs.close()
            self.lines.append(ours)

    def _ask(self, message: object, seconds: float) -> Any:
        """What the first rank answers, once all have."""
        answers: dict[int, Any] = {}
        try:
            for line in self.lines:
                line.send(message)
        except OSError:
            raise TeamFailed(f"{self.name}: a process ended") from None
        until = time.monotonic() + seconds
        while len(answers) < len(self.lines):
            open_lines = [line for rank, line in enumerate(self.lines) if rank not in answers]
            heard = wait(open_lines, max(until - time.monotonic(), 0))
            if not heard:
                raise TeamFailed(f"{self.name}: no answer in {seconds:.0f} s")
            for rank, line in enumerate(self.lines):
                if line in heard:
                    answers[rank] = self._answer(rank, line)
        return answers[0]

    def _answer(self, rank: int, line: Connection) -> Any:
        try:
            answer = line.recv()
        except (EOFError, OSError):
            raise TeamFailed(f"{self.name}: the process of rank {rank} ended") from None
        if isinstance(answer, Failed):
            raise TeamFailed(f"{self.name}, rank {rank}: {answer.message}")
        return answer

    def prepare(self, orders: Orders) -> Ready:
        return self._ask(orders, READY_S)

    def batch(self, member: int, tokens: int) -> Batch:
        """Of a member of this team at a token count, by their numbers in the orders."""
        return self._ask((member, tokens), BATCH_S)

    def end(self, kindly: bool) -> None:
        """End the processes; they are asked first if nothing failed."""
        for line, process in zip(self.lines, self.processes, strict=True):
            try:
                if kindly:
                    line.send(None)
            except OSError:
                kindly = False
            if not kindly:
                process.kill()
        for process in self.processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def started(entries: Sequence[Entry], gpus: int) -> Iterator[list[Team]]:
    """The teams of these entries; they end with the block."""
    teams: list[Team] = []
    kindly = False
    with tempfile.TemporaryDirectory(prefix="megamoe-duel-") as place:
        try:
            for number, members in enumerate(teams_of(entries)):
                folder = Path(place) / str(number)
                folder.mkdir()
                name = ", ".join(entries[member].text for member in members)
                teams.append(Team(name, entries[members[0]].tree, gpus, folder))
            yield teams
            kindly = True
        finally:
            for team in teams:
                team.end(kindly)
