"""Outlier detection on a host that has run out of something itself."""

import socket

import pytest

from l4mesh.lab import Lab
from l4mesh.netns import run_in_namespace
from tests.conftest import Factory
from tests.support.mesh import simple
from tests.support.peers import DEADLINE_S, Server, echo, reset
from tests.support.waiting import wait_until

pytestmark = pytest.mark.netns


def dial(port: int, own_port: int) -> socket.socket:
    client = socket.socket()
    client.settimeout(DEADLINE_S)
    client.bind(("127.0.0.1", own_port))
    client.connect(("127.0.0.1", port))
    return client


def test_running_out_of_ports_is_not_the_endpoints_fault(mesh: Factory) -> None:
    with Lab() as lab:
        here = lab.host("here")
        with run_in_namespace(here.path, lambda: Server(echo)) as server:
            m = mesh(simple(server.address, outlier_detection={"consecutive_failures": 1}), prefix=tuple(here.command()))
            port = m.port()
            # The kernel gives two ports to those who don't ask for one.
            here.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40001")
            clients = [run_in_namespace(here.path, lambda own=own: dial(port, own)) for own in (50001, 50002)]  # type: ignore[misc]
            for client in clients:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
            # At its first read, or before connect() has returned.
            with pytest.raises(ConnectionResetError), run_in_namespace(here.path, lambda: dial(port, 50003)) as third:
                third.recv(1)
            m.wait_closed(local_exhausted=1)
            (endpoint,) = m.cluster()["endpoints"]
            assert endpoint["failures"] == {}
            assert endpoint["out"] == []
            # A reset leaves no port behind in TIME_WAIT.
            for client in clients:
                reset(client)
            wait_until(lambda: m.active() == 0, "both ports are free")
            with run_in_namespace(here.path, lambda: dial(port, 50004)) as fourth:
                fourth.sendall(b"x")
                assert fourth.recv(1) == b"x"
        mesh.stack.close()
