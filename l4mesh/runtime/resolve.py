"""Endpoints given by name: each address that the name has becomes an endpoint.

Names are resolved with the host's resolver when a configuration is loaded and again at every look. A name that can't be resolved
keeps the addresses it had; one that never could has no endpoints, and the configuration still loads: a name service that is down must
not keep the rest of the node from starting.
"""

from __future__ import annotations

import socket
from dataclasses import replace

import structlog

from l4mesh.model import Cluster, Config, Endpoint

log = structlog.get_logger()


class Resolver:
    """Turns names into addresses and keeps a cluster's object while its addresses stay the same."""

    def __init__(self) -> None:
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._resolved: dict[str, tuple[Cluster, Cluster]] = {}

    @property
    def has_names(self) -> bool:
        return bool(self._addresses)

    def resolve(self, config: Config) -> Config:
        """``config`` with IP literals only. Blocks while it asks: call it off the loop."""
        clusters = dict(config.clusters)
        asked: dict[str, tuple[str, ...]] = {}
        for name, cluster in config.clusters.items():
            if any(is_name(endpoint.host) for endpoint in cluster.endpoints):
                clusters[name] = self._resolve_cluster(cluster, asked)
        self._addresses = asked
        if not asked:
            return config
        return replace(config, clusters=clusters)

    def _resolve_cluster(self, cluster: Cluster, asked: dict[str, tuple[str, ...]]) -> Cluster:
        endpoints: dict[str, Endpoint] = {}
        for endpoint in cluster.endpoints:
            for host in self._lookup(endpoint.host, asked) if is_name(endpoint.host) else (endpoint.host,):
                resolved = replace(endpoint, host=host)
                endpoints.setdefault(resolved.address, resolved)
        before = self._resolved.get(cluster.name)
        if before and before[0] is cluster and before[1].endpoints == tuple(endpoints.values()):
            return before[1]
        after = replace(cluster, endpoints=tuple(endpoints.values()))
        self._resolved[cluster.name] = (cluster, after)
        return after

    def _lookup(self, host: str, asked: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
        if host not in asked:
            try:
                found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
                # Sorted: the resolver rotates its answers, and an order is no change.
                asked[host] = tuple(sorted({str(entry[4][0]).partition("%")[0] for entry in found}))
            except OSError as error:
                asked[host] = self._addresses.get(host, ())
                log.warning("name_not_resolved", name=host, error=str(error), keeps=list(asked[host]))
        return asked[host]


def is_name(host: str) -> bool:
    return ":" not in host and not host.replace(".", "").isdigit()
