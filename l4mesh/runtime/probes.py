"""One health check on the wire: connect, PROXY header, TLS, and what is said in the protocol of the endpoint.

``Prober`` moves all checks that are under way, over an epoll of its own which the control loop watches: uvloop's way to watch a socket
costs more than a whole check here. What is said is a ``Talk``, a generator without I/O: it yields what to send and is sent all that has
come so far, until it returns what it thinks. A check that only connects ends before the handshake's last packet, with a reset, as
HAProxy's does: the server's program never hears of it, and nothing is left in TIME_WAIT.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

from l4mesh.config.quantities import compile_regex
from l4mesh.model import Expect, HealthCheck, HealthKind, ProxyProtocol

ANSWER_MAX_BYTES = 64 << 10
READS_MAX = 256
"""Of one answer: a regular expression looks at all of it again after each."""
SHOWN_MAX = 60
EVENTS_MAX = 256
TURN_MAX_S = 0.005
"""The loop has other work: a TLS handshake takes a millisecond of it."""
LOCAL_ERRORS = frozenset(
    {
        errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EACCES, errno.EPERM,
        errno.EAGAIN,
    }
)  # fmt: skip
"""Never the endpoint's fault; the same as in ``dial_reason`` of the data path."""

_RESET = struct.pack("ii", 1, 0)
_BAD = select.EPOLLERR | select.EPOLLHUP
_WANTS = {ssl.SSLWantReadError: select.EPOLLIN, ssl.SSLWantWriteError: select.EPOLLOUT}

# -- what is said ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Said:
    """What a talk thinks of an answer. ``why`` is "" when all is well; ``farewell`` is sent before the end."""

    why: str = ""
    farewell: bytes = b""


Talk = Generator[bytes, bytearray, Said]
"""Yields what to send next, and is sent everything that has been received. EOFError is thrown in when no more can come."""

PING = b"*1\r\n$4\r\nPING\r\n"
TERMINATE = b"X\0\0\0\x04"
CANNOT_CONNECT_NOW = b"57P03"
"""PostgreSQL starts up, shuts down or recovers."""
TOO_MANY_CONNECTIONS, HOST_BLOCKED = 1040, 1129
"""With these MySQL refuses before it greets."""


def talk_expect(send: bytes, expect: Expect) -> Talk:
    """Sends, and waits until what is expected comes."""
    got = yield send
    if expect.is_regex:
        regex = compile_regex(expect.wanted)
        while not regex.search(bytes(got)):
            got = yield b""
        return Said()
    looked = 0
    while got.find(expect.wanted, looked) < 0:
        looked = max(0, len(got) - len(expect.wanted) + 1)
        got = yield b""
    return Said()


def talk_http(host: str, path: str, status: tuple[tuple[int, int], ...]) -> Talk:
    """GET, and no more of the answer than its status line. Interim answers come before it, unasked (RFC 9110, 15.2)."""
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: l4mesh-health\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    got, start = (yield request.encode()), 0
    while True:
        line, got = yield from _line(got, start)
        version, _, rest = line.partition(b" ")
        code = rest[:3]
        if version not in (b"HTTP/1.1", b"HTTP/1.0") or not code.isdigit() or len(code) < 3 or rest[3:4] not in (b"", b" "):
            return Said(f"expected an HTTP status, got {show(line)}")
        if any(first <= int(code) <= last for first, last in status):
            return Said()
        if not 100 <= int(code) < 200 or int(code) == 101:
            return Said(f"status {int(code)}")
        while (end := got.find(b"\r\n\r\n", start)) < 0:
            got = yield b""
        start = end + 4


def talk_redis() -> Talk:
    """PING. A server that wants a password, or lets this user do nothing, is alive; one that loads its data is not ready."""
    line, _ = yield from _line((yield PING))
    if line == b"+PONG" or line.startswith((b"-NOAUTH ", b"-NOPERM ")):
        return Said()
    return Said(f"expected +PONG, got {show(line)}")


def talk_postgresql(user: str) -> Talk:
    """A startup packet, as pg_isready sends it and judges the answer: only "cannot connect now" is not ready. Source: PostgreSQL's
    manual, chapter "Message Formats"."""
    words = b"\0".join((b"user", user.encode(), b"database", b"postgres", b"application_name", b"l4mesh-health", b"", b""))
    got = yield struct.pack("!II", len(words) + 8, 196608) + words
    while len(got) < 5:
        got = yield b""
    kind, length = got[:1], int.from_bytes(got[1:5], "big")
    if kind not in b"RENv" or not 4 <= length <= 30_000:
        return Said(f"expected an answer of PostgreSQL, got {show(got)}")
    while len(got) < 1 + length:
        got = yield b""
    body = bytes(got[5 : 1 + length])
    if kind == b"E":
        fields = {field[:1]: field[1:] for field in body.split(b"\0") if field}
        if fields.get(b"C") == CANNOT_CONNECT_NOW:
            return Said(f"not ready: {show(fields.get(b'M', b''))}")
        return Said() if b"C" in fields else Said(f"expected an answer of PostgreSQL, got {show(got)}")
    return Said(farewell=TERMINATE)


