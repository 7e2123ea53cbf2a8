"""What health checks say and how they judge answers, without a wire: whole answers, in pieces, cut off, and of strangers."""

import struct
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4mesh.model import Expect
from l4mesh.runtime.probes import (
    SHOWN_MAX,
    TERMINATE,
    Said,
    Talk,
    show,
    talk_expect,
    talk_http,
    talk_mysql,
    talk_postgresql,
    talk_redis,
)

GREETING = (
    b"\x0a8.0.36\0"
    + struct.pack("<I", 7)
    + b"12345678\0"
    + b"\xff\xf7\x21\x02\0\xff\xdf\x15"
    + bytes(10)
    + b"123456789012\0caching_sha2_password\0"
)


def packet(number: int, body: bytes) -> bytes:
    return struct.pack("<I", len(body) | number << 24) + body


def error(code: int, text: bytes, state: bytes = b"#28000") -> bytes:
    return b"\xff" + struct.pack("<H", code) + state + text


def hold(talk: Talk, parts: Iterable[bytes]) -> tuple[Said | None, bytes]:
    """What it thinks once all parts have come, None while it wants more; and all that it sent."""
    got, sent = bytearray(), next(talk)
    for part in parts:
        got += part
        try:
            # Who is answered goes on; here the rest may have come already.
            while reply := talk.send(got):
                sent += reply
        except StopIteration as end:
            return end.value, sent
    return None, sent


def judge(talk: Callable[[], Talk], answer: bytes) -> str | None:
    """In one piece and byte by byte, which must come to the same."""
    whole, _ = hold(talk(), [answer])
    pieces, _ = hold(talk(), (answer[i : i + 1] for i in range(len(answer))))
    if whole is not None and whole.why.startswith(("expected", "not ready")):
        assert pieces is not None
        assert bool(pieces.why) == bool(whole.why)
    else:
        assert pieces == whole
    return None if whole is None else whole.why


def http(*status: tuple[int, int]) -> Callable[[], Talk]:
    return lambda: talk_http("web:80", "/", status or ((200, 399),))


