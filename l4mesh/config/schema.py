"""The keys of the language with their defaults, and nothing about files or other sections."""

from __future__ import annotations

import dataclasses
import difflib
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WrapValidator, field_validator

from l4mesh import model
from l4mesh.config import quantities as q
from l4mesh.config.yaml import KeyPath
from l4mesh.errors import Fault
from l4mesh.model import (
    ORIGINAL_DESTINATION,
    AccessLog,
    Action,
    Balance,
    Bandwidth,
    CaClient,
    Capture,
    CaptureFilter,
    Cluster,
    ClusterDrain,
    ClusterTls,
    Direction,
    Drain,
    Endpoint,
    Expect,
    FailurePercentageDetector,
    FaultRule,
    HealthCheck,
    HealthKind,
    Identity,
    Keepalive,
    LatencyDetector,
    Listener,
    ListenerTls,
    LogFormat,
    LogWhen,
    Mark,
    Network,
    OnCrash,
    OutlierDetection,
    Overload,
    Peers,
    Policy,
    ProxyProtocol,
    Rates,
    Redirect,
    Route,
    RouteMatch,
    SocketAddress,
    SuccessRateDetector,
    TlsMode,
    Workload,
    WorkloadBandwidth,
)

T = TypeVar("T")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    @field_validator("*", mode="before")
    @classmethod
    def _has_value(cls, value: object) -> object:
        """``from:`` with nothing behind it, because what stood there was commented out, must not come to mean everybody."""
        if value is None:
            raise ValueError("has no value: give it one, or leave the key out")
        return value


def _whole(least: int, most: int) -> Callable[[object], int]:
    return lambda value: q.parse_whole(value, least, most)


def _one_of(*words: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        word = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        if word not in words:
            raise ValueError(f"must be {', '.join(words[:-1])} or {words[-1]}; got {q.shown(value)}{_meant(value, words)}")
        return str(word)

    return parse


def _meant(value: object, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), words, n=1) if isinstance(value, str) else []
    return f" (did you mean {close[0]}?)" if close else ""


def parse_name(value: object) -> str:
    if not isinstance(value, str) or not value or len(value) > 253 or not all(c.isalnum() or c in "._-/" for c in value):
        raise ValueError(f"must be a name of letters, digits, '.', '_', '-' or '/'; got {q.shown(value)}")
    return value


def parse_text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
        raise ValueError(f"must be text; got {q.shown(value)}")
    return value


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


Name = Annotated[str, PlainValidator(parse_name)]
Text = Annotated[str, PlainValidator(parse_text)]
Switch = Annotated[bool, PlainValidator(q.parse_switch)]
Duration = Annotated[int, PlainValidator(q.parse_duration_ms)]
OptionalDuration = Annotated[int, PlainValidator(q.parse_optional_duration_ms)]
ShortDuration = Annotated[int, PlainValidator(q.parse_short_duration_ms)]
OptionalShortDuration = Annotated[int, PlainValidator(q.parse_optional_short_duration_ms)]
Seconds = Annotated[int, PlainValidator(q.parse_whole_seconds)]
OptionalShare = Annotated[float, PlainValidator(q.parse_optional_share)]
Limit = Annotated[int, PlainValidator(q.parse_limit)]
Weight = Annotated[int, PlainValidator(q.parse_weight)]
Cidr = Annotated[Network, PlainValidator(q.parse_network)]
Ports = Annotated[tuple[int, int], PlainValidator(q.parse_ports)]
IdentityPattern = Annotated[str, PlainValidator(q.parse_identity_pattern)]
NamePattern = Annotated[str, PlainValidator(q.parse_name_pattern)]
ServiceAccount = Annotated[str, PlainValidator(q.parse_service_account)]
Bind = Annotated[SocketAddress, PlainValidator(q.parse_bind)]


class NodeSection(Section):
    name: Name = Field(default_factory=socket.gethostname)
    zone: Text = ""
    identity: Name | None = None


class AdminSection(Section):
    bind: Annotated[str, PlainValidator(q.parse_admin)] = "127.0.0.1:15000"


class UpgradeSection(Section):
    socket: Annotated[str, PlainValidator(q.parse_socket_path)] = ""


def _parse_log_path(value: object) -> str:
    if not (path := parse_text(value)):
        raise ValueError('must be a file, or "-" for standard output; to log nothing say when: never')
    return path


class AccessLogSection(Section):
    path: Annotated[str, PlainValidator(_parse_log_path)] = "-"
    format: Annotated[str, PlainValidator(_one_of(*LogFormat))] = "json"
    when: Annotated[str, PlainValidator(_one_of(*LogWhen))] = "errors"
    sample: Annotated[float, PlainValidator(q.parse_share)] = 1.0


