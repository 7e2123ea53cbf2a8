"""A certificate authority for one mesh, in a folder: a root, an intermediate that signs, short-lived leaves, revocation, rotation.

Each generation is a folder with a root and an intermediate. Rotation adds one: its root is also signed by the root before it, and
that certificate travels in the chains, so that peers which still hold the old bundle accept the new leaves. The bundle has both roots
until the old one is dropped.

Several processes may use one folder: whoever changes it holds a lock alone, whoever signs shares it.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from l4mesh.config.quantities import parse_spiffe_id
from l4mesh.errors import CommandError
from l4mesh.identity.svid import UNREADABLE, IdentityError, check_leaf, is_signed_by, read_spiffe_id

ROOT_LIFE = datetime.timedelta(days=3650)
INTERMEDIATE_LIFE = datetime.timedelta(days=365)
LEAF_LIFE = datetime.timedelta(hours=24)
CRL_LIFE = datetime.timedelta(days=7)
BACKDATED = datetime.timedelta(minutes=1)
"""Clocks differ: a certificate is valid a little before it is made."""
NODES_FILE = "nodes.yaml"
NODES_EXAMPLE = """\
# Who may ask `l4mesh ca serve` for what; read again when it changes. A node may always renew its own certificate.
# A * at the end stands for any rest. An identity that is a node's is given to that node only.
nodes: []
# - identity: spiffe://{domain}/node/node-a
#   workloads: [spiffe://{domain}/ns/shop/sa/web, "spiffe://{domain}/ns/batch/*"]
"""


@dataclass(frozen=True, slots=True)
class Issued:
    """PEM. ``certificates``: the leaf and what leads from it to a root."""

    certificates: bytes
    private_key: bytes
    serial: int
    expires: datetime.datetime


@dataclass(frozen=True, slots=True)
class _Generation:
    folder: Path
    root: x509.Certificate
    intermediate: x509.Certificate
    intermediate_key: ec.EllipticCurvePrivateKey

    @property
    def root_key(self) -> ec.EllipticCurvePrivateKey:
        return _read_key(self.folder / "root.key")

    @property
    def cross(self) -> bytes:
        path = self.folder / "cross.pem"
        return path.read_bytes() if path.exists() else b""

    @property
    def revoked(self) -> dict[str, str]:
        """Serial number to the time of the revocation."""
        path = self.folder / "revoked.json"
        revoked: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        return revoked


class CertificateAuthority:
    """A CA's folder. Every method raises CommandError with what to do when the folder can't be used."""

    def __init__(self, folder: Path, trust_domain: str = "") -> None:
        """``trust_domain``: of a folder that does not say it yet."""
        self._folder = folder
        try:
            self.trust_domain = trust_domain or str(json.loads((folder / "ca.json").read_text())["trust_domain"])
        except (OSError, ValueError, KeyError):
            raise CommandError(f"{folder} is no CA: make one with: l4mesh ca init --trust-domain DOMAIN {folder}") from None

    @classmethod
    def create(cls, folder: Path, trust_domain: str) -> CertificateAuthority:
        try:
            parse_spiffe_id(f"spiffe://{trust_domain}/x")
        except ValueError:
            raise CommandError(f"{trust_domain!r} can't be a trust domain: lower-case letters, digits, '.', '-' and '_' only") from None
        if (folder / "ca.json").exists():
            raise CommandError(f"{folder} is a CA already; l4mesh ca rotate gives it a new root")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # What was begun and not ended, on a full disk for example, is gone on with: it is a CA when ca.json is there, which comes last.
        if not (folder / "1").exists():
            with _new_generation(folder, 1) as made:
                _make_generation(made, 1, trust_domain)
        write_file(folder / NODES_FILE, NODES_EXAMPLE.format(domain=trust_domain).encode(), 0o644)
        ca = cls(folder, trust_domain)
        ca._publish()
        write_file(folder / "ca.json", json.dumps({"trust_domain": trust_domain}).encode() + b"\n", 0o644)
        return ca

    @property
    def bundle_path(self) -> Path:
        return self._folder / "bundle.pem"

    @property
    def crl_path(self) -> Path:
        return self._folder / "crl.pem"

    @property
    def nodes_path(self) -> Path:
        return self._folder / NODES_FILE

    def trust(self) -> tuple[bytes, bytes]:
        """The bundle and the revocation lists, of one moment."""
        with self._locked(fcntl.LOCK_SH):
            try:
                return self.bundle_path.read_bytes(), self.crl_path.read_bytes()
            except OSError as error:
                raise CommandError(f"{self._folder}: a file of the CA can't be read: {error}") from None

    @contextlib.contextmanager
    def _locked(self, how: int = fcntl.LOCK_EX) -> Iterator[None]:
        try:
            fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CommandError(f"{self._folder}: can't be opened: {error.strerror}") from None
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)

    def signs_until(self) -> datetime.datetime:
        """When the certificate that signs ends."""
        with self._locked(fcntl.LOCK_SH):
            return self._generations()[-1].intermediate.not_valid_after_utc

    def _generations(self) -> list[_Generation]:
        """Oldest first; the last one signs."""
        folders = sorted((path for path in self._folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
        if not folders:
            raise CommandError(f"{self._folder}: its numbered folder with root and keys is gone: bring it back from a backup")
        try:
            return [
                _Generation(
                    folder,
                    x509.load_pem_x509_certificate((folder / "root.pem").read_bytes()),
                    x509.load_pem_x509_certificate((folder / "intermediate.pem").read_bytes()),
                    _read_key(folder / "intermediate.key"),
                )
                for folder in folders
            ]
        except (OSError, ValueError) as error:
            raise CommandError(f"{self._folder}: a file of the CA can't be read: {error}") from None

    def issue(self, spiffe_id: str, life: datetime.timedelta = LEAF_LIFE) -> Issued:
        """A certificate with a new key."""
        key = ec.generate_private_key(ec.SECP256R1())
        return replace(self.sign_key(spiffe_id, key.public_key(), life), private_key=_key_pem(key))

    def sign(self, request: bytes, life: datetime.timedelta = LEAF_LIFE, spiffe_id: str = "") -> Issued:
        """A certificate for a CSR in PEM: its key, and its one SPIFFE ID, which must be ``spiffe_id`` if that is given. Nothing
        else that it asks for is granted."""
        asked, key = read_request(request)
        if spiffe_id and asked != spiffe_id:
            raise CommandError(f"the request is for {asked}, not for {spiffe_id}")
        return self.sign_key(asked, key, life)

    def authenticate(self, certificate: x509.Certificate) -> str:
        """The SPIFFE ID of a certificate that this CA has issued itself and not revoked. Its time is not looked at: TLS has done that.
        Raises IdentityError, and CommandError when the folder can't be used."""
        with self._locked(fcntl.LOCK_SH):
            generations = self._generations()
            issuer = next((one for one in generations if is_signed_by(certificate, one.intermediate)), None)
            if issuer is None:
                raise IdentityError("the certificate was not issued by this CA")
            if str(certificate.serial_number) in issuer.revoked:
                raise IdentityError("the certificate is revoked")
        check_leaf("the certificate", certificate)
        return read_spiffe_id("the certificate", certificate)

    def sign_key(self, spiffe_id: str, key: CertificatePublicKeyTypes, life: datetime.timedelta) -> Issued:
        try:
            parse_spiffe_id(spiffe_id)
        except ValueError as error:
            raise CommandError(f"the identity {error}") from None
        if not spiffe_id.startswith(f"spiffe://{self.trust_domain}/"):
            raise CommandError(f"{spiffe_id} is not of the trust domain {self.trust_domain}")
        with self._locked(fcntl.LOCK_SH):
            signer = self._generations()[-1]
            cross = signer.cross
        now = datetime.datetime.now(datetime.UTC)
        end = min(now + life, signer.intermediate.not_valid_after_utc)
        if end <= now:
            raise CommandError(f"the certificate that signs ended at {end.isoformat()}: run l4mesh ca rotate {self._folder}")
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "l4mesh")]))
            .issuer_name(signer.intermediate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_id)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(_issuer_key(signer.intermediate), critical=False)
            .sign(signer.intermediate_key, hashes.SHA256())
        )
        pem = leaf.public_bytes(Encoding.PEM) + signer.intermediate.public_bytes(Encoding.PEM) + cross
        return Issued(pem, b"", leaf.serial_number, leaf.not_valid_after_utc)

    def revoke(self, certificate: bytes) -> str:
        """Revokes a leaf of ours, in PEM, and gives its SPIFFE ID."""
        try:
            leaf = x509.load_pem_x509_certificates(certificate)[0]
        except ValueError:
            raise CommandError("the certificate can't be read as PEM") from None
        with self._locked():
            for generation in self._generations():
                if not is_signed_by(leaf, generation.intermediate):
                    continue
                revoked = generation.revoked | {str(leaf.serial_number): datetime.datetime.now(datetime.UTC).isoformat()}
                write_file(generation.folder / "revoked.json", json.dumps(revoked, indent=1).encode(), 0o644)
                self._publish()
                return read_spiffe_id("the certificate", leaf)
        raise CommandError("the certificate was not issued by this CA")

    def rotate(self) -> None:
        """A new root and intermediate, which sign from now on; the old root stays in the bundle."""
        with self._locked():
            old = self._generations()[-1]
            number = int(old.folder.name) + 1
            with _new_generation(self._folder, number) as folder:
                root = _make_generation(folder, number, self.trust_domain)
                now = datetime.datetime.now(datetime.UTC)
                cross = _authority(
                    root.subject, old.root.subject, root.public_key(), 1, now, old.root.not_valid_after_utc - now, old.root
                ).sign(old.root_key, hashes.SHA256())
                write_file(folder / "cross.pem", cross.public_bytes(Encoding.PEM), 0o644)
            self._publish()

    def drop_old_roots(self) -> int:
        """Ends the overlap: only the newest root is trusted. Gives the number of roots dropped."""
        with self._locked():
            *old, newest = self._generations()
            for generation in old:
                generation.folder.rename(self._folder / f"dropped-{generation.folder.name}")
            (newest.folder / "cross.pem").unlink(missing_ok=True)
            self._publish()
            return len(old)

    def refresh_crl(self) -> None:
        """Dates the revocation lists anew."""
        with self._locked():
            self._publish()

    def _publish(self) -> None:
        """Writes what the nodes take: the bundle, and the revocation lists with the intermediates that signed them."""
        generations = self._generations()
        bundle = b"".join(g.root.public_bytes(Encoding.PEM) for g in reversed(generations))
        if not self.bundle_path.exists() or self.bundle_path.read_bytes() != bundle:
            write_file(self.bundle_path, bundle, 0o644)
        now = datetime.datetime.now(datetime.UTC)
        parts = []
        for generation in reversed(generations):
            builder = x509.CertificateRevocationListBuilder().issuer_name(generation.intermediate.subject)
            builder = builder.last_update(now - BACKDATED).next_update(now + CRL_LIFE)
            for serial, when in generation.revoked.items():
                entry = (
                    x509.RevokedCertificateBuilder().serial_number(int(serial)).revocation_date(datetime.datetime.fromisoformat(when))
                )
                builder = builder.add_revoked_certificate(entry.build())
            crl = builder.sign(generation.intermediate_key, hashes.SHA256())
            parts.append(generation.intermediate.public_bytes(Encoding.PEM) + crl.public_bytes(Encoding.PEM))
        write_file(self.crl_path, b"".join(parts), 0o644)


