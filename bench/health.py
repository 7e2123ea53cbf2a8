"""Health checks of many endpoints, and no traffic: CPU of the process that makes them. l4mesh beside HAProxy."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.backends import Backends
from bench.generator import Void
from bench.process import Place, Process
from bench.stage import Machine

ENTRIES = ("haproxy", "l4mesh")
CHECKS = ("tcp", "http")
ENDPOINTS = 5000
CLUSTERS = 50
INTERVAL_S = 2.0
SETTLED_S = 5.0
"""Until every endpoint has been checked at least twice."""
SECONDS = 6.0
SHARE_MADE_MIN = 0.9

HAPROXY = """
global
  maxconn 1000
  nbthread 1
defaults
  mode tcp
  timeout connect 1s
  timeout check 1s
  timeout client 1h
  timeout server 1h
"""


@dataclass(frozen=True, slots=True)
class Checked:
    """``core``: share of a core; ``check_us``: CPU of a check that was due."""

    entry: str
    check: str
    core: float
    check_us: float


def run_health(machine: Machine, proxies: Sequence[str], repeats: int) -> list[Checked]:
    """Raises Void when fewer checks were made than asked for."""
    entries = [entry for entry in ENTRIES if entry in proxies]
    backends = Backends(Place(machine.other_cpus), machine.ports, machine.folder)
    try:
        return [_measure(machine, backends, entry, check) for _ in range(repeats) for check in CHECKS for entry in entries]
    finally:
        backends.stop()


def summarize_health(rounds: Sequence[Checked]) -> dict[str, Any]:
    """Medians, by check and entry."""
    keys = dict.fromkeys((one.check, one.entry) for one in rounds)
    return {
        "entries": [
            {"check": check, "entry": entry}
            | {
                name: statistics.median(getattr(one, name) for one in rounds if (one.check, one.entry) == (check, entry))
                for name in ("core", "check_us")
            }
            for check, entry in keys
        ]
    }


def _measure(machine: Machine, backends: Backends, entry: str, check: str) -> Checked:
    port = backends.port("http" if check == "http" else "echo")
    addresses = [f"127.{80 + i // 62500}.{i // 250 % 250}.{1 + i % 250}:{port}" for i in range(ENDPOINTS)]
    folder = machine.folder / f"health-{entry}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    listen = machine.ports.take()
    command = {"l4mesh": _l4mesh, "haproxy": _haproxy}[entry](folder, listen, addresses, check)
    process = Process(entry, Place((machine.proxy_cpu,)), command, folder / "output.log")
    try:
        process.wait_until_listening([listen])
        time.sleep(SETTLED_S)
        opened, started, used = _connects(), time.monotonic(), process.cpu_s()
        time.sleep(SECONDS)
        used, seconds, opened = process.cpu_s() - used, time.monotonic() - started, _connects() - opened
    finally:
        process.stop()
    due = ENDPOINTS / INTERVAL_S * seconds
    if opened < SHARE_MADE_MIN * due:
        raise Void(f"{entry}: at most {opened} checks in {seconds:.1f} s")
    return Checked(entry, check, used / seconds, used / due * 1e6)


def _connects() -> int:
    """Connections that programs of this machine have begun so far."""
    names, values = (line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:"))
    return int(values[names.index("ActiveOpens")])


def _l4mesh(folder: Path, listen: int, addresses: Sequence[str], check: str) -> list[str]:
    config = {
        "workers": 1,
        "admin": {"bind": "off"},
        "listeners": [{"name": "l", "bind": f"127.0.0.1:{listen}", "cluster": "c0"}],
        "clusters": [
            {"name": f"c{i}", "endpoints": addresses[i::CLUSTERS], "health_check": {"type": check, "interval": f"{INTERVAL_S:g}s"}}
            for i in range(CLUSTERS)
        ],
    }
    file = folder / "l4mesh.yaml"
    file.write_text(json.dumps(config))
    return [sys.executable, "-m", "l4mesh", "run", "-c", str(file)]


def _haproxy(folder: Path, listen: int, addresses: Sequence[str], check: str) -> list[str]:
    text = HAPROXY
    for i in range(CLUSTERS):
        text += f"backend c{i}\n" + ("  option httpchk GET /\n" if check == "http" else "")
        text += "".join(f"  server s{n} {address} check inter {INTERVAL_S:g}s\n" for n, address in enumerate(addresses[i::CLUSTERS]))
    text += f"frontend l\n  bind 127.0.0.1:{listen}\n  default_backend c0\n"
    file = folder / "haproxy.cfg"
    file.write_text(text)
    return ["haproxy", "-db", "-f", str(file)]