def _parse_auto_limit(value: object) -> int:
    if value == "auto":
        return 0
    try:
        return q.parse_whole(value, 1, 100_000_000)
    except ValueError as error:
        raise ValueError(str(error).replace("must be", "must be auto or")) from None


def _parse_workers(value: object) -> int:
    if value == "auto":
        return 0
    try:
        return q.parse_whole(value, 1, 256)
    except ValueError as error:
        raise ValueError(str(error).replace("must be", "must be auto or")) from None


class RateSection(Section):
    rate: Annotated[model.Rate | None, PlainValidator(q.parse_arrivals)]
    burst: Annotated[int | None, PlainValidator(_whole(1, 100_000_000))] = None


def _read_rate(value: object, section: Callable[[object], RateSection]) -> model.Rate | None:
    if not isinstance(value, dict):
        return q.parse_arrivals(value)
    long_form = section(value)
    if not long_form.rate:
        return None
    rate = dataclasses.replace(long_form.rate, burst=long_form.burst or long_form.rate.burst)
    if rate.burst * rate.interval_ns > q.MAX_DURATION_MS * 1_000_000:
        raise ValueError(f"must have a burst of at most 366d of its rate; got {rate.burst}")
    return rate


RateField = Annotated[RateSection | None, WrapValidator(_read_rate)]


class RatesSection(Section):
    rate: RateField = None
    rate_per_source: RateField = None
    rate_per_workload: RateField = None
    rate_per_identity: RateField = None


def make_rates(section: RatesSection) -> Rates:
    return Rates(section.rate, section.rate_per_source, section.rate_per_workload, section.rate_per_identity)  # type: ignore[arg-type]


class ProcessLimitsSection(RatesSection):
    connections: Annotated[int, PlainValidator(_parse_auto_limit)] = 0
    connections_per_source: Limit = 0
    handshakes_per_source: Limit = 512


class DrainSection(Section):
    time: OptionalDuration = 20_000
    over: OptionalShortDuration = 5_000


class OverloadSection(Section):
    connections: OptionalShare = 0.85
    descriptors: OptionalShare = 0.85
    memory: OptionalShare = 0.85
    memory_limit: Annotated[int, PlainValidator(q.parse_auto_size)] = 0
    cpu: OptionalShare = 0.0
    accept_queue: OptionalShare = 0.0
    idle: Duration = 10_000


def _overload_off(value: object) -> object:
    return OverloadSection.model_construct(connections=0.0, descriptors=0.0, memory=0.0) if q.is_off(value) else value


class MarksSection(Section):
    upstream: Annotated[Mark, PlainValidator(q.parse_mark)] = Mark(0x539, 0xFFF)
    returned: Annotated[Mark, PlainValidator(q.parse_mark)] = Mark(0x111, 0xFFF)


class RedirectSection(Section):
    on_crash: Annotated[str, PlainValidator(_one_of(*OnCrash))] = "closed"
    check_interval: OptionalDuration = 5000


WATCHDOG_MS = 2000
WATCHDOG_LEAST_MS = 500
"""Less than a busy machine may keep a thread from what it does."""


def _parse_watchdog(value: object) -> int:
    limit_ms = q.parse_optional_short_duration_ms(value)
    if limit_ms and limit_ms < WATCHDOG_LEAST_MS:
        raise ValueError(f"must be off or at least {WATCHDOG_LEAST_MS}ms; got {q.shown(value)}")
    return limit_ms


class KeepaliveSection(Section):
    idle: Seconds = 60
    interval: Seconds = 10
    count: Annotated[int, PlainValidator(_whole(1, 127))] = 6


def _keepalive_off(value: object) -> object:
    """``off`` keeps the type of the section: an idle time of 0 says so."""
    return KeepaliveSection.model_construct(idle=0, interval=0, count=0) if q.is_off(value) else value


KeepaliveField = Annotated[KeepaliveSection, BeforeValidator(_keepalive_off)]


class MatchSection(Section):
    destinations: list[Cidr] = []
    ports: list[Ports] = []
    sources: list[Cidr] = []
    sni: list[Annotated[str, PlainValidator(q.parse_server_name)]] = []
    alpn: list[Annotated[str, PlainValidator(q.parse_alpn)]] = []


class SplitSection(Section):
    cluster: Name
    weight: Weight


def _parse_burst(value: object) -> int:
    if value == "auto":
        return 0
    try:
        return q.parse_size(value)
    except ValueError as error:
        raise ValueError(str(error).replace("must be", "must be auto or")) from None


Rate = Annotated[int, PlainValidator(q.parse_rate)]
OptionalRate = Annotated[int, PlainValidator(q.parse_optional_rate)]
Burst = Annotated[int, PlainValidator(_parse_burst)]


