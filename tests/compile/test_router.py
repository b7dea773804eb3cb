"""Routers of models compile to sm_90a as they must: in registers, and with loads of 16 bytes."""

from __future__ import annotations

import re

import pytest

from megamoe import compile
from megamoe.router_config import MAX_EXPERTS, RouterConfig
from perf.workload.routers import ROUTERS
from tests.compile.sass import compile_program

pytestmark = [pytest.mark.compile, pytest.mark.slow]

#: With the loads of a row of logits, in bytes and number.
CONFIGS = {
    "v3": (ROUTERS["v3"].config, 128, 2),
    "pro": (ROUTERS["pro"].config, 128, 3),
    "flash_bfloat16": (
        RouterConfig(256, 6, "sqrtsoftplus", correction_bias=True, logits="bfloat16"), 128, 1,
    ),
    "largest": (RouterConfig(MAX_EXPERTS, 16, "softmax"), 128, 4),
    "gpt_oss": (RouterConfig(128, 4, "softmax", "chosen", logits="bfloat16"), 64, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_router(name, tmp_path, capfd):
    config, bits, loads = CONFIGS[name]
    built = compile_program(compile.router_program(config), tmp_path)
    remarks = "".join(capfd.readouterr())
    (registers,) = re.findall(r"Used (\d+) registers", remarks)
    assert int(registers) <= 64  # of a CTA of four warps, eight on an SM
    assert "0 bytes spill stores, 0 bytes spill loads" in remarks
    assert "STACK:0" in built.resources and "LOCAL:0" in built.resources
    wide = re.findall(rf"\bLDG\.E\.{bits}\b", built.sass)
    bias = config.num_experts // 32 // 4 * config.correction_bias
    assert len(wide) == loads + (bias if bits == 128 else 0)
    # One for the value and one for the place of every slot, and a softmax's largest logit.
    largest = config.score == "softmax"
    assert len(re.findall(r"^\s*redux\.sync", built.ptx, re.MULTILINE)) == (
        2 * config.top_k + largest
    )
    # Those behind may begin before this launch waits for what is before it.
    release, wait = (
        built.ptx.index(f"griddepcontrol.{what}") for what in ("launch_dependents", "wait")
    )
    first = min(built.ptx.index("ld.global"), built.ptx.index("st.global"))
    assert release < wait < first
