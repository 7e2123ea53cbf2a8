"""The public keys of certificates as our library context reads them, against the default one, which knows nothing of ours."""

import ctypes
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from l4mesh import _fastpath

CRYPTO = ctypes.CDLL(_fastpath.__file__)  # gives what it is linked with, too
for name in ("d2i_PUBKEY_ex", "EVP_MD_CTX_new"):
    getattr(CRYPTO, name).restype = ctypes.c_void_p
CRYPTO.d2i_PUBKEY_ex.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_char_p]
CRYPTO.EVP_PKEY_eq.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
CRYPTO.EVP_PKEY_get_bits.argtypes = [ctypes.c_void_p]
CRYPTO.EVP_PKEY_get_octet_string_param.argtypes = [
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
]  # fmt: skip
CRYPTO.EVP_PKEY_free.argtypes = [ctypes.c_void_p]
CRYPTO.EVP_PKEY_get_group_name.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
CRYPTO.EVP_PKEY_get_ec_point_conv_form.argtypes = [ctypes.c_void_p]
CRYPTO.EVP_MD_CTX_free.argtypes = [ctypes.c_void_p]
CRYPTO.EVP_DigestVerifyInit_ex.argtypes = [
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p,
]  # fmt: skip
CRYPTO.EVP_DigestVerify.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
OURS, THEIRS = _fastpath.tls_library_address(), 0
POINT = 26  # where it begins in a key on P-256


class Key:
    """An EVP_PKEY, or none where the library context makes none of it."""

    def __init__(self, library: int, der: bytes) -> None:
        self.library = library
        buffer = ctypes.create_string_buffer(der, len(der))
        at = ctypes.c_void_p(ctypes.addressof(buffer))
        self.address = CRYPTO.d2i_PUBKEY_ex(None, ctypes.byref(at), len(der), library, None)

    def __del__(self) -> None:
        CRYPTO.EVP_PKEY_free(self.address)

    def described(self) -> tuple[int, bytes, bytes, int] | None:
        """Bits, public key (none of RSA), curve, form of the point."""
        if not self.address:
            return None
        public, curve, length = (ctypes.create_string_buffer(200), ctypes.create_string_buffer(50), ctypes.c_size_t(0))
        CRYPTO.EVP_PKEY_get_octet_string_param(self.address, b"pub", public, 200, ctypes.byref(length))
        CRYPTO.EVP_PKEY_get_group_name(self.address, curve, 50, None)
        bits = CRYPTO.EVP_PKEY_get_bits(self.address)
        return bits, public.raw[: length.value], curve.value, CRYPTO.EVP_PKEY_get_ec_point_conv_form(self.address)

    def equals(self, other: "Key") -> bool:
        return bool(CRYPTO.EVP_PKEY_eq(self.address, other.address) == 1)

    def verifies(self, signature: bytes, data: bytes) -> bool:
        context = CRYPTO.EVP_MD_CTX_new()
        assert CRYPTO.EVP_DigestVerifyInit_ex(context, None, b"SHA256", self.library, None, self.address, None) == 1
        result = CRYPTO.EVP_DigestVerify(context, signature, len(signature), data, len(data))
        CRYPTO.EVP_MD_CTX_free(context)
        return bool(result == 1)


def der_of(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()).public_key(),
        ec.generate_private_key(ec.SECP384R1()).public_key(),
        ec.generate_private_key(ec.SECP521R1()).public_key(),
        rsa.generate_private_key(65537, 2048).public_key(),
        ed25519.Ed25519PrivateKey.generate().public_key(),
    ],
    ids=["P-256", "P-384", "P-521", "RSA", "Ed25519"],
)
def test_a_key_of_every_kind_is_read(key: PublicKeyTypes) -> None:
    ours, theirs = Key(OURS, der_of(key)), Key(THEIRS, der_of(key))
    assert ours.described() == theirs.described() is not None
    assert ours.equals(theirs)


def test_a_signature_is_verified_with_the_key_that_was_read_and_with_no_other() -> None:
    one, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    signature = one.sign(b"hello", ec.ECDSA(SHA256()))
    assert Key(OURS, der_of(one.public_key())).verifies(signature, b"hello")
    assert not Key(OURS, der_of(one.public_key())).verifies(signature, b"hullo")
    assert not Key(OURS, der_of(other.public_key())).verifies(signature, b"hello")


def test_what_is_no_plain_key_on_p256_is_what_openssl_makes_of_it() -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    good = der_of(key)
    odd = good[-1] & 1
    compressed = bytes([2 + odd]) + good[POINT + 1 : POINT + 33]
    cases = {
        "not on the curve": good[:-1] + bytes([good[-1] ^ 1]),
        "all zeros": good[: POINT + 1] + bytes(64),
        "larger than the field": good[: POINT + 1] + b"\xff" * 64,
        "hybrid": good[:POINT] + bytes([6 + odd]) + good[POINT + 1 :],
        "hybrid, wrong parity": good[:POINT] + bytes([7 - odd]) + good[POINT + 1 :],
        "compressed": b"\x30\x39" + good[2:24] + b"\x22\x00" + compressed,
        "infinity": b"\x30\x19" + good[2:24] + b"\x02\x00\x00",
        "unused bits": good[: POINT - 1] + b"\x01" + good[POINT:],
        "another curve": good[:22] + b"\x06" + good[23:],
        "cut short": good[:-1],
        "empty": b"",
    }
    accepted = set()
    for name, der in cases.items():
        theirs = Key(THEIRS, der).described()
        assert Key(OURS, der).described() == theirs, name
        if theirs:
            accepted.add(name)
    assert {"hybrid", "compressed"} <= accepted
    assert not accepted & {"not on the curve", "all zeros", "larger than the field", "cut short", "empty"}
    # Bytes behind the key are the caller's business.
    assert Key(OURS, good + b"more").described() == Key(THEIRS, good + b"more").described() == Key(OURS, good).described()


def test_any_damage_is_what_openssl_makes_of_it() -> None:
    chance = random.Random(256)
    good = der_of(ec.generate_private_key(ec.SECP256R1()).public_key())
    for _ in range(3000):
        der = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            der[chance.randrange(len(der) if chance.random() < 0.5 else 30)] = chance.randrange(256)
        assert Key(OURS, bytes(der)).described() == Key(THEIRS, bytes(der)).described(), der.hex()


def test_threads_read_keys_at_once() -> None:
    keys = [der_of(ec.generate_private_key(ec.SECP256R1()).public_key()) for _ in range(8)]
    start = threading.Barrier(len(keys))

    def read(der: bytes) -> bool:
        start.wait(20)
        seen = [Key(OURS, der).described() for _ in range(300)]
        return all(one is not None and one[1] == der[POINT:] for one in seen)

    with ThreadPoolExecutor(len(keys)) as threads:
        assert all(threads.map(read, keys))