class BandwidthSection(Section):
    to_upstream: OptionalRate = 0
    to_downstream: OptionalRate = 0
    burst: Burst = 0


class WorkloadBandwidthSection(Section):
    receive: OptionalRate = 0
    send: OptionalRate = 0
    burst: Burst = 0


DurationRange = Annotated[tuple[int, int], PlainValidator(q.parse_duration_range_ms)]


def _parse_after(value: object) -> tuple[int, int]:
    """(bytes, 0) or (0, ms)."""
    try:
        return q.parse_size(value), 0
    except ValueError:
        pass
    try:
        return 0, q.parse_duration_ms(value)
    except ValueError:
        raise ValueError(f"must be a size such as 64KiB, or a duration such as 5s; got {q.shown(value)}") from None


def _parse_black_hole(value: object) -> int:
    """Milliseconds; 0: until the client gives up."""
    if value is True or value == "on":
        return 0
    try:
        return q.parse_duration_ms(value)
    except ValueError as error:
        raise ValueError(str(error).replace("must be", "must be on, or")) from None


def _parse_refuse(value: object) -> bool:
    if value is not True and value != "on":
        raise ValueError(f"must be on; got {q.shown(value)}: without this fault leave its entry out")
    return True


ByteDirection = Annotated[str | None, PlainValidator(_one_of("to_upstream", "to_downstream"))]


class ResetFaultSection(Section):
    after: Annotated[tuple[int, int], PlainValidator(_parse_after)]
    direction: ByteDirection = None


class StallFaultSection(Section):
    for_: DurationRange = Field(alias="for")
    after: Annotated[int, PlainValidator(q.parse_size)] = 0
    direction: ByteDirection = None


def _parse_fault_share(value: object) -> float:
    share = q.parse_share(value)
    if share == 0:
        raise ValueError("must be above 0%: without this fault leave its entry out")
    return share


class FaultSection(Section):
    share: Annotated[float, PlainValidator(_parse_fault_share)]
    sources: Annotated[list[Cidr] | None, Field(min_length=1)] = None
    delay: DurationRange | None = None
    refuse: Annotated[bool, PlainValidator(_parse_refuse)] | None = None
    reset: ResetFaultSection | None = None
    black_hole: Annotated[int, PlainValidator(_parse_black_hole)] | None = None
    slow: Rate | None = None
    stall: StallFaultSection | None = None

    @property
    def kinds(self) -> list[str]:
        """Those that are given."""
        return [kind.label for kind in Fault if kind and getattr(self, kind.label) is not None]


class FaultsSection(Section):
    enabled: Switch = False


class RouteSection(Section):
    match: MatchSection = MatchSection()
    cluster: Name | None = None
    split: list[SplitSection] = []
    faults: list[FaultSection] = []


class FilterSection(Section):
    ports: list[Ports] = []
    destinations: list[Cidr] = []
    sources: list[Cidr] = []
    interfaces: list[Annotated[str, PlainValidator(q.parse_interface)]] = []
    users: list[Annotated[str, PlainValidator(q.parse_host_user)]] = []


class ProxySourcesSection(Section):
    from_: list[Cidr] = Field(alias="from")
    timeout: ShortDuration = 5000


class ListenerLimitsSection(RatesSection):
    connections: Limit = 0


Version = Annotated[str, PlainValidator(lambda value: _one_of("1.2", "1.3")(str(value)))]


class PortTlsSection(Section):
    ports: Annotated[list[Ports], Field(min_length=1)]
    mode: Annotated[str, PlainValidator(_one_of(*TlsMode))]


class ListenerTlsSection(Section):
    mode: Annotated[str, PlainValidator(_one_of(*TlsMode))] = "strict"
    ports: list[PortTlsSection] = []
    server_first: list[Ports] = []
    identity: Name | None = None
    min_version: Version = "1.3"
    resumption: Switch = True
    handshake_timeout: ShortDuration = 10_000
    close_expired: Switch = False


class ClusterTlsSection(Section):
    mode: Annotated[str, PlainValidator(_one_of("mutual", "off"))] = "mutual"
    peers: list[IdentityPattern] = []
    identity: Name | None = None
    sni: Annotated[str | None, PlainValidator(q.parse_server_name)] = None
    min_version: Version = "1.3"
    resumption: Switch = True
    handshake_timeout: ShortDuration = 10_000
    close_expired: Switch = False
    encrypt_local: Switch = False


SpiffeId = Annotated[str, PlainValidator(q.parse_spiffe_id)]


class IdentitySection(Section):
    name: Name
    certificate: Text = ""
    private_key: Text = ""
    trust_bundle: Text = ""
    crl: Text = ""
    spiffe_id: SpiffeId | None = None


