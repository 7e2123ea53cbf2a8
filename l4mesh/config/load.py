"""Files to one configuration: read, validate, merge, and check what only the whole can tell.

A cache makes a reload cost in proportion to what changed: a file whose ``stat`` is the same is not read, one whose content is the
same is not parsed, and a cluster whose data is the same keeps its object.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from l4mesh.config import schema
from l4mesh.config.files import open_file
from l4mesh.config.quantities import shown
from l4mesh.config.yaml import MAX_BYTES, KeyPath, find_lines, parse_yaml
from l4mesh.errors import ConfigError, Problem
from l4mesh.model import (
    ORIGINAL_DESTINATION,
    Capture,
    Cluster,
    Config,
    HealthKind,
    Identity,
    Listener,
    OutlierDetection,
    Policy,
    TlsMode,
    Workload,
)

BURSTS_PER_S = 20
"""Of at least so short a time must a burst be, for a rate to be kept by a timer of a millisecond on a busy machine."""
MIN_INTERVAL_MS = 100
"""Of outlier detection: each costs the control loop a look at every endpoint of the cluster."""

Finding = tuple[str, KeyPath, str]
"""File, key path and message: a problem whose line is not known yet."""


@dataclass(slots=True)
class ParsedFile:
    """One file, valid by itself."""

    file: str
    digest: bytes
    section: schema.FileSection
    listeners: list[tuple[int, schema.ListenerSection]]
    """Those that are sound by themselves, with their places in the file."""
    folder: Path
    """That relative paths in it count from."""
    identities: list[Identity]
    workloads: list[Workload]
    policies: list[Policy]
    clusters: list[Cluster]
    raw_clusters: dict[str, tuple[object, Cluster]]
    """By name: what YAML gave and what it became."""
    findings: list[Finding]
    """Problems that leave the rest of the file standing."""


@dataclass(slots=True)
class ConfigCache:
    """What earlier loads found, by file."""

    files: dict[str, ParsedFile] = field(default_factory=dict)
    stats: dict[str, tuple[int, ...]] = field(default_factory=dict)


def load_config(paths: Sequence[Path], cache: ConfigCache | None = None) -> Config:
    """The configuration in files and folders (``*.yaml`` and ``*.yml`` directly in them, by name), merged.

    Raises ConfigError with every problem of every file.
    """
    cache = cache if cache is not None else ConfigCache()
    problems: list[Problem] = []
    parsed: list[ParsedFile] = []
    for path in _find_files(paths, problems):
        try:
            parsed.append(_load_file(path, cache))
        except ConfigError as error:
            problems += error.problems
    findings = [finding for file in parsed for finding in file.findings] + list(_check_whole(parsed, complete=not problems))
    if findings:
        problems += _locate(findings)
    if problems:
        raise ConfigError(problems)
    for known in cache.files.keys() - {file.file for file in parsed}:
        del cache.files[known]
        cache.stats.pop(known, None)
    return _merge(parsed)


def parse_config(text: str, file: str = "-") -> Config:
    """The configuration in one text. Raises ConfigError."""
    parsed = _parse_file(text, file, b"", None)
    findings = [*parsed.findings, *_check_whole([parsed], complete=True)]
    if findings:
        raise ConfigError(_locate(findings, {file: text}))
    return _merge([parsed])


def _find_files(paths: Sequence[Path], problems: list[Problem]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        try:
            entries = list(path.iterdir()) if path.is_dir() else None
        except OSError as error:
            problems.append(Problem(str(path), 0, "", f"can't be read: {error.strerror}"))
            continue
        if entries is None:
            files.append(path)
            continue
        inside = sorted(entry for entry in entries if entry.suffix in (".yaml", ".yml") and not entry.name.startswith("."))
        if not inside:
            problems.append(Problem(str(path), 0, "", "is a folder without a .yaml file"))
        files += inside
    return list(dict.fromkeys(files))


def _load_file(path: Path, cache: ConfigCache) -> ParsedFile:
    file = str(path)
    try:
        with open_file(path) as stream:
            stat = os.fstat(stream.fileno())
            signature = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            before = cache.files.get(file)
            if before and cache.stats.get(file) == signature:
                return before
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError([Problem(file, 0, "", f"can't be read: {error.strerror}")]) from None
    if len(content) > MAX_BYTES:
        raise ConfigError([Problem(file, 0, "", f"is larger than {MAX_BYTES >> 20} MiB")])
    digest = hashlib.sha256(content).digest()
    if not before or before.digest != digest:
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise ConfigError([Problem(file, line, "", f"is not UTF-8: byte {error.start} is not text")]) from None
        cache.files[file] = _parse_file(text, file, digest, before)
    cache.stats[file] = signature
    return cache.files[file]


def _parse_file(text: str, file: str, digest: bytes, before: ParsedFile | None) -> ParsedFile:
    data = parse_yaml(text, file)
    raw_clusters = data.pop("clusters", None) if isinstance(data.get("clusters"), list) else []
    raw_listeners = data.pop("listeners", None) if isinstance(data.get("listeners"), list) else []
    findings: list[Finding] = []
    section, errors = schema.validate(schema.FileSection, data)
    if section is None:
        findings += [(file, path, message) for path, message in errors]
        # The other keys may be fine; they count, so that nothing is called missing that is only misspelt elsewhere.
        bad = {path[0] for path, _ in errors if path}
        section, _ = schema.validate(schema.FileSection, {key: value for key, value in data.items() if key not in bad})
    clusters, known = _read_clusters(raw_clusters, file, before.raw_clusters if before else {}, findings)
    listeners = _read_listeners(raw_listeners, file, findings)
    section = section or schema.FileSection()
    for index, identity in enumerate(section.identities):
        findings += [(file, ("identities", index, *path), message) for path, message in _check_identity(identity)]
    if section.marks:
        findings += [(file, ("marks", *path), message) for path, message in _check_marks(section.marks)]
    folder = Path(file).parent
    return ParsedFile(
        file, digest, section, listeners, folder,
        [schema.make_identity(identity, folder) for identity in section.identities],
        list(map(schema.make_workload, section.workloads)),
        list(map(schema.make_policy, section.policies)),
        clusters, known, findings,
    )  # fmt: skip


def _read_listeners(raw: list[Any], file: str, findings: list[Finding]) -> list[tuple[int, schema.ListenerSection]]:
    listeners: list[tuple[int, schema.ListenerSection]] = []
    for index, item in enumerate(raw):
        section, errors = schema.validate(schema.ListenerSection, item)
        if section:
            listeners.append((index, section))
            errors = list(_check_listener(section))
        findings += [(file, ("listeners", index, *path), message) for path, message in errors]
    return listeners


def _read_clusters(
    raw: list[Any], file: str, before: dict[str, tuple[object, Cluster]], findings: list[Finding]
) -> tuple[list[Cluster], dict[str, tuple[object, Cluster]]]:
    clusters: list[Cluster] = []
    known: dict[str, tuple[object, Cluster]] = {}
    for index, item in enumerate(raw):
        name = item.get("name") if isinstance(item, dict) else None
        same = before.get(name) if isinstance(name, str) else None
        if same and _are_same(same[0], item):
            cluster = same[1]
        else:
            section, errors = schema.validate(schema.ClusterSection, item)
            findings += [(file, ("clusters", index, *path), message) for path, message in errors]
            if section is None:
                if isinstance(name, str):
                    clusters.append(_placeholder(name))
                continue
            cluster = schema.make_cluster(section)
            problems: list[tuple[KeyPath, str]] = []
            if section.health_check:
                problems += [(("health_check", *path), said) for path, said in _check_health(cluster, section.health_check)]
            problems += (*_check_cluster(cluster), *_check_faults(section.faults), *_check_bandwidth(section.bandwidth_per_connection))
            findings += [(file, ("clusters", index, *path), message) for path, message in problems]
            if problems:
                # Not known: else it would pass unchecked when something else in the file changes.
                clusters.append(cluster)
                continue
        clusters.append(cluster)
        known[cluster.name] = (item, cluster)
    return clusters, known


def _are_same(one: Any, other: Any) -> bool:
    """Equal as YAML has it, where 1, 1.0 and true are three values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_are_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_are_same, one, other))
    return bool(one == other)


