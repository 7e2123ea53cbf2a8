"""The demo as people run it: it shows all that it says, with root or without, and leaves nothing behind, also when it is stopped."""

import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.waiting import wait_until

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]
NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{sysconfig.get_path('purelib')}"}


def nobodys_python() -> str | None:
    """An interpreter that another user can run l4mesh with, inside a user namespace. This one may be in root's home."""
    for python in (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"):
        probe = [*NOBODY, "unshare", "-Urnm", python, "-c", "import l4mesh.demo"]
        if subprocess.run(probe, env=ENVIRONMENT, capture_output=True, check=False).returncode == 0:
            return python
    return None


def commands() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_it_shows_what_it_says(tmp_path: Path, user: str) -> None:
    python = sys.executable if user == "root" else nobodys_python()
    if python is None:
        pytest.skip("another user can't run this Python, or can't make user namespaces")
    command = [python, "-m", "l4mesh", "demo"]
    # Only root sees what is left there: the folder is root's own.
    environment = ENVIRONMENT | ({"TMPDIR": str(tmp_path)} if user == "root" else {})
    done = subprocess.run(
        command if user == "root" else [*NOBODY, *command], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT AS IT SHOULD BE" not in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
    assert not any(str(tmp_path) in line for line in commands())


class Demo:
    """One that is to be stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "l4mesh", "demo"]
        self.process = subprocess.Popen(
            command, env=os.environ | {"TMPDIR": str(folder)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def wait_for(self, step: int) -> None:
        assert self.process.stdout
        said = [""]
        while not said[-1].startswith(f"{step:>2}. "):
            said.append(self.process.stdout.readline())
            assert said[-1], f"the demo ended too early: {''.join(said)}"

    def logs(self, event: str) -> bool:
        return any(f'"event": "{event}"' in path.read_text() for path in self.folder.glob("*/*/events.log"))

    def stop(self, number: signal.Signals) -> None:
        """SIGINT and SIGHUP as the terminal sends them: to all processes at once. Nothing is left."""
        assert self.process.stdout
        if number in (signal.SIGINT, signal.SIGHUP):
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        with self.process:
            rest = self.process.stdout.read()
        assert self.process.returncode == 130, rest
        assert rest.splitlines()[-1] == f"stopped by {number.name}: everything that was made is removed"
        assert "Traceback" not in rest
        namespaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
        assert f"l4m{self.process.pid % 100000}-" not in namespaces
        assert list(self.folder.iterdir()) == []
        wait_until(lambda: not any(str(self.folder) in line for line in commands()), "no process of it is left")


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGHUP, 4), (signal.SIGTERM, 8)])
def test_stopped_it_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, step: int) -> None:
    """8: after an upgrade, while the old process still has connections."""
    demo = Demo(tmp_path)
    demo.wait_for(step)
    demo.stop(number)


def test_stopped_amid_an_upgrade_it_leaves_nothing_behind(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    demo.wait_for(7)
    wait_until(lambda: demo.logs("upgrade_begins"), "the new process has found the old one")
    demo.stop(signal.SIGINT)
