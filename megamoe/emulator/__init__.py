"""The launch protocol on a CPU: roles as coroutines over the real workspace, and a memory model.

- `emulator`: the launch as the host sees it; the one class that others need.
- `prologue`, `roles`, `report`, `combine`: what each role does, in protocol order.
- `operations`: every wait, release, fence and barrier by label.
- `runtime`: who runs next. `memory`: what is ordered and visible.
- `state`: regions and shared memory as such memory.
"""

from megamoe.emulator.emulator import Emulator
from megamoe.emulator.errors import (
    Deadlock,
    EmulatorError,
    NotAtRest,
    OutOfBounds,
    PaddingNotInert,
    StepLimit,
    UnorderedAccess,
    UnwrittenRead,
)
from megamoe.emulator.operations import OPERATIONS, Operation

__all__ = [
    "OPERATIONS",
    "Deadlock",
    "Emulator",
    "EmulatorError",
    "NotAtRest",
    "Operation",
    "OutOfBounds",
    "PaddingNotInert",
    "StepLimit",
    "UnorderedAccess",
    "UnwrittenRead",
]
