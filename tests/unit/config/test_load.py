"""Files and folders, merging, caching, and the examples in conf/."""

import os
import socket
import tempfile
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import click
import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from l4mesh.config import load, schema
from l4mesh.config.load import ConfigCache, load_config, parse_config
from l4mesh.config.nodes import load_grants
from l4mesh.config.yaml import MAX_BYTES
from l4mesh.datapath import Datapath
from l4mesh.errors import CloseReason, ConfigError, Fault
from l4mesh.model import Balance, Bandwidth, Cluster, Expect, FaultRule, HealthCheck, Rate, Rates, WorkloadBandwidth
from l4mesh.runtime.listeners import Listeners
from l4mesh.runtime.reload import _folders

CONF = Path(__file__).parents[3] / "conf"
LISTENER = 'listeners: [{name: web, bind: "127.0.0.1:8080", cluster: a}]\n'


@pytest.mark.parametrize("name", ["minimal.yaml", "node.yaml", "reference.yaml"])
def test_the_examples_are_valid(name: str) -> None:
    assert load_config([CONF / name]).listeners


@pytest.mark.parametrize("text", ["", "# all\n", "---\n# of it\n", "---\n...\n"])
def test_a_file_of_comments_is_no_mistake(tmp_path: Path, text: str) -> None:
    write(tmp_path, a=LISTENER + "clusters: [{name: a}]\n", b=text)
    assert load_config([tmp_path]).listeners


@pytest.mark.parametrize("unit", ["l4mesh.service", "l4mesh-ca.service"])
def test_the_systemd_units_run_commands_that_exist(unit: str) -> None:
    from l4mesh.cli import cli

    text = (CONF / unit).read_text()
    for line in text.splitlines():
        if line.startswith("Exec") and "/l4mesh " in line:
            words = line.split("/l4mesh ")[1].split()
            command = cli.commands[words[0]]
            if isinstance(command, click.Group):
                assert words[1] in command.commands
    assert "LimitNOFILE" in text


def keys_of(section: type[pydantic.BaseModel], path: str = "") -> set[str]:
    keys = set()
    for name, field in section.model_fields.items():
        key = f"{path}{field.alias or name}"
        keys.add(key)
        inner = schema._section_in(field.annotation)
        if inner:
            keys |= keys_of(inner, f"{key}.")
    return keys


def test_the_reference_names_every_key_with_its_default() -> None:
    text = (CONF / "reference.yaml").read_text()
    for key in keys_of(schema.FileSection):
        assert f"{key.rpartition('.')[2]}:" in text, key
    reference = load_config([CONF / "reference.yaml"])
    bare = parse_config(
        'listeners: [{name: example, bind: "127.0.0.1:8080", cluster: example}]\nclusters: [{name: example, endpoints: ["127.0.0.1:9001"]}]'
    )
    assert reference.listeners == bare.listeners
    assert reference.clusters == bare.clusters
    for key in (
        "workers",
        "redirect",
        "watchdog_ms",
        "admin",
        "upgrade_socket",
        "access_log",
        "max_connections",
        "max_connections_per_source",
        "max_handshakes_per_source",
        "rates",
        "splice",
        "mark",
        "return_mark",
        "overload",
    ):
        assert getattr(reference, key) == getattr(bare, key), key


def test_words_stay_words() -> None:
    config = parse_config(
        LISTENER.replace("cluster: a", "cluster: on")
        + "clusters: [{name: on, endpoints: [22.example:22], zone_preference: off}]\nsplice: off\n"
    )
    assert not config.splice
    assert not config.clusters["on"].zone_preference
    assert config.clusters["on"].endpoints[0].address == "22.example:22"


