"""What the router's sockets and figures stand on; an error names what to install."""

from __future__ import annotations

from hwcore.errors import CapabilityError

__all__ = ["prometheus_client", "zmq"]

try:
    import prometheus_client
    import zmq
except ModuleNotFoundError as error:
    message = (
        f"hwcore.diffusion.router: `{error}`; expected its libraries to be installed. Run pip "
        f"install 'hwcore[diffusion]'."
    )
    raise CapabilityError(message) from error
