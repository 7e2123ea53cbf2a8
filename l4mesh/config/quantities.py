"""Single values of the language. Each function takes what YAML gave and returns a number or an object of the model.

All raise ValueError whose text goes on after the key: "must be …; got …".
"""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from collections.abc import Callable
from typing import Any

import re2

from l4mesh.model import Endpoint, Expect, Mark, Network, Rate, SocketAddress

_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)(ms|s|m|h|d)")
_DURATION_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)([kKMG]i?B|B)")
_SIZE_BYTES = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "kiB": 1 << 10,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}
_SHARE = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)%")
_ARRIVALS = re.compile(r"(\d{1,9})/([smh])")
_ARRIVALS_S = {"s": 1, "m": 60, "h": 3600}
_HOST_NAME = re.compile(r"(?=.{1,253}$)(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")
_MARK = re.compile(r"(0x[0-9a-fA-F]{1,8}|0|[1-9][0-9]{0,9})/(0x[0-9a-fA-F]{1,8}|0|[1-9][0-9]{0,9})")
MAX_DURATION_MS = 366 * 86_400_000
MAX_SHORT_MS = 7 * 86_400_000
"""Of what workers count in 32 bits, and the kernel in 31."""
MAX_WEIGHT = 256
MAX_PAYLOAD_BYTES = 4096
MAX_SIZE = 1 << 40
MIN_RATE = 1000
MAX_RATE = 100 * 10**9
MAX_ARRIVALS_PER_S = 1_000_000
MAX_QUEUE_TIMEOUT_MS = 60_000


def shown(value: object) -> str:
    """A value as a message shows it: as YAML has it, never longer than a line wants it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse_switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if value in ("on", "off"):
        return value == "on"
    raise ValueError(f"must be on or off; got {shown(value)}")


def is_off(value: object) -> bool:
    return value is False or value == "off"


def parse_duration_ms(value: object) -> int:
    """Milliseconds, at least 1."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise ValueError(f"must be a duration with its unit, such as 250ms, 5s, 1h or 1d; got {shown(value)}")
    ms = round(float(match[1]) * _DURATION_MS[match[2]])
    if not 1 <= ms <= MAX_DURATION_MS:
        raise ValueError(f"must be between 1ms and 366d; got {shown(value)}")
    return ms


def parse_optional_duration_ms(value: object, parse: Callable[[object], int] = parse_duration_ms) -> int:
    """Milliseconds; 0 for off."""
    if is_off(value):
        return 0
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(str(error).replace("1h or 1d", "1h, 1d, or off")) from None


def parse_short_duration_ms(value: object) -> int:
    ms = parse_duration_ms(value)
    if ms > MAX_SHORT_MS:
        raise ValueError(f"must be between 1ms and 7d; got {shown(value)}")
    return ms


def parse_optional_short_duration_ms(value: object) -> int:
    return parse_optional_duration_ms(value, parse_short_duration_ms)


def parse_duration_range_ms(value: object) -> tuple[int, int]:
    """Least and greatest, milliseconds; a single duration is both."""
    least, dash, most = value.partition("-") if isinstance(value, str) else ("", "", "")
    try:
        pair = parse_duration_ms(least), parse_duration_ms(most if dash else least)
    except ValueError:
        raise ValueError(f"must be a duration such as 250ms, or a range such as 100ms-2s; got {shown(value)}") from None
    if pair[0] > pair[1]:
        raise ValueError(f"must have the shorter duration first; got {shown(value)}")
    return pair


