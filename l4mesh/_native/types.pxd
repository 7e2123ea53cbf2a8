# Implementation, inlined into _fastpath: the structures of the data path, with units and owners. No functions.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from l4mesh._native.address cimport address_t
from l4mesh._native.balance cimport cluster_t
from l4mesh._native.bandwidth cimport bucket_t, lane_t
from l4mesh._native.linux cimport epoll_event
from l4mesh._native.openssl cimport BIO, SSL, SSL_CTX, SSL_SESSION
from l4mesh._native.spiffe cimport pattern_t
from l4mesh._native.stats cimport cluster_row_t, cluster_stat_t, endpoint_stat_t, listener_row_t, listener_stat_t
from l4mesh._native.wheel cimport timer_t, wheel_t

cdef enum:
    DOWNSTREAM = 0
    UPSTREAM = 1

cdef enum:
    # Per read of the copy path, and so the most that a half can have to keep when the other side stops taking: two halves stay
    # within the 64 KiB that a connection may own.
    SCRATCH_BYTES = 32768
    MAX_ATTEMPTS = 8
    MAX_EVENTS = 256
    MAX_LISTENERS = 256       # bound addresses
    CONN_CHUNK = 256          # connections that are allocated together
    PIPE_POOL = 64            # empty pipes that a worker keeps
    PASSAGES = 40             # connections that are handed over together: one message has room for 253 descriptors
    CARRIED_FDS = 6
    CHAIN_KEYS = 6            # a leaf, as many intermediates as a chain may have, and what they end in
    CHAINS = 512              # chains of certificates that a worker remembers to have verified
    SESSIONS = 1024           # places for TLS sessions to resume, of a worker
    GIVEN = 4096              # places for TLS sessions that clients may resume, of the engine
    # Per read where TLS is on either side: four full records, so that a send of as many costs one call. A record that was begun before
    # can complete on top of it.
    TLS_READ_BYTES = 65536
    TLS_STEP_BYTES = 81920
    # The same at most of a stream whose destination has room for all of it: fewer acknowledgements and wake-ups for as many bytes.
    TLS_LARGE_BYTES = 524288
    PLAIN_BYTES = 606208      # of one step: a large read on top of what OpenSSL had read before
    CIPHER_BYTES = 622592     # what PLAIN_BYTES become at most, with the alerts and key updates before them

# errors.CloseReason has the same numbers; a test compares them.
cdef enum close_reason_t:
    CLOSE_DOWNSTREAM_CLOSED = 0
    CLOSE_UPSTREAM_CLOSED = 1
    CLOSE_DOWNSTREAM_RESET = 2
    CLOSE_UPSTREAM_RESET = 3
    CLOSE_DOWNSTREAM_LOST = 4
    CLOSE_UPSTREAM_LOST = 5
    CLOSE_DOWNSTREAM_LEFT = 6
    CLOSE_IDLE_TIMEOUT = 7
    CLOSE_HALF_CLOSED_TIMEOUT = 8
    CLOSE_LIFETIME = 9
    CLOSE_CONNECT_REFUSED = 10
    CLOSE_CONNECT_TIMEOUT = 11
    CLOSE_CONNECT_UNREACHABLE = 12
    CLOSE_CONNECT_FAILED = 13
    CLOSE_NO_ROUTE = 14
    CLOSE_NO_ENDPOINT = 15
    CLOSE_NO_ORIGINAL_DESTINATION = 16
    CLOSE_SELF_CALL = 17
    CLOSE_LIMIT_LISTENER = 18
    CLOSE_LIMIT_CLUSTER = 19
    CLOSE_LIMIT_ENDPOINT = 20
    CLOSE_LIMIT_SOURCE = 21
    CLOSE_PROXY_PROTOCOL_INVALID = 22
    CLOSE_PROXY_PROTOCOL_TIMEOUT = 23
    CLOSE_LOCAL_EXHAUSTED = 24
    CLOSE_SHUTDOWN = 25
    CLOSE_DOWNSTREAM_TLS = 26
    CLOSE_UPSTREAM_TLS = 27
    CLOSE_DENIED = 28
    CLOSE_NO_IDENTITY = 29
    CLOSE_PEER_CERTIFICATE = 30
    CLOSE_LIMIT_HANDSHAKES = 31
    CLOSE_LIMIT_RATE = 32
    CLOSE_QUEUE_TIMEOUT = 33
    CLOSE_OVERLOAD = 34
    CLOSE_ENDPOINT_REMOVED = 35
    CLOSE_ENDPOINT_UNHEALTHY = 36
    CLOSE_REBALANCED = 37
    CLOSE_HANDED_OVER = 38
    CLOSE_FAULT = 39

