# Implementation, inlined into _fastpath: TLS as the transport of one side of a connection.
#
# OpenSSL reads from and writes to a BIO of the worker's, which all its connections share: a read is a recv straight into OpenSSL's
# buffer, as large as several records (SSL_CTX_set_read_ahead), and is skipped when the socket is known to be empty; a write gathers
# records in the worker's buffer until one send takes them all. What the socket did not take is the side's `out`, and nothing
# overtakes it. Between reads a side owns no buffer (SSL_MODE_RELEASE_BUFFERS).
#
# Peers are verified inside the handshake, so that the alert says what is wrong: the chain by OpenSSL (RFC 5280, with the purpose of
# the role), the leaf as the X509-SVID standard says (section 5), revocation by a table of the plan's. A resumed session skips all of
# that, and is checked again here, because it is where nginx (CVE-2025-23419) and Envoy (CVE-2022-21654) let peers in.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove, memset

from l4mesh._native.address cimport mix64
from l4mesh._native.balance cimport cluster_t
from l4mesh._native.debug cimport L4_BUG
from l4mesh._native.hello cimport HINT_EXTENSION, hint_read
from l4mesh._native.linux cimport EAGAIN, EINTR, MSG_NOSIGNAL, CLOCK_REALTIME, clock_gettime, errno, is_shortage, recv, send, timespec
from l4mesh._native.openssl cimport *
from l4mesh._native.sessions cimport given_find, given_keep, session_forget, session_keep
from l4mesh._native.spiffe cimport fnv_add, fnv_start, pattern_matches, spiffe_parse, spiffe_t, text_equal
from l4mesh._native.types cimport (
    CHAINS, CHAIN_KEYS, CIPHER_BYTES, FLOW_BLOCKED, FLOW_DESTINATION_RESET, FLOW_EXHAUSTED, FLOW_MORE, FLOW_SOURCE_RESET,
    PLAIN_BYTES, SIDE_ERROR, SIDE_FIN_SEEN, SIDE_PENDING, SIDE_READABLE, SIDE_RESET, SIDE_URGENT, SIDE_WRITABLE, TLS_ABUSED,
    TLS_ANSWERED, TLS_BAD_CERTIFICATE, TLS_BAD_RECORD, TLS_BROKEN, TLS_EXPIRED, TLS_FULL_ONLY, TLS_HEARD, TLS_INTERNAL, TLS_KEY_UPDATES,
    TLS_NOT_TLS, TLS_NOT_YET_VALID, TLS_NO_CERTIFICATE, TLS_NO_COMMON_PARAMETERS, TLS_OK, TLS_PEER_ALERT,
    TLS_PROTOCOL_VERSION, TLS_READY, TLS_READ_BYTES, TLS_RESUMED, TLS_REVOKED, TLS_SERVER, TLS_SHUT, TLS_STEP_BYTES, TLS_TRUNCATED,
    TLS_UNKNOWN_CA, TLS_WRONG_IDENTITY, chain_t, flow_t, plan_t, side_t, tls_context_t, tls_t, trust_t, worker_t,
)

cdef enum:
    KEY_UPDATES_A_SECOND = 100       # HAProxy's default (tune.ssl.keyupdate-rate-limit)
    TICKET_LIFETIME_S = 3600
    CHAIN_DEPTH = CHAIN_KEYS - 2
    CHAIN_BYTES = 32768
    OUT_MAX = 786432                 # of ciphertext that waits for the socket: a read's worth, and room for what TLS itself says

cdef enum handshake_t:
    HANDSHAKE_WAITS = 0
    HANDSHAKE_DONE = 1
    HANDSHAKE_FAILED = -1            # tls.cause says why; TLS_OK: worker.bio_errno does


# -- the worker's BIO --------------------------------------------------------------------------------------------------------

cdef inline int bio_feed(worker_t *worker, char *buffer, uint32_t size) noexcept nogil:
    # From what a large read has left.
    if size > worker.feed_length:
        size = worker.feed_length
    memcpy(buffer, worker.feed + worker.feed_offset, size)
    worker.feed_offset += size
    worker.feed_length -= size
    return <int> size


