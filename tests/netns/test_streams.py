"""What a stream's sockets are set to, on a host whose network is not ours to judge."""

import socket
import threading
from pathlib import Path

import pytest

from l4mesh.lab import Host, Lab
from l4mesh.netns import run_in_namespace
from tests.conftest import Factory
from tests.support.mesh import simple
from tests.support.peers import DEADLINE_S, FIN, Server, connect, make_bytes, read_exactly, read_to_end
from tests.support.waiting import wait_until

MB = 1 << 20
AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text("ascii").split()
pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif("bbr" not in AVAILABLE, reason="the kernel has no BBR, which is all that this is about"),
]


def congestion_control(host: Host, filters: str, state: str = "established") -> str:
    """Of the one connection, or the sockets of the one listener, that ``ss`` finds."""
    lines = host.run("ss", "-tinH", "state", state, *filters.split()).splitlines()
    (algorithm,) = {line.split()[0] for line in lines if line.startswith("\t")}
    return algorithm


def echo(peer: socket.socket) -> None:
    peer.sendall(read_exactly(peer, 1))
    read_exactly(peer, 1)


def assert_used(port: int, address: str, client_host: Host, here: Host, wanted: dict[str, str]) -> None:
    """Of a connection that has said one byte: which congestion control what each filter finds in ``here`` has."""
    with run_in_namespace(client_host.path, lambda: connect(port, address)) as client:
        client.sendall(b"x")
        assert read_exactly(client, 1) == b"x"
        assert {filters: congestion_control(here, filters) for filters in wanted} == wanted
        client.sendall(b"x")
        assert read_to_end(client) == (b"", FIN)


@pytest.mark.parametrize("v6", [False, True])
def test_what_is_known_to_stay_here_is_never_paced(mesh: Factory, v6: bool) -> None:
    loopback = "::1" if v6 else "127.0.0.1"
    with Lab() as lab:
        here = lab.host("here")
        here.run("sysctl", "-qw", "net.ipv4.tcp_congestion_control=bbr")
        with run_in_namespace(here.path, lambda: Server(echo, loopback)) as server:
            m = mesh(
                simple(server.address, listener={"bind": f"[{loopback}]:0" if v6 else f"{loopback}:0"}), prefix=tuple(here.command())
            )
            port = m.port()
            ours = {f"sport = :{port}": "reno", f"dport = :{server.port}": "reno"}
            others = {f"dport = :{port}": "bbr", f"sport = :{server.port}": "bbr"}
            assert_used(port, loopback, here, here, ours | others)
        mesh.stack.close()


def test_a_workload_is_here_and_what_else_comes_from_outside_is_not(mesh: Factory) -> None:
    with Lab() as lab:
        here, pod = lab.host("here"), lab.host("pod")
        lab.link(here, "eth0", pod, "eth0")
        here.run("ip", "address", "add", "10.9.0.1/24", "dev", "eth0")
        pod.run("ip", "address", "add", "10.9.0.2/24", "dev", "eth0")
        here.run("sysctl", "-qw", "net.ipv4.tcp_congestion_control=bbr")
        with run_in_namespace(pod.path, lambda: Server(echo, "10.9.0.2")) as server:
            config = simple(server.address, listener={"bind": "10.9.0.1:0"}) | {
                "workloads": [{"name": "pod", "addresses": ["10.9.0.2"]}]
            }
            m = mesh(config, prefix=tuple(here.command()))
            port = m.port()
            # Accepted before it is known from where.
            assert_used(port, "10.9.0.1", pod, here, {f"dport = :{server.port}": "reno", f"sport = :{port}": "bbr"})
        mesh.stack.close()


def test_a_listener_that_captures_what_leaves_has_neighbours_only(mesh: Factory) -> None:
    with Lab() as lab:
        here = lab.host("here")
        here.run("sysctl", "-qw", "net.ipv4.tcp_congestion_control=bbr")
        for direction, algorithm in (("outbound", "reno"), ("inbound", "bbr")):
            listener = {"bind": "0.0.0.0:0", "capture": "redirect", "direction": direction}
            m = mesh(simple("127.0.0.1:9", listener=listener), prefix=tuple(here.command()))
            assert congestion_control(here, f"sport = :{m.port()}", "listening") == algorithm
            mesh.stack.close()


def test_a_stream_within_the_host_is_not_paced(mesh: Factory) -> None:
    data = make_bytes(4 * MB)

    def serve(peer: socket.socket) -> None:
        assert read_exactly(peer, len(data)) == data
        peer.sendall(data)
        read_exactly(peer, 1)

    with Lab() as lab:
        here, far = lab.host("here"), lab.host("far")
        lab.link(here, "eth0", far, "eth0")
        here.run("ip", "address", "add", "10.9.0.1/24", "dev", "eth0")
        far.run("ip", "address", "add", "10.9.0.2/24", "dev", "eth0")
        here.run("sysctl", "-qw", "net.ipv4.tcp_congestion_control=bbr")
        with run_in_namespace(far.path, lambda: Server(serve, "10.9.0.2")) as server:
            m = mesh(simple(server.address, listener={"bind": "10.9.0.1:0"}), prefix=tuple(here.command()))
            port = m.port()
            with run_in_namespace(here.path, lambda: connect(port, "10.9.0.1")) as client:
                sender = threading.Thread(target=client.sendall, args=(data,))
                sender.start()
                assert read_exactly(client, len(data)) == data
                sender.join(DEADLINE_S)
                wait_until(lambda: congestion_control(here, f"sport = :{port}") == "reno", "the client's stream is local")
                assert congestion_control(here, f"dport = :{server.port}") == "bbr"
                client.sendall(b"x")
                # The server has it: when it is closed before, it looks as if the byte were lost.
                assert read_to_end(client) == (b"", FIN)
        mesh.stack.close()
