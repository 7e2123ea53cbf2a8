"""When to ask the CA, what to take from it, who may ask for what: without a clock and without sockets."""

import datetime
import multiprocessing
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from l4mesh.cli import cli
from l4mesh.config.nodes import Grants, load_grants
from l4mesh.errors import ConfigError
from l4mesh.identity.ca import CertificateAuthority, make_request
from l4mesh.identity.renewal import Schedule, check_answer, keep_credential, keep_trust
from l4mesh.identity.store import IdentityStore
from l4mesh.identity.svid import IdentityError, Material, load_identity
from l4mesh.model import Identity
from l4mesh.runtime.ca_server import BURST, REQUESTS_PER_S, Bucket
from tests.support.certificates import REDIS, WEB, Authority, hostile

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
NODE = Identity("node", "n", "n", "b", "c", "spiffe://example.org/node/a")
SHOP = Identity("web", "w", "w", "b", "c", WEB)


def material(identity: Identity, not_before: float, expires: float) -> Material:
    return Material(identity.name, identity.spiffe_id, b"", b"", b"", (), 0.0, not_before, expires, b"", (), True, 1)


def schedule(*wanted: Identity, now: float = 0.0, random: float = 0.5, retry_s: float = 5.0, **known: Material) -> Schedule:
    made = Schedule(retry_s, 600.0, lambda: random)
    made.configure(wanted or [NODE, SHOP], known, now)
    return made


# -- when --------------------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_asked_for_at_once_in_order_and_trust_last() -> None:
    plan = schedule()
    node, web, trust = plan.tasks
    assert plan.next() == (0.0, node)
    plan.refused(node, 0.0, "no")
    assert plan.next() == (0.0, web)
    plan.refused(web, 0.0, "no")
    assert plan.next() == (0.0, trust)
    plan.succeeded(trust, 0.0)
    assert plan.next() == (5.0, node)
    # Trust comes with every answer.
    plan.succeeded(node, 5.0, DAY_S)
    assert (trust.due_unix_s, trust.succeeded) == (605.0, 2)
    # What is new in the configuration is asked for at once, and what must be new is renewed.
    plan.configure([NODE, SHOP, Identity("redis", "r", "r", "b", "c", REDIS)], {}, 6.0)
    assert [(task.name, task.due_unix_s) for task in plan.tasks] == [
        ("node", node.due_unix_s),
        ("web", 5.0),
        ("redis", 6.0),
        ("", 605.0),
    ]
    plan.hurry("node", 6.0)
    assert node.due_unix_s == 6.0


@pytest.mark.parametrize(("random", "at"), [(0.0, 0.45), (0.5, 0.5), (1.0, 0.55)])
def test_a_certificate_is_renewed_around_half_of_its_life(random: float, at: float) -> None:
    known = {"web": material(SHOP, 0.0, DAY_S)}
    plan = schedule(SHOP, random=random, **known)
    web = plan.tasks[0]
    assert web.due_unix_s == pytest.approx(DAY_S * at)
    plan.succeeded(web, 1000.0, 1000.0 + DAY_S)
    assert web.due_unix_s == pytest.approx(1000.0 + DAY_S * at)


def test_a_material_of_another_id_counts_as_none() -> None:
    assert schedule(SHOP, now=7.0, web=material(Identity("web", "", "", "", "", REDIS), 0.0, DAY_S)).tasks[0].due_unix_s == 7.0
    # So does one whose ID changes later; the date of one that stays is kept.
    plan = schedule(SHOP, web=material(SHOP, 0.0, DAY_S))
    due = plan.tasks[0].due_unix_s
    plan.configure([SHOP], {}, 50.0)
    assert plan.tasks[0].due_unix_s == due
    plan.configure([Identity("web", "w", "w", "b", "c", REDIS)], {}, 60.0)
    assert plan.tasks[0].due_unix_s == 60.0


def test_ever_shorter_certificates_are_not_asked_for_ever_faster() -> None:
    plan = schedule(SHOP)
    web = plan.tasks[0]
    plan.succeeded(web, 100.0, 100.5)
    assert web.due_unix_s == 105.0