cdef inline int tls_bio_read(BIO *bio, char *buffer, int size) noexcept nogil:
    cdef worker_t *worker = <worker_t *> BIO_get_data(bio)
    cdef side_t *side = worker.bio_side
    cdef size_t most = <size_t> size
    cdef ssize_t n
    if worker.feed_length:
        return bio_feed(worker, buffer, <uint32_t> size)
    if not side.flags & SIDE_READABLE or worker.feed_offset:
        l4_bio_retry_read(bio)
        return -1
    l4_bio_no_retry(bio)
    if worker.feed_most:
        most = worker.feed_most
    while True:
        n = recv(side.fd, worker.feed if worker.feed_most else <uint8_t *> buffer, most, 0)
        if n >= 0 or errno != EINTR:
            break
    if n > 0:
        side.tls.flags |= TLS_HEARD
        # A short read empties the queue, as on the copy path; then the call that would only say so is spared.
        if <size_t> n < most and not side.flags & (SIDE_FIN_SEEN | SIDE_ERROR | SIDE_URGENT | SIDE_RESET):
            side.flags &= ~<uint32_t> SIDE_READABLE
        if worker.feed_most:
            worker.feed_offset = 0
            worker.feed_length = <uint32_t> n
            return bio_feed(worker, buffer, <uint32_t> size)
        return <int> n
    if n == 0:
        worker.bio_ended = 1
        return 0
    if errno == EAGAIN:
        side.flags &= ~<uint32_t> SIDE_READABLE
        l4_bio_retry_read(bio)
    elif is_shortage(errno):
        side.tls.cause = TLS_INTERNAL
    else:
        worker.bio_errno = errno
    return -1


cdef inline int tls_bio_write(BIO *bio, const char *data, int size) noexcept nogil:
    cdef worker_t *worker = <worker_t *> BIO_get_data(bio)
    l4_bio_no_retry(bio)
    if <uint32_t> size > CIPHER_BYTES - worker.cipher_length:
        L4_BUG(True, "more ciphertext than the buffer is made for")
        return -1
    memcpy(worker.cipher + worker.cipher_length, data, <size_t> size)
    worker.cipher_length += <uint32_t> size
    return size


cdef inline long tls_bio_ctrl(BIO *bio, int command, long number, void *argument) noexcept nogil:
    return command == BIO_CTRL_FLUSH


# -- who the peer is -----------------------------------------------------------------------------------------------------------

cdef inline int64_t unix_seconds() noexcept nogil:
    cdef timespec ts
    clock_gettime(CLOCK_REALTIME, &ts)
    return <int64_t> ts.tv_sec


cdef inline uint64_t certificate_key(
    uint64_t seed, const uint8_t *issuer, size_t issuer_length, const uint8_t *serial, size_t serial_length
) noexcept nogil:
    # Names a certificate as a revocation list does, by its issuer and serial number. Never 0.
    cdef uint64_t hash = fnv_start() ^ seed
    cdef size_t i
    for i in range(issuer_length):
        hash = fnv_add(hash, issuer[i])
    for i in range(serial_length):
        hash = fnv_add(hash, serial[i])
    hash = mix64(hash ^ (seed >> 7))
    return hash if hash else 1


cdef inline uint64_t x509_key(const worker_t *worker, X509 *cert) noexcept nogil:
    cdef const uint8_t *issuer = NULL
    cdef size_t length = 0
    cdef const ASN1_INTEGER *serial = X509_get0_serialNumber(cert)
    X509_NAME_get0_der(X509_get_issuer_name(cert), &issuer, &length)
    return certificate_key(
        worker.engine.revocation_seed, issuer, length, ASN1_STRING_get0_data(serial), <size_t> ASN1_STRING_length(serial)
    )


cdef inline bint plan_revokes(const plan_t *plan, uint64_t key) noexcept nogil:
    cdef uint32_t at = <uint32_t> key & plan.revoked_mask
    if plan.revoked == NULL:
        return False
    while plan.revoked[at]:
        if plan.revoked[at] == key:
            return True
        at = (at + 1) & plan.revoked_mask
    return False


cdef inline bint plan_revokes_chain(const plan_t *plan, const tls_t *tls) noexcept nogil:
    # The peer's certificate, or one that it hangs on.
    cdef uint32_t i
    for i in range(<uint32_t> CHAIN_KEYS):
        if tls.chain[i] and plan_revokes(plan, tls.chain[i]):
            return True
    return False


cdef inline bint cluster_expects(const cluster_t *cluster, const spiffe_t *peer) noexcept nogil:
    cdef uint32_t i
    for i in range(cluster.n_peers):
        if pattern_matches(&cluster.peers[i], cluster.peer_text, &peer.whole):
            return True
    return False


