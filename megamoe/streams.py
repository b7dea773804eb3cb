"""CUDA streams of virtual ranks: one each, so that their launches run side by side.

They are made here and not taken from torch, which hands out 32 streams of a device in turn: of two
ranks on one stream the second would wait for the first, which waits for it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

from megamoe.compile import cuda_runtime

NON_BLOCKING = 1  # cudaStreamNonBlocking: the legacy default stream waits for none of them

_open = 0  # `side_by_side` blocks that have begun and not ended


@contextlib.contextmanager
def side_by_side() -> Iterator[None]:
    """While the host launches ranks one after the other. The first wait for the last, so who waits
    for the GPU in between waits until they time out: a layer, say, that the garbage collector ends.
    """
    global _open
    _open += 1
    try:
        yield
    finally:
        _open -= 1


def half_launched() -> bool:
    """True while launches run that wait for others which the host has not made yet."""
    return _open > 0


class Streams:
    """`count` streams of a device. Raises RuntimeError if CUDA gives none."""

    def __init__(self, device: torch.device, count: int):
        self._runtime, self._handles = cuda_runtime(), []
        with torch.cuda.device(device):
            for _ in range(count):
                handle = ctypes.c_void_p()
                status = self._runtime.cudaStreamCreateWithFlags(ctypes.byref(handle), NON_BLOCKING)
                if status:
                    raise RuntimeError(f"cudaStreamCreateWithFlags failed with error {status}")
                self._handles.append(handle)
            self.streams = [torch.cuda.ExternalStream(h.value, device) for h in self._handles]
            self._begin = torch.cuda.Event()
            self._ends = [torch.cuda.Event() for _ in self.streams]

    def fork(self, current: torch.cuda.Stream) -> Iterator[tuple[int, torch.cuda.Stream]]:
        """(number, stream) of each, current in turn, behind what `current` holds."""
        self._begin.record(current)
        with side_by_side():
            for number, stream in enumerate(self.streams):
                stream.wait_event(self._begin)
                with torch.cuda.stream(stream):
                    yield number, stream
                    self._ends[number].record(stream)

    def join(self, current: torch.cuda.Stream) -> None:
        """Let `current` wait for what `fork` has been given to do."""
        for end in self._ends:
            current.wait_event(end)

    def close(self) -> None:
        """Give the streams back; nothing may run on them."""
        while self._handles:
            self._runtime.cudaStreamDestroy(self._handles.pop())
