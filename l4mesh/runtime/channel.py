"""Messages between two processes of one host over a unix socket: words, bytes and open descriptors, of bounded length.

A message is ``{"say": …}`` in JSON with bytes behind it, in packets (SOCK_SEQPACKET) whose first byte tells whether more follow; its
descriptors ride on the last one. Everything here blocks, with deadlines: call it off the loop.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from l4mesh.errors import L4meshError

PACKET_BYTES = 65536
MESSAGE_BYTES_MAX = 64 << 20
DESCRIPTORS_MAX = 250
"""Of one message; the kernel takes 253."""
SEND_S = 10.0
_MORE, _LAST = b"+", b"."


class PeerGone(L4meshError):
    """The other process has closed its end, or is no more."""


class Garbled(L4meshError):
    """What came is no message of ours."""


class DescriptorsLost(L4meshError):
    """This process has no room for the descriptors that came with a message."""


class Message(NamedTuple):
    body: dict[str, Any]
    data: bytes
    descriptors: list[int]
    """The receiver's to close."""


class Channel:
    """One end. Not for several threads at once, but for ``close``."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def peer(self) -> tuple[int, int]:
        """Process and user at the other end, as the kernel knows them (SO_PEERCRED)."""
        pid, uid, _ = struct.unpack("3i", self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid

    def send(self, say: str, body: Mapping[str, Any] | None = None, data: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Raises PeerGone, also when the other process does not read for ten seconds."""
        head = json.dumps({"say": say, **(body or {})}).encode()
        whole = memoryview(struct.pack("I", len(head)) + head + data)
        self._socket.settimeout(SEND_S)
        try:
            while len(whole) >= PACKET_BYTES:
                self._socket.send(_MORE + bytes(whole[: PACKET_BYTES - 1]))
                whole = whole[PACKET_BYTES - 1 :]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            self._socket.sendmsg([_LAST, whole], rights)
        except OSError as error:
            raise PeerGone(f"the other process does not take messages: {error.strerror or error}") from error

    def receive(self, timeout_s: float, *expected: str) -> Message:
        """The next message, whose word must be among ``expected``. Raises PeerGone, Garbled, DescriptorsLost or TimeoutError."""
        packets: list[bytes] = []
        length = 0
        deadline = time.monotonic() + timeout_s
        while True:
            packet, descriptors = self._receive_packet(deadline)
            length += len(packet)
            packets.append(packet[1:])
            if packet[:1] == _LAST:
                break
            close_all(descriptors)
            if packet[:1] != _MORE or length > MESSAGE_BYTES_MAX:
                raise Garbled("what came is no message")
        try:
            body, data = _parse(b"".join(packets))
            if body["say"] not in expected:
                raise Garbled(f"said {str(body['say'])[:50]!r} instead of {' or '.join(expected)}")
        except BaseException:
            close_all(descriptors)
            raise
        return Message(body, data, descriptors)

    def _receive_packet(self, deadline: float) -> tuple[bytes, list[int]]:
        space = socket.CMSG_SPACE(DESCRIPTORS_MAX * 4)
        reset = False
        while True:
            # A deadline that is over still takes what is there.
            self._socket.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                packet, ancillary, flags, _ = self._socket.recvmsg(PACKET_BYTES, space, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError as error:
                raise TimeoutError("no message in time") from error
            except ConnectionResetError as error:
                # It left without reading all of ours, which the kernel tells before what it had said itself.
                if reset:
                    raise PeerGone("the other process is gone") from error
                reset = True
                continue
            except TimeoutError:
                raise
            except OSError as error:
                raise PeerGone(f"the other process is gone: {error.strerror}") from error
            break
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) // 4 * 4])
        if not packet or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            close_all(descriptors)
            if not packet:
                raise PeerGone("the other process is gone")
            raise DescriptorsLost("descriptors run out") if flags & socket.MSG_CTRUNC else Garbled("what came is too long")
        return packet, list(descriptors)

    def last_words(self, *expected: str) -> Message | None:
        """Ends the conversation so that nothing can be said any more that is not heard: what the other process says from now on fails
        there. Gives the message that was on its way, if any."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        try:
            return self.receive(0.0, *expected)
        except (PeerGone, Garbled, DescriptorsLost, TimeoutError):
            return None

    def hang_up(self) -> None:
        """Ends the conversation from any thread; a call that waits raises PeerGone."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def _parse(whole: bytes) -> tuple[dict[str, Any], bytes]:
    """Raises Garbled."""
    if len(whole) >= 4:
        (length,) = struct.unpack_from("I", whole)
        try:
            body = json.loads(whole[4 : 4 + length])
        except (ValueError, RecursionError):
            body = None
        if isinstance(body, dict) and isinstance(body.get("say"), str) and length <= len(whole) - 4:
            return body, whole[4 + length :]
    raise Garbled("what came is no message")


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
