"""Certificates change hands: another party's is pinned by its fingerprint, one's own gives way to the next.

Owns the files of the folder of keys while they change. During a rotation ROLE.crt holds two certificates, the one in
use and the next, and the others accept both; so parties may take the new file, and the role its new key, at any time
and in any order, and no start fails in between.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from crypten_llm import files
from crypten_llm.errors import UsageError
from crypten_llm.links.tls import MOST, Made, certificate_path, grouped, key_path, make, name_of

FORM = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo


def pin(folder: str | Path, role: str, source: str | Path, fingerprint: str) -> Path:
    """Puts another party's certificate into ``folder``, in the place of the one that is there; returns its file.

    fingerprint: of the new one, as that party has read it out; spaces and case mean nothing. Of a file with two, the
    other one must be pinned already.

    Raises UsageError for a certificate of another role, a fingerprint that is not its own, and the folder's own role.
    """
    path = certificate_path(Path(folder), name_of(role))
    if key_path(Path(folder), role).exists():
        raise UsageError(f"{folder} holds the key of {role}, whose certificate is not pinned but made; see --rotate")
    given, pinned = _read(Path(source)), _read(path) if path.exists() else []
    told = "".join(fingerprint.split()).lower()
    for certificate in given:
        if certificate.subject.rfc4514_string() != f"CN=crypten_llm {role}":
            whose = certificate.subject.rfc4514_string()[:80]
            raise UsageError(f"{source} is a certificate of {whose!r}, not of the {role}")
        found = grouped(_digest(certificate))
        if certificate not in pinned and "".join(found.split()) != told:
            raise UsageError(
                f"{source} has the fingerprint {found}, and {fingerprint.strip()[:80] or 'none'} was given; ask the "
                f"{role}, on a way on which nobody can pose as it, and give --fingerprint"
            )
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write(path, given)
    return path


def begin(folder: str | Path, role: str) -> Made:
    """Makes the next key, beside the one in use, and puts its certificate behind that of the present one.

    Raises UsageError where there is no key, or a rotation has begun already.
    """
    path, following = certificate_path(Path(folder), name_of(role)), _next(folder, role)
    _key(key_path(Path(folder), role), role)
    present = _read(path)
    if len(present) != 1 or following.exists():
        raise UsageError(f"a rotation of {role}'s key has begun in {folder}; end it with --rotate end")
    key, certificate = make(role)
    with open(os.open(following, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sealed:
        sealed.write(key)
    _write(path, [*present, certificate])
    return Made(following, path, grouped(_digest(certificate)))


def end(folder: str | Path, role: str) -> Made:
    """Takes the next key into use, and leaves the old certificate out; goes on where it was interrupted.

    Raises UsageError where no rotation has begun.
    """
    path, own = certificate_path(Path(folder), name_of(role)), key_path(Path(folder), role)
    following = _next(folder, role)
    certificates = _read(path)
    if len(certificates) == 1:
        raise UsageError(f"no rotation of {role}'s key has begun in {folder}; begin it with --rotate begin")
    if following.exists():
        os.replace(following, own)
    public = _key(own, role).public_key().public_bytes(*FORM)
    kept = [each for each in certificates if each.public_key().public_bytes(*FORM) == public]
    if len(kept) != 1:
        raise UsageError(f"{own} is the key of none of the certificates in {path}; make both anew and have them pinned")
    _write(path, kept)
    return Made(own, path, grouped(_digest(kept[0])))


def _next(folder: str | Path, role: str) -> Path:
    return key_path(Path(folder), role).with_suffix(".next.key")


def _digest(certificate: x509.Certificate) -> str:
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def _read(path: Path) -> list[x509.Certificate]:
    """One or two. Raises UsageError."""
    try:
        found = x509.load_pem_x509_certificates(files.read(path))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        found = []
    if not 1 <= len(found) <= MOST:
        raise UsageError(f"{path} holds no certificate, or more than {MOST}; have it sent again")
    return found


def _key(path: Path, role: str) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(files.read(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError(f"{path} is no key; the {role} makes it with python -m crypten_llm keys '{role}'") from None


def _write(path: Path, certificates: list[x509.Certificate]) -> None:
    """As a whole, or not at all."""
    new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        new.write_bytes(b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates))
        os.replace(new, path)
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}); make the folder writable") from None
    finally:
        new.unlink(missing_ok=True)
