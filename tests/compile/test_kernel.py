"""Every variant compiles to sm_90a as it must: registers, spills, WGMMA, TMA, scopes of flags."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from megamoe.config import DISPATCH, GEMMS, PARTS, MoEConfig, select
from megamoe.kernels.sm90 import few_tokens
from megamoe.kernels.sm90.swapped import SWAPPED_TOKENS, fragments_of, part_tokens
from megamoe.precision import PRECISIONS
from tests.compile.sass import Compiled, compile_kernel
from tests.gpu.configs import CONFIGS, split
from tests.nights import at_night

pytestmark = [pytest.mark.compile, pytest.mark.slow]

MODELS = {
    "pro_ep1": MoEConfig(384, 6, 7168, 3072, 64, 1),
    "pro_ep8": MoEConfig(384, 6, 7168, 3072, 32768, 8),
    "flash_ep4": MoEConfig(256, 6, 4096, 2048, 8192, 4),
    "v3_ep1": MoEConfig(32, 8, 7168, 2048, 4096, 1),
    "mimo_ep8": MoEConfig(384, 8, 6144, 2048, 4096, 8),
    "wide_ep72": MoEConfig(288, 8, 7168, 2048, 1024, 72),
}

#: Close to others, in what the compiler makes of them: compiled with --nightly.
SELDOM = (
    "mimo_ep8", "pro_ep1", "wide_ep72", "v3_ep1", "flash_ep4-bf16", "flash_ep4-fp8_channel",
    "pro_ep8-fp8_block", "channel_odd", "block_ring", "flash_ep4-fp8_mxfp4", "flash_ep4-fp8_int4",
    "mxfp4", "int4",
    "pro_ep8-fp8_int4",
)  # fmt: skip
#: pro_ep8-fp8_mxfp4_token has all that is in it.
WITHIN_OTHERS = ("pro_ep8-fp8_mxfp4",)


def variants() -> list:
    params = []

    def add(name: str, config: MoEConfig) -> None:
        marks = [pytest.mark.nightly] * (name.startswith(SELDOM) or name in WITHIN_OTHERS)
        params.append(pytest.param(config, select(config), id=name, marks=marks))

    for name in ("small8", "odd_hidden", "narrow", "one_block_ring"):
        marks = [pytest.mark.nightly] * (name != "odd_hidden")
        params.append(pytest.param(*split(CONFIGS[name]), id=name, marks=marks))
    for precision in PRECISIONS:
        for name, config in MODELS.items():
            add(f"{name}-{precision}", replace(config, precision=precision))
    small = "block_odd", "block_ring", "channel_odd", "mxfp4_odd", "mxfp41", "mxfp4_token_odd"
    for name in (*small, "int4_odd", "int41"):
        marks = [pytest.mark.nightly] * name.startswith(SELDOM)
        params.append(pytest.param(*split(CONFIGS[name]), id=name, marks=marks))
    traced = MODELS["flash_ep4"]
    params.append(pytest.param(traced, select(traced, trace=True), id="flash_ep4-trace"))
    return params


def swapped_wgmma() -> Counter:
    """Weights in registers by tokens in shared memory: for every number of tokens both blocks of a
    warpgroup, in parts, with four steps over a K block.
    """
    found: Counter = Counter()
    for tokens in SWAPPED_TOKENS:
        width = part_tokens(tokens)
        found[f"QGMMA.64x{width}x32.F32.E4M3.E4M3"] += 2 * (tokens // width) * 4
    return found


#: For every number of few tokens both blocks of a warpgroup, with four steps over a K block.
FEW_WGMMA = Counter(
    {f"QGMMA.64x{tokens}x32.F32.E4M3.E4M3": 2 * 4 for tokens in few_tokens.VARIANTS}
)
#: WGMMA instructions by recipe and columns. BF16: one K block peeled and one in the loop, of the
#: full tile width. FP8: a K block is two halves of the tile, or four quarters for a warpgroup that
#: computes alone, or with few tokens their number; by channel FC1's mainloops add up over all of K.
WGMMA = {
    "bf16": Counter({"HGMMA.64x256x16.F32.BF16": 2 * 4}),
    "fp8_block": Counter(
        {"QGMMA.64x128x32.F32.E4M3.E4M3": 2 * 4, "QGMMA.64x64x32.F32.E4M3.E4M3": 4 * 4}
    )
    + FEW_WGMMA,
    "fp8_channel": Counter(
        {
            "QGMMA.64x128x32.F32.E4M3.E4M3": 2 * 2 * 4 + 2 * 4,
            "QGMMA.64x64x32.F32.E4M3.E4M3": 4 * 4,
        }
    )
    + FEW_WGMMA
    + FEW_WGMMA,
    "fp8_mxfp4": swapped_wgmma(),
    "fp8_mxfp4_token": Counter({name: 2 * n for name, n in swapped_wgmma().items()}),
    "fp8_int4": swapped_wgmma(),
}


def swapped_waits(promotes: bool) -> Counter:
    """Of few tokens either block's sums complete in turn; else every part of a block, or without
    promotion all of them together.
    """
    found: Counter = Counter()
    for tokens in SWAPPED_TOKENS:
        if fragments_of(tokens) == 2:
            found += Counter({1: 1, 0: 1})
        else:
            found[0] += 2 * (tokens // part_tokens(tokens) if promotes else 1)
    return found


#: Waits for WGMMA groups, by groups that may still be in flight: a sum is read, or a stage given
#: back, only behind one. One more or less in flight reads a sum that is not complete, or lets the
#: tensor cores idle. BF16: in the loop and behind it. With a scale per K block: both halves
#: complete, and of four quarters the first three with the next in flight, then the last; with few
#: tokens one block while the other is in flight, then that, or without scales both.
FEW = len(few_tokens.VARIANTS)
WAITS = {
    "bf16": Counter({1: 1, 0: 1}),
    "fp8_block": Counter({0: 2 + 1 + FEW, 1: 3 + FEW}),
    "fp8_channel": Counter({1: 1 + 3 + FEW, 0: 1 + 2 + 1 + 2 * FEW}),
    "fp8_mxfp4": swapped_waits(True),
    "fp8_mxfp4_token": swapped_waits(False) + swapped_waits(True),
    "fp8_int4": swapped_waits(True),
}


#: In whose PTX the protocol between ranks is looked for: a kernel that `test_variant` builds too.
PROTOCOL = MODELS["pro_ep8"], select(MODELS["pro_ep8"])
#: Empty until a test of this process has built it.
BUILT_PROTOCOL: list[Compiled] = []


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    if not BUILT_PROTOCOL:
        BUILT_PROTOCOL.append(compile_kernel(*PROTOCOL, tmp_path_factory.mktemp("protocol")))
    return BUILT_PROTOCOL[0]


@pytest.mark.parametrize(("config", "kernel"), variants())
def test_variant(config, kernel, tmp_path, capfd):
    built = compile_kernel(config, kernel, tmp_path)
    if (config, kernel) == PROTOCOL:
        BUILT_PROTOCOL.append(built)
    remarks = "".join(capfd.readouterr())
    assert "Used 168 registers" in remarks  # the ptxas report is really there to be read
    assert "0 bytes spill stores, 0 bytes spill loads" in remarks
    assert not re.search(r"C75\d\d|serializ", remarks), "WGMMA was serialised or setmaxnreg dropped"
    assert re.search(r"REG:168 STACK:0 ", built.resources)
    assert built.count("STL") == built.count("LDL") == 0
    assert built.count("USETMAXREG") == 2
    found = Counter(re.findall(r"\b[HQ]GMMA\.\S+", built.sass))
    assert found == WGMMA[config.precision]
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d+)", built.sass)
    assert Counter(int(wait, 16) for wait in waits) == WAITS[config.precision]
    # FC1 and FC2: two boxes of A or three fine ones, and one of B unless it is packed.
    assert built.count("UTMALDG") == 2 * (2 + 3 + (not config.recipe.weights.packed))
    assert built.count("UBLKCP") >= 2  # bulk pull and bulk store


#: Bulk copies of a kernel without dispatch: scales of rows, in boxes of both sizes and two phases,
#: and of weights in two phases.
SCALE_COPIES = {"bf16": 0, "fp8_block": 6}


@pytest.mark.parametrize("only", [part if part == GEMMS else at_night(part) for part in PARTS])
@pytest.mark.parametrize("precision", [at_night("bf16"), "fp8_block"])
def test_a_part_alone(precision, only, tmp_path, capfd):
    config = replace(MODELS["flash_ep4"], precision=precision)
    built = compile_kernel(config, select(config, only=only), tmp_path)
    remarks = "".join(capfd.readouterr())
    assert "0 bytes spill stores, 0 bytes spill loads" in remarks
    assert not re.search(r"C75\d\d|serializ", remarks)
    assert built.count("STL") == built.count("LDL") == 0
    multiplies = only == GEMMS
    assert built.count("HGMMA") + built.count("QGMMA") == multiplies * WGMMA[precision].total()
    assert built.count("UTMALDG") == multiplies * 2 * (2 + 3 + 1)
    assert built.count("USETMAXREG") == multiplies * 2
    to_shared, to_global = (
        len(re.findall(rf"UBLKCP\.{way}", built.sass)) for way in ("S.G", "G.S")
    )
    assert to_shared + to_global == built.count("UBLKCP")
    if only == DISPATCH:
        assert to_shared and to_global
    else:
        assert (to_shared, to_global) == (multiplies * SCALE_COPIES[precision], 0)
    # Nobody waits for what no role of this kernel does: rows, and free ring slots.
    ptx = re.sub(r"[ \t]+", " ", built.ptx)
    assert len(re.findall(r"ld\.acquire\.gpu\.global", ptx)) == 1 + multiplies
    assert len(re.findall(r"ld\.acquire\.sys\.global", ptx)) == 2


def test_remote_flags_use_system_scope(protocol):
    """What peers poll is released at sys scope; a gpu-scope release loses rows over NVLink."""
    ptx = re.sub(r"[ \t]+", " ", protocol.ptx)
    assert re.search(r"red\.release\.sys\.global\.add\.s32", ptx)
    assert re.search(r"fence\.acq_rel\.sys", ptx)
    # Relaxed counts of arrived rows, one per row: after one fence, which follows the atomic that
    # showed all tiles of the block to be stored.
    (relaxed,) = re.finditer(r"red\.relaxed\.sys", ptx)
    before = ptx[: relaxed.start()]
    assert before.rindex("fence.acq_rel.sys") > before.rindex("atom.global.acq_rel.add")


def test_every_wait_acquires_in_its_scope(protocol):
    """Two barriers over all ranks and, in three places, the slots of a token at sys scope; the grid
    sync, the ring slot, FC1's and FC2's rows at gpu scope. The compiler must not drop one because
    its value is unused.
    """
    ptx = re.sub(r"[ \t]+", " ", protocol.ptx)
    assert len(re.findall(r"ld\.acquire\.sys\.global", ptx)) == 2 + 3
    assert len(re.findall(r"ld\.acquire\.gpu\.global", ptx)) == 4


def test_bulk_stores_are_waited_for_in_full(protocol):
    """`.read` waits only promise that shared memory may be reused, not that the row has arrived."""
    waits = re.findall(r"cp\.async\.bulk\.wait_group(\S*)", protocol.ptx)
    assert waits
    assert ".read" not in "".join(waits)


def test_every_tma_read_follows_a_proxy_fence(protocol):
    assert len(re.findall(r"fence\.proxy\.async\.global", protocol.ptx)) >= 3


def test_global_memory_is_left_alone_until_the_kernel_before_has_ended(protocol):
    """The launch may begin beside it (programmatic dependent launch)."""
    ptx = re.sub(r"[ \t]+", " ", protocol.ptx)
    (wait,) = re.finditer(r"griddepcontrol\.wait", ptx)
    touching = re.finditer(r"\b(ld|st|red|atom|cp)\.[a-z0-9_.]*global|ldgsts", ptx)
    first = next(touching)
    assert wait.start() < first.start(), first.group()
    assert len(re.findall(r"griddepcontrol\.launch_dependents", ptx)) == 1


def test_no_multicast(protocol):
    assert "multimem" not in protocol.ptx
    assert "multicast" not in protocol.ptx
