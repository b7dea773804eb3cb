"""The task stream and the dispatch arithmetic, against brute-force models of what they must do."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest

from megamoe import schedule
from megamoe.schedule import PHASE_DONE, PHASE_FC1, PHASE_FC2, PullWalk, Tile

BLOCK_M = 4  # small, so that a few rows make partial, whole and several blocks


class Stream:
    """The whole task stream of one set of counts: its segments and its tiles by ticket."""

    def __init__(self, counts, group, fc1_columns, fc2_columns, lag, ring, block_m=BLOCK_M):
        counts = tuple(counts)  # which nobody may write
        self.counts, self.block_m, self.group = counts, block_m, group
        self.fc1_columns, self.fc2_columns = fc1_columns, fc2_columns
        self.lag, self.ring = lag, ring
        self.args = (counts, len(counts), block_m, group, fc1_columns, fc2_columns, lag, ring)
        self.start = schedule.start_walk(counts, len(counts))
        self.segments, self.tiles = [], []
        walk = self.start
        # Every segment holds at least one tile of one of the two phases: more steps mean no end.
        for _ in range(2 * sum(self.blocks_of(e) for e in range(len(counts))) + 1):
            walk = schedule.advance_walk(walk, *self.args)
            if walk.phase == PHASE_DONE:
                break
            self.segments.append(walk)
            self.tiles += [
                (walk.phase, walk.expert, *schedule.tile_of(walk, ticket))
                for ticket in range(walk.begin, walk.begin + walk.size)
            ]
        assert walk.phase == PHASE_DONE, "the stream does not end"
        self.done = walk

    def blocks_of(self, expert):
        return -(-self.counts[expert] // self.block_m)

    @property
    def first_blocks(self):
        return [0, *accumulate(self.blocks_of(e) for e in range(len(self.counts)))]

    def expected_tiles(self):
        return {
            (phase, expert, block, self.first_blocks[expert] + block, column)
            for phase, columns in ((PHASE_FC1, self.fc1_columns), (PHASE_FC2, self.fc2_columns))
            for expert in range(len(self.counts))
            for block in range(self.blocks_of(expert))
            for column in range(columns)
        }


EDGE_STREAMS = {
    "no experts with rows": ([0, 0, 0], 2, 3, 2, 4, 4),
    "one row": ([1], 1, 3, 2, 0, 1),
    "one row in the last expert": ([0, 0, 1], 2, 3, 2, 4, 2),
    "one row in the first expert": ([1, 0, 0], 2, 3, 2, 4, 2),
    "exactly one block": ([4], 1, 2, 5, 0, 1),
    "one row more than a block": ([5], 2, 2, 5, 0, 2),
    "empty experts between": ([3, 0, 0, 9, 0, 1], 2, 3, 2, 5, 4),
    "group larger than all blocks": ([3, 2, 4], 8, 3, 2, 5, 8),
    "ring equals group": ([40, 3, 17], 3, 4, 2, 1000, 3),
    "ring of one": ([9, 9, 1], 1, 4, 2, 1000, 1),
    "lag of zero": ([40, 3, 17], 3, 4, 2, 0, 64),
    "lag never reached": ([40, 3, 17], 3, 4, 2, 10**6, 64),
    "one column each": ([7, 0, 12, 4], 2, 1, 1, 3, 8),
    "one group exactly": ([16], 4, 3, 2, 0, 4),
    "one row past a group": ([17], 4, 3, 2, 0, 4),
    "one huge expert": ([0, 401, 0], 8, 16, 28, 264, 24),
}


def random_stream(seed):
    rng = random.Random(seed)
    experts = rng.randint(1, 9)
    counts = [rng.choice([0, 0, 1, 3, 4, 5, rng.randint(0, 60)]) for _ in range(experts)]
    group = rng.randint(1, 5)
    ring = group + rng.choice([0, 0, 1, rng.randint(0, 30)])
    lag = rng.choice([0, 1, rng.randint(0, 40), 10**6])
    return counts, group, rng.randint(1, 6), rng.randint(1, 6), lag, ring


STREAMS = [pytest.param(args, id=name) for name, args in EDGE_STREAMS.items()]
STREAMS += [pytest.param(random_stream(seed), id=f"seed {seed}") for seed in range(40)]


@pytest.mark.parametrize("name", EDGE_STREAMS)
def test_experts_without_rows_may_be_left_out(name):
    """The kernel walks over the experts with rows only; the others change nothing but numbers."""
    counts, *rest = EDGE_STREAMS[name]
    ids = [expert for expert, count in enumerate(counts) if count]
    # A word past the counts, as the traced form may read one: its value must not matter.
    stream, dense = Stream(counts, *rest), [*(counts[e] for e in ids), 99]
    args = (dense, len(ids), BLOCK_M, *rest)
    walk, tiles = schedule.start_walk(dense, len(ids)), []
    for _ in range(len(stream.segments)):
        walk = schedule.advance_walk(walk, *args)
        tiles += [
            (walk.phase, ids[walk.expert], *schedule.tile_of(walk, ticket))
            for ticket in range(walk.begin, walk.begin + walk.size)
        ]
    assert tiles == stream.tiles
    assert schedule.advance_walk(walk, *args).phase == PHASE_DONE
    whole, short = PullWalk(0, 0, 0), PullWalk(0, 0, 0)
    for row in range(sum(counts)):
        whole = schedule.seek_pull(whole, row, counts, len(counts), BLOCK_M)
        short = schedule.seek_pull(short, row, dense, len(ids), BLOCK_M)
        assert (whole.expert, *whole[1:]) == (ids[short.expert], *short[1:])
    assert schedule.seek_pull(short, sum(counts), dense, len(ids), BLOCK_M).expert == len(ids)


@pytest.mark.parametrize("args", STREAMS)
def test_every_tile_comes_exactly_once(args):
    stream = Stream(*args)
    assert len(stream.tiles) == len(set(stream.tiles))
    assert set(stream.tiles) == stream.expected_tiles()


@pytest.mark.parametrize("args", STREAMS)
def test_tickets_are_contiguous(args):
    stream = Stream(*args)
    ends = [0, *(walk.begin + walk.size for walk in stream.segments)]
    assert [walk.begin for walk in stream.segments] == ends[:-1]
    assert all(walk.size > 0 for walk in stream.segments)
    assert stream.done.begin == ends[-1] and stream.done.size == 0 and stream.done.blocks == 0


@pytest.mark.parametrize("args", STREAMS)
def test_segment_is_one_unit(args):
    """A unit is whole blocks of one expert: at most `group`, and less only at the expert's end."""
    stream = Stream(*args)
    for walk in stream.segments:
        assert walk.block % stream.group == 0
        assert walk.blocks == min(stream.group, stream.blocks_of(walk.expert) - walk.block)
        assert walk.pool == stream.first_blocks[walk.expert] + walk.block


