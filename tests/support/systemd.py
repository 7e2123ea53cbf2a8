"""A real systemd as the first process of namespaces of its own, with nothing in it but what the test puts there.

Its processes, mounts, network and part of the cgroup hierarchy are its own. Of the machine's files it sees the programs; /run, /tmp, /var,
/dev, /etc/l4mesh, /etc/systemd and /usr/local/bin are its own too, and all of it goes with its end.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from l4mesh.netns import run_in_namespace
from tests.support.waiting import DEADLINE_S, wait_until

T = TypeVar("T")

REPOSITORY = Path(__file__).parents[2]
SYSTEMD = Path("/usr/lib/systemd/systemd")
NAMESPACES = ("--pid", "--mount-proc", "--mount", "--net", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child")

# $1: an empty folder. $2, $3, $4: the repository, the base of Python and the packages of the virtual environment: in /srv, as units see
# neither /home nor /root nor /tmp.
BOOT = """
set -eu
new=$1
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$new"
cp -a /etc "$new/etc"
rm -rf "$new/etc/l4mesh" "$new/etc/systemd"
mkdir -p "$new/dev" "$new/units" "$new/srv/l4mesh" "$new/srv/python" "$new/srv/packages" "$new/etc/l4mesh" "$new/etc/systemd/system"
cd "$new/dev"
mkdir shm pts mqueue hugepages
ln -s /proc/self/fd fd
ln -s pts/ptmx ptmx
: > console
for device in null zero full random urandom tty; do
    : > $device
    mount --bind /dev/$device $device
done
cd "$new/srv"
mount --bind "$2" l4mesh
mount --bind "$3" python
mount --bind "$4" packages
# What else these want is not there, and not missed.
cd /usr/lib/systemd/system
cp sysinit.target basic.target shutdown.target multi-user.target network-online.target systemd-journald.service systemd-journald.socket \\
    "$new/units"
printf '[Unit]\\nDefaultDependencies=no\\nWants=systemd-journald.service\\n' > "$new/units/default.target"
cd /
mount --bind "$new/units" /usr/lib/systemd/system
for folder in dev etc srv; do mount --rbind "$new/$folder" /$folder; done
for folder in /usr/lib/systemd/system-generators /usr/local/bin /var /run; do mount -t tmpfs -o mode=755 tmpfs $folder; done
mkdir /var/lib /var/tmp
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
exec env -i PATH="$PATH" container=l4mesh /usr/lib/systemd/systemd --log-target=journal --show-status=false
"""


def missing() -> str:
    """What a systemd of its own needs and is not here; "": nothing."""
    if not SYSTEMD.exists():
        return "systemd (package systemd)"
    tried = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, check=False)
    if os.geteuid() or tried.returncode or not os.access(_cgroups(), os.W_OK):
        return "root, namespaces of every kind and a cgroup2 hierarchy that may be written to"
    return ""


class Systemd:
    """``folder``: an empty one. As a context manager: runs, with `l4mesh` installed and no unit but its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        root = self._folder / "root"
        root.mkdir()
        self._cgroup = Path(tempfile.mkdtemp(prefix="l4mesh-test-", dir=_cgroups()))
        sources = (root, REPOSITORY, sys.base_prefix, sysconfig.get_path("purelib"))
        # It ends with us, however that is.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "sh", "-c", BOOT, "sh", *map(str, sources)]
        try:
            with (self._folder / "console").open("wb") as console:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    preexec_fn=lambda: (self._cgroup / "cgroup.procs").write_text("0"),
                )
            # Not before: until then its files, and whom systemctl would speak to, are those of the machine.
            self._pid = wait_until(self._first_process, "systemd is the first process")
            self.wait_until(lambda: self.run("systemctl", "is-system-running").stdout == "running\n", "systemd runs")
            program = self.file("/usr/local/bin/l4mesh")
            program.write_text(_program())
            program.chmod(0o755)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    def _first_process(self) -> int:
        assert self._process.poll() is None, (self._folder / "console").read_text()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children and os.readlink(f"/proc/{children[0]}/exe") == str(SYSTEMD) else 0

    def _remove(self) -> None:
        (self._cgroup / "cgroup.kill").write_text("1")
        self._process.wait()
        wait_until(lambda: "populated 0" in (self._cgroup / "cgroup.events").read_text(), "all that ran in it has ended")
        for folder, _, _ in os.walk(self._cgroup, topdown=False):
            os.rmdir(folder)

    def file(self, path: str) -> Path:
        """One of its files, as seen from outside."""
        return Path(f"/proc/{self._pid}/root{path}")

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        entering = ["nsenter", "--target", str(self._pid), "--all", "--wd=/"]
        return subprocess.run([*entering, *command], capture_output=True, text=True, timeout=60, check=False)

    def do(self, *command: str) -> str:
        """Standard output of what must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def wait_until(self, condition: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
        """For what it must be asked for, by a process each time."""
        return wait_until(condition, what, deadline_s, every_s=0.1)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.do("systemctl", "show", "--value", "--property", name, unit).strip()

    def journal(self, unit: str) -> str:
        return self.do("journalctl", "--no-pager", "--unit", unit)

    def inside(self, call: Callable[[], T]) -> T:
        """Calls it in its network."""
        return run_in_namespace(f"/proc/{self._pid}/ns/net", call)

    def install(self, unit: Path, settings: Mapping[str, str] | None = None) -> None:
        """A unit as it is, with ``settings`` of its [Service] on top; "": what it had is dropped."""
        shutil.copy(unit, self.file("/etc/systemd/system"))
        drop_in = self.file(f"/etc/systemd/system/{unit.name}.d")
        shutil.rmtree(drop_in, ignore_errors=True)
        if settings:
            drop_in.mkdir()
            (drop_in / "test.conf").write_text("[Service]\n" + "".join(f"{name}={value}\n" for name, value in settings.items()))
        self.do("systemctl", "daemon-reload")


def _cgroups() -> str:
    """Where the hierarchy of version 2 is mounted; "": nowhere."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return next((mount[1] for mount in mounts if mount[2] == "cgroup2"), "")


def _program() -> str:
    """What is installed as `l4mesh`."""
    python = Path("/srv/python") / Path(sys.executable).resolve().relative_to(Path(sys.base_prefix).resolve())
    environment = {
        "PYTHONPATH": "/srv/l4mesh:/srv/packages",
        "LD_LIBRARY_PATH": "/srv/python/lib",
        "LD_PRELOAD": os.environ.get("L4MESH_PRELOAD", ""),
        **{name: value for name, value in os.environ.items() if name in ("ASAN_OPTIONS", "UBSAN_OPTIONS")},
    }
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    return f'#!/bin/sh\n{settings} exec {python} -m l4mesh "$@"\n'
