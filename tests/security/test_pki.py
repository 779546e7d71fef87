from __future__ import annotations

import contextlib
import os
import ssl
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.errors import AuthError, UsageError
from nebula.security.pki import (
    AUTHORITY,
    CERTIFICATE,
    FILES,
    KEY,
    VALIDITY,
    Authority,
    Identity,
    issue,
    peer_name,
    throwaway,
)

NOW = datetime.now(UTC)
AUTHORITY_ = Authority.create("example.org")
NORTH = issue(AUTHORITY_, "north", hosts=())
COORDINATOR = issue(AUTHORITY_, "coordinator", hosts=("localhost", "127.0.0.1", "::1"))


def der(identity: Identity) -> bytes:
    return x509.load_pem_x509_certificate(identity.certificate_pem).public_bytes(serialization.Encoding.DER)


def certificate_with(*names: x509.GeneralName) -> bytes:
    """Signed by the right authority, but saying something else."""
    template = x509.load_pem_x509_certificate(NORTH.certificate_pem)
    builder = x509.CertificateBuilder(
        template.issuer, template.subject, template.public_key(), 7, NOW - timedelta(hours=1), NOW + timedelta(hours=1)
    )
    for extension in template.extensions:
        if not isinstance(extension.value, x509.SubjectAlternativeName):
            builder = builder.add_extension(extension.value, extension.critical)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(AUTHORITY_.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def test_a_certificate_says_whose_it_is():
    assert peer_name(der(NORTH), NORTH.authority_pem, NOW) == "north"
    assert peer_name(der(COORDINATOR), NORTH.authority_pem, NOW) == "coordinator"


def test_names_in_the_certificate():
    names = x509.load_pem_x509_certificate(COORDINATOR.certificate_pem).extensions
    names = names.get_extension_for_class(x509.SubjectAlternativeName).value
    uri = "spiffe://example.org/nebula/coordinator"
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [uri]
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    north = x509.load_pem_x509_certificate(NORTH.certificate_pem)
    san = north.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in san] == ["spiffe://example.org/nebula/cluster/north"]
    assert isinstance(north.public_key().curve, ec.SECP256R1)


@pytest.mark.parametrize("name", ["", "North", "a/b", "a" * 41, "9lives", "north\n", "../coordinator"])
def test_names_that_no_cluster_may_have_are_not_issued(name):
    with pytest.raises(UsageError, match="no identity"):
        issue(AUTHORITY_, name, hosts=())


@pytest.mark.parametrize("domain", ["", "Example.org", "a/b", "a\n"])
def test_bad_trust_domain(domain):
    with pytest.raises(UsageError, match="trust domain"):
        Authority.create(domain)


@pytest.mark.parametrize("host", ["10.0.0.256", "bücher.example", "fe80::x"])
def test_bad_host(host):
    with pytest.raises(UsageError, match="neither an IP address nor a DNS name"):
        issue(AUTHORITY_, "north", hosts=(host,))


def test_other_authority_is_refused_even_with_the_same_name():
    imposter = issue(Authority.create("example.org"), "north", hosts=())
    with pytest.raises(AuthError, match="not issued by this federation's authority"):
        peer_name(der(imposter), NORTH.authority_pem, NOW)


def test_expired_and_not_yet_valid_are_refused_with_the_date():
    with pytest.raises(AuthError, match=rf"'CN=north' expired on {NOW + VALIDITY:%Y-%m-%d}"):
        peer_name(der(NORTH), NORTH.authority_pem, NOW + VALIDITY + timedelta(minutes=1))
    with pytest.raises(AuthError, match=f"not valid before {NOW - timedelta(hours=1):%Y-%m-%d}"):
        peer_name(der(NORTH), NORTH.authority_pem, NOW - timedelta(hours=2))
    old = Authority.create("example.org", now=NOW - VALIDITY - timedelta(days=1))
    fresh = issue(old, "north", hosts=())
    with pytest.raises(AuthError, match=rf"authority of example.org' expired on {NOW - timedelta(days=1):%Y-%m-%d}"):
        peer_name(der(fresh), fresh.authority_pem, NOW)


