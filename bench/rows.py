"""What is measured. A row gives one figure for each proxy; a table tells how figures depend on something."""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.proxies import NAMES, Proxy, free_port, run_proxy

LOOPBACK = 0x7F000001
SOURCES = 0x7F000101
PROXY_CPU, LOAD_CPU = {0}, {1}
ALL_CPUS = os.sched_getaffinity(0)
CAPTURED_PORT = 7

_load: ModuleType | None = None
_scale = 1.0


def prepare(scale: float) -> None:
    """Compiles the load generator. ``scale``: of all durations and counts."""
    global _load, _scale
    _scale = scale
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cache = Path(".cache/bench")
    cache.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("load.pyx")
    built = cache / f"load{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not built.exists() or built.stat().st_mtime < source.stat().st_mtime:
        c_file = cache / "load.c"
        subprocess.run([sys.executable, "-m", "cython", "-3", str(source), "-o", str(c_file)], check=True)
        include = sysconfig.get_path("include")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", f"-I{include}", str(c_file), "-o", str(built)], check=True)
    spec = importlib.util.spec_from_file_location("load", built)
    assert spec
    assert spec.loader
    _load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(_load)


def load() -> Any:
    assert _load is not None
    return _load


def _serve_echo(port: int, ready: Any) -> None:
    os.sched_setaffinity(0, LOAD_CPU if len(ALL_CPUS) > 1 else ALL_CPUS)
    load().echo(port, ready.send)


@contextlib.contextmanager
def echo_server() -> Iterator[int]:
    port = free_port()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve_echo, args=(port, there), daemon=True)
    process.start()
    here.recv()
    try:
        yield port
    finally:
        process.terminate()
        process.join()


@contextlib.contextmanager
def iperf_server() -> Iterator[int]:
    port = free_port()
    process = subprocess.Popen(["iperf3", "-s", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.3)
        yield port
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True)
class Row:
    title: str
    unit: str
    must: str
    limit: float
    more_is_better: bool
    run: Callable[[Path, list[str]], dict[str, float]]


def check(errors: int, what: str) -> None:
    if errors:
        raise SystemExit(f"bench: {errors} errors in {what}: the round is void")


def request_cost(port: int, proxy: Proxy) -> float:
    before = proxy.cpu_s()
    done, errors = load().conversations(LOOPBACK, port, 16, 2.0 * _scale)
    check(errors, f"requests through {proxy.name}")
    return (proxy.cpu_s() - before) / done * 1e6


def connect_cost(port: int, proxy: Proxy, count: int = 25_000) -> float:
    before = proxy.cpu_s()
    done, errors = load().connects(LOOPBACK, port, 16, int(count * _scale), SOURCES)
    check(errors + int(count * _scale) - done, f"connections through {proxy.name}")
    return (proxy.cpu_s() - before) / done * 1e6


def _with_echo(cost: Callable[[int, Proxy], float]) -> Callable[[Path, list[str]], dict[str, float]]:
    def run(folder: Path, names: list[str]) -> dict[str, float]:
        result = {}
        os.sched_setaffinity(0, LOAD_CPU)
        with echo_server() as endpoint:
            for name in names:
                with run_proxy(name, folder, endpoint) as proxy:
                    proxy.pin(PROXY_CPU)
                    result[name] = cost(proxy.port, proxy)
        os.sched_setaffinity(0, ALL_CPUS)
        return result

    return run


