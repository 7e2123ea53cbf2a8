# Part of _fastpath: what a generation compiles to. Python gives rows of plain numbers; workers read flat tables.


cdef void *grown(void *items, size_t count, size_t size) except NULL:
    # Room for one more item in an array that is grown at powers of two.
    cdef void *room
    if count and count & (count - 1):
        return items
    room = realloc(items, (2 * count if count else 1) * size)
    if room == NULL:
        raise MemoryError
    return room


cdef uint32_t table_size(size_t count) noexcept:
    # Places of a hash table with linear probing: a power of two, at most half of them taken.
    cdef uint32_t size = 2
    while size < 2 * count:
        size *= 2
    return size


cdef int fill_ip(uint8_t *ip, bytes packed) except -1:
    if len(packed) != 16:
        raise ValueError(f"an address is 16 bytes, IPv4 as ::ffff:a.b.c.d; got {len(packed)}")
    memcpy(ip, <const uint8_t *> packed, 16)
    return 0


cdef int fill_rates(rates_t *rates, tuple rows) except -1:
    # Rows of (interval ns or 0, burst): total, by source, by workload, by identity.
    cdef rate_t *places[4]
    cdef int i
    places[0] = &rates.total
    places[1] = &rates.source
    places[2] = &rates.workload
    places[3] = &rates.identity
    for i in range(4):
        interval_ns, burst = rows[i]
        places[i].interval_ns = interval_ns
        places[i].tolerance_ns = interval_ns * (burst - 1) if interval_ns else 0
    return 0


cdef bint rates_by_key(const rates_t *rates) noexcept:
    return rates.source.interval_ns or rates.workload.interval_ns or rates.identity.interval_ns


cdef bint rates_before_tls(const rates_t *rates) noexcept:
    return rates.total.interval_ns or rates.source.interval_ns or rates.workload.interval_ns


