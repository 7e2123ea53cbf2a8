"""Rules as text for iptables-restore, and for people."""

from __future__ import annotations

from collections.abc import Sequence

from l4mesh.capture.rules import CHAIN_PREFIX, COMMENT, ROUTE_PREFERENCE, ROUTE_TABLE, FamilyRules

JUMPS: dict[str, str] = {
    f"{CHAIN_PREFIX}OUTPUT": "OUTPUT",
    f"{CHAIN_PREFIX}FORWARD": "FORWARD",
    f"{CHAIN_PREFIX}PREROUTING": "PREROUTING",
    f"{CHAIN_PREFIX}DIVERT": "PREROUTING",
    f"{CHAIN_PREFIX}RETURN": "PREROUTING",
}
"""From our chains to the built-in ones that jump to them. Later ones end up before earlier ones. Others are gone to from these."""


def jump_arguments(chain: str) -> tuple[str, ...]:
    return ("-m", "comment", "--comment", COMMENT, "-j", chain)


def render(family: FamilyRules, found_jumps: Sequence[tuple[str, str]] = (), stale_chains: Sequence[tuple[str, str]] = ()) -> str:
    """One transaction for ``iptables-restore --noflush``: our chains anew, with one jump to each at the head.

    ``found_jumps``: (table, "-A …" line) of jumps that are there and go first. ``stale_chains``: chains of ours that are
    there and no longer wanted.
    """
    lines: list[str] = []
    wanted = family.chains
    tables = list(dict.fromkeys([table for table, _ in (*wanted, *stale_chains, *found_jumps)]))
    for table in tables:
        chains = [chain for owner, chain in wanted if owner == table]
        stale = [chain for owner, chain in stale_chains if owner == table and chain not in chains]
        lines.append(f"*{table}")
        lines += [f":{chain} - [0:0]" for chain in (*chains, *stale)]
        lines += [line.replace("-A ", "-D ", 1) for owner, line in found_jumps if owner == table]
        lines += [f"-A {rule.chain} {' '.join(rule.arguments)}" for rule in family.rules if rule.table == table]
        for chain in sorted(JUMPS.keys() & chains, key=list(JUMPS).index):
            lines.append(f"-I {JUMPS[chain]} 1 {' '.join(jump_arguments(chain))}")
        lines += [f"-X {chain}" for chain in stale]
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


def rule_commands(family: FamilyRules) -> list[list[str]]:
    """The arguments of `ip` that route marked packets to this host."""
    if not family.routes:
        return []
    version = "-6" if family.is_v6 else "-4"
    everywhere = "::/0" if family.is_v6 else "0.0.0.0/0"
    return [
        [version, "rule", "add", "fwmark", family.return_mark, "pref", str(ROUTE_PREFERENCE), "lookup", str(ROUTE_TABLE)],
        [version, "route", "replace", "local", everywhere, "dev", "lo", "table", str(ROUTE_TABLE)],
    ]


def render_all(families: Sequence[FamilyRules]) -> str:
    """Everything that ``apply`` puts in place, readable and ready for the named commands."""
    if not families:
        return "# no listener captures: there are no rules\n"
    parts = []
    for family in families:
        parts.append(f"# {'ip6tables' if family.is_v6 else 'iptables'}-restore --noflush\n{render(family)}")
        parts += [f"ip {' '.join(command)}\n" for command in rule_commands(family)]
    return "".join(parts)
