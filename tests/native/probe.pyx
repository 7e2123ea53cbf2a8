"""Thin doors to the leaves of the data path, for tests. Never part of a wheel."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from l4mesh._native.address cimport address_t
from l4mesh._native.atomic cimport add_u, load_u
from l4mesh._native.balance cimport (
    cluster_build, cluster_drop, cluster_pick, cluster_settings_t, cluster_t, endpoint_t, pick_t, pick_random,
)
from l4mesh._native.bandwidth cimport (
    OWN_PER_S, OWN_QUANTUM_MIN, bucket_change, bucket_drop, bucket_quantum, bucket_set, bucket_t, lane_allow, lane_end,
    lane_settle, lane_share, lane_t, lane_waits,
)
from l4mesh._native.linux cimport EFD_NONBLOCK, close, eventfd, read
from l4mesh._native.outlier cimport outlier_lived_ms, outlier_next, outlier_take, outlier_tell
from l4mesh._native.overload cimport SHARE_BUCKETS, share_bucket, share_least
from l4mesh._native.proxy_protocol cimport proxy_parse, proxy_write_v1, proxy_write_v2
from l4mesh._native.rates cimport arrival_take, rate_take
from l4mesh._native.retries cimport retry_pause_ms, retry_take
from l4mesh._native.ring cimport ring_claim, ring_park, ring_peek, ring_pop, ring_push
from l4mesh._native.stats cimport CONNECT_BUCKETS, cluster_stat_t, connect_bucket, endpoint_stat_t
from l4mesh._native.types cimport ARRIVALS, arrivals_t, conn_t, engine_t, rate_t, record_t, ring_t, worker_t
from l4mesh._native.watchdog cimport thread_t, watch_look, watch_parse, watched_t
from l4mesh._native.wheel cimport WHEEL_NONE, timer_t, wheel_expire, wheel_init, wheel_insert, wheel_next_ms, wheel_remove, wheel_t


cdef timer_t *timer_of(void *timers, uint32_t id) noexcept nogil:
    return &(<timer_t *> timers)[id]


cdef class Wheel:
    cdef wheel_t wheel
    cdef timer_t *timers
    cdef uint32_t n

    def __cinit__(self, uint32_t n, uint64_t now_ms):
        self.timers = <timer_t *> calloc(n, sizeof(timer_t))
        self.n = n
        wheel_init(&self.wheel, now_ms, timer_of, self.timers)

    def __dealloc__(self):
        free(self.timers)

    def insert(self, uint32_t id, uint64_t at_ms):
        wheel_insert(&self.wheel, id, &self.timers[id], at_ms)

    def remove(self, uint32_t id):
        wheel_remove(&self.wheel, &self.timers[id])

    def next_ms(self):
        return wheel_next_ms(&self.wheel)

    def expire(self, uint64_t now_ms):
        cdef list fired = []
        cdef uint32_t id = wheel_expire(&self.wheel, now_ms)
        while id != WHEEL_NONE:
            fired.append(id)
            id = wheel_expire(&self.wheel, now_ms)
        return fired


def share_of(uint64_t count):
    """Bucket of a count of connections, the least count in it, and the number of buckets."""
    cdef uint32_t bucket = share_bucket(count)
    return bucket, share_least(bucket), <int> SHARE_BUCKETS


cdef class Balancer:
    """A cluster with live counts of its own."""

    cdef cluster_t *cluster
    cdef endpoint_stat_t *stats
    cdef uint64_t random
    cdef uint64_t cursor
    cdef int64_t active
    cdef uint32_t n
    cdef public bint panic

    def __cinit__(self, list endpoints, int balance, uint64_t seed=1, uint64_t cursor=0, **settings):
        """``endpoints``: (16 bytes of ip, port, weight, tier, warm from ms or 0)."""
        cdef cluster_settings_t compiled
        cdef endpoint_t *table
        cdef uint32_t i, _i
        memset(&compiled, 0, sizeof(compiled))
        compiled.balance = balance
        compiled.bounded_load_percent = settings.get("bounded_load_percent", 0)
        compiled.max_connections_per_endpoint = settings.get("max_connections_per_endpoint", 0)
        self.n = len(endpoints)
        self.random = seed | 1
        self.cursor = cursor
        self.stats = <endpoint_stat_t *> calloc(self.n + 1, sizeof(endpoint_stat_t))
        table = <endpoint_t *> calloc(self.n + 1, sizeof(endpoint_t))
        for i in range(self.n):
            ip, port, weight, tier, warm_from_ms = endpoints[i]
            memcpy(table[i].address.ip, <const uint8_t *> (<bytes> ip), 16)
            table[i].address.port = port
            table[i].weight = weight
            table[i].tier = tier
            self.stats[i].warm_from_ms = warm_from_ms
            self.stats[i].warm_until_ms = warm_from_ms + <uint64_t> settings.get("slow_start_ms", 0) if warm_from_ms else 0
            table[i].stat = &self.stats[i]
        self.cluster = cluster_build(&compiled, 1, NULL, table, self.n)
        free(table)
        for _i in range(20):
            pick_random_of(&self.random)

    def __dealloc__(self):
        cluster_drop(self.cluster)
        free(self.stats)

    @property
    def size(self):
        return self.cluster.size

    def add(self, uint32_t index, int64_t count):
        self.stats[index].active += count
        self.active += count

    def set_failing(self, uint32_t index, bint failing):
        self.stats[index].failing = failing

    def set_out(self, uint32_t index, bint out):
        self.stats[index].out = out

    def pick(self, uint64_t source_hash=0, tuple tried=(), uint64_t now_ms=1):
        cdef pick_t pick
        cdef uint32_t indexes[16]
        cdef uint32_t i
        for i in range(len(tried)):
            indexes[i] = tried[i]
        memset(&pick, 0, sizeof(pick))
        pick.source_hash = source_hash
        pick.random = &self.random
        pick.cursor = &self.cursor
        pick.tried = indexes
        pick.n_tried = len(tried)
        pick.others = self.active
        pick.panic = self.panic
        return cluster_pick(self.cluster, &pick, now_ms)

    def count(self, uint32_t picks, uint64_t now_ms=1):
        """How many of ``picks`` each endpoint gets, from sources 0, 1, 2…"""
        cdef list counts = [0] * self.n
        cdef uint32_t i
        for i in range(picks):
            counts[self.pick(i * 2654435761, (), now_ms)] += 1
        return counts


cdef class SharedBucket:
    cdef bucket_t *bucket

    def __cinit__(self, uint64_t rate, uint64_t now_ns):
        self.bucket = <bucket_t *> calloc(1, sizeof(bucket_t))
        self.bucket.refs = 1
        bucket_change(self.bucket, rate, 0, now_ns)

    def __dealloc__(self):
        bucket_drop(self.bucket)

    def change(self, uint64_t rate, uint64_t now_ns):
        bucket_change(self.bucket, rate, 0, now_ns)

    @property
    def refs(self):
        return self.bucket.refs

    @property
    def next_ns(self):
        return self.bucket.next_ns


cdef class Lane:
    """One half of a connection, as its limits see it."""

    cdef lane_t lane
    cdef bint ended

    def __cinit__(self, uint64_t rate=0, uint64_t burst=0, tuple shared=()):
        cdef SharedBucket one
        if rate:
            bucket_set(&self.lane.own, rate, burst, bucket_quantum(rate, OWN_PER_S, OWN_QUANTUM_MIN))
        for one in shared:
            lane_share(&self.lane, one.bucket)

    def __dealloc__(self):
        self.end()

    def allow(self, uint64_t now_ns):
        return lane_allow(&self.lane, now_ns)

    def spend(self, int n):
        self.lane.left -= n

    def settle(self, uint64_t now_ns):
        lane_settle(&self.lane, now_ns)

    def waits(self, uint64_t now_ns):
        return lane_waits(&self.lane, now_ns)

    def end(self):
        if not self.ended:
            self.ended = True
            lane_end(&self.lane)

    @property
    def at_ns(self):
        return self.lane.at_ns

    @property
    def left(self):
        return self.lane.left


cdef void pick_random_of(uint64_t *state):
    cdef pick_t pick
    pick.random = state
    pick_random(&pick)


cdef tuple shown(const address_t *address):
    return bytes(address.ip[:16]), address.port


def parse_proxy(bytes data):
    """(length or negative code, source, destination)"""
    cdef address_t source, destination
    memset(&source, 0, sizeof(source))
    memset(&destination, 0, sizeof(destination))
    # A copy of exactly this size, so that a sanitizer sees a read past the end.
    cdef uint8_t *exact = <uint8_t *> calloc(len(data) if data else 1, 1)
    memcpy(exact, <const uint8_t *> data, len(data))
    length = proxy_parse(exact, len(data), &source, &destination)
    free(exact)
    return length, shown(&source), shown(&destination)


def write_proxy(int version, bytes source_ip, int source_port, bytes destination_ip, int destination_port):
    cdef address_t source, destination
    cdef uint8_t out[128]
    memcpy(source.ip, <const uint8_t *> source_ip, 16)
    memcpy(destination.ip, <const uint8_t *> destination_ip, 16)
    source.port = source_port
    destination.port = destination_port
    n = proxy_write_v1(out, &source, &destination) if version == 1 else proxy_write_v2(out, &source, &destination)
    return bytes(out[:n])


cdef class Ring:
    cdef ring_t ring
    cdef int fd

    def __cinit__(self, uint64_t size):
        self.ring.records = <record_t *> calloc(size, sizeof(record_t))
        self.ring.mask = size - 1
        self.fd = eventfd(0, EFD_NONBLOCK)

    def __dealloc__(self):
        free(self.ring.records)
        close(self.fd)

    def push(self, int64_t value):
        cdef record_t *record = ring_claim(&self.ring)
        if record == NULL:
            return False
        record.total_us = value
        ring_push(&self.ring, self.fd)
        return True

    def pop(self):
        cdef record_t *record = ring_peek(&self.ring)
        if record == NULL:
            return None
        value = record.total_us
        ring_pop(&self.ring)
        return value

    def park(self):
        return ring_park(&self.ring)

    def woken(self):
        cdef uint64_t count
        return read(self.fd, &count, sizeof(count)) == sizeof(count)

    @property
    def dropped(self):
        return self.ring.dropped


def bucket_of(uint64_t ns):
    return connect_bucket(ns)


def n_buckets():
    return CONNECT_BUCKETS


cdef class Rates:
    """One bucket for all, and the table of buckets by key, under one rate and one clock that several threads move on."""

    cdef rate_t rate
    cdef uint64_t arrival_ns
    cdef uint64_t now_ns
    cdef arrivals_t *table

    def __cinit__(self, uint64_t interval_ns, uint64_t burst, uint64_t now_ns=10**12, uint64_t seed=1):
        self.set_rate(interval_ns, burst)
        self.now_ns = now_ns
        self.table = <arrivals_t *> calloc(1, sizeof(arrivals_t))
        self.table.seed = seed

    def __dealloc__(self):
        free(self.table)

    def set_rate(self, uint64_t interval_ns, uint64_t burst):
        self.rate.interval_ns = interval_ns
        self.rate.tolerance_ns = interval_ns * (burst - 1)

    def pass_time(self, uint64_t ns):
        self.now_ns += ns

    def take(self):
        return bool(rate_take(&self.arrival_ns, &self.rate, self.now_ns))

    def take_key(self, uint64_t key):
        return bool(arrival_take(self.table, key, &self.rate, self.now_ns))

    def hammer(self, uint64_t until_ns, uint64_t step_ns, key=None):
        """Takes as fast as it can, each time moving the clock on, and returns how often it was let pass."""
        cdef uint64_t now_ns = 0, passed = 0
        cdef uint64_t key_ = key or 0
        with nogil:
            while now_ns < until_ns:
                now_ns = add_u(&self.now_ns, step_ns)
                if key_:
                    passed += arrival_take(self.table, key_, &self.rate, now_ns)
                else:
                    passed += rate_take(&self.arrival_ns, &self.rate, now_ns)
        return passed

    def flood(self, uint64_t first, uint64_t count):
        """One connection of each of many keys; how many were let pass."""
        cdef uint64_t key, passed = 0
        with nogil:
            for key in range(first, first + count):
                passed += arrival_take(self.table, key, &self.rate, load_u(&self.now_ns))
        return passed

    @property
    def overflows(self):
        return self.table.overflows

    @property
    def places(self):
        return ARRIVALS


def take_retries(int64_t active, uint32_t permille, int64_t minimum, uint32_t wanted):
    """How many of ``wanted`` retries at a time the budget lets through."""
    cdef cluster_stat_t stat
    cdef uint32_t _i, taken = 0
    memset(&stat, 0, sizeof(stat))
    stat.active = active
    for _i in range(wanted):
        taken += retry_take(&stat, permille, minimum)
    return taken, stat.retrying


def pause_ms(uint32_t first_ms, uint32_t attempts, uint64_t random):
    return retry_pause_ms(first_ms, attempts, random)


cdef class Watched:
    """One thread, as the watchdog sees it."""

    cdef watched_t watched

    def look(self, bint busy, uint64_t turn, str state="R", uint64_t cpu_ms=0, uint64_t faults=0, bint late=False, uint32_t step_ms=250):
        """For how long it has been stuck, ms; None: it came round."""
        cdef thread_t thread
        memset(&thread, 0, sizeof(thread))
        if busy:
            thread.state = ord(state)
            thread.cpu_ms = cpu_ms
            thread.faults = faults
        if not watch_look(&self.watched, busy, turn, &thread, step_ms, late):
            return None
        return self.watched.stuck_ms


def parse_thread(bytes stat):
    """(state, CPU ms, faults) of /proc/…/stat, None when it isn't one."""
    cdef thread_t thread
    memset(&thread, 0, sizeof(thread))
    if not watch_parse(stat, &thread):
        return None
    return chr(thread.state), thread.cpu_ms, thread.faults