def _placeholder(name: str) -> Cluster:
    """Stands for a cluster that is wrong elsewhere, so that a reference to it is not called dangling as well."""
    section = schema.ClusterSection.model_construct(name=name)
    return schema.make_cluster(section)


def _check_marks(marks: schema.MarksSection) -> Iterator[tuple[KeyPath, str]]:
    upstream, returned = marks.upstream, marks.returned
    if upstream.value & returned.mask == returned.value or returned.value & upstream.mask == upstream.value:
        yield (), f"must be two marks that no packet has both of; upstream {upstream} and returned {returned} are one to their masks"


def _check_identity(identity: schema.IdentitySection) -> Iterator[tuple[KeyPath, str]]:
    files = {key: getattr(identity, key) for key in ("certificate", "private_key", "trust_bundle", "crl")}
    if not identity.spiffe_id:
        for key in ("certificate", "private_key", "trust_bundle"):
            if not files[key]:
                yield (key,), "is missing; or give a spiffe_id alone, to get it from the CA"
        return
    for key, value in files.items():
        if value:
            yield (key,), "does not go with spiffe_id, which is fetched from the CA: keep the files or that"
    if "/" in identity.name or identity.name.startswith("."):
        yield ("name",), "must not have a '/', nor begin with '.': with spiffe_id it names a file"


