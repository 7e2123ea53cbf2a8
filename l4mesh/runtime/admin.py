"""The admin server: what the process knows, over HTTP on loopback or a unix socket. It reads and never changes anything."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import json
import os
import socket
import stat
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

import structlog
from aiohttp import web

from l4mesh import __version__
from l4mesh.errors import CommandError, Fault
from l4mesh.model import Config, SocketAddress
from l4mesh.runtime.metrics import Sources, render_metrics
from l4mesh.snapshot import ClusterSnapshot, ConnectionSnapshot, EndpointSnapshot, Snapshot

PAGE_MAX = 1000
REQUESTS_AT_ONCE = 16
PIECES_A_TURN = 100
"""Of an answer that may be long, before others have their turn."""
BACKLOG = 128
CONNECTIONS_MAX = 64
"""Well below ``RESERVED_DESCRIPTORS``, so that traffic has its own."""
LIFE_S = 30.0
"""Of a connection: slow heads, slow readers and idlers alike. What is being answered then has as long again."""
GRACE_S = 0.05
SHUTDOWN_S = 0.25
"""For a request that is being answered: an upgrade, and with it new connections, waits for it."""

log = structlog.get_logger()


class Readable(Protocol):
    """What the admin server asks of the data path."""

    def snapshot(self) -> Snapshot: ...

    def endpoints(self, cluster: str | None = None) -> list[EndpointSnapshot]: ...

    async def connections(self, start: int, limit: int) -> tuple[list[ConnectionSnapshot], int | None]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What the admin server asks of the rest of the process."""

    ready: Callable[[], bool]
    config: Callable[[], Config | None]
    bound: Callable[[], list[tuple[str, SocketAddress]]]


