"""The node's side of `l4mesh ca serve`: fetches and renews certificates of identities with a ``spiffe_id``, and keeps trust current."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import structlog

from l4mesh.errors import CommandError, L4meshError
from l4mesh.identity.ca import make_request
from l4mesh.identity.renewal import Schedule, Task, check_answer, keep_credential, keep_trust, make_folder
from l4mesh.identity.svid import IdentityError, Material
from l4mesh.identity.tls import client_context
from l4mesh.model import CaClient, Config, Identity

REQUEST_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 4 << 20
LONGEST_SLEEP_S = 60.0
"""The clock may be set meanwhile."""

log = structlog.get_logger()


class UnreachableError(L4meshError):
    """The CA gave no answer; nothing else needs to be tried before it does."""


@dataclass(frozen=True, slots=True)
class RenewalStatus:
    """``name`` is "" for the trust bundle and the revocation lists."""

    name: str
    renewed_unix_s: float
    succeeded: int
    failed: int
    error: str
    """Of the last attempt; "" when it succeeded."""


class Renewer:
    """``materials`` gives what is in use; ``reload`` takes what was written into use. Belongs to the control loop."""

    def __init__(self, materials: Callable[[], Mapping[str, Material]], reload: Callable[[], Awaitable[None]]) -> None:
        self._materials = materials
        self._reload = reload
        self._config: Config | None = None
        self._ca: CaClient | None = None
        self._schedule: Schedule | None = None
        self._shown = b""
        """Digest of what is shown to the CA."""
        self._changed = asyncio.Event()

    def configure(self, config: Config) -> None:
        """Call it often: it does something when ``config`` is another one than before."""
        if config is self._config:
            return
        self._config = config
        ca = config.ca
        if ca is None:
            self._ca = self._schedule = None
            return
        begins = ca != self._ca or self._schedule is None
        if begins or self._schedule is None:
            self._schedule = Schedule(ca.retry_ms / 1000, ca.trust_interval_ms / 1000, random.random)
            self._ca = ca
        wanted = [identity for identity in config.identities.values() if identity.spiffe_id]
        # The node's own comes first: all others are asked for with it.
        wanted.sort(key=lambda identity: identity.name != ca.identity)
        materials = self._materials()
        now = time.time()
        self._schedule.configure(wanted, materials, now)
        if begins:
            # The key that somebody carried here is used this once.
            self._schedule.hurry(ca.identity, now)
        node = materials.get(ca.identity)
        if node and node.digest != self._shown:
            self._shown = node.digest
            self._schedule.unblock()
        self._changed.set()

    def status(self) -> list[RenewalStatus]:
        tasks = self._schedule.tasks if self._schedule else []
        return [RenewalStatus(task.name, task.renewed_unix_s, task.succeeded, task.failed, task.error) for task in tasks]

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            sleep_s = LONGEST_SLEEP_S
            if self._schedule and self._ca and self._config:
                now = time.time()
                self._schedule.tell_time(now)
                at, task = self._schedule.next()
                sleep_s = min(sleep_s, at - now)
                if sleep_s <= 0:
                    await self._do(self._schedule, self._ca, self._config, task)
                    continue
            self._changed.clear()
            # Not wait_for, as in outlier.py.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(sleep_s):
                    await self._changed.wait()

    async def _do(self, schedule: Schedule, ca: CaClient, config: Config, task: Task) -> None:
        before = task.error
        try:
            changed = await (self._renew(schedule, ca, config, task) if task.name else self._fetch_trust(schedule, ca, config, task))
        except UnreachableError as error:
            wait_s = schedule.unreachable(task, time.time(), str(error))
        except (IdentityError, CommandError) as error:
            wait_s = schedule.refused(task, time.time(), str(error))
        else:
            if changed:
                schedule.trust_changed(task.renewed_unix_s)
                log.info("trust_changed", ca=ca.server)
            # A failure to load what was written is said by the reload itself.
            await self._reload()
            return
        if task.error != before:
            event = "identity_renewal_failed" if task.name else "trust_fetch_failed"
            names = {"identity": task.name, "spiffe_id": task.spiffe_id} if task.name else {}
            log.error(event, **names, error=task.error, retry_in_s=round(wait_s, 1), expires=_shown_time(task.expires_unix_s))

    async def _renew(self, schedule: Schedule, ca: CaClient, config: Config, task: Task) -> bool:
        """Gives whether the roots have changed. Raises UnreachableError, IdentityError or CommandError."""
        identity = config.identities[task.name]
        private_key, request = make_request(identity.spiffe_id)
        answer = await self._ask(ca, config.own_mark, "POST", "/v1/certificates", request)
        certificates, bundle, crl = (_field(answer, name) for name in ("certificates", "bundle", "crl"))
        now = time.time()
        material = check_answer(identity, private_key, certificates, bundle, crl, now)
        changed = await asyncio.to_thread(_keep, identity, private_key, certificates, bundle, crl)
        event = "identity_renewed" if task.expires_unix_s else "identity_issued"
        schedule.succeeded(task, now, material.expires_unix_s)
        log.info(event, identity=task.name, spiffe_id=task.spiffe_id, expires=_shown_time(material.expires_unix_s))
        return changed

    async def _fetch_trust(self, schedule: Schedule, ca: CaClient, config: Config, task: Task) -> bool:
        answer = await self._ask(ca, config.own_mark, "GET", "/v1/trust", None)
        bundle, crl = _field(answer, "bundle"), _field(answer, "crl")
        node = self._materials().get(ca.identity)
        if node is None:
            raise IdentityError("the node's certificate is gone")
        identity = config.identities[ca.identity]
        # Judged with what the node has: a list that it could not use must not take the place of one that it can.
        check_answer(identity, node.private_key, node.certificates, bundle, crl, time.time())
        changed = await asyncio.to_thread(keep_trust, identity, bundle, crl)
        schedule.succeeded(task, time.time())
        return changed

    async def _ask(self, ca: CaClient, mark: int, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        """Raises UnreachableError when there is no answer of the CA, CommandError when it refuses."""
        node = self._materials().get(ca.identity)
        if node is None:
            with contextlib.suppress(CommandError):
                # So that it is watched, and whoever brings the files sees where.
                make_folder(Path(ca.folder))
            raise UnreachableError(
                f"the node has no valid certificate to show to the CA: bring {ca.folder} the one that `l4mesh ca enroll` makes"
            )
        host = f"[{ca.host}]" if ":" in ca.host else ca.host
        try:
            context = client_context(node, ca.server)
            connector = aiohttp.TCPConnector(ssl=context, force_close=True, socket_factory=functools.partial(_open_socket, mark))
            timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session,
                session.request(method, f"https://{host}:{ca.port}{path}", data=body, allow_redirects=False) as response,
            ):
                content = b""
                async for part in response.content.iter_chunked(1 << 16):
                    content += part
                    if len(content) > MAX_ANSWER_BYTES:
                        raise UnreachableError(f"the CA's answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")
                return _read_answer(response.status, content)
        except TimeoutError:
            raise UnreachableError(f"the CA at {host}:{ca.port} did not answer within {REQUEST_TIMEOUT_S:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UnreachableError(f"the CA at {host}:{ca.port} can't be asked: {_explain(error)}") from None


def _open_socket(mark: int, address: aiohttp.AddrInfoType) -> socket.socket:
    """With our mark, if there is one: our own rules must not capture what traffic depends on."""
    family, kind, protocol, *_ = address
    opened = socket.socket(family, kind, protocol)
    try:
        if mark:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    except OSError:
        opened.close()
        raise
    return opened


def _keep(identity: Identity, private_key: bytes, certificates: bytes, bundle: bytes, crl: bytes) -> bool:
    changed = keep_trust(identity, bundle, crl)
    keep_credential(identity, private_key, certificates)
    return changed


def _read_answer(status: int, content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise UnreachableError(f"the CA answered {status} with something that is no answer")
    if status == 429 or status >= 500:
        raise UnreachableError(f"the CA answered {status}: {str(answer.get('error', ''))[:500]}")
    if status != 200:
        raise CommandError(f"the CA refuses: {str(answer.get('error', status))[:500]}")
    return answer


def _field(answer: dict[str, Any], name: str) -> bytes:
    value = answer.get(name)
    if not isinstance(value, str) or not value.isascii():
        raise IdentityError(f"the answer has no {name}")
    return value.encode()


def _explain(error: Exception) -> str:
    """The cause, without what the HTTP client puts around it."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        error = error.certificate_error
    elif isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__


def _shown_time(unix_s: float) -> str | None:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds") if unix_s else None