def talk_mysql(user: str) -> Talk:
    """Logs in without a password, as mysqladmin ping does: that this is refused is a sign of life. To leave after the greeting would be
    cheaper, but the server counts that as an error, and after max_connect_errors of them blocks the host. Source: MySQL's internals
    manual, "Connection Phase Packets"."""
    greeting, got = yield from _mysql_packet(b"", 0)
    if greeting[:1] == b"\xff":
        return Said(f"not ready: {_mysql_error(greeting)}")
    end = greeting.find(b"\0", 1)
    if greeting[:1] != b"\x0a" or end < 0 or len(greeting) < end + 13:
        return Said(f"expected a greeting of MySQL, got {show(got)}")
    # PROTOCOL_41, SECURE_CONNECTION, PLUGIN_AUTH; utf8; an empty password.
    login = struct.pack("<IIB23x", 0x00088200, 1 << 24, 33) + user.encode() + b"\0\0mysql_native_password\0"
    answer, got = yield from _mysql_packet(struct.pack("<I", len(login) | 1 << 24) + login, len(greeting) + 4)
    if answer[:1] == b"\xfe":
        # Another method; an empty password is the same in all of them.
        answer, _ = yield from _mysql_packet(struct.pack("<I", 3 << 24), len(greeting) + len(answer) + 8)
    if answer[:1] == b"\0":
        return Said(farewell=b"\x01\0\0\0\x01")
    if answer[:1] != b"\xff" or len(answer) < 3:
        return Said(f"expected an answer of MySQL, got {show(answer)}")
    code = int.from_bytes(answer[1:3], "little")
    return Said(f"not ready: {_mysql_error(answer)}") if code in (TOO_MANY_CONNECTIONS, HOST_BLOCKED) else Said()


def _mysql_packet(send: bytes, start: int) -> Generator[bytes, bytearray, tuple[bytes, bytearray]]:
    got = yield send
    while len(got) < start + 4:
        got = yield b""
    length = int.from_bytes(got[start : start + 3], "little")
    if length > ANSWER_MAX_BYTES:
        return b"", got
    while len(got) < start + 4 + length:
        got = yield b""
    return bytes(got[start + 4 : start + 4 + length]), got


def _mysql_error(packet: bytes) -> str:
    return f"error {int.from_bytes(packet[1:3], 'little')}, {show(packet[3:])}"


def _line(got: bytearray, start: int = 0) -> Generator[bytes, bytearray, tuple[bytes, bytearray]]:
    """The line that begins there, without its end, and all that has come by then."""
    while (end := got.find(b"\n", start)) < 0:
        if len(got) - start > 4096:
            return bytes(got[start : start + SHOWN_MAX]), got
        got = yield b""
    return bytes(got[start:end]).removesuffix(b"\r"), got


def show(got: bytes | bytearray) -> str:
    """Bytes of a stranger, fit for a log: printable, and not many."""
    if not got:
        return "nothing"
    text = "".join(chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in got[:SHOWN_MAX]).strip()
    return text if len(got) <= SHOWN_MAX else f"{text}..."


# -- one check ---------------------------------------------------------------------------------------------------------------


class Unfit(Exception):
    """A check that can't be made for a reason of ours; the message says which."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Of TLS: whom a check speaks as, and who may answer. Without an ``identity`` it shows nothing and looks at nothing."""

    identity: str = ""
    peers: tuple[str, ...] = ()
    allow_tls12: bool = True


