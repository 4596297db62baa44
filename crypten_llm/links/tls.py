"""TLS on the links: each party proves who it is with a key that it made itself, and nobody between them reads along.

Owns keys, certificates and their verification; `rendezvous` puts a connection through `Links.secure` before the parties
greet each other. There is no authority: every party makes its own key (``python -m crypten_llm keys ROLE``), gives its
certificate to the others, and accepts from each role that role's certificate and no other. A party's folder holds
ROLE.crt of all roles and ROLE.key of its own; the key file never leaves the machine.

TLS 1.3 alone: AES-GCM or ChaCha20, fresh keys for each connection, from the interpreter's OpenSSL.
"""

import errno
import hashlib
import os
import re
import socket
import ssl
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from crypten_llm.errors import UsageError

DAYS = 365  # that a certificate holds
MOST = 2  # certificates of a role: the one in use, and during a rotation the next
CROWD = 1000  # of a role that several hold


@dataclass(frozen=True)
class Made:
    """A role's new files. fingerprint: SHA-256 of the certificate, in groups of four digits for people to compare."""

    key: Path
    certificate: Path
    fingerprint: str


def make_key(folder: str | Path, role: str) -> Made:
    """Writes ROLE.key, readable by this user alone, and ROLE.crt. Overwrites neither.

    Raises UsageError for a role that there is not, and for a folder that cannot be written or has such a file already.
    """
    folder = Path(folder)
    path, public = key_path(folder, name_of(role)), certificate_path(folder, role)
    secret, certificate = make(role)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in (path, public):
            if file.exists():
                raise UsageError(
                    f"{file} exists; give another folder (--out), or remove it first if no party uses that key any more"
                )
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sealed:
            sealed.write(secret)
        with open(public, "xb") as shown:
            shown.write(certificate.public_bytes(serialization.Encoding.PEM))
    except OSError as error:
        raise UsageError(f"cannot write {error.filename} ({error.strerror}); give another folder (--out)") from None
    digest = hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()
    return Made(path, public, grouped(digest))