cdef class Cluster:
    """One compiled cluster, shared by all plans that it did not change between."""

    cdef cluster_t *cluster
    cdef readonly ClusterStat stat
    cdef readonly tuple endpoint_stats

    def __cinit__(
        self, ClusterStat stat not None, list endpoints not None, list peers not None, bytes sni not None, *, **settings
    ):
        """``endpoints``: (ip, port, weight, tier, EndpointStat). ``peers``: (kind, text) of the identities that
        may answer. ``sni``: empty for none. ``settings``: as ``ClusterSettings``."""
        cdef cluster_settings_t compiled
        cdef endpoint_t *table
        cdef uint32_t i, n = len(endpoints)
        cdef EndpointStat endpoint_stat
        memset(&compiled, 0, sizeof(compiled))
        compiled.balance = settings["balance"]
        compiled.proxy_protocol = settings["proxy_protocol"]
        compiled.original_destination = settings["original_destination"]
        compiled.tls = settings["tls"]
        compiled.tls_v12 = settings["tls_v12"]
        compiled.resumption = settings["resumption"]
        compiled.tls_identity = settings["tls_identity"]
        compiled.handshake_ms = settings["handshake_ms"]
        compiled.close_expired = settings["close_expired"]
        compiled.encrypt_local = settings["encrypt_local"]
        compiled.connect_attempts = min(settings["connect_attempts"], <int> MAX_ATTEMPTS)
        compiled.connect_timeout_ms = settings["connect_timeout_ms"]
        compiled.connect_budget_ms = settings["connect_budget_ms"]
        compiled.idle_timeout_ms = settings["idle_timeout_ms"]
        compiled.half_closed_timeout_ms = settings["half_closed_timeout_ms"]
        compiled.lifetime_ms = settings["lifetime_ms"]
        compiled.lifetime_jitter_permille = settings["lifetime_jitter_permille"]
        compiled.max_connections = settings["max_connections"]
        compiled.max_connections_per_endpoint = settings["max_connections_per_endpoint"]
        compiled.keepalive_idle_s = settings["keepalive_idle_s"]
        compiled.keepalive_interval_s = settings["keepalive_interval_s"]
        compiled.keepalive_count = settings["keepalive_count"]
        compiled.user_timeout_ms = settings["user_timeout_ms"]
        compiled.bounded_load_percent = settings["bounded_load_percent"]
        compiled.rates = settings["rates"]
        compiled.burst = settings["burst"]
        compiled.queue_size = settings["queue_size"]
        compiled.queue_timeout_ms = settings["queue_timeout_ms"]
        compiled.retry_permille = settings["retry_permille"]
        compiled.retry_minimum = settings["retry_minimum"]
        compiled.backoff_ms = settings["backoff_ms"]
        table = <endpoint_t *> calloc(n if n else 1, sizeof(endpoint_t))
        if table == NULL:
            raise MemoryError
        try:
            for i in range(n):
                ip, port, weight, tier, endpoint_stat = endpoints[i]
                fill_ip(table[i].address.ip, ip)
                table[i].address.port = port
                table[i].weight = weight
                table[i].tier = tier
                table[i].stat = endpoint_stat.stat
            self.cluster = cluster_build(&compiled, stat.id, stat.stat, table, n)
        finally:
            free(table)
        if self.cluster == NULL:
            raise MemoryError
        self.add_peers(peers)
        if sni:
            self.cluster.sni = strdup(sni)
            if self.cluster.sni == NULL:
                raise MemoryError
        self.stat = stat
        self.endpoint_stats = tuple([endpoint[4] for endpoint in endpoints])

    def __dealloc__(self):
        if self.cluster != NULL:
            cluster_drop(self.cluster)

    cdef int add_peers(self, list peers) except -1:
        cdef bytes pool = b"".join([text for _, text in peers])
        cdef uint32_t at = 0
        self.cluster.peers = <pattern_t *> calloc(len(peers) + 1, sizeof(pattern_t))
        self.cluster.peer_text = <char *> malloc(len(pool) + 1)
        if self.cluster.peers == NULL or self.cluster.peer_text == NULL:
            raise MemoryError
        memcpy(self.cluster.peer_text, <const char *> pool, len(pool))
        for kind, text in peers:
            self.cluster.peers[self.cluster.n_peers].kind = kind
            self.cluster.peers[self.cluster.n_peers].offset = at
            self.cluster.peers[self.cluster.n_peers].length = <uint32_t> len(text)
            self.cluster.n_peers += 1
            at += <uint32_t> len(text)
        return 0

    @property
    def dials(self) -> int:
        """Connections that dial among these endpoints: until it is 0, keep the object when no plan names it any more."""
        return load(&self.cluster.refs) - 1


