"""Endpoints by name, asked of a real name server (dnsmasq) that changes its mind, goes away and comes back."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from l4mesh.lab import Host, Lab
from tests.conftest import Factory
from tests.support.mesh import Mesh, simple
from tests.support.waiting import wait_until

pytestmark = pytest.mark.netns


class NameServer:
    """Answers from a hosts file, good for a second."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._host = host
        self._hosts = folder / "hosts"
        self._log = folder / "queries"

    def start(self) -> None:
        self._process = self._host.start(
            "dnsmasq", "--keep-in-foreground", "--user=root", "--pid-file=", "--conf-file=/dev/null", "--no-resolv", "--no-hosts",
            "--listen-address=127.0.0.1", "--bind-interfaces", "--local-ttl=1", f"--addn-hosts={self._hosts}",
            "--log-queries", f"--log-facility={self._log}",
        )  # fmt: skip

    def say(self, *addresses: str) -> None:
        self._hosts.write_text("".join(f"{address} db.mesh.test\n" for address in addresses))

    def read_again(self) -> None:
        self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    @property
    def queries(self) -> int:
        return self._log.read_text().count("query[A] db.mesh.test") if self._log.exists() else 0


@pytest.fixture
def host() -> Iterator[Host]:
    with Lab() as lab:
        made = lab.host("h")
        # `ip netns exec` puts this file in the place of /etc/resolv.conf.
        folder = Path("/etc/netns") / made.namespace
        folder.mkdir(parents=True)
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        try:
            yield made
        finally:
            (folder / "resolv.conf").unlink()
            folder.rmdir()
            subprocess.run(["rmdir", "--ignore-fail-on-non-empty", str(folder.parent)], check=False)


def addresses(m: Mesh) -> list[str]:
    return [endpoint["address"] for endpoint in m.cluster()["endpoints"]]


def test_endpoints_follow_the_name(host: Host, mesh: Factory, tmp_path: Path) -> None:
    names = NameServer(host, tmp_path)
    names.say("10.0.0.1", "fd00::1")
    names.start()
    wait_until(lambda: "127.0.0.1:53" in host.run("ss", "-lnu"), "the name server listens")
    m = mesh(simple("db.mesh.test:5432", "10.0.0.9:5432"), prefix=tuple(host.command()))
    assert addresses(m) == ["10.0.0.1:5432", "[fd00::1]:5432", "10.0.0.9:5432"]

    asked = names.queries
    names.say("10.0.0.2")
    names.read_again()
    wait_until(lambda: addresses(m) == ["10.0.0.2:5432", "10.0.0.9:5432"], "the new address is in force")
    assert names.queries > asked

    # A name server that is away changes nothing.
    names.stop()
    wait_until(lambda: any(event["event"] == "name_not_resolved" for event in m.events()), "the failure is said", 30)
    assert addresses(m) == ["10.0.0.2:5432", "10.0.0.9:5432"]
    names.say("10.0.0.3")
    names.start()
    wait_until(lambda: addresses(m) == ["10.0.0.3:5432", "10.0.0.9:5432"], "the name is resolved again", 30)


def test_a_name_server_that_is_away_keeps_nothing_from_starting(host: Host, mesh: Factory, tmp_path: Path) -> None:
    m = mesh(simple("db.mesh.test:5432"), prefix=tuple(host.command()))
    assert addresses(m) == []
    names = NameServer(host, tmp_path)
    names.say("10.0.0.1")
    names.start()
    wait_until(lambda: addresses(m) == ["10.0.0.1:5432"], "the name is resolved", 30)
