from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.errors import AuthError, FrameError
from nebula.proto.v1.run_pb2 import SessionAnswer, SessionOffer
from nebula.security import session
from nebula.security.pki import VALIDITY, Authority, Identity, issue
from nebula.security.session import Session, answer, offer

AUTHORITY = Authority.create("example.org")
COORDINATOR = issue(AUTHORITY, "coordinator", hosts=("localhost",))
NORTH = issue(AUTHORITY, "north", hosts=())
SOUTH = issue(AUTHORITY, "south", hosts=())
DIGEST = "sha256:" + "a" * 64


def open_session(cluster: Identity = NORTH, epoch: int = 1) -> tuple[Session, Session]:
    """(the cluster's end, the coordinator's end)."""
    offered, pending = offer(cluster, DIGEST)
    answered, far = answer(COORDINATOR, offered, epoch=epoch, term=3, agreement=DIGEST)
    return pending.complete(answered), far


def carry(sender: Session, receiver: Session, message: bytes = b"hello") -> bytes:
    return receiver.receive.open(sender.send.seal(message, context=b"test"), context=b"test", limit=1 << 20)


def with_field(message, field: str, value):
    changed = copy.deepcopy(message)
    setattr(changed, field, value)
    return changed


def resigned(message: SessionOffer, identity: Identity) -> SessionOffer:
    """As a peer signs that has an identity but does not keep to the protocol."""
    return with_field(message, "signature", session._sign(identity, session._offer_transcript(message)))


def test_both_ends_share_keys_in_both_directions():
    near, far = open_session(epoch=7)
    assert (near.cluster, near.epoch) == (far.cluster, far.epoch) == ("north", 7)
    assert carry(near, far, b"up") == b"up"
    assert carry(far, near, b"down") == b"down"


def test_exchange_survives_the_wire():
    offered, pending = offer(NORTH, DIGEST)
    received = SessionOffer.FromString(offered.SerializeToString())
    answered, far = answer(COORDINATOR, received, epoch=2**64 - 1, term=3, agreement=DIGEST)
    near = pending.complete(SessionAnswer.FromString(answered.SerializeToString()))
    assert carry(near, far) == b"hello"


def test_directions_and_sessions_have_keys_of_their_own():
    near, far = open_session()
    other_near, other_far = open_session()
    south_near, _ = open_session(SOUTH)
    frames = list(near.send.seal(b"hello", context=b"test"))
    for channel in (near.receive, far.send, other_near.receive, other_far.receive, south_near.receive):
        # The fields are made to fit, so that only the keys differ.
        renamed = with_field(frames[0], "source", channel.source)
        with pytest.raises(FrameError) as caught:
            channel.open([renamed], context=b"test", limit=100)
        assert caught.value.reason == "auth"


def test_identities_may_have_ed25519_keys():
    key = ed25519.Ed25519PrivateKey.generate()
    template = x509.load_pem_x509_certificate(NORTH.certificate_pem)
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        template.issuer, template.subject, key.public_key(), 7, now - timedelta(1), now + timedelta(1)
    )
    for extension in template.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    pem = serialization.Encoding.PEM
    identity = Identity(
        "north",
        builder.sign(AUTHORITY.key, hashes.SHA256()).public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        NORTH.authority_pem,
    )
    near, far = open_session(identity)
    assert carry(near, far) == b"hello"
    offered, _ = offer(identity, DIGEST)
    with pytest.raises(AuthError, match="altered on the way"):
        answer(COORDINATOR, with_field(offered, "nonce", bytes(32)), epoch=1, term=3, agreement=DIGEST)


def test_offer_under_another_clusters_name():
    offered, _ = offer(replace(SOUTH, name="north"), DIGEST)
    with pytest.raises(AuthError, match="offered as cluster 'north' with the certificate of 'south'"):
        answer(COORDINATOR, offered, epoch=1, term=3, agreement=DIGEST)


def test_offer_with_a_copied_certificate():
    offered, _ = offer(replace(SOUTH, name="north", certificate_pem=NORTH.certificate_pem), DIGEST)
    with pytest.raises(AuthError, match="altered on the way"):
        answer(COORDINATOR, offered, epoch=1, term=3, agreement=DIGEST)


def test_the_coordinator_cannot_join_itself():
    offered, _ = offer(NORTH, DIGEST)
    offered.cluster = "coordinator"
    offered.certificate = session._certificate(COORDINATOR)
    with pytest.raises(AuthError, match="certificate of 'coordinator'"):
        answer(COORDINATOR, resigned(offered, COORDINATOR), epoch=1, term=3, agreement=DIGEST)


