# Part of _fastpath: AES-GCM with VAES and AVX-512 for an OpenSSL that has none of its own (before 3.1), from Intel's libipsec-mb.

# A context is ours as long as it is used as the TLS 1.3 record layer uses it: key, IV of 12 bytes, AAD in one piece, data, tag of
# 16 bytes. The first parameter of another kind makes it one of the default provider's (``other``), to which all calls then go:
# so the TLS 1.2 record layer, with its explicit nonces, is entirely OpenSSL's.
#
# A context keeps its key as it was given: an expanded one is a kilobyte, which an idle connection would hold for nothing, and takes
# 0.1 us to make. Each thread keeps the one that it used last (``l4_expanded_t``).
#
# Threads: the functions of the manager's table work on what they are given. All else that they write is the library's error number,
# which is not read here.

cdef extern from *:
    """
    #ifdef L4_IPSEC_MB
    #include <intel-ipsec-mb.h>
    #else
    struct gcm_key_data { char none; };
    struct gcm_context_data { char none; };
    typedef void (*aes_gcm_pre_t)(const void *, struct gcm_key_data *);
    typedef void (*aes_gcm_init_t)(const struct gcm_key_data *, struct gcm_context_data *, const uint8_t *, const uint8_t *, uint64_t);
    typedef void (*aes_gcm_enc_dec_update_t)(
        const struct gcm_key_data *, struct gcm_context_data *, uint8_t *, const uint8_t *, uint64_t);
    typedef void (*aes_gcm_enc_dec_finalize_t)(const struct gcm_key_data *, struct gcm_context_data *, uint8_t *, uint64_t);
    typedef struct {
        uint64_t features;
        aes_gcm_pre_t gcm128_pre, gcm256_pre;
        aes_gcm_init_t gcm128_init, gcm256_init;
        aes_gcm_enc_dec_update_t gcm128_enc_update, gcm256_enc_update, gcm128_dec_update, gcm256_dec_update;
        aes_gcm_enc_dec_finalize_t gcm128_enc_finalize, gcm256_enc_finalize, gcm128_dec_finalize, gcm256_dec_finalize;
    } IMB_MGR;
    #define IMB_CPUFLAGS_AVX512_T2 1
    #define IMB_FEATURE_SELF_TEST_PASS 1
    static inline uint64_t imb_get_feature_flags(void) { return 0; }
    static inline IMB_MGR *alloc_mb_mgr(uint64_t flags) { (void) flags; return NULL; }
    static inline void init_mb_mgr_auto(IMB_MGR *manager, void *arch) { (void) manager; (void) arch; }
    static inline void free_mb_mgr(IMB_MGR *manager) { (void) manager; }
    static inline const char *imb_get_version_str(void) { return ""; }
    #endif
    typedef struct {
        struct gcm_key_data key __attribute__((aligned(64)));
        uint64_t id;
    } l4_expanded_t;
    static inline l4_expanded_t *l4_expanded(void) { static __thread l4_expanded_t expanded; return &expanded; }
    """
    ctypedef struct gcm_key_data "struct gcm_key_data":
        pass
    ctypedef struct gcm_context_data "struct gcm_context_data":
        pass
    ctypedef void (*aes_gcm_pre_t)(const void *, gcm_key_data *) noexcept nogil
    ctypedef void (*aes_gcm_init_t)(
        const gcm_key_data *, gcm_context_data *, const uint8_t *, const uint8_t *, uint64_t
    ) noexcept nogil
    ctypedef void (*aes_gcm_enc_dec_update_t)(
        const gcm_key_data *, gcm_context_data *, uint8_t *, const uint8_t *, uint64_t
    ) noexcept nogil
    ctypedef void (*aes_gcm_enc_dec_finalize_t)(const gcm_key_data *, gcm_context_data *, uint8_t *, uint64_t) noexcept nogil
    ctypedef struct IMB_MGR:
        uint64_t features
        aes_gcm_pre_t gcm128_pre, gcm256_pre
        aes_gcm_init_t gcm128_init, gcm256_init
        aes_gcm_enc_dec_update_t gcm128_enc_update, gcm256_enc_update, gcm128_dec_update, gcm256_dec_update
        aes_gcm_enc_dec_finalize_t gcm128_enc_finalize, gcm256_enc_finalize, gcm128_dec_finalize, gcm256_dec_finalize
    ctypedef struct l4_expanded_t:
        gcm_key_data key
        uint64_t id         # 0: none
    uint64_t IMB_CPUFLAGS_AVX512_T2, IMB_FEATURE_SELF_TEST_PASS
    l4_expanded_t *l4_expanded() noexcept nogil
    uint64_t imb_get_feature_flags() noexcept nogil
    IMB_MGR *alloc_mb_mgr(uint64_t flags) noexcept nogil
    void init_mb_mgr_auto(IMB_MGR *manager, void *arch) noexcept nogil
    void free_mb_mgr(IMB_MGR *manager) noexcept nogil
    const char *imb_get_version_str() noexcept nogil

