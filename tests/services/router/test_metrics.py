"""A router's figures, as Prometheus reads them."""

import socket
import urllib.request

import pytest

from hwcore.diffusion import pack_tensors
from hwcore.errors import RequestError

from ._peers import answer_to, within


def value(router, name, **labels):
    return router.metrics.registry.get_sample_value(f"hwcore_router_{name}", labels)


def packed_bytes(text):
    return sum(map(len, pack_tensors({"text": text})))


def test_requests_are_counted_by_what_became_of_them(router_of, workers, client_of):
    router = router_of(max_requests=3)
    client = client_of(router)
    made = workers(router)
    for number in range(3):
        client.submit(f"r{number}", {"text": "x"}, deadline_s=20).result(20)
    for echo in made:
        echo.close()
    assert within(10, lambda: router.stats().workers == {})
    waiting = [client.submit(f"w{number}", {"text": "x"}, deadline_s=20) for number in range(3)]
    with pytest.raises(RequestError):
        client.submit("r9", {"text": "x"}, deadline_s=20).result(20)
    assert within(5, lambda: value(router, "in_flight") == 3)
    assert within(5, lambda: value(router, "waiting", role="encoder") == 3)
    waiting[0].cancel()
    with pytest.raises(RequestError):
        waiting[0].result(20)
    assert value(router, "requests_total", outcome="result") == 3
    assert value(router, "requests_total", outcome="busy") == 1
    assert value(router, "requests_total", outcome="cancelled") == 1
    assert value(router, "request_seconds_count") == 3
    for role in ("encoder", "denoiser", "decoder"):
        assert value(router, "stage_seconds_count", role=role) == 3
        assert within(5, lambda role=role: value(router, "workers", role=role) == 0)
    result, asked = packed_bytes(answer_to("x")), packed_bytes("x")
    assert value(router, "bytes_total", what="result") == 3 * result
    assert value(router, "bytes_total", what="input") == 7 * asked
    # "x encoder", then "x encoder denoiser"
    assert value(router, "bytes_total", what="pushed") == 3 * (9 + 18)


def test_time_is_measured_stage_by_stage(router, workers, client):
    workers(router)[1].slow_s = 0.2
    client.submit("r", {"text": "x"}, deadline_s=20).result(20)
    assert value(router, "stage_seconds_sum", role="denoiser") >= 0.2
    assert value(router, "stage_seconds_sum", role="encoder") < 0.2
    assert value(router, "request_seconds_sum") >= 0.2


def test_what_is_begun_anew_or_dropped_is_counted(router, worker, client):
    worker(router, "encoder").close()
    client.submit("r", {"text": "x"}, deadline_s=20)
    assert within(10, lambda: value(router, "retries_total", reason="died") == 1)
    router._drops("malformed")
    assert value(router, "dropped_total", reason="malformed") == 1


def test_they_are_served_on_this_machine_as_long_as_the_router_is_open(router_of, workers):
    router = router_of(metrics_port=0)
    workers(router)
    assert within(5, lambda: value(router, "workers", role="encoder") == 1)
    url = f"http://127.0.0.1:{router.metrics.port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as page:
        text = page.read().decode()
    assert 'hwcore_router_workers{role="encoder"} 1.0' in text
    router.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", router.metrics.port), timeout=5)


def test_two_routers_have_figures_of_their_own(router_of, workers):
    one, two = router_of(), router_of()
    workers(one)
    assert within(5, lambda: value(one, "workers", role="encoder") == 1)
    assert within(5, lambda: value(two, "workers", role="encoder") == 0)
