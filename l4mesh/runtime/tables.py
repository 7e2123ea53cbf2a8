"""The tables of ``l4mesh status`` and ``l4mesh connections``, from what the admin server answers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

LISTED_ENDPOINTS = 500
"""More is read by nobody, and takes minutes to set."""


def make_table(title: str, *columns: str) -> Table:
    """A table whose columns are right-aligned when their name starts with ">"."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return table


def show_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def show_ms(ms: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms:.2f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def cluster_table(clusters: list[dict[str, Any]], *, every_endpoint: bool) -> Table:
    """Of very many endpoints, unless told so, not every one: those that are out, then those that have failed, then those with the most
    connections."""
    title = "endpoints"
    total = sum(len(cluster["endpoints"]) for cluster in clusters)
    if total > LISTED_ENDPOINTS and not every_endpoint:
        title += f": the most telling {LISTED_ENDPOINTS} of {total:,}; --cluster NAME shows all of one, --json all"
        clusters = _most_telling(clusters)
    table = make_table(title, "cluster", "endpoint", ">weight", ">active", ">opened", ">failed", ">sent", ">received", "state")
    for cluster in clusters:
        for endpoint in cluster["endpoints"]:
            state = "warming" if endpoint["warming"] else "drained" if endpoint["weight"] == 0 else "serving"
            if (health := endpoint["health"]) and not endpoint["out"]:
                since = f" since {show_time(health['since_unix_s'])}" if health["state"] == "healthy" else ""
                state += f", {health['state']}{since}"
            if endpoint["out"]:
                state = "; ".join(f"{out['cause']} since {show_time(out['since_unix_s'])}: {out['why']}" for out in endpoint["out"])
                state += " (serves: panic)" if cluster["panic"] else ""
            table.add_row(
                cluster["name"], endpoint["address"], str(endpoint["weight"]), str(endpoint["active"]),
                str(endpoint["opened"]), str(endpoint["connect_failures"]), show_bytes(endpoint["bytes_to_upstream"]),
                show_bytes(endpoint["bytes_to_downstream"]), state,
            )  # fmt: skip
        if not cluster["endpoints"]:
            table.add_row(
                cluster["name"], "-", "-", str(cluster["active"]), str(cluster["opened"]), str(cluster["connect_failures"]),
                show_bytes(cluster["bytes_to_upstream"]), show_bytes(cluster["bytes_to_downstream"]), "",
            )  # fmt: skip
    return table


def _most_telling(clusters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ranked = sorted(
        (not one["out"], not one["connect_failures"], -one["active"], at, i)
        for at, cluster in enumerate(clusters)
        for i, one in enumerate(cluster["endpoints"])
    )[:LISTED_ENDPOINTS]
    chosen: dict[int, list[int]] = {}
    for *_, at, i in ranked:
        chosen.setdefault(at, []).append(i)
    return [clusters[at] | {"endpoints": [clusters[at]["endpoints"][i] for i in sorted(own)]} for at, own in sorted(chosen.items())]


def reason_table(closed: dict[str, int]) -> Table:
    table = make_table("connections ended", "reason", ">count")
    for reason, count in sorted(closed.items(), key=lambda item: -item[1]):
        table.add_row(reason, str(count))
    return table


def identity_table(identities: list[dict[str, Any]]) -> Table:
    table = make_table("identities", "name", "SPIFFE ID", "source", "expires", "renewed", "error")
    for one in identities:
        table.add_row(
            one["name"],
            one["spiffe_id"],
            one["source"],
            show_time(one["expires_unix_s"]),
            show_time(one["renewed_unix_s"]),
            one["error"],
        )
    return table


def show_time(unix_s: float | None) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ") if unix_s else "-"


def print_status(console: Console, status: dict[str, Any], clusters: list[dict[str, Any]], *, every_endpoint: bool) -> None:
    config = status["config"]
    active = sum(worker["active"] for worker in status["workers"])
    console.print(
        f"l4mesh {status['version']}, pid {status['pid']}, {'ready' if status['ready'] else 'NOT READY'}, "
        f"up {status['uptime_s']:.0f} s, generation {status['generation']}, {len(status['workers'])} workers, "
        f"{active} of {status['connections_limit']} connections",
        highlight=False,
    )
    supervisor = status["supervisor"]
    if supervisor:
        rules = "in place" if supervisor["in_place"] else f"NOT IN PLACE: {supervisor['error'] or 'withdrawn'}"
        console.print(
            f"supervised: redirect rules {rules}, repaired {supervisor['repairs']} times; "
            f"the data plane has died {supervisor['restarts']} times",
            highlight=False,
            markup=False,
        )
    if config["last_error"]:
        console.print(f"the files hold a configuration that was refused; generation {status['generation']} goes on:")
        for problem in config["last_error"]:
            console.print(f"  {problem}", highlight=False, markup=False)
    overload = status["overload"]
    if overload["level"]:
        short = ", ".join(f"{one['name']} {one['pressure']:.0%}" for one in overload["resources"] if one["level"])
        console.print(
            f"OVERLOAD, step {overload['level']} of 3: {short}; {overload['shed']['idle']} idle connections ended, "
            f"{overload['shed']['sources']} refused, accepting paused {overload['shed']['accepts']} times",
            highlight=False,
        )
    listeners = make_table("listeners", "name", "bind", ">active", ">opened")
    for listener in status["listeners"]:
        listeners.add_row(listener["name"], ", ".join(listener["bind"]), str(listener["active"]), str(listener["opened"]))
    console.print(listeners)
    console.print(cluster_table(clusters, every_endpoint=every_endpoint))
    if status["identities"]:
        console.print(identity_table(status["identities"]))
    if status["faults"]["enabled"]:
        injected = ", ".join(f"{count} {fault}" for fault, count in status["faults"]["injected"].items())
        console.print(f"faults are enabled: {status['faults']['configured']} rules; injected: {injected or 'none yet'}")
    if status["closed"]:
        console.print(reason_table(status["closed"]))


def print_connections(console: Console, connections: list[dict[str, Any]], more: bool) -> None:
    table = make_table(
        "connections", "id", "state", "listener", "cluster", "source", "destination", "endpoint", ">age", ">idle", ">sent", ">received"
    )  # fmt: skip
    for one in connections:
        table.add_row(
            one["id"], one["state"], one["listener"], one["cluster"], one["source"], one["destination"], one["endpoint"],
            show_ms(one["age_ms"]), show_ms(one["idle_ms"]), show_bytes(one["bytes_to_upstream"]),
            show_bytes(one["bytes_to_downstream"]),
        )  # fmt: skip
    console.print(table)
    if more:
        console.print("there are more: --limit shows more of them")