@pytest.mark.parametrize("args", STREAMS)
def test_no_tile_waits_for_a_later_one(args):
    """FC2 of a block after all its FC1; FC1 of block b after all FC2 of block b - ring."""
    stream = Stream(*args)
    first, last = {}, {}
    for ticket, (phase, _, _, pool, _) in enumerate(stream.tiles):
        first.setdefault((phase, pool), ticket)
        last[phase, pool] = ticket
    for pool in range(stream.first_blocks[-1]):
        assert last[PHASE_FC1, pool] < first[PHASE_FC2, pool]
        if pool >= stream.ring:
            assert last[PHASE_FC2, pool - stream.ring] < first[PHASE_FC1, pool]


@pytest.mark.parametrize("args", STREAMS)
def test_outstanding_tiles_and_lag(args):
    """`outstanding` counts FC1 tiles ahead; FC1 goes on within the lag while the ring has room."""
    stream = Stream(*args)
    fc1_blocks = fc2_blocks = 0
    fc1_units = [(w.expert, w.blocks) for w in stream.segments if w.phase == PHASE_FC1]
    for walk in stream.segments:
        lead = (fc1_blocks - fc2_blocks) * stream.fc1_columns
        emitted = sum(1 for w in stream.segments if w.phase == PHASE_FC1 and w.begin < walk.begin)
        more = emitted < len(fc1_units)
        fits = more and fc1_blocks + fc1_units[emitted][1] - fc2_blocks <= stream.ring
        assert (walk.phase == PHASE_FC1) == (more and fits and lead <= stream.lag)
        if walk.phase == PHASE_FC1:
            fc1_blocks += walk.blocks
        else:
            fc2_blocks += walk.blocks
        assert walk.outstanding == (fc1_blocks - fc2_blocks) * stream.fc1_columns
        assert 0 <= walk.outstanding <= stream.lag + stream.group * stream.fc1_columns
        assert fc1_blocks - fc2_blocks <= stream.ring
    assert fc1_blocks == fc2_blocks == stream.first_blocks[-1]


