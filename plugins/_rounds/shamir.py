"""Shamir's secret sharing (Communications of the ACM 22, 1979) of 32 bytes, over the prime 2^521 - 1.

A share is the value of a random polynomial of degree threshold - 1 at its holder's point; the secret is the
value at 0. Fewer shares than the threshold say nothing at all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from edged import ConfigError, ProtocolError

PRIME = (1 << 521) - 1
SECRET_BYTES = 32
SHARE_BYTES = 66
DRAWN_BYTES = SHARE_BYTES + 16  # modulo the prime: uniform but for 2^-128

Entropy = Callable[[int], bytes]


def split(secret: bytes, points: Iterable[int], threshold: int, entropy: Entropy) -> dict[int, bytes]:
    """A share (66 bytes) for each point, an integer above 0. `entropy(n)`: n fresh random bytes.

    ConfigError where the points are not distinct, not above 0 or fewer than the threshold.
    """
    points = tuple(points)
    if len(set(points)) != len(points) or not all(0 < point < PRIME for point in points):
        raise ConfigError("expected distinct points above 0")
    if not 1 <= threshold <= len(points):
        raise ConfigError(f"expected a threshold of 1 to {len(points)} points, got {threshold}")
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"expected a secret of {SECRET_BYTES} bytes, got {len(secret)}")
    coefficients = [int.from_bytes(entropy(DRAWN_BYTES), "big") % PRIME for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    return {point: _at(coefficients, point).to_bytes(SHARE_BYTES, "big") for point in points}


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from the shares by point; the `threshold` lowest points are used.

    ProtocolError (mask-share) where they are too few, of a wrong size, or of no secret.
    """
    if len(shares) < threshold:
        raise ProtocolError(f"expected {threshold} shares, got {len(shares)}", code="mask-share")
    points = sorted(shares)[:threshold]
    secret = 0
    for point in points:
        value = int.from_bytes(shares[point], "big")
        if len(shares[point]) != SHARE_BYTES or value >= PRIME:
            raise ProtocolError(f"the share at {point} is no share", code="mask-share")
        above, below = 1, 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        secret = (secret + value * above * pow(below, -1, PRIME)) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ProtocolError("the shares do not combine to a secret", code="mask-share")
    return secret.to_bytes(SECRET_BYTES, "big")


def _at(coefficients: list[int], point: int) -> int:
    """Horner's rule; the highest power first."""
    value = 0
    for coefficient in coefficients:
        value = (value * point + coefficient) % PRIME
    return value
