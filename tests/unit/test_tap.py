"""What the tap calls TLS 1.3: real handshakes, and what only looks like one."""

import contextlib
import ssl
from pathlib import Path

import pytest

from l4mesh.tap import is_tls13
from tests.support.certificates import WEB, Authority


def handshake(folder: Path, version: ssl.TLSVersion) -> tuple[bytes, bytes]:
    """All that client and server say: a handshake, and a word from the client."""
    files = Authority.new(folder / "ca").files(folder, "web", WEB)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(files.certificate, files.key)
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname = False
    client_side.load_verify_locations(files.bundle)
    client_side.minimum_version = client_side.maximum_version = version
    to_client, to_server, from_client, from_server = (ssl.MemoryBIO() for _ in range(4))
    client = client_side.wrap_bio(to_client, to_server)
    server = server_side.wrap_bio(from_client, from_server, server_side=True)
    said, answered = b"", b""
    for _ in range(4):
        for end in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
            sent, reply = to_server.read(), from_server.read()
            said, answered = said + sent, answered + reply
            from_client.write(sent)
            to_client.write(reply)
    client.write(b"word")
    return said + to_server.read(), answered


def test_tls_1_3_is_known_from_1_2_and_from_plaintext(tmp_path: Path) -> None:
    said, answered = handshake(tmp_path / "new", ssl.TLSVersion.TLSv1_3)
    assert is_tls13(said, answered)
    assert not is_tls13(answered, said)
    assert not is_tls13(*handshake(tmp_path / "old", ssl.TLSVersion.TLSv1_2))
    assert not is_tls13(b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n")
    assert not is_tls13(b"", b"")


@pytest.mark.parametrize("broken", ["said", "answered"])
def test_plaintext_among_the_records_is_noticed(tmp_path: Path, broken: str) -> None:
    said, answered = handshake(tmp_path, ssl.TLSVersion.TLSv1_3)
    extra = b"in the clear"
    assert not is_tls13(said + extra * (broken == "said"), answered + extra * (broken == "answered"))
