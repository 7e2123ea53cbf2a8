"""A result as Markdown, and two results side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.churn import CHANGES_A_SECOND
from bench.ejection import RATE as EJECTION_RATE
from bench.fairness import AT_ONCE
from bench.fairness import MTLS_RATE as OTHERS_MTLS_RATE
from bench.fairness import RATE as OTHERS_RATE
from bench.health import ENDPOINTS, INTERVAL_S
from bench.proxies import KINDS
from bench.reload import CLUSTERS_A_FILE, ENDPOINTS_A_CLUSTER, FILES, RATE
from bench.results import LATENCIES
from bench.rounds import AGAIN
from bench.stage import DIRECT
from bench.storm import RATE as GOOD_RATE

COLUMNS = (DIRECT, "haproxy", "haproxy-splice", "nginx", "envoy", "l4mesh")
NOTHING = "–"


def render(result: dict[str, Any]) -> str:
    """The whole report."""
    parts = [_heading(result), _rows_table(result["rows"]), _rates_table(result["rows"]), _latency_table(result["rows"])]
    parts += [_growth_table(growth) for growth in result["growth"]]
    if result["reload"]:
        parts.append(_reload_table(result["reload"]["median"]))
    if result.get("churn"):
        parts.append(_churn_table(result["churn"]))
    if result.get("upgrade"):
        parts.append(_upgrade_table(result["upgrade"]))
    if result.get("storm"):
        parts.append(_storm_table(result["storm"]["entries"]))
    if result.get("fairness"):
        parts.append(_fairness_table(result["fairness"]["entries"], OTHERS_RATE, ""))
    if result.get("fairness-mtls"):
        parts.append(
            _fairness_table(
                result["fairness-mtls"]["entries"], OTHERS_MTLS_RATE, ", with mutual TLS between two proxies, each with a CPU"
            )
        )
    if result.get("health"):
        parts.append(_health_table(result["health"]["entries"]))
    if result.get("bandwidth"):
        parts.append(_bandwidth_table(result["bandwidth"]["entries"]))
    if result.get("ejection"):
        parts.append(_ejection_table(result["ejection"]))
    if result["errors"]:
        parts.append("Not measured:\n\n" + "\n".join(f"- {name}: {error}" for name, error in result["errors"].items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], dict(result["versions"])
    modified = " with uncommitted changes" if result["modified"] else ""
    publish = "fit to publish" if result["publish"] else "**not fit to publish**: " + result["why_not"]
    return (
        f"# Comparison of {result['date']}, commit {result['commit']}{modified}\n\n"
        f"{machine['cpu']}, {machine['cpus']} CPUs{' (virtual)' if machine['hypervisor'] else ''}, Linux {machine['kernel']}; "
        + ", ".join(f"{KINDS[name].name if name in KINDS else name} {version}" for name, version in versions.items())
        + f". {result['blocks']} blocks, seed {result['seed']}, {result['minutes']:.0f} min; {publish}."
    )


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def _number(value: float | None) -> str:
    if value is None:
        return NOTHING
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _ratio(ratio: dict[str, float] | None) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})" if ratio else NOTHING


def _limit(limit: dict[str, Any] | None, unit: str, lower: bool) -> str:
    if not limit:
        return NOTHING
    sign = "≤" if lower else "≥"
    of, met = limit["limit"], limit["met"]
    if of["absolute"] is not None:
        return f"{sign} {of['absolute']} {unit}: {met}"
    if of.get("of_peer") is not None:
        return f"{sign} {of['of_peer']} × {_name(of['peer'])}: {met}"
    kind = "direct" if of["of_direct"] is not None else "best peer"
    return f"{sign} {of['of_direct'] or of['of_best']} × {kind}: {met}"


def _name(entry: str) -> str:
    return KINDS[entry].name if entry in KINDS else entry


def _rows_table(rows: list[dict[str, Any]]) -> str:
    """Medians, the paired ratio with the best peer, and the limits."""
    if not rows:
        return ""
    columns = [name for name in COLUMNS if any(name in row["entries"] for row in rows)]
    header = ["work", *map(_name, columns), "l4mesh / best peer (95 %)", "must", "goal", "l4mesh again / l4mesh (95 %)"]
    lines = []
    for row in rows:
        values = [row["entries"].get(name, {}).get("median") for name in columns]
        best = _name(row["best_peer"]) if row["best_peer"] else ""
        limits = [_limit(row.get(name), row["unit"], row["lower_is_better"]) for name in ("must", "goal")]
        void = sum(entry["void"] for entry in row["entries"].values())
        again = _ratio(row["again"]) + (f"; {void} rounds void" if void else "") + ("" if row["publishable"] else "; **noise**")
        compared = f"{_ratio(row['ratio'])} {best}".strip()
        lines.append([f"{row['title']}: {row['unit']}", *map(_number, values), compared, *limits, again])
    return _table(header, lines)


def _rates_table(rows: list[dict[str, Any]]) -> str:
    """How fast it went meanwhile: closed loop, load and backend on one CPU, so less is not always the proxy's doing."""
    columns = [name for name in COLUMNS if any(name in row["entries"] for row in rows)]
    lines = []
    for row in rows:
        rates = [row["entries"].get(name, {}).get("rate") for name in columns]
        if any(rates) and "p99" not in row["entries"].get("l4mesh", row["entries"][next(iter(row["entries"]))]):
            scale, unit = (1e6, "MB/s") if row["unit"] == "CPU s/GB" else (1, "1/s")
            lines.append([f"{row['title']}: {unit}", *(_number(rate / scale if rate else None) for rate in rates)])
    return "Meanwhile (closed loop):\n\n" + _table(["rate", *map(_name, columns)], lines) if lines else ""


