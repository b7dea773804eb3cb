"""Jobs for the tests of the launcher and of `Group`: no GPU, no kernel."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import torch.distributed as dist

from megamoe import MegaMoE
from megamoe.group import Group
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
        group.meet(5.0)
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
            group.meet(0.5)
        except RuntimeError as caught:
            error = f"{type(caught).__name__}: {caught}"
    return error, time.monotonic() - started


def meet_again_after_a_miss(context: Context, absent: int) -> bool:
    """A rank misses a meeting that the others give up; then all come twice, as in a recovery.
    True unless somebody passed the second meeting before all had come to it.
    """
    group = Group(dist.group.WORLD)
    if context.rank != absent:
        with contextlib.suppress(RuntimeError):
            group.meet(0.3)
    context.meet()
    counter = f"task/{context.task}/came"
    for turn in range(2):
        if context.rank != absent:
            time.sleep(0.2)
        context.store.add(f"{counter}/{turn}", 1)
        group.meet(2.0)
    return context.store.add(f"{counter}/1", 0) == context.world