# errors.TlsCause has the same numbers; a test compares them.
cdef enum tls_cause_t:
    TLS_OK = 0
    TLS_NO_CERTIFICATE = 1
    TLS_UNKNOWN_CA = 2
    TLS_EXPIRED = 3
    TLS_NOT_YET_VALID = 4
    TLS_REVOKED = 5
    TLS_WRONG_IDENTITY = 6
    TLS_BAD_CERTIFICATE = 7
    TLS_NOT_TLS = 8
    TLS_PROTOCOL_VERSION = 9
    TLS_NO_COMMON_PARAMETERS = 10
    TLS_BAD_RECORD = 11
    TLS_TRUNCATED = 12
    TLS_TIMEOUT = 13
    TLS_PEER_ALERT = 14
    TLS_KEY_UPDATES = 15
    TLS_INTERNAL = 16
    TLS_CAUSES = 17

cdef enum conn_state_t:
    CONN_FREE = 0
    CONN_PREFACE       # waits for a PROXY header
    CONN_HELLO         # looks at the first bytes: TLS or not, and for whom
    CONN_HANDSHAKE     # with the downstream
    CONN_DIALLING
    CONN_RELAYING
    CONN_RESETTING     # one side was reset; the other still takes what had arrived before
    CONN_ASIDE         # accepted while many were; waits for its source's turn
    CONN_QUEUED        # waits for a place in the cluster; costs no upstream, and nothing of the client's is read
    CONN_DEPARTING     # RELAYING, on its way to another process: nothing moves until that one has it
    CONN_ARRIVING      # the same on arrival: counted nowhere yet

cdef enum:
    # handover_t.asked
    HANDOVER_DEPART = 1    # take out as many connections from `start` on as fit
    HANDOVER_ARRIVE = 2    # prepare those that are in the passages: all or none
    HANDOVER_SETTLE = 3    # they go on here, or are forgotten, by the flag
    HANDOVER_BEGUN = 4     # the worker is at it

cdef enum:
    # side_t.flags: what is known of a socket between two turns of the edge-triggered epoll
    SIDE_READABLE = 1
    SIDE_WRITABLE = 2
    SIDE_FIN_SEEN = 4      # EPOLLRDHUP: what is queued now is all that will come
    SIDE_ERROR = 8
    SIDE_URGENT = 16       # a short read may end at the urgent mark, so that it proves nothing
    SIDE_NODELAY = 32
    SIDE_RESET = 64        # the peer is gone: drain what it sent, send it nothing
    SIDE_TUNED = 256       # conn_tune has looked at it
    SIDE_PENDING = 128     # TLS holds bytes that were read from the socket and not yet from it
    SIDE_WATCHED = 512     # it is in the epoll
    SIDE_SETTLED = 1024    # keepalive is set on it, the upstream

cdef enum:
    # half_t.flags
    HALF_ENDED = 1         # the source's FIN was read
    HALF_SHUT = 2          # and passed on, after everything before it
    HALF_SPLICE = 4
    HALF_DROPPED = 8       # the destination is gone
    HALF_PACED = 16        # a stream that is read in large steps: its source tells only of PACE_BYTES
    HALF_WAITS = 32        # the source had nothing more when it was last read
    HALF_HEADER = 64       # what is parked is our PROXY header, none of the source's bytes

cdef enum:
    QUEUED_READY = 1       # used up its budget: goes on at the next turn
    QUEUED_HELD = 2        # waits for more of a stream, until its time
    QUEUED_HEAVY = 3       # has a step of a handshake to do, which costs as much as dozens of a relay
    QUEUED_LINE = 4        # in the line for a place in its cluster
    QUEUED_ASIDE = 5       # among the accepted of its source
    QUEUED_EVENT = 6       # among those of its source that something happened to

cdef enum flow_t:
    FLOW_BLOCKED           # waits for an event
    FLOW_MORE              # the budget is used up
    FLOW_END               # the source's FIN, and everything before it was delivered
    FLOW_SOURCE_RESET      # the source's error, and everything before it was handed to the destination's socket
    FLOW_DESTINATION_RESET
    FLOW_EXHAUSTED         # no memory for bytes that must be kept

ctypedef struct pipe_t:
    int read_fd
    int write_fd

