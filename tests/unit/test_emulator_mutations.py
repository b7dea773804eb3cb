"""Every operation of the protocol is needed: without it some launch fails visibly."""

from __future__ import annotations

import pytest

from megamoe.emulator import OPERATIONS, UnorderedAccess
from megamoe.emulator.operations import KINDS, TABLE
from megamoe.faults import MegaMoEError
from megamoe.precision import PRECISIONS
from tests.emulated import Layer, WrongResult

NEEDED = [label for label, operation in OPERATIONS.items() if not operation.redundant]
#: Labels of NEEDED that are tried with scales as well: their own, and what the scales rely on.
OF_SCALES = [
    label
    for label in NEEDED
    if "bf16" not in OPERATIONS[label].recipes
    or label.startswith(("dispatch.", "load_tokens.fc", "report.fc1_"))
    or label in ("dispatched.before", "dispatched.wait", "math.stage_full.acquire")
]
#: (recipe, label): dropped there, it makes a launch fail, or does not.
TRIED = [
    (precision, label)
    for label in NEEDED
    for precision in OPERATIONS[label].recipes
    if precision == "bf16" or label in OF_SCALES
]
SPARED = [
    (precision, label)
    for label in NEEDED
    for precision in PRECISIONS
    if precision not in OPERATIONS[label].recipes
]
REDUNDANT = [label for label, operation in OPERATIONS.items() if operation.redundant]

#: What the store buffers show by themselves, as hardware would: no clocks are compared.
SHOWN_BY_VALUES = [
    "count.histogram_barrier",
    "count.quantize",
    "dispatched.wait",
    "dispatch.ring_wait",
    "dispatch.load_wait",
    "dispatch.scale_wait",
    "dispatch.group_wait",
    "dispatch.drain_wait",
    "dispatch.arrive.release",
    "load_weights.queue_full.release",
    "load_tokens.fc1_wait",
    "load_tokens.fc1_wait.acquire",
    "load_tokens.fc2_wait",
    "load_tokens.stage_full.release",
    "load_tokens.metadata_full.release",
    "math.stage_full",
    "math.metadata_full",
    "math.warp_sync",
    "report.stored",
    "report.clean_end",
    "combined.reported",
    "combined.wait",
    "cleanup.epoch",
]

ROUTINGS = ("uniform", "skewed", "ragged")


pytestmark = pytest.mark.usefixtures("one_thread")


def make_layer(drop, precision: str = "bf16") -> Layer:
    """Two ranks of six experts, two tile columns in FC1 and FC2, and a ring of two pool blocks,
    which is used three times over.
    """
    overrides = {"pool_blocks": 2}
    layer = Layer(
        2,
        8,
        2,
        experts=12,
        hidden=384,
        inner=256,
        overrides=overrides,
        precision=precision,
        drop=drop,
    )
    layer.emulator.runtime.max_steps = 50_000
    return layer


def run(layer: Layer, seed: int) -> None:
    for number, routing in enumerate(ROUTINGS):
        layer.check(routing, 10 * seed + number)
    layer.emulator.assert_at_rest()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_fails_when_nothing_is_dropped(precision, seed):
    run(make_layer(None, precision), seed)


@pytest.mark.parametrize("precision,label", TRIED)
def test_dropping_an_operation_fails(precision, label):
    with pytest.raises((MegaMoEError, WrongResult)):
        for seed in range(4):
            run(make_layer(label, precision), seed)


@pytest.mark.parametrize("precision,label", SPARED)
def test_a_recipe_that_does_not_need_an_operation(precision, label):
    for seed in range(2):
        run(make_layer(label, precision), seed)


@pytest.mark.parametrize("label", REDUNDANT)
def test_a_redundant_operation_gives_no_order_of_its_own(label):
    for seed in range(2):
        run(make_layer(label), seed)


@pytest.mark.parametrize("label", [label for label in REDUNDANT if OPERATIONS[label].twin])
def test_one_of_two_redundant_operations_must_stay(label):
    with pytest.raises(MegaMoEError):
        run(make_layer((label, OPERATIONS[label].twin)), 0)


@pytest.mark.parametrize(
    "drop,access",
    [
        ("load_tokens.metadata_full.release", "role math: read"),
        ("math.metadata_full.acquire", "role math: read"),
        (("math.keep_slot", "report.keep_slot"), "role (load_tokens: write|math: read)"),
    ],
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_padding_metadata_of_a_tile_stays_in_its_slot(precision, drop, access):
    """What fails is that access, and not another that the operations order too."""
    with pytest.raises(UnorderedAccess, match=rf"{access} (to|of) shared\.metadata\["):
        for seed in range(4):
            run(make_layer(drop, precision), seed)


@pytest.mark.parametrize("label", SHOWN_BY_VALUES)
def test_held_back_stores_show_it_too(label):
    """Some seed goes wrong in values alone, not only in the comparison of clocks."""
    precision = OPERATIONS[label].recipes[0]
    with pytest.raises((MegaMoEError, WrongResult)):
        for seed in range(12):
            layer = make_layer(label, precision)
            layer.emulator.memory.check_order = False
            run(layer, seed)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_alone_are_right_when_nothing_is_dropped(precision, seed):
    layer = make_layer(None, precision)
    layer.emulator.memory.check_order = False
    run(layer, seed)


def test_the_table_is_well_formed():
    labels = [operation.label for operation in TABLE]
    assert len(labels) == len(set(labels)), "one operation would hide another"
    for label, operation in OPERATIONS.items():
        assert operation.kind in KINDS and operation.why, label
        assert not operation.twin or operation.twin in OPERATIONS, label
        assert operation.redundant or not operation.twin, label
    assert set(SHOWN_BY_VALUES) <= set(NEEDED)
