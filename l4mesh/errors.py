"""Errors by blame: the operator's (``ConfigError``, ``CommandError``), the network's (``CloseReason``), ours (``InternalError``)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class L4meshError(Exception):
    """Base of every error that l4mesh raises on purpose."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake in a configuration: where it is and what would be right.

    ``line`` counts from 1; 0 means that the problem belongs to the whole file.
    """

    file: str
    line: int
    key: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"


class ConfigError(L4meshError):
    """Every problem of a configuration at once; the configuration changes nothing."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class CommandError(L4meshError):
    """A command can't do what was asked; the message says in one line what the user can do about it."""


class InternalError(L4meshError):
    """A bug of ours. Crash loudly rather than go on with a state that can't be trusted."""


class Initiator(StrEnum):
    """Who ended a connection."""

    DOWNSTREAM = "downstream"
    UPSTREAM = "upstream"
    PROXY = "proxy"


class CloseReason(IntEnum):
    """Why a connection ended: exactly one each. The lower-case name is the metric label and the access log's value.

    The numbers are those of ``CLOSE_*`` in ``_native/types.pxd``; a test compares them.
    """

    DOWNSTREAM_CLOSED = 0
    """Both sides sent FIN and all bytes were delivered; downstream ended first."""
    UPSTREAM_CLOSED = 1
    """Both sides sent FIN and all bytes were delivered; upstream ended first."""
    DOWNSTREAM_RESET = 2
    UPSTREAM_RESET = 3
    DOWNSTREAM_LOST = 4
    """Keepalive or TCP_USER_TIMEOUT gave the downstream up."""
    UPSTREAM_LOST = 5
    DOWNSTREAM_LEFT = 6
    """Downstream went away while we dialled; the dial was cancelled."""
    IDLE_TIMEOUT = 7
    HALF_CLOSED_TIMEOUT = 8
    LIFETIME = 9
    CONNECT_REFUSED = 10
    CONNECT_TIMEOUT = 11
    CONNECT_UNREACHABLE = 12
    CONNECT_FAILED = 13
    """The last attempt failed with an error that has no reason of its own."""
    NO_ROUTE = 14
    NO_ENDPOINT = 15
    NO_ORIGINAL_DESTINATION = 16
    """A captured connection whose destination the kernel does not know: refused, never guessed (fail closed)."""
    SELF_CALL = 17
    """The destination is one of our own listeners."""
    LIMIT_LISTENER = 18
    LIMIT_CLUSTER = 19
    LIMIT_ENDPOINT = 20
    """Every endpoint that could be picked is at its limit."""
    LIMIT_SOURCE = 21
    PROXY_PROTOCOL_INVALID = 22
    PROXY_PROTOCOL_TIMEOUT = 23
    LOCAL_EXHAUSTED = 24
    """We ran out of ports, descriptors or memory. Never the endpoint's fault."""
    SHUTDOWN = 25
    DOWNSTREAM_TLS = 26
    """TLS with the downstream failed, in the handshake or later; the record's TLS cause says how."""
    UPSTREAM_TLS = 27
    DENIED = 28
    """A policy refuses the connection, or a changed one no longer lets it pass."""
    NO_IDENTITY = 29
    """TLS is due, and there is no certificate to show: the workload is unknown and the node has no identity."""
    PEER_CERTIFICATE = 30
    """The certificate of a live connection's peer was revoked, or has expired where that ends connections."""
    LIMIT_HANDSHAKES = 31
    """The source has too many handshakes under way."""
    LIMIT_RATE = 32
    """More new connections a second than the listener, the source, the workload or the identity may make."""
    QUEUE_TIMEOUT = 33
    """The connection waited for a place in its cluster for as long as the queue allows."""
    OVERLOAD = 34
    """Shed: the process is short of descriptors, memory or CPU."""
    ENDPOINT_REMOVED = 35
    """The endpoint has left its cluster, and its connections are closed gradually."""
    ENDPOINT_UNHEALTHY = 36
    """The endpoint fails its health checks or was ejected, and its connections are closed gradually."""
    REBALANCED = 37
    """Closed so that endpoints which joined get their share."""
    HANDED_OVER = 38
    """The connection goes on in the process that takes over from this one."""
    FAULT = 39
    """An injected fault."""

    @property
    def label(self) -> str:
        return self.name.lower()

    @property
    def initiator(self) -> Initiator:
        if self in _BY_DOWNSTREAM:
            return Initiator.DOWNSTREAM
        if self in _BY_UPSTREAM:
            return Initiator.UPSTREAM
        return Initiator.PROXY

    @property
    def is_error(self) -> bool:
        """Whether ``access_log.when: errors`` records it. Ends that applications use every day are none."""
        return self not in _ORDINARY