class AdminServer:
    def __init__(self, datapath: Readable, sources: Sources, facts: Facts) -> None:
        self._datapath = datapath
        self._sources = sources
        self._facts = facts
        self._started = time.monotonic()
        self._runner: web.AppRunner | None = None
        self._site: _Site | None = None
        self._watching: asyncio.Task[None] | None = None
        self._released = False
        self._on_loopback = False
        self.listening: socket.socket | None = None
        self._places = asyncio.Semaphore(REQUESTS_AT_ONCE)

    def listen(self, address: str, inherited: socket.socket | None = None) -> str:
        """Listens on "host:port" or "unix:path" and gives the bound address. Raises CommandError. ``inherited``: the socket of the
        process before."""
        try:
            self.listening = inherited or _listen(address)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CommandError(f"admin: can't listen on {address}: {reason}; set admin.bind to another") from error
        if address.startswith("unix:"):
            return address
        host, port = self.listening.getsockname()[:2]
        self._on_loopback = ipaddress.ip_address(host).is_loopback
        return str(SocketAddress(host, port))

    async def answer(self) -> None:
        """Begins to answer at the socket, at first or after ``release``; nothing where there is none."""
        if self.listening is None or self._runner:
            return
        self._released = False
        app = web.Application(client_max_size=1024, middlewares=[self._limit])
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/live", self._live)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/status", self._status)
        app.router.add_get("/clusters", self._clusters)
        app.router.add_get("/connections", self._connections)
        app.router.add_get("/config", self._config)
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=15, shutdown_timeout=SHUTDOWN_S, max_line_size=4096)
        await self._runner.setup()
        self._site = _Site(self._runner, self.listening.dup())
        await self._site.start()
        self._watching = asyncio.create_task(_watch(self._site.handlers))

    async def release(self) -> None:
        """Answers no more than what has come, and leaves the socket open: who has it as well goes on with it."""
        if self._site and self._runner:
            await self._site.stop()
            # A connection that was accepted just now has yet to say what it wants.
            await asyncio.sleep(GRACE_S)
        await self._end_answering()
        self._released = True

    async def _end_answering(self) -> None:
        if self._runner and self._watching:
            self._watching.cancel()
            await self._runner.cleanup()
            self._runner = None

    async def stop(self, remove_path: bool = True) -> None:
        """Answers no more. A socket's path is removed, unless told not to or released before: then it is another's."""
        if self.listening is None:
            return
        remove_path = remove_path and not self._released and self.listening.family == socket.AF_UNIX
        path = self.listening.getsockname() if remove_path else ""
        await self._end_answering()
        self.listening.close()
        if path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    @web.middleware
    async def _limit(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        host = request.headers.get("Host", "")
        if self._on_loopback and not _is_local(host):
            # A page of a browser on this host, whose author has given its name our address.
            return web.json_response({"error": f"{host[:100]!r} is not this server: ask by address or as localhost"}, status=421)
        async with self._places:
            try:
                return await handler(request)
            except web.HTTPException:
                raise
            except Exception:
                log.exception("admin_request_failed", path=request.path[:200])
                return web.json_response({"error": "the request failed; the log says why"}, status=500)

    async def _metrics(self, request: web.Request) -> web.Response:
        body, kind = await asyncio.to_thread(render_metrics, self._sources, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": kind})

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def _ready(self, request: web.Request) -> web.Response:
        ready = self._facts.ready()
        return web.json_response({"ready": ready}, status=200 if ready else 503)

    async def _status(self, request: web.Request) -> web.Response:
        snapshot = await asyncio.to_thread(self._datapath.snapshot)
        status = dataclasses.asdict(self._sources.reload_status())
        closed: dict[str, int] = {}
        for listener in (*snapshot.listeners, snapshot.retired_listeners):
            for reason, count in listener.closed.items():
                closed[reason.label] = closed.get(reason.label, 0) + count
        bound = self._facts.bound()
        return web.json_response(
            {
                "version": __version__,
                "pid": os.getpid(),
                "uptime_s": round(time.monotonic() - self._started, 3),
                "ready": self._facts.ready(),
                "generation": snapshot.generation,
                "plans_alive": snapshot.plans_alive,
                "config": status,
                "connections_limit": snapshot.max_connections,
                "listeners": [
                    {
                        "name": listener.name,
                        "bind": [str(address) for name, address in bound if name == listener.name],
                        "active": listener.active,
                        "opened": listener.opened,
                    }
                    for listener in snapshot.listeners
                ],
                "identities": self._identities(),
                "workers": [dataclasses.asdict(worker) for worker in snapshot.workers],
                "closed": closed,
                "faults": _faults(snapshot),
                "supervisor": dataclasses.asdict(supervision) if (supervision := self._sources.supervision()) else None,
                "access_log_dropped": self._sources.access_log_dropped(),
                "overload": dataclasses.asdict(self._sources.overload()),
            }
        )

    def _identities(self) -> list[dict[str, Any]]:
        renewals = {renewal.name: renewal for renewal in self._sources.renewals()}
        shown = []
        for identity in self._sources.identities():
            renewal = renewals.get(identity.name)
            error = identity.error if identity.in_use else "has no certificate yet"
            shown.append(
                {
                    "name": identity.name,
                    "spiffe_id": identity.spiffe_id,
                    "source": "ca" if renewal else "files",
                    "in_use": identity.in_use,
                    "serial": f"{identity.serial:X}" if identity.in_use else None,
                    "expires_unix_s": identity.expires_unix_s if identity.in_use else None,
                    "renewed_unix_s": renewal.renewed_unix_s or None if renewal else None,
                    "renewals": renewal.succeeded if renewal else 0,
                    "error": (renewal.error if renewal else "") or error,
                }
            )
        return shown

    async def _clusters(self, request: web.Request) -> web.Response:
        name = request.query.get("name")
        snapshot, endpoints = await asyncio.gather(
            asyncio.to_thread(self._datapath.snapshot), asyncio.to_thread(self._datapath.endpoints, name)
        )
        by_cluster: dict[str, list[EndpointSnapshot]] = {}
        for endpoint in endpoints:
            by_cluster.setdefault(endpoint.cluster, []).append(endpoint)
        clusters = [cluster for cluster in snapshot.clusters if cluster.name and name in (None, cluster.name)]
        if name is not None and not clusters:
            return web.json_response({"error": f"there is no cluster {name[:100]!r}"}, status=404)
        texts = []
        for text in self._spell_clusters(snapshot.generation, clusters, by_cluster):
            texts.append(text)
            if len(texts) % PIECES_A_TURN == 0:
                # Of thousands of endpoints the control loop would do nothing else for seconds.
                await asyncio.sleep(0)
        return web.Response(text="".join(texts), content_type="application/json")

    def _spell_clusters(
        self, generation: int, clusters: Sequence[ClusterSnapshot], endpoints: Mapping[str, Sequence[EndpointSnapshot]]
    ) -> Iterator[str]:
        """As JSON, in small pieces."""
        yield f'{{"generation": {generation}, "clusters": ['
        for at, cluster in enumerate(clusters):
            yield (", " if at else "") + json.dumps(self._show_cluster(cluster)).removesuffix("}") + ', "endpoints": ['
            for i, endpoint in enumerate(endpoints.get(cluster.name, ())):
                yield (", " if i else "") + json.dumps(self._show_endpoint(endpoint))
            yield "]}"
        yield "]}"

    def _show_cluster(self, cluster: ClusterSnapshot) -> dict[str, Any]:
        return {
            "name": cluster.name,
            "active": cluster.active,
            "opened": cluster.opened,
            "closed": {reason.label: count for reason, count in cluster.closed.items()},
            "bytes_to_upstream": cluster.bytes_to_upstream,
            "bytes_to_downstream": cluster.bytes_to_downstream,
            "connect_attempts": cluster.connect_attempts,
            "connect_failures": cluster.connect_failures,
            "waiting": cluster.waiting,
            "queued": cluster.queued,
            "queued_ms_mean": _mean_ms(cluster.queued_seconds, cluster.queued),
            "retrying": cluster.retrying,
            "retries_refused": cluster.retries_refused,
            "panic": self._sources.registry.is_panicking(cluster.name),
            "connect_ms_mean": _mean_ms(cluster.connect_seconds_sum, sum(cluster.connect_seconds_buckets)),
        }

    def _show_endpoint(self, endpoint: EndpointSnapshot) -> dict[str, Any]:
        where = endpoint.cluster, endpoint.address
        shown = {field.name: getattr(endpoint, field.name) for field in dataclasses.fields(endpoint) if field.name != "cluster"}
        shown["out"] = [
            {"cause": out.cause.label, "since_unix_s": round(out.since_unix_s, 3), "why": out.why}
            for out in self._sources.registry.out(*where)
        ]
        verdict = self._sources.health.verdict(*where)
        shown["health"] = dataclasses.asdict(verdict) if verdict else None
        ejection = self._sources.outliers.view(*where)
        shown["ejection"] = dataclasses.asdict(ejection) if ejection else None
        return shown

    async def _connections(self, request: web.Request) -> web.Response:
        try:
            start = int(request.query.get("start", "0"))
            limit = int(request.query.get("limit", "100"))
        except ValueError:
            return web.json_response({"error": "start and limit must be whole numbers"}, status=400)
        if not 1 <= limit <= PAGE_MAX or not 0 <= start < 1 << 63:
            return web.json_response({"error": f"limit must be 1 to {PAGE_MAX}, start what `next` gave"}, status=400)
        connections, following = await self._datapath.connections(start, limit)
        return web.json_response({"connections": [connection._asdict() for connection in connections], "next": following})

    async def _config(self, request: web.Request) -> web.Response:
        config = self._facts.config()
        return web.json_response(_plain(config) if config else {}, status=200 if config else 503)


def _faults(snapshot: Snapshot) -> dict[str, Any]:
    injected = [sum(counts) for counts in zip(*(cluster.faults for cluster in (*snapshot.clusters, snapshot.retired)), strict=True)]
    return {
        "enabled": snapshot.faults_enabled,
        "configured": snapshot.fault_rules,
        "injected": {fault.label: injected[fault] for fault in Fault if injected[fault]},
    }


def _mean_ms(total_s: float, count: int) -> float | None:
    return round(total_s / count * 1000, 3) if count else None


def _plain(value: Any) -> Any:
    """The model as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, SocketAddress):
            return str(value)
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, bytes):
        # Of a health check, which may send a password.
        return f"{len(value)} bytes"
    return str(value)


def _is_local(host: str) -> bool:
    """Whether a Host header names an address, or localhost, or nothing."""
    try:
        name = urlsplit(f"//{host}").hostname
        return name in (None, "localhost") or bool(ipaddress.ip_address(str(name)))
    except ValueError:
        return False


async def _watch(handlers: web.Server) -> None:
    """Ends connections that have lived for long enough, until cancelled."""
    since: dict[web.RequestHandler, float] = {}
    while True:
        await asyncio.sleep(LIFE_S / 30)
        now_s = time.monotonic()
        since = {connection: since.get(connection, now_s) for connection in handlers.connections}
        for connection, since_s in since.items():
            if now_s - since_s > 2 * LIFE_S:
                connection.force_close()
            elif now_s - since_s > LIFE_S:
                connection.close()


class _Site(web.BaseSite):
    """A listening socket of ours, TCP or unix."""

    def __init__(self, runner: web.AppRunner, listening: socket.socket) -> None:
        super().__init__(runner)
        assert runner.server is not None
        self.handlers = runner.server
        self._listening = listening

    @property
    def name(self) -> str:
        return str(self._listening.getsockname())

    async def start(self) -> None:
        await super().start()
        loop = asyncio.get_running_loop()
        listen = loop.create_unix_server if self._listening.family == socket.AF_UNIX else loop.create_server
        self._server = await listen(self._accept, sock=self._listening)

    def _accept(self) -> web.RequestHandler:
        """For a new connection. When there are too many the oldest makes room: who holds them keeps nobody out."""
        live = [connection for connection in self.handlers.connections if connection.transport]
        if len(live) >= CONNECTIONS_MAX:
            live[0].force_close()
        return self.handlers()


def _listen(address: str) -> socket.socket:
    """Raises OSError or CommandError."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        _remove_stale_socket(path)
        listening = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            listening.bind(path)
            listening.listen(BACKLOG)
        except OSError:
            listening.close()
            raise
        finally:
            os.umask(before)
        return listening
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not ipaddress.ip_address(host).is_loopback:
        log.warning("admin_not_on_loopback", bind=address, means="anyone who reaches it can read configuration and traffic")
    return socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG)


def _remove_stale_socket(path: str) -> None:
    """Makes room for our socket: only a socket, and only one that nobody answers on. Raises CommandError."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise CommandError(f"admin: {path} exists and is not a socket: move it away or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise CommandError(f"admin: another process answers on {path}: stop it or choose another path")
