"""The host side of launches on a GPU, with CUDA and the kernel faked: what is launched, in which
order with errors, and what layers of one workspace know of each other.
"""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from megamoe import faults
from megamoe.backends import GpuBackend
from megamoe.config import MoEConfig, select
from megamoe.faults import Limits
from megamoe.health import Health
from megamoe.regions import layout_of
from megamoe.weights import empty_weights
from workspace import Workspace

E, K, H, T = 4, 2, 128, 8


class FakeCuda:
    """What a backend asks of torch.cuda."""

    def __init__(self, monkeypatch):
        self.capturing = False
        stream = types.SimpleNamespace(cuda_stream=7)
        fakes = {
            "synchronize": lambda *_: None,
            "current_device": lambda: 0,
            "current_stream": lambda *_: stream,
            "is_current_stream_capturing": lambda: self.capturing,
            "device": lambda *_: contextlib.nullcontext(),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


class FakeKernel:
    """A kernel whose launches are written down, and report what they are told to."""

    def __init__(self):
        self.launches: list[dict] = []
        self.reports = None

    def to_device(self, index: int) -> None:
        assert index == 0

    def launcher(self):
        kernel = self

        class Launcher(dict):
            def set(self, **arguments):
                self.update(arguments)

            def __call__(self, stream, **arguments):
                self.set(stream=stream, **arguments)
                kernel.launches.append(dict(self))
                if kernel.reports is not None:
                    kernel.reports(self)

        return Launcher()


class FakeGroup:
    """A rank of a job whose others come at once; meetings and texts are written down."""

    def __init__(self, texts: dict | None = None):
        self.meetings: list[str] = []
        self.left: dict[str, str] = {}
        self.texts = texts or {}

    def meet(self, name: str, timeout_s: float) -> None:
        self.meetings.append(name)

    def leave(self, name: str, text: str) -> None:
        self.left[name] = text

    def found(self, name: str) -> dict[int, str]:
        return self.texts


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


class Job:
    """Layers of one rank that share a workspace."""

    def __init__(self, layers: int = 1, group=None, ranks: int = 1, precision: str = "bf16"):
        config = MoEConfig(E, K, H, H, T, ranks, precision)
        self.workspace = Workspace(layout_of(config, select(config)))
        if group is not None:  # one process per rank
            spaces = self.workspace.allocation.spaces
            for other in range(1, ranks):
                spaces.pop(other)
        self.workspace.device = torch.device("cuda", 0)
        self.group = group
        self.health = health_on_cpu(self.workspace, group)
        self.workspace.health = self.health
        self.kernel = FakeKernel()
        self.layers = [
            GpuBackend(self.workspace, self.kernel, 132, Limits(3, 50), layer=n)
            for n in range(layers)
        ]
        weights = empty_weights(config.recipe, E // ranks, H, H, "cpu")
        for layer in self.layers:
            layer.set_weights([weights], [(weights.w13_scale, weights.w2_scale)])

    @property
    def order(self) -> list[int]:
        """Numbers of the layers that were launched."""
        return [launch["layer"] for launch in self.kernel.launches]

    def report(self, status: int, **words: int) -> None:
        """As if a launch had written its record."""
        record = faults.Record(status, **words)
        self.health.records[0, : len(record)] = torch.tensor(record)

    def forward(self, layer: int = 0, x: torch.Tensor | None = None) -> torch.Tensor:
        x = torch.ones(3, H, dtype=torch.bfloat16) if x is None else x
        idx, weights = torch.zeros(len(x), K, dtype=torch.int64), torch.ones(len(x), K)
        [y] = self.layers[layer].forward([(x, idx, weights, None, None, None)])
        return y


def health_on_cpu(workspace: Workspace, group) -> Health:
    """Without pinned memory, which needs a GPU."""
    device, workspace.device = workspace.device, torch.device("cpu")
    health = Health(workspace, group)
    workspace.device = device
    return health


def test_a_launch_knows_its_layer_limits_and_dependents(cuda):
    job = Job(layers=2)
    job.forward(1)
    [launch] = job.kernel.launches
    assert launch["layer"] == 1 and launch["dependents"] == 1 and launch["num_tokens"] == 3
    assert launch["timeout_ns"] == 3 * 10**9 and launch["start_timeout_ns"] == 50 * 10**9
    leaves = GpuBackend(job.workspace, job.kernel, 100, Limits(3, 50), yields=True)
    assert leaves.launchers[0]["dependents"] == 0


@pytest.mark.parametrize("group", [None, FakeGroup()])
def test_a_bad_expert_is_raised_after_the_next_launch(cuda, group):
    """Ranks match launches by their order: one that left a launch out would run every later layer
    against another layer of its peers.
    """
    job = Job(layers=4, group=group)
    for layer in range(4):
        job.forward(layer)
    job.report(faults.BAD_EXPERT, index=2, expected=E, seen=99)
    with pytest.raises(faults.InvalidExpertError, match=r"topk_idx\[1, 0\] = 99"):
        job.forward(0)
    for layer in range(1, 4):
        job.forward(layer)
    assert job.order == [0, 1, 2, 3, 0, 1, 2, 3]
    assert not job.health.failed
    job.layers[2].synchronize()


@pytest.mark.parametrize("group", [None, FakeGroup()])
def test_any_layer_of_a_workspace_reports_a_failure_once(cuda, group):
    job = Job(layers=6, group=group)
    recovered = []
    recover = job.workspace.recover
    job.workspace.recover = lambda: (recovered.append(True), recover())
    job.forward(0)
    job.report(faults.TIMED_OUT, role=faults.ROLE_COMBINE)
    for layer in range(2, 6):  # a launch that came behind finds the record there
        with contextlib.suppress(faults.LaunchTimeout):
            job.forward(layer)
    with contextlib.suppress(faults.LaunchTimeout):
        job.layers[0].synchronize()
    launched = len(job.order)
    for layer in range(6):
        job.forward(layer)
    assert job.order[launched:] == list(range(6)) and len(recovered) == 1
    if group:
        assert group.meetings == ["recovery/0/stopped", "recovery/0/clean"]


def test_synchronize_of_another_layer_raises(cuda):
    job = Job(layers=2)
    job.forward(1)
    job.report(faults.TIMED_OUT, role=faults.ROLE_COMBINE)
    with pytest.raises(faults.LaunchTimeout, match="nothing for timeout_s=3"):
        job.layers[0].synchronize()
    job.layers[1].synchronize()


def test_recoveries_are_numbered(cuda):
    group = FakeGroup()
    job = Job(layers=2, group=group)
    for layer in (1, 0, 1):
        job.layers[layer].recover()
    steps = [f"recovery/{n}/{step}" for n in range(3) for step in ("stopped", "clean")]
    assert group.meetings == steps


def test_a_refused_input_ends_the_launch_of_the_others(cuda):
    group = FakeGroup()
    job = Job(layers=2, group=group, ranks=2)
    job.forward(0)
    job.layers[1].refuse("x is on device cpu")
    launch = job.kernel.launches[-1]
    assert launch["num_tokens"] == faults.NO_INPUT and launch["x"] == 0 and launch["layer"] == 1
    assert group.left == {"recovery/0/refused": "x is on device cpu"}
    job.layers[0].refuse("again")  # they know
    assert len(job.kernel.launches) == 2
    job.layers[0].synchronize()  # who refused has raised its own error
    job.forward(1)
    assert group.meetings == ["recovery/0/stopped", "recovery/0/clean"]
    assert job.order == [0, 1, 1]


def test_nothing_is_refused_inside_a_capture(cuda):
    job = Job(group=FakeGroup())
    cuda.capturing = True
    job.layers[0].refuse("x is on device cpu")
    assert job.kernel.launches == [] and not job.health.failed


def test_a_capture_raises_nothing_of_earlier_launches(cuda):
    job = Job()
    job.report(faults.TIMED_OUT, role=faults.ROLE_COMBINE)
    cuda.capturing = True
    job.forward()
    cuda.capturing = False
    with pytest.raises(faults.LaunchTimeout):
        job.forward()
    assert len(job.kernel.launches) == 1


def test_the_reason_of_a_peer_is_in_the_error(cuda):
    job = Job(group=FakeGroup({1: "x has dtype torch.float16"}))
    from megamoe import wire

    job.forward()
    job.report(faults.PEER_FAILED, peer=wire.encode_peer(1, faults.REFUSED))
    with pytest.raises(faults.PeerFailed, match="rank 1 refused its input: x has dtype torch.flo"):
        job.layers[0].synchronize()
    assert job.health.failed


def test_a_launch_that_refuses_needs_no_weights(cuda):
    job = Job(group=FakeGroup())
    bare = GpuBackend(job.workspace, job.kernel, 132, Limits(3, 50))
    bare.refuse("weights are not loaded")
    launch = job.kernel.launches[0]
    assert launch["w13"] % 128 == launch["w2"] % 128 == 0 and launch["w13"] and launch["w2"]


@pytest.mark.parametrize("steps", [50])
def test_staging_records_nothing(cuda, steps):
    """An ordinary copy into a cached view would keep the activations of every step alive."""
    job = Job(group=FakeGroup(), ranks=2)
    linear = torch.nn.Linear(H, H, dtype=torch.bfloat16)
    staged = job.layers[0].staged[0]
    for _ in range(steps):
        x = linear(torch.randn(3, H).bfloat16())
        job.forward(x=x)
        assert torch.equal(staged[:3], x)
    assert staged.grad_fn is None and not staged.requires_grad
