"""The nouns of a configuration as frozen values, with no I/O and no defaults of the language (those are ``config``'s).

Units are in the names. An optional number is 0 when it is off, as the compiled tables want it. Two loads of an unchanged
file give the *same* ``Cluster`` objects, so that a plan is rebuilt in proportion to what changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network

from l4mesh.errors import Fault

Network = IPv4Network | IPv6Network

ORIGINAL_DESTINATION = "original_destination"
"""Name of the cluster whose endpoint is the address that the client dialled. Define it to tune it; it has no endpoints."""


class Balance(StrEnum):
    ROUND_ROBIN = "round_robin"
    LEAST_CONNECTIONS = "least_connections"
    RANDOM = "random"
    SOURCE_HASH = "source_hash"
    MAGLEV = "maglev"


class Capture(StrEnum):
    NONE = "none"
    REDIRECT = "redirect"
    TPROXY = "tproxy"


class Direction(StrEnum):
    """Which traffic a capturing listener takes: what leaves this host's workloads, or what comes in to them."""

    OUTBOUND = "outbound"
    INBOUND = "inbound"


class LogWhen(StrEnum):
    ALWAYS = "always"
    ERRORS = "errors"
    NEVER = "never"


class LogFormat(StrEnum):
    JSON = "json"
    LOGFMT = "logfmt"


class ProxyProtocol(StrEnum):
    OFF = "off"
    V1 = "v1"
    V2 = "v2"


class HealthKind(StrEnum):
    """What a health check speaks with an endpoint."""

    TCP = "tcp"
    TLS = "tls"
    HTTP = "http"
    REDIS = "redis"
    POSTGRESQL = "postgresql"
    MYSQL = "mysql"


class TlsMode(StrEnum):
    """What a listener takes: TLS with a client certificate only, that or plaintext, or plaintext only."""

    STRICT = "strict"
    PERMISSIVE = "permissive"
    OFF = "off"


class Action(StrEnum):
    ALLOW = "allow"
    DENY = "deny"


PortRange = tuple[int, int]
"""First and last, both included."""


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """An IP literal in canonical text and a port."""

    host: str
    port: int

    @property
    def is_v6(self) -> bool:
        return ":" in self.host

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.is_v6 else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address that can be dialled. ``host`` is an IP literal in canonical text, or a name to resolve."""

    host: str
    port: int
    weight: int = 1
    """0 to 256; 0 takes no new connections."""
    zone: str = ""

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Keepalive:
    """TCP keepalive of both legs, seconds. ``idle_s`` 0 is off."""

    idle_s: int
    interval_s: int
    count: int


@dataclass(frozen=True, slots=True)
class Identity:
    """Files in PEM; certificate and key may be the same file. ``crl`` is "" where there is none."""

    name: str
    certificate: str
    private_key: str
    trust_bundle: str
    crl: str = ""
    spiffe_id: str = ""
    """What the CA is asked for; the files are then our own, and may not be there yet. "": the files are the user's."""

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(file for file in (self.certificate, self.private_key, self.trust_bundle, self.crl) if file))


