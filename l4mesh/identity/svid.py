"""X.509-SVIDs from files: read, judged before anything depends on them, and ready for the data path.

Source of the demands: the X.509-SVID standard (spiffe.io, X509-SVID.md, sections 2 to 5). The peers' certificates are judged by the
same rules in the workers (``_native/tls.pxd``).
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from l4mesh.config.files import open_file
from l4mesh.config.quantities import parse_spiffe_id
from l4mesh.errors import L4meshError
from l4mesh.model import Identity

MAX_FILE_BYTES = 1 << 20
UNREADABLE = (
    ValueError, TypeError, OverflowError, UnsupportedAlgorithm,
    x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType,
)  # fmt: skip
"""What cryptography raises at what is broken or what it does not know, wherever it comes upon it; it has no base for them."""


class IdentityError(L4meshError):
    """A certificate, key, bundle or revocation list can't be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Material:
    """One identity as its files say. PEM where bytes."""

    name: str
    spiffe_id: str
    certificates: bytes
    private_key: bytes = field(repr=False)
    trust_bundle: bytes
    revoked: tuple[tuple[bytes, bytes], ...]
    """Issuer as DER and serial number as big-endian bytes."""
    crl_until_unix_s: float
    """When the next revocation list is due; 0.0 where there is none, or none is announced."""
    not_before_unix_s: float
    expires_unix_s: float
    digest: bytes
    """Of the files' contents."""
    warnings: tuple[str, ...]
    chained: bool
    """Whether the certificate leads to a root of the bundle."""
    serial: int


def read_file(path: str) -> bytes:
    """Raises IdentityError."""
    try:
        with open_file(path) as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise IdentityError(f"{path}: can't be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise IdentityError(f"{path}: is larger than {MAX_FILE_BYTES >> 20} MiB")
    return content


def load_identity(identity: Identity, now_unix_s: float | None = None) -> Material:
    """Reads and judges the files of an identity. Raises IdentityError."""
    contents = {path: read_file(path) for path in identity.files}
    try:
        material = judge_identity(identity, contents, time.time() if now_unix_s is None else now_unix_s)
    except UNREADABLE as error:
        raise IdentityError(f"{identity.certificate}: can't be judged together with {', '.join(identity.files[1:])}: {error}") from None
    warnings = []
    if not material.chained:
        warnings.append(
            f"{identity.certificate}: is signed by no CA of {identity.trust_bundle}; peers with the same bundle will refuse it"
        )
    if stat.S_IMODE(os.stat(identity.private_key).st_mode) & 0o077:
        warnings.append(f"{identity.private_key}: can be read by others than its owner; it should have mode 0600")
    return replace(material, warnings=tuple(warnings))


def judge_identity(identity: Identity, contents: Mapping[str, bytes], now: float) -> Material:
    """``contents``: by the names that ``identity`` has for its files. Raises IdentityError."""
    chain = _read_certificates(identity.certificate, contents[identity.certificate])
    leaf = chain[0]
    spiffe_id = read_spiffe_id(identity.certificate, leaf)
    if identity.spiffe_id and spiffe_id != identity.spiffe_id:
        raise IdentityError(f"{identity.certificate}: is for {spiffe_id}, not for {identity.spiffe_id}")
    check_leaf(identity.certificate, leaf)
    _check_key(identity, contents[identity.private_key], leaf)
    expires, not_before = leaf.not_valid_after_utc.timestamp(), leaf.not_valid_before_utc.timestamp()
    if expires <= now:
        raise IdentityError(f"{identity.certificate}: expired at {leaf.not_valid_after_utc.isoformat()}")
    if not_before > now:
        raise IdentityError(f"{identity.certificate}: is not valid before {leaf.not_valid_before_utc.isoformat()}")
    bundle = _read_certificates(identity.trust_bundle, contents[identity.trust_bundle])
    revoked: tuple[tuple[bytes, bytes], ...] = ()
    crl_until = 0.0
    if identity.crl:
        revoked, crl_until = _read_revoked(identity.crl, contents[identity.crl], bundle, chain[1:])
    digest = hashlib.sha256(b"".join(hashlib.sha256(contents[path]).digest() for path in identity.files)).digest()
    return Material(
        identity.name, spiffe_id, contents[identity.certificate], contents[identity.private_key], contents[identity.trust_bundle],
        revoked, crl_until, not_before, expires, digest, (), _chains_to(chain, bundle),
        leaf.serial_number,
    )  # fmt: skip


def _read_certificates(path: str, content: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise IdentityError(f"{path}: holds no certificate in PEM that can be read") from None


def read_spiffe_id(path: str, leaf: x509.Certificate) -> str:
    """The one SPIFFE ID of a leaf. Raises IdentityError."""
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, *UNREADABLE):
        uris = []
    if len(uris) != 1:
        raise IdentityError(f"{path}: must have exactly one URI name, its SPIFFE ID; it has {len(uris)}")
    try:
        return parse_spiffe_id(uris[0])
    except ValueError as error:
        raise IdentityError(f"{path}: the URI name {error}") from None


def check_leaf(path: str, leaf: x509.Certificate) -> None:
    """That it may be a workload's. Raises IdentityError."""
    try:
        if leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise IdentityError(f"{path}: is a CA's certificate; a workload needs a leaf, first in the file")
    except x509.ExtensionNotFound:
        pass
    try:
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
        if usage.key_cert_sign or usage.crl_sign:
            raise IdentityError(f"{path}: is allowed to sign certificates or revocation lists; a workload's may not be")
    except x509.ExtensionNotFound:
        pass
    try:
        purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        wanted = {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
        if not wanted <= set(purposes) and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in purposes:
            raise IdentityError(f"{path}: its extended key usage must have both clientAuth and serverAuth")
    except x509.ExtensionNotFound:
        pass


def _check_key(identity: Identity, content: bytes, leaf: x509.Certificate) -> None:
    try:
        key = load_pem_private_key(content, None)
    except TypeError:
        raise IdentityError(f"{identity.private_key}: is encrypted; a key without a passphrase is needed") from None
    except ValueError:
        raise IdentityError(f"{identity.private_key}: holds no private key in PEM that can be read") from None
    if _public(key.public_key()) != _public(leaf.public_key()):
        raise IdentityError(f"{identity.private_key}: does not belong to the certificate in {identity.certificate}")


def _public(key: object) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined, no-any-return]


def _chains_to(chain: Sequence[x509.Certificate], bundle: Sequence[x509.Certificate]) -> bool:
    current = chain[0]
    for issuer in (*chain[1:], None):
        if any(is_signed_by(current, root) for root in bundle):
            return True
        if issuer is None or not is_signed_by(current, issuer):
            return False
        current = issuer
    return False


def is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *UNREADABLE):
        return False
    return True