class CaSection(Section):
    address: Annotated[tuple[str, int], PlainValidator(q.parse_endpoint_address)]
    identity: Name
    server: SpiffeId | None = None
    folder: Text = "/var/lib/l4mesh"
    trust_interval: Duration = 600_000
    retry: Duration = 5000


def _parse_labels(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, str) and k and v for k, v in value.items()):
        raise ValueError(f"must be labels such as {{app: web}}, all of them text; got {q.shown(value)}")
    return tuple(sorted(value.items()))


Labels = Annotated[tuple[tuple[str, str], ...], PlainValidator(_parse_labels)]


class WorkloadSection(Section):
    name: Name
    namespace: Name = "default"
    addresses: Annotated[list[Annotated[str, PlainValidator(q.parse_ip)]], Field(min_length=1)]
    identity: Name | None = None
    labels: Labels = ()
    bandwidth: WorkloadBandwidthSection = WorkloadBandwidthSection()


class PeersSection(Section):
    identities: list[IdentityPattern] = []
    not_identities: list[IdentityPattern] = []
    namespaces: list[NamePattern] = []
    not_namespaces: list[NamePattern] = []
    service_accounts: list[ServiceAccount] = []
    not_service_accounts: list[ServiceAccount] = []
    sources: list[Cidr] = []
    not_sources: list[Cidr] = []


class PolicySection(Section):
    name: Name
    action: Annotated[str, PlainValidator(_one_of(*Action))]
    dry_run: Switch = False
    namespace: Name | None = None
    workloads: Labels = ()
    from_: list[PeersSection] | None = Field(default=None, alias="from")
    ports: list[Ports] = []
    not_ports: list[Ports] = []


class ListenerSection(Section):
    name: Name
    bind: Annotated[list[Bind], BeforeValidator(_as_list), Field(min_length=1)]
    capture: Annotated[str, PlainValidator(_one_of(*Capture))] = "none"
    direction: Annotated[str | None, PlainValidator(_one_of(*Direction))] = None
    preserve_source: Switch = False
    routes: list[RouteSection] = []
    cluster: Name | None = None
    default: Name | None = None
    include: FilterSection = FilterSection()
    exclude: FilterSection = FilterSection()
    proxy_protocol: ProxySourcesSection | None = None
    limits: ListenerLimitsSection = ListenerLimitsSection()
    keepalive: KeepaliveField = KeepaliveSection()
    user_timeout: OptionalShortDuration = 0
    backlog: Annotated[int, PlainValidator(_whole(1, 65535))] = 4096
    tls: ListenerTlsSection | None = None
    bandwidth_per_connection: BandwidthSection = BandwidthSection()


class RetryBudgetSection(Section):
    share: Annotated[float, PlainValidator(q.parse_share)] = 0.2
    minimum: Annotated[int, PlainValidator(_whole(0, 100_000_000))] = 100


def _retry_budget_off(value: object) -> object:
    """``off`` keeps the type of the section: a minimum of -1 says so."""
    return RetryBudgetSection.model_construct(share=0.0, minimum=-1) if q.is_off(value) else value


RetryBudgetField = Annotated[RetryBudgetSection, BeforeValidator(_retry_budget_off)]


class ConnectSection(Section):
    timeout: ShortDuration = 1000
    attempts: Annotated[int, PlainValidator(_whole(1, 8))] = 3
    budget: ShortDuration | None = None
    backoff: OptionalShortDuration = 0
    retry_budget: RetryBudgetField = RetryBudgetSection()

    @property
    def budget_ms(self) -> int:
        """Time for every attempt and the longest pauses between them, unless told."""
        pauses = sum(min(2**pause, 10) for pause in range(self.attempts - 1))
        return self.budget or min(self.timeout * self.attempts + self.backoff * pauses, q.MAX_SHORT_MS)


class TimeoutsSection(Section):
    idle: OptionalDuration = 3_600_000
    half_closed: OptionalDuration = 300_000
    lifetime: OptionalDuration = 0
    lifetime_jitter: Annotated[float, PlainValidator(q.parse_share)] = 0.1


class QueueSection(Section):
    size: Annotated[int, PlainValidator(_whole(1, 100_000_000))] = 1000
    timeout: Annotated[int, PlainValidator(q.parse_queue_timeout_ms)] = 5000


QueueField = Annotated[QueueSection | None, BeforeValidator(lambda value: None if q.is_off(value) else value)]


class ClusterLimitsSection(Section):
    connections: Limit = 0
    connections_per_endpoint: Limit = 0
    queue: QueueField = None


class ClusterDrainSection(Section):
    removed: OptionalShortDuration = 0
    unhealthy: OptionalShortDuration = 0
    rebalance: OptionalShortDuration = 0


