"""Policies to clauses and sets: which apply to which workload, filed so that a worker finds the few that matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict, Unpack

from l4mesh.model import Action, Peers, Policy, Workload
from l4mesh.policy.plan import EXACT, Pattern, Prefix, compile_pattern, pack_prefix


class ClauseRow(TypedDict):
    """The lists that ``Plan.add_clause`` takes."""

    identities: list[Pattern]
    not_identities: list[Pattern]
    namespaces: list[Pattern]
    not_namespaces: list[Pattern]
    accounts: list[Pattern]
    not_accounts: list[Pattern]
    sources: list[Prefix]
    not_sources: list[Prefix]
    ports: list[tuple[int, int]]
    not_ports: list[tuple[int, int]]


class PolicyTable(Protocol):
    """What of a compiled plan takes policies."""

    def add_clause(self, policy: int, deny: bool, dry_run: bool, /, **lists: Unpack[ClauseRow]) -> int: ...

    def add_policy_set(self, clauses: list[int], has_allow: bool, has_dry_allow: bool, /) -> int: ...

    def set_default_policies(self, policies: int, /) -> None: ...


@dataclass(frozen=True, slots=True)
class PolicySets:
    """``members``: for each set the indexes of its policies; ``of_workload``: the set of each workload by its place; ``default``:
    that of a destination that is no workload."""

    members: tuple[tuple[int, ...], ...]
    of_workload: tuple[int, ...]
    default: int


def compile_clause(policy: Policy, peers: Peers) -> ClauseRow:
    return ClauseRow(
        identities=list(map(compile_pattern, peers.identities)),
        not_identities=list(map(compile_pattern, peers.not_identities)),
        namespaces=list(map(compile_pattern, peers.namespaces)),
        not_namespaces=list(map(compile_pattern, peers.not_namespaces)),
        accounts=[(EXACT, account.encode()) for account in peers.service_accounts],
        not_accounts=[(EXACT, account.encode()) for account in peers.not_service_accounts],
        sources=list(map(pack_prefix, peers.sources)),
        not_sources=list(map(pack_prefix, peers.not_sources)),
        ports=list(policy.ports),
        not_ports=list(policy.not_ports),
    )


def find_sets(policies: Iterable[Policy], workloads: Iterable[Workload]) -> PolicySets:
    """Workloads that the same policies select share a set."""
    policies = tuple(policies)
    numbers: dict[tuple[int, ...], int] = {}
    known: dict[tuple[str, tuple[tuple[str, str], ...]], int] = {}

    def number(workload: Workload | None) -> int:
        members = tuple(index for index, policy in enumerate(policies) if policy.selects(workload))
        return numbers.setdefault(members, len(numbers))

    default = number(None)
    of_workload = []
    for workload in workloads:
        # Selection looks at nothing else, and a node has many workloads of a kind.
        kind = (workload.namespace, workload.labels)
        if kind not in known:
            known[kind] = number(workload)
        of_workload.append(known[kind])
    return PolicySets(tuple(numbers), tuple(of_workload), default)


def allows(policies: Iterable[Policy], *, dry_run: bool) -> bool:
    """Whether one of them allows, so that what none allows is refused."""
    return any(policy.action == Action.ALLOW and policy.dry_run == dry_run for policy in policies)


def add_policies(
    table: PolicyTable, policies: Sequence[Policy], workloads: Sequence[Workload], number: Callable[[str], int]
) -> PolicySets:
    """Compiles the policies into the table. ``number`` gives the id of a policy's name. Without any policy the table stays empty,
    which lets everything pass."""
    sets = find_sets(policies, workloads)
    if not policies:
        return sets
    clauses = [
        [
            table.add_clause(number(policy.name), policy.action == Action.DENY, policy.dry_run, **compile_clause(policy, peers))
            for peers in policy.peers
        ]
        for policy in policies
    ]
    for members in sets.members:
        selected = [policies[member] for member in members]
        table.add_policy_set(
            [clause for member in members for clause in clauses[member]],
            allows(selected, dry_run=False),
            allows(selected, dry_run=True),
        )
    table.set_default_policies(sets.default)
    return sets