cdef enum:
    # tls_t.flags
    TLS_READY = 1          # the handshake is done and the peer is who it should be
    TLS_SERVER = 2         # we are the server
    TLS_SHUT = 4           # close_notify is on its way out
    TLS_RESUMED = 8
    TLS_ANSWERED = 16      # the peer has sent a byte since the handshake: it took our certificate
    TLS_ABUSED = 32        # more key updates than we put up with
    TLS_HEARD = 64         # the peer has sent something
    TLS_BROKEN = 128       # no read will succeed any more
    TLS_FULL_ONLY = 256    # no session is given, taken or kept

ctypedef struct trust_t:
    # Whom an identity trusts.
    uint8_t bundle[32]               # digest of the CAs
    uint32_t domain_length
    char domain[256]

ctypedef struct chain_t:
    # A chain of certificates that led to a CA of a bundle.
    uint8_t key[32]                  # digest of the bundle, our role and the chain as the peer sent it
    int64_t begins_s, expires_s      # of the shortest-lived of them; expires_s 0: empty
    uint64_t keys[CHAIN_KEYS]        # as tls_t.chain

ctypedef struct tls_t:
    # The TLS of one side. Owner: the connection.
    SSL *ssl
    void *worker
    uint8_t *out           # malloc'd ciphertext that the socket did not take; it goes before anything else
    uint32_t out_offset, out_length
    const cluster_t *cluster         # whose peers are expected, during an upstream handshake; else NULL
    trust_t *trust         # malloc'd: a copy, during a handshake
    uint64_t context_id
    address_t endpoint               # of an upstream: sessions are kept by it
    char *peer             # malloc'd identity, NULL until it is verified
    uint32_t peer_length
    uint64_t chain[CHAIN_KEYS]       # the peer's, from the leaf up, by issuer and serial number, for revocation; 0: no more
    int64_t peer_expires_s
    uint64_t key_updates_from_ms
    uint16_t key_updates   # since then
    uint8_t cause          # tls_cause_t
    uint8_t alert          # that the peer sent
    uint8_t lane_hint      # sent or received, as in conn_t
    uint16_t flags

ctypedef struct tls_context_t:
    # One identity, ready to use. Owner: a TlsContext object, which the plan holds on to.
    SSL_CTX *ctx
    uint64_t id            # of this build: a session of another is never resumed
    char *identity
    uint32_t identity_length
    trust_t trust

ctypedef struct session_t:
    # A session to resume, by the context that made it and the endpoint that gave it.
    uint64_t context_id
    address_t endpoint
    SSL_SESSION *session   # NULL: empty
    int64_t expires_s      # the peer's certificate

ctypedef struct side_t:
    int fd                 # owner: the connection; -1 when there is none
    uint32_t flags
    tls_t *tls             # NULL: plaintext

ctypedef struct half_t:
    # One direction. Owns its parked bytes and, while data is in it, a pipe; idle it owns neither.
    uint64_t bytes
    uint8_t *parked        # malloc'd, exactly what the destination did not take
    uint32_t parked_offset
    uint32_t parked_length
    pipe_t pipe            # read_fd is -1 when there is none
    uint32_t piped         # bytes in the pipe
    uint8_t flags
    uint8_t full_reads     # in a row: promotes to splice
    uint8_t small_fills    # in a row: demotes to copy
    uint8_t large_steps    # in a row: what makes it PACED

ctypedef struct dial_t:
    # Owns one reference to the cluster.
    cluster_t *cluster
    uint64_t deadline_ms             # of all attempts
    uint64_t attempt_at_ms           # of this one
    uint64_t left_at_ms              # downstream has ended without a byte: when we believe that it left; 0: no
    uint64_t attempt_started_ns
    uint32_t tried[MAX_ATTEMPTS]
    uint8_t last_reason
    uint8_t handshaking              # connected; TLS with the upstream is under way
    uint8_t picked                   # an endpoint is chosen and its place taken, before conn_dial
    uint8_t retrying                 # counted in the cluster's `retrying`
    uint8_t paused                   # the pause before this attempt is behind it

ctypedef union phase_t:
    dial_t dial            # until the relay: the cluster from the route on
    half_t half[2]         # RELAYING and RESETTING

# errors.Fault has the same numbers; a test compares them.
cdef enum fault_kind_t:
    FAULT_NONE = 0
    FAULT_DELAY = 1
    FAULT_REFUSE = 2
    FAULT_RESET = 3
    FAULT_BLACK_HOLE = 4
    FAULT_SLOW = 5
    FAULT_STALL = 6