cdef inline int tls_check_leaf(worker_t *worker, tls_t *tls, X509 *cert) noexcept nogil:
    # The X509-SVID standard's demands on a leaf (section 5.2), our trust domain, and who is expected. A tls_cause_t.
    cdef GENERAL_NAMES *names = NULL
    cdef const uint8_t *text = NULL
    cdef int length = 0
    cdef int found
    cdef uint32_t usage = X509_get_key_usage(cert)
    cdef spiffe_t peer
    cdef int cause = TLS_OK
    if X509_get_extension_flags(cert) & (EXFLAG_CA | EXFLAG_INVALID):
        return TLS_BAD_CERTIFICATE
    if usage != <uint32_t> -1 and usage & (KU_KEY_CERT_SIGN | KU_CRL_SIGN):
        return TLS_BAD_CERTIFICATE
    found = l4_uri_names(cert, &names, &text, &length)
    if found != 1 or not spiffe_parse(<const char *> text, <uint32_t> length, &peer):
        cause = TLS_BAD_CERTIFICATE
    elif not text_equal(&peer.trust_domain, tls.trust.domain, tls.trust.domain_length):
        cause = TLS_WRONG_IDENTITY
    elif tls.cluster != NULL and not cluster_expects(tls.cluster, &peer):
        cause = TLS_WRONG_IDENTITY
    else:
        free(tls.peer)
        tls.peer = <char *> malloc(<size_t> length + 1)
        if tls.peer == NULL:
            cause = TLS_INTERNAL
        else:
            memcpy(tls.peer, text, <size_t> length)
            tls.peer[length] = 0
            tls.peer_length = <uint32_t> length
            tls.chain[0] = x509_key(worker, cert)
            tls.peer_expires_s = l4_expires_s(cert)
    if names != NULL:
        GENERAL_NAMES_free(names)
    return cause


cdef inline int verify_cause(int error) noexcept nogil:
    if error == X509_V_ERR_CERT_HAS_EXPIRED:
        return TLS_EXPIRED
    if error == X509_V_ERR_CERT_NOT_YET_VALID:
        return TLS_NOT_YET_VALID
    if error == X509_V_ERR_OUT_OF_MEM:
        return TLS_INTERNAL
    if (
        error == X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT or error == X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY
        or error == X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN or error == X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT
        or error == X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE or error == X509_V_ERR_CERT_SIGNATURE_FAILURE
    ):
        return TLS_UNKNOWN_CA
    return TLS_BAD_CERTIFICATE


cdef inline int tls_verify(int ok, X509_STORE_CTX *store) noexcept nogil:
    # OpenSSL asks for each certificate of the chain, from the root to the leaf.
    cdef SSL *ssl = <SSL *> X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx())
    cdef tls_t *tls = <tls_t *> SSL_get_ex_data(ssl, 0)
    cdef worker_t *worker = <worker_t *> tls.worker
    cdef X509 *cert = X509_STORE_CTX_get_current_cert(store)
    cdef int depth = X509_STORE_CTX_get_error_depth(store)
    cdef uint64_t key
    cdef int cause
    if not ok:
        tls.cause = <uint8_t> verify_cause(X509_STORE_CTX_get_error(store))
        return 0
    key = x509_key(worker, cert)
    if plan_revokes(worker.plan, key):
        tls.cause = TLS_REVOKED
        X509_STORE_CTX_set_error(store, X509_V_ERR_CERT_REVOKED)
        return 0
    if 0 <= depth < CHAIN_KEYS:
        tls.chain[depth] = key
    if depth == 0:
        cause = tls_check_leaf(worker, tls, cert)
        if cause != TLS_OK:
            tls.cause = <uint8_t> cause
            X509_STORE_CTX_set_error(store, X509_V_ERR_CERT_REJECTED)
            return 0
    return 1


cdef inline bint session_put_chain(const tls_t *tls, SSL_SESSION *session) noexcept nogil:
    # A session holds the peer's certificate and not what it hangs on; so we put that into it.
    return SSL_SESSION_set1_ticket_appdata(session, tls.chain, sizeof(tls.chain)) == 1


cdef inline bint session_take_chain(tls_t *tls, SSL_SESSION *session) noexcept nogil:
    cdef void *data = NULL
    cdef size_t length = 0
    if SSL_SESSION_get0_ticket_appdata(session, &data, &length) != 1 or length != sizeof(tls.chain):
        return False
    memcpy(tls.chain, data, length)
    return True


cdef inline int tls_check_resumed(worker_t *worker, tls_t *tls) noexcept nogil:
    # A resumed session was verified when it was made; what may have changed since is looked at again. A tls_cause_t.
    cdef X509 *cert = SSL_get0_peer_certificate(tls.ssl)
    if cert == NULL:
        return TLS_NO_CERTIFICATE
    if not session_take_chain(tls, SSL_get_session(tls.ssl)):
        return TLS_INTERNAL
    if l4_expires_s(cert) <= unix_seconds():
        return TLS_EXPIRED
    return tls_check_leaf(worker, tls, cert)


# -- chains that were verified before ------------------------------------------------------------------------------------------