def _latency_table(rows: list[dict[str, Any]]) -> str:
    rows = [row for row in rows if any("p99" in entry for entry in row["entries"].values())]
    columns = [name for name in (*COLUMNS, AGAIN) if any(name in row["entries"] for row in rows)]
    lines = []
    for row in rows:
        for percentile in LATENCIES:
            values = [row["entries"].get(name, {}).get(percentile) for name in columns]
            lines.append([row["title"].replace("p99", percentile), *map(_number, values)])
    if not lines:
        return ""
    return "Latency from the intended send time, µs:\n\n" + _table(["open loop", *map(_name, columns)], lines)


def _growth_table(growth: dict[str, Any]) -> str:
    header = [f"connect, request, close: {growth['unit']}", *map(str, growth["points"])]
    lines = [[_name(name), *map(_number, values)] for name, values in growth["entries"].items()]
    return f"By {growth['title']}:\n\n" + _table(header, lines)


def _reload_table(reload: dict[str, float]) -> str:
    size = f"{FILES * CLUSTERS_A_FILE:,} clusters, {FILES * CLUSTERS_A_FILE * ENDPOINTS_A_CLUSTER:,} endpoints, {FILES} files"
    lines = [
        ["all added", _number(reload["added_cpu_s"]), NOTHING, NOTHING],
        ["none changes", NOTHING, NOTHING, _number(reload["before_p99"])],
        ["all change", *(_number(reload[f"full_{name}"]) for name in ("cpu_s", "s", "p99"))],
        ["one file changes", *(_number(reload[f"one_{name}"]) for name in ("cpu_s", "s", "p99"))],
    ]
    header = ["reload", "CPU s", "until in force, s", "p99 of the traffic meanwhile, µs"]
    return f"{size}, {RATE:,} requests/s meanwhile, everything of l4mesh on one CPU:\n\n" + _table(header, lines)


def _churn_table(churn: dict[str, Any]) -> str:
    failed = churn["failed"]
    lines = [
        ["new connections, each a second", f"{churn['connections']:,}, {_number(churn['rate'])}"],
        ["of them failed", ", ".join(f"{count:,}: {how}" for how, count in failed.items()) or "0"],
        ["times that the file was written, that a new plan came into force", f"{churn['changes']:,}, {churn['reloads']:,}"],
        ["dials that were refused, and went on to the next endpoint", f"{churn['refused']:,}"],
        [
            "from when a connection was due until its answer: p50, p99, p99.9",
            ", ".join(_number(churn[p]) for p in ("p50", "p99", "p999")) + " µs",
        ],
    ]
    text = f"One endpoint comes or goes {CHANGES_A_SECOND} times a second, for {churn['seconds']:.0f} s:\n\n"
    return text + _table(["churn", ""], lines)


def _upgrade_table(upgrade: dict[str, float]) -> str:
    lines = [
        ["new connections meanwhile, each a second", f"{upgrade['connections']:,}, {_number(upgrade['rate'])}"],
        ["of them refused, reset or left without an answer", "0"],
        ["live connections that went over at each upgrade", _number(upgrade["handed_over"])],
        ["that stayed to end where they were", _number(upgrade["left"])],
        [
            "until the new process serves alone: median, longest",
            f"{_number(upgrade['switch_p50_ms'])}, {_number(upgrade['switch_max_ms'])} ms",
        ],
        [
            "latest answer on a live connection: median, longest",
            f"{_number(upgrade['stall_p50_ms'])}, {_number(upgrade['stall_max_ms'])} ms",
        ],
        ["the same without an upgrade", f"{_number(upgrade['calm_stall_ms'])} ms"],
    ]
    return f"{upgrade['upgrades']} upgrades in a row, everything on all CPUs:\n\n" + _table(["upgrade", ""], lines)