class EndpointSection(Section):
    address: Annotated[tuple[str, int], PlainValidator(q.parse_endpoint_address)]
    weight: Weight = 1
    zone: Text = ""


def _read_endpoint(value: object, section: Callable[[object], EndpointSection]) -> Endpoint:
    if isinstance(value, str):
        return q.make_endpoint(value)
    long_form = section(value)
    return Endpoint(*long_form.address, long_form.weight, long_form.zone)


class HealthCheckSection(Section):
    type: Annotated[str, PlainValidator(_one_of(*HealthKind))] = "tcp"
    interval: Duration = 2000
    fast_interval: Duration | None = None
    timeout: Duration = 1000
    rise: Annotated[int, PlainValidator(_whole(1, 100))] = 2
    fall: Annotated[int, PlainValidator(_whole(1, 100))] = 3
    jitter: Annotated[float, PlainValidator(q.parse_share)] = 0.1
    initial: Annotated[str, PlainValidator(_one_of("up", "down"))] = "up"
    port: Annotated[int, PlainValidator(_whole(1, 65535))] = 0
    tls: Annotated[bool | None, PlainValidator(q.parse_switch)] = None
    sni: Annotated[str, PlainValidator(q.parse_server_name)] = ""
    send: Annotated[bytes, PlainValidator(q.parse_payload)] = b""
    expect: Annotated[Expect | None, PlainValidator(q.parse_expect)] = None
    path: Annotated[str, PlainValidator(q.parse_http_path)] = "/"
    host: Annotated[str, PlainValidator(q.parse_http_host)] = ""
    status: Annotated[list[Annotated[tuple[int, int], PlainValidator(q.parse_status)]], Field(min_length=1)] = [(200, 399)]
    user: Annotated[str, PlainValidator(q.parse_user)] = "l4mesh"


def _health_check_off(value: object) -> object:
    return None if q.is_off(value) else value


def _or_off(parse: Callable[[object], int]) -> Callable[[object], int]:
    def read(value: object) -> int:
        if q.is_off(value):
            return 0
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(str(error).replace("must be", "must be off or")) from None

    return read


class SignalsSection(Section):
    connect_failure: Switch = True
    tls_failure: Switch = True
    early_reset: OptionalDuration = 1000
    no_answer: OptionalDuration = 1000


Factor = Annotated[float, PlainValidator(q.parse_factor)]
Volume = Annotated[int, PlainValidator(_whole(1, 1_000_000))]
Few = Annotated[int, PlainValidator(_whole(3, 1_000_000))]


class SuccessRateSection(Section):
    factor: Factor = 1.9
    margin: Annotated[float, PlainValidator(q.parse_share)] = 0.1
    minimum_endpoints: Few = 5
    minimum_connections: Volume = 100


class FailurePercentageSection(Section):
    threshold: Annotated[float, PlainValidator(q.parse_share)] = 0.85
    minimum_connections: Volume = 50


class LatencySection(Section):
    factor: Factor = 5.0
    floor: Duration = 100
    minimum_endpoints: Few = 3
    minimum_connections: Volume = 10


def _switched(value: object) -> object:
    """A section that may be ``off``, or ``on`` with its defaults."""
    if q.is_off(value):
        return None
    return {} if value is True or value == "on" else value


class OutlierSection(Section):
    consecutive_failures: Annotated[int, PlainValidator(_or_off(_whole(1, 1_000_000)))] = 5
    interval: Duration = 10_000
    base_ejection: Duration = 30_000
    max_ejection: Duration = 300_000
    max_ejected: Annotated[float, PlainValidator(q.parse_share)] = 0.5
    enforce: Annotated[float, PlainValidator(q.parse_share)] = 1.0
    probe: Switch = False
    signals: SignalsSection = SignalsSection()
    success_rate: Annotated[SuccessRateSection | None, BeforeValidator(_switched)] = SuccessRateSection()
    failure_percentage: Annotated[FailurePercentageSection | None, BeforeValidator(_switched)] = None
    latency: Annotated[LatencySection | None, BeforeValidator(_switched)] = None


class ClusterSection(Section):
    name: Name
    endpoints: list[Annotated[EndpointSection, WrapValidator(_read_endpoint)]] = []
    balance: Annotated[str, PlainValidator(_one_of(*Balance))] = "least_connections"
    connect: ConnectSection = ConnectSection()
    timeouts: TimeoutsSection = TimeoutsSection()
    limits: ClusterLimitsSection = ClusterLimitsSection()
    keepalive: KeepaliveField = KeepaliveSection()
    user_timeout: OptionalShortDuration = 0
    proxy_protocol: Annotated[str, PlainValidator(_one_of(*ProxyProtocol))] = "off"
    zone_preference: Switch = True
    slow_start: OptionalDuration = 0
    bounded_load: Annotated[float, PlainValidator(q.parse_bounded_load)] = 0.0
    tls: ClusterTlsSection | None = None
    panic_threshold: OptionalShare = 0.5
    drain: ClusterDrainSection = ClusterDrainSection()
    health_check: Annotated[HealthCheckSection | None, BeforeValidator(_health_check_off)] = None
    bandwidth_per_connection: BandwidthSection = BandwidthSection()
    faults: list[FaultSection] = []
    outlier_detection: Annotated[OutlierSection | None, BeforeValidator(_switched)] = None


