"""Rules on a host: put in place, compared, removed. Everything else on the host stays as it is.

What should be there is learned from iptables itself: the rules are put into an empty network namespace and listed there, so that
a comparison never stumbles over how a rule is spelt.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from l4mesh.capture.render import JUMPS, render, rule_commands
from l4mesh.capture.rules import CHAIN_PREFIX, ROUTE_TABLE, FamilyRules
from l4mesh.errors import CommandError

_V6 = Path("/proc/net/if_inet6")
"""Not there where the kernel was told to do without IPv6."""
_COUNTERS = re.compile(r"^\[\d+:\d+\] ")
_JUMP = re.compile(rf"^-A .* -[jg] {CHAIN_PREFIX}\w+$")
_HOOKS = tuple(f"-A {hook} " for hook in dict.fromkeys(JUMPS.values()))
_TARGET = re.compile(r' -[jg] (\S+)(?=[^"]*(?:"[^"]*"[^"]*)*$)')
"""Of a rule: what it jumps or goes to, unless it stands in a quoted argument."""
_GOES_ON = re.compile(
    "AUDIT|CHECKSUM|CLASSIFY|CONNMARK|CONNSECMARK|CT|DSCP|HL|HMARK|IDLETIMER|LED|LOG|MARK|NFLOG|NOTRACK|RATEEST|SECMARK|SET|TCPMSS"
    "|TCPOPTSTRIP|TEE|TOS|TRACE|TTL|ULOG"
)
"""Targets after which a packet goes on to the next rule."""
Place = tuple[str, str]
"""(table, chain)"""


@dataclass(slots=True)
class Listing:
    """What is there of ours, of one family: chains with their lines, and the jumps to them."""

    chains: dict[Place, list[str]] = field(default_factory=dict)
    jumps: list[tuple[str, str]] = field(default_factory=list)
    """(table, "-A …" line) by table, in order."""
    ahead: list[tuple[str, str]] = field(default_factory=list)
    """(table, "-A …" line) of others that stand before a jump and may keep a packet from it."""


def require_tools() -> None:
    """Raises CommandError when a program that ``apply_rules`` needs is missing."""
    for tool in ("iptables-save", "iptables-restore", "ip"):
        _require(tool)


def apply_rules(families: Sequence[FamilyRules], netns: str | None = None) -> dict[bool, Listing]:
    """Puts the rules in place, each family in one transaction; what is there of ours is replaced.

    Gives what iptables lists of ours then, by "is IPv6". Raises CommandError; where nothing of ours was before, nothing is then.
    """
    found = {family.is_v6: _list(family.is_v6, netns) for family in families}
    try:
        return _apply_rules(families, found, netns)
    except CommandError:
        if not any(listing.chains for listing in found.values()):
            with contextlib.suppress(CommandError):
                remove_rules(netns)
        raise


def _apply_rules(families: Sequence[FamilyRules], found: Mapping[bool, Listing], netns: str | None) -> dict[bool, Listing]:
    for family in families:
        # First, so that nothing of either family is captured that can't be delivered. Only where they differ: a moment without them
        # would cost live connections packets.
        if family.routes and _check_routes(family, family.is_v6, netns):
            _remove_routes(family.is_v6, netns)
            for command in rule_commands(family):
                _run(["ip", *command], netns)
    listed: dict[bool, Listing] = {}
    for is_v6 in (False, True):
        wanted = next((family for family in families if family.is_v6 == is_v6), None)
        if wanted is None:
            _remove_family(is_v6, netns)
            listed[is_v6] = Listing()
            continue
        _restore(is_v6, render(wanted, found[is_v6].jumps, list(found[is_v6].chains)), netns)
        if not wanted.routes:
            _remove_routes(is_v6, netns)
        listed[is_v6] = _list(is_v6, netns)
        if not _is_whole(wanted, listed[is_v6]):
            raise CommandError("rules that were put in place are gone at once: something else changes them at the same time")
    return listed


def _is_whole(family: FamilyRules, listing: Listing) -> bool:
    counts = {chain: sum((rule.table, rule.chain) == chain for rule in family.rules) for chain in family.chains}
    jumps = sum(chain in JUMPS for _, chain in family.chains)
    return {chain: len(lines) for chain, lines in listing.chains.items()} == counts and len(listing.jumps) == jumps


def check_rules(families: Sequence[FamilyRules], netns: str | None = None, listed: Mapping[bool, Listing] | None = None) -> list[str]:
    """Every difference between what is in place and what should be, in words.

    ``listed``: what ``apply_rules`` gave for the same rules; it saves an empty namespace, which takes CAP_SYS_ADMIN. Raises
    CommandError.
    """
    differences: list[str] = []
    for is_v6 in (False, True):
        family = next((family for family in families if family.is_v6 == is_v6), None)
        differences += _check_family(family, is_v6, netns, listed[is_v6] if listed else None)
    return differences


def remove_rules(netns: str | None = None) -> None:
    """Removes all chains, jumps, routes and routing rules of ours. Raises CommandError."""
    for is_v6 in (False, True):
        _remove_family(is_v6, netns)


def _remove_family(is_v6: bool, netns: str | None) -> None:
    if is_v6 and not _knows_v6():
        return
    found = _list(is_v6, netns)
    if found.chains or found.jumps:
        nothing = FamilyRules(is_v6, (), "", routes=False)
        _restore(is_v6, render(nothing, found.jumps, list(found.chains)), netns)
    _remove_routes(is_v6, netns)


def _check_family(family: FamilyRules | None, is_v6: bool, netns: str | None, wanted: Listing | None) -> list[str]:
    name = "IPv6" if is_v6 else "IPv4"
    if family is None and is_v6 and not _knows_v6():
        return []
    found = _list(is_v6, netns)
    if wanted is None:
        wanted = _parse(_canonical(family)) if family else Listing()
    differences: list[str] = []
    for place in dict.fromkeys([*wanted.chains, *found.chains]):
        where = f"{name} {place[0]} {place[1]}"
        if place not in found.chains:
            differences.append(f"{where}: the chain is missing")
        elif place not in wanted.chains:
            differences.append(f"{where}: the chain should not be there")
        else:
            differences += [f"{where}: {text}" for text in _compare(wanted.chains[place], found.chains[place])]
    for jump in dict.fromkeys([*wanted.jumps, *found.jumps]):
        count = found.jumps.count(jump) - wanted.jumps.count(jump)
        where = f"{name} {jump[0]}"
        if count:
            differences.append(f"{where}: {'missing' if count < 0 else 'one too many'}: {jump[1]}")
    if not differences and found.jumps != wanted.jumps:
        differences.append(f"{name}: the jumps to our chains are in another order")
    differences += [f"{name} {table}: ahead of ours, which never see what it takes: {line}" for table, line in found.ahead]
    return differences + [f"{name} {text}" for text in _check_routes(family, is_v6, netns)]


def _knows_v6() -> bool:
    """Where IPv6 is not known there is nothing of ours in it, and to ask would be an error."""
    return bool(shutil.which("ip6tables-save")) and _V6.exists()


def _compare(wanted: list[str], found: list[str]) -> list[str]:
    left = set(wanted), set(found)
    missing = [line for line in wanted if line not in left[1]]
    extra = [line for line in found if line not in left[0]]
    texts = [f"missing: {line}" for line in missing] + [f"not ours: {line}" for line in extra]
    if not texts and wanted != found:
        texts = ["the rules are in another order, or one stands twice"]
    return texts


def _check_routes(family: FamilyRules | None, is_v6: bool, netns: str | None) -> list[str]:
    wanted = bool(family and family.routes)
    rules = _routing_rules(is_v6, netns)
    routes = _routes(is_v6, netns)
    texts = []
    if wanted and len(rules) != 1:
        texts.append(f"routing: {'missing' if not rules else 'more than one'}: rule fwmark lookup {ROUTE_TABLE}")
    elif wanted and family and _mark_of(rules[0]) != family.return_mark:
        texts.append(f"routing: the rule matches mark {_mark_of(rules[0])} and should match {family.return_mark}")
    if wanted and not any(route.get("type") == "local" for route in routes):
        texts.append(f"routing: missing: local route in table {ROUTE_TABLE}")
    if not wanted and (rules or routes):
        texts.append(f"routing: rule or route of table {ROUTE_TABLE} should not be there")
    return texts


def _mark_of(rule: dict[str, str]) -> str:
    return f"{rule.get('fwmark', '')}/{rule.get('fwmask', '')}"


def _routing_rules(is_v6: bool, netns: str | None) -> list[dict[str, str]]:
    # By the table alone: where others name no preference, the kernel may give ours to theirs. By its number: a host may have named it.
    listed = json.loads(_run(["ip", "-N", "-j", "-6" if is_v6 else "-4", "rule", "list"], netns) or "[]")
    return [rule for rule in listed if rule.get("table") == str(ROUTE_TABLE)]


def _routes(is_v6: bool, netns: str | None) -> list[dict[str, str]]:
    command = ["ip", "-j", "-6" if is_v6 else "-4", "route", "show", "table", str(ROUTE_TABLE)]
    # A table that has never been used is an error to `ip`, not an empty one.
    listed: list[dict[str, str]] = json.loads(_run(command, netns, may_fail=True) or "[]")
    return listed


def _remove_routes(is_v6: bool, netns: str | None) -> None:
    version = "-6" if is_v6 else "-4"
    for rule in _routing_rules(is_v6, netns):
        _run(["ip", version, "rule", "del", "pref", str(rule["priority"]), "lookup", str(ROUTE_TABLE)], netns, may_fail=True)
    if _routes(is_v6, netns):
        _run(["ip", version, "route", "flush", "table", str(ROUTE_TABLE)], netns)


def _list(is_v6: bool, netns: str | None) -> Listing:
    return _parse(_run(["ip6tables-save" if is_v6 else "iptables-save"], netns))


def _parse(saved: str) -> Listing:
    listing = Listing()
    table = ""
    foreign: dict[Place, list[str]] = {}
    for raw in saved.splitlines():
        line = _COUNTERS.sub("", raw)
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(f":{CHAIN_PREFIX}"):
            listing.chains[table, line[1:].split()[0]] = []
        elif line.startswith(f"-A {CHAIN_PREFIX}"):
            listing.chains.setdefault((table, line.split()[1]), []).append(line)
        elif _JUMP.match(line):
            listing.jumps.append((table, line))
            listing.ahead += [(table, other) for other in foreign.pop((table, line.split()[1]), [])]
        elif line.startswith(_HOOKS) and _takes(line):
            foreign.setdefault((table, line.split()[1]), []).append(line)
    # iptables-legacy lists tables in the order of their first use, not in one of its own.
    listing.jumps.sort(key=lambda jump: jump[0])
    return listing


def _takes(line: str) -> bool:
    target = _TARGET.search(line)
    return target is not None and not _GOES_ON.fullmatch(target[1])


def _canonical(family: FamilyRules) -> str:
    """The rules as iptables lists them: from a namespace of their own that is gone afterwards."""
    tool = "ip6tables" if family.is_v6 else "iptables"
    script = f"{tool}-restore --noflush && {tool}-save"
    return _run(["unshare", "--net", "sh", "-c", script], None, stdin=render(family))


def _restore(is_v6: bool, text: str, netns: str | None) -> None:
    _run(["ip6tables-restore" if is_v6 else "iptables-restore", "--noflush", "--wait", "10"], netns, stdin=text)


def _run(command: list[str], netns: str | None, *, stdin: str | None = None, may_fail: bool = False) -> str:
    """Standard output of a command, in a network namespace when one is given. Raises CommandError with what it said."""
    _require(command[0])
    prefix: list[str] = []
    if netns:
        prefix = ["nsenter", f"--net={netns}"] if "/" in netns else ["ip", "netns", "exec", netns]
    try:
        done = subprocess.run([*prefix, *command], input=stdin, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CommandError(f"{' '.join(command)}: can't be run: {error.strerror}") from None
    if done.returncode and not may_fail:
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = said[0].rstrip(".") if said else f"exit code {done.returncode}"
        hint = ": run it as root" if "ermission denied" in reason or "not permitted" in reason else ""
        if "IPv6 is disabled" in reason:
            hint = ": enable it (sysctl net.ipv6.conf.lo.disable_ipv6=0), or bind no listener that captures to an IPv6 address"
        raise CommandError(f"{' '.join(command)}: {reason}{hint}")
    return "" if done.returncode else done.stdout


def _require(tool: str) -> None:
    if not shutil.which(tool):
        package = "iproute2" if tool == "ip" else "util-linux" if tool == "unshare" else "iptables"
        raise CommandError(f"{tool} is not installed: install the package {package}")
