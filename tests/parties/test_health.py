"""Health checks of real servers: as they start up, as they serve, and when they are gone."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import Factory
from tests.flow.test_health import CHECK, wait_health
from tests.flow.test_tls import outbound
from tests.parties.test_foreign_tls import s_server
from tests.parties.test_parties import need, postgresql, run, running
from tests.support.certificates import REDIS, Files
from tests.support.mesh import Config, simple
from tests.support.proxies import accepts, free_port
from tests.support.waiting import wait_until

SLOW = CHECK | {"timeout": "1s"}


def test_nginx(mesh: Factory, tmp_path: Path) -> None:
    need("nginx")
    port = free_port()
    (tmp_path / "conf").write_text(
        f"daemon off; user root; worker_processes 1; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}\n"
        f"http {{ access_log {tmp_path}/access.log; client_body_temp_path {tmp_path}; proxy_temp_path {tmp_path};\n"
        f"server {{ listen 127.0.0.1:{port}; location /ready {{ return 204; }} location /busy {{ return 503; }} }} }}\n"
    )
    address = f"127.0.0.1:{port}"
    with running(["nginx", "-e", str(tmp_path / "error.log"), "-c", str(tmp_path / "conf")], port, tmp_path):
        config = simple(address, health_check=SLOW | {"type": "http", "path": "/ready", "host": "web.example"})
        config["clusters"].append({"name": "busy", "endpoints": [address], "health_check": SLOW | {"type": "http", "path": "/busy"}})
        m = mesh(config)
        wait_health(m, address, "healthy")
        wait_health(m, address, "unhealthy", "busy", why="status 503")
        assert '"GET /ready HTTP/1.1" 204 0 "-" "l4mesh-health"' in (tmp_path / "access.log").read_text()
    wait_health(m, address, "unhealthy", why="connect: refused")


def test_redis(mesh: Factory, tmp_path: Path) -> None:
    need("redis-server", "redis-cli")
    ports = free_port(), free_port()
    open_, secret = (f"127.0.0.1:{port}" for port in ports)
    command = ["redis-server", "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path), "--port"]
    with (
        running([*command, str(ports[0])], ports[0], tmp_path),
        running([*command, str(ports[1]), "--requirepass", "hush"], ports[1], tmp_path),
    ):
        m = mesh(simple(open_, secret, health_check=CHECK | {"type": "redis"}))
        wait_health(m, open_, "healthy")
        wait_health(m, secret, "healthy")
        # It stands still, as a server does that swaps: it can be connected, and does not answer.
        pid = int(run("redis-cli", "-p", str(ports[0]), "INFO", "server").split(b"process_id:")[1].split()[0])
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_health(m, open_, "unhealthy", why="timeout after 500ms in expect")
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_health(m, open_, "healthy")
        # Not one connection is left behind.
        wait_until(lambda: run("redis-cli", "-p", str(ports[0]), "CLIENT", "LIST").count(b"\n") <= 2, "checks leave nothing open")


def test_postgresql(mesh: Factory) -> None:
    with postgresql() as (tools, port):
        address = f"127.0.0.1:{port}"
        config = simple(address, health_check=SLOW | {"type": "postgresql"})
        config["clusters"].append(
            {"name": "known", "endpoints": [address], "health_check": SLOW | {"type": "postgresql", "user": "mesh"}}
        )
        m = mesh(config)
        # There is no user l4mesh, whom the server refuses: it is alive. With the other it begins a session, which ends at once.
        wait_health(m, address, "healthy")
        wait_health(m, address, "healthy", "known")
        count = ["-h", "127.0.0.1", "-p", str(port), "-U", "mesh", "-d", "postgres", "-At", "-c"]
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'l4mesh-health'"
        wait_until(lambda: int(run(str(tools / "psql"), *count, query)) <= 1, "sessions of checks end")
        # A smart shutdown waits for this session, and refuses others: "cannot connect now".
        with subprocess.Popen(
            [str(tools / "psql"), *count[:-1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as held:
            assert held.stdin
            assert held.stdout
            held.stdin.write("SELECT pg_backend_pid();\nSELECT 'here';\n")
            held.stdin.flush()
            held.stdout.readline()
            assert held.stdout.readline() == "here\n"
            os.kill(_postmaster(port), signal.SIGTERM)
            wait_health(m, address, "unhealthy", why="not ready: the database system is shutting down")
            held.stdin.close()
    wait_until(lambda: not accepts(port), "PostgreSQL is gone")


def _postmaster(port: int) -> int:
    """The process that listens: its lock file is beside its socket."""
    file = next(Path(tempfile.gettempdir()).glob(f"*/.s.PGSQL.{port}.lock"))
    return int(file.read_text().split()[0])


@contextlib.contextmanager
def mariadb() -> Iterator[tuple[int, Path]]:
    """A server that logs whatever ends badly: its port, and its log."""
    need("mariadbd", "mariadb-install-db")
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        as_user = ["--user=nobody"] if os.geteuid() == 0 else []
        if as_user:
            os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
        data = folder / "data"
        where = ["--no-defaults", f"--datadir={data}", *as_user]
        run("mariadb-install-db", *where, "--auth-root-authentication-method=normal", "--skip-test-db")
        command = [
            shutil.which("mariadbd") or "mariadbd", *where, f"--port={port}", "--bind-address=127.0.0.1", f"--socket={folder}/sock",
            f"--pid-file={folder}/pid", "--innodb-flush-log-at-trx-commit=0", "--log-warnings=9",
        ]  # fmt: skip
        with running(command, port, folder):
            yield port, folder / "output"


def test_mariadb(mesh: Factory) -> None:
    with mariadb() as (port, output):
        address = f"127.0.0.1:{port}"
        check: Config = SLOW | {"type": "mysql"}
        config = simple(address, health_check=check)
        config["clusters"].append({"name": "root", "endpoints": [address], "health_check": check | {"user": "root"}})
        m = mesh(config)
        # There is no user l4mesh; root has no password.
        wait_health(m, address, "healthy")
        wait_health(m, address, "healthy", "root")

        def passed(cluster: str) -> float:
            return m.metrics()[f'l4mesh_health_check_total{{cluster="{cluster}",result="passed",type="mysql"}}']

        wait_until(lambda: passed("web") > 12 and passed("root") > 12, "many checks have passed")
        # A connection that leaves in the middle of logging in is an error to the server, and so is a session without a farewell.
        # (The one is the test's own, which looked whether the server listens.)
        assert output.read_text().count("Aborted connection") <= 1
        assert "Access denied for user 'l4mesh'" in output.read_text()
    wait_health(m, address, "unhealthy", why="connect: refused")


def test_openssl(mesh: Factory, web: Files, redis: Files, tmp_path: Path) -> None:
    def secured(port: int, *checks: tuple[str, Any]) -> Config:
        config = outbound(web, f"127.0.0.1:{port}")
        config["clusters"] = [
            {"name": name, "endpoints": [f"127.0.0.1:{port}"], "health_check": SLOW | {"type": "tls"}} | more for name, more in checks
        ]
        config["listeners"][0]["cluster"] = checks[0][0]
        return config

    mutual = ("mutual", {"tls": {"peers": [REDIS]}})
    with s_server(tmp_path / "good", redis, "-CAfile", str(redis.bundle)) as port:
        m = mesh(secured(port, mutual, ("stranger", {"tls": {"peers": ["*/other"]}}), ("open", {})))
        wait_health(m, f"127.0.0.1:{port}", "healthy", "mutual")
        # Without TLS of the cluster's: somebody who speaks it, whoever that is.
        wait_health(m, f"127.0.0.1:{port}", "healthy", "open")
        wait_health(m, f"127.0.0.1:{port}", "unhealthy", "stranger", f"tls: the other end is {REDIS}, which is not among the peers")
    with s_server(tmp_path / "old", redis, "-CAfile", str(redis.bundle), "-tls1_2") as port:
        m = mesh(secured(port, mutual, ("older", {"tls": {"peers": [REDIS], "min_version": "1.2"}})))
        assert wait_health(m, f"127.0.0.1:{port}", "unhealthy", "mutual")["why"].startswith("tls: ")
        wait_health(m, f"127.0.0.1:{port}", "healthy", "older")
    wait_health(m, f"127.0.0.1:{port}", "unhealthy", "older", why="connect: refused")
