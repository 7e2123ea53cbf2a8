# Part of _fastpath: AES-GCM with VAES where OpenSSL has none: from Intel's libipsec-mb (AVX-512) or libgcrypt (AVX2).

# OpenSSL has had AES-GCM with VAES since 3.1, for AVX-512 only. On a processor with VAES and without AVX-512 libgcrypt 1.10 takes 0.6
# to 0.75 of the time of OpenSSL 3.0 for a record of 16 KiB, and no more than it for the smallest.
#
# A context is ours as long as it is used as the TLS 1.3 record layer uses it: key, IV of 12 bytes, AAD in one piece, data, tag of
# 16 bytes. The first parameter of another kind makes it one of the default provider's (``other``), to which all calls then go:
# so the TLS 1.2 record layer, with its explicit nonces, is entirely OpenSSL's.
#
# A context keeps its key as it was given: an expanded one is a kilobyte or two, which an idle connection would hold for nothing, and
# takes 0.1 us to make. Each thread keeps the one that it used last (``l4_expanded_t``, ``l4_gcrypt_t``). libgcrypt's holds the message
# that is under way as well: a thread that begins another one with a key of that length gives the first one up, which is then refused.
# libssl does one after the other.
#
# Threads: the functions of ipsec-mb's table work on what they are given. All else that they write is the library's error number,
# which is not read here. A handle of libgcrypt is of one thread.

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

# One length of key, and the default provider's functions for it, by the number of the function.
ctypedef struct gcm_kind_t:
    int number
    size_t key_bytes
    aes_gcm_pre_t pre                     # these are ipsec-mb's
    aes_gcm_init_t begin
    aes_gcm_enc_dec_update_t step[2]      # [encrypting]
    aes_gcm_enc_dec_finalize_t end[2]
    int cipher                            # this is libgcrypt's
    void *provider
    dispatch_function_t theirs[16]
    OSSL_DISPATCH dispatch[24]

ctypedef struct gcm_t:
    const gcm_kind_t *kind
    void *other             # the default provider's context, once this one has stepped aside
    uint64_t key_id         # of no other key in the life of this process; 0: has none
    gcm_context_data message    # ipsec-mb's
    uint8_t key[32]
    uint8_t iv[GCM_IV_BYTES]
    uint8_t tag[GCM_TAG_BYTES]
    uint8_t state
    uint8_t encrypting
    uint8_t has_tag

# The library that makes the messages.
ctypedef struct gcm_library_t:
    const char *name                      # NULL: none, OpenSSL's own serves
    const char *version
    void (*forget)(const gcm_t *gcm) noexcept nogil
    bint (*begin)(gcm_t *gcm, const uint8_t *aad, size_t length) noexcept nogil
    bint (*step)(gcm_t *gcm, uint8_t *out, const uint8_t *data, size_t length) noexcept nogil
    bint (*end)(gcm_t *gcm, uint8_t *tag) noexcept nogil

cdef gcm_kind_t gcm_kinds[2]
cdef gcm_library_t gcm_library
cdef uint64_t gcm_keys = 0


# -- ipsec-mb

cdef inline const gcm_key_data *ipsec_mb_key(const gcm_t *gcm) noexcept nogil:
    cdef l4_expanded_t *expanded = l4_expanded()
    if expanded.id != gcm.key_id:
        gcm.kind.pre(gcm.key, &expanded.key)
        expanded.id = gcm.key_id
    return &expanded.key


cdef void ipsec_mb_forget(const gcm_t *gcm) noexcept nogil:
    cdef l4_expanded_t *expanded = l4_expanded()
    if expanded.id == gcm.key_id:
        OPENSSL_cleanse(expanded, sizeof(l4_expanded_t))


cdef bint ipsec_mb_begin(gcm_t *gcm, const uint8_t *aad, size_t length) noexcept nogil:
    gcm.kind.begin(ipsec_mb_key(gcm), &gcm.message, gcm.iv, aad, length)
    return True


cdef bint ipsec_mb_step(gcm_t *gcm, uint8_t *out, const uint8_t *data, size_t length) noexcept nogil:
    gcm.kind.step[gcm.encrypting](ipsec_mb_key(gcm), &gcm.message, out, data, length)
    return True


cdef bint ipsec_mb_end(gcm_t *gcm, uint8_t *tag) noexcept nogil:
    gcm.kind.end[gcm.encrypting](ipsec_mb_key(gcm), &gcm.message, tag, GCM_TAG_BYTES)
    return True


