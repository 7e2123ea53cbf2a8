"""How often the supervisor looks at the rules, and what it does with a child that does not come up."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l4mesh.capture.host import Listing
from l4mesh.capture.rules import FamilyRules
from l4mesh.errors import CommandError
from l4mesh.runtime import supervisor
from l4mesh.runtime.supervisor import LOOK_SHARE, RETRY_S, RuleKeeper
from tests.support.mesh import environment_of_ours

FAMILIES = [FamilyRules(False, (), "0x111/0xfff", routes=False)]


class Clock:
    """Time that passes only while rules are looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.look_s = 0.0
        self.error = ""
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(supervisor, "apply_rules", lambda families: {False: Listing()})
        monkeypatch.setattr(supervisor, "check_rules", self.check)

    def check(self, families: list[FamilyRules], listed: object) -> list[str]:
        self.now_s += self.look_s
        if self.error:
            raise CommandError(self.error)
        return []


def test_a_look_that_takes_long_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    keeper = RuleKeeper()
    keeper.keep(FAMILIES, 5.0)
    assert keeper.due_at == clock.now_s + 5
    for clock.look_s, wait_s in ((0.01, 5.0), (2.0, 2.0 / LOOK_SHARE), (0.01, 5.0)):
        keeper.look()
        assert keeper.due_at == pytest.approx(clock.now_s + wait_s)
    # What is wrong is not left for long, however long the look took.
    clock.look_s, clock.error = 2.0, "no memory"
    keeper.look()
    assert keeper.due_at == clock.now_s + RETRY_S


def test_without_an_interval_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    keeper = RuleKeeper()
    keeper.keep(FAMILIES, 0.0)
    assert keeper.due_at == float("inf")


# The first serves and dies, the second hangs, the third fails for good.
CHILD = """
import json, os, signal, socket, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
turns = open(sys.argv[1], "a")
turn = turns.tell()
print("x", end="", file=turns, flush=True)
parent = socket.socket(fileno=int(os.environ["L4MESH_SUPERVISOR"].split(",")[0]))
if turn == 0:
    parent.sendall(json.dumps({"say": "ready", "rules": [], "on_crash": "closed", "check_interval_ms": 0}).encode() + b"\\n")
    os.kill(os.getpid(), signal.SIGKILL)
elif turn == 1:
    signal.pause()
else:
    os.kill(os.getppid(), signal.SIGINT)
    signal.pause()
"""
SUPERVISOR = """
import sys
from l4mesh.runtime import supervisor
supervisor.START_S = 0.3
supervisor.apply_rules = lambda families: {}
supervisor.remove_rules = lambda: None
sys.exit(supervisor.Supervisor([sys.executable, "-c", sys.argv[1], sys.argv[2]]).run())
"""


def test_a_replacement_that_hangs_is_replaced(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUPERVISOR, CHILD, str(tmp_path / "turns")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment_of_ours())
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(event["event"], event.get("ended", "")) for event in said if event["event"].startswith("data_plane")] == [
        ("data_plane_died", "by SIGKILL"), ("data_plane_hangs", ""), ("data_plane_died", "by SIGKILL"),
    ]  # fmt: skip
    assert (tmp_path / "turns").read_text() == "xxx"
