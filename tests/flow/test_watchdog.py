"""A worker that is stuck, held by a debugger's means, is noticed, said and ends the process; what only looks like it is not."""

import os
import platform
import signal
import time
from pathlib import Path
from typing import Any

from tests.conftest import Factory
from tests.support.mesh import Mesh, simple
from tests.support.peers import Server, connect, echo, read_exactly
from tests.support.tracer import Tracer, make_spin, worker_thread
from tests.support.waiting import wait_until

ACCEPT4, SENDTO = {"x86_64": (288, 44), "aarch64": (242, 206)}.get(platform.machine(), (-1, -1))
LIMIT_MS = 500


def watched(mesh: Factory, server: Server) -> Mesh:
    return mesh(simple(server.address) | {"workers": 1, "watchdog": f"{LIMIT_MS}ms"})


def end_of(m: Mesh) -> tuple[Any, str]:
    """What the watchdog said, after the process has ended by it."""
    assert m.process.wait(20) == -signal.SIGABRT
    said = m.stderr.read_text()
    assert "Fatal Python error: Aborted" in said
    return next(event for event in m.events() if event["event"] == "worker_stuck"), said


def test_a_worker_that_does_not_wake_up_for_its_work(mesh: Factory) -> None:
    with Server(echo) as server:
        m = watched(mesh, server)
        port = m.port()
        with Tracer(worker_thread(m.process.pid)) as tracer:
            tracer.wait_stopped()
            with connect(port):
                stuck, _ = end_of(m)
        assert (stuck["worker"], stuck["doing"], stuck["thread_state"], stuck["level"]) == (0, "waiting", "t", "critical")
        assert stuck["stuck_ms"] < LIMIT_MS


def test_a_worker_that_accepts_and_never_ends(mesh: Factory) -> None:
    with Server(echo) as server:
        m = watched(mesh, server)
        with Tracer(worker_thread(m.process.pid), ACCEPT4) as tracer, connect(m.port()):
            tracer.wait_stopped()
            stuck, _ = end_of(m)
        assert stuck["doing"] == "accepting"
        assert stuck["system_call"].split()[0] == str(ACCEPT4)


def test_a_worker_in_the_middle_of_a_connection_says_which(mesh: Factory) -> None:
    with Server(echo) as server:
        m = watched(mesh, server)
        with connect(m.port()) as client:
            client.sendall(b"before")
            assert read_exactly(client, 6) == b"before"
            with Tracer(worker_thread(m.process.pid), SENDTO) as tracer:
                client.sendall(b"after")
                tracer.wait_stopped()
                stuck, _ = end_of(m)
            assert stuck["doing"] == "serving an event"
            assert stuck["source"] == "{}:{}".format(*client.getsockname())
        assert (stuck["listener"], stuck["cluster"], stuck["endpoint"]) == ("web", "web", server.address)
        assert (stuck["connection"], stuck["state"]) == ("0.0.1", "relaying")


def test_a_control_loop_that_is_stuck_is_said_first(mesh: Factory) -> None:
    with Server(echo) as server:
        m = watched(mesh, server)
        port = m.port()
        with Tracer(m.process.pid) as tracer:
            tracer.wait_stopped()
            wait_until(lambda: any(event["event"] == "control_loop_stuck" for event in m.events()), "it is said")
            # Workers need no control loop.
            with connect(port) as client:
                client.sendall(b"served")
                assert read_exactly(client, 6) == b"served"
            assert m.process.wait(20) == -signal.SIGABRT
        assert [event["means"] for event in m.events() if event["event"] == "control_loop_stuck"] == [
            "traffic goes on, under the plan that is in force",
            "the process ends",
        ]


def test_a_control_loop_that_goes_on_in_time_is_left_alone(mesh: Factory) -> None:
    with Server(echo) as server:
        m = watched(mesh, server)
        with Tracer(m.process.pid) as tracer:
            tracer.wait_stopped()
            wait_until(lambda: any(event["event"] == "control_loop_stuck" for event in m.events()), "it is said")
        # The stacks, which its thread writes when it can.
        wait_until(lambda: "Current thread" in m.stderr.read_text(), "the stacks of Python's threads are written")
        assert m.get("/live") == {"live": True}


def test_a_worker_that_spins_shows_its_stack(mesh: Factory) -> None:
    with Server(echo) as server:
        m = watched(mesh, server)
        port = m.port()
        make_spin(worker_thread(m.process.pid))
        with connect(port):
            stuck, said = end_of(m)
        assert stuck["thread_state"] == "R"
        assert stuck["thread_cpu_ms"] >= stuck["stuck_ms"]
        stack = said.partition("stack of the stuck thread, innermost first:\n")[2].partition("Fatal Python error")[0]
        assert "epoll_wait" in stack
        assert "_fastpath" in stack


def test_a_process_that_was_paused_is_not_stuck(mesh: Factory) -> None:
    with Server(echo) as server:
        m = watched(mesh, server)
        with connect(m.port()) as client:
            for _ in range(2):
                os.kill(m.process.pid, signal.SIGSTOP)
                # It has work all the while.
                client.sendall(b"x" * 100)
                resume_at = time.monotonic() + 1.5 * LIMIT_MS / 1000
                wait_until(lambda at=resume_at: time.monotonic() > at, "more than the limit has passed")  # type: ignore[misc]
                os.kill(m.process.pid, signal.SIGCONT)
                assert read_exactly(client, 100) == b"x" * 100


def test_a_watchdog_that_is_off_watches_nothing(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address) | {"workers": 1, "watchdog": False})
        names = [(task / "comm").read_text() for task in Path(f"/proc/{m.process.pid}/task").iterdir()]
        assert "l4mesh-0\n" in names
        assert "l4mesh-watchdog\n" not in names
