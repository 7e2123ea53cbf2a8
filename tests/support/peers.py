"""Scripted clients and servers on real sockets, each call with a deadline."""

import contextlib
import fcntl
import hashlib
import random
import socket
import struct
import termios
import threading
from collections.abc import Callable, Iterator

DEADLINE_S = 15.0
FIN, RST = "FIN", "RST"


def connect(port: int, host: str = "127.0.0.1", source: str | None = None, rcvbuf: int = 0) -> socket.socket:
    client = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    client.settimeout(DEADLINE_S)
    if rcvbuf:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    if source:
        client.bind((source, 0))
    client.connect((host, port))
    return client


def is_refused(port: int, host: str = "127.0.0.1", source: str | None = None) -> bool:
    """Whether a connection is reset without a byte; the reset may overtake the caller of ``connect``."""
    try:
        with connect(port, host, source) as client:
            return read_to_end(client) == (b"", RST)
    except ConnectionResetError:
        return True


def reset(peer: socket.socket) -> None:
    """Closes with a reset."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def read_to_end(peer: socket.socket) -> tuple[bytes, str]:
    """All that comes, and how it ended: FIN or RST."""
    parts = []
    while True:
        try:
            part = peer.recv(1 << 16)
        except ConnectionResetError:
            return b"".join(parts), RST
        if not part:
            return b"".join(parts), FIN
        parts.append(part)


def read_exactly(peer: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = peer.recv(min(count, 1 << 16))
        if not part:
            raise AssertionError(f"the peer ended {count} bytes too early")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def talk(client: socket.socket) -> None:
    """One short message to a server that echoes, and back."""
    client.sendall(b"hi")
    assert read_exactly(client, 2) == b"hi"


def make_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def unsent(peer: socket.socket) -> int:
    """Bytes that the other end has not acknowledged (SIOCOUTQ)."""
    return int(struct.unpack("i", fcntl.ioctl(peer, termios.TIOCOUTQ, bytes(4)))[0])


class Server:
    """Accepts until closed and runs ``script`` with each connection on a thread; a script's error fails the test at exit."""

    def __init__(self, script: Callable[[socket.socket], None], host: str = "127.0.0.1", port: int = 0) -> None:
        self._script = script
        self._listening = socket.create_server((host, port), backlog=512, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.host, self.port = host, self._listening.getsockname()[1]
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.accepted = 0
        self.errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listening.accept()
            except OSError:
                return
            self.accepted += 1
            peer.settimeout(DEADLINE_S)
            self._open.add(peer)
            thread = threading.Thread(target=self._serve, args=(peer,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, peer: socket.socket) -> None:
        try:
            self._script(peer)
        except OSError:
            # The other side's doing; the client's end of the test sees it as well.
            pass
        except BaseException as error:
            self.errors.append(error)
        finally:
            self._open.discard(peer)
            peer.close()

    def close(self) -> None:
        # Wakes the acceptor, which close alone would not.
        self._listening.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(DEADLINE_S)
        self._listening.close()
        for peer in list(self._open):
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if self.errors and kind is None:
            raise self.errors[0]


def echo(peer: socket.socket) -> None:
    while data := peer.recv(1 << 16):
        peer.sendall(data)
    peer.shutdown(socket.SHUT_WR)


def closed_port(host: str = "127.0.0.1") -> int:
    """A port at which nothing listens and which nobody gets: bound, not listening."""
    holder = socket.socket()
    holder.bind((host, 0))
    _HOLDERS.append(holder)
    return int(holder.getsockname()[1])


_HOLDERS: list[socket.socket] = []


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port whose SYNs are dropped: its accept queue is full and nobody takes from it."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(0)
    port = listening.getsockname()[1]
    fillers = []
    try:
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        yield port
    finally:
        for filler in fillers:
            filler.close()
        listening.close()