@pytest.mark.parametrize(
    "uris",
    [
        (),
        ("spiffe://example.org/nebula/cluster/coordinator",),
        ("spiffe://example.org/nebula/cluster/",),
        ("spiffe://example.org/nebula/cluster/north/extra",),
        ("spiffe://example.org/other/cluster/north",),
        ("https://example.org/nebula/cluster/north",),
        ("spiffe://example.org/nebula/cluster/north", "spiffe://example.org/nebula/coordinator"),
    ],
)
@pytest.mark.parametrize("dns", [(), ("north.example.org",)])
def test_certificates_of_the_right_authority_without_one_nebula_name(uris, dns):
    names = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns)]
    with pytest.raises(AuthError, match="no Nebula"):
        peer_name(certificate_with(*names), NORTH.authority_pem, NOW)


def test_an_authority_is_no_identity():
    own = AUTHORITY_.certificate.public_bytes(serialization.Encoding.DER)
    with pytest.raises(AuthError):
        peer_name(own, NORTH.authority_pem, NOW)


def test_an_identity_cannot_issue_identities():
    north = x509.load_pem_x509_certificate(NORTH.certificate_pem)
    key = serialization.load_pem_private_key(NORTH.key_pem, None)
    forged = issue(Authority("example.org", north, key), "coordinator", hosts=())
    for trusted in (NORTH.authority_pem, NORTH.authority_pem + NORTH.certificate_pem):
        with pytest.raises(AuthError):
            peer_name(der(forged), trusted, NOW)


def test_two_authorities_overlap_during_rotation():
    new = issue(Authority.create("example.org"), "north", hosts=())
    both = NORTH.authority_pem + new.authority_pem
    assert [peer_name(der(identity), both, NOW) for identity in (NORTH, new)] == ["north", "north"]
    with pytest.raises(AuthError, match="not issued"):
        peer_name(der(NORTH), new.authority_pem, NOW)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_no_altered_bit_of_a_certificate_changes_what_it_says():
    """The padding of the signature's bit string is the one place where a bit may change unseen."""
    genuine = der(NORTH)
    signed = x509.load_der_x509_certificate(genuine).tbs_certificate_bytes
    accepted = []
    for bit in range(8 * len(genuine)):
        altered = bytearray(genuine)
        altered[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(AuthError):
            peer_name(bytes(altered), NORTH.authority_pem, NOW)
            accepted.append(bytes(altered))
    assert len(accepted) <= 7
    assert all(x509.load_der_x509_certificate(each).tbs_certificate_bytes == signed for each in accepted)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 1000), st.integers(0, 60))
def test_malformed_certificates_raise_nothing_but_auth_errors(junk, at, cut):
    genuine = der(NORTH)
    at %= len(genuine)
    for malformed in (junk, genuine[:at] + junk + genuine[at + cut + 1 :], genuine[:at]):
        with pytest.raises(AuthError):
            peer_name(malformed + b"\0", NORTH.authority_pem, NOW)


def test_save_and_load(tmp_path):
    folder = tmp_path / "pki" / "north"
    NORTH.save(folder)
    assert Identity.load(folder) == NORTH
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == dict.fromkeys(FILES, 0o600)


def test_save_closes_a_folder_that_was_open(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / KEY).touch(0o644)
    NORTH.save(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / KEY).stat().st_mode) == 0o600


def test_a_failed_save_leaves_the_old_files_and_nothing_else(tmp_path, monkeypatch):
    NORTH.save(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        COORDINATOR.save(tmp_path)
    assert Identity.load(tmp_path) == NORTH
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("file", FILES)
def test_missing_and_unreadable_files(tmp_path, file):
    NORTH.save(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UsageError, match=f"{file}: No such file") as caught:
        Identity.load(tmp_path)
    assert "identity folder" in caught.value.hint
    (tmp_path / file).mkdir()
    with pytest.raises(UsageError, match=f"{file}: Is a directory"):
        Identity.load(tmp_path)


@pytest.mark.parametrize("file", FILES)
def test_files_that_are_not_pem(tmp_path, file):
    NORTH.save(tmp_path)
    (tmp_path / file).write_bytes(b"\xff not PEM")
    with pytest.raises((UsageError, AuthError)) as caught:
        Identity.load(tmp_path)
    assert caught.value.hint


def test_encrypted_key(tmp_path):
    key = serialization.load_pem_private_key(NORTH.key_pem, None)
    lock = serialization.BestAvailableEncryption(b"secret")
    replace(NORTH, key_pem=key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)).save(
        tmp_path
    )
    with pytest.raises(UsageError, match="unencrypted"):
        Identity.load(tmp_path)