cdef enum:
    GCM_IV_BYTES = 12
    GCM_TAG_BYTES = 16

cdef enum gcm_state_t:
    GCM_NO_IV               # each message needs one of its own
    GCM_IV_SET
    GCM_BEGUN               # AAD is in, data may follow
    GCM_SEALED              # the tag can be had

ctypedef int (*cipher_init_t)(void *, const uint8_t *, size_t, const uint8_t *, size_t, const OSSL_PARAM *) noexcept nogil
ctypedef int (*cipher_update_t)(void *, uint8_t *, size_t *, size_t, const uint8_t *, size_t) noexcept nogil
ctypedef int (*cipher_final_t)(void *, uint8_t *, size_t *, size_t) noexcept nogil
ctypedef void (*cipher_function_t)() noexcept nogil

# One length of key: ipsec-mb's functions for it and the default provider's, by the number of the function.
ctypedef struct gcm_kind_t:
    size_t key_bytes
    aes_gcm_pre_t pre
    aes_gcm_init_t begin
    aes_gcm_enc_dec_update_t step[2]      # [encrypting]
    aes_gcm_enc_dec_finalize_t end[2]
    void *provider
    cipher_function_t theirs[16]
    OSSL_DISPATCH dispatch[24]

ctypedef struct gcm_t:
    const gcm_kind_t *kind
    void *other             # the default provider's context, once this one has stepped aside
    uint64_t key_id         # of no other key in the life of this process; 0: has none
    gcm_context_data message
    uint8_t key[32]
    uint8_t iv[GCM_IV_BYTES]
    uint8_t tag[GCM_TAG_BYTES]
    uint8_t state
    uint8_t encrypting
    uint8_t has_tag

cdef gcm_kind_t gcm_kinds[2]
cdef uint64_t gcm_keys = 0
cdef IMB_MGR *gcm_manager = NULL


cdef void gcm_drop_key(gcm_t *gcm) noexcept nogil:
    # An expanded one can only be with this thread: a context stays with the worker that made it.
    cdef l4_expanded_t *expanded = l4_expanded()
    if gcm.key_id and expanded.id == gcm.key_id:
        OPENSSL_cleanse(expanded, sizeof(l4_expanded_t))
    OPENSSL_cleanse(gcm.key, sizeof(gcm.key))
    gcm.key_id = 0


cdef inline const gcm_key_data *gcm_expanded(const gcm_t *gcm) noexcept nogil:
    cdef l4_expanded_t *expanded = l4_expanded()
    if expanded.id != gcm.key_id:
        gcm.kind.pre(gcm.key, &expanded.key)
        expanded.id = gcm.key_id
    return &expanded.key


cdef inline gcm_t *gcm_new(const gcm_kind_t *kind) noexcept nogil:
    cdef gcm_t *gcm = <gcm_t *> calloc(1, sizeof(gcm_t))
    if gcm == NULL:
        # As OpenSSL's own ciphers do, so that whoever looks knows what it was.
        l4_raise_out_of_memory()
        return NULL
    gcm.kind = kind
    return gcm


cdef void *gcm_new_128(void *provider) noexcept nogil:
    return gcm_new(&gcm_kinds[0])


cdef void *gcm_new_256(void *provider) noexcept nogil:
    return gcm_new(&gcm_kinds[1])


cdef void gcm_free(void *context) noexcept nogil:
    cdef gcm_t *gcm = <gcm_t *> context
    if gcm == NULL:
        return
    if gcm.other != NULL:
        (<void (*)(void *) noexcept nogil> gcm.kind.theirs[OSSL_FUNC_CIPHER_FREECTX])(gcm.other)
    gcm_drop_key(gcm)
    OPENSSL_cleanse(gcm, sizeof(gcm_t))
    free(gcm)