def test_back_off_doubles_to_a_cap_and_starts_anew() -> None:
    plan = schedule(SHOP)
    web = plan.tasks[0]
    now, waits = 0.0, []
    for _ in range(10):
        waits.append(plan.unreachable(web, now, "away"))
        assert plan.next()[0] == now + waits[-1]
        now += waits[-1]
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300, 300]
    assert (web.failed, web.failures, web.error) == (10, 10, "away")
    plan.succeeded(web, now, now + DAY_S)
    assert (web.failures, web.error) == (0, "")
    assert plan.unreachable(web, now, "away") == 5


def test_a_clock_that_is_set_back_makes_nothing_wait_for_the_wrong_date() -> None:
    plan = schedule(NODE, now=9 * DAY_S)
    node, trust = plan.tasks
    plan.tell_time(9 * DAY_S)
    plan.succeeded(trust, 9 * DAY_S)
    plan.refused(node, 9 * DAY_S, "no")
    assert plan.next() == (9 * DAY_S + 5, node)
    plan.unreachable(node, 9 * DAY_S + 5, "away")
    plan.tell_time(9 * DAY_S + 6)
    plan.tell_time(6.0)
    assert plan.next() == (10.0, node)
    assert trust.due_unix_s == 600.0
    # Nor does it when it is set ahead.
    plan.tell_time(9 * DAY_S)
    assert plan.next() == (10.0, node)


def test_it_becomes_urgent_near_expiry() -> None:
    plan = schedule(SHOP)
    web = plan.tasks[0]
    plan.succeeded(web, 0.0, 1000.0)
    for _ in range(10):
        plan.unreachable(web, 500.0, "away")
    assert plan.unreachable(web, 500.0, "away") == pytest.approx(50.0)
    assert plan.unreachable(web, 900.0, "away") == pytest.approx(10.0)
    assert plan.unreachable(web, 999.0, "away") == 5.0
    # Past it there is nothing left to hurry for but the cap.
    assert plan.unreachable(web, 1001.0, "away") == 300.0


def test_a_refusal_holds_up_only_what_was_refused() -> None:
    plan = schedule()
    node, web, trust = plan.tasks
    assert plan.refused(node, 0.0, "no") == 5
    assert plan.next() == (0.0, web)
    plan.succeeded(web, 0.0, DAY_S)
    assert plan.next() == (5.0, node)
    assert trust.error == ""
    # But an absent CA holds up everything, and everything that was due says so.
    plan.unreachable(node, 5.0, "away")
    assert (plan.next()[0], web.error, node.error) == (10.0, "", "away")
    plan.unblock()
    assert plan.next()[0] == 5.0


def test_new_roots_renew_everything_but_what_was_fetched_with_them() -> None:
    plan = schedule()
    node, web, _ = plan.tasks
    plan.succeeded(node, 10.0, DAY_S)
    plan.succeeded(web, 500.0, DAY_S)
    plan.trust_changed(500.0)
    assert (node.due_unix_s, web.due_unix_s > HOUR_S) == (500.0, True)


@given(st.lists(st.tuples(st.sampled_from(["succeeded", "refused", "unreachable"]), st.floats(0, 1), st.floats(0.1, 1e6)), max_size=40))
def test_it_never_asks_without_a_pause(steps: Sequence[tuple[str, float, float]]) -> None:
    dice = iter([random for _, random, _ in steps] * 4 + [0.5] * 1000)
    plan = Schedule(5.0, 600.0, lambda: next(dice))
    plan.configure([SHOP], {}, 0.0)
    now = 0.0
    asked: dict[str, float] = {}
    for outcome, _, life in steps:
        at, task = plan.next()
        now = max(now, at)
        assert now - asked.get(task.name, -10.0) >= 4.4, "twice within less than the first delay and its jitter"
        asked[task.name] = now
        if outcome == "succeeded":
            plan.succeeded(task, now, now + life)
        else:
            getattr(plan, outcome)(task, now, "why")


def test_a_bucket_holds_a_burst_and_fills_with_time() -> None:
    bucket = Bucket(BURST, 0.0)
    assert [bucket.take(0.0) for _ in range(BURST + 2)] == [True] * BURST + [False] * 2
    assert [bucket.take(1.0) for _ in range(6)] == [True] * int(REQUESTS_PER_S) + [False] * 2
    assert bucket.take(1e6)
    assert bucket.tokens == BURST - 1