class FileSection(Section):
    """What one file may hold: any part of the whole."""

    node: NodeSection | None = None
    workers: Annotated[int | None, PlainValidator(_parse_workers)] = None
    admin: AdminSection | None = None
    upgrade: UpgradeSection | None = None
    access_log: AccessLogSection | None = None
    limits: ProcessLimitsSection | None = None
    splice: Annotated[bool | None, PlainValidator(q.parse_switch)] = None
    marks: MarksSection | None = None
    drain: DrainSection | None = None
    overload: Annotated[OverloadSection, BeforeValidator(_overload_off)] | None = None
    ca: CaSection | None = None
    redirect: RedirectSection | None = None
    watchdog: Annotated[int | None, PlainValidator(_parse_watchdog)] = None
    faults: FaultsSection | None = None
    identities: list[IdentitySection] = []
    workloads: list[WorkloadSection] = []
    policies: list[PolicySection] = []
    listeners: list[ListenerSection] = []
    clusters: list[ClusterSection] = []


SINGLE_KEYS: tuple[
    Literal[
        "node", "workers", "admin", "upgrade", "access_log", "limits", "splice", "marks", "drain", "overload", "ca", "redirect",
        "watchdog",
        "faults",
    ],
    ...,
] = (
    "node", "workers", "admin", "upgrade", "access_log", "limits", "splice", "marks", "drain", "overload", "ca", "redirect", "watchdog",
    "faults",
)  # fmt: skip


def make_drain(section: DrainSection) -> Drain:
    return Drain(section.time, section.over)


def make_overload(section: OverloadSection) -> Overload:
    return Overload(
        section.connections, section.descriptors, section.memory, section.memory_limit, section.cpu, section.accept_queue, section.idle
    )


def make_keepalive(section: KeepaliveSection) -> Keepalive:
    return Keepalive(section.idle, section.interval, section.count)


def make_redirect(section: RedirectSection) -> Redirect:
    return Redirect(OnCrash(section.on_crash), section.check_interval)


def make_filter(section: FilterSection) -> CaptureFilter:
    return CaptureFilter(**{key: tuple(values) for key, values in section})


def make_route(section: RouteSection) -> Route:
    match = RouteMatch(**{key: tuple(values) for key, values in section.match})
    split = ((section.cluster, 1),) if section.cluster else tuple((part.cluster, part.weight) for part in section.split)
    return Route(match, split, make_faults(section.faults))


def make_faults(sections: Sequence[FaultSection]) -> tuple[FaultRule, ...]:
    """Those of one kind; any other is a mistake that is named elsewhere."""
    return tuple(_make_fault(section) for section in sections if len(section.kinds) == 1)


def _make_fault(section: FaultSection) -> FaultRule:
    kind = Fault[section.kinds[0].upper()]
    least = most = after = rate = 0
    direction = None
    if section.delay:
        least, most = section.delay
    elif section.reset:
        after, least = section.reset.after
        most, direction = least, section.reset.direction
    elif section.black_hole:
        least = most = section.black_hole
    elif section.slow:
        rate = section.slow
    elif section.stall:
        (least, most), after, direction = section.stall.for_, section.stall.after, section.stall.direction
    return FaultRule(kind, section.share, tuple(section.sources or ()), direction == "to_upstream", after, least, most, rate)


def make_bandwidth(section: BandwidthSection) -> Bandwidth:
    return Bandwidth(section.to_upstream, section.to_downstream, section.burst)


def make_listener(section: ListenerSection) -> Listener:
    capture = Capture(section.capture)
    direction = section.direction or (Direction.INBOUND if capture == Capture.TPROXY else Direction.OUTBOUND)
    default = section.default or section.cluster or "reject"
    return Listener(
        name=section.name,
        binds=tuple(section.bind),
        capture=capture,
        direction=Direction(direction),
        preserve_source=section.preserve_source,
        routes=tuple(map(make_route, section.routes)),
        default="" if default == "reject" else default,
        include=make_filter(section.include),
        exclude=make_filter(section.exclude),
        proxy_protocol_from=tuple(section.proxy_protocol.from_) if section.proxy_protocol else (),
        proxy_protocol_timeout_ms=section.proxy_protocol.timeout if section.proxy_protocol else 0,
        max_connections=section.limits.connections,
        keepalive=make_keepalive(section.keepalive),
        user_timeout_ms=section.user_timeout,
        backlog=section.backlog,
        tls=make_listener_tls(section.tls) if section.tls else ListenerTls(),
        rates=make_rates(section.limits),
        bandwidth=make_bandwidth(section.bandwidth_per_connection),
    )


