"""Random hostile traffic with every byte checked and nothing left at the end. ``L4MESH_SOAK_SECONDS`` sets how long."""

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections import Counter

from tests.conftest import Factory
from tests.support.mesh import simple
from tests.support.peers import Server, closed_port, connect, make_bytes, read_exactly, reset
from tests.support.proxies import free_port
from tests.support.waiting import wait_until

SECONDS = float(os.environ.get("L4MESH_SOAK_SECONDS", "20"))
ACTORS = 12


def serve(peer: socket.socket) -> None:
    """Answers with the stream that the client's header asks for, checks the client's, and behaves as the header says."""
    seed, up, down, mood = struct.unpack("!IIIB", read_exactly(peer, 13))
    expected, answer = make_bytes(up, seed), make_bytes(down, seed + 1)
    rng = random.Random(seed + 2)
    gone = threading.Event()
    sender = threading.Thread(target=_send, args=(peer, answer, rng, gone, mood == 1))
    sender.start()
    got = 0
    try:
        while part := peer.recv(rng.choice([1, 100, 65536, 262144])):
            assert part == expected[got : got + len(part)], "bytes to upstream differ"
            got += len(part)
    finally:
        sender.join()
    assert got == up or gone.is_set(), "a clean end before all bytes"
    if mood:
        reset(peer)


def _send(peer: socket.socket, data: bytes, rng: random.Random, gone: threading.Event, fickle: bool) -> None:
    """Sends in pieces and ends its half. A fickle one may give up; then the reader wakes and resets: only one thread closes."""
    at = 0
    try:
        while at < len(data):
            if gone.is_set():
                return
            size = rng.choice([1, 3, 1000, 20_000, 200_000])
            peer.sendall(data[at : at + size])
            at += size
            if fickle and rng.random() < 0.1:
                gone.set()
                peer.shutdown(socket.SHUT_RD)
                return
        peer.shutdown(socket.SHUT_WR)
    except OSError:
        # A socket tells its error once: to us, so that the reader now sees a clean end.
        gone.set()


class Actor(threading.Thread):
    def __init__(self, index: int, port: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.rng = random.Random(index)
        self.port, self.stop = port, stop
        self.outcomes: Counter[str] = Counter()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                self.outcomes[self.play()] += 1
        except BaseException as error:
            self.error = error

    def play(self) -> str:
        rng = self.rng
        seed = rng.getrandbits(31)
        up, down = (rng.choice([0, 1, 500, 60_000, 1_500_000]) for _ in range(2))
        mood = rng.choice([0, 0, 0, 1, 2])
        leave = rng.random() < 0.15
        expected = make_bytes(down, seed + 1)
        source = f"127.0.{rng.randrange(1, 100)}.{rng.randrange(1, 250)}"
        try:
            client = connect(self.port, source=source, rcvbuf=rng.choice([0, 4096]))
        except ConnectionResetError:
            return "refused"
        client.settimeout(60)
        with contextlib.closing(client):
            header = struct.pack("!IIIB", seed, up, down, mood)
            data = header + make_bytes(up, seed)
            gone = threading.Event()
            sender = threading.Thread(target=_send, args=(client, data, random.Random(seed + 3), gone, False))
            sender.start()
            got = 0
            try:
                while part := client.recv(rng.choice([1, 10, 5000, 262144])):
                    assert part == expected[got : got + len(part)], "bytes to downstream differ"
                    got += len(part)
                    if leave and rng.random() < 0.2:
                        gone.set()
                        sender.join()
                        reset(client)
                        return "left"
            except ConnectionResetError:
                # An endpoint's reset, a limit, or a dead endpoint: never silent, and never with wrong bytes.
                return "reset"
            finally:
                sender.join()
            if gone.is_set():
                return "reset"
            assert got == down, f"a clean end after {got} of {down} bytes"
            return "complete"


def test_hostile_traffic_loses_no_byte_and_leaves_nothing(mesh: Factory) -> None:
    rng = random.Random(99)
    with Server(serve) as a, Server(serve) as b:
        listener = {"bind": f"127.0.0.1:{free_port()}"}
        dead = f"127.0.0.1:{closed_port()}"
        choices = [[a.address, b.address], [a.address, dead], [b.address], [b.address, dead, a.address]]
        m = mesh(simple(a.address, b.address, listener=listener))
        stop = threading.Event()
        actors = [Actor(index, m.port(), stop) for index in range(ACTORS)]
        for actor in actors:
            actor.start()
        end = time.monotonic() + SECONDS
        reloads = 0
        while time.monotonic() < end and all(actor.error is None for actor in actors):
            reloads += 1
            balance = rng.choice(["round_robin", "least_connections", "random", "source_hash", "maglev"])
            config = simple(*rng.choice(choices), listener=listener, balance=balance, limits={"connections": 1000 + reloads})
            m.reload(config | {"splice": rng.choice(["on", "off"])})
        stop.set()
        for actor in actors:
            actor.join(120)
            assert not actor.is_alive(), "an actor hangs"
            if actor.error:
                raise actor.error
        outcomes = sum((actor.outcomes for actor in actors), Counter())
        assert outcomes["complete"] > 20, outcomes
        assert outcomes["left"] and outcomes["reset"], outcomes
        wait_until(lambda: m.active() == 0, "all connections have ended", 60)
        assert a.errors == b.errors == []
