"""Compiled policies against a naive reading of the same rules, over thousands of seeded cases; and what a check costs in looks."""

import random
from ipaddress import ip_address, ip_network

import pytest

from l4mesh import _fastpath
from l4mesh.errors import TlsCause
from l4mesh.model import Action, Peers, Policy, Workload
from l4mesh.policy.authz import add_policies
from l4mesh.policy.plan import pack_ip

NAMESPACES = ("shop", "bank", "shop-test")
ACCOUNTS = ("web", "redis")
IDENTITIES = (*tuple(f"spiffe://example.org/ns/{n}/sa/{a}" for n in NAMESPACES for a in ACCOUNTS), "spiffe://example.org/node/a")
SOURCES = ("10.0.0.1", "10.0.1.7", "192.168.1.1", "fd00::1")
NETWORKS = ("10.0.0.0/24", "10.0.0.0/8", "192.168.0.0/17", "fd00::/16", "10.0.0.1/32", "0.0.0.0/0", "::/0")
PATTERNS = (*IDENTITIES, "spiffe://example.org/ns/shop*", "*/sa/web", "*", "spiffe://example.org/*", "*b")
PORTS = ((80, 80), (443, 443), (1, 100), (6379, 6379), (1, 65535))


def matches(pattern: str, text: str) -> bool:
    if not text:
        return False
    if pattern == "*":
        return True
    if pattern.endswith("*"):
        return text.startswith(pattern[:-1])
    return text.endswith(pattern[1:]) if pattern.startswith("*") else text == pattern


def parts(identity: str) -> tuple[str, str]:
    """Namespace and service account."""
    path = identity.split("/")[3:]
    return (path[1], f"{path[1]}/{path[3]}") if len(path) == 4 and path[0] == "ns" and path[2] == "sa" else ("", "")


def naive_clause(policy: Policy, peers: Peers, identity: str, source: str, port: int) -> bool:
    namespace, account = parts(identity) if identity else ("", "")
    address = ip_address(source)
    within = lambda networks: any(address.version == n.version and address in n for n in networks)  # noqa: E731
    inside = lambda ranges: any(a <= port <= b for a, b in ranges)  # noqa: E731
    any_of = lambda patterns, text: any(matches(p, text) for p in patterns)  # noqa: E731
    return all(
        (
            not policy.ports or inside(policy.ports),
            not inside(policy.not_ports),
            not peers.identities or any_of(peers.identities, identity),
            not any_of(peers.not_identities, identity),
            not peers.namespaces or any_of(peers.namespaces, namespace),
            not any_of(peers.not_namespaces, namespace),
            not peers.service_accounts or account in peers.service_accounts,
            account not in peers.not_service_accounts or not account,
            not peers.sources or within(peers.sources),
            not within(peers.not_sources),
        )
    )


def naive(policies: list[Policy], identity: str, source: str, port: int, *, dry: bool) -> bool:
    """Istio's semantics word for word; ``dry``: with the dry-run policies in force."""
    counted = [policy for policy in policies if dry or not policy.dry_run]

    def hit(policy: Policy) -> bool:
        return any(naive_clause(policy, peers, identity, source, port) for peers in policy.peers)

    if any(policy.action == Action.DENY and hit(policy) for policy in counted):
        return False
    allows = [policy for policy in counted if policy.action == Action.ALLOW]
    return not allows or any(map(hit, allows))


def some(rng: random.Random, choices: tuple[str, ...], chance: float) -> tuple[str, ...]:
    return tuple(rng.sample(choices, rng.randint(1, 2))) if rng.random() < chance else ()


def make_policy(rng: random.Random, number: int) -> Policy:
    def peers() -> Peers:
        return Peers(
            some(rng, PATTERNS, 0.5), some(rng, PATTERNS, 0.15), some(rng, (*NAMESPACES, "shop*", "*"), 0.25),
            some(rng, NAMESPACES, 0.1), some(rng, tuple(f"{n}/{a}" for n in NAMESPACES for a in ACCOUNTS), 0.2),
            some(rng, ("shop/web", "bank/redis"), 0.1),
            tuple(map(ip_network, some(rng, NETWORKS, 0.3))), tuple(map(ip_network, some(rng, NETWORKS, 0.1))),
        )  # fmt: skip

    ports = tuple(rng.sample(PORTS, rng.randint(1, 3))) if rng.random() < 0.4 else ()
    not_ports = (rng.choice(PORTS[:4]),) if rng.random() < 0.15 else ()
    action = Action.DENY if rng.random() < 0.3 else Action.ALLOW
    return Policy(f"p{number}", action, rng.random() < 0.25, "", (), tuple(peers() for _ in range(rng.randint(0, 3))), ports, not_ports)


def new_plan() -> _fastpath.Plan:
    return _fastpath.Plan(
        1, 1, [], [], max_connections=0, max_connections_per_source=0, mark=0, splice=False, error_reasons=0, log_when=0,
        log_sample=0, max_handshakes_per_source=0, trust=0,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(300))
def test_compiled_policies_decide_as_their_words_do(seed: int) -> None:
    rng = random.Random(seed)
    policies = [make_policy(rng, number) for number in range(rng.randint(1, 6))]
    plan = new_plan()
    sets = add_policies(plan, policies, (), lambda name: int(name[1:]) + 1)
    for identity in ("", *IDENTITIES):
        for source in SOURCES:
            for port in (80, 443, 6379, 9000):
                allowed, would, *_ = plan.judge(sets.default, identity.encode(), pack_ip(source), port)
                assert allowed == naive(policies, identity, source, port, dry=False), (policies, identity, source, port)
                # What is refused already is of no interest to a dry run.
                if allowed:
                    assert would == naive(policies, identity, source, port, dry=True), (policies, identity, source, port)


def test_labels_and_namespaces_choose_the_workloads() -> None:
    workloads = (
        Workload("a", "shop", ("10.0.0.2",), "", (("app", "web"), ("version", "1"))),
        Workload("b", "bank", ("10.0.0.3",), "", (("app", "web"),)),
    )
    deny = Policy("deny", Action.DENY, False, "shop", (("app", "web"),), (Peers(),))
    plan = new_plan()
    sets = add_policies(plan, [deny], workloads, lambda _: 1)
    decisions = [plan.judge(chosen, b"", pack_ip("10.0.0.9"), 80)[0] for chosen in (*sets.of_workload, sets.default)]
    assert decisions == [False, True, True]


def test_an_allow_policy_for_nobody_refuses_everybody() -> None:
    plan = new_plan()
    sets = add_policies(plan, [Policy("none", Action.ALLOW, False, "", (), ())], (), lambda _: 1)
    assert plan.judge(sets.default, IDENTITIES[0].encode(), pack_ip("10.0.0.1"), 80)[0] is False


def test_the_numbers_of_causes_are_those_of_the_compiled_code() -> None:
    assert _fastpath.tls_causes() == {cause.name: cause.value for cause in TlsCause}
