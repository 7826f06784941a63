"""PROTOCOL.sshsig: keys, what is signed and what comes out, next to the real ssh-keygen."""

import base64
import contextlib
import functools
import hashlib
import os
import random
import re
import shutil
import socket
import struct
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
from conftest import (
    Agent, Keys, ScriptedAgent, message, need, read_message, rows, run, short_folder,
)  # fmt: skip

import ssh_agent_proxy as sap

TYPES = {
    "ed25519": "ssh-ed25519",
    "rsa2048": "ssh-rsa",
    "ecdsa256": "ecdsa-sha2-nistp256",
    "ecdsa384": "ecdsa-sha2-nistp384",
    "ecdsa521": "ecdsa-sha2-nistp521",
    "sk-ed25519": "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa": "sk-ecdsa-sha2-nistp256@openssh.com",
}
PLAIN = [name for name in TYPES if "sk-" not in name]
SECURITY = [name for name in TYPES if "sk-" in name]
for name, plain_type in list(TYPES.items()):
    TYPES[f"{name}-cert"] = plain_type.replace("@openssh.com", "") + "-cert-v01@openssh.com"
ALL = list(TYPES)


# ---------------------------------------------------------------- bytes, written by hand

s = message  # a string of RFC 4251 looks like a message of the agent protocol


