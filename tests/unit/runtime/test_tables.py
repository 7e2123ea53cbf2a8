"""What ``l4mesh status`` shows of very many endpoints."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from l4mesh.runtime.tables import LISTED_ENDPOINTS, cluster_table


def endpoint(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "address": f"10.0.{number // 250}.{number % 250}:80", "weight": 100, "active": 0, "opened": 0, "connect_failures": 0,
        "bytes_to_upstream": 0, "bytes_to_downstream": 0, "warming": False, "health": None, "out": [],
    } | fields  # fmt: skip


def shown(clusters: list[dict[str, Any]], *, every_endpoint: bool = False) -> list[str]:
    console = Console(width=300)
    with console.capture() as capture:
        console.print(cluster_table(clusters, every_endpoint=every_endpoint))
    return [line.strip() for line in capture.get().splitlines()]


def cluster(name: str, endpoints: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "panic": False, "endpoints": endpoints}


def test_of_very_many_endpoints_the_most_telling_are_shown() -> None:
    out = {"cause": "ejected", "since_unix_s": 1.0, "why": "5 failures in a row"}
    many = [endpoint(number, active=number % 7) for number in range(2 * LISTED_ENDPOINTS)]
    many[3] |= {"out": [out]}
    many[-1] |= {"connect_failures": 2, "active": 0}
    lines = shown([cluster("empty", []), cluster("many", many)])
    rows = [line for line in lines if line.startswith("many")]
    assert len(rows) == LISTED_ENDPOINTS
    assert f"{LISTED_ENDPOINTS} of {2 * LISTED_ENDPOINTS:,}" in lines[0]
    assert "5 failures in a row" in rows[0]
    assert many[-1]["address"] in rows[-1]
    busiest = {one["address"] for one in many if one["active"] == 6}
    assert busiest <= {row.split()[1] for row in rows}


def test_all_are_shown_of_few_and_when_asked() -> None:
    few = [endpoint(number) for number in range(LISTED_ENDPOINTS)]
    assert sum(line.startswith("few") for line in shown([cluster("few", few)])) == LISTED_ENDPOINTS
    many = [*few, endpoint(LISTED_ENDPOINTS)]
    lines = shown([cluster("many", many)], every_endpoint=True)
    assert sum(line.startswith("many") for line in lines) == LISTED_ENDPOINTS + 1
    assert lines[0] == "endpoints"
