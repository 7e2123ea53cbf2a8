"""The composition root: builds the parts, wires them, runs until told to stop, takes them down in order. Nothing else does."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog
import uvloop

from l4mesh.datapath import Datapath
from l4mesh.errors import CloseReason, CommandError, ConfigError
from l4mesh.identity.svid import Material
from l4mesh.model import Config, SocketAddress
from l4mesh.runtime.access_log import AccessLog, configure_logging
from l4mesh.runtime.admin import AdminServer, Facts
from l4mesh.runtime.descriptors import raise_descriptor_limit
from l4mesh.runtime.endpoints import EndpointRegistry, OutCause
from l4mesh.runtime.health import HealthChecker
from l4mesh.runtime.listeners import Listeners, Place, by_place
from l4mesh.runtime.metrics import Sources, count_control
from l4mesh.runtime.notify import Heartbeat, notify
from l4mesh.runtime.outlier import OutlierDetector
from l4mesh.runtime.overload import OverloadMonitor, OverloadStatus, control_groups
from l4mesh.runtime.reload import Reloader
from l4mesh.runtime.renewer import Renewer
from l4mesh.runtime.resolve import Resolver
from l4mesh.runtime.supervised import Supervised
from l4mesh.runtime.upgrade import Successor, Takeover, UpgradeServer, Verdicts, is_container, start_again
from l4mesh.runtime.watchdog import Watchdog
from l4mesh.snapshot import ConnectionRecord
from l4mesh.totals import Count

TICK_S = 0.25
IDLE_LOOK_EVERY_S = 0.02
EXPIRY_LOOK_EVERY_S = 3600.0
RESERVED_DESCRIPTORS = 256
"""Kept for files, the admin server and everything else that is not a connection."""
POOLED_PIPES_DESCRIPTORS = 128
CHECKS_MAX = 2048
"""Health checks under way at once, where there are descriptors enough."""
DESCRIPTORS_PER_CONNECTION = 2.5
"""Two sockets, and a pipe for one in four (HAProxy's ratio); a half that gets no pipe copies."""

log = structlog.get_logger()


def run(paths: Sequence[Path]) -> int:
    """Runs l4mesh until SIGTERM (drains) or SIGINT (at once). Returns the exit code; says on standard error what went wrong."""
    configure_logging()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(App(paths).run())
    except ConfigError as error:
        for problem in error.problems:
            print(f"l4mesh: {problem}", file=sys.stderr)
        return 1
    except CommandError as error:
        print(f"l4mesh: {error}", file=sys.stderr)
        return 1
    return 0


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use: its affinity, and the least quota of its control groups (version 2) rounded up.

    ``root``: for tests, in the place of ``/``.
    """
    cpus = len(os.sched_getaffinity(0))
    for group in control_groups(root):
        try:
            quota, period = (group / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            cpus = max(1, min(cpus, math.ceil(int(quota) / int(period))))
    return cpus


def checks_within(descriptors: int) -> int:
    """How many health checks may be under way at once."""
    return max(16, min(CHECKS_MAX, descriptors // 16))


def connections_within(descriptors: int, workers: int, checks: int) -> int:
    """How many connections the descriptors are enough for, beside so many health checks."""
    free = descriptors - RESERVED_DESCRIPTORS - workers * POOLED_PIPES_DESCRIPTORS - checks
    return max(16, int(free / DESCRIPTORS_PER_CONNECTION))


class App:
    def __init__(self, paths: Sequence[Path]) -> None:
        self._resolver = Resolver()
        self._reloader = Reloader(paths, self._apply, self._applied, self._resolver.resolve)
        self._renewer = Renewer(lambda: self._reloader.materials, self._reloader.reload)
        self._stop = asyncio.Event()
        self._told = asyncio.Event()
        self._terminated = asyncio.Event()
        """Told to end, or replaced."""
        self._ready = False
        self._lag_s = 0.0
        self._lag_max_s = 0.0
        self._admin_bind = ""
        """As configured: what another process compares its own with."""
        self._admin_address = ""
        self._bound: list[tuple[str, SocketAddress]] = []
        self._datapath: Datapath | None = None
        self._watchdog: Watchdog | None = None
        self._supervised: Supervised | None = None
        self._endpoints: EndpointRegistry | None = None
        self._outliers: OutlierDetector | None = None
        self._listeners: Listeners | None = None
        self._overload: OverloadMonitor | None = None
        self._access_log: AccessLog | None = None
        self._admin: AdminServer | None = None
        self._takeover: Takeover | None = None
        self._following: asyncio.Task[None] | None = None
        self._upgrades: UpgradeServer | None = None
        self._replaced = False
        self._owns_paths = True
        """Of the admin and the upgrade socket; not while they are also those of a process that may yet go on."""
        self._descriptors = raise_descriptor_limit()
        self._n_workers = 0
        self._health = HealthChecker(self._note_health, lambda: self._reloader.materials, checks_within(self._descriptors))

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGINT, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        tasks: list[asyncio.Task[Any]] = []
        stopping = draining = None
        try:
            self._supervised = await Supervised.connect()
            await self._reloader.load_first()
            config = self._reloader.config
            assert config is not None
            assert self._datapath is not None
            self._datapath.start()
            self._health.start()
            await self._published()
            self._listen_besides(config)
            if self._takeover:
                await self._unless_stopped(self._takeover.complete, self._takeover)
            await self._serve_besides()
            self._watchdog = Watchdog(self._datapath, config.watchdog_ms)
            assert self._outliers is not None
            works = (self._reloader.watch(), self._renewer.run(), self._outliers.run(), self._tick(), self._watchdog.attend())
            tasks = [loop.create_task(work) for work in works]
            if self._supervised:
                tasks.append(loop.create_task(self._supervised.listen(self._orphaned)))
            # What a large configuration is made of stays: without this every full collection of garbage walks all of it, with the loop
            # waiting (40 ms for 5,000 clusters).
            gc.freeze()
            gc.enable()
            self._ready = True
            log.info(
                "ready",
                admin=self._admin_address,
                listeners={
                    name: ", ".join(str(address) for owner, address in self._bound if owner == name) for name in config.listeners
                },
                workers=self._n_workers,
                connections_limit=self._max_connections(config),
                pid=os.getpid(),
            )
            notify(READY=1)
            if self._supervised:
                self._supervised.serves(config)
            stopping = loop.create_task(self._stop.wait())
            draining = loop.create_task(self._drain())
            done, _ = await asyncio.wait([stopping, draining, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()
        except (ConfigError, CommandError) as error:
            if self._takeover:
                self._takeover.fail(str(error))
            raise
        finally:
            self._ready = False
            if not self._replaced:
                notify(STOPPING=1)
            if self._upgrades:
                await self._upgrades.stop(self._owns_paths)
            if self._takeover:
                self._takeover.hang_up()
            tasks += [task for task in (stopping, draining) if task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._following:
                await asyncio.gather(self._following, return_exceptions=True)
            if self._admin:
                await self._admin.stop(self._owns_paths)
            self._reloader.close()
            self._close()
            if self._supervised:
                self._supervised.close()
            log.info("stopped")

    def _listen_besides(self, config: Config) -> None:
        """The admin and the upgrade socket: what can go wrong with them does so before a process that runs gives anything away."""
        assert self._datapath is not None
        takeover = self._takeover
        self._owns_paths = takeover is None
        self._admin = AdminServer(self._datapath, self._sources(), Facts(self._is_ready, self._config, lambda: self._bound))
        if config.admin:
            self._admin_bind = config.admin
            self._admin_address = self._admin.listen(config.admin, takeover.take_admin(config.admin) if takeover else None)
        if config.upgrade_socket:
            self._upgrades = UpgradeServer(self)
            self._upgrades.listen(config.upgrade_socket, takeover.take_upgrade() if takeover else None)

    async def _serve_besides(self) -> None:
        """Answers there; then the process before may end."""
        assert self._datapath is not None
        assert self._listeners is not None
        assert self._admin is not None
        if self._takeover:
            self._ready = True
        await self._admin.answer()
        if self._takeover:
            self._takeover.serve()
            self._owns_paths = True
            self._takeover.drop_unused()
            self._following = asyncio.get_running_loop().create_task(asyncio.to_thread(self._takeover.follow, self._datapath))
        self._listeners.settle()
        if self._upgrades:
            self._upgrades.answer()

    async def _unless_stopped(self, work: Callable[[Datapath], None], takeover: Takeover) -> None:
        """``work`` on a thread. Raises CommandError when the process is told to stop meanwhile."""
        assert self._datapath is not None
        loop = asyncio.get_running_loop()
        working = loop.create_task(asyncio.to_thread(work, self._datapath))
        told = [loop.create_task(event.wait()) for event in (self._stop, self._terminated)]
        await asyncio.wait([working, *told], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            takeover.fail("the new process was told to stop")
            takeover.hang_up()
            await asyncio.gather(working, return_exceptions=True)
            raise CommandError("stopped while it took over; the process before goes on")
        for task in told:
            task.cancel()
        working.result()

    def _close(self) -> None:
        self._health.close()
        if self._datapath:
            self._datapath.stop()
        if self._upgrades:
            self._upgrades.finish()
        if self._takeover:
            self._takeover.close()
        if self._watchdog:
            self._watchdog.stop()
        if self._listeners:
            self._listeners.close()
        if self._access_log:
            self._access_log.close()

    # -- plans ---------------------------------------------------------------------------------------------------------

    def _apply(self, config: Config, materials: Mapping[str, Material]) -> int:
        """Called by the reloader on its thread."""
        if self._datapath is None or self._listeners is None:
            self._n_workers = config.workers or usable_cpus()
            self._access_log = AccessLog(config.access_log)
            self._datapath = Datapath(self._n_workers, self._descriptors, self._log_records)
            self._endpoints = EndpointRegistry(self._datapath)
            self._outliers = OutlierDetector(self._datapath, self._endpoints, random.random)
            self._datapath.on_told = self._outliers.told
            self._takeover = Takeover.find(config.upgrade_socket) if config.upgrade_socket else None
            if self._takeover:
                self._health.inherit(self._takeover.verdicts.health)
                self._outliers.inherit(self._takeover.verdicts.ejections)
            self._listeners = Listeners(self._n_workers, self._inherited_listening())
            self._overload = OverloadMonitor(self._datapath, self._listeners.sockets, usable_cpus())
        else:
            self._warn_of_fixed(config)
        sockets = self._listeners.open(config)
        bound = list(dict.fromkeys((name, address) for name, binds in sockets.items() for address, _ in binds))
        own = [address for _, address in bound]
        admin = self._admin_address or config.admin
        if admin and not admin.startswith("unix:"):
            host, _, port = admin.rpartition(":")
            own.append(SocketAddress(host.strip("[]"), int(port)))
        try:
            generation = self._datapath.apply(config, sockets, own, self._max_connections(config), materials)
        except (MemoryError, ValueError) as error:
            # Nobody serves what was opened for it.
            if self._reloader.config:
                self._listeners.close_unused(self._reloader.config)
            raise CommandError(f"the configuration can't be taken into use: {error or 'out of memory; it is tried again'}") from error
        self._bound = bound
        if self._supervised:
            self._supervised.keep(self._listeners.lasting(config))
        self._listeners.close_unused(config)
        _say_faults(config)
        _say_missing_privilege(config)
        return generation

    def _inherited_listening(self) -> Mapping[Place, list[socket.socket]]:
        kept = self._supervised.kept if self._supervised else ()
        if self._takeover is None:
            return by_place(kept)
        for listening in kept:
            listening.close()
        return self._takeover.take_listening()

    def _applied(self, config: Config) -> None:
        """Called by the reloader on the control loop."""
        assert self._endpoints is not None
        assert self._outliers is not None
        self._endpoints.configure(config)
        self._health.configure(config)
        self._outliers.configure(config)
        self._renewer.configure(config)
        if self._supervised and self._ready:
            self._supervised.wants(config)

    def _note_health(self, cluster: str, address: str, healthy: bool, why: str) -> None:
        assert self._endpoints is not None
        if healthy:
            self._endpoints.put_back(cluster, address, OutCause.UNHEALTHY)
        else:
            verdict = self._health.verdict(cluster, address)
            self._endpoints.take_out(cluster, address, OutCause.UNHEALTHY, why, verdict.since_unix_s if verdict else None)

    async def _published(self) -> None:
        """Waits until the workers, which have just started, have the first plan: then every listener is served."""
        assert self._datapath is not None
        await asyncio.to_thread(self._datapath.wait_until_seen)

    def _max_connections(self, config: Config) -> int:
        checks = any(cluster.health_check for cluster in config.clusters.values())
        most = connections_within(self._descriptors, self._n_workers, checks_within(self._descriptors) if checks else 0)
        return min(config.max_connections, most) if config.max_connections else most

    def _warn_of_fixed(self, config: Config) -> None:
        before = self._reloader.config
        assert before is not None
        for key in ("workers", "admin", "upgrade_socket", "access_log", "watchdog_ms"):
            if getattr(before, key) != getattr(config, key) and not (
                key == "access_log"
                and (before.access_log.path, before.access_log.format) == (config.access_log.path, config.access_log.format)
            ):
                log.warning("config_needs_restart", key=key.removesuffix("_ms"), means="the running process keeps the old value")

    # -- what the admin server shows -------------------------------------------------------------------------------------

    def _sources(self) -> Sources:
        assert self._datapath is not None
        assert self._endpoints is not None
        assert self._outliers is not None
        return Sources(
            self._datapath.snapshot,
            self._datapath.endpoints,
            lambda: self._reloader.status,
            self._reloader.identities.status,
            self._renewer.status,
            lambda: self._access_log.dropped if self._access_log else 0,
            self._take_lag,
            self._endpoints,
            self._health,
            self._outliers,
            lambda: self._supervised.status if self._supervised else None,
            lambda: self._overload.status if self._overload else OverloadStatus(),
            lambda: self._takeover.counts if self._takeover else (),
        )

    def _is_ready(self) -> bool:
        return self._ready

    def _config(self) -> Config | None:
        return self._reloader.config

    def _take_lag(self) -> tuple[float, float]:
        greatest, self._lag_max_s = self._lag_max_s, 0.0
        return self._lag_s, greatest

    def _log_records(self, records: list[ConnectionRecord]) -> None:
        assert self._access_log is not None
        self._access_log.write(records)

    # -- the end -----------------------------------------------------------------------------------------------------------

    def _terminate(self) -> None:
        """SIGTERM drains; a second one is impatient."""
        if self._told.is_set():
            self._stop.set()
        self._told.set()
        self._terminated.set()

    def _orphaned(self) -> None:
        """Nobody would replace this process, or keep its rules: whoever comes next shall find an orderly host."""
        log.error("supervisor_gone", means="this process drains and ends; the rules stay")
        self._terminate()

    async def _drain(self) -> None:
        """Once terminated: refuses new connections, gives those that are there their time, then ends them one by one."""
        await self._terminated.wait()
        assert self._datapath is not None
        assert self._listeners is not None
        assert self._reloader.config is not None
        drain = self._reloader.config.drain
        self._ready = False
        if self._supervised and not self._replaced:
            self._supervised.drains()
        await self._reloader.freeze()
        if self._overload:
            self._overload.stop()
        reporting = None
        if self._upgrades:
            await self._upgrades.stop()
        if self._replaced:
            assert self._upgrades is not None
            reporting = asyncio.get_running_loop().create_task(asyncio.to_thread(self._upgrades.report))
        else:
            await self._datapath.stop_accepting()
        self._listeners.close()
        log.info("draining", connections=self._datapath.active, time_s=drain.time_ms / 1000, over_s=drain.over_ms / 1000)
        try:
            await self._wait_idle(drain.time_ms)
            if self._datapath.active and drain.over_ms:
                log.info("closing", connections=self._datapath.active)
                self._datapath.close_all(CloseReason.SHUTDOWN, drain.over_ms)
                await self._wait_idle(drain.over_ms)
        finally:
            if reporting:
                assert self._upgrades is not None
                self._upgrades.report_no_more()
                await reporting
        log.info("drained", connections_cut=self._datapath.active)
        if self._replaced and not self._supervised and is_container() and not self._told.is_set():
            log.info("waits_for_sigterm", means="a container that ends is started again, and would take over in its turn")
            await self._told.wait()

    async def _wait_idle(self, most_ms: int) -> None:
        assert self._datapath is not None
        until = time.monotonic() + most_ms / 1000
        while self._is_busy() and time.monotonic() < until:
            await asyncio.sleep(IDLE_LOOK_EVERY_S)

    def _is_busy(self) -> bool:
        """A process that was replaced as well waits for the one that it replaced, whose counters come through it."""
        assert self._datapath is not None
        return bool(self._datapath.active) or (self._replaced and self._takeover is not None and not self._takeover.is_over)

    # -- another process takes over (upgrade.Running) ----------------------------------------------------------------------

    @property
    def datapath(self) -> Datapath:
        assert self._datapath is not None
        return self._datapath

    def start_successor(self) -> Successor:
        return self._supervised.start_successor() if self._supervised else start_again()

    async def hold(self) -> None:
        await self._reloader.freeze()

    def sockets(self) -> list[tuple[Place, list[socket.socket]]]:
        assert self._listeners is not None
        return self._listeners.export()

    async def verdicts(self) -> Verdicts:
        assert self._outliers is not None
        return Verdicts(self._health.past(), self._outliers.past())

    def admin(self) -> tuple[str, socket.socket | None]:
        assert self._admin is not None
        return self._admin_bind, self._admin.listening

    async def release(self) -> None:
        assert self._admin is not None
        await self._admin.release()

    def counted(self) -> list[Count]:
        return count_control(self._sources())

    async def resume(self) -> None:
        assert self._admin is not None
        await self._admin.answer()
        if not self._terminated.is_set() and not self._stop.is_set():
            self._thawing = asyncio.get_running_loop().create_task(self._reloader.thaw())

    def replaced(self) -> None:
        self._replaced = True
        if self._supervised:
            self._supervised.hands_over()
        self._terminated.set()

    # -- the loop's own work -----------------------------------------------------------------------------------------------

    def _hang_up(self) -> None:
        """SIGHUP: look at the files, and open the access log anew after a rotation."""
        if self._access_log:
            self._access_log.reopen()
        self._hang_up_task = asyncio.get_running_loop().create_task(self._reloader.reload())

    async def _tick(self) -> None:
        # Until then loading has told.
        expiry_at = time.monotonic() + EXPIRY_LOOK_EVERY_S
        heartbeat = Heartbeat()
        while True:
            if not self._replaced:
                # Or systemd would hear it from a process that is not the service's main one any more.
                heartbeat.beat()
            before = time.monotonic()
            await asyncio.sleep(TICK_S)
            self._lag_s = max(0.0, time.monotonic() - before - TICK_S)
            self._lag_max_s = max(self._lag_max_s, self._lag_s)
            assert self._datapath is not None
            self._datapath.tick()
            if self._overload and self._reloader.config and not self._terminated.is_set():
                self._overload.look(self._reloader.config)
            if self._resolver.is_due:
                await self._reloader.reload()
            if time.monotonic() >= expiry_at:
                expiry_at = time.monotonic() + EXPIRY_LOOK_EVERY_S
                for event, fields in self._reloader.identities.overdue(time.time()):
                    log.warning(event, **fields)


def _say_faults(config: Config) -> None:
    """At every plan, so that they can't be left on unseen."""
    if config.faults_enabled:
        log.warning("faults_enabled", rules=config.fault_rules, means="connections are delayed or broken on purpose")
    elif config.fault_rules:
        log.info("faults_not_enabled", rules=config.fault_rules, means="they do nothing; faults: {enabled: on} puts them in force")


def _say_missing_privilege(config: Config) -> None:
    """What captures can't dial without its mark, which would else be seen in single connections only."""
    if not config.own_mark:
        return
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, config.own_mark)
    except PermissionError:
        log.error("mark_not_permitted", means="no connection can be made: capture needs CAP_NET_ADMIN")
    except OSError as error:
        log.error("mark_not_tried", error=os.strerror(error.errno or 0))
