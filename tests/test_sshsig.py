"""PROTOCOL.sshsig: keys, what is signed and what comes out, next to the real ssh-keygen."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import shutil
import socket
import struct
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest
from conftest import (
    PROXY,
    Agent,
    Answer,
    Keys,
    Proxy,
    ScriptedAgent,
    ask,
    clean_env,
    connect,
    message,
    need,
    post,
    post_chunked,
    read_message,
    rows,
    run,
    short_folder,
)

import ssh_agent_proxy as sap

TYPES = {
    "ed25519": "ssh-ed25519",
    "rsa2048": "ssh-rsa",
    "rsa3072": "ssh-rsa",
    "ecdsa256": "ecdsa-sha2-nistp256",
    "ecdsa384": "ecdsa-sha2-nistp384",
    "ecdsa521": "ecdsa-sha2-nistp521",
    "sk-ed25519": "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa": "sk-ecdsa-sha2-nistp256@openssh.com",
}
for name, plain_type in list(TYPES.items()):
    TYPES[f"{name}-cert"] = plain_type.replace("@openssh.com", "") + "-cert-v01@openssh.com"
ALL = tuple(TYPES)
SECURITY = ("sk-ed25519", "sk-ecdsa")
PLAIN = tuple(name for name in ALL if "sk-" not in name and "-cert" not in name)

BITS = {"ed25519": 256, "rsa2048": 2048, "rsa3072": 3072, "ecdsa256": 256, "ecdsa384": 384,
        "ecdsa521": 521, "sk-ed25519": 256, "sk-ecdsa": 256}  # fmt: skip


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


# ---------------------------------------------------------------- authenticator, agents, proxies


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
        self.listed: List[Tuple[bytes, Authenticator]] = []
        self.flags: List[int] = []  # that were asked for

    def talk(self, connection: socket.socket) -> None:
        while request := read_message(connection):
            connection.sendall(message(self.answer(request)))

    def answer(self, request: bytes) -> bytes:
        if request == b"\x0b":
            keys = b"".join(s(blob) + s(key.kind.encode()) for blob, key in self.listed)
            return b"\x0c" + struct.pack(">I", len(self.listed)) + keys
        with sap.Reader(request, "sign request") as r:
            assert r.take(1) == b"\x0d"
            wanted, data = r.string(), r.string()
            self.flags.append(r.uint32())
        return b"\x0e" + s(dict(self.listed)[wanted].sign(data))


LONGEST = "n" * 255


class Lab:
    """Keys and certificates of every type, the agents that hold them, a proxy before each."""

    def __init__(self, folder: Path, keys: Keys) -> None:
        self.folder = folder
        self.pub: Dict[str, Path] = {}
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
            self.authenticators.listed += [(key.blob, key), (self.blob(f"{name}-cert"), key)]
        namespaces = f"git,file,{LONGEST}"
        self.proxies = [
            Proxy(
                [sys.executable, str(PROXY), "--addr", "127.0.0.1:0", "--upstream", str(sock),
                 "--namespace", namespaces],
                clean_env(folder),
            )
            for sock in (self.agent.sock, self.authenticators.sock)
        ]  # fmt: skip

    def certify(self, name: str) -> None:
        public = self.folder / f"{name}.pub"
        run(["ssh-keygen", "-q", "-s", self.ca, "-I", name, "-n", "someone", public])
        self.pub[name] = public
        self.pub[f"{name}-cert"] = self.folder / f"{name}-cert.pub"

    def line(self, name: str) -> str:
        return self.pub[name].read_text().strip()

    def blob(self, name: str) -> bytes:
        return base64.b64decode(self.line(name).split()[1])

    def sock(self, name: str) -> Path:
        return self.authenticators.sock if name.startswith("sk-") else self.agent.sock

    def sign(self, name: str, payload: bytes, chunked: bool = False, **more: str) -> Answer:
        port = self.proxies[name.startswith("sk-")].port
        fields = [f"SSHSIG-Key: {self.line(name).rpartition(' ')[0]}"]
        fields += [f"SSHSIG-{field.capitalize()}: {value}" for field, value in more.items()]
        if not chunked:
            return ask(port, post(payload, *fields))
        pieces = [payload[at : at + 65521] for at in range(0, len(payload), 65521)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"
        return ask(port, post_chunked(body, *fields))

    def stop(self) -> None:
        statuses = [proxy.stop() for proxy in self.proxies]
        self.agent.stop()
        self.authenticators.stop()
        assert statuses == [0, 0]
        assert "Traceback" not in "".join(proxy.log() for proxy in self.proxies)


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


def test_signed_data_is_the_specification_s() -> None:
    digest = "00112233445566778899aabbccddeeff" * 2
    assert sap.signed_data("git", "sha256", bytes.fromhex(digest)) == bytes.fromhex(
        "535348534947"  # MAGIC_PREAMBLE "SSHSIG"
        "00000003 676974"  # namespace "git"
        "00000000"  # reserved
        "00000006 736861323536"  # hash_algorithm "sha256"
        "00000020" + digest  # H(message)
    )


def test_the_blob_is_the_specification_s() -> None:
    assert sap.sshsig(b"KEY", "file", "sha512", b"SIG") == bytes.fromhex(
        "535348534947"  # MAGIC_PREAMBLE "SSHSIG"
        "00000001"  # SIG_VERSION
        "00000003 4b4559"  # publickey
        "00000004 66696c65"  # namespace "file"
        "00000000"  # reserved
        "00000006 736861353132"  # hash_algorithm "sha512"
        "00000003 534947"  # signature
    )


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

KEYS = [
    ("Ed25519", ed(), "ssh-ed25519", 256),
    ("RSA of the fewest bits", rsa(mp((1 << 1023) | 1)), "ssh-rsa", 1024),
    ("RSA of the most bits", rsa(mp((1 << 16383) | 1)), "ssh-rsa", 16384),
    ("RSA with the least exponent", rsa(e=mp(3)), "ssh-rsa", 2048),
    ("P-256", ec(), "ecdsa-sha2-nistp256", 256),
    ("P-384", ec(b"\4" + bytes(96), b"nistp384", b"nistp384"), "ecdsa-sha2-nistp384", 384),
    ("P-521", ec(b"\4" + bytes(132), b"nistp521", b"nistp521"), "ecdsa-sha2-nistp521", 521),
    ("sk Ed25519", s(SKED) + s(X25) + s(b"ssh:"), SKED.decode(), 256),
    ("sk P-256", s(SKEC) + s(b"nistp256") + s(POINT) + s(b"ssh:"), SKEC.decode(), 256),
]

TYPE = "type '"
CURVE, POINTED = "curve", "not an uncompressed point"
CERTIFICATE = b"ssh-ed25519-cert-v01@openssh.com"

NO_KEYS = [
    ("nothing", b"", "4 bytes expected, 0 there"),
    ("an empty type", s(b"") + s(X25), TYPE),
    ("a type with a NUL behind it", s(b"ssh-ed25519\0") + s(X25), TYPE),
    ("DSA", s(b"ssh-dss") + 4 * mp(5), TYPE),
    ("a hostile type", s(b"a\n\x1b[2J\xe2\x80\xae" + b"z" * 10000), TYPE),
    ("a signature algorithm for a type", s(b"rsa-sha2-512") + mp(65537) + mp(N2048), TYPE),
    ("a webauthn type", s(b"webauthn-sk-ecdsa-sha2-nistp256@openssh.com") + s(POINT), TYPE),
    ("Ed25519 of 31 bytes", ed(bytes(31)), "an Ed25519 key of 31 bytes"),
    ("Ed25519 of 33 bytes", ed(bytes(33)), "an Ed25519 key of 33 bytes"),
    ("RSA of too few bits", rsa(mp((1 << 1022) | 1)), "1023 bits"),
    ("RSA of too many bits", rsa(mp((1 << 16384) | 1)), "16385 bits"),
    ("RSA with modulus 0", rsa(mp(0)), "not positive"),
    ("RSA with exponent 1", rsa(e=mp(1)), "RSA key"),
    ("P-256 of another curve", ec(curve=b"nistp384"), CURVE),
    ("P-256 with the point of another curve", ec(b"\4" + bytes(96)), POINTED),
    ("P-384 of another curve", ec(curve=b"nistp256", kind=b"nistp384"), CURVE),
    ("a part of the curve's name", ec(curve=b"nistp2"), CURVE),
    ("a compressed point", ec(b"\2" + bytes(32)), POINTED),
    ("a compressed point of full length", ec(b"\2" + bytes(64)), POINTED),
    ("a hybrid point", ec(b"\6" + bytes(64)), POINTED),
    ("no point", ec(b""), POINTED),
    ("a point without its last byte", ec(POINT[:-1]), POINTED),
    ("a point with a byte more", ec(POINT + b"\0"), POINTED),
    ("sk P-384", s(SKEC) + s(b"nistp384") + s(b"\4" + bytes(96)) + s(b"ssh:"), CURVE),
    ("a certificate that is a plain key", s(CERTIFICATE) + s(X25), "4 bytes expected, 0 there"),
    ("a certificate with a key of 31 bytes", s(CERTIFICATE) + s(X25) + s(X25[1:]), "31 bytes"),
]


@pytest.mark.parametrize("blob, key_type, bits", rows(KEYS))
def test_a_key_blob_is_read(blob: bytes, key_type: str, bits: int) -> None:
    assert sap.parse_public_key(blob) == sap.PublicKey(key_type, blob, key_type, blob, bits)


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
    assert key.bits == BITS[plain]
    assert key.flags == (4 if name.startswith("rsa") else 0)  # SSH_AGENT_RSA_SHA2_512
    assert key.fingerprint == keygen("-lf", lab.pub[name]).decode().split()[1]
    assert key.name == key.fingerprint + (" (certificate)" if name != plain else "")
    assert comment == f"{plain}@test"
    assert lab.line(name) == f"{key.line} {comment}"


CERTIFYING = [
    ("of a host, by RSA", "rsa2048", ["-h", "-n", "host.example"]),
    ("without principals, by ECDSA", "ecdsa521", []),
    ("with many principals", "ed25519", ["-n", ",".join(f"user{i}" for i in range(200))]),
    ("with options", "ed25519", ["-n", "a", "-O", "clear", "-O", "force-command=/bin/false"]),
]


@pytest.mark.parametrize("authority, options", rows(CERTIFYING))
def test_a_certificate_is_read(
    lab: Lab, tmp_path: Path, authority: str, options: List[str]
) -> None:
    public = tmp_path / "key.pub"
    shutil.copy(lab.pub["ecdsa384"], public)
    keygen("-q", "-s", lab.folder / authority, "-I", "id", *options, public)
    key, _ = sap.parse_key_line((tmp_path / "key-cert.pub").read_text())
    assert key.type == TYPES["ecdsa384-cert"]
    assert key.plain_blob == lab.blob("ecdsa384")


def cut_or_extended(data: bytes) -> Iterator[bytes]:
    yield from (data[:size] for size in range(len(data)))
    yield data + b"\0"
    yield data + data


def mutations(data: bytes) -> Iterator[bytes]:
    """Bits turned over, bytes changed, dropped and doubled, by a chance that is always the same."""
    chance = random.Random(1)
    for _ in range(150):
        changed = bytearray(data)
        at = chance.randrange(len(changed))
        changed[at] ^= 1 << chance.randrange(8)
        yield bytes(changed)
        piece = bytes(changed[at : at + 8])
        changed[at : at + chance.randint(0, 8)] = chance.choice([b"", b"\0", b"\xff" * 4, piece])
        yield bytes(changed)


@pytest.mark.parametrize("name", ALL)
def test_a_real_key_that_was_damaged_is_refused_or_whole(lab: Lab, name: str) -> None:
    """Whatever the damage: nothing but a WireError of one line, or a key that is read again."""
    blob = lab.blob(name)
    for wrong in cut_or_extended(blob):
        with pytest.raises(sap.WireError):
            sap.parse_public_key(wrong)
    for changed in mutations(blob):
        try:
            key = sap.parse_public_key(changed)
        except sap.WireError as e:
            assert str(e).isprintable()
        else:
            assert key.blob == changed
            assert sap.parse_public_key(key.plain_blob).fingerprint == key.fingerprint


# ---------------------------------------------------------------- lines

LINE = "ssh-ed25519 " + base64.b64encode(ed()).decode()

LINES = [
    ("no comment", LINE, ""),
    ("a comment", LINE + " me@here", "me@here"),
    ("blanks around", f"  {LINE}  me  ", "me"),
    ("tabs between", LINE.replace(" ", "\t") + "\tme", "me"),
]

FORM = "not a public key"
NO_LINES = [
    ("nothing", "", FORM),
    ("a type alone", "ssh-ed25519", FORM),
    ("options in front", "restrict " + LINE, FORM),
    ("a type that nobody knows", LINE.replace("ssh-ed25519", "ssh-ed25518"), FORM),
    ("key:: in front, as git takes it", "key::" + LINE, FORM),
    ("a fingerprint", "SHA256:" + "A" * 43, "fingerprint"),
    ("a private key", "-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
    ("a character that is not base64's", LINE[:-8] + "_" + LINE[-7:], "base64"),
    ("base64 that holds half a key", LINE[:-8], "public key: "),
    ("a line of another type", LINE.replace("ssh-ed25519", "ssh-rsa"), "of type 'ssh-rsa'"),
]


@pytest.mark.parametrize("line, comment", rows(LINES))
def test_a_line_is_read(line: str, comment: str) -> None:
    assert sap.parse_key_line(line) == (sap.parse_public_key(ed()), comment)


@pytest.mark.parametrize("line, error", rows(NO_LINES))
def test_a_line_that_is_none_is_refused(line: str, error: str) -> None:
    with pytest.raises(sap.WireError) as e:
        sap.parse_key_line(line)
    assert error in str(e.value)


def test_a_private_key_is_never_quoted(lab: Lab) -> None:
    secret = (lab.folder / "ed25519").read_text()
    for text in (secret, *secret.splitlines(), secret.replace("\n", " ")):
        with pytest.raises(sap.WireError) as e:
            sap.parse_key_line(text)
        words = [word for word in text.split() if len(word) > 10]
        assert not any(word in str(e.value) for word in words)


# ---------------------------------------------------------------- an agent's signature

SIG64 = bytes(range(64))
RSA256 = b"\x7f" * 256
TAIL = b"\1\0\0\0\x2a"  # flags and counter
R, S = mp(5), mp(7)
ONE_TOO_MANY = mp(1 << 256)

ED_KEY, RSA_KEY, EC_KEY = ed(), rsa(), ec()
EC384_KEY = ec(b"\4" + bytes(96), b"nistp384", b"nistp384")
EC521_KEY = ec(b"\4" + bytes(132), b"nistp521", b"nistp521")
SKED_KEY = s(SKED) + s(X25) + s(b"ssh:")
SKEC_KEY = s(SKEC) + s(b"nistp256") + s(POINT) + s(b"ssh:")

P256, P384, P521 = b"ecdsa-sha2-nistp256", b"ecdsa-sha2-nistp384", b"ecdsa-sha2-nistp521"
SHA512 = b"rsa-sha2-512"

SIGNATURES = [
    ("Ed25519", ED_KEY, s(b"ssh-ed25519") + s(SIG64)),
    ("RSA", RSA_KEY, s(SHA512) + s(RSA256)),
    ("RSA without its leading zeros, as some agents have it", RSA_KEY, s(SHA512) + s(RSA256[2:])),
    ("P-256", EC_KEY, s(P256) + s(R + S)),
    ("P-384", EC384_KEY, s(P384) + s(R + S)),
    ("P-521", EC521_KEY, s(P521) + s(R + S)),
    ("P-521 with the longest numbers", EC521_KEY, s(P521) + s(2 * mp((1 << 521) - 1))),
    ("sk Ed25519", SKED_KEY, s(SKED) + s(SIG64) + TAIL),
    ("sk P-256", SKEC_KEY, s(SKEC) + s(R + S) + TAIL),
]

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
    ("P-384 with the algorithm of another curve", EC384_KEY, s(P256) + s(R + S), OTHER),
    ("P-256 with r = 0", EC_KEY, s(P256) + s(mp(0) + S), "not positive"),
    ("P-256 with r padded", EC_KEY, s(P256) + s(s(b"\0\5") + S), "needless leading zero"),
    ("P-256 with r too large", EC_KEY, s(P256) + s(ONE_TOO_MANY + S), "r is too large"),
    ("P-256 with s too large", EC_KEY, s(P256) + s(R + ONE_TOO_MANY), "s is too large"),
    ("P-521 with s too large", EC521_KEY, s(P521) + s(R + mp(1 << 521)), "s is too large"),
    ("P-256 with a third number", EC_KEY, s(P256) + s(R + S + R), "5 bytes left over"),
    ("P-256 as DER", EC_KEY, s(P256) + s(bytes.fromhex("3006020105020107")), "bytes expected"),
    ("sk Ed25519 of 63 bytes", SKED_KEY, s(SKED) + s(SIG64[1:]) + TAIL, "63 bytes"),
    ("a browser's", SKEC_KEY, s(b"webauthn-" + SKEC) + s(R + S) + TAIL, OTHER),
]  # fmt: skip


@pytest.mark.parametrize("blob, signature", rows(SIGNATURES))
def test_a_well_formed_signature_is_taken(blob: bytes, signature: bytes) -> None:
    sap.check_signature(sap.parse_public_key(blob), signature)


@pytest.mark.parametrize("blob, signature, error", rows(NO_SIGNATURES))
def test_a_signature_of_another_kind_is_refused(blob: bytes, signature: bytes, error: str) -> None:
    with pytest.raises(sap.WireError) as e:
        sap.check_signature(sap.parse_public_key(blob), signature)
    assert str(e.value).startswith("the agent's signature")
    assert error in str(e.value)
    assert str(e.value).isprintable()


def test_a_certificate_s_type_is_no_signature_algorithm(lab: Lab) -> None:
    for name in ("ed25519-cert", "rsa2048-cert"):
        key = sap.parse_public_key(lab.blob(name))
        with pytest.raises(sap.WireError, match=OTHER):
            sap.check_signature(key, s(key.type.encode()) + s(SIG64))


def agents_signature(lab: Lab, key: sap.PublicKey, name: str) -> bytes:
    """As the agent itself gives it."""
    with connect(lab.sock(name)) as sock:
        sock.sendall(message(sap.sign_request(key.blob, b"data", key.flags)))
        signature = sap.parse_sign_response(read_message(sock))
    assert signature
    return signature


@pytest.mark.parametrize("name", ALL)
def test_a_real_signature_is_taken_but_none_that_was_damaged(lab: Lab, name: str) -> None:
    key = sap.parse_public_key(lab.blob(name))
    signature = agents_signature(lab, key, name)
    sap.check_signature(key, signature)
    for wrong in cut_or_extended(signature):
        with pytest.raises(sap.WireError):
            sap.check_signature(key, wrong)
    for changed in mutations(signature):
        try:
            sap.check_signature(key, changed)  # its form may still be right
        except sap.WireError as e:
            assert str(e).isprintable()


# ---------------------------------------------------------------- next to ssh-keygen -Y sign

BLOCKS = [
    # key, payload's length, namespace, hash algorithm, in chunks?
    ("ed25519", 1, "git", "sha512", False),
    ("ed25519", 65536, "file", "sha256", True),
    ("ed25519", 1 << 20, LONGEST, "sha512", True),
    ("rsa2048", 64, "file", "sha512", True),
    ("rsa2048", 262145, LONGEST, "sha256", False),
    ("rsa3072", 4 << 20, "git", "sha512", True),
    ("rsa3072", 63, "file", "sha256", False),
]


def openssh() -> int:
    """The number of the ssh-keygen here, which has no option of its own that tells it."""
    said = run(["ssh", "-V"]).stderr.decode()
    found = re.match(r"OpenSSH_(?:for_Windows_)?(\d+)\.", said)
    assert found, said
    return int(found[1])


@pytest.mark.parametrize(
    "name, length, namespace, hash_algorithm, chunked",
    [pytest.param(*row, id="-".join(map(str, row[:2]))) for row in BLOCKS],
)
def test_the_block_is_that_of_ssh_keygen(
    lab: Lab, name: str, length: int, namespace: str, hash_algorithm: str, chunked: bool
) -> None:
    payload = random.Random(length).randbytes(length)
    answer = lab.sign(name, payload, chunked, namespace=namespace, hash=hash_algorithm)
    assert answer.status == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ssh-signature"
    options = ["-n", namespace, "-O", f"hashalg={hash_algorithm}"]
    theirs = keygen("-Y", "sign", "-f", lab.folder / name, *options, input=payload)
    if name.startswith("rsa") and hash_algorithm == "sha256" and openssh() >= 10:
        # It takes rsa-sha2-256 then. Ours never goes below rsa-sha2-512.
        *ours, signature = taken_apart(answer.body)
        assert ours == taken_apart(theirs)[:4]
        assert signature.startswith(s(b"rsa-sha2-512"))
    else:
        assert answer.body == theirs


@pytest.mark.parametrize("name", ["ed25519-cert", "rsa2048-cert"])
def test_the_block_of_a_certificate_is_that_of_ssh_keygen(lab: Lab, name: str) -> None:
    theirs = run(
        ["ssh-keygen", "-Y", "sign", "-f", lab.pub[name], "-n", "git"],
        env=dict(os.environ, SSH_AUTH_SOCK=str(lab.agent.sock)),
        input=b"payload",
    )
    assert lab.sign(name, b"payload").body == theirs.stdout


VERIFIED = [(name, "sha512") for name in ALL]
VERIFIED += [(name, "sha256") for name in ("ed25519", "rsa3072", "ecdsa384", "sk-ecdsa-cert")]


@pytest.mark.parametrize("name, hash_algorithm", VERIFIED)
def test_ssh_keygen_verifies_the_block(
    lab: Lab, tmp_path: Path, name: str, hash_algorithm: str
) -> None:
    answer = lab.sign(name, b"payload", hash=hash_algorithm)
    assert answer.status == 200, answer.text
    signature, signers = tmp_path / "signature", tmp_path / "signers"
    signature.write_bytes(answer.body)
    namespaces, line = 'namespaces="git"', lab.line(name)
    if name.endswith("-cert"):
        namespaces = "cert-authority," + namespaces
        line = lab.ca.with_suffix(".pub").read_text().strip()
    signers.write_text(f"someone {namespaces} {line}\n")
    verify = ["-Y", "verify", "-f", signers, "-I", "someone", "-n", "git", "-s", signature]
    good = f'Good "git" signature for someone with {name_for_people(name)}'
    assert keygen(*verify, input=b"payload").decode().startswith(good)
    assert keygen(*verify, input=b"payload.", check=False) == b"", "it does not look"


def name_for_people(name: str) -> str:
    plain = name.replace("-cert", "")
    kind = {"sk-ed25519": "ED25519-SK", "sk-ecdsa": "ECDSA-SK"}.get(plain, plain.upper())
    return kind.rstrip("0123456789") if plain != "ed25519" else kind


def test_a_security_key_is_asked_for_anew_each_time_and_without_flags(lab: Lab) -> None:
    first, second = (taken_apart(lab.sign("sk-ed25519", b"payload").body)[4] for _ in range(2))
    counter = first[-4:]
    assert second[-4:] == (int.from_bytes(counter, "big") + 1).to_bytes(4, "big")
    assert set(lab.authenticators.flags) == {0}
