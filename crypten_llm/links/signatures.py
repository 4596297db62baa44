"""Keys that sign: what a dealer made is told from what somebody else made, or changed.

Owns the two kinds of key: the one of a party's certificate for ``--tls`` (ECDSA on P-256 with SHA-256), which says who
signed, and one for a single use (Ed25519), which says that two files come from one hand.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256

from crypten_llm.errors import UsageError

LONGEST = 72  # bytes of a signature


class Signer:
    """Signs with one key. public: the other half, as text."""

    def __init__(self, key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public = _as_text(key.public_key())

    @classmethod
    def fresh(cls) -> Signer:
        """A key that nobody else will ever have; it is gone with this object."""
        return cls(ed25519.Ed25519PrivateKey.generate())

    @classmethod
    def of_role(cls, folder: str | Path, role: str) -> Signer:
        """The key of a role's certificate. Raises UsageError for what cannot be read, or is no such key."""
        from crypten_llm.links.tls import key_path  # X.509, which blocks and tapes do not need

        path = key_path(Path(folder), role)
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except OSError as error:
            raise UsageError(f"--tls: cannot read {path} ({error.strerror}); {_made_by(role)}") from None
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise UsageError(f"--tls: {path} is no key of a party; {_made_by(role)}")
        return cls(key)

    def derive(self, label: bytes) -> bytes:
        """32 bytes that nobody knows who has not this key: HMAC-SHA256 under it."""
        form = serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        return hmac.digest(self._key.private_bytes(*form), label, "sha256")

    def sign(self, data: bytes) -> bytes:
        """At most ``LONGEST`` bytes."""
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            return self._key.sign(data)
        return self._key.sign(data, ec.ECDSA(SHA256()))


def public_keys(folder: str | Path, role: str) -> list[str]:
    """Those of a role's certificates, as ``Signer.public``. Raises UsageError for what cannot be read."""
    from cryptography import x509  # which blocks and tapes do not need

    from crypten_llm.links.tls import certificate_path

    path = certificate_path(Path(folder), role)
    try:
        return [_as_text(each.public_key()) for each in x509.load_pem_x509_certificates(path.read_bytes())]
    except OSError as error:
        raise UsageError(f"--tls: cannot read {path} ({error.strerror}); {_made_by(role)}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError(f"--tls: {path} is no certificate; have the {role} send it again") from None


def is_signed(data: bytes, signature: bytes, public: str) -> bool:
    """Whether whoever holds the private half of ``public`` has signed ``data``."""
    try:
        key = serialization.load_der_public_key(base64.b64decode(public, validate=True))
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, data)
        elif isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
            key.verify(signature, data, ec.ECDSA(SHA256()))
        else:
            return False
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return True


def fingerprint(public: str) -> str:
    """Of a public key, for people to compare: groups of four digits."""
    digest = hashlib.sha256(public.encode()).hexdigest()[:32]
    return " ".join(digest[i : i + 4] for i in range(0, len(digest), 4))


def _as_text(key: object) -> str:
    if not isinstance(key, ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey):
        raise TypeError(f"{type(key).__name__} signs nothing here")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return base64.b64encode(key.public_bytes(serialization.Encoding.DER, form)).decode()


def _made_by(role: str) -> str:
    return f"the {role} makes it with python -m crypten_llm keys '{role}'"
