"""The local stack's own certificate authority: a short-lived certificate for each part and the administrator.

A stack with this folder uses mutual TLS: ``./claw up --tls`` makes it. Processes read their files at their start, so
`up` of a stopped stack renews the certificates that have less than 60 days left. So a stack needs ``./claw down`` and
``./claw up`` once in 60 days. Only the owner of the stack can read the keys.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.hazmat.primitives.serialization.pkcs12 import serialize_key_and_certificates
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from infra.clock import utcnow
from infra.connections import TLS_FILES, HttpTarget, end_of
from tooling.stack.engines.base import ANSWER_SECONDS, Place, write_atomically

if TYPE_CHECKING:
    import httpx

ADMIN = "admin"
"""The owner of the administrators' certificate."""
LIFE = timedelta(days=90)
RENEWED = timedelta(days=60)
"""A certificate with less than this left is replaced at a start: the next one may be so much later."""
_WARNED = timedelta(days=14)
"""With less than this left, a certificate is a problem that a person must remove."""
_AUTHORITY_LIFE = timedelta(days=3650)
# By the driver's name of each file: authority, certificate, key.
_PARAMETERS = {
    "postgres": ("sslrootcert", "sslcert", "sslkey"),
    "valkey": ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"),
    "rabbitmq": ("cafile", "certfile", "keyfile"),
    "kafka": ("authority", "certificate", "key"),
    "opensearch": ("cafile", "certfile", "keyfile"),
    "milvus": ("cafile", "certfile", "keyfile"),
    # It cannot ask for a certificate. Its clients sign each request.
    "s3": ("cafile",),
}


def in_use(place: Place) -> bool:
    """True if the stack was started with TLS."""
    return (place.home / "tls").exists()


def folder(place: Place, owner: str) -> Path:
    """The folder with the `TLS_FILES` of an engine, a service or the administrator."""
    return place.home / "tls" / owner


def query(place: Place, engine: str, owner: str) -> str:
    """The end of the engine's URL for this owner; empty if the engine has no certificate."""
    if not folder(place, engine).exists():
        return ""
    pairs = zip(_PARAMETERS[engine], TLS_FILES, strict=False)
    mode = "sslmode=verify-full&" if engine == "postgres" else ""
    return f"?{mode}" + "&".join(f"{name}={folder(place, owner) / file}" for name, file in pairs)


def store_url(place: Place, engine: str, owner: str) -> str:
    """The URL of a store that is asked by HTTP or gRPC, for this owner."""
    end = query(place, engine, owner)
    return f"{'https' if end else 'http'}://127.0.0.1:{place.ports[engine]}{end}"


def store_client(place: Place, engine: str) -> httpx.AsyncClient:
    """The administrator's client of such a store."""
    import httpx

    target = HttpTarget.parse(store_url(place, engine, ADMIN))
    return httpx.AsyncClient(
        base_url=target.url, verify=target.context() or True, trust_env=False, timeout=ANSWER_SECONDS
    )


def key_store(folder: Path, password: str) -> bytes:
    """The certificate and key of the folder in the form that Java reads (PKCS #12)."""
    authority, certificate, key = ((folder / name).read_bytes() for name in TLS_FILES)
    return serialize_key_and_certificates(
        b"server",
        load_pem_private_key(key, password=None),  # type: ignore[arg-type]  # an EC key: see _issued
        x509.load_pem_x509_certificate(certificate),
        [x509.load_pem_x509_certificate(authority)],
        BestAvailableEncryption(password.encode()),
    )


def isolated(place: Place, engine: str) -> tuple[str, ...]:
    """The start of the command of an engine that runs in a network namespace; it serves TLS if it has a certificate."""
    return (sys.executable, "-m", "tooling.stack.isolated", str(place.ports[engine]), str(folder(place, engine)))


def front(place: Place, engine: str, socket: Path) -> tuple[str, ...]:
    """The start of the command of an engine that knows no TLS: it listens on `socket`."""
    port = str(place.ports[engine])
    return (sys.executable, "-m", "tooling.stack.tls_front", port, str(socket), str(folder(place, engine)))


def issue(place: Place, owners: Sequence[str], *, renew: bool = True) -> None:
    """Makes the authority and the certificates that are missing. Replaces those that do not last until `RENEWED`.

    renew: False if the stack runs: its processes would go on with the old certificates, and the files hide their age.
    """
    home = place.home / "tls"
    home.mkdir(mode=0o700, exist_ok=True)
    authority = _authority(home)
    for owner in owners:
        own = folder(place, owner)
        own.mkdir(mode=0o700, exist_ok=True)
        ca, certificate, key = (own / name for name in TLS_FILES)
        if certificate.exists() and ca.exists() and (not renew or _left(certificate) > RENEWED):
            continue
        made, private = _issued(authority, owner)
        write_atomically(ca, _pem(authority[0]))
        write_atomically(key, _private_pem(private))
        write_atomically(certificate, _pem(made))


def problem(place: Place, owner: str) -> str | None:
    """A sentence about the owner's certificate if it ends soon or has ended."""
    certificate = folder(place, owner) / TLS_FILES[1]
    if not certificate.exists() or (left := _left(certificate)) > _WARNED:
        return None
    when = f"ends in {left.days} days" if left > timedelta() else "has ended"
    return f"its certificate {when}: restart the stack with ./claw down and ./claw up"


def _left(certificate: Path) -> timedelta:
    return end_of(certificate) - utcnow()


Authority = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def _authority(home: Path) -> Authority:
    certificate, key = home / "authority.pem", home / "authority.key"
    if not certificate.exists():
        private = ec.generate_private_key(ec.SECP256R1())
        name = _name("Clawbus, a local stack")
        builder = (
            _certificate(name, name, private, _AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
        )
        write_atomically(key, _private_pem(private))
        write_atomically(certificate, _pem(builder.sign(private, SHA256())))
    known = load_pem_private_key(key.read_bytes(), password=None)
    assert isinstance(known, ec.EllipticCurvePrivateKey)
    return x509.load_pem_x509_certificate(certificate.read_bytes()), known


def _issued(
    authority: Authority, owner: str, addresses: Sequence[str] = ("127.0.0.1",)
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    issuer, signs = authority
    private = ec.generate_private_key(ec.SECP256R1())
    # Clients reach engines by their address, and services by their name.
    names = [x509.DNSName(owner), *(x509.IPAddress(ipaddress.ip_address(address)) for address in addresses)]
    builder = (
        _certificate(_name(owner), issuer.subject, private, LIFE)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
    )
    return builder.sign(signs, SHA256()), private


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, life: timedelta
) -> x509.CertificateBuilder:
    now = utcnow()
    # A few minutes earlier, for clocks that are behind.
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(minutes=5),
        not_valid_after=now + life,
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def _private_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
