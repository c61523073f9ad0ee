"""Transfer engines: bytes from one process's pool into another's.

=============  ============================================================================
module         what it holds
=============  ============================================================================
`interface`    what an engine and a peer do
`opening`      choosing one, and what is passed over
`host`         what all have in common: the pool, writers, peers, forks
`shm`          a sealed memfd, mapped by peers
`tcp`          sockets; `frames` is what goes over them
`mooncake`     Mooncake's Transfer Engine; `mooncake_library` is its calls, `diversion` its noise
`handshake`    who is at the other end; `token` is what proves it, `listener` takes connections
`memory`       pre-faulted pages as a tensor; `watch` and `forks`: the ends of processes
=============  ============================================================================
"""

from hwcore.diffusion.engines.interface import Engine, Peer
from hwcore.diffusion.engines.opening import open_engine
from hwcore.diffusion.engines.token import Token

__all__ = ["Engine", "Peer", "Token", "open_engine"]