def mp(value: int) -> bytes:
    """An mpint that is not negative."""
    return s(value.to_bytes(value.bit_length() // 8 + 1, "big") if value else b"")


SKED, SKEC = b"sk-ssh-ed25519@openssh.com", b"sk-ecdsa-sha2-nistp256@openssh.com"
X25 = bytes(range(32))
N2048 = (1 << 2047) | 1
POINT = b"\4" + bytes(range(64))


def ed(value: bytes = X25) -> bytes:
    return s(b"ssh-ed25519") + s(value)


def rsa(n: bytes = mp(N2048), e: bytes = mp(65537)) -> bytes:
    return s(b"ssh-rsa") + e + n


def ec(point: bytes = POINT, curve: bytes = b"nistp256", kind: bytes = b"nistp256") -> bytes:
    return s(b"ecdsa-sha2-" + kind) + s(curve) + s(point)


# ---------------------------------------------------------------- authenticator and agents


class Authenticator:
    """A security key in software: the openssl command makes its key and its signatures."""

    APPLICATION = b"ssh:"
    PRESENT = 1  # PROTOCOL.u2f: the flag of a touch

    def __init__(self, pem: Path, kind: str) -> None:
        self.openssl = need("openssl", "openssl")
        self.pem = pem
        self.kind = kind
        self.counter = 7
        algorithm = ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
        if kind == "sk-ed25519":
            algorithm = ["ed25519"]
        run([self.openssl, "genpkey", "-algorithm", *algorithm, "-out", pem])
        der = run([self.openssl, "pkey", "-in", pem, "-pubout", "-outform", "DER"]).stdout
        if kind == "sk-ed25519":
            self.blob = s(SKED) + s(der[-32:]) + s(self.APPLICATION)
        else:
            self.blob = s(SKEC) + s(b"nistp256") + s(der[-65:]) + s(self.APPLICATION)

    def sign(self, data: bytes) -> bytes:
        """An agent's signature string."""
        self.counter += 1
        tail = struct.pack(">BI", self.PRESENT, self.counter)
        signed = self.pem.with_suffix(".data")
        signed.write_bytes(
            hashlib.sha256(self.APPLICATION).digest() + tail + hashlib.sha256(data).digest()
        )
        if self.kind == "sk-ed25519":
            how = ["pkeyutl", "-sign", "-rawin", "-inkey", self.pem, "-in", signed]
            return s(SKED) + s(run([self.openssl, *how]).stdout) + tail
        der = run([self.openssl, "dgst", "-sha256", "-sign", self.pem, signed]).stdout
        # SEQUENCE { INTEGER r, INTEGER s }, each of fewer than 128 bytes
        r_end = 4 + der[3]
        r, s_ = der[4:r_end], der[r_end + 2 :]
        return s(SKEC) + s(s(r) + s(s_)) + tail


class AuthenticatorAgent(ScriptedAgent):
    """An agent that holds security keys and their certificates."""

    def __init__(self, sock: Path) -> None:
        super().__init__(sock, self.talk)
        self.holds: Dict[bytes, Authenticator] = {}

    def talk(self, connection: socket.socket) -> None:
        while request := read_message(connection):
            with sap.Reader(request, "sign request") as r:
                assert r.take(1) == b"\x0d"
                key, data = self.holds[r.string()], r.string()
                assert r.uint32() == 0  # flags
            connection.sendall(message(b"\x0e" + s(key.sign(data))))


class Lab:
    """Keys and certificates of every type, and the agents that hold them."""

    def __init__(self, folder: Path, keys: Keys) -> None:
        self.folder = folder
        self.ca = folder / "ca"
        run(["ssh-keygen", "-q", "-N", "", "-t", "ed25519", "-C", "ca", "-f", self.ca])
        self.agent = Agent(folder / "a")
        self.authenticators = AuthenticatorAgent(folder / "sk")
        for name in PLAIN:
            private = folder / name
            shutil.copy(keys[name], private)
            private.chmod(0o600)
            shutil.copy(keys[name].with_suffix(".pub"), folder)
            self.certify(name)
            self.agent.add(private)  # with the certificate that stands beside it
        for name in SECURITY:
            key = Authenticator(folder / f"{name}.pem", name)
            blob = base64.b64encode(key.blob).decode()
            (folder / f"{name}.pub").write_text(f"{TYPES[name]} {blob} {name}@test\n")
            self.certify(name)
            self.authenticators.holds |= {key.blob: key, self.blob(f"{name}-cert"): key}

    def certify(self, name: str) -> None:
        options = ["-n", "someone", "-O", "force-command=/bin/false"]
        run(["ssh-keygen", "-q", "-s", self.ca, "-I", name, *options, self.pub(name)])

    def pub(self, name: str) -> Path:
        return self.folder / f"{name}.pub"

    def line(self, name: str) -> str:
        return self.pub(name).read_text().strip()

    def blob(self, name: str) -> bytes:
        return base64.b64decode(self.line(name).split()[1])

    def exchange(self, name: str) -> contextlib.AbstractContextManager[sap.Exchange]:
        agent = self.authenticators if name.startswith("sk-") else self.agent
        return sap.Agents(sap.Upstream(str(agent.sock)), (), 20).exchange()

    def sign(
        self, name: str, payload: bytes, namespace: str = "git", hash_algorithm: str = "sha512"
    ) -> bytes:
        """The armored signature, asked for as a request is."""
        wanted = sap.Wanted(sap.parse_key_line(self.line(name)).key)
        digest = hashlib.new(hash_algorithm, payload).digest()
        with self.exchange(name) as exchange:
            key, block = sap.request_signature(exchange, wanted, namespace, hash_algorithm, digest)
        assert key == wanted.key
        return block

    def stop(self) -> None:
        self.agent.stop()
        self.authenticators.stop()


@pytest.fixture(scope="module")
def lab(keys: Keys) -> Iterator[Lab]:
    with short_folder() as folder:
        made = Lab(folder, keys)
        yield made
        made.stop()


def keygen(*argv: Any, input: Optional[bytes] = None, check: bool = True) -> bytes:
    # No SSH_AUTH_SOCK: it would ask the user's own agent first.
    done = run(["ssh-keygen", *argv], {"PATH": os.environ["PATH"]}, input=input, check=check)
    return done.stdout if done.returncode == 0 else b""


# ---------------------------------------------------------------- what is signed, what comes out


@pytest.mark.parametrize("size", [1, 52, 53, 104, 105, 106, 1000])
def test_the_armor_is_base64_in_lines_of_70_characters(size: int) -> None:
    blob = bytes(i % 256 for i in range(size))
    first, *lines, last, after = sap.armor(blob).split(b"\n")
    assert (first, last) == (b"-----BEGIN SSH SIGNATURE-----", b"-----END SSH SIGNATURE-----")
    assert after == b""
    assert all(len(line) == 70 for line in lines[:-1])
    assert 0 < len(lines[-1]) <= 70
    assert b"".join(lines) == base64.b64encode(blob)


def taken_apart(block: bytes) -> List[bytes]:
    """Public key, namespace, reserved, hash algorithm and signature."""
    blob = base64.b64decode(b"".join(block.splitlines()[1:-1]))
    assert blob[:10] == b"SSHSIG\0\0\0\1"
    with sap.Reader(blob[10:], "block") as r:
        return [r.string() for _ in range(5)]


# ---------------------------------------------------------------- keys, by hand

TYPE = "type '"
CURVE, POINTED = "curve", "not an uncompressed point"
CERTIFICATE = b"ssh-ed25519-cert-v01@openssh.com"

NO_KEYS = [
    ("nothing", b"", "4 bytes expected, 0 there"),
    ("a type with a NUL behind it", s(b"ssh-ed25519\0") + s(X25), TYPE),
    ("DSA", s(b"ssh-dss") + 4 * mp(5), TYPE),
    ("a hostile type", s(b"a\n\x1b[2J\xe2\x80\xae" + b"z" * 10000), TYPE),
    ("Ed25519 of 33 bytes", ed(bytes(33)), "an Ed25519 key of 33 bytes"),
    ("RSA of too few bits", rsa(mp((1 << 1022) | 1)), "1023 bits"),
    ("RSA of too many bits", rsa(mp((1 << 16384) | 1)), "16385 bits"),
    ("RSA with modulus 0", rsa(mp(0)), "not positive"),
    ("RSA with exponent 1", rsa(e=mp(1)), "RSA key"),
    ("P-256 of another curve", ec(curve=b"nistp384"), CURVE),
    ("a compressed point of full length", ec(b"\2" + bytes(64)), POINTED),
    ("a point without its last byte", ec(POINT[:-1]), POINTED),
    ("a point with a byte more", ec(POINT + b"\0"), POINTED),
    ("sk P-384", s(SKEC) + s(b"nistp384") + s(b"\4" + bytes(96)) + s(b"ssh:"), CURVE),
    ("a certificate with a key of 31 bytes", s(CERTIFICATE) + s(X25) + s(X25[1:]), "31 bytes"),
]


@pytest.mark.parametrize("blob, bits", rows([
    ("the fewest bits", rsa(mp((1 << 1023) | 1)), 1024),
    ("the most bits", rsa(mp((1 << 16383) | 1)), 16384),
    ("the least exponent", rsa(e=mp(3)), 2048),
]))  # fmt: skip
def test_an_rsa_key_within_openssh_s_bounds_is_read(blob: bytes, bits: int) -> None:
    assert sap.parse_public_key(blob) == sap.PublicKey("ssh-rsa", blob, "ssh-rsa", blob, bits)


@pytest.mark.parametrize("blob, error", rows(NO_KEYS))
def test_a_key_blob_that_is_none_is_refused(blob: bytes, error: str) -> None:
    with pytest.raises(sap.WireError) as e:
        sap.parse_public_key(blob)
    assert str(e.value).startswith("public key: ")
    assert error in str(e.value)
    assert str(e.value).isprintable() and len(str(e.value)) < 200


# ---------------------------------------------------------------- keys, of the real ssh-keygen


@pytest.mark.parametrize("name", ALL)
def test_a_real_key_is_read(lab: Lab, name: str) -> None:
    key, comment = sap.parse_key_line(lab.line(name))
    plain = name.replace("-cert", "")
    assert key.type == TYPES[name]
    assert key.blob == lab.blob(name)
    assert key.plain_type == TYPES[plain]
    assert key.plain_blob == lab.blob(plain)
    assert key.flags == (4 if name.startswith("rsa") else 0)  # SSH_AGENT_RSA_SHA2_512
    assert [str(key.bits), key.fingerprint] == keygen("-lf", lab.pub(name)).decode().split()[:2]
    assert key.name == key.fingerprint + (" (certificate)" if name != plain else "")
    assert comment == f"{plain}@test"
    assert lab.line(name) == f"{key.line} {comment}"


def cut_or_extended(data: bytes) -> Iterator[bytes]:
    yield from (data[:size] for size in range(len(data)))
    yield data + b"\0"
    yield data + data


def bits_turned(data: bytes, parse: Callable[[bytes], Any]) -> Iterator[Any]:
    """What is made of it; whatever the damage, nothing but that or a WireError of one line."""
    chance = random.Random(1)
    for _ in range(100):
        changed = bytearray(data)
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            yield bytes(changed), parse(bytes(changed))
        except sap.WireError as e:
            assert str(e).isprintable()


@pytest.mark.parametrize("name", ALL)
def test_a_real_key_that_was_damaged_is_refused_or_whole(lab: Lab, name: str) -> None:
    for wrong in cut_or_extended(lab.blob(name)):
        with pytest.raises(sap.WireError):
            sap.parse_public_key(wrong)
    for changed, key in bits_turned(lab.blob(name), sap.parse_public_key):
        assert key.blob == changed
        assert sap.parse_public_key(key.plain_blob).fingerprint == key.fingerprint


# ---------------------------------------------------------------- lines

LINE = "ssh-ed25519 " + base64.b64encode(ed()).decode()

FORM = "not a public key"
NO_LINES = [
    ("nothing", "", FORM),
    ("a type alone", "ssh-ed25519", FORM),
    ("options in front", "restrict " + LINE, FORM),
    ("a fingerprint", "SHA256:" + "A" * 43, "fingerprint"),
    ("a private key", "-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
    ("a character that is not base64's", LINE[:-8] + "_" + LINE[-7:], "base64"),
    ("base64 that holds half a key", LINE[:-8], "public key: "),
    ("a line of another type", LINE.replace("ssh-ed25519", "ssh-rsa"), "of type 'ssh-rsa'"),
]


@pytest.mark.parametrize("line, comment", [
    (LINE, ""), (f"  {LINE}  me  ", "me"), (LINE.replace(" ", "\t") + "\tme", "me"),
])  # fmt: skip
def test_a_line_is_read(line: str, comment: str) -> None:
    assert sap.parse_key_line(line) == (sap.parse_public_key(ed()), comment)


@pytest.mark.parametrize("line, error", rows(NO_LINES))
def test_a_line_that_is_none_is_refused(line: str, error: str) -> None:
    with pytest.raises(sap.WireError) as e:
        sap.parse_key_line(line)
    assert error in str(e.value)


# ---------------------------------------------------------------- an agent's signature

SIG64 = bytes(range(64))
RSA256 = b"\x7f" * 256
TAIL = b"\1\0\0\0\x2a"  # flags and counter
R, S = mp(5), mp(7)
ONE_TOO_MANY = mp(1 << 256)

ED_KEY, RSA_KEY, EC_KEY = ed(), rsa(), ec()
EC521_KEY = ec(b"\4" + bytes(132), b"nistp521", b"nistp521")
SKED_KEY = s(SKED) + s(X25) + s(b"ssh:")
SKEC_KEY = s(SKEC) + s(b"nistp256") + s(POINT) + s(b"ssh:")

P256, P384, P521 = b"ecdsa-sha2-nistp256", b"ecdsa-sha2-nistp384", b"ecdsa-sha2-nistp521"
SHA512 = b"rsa-sha2-512"

OTHER = "is of algorithm"
NO_SIGNATURES = [
    ("nothing", ED_KEY, b"", "4 bytes expected, 0 there"),
    ("an algorithm that is no text", ED_KEY, s(b"\xff\n") + s(SIG64), OTHER),
    ("another key type's", ED_KEY, s(SHA512) + s(RSA256), OTHER),
    ("an sk key's from a plain one", ED_KEY, s(SKED) + s(SIG64) + TAIL, OTHER),
    ("Ed25519 of 63 bytes", ED_KEY, s(b"ssh-ed25519") + s(SIG64[1:]), "63 bytes"),
    ("Ed25519 of 65 bytes", ED_KEY, s(b"ssh-ed25519") + s(SIG64 + b"\0"), "65 bytes"),
    ("RSA with SHA-1", RSA_KEY, s(b"ssh-rsa") + s(RSA256), OTHER),
    ("RSA with SHA-256", RSA_KEY, s(b"rsa-sha2-256") + s(RSA256), OTHER),
    ("RSA with a byte more", RSA_KEY, s(SHA512) + s(RSA256 + b"\0"), "257 bytes"),
    ("P-256 with the algorithm of another curve", EC_KEY, s(P384) + s(R + S), OTHER),
    ("P-256 with r = 0", EC_KEY, s(P256) + s(mp(0) + S), "not positive"),
    ("P-256 with r too large", EC_KEY, s(P256) + s(ONE_TOO_MANY + S), "r is too large"),
    ("P-256 with s too large", EC_KEY, s(P256) + s(R + ONE_TOO_MANY), "s is too large"),
    ("P-521 with s too large", EC521_KEY, s(P521) + s(R + mp(1 << 521)), "s is too large"),
    ("P-256 with a third number", EC_KEY, s(P256) + s(R + S + R), "5 bytes left over"),
    ("a browser's", SKEC_KEY, s(b"webauthn-" + SKEC) + s(R + S) + TAIL, OTHER),
]  # fmt: skip


@pytest.mark.parametrize("blob, signature", rows([
    ("RSA without its leading zeros, as some agents have it", RSA_KEY, s(SHA512) + s(RSA256[2:])),
    ("P-521 with the longest numbers", EC521_KEY, s(P521) + s(2 * mp((1 << 521) - 1))),
]))  # fmt: skip
def test_a_well_formed_signature_is_taken(blob: bytes, signature: bytes) -> None:
    sap.check_signature(sap.parse_public_key(blob), signature)


@pytest.mark.parametrize("blob, signature, error", rows(NO_SIGNATURES))
def test_a_signature_of_another_kind_is_refused(blob: bytes, signature: bytes, error: str) -> None:
    with pytest.raises(sap.WireError) as e:
        sap.check_signature(sap.parse_public_key(blob), signature)
    assert str(e.value).startswith("the agent's signature")
    assert error in str(e.value)
    assert str(e.value).isprintable()


@pytest.mark.parametrize("name", ALL)
def test_a_real_signature_is_taken_but_none_that_was_damaged(lab: Lab, name: str) -> None:
    key = sap.parse_public_key(lab.blob(name))
    with lab.exchange(name) as exchange:
        reply = exchange.ask(sap.sign_request(key.blob, b"data", key.flags))
    signature = sap.parse_sign_response(reply)
    assert signature
    sap.check_signature(key, signature)
    for wrong in cut_or_extended(signature):
        with pytest.raises(sap.WireError):
            sap.check_signature(key, wrong)
    for _ in bits_turned(signature, functools.partial(sap.check_signature, key)):
        pass  # its form may still be right
    if name.endswith("-cert"):  # its type is no algorithm
        with pytest.raises(sap.WireError, match=OTHER):
            sap.check_signature(key, s(key.type.encode()) + s(SIG64))


# ---------------------------------------------------------------- next to ssh-keygen -Y sign

BLOCKS = [
    # key, payload's length, namespace, hash algorithm
    ("ed25519", 1, "git", "sha512"),
    ("ed25519", 65536, "file", "sha256"),
    ("ed25519", 64, "n" * 255, "sha512"),
    ("rsa2048", 64, "file", "sha512"),
    ("rsa2048", 262145, "git", "sha256"),
    ("ed25519-cert", 7, "git", "sha512"),
    ("rsa2048-cert", 7, "git", "sha512"),
]


@functools.cache
def openssh() -> int:
    """The number of the ssh-keygen here, which has no option of its own that tells it."""
    said = run(["ssh", "-V"]).stderr.decode()
    found = re.match(r"OpenSSH_(?:for_Windows_)?(\d+)\.", said)
    assert found, said
    return int(found[1])


@pytest.mark.parametrize("name, length, namespace, hash_algorithm", BLOCKS, ids=str)
def test_the_block_is_that_of_ssh_keygen(
        lab: Lab, name: str, length: int, namespace: str, hash_algorithm: str) -> None:  # fmt: skip
    payload = random.Random(length).randbytes(length)
    block = lab.sign(name, payload, namespace, hash_algorithm)
    argv = ["ssh-keygen", "-Y", "sign", "-f", lab.pub(name), "-n", namespace]
    env = dict(os.environ, SSH_AUTH_SOCK=str(lab.agent.sock))
    theirs = run([*argv, "-O", f"hashalg={hash_algorithm}"], env, input=payload).stdout
    if name.startswith("rsa") and hash_algorithm == "sha256" and openssh() >= 10:
        # It takes rsa-sha2-256 then. Ours never goes below rsa-sha2-512.
        *ours, signature = taken_apart(block)
        assert ours == taken_apart(theirs)[:4]
        assert signature.startswith(s(b"rsa-sha2-512"))
    else:
        assert block == theirs


@pytest.mark.parametrize("name", ALL)
def test_ssh_keygen_verifies_the_block(lab: Lab, tmp_path: Path, name: str) -> None:
    signature, signers = tmp_path / "signature", tmp_path / "signers"
    signature.write_bytes(lab.sign(name, b"payload"))
    namespaces, line = 'namespaces="git"', lab.line(name)
    if name.endswith("-cert"):
        namespaces = "cert-authority," + namespaces
        line = lab.ca.with_suffix(".pub").read_text().strip()
    signers.write_text(f"someone {namespaces} {line}\n")
    verify = ["-Y", "verify", "-f", signers, "-I", "someone", "-n", "git", "-s", signature]
    good = keygen(*verify, input=b"payload").decode()
    assert good.startswith('Good "git" signature for someone with ')
    assert sap.parse_public_key(lab.blob(name)).fingerprint in good
    assert keygen(*verify, input=b"payload.", check=False) == b"", "it does not look"
