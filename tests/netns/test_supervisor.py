"""`l4mesh run --manage-redirect`: rules and process in step, whatever happens to either of them."""

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from l4mesh.capture.host import apply_rules, check_rules, remove_rules
from l4mesh.capture.rules import build_rules
from l4mesh.config.load import parse_config
from l4mesh.lab import Cluster, Host, Lab, build_cluster
from l4mesh.netns import run_in_namespace
from tests.conftest import Factory
from tests.support.mesh import Mesh, environment_of_ours
from tests.support.tracer import Tracer, worker_thread
from tests.support.waiting import wait_until

pytestmark = pytest.mark.netns

# Says whom it talks to, then gives back what it gets.
SERVER = """
import socket, threading
def serve(peer, address):
    peer.sendall(f"{address[0]}\\n".encode())
    while data := peer.recv(4096):
        peer.sendall(data)
    peer.close()
listening = socket.create_server(("0.0.0.0", 80), backlog=64)
while True:
    threading.Thread(target=serve, args=listening.accept(), daemon=True).start()
"""
BAD = {"listeners": [{"name": "out", "bind": "nowhere"}]}
CLIENT, NODE, POD = "192.168.50.100", "192.168.50.1", "10.244.1.11"


def config(
    capture: str = "redirect", exclude: dict[str, Any] | None = None, preserve_source: bool = False, **more: Any
) -> dict[str, Any]:
    listener = {
        "name": "out", "bind": "0.0.0.0:15001", "capture": capture, "direction": "outbound", "default": "original_destination",
        "exclude": exclude or {}, "preserve_source": preserve_source,
    }  # fmt: skip
    return {"listeners": [listener], "workers": 1} | more


@dataclass
class Net:
    client: Host
    node: Host
    mesh: Factory

    def start(self, config: dict[str, Any], *prefix: str) -> Mesh:
        return self.mesh(config, prefix=(*self.node.command(), *prefix), options=("--manage-redirect",))

    def connect(self) -> socket.socket:
        peer = run_in_namespace(self.client.path, lambda: socket.create_connection((POD, 80), 5))
        peer.settimeout(5)
        return peer

    def dial(self) -> str:
        """Whom the server believes to talk to, or why it can't be reached."""
        try:
            with self.connect() as peer:
                return peer.recv(100).decode().strip() or "nothing"
        except OSError as error:
            return type(error).__name__

    def rules(self) -> str:
        """Everything that is in place, but counters, comments and what says nothing."""
        text = "".join(self.node.run(command) for command in ("iptables-save", "ip6tables-save"))
        text = re.sub(r"\[\d+:\d+\]", "", re.sub(r"^#.*\n", "", text, flags=re.M))
        text = re.sub(r"\*\w+\n(:(PREROUTING|INPUT|FORWARD|OUTPUT|POSTROUTING) ACCEPT \n)*COMMIT\n", "", text)
        return text + self.node.run("ip", "rule") + self.node.run("ip", "-6", "rule")

    def differences(self, config: dict[str, Any]) -> list[str]:
        return check_rules(wanted(config), self.node.namespace)


def wanted(config: dict[str, Any]) -> Any:
    return build_rules(parse_config(yaml.safe_dump(config)))


def events(m: Mesh, *names: str) -> list[Any]:
    return [event for event in m.events() if event["event"] in names]


def wait_event(m: Mesh, name: str, count: int = 1, deadline_s: float = 15) -> Any:
    wait_until(lambda: len(events(m, name)) >= count, f"{name} is said", deadline_s)
    return events(m, name)[count - 1]


def child_of(m: Mesh) -> int:
    return int(m.status()["pid"])


