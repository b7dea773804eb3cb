"""Bugs of the kernel's own history, put back one by one: a launch on a CPU shows each of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.nights import at_night

pytestmark = [pytest.mark.compile, pytest.mark.slow]
#: What every run of the tests tries; the others need a compilation each.
ALWAYS = ("a stage given back while lanes read its scales",)

ROOT = Path(__file__).resolve().parents[2]
PREFACE = """
import torch
from megamoe import InvalidExpertError
from megamoe.faults import LaunchFailed
from tests.machine import RING, Layer
torch.set_num_threads(1)
def launches(**options):
    layer = Layer(**({"patient": False, "max_steps": 6_000_000} | RING | options))
    for seed in range(6):
        layer.check(("uniform", "skewed", "ragged")[seed % 3], seed)
        layer.assert_at_rest()
"""


class Bug(NamedTuple):
    """`file` of the kernels has `old` where it had `new`; `trial` then ends in `error`."""

    file: str
    old: str
    new: str
    trial: str
    error: str


BUGS = {
    "flags of the last CTA on the SM": Bug(
        "sm90/kernel.py", "            flags[FLAG_STOP] = Int32(0)\n", "",
        "launches(tokens=64)", r"Races: shared \d+ .flags.*nobody"),
    "a warp waits for a phase whose predecessor it has not seen": Bug(
        "sm90/math_warps.py", "pipes.multiplied + number", "pipes.multiplied",
        "launches()", "Deadlock|Races|WrongResult|Fault"),
    "a loop leaves its number where the warpgroup's was": Bug(
        "sm90/kernel.py", "for number in range_constexpr(parts[0].num_items):\n"
        "                    for part in parts:\n"
        "                        arch.mbarrier_init(smem[part.name] + number, part.arrivals)",
        "for warpgroup in range_constexpr(parts[0].num_items):\n"
        "                    for part in parts:\n"
        "                        arch.mbarrier_init(smem[part.name] + warpgroup, part.arrivals)",
        "launches()", "Deadlock|Races|WrongResult|Fault|StepLimit"),
    "what lane 0 has acquired, for every lane": Bug(
        "report.py", "        arch.sync_warp()  # what lane 0 has acquired comes before what "
        "every lane does\n", "", "launches()", "Races: .*token_src_metadata|Races: .*l1_topk"),
    "an id of 64 bits, of which 32 are reported": Bug(
        "dispatch.py", "high = Int32(wide >> 32)", "high = expert >> 31", """
layer = Layer(**RING)
xs, idx, weights = layer.inputs("uniform", 0)
idx[0][1, 0] = 2**32 + 3
try:
    layer.forward((xs, idx, weights))
except InvalidExpertError as error:
    assert str(2**32 + 3) in str(error), error
""", "AssertionError: .* 3"),
    "a vote that was taken for an order of accesses": Bug(
        "dispatch.py", "        arch.sync_warp()  # a vote orders no accesses: all have read "
        "before places are taken\n", "", "launches()", r"Races: shared \d+ .received"),
    "a stage given back while lanes read its scales": Bug(
        "sm90/few_tokens.py", "                arch.sync_warp()  # every lane has read its "
        "scales\n", "", 'launches(precision="fp8_block")', r"Races: shared \d+ .row_scales"),
    "a flag that is polled and stored plainly": Bug(
        "ptx.py", "st.volatile.shared.b32", "st.shared.b32", "launches(tokens=64)",
        r"Races: shared \d+ .flags"),
    "a clamp that turns NaN into its limit": Bug(
        "ptx.py", "min.NaN.f32", "min.f32", """
layer = Layer(**RING, clamp=7.0)
xs, idx, weights = layer.inputs("uniform", 0)
idx[0][0] = torch.tensor([1, 2])
xs[0][0, 5] = float("nan")
assert layer.forward((xs, idx, weights))[0][0].isnan().all()
""", "AssertionError"),
    "ranks that launch different layers": Bug(
        "dispatch.py", "    sync.check_layer(launch, layer)\n", "", """
layer = Layer(**RING)
layer.backend.launchers[1].set(layer=1)
try:
    layer.check("uniform", 0)
except LaunchFailed:
    pass
else:
    raise AssertionError("nobody noticed")
""", "AssertionError: nobody noticed"),
    "records read before the first row": Bug(
        "dispatch.py", "    row = Int32(worker)\n",
        "    load_counts(launch, buffers.counts, Int32(0), lane)\n    row = Int32(worker)\n", """
layer = Layer(**RING)
for seed in range(20):
    layer.check_many(["silent_rank", "uniform", "masked", "uniform"], seed)
""", "Races: expert_recv_count"),
}  # fmt: skip


def run(tree: Path, trial: str) -> str:
    """The last words of a trial in a tree; nothing if it has passed."""
    command = [sys.executable, "-c", PREFACE + trial]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=280)
    return done.stderr[-40_000:] if done.returncode else ""


@pytest.mark.parametrize(
    "name",
    [name if name in ALWAYS else at_night(name) for name in BUGS],
)
def test_a_bug_that_was_is_found(name, tmp_path):
    bug = BUGS[name]
    for part in ("megamoe", "workspace", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "megamoe" / "kernels" / bug.file
    text = path.read_text()
    assert bug.old in text
    path.write_text(text.replace(bug.old, bug.new))
    found = run(tmp_path, bug.trial)
    assert re.search(bug.error, found), found


@pytest.mark.nightly
@pytest.mark.parametrize("trial", sorted({bug.trial for bug in BUGS.values()}))
def test_the_kernel_as_it_is_has_none(trial):
    assert not run(ROOT, trial)
