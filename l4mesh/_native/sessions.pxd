# Implementation, inlined into _fastpath: TLS sessions to resume: as a client, of one worker, by context and endpoint; as a server, of
# all workers, by the number that the client has as its ticket.
#
# A context is built anew when its certificate, its bundle, a revocation list or a policy changes, so that a session never outlives
# what it was made under (the lesson of CVE-2025-23419 and CVE-2022-21654, on the client's side). A place holds one session; a
# newer one, or another endpoint's, takes its place.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memcmp, memcpy

from l4mesh._native.address cimport address_equal, address_hash, address_t
from l4mesh._native.atomic cimport exchange_pointer, replace_pointer
from l4mesh._native.openssl cimport SSL_SESSION, SSL_SESSION_dup, SSL_SESSION_free, SSL_SESSION_get_id
from l4mesh._native.types cimport GIVEN, SESSIONS, engine_t, session_t, worker_t


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


# -- given to clients ----------------------------------------------------------------------------------------------------------
#
# The number is random, and its first bytes are the place. Whoever takes a session out of its place owns it until it is back, so that no
# thread waits for another; one that looks meanwhile finds nothing, and the handshake is a full one. Connections get and leave copies:
# OpenSSL spoils the session of one that breaks off.

cdef inline SSL_SESSION **given_place(engine_t *engine, const uint8_t *id) noexcept nogil:
    cdef uint32_t number
    memcpy(&number, id, sizeof(number))
    return &engine.given[number & (GIVEN - 1)]


cdef inline void given_put(SSL_SESSION **place, SSL_SESSION *session) noexcept nogil:
    cdef SSL_SESSION *was = <SSL_SESSION *> exchange_pointer(<void **> place, session)
    if was != NULL:
        SSL_SESSION_free(was)


cdef inline void given_keep(engine_t *engine, const SSL_SESSION *session) noexcept nogil:
    cdef unsigned int length = 0
    cdef const uint8_t *id = SSL_SESSION_get_id(session, &length)
    cdef SSL_SESSION *copy
    if length < sizeof(uint32_t):
        return
    copy = SSL_SESSION_dup(session)
    if copy != NULL:
        given_put(given_place(engine, id), copy)


cdef inline SSL_SESSION *given_find(engine_t *engine, const uint8_t *id, uint32_t id_length) noexcept nogil:
    # The caller's, or NULL.
    cdef SSL_SESSION **place
    cdef SSL_SESSION *session
    cdef SSL_SESSION *copy = NULL
    cdef unsigned int length = 0
    cdef const uint8_t *own
    if id_length < sizeof(uint32_t):
        return NULL
    place = given_place(engine, id)
    session = <SSL_SESSION *> exchange_pointer(<void **> place, NULL)
    if session == NULL:
        return NULL
    own = SSL_SESSION_get_id(session, &length)
    if length == id_length and memcmp(own, id, length) == 0:
        copy = SSL_SESSION_dup(session)
    # Who has put one there meanwhile has a newer one.
    if not replace_pointer(<void **> place, NULL, session):
        SSL_SESSION_free(session)
    return copy


cdef inline void given_free(engine_t *engine) noexcept nogil:
    cdef uint32_t i
    if engine.given == NULL:
        return
    for i in range(<uint32_t> GIVEN):
        given_put(&engine.given[i], NULL)