def test_addresses_are_canonical() -> None:
    config = parse_config(
        LISTENER + 'clusters: [{name: a, endpoints: ["[2001:DB8:0::1]:80", "[::ffff:10.0.0.1]:81", "Host.Example:82"]}]'
    )
    assert [endpoint.address for endpoint in config.clusters["a"].endpoints] == [
        "[2001:db8::1]:80",
        "10.0.0.1:81",
        "host.example:82",
    ]


def test_rates_and_faults_become_numbers() -> None:
    config = parse_config(
        """
faults: {enabled: on}
workloads: [{name: w, addresses: [10.0.0.2], bandwidth: {send: 100MiB/s, burst: 10MiB}}]
listeners:
  - name: web
    bind: "127.0.0.1:8080"
    bandwidth_per_connection: {to_downstream: 1.5kB/s}
    routes: [{cluster: a, faults: [{share: 25%, sources: [10.0.0.0/8], stall: {for: 1s-2s, after: 1KiB, direction: to_upstream}}]}]
clusters:
  - name: a
    endpoints: ["127.0.0.1:1"]
    faults:
      - {share: 1%, delay: 200ms}
      - {share: 1%, refuse: on}
      - {share: 1%, reset: {after: 64kB}}
      - {share: 1%, reset: {after: 5s}}
      - {share: 1%, black_hole: on}
      - {share: 1%, black_hole: 30s}
      - {share: 1%, slow: 10KiB/s}
"""
    )
    assert config.faults_enabled
    assert config.fault_rules == 8
    assert config.workloads[0].bandwidth == WorkloadBandwidth(0, 100 << 20, 10 << 20)
    assert config.listeners["web"].bandwidth == Bandwidth(0, 1500)
    stall = FaultRule(Fault.STALL, 0.25, (ip_network("10.0.0.0/8"),), True, 1024, 1000, 2000)
    assert config.listeners["web"].routes[0].faults == (stall,)
    assert config.clusters["a"].faults == (
        FaultRule(Fault.DELAY, 0.01, (), from_ms=200, to_ms=200),
        FaultRule(Fault.REFUSE, 0.01, ()),
        FaultRule(Fault.RESET, 0.01, (), after_bytes=64_000),
        FaultRule(Fault.RESET, 0.01, (), from_ms=5000, to_ms=5000),
        FaultRule(Fault.BLACK_HOLE, 0.01, ()),
        FaultRule(Fault.BLACK_HOLE, 0.01, (), from_ms=30_000, to_ms=30_000),
        FaultRule(Fault.SLOW, 0.01, (), rate=10_240),
    )


def test_the_implicit_cluster_of_original_destinations_can_be_tuned() -> None:
    text = 'listeners: [{name: out, bind: "0.0.0.0:15001", capture: redirect, default: original_destination}]\n'
    assert parse_config(text).clusters["original_destination"].connect_timeout_ms == 1000
    tuned = parse_config(text + "clusters: [{name: original_destination, connect: {timeout: 7s}}]")
    assert tuned.clusters["original_destination"].connect_timeout_ms == 7000
    with pytest.raises(ConfigError, match="must be left out"):
        parse_config(text + 'clusters: [{name: original_destination, endpoints: ["a:1"]}]')


def test_what_the_language_allows_at_most_fits_the_workers_and_the_kernel() -> None:
    files = {"certificate": "a", "private_key": "b", "trust_bundle": "c"}
    data = {
        "node": {"identity": "web"},
        "identities": [{"name": "web"} | files],
        "limits": {"rate": {"rate": "1/h", "burst": 8784}, "rate_per_source": {"rate": "1000000/s", "burst": 100_000_000}},
        "listeners": [
            {
                "name": "web", "bind": "127.0.0.1:0", "cluster": "a", "user_timeout": "7d",
                "tls": {"handshake_timeout": "7d"}, "proxy_protocol": {"from": ["10.0.0.1"], "timeout": "7d"},
            }
        ],
        "clusters": [
            {
                "name": "a", "endpoints": ["10.0.0.1:1"], "user_timeout": "7d", "tls": {"peers": ["*"], "handshake_timeout": "7d"},
                "connect": {"timeout": "7d", "attempts": 8, "backoff": "7d"}, "slow_start": "366d",
                "timeouts": {"idle": "366d", "half_closed": "366d", "lifetime": "366d"},
                "drain": {"removed": "7d", "unhealthy": "7d", "rebalance": "7d"},
            }
        ],
    }  # fmt: skip
    config = parse_config(yaml.safe_dump(data))
    listeners = Listeners(1)
    datapath = Datapath(1, 64, lambda records: None)
    try:
        assert datapath.apply(config, listeners.open(config), [], 1) == 1
        datapath.close_endpoint("a", "10.0.0.1:1", CloseReason.ENDPOINT_REMOVED, config.clusters["a"].drain.removed_ms)
    finally:
        listeners.close()


