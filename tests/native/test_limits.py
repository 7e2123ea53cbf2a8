"""Rates, retry budgets and pauses: exact, for any number of threads, whatever floods them."""

import threading

import pytest

from tests.native import probe

SECOND = 10**9


@pytest.mark.parametrize(("interval_ns", "burst"), [(1000, 1), (10_000, 50), (333_333, 7), (SECOND, 3)])
def test_a_rate_lets_pass_its_burst_and_then_one_an_interval(interval_ns: int, burst: int) -> None:
    rates = probe.Rates(interval_ns, burst)
    assert [rates.take() for _ in range(burst + 3)] == [True] * burst + [False] * 3
    rates.pass_time(interval_ns - 1)
    assert not rates.take()
    rates.pass_time(1)
    assert rates.take()
    assert not rates.take()
    rates.pass_time(5 * burst * interval_ns)
    assert sum(rates.take() for _ in range(3 * burst)) == burst


@pytest.mark.parametrize("key", [None, 77])
@pytest.mark.parametrize(("interval_ns", "burst"), [(1000, 100), (10_000, 1)])
def test_a_rate_is_exact_over_threads(interval_ns: int, burst: int, key: int | None) -> None:
    rates = probe.Rates(interval_ns, burst, now_ns=SECOND)
    passed = []
    threads = [
        threading.Thread(target=lambda: passed.append(rates.hammer(SECOND + 200_000_000, interval_ns // 8, key))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = 200_000_000 // interval_ns + burst
    assert sum(passed) <= expected + expected // 100, passed
    # Without a burst, a thread that loses its processor between the clock and the bucket loses its turn for good.
    assert sum(passed) >= expected - expected // (100 if burst > 1 else 8), passed


def test_a_slower_rate_of_before_does_not_outlive_a_reload() -> None:
    rates = probe.Rates(3600 * SECOND, 1)
    assert rates.take()
    assert not rates.take()
    rates.set_rate(SECOND // 1000, 1)
    assert not rates.take()
    rates.pass_time(2 * SECOND // 1000)
    assert rates.take()


def test_keys_have_buckets_of_their_own() -> None:
    rates = probe.Rates(SECOND, 2)
    for key in range(1, 2000):
        assert [rates.take_key(key) for _ in range(3)] == [True, True, False], key
    assert rates.overflows == 0


def test_a_flood_of_keys_neither_grows_the_table_nor_frees_who_is_in_it() -> None:
    rates = probe.Rates(SECOND, 1)
    assert rates.take_key(1)
    passed = rates.flood(2, 20 * rates.places)
    # Every place once, and the spare buckets: no key of the flood may have had more than one.
    assert rates.places * 0.99 <= passed <= rates.places + 64
    assert rates.overflows >= 18 * rates.places
    assert not rates.take_key(1), "the flood has pushed out a source that is at its rate"


def test_after_a_flood_every_key_has_a_place_again() -> None:
    rates = probe.Rates(SECOND, 1)
    rates.flood(1, 4 * rates.places)
    before = rates.overflows
    rates.pass_time(SECOND + 1)
    assert all(rates.take_key(key) for key in range(10**9, 10**9 + 1000))
    assert rates.overflows == before


def test_a_newcomer_in_a_flood_shares_a_spare_bucket() -> None:
    rates = probe.Rates(SECOND, 1)
    rates.flood(1, 20 * rates.places)
    newcomer = 10**12
    let_in = 0
    for _ in range(10):
        # The flood keeps every place in use; nobody is let in more than once a second, but now and then somebody is.
        rates.pass_time(SECOND)
        rates.flood(1, 20 * rates.places)
        let_in += rates.take_key(newcomer)
    assert let_in <= 10


@pytest.mark.parametrize(
    ("active", "permille", "minimum", "allowed"),
    [(0, 200, 3, 3), (10, 200, 3, 3), (100, 200, 3, 20), (1000, 0, 5, 5), (1000, 0, 0, 0), (5, 1000, 0, 5), (0, 0, -1, 500)],
)
def test_a_retry_budget_is_a_share_of_the_live_or_the_minimum(active: int, permille: int, minimum: int, allowed: int) -> None:
    assert probe.take_retries(active, permille, minimum, 500) == (allowed, allowed)


def test_pauses_double_up_to_ten_times_and_are_drawn_over_the_whole() -> None:
    for attempts, most in enumerate((25, 50, 100, 200, 250, 250, 250), start=1):
        drawn = {probe.pause_ms(25, attempts, random) for random in range(2000)}
        assert drawn == set(range(most + 1))
