"""How the cost of a connection grows: with workers, with idle connections beside it, with endpoints to choose from."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.rounds import Round, Sample, run_rounds
from bench.rows import PLAIN_PEERS, Effort, measure_connects
from bench.stage import Machine, Stage

BLOCKS = 3
SHARE = 0.5
"""Of the work of one measurement of the row ``connect``."""


@dataclass(frozen=True, slots=True)
class Growth:
    name: str
    title: str
    points: tuple[int, ...]
    stage: Callable[[Machine, Sequence[str], int], Stage]
    measure: Callable[[Stage, str, Effort, int], Sample]
    unit: str = "µs CPU"
    entries: tuple[str, ...] = (*PLAIN_PEERS, "l4mesh")

    def run(self, machine: Machine, proxies: Sequence[str], effort: Effort, seed: int) -> list[Round]:
        """Rounds whose entries are ``entry@point``; all of them are up at once, and all are in every block."""
        smaller = dataclasses.replace(effort, share=effort.share * SHARE)
        entries = [entry for entry in self.entries if entry in proxies]
        with contextlib.ExitStack() as stack:
            stages = {
                point: stack.enter_context(self.stage(_apart(machine, f"{self.name}-{point}"), entries, point)) for point in self.points
            }

            def measure(name: str) -> Sample:
                entry, _, point = name.partition("@")
                return self.measure(stages[int(point)], entry, smaller, int(point))

            names = [f"{entry}@{point}" for point in self.points for entry in entries]
            return run_rounds(
                names, measure, BLOCKS if effort.discard_first else 1, seed, discard_first=effort.discard_first, mirrored=False
            )


def _apart(machine: Machine, name: str) -> Machine:
    """The same machine with a folder of its own."""
    folder = machine.folder / name
    folder.mkdir(exist_ok=True)
    return dataclasses.replace(machine, folder=folder)


_connects = measure_connects()


def _plain(stage: Stage, entry: str, effort: Effort, point: int) -> Sample:
    return _connects(stage, entry, effort)


def _beside_idle(stage: Stage, entry: str, effort: Effort, point: int) -> Sample:
    with stage.load(entry, "hold", connections=point):
        return _connects(stage, entry, effort)


GROWTHS = (
    Growth(
        "workers", "workers (all on all CPUs)", (1, 2),
        lambda machine, entries, point: Stage(machine, entries, pinned=False, workers=point), _plain,
    ),
    Growth(
        "connections", "idle connections beside it", (10, 1000, 5000),
        lambda machine, entries, point: Stage(machine, entries), _beside_idle,
    ),
    Growth(
        "endpoints", "endpoints, least connections", (1, 10, 1000, 10_000),
        lambda machine, entries, point: Stage(machine, entries, endpoints=point), _plain,
    ),
)  # fmt: skip
