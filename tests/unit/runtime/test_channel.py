"""Messages between processes, and what is none."""

import gc
import os
import resource
import socket
import threading
from collections.abc import Iterator

import pytest

from l4mesh.runtime.channel import Channel, DescriptorsLost, Garbled, PeerGone


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel, socket.socket]]:
    """Two ends, and the socket of the first."""
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield Channel(one), Channel(two), one
    one.close()
    two.close()


def test_words_bytes_and_descriptors_arrive(ends: tuple[Channel, Channel, socket.socket]) -> None:
    one, two, _ = ends
    data = os.urandom(300_000)
    with open("/dev/null") as null:
        threading.Thread(target=one.send, args=("hello", {"n": 1}, data, [null.fileno()] * 250)).start()
        message = two.receive(10, "hello")
        assert message.body == {"say": "hello", "n": 1}
        assert message.data == data
        assert len(message.descriptors) == 250
        assert all(os.path.samestat(os.fstat(fd), os.fstat(null.fileno())) for fd in message.descriptors)
        assert not any(os.get_inheritable(fd) for fd in message.descriptors)
    for fd in message.descriptors:
        os.close(fd)


def test_an_unexpected_word_closes_what_came_with_it(ends: tuple[Channel, Channel, socket.socket]) -> None:
    one, two, _ = ends
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    one.send("other", descriptors=[0, 0])
    with pytest.raises(Garbled, match="'other' instead of hello or hi"):
        two.receive(10, "hello", "hi")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "packet", [b"x", b".", b".\x02\0\0\0{}", b".\xff\xff\xff\xff{}", b".\x02\0\0\0[]", b".\x0b\0\0\0" + b'{"say": 1}x']
)
def test_garbage_is_told(ends: tuple[Channel, Channel, socket.socket], packet: bytes) -> None:
    _, two, raw = ends
    raw.send(packet)
    with pytest.raises(Garbled):
        two.receive(10, "hello")


def test_silence_and_the_end_are_told(ends: tuple[Channel, Channel, socket.socket]) -> None:
    one, two, _ = ends
    with pytest.raises(TimeoutError):
        two.receive(0.0, "hello")
    one.close()
    with pytest.raises(PeerGone):
        two.receive(10, "hello")
    with pytest.raises(PeerGone):
        two.send("hello")


def test_what_was_said_before_the_end_is_heard(ends: tuple[Channel, Channel, socket.socket]) -> None:
    one, two, _ = ends
    # It has not read what we said, which makes the end a reset.
    two.send("unread")
    one.send("taken")
    one.close()
    assert two.receive(10, "taken").body == {"say": "taken"}
    with pytest.raises(PeerGone):
        two.receive(10, "taken")


def test_last_words(ends: tuple[Channel, Channel, socket.socket]) -> None:
    one, two, _ = ends
    one.send("taken")
    said = two.last_words("taken")
    assert said and said.body == {"say": "taken"}
    # From here on nothing is said that is not heard.
    with pytest.raises(PeerGone):
        one.send("taken")
    assert two.last_words("taken") is None


def test_no_room_for_descriptors(ends: tuple[Channel, Channel, socket.socket]) -> None:
    one, two, _ = ends
    one.send("hello", descriptors=[0] * 100)
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    before = len(taken)
    limit = [fd for fd in range(before + 200) if fd not in taken][20]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with pytest.raises(DescriptorsLost):
            two.receive(10, "hello")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) == before
    one.send("hello")
    assert two.receive(10, "hello").descriptors == []
