"""What both sides of a masked sum make alike: the terms of a round, keys, digests and the expanded masks.

The protocol is in `masking`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edged import ConfigError, PolicyViolation, ProtocolError

from .fixed_point import FixedPoint
from .shamir import SHARE_BYTES

KEY_BYTES = 32
KEYS_BYTES = 3 * KEY_BYTES  # for sealing, for masks, and the commitment of the seed
DIGESTS_BYTES = 2 * 32
SEALED_BYTES = DIGESTS_BYTES + 2 * SHARE_BYTES + 16  # with ChaCha20-Poly1305's tag
MEMBERS_LEAST = 3  # of two, each knows the other's values from the sum
CHUNK = 1 << 17  # numbers of 8 bytes that are expanded at once: 1 MiB, so that it stays in a cache
ZEROS = bytes(8 * CHUNK)
SEED, SECRET = 0, 1  # the two kinds of share


def default_threshold(members: int) -> int:
    """floor(2 n / 3) + 1: 30 % may leave."""
    return 2 * members // 3 + 1


@dataclass(frozen=True)
class Terms:
    """What all members and the server know of a round before it begins.

    cohort: the ranks; values: how many numbers each sends; context: what names job, epoch and round, so that
    nothing of another round fits. ConfigError for a threshold that is not above half the cohort, or fewer
    than 3 members.
    """

    cohort: tuple[int, ...]
    values: int
    fixed: FixedPoint
    context: bytes
    threshold: int = 0  # 0: the default

    def __post_init__(self) -> None:
        n = len(self.cohort)
        if n < MEMBERS_LEAST or len(set(self.cohort)) != n or min(self.cohort) < 0:
            raise ConfigError(f"expected at least {MEMBERS_LEAST} distinct ranks, got {n}")
        if self.values < 1:
            raise ConfigError(f"expected values to sum, got {self.values}")
        if self.fixed.members < n:
            raise ConfigError(f"sums of {self.fixed.members} members fit; the cohort has {n}")
        if not self.threshold:
            object.__setattr__(self, "threshold", default_threshold(n))
        if not n < 2 * self.threshold <= 2 * n:
            raise ConfigError(f"expected a threshold above half of {n} members, got {self.threshold}")

    def need(self, ranks: Iterable[int], what: str) -> None:
        """PolicyViolation (mask-few) where fewer than the threshold are left."""
        left = len(set(ranks))
        if left < self.threshold:
            raise PolicyViolation(
                f"expected at least {self.threshold} members {what}, got {left}: nothing is unmasked",
                code="mask-few",
            )


def add_stream(total: np.ndarray, key: bytes, *, is_minus: bool = False) -> None:
    """Adds what a key of 32 bytes expands to, or takes it off: total (n,) uint64, in place, modulo 2^64.

    The stream is ChaCha20's (RFC 8439) from block 0 with a nonce of zeros, as little-endian integers.
    """
    encryptor = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    drawn = bytearray(8 * min(len(total), CHUNK))
    numbers = np.frombuffer(drawn, "<u8")
    combine = np.subtract if is_minus else np.add
    zeros = memoryview(ZEROS)
    for start in range(0, len(total), CHUNK):
        part = total[start : start + CHUNK]
        encryptor.update_into(zeros[: 8 * len(part)], drawn)
        combine(part, numbers[: len(part)], out=part)


def own_key(terms: Terms, rank: int, seed: bytes) -> bytes:
    """The key of a member's own mask."""
    return derived(terms, seed, b"own", rank)


def pair_key(terms: Terms, secret: X25519PrivateKey, rank: int, other: int, keys: bytes) -> bytes:
    """The key of the mask of `rank`, whose secret this is, and of `other`, who published `keys`."""
    shared = agreed(secret, other, keys[KEY_BYTES : 2 * KEY_BYTES])
    return derived(terms, shared, b"pair", *sorted((rank, other)))


def agreed(secret: X25519PrivateKey, other: int, public: bytes) -> bytes:
    """X25519 (RFC 7748). ProtocolError (mask-keys) for a public key that leaves no secret."""
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a point of low order, which makes a secret that everybody knows
        raise ProtocolError(f"the key of rank {other} is none", code="mask-keys") from error


def derived(terms: Terms, secret: bytes, use: bytes, *ranks: int) -> bytes:
    """HKDF with SHA-256 (RFC 5869): a key of 32 bytes for one use in this round."""
    said = b"edged masking 1 " + use + packed(*ranks, len(terms.context)) + terms.context
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=said).derive(secret)


def commitment(seed: bytes) -> bytes:
    """By it the server knows the seed when it has it; 32 bytes."""
    return hashlib.sha256(b"edged masking 1 seed" + seed).digest()


def share_digest(dealer: int, holder: int, kind: int, share: bytes) -> bytes:
    """By it the server knows a share, of the kind SEED or SECRET, when it has it; 32 bytes."""
    return hashlib.sha256(b"edged masking 1 share" + packed(dealer, holder, kind) + share).digest()


def packed(*numbers: int) -> bytes:
    """So that no two lists of numbers make the same bytes: how many, then each in 8."""
    return b"".join(number.to_bytes(8, "little") for number in (len(numbers), *numbers))
