"""The mbarriers of a CTA with their real parities, in every order that its warps can run.

A model of two math warpgroups of two warps each, the loader and the queue, for tiles that one or
both warpgroups compute. A launch on a CPU takes one order a seed; here a warp that takes one phase
of a barrier for another shows in whichever order does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest

from megamoe import schedule

WARPGROUPS, WARPS = 2, 2  # warps of a warpgroup: enough for one to be ahead of another
MATH_WARPS = WARPGROUPS * WARPS
SLOTS = 2
GRANULE = 64
#: A warp takes a tile, multiplies it or waits for the warpgroup that does, and releases it.
TAKE, MULTIPLY, ARRIVE, WAIT, RELEASE, END = range(6)


class Broken(AssertionError):
    """A warp went past a barrier that it should have waited at, or nobody can go on."""


class Warp(NamedTuple):
    step: int = TAKE
    tile: int = 0
    block: int = 0
    turn: int = 0


class Barrier(NamedTuple):
    """Completed phases, and arrivals of the open one."""

    phases: int = 0
    arrived: int = 0

    def passes(self, parity: int) -> bool:
        """`mbarrier.try_wait.parity`: the open phase does not have this parity."""
        return self.phases % 2 != parity

    def arrive(self, count: int, expected: int) -> Barrier:
        arrived = self.arrived + count
        if arrived > expected:
            raise Broken("more arrivals than a phase has")
        return Barrier(self.phases + 1) if arrived == expected else Barrier(self.phases, arrived)


class State(NamedTuple):
    warps: tuple[Warp, ...]
    queue_full: tuple[Barrier, ...]
    queue_empty: tuple[Barrier, ...]
    full: tuple[Barrier, ...]
    empty: tuple[Barrier, ...]
    multiplied: tuple[Barrier, ...]
    handed: int = 0
    loaded: int = 0


def put(items: tuple, index: int, item) -> tuple:
    return (*items[:index], item, *items[index + 1 :])


def explore(rows: Sequence[int], k_blocks: int, stages: int, turn_barrier: Callable) -> int:
    """Number of states that can be reached; Broken if one of them is wrong."""

    def loader(state: State) -> list[State]:
        after = []
        tile, slot = state.handed, state.handed % SLOTS
        if tile < len(rows) and state.queue_empty[slot].passes((tile // SLOTS + 1) % 2):
            full = put(state.queue_full, slot, state.queue_full[slot].arrive(1, 1))
            after.append(state._replace(queue_full=full, handed=tile + 1))
        position, stage = state.loaded, state.loaded % stages
        free = state.empty[stage].passes((position // stages + 1) % 2)
        if position < state.handed * k_blocks and free:
            full = put(state.full, stage, state.full[stage].arrive(1, 1))
            after.append(state._replace(full=full, loaded=position + 1))
        return after

    def step(state: State, index: int) -> State | None:
        warp, warpgroup = state.warps[index], index // WARPS

        def moved(to: Warp, **changes) -> State:
            return state._replace(warps=put(state.warps, index, to), **changes)

        if warp.step == END:
            return None
        if warp.step == TAKE and warp.tile == len(rows):
            return moved(warp._replace(step=END))
        slot = warp.tile % SLOTS
        if warp.step == TAKE:
            if not state.queue_full[slot].passes(warp.tile // SLOTS % 2):
                return None
            share = schedule.share_of(rows[warp.tile], warpgroup, warp.turn, GRANULE, WARPGROUPS)
            return moved(warp._replace(step=MULTIPLY if share.active else WAIT, block=0))
        share = schedule.share_of(rows[warp.tile], warpgroup, warp.turn, GRANULE, WARPGROUPS)
        number, parity = turn_barrier(warp.turn, WARPGROUPS)
        if warp.step == MULTIPLY:
            position = warp.tile * k_blocks + warp.block
            stage = position % stages
            if not state.full[stage].passes(position // stages % 2):
                return None
            if state.full[stage].phases != position // stages + 1:
                raise Broken(f"warp {index} reads stage {stage} of another K block")
            last = warp.block + 1 == k_blocks
            after = warp._replace(block=warp.block + 1)
            if last:
                after = warp._replace(step=ARRIVE if share.arrivals > 1 else RELEASE)
            freed = state.empty[stage].arrive(share.arrivals, MATH_WARPS)
            return moved(after, empty=put(state.empty, stage, freed))
        if warp.step == ARRIVE:
            done = state.multiplied[number].arrive(1, WARPS)
            multiplied = put(state.multiplied, number, done)
            return moved(warp._replace(step=RELEASE), multiplied=multiplied)
        if warp.step == WAIT:
            passes = state.multiplied[number].passes(parity)
            return moved(warp._replace(step=RELEASE)) if passes else None
        freed = state.queue_empty[slot].arrive(1, MATH_WARPS)
        after = Warp(TAKE, warp.tile + 1, 0, warp.turn + (share.arrivals > 1))
        return moved(after, queue_empty=put(state.queue_empty, slot, freed))

    def barriers(count: int) -> tuple[Barrier, ...]:
        return (Barrier(),) * count

    first = State(
        (Warp(),) * MATH_WARPS, barriers(SLOTS), barriers(SLOTS), barriers(stages),
        barriers(stages), barriers(WARPGROUPS),
    )  # fmt: skip
    seen, waiting = {first}, [first]
    while waiting:
        state = waiting.pop()
        steps = [step(state, index) for index in range(MATH_WARPS)]
        after = [*loader(state), *(state for state in steps if state)]
        if not after and any(warp.step != END for warp in state.warps):
            raise Broken("nobody can go on")
        for reached in after:
            if reached not in seen:
                seen.add(reached)
                waiting.append(reached)
    return len(seen)


ALONE, BOTH = 9, 100
SHAPES = [(3, 2), (2, 2), (2, 3)]  # K blocks of a tile, stages


@pytest.mark.parametrize("k_blocks,stages", SHAPES)
@pytest.mark.parametrize(
    "rows",
    [
        (ALONE,) * 4, (ALONE, ALONE, BOTH, ALONE), (BOTH, ALONE, ALONE, BOTH),
        (ALONE, BOTH, ALONE, ALONE), (BOTH, BOTH, ALONE, BOTH),
    ],
    ids=lambda rows: "".join("a" if tile == ALONE else "b" for tile in rows),
)  # fmt: skip
def test_no_warp_takes_one_phase_for_another(rows, k_blocks, stages):
    assert explore(rows, k_blocks, stages, schedule.turn_barrier) > 1000


def test_one_barrier_for_both_warpgroups_would_not_do():
    with pytest.raises(Broken, match="another K block"):
        explore((ALONE,) * 4, 3, 2, lambda turn, warpgroups: (0, turn % 2))


def test_warpgroups_that_do_not_wait_for_each_other_would_not_do():
    with pytest.raises(Broken):
        explore((ALONE,) * 4, 3, 2, lambda turn, warpgroups: (turn % 2, 1))
