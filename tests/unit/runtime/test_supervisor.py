"""How often the supervisor looks at the rules."""

import time

import pytest

from l4mesh.capture.host import Listing
from l4mesh.capture.rules import FamilyRules
from l4mesh.errors import CommandError
from l4mesh.runtime import supervisor
from l4mesh.runtime.supervisor import LOOK_SHARE, RETRY_S, RuleKeeper

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
