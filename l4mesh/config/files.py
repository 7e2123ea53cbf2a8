"""Opening files that others put in place."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_file(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading, through symbolic links. What else may stand there could block its reader for ever.

    Raises OSError, whose ``strerror`` says what is wrong.
    """
    # Before it is opened: to some devices that means something, and a socket's error would not say what it is.
    _require_regular(os.stat(path))
    # A pipe that has taken its place since waits for its writer in open(), unless told not to.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _require_regular(os.fstat(fd))
    except OSError:
        os.close(fd)
        raise
    return os.fdopen(fd, "rb")


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(None, "it is not a regular file")
