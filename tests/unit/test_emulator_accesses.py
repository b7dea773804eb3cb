"""Who accesses which region: what the table of regions says is what the roles do."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from megamoe.emulator import UnorderedAccess
from megamoe.emulator.memory import Data, Word
from megamoe.precision import PRECISIONS
from megamoe.reference import quantize
from tests.emulated import Layer

pytestmark = pytest.mark.usefixtures("one_thread")

READER, WRITER = "reader", "writer"
#: Words for roles in the table (as patterns), and the emulator's roles of which one is meant.
ROLES = {
    "host|caller": {"host"},
    "CTA|rank r|source rank": {"count", "combine"},
    "count": {"count"},
    "dispatch warp": {"dispatch"},
    "report warp|cleaner": {"report"},
    "weight loader|load_weights": {"load_weights"},
    "token loader|load_tokens": {"load_tokens"},
    "(?<!for its )epilogue|math warp": {"math"},
    "reduce": {"dispatch", "report", "combine"},
    "clean-up": {"combine"},
}
#: No wait of the emulator times out.
NOT_EMULATED = "abort_flag"


def layer_of(precision: str, **emulator) -> Layer:
    """Two ranks with a ring of two pool blocks, which is used three times over."""
    return Layer(2, 8, experts=12, overrides={"pool_blocks": 2}, precision=precision, **emulator)


def record(patch: pytest.MonkeyPatch, seen: dict[tuple[str, str], set[str]]) -> None:
    """Add the role of every access from here on to `seen`: {(region, READER or WRITER): roles}."""

    def wrap(memory: type, method: str, *kinds: str) -> None:
        original = getattr(memory, method)

        def recorded(self, agent, *args, **kwargs):
            name = self.name if memory is Data else self.region
            for kind in kinds or (READER, WRITER)[: 1 + (args[0] is self.atomics)]:
                seen[name, kind].add(agent.role)
            return original(self, agent, *args, **kwargs)

        patch.setattr(memory, method, recorded)

    wrap(Data, "read", READER)
    wrap(Data, "write", WRITER)
    wrap(Data, "bulk_write", WRITER)
    wrap(Word, "write", WRITER)
    wrap(Word, "touch")  # a poll reads, an atomic does both


@pytest.fixture(scope="module")
def accesses() -> dict[str, tuple]:
    """By recipe: the regions, and who accesses them in two launches, the second of which gets
    quantised input where the recipe has scales.
    """
    found = {}
    for precision in PRECISIONS:
        layer, seen = layer_of(precision), defaultdict(set)
        xs, *routing = layer.inputs("uniform", 0)
        with pytest.MonkeyPatch.context() as patch:
            record(patch, seen)
            layer.emulator.launch(xs, *routing)
            if layer.config.recipe.scaled:
                pairs = [quantize(x, layer.config.recipe.token_block) for x in xs]
                xs, scales = zip(*pairs, strict=True)
                layer.emulator.launch(xs, *routing, x_scales=scales)
        found[precision] = layer.layout.regions.values(), seen
    return found


def test_the_table_names_roles_that_access_a_region(accesses):
    roles = defaultdict(set)  # of all recipes with the same text
    for regions, seen in accesses.values():
        for region in regions:
            for kind in (READER, WRITER):
                roles[region.name, kind, getattr(region, kind)] |= seen[region.name, kind]
    for (region, kind, text), found in roles.items():
        if region == NOT_EMULATED:
            continue
        named = [words for words in ROLES if re.search(rf"\b({words})s?\b", text)]
        assert named, f"{region}: {kind} {text!r} names no role"
        for words in named:
            assert ROLES[words] & found, f"{region}: {words} in {kind}, but it is {found}"


@pytest.mark.parametrize("precision,role", [("fp8_block", "load_tokens"), ("fp8_channel", "math")])
def test_who_reads_the_scales_of_token_rows(accesses, precision, role):
    """Scales of blocks come with the tile; that of a whole row is for FC1's epilogue, and ordered
    for it too.
    """
    assert accesses[precision][1]["l1_sf_buffer", READER] == {role}
    layer = layer_of(precision, drop="dispatch.warp_sync")
    with pytest.raises(UnorderedAccess, match=rf"role {role}: read of l1_sf_buffer\["):
        layer.check("uniform", 0)
