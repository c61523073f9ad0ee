"""A router's figures for Prometheus."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

from hwcore.diffusion.router.libraries import prometheus_client
from hwcore.diffusion.router.outbox import Observer

if TYPE_CHECKING:
    from hwcore.diffusion.router.core import RouterCore

__all__ = ["Metrics"]

_STAGES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics(Observer):
    """Counters, gauges and histograms of one router, in a registry of their own.

    Parameters
    ----------
    port : int, optional
        Where they are served by HTTP, on 127.0.0.1; 0 for any port. None: nowhere.

    Attributes
    ----------
    registry : prometheus_client.CollectorRegistry
    port : int or None
    """

    def __init__(self, port: int | None = None) -> None:
        self.registry = registry = prometheus_client.CollectorRegistry()
        counter, gauge = prometheus_client.Counter, prometheus_client.Gauge
        histogram = prometheus_client.Histogram

        def name(last: str) -> str:
            return f"hwcore_router_{last}"

        self._requests = counter(
            name("requests"), "Requests answered", ["outcome"], registry=registry
        )
        self._retries = counter(
            name("retries"), "Requests begun anew, by why", ["reason"], registry=registry
        )
        self._dropped = counter(
            name("dropped"), "Frames and connections dropped", ["reason"], registry=registry
        )
        self._bytes = counter(
            name("bytes"), "Bytes of inputs, outputs on their way, results", ["what"],
            registry=registry,
        )  # fmt: skip
        self._seconds = histogram(
            name("request_seconds"), "From submission to result", buckets=_STAGES_S,
            registry=registry,
        )  # fmt: skip
        self._stage_seconds = histogram(
            name("stage_seconds"), "From work sent to output ready", ["role"], buckets=_STAGES_S,
            registry=registry,
        )  # fmt: skip
        self._in_flight = gauge(name("in_flight"), "Requests not answered", registry=registry)
        self._waiting = gauge(
            name("waiting"), "Requests that wait for a role", ["role"], registry=registry
        )
        self._workers = gauge(name("workers"), "Workers alive", ["role"], registry=registry)
        # Looking a label up takes longer than counting.
        self._stage_of: dict[str, Any] = {}
        self._pushed_bytes = self._bytes.labels("pushed")
        self._input_bytes, self._result_bytes = (
            self._bytes.labels("input"), self._bytes.labels("result"),
        )  # fmt: skip
        self._results = self._requests.labels("result")
        self.port = port
        self._server: Any = None
        self._thread: Any = None
        if port is not None:
            self._server, self._thread = prometheus_client.start_http_server(
                port, "127.0.0.1", registry
            )
            self.port = self._server.server_port

    # --- What the router's mind tells ---

    def stage_done(self, role: str, seconds: float) -> None:
        """Count a stage."""
        stage = self._stage_of.get(role)
        if stage is None:
            stage = self._stage_of[role] = self._stage_seconds.labels(str(role))
        stage.observe(seconds)

    def pushed(self, size_bytes: int) -> None:
        """Count an output that has reached the next stage."""
        self._pushed_bytes.inc(size_bytes)

    def begun_anew(self, reason: str) -> None:
        """Count a retry."""
        self._retries.labels(reason).inc()

    def answered(self, outcome: str, seconds: float) -> None:
        """Count an answer."""
        if outcome == "result":
            self._results.inc()
            self._seconds.observe(seconds)
        else:
            self._requests.labels(outcome).inc()

    # --- What its sockets tell ---

    def received(self, size_bytes: int) -> None:
        """Count an input."""
        self._input_bytes.inc(size_bytes)

    def sent(self, size_bytes: int) -> None:
        """Count a result."""
        self._result_bytes.inc(size_bytes)

    def dropped(self, reason: str) -> None:
        """Count what was dropped."""
        self._dropped.labels(reason).inc()

    def look(self, core: RouterCore) -> None:
        """Set what is a state and not an event."""
        self._in_flight.set(core.unfinished)
        queued = core.queued()
        counts = collections.Counter(worker.role for worker in core.workers)
        for role in {*core.config.pipeline, *queued, *counts}:
            self._waiting.labels(str(role)).set(queued.get(role, 0))
            self._workers.labels(str(role)).set(counts[role])

    def close(self) -> None:
        """Serve no more."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()
            self._thread.join()