cdef inline bint chain_digest(worker_t *worker, const tls_t *tls, X509_STORE_CTX *store, uint8_t *key) noexcept nogil:
    # Names what X509_verify_cert would judge: the bundle, our role, and every certificate that the peer sent. False: can't be told.
    cdef l4_chain_t *sent = X509_STORE_CTX_get0_untrusted(store)
    cdef uint8_t *end = worker.plain
    cdef X509 *cert
    cdef int i, length
    memcpy(end, tls.trust.bundle, 32)
    end[32] = tls.flags & TLS_SERVER
    end += 33
    for i in range(-1, l4_chain_length(sent)):
        cert = X509_STORE_CTX_get0_cert(store) if i < 0 else l4_chain_at(sent, i)
        length = i2d_X509(cert, NULL)
        if length <= 0 or length > PLAIN_BYTES - (end - worker.plain):
            return False
        if i2d_X509(cert, &end) != length:
            return False
    return EVP_Digest(worker.plain, <size_t> (end - worker.plain), key, NULL, EVP_sha256(), NULL) == 1


cdef inline chain_t *chain_place(worker_t *worker, const uint8_t *key) noexcept nogil:
    # NULL: no memory.
    cdef uint32_t hash
    if worker.chains == NULL:
        worker.chains = <chain_t *> calloc(CHAINS, sizeof(chain_t))
        if worker.chains == NULL:
            return NULL
    memcpy(&hash, key, sizeof(hash))
    return &worker.chains[hash & (CHAINS - 1)]


cdef inline void chain_keep(const tls_t *tls, chain_t *place, const uint8_t *key, const l4_chain_t *chain) noexcept nogil:
    cdef int n = l4_chain_length(chain)
    cdef int i
    cdef int64_t begins_s, expires_s
    place.expires_s = 0
    if n > CHAIN_KEYS:
        return
    memcpy(place.key, key, 32)
    memcpy(place.keys, tls.chain, sizeof(place.keys))
    for i in range(n):
        begins_s = l4_begins_s(l4_chain_at(chain, i))
        expires_s = l4_expires_s(l4_chain_at(chain, i))
        if i == 0 or begins_s > place.begins_s:
            place.begins_s = begins_s
        if i == 0 or expires_s < place.expires_s:
            place.expires_s = expires_s


cdef inline int tls_verify_chain(X509_STORE_CTX *store, void *argument) noexcept nogil:
    # In the place of X509_verify_cert: the same chain under the same bundle has the same answer as long as all of it is valid, and a
    # mesh sees the same few chains over and over. Two signatures are spared; that the peer has the key, it proves anew each time, and
    # who it is, who is expected and what is revoked are looked at here as there.
    cdef SSL *ssl = <SSL *> X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx())
    cdef tls_t *tls = <tls_t *> SSL_get_ex_data(ssl, 0)
    cdef worker_t *worker = <worker_t *> tls.worker
    cdef uint8_t key[32]
    cdef chain_t *place = NULL
    cdef int64_t now_s = unix_seconds()
    cdef int answer, cause = TLS_OK
    # A session that was offered and not resumed has left the chain that it was made under.
    memset(tls.chain, 0, sizeof(tls.chain))
    if chain_digest(worker, tls, store, key):
        place = chain_place(worker, key)
    if place == NULL or place.expires_s <= now_s or place.begins_s > now_s or memcmp(place.key, key, 32) != 0:
        answer = X509_verify_cert(store)
        if answer == 1 and place != NULL:
            chain_keep(tls, place, key, X509_STORE_CTX_get0_chain(store))
        return answer
    memcpy(tls.chain, place.keys, sizeof(tls.chain))
    if plan_revokes_chain(worker.plan, tls):
        cause = TLS_REVOKED
    if cause == TLS_OK:
        cause = tls_check_leaf(worker, tls, X509_STORE_CTX_get0_cert(store))
    if cause == TLS_OK:
        return 1
    tls.cause = <uint8_t> cause
    X509_STORE_CTX_set_error(store, X509_V_ERR_CERT_REVOKED if cause == TLS_REVOKED else X509_V_ERR_CERT_REJECTED)
    return 0


# -- sessions ------------------------------------------------------------------------------------------------------------------

cdef inline int tls_new_session(SSL *ssl, SSL_SESSION *session) noexcept nogil:
    # A server gave us a session to resume, or we give one to a client. 1: we keep the reference.
    cdef tls_t *tls = <tls_t *> SSL_get_ex_data(ssl, 0)
    cdef worker_t *worker = <worker_t *> tls.worker
    if tls.flags & TLS_FULL_ONLY or tls.peer == NULL or not session_put_chain(tls, session):
        return 0
    if tls.flags & TLS_SERVER:
        given_keep(worker.engine, session)
        return 0
    return SSL_SESSION_is_resumable(session) and session_keep(worker, tls.context_id, &tls.endpoint, session, tls.peer_expires_s)


