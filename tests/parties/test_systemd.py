"""The units of conf/, as they are, under a real systemd."""

import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import skip_or_fail
from tests.support.ca import NODE_A
from tests.support.certificates import DOMAIN, WEB
from tests.support.mesh import Config, UnixConnection
from tests.support.peers import DEADLINE_S, Server, echo, make_bytes, read_exactly, read_to_end
from tests.support.systemd import REPOSITORY, Systemd, missing
from tests.support.waiting import wait_until

CONF = REPOSITORY / "conf"
UNIT, CA_UNIT = "l4mesh.service", "l4mesh-ca.service"
FAR = "192.0.2.80"
"""An address that nobody has, behind a wire: what is sent there is captured."""
NEAR = "192.0.2.1"
WATCHDOG_S = 4
BROKEN = 'listeners: [{name: web, bind: "nowhere"}]\n'


class Host(Systemd):
    """With l4mesh's units, and what they read."""

    def configure(self, config: Config | str) -> None:
        """Replaces the file as an editor does."""
        file = self.file("/etc/l4mesh/l4mesh.yaml")
        new = file.with_suffix(".new")
        new.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        new.rename(file)

    def connect(self, address: str = FAR) -> socket.socket:
        client = self.inside(lambda: socket.create_connection((address, 80), DEADLINE_S))
        client.settimeout(DEADLINE_S)
        return client

    def status(self) -> Any:
        with contextlib.closing(UnixConnection(str(self.file("/run/l4mesh/admin.sock")))) as connection:
            connection.request("GET", "/status")
            return json.loads(connection.getresponse().read())

    def main_pid(self, unit: str = UNIT) -> int:
        return int(self.show(unit, "MainPID"))

    def is_active(self, unit: str = UNIT) -> bool:
        return self.show(unit, "ActiveState") == "active"

    def rules(self) -> str:
        return self.do("iptables-save") + self.do("ip6tables-save")


