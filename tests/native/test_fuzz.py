"""Fuzzing of what parses bytes before anybody is authenticated. ``L4MESH_FUZZ_SECONDS`` sets how long; without it, a fixed number of
inputs, the same in each run.

What must hold is in fuzz.pyx: nothing is read past the input, results lie within it, a part of an input is unfinished or answered as
the whole is, the records that a hello comes in make no difference, OpenSSL reads the same names, written addresses are read back.

``hellos.txt`` holds the first bytes that real clients sent: openssl s_client, curl, redis-cli, Envoy, and Python's ssl.
"""

import os
import re
import struct
import time
from pathlib import Path

import pytest

from tests.native.fuzz import Fuzzer
from tests.native.probe import write_proxy
from tests.support.openssl import HINT, make_hello, name_extension

SECONDS = float(os.environ.get("L4MESH_FUZZ_SECONDS", "0"))
ROUNDS = 500_000
HELLOS = {name: bytes.fromhex(data) for name, data in map(str.split, (Path(__file__).parent / "hellos.txt").read_text().splitlines())}
V4, V6 = bytes(10) + b"\xff\xff\xc0\x00\x02\x01", bytes.fromhex("20010db8000000000000000000000001")
HEADERS = [write_proxy(version, ip, 4000, ip, 443) for version in (1, 2) for ip in (V4, V6)]
CORPUS = {
    "hello": list(HELLOS.values()),
    "proxy": [
        *HEADERS,
        b"PROXY UNKNOWN\r\n",
        b"PROXY TCP6 ::1 2001:db8:: 1 65535\r\nGET",
        b"\r\n\r\n\0\r\nQUIT\n\x20\x00\0\0",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + struct.pack("!H", 18) + bytes(12) + b"\x04\0\x03abc",
    ],
    "spiffe": [
        b"spiffe://example.org/ns/shop/sa/web",
        b"spiffe://a/b",
        b"spiffe://" + b"d" * 255 + b"/p",
        b"spiffe://a/" + b"p" * 2037,
    ],
}
SEGMENT = rb"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+"
SPIFFE = re.compile(rb"spiffe://[a-z0-9._-]{1,255}(?:/" + SEGMENT + rb")+\Z")


@pytest.mark.timeout(120 + 2 * SECONDS)
@pytest.mark.parametrize("target", CORPUS)
def test_hostile_bytes_break_no_rule(target: str) -> None:
    seed, inputs, end = 1, 0, time.monotonic() + SECONDS / len(CORPUS)
    while True:
        fuzzer = Fuzzer(target, CORPUS[target], seed)
        fuzzer.run(ROUNDS)
        inputs += ROUNDS
        # The corpus has grown, and every outcome was seen: else the inputs have missed what they are for.
        assert fuzzer.size > 2 * len(CORPUS[target])
        assert all(fuzzer.outcomes[: 5 if target == "hello" else 3]), fuzzer.outcomes
        seed += 1
        if time.monotonic() > end:
            break
    print(f"{target}: {inputs} inputs, corpus {fuzzer.size}, outcomes {fuzzer.outcomes}")


def test_the_same_seed_makes_the_same_inputs() -> None:
    made = []
    for _ in range(2):
        fuzzer = Fuzzer("hello", CORPUS["hello"], 7)
        fuzzer.run(2000)
        made.append([fuzzer.make() for _ in range(50)])
    assert made[0] == made[1]


def test_ids_are_taken_exactly_as_the_grammar_says() -> None:
    fuzzer = Fuzzer("spiffe", CORPUS["spiffe"], 3)
    fuzzer.run(5000)
    taken = 0
    for _ in range(20_000):
        before = fuzzer.outcomes[0]
        data = fuzzer.make()
        assert fuzzer.judge(data) == ""
        assert fuzzer.outcomes[0] - before == bool(SPIFFE.match(data) and len(data) <= 2048), data
        taken += fuzzer.outcomes[0] - before
    assert taken > 1000


@pytest.mark.parametrize("name", HELLOS)
def test_real_hellos_are_found(name: str) -> None:
    fuzzer = Fuzzer("hello", CORPUS["hello"], 1)
    assert fuzzer.judge(HELLOS[name]) == ""
    found, by_openssl = fuzzer.outcomes[0], fuzzer.outcomes[4]
    assert found == by_openssl > 0


@pytest.mark.parametrize("data", [b"", b"\0", b"\1", b"\x20", b"\x21", b"\xff", b"\1\1"])
def test_a_hint_is_one_small_number(data: bytes) -> None:
    fuzzer = Fuzzer("hello", CORPUS["hello"], 1)
    assert fuzzer.judge(make_hello((HINT, data), name_extension(b"one.example.org"))) == ""
    assert fuzzer.outcomes[0] == fuzzer.outcomes[4] > 0


def test_a_name_said_twice_is_no_hello() -> None:
    """Else the one we route by could be another than the one that the server behind us goes by."""
    name, protocols = name_extension(b"one.example.org"), (16, b"\0\3\2h2")
    for extensions, outcome in (([name, protocols], 0), ([name, protocols, name], 3), ([protocols, name, protocols], 3)):
        fuzzer = Fuzzer("hello", CORPUS["hello"], 1)
        assert fuzzer.judge(make_hello(*extensions)) == ""
        assert fuzzer.outcomes[outcome] > 0, extensions
