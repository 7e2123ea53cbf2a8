"""Stops one thread of another process for real, as a debugger does, with ptrace(2): by itself, or at a system call of its choice.

Run as `python -m tests.support.tracer TID [CALL|spin]`: writes a line when it has the thread and another when the thread stands still, and
ends when the thread is gone.
"""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Self

PTRACE_PEEKDATA, PTRACE_POKEDATA, PTRACE_DETACH = 2, 5, 17
PTRACE_SYSCALL, PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_GET_SYSCALL_INFO = 24, 0x4206, 0x4207, 0x420E
PTRACE_O_TRACESYSGOOD = 1
SYSCALL_STOP = 0x80 | 5
WALL = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_LIBC.ptrace.restype = ctypes.c_long


class SyscallInfo(ctypes.Structure):
    """The beginning of struct ptrace_syscall_info."""

    _fields_ = [
        ("op", ctypes.c_uint8), ("pad", ctypes.c_uint8 * 3), ("arch", ctypes.c_uint32), ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64), ("number", ctypes.c_uint64), ("rest", ctypes.c_uint64 * 8),
    ]  # fmt: skip

    ENTRY = 1


def ptrace(request: int, tid: int, address: object = None, data: object = None) -> int:
    """Raises OSError."""
    ctypes.set_errno(0)
    result = int(_LIBC.ptrace(request, tid, address, data))
    if result == -1 and ctypes.get_errno():
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def trace(tid: int, call: int | None) -> None:
    ptrace(PTRACE_SEIZE, tid, None, PTRACE_O_TRACESYSGOOD)
    ptrace(PTRACE_INTERRUPT, tid)
    print("traced", flush=True)
    while True:
        _, status = os.waitpid(tid, WALL)
        if call is None or (os.WSTOPSIG(status) == SYSCALL_STOP and enters(tid) == call):
            break
        ptrace(PTRACE_SYSCALL, tid)
    print("stopped", flush=True)
    # A thread that is traced is not gone before its tracer has heard of it.
    while os.WIFSTOPPED(status):
        _, status = os.waitpid(tid, WALL)


SPIN = {"x86_64": b"\xeb\xfe", "aarch64": b"\x00\x00\x00\x14"}
"""A jump to itself."""


def spin(tid: int) -> None:
    """Puts an endless loop behind the system call in which the thread waits, and lets it go."""
    ptrace(PTRACE_SEIZE, tid)
    ptrace(PTRACE_INTERRUPT, tid)
    os.waitpid(tid, WALL)
    info = SyscallInfo()
    ptrace(PTRACE_GET_SYSCALL_INFO, tid, ctypes.sizeof(info), ctypes.addressof(info))
    loop = SPIN[platform.machine()]
    word = ptrace(PTRACE_PEEKDATA, tid, info.ip).to_bytes(8, sys.byteorder, signed=True)
    ptrace(PTRACE_POKEDATA, tid, info.ip, int.from_bytes(loop + word[len(loop) :], sys.byteorder))
    ptrace(PTRACE_DETACH, tid)


def enters(tid: int) -> int:
    """Number of the system call at whose entry the thread stands; -1 at an exit."""
    info = SyscallInfo()
    ptrace(PTRACE_GET_SYSCALL_INFO, tid, ctypes.sizeof(info), ctypes.addressof(info))
    return int(info.number) if info.op == SyscallInfo.ENTRY else -1


class Tracer:
    """A thread that is held until the process ends, or the tracer, at the end of the block."""

    def __init__(self, tid: int, call: int | None = None) -> None:
        self._tid = tid
        command = [sys.executable, "-m", "tests.support.tracer", str(tid), *([] if call is None else [str(call)])]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self._expect(b"traced\n")

    def _expect(self, line: bytes) -> None:
        assert self._process.stdout
        assert self._process.stdout.readline() == line

    def wait_stopped(self) -> None:
        self._expect(b"stopped\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # A thread whose tracer ends goes on.
        self._process.kill()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()


def make_spin(tid: int) -> None:
    """The thread, which waits, never comes back from what wakes it up."""
    subprocess.run([sys.executable, "-m", "tests.support.tracer", str(tid), "spin"], check=True)


def worker_thread(pid: int, worker: int = 0) -> int:
    """Its number, as `ps -L` shows it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text() == f"l4mesh-{worker}\n":
            return int(task.name)
    raise AssertionError(f"{pid} has no worker {worker}")


if __name__ == "__main__":
    if sys.argv[2:] == ["spin"]:
        spin(int(sys.argv[1]))
    else:
        trace(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
