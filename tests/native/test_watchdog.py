"""How the watchdog judges a thread from one look to the next."""

import os
import threading
from pathlib import Path

import pytest

from tests.native import probe

STEP_MS = 250


def test_a_thread_that_comes_round_or_has_nothing_to_do_is_not_stuck() -> None:
    watched = probe.Watched()
    assert [watched.look(True, turn, "S") for turn in range(1, 6)] == [None] * 5
    assert [watched.look(False, 5) for _ in range(5)] == [None] * 5


def test_a_blocked_thread_is_stuck_from_the_first_look_at_which_it_was_busy() -> None:
    watched = probe.Watched()
    assert watched.look(False, 7) is None
    assert [watched.look(True, 7, "S") for _ in range(4)] == [0, 250, 500, 750]
    assert watched.look(True, 8, "S") is None
    assert [watched.look(True, 8, "S") for _ in range(3)] == [250, 500, 750]


def test_a_thread_that_can_run_is_stuck_for_as_long_as_it_ran() -> None:
    watched = probe.Watched()
    watched.look(True, 1, "R", cpu_ms=1000)
    # Nothing while it waits for a CPU, whatever the time.
    assert [watched.look(True, 1, "R", cpu_ms=1000) for _ in range(100)][-1] == 0
    assert watched.look(True, 1, "R", cpu_ms=1010) == 10
    assert watched.look(True, 1, "R", cpu_ms=1260) == 260
    # Never more than has passed.
    assert watched.look(True, 1, "R", cpu_ms=5000) == 510


@pytest.mark.parametrize(
    "how", [{"state": "T"}, {"state": "R", "late": True}, {"state": "S", "late": True}, {"state": "D", "late": True}]
)
def test_a_pause_does_not_count(how: dict[str, object]) -> None:
    watched = probe.Watched()
    watched.look(True, 1, "S")
    assert watched.look(True, 1, "S") == 250
    assert [watched.look(True, 1, cpu_ms=n * 250, **how) for n in range(50)] == [250] * 50
    assert watched.look(True, 1, "S") == 500


def test_reading_pages_back_in_is_progress_and_waiting_for_a_disk_is_not() -> None:
    watched = probe.Watched()
    watched.look(True, 1, "D")
    assert [watched.look(True, 1, "D", faults=n) for n in range(1, 50)] == [0] * 49
    assert [watched.look(True, 1, "D", faults=49) for _ in range(3)] == [250, 500, 750]


def test_the_kernels_line_is_read_whatever_the_name() -> None:
    ticks_ms = 1000 // os.sysconf("SC_CLK_TCK")
    line = b"1234 (%s) D 1 2 3 4 -1 5 6 7 42 9 30 12 14 15 20 0 1 0 99 1 1"
    for name in (b"python", b"a) R 1 1", b"", b")))", b"( (", b"x\ny"):
        assert probe.parse_thread(line % name) == ("D", 42 * ticks_ms, 42)
    for wrong in (b"", b")", b"12 (x", b"12 (x) R", b"12 (x) R 1 2 3 4 5 6 7"):
        assert probe.parse_thread(wrong) is None


def test_our_own_line_is_read() -> None:
    state, cpu_ms, _ = probe.parse_thread(Path(f"/proc/self/task/{threading.get_native_id()}/stat").read_bytes())
    assert state == "R"
    assert cpu_ms > 0