@dataclass(frozen=True, slots=True)
class CaClient:
    """Where this node fetches and renews certificates. ``identity``: name of the identity that it shows there."""

    host: str
    port: int
    identity: str
    server: str
    """SPIFFE ID that the CA must show."""
    folder: str
    trust_interval_ms: int
    retry_ms: int


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second to upstream and to downstream, of each connection. 0 is off."""

    to_upstream: int = 0
    to_downstream: int = 0
    burst: int = 0
    """Bytes that may pass at once after a pause; 0: as few as keep the rate exact."""


@dataclass(frozen=True, slots=True)
class WorkloadBandwidth:
    """Bytes a second of all connections of a workload together. 0 is off."""

    receive: int = 0
    send: int = 0
    burst: int = 0


@dataclass(frozen=True, slots=True)
class FaultRule:
    """A fault for a share, 0 to 1, of the connections from these sources; () is everybody."""

    kind: Fault
    share: float
    sources: tuple[Network, ...]
    to_upstream: bool = False
    """Which bytes are counted, where any are."""
    after_bytes: int = 0
    from_ms: int = 0
    """For how long at least, or when it happens if not by bytes; 0: for ever."""
    to_ms: int = 0
    rate: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """Something that runs on this node. Addresses are IP literals; ``identity`` is a name or ""."""

    name: str
    namespace: str
    addresses: tuple[str, ...]
    identity: str
    labels: tuple[tuple[str, str], ...] = ()
    bandwidth: WorkloadBandwidth = WorkloadBandwidth()


@dataclass(frozen=True, slots=True)
class Peers:
    """One clause of a policy: who connects. All fields that are given must match, each by one of its values.

    Identities and namespaces are exact, ``prefix*``, ``*suffix`` or ``*`` for any; service accounts are ``namespace/name``.
    """

    identities: tuple[str, ...] = ()
    not_identities: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    not_namespaces: tuple[str, ...] = ()
    service_accounts: tuple[str, ...] = ()
    not_service_accounts: tuple[str, ...] = ()
    sources: tuple[Network, ...] = ()
    not_sources: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """Who may, or may not, connect to the workloads with these labels in this namespace; "" and () are all of them.

    It matches a connection that one of ``peers`` and the ports match. Without ``peers`` it matches nothing.
    """

    name: str
    action: Action
    dry_run: bool
    namespace: str
    labels: tuple[tuple[str, str], ...]
    peers: tuple[Peers, ...]
    ports: tuple[PortRange, ...] = ()
    not_ports: tuple[PortRange, ...] = ()

    def selects(self, workload: Workload | None) -> bool:
        """Whether it applies to the workload; None is a destination that is none of this node's."""
        if workload is None:
            return not self.namespace and not self.labels
        return self.namespace in ("", workload.namespace) and set(self.labels) <= set(workload.labels)


@dataclass(frozen=True, slots=True)
class Rate:
    """``count`` new connections in ``period_s``; ``burst`` of them may come at once."""

    count: int
    period_s: int
    burst: int

    @property
    def interval_ns(self) -> int:
        return max(1, round(self.period_s * 1_000_000_000 / self.count))


@dataclass(frozen=True, slots=True)
class Rates:
    """Limits of new connections; None is off."""

    total: Rate | None = None
    source: Rate | None = None
    """Of one source address."""
    workload: Rate | None = None
    """Of one workload of this node, as the source."""
    identity: Rate | None = None
    """Of one SPIFFE ID that a downstream has shown."""


@dataclass(frozen=True, slots=True)
class ListenerTls:
    mode: TlsMode = TlsMode.OFF
    ports: tuple[tuple[tuple[PortRange, ...], TlsMode], ...] = ()
    """Destination ports with a mode of their own."""
    server_first: tuple[PortRange, ...] = ()
    identity: str = ""
    """"" is the destination workload's, else the node's."""
    allow_tls12: bool = False
    resumption: bool = True
    handshake_timeout_ms: int = 10_000
    close_expired: bool = False
    """End connections whose peer certificate has expired."""


@dataclass(frozen=True, slots=True)
class ClusterTls:
    """Mutual TLS with the endpoints. ``peers``: patterns of the identities that may answer."""

    peers: tuple[str, ...]
    identity: str = ""
    """"" is the source workload's, else the node's."""
    sni: str = ""
    allow_tls12: bool = False
    resumption: bool = True
    handshake_timeout_ms: int = 10_000
    close_expired: bool = False
    encrypt_local: bool = False
    """Endpoints that are workloads of this node are spoken to in TLS as well, which they must end themselves."""


@dataclass(frozen=True, slots=True)
class ClusterDrain:
    """Times over which live connections end because of their endpoint, each at a moment of its own; 0: they are left alone."""

    removed_ms: int = 0
    """It has left the cluster."""
    unhealthy_ms: int = 0
    """It fails its health check."""
    rebalance_ms: int = 0
    """Others have joined, and it has more connections than its share."""


@dataclass(frozen=True, slots=True)
class Overload:
    """Shares of each resource from which on the process sheds; 0: it does not look at it."""

    connections: float = 0.0
    """Of the limit of the process."""
    descriptors: float = 0.0
    memory: float = 0.0
    memory_limit_bytes: int = 0
    """Of the resident set; 0: the control group's limit, or else the machine's memory."""
    cpu: float = 0.0
    accept_queue: float = 0.0
    idle_ms: int = 10_000
    """What idle timeouts are shortened to at most."""


@dataclass(frozen=True, slots=True)
class Drain:
    """How the process ends: connections have ``time_ms`` to end by themselves, those that are left are closed over ``over_ms``."""

    time_ms: int = 20_000
    over_ms: int = 5_000


