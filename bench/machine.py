"""What a figure depends on: the machine, the kernel's settings, versions, the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.generator import ROOT
from bench.proxies import KINDS, SPLICED

SETTINGS = (
    "net/ipv4/tcp_congestion_control",
    "net/ipv4/tcp_rmem",
    "net/ipv4/tcp_wmem",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/tcp_tw_reuse",
    "net/core/somaxconn",
    "net/ipv4/tcp_migrate_req",
    "fs/pipe-max-size",
    "fs/pipe-user-pages-soft",
)
TOOLS = {"wrk": ("wrk", "-v"), "iperf3": ("iperf3", "--version"), "redis": ("redis-benchmark", "--version")}


def describe_machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    vulnerabilities = Path("/sys/devices/system/cpu/vulnerabilities")
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "hypervisor": " hypervisor " in cpuinfo,
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "mitigations": {path.name: text for path in sorted(vulnerabilities.glob("*")) if (text := _text(path)) != "Not affected"},
        "settings": {name.replace("/", "."): _text(Path("/proc/sys") / name) for name in SETTINGS},
        "load_average": os.getloadavg()[0],
    }


def describe_versions(proxies: Iterable[str]) -> dict[str, str]:
    versions = {name: KINDS[name].version() for name in proxies if name in KINDS and name not in SPLICED}
    for name, command in TOOLS.items():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"\d+\.\d+[.\d]*", done.stdout + done.stderr)
        versions[name] = found[0] if found else "unknown"
    return versions | {"python": platform.python_version()}


def describe_commit() -> dict[str, Any]:
    """The commit, and whether what is measured differs from it."""
    changed = _git("status", "--porcelain", "--", "l4mesh", "bench", "setup.py", ":!bench/results")
    return {"commit": _git("rev-parse", "--short", "HEAD") or "unknown", "modified": bool(changed)}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _text(path: Path) -> str:
    try:
        return " ".join(path.read_text().split())
    except OSError:
        return "unknown"
