"""The table of ordering operations agrees with regions, shared memory and the kernel's source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megamoe import ordering
from megamoe.budget import budget_of
from megamoe.config import DISPATCH, GEMMS, KernelConfig, MoEConfig, select
from megamoe.ordering import CTA_BARRIERS, FLAGS, HANDOVER, MATH_WARPS, MBARRIERS, REPORTED
from megamoe.precision import PRECISIONS
from megamoe.regions import layout_of

KERNELS = Path(ordering.__file__).parent / "kernels"
SOURCE = "\n".join(path.read_text() for path in sorted(KERNELS.rglob("*.py")))
FENCES = {name: row for name, row in vars(ordering).items() if isinstance(row, ordering.Fence)}


def config_of(precision: str) -> MoEConfig:
    return MoEConfig(
        num_ranks=2, num_experts=8, top_k=2, hidden_size=256, intermediate_size=256,
        max_tokens_per_rank=64, precision=precision,
    )  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_waited_for_is_atomic_and_what_is_guarded_exists(precision):
    config = config_of(precision)
    layout, configs = layout_of(config), [config_of(name) for name in PRECISIONS]
    everywhere = [layout_of(other).regions for other in configs]
    everywhere += [budget_of(other, select(other)).parts for other in configs]
    for flag in FLAGS:
        assert layout.regions[flag.region].atomic, flag
        assert flag.row is None or flag.row < layout.regions[flag.region].shape[0], flag
    for row in (*FLAGS, *MBARRIERS, *CTA_BARRIERS):
        for name in row.guards:
            assert any(name in names for names in everywhere), (
                f"{row.place} guards {name}, which is nothing"
            )


def test_every_row_has_a_place_of_its_own():
    rows = (*FLAGS, *MBARRIERS, *CTA_BARRIERS)
    assert len({row.place for row in rows}) == len(rows)
    assert len(set(FENCES.values())) == len(FENCES)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, row in vars(ordering).items()
        if isinstance(row, (ordering.Flag, ordering.Fence))
    ],
)
def test_every_flag_and_fence_is_used_by_the_kernel(name):
    assert re.search(rf"\b{name}\b(?!,$|\n)", re.sub(r"(?m)^(from|import) .*$", "", SOURCE)), name


def test_the_kernel_waits_signals_and_fences_by_rows_alone():
    """No scope, number of a barrier or kind of a fence is written where it is used."""
    calls = re.findall(r"(?:wait_for|signal)\(\s*launch,\s*([^,]+),", SOURCE)
    assert len(calls) >= 8
    assert not [call for call in calls if '"' in call], calls
    fences = re.findall(r"fence_proxy\(([^,)]+)", SOURCE)
    assert len(fences) >= 7
    assert all(re.fullmatch(r"([A-Z_0-9]+)\.kind", text) for text in fences), fences
    barriers = re.findall(r"(?:cta_barrier|sync\.arrive)\((?!launch: )launch, ([\w.]+)\)", SOURCE)
    assert len(barriers) >= 8
    assert {b for b in barriers if b.isupper()} <= {
        name for name, row in vars(ordering).items() if isinstance(row, ordering.CtaBarrier)
    }


def test_threads_of_the_barriers():
    """8 math warps, 4 of the front-end: who arrives and who waits, counted by hand."""
    kernel = select(config_of("bf16"))
    assert ordering.WHOLE_CTA.threads(kernel) == 384
    assert MATH_WARPS.threads(kernel) == 256
    assert REPORTED.threads(kernel) == 256 + 32
    assert HANDOVER.threads(kernel) == 256 + 64
    without_tiles = KernelConfig(**{**vars(kernel), "only": DISPATCH})
    assert not without_tiles.runs(GEMMS)
    assert REPORTED.threads(without_tiles) == 256 + 64


def test_arrivals_of_the_mbarriers():
    kernel = select(config_of("bf16"))
    assert {row.name: row.arrivals(kernel) for row in MBARRIERS} == {
        "full": 2, "empty": 8, "queue_full": 1, "queue_empty": 10, "metadata_full": 32,
        "stored": 8, "multiplied": 4, "pulled": 1,
    }  # fmt: skip


def test_reports_say_who_orders_what():
    texts = ordering.explanations()
    assert texts["full"] == "load_tokens, load_weights -> math"
    assert texts["fc1_output"] == (
        "ordered by fc1_done_counter: report -> load_tokens, FC1 tiles of the block"
    )
    assert texts["grid_sync_counter[0]"] == "every CTA -> every CTA, number of CTAs"
    assert texts["barrier 3"] == "dispatch, report -> math"
