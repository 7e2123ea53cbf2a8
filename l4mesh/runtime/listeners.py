"""Listening sockets: one factory for all of them, in this network namespace or another."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from l4mesh.errors import CommandError
from l4mesh.model import Capture, Config, Direction, Keepalive, Listener, SocketAddress
from l4mesh.netns import run_in_namespace

IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75
TCP_USER_TIMEOUT = 18


@dataclass(frozen=True, slots=True)
class SocketOptions:
    """What distinguishes listening sockets: while it is unchanged, a reload keeps the socket and what waits in its queue."""

    bind: SocketAddress
    transparent: bool
    keepalive: Keepalive
    user_timeout_ms: int
    backlog: int
    peers_are_here: bool
    """All that connect are of this host."""
    owner: str
    """The listener, where the kernel chooses the port: two of them must not share a socket. Else ""."""

    @property
    def place(self) -> Place:
        return Place(self.bind, self.transparent, self.owner)


class Place(NamedTuple):
    """Where a socket listens, whatever its other options: what another process knows it by."""

    bind: SocketAddress
    transparent: bool
    owner: str


class Listeners:
    """The listening sockets of all workers, kept over reloads. Owner of their descriptors.

    ``inherited``: those of the process that this one takes over from or replaces. They stay as many as they are, since what waits in
    the queue of one must be taken from that one: with more workers than sockets several share one, with fewer some have several.
    """

    def __init__(self, n_workers: int, inherited: Mapping[Place, list[socket.socket]] | None = None) -> None:
        self._n_workers = n_workers
        self._open: dict[SocketOptions, list[socket.socket]] = {}
        self._inherited = dict(inherited or {})
        self._untuned: list[SocketOptions] = []

    def open(self, config: Config) -> dict[str, list[tuple[SocketAddress, list[int]]]]:
        """Sockets for every listener of ``config``, those of the plan before included where they fit.

        Gives the bound addresses (a port 0 is resolved) with a descriptor for each worker (-1: none); an address comes more than once
        where workers have several sockets of it. Raises CommandError, and then leaves everything as it was.
        """
        wanted = {listener.name: [socket_options(listener, bind) for bind in listener.binds] for listener in config.listeners.values()}
        opened: dict[SocketOptions, list[socket.socket]] = {}
        try:
            for name, options_of_binds in wanted.items():
                for options in options_of_binds:
                    if options in self._open or options in opened:
                        continue
                    if inherited := self._inherited.pop(options.place, None):
                        self._open[options] = inherited
                        self._untuned.append(options)
                    else:
                        opened[options] = open_sockets(options, self._n_workers, f"listener {name}", self._is_ours(options, opened))
        except CommandError:
            for sockets in opened.values():
                _close_all(sockets)
            raise
        self._open |= opened
        return {
            name: [bound for options in options_of_binds for bound in _bound(self._open[options], self._n_workers)]
            for name, options_of_binds in wanted.items()
        }

    def _is_ours(self, options: SocketOptions, opened: Iterable[SocketOptions]) -> bool:
        """Whether a socket of ours has the address already, by itself or as one of all."""
        places = [*(known.place for known in (*self._open, *opened)), *self._inherited]
        return any(_overlap(place.bind, options.bind) for place in places)

    def sockets(self) -> list[socket.socket]:
        return [listening for sockets in list(self._open.values()) for listening in sockets]

    def close_unused(self, config: Config) -> None:
        """Closes what ``config`` does not name. Call it when no worker sees an older plan."""
        wanted = _wanted(config)
        for options in [known for known in self._open if known not in wanted]:
            _close_all(self._open.pop(options))

    def lasting(self, config: Config) -> list[socket.socket]:
        """Those of ``config`` that are at the same place for every process that reads it."""
        wanted = _wanted(config)
        return [
            listening for options, sockets in self._open.items() if options in wanted and not options.owner for listening in sockets
        ]

    def export(self) -> list[tuple[Place, list[socket.socket]]]:
        """All of them, for a process that takes over."""
        return [(options.place, sockets) for options, sockets in self._open.items()]

    def settle(self) -> None:
        """The process that sockets come from, if any, is done with them: gives them this configuration's options, and closes those
        that it does not name."""
        for options in self._untuned:
            for listening in self._open.get(options, ()):
                _tune(listening, options)
                listening.listen(options.backlog)
        self._untuned.clear()
        for sockets in self._inherited.values():
            _close_all(sockets)
        self._inherited.clear()

    def close(self) -> None:
        for sockets in (*self._open.values(), *self._inherited.values()):
            _close_all(sockets)
        self._open.clear()
        self._inherited.clear()


def by_place(listening: Iterable[socket.socket]) -> dict[Place, list[socket.socket]]:
    """Sockets without an owner by where they listen."""
    found: dict[Place, list[socket.socket]] = {}
    for one in listening:
        level, name = (socket.IPPROTO_IPV6, IPV6_TRANSPARENT) if one.family == socket.AF_INET6 else (socket.IPPROTO_IP, IP_TRANSPARENT)
        place = Place(SocketAddress(*one.getsockname()[:2]), bool(one.getsockopt(level, name)), "")
        found.setdefault(place, []).append(one)
    return found


def _wanted(config: Config) -> set[SocketOptions]:
    return {socket_options(listener, bind) for listener in config.listeners.values() for bind in listener.binds}


def socket_options(listener: Listener, bind: SocketAddress) -> SocketOptions:
    captures_here = listener.capture != Capture.NONE and listener.direction == Direction.OUTBOUND
    return SocketOptions(
        bind, listener.capture == Capture.TPROXY, listener.keepalive, listener.user_timeout_ms, listener.backlog,
        captures_here or ipaddress.ip_address(bind.host).is_loopback, "" if bind.port else listener.name,
    )  # fmt: skip


def open_sockets(
    options: SocketOptions, count: int, what: str, shares_port: bool = False, netns: str | None = None
) -> list[socket.socket]:
    """``count`` listening sockets on one address, among which the kernel spreads connections (SO_REUSEPORT).

    ``shares_port``: the address is already ours, with other options. ``netns``: path of a network namespace to open them in.
    Raises CommandError naming the address and what to do.
    """

    def make() -> list[socket.socket]:
        sockets: list[socket.socket] = []
        bind = options.bind
        try:
            if not shares_port and bind.port:
                _refuse_taken_port(bind)
            for _ in range(count):
                sockets.append(_open_socket(options, bind))
                if bind.port == 0:
                    bind = SocketAddress(bind.host, sockets[0].getsockname()[1])
        except OSError as error:
            _close_all(sockets)
            raise CommandError(f"{what}: can't listen on {options.bind}: {_explain(error)}") from error
        return sockets

    return run_in_namespace(netns, make) if netns else make()


def _overlap(one: SocketAddress, other: SocketAddress) -> bool:
    hosts = {one.host, other.host}
    return one.port == other.port and one.is_v6 == other.is_v6 and (len(hosts) == 1 or bool(hosts & {"0.0.0.0", "::"}))


def _family(bind: SocketAddress) -> socket.AddressFamily:
    return socket.AF_INET6 if bind.is_v6 else socket.AF_INET


def _refuse_taken_port(bind: SocketAddress) -> None:
    """SO_REUSEPORT would let a second l4mesh take half of the first one's connections: look without it first."""
    with socket.socket(_family(bind), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if bind.is_v6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind((bind.host, bind.port))


def _open_socket(options: SocketOptions, bind: SocketAddress) -> socket.socket:
    """Everything that accepted sockets inherit is set here, once, and not on each of them (Linux: reference in tests)."""
    listening = socket.socket(_family(bind), socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if bind.is_v6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if options.transparent:
            level, name = (socket.IPPROTO_IPV6, IPV6_TRANSPARENT) if bind.is_v6 else (socket.IPPROTO_IP, IP_TRANSPARENT)
            listening.setsockopt(level, name, 1)
        _tune(listening, options)
        listening.bind((bind.host, bind.port))
        listening.listen(options.backlog)
    except OSError:
        listening.close()
        raise
    return listening


def _tune(listening: socket.socket, options: SocketOptions) -> None:
    """What may differ between two processes that listen at the same place."""
    keepalive = options.keepalive
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(bool(keepalive.idle_s)))
    if keepalive.idle_s:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, keepalive.idle_s)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, keepalive.interval_s)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, keepalive.count)
    listening.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, options.user_timeout_ms)
    if options.peers_are_here and listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"bbr"):
        # See side_unpace in _fastpath.pyx.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _explain(error: OSError) -> str:
    hints: Mapping[str, str] = {
        "Address already in use": "another process has it; stop that one or choose another port",
        "Cannot assign requested address": "the address is not this host's",
        "Permission denied": "ports below 1024 need CAP_NET_BIND_SERVICE",
        "Operation not permitted": "capture: tproxy needs CAP_NET_ADMIN",
    }
    reason = error.strerror or str(error)
    return f"{reason}: {hints[reason]}" if reason in hints else reason


def _bound(sockets: list[socket.socket], n_workers: int) -> list[tuple[SocketAddress, list[int]]]:
    address = SocketAddress(*sockets[0].getsockname()[:2])
    fds = [listening.fileno() for listening in sockets]
    if len(fds) < n_workers:
        return [(address, [fds[worker % len(fds)] for worker in range(n_workers)])]
    fds += [-1] * (-len(fds) % n_workers)
    return [(address, fds[first : first + n_workers]) for first in range(0, len(fds), n_workers)]


def _close_all(sockets: list[socket.socket]) -> None:
    for listening in sockets:
        listening.close()
