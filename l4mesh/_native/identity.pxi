# Part of _fastpath: an identity as the handshakes need it, and what of OpenSSL they are made with.


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
        self.context.ctx = SSL_CTX_new(TLS_method())
        if self.context.identity == NULL or self.context.ctx == NULL:
            raise MemoryError
        self.context.identity_length = parsed.whole.length
        self.context.trust_domain = self.context.identity + len("spiffe://")
        self.context.trust_domain_length = parsed.trust_domain.length
        ERR_clear_error()
        if not context_configure(self.context.ctx, id):
            raise ValueError("this OpenSSL lacks a cipher or a group that is needed")
        self.add_certificates(certificates)
        self.add_key(private_key)
        self.add_bundle(bundle)

    def __dealloc__(self):
        SSL_CTX_free(self.context.ctx)
        free(self.context.identity)

    cdef int add_certificates(self, bytes pem) except -1:
        cdef BIO *bio = BIO_new_mem_buf(<const char *> pem, <int> len(pem))
        cdef X509 *cert
        cdef int n = 0
        cdef int ok = 1
        try:
            while ok:
                cert = PEM_read_bio_X509(bio, NULL, NULL, NULL)
                if cert == NULL:
                    break
                ok = SSL_CTX_use_certificate(self.context.ctx, cert) if n == 0 else l4_add_chain(self.context.ctx, cert)
                X509_free(cert)
                n += 1
        finally:
            BIO_free(bio)
            ERR_clear_error()
        if n == 0 or not ok:
            raise ValueError("the certificate can't be read as PEM")
        return 0

    cdef int add_key(self, bytes pem) except -1:
        cdef BIO *bio = BIO_new_mem_buf(<const char *> pem, <int> len(pem))
        cdef EVP_PKEY *key = PEM_read_bio_PrivateKey(bio, NULL, NULL, <void *> b"")
        cdef int ok = key != NULL and SSL_CTX_use_PrivateKey(self.context.ctx, key) == 1
        ok = ok and SSL_CTX_check_private_key(self.context.ctx) == 1
        EVP_PKEY_free(key)
        BIO_free(bio)
        ERR_clear_error()
        if not ok:
            raise ValueError("the private key can't be read, is encrypted, or does not belong to the certificate")
        return 0

    cdef int add_bundle(self, bytes pem) except -1:
        cdef BIO *bio = BIO_new_mem_buf(<const char *> pem, <int> len(pem))
        cdef X509_STORE *trusted = SSL_CTX_get_cert_store(self.context.ctx)
        cdef X509 *cert
        cdef int n = 0
        while True:
            cert = PEM_read_bio_X509(bio, NULL, NULL, NULL)
            if cert == NULL:
                break
            n += X509_STORE_add_cert(trusted, cert)
            X509_free(cert)
        BIO_free(bio)
        ERR_clear_error()
        if n == 0:
            raise ValueError("the trust bundle holds no certificate in PEM")
        return 0
