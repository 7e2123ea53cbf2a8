"""The load generator: builds ``load.pyx`` on first use, and runs it in a process of its own.

The process is told what to do in its arguments, says when it is prepared (connections open, one reply checked on each), does
one run for each line on its standard input, answers each with a line, and ends with its input.
"""

from __future__ import annotations

import array
import hashlib
import importlib
import importlib.metadata
import json
import select
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from bench.process import STOP_S, Place

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "bench/load.pyx"
DEADLINE_S = 60.0


class Void(Exception):
    """A check failed: what was measured doesn't count."""


def build() -> ModuleType:
    """The compiled generator, built when ``load.pyx``, Cython or Python has changed."""
    key = SOURCE.read_bytes() + f"{importlib.metadata.version('Cython')} {sys.version}".encode()
    folder = ROOT / ".cache/bench" / hashlib.sha256(key).hexdigest()[:16]
    if not list(folder.glob(f"load*{sysconfig.get_config_var('EXT_SUFFIX')}")):
        cython, setuptools = importlib.import_module("Cython.Build"), importlib.import_module("setuptools")
        directives = {"language_level": 3, "boundscheck": False, "wraparound": False, "cdivision": True}
        extensions = cython.cythonize(
            [setuptools.Extension("load", [str(SOURCE)], extra_compile_args=["-O2"])],
            build_dir=str(folder), compiler_directives=directives, quiet=True,
        )  # fmt: skip
        command = setuptools.Distribution({"ext_modules": extensions}).get_command_obj("build_ext")
        command.build_lib = command.build_temp = str(folder)
        command.ensure_finalized()
        command.run()
    sys.path.insert(0, str(folder))
    return importlib.import_module("load")


@dataclass(frozen=True, slots=True)
class Target:
    """Where the load goes. Sources rotate over ``n_sources`` addresses, so that ports last; none: the kernel picks."""

    host: str
    port: int
    first_source: str = ""
    n_sources: int = 0


class Load:
    """A generator process, prepared. ``what``: ``requests``, ``pace``, ``connects`` or ``hold``."""

    def __init__(self, place: Place, what: str, target: Target, **options: Any) -> None:
        arguments = json.dumps({"what": what, "target": asdict(target), **options})
        self._process = subprocess.Popen(
            place.command([sys.executable, "-m", "bench.generator", arguments]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Void("the load generator died")
        answer: dict[str, Any] = json.loads(line)
        if "void" in answer:
            raise Void(answer["void"])
        return answer

    def begin(self, **options: Any) -> None:
        """Starts a run; ``end`` waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(options) + "\n")
        self._process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """What the run gave. Raises Void when one of its checks failed."""
        return self._answer()

    def run(self, **options: Any) -> dict[str, Any]:
        self.begin(**options)
        return self.end()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Helper:
    """A process of a module of ours. It says a line when it is ready; then lines go to and fro until its input ends, and so does it.
    A context. ``idle``: it runs when the load, with which it shares a CPU, has nothing to do. (A process that is only nice keeps the CPU
    for a slice of ms when others wake up.)"""

    def __init__(self, place: Place, module: str, *arguments: str, idle: bool = False) -> None:
        command = place.command([*(["chrt", "--idle", "0"] if idle else []), sys.executable, "-m", module, *arguments])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __enter__(self) -> Helper:
        self.receive()
        return self

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def receive(self, within_s: float = DEADLINE_S) -> str:
        """Raises Void."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], within_s)[0] or not (line := self._process.stdout.readline()):
            raise Void(f"{self._process.args}: no answer")
        return line

    def ask(self, line: str) -> None:
        self.send(line)
        self.receive()

    def finish(self) -> Any:
        """Ends its input and gives its last line, which is JSON. Raises Void."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return json.loads(self.receive())

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def percentile(ordered: list[int] | array.array[int], share: float) -> int:
    """Nearest rank: the smallest value with at least ``share`` of all at or below it."""
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]


def _connect_paced(
    load: ModuleType, where: tuple[str, int], rate: float, count: int, at_once: int, size: int, sources: tuple[str, int], done: int
) -> dict[str, Any]:
    latencies, failed, late_ns = load.connect_paced(*where, rate, count, at_once, size, *sources, done)
    answered = sorted(latency for latency in latencies if latency)
    if not answered:
        raise load.LoadError(f"not one connection of {count:,} was answered")
    return {"failed": failed, "late_us": late_ns / 1e3, **_percentiles(answered)}


def _percentiles(ordered: list[int]) -> dict[str, float]:
    """In µs."""
    return {name: percentile(ordered, share) / 1e3 for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))}


def _run_paced(connections: Any, rate: float, count: int, path: str | None) -> dict[str, Any]:
    start_ns, latencies, late_ns = connections.pace(rate, count)
    if path:
        Path(path).write_bytes(latencies.tobytes())
    return {"start_ns": start_ns, "late_us": late_ns / 1e3, **_percentiles(sorted(latencies))}


def main() -> None:
    """The process's side."""
    load = build()
    task = json.loads(sys.argv[1])
    what, target = task["what"], task["target"]
    where = target["host"], target["port"]
    sources = target["first_source"], target["n_sources"]
    size = task.get("size", 64)
    try:
        connections: Any = None
        if what != "connects":
            connections = load.Connections(*where, task["connections"], size, *sources)
        print("{}", flush=True)
        done = 0
        for line in sys.stdin:
            options = json.loads(line)
            answer: dict[str, Any] = {}
            match what:
                case "requests":
                    answer = {"seconds": connections.exchange(options["count"])}
                case "pace":
                    answer = _run_paced(connections, options["rate"], options["count"], options.get("path"))
                case "connects" if "rate" in options:
                    count = options["count"]
                    answer = _connect_paced(load, where, options["rate"], count, task["at_once"], size, sources, done)
                    done += count
                case "connects":
                    count = options["count"]
                    answer = {"seconds": load.connect_each(*where, count, task["at_once"], size, *sources, done)}
                    done += count
            print(json.dumps(answer), flush=True)
    except load.LoadError as error:
        print(json.dumps({"void": str(error)}), flush=True)


if __name__ == "__main__":
    main()
