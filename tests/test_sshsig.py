"""PROTOCOL.sshsig: keys, what is signed and what comes out, next to the real ssh-keygen."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import os
import random
import shutil
import socket
import struct
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest
from conftest import (
    PROXY,
    Agent,
    Answer,
    Keys,
    Proxy,
    clean_env,
    message,
    need,
    parse_answer,
    raw,
    read_message,
    rows,
    run,
)

import ssh_agent_proxy as sap

PLAIN = ("ed25519", "rsa2048", "rsa3072", "rsa4096", "ecdsa256", "ecdsa384", "ecdsa521")
SECURITY = ("sk-ed25519", "sk-ecdsa")
CERTIFIED = tuple(f"{name}-cert" for name in (*PLAIN, *SECURITY))
ALL = (*PLAIN, *SECURITY, *CERTIFIED)

TYPES = {
    "ed25519": "ssh-ed25519",
    "rsa2048": "ssh-rsa",
    "rsa3072": "ssh-rsa",
    "rsa4096": "ssh-rsa",
    "ecdsa256": "ecdsa-sha2-nistp256",
    "ecdsa384": "ecdsa-sha2-nistp384",
    "ecdsa521": "ecdsa-sha2-nistp521",
    "sk-ed25519": "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa": "sk-ecdsa-sha2-nistp256@openssh.com",
    "ed25519-cert": "ssh-ed25519-cert-v01@openssh.com",
    "rsa2048-cert": "ssh-rsa-cert-v01@openssh.com",
    "rsa3072-cert": "ssh-rsa-cert-v01@openssh.com",
    "rsa4096-cert": "ssh-rsa-cert-v01@openssh.com",
    "ecdsa256-cert": "ecdsa-sha2-nistp256-cert-v01@openssh.com",
    "ecdsa384-cert": "ecdsa-sha2-nistp384-cert-v01@openssh.com",
    "ecdsa521-cert": "ecdsa-sha2-nistp521-cert-v01@openssh.com",
    "sk-ed25519-cert": "sk-ssh-ed25519-cert-v01@openssh.com",
    "sk-ecdsa-cert": "sk-ecdsa-sha2-nistp256-cert-v01@openssh.com",
}

BITS = {"ed25519": 256, "rsa2048": 2048, "rsa3072": 3072, "rsa4096": 4096, "ecdsa256": 256,
        "ecdsa384": 384, "ecdsa521": 521, "sk-ed25519": 256, "sk-ecdsa": 256}  # fmt: skip


# ---------------------------------------------------------------- bytes, written by hand


def s(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


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


class AuthenticatorAgent:
    """An agent that holds security keys and their certificates."""

    def __init__(self, path: Path) -> None:
        self.sock = path
        self.listed: List[Tuple[bytes, Authenticator]] = []
        self.flags: List[int] = []  # that were asked for
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(64)
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection, contextlib.suppress(OSError):
                    self.talk(connection)

    def talk(self, connection: socket.socket) -> None:
        while True:
            request = read_message(connection)
            if not request:
                return
            connection.sendall(message(self.answer(request)))

    def answer(self, request: bytes) -> bytes:
        if request == b"\x0b":
            keys = b"".join(s(blob) + s(key.kind.encode()) for blob, key in self.listed)
            return b"\x0c" + struct.pack(">I", len(self.listed)) + keys
        with sap.Reader(request, "sign request") as r:
            assert r.take(1) == b"\x0d"
            wanted, data = r.string(), r.string()
            self.flags.append(r.uint32())
        for blob, key in self.listed:
            if blob == wanted:
                return b"\x0e" + s(key.sign(data))
        return b"\5"

    def stop(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


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

    def sign(
        self, name: str, payload: bytes, chunked: bool = False, **more: str
    ) -> Answer:  # fmt: skip
        port = self.proxies[name.startswith("sk-")].port
        fields = {"Host": "localhost", "SSHSIG-Key": " ".join(self.line(name).split()[:2])}
        fields.update({f"SSHSIG-{field.capitalize()}": value for field, value in more.items()})
        body = payload
        if chunked:
            fields["Transfer-Encoding"] = "chunked"
            pieces = [payload[at : at + 65521] for at in range(0, len(payload), 65521)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"
        else:
            fields["Content-Length"] = str(len(payload))
        head = "POST /sign HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in fields.items())
        return parse_answer(raw(port, head.encode() + b"\r\n" + body, 60))

    def stop(self) -> None:
        statuses = [proxy.stop() for proxy in self.proxies]
        self.agent.stop()
        self.authenticators.stop()
        assert statuses == [0, 0]
        assert "Traceback" not in "".join(proxy.log() for proxy in self.proxies)


@pytest.fixture(scope="module")
def lab(keys: Keys) -> Iterator[Lab]:
    folder = Path(tempfile.mkdtemp(prefix="sap.", dir="/tmp"))
    try:
        made = Lab(folder, keys)
        yield made
        made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


@pytest.mark.parametrize("size", [1, 2, 3, 51, 52, 53, 54, 104, 105, 106, 1000])
def test_the_armor_is_base64_in_lines_of_70_characters(size: int) -> None:
    blob = bytes(i % 256 for i in range(size))
    first, *lines, last, after = sap.armor(blob).split(b"\n")
    assert (first, last) == (b"-----BEGIN SSH SIGNATURE-----", b"-----END SSH SIGNATURE-----")
    assert after == b""
    assert all(len(line) == 70 for line in lines[:-1])
    assert 0 < len(lines[-1]) <= 70
    assert b"".join(lines) == base64.b64encode(blob)


def test_a_real_block_is_taken_apart_and_put_together_again(lab: Lab) -> None:
    block = keygen("-Y", "sign", "-f", lab.folder / "ed25519", "-n", "git", input=b"payload")
    blob = base64.b64decode(b"".join(block.splitlines()[1:-1]))
    assert blob[:10] == b"SSHSIG\0\0\0\1"
    with sap.Reader(blob[10:], "block") as r:
        key, namespace, reserved, hash_algorithm, signature = (r.string() for _ in range(5))
    assert reserved == b""
    assert sap.armor(sap.sshsig(key, namespace.decode(), hash_algorithm.decode(), signature)) == (
        block
    )


# ---------------------------------------------------------------- keys, by hand

KEYS = [
    ("Ed25519", ed(), "ssh-ed25519", 256),
    ("RSA of the fewest bits", rsa(mp((1 << 1023) | 1)), "ssh-rsa", 1024),
    ("RSA with a length of no whole bytes", rsa(mp((1 << 2049) | 1)), "ssh-rsa", 2050),
    ("RSA of the most bits", rsa(mp((1 << 16383) | 1)), "ssh-rsa", 16384),
    ("RSA with the least exponent", rsa(e=mp(3)), "ssh-rsa", 2048),
    ("P-256", ec(), "ecdsa-sha2-nistp256", 256),
    ("P-384", ec(b"\4" + bytes(96), b"nistp384", b"nistp384"), "ecdsa-sha2-nistp384", 384),
    ("P-521", ec(b"\4" + bytes(132), b"nistp521", b"nistp521"), "ecdsa-sha2-nistp521", 521),
    ("sk Ed25519", s(SKED) + s(X25) + s(b"ssh:"), SKED.decode(), 256),
    ("sk Ed25519 without an application", s(SKED) + s(X25) + s(b""), SKED.decode(), 256),
    ("sk P-256", s(SKEC) + s(b"nistp256") + s(POINT) + s(b"ssh:"), SKEC.decode(), 256),
]

TYPE = "type '"
CURVE, POINTED = "curve", "not an uncompressed point"
CERTIFICATE = b"ssh-ed25519-cert-v01@openssh.com"

NO_KEYS = [
    ("nothing", b"", "4 bytes expected, 0 there"),
    ("half a length", b"\0\0", "4 bytes expected, 2 there"),
    ("a type alone", s(b"ssh-ed25519"), "4 bytes expected, 0 there"),
    ("a type of 2^32-1 bytes", b"\xff\xff\xff\xffssh-ed25519", "4294967295 bytes expected"),
    ("a type that is cut", b"\0\0\0\x0bssh-ed2551", "11 bytes expected, 10 there"),
    ("an empty type", s(b"") + s(X25), TYPE),
    ("a type in capitals", s(b"SSH-ED25519") + s(X25), TYPE),
    ("a type with a NUL behind it", s(b"ssh-ed25519\0") + s(X25), TYPE),
    ("a type that is no text", s(b"\xff\xfe") + s(X25), TYPE),
    ("DSA", s(b"ssh-dss") + 4 * mp(5), TYPE),
    ("a signature algorithm for a type", s(b"rsa-sha2-512") + mp(65537) + mp(N2048), TYPE),
    ("a webauthn type", s(b"webauthn-sk-ecdsa-sha2-nistp256@openssh.com") + s(POINT), TYPE),
    ("Ed448", s(b"ssh-ed448") + s(bytes(57)), TYPE),
    ("Ed25519 of 31 bytes", ed(bytes(31)), "an Ed25519 key of 31 bytes"),
    ("Ed25519 of 33 bytes", ed(bytes(33)), "an Ed25519 key of 33 bytes"),
    ("Ed25519 of no bytes", ed(b""), "an Ed25519 key of 0 bytes"),
    ("Ed25519 of 2^32-1 bytes", s(b"ssh-ed25519") + b"\xff" * 36, "4294967295 bytes expected"),
    ("Ed25519 and a byte more", ed() + b"\0", "1 bytes left over"),
    ("Ed25519 and an application", ed() + s(b"ssh:"), "8 bytes left over"),
    ("RSA of too few bits", rsa(mp((1 << 1022) | 1)), "1023 bits"),
    ("RSA of one bit", rsa(mp(1)), "1 bits"),
    ("RSA of too many bits", rsa(mp((1 << 16384) | 1)), "16385 bits"),
    ("RSA with modulus 0", rsa(mp(0)), "not positive"),
    ("RSA with a negative modulus", rsa(s(b"\xff" * 256)), "not positive"),
    ("RSA with a needless zero", rsa(s(b"\0\0" + b"\xff" * 256)), "needless leading zero"),
    ("RSA with exponent 0", rsa(e=mp(0)), "not positive"),
    ("RSA with exponent 1", rsa(e=mp(1)), "RSA key"),
    ("RSA with a negative exponent", rsa(e=s(b"\xfb")), "not positive"),
    ("RSA with a padded exponent", rsa(e=s(b"\0\3")), "needless leading zero"),
    ("RSA without a modulus", rsa(b""), "4 bytes expected, 0 there"),
    ("RSA and a byte more", rsa() + b"\0", "1 bytes left over"),
    ("P-256 of another curve", ec(curve=b"nistp384"), CURVE),
    ("P-256 with the point of another curve", ec(b"\4" + bytes(96)), POINTED),
    ("P-384 of another curve", ec(curve=b"nistp256", kind=b"nistp384"), CURVE),
    ("P-521 of another curve", ec(curve=b"nistp256", kind=b"nistp521"), CURVE),
    ("a curve that SSH has not", ec(curve=b"nistp224"), CURVE),
    ("an empty curve", ec(curve=b""), CURVE),
    ("a part of the curve's name", ec(curve=b"nistp2"), CURVE),
    ("a curve that is no text", ec(curve=b"\xff"), CURVE),
    ("a compressed point", ec(b"\2" + bytes(32)), POINTED),
    ("a compressed point of full length", ec(b"\2" + bytes(64)), POINTED),
    ("a hybrid point", ec(b"\6" + bytes(64)), POINTED),
    ("the point at infinity", ec(b"\0"), POINTED),
    ("no point", ec(b""), POINTED),
    ("a point without its last byte", ec(POINT[:-1]), POINTED),
    ("a point with a byte more", ec(POINT + b"\0"), POINTED),
    ("ECDSA and a byte more", ec() + b"\0", "1 bytes left over"),
    ("sk Ed25519, no application field", s(SKED) + s(X25), "4 bytes expected, 0 there"),
    ("sk Ed25519, application cut", s(SKED) + s(X25) + s(b"ssh:")[:-1], "4 bytes expected, 3"),
    ("sk Ed25519 and a byte more", s(SKED) + s(X25) + s(b"ssh:") + b"\1", "1 bytes left over"),
    ("sk Ed25519 of 31 bytes", s(SKED) + s(X25[1:]) + s(b"ssh:"), "31 bytes"),
    ("sk P-256, no application field", s(SKEC) + s(b"nistp256") + s(POINT), "4 bytes expected"),
    ("sk P-384", s(SKEC) + s(b"nistp384") + s(b"\4" + bytes(96)) + s(b"ssh:"), CURVE),
    ("a certificate that is a plain key", s(CERTIFICATE) + s(X25), "4 bytes expected, 0 there"),
    ("a certificate of the old form", s(b"ssh-rsa-cert-v00@openssh.com") + s(X25), TYPE),
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


def test_the_refusal_of_a_foreign_type_is_one_printable_line() -> None:
    with pytest.raises(sap.WireError) as e:
        sap.parse_public_key(s(b"a\n\x1b[2J\xe2\x80\xae" + b"z" * 10000))
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 200


@pytest.mark.parametrize("name", ALL)
def test_only_rsa_is_asked_for_with_a_flag(lab: Lab, name: str) -> None:
    flags = sap.parse_public_key(lab.blob(name)).flags
    assert flags == (4 if name.startswith("rsa") else 0)


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
    assert comment == f"{plain}@test"
    assert lab.line(name) == f"{key.line} {comment}"


@pytest.mark.parametrize("name", ALL)
def test_a_fingerprint_is_that_of_ssh_keygen(lab: Lab, name: str) -> None:
    shown = keygen("-lf", lab.pub[name]).decode().split()[1]
    assert sap.parse_public_key(lab.blob(name)).fingerprint == shown


CERTIFYING = [
    ("of a host", ["-h", "-n", "host.example"]),
    ("without principals", []),
    ("with many principals", ["-n", ",".join(f"user{i}" for i in range(200))]),
    ("with options", ["-n", "a", "-O", "clear", "-O", "force-command=/bin/false"]),
    ("with a serial number", ["-n", "a", "-z", str(2**64 - 1)]),
    ("of times gone by", ["-n", "a", "-V", "20200101:20200102"]),
]


@pytest.mark.parametrize("authority", ["ed25519", "rsa2048", "ecdsa521"])
@pytest.mark.parametrize("options", rows(CERTIFYING))
def test_a_certificate_is_read(
    lab: Lab, tmp_path: Path, authority: str, options: List[str]
) -> None:
    public = tmp_path / "key.pub"
    shutil.copy(lab.pub["ecdsa384"], public)
    keygen("-q", "-s", lab.folder / authority, "-I", "id", *options, public)
    key, _ = sap.parse_key_line((tmp_path / "key-cert.pub").read_text())
    assert key.type == TYPES["ecdsa384-cert"]
    assert key.plain_blob == lab.blob("ecdsa384")


@pytest.mark.parametrize("name", ALL)
def test_a_real_key_cut_or_extended_anywhere_is_refused(lab: Lab, name: str) -> None:
    blob = lab.blob(name)
    for wrong in (*(blob[:size] for size in range(len(blob))), blob + b"\0", blob + blob):
        with pytest.raises(sap.WireError):
            sap.parse_public_key(wrong)


def mutations(data: bytes, seed: int) -> Iterator[bytes]:
    """Every bit turned over; then bytes changed, dropped and doubled by chance."""
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)
    chance = random.Random(seed)
    for _ in range(1000):
        changed = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(changed))
            changed[at : at + chance.randint(0, 8)] = chance.choice(
                [b"", b"\0", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", bytes(changed[at : at + 8])]
            )
        yield bytes(changed)


@pytest.mark.parametrize("name", ALL)
def test_a_real_key_with_bits_turned_over_is_read_or_refused(lab: Lab, name: str) -> None:
    outcomes = set()
    for blob in mutations(lab.blob(name), 1):
        try:
            key = sap.parse_public_key(blob)
        except sap.WireError as e:
            assert str(e).isprintable()
            outcomes.add("refused")
        else:
            assert key.blob == blob
            assert sap.parse_public_key(key.plain_blob).fingerprint == key.fingerprint
            outcomes.add("read")
    assert outcomes == {"read", "refused"}


# ---------------------------------------------------------------- lines

LINE = "ssh-ed25519 " + base64.b64encode(ed()).decode()

LINES = [
    ("no comment", LINE, ""),
    ("a comment", LINE + " me@here", "me@here"),
    ("a comment of several words", LINE + " me at  home", "me at  home"),
    ("blanks around", f"  {LINE}  me  ", "me"),
    ("tabs between", LINE.replace(" ", "\t") + "\tme", "me"),
    ("a line end", LINE + " me\r\n", "me"),
    ("a comment beyond ASCII", LINE + " ich@hüben", "ich@hüben"),
]

FORM = "not a public key"
NO_LINES = [
    ("nothing", "", FORM),
    ("blanks", " \t ", FORM),
    ("a type alone", "ssh-ed25519", FORM),
    ("base64 alone", LINE.split()[1], FORM),
    ("options in front", "restrict " + LINE, FORM),
    ("a type that nobody knows", LINE.replace("ssh-ed25519", "ssh-ed25518"), FORM),
    ("DSA", "ssh-dss " + base64.b64encode(s(b"ssh-dss")).decode(), FORM),
    ("key:: in front, as git takes it", "key::" + LINE, FORM),
    ("a fingerprint", "SHA256:" + "A" * 43, "fingerprint"),
    ("an old fingerprint", "MD5:" + ":".join(16 * ["aa"]), "fingerprint"),
    ("a private key", "-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
    ("a character that is not base64's", LINE[:-8] + "_" + LINE[-7:], "base64"),
    ("a character beyond ASCII", LINE[:-8] + "é" + LINE[-7:], "base64"),
    ("base64 without its end", LINE[:-2], "base64"),
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
    ("P-256 with the longest numbers", EC_KEY, s(P256) + s(2 * mp((1 << 256) - 1))),
    ("P-384", EC384_KEY, s(P384) + s(R + S)),
    ("P-521", EC521_KEY, s(P521) + s(R + S)),
    ("P-521 with the longest numbers", EC521_KEY, s(P521) + s(2 * mp((1 << 521) - 1))),
    ("sk Ed25519", SKED_KEY, s(SKED) + s(SIG64) + TAIL),
    ("sk P-256", SKEC_KEY, s(SKEC) + s(R + S) + TAIL),
    ("sk P-256 with all flags", SKEC_KEY, s(SKEC) + s(R + S) + b"\xff" * 5),
]

OTHER = "is of algorithm"
NO_SIGNATURES = [
    ("nothing", ED_KEY, b"", "4 bytes expected, 0 there"),
    ("an algorithm alone", ED_KEY, s(b"ssh-ed25519"), "4 bytes expected, 0 there"),
    ("an algorithm of 2^32-1 bytes", ED_KEY, b"\xff" * 8, "4294967295 bytes expected, 4 there"),
    ("no algorithm", ED_KEY, s(b"") + s(SIG64), OTHER),
    ("an algorithm that is no text", ED_KEY, s(b"\xff\n") + s(SIG64), OTHER),
    ("another key type's", ED_KEY, s(SHA512) + s(RSA256), OTHER),
    ("an sk key's from a plain one", ED_KEY, s(SKED) + s(SIG64) + TAIL, OTHER),
    ("Ed25519 of 63 bytes", ED_KEY, s(b"ssh-ed25519") + s(SIG64[1:]), "63 bytes"),
    ("Ed25519 of 65 bytes", ED_KEY, s(b"ssh-ed25519") + s(SIG64 + b"\0"), "65 bytes"),
    ("Ed25519 of no bytes", ED_KEY, s(b"ssh-ed25519") + s(b""), "0 bytes"),
    ("Ed25519 of 2^32-1 bytes", ED_KEY, s(b"ssh-ed25519") + b"\xff" * 68, "4294967295 bytes"),
    ("Ed25519 with flags and counter", ED_KEY, s(b"ssh-ed25519") + s(SIG64) + TAIL, "5 bytes left"),
    ("RSA with SHA-1", RSA_KEY, s(b"ssh-rsa") + s(RSA256), OTHER),
    ("RSA with SHA-256", RSA_KEY, s(b"rsa-sha2-256") + s(RSA256), OTHER),
    ("RSA with a byte more", RSA_KEY, s(SHA512) + s(RSA256 + b"\0"), "257 bytes"),
    ("RSA of no bytes", RSA_KEY, s(SHA512) + s(b""), "0 bytes"),
    ("RSA of a larger key", RSA_KEY, s(SHA512) + s(2 * RSA256), "512 bytes"),
    ("RSA and a byte behind it", RSA_KEY, s(SHA512) + s(RSA256) + b"\0", "1 bytes left over"),
    ("P-256 with the algorithm of another curve", EC_KEY, s(P384) + s(R + S), OTHER),
    ("P-384 with the algorithm of another curve", EC384_KEY, s(P256) + s(R + S), OTHER),
    ("P-521 with the algorithm of another curve", EC521_KEY, s(P256) + s(R + S), OTHER),
    ("P-256 with r = 0", EC_KEY, s(P256) + s(mp(0) + S), "not positive"),
    ("P-256 with s = 0", EC_KEY, s(P256) + s(R + mp(0)), "not positive"),
    ("P-256 with r < 0", EC_KEY, s(P256) + s(s(b"\xfb") + S), "not positive"),
    ("P-256 with s < 0", EC_KEY, s(P256) + s(R + s(b"\x80")), "not positive"),
    ("P-256 with r padded", EC_KEY, s(P256) + s(s(b"\0\5") + S), "needless leading zero"),
    ("P-256 with s padded", EC_KEY, s(P256) + s(R + s(b"\0\0\x80")), "needless leading zero"),
    ("P-256 with r too large", EC_KEY, s(P256) + s(ONE_TOO_MANY + S), "r is too large"),
    ("P-256 with s too large", EC_KEY, s(P256) + s(R + ONE_TOO_MANY), "s is too large"),
    ("P-384 with r too large", EC384_KEY, s(P384) + s(mp(1 << 384) + S), "r is too large"),
    ("P-521 with s too large", EC521_KEY, s(P521) + s(R + mp(1 << 521)), "s is too large"),
    ("P-256 with s missing", EC_KEY, s(P256) + s(R), "4 bytes expected, 0 there"),
    ("P-256 with a third number", EC_KEY, s(P256) + s(R + S + R), "5 bytes left over"),
    ("P-256 without numbers", EC_KEY, s(P256) + s(b""), "4 bytes expected, 0 there"),
    ("P-256 as r and s without lengths", EC_KEY, s(P256) + s(SIG64), "bytes"),
    ("P-256 as DER", EC_KEY, s(P256) + s(bytes.fromhex("3006020105020107")), "bytes expected"),
    ("P-256 and a byte behind it", EC_KEY, s(P256) + s(R + S) + b"\0", "1 bytes left over"),
    ("P-256 with flags and counter", EC_KEY, s(P256) + s(R + S) + TAIL, "5 bytes left over"),
    ("sk Ed25519 without flags", SKED_KEY, s(SKED) + s(SIG64), "1 bytes expected, 0 there"),
    ("sk Ed25519 without counter", SKED_KEY, s(SKED) + s(SIG64) + b"\1", "4 bytes expected, 0 "),
    ("sk Ed25519, counter cut", SKED_KEY, s(SKED) + s(SIG64) + TAIL[:-1], "4 bytes expected, 3 "),
    ("sk Ed25519 and a byte more", SKED_KEY, s(SKED) + s(SIG64) + TAIL + b"\0", "1 bytes left"),
    ("sk Ed25519 of 63 bytes", SKED_KEY, s(SKED) + s(SIG64[1:]) + TAIL, "63 bytes"),
    ("a plain key's from an sk one", SKED_KEY, s(b"ssh-ed25519") + s(SIG64), OTHER),
    ("a plain key's with an sk one's end", SKED_KEY, s(b"ssh-ed25519") + s(SIG64) + TAIL, OTHER),
    ("sk P-256 without flags", SKEC_KEY, s(SKEC) + s(R + S), "1 bytes expected, 0 there"),
    ("sk P-256 and a byte more", SKEC_KEY, s(SKEC) + s(R + S) + TAIL + b"\0", "1 bytes left over"),
    ("sk P-256 with r = 0", SKEC_KEY, s(SKEC) + s(mp(0) + S) + TAIL, "not positive"),
    ("sk P-256 with s too large", SKEC_KEY, s(SKEC) + s(R + ONE_TOO_MANY) + TAIL, "too large"),
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


def agents_signature(lab: Lab, name: str) -> bytes:
    """As the agent itself gives it."""
    key = sap.parse_public_key(lab.blob(name))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(lab.sock(name)))
        sock.sendall(message(sap.sign_request(key.blob, b"data", key.flags)))
        signature = sap.parse_sign_response(read_message(sock))
    assert signature
    return signature


@pytest.mark.parametrize("name", ALL)
def test_a_real_signature_is_taken_but_none_cut_or_extended(lab: Lab, name: str) -> None:
    key, signature = sap.parse_public_key(lab.blob(name)), agents_signature(lab, name)
    sap.check_signature(key, signature)
    for wrong in (*(signature[:n] for n in range(len(signature))), signature + b"\0"):
        with pytest.raises(sap.WireError):
            sap.check_signature(key, wrong)


@pytest.mark.parametrize("name", ALL)
def test_a_real_signature_with_bits_turned_over_is_taken_or_refused(lab: Lab, name: str) -> None:
    key, outcomes = sap.parse_public_key(lab.blob(name)), set()
    for signature in mutations(agents_signature(lab, name), 2):
        try:
            sap.check_signature(key, signature)
            outcomes.add("taken")
        except sap.WireError as e:
            assert str(e).isprintable()
            outcomes.add("refused")
    assert outcomes == {"taken", "refused"}


# ---------------------------------------------------------------- next to ssh-keygen -Y sign

DETERMINISTIC = ("ed25519", "rsa2048", "rsa3072", "rsa4096")
LENGTHS = (1, 63, 64, 65536, 262145, 1 << 20, 16 << 20)
NAMESPACES = ("git", "file", LONGEST)
HASHES = ("sha512", "sha256")


def pairwise() -> List[Tuple[str, int, str, str, bool]]:
    """Every key with every length; the rest such that each two values meet somewhere."""
    table = []
    for i, (length, name) in enumerate(itertools.product(LENGTHS, DETERMINISTIC)):
        namespace, hash_algorithm = NAMESPACES[i % 3], HASHES[(i // 2 + i // 8) % 2]
        table.append((name, length, namespace, hash_algorithm, (i + i // 4) % 2 == 1))
    return table


def test_the_combinations_hold_every_pair() -> None:
    values = (DETERMINISTIC, LENGTHS, NAMESPACES, HASHES, (False, True))
    for a, b in itertools.combinations(range(len(values)), 2):
        met = {(row[a], row[b]) for row in pairwise()}
        assert met == set(itertools.product(values[a], values[b]))


@pytest.mark.parametrize(
    "name, length, namespace, hash_algorithm, chunked",
    pairwise(),
    ids=lambda value: f"{len(value)} n" if value == LONGEST else None,
)
def test_the_block_is_that_of_ssh_keygen(
    lab: Lab, name: str, length: int, namespace: str, hash_algorithm: str, chunked: bool
) -> None:
    payload = random.Random(length).randbytes(length)
    answer = lab.sign(name, payload, chunked, namespace=namespace, hash=hash_algorithm)
    assert answer.status == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ssh-signature"
    options = ["-n", namespace, "-O", f"hashalg={hash_algorithm}"]
    assert answer.body == keygen("-Y", "sign", "-f", lab.folder / name, *options, input=payload)


@pytest.mark.parametrize("name", [f"{name}-cert" for name in DETERMINISTIC])
def test_the_block_of_a_certificate_is_that_of_ssh_keygen(lab: Lab, name: str) -> None:
    theirs = run(
        ["ssh-keygen", "-Y", "sign", "-f", lab.pub[name], "-n", "git"],
        env=dict(os.environ, SSH_AUTH_SOCK=str(lab.agent.sock)),
        input=b"payload",
    )
    assert lab.sign(name, b"payload").body == theirs.stdout


@pytest.mark.parametrize("hash_algorithm", HASHES)
@pytest.mark.parametrize("name", ALL)
def test_ssh_keygen_verifies_the_block(
    lab: Lab, tmp_path: Path, name: str, hash_algorithm: str
) -> None:
    answer = lab.sign(name, b"payload", hash=hash_algorithm)
    assert answer.status == 200, answer.text
    signature, signers = tmp_path / "signature", tmp_path / "signers"
    signature.write_bytes(answer.body)
    namespaces, line = 'namespaces="git"', lab.line(name)
    if name in CERTIFIED:
        namespaces = "cert-authority," + namespaces
        line = lab.ca.with_suffix(".pub").read_text().strip()
    signers.write_text(f"someone {namespaces} {line}\n")
    verify = ["-Y", "verify", "-f", signers, "-I", "someone", "-n", "git", "-s", signature]
    verify_novalidate = ["-Y", "check-novalidate", "-n", "git", "-s", signature]
    good = f'Good "git" signature for someone with {name_for_people(name)}'
    assert keygen(*verify, input=b"payload").decode().startswith(good)
    assert keygen(*verify_novalidate, input=b"payload").startswith(b'Good "git" signature')
    # and it looks:
    assert keygen(*verify, input=b"payload.", check=False) == b""
    assert keygen(*verify_novalidate, input=b"payload.", check=False) == b""


def name_for_people(name: str) -> str:
    plain = name.replace("-cert", "")
    kind = {"sk-ed25519": "ED25519-SK", "sk-ecdsa": "ECDSA-SK"}.get(plain, plain.upper())
    return kind.rstrip("0123456789") if plain != "ed25519" else kind


def test_a_security_key_is_asked_for_without_flags(lab: Lab) -> None:
    assert lab.sign("sk-ed25519", b"payload").status == 200
    assert set(lab.authenticators.flags) == {0}


def test_each_signature_of_a_security_key_has_its_own_counter(lab: Lab) -> None:
    blocks = [lab.sign("sk-ed25519", b"payload").body for _ in range(2)]
    first, second = (base64.b64decode(b"".join(b.splitlines()[1:-1])) for b in blocks)
    assert int.from_bytes(second[-4:], "big") == int.from_bytes(first[-4:], "big") + 1