def make_listener_tls(section: ListenerTlsSection) -> ListenerTls:
    return ListenerTls(
        mode=TlsMode(section.mode),
        ports=tuple((tuple(part.ports), TlsMode(part.mode)) for part in section.ports),
        server_first=tuple(section.server_first),
        identity=section.identity or "",
        allow_tls12=section.min_version == "1.2",
        resumption=section.resumption,
        handshake_timeout_ms=section.handshake_timeout,
        close_expired=section.close_expired,
    )


def make_cluster_tls(section: ClusterTlsSection) -> ClusterTls:
    return ClusterTls(
        peers=tuple(section.peers),
        identity=section.identity or "",
        sni=section.sni or "",
        allow_tls12=section.min_version == "1.2",
        resumption=section.resumption,
        handshake_timeout_ms=section.handshake_timeout,
        close_expired=section.close_expired,
        encrypt_local=section.encrypt_local,
    )


def make_identity(section: IdentitySection, folder: Path) -> Identity:
    """Relative paths count from the folder of the file that names them. One that comes from the CA has no files yet."""
    if section.spiffe_id:
        return Identity(section.name, "", "", "", "", section.spiffe_id)
    crl = str(folder / section.crl) if section.crl else ""
    return Identity(
        section.name, str(folder / section.certificate), str(folder / section.private_key), str(folder / section.trust_bundle), crl
    )


def make_ca(section: CaSection, folder: Path, spiffe_id: str) -> CaClient:
    """``spiffe_id``: the node's, for the trust domain."""
    host, port = section.address
    server = section.server or f"{trust_domain(spiffe_id)}l4mesh/ca"
    return CaClient(host, port, section.identity, server, str(folder / section.folder), section.trust_interval, section.retry)


def trust_domain(spiffe_id: str) -> str:
    """ "spiffe://domain/" """
    return "/".join(spiffe_id.split("/", 3)[:3]) + "/"


def place_identity(identity: Identity, ca: CaClient | None) -> Identity:
    """An identity with its files in the CA's folder, if it comes from there. Key and certificate share one: a rename renews both."""
    if not identity.spiffe_id or not ca:
        return identity
    folder = Path(ca.folder)
    credential = folder / "node.pem" if identity.name == ca.identity else folder / "identities" / f"{identity.name}.pem"
    return Identity(
        identity.name, str(credential), str(credential), str(folder / "bundle.pem"), str(folder / "crl.pem"), identity.spiffe_id
    )


def make_workload(section: WorkloadSection) -> Workload:
    bandwidth = WorkloadBandwidth(section.bandwidth.receive, section.bandwidth.send, section.bandwidth.burst)
    return Workload(section.name, section.namespace, tuple(section.addresses), section.identity or "", section.labels, bandwidth)


def make_policy(section: PolicySection) -> Policy:
    clauses = [PeersSection()] if section.from_ is None else section.from_
    return Policy(
        name=section.name,
        action=Action(section.action),
        dry_run=section.dry_run,
        namespace=section.namespace or "",
        labels=section.workloads,
        peers=tuple(Peers(**{key: tuple(values) for key, values in clause}) for clause in clauses),
        ports=tuple(section.ports),
        not_ports=tuple(section.not_ports),
    )


def make_cluster(section: ClusterSection) -> Cluster:
    connect = section.connect
    return Cluster(
        name=section.name,
        endpoints=tuple(section.endpoints),  # type: ignore[arg-type]
        balance=Balance(section.balance),
        connect_timeout_ms=connect.timeout,
        connect_attempts=connect.attempts,
        connect_budget_ms=connect.budget_ms,
        idle_timeout_ms=section.timeouts.idle,
        half_closed_timeout_ms=section.timeouts.half_closed,
        lifetime_ms=section.timeouts.lifetime,
        lifetime_jitter=section.timeouts.lifetime_jitter,
        max_connections=section.limits.connections,
        max_connections_per_endpoint=section.limits.connections_per_endpoint,
        keepalive=make_keepalive(section.keepalive),
        user_timeout_ms=section.user_timeout,
        proxy_protocol=ProxyProtocol(section.proxy_protocol),
        zone_preference=section.zone_preference,
        slow_start_ms=section.slow_start,
        bounded_load=section.bounded_load,
        tls=make_cluster_tls(section.tls) if section.tls and section.tls.mode == "mutual" else None,
        panic_threshold=section.panic_threshold,
        queue_size=section.limits.queue.size if section.limits.queue else 0,
        queue_timeout_ms=section.limits.queue.timeout if section.limits.queue else 0,
        retry_share=connect.retry_budget.share,
        retry_minimum=connect.retry_budget.minimum,
        backoff_ms=connect.backoff,
        drain=ClusterDrain(section.drain.removed, section.drain.unhealthy, section.drain.rebalance),
        health_check=make_health_check(section) if section.health_check else None,
        bandwidth=make_bandwidth(section.bandwidth_per_connection),
        faults=make_faults(section.faults),
        outlier_detection=make_outlier_detection(section.outlier_detection) if section.outlier_detection else None,
    )


