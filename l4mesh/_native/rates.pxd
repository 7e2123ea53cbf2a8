# Implementation, inlined into _fastpath: new connections in a time, exact over all workers, without a lock.
#
# The generic cell rate algorithm (ATM Forum, Traffic Management 4.0, 4.4.2; as a limiter: redis-cell): a token bucket whose whole
# state is the time at which the next connection would arrive if all came evenly spaced. One word, which a compare-and-swap moves.
#
# Keys (sources, workloads, identities) share a table of a fixed size, eight places for each. A place whose time is over holds a full
# bucket, as good as none, and goes to the next key that needs one: a flood of addresses can't grow anything. A key that finds its
# eight places taken by keys that are using them shares one of a few spare buckets with others like it: refusing all of those would
# let a flood shut newcomers out, letting them pass would lift the limit.

from libc.stdint cimport uint32_t, uint64_t

from l4mesh._native.address cimport mix64
from l4mesh._native.atomic cimport add_u, load_acquire, load_u, swap_if_u
from l4mesh._native.types cimport ARRIVAL_SPARE, ARRIVAL_WAYS, ARRIVALS, arrival_t, arrivals_t, rate_t

cdef enum:
    RATE_SLACK_NS = 1000000000   # a worker may lose its CPU between reading the clock and here


cdef inline bint rate_take(uint64_t *arrival_ns, const rate_t *rate, uint64_t now_ns) noexcept nogil:
    # Counts one connection; false when it comes too early.
    cdef uint64_t seen = load_u(arrival_ns)
    cdef uint64_t at
    cdef uint64_t most = rate.tolerance_ns + rate.interval_ns
    while True:
        at = seen if seen > now_ns else now_ns
        if at - now_ns > most + RATE_SLACK_NS:
            # Of a slower rate, before a reload: as empty as a bucket of this one can be.
            if swap_if_u(arrival_ns, &seen, now_ns + most):
                return False
        elif at - now_ns > rate.tolerance_ns:
            return False
        elif swap_if_u(arrival_ns, &seen, at + rate.interval_ns):
            return True


cdef inline bint arrival_take(arrivals_t *table, uint64_t key, const rate_t *rate, uint64_t now_ns) noexcept nogil:
    # The same for one key of many. Two workers that claim places for one key at the same instant may let one connection more pass.
    cdef arrival_t *places
    cdef arrival_t *place
    cdef uint64_t seen
    cdef int i
    cdef bint taken
    key = mix64(key ^ table.seed) | 1
    places = &table.places[(key >> 16) % ARRIVALS & ~(<uint64_t> ARRIVAL_WAYS - 1)]
    i = 0
    while i < ARRIVAL_WAYS:
        if load_acquire(&places[i].key) == key:
            taken = rate_take(&places[i].arrival_ns, rate, now_ns)
            if load_acquire(&places[i].key) == key:
                return taken
            # It was given to another key meanwhile, which has been charged: look again.
            i = -1
        i += 1
    for i in range(ARRIVAL_WAYS):
        place = &places[i]
        seen = load_u(&place.key)
        if load_u(&place.arrival_ns) > now_ns:
            continue
        if swap_if_u(&place.key, &seen, key) or seen == key:
            return rate_take(&place.arrival_ns, rate, now_ns)
    add_u(&table.overflows, 1)
    return rate_take(&table.spare[(key >> 8) % ARRIVAL_SPARE], rate, now_ns)