def parse_size(value: object) -> int:
    """Bytes, at least 1."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise ValueError(f"must be a size with its unit, such as 512B, 64KiB or 10MB; got {shown(value)}")
    size = round(float(match[1]) * _SIZE_BYTES[match[2]])
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"must be between 1B and 1024GiB; got {shown(value)}")
    return size


def parse_rate(value: object) -> int:
    """Bytes a second."""
    try:
        rate = parse_size(value.removesuffix("/s")) if isinstance(value, str) and value.endswith("/s") else 0
    except ValueError:
        rate = 0
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"must be a rate from 1kB/s to 100GB/s, such as 10MiB/s; got {shown(value)}")
    return rate


def parse_optional_rate(value: object) -> int:
    """Bytes a second; 0 for off."""
    if is_off(value):
        return 0
    try:
        return parse_rate(value)
    except ValueError as error:
        raise ValueError(str(error).replace("must be", "must be off or")) from None


def parse_whole_seconds(value: object) -> int:
    ms = parse_duration_ms(value)
    if ms % 1000 or ms > 32_767_000:
        raise ValueError(f"must be whole seconds, at most 32767s; got {shown(value)}")
    return ms // 1000


def parse_share(value: object) -> float:
    """0 to 1."""
    share = parse_percentage(value)
    if share > 1:
        raise ValueError(f"must be between 0% and 100%; got {shown(value)}")
    return share


def parse_optional_share(value: object) -> float:
    """0 to 1; 0 for off."""
    if is_off(value):
        return 0.0
    try:
        return parse_share(value)
    except ValueError as error:
        raise ValueError(str(error).replace("such as 50%", "such as 50%, or off")) from None


def parse_auto_size(value: object) -> int:
    """Bytes; 0 for auto."""
    if value == "auto":
        return 0
    try:
        size = parse_size(value)
    except ValueError as error:
        raise ValueError(str(error).replace("must be", "must be auto or")) from None
    if size < 1 << 20:
        raise ValueError(f"must be auto or at least 1MiB; got {shown(value)}")
    return size


def parse_percentage(value: object) -> float:
    match = _SHARE.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise ValueError(f"must be a share such as 50%; got {shown(value)}")
    return float(match[1]) / 100


def parse_bounded_load(value: object) -> float:
    if is_off(value):
        return 0.0
    share = parse_percentage(value)
    if not 1 <= share <= 100:
        raise ValueError(f"must be off or between 100% and 10000%; got {shown(value)}")
    return share


def parse_factor(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1000:
        raise ValueError(f"must be a number above 0, at most 1000; got {shown(value)}")
    return float(value)


def parse_whole(value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"must be a whole number from {least} to {most}; got {shown(value)}")
    return value


def parse_limit(value: object) -> int:
    """A count of connections; 0 for off."""
    if is_off(value):
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100_000_000:
        raise ValueError(f"must be off or a whole number from 1 to 100000000; got {shown(value)}")
    return value


def parse_arrivals(value: object, burst: int | None = None) -> Rate | None:
    """New connections in a time, and how many may come at once; None for off. Without ``burst``: those of one second."""
    if is_off(value):
        return None
    match = _ARRIVALS.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise ValueError(f"must be a rate with its unit, such as 100/s, 30/m or 10/h, or off; got {shown(value)}")
    count, period_s = int(match[1]), _ARRIVALS_S[match[2]]
    if not 1 <= count <= MAX_ARRIVALS_PER_S * period_s:
        raise ValueError(f"must be between 1/h and {MAX_ARRIVALS_PER_S}/s; got {shown(value)}")
    return Rate(count, period_s, burst or max(1, count // period_s))


def parse_queue_timeout_ms(value: object) -> int:
    ms = parse_duration_ms(value)
    if ms > MAX_QUEUE_TIMEOUT_MS:
        raise ValueError(f"must be at most 1m, for which no client waits; got {shown(value)}")
    return ms


def parse_host(text: str) -> str:
    """Canonical text of an IP literal (an IPv4-mapped one as IPv4), or the host name in lower case."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        packed = socket.inet_pton(family, text)
    except OSError:
        if family == socket.AF_INET and _HOST_NAME.fullmatch(text) and not re.fullmatch(r"[\d.]+", text):
            return text.lower()
        raise ValueError(f"must have an IP address or a host name before the port; got {shown(text)}") from None
    if family == socket.AF_INET6 and packed.startswith(b"\0" * 10 + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(family, packed)


def split_port(value: object, example: str, least_port: int = 1) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port"; the host is unchecked."""
    if not isinstance(value, str):
        raise ValueError(f"must be an address with a port, such as {example}; got {shown(value)}")
    host, colon, port = value.rpartition(":")
    if host.startswith("[") and host.endswith("]") and ":" in host:
        host = host[1:-1]
    elif ":" in host or not host:
        raise ValueError(f"must be an address with a port, such as {example} (IPv6 in brackets); got {shown(value)}")
    if not colon or not port.isascii() or not port.isdigit() or not least_port <= int(port) <= 65535:
        raise ValueError(f"must end in a port from {least_port} to 65535; got {shown(value)}")
    return host, int(port)


def parse_bind(value: object) -> SocketAddress:
    """Port 0 lets the kernel choose."""
    host, port = split_port(value, '"127.0.0.1:8080"', least_port=0)
    address = SocketAddress(parse_host(host), port)
    if not re.fullmatch(r"[\d.]+|[0-9a-f:.]*:[0-9a-f:.]*", address.host):
        raise ValueError(f"must be an IP address with a port to listen on, not a name; got {shown(value)}")
    return address


def parse_endpoint_address(value: object) -> tuple[str, int]:
    host, port = split_port(value, '"10.0.0.1:6379"')
    return parse_host(host), port


def parse_weight(value: object) -> int:
    return parse_whole(value, 0, MAX_WEIGHT)


def parse_network(value: object) -> Network:
    if not isinstance(value, str) or "%" in value:
        raise ValueError(f"must be an address or a CIDR such as 10.0.0.0/8; got {shown(value)}")
    try:
        return ipaddress.ip_network(value)
    except ValueError:
        pass
    try:
        right = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ValueError(f"must be an address or a CIDR such as 10.0.0.0/8; got {shown(value)}") from None
    raise ValueError(f"has bits set behind its prefix: write {right}, or {value.partition('/')[0]} for that address alone")


def parse_ports(value: object) -> tuple[int, int]:
    """An inclusive range; a single port is a range of one."""
    if isinstance(value, int) and not isinstance(value, bool):
        first = last = value
    elif isinstance(value, str) and re.fullmatch(r"\d{1,5}-\d{1,5}", value):
        first, last = map(int, value.split("-"))
    else:
        raise ValueError(f'must be a port, or a range such as "8000-8999"; got {shown(value)}')
    if not 1 <= first <= last <= 65535:
        raise ValueError(f"must be within 1 to 65535, the smaller first; got {shown(value)}")
    return first, last


def parse_identity_pattern(value: object) -> str:
    """``spiffe://domain/path``, ``spiffe://…*``, ``*…`` or ``*``."""
    text = value if isinstance(value, str) else ""
    plain = text.strip("*")
    if not text or plain.count("*") or len(text) - len(plain) > 1 or len(text) > 2048 or not text.isascii() or not text.isprintable():
        raise ValueError(f"must be a SPIFFE ID, or one with * at its start or end, or *; got {shown(value)}")
    if not text.startswith("*"):
        if not text.startswith("spiffe://"):
            raise ValueError(f"must begin with spiffe:// or *; got {shown(value)}")
        if not text.endswith("*"):
            return parse_spiffe_id(text)
    # One that no ID can have would never match, which a deny must not.
    begin, _, end = text.partition("*")
    if not any(_is_spiffe_id(f"{begin or 'spiffe://'}{rest}{end}") for rest in ("x", "x/x")):
        raise ValueError(f"must be as a SPIFFE ID such as spiffe://example.org/ns/shop/sa/web begins or ends with; got {shown(value)}")
    return text


_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
_SEGMENT = re.compile(r"[a-zA-Z0-9._-]+")


def parse_spiffe_id(value: object) -> str:
    """The ID of a workload."""
    if not isinstance(value, str) or not _is_spiffe_id(value):
        raise ValueError(f"must be a SPIFFE ID such as spiffe://example.org/ns/shop/sa/web; got {shown(value)}")
    return value


def _is_spiffe_id(text: str) -> bool:
    """Source: SPIFFE-ID.md, section 2."""
    domain, *segments = text.removeprefix("spiffe://").split("/")
    return (
        text.startswith("spiffe://")
        and len(text) <= 2048
        and _TRUST_DOMAIN.fullmatch(domain) is not None
        and bool(segments)
        and all(_SEGMENT.fullmatch(segment) and segment not in (".", "..") for segment in segments)
    )


def parse_name_pattern(value: object) -> str:
    """A namespace: a name, ``prefix*``, ``*suffix`` or ``*``."""
    text = value if isinstance(value, str) else ""
    plain = text.strip("*")
    if not text or plain.count("*") or len(text) - len(plain) > 1 or not (plain == "" or _SEGMENT.fullmatch(plain)):
        raise ValueError(f"must be a name, or one with * at its start or end; got {shown(value)}")
    return text


def parse_service_account(value: object) -> str:
    parts = value.split("/") if isinstance(value, str) else []
    if len(parts) != 2 or not all(_SEGMENT.fullmatch(part) for part in parts):
        raise ValueError(f"must be namespace/name; got {shown(value)}")
    return str(value)


_HOST_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?")


def parse_server_name(value: object) -> str:
    """A host name, or ``*.`` and one: every name below it."""
    text = value.lower() if isinstance(value, str) else ""
    labels = text.removeprefix("*.").split(".")
    if len(text) > 253 or not all(_HOST_LABEL.fullmatch(label) and len(label) < 64 for label in labels):
        raise ValueError(f"must be a host name such as db.example.org, or *.example.org; got {shown(value)}")
    return text


def parse_alpn(value: object) -> str:
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not 0 < len(value) < 256:
        raise ValueError(f"must be the name of a protocol such as h2; got {shown(value)}")
    return value


def parse_ip(value: object) -> str:
    """Canonical text, an IPv4-mapped address as IPv4. A zone is refused, here as in a network: nothing could be compared with it."""
    try:
        address = ipaddress.ip_address(value if isinstance(value, str) and "%" not in value else "")
    except ValueError:
        raise ValueError(f"must be an IP address; got {shown(value)}") from None
    return str(getattr(address, "ipv4_mapped", None) or address)


def parse_payload(value: object) -> bytes:
    """``{text: …}`` or ``{hex: …}``"""
    kind, payload = _read_payload(value, "text", "hex")
    return _payload_bytes(kind, payload)


def parse_expect(value: object) -> Expect:
    """``{text: …}``, ``{hex: …}`` or ``{regex: …}``"""
    kind, payload = _read_payload(value, "text", "hex", "regex")
    wanted = _payload_bytes(kind, payload)
    if kind == "regex":
        try:
            compile_regex(wanted)
        except re2.error as error:
            reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
            raise ValueError(f"must have a regular expression that RE2 understands: {reason}") from None
    return Expect(wanted, kind == "regex")


def _read_payload(value: object, *kinds: str) -> tuple[str, str]:
    if isinstance(value, dict) and len(value) == 1:
        kind, payload = next(iter(value.items()))
        if kind in kinds and isinstance(payload, str) and payload:
            return kind, payload
    forms = " or ".join(f'{{{kind}: "…"}}' for kind in kinds)
    raise ValueError(f"must be {forms}; got {shown(next(iter(value.values())) if isinstance(value, dict) and value else value)}")


def _payload_bytes(kind: str, payload: str) -> bytes:
    try:
        content = bytes.fromhex(payload) if kind == "hex" else payload.encode()
    except ValueError:
        raise ValueError(f"must have pairs of hexadecimal digits; got {shown(payload)}") from None
    if not 0 < len(content) <= MAX_PAYLOAD_BYTES:
        raise ValueError(f"must be of 1 to {MAX_PAYLOAD_BYTES} bytes; got {len(content)}")
    return content


@functools.lru_cache(1024)
def compile_regex(pattern: bytes) -> Any:
    """Over bytes, and in time that grows with the input only: RE2 does not go back. Raises re2.error."""
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.log_errors = False
    options.dot_nl = True
    return re2.compile(pattern, options)


def parse_http_path(value: object) -> str:
    text = value if isinstance(value, str) else ""
    if not text.startswith("/") or len(text) > 2048 or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"must be a path such as /healthz, of visible ASCII characters; got {shown(value)}")
    return text