def test_new_certificate_with_the_old_key(tmp_path):
    NORTH.save(tmp_path)
    (tmp_path / CERTIFICATE).write_bytes(issue(AUTHORITY_, "north", hosts=()).certificate_pem)
    with pytest.raises(AuthError, match=f"{KEY} is not the key of") as caught:
        Identity.load(tmp_path)
    assert "replaced without the other" in caught.value.hint


def test_load_names_the_date_of_expiry(tmp_path):
    issue(AUTHORITY_, "north", hosts=(), now=NOW - VALIDITY - timedelta(days=1)).save(tmp_path)
    with pytest.raises(AuthError, match=f"expired on {NOW - timedelta(days=1):%Y-%m-%d}"):
        Identity.load(tmp_path)


def test_load_with_the_authority_of_another_federation(tmp_path):
    NORTH.save(tmp_path)
    other = Authority.create("example.org").certificate.public_bytes(serialization.Encoding.PEM)
    (tmp_path / AUTHORITY).write_bytes(other)
    with pytest.raises(AuthError, match="not issued"):
        Identity.load(tmp_path)


def test_throwaway_writes_every_identity_but_never_the_authority_key(tmp_path):
    throwaway(tmp_path, ["north", "south"], ["localhost"])
    names = ["coordinator", "north", "south"]
    identities = [Identity.load(tmp_path / name) for name in names]
    assert [identity.name for identity in identities] == names
    assert len({identity.authority_pem for identity in identities}) == 1
    authority = x509.load_pem_x509_certificate(identities[0].authority_pem)
    for path in tmp_path.rglob("*"):
        if path.is_file() and b"PRIVATE KEY" in path.read_bytes():
            assert path.name == KEY
            public = serialization.load_pem_private_key(path.read_bytes(), None).public_key()
            assert public != authority.public_key()
    for cluster in identities[1:]:
        san = x509.load_pem_x509_certificate(cluster.certificate_pem).extensions
        hosts = san.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
        assert hosts == [], "a cluster could pass for the coordinator"


def test_keys_are_not_shown():
    lines = NORTH.key_pem.decode().splitlines()
    for shown in (repr(NORTH), str(NORTH), f"{NORTH}", repr([NORTH]), repr(AUTHORITY_)):
        assert not any(line in shown for line in lines)
        assert "key" not in shown.lower()


def tls(folder: Path, purpose: ssl.Purpose) -> ssl.SSLContext:
    context = ssl.create_default_context(purpose, cafile=str(folder / AUTHORITY))
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def handshake(client_folder: Path, server_folder: Path, host: str) -> bytes:
    """TLS in memory with certificates on both sides. Returns the client's certificate as the server saw it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = tls(client_folder, ssl.Purpose.SERVER_AUTH).wrap_bio(to_client, to_server, server_hostname=host)
    server = tls(server_folder, ssl.Purpose.CLIENT_AUTH).wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server) * 3:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return server.getpeercert(binary_form=True)


def test_identities_serve_mutual_tls(tmp_path):
    throwaway(tmp_path, ["north"], ["localhost", "127.0.0.1"])
    north = Identity.load(tmp_path / "north")
    for host in ("localhost", "127.0.0.1"):
        seen = handshake(tmp_path / "north", tmp_path / "coordinator", host)
        assert peer_name(seen, north.authority_pem, NOW) == "north"
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        handshake(tmp_path / "north", tmp_path / "coordinator", "elsewhere")
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        handshake(tmp_path / "north", tmp_path / "north", "localhost")


def test_tls_refuses_another_federation(tmp_path):
    throwaway(tmp_path / "ours", ["north"], ["localhost"])
    throwaway(tmp_path / "theirs", ["north"], ["localhost"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "theirs" / "north", tmp_path / "ours" / "coordinator", "localhost")


def test_security_imports_neither_torch_nor_ray():
    code = (
        "import sys, nebula.security.pki, nebula.security.session, nebula.security.seal;"
        "sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
