"""``python -m bench``: runs the comparison and writes its result."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from bench.bandwidth import run_bandwidth, summarize_bandwidth
from bench.churn import SECONDS as CHURN_SECONDS
from bench.churn import run_churn
from bench.ejection import REPEATS as EJECTION_REPEATS
from bench.ejection import run_ejection, summarize_ejection
from bench.fairness import REPEATS as FAIRNESS_REPEATS
from bench.fairness import run_fairness, summarize_fairness
from bench.generator import ROOT, Void, build
from bench.growth import GROWTHS
from bench.health import run_health, summarize_health
from bench.machine import describe_commit, describe_machine, describe_versions
from bench.proxies import FD_LIMIT
from bench.reload import run_reload
from bench.report import render, render_comparison
from bench.results import summarize_growth, summarize_reload, summarize_row
from bench.rows import ROWS, Effort
from bench.stage import DIRECT, PEERS, Machine, share_cpus
from bench.storm import REPEATS, run_storm, summarize_storm
from bench.upgrade import UPGRADES, run_upgrades
from l4mesh.errors import CommandError
from l4mesh.lab import Interrupted, ensure_privileged, raise_interrupted

FULL = Effort(blocks=7, share=1.0, discard_first=True)
QUICK = Effort(blocks=2, share=0.25, discard_first=False)
PROXIES = (DIRECT, *PEERS, "l4mesh")
RELOAD = "reload"
STORM = "storm"
HEALTH = "health"
BANDWIDTH = "bandwidth"
UPGRADE = "upgrade"
EJECTION = "ejection"
FAIRNESS = "fairness"
FAIRNESS_MTLS = "fairness-mtls"
CHURN = "churn"
SCENARIOS = (RELOAD, CHURN, UPGRADE, STORM, HEALTH, BANDWIDTH, EJECTION, FAIRNESS, FAIRNESS_MTLS)
NAMES = (*(row.name for row in ROWS), *(growth.name for growth in GROWTHS), *SCENARIOS)
T = TypeVar("T")


def choose(allowed: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str | None], tuple[str, ...]]:
    """Reads names with commas between them; without any: all."""

    def read(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
        names = tuple(name.strip() for name in value.split(",")) if value else allowed
        for name in names:
            if name not in allowed:
                raise click.BadParameter(f"{name!r} is not among {', '.join(allowed)}")
        return names

    return read


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Two short blocks: shows that it works, proves nothing (6 minutes).")
@click.option("--only", callback=choose(NAMES), metavar="ROW,…", help=f"Of {', '.join(NAMES)}.")
@click.option("--proxies", callback=choose(PROXIES), metavar="NAME,…", help=f"Of {', '.join(PROXIES)}.")
@click.option("--blocks", type=click.IntRange(2), help=f"Blocks that count; {FULL.blocks} unless told.")
@click.option(
    "--storm-seconds", type=click.IntRange(1), help="As long for each proxy, in turns of a minute, instead of several short ones."
)
@click.option(
    "--churn-seconds", type=click.IntRange(1), default=CHURN_SECONDS, show_default=True, help="How long endpoints come and go."
)
@click.option("--seed", type=int, help="Of the order within blocks; random unless told.")
@click.option("--baseline", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A result to compare with.")
@click.option("--of", "saved", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Show this result; run nothing.")
@click.option("--out", default=ROOT / "bench/results", type=click.Path(file_okay=False, path_type=Path), show_default=True)
def main(
    quick: bool,
    only: tuple[str, ...],
    proxies: tuple[str, ...],
    blocks: int | None,
    storm_seconds: int | None,
    churn_seconds: int,
    seed: int | None,
    baseline: Path | None,
    saved: Path | None,
    out: Path,
) -> None:
    """Compare l4mesh with HAProxy, nginx and Envoy; write a table and the raw rounds."""
    if saved:
        result = json.loads(saved.read_text())
    else:
        effort = QUICK if quick else FULL
        effort = Effort(blocks or effort.blocks, effort.share, effort.discard_first)
        result = run(only, proxies, effort, seed if seed is not None else random.randrange(1 << 16), storm_seconds, churn_seconds)
        save(result, out)
    print(render(result))
    if baseline:
        print(render_comparison(json.loads(baseline.read_text()), result))
    if result["errors"]:
        sys.exit(1)


def run(
    only: tuple[str, ...], proxies: tuple[str, ...], effort: Effort, seed: int, storm_seconds: int | None, churn_seconds: int
) -> dict[str, Any]:
    prepare()
    started = time.monotonic()
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        **describe_commit(),
        "seed": seed,
        "blocks": effort.blocks,
        "share": effort.share,
        "machine": describe_machine(),
        "versions": describe_versions(proxies),
        "rows": [],
        "growth": [],
        **dict.fromkeys(SCENARIOS),
        "errors": {},
    }
    with tempfile.TemporaryDirectory(prefix="l4mesh-bench-") as folder:
        measure_all(result, share_cpus(Path(folder)), only, proxies, effort, seed, storm_seconds, churn_seconds)
    result["minutes"] = (time.monotonic() - started) / 60
    result["why_not"] = why_not(result, only, proxies, effort)
    result["publish"] = not result["why_not"]
    return result


def measure_all(
    result: dict[str, Any],
    machine: Machine,
    only: tuple[str, ...],
    proxies: tuple[str, ...],
    effort: Effort,
    seed: int,
    storm_seconds: int | None,
    churn_seconds: int,
) -> None:
    """Fills in the result. What fails is named there, and the rest goes on."""

    def attempt(name: str, title: str, work: Callable[[], T], add: Callable[[T], Any]) -> None:
        if name not in only:
            return
        print(f"{time.strftime('%H:%M:%S')} {name}: {title}", file=sys.stderr, flush=True)
        try:
            add(work())
        except (RuntimeError, CommandError, Void, OSError) as error:
            result["errors"][name] = str(error)
            print(f"{name}: {error}", file=sys.stderr)

    for row in ROWS:
        attempt(
            row.name,
            row.title,
            partial(row.run, machine, proxies, effort, seed),
            partial(lambda row, rounds: result["rows"].append(summarize_row(row, rounds)), row),
        )
    for growth in GROWTHS:
        attempt(
            growth.name,
            f"cost by {growth.title}",
            partial(growth.run, machine, proxies, effort, seed),
            partial(lambda growth, rounds: result["growth"].append(summarize_growth(growth, rounds)), growth),
        )
    if "l4mesh" in proxies:
        attempt(
            RELOAD,
            "a large configuration under load",
            partial(run_reload, machine, 3 if effort.discard_first else 1),
            lambda reloads: result.update(reload=summarize_reload(reloads)),
        )
        attempt(
            CHURN,
            "endpoints that come and go under load",
            partial(run_churn, machine, churn_seconds, seed),
            lambda churn: result.update(churn=dataclasses.asdict(churn)),
        )
        attempt(
            UPGRADE,
            "one process after another takes over under load",
            partial(run_upgrades, machine, UPGRADES if effort.discard_first else max(1, round(UPGRADES * effort.share / 10))),
            lambda upgrades: result.update(upgrade=dataclasses.asdict(upgrades)),
        )
        attempt(
            BANDWIDTH,
            "limits of bandwidth",
            partial(run_bandwidth, machine, 3 if effort.discard_first else 1),
            lambda flows: result.update(bandwidth=summarize_bandwidth(flows)),
        )
    attempt(
        STORM,
        "connections with a wrong certificate beside good traffic",
        partial(run_storm, machine, proxies, storm_seconds, REPEATS if effort.discard_first else 1, seed),
        lambda storms: result.update(storm=summarize_storm(storms)),
    )
    attempt(
        FAIRNESS,
        "few connections beside those of a source that opens hundreds at once",
        partial(run_fairness, machine, proxies, FAIRNESS_REPEATS if effort.discard_first else 1, seed),
        lambda measured: result.update({FAIRNESS: summarize_fairness(measured)}),
    )
    attempt(
        FAIRNESS_MTLS,
        "the same with mutual TLS between two proxies",
        partial(run_fairness, machine, proxies, FAIRNESS_REPEATS if effort.discard_first else 1, seed, mtls=True),
        lambda measured: result.update({FAIRNESS_MTLS: summarize_fairness(measured)}),
    )
    attempt(
        HEALTH,
        "health checks of many endpoints",
        partial(run_health, machine, proxies, 3 if effort.discard_first else 1),
        lambda checked: result.update(health=summarize_health(checked)),
    )
    attempt(
        EJECTION,
        "connections that fail when endpoints turn bad",
        partial(run_ejection, machine, proxies, EJECTION_REPEATS if effort.discard_first else 1, seed),
        lambda seen: result.update(ejection=summarize_ejection(seen)),
    )


def why_not(result: dict[str, Any], only: tuple[str, ...], proxies: tuple[str, ...], effort: Effort) -> str:
    """Why the result is not fit to publish; empty when it is."""
    if effort.share < 1 or effort.blocks < FULL.blocks:
        return "a short run"
    if set(only) != set(NAMES) or set(proxies) != set(PROXIES):
        return "a partial run"
    if result["errors"]:
        return f"{', '.join(result['errors'])} failed"
    noisy = [row["name"] for row in result["rows"] if "must" in row and not row["publishable"]]
    return f"the two l4mesh differ, or rounds are void, in {', '.join(noisy)}" if noisy else ""


def prepare() -> None:
    """What is measured is built from the sources as they are. Raises CommandError."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if subprocess.run([ROOT / ".ci/bootstrap", "bench"], env=os.environ | {"L4MESH_BUILD": "release"}, check=False).returncode:
        raise CommandError("l4mesh and its peers could not be installed, see above")
    ensure_privileged()
    hard = max(FD_LIMIT, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:
        raise CommandError(f"{FD_LIMIT} descriptors are needed: run it as root, or after `ulimit -n {FD_LIMIT}`") from error
    build()


def save(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{result['date']}-{result['commit']}{'' if result['publish'] else '-unpublished'}"
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(render(result))
    print(f"written: {folder / name}.json and .md", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, raise_interrupted)
    try:
        main()
    except (CommandError, RuntimeError, Interrupted) as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
