"""What a machine stops with."""

from __future__ import annotations

from megamoe.faults import MegaMoEError


class MachineError(MegaMoEError):
    """A launch on the machine could not go on."""


class Fault(MachineError):
    """The program did what a GPU would not forgive, or what this model does not follow."""


class Deadlock(MachineError):
    """Nobody can go on; the message says who waits for what."""


class StepLimit(MachineError):
    """More instructions than `Machine.max_steps`."""


class Races(MachineError):
    """Accesses that nothing orders; a line each."""
