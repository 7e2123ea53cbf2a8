"""A stage: the backends and one proxy of each kind, up and ready for load."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from bench.backends import Backends
from bench.generator import Load, Target
from bench.process import ALL_CPUS, Place, Ports
from bench.proxies import KINDS, Proxy, Service, start_process
from bench.rounds import AGAIN, Sample

DIRECT = "direct"
PEERS = ("haproxy", "haproxy-splice", "nginx", "envoy")
N_SOURCES = 250


def kind_of(entry: str) -> str:
    return "l4mesh" if entry == AGAIN else entry


@dataclass(frozen=True, slots=True)
class Machine:
    """How the CPUs are shared out, and where files go."""

    folder: Path
    proxy_cpu: int
    other_cpus: tuple[int, ...]
    ports: Ports = field(default_factory=Ports)


def share_cpus(folder: Path) -> Machine:
    """The first usable CPU is the proxies', the next two everything else's. Raises RuntimeError with one CPU only."""
    cpus = sorted(ALL_CPUS)
    if len(cpus) < 2:
        raise RuntimeError("two CPUs are needed: one for the proxy, one for load and backend")
    return Machine(folder, cpus[0], tuple(cpus[1:3]))


class Stage:
    """A context: starts what is needed, stops it all.

    ``pinned``: the proxies have their CPU and everything else another; or all go where the kernel puts them.
    ``endpoints``: loopback addresses for each service, all of the same backend. ``netns`` with ``destinations`` (one an
    entry): transparent mode.
    """

    def __init__(
        self,
        machine: Machine,
        entries: Sequence[str],
        services: Sequence[str] = ("echo",),
        *,
        pinned: bool = True,
        workers: int = 1,
        endpoints: int = 1,
        netns: str = "",
        destinations: dict[str, str] | None = None,
    ) -> None:
        self.load_place = Place(machine.other_cpus if pinned else (), netns)
        self._proxy_place = Place((machine.proxy_cpu,) if pinned else (), netns)
        self._machine = machine
        self.entries = entries
        self._service_names = services
        self._workers = workers
        self._endpoints = endpoints
        self.destinations = destinations or {}
        self.proxies: dict[str, Proxy] = {}
        self.backends = Backends(self.load_place, machine.ports, machine.folder)

    def __enter__(self) -> Stage:
        try:
            for entry in self.entries:
                if entry != DIRECT:
                    self.start(entry)
                else:
                    self._start_backends()
        except BaseException:
            self.close()
            raise
        return self

    def _start_backends(self) -> None:
        for name in self._service_names:
            self.backends.port(name)

    def _services(self, entry: str) -> list[Service]:
        """What the entry's proxy does. Each has endpoint addresses of its own, so that none uses up another's ports."""
        number = self.entries.index(entry)
        return [
            Service(
                name,
                self._machine.ports.take(),
                tuple((f"127.{64 + number}.{1 + i // 250}.{1 + i % 250}", self.backends.port(name)) for i in range(self._endpoints)),
                self.destinations.get(entry, ""),
            )
            for name in self._service_names
        ]

    def start(self, entry: str) -> Proxy:
        folder = self._fresh_folder(entry)
        services = self._services(entry)
        process = start_process(KINDS[kind_of(entry)], entry, services, self._proxy_place, folder, self._workers)
        return self._add(Proxy(entry, process, {service.name: service for service in services}, folder))

    def _fresh_folder(self, entry: str) -> Path:
        folder = self._machine.folder / entry
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _add(self, proxy: Proxy) -> Proxy:
        self.proxies[proxy.name] = proxy
        return proxy

    def close(self) -> None:
        for proxy in self.proxies.values():
            proxy.process.stop()
        self.proxies.clear()
        self.backends.stop()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def target(self, entry: str, service: str = "echo") -> Target:
        if entry == DIRECT:
            return Target("127.127.0.1", self.backends.port(service), "127.10.0.1", N_SOURCES)
        if entry in self.destinations:
            return Target(self.destinations[entry], 80, "10.201.0.1", N_SOURCES)
        return Target("127.0.0.1", self.proxies[entry].services[service].port, "127.10.0.1", N_SOURCES)

    def load(self, entry: str, what: str, *, service: str = "echo", **options: object) -> Load:
        return Load(self.load_place, what, self.target(entry, service), **options)

    def check_connections(self, entry: str, load: Load) -> dict[str, float]:
        """What else is to be known of the connections of a ``connects`` load. Raises Void when they are not as they should be."""
        return {}

    def cpu_sample(self, entry: str, work: Callable[[], tuple[float, float]], scale: float) -> Sample:
        """Runs ``work``, which gives (units, seconds), and gives the proxy's CPU a unit, times ``scale``."""
        if entry == DIRECT:
            units, seconds = work()
            return Sample(None, units / seconds, {"units": units, "seconds": seconds})
        process = self.proxies[entry].process
        before = process.settled_cpu_s()
        units, seconds = work()
        used = process.settled_cpu_s() - before
        return Sample(used / units * scale, units / seconds, {"cpu_s": used, "units": units, "seconds": seconds})
