"""The AES-GCM that TLS records are made with, called as libssl calls it, against known answers and another implementation."""

import ctypes
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from l4mesh import _fastpath

CRYPTO = ctypes.CDLL(_fastpath.__file__)  # gives what it is linked with, too
for name in ("EVP_CIPHER_fetch", "EVP_CIPHER_CTX_new"):
    getattr(CRYPTO, name).restype = ctypes.c_void_p
CRYPTO.EVP_CIPHER_fetch.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
CRYPTO.EVP_CIPHER_CTX_free.argtypes = [ctypes.c_void_p]
CRYPTO.EVP_CipherInit_ex.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
CRYPTO.EVP_CipherUpdate.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
CRYPTO.EVP_CipherFinal_ex.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
CRYPTO.EVP_CIPHER_CTX_ctrl.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
OURS = pytest.mark.skipif("AES-GCM of" not in _fastpath.openssl_version(), reason="OpenSSL's own AES-GCM is in use, which is laxer")
SET_IVLEN, GET_TAG, SET_TAG, SET_IV_FIXED, TLS1_AAD = 0x9, 0x10, 0x11, 0x12, 0x16  # EVP_CTRL_AEAD_*


class Gcm:
    """An EVP_CIPHER_CTX of our library context."""

    def __init__(self, key: bytes, *, encrypt: bool) -> None:
        self.encrypt = int(encrypt)
        cipher = CRYPTO.EVP_CIPHER_fetch(_fastpath.tls_library_address(), f"AES-{len(key) * 8}-GCM".encode(), None)
        self.context = CRYPTO.EVP_CIPHER_CTX_new()
        assert cipher
        assert CRYPTO.EVP_CipherInit_ex(self.context, cipher, None, None, None, self.encrypt)
        CRYPTO.EVP_CIPHER_free(ctypes.c_void_p(cipher))
        assert self.control(SET_IVLEN, 12) == 1
        assert CRYPTO.EVP_CipherInit_ex(self.context, None, None, key, None, -1)

    def __del__(self) -> None:
        CRYPTO.EVP_CIPHER_CTX_free(self.context)

    def control(self, command: int, length: int, data: object = None) -> int:
        return int(CRYPTO.EVP_CIPHER_CTX_ctrl(self.context, command, length, data))

    def start(self, iv: bytes) -> bool:
        return CRYPTO.EVP_CipherInit_ex(self.context, None, None, None, iv, self.encrypt) == 1

    def update(self, data: bytes, *, aad: bool = False, skip: int = 0) -> bytes | None:
        # In place, as libssl does it; a record of TLS 1.2 stays behind its nonce.
        buffer, written = ctypes.create_string_buffer(data, len(data) or 1), ctypes.c_int(-1)
        if CRYPTO.EVP_CipherUpdate(self.context, None if aad else buffer, ctypes.byref(written), buffer, len(data)) != 1:
            return None
        return b"" if aad else buffer.raw[skip : skip + written.value]

    def final(self) -> bool:
        out, written = ctypes.create_string_buffer(16), ctypes.c_int(-1)
        return CRYPTO.EVP_CipherFinal_ex(self.context, out, ctypes.byref(written)) == 1

    def tag(self) -> bytes | None:
        tag = ctypes.create_string_buffer(16)
        return tag.raw if self.control(GET_TAG, 16, tag) == 1 else None

    def message(self, iv: bytes, aad: bytes, pieces: list[bytes], tag: bytes = b"") -> bytes | None:
        """The ciphertext and its tag, or the plaintext; None when it is refused."""
        assert self.start(iv)
        if tag:
            assert self.control(SET_TAG, 16, tag) == 1
        assert self.update(aad, aad=True) == b""
        out = b""
        for piece in pieces:
            done = self.update(piece)
            assert done is not None
            out += done
        return (out + (self.tag() or b"") if self.encrypt else out) if self.final() else None


def cut(chance: random.Random, data: bytes) -> list[bytes]:
    marks = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(5)))
    return [data[start:end] for start, end in zip([0, *marks], [*marks, len(data)], strict=True)]


# From "The Galois/Counter Mode of Operation" (McGrew, Viega 2005), appendix B: test cases 1 to 4 and 13 to 16.
PLAIN = bytes.fromhex(
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255"
)
KEY = bytes.fromhex("feffe9928665731c6d6a8f9467308308")
IV = bytes.fromhex("cafebabefacedbaddecaf888")
AAD = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
CIPHER_128 = (
    "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e21d514b25466931c7d8f6a5aac84aa051ba30b396a0aac973d58e091473f5985"
)
CIPHER_256 = (
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad"
)