cdef inline int other_init(
    const gcm_t *gcm, bint encrypting, void *other, const uint8_t *key, size_t key_length, const uint8_t *iv, size_t iv_length,
    const OSSL_PARAM *params,
) noexcept nogil:
    cdef int function = OSSL_FUNC_CIPHER_ENCRYPT_INIT if encrypting else OSSL_FUNC_CIPHER_DECRYPT_INIT
    return (<cipher_init_t> gcm.kind.theirs[function])(other, key, key_length, iv, iv_length, params)


cdef bint gcm_step_aside(gcm_t *gcm) noexcept nogil:
    # Goes over to the default provider with what was set so far; not in the midst of a message.
    cdef void *other
    cdef bint has_iv = gcm.state == GCM_IV_SET
    if gcm.state == GCM_BEGUN or gcm.has_tag:
        return False
    other = (<void *(*)(void *) noexcept nogil> gcm.kind.theirs[OSSL_FUNC_CIPHER_NEWCTX])(gcm.kind.provider)
    if other == NULL:
        return False
    if other_init(
        gcm, gcm.encrypting, other, gcm.key if gcm.key_id else NULL, gcm.kind.key_bytes if gcm.key_id else 0,
        gcm.iv if has_iv else NULL, GCM_IV_BYTES if has_iv else 0, NULL,
    ) != 1:
        (<void (*)(void *) noexcept nogil> gcm.kind.theirs[OSSL_FUNC_CIPHER_FREECTX])(other)
        return False
    gcm.other = other
    gcm_drop_key(gcm)
    return True


cdef int gcm_set_params(void *context, const OSSL_PARAM *params) noexcept nogil:
    cdef gcm_t *gcm = <gcm_t *> context
    cdef const OSSL_PARAM *param = params
    cdef size_t length
    if params == NULL:
        return 1
    if gcm.other == NULL:
        while param.key != NULL:
            if strcmp(param.key, OSSL_CIPHER_PARAM_AEAD_TAG) == 0 and param.data != NULL and param.data_size == GCM_TAG_BYTES:
                if gcm.encrypting or param.data_type != OSSL_PARAM_OCTET_STRING:
                    return 0
                memcpy(gcm.tag, param.data, GCM_TAG_BYTES)
                gcm.has_tag = True
            elif (
                strcmp(param.key, OSSL_CIPHER_PARAM_IVLEN) != 0 or OSSL_PARAM_get_size_t(param, &length) != 1
                or length != GCM_IV_BYTES
            ):
                if not gcm_step_aside(gcm):
                    return 0
                break
            param += 1
        else:
            return 1
    return (<int (*)(void *, const OSSL_PARAM *) noexcept nogil> gcm.kind.theirs[OSSL_FUNC_CIPHER_SET_CTX_PARAMS])(gcm.other, params)


cdef int gcm_get_params(void *context, OSSL_PARAM *params) noexcept nogil:
    cdef gcm_t *gcm = <gcm_t *> context
    cdef OSSL_PARAM *param = params
    cdef int ok = 1
    if gcm.other != NULL:
        return (<int (*)(void *, OSSL_PARAM *) noexcept nogil> gcm.kind.theirs[OSSL_FUNC_CIPHER_GET_CTX_PARAMS])(gcm.other, params)
    while ok and param.key != NULL:
        if strcmp(param.key, OSSL_CIPHER_PARAM_AEAD_TAG) == 0:
            ok = 0 < param.data_size <= GCM_TAG_BYTES and gcm.state == GCM_SEALED
            ok = ok and OSSL_PARAM_set_octet_string(param, gcm.tag, param.data_size)
        elif strcmp(param.key, OSSL_CIPHER_PARAM_KEYLEN) == 0:
            ok = OSSL_PARAM_set_size_t(param, gcm.kind.key_bytes)
        elif strcmp(param.key, OSSL_CIPHER_PARAM_IVLEN) == 0:
            ok = OSSL_PARAM_set_size_t(param, GCM_IV_BYTES)
        elif strcmp(param.key, OSSL_CIPHER_PARAM_AEAD_TAGLEN) == 0:
            ok = OSSL_PARAM_set_size_t(param, GCM_TAG_BYTES)
        elif strcmp(param.key, OSSL_CIPHER_PARAM_IV) == 0 or strcmp(param.key, OSSL_CIPHER_PARAM_UPDATED_IV) == 0:
            ok = gcm.state != GCM_NO_IV and OSSL_PARAM_set_octet_string(param, gcm.iv, GCM_IV_BYTES)
        param += 1
    return ok


