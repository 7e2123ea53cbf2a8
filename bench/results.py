"""From rounds to a result: plain data that is saved as JSON, printed as a table, and compared with an older one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bench.growth import Growth
from bench.reload import Reload, median_reload
from bench.rounds import AGAIN, Ratio, Round, best_peer, is_publishable, median_of, median_rate, ratio_of
from bench.rows import Limit, Row
from bench.stage import DIRECT

LATENCIES = ("p50", "p99", "p99.9")


def summarize_row(row: Row, rounds: Sequence[Round]) -> dict[str, Any]:
    """``met``: yes and no when the confidence interval says so; unclear when it is on both sides of the limit."""
    best = best_peer(rounds, row.peers, row.lower_is_better)
    ratio = ratio_of(rounds, "l4mesh", best) if best else None
    entries = {}
    for name in dict.fromkeys(taken.entry for taken in rounds):
        shown = {"median": median_of(rounds, name), "rate": median_rate(rounds, name)}
        shown |= {key: value for key in LATENCIES if (value := median_of(rounds, name, key)) is not None}
        shown["void"] = sum(taken.sample is None for taken in rounds if taken.entry == name)
        entries[name] = shown
    again = ratio_of(rounds, AGAIN, "l4mesh")
    return {
        "name": row.name,
        "title": row.title,
        "unit": row.unit,
        "lower_is_better": row.lower_is_better,
        "entries": entries,
        "best_peer": best,
        "ratio": _plain(ratio),
        "again": _plain(again),
        **{
            name: {"limit": _plain(limit), "met": _met(limit, row, rounds, ratio)}
            for name, limit in (("must", row.must), ("goal", row.goal))
            if limit
        },
        "publishable": is_publishable(rounds) if row.controlled else not any(taken.sample is None for taken in rounds),
        "rounds": [dataclasses.asdict(taken) for taken in rounds],
    }


def _plain(value: Ratio | Limit | None) -> dict[str, Any] | None:
    return dataclasses.asdict(value) if value else None


def _met(limit: Limit, row: Row, rounds: Sequence[Round], of_best: Ratio | None) -> str:
    if limit.absolute is not None:
        value = median_of(rounds, "l4mesh")
        seen = Ratio(value, value, value) if value is not None else None
        bound = limit.absolute
    elif limit.of_peer is not None:
        seen, bound = ratio_of(rounds, "l4mesh", limit.peer), limit.of_peer
    elif limit.of_direct is not None:
        seen, bound = ratio_of(rounds, "l4mesh", DIRECT), limit.of_direct
    else:
        seen, bound = of_best, limit.of_best or 0.0
    if seen is None:
        return "not measured"
    low, high = (seen.low - bound, seen.high - bound) if row.lower_is_better else (bound - seen.high, bound - seen.low)
    return "yes" if high <= 0 else "no" if low > 0 else "unclear"


def summarize_growth(growth: Growth, rounds: Sequence[Round]) -> dict[str, Any]:
    """``entries``: for each the median at each point."""
    names = dict.fromkeys(taken.entry.partition("@")[0] for taken in rounds)
    return {
        "name": growth.name,
        "title": growth.title,
        "unit": growth.unit,
        "points": growth.points,
        "entries": {name: [median_of(rounds, f"{name}@{point}") for point in growth.points] for name in names},
        "rounds": [dataclasses.asdict(taken) for taken in rounds],
    }


def summarize_reload(reloads: list[Reload]) -> dict[str, Any]:
    return {"median": dataclasses.asdict(median_reload(reloads)), "rounds": [dataclasses.asdict(one) for one in reloads]}
