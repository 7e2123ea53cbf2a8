"""What a stream's sockets are set to, on a host whose network is not ours to judge."""

import socket
import threading

import pytest

from l4mesh.lab import Host, Lab
from l4mesh.netns import run_in_namespace
from tests.conftest import Factory
from tests.support.mesh import simple
from tests.support.peers import DEADLINE_S, FIN, Server, connect, make_bytes, read_exactly, read_to_end
from tests.support.waiting import wait_until

pytestmark = pytest.mark.netns

MB = 1 << 20


def congestion_control(host: Host, filters: str) -> str:
    """Of the one established connection that ``ss`` finds."""
    lines = host.run("ss", "-tinH", "state", "established", *filters.split()).splitlines()
    (algorithm,) = [line.split()[0] for line in lines if line.startswith("\t")]
    return algorithm


def test_a_stream_within_the_host_is_not_paced(mesh: Factory) -> None:
    # The host's own choice is reno here, so that a change shows; in the wild it is BBR that costs a timer for every send.
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
        here.run("sysctl", "-qw", "net.ipv4.tcp_congestion_control=reno")
        with run_in_namespace(far.path, lambda: Server(serve, "10.9.0.2")) as server:
            m = mesh(simple(server.address, listener={"bind": "10.9.0.1:0"}), prefix=tuple(here.command()))
            port = m.port()
            with run_in_namespace(here.path, lambda: connect(port, "10.9.0.1")) as client:
                sender = threading.Thread(target=client.sendall, args=(data,))
                sender.start()
                assert read_exactly(client, len(data)) == data
                sender.join(DEADLINE_S)
                wait_until(lambda: congestion_control(here, f"sport = :{port}") == "cubic", "the client's stream is local")
                assert congestion_control(here, f"dport = :{server.port}") == "reno"
                client.sendall(b"x")
                # The server has it: when it is closed before, it looks as if the byte were lost.
                assert read_to_end(client) == (b"", FIN)
        mesh.stack.close()
