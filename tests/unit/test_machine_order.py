"""Litmus tests of the machine's memory model, in PTX: what is a race, and what is merely late."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

from megamoe.compile import cache_dir
from megamoe.machine import ptx
from megamoe.machine.decode import decode
from megamoe.machine.faults import Deadlock, Fault, Races
from megamoe.machine.machine import Machine
from megamoe.machine.memory import Region

TEXT = """
.extern .shared .align 1024 .b8 smem[];
.visible .entry litmus(.param .u64 data, .param .u64 flags, .param .u32 who)
.reqntid {threads}, 1, 1
{{
.reg .pred %p<9>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
ld.param.b64 %rd0, [data]; ld.param.b64 %rd1, [flags]; ld.param.b32 %r0, [who];
mov.u32 %r1, %tid.x; mov.b32 %r2, smem; setp.eq.s32 %p0, %r1, 0; and.b32 %r3, %r1, 31;
setp.eq.s32 %p1, %r3, 0; shr.u32 %r4, %r1, 5; mov.b32 %r9, 7; mov.u32 %r5, %ctaid.x;
add.s32 %r0, %r0, %r5; setp.eq.s32 %p2, %r0, 1; @%p2 bra $B;
{a}
ret;
$B: {b}
ret;
}}
"""
#: What programs are made of; %p0 is thread 0, %p1 lane 0 of a warp.
WORDS = {
    "WRITE": "@%p0 st.global.b32 [%rd0], %r9;",
    "READ": "@%p0 ld.global.b32 %r10, [%rd0];",
    "SIGNAL": "@%p0 red.release.gpu.global.add.s32 [%rd1], 1;",
    "SIGNAL_SYS": "@%p0 red.release.sys.global.add.s32 [%rd1], 1;",
    "RELAXED": "@%p0 red.relaxed.gpu.global.add.s32 [%rd1], 1;",
    "RELAXED_SYS": "@%p0 red.relaxed.sys.global.add.s32 [%rd1], 1;",
    "FENCE": "fence.acq_rel.sys;",
    "FENCE_GPU": "fence.acq_rel.gpu;",
    "AWAIT": "$L#: ld.relaxed.gpu.global.b32 %r11, [%rd1]; setp.eq.s32 %p5, %r11, 0; @%p5 bra $L#;",
    "AWAIT_SYS": "$L#: ld.relaxed.sys.global.b32 %r11, [%rd1]; setp.eq.s32 %p5, %r11, 0; @%p5 bra $L#;",
    "ACQUIRE": "ld.acquire.gpu.global.b32 %r12, [%rd1];",
    "ACQUIRE_SYS": "ld.acquire.sys.global.b32 %r12, [%rd1];",
    "PROXY": "fence.proxy.async;",
    "PROXY_GLOBAL": "fence.proxy.async.global;",
    "INIT": "@%p0 mbarrier.init.shared.b64 [%r2], 1; bar.sync 0;",
    "EXPECT": "@%p0 mbarrier.arrive.expect_tx.shared.b64 %rd5, [%r2], 16;",
    "COPY": "add.s32 %r13, %r2, 128; @%p0 cp.async.bulk.shared::cluster.global.mbarrier::"
    "complete_tx::bytes [%r13], [%rd0], 16, [%r2];",
    "LANDED": "{ .reg .pred P; W: mbarrier.try_wait.parity.shared.b64 P, [%r2], 0; @P bra D; bra W; D: }",
    "STORE": "cvt.u64.u32 %rd6, %r2; @%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r2], 16;",
    "COMMIT": "cp.async.bulk.commit_group;",
    "DONE": "cp.async.bulk.wait_group 0;",
}


@dataclass
class Result:
    data: torch.Tensor
    flags: torch.Tensor
    machine: Machine


def program(a: str, b: str, threads: int):
    """Words of WORDS and instructions as they are."""
    count = iter(range(1000))

    def spelled(text: str) -> str:
        parts = [
            WORDS.get(part, part) for part in re.split(r"\s*\|\s*|\s(?=[A-Z_]+\b)", text.strip())
        ]
        return "\n".join(part.replace("#", str(next(count))) for part in parts)

    text = TEXT.format(a=spelled(a), b=spelled(b), threads=threads)
    return decode(next(iter(ptx.parse(text).values())))


def run(
    a: str, b: str = "", ranks: int = 1, threads: int = 32, launches: int = 1, fresh: bool = False,
    data: torch.Tensor | None = None, **settings,
) -> Result:  # fmt: skip
    """`a` and `b` as two CTAs of a launch, or with two ranks as a launch each; on data of rank 0."""
    data = torch.zeros(64, dtype=torch.int32) if data is None else data
    flags = torch.zeros(64, dtype=torch.int32)
    code = program(a, b, threads)
    machine = Machine(cache_dir(), ranks, **({"checks": True} | settings))
    machine.memory.add("data", data, 0, [Region("data", 0, 256, 4, fresh)])
    machine.memory.add("flags", flags, 0, [Region("flags", 0, 256, 4)])
    for _ in range(launches):
        for rank in range(ranks):
            values = (data.data_ptr(), 8), (flags.data_ptr(), 8), (rank, 4)
            parameters = b"".join(value.to_bytes(size, "little") for value, size in values)
            machine.launch(code, 2 // ranks, parameters, 8192, rank)
    machine.run()
    return Result(data, flags, machine)


def races(*arguments, **settings) -> str:
    with pytest.raises(Races) as error:
        run(*arguments, **settings)
    return str(error.value)


#: (ranks, what the writer does, what the reader does) of what is ordered, and of what is not.
ORDERED = {
    "release, acquire": (1, "WRITE SIGNAL", "AWAIT ACQUIRE READ"),
    "fence before a relaxed signal": (1, "WRITE FENCE RELAXED", "AWAIT ACQUIRE READ"),
    "fence after a relaxed poll": (1, "WRITE SIGNAL", "AWAIT FENCE READ"),
    "fences on both sides": (2, "WRITE FENCE RELAXED_SYS", "AWAIT_SYS FENCE READ"),
    "sys scope between ranks": (2, "WRITE SIGNAL_SYS", "AWAIT_SYS ACQUIRE_SYS READ"),
    "an atomic in between": (
        1, "WRITE SIGNAL", "AWAIT RELAXED ACQUIRE READ"
    ),
    "a bulk store that is waited for": (1, "STORE COMMIT DONE SIGNAL", "AWAIT ACQUIRE READ"),
    "an async copy after a proxy fence of the reader": (
        1, "WRITE SIGNAL", "INIT EXPECT AWAIT ACQUIRE PROXY COPY LANDED"
    ),
    "an async copy after a proxy fence of the writer": (
        1, "WRITE PROXY_GLOBAL SIGNAL", "INIT EXPECT AWAIT ACQUIRE COPY LANDED"
    ),
    "an async copy of a bulk store": (
        1, "STORE COMMIT DONE SIGNAL", "INIT EXPECT AWAIT ACQUIRE COPY LANDED"
    ),
}  # fmt: skip
UNORDERED = {
    "no acquire": (1, "WRITE SIGNAL", "AWAIT READ"),
    "no release": (1, "WRITE RELAXED", "AWAIT ACQUIRE READ"),
    "a write after the release": (1, "SIGNAL WRITE", "AWAIT ACQUIRE READ"),
    "a read before the acquire": (1, "WRITE SIGNAL", "READ AWAIT ACQUIRE"),
    "a write after a read": (1, "READ", "WRITE"),
    "a write after the fence": (1, "FENCE WRITE RELAXED", "AWAIT ACQUIRE READ"),
    "gpu scope between ranks: release": (2, "WRITE SIGNAL", "AWAIT_SYS ACQUIRE_SYS READ"),
    "gpu scope between ranks: acquire": (2, "WRITE SIGNAL_SYS", "AWAIT_SYS ACQUIRE READ"),
    "gpu scope between ranks: fence": (2, "WRITE FENCE_GPU RELAXED_SYS", "AWAIT_SYS ACQUIRE_SYS READ"),
    "a store over the signal": (
        1, "WRITE SIGNAL | @%p0 st.relaxed.gpu.global.b32 [%rd1], 2;",
        "$M: ld.relaxed.gpu.global.b32 %r11, [%rd1]; setp.ne.s32 %p5, %r11, 2; @%p5 bra $M; | ACQUIRE READ",
    ),
    "a bulk store that nobody waits for": (1, "STORE COMMIT SIGNAL DONE", "AWAIT ACQUIRE READ"),
    "an async copy without a proxy fence": (
        1, "WRITE SIGNAL", "INIT EXPECT AWAIT ACQUIRE COPY LANDED"
    ),
    "a proxy fence before the store": (
        1, "PROXY WRITE SIGNAL", "INIT EXPECT AWAIT ACQUIRE COPY LANDED"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize("held_share", [0, 100])
def test_what_is_ordered(name, held_share):
    ranks, a, b = ORDERED[name]
    for policy in ("eager", "tardy"):
        run(a, b, ranks, held_share=held_share, policy=policy)


@pytest.mark.parametrize("name", UNORDERED)
def test_what_is_not_ordered(name):
    ranks, a, b = UNORDERED[name]
    text = races(a, b, ranks)
    assert re.search(
        r"data\[0\].* of rank 0: (read|write) is not ordered after the (write|read)", text
    )


def test_stores_that_nobody_ordered_stay_unseen():
    """The reader finds the old value, as it may on a GPU; and its own store at once."""
    a, b = "WRITE RELAXED", "AWAIT ACQUIRE READ | @%p0 st.global.b32 [%rd0+8], %r10;"
    for share, seen in ((0, 7), (100, 0)):
        data = torch.zeros(64, dtype=torch.int32)
        with pytest.raises(Races):
            run(a, b, held_share=share, data=data)
        assert data[2] == seen
    own = "WRITE READ | @%p0 st.global.b32 [%rd0+8], %r10;"
    assert run(own, "", held_share=100).data[2] == 7


def test_later_stores_land_later():
    b = "AWAIT ACQUIRE | mov.b32 %r9, 9; | WRITE"
    assert run("WRITE SIGNAL", b, held_share=100).data[0] == 9


SHARED_STORE = "shl.b32 %r15, %r3, 2; add.s32 %r15, %r2, %r15; st.shared.b32 [%r15], %r1;"
NEIGHBOUR = "xor.b32 %r16, %r15, 4; ld.shared.b32 %r17, [%r16];"


def test_lanes_meet_at_a_warp_sync():
    run(f"{SHARED_STORE} | bar.warp.sync -1; | {NEIGHBOUR}")
    text = races(f"{SHARED_STORE} | {NEIGHBOUR}")
    assert "lane 0 of rank 0, CTA 0, warp 0" in text and "lanes 1 to 31" in text


@pytest.mark.parametrize("halves", [("lane 0", "@%p1"), ("the others", "@!%p1")])
def test_who_signals_speaks_for_itself(halves):
    """A release by some lanes does not cover what the others did since the last warp sync."""
    _, guard = halves
    other = "@!%p1" if guard == "@%p1" else "@%p1"
    store = f"{other} st.global.b32 [%rd0], %r9;"
    signal = f"{guard} red.release.gpu.global.add.s32 [%rd1], 1;"
    races(f"{store} | {signal}", "AWAIT ACQUIRE | ld.global.b32 %r10, [%rd0];")


def test_warps_meet_at_barriers():
    store = "setp.eq.s32 %p3, %r4, 0; @%p0 st.shared.b32 [%r2], 5;"
    load = "@!%p3 ld.shared.b32 %r10, [%r2];"
    run(f"{store} | bar.sync 1, 64; | {load}", threads=64)
    assert "warp 1" in races(f"{store} | {load}", threads=64)
    arrive = "@%p3 bar.arrive 2, 64; | @!%p3 bar.sync 2, 64;"
    run(f"{store} | {arrive} | {load}", threads=64)


MBARRIER = "add.s32 %r20, %r2, 64; @%p0 mbarrier.init.shared.b64 [%r20], 1; bar.sync 0;"
AWAIT_PHASE = (
    "{ .reg .pred P; W: mbarrier.try_wait.parity.shared.b64 P, [%r20], 0; @P bra D; bra W; D: }"
)


@pytest.mark.parametrize("relaxed", ["", "arrive", "try_wait"])
def test_warps_meet_at_mbarriers(relaxed):
    a = f"""{MBARRIER} | setp.eq.s32 %p3, %r4, 0; @!%p3 bra $C;
        @%p1 st.shared.b32 [%r2], 5; @%p1 mbarrier.arrive.shared.b64 %rd5, [%r20]; bra $E;
        $C: {AWAIT_PHASE} ld.shared.b32 %r10, [%r2]; $E:"""
    if relaxed:
        a = a.replace(f"mbarrier.{relaxed}.", f"mbarrier.{relaxed}.relaxed.")
        assert "read is not ordered after the write" in races(a, threads=64)
    else:
        run(a, threads=64)


def test_bytes_that_nobody_wrote():
    text = races("READ", fresh=True)
    assert "data[0] of rank 0: read of what nobody wrote in this launch" in text
    run("WRITE | bar.warp.sync -1; | READ", fresh=True)
    assert (run("", "", fresh=True).data == -1).all(), "what nobody writes is garbage"


def test_shared_bytes_that_nobody_wrote():
    """Each CTA has its own; words that are not needed may travel with one that is."""
    alone = "ld.shared.b32 %r3, [%r2+64];"
    assert "shared" in races(alone) and "nobody wrote" in races(alone)
    assert "nobody wrote" in races(alone, "st.shared.b32 [%r2+64], 1;")
    run(f"@%p0 st.shared.b32 [%r2+64], 1; bar.warp.sync -1; {alone}")
    run("@%p0 st.shared.b32 [%r2+64], 1; bar.warp.sync -1; ld.shared.v2.b32 {%r3, %r4}, [%r2+64];")


def test_bytes_of_another_launch():
    """The second launch reads what only the first has written; stores alternate by a counter."""
    once = "@%p0 ld.relaxed.gpu.global.b32 %r21, [%rd1+16]; setp.ne.s32 %p4, %r21, 0; @%p4 bra $E; | WRITE"
    count = "@%p0 red.relaxed.gpu.global.add.s32 [%rd1+16], 1; $E:"
    text = races(f"{once} | {count} | bar.warp.sync -1; | READ", launches=2, fresh=True)
    assert "read of what another launch wrote" in text or "nobody wrote" in text


def test_tensor_cores_read_after_a_proxy_fence():
    sums = ", ".join(f"%r{30 + i}" for i in range(4))
    product = f"""wgmma.fence.sync.aligned; mov.b64 %rd7, 0x4000004000010040;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{sums}}}, %rd7, %rd7, 0, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"""
    fill = "shl.b32 %r15, %r1, 5; add.s32 %r15, %r2, %r15; st.shared.b32 [%r15], %r9;"
    run(f"{fill} fence.proxy.async.shared::cta; bar.sync 0; | {product}", threads=128)
    text = races(f"{fill} bar.sync 0; | {product}", threads=128)
    assert "tensor cores for rank 0" in text
    with pytest.raises(Fault, match="used since the last wgmma.fence"):
        touched = product.replace("wgmma.fence.sync.aligned;", "mov.b32 %r30, 0;")
        run(f"{fill} fence.proxy.async.shared::cta; bar.sync 0; | {touched}", threads=128)


def group(a: int, d: int) -> str:
    """A product of A in %r{a}..., added up in %r{d}..., as a group of its own."""
    left, sums = (", ".join(f"%r{first + i}" for i in range(4)) for first in (a, d))
    return f"""wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {{{sums}}}, {{{left}}}, %rd7, 1, 1, 1;
        wgmma.commit_group.sync.aligned;"""


@pytest.mark.parametrize("policy", ["eager", "tardy"])
@pytest.mark.parametrize(
    ("after_fence", "in_flight", "one_left", "message"),
    [
        ("", "", "", ""),
        ("", "mov.b32 %r3, %r20;", "", ""),  # A is read
        ("", "mov.b32 %r28, 0;", "", ""),  # of nobody
        ("", "", "mov.b32 %r20, 0; mov.b32 %r3, %r30;", ""),  # of the group that is complete
        ("mov.b32 %r21, 0;", "", "", "used since the last wgmma.fence"),
        ("", "mov.b32 %r20, 0;", "", "mov.b32.*no wgmma.wait_group has completed"),
        ("", "ld.shared.v2.b32 {%r3, %r23}, [%r2];", "", "ld.shared.*has completed"),
        ("", "", "shl.b32 %r27, %r3, 1;", "shl.b32.*has completed"),
        ("", "mov.b32 %r3, %r31;", "", "mov.b32.*has completed"),
        ("", "", "mov.b32 %r3, %r35;", "mov.b32.*has completed"),
        ("", "st.shared.b32 [%r15], %r35;", "", "st.shared.*has completed"),
    ],
)
def test_registers_of_products_belong_to_them(policy, after_fence, in_flight, one_left, message):
    """%r20 to 23 and 24 to 27 are A of two groups, %r30 to 33 and 34 to 37 their sums."""
    text = f"""shl.b32 %r15, %r1, 5; add.s32 %r15, %r2, %r15; st.shared.b32 [%r15], %r9;
        fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %rd7, 0x4000004000010040;
        mov.b32 %r20, 1; mov.b32 %r24, 1; wgmma.fence.sync.aligned; {after_fence}
        {group(20, 30)} {group(24, 34)} {in_flight} wgmma.wait_group.sync.aligned 1; {one_left}
        wgmma.wait_group.sync.aligned 0; mov.b32 %r20, %r30; mov.b32 %r24, %r34;"""
    if not message:
        run(text, threads=128, policy=policy)
        return
    with pytest.raises(Fault, match=message):
        run(text, threads=128, policy=policy)


def test_waits_for_an_mbarrier_may_end_without_its_phase():
    """Where nobody else can go on: a wait is a loop, or it gives up."""
    once = "mbarrier.try_wait.parity.shared.b64 %p5, [%r2], 0; @!%p5 st.global.b32 [%rd0], 5;"
    assert run(f"INIT | {once}", f"INIT | {once}", checks=False).data[0] == 5
    polls = "AWAIT | ACQUIRE"  # of somebody who waits for the other to give up
    assert run(f"INIT | {once} | SIGNAL", polls).data[0] == 5


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (
            "@%p0 ld.global.b32 %r10, [%rd0+256];",
            r"no memory there; .* data \+ 256 .*beyond its end",
        ),
        ("@%p0 ld.global.v2.b32 {%r10, %r11}, [%rd0+4];", r"misaligned; last access: data\[1\]"),
        ("ld.shared.b32 %r10, [%r2+8192];", "no memory there; last access: shared 9216"),
        ("@%p0 mbarrier.arrive.shared.b64 %rd5, [%r2];", "no mbarrier there"),
        ("INIT | mbarrier.arrive.shared.b64 %rd5, [%r2], 2;", "too many arrivals at an mbarrier"),
        ("@%p0 bar.warp.sync -1;", "lanes of the mask are missing"),
        ("bar.arrive 1, 64; bar.arrive 1, 32;", "too many threads"),
        ("@%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r2+8], 16;", "multiple of 16"),
        ("STORE COMMIT", "ends before its bulk stores"),
        (
            "INIT | @%p0 mbarrier.arrive.expect_tx.shared.b64 %rd5, [%r2], 16;",
            "while copies come in",
        ),
    ],
)
def test_what_a_gpu_would_not_forgive(a, message):
    with pytest.raises(Fault, match=message):
        run(a)


def test_a_deadlock_says_who_waits_for_what():
    with pytest.raises(Deadlock) as error:
        run("AWAIT", "INIT | EXPECT LANDED", roles=("waiter",))
    text = str(error.value)
    assert (
        "rank 0, CTA 0, warp 0 (waiter)" in text and "polls flags[0] of rank 0, which is 0" in text
    )
    assert re.search(
        r"CTA 1, .* waits for mbarrier of \?\[0\], phase 0: 0 of 1 arrivals and 16 bytes", text
    )