cdef class Told:
    """The list of endpoints that failed too often, with as many endpoints as there are ids."""

    cdef engine_t *engine
    cdef endpoint_stat_t *stats

    def __cinit__(self, uint32_t n):
        cdef uint32_t i
        self.engine = <engine_t *> calloc(1, sizeof(engine_t))
        self.engine.up_fd = eventfd(0, EFD_NONBLOCK)
        self.stats = <endpoint_stat_t *> calloc(n, sizeof(endpoint_stat_t))
        for i in range(n):
            self.stats[i].id = i

    def __dealloc__(self):
        close(self.engine.up_fd)
        free(self.engine)
        free(self.stats)

    def tell(self, uint32_t i):
        with nogil:
            outlier_tell(self.engine, &self.stats[i])

    def take(self):
        """Ids of the endpoints on the list."""
        cdef endpoint_stat_t *stat = outlier_take(self.engine)
        cdef list ids = []
        while stat != NULL:
            ids.append(stat.id)
            stat = outlier_next(stat)
        return ids

    def wakes(self):
        """How often the eventfd was written since the last call."""
        cdef uint64_t count = 0
        return count if read(self.engine.up_fd, &count, sizeof(count)) > 0 else 0


def lived_ms(uint64_t now_ns, uint64_t accepted_ns, uint32_t connected_us):
    cdef worker_t *worker = <worker_t *> calloc(1, sizeof(worker_t))
    cdef conn_t *conn = <conn_t *> calloc(1, sizeof(conn_t))
    worker.now_ns = now_ns
    conn.accepted_ns = accepted_ns
    conn.connected_us = connected_us
    lived = outlier_lived_ms(worker, conn)
    free(worker)
    free(conn)
    return lived
