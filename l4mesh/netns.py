"""Network namespaces of this host, entered for one call."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from l4mesh.errors import CommandError

CLONE_NEWNET = 0x40000000

T = TypeVar("T")


def run_in_namespace(path: str, call: Callable[[], T]) -> T:
    """Calls ``call`` on a thread of its own that has entered the network namespace at ``path``, and raises what it raises.

    A socket belongs to the namespace it was made in, whichever thread uses it afterwards. Raises CommandError when the namespace
    can't be entered.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            _enter(path)
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=enter, name="l4mesh-netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _enter(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            os.close(fd)
    except OSError as error:
        raise CommandError(f"can't enter the network namespace {path}: {error.strerror}") from error