@pytest.mark.parametrize("args", STREAMS)
def test_seek_from_any_position_equals_stepping(args):
    stream = Stream(*args)
    rng = random.Random(len(stream.tiles))
    positions = [stream.start, *stream.segments]
    for _ in range(60):
        walk = rng.choice(positions)
        if walk.begin >= len(stream.tiles):
            continue
        ticket = rng.randrange(walk.begin, len(stream.tiles))
        found = schedule.seek_walk(walk, ticket, *stream.args)
        assert found in stream.segments
        assert found.begin <= ticket < found.begin + found.size
        tile = schedule.tile_of(found, ticket)
        assert (found.phase, found.expert, *tile) == stream.tiles[ticket]


@pytest.mark.parametrize("args", STREAMS)
@pytest.mark.parametrize("beyond", [0, 1, 1000])
def test_seek_past_the_end_is_done_and_stays_done(args, beyond):
    stream = Stream(*args)
    walk = schedule.seek_walk(stream.start, len(stream.tiles) + beyond, *stream.args)
    assert walk.phase == PHASE_DONE
    again = schedule.seek_walk(walk, len(stream.tiles) + beyond + 7, *stream.args)
    assert again.phase == PHASE_DONE and again.begin == walk.begin


@pytest.mark.parametrize("num_ctas", [1, 3, 8])
@pytest.mark.parametrize("seed", range(8))
def test_tickets_shared_by_ctas_cover_the_stream(seed, num_ctas):
    """CTAs that take tickets in any interleaving, each with its own walk, do every tile once."""
    stream = Stream(*random_stream(seed))
    rng = random.Random(seed)
    walks = [stream.start] * num_ctas
    done = []
    for ticket in range(len(stream.tiles)):
        cta = rng.randrange(num_ctas)
        walks[cta] = walk = schedule.seek_walk(walks[cta], ticket, *stream.args)
        done.append((walk.phase, walk.expert, *schedule.tile_of(walk, ticket)))
    assert done == stream.tiles


def test_real_shape_stream():
    """The order at a production shape: two FC1 units ahead, groups of eight, a ring of 384."""
    rng = random.Random(5)
    counts = [rng.randint(0, 2000) for _ in range(32)]
    stream = Stream(counts, 8, 16, 28, 2 * 132, 384, block_m=128)
    assert set(stream.tiles) == stream.expected_tiles()
    phases = [walk.phase for walk in stream.segments]
    assert phases[:3] == [PHASE_FC1, PHASE_FC1, PHASE_FC1]
    assert phases[-1] == PHASE_FC2


def test_neighbouring_tickets_share_a_weight_tile():
    """Inside a unit, blocks run fastest: `blocks` neighbouring tickets have the same column."""
    stream = Stream([4 * 6], 3, 4, 2, 0, 8)
    unit = stream.segments[0]
    columns = [schedule.tile_of(unit, t).column for t in range(unit.begin, unit.begin + unit.size)]
    assert columns == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert schedule.tile_of(unit, 4) == Tile(block=1, pool=1, column=1)


