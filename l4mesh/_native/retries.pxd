# Implementation, inlined into _fastpath: how many attempts after the first a cluster puts up with, and the pause before one.
#
# The budget is Envoy's (retry_budget of its circuit breakers): of the connections to a cluster no more than a share may be on an
# attempt after their first, so that endpoints in trouble are not dialled several times as often as healthy ones. The pause is
# exponential with full jitter (Brooker, "Exponential Backoff and Jitter", AWS 2015).

from libc.stdint cimport int64_t, uint32_t, uint64_t

from l4mesh._native.atomic cimport add, load
from l4mesh._native.stats cimport cluster_stat_t

cdef enum:
    PAUSE_GROWTH_MAX = 10        # times the first pause


cdef inline bint retry_take(cluster_stat_t *stat, uint32_t permille, int64_t minimum) noexcept nogil:
    # Counts a connection in `retrying`; false when the budget is used up. A negative minimum: there is none.
    cdef int64_t most = load(&stat.active) * permille // 1000
    if most < minimum:
        most = minimum
    if add(&stat.retrying, 1) < most or minimum < 0:
        return True
    add(&stat.retrying, -1)
    return False


cdef inline uint32_t retry_pause_ms(uint32_t first_ms, uint32_t attempts, uint64_t random) noexcept nogil:
    # Before the attempt that follows `attempts` of them: 0 to first_ms, twice that, …
    cdef uint64_t most = <uint64_t> first_ms << (attempts - 1)
    if most > <uint64_t> first_ms * PAUSE_GROWTH_MAX:
        most = <uint64_t> first_ms * PAUSE_GROWTH_MAX
    return <uint32_t> (random % (most + 1))
