# Implementation, inlined into _fastpath: a compiled cluster, and picking one of its endpoints.
#
# A cluster is one block of memory: the endpoints, and for each of its two tiers (the node's zone, the others) an index table that
# its algorithm reads. Building does the work; a pick is O(1), O(log n) for the ring, and allocates nothing. When a pick gives an
# endpoint that can't be used (tried before, at its limit, cold), a few more draws follow, then one scan as the last resort.
#
# Sources: smooth weighted round robin, nginx (ngx_http_upstream_round_robin.c) in the earliest-deadline-first form of Envoy's
# edf_scheduler.h; alias tables, Vose, IEEE TSE 17(9) 1991; two choices, Mitzenmacher, IEEE TPDS 12(10) 2001; ring, ketama (Jones
# 2007) on Karger et al., STOC 1997; maglev, Eisenbud et al., NSDI 2016, weighted as in Envoy; bounded loads, Mirrokni, Thorup and
# Zadimoghaddam, SODA 2018 (arXiv 1608.01350).

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcpy, memset

from l4mesh._native.address cimport address_hash, address_t, mix64
from l4mesh._native.atomic cimport add, drop_ref, load, load_u
from l4mesh._native.spiffe cimport pattern_t
from l4mesh._native.stats cimport endpoint_stat_t

cdef enum balance_t:
    BALANCE_ROUND_ROBIN = 0
    BALANCE_LEAST_CONNECTIONS = 1
    BALANCE_RANDOM = 2
    BALANCE_SOURCE_HASH = 3
    BALANCE_MAGLEV = 4

cdef enum:
    PICK_NONE = -1           # nothing to pick from
    PICK_FULL = -2           # everything that is left is at its limit

cdef enum:
    TIERS = 2
    SCAN_ALL = 8             # up to this many endpoints are compared exactly; two draws would pick the worse one too often
    REDRAWS = 8
    SEQUENCE_MAX = 65536     # entries of a round-robin sequence; greater sums of weights are scaled down
    RING_POINTS = 160        # per endpoint of mean weight, as ketama and nginx have it
    RING_MAX = 1048576
    MAGLEV_PER_ENDPOINT = 100
    SLOW_START_LEAST = 100   # per mille: a cold endpoint gets at least a tenth of its weight (Envoy's default)

ctypedef struct endpoint_t:
    address_t address
    uint16_t weight
    uint8_t tier
    endpoint_stat_t *stat    # owner: the control loop

ctypedef struct cluster_settings_t:
    uint8_t balance
    uint8_t proxy_protocol
    uint8_t original_destination
    uint8_t tls              # 0: plaintext, 1: mutual
    uint8_t tls_v12
    uint8_t resumption
    uint8_t close_expired
    uint8_t encrypt_local    # workloads of this node are not spared TLS
    uint32_t tls_identity    # id of the identity to show; 0: the source workload's
    uint32_t handshake_ms
    uint16_t connect_attempts
    uint32_t connect_timeout_ms
    uint32_t connect_budget_ms
    uint64_t idle_timeout_ms
    uint64_t half_closed_timeout_ms
    uint64_t lifetime_ms
    uint32_t lifetime_jitter_permille
    int64_t max_connections
    int64_t max_connections_per_endpoint
    uint32_t keepalive_idle_s
    uint32_t keepalive_interval_s
    uint32_t keepalive_count
    uint32_t user_timeout_ms
    uint32_t bounded_load_percent
    uint64_t rates[2]        # of each connection, by half: bytes a second; 0: no limit
    uint64_t burst
    int64_t queue_size           # connections that may wait for a place; 0: they are refused
    uint32_t queue_timeout_ms
    uint32_t retry_permille      # of the live connections, that may dial again
    int64_t retry_minimum        # so many may in any case; negative: no budget
    uint32_t backoff_ms          # 0: the next attempt follows at once

ctypedef struct tier_t:
    uint32_t *members        # indexes of its endpoints with a weight
    uint32_t n_members
    uint32_t *table          # sequence, alias, ring owners or maglev slots, by algorithm
    uint32_t *keys           # alias thresholds or ring points
    uint32_t n_table
    uint64_t weight          # sum