# --- rows and blocks


@pytest.mark.parametrize("a,b,expected", [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (7, 1, 7)])
def test_ceil_div(a, b, expected):
    assert schedule.ceil_div(a, b) == expected


@pytest.mark.parametrize("count", [1, 3, 127, 128, 129, 256, 300])
@pytest.mark.parametrize("block_m", [1, 64, 128])
def test_rows_in_block_add_up(count, block_m):
    rows = [schedule.rows_in_block(count, b, block_m) for b in range(-(-count // block_m))]
    assert sum(rows) == count
    assert all(0 < r <= block_m for r in rows)
    assert all(r == block_m for r in rows[:-1])


@pytest.mark.parametrize(
    "counts,start,expected",
    [
        ([0, 0, 2], 0, 2),
        ([0, 0, 2], 2, 2),
        ([0, 0], 0, 2),
        ([1], 0, 0),
        ([1, 0, 0], 1, 3),
        ([], 0, 0),
    ],
)
def test_skip_empty(counts, start, expected):
    assert schedule.skip_empty(counts, len(counts), start) == expected


@pytest.mark.parametrize("ring", [1, 2, 7, 384])
def test_ring_rows_of_consecutive_blocks_do_not_meet(ring):
    for first in (0, 1, ring, 10**6):
        rows = [schedule.ring_row(first + i, ring, 128) for i in range(ring)]
        assert sorted(rows) == [128 * i for i in range(ring)]
    assert schedule.ring_row(3 + ring, ring, 128) == schedule.ring_row(3, ring, 128)


# --- dispatch


def random_counts(seed, length, high):
    rng = random.Random(seed)
    return [rng.choice([0, 0, 1, BLOCK_M, rng.randint(0, high)]) for _ in range(length)]


PULL_COUNTS = [[], [0], [0, 0, 0], [1], [0, 5], [5, 0], [4, 4, 4], [1, 0, 0, 0, 1]]
PULL_COUNTS += [random_counts(seed, 1 + seed % 7, 20) for seed in range(20)]


@pytest.mark.parametrize("counts", PULL_COUNTS, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_seek_pull_finds_the_expert_of_every_row(counts, stride):
    """A warp that moves one position over rows first, first + stride, ... agrees with a table."""
    table = [
        (expert, row - first, block)
        for expert, (first, block) in enumerate(
            zip(
                [0, *accumulate(counts)],
                [0, *accumulate(-(-c // BLOCK_M) for c in counts)],
                strict=True,
            )
        )
        if expert < len(counts)
        for row in range(first, first + counts[expert])
    ]
    assert len(table) == sum(counts)
    for first in range(stride):
        position = PullWalk(0, 0, 0)
        for row in range(first, sum(counts), stride):
            position = schedule.seek_pull(position, row, counts, len(counts), BLOCK_M)
            found = (position.expert, row - position.first_row, position.first_block)
            assert found == table[row]


@pytest.mark.parametrize("counts", PULL_COUNTS, ids=str)
def test_seek_pull_past_the_last_row(counts):
    total = sum(counts)
    for row in (total, total + 1, total + 1000):
        position = schedule.seek_pull(PullWalk(0, 0, 0), row, counts, len(counts), BLOCK_M)
        assert position.expert == len(counts)
        assert position.first_row == total
        assert position.first_block == sum(-(-c // BLOCK_M) for c in counts)


@pytest.mark.parametrize("counts", PULL_COUNTS, ids=str)
def test_pull_and_walk_agree_on_pool_blocks(counts):
    """The rows that dispatch puts into a pool block are those that the stream expects there."""
    stream = Stream(counts, 2, 1, 1, 3, 4)
    pulled = {}
    position = PullWalk(0, 0, 0)
    for row in range(sum(counts)):
        position = schedule.seek_pull(position, row, counts, len(counts), BLOCK_M)
        index = row - position.first_row
        block = position.first_block + index // BLOCK_M
        pulled[block] = pulled.get(block, 0) + 1
    expected = {
        pool: schedule.rows_in_block(counts[expert], block, BLOCK_M)
        for phase, expert, block, pool, _ in stream.tiles
        if phase == PHASE_FC1
    }
    assert pulled == expected


def round_robin(counts):
    """Brute force: in every round each rank that has rows left gives one, in rank order."""
    rounds = range(max(counts, default=0))
    return [(rank, turn) for turn in rounds for rank, count in enumerate(counts) if count > turn]


SOURCE_COUNTS = [
    [1],
    [7],
    [0, 3],
    [3, 0],
    [2, 2],
    [1, 5, 1],
    [0, 0, 4, 0],
    [5, 4, 3, 2, 1],
    [0, 9, 0, 9],
]
SOURCE_COUNTS += [random_counts(100 + seed, 1 + seed % 8, 15) for seed in range(24)]
SOURCE_COUNTS += [random_counts(7, 72, 6)]


@pytest.mark.parametrize("counts", SOURCE_COUNTS, ids=str)
def test_pick_source_is_the_balanced_permutation(counts):
    expected = round_robin(counts)
    picked = [schedule.pick_source(counts, 0, 1, len(counts), i) for i in range(sum(counts))]
    assert picked == expected
    assert sorted(picked) == [(rank, i) for rank, count in enumerate(counts) for i in range(count)]


@pytest.mark.parametrize("base,stride", [(0, 1), (3, 1), (0, 6), (5, 16)])
def test_pick_source_reads_strided_counts(base, stride):
    """Counts lie in records of other words, which it must not read as counts."""
    counts = [4, 0, 7, 1]
    table = [10**6] * (base + stride * len(counts))
    for rank, count in enumerate(counts):
        table[base + rank * stride] = count
    picked = [schedule.pick_source(table, base, stride, len(counts), i) for i in range(sum(counts))]
    assert picked == round_robin(counts)


@pytest.mark.parametrize("seed", range(10))
def test_pick_source_spreads_any_window_over_the_ranks(seed):
    """While all ranks have rows, W neighbouring rows come from W different ranks."""
    rng = random.Random(seed)
    counts = [rng.randint(10, 30) for _ in range(8)]
    for start in range(8 * min(counts) - 8):
        window = [schedule.pick_source(counts, 0, 1, 8, start + i)[0] for i in range(8)]
        assert sorted(window) == list(range(8))


def test_pick_source_cost_does_not_grow_with_the_count():
    """A million rounds in: whole rounds are peeled off, not stepped through."""
    counts = [2**20, 2**20 - 1, 3, 2**27]
    whole_rounds = 10**6
    index = 3 * 4 + 3 * (whole_rounds - 3)  # three rounds of four ranks, then rank 2 is out
    for turn, rank in enumerate([0, 1, 3]):
        picked = schedule.pick_source(counts, 0, 1, 4, index + turn)
        assert picked == (rank, whole_rounds)
    assert schedule.pick_source(counts, 0, 1, 4, sum(counts) - 1) == (3, 2**27 - 1)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128])
def test_shares_cover_every_row_once(rows):
    """Warpgroups that compute hold all rows between them and arrive for everybody."""
    for turn in range(4):
        shares = [schedule.share_of(rows, wg, turn, 64, 2) for wg in range(2)]
        working = [share for share in shares if share.active]
        assert sorted(share.half for share in working) == list(range(-(-rows // 64)))
        assert sum(share.arrivals for share in working) == 2


def test_warpgroups_alone_take_turns():
    alone = [
        [wg for wg in range(2) if schedule.share_of(9, wg, turn, 64, 2).active] for turn in range(4)
    ]
    assert alone == [[0], [1], [0], [1]]