ctypedef struct fault_t:
    uint8_t kind           # fault_kind_t
    uint8_t half           # RESET and STALL: whose bytes are counted
    uint64_t bytes         # of it, before that happens; 0: at once, or by time
    uint64_t from_ms       # DELAY, STALL, BLACK_HOLE: for how long, at least; RESET: when, if not by bytes. 0: for ever
    uint64_t to_ms         # and at most
    uint64_t rate          # SLOW: bytes a second, each way

ctypedef struct shaping_t:
    # What slows a connection down or breaks it on purpose; only those that this happens to have it. Owner: the connection.
    lane_t lanes[2]        # limits, by half
    fault_t fault          # a copy: a connection outlives its plan
    uint64_t until_ms      # end of a delay, a black hole or a stall; or when a reset is due; 0: none of that
    uint8_t injected       # the fault has happened, or has begun

ctypedef struct source_t:
    # Live connections of one source address, in the table of sources; freed at 0.
    source_t *next
    int64_t active
    uint8_t ip[16]

ctypedef struct conn_t:
    # What a process that takes over needs to know of it is in carried_t.
    timer_t timer
    side_t side[2]
    phase_t phase
    cluster_stat_t *cluster_stat     # counted in its `active`, so that it stays
    endpoint_stat_t *endpoint_stat   # likewise; NULL when there is none
    listener_stat_t *listener_stat   # likewise
    source_t *source_count
    source_t *handshake_count        # while a handshake with the downstream is under way
    shaping_t *shaping               # malloc'd; NULL: no limit of bandwidth and no fault
    uint64_t accepted_ns
    uint64_t active_ms               # the last byte either way
    uint64_t ends_at_ms              # whatever it does then; 0: never. RESETTING: the latest end of that
    uint64_t held_until_ns           # while it is held
    uint64_t leaves_at_ms            # told to leave, as long as leave_reason stands; 0: not
    uint32_t connected_us            # since accept, TLS included; 0: not yet
    uint32_t policy                  # id of the policy that decided; 0: none
    uint32_t dry_policy              # id of the dry-run policy that would have refused
    uint32_t first_byte_us           # since accept, from upstream; 0: not yet. The greatest is that or more: 71 minutes
    uint32_t idle_ms                 # 0: off
    uint32_t half_closed_ms
    uint32_t user_timeout_ms
    uint32_t queue_next              # also links free slots
    uint32_t queue_prev
    uint32_t generation              # of the slot: events and handles of earlier connections don't match
    int32_t errno_seen
    uint16_t keepalive_idle_s
    uint16_t keepalive_interval_s
    address_t source
    address_t destination
    address_t endpoint
    uint16_t queued_ms               # waited for a place; 0: didn't
    uint8_t keepalive_count
    uint8_t state
    uint8_t attempts
    uint8_t listener_flags           # LISTENER_*, copied: a connection outlives its listener
    uint8_t first_end                # side whose FIN came first
    uint8_t end_reason               # of ends_at_ms; RESETTING: what the connection will end with
    uint8_t leave_reason             # of leaves_at_ms
    uint8_t linger_ms                # RESETTING: step between two looks at the send queue
    uint8_t queued                   # QUEUED_*: the list that it is on, if any
    uint8_t proxy_protocol           # version to send, 0: none
    uint8_t tls_mode                 # TLS_MODE_* of the downstream
    uint8_t tls_cause                # of a failure whose side has no TLS, or no more
    uint8_t alert
    uint8_t routed                   # owns a reference to the dial's cluster: from the route to the relay
    uint8_t close_expired
    uint8_t lane_hint                # whose of the source's it is, as the source tells: 1 to LANE_HINTS; 0: not said
    uint8_t spared                   # the endpoint is a workload of this node, and spared the cluster's TLS

cdef enum:
    LOG_NEVER = 0
    LOG_ERRORS = 1
    LOG_ALWAYS = 2

cdef enum:
    LISTENER_REDIRECT = 1
    LISTENER_TPROXY = 2
    LISTENER_PRESERVE_SOURCE = 4
    LISTENER_WILDCARD = 8            # bound to all addresses: its own is asked for by connection
    LISTENER_OUTBOUND = 16           # takes what leaves this node: policies of local destinations only
    LISTENER_HELLO = 32              # a route asks for SNI or ALPN

cdef enum:
    ACCEPT_ON = 0
    ACCEPT_EMPTY = 1                 # no more than what waits already
    ACCEPT_OFF = 2                   # what waits is left to somebody else who has the sockets

