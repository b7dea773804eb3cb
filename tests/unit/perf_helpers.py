"""What tests of `perf` share: how a command fails, a point that was never timed, and a GPU
that is only pretended.
"""

from __future__ import annotations

import pytest
import torch

from perf.__main__ import main
from perf.against.roofline import Work
from perf.running.points import Point
from perf.running.timing import EAGER, Times
from perf.workload.cases import MODELS, Case


def error_line(argv: list[str], capsys, silent: bool = True) -> str:
    """The one line that `argv` fails with, and prints nothing before if it is `silent`."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and not (silent and captured.out)
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def measured(impl: str, tokens: int, us: float) -> Point:
    """A measurement of the small layer, whatever it worked on."""
    case = Case(MODELS["emulated"], num_ranks=2, tokens=tokens)
    return Point(case, EAGER, impl, Times((us,)), Work((1,), (1,), (0,)), None, None)


def pretend_gpu(monkeypatch, name: str = "NVIDIA H200", count: int = 1) -> None:
    """Enough of a GPU to plan for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