def _read_revoked(
    path: str, content: bytes, bundle: Sequence[x509.Certificate], intermediates: Sequence[x509.Certificate]
) -> tuple[tuple[tuple[bytes, bytes], ...], float]:
    """What the lists in a file revoke, and when the first of them is due to be replaced (Unix time; 0.0: none says).

    A list counts only when a CA that we trust has signed it: one of the bundle, an intermediate of our own chain, or one that stands in
    the file and is signed by the bundle. A list that is past its date goes on to count, because the alternative is to trust what it
    revokes or to stop the mesh.
    """
    end = b"-----END X509 CRL-----"
    parts = [part + end for part in content.split(end) if b"BEGIN X509 CRL" in part]
    try:
        enclosed = x509.load_pem_x509_certificates(content) if b"BEGIN CERTIFICATE" in content else []
        lists = [x509.load_pem_x509_crl(part) for part in parts] or [x509.load_der_x509_crl(content)]
    except UNREADABLE:
        raise IdentityError(f"{path}: holds no revocation list that can be read") from None
    issuers = [*bundle, *intermediates, *(ca for ca in enclosed if any(is_signed_by(ca, root) for root in bundle))]
    revoked: list[tuple[bytes, bytes]] = []
    due: list[float] = []
    for crl in lists:
        signers = [issuer for issuer in issuers if issuer.subject == crl.issuer and _signed(crl, issuer.public_key())]
        if not signers:
            raise IdentityError(
                f"{path}: the list of {crl.issuer.rfc4514_string() or 'an unnamed CA'} is signed by no CA that is trusted here"
            )
        if crl.next_update_utc:
            due.append(crl.next_update_utc.timestamp())
        # The CA's name as its certificates have it: the list may write the same letters as strings of another kind.
        names = {name.public_bytes() for name in (crl.issuer, *(signer.subject for signer in signers))}
        revoked += [(name, number_bytes(entry.serial_number)) for entry in crl for name in sorted(names)]
    return tuple(revoked), min(due, default=0.0)


def _signed(crl: x509.CertificateRevocationList, key: object) -> bool:
    assert hasattr(key, "public_bytes")
    issuer_key: CertificateIssuerPublicKeyTypes = key  # type: ignore[assignment]
    try:
        return crl.is_signature_valid(issuer_key)
    except TypeError:
        return False


def number_bytes(serial: int) -> bytes:
    """A serial number as OpenSSL keeps it: big-endian, without a sign."""
    return serial.to_bytes(max(1, (serial.bit_length() + 7) // 8), "big")