cdef enum:
    # worker_t.shed: what was done about overload
    SHED_IDLE = 0                    # connections that ended
    SHED_SOURCE = 1                  # connections that were refused
    SHED_ACCEPTS = 2                 # pauses
    SHED_ACTIONS = 3

cdef enum:
    TLS_MODE_OFF = 0
    TLS_MODE_PERMISSIVE = 1
    TLS_MODE_STRICT = 2

cdef enum:
    ACTION_ALLOW = 0
    ACTION_DENY = 1

cdef enum:
    # What a clause is filed under
    FILED_IDENTITY = 0
    FILED_PREFIX = 1
    FILED_SUFFIX = 2
    FILED_ACCOUNT = 3
    FILED_NAMESPACE = 4
    FILED_SOURCE = 5
    FILED_PORT = 6

ctypedef struct span_t:
    uint32_t start, end              # in one of the plan's arrays

ctypedef struct clause_t:
    span_t identities, not_identities
    span_t namespaces, not_namespaces
    span_t accounts, not_accounts
    span_t sources, not_sources
    span_t ports, not_ports
    uint32_t policy                  # id
    uint8_t action
    uint8_t dry_run

ctypedef struct filing_t:
    uint64_t key
    uint32_t clause                  # index + 1 in plan.filed; 0: empty

ctypedef struct filed_t:
    uint32_t clause
    uint32_t next                    # index + 1 of the next under the same key

ctypedef struct policy_set_t:
    uint32_t filings, mask           # mask 0: nothing is filed
    span_t wide                      # clauses that can't be filed, in plan.wide_clauses
    span_t prefix_lengths, suffix_lengths, source_bits       # in plan.lengths, ascending
    uint32_t kinds                   # bit set of FILED_*
    uint8_t has_allow
    uint8_t has_dry_allow

ctypedef struct verdict_t:
    # Index of the first clause that matches, of each kind; -1: none.
    int32_t deny, allow, dry_deny, dry_allow

ctypedef struct workload_t:
    uint8_t ip[16]
    uint32_t identity                # id; 0: none
    uint32_t policies                # index of its set
    bucket_t *buckets[2]             # bandwidth in and out; NULL: no limit
    uint8_t taken                    # the place in the table is
    uint32_t id                      # the same for all of its addresses and for as long as its name is used

ctypedef struct prefix_t:
    uint8_t ip[16]
    uint8_t bits                     # of 128: an IPv4 /24 is 120

ctypedef struct port_range_t:
    uint16_t first
    uint16_t last

ctypedef struct target_t:
    uint32_t cluster                 # index in the plan
    uint32_t weight_up_to            # cumulative

ctypedef struct route_t:
    uint32_t destinations, destinations_end      # ranges in the plan's arrays
    uint32_t sources, sources_end
    span_t ports
    uint32_t targets, targets_end
    span_t names                     # of SNI; PATTERN_SUFFIX is "*." with its dot
    span_t protocols                 # of ALPN
    span_t faults

ctypedef struct fault_rule_t:
    # A fault, and whom it is for.
    fault_t fault
    uint64_t share                   # of 2^32
    span_t sources                   # prefixes; empty: everybody

ctypedef struct exact_route_t:
    # One address and one port (0: every port) to the first route that takes them.
    uint8_t ip[16]
    uint16_t port
    uint32_t route                   # index + 1; 0: empty

ctypedef struct rate_t:
    # New connections in a time.
    uint64_t interval_ns             # between two in the long run; 0: no limit
    uint64_t tolerance_ns            # how much sooner one may come: burst - 1 intervals

ctypedef struct rates_t:
    rate_t total, source, workload, identity

cdef enum:
    ARRIVALS = 65536                  # keys that are told apart at a time
    ARRIVAL_WAYS = 8                  # places for a key
    ARRIVAL_SPARE = 64

ctypedef struct arrival_t:
    uint64_t key                     # 0: was never used
    uint64_t arrival_ns              # theoretical arrival time of the next; one that is over says that the bucket is full

ctypedef struct arrivals_t:
    # By source, workload and identity, for all workers. Owner: the Engine object, which makes it when a rate is first configured.
    uint64_t seed
    uint64_t overflows
    uint64_t spare[ARRIVAL_SPARE]     # arrival times that keys share for which there is no place
    arrival_t places[ARRIVALS]

