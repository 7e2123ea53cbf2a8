"""Listening sockets that come from another process."""

import socket

import pytest

from l4mesh.config.load import parse_config
from l4mesh.model import SocketAddress
from l4mesh.runtime.listeners import IP_TRANSPARENT, Listeners, Place, by_place
from tests.support.proxies import free_port

TEXT = """
listeners: [{name: a, bind: "127.0.0.1:0", cluster: a, backlog: 77, keepalive: {idle: 77s}, user_timeout: 5s}]
clusters: [{name: a, endpoints: ["127.0.0.1:9"]}]
"""


def inherited(workers_before: int, workers: int) -> tuple[list[tuple[list[int], list[int]]], list[socket.socket], Listeners]:
    """Descriptors of the rows that a plan gets, and of the sockets."""
    first = Listeners(workers_before)
    [(bound, _)] = first.open(parse_config(TEXT.replace("77", "66")))["a"]
    config = parse_config(TEXT)
    sockets = {place: list(of_place) for place, of_place in first.export()}
    second = Listeners(workers, sockets)
    rows = second.open(config)["a"]
    assert {address for address, _ in rows} == {bound}
    of_place = next(iter(sockets.values()))
    return [(fds, [listening.fileno() for listening in of_place]) for _, fds in rows], of_place, second


def test_as_many_workers_have_a_socket_each() -> None:
    [(row, fds)], _, listeners = inherited(2, 2)
    assert row == fds
    listeners.close()


def test_more_workers_share_sockets() -> None:
    [(row, fds)], _, listeners = inherited(2, 5)
    assert row == [fds[0], fds[1], fds[0], fds[1], fds[0]]
    listeners.close()


def test_fewer_workers_have_several() -> None:
    rows, _, listeners = inherited(5, 2)
    fds = rows[0][1]
    assert [row for row, _ in rows] == [fds[0:2], fds[2:4], [fds[4], -1]]
    listeners.close()


def test_options_change_only_when_the_process_before_is_done_with_them() -> None:
    _, sockets, listeners = inherited(1, 1)
    idle = (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    assert sockets[0].getsockopt(*idle) == 66
    listeners.settle()
    assert sockets[0].getsockopt(*idle) == 77
    listeners.close()


def test_what_the_configuration_does_not_name_is_closed_at_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listeners = Listeners(1, {Place(bind=socket_address(other), transparent=False, owner=""): [other]})
        assert other.fileno() >= 0
        listeners.settle()
        assert other.fileno() == -1


@pytest.mark.parametrize(
    ("before", "after"),
    [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("[::]", "[::1]"), ("[::1]", "[::]"), ("127.0.0.1", "127.0.0.2")],
)
def test_a_listener_may_move_to_another_address_with_its_port(before: str, after: str) -> None:
    port = free_port()
    listeners = Listeners(2)
    for host in (before, after):
        config = parse_config(TEXT.replace("127.0.0.1:0", f"{host}:{port}"))
        [(bound, _)] = listeners.open(config)["a"]
        listeners.close_unused(config)
        assert str(bound) == f"{host}:{port}"
    listeners.close()


def test_one_address_and_all_of_them_may_have_listeners_of_their_own() -> None:
    port = free_port()
    text = TEXT.replace("listeners: [", f'listeners: [{{name: b, bind: "0.0.0.0:{port}", cluster: a}}, ')
    listeners = Listeners(2)
    assert listeners.open(parse_config(text.replace("127.0.0.1:0", f"127.0.0.1:{port}"))).keys() == {"a", "b"}
    listeners.close()


def socket_address(listening: socket.socket) -> SocketAddress:
    return SocketAddress(*listening.getsockname())


def test_a_socket_tells_its_place() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        places = [Place(SocketAddress(host, one.getsockname()[1]), False, "") for host in ("127.0.0.1",)]
        places.append(Place(SocketAddress("::1", other.getsockname()[1]), False, ""))
        assert by_place([one, other]) == {places[0]: [one], places[1]: [other]}
        one.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        assert list(by_place([one])) == [places[0]._replace(transparent=True)]


def test_only_what_the_kernel_has_not_chosen_lasts() -> None:
    port = free_port()
    config = parse_config(TEXT.replace('bind: "127.0.0.1:0"', f'bind: ["127.0.0.1:0", "127.0.0.1:{port}"]'))
    listeners = Listeners(2)
    listeners.open(config)
    assert [one.getsockname()[1] for one in listeners.lasting(config)] == [port, port]
    assert listeners.lasting(parse_config(TEXT)) == []
    listeners.close()
