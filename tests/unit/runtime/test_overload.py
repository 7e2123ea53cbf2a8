"""Decisions about overload, told the time; and what the control groups say."""

import os
import socket
from pathlib import Path

import pytest

from l4mesh.config.load import parse_config
from l4mesh.model import Config
from l4mesh.runtime.app import usable_cpus
from l4mesh.runtime.overload import COUNT_ONLY, MemoryGauge, Orders, OverloadMonitor, Shedder, fair_share, next_level
from l4mesh.snapshot import ShedSnapshot

MIB = 1 << 20


def test_levels_rise_and_fall_with_a_gap() -> None:
    level, seen = 0, []
    for percent in (84, 85, 82, 81, 79, 92, 93, 97, 95, 91, 88, 87, 81, 80, 79, 100):
        level = next_level(level, percent / 100, 0.85)
        seen.append(level)
    assert seen == [0, 1, 1, 1, 0, 1, 2, 3, 3, 2, 2, 1, 1, 1, 0, 3]


@pytest.mark.parametrize("first", [0.05, 0.5, 0.85, 0.99, 1.0])
def test_all_of_it_is_the_last_step_and_nothing_is_none(first: float) -> None:
    assert next_level(0, 1.0, first) == 3
    for level in range(4):
        assert next_level(level, 0.0, first) == 0


CASES = [
    ([], COUNT_ONLY, "nobody"),
    ([(100, 1)], COUNT_ONLY, "one alone is not worse than the others"),
    ([(50, 2)], COUNT_ONLY, "equals"),
    ([(40, 1), (60, 1)], COUNT_ONLY, "much alike"),
    ([(10, 1), (10_000, 1)], 7998, "one of two"),
    ([(1, 5), (88, 1)], 69, "one of six"),
    ([(10, 100), (5000, 1), (6000, 1)], 4300, "the two largest, down to the same"),
    ([(1, 1000), (2, 1)], COUNT_ONLY, "twice the median is not much"),
    ([(1, 1000), (3, 1)], 2, "more than twice"),
]


@pytest.mark.parametrize(("sources", "share", "why"), CASES, ids=[why for _, _, why in CASES])
def test_the_fair_share_cuts_the_largest_back(sources: list[tuple[int, int]], share: int, why: str) -> None:
    assert fair_share(sources) == share


class Stage:
    """A shedder and its clock."""

    def __init__(self) -> None:
        self.shedder = Shedder()
        self.now_s = 100.0
        self.sources: list[tuple[int, int]] | None = [(1, 5), (88, 1)]

    def decide(self, after_s: float = 0.25, rate: float = 400.0, **levels: int) -> Orders:
        self.now_s += after_s
        return self.shedder.decide(self.now_s, levels, 3_600_000, 10_000, rate, lambda: self.sources)


def test_the_idle_time_is_halved_every_second_down_to_the_least() -> None:
    stage = Stage()
    caps = [stage.decide(memory=1) for _ in range(8)]
    assert [orders.idle_cap_ms for orders in caps] == [1_800_000] * 4 + [900_000] * 4
    assert [orders.sweep for orders in caps] == [True, False, False, False] * 2
    for _ in range(20):
        last = stage.decide(1.0, memory=1)
    assert last == Orders(10_000, COUNT_ONLY, 0, sweep=True)
    assert stage.decide(memory=0) == Orders()
    assert stage.decide(1.0, memory=1).idle_cap_ms == 1_800_000


def test_the_second_step_waits_until_all_sources_are_counted() -> None:
    stage = Stage()
    stage.sources = None
    assert stage.decide(descriptors=2).source_share == COUNT_ONLY
    stage.sources = [(1, 5), (88, 1)]
    assert stage.decide(descriptors=2).source_share == 69
    stage.sources = None
    assert stage.decide(descriptors=2).source_share == 69, "while they are counted anew"
    assert stage.decide(descriptors=1).source_share == COUNT_ONLY


def test_the_third_step_halves_the_rate_of_accepting() -> None:
    stage = Stage()
    assert [stage.decide(1.0, connections=3).accepts_per_s for _ in range(7)] == [200, 100, 50, 25, 12, 10, 10]
    assert stage.decide(connections=2).accepts_per_s == 0


@pytest.mark.parametrize("name", ["cpu", "accept_queue"])
def test_what_idle_connections_do_not_use_ends_none(name: str) -> None:
    stage = Stage()
    orders = stage.decide(**{name: 3})
    assert orders.idle_cap_ms == 0
    assert orders.source_share == 69
    assert bool(orders.accepts_per_s) == (name == "cpu"), "to accept fewer only fills the queue"


class Datapath:
    """What a monitor is told, and what it orders."""

    def __init__(self) -> None:
        self.active, self.max_connections, self.accepted = 0, 100, 0
        self.orders: list[tuple[int, int, int, bool]] = []

    def shed(self, *orders: int) -> None:
        self.orders.append(orders)  # type: ignore[arg-type]

    def read_shed(self) -> ShedSnapshot:
        return ShedSnapshot(accepted=self.accepted)

    def measure_sources(self) -> list[tuple[int, int]]:
        return [(1, 5), (88, 1)]


def configured(text: str) -> Config:
    return parse_config(
        f"listeners: [{{name: a, bind: '127.0.0.1:80', cluster: a}}]\nclusters: [{{name: a, endpoints: ['127.0.0.1:81']}}]\noverload: {text}\n"
    )


