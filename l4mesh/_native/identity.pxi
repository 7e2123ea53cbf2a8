# Part of _fastpath: an identity as the handshakes need it, and what of OpenSSL they are made with.


# OpenSSL 3.0 builds its list of decoders anew for each public key of each certificate that a peer sends, and for that walks over all
# algorithms that it has, of every kind: twice as much work as all of a handshake's cryptography. So we use a library context of our
# own, whose one provider is the default one with only what a handshake of a mesh can need. Random numbers it has all of. What reads a
# key of any kind and names it ("DER" of the decoders) isn't needed, for a certificate says of what kind its key is.
cdef OSSL_PROVIDER *default_provider = NULL
cdef OSSL_LIB_CTX *own_library = NULL
cdef OSSL_ALGORITHM own_algorithms[OSSL_OP__HIGHEST + 1][16]
cdef OSSL_DISPATCH own_dispatch[3]

cdef dict NEEDED = {
    OSSL_OP_DIGEST: (b"SHA1", b"SHA2-224", b"SHA2-256", b"SHA2-384", b"SHA2-512", b"MD5", b"MD5-SHA1", b"NULL"),
    OSSL_OP_CIPHER: (b"AES-128-GCM", b"AES-256-GCM", b"ChaCha20-Poly1305", b"AES-256-CTR", b"AES-256-ECB", b"NULL"),
    OSSL_OP_MAC: (b"HMAC",),
    OSSL_OP_KDF: (b"HKDF", b"TLS13-KDF", b"TLS1-PRF"),
    OSSL_OP_KEYMGMT: (b"RSA", b"RSA-PSS", b"EC", b"X25519", b"ED25519", b"HMAC"),
    OSSL_OP_KEYEXCH: (b"ECDH", b"X25519"),
    OSSL_OP_SIGNATURE: (b"RSA", b"ECDSA", b"ED25519", b"HMAC"),
    OSSL_OP_DECODER: (b"RSA", b"RSA-PSS", b"EC", b"ED25519"),
}


cdef void choose_algorithms(int operation, tuple names):
    cdef int no_cache = 0
    cdef const OSSL_ALGORITHM *offered = OSSL_PROVIDER_query_operation(default_provider, operation, &no_cache)
    cdef void *provider = OSSL_PROVIDER_get0_provider_ctx(default_provider)
    cdef OSSL_ALGORITHM *chosen = own_algorithms[operation]
    cdef bytes name
    while offered != NULL and offered.algorithm_names != NULL and chosen < &own_algorithms[operation][15]:
        name = offered.algorithm_names.split(b":")[0]
        if name in names and (operation != OSSL_OP_DECODER or b"structure=SubjectPublicKeyInfo" in offered.property_definition):
            chosen[0] = offered[0]
            if gcm_library.name != NULL and name == b"AES-128-GCM":
                gcm_take_over(chosen, &gcm_kinds[0], <dispatch_function_t> gcm_new_128, provider)
            elif gcm_library.name != NULL and name == b"AES-256-GCM":
                gcm_take_over(chosen, &gcm_kinds[1], <dispatch_function_t> gcm_new_256, provider)
            elif operation == OSSL_OP_KEYMGMT and name == b"EC":
                p256_take_over_manager(chosen, provider)
            elif operation == OSSL_OP_DECODER and name == b"EC":
                p256_take_over_decoder(chosen)
            chosen += 1
        offered += 1
    chosen.algorithm_names = NULL


cdef const OSSL_ALGORITHM *provider_query(void *context, int operation, int *no_cache) noexcept nogil:
    no_cache[0] = 0
    if operation == OSSL_OP_RAND:
        return OSSL_PROVIDER_query_operation(default_provider, operation, no_cache)
    return own_algorithms[operation] if 0 < operation <= OSSL_OP__HIGHEST else NULL


cdef int provider_capabilities(
    void *context, const char *capability, int (*callback)(const void *, void *) noexcept nogil, void *argument
) noexcept nogil:
    return OSSL_PROVIDER_get_capabilities(default_provider, capability, callback, argument)


cdef int provider_init(
    const OSSL_CORE_HANDLE *core, const OSSL_DISPATCH *offered, const OSSL_DISPATCH **ours, void **context
) noexcept nogil:
    p256_connect(offered)
    ours[0] = own_dispatch
    context[0] = OSSL_PROVIDER_get0_provider_ctx(default_provider)
    return 1


cdef OSSL_LIB_CTX *tls_library():
    # NULL is the default library context: where the system is set up for FIPS it decides which provider serves.
    global default_provider, own_library
    if own_library != NULL or EVP_default_properties_is_fips_enabled(NULL):
        return own_library
    default_provider = OSSL_PROVIDER_load(NULL, b"default")
    if default_provider == NULL:
        return NULL
    gcm_open()
    for operation, names in NEEDED.items():
        choose_algorithms(operation, names)
    own_dispatch[0].function_id = OSSL_FUNC_PROVIDER_QUERY_OPERATION
    own_dispatch[0].function = <dispatch_function_t> provider_query
    own_dispatch[1].function_id = OSSL_FUNC_PROVIDER_GET_CAPABILITIES
    own_dispatch[1].function = <dispatch_function_t> provider_capabilities
    own_library = OSSL_LIB_CTX_new()
    if own_library != NULL and (
        OSSL_PROVIDER_add_builtin(own_library, b"l4mesh", provider_init) != 1 or OSSL_PROVIDER_load(own_library, b"l4mesh") == NULL
    ):
        OSSL_LIB_CTX_free(own_library)
        own_library = NULL
    return own_library