def test_offer_and_answer_of_another_authority():
    stranger = Authority.create("example.org")
    offered, pending = offer(NORTH, DIGEST)
    with pytest.raises(AuthError, match="not issued"):
        answer(COORDINATOR, offer(issue(stranger, "north", hosts=()), DIGEST)[0], epoch=1, term=3, agreement=DIGEST)
    imposter = replace(issue(stranger, "coordinator", hosts=()), authority_pem=NORTH.authority_pem)
    answered, _ = answer(imposter, offered, epoch=1, term=3, agreement=DIGEST)
    with pytest.raises(AuthError, match="not issued"):
        pending.complete(answered)


def test_expired_identities_are_refused_with_the_date():
    past = datetime.now(UTC) - VALIDITY - timedelta(days=1)
    date = f"expired on {datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"
    with pytest.raises(AuthError, match=date):
        answer(
            COORDINATOR,
            offer(issue(AUTHORITY, "north", hosts=(), now=past), DIGEST)[0],
            epoch=1,
            term=3,
            agreement=DIGEST,
        )
    offered, pending = offer(NORTH, DIGEST)
    answered, _ = answer(
        issue(AUTHORITY, "coordinator", hosts=(), now=past), offered, epoch=1, term=3, agreement=DIGEST
    )
    with pytest.raises(AuthError, match=date):
        pending.complete(answered)


def test_a_cluster_cannot_answer_for_the_coordinator():
    offered, pending = offer(NORTH, DIGEST)
    answered, _ = answer(replace(SOUTH, name="coordinator"), offered, epoch=1, term=3, agreement=DIGEST)
    with pytest.raises(AuthError, match="answered by cluster 'south'"):
        pending.complete(answered)


def test_different_agreements_are_both_named():
    other = "sha256:" + "b" * 64
    with pytest.raises(AuthError) as caught:
        answer(COORDINATOR, offer(NORTH, other)[0], epoch=1, term=3, agreement=DIGEST)
    assert other in caught.value.message
    assert DIGEST in caught.value.message
    assert "north" in caught.value.message
    assert caught.value.hint


def test_swapped_ephemeral_keys_are_refused_on_both_ways():
    offered, pending = offer(NORTH, DIGEST)
    other, _ = offer(NORTH, DIGEST)
    with pytest.raises(AuthError, match="altered on the way"):
        answer(
            COORDINATOR, with_field(offered, "ephemeral_key", other.ephemeral_key), epoch=1, term=3, agreement=DIGEST
        )
    answered, _ = answer(COORDINATOR, offered, epoch=1, term=3, agreement=DIGEST)
    with pytest.raises(AuthError, match="altered on the way"):
        pending.complete(with_field(answered, "ephemeral_key", other.ephemeral_key))


def test_answer_to_another_offer():
    _, pending = offer(NORTH, DIGEST)
    answered, _ = answer(COORDINATOR, offer(NORTH, DIGEST)[0], epoch=1, term=3, agreement=DIGEST)
    with pytest.raises(AuthError, match="altered on the way"):
        pending.complete(answered)


def test_answer_with_another_epoch():
    offered, pending = offer(NORTH, DIGEST)
    answered, _ = answer(COORDINATOR, offered, epoch=1, term=3, agreement=DIGEST)
    with pytest.raises(AuthError, match="altered on the way"):
        pending.complete(with_field(answered, "epoch", 2))


@pytest.mark.parametrize("key", [b"", b"\x01" * 31, b"\x01" * 33, bytes(32), b"\x01" + bytes(31)])
def test_unusable_ephemeral_keys_of_a_signed_offer(key):
    """The last two are points of low order: the shared secret would be zero, known to everyone."""
    offered, _ = offer(NORTH, DIGEST)
    with pytest.raises(AuthError, match="'north' sent an unusable ephemeral key"):
        answer(
            COORDINATOR, resigned(with_field(offered, "ephemeral_key", key), NORTH), epoch=1, term=3, agreement=DIGEST
        )


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@settings(max_examples=60, deadline=None)
@given(st.sampled_from([f.name for f in SessionOffer.DESCRIPTOR.fields]), st.integers(0, 2**16), st.integers(0, 7))
def test_any_flipped_bit_of_an_offer_is_refused(field, at, bit):
    offered, _ = offer(NORTH, DIGEST)
    with pytest.raises(AuthError):
        answer(COORDINATOR, flipped(offered, field, at, bit), epoch=1, term=3, agreement=DIGEST)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@settings(max_examples=60, deadline=None)
