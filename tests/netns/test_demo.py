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
def test_it_shows_what_it_says(user: str) -> None:
    python = sys.executable if user == "root" else nobodys_python()
    if python is None:
        pytest.skip("another user can't run this Python, or can't make user namespaces")
    command = [python, "-m", "l4mesh", "demo"]
    done = subprocess.run(
        command if user == "root" else [*NOBODY, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT AS IT SHOULD BE" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 1), (signal.SIGINT, 5), (signal.SIGTERM, 2), (signal.SIGTERM, 7)])
def test_stopped_it_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, step: int) -> None:
    """SIGINT as the terminal sends it: to all processes at once."""
    command = [sys.executable, "-m", "l4mesh", "demo"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as demo:
        assert demo.stdout
        output = ""
        while not output.startswith(f"{step:>2}. "):
            output = demo.stdout.readline()
            assert output, "the demo ended too early"
        if number == signal.SIGINT:
            os.killpg(demo.pid, number)
        else:
            demo.send_signal(number)
        rest = demo.stdout.read()
    assert demo.returncode == 130, rest
    assert rest.splitlines()[-1] == f"stopped by {number.name}: everything that was made is removed"
    assert "Traceback" not in rest
    assert f"l4m{demo.pid % 100000}-" not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert list(tmp_path.iterdir()) == []
    wait_until(lambda: not any(str(tmp_path) in line for line in commands()), "no process of it is left")
