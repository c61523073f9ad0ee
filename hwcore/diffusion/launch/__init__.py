"""Starting a pipeline's processes, and starting them again when they die.

=============  ==========================================================================
module         what it holds
=============  ==========================================================================
`deployment`   what is to run: roles, how many of each, the router
`process`      one process of it, as its launcher starts it
`local`        processes of this machine; the default
`cluster`      actors of Ray, on this machine
=============  ==========================================================================
"""

from hwcore.diffusion.launch.deployment import Deployment, RoleSpec
from hwcore.diffusion.launch.local import LocalLauncher

__all__ = ["Deployment", "LocalLauncher", "RoleSpec"]
