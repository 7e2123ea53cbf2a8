"""TLS contexts of the control plane: CA and node know each other by SPIFFE IDs, as workloads do."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable

from cryptography import x509

from l4mesh.identity.svid import IdentityError, Material, check_leaf, number_bytes, read_spiffe_id


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
            _check_server(self.getpeercert(True) or b"", server, node)

    context = _context(ssl.PROTOCOL_TLS_CLIENT, node.private_key + node.certificates, node.trust_bundle)
    context.sslobject_class = Checked
    return context


def _context(protocol: int, credential: bytes, bundle: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Names are SPIFFE IDs, which Python's ssl does not know.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=bundle.decode("ascii"))
    # ssl takes keys from files only; this one is in memory.
    fd = os.memfd_create("credential", os.MFD_CLOEXEC)
    try:
        os.write(fd, credential)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context


def _check_server(der: bytes, server: str, node: Material) -> None:
    try:
        certificate = x509.load_der_x509_certificate(der)
        check_leaf("the CA's certificate", certificate)
        found = read_spiffe_id("the CA's certificate", certificate)
    except (ValueError, IdentityError) as error:
        raise ssl.SSLCertVerificationError(1, str(error)) from None
    if found != server:
        raise ssl.SSLCertVerificationError(1, f"the other end is {found}, not {server}")
    if (certificate.issuer.public_bytes(), number_bytes(certificate.serial_number)) in node.revoked:
        raise ssl.SSLCertVerificationError(1, f"the certificate of {server} is revoked")