# -- what is taken -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_judged_before_it_is_taken(tmp_path: Path) -> None:
    ca, other = Authority.new(tmp_path / "ca"), Authority.new(tmp_path / "other")
    bundle, crl = ca.trust()
    key, request = make_request(WEB)
    good = ca.sign(request).certificates
    now = datetime.datetime.now(datetime.UTC).timestamp()
    assert check_answer(SHOP, key, good, bundle, crl, now).spiffe_id == WEB
    redis_key, redis_request = make_request(REDIS)
    as_ca = hostile(ca, tmp_path, "ca-leaf", ca=True, key_cert_sign=True)
    for private_key, certificates, roots, lists, at, why in [
        (make_request(WEB)[0], good, bundle, crl, now, "the new key: does not belong to the certificate"),
        (redis_key, ca.sign(redis_request).certificates, bundle, crl, now, f"is for {REDIS}, not for {WEB}"),
        (key, other.sign(request).certificates, bundle, crl, now, "is signed by no CA of the answer's bundle"),
        (key, good, bundle, other.trust()[1], now, "is signed by no CA that is trusted here"),
        (key, good, bundle, crl, now + 25 * HOUR_S, "the answer's certificate: expired at"),
        (key, good, bundle, crl, now - HOUR_S, "is not valid before"),
        (key, good, b"", crl, now, "the answer's bundle: holds no certificate"),
        (key, b"x", bundle, crl, now, "the answer's certificate: holds no certificate"),
        (as_ca.key.read_bytes(), as_ca.certificate.read_bytes(), bundle, crl, now, "is a CA's certificate"),
    ]:
        with pytest.raises(IdentityError, match=why):
            check_answer(SHOP, private_key, certificates, roots, lists, at)


def files_in(folder: Path) -> Identity:
    credential = str(folder / "identities" / "web.pem")
    return Identity("web", credential, credential, str(folder / "bundle.pem"), str(folder / "crl.pem"), WEB)


