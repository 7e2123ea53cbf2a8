"""The CA, judged by somebody else: openssl verifies what it makes; and what our own loader says of bad files."""

import datetime
import ssl
import stat
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.name import _ASN1Type

from l4mesh.cli import cli
from l4mesh.datapath import try_material
from l4mesh.errors import CommandError
from l4mesh.identity.ca import CertificateAuthority, make_request, write_file, write_identity
from l4mesh.identity.svid import IdentityError, load_identity, number_bytes
from l4mesh.identity.tls import workload_context
from l4mesh.model import Identity
from tests.support.certificates import WEB, Authority, hostile, revocation_list


def openssl_accepts(certificate: Path, bundle: Path) -> bool:
    command = ["openssl", "verify", "-purpose", "sslserver", "-CAfile", str(bundle), "-untrusted", str(certificate), str(certificate)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def identity(certificate: Path, key: Path, bundle: Path, crl: str = "") -> Identity:
    return Identity("web", str(certificate), str(key), str(bundle), crl)


def test_openssl_verifies_what_it_issues_and_the_keys_are_secret(tmp_path: Path) -> None:
    ca = Authority.new(tmp_path / "ca")
    files = ca.files(tmp_path, "web", WEB)
    assert openssl_accepts(files.certificate, files.bundle)
    for key in (*tmp_path.glob("**/*.key"),):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600, key
    material = load_identity(identity(files.certificate, files.key, files.bundle, str(ca.crl_path)))
    assert (material.spiffe_id, material.warnings, material.revoked) == (WEB, (), ())


def test_a_rotation_overlaps_in_both_directions(tmp_path: Path) -> None:
    ca = Authority.new(tmp_path / "ca")
    old = ca.files(tmp_path, "old", WEB)
    old_bundle = tmp_path / "old-bundle.pem"
    old_bundle.write_bytes(ca.bundle_path.read_bytes())
    ca.rotate()
    new = ca.files(tmp_path, "new", WEB)
    assert openssl_accepts(new.certificate, old_bundle)
    assert openssl_accepts(old.certificate, ca.bundle_path)
    assert openssl_accepts(new.certificate, ca.bundle_path)
    assert ca.drop_old_roots() == 1
    assert openssl_accepts(new.certificate, ca.bundle_path)
    assert not openssl_accepts(old.certificate, ca.bundle_path)


def test_a_request_gets_its_one_name_and_nothing_else(tmp_path: Path) -> None:
    ca = Authority.new(tmp_path / "ca")
    key, request = make_request(WEB)
    issued = ca.sign(request)
    certificate, key_path = write_identity(tmp_path, "web", issued.certificates, key)
    assert load_identity(identity(certificate, key_path, ca.bundle_path)).spiffe_id == WEB
    with pytest.raises(CommandError, match="not for"):
        ca.sign(request, spiffe_id="spiffe://example.org/ns/shop/sa/redis")
    with pytest.raises(CommandError, match="not of the trust domain"):
        ca.sign(make_request("spiffe://elsewhere.org/ns/shop/sa/web")[1])
    with pytest.raises(CommandError, match="CSR in PEM"):
        ca.sign(b"garbage")


def test_a_list_counts_only_when_a_trusted_ca_signed_it(tmp_path: Path) -> None:
    ca = Authority.new(tmp_path / "ca")
    files = ca.files(tmp_path, "web", WEB)
    ca.revoke(files.certificate.read_bytes())
    assert len(load_identity(identity(files.certificate, files.key, files.bundle, str(ca.crl_path))).revoked) == 1
    stranger = Authority.new(tmp_path / "stranger")
    with pytest.raises(IdentityError, match="signed by no CA that is trusted here"):
        load_identity(identity(files.certificate, files.key, files.bundle, str(stranger.crl_path)))
    with pytest.raises(CommandError, match="not issued by this CA"):
        stranger.revoke(files.certificate.read_bytes())


def test_a_list_counts_whatever_kind_of_string_its_issuer_s_name_is(tmp_path: Path) -> None:
    ca = Authority.new(tmp_path / "ca")
    files = ca.files(tmp_path, "web", WEB)
    leaf, signer, *_ = x509.load_pem_x509_certificates(files.certificate.read_bytes())
    # The CA's own is of UTF8Strings; by RFC 5280 (7.1) this is the same name.
    name = x509.Name([x509.NameAttribute(part.oid, part.value, _ASN1Type.PrintableString) for part in signer.subject])
    assert name.public_bytes() != signer.subject.public_bytes()
    crl = tmp_path / "crl.pem"
    listed = revocation_list(signer, ca._generations()[-1].intermediate_key, leaf, issuer_name=name)
    crl.write_bytes(signer.public_bytes(Encoding.PEM) + listed)
    revoked = load_identity(identity(files.certificate, files.key, files.bundle, str(crl))).revoked
    assert (leaf.issuer.public_bytes(), number_bytes(leaf.serial_number)) in revoked


def test_bad_files_are_told_apart(tmp_path: Path) -> None:
    ca = Authority.new(tmp_path / "ca")
    web, other = ca.files(tmp_path, "web", WEB), ca.files(tmp_path, "other", WEB)
    expired = hostile(ca, tmp_path, "expired", ends=-datetime.timedelta(minutes=1))
    two = hostile(ca, tmp_path, "two", uris=(WEB, WEB + "2"))
    missing = tmp_path / "missing.pem"
    for certificate, key, message in (
        (web.certificate, other.key, "does not belong to the certificate"),
        (missing, web.key, "can't be read: No such file"),
        (web.key, web.key, "holds no certificate in PEM"),
        (web.certificate, web.certificate, "holds no private key in PEM"),
        (expired.certificate, expired.key, "expired at"),
        (two.certificate, two.key, "exactly one URI name, its SPIFFE ID; it has 2"),
    ):
        with pytest.raises(IdentityError, match=message):
            load_identity(identity(certificate, key, web.bundle))


def test_a_signer_that_has_ended_signs_nothing_and_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4mesh.identity.ca.INTERMEDIATE_LIFE", -datetime.timedelta(seconds=30))
    ca = Authority.new(tmp_path / "ca")
    with pytest.raises(CommandError, match=f"run l4mesh ca rotate {tmp_path / 'ca'}"):
        ca.issue(WEB)
    monkeypatch.undo()
    ca.rotate()
    files = ca.files(tmp_path, "web", WEB)
    assert openssl_accepts(files.certificate, files.bundle)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    in_the_way = tmp_path / "web.key"
    in_the_way.mkdir()
    with pytest.raises(CommandError, match="can't be written: Is a directory"):
        write_file(in_the_way, b"secret", 0o600)
    assert list(tmp_path.iterdir()) == [in_the_way]


def test_a_key_without_a_newline_and_a_comment_in_any_language_are_no_mistake(tmp_path: Path) -> None:
    ca = Authority.new(tmp_path / "ca")
    web = ca.files(tmp_path, "web", WEB)
    web.key.write_bytes(web.key.read_bytes().rstrip())
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes("# Gyökér\n".encode() + web.bundle.read_bytes())
    material = load_identity(identity(web.certificate, web.key, bundle))
    try_material(material)
    assert workload_context(material, allow_tls12=False).get_ca_certs()


def altered(certificate: x509.Certificate, before: str, after: str) -> bytes:
    """In PEM, with one object identifier in the place of another, both as hexadecimal DER. The signature is not made anew."""
    der = certificate.public_bytes(Encoding.DER)
    assert bytes.fromhex(before) in der
    return ssl.DER_cert_to_PEM_cert(der.replace(bytes.fromhex(before), bytes.fromhex(after))).encode()


def test_what_the_library_can_not_read_is_a_bad_file_and_no_crash(tmp_path: Path) -> None:
    ca = Authority.new(tmp_path / "ca")
    web = ca.files(tmp_path, "web", WEB)
    cut, twice, unknown = tmp_path / "cut.pem", tmp_path / "twice.pem", tmp_path / "unknown.pem"
    cut.write_bytes(ca.crl_path.read_bytes()[:200])
    with pytest.raises(IdentityError, match=f"{cut}: holds no revocation list"):
        load_identity(identity(web.certificate, web.key, web.bundle, str(cut)))
    # Its extended key usage becomes a second list of names.
    leaf = x509.load_pem_x509_certificates(web.certificate.read_bytes())[0]
    twice.write_bytes(altered(leaf, "0603551d25", "0603551d11"))
    with pytest.raises(IdentityError, match="exactly one URI name"):
        load_identity(identity(twice, web.key, web.bundle))
    # A root of the same name, with a key on a curve that nobody knows, beside the one that counts.
    other = Authority.new(tmp_path / "other")._generations()[-1].root
    unknown.write_bytes(altered(other, "06082a8648ce3d030107", "06082a8648ce3d030179") + web.bundle.read_bytes())
    assert load_identity(identity(web.certificate, web.key, unknown)).chained


def test_the_commands_and_the_explanation(tmp_path: Path) -> None:
    run = lambda *words: CliRunner().invoke(cli, list(map(str, words)))  # noqa: E731
    assert run("ca", "init", "--trust-domain", "example.org", tmp_path / "ca").exit_code == 0
    assert run("ca", "issue", tmp_path / "ca", WEB, "--out", tmp_path / "web", "--life", "1h").exit_code == 0
    assert isinstance(run("ca", "init", "--trust-domain", "example.org", tmp_path / "ca").exception, CommandError)
    (tmp_path / "mesh.yaml").write_text(
        f"""\
identities: [{{name: web, certificate: web.pem, private_key: web.key, trust_bundle: {tmp_path}/ca/bundle.pem}}]
workloads:
  - {{name: web-1, namespace: shop, addresses: [10.0.0.2], identity: web}}
  - {{name: redis-1, namespace: shop, addresses: [10.0.0.3], labels: {{app: redis}}}}
listeners: [{{name: in, bind: "127.0.0.1:0", cluster: c}}]
clusters: [{{name: c}}]
policies: [{{name: only-web, action: allow, workloads: {{app: redis}}, from: [{{identities: ["*/sa/web"]}}], ports: [6379]}}]
"""
    )
    asked = run("check", "-c", tmp_path / "mesh.yaml", "--explain", "web-1", "redis-1", "6379")
    assert (asked.exit_code, "allowed" in asked.output, "only-web" in asked.output) == (0, True, True), asked.output
    asked = run("check", "-c", tmp_path / "mesh.yaml", "--explain", "web-1", "redis-1", "80")
    assert (asked.exit_code, "none of them matches" in asked.output) == (1, True)


def test_an_explanation_does_not_make_up_addresses(tmp_path: Path) -> None:
    text = """\
listeners: [{{name: in, bind: "127.0.0.1:0", cluster: c}}]
clusters: [{{name: c}}]
policies: [{{name: one, action: deny, from: [{peers}]}}]
"""

    def ask(source: str, peers: str) -> tuple[int, str, str]:
        (tmp_path / "mesh.yaml").write_text(text.format(peers=peers))
        asked = CliRunner().invoke(cli, ["check", "-c", str(tmp_path / "mesh.yaml"), "--explain", source, "10.0.0.3", "6379"])
        if isinstance(asked.exception, CommandError):
            return asked.exit_code, "", str(asked.exception)
        return asked.exit_code, asked.stdout.splitlines()[0], asked.stderr

    by_address = "{sources: [10.0.0.0/8]}"
    code, said, warned = ask(WEB, by_address)
    assert (code, f"{WEB} from 0.0.0.0 to" in said, "give SPIFFE_ID@ADDRESS" in warned) == (0, True, True)
    code, said, warned = ask(f"{WEB}@10.0.0.9", by_address)
    assert (code, f"{WEB} from 10.0.0.9 to" in said, warned) == (1, True, "")
    code, said, warned = ask(WEB, f"{{identities: [{WEB}]}}")
    assert (code, f"{WEB} to" in said, warned) == (1, True, "")
    for wrong in ("10.0.0", "somewhere", "10.0.0.1@10.0.0.2"):
        code, _, error = ask(f"{WEB}@{wrong}", by_address)
        assert (code, error.startswith("the source ")) == (1, True), error


def test_an_explanation_needs_no_certificate_that_has_yet_to_come_from_the_ca(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(
        f"""\
ca: {{address: "127.0.0.1:15010", identity: node, folder: {tmp_path}}}
identities: [{{name: node, spiffe_id: spiffe://example.org/node/a}}, {{name: web, spiffe_id: {WEB}}}]
workloads: [{{name: web-1, addresses: [10.0.0.2], identity: web}}]
listeners: [{{name: in, bind: "127.0.0.1:0", cluster: c}}]
clusters: [{{name: c}}]
policies: [{{name: only-web, action: allow, from: [{{identities: [{WEB}]}}]}}]
"""
    )
    asked = CliRunner().invoke(cli, ["check", "-c", str(tmp_path / "mesh.yaml"), "--explain", "web-1", "10.0.0.3", "6379"])
    assert (asked.exit_code, WEB in asked.output) == (0, True), asked.output


def test_the_end_of_a_certificate_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4mesh.identity.ca.INTERMEDIATE_LIFE", datetime.timedelta(minutes=5))
    CertificateAuthority.create(tmp_path / "ca", "example.org")
    (tmp_path / "request").write_bytes(make_request(WEB)[1])
    for words, out in (
        (f"ca issue {tmp_path}/ca {WEB} --out {tmp_path}/web --life 1d", "web.pem"),
        (f"ca sign {tmp_path}/ca {tmp_path}/request --out {tmp_path}/signed.pem", "signed.pem"),
        (f"ca enroll {tmp_path}/ca {WEB} --out {tmp_path}/node", "node/node.pem"),
    ):
        said = CliRunner().invoke(cli, words.split()).output
        assert x509.load_pem_x509_certificates((tmp_path / out).read_bytes())[0].not_valid_after_utc.isoformat() in said


def test_a_ca_that_could_not_be_made_whole_is_made_by_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 0

    def on_a_full_disk(path: Path, content: bytes, mode: int) -> None:
        nonlocal left
        if left == 0:
            raise CommandError(f"{path}: can't be written: No space left on device")
        left -= 1
        write_file(path, content, mode)

    for room in range(20):
        folder, left = tmp_path / str(room), room
        monkeypatch.setattr("l4mesh.identity.ca.write_file", on_a_full_disk)
        try:
            CertificateAuthority.create(folder, "example.org")
        except CommandError as error:
            assert "No space left" in str(error)
        else:
            break
        monkeypatch.undo()
        ca = CertificateAuthority.create(folder, "example.org")
        files = Authority(folder).files(tmp_path, "web", WEB)
        assert openssl_accepts(files.certificate, ca.bundle_path)
    assert room > 5


@pytest.mark.parametrize(
    "words",
    [
        "ca init --trust-domain example.org {file}",
        "ca init --trust-domain example.org {file}/ca",
        "ca init --trust-domain example.org {half}",
        "ca issue {ca} spiffe://example.org/a --out {file}/a/web",
        "ca sign {ca} {request} --out {file}/web.pem",
        "ca sign {ca} {request} --out {full}",
    ],
)
def test_files_that_can_t_be_touched_are_named(tmp_path: Path, words: str) -> None:
    CertificateAuthority.create(tmp_path / "ca", "example.org")
    (tmp_path / "file").touch()
    (tmp_path / "request").write_bytes(make_request("spiffe://example.org/a")[1])
    (tmp_path / "half/1/left").mkdir(parents=True)
    (tmp_path / "full").symlink_to("/dev/full")
    places = {name: tmp_path / name for name in ("ca", "file", "half", "request", "full")}
    error = CliRunner().invoke(cli, words.format(**places).split()).exception
    assert isinstance(error, CommandError), error
    assert str(tmp_path) in str(error)


def test_a_folder_that_is_no_ca_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="l4mesh ca init"):
        CertificateAuthority(tmp_path)
    ca = Authority.new(tmp_path / "ca")
    (tmp_path / "ca/1").rename(tmp_path / "elsewhere")
    with pytest.raises(CommandError, match="its numbered folder with root and keys is gone"):
        ca.issue(WEB)
