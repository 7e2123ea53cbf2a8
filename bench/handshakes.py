"""What TLS handshakes say on the wire: the ServerHellos that leave a port of the loopback, read from a packet socket.

A ServerHello is plaintext: version, cipher, key exchange and whether the session is resumed (its pre_shared_key extension) stand
in it (RFC 8446, 4.1.3), whatever product says it and whatever it logs.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

TLS13 = 0x0304
AES_128_GCM = 0x1301
X25519 = 0x001D
SUPPORTED_VERSIONS, KEY_SHARE, PRE_SHARED_KEY = 43, 51, 41
SERVER_HELLO = 2
HANDSHAKE = 22
ETH_P_IP = 0x0800
SO_ATTACH_FILTER = 26
SO_RCVBUFFORCE = 33


@dataclass(frozen=True, slots=True)
class ServerHello:
    version: int
    cipher: int
    group: int
    resumed: bool


class HandshakeWatch:
    """A context: ``seen`` gives what a server on this port of 127.0.0.1 has said since. Needs CAP_NET_RAW."""

    def __init__(self, port: int) -> None:
        # IPv4 (the socket's protocol) and TCP from this port; offsets count from the IP header.
        program = [
            (0x30, 0, 0, 9),  # the protocol
            (0x15, 0, 4, socket.IPPROTO_TCP),
            (0xB1, 0, 0, 0),  # X: length of the IP header
            (0x48, 0, 0, 0),  # the source port
            (0x15, 0, 1, port),
            (0x06, 0, 0, 0x40000),
            (0x06, 0, 0, 0),
        ]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(code)))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        self._socket.bind(("lo", ETH_P_IP))
        self._socket.setblocking(False)

    def seen(self) -> list[ServerHello]:
        return list(self._hellos())

    def _hellos(self) -> Iterator[ServerHello]:
        while True:
            try:
                packet, address = self._socket.recvfrom(65536)
            except BlockingIOError:
                return
            if address[2] == socket.PACKET_OUTGOING:  # on loopback every packet is seen twice
                continue
            tcp = packet[(packet[0] & 15) * 4 :]
            hello = parse_server_hello(tcp[(tcp[12] >> 4) * 4 :])
            if hello:
                yield hello

    def __enter__(self) -> HandshakeWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()


def parse_server_hello(data: bytes) -> ServerHello | None:
    """None: these bytes don't begin with a whole one."""
    if len(data) < 44 or data[0] != HANDSHAKE or data[5] != SERVER_HELLO or len(data) < 5 + int.from_bytes(data[3:5]):
        return None
    # record header 5, message header 4, version 2, random 32, then the session id
    at = 43 + 1 + data[43]
    cipher = int.from_bytes(data[at : at + 2])
    at += 3
    end = min(len(data), at + 2 + int.from_bytes(data[at : at + 2]))
    at += 2
    extensions = {}
    while at + 4 <= end:
        kind, length = struct.unpack_from("!HH", data, at)
        extensions[kind] = data[at + 4 : at + 4 + length]
        at += 4 + length
    version = int.from_bytes(extensions.get(SUPPORTED_VERSIONS, data[9:11]))
    return ServerHello(version, cipher, int.from_bytes(extensions.get(KEY_SHARE, b"")[:2]), PRE_SHARED_KEY in extensions)
