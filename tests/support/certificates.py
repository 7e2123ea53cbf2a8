"""Certificates for tests: of the project's own CA, of a stranger's, and broken in every way that matters."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from l4mesh.identity.ca import CertificateAuthority, write_identity
from tests.support.mesh import Config

DOMAIN = "example.org"
WEB = f"spiffe://{DOMAIN}/ns/shop/sa/web"
REDIS = f"spiffe://{DOMAIN}/ns/shop/sa/redis"
HOUR = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Files:
    certificate: Path
    key: Path
    bundle: Path

    def identity(self, name: str, **more: str) -> Config:
        """As the configuration has it."""
        files = {"certificate": str(self.certificate), "private_key": str(self.key), "trust_bundle": str(self.bundle)}
        return {"name": name} | files | more


class Authority(CertificateAuthority):
    """The project's own CA, with short names for its files."""

    @classmethod
    def new(cls, folder: Path, domain: str = DOMAIN) -> "Authority":
        cls.create(folder, domain)
        return cls(folder)

    def files(self, folder: Path, name: str, spiffe_id: str, life: datetime.timedelta = HOUR) -> Files:
        issued = self.issue(spiffe_id, life)
        certificate, key = write_identity(folder, name, issued.certificates, issued.private_key)
        return Files(certificate, key, self.bundle_path)


def hostile(
    authority: CertificateAuthority,
    folder: Path,
    name: str,
    *,
    uris: Sequence[str] = (WEB,),
    dns: Sequence[str] = (),
    purposes: Sequence[x509.ObjectIdentifier] | None = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH),
    ca: bool = False,
    key_cert_sign: bool = False,
    starts: datetime.timedelta = -HOUR,
    ends: datetime.timedelta = HOUR,
    common_name: str = "l4mesh",
    raw_uri: bytes = b"",
    links: int = 0,
    link_is_ca: bool = True,
    key: CertificateIssuerPrivateKeyTypes | None = None,
) -> Files:
    """A leaf signed by the CA's intermediate with whatever is asked for; ``links``: that many more intermediates between them.
    ``key``: the leaf's; without one it gets a good one."""
    generation = authority._generations()[-1]
    signer, signer_key = generation.intermediate, generation.intermediate_key
    chain = [signer]
    if links:
        signer, signer_key = generation.root, generation.root_key
        chain = []
    now = datetime.datetime.now(datetime.UTC)
    for number in range(links):
        link_key = ec.generate_private_key(ec.SECP256R1())
        link = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"link {number}")]))
            .issuer_name(signer.subject)
            .public_key(link_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - HOUR)
            .not_valid_after(now + HOUR)
            .add_extension(x509.BasicConstraints(ca=link_is_ca, path_length=None), critical=True)
            .sign(signer_key, hashes.SHA256())
        )
        chain.insert(0, link)
        signer, signer_key = link, link_key
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(signer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + starts)
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(True, False, False, False, False, key_cert_sign, False, False, False),
            critical=True,
        )
    )
    if raw_uri:
        # GeneralNames with one uniformResourceIdentifier, byte by byte: what no sound library would make.
        name_der = bytes([0x86, len(raw_uri)]) + raw_uri
        value = bytes([0x30, len(name_der)]) + name_der
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.17"), value), critical=False)
    elif uris or dns:
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        names += [x509.DNSName(host) for host in dns]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if purposes is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(list(purposes)), critical=False)
    leaf = builder.sign(signer_key, hashes.SHA256())
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in (leaf, *chain))
    certificate, key_path = write_identity(folder, name, pem, key_pem)
    return Files(certificate, key_path, authority.bundle_path)


def revocation_list(
    issuer: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    *revoked: x509.Certificate,
    next_update: datetime.timedelta = HOUR,
    issuer_name: x509.Name | None = None,
) -> bytes:
    """In PEM."""
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer_name or issuer.subject)
    builder = builder.last_update(now - 2 * HOUR).next_update(now + next_update)
    for certificate in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(now - HOUR)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
