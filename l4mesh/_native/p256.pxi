# Part of _fastpath: the public key of a peer's certificate, where it is on P-256, without making the curve anew for each.

# OpenSSL's decoder of EC keys builds a whole EC_GROUP by its name for every key, Montgomery contexts and all, which takes a third of
# the time of reading a certificate; copying one is cheap. So the decoder and the loader of our provider are the default one's with a
# first look of ours: the one DER that a named P-256 key with an uncompressed point can have becomes a copy of a key that has the
# curve already, and is given the point, by the default provider's own functions (provider-keymgmt(7), OSSL_FUNC_keymgmt_dup and
# _set_params, as EVP_PKEY_set1_encoded_public_key does it). They check that it is on the curve. Whatever else comes, or fails, goes to
# the default provider's decoder as if nobody had looked.

cdef enum:
    P256_HEADER_BYTES = 26
    P256_POINT_BYTES = 65             # uncompressed

cdef const uint8_t *P256_HEADER = (
    b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00"
)
cdef const uint8_t *P256_GENERATOR = (    # SEC 2, 2.4.2
    b"\x04"
    b"\x6b\x17\xd1\xf2\xe1\x2c\x42\x47\xf8\xbc\xe6\xe5\x63\xa4\x40\xf2\x77\x03\x7d\x81\x2d\xeb\x33\xa0\xf4\xa1\x39\x45\xd8\x98\xc2\x96"
    b"\x4f\xe3\x42\xe2\xfe\x1a\x7f\x9b\x8e\xe7\xeb\x4a\x7c\x0f\x9e\x16\x2b\xce\x33\x57\x6b\x31\x5e\xce\xcb\xb6\x40\x68\x37\xbf\x51\xf5"
)

ctypedef int (*object_callback_t)(const OSSL_PARAM *, void *) noexcept nogil
ctypedef int (*decode_t)(void *, void *, int, object_callback_t, void *, void *, void *) noexcept nogil
ctypedef void *(*key_new_t)(void *) noexcept nogil
ctypedef void (*key_free_t)(void *) noexcept nogil
ctypedef void *(*key_load_t)(const void *, size_t) noexcept nogil
ctypedef int (*key_import_t)(void *, int, const OSSL_PARAM *) noexcept nogil
ctypedef int (*key_set_params_t)(void *, const OSSL_PARAM *) noexcept nogil
ctypedef void *(*key_dup_t)(const void *, int) noexcept nogil
ctypedef int (*bio_read_t)(void *, void *, size_t, size_t *) noexcept nogil
ctypedef int (*bio_ctrl_t)(void *, int, long, void *) noexcept nogil

# What a decoder hands to the loader. Its size tells it from the default provider's, which is a pointer.
ctypedef struct p256_reference_t:
    void *key
    uint64_t is_ours

ctypedef struct p256_t:
    void *curve                       # the key that is copied
    decode_t decode                   # these are the default provider's
    key_load_t load
    key_free_t free
    key_set_params_t set_params
    key_dup_t dup
    bio_read_t read                   # these are libcrypto's
    bio_ctrl_t ctrl
    OSSL_DISPATCH decoder[16]
    OSSL_DISPATCH manager[40]

cdef p256_t p256


cdef void *p256_key(const uint8_t *point) noexcept nogil:
    # The key as the default provider has them, or NULL.
    cdef OSSL_PARAM params[2]
    cdef void *key = p256.dup(p256.curve, OSSL_KEYMGMT_SELECT_ALL_PARAMETERS)
    params[0] = OSSL_PARAM_construct_octet_string(OSSL_PKEY_PARAM_ENCODED_PUBLIC_KEY, <void *> point, P256_POINT_BYTES)
    params[1] = OSSL_PARAM_construct_end()
    if key != NULL and p256.set_params(key, params) != 1:
        p256.free(key)
        return NULL
    return key


