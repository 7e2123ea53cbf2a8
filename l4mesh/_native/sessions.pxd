# Implementation, inlined into _fastpath: TLS sessions to resume, of one worker, by context and endpoint.
#
# A context is built anew when its certificate, its bundle, a revocation list or a policy changes, so that a session never outlives
# what it was made under (the lesson of CVE-2025-23419 and CVE-2022-21654, on the client's side). A place holds one session; a
# newer one, or another endpoint's, takes its place.

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc

from l4mesh._native.address cimport address_equal, address_hash, address_t
from l4mesh._native.openssl cimport SSL_SESSION, SSL_SESSION_free
from l4mesh._native.types cimport SESSIONS, session_t, worker_t


cdef inline session_t *session_place(worker_t *worker, uint64_t context_id, const address_t *endpoint) noexcept nogil:
    # NULL: no memory.
    if worker.sessions == NULL:
        worker.sessions = <session_t *> calloc(SESSIONS, sizeof(session_t))
        if worker.sessions == NULL:
            return NULL
    return &worker.sessions[<uint32_t> address_hash(endpoint, context_id) & (SESSIONS - 1)]


cdef inline SSL_SESSION *session_find(
    worker_t *worker, uint64_t context_id, const address_t *endpoint, int64_t now_s
) noexcept nogil:
    # Borrowed: SSL_set_session takes a reference of its own.
    cdef session_t *place = session_place(worker, context_id, endpoint)
    if place == NULL or place.session == NULL or place.context_id != context_id or not address_equal(&place.endpoint, endpoint):
        return NULL
    return place.session if place.expires_s > now_s else NULL


cdef inline bint session_keep(
    worker_t *worker, uint64_t context_id, const address_t *endpoint, SSL_SESSION *session, int64_t expires_s
) noexcept nogil:
    # Takes over the caller's reference when it returns true.
    cdef session_t *place = session_place(worker, context_id, endpoint)
    if place == NULL:
        return False
    if place.session != NULL:
        SSL_SESSION_free(place.session)
    place.context_id = context_id
    place.endpoint = endpoint[0]
    place.session = session
    place.expires_s = expires_s
    return True


cdef inline void session_forget(worker_t *worker, uint64_t context_id, const address_t *endpoint) noexcept nogil:
    cdef session_t *place
    if worker.sessions == NULL:
        return
    place = session_place(worker, context_id, endpoint)
    if place.session != NULL and place.context_id == context_id and address_equal(&place.endpoint, endpoint):
        SSL_SESSION_free(place.session)
        place.session = NULL


cdef inline void sessions_free(worker_t *worker) noexcept nogil:
    cdef uint32_t i
    if worker.sessions == NULL:
        return
    for i in range(<uint32_t> SESSIONS):
        if worker.sessions[i].session != NULL:
            SSL_SESSION_free(worker.sessions[i].session)
            worker.sessions[i].session = NULL
