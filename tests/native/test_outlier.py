"""The list by which workers tell of endpoints, and the age that a failure is judged by."""

import threading

from tests.native import probe


def test_an_endpoint_is_told_of_once_until_it_is_taken() -> None:
    told = probe.Told(3)
    assert told.take() == []
    for i in (0, 1, 0, 2, 1):
        told.tell(i)
    assert told.wakes() == 3
    assert told.take() == [2, 1, 0]
    assert told.take() == []
    told.tell(1)
    assert (told.wakes(), told.take()) == (1, [1])


def test_nothing_is_lost_between_many_workers_and_the_loop() -> None:
    n, rounds = 8, 4000
    told = probe.Told(n)
    taken = [0] * n
    done = threading.Event()

    def work(first: int) -> None:
        for i in range(rounds):
            told.tell((first + i) % n)

    def take() -> None:
        while not done.is_set():
            for i in told.take():
                taken[i] += 1

    taker = threading.Thread(target=take)
    workers = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in (taker, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    taker.join()
    for i in told.take():
        taken[i] += 1
    assert all(taken)
    assert sum(taken) <= 4 * rounds
    for i in range(n):
        told.tell(i)
    assert sorted(told.take()) == list(range(n))


def test_a_connection_that_was_made_in_this_turn_has_not_lived_yet() -> None:
    # A turn's time is taken once, that of a connect when it happens.
    assert probe.lived_ms(10_000_000, 9_000_000, 5_000) == 0
    assert probe.lived_ms(5_000_000_000, 1_000_000_000, 500_000) == 3500
