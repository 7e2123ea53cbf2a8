# Declarations only: what AES-GCM needs of libgcrypt; without its header nothing is there (setup.py).

from libc.stdint cimport uint8_t, uint64_t

cdef extern from *:
    """
    #ifdef L4_GCRYPT
    #include <gcrypt.h>
    static inline const char *l4_gcrypt_version(void) { return gcry_check_version(NULL); }
    /* Makes it ready, and tells whether it uses VAES. In FIPS mode it takes no IV of ours. */
    static inline int l4_gcrypt_has_vaes(void)
    {
        char *features;
        int has;
        if (!gcry_control(GCRYCTL_INITIALIZATION_FINISHED_P)) {
            if (gcry_check_version("1.10.0") == NULL) return 0;
            gcry_control(GCRYCTL_DISABLE_SECMEM, 0);
            gcry_control(GCRYCTL_INITIALIZATION_FINISHED, 0);
        }
        if (gcry_fips_mode_active() || (features = gcry_get_config(0, "hwflist")) == NULL) return 0;
        has = strstr(features, ":intel-vaes-vpclmul:") != NULL;
        gcry_free(features);
        return has;
    }
    #else
    typedef void *gcry_cipher_hd_t;
    enum { GCRY_CIPHER_AES128, GCRY_CIPHER_AES256, GCRY_CIPHER_MODE_GCM };
    static inline const char *l4_gcrypt_version(void) { return ""; }
    static inline int l4_gcrypt_has_vaes(void) { return 0; }
    static inline unsigned gcry_cipher_open(gcry_cipher_hd_t *handle, int cipher, int mode, unsigned flags)
    { (void) handle; (void) cipher; (void) mode; (void) flags; return 1; }
    static inline void gcry_cipher_close(gcry_cipher_hd_t handle) { (void) handle; }
    static inline unsigned gcry_cipher_reset(gcry_cipher_hd_t handle) { (void) handle; return 1; }
    static inline unsigned gcry_cipher_setkey(gcry_cipher_hd_t handle, const void *data, size_t length)
    { (void) handle; (void) data; (void) length; return 1; }
    static inline unsigned gcry_cipher_encrypt(gcry_cipher_hd_t handle, void *out, size_t size, const void *data, size_t length)
    { (void) handle; (void) out; (void) size; (void) data; (void) length; return 1; }
    #define gcry_cipher_setiv gcry_cipher_setkey
    #define gcry_cipher_authenticate gcry_cipher_setkey
    #define gcry_cipher_gettag gcry_cipher_setkey
    #define gcry_cipher_decrypt gcry_cipher_encrypt
    #endif

    #include <pthread.h>
    /* A thread's handle for one length of key, with the key that it has and whose message is under way. */
    typedef struct {
        gcry_cipher_hd_t handle;
        uint64_t id;
        const void *message;
    } l4_gcrypt_t;
    static inline l4_gcrypt_t *l4_gcrypt(int kind) { static __thread l4_gcrypt_t mine[2]; return &mine[kind]; }
    """
    ctypedef void *gcry_cipher_hd_t
    ctypedef struct l4_gcrypt_t:
        gcry_cipher_hd_t handle
        uint64_t id         # 0: none
        const void *message
    ctypedef unsigned int pthread_key_t
    int GCRY_CIPHER_AES128, GCRY_CIPHER_AES256, GCRY_CIPHER_MODE_GCM
    const char *l4_gcrypt_version() noexcept nogil
    bint l4_gcrypt_has_vaes() noexcept nogil
    l4_gcrypt_t *l4_gcrypt(int kind) noexcept nogil
    unsigned gcry_cipher_open(gcry_cipher_hd_t *handle, int cipher, int mode, unsigned flags) noexcept nogil
    void gcry_cipher_close(gcry_cipher_hd_t handle) noexcept nogil
    unsigned gcry_cipher_reset(gcry_cipher_hd_t handle) noexcept nogil
    unsigned gcry_cipher_setkey(gcry_cipher_hd_t handle, const void *key, size_t length) noexcept nogil
    unsigned gcry_cipher_setiv(gcry_cipher_hd_t handle, const void *iv, size_t length) noexcept nogil
    unsigned gcry_cipher_authenticate(gcry_cipher_hd_t handle, const void *aad, size_t length) noexcept nogil
    unsigned gcry_cipher_encrypt(gcry_cipher_hd_t handle, void *out, size_t size, const void *data, size_t length) noexcept nogil
    unsigned gcry_cipher_decrypt(gcry_cipher_hd_t handle, void *out, size_t size, const void *data, size_t length) noexcept nogil
    unsigned gcry_cipher_gettag(gcry_cipher_hd_t handle, void *tag, size_t length) noexcept nogil
    int pthread_key_create(pthread_key_t *key, void (*at_end)(void *) noexcept nogil) noexcept nogil
    int pthread_setspecific(pthread_key_t key, const void *value) noexcept nogil
