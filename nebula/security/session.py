"""The key exchange: ephemeral X25519 both ways, signed by both identities over everything that was said.

    cluster      → offer:  name, agreement, ephemeral key, nonce, certificate; signed
    coordinator  → answer: epoch, term, ephemeral key, nonce, certificate; signed together with the whole offer
    keys           HKDF-SHA256(shared secret, salt = hash of all of it), one per direction

This is the signed Diffie–Hellman of SIGMA (Krawczyk, CRYPTO 2003), with both names under both signatures. Keys live
as long as the session; a stolen identity key does not open what was sealed before.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nebula.errors import AuthError
from nebula.proto.v1.run_pb2 import SessionAnswer, SessionOffer
from nebula.security.pki import Identity, peer_name, private_key
from nebula.security.seal import SealedChannel, length_prefixed
from nebula.types import COORDINATOR, Channel

PROTOCOL = b"nebula session v3"
NONCE_BYTES = 32

_ECDSA = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True, slots=True)
class Session:
    """One cluster's keys with the coordinator for one epoch, at one end: `send` seals, `receive` opens. `term`: the
    coordinator's fencing number; of two coordinators, the one with the higher term is the right one."""

    cluster: str
    epoch: int
    term: int
    send: Channel
    receive: Channel


@dataclass(slots=True)
class Pending:
    """The cluster's side between offer and answer. It can be completed once."""

    _identity: Identity
    _offer: SessionOffer = field(repr=False)
    _ephemeral: X25519PrivateKey | None = field(repr=False)

    def complete(self, answer: SessionAnswer) -> Session:
        """Check that the coordinator answered this very offer. Raises AuthError."""
        assert self._ephemeral is not None, "a pending session can be completed once"
        peer = peer_name(answer.certificate, self._identity.authority_pem, datetime.now(UTC))
        if peer != COORDINATOR:
            raise AuthError(
                f"the session was answered by cluster {peer!r} in place of the coordinator",
                hint="check the coordinator's address",
            )
        transcript = _answer_transcript(self._offer, answer)
        _verify(answer.certificate, answer.signature, transcript, peer)
        session = _session(self._offer, answer, self._ephemeral, answer.ephemeral_key, COORDINATOR)
        self._ephemeral = None
        return session


def offer(identity: Identity, agreement_digest: str) -> tuple[SessionOffer, Pending]:
    """A cluster's opening move; a new one is needed for every join."""
    assert identity.name != COORDINATOR, "sessions are opened by clusters"
    ephemeral = X25519PrivateKey.generate()
    message = SessionOffer(
        cluster=identity.name,
        agreement=agreement_digest,
        ephemeral_key=ephemeral.public_key().public_bytes_raw(),
        nonce=os.urandom(NONCE_BYTES),
        certificate=_certificate(identity),
    )
    message.signature = _sign(identity, _offer_transcript(message))
    return message, Pending(identity, message, ephemeral)


def answer(
    identity: Identity, offer: SessionOffer, *, epoch: int, term: int, agreement: str
) -> tuple[SessionAnswer, Session]:
    """The coordinator's reply to an offer. `agreement`: the digest it was started for. An old offer may be replayed by
    anyone, but only who made it gets the keys. Raises AuthError when the offer is not what it says, or is for another
    agreement."""
    assert identity.name == COORDINATOR, "sessions are answered by the coordinator"
    peer = peer_name(offer.certificate, identity.authority_pem, datetime.now(UTC))
    if peer != offer.cluster or peer == COORDINATOR:
        raise AuthError(
            f"a session was offered as cluster {offer.cluster!r} with the certificate of {peer!r}",
            hint="a cluster's name comes from its certificate; give this one the identity issued for it",
        )
    _verify(offer.certificate, offer.signature, _offer_transcript(offer), peer)
    if offer.agreement != agreement:
        raise AuthError(
            f"cluster {peer!r} was started for agreement {offer.agreement}, this coordinator runs {agreement}",
            hint="start both from the same recipe and cluster file",
        )
    ephemeral = X25519PrivateKey.generate()
    message = SessionAnswer(
        epoch=epoch,
        term=term,
        ephemeral_key=ephemeral.public_key().public_bytes_raw(),
        nonce=os.urandom(NONCE_BYTES),
        certificate=_certificate(identity),
    )
    message.signature = _sign(identity, _answer_transcript(offer, message))
    return message, _session(offer, message, ephemeral, offer.ephemeral_key, peer)


def _session(offer: SessionOffer, answer: SessionAnswer, own: X25519PrivateKey, other: bytes, peer: str) -> Session:
    """Derive both directions. `other`: the ephemeral public key of `peer`, the far end."""
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
        # Of the wrong length, or a point of low order, which would make the secret known to everyone.
        raise AuthError(f"{peer!r} sent an unusable ephemeral key", hint="it may run another version") from error
    salt = hashlib.sha256(_answer_transcript(offer, answer)).digest()

    def channel(source: str, destination: str) -> SealedChannel:
        purpose = length_prefixed(PROTOCOL, b"frames", source.encode(), destination.encode())
        return SealedChannel(
            HKDF(hashes.SHA256(), length=32, salt=salt, info=purpose).derive(secret),
            source=source,
            destination=destination,
            epoch=answer.epoch,
            agreement=offer.agreement,
            seals=destination == peer,
        )

    up, down = channel(offer.cluster, COORDINATOR), channel(COORDINATOR, offer.cluster)
    send, receive = (up, down) if peer == COORDINATOR else (down, up)
    return Session(offer.cluster, answer.epoch, answer.term, send, receive)


def _offer_transcript(offer: SessionOffer) -> bytes:
    return length_prefixed(
        PROTOCOL,
        b"offer",
        offer.cluster.encode(),
        COORDINATOR.encode(),
        offer.agreement.encode(),
        offer.ephemeral_key,
        offer.nonce,
        hashlib.sha256(offer.certificate).digest(),
    )


def _answer_transcript(offer: SessionOffer, answer: SessionAnswer) -> bytes:
    return length_prefixed(
        PROTOCOL,
        b"answer",
        _offer_transcript(offer),
        struct.pack(">QQ", answer.epoch, answer.term),
        answer.ephemeral_key,
        answer.nonce,
        hashlib.sha256(answer.certificate).digest(),
    )


def _certificate(identity: Identity) -> bytes:
    return x509.load_pem_x509_certificate(identity.certificate_pem).public_bytes(serialization.Encoding.DER)


def _sign(identity: Identity, transcript: bytes) -> bytes:
    key = private_key(identity.key_pem)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(transcript)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(transcript, _ECDSA)
    raise AuthError(f"the key of {identity.name!r} cannot sign a session", hint="use a P-256 or Ed25519 key")


def _verify(certificate_der: bytes, signature: bytes, transcript: bytes, peer: str) -> None:
    """The certificate's chain has been checked before."""
    key = x509.load_der_x509_certificate(certificate_der).public_key()
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, transcript)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, transcript, _ECDSA)
        else:
            raise AuthError(f"the key of {peer!r} cannot sign a session", hint="use a P-256 or Ed25519 key")
    except InvalidSignature as error:
        raise AuthError(
            f"the key exchange with {peer!r} was altered on the way: its signature does not match",
            hint="something between the two sites changes traffic; check proxies on the path",
        ) from error
