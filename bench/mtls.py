"""mTLS: each entry is a chain of two proxies of its kind, with plaintext on both ends and TLS 1.3 between them.

    load → outbound proxy (originates, shows a certificate, verifies) → inbound proxy (terminates, demands one, verifies) → backend

Both count. Where only the inbound end is measured, nginx originates for all, beside the load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from bench.certificates import make_credentials
from bench.generator import Load, Void
from bench.handshakes import AES_128_GCM, TLS13, X25519, HandshakeWatch
from bench.process import Group
from bench.proxies import KINDS, Proxy, Service, Tls, start_process
from bench.stage import DIRECT, Machine, Stage, kind_of

ORIGINATOR = "nginx"
WATCHED = 24
"""Connections before each measurement whose handshakes are looked at."""
RESUMED_SHARE_MIN = 0.25
"""nginx has one session for all connections to an endpoint, and those that use it at the same time spoil it for each other."""


class Chain(Stage):
    """``resumption``: of sessions, in both proxies. ``inbound_only``: that proxy alone is what is measured. ``apart``: it runs beside the
    load, as on a node of its own: two that share a CPU wait for each other's time slices, of ms, when both are busy."""

    def __init__(
        self,
        machine: Machine,
        entries: Sequence[str],
        services: Sequence[str] = ("echo",),
        *,
        resumption: bool,
        inbound_only: bool = False,
        apart: bool = False,
    ) -> None:
        super().__init__(machine, entries, services)
        self._client, self._server = make_credentials(Path(mkdtemp(prefix="tls-", dir=machine.folder)), "client", "server")
        self._resumption = resumption
        self._inbound_only = inbound_only
        self._inbound_place = self.load_place if apart else self._proxy_place
        self.tls_ports: dict[str, int] = {}
        """Where the inbound proxy of an entry takes its first service."""

    def start(self, entry: str) -> Proxy:
        folder = self._fresh_folder(entry)
        kind = kind_of(entry)
        tls = Tls(True, self._server, self._client, self._resumption)
        inside = [dataclasses.replace(service, tls=tls) for service in self._services(entry)]
        tls = Tls(False, self._client, self._server, self._resumption)
        outside = [Service(one.name, self._machine.ports.take(), (("127.0.0.1", one.port),), tls=tls) for one in inside]
        inbound = start_process(KINDS[kind], entry, inside, self._inbound_place, folder / "inbound")
        try:
            if self._inbound_only:
                outbound = start_process(KINDS[ORIGINATOR], ORIGINATOR, outside, self.load_place, folder / "outbound")
            else:
                outbound = start_process(KINDS[kind], entry, outside, self._proxy_place, folder / "outbound")
        except BaseException:
            inbound.stop()
            raise
        self.tls_ports[entry] = inside[0].port
        group = Group([inbound, outbound], [inbound] if self._inbound_only else [inbound, outbound])
        return self._add(Proxy(entry, group, {one.name: one for one in outside}, folder))

    def check_connections(self, entry: str, load: Load) -> dict[str, float]:
        """A few of them, and what was agreed on the wire: the share of resumed handshakes."""
        if entry == DIRECT:
            return {}
        load.run(count=WATCHED)
        with HandshakeWatch(self.tls_ports[entry]) as watch:
            load.run(count=WATCHED)
            seen = watch.seen()
        others = [hello for hello in seen if (hello.version, hello.cipher, hello.group) != (TLS13, AES_128_GCM, X25519)]
        resumed = sum(hello.resumed for hello in seen)
        if len(seen) != WATCHED or others:
            raise Void(f"{WATCHED} connections made {len(seen)} handshakes, {len(others)} with other parameters {others[:1]}")
        if (resumed < RESUMED_SHARE_MIN * WATCHED) if self._resumption else resumed:
            raise Void(f"{resumed} of {WATCHED} handshakes were resumed")
        return {"resumed": resumed / WATCHED}