def _transparent(cost: Callable[[int, Proxy], float]) -> Callable[[Path, list[str]], dict[str, float]]:
    """Everyone behind the same REDIRECT rule in a network namespace. Only l4mesh asks for the original destination."""

    def run(folder: Path, names: list[str]) -> dict[str, float]:
        code = f"from bench import rows; import json; rows.prepare({_scale}); print(json.dumps(rows.run_captured({cost.__name__!r}, {names!r}, {str(folder)!r})))"
        # The rules apply to this namespace alone, which is gone with its last process.
        done = subprocess.run(["unshare", "--net", sys.executable, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"bench: the captured row failed: {done.stderr[-800:]}")
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result

    return run


def run_captured(cost_name: str, names: list[str], folder: str) -> dict[str, float]:
    """Inside the namespace. The client dials a port that no proxy is bound to; REDIRECT brings it to the proxy."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    cost: Callable[[int, Proxy], float] = {"request_cost": request_cost, "connect_cost": connect_cost}[cost_name]
    result = {}
    os.sched_setaffinity(0, LOAD_CPU)
    with echo_server() as endpoint:
        for name in names:
            with run_proxy(name, Path(folder), endpoint, bind="0.0.0.0", more=", capture: redirect") as proxy:
                proxy.pin(PROXY_CPU)
                rule = ["-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", str(CAPTURED_PORT)]
                subprocess.run(["iptables", "-t", "nat", "-F"], check=True)
                subprocess.run(["iptables", *rule, "-j", "REDIRECT", "--to-ports", str(proxy.port)], check=True)
                result[name] = cost(CAPTURED_PORT, proxy)
    return result


def _iperf(port: int, streams: int, seconds: float, reverse: bool) -> tuple[float, float]:
    """Gbit/s and bytes that arrived."""
    command = ["iperf3", "-c", "127.0.0.1", "-p", str(port), "-P", str(streams), "-t", str(max(1, round(seconds))), "-J"]
    done = subprocess.run(command + (["-R"] if reverse else []), capture_output=True, text=True, check=False)
    end = json.loads(done.stdout)["end"]
    sent, received = end["sum_sent"]["bytes"], end["sum_received"]["bytes"]
    check(int(received < 0.9 * sent), "iperf3's byte counts")
    return end["sum_received"]["bits_per_second"] / 1e9, float(received)


def bulk_cost(folder: Path, names: list[str]) -> dict[str, float]:
    result = {}
    os.sched_setaffinity(0, LOAD_CPU)
    with iperf_server() as endpoint:
        for name in names:
            with run_proxy(name, folder, endpoint, haproxy_splice=True) as proxy:
                proxy.pin(PROXY_CPU)
                before, moved = proxy.cpu_s(), 0.0
                for reverse in (False, True):
                    moved += _iperf(proxy.port, 1, 2 * _scale, reverse)[1]
                result[name] = (proxy.cpu_s() - before) / (moved / 1e9)
    os.sched_setaffinity(0, ALL_CPUS)
    return result


def bulk_rate(folder: Path, names: list[str]) -> dict[str, float]:
    with iperf_server() as endpoint:
        result = {"direct": _iperf(endpoint, 8, 2 * _scale, False)[0]}
        for name in names:
            with run_proxy(name, folder, endpoint, haproxy_splice=True) as proxy:
                result[name] = _iperf(proxy.port, 8, 2 * _scale, False)[0]
    return result


def idle_memory(folder: Path, names: list[str]) -> dict[str, float]:
    result = {}
    count = 5000
    with echo_server() as endpoint:
        for name in names:
            with run_proxy(name, folder, endpoint) as proxy:
                # What is allocated once, whatever the number of connections, is there before.
                first = load().hold(LOOPBACK, proxy.port, 64, SOURCES)
                before = proxy.memory_kb()
                held = load().hold(LOOPBACK, proxy.port, count, SOURCES)
                check(count - len(held), f"idle connections through {name}")
                result[name] = (proxy.memory_kb() - before) * 1024 / count
                for fd in first + held:
                    os.close(fd)
    return result


ROWS = [
    Row("keep-alive request, 64 B", "µs of CPU", "≤ best peer", 1.0, False, _with_echo(request_cost)),
    Row("connect, request, close", "µs of CPU", "≤ best peer", 1.0, False, _with_echo(connect_cost)),
    Row("bulk, 1 stream", "CPU s/GB", "≤ 0.6 × best peer", 0.6, False, bulk_cost),
    Row("bulk, 8 streams", "Gbit/s", "≥ 1.4 × best peer", 1.4, True, bulk_rate),
    Row("idle connection", "bytes of user memory", "≤ 1024 B", 1024, False, idle_memory),
    Row("keep-alive request, 64 B, captured by REDIRECT", "µs of CPU", "≤ best peer", 1.0, False, _transparent(request_cost)),
    Row("connect, request, close, captured by REDIRECT", "µs of CPU", "≤ best peer", 1.0, False, _transparent(connect_cost)),
]


def _percentile(values: list[int], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] / 1000


def latency_table(folder: Path, names: list[str]) -> dict[str, Any]:
    lines = []
    for rate in (2000, 10_000):
        with echo_server() as endpoint:
            os.sched_setaffinity(0, LOAD_CPU)
            for name in ["direct", *(name for name in names if name != "l4mesh again")]:
                with contextlib.ExitStack() as stack:
                    port = endpoint
                    if name != "direct":
                        proxy = stack.enter_context(run_proxy(name, folder, endpoint))
                        proxy.pin(PROXY_CPU)
                        port = proxy.port
                    values, lost = load().fixed_rate(LOOPBACK, port, 50, rate, 4 * _scale)
                    check(lost, f"messages at a fixed rate through {name}")
                    lines.append([rate, name, *(f"{_percentile(values, share):.0f}" for share in (0.5, 0.99, 0.999))])
            os.sched_setaffinity(0, ALL_CPUS)
    return {"title": "Latency at a fixed rate, µs from the set time, 64 B over 50 connections", "columns": ["messages/s", "through", "p50", "p99", "p99.9"], "lines": lines}


def scaling_table(folder: Path, names: list[str]) -> dict[str, Any]:
    lines = []
    with echo_server() as endpoint:
        for workers in (1, 2):
            with run_proxy("l4mesh", folder, endpoint, workers=workers) as proxy:
                lines.append([f"{workers} workers", f"{connect_cost(proxy.port, proxy, 10_000):.1f}", f"{request_cost(proxy.port, proxy):.2f}"])
        for idle in (0, 1000, 5000):
            with run_proxy("l4mesh", folder, endpoint) as proxy:
                held = load().hold(LOOPBACK, proxy.port, idle, SOURCES)
                lines.append([f"beside {idle} idle connections", f"{connect_cost(proxy.port, proxy, 10_000):.1f}", f"{request_cost(proxy.port, proxy):.2f}"])
                for fd in held:
                    os.close(fd)
        for count in (1, 10, 1000, 10_000):
            endpoints = ", ".join(f'"127.{1 + i // 62500}.{i // 250 % 250}.{1 + i % 250}:{endpoint}"' for i in range(count))
            with run_proxy("l4mesh", folder, endpoint, endpoints=endpoints) as proxy:
                lines.append([f"{count} endpoints", f"{connect_cost(proxy.port, proxy, 10_000):.1f}", f"{request_cost(proxy.port, proxy):.2f}"])
    return {"title": "How l4mesh's cost grows, µs of CPU", "columns": ["with", "connection", "request"], "lines": lines}


def reload_table(folder: Path, names: list[str]) -> dict[str, Any]:
    lines = []
    with echo_server() as endpoint, run_proxy("l4mesh", folder, endpoint) as proxy:
        where = folder / "l4mesh" / "conf.yaml"
        text = where.read_text()
        many = "".join(
            f"  - {{name: n{number}, endpoints: [{', '.join(f'10.{number >> 8}.{number & 255}.{e + 1}:80' for e in range(10))}]}}\n"
            for number in range(5000)
        )

        def while_(change: Callable[[], None]) -> list[str]:
            before = proxy.cpu_s()
            change()
            values, lost = load().fixed_rate(LOOPBACK, proxy.port, 50, 2000, 4.0)
            check(lost, "messages during a reload")
            return [f"{proxy.cpu_s() - before:.2f}", f"{_percentile(values, 0.5):.0f}", f"{_percentile(values, 0.99):.0f}"]

        def put(new: str) -> None:
            temporary = where.with_suffix(".new")
            temporary.write_text(new)
            temporary.rename(where)

        for what, change in (
            ("nothing else", lambda: None),
            ("loading 5,000 clusters with 50,000 endpoints", lambda: put(text + many)),
            ("nothing else, with those", lambda: None),
            ("changing one endpoint, all in one file", lambda: put(text + many.replace("10.0.7.1:80", "10.0.7.99:80"))),
        ):
            lines.append([what, *while_(change)])
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(folder / "l4mesh" / "admin.sock"))
            admin.sendall(b"GET /status HTTP/1.0\r\n\r\n")
            answer = b""
            while part := admin.recv(65536):
                answer += part
        generation = json.loads(answer.partition(b"\r\n\r\n")[2])["generation"]
        check(int(generation < 3), "reloads: a change was not taken up")
    return {"title": "Reload beside 2,000 messages/s for 4 s", "columns": ["during", "CPU s in all", "p50 µs", "p99 µs"], "lines": lines}


def real_loads_table(folder: Path, names: list[str]) -> dict[str, Any]:
    """wrk against nginx and redis-benchmark against Redis, through each proxy: µs of the proxy's CPU a request."""
    lines = []
    web, redis = free_port(), free_port()
    conf = folder / "web.conf"
    conf.write_text(
        f"daemon off; worker_processes 1; pid {folder}/web.pid; error_log {folder}/web.log; events {{ worker_connections 1000; }}\n"
        f"http {{ access_log off; server {{ listen 127.0.0.1:{web}; keepalive_requests 1000000; location / {{ return 200 hello; }} }} }}\n"
    )
    servers = [
        subprocess.Popen(["nginx", "-e", f"{folder}/web.log", "-c", str(conf)]),
        subprocess.Popen(["redis-server", "--port", str(redis), "--save", "", "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL),
    ]
    try:
        time.sleep(0.5)
        for name in [name for name in NAMES if name in names and name != "l4mesh again"]:
            costs = []
            for port, command in (
                (web, ["wrk", "-t1", "-c32", "-d2", "http://127.0.0.1:{}/"]),
                (web, ["wrk", "-t1", "-c32", "-d2", "-H", "Connection: close", "http://127.0.0.1:{}/"]),
                (redis, ["redis-benchmark", "-p", "{}", "-n", "100000", "-c", "50", "-t", "get", "-q"]),
            ):
                with run_proxy(name, folder, port) as proxy:
                    before = proxy.cpu_s()
                    done = subprocess.run([word.format(proxy.port) for word in command], capture_output=True, text=True, check=True)
                    count = 100_000 if "redis-benchmark" in command else int(done.stdout.split(" requests in")[0].split()[-1])
                    costs.append(f"{(proxy.cpu_s() - before) / count * 1e6:.1f}")
            lines.append([name, *costs])
    finally:
        for server in servers:
            server.terminate()
            server.wait()
    return {"title": "Real loads, µs of the proxy's CPU a request", "columns": ["through", "wrk, keep-alive", "wrk, a connection each", "redis-benchmark GET"], "lines": lines}


TABLES = [latency_table, real_loads_table, scaling_table, reload_table]
