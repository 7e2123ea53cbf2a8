"""A wall clock that is wrong, for processes under test (clock.c)."""

import struct
import subprocess
from pathlib import Path

import pytest

DAY_S = 86_400


class WrongClock:
    """Of the processes that are started with ``shim`` preloaded. Right until it is set."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shim = folder / "clock.so"
        self._file = folder / "clock"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", self.shim, source, "-ldl"], check=True)
        self._file.write_bytes(struct.pack("=q", 0))
        monkeypatch.setenv("L4MESH_CLOCK_FILE", str(self._file))

    def set_wrong_by(self, seconds: int) -> None:
        with self._file.open("r+b") as stream:
            stream.write(struct.pack("=q", seconds))