cdef inline int gcm_init(
    gcm_t *gcm, bint encrypting, const uint8_t *key, size_t key_length, const uint8_t *iv, size_t iv_length, const OSSL_PARAM *params
) noexcept nogil:
    if gcm.other != NULL:
        return other_init(gcm, encrypting, gcm.other, key, key_length, iv, iv_length, params)
    if (key != NULL and key_length != gcm.kind.key_bytes) or (iv != NULL and iv_length != GCM_IV_BYTES):
        return 0
    if gcm.state != GCM_IV_SET or encrypting != gcm.encrypting:
        gcm.state = GCM_NO_IV
    gcm.encrypting = encrypting
    if key != NULL:
        gcm_drop_key(gcm)
        memcpy(gcm.key, key, key_length)
        gcm.key_id = <uint64_t> add_u(&gcm_keys, 1) + 1
    if iv != NULL:
        memcpy(gcm.iv, iv, GCM_IV_BYTES)
        gcm.state = GCM_IV_SET
    return gcm_set_params(gcm, params)


cdef int gcm_encrypt_init(
    void *context, const uint8_t *key, size_t key_length, const uint8_t *iv, size_t iv_length, const OSSL_PARAM *params
) noexcept nogil:
    return gcm_init(<gcm_t *> context, True, key, key_length, iv, iv_length, params)


cdef int gcm_decrypt_init(
    void *context, const uint8_t *key, size_t key_length, const uint8_t *iv, size_t iv_length, const OSSL_PARAM *params
) noexcept nogil:
    return gcm_init(<gcm_t *> context, False, key, key_length, iv, iv_length, params)


cdef bint gcm_begin(gcm_t *gcm, const uint8_t *aad, size_t length) noexcept nogil:
    if gcm.state != GCM_IV_SET or gcm.key_id == 0:
        return False
    gcm.kind.begin(gcm_expanded(gcm), &gcm.message, gcm.iv, aad, length)
    gcm.state = GCM_BEGUN
    return True


cdef int gcm_update(void *context, uint8_t *out, size_t *written, size_t size, const uint8_t *data, size_t length) noexcept nogil:
    cdef gcm_t *gcm = <gcm_t *> context
    if gcm.other != NULL:
        return (<cipher_update_t> gcm.kind.theirs[OSSL_FUNC_CIPHER_UPDATE])(gcm.other, out, written, size, data, length)
    written[0] = 0
    if length == 0:
        return 1
    if out == NULL:
        if not gcm_begin(gcm, data, length):
            return 0
    else:
        if size < length or (gcm.state != GCM_BEGUN and not gcm_begin(gcm, NULL, 0)):
            return 0
        gcm.kind.step[gcm.encrypting](gcm_expanded(gcm), &gcm.message, out, data, length)
    written[0] = length
    return 1


cdef int gcm_final(void *context, uint8_t *out, size_t *written, size_t size) noexcept nogil:
    cdef gcm_t *gcm = <gcm_t *> context
    cdef uint8_t tag[GCM_TAG_BYTES]
    cdef bint ok = True
    if gcm.other != NULL:
        return (<cipher_final_t> gcm.kind.theirs[OSSL_FUNC_CIPHER_FINAL])(gcm.other, out, written, size)
    written[0] = 0
    if gcm.state != GCM_BEGUN and not gcm_begin(gcm, NULL, 0):
        return 0
    gcm.kind.end[gcm.encrypting](gcm_expanded(gcm), &gcm.message, tag, GCM_TAG_BYTES)
    if gcm.encrypting:
        memcpy(gcm.tag, tag, GCM_TAG_BYTES)
        gcm.state = GCM_SEALED
    else:
        ok = gcm.has_tag and CRYPTO_memcmp(gcm.tag, tag, GCM_TAG_BYTES) == 0
        # What the tag of a forgery should have been is nobody's business.
        OPENSSL_cleanse(tag, GCM_TAG_BYTES)
        gcm.has_tag = False
        gcm.state = GCM_NO_IV
    return ok