def _storm_table(entries: dict[str, dict[str, float]]) -> str:
    keys = [f"{when}_{key}" for key in ("p50", "p99", "p999") for when in ("calm", "storm")]
    header = ["µs", *(f"{key}, {when}" for key in LATENCIES for when in ("calm", "storm")), "refused/s", "CPU of a refusal"]
    lines = [
        [_name(name), *(_number(own[key]) for key in keys), _number(own["refused_rate"]), _number(own["refused_cpu_us"])]
        for name, own in entries.items()
    ]
    text = f"{GOOD_RATE:,} requests/s over mTLS, without and with a storm of connections that show a wrong certificate:\n\n"
    text += _table(header, lines)
    if {"l4mesh", "envoy"} <= entries.keys():
        shares = {key: entries["l4mesh"][key] / entries["envoy"][key] for key in keys if key.startswith("storm")}
        text += f"\n\nUnder the storm l4mesh's are {', '.join(f'{share:.2f}' for share in shares.values())} × Envoy's."
    return text


def _fairness_table(entries: dict[str, dict[str, float]], rate: int, how: str) -> str:
    keys = ("calm_p50", "storm_p50", "calm_p99", "storm_p99")
    header = ["µs", *(f"{key}, {when}" for key in ("p50", "p99") for when in ("calm", "storm")), "p99 grows by", "storm/s"]
    lines = [
        [_name(name), *(_number(own[key]) for key in keys), f"{own['storm_p99'] / own['calm_p99']:.1f} ×", _number(own["storm_rate"])]
        for name, own in entries.items()
    ]
    text = f"{rate} new connections/s{how}, each until its first byte, without and beside a source that opens {AT_ONCE} at once to another service:\n\n"
    return text + _table(header, lines)


def _health_table(entries: list[dict[str, Any]]) -> str:
    lines = [[f"{one['check']}, {_name(one['entry'])}", f"{one['core']:.1%}", _number(one["check_us"])] for one in entries]
    header = ["health check", "share of a core", "CPU of a check, µs"]
    return f"{ENDPOINTS:,} endpoints, each every {INTERVAL_S:g} s, and no traffic:\n\n" + _table(header, lines)


def _bandwidth_table(entries: dict[str, dict[str, float]]) -> str:
    header = ["limit", "MB/s at the receiver", "off by", "CPU s/GB", "spliced", "least and most of a connection, of the mean"]
    lines = []
    for name, own in entries.items():
        off = f"{own['measured'] / own['rate'] - 1:+.1%}" if own["rate"] else NOTHING
        shares = f"{own['least']:.3f}, {own['most']:.3f}" if own["least"] != own["most"] else NOTHING
        lines.append([name, f"{own['measured'] / 1e6:,.2f}", off, _number(own["cpu_s_per_gb"]), f"{own['spliced']:.0%}", shares])
    return "Streams to the server through l4mesh, one worker, with a limit:\n\n" + _table(header, lines)


def _ejection_table(ejection: dict[str, Any]) -> str:
    """Connections that fail; in brackets for how long, in seconds."""
    entries = ejection["entries"]
    troubles = list(next(iter(entries.values())))
    header = ["failed connections", *(trouble.replace("_", " ") for trouble in troubles), "together"]
    lines = []
    for name, own in entries.items():
        cells = [f"{own[t]['failed']:g} ({own[t]['until_s']:.1f} s)" if own[t]["failed"] else "0" for t in troubles]
        lines.append([_name(name), *cells, f"{ejection['sums'][name]:g}"])
    text = f"Of 20 endpoints 3 turn bad, under {EJECTION_RATE} connections/s, for 6 s:\n\n" + _table(header, lines)
    return text + f"\n\nl4mesh has the fewest: {'yes' if ejection['met'] else '**no**'}."


def render_comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    """l4mesh then and now. What counts is the ratio with the best peer of the same run: machines and days differ."""
    before = {row["name"]: row for row in old["rows"]}
    lines = []
    for row in new["rows"]:
        was = before.get(row["name"])
        if was is None:
            continue
        values = [_number(one["entries"].get("l4mesh", {}).get("median")) for one in (was, row)]
        lines.append([f"{row['title']}: {row['unit']}", *values, _ratio(was["ratio"]), _ratio(row["ratio"]), _verdict(was, row)])
    if not lines:
        return "The two results have no row in common.\n"
    header = ["work", old["commit"], new["commit"], f"/ best peer, {old['commit']}", f"/ best peer, {new['commit']}", ""]
    return _table(header, lines) + "\n"


def _verdict(was: dict[str, Any], row: dict[str, Any]) -> str:
    """Better or worse only when the confidence intervals don't overlap."""
    old, new = was["ratio"], row["ratio"]
    if not old or not new or (old["low"] <= new["high"] and new["low"] <= old["high"]):
        return "same"
    return "better" if (new["median"] < old["median"]) == row["lower_is_better"] else "**worse**"
