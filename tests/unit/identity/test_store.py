"""What the store says of identities as time goes by: of real files, at times that the test chooses."""

import dataclasses
import datetime
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import Encoding

from l4mesh.cli import cli
from l4mesh.errors import ConfigError
from l4mesh.identity.store import IdentityStore
from l4mesh.model import Identity
from tests.support.certificates import REDIS, Authority, revocation_list

HOUR_S = 3600.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.new(tmp_path_factory.mktemp("ca"))


def make_store(authority: Authority, folder: Path, crl: str = "") -> IdentityStore:
    files = authority.files(folder, "redis", REDIS, datetime.timedelta(hours=10))
    store = IdentityStore()
    store.refresh({"redis": Identity("redis", str(files.certificate), str(files.key), str(files.bundle), crl)})
    store.keep()
    return store


def test_a_certificate_is_overdue_in_the_last_fifth_of_its_life(authority: Authority, tmp_path: Path) -> None:
    store = make_store(authority, tmp_path)
    (identity,) = store.status()
    assert store.overdue(identity.expires_unix_s - 3 * HOUR_S) == []
    ((event, fields),) = store.overdue(identity.expires_unix_s - HOUR_S)
    assert (event, fields) == ("identity_expires", {"identity": "redis", "state": "expires soon", "left_s": 3600})
    ((event, fields),) = store.overdue(identity.expires_unix_s + 60)
    assert (event, fields) == ("identity_expires", {"identity": "redis", "state": "has expired: handshakes fail", "left_s": -60})


def test_a_revocation_list_that_grows_old_while_it_is_in_use_is_told(authority: Authority, tmp_path: Path) -> None:
    generation = authority._generations()[-1]
    crl = tmp_path / "crl.pem"
    signer = generation.intermediate
    lists = [
        revocation_list(signer, generation.intermediate_key, signer, next_update=datetime.timedelta(hours=hours)) for hours in (2, 1)
    ]
    crl.write_bytes(signer.public_bytes(Encoding.PEM) + b"".join(lists))
    store = make_store(authority, tmp_path, str(crl))
    (identity,) = store.status()
    assert store.events == []
    assert store.overdue(identity.crl_until_unix_s - 1) == []
    ((event, fields),) = store.overdue(identity.crl_until_unix_s + 60)
    assert (event, fields["identity"], fields["since_s"]) == ("crl_out_of_date", "redis", 60)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("file", ["certificate", "private_key", "trust_bundle", "crl"])
def test_a_file_that_is_a_pipe_is_not_waited_for(authority: Authority, tmp_path: Path, file: str) -> None:
    files = authority.files(tmp_path, "redis", REDIS)
    os.mkfifo(tmp_path / "pipe")
    identity = Identity("redis", str(files.certificate), str(files.key), str(files.bundle), "")
    with pytest.raises(ConfigError, match="pipe: can't be read: it is not a regular file"):
        IdentityStore().refresh({"redis": dataclasses.replace(identity, **{file: str(tmp_path / "pipe")})})


def test_what_is_overdue_when_it_is_loaded_is_told_once(authority: Authority, tmp_path: Path) -> None:
    generation = authority._generations()[-1]
    crl = tmp_path / "crl.pem"
    crl.write_bytes(
        generation.intermediate.public_bytes(Encoding.PEM)
        + revocation_list(generation.intermediate, generation.intermediate_key, next_update=datetime.timedelta(hours=-1))
    )
    store = make_store(authority, tmp_path, str(crl))
    assert [event for event, _ in store.events] == ["crl_out_of_date"]
    (tmp_path / "mesh.yaml").write_text(
        f"identities: [{{name: redis, certificate: {tmp_path}/redis.pem, private_key: {tmp_path}/redis.key, "
        f"trust_bundle: {authority.bundle_path}, crl: {crl}}}]\n"
        "listeners: [{name: web, bind: '127.0.0.1:1', cluster: web}]\nclusters: [{name: web}]\n"
    )
    checked = CliRunner().invoke(cli, ["check", "-c", str(tmp_path / "mesh.yaml")])
    assert checked.stderr.splitlines() == [
        "l4mesh: warning: identity redis has a revocation list that is out of date: what was revoked since is trusted"
    ]
