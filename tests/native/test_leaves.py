"""Timers, records, PROXY headers, counters: each against a plain model in Python."""

import random
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4mesh import _fastpath
from l4mesh.errors import CloseReason, Fault
from l4mesh.policy.plan import pack_ip
from l4mesh.snapshot import CONNECT_BUCKETS_S
from tests.native import probe


def test_close_reasons_are_numbered_alike_in_both_languages() -> None:
    assert _fastpath.close_reasons() == {reason.name: reason.value for reason in CloseReason}


def test_faults_are_numbered_alike_in_both_languages() -> None:
    assert _fastpath.faults() == {fault.name: fault.value for fault in Fault}


def test_connect_buckets_are_bounded_alike_in_both_languages() -> None:
    assert probe.n_buckets() == len(CONNECT_BUCKETS_S) + 1
    for index, bound in enumerate(CONNECT_BUCKETS_S):
        ns = round(bound * 1e9)
        assert probe.bucket_of(ns) == index
        assert probe.bucket_of(ns + 1000) == index + 1


def test_an_idle_connection_is_small() -> None:
    assert _fastpath.connection_size() <= 384


@pytest.mark.parametrize("seed", range(8))
def test_the_wheel_fires_each_timer_once_and_never_early(seed: int) -> None:
    rng = random.Random(seed)
    now = rng.choice([1, 63, 64, 4095, 10**9, 2**36 - 5000])
    wheel, count = probe.Wheel(400, now), 400
    due: dict[int, int] = {}
    for _ in range(6000):
        action = rng.random()
        free = [id_ for id_ in range(count) if id_ not in due]
        if action < 0.5 and free:
            id_ = rng.choice(free)
            at = now + rng.choice([0, 1, 5, 63, 64, 65, 1000, 4096, 300_000, 3_600_000])
            wheel.insert(id_, at)
            due[id_] = max(at, now + 1)
        elif action < 0.65 and due:
            id_ = rng.choice(list(due))
            wheel.remove(id_)
            del due[id_]
        else:
            now += rng.choice([0, 1, 1, 2, 63, 64, 1000, 70_000])
            fired = wheel.expire(now)
            assert sorted(fired) == sorted(id_ for id_, at in due.items() if at <= now)
            for id_ in fired:
                del due[id_]
        following = wheel.next_ms()
        assert (following == 0) == (not due)
        assert not due or now <= following <= min(due.values())


@pytest.mark.parametrize("now", [1, 2**30, 2**36 - 5000, 2**36 + 5 * 2**30])
def test_a_deadline_beyond_the_reach_of_the_wheel_fires_early(now: int) -> None:
    # That of a certificate, which may be good for a thousand years.
    for beyond in (2**36 - 1, 2**36, 2**36 + 2**30 - 1, 2**45):
        wheel = probe.Wheel(2, now)
        wheel.insert(0, now + beyond)
        wheel.insert(1, now + 10)
        assert wheel.expire(now + 10) == [1]
        fires = wheel.next_ms()
        while not wheel.expire(fires):
            fires = wheel.next_ms()
        assert now + 366 * 24 * 3_600_000 < fires <= now + beyond


def test_the_wheel_wakes_a_sleeper_only_as_often_as_levels_need() -> None:
    wheel = probe.Wheel(1, 1000)
    wheel.insert(0, 1000 + 3_600_000)
    wakes = 0
    while True:
        wakes += 1
        if wheel.expire(wheel.next_ms()):
            break
    assert wakes <= 6


def test_counts_of_a_source_are_known_to_six_percent() -> None:
    before = -1
    for count in [*range(5000), *(1 << bit for bit in range(13, 63)), (1 << 62) - 1]:
        bucket, least, buckets = probe.share_of(count)
        assert before <= bucket < buckets
        assert count >> 34 or least <= count < max(least + 1, least * 17 / 16)
        assert probe.share_of(least)[0] == bucket
        before = bucket


def test_the_ring_keeps_order_drops_the_newest_and_wakes_once() -> None:
    ring = probe.Ring(8)
    assert ring.park()
    assert [ring.push(n) for n in range(10)] == [True] * 8 + [False] * 2
    assert ring.dropped == 2
    assert ring.woken()
    assert not ring.woken()
    assert [ring.pop() for _ in range(8)] == list(range(8))
    assert ring.pop() is None
    assert ring.push(98)
    assert not ring.woken()
    assert not ring.park()
    assert ring.pop() == 98
    assert ring.park()
    assert ring.push(99)
    assert ring.woken()


ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
PORTS = st.integers(0, 65535)


@given(ADDRESSES, PORTS, ADDRESSES, PORTS, st.sampled_from([1, 2]), st.binary(max_size=40))
def test_a_written_proxy_header_is_read_back(
    source: object, sport: int, destination: object, dport: int, version: int, more: bytes
) -> None:
    packed = pack_ip(str(source)), pack_ip(str(destination))
    header = probe.write_proxy(version, packed[0], sport, packed[1], dport)
    assert probe.parse_proxy(header + more) == (len(header), (packed[0], sport), (packed[1], dport))
    for cut in range(len(header)):
        assert probe.parse_proxy(header[:cut])[0] == -1


@given(st.binary(max_size=600))
@settings(max_examples=500)
def test_no_bytes_crash_the_proxy_parser(data: bytes) -> None:
    for prefix in (b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ", b"\r\n\r\n\0\r\nQUIT\n", b"\r\n\r\n\0\r\nQUIT\n\x21\x11"):
        length = probe.parse_proxy((prefix + data)[:536])[0]
        assert length in (-1, -2) or 0 < length <= len(prefix + data)


@given(st.text("0123456789abcdef:.", max_size=30))
@settings(max_examples=500)
def test_the_proxy_parser_takes_ipv6_text_exactly_as_the_system_does(text: str) -> None:
    try:
        packed = socket.inet_pton(socket.AF_INET6, text)
    except OSError:
        packed = None
    if packed is not None and "." in text:
        return
    length, (source, _), _ = probe.parse_proxy(b"PROXY TCP6 %s ::1 1 2\r\n" % text.encode())
    assert (length > 0) == (packed is not None)
    if packed is not None:
        assert source == packed


def test_proxy_lengths_are_bounded() -> None:
    v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11"
    assert probe.parse_proxy(v2 + struct.pack("!H", 520))[0] == -1
    assert probe.parse_proxy(v2 + struct.pack("!H", 521))[0] == -2
    assert probe.parse_proxy(b"PROXY TCP4 " + b"1" * 200)[0] == -2