@pytest.mark.parametrize(
    ("talk", "answer", "why"),
    [
        (http(), b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", ""),
        (http(), b"HTTP/1.0 204\n", ""),
        (http(), b"HTTP/1.1 404 Not Found\r\n", "status 404"),
        (http(), b"HTTP/1.1 503 Busy\r\n", "status 503"),
        (http((503, 503)), b"HTTP/1.1 503 Busy\r\n", ""),
        (http(), b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n", ""),
        (http(), b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 503 Busy\r\n", "status 503"),
        (http(), b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", None),
        (http((103, 103)), b"HTTP/1.1 103 Early Hints\r\n", ""),
        (http(), b"HTTP/1.1 101 Switching Protocols\r\n\r\nHTTP/1.1 200 OK\r\n", "status 101"),
        (http(), b"HTTP/1.1 200", None),
        (http(), b"HTTP/1.1 2000 OK\r\n", "expected an HTTP status, got HTTP/1.1 2000 OK"),
        (http(), b"HTTP/2 200\r\n", "expected an HTTP status, got HTTP/2 200"),
        (http(), b"-ERR unknown command\r\n", "expected an HTTP status, got -ERR unknown command"),
        (http(), b"\n", "expected an HTTP status, got nothing"),
        (talk_redis, b"+PONG\r\n", ""),
        (talk_redis, b"-NOAUTH Authentication required.\r\n", ""),
        (talk_redis, b"-NOPERM User default has no permissions\r\n", ""),
        (talk_redis, b"-LOADING Redis is loading the dataset in memory\r\n", "expected +PONG, got -LOADING Redis is loading the dataset in memory"),
        (talk_redis, b"+PONGO\r\n", "expected +PONG, got +PONGO"),
        (talk_redis, b"\x1b[31mred\x00\xff\r\n", "expected +PONG, got \\x1b[31mred\\x00\\xff"),
        (lambda: talk_postgresql("l4mesh"), b"R\0\0\0\x08\0\0\0\0", ""),
        (lambda: talk_postgresql("l4mesh"), b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0", ""),
        (lambda: talk_postgresql("l4mesh"), b"N\0\0\0\x08abc\0", ""),
        (lambda: talk_postgresql("l4mesh"), b"E\0\0\0\x1fSFATAL\0C28000\0Mno such role\0\0", ""),
        (lambda: talk_postgresql("l4mesh"), b"E\0\0\0\x2dSFATAL\0C57P03\0Mthe database is starting\0\0", "not ready: the database is starting"),
        (lambda: talk_postgresql("l4mesh"), b"E\0\0\0\x08abc\0", "expected an answer of PostgreSQL, got E\\x00\\x00\\x00\\x08abc\\x00"),
        (lambda: talk_postgresql("l4mesh"), b"R\xff\xff\xff\xff", "expected an answer of PostgreSQL, got R\\xff\\xff\\xff\\xff"),
        (lambda: talk_postgresql("l4mesh"), b"HTTP/1.1 400 Bad Request\r\n", "expected an answer of PostgreSQL, got HTTP/1.1 400 Bad Request\\x0d\\x0a"),
        (lambda: talk_mysql("l4mesh"), packet(0, GREETING), None),
        (lambda: talk_mysql("l4mesh"), packet(0, GREETING) + packet(2, b"\0\0\0\2\0\0\0"), ""),
        (lambda: talk_mysql("l4mesh"), packet(0, GREETING) + packet(2, error(1045, b"Access denied")), ""),
        (lambda: talk_mysql("l4mesh"), packet(0, GREETING) + packet(2, error(1040, b"Too many connections")), "not ready: error 1040, #28000Too many connections"),
        (lambda: talk_mysql("l4mesh"), packet(0, error(1129, b"Host 'x' is blocked", b"")), "not ready: error 1129, Host 'x' is blocked"),
        (lambda: talk_mysql("l4mesh"), packet(0, b"\x09old"), "expected a greeting of MySQL, got \\x04\\x00\\x00\\x00\\x09old"),
        (lambda: talk_mysql("l4mesh"), b"HTTP/1.1 400 Bad Request\r\n", "expected a greeting of MySQL, got HTTP/1.1 400 Bad Request\\x0d\\x0a"),
        (lambda: talk_mysql("l4mesh"), packet(0, b""), "expected a greeting of MySQL, got \\x00\\x00\\x00\\x00"),
        (lambda: talk_expect(b"x", Expect(b"PONG")), b"some +PONG more", ""),
        (lambda: talk_expect(b"x", Expect(b"PONG")), b"+PON", None),
        (lambda: talk_expect(b"x", Expect(b"aab")), b"aaaaab", ""),
        (lambda: talk_expect(b"x", Expect(b"\0\xff")), b"1\0\xff", ""),
        (lambda: talk_expect(b"x", Expect(rb"^SSH-2\.0-", is_regex=True)), b"SSH-2.0-OpenSSH", ""),
        (lambda: talk_expect(b"x", Expect(rb"^SSH-2\.0-", is_regex=True)), b"not SSH-2.0-", None),
        (lambda: talk_expect(b"x", Expect(rb"\xff.\x00", is_regex=True)), b"\xff\n\0", ""),
        (lambda: talk_expect(b"x", Expect("^grün$".encode(), is_regex=True)), "grün".encode(), ""),
    ],
)  # fmt: skip
def test_answers(talk: Callable[[], Talk], answer: bytes, why: str | None) -> None:
    assert judge(talk, answer) == why


def test_what_is_sent() -> None:
    _, sent = hold(talk_http("web.example:8080", "/health?full=1", ((200, 200),)), [])
    assert sent.startswith(b"GET /health?full=1 HTTP/1.1\r\nHost: web.example:8080\r\n")
    assert sent.endswith(b"\r\nConnection: close\r\n\r\n")
    _, sent = hold(talk_redis(), [])
    assert sent == b"*1\r\n$4\r\nPING\r\n"
    _, sent = hold(talk_postgresql("probe"), [])
    assert sent[:8] == struct.pack("!II", len(sent), 3 << 16)
    assert sent[8:].startswith(b"user\0probe\0database\0postgres\0")
    assert sent.endswith(b"\0\0")
    said, sent = hold(talk_mysql("probe"), [packet(0, GREETING), packet(2, b"\xfemysql_clear\0"), packet(4, b"\0\0\0\2\0\0\0")])
    assert said == Said(farewell=packet(0, b"\x01"))
    login, switched = sent[: 4 + sent[0]], sent[4 + sent[0] :]
    assert login[3] == 1
    assert login[36:] == b"probe\0\0mysql_native_password\0"
    # An empty password, numbered as the answer to packet 2.
    assert switched == packet(3, b"")


def test_a_session_that_was_let_in_is_ended_properly() -> None:
    said, _ = hold(talk_postgresql("l4mesh"), [b"R\0\0\0\x08\0\0\0\0"])
    assert said == Said(farewell=TERMINATE)


@pytest.mark.parametrize("pattern", [rb"(a+)+$", rb"(a|aa)+$", rb"(.*)*x", rb"^(([a-z])+.)+[A-Z]([a-z])+$"])
def test_a_regular_expression_can_t_be_made_to_stall(pattern: bytes) -> None:
    # With a matcher that goes back these take longer than anybody's life.
    said, _ = hold(talk_expect(b"", Expect(pattern, is_regex=True)), [b"a" * 65535 + b"!"])
    assert said is None


@settings(max_examples=300, deadline=None)
@given(
    talk=st.sampled_from(
        [http(), talk_redis, lambda: talk_postgresql("a"), lambda: talk_mysql("a"), lambda: talk_expect(b"a", Expect(b"zz")),
         lambda: talk_expect(b"a", Expect(b"z+y", is_regex=True))]
    ),
    parts=st.lists(st.one_of(st.binary(min_size=1, max_size=300), st.sampled_from(
        [packet(0, GREETING), packet(2, error(1, b"x")), b"R\0\0\0\x08", b"HTTP/1.1 ", b"200", b"\r\n", b"E\0\0\1\0", b"\xff" * 4])), max_size=20),
)  # fmt: skip
def test_no_stranger_s_bytes_do_harm(talk: Callable[[], Talk], parts: list[bytes]) -> None:
    said, _ = hold(talk(), parts)
    if said is not None:
        assert said.why.isprintable()
        assert len(said.why) <= 5 * SHOWN_MAX


def test_what_is_shown_of_an_answer_is_short_and_printable() -> None:
    assert show(b"") == "nothing"
    assert show(b"ok\r\n") == "ok\\x0d\\x0a"
    assert show(b"a" * 100) == "a" * SHOWN_MAX + "..."
    assert show("grün\\".encode()) == "gr\\xc3\\xbcn\\x5c"
