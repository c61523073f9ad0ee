"""Mooncake's transfer engine behind calls that raise; its return codes stay in this file.

Measured on 0.3.13.post1, two processes, tcp. Codes carry no reason, and mean one thing here and
another there: a synchronous call returns 0 for success and less for failure; a submission returns
the batch's handle, and 0 for failure; a status is 0 while it runs, 1 for success, else failure,
and is asked once more at the peril of freed memory. A handshake with a peer that does not answer
takes 60 s, whatever is set; a transfer to one that hangs takes 30 s unless set.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import stat
import threading
from typing import TYPE_CHECKING, Any

from hwcore.diffusion.engines.diversion import diverted
from hwcore.errors import CapabilityError, PeerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.diffusion.engines.deadline import Deadline

__all__ = ["PROGRESS_S", "SYSTEM_PACKAGES", "MooncakeLibrary", "load"]

PROGRESS_S = 5
"""After how many seconds without progress a transfer fails, unless the environment says."""

SYSTEM_PACKAGES = "libibverbs1 libnuma1 libcurl4"

_DISTRIBUTION = re.compile(r"mooncake[-_.]transfer[-_.]engine", re.IGNORECASE)


def load(package: str | None = None) -> Any:
    """Import Mooncake's transfer engine, with what it needs set in the environment.

    Raises
    ------
    CapabilityError
        If it is not installed, or twice, or a system library is missing.
    """
    found = {
        f"{name} {distribution.version}"
        for distribution in importlib.metadata.distributions()
        if _DISTRIBUTION.match(name := distribution.metadata["Name"] or "")
    }
    if len(found) > 1:
        message = (
            f"mooncake: {' and '.join(sorted(found))} are installed; expected one of them, for "
            f"their files overwrite each other's. Uninstall all, then install the one to use."
        )
        raise CapabilityError(message)
    # Its own name, read when it is loaded; what the user set comes first.
    os.environ.setdefault("MC_TCP_PROGRESS_TIMEOUT_SEC", str(PROGRESS_S))
    try:
        with diverted():
            return importlib.import_module("mooncake.engine")
    except ModuleNotFoundError as error:
        message = (
            f"mooncake: `{error}`; expected the package to be installed. Run pip install "
            f"{package or chr(39) + 'hwcore[mooncake]' + chr(39)}."
        )
        raise CapabilityError(message) from error
    except ImportError as error:
        message = (
            f"mooncake: its import said `{error}`; expected its system libraries. Run apt-get "
            f"install {SYSTEM_PACKAGES}."
        )
        raise CapabilityError(message) from error


class MooncakeLibrary:
    """One transfer engine of Mooncake's.

    Parameters
    ----------
    module : module
        From :func:`load`.
    host : str
        How others call this machine.
    protocol, device : str
        Mooncake's own: ``"tcp"``, ``"rdma"`` and the names of network devices.

    Attributes
    ----------
    segment : str
        How others call this engine.

    Raises
    ------
    CapabilityError
        If it cannot be set up.
    """

    def __init__(self, module: Any, host: str, protocol: str, device: str) -> None:
        def start() -> Any:
            engine = module.TransferEngine()
            return engine, engine.initialize(host, "P2PHANDSHAKE", protocol, device)

        before = _sockets()
        with diverted():
            self._engine, code = start()
        for fd in _sockets() - before:  # its listeners, which programs started here would keep
            os.set_inheritable(fd, False)
        if code:
            message = (
                f"mooncake: initialize returned {code} for protocol {protocol!r} at {host!r}; "
                f"expected 0. Choose a protocol that this machine has, such as tcp; the log at "
                f"DEBUG has what it said."
            )
            raise CapabilityError(message)
        self.segment = f"{host}:{self._engine.get_rpc_port()}"

    def register(self, address: int, size_bytes: int) -> None:
        """Let transfers read and write memory; raise CapabilityError where it refuses."""
        with diverted():
            code = self._engine.register_memory(address, size_bytes)
        if code:
            message = (
                f"mooncake: register_memory returned {code} for {size_bytes} bytes; expected 0. "
                f"Make the pool smaller, or raise the limit of locked memory (ulimit -l)."
            )
            raise CapabilityError(message)

    def unregister(self, address: int) -> None:
        """Undo :meth:`register`."""
        with diverted():
            self._engine.unregister_memory(address)  # it fails where there is nothing to undo

    def reach(self, segment: str, deadline: Deadline) -> None:
        """Shake hands with another engine; raise PeerError, or TimeoutError late.

        In a thread, which a peer that does not answer keeps for 60 s more.
        """

        def probe() -> tuple[int, int]:
            code = self._engine.send_probe(segment)
            # Fetches what the first write would otherwise wait for.
            return code, 0 if code else self._engine.get_first_buffer_address(segment)

        code, address = _in_time(probe, deadline)
        if code or not address:
            message = (
                f"mooncake: {segment} answered the probe with {code}; expected a pool. See whether "
                f"its process has ended, and its ports can be reached from this machine."
            )
            raise PeerError(message)

    def submit(self, segment: str, source: int, target: int, size_bytes: int) -> int | None:
        """Begin a write and return its batch, or None where it was not taken."""
        batch = self._engine.transfer_submit_write(segment, source, target, size_bytes)
        return batch if batch > 0 else None

    def landed(self, batch: int) -> bool | None:
        """Say whether a batch has landed; None while it runs. Not to be asked after an answer."""
        code = self._engine.transfer_check_status(batch)
        return None if code == 0 else code == 1

    def close(self) -> None:
        """Stop its threads and sockets."""
        with diverted():
            del self._engine


def _sockets() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.add(int(name))
        except OSError:  # the listing's own
            continue
    return found


def _in_time(call: Callable[[], Any], deadline: Deadline) -> Any:
    """Return what ``call`` returns, or raise TimeoutError while it goes on."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            errors.append(error)

    thread = threading.Thread(target=run, name="hwcore-mooncake-probe", daemon=True)
    thread.start()
    thread.join(deadline.left_s())
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]
