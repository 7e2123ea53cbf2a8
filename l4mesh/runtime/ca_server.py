"""``l4mesh ca serve``: a CA's folder behind an HTTP server with mutual TLS, for the nodes and what each of them may ask for.

``POST /v1/certificates`` takes a CSR in PEM and answers with the certificate, the trust bundle and the revocation lists;
``GET /v1/trust`` answers with the last two.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import structlog
import uvloop
from aiohttp import web
from cryptography import x509

from l4mesh.config.nodes import load_grants
from l4mesh.errors import CommandError, ConfigError, L4meshError
from l4mesh.identity.ca import BACKDATED, LEAF_LIFE, CertificateAuthority, read_request
from l4mesh.identity.svid import IdentityError, read_spiffe_id
from l4mesh.identity.tls import server_context
from l4mesh.model import SocketAddress
from l4mesh.runtime.access_log import configure_logging
from l4mesh.runtime.descriptors import raise_descriptor_limit
from l4mesh.runtime.notify import notify

MAX_REQUEST_BYTES = 16 << 10
TICK_S = 0.5
REQUESTS_PER_S = 4.0
"""That one node may make for long."""
BURST = 256
"""That it may make at once: a node that starts asks for all its workloads."""
CRL_REFRESH_S = 86_400.0
SIGNER_WARNING = timedelta(days=30)
DESCRIPTORS_SHORT = 0.9
"""Share of RLIMIT_NOFILE."""
NODE: web.RequestKey[str] = web.RequestKey("node", str)

T = TypeVar("T")
log = structlog.get_logger()


def serve(folder: Path, bind: SocketAddress, life: timedelta, timeout_s: float) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code. Raises CommandError or ConfigError when it can't begin."""
    configure_logging()
    server = CaServer(folder, life, timeout_s, raise_descriptor_limit())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.run(bind))
    return 0


