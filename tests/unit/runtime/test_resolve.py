"""Names of endpoints: when they are asked for, and what comes of the answers."""

import resource
from collections.abc import Collection

import pytest

from l4mesh.config.load import parse_config
from l4mesh.model import Config
from l4mesh.runtime.resolve import RETRY_S, TTL_MAX_S, TTL_MIN_S, Answer, Resolver, is_name, look_up_names


class Names:
    """A name service and a clock."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.answers: dict[str, Answer] = {}
        self.asked: list[list[str]] = []
        self.resolver = Resolver(self.look_up, lambda: self.now_s)

    def look_up(self, names: Collection[str]) -> dict[str, Answer]:
        self.asked.append(sorted(names))
        return {name: self.answers.get(name, Answer(error="unknown")) for name in names}

    def addresses(self, config: Config) -> list[str]:
        return [endpoint.address for endpoint in self.resolver.resolve(config).clusters["web"].endpoints]


def config(*endpoints: str) -> Config:
    listed = ", ".join(f'"{endpoint}"' for endpoint in endpoints)
    return parse_config(
        f'listeners: [{{name: web, bind: "127.0.0.1:0", cluster: web}}]\nclusters: [{{name: web, endpoints: [{listed}]}}]'
    )


def test_a_name_is_asked_again_when_its_time_is_over_and_not_before() -> None:
    names = Names()
    asked = config("db.example:5432", "10.0.0.9:5432")
    names.answers["db.example"] = Answer(("10.0.0.1", "10.0.0.2"), 30)
    assert names.addresses(asked) == ["10.0.0.1:5432", "10.0.0.2:5432", "10.0.0.9:5432"]
    names.now_s += 29.9
    assert not names.resolver.is_due
    names.addresses(asked)
    assert names.asked == [["db.example"]]
    names.now_s += 0.1
    names.answers["db.example"] = Answer(("10.0.0.3",), 30)
    assert names.resolver.is_due
    assert names.addresses(asked) == ["10.0.0.3:5432", "10.0.0.9:5432"]
    assert not names.resolver.is_due


def test_the_same_answer_gives_the_same_cluster() -> None:
    names = Names()
    asked = config("db.example:5432")
    names.answers["db.example"] = Answer(("10.0.0.1",), 1)
    first = names.resolver.resolve(asked).clusters["web"]
    names.now_s += 2
    assert names.resolver.resolve(asked).clusters["web"] is first


def test_a_name_that_fails_keeps_what_it_had_and_is_tried_again_soon() -> None:
    names = Names()
    asked = config("db.example:5432", "new.example:5432")
    names.answers["db.example"] = Answer(("10.0.0.1",), 1)
    assert names.addresses(asked) == ["10.0.0.1:5432"]
    names.answers.clear()
    names.now_s += RETRY_S
    assert names.addresses(asked) == ["10.0.0.1:5432"]
    names.now_s += RETRY_S - 0.1
    assert not names.resolver.is_due
    names.now_s += 0.1
    names.answers["new.example"] = Answer(("10.0.0.2",), 60)
    assert names.addresses(asked) == ["10.0.0.1:5432", "10.0.0.2:5432"]
    assert names.asked == [["db.example", "new.example"]] * 3


@pytest.mark.parametrize(("ttl_s", "kept_s"), [(0, TTL_MIN_S), (1e9, TTL_MAX_S)])
def test_times_to_live_are_bounded(ttl_s: float, kept_s: float) -> None:
    names = Names()
    names.answers["db.example"] = Answer(("10.0.0.1",), ttl_s)
    names.addresses(config("db.example:5432"))
    names.now_s += kept_s - 0.1
    assert not names.resolver.is_due
    names.now_s += 0.1
    assert names.resolver.is_due


def test_what_no_configuration_names_any_more_is_not_asked_for() -> None:
    names = Names()
    names.answers["db.example"] = Answer(("10.0.0.1",), 1)
    names.addresses(config("db.example:5432"))
    names.addresses(config("10.0.0.9:5432"))
    names.now_s += 10
    assert not names.resolver.is_due


def test_two_names_for_one_address_are_one_endpoint() -> None:
    names = Names()
    names.answers |= {"a.example": Answer(("10.0.0.1",)), "b.example": Answer(("10.0.0.1", "fd00::1"))}
    assert names.addresses(config("a.example:80", "b.example:80")) == ["10.0.0.1:80", "[fd00::1]:80"]


def test_a_resolver_that_can_t_begin_is_a_failure_like_others() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        [answer] = look_up_names(["localhost"]).values()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert answer.error
    assert answer.ttl_s == RETRY_S


def test_the_hosts_file_counts() -> None:
    answer = look_up_names(["localhost"])["localhost"]
    assert "127.0.0.1" in answer.addresses
    assert answer.error == ""


@pytest.mark.parametrize(("host", "named"), [("10.0.0.1", False), ("fd00::1", False), ("db", True), ("10.0.0.1.example", True)])
def test_what_is_a_name(host: str, named: bool) -> None:
    assert is_name(host) is named
