"""Rules on a real host: applied twice, tampered with, repaired, removed without a trace, foreign ones untouched."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from l4mesh.capture.host import apply_rules, check_rules, remove_rules
from l4mesh.capture.rules import FamilyRules, Rule, build_rules
from l4mesh.config.load import parse_config
from l4mesh.errors import CommandError
from l4mesh.lab import Host, Lab

pytestmark = pytest.mark.netns

CONFIG = """
listeners:
  - name: outbound
    bind: ["0.0.0.0:15001", "[::]:15001"]
    capture: redirect
    preserve_source: on
    include: {sources: [10.244.1.0/24, "fd00:10:244:1::/64"]}
    exclude: {ports: [22, "8000-8010"], destinations: [10.9.0.0/16], users: ["0"]}
    default: original_destination
  - name: inbound
    bind: ["0.0.0.0:15006", "[::]:15006"]
    capture: tproxy
    include: {ports: [80, 443], destinations: [10.244.1.0/24, "fd00:10:244:1::/64"]}
    default: original_destination
"""
FOREIGN = """\
*nat
:FOREIGN - [0:0]
-A PREROUTING -p tcp -m tcp --dport 9999 -j FOREIGN
-A OUTPUT -p tcp -m tcp --dport 9998 -j ACCEPT
-A FOREIGN -m comment --comment "before -j L4MESH_OUTPUT"
-A FOREIGN -j RETURN
COMMIT
*mangle
-A PREROUTING -p udp -j ACCEPT
COMMIT
"""


@pytest.fixture
def host() -> Iterator[Host]:
    with Lab() as lab:
        yield lab.host("h")


@pytest.fixture
def rules() -> list[FamilyRules]:
    return build_rules(parse_config(CONFIG))


def saved(host: Host) -> str:
    """Everything but counters, comments, and tables that hold nothing."""
    text = host.run("iptables-save") + host.run("ip6tables-save")
    text = re.sub(r"\[\d+:\d+\]", "", re.sub(r"^#.*\n", "", text, flags=re.M))
    text = re.sub(r"\*\w+\n(:(PREROUTING|INPUT|FORWARD|OUTPUT|POSTROUTING) ACCEPT \n)*COMMIT\n", "", text)
    return text + host.run("ip", "rule") + host.run("ip", "-6", "rule")


def test_applied_twice_is_applied_once(host: Host, rules: list[FamilyRules]) -> None:
    apply_rules(rules, host.namespace)
    once = saved(host)
    apply_rules(rules, host.namespace)
    assert saved(host) == once
    assert check_rules(rules, host.namespace) == []


TAMPERING = [
    (("iptables", "-t", "nat", "-D", "L4MESH_OUTPUT", "3"), "IPv4 nat L4MESH_OUTPUT: missing: -A L4MESH_OUTPUT -d 10.9.0.0/16"),
    (("iptables", "-t", "nat", "-A", "L4MESH_OUTPUT", "-j", "ACCEPT"), "IPv4 nat L4MESH_OUTPUT: not ours: -A L4MESH_OUTPUT -j ACCEPT"),
    (("iptables", "-t", "nat", "-F", "L4MESH_PREROUTING"), "IPv4 nat L4MESH_PREROUTING: missing:"),
    (("iptables", "-t", "mangle", "-F", "L4MESH_PREROUTING_2"), "IPv4 mangle L4MESH_PREROUTING_2: missing: -A L4MESH_PREROUTING_2 -d 10.244.1.0/24"),
    (("iptables", "-t", "nat", "-F"), "IPv4 nat: missing: -A OUTPUT"),
    (("ip6tables", "-t", "mangle", "-F", "PREROUTING"), "IPv6 mangle: missing: -A PREROUTING"),
    (("iptables", "-t", "nat", "-I", "OUTPUT", "-m", "comment", "--comment", "l4mesh", "-j", "L4MESH_OUTPUT"), "IPv4 nat: one too many: -A OUTPUT"),
    (("iptables", "-t", "nat", "-A", "OUTPUT", "-g", "L4MESH_OUTPUT"), "IPv4 nat: one too many: -A OUTPUT -g L4MESH_OUTPUT"),
    (("ip", "rule", "del", "pref", "10"), "IPv4 routing: missing: rule"),
    (("ip", "-6", "route", "flush", "table", "1539"), "IPv6 routing: missing: local route"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "difference"), TAMPERING, ids=range(len(TAMPERING)))
def test_tampering_is_named_and_repaired(host: Host, rules: list[FamilyRules], command: tuple[str, ...], difference: str) -> None:
    apply_rules(rules, host.namespace)
    right = saved(host)
    host.run(*command)
    found = check_rules(rules, host.namespace)
    assert any(text.startswith(difference) for text in found), found
    apply_rules(rules, host.namespace)
    assert saved(host) == right
    assert check_rules(rules, host.namespace) == []


def test_the_wrong_order_is_named(host: Host, rules: list[FamilyRules]) -> None:
    apply_rules(rules, host.namespace)
    host.run("iptables", "-t", "nat", "-D", "L4MESH_OUTPUT", "1")
    host.run("iptables", "-t", "nat", "-A", "L4MESH_OUTPUT", "-m", "mark", "--mark", "0x539/0xfff", "-j", "RETURN")
    assert any("another order" in text for text in check_rules(rules, host.namespace))


def test_rules_of_others_that_stand_ahead_are_named_and_ours_go_first(host: Host, rules: list[FamilyRules]) -> None:
    apply_rules(rules, host.namespace)
    # As kube-proxy does it: once, at the head, and with a comment.
    host.run("iptables", "-t", "nat", "-N", "KUBE-SERVICES")
    service = ("-m", "comment", "--comment", "kubernetes -j LOG portals", "-j", "KUBE-SERVICES")
    for hook in ("PREROUTING", "OUTPUT"):
        host.run("iptables", "-t", "nat", "-I", hook, "1", *service)
    host.run("ip6tables", "-t", "mangle", "-I", "PREROUTING", "2", "-p", "tcp", "-j", "ACCEPT")
    # These keep nothing from us: they let packets go on, or see them after us.
    host.run("iptables", "-t", "nat", "-I", "PREROUTING", "1", "-j", "LOG", "--log-prefix", "a -j ACCEPT ")
    host.run("iptables", "-t", "mangle", "-I", "PREROUTING", "1", "-j", "MARK", "--set-xmark", "0x1000/0x1000")
    host.run("iptables", "-t", "mangle", "-I", "PREROUTING", "1", "-p", "udp")
    host.run("iptables", "-t", "mangle", "-A", "PREROUTING", "-j", "ACCEPT")
    shown = '-m comment --comment "kubernetes -j LOG portals" -j KUBE-SERVICES'
    assert check_rules(rules, host.namespace) == [
        f"IPv4 nat: ahead of ours, which never see what it takes: -A PREROUTING {shown}",
        f"IPv4 nat: ahead of ours, which never see what it takes: -A OUTPUT {shown}",
        "IPv6 mangle: ahead of ours, which never see what it takes: -A PREROUTING -p tcp -j ACCEPT",
    ]
    foreign = [line for line in saved(host).splitlines() if "L4MESH" not in line]
    apply_rules(rules, host.namespace)
    assert check_rules(rules, host.namespace) == []
    assert [line for line in saved(host).splitlines() if "L4MESH" not in line] == foreign


def test_tables_that_are_listed_in_another_order_are_the_same(
    host: Host, rules: list[FamilyRules], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    legacy = shutil.which("xtables-legacy-multi")
    probe = ["unshare", "--net", str(legacy), "iptables", "-t", "nat", "-L"]
    if not legacy or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("needs iptables-legacy, and a kernel that knows it")
    for version in ("ip", "ip6"):
        for tool in ("tables", "tables-save", "tables-restore"):
            (tmp_path / f"{version}{tool}").symlink_to(legacy)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    # Listed there the other way round than in a namespace where mangle was used first.
    for table in ("nat", "mangle"):
        host.run("iptables", "-t", table, "-L")
    apply_rules(rules, host.namespace)
    assert check_rules(rules, host.namespace) == []
    remove_rules(host.namespace)
    assert "L4MESH" not in saved(host)


def test_removed_without_a_trace_and_foreign_rules_untouched(host: Host, rules: list[FamilyRules], tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_text(FOREIGN)
    host.run("iptables-restore", "--noflush", str(foreign))
    # At our preference, which is nobody's own.
    host.run("ip", "rule", "add", "from", "10.2.0.0/16", "pref", "10", "lookup", "100")
    before = saved(host)
    apply_rules(rules, host.namespace)
    host.run("iptables", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "9997", "-j", "ACCEPT")
    apply_rules(rules, host.namespace)
    remove_rules(host.namespace)
    host.run("iptables", "-t", "nat", "-D", "OUTPUT", "-p", "tcp", "--dport", "9997", "-j", "ACCEPT")
    assert saved(host) == before
    remove_rules(host.namespace)
    assert saved(host) == before
    redirect = build_rules(parse_config('listeners: [{name: l, bind: "0.0.0.0:1", capture: redirect, default: original_destination}]'))
    apply_rules(redirect, host.namespace)
    assert check_rules(redirect, host.namespace) == []
    assert host.run("ip", "rule") in before


def test_where_ipv6_is_disabled_nothing_is_captured_by_halves(host: Host, rules: list[FamilyRules]) -> None:
    host.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    with pytest.raises(CommandError, match="IPv6 is disabled on nexthop device: enable it .*, or bind no listener that captures"):
        apply_rules(rules, host.namespace)
    assert "L4MESH" not in saved(host)
    apply_rules(rules[:1], host.namespace)
    assert check_rules(rules[:1], host.namespace) == []


def test_what_others_send_to_our_chains_is_no_hindrance_to_remove_them(host: Host, rules: list[FamilyRules]) -> None:
    before = saved(host)
    apply_rules(rules, host.namespace)
    host.run("iptables", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-g", "L4MESH_OUTPUT")
    host.run("iptables", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "-j", "L4MESH_OUTPUT")
    remove_rules(host.namespace)
    assert saved(host) == before


def test_rules_that_can_not_all_be_put_in_place_are_not_put_there_at_all(host: Host, rules: list[FamilyRules]) -> None:
    before = saved(host)
    v4, v6 = rules
    broken = replace(v6, rules=(*v6.rules, Rule("nat", "L4MESH_OUTPUT", ("-m", "nothing"))))
    with pytest.raises(CommandError, match="^ip6tables-restore"):
        apply_rules([v4, broken], host.namespace)
    assert saved(host) == before
    apply_rules(rules, host.namespace)
    right = saved(host)
    with pytest.raises(CommandError, match="^ip6tables-restore"):
        apply_rules([v4, broken], host.namespace)
    assert saved(host) == right


def test_another_configuration_replaces_the_whole(host: Host, rules: list[FamilyRules]) -> None:
    apply_rules(rules, host.namespace)
    other = build_rules(parse_config('listeners: [{name: l, bind: "0.0.0.0:1", capture: redirect, default: original_destination}]'))
    assert check_rules(other, host.namespace)
    apply_rules(other, host.namespace)
    assert check_rules(other, host.namespace) == []
    assert "1539" not in saved(host)
    assert "L4MESH" not in host.run("ip6tables-save")