ctypedef struct listener_t:
    listener_stat_t *stat
    int *fds                         # one a worker; owner: the control loop
    address_t address
    uint32_t routes, routes_end      # in the plan, in order; the first that matches wins
    uint32_t exact, exact_mask       # exact_mask 0: no index
    uint32_t wide, wide_end          # indexes of the routes that the index does not hold
    int32_t default_cluster          # -1: reject
    int64_t max_connections
    uint32_t proxy_from, proxy_from_end          # prefixes
    uint32_t proxy_timeout_ms
    uint32_t handshake_ms
    span_t strict, permissive, plain         # ports with a mode of their own
    span_t server_first                      # ports on which permissive waits for nothing
    uint64_t rates[2]                        # of each connection, by half: bytes a second; 0: no limit
    uint64_t burst
    uint32_t identity                        # id; 0: the destination workload's, or the node's
    uint8_t tls_mode
    uint8_t tls_v12
    uint8_t resumption
    uint8_t close_expired
    uint8_t flags
    uint8_t rated                    # it or the process has a rate that is looked at before TLS
    rates_t arrival_rates

ctypedef struct plan_t:
    # Immutable once published. Owner: the control loop, which frees it when every worker has seen a later one.
    uint64_t generation
    listener_t *listeners
    uint32_t n_listeners
    cluster_t **clusters             # one reference each
    uint32_t n_clusters
    route_t *routes
    prefix_t *prefixes
    port_range_t *ports
    target_t *targets
    exact_route_t *exact
    uint32_t *wide
    address_t *own                   # what we listen on, the admin address included; an unspecified ip means all
    uint32_t n_own
    uint8_t own_ports[8192]          # bitmap: most destinations are ruled out by one look
    int64_t max_connections
    int64_t max_connections_per_source
    uint32_t mark
    uint8_t splice
    uint8_t log_when                 # LOG_*
    uint64_t log_sample              # a random number up to this is logged
    uint64_t error_reasons           # bit set: CloseReason.is_error
    tls_context_t **contexts         # by id of the identity; NULL where there is none
    uint32_t n_contexts
    uint32_t node_identity           # id; 0: none
    workload_t *workloads            # hash table by address
    uint32_t workload_mask           # 0: none
    clause_t *clauses
    filing_t *filings
    filed_t *filed
    uint32_t *wide_clauses
    uint32_t *lengths
    policy_set_t *policy_sets
    uint32_t default_policies        # set of a destination that is no workload
    pattern_t *patterns
    char *text                       # of the patterns
    uint64_t *revoked                # keys of certificates: a hash table, 0 where empty
    uint32_t revoked_mask
    uint64_t trust                   # live connections are looked at again when this changes
    int64_t max_handshakes_per_source
    uint8_t limits_bandwidth         # of some listener, cluster or workload
    fault_rule_t *faults             # NULL: none are in force
    span_t *cluster_faults           # by index of the cluster
    rates_t arrival_rates            # of the process
    uint8_t rates_identities         # it or a listener has a rate by identity

ctypedef struct record_t:
    uint64_t ended_unix_ms
    uint64_t listener_id
    uint64_t cluster_id
    address_t source
    address_t destination
    address_t endpoint
    int32_t reason
    int32_t attempts
    int32_t errno_seen
    int64_t connect_us
    int64_t first_byte_us
    int64_t total_us
    uint64_t bytes_to_upstream
    uint64_t bytes_to_downstream
    int64_t downstream_rtt_us
    int64_t downstream_retransmits
    int64_t upstream_rtt_us
    int64_t upstream_retransmits
    char *peers[2]                   # malloc'd identities, terminated; the record owns them
    uint8_t versions[2]              # minor of TLS 1.x; 0: plaintext
    uint8_t resumed[2]
    uint8_t cause
    uint8_t alert
    uint32_t policy
    uint32_t dry_policy
    uint8_t fault                    # fault_kind_t that was injected
    int32_t queued_ms                # -1: didn't wait

ctypedef struct ring_t:
    # Records of one worker on their way up. One producer, one consumer; positions only grow.
    record_t *records
    uint64_t mask
    uint64_t pad0[6]
    uint64_t head                    # written by the worker
    uint64_t tail_seen               # the worker's copy of `tail`
    uint64_t dropped
    uint64_t pad1[5]
    uint64_t tail                    # written by the control loop
    int64_t parked                   # 1: the control loop found it empty and wants the eventfd
    uint64_t pad2[6]

