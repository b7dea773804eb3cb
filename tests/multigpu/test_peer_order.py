"""Rows stored in a peer's memory by one CTA are there when another CTA tells the peer: relaxed, at
sys scope, behind a release and acquire at gpu scope and a fence at sys scope.

MEGAMOE_PEER_MESSAGES: rows in all, a million unless set.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.gpu.kernels import library
from tests.multigpu.conftest import missing
from tests.multigpu.spread import connect

pytestmark = pytest.mark.gpu

MESSAGES = int(os.environ.get("MEGAMOE_PEER_MESSAGES", "1000000"))
CHANNELS = 88  # of a GPU, with three CTAs each: two on an SM
TIMEOUT_S = 120


@pytest.mark.parametrize("name", library.NAMES)
def test_rows_are_there_when_another_cta_tells(name):
    reason = missing(2)
    if reason:
        pytest.skip(reason)
    devices = [torch.device("cuda", index) for index in range(2)]
    connect(devices)
    size = library.peer_order_bytes(CHANNELS)
    memory = [torch.zeros(size, dtype=torch.uint8, device=device) for device in devices]
    errors = [torch.zeros(2, dtype=torch.int32, device=device) for device in devices]
    messages = MESSAGES // (2 * CHANNELS)
    kernel = library.load(name)
    launchers, timers = [], []
    for device in devices:
        kernel.to_device(device.index)
        torch.cuda.synchronize(device)
    for index, device in enumerate(devices):
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launcher = kernel.launcher()
            launcher(
                torch.cuda.current_stream().cuda_stream,
                mine=memory[index].data_ptr(),
                theirs=memory[1 - index].data_ptr(),
                errors=errors[index].data_ptr(),
                timeout_ns=TIMEOUT_S * 10**9,
                channels=CHANNELS,
                messages=messages,
            )
            end.record()
            launchers.append(launcher)
            timers.append((begin, end))
    for device in devices:
        torch.cuda.synchronize(device)
    wrong, late = (sum(int(one[word]) for one in errors) for word in range(2))
    seconds = timers[0][0].elapsed_time(timers[0][1]) / 1e3
    total = 2 * CHANNELS * messages
    print(f"{name}: {total} rows in {seconds:.2f} s, {wrong} wrong words")
    assert late == 0
    if "unfenced" not in name:  # which may be right by luck, and is shown for comparison
        assert wrong == 0
