"""From a configuration to rules as data.

What is captured:

========= ============= =================================================================================================
direction capture       traffic
========= ============= =================================================================================================
outbound  redirect      what processes of this host send (nat OUTPUT), and what passes through it on the way to an address that
                        is not its own (nat PREROUTING): pods, or clients that have this host as their gateway
outbound  tproxy        what passes through only: TPROXY has no hook for a host's own packets
inbound   redirect,     what arrives for an address of this host, or for ``include.destinations`` (pods behind it); what the host
          tproxy        itself sends to its pods is not captured
========= ============= =================================================================================================

Never captured: loopback, and packets with our own mark. ``exclude`` goes before ``include``; users are known for a host's own
packets only. Where no socket listens, REDIRECT ends in a refusal and TPROXY in a drop: capture fails closed.

Only the first packet of a connection is captured; the rest follows it, by conntrack (REDIRECT) or by its socket (DIVERT). So
the answers to connections that others make are left alone, and so are connections older than the rules.

A packet from one pod of this host to another is both outbound and inbound. The listeners' turn is: outbound ones that name whose
traffic they take (``include`` of interfaces or sources), inbound ones, other outbound ones. Whatever an outbound listener leaves out
is still offered to the inbound ones, and what nobody named is not let past an inbound one.

Pods must be routed by this host. What two of them on one bridge say to each other is not seen here; where bridges call iptables, it is,
but it loses the socket that TPROXY gives it and would go on to the pod: L4MESH_FORWARD drops it.

``preserve_source`` has two more needs: answers to an address that is not ours must come back to us. Our marked packets mark
their flow (connmark), the flow's answers get that mark back, and marked packets are delivered locally (policy routing).

NOTRACK spares the upstream leg the cost of conntrack, where nothing can depend on NAT for it: when all that is captured is inbound
by TPROXY with our own source address, so that every upstream is a workload behind us.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network

from l4mesh.model import Capture, CaptureFilter, Config, Direction, Listener, Network

CHAIN_PREFIX = "L4MESH_"
COMMENT = "l4mesh"
ROUTE_TABLE = 1539
ROUTE_PREFERENCE = 10
"""Soon after the local table: marked packets are delivered here whatever others route by source or destination."""
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


def without_capture(families: Sequence[FamilyRules]) -> list[FamilyRules]:
    """What is left when nothing new is to be captured: what live connections need to find their way."""
    left = []
    for family in families:
        rules = [rule for rule in family.rules if not _captures(rule)]
        if any(rule.table == "nat" for rule in family.rules):
            # Conntrack remembers what was redirected, but only while there is a rule in the namespace that needs it.
            rules.append(Rule("nat", f"{CHAIN_PREFIX}PREROUTING", ("-m", "conntrack", "--ctstate", "NEW", "-j", "RETURN")))
        left.append(replace(family, rules=tuple(rules)))
    return left


def _captures(rule: Rule) -> bool:
    return rule.table == "nat" or (rule.table == "mangle" and rule.chain.startswith(f"{CHAIN_PREFIX}PREROUTING"))


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
    captures = sorted(captures, key=lambda capture: _turn(capture[0]))
    redirects = [capture for capture in captures if capture[0].capture == Capture.REDIRECT]
    for table, hook, listeners in (
        ("mangle", "PREROUTING", _up_to_tproxy(captures)),
        ("nat", "PREROUTING", redirects),
        ("nat", "OUTPUT", [capture for capture in redirects if capture[0].direction == Direction.OUTBOUND]),
    ):
        own = hook == "OUTPUT"
        takers = [(listener, port) for listener, port in listeners if any(True for _ in _conditions(listener.include, is_v6, own))]
        if takers:
            chain = f"{CHAIN_PREFIX}{hook}"
            rules += [Rule(table, chain, condition) for condition in _never_captured(config, table, hook, tproxy=tproxy)]
            rules += _capture_rules(config, table, hook, takers, is_v6)
    order = {chain: at for at, chain in enumerate(dict.fromkeys((rule.table, rule.chain) for rule in rules))}
    rules.sort(key=lambda rule: order[rule.table, rule.chain])
    return FamilyRules(is_v6, tuple(rules), str(config.return_mark), routes=preserve or tproxy)


def _turn(listener: Listener) -> int:
    if listener.direction == Direction.INBOUND:
        return 1
    return 0 if listener.include.interfaces or listener.include.sources else 2


def _up_to_tproxy(captures: list[tuple[Listener, int]]) -> list[tuple[Listener, int]]:
    """What mangle must know: the TPROXY listeners, and those before them, whose packets it leaves to nat."""
    kinds = [listener.capture for listener, _ in captures]
    while kinds and kinds[-1] != Capture.TPROXY:
        kinds.pop()
    return captures[: len(kinds)]


def _never_captured(config: Config, table: str, hook: str, *, tproxy: bool) -> Iterator[tuple[str, ...]]:
    # Ours first: a packet with our mark has been decided on already.
    yield "-m", "mark", "--mark", str(config.mark), "-j", "RETURN"
    if table == "nat" and hook == "PREROUTING" and tproxy:
        # A packet that mangle has just given to a listener.
        yield "-m", "mark", "--mark", str(config.return_mark), "-j", "RETURN"
    yield "-o" if hook == "OUTPUT" else "-i", "lo", "-j", "RETURN"
    if table == "mangle":
        yield "-p", "tcp", "-m", "tcp", "!", "--syn", "-j", "RETURN"


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
    """Packets of connections that we have accepted go to their socket without another look at the rules.

    Not the first one: it may find the old socket of its addresses in TIME_WAIT, with which TPROXY alone knows what to do.
    """
    established = ("-p", "tcp", "-m", "tcp", "!", "--syn", "-m", "socket", "--transparent")
    return [
        Rule("mangle", f"{CHAIN_PREFIX}DIVERT", (*established, "-j", "MARK", "--set-xmark", return_mark)),
        Rule("mangle", f"{CHAIN_PREFIX}DIVERT", (*established, "-j", "ACCEPT")),
        # Marked packets are delivered here: one that is forwarded all the same, on a bridge, has got past us.
        Rule("mangle", f"{CHAIN_PREFIX}FORWARD", ("-p", "tcp", "-m", "mark", "--mark", return_mark, "-j", "DROP")),
    ]


def _capture_rules(config: Config, table: str, hook: str, captures: list[tuple[Listener, int]], is_v6: bool) -> Iterator[Rule]:
    """A chain for each listener: what it leaves out goes on to the next one, what it takes is taken.

    In mangle a REDIRECT takes by letting the packet pass: nat comes later.
    """
    own = hook == "OUTPUT"
    for number, (listener, port) in enumerate(captures, 1):
        chain = f"{CHAIN_PREFIX}{hook}" + (f"_{number}" if number > 1 else "")
        following = ("-g", f"{CHAIN_PREFIX}{hook}_{number + 1}") if number < len(captures) else ("-j", "RETURN")
        take: tuple[str, ...] = ("-j", "RETURN")
        if listener.capture == Capture.TPROXY:
            take = ("-j", "TPROXY", "--on-port", str(port), "--tproxy-mark", str(config.return_mark))
        elif table == "nat":
            take = ("-j", "REDIRECT", "--to-ports", str(port))
        packet = ("-p", "tcp", *_scope(listener, own))
        for condition in _alternatives(listener.exclude, is_v6, own):
            yield Rule(table, chain, (*packet, *condition, *following))
        for condition in _conditions(listener.include, is_v6, own):
            yield Rule(table, chain, (*packet, *condition, *take))
        if number < len(captures):
            yield Rule(table, chain, following)


def _scope(listener: Listener, own: bool) -> tuple[str, ...]:
    if own:
        return ()
    if listener.direction == Direction.OUTBOUND:
        return ("-m", "addrtype", "!", "--dst-type", "LOCAL")
    return () if listener.include.destinations else ("-m", "addrtype", "--dst-type", "LOCAL")


def _groups(kept: CaptureFilter, is_v6: bool, own: bool) -> list[list[tuple[str, ...]]]:
    """A filter as conditions of rules, field by field. ``own``: for packets of this host."""
    return [
        [("-d", str(network)) for network in kept.destinations if _is_family(network, is_v6)],
        [("-s", str(network)) for network in kept.sources if _is_family(network, is_v6)],
        [("-o" if own else "-i", interface) for interface in kept.interfaces],
        [("-m", "owner", "--uid-owner", user) for user in kept.users] if own else [],
        [_port_condition(ports) for ports in _port_groups(kept.ports)],
    ]


def _alternatives(excluded: CaptureFilter, is_v6: bool, own: bool) -> Iterator[tuple[str, ...]]:
    """Each condition by itself leaves a packet out."""
    for group in _groups(excluded, is_v6, own):
        yield from group


def _conditions(included: CaptureFilter, is_v6: bool, own: bool) -> Iterator[tuple[str, ...]]:
    """A packet is taken that meets one condition of every field that is given. None: nothing of this family is taken."""
    destinations, sources, interfaces, users, ports = _groups(included, is_v6, own)
    if (included.destinations and not destinations) or (included.sources and not sources):
        return
    if own:
        # Named interfaces are those that clients come in by; a host's own packets have none.
        interfaces = []
    combined: list[tuple[str, ...]] = [()]
    for group in (destinations, sources, interfaces, users, ports):
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
