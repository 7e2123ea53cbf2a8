"""Faults of the catalogue that belong to no feature: clocks that jump, processes that stand still, storms of signals."""

import signal
import time
from pathlib import Path

import pytest

from tests.conftest import SANITIZERS, Factory
from tests.support.clock import DAY_S, WrongClock
from tests.support.mesh import simple
from tests.support.peers import RST, Server, connect, echo, read_exactly, read_to_end, talk
from tests.support.waiting import wait_until


def pass_time(seconds: float) -> None:
    """What is tested is that time has passed."""
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end, "it has")


def test_a_wall_clock_that_jumps_ends_nothing_and_delays_nothing(
    mesh: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = WrongClock(tmp_path, monkeypatch)
    monkeypatch.setenv("L4MESH_PRELOAD", f"{SANITIZERS} {clock.shim}".strip())
    with Server(echo) as server:
        two = simple(server.address, timeouts={"idle": "1h", "lifetime": "1h"})
        quick = simple(server.address, timeouts={"idle": "200ms"})
        two["clusters"] += [quick["clusters"][0] | {"name": "quick"}]
        two["listeners"] += [quick["listeners"][0] | {"name": "quick", "cluster": "quick"}]
        m = mesh(two | {"access_log": {"when": "always"}})
        with connect(m.port()) as stays:
            for wrong_by in (DAY_S, -400 * DAY_S, 0):
                before = m.status()
                clock.set_wrong_by(wrong_by)
                talk(stays)
                with connect(m.port("quick")) as short:
                    talk(short)
                    assert read_to_end(short) == (b"", RST)
                with connect(m.port()) as late:
                    talk(late)
                assert 0 <= m.status()["uptime_s"] - before["uptime_s"] < 60
            m.reload(two | {"access_log": {"when": "always"}, "limits": {"connections": 500}})
            talk(stays)
            assert m.closed() == {"idle_timeout": 3, "downstream_closed": 3}
        # The clock was wrong indeed.
        wait_until(lambda: len(m.records()) >= 7, "all is in the log")
        times = [record["time"] for record in m.records()]
        assert len({stamp[:4] for stamp in times}) >= 2, times


def test_a_process_that_stood_still_hears_everybody_before_it_counts_their_time(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address, timeouts={"idle": "4s"}) | {"workers": 1, "overload": "off"})
        port = m.port()
        clients = [connect(port) for _ in range(350)]
        for client in clients:
            talk(client)
        # At once, so that on a slow machine the first ones are not idle for long before it stands still.
        for client in clients:
            client.sendall(b"hi")
        for client in clients:
            assert read_exactly(client, 2) == b"hi"
        m.process.send_signal(signal.SIGSTOP)
        for client in clients:
            client.sendall(b"yo")
        pass_time(5)
        m.process.send_signal(signal.SIGCONT)
        for client in clients:
            assert read_exactly(client, 2) == b"yo"
        for client in clients:
            client.close()


def test_a_storm_of_hang_ups_is_one_look_at_the_files(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address))
        with connect(m.port()) as client:
            talk(client)
            generation = m.status()["generation"]
            for _ in range(300):
                m.process.send_signal(signal.SIGHUP)
                talk(client)
            wait_until(lambda: m.status()["config"]["unchanged"] > 0, "the files were looked at")
            status = m.status()
            assert (status["generation"], status["plans_alive"], status["config"]["failed"]) == (generation, 1, 0)
            m.reload(simple(server.address) | {"limits": {"connections": 600}})
            talk(client)


def test_every_worker_gets_connections_and_the_metrics_tell_how_many(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address) | {"workers": 2})
        port = m.port()
        clients = [connect(port) for _ in range(200)]
        for client in clients:
            talk(client)
        active = [m.metrics()[f'l4mesh_worker_connections_active{{worker="{worker}"}}'] for worker in range(2)]
        assert sum(active) == 200
        # The kernel spreads them by a hash: 7 sigma.
        assert min(active) > 50, active
        for client in clients:
            client.close()
