"""What the emulator raises: one class per kind of protocol mistake, all of them `MegaMoEError`."""

from __future__ import annotations

from megamoe.faults import LaunchTimeout, MegaMoEError


class EmulatorError(MegaMoEError):
    """A role did something that the hardware does not promise to survive."""


class UnwrittenRead(EmulatorError):
    """A role read bytes that nobody wrote in this launch, or that are not visible to it yet."""


class UnorderedAccess(EmulatorError):
    """Two accesses to the same bytes, one of them a write, that no release/acquire chain orders."""


class PaddingNotInert(EmulatorError):
    """A padding row has a weight or a destination, or a real row has no destination."""


class OutOfBounds(EmulatorError):
    """An index computed by a role lies outside its region."""


class Deadlock(EmulatorError, LaunchTimeout):
    """Every role waits; `waits` has one line for each of them."""

    def __init__(self, waits: list[str]):
        super().__init__("no role can run:\n  " + "\n  ".join(waits))
        self.waits = waits


class StepLimit(EmulatorError):
    """The launch took more steps than any correct one can."""


class NotAtRest(EmulatorError):
    """A counter, padding row or barrier word is not what a finished launch leaves behind."""
