"""Rules as text, beside golden files. ``L4MESH_WRITE_GOLDEN=1`` writes them anew: read the difference before you commit it."""

import os
from pathlib import Path

import pytest

from l4mesh.capture import host
from l4mesh.capture.host import apply_rules, check_rules, remove_rules
from l4mesh.capture.render import JUMPS, render_all
from l4mesh.capture.rules import build_rules
from l4mesh.config.load import parse_config
from l4mesh.errors import CommandError

GOLDEN = Path(__file__).parent / "golden"
V4, V6, BOTH = '"0.0.0.0:15001"', '"[::]:15001"', '["0.0.0.0:15001", "[::]:15001"]'
CASES = {
    "redirect_v4": f"bind: {V4}, capture: redirect",
    "redirect_v6": f"bind: {V6}, capture: redirect",
    "redirect_inbound": f"bind: {V4}, capture: redirect, direction: inbound",
    "tproxy_inbound": f"bind: {V4}, capture: tproxy",
    "tproxy_outbound": f"bind: {V4}, capture: tproxy, direction: outbound",
    "tproxy_preserve_source": f"bind: {BOTH}, capture: tproxy, preserve_source: on",
    "redirect_preserve_source": f"bind: {V4}, capture: redirect, preserve_source: on",
    "filters": f"""bind: {BOTH}, capture: redirect,
      include: {{ports: [80, "8000-8999"], destinations: [10.0.0.0/8, "fd00::/8"], interfaces: [pod0]}},
      exclude: {{ports: [22], destinations: [10.9.0.0/16], users: ["1337"]}}""",
    "many_ports": f"bind: {V4}, capture: redirect, include: {{ports: [{', '.join(str(port) for port in range(1, 21))}]}}",
    "only_other_family": f"bind: {V6}, capture: redirect, include: {{destinations: [10.0.0.0/8]}}",
    "sources": f"bind: {BOTH}, capture: redirect, include: {{sources: [10.244.1.0/24]}}, exclude: {{sources: [10.244.1.13]}}",
    "second_of_other_family": f"""bind: {BOTH}, capture: redirect, default: original_destination}}
  - {{name: m, bind: ["0.0.0.0:15006", "[::]:15006"], capture: tproxy, include: {{destinations: [10.244.1.0/24]}}""",
    "none": f"bind: {V4}, cluster: a",
    # Two listeners: what pods of this host send, and what others send to them.
    "node": """bind: "0.0.0.0:15006", capture: tproxy, include: {destinations: [10.244.1.0/24]},
      exclude: {destinations: [10.244.1.13]}, default: original_destination}
  - {name: m, bind: "0.0.0.0:15001", capture: redirect, include: {sources: [10.244.1.0/24]}, exclude: {sources: [10.244.1.13]}""",
    # The outbound one does not say whose traffic it takes: the inbound one's turn is before it.
    "node_unnamed": """bind: "0.0.0.0:15001", capture: redirect, exclude: {ports: [22]}, default: original_destination}
  - {name: m, bind: "0.0.0.0:15006", capture: tproxy, include: {destinations: [10.244.1.0/24]}""",
    "two_redirects": f"""bind: {V4}, capture: redirect, include: {{ports: [80]}}, exclude: {{sources: [10.1.0.0/16, 10.2.0.0/16]}},
      default: original_destination}}
  - {{name: m, bind: "0.0.0.0:15002", capture: redirect, exclude: {{ports: [22]}}""",
}


def text_of(settings: str) -> str:
    default = "" if "cluster:" in settings else ", default: original_destination"
    return render_all(build_rules(parse_config(f"listeners:\n  - {{name: l, {settings}{default}}}\nclusters: [{{name: a}}]\n")))


@pytest.mark.parametrize("name", CASES)
def test_rules_are_as_the_golden_file_has_them(name: str) -> None:
    file = GOLDEN / f"{name}.txt"
    text = text_of(CASES[name])
    if os.environ.get("L4MESH_WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_all_that_is_ours_is_in_chains_of_our_own() -> None:
    for settings in CASES.values():
        for line in text_of(settings).splitlines():
            assert not line.startswith("-A ") or line.startswith("-A L4MESH_")
            assert not line.startswith("-I ") or "--comment l4mesh -j L4MESH_" in line


def test_marked_packets_are_left_alone_before_anything_else() -> None:
    for settings in CASES.values():
        chains: dict[str, list[str]] = {}
        for line in text_of(settings).splitlines():
            if line.startswith("-A L4MESH_") and ("REDIRECT" in line or "RETURN" in line or "TPROXY" in line):
                chains.setdefault(line.split()[1], []).append(line)
        for chain, lines in chains.items():
            if chain in JUMPS and chain not in ("L4MESH_RETURN", "L4MESH_FORWARD"):
                assert "--mark 0x539/0xfff -j RETURN" in lines[0]


def test_a_tool_that_can_t_be_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "iptables-save"
    tool.write_text("#!/nowhere\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandError, match="iptables-save: can't be run: No such file"):
        check_rules([])


def test_a_kernel_without_ipv6_has_no_rules_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = "echo Address family not supported by protocol >&2; exit 2"
    for name, script in {
        "iptables-save": "", "iptables-restore": "", "ip6tables-save": refuses, "ip6tables-restore": refuses,
        "ip": f"case \"$*\" in *-6*) {refuses};; *) echo '[]';; esac",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(host, "_V6", tmp_path / "none")
    assert check_rules([]) == []
    remove_rules()
    assert apply_rules([]) == {False: host.Listing(), True: host.Listing()}
