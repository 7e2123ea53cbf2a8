"""TLS contexts of the control loop: CA and node know each other by SPIFFE IDs, as workloads do; health checks speak as a workload."""

from __future__ import annotations

import _ssl
import os
import ssl
from collections.abc import Callable, Sequence

from cryptography import x509

from l4mesh.identity.svid import UNREADABLE, IdentityError, Material, check_leaf, number_bytes, read_spiffe_id

Secured = ssl.SSLSocket | ssl.SSLObject
"""One end of a handshake that is over."""


def server_context(credential: bytes, bundle: bytes, on_failure: Callable[[ssl.SSLError], None]) -> ssl.SSLContext:
    """TLS 1.3, certificates on both sides. Whose the client's is must be asked afterwards. PEM: key and chain; roots.

    ``on_failure`` is told of handshakes that fail, of which the event loop says nothing.
    """

    class Told(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                on_failure(error)
                raise

    context = _context(ssl.PROTOCOL_TLS_SERVER, credential, bundle)
    context.sslobject_class = Told
    # Every connection shows its certificate anew.
    context.num_tickets = 0
    return context


def client_context(node: Material, server: str) -> ssl.SSLContext:
    """Shows the node's certificate. The handshake fails unless the other end is ``server``, a SPIFFE ID, and not revoked."""

    class Checked(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            found = _read_peer(self, "the CA's certificate", node)
            if found != server:
                raise ssl.SSLCertVerificationError(1, f"the other end is {found}, not {server}")

    context = _context(ssl.PROTOCOL_TLS_CLIENT, _credential(node), node.trust_bundle)
    context.sslobject_class = Checked
    return context


def workload_context(material: Material, *, allow_tls12: bool) -> ssl.SSLContext:
    """What the data path shows and trusts where it dials. Whose the other end's certificate is must be asked: ``check_peer``."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, _credential(material), material.trust_bundle)
    # A CA of the bundle need not be a root.
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    if allow_tls12:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def open_context() -> ssl.SSLContext:
    """Shows nothing and looks at no certificate: for asking whether a server can shake hands at all."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def check_peer(secured: Secured, peers: Sequence[str], material: Material) -> None:
    """That the other end is of our trust domain, among ``peers`` (patterns), and not revoked. Raises ssl.SSLCertVerificationError."""
    found = _read_peer(secured, "the endpoint's certificate", material)
    if found.split("/")[2] != material.spiffe_id.split("/")[2]:
        raise ssl.SSLCertVerificationError(1, f"the other end is {found}, of another trust domain")
    if not any(_matches(pattern, found) for pattern in peers):
        raise ssl.SSLCertVerificationError(1, f"the other end is {found}, which is not among the peers")


def _matches(pattern: str, text: str) -> bool:
    """Exact, ``prefix*``, ``*suffix`` or ``*``."""
    if pattern.endswith("*"):
        return text.startswith(pattern[:-1])
    return text.endswith(pattern[1:]) if pattern.startswith("*") else text == pattern


def _credential(material: Material) -> bytes:
    # A key that comes from a secret store often has no newline at its end.
    return material.private_key + b"\n" + material.certificates


def _context(protocol: int, credential: bytes, bundle: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Names are SPIFFE IDs, which Python's ssl does not know.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    # What is no ASCII is in comments, between the certificates.
    context.load_verify_locations(cadata=bundle.decode("ascii", "ignore"))
    # ssl takes keys from files only; this one is in memory.
    fd = os.memfd_create("credential", os.MFD_CLOEXEC)
    try:
        os.write(fd, credential)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context


def _read_peer(secured: Secured, whose: str, own: Material) -> str:
    """Its SPIFFE ID, when neither its certificate nor one that this hangs on is revoked. Raises ssl.SSLCertVerificationError."""
    # The chain has a public name since Python 3.13.
    chain = secured._sslobj.get_verified_chain()  # type: ignore[union-attr]
    try:
        certificates = [x509.load_der_x509_certificate(one.public_bytes(_ssl.ENCODING_DER)) for one in chain]
        check_leaf(whose, certificates[0])
        spiffe_id = read_spiffe_id(whose, certificates[0])
    except (IdentityError, *UNREADABLE) as error:
        raise ssl.SSLCertVerificationError(1, str(error)) from None
    for depth, certificate in enumerate(certificates):
        if (certificate.issuer.public_bytes(), number_bytes(certificate.serial_number)) in own.revoked:
            above = "a CA above " if depth else ""
            raise ssl.SSLCertVerificationError(1, f"{above}the certificate of {spiffe_id} is revoked")
    return spiffe_id
