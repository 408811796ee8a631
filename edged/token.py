"""The invite token: what one person sends another to pair two nodes.

Text "edged1-" and the base32 of a msgpack list [port, public key, one-time secret key, expiry, zone,
addresses...]. It is a secret until it is used or expires.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import get_args

import msgpack

from .errors import TrustError
from .types import Zone

PREFIX = "edged1-"
CHARS_MAX = 1024
ADDRESSES_MAX = 8


@dataclass(frozen=True, slots=True)
class Token:
    addresses: tuple[str, ...]
    port: int
    public_key: bytes  # the inviter's
    one_time_secret: bytes  # of the client key that ZAP admits once
    expires_at: int  # seconds since the epoch, the inviter's clock
    zone: Zone = "own"

    def __repr__(self) -> str:  # a secret never reaches a log line
        return "Token(...)"

    def encode(self) -> str:
        fields = [self.port, self.public_key, self.one_time_secret, self.expires_at, self.zone]
        packed = msgpack.packb([*fields, *self.addresses[:ADDRESSES_MAX]])
        return PREFIX + base64.b32encode(packed).decode().rstrip("=").lower()


def decode(text: str) -> Token:
    """TrustError on anything `encode` did not make."""
    try:
        text = text.strip()
        if not text.startswith(PREFIX) or len(text) > CHARS_MAX:
            raise ValueError
        body = text.removeprefix(PREFIX).upper()
        packed = base64.b32decode(body + "=" * (-len(body) % 8))
        port, public_key, secret, expires_at, zone, *addresses = msgpack.unpackb(packed)
        token = Token(tuple(addresses), port, public_key, secret, expires_at, zone)
        _check(token)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise TrustError(
            f"expected a token like {PREFIX}...; {len(text)} characters came that are not one",
            remedy="copy the whole line that `edged invite` printed",
        ) from error
    return token


def _check(token: Token) -> None:
    is_sound = (
        all(isinstance(key, bytes) and len(key) == 32 for key in (token.public_key, token.one_time_secret))
        and type(token.port) is int
        and 0 < token.port < 65536
        and type(token.expires_at) is int
        and token.zone in get_args(Zone)
        and 0 < len(token.addresses) <= ADDRESSES_MAX
        and all(isinstance(address, str) and len(address) <= 64 for address in token.addresses)
    )
    if not is_sound:
        raise ValueError
