"""Bytes: in order and complete, whatever their sizes and the peers' pace. Invariants 1, 2 and 4 of the design."""

import os
import queue
import random
import socket
import threading
import time

import pytest

from tests.conftest import Factory
from tests.support.mesh import Config, simple
from tests.support.peers import RST, Server, connect, digest, echo, make_bytes, read_exactly, read_to_end, reset
from tests.support.waiting import wait_until

MB = 1 << 20


def splice(on: bool) -> Config:
    return {"splice": "on" if on else "off"}


def send_in_pieces(peer: socket.socket, data: bytes, seed: int) -> None:
    rng = random.Random(seed)
    at = 0
    while at < len(data):
        size = rng.choice([1, 7, 100, 1448, 4096, 65536, 300_000])
        peer.sendall(data[at : at + size])
        at += size


@pytest.mark.parametrize("on", [True, False], ids=["splice", "copy"])
def test_both_directions_at_once_are_byte_exact(mesh: Factory, on: bool) -> None:
    up, down = make_bytes(48 * MB, 1), make_bytes(32 * MB, 2)
    seen: list[str] = []

    def serve(peer: socket.socket) -> None:
        sender = threading.Thread(target=lambda: (send_in_pieces(peer, down, 3), peer.shutdown(socket.SHUT_WR)))
        sender.start()
        seen.append(digest(read_to_end(peer)[0]))
        sender.join()

    with Server(serve) as server:
        m = mesh(simple(server.address) | splice(on))
        with connect(m.port()) as client:
            sender = threading.Thread(target=lambda: (send_in_pieces(client, up, 4), client.shutdown(socket.SHUT_WR)))
            sender.start()
            data, end = read_to_end(client)
            sender.join()
        wait_until(lambda: seen, "the endpoint has read to the end")
        assert (digest(data), end) == (digest(down), "FIN")
        assert seen == [digest(up)]
        m.wait_closed(downstream_closed=0, upstream_closed=1) if m.closed().get("upstream_closed") else m.wait_closed(
            downstream_closed=1
        )
        spliced = m.total("l4mesh_bytes_spliced_total")
        assert spliced > 40 * MB if on else spliced == 0
        assert m.total("l4mesh_bytes_total") == len(up) + len(down)


def test_one_byte_segments_in_a_bulk_stream_neither_hang_nor_lose(mesh: Factory) -> None:
    # A pipe slot is used up by every segment, whatever its size: 16 single bytes can fill a 64 KiB pipe, and EAGAIN then does
    # not mean that the socket is empty. Other proxies have hung here.
    bulk = make_bytes(4 * MB, 5)
    tail = make_bytes(3000, 6)

    def serve(peer: socket.socket) -> None:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        read_exactly(peer, 1)
        for _ in range(3):
            peer.sendall(bulk)
            for byte in tail:
                peer.sendall(bytes([byte]))
        peer.shutdown(socket.SHUT_WR)

    with Server(serve) as server:
        m = mesh(simple(server.address))
        with connect(m.port(), rcvbuf=65536) as client:
            client.sendall(b"x")
            assert read_to_end(client) == ((bulk + tail) * 3, "FIN")
        assert m.total("l4mesh_bytes_spliced_total") > 0


@pytest.mark.parametrize("up", [True, False], ids=["to the server", "to the client"])
@pytest.mark.parametrize("on", [True, False], ids=["splice", "copy"])
def test_nothing_of_a_stream_is_left_lying(mesh: Factory, on: bool, up: bool) -> None:
    # A stream is read in large steps, and the kernel is told not to wake us for less. The end of a burst, a byte that comes alone after a
    # pause and an answer must come through all the same; nothing here ends the connection.
    accepted: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
    done = threading.Event()

    def serve(peer: socket.socket) -> None:
        accepted.put(peer)
        done.wait(60)

    with Server(serve) as server:
        m = mesh(simple(server.address) | splice(on))
        with connect(m.port()) as client:
            client.sendall(b"x")
            peer = accepted.get(timeout=15)
            assert read_exactly(peer, 1) == b"x"
            writer, reader = (client, peer) if up else (peer, client)

            def pass_on(count: int) -> None:
                data = make_bytes(count, count)
                sender = threading.Thread(target=writer.sendall, args=(data,))
                sender.start()
                assert digest(read_exactly(reader, count)) == digest(data)
                sender.join()

            for _ in range(8 if on else 3):
                # Of one segment each, so that each is a step.
                rounds = 0
                held = m.total("l4mesh_stream_holds_total")
                while m.total("l4mesh_stream_holds_total") < held + 5:
                    rounds += 1
                    assert rounds < 200, "no stream was held"
                    for _ in range(10):
                        pass_on(60_000)
                for count in (1, 262_143, 60_000, 262_145, 100, 3 * MB + 1, 60_000, 2):
                    pass_on(count)
                reader.sendall(b"answer")
                assert read_exactly(writer, 6) == b"answer"
            done.set()
            client.shutdown(socket.SHUT_WR)