def _check_cluster(cluster: Cluster) -> Iterator[tuple[KeyPath, str]]:
    if cluster.name == ORIGINAL_DESTINATION:
        if cluster.endpoints:
            yield ("endpoints",), "must be left out: the endpoint of this cluster is the address that the client dialled"
        if cluster.max_connections_per_endpoint:
            yield ("limits", "connections_per_endpoint"), "does not go with original_destination: its addresses are not counted"
    elif cluster.name == "reject":
        yield ("name",), "must not be reject: as a listener's default this word refuses connections"
    seen: dict[str, int] = {}
    for index, endpoint in enumerate(cluster.endpoints):
        first = seen.setdefault(endpoint.address, index)
        if first != index:
            yield ("endpoints", index), f"{endpoint.address} is endpoint {first} already: give that one a weight instead"
    if cluster.bounded_load and cluster.balance not in ("source_hash", "maglev"):
        yield ("bounded_load",), f"goes with balance source_hash or maglev only; here it is {cluster.balance}"
    if cluster.slow_start_ms and cluster.balance in ("source_hash", "maglev"):
        yield ("slow_start",), f"does not go with balance {cluster.balance}, which gives each source one endpoint"
    if cluster.queue_size and not cluster.max_connections and not cluster.max_connections_per_endpoint:
        yield ("limits", "queue"), "needs a limit whose end it waits for: connections or connections_per_endpoint"
    if cluster.tls and not cluster.tls.peers:
        yield ("tls", "peers"), 'is missing: name the identities that may answer, or say "*" for any of the trust domain'
    if cluster.outlier_detection:
        yield from _check_outlier_detection(cluster, cluster.outlier_detection)