@pytest.mark.parametrize(
    ("key", "iv", "aad", "plain", "sealed"),
    [
        (bytes(16), bytes(12), b"", b"", "58e2fccefa7e3061367f1d57a4e7455a"),
        (bytes(16), bytes(12), b"", bytes(16), "0388dace60b6a392f328c2b971b2fe78ab6e47d42cec13bdf53a67b21257bddf"),
        (KEY, IV, b"", PLAIN, CIPHER_128 + "4d5c2af327cd64a62cf35abd2ba6fab4"),
        (KEY, IV, AAD, PLAIN[:60], CIPHER_128[:120] + "5bc94fbc3221a5db94fae95ae7121a47"),
        (bytes(32), bytes(12), b"", b"", "530f8afbc74536b9a963b4f1c4cb738b"),
        (bytes(32), bytes(12), b"", bytes(16), "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"),
        (KEY * 2, IV, b"", PLAIN, CIPHER_256 + "b094dac5d93471bdec1a502270e3cc6c"),
        (KEY * 2, IV, AAD, PLAIN[:60], CIPHER_256[:120] + "76fc6ece0f4e1768cddf8853bb2d551b"),
    ],
)
def test_known_answers(key: bytes, iv: bytes, aad: bytes, plain: bytes, sealed: str) -> None:
    whole = bytes.fromhex(sealed)
    assert Gcm(key, encrypt=True).message(iv, aad, [plain]) == whole
    assert Gcm(key, encrypt=False).message(iv, aad, [whole[:-16]], whole[-16:]) == plain


@pytest.mark.parametrize("bits", [128, 256])
def test_agrees_with_another_implementation_at_any_length_in_any_pieces(bits: int) -> None:
    chance = random.Random(bits)
    key = chance.randbytes(bits // 8)
    other, seal, unseal = AESGCM(key), Gcm(key, encrypt=True), Gcm(key, encrypt=False)
    for length in [*range(130), 255, 256, 257, 768, 16384, 16385, *(chance.randrange(20001) for _ in range(300))]:
        iv, aad, plain = chance.randbytes(12), chance.randbytes(chance.randrange(65)), chance.randbytes(length)
        sealed = seal.message(iv, aad, cut(chance, plain))
        assert sealed == other.encrypt(iv, plain, aad)
        assert unseal.message(iv, aad, cut(chance, sealed[:-16]), sealed[-16:]) == plain


@pytest.mark.parametrize("bits", [128, 256])
def test_a_flipped_bit_is_refused_and_the_next_message_is_not(bits: int) -> None:
    chance = random.Random(bits)
    key, aad = chance.randbytes(bits // 8), b"\x17\x03\x03\x00\x40"
    unseal = Gcm(key, encrypt=False)
    for length in (1, 16, 100, 1000):
        iv, plain = chance.randbytes(12), chance.randbytes(length)
        whole = aad + AESGCM(key).encrypt(iv, plain, aad)
        for place in [*range(5), 5, 4 + length, *range(len(whole) - 16, len(whole))]:
            forged = bytearray(whole)
            forged[place] ^= 1 << chance.randrange(8)
            assert unseal.message(iv, bytes(forged[:5]), [bytes(forged[5:-16])], bytes(forged[-16:])) is None
        assert unseal.message(iv, aad, [whole[5:-16]], whole[-16:]) == plain


@OURS
def test_each_message_needs_an_iv_of_its_own() -> None:
    seal = Gcm(KEY, encrypt=True)
    assert seal.update(b"text") is None
    assert not seal.final()
    assert seal.message(IV, AAD, [b"text"]) == AESGCM(KEY).encrypt(IV, b"text", AAD)
    assert seal.update(AAD, aad=True) is None
    assert seal.update(b"text") is None
    assert not seal.final()
    assert seal.start(IV[::-1])
    assert seal.update(b"text")


def test_no_tag_before_the_end_and_no_end_without_a_tag() -> None:
    seal = Gcm(KEY, encrypt=True)
    assert seal.tag() is None
    assert seal.start(IV)
    assert seal.update(b"text")
    assert seal.tag() is None
    assert seal.final()
    assert seal.tag() == AESGCM(KEY).encrypt(IV, b"text", None)[-16:]
    unseal = Gcm(KEY, encrypt=False)
    assert unseal.start(IV)
    assert unseal.update(b"text")
    assert not unseal.final()


@OURS
def test_a_tag_serves_one_message() -> None:
    sealed = AESGCM(KEY).encrypt(IV, b"text", AAD)
    unseal = Gcm(KEY, encrypt=False)
    assert unseal.message(IV, AAD, [sealed[:-16]], sealed[-16:]) == b"text"
    assert unseal.message(IV, AAD, [sealed[:-16]]) is None


def test_a_message_that_is_not_ended_leaves_nothing_to_the_next_one() -> None:
    for keys in ((KEY, KEY), (KEY, KEY[::-1]), (KEY * 2, KEY * 2)):
        seals = [Gcm(key, encrypt=True) for key in keys]
        for given_up in (seals[0], Gcm(keys[0], encrypt=True)):
            assert given_up.start(IV)
            assert given_up.update(b"some of a block")
            for key, seal in zip(keys, seals, strict=True):
                assert seal.message(IV[::-1], b"", [b"text"]) == AESGCM(key).encrypt(IV[::-1], b"text", None)


@pytest.mark.skipif("libgcrypt" not in _fastpath.openssl_version(), reason="each context has its own message")
def test_of_two_messages_of_a_thread_the_first_is_refused_and_the_second_whole() -> None:
    first, second = Gcm(KEY, encrypt=True), Gcm(KEY[::-1], encrypt=True)
    assert first.start(IV)
    assert first.update(b"one") is not None
    assert second.start(IV)
    out = second.update(b"two")
    assert out is not None
    assert first.update(b"one") is None
    assert not first.final()
    assert first.tag() is None
    assert second.final()
    assert out + (second.tag() or b"") == AESGCM(KEY[::-1]).encrypt(IV, b"two", None)
    assert first.message(IV[::-1], AAD, [b"one"]) == AESGCM(KEY).encrypt(IV[::-1], b"one", AAD)


@pytest.mark.skipif("libgcrypt" in _fastpath.openssl_version(), reason="a thread has one message")
def test_messages_may_be_interleaved() -> None:
    keys = [KEY, KEY[::-1], KEY * 2]
    seals = [Gcm(key, encrypt=True) for key in keys]
    outs = [b"", b"", b""]
    assert all(seal.start(IV) for seal in seals)
    for start in range(0, 60, 20):
        for index, seal in enumerate(seals):
            outs[index] += seal.update(PLAIN[start : start + 20]) or b""
    for key, seal, out in zip(keys, seals, outs, strict=True):
        assert seal.final()
        assert out + (seal.tag() or b"") == AESGCM(key).encrypt(IV, PLAIN[:60], None)


def test_threads_do_not_disturb_each_other() -> None:
    def work(seed: int) -> int:
        chance = random.Random(seed)
        wrong = 0
        for _ in range(20):
            key = chance.randbytes(32)
            seal = Gcm(key, encrypt=True)
            for _ in range(10):
                iv, plain = chance.randbytes(12), chance.randbytes(5000)
                wrong += seal.message(iv, AAD, [plain[:77], plain[77:]]) != AESGCM(key).encrypt(iv, plain, AAD)
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(8))) == 0