@dataclass(slots=True)
class Bucket:
    """How many requests a node may still make."""

    tokens: float
    filled_s: float

    def take(self, now_s: float) -> bool:
        self.tokens = min(BURST, self.tokens + (now_s - self.filled_s) * REQUESTS_PER_S)
        self.filled_s = now_s
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class CaServer:
    """``life``: of the certificates that it issues. ``timeout_s``: of a handshake, and of a whole connection after it.
    ``descriptors``: how many it may have open."""

    def __init__(self, folder: Path, life: timedelta, timeout_s: float, descriptors: int) -> None:
        self._authority = CertificateAuthority(folder)
        self._server_id = f"spiffe://{self._authority.trust_domain}/l4mesh/ca"
        self._grants = load_grants(self._authority.nodes_path, self._authority.trust_domain)
        self._nodes_stat = _stat(self._authority.nodes_path)
        self._life = life
        self._timeout_s = timeout_s
        # Whatever reads or signs does so here: one after the other, off the loop.
        self._executor = ThreadPoolExecutor(1, "l4mesh-ca")
        self._buckets: dict[str, Bucket] = {}
        self._stop = asyncio.Event()
        self._handlers: web.Server
        self._listening: socket.socket
        self._server: asyncio.Server | None = None
        self._maintaining = asyncio.Lock()
        self._trust: tuple[int, ...] | None = None
        self._shown_from = self._shown_until = datetime.fromtimestamp(0, UTC)
        """The dates between which our own certificate needs no other: it is of no use when the clock was wrong and is set."""
        self._crl_at_s = 0.0
        self._handshakes_failed = 0
        self._handshake_error = ""
        self._descriptors = descriptors
        self._is_short = False
        """Of descriptors."""
        self._failure = ""
        """Of the last look at the folder."""

    async def run(self, bind: SocketAddress) -> None:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._stop.set)
        loop.set_exception_handler(self._note_exception)
        app = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[self._admit])
        app.router.add_post("/v1/certificates", self._sign)
        app.router.add_get("/v1/trust", self._get_trust)
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=self._timeout_s, shutdown_timeout=1, max_line_size=4096)
        await runner.setup()
        assert runner.server is not None
        self._handlers = runner.server
        with _listen(bind) as listening:
            self._listening = listening
            try:
                await self._maintain()
                host, port = listening.getsockname()[:2]
                log.info(
                    "ready",
                    bind=str(SocketAddress(host, port)),
                    identity=self._server_id,
                    nodes=len(self._grants.by_node),
                    pid=os.getpid(),
                )
                notify(READY=1)
                await self._tick()
            finally:
                notify(STOPPING=1)
                if self._server:
                    self._server.close()
                await runner.cleanup()
                self._executor.shutdown(cancel_futures=True)
                log.info("stopped")

    async def _off_loop(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, functools.partial(call, *args))
        except RuntimeError:
            if self._stop.is_set():
                raise Refused(503, "the CA stops") from None
            raise

    # -- by the clock ------------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        alive: dict[Any, float] = {}
        stopping = asyncio.ensure_future(self._stop.wait())
        while not (await asyncio.wait([stopping], timeout=min(TICK_S, self._timeout_s / 4)))[0]:
            now_s = time.monotonic()
            alive = {connection: alive.get(connection, now_s) for connection in self._handlers.connections}
            for connection, since_s in alive.items():
                # One bound for slow heads, slow bodies, slow readers and idlers alike.
                if now_s - since_s > self._timeout_s:
                    connection.force_close()
            self._buckets = {node: bucket for node, bucket in self._buckets.items() if now_s - bucket.filled_s < BURST / REQUESTS_PER_S}
            self._log_handshakes()
            self._log_descriptors()
            try:
                await self._maintain()
                self._failure = ""
            except (CommandError, OSError, ValueError) as error:
                if self._failure != str(error):
                    self._failure = str(error)
                    log.error("maintenance_failed", error=str(error), means="what is shown to nodes is not renewed")

    async def _maintain(self) -> None:
        """Looks at the folder, which others change as well, and at the dates of what we show."""
        await self._reload_nodes()
        await self._keep_certificate()
        # Last, because it writes: a disk that is full holds up nothing else.
        now_s = time.monotonic()
        if now_s >= self._crl_at_s:
            await self._off_loop(self._authority.refresh_crl)
            self._crl_at_s = now_s + CRL_REFRESH_S

    async def _keep_certificate(self) -> None:
        async with self._maintaining:
            trust = _stat(self._authority.bundle_path)
            if trust != self._trust or not self._shown_from <= datetime.now(UTC) < self._shown_until:
                await self._show_new_certificate()
                self._trust = trust

    async def _show_new_certificate(self) -> None:
        issued = await self._off_loop(self._authority.issue, self._server_id, LEAF_LIFE)
        bundle, _ = await self._off_loop(self._authority.trust)
        # The listening socket stays, so that nobody is refused: a server with the new context takes over from the old one.
        server = await asyncio.get_running_loop().create_server(
            self._handlers,
            sock=self._listening.dup(),
            ssl=server_context(issued.private_key + issued.certificates, bundle, self._note_handshake),
            ssl_handshake_timeout=self._timeout_s,
        )
        if self._server:
            self._server.close()
            log.info("server_certificate_renewed", serial=f"{issued.serial:x}", until=issued.expires.isoformat())
        self._server = server
        now = datetime.now(UTC)
        self._shown_from, self._shown_until = now - BACKDATED, now + (issued.expires - now) / 2
        if (left := await self._off_loop(self._authority.signs_until) - now) < SIGNER_WARNING:
            log.warning("signer_expires", left_days=left.days, means="no certificate outlives it: run l4mesh ca rotate")

    async def _reload_nodes(self) -> None:
        stat = _stat(self._authority.nodes_path)
        if stat == self._nodes_stat:
            return
        self._nodes_stat = stat
        try:
            self._grants = await self._off_loop(load_grants, self._authority.nodes_path, self._authority.trust_domain)
            log.info("nodes_reloaded", nodes=len(self._grants.by_node))
        except ConfigError as error:
            log.error("nodes_refused", problems=str(error).splitlines(), goes_on_with="the nodes of before")

    def _note_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # A peer that goes away is no event.
        if not isinstance(error, OSError):
            log.error("internal_error", error=repr(error), message=context.get("message"))

    def _note_handshake(self, error: ssl.SSLError) -> None:
        self._handshakes_failed += 1
        self._handshake_error = error.reason or str(error)

    def _log_handshakes(self) -> None:
        """Strangers cause them: one line a tick, however many."""
        if self._handshakes_failed:
            log.warning("handshakes_failed", count=self._handshakes_failed, last_error=self._handshake_error)
            self._handshakes_failed = 0

    def _log_descriptors(self) -> None:
        """Without a free one the loop closes whoever comes, and says nothing."""
        try:
            in_use = len(os.listdir("/proc/self/fd"))
        except OSError:
            in_use = self._descriptors
        was_short, self._is_short = self._is_short, in_use > self._descriptors * DESCRIPTORS_SHORT
        if self._is_short and not was_short:
            log.warning(
                "descriptors_short",
                in_use=in_use,
                limit=self._descriptors,
                means="whoever comes when none is left is turned away: raise the hard limit of open files, or see who connects",
            )

    # -- requests ------------------------------------------------------------------------------------------------------------

    @web.middleware
    async def _admit(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        """Asks who it is, every time: a certificate that was revoked meanwhile counts no longer."""
        node = ""
        try:
            certificate = _client_certificate(request)
            node = read_spiffe_id("the certificate", certificate)
            if not self._bucket(node).take(time.monotonic()):
                raise Refused(429, f"{node} asks too often: at most {REQUESTS_PER_S:g} times a second")
            if await self._off_loop(self._authority.authenticate, certificate) not in self._grants.by_node:
                raise Refused(403, f"{node} is not among the nodes")
            request[NODE] = node
            return await handler(request)
        except (Refused, IdentityError) as error:
            status = error.status if isinstance(error, Refused) else 403
            log.warning("request_refused", node=node, path=request.path[:100], peer=request.remote, reason=str(error))
            return web.json_response({"error": str(error)}, status=status)
        except CommandError as error:
            log.error("request_failed", node=node, path=request.path[:100], error=str(error))
            return web.json_response({"error": "the CA can't use its folder; its log says why"}, status=503)
        except web.HTTPException as error:
            log.warning("request_refused", node=node, path=request.path[:100], peer=request.remote, reason=error.reason)
            raise
        except ConnectionError:
            raise
        except Exception:
            log.exception("request_failed", node=node, path=request.path[:100])
            return web.json_response({"error": "the request failed; the CA's log says why"}, status=500)

    def _bucket(self, node: str) -> Bucket:
        return self._buckets.setdefault(node, Bucket(BURST, time.monotonic()))

    async def _sign(self, request: web.Request) -> web.Response:
        node = request[NODE]
        body = await request.read()
        try:
            wanted, key = await self._off_loop(read_request, body)
        except CommandError as error:
            raise Refused(400, str(error)) from None
        refusal = self._grants.refusal(node, wanted)
        if refusal:
            raise Refused(403, refusal)
        issued = await self._off_loop(self._authority.sign_key, wanted, key, self._life)
        trust = await self._read_trust()
        log.info("certificate_issued", node=node, spiffe_id=wanted, serial=f"{issued.serial:x}", until=issued.expires.isoformat())
        return web.json_response({"certificates": issued.certificates.decode()} | trust)

    async def _get_trust(self, request: web.Request) -> web.Response:
        return web.json_response(await self._read_trust())

    async def _read_trust(self) -> dict[str, str]:
        bundle, crl = await self._off_loop(self._authority.trust)
        # Whoever trusts this bundle must be able to trust us: after it was read, because it may change again.
        await self._keep_certificate()
        return {"bundle": bundle.decode(), "crl": crl.decode()}


class Refused(L4meshError):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def _client_certificate(request: web.Request) -> x509.Certificate:
    """Raises Refused."""
    transport = request.transport
    secured: ssl.SSLObject | None = transport.get_extra_info("ssl_object") if transport else None
    der = secured.getpeercert(True) if secured else None
    if not der:
        raise Refused(403, "the connection has no client certificate")
    try:
        return x509.load_der_x509_certificate(der)
    except ValueError:
        raise Refused(403, "the client's certificate can't be read") from None


def _listen(bind: SocketAddress) -> socket.socket:
    """Raises CommandError."""
    try:
        return socket.create_server((bind.host, bind.port), family=socket.AF_INET6 if bind.is_v6 else socket.AF_INET, backlog=1024)
    except OSError as error:
        # Python adds the address to the reason.
        raise CommandError(f"can't listen on {bind}: {os.strerror(error.errno or 0)}; --bind names another address") from None


def _stat(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