def test_what_is_kept_can_be_loaded_after_every_single_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between any two renames of a renewal leaves an identity that loads, through a whole rotation."""
    from l4mesh.identity import renewal

    ca = Authority.new(tmp_path / "ca")
    identity = files_in(tmp_path / "node")
    write, steps = renewal.write_file, [0]

    def checked(path: Path, content: bytes, mode: int) -> None:
        write(path, content, mode)
        steps[0] += 1
        if Path(identity.certificate).exists():
            loaded = load_identity(identity)
            assert (loaded.spiffe_id, loaded.chained, loaded.warnings) == (WEB, True, ())

    monkeypatch.setattr(renewal, "write_file", checked)
    changes = []
    for change in (lambda: None, lambda: None, ca.rotate, ca.drop_old_roots, lambda: None):
        change()
        key, request = make_request(WEB)
        issued = ca.sign(request)
        changes.append(keep_trust(identity, *ca.trust()))
        keep_credential(identity, key, issued.certificates)
    assert changes == [False, False, True, True, False]
    assert steps[0] > 10
    assert load_identity(identity).trust_bundle.count(b"BEGIN CERT") == 1


def test_a_missing_certificate_is_waited_for_and_one_for_somebody_else_is_not_shown(tmp_path: Path) -> None:
    ca = Authority.new(tmp_path / "ca")
    identity = files_in(tmp_path / "node")
    store = IdentityStore()
    assert store.refresh({"web": identity}) == {}
    store.keep()
    assert [(one.spiffe_id, one.in_use) for one in store.status()] == [(WEB, False)]
    keep_trust(identity, *ca.trust())
    issued = ca.issue(REDIS)
    keep_credential(identity, issued.private_key, issued.certificates)
    assert store.refresh({"web": identity}) == {}
    store.keep()
    assert f"is for {REDIS}, not for {WEB}" in store.status()[0].error
    issued = ca.issue(WEB)
    keep_credential(identity, issued.private_key, issued.certificates)
    assert store.refresh({"web": identity})["web"].spiffe_id == WEB
    assert not store.status()[0].in_use
    store.keep()
    assert store.status()[0].in_use


# -- the CA's side -----------------------------------------------------------------------------------------------------------

NODES = """\
nodes:
  - identity: spiffe://example.org/node/a
    workloads: [spiffe://example.org/ns/shop/sa/web, "spiffe://example.org/ns/batch/*"]
  - identity: spiffe://example.org/node/b
    workloads: ["spiffe://example.org/*"]
"""
A, B = "spiffe://example.org/node/a", "spiffe://example.org/node/b"


def grants(tmp_path: Path, text: str = NODES) -> Grants:
    (tmp_path / "nodes.yaml").write_text(text)
    return load_grants(tmp_path / "nodes.yaml", "example.org")


@pytest.mark.parametrize(
    ("node", "wanted", "refusal"),
    [
        (A, A, ""),
        (A, WEB, ""),
        (A, "spiffe://example.org/ns/batch/sa/x", ""),
        (A, WEB + "2", f"{A} may not ask for {WEB}2"),
        (A, REDIS, f"{A} may not ask for {REDIS}"),
        (A, "spiffe://example.org/ns/batch", f"{A} may not ask for spiffe://example.org/ns/batch"),
        (A, B, f"{B} is another node"),
        (B, REDIS, ""),
        (B, A, f"{A} is another node"),
        (B, "spiffe://example.org/l4mesh/ca", "spiffe://example.org/l4mesh/ca is kept for the CA"),
        (WEB, WEB, f"{WEB} is not among the nodes"),
    ],
)
def test_who_gets_what(tmp_path: Path, node: str, wanted: str, refusal: str) -> None:
    assert grants(tmp_path).refusal(node, wanted) == refusal


PATTERN = "or the beginning of one and a *"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NODES.replace("identity: spiffe://example.org/node/b", "identity: b"), "4: nodes[1].identity: must be a SPIFFE ID"),
        (NODES.replace("/node/b", "/node/a"), f"4: nodes[1].identity: {A} stands here already: keep one of the two"),
        (NODES.replace("identity: spiffe://example.org/node/b", "identity: spiffe://other.org/node/b"), "4: nodes[1].identity: must be of the CA's trust domain"),
        (NODES.replace('"spiffe://example.org/*"', '"spiffe://other.org/*"'), "5: nodes[1].workloads[0]: must be of the CA's trust domain, spiffe://example.org/"),
        (NODES.replace('"spiffe://example.org/*"', '"*"'), PATTERN),
        (NODES.replace('"spiffe://example.org/*"', '"*/sa/web"'), PATTERN),
        (NODES.replace('"spiffe://example.org/*"', '"spiffe://example.org*"'), PATTERN),
        (NODES.replace('"spiffe://example.org/*"', '"spiffe://*"'), PATTERN),
        (NODES.replace('"spiffe://example.org/*"', '"spiffe://example.org/**"'), PATTERN),
        (NODES.replace('["spiffe://example.org/*"]', "web"), "5: nodes[1].workloads: must be a list; got 'web'"),
        (NODES.replace("workloads: [\"", "workload: [\""), "5: nodes[1].workload: is not a known key; did you mean workloads?"),
        ("nodes: [a]\n", "1: nodes[0]: must be a mapping of keys; got 'a'"),
        ("- a\n", "1: must be a mapping with keys"),
        ("nodes: [\n", "is not YAML"),
    ],
)  # fmt: skip
def test_mistakes_in_the_nodes_file_have_their_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        grants(tmp_path, text)
    assert message in str(caught.value)


def test_a_missing_nodes_file_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file or directory; it names the nodes"):
        load_grants(tmp_path / "nodes.yaml", "example.org")
    ca = Authority.new(tmp_path / "ca")
    assert load_grants(ca.nodes_path, ca.trust_domain).by_node == {}
    # The example in it is right, once it is no comment any more.
    ca.nodes_path.write_text(ca.nodes_path.read_text().replace("nodes: []\n# ", "nodes:\n  ").replace("\n#  ", "\n   "))
    assert len(load_grants(ca.nodes_path, ca.trust_domain).by_node) == 1


def test_a_rotation_that_is_interrupted_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from l4mesh.identity import ca as module

    authority = Authority.new(tmp_path / "ca")
    monkeypatch.setattr(module, "_authority", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        authority.rotate()
    monkeypatch.undo()
    # Killed: what was being made has no name that counts.
    (tmp_path / "ca" / ".2.killed").mkdir()
    assert CertificateAuthority(tmp_path / "ca").issue(WEB).certificates.count(b"BEGIN CERT") == 2
    authority.rotate()
    assert authority.trust()[0].count(b"BEGIN CERT") == 2


def _revoke_some(folder: Path, count: int, together: Any) -> None:
    authority = CertificateAuthority(folder)
    together.wait(30)
    for _ in range(count):
        authority.revoke(authority.issue(WEB).certificates)


def test_processes_that_change_one_folder_lose_nothing_of_each_other(tmp_path: Path) -> None:
    authority = Authority.new(tmp_path / "ca")
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(4)
    processes = [spawn.Process(target=_revoke_some, args=(tmp_path / "ca", 20, together)) for _ in range(3)]
    for process in processes:
        process.start()
    together.wait(30)
    authority.rotate()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sum(len(generation.revoked) for generation in authority._generations()) == 60
    assert authority.trust()[0].count(b"BEGIN CERT") == 2


def test_a_certificate_proves_an_identity_only_if_this_ca_gave_it_and_stands_by_it(tmp_path: Path) -> None:
    from cryptography import x509

    ca, other = Authority.new(tmp_path / "ca"), Authority.new(tmp_path / "other")
    leaf = lambda pem: x509.load_pem_x509_certificates(pem)[0]  # noqa: E731
    mine = ca.issue(WEB).certificates
    assert ca.authenticate(leaf(mine)) == WEB
    ca.rotate()
    assert ca.authenticate(leaf(mine)) == WEB
    two = hostile(ca, tmp_path, "two", uris=(WEB, REDIS)).certificate.read_bytes()
    below = hostile(ca, tmp_path, "below", links=1).certificate.read_bytes()
    for pem, why in [(other.issue(WEB).certificates, "not issued"), (two, "exactly one URI name"), (below, "not issued")]:
        with pytest.raises(IdentityError, match=why):
            ca.authenticate(leaf(pem))
    ca.revoke(mine)
    with pytest.raises(IdentityError, match="is revoked"):
        ca.authenticate(leaf(mine))
    ca.drop_old_roots()
    with pytest.raises(IdentityError, match="not issued"):
        ca.authenticate(leaf(mine))


def test_enroll_makes_what_a_node_begins_with(tmp_path: Path) -> None:
    run = lambda *words: CliRunner().invoke(cli, list(map(str, words)))  # noqa: E731
    assert run("ca", "init", "--trust-domain", "example.org", tmp_path / "ca").exit_code == 0
    done = run("ca", "enroll", tmp_path / "ca", A, "--out", tmp_path / "node")
    assert (done.exit_code, "nodes.yaml does not name this node yet" in done.output) == (0, True), done.output
    (tmp_path / "ca" / "nodes.yaml").write_text(NODES)
    done = run("ca", "enroll", tmp_path / "ca", A, "--out", tmp_path / "node", "--life", "1h")
    assert (done.exit_code, "warning" in done.output) == (0, False), done.output
    assert stat.S_IMODE((tmp_path / "node" / "node.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "node").stat().st_mode) == 0o700
    (tmp_path / "mesh.yaml").write_text(
        f"""\
ca: {{address: "127.0.0.1:1", identity: me, folder: node}}
identities: [{{name: me, spiffe_id: {A}}}, {{name: web, spiffe_id: {WEB}}}]
listeners: [{{name: in, bind: "127.0.0.1:0", cluster: c}}]
clusters: [{{name: c}}]
"""
    )
    checked = run("check", "-c", tmp_path / "mesh.yaml")
    assert checked.exit_code == 0
    assert [line for line in checked.output.splitlines() if "warning" in line] == [
        "l4mesh: warning: identity web has no certificate yet; `l4mesh run` asks the CA for it"
    ]