@given(st.sampled_from([f.name for f in SessionAnswer.DESCRIPTOR.fields]), st.integers(0, 2**16), st.integers(0, 7))
def test_any_flipped_bit_of_an_answer_is_refused_and_the_true_one_still_works(field, at, bit):
    offered, pending = offer(NORTH, DIGEST)
    answered, far = answer(COORDINATOR, offered, epoch=1, term=3, agreement=DIGEST)
    with pytest.raises(AuthError):
        pending.complete(flipped(answered, field, at, bit))
    assert carry(pending.complete(answered), far) == b"hello"


def flipped(message, field: str, at: int, bit: int):
    value = getattr(message, field)
    if isinstance(value, int):
        return with_field(message, field, value ^ (1 << (at % 8 * 8 + bit)))
    data = bytearray(value.encode() if isinstance(value, str) else value)
    data[at % len(data)] ^= 1 << (bit % 7 if isinstance(value, str) else bit)
    return with_field(message, field, data.decode() if isinstance(value, str) else bytes(data))


@settings(max_examples=60, deadline=None)
@given(st.builds(SessionOffer, cluster=st.text(max_size=8), certificate=st.binary(max_size=64), nonce=st.binary()))
def test_junk_offers_raise_nothing_but_auth_errors(junk):
    with pytest.raises(AuthError):
        answer(COORDINATOR, junk, epoch=1, term=3, agreement=DIGEST)


def test_a_replayed_offer_gives_keys_that_only_its_maker_could_use():
    offered, pending = offer(NORTH, DIGEST)
    first_answer, first = answer(COORDINATOR, offered, epoch=1, term=3, agreement=DIGEST)
    second_answer, second = answer(COORDINATOR, offered, epoch=2, term=3, agreement=DIGEST)
    assert first_answer.ephemeral_key != second_answer.ephemeral_key
    near = pending.complete(first_answer)
    assert carry(near, first) == b"hello"
    with pytest.raises(FrameError):
        carry(near, second)
    (frame,) = near.send.seal(b"hello", context=b"test")
    with pytest.raises(FrameError) as caught:
        second.receive.open([with_field(frame, "epoch", 2)], context=b"test", limit=100)
    assert caught.value.reason == "auth"


def test_keys_depend_on_everything_that_was_said():
    """Not only on the shared secret: here it is the same one."""
    offered, _ = offer(NORTH, DIGEST)
    answered, _ = answer(COORDINATOR, offered, epoch=1, term=3, agreement=DIGEST)
    own, other = X25519PrivateKey.generate(), offered.ephemeral_key
    near = session._session(offered, answered, own, other, "coordinator")
    same = session._session(offered, answered, own, other, "north")
    assert carry(near, same) == b"hello"
    for changed in (with_field(offered, "nonce", bytes(32)), with_field(offered, "certificate", b"")):
        with pytest.raises(FrameError, match="altered"):
            carry(near, session._session(changed, answered, own, other, "north"))
    with pytest.raises(FrameError, match="altered"):
        carry(near, session._session(offered, with_field(answered, "nonce", bytes(32)), own, other, "north"))


def test_the_ephemeral_key_is_dropped_after_use():
    offered, pending = offer(NORTH, DIGEST)
    answered, _ = answer(COORDINATOR, offered, epoch=1, term=3, agreement=DIGEST)
    pending.complete(answered)
    assert pending._ephemeral is None
    with pytest.raises(AssertionError, match="once"):
        pending.complete(answered)


def test_keys_are_nowhere_to_be_seen(monkeypatch):
    keys = []

    class Recording:
        def __init__(self, *arguments, **named):
            self.hkdf = HKDF(*arguments, **named)

        def derive(self, secret):
            keys.extend([secret, self.hkdf.derive(secret)])
            return keys[-1]

    monkeypatch.setattr(session, "HKDF", Recording)
    offered, pending = offer(NORTH, DIGEST)
    shown_before = repr(pending)
    _, far = answer(COORDINATOR, offered, epoch=1, term=3, agreement=DIGEST)
    assert len(set(keys)) == 3, "one shared secret, one key per direction"
    ends = [far, far.send, far.receive]
    shown = " ".join([shown_before, *map(repr, ends), *map(str, ends), repr(vars(far.send)), repr(vars(far.receive))])
    assert "north → coordinator, epoch 1" in shown
    for key in keys:
        assert repr(key) not in shown
        assert key.hex() not in shown
    for end in ends:
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(end)
    for line in NORTH.key_pem.decode().splitlines():
        assert line not in shown
