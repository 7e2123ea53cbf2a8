# Implementation, inlined into _fastpath: the timers of one worker.
#
# A hierarchical timing wheel (Varghese and Lauck, SOSP 1987, scheme 7; laid out as in tokio's timer): six levels of 64 slots,
# 1 ms at the bottom, so that the top reaches over two years. Insert, remove and fire are O(1); a bitmap for each level makes
# the search for the next slot one instruction. Timers are links inside their connections: 12 bytes each, no allocation.

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

cdef extern from *:
    """
    #define l4_ctz64(x) __builtin_ctzll(x)
    #define l4_clz64(x) __builtin_clzll(x)
    """
    int l4_ctz64(uint64_t x) noexcept nogil
    int l4_clz64(uint64_t x) noexcept nogil

cdef enum:
    WHEEL_LEVELS = 6
    WHEEL_SLOTS = 64
    WHEEL_NONE = 0xffffffff
    WHEEL_FIRST = 0x80000000  # in `prev` of the first of a slot, with the slot in the bits below

ctypedef struct timer_t:
    # Owned by the connection that contains it. `at_ms` is 0 when it is not in the wheel.
    uint64_t at_ms
    uint32_t next
    uint32_t prev

ctypedef timer_t *(*timer_of_t)(void *context, uint32_t id) noexcept nogil

ctypedef struct wheel_t:
    uint64_t now_ms
    uint64_t occupied[WHEEL_LEVELS]
    uint32_t heads[WHEEL_LEVELS * WHEEL_SLOTS]
    timer_of_t timer_of      # id → timer: ids stay valid when the table of connections grows
    void *context


cdef inline void wheel_init(wheel_t *wheel, uint64_t now_ms, timer_of_t timer_of, void *context) noexcept nogil:
    cdef int i
    wheel.now_ms = now_ms
    wheel.timer_of = timer_of
    wheel.context = context
    for i in range(WHEEL_LEVELS):
        wheel.occupied[i] = 0
    for i in range(WHEEL_LEVELS * WHEEL_SLOTS):
        wheel.heads[i] = WHEEL_NONE


cdef inline int wheel_slot(const wheel_t *wheel, uint64_t at_ms) noexcept nogil:
    # The level is that of the highest bit in which the deadline differs from now: a slot never holds two rounds.
    cdef uint64_t differs = (at_ms ^ wheel.now_ms) | (WHEEL_SLOTS - 1)
    cdef int level = (63 - l4_clz64(differs)) // 6
    if level >= WHEEL_LEVELS:
        level = WHEEL_LEVELS - 1
    return level * WHEEL_SLOTS + <int> ((at_ms >> (6 * level)) & (WHEEL_SLOTS - 1))


cdef inline void wheel_remove(wheel_t *wheel, timer_t *timer) noexcept nogil:
    # Takes a timer out; nothing when it is not in.
    cdef int slot
    if timer.at_ms == 0:
        return
    if timer.next != WHEEL_NONE:
        wheel.timer_of(wheel.context, timer.next).prev = timer.prev
    if timer.prev & WHEEL_FIRST == 0:
        wheel.timer_of(wheel.context, timer.prev).next = timer.next
    else:
        # The first of a slot carries the slot in `prev`: it was computed against a `now` that has moved on since.
        slot = <int> (timer.prev & ~<uint32_t> WHEEL_FIRST)
        wheel.heads[slot] = timer.next
        if timer.next == WHEEL_NONE:
            wheel.occupied[slot // WHEEL_SLOTS] &= ~(<uint64_t> 1 << (slot % WHEEL_SLOTS))
    timer.at_ms = 0


cdef inline void wheel_put(wheel_t *wheel, uint32_t id, timer_t *timer, uint64_t at_ms) noexcept nogil:
    # Must hold: at_ms is not before now. At now it goes into the slot that is about to fire.
    cdef int slot = wheel_slot(wheel, at_ms)
    cdef uint32_t head = wheel.heads[slot]
    timer.at_ms = at_ms
    timer.next = head
    timer.prev = WHEEL_FIRST | <uint32_t> slot
    if head != WHEEL_NONE:
        wheel.timer_of(wheel.context, head).prev = id
    wheel.heads[slot] = id
    wheel.occupied[slot // WHEEL_SLOTS] |= <uint64_t> 1 << (slot % WHEEL_SLOTS)


cdef inline void wheel_insert(wheel_t *wheel, uint32_t id, timer_t *timer, uint64_t at_ms) noexcept nogil:
    # Arms a timer that is not in the wheel. A deadline in the past fires at the next advance. One beyond the reach of the top level
    # fires early: in that level's current slot it would be spread into the same slot again and again.
    cdef uint64_t reach_ms = wheel.now_ms + (<uint64_t> (WHEEL_SLOTS - 1) << 6 * (WHEEL_LEVELS - 1))
    if at_ms > reach_ms:
        at_ms = reach_ms
    wheel_put(wheel, id, timer, at_ms if at_ms > wheel.now_ms else wheel.now_ms + 1)


cdef inline uint64_t wheel_next_ms(const wheel_t *wheel) noexcept nogil:
    # When the next slot is due, or 0 when no timer is armed. Never later than the earliest timer.
    cdef int level, shift
    cdef uint64_t ahead, slot_now
    for level in range(WHEEL_LEVELS):
        if wheel.occupied[level] == 0:
            continue
        shift = 6 * level
        slot_now = (wheel.now_ms >> shift) & (WHEEL_SLOTS - 1)
        # Within a level only slots after the current one are in use; the top level alone may wrap.
        ahead = wheel.occupied[level] >> slot_now
        if ahead:
            return (((wheel.now_ms >> shift) + <uint64_t> l4_ctz64(ahead)) << shift)
        return ((((wheel.now_ms >> shift) | (WHEEL_SLOTS - 1)) + 1 + <uint64_t> l4_ctz64(wheel.occupied[level])) << shift)
    return 0


cdef inline uint32_t wheel_expire(wheel_t *wheel, uint64_t now_ms) noexcept nogil:
    # Takes out and returns one timer that is due at `now_ms`, or WHEEL_NONE when none is left. Call until then.
    cdef uint64_t due
    cdef int level, slot
    cdef uint32_t id, moved
    cdef timer_t *timer
    while True:
        due = wheel_next_ms(wheel)
        if due == 0 or due > now_ms:
            wheel.now_ms = now_ms
            return WHEEL_NONE
        if due > wheel.now_ms:
            wheel.now_ms = due
        # A slot of a higher level that has come due is spread over the levels below.
        for level in range(WHEEL_LEVELS - 1, -1, -1):
            slot = level * WHEEL_SLOTS + <int> ((wheel.now_ms >> (6 * level)) & (WHEEL_SLOTS - 1))
            if wheel.occupied[level] & (<uint64_t> 1 << (slot % WHEEL_SLOTS)) == 0:
                continue
            if level == 0:
                id = wheel.heads[slot]
                wheel_remove(wheel, wheel.timer_of(wheel.context, id))
                return id
            moved = wheel.heads[slot]
            while moved != WHEEL_NONE:
                timer = wheel.timer_of(wheel.context, moved)
                due = timer.at_ms
                wheel_remove(wheel, timer)
                wheel_put(wheel, moved, timer, due)
                moved = wheel.heads[slot]
