# Declarations only: what the data path uses of OpenSSL 3.0 and later.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <openssl/bio.h>
    #include <openssl/core_dispatch.h>
    #include <openssl/core_names.h>
    #include <openssl/core_object.h>
    #include <openssl/crypto.h>
    #include <openssl/err.h>
    #include <openssl/params.h>
    #include <openssl/pem.h>
    #include <openssl/provider.h>
    #include <openssl/ssl.h>
    #include <openssl/x509.h>
    #include <openssl/x509v3.h>
    /* Macros that Cython can't call through a void *. */
    static inline long l4_ssl_ctx_set_mode(SSL_CTX *ctx, long mode) { return SSL_CTX_set_mode(ctx, mode); }
    static inline int l4_min_version(SSL *ssl, int version) { return SSL_set_min_proto_version(ssl, version); }
    static inline int l4_set_groups(SSL_CTX *ctx, const char *list) { return SSL_CTX_set1_groups_list(ctx, list); }
    static inline int l4_set_sni(SSL *ssl, const char *name) { return (int) SSL_set_tlsext_host_name(ssl, name); }
    static inline void l4_own_cache(SSL_CTX *ctx)
    { SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_BOTH | SSL_SESS_CACHE_NO_INTERNAL | SSL_SESS_CACHE_NO_AUTO_CLEAR); }
    static inline void l4_read_ahead(SSL_CTX *ctx, long size)
    { SSL_CTX_set_read_ahead(ctx, 1); SSL_CTX_set_default_read_buffer_len(ctx, size); }
    static inline void l4_max_cert_list(SSL_CTX *ctx, long size) { SSL_CTX_set_max_cert_list(ctx, size); }
    static inline void l4_bio_retry_read(BIO *bio) { BIO_clear_retry_flags(bio); BIO_set_retry_read(bio); }
    static inline void l4_bio_no_retry(BIO *bio) { BIO_clear_retry_flags(bio); }
    static inline int l4_add_chain(SSL_CTX *ctx, X509 *cert) { return (int) SSL_CTX_add1_chain_cert(ctx, cert); }
    static inline int l4_peek_reason(void) { return ERR_GET_REASON(ERR_peek_last_error()); }
    /* For AES-GCM: since 3.1, with AVX-512. */
    static inline int l4_openssl_has_vaes(void)
    {
    #if defined(__x86_64__)
        return OpenSSL_version_num() >= 0x30100000 && __builtin_cpu_supports("vaes") && __builtin_cpu_supports("vpclmulqdq")
            && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512vl");
    #else
        return 0;
    #endif
    }
    static inline void l4_raise_out_of_memory(void) { ERR_raise(ERR_LIB_PROV, ERR_R_MALLOC_FAILURE); }
    /* Whether OpenSSL has just failed for want of memory, whatever else it made of it. Empties the queue of errors. */
    static inline int l4_out_of_memory(void)
    {
        unsigned long error;
        int found = 0;
        while ((error = ERR_get_error()) != 0) found |= ERR_GET_REASON(error) == ERR_R_MALLOC_FAILURE;
        return found;
    }
    static inline int64_t l4_unix_s(const ASN1_TIME *time)
    {
        struct tm tm;
        if (!ASN1_TIME_to_tm(time, &tm)) return 0;
        return (int64_t) timegm(&tm);
    }
    static inline int64_t l4_expires_s(const X509 *cert) { return l4_unix_s(X509_get0_notAfter(cert)); }
    static inline int64_t l4_begins_s(const X509 *cert) { return l4_unix_s(X509_get0_notBefore(cert)); }
    static inline int l4_chain_length(const STACK_OF(X509) *chain) { return sk_X509_num(chain); }
    static inline X509 *l4_chain_at(const STACK_OF(X509) *chain, int i) { return sk_X509_value(chain, i); }
    typedef STACK_OF(X509) l4_chain_t;
    typedef void (*l4_dispatch_function_t)(void);
    /* The URI names of a certificate: their number, and the first. General names are a stack, which only macros can walk. */
    static inline int l4_uri_names(X509 *cert, GENERAL_NAMES **owner, const unsigned char **text, int *length)
    {
        int i, found = 0;
        GENERAL_NAMES *names = X509_get_ext_d2i(cert, NID_subject_alt_name, &i, NULL);
        *owner = names;
        if (names == NULL) return i == -1 ? 0 : -1;
        for (i = 0; i < sk_GENERAL_NAME_num(names); i++) {
            GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);
            if (name->type != GEN_URI) continue;
            if (found++ == 0) {
                *text = ASN1_STRING_get0_data(name->d.uniformResourceIdentifier);
                *length = ASN1_STRING_length(name->d.uniformResourceIdentifier);
            }
        }
        return found;
    }
    """
    ctypedef struct SSL:
        pass
    ctypedef struct SSL_CTX:
        pass
    ctypedef struct SSL_SESSION:
        pass
    ctypedef struct SSL_METHOD:
        pass
    ctypedef struct BIO:
        pass
    ctypedef struct BIO_METHOD:
        pass
    ctypedef struct X509:
        pass
    ctypedef struct X509_NAME:
        pass
    ctypedef struct X509_STORE:
        pass
    ctypedef struct X509_STORE_CTX:
        pass
    ctypedef struct ASN1_INTEGER:
        pass
    ctypedef struct l4_chain_t:
        pass
    ctypedef struct EVP_MD:
        pass
    ctypedef struct OSSL_LIB_CTX:
        pass
    ctypedef struct OSSL_PROVIDER:
        pass
    ctypedef struct OSSL_CORE_HANDLE:
        pass
    ctypedef void (*dispatch_function_t "l4_dispatch_function_t")() noexcept nogil
    ctypedef struct OSSL_DISPATCH:
        int function_id
        dispatch_function_t function
    ctypedef struct OSSL_ALGORITHM:
        const char *algorithm_names
        const char *property_definition
        const OSSL_DISPATCH *implementation
    ctypedef struct OSSL_PARAM:
        const char *key
        unsigned int data_type
        void *data
        size_t data_size
    ctypedef struct GENERAL_NAMES:
        pass
    ctypedef struct EVP_PKEY:
        pass

    enum:
        SSL_ERROR_NONE, SSL_ERROR_WANT_READ, SSL_ERROR_ZERO_RETURN
        SSL_VERIFY_PEER, SSL_VERIFY_FAIL_IF_NO_PEER_CERT, SSL_MODE_RELEASE_BUFFERS
        SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER, TLS1_2_VERSION, TLS1_3_VERSION
        X509_V_ERR_CERT_REVOKED, X509_V_ERR_CERT_REJECTED, X509_V_ERR_CERT_HAS_EXPIRED, X509_V_ERR_OUT_OF_MEM
        X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT, X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY
        X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN, X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT
        X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE, X509_V_ERR_CERT_SIGNATURE_FAILURE, X509_V_FLAG_PARTIAL_CHAIN
        OSSL_OP_DIGEST, OSSL_OP_CIPHER, OSSL_OP_MAC, OSSL_OP_KDF, OSSL_OP_RAND, OSSL_OP_KEYMGMT, OSSL_OP_KEYEXCH, OSSL_OP_SIGNATURE
        OSSL_OP_DECODER, OSSL_OP__HIGHEST, OSSL_PARAM_OCTET_STRING
        OSSL_FUNC_CIPHER_NEWCTX, OSSL_FUNC_CIPHER_FREECTX, OSSL_FUNC_CIPHER_ENCRYPT_INIT, OSSL_FUNC_CIPHER_DECRYPT_INIT
        OSSL_FUNC_CIPHER_UPDATE, OSSL_FUNC_CIPHER_FINAL, OSSL_FUNC_CIPHER_GET_PARAMS, OSSL_FUNC_CIPHER_GETTABLE_PARAMS
        OSSL_FUNC_CIPHER_GET_CTX_PARAMS, OSSL_FUNC_CIPHER_GETTABLE_CTX_PARAMS, OSSL_FUNC_CIPHER_SET_CTX_PARAMS
        OSSL_FUNC_CIPHER_SETTABLE_CTX_PARAMS
        OSSL_FUNC_PROVIDER_QUERY_OPERATION, OSSL_FUNC_PROVIDER_GET_CAPABILITIES
        OSSL_FUNC_KEYMGMT_NEW, OSSL_FUNC_KEYMGMT_FREE, OSSL_FUNC_KEYMGMT_LOAD, OSSL_FUNC_KEYMGMT_IMPORT, OSSL_FUNC_KEYMGMT_SET_PARAMS
        OSSL_FUNC_KEYMGMT_DUP, OSSL_FUNC_DECODER_DECODE, OSSL_FUNC_BIO_READ_EX, OSSL_FUNC_BIO_CTRL
        OSSL_KEYMGMT_SELECT_ALL_PARAMETERS, OSSL_OBJECT_PKEY, BIO_C_FILE_SEEK, BIO_C_FILE_TELL
        EXFLAG_CA, EXFLAG_INVALID, KU_KEY_CERT_SIGN, KU_CRL_SIGN, BIO_CTRL_FLUSH, BIO_TYPE_SOURCE_SINK, SSL3_RT_HANDSHAKE
        SSL3_MT_KEY_UPDATE, SSL_CB_READ_ALERT, SSL_CB_WRITE_ALERT, SSL_AD_INTERNAL_ERROR
        SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE, SSL_R_NO_SHARED_CIPHER, SSL_R_UNSUPPORTED_PROTOCOL, SSL_R_VERSION_TOO_LOW
        SSL_R_WRONG_VERSION_NUMBER, SSL_R_HTTP_REQUEST, SSL_R_HTTPS_PROXY_REQUEST
        SSL_R_NO_SUITABLE_KEY_SHARE, SSL_R_NO_SHARED_GROUPS, SSL_R_UNKNOWN_PROTOCOL, SSL_R_NO_PROTOCOLS_AVAILABLE
    const char *OSSL_OBJECT_PARAM_TYPE
    const char *OSSL_OBJECT_PARAM_DATA_TYPE
    const char *OSSL_OBJECT_PARAM_REFERENCE
    const char *OSSL_PKEY_PARAM_GROUP_NAME
    const char *OSSL_PKEY_PARAM_ENCODED_PUBLIC_KEY
    const char *OSSL_CIPHER_PARAM_AEAD_TAG
    const char *OSSL_CIPHER_PARAM_AEAD_TAGLEN
    const char *OSSL_CIPHER_PARAM_KEYLEN
    const char *OSSL_CIPHER_PARAM_IVLEN
    const char *OSSL_CIPHER_PARAM_IV
    const char *OSSL_CIPHER_PARAM_UPDATED_IV
    uint64_t SSL_OP_NO_RENEGOTIATION, SSL_OP_NO_COMPRESSION, SSL_OP_NO_TICKET, SSL_OP_CIPHER_SERVER_PREFERENCE

    const SSL_METHOD *TLS_method() noexcept nogil
    SSL_CTX *SSL_CTX_new_ex(OSSL_LIB_CTX *library, const char *properties, const SSL_METHOD *method) noexcept nogil
    void SSL_CTX_set_cert_verify_callback(
        SSL_CTX *ctx, int (*callback)(X509_STORE_CTX *, void *) noexcept nogil, void *argument
    ) noexcept nogil
    void SSL_CTX_free(SSL_CTX *ctx) noexcept nogil
    uint64_t SSL_CTX_set_options(SSL_CTX *ctx, uint64_t options) noexcept nogil
    int SSL_CTX_set_ciphersuites(SSL_CTX *ctx, const char *list) noexcept nogil
    int SSL_CTX_set_cipher_list(SSL_CTX *ctx, const char *list) noexcept nogil
    int SSL_CTX_set_num_tickets(SSL_CTX *ctx, size_t count) noexcept nogil
    int SSL_set_num_tickets(SSL *ssl, size_t count) noexcept nogil
    uint64_t SSL_set_options(SSL *ssl, uint64_t options) noexcept nogil
    long SSL_CTX_set_timeout(SSL_CTX *ctx, long seconds) noexcept nogil
    void SSL_CTX_set_verify(SSL_CTX *ctx, int mode, int (*callback)(int, X509_STORE_CTX *) noexcept nogil) noexcept nogil
    void SSL_CTX_set_verify_depth(SSL_CTX *ctx, int depth) noexcept nogil
    int SSL_CTX_set_session_id_context(SSL_CTX *ctx, const uint8_t *context, unsigned int length) noexcept nogil
    int SSL_CTX_use_certificate(SSL_CTX *ctx, X509 *cert) noexcept nogil
    int SSL_CTX_use_PrivateKey(SSL_CTX *ctx, EVP_PKEY *key) noexcept nogil
    int SSL_CTX_check_private_key(const SSL_CTX *ctx) noexcept nogil
    X509_STORE *SSL_CTX_get_cert_store(const SSL_CTX *ctx) noexcept nogil
    void SSL_CTX_sess_set_new_cb(SSL_CTX *ctx, int (*callback)(SSL *, SSL_SESSION *) noexcept nogil) noexcept nogil
    void SSL_CTX_sess_set_get_cb(
        SSL_CTX *ctx, SSL_SESSION *(*callback)(SSL *, const uint8_t *, int, int *) noexcept nogil
    ) noexcept nogil
    void SSL_CTX_set_msg_callback(
        SSL_CTX *ctx, void (*callback)(int, int, int, const void *, size_t, SSL *, void *) noexcept nogil
    ) noexcept nogil
    void SSL_CTX_set_info_callback(SSL_CTX *ctx, void (*callback)(const SSL *, int, int) noexcept nogil) noexcept nogil
    long l4_ssl_ctx_set_mode(SSL_CTX *ctx, long mode) noexcept nogil
    ctypedef int (*add_extension_t)(
        SSL *ssl, unsigned int kind, unsigned int where, const uint8_t **data, size_t *length, X509 *cert, size_t index, int *alert,
        void *argument
    ) noexcept nogil
    ctypedef int (*parse_extension_t)(
        SSL *ssl, unsigned int kind, unsigned int where, const uint8_t *data, size_t length, X509 *cert, size_t index, int *alert,
        void *argument
    ) noexcept nogil
    unsigned int SSL_EXT_CLIENT_HELLO
    int SSL_CTX_add_custom_ext(
        SSL_CTX *ctx, unsigned int kind, unsigned int where, add_extension_t add, void *free, void *add_argument,
        parse_extension_t parse, void *parse_argument
    ) noexcept nogil
    int l4_set_groups(SSL_CTX *ctx, const char *list) noexcept nogil
    void l4_own_cache(SSL_CTX *ctx) noexcept nogil
    void l4_read_ahead(SSL_CTX *ctx, long size) noexcept nogil
    void l4_max_cert_list(SSL_CTX *ctx, long size) noexcept nogil
    int l4_add_chain(SSL_CTX *ctx, X509 *cert) noexcept nogil
    int X509_STORE_add_cert(X509_STORE *store, X509 *cert) noexcept nogil
    int X509_STORE_set_flags(X509_STORE *store, unsigned long flags) noexcept nogil

    SSL *SSL_new(SSL_CTX *ctx) noexcept nogil
    void SSL_free(SSL *ssl) noexcept nogil
    int SSL_set_ex_data(SSL *ssl, int index, void *data) noexcept nogil
    void *SSL_get_ex_data(const SSL *ssl, int index) noexcept nogil
    void SSL_set_bio(SSL *ssl, BIO *read_bio, BIO *write_bio) noexcept nogil
    void SSL_set_accept_state(SSL *ssl) noexcept nogil
    void SSL_set_connect_state(SSL *ssl) noexcept nogil
    int l4_min_version(SSL *ssl, int version) noexcept nogil
    int l4_set_sni(SSL *ssl, const char *name) noexcept nogil
    int SSL_set_session(SSL *ssl, SSL_SESSION *session) noexcept nogil
    int SSL_do_handshake(SSL *ssl) noexcept nogil
    int SSL_read_ex(SSL *ssl, void *buffer, size_t size, size_t *got) noexcept nogil
    int SSL_write_ex(SSL *ssl, const void *buffer, size_t size, size_t *written) noexcept nogil
    int SSL_shutdown(SSL *ssl) noexcept nogil
    int SSL_get_error(const SSL *ssl, int rc) noexcept nogil
    int SSL_has_pending(const SSL *ssl) noexcept nogil
    int SSL_session_reused(const SSL *ssl) noexcept nogil
    int SSL_version(const SSL *ssl) noexcept nogil
    int SSL_get_ex_data_X509_STORE_CTX_idx() noexcept nogil
    X509 *SSL_get0_peer_certificate(const SSL *ssl) noexcept nogil
    SSL_SESSION *SSL_SESSION_dup(const SSL_SESSION *session) noexcept nogil
    void SSL_SESSION_free(SSL_SESSION *session) noexcept nogil
    const uint8_t *SSL_SESSION_get_id(const SSL_SESSION *session, unsigned int *length) noexcept nogil
    X509 *SSL_SESSION_get0_peer(SSL_SESSION *session) noexcept nogil
    const uint8_t *SSL_SESSION_get0_id_context(const SSL_SESSION *session, unsigned int *length) noexcept nogil
    long SSL_SESSION_get_time(const SSL_SESSION *session) noexcept nogil
    int SSL_SESSION_set1_ticket_appdata(SSL_SESSION *session, const void *data, size_t length) noexcept nogil
    int SSL_SESSION_get0_ticket_appdata(SSL_SESSION *session, void **data, size_t *length) noexcept nogil
    SSL_SESSION *SSL_get_session(const SSL *ssl) noexcept nogil
    int SSL_SESSION_is_resumable(const SSL_SESSION *session) noexcept nogil

    int X509_verify_cert(X509_STORE_CTX *store) noexcept nogil
    X509 *X509_STORE_CTX_get0_cert(const X509_STORE_CTX *store) noexcept nogil
    l4_chain_t *X509_STORE_CTX_get0_untrusted(const X509_STORE_CTX *store) noexcept nogil
    l4_chain_t *X509_STORE_CTX_get0_chain(const X509_STORE_CTX *store) noexcept nogil
    int l4_chain_length(const l4_chain_t *chain) noexcept nogil
    X509 *l4_chain_at(const l4_chain_t *chain, int i) noexcept nogil
    int64_t l4_begins_s(const X509 *cert) noexcept nogil
    int i2d_X509(X509 *cert, uint8_t **out) noexcept nogil
    const EVP_MD *EVP_sha256() noexcept nogil
    int EVP_Digest(const void *data, size_t length, uint8_t *out, unsigned int *size, const EVP_MD *kind, void *engine) noexcept nogil
    int EVP_default_properties_is_fips_enabled(OSSL_LIB_CTX *library) noexcept nogil
    X509 *X509_new_ex(OSSL_LIB_CTX *library, const char *properties) noexcept nogil
    OSSL_LIB_CTX *OSSL_LIB_CTX_new() noexcept nogil
    void OSSL_LIB_CTX_free(OSSL_LIB_CTX *library) noexcept nogil
    int OSSL_PROVIDER_add_builtin(
        OSSL_LIB_CTX *library, const char *name,
        int (*init)(const OSSL_CORE_HANDLE *, const OSSL_DISPATCH *, const OSSL_DISPATCH **, void **) noexcept nogil
    ) noexcept nogil
    OSSL_PROVIDER *OSSL_PROVIDER_load(OSSL_LIB_CTX *library, const char *name) noexcept nogil
    void *OSSL_PROVIDER_get0_provider_ctx(const OSSL_PROVIDER *provider) noexcept nogil
    const OSSL_ALGORITHM *OSSL_PROVIDER_query_operation(const OSSL_PROVIDER *provider, int operation, int *no_cache) noexcept nogil
    int OSSL_PROVIDER_get_capabilities(
        const OSSL_PROVIDER *provider, const char *capability, int (*callback)(const void *, void *) noexcept nogil, void *argument
    ) noexcept nogil

    void *X509_STORE_CTX_get_ex_data(const X509_STORE_CTX *store, int index) noexcept nogil
    int X509_STORE_CTX_get_error(const X509_STORE_CTX *store) noexcept nogil
    void X509_STORE_CTX_set_error(X509_STORE_CTX *store, int error) noexcept nogil
    int X509_STORE_CTX_get_error_depth(const X509_STORE_CTX *store) noexcept nogil
    X509 *X509_STORE_CTX_get_current_cert(const X509_STORE_CTX *store) noexcept nogil
    uint32_t X509_get_extension_flags(X509 *cert) noexcept nogil
    uint32_t X509_get_key_usage(X509 *cert) noexcept nogil
    const ASN1_INTEGER *X509_get0_serialNumber(const X509 *cert) noexcept nogil
    X509_NAME *X509_get_issuer_name(const X509 *cert) noexcept nogil
    int X509_NAME_get0_der(const X509_NAME *name, const uint8_t **der, size_t *length) noexcept nogil
    const uint8_t *ASN1_STRING_get0_data(const ASN1_INTEGER *string) noexcept nogil
    int ASN1_STRING_length(const ASN1_INTEGER *string) noexcept nogil
    void X509_free(X509 *cert) noexcept nogil
    void EVP_PKEY_free(EVP_PKEY *key) noexcept nogil
    void GENERAL_NAMES_free(GENERAL_NAMES *names) noexcept nogil
    int64_t l4_expires_s(const X509 *cert) noexcept nogil
    int l4_uri_names(X509 *cert, GENERAL_NAMES **owner, const uint8_t **text, int *length) noexcept nogil

    BIO *BIO_new(const BIO_METHOD *method) noexcept nogil
    BIO *BIO_new_mem_buf(const void *data, int length) noexcept nogil
    int BIO_up_ref(BIO *bio) noexcept nogil
    int BIO_free(BIO *bio) noexcept nogil
    void BIO_set_data(BIO *bio, void *data) noexcept nogil
    void *BIO_get_data(BIO *bio) noexcept nogil
    void BIO_set_init(BIO *bio, int init) noexcept nogil
    int BIO_get_new_index() noexcept nogil
    BIO_METHOD *BIO_meth_new(int kind, const char *name) noexcept nogil
    void BIO_meth_free(BIO_METHOD *method) noexcept nogil
    int BIO_meth_set_read(BIO_METHOD *method, int (*read)(BIO *, char *, int) noexcept nogil) noexcept nogil
    int BIO_meth_set_write(BIO_METHOD *method, int (*write)(BIO *, const char *, int) noexcept nogil) noexcept nogil
    int BIO_meth_set_ctrl(BIO_METHOD *method, long (*ctrl)(BIO *, int, long, void *) noexcept nogil) noexcept nogil
    void l4_bio_retry_read(BIO *bio) noexcept nogil
    void l4_bio_no_retry(BIO *bio) noexcept nogil
    X509 *PEM_read_bio_X509(BIO *bio, X509 **out, void *callback, void *arg) noexcept nogil
    EVP_PKEY *PEM_read_bio_PrivateKey(BIO *bio, EVP_PKEY **out, void *callback, void *arg) noexcept nogil

    void ERR_clear_error() noexcept nogil
    int ERR_set_mark() noexcept nogil
    int ERR_pop_to_mark() noexcept nogil
    int l4_peek_reason() noexcept nogil
    void l4_raise_out_of_memory() noexcept nogil
    bint l4_openssl_has_vaes() noexcept nogil
    bint l4_out_of_memory() noexcept nogil
    const char *OpenSSL_version(int what) noexcept nogil
    void OPENSSL_cleanse(void *memory, size_t size) noexcept nogil
    int CRYPTO_memcmp(const void *one, const void *other, size_t size) noexcept nogil
    OSSL_PARAM OSSL_PARAM_construct_int(const char *key, int *value) noexcept nogil
    OSSL_PARAM OSSL_PARAM_construct_utf8_string(const char *key, const char *value, size_t size) noexcept nogil
    OSSL_PARAM OSSL_PARAM_construct_octet_string(const char *key, const void *value, size_t size) noexcept nogil
    OSSL_PARAM OSSL_PARAM_construct_end() noexcept nogil
    int OSSL_PARAM_get_size_t(const OSSL_PARAM *param, size_t *value) noexcept nogil
    int OSSL_PARAM_set_size_t(OSSL_PARAM *param, size_t value) noexcept nogil
    int OSSL_PARAM_set_octet_string(OSSL_PARAM *param, const void *value, size_t size) noexcept nogil