def test_a_stream_that_becomes_a_conversation_is_copied_again(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address))
        with connect(m.port()) as client:
            for round_ in range(3):
                bulk = make_bytes(8 * MB, round_)
                sender = threading.Thread(target=client.sendall, args=(bulk,))
                sender.start()
                assert digest(read_exactly(client, len(bulk))) == digest(bulk)
                sender.join()
                before = m.total("l4mesh_bytes_copied_total")
                for turn in range(100):
                    client.sendall(b"ping %d" % turn)
                    assert read_exactly(client, len(b"ping %d" % turn)) == b"ping %d" % turn
                assert m.total("l4mesh_bytes_copied_total") > before
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == (b"", "FIN")


@pytest.mark.parametrize("on", [True, False], ids=["splice", "copy"])
def test_a_reader_that_stops_stops_the_writer_and_loses_nothing(mesh: Factory, on: bool) -> None:
    sent = [0]
    total = 256 * MB
    chunk = make_bytes(MB, 7)

    def serve(peer: socket.socket) -> None:
        read_exactly(peer, 1)
        for _ in range(total // MB):
            peer.sendall(chunk)
            sent[0] += MB
        peer.shutdown(socket.SHUT_WR)

    with Server(serve) as server:
        m = mesh(simple(server.address) | splice(on))
        with connect(m.port(), rcvbuf=65536) as client:
            client.sendall(b"x")
            stalled = [-1, 0]

            def is_stalled() -> bool:
                stalled[1] = stalled[1] + 1 if stalled[0] == sent[0] and sent[0] else 0
                stalled[0] = sent[0]
                return stalled[1] > 100

            wait_until(is_stalled, "the writer is held back")
            assert sent[0] < 40 * MB
            rss_kb = int(open(f"/proc/{m.process.pid}/smaps_rollup").read().split("Private_Dirty:")[1].split()[0])
            # Sanitizers have memory of their own.
            assert rss_kb < 80_000 or os.environ.get("L4MESH_PRELOAD")
            got = 0
            while part := client.recv(1 << 18):
                start = got % MB
                expected = (chunk + chunk)[start : start + len(part)] if len(part) <= MB else None
                assert expected is None or part == expected
                got += len(part)
            assert got == total


def test_urgent_data_hides_no_later_byte(mesh: Factory) -> None:
    # recv stops short at the urgent mark; with the FIN behind it, a short read must not be taken for the end.
    def serve(peer: socket.socket) -> None:
        data, _ = read_to_end(peer)
        peer.sendall(data)

    with Server(serve) as server:
        m = mesh(simple(server.address))
        for _ in range(20):
            with connect(m.port()) as client:
                client.sendall(b"before")
                client.send(b"!", socket.MSG_OOB)
                client.sendall(b"after" * 100)
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(client) == (b"before!" + b"after" * 100, "FIN")


def test_urgent_data_in_a_stream_hides_no_later_byte(mesh: Factory) -> None:
    # splice stops at the urgent mark as at the end of what there is; with the FIN behind it, as at the end of the stream.
    stream = make_bytes(4 * MB)

    def serve(peer: socket.socket) -> None:
        assert read_exactly(peer, len(stream)) == stream
        peer.sendall(b"go on")
        data, _ = read_to_end(peer)
        peer.sendall(data)

    with Server(serve) as server:
        m = mesh(simple(server.address))
        with connect(m.port()) as client:
            client.sendall(stream)
            assert read_exactly(client, 5) == b"go on"
            assert [connection["spliced"] for connection in m.get("/connections")["connections"]] == [True]
            client.sendall(b"before")
            client.send(b"!", socket.MSG_OOB)
            client.sendall(b"after" * 100)
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == (b"before!" + b"after" * 100, "FIN")


def test_a_server_may_speak_first(mesh: Factory) -> None:
    def serve(peer: socket.socket) -> None:
        peer.sendall(b"220 ready\r\n")
        assert read_exactly(peer, 5) == b"QUIT\n"

    with Server(serve) as server:
        m = mesh(simple(server.address))
        with connect(m.port()) as client:
            assert read_exactly(client, 11) == b"220 ready\r\n"
            client.sendall(b"QUIT\n")
            assert read_to_end(client) == (b"", "FIN")


def test_a_client_that_resets_mid_stream_frees_everything(mesh: Factory) -> None:
    def serve(peer: socket.socket) -> None:
        while True:
            peer.sendall(b"z" * 65536)

    with Server(serve) as server:
        m = mesh(simple(server.address))
        port = m.port()
        for _ in range(50):
            client = connect(port, rcvbuf=32768)
            client.sendall(b"x")
            read_exactly(client, 300_000)
            reset(client)
        m.wait_closed(downstream_reset=50)


def test_an_endpoint_that_resets_while_the_client_does_not_read_still_delivers(mesh: Factory) -> None:
    ready = threading.Event()

    def serve(peer: socket.socket) -> None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        read_exactly(peer, 1)
        peer.sendall(b"d" * 150_000)
        wait_until(lambda: _unsent(peer) == 0, "the bytes have left")
        reset(peer)
        ready.set()

    with Server(serve) as server:
        m = mesh(simple(server.address))
        with connect(m.port(), rcvbuf=8192) as client:
            client.sendall(b"x")
            assert ready.wait(15)
            assert m.closed().get("upstream_reset", 0) == 0
            data, end = read_to_end(client)
            assert (len(data), end) == (150_000, RST)
        m.wait_closed(upstream_reset=1)


def _unsent(peer: socket.socket) -> int:
    import fcntl
    import struct
    import termios

    return int(struct.unpack("i", fcntl.ioctl(peer, termios.TIOCOUTQ, b"\0" * 4))[0])


def test_ipv6_listeners_and_endpoints(mesh: Factory) -> None:
    with Server(echo, host="::1") as server:
        m = mesh(simple(server.address, listener={"bind": ["[::1]:0", "127.0.0.1:0"]}))
        for host, port in (("::1", m.port(bind=0)), ("127.0.0.1", m.port(bind=1))):
            with connect(port, host) as client:
                client.sendall(b"six")
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(client) == (b"six", "FIN")


def test_idle_connections_own_no_pipe_and_little_memory(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address) | {"workers": 1})
        clients = []

        def open_one() -> None:
            client = connect(m.port()) if not clients else connect(port)
            client.sendall(b"hi")
            assert read_exactly(client, 2) == b"hi"
            clients.append(client)

        port = m.port()
        open_one()
        before = _anonymous_kb(m.process.pid)
        for _ in range(1000):
            open_one()
        grown = _anonymous_kb(m.process.pid) - before
        assert m.total("l4mesh_pipes_open") == 0
        # The sanitizers put something around each allocation.
        assert grown * 1024 / 1000 < (2048 if os.environ.get("L4MESH_PRELOAD") else 1024)
        for client in clients:
            client.close()


def _anonymous_kb(pid: int) -> int:
    return int(next(line for line in open(f"/proc/{pid}/status") if line.startswith("RssAnon")).split()[1])


def test_many_short_connections_leave_nothing(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address))
        port = m.port()
        end = time.monotonic() + 60
        for turn in range(1500):
            with connect(port, source=f"127.0.0.{2 + turn % 50}") as client:
                client.sendall(b"a")
                assert read_exactly(client, 1) == b"a"
            assert time.monotonic() < end
        wait_until(lambda: sum(m.closed().values()) == 1500, "all are counted")
