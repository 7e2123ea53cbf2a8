# Declarations only: what AES-GCM needs of Intel's libipsec-mb; without its header nothing is there (setup.py).

from libc.stdint cimport uint8_t, uint64_t

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
