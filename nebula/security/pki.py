"""Who is who: X.509 certificates whose URI name says which cluster, or the coordinator, holds them.

An authority signs identities directly (no intermediates). `authority_pem` may hold several authorities, which is how
an old one is phased out.
"""

from __future__ import annotations

import inspect
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nebula import files
from nebula.errors import AuthError, UsageError
from nebula.types import COORDINATOR

VALIDITY = timedelta(days=30)
# Clocks of clusters differ; a certificate must work at once where the clock is behind the authority's.
BACKDATE = timedelta(hours=1)

FILES = CERTIFICATE, KEY, AUTHORITY = "certificate.pem", "key.pem", "authority.pem"

_TRUST_DOMAIN = r"[a-z0-9][a-z0-9._-]{0,254}"
_URI = re.compile(rf"spiffe://{_TRUST_DOMAIN}/nebula/(?:{COORDINATOR}|cluster/(?P<cluster>[a-z][a-z0-9-]{{0,39}}))")
_URI_HINT = "its one URI must be spiffe://<trust domain>/nebula/cluster/<name> or …/nebula/coordinator"
_DATE = "%Y-%m-%d %H:%M UTC"
# What parsers raise; TypeError is for an encrypted key.
_MALFORMED = (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm)
_USAGES = tuple(inspect.signature(x509.KeyUsage).parameters)
_FOLDER_HINT = f"an identity folder holds {CERTIFICATE}, {KEY} and {AUTHORITY}; name the right folder or issue it again"