def test_a_monitor_orders_when_it_has_to_and_calls_it_off() -> None:
    datapath, now_s = Datapath(), [10.0]
    monitor = OverloadMonitor(datapath, list, 1, lambda: now_s[0])
    config = configured("{descriptors: off, memory: off}")

    def look(active: int) -> int:
        datapath.active = active
        now_s[0] += 0.25
        monitor.look(config)
        return monitor.status.level

    assert [look(active) for active in (0, 84, 85, 93, 98, 98, 70, 70)] == [0, 0, 1, 2, 3, 3, 0, 0]
    assert datapath.orders[1] == (0, 0, 0, False)
    assert datapath.orders[3][:3] == (1_800_000, 69, 0)
    assert datapath.orders[4][:3] == (1_800_000, 69, 10)
    assert datapath.orders[-1] == (0, 0, 0, False)
    assert [one.name for one in monitor.status.resources] == ["connections"]


def test_off_looks_at_nothing() -> None:
    datapath = Datapath()
    monitor = OverloadMonitor(datapath, list, 1)
    datapath.active = 100
    monitor.look(configured("off"))
    assert monitor.status.resources == ()
    assert datapath.orders == []


def test_a_listening_socket_that_a_reload_closes_meanwhile_is_left_out() -> None:
    kept, closed = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    with kept:
        closed.close()
        monitor = OverloadMonitor(Datapath(), lambda: [closed, kept], 1)
        monitor.look(configured("{accept_queue: 50%}"))
        assert {one.name: one.level for one in monitor.status.resources}["accept_queue"] == 0


# -- memory ------------------------------------------------------------------------------------------------------------------


def machine(root: Path, groups: str, files: dict[str, str], total_mib: int = 8192, resident_mib: int = 100) -> MemoryGauge:
    pages = resident_mib * MIB // os.sysconf("SC_PAGE_SIZE")
    files = {
        "proc/meminfo": f"MemTotal: {total_mib * 1024} kB\n",
        "proc/self/statm": f"1 {pages} 3",
        "proc/self/cgroup": groups,
    } | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return MemoryGauge(root)


def group(path: str, used_mib: int, most: str, inactive_mib: int = 0) -> dict[str, str]:
    return {
        f"sys/fs/cgroup{path}/memory.current": f"{used_mib * MIB}\n",
        f"sys/fs/cgroup{path}/memory.max": f"{most}\n",
        f"sys/fs/cgroup{path}/memory.stat": f"anon 5\ninactive_file {inactive_mib * MIB}\n",
    }


def test_the_tightest_control_group_counts_without_what_can_be_given_back(tmp_path: Path) -> None:
    files = group("/pods", 900, str(1000 * MIB)) | group("/pods/a", 300, str(400 * MIB), 100) | group("", 5000, "max")
    reading = machine(tmp_path, "0::/pods/a\n", files).read(0, 0)
    assert (reading.used, reading.limit) == (900 * MIB, 1000 * MIB)
    (tmp_path / "sys/fs/cgroup/pods/memory.current").write_text(str(100 * MIB))
    gauge = MemoryGauge(tmp_path)
    assert gauge.read(0, 0).pressure == 0.5
    assert gauge.read(200 * MIB, 20 * MIB).pressure == 0.4, "a limit of our own is of the resident set"


def test_a_container_sees_its_own_group_at_the_mount(tmp_path: Path) -> None:
    reading = machine(tmp_path, "0::/../../kubepods/x\n", group("", 80, str(100 * MIB))).read(0, 0)
    assert reading.pressure == 0.8


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/x/memory.usage_in_bytes": str(90 * MIB),
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(100 * MIB),
        "sys/fs/cgroup/memory/x/memory.stat": f"total_inactive_file {10 * MIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(90 * MIB),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
    }
    assert machine(tmp_path, "9:name=systemd:/\n4:memory:/x\n0::/\n", files).read(0, 0).pressure == 0.8


def test_without_a_limit_it_is_the_machine(tmp_path: Path) -> None:
    reading = machine(tmp_path, "0::/\n", group("", 80, "max"), total_mib=1000).read(0, 0)
    assert (reading.used, reading.limit) == (100 * MIB, 1000 * MIB)
    assert machine(tmp_path / "none", "", {}, total_mib=1000).read(0, 0).pressure == 0.1


def test_without_a_descriptor_memory_is_what_it_was(tmp_path: Path) -> None:
    gauge = machine(tmp_path, "", {}, resident_mib=100)
    before = gauge.read(0, 0)
    (tmp_path / "proc/self/statm").unlink()
    assert gauge.read(0, 0) == before


def test_the_least_quota_of_the_groups_counts_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    machine(tmp_path, "0::/system.slice/l4mesh.service\n", {"sys/fs/cgroup/system.slice/l4mesh.service/cpu.max": "250000 100000\n"})
    assert usable_cpus(tmp_path) == 3
    (tmp_path / "sys/fs/cgroup/system.slice/cpu.max").write_text("100000 100000\n")
    assert usable_cpus(tmp_path) == 1
    (tmp_path / "proc/self/cgroup").write_text("0::/other\n")
    assert usable_cpus(tmp_path) == 8
