"""Region-typed workspace: what a rank's buffers are, where they lie, and which of them reset
between launches.
"""

from workspace.layout import Layout, Region, layout_of
from workspace.views import Workspace

__all__ = ["Layout", "Region", "Workspace", "layout_of"]