def read_request(request: bytes) -> tuple[str, ec.EllipticCurvePublicKey]:
    """The one SPIFFE ID that a CSR in PEM asks for, and its key, which is ECDSA P-256 and has signed it. Raises CommandError."""
    try:
        csr = x509.load_pem_x509_csr(request)
        is_signed = csr.is_signature_valid
        key = csr.public_key()
    except UNREADABLE:
        raise CommandError("the request can't be read as a CSR in PEM") from None
    if not is_signed:
        raise CommandError("the request is not signed by its own key")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CommandError("the request's key must be ECDSA P-256")
    return _request_spiffe_id(csr), key


def _request_spiffe_id(csr: x509.CertificateSigningRequest) -> str:
    """The one SPIFFE ID that a CSR asks for. Raises CommandError."""
    try:
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        if len(uris) == 1 and len(list(names)) == 1:
            return parse_spiffe_id(uris[0])
    except (x509.ExtensionNotFound, *UNREADABLE):
        pass
    raise CommandError("the request must ask for exactly one name, a SPIFFE ID")


def make_request(spiffe_id: str) -> tuple[bytes, bytes]:
    """A new key and a CSR for it, both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_id)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _key_pem(key), csr.public_bytes(Encoding.PEM)


def write_identity(folder: Path, name: str, certificates: bytes, private_key: bytes) -> tuple[Path, Path]:
    """Writes NAME.pem and NAME.key, each by one rename, the key first: whoever reads in between sees a pair that does not match, and
    keeps the one that it has."""
    folder.mkdir(parents=True, exist_ok=True)
    key_path, certificate_path = folder / f"{name}.key", folder / f"{name}.pem"
    write_file(key_path, private_key, 0o600)
    write_file(certificate_path, certificates, 0o644)
    return certificate_path, key_path


@contextlib.contextmanager
def _new_generation(parent: Path, number: int) -> Iterator[Path]:
    """A folder that gets its name when it is complete: a CA that is killed meanwhile is as it was."""
    making = Path(tempfile.mkdtemp(dir=parent, prefix=f".{number}."))
    try:
        yield making
        making.rename(parent / str(number))
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _make_generation(folder: Path, number: int, trust_domain: str) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root_name, name = _name(f"{trust_domain} root {number}"), _name(f"{trust_domain} intermediate {number}")
    root = _authority(root_name, root_name, root_key.public_key(), None, now, ROOT_LIFE, None).sign(root_key, hashes.SHA256())
    intermediate = _authority(name, root_name, key.public_key(), 0, now, INTERMEDIATE_LIFE, root).sign(root_key, hashes.SHA256())
    write_file(folder / "root.key", _key_pem(root_key), 0o600)
    write_file(folder / "intermediate.key", _key_pem(key), 0o600)
    write_file(folder / "root.pem", root.public_bytes(Encoding.PEM), 0o644)
    write_file(folder / "intermediate.pem", intermediate.public_bytes(Encoding.PEM), 0o644)
    return root


def _authority(
    subject: x509.Name,
    issuer: x509.Name,
    key: CertificatePublicKeyTypes,
    path_length: int | None,
    now: datetime.datetime,
    life: datetime.timedelta,
    signer: x509.Certificate | None,
) -> x509.CertificateBuilder:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
    return builder.add_extension(_issuer_key(signer), critical=False) if signer else builder


def _issuer_key(signer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = signer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=key_cert_sign, crl_sign=crl_sign, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "l4mesh"), x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"{path}: the CA's key can't be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CommandError(f"{path}: is not an ECDSA key")
    return key


def write_file(path: Path, content: bytes, mode: int) -> None:
    """By a rename, so that nobody ever sees half of it; the mode is right before there is anything to read. Raises CommandError."""
    temporary = ""
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(fd, "wb") as stream:
            os.fchmod(fd, mode)
            stream.write(content)
            stream.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            # Else every attempt on a full disk would leave one more, with a key in it.
            os.unlink(temporary)
        raise CommandError(f"{path}: can't be written: {error.strerror}") from None