cdef inline SSL_SESSION *tls_find_session(SSL *ssl, const uint8_t *id, int length, int *copy) noexcept nogil:
    # A client offers a session of ours. OpenSSL itself refuses that of another context (SSL_CTX_set_session_id_context), but only after
    # us, when the client would have been told that it needs no new one.
    cdef tls_t *tls = <tls_t *> SSL_get_ex_data(ssl, 0)
    cdef worker_t *worker = <worker_t *> tls.worker
    cdef SSL_SESSION *session = NULL
    cdef const uint8_t *context
    cdef unsigned int context_length = 0
    cdef X509 *cert
    cdef int64_t now_s = unix_seconds()
    copy[0] = 0
    if not tls.flags & TLS_FULL_ONLY:
        session = given_find(worker.engine, id, <uint32_t> length)
    if session == NULL:
        return NULL
    cert = SSL_SESSION_get0_peer(session)
    context = SSL_SESSION_get0_id_context(session, &context_length)
    if (
        context_length != sizeof(tls.context_id) or memcmp(context, &tls.context_id, sizeof(tls.context_id)) != 0
        or cert == NULL or l4_expires_s(cert) <= now_s or not session_take_chain(tls, session) or plan_revokes_chain(worker.plan, tls)
    ):
        memset(tls.chain, 0, sizeof(tls.chain))
        SSL_SESSION_free(session)
        return NULL
    # A session in the first half of its life serves again: the client is spared a new one, and we its making.
    if now_s - SSL_SESSION_get_time(session) < TICKET_LIFETIME_S // 2:
        SSL_set_num_tickets(ssl, 0)
    return session


cdef inline void tls_message(
    int written, int version, int kind, const void *message, size_t length, SSL *ssl, void *argument
) noexcept nogil:
    # Counts the key updates of the peer: each makes us derive keys and answer.
    cdef tls_t *tls
    cdef worker_t *worker
    if written or kind != SSL3_RT_HANDSHAKE or length == 0 or (<const uint8_t *> message)[0] != SSL3_MT_KEY_UPDATE:
        return
    tls = <tls_t *> SSL_get_ex_data(ssl, 0)
    worker = <worker_t *> tls.worker
    if worker.now_ms - tls.key_updates_from_ms >= 1000:
        tls.key_updates_from_ms = worker.now_ms
        tls.key_updates = 0
    tls.key_updates += 1
    if tls.key_updates > KEY_UPDATES_A_SECOND:
        tls.flags |= TLS_ABUSED


cdef inline void tls_info(const SSL *ssl, int what, int value) noexcept nogil:
    cdef tls_t *tls
    if what == SSL_CB_READ_ALERT and value & 0xff:
        tls = <tls_t *> SSL_get_ex_data(ssl, 0)
        tls.alert = <uint8_t> (value & 0xff)
    elif what == SSL_CB_WRITE_ALERT and value & 0xff == SSL_AD_INTERNAL_ERROR:
        # Not all of OpenSSL says that it was memory that it lacked; but it never blames the peer for that.
        tls = <tls_t *> SSL_get_ex_data(ssl, 0)
        if tls.cause == TLS_OK:
            tls.cause = TLS_INTERNAL


cdef inline int tls_add_hint(
    SSL *ssl, unsigned int kind, unsigned int where, const uint8_t **data, size_t *length, X509 *cert, size_t index, int *alert,
    void *argument
) noexcept nogil:
    # Into our ClientHello. A number among few says no more to who listens on the wire than the ports do, and it is believed for
    # nothing but the order of work of the one who sends it.
    data[0] = &(<tls_t *> SSL_get_ex_data(ssl, 0)).lane_hint
    length[0] = 1
    return 1


cdef inline int tls_parse_hint(
    SSL *ssl, unsigned int kind, unsigned int where, const uint8_t *data, size_t length, X509 *cert, size_t index, int *alert,
    void *argument
) noexcept nogil:
    (<tls_t *> SSL_get_ex_data(ssl, 0)).lane_hint = hint_read(data, length)
    return 1


# -- contexts ------------------------------------------------------------------------------------------------------------------