def parse_http_host(value: object) -> str:
    text = value if isinstance(value, str) else ""
    if not 0 < len(text) <= 255 or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"must be a host name, with or without a port; got {shown(value)}")
    return text


def parse_status(value: object) -> tuple[int, int]:
    """An HTTP status, or an inclusive range of them."""
    if isinstance(value, int) and not isinstance(value, bool):
        first = last = value
    elif isinstance(value, str) and re.fullmatch(r"\d{3}-\d{3}", value):
        first, last = map(int, value.split("-"))
    else:
        first = last = 0
    if not 100 <= first <= last <= 599:
        raise ValueError(f'must be a status from 100 to 599, or a range such as "200-399"; got {shown(value)}')
    return first, last


def parse_user(value: object) -> str:
    text = value if isinstance(value, str) else ""
    if not 0 < len(text.encode()) <= 63 or not text.isprintable():
        raise ValueError(f"must be the name of a user; got {shown(value)}")
    return text


def parse_interface(value: object) -> str:
    """As iptables takes it: a + at the end stands for any rest."""
    if not isinstance(value, str) or not 0 < len(value.encode()) <= 15 or not value.isprintable() or re.search(r"[\s/!\"'\\]", value):
        raise ValueError(f"must be the name of an interface, or its beginning and a +; got {shown(value)}")
    return value


