# Implementation, inlined into _fastpath: bandwidth, of one half of a connection or shared by the connections of a workload.
#
# A bucket is a virtual clock (GCRA, ITU-T I.371 annex A): the time at which all that was given out is paid for. A half reserves a
# quantum on it and moves the bytes when their time has come, so that halves that compete move one quantum each in turn, in the order
# in which they asked and whatever their speed; what a half has reserved and can't use goes back. Being late is no loss: the clock may
# lag behind by `late_ns`, and by more for a half that always had something to move, which makes the timer's millisecond exact on
# average, on a busy machine as well.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free

from l4mesh._native.atomic cimport add, add_u, drop_ref, load_u, store_u, swap_u

cdef enum:
    LANE_BUCKETS = 2              # shared ones of a half: of the source's workload and of the destination's
    QUANTUM_MAX = 1048576
    OWN_QUANTUM_MIN = 1024
    OWN_PER_S = 50                # quanta a second of a half's own rate
    SHARED_QUANTUM_MIN = 4096
    SHARED_PER_S = 100
    SPLICED_RATE = 10000000       # from here on a shared quantum is
    SPLICED_QUANTUM_MIN = 16384   # no smaller than what is worth a splice
    ROUND_MS = 24                 # longest that a turn is waited for, as far as smaller quanta help
    LATE_MS = 25
    BUSY_LATE_MS = 1000

ctypedef struct bucket_t:
    int64_t refs                  # of a shared one: its Bucket object and connections
    uint64_t next_ns
    uint64_t rate                 # bytes a second; 0: no limit
    uint64_t late_ns
    uint64_t quantum              # of a shared one: the smaller, the more there are who wait
    uint64_t epoch                # grows with every change of the rate: what was reserved before is void

ctypedef struct lane_t:
    # The limits of one half. Owns a reference to each shared bucket.
    bucket_t own
    bucket_t *shared[LANE_BUCKETS]       # NULL: none
    uint64_t at_ns                # when what is reserved may move
    uint64_t epoch                # of the shared buckets, when it was reserved
    int32_t left                  # reserved and not moved
    uint8_t busy                  # it has had something to move ever since it reserved


cdef inline uint64_t bucket_cost(uint64_t rate, uint64_t bytes) noexcept nogil:
    # ns
    return bytes * 1000000000 // rate


cdef inline uint32_t bucket_quantum(uint64_t rate, uint64_t per_s, uint64_t least) noexcept nogil:
    cdef uint64_t quantum = rate // per_s
    if quantum > QUANTUM_MAX:
        return QUANTUM_MAX
    return <uint32_t> (quantum if quantum > least else least)


cdef inline void bucket_set(bucket_t *bucket, uint64_t rate, uint64_t burst, uint64_t quantum) noexcept nogil:
    # `burst`: bytes that may pass at once, a quantum of them by reservation and the rest by being late; 0: as few as is exact.
    # A burst may be larger than what can be counted in ns times bytes.
    cdef uint64_t burst_ns = <uint64_t> (<double> (burst - quantum) * 1e9 / <double> rate) if burst > quantum else 0
    bucket.rate = rate
    bucket.late_ns = max(burst_ns, <uint64_t> LATE_MS * 1000000)


cdef inline void bucket_change(bucket_t *bucket, uint64_t rate, uint64_t burst, uint64_t now_ns) noexcept nogil:
    # Of a shared bucket in use: by the control loop alone.
    cdef bucket_t changed
    changed.late_ns = 0
    changed.quantum = bucket_quantum(rate, SHARED_PER_S, SHARED_QUANTUM_MIN)
    if rate:
        bucket_set(&changed, rate, burst, changed.quantum)
    store_u(&bucket.quantum, changed.quantum)
    store_u(&bucket.late_ns, changed.late_ns)
    store_u(&bucket.rate, rate)
    store_u(&bucket.next_ns, now_ns)
    add_u(&bucket.epoch, 1)


cdef inline void bucket_hold(bucket_t *bucket) noexcept nogil:
    add(&bucket.refs, 1)


cdef inline void bucket_drop(bucket_t *bucket) noexcept nogil:
    if drop_ref(&bucket.refs) == 0:
        free(bucket)


cdef inline uint64_t bucket_reserve(bucket_t *bucket, uint64_t bytes, bint busy, uint64_t now_ns) noexcept nogil:
    # When the bytes may move.
    cdef uint64_t rate = load_u(&bucket.rate)
    cdef uint64_t late_ns = load_u(&bucket.late_ns)
    cdef uint64_t next_ns, start_ns
    if rate == 0:
        return 0
    if busy and late_ns < <uint64_t> BUSY_LATE_MS * 1000000:
        late_ns = <uint64_t> BUSY_LATE_MS * 1000000
    while True:
        next_ns = load_u(&bucket.next_ns)
        # Signed: what comes back across a change of the rate may leave the clock below 0.
        start_ns = next_ns if <int64_t> (next_ns + late_ns - now_ns) > 0 else now_ns - late_ns
        if swap_u(&bucket.next_ns, next_ns, start_ns + bucket_cost(rate, bytes)):
            return start_ns


cdef inline void bucket_return(bucket_t *bucket, uint64_t bytes) noexcept nogil:
    cdef uint64_t rate = load_u(&bucket.rate)
    if rate:
        add_u(&bucket.next_ns, 0 - bucket_cost(rate, bytes))