cdef int p256_decode(
    void *context, void *source, int selection, object_callback_t take, void *argument, void *password, void *password_argument
) noexcept nogil:
    cdef uint8_t spki[P256_HEADER_BYTES + P256_POINT_BYTES + 1]
    cdef size_t length = 0
    cdef int start = p256.ctrl(source, BIO_C_FILE_TELL, 0, NULL)
    cdef int kind = OSSL_OBJECT_PKEY
    cdef int taken
    cdef OSSL_PARAM params[4]
    cdef p256_reference_t reference
    if start < 0:
        return p256.decode(context, source, selection, take, argument, password, password_argument)
    reference.is_ours = True
    reference.key = NULL
    ERR_set_mark()
    if (
        p256.read(source, spki, sizeof(spki), &length) == 1
        and length == P256_HEADER_BYTES + P256_POINT_BYTES and memcmp(spki, P256_HEADER, P256_HEADER_BYTES) == 0
    ):
        reference.key = p256_key(spki + P256_HEADER_BYTES)
    ERR_pop_to_mark()
    if reference.key == NULL:
        p256.ctrl(source, BIO_C_FILE_SEEK, start, NULL)
        return p256.decode(context, source, selection, take, argument, password, password_argument)
    params[0] = OSSL_PARAM_construct_int(OSSL_OBJECT_PARAM_TYPE, &kind)
    params[1] = OSSL_PARAM_construct_utf8_string(OSSL_OBJECT_PARAM_DATA_TYPE, b"EC", 0)
    params[2] = OSSL_PARAM_construct_octet_string(OSSL_OBJECT_PARAM_REFERENCE, &reference, sizeof(reference))
    params[3] = OSSL_PARAM_construct_end()
    taken = take(params, argument)
    p256.free(reference.key)
    return taken


cdef void *p256_load(const void *reference, size_t size) noexcept nogil:
    cdef p256_reference_t *ours = <p256_reference_t *> reference
    cdef void *key
    if size != sizeof(p256_reference_t):
        return p256.load(reference, size)
    key = ours.key
    ours.key = NULL
    return key


cdef void p256_take_over_manager(OSSL_ALGORITHM *algorithm, void *provider) noexcept nogil:
    # Changes nothing where a key can't be made in this way, which is tried with the generator of the curve, or where more is offered
    # than there is place for.
    cdef const OSSL_DISPATCH *offered = algorithm.implementation
    cdef OSSL_DISPATCH *at = p256.manager
    cdef key_new_t new = NULL
    cdef key_import_t import_from = NULL
    cdef OSSL_PARAM params[2]
    cdef void *curve
    cdef void *tried
    while offered.function_id and at < &p256.manager[39]:
        at[0] = offered[0]
        if offered.function_id == OSSL_FUNC_KEYMGMT_NEW:
            new = <key_new_t> offered.function
        elif offered.function_id == OSSL_FUNC_KEYMGMT_FREE:
            p256.free = <key_free_t> offered.function
        elif offered.function_id == OSSL_FUNC_KEYMGMT_LOAD:
            p256.load = <key_load_t> offered.function
            at.function = <dispatch_function_t> p256_load
        elif offered.function_id == OSSL_FUNC_KEYMGMT_IMPORT:
            import_from = <key_import_t> offered.function
        elif offered.function_id == OSSL_FUNC_KEYMGMT_SET_PARAMS:
            p256.set_params = <key_set_params_t> offered.function
        elif offered.function_id == OSSL_FUNC_KEYMGMT_DUP:
            p256.dup = <key_dup_t> offered.function
        offered += 1
        at += 1
    at.function_id = 0
    if (
        offered.function_id or new == NULL or import_from == NULL or p256.free == NULL or p256.load == NULL
        or p256.set_params == NULL or p256.dup == NULL
    ):
        return
    curve = new(provider)
    params[0] = OSSL_PARAM_construct_utf8_string(OSSL_PKEY_PARAM_GROUP_NAME, b"prime256v1", 0)
    params[1] = OSSL_PARAM_construct_end()
    if curve == NULL or import_from(curve, OSSL_KEYMGMT_SELECT_ALL_PARAMETERS, params) != 1:
        p256.free(curve)
        return
    p256.curve = curve
    tried = p256_key(P256_GENERATOR)
    if tried == NULL:
        p256.free(curve)
        p256.curve = NULL
        return
    p256.free(tried)
    algorithm.implementation = p256.manager


cdef void p256_take_over_decoder(OSSL_ALGORITHM *algorithm) noexcept nogil:
    cdef const OSSL_DISPATCH *offered = algorithm.implementation
    cdef OSSL_DISPATCH *at = p256.decoder
    if p256.curve == NULL:
        return
    while offered.function_id and at < &p256.decoder[15]:
        at[0] = offered[0]
        if offered.function_id == OSSL_FUNC_DECODER_DECODE:
            p256.decode = <decode_t> offered.function
            at.function = <dispatch_function_t> p256_decode
        offered += 1
        at += 1
    at.function_id = 0
    if p256.decode != NULL and not offered.function_id:
        algorithm.implementation = p256.decoder


cdef void p256_connect(const OSSL_DISPATCH *core) noexcept nogil:
    # How libcrypto lets a provider read what is to be decoded.
    while core.function_id:
        if core.function_id == OSSL_FUNC_BIO_READ_EX:
            p256.read = <bio_read_t> core.function
        elif core.function_id == OSSL_FUNC_BIO_CTRL:
            p256.ctrl = <bio_ctrl_t> core.function
        core += 1