ctypedef struct view_t:
    # A live connection as `/connections` shows it.
    uint32_t slot
    uint32_t generation
    uint8_t state
    uint8_t spliced
    uint64_t listener_id
    uint64_t cluster_id
    address_t source
    address_t destination
    address_t endpoint
    uint64_t age_ms
    uint64_t idle_ms
    uint64_t bytes_to_upstream
    uint64_t bytes_to_downstream
    char *peers[2]                   # as in a record; owner: the view
    uint8_t versions[2]

ctypedef struct page_t:
    # A page of views, asked for by the control loop (state 1), filled by the worker (state 2).
    int64_t state
    uint32_t start
    uint32_t limit
    uint32_t count
    uint32_t next                    # 0: that was the last
    view_t *views

ctypedef struct carried_half_t:
    uint64_t bytes
    uint32_t parked_length
    uint32_t piped
    uint8_t flags, full_reads, small_fills, large_steps
    uint32_t side_flags              # of its source

ctypedef struct carried_t:
    # What a relaying connection takes along to the process that takes over, of the same layout there: a change needs another
    # PROTOCOL in runtime/upgrade.py. Monotonic clocks are the host's, so that times stay good. Counters, limits and policies are the
    # new process's own.
    uint64_t accepted_ns
    uint64_t active_ms
    uint64_t ends_at_ms
    uint64_t leaves_at_ms
    carried_half_t half[2]
    uint32_t connected_us
    uint32_t first_byte_us
    uint32_t idle_ms
    uint32_t half_closed_ms
    uint32_t user_timeout_ms
    uint16_t keepalive_idle_s
    uint16_t keepalive_interval_s
    uint8_t keepalive_count
    uint8_t attempts
    uint8_t listener_flags
    uint8_t first_end
    uint8_t proxy_protocol
    uint8_t end_reason
    uint8_t leave_reason
    uint16_t queued_ms
    address_t source
    address_t destination
    address_t endpoint

ctypedef struct passage_t:
    # One connection that departs from a worker or arrives at it.
    carried_t state
    int fds[CARRIED_FDS]             # downstream, upstream, then read and write end of each half's pipe; -1: none
    uint8_t *parked[2]               # owner: the connection; before it has a slot, the passage
    listener_stat_t *listener_stat
    cluster_stat_t *cluster_stat
    endpoint_stat_t *endpoint_stat   # NULL: none
    uint32_t slot

ctypedef struct handover_t:
    # What the control loop asks of a worker when one process takes over from another. Owner: a Handover object; the worker touches it
    # only while `asked` is not 0, which is its to clear.
    uint64_t asked                   # HANDOVER_*; what has not begun can be called off
    int done_fd                      # eventfd: answered
    uint32_t start, next             # slots; next 0: that was the last
    uint32_t count
    uint8_t flag                     # of HANDOVER_SETTLE, and of the answer to HANDOVER_ARRIVE
    passage_t *passages              # PASSAGES of them

ctypedef struct armed_t:
    # A listening socket in a worker's epoll.
    int fd
    uint32_t listener                # index in the plan
    uint32_t burst                   # accepts at one event; grows while the queue is deep

ctypedef struct sources_t:
    # Live connections by source address, shared by the workers: an exact limit needs one count.
    uint64_t seed                    # of the hashes
    int64_t locks[256]
    source_t *heads[65536]

ctypedef struct queue_t:
    # Connections of a worker, linked through their slots.
    uint32_t head, tail

ctypedef struct waiting_t:
    # A worker's line for places in one cluster, first come first served. Owner: the worker, for as long as somebody is in it.
    queue_t queue
    cluster_stat_t *stat
    waiting_t *next
    waiting_t *prev

cdef enum:
    LANES = 1024
    LANE_HINTS = 32                  # that a peer may tell its own clients apart by

ctypedef struct turns_t:
    uint32_t first, last

ctypedef struct lanes_t:
    # Connections that wait for the turn of their source. Owner: the worker.
    # Sources take turns, and within a source its lanes; both are linked by number, WHEEL_NONE at the end.
    queue_t accepted[LANES]
    queue_t begun[LANES]             # to these something has happened since
    uint8_t in_a_row[LANES]          # of those begun that were served since an accepted one was
    uint32_t following[LANES]        # lane of the same source that has its turn after this one
    turns_t of[LANES]                # a source's lanes that have a connection
    uint32_t following_source[LANES]
    turns_t sources                  # that have such a lane
    uint32_t n