cdef void gcm_open() noexcept nogil:
    # No manager: from 3.1 on OpenSSL's own is as fast, and without these features of the processor it is faster.
    global gcm_manager
    cdef uint64_t needed = IMB_CPUFLAGS_AVX512_T2
    if OpenSSL_version_num() >= 0x30100000 or imb_get_feature_flags() & needed != needed:
        return
    gcm_manager = alloc_mb_mgr(0)
    if gcm_manager == NULL:
        return
    init_mb_mgr_auto(gcm_manager, NULL)
    needed |= IMB_FEATURE_SELF_TEST_PASS
    if gcm_manager.features & needed != needed:
        free_mb_mgr(gcm_manager)
        gcm_manager = NULL
        return
    gcm_kinds[0].key_bytes = 16
    gcm_kinds[0].pre = gcm_manager.gcm128_pre
    gcm_kinds[0].begin = gcm_manager.gcm128_init
    gcm_kinds[0].step[0] = gcm_manager.gcm128_dec_update
    gcm_kinds[0].step[1] = gcm_manager.gcm128_enc_update
    gcm_kinds[0].end[0] = gcm_manager.gcm128_dec_finalize
    gcm_kinds[0].end[1] = gcm_manager.gcm128_enc_finalize
    gcm_kinds[1].key_bytes = 32
    gcm_kinds[1].pre = gcm_manager.gcm256_pre
    gcm_kinds[1].begin = gcm_manager.gcm256_init
    gcm_kinds[1].step[0] = gcm_manager.gcm256_dec_update
    gcm_kinds[1].step[1] = gcm_manager.gcm256_enc_update
    gcm_kinds[1].end[0] = gcm_manager.gcm256_dec_finalize
    gcm_kinds[1].end[1] = gcm_manager.gcm256_enc_finalize


cdef inline OSSL_DISPATCH *dispatch_add(OSSL_DISPATCH *at, int function, cipher_function_t implementation) noexcept nogil:
    at.function_id = function
    at.function = implementation
    return at + 1


cdef void gcm_take_over(OSSL_ALGORITHM *algorithm, gcm_kind_t *kind, cipher_function_t new, void *provider) noexcept nogil:
    # What describes the cipher stays the default provider's; what works on a context becomes ours.
    cdef const OSSL_DISPATCH *offered = algorithm.implementation
    cdef OSSL_DISPATCH *at = kind.dispatch
    kind.provider = provider
    while offered.function_id:
        if offered.function_id < 16:
            kind.theirs[offered.function_id] = offered.function
        if offered.function_id in (
            OSSL_FUNC_CIPHER_GET_PARAMS, OSSL_FUNC_CIPHER_GETTABLE_PARAMS, OSSL_FUNC_CIPHER_GETTABLE_CTX_PARAMS,
            OSSL_FUNC_CIPHER_SETTABLE_CTX_PARAMS,
        ):
            at = dispatch_add(at, offered.function_id, offered.function)
        offered += 1
    at = dispatch_add(at, OSSL_FUNC_CIPHER_NEWCTX, new)
    at = dispatch_add(at, OSSL_FUNC_CIPHER_FREECTX, <cipher_function_t> gcm_free)
    at = dispatch_add(at, OSSL_FUNC_CIPHER_ENCRYPT_INIT, <cipher_function_t> gcm_encrypt_init)
    at = dispatch_add(at, OSSL_FUNC_CIPHER_DECRYPT_INIT, <cipher_function_t> gcm_decrypt_init)
    at = dispatch_add(at, OSSL_FUNC_CIPHER_UPDATE, <cipher_function_t> gcm_update)
    at = dispatch_add(at, OSSL_FUNC_CIPHER_FINAL, <cipher_function_t> gcm_final)
    at = dispatch_add(at, OSSL_FUNC_CIPHER_GET_CTX_PARAMS, <cipher_function_t> gcm_get_params)
    at = dispatch_add(at, OSSL_FUNC_CIPHER_SET_CTX_PARAMS, <cipher_function_t> gcm_set_params)
    dispatch_add(at, 0, NULL)
    algorithm.implementation = kind.dispatch