def data_plane(m: Mesh, before: int) -> int:
    """The child, as soon as it runs, that is not the one before, nor one that works on rules or is about to; 0: there is none."""
    for pid in Path(f"/proc/{m.process.pid}/task/{m.process.pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if int(pid) != before and b"\0run\0" in command and b"\0--manage-redirect\0" not in command:
                return int(pid)
    return 0


@contextlib.contextmanager
def held_back(m: Mesh, child: int) -> Iterator[None]:
    """The child dies, and its replacement is stopped before it serves, until the end of this."""
    before = len(events(m, "replaced"))
    os.kill(child, signal.SIGKILL)
    replacement = wait_until(lambda: data_plane(m, child), "there is a replacement", every_s=0.001)
    os.kill(replacement, signal.SIGSTOP)
    try:
        assert len(events(m, "replaced")) == before
        yield
    finally:
        os.kill(replacement, signal.SIGCONT)
    wait_event(m, "replaced", before + 1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Lab() as lab:
        made = build_cluster(lab, nodes=1, pods=1)
        made.pods[0].start(sys.executable, "-c", SERVER)
        yield made


@pytest.fixture
def net(cluster: Cluster, mesh: Factory) -> Iterator[Net]:
    made = Net(cluster.outside, cluster.nodes[0].host, mesh)
    wait_until(lambda: made.dial() == CLIENT, "the server answers")
    yield made
    try:
        mesh.stack.close()
    finally:
        remove_rules(made.node.namespace)
        made.node.run("iptables", "-t", "nat", "-F")


def test_rules_come_with_readiness_and_go_with_a_clean_stop(net: Net) -> None:
    net.node.run("iptables", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "9999", "-j", "ACCEPT")
    before = net.rules()
    m = net.start(config())
    wait_event(m, "redirect_applied")
    assert [event["event"] for event in events(m, "ready", "redirect_applied")] == ["ready", "redirect_applied"]
    assert child_of(m) != m.process.pid
    assert net.differences(config()) == []
    assert net.dial() == NODE
    wait_until(lambda: m.status()["supervisor"]["in_place"], "the child knows")
    m.stop()
    assert net.rules() == before
    assert net.dial() == CLIENT


@pytest.mark.parametrize(
    "tampering",
    [
        ("iptables", "-t", "nat", "-F"),
        ("iptables", "-t", "nat", "-I", "L4MESH_PREROUTING", "1", "-j", "RETURN"),
        ("iptables", "-t", "nat", "-I", "PREROUTING", "1", "-p", "tcp", "--dport", "80", "-j", "ACCEPT"),
    ],
    ids=["flushed", "changed", "overtaken"],
)
def test_what_others_do_to_the_rules_is_named_and_repaired(net: Net, tampering: tuple[str, ...]) -> None:
    m = net.start(config(redirect={"check_interval": "100ms"}))
    wait_event(m, "redirect_applied")
    net.node.run(*tampering)
    net.node.run("iptables", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "9999", "-j", "ACCEPT")
    wait_event(m, "redirect_repaired")
    assert net.differences(config()) == []
    assert net.dial() == NODE
    assert "--dport 9999" in net.rules()
    assert events(m, "redirect_differs")[0]["difference"].startswith("IPv4 nat")
    wait_until(lambda: m.status()["supervisor"]["repairs"] >= 1, "the child knows")
    assert m.metrics()["l4mesh_redirect_repairs_total"] >= 1
    assert m.metrics()["l4mesh_redirect_in_place"] == 1
    shown = subprocess.run([sys.executable, "-m", "l4mesh", "status", "--admin", m.admin], capture_output=True, text=True, check=True)
    assert re.search(r"redirect rules in place, repaired \d+ times; the data plane has died 0 times", shown.stdout)


def test_very_many_rules_that_others_flush_are_repaired_and_end_nothing(net: Net) -> None:
    many = config(
        exclude={"destinations": [f"10.{i // 250}.{i % 250}.1/32" for i in range(1000)]}, redirect={"check_interval": "100ms"}
    )
    m = net.start(many)
    wait_event(m, "redirect_applied")
    child = child_of(m)
    net.node.run("iptables", "-t", "nat", "-F")
    wait_event(m, "redirect_repaired")
    wait_until(lambda: m.status()["supervisor"]["repairs"] >= 1, "the child knows")
    assert child_of(m) == child
    assert net.differences(many) == []


def test_the_capabilities_of_the_examples_are_enough(net: Net) -> None:
    before = net.rules()
    bounded = ("setpriv", "--bounding-set=-all,+net_admin,+net_raw", "--no-new-privs")
    m = net.start(config(capture="tproxy", preserve_source=True, redirect={"check_interval": "100ms"}), *bounded)
    wait_event(m, "redirect_applied")
    for process in (m.process.pid, child_of(m)):
        assert "CapEff:\t0000000000003000\n" in Path(f"/proc/{process}/status").read_text()
    assert net.dial() == CLIENT
    net.node.run("ip", "rule", "del", "pref", "10")
    wait_event(m, "redirect_repaired")
    assert m.status()["workers"][0]["accepted"] == 1
    m.stop()
    assert net.rules() == before


def test_rules_follow_the_configuration_and_a_bad_one_changes_nothing(net: Net) -> None:
    m = net.start(config())
    wait_event(m, "redirect_applied")
    m.reload(config(exclude={"ports": [80]}))
    wait_until(lambda: net.differences(config(exclude={"ports": [80]})) == [], "the rules follow")
    assert net.dial() == CLIENT
    m.write(BAD)
    wait_event(m, "config_refused")
    assert net.differences(config(exclude={"ports": [80]})) == []
    m.reload(config(capture="tproxy"))
    wait_until(lambda: net.differences(config(capture="tproxy")) == [], "the rules follow")
    assert net.dial() == NODE


@pytest.mark.parametrize("capture", ["redirect", "tproxy"])
def test_connections_wait_for_the_replacement_of_a_child_that_dies(net: Net, capture: str) -> None:
    m = net.start(config(capture=capture, workers=3))
    wait_event(m, "redirect_applied")
    for turn in (1, 2):
        assert net.dial() == NODE
        with contextlib.ExitStack() as stack:
            with held_back(m, child_of(m)):
                assert wait_event(m, "data_plane_died", turn)["new_connections"] == "wait"
                # The kernel spreads them over the workers' sockets.
                waiting = [stack.enter_context(net.connect()) for _ in range(12)]
                for peer in waiting[:11]:
                    peer.sendall(b"early")
                # It does not wait for the answer.
                waiting.pop().close()
            for peer in waiting:
                peer.settimeout(20)
                got = b""
                while not got.endswith(b"early"):
                    got += peer.recv(100)
                assert got.decode().split() == [NODE, "early"]
    m.stop()


def test_what_waits_is_judged_by_the_policies_of_the_replacement(net: Net) -> None:
    plain = config(clusters=[{"name": "pod", "endpoints": [f"{POD}:80"]}])
    plain["listeners"].append({"name": "plain", "bind": "0.0.0.0:15101", "cluster": "pod"})
    m = net.start(plain)
    wait_event(m, "redirect_applied")
    with held_back(m, child_of(m)):
        peer = run_in_namespace(net.client.path, lambda: socket.create_connection(("192.168.50.1", 15101), 5))
        m.write(plain | {"policies": [{"name": "nobody", "action": "deny", "from": [{"sources": [CLIENT]}]}]})
    with peer:
        peer.settimeout(20)
        with pytest.raises(ConnectionResetError):
            peer.recv(100)


def refuses(net: Net, port: int) -> bool:
    """Whether nobody listens there; it must not be that connections wait which nobody will serve."""
    try:
        run_in_namespace(net.client.path, lambda: socket.create_connection(("192.168.50.1", port), 5)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_nobody_keeps_what_is_not_served_any_more(net: Net) -> None:
    plain = {"name": "plain", "bind": ["0.0.0.0:15101", "0.0.0.0:15102"], "cluster": "pod"}
    clusters = [{"name": "pod", "endpoints": [f"{POD}:80"]}]
    both = config(clusters=clusters, drain={"time": "20s", "over": "off"})
    both["listeners"].append(plain)
    m = net.start(both)
    wait_event(m, "redirect_applied")
    assert not refuses(net, 15101)
    plain["bind"] = ["0.0.0.0:15102"]
    m.reload(both)
    wait_until(lambda: refuses(net, 15101), "the port is free")
    plain["bind"] = ["0.0.0.0:15101", "0.0.0.0:15102"]
    m.reload(both)
    assert not refuses(net, 15101)
    with held_back(m, child_of(m)):
        plain["bind"] = ["0.0.0.0:15101"]
        m.write(both)
    assert not refuses(net, 15101)
    wait_until(lambda: refuses(net, 15102), "the replacement has closed what it does not serve")
    with net.connect() as peer:
        assert peer.recv(100).decode().strip() == NODE
        m.process.terminate()
        wait_event(m, "draining")
        wait_until(lambda: refuses(net, 15101), "nobody listens while it drains")
    assert m.process.wait(20) == 0


def test_a_supervisor_short_of_descriptors_keeps_none(net: Net) -> None:
    m = net.start(config(workers=4))
    wait_event(m, "redirect_applied")
    listening = [{"name": f"l{port}", "bind": f"0.0.0.0:{port}", "default": "original_destination"} for port in range(15200, 15210)]
    more = config(workers=4)
    more["listeners"] += [
        listener | {"capture": "redirect", "direction": "outbound", "include": {"ports": [9]}} for listener in listening
    ]
    used = len(os.listdir(f"/proc/{m.process.pid}/fd"))
    before = resource.prlimit(m.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(m.process.pid, resource.RLIMIT_NOFILE, (used + 10, before[1]))
    m.reload(more)
    wait_event(m, "sockets_not_kept")
    resource.prlimit(m.process.pid, resource.RLIMIT_NOFILE, before)
    with held_back(m, child_of(m)):
        assert wait_event(m, "data_plane_died")["new_connections"] == "refused"
        assert net.dial() == "ConnectionRefusedError"
    wait_until(lambda: net.dial() == NODE, "it is served again")
    m.stop()


@pytest.mark.parametrize(("on_crash", "meanwhile"), [("closed", "ConnectionRefusedError"), ("open", CLIENT)])
def test_until_a_crashed_child_is_replaced_traffic_is_refused_or_let_past(net: Net, on_crash: str, meanwhile: str) -> None:
    good = config(redirect={"on_crash": on_crash})
    m = net.start(good)
    wait_event(m, "redirect_applied")
    assert net.dial() == NODE
    # Nothing can start with this one: there is time to look.
    m.write(BAD)
    os.kill(child_of(m), signal.SIGKILL)
    died = wait_event(m, "data_plane_died")
    assert (died["ended"], died["restart_s"], died["on_crash"]) == ("by SIGKILL", 0, on_crash)
    again = wait_event(m, "data_plane_died", 3)
    # Only one that has served leaves connections to the next.
    assert (again["ended"], again["new_connections"]) == ("with exit code 1", "refused")
    assert 0.1 <= events(m, "data_plane_died")[1]["restart_s"] <= 0.25 < again["restart_s"] * 2 <= 1
    assert net.dial() == meanwhile
    m.write(good)
    replaced = wait_event(m, "replaced")
    assert replaced["down_s"] > 0
    wait_until(lambda: net.dial() == NODE, "it is served again")
    assert net.differences(good) == []
    applied = 1 if on_crash == "closed" else 2
    wait_event(m, "redirect_applied", applied)
    assert len(events(m, "redirect_applied")) == applied
    wait_until(lambda: m.status()["supervisor"]["restarts"] >= 3, "the child knows")


def test_a_program_that_can_t_be_started_is_tried_again(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.symlink_to(sys.executable)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setattr(sys, "executable", str(program))
    m = net.start(config())
    wait_event(m, "redirect_applied")
    child = child_of(m)
    program.rename(tmp_path / "away")
    m.process.send_signal(signal.SIGUSR2)
    wait_event(m, "data_plane_not_started")
    assert net.dial() == NODE
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: sum(event["event"] == "data_plane_not_started" for event in m.events()) > 1, "it is missed")
    (tmp_path / "away").rename(program)
    wait_event(m, "replaced")
    assert net.dial() == NODE


def test_a_stuck_worker_is_replaced(net: Net) -> None:
    m = net.start(config(watchdog="500ms"))
    wait_event(m, "redirect_applied")
    before = child_of(m)
    with Tracer(worker_thread(before)) as tracer:
        tracer.wait_stopped()
        with net.connect():
            died = wait_event(m, "data_plane_died")
    assert (died["pid"], died["ended"]) == (before, "by SIGABRT")
    assert wait_event(m, "worker_stuck")["doing"] == "waiting"
    print("served again after", wait_event(m, "replaced")["down_s"], "s")
    wait_until(lambda: net.dial() == NODE, "it is served again")


def test_a_bad_configuration_at_start_touches_no_rule(net: Net, tmp_path: Path) -> None:
    # What a predecessor has left when it was killed.
    apply_rules(wanted(config()), net.node.namespace)
    before = net.rules()
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(BAD))
    command = net.node.command(sys.executable, "-m", "l4mesh", "run", "--manage-redirect", "-c", str(file))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment_of_ours())
    assert done.returncode == 1
    assert "listeners[0].bind[0]: must be" in done.stderr
    assert "Traceback" not in done.stderr
    assert net.rules() == before


def test_one_that_may_not_touch_rules_does_not_stay(net: Net, tmp_path: Path) -> None:
    file = tmp_path / "l4mesh.yaml"
    file.write_text(yaml.safe_dump(config(admin={"bind": "off"})))
    bounded = ("setpriv", "--bounding-set=-all", "--no-new-privs")
    command = net.node.command(*bounded, sys.executable, "-m", "l4mesh", "run", "--manage-redirect", "-c", str(file))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment_of_ours())
    assert done.returncode == 1
    assert "l4mesh: iptables-" in done.stderr
    assert done.stderr.rstrip().endswith("run it as root")
    # The child as well has ended.
    assert '"event": "stopped"' in done.stderr
    assert net.dial() == CLIENT


def test_a_child_without_its_supervisor_ends_and_the_next_one_takes_over(net: Net) -> None:
    m = net.start(config(redirect={"check_interval": "off"}))
    wait_event(m, "redirect_applied")
    child = os.pidfd_open(child_of(m))
    m.kill()
    with contextlib.closing(os.fdopen(child)):
        wait_until(lambda: bool(signal_of(child)), "the child has ended")
    assert net.dial() == "ConnectionRefusedError"
    assert net.differences(config()) == []
    net.node.run("iptables", "-t", "nat", "-F", "PREROUTING")
    m.start()
    wait_event(m, "redirect_applied", 2)
    assert net.differences(config()) == []
    assert net.dial() == NODE


def signal_of(pidfd: int) -> bool:
    """Whether the process has ended: it is not our child, so that there is nothing to wait for."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("capture", ["redirect", "tproxy"])
def test_live_connections_survive_the_removal_of_the_rules(net: Net, capture: str) -> None:
    before = net.rules()
    m = net.start(config(capture=capture, drain={"time": "20s", "over": "off"}))
    wait_event(m, "redirect_applied")
    with net.connect() as peer:
        assert peer.recv(100).decode().strip() == NODE
        m.process.terminate()
        wait_event(m, "draining")
        assert net.dial() == CLIENT
        peer.sendall(b"still here")
        assert peer.recv(100) == b"still here"
    assert m.process.wait(20) == 0
    assert net.rules() == before


@pytest.mark.parametrize("how", ["drain", "interrupt"])
def test_every_way_to_stop_it_leaves_nothing(net: Net, how: str) -> None:
    before = net.rules()
    m = net.start(config())
    wait_event(m, "redirect_applied")
    if how == "drain":
        said = subprocess.run([sys.executable, "-m", "l4mesh", "drain", "--admin", m.admin], capture_output=True, text=True, check=True)
        assert "drains" in said.stdout
    else:
        m.process.send_signal(signal.SIGINT)
    assert m.process.wait(20) == 0
    assert net.rules() == before
    assert not events(m, "data_plane_died")


def test_a_stop_that_leaves_rules_behind_is_no_success(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "iptables-restore"
    tool.write_text(f'#!/bin/sh\n[ -e {broken} ] && echo no more memory >&2 && exit 1\nexec {shutil.which(tool.name)} "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    m = net.start(config(), "env", f"PATH={os.environ['PATH']}")
    wait_event(m, "redirect_applied")
    broken.touch()
    m.process.send_signal(signal.SIGTERM)
    assert m.process.wait(30) == 1
    assert wait_event(m, "supervisor_stopped")
    assert events(m, "redirect_failed")[-1]["means"] == "rules are left: l4mesh redirect remove"


def test_a_stranger_that_takes_over_has_the_rules_as_well(net: Net) -> None:
    """As the next pod of a DaemonSet does, with a supervisor of its own."""
    before = net.rules()
    m = net.start(config(drain={"time": "20s", "over": "off"}))
    wait_event(m, "redirect_applied")
    first = m.process
    with net.connect() as peer:
        assert peer.recv(100).decode().strip() == NODE
        m.process = m.spawn()
        wait_event(m, "taken_over")
        wait_event(m, "redirect_applied", 2)
        # The first has been told to go, and takes no rule with it.
        first.terminate()
        peer.sendall(b"still here")
        assert peer.recv(100) == b"still here"
        assert net.dial() == NODE
    assert first.wait(20) == 0
    assert net.differences(config()) == []
    assert net.dial() == NODE
    m.stop()
    assert net.rules() == before


def test_an_upgrade_that_fails_leaves_all_as_it_was(net: Net) -> None:
    m = net.start(config())
    wait_event(m, "redirect_applied")
    before = child_of(m)
    m.write(BAD)
    wait_event(m, "config_refused")
    m.process.send_signal(signal.SIGUSR2)
    assert wait_event(m, "upgrade_failed")["ended"] == "with exit code 1"
    assert child_of(m) == before
    assert net.dial() == NODE
    assert len(events(m, "redirect_applied")) == 1


def test_an_upgrade_touches_no_rule_and_cuts_nothing(net: Net) -> None:
    m = net.start(config())
    wait_event(m, "redirect_applied")
    pids = [child_of(m)]
    for turn in (1, 2):
        if turn == 1:
            command = [sys.executable, "-m", "l4mesh", "upgrade", "-c", str(m.file.parent)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment_of_ours())
            assert done.returncode == 0, done.stderr
            assert f"has replaced process {pids[0]}" in done.stdout
        else:
            m.process.send_signal(signal.SIGUSR2)
            wait_event(m, "upgrade_begins", 3)
            # As `systemctl reload` does, while the new process is being born.
            m.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: len(events(m, "successor_serves")) == turn and len(events(m, "upgrade_ends")) == turn, "the successor is alone"
        )
        pids.append(child_of(m))
        assert net.dial() == NODE
    assert len(set(pids)) == 3
    assert len(events(m, "redirect_applied")) == 1
    assert not events(m, "data_plane_died") + events(m, "redirect_differs")


def test_a_service_manager_is_told(net: Net, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        m = net.start(config())
        said = [manager.recv(100).decode()]
        while said[-1] != "READY=1":
            said.append(manager.recv(100).decode())
        assert set(said) == {"WATCHDOG=1", "READY=1"}
        assert net.differences(config()) == []
        # Again and again.
        assert [manager.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        m.stop()
        while said[-1] != "STOPPING=1":
            said.append(manager.recv(100).decode())