def parse_host_user(value: object) -> str:
    """The name or the number of one that processes of a host run as."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"[\w.][\w.$@-]{0,31}", text):
        raise ValueError(f"must be the name or the number of a user; got {shown(value)}")
    return text


def parse_mark(value: object) -> Mark:
    match = _MARK.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise ValueError(f'must be a mark and its mask, such as "0x539/0xfff"; got {shown(value)}')
    mark = Mark(int(match[1], 0), int(match[2], 0))
    if not 0 < mark.value <= mark.mask <= 0xFFFFFFFF or mark.value & ~mark.mask:
        raise ValueError(f"must be a mark other than 0 that lies within its mask; got {shown(value)}")
    return mark


def parse_admin(value: object) -> str:
    """ "host:port", "unix:path", or "" for off."""
    if is_off(value):
        return ""
    if isinstance(value, str) and value.startswith("unix:"):
        path = value.removeprefix("unix:")
        if not 0 < len(path.encode()) <= 107 or "\0" in path:
            raise ValueError(f"must name a socket of 1 to 107 bytes after unix:; got {shown(value)}")
        return value
    return str(parse_bind(value))


def parse_socket_path(value: object) -> str:
    """The path of a unix socket, or "" for off."""
    if is_off(value):
        return ""
    if not isinstance(value, str) or not value.startswith("/") or len(value.encode()) > 107 or "\0" in value:
        raise ValueError(f"must be the whole path of a socket, of at most 107 bytes, or off; got {shown(value)}")
    return value


def make_endpoint(address: object, weight: int = 1, zone: str = "") -> Endpoint:
    host, port = parse_endpoint_address(address)
    return Endpoint(host, port, weight, zone)
