"""Recording a launch of the emulator in the words of `timeline`: its scheduler's steps as time.

The recorder is a runtime of the emulator that behaves like any other, step by step for the same
seed, and notes the step at which a role passed certain operations of the protocol. It knows roles
by the labels of `megamoe.emulator.OPERATIONS`; which tile a ticket stands for follows from the
schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megamoe.budget import WARPGROUP_ROWS
from megamoe.emulator import Emulator
from megamoe.emulator.memory import Agent, Word
from megamoe.emulator.runtime import Runtime
from megamoe.schedule import PHASE_DONE, advance_walk, start_walk, tile_of
from megamoe.shape import Shape
from perf.timeline import Clock, CtaTrace, TileTimes

STEP_CLOCK = Clock(
    "steps", 1, "steps of the CPU emulator's scheduler, drawn as microseconds: an order, no time"
)

#: Marks by the operation after which they stand; all but the first keep the last time.
FIRST_TILE = "load_tokens.fc1_wait"
MARKS = {
    "grid_sync.after": "counted",
    "count.counts_barrier": "dispatched",
    "dispatch.last_wait": "last_pull",
    "combined.after": "combined",
}
WAITS = {"load_tokens.fc1_wait": "wait_tokens_ns", "load_tokens.fc2_wait": "wait_hidden_ns"}
TICKET = "load_weights.ticket"
#: What the first warp of a math warpgroup passes on the way through a tile that it has a share in.
TILE_TAKEN = "math.queue_full"
TILE_BEGIN, TILE_MULTIPLIED = "math.stage_full", "math.stage_empty"
TILE_DONE = "math.stored"
#: The word that counts CTAs that have ended.
KERNEL_END = "kernel_end"


@dataclass
class _Record:
    """Of one CTA."""

    marks: dict[str, int] = field(default_factory=dict)
    tickets: list[int] = field(default_factory=list)
    taken: dict[Agent, int] = field(default_factory=dict)  # tiles, by warpgroup
    by: dict[int, Agent] = field(default_factory=dict)  # who began a tile first
    tiles: dict[int, list[int]] = field(default_factory=dict)  # begin, multiplied, end

    def note_tile(self, agent: Agent, label: str, step: int) -> None:
        number = self.taken.get(agent, 0) - 1
        if label == TILE_TAKEN:
            self.taken[agent] = number + 2
        elif label == TILE_BEGIN and number not in self.by:
            self.by[number], self.tiles[number] = agent, [step, 0, 0]
        elif self.by.get(number) is agent:
            if label == TILE_MULTIPLIED:
                self.tiles[number][1] = step
            elif label == TILE_DONE:
                self.tiles[number][2] = step


class Recorder(Runtime):
    """The runtime of an emulator from now on; `records` is of the last launch, by (rank, CTA)."""

    def __init__(self, emulator: Emulator):
        super().__init__(emulator.memory, emulator.dropped)
        warps = WARPGROUP_ROWS * emulator.kernel.num_math_warps // emulator.kernel.block_m
        self.first_math = {
            warp.leader
            for state in emulator.ranks
            for agents in state.cta_agents
            for warp in agents.math[::warps]
        }
        self.records: dict[tuple[int, int], _Record] = {}
        self._step, self._task = 0, None
        self._cta_of_task: dict[object, tuple[int, int]] = {}
        emulator.runtime = self

    def start(self, seed: int) -> None:
        super().start(seed)
        self.records, self._cta_of_task, self._step = {}, {}, 0

    def _pop(self):
        self._step += 1
        self._task = super()._pop()
        return self._task

    def _note(self, agent: Agent, label: str) -> _Record:
        place = agent.rank, agent.cta
        record = self.records.setdefault(place, _Record())
        self._cta_of_task[self._task] = place
        marks = record.marks
        marks.setdefault("start", self._step)
        if label == FIRST_TILE:
            marks.setdefault("first_tile", self._step)
        if label in MARKS:
            marks[MARKS[label]] = self._step
        if agent in self.first_math:
            marks["last_tile"] = self._step
            record.note_tile(agent, label, self._step)
        return record

    def wait(self, agent: Agent, word: Word, expected: int, label: str, *arguments, **options):
        begin = self._step
        yield from super().wait(agent, word, expected, label, *arguments, **options)
        record = self._note(agent, label)
        if label in WAITS:
            name = WAITS[label]
            record.marks[name] = record.marks.get(name, 0) + self._step - begin

    def add(self, agent: Agent, word: Word, label: str, *arguments, **options):
        old = yield from super().add(agent, word, label, *arguments, **options)
        record = self._note(agent, label)
        if label == TICKET:
            record.tickets.append(old)
        return old

    def hand_over(self, agents: list[Agent], label: str) -> None:
        super().hand_over(agents, label)
        self._note(agents[0], label)

    def wait_bulk(self, agent: Agent, in_flight: int, label: str) -> int:
        self._note(agent, label)
        return super().wait_bulk(agent, in_flight, label)

    def bump(self, word: Word) -> None:
        if word.region == KERNEL_END:
            self.records[self._cta_of_task[self._task]].marks["end"] = self._step
        super().bump(word)


def stream_of(shape: Shape, counts_e: Sequence[int], num_ctas: int) -> list[tuple[int, int, int]]:
    """(phase, pool block, column) of every ticket of a rank that received these rows."""
    stream = shape.stream(num_ctas)
    walk = advance_walk(start_walk(counts_e, shape.experts), counts_e, *stream)
    tiles = []
    while walk.phase != PHASE_DONE:
        for ticket in range(walk.begin, walk.begin + walk.size):
            tile = tile_of(walk, ticket)
            tiles.append((walk.phase, tile.pool, tile.column))
        walk = advance_walk(walk, counts_e, *stream)
    return tiles


def traces_of(
    emulator: Emulator, recorder: Recorder, counts_We: Sequence[Sequence[int]]
) -> list[CtaTrace]:
    """The last launch, in which rank r received counts_We[r] rows for each of its experts."""
    shape = Shape(emulator.config, emulator.kernel, emulator.layout)
    streams = [stream_of(shape, counts_e, emulator.num_ctas) for counts_e in counts_We]
    traces = []
    for (rank, cta), record in sorted(recorder.records.items()):
        # The last ticket of a CTA is one past the stream.
        assert sorted(record.tiles) == list(range(len(record.tickets) - 1))
        worked = [(ticket, record.tiles[n]) for n, ticket in enumerate(record.tickets[:-1])]
        tiles = [TileTimes(*streams[rank][ticket], *times) for ticket, times in worked]
        traces.append(CtaTrace(rank, cta, record.marks, tiles))
    return traces