ctypedef struct cluster_t:
    int64_t refs             # plans and connections that dial
    uint64_t id
    void *stat
    cluster_settings_t settings
    endpoint_t *endpoints    # this and all tables: in this block
    uint32_t n_endpoints
    uint64_t size            # of the block, bytes
    tier_t tiers[TIERS]
    pattern_t *peers         # identities that may answer; they and the text are blocks of their own
    uint32_t n_peers
    char *peer_text
    char *sni                # to send, terminated; NULL: none

ctypedef struct pick_t:
    uint64_t source_hash
    uint64_t *random             # xorshift state of the worker
    uint64_t *cursor             # round robin's place, of this worker in this cluster
    const uint32_t *tried        # indexes that this connection has dialled
    uint32_t n_tried
    uint64_t others              # live connections of the cluster but for this one
    bint panic                   # endpoints that are out are picked as well
    bint wary                    # those whose last dial failed are not

ctypedef struct point_t:
    uint32_t key
    uint32_t owner


cdef inline uint64_t pick_random(pick_t *pick) noexcept nogil:
    cdef uint64_t x = pick.random[0]
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    pick.random[0] = x
    return x * <uint64_t> 0x2545f4914f6cdd1d


cdef inline uint32_t below(uint64_t random, uint32_t n) noexcept nogil:
    # Uniform in [0, n): Lemire's multiply-shift.
    return <uint32_t> (((random >> 32) * n) >> 32)


# -- building --------------------------------------------------------------------------------------------------------------

cdef inline uint64_t greatest_divisor(uint64_t a, uint64_t b) noexcept nogil:
    cdef uint64_t rest
    while b:
        rest = a % b
        a = b
        b = rest
    return a


cdef inline void heap_sift(uint64_t *keys, uint32_t *items, uint32_t n, uint32_t at) noexcept nogil:
    cdef uint32_t child
    cdef uint64_t key = keys[at]
    cdef uint32_t item = items[at]
    while 2 * at + 1 < n:
        child = 2 * at + 1
        if child + 1 < n and (
            keys[child + 1] < keys[child] or (keys[child + 1] == keys[child] and items[child + 1] < items[child])
        ):
            child += 1
        if keys[child] > key or (keys[child] == key and items[child] > item):
            break
        keys[at] = keys[child]
        items[at] = items[child]
        at = child
    keys[at] = key
    items[at] = item


cdef inline uint32_t sequence_weight(const cluster_t *cluster, const tier_t *tier, uint32_t member, uint64_t divisor) noexcept nogil:
    # An endpoint's entries in the sequence: its weight in lowest terms, scaled down where the sum would be too long.
    cdef uint64_t weight = cluster.endpoints[tier.members[member]].weight
    cdef uint64_t total = tier.weight // divisor
    cdef uint64_t most = SEQUENCE_MAX if tier.n_members * 4 < SEQUENCE_MAX else tier.n_members * 4
    weight //= divisor
    if total > most:
        weight = weight * most // total
    return <uint32_t> weight if weight else 1


cdef inline uint64_t tier_divisor(const cluster_t *cluster, const tier_t *tier) noexcept nogil:
    cdef uint64_t divisor = 0
    cdef uint32_t i
    for i in range(tier.n_members):
        divisor = greatest_divisor(cluster.endpoints[tier.members[i]].weight, divisor)
    return divisor if divisor else 1


