"""An end of TLS that does what Python's ssl does not: key updates, renegotiation, early data. And hellos made by hand.

libssl through ctypes: each call lets go of the GIL, and blocks no longer than the socket's deadline.
"""

import ctypes
import ctypes.util
import socket
import struct
from collections.abc import Sequence
from typing import Self

from tests.support.certificates import Files
from tests.support.peers import DEADLINE_S

_SSL = ctypes.CDLL(ctypes.util.find_library("ssl") or "libssl.so.3", use_errno=True)
_CRYPTO = ctypes.CDLL(ctypes.util.find_library("crypto") or "libcrypto.so.3")
for _name in ("TLS_method", "SSL_CTX_new", "SSL_new", "SSL_get1_session", "SSL_SESSION_dup"):
    getattr(_SSL, _name).restype = ctypes.c_void_p
_CRYPTO.ERR_get_error.restype = ctypes.c_ulong
_CRYPTO.ERR_reason_error_string.restype = ctypes.c_char_p
SSL_CTRL_SET_MIN_PROTO_VERSION, SSL_CTRL_SET_MAX_PROTO_VERSION = 123, 124
TLS1_2, TLS1_3 = 0x0303, 0x0304
SO_RCVTIMEO, SO_SNDTIMEO = 20, 21


class TlsError(Exception):
    """OpenSSL's reason, in its own words; "" when the socket ended."""


class TlsEnd:
    """TLS over a connected socket, which it takes over.

    ``session``: of an earlier client, to resume; with so much ``early_data`` allowed in it, whatever the server said.
    """

    def __init__(
        self, peer: socket.socket, files: Files, version: int = TLS1_3, *, server: bool = False, session: int = 0, early_data: int = 0
    ) -> None:
        self.socket = peer
        peer.setblocking(True)
        for option in (SO_RCVTIMEO, SO_SNDTIMEO):
            peer.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(DEADLINE_S), 0))
        self._ctx = ctypes.c_void_p(_SSL.SSL_CTX_new(ctypes.c_void_p(_SSL.TLS_method())))
        for limit in (SSL_CTRL_SET_MIN_PROTO_VERSION, SSL_CTRL_SET_MAX_PROTO_VERSION):
            _SSL.SSL_CTX_ctrl(self._ctx, limit, ctypes.c_long(version), None)
        assert _SSL.SSL_CTX_use_certificate_chain_file(self._ctx, str(files.certificate).encode()) == 1
        assert _SSL.SSL_CTX_use_PrivateKey_file(self._ctx, str(files.key).encode(), 1) == 1
        self._ssl = ctypes.c_void_p(_SSL.SSL_new(self._ctx))
        _SSL.SSL_set_fd(self._ssl, peer.fileno())
        (_SSL.SSL_set_accept_state if server else _SSL.SSL_set_connect_state)(self._ssl)
        if session:
            # A copy: one that has been offered is not offered again.
            copy = ctypes.c_void_p(_SSL.SSL_SESSION_dup(ctypes.c_void_p(session)))
            if early_data:
                _SSL.SSL_SESSION_set_max_early_data(copy, early_data)
            assert _SSL.SSL_set_session(self._ssl, copy) == 1

    def _check(self, result: int) -> int:
        if result > 0:
            return result
        reason = _CRYPTO.ERR_reason_error_string(ctypes.c_ulong(_CRYPTO.ERR_get_error()))
        _CRYPTO.ERR_clear_error()
        raise TlsError((reason or b"").decode())

    def handshake(self) -> None:
        """Raises TlsError."""
        self._check(_SSL.SSL_do_handshake(self._ssl))

    def write(self, data: bytes) -> None:
        self._check(_SSL.SSL_write(self._ssl, data, len(data)))

    def write_early(self, data: bytes) -> None:
        """Before the handshake, which it begins."""
        written = ctypes.c_size_t()
        self._check(_SSL.SSL_write_early_data(self._ssl, data, ctypes.c_size_t(len(data)), ctypes.byref(written)))

    def read(self, count: int) -> bytes:
        """Exactly so many bytes."""
        data = b""
        buffer = ctypes.create_string_buffer(1 << 16)
        while len(data) < count:
            got = self._check(_SSL.SSL_read(self._ssl, buffer, min(count - len(data), 1 << 16)))
            data += buffer.raw[:got]
        return data

    def update_key(self, request: bool) -> None:
        """New keys for what we send; ``request``: and for what they send."""
        self._check(_SSL.SSL_key_update(self._ssl, int(request)))
        self._check(_SSL.SSL_do_handshake(self._ssl))

    def renegotiate(self) -> None:
        """TLS 1.2. Raises TlsError when it is refused."""
        self._check(_SSL.SSL_renegotiate(self._ssl))
        self._check(_SSL.SSL_do_handshake(self._ssl))
        self._check(_SSL.SSL_read(self._ssl, ctypes.create_string_buffer(1), 1))

    @property
    def session(self) -> int:
        """Lives as long as the process."""
        return int(_SSL.SSL_get1_session(self._ssl))

    @property
    def resumed(self) -> bool:
        return bool(_SSL.SSL_session_reused(self._ssl))

    @property
    def early_data(self) -> str:
        return ("not sent", "rejected", "accepted")[_SSL.SSL_get_early_data_status(self._ssl)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Without close_notify, and all the same the session stays good.
        _SSL.SSL_set_shutdown(self._ssl, 3)
        _SSL.SSL_free(self._ssl)
        _SSL.SSL_CTX_free(self._ctx)
        self.socket.close()


HINT = 0xFF4C
"""The extension by which an l4mesh tells whose of its connections one is."""


def make_hello(
    *extensions: tuple[int, bytes], version: int = 0x0303, ciphers: Sequence[int] = (0x1301, 0xC02B), compression: bytes = b"\0"
) -> bytes:
    """A ClientHello in one record (RFC 8446, 4.1.2), as good or bad as what is asked for."""
    suites = b"".join(suite.to_bytes(2, "big") for suite in ciphers)
    listed = b"".join(struct.pack("!HH", kind, len(data)) + data for kind, data in extensions)
    body = struct.pack("!H", version) + bytes(32) + b"\0"
    body += struct.pack("!H", len(suites)) + suites + bytes([len(compression)]) + compression
    if extensions:
        body += struct.pack("!H", len(listed)) + listed
    return b"\x16\x03\x01" + struct.pack("!H", len(body) + 4) + b"\x01" + len(body).to_bytes(3, "big") + body


def name_extension(name: bytes) -> tuple[int, bytes]:
    """server_name (RFC 6066, 3)."""
    return 0, struct.pack("!HBH", len(name) + 3, 0, len(name)) + name
