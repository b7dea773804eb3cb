"""What a test needs of the machine: a marker skips it, with the reason, where that is missing."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from megamoe.architecture import with_kernels

# Kernels compile for Hopper on any machine; without this the DSL asks the driver.
os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

#: Modules of `-m quick`, without their slow tests: what a change breaks first. Of launches on a CPU
#: only the simplest, whose kernels the cache has after the first time.
QUICK = frozenset({
    "test_backends", "test_budget", "test_config", "test_faults", "test_fourbit",
    "test_gpu_configs", "test_imports", "test_kernel_names", "test_layout", "test_module",
    "test_reference", "test_regions", "test_routing", "test_schedule", "test_turns",
    "test_views", "test_weights", "test_wire", "test_workspace_bytes",
})  # fmt: skip
LEFT_OUT = ("gpu", "nightly", "slow")

CAPABILITIES = [row.capability for row in with_kernels()]
NO_GPU = f"needs a CUDA GPU of compute capability {CAPABILITIES}, none is visible"
NO_DSL = "needs nvidia-cutlass-dsl, which is not installed"
NO_NIGHT = "takes many minutes; runs with --nightly"


def have_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() in CAPABILITIES


def have_dsl() -> bool:
    return importlib.util.find_spec("cutlass") is not None


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="run what takes many minutes too")


def pytest_ignore_collect(collection_path, config) -> bool | None:
    """For `-m quick` other modules are not even imported."""
    other = collection_path.stem.startswith("test_") and collection_path.stem not in QUICK
    return True if other and config.option.markexpr == "quick" else None


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Unless --dist asks for more: neighbours stay in one process, so that no two of them build the
    kernel of a module at once, and who has finished takes from the end of what others have.
    """
    if config.getvalue("dist") == "load":
        from xdist.scheduler import WorkStealingScheduling

        return WorkStealingScheduling(config, log)
    return None


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    missing = {
        "nightly": None if config.getoption("--nightly") else pytest.mark.skip(reason=NO_NIGHT),
        "gpu": None if have_gpu() else pytest.mark.skip(reason=NO_GPU),
        "compile": None if have_dsl() else pytest.mark.skip(reason=NO_DSL),
    }
    for item in items:
        if item.path.stem in QUICK and not any(map(item.get_closest_marker, LEFT_OUT)):
            item.add_marker("quick")
        for marker, skip in missing.items():
            if skip is not None and item.get_closest_marker(marker):
                item.add_marker(skip)


@pytest.fixture
def cuda() -> torch.device:
    """The GPU of a test; skips like the `gpu` marker where there is none."""
    if not have_gpu():
        pytest.skip(NO_GPU)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def one_thread():
    """Products of the oracle are tiny; a thread pool only gets in the way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
