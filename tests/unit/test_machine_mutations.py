"""Every ordering operation of the kernel is needed: without it, or with less of it, some launch
fails visibly; or it is listed here with what else gives the same order. All of them are tried
with --nightly, some in every run of the tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from megamoe.faults import InvalidExpertError, LaunchTimeout, MegaMoEError
from megamoe.machine.faults import MachineError
from tests.machine import RING, Layer
from tests.mutants import Mutant, Mutator, install, watch
from tests.nights import at_night

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

#: Routed entries for more than one CTA, tokens that are reduced early, experts for two ballots.
TOKENS = dict(world=2, tokens=200, experts=80, overrides={"pool_blocks": 3})
#: Experts of one or two rows: the last rows of a warp complete different blocks.
FEW = dict(world=2, tokens=6, experts=16, overrides={"pool_blocks": 2})
#: CTAs that reduce tokens early have reports behind: the report warp does both.
REPORTS = dict(world=2, tokens=64, experts=8, hidden=1024, inner=256, overrides={"pool_blocks": 3})
#: One K block: nothing that comes with a second one orders what came with the first.
ONE_BLOCK = dict(world=2, tokens=8, experts=8, overrides={"pool_blocks": 2}, precision="fp8_block")

RING_RUNS = (
    ("uniform", 0), ("skewed", 1), ("ragged", 2), ("uniform", 3), ("skewed", 2), ("skewed", 3)
)  # fmt: skip
TOKENS_RUNS = (("uniform", 4), ("uniform", 7), ("skewed", 9), ("ragged", 6))
FEW_RUNS = tuple((routing, seed) for seed in range(1, 7) for routing in ("uniform", "ragged"))

#: What RING does not show, but the others do.
BY_TOKENS = (
    "no bar_sync barrier 0 by all in (cta_barrier$|count #3)",
    "reads plenty grid_sync_counter by dispatch in wait_for",
    "no (fence|sys scope) by report in fence_system",
    "reads plenty (l1_topk_weights_buffer|token_src_metadata) by load_tokens",
    "no warp_sync by math in store_fc2 #8",
    "no bar_sync barrier 3 by math",
)  # fmt: skip
BY_FEW = (
    "no stores_wait by dispatch in finish_store #4",
    "no release l1_arrival_count by dispatch in signal #4",
)
BY_REPORTS = ("no bar_sync barrier 2 by math",)
BY_ONE_BLOCK = ("(relaxed arrival|no wait|relaxed wait) metadata_full",)
BY_FAULTS = ("no sys scope abort_flag", "no store abort_flag by math")

#: What no launch shows: pattern -> (why, pattern of what gives the same order, or "").
REDUNDANT = {
    "no (release|acquire) grid_sync_counter by dispatch in (signal|load_acquire)": (
        "it orders atomics and strong loads, which always find the last value here", ""),
    "no bar_sync barrier 0 by all in kernel": (
        "two follow before anybody uses what others have set up", ""),
    "no bar_sync barrier 0 by all in cta_barrier #2": (
        "another follows before any but the first warp goes on", ""),
    "no fence by (dispatch|math) in fence_system": (
        "the arrival is a release too", "no release grid_sync_counter by {1} in "),
    "no release grid_sync_counter by (dispatch|math) in $": (
        "a fence before a relaxed atomic is a release too", "no fence by {1} in fence_system"),
    "no sys scope by (dispatch|math) in fence_system": (
        "the arrival is of gpu scope, and the signal carries it on to sys", ""),
    "(no warp_sync|relaxed arrival queue_empty) by load_tokens in release_tile": (
        "every lane arrives at metadata_full before the epilogue, which frees the slot last", ""),
    "relaxed arrival (full|pulled) by (load_tokens|load_weights|dispatch)": (
        "who waits reads only what copies bring, and these complete the phase", ""),
    "no warp_sync by (load_tokens|load_weights) in (load_stages|hand_over)": (
        "it brings the lanes together and orders nothing", ""),
    "no warp_sync by (dispatch|report) in (kernel|pull)": (
        "lanes that are together stay together here", ""),
    "no warp_sync by dispatch in store_piece": (
        "without scales only lane 0 stores; lanes that are together stay together here", ""),
    "no fence_proxy by dispatch in pull$": (
        "the launch is one for what the host has stored", ""),
    "no fence_proxy by dispatch in pull #2": (
        "the slot's old rows were read, and the new are written, by the async proxy", ""),
    "no fence_proxy by load_tokens in load_rows$": (
        "rows come by bulk stores, which belong to the async proxy", ""),
    "no fence_proxy by load_tokens in load_rows #2": (
        "a proxy fence may stand anywhere between store and copy",
        "no fence_proxy by report in report"),
    "no fence_proxy by report in report": (
        "a proxy fence may stand anywhere between store and copy",
        "no fence_proxy by load_tokens in load_rows #2"),
    "reads plenty shared by (dispatch|report) in load_shared_volatile": (
        "who is told to stop too early leaves his tokens to the math warps", ""),
    "no store shared by math in store_shared_volatile": (
        "who is not told to stop reduces the rest of his tokens", ""),
    "no mma_fence by math in  #2": (
        "nobody touches the sums between two groups", ""),
    "relaxed (arrival|wait) multiplied": (
        "it keeps a warpgroup in step with the phases of the stages, and orders no accesses", ""),
    "no warp_sync by math in store_fc1 #4": (
        "another follows before the arrival", "no warp_sync by math in math"),
    "no warp_sync by math in math": (
        "the epilogue ends with one", "no warp_sync by math in store_fc1 #4"),
    "no bar_sync barrier 1 by math in cta_barrier$": (
        "the report warp comes after all that the math warps have stored", ""),
    "no sys scope combine_arrival_count by math in reduce_rest": (
        "after the barrier of all ranks nobody adds", ""),
}  # fmt: skip


def matches(name: str, patterns) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


class Trial:
    """A layer whose kernel is mutated; `attempt` raises what a mutant leads to."""

    def __init__(self, shape: dict, runs, precision: str = "bf16"):
        self.layer = Layer(**({"precision": precision, "patient": False} | shape))
        self.runs = runs
        self.code = watch(self.layer)
        self.attempt()
        self.mutants = Mutator(self.layer, self.code).mutants()
        self.code.seen = None
        self.layer.backend.settings["max_steps"] = 6_000_000

    def attempt(self) -> None:
        for routing, seed in self.runs:
            self.layer.check(routing, seed)
        self.layer.assert_at_rest()

    def missed(self, *mutants: Mutant, attempt: Callable | None = None) -> bool:
        """Whether nothing shows that these mutants are in the kernel."""
        code = self.code
        for mutant in mutants:
            code = mutant.of(code)
        install(self.layer, code)
        self.layer.backend.recover()
        try:
            (attempt or self.attempt)()
        except (MegaMoEError, AssertionError, ValueError):
            return False
        finally:
            install(self.layer, self.code)
        return True

    def named(self, pattern: str) -> list[Mutant]:
        return [mutant for mutant in self.mutants if re.match(pattern, mutant.name)]


@pytest.fixture(scope="module")
def ring() -> Trial:
    return Trial(RING, RING_RUNS)


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(8))
def test_without_an_operation_a_launch_fails(ring, part):
    others = (*BY_TOKENS, *BY_FEW, *BY_REPORTS, *BY_ONE_BLOCK, *BY_FAULTS, *REDUNDANT)
    needed = [mutant for mutant in ring.mutants if not matches(mutant.name, others)]
    assert len(needed) > 150
    assert not [mutant.name for mutant in needed[part::8] if ring.missed(mutant)]


@pytest.mark.parametrize(
    ("shape", "runs", "patterns", "least"),
    [
        at_night(TOKENS, TOKENS_RUNS, BY_TOKENS, 12),
        (FEW, FEW_RUNS, BY_FEW, 2),
        at_night(REPORTS, RING_RUNS[:3], BY_REPORTS, 1),
        (ONE_BLOCK, RING_RUNS[:4], BY_ONE_BLOCK, 4),
    ],
)
def test_what_another_shape_needs(shape, runs, patterns, least):
    trial = Trial(shape, runs)
    found = [mutant for mutant in trial.mutants if matches(mutant.name, patterns)]
    assert len(found) >= least
    assert not [mutant.name for mutant in found if trial.missed(mutant)]


@pytest.mark.nightly
@pytest.mark.parametrize("pattern", REDUNDANT)
def test_a_redundant_operation_gives_no_order_of_its_own(ring, pattern):
    found = ring.named(pattern)
    assert found and all(ring.missed(mutant) for mutant in found)


@pytest.mark.nightly
@pytest.mark.parametrize("pattern", [pattern for pattern, (_, twin) in REDUNDANT.items() if twin])
def test_one_of_two_redundant_operations_must_stay(ring, pattern):
    for mutant in ring.named(pattern):
        parts = re.match(pattern, mutant.name)
        twin = REDUNDANT[pattern][1].format(parts[0], *parts.groups())
        (other,) = [m for m in ring.mutants if m.name == twin]
        assert not ring.missed(mutant, other), (mutant.name, twin)


#: With scales: what these functions do is tried with each recipe that has some, and with so few
#: stages that a tile meets each of them again.
OF_SCALES = (
    r".* in (quantize_input|store_piece|finish_store|signal|hand_over|accumulate_scaled|release)\b"
)
STAGES = RING | dict(overrides={"pool_blocks": 2, "num_stages": 3})
#: What shows nothing there.
SPARED = {
    "no fence_proxy by all in quantize_input": "pull has one too",
    "no fence_proxy by dispatch in store_piece": "load_rows has one too",
    "no warp_sync by load_weights in hand_over": "it orders nothing",
    "no stores_wait by dispatch in finish_store #4": "see BY_FEW",
    "no release l1_arrival_count by dispatch in signal #4": "see BY_FEW",
    "no release fc2_done_counter": "see RING",
    "no release grid_sync_counter": "see RING",
}
SPARED_CHANNEL = {
    "no warp_sync by dispatch in store_piece": "a row has one scale, of lane 0",
    "no mma_wait by math in accumulate_scaled #3": "a wait for all products follows it at once",
}


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["fp8_block", "fp8_channel"])
def test_what_scales_rely_on(precision):
    trial = Trial(STAGES, RING_RUNS, precision)
    spared = SPARED | (SPARED_CHANNEL if precision == "fp8_channel" else {})
    found = [m for m in trial.named(OF_SCALES) if not matches(m.name, spared)]
    assert len(found) > 15
    assert not [mutant.name for mutant in found if trial.missed(mutant)]
    twins = [("no fence_proxy by all in quantize_input", "no fence_proxy by dispatch in pull$")]
    if precision == "fp8_block":
        readers = "no fence_proxy by load_tokens in load_rows$"
        twins += [("no fence_proxy by dispatch in store_piece", readers)]
    for writers, readers in twins:
        assert not trial.missed(*trial.named(writers), *trial.named(readers))


@pytest.mark.nightly
def test_what_a_rank_that_gives_up_needs(ring):
    """One rank's waits time out at once, at different places; the other is told."""
    layer = ring.layer
    layer.backend.settings["patient"] = True

    def attempt() -> None:
        for timeout in (100, 3000, 9000, 20_000):
            for rank, launcher in enumerate(layer.backend.launchers):
                launcher.set(timeout_ns=timeout if rank else 10**12)
            for seed in range(1, 4):
                try:
                    layer.check("uniform", seed)
                except LaunchTimeout as error:
                    assert not isinstance(error, MachineError)

    def invalid() -> None:
        for _ in range(2):
            xs, idx, weights = layer.inputs("uniform", 0)
            idx[0][1, 0] = layer.experts
            try:
                layer.forward((xs, idx, weights))
            except InvalidExpertError:
                continue
            raise AssertionError("nobody has reported it")

    found = [m for m in ring.mutants if matches(m.name, BY_FAULTS)]
    noticed = [m.name for m in found if not ring.missed(m, attempt=attempt)]
    noticed += [m.name for m in found if not ring.missed(m, attempt=invalid)]
    layer.backend.settings["patient"] = False
    for launcher in layer.backend.launchers:
        launcher.set(timeout_ns=30 * 10**9)
    assert len(noticed) > 8
