"""`python -m bench`: all rows, in pairs, to a table and a JSON result."""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import rows
from bench.proxies import NAMES, versions

RESULTS = Path(__file__).parent / "results"


def interval(values: list[float], rounds: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    rng = random.Random(1)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(rounds))
    return medians[int(rounds * 0.025)], medians[int(rounds * 0.975)]


def summarise(row: rows.Row, blocks: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and the median over blocks of l4mesh's ratio to the best peer of the same block."""
    names = [name for name in NAMES if all(name in block for block in blocks)]
    peers = [name for name in names if not name.startswith("l4mesh")]
    medians = {name: statistics.median(block[name] for block in blocks) for name in [*names, *(["direct"] if "direct" in blocks[0] else [])]}
    summary: dict[str, Any] = {"row": row.title, "unit": row.unit, "must": row.must, "medians": medians, "blocks": blocks}
    if peers and "l4mesh" in names:
        pick: Callable[..., str] = max if row.more_is_better else min
        best = pick(peers, key=lambda name: medians[name])
        ratios = [block["l4mesh"] / block[best] for block in blocks]
        summary |= {"best_peer": best, "ratio": statistics.median(ratios), "ratio_interval": interval(ratios)}
        summary["met"] = summary["ratio"] >= row.limit if row.more_is_better else summary["ratio"] <= row.limit
    if row.title.startswith("idle"):
        summary["met"] = medians["l4mesh"] <= row.limit
    if "l4mesh again" in names:
        same = [block["l4mesh again"] / block["l4mesh"] for block in blocks]
        low, high = interval(same)
        summary |= {"same_ratio": statistics.median(same), "same_interval": (low, high)}
        summary["publishable"] = low <= 1.03 and high >= 0.97
    return summary


def measure(row: rows.Row, blocks: int, folder: Path, names: list[str]) -> dict[str, Any]:
    results: list[dict[str, float]] = []
    for number in range(blocks + 1):
        order = list(names)
        random.Random(number // 2).shuffle(order)
        if number % 2:
            order.reverse()
        results.append(row.run(folder, order))
        print(f"  {row.title}: block {number}" + (" (warm-up)" if number == 0 else ""), ", ".join(f"{k} {v:.3g}" for k, v in sorted(results[-1].items())), file=sys.stderr)
    return summarise(row, results[1:])


def show(summaries: list[dict[str, Any]], extra: list[dict[str, Any]], head: dict[str, Any]) -> str:
    columns = ["direct", *NAMES]
    lines = [f"# {head['date']}, commit {head['commit']}", "", f"{head['cpu']}, {head['cpus']} CPUs, Linux {head['kernel']}, Python {head['python']}."]
    lines += ["", "; ".join(f"{name}: {version}" for name, version in head["versions"].items()) + ".", ""]
    lines += ["| work | " + " | ".join(columns) + " | ratio to best peer (95 %) | must | met | A/A (95 %) |", "|" + "---|" * (len(columns) + 5)]
    for one in summaries:
        cells = [f"{one['medians'][name]:.3g}" if name in one["medians"] else "–" for name in columns]
        ratio = f"{one['ratio']:.2f} ({one['ratio_interval'][0]:.2f}–{one['ratio_interval'][1]:.2f}) {one['best_peer']}" if "ratio" in one else "–"
        same = f"{one['same_ratio']:.2f} ({one['same_interval'][0]:.2f}–{one['same_interval'][1]:.2f}){'' if one['publishable'] else ' NOT EQUAL: do not publish'}" if "same_ratio" in one else "–"
        lines.append(f"| {one['row']}, {one['unit']} | " + " | ".join(cells) + f" | {ratio} | {one['must']} | {'yes' if one.get('met') else 'NO' if 'met' in one else '–'} | {same} |")
    for table in extra:
        lines += ["", f"## {table['title']}", "", "| " + " | ".join(table["columns"]) + " |", "|" + "---|" * len(table["columns"])]
        lines += ["| " + " | ".join(str(cell) for cell in line) + " |" for line in table["lines"]]
    return "\n".join(lines) + "\n"


def describe_machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "unknown")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(), "commit": commit, "cpu": cpu, "cpus": os.cpu_count(),
        "kernel": platform.release(), "python": platform.python_version(), "versions": versions(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--blocks", type=int, default=7, help="blocks a row; the first, discarded one is extra")
    parser.add_argument("--quick", action="store_true", help="two short blocks: to see that it works, not to publish")
    parser.add_argument("--only", default="", help="rows whose title contains this")
    parser.add_argument("--proxies", default=",".join(NAMES), help="comma-separated")
    parser.add_argument("--no-extra", action="store_true", help="leave out latency, scaling and reload")
    options = parser.parse_args()
    blocks = 2 if options.quick else options.blocks
    rows.prepare(0.3 if options.quick else 1.0)
    head = describe_machine()
    with tempfile.TemporaryDirectory(prefix="l4mesh-bench-") as name:
        folder = Path(name)
        chosen = [row for row in rows.ROWS if options.only in row.title]
        summaries = [measure(row, blocks, folder, options.proxies.split(",")) for row in chosen]
        extra = [] if options.no_extra or options.only else [table(folder, options.proxies.split(",")) for table in rows.TABLES]
    text = show(summaries, extra, head)
    print(text)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        stem = RESULTS / f"{head['date']}-{head['commit']}"
        stem.with_suffix(".json").write_text(json.dumps(head | {"rows": summaries, "tables": extra}, indent=1) + "\n")
        stem.with_suffix(".md").write_text(text)
        print(f"written to {stem}.json and {stem}.md", file=sys.stderr)


main()
