"""Rounds in pairs, and what follows from them.

A block measures every entry twice: in a random order, then in that order reversed, so that a drift of the machine falls on all
alike. The first block is thrown away. A ratio is taken within each block, never between blocks.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.generator import Void

RESAMPLES = 5000
VOID_SHARE_MAX = 0.25
AGAIN = "l4mesh-again"
"""A second l4mesh, measured as if it were another product: what differs between the two is noise."""
A_A_TOLERANCE = 0.03


@dataclass(frozen=True, slots=True)
class Sample:
    """``value`` in the row's unit (None: this entry has none); ``rate``: units a second; ``detail``: what else was seen."""

    value: float | None
    rate: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Round:
    block: int
    entry: str
    sample: Sample | None
    void: str = ""


def run_rounds(
    entries: Sequence[str],
    measure: Callable[[str], Sample],
    blocks: int,
    seed: int,
    *,
    discard_first: bool = True,
    mirrored: bool = True,
) -> list[Round]:
    """``blocks`` blocks, and one before them whose rounds are not in what is given."""
    order = list(entries)
    shuffle = random.Random(seed).shuffle
    rounds = []
    for block in range(0 if discard_first else 1, blocks + 1):
        shuffle(order)
        for entry in [*order, *reversed(order)] if mirrored else order:
            try:
                taken = Round(block, entry, measure(entry))
            except Void as reason:
                taken = Round(block, entry, None, str(reason))
            if block:
                rounds.append(taken)
    return rounds


def block_values(rounds: Sequence[Round], entry: str, detail: str = "") -> dict[int, float]:
    """The entry's value (or one of its details) for each block: the mean of its rounds there, without the void ones."""
    found: dict[int, list[float]] = {}
    for taken in rounds:
        if taken.entry == entry and taken.sample is not None:
            value = taken.sample.detail.get(detail) if detail else taken.sample.value
            if value is not None:
                found.setdefault(taken.block, []).append(value)
    return {block: statistics.fmean(values) for block, values in found.items()}


def median_of(rounds: Sequence[Round], entry: str, detail: str = "") -> float | None:
    values = block_values(rounds, entry, detail)
    return statistics.median(values.values()) if values else None


def median_rate(rounds: Sequence[Round], entry: str) -> float | None:
    rates = [taken.sample.rate for taken in rounds if taken.entry == entry and taken.sample and taken.sample.rate]
    return statistics.median(rates) if rates else None


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of the blocks' ratios, with its 95 % confidence interval (percentile bootstrap over blocks)."""

    median: float
    low: float
    high: float


def ratio_of(rounds: Sequence[Round], entry: str, other: str) -> Ratio | None:
    """``entry`` / ``other`` within each block; None when no block has both."""
    mine, theirs = block_values(rounds, entry), block_values(rounds, other)
    ratios = [mine[block] / theirs[block] for block in mine if theirs.get(block)]
    if not ratios:
        return None
    choose = random.Random(1).choices
    medians = sorted(statistics.median(choose(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return Ratio(statistics.median(ratios), medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1])


def best_peer(rounds: Sequence[Round], peers: Sequence[str], lower_is_better: bool) -> str | None:
    """The peer with the best median over all blocks."""
    medians = {peer: value for peer in peers if (value := median_of(rounds, peer)) is not None}
    if not medians:
        return None
    return (min if lower_is_better else max)(medians, key=lambda peer: medians[peer])


def is_publishable(rounds: Sequence[Round]) -> bool:
    """Whether the two l4mesh agree, as far as the rounds can tell, and few rounds are void."""
    again = ratio_of(rounds, AGAIN, "l4mesh")
    void = sum(taken.sample is None for taken in rounds)
    agrees = again is not None and again.low <= 1 + A_A_TOLERANCE and again.high >= 1 - A_A_TOLERANCE
    return agrees and void <= VOID_SHARE_MAX * len(rounds)