def make_health_check(cluster: ClusterSection) -> HealthCheck:
    section = cluster.health_check
    assert section is not None
    kind = HealthKind(section.type)
    secured = cluster.tls is not None and cluster.tls.mode == "mutual"
    # Another port is another server, of which the cluster's TLS says nothing.
    talks_as_the_cluster = secured and not section.port and (kind != HealthKind.TCP or section.expect is not None)
    tls = section.tls if section.tls is not None else kind == HealthKind.TLS or talks_as_the_cluster
    return HealthCheck(
        kind=kind,
        interval_ms=section.interval,
        fast_interval_ms=section.fast_interval or max(1, section.interval // 4),
        timeout_ms=section.timeout,
        rise=section.rise,
        fall=section.fall,
        jitter=section.jitter,
        starts_up=section.initial == "up",
        port=section.port,
        tls=tls,
        sni=section.sni or (cluster.tls.sni or "" if cluster.tls and tls else ""),
        send=section.send,
        expect=section.expect,
        path=section.path,
        host=section.host,
        status=tuple(section.status),
        user=section.user,
    )


def make_outlier_detection(section: OutlierSection) -> OutlierDetection:
    signals, rate, failures, latency = section.signals, section.success_rate, section.failure_percentage, section.latency
    return OutlierDetection(
        consecutive_failures=section.consecutive_failures,
        interval_ms=section.interval,
        base_ejection_ms=section.base_ejection,
        max_ejection_ms=section.max_ejection,
        max_ejected=section.max_ejected,
        enforce=section.enforce,
        probe=section.probe,
        connect_failure=signals.connect_failure,
        tls_failure=signals.tls_failure,
        early_reset_ms=signals.early_reset,
        no_answer_ms=signals.no_answer,
        success_rate=SuccessRateDetector(**dict(rate)) if rate else None,
        failure_percentage=FailurePercentageDetector(**dict(failures)) if failures else None,
        latency=LatencyDetector(**dict(latency)) if latency else None,
    )


def default_original_destination() -> Cluster:
    return make_cluster(ClusterSection(name=ORIGINAL_DESTINATION))


def make_access_log(section: AccessLogSection) -> AccessLog:
    return AccessLog(section.path, LogFormat(section.format), LogWhen(section.when), section.sample)


def validate(section: type[T], data: object) -> tuple[T | None, list[tuple[KeyPath, str]]]:
    """The section, or all that is wrong with it as (key path, message)."""
    assert issubclass(section, BaseModel)
    try:
        return section.model_validate(data), []
    except pydantic.ValidationError as error:
        return None, [(path, message) for detail in error.errors(include_url=False) for path, message in [_reword(section, detail)]]


def _reword(section: type[BaseModel], detail: Any) -> tuple[KeyPath, str]:
    """A problem in the words of the language instead of pydantic's."""
    path = tuple(detail["loc"])
    kind = detail["type"]
    if kind == "value_error":
        return path, str(detail["ctx"]["error"])
    if kind == "extra_forbidden":
        known = _keys_at(section, path[:-1])
        meant = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.75)
        hint = f"did you mean {meant[0]}?" if meant else f"known here: {', '.join(known)}"
        return path, f"is not a known key; {hint}"
    if kind == "missing":
        return path, "is missing"
    if kind == "list_type":
        return path, f"must be a list; got {q.shown(detail['input'])}"
    if kind == "too_short":
        return path, "must not be empty"
    return path, f"must be a mapping of keys; got {q.shown(detail['input'])}"


def _keys_at(section: type[BaseModel], path: KeyPath) -> list[str]:
    current: Any = section
    for step in path:
        if isinstance(step, int):
            continue
        field = next((f for n, f in current.model_fields.items() if (f.alias or n) == step), None)
        current = _section_in(field.annotation) if field else None
        if current is None:
            return []
    return sorted(field.alias or name for name, field in current.model_fields.items())


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation such as ``list[Annotated[X | None, …]]`` is about."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _section_in(part)
        if found:
            return found
    return None