ctypedef struct engine_t:
    # What the workers share. Owner: the Engine object.
    plan_t *plan                     # published; workers load it once a turn
    int64_t active
    int64_t stopping
    int up_fd                        # wakes the control loop
    uint32_t n_workers
    sources_t *sources
    sources_t *handshakes            # with downstreams, under way
    SSL_SESSION **given              # to clients: see sessions.pxd
    uint64_t revocation_seed         # so that nobody can choose a certificate whose key is that of a revoked one
    cluster_stat_t *no_cluster       # for connections that end before a cluster is known
    int *wake_fds                    # one a worker; owner: the worker
    arrivals_t *arrivals             # NULL until a rate by key is configured
    uint64_t arrival_ns              # of the process's rate, as arrival_t
    uint64_t seed                    # of hashes whose collisions nobody may choose
    int64_t accept_mode              # ACCEPT_*, as it should be
    uint64_t sweep                   # grows when live connections are to be looked at
    uint32_t leave_over_ms           # all connections leave over this time
    uint8_t leave_reason             # close_reason_t; 0: they stay
    endpoint_stat_t *told            # endpoints that failed too often in a row: a list that workers push to and the loop takes whole
    int watch_fd                     # ends the watchdog
    uint64_t beats                   # the control loop counts when it comes round; 0: it need not
    int64_t loop_tid
    int64_t idle_cap_ms              # overload: a sweep ends what has been idle for longer; 0: nothing
    int64_t source_share             # overload: live connections that a source may have; 0: they need not be counted
    int64_t accept_budget            # overload: connections that a worker accepts between two pauses; 0: any number
    uint8_t paces                    # the congestion control of this host's choice does

ctypedef struct worker_t:
    engine_t *engine
    plan_t *plan                     # valid for this turn
    uint64_t seen_generation         # published: plans before it are not looked at any more
    uint32_t index
    int epoll_fd
    int wake_fd
    uint8_t *scratch
    conn_t **chunks
    uint32_t n_chunks, max_chunks
    uint32_t free_slot               # head of the list of free slots
    queue_t ready                    # connections that used up their budget
    queue_t held                     # connections whose streams are read in large steps, by the time until which they may be left
    wheel_t wheel
    uint64_t now_ns
    uint64_t now_ms
    uint64_t random
    pipe_t pool[PIPE_POOL]
    uint32_t n_pool
    armed_t armed[MAX_LISTENERS]
    uint32_t n_armed
    uint64_t accept_paused_until_ms  # 0: accepting
    ring_t ring
    page_t page
    int64_t active
    uint64_t accepted
    uint64_t accept_pauses
    uint64_t turns
    uint64_t pipes
    uint64_t bytes_copied
    uint64_t bytes_spliced
    uint64_t holds
    uint64_t bytes_encrypted         # and decrypted
    uint64_t handshakes[2][2]        # by side; full and resumed
    uint64_t tls_failures[2][TLS_CAUSES]
    uint64_t dry_denied
    uint64_t throttles               # times that a half waited for its bandwidth
    uint8_t *plain                   # PLAIN_BYTES: of a read where TLS is on either side
    uint8_t *cipher                  # CIPHER_BYTES: records on their way to one send
    uint8_t *feed                    # TLS_LARGE_BYTES: of a large read, on their way into OpenSSL
    uint32_t feed_offset, feed_length
    uint32_t feed_most               # what the next read may take: 0 is as much as OpenSSL asks for
    uint32_t cipher_length
    BIO *bio                         # one for all connections: it reads and writes what the next two say
    side_t *bio_side
    int bio_errno                    # of its last read; 0: none
    uint8_t bio_ended                # its last read was the end of the stream
    session_t *sessions
    chain_t *chains
    uint64_t sweep                   # the last one that was begun
    uint64_t sweep_from              # the one before it: it is for what was asked since then
    uint32_t sweep_slot              # the next connection to look at
    uint32_t sweep_end               # 0: none are left
    uint8_t sweep_trust              # trust has changed: are they still let in?
    int64_t accept_mode              # ACCEPT_*, as it is
    handover_t handover
    uint64_t doing                   # DOING_*, and what it is about: the watchdog reads it
    int64_t tid                      # while it runs
    uint64_t accept_spent            # accepted since the last pause
    uint64_t late_turns              # in a row, in which timers waited for events
    uint64_t stale_ms                # when the turn before them began
    uint64_t shed[SHED_ACTIONS]
    waiting_t *lines                 # those that somebody is in
    uint8_t serving                  # places may be free for them
    uint64_t put_aside               # connections that waited for the turn of their source
    lanes_t lanes
    lanes_t heavy                    # those with a step of a handshake to do: all of them begun
    epoll_event events[MAX_EVENTS]