def test_a_rate_has_a_burst_of_a_second_unless_told() -> None:
    text = (
        'listeners: [{name: web, bind: "127.0.0.1:8080", cluster: a, limits: {rate: 1000/s, rate_per_source: 30/m, '
        "rate_per_workload: {rate: 90/m, burst: 7}, rate_per_identity: off}}]\n"
        'clusters: [{name: a, endpoints: ["a:1"]}]\nlimits: {rate_per_identity: 10/h}\n'
    )
    config = parse_config(text)
    assert config.listeners["web"].rates == Rates(Rate(1000, 1, 1000), Rate(30, 60, 1), Rate(90, 60, 7), None)
    assert config.listeners["web"].rates.source == Rate(30, 60, 1)
    assert config.rates == Rates(identity=Rate(10, 3600, 1))
    assert [rate.interval_ns for rate in (Rate(1000, 1, 1), Rate(30, 60, 1), Rate(3, 1, 1))] == [10**6, 2 * 10**9, 333_333_333]


def test_pauses_have_their_time_in_the_budget_of_all_attempts() -> None:
    def cluster(connect: str) -> Cluster:
        return parse_config(LISTENER + f'clusters: [{{name: a, endpoints: ["a:1"], connect: {connect}}}]').clusters["a"]

    assert cluster("{}").connect_budget_ms == 3000
    assert cluster("{attempts: 4, backoff: 25ms}").connect_budget_ms == 4000 + 25 * (1 + 2 + 4)
    assert cluster("{attempts: 8, backoff: 25ms, budget: 2s}").connect_budget_ms == 2000
    assert (cluster("{retry_budget: off}").retry_share, cluster("{retry_budget: off}").retry_minimum) == (0.0, -1)


def test_health_checks_have_their_defaults_and_follow_the_cluster_s_tls() -> None:
    def check(text: str, more: str = "") -> HealthCheck | None:
        return parse_config(
            LISTENER + "identities: [{name: n, certificate: a, private_key: b, trust_bundle: c}]\nnode: {identity: n}\n"
            f"clusters: [{{name: a, endpoints: ['10.0.0.1:80'], health_check: {text}{more}}}]"
        ).clusters["a"].health_check  # fmt: skip

    def tls(text: str, more: str = "") -> bool:
        found = check(text, more)
        assert found
        return found.tls

    assert check("off") is None
    plain = check("{interval: 4s}")
    assert plain
    assert (plain.kind, plain.fast_interval_ms, plain.timeout_ms, plain.rise, plain.fall, plain.starts_up, plain.port) == (
        "tcp", 1000, 1000, 2, 3, True, 0,
    )  # fmt: skip
    said = check(r'{send: {text: "a\r\n\0"}, expect: {hex: "00 fF"}}')
    assert said
    assert (said.send, said.expect) == (b"a\r\n\0", Expect(b"\0\xff"))
    secured = ", tls: {peers: ['*'], sni: db.example}"
    assert [tls("{}"), tls("{type: http}"), tls("{type: tls}"), tls("{type: http, tls: on}")] == [False, False, True, True]
    # A check that only connects has nothing to say under TLS, and another port is another server.
    assert [tls("{}", secured), tls("{expect: {text: a}}", secured), tls("{type: http}", secured)] == [False, True, True]
    assert [tls("{type: http, port: 81}", secured), tls("{type: http, port: 81, tls: on}", secured)] == [False, True]
    assert not tls("{type: redis, tls: off}", secured)
    named = check("{type: tls}", secured)
    assert named and named.sni == "db.example"


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_the_files_of_a_folder_are_merged(tmp_path: Path) -> None:
    write(tmp_path, a=LISTENER + "workers: 2\n", b="clusters: [{name: a, balance: maglev}]\n", c="# nothing\n")
    (tmp_path / "notes.txt").write_text("not: [yaml")
    (tmp_path / ".hidden.yaml").write_text("not: [yaml")
    config = load_config([tmp_path])
    assert config.workers == 2
    assert config.clusters["a"].balance == Balance.MAGLEV


