"""From a configuration to rules as data.

What is captured:

========= ============= =================================================================================================
direction capture       traffic
========= ============= =================================================================================================
outbound  redirect      what processes of this host send (nat OUTPUT), and what passes through it on the way to an address that
                        is not its own (nat PREROUTING): pods, or clients that have this host as their gateway
outbound  tproxy        what passes through only: TPROXY has no hook for a host's own packets
inbound   redirect,     what arrives for an address of this host, or for ``include.destinations`` (pods behind it)
          tproxy
========= ============= =================================================================================================

Never captured: loopback, and packets with our own mark. ``exclude`` goes before ``include``; users are known for a host's own
packets only. Where no socket listens, REDIRECT ends in a refusal and TPROXY in a drop: capture fails closed.

``preserve_source`` has two more needs: answers to an address that is not ours must come back to us. Our marked packets mark
their flow (connmark), the flow's answers get that mark back, and marked packets are delivered locally (policy routing).

NOTRACK spares the upstream leg the cost of conntrack, where nothing can depend on NAT for it: when all that is captured is inbound
by TPROXY with our own source address, so that every upstream is a workload behind us.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network

from l4mesh.model import Capture, CaptureFilter, Config, Direction, Listener, Network

CHAIN_PREFIX = "L4MESH_"
COMMENT = "l4mesh"
ROUTE_TABLE = 1539
ROUTE_PREFERENCE = 32764
PORTS_A_RULE = 15
"""multiport takes no more; a range counts as two."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line: a table, one of our chains, and the arguments of -A."""

    table: str
    chain: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FamilyRules:
    """All rules of IPv4 or of IPv6, in order. ``routes``: marked packets are delivered locally."""

    is_v6: bool
    rules: tuple[Rule, ...]
    return_mark: str
    routes: bool

    @property
    def chains(self) -> list[tuple[str, str]]:
        """(table, chain) in order of first use."""
        return list(dict.fromkeys((rule.table, rule.chain) for rule in self.rules))


def build_rules(config: Config) -> list[FamilyRules]:
    """The rules of the families that a capturing listener is bound to; none without such listeners."""
    families = []
    for is_v6 in (False, True):
        captures = [
            (listener, bind.port)
            for listener in config.listeners.values()
            if listener.capture != Capture.NONE
            for bind in listener.binds
            if bind.is_v6 == is_v6
        ]
        if captures:
            families.append(_build_family(config, captures, is_v6))
    return families


def _build_family(config: Config, captures: list[tuple[Listener, int]], is_v6: bool) -> FamilyRules:
    preserve = any(listener.preserve_source for listener, _ in captures)
    tproxy = any(listener.capture == Capture.TPROXY for listener, _ in captures)
    rules: list[Rule] = []
    if all(_is_notrackable(listener) for listener, _ in captures):
        rules += _notrack_rules(str(config.mark))
    if preserve:
        rules += _return_rules(str(config.mark), str(config.return_mark))
    if tproxy:
        rules += _divert_rules(str(config.return_mark))
    skipped: set[tuple[str, str]] = set()
    for listener, port in captures:
        for rule in _capture_rules(config, listener, port, is_v6):
            chain = (rule.table, rule.chain)
            if chain not in skipped:
                # Ours first: a packet with our mark has been decided on already.
                skipped.add(chain)
                rules.append(Rule(*chain, ("-m", "mark", "--mark", str(config.mark), "-j", "RETURN")))
                if rule.chain.endswith("OUTPUT"):
                    rules.append(Rule(*chain, ("-o", "lo", "-j", "RETURN")))
                else:
                    rules.append(Rule(*chain, ("-i", "lo", "-j", "RETURN")))
            rules.append(rule)
    order = {chain: at for at, chain in enumerate(dict.fromkeys((rule.table, rule.chain) for rule in rules))}
    rules.sort(key=lambda rule: order[rule.table, rule.chain])
    return FamilyRules(is_v6, tuple(rules), str(config.return_mark), routes=preserve or tproxy)


def _is_notrackable(listener: Listener) -> bool:
    return listener.capture == Capture.TPROXY and listener.direction == Direction.INBOUND and not listener.preserve_source


def _notrack_rules(mark: str) -> list[Rule]:
    marked = ("-p", "tcp", "-m", "mark", "--mark", mark)
    return [
        Rule("raw", f"{CHAIN_PREFIX}OUTPUT", (*marked, "-j", "CT", "--notrack")),
        # The answers: their socket has our mark, and lends it to the packet.
        Rule("raw", f"{CHAIN_PREFIX}PREROUTING", ("-p", "tcp", "-m", "socket", "--nowildcard", "--restore-skmark")),
        Rule("raw", f"{CHAIN_PREFIX}PREROUTING", (*marked, "-j", "CT", "--notrack")),
    ]