@dataclass(frozen=True, slots=True)
class Expect:
    """What must come in an answer, anywhere: ``wanted``, or what this regular expression (RE2, over bytes) matches."""

    wanted: bytes
    is_regex: bool = False


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """How the endpoints of a cluster are checked. Equal checks of one address are made once."""

    kind: HealthKind
    interval_ms: int
    fast_interval_ms: int
    """While results contradict the state."""
    timeout_ms: int
    """Of the whole check."""
    rise: int
    fall: int
    jitter: float
    """Share of an interval, 0 to 1, by up to which it is shortened or lengthened at random."""
    starts_up: bool
    """Whether an endpoint serves until its first check."""
    port: int
    """0 is the endpoint's own."""
    tls: bool
    """Under the cluster's own terms if it has TLS, and then in plaintext where the data path speaks plaintext; else without looking at
    certificates."""
    sni: str
    send: bytes
    expect: Expect | None
    path: str
    host: str
    """"" is the endpoint's address."""
    status: tuple[tuple[int, int], ...]
    """Ranges, both ends included."""
    user: str


@dataclass(frozen=True, slots=True)
class SuccessRateDetector:
    """An endpoint whose success rate is more than ``factor`` standard deviations, and more than ``margin`` (0 to 1), below the mean."""

    factor: float
    margin: float
    minimum_endpoints: int
    minimum_connections: int
    """That an endpoint must have had in the interval to be counted."""


@dataclass(frozen=True, slots=True)
class FailurePercentageDetector:
    threshold: float
    """Share of an endpoint's connections, 0 to 1, that must fail."""
    minimum_connections: int


@dataclass(frozen=True, slots=True)
class LatencyDetector:
    """An endpoint that takes longer to connect to than the median of its zone, by ``factor`` median absolute deviations and by
    ``floor``."""

    factor: float
    floor: int
    """Milliseconds."""
    minimum_endpoints: int
    minimum_connections: int


@dataclass(frozen=True, slots=True)
class OutlierDetection:
    """Which endpoints of a cluster are ejected, and for how long."""

    consecutive_failures: int
    """0 is off."""
    interval_ms: int
    base_ejection_ms: int
    max_ejection_ms: int
    max_ejected: float
    """Share of the endpoints, above 0 to 1; at least one may be ejected."""
    enforce: float
    """Share of the detections that lead to an ejection; the others are only said."""
    probe: bool
    """An ejected endpoint returns only when it can be connected."""
    connect_failure: bool
    tls_failure: bool
    early_reset_ms: int
    no_answer_ms: int
    success_rate: SuccessRateDetector | None
    failure_percentage: FailurePercentageDetector | None
    latency: LatencyDetector | None


@dataclass(frozen=True, slots=True)
class Cluster:
    name: str
    endpoints: tuple[Endpoint, ...]
    balance: Balance
    connect_timeout_ms: int
    connect_attempts: int
    connect_budget_ms: int
    idle_timeout_ms: int
    half_closed_timeout_ms: int
    lifetime_ms: int
    lifetime_jitter: float
    """Share of the lifetime, 0 to 1, by which a connection's own is shortened at random."""
    max_connections: int
    max_connections_per_endpoint: int
    keepalive: Keepalive
    user_timeout_ms: int
    proxy_protocol: ProxyProtocol
    zone_preference: bool
    slow_start_ms: int
    bounded_load: float
    """Greatest load of an endpoint over the mean, ≥ 1.0; 0 is off. For source_hash and maglev."""
    tls: ClusterTls | None = None
    """None is plaintext."""
    bandwidth: Bandwidth = Bandwidth()
    faults: tuple[FaultRule, ...] = ()
    panic_threshold: float = 0.5
    """Share of the endpoints: while fewer serve, all do."""
    queue_size: int = 0
    """Connections that may wait for a place at a limit; 0: they are refused."""
    queue_timeout_ms: int = 0
    retry_share: float = 0.2
    """Of the live connections, 0 to 1, that may be on an attempt after their first."""
    retry_minimum: int = 100
    """So many may in any case; -1: any number."""
    backoff_ms: int = 0
    """0: no pause between attempts."""
    drain: ClusterDrain = ClusterDrain()
    health_check: HealthCheck | None = None
    outlier_detection: OutlierDetection | None = None


