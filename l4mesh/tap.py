"""Reading along on a wire: what TCP connections carried past it, as anyone between two hosts would see it."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from l4mesh.errors import CommandError
from l4mesh.netns import run_in_namespace

ETH_P_ALL = 3
SOL_PACKET, PACKET_STATISTICS = 263, 6
RECEIVE_BUFFER = 8 << 20
_SYN = 0x02
_HEADER = struct.Struct("!HHIIBB")
_TLS_RECORDS = {20, 21, 22, 23}
_SERVER_HELLO = 2
_SUPPORTED_VERSIONS_1_3 = bytes.fromhex("002b00020304")
"""The extension in which a server says that this is TLS 1.3 (RFC 8446, 4.2.1)."""

Ends = tuple[str, str]
"""Who sends and who receives, each "address port"."""


@dataclass(slots=True)
class _Stream:
    first: int
    """Sequence number of the first byte."""
    segments: dict[int, bytes] = field(default_factory=dict)

    def content(self) -> bytes:
        """What came, up to the first gap."""
        content = b""
        for offset, payload in sorted(self.segments.items()):
            if offset > len(content):
                break
            content += payload[len(content) - offset :]
        return content


class Tap:
    """A context manager that sees every TCP connection that begins meanwhile on a device of the network namespace at ``path``.

    The kernel queues the frames until ``streams`` takes them: it is for short looks, and says so when it missed some.
    """

    def __init__(self, path: str, device: str) -> None:
        """Raises CommandError."""
        self._streams: dict[Ends, _Stream] = {}
        self._socket = run_in_namespace(path, lambda: _open(device))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()

    def streams(self) -> dict[Ends, bytes]:
        """Everything that was sent so far, each direction by itself; those without a byte too. Raises CommandError."""
        for frame in self._frames():
            self._take(frame)
        _, lost = struct.unpack("II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        if lost:
            raise CommandError(f"the tap missed {lost} frames: look more often, or at less traffic")
        return {ends: stream.content() for ends, stream in self._streams.items()}

    def _frames(self) -> Iterator[bytes]:
        while True:
            try:
                yield self._socket.recv(1 << 17)
            except BlockingIOError:
                return

    def _take(self, frame: bytes) -> None:
        found = _tcp_of(frame[14:], int.from_bytes(frame[12:14], "big"))
        if found is None:
            return
        source, destination, tcp = found
        source_port, destination_port, sequence, _, offset, flags = _HEADER.unpack_from(tcp)
        ends = f"{source} {source_port}", f"{destination} {destination_port}"
        if flags & _SYN:
            self._streams.setdefault(ends, _Stream((sequence + 1) & 0xFFFFFFFF))
        payload = tcp[(offset >> 4) * 4 :]
        stream = self._streams.get(ends)
        if payload and stream:
            at = (sequence - stream.first) & 0xFFFFFFFF
            stream.segments[at] = max(payload, stream.segments.get(at, b""), key=len)


def _open(device: str) -> socket.socket:
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(ETH_P_ALL))
    try:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        raw.bind((device, ETH_P_ALL))
    except OSError as error:
        raw.close()
        raise CommandError(f"can't read along on {device}: {error.strerror}") from error
    return raw


def _tcp_of(packet: bytes, ethertype: int) -> tuple[str, str, bytes] | None:
    """Source, destination and TCP segment of an IP packet; None for anything else. IPv6 without extension headers."""
    if ethertype == 0x0800 and packet[9] == socket.IPPROTO_TCP:
        end = int.from_bytes(packet[2:4], "big") or len(packet)
        segment = packet[(packet[0] & 15) * 4 : end]
        return str(ipaddress.IPv4Address(packet[12:16])), str(ipaddress.IPv4Address(packet[16:20])), segment
    if ethertype == 0x86DD and packet[6] == socket.IPPROTO_TCP:
        end = 40 + (int.from_bytes(packet[4:6], "big") or len(packet))
        return str(ipaddress.IPv6Address(packet[8:24])), str(ipaddress.IPv6Address(packet[24:40])), packet[40:end]
    return None


def is_tls13(stream: bytes, answer: bytes) -> bool:
    """Whether both directions of a connection consist of TLS records and the server chose TLS 1.3."""
    hello = answer[5 : 5 + int.from_bytes(answer[3:5], "big")]
    return _is_tls(stream) and _is_tls(answer) and hello[:1] == bytes([_SERVER_HELLO]) and _SUPPORTED_VERSIONS_1_3 in hello


def _is_tls(stream: bytes) -> bool:
    at = 0
    while at < len(stream):
        if stream[at] not in _TLS_RECORDS or stream[at + 1 : at + 2] not in (b"", b"\x03"):
            return False
        at += 5 + int.from_bytes(stream[at + 3 : at + 5], "big")
    return bool(stream)