def make(role: str) -> tuple[bytes, x509.Certificate]:
    """A new key, as PEM, and its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"crypten_llm {role}")]), datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(*form), builder.sign(key, SHA256())


def name_of(role: str) -> str:
    """Itself. Raises UsageError for a role that there is not."""
    if not re.fullmatch(r"owner|client|helper|dealer|compute \d+|producer \d+", role):
        raise UsageError(
            f"there is no role {role!r}; give owner, client, helper, dealer, 'producer 1' and on, or 'compute 2' and on"
        )
    return role


def producers(folder: str | Path) -> list[str]:
    """Roles of the dealers for a stock whose certificates are in the folder: each has a key of its own."""
    names = (path.stem.replace("_", " ") for path in Path(folder).glob("producer_*.crt"))
    return sorted(name for name in names if re.fullmatch(r"producer \d+", name))


def grouped(digest: str) -> str:
    """Four digits at a time, for people to compare."""
    return " ".join(digest[i : i + 4] for i in range(0, len(digest), 4))


class Links:
    """How this party's connections become TLS.

    folder: see above. roles: one name per rank. rank: this party's. named: of a rank, roles any of which may
    hold it, in the place of the one of that name; where it is this party's own rank, the first is its own. many: a role
    that several may hold, each with a key of its own: its file has all their certificates (``CROWD``), one behind the
    other.
    Raises UsageError for a file that is missing, or is no key or certificate; for a key that others than this user
    could read; and for two roles with one key, of which each could pose as the other.
    """

    def __init__(
        self,
        folder: str | Path,
        roles: Sequence[str],
        rank: int,
        named: Mapping[int, Sequence[str]] | None = None,
        many: str = "",
    ) -> None:
        self._folder, self._many = Path(folder), many
        self._named = [(named or {}).get(place, [role]) for place, role in enumerate(roles)]
        held = {role: self._read(role) for names in self._named for role in names}
        self._tell_apart(held)
        self._certificates = [[each for role in names for each in held[role]] for names in self._named]
        self._dialling, self._answering = (
            self._context(purpose, self._named[rank][0])
            for purpose in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER)
        )

    def secure(self, sock: socket.socket, peer: int | None = None) -> ssl.SSLSocket:
        """The socket under TLS, handshake done; the socket's timeout bounds it.

        peer: the rank that was dialled, whose certificate must be shown; ``None`` at the side that answers, which asks
        ``is_of`` once it knows who came. Raises OSError where the handshake fails; the connection is closed then.
        """
        try:
            sock.getpeername()  # raises for a connection that has ended already: wrap_socket would leave it open
            if peer is None:
                return self._answering.wrap_socket(sock, server_side=True)
            sock = secured = self._dialling.wrap_socket(sock)
            if not self.is_of(secured, peer):
                raise ConnectionResetError("it shows another party's certificate")
            return secured
        except OSError:
            sock.close()
            raise

    def is_of(self, secured: socket.socket, peer: int) -> bool:
        """Whether the other side of a connection holds the key of ``peer``."""
        shown = secured.getpeercert(binary_form=True) if isinstance(secured, ssl.SSLSocket) else None
        return shown in self._certificates[peer]

    def _tell_apart(self, held: Mapping[str, Sequence[bytes]]) -> None:
        """Whoever holds the key of two roles could pose as either. held: certificates by role."""
        keys: dict[bytes, str] = {}
        for role, certificate in ((role, each) for role, certificates in held.items() for each in certificates):
            public = x509.load_der_x509_certificate(certificate).public_key()
            form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            other = keys.setdefault(public.public_bytes(*form), role)
            if other != role:
                raise UsageError(
                    f"--tls: the certificates of {other} and {role} in {self._folder} are of one key, so the {other} "
                    f"could pose as the {role}; have each make its own with python -m crypten_llm keys ROLE"
                )

    def _check_private(self, path: Path) -> None:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise UsageError(
                f"--tls: others than you can read or change {path} (mode {mode:o}); if nobody has, chmod 600 it, else "
                "make another key"
            )

    def _read(self, role: str) -> list[bytes]:
        """Its certificates, of which it may show any."""
        path = certificate_path(self._folder, role)
        try:
            found = x509.load_pem_x509_certificates(_regular(path).read_bytes())
            if len(found) > (CROWD if role == self._many else MOST):
                raise ValueError
            return [each.public_bytes(serialization.Encoding.DER) for each in found]
        except OSError as error:
            raise UsageError(
                f"--tls: cannot read {path} ({error.strerror}); the {role} makes it with python -m crypten_llm keys "
                f"'{role}' and gives it to the others"
            ) from None
        except ValueError:
            raise UsageError(f"--tls: {path} is no certificate; have the {role} send it again") from None

    def _context(self, purpose: int, role: str) -> ssl.SSLContext:
        context = ssl.SSLContext(purpose)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # a party is known by its key, wherever it runs
        context.verify_mode = ssl.CERT_REQUIRED
        # Each is trusted as it is, and not looked for by its name, which a role's two certificates share.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if purpose == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # a party that only sends would close with them unread, which resets the link
        for certificate in [each for held in self._certificates for each in held]:
            context.load_verify_locations(cadata=certificate)
        path = key_path(self._folder, role)
        try:
            self._check_private(_regular(path))
            context.load_cert_chain(certificate_path(self._folder, role), path)
        except OSError as error:  # ssl.SSLError among them
            reason = f"no key of {role}'s certificate" if isinstance(error, ssl.SSLError) else error.strerror
            raise UsageError(
                f"--tls: cannot use {path} ({reason}); the {role} makes both with python -m crypten_llm keys '{role}'"
            ) from None
        return context


def _regular(path: Path) -> Path:
    """The path, which is read. Raises OSError for what is no plain file: reading a pipe would wait for its writer."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a plain file")
    return path


def key_path(folder: Path, role: str) -> Path:
    return folder / f"{role.replace(' ', '_')}.key"


def certificate_path(folder: Path, role: str) -> Path:
    return folder / f"{role.replace(' ', '_')}.crt"
