"""Ports of our own choosing."""

import random
import socket

import pytest

from serve_graph.open_ports import free_port, refused_port


def test_a_free_port_is_none_that_a_connection_gets() -> None:
    port = free_port()

    assert 20_000 <= port < 32_768
    assert refused_port("127.0.0.1", port) is None


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        monkeypatch.setattr(random, "sample", lambda *_: [number, 31_999])

        assert free_port() == 31_999