def _check_outlier_detection(cluster: Cluster, outlier: OutlierDetection) -> Iterator[tuple[KeyPath, str]]:
    key = "outlier_detection"
    rate = outlier.success_rate
    if cluster.name == ORIGINAL_DESTINATION:
        yield (key,), "does not go with original_destination, where there is no other endpoint to go to"
    if outlier.interval_ms < MIN_INTERVAL_MS:
        yield (key, "interval"), f"must be at least {MIN_INTERVAL_MS}ms"
    if outlier.base_ejection_ms > outlier.max_ejection_ms:
        yield (key, "base_ejection"), "must not be longer than max_ejection"
    if not outlier.max_ejected:
        yield (key, "max_ejected"), "must be above 0%: one endpoint may always be ejected; enforce: 0% ejects none and only says so"
    if not (outlier.consecutive_failures or rate or outlier.failure_percentage or outlier.latency):
        yield (key,), "has every detector off: turn one on, or leave it out"
    if not (outlier.connect_failure or outlier.tls_failure or outlier.early_reset_ms or outlier.no_answer_ms or outlier.latency):
        yield (key, "signals"), "must not all be off: nothing would ever count as a failure"
    if outlier.failure_percentage and not outlier.failure_percentage.threshold:
        yield (key, "failure_percentage", "threshold"), "must be above 0%: else every endpoint is over it"
    # Samuelson 1968: of n values none is further from their mean than sqrt(n - 1) standard deviations.
    if rate and rate.factor >= math.sqrt(rate.minimum_endpoints - 1):
        yield (
            (key, "success_rate", "factor"),
            f"must be below {math.sqrt(rate.minimum_endpoints - 1):.2f}: of {rate.minimum_endpoints} endpoints none can be further "
            "below their mean; lower it, or raise minimum_endpoints",
        )


_OF_KINDS = {
    "send": [HealthKind.TCP], "expect": [HealthKind.TCP], "path": [HealthKind.HTTP], "host": [HealthKind.HTTP],
    "status": [HealthKind.HTTP], "user": [HealthKind.POSTGRESQL, HealthKind.MYSQL],
}  # fmt: skip
"""Keys of a health check that only some kinds have."""


def _check_health(cluster: Cluster, section: schema.HealthCheckSection) -> Iterator[tuple[KeyPath, str]]:
    check = cluster.health_check
    assert check is not None
    if cluster.name == ORIGINAL_DESTINATION:
        yield (), "can't be here: this cluster has no endpoints that could be checked"
    for key, kinds in _OF_KINDS.items():
        if key in section.model_fields_set and check.kind not in kinds:
            yield (key,), f"goes with type {' or '.join(kinds)} only; here it is {check.kind}"
    if check.send and not check.expect:
        yield ("send",), "needs expect: without an answer the check sees no more than a connection"
    if check.kind == HealthKind.TLS and not check.tls:
        yield ("tls",), "can't be off with type tls"
    if section.sni and not check.tls:
        yield ("sni",), "goes with tls: on or type tls only"
    if check.fast_interval_ms > check.interval_ms:
        yield ("fast_interval",), "must not be longer than interval"


def _check_listener(listener: schema.ListenerSection) -> Iterator[tuple[KeyPath, str]]:
    captures = listener.capture != Capture.NONE
    if listener.cluster and listener.default:
        yield ("cluster",), "means the same as default: keep one of the two"
    if not listener.cluster and not listener.default and not listener.routes:
        yield (), "leads nowhere: add cluster: NAME, routes, or default: original_destination"
    if not captures:
        for key in ("direction", "preserve_source", "include", "exclude"):
            if getattr(listener, key) not in (None, False, schema.FilterSection()):
                yield (key,), "goes with capture: redirect or capture: tproxy only"
        if (listener.default or listener.cluster) == ORIGINAL_DESTINATION:
            yield ("default",), "can't be original_destination without capture: the destination would be this listener"
    for index, route in enumerate(listener.routes):
        if bool(route.cluster) == bool(route.split):
            yield ("routes", index), "must have one of cluster or split"
        elif route.split and not any(part.weight for part in route.split):
            yield ("routes", index, "split"), "must have a weight above 0"
        yield from ((("routes", index, *path), message) for path, message in _check_faults(route.faults))
    yield from _check_bandwidth(listener.bandwidth_per_connection)