@dataclass(frozen=True, slots=True)
class Authority:
    """Signs identities of one trust domain."""

    trust_domain: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(cls, trust_domain: str, *, now: datetime | None = None) -> Authority:
        """A new self-signed authority with a P-256 key, valid for `VALIDITY`. Raises UsageError for a trust domain
        that SPIFFE does not allow."""
        if not re.fullmatch(_TRUST_DOMAIN, trust_domain):
            raise UsageError(f"{trust_domain!r} is no trust domain", hint="use a-z, 0-9 and '._-', as in example.org")
        key = ec.generate_private_key(ec.SECP256R1())
        name = _subject(f"nebula authority of {trust_domain}")
        certificate = (
            _builder(name, name, key.public_key(), now or datetime.now(UTC))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(trust_domain, certificate, key)


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate with its key, and the authorities whose identities it trusts; all PEM."""

    name: str
    certificate_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)
    authority_pem: bytes = field(repr=False)

    def save(self, folder: Path) -> None:
        """Write the three files, each atomically; folder mode 0700, files 0600. Raises UsageError."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            for file, data in zip(FILES, (self.certificate_pem, self.key_pem, self.authority_pem), strict=True):
                files.write(folder / file, data, private=True)
        except OSError as error:
            raise UsageError(
                f"cannot write the identity of {self.name!r} to {folder}: {error.strerror}",
                hint="choose a folder that this user may write to",
            ) from error

    @classmethod
    def load(cls, folder: Path) -> Identity:
        """Read and check an identity. Raises UsageError when files are missing or not PEM, AuthError when they do not
        belong together or are out of date."""
        certificate_pem, key_pem, authority_pem = (_read(folder / file) for file in FILES)
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            public = private_key(key_pem).public_key()
        except _MALFORMED as error:
            why = "does not hold a PEM certificate and an unencrypted PEM key"
            raise UsageError(f"{folder} {why}", hint=_FOLDER_HINT) from error
        if public != certificate.public_key():
            hint = "one of the two was replaced without the other; copy both from the same issue"
            raise AuthError(f"{folder / KEY} is not the key of {folder / CERTIFICATE}", hint=hint)
        der = certificate.public_bytes(serialization.Encoding.DER)
        return cls(peer_name(der, authority_pem, datetime.now(UTC)), certificate_pem, key_pem, authority_pem)


def issue(authority: Authority, name: str, *, hosts: Sequence[str], now: datetime | None = None) -> Identity:
    """A new P-256 identity for cluster `name`, or for the coordinator, usable as TLS client and server. `hosts` are DNS
    names and IP addresses it may serve from. Raises UsageError for a name no cluster may have."""
    uri = f"spiffe://{authority.trust_domain}/nebula/" + (name if name == COORDINATOR else f"cluster/{name}")
    if not _URI.fullmatch(uri):
        hint = "a cluster's name starts with a lower-case letter and has at most 40 of a-z, 0-9 and '-'"
        raise UsageError(f"no identity can be issued for {name!r}", hint=hint)
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.UniformResourceIdentifier(uri), *(_host(host) for host in hosts)]
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    certificate = (
        _builder(_subject(name), authority.certificate.subject, key.public_key(), now or datetime.now(UTC))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(signer, critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    key_pem = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Identity(name, certificate.public_bytes(pem), key_pem, authority.certificate.public_bytes(pem))


def throwaway(folder: Path, clusters: Sequence[str], hosts: Sequence[str]) -> None:
    """Identities for one federation on one machine: `folder`/coordinator, serving from `hosts`, and `folder`/<cluster>.
    The authority's key is never written, so nobody can be added later."""
    authority = Authority.create("throwaway.nebula")
    # Only the coordinator gets hosts: a cluster that had them could pass for the coordinator towards TLS.
    issue(authority, COORDINATOR, hosts=hosts).save(folder / COORDINATOR)
    for cluster in clusters:
        issue(authority, cluster, hosts=()).save(folder / cluster)


def peer_name(certificate_der: bytes, authority_pem: bytes, now: datetime) -> str:
    """Check that an authority in `authority_pem` vouches for a certificate at time `now`, and return whose it is:
    "coordinator" or a cluster's name. Raises AuthError."""
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        authorities = x509.load_pem_x509_certificates(authority_pem)
    except _MALFORMED as error:
        raise AuthError(
            "not an X.509 certificate", hint=f"the peer's, or this side's {AUTHORITY}, is broken"
        ) from error
    policy = verification.PolicyBuilder().store(verification.Store(authorities)).time(now).max_chain_depth(0)
    try:
        policy.build_client_verifier().verify(certificate, [])
    except verification.VerificationError as error:
        raise _refusal(certificate, authorities, now) from error
    # The chain is verified: from here on the authority vouches for what the certificate says.
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    match = _URI.fullmatch(uris[0]) if len(uris) == 1 else None
    if match is None or match["cluster"] == COORDINATOR:
        raise AuthError(f"the certificate names no Nebula cluster: {uris or 'no URI'}", hint=_URI_HINT)
    return match["cluster"] or COORDINATOR


def private_key(pem: bytes) -> PrivateKeyTypes:
    return serialization.load_pem_private_key(pem, password=None)


def _refusal(certificate: x509.Certificate, authorities: Sequence[x509.Certificate], now: datetime) -> AuthError:
    """What is wrong with a certificate that did not verify, in words that say what to do."""
    issuers = [authority for authority in authorities if _issued(certificate, authority)]
    if not issuers:
        # Nothing such a certificate says about itself is worth repeating, or sure to parse.
        hint = f"both sides need identities of one authority; compare their {AUTHORITY}"
        return AuthError("the certificate was not issued by this federation's authority", hint=hint)
    for dated in (certificate, *issuers):
        start, end = dated.not_valid_before_utc, dated.not_valid_after_utc
        if not start <= now <= end:
            whose = f"the certificate of {dated.subject.rfc4514_string()!r}"
            when = f"expired on {end:{_DATE}}" if now > end else f"is not valid before {start:{_DATE}}"
            return AuthError(f"{whose} {when}", hint=f"issue a new one, unless this clock is wrong: {now:{_DATE}}")
    return AuthError(f"{certificate.subject.rfc4514_string()!r} is no Nebula identity", hint=_URI_HINT)


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + VALIDITY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in allowed for usage in _USAGES})


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        is_address = ":" in host or host.replace(".", "").isdecimal()
        return x509.IPAddress(ipaddress.ip_address(host)) if is_address else x509.DNSName(host)
    except ValueError as error:
        raise UsageError(
            f"{host!r} is neither an IP address nor a DNS name", hint="correct it where the hosts are listed"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint=_FOLDER_HINT) from error
