"""A worker's key and self-signed certificate for one plan: whom the other end of a stream must show.

The only door to `cryptography`, and only a worker with peers goes through it, so the import stands in
the function: the daemon carries certificates as bytes, and a rank without others needs none.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

# A certificate lives as long as its plan, and a small board without a clock battery wakes up in 1970.
NOT_BEFORE = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
NOT_AFTER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)  # RFC 5280 4.1.2.5: no end


@dataclass(frozen=True, slots=True)
class Credential:
    """`certificate` is DER, and travels; `pem` holds it with its key, and stays in this process."""

    group: str
    rank: int
    certificate: bytes
    pem: bytes = field(repr=False)


def new_credential(group: str, rank: int) -> Credential:
    """A fresh P-256 key and a certificate of it that names `group` and `rank`. ImportError where
    `cryptography` is not installed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, group),
            x509.NameAttribute(NameOID.COMMON_NAME, str(rank)),
        ]
    )
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(NOT_BEFORE)
        .not_valid_after(NOT_AFTER)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    der = certificate.public_bytes(Encoding.DER)
    return Credential(group, rank, der, pem + certificate.public_bytes(Encoding.PEM))
