"""Symmetric memory in typed regions: what a rank's buffers are, where they lie, which of them reset
between launches, and where those of peers are. Knows nothing of what they are for.
"""

from workspace.layout import Layout, Region
from workspace.views import Workspace

__all__ = ["Layout", "Region", "Workspace"]
