"""Jobs for the tests of the launcher and of `Group`: no GPU, no kernel."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from megamoe import MegaMoE, MissingRank
from megamoe.faults import Limits
from megamoe.group import Group
from megamoe.health import Health
from tests.multigpu.launcher import Context


def where_am_i(context: Context, factor: int) -> tuple[int, int]:
    return context.rank * factor, context.world


def fails_to_start(rank: int, world: int, port: int) -> Context:
    raise RuntimeError(f"rank {rank} has no legs")


def remember(context: Context, value: int) -> list[int]:
    """What earlier tasks left in the cache."""
    before = list(context.cache)
    context.cache[value] = True
    return before


def misbehave(context: Context, odd: int, how: str) -> str:
    """Rank `odd` does what `how` says; the others wait for it."""
    if context.rank == odd:
        if how == "raise":
            raise ValueError("this is the cause")
        if how == "hang":
            time.sleep(600)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(7)
        if how == "unpicklable":
            return lambda: None
    if how != "unpicklable":
        context.meet()
    return "met"


def dies_alone(context: Context, odd: int) -> str:
    if context.rank == odd:
        os._exit(7)
    return "survived"


def _facts(**changes) -> dict:
    return {"error": None, "host": "here", "hidden_size": 512, "top_k": 4, **changes}


def agree(context: Context, odd: int, changes: dict) -> str | None:
    """The message of `agree` with `changes` on rank `odd`, or None."""
    mine = changes if context.rank == odd else {}
    facts = {**_facts(gpu=f"gpu{context.rank}"), **mine}
    try:
        Group(dist.group.WORLD).agree(facts)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return None


def make_with_a_bad_workspace(context: Context, **layer) -> str | None:
    """The message of a layer for which rank 0 passes a number as workspace, or None."""
    workspace = 5 if context.rank == 0 else None
    try:
        MegaMoE(group=dist.group.WORLD, device="cpu", workspace=workspace, **layer)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return None


def agree_out_of_order(context: Context) -> str | None:
    """Rank 0 has made a module that rank 1 has not."""
    if context.rank == 0:
        Group(dist.group.WORLD)
    seen = agree(context, 0, {})
    if context.rank != 0:
        Group(dist.group.WORLD)
    return seen


def agree_after_a_subgroup(context: Context) -> str | None:
    """Rank 0 has made a module over a group of its own; rank 1 is not in it."""
    own = dist.new_group([0])
    if context.rank == 0:
        Group(own)
    return agree(context, 0, {})


def join_a_subgroup(context: Context) -> str | None:
    """The message of a module over a group of rank 0 alone, or None."""
    try:
        Group(dist.new_group([0]))
    except ValueError as error:
        return str(error)
    return None


def meet_often(context: Context, times: int) -> int:
    group = Group(dist.group.WORLD)
    for turn in range(times):
        if turn % 2 == context.rank:
            time.sleep(0.01)
        group.meet(f"turn {turn}", 5.0)
    return times


def miss_a_meeting(context: Context, absent: int, dies: bool) -> tuple[str, float]:
    """(error of a meeting that rank `absent` does not come to, seconds it took)."""
    group = Group(dist.group.WORLD)
    context.meet()
    started = time.monotonic()
    error = ""
    if context.rank == absent:
        if dies:
            os._exit(7)
    else:
        try:
            group.meet("noon", 0.5)
        except RuntimeError as caught:
            error = f"{type(caught).__name__}: {caught}"
    return error, time.monotonic() - started


def leave_texts(context: Context) -> dict[int, str]:
    """What rank 0 finds of the texts that were left: one by rank 1, none by itself."""
    group = Group(dist.group.WORLD)
    before = group.found("notes")
    if context.rank == 1:
        group.leave("notes", "x is on device cpu")
    group.meet("written", 5.0)
    return before | group.found("notes")


class Header:
    """A workspace whose header peers signal, in the store: what `Health` needs of one."""

    def __init__(self, context: Context, name: str):
        self.context, self.name = context, name
        self.layout, self.device, self.local_ranks = None, torch.device("cpu"), [context.rank]
        self.log: list[str] = []

    def signal(self, rank: int) -> None:
        self.context.store.add(f"{self.name}/signals/{rank}", 1)

    def signals(self) -> int:
        return self.context.store.add(f"{self.name}/signals/{self.context.rank}", 0)

    def recover(self) -> None:
        self.log.append(f"zeroed {self.signals()} signals")
        self.context.store.set(f"{self.name}/signals/{self.context.rank}", "0")


def stall_between_the_meetings(context: Context) -> list[str]:
    """Rank 1 stalls in its recovery after its first meeting; rank 0 gives up, and tries again after
    rank 1 has recovered and signalled it. What rank 0 did.
    """
    header = Header(context, f"header/{context.task}")
    health, limits = Health(header, Group(dist.group.WORLD)), Limits(0.5, 0.5)
    header.signals()
    if context.rank == 1:
        zero = header.recover

        def slowly():
            zero()
            time.sleep(1.2)

        header.recover = slowly
        health.recover(limits)
        header.signal(0)  # of a launch that runs now
        context.meet()
        return []
    try:
        health.recover(limits)
    except MissingRank as error:
        header.log.append(f"missed {str(error).split()[-1]}")
    context.meet()
    health.recover(limits)
    return [*header.log, f"holds {header.signals()} signals", f"failed {health.failed}"]


def recover_often(context: Context, times: int) -> int:
    """Recoveries one after the other, of which rank 0 misses a meeting now and then."""
    header = Header(context, f"header/{context.task}")
    health = Health(header, Group(dist.group.WORLD))
    for turn in range(times):
        if turn % 3 == 1 and context.rank == 1:
            time.sleep(0.15)
        while True:
            try:
                health.recover(Limits(0.1, 0.1))
                break
            except MissingRank:
                pass
    context.meet()
    return len(header.log)