@dataclass(frozen=True, slots=True)
class RouteMatch:
    """All that is given must match; an empty tuple matches everything. Ports are inclusive ranges."""

    destinations: tuple[Network, ...] = ()
    ports: tuple[tuple[int, int], ...] = ()
    sources: tuple[Network, ...] = ()
    sni: tuple[str, ...] = ()
    """Host names in lower case; ``*.example.org`` is every name below example.org."""
    alpn: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    match: RouteMatch
    split: tuple[tuple[str, int], ...]
    """(cluster, weight); a plain ``cluster:`` is one with weight 1."""
    faults: tuple[FaultRule, ...] = ()


@dataclass(frozen=True, slots=True)
class CaptureFilter:
    """What a capture takes in or leaves out. Users are names or numeric ids as text."""

    ports: tuple[tuple[int, int], ...] = ()
    destinations: tuple[Network, ...] = ()
    sources: tuple[Network, ...] = ()
    interfaces: tuple[str, ...] = ()
    users: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Listener:
    name: str
    binds: tuple[SocketAddress, ...]
    capture: Capture
    direction: Direction
    preserve_source: bool
    routes: tuple[Route, ...]
    default: str
    """A cluster's name (``ORIGINAL_DESTINATION`` included), or "" to reject."""
    include: CaptureFilter
    exclude: CaptureFilter
    proxy_protocol_from: tuple[Network, ...]
    proxy_protocol_timeout_ms: int
    max_connections: int
    keepalive: Keepalive
    user_timeout_ms: int
    backlog: int
    tls: ListenerTls = ListenerTls()
    rates: Rates = Rates()
    bandwidth: Bandwidth = Bandwidth()


@dataclass(frozen=True, slots=True)
class Mark:
    value: int
    mask: int

    def __str__(self) -> str:
        return f"{self.value:#x}/{self.mask:#x}"


@dataclass(frozen=True, slots=True)
class AccessLog:
    path: str
    """A file, or "-" for standard output."""
    format: LogFormat
    when: LogWhen
    sample: float
    """Share of the records that ``when`` lets through, 0 to 1."""


class OnCrash(StrEnum):
    """What becomes of new connections while a crashed data plane is replaced."""

    CLOSED = "closed"
    """The rules stay: they are refused."""
    OPEN = "open"
    """The rules go: they bypass us, without encryption and policy."""


@dataclass(frozen=True, slots=True)
class Redirect:
    """How ``l4mesh run --manage-redirect`` keeps the rules."""

    on_crash: OnCrash = OnCrash.CLOSED
    check_interval_ms: int = 5000
    """0: never looks at what is in place."""


@dataclass(frozen=True, slots=True)
class Config:
    """A whole valid configuration."""

    node_name: str
    node_zone: str
    workers: int
    """0 means one for each usable CPU."""
    admin: str
    """"host:port", "unix:path", or "" for none."""
    access_log: AccessLog
    max_connections: int
    """0 means: derive it from RLIMIT_NOFILE."""
    max_connections_per_source: int
    splice: bool
    mark: Mark
    """Put on our upstream sockets, so that our own rules leave them alone."""
    return_mark: Mark
    """Connmark of flows whose answers must come back to us."""
    listeners: Mapping[str, Listener]
    clusters: Mapping[str, Cluster]
    identities: Mapping[str, Identity] = field(default_factory=dict)
    workloads: tuple[Workload, ...] = ()
    policies: tuple[Policy, ...] = ()
    node_identity: str = ""
    """Name of the identity of what belongs to no workload, or ""."""
    ca: CaClient | None = None
    max_handshakes_per_source: int = 0
    upgrade_socket: str = ""
    """Path of the unix socket at which a new process takes over from a running one, or ""."""
    rates: Rates = Rates()
    """Of the process, over all listeners."""
    redirect: Redirect = Redirect()
    watchdog_ms: int = 0
    """A worker that is stuck for as long ends the process; 0: never."""
    faults_enabled: bool = False
    """Whether the faults of routes and clusters are in force."""
    drain: Drain = Drain()
    overload: Overload = Overload()
    digest: str = field(default="", compare=False)
    """SHA-256 over the contents of all files, hexadecimal: equal digests are equal configurations."""

    @property
    def own_mark(self) -> int:
        """The mark of the sockets that we dial with; 0 where nothing is captured, since marking needs a capability."""
        return self.mark.value if any(listener.capture != Capture.NONE for listener in self.listeners.values()) else 0

    @property
    def fault_rules(self) -> int:
        """How many faults are configured, in force or not."""
        of_routes = sum(len(route.faults) for listener in self.listeners.values() for route in listener.routes)
        return of_routes + sum(len(cluster.faults) for cluster in self.clusters.values())