class Fault(IntEnum):
    """What was done to a connection on purpose. The lower-case name is the metric label and the access log's value.

    The numbers are those of ``FAULT_*`` in ``_native/types.pxd``; a test compares them.
    """

    NONE = 0
    DELAY = 1
    """Before the connect."""
    REFUSE = 2
    RESET = 3
    BLACK_HOLE = 4
    """Accepted, and then nothing."""
    SLOW = 5
    STALL = 6

    @property
    def label(self) -> str:
        return self.name.lower()


class TlsCause(IntEnum):
    """What was wrong with TLS. The lower-case name is the metric label and the access log's value.

    The numbers are those of ``TLS_*`` in ``_native/types.pxd``; a test compares them.
    """

    OK = 0
    NO_CERTIFICATE = 1
    UNKNOWN_CA = 2
    """The chain does not end in the trust bundle."""
    EXPIRED = 3
    NOT_YET_VALID = 4
    REVOKED = 5
    WRONG_IDENTITY = 6
    """A sound certificate of somebody else: another trust domain, or not among the peers that the cluster expects."""
    BAD_CERTIFICATE = 7
    """Not an X.509-SVID: wrong purpose, a CA as a leaf, no SPIFFE ID or several."""
    NOT_TLS = 8
    PROTOCOL_VERSION = 9
    NO_COMMON_PARAMETERS = 10
    BAD_RECORD = 11
    """Bytes that break the protocol, or fail to authenticate."""
    TRUNCATED = 12
    """The peer ended without close_notify: what it sent may not be all."""
    TIMEOUT = 13
    PEER_ALERT = 14
    """The peer refused; the alert says why."""
    KEY_UPDATES = 15
    """More than a hundred key updates in a second."""
    INTERNAL = 16

    @property
    def label(self) -> str:
        return self.name.lower()


ALERTS = {
    20: "bad_record_mac", 22: "record_overflow", 40: "handshake_failure", 42: "bad_certificate", 43: "unsupported_certificate",
    44: "certificate_revoked", 45: "certificate_expired", 46: "certificate_unknown", 47: "illegal_parameter", 48: "unknown_ca",
    49: "access_denied", 50: "decode_error", 51: "decrypt_error", 70: "protocol_version", 71: "insufficient_security",
    80: "internal_error", 86: "inappropriate_fallback", 90: "user_canceled", 109: "missing_extension", 110: "unsupported_extension",
    112: "unrecognized_name", 115: "unknown_psk_identity", 116: "certificate_required", 120: "no_application_protocol",
}  # fmt: skip
"""Names of TLS alerts: RFC 8446, section 6."""

_BY_DOWNSTREAM = frozenset(
    {
        CloseReason.DOWNSTREAM_CLOSED,
        CloseReason.DOWNSTREAM_RESET,
        CloseReason.DOWNSTREAM_LOST,
        CloseReason.DOWNSTREAM_LEFT,
        CloseReason.PROXY_PROTOCOL_INVALID,
        CloseReason.DOWNSTREAM_TLS,
    }
)
_BY_UPSTREAM = frozenset(
    {
        CloseReason.UPSTREAM_CLOSED,
        CloseReason.UPSTREAM_RESET,
        CloseReason.UPSTREAM_LOST,
        CloseReason.CONNECT_REFUSED,
        CloseReason.CONNECT_TIMEOUT,
        CloseReason.CONNECT_UNREACHABLE,
        CloseReason.CONNECT_FAILED,
        CloseReason.UPSTREAM_TLS,
    }
)
# PostgreSQL and many load testers end with a reset from the client side: a reset is counted, not an error by itself,
# unless it comes from upstream.
_ORDINARY = frozenset(
    {
        CloseReason.DOWNSTREAM_CLOSED,
        CloseReason.UPSTREAM_CLOSED,
        CloseReason.DOWNSTREAM_RESET,
        CloseReason.DOWNSTREAM_LEFT,
        CloseReason.IDLE_TIMEOUT,
        CloseReason.LIFETIME,
        CloseReason.SHUTDOWN,
        CloseReason.ENDPOINT_REMOVED,
        CloseReason.REBALANCED,
        CloseReason.HANDED_OVER,
    }
)
