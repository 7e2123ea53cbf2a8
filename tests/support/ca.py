"""`l4mesh ca serve` as a process, and nodes that get their certificates from it."""

import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from l4mesh.identity.renewal import enroll
from tests.support.certificates import DOMAIN, HOUR, Authority
from tests.support.mesh import Config
from tests.support.waiting import wait_until

HOST = "127.77.0.1"
"""An address that nothing else binds ports of: a CA that was stopped finds its own free when it comes back."""
NODE_A = f"spiffe://{DOMAIN}/node/a"
NODE_B = f"spiffe://{DOMAIN}/node/b"
SERVER = f"spiffe://{DOMAIN}/l4mesh/ca"


def grant(authority: Authority, **nodes: list[str]) -> None:
    """By the last part of the nodes' names. Replaces the file as an editor does."""
    entries = [{"identity": f"spiffe://{DOMAIN}/node/{name}", "workloads": workloads} for name, workloads in nodes.items()]
    new = authority.nodes_path.with_suffix(".new")
    new.write_text(yaml.safe_dump({"nodes": entries}))
    new.rename(authority.nodes_path)


class CaProcess:
    """``prefix``: put before the command (`ip netns exec …`). ``program``: what Python runs."""

    def __init__(
        self,
        folder: Path,
        authority: Authority,
        life: str = "1h",
        timeout: str = "10s",
        host: str = HOST,
        prefix: Sequence[str] = (),
        program: Sequence[str] = ("-m", "l4mesh"),
    ) -> None:
        self.authority = authority
        self._host = host
        self._prefix = prefix
        self._program = program
        self._options = ["--life", life, "--timeout", timeout]
        self._stderr = folder / f"ca-serve-{id(self)}.log"
        self.port = 0
        self.start()

    def start(self) -> None:
        """Again on the port that it had."""
        lines = len(self.events()) if self._stderr.exists() else 0
        command = [
            sys.executable,
            *self._program,
            "ca",
            "serve",
            str(self.authority.bundle_path.parent),
            "--bind",
        ]
        with self._stderr.open("ab") as stderr:
            self._process = subprocess.Popen([*self._prefix, *command, self.address, *self._options], stderr=stderr)

        def ready() -> Any:
            assert self._process.poll() is None, self._stderr.read_text()
            return next((event for event in self.events()[lines:] if event["event"] == "ready"), None)

        self.port = int(wait_until(ready, "the CA serves", 30)["bind"].rpartition(":")[2])

    @property
    def address(self) -> str:
        return f"{self._host}:{self.port}"

    def events(self, name: str = "") -> list[Any]:
        text = self._stderr.read_text()
        events = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.startswith("{")]
        return [event for event in events if name in ("", event["event"])]

    def stop(self) -> None:
        self._process.terminate()
        assert self._process.wait(20) == 0, self._stderr.read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.kill()
            self._process.wait()
            print(self._stderr.read_text()[-4000:])
            return
        if self._process.poll() is None:
            self.stop()
        assert "Traceback" not in self._stderr.read_text(), self._stderr.read_text()
        assert not self.events("internal_error"), self.events("internal_error")


class Node:
    """The folder that a node begins with, and what its configuration says about it."""

    def __init__(self, folder: Path, authority: Authority, spiffe_id: str = NODE_A) -> None:
        self.folder = folder
        self.spiffe_id = spiffe_id
        enroll(authority, spiffe_id, HOUR, folder)

    def config(self, address: str, *, ca: Config | None = None, **workloads: str) -> Config:
        """``workloads``: SPIFFE ID by the identity's name."""
        section = {"address": address, "identity": "node", "folder": str(self.folder), "retry": "100ms"}
        identities = [{"name": name, "spiffe_id": spiffe_id} for name, spiffe_id in ({"node": self.spiffe_id} | workloads).items()]
        return {"ca": section | (ca or {}), "identities": identities}

    def credential(self, name: str = "") -> Path:
        return self.folder / "identities" / f"{name}.pem" if name else self.folder / "node.pem"

    @contextlib.contextmanager
    def connection(self, address: str) -> Any:
        """A TLS connection to the CA as this node, in the hands of the test."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(self.folder / "bundle.pem")
        context.load_cert_chain(self.credential())
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), 15) as plain, context.wrap_socket(plain) as secured:
            yield secured

    def ask(self, address: str, method: str = "GET", path: str = "/v1/trust", body: bytes = b"") -> tuple[int, Any]:
        """Status and answer of one request."""
        with self.connection(address) as secured:
            client = http.client.HTTPConnection("ca")
            client.sock = secured
            client.request(method, path, body, {"Connection": "close"})
            answer = client.getresponse()
            content = answer.read()
            return answer.status, json.loads(content) if answer.getheader("Content-Type", "").startswith(
                "application/json"
            ) else content


def identity_of(m: Any, name: str) -> Any:
    """What the status says about an identity."""
    return next(one for one in m.status()["identities"] if one["name"] == name)