def test_conflicts_between_files_name_both(tmp_path: Path) -> None:
    write(tmp_path, a=LISTENER + "workers: 2\nclusters: [{name: a}]\n", b="workers: 3\nclusters:\n  - {name: a}\n")
    with pytest.raises(ConfigError) as caught:
        load_config([tmp_path])
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/b.yaml:1: workers: stands in {tmp_path}/a.yaml already: keep one of the two",
        f"{tmp_path}/b.yaml:3: clusters[0].name: a is the name of a cluster in {tmp_path}/a.yaml already",
    ]


def test_what_can_not_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"node:\n  name: caf\xe9\n")
    for path, message in [
        (tmp_path / "none.yaml", "can't be read: No such file or directory"),
        (tmp_path / "latin.yaml", "latin.yaml:2: is not UTF-8: byte 17 is not text"),
        (tmp_path / ("long" * 100), "can't be read: File name too long"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config([path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is a folder without a .yaml file"):
        load_config([tmp_path / "empty"])


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "..data").write_text(LISTENER + "clusters: [{name: a}]\n")
    (tmp_path / "linked.yml").symlink_to(tmp_path / "..data")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.yaml"))
        with pytest.raises(ConfigError) as refused:
            load_config([tmp_path])
    assert [str(problem) for problem in refused.value.problems] == [
        f"{tmp_path}/{name}.yaml: can't be read: it is not a regular file" for name in ("device", "pipe", "socket")
    ]
    with pytest.raises(ConfigError, match="pipe.yaml: can't be read: it is not a regular file"):
        load_grants(tmp_path / "pipe.yaml", "example.org")


def test_nodes_of_a_ca_that_are_too_many_are_not_cut_off(tmp_path: Path) -> None:
    with (tmp_path / "nodes.yaml").open("wb") as stream:
        stream.write(b"nodes: []\n#")
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(ConfigError, match="is larger than 64 MiB"):
        load_grants(tmp_path / "nodes.yaml", "example.org")


def test_a_folder_that_may_not_be_read_is_a_mistake_like_any_other() -> None:
    """As root others' rights are tried; pytest's own folders are closed to them."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "conf"
        folder.mkdir()
        write(folder, a=LISTENER)
        try:
            for closed in (folder, Path(outer)):
                Path(outer).chmod(0o755)
                closed.chmod(0)
                os.seteuid(65534 if user == 0 else user)
                for place in (folder, folder / "a.yaml"):
                    with pytest.raises(ConfigError, match=f"{place}: can't be read: Permission denied"):
                        load_config([place])
                    assert isinstance(_folders([place]), dict)
                os.seteuid(user)
        finally:
            os.seteuid(user)
            Path(outer).chmod(0o700)
            folder.chmod(0o700)


def test_a_file_that_changes_while_its_mistakes_are_looked_up_is_a_mistake_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, a="node: {name: 1}\n")
    read_again = load._read_again

    def after_another(file: str) -> str:
        write(tmp_path, a="node: {name: [\n")
        return read_again(file)

    monkeypatch.setattr(load, "_read_again", after_another)
    with pytest.raises(ConfigError, match="a.yaml: node.name: must be"):
        load_config([tmp_path])


def test_bombs_are_refused() -> None:
    with pytest.raises(ConfigError, match="nested more than"):
        parse_config("[" * 100_000)
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(ConfigError, match="too many aliases"):
        parse_config(bomb)


def test_unchanged_parts_keep_their_objects(tmp_path: Path) -> None:
    write(
        tmp_path,
        a=LISTENER + "clusters: [{name: a}]\n",
        b='clusters: [{name: b, endpoints: ["a:1"]}, {name: c, endpoints: ["a:1"]}]\n',
    )
    cache = ConfigCache()
    first = load_config([tmp_path], cache)
    write(tmp_path, b='clusters: [{name: b, endpoints: ["a:1"]}, {name: c, endpoints: ["a:2"]}]\n')
    second = load_config([tmp_path], cache)
    assert second.clusters["a"] is first.clusters["a"]
    assert second.clusters["b"] is first.clusters["b"]
    assert second.clusters["c"] is not first.clusters["c"]
    assert second.digest != first.digest


def test_a_file_that_was_refused_does_not_stay_in_the_cache(tmp_path: Path) -> None:
    write(tmp_path, a=LISTENER + "clusters: [{name: a}]\n")
    cache = ConfigCache()
    good = load_config([tmp_path], cache)
    write(tmp_path, a=LISTENER + "clusters: [{name: a, balance: x}]\n")
    for _ in range(2):
        with pytest.raises(ConfigError):
            load_config([tmp_path], cache)
    write(tmp_path, a=LISTENER + "clusters: [{name: a}]\n")
    assert load_config([tmp_path], cache) == good


def test_a_cluster_that_was_refused_is_refused_again_when_something_else_changes(tmp_path: Path) -> None:
    cache = ConfigCache()
    for bad in ("bounded_load: 200%, balance: random", "tls: {}", "health_check: {type: tcp, host: a}", "faults: [{share: 1%}]"):
        for comment in ("", "# another day\n"):
            write(tmp_path, a=LISTENER + f"clusters: [{{name: a, {bad}}}]\n{comment}")
            with pytest.raises(ConfigError):
                load_config([tmp_path], cache)


@pytest.mark.parametrize(("before", "after"), [("weight: 1", "weight: true"), ("weight: 1", "weight: 1.0"), ("zone: a", "zone: [a]")])
def test_a_value_that_python_takes_for_the_one_before_is_looked_at(tmp_path: Path, before: str, after: str) -> None:
    cache = ConfigCache()
    text = LISTENER + 'clusters: [{name: a, endpoints: [{address: "127.0.0.1:1", %s}]}]\n'
    write(tmp_path, a=text % before)
    load_config([tmp_path], cache)
    write(tmp_path, a=text % after)
    with pytest.raises(ConfigError, match="a.yaml:2: clusters"):
        load_config([tmp_path], cache)


ATOMS: Any = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["off", "web", "127.0.0.1:80", "5s"]),
)
KEYS = st.sampled_from(sorted({key.rpartition(".")[2] for key in keys_of(schema.FileSection)} | {"x"}))
TREES = st.recursive(
    ATOMS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)), max_leaves=20
)


@given(st.dictionaries(KEYS, TREES, max_size=6))
@settings(max_examples=300, deadline=None)
def test_no_data_raises_anything_but_a_config_error(data: dict[str, Any]) -> None:
    try:
        parse_config(yaml.safe_dump(data))
    except ConfigError as error:
        assert error.problems


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_text_raises_anything_but_a_config_error(text: str) -> None:
    try:
        parse_config(text)
    except ConfigError as error:
        assert error.problems