def test_a_new_key_takes_effect() -> None:
    seal = Gcm(KEY, encrypt=True)
    for key in (KEY, KEY[::-1]):
        assert CRYPTO.EVP_CipherInit_ex(seal.context, None, None, key, None, -1)
        assert seal.message(IV, AAD, [PLAIN]) == AESGCM(key).encrypt(IV, PLAIN, AAD)


def test_another_length_of_iv_goes_to_openssl() -> None:
    for before in (False, True):
        seal = Gcm(KEY, encrypt=True)
        if before:
            assert seal.message(IV, AAD, [PLAIN])
        assert seal.control(SET_IVLEN, 16) == 1
        assert seal.message(bytes(16), AAD, [PLAIN]) == AESGCM(KEY).encrypt(bytes(16), PLAIN, AAD)


@pytest.mark.parametrize("key", [KEY, KEY * 2])
def test_tls_1_2_records(key: bytes) -> None:
    """RFC 5288: the nonce is four fixed bytes and eight that each record carries; sequence number and header are the AAD."""
    seal, unseal = Gcm(key, encrypt=True), Gcm(key, encrypt=False)
    assert seal.control(SET_IV_FIXED, 4, b"salt") == 1
    assert unseal.control(SET_IV_FIXED, 4, b"salt") == 1
    nonces = set()
    for number in range(3):
        header = bytes([0, 0, 0, 0, 0, 0, 0, number, 23, 3, 3])
        text = bytes([number]) * 1000
        assert seal.control(TLS1_AAD, 13, header + (8 + len(text)).to_bytes(2, "big")) == 16
        record = seal.update(bytes(8) + text + bytes(16))
        assert record is not None
        aad = header + len(text).to_bytes(2, "big")
        assert AESGCM(key).decrypt(b"salt" + record[:8], record[8:], aad) == text
        nonces.add(record[:8])
        assert unseal.control(TLS1_AAD, 13, header + len(record).to_bytes(2, "big")) == 16
        assert unseal.update(record, skip=8) == text
    assert len(nonces) == 3