cdef class Plan:
    """One generation: immutable once it is published. Holds on to its clusters and counters."""

    cdef plan_t *plan
    cdef uint32_t n_workers
    cdef size_t n_routes, n_prefixes, n_ports, n_targets, n_exact, n_wide
    cdef size_t n_patterns, n_text, n_clauses, n_filings, n_filed, n_wide_clauses, n_lengths, n_policy_sets
    cdef size_t n_faults
    cdef readonly tuple clusters
    cdef list stats, contexts, buckets

    def __cinit__(
        self, uint64_t generation, uint32_t n_workers, list clusters not None, list own not None, *,
        int64_t max_connections, int64_t max_connections_per_source, uint32_t mark, bint splice, int log_when,
        double log_sample, uint64_t error_reasons, int64_t max_handshakes_per_source, uint64_t trust,
        tuple arrival_rates not None=((0, 1),) * 4,
    ):
        """``own``: (ip, port) of everything that the process listens on. ``log_sample``: share, 0 to 1. ``trust``: when it differs
        from the plan before, live connections are checked again. ``arrival_rates``: of the process, as for ``add_listener``."""
        cdef plan_t *plan = <plan_t *> calloc(1, sizeof(plan_t))
        cdef Cluster cluster
        cdef uint32_t i
        if plan == NULL:
            raise MemoryError
        self.plan = plan
        self.n_workers = n_workers
        self.stats = []
        self.clusters = tuple(clusters)
        plan.generation = generation
        plan.max_connections = max_connections
        plan.max_connections_per_source = max_connections_per_source
        plan.mark = mark
        plan.splice = splice
        plan.log_when = log_when
        plan.log_sample = <uint64_t> -1 if log_sample >= 1.0 else <uint64_t> (log_sample * 18446744073709549568.0)
        plan.error_reasons = error_reasons
        plan.max_handshakes_per_source = max_handshakes_per_source
        plan.trust = trust
        fill_rates(&plan.arrival_rates, arrival_rates)
        plan.rates_identities = plan.arrival_rates.identity.interval_ns != 0
        self.contexts = []
        self.buckets = []
        plan.clusters = <cluster_t **> calloc(len(clusters) + 1, sizeof(void *))
        plan.own = <address_t *> calloc(len(own) + 1, sizeof(address_t))
        plan.listeners = <listener_t *> calloc(MAX_LISTENERS, sizeof(listener_t))
        if plan.clusters == NULL or plan.own == NULL or plan.listeners == NULL:
            raise MemoryError
        for cluster in clusters:
            plan.clusters[plan.n_clusters] = cluster.cluster
            plan.n_clusters += 1
            self.note_bandwidth(cluster.cluster.settings.rates)
        for ip, port in own:
            i = plan.n_own
            fill_ip(plan.own[i].ip, ip)
            plan.own[i].port = port
            plan.own_ports[plan.own[i].port >> 3] |= 1 << (plan.own[i].port & 7)
            plan.n_own += 1

    def __dealloc__(self):
        cdef uint32_t i
        if self.plan == NULL:
            return
        if self.plan.listeners != NULL:
            for i in range(self.plan.n_listeners):
                free(self.plan.listeners[i].fds)
        free(self.plan.listeners)
        free(self.plan.clusters)
        free(self.plan.own)
        free(self.plan.routes)
        free(self.plan.prefixes)
        free(self.plan.ports)
        free(self.plan.targets)
        free(self.plan.exact)
        free(self.plan.wide)
        free(self.plan.contexts)
        free(self.plan.workloads)
        free(self.plan.clauses)
        free(self.plan.filings)
        free(self.plan.filed)
        free(self.plan.wide_clauses)
        free(self.plan.lengths)
        free(self.plan.policy_sets)
        free(self.plan.patterns)
        free(self.plan.text)
        free(self.plan.revoked)
        free(self.plan.faults)
        free(self.plan.cluster_faults)
        free(self.plan)

    @property
    def generation(self) -> int:
        return self.plan.generation

    cdef void note_bandwidth(self, const uint64_t *rates) noexcept:
        if rates[DOWNSTREAM] or rates[UPSTREAM]:
            self.plan.limits_bandwidth = 1

    cdef span_t add_patterns(self, object patterns) except *:
        # patterns: (kind, bytes)
        cdef plan_t *plan = self.plan
        cdef span_t span
        cdef bytes text
        cdef void *room
        span.start = <uint32_t> self.n_patterns
        for kind, text in patterns:
            room = realloc(plan.text, self.n_text + len(text) + 1)
            if room == NULL:
                raise MemoryError
            plan.text = <char *> room
            memcpy(plan.text + self.n_text, <const char *> text, len(text))
            plan.patterns = <pattern_t *> grown(plan.patterns, self.n_patterns, sizeof(pattern_t))
            plan.patterns[self.n_patterns].kind = kind
            plan.patterns[self.n_patterns].offset = <uint32_t> self.n_text
            plan.patterns[self.n_patterns].length = <uint32_t> len(text)
            self.n_text += len(text)
            self.n_patterns += 1
        span.end = <uint32_t> self.n_patterns
        return span

    cdef span_t add_port_ranges(self, object ports) except *:
        cdef plan_t *plan = self.plan
        cdef span_t span
        span.start = <uint32_t> self.n_ports
        for first, last in ports:
            plan.ports = <port_range_t *> grown(plan.ports, self.n_ports, sizeof(port_range_t))
            plan.ports[self.n_ports].first = first
            plan.ports[self.n_ports].last = last
            self.n_ports += 1
        span.end = <uint32_t> self.n_ports
        return span

    cdef span_t add_prefix_span(self, object prefixes) except *:
        cdef span_t span
        span.start = <uint32_t> self.n_prefixes
        self.add_prefixes(prefixes)
        span.end = <uint32_t> self.n_prefixes
        return span

    cdef int add_prefixes(self, object prefixes) except -1:
        for ip, bits in prefixes:
            self.plan.prefixes = <prefix_t *> grown(self.plan.prefixes, self.n_prefixes, sizeof(prefix_t))
            fill_ip(self.plan.prefixes[self.n_prefixes].ip, ip)
            self.plan.prefixes[self.n_prefixes].bits = bits
            self.n_prefixes += 1
        return 0

    cdef span_t add_faults(self, object faults) except *:
        # faults: (kind, half, bytes, from ms, to ms, rate, share of 2^32, sources)
        cdef fault_rule_t *rule
        cdef span_t span
        if faults and self.plan.cluster_faults == NULL:
            raise ValueError("set_cluster_faults comes first")
        span.start = <uint32_t> self.n_faults
        for kind, half, bytes_, from_ms, to_ms, rate, share, sources in faults:
            self.plan.faults = <fault_rule_t *> grown(self.plan.faults, self.n_faults, sizeof(fault_rule_t))
            rule = &self.plan.faults[self.n_faults]
            rule.fault.kind = kind
            rule.fault.half = half
            rule.fault.bytes = bytes_
            rule.fault.from_ms = from_ms
            rule.fault.to_ms = to_ms
            rule.fault.rate = rate
            rule.share = share
            rule.sources = self.add_prefix_span(sources)
            self.n_faults += 1
        span.end = <uint32_t> self.n_faults
        return span

    def set_cluster_faults(self, list faults not None) -> None:
        """``faults``: for each cluster in order, those that are in force; each (kind, half, bytes, from ms, to ms, rate, share of
        2^32, prefixes of sources)."""
        cdef uint32_t i
        if <uint32_t> len(faults) != self.plan.n_clusters or self.plan.cluster_faults != NULL:
            raise ValueError("one list a cluster is needed, once")
        self.plan.cluster_faults = <span_t *> calloc(self.plan.n_clusters + 1, sizeof(span_t))
        if self.plan.cluster_faults == NULL:
            raise MemoryError
        for i in range(self.plan.n_clusters):
            self.plan.cluster_faults[i] = self.add_faults(faults[i])

    cdef int add_route(
        self, object destinations, object ports, object sources, object names, object protocols, object targets, object faults
    ) except -1:
        cdef plan_t *plan = self.plan
        cdef route_t *route
        cdef uint32_t total = 0
        plan.routes = <route_t *> grown(plan.routes, self.n_routes, sizeof(route_t))
        route = &plan.routes[self.n_routes]
        self.n_routes += 1
        route.names = self.add_patterns(names)
        route.protocols = self.add_patterns(protocols)
        route.destinations = self.n_prefixes
        self.add_prefixes(destinations)
        route.destinations_end = self.n_prefixes
        route.sources = self.n_prefixes
        self.add_prefixes(sources)
        route.sources_end = self.n_prefixes
        route.ports = self.add_port_ranges(ports)
        route.targets = self.n_targets
        for cluster, weight in targets:
            plan.targets = <target_t *> grown(plan.targets, self.n_targets, sizeof(target_t))
            total += <uint32_t> weight
            plan.targets[self.n_targets].cluster = cluster
            plan.targets[self.n_targets].weight_up_to = total
            self.n_targets += 1
        route.targets_end = self.n_targets
        route.faults = self.add_faults(faults)
        return 0

    cdef int index_exact(self, listener_t *listener, list keys) except -1:
        # keys: (ip, port, route index), in order: the first of equal ones stays.
        cdef plan_t *plan = self.plan
        cdef uint32_t size
        cdef uint32_t at
        cdef exact_route_t *entry
        cdef address_t address
        cdef void *room
        if not keys:
            return 0
        size = table_size(len(keys))
        room = realloc(plan.exact, (self.n_exact + size) * sizeof(exact_route_t))
        if room == NULL:
            raise MemoryError
        plan.exact = <exact_route_t *> room
        memset(&plan.exact[self.n_exact], 0, size * sizeof(exact_route_t))
        listener.exact = self.n_exact
        listener.exact_mask = size - 1
        self.n_exact += size
        for ip, port, route in keys:
            fill_ip(address.ip, ip)
            at = <uint32_t> mix64(address_hash_ip(&address, 0) + <uint64_t> port) & listener.exact_mask
            while True:
                entry = &plan.exact[listener.exact + at]
                if entry.route == 0:
                    memcpy(entry.ip, address.ip, 16)
                    entry.port = port
                    entry.route = <uint32_t> route + 1
                    break
                if entry.port == port and memcmp(entry.ip, address.ip, 16) == 0:
                    break
                at = (at + 1) & listener.exact_mask
        return 0

    def add_listener(
        self, ListenerStat stat not None, list fds not None, bytes ip not None, uint16_t port, *, int flags,
        int32_t default_cluster, int64_t max_connections, list proxy_from not None, uint32_t proxy_timeout_ms,
        list routes not None, int tls_mode, bint tls_v12, bint resumption, uint32_t identity, uint32_t handshake_ms,
        bint close_expired, list strict not None, list permissive not None, list plain not None, list server_first not None,
        list rates not None, uint64_t burst, tuple arrival_rates not None,
    ) -> None:
        """Adds one bound address. ``fds``: a listening socket for each worker, which the caller owns and closes only when
        every worker has seen a later plan. ``routes``: (destinations, ports, sources, names, protocols, targets, faults) in order,
        with prefixes as (ip, bits of 128), ports as (first, last), names and protocols as (kind, text), targets as (index of the
        cluster, weight), faults as for ``set_cluster_faults``, which is called before where there are any. ``identity``: an id, or
        0 for the destination workload's. ``strict`` to ``server_first``: ports. ``rates``: of each connection to upstream and to
        downstream, bytes a second, or 0. ``arrival_rates``: (ns between two new connections or 0, burst) in all, by source, by
        workload and by identity."""
        cdef plan_t *plan = self.plan
        cdef listener_t *listener
        cdef uint32_t i
        cdef list exact = []
        if plan.n_listeners == MAX_LISTENERS:
            raise ValueError(f"more than {<int> MAX_LISTENERS} bound addresses")
        if len(fds) != self.n_workers:
            raise ValueError("one socket a worker is needed")
        listener = &plan.listeners[plan.n_listeners]
        listener.fds = <int *> calloc(self.n_workers + 1, sizeof(int))
        if listener.fds == NULL:
            raise MemoryError
        plan.n_listeners += 1
        for i in range(self.n_workers):
            listener.fds[i] = fds[i]
        self.stats.append(stat)
        listener.stat = stat.stat
        fill_ip(listener.address.ip, ip)
        listener.address.port = port
        listener.flags = flags
        if ip_is_unspecified(&listener.address):
            listener.flags |= LISTENER_WILDCARD
        listener.default_cluster = default_cluster
        listener.max_connections = max_connections
        listener.proxy_timeout_ms = proxy_timeout_ms
        listener.proxy_from = self.n_prefixes
        self.add_prefixes(proxy_from)
        listener.proxy_from_end = self.n_prefixes
        listener.tls_mode = tls_mode
        listener.tls_v12 = tls_v12
        listener.resumption = resumption
        listener.identity = identity
        listener.handshake_ms = handshake_ms
        listener.close_expired = close_expired
        listener.strict = self.add_port_ranges(strict)
        listener.permissive = self.add_port_ranges(permissive)
        listener.plain = self.add_port_ranges(plain)
        listener.server_first = self.add_port_ranges(server_first)
        listener.rates = rates
        listener.burst = burst
        self.note_bandwidth(listener.rates)
        fill_rates(&listener.arrival_rates, arrival_rates)
        listener.rated = rates_before_tls(&listener.arrival_rates) or rates_before_tls(&plan.arrival_rates)
        if listener.arrival_rates.identity.interval_ns:
            plan.rates_identities = True
        listener.wide = self.n_wide
        for destinations, ports, sources, names, protocols, targets, faults in routes:
            i = self.n_routes
            self.add_route(destinations, ports, sources, names, protocols, targets, faults)
            if names or protocols:
                listener.flags |= LISTENER_HELLO
            if (
                destinations and not sources and not names and not protocols and all(bits == 128 for _, bits in destinations)
                and all(first == last and first for first, last in ports)
            ):
                exact += [(ip_, first, i) for ip_, _ in destinations for first, _ in (ports or [(0, 0)])]
            else:
                plan.wide = <uint32_t *> grown(plan.wide, self.n_wide, sizeof(uint32_t))
                plan.wide[self.n_wide] = i
                self.n_wide += 1
        listener.wide_end = self.n_wide
        self.index_exact(listener, exact)

    def find_cluster(self, int listener, bytes destination not None, uint16_t port, bytes source not None, uint64_t random) -> int:
        """Index of the cluster that a connection would be routed to, or -1: what the workers ask, for tests and for
        explaining a configuration."""
        cdef address_t to_address, from_address
        memset(&from_address, 0, sizeof(from_address))
        fill_ip(to_address.ip, destination)
        to_address.port = port
        fill_ip(from_address.ip, source)
        if not 0 <= listener < <int> self.plan.n_listeners:
            raise IndexError(listener)
        return route_find(self.plan, &self.plan.listeners[listener], &to_address, &from_address, NULL, random)

    def set_contexts(self, list contexts not None, uint32_t node_identity) -> None:
        """``contexts``: a TlsContext or None for each id, 0 included. ``node_identity``: id for what belongs to no workload, or 0."""
        cdef plan_t *plan = self.plan
        cdef TlsContext context
        cdef uint32_t i
        plan.contexts = <tls_context_t **> calloc(len(contexts) + 1, sizeof(void *))
        if plan.contexts == NULL:
            raise MemoryError
        for i in range(len(contexts)):
            context = contexts[i]
            if context is not None:
                plan.contexts[i] = &context.context
        plan.n_contexts = <uint32_t> len(contexts)
        plan.node_identity = node_identity
        self.contexts = contexts

    def set_workloads(self, list workloads not None) -> None:
        """``workloads``: (ip, identity id or 0, index of a policy set, id, Bucket of what it receives or None, of what it sends). Of equal
        addresses the first stays."""
        cdef plan_t *plan = self.plan
        cdef address_t address
        cdef uint32_t size
        cdef uint32_t at, i
        cdef Bucket bucket
        if not workloads:
            return
        size = table_size(len(workloads))
        plan.workloads = <workload_t *> calloc(size, sizeof(workload_t))
        if plan.workloads == NULL:
            raise MemoryError
        plan.workload_mask = size - 1
        for ip, identity, policies, number, *buckets in workloads:
            fill_ip(address.ip, ip)
            at = <uint32_t> address_hash_ip(&address, 0) & plan.workload_mask
            while plan.workloads[at].taken and memcmp(plan.workloads[at].ip, address.ip, 16) != 0:
                at = (at + 1) & plan.workload_mask
            if plan.workloads[at].taken:
                continue
            memcpy(plan.workloads[at].ip, address.ip, 16)
            plan.workloads[at].identity = identity
            plan.workloads[at].policies = policies
            plan.workloads[at].id = number
            plan.workloads[at].taken = 1
            for i in range(2):
                bucket = buckets[i]
                if bucket is not None:
                    self.buckets.append(bucket)
                    plan.workloads[at].buckets[i] = bucket.bucket
                    plan.limits_bandwidth = 1

    def set_revoked(self, list revoked not None, uint64_t seed) -> None:
        """``revoked``: (issuer as DER, serial number as its bytes) of each revoked certificate. ``seed``: the engine's."""
        cdef plan_t *plan = self.plan
        cdef bytes issuer, serial
        cdef uint32_t size
        cdef uint32_t at
        cdef uint64_t key
        if not revoked:
            return
        size = table_size(len(revoked))
        plan.revoked = <uint64_t *> calloc(size, sizeof(uint64_t))
        if plan.revoked == NULL:
            raise MemoryError
        plan.revoked_mask = size - 1
        for issuer, serial in revoked:
            key = certificate_key(seed, issuer, len(issuer), serial, len(serial))
            at = <uint32_t> key & plan.revoked_mask
            while plan.revoked[at] and plan.revoked[at] != key:
                at = (at + 1) & plan.revoked_mask
            plan.revoked[at] = key

    def add_clause(
        self, uint32_t policy, bint deny, bint dry_run, *, list identities not None, list not_identities not None,
        list namespaces not None, list not_namespaces not None, list accounts not None, list not_accounts not None,
        list sources not None, list not_sources not None, list ports not None, list not_ports not None,
    ) -> int:
        """Adds one clause of the policy with this id and returns its index. Texts are (kind, bytes), prefixes (ip, bits), ports
        (first, last); an empty list does not constrain."""
        cdef plan_t *plan = self.plan
        cdef clause_t *clause
        plan.clauses = <clause_t *> grown(plan.clauses, self.n_clauses, sizeof(clause_t))
        clause = &plan.clauses[self.n_clauses]
        memset(clause, 0, sizeof(clause_t))
        clause.policy = policy
        clause.action = ACTION_DENY if deny else ACTION_ALLOW
        clause.dry_run = dry_run
        clause.identities = self.add_patterns(identities)
        clause.not_identities = self.add_patterns(not_identities)
        clause.namespaces = self.add_patterns(namespaces)
        clause.not_namespaces = self.add_patterns(not_namespaces)
        clause.accounts = self.add_patterns(accounts)
        clause.not_accounts = self.add_patterns(not_accounts)
        clause.sources = self.add_prefix_span(sources)
        clause.not_sources = self.add_prefix_span(not_sources)
        clause.ports = self.add_port_ranges(ports)
        clause.not_ports = self.add_port_ranges(not_ports)
        self.n_clauses += 1
        return <int> self.n_clauses - 1

    cdef list file_keys(self, const clause_t *clause):
        # What the clause is filed under: (kind, hash, length, port); None when only a look at it can tell.
        cdef plan_t *plan = self.plan
        cdef const pattern_t *pattern
        cdef const char *text
        cdef uint32_t i
        cdef list keys = []
        cdef list ports = [0]
        if clause.ports.start != clause.ports.end and clause.ports.end - clause.ports.start <= 16:
            if all([plan.ports[i].first == plan.ports[i].last for i in range(clause.ports.start, clause.ports.end)]):
                ports = [plan.ports[i].first for i in range(clause.ports.start, clause.ports.end)]
        if clause.identities.start != clause.identities.end:
            for i in range(clause.identities.start, clause.identities.end):
                pattern = &plan.patterns[i]
                text = plan.text + pattern.offset
                if pattern.kind == PATTERN_ANY:
                    return None
                if pattern.kind == PATTERN_EXACT:
                    keys.append((FILED_IDENTITY, fnv(text, pattern.length), 0))
                elif pattern.kind == PATTERN_PREFIX:
                    keys.append((FILED_PREFIX, fnv(text, pattern.length), pattern.length))
                else:
                    keys.append((FILED_SUFFIX, fnv_reversed(text, pattern.length), pattern.length))
        elif clause.accounts.start != clause.accounts.end:
            for i in range(clause.accounts.start, clause.accounts.end):
                keys.append((FILED_ACCOUNT, fnv(plan.text + plan.patterns[i].offset, plan.patterns[i].length), 0))
        elif clause.namespaces.start != clause.namespaces.end:
            for i in range(clause.namespaces.start, clause.namespaces.end):
                if plan.patterns[i].kind != PATTERN_EXACT:
                    return None
                keys.append((FILED_NAMESPACE, fnv(plan.text + plan.patterns[i].offset, plan.patterns[i].length), 0))
        elif clause.sources.start != clause.sources.end:
            for i in range(clause.sources.start, clause.sources.end):
                keys.append((FILED_SOURCE, masked_hash(plan.prefixes[i].ip, plan.prefixes[i].bits), plan.prefixes[i].bits))
        elif ports != [0]:
            keys.append((FILED_PORT, 0, 0))
        else:
            return None
        return [(kind, hash_, length, port) for kind, hash_, length in keys for port in ports]

    cdef span_t add_lengths(self, set lengths) except *:
        cdef span_t span
        span.start = <uint32_t> self.n_lengths
        for length in sorted(lengths):
            self.plan.lengths = <uint32_t *> grown(self.plan.lengths, self.n_lengths, sizeof(uint32_t))
            self.plan.lengths[self.n_lengths] = length
            self.n_lengths += 1
        span.end = <uint32_t> self.n_lengths
        return span

    def add_policy_set(self, list clauses not None, bint has_allow, bint has_dry_allow) -> int:
        """Files the clauses (indexes) of all policies that apply to a workload and returns the index of the set. ``has_allow``:
        one of the policies allows, so that what none allows is refused; ``has_dry_allow``: likewise in dry run."""
        cdef plan_t *plan = self.plan
        cdef policy_set_t *policies
        cdef uint32_t size
        cdef uint32_t at, index
        cdef uint64_t key
        cdef void *room
        cdef list filed = []
        cdef set prefixes = set(), suffixes = set(), bits = set()
        plan.policy_sets = <policy_set_t *> grown(plan.policy_sets, self.n_policy_sets, sizeof(policy_set_t))
        policies = &plan.policy_sets[self.n_policy_sets]
        memset(policies, 0, sizeof(policy_set_t))
        policies.has_allow = has_allow
        policies.has_dry_allow = has_dry_allow
        policies.wide.start = <uint32_t> self.n_wide_clauses
        for index in clauses:
            keys = self.file_keys(&plan.clauses[index])
            if keys is None:
                plan.wide_clauses = <uint32_t *> grown(plan.wide_clauses, self.n_wide_clauses, sizeof(uint32_t))
                plan.wide_clauses[self.n_wide_clauses] = index
                self.n_wide_clauses += 1
            else:
                filed += [(index, *key_) for key_ in keys]
        policies.wide.end = <uint32_t> self.n_wide_clauses
        if filed:
            size = table_size(len(filed))
            room = realloc(plan.filings, (self.n_filings + size) * sizeof(filing_t))
            if room == NULL:
                raise MemoryError
            plan.filings = <filing_t *> room
            memset(&plan.filings[self.n_filings], 0, size * sizeof(filing_t))
            policies.filings = <uint32_t> self.n_filings
            policies.mask = size - 1
            self.n_filings += size
        for index, kind, hash_, length, port in filed:
            policies.kinds |= <uint32_t> 1 << <int> kind
            if kind == FILED_PREFIX:
                prefixes.add(length)
            elif kind == FILED_SUFFIX:
                suffixes.add(length)
            elif kind == FILED_SOURCE:
                bits.add(length)
            key = filing_key(kind, hash_, length, port)
            at = <uint32_t> key & policies.mask
            while plan.filings[policies.filings + at].clause and plan.filings[policies.filings + at].key != key:
                at = (at + 1) & policies.mask
            plan.filed = <filed_t *> grown(plan.filed, self.n_filed, sizeof(filed_t))
            plan.filed[self.n_filed].clause = index
            plan.filed[self.n_filed].next = plan.filings[policies.filings + at].clause
            self.n_filed += 1
            plan.filings[policies.filings + at].key = key
            plan.filings[policies.filings + at].clause = <uint32_t> self.n_filed
        policies.prefix_lengths = self.add_lengths(prefixes)
        policies.suffix_lengths = self.add_lengths(suffixes)
        policies.source_bits = self.add_lengths(bits)
        self.n_policy_sets += 1
        return <int> self.n_policy_sets - 1

    def set_default_policies(self, uint32_t policies) -> None:
        """The set of a destination that is no workload of this node."""
        self.plan.default_policies = policies

    def judge(
        self, uint32_t policies, bytes identity not None, bytes source not None, uint16_t port
    ) -> tuple[bool, bool, int, int, int, int]:
        """What the workers would decide under a policy set about a peer (``identity`` is empty for none): allowed, allowed if the
        dry-run policies were in force, and the index of the clause that denies, allows, denies and allows in dry run, or -1."""
        cdef spiffe_t peer
        cdef address_t address
        cdef verdict_t verdict
        if policies >= self.n_policy_sets:
            raise IndexError(policies)
        memset(&peer, 0, sizeof(peer))
        if identity and not spiffe_parse(identity, <uint32_t> len(identity), &peer):
            raise ValueError(f"{identity.decode(errors='replace')} is not a SPIFFE ID")
        fill_ip(address.ip, source)
        verdict_find(self.plan, &self.plan.policy_sets[policies], &peer, &address, port, &verdict)
        return (
            bool(verdict_allows(&self.plan.policy_sets[policies], &verdict)),
            bool(verdict_would_allow(&self.plan.policy_sets[policies], &verdict)),
            verdict.deny, verdict.allow, verdict.dry_deny, verdict.dry_allow,
        )
