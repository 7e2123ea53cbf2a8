# Implementation, inlined into _fastpath: the structures of the data path, with units and owners. No functions.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from l4mesh._native.address cimport address_t
from l4mesh._native.balance cimport cluster_t
from l4mesh._native.linux cimport epoll_event
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

cdef enum conn_state_t:
    CONN_FREE = 0
    CONN_PREFACE       # waits for a PROXY header
    CONN_DIALLING
    CONN_RELAYING
    CONN_RESETTING     # one side was reset; the other still takes what had arrived before

cdef enum:
    # side_t.flags: what is known of a socket between two turns of the edge-triggered epoll
    SIDE_READABLE = 1
    SIDE_WRITABLE = 2
    SIDE_FIN_SEEN = 4      # EPOLLRDHUP: what is queued now is all that will come
    SIDE_ERROR = 8
    SIDE_URGENT = 16       # a short read may end at the urgent mark, so that it proves nothing
    SIDE_NODELAY = 32
    SIDE_RESET = 64        # the peer is gone: drain what it sent, send it nothing

cdef enum:
    # half_t.flags
    HALF_ENDED = 1         # the source's FIN was read
    HALF_SHUT = 2          # and passed on, after everything before it
    HALF_SPLICE = 4
    HALF_DROPPED = 8       # the destination is gone

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

ctypedef struct side_t:
    int fd                 # owner: the connection; -1 when there is none
    uint32_t flags

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

ctypedef struct dial_t:
    # Owns one reference to the cluster.
    cluster_t *cluster
    uint64_t deadline_ms             # of all attempts
    uint64_t attempt_at_ms           # of this one
    uint64_t left_at_ms              # downstream has ended without a byte: when we believe that it left; 0: no
    uint64_t attempt_started_ns
    uint32_t tried[MAX_ATTEMPTS]
    int32_t last_errno
    uint8_t last_reason

ctypedef union phase_t:
    dial_t dial            # PREFACE and DIALLING
    half_t half[2]         # RELAYING and RESETTING

ctypedef struct source_t:
    # Live connections of one source address, in the table of sources; freed at 0.
    source_t *next
    int64_t active
    uint8_t ip[16]

ctypedef struct conn_t:
    timer_t timer
    side_t side[2]
    phase_t phase
    cluster_stat_t *cluster_stat     # counted in its `active`, so that it stays
    endpoint_stat_t *endpoint_stat   # likewise; NULL when there is none
    listener_stat_t *listener_stat   # likewise
    source_t *source_count
    uint64_t accepted_ns
    uint64_t active_ms               # the last byte either way
    uint64_t lifetime_at_ms          # 0: none
    uint32_t connected_us            # since accept; 0: not yet
    uint32_t first_byte_us           # since accept, from upstream; 0: not yet
    uint32_t idle_ms                 # 0: off
    uint32_t half_closed_ms
    uint32_t user_timeout_ms
    uint16_t keepalive_idle_s
    uint16_t keepalive_interval_s
    uint8_t keepalive_count
    uint8_t state
    uint8_t attempts
    uint8_t settled                  # keepalive is set on the upstream
    uint8_t listener_flags           # LISTENER_*, copied: a connection outlives its listener
    uint8_t first_end                # side whose FIN came first
    uint8_t reset_reason             # RESETTING: what the connection will end with
    uint8_t linger_ms                # RESETTING: step between two looks at the send queue
    uint8_t queued                   # on the ready list
    uint8_t proxy_protocol           # version to send, 0: none
    uint8_t watched                  # downstream is in the epoll
    uint32_t ready_next              # also links free slots
    uint32_t ready_prev
    uint32_t generation              # of the slot: events and handles of earlier connections don't match
    int32_t errno_seen
    address_t source
    address_t destination
    address_t endpoint

cdef enum:
    LOG_NEVER = 0
    LOG_ERRORS = 1
    LOG_ALWAYS = 2

cdef enum:
    LISTENER_REDIRECT = 1
    LISTENER_TPROXY = 2
    LISTENER_PRESERVE_SOURCE = 4
    LISTENER_WILDCARD = 8            # bound to all addresses: its own is asked for by connection

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
    uint32_t ports, ports_end
    uint32_t targets, targets_end

ctypedef struct exact_route_t:
    # One address and one port (0: every port) to the first route that takes them.
    uint8_t ip[16]
    uint16_t port
    uint32_t route                   # index + 1; 0: empty

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
    uint8_t flags

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
    uint32_t error_reasons           # bit set: CloseReason.is_error

ctypedef struct record_t:
    uint64_t ended_unix_ms
    uint64_t listener_id
    uint64_t cluster_id
    uint64_t endpoint_id
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

ctypedef struct page_t:
    # A page of views, asked for by the control loop (state 1), filled by the worker (state 2).
    int64_t state
    uint32_t start
    uint32_t limit
    uint32_t count
    uint32_t next                    # 0: that was the last
    view_t *views

ctypedef struct armed_t:
    # A listening socket in a worker's epoll.
    int fd
    uint32_t listener                # index in the plan
    uint32_t burst                   # accepts at one event; grows while the queue is deep

ctypedef struct sources_t:
    # Live connections by source address, shared by the workers: an exact limit needs one count.
    int64_t locks[256]
    source_t *heads[65536]

ctypedef struct engine_t:
    # What the workers share. Owner: the Engine object.
    plan_t *plan                     # published; workers load it once a turn
    int64_t active
    int64_t stopping
    int up_fd                        # wakes the control loop
    uint32_t n_workers
    sources_t *sources
    cluster_stat_t *no_cluster       # for connections that end before a cluster is known

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
    uint32_t ready_head, ready_tail  # connections that used up their budget
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
    epoll_event events[MAX_EVENTS]
