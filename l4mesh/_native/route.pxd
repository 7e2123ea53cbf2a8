# Implementation, inlined into _fastpath: from (destination, source, port) to a cluster of the plan.
#
# The first route that matches wins. Routes that name whole addresses and single ports, as a service has them, are found in one
# hash table of (address, port); only the others are looked at one by one, and only those before the one the table gave.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp

from l4mesh._native.address cimport address_hash_ip, address_t, mix64
from l4mesh._native.hello cimport hello_t
from l4mesh._native.spiffe cimport PATTERN_SUFFIX, pattern_t
from l4mesh._native.types cimport exact_route_t, listener_t, plan_t, prefix_t, route_t, span_t


cdef inline bint prefix_holds(const prefix_t *prefix, const uint8_t *ip) noexcept nogil:
    # An IPv4 address is in IPv4 networks only: ::/0 and its like are about IPv6, as they are in ip6tables.
    cdef int whole = prefix.bits >> 3
    cdef int rest = prefix.bits & 7
    if prefix.bits < 96 and memcmp(ip, b"\0\0\0\0\0\0\0\0\0\0\xff\xff", 12) == 0:
        return False
    if memcmp(prefix.ip, ip, whole) != 0:
        return False
    return rest == 0 or ((prefix.ip[whole] ^ ip[whole]) >> (8 - rest)) == 0


cdef inline bint prefixes_hold(const plan_t *plan, uint32_t start, uint32_t end, const uint8_t *ip) noexcept nogil:
    cdef uint32_t i
    for i in range(start, end):
        if prefix_holds(&plan.prefixes[i], ip):
            return True
    return False


cdef inline bint ports_hold(const plan_t *plan, span_t span, uint16_t port) noexcept nogil:
    cdef uint32_t i
    for i in range(span.start, span.end):
        if plan.ports[i].first <= port <= plan.ports[i].last:
            return True
    return False


cdef inline bint name_matches(const pattern_t *pattern, const char *pool, const uint8_t *name, uint32_t length) noexcept nogil:
    # A host name, in whatever case; the pattern is in lower case. "*.example.org" takes every name below example.org.
    cdef uint32_t i
    cdef uint8_t c
    if pattern.kind == PATTERN_SUFFIX:
        if length <= pattern.length:
            return False
        name += length - pattern.length
    elif length != pattern.length:
        return False
    for i in range(pattern.length):
        c = name[i]
        if 65 <= c <= 90:
            c += 32
        if c != <uint8_t> pool[pattern.offset + i]:
            return False
    return True


cdef inline bint route_names(const plan_t *plan, const route_t *route, const hello_t *hello) noexcept nogil:
    cdef uint32_t i
    if hello == NULL:
        return False
    for i in range(route.names.start, route.names.end):
        if name_matches(&plan.patterns[i], plan.text, hello.sni, hello.sni_length):
            return True
    return False


cdef inline bint route_speaks(const plan_t *plan, const route_t *route, const hello_t *hello) noexcept nogil:
    cdef uint32_t i, at = 0
    cdef const pattern_t *pattern
    if hello == NULL:
        return False
    while at < hello.alpn_length:
        for i in range(route.protocols.start, route.protocols.end):
            pattern = &plan.patterns[i]
            if pattern.length == hello.alpn[at] and memcmp(hello.alpn + at + 1, plan.text + pattern.offset, pattern.length) == 0:
                return True
        at += 1 + hello.alpn[at]
    return False


cdef inline bint route_matches(
    const plan_t *plan, const route_t *route, const address_t *destination, const address_t *source, const hello_t *hello
) noexcept nogil:
    if route.ports.start != route.ports.end and not ports_hold(plan, route.ports, destination.port):
        return False
    if route.destinations != route.destinations_end and not prefixes_hold(
        plan, route.destinations, route.destinations_end, destination.ip
    ):
        return False
    if route.names.start != route.names.end and not route_names(plan, route, hello):
        return False
    if route.protocols.start != route.protocols.end and not route_speaks(plan, route, hello):
        return False
    return route.sources == route.sources_end or prefixes_hold(plan, route.sources, route.sources_end, source.ip)


cdef inline uint32_t exact_find(
    const plan_t *plan, const listener_t *listener, const address_t *destination, uint32_t port
) noexcept nogil:
    # Index + 1 of the first route with exactly this address and port (0: any port), or 0.
    cdef uint32_t at = <uint32_t> mix64(address_hash_ip(destination, 0) + port) & listener.exact_mask
    cdef const exact_route_t *entry
    while True:
        entry = &plan.exact[listener.exact + at]
        if entry.route == 0:
            return 0
        if entry.port == port and memcmp(entry.ip, destination.ip, 16) == 0:
            return entry.route
        at = (at + 1) & listener.exact_mask


cdef inline uint32_t route_match(
    const plan_t *plan, const listener_t *listener, const address_t *destination, const address_t *source, const hello_t *hello
) noexcept nogil:
    # Index + 1 of the route in the plan, or 0: none. `hello` is NULL where there was none.
    cdef uint32_t best = 0
    cdef uint32_t other, i
    if listener.exact_mask:
        best = exact_find(plan, listener, destination, destination.port)
        other = exact_find(plan, listener, destination, 0)
        if best == 0 or (other and other < best):
            best = other
    for i in range(listener.wide, listener.wide_end):
        if best and plan.wide[i] + 1 > best:
            break
        if route_matches(plan, &plan.routes[plan.wide[i]], destination, source, hello):
            return plan.wide[i] + 1
    return best


cdef inline int32_t route_find(
    const plan_t *plan, const listener_t *listener, const address_t *destination, const address_t *source,
    const hello_t *hello, uint64_t random,
) noexcept nogil:
    # Index of the cluster in the plan, or -1: reject. `random` decides a weighted split.
    cdef uint32_t best = route_match(plan, listener, destination, source, hello)
    cdef uint32_t i, ticket, total
    cdef const route_t *route
    if best == 0:
        return listener.default_cluster
    route = &plan.routes[best - 1]
    if route.targets_end - route.targets == 1:
        return <int32_t> plan.targets[route.targets].cluster
    total = plan.targets[route.targets_end - 1].weight_up_to
    ticket = <uint32_t> ((random >> 32) * total >> 32)
    for i in range(route.targets, route.targets_end):
        if ticket < plan.targets[i].weight_up_to:
            return <int32_t> plan.targets[i].cluster
    return <int32_t> plan.targets[route.targets].cluster
