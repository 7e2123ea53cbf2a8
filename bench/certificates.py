"""The certificates of the mTLS rows: from l4mesh's own CA, P-256, a leaf and an intermediate; the same files for every product."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from l4mesh.identity.ca import CertificateAuthority, write_identity

DOMAIN = "bench.example"


@dataclass(frozen=True, slots=True)
class Credentials:
    """``certificate``: the leaf and the intermediate; ``combined``: these and the key, as HAProxy wants it."""

    spiffe_id: str
    dns_name: str
    certificate: Path
    private_key: Path
    combined: Path
    bundle: Path


def make_credentials(folder: Path, *names: str) -> list[Credentials]:
    """One for each name, of one new CA in ``folder``. Raises CommandError."""
    ca = CertificateAuthority.create(folder / "ca", DOMAIN)
    key = load_pem_private_key((folder / "ca/1/intermediate.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    made = []
    for name in names:
        spiffe_id, dns_name = f"spiffe://{DOMAIN}/ns/bench/sa/{name}", f"{name}.{DOMAIN}"
        issued = ca.issue(spiffe_id)
        leaf, intermediate = x509.load_pem_x509_certificates(issued.certificates)
        chain = [_add_dns_name(leaf, dns_name, key), intermediate]
        pem = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)
        certificate, private_key = write_identity(folder, name, pem, issued.private_key)
        combined = folder / f"{name}-combined.pem"
        combined.write_bytes(pem + issued.private_key)
        made.append(Credentials(spiffe_id, dns_name, certificate, private_key, combined, ca.bundle_path))
    return made


def _add_dns_name(leaf: x509.Certificate, dns_name: str, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """The same leaf, signed anew with a DNS name beside its SPIFFE ID: nginx takes no server without one that it can verify."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(leaf.subject)
        .issuer_name(leaf.issuer)
        .public_key(leaf.public_key())
        .serial_number(leaf.serial_number)
        .not_valid_before(leaf.not_valid_before_utc)
        .not_valid_after(leaf.not_valid_after_utc)
    )
    for extension in leaf.extensions:
        value = extension.value
        if isinstance(value, x509.SubjectAlternativeName):
            value = x509.SubjectAlternativeName([*value, x509.DNSName(dns_name)])
        builder = builder.add_extension(value, extension.critical)
    return builder.sign(key, hashes.SHA256())
