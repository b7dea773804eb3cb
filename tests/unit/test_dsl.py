"""One source, two executions: integer logic is traced into a kernel and is plain elsewhere."""

from __future__ import annotations

import pytest

from megamoe import dsl, schedule, wire

cutlass = pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl, which is not installed")
import cutlass.cute as cute  # noqa: E402
from cutlass import Int32  # noqa: E402
from cutlass.cute.runtime import make_fake_compact_tensor  # noqa: E402

pytestmark = pytest.mark.compile

COUNTS = [5, 0, 9, 1]
WALK_ARGS = (COUNTS, 4, 4, 2, 3, 2, 6, 4)


def plain_results():
    """Everything the kernels below trace, as plain Python."""
    walk = schedule.seek_walk(schedule.start_walk(COUNTS, 4), 9, *WALK_ARGS)
    position = schedule.seek_pull(schedule.PullWalk(0, 0, 0), 14, COUNTS, 4, 4)
    return (
        walk,
        schedule.tile_of(walk, 9),
        position,
        schedule.pick_source(COUNTS, 0, 1, 4, 7),
        wire.encode_source(3, 5, 10),
        wire.source_rank(36, 10),
        wire.source_slot(36, 10),
        schedule.ring_row(5, 4, 4),
        *schedule.share_of(9, 1, 3, 64, 2),
    )


@pytest.fixture
def build(tmp_path):
    """Compile a host function for sm_90a without a GPU: returns the PTX."""

    def compile_(host, *lengths):
        tensors = [
            make_fake_compact_tensor(Int32, (length,), assumed_align=4) for length in lengths
        ]
        options = f"--gpu-arch sm_90a --keep-ptx --keep-cubin --dump-dir {tmp_path}"
        compiled = cute.compile(host, *tensors, options=options)
        assert compiled.__cubin__
        return compiled.__ptx__

    return compile_


def test_plain_functions_return_plain_integers():
    assert not dsl.tracing()
    walk, tile, position, (rank, index), *codes = plain_results()
    values = [*walk, *tile, *position, rank, index, *codes]
    assert all(type(value) is int for value in values)


def test_decorated_functions_keep_their_names_and_docs():
    assert schedule.seek_walk.__name__ == "seek_walk"
    assert "PHASE_DONE past the end" in schedule.seek_walk.__doc__


@cute.kernel
def walk_kernel(counts: cute.Tensor, out: cute.Tensor):
    tid, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    num_experts = Int32(4)
    walk = schedule.start_walk(counts, num_experts)
    ticket = cta + tid
    walk = schedule.seek_walk(walk, ticket, counts, num_experts, 4, 2, 3, 2, Int32(6), Int32(4))
    if walk.phase != schedule.PHASE_DONE:
        tile = schedule.tile_of(walk, ticket)
        out[tid] = (
            tile.column + 8 * tile.pool + schedule.rows_in_block(counts[walk.expert], tile.block, 4)
        )


@cute.kernel
def pull_kernel(counts: cute.Tensor, out: cute.Tensor):
    tid, _, _ = cute.arch.thread_idx()
    zero = tid * 0
    position = schedule.PullWalk(zero, zero, zero)
    position = schedule.seek_pull(position, tid, counts, Int32(4), 4)
    rank, index = schedule.pick_source(counts, zero, Int32(1), 4, tid)
    code = wire.encode_source(rank, index, 10)
    out[tid] = position.expert + wire.source_rank(code, 10) + wire.source_slot(code, 10)


@cute.jit
def walk_host(counts: cute.Tensor, out: cute.Tensor):
    walk_kernel(counts, out).launch(grid=(2, 1, 1), block=(32, 1, 1))


@cute.jit
def pull_host(counts: cute.Tensor, out: cute.Tensor):
    pull_kernel(counts, out).launch(grid=(1, 1, 1), block=(32, 1, 1))


@pytest.mark.parametrize("host", [walk_host, pull_host], ids=["walk", "pull"])
def test_integer_logic_compiles_for_hopper_and_stays_plain(build, host):
    before = plain_results()
    ptx = build(host, 4, 64)
    assert ".target sm_90a" in ptx
    assert "ld.global" in ptx and "st.global" in ptx
    assert ".local" not in ptx, "a walk must live in registers"
    assert not dsl.tracing()
    assert plain_results() == before
    build(host, 4, 64)  # and it traces again after the plain form ran
    assert plain_results() == before


def test_tracing_is_seen_inside_a_kernel_only(build):
    seen = []

    @dsl.jit
    def double(value):
        return value + value

    @cute.kernel
    def kernel(counts: cute.Tensor, out: cute.Tensor):
        seen.append(dsl.tracing())
        out[0] = double(counts[0])

    @cute.jit
    def host(counts: cute.Tensor, out: cute.Tensor):
        kernel(counts, out).launch(grid=(1, 1, 1), block=(32, 1, 1))

    assert double(21) == 42
    build(host, 4, 4)
    assert seen and all(seen)
    assert not dsl.tracing()
    assert double(21) == 42