cdef bint ipsec_mb_open() noexcept nogil:
    global gcm_library
    cdef uint64_t needed = IMB_CPUFLAGS_AVX512_T2
    cdef IMB_MGR *manager
    if imb_get_feature_flags() & needed != needed:
        return False
    manager = alloc_mb_mgr(0)
    if manager == NULL:
        return False
    init_mb_mgr_auto(manager, NULL)
    needed |= IMB_FEATURE_SELF_TEST_PASS
    if manager.features & needed != needed:
        free_mb_mgr(manager)
        return False
    gcm_kinds[0].pre = manager.gcm128_pre
    gcm_kinds[0].begin = manager.gcm128_init
    gcm_kinds[0].step[0] = manager.gcm128_dec_update
    gcm_kinds[0].step[1] = manager.gcm128_enc_update
    gcm_kinds[0].end[0] = manager.gcm128_dec_finalize
    gcm_kinds[0].end[1] = manager.gcm128_enc_finalize
    gcm_kinds[1].pre = manager.gcm256_pre
    gcm_kinds[1].begin = manager.gcm256_init
    gcm_kinds[1].step[0] = manager.gcm256_dec_update
    gcm_kinds[1].step[1] = manager.gcm256_enc_update
    gcm_kinds[1].end[0] = manager.gcm256_dec_finalize
    gcm_kinds[1].end[1] = manager.gcm256_enc_finalize
    gcm_library = gcm_library_t(
        b"ipsec-mb", imb_get_version_str(), ipsec_mb_forget, ipsec_mb_begin, ipsec_mb_step, ipsec_mb_end
    )
    return True


# -- libgcrypt

cdef pthread_key_t gcrypt_at_end
cdef const uint8_t[32] NO_KEY


cdef inline void gcrypt_give_up(l4_gcrypt_t *mine) noexcept nogil:
    # A message that was not ended: a new IV alone would leave some of it to the next one.
    if mine.message != NULL:
        gcry_cipher_reset(mine.handle)
        mine.message = NULL


cdef void gcrypt_forget(const gcm_t *gcm) noexcept nogil:
    cdef l4_gcrypt_t *mine = l4_gcrypt(gcm.kind.number)
    if mine.id == gcm.key_id:
        gcrypt_give_up(mine)
        gcry_cipher_setkey(mine.handle, NO_KEY, gcm.kind.key_bytes)
        mine.id = 0


cdef bint gcrypt_begin(gcm_t *gcm, const uint8_t *aad, size_t length) noexcept nogil:
    cdef l4_gcrypt_t *mine = l4_gcrypt(gcm.kind.number)
    if mine.handle == NULL:
        if (
            pthread_setspecific(gcrypt_at_end, mine) != 0
            or gcry_cipher_open(&mine.handle, gcm.kind.cipher, GCRY_CIPHER_MODE_GCM, 0) != 0
        ):
            mine.handle = NULL
            l4_raise_out_of_memory()
            return False
    gcrypt_give_up(mine)
    if mine.id != gcm.key_id:
        mine.id = 0
        if gcry_cipher_setkey(mine.handle, gcm.key, gcm.kind.key_bytes) != 0:
            return False
        mine.id = gcm.key_id
    mine.message = gcm
    return gcry_cipher_setiv(mine.handle, gcm.iv, GCM_IV_BYTES) == 0 and (
        length == 0 or gcry_cipher_authenticate(mine.handle, aad, length) == 0
    )


cdef bint gcrypt_step(gcm_t *gcm, uint8_t *out, const uint8_t *data, size_t length) noexcept nogil:
    cdef l4_gcrypt_t *mine = l4_gcrypt(gcm.kind.number)
    if mine.message != gcm:
        return False
    if gcm.encrypting:
        return gcry_cipher_encrypt(mine.handle, out, length, data, length) == 0
    return gcry_cipher_decrypt(mine.handle, out, length, data, length) == 0


cdef bint gcrypt_end(gcm_t *gcm, uint8_t *tag) noexcept nogil:
    cdef l4_gcrypt_t *mine = l4_gcrypt(gcm.kind.number)
    if mine.message != gcm:
        return False
    if gcry_cipher_gettag(mine.handle, tag, GCM_TAG_BYTES) != 0:
        return False
    mine.message = NULL
    return True


