"""Which identities a CA gives to which node: ``nodes.yaml`` in the CA's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, PlainValidator

from l4mesh.config import quantities as q
from l4mesh.config.files import open_file
from l4mesh.config.load import show_path
from l4mesh.config.schema import Section, SpiffeId, validate
from l4mesh.config.yaml import MAX_BYTES, KeyPath, find_lines, parse_yaml
from l4mesh.errors import ConfigError, Problem


def _parse_grant(value: object) -> str:
    text = value if isinstance(value, str) else ""
    try:
        # What stands before a * must be what an ID may begin with.
        q.parse_spiffe_id(f"{text[:-1]}x" if text.endswith("*") else text)
    except ValueError:
        raise ValueError(
            f"must be a SPIFFE ID such as spiffe://example.org/ns/shop/sa/web, or the beginning of one and a *; got {q.shown(value)}"
        ) from None
    return text


class NodeSection(Section):
    identity: SpiffeId
    workloads: list[Annotated[str, PlainValidator(_parse_grant)]] = Field(default=[])


class NodesSection(Section):
    nodes: list[NodeSection] = Field(default=[])


@dataclass(frozen=True, slots=True)
class Grants:
    """By a node's SPIFFE ID, the IDs that it may ask for: exact, or ``prefix*``."""

    by_node: Mapping[str, tuple[str, ...]]

    def refusal(self, node: str, wanted: str) -> str:
        """Why ``node`` does not get a certificate for ``wanted``; "" when it does."""
        if node not in self.by_node:
            return f"{node} is not among the nodes"
        if wanted == node:
            return ""
        if wanted in self.by_node:
            return f"{wanted} is another node"
        if wanted.split("/", 4)[3] == "l4mesh":
            return f"{wanted} is kept for the CA"
        if any(wanted.startswith(grant[:-1]) if grant.endswith("*") else wanted == grant for grant in self.by_node[node]):
            return ""
        return f"{node} may not ask for {wanted}"


def load_grants(path: Path, trust_domain: str) -> Grants:
    """Raises ConfigError with every problem of the file."""
    file = str(path)
    try:
        with open_file(path) as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError([Problem(file, 0, "", f"can't be read: {error.strerror}; it names the nodes: nodes: []")]) from None
    if len(content) > MAX_BYTES:
        raise ConfigError([Problem(file, 0, "", f"is larger than {MAX_BYTES >> 20} MiB")])
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ConfigError([Problem(file, 0, "", "is not UTF-8")]) from None
    section, findings = validate(NodesSection, parse_yaml(text, file))
    domain = f"spiffe://{trust_domain}/"
    grants: dict[str, tuple[str, ...]] = {}
    for index, node in enumerate(section.nodes if section else ()):
        path_of_node: KeyPath = ("nodes", index)
        if node.identity in grants:
            findings.append(((*path_of_node, "identity"), f"{node.identity} stands here already: keep one of the two"))
        for at, grant in ((None, node.identity), *enumerate(node.workloads)):
            if not grant.startswith(domain):
                where: KeyPath = ("identity",) if at is None else ("workloads", at)
                findings.append(((*path_of_node, *where), f"must be of the CA's trust domain, {domain}; got {q.shown(grant)}"))
        grants.setdefault(node.identity, tuple(node.workloads))
    if findings:
        lines = find_lines(text, [where for where, _ in findings])
        raise ConfigError([Problem(file, line, show_path(where), said) for (where, said), line in zip(findings, lines, strict=True)])
    return Grants(grants)