def _return_rules(mark: str, return_mark: str) -> list[Rule]:
    mask = return_mark.partition("/")[2]
    ours = ("-p", "tcp", "-m", "mark", "--mark", mark)
    answers = ("-p", "tcp", "-m", "mark", "!", "--mark", mark, "-m", "connmark", "--mark", return_mark)
    restore = ("-j", "CONNMARK", "--restore-mark", "--nfmask", mask, "--ctmask", mask)
    return [
        Rule("mangle", f"{CHAIN_PREFIX}OUTPUT", (*ours, "-j", "CONNMARK", "--set-xmark", return_mark)),
        Rule("mangle", f"{CHAIN_PREFIX}OUTPUT", (*answers, *restore)),
        Rule("mangle", f"{CHAIN_PREFIX}RETURN", (*answers, *restore)),
        Rule("mangle", f"{CHAIN_PREFIX}RETURN", ("-p", "tcp", "-m", "mark", "--mark", return_mark, "-j", "ACCEPT")),
    ]


def _divert_rules(return_mark: str) -> list[Rule]:
    """Packets of connections that we have accepted go to their socket without another look at the rules."""
    established = ("-p", "tcp", "-m", "socket", "--transparent")
    return [
        Rule("mangle", f"{CHAIN_PREFIX}DIVERT", (*established, "-j", "MARK", "--set-xmark", return_mark)),
        Rule("mangle", f"{CHAIN_PREFIX}DIVERT", (*established, "-j", "ACCEPT")),
    ]


def _capture_rules(config: Config, listener: Listener, port: int, is_v6: bool) -> Iterator[Rule]:
    passing = Rule("nat", f"{CHAIN_PREFIX}PREROUTING", ())
    if listener.capture == Capture.TPROXY:
        passing = Rule("mangle", f"{CHAIN_PREFIX}PREROUTING", ())
        target: tuple[str, ...] = ("-j", "TPROXY", "--on-port", str(port), "--tproxy-mark", str(config.return_mark))
    else:
        target = ("-j", "REDIRECT", "--to-ports", str(port))
    yield from _filtered(passing, listener, target, is_v6, own=False)
    if listener.capture == Capture.REDIRECT and listener.direction == Direction.OUTBOUND:
        yield from _filtered(Rule("nat", f"{CHAIN_PREFIX}OUTPUT", ()), listener, target, is_v6, own=True)


def _filtered(where: Rule, listener: Listener, target: tuple[str, ...], is_v6: bool, *, own: bool) -> Iterator[Rule]:
    """A chain's part for one listener: what it leaves out, then what it takes. ``own``: packets of this host."""
    scope = _scope(listener, own)
    for condition in _conditions(listener.exclude, is_v6, own, alternatives=True):
        yield Rule(where.table, where.chain, ("-p", "tcp", *scope, *condition, "-j", "RETURN"))
    for condition in _conditions(listener.include, is_v6, own, alternatives=False):
        yield Rule(where.table, where.chain, ("-p", "tcp", *scope, *condition, *target))


def _scope(listener: Listener, own: bool) -> tuple[str, ...]:
    if own:
        return ()
    if listener.direction == Direction.OUTBOUND:
        return ("-m", "addrtype", "!", "--dst-type", "LOCAL")
    return () if listener.include.destinations else ("-m", "addrtype", "--dst-type", "LOCAL")


def _conditions(kept: CaptureFilter, is_v6: bool, own: bool, *, alternatives: bool) -> Iterator[tuple[str, ...]]:
    """The rules' conditions: of an exclusion each by itself, of an inclusion all that are given together."""
    groups: list[list[tuple[str, ...]]] = [
        [("-d", str(network)) for network in kept.destinations if _is_family(network, is_v6)],
        [("-o" if own else "-i", interface) for interface in kept.interfaces],
        [("-m", "owner", "--uid-owner", user) for user in kept.users] if own else [],
        [_port_condition(ports) for ports in _port_groups(kept.ports)],
    ]
    if alternatives:
        for group in groups:
            yield from group
        return
    if kept.destinations and not groups[0]:
        return
    if own and kept.interfaces:
        # Named interfaces are those that clients come in by; a host's own packets have none.
        groups[1] = []
    combined: list[tuple[str, ...]] = [()]
    for group in groups:
        if group:
            combined = [(*before, *condition) for before in combined for condition in group]
    yield from combined


def _is_family(network: Network, is_v6: bool) -> bool:
    return isinstance(network, IPv4Network) != is_v6


def _port_groups(ports: tuple[tuple[int, int], ...]) -> Iterator[list[tuple[int, int]]]:
    group: list[tuple[int, int]] = []
    size = 0
    for first, last in ports:
        cost = 1 if first == last else 2
        if size + cost > PORTS_A_RULE:
            yield group
            group, size = [], 0
        group.append((first, last))
        size += cost
    if group:
        yield group


def _port_condition(ports: list[tuple[int, int]]) -> tuple[str, ...]:
    shown = [str(first) if first == last else f"{first}:{last}" for first, last in ports]
    if len(shown) == 1:
        return ("-m", "tcp", "--dport", shown[0])
    return ("-m", "multiport", "--dports", ",".join(shown))