class Talk:
    """A connection that asks and is answered, byte by byte, until the end of the block."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.rounds = 0
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._talk, daemon=True)

    def _talk(self) -> None:
        try:
            while not self._stop.wait(0.005):
                said = make_bytes(20_000, self.rounds)
                self.client.sendall(said)
                assert read_exactly(self.client, len(said)) == said
                self.rounds += 1
        except BaseException as error:
            self._errors.append(error)

    def goes_on(self) -> None:
        seen = self.rounds
        wait_until(lambda: self._errors or self.rounds > seen + 1, "it is answered")
        assert not self._errors

    def __enter__(self) -> "Talk":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._errors


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    if what := missing():
        skip_or_fail(f"needs {what}")
    with Host(tmp_path) as booted:
        booted.do("ip", "link", "add", "wire", "type", "veth", "peer", "name", "far")
        booted.do("ip", "address", "add", f"{NEAR}/24", "dev", "wire")
        for end in ("wire", "far"):
            booted.do("ip", "link", "set", end, "up")
        for unit in (UNIT, CA_UNIT):
            booted.install(CONF / unit)
        yield booted
        # Shown where the test has failed.
        print(booted.do("journalctl", "--no-pager"))


@pytest.fixture
def config(host: Host) -> Iterator[Config]:
    """What is sent to FAR is answered by a server here."""
    with host.inside(lambda: Server(echo)) as server:
        yield {
            "admin": {"bind": "unix:/run/l4mesh/admin.sock"},
            "upgrade": {"socket": "/run/l4mesh/upgrade.sock"},
            "workers": 1,
            "drain": {"time": "off", "over": "off"},
            "listeners": [
                {
                    "name": "out",
                    "bind": "127.0.0.1:15001",
                    "capture": "redirect",
                    "routes": [{"match": {"destinations": [FAR]}, "cluster": "web"}],
                    "default": "original_destination",
                }
            ],
            "clusters": [{"name": "web", "endpoints": [server.address]}],
        }


def test_systemd_finds_nothing_wrong_with_the_units(host: Host) -> None:
    done = host.run("systemd-analyze", "verify", *(f"/etc/systemd/system/{unit}" for unit in (UNIT, CA_UNIT)))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    # Who has the keys of a mesh needs nothing else; the figure is ten times what systemd shows.
    host.do("systemd-analyze", "security", "--no-pager", "--threshold=20", CA_UNIT)


def test_a_life(host: Host, config: Config) -> None:
    host.configure(config)
    host.do("systemctl", "start", UNIT)
    # It has returned: what is captured is served, there is nothing to wait for.
    assert host.is_active()
    supervisor, child = host.main_pid(), host.status()["pid"]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = host.file(f"/proc/{child}/limits").read_text()
    assert int(limits.split("Max open files")[1].split()[0]) >= min(1 << 20, hard)
    with host.connect() as client, Talk(client) as talk:
        talk.goes_on()
        assert host.status()["listeners"][0]["active"] == 1
        generation = host.status()["generation"]
        host.configure(BROKEN)
        refused = host.run("systemctl", "reload", UNIT)
        assert refused.returncode
        assert "got 'nowhere'" in host.journal(UNIT)
        talk.goes_on()
        host.configure(config | {"limits": {"connections": 1000}})
        host.do("systemctl", "reload", UNIT)
        wait_until(lambda: host.status()["generation"] > generation, "it is in force")
        # As the unit says.
        host.do("systemctl", "kill", "--kill-whom=main", "--signal=USR2", UNIT)
        wait_until(lambda: host.status()["pid"] != child, "another serves", 30)
        talk.goes_on()
        assert host.is_active()
        assert (host.main_pid(), host.show(UNIT, "NRestarts")) == (supervisor, "0")
        assert "l4mesh" in host.rules()
    host.do("systemctl", "stop", UNIT)
    assert (host.show(UNIT, "ActiveState"), host.show(UNIT, "Result")) == ("inactive", "success")
    assert "l4mesh" not in host.rules()
    assert not host.file("/run/l4mesh").exists()


def test_stopping_drains(host: Host, config: Config) -> None:
    host.configure(config | {"drain": {"time": "20s", "over": "5s"}})
    host.do("systemctl", "start", UNIT)
    with host.connect() as client:
        with Talk(client) as talk:
            host.do("systemctl", "stop", "--no-block", UNIT)
            host.wait_until(lambda: '"event": "draining"' in host.journal(UNIT), "it drains")
            talk.goes_on()
            assert host.show(UNIT, "ActiveState") == "deactivating"
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == (b"", "FIN")
    host.wait_until(lambda: host.show(UNIT, "ActiveState") == "inactive", "it has stopped")
    assert host.show(UNIT, "Result") == "success"
    assert "l4mesh" not in host.rules()


def test_what_dies_comes_back_and_what_is_told_to_end_does_not(host: Host, config: Config) -> None:
    host.configure(BROKEN)
    assert host.run("systemctl", "start", UNIT).returncode
    assert "/etc/l4mesh/l4mesh.yaml:1: listeners[0].bind[0]: must be an address with a port" in host.journal(UNIT)
    assert "l4mesh" not in host.rules()
    # Nobody has to start it, however often it failed.
    assert host.show(UNIT, "StartLimitIntervalUSec") == "0"
    host.configure(config)
    host.wait_until(host.is_active, "it serves", 30)
    with host.connect() as client, Talk(client) as talk:
        talk.goes_on()
    before = host.main_pid()
    host.do("kill", "-KILL", str(before))
    assert "l4mesh" in host.rules()
    host.wait_until(lambda: host.is_active() and host.main_pid() != before, "it serves again", 30)
    with host.connect() as client, Talk(client) as talk:
        talk.goes_on()
    host.do("l4mesh", "drain", "--admin", "unix:/run/l4mesh/admin.sock")
    host.wait_until(lambda: host.show(UNIT, "ActiveState") == "inactive", "it has ended for good")
    assert "l4mesh" not in host.rules()


def test_without_the_supervisor_systemd_follows_and_watches(host: Host, config: Config) -> None:
    config["listeners"] = [{"name": "web", "bind": f"{NEAR}:80", "cluster": "web"}]
    host.configure(config)
    command = "/usr/local/bin/l4mesh run -c /etc/l4mesh"
    host.install(CONF / UNIT, {"ExecStart": f"\nExecStart={command}", "WatchdogSec": f"{WATCHDOG_S}s"})
    host.do("systemctl", "start", UNIT)
    before = host.main_pid()
    with host.connect(NEAR) as client, Talk(client) as talk:
        talk.goes_on()
        assert "live connections handed over: 1" in host.do("l4mesh", "upgrade", "-c", "/etc/l4mesh")
        host.wait_until(lambda: host.main_pid() != before, "systemd knows the new process")
        upgraded = time.monotonic()
        after = host.main_pid()
        assert host.status()["pid"] == after
        talk.goes_on()
        # For longer than systemd waits for a word.
        heard = "WatchdogTimestampMonotonic"
        host.wait_until(lambda: int(host.show(UNIT, heard)) / 1e6 > upgraded + WATCHDOG_S, "it lives on", 3 * WATCHDOG_S)
        talk.goes_on()
        assert (host.main_pid(), host.show(UNIT, "NRestarts")) == (after, "0")
    host.do("kill", "-STOP", str(after))
    host.wait_until(lambda: host.is_active() and host.main_pid() not in (0, after), "it is replaced", 30)
    assert "Watchdog timeout" in host.journal(UNIT)
    with host.connect(NEAR) as client, Talk(client) as talk:
        talk.goes_on()


def test_the_ca_gives_a_node_its_certificates(host: Host, config: Config) -> None:
    host.do("l4mesh", "ca", "init", "--trust-domain", DOMAIN, "/etc/l4mesh/ca")
    grants = host.file("/etc/l4mesh/ca/nodes.yaml")
    grants.write_text("nodes: [{identity: nobody}]\n")
    assert host.run("systemctl", "start", CA_UNIT).returncode
    assert "nodes.yaml:1: nodes[0].identity: must" in host.journal(CA_UNIT)
    grants.write_text(f"nodes: [{{identity: {NODE_A}, workloads: [{WEB}]}}]\n")
    host.wait_until(lambda: host.is_active(CA_UNIT), "it is up by itself", 30)
    host.do("l4mesh", "ca", "enroll", "/etc/l4mesh/ca", NODE_A, "--out", "/tmp/node")
    # As whoever brought it owned it.
    host.do("cp", "-r", "/tmp/node", "/var/lib/l4mesh")
    host.do("chown", "-R", "1000:1000", "/var/lib/l4mesh")
    config["ca"] = {"address": "127.0.0.1:15010", "identity": "node", "retry": "100ms"}
    config["identities"] = [{"name": "node", "spiffe_id": NODE_A}, {"name": "web", "spiffe_id": WEB}]
    host.configure(config)
    host.do("systemctl", "start", UNIT)
    host.wait_until(lambda: '"event": "identity_issued"' in host.journal(UNIT), "a certificate is issued")
    assert host.file("/var/lib/l4mesh/identities/web.pem").stat().st_mode & 0o777 == 0o600
    host.do("systemctl", "stop", CA_UNIT)
    assert host.show(CA_UNIT, "Result") == "success"