cdef inline bint context_configure(SSL_CTX *ctx, uint64_t id) noexcept nogil:
    # All but the certificates. The same context serves both roles. False: OpenSSL refused a setting.
    SSL_CTX_set_options(ctx, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION | SSL_OP_CIPHER_SERVER_PREFERENCE)
    l4_ssl_ctx_set_mode(ctx, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER)
    l4_read_ahead(ctx, TLS_READ_BYTES)
    l4_own_cache(ctx)
    l4_max_cert_list(ctx, CHAIN_BYTES)
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, tls_verify)
    SSL_CTX_set_verify_depth(ctx, CHAIN_DEPTH)
    SSL_CTX_set_cert_verify_callback(ctx, tls_verify_chain, NULL)
    SSL_CTX_set_timeout(ctx, TICKET_LIFETIME_S)
    SSL_CTX_sess_set_new_cb(ctx, tls_new_session)
    SSL_CTX_sess_set_get_cb(ctx, tls_find_session)
    SSL_CTX_set_msg_callback(ctx, tls_message)
    SSL_CTX_set_info_callback(ctx, tls_info)
    # Any CA of the bundle ends a chain, as for SPIFFE's own validators: a bundle may hold an intermediate without its root.
    X509_STORE_set_flags(SSL_CTX_get_cert_store(ctx), X509_V_FLAG_PARTIAL_CHAIN)
    return (
        SSL_CTX_set_num_tickets(ctx, 1) == 1
        and SSL_CTX_set_session_id_context(ctx, <const uint8_t *> &id, sizeof(id)) == 1
        and SSL_CTX_set_ciphersuites(ctx, b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256") == 1
        and SSL_CTX_set_cipher_list(ctx, b"ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:"
                                         b"ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384") == 1
        and l4_set_groups(ctx, b"X25519:P-256") == 1
        and SSL_CTX_add_custom_ext(
            ctx, HINT_EXTENSION, SSL_EXT_CLIENT_HELLO, tls_add_hint, NULL, NULL, tls_parse_hint, NULL
        ) == 1
    )


cdef inline bint tls_open(
    worker_t *worker, side_t *side, const tls_context_t *context, bint is_server, bint v12, bint resumption, const char *sni
) noexcept nogil:
    # TLS on a side that is plaintext so far. False: no memory.
    cdef tls_t *tls = <tls_t *> calloc(1, sizeof(tls_t))
    if tls == NULL:
        return False
    tls.ssl = SSL_new(context.ctx)
    # A copy: the context may be replaced while the handshake goes on.
    tls.trust = <trust_t *> malloc(sizeof(trust_t))
    if (
        tls.ssl == NULL or tls.trust == NULL or SSL_set_ex_data(tls.ssl, 0, tls) != 1
        or (sni != NULL and not is_server and l4_set_sni(tls.ssl, sni) != 1)
    ):
        SSL_free(tls.ssl)
        free(tls.trust)
        free(tls)
        return False
    tls.trust[0] = context.trust
    tls.worker = worker
    tls.context_id = context.id
    BIO_up_ref(worker.bio)
    SSL_set_bio(tls.ssl, worker.bio, worker.bio)
    l4_min_version(tls.ssl, TLS1_2_VERSION if v12 else TLS1_3_VERSION)
    if is_server:
        tls.flags = TLS_SERVER
        # A ticket is the number of a session that we keep (sessions.pxd), not the session itself: to read a peer's certificate out
        # of one again takes OpenSSL 3.0 as long as a third of a handshake.
        SSL_set_options(tls.ssl, SSL_OP_NO_TICKET)
        SSL_set_accept_state(tls.ssl)
    else:
        SSL_set_connect_state(tls.ssl)
    if not resumption:
        tls.flags |= TLS_FULL_ONLY
        SSL_set_num_tickets(tls.ssl, 0)
    side.tls = tls
    return True


cdef inline void tls_free(side_t *side) noexcept nogil:
    if side.tls == NULL:
        return
    SSL_free(side.tls.ssl)
    free(side.tls.out)
    free(side.tls.peer)
    free(side.tls.trust)
    free(side.tls)
    side.tls = NULL


# -- out -----------------------------------------------------------------------------------------------------------------------

cdef inline bint tls_park(tls_t *tls, const uint8_t *data, size_t length) noexcept nogil:
    # Keeps ciphertext until the socket takes it. False: no memory, or more than a peer may make us keep.
    cdef uint8_t *room
    if length == 0:
        return True
    if tls.out_length + length > OUT_MAX:
        return False
    if tls.out_offset:
        memmove(tls.out, tls.out + tls.out_offset, tls.out_length)
        tls.out_offset = 0
    room = <uint8_t *> realloc(tls.out, tls.out_length + length)
    if room == NULL:
        return False
    tls.out = room
    memcpy(tls.out + tls.out_length, data, length)
    tls.out_length += <uint32_t> length
    return True


cdef inline flow_t tls_sent(side_t *side, int32_t *error) noexcept nogil:
    # What a failed send means; reads errno.
    if errno == EAGAIN:
        side.flags &= ~<uint32_t> SIDE_WRITABLE
        return FLOW_BLOCKED
    if is_shortage(errno):
        return FLOW_EXHAUSTED
    error[0] = errno
    side.flags |= SIDE_RESET | SIDE_READABLE
    return FLOW_DESTINATION_RESET


cdef inline flow_t tls_flush(side_t *side, int32_t *error) noexcept nogil:
    # FLOW_MORE when nothing waits any more.
    cdef tls_t *tls = side.tls
    cdef ssize_t n
    while tls.out_length:
        if not side.flags & SIDE_WRITABLE:
            return FLOW_BLOCKED
        n = send(side.fd, tls.out + tls.out_offset, tls.out_length, MSG_NOSIGNAL)
        if n < 0:
            if errno == EINTR:
                continue
            return tls_sent(side, error)
        tls.out_offset += <uint32_t> n
        tls.out_length -= <uint32_t> n
        if tls.out_length:
            side.flags &= ~<uint32_t> SIDE_WRITABLE
    free(tls.out)
    tls.out = NULL
    tls.out_offset = 0
    return FLOW_MORE


cdef inline flow_t tls_emit(worker_t *worker, side_t *side, int32_t *error) noexcept nogil:
    # Sends what OpenSSL has written. FLOW_MORE: it is sent or kept.
    cdef uint32_t length = worker.cipher_length
    cdef ssize_t n = 0
    cdef flow_t flow
    worker.cipher_length = 0
    if length == 0:
        return FLOW_MORE
    if side.tls.out_length == 0 and side.flags & SIDE_WRITABLE:
        n = send(side.fd, worker.cipher, length, MSG_NOSIGNAL)
        if n < 0:
            flow = tls_sent(side, error)
            if flow != FLOW_BLOCKED:
                return flow
            n = 0
        elif <uint32_t> n < length:
            side.flags &= ~<uint32_t> SIDE_WRITABLE
    return FLOW_MORE if tls_park(side.tls, worker.cipher + n, length - <size_t> n) else FLOW_EXHAUSTED


# -- the transport -------------------------------------------------------------------------------------------------------------

cdef inline void tls_begin(worker_t *worker, side_t *side) noexcept nogil:
    # Before every call of OpenSSL's: an error that another connection left on this thread's queue must not become this one's.
    worker.bio_side = side
    worker.bio_errno = 0
    worker.bio_ended = 0
    worker.cipher_length = 0
    worker.feed_offset = 0
    worker.feed_length = 0
    worker.feed_most = 0
    ERR_clear_error()


cdef inline void tls_fail(worker_t *worker, tls_t *tls) noexcept nogil:
    # Finds the cause of an error that OpenSSL has just reported, unless it is known already.
    cdef int reason = l4_peek_reason()
    if tls.cause != TLS_OK:
        return
    if worker.bio_side.flags & SIDE_RESET:
        # What it said before its reset met a write of ours.
        if tls.alert:
            tls.cause = TLS_PEER_ALERT
    elif worker.bio_ended:
        tls.cause = TLS_TRUNCATED
    elif worker.bio_errno:
        return
    elif tls.alert:
        tls.cause = TLS_PEER_ALERT
    elif l4_out_of_memory() or not tls.flags & TLS_HEARD:
        tls.cause = TLS_INTERNAL
    elif reason == SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE:
        tls.cause = TLS_NO_CERTIFICATE
    elif (
        reason == SSL_R_HTTP_REQUEST or reason == SSL_R_HTTPS_PROXY_REQUEST or reason == SSL_R_WRONG_VERSION_NUMBER
        or reason == SSL_R_UNKNOWN_PROTOCOL
    ):
        tls.cause = TLS_NOT_TLS if not tls.flags & TLS_READY else TLS_BAD_RECORD
    elif reason == SSL_R_UNSUPPORTED_PROTOCOL or reason == SSL_R_VERSION_TOO_LOW or reason == SSL_R_NO_PROTOCOLS_AVAILABLE:
        tls.cause = TLS_PROTOCOL_VERSION
    elif reason == SSL_R_NO_SHARED_CIPHER or reason == SSL_R_NO_SUITABLE_KEY_SHARE or reason == SSL_R_NO_SHARED_GROUPS:
        tls.cause = TLS_NO_COMMON_PARAMETERS
    else:
        tls.cause = TLS_BAD_RECORD


cdef inline handshake_t tls_handshake(worker_t *worker, side_t *side, int32_t *error) noexcept nogil:
    # As far as it goes with what has arrived.
    cdef tls_t *tls = side.tls
    cdef int rc, why
    cdef flow_t flow
    if tls.out_length:
        flow = tls_flush(side, error)
        if flow == FLOW_EXHAUSTED:
            tls.cause = TLS_INTERNAL
        if flow == FLOW_EXHAUSTED or flow == FLOW_DESTINATION_RESET:
            return HANDSHAKE_FAILED
    tls_begin(worker, side)
    rc = SSL_do_handshake(tls.ssl)
    why = SSL_get_error(tls.ssl, rc) if rc != 1 else SSL_ERROR_NONE
    if rc != 1 and why != SSL_ERROR_WANT_READ:
        tls_fail(worker, tls)
        if tls.cause == TLS_OK:
            error[0] = worker.bio_errno
        tls_emit(worker, side, error)
        return HANDSHAKE_FAILED
    if tls_emit(worker, side, error) == FLOW_EXHAUSTED:
        tls.cause = TLS_INTERNAL
        return HANDSHAKE_FAILED
    if rc != 1:
        return HANDSHAKE_WAITS
    if SSL_session_reused(tls.ssl):
        tls.flags |= TLS_RESUMED
        tls.cause = <uint8_t> tls_check_resumed(worker, tls)
    elif tls.peer == NULL:
        # The callback decides; this is for the day on which OpenSSL does not call it (CVE-2024-12797).
        tls.cause = TLS_NO_CERTIFICATE
    if tls.cause == TLS_OK and plan_revokes_chain(worker.plan, tls):
        # Also when the callback has looked: a peer may have kept us waiting since, and the list may have changed meanwhile.
        tls.cause = TLS_REVOKED
    if tls.cause != TLS_OK:
        if not tls.flags & TLS_SERVER:
            session_forget(worker, tls.context_id, &tls.endpoint)
        return HANDSHAKE_FAILED
    tls.flags |= TLS_READY
    tls.cluster = NULL
    free(tls.trust)
    tls.trust = NULL
    if SSL_has_pending(tls.ssl):
        side.flags |= SIDE_PENDING
    return HANDSHAKE_DONE


cdef inline flow_t tls_read(
    worker_t *worker, side_t *side, uint32_t large, uint32_t limit, size_t *length, bint *ended, int32_t *error
) noexcept nogil:
    # Into worker.plain: what OpenSSL has, and what comes of one read of `large` bytes; or, where that is 0, up to TLS_STEP_BYTES and no
    # more than `limit`.
    # FLOW_SOURCE_RESET: the peer broke off or broke the rules; `length` bytes before that are good. `ended`: the peer's close_notify.
    cdef tls_t *tls = side.tls
    cdef size_t room = large + TLS_STEP_BYTES if large else TLS_STEP_BYTES if limit > TLS_STEP_BYTES else limit
    cdef size_t n
    cdef int rc, why
    cdef flow_t flow = FLOW_BLOCKED
    length[0] = 0
    if tls.flags & TLS_BROKEN:
        return FLOW_SOURCE_RESET
    tls_begin(worker, side)
    if large:
        worker.feed_most = large
    while True:
        if length[0] == room:
            L4_BUG(worker.feed_length != 0, "a large read is larger than its step")
            side.flags |= SIDE_PENDING
            flow = FLOW_MORE
            break
        rc = SSL_read_ex(tls.ssl, worker.plain + length[0], room - length[0], &n)
        if rc == 1:
            length[0] += n
            continue
        side.flags &= ~<uint32_t> SIDE_PENDING
        why = SSL_get_error(tls.ssl, rc)
        if why == SSL_ERROR_ZERO_RETURN:
            ended[0] = True
            flow = FLOW_MORE
        elif why != SSL_ERROR_WANT_READ:
            tls_fail(worker, tls)
            if worker.bio_errno:
                error[0] = worker.bio_errno
            flow = FLOW_SOURCE_RESET
        elif side.flags & SIDE_READABLE:
            flow = FLOW_MORE
        break
    if length[0]:
        tls.flags |= TLS_ANSWERED
        worker.bytes_encrypted += length[0]
    # Answers to key updates. A failure to send shows at the next read.
    if tls_emit(worker, side, error) == FLOW_EXHAUSTED:
        flow = FLOW_EXHAUSTED
    if tls.flags & TLS_ABUSED:
        tls.cause = TLS_KEY_UPDATES
        flow = FLOW_SOURCE_RESET
    if flow == FLOW_SOURCE_RESET:
        tls.flags |= TLS_BROKEN
        side.flags |= SIDE_RESET | SIDE_READABLE
    return flow


cdef inline flow_t tls_write(worker_t *worker, side_t *side, const uint8_t *data, size_t length, int32_t *error) noexcept nogil:
    # All of it, as records: sent, or kept for the socket. FLOW_BLOCKED: kept.
    cdef size_t written = 0
    cdef flow_t flow
    tls_begin(worker, side)
    if SSL_write_ex(side.tls.ssl, data, length, &written) != 1 or written != length:
        side.tls.cause = TLS_INTERNAL
        return FLOW_EXHAUSTED
    worker.bytes_encrypted += length
    flow = tls_emit(worker, side, error)
    if flow == FLOW_MORE and side.tls.out_length:
        return FLOW_BLOCKED
    return flow


cdef inline flow_t tls_shut(worker_t *worker, side_t *side, int32_t *error) noexcept nogil:
    # Says that nothing more will come: the TLS form of a FIN.
    tls_begin(worker, side)
    if SSL_shutdown(side.tls.ssl) < 0 and l4_out_of_memory():
        side.tls.cause = TLS_INTERNAL
        return FLOW_EXHAUSTED
    side.tls.flags |= TLS_SHUT
    return tls_emit(worker, side, error)