cdef inline uint64_t bucket_turn(bucket_t *bucket, uint64_t rate, int64_t wait_ns) noexcept nogil:
    # The quantum of those who ask now, when a turn is `wait_ns` away: so that a short message does not wait for many large ones. All
    # who compete use the same, which is what makes their shares equal; it moves slowly, and rests while the wait is within a factor
    # of two.
    cdef uint64_t quantum = load_u(&bucket.quantum)
    cdef uint64_t most = bucket_quantum(rate, SHARED_PER_S, SHARED_QUANTUM_MIN)
    cdef uint64_t least = SPLICED_QUANTUM_MIN if rate >= SPLICED_RATE else SHARED_QUANTUM_MIN
    if wait_ns > <int64_t> ROUND_MS * 1000000 and quantum > least:
        quantum -= quantum // 16
    elif wait_ns < <int64_t> ROUND_MS * 500000 and quantum < most:
        quantum += quantum // 16
    else:
        return quantum
    quantum = least if quantum < least else most if quantum > most else quantum
    store_u(&bucket.quantum, quantum)
    return quantum


cdef inline bint lane_is_limited(const lane_t *lane) noexcept nogil:
    return lane.own.rate or lane.shared[0] != NULL or lane.shared[1] != NULL


cdef inline uint64_t lane_epoch(const lane_t *lane) noexcept nogil:
    cdef uint64_t epoch = 0
    cdef int i
    for i in range(LANE_BUCKETS):
        if lane.shared[i] != NULL:
            epoch += load_u(&lane.shared[i].epoch)
    return epoch


cdef inline void lane_reserve(lane_t *lane, uint64_t now_ns) noexcept nogil:
    # Reserves a quantum.
    cdef uint64_t quantum = QUANTUM_MAX
    cdef uint64_t wait_ms = 0
    cdef uint64_t rate, most, start_ns
    cdef int64_t wait_ns
    cdef int i
    for i in range(LANE_BUCKETS):
        rate = load_u(&lane.shared[i].rate) if lane.shared[i] != NULL else 0
        if rate == 0:
            continue
        wait_ns = <int64_t> (load_u(&lane.shared[i].next_ns) - now_ns)
        most = bucket_turn(lane.shared[i], rate, wait_ns)
        quantum = most if most < quantum else quantum
        if wait_ns > <int64_t> (wait_ms * 1000000):
            wait_ms = <uint64_t> wait_ns // 1000000
    if lane.own.rate:
        # Where its turn comes seldom, a half of a low rate must make more of it: as much as comes due while it waits, being late
        # included.
        most = bucket_quantum(lane.own.rate, OWN_PER_S, OWN_QUANTUM_MIN)
        wait_ms += wait_ms // 2 + LATE_MS // 2
        if lane.own.rate * wait_ms // 1000 > most:
            most = lane.own.rate * wait_ms // 1000
        quantum = most if most < quantum else quantum
    lane.left = <int32_t> quantum
    lane.epoch = lane_epoch(lane)
    lane.at_ns = bucket_reserve(&lane.own, quantum, lane.busy, now_ns)
    for i in range(LANE_BUCKETS):
        if lane.shared[i] != NULL:
            start_ns = bucket_reserve(lane.shared[i], quantum, lane.busy, now_ns)
            if start_ns > lane.at_ns:
                lane.at_ns = start_ns
    lane.busy = 1


cdef inline bint lane_waits(const lane_t *lane, uint64_t now_ns) noexcept nogil:
    # For its turn.
    return lane.left > 0 and lane.at_ns > now_ns


cdef inline uint32_t lane_allow(lane_t *lane, uint64_t now_ns) noexcept nogil:
    # How many bytes may move now; 0: none before lane.at_ns. Must hold: there are bytes to move.
    if lane_waits(lane, now_ns) and lane.epoch != lane_epoch(lane):
        lane.left = 0
    if lane.left <= 0:
        lane_reserve(lane, now_ns)
    return 0 if lane.at_ns > now_ns else <uint32_t> lane.left


cdef inline void lane_settle(lane_t *lane, uint64_t now_ns) noexcept nogil:
    # There is nothing more to move: what is left of a turn that has come goes to others.
    cdef int i
    if lane.at_ns > now_ns:
        return
    lane.busy = 0
    if lane.left <= 0:
        return
    bucket_return(&lane.own, <uint64_t> lane.left)
    for i in range(LANE_BUCKETS):
        if lane.shared[i] != NULL and lane.epoch == lane_epoch(lane):
            bucket_return(lane.shared[i], <uint64_t> lane.left)
    lane.left = 0


cdef inline void lane_share(lane_t *lane, bucket_t *bucket) noexcept nogil:
    # Must hold: there is room for one more.
    if bucket != NULL:
        bucket_hold(bucket)
        lane.shared[1 if lane.shared[0] != NULL else 0] = bucket


cdef inline void lane_end(lane_t *lane) noexcept nogil:
    # Also gives back a turn that was still to come.
    cdef int i
    lane.at_ns = 0
    lane_settle(lane, 0)
    for i in range(LANE_BUCKETS):
        if lane.shared[i] != NULL:
            bucket_drop(lane.shared[i])