cdef inline bint sequence_fill(const cluster_t *cluster, tier_t *tier) noexcept nogil:
    # Earliest deadline first: each endpoint is due every 1/weight, ties by order; the same order as nginx's smooth round robin
    # gives up to rotation, at O(log n) an entry.
    cdef uint64_t divisor = tier_divisor(cluster, tier)
    cdef uint64_t *due = <uint64_t *> malloc(tier.n_members * sizeof(uint64_t))
    cdef uint32_t *order = <uint32_t *> malloc(tier.n_members * sizeof(uint32_t))
    cdef uint32_t i, n = tier.n_members
    cdef bint done = due != NULL and order != NULL
    if done:
        for i in range(n):
            due[i] = (<uint64_t> 1 << 40) // (2 * sequence_weight(cluster, tier, i, divisor))
            order[i] = i
        for i in range(n // 2, 0, -1):
            heap_sift(due, order, n, i - 1)
        for i in range(tier.n_table):
            tier.table[i] = tier.members[order[0]]
            due[0] += (<uint64_t> 1 << 40) // sequence_weight(cluster, tier, order[0], divisor)
            heap_sift(due, order, n, 0)
    free(due)
    free(order)
    return done


cdef inline bint alias_fill(const cluster_t *cluster, tier_t *tier) noexcept nogil:
    # Column i is kept with probability keys[i] / 2^32 and else goes to table[i].
    cdef uint32_t n = tier.n_members
    cdef uint64_t *share = <uint64_t *> malloc(n * sizeof(uint64_t))
    cdef uint32_t *stack = <uint32_t *> malloc(n * sizeof(uint32_t))
    cdef uint32_t i, small = 0, large = n, low, high
    cdef bint done = share != NULL and stack != NULL
    if done:
        # One stack from each end: columns below the mean, and those above.
        for i in range(n):
            share[i] = <uint64_t> cluster.endpoints[tier.members[i]].weight * n
            if share[i] < tier.weight:
                stack[small] = i
                small += 1
            else:
                large -= 1
                stack[large] = i
        while small and large < n:
            small -= 1
            low = stack[small]
            high = stack[large]
            tier.keys[low] = <uint32_t> ((share[low] << 32) // tier.weight)
            tier.table[low] = high
            share[high] -= tier.weight - share[low]
            if share[high] < tier.weight:
                large += 1
                stack[small] = high
                small += 1
        while large < n:
            tier.keys[stack[large]] = <uint32_t> -1
            tier.table[stack[large]] = stack[large]
            large += 1
        while small:
            small -= 1
            tier.keys[stack[small]] = <uint32_t> -1
            tier.table[stack[small]] = stack[small]
    free(share)
    free(stack)
    return done


cdef inline int point_compare(const void *a, const void *b) noexcept nogil:
    cdef const point_t *x = <const point_t *> a
    cdef const point_t *y = <const point_t *> b
    if x.key != y.key:
        return -1 if x.key < y.key else 1
    return (x.owner > y.owner) - (x.owner < y.owner)


cdef inline uint32_t ring_points(const cluster_t *cluster, const tier_t *tier, uint32_t member) noexcept nogil:
    # Points of an endpoint, in proportion to its weight.
    cdef uint64_t per_endpoint = RING_POINTS
    cdef uint64_t points
    if per_endpoint * tier.n_members > RING_MAX:
        per_endpoint = RING_MAX // tier.n_members + 1
    points = per_endpoint * tier.n_members * cluster.endpoints[tier.members[member]].weight // tier.weight
    return <uint32_t> points if points else 1


cdef inline bint ring_fill(const cluster_t *cluster, tier_t *tier) noexcept nogil:
    cdef point_t *points = <point_t *> malloc(tier.n_table * sizeof(point_t))
    cdef uint32_t i, j, n = 0
    cdef uint64_t hash_
    if points == NULL:
        return False
    for i in range(tier.n_members):
        hash_ = address_hash(&cluster.endpoints[tier.members[i]].address, 0)
        for j in range(ring_points(cluster, tier, i)):
            points[n].key = <uint32_t> mix64(hash_ + j * <uint64_t> 0x9e3779b97f4a7c15)
            points[n].owner = tier.members[i]
            n += 1
    qsort(points, n, sizeof(point_t), point_compare)
    for i in range(n):
        tier.keys[i] = points[i].key
        tier.table[i] = points[i].owner
    free(points)
    return True


cdef inline uint32_t maglev_size(uint32_t n) noexcept nogil:
    # A prime of at least 100 slots an endpoint, so that shares are within a percent; few sizes, so that an endpoint more or less
    # rarely changes it.
    cdef uint32_t primes[7]
    primes[0] = 1021
    primes[1] = 4093
    primes[2] = 16381
    primes[3] = 65537
    primes[4] = 262139
    primes[5] = 1048573
    primes[6] = 5000011
    cdef int i
    for i in range(6):
        if primes[i] >= n * MAGLEV_PER_ENDPOINT:
            return primes[i]
    return primes[6]


ctypedef struct maglev_t:
    uint64_t hash_
    uint32_t owner
    uint32_t weight
    uint32_t at
    uint32_t skip


cdef inline int maglev_compare(const void *a, const void *b) noexcept nogil:
    cdef uint64_t x = (<const maglev_t *> a).hash_
    cdef uint64_t y = (<const maglev_t *> b).hash_
    return (x > y) - (x < y)


cdef inline bint maglev_fill(const cluster_t *cluster, tier_t *tier) noexcept nogil:
    # Endpoints take turns at their next free slot, in an order that does not depend on the file; one of a lower weight sits
    # out turns until it is due (Envoy's target_weight).
    cdef maglev_t *rows = <maglev_t *> malloc(tier.n_members * sizeof(maglev_t))
    cdef uint64_t *target = <uint64_t *> calloc(tier.n_members, sizeof(uint64_t))
    cdef uint32_t i, filled = 0, most = 1, size = tier.n_table
    cdef uint64_t turn = 0
    cdef maglev_t *row
    if rows == NULL or target == NULL:
        free(rows)
        free(target)
        return False
    for i in range(tier.n_members):
        row = &rows[i]
        row.owner = tier.members[i]
        row.hash_ = address_hash(&cluster.endpoints[row.owner].address, 0)
        row.weight = cluster.endpoints[row.owner].weight
        row.at = <uint32_t> (row.hash_ % size)
        row.skip = <uint32_t> (mix64(row.hash_ + 1) % (size - 1)) + 1
        if row.weight > most:
            most = row.weight
    qsort(rows, tier.n_members, sizeof(maglev_t), maglev_compare)
    memset(tier.table, 0xff, size * sizeof(uint32_t))
    while filled < size:
        turn += 1
        for i in range(tier.n_members):
            row = &rows[i]
            if turn * row.weight < target[i]:
                continue
            target[i] += most
            while tier.table[row.at] != <uint32_t> -1:
                row.at = <uint32_t> ((<uint64_t> row.at + row.skip) % size)
            tier.table[row.at] = row.owner
            filled += 1
            if filled == size:
                break
    free(rows)
    free(target)
    return True


cdef inline uint32_t tier_table_size(const cluster_t *cluster, const tier_t *tier) noexcept nogil:
    cdef uint32_t i, n = 0
    cdef uint64_t divisor
    cdef int balance = cluster.settings.balance
    if tier.n_members == 0:
        return 0
    if balance == BALANCE_MAGLEV:
        return maglev_size(tier.n_members)
    if balance == BALANCE_ROUND_ROBIN:
        divisor = tier_divisor(cluster, tier)
        for i in range(tier.n_members):
            n += sequence_weight(cluster, tier, i, divisor)
        return n
    if balance == BALANCE_SOURCE_HASH:
        for i in range(tier.n_members):
            n += ring_points(cluster, tier, i)
        return n
    return tier.n_members


cdef inline bint tier_fill(const cluster_t *cluster, tier_t *tier) noexcept nogil:
    cdef int balance = cluster.settings.balance
    if tier.n_members == 0:
        return True
    if balance == BALANCE_MAGLEV:
        return maglev_fill(cluster, tier)
    if balance == BALANCE_ROUND_ROBIN:
        return sequence_fill(cluster, tier)
    if balance == BALANCE_SOURCE_HASH:
        return ring_fill(cluster, tier)
    return alias_fill(cluster, tier)


cdef inline bint tier_has_keys(const cluster_t *cluster) noexcept nogil:
    return cluster.settings.balance != BALANCE_MAGLEV and cluster.settings.balance != BALANCE_ROUND_ROBIN


cdef inline cluster_t *cluster_build(
    const cluster_settings_t *settings, uint64_t id, void *stat, const endpoint_t *endpoints, uint32_t n
) noexcept nogil:
    # A cluster with one reference, or NULL: no memory.
    cdef cluster_t shape
    cdef cluster_t *cluster
    cdef tier_t *tier
    cdef uint32_t *room
    cdef uint32_t *members = <uint32_t *> malloc((n + 1) * sizeof(uint32_t))
    cdef size_t size = sizeof(cluster_t) + n * sizeof(endpoint_t)
    cdef uint32_t i, at = 0
    cdef int t
    if members == NULL:
        return NULL
    memset(&shape, 0, sizeof(shape))
    shape.refs = 1
    shape.id = id
    shape.stat = stat
    shape.settings = settings[0]
    shape.n_endpoints = n
    shape.endpoints = <endpoint_t *> endpoints
    for t in range(TIERS):
        tier = &shape.tiers[t]
        tier.members = &members[at]
        for i in range(n):
            if endpoints[i].tier == t and endpoints[i].weight:
                members[at] = i
                at += 1
                tier.n_members += 1
                tier.weight += endpoints[i].weight
        tier.n_table = tier_table_size(&shape, tier)
        size += (tier.n_members + tier.n_table * (2 if tier_has_keys(&shape) else 1)) * sizeof(uint32_t)
    shape.size = size
    cluster = <cluster_t *> calloc(1, size)
    if cluster == NULL:
        free(members)
        return NULL
    cluster[0] = shape
    cluster.endpoints = <endpoint_t *> (cluster + 1)
    memcpy(cluster.endpoints, endpoints, n * sizeof(endpoint_t))
    room = <uint32_t *> (cluster.endpoints + n)
    for t in range(TIERS):
        tier = &cluster.tiers[t]
        memcpy(room, tier.members, tier.n_members * sizeof(uint32_t))
        tier.members = room
        tier.table = room + tier.n_members
        room = tier.table + tier.n_table
        if tier_has_keys(cluster):
            tier.keys = room
            room += tier.n_table
        if not tier_fill(cluster, tier):
            free(cluster)
            cluster = NULL
            break
    free(members)
    return cluster


cdef inline void cluster_hold(cluster_t *cluster) noexcept nogil:
    add(&cluster.refs, 1)


cdef inline void cluster_drop(cluster_t *cluster) noexcept nogil:
    if drop_ref(&cluster.refs) == 0:
        free(cluster.peers)
        free(cluster.peer_text)
        free(cluster.sni)
        free(cluster)


# -- picking ---------------------------------------------------------------------------------------------------------------

cdef inline bint endpoint_is_full(const cluster_t *cluster, uint32_t index) noexcept nogil:
    cdef int64_t most = cluster.settings.max_connections_per_endpoint
    return most and load(&cluster.endpoints[index].stat.active) >= most


cdef inline bint endpoint_was_tried(const pick_t *pick, uint32_t index) noexcept nogil:
    cdef uint32_t i
    for i in range(pick.n_tried):
        if pick.tried[i] == index:
            return True
    return False


cdef inline bint endpoint_is_out(const cluster_t *cluster, const pick_t *pick, uint32_t index) noexcept nogil:
    return load(&cluster.endpoints[index].stat.out) and not pick.panic


cdef inline bint endpoint_is_usable(const cluster_t *cluster, const pick_t *pick, uint32_t index) noexcept nogil:
    return (
        not endpoint_is_out(cluster, pick, index) and not endpoint_is_full(cluster, index)
        and not (pick.n_tried and endpoint_was_tried(pick, index)) and not (pick.wary and cluster.endpoints[index].stat.failing)
    )


cdef inline uint32_t endpoint_warmth(const cluster_t *cluster, uint32_t index, uint64_t now_ms) noexcept nogil:
    # Per mille of its weight that an endpoint takes: grows since it joined or came back, linear as in Envoy and HAProxy.
    cdef const endpoint_stat_t *stat = cluster.endpoints[index].stat
    cdef uint64_t until_ms = load_u(&stat.warm_until_ms)
    cdef uint64_t from_ms, warmth
    if now_ms >= until_ms:
        return 1000
    from_ms = load_u(&stat.warm_from_ms)
    if now_ms <= from_ms:
        return SLOW_START_LEAST
    warmth = (now_ms - from_ms) * 1000 // (until_ms - from_ms)
    return <uint32_t> warmth if warmth > SLOW_START_LEAST else SLOW_START_LEAST


cdef inline bint endpoint_is_warm(const cluster_t *cluster, pick_t *pick, uint32_t index, uint64_t now_ms) noexcept nogil:
    # Rejection: drawing again with this chance scales the weight of the endpoint by its warmth.
    cdef uint32_t warmth = endpoint_warmth(cluster, index, now_ms)
    return warmth == 1000 or below(pick_random(pick), 1000) < warmth


cdef inline uint64_t endpoint_load(const cluster_t *cluster, pick_t *pick, uint32_t index, uint64_t now_ms) noexcept nogil:
    # With one connection more. Idle ones are equal (HAProxy's lb_fwlc.c): else the heaviest would get every connection as long as there
    # are few. A cold one is idle with the chance of its warmth.
    cdef int64_t active = load(&cluster.endpoints[index].stat.active)
    if active > 0:
        return <uint64_t> active + 1
    return 0 if endpoint_is_warm(cluster, pick, index, now_ms) else 1


cdef inline bint load_is_less(
    const cluster_t *cluster, uint32_t a, uint64_t of_a, uint32_t b, uint64_t of_b, uint64_t now_ms
) noexcept nogil:
    # Whether a would be less loaded for its weight than b.
    return (
        of_a * cluster.endpoints[b].weight * endpoint_warmth(cluster, b, now_ms)
        < of_b * cluster.endpoints[a].weight * endpoint_warmth(cluster, a, now_ms)
    )


cdef inline uint32_t alias_draw(const tier_t *tier, pick_t *pick) noexcept nogil:
    cdef uint64_t random = pick_random(pick)
    cdef uint32_t column = below(random, tier.n_members)
    if <uint32_t> random > tier.keys[column]:
        column = tier.table[column]
    return tier.members[column]


cdef inline int32_t scan_least(const cluster_t *cluster, const tier_t *tier, pick_t *pick, uint64_t now_ms) noexcept nogil:
    # The least loaded usable endpoint. Ties go to one drawn by weight where there is an alias table, else to the first from a
    # random start.
    cdef uint32_t i, index
    cdef uint32_t start = below(pick_random(pick), tier.n_members)
    cdef uint64_t of_best = 0, of_this
    cdef int32_t best = PICK_NONE
    cdef int _i
    for _i in range(REDRAWS if cluster.settings.balance == BALANCE_LEAST_CONNECTIONS else 0):
        index = alias_draw(tier, pick)
        if endpoint_is_usable(cluster, pick, index):
            best = <int32_t> index
            of_best = endpoint_load(cluster, pick, index, now_ms)
            break
    for i in range(tier.n_members):
        index = tier.members[start + i if start + i < tier.n_members else start + i - tier.n_members]
        if endpoint_is_usable(cluster, pick, index):
            of_this = endpoint_load(cluster, pick, index, now_ms)
            if best < 0 or load_is_less(cluster, index, of_this, <uint32_t> best, of_best, now_ms):
                best = <int32_t> index
                of_best = of_this
    return best


cdef inline int32_t draw_least(const cluster_t *cluster, const tier_t *tier, pick_t *pick, uint64_t now_ms) noexcept nogil:
    # Two draws by weight, the less loaded for its weight wins. By weight, because with equal chances a heavy endpoint could
    # never get more than two draws in n; comparing by weight as well only decides which of the two is behind its share.
    cdef uint32_t first = alias_draw(tier, pick)
    cdef uint32_t second = alias_draw(tier, pick)
    cdef uint64_t of_first, of_second
    cdef int _i
    for _i in range(REDRAWS):
        if second != first:
            break
        second = alias_draw(tier, pick)
    if not endpoint_is_usable(cluster, pick, first):
        first = second
    if not endpoint_is_usable(cluster, pick, second):
        second = first
    if not endpoint_is_usable(cluster, pick, first):
        return PICK_NONE
    of_first = endpoint_load(cluster, pick, first, now_ms)
    of_second = endpoint_load(cluster, pick, second, now_ms)
    return <int32_t> (second if load_is_less(cluster, second, of_second, first, of_first, now_ms) else first)


cdef inline bint load_is_bounded(const cluster_t *cluster, const tier_t *tier, const pick_t *pick, uint32_t index) noexcept nogil:
    # active + 1 <= ceil(c * (others + 1) * weight / sum of weights)
    cdef uint64_t active = <uint64_t> load(&cluster.endpoints[index].stat.active)
    cdef uint64_t share = cluster.settings.bounded_load_percent * (pick.others + 1) * cluster.endpoints[index].weight
    return active * 100 * tier.weight < share


cdef inline int32_t walk_table(const cluster_t *cluster, const tier_t *tier, const pick_t *pick, uint32_t at) noexcept nogil:
    # From a place of the ring or the maglev table on, the first endpoint that is usable and within the bound. The next distinct
    # one is usually one or two steps away; a full turn means that there is none.
    cdef uint32_t _i, index
    cdef uint32_t steps = tier.n_table if tier.n_table < 4096 else 4096
    cdef uint32_t last = <uint32_t> -1
    for _i in range(steps):
        index = tier.table[at]
        at = at + 1 if at + 1 < tier.n_table else 0
        if index == last:
            continue
        last = index
        if not endpoint_is_usable(cluster, pick, index):
            continue
        if cluster.settings.bounded_load_percent == 0 or load_is_bounded(cluster, tier, pick, index):
            return <int32_t> index
    return PICK_NONE


cdef inline uint32_t ring_find(const tier_t *tier, uint32_t key) noexcept nogil:
    # The first point at or after the key.
    cdef uint32_t low = 0, high = tier.n_table, middle
    while low < high:
        middle = (low + high) >> 1
        if tier.keys[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low if low < tier.n_table else 0


cdef inline int32_t draw_one(const cluster_t *cluster, const tier_t *tier, pick_t *pick) noexcept nogil:
    if cluster.settings.balance == BALANCE_ROUND_ROBIN:
        pick.cursor[0] += 1
        return <int32_t> tier.table[pick.cursor[0] % tier.n_table]
    return <int32_t> alias_draw(tier, pick)


cdef inline int32_t tier_pick(const cluster_t *cluster, const tier_t *tier, pick_t *pick, uint64_t now_ms) noexcept nogil:
    # An endpoint of the tier that is neither tried nor full, or PICK_NONE.
    cdef int balance = cluster.settings.balance
    cdef int32_t index = PICK_NONE
    cdef int _i
    if tier.n_members == 0:
        return PICK_NONE
    if balance == BALANCE_SOURCE_HASH or balance == BALANCE_MAGLEV:
        # Slow start does not apply: where a source belongs must not depend on time.
        if balance == BALANCE_SOURCE_HASH:
            index = walk_table(cluster, tier, pick, ring_find(tier, <uint32_t> mix64(pick.source_hash)))
        else:
            index = walk_table(cluster, tier, pick, <uint32_t> (mix64(pick.source_hash) % tier.n_table))
    elif balance == BALANCE_LEAST_CONNECTIONS and tier.n_members > SCAN_ALL:
        for _i in range(REDRAWS):
            index = draw_least(cluster, tier, pick, now_ms)
            if index >= 0:
                break
    elif balance != BALANCE_LEAST_CONNECTIONS:
        for _i in range(REDRAWS):
            index = draw_one(cluster, tier, pick)
            if endpoint_is_usable(cluster, pick, <uint32_t> index) and endpoint_is_warm(cluster, pick, <uint32_t> index, now_ms):
                break
            index = PICK_NONE
    return index if index >= 0 else scan_least(cluster, tier, pick, now_ms)


cdef inline bint cluster_is_full(const cluster_t *cluster, const pick_t *pick) noexcept nogil:
    # Nothing could be picked: is there an endpoint that would serve if it were not at its limit?
    cdef uint32_t i
    for i in range(cluster.n_endpoints):
        if cluster.endpoints[i].weight and not endpoint_is_out(cluster, pick, i):
            return True
    return False


cdef inline bint cluster_has_untried(const cluster_t *cluster, const pick_t *pick) noexcept nogil:
    # Is there an endpoint that serves, full or not, and was not tried?
    cdef uint32_t i
    for i in range(cluster.n_endpoints):
        if cluster.endpoints[i].weight and not endpoint_is_out(cluster, pick, i) and not endpoint_was_tried(pick, i):
            return True
    return False


cdef inline int32_t cluster_pick(const cluster_t *cluster, pick_t *pick, uint64_t now_ms) noexcept nogil:
    # Index of an endpoint; PICK_FULL or PICK_NONE. One that was tried only when every usable one was, and the last one last. Who has been
    # failed once goes where the last dial succeeded, as long as there is such an endpoint: among several dead ones that nobody has
    # found out yet, and that least_connections prefers for having no connection, the attempts would soon be used up.
    cdef int32_t index
    cdef uint32_t n_tried = pick.n_tried
    cdef const uint32_t *tried = pick.tried
    cdef int t
    if cluster.tiers[0].n_members + cluster.tiers[1].n_members == 0:
        return PICK_NONE
    pick.wary = n_tried > 0
    while True:
        for t in range(TIERS):
            index = tier_pick(cluster, &cluster.tiers[t], pick, now_ms)
            if index >= 0:
                break
        if index >= 0 or pick.n_tried == 0:
            break
        if pick.wary:
            pick.wary = False
        elif pick.n_tried > 1:
            pick.tried += pick.n_tried - 1
            pick.n_tried = 1
        else:
            pick.n_tried = 0
    pick.tried = tried
    pick.n_tried = n_tried
    if index >= 0:
        return index
    return PICK_FULL if cluster_is_full(cluster, pick) else PICK_NONE
