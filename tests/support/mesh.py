"""The real l4mesh process under test: started from a configuration, watched over its admin server, and held to its invariants
when it is stopped."""

import contextlib
import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from tests.support.waiting import wait_until

Config = dict[str, Any]


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("l4mesh", timeout=15)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def simple(*endpoints: str, listener: Config | None = None, **cluster: Any) -> Config:
    """One listener "web" on a free port and one cluster "web"."""
    return {
        "listeners": [{"name": "web", "bind": "127.0.0.1:0", "cluster": "web"} | (listener or {})],
        "clusters": [{"name": "web", "endpoints": list(endpoints)} | cluster],
    }


def whole_lines(file: Path) -> list[str]:
    """Of a file that somebody else is writing: its last line may be half of one."""
    return file.read_text().split("\n")[:-1]


def environment_of_ours() -> dict[str, str]:
    """For processes of l4mesh: with the sanitizers' runtime before all else, where the extension needs it."""
    preload = os.environ.get("L4MESH_PRELOAD", "")
    return os.environ | ({"LD_PRELOAD": preload} if preload else {})


class Mesh:
    """``prefix``: put before the command (`ip netns exec …`). ``nofile``: RLIMIT_NOFILE of the process, soft and hard. ``options``: of
    `l4mesh run`."""

    def __init__(
        self, folder: Path, config: Config, prefix: tuple[str, ...] = (), nofile: int = 0, options: tuple[str, ...] = ()
    ) -> None:
        self.folder = folder
        self._settings = {
            "admin": {"bind": f"unix:{folder}/admin.sock"},
            "workers": 2,
            "drain": {"time": "off", "over": "off"},
            "upgrade": {"socket": f"{folder}/upgrade.sock"},
        } | {key: value for key, value in config.items() if key in ("workers", "admin", "drain", "upgrade")}
        self.file = folder / "conf" / "l4mesh.yaml"
        self.file.parent.mkdir(exist_ok=True)
        self.write(config)
        self.stderr = folder / "stderr"
        self.stdout = folder / "stdout"
        self._prefix = prefix
        self._nofile = nofile
        self._replaced: list[subprocess.Popen[bytes]] = []
        self._options = options
        self.start()

    def start(self) -> None:
        self.process = self.spawn()
        wait_until(self._is_ready, "l4mesh is ready", 30)
        self._descriptors = self.count_descriptors()

    def spawn(self, nofile: int = 0, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
        """Starts a process with this configuration, which takes over from the one that runs, if it may. ``nofile``: its RLIMIT_NOFILE."""
        nofile = nofile or self._nofile

        def limit() -> None:
            if nofile:
                resource.setrlimit(resource.RLIMIT_NOFILE, (nofile, nofile))

        command = [*self._prefix, sys.executable, "-m", "l4mesh", "run", *self._options, "-c", str(self.file.parent)]
        with self.stderr.open("ab") as stderr, self.stdout.open("ab") as stdout:
            return subprocess.Popen(
                command, stderr=stderr, stdout=stdout, preexec_fn=limit, env=environment_of_ours() | dict(environment or {})
            )

    def upgrade(self, **how: Any) -> "subprocess.Popen[bytes]":
        """Lets a new process take over; gives the one before, which may still drain."""
        before = self.process
        self.process = self.spawn(**how)
        wait_until(lambda: self.process.poll() is not None or self.status()["pid"] == self.process.pid, "the new process serves", 30)
        assert self.process.poll() is None, self.stderr.read_text()
        if not self._replaced:
            # What steers each worker while connections cross.
            self._descriptors += self._settings["workers"]
        self._replaced.append(before)
        return before

    def wait_alone(self) -> None:
        """Until the processes before have ended, and their last counters are known."""
        for before in self._replaced:
            assert before.wait(20) == 0, self.stderr.read_text()
        wait_until(lambda: sum(event["event"] == "upgrade_ends" for event in self.events()) >= len(self._replaced), "all is known")

    def _is_ready(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"l4mesh ended with {self.process.returncode}: {self.stderr.read_text()}")
        try:
            return bool(self.get("/ready")["ready"])
        except (OSError, http.client.HTTPException):
            return False

    def write(self, config: Config) -> None:
        """Replaces the file as an editor does."""
        new = self.file.with_suffix(".new")
        new.write_text(yaml.safe_dump(config | self._settings))
        new.rename(self.file)

    def reload(self, config: Config) -> None:
        """Writes the file and waits until it is in force."""
        before = self.status()["generation"]
        self.write(config)
        wait_until(lambda: self.status()["generation"] > before, "the new configuration is in force")

    def fetch(self, path: str, method: str = "GET", headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        connection = UnixConnection(self._settings["admin"]["bind"].removeprefix("unix:"))
        with contextlib.closing(connection):
            connection.request(method, path, headers={"Connection": "close"} | (headers or {}))
            answer = connection.getresponse()
            return answer.status, answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.fetch(path)[1])

    def status(self) -> Any:
        return self.get("/status")

    def port(self, listener: str = "web", bind: int = 0) -> int:
        bound = next(entry for entry in self.status()["listeners"] if entry["name"] == listener)["bind"][bind]
        return int(bound.rpartition(":")[2])

    def closed(self) -> dict[str, int]:
        """Connections that ended, by reason."""
        return dict(self.status()["closed"])

    def wait_closed(self, **reasons: int) -> None:
        wait_until(lambda: all(self.closed().get(k, 0) >= n for k, n in reasons.items()), f"connections ended as {reasons}")
        assert {k: self.closed().get(k, 0) for k in reasons} == reasons

    def cluster(self, name: str = "web") -> Any:
        return self.get(f"/clusters?name={name}")["clusters"][0]

    def opened(self, cluster: str = "web") -> dict[str, int]:
        """Connections made, by endpoint."""
        return {endpoint["address"]: endpoint["opened"] for endpoint in self.cluster(cluster)["endpoints"]}

    def metrics(self) -> dict[str, float]:
        """Sample name with its labels, as exposed, to value."""
        text = self.fetch("/metrics")[1].decode()
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    def total(self, name: str) -> float:
        """Sum over all labels."""
        return sum(value for key, value in self.metrics().items() if re.fullmatch(rf"{name}(\{{.*\}})?", key))

    def active(self) -> int:
        return sum(worker["active"] for worker in self.status()["workers"])

    def count_descriptors(self) -> int:
        """Open descriptors but for the admin server's own connections."""
        links = []
        for name in os.listdir(f"/proc/{self.process.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(f"/proc/{self.process.pid}/fd/{name}"))
        return len(links)

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def check_invariants(self) -> None:
        """When all peers are gone: nothing is left, and every connection was counted once at open and once at close."""
        wait_until(lambda: self.active() == 0, "all connections have ended")
        status = self.status()
        assert sum(status["closed"].values()) == sum(worker["accepted"] for worker in status["workers"])
        for listener in status["listeners"]:
            assert listener["active"] == 0
        for cluster in self.get("/clusters")["clusters"]:
            assert cluster["active"] == cluster["waiting"] == cluster["retrying"] == 0, cluster
            assert cluster["opened"] == sum(cluster["closed"].values()), cluster
            assert all(endpoint["active"] == 0 for endpoint in cluster["endpoints"]), cluster
        pooled = 2 * sum(worker["pipes"] for worker in status["workers"])
        # One for the admin connection that asks.
        wait_until(lambda: self.count_descriptors() - pooled <= self._descriptors + 1, "all descriptors are back")

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(20) == 0, self.stderr.read_text()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def upgrade_socket(self) -> str:
        return str(self._settings["upgrade"]["socket"])

    @property
    def admin(self) -> str:
        return str(self._settings["admin"]["bind"])

    def events(self) -> list[Any]:
        return [json.loads(line) for line in whole_lines(self.stderr) if line.startswith("{")]

    def records(self) -> list[Any]:
        """The access log."""
        return [json.loads(line) for line in whole_lines(self.stdout)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for process in (*self._replaced, self.process):
                if process.poll() is None:
                    process.kill()
                    process.wait()
            print(self.stderr.read_text()[-4000:])
            return
        self.wait_alone()
        if self.process.poll() is None:
            self.check_invariants()
            self.stop()
        said = self.stderr.read_text()
        assert "Traceback" not in said, said
        assert "Sanitizer" not in said, said
        assert "runtime error" not in said, said