cdef BIO *open_pem(bytes pem) except NULL:
    cdef BIO *bio = BIO_new_mem_buf(<const char *> pem, <int> len(pem))
    if bio == NULL:
        raise MemoryError
    ERR_clear_error()
    return bio


cdef X509 *read_certificate(BIO *bio) except? NULL:
    # The next one, or NULL. The end is not to be mistaken for a want of memory: half a bundle would be taken for the whole.
    cdef X509 *cert = X509_new_ex(tls_library(), NULL)
    cdef X509 *read = PEM_read_bio_X509(bio, &cert, NULL, NULL) if cert != NULL else NULL
    if read == NULL:
        if cert == NULL or l4_out_of_memory():
            X509_free(cert)
            raise MemoryError
        X509_free(cert)
    return read


cdef class TlsContext:
    """One identity, ready for handshakes in both roles: certificate, key and the bundle that its peers must chain to."""

    cdef tls_context_t context

    def __cinit__(
        self, uint64_t id, str identity not None, bytes certificates not None, bytes private_key not None, bytes bundle not None
    ):
        """All in PEM; ``certificates`` from the leaf upwards. ``id`` must differ from that of every other context: sessions are
        bound to it. Raises ValueError, which says which of the files is wrong, and MemoryError."""
        cdef bytes text = identity.encode()
        cdef spiffe_t parsed
        if not spiffe_parse(text, <uint32_t> len(text), &parsed):
            raise ValueError(f"{identity} is not a SPIFFE ID")
        self.context.id = id
        self.context.identity = strdup(text)
        self.context.ctx = SSL_CTX_new_ex(tls_library(), NULL, TLS_method())
        if self.context.identity == NULL or self.context.ctx == NULL:
            raise MemoryError
        self.context.identity_length = parsed.whole.length
        self.context.trust.domain_length = parsed.trust_domain.length
        memcpy(self.context.trust.domain, parsed.trust_domain.at, parsed.trust_domain.length)
        ERR_clear_error()
        # What a chain is remembered by: two bundles must never have the same.
        if EVP_Digest(<const uint8_t *> bundle, len(bundle), self.context.trust.bundle, NULL, EVP_sha256(), NULL) != 1:
            raise MemoryError
        if not context_configure(self.context.ctx, id):
            if l4_out_of_memory():
                raise MemoryError
            raise ValueError("this OpenSSL lacks a cipher or a group that is needed")
        self.add_certificates(certificates)
        self.add_key(private_key)
        self.add_bundle(bundle)

    def __dealloc__(self):
        SSL_CTX_free(self.context.ctx)
        free(self.context.identity)

    cdef int add_certificates(self, bytes pem) except -1:
        cdef BIO *bio = open_pem(pem)
        cdef X509 *cert
        cdef int n = 0
        cdef int ok = 1
        try:
            while ok:
                cert = read_certificate(bio)
                if cert == NULL:
                    break
                ok = SSL_CTX_use_certificate(self.context.ctx, cert) if n == 0 else l4_add_chain(self.context.ctx, cert)
                X509_free(cert)
                n += 1
        finally:
            BIO_free(bio)
        if n == 0 or not ok:
            if l4_out_of_memory():
                raise MemoryError
            raise ValueError("OpenSSL can't read the certificate, or refuses its key or signature as weak or unknown")
        return 0

    cdef int add_key(self, bytes pem) except -1:
        cdef BIO *bio = open_pem(pem)
        cdef EVP_PKEY *key = PEM_read_bio_PrivateKey(bio, NULL, NULL, <void *> b"")
        cdef int ok = key != NULL and SSL_CTX_use_PrivateKey(self.context.ctx, key) == 1
        ok = ok and SSL_CTX_check_private_key(self.context.ctx) == 1
        EVP_PKEY_free(key)
        BIO_free(bio)
        if not ok:
            if l4_out_of_memory():
                raise MemoryError
            raise ValueError("the private key can't be read, is encrypted, or does not belong to the certificate")
        return 0

    cdef int add_bundle(self, bytes pem) except -1:
        cdef BIO *bio = open_pem(pem)
        cdef X509_STORE *trusted = SSL_CTX_get_cert_store(self.context.ctx)
        cdef X509 *cert
        cdef int n = 0
        cdef int ok = 1
        try:
            while ok:
                cert = read_certificate(bio)
                if cert == NULL:
                    break
                ok = X509_STORE_add_cert(trusted, cert)
                X509_free(cert)
                n += 1
        finally:
            BIO_free(bio)
        if not ok:
            raise MemoryError
        if n == 0:
            raise ValueError("the trust bundle holds no certificate in PEM")
        return 0