Judge = Callable[[ssl.SSLSocket], None]
"""Looks at the other end's certificate; raises ssl.SSLError when that is not who it should be."""
Secure = Callable[[Terms], tuple[ssl.SSLContext, Judge | None]]
"""Raises Unfit."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What to check: everything that decides the outcome, so that equal probes are one."""

    check: HealthCheck
    host: str
    """IP literal."""
    port: int
    header: ProxyProtocol
    terms: Terms | None = None
    """None is plaintext."""

    @property
    def only_connects(self) -> bool:
        return self.check.kind == HealthKind.TCP and not self.check.expect and self.header == ProxyProtocol.OFF

    def talk(self) -> Talk | None:
        check = self.check
        if check.kind == HealthKind.TCP:
            return talk_expect(check.send, check.expect) if check.expect else None
        if check.kind == HealthKind.HTTP:
            host = f"[{self.host}]" if ":" in self.host else self.host
            return talk_http(check.host or f"{host}:{self.port}", check.path, check.status)
        if check.kind == HealthKind.REDIS:
            return talk_redis()
        if check.kind == HealthKind.POSTGRESQL:
            return talk_postgresql(check.user)
        return talk_mysql(check.user) if check.kind == HealthKind.MYSQL else None


HEADERS = {ProxyProtocol.OFF: b"", ProxyProtocol.V1: b"PROXY UNKNOWN\r\n", ProxyProtocol.V2: b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"}
"""Version 2's LOCAL, and the nearest that version 1 has: the connection is the proxy's own."""

Done = Callable[[str | None, str], None]
"""Why the check failed, "" when it passed; or None, and why it could not be made."""


class _UnderWay:
    __slots__ = ("context", "deadline_s", "done", "fd", "got", "judge", "out", "probe", "reads", "sock", "stage", "talk")

    def __init__(self, probe: Probe, sock: socket.socket, deadline_s: float, done: Done) -> None:
        self.probe = probe
        self.sock = sock
        self.fd = sock.fileno()
        self.context: ssl.SSLContext | None = None
        self.judge: Judge | None = None
        self.deadline_s = deadline_s
        self.done = done
        self.stage = "connect"
        self.talk: Talk | None = None
        self.got = bytearray()
        self.out = b""
        self.reads = 0


class Prober:
    """Makes checks. ``mark``: put on their sockets; 0 is none. Register ``fileno`` for reading with the loop and call ``turn`` then."""

    def __init__(self, secure: Secure) -> None:
        self._secure = secure
        self._epoll = select.epoll()
        self._under_way: dict[int, _UnderWay] = {}
        self.mark = 0

    def fileno(self) -> int:
        return self._epoll.fileno()

    def __len__(self) -> int:
        """Checks under way."""
        return len(self._under_way)

    def close(self) -> None:
        for one in self._under_way.values():
            one.sock.close()
        self._under_way.clear()
        self._epoll.close()

    def begin(self, probe: Probe, deadline_s: float, done: Done) -> None:
        """``done`` is called once, possibly before this returns."""
        try:
            context, judge = self._secure(probe.terms) if probe.terms else (None, None)
            sock = socket.socket(socket.AF_INET6 if ":" in probe.host else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except (Unfit, OSError) as error:
            done(None, str(error) if isinstance(error, Unfit) else _name(error.errno))
            return
        one = _UnderWay(probe, sock, deadline_s, done)
        one.context, one.judge = context, judge
        try:
            if self.mark:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self.mark)
            if context is None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                if probe.only_connects:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            error_number = sock.connect_ex((probe.host, probe.port))
            if error_number not in (0, errno.EINPROGRESS):
                raise OSError(error_number, "")
            self._epoll.register(one.fd, select.EPOLLOUT)
        except OSError as error:
            self._end_with(one, error)
            return
        self._under_way[one.fd] = one

    def turn(self) -> bool:
        """Goes on with the checks whose sockets are ready, for a while. True: there are more of them."""
        until_s = time.monotonic() + TURN_MAX_S
        ready = self._epoll.poll(0, EVENTS_MAX)
        for done, (fd, events) in enumerate(ready, 1):
            one = self._under_way.get(fd)
            if one is not None:
                self._advance(one, events)
            if time.monotonic() > until_s:
                # What is left is ready still when the loop comes round.
                return done < len(ready)
        return len(ready) == EVENTS_MAX

    def expire(self, now_s: float) -> float:
        """Ends the checks whose time is over, and gives the earliest deadline of the others, or infinity."""
        for one in [one for one in self._under_way.values() if one.deadline_s <= now_s]:
            timeout_ms = one.probe.check.timeout_ms
            shown = f"{timeout_ms / 1000:g}s" if timeout_ms >= 1000 else f"{timeout_ms}ms"
            self._end(one, f"timeout after {shown} in {one.stage}{_of_answer(one)}")
        return min((one.deadline_s for one in self._under_way.values()), default=float("inf"))

    def grant(self, more_s: float) -> None:
        """Moves all deadlines: the process itself stood still for so long."""
        for one in self._under_way.values():
            one.deadline_s += more_s

    # -- the life of a check ---------------------------------------------------------------------------------------------

    def _advance(self, one: _UnderWay, events: int) -> None:
        try:
            if one.stage == "connect":
                if events & _BAD and (error_number := one.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
                    raise OSError(error_number, "")
                self._connected(one)
            elif one.stage == "tls":
                self._shake(one)
            else:
                self._converse(one)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wants:
            self._epoll.modify(one.fd, _WANTS[type(wants)])
        except BlockingIOError:
            self._epoll.modify(one.fd, select.EPOLLOUT if one.out else select.EPOLLIN)
        except OSError as error:
            self._end_with(one, error)
        except Exception:
            # A bug of ours ends this check, and neither the others nor the loop's rest: the socket would stay ready.
            if self._under_way.get(one.fd) is one:
                self._finish(one, None, "an error of l4mesh's own, which stands in its log")
            raise

    def _connected(self, one: _UnderWay) -> None:
        # A port that nobody listens on can be given to our own socket, which then has connected to itself.
        if one.sock.getsockname()[1] == one.probe.port and one.sock.getsockname() == one.sock.getpeername():
            raise OSError(errno.ECONNREFUSED, "")
        header = HEADERS[one.probe.header]
        if header:
            one.sock.send(header)
        if one.context:
            one.stage = "tls"
            name = one.probe.check.sni or None
            one.sock = one.context.wrap_socket(one.sock, do_handshake_on_connect=False, server_hostname=name)
            self._shake(one)
        else:
            self._ready(one)

    def _shake(self, one: _UnderWay) -> None:
        assert isinstance(one.sock, ssl.SSLSocket)
        one.sock.do_handshake()
        if one.judge:
            one.judge(one.sock)
        self._ready(one)

    def _ready(self, one: _UnderWay) -> None:
        one.stage = "expect"
        one.talk = one.probe.talk()
        if one.talk is None:
            self._end(one, "")
            return
        one.out = next(one.talk)
        self._converse(one)

    def _converse(self, one: _UnderWay) -> None:
        """Sends and receives until nothing more can be done now, which BlockingIOError and its kin of TLS say."""
        assert one.talk is not None
        try:
            while True:
                while one.out:
                    one.out = one.out[one.sock.send(one.out) :]
                part = one.sock.recv(ANSWER_MAX_BYTES)
                if not part:
                    one.talk.throw(EOFError)
                one.got += part
                one.reads += 1
                one.out += one.talk.send(one.got)
                if len(one.got) >= ANSWER_MAX_BYTES or one.reads >= READS_MAX:
                    self._end(one, f"not in the first {len(one.got)} bytes{_of_answer(one)}")
                    return
        except StopIteration as end:
            said: Said = end.value
            self._end(one, said.why, said.farewell)
        except EOFError:
            self._end(one, f"closed{_of_answer(one)}" if one.got else "closed without an answer")

    def _end_with(self, one: _UnderWay, error: OSError) -> None:
        if error.errno in LOCAL_ERRORS and not isinstance(error, ssl.SSLError):
            self._finish(one, None, _name(error.errno))
        elif isinstance(error, ssl.SSLError):
            self._end(one, f"tls: {_tls_reason(error)}")
        else:
            self._finish(one, f"{one.stage}: {_REASONS.get(error.errno or 0) or _name(error.errno)}{_of_answer(one)}", "")

    def _end(self, one: _UnderWay, why: str, farewell: bytes = b"") -> None:
        try:
            if farewell:
                one.sock.send(farewell)
            if isinstance(one.sock, ssl.SSLSocket):
                # Without close_notify the other end would call it truncated. Nothing waits for an answer.
                one.sock.unwrap()
        except (OSError, ValueError):
            pass
        self._finish(one, why, "")

    def _finish(self, one: _UnderWay, why: str | None, trouble: str) -> None:
        self._under_way.pop(one.fd, None)
        one.sock.close()
        one.done(why, trouble)


_REASONS = {
    errno.ECONNREFUSED: "refused", errno.ECONNRESET: "reset", errno.EPIPE: "reset", errno.ETIMEDOUT: "timed out",
    errno.EHOSTUNREACH: "unreachable", errno.ENETUNREACH: "unreachable",
}  # fmt: skip


def _name(number: int | None) -> str:
    return f"{errno.errorcode.get(number or 0, number)} ({os.strerror(number or 0)})"


def _tls_reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return getattr(error, "verify_message", "") or str(error.args[-1])
    if isinstance(error, ssl.SSLEOFError):
        return "closed in the handshake"
    return (error.reason or str(error)).lower().replace("_", " ")


def _of_answer(one: _UnderWay) -> str:
    return f" after {show(one.got)}" if one.got else ""
