"""Real servers with their own clients and benchmarks, through l4mesh, byte for byte."""

import hashlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import Factory, skip_or_fail
from tests.support.certificates import Files
from tests.support.mesh import simple
from tests.support.peers import make_bytes
from tests.support.proxies import accepts, free_port
from tests.support.waiting import wait_until


def need(*tools: str) -> None:
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        skip_or_fail(f"needs {', '.join(missing)}")


def run(*command: str, stdin: bytes | None = None) -> bytes:
    done = subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def running(command: list[str], port: int, folder: Path) -> Iterator[None]:
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_until(lambda: accepts(port), f"{command[0]} listens", 30)
        yield
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def nginx(folder: Path) -> Iterator[int]:
    """Serves the folder on the port that it gives."""
    folder.chmod(0o755)
    port = free_port()
    (folder / "conf").write_text(
        f"daemon off; user root; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};\n"
        f"server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
    )
    with running(["nginx", "-e", str(folder / "error.log"), "-c", str(folder / "conf")], port, folder):
        yield port


def test_nginx_with_curl_and_wrk(mesh: Factory, tmp_path: Path) -> None:
    need("nginx", "curl", "wrk")
    data = make_bytes(20_000_000, 1)
    (tmp_path / "big.bin").write_bytes(data)
    with nginx(tmp_path) as port:
        m = mesh(simple(f"127.0.0.1:{port}"))
        url = f"http://127.0.0.1:{m.port()}/big.bin"
        assert hashlib.sha256(run("curl", "-s", url)).digest() == hashlib.sha256(data).digest()
        parts = [run("curl", "-s", "-r", f"{at}-{at + 999_999}", url) for at in range(0, 5_000_000, 1_000_000)]
        assert b"".join(parts) == data[:5_000_000]
        shown = run("wrk", "-t1", "-c20", "-d1", "-H", "Range: bytes=0-99", url).decode()
        assert "requests in" in shown
        assert "Socket errors" not in shown
        assert "Non-2xx" not in shown


def test_redis_with_its_client_and_benchmark(mesh: Factory, tmp_path: Path) -> None:
    need("redis-server", "redis-cli", "redis-benchmark")
    port = free_port()
    server = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with running(server, port, tmp_path):
        m = mesh(simple(f"127.0.0.1:{port}"))
        ours = str(m.port())
        value = make_bytes(10_000_000, 2)
        assert run("redis-cli", "-p", ours, "-x", "SET", "big", stdin=value) == b"OK\n"
        assert run("redis-cli", "-p", ours, "--raw", "GET", "big") == value + b"\n"
        shown = run("redis-benchmark", "-p", ours, "-n", "5000", "-c", "20", "-P", "4", "-t", "set,get,lpush", "-q").decode()
        assert shown.count("requests per second") == 3
        assert run("redis-cli", "-p", ours, "DBSIZE").strip().isdigit()


@contextmanager
def postgresql(tls: Files | None = None) -> Iterator[tuple[Path, int]]:
    """A server with a database of its own, which offers TLS if it has the files: the folder of its tools, and its port."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found or not (found[-1] / "initdb").exists():
        skip_or_fail("needs PostgreSQL")
    tools = found[-1]
    # PostgreSQL refuses to run as root; and what pytest makes for root, nobody else may enter.
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), Path(name) / "data"
        data.mkdir()
        options = ["-k", name, "-F"]
        if tls:
            for setting, file in (("ssl_cert_file", tls.certificate), ("ssl_key_file", tls.key)):
                options += ["-c", f"{setting}={shutil.copy(file, folder)}"]
            options += ["-c", "ssl=on"]
        as_user: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            for path in (folder, *folder.iterdir()):
                os.chown(path, user.pw_uid, user.pw_gid)
            as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        run(*as_user, str(tools / "initdb"), "-D", str(data), "-A", "trust", "-U", "mesh", "-N", "--locale=C", "-E", "UTF8")
        port = free_port()
        server = [*as_user, str(tools / "postgres"), "-D", str(data), "-p", str(port), "-h", "127.0.0.1", *options]
        with running(server, port, folder):
            yield tools, port


def test_postgresql_with_psql_and_pgbench(mesh: Factory) -> None:
    with postgresql() as (tools, port):
        m = mesh(simple(f"127.0.0.1:{port}"))
        where = ["-h", "127.0.0.1", "-p", str(m.port()), "-U", "mesh"]
        psql = [str(tools / "psql"), *where, "-d", "postgres", "-At", "-c"]
        length = 3_000_000
        shown = run(*psql, f"SELECT md5(string_agg(md5(i::text), '')) FROM generate_series(1, {length // 32}) i").strip()
        text = run(*psql, f"SELECT string_agg(md5(i::text), '') FROM generate_series(1, {length // 32}) i").strip()
        assert hashlib.md5(text).hexdigest().encode() == shown
        run(str(tools / "pgbench"), *where, "-i", "-q", "-s", "1", "postgres")
        done = run(str(tools / "pgbench"), *where, "-c", "4", "-t", "50", "-n", "postgres").decode()
        assert "number of failed transactions: 0" in done
        again = run(str(tools / "pgbench"), *where, "-c", "4", "-t", "10", "-n", "-C", "-S", "postgres").decode()
        assert "number of failed transactions: 0" in again
