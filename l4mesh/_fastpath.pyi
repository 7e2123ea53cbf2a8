from typing_extensions import disjoint_base

from l4mesh.model import PortRange
from l4mesh.policy.plan import Packed, Pattern, Prefix, RateRows, RouteRow

ClusterCounts = tuple[int, int, list[int], int, int, int, int, int, list[int]]
Record = tuple[
    int, int, int, str, str, str, int, int, int, int, int, int, int, int, int, int, int, int,
    str, int, bool, str, int, bool, int, int, int, int, int,
]  # fmt: skip
View = tuple[int, int, int, bool, int, int, str, str, str, int, int, int, int, str, int, str, int]

@disjoint_base
class TlsContext:
    def __new__(cls, id: int, identity: str, certificates: bytes, private_key: bytes, bundle: bytes) -> TlsContext: ...

@disjoint_base
class EndpointStat:
    id: int
    def __new__(cls, id: int) -> EndpointStat: ...
    @property
    def active(self) -> int: ...
    out: int
    @property
    def warm_until_ms(self) -> int: ...
    def warm(self, from_ms: int, until_ms: int) -> None: ...
    def read(self) -> tuple[int, int, int, int, int]: ...

@disjoint_base
class ClusterStat:
    id: int
    def __new__(cls, id: int, n_workers: int, cursors: list[int]) -> ClusterStat: ...
    @property
    def active(self) -> int: ...
    panic: bool
    def read(self) -> ClusterCounts: ...
    def read_limits(self) -> tuple[int, int, int, int, int]: ...

@disjoint_base
class ListenerStat:
    id: int
    def __new__(cls, id: int, n_workers: int) -> ListenerStat: ...
    @property
    def active(self) -> int: ...
    def read(self) -> tuple[int, int, list[int]]: ...

@disjoint_base
class Cluster:
    stat: ClusterStat
    endpoint_stats: tuple[EndpointStat, ...]
    @property
    def dials(self) -> int: ...
    def __new__(
        cls,
        stat: ClusterStat,
        endpoints: list[tuple[Packed, int, int, int, EndpointStat]],
        peers: list[Pattern],
        sni: bytes,
        **settings: int,
    ) -> Cluster: ...

@disjoint_base
class Plan:
    clusters: tuple[Cluster, ...]
    def __new__(
        cls,
        generation: int,
        n_workers: int,
        clusters: list[Cluster],
        own: list[tuple[Packed, int]],
        *,
        max_connections: int,
        max_connections_per_source: int,
        mark: int,
        splice: bool,
        log_when: int,
        log_sample: float,
        error_reasons: int,
        max_handshakes_per_source: int,
        trust: int,
        rates: RateRows = ...,
    ) -> Plan: ...
    @property
    def generation(self) -> int: ...
    def add_listener(
        self,
        stat: ListenerStat,
        fds: list[int],
        ip: Packed,
        port: int,
        *,
        flags: int,
        default_cluster: int,
        max_connections: int,
        proxy_from: list[Prefix],
        proxy_timeout_ms: int,
        routes: list[RouteRow],
        tls_mode: int,
        tls_v12: bool,
        resumption: bool,
        identity: int,
        handshake_ms: int,
        close_expired: bool,
        strict: list[PortRange],
        permissive: list[PortRange],
        plain: list[PortRange],
        server_first: list[PortRange],
        rates: RateRows,
    ) -> None: ...
    def set_contexts(self, contexts: list[TlsContext | None], node_identity: int) -> None: ...
    def set_workloads(self, workloads: list[tuple[Packed, int, int, int]]) -> None: ...
    def set_revoked(self, revoked: list[tuple[bytes, bytes]], seed: int) -> None: ...
    def add_clause(
        self,
        policy: int,
        deny: bool,
        dry_run: bool,
        *,
        identities: list[Pattern],
        not_identities: list[Pattern],
        namespaces: list[Pattern],
        not_namespaces: list[Pattern],
        accounts: list[Pattern],
        not_accounts: list[Pattern],
        sources: list[Prefix],
        not_sources: list[Prefix],
        ports: list[PortRange],
        not_ports: list[PortRange],
    ) -> int: ...
    def add_policy_set(self, clauses: list[int], has_allow: bool, has_dry_allow: bool) -> int: ...
    def set_default_policies(self, policies: int) -> None: ...
    def judge(self, policies: int, identity: bytes, source: Packed, port: int) -> tuple[bool, bool, int, int, int, int]: ...
    def find_cluster(self, listener: int, destination: Packed, port: int, source: Packed, random: int) -> int: ...

@disjoint_base
class Engine:
    def __new__(cls, n_workers: int, max_connections: int, seeds: list[int], ring_records: int = 8192) -> Engine: ...
    def fileno(self) -> int: ...
    def run(self, index: int) -> None: ...
    def publish(self, plan: Plan) -> None: ...
    def offer_places(self) -> None: ...
    @property
    def bucket_overflows(self) -> int: ...
    def collect(self) -> bool: ...
    @property
    def plans_alive(self) -> int: ...
    @property
    def revocation_seed(self) -> int: ...
    def read_tls(self, index: int) -> tuple[list[list[int]], list[list[int]], int]: ...
    def stop(self) -> None: ...
    @property
    def active(self) -> int: ...
    def read_no_cluster(self) -> ClusterCounts: ...
    def read_worker(self, index: int) -> tuple[int, int, int, bool, int, int, int, int, int, int, int]: ...
    def take_records(self, index: int, limit: int) -> list[Record]: ...
    def ask_page(self, index: int, start: int, limit: int) -> None: ...
    def take_page(self, index: int) -> tuple[list[View], int] | None: ...

def connection_size() -> int: ...
def close_reasons() -> dict[str, int]: ...
def tls_causes() -> dict[str, int]: ...
def openssl_version() -> str: ...
def tls_library_address() -> int: ...