def _check_faults(faults: Sequence[schema.FaultSection]) -> Iterator[tuple[KeyPath, str]]:
    for index, fault in enumerate(faults):
        if len(fault.kinds) != 1:
            got = f"got {' and '.join(fault.kinds)}" if fault.kinds else "got none"
            yield ("faults", index), f"must have one of delay, refuse, reset, black_hole, slow or stall; {got}"
        if fault.reset and fault.reset.direction and not fault.reset.after[0]:
            yield ("faults", index, "reset", "direction"), "goes with a number of bytes after which to reset only"
        if fault.stall and fault.stall.direction and not fault.stall.after:
            yield ("faults", index, "stall", "direction"), "goes with after only: it says whose bytes are counted"
    total = sum(fault.share for fault in faults if not fault.sources)
    if total > 1.000001:
        yield ("faults",), f"must not be for more than 100% of the connections; these add up to {total * 100:g}%"


def _check_bandwidth(section: schema.BandwidthSection | schema.WorkloadBandwidthSection) -> Iterator[tuple[KeyPath, str]]:
    key = "bandwidth" if isinstance(section, schema.WorkloadBandwidthSection) else "bandwidth_per_connection"
    rates = [rate for name, rate in section if name != "burst" and rate]
    if section.burst and not rates:
        yield (key, "burst"), "goes with a rate only"
    elif section.burst and section.burst * BURSTS_PER_S < max(rates):
        least = -(-max(rates) // BURSTS_PER_S)
        yield (key, "burst"), f"must be auto, or at least {least}B, a twentieth of a second of the rate: less would not reach it"


def _check_whole(parsed: list[ParsedFile], *, complete: bool) -> Iterator[Finding]:
    """What only all files together can tell. ``complete``: every file could be read."""
    yield from _check_single_keys(parsed)
    yield from _check_mesh(parsed, complete=complete)
    clusters: dict[str, tuple[str, int]] = {}
    for file in parsed:
        for index, cluster in enumerate(file.clusters):
            first = clusters.setdefault(cluster.name, (file.file, index))
            if first != (file.file, index):
                yield file.file, ("clusters", index, "name"), f"{cluster.name} is the name of a cluster in {first[0]} already"
    listeners: dict[str, str] = {}
    binds: dict[str, str] = {}
    for file in parsed:
        for index, section in file.listeners:
            path: KeyPath = ("listeners", index)
            if section.name in listeners:
                yield (
                    file.file,
                    (*path, "name"),
                    f"{section.name} is the name of a listener in {listeners[section.name]} already",
                )
            listeners.setdefault(section.name, file.file)
            for bind in section.bind:
                if bind.port and str(bind) in binds:
                    yield file.file, (*path, "bind"), f"{bind} is bound by listener {binds[str(bind)]} already"
                binds.setdefault(str(bind), section.name)
            if complete:
                yield from _check_references(file.file, path, section, clusters)
    if complete and not listeners and not any(file.findings for file in parsed):
        where = parsed[0].file if parsed else "configuration"
        yield where, (), "has no listener: add one under listeners, or there is nothing to do"


def _check_mesh(parsed: list[ParsedFile], *, complete: bool) -> Iterator[Finding]:
    """Identities, workloads and policies: names that are there once, references that lead somewhere."""
    for key in ("identities", "workloads", "policies"):
        seen: dict[str, str] = {}
        for file in parsed:
            for index, item in enumerate(getattr(file, key)):
                if item.name in seen:
                    yield file.file, (key, index, "name"), f"{item.name} stands in {seen[item.name]} already"
                seen.setdefault(item.name, file.file)
    owners: dict[str, str] = {}
    for file in parsed:
        for index, section in enumerate(file.section.workloads):
            for path, message in _check_bandwidth(section.bandwidth):
                yield file.file, ("workloads", index, *path), message
        for index, workload in enumerate(file.workloads):
            for address in workload.addresses:
                if owners.setdefault(address, workload.name) != workload.name:
                    yield file.file, ("workloads", index, "addresses"), f"{address} belongs to workload {owners[address]} already"
        for index, policy in enumerate(file.section.policies):
            if policy.action == "deny" and policy.from_ == []:
                message = "must not be [] for deny, which would refuse nobody: leave from out to mean everybody"
                yield file.file, ("policies", index, "from"), message
            for at, clause in enumerate(policy.from_ or ()):
                if clause == schema.PeersSection():
                    yield file.file, ("policies", index, "from", at), "must not be empty: leave from out to mean everybody"
    if not complete:
        return
    identities = {identity.name for file in parsed for identity in file.identities}
    known = ", ".join(sorted(identities)[:8]) or "none"
    yield from _check_ca(parsed, known)
    node_has_one = any(file.section.node and file.section.node.identity for file in parsed)
    for file in parsed:
        references: list[tuple[KeyPath, str | None]] = []
        if file.section.node:
            references.append((("node", "identity"), file.section.node.identity))
        references += [(("workloads", i, "identity"), workload.identity) for i, workload in enumerate(file.section.workloads)]
        for index, listener in file.listeners:
            if listener.tls:
                references.append((("listeners", index, "tls", "identity"), listener.tls.identity))
        for index, cluster in enumerate(file.clusters):
            if cluster.tls:
                references.append((("clusters", index, "tls", "identity"), cluster.tls.identity))
                if cluster.health_check and cluster.health_check.tls and not (cluster.tls.identity or node_has_one):
                    where = ("clusters", index, "health_check")
                    yield file.file, where, "has no certificate to show: add identity under the cluster's tls, or under node"
        for path, name in references:
            if name and name not in identities:
                yield file.file, path, f"{shown(name)} is not an identity; there are: {known}"
        for index, listener in file.listeners:
            secure = listener.tls and (listener.tls.mode != TlsMode.OFF or any(p.mode != TlsMode.OFF for p in listener.tls.ports))
            if secure and listener.tls and not (listener.tls.identity or node_has_one or any(f.section.workloads for f in parsed)):
                yield (
                    file.file,
                    ("listeners", index, "tls"),
                    "has no certificate to show: add identity here, or under node, or workloads with one",
                )


def _check_ca(parsed: list[ParsedFile], known: str) -> Iterator[Finding]:
    """Identities from a CA need one, and a node that may speak to it."""
    fetched = {identity.name: identity.spiffe_id for file in parsed for identity in file.identities if identity.spiffe_id}
    holder = next((file for file in parsed if file.section.ca), None)
    if holder is None or holder.section.ca is None:
        for file in parsed:
            for index, identity in enumerate(file.identities):
                if identity.spiffe_id:
                    yield (
                        file.file,
                        ("identities", index, "spiffe_id"),
                        "needs the CA that it comes from: add ca: {address: …, identity: …}",
                    )
        return
    name = holder.section.ca.identity
    if name not in {identity.name for file in parsed for identity in file.identities}:
        yield holder.file, ("ca", "identity"), f"{shown(name)} is not an identity; there are: {known}"
    elif name not in fetched:
        yield holder.file, ("ca", "identity"), f"{shown(name)} must have a spiffe_id instead of files: the node renews it as well"
    else:
        domain = schema.trust_domain(fetched[name])
        for file in parsed:
            for index, identity in enumerate(file.identities):
                if identity.spiffe_id and not identity.spiffe_id.startswith(domain):
                    yield file.file, ("identities", index, "spiffe_id"), f"must be of the node's trust domain, {domain}"


def _check_references(
    file: str, path: KeyPath, section: schema.ListenerSection, clusters: dict[str, tuple[str, int]]
) -> Iterator[Finding]:
    references: list[tuple[KeyPath, str | None]] = [(("cluster",), section.cluster), (("default",), section.default)]
    for index, route in enumerate(section.routes):
        references.append((("routes", index, "cluster"), route.cluster))
        references += [(("routes", index, "split", at, "cluster"), part.cluster) for at, part in enumerate(route.split)]
    for where, name in references:
        if name is None or name in clusters or name == ORIGINAL_DESTINATION:
            continue
        if where == ("default",) and name == "reject":
            continue
        known = ", ".join(sorted(clusters)[:8]) or "none"
        yield file, (*path, *where), f"{shown(name)} is not a cluster; there are: {known}"


def _check_single_keys(parsed: list[ParsedFile]) -> Iterator[Finding]:
    for key in schema.SINGLE_KEYS:
        holders = [file.file for file in parsed if getattr(file.section, key) is not None]
        for extra in holders[1:]:
            yield extra, (key,), f"stands in {holders[0]} already: keep one of the two"


def _locate(findings: list[Finding], texts: dict[str, str] | None = None) -> list[Problem]:
    """Lines are looked for only now that there is something to say: finding them costs as much as parsing."""
    by_file: dict[str, list[Finding]] = {}
    for finding in findings:
        by_file.setdefault(finding[0], []).append(finding)
    problems: list[Problem] = []
    for file, inside in by_file.items():
        text = texts[file] if texts else _read_again(file)
        try:
            lines = find_lines(text, [path for _, path, _ in inside]) if text else [0] * len(inside)
        except yaml.YAMLError:
            # Somebody is writing it.
            lines = [0] * len(inside)
        problems += [Problem(file, line, show_path(path), message) for (_, path, message), line in zip(inside, lines, strict=True)]
    return problems


def _read_again(file: str) -> str:
    try:
        with open_file(file) as stream:
            return stream.read(MAX_BYTES).decode()
    except (OSError, ValueError):
        return ""


def show_path(path: KeyPath) -> str:
    """``clusters[2].connect.timeout``"""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _merge(parsed: list[ParsedFile]) -> Config:
    single: dict[str, Any] = {}
    for key in schema.SINGLE_KEYS:
        single[key] = next((value for file in parsed if (value := getattr(file.section, key)) is not None), None)
    node = single["node"] or schema.NodeSection()
    limits = single["limits"] or schema.ProcessLimitsSection()
    marks = single["marks"] or schema.MarksSection()
    clusters = {cluster.name: cluster for file in parsed for cluster in file.clusters}
    listeners = {section.name: schema.make_listener(section) for file in parsed for _, section in file.listeners}
    identities = {identity.name: identity for file in parsed for identity in file.identities}
    ca = None
    if single["ca"]:
        holder = next(file for file in parsed if file.section.ca)
        ca = schema.make_ca(single["ca"], holder.folder, identities[single["ca"].identity].spiffe_id)
    if ORIGINAL_DESTINATION not in clusters and _names_original_destination(listeners.values()):
        clusters[ORIGINAL_DESTINATION] = _ORIGINAL_DESTINATION
    return Config(
        node_name=node.name,
        node_zone=node.zone,
        workers=single["workers"] or 0,
        admin=(single["admin"] or schema.AdminSection()).bind,
        upgrade_socket=(single["upgrade"] or schema.UpgradeSection()).socket,
        access_log=schema.make_access_log(single["access_log"] or schema.AccessLogSection()),
        max_connections=limits.connections,
        max_connections_per_source=limits.connections_per_source,
        splice=single["splice"] is not False,
        mark=marks.upstream,
        return_mark=marks.returned,
        listeners=listeners,
        clusters=clusters,
        identities={name: schema.place_identity(identity, ca) for name, identity in identities.items()},
        workloads=tuple(workload for file in parsed for workload in file.workloads),
        policies=tuple(policy for file in parsed for policy in file.policies),
        node_identity=node.identity or "",
        ca=ca,
        max_handshakes_per_source=limits.handshakes_per_source,
        rates=schema.make_rates(limits),
        redirect=schema.make_redirect(single["redirect"] or schema.RedirectSection()),
        watchdog_ms=schema.WATCHDOG_MS if single["watchdog"] is None else single["watchdog"],
        faults_enabled=bool(single["faults"] and single["faults"].enabled),
        drain=schema.make_drain(single["drain"] or schema.DrainSection()),
        overload=schema.make_overload(single["overload"] or schema.OverloadSection()),
        digest=hashlib.sha256(b"".join(file.digest for file in parsed)).hexdigest(),
    )


_ORIGINAL_DESTINATION = schema.default_original_destination()


def _names_original_destination(listeners: Iterable[Listener]) -> bool:
    return any(
        listener.default == ORIGINAL_DESTINATION
        or any(name == ORIGINAL_DESTINATION for route in listener.routes for name, _ in route.split)
        for listener in listeners
    )