cdef void gcrypt_close(void *one) noexcept nogil:
    # A thread ends.
    cdef int number
    for number in range(2):
        gcry_cipher_close(l4_gcrypt(number).handle)
        l4_gcrypt(number)[0] = l4_gcrypt_t(NULL, 0, NULL)


cdef bint gcrypt_open() noexcept nogil:
    global gcm_library
    if not l4_gcrypt_has_vaes() or pthread_key_create(&gcrypt_at_end, gcrypt_close) != 0:
        return False
    gcm_kinds[0].cipher = GCRY_CIPHER_AES128
    gcm_kinds[1].cipher = GCRY_CIPHER_AES256
    gcm_library = gcm_library_t(b"libgcrypt", l4_gcrypt_version(), gcrypt_forget, gcrypt_begin, gcrypt_step, gcrypt_end)
    return True


# -- a context, as libssl calls it

cdef void gcm_drop_key(gcm_t *gcm) noexcept nogil:
    # An expanded one can only be with this thread: a context stays with the worker that made it.
    if gcm.key_id:
        gcm_library.forget(gcm)
    OPENSSL_cleanse(gcm.key, sizeof(gcm.key))
    gcm.key_id = 0


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
    if not gcm_library.begin(gcm, aad, length):
        return False
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
        if not gcm_library.step(gcm, out, data, length):
            return 0
    written[0] = length
    return 1


cdef int gcm_final(void *context, uint8_t *out, size_t *written, size_t size) noexcept nogil:
    cdef gcm_t *gcm = <gcm_t *> context
    cdef uint8_t tag[GCM_TAG_BYTES]
    cdef bint ok
    if gcm.other != NULL:
        return (<cipher_final_t> gcm.kind.theirs[OSSL_FUNC_CIPHER_FINAL])(gcm.other, out, written, size)
    written[0] = 0
    if gcm.state != GCM_BEGUN and not gcm_begin(gcm, NULL, 0):
        return 0
    ok = gcm_library.end(gcm, tag)
    gcm.state = GCM_NO_IV
    if gcm.encrypting:
        if ok:
            memcpy(gcm.tag, tag, GCM_TAG_BYTES)
            gcm.state = GCM_SEALED
    else:
        ok = ok and gcm.has_tag and CRYPTO_memcmp(gcm.tag, tag, GCM_TAG_BYTES) == 0
        # What the tag of a forgery should have been is nobody's business.
        OPENSSL_cleanse(tag, GCM_TAG_BYTES)
        gcm.has_tag = False
    return ok


cdef void gcm_open() noexcept nogil:
    gcm_kinds[0].number = 0
    gcm_kinds[0].key_bytes = 16
    gcm_kinds[1].number = 1
    gcm_kinds[1].key_bytes = 32
    if not l4_openssl_has_vaes() and not ipsec_mb_open():
        gcrypt_open()


cdef inline OSSL_DISPATCH *dispatch_add(OSSL_DISPATCH *at, int function, dispatch_function_t implementation) noexcept nogil:
    at.function_id = function
    at.function = implementation
    return at + 1


cdef void gcm_take_over(OSSL_ALGORITHM *algorithm, gcm_kind_t *kind, dispatch_function_t new, void *provider) noexcept nogil:
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
    at = dispatch_add(at, OSSL_FUNC_CIPHER_FREECTX, <dispatch_function_t> gcm_free)
    at = dispatch_add(at, OSSL_FUNC_CIPHER_ENCRYPT_INIT, <dispatch_function_t> gcm_encrypt_init)
    at = dispatch_add(at, OSSL_FUNC_CIPHER_DECRYPT_INIT, <dispatch_function_t> gcm_decrypt_init)
    at = dispatch_add(at, OSSL_FUNC_CIPHER_UPDATE, <dispatch_function_t> gcm_update)
    at = dispatch_add(at, OSSL_FUNC_CIPHER_FINAL, <dispatch_function_t> gcm_final)
    at = dispatch_add(at, OSSL_FUNC_CIPHER_GET_CTX_PARAMS, <dispatch_function_t> gcm_get_params)
    at = dispatch_add(at, OSSL_FUNC_CIPHER_SET_CTX_PARAMS, <dispatch_function_t> gcm_set_params)
    dispatch_add(at, 0, NULL)
    algorithm.implementation = kind.dispatch
