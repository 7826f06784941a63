#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""ssh-agent-proxy: SSH signatures over HTTP for containers, without the key and without the agent.

It listens on localhost, next to an ssh-agent. A container POSTs what git wants signed to /sign and
gets back the SSHSIG block that `ssh-keygen -Y sign` would have written. Nothing else can be asked
of the agent through it, and no private key is ever seen here.

The file reads from top to bottom; each section uses only what stands above it:

    Head            imports, the kinds of errors, printable()
    Wire            the SSH data types                          RFC 4251 section 5
    Agent protocol  the messages that an agent understands      RFC 9987
    SSHSIG          keys, what is signed, what comes out        OpenSSH PROTOCOL.sshsig
    Payload         a git commit, tag, push certificate, or neither
    Upstream        how the agent is reached, and asked
    Policy          browsers, hosts, tokens, kinds of payload, consent: may this be signed?
    Hardening       what the process gives up
    Config          settings, from the environment and the command line
    HTTP            requests read strictly, answers, the server
    Service         the log, signals
    Commands        serve, token, shim, main()
"""

import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    # The script's own directory: a file named hmac.py beside it is not ours to run.
    del sys.path[0]

# (No `from __future__` either: it would come first.)
import argparse
import base64
import contextlib
import errno
import hashlib
import hmac
import io
import ipaddress
import logging
import os
import re
import select
import shlex
import signal
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from string import Template
from typing import Any, BinaryIO, NamedTuple, NoReturn, Optional, TypeVar, Union

VERSION = "0.1.0"
PROGRAM = "ssh-agent-proxy"

LOG = logging.getLogger(PROGRAM)
# Signatures, refusals and failures: between INFO and WARNING, so that --quiet keeps them.
AUDIT = 25


class ProxyError(Exception):
    """Something that a person can act on; its text is one line, with foreign data escaped."""


class WireError(ProxyError):
    """Bytes that are not what their specification says."""


class AgentError(ProxyError):
    """The agent can't be used now."""


class AgentUnreachable(AgentError):
    """Nobody answers where the agent should be."""


class NoUsableKey(AgentError):
    """The agent answers, but lists no key to sign with."""


class AgentTimeout(AgentError):
    """The agent did not answer in time."""


class AgentRefused(AgentError):
    """The agent holds the key and does not want to sign with it."""


class KeyNotHeld(AgentError):
    """The key that the request names is not among those that the agent lists."""


class ConfigError(ProxyError):
    """A setting that can't be right."""


class RequestError(ProxyError):
    """A request that is answered with the HTTP status given, and why."""

    def __init__(self, status: int, reason: str, *fields: tuple[str, str]) -> None:
        super().__init__(reason)
        self.status = status
        self.fields = fields


class ClientGone(ProxyError):
    """Nobody waits for the answer any more."""


# Blank or without width, and yet neither control nor format characters to Unicode.
_UNSEEN = frozenset(map(chr, (
    0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0,
    *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0),
)))  # fmt: skip


def printable(text: Union[str, bytes], limit: int = 200, special: str = "") -> str:
    """Foreign text for a log, a prompt or an error: one line, of at most LIMIT characters.

    Control, bidi, zero-width and other invisible characters become escapes as in Python's source,
    SPECIAL ones are led by a backslash.
    """
    if isinstance(text, bytes):
        text = text[: 4 * limit].decode("utf-8", "backslashreplace")
    text = text[: limit + 1]
    seen = text.isprintable() and _UNSEEN.isdisjoint(text)
    if seen and len(text) <= limit and not any(c in text for c in special):
        return text
    pieces = [
        "\\" + c if c in special
        else c if c.isprintable() and c not in _UNSEEN
        else c.encode("unicode_escape").decode()
        for c in text
    ]  # fmt: skip
    size = sum(map(len, pieces))
    if size > limit:
        while size >= limit:  # no escape is cut in two
            size -= len(pieces.pop())
        pieces.append("…")
    return "".join(pieces)


_PLAIN_WORD = re.compile(r"[!#-<>-\[\]-~]+")  # printable ASCII but blank, quote, = and backslash


def quoted(text: str, limit: int = 1000) -> str:
    """A log line's value: bare where it is one plain word, else in quotes that can be undone."""
    if len(text) <= limit and _PLAIN_WORD.fullmatch(text):
        return text
    return '"' + printable(text, limit, '"\\') + '"'


# ---------------------------------------------------------------------------------------- Wire


def byte(value: int) -> bytes:
    return value.to_bytes(1, "big")


def uint32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def string(value: bytes) -> bytes:
    return uint32(len(value)) + value


class Reader(contextlib.AbstractContextManager["Reader"]):
    """Reads RFC 4251 section 5's data types off DATA; leaving it proves that nothing is left over.

    Every error is a WireError that begins with WHAT.
    """

    def __init__(self, data: bytes, what: str) -> None:
        self.data = data
        self.what = what
        self.at = 0

    def __exit__(self, kind: object, *error: object) -> None:
        left = len(self.data) - self.at
        if kind is None and left:
            raise WireError(f"{self.what}: {left} bytes left over")

    def take(self, size: int) -> bytes:
        taken = self.data[self.at : self.at + size]
        if len(taken) < size:
            raise WireError(f"{self.what}: {size} bytes expected, {len(taken)} there")
        self.at += size
        return taken

    def byte(self) -> int:
        return self.take(1)[0]

    def uint32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def uint64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def string(self) -> bytes:
        return self.take(self.uint32())

    def mpint(self) -> int:
        """A positive mpint in its one right encoding, which is all that keys and signatures use."""
        value = self.string()
        if not value or value[0] >= 0x80:
            raise WireError(f"{self.what}: an mpint that is not positive")
        if value[0] == 0 and (len(value) == 1 or value[1] < 0x80):
            raise WireError(f"{self.what}: an mpint with a needless leading zero")
        return int.from_bytes(value, "big")


# ------------------------------------------------------------------------------ Agent protocol

SSH_AGENT_FAILURE = 5
SSH_AGENTC_REQUEST_IDENTITIES = 11
SSH_AGENT_IDENTITIES_ANSWER = 12
SSH_AGENTC_SIGN_REQUEST = 13
SSH_AGENT_SIGN_RESPONSE = 14

SSH_AGENT_RSA_SHA2_512 = 4

# What OpenSSH's own client takes at most.
MAX_AGENT_MESSAGE = 256 * 1024


class Identity(NamedTuple):
    """A key as the agent lists it; both fields are whatever the agent says."""

    key_blob: bytes
    comment: bytes


def request_identities() -> bytes:
    """SSH_AGENTC_REQUEST_IDENTITIES (RFC 9987)."""
    return byte(SSH_AGENTC_REQUEST_IDENTITIES)


def sign_request(key_blob: bytes, data: bytes, flags: int) -> bytes:
    """SSH_AGENTC_SIGN_REQUEST (RFC 9987)."""
    return (
        byte(SSH_AGENTC_SIGN_REQUEST)
        + string(key_blob)
        + string(data)
        + uint32(flags)
    )  # fmt: skip


def parse_identities_answer(reply: bytes) -> Optional[list[Identity]]:
    """SSH_AGENT_IDENTITIES_ANSWER (RFC 9987); None where the agent says SSH_AGENT_FAILURE."""
    if reply == byte(SSH_AGENT_FAILURE):
        return None
    with Reader(reply, "identities answer") as r:
        kind = r.byte()
        if kind != SSH_AGENT_IDENTITIES_ANSWER:
            raise WireError(f"identities answer: message type {kind}")
        nkeys = r.uint32()
        return [Identity(r.string(), r.string()) for _ in range(nkeys)]


def parse_sign_response(reply: bytes) -> Optional[bytes]:
    """SSH_AGENT_SIGN_RESPONSE (RFC 9987), its signature; None for SSH_AGENT_FAILURE."""
    if reply == byte(SSH_AGENT_FAILURE):
        return None
    with Reader(reply, "sign response") as r:
        kind = r.byte()
        if kind != SSH_AGENT_SIGN_RESPONSE:
            raise WireError(f"sign response: message type {kind}")
        return r.string()


# -------------------------------------------------------------------------------------- SSHSIG

_KEY_TYPES = (
    "ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com",
)  # fmt: skip
# A key's type and the signature algorithm that belongs to it.
ALGORITHMS = {t: "rsa-sha2-512" if t == "ssh-rsa" else t for t in _KEY_TYPES}
# PROTOCOL.certkeys: a certificate's type and that of the key in it.
CERTIFICATES = {t.partition("@")[0] + "-cert-v01@openssh.com": t for t in _KEY_TYPES}

# RFC 5656: the bits of a coordinate, and at most of r and s.
CURVES = {"nistp256": 256, "nistp384": 384, "nistp521": 521}

HASHES = ("sha512", "sha256")  # the first is what ssh-keygen takes unasked

# What OpenSSH makes and verifies; smaller keys it refuses.
MIN_RSA_BITS, MAX_RSA_BITS = 1024, 16384


class PublicKey(NamedTuple):
    """A public key or certificate whose every field has been looked at."""

    type: str
    blob: bytes  # as it stands in an authorized_keys line and in SSHSIG
    plain_type: str  # a certificate's key's; else the same as above
    plain_blob: bytes
    bits: int  # as ssh-keygen -l shows them

    @property
    def fingerprint(self) -> str:
        """As ssh-keygen shows it; a certificate has its key's."""
        digest = hashlib.sha256(self.plain_blob).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    @property
    def name(self) -> str:
        return self.fingerprint + (" (certificate)" if self.type != self.plain_type else "")

    @property
    def flags(self) -> int:
        """For a sign request: without the flag, RSA would be signed with SHA-1."""
        return SSH_AGENT_RSA_SHA2_512 if self.plain_type == "ssh-rsa" else 0

    @property
    def line(self) -> str:
        """As in authorized_keys, without a comment."""
        return f"{self.type} {base64.b64encode(self.blob).decode()}"


def _key_fields(r: Reader, plain_type: str) -> int:
    """Reads what stands between a key's type and its end; returns PublicKey.bits."""
    if "ed25519" in plain_type:
        size, bits = len(r.string()), 256
        if size != 32:
            raise WireError(f"{r.what}: an Ed25519 key of {size} bytes")
    elif plain_type == "ssh-rsa":
        e, bits = r.mpint(), r.mpint().bit_length()
        if not MIN_RSA_BITS <= bits <= MAX_RSA_BITS or e < 3:
            raise WireError(f"{r.what}: an RSA key of {bits} bits")
    else:
        curve = r.string().decode("ascii", "backslashreplace")
        if curve not in CURVES or f"ecdsa-sha2-{curve}" not in plain_type:
            raise WireError(f"{r.what}: curve {printable(curve, 20)!r} in a {plain_type} key")
        bits = CURVES[curve]
        point = r.string()
        if len(point) != 1 + 2 * ((bits + 7) // 8) or point[0] != 4:
            raise WireError(f"{r.what}: not an uncompressed point of {curve}")
    if plain_type.startswith("sk-"):
        r.string()  # application
    return bits


def parse_public_key(blob: bytes) -> PublicKey:
    """A key blob or certificate (RFC 4253 section 6.6, RFC 5656, 8709, PROTOCOL.certkeys, .u2f)."""
    with Reader(blob, "public key") as r:
        key_type = r.string().decode("ascii", "backslashreplace")
        plain_type = CERTIFICATES.get(key_type, key_type)
        if plain_type not in ALGORITHMS:
            raise WireError(f"public key: SSHSIG can't use type {printable(key_type, 60)!r}")
        certificate = key_type != plain_type
        if certificate:
            r.string()  # nonce
        start = r.at
        bits = _key_fields(r, plain_type)
        plain_blob = string(plain_type.encode()) + blob[start : r.at]
        if certificate:
            r.uint64()  # serial
            r.uint32()  # type: user or host
            r.string()  # key id
            r.string()  # valid principals
            r.uint64()  # valid after
            r.uint64()  # valid before
            r.string()  # critical options
            r.string()  # extensions
            r.string()  # reserved
            r.string()  # signature key
            r.string()  # signature
    return PublicKey(key_type, blob, plain_type, plain_blob, bits)


class Listed(NamedTuple):
    """A key with its comment, from an agent's list or an authorized_keys line."""

    key: PublicKey
    comment: str


def parse_key_line(line: str) -> Listed:
    """An authorized_keys line without options: the key and the comment.

    What is not one may be a private key: the errors never quote it.
    """
    words = line.split(None, 2)
    if "PRIVATE KEY" in line:
        raise WireError("a private key, where the public one (the .pub file) belongs")
    if words and words[0].startswith(("SHA256:", "MD5:")):
        raise WireError("a fingerprint, where the whole line of the public key belongs")
    if len(words) < 2 or not (words[0] in ALGORITHMS or words[0] in CERTIFICATES):
        raise WireError("not a public key: neither of the form 'ssh-ed25519 AAAA…', nor "
                        "of another type that can be used for SSHSIG")  # fmt: skip
    try:
        blob = base64.b64decode(words[1].encode("ascii"), validate=True)
    except ValueError as e:
        raise WireError(f"the base64 after {words[0]!r} is damaged") from e
    key = parse_public_key(blob)
    if key.type != words[0]:
        raise WireError(f"a line of type {words[0]!r} with a key of type {key.type!r} in it")
    return Listed(key, words[2].strip() if len(words) == 3 else "")


def signed_data(namespace: str, hash_algorithm: str, digest: bytes) -> bytes:
    """What is signed in place of the payload (PROTOCOL.sshsig, "Signed Data")."""
    return (
        b"SSHSIG"
        + string(namespace.encode())
        + string(b"")  # reserved
        + string(hash_algorithm.encode())
        + string(digest)
    )


def sshsig(public_key: bytes, namespace: str, hash_algorithm: str, signature: bytes) -> bytes:
    """The blob in the armor (PROTOCOL.sshsig, "Blob format")."""
    return (
        b"SSHSIG"
        + uint32(1)  # version
        + string(public_key)
        + string(namespace.encode())
        + string(b"")  # reserved
        + string(hash_algorithm.encode())
        + string(signature)
    )


def armor(blob: bytes) -> bytes:
    """PROTOCOL.sshsig, "Armored format"; lines of 70 characters, as ssh-keygen writes them."""
    text = base64.b64encode(blob)
    lines = [text[at : at + 70] + b"\n" for at in range(0, len(text), 70)]
    return b"-----BEGIN SSH SIGNATURE-----\n%b-----END SSH SIGNATURE-----\n" % b"".join(lines)


def check_signature(key: PublicKey, signature: bytes) -> None:
    """Is this agent's answer a signature of the kind that belongs to KEY? WireError if not.

    The forms: RFC 8709 section 6, RFC 8332 section 3, RFC 5656 section 3.1.2, PROTOCOL.u2f
    "SSH U2F Signatures". Whether it is the right one, whoever verifies it finds out.
    """
    what = "the agent's signature"
    with Reader(signature, what) as r:
        algorithm = r.string().decode("ascii", "backslashreplace")
        expected = ALGORITHMS[key.plain_type]
        if algorithm != expected:
            raise WireError(f"{what} is of algorithm {printable(algorithm, 60)!r}, "
                            f"but a {key.type} key's is {expected!r}")  # fmt: skip
        blob = r.string()
        if key.plain_type.startswith("sk-"):
            r.byte()  # flags
            r.uint32()  # counter
    if "ed25519" in algorithm:
        if len(blob) != 64:
            raise WireError(f"{what}: an Ed25519 signature of {len(blob)} bytes")
    elif algorithm == "rsa-sha2-512":
        # Some agents leave leading zeros out, and OpenSSH takes that.
        if not 0 < len(blob) <= (key.bits + 7) // 8:
            raise WireError(f"{what}: {len(blob)} bytes from an RSA key of {key.bits} bits")
    else:
        with Reader(blob, what) as r:
            for name in ("r", "s"):
                if r.mpint().bit_length() > key.bits:
                    raise WireError(f"{what}: {name} is too large for the curve")


# ------------------------------------------------------------------------------------- Payload

KEPT = 256 * 1024  # bytes of a payload that are remembered; what is signed is its whole digest

_OID = "[0-9a-f]{%d}"  # of 40 digits (SHA-1) or 64 (SHA-256), the same throughout a payload
_WHO = r"[^\n<>]* <[^\n<>]*>"
_WHEN = r"(?:0|[1-9][0-9]{0,19}) [+-][0-9]{4}"
_REF = r"(?![./]|[^\n]*(?:\.\.|@\{|/[./]|[./]\n|\.lock[/\n]))[^\x00- \x7f~^:?*\[\\]+"
# What git signs, exactly as it writes it (its commit.c, builtin/tag.c and send-pack.c).
_FORMATS = {
    "commit": rf"tree (?P<tree>{_OID})\n"
    rf"(?P<parents>(?:parent {_OID}\n)*)"
    rf"author (?P<author>{_WHO}) {_WHEN}\n"
    rf"committer (?P<committer>{_WHO}) {_WHEN}\n"
    r"(?:encoding (?P<encoding>[!-~]+)\n)?"
    r"(?:(?!(?:tree|parent|author|committer|encoding) )[^\n ]+ [^\n]*\n(?: [^\n]*\n)*)*"
    r"\n(?:\s*\n)?(?P<subject>[^\n]*)",
    "tag": rf"object (?P<object>{_OID})\n"
    r"type (?P<type>commit|tree|blob|tag)\n"
    rf"tag (?!-)(?P<tag>{_REF})\n"
    rf"tagger (?P<tagger>{_WHO}) {_WHEN}\n"
    r"\n(?:\s*\n)?(?P<subject>[^\n]*)",
    "push": r"certificate version 0\.1\n"
    rf"pusher (?P<pusher>SHA256:[A-Za-z0-9+/]{{43}})  ?{_WHEN}\n"  # newer gits leave one blank out
    r"(?:pushee (?P<pushee>[^\n]+)\n)?"
    r"(?:nonce [-A-Za-z0-9./+=_]{1,256}\n)?"
    r"(?:push-option [^\n]*\n)*"
    r"\n"
    rf"(?P<refs>{_OID} {_OID} (?P<subject>refs/{_REF})\n(?:{_OID} {_OID} refs/{_REF}\n)*)\Z",
}
KINDS = (*_FORMATS, "other")
_PATTERNS = [
    (kind, re.compile(pattern.replace("%d", digits).encode()))
    for kind, pattern in _FORMATS.items()
    for digits in ("40", "64")
]


class Payload(NamedTuple):
    """What is to be signed: its kind, and what it says by git's own names, as the client wrote it:
    of parents and refs their number; subject is the message's first line, or the first ref."""

    kind: str  # of KINDS
    size: int
    fields: dict[str, str]
    data: bytes  # the first KEPT bytes

    def object_id(self, block: bytes) -> str:
        """The id of the commit or tag that BLOCK, the armored signature, completes; "" if neither,
        or larger than KEPT."""
        named = self.fields.get("tree") or self.fields.get("object")
        if not named or self.size > len(self.data):
            return ""
        sha256 = len(named) == 64
        if self.kind == "commit":
            head, blank, message = self.data.partition(b"\n\n")
            name = b"\ngpgsig-sha256 " if sha256 else b"\ngpgsig "
            signed = head + name + block.rstrip().replace(b"\n", b"\n ") + blank + message
        else:
            signed = self.data + block
        whole = b"%s %d\0" % (self.kind.encode(), len(signed)) + signed
        return hashlib.new("sha256" if sha256 else "sha1", whole, usedforsecurity=False).hexdigest()


def parse_payload(data: bytes, size: Optional[int] = None, nul: bool = False) -> Payload:
    """DATA: the first KEPT bytes of a payload of SIZE; NUL: is there one anywhere? (Git refuses one
    in a commit; in a tag it shows nothing of what stands behind it.)"""
    size = len(data) if size is None else size
    for kind, pattern in _PATTERNS:
        match = pattern.match(data)
        if not match or nul or b"\0" in data:
            continue
        if size > len(data) and (kind == "push" or not match["subject"].strip()):
            continue  # nobody has seen what git will show
        fields = {
            name: value[:1000].decode("utf-8", "surrogateescape")
            for name, value in match.groupdict().items()
            if value is not None
        }
        for name in {"parents", "refs"} & fields.keys():
            fields[name] = str(match[name].count(b"\n"))
        return Payload(kind, size, fields, data)
    return Payload("other", size, {}, data)


# ------------------------------------------------------------------------------------ Upstream

EXEC_GRACE = 0.5  # seconds between SIGTERM and SIGKILL for a command's process group
HINT_SECONDS = 1.0  # for a look at the other agents, all together
MAX_STDERR_LINES = 20  # of a command, per exchange, in the log


class Upstream(NamedTuple):
    """Where an agent is: a Unix socket's path, or a command that speaks the agent protocol."""

    path: str = ""
    command: tuple[str, ...] = ()
    role: str = "agent command"
    env: Optional[Mapping[str, str]] = None  # for a command; None: as ours

    def __str__(self) -> str:
        if self.command:
            return f"{self.role} {printable(self.command[0])!r}"
        return f"agent at {printable(self.path)!r}"


def well_known_sockets(platform: str, home: str, runtime: str) -> tuple[str, ...]:
    """Where agents have their sockets unless told otherwise; RUNTIME is $XDG_RUNTIME_DIR or ""."""
    if platform == "win32":
        return ()
    paths = [f"{home}/.1password/agent.sock"]
    if platform == "darwin":
        paths = [
            f"{home}/Library/Group Containers/2BUA8C4S2C.com.1password/t/agent.sock",
            *paths,
            f"{home}/Library/Containers/com.maxgoedjen.Secretive.SecretAgent/Data/socket.ssh",
            "/opt/homebrew/var/run/yubikey-agent.sock",
            "/usr/local/var/run/yubikey-agent.sock",
        ]
    if runtime:
        names = ("yubikey-agent/yubikey-agent.sock", "ssh-agent.socket", "gcr/ssh", "keyring/ssh",
                 "gnupg/S.gpg-agent.ssh")  # fmt: skip
        paths += [f"{runtime}/{name}" for name in names]
    return (*paths, f"{home}/.gnupg/S.gpg-agent.ssh")


def _kill_group(leader: int, number: int) -> None:
    """LEADER has not been waited for: its number is nobody else's yet."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _why(path: str, e: OSError) -> str:
    """Why nobody could be reached at a Unix socket, for a person."""
    if e.errno == errno.ENOENT:
        return "no such socket (is the agent running?)"
    if e.errno in (errno.ECONNREFUSED, errno.ENOTSOCK):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                return "that is no socket"
        return "nobody listens on that socket (the agent that made it has ended)"
    return e.strerror or str(e)


class Watch:
    """Waits for WHAT until DEADLINE (time.monotonic), and only while CLIENT, the connection of
    whoever waits for the answer, is open: AgentTimeout, ClientGone."""

    def __init__(self, what: str, deadline: float, client: Optional[socket.socket]) -> None:
        self.what = what
        self.deadline = deadline
        self.client = client
        self.poll = select.poll()
        if client:
            # Linux shows a close even behind bytes that nobody reads; elsewhere it has to be read.
            self.poll.register(client, getattr(select, "POLLRDHUP", select.POLLIN))

    def wait(self, seconds: float = 1e9) -> list[int]:
        """The file descriptors in POLL that are ready, [] after SECONDS."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise AgentTimeout(f"{self.what} did not answer in time")
        ready = [fd for fd, _ in self.poll.poll(1000 * min(left, seconds) + 1)]
        if self.client and self.client.fileno() in ready:
            with contextlib.suppress(ConnectionError):
                if not hasattr(select, "POLLRDHUP") and self.client.recv(1, socket.MSG_PEEK):
                    # Bytes that nobody will read hide a close: it shows when the answer is sent.
                    self.poll.unregister(self.client)
                    return ready
            raise ClientGone("the client went away before it was answered")
        return ready


class Commands(set[int]):
    """The process groups that run for us; none is started any more once they are ended."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.ended = False

    def end(self) -> None:
        """At the end of the program: no command outlives it."""
        with self.lock:  # one that is being started is among them, or never will be
            self.ended = True
        for number in (signal.SIGTERM, signal.SIGKILL):
            for group in tuple(self):
                _kill_group(group, number)
            end = time.monotonic() + EXEC_GRACE
            while self and time.monotonic() < end:
                time.sleep(0.01)


class Exchange(Watch, contextlib.AbstractContextManager["Exchange"]):
    """One connection to an agent, or one run of a command."""

    def __init__(self, upstream: Upstream, deadline: float, client: Optional[socket.socket] = None,
                 commands: Optional[Commands] = None) -> None:  # fmt: skip
        super().__init__(f"the {upstream}", deadline, client)
        self.upstream = upstream
        self.commands = Commands() if commands is None else commands
        self.process: Any = None
        self.stderr_lines = 0
        start = self._spawn if upstream.command else self._connect
        try:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                start()
                self.poll.register(self.socket, select.POLLIN)
            except BaseException:
                self.__exit__()
                raise
        except OSError as e:
            if upstream.command:
                raise AgentUnreachable(f"cannot run {self.what}: {e.strerror}") from e
            raise AgentUnreachable(f"no answer from {self.what}: {_why(upstream.path, e)}") from e

    def _connect(self) -> None:
        self.socket.setblocking(False)
        while True:
            try:
                return self.socket.connect(self.upstream.path)
            except BlockingIOError:
                self.wait(0.05)  # the agent's backlog is full: it hangs, or is about to go on

    def _spawn(self) -> None:
        import subprocess  # for commands only: it would cost every start

        self.socket.close()
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        with theirs, self.commands.lock:
            self._check_end()
            self.process = subprocess.Popen(
                self.upstream.command, stdin=theirs.fileno(), stdout=theirs.fileno(),
                stderr=subprocess.PIPE, start_new_session=True, env=self.upstream.env,
            )  # fmt: skip
            self.commands.add(self.process.pid)
        self.poll.register(self.process.stderr, select.POLLIN)

    def wait(self, seconds: float = 1e9) -> list[int]:
        ready = super().wait(seconds)
        if self.process and self.process.stderr.fileno() in ready and not self._log_stderr():
            self.poll.unregister(self.process.stderr)
        return ready

    def _log_stderr(self) -> bool:
        """What the command complains of, into the log; False once it can't any more."""
        data = os.read(self.process.stderr.fileno(), 4096)
        for line in data.splitlines():
            self.stderr_lines += 1
            if self.stderr_lines <= MAX_STDERR_LINES and line.strip():
                LOG.warning("%s: %s", self.upstream, printable(line))
        return bool(data)

    def _receive(self) -> bytes:
        """The next bytes; none once it has hung up, be it on what we wrote."""
        while self.socket.fileno() not in self.wait():
            pass
        try:
            return self.socket.recv(65536)
        except OSError:
            return b""

    def ask(self, request: bytes) -> bytes:
        """Sends REQUEST and returns the reply, both without the length that leads them."""
        data = string(request)
        with contextlib.suppress(OSError):  # it hung up, or takes nothing: reading tells which
            if data := data[self.socket.send(data) :]:  # more than it takes at once: no key does
                self.socket.settimeout(max(0, self.deadline - time.monotonic()))
                self.socket.sendall(data)
        reply = b""
        size = 0
        while len(reply) < 4 + size:
            piece = self._receive()
            if not piece and not reply:
                raise AgentUnreachable(f"{self.what} hung up without an answer")
            if not piece:
                raise WireError(f"{self.what} hung up in the middle of its answer")
            reply += piece
            if len(reply) >= 4:
                size = int.from_bytes(reply[:4], "big")
                if not 0 < size <= MAX_AGENT_MESSAGE:
                    raise WireError(f"{self.what} announced a message of {size} bytes")
        if left := len(reply) - 4 - size:
            raise WireError(f"{self.what} sent {left} bytes more than it announced")
        return reply[4:]

    def result(self, limit: int) -> tuple[int, bytes]:
        """A command's exit status, and the first LIMIT bytes that it wrote."""
        output = b""
        while piece := self._receive():
            output = (output + piece)[:limit]
        self.poll.unregister(self.socket)  # else no wait would be one
        while self.process.poll() is None:
            self.wait(0.01)
        self._check_end()  # at our signal it may have left with any status
        return self.process.returncode, output

    def _check_end(self) -> None:
        if self.commands.ended:
            raise AgentUnreachable("the proxy is about to end")

    def __exit__(self, *error: object) -> None:
        """Ends a command with its whole group: its stderr ends when everybody in it has gone."""
        self.socket.close()
        if self.process and self.process.returncode is None:
            _kill_group(self.process.pid, signal.SIGTERM)
            last_words = Watch("", time.monotonic() + EXEC_GRACE, None)
            last_words.poll.register(self.process.stderr, select.POLLIN)
            with contextlib.suppress(AgentTimeout):
                while last_words.wait() and self._log_stderr():
                    pass
            _kill_group(self.process.pid, signal.SIGKILL)
        if self.process:
            self.commands.discard(self.process.pid)
            self.process.wait()
            self.process.stderr.close()


class Wanted(NamedTuple):
    """What is to sign: that key, or the listed one with that fingerprint, or the first listed."""

    key: Optional[PublicKey] = None
    fingerprint: str = ""
    pinned: str = ""  # by which setting, and not named by the request
    comment: str = ""

    def fits(self, key: PublicKey) -> bool:
        if self.key:
            return key.blob == self.key.blob
        return not self.fingerprint or key.fingerprint == self.fingerprint

    @property
    def name(self) -> str:
        return self.key.name if self.key else self.fingerprint


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def list_keys(exchange: Exchange) -> list[Listed]:
    """The keys that can be used, in the agent's order; NoUsableKey where there is none."""
    identities = parse_identities_answer(exchange.ask(request_identities()))
    if not identities:  # or it refuses to list them
        raise NoUsableKey("the agent lists no keys (none added, or it is locked)")
    listed = []
    for key_blob, comment in identities:
        # What the agent holds besides is its own business: keys of types that nobody here knows.
        with contextlib.suppress(WireError):
            key = parse_public_key(key_blob)
            listed.append(Listed(key, comment.decode("utf-8", "backslashreplace")))
    if not listed:
        raise NoUsableKey(f"{exchange.what} lists keys, but none of a type that SSHSIG can use")
    return listed


def choose(listed: Sequence[Listed], wanted: Wanted) -> Listed:
    """The key among those LISTED that is WANTED; KeyNotHeld, or NoUsableKey where it is pinned."""
    for candidate in listed:
        if wanted.fits(candidate.key):
            return Listed(candidate.key, wanted.comment or candidate.comment)
    others = f"the agent does not hold it, but {count(len(listed), 'other')}"
    if wanted.pinned:
        raise NoUsableKey(f"the pinned key {wanted.name} is missing: {others}")
    raise KeyNotHeld(f"no key {wanted.name}: {others}; add it there, or sign with another")


def request_signature(exchange: Exchange, wanted: Wanted, data: bytes) -> tuple[PublicKey, bytes]:
    """The key that signed DATA, and its signature, checked; a known key costs no listing."""
    key = wanted.key or choose(list_keys(exchange), wanted).key
    signature = parse_sign_response(exchange.ask(sign_request(key.blob, data, key.flags)))
    if signature is None:
        if wanted.key:
            choose(list_keys(exchange), wanted)  # "not held" is another thing than "refused"
        raise AgentRefused(f"the agent refused to sign with {key.name} (declined, timed out, locked?)")
    check_signature(key, signature)
    return key, signature


class Agents:
    """The agent that was set, or the first well-known one that answers. Nothing that it says is
    kept; TIMEOUT, in seconds, bounds the whole exchange of a request."""

    def __init__(self, upstream: Optional[Upstream], places: Sequence[str], timeout: float) -> None:
        self.upstream = upstream
        self.places = places  # the well-known sockets
        self.timeout = timeout
        self.last: Optional[Upstream] = None  # the agent in use, as the log last named it
        self.commands = Commands()

    @contextlib.contextmanager
    def exchange(self, client: Optional[socket.socket] = None) -> Iterator[Exchange]:
        """A fresh connection for one request; where it is of no help, the error names another."""
        try:
            with self._connect(client) as exchange:
                if exchange.upstream != self.last:
                    self.last = exchange.upstream
                    LOG.info("using the %s", exchange.upstream)
                yield exchange
        except (AgentUnreachable, NoUsableKey) as e:
            raise type(e)(f"{e}{self.hint()}") from e

    def _connect(self, client: Optional[socket.socket]) -> Exchange:
        deadline = time.monotonic() + self.timeout
        if not hasattr(socket, "AF_UNIX") or not hasattr(select, "poll"):
            raise AgentUnreachable("this Python has no Unix sockets to reach an agent by")
        if self.upstream:
            return Exchange(self.upstream, deadline, client, self.commands)
        for path in self.places:
            with contextlib.suppress(AgentUnreachable):
                return Exchange(Upstream(path), deadline, client)
        tried = ", ".join(["SSH_AUTH_SOCK (unset)", *map(printable, self.places)])
        raise AgentUnreachable(f"no agent found: set SSH_AGENT_PROXY_UPSTREAM (tried: {tried})")

    def hint(self) -> str:
        """Names another well-known agent that has keys, where the one in use is of no help."""
        used = os.path.realpath((self.upstream or self.last or Upstream()).path)
        deadline = time.monotonic() + HINT_SECONDS
        for path in (path for path in self.places if os.path.realpath(path) != used):
            with contextlib.suppress(ProxyError), Exchange(Upstream(path), deadline) as exchange:
                keys = count(len(list_keys(exchange)), "key")
                return f"; another has {keys}: set SSH_AGENT_PROXY_UPSTREAM={printable(path)}"
        return ""


# -------------------------------------------------------------------------------------- Policy

# Names that nobody but this machine's owner gives: a browser led here by DNS carries others.
OWN_SUFFIXES = (".localhost", ".internal")

_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:]*)(:[0-9]{0,5})?")


def parse_authority(value: str) -> str:
    """The host in a Host header or an absolute target, in lower case; RequestError 400, or 421."""
    match = _AUTHORITY.fullmatch(value)
    if not match:
        raise RequestError(400, f"Host {printable(value)!r} is malformed")
    host = match.group(1).lower()
    if host.startswith("["):
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError as e:
            raise RequestError(400, f"Host {printable(value)!r} is malformed") from e
    if host and not _HOST_NAME.fullmatch(host):
        raise RequestError(400, f"Host {printable(value)!r} is malformed")
    return host[:-1] if host.endswith(".") else host


def check_host(host: str, allowed: Sequence[str]) -> None:
    """Is HOST a name of ours? Otherwise a page may have made its own name resolve to this machine
    (DNS rebinding), and reads our answers as if they were its own: 421.

    Names that anyone on the network can claim (single labels, .local) are not ours, our own aside.
    """
    if host in ("127.0.0.1", "localhost") or host.endswith(OWN_SUFFIXES):
        return
    with contextlib.suppress(ValueError):  # a name
        ipaddress.ip_address(host)
        return
    own = socket.gethostname().lower().rstrip(".")
    bare = own.partition(".")[0]
    if bare and host in (own, bare, bare + ".local"):
        return
    if any(host == a or (a[0] == "." and host.endswith(a)) for a in allowed):
        return
    raise RequestError(421, f"Host {printable(host)!r} is not a name of this proxy: use localhost, "
                            "or list it in SSH_AGENT_PROXY_ALLOWED_HOSTS")  # fmt: skip


def check_browser(fields: Mapping[str, str]) -> None:
    """Pages in a browser get nothing: Origin and Sec-Fetch-Site are theirs, and no page can drop
    or change them. `none` is what a person typed into the address bar."""
    if "origin" in fields or fields.get("sec-fetch-site", "none") != "none":
        raise RequestError(403, "requests of web pages are refused")


_NAMESPACE = re.compile(r"[!-+\--~]{1,255}")  # printable ASCII but the blank and the comma


def choose_namespace(named: Optional[str], allowed: Sequence[str]) -> str:
    """The namespace that the request names, else the first allowed one; 400, or 403."""
    if named is None:
        return allowed[0]
    if not _NAMESPACE.fullmatch(named):
        raise RequestError(400, f"SSHSIG-Namespace {printable(named)!r} is malformed")
    if named not in allowed:
        raise RequestError(403, f"namespace {printable(named)!r} is not allowed here: "
                                f"SSH_AGENT_PROXY_NAMESPACE is {','.join(allowed)}")  # fmt: skip
    return named


_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


def choose_key(named: Optional[str], pin: Wanted) -> Wanted:
    """The pinned key, else the one that the request names, else any; 400, or 403."""
    if named is None:
        return pin
    if _FINGERPRINT.fullmatch(named):
        wanted = Wanted(fingerprint=named)
    else:
        try:
            wanted = Wanted(parse_key_line(named).key)
        except WireError as e:
            raise RequestError(400, f"SSHSIG-Key: {e}") from e
    if not pin.pinned:
        return wanted
    fingerprint = wanted.key.fingerprint if wanted.key else wanted.fingerprint
    if not (wanted.fits(pin.key) if pin.key else fingerprint == pin.fingerprint):
        raise RequestError(403, f"this proxy signs with {pin.name} only, not with {wanted.name}: "
                                f"use that key, or change {pin.pinned}")  # fmt: skip
    return pin if pin.key or not wanted.key else wanted._replace(pinned=pin.pinned)


def parse_kinds(text: str) -> tuple[str, ...]:
    """Kinds of payload, as a setting or a leash names them; ConfigError."""
    if text == "any":
        return KINDS
    kinds = tuple(map(str.strip, text.split(",")))
    if not set(kinds) <= set(KINDS[:-1]):
        raise ConfigError(f"payloads are any, or of {', '.join(KINDS[:-1])}, separated by commas")
    return kinds


class Token(NamedTuple):
    """A line of the token file: who may come, and how long the leash is."""

    digest: bytes  # the token itself is not kept
    name: str
    key: str = ""  # the fingerprint of the only one
    payloads: tuple[str, ...] = ()  # empty: as set for all


# RFC 6750 section 2.1 (b64token).
_B64TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_TOKEN_NAME = re.compile(r"[A-Za-z0-9._-]+")


def parse_token(line: str, number: int) -> Token:
    """TOKEN [NAME] [key=SHA256:…] [payloads=KINDS]; ConfigError, which quotes nothing: any of the
    words may be the token."""
    token, *words = re.split(r"[ \t]+", line.strip(" \t\r"))
    name = words.pop(0) if words and "=" not in words[0] else ""
    options = dict(word.partition("=")[::2] for word in words if "=" in word)
    if not _B64TOKEN.fullmatch(token):
        raise ConfigError("its first word is no bearer token")
    if len(options) < len(words):
        raise ConfigError("an option stands twice, or a word without = behind the name")
    if name and not _TOKEN_NAME.fullmatch(name):
        raise ConfigError("the name is not of letters, digits, '.', '_' and '-'")
    if not options.keys() <= {"key", "payloads"}:
        raise ConfigError("another option than key= and payloads=")
    if "key" in options and not _FINGERPRINT.fullmatch(options["key"]):
        raise ConfigError("key= is no SHA256: fingerprint")
    payloads = parse_kinds(options["payloads"]) if "payloads" in options else ()
    digest = hashlib.sha256(token.encode()).digest()
    return Token(digest, name or f"line {number}", options.get("key", ""), payloads)


def parse_tokens(text: str) -> list[Token]:
    """The token file; a ConfigError names the line."""
    tokens: dict[bytes, Token] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip(" \t\r") and not line.startswith("#"):
            try:
                token = parse_token(line, number)
                if token.digest in tokens:
                    raise ConfigError("the same token as before")
            except ConfigError as e:
                raise ConfigError(f"line {number}: {e}") from e
            tokens[token.digest] = token
    if not tokens:
        raise ConfigError(f"no token in it: `{PROGRAM} token NAME` adds one")
    return list(tokens.values())


def check_token(authorization: Optional[str], tokens: Sequence[Token]) -> Token:
    """The token that an Authorization field holds (RFC 6750), in constant time; 401."""
    scheme, _, given = (authorization or "").partition(" ")
    given = given.strip(" ") if scheme.lower() == "bearer" else ""
    digest = hashlib.sha256(given.encode()).digest()
    found = [token for token in tokens if hmac.compare_digest(token.digest, digest)]
    if not found:
        what = "this token is not one of the proxy's (any more)" if given else "a token is needed"
        raise RequestError(401, f"{what}: `{PROGRAM} token NAME` makes one on the host",
                           ("WWW-Authenticate", "Bearer"))  # fmt: skip
    return found[0]


def check_payload(payload: Payload, allowed: Sequence[str]) -> None:
    if payload.kind not in allowed:
        raise RequestError(403, f"a payload of kind {payload.kind} is not allowed here: this "
                                "token's payloads=, or SSH_AGENT_PROXY_PAYLOADS, is "
                                f"{','.join(allowed)}")  # fmt: skip


def consent_prompt(payload: Payload, facts: dict[str, str]) -> str:
    """What the person is asked, one fact a line, what we know ourselves first. Only these lines
    begin with •: a screen may wrap a text such that it looks like another line."""
    what = f"this {payload.kind}"
    if payload.kind == "other":
        what = f"something that is no git commit, tag or push ({count(payload.size, 'byte')})"
    told = {n: " ".join(v.replace("•", "-").split()) for n, v in (facts | payload.fields).items()}
    lines = [f"• {name}: {printable(text, 80)}" for name, text in told.items() if text]
    return "\n".join([f"Sign {what}?", "", *lines])


class Consent:
    """Asks a person before each signature, one at a time, through an askpass program.

    A yes holds HOLD seconds for the same client, kind, namespace and key.
    """

    def __init__(self, askpass: Upstream, timeout: float, hold: float, commands: Commands) -> None:
        self.askpass = askpass
        self.timeout = timeout
        self.hold = hold
        self.commands = commands
        self.lock = threading.Lock()
        self.agreed: dict[tuple[str, ...], float] = {}  # and until when

    def obtain(self, prompt: str, what: tuple[str, ...], client: socket.socket) -> None:
        """Returns if the person agrees, as OpenSSH's own askpass is understood; else 403."""
        deadline = time.monotonic() + self.timeout
        queue = Watch("the person, with another prompt,", deadline, client)
        pause = 0
        try:
            while not self.lock.acquire(timeout=0.1):
                queue.wait(0)
            try:
                queue.wait(0)  # nobody is asked for a client that has left
                if time.monotonic() < self.agreed.get(what, 0):
                    return
                words = (*self.askpass.command, os.fsdecode(prompt.encode()))
                program = self.askpass._replace(command=words)
                pause = 1
                with Exchange(program, deadline, client, self.commands) as exchange:
                    status, answer = exchange.result(1024)
                if status or re.split(b"[\r\n]", answer)[0].lower() not in (b"", b"yes"):
                    why = f"exit status {status}" if status else repr(printable(answer, 40))
                    raise AgentRefused(f"the prompt was declined, or could not be shown ({why})")
                self.agreed[what] = time.monotonic() + self.hold
            except ClientGone:
                time.sleep(pause)  # or a click on its way to this prompt would hit the next
                raise
            finally:
                self.lock.release()
        except AgentError as e:
            raise RequestError(403, f"not confirmed: {e}") from e


# ----------------------------------------------------------------------------------- Hardening


class Step(NamedTuple):
    """A measure, and whether the system says that it took effect."""

    name: str
    in_force: bool
    state: str
    expected: bool = False  # not to be had on this system at all: no warning at each start


def _no_core() -> Step:
    import resource

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    return Step("no core dumps", limits == (0, 0), f"RLIMIT_CORE {limits[0]}")


def _lock_memory(libc: Any, flags: int) -> Step:
    """Only without a limit: with a finite one mlockall succeeds, and later threads can't start."""
    import ctypes
    import resource

    name, unlimited = "memory kept out of swap", resource.RLIM_INFINITY
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (unlimited, unlimited))
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != unlimited:
        return Step(name, False, f"RLIMIT_MEMLOCK is {limit >> 10} KiB, not unlimited")
    if libc.mlockall(flags):
        error = ctypes.get_errno()
        return Step(name, False, f"mlockall: {os.strerror(error)}", expected=error == errno.ENOSYS)
    if not os.path.exists("/proc/self/status"):
        return Step(name, True, "mlockall")
    with open("/proc/self/status", encoding="ascii", errors="replace") as f:
        locked = next((line.split()[1] for line in f if line.startswith("VmLck:")), "0")
    return Step(name, locked != "0", f"VmLck {locked} kB")


def _harden_linux() -> list[Step]:
    import ctypes

    PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
    PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
    MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *4 * [ctypes.c_ulong]]
    libc.prctl.restype = ctypes.c_int
    libc.mlockall.argtypes = [ctypes.c_int]
    libc.mlockall.restype = ctypes.c_int

    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    dumpable = libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    no_new_privs = libc.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
    return [
        _no_core(),
        Step("no debugger, no reading of memory", dumpable == 0, f"PR_GET_DUMPABLE {dumpable}"),
        Step("no new privileges", no_new_privs == 1, f"PR_GET_NO_NEW_PRIVS {no_new_privs}"),
        _lock_memory(libc, MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT),
    ]


def _harden_macos() -> list[Step]:
    import ctypes

    PT_DENY_ATTACH = 31
    MCL_CURRENT, MCL_FUTURE = 1, 2
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    libc.ptrace.restype = ctypes.c_int
    libc.mlockall.argtypes = [ctypes.c_int]
    libc.mlockall.restype = ctypes.c_int

    # The system has no call that reads this one back: its answer is all there is.
    denied = libc.ptrace(PT_DENY_ATTACH, 0, None, 0)
    attach = "PT_DENY_ATTACH" if denied == 0 else f"ptrace: {os.strerror(ctypes.get_errno())}"
    return [
        _no_core(),
        Step("no debugger, no reading of memory", denied == 0, attach),
        _lock_memory(libc, MCL_CURRENT | MCL_FUTURE),
    ]


def harden(platform: str) -> list[Step]:
    """Takes from this process what it doesn't need. To be called before any secret is read."""
    systems = {"linux": _harden_linux, "darwin": _harden_macos}
    return systems[platform]() if platform in systems else []


# -------------------------------------------------------------------------------------- Config

MAX_FILE = 64 * 1024

Env = Mapping[str, str]
_T = TypeVar("_T")


def each(parse: Callable[[str, Env], _T]) -> Callable[[str, Env], tuple[_T, ...]]:
    """Reads a setting that holds several of what PARSE reads, separated by commas."""
    return lambda value, env: tuple(parse(part.strip(), env) for part in value.split(","))


def parse_namespace(value: str, env: Env) -> str:
    if not _NAMESPACE.fullmatch(value):
        raise ConfigError(f"{printable(value)!r} is not 1 to 255 printable ASCII characters")
    return value


def parse_host(value: str, env: Env) -> str:
    if not _HOST_NAME.fullmatch(value.removeprefix(".")):
        raise ConfigError(f"{printable(value)!r} is not a host name or .suffix")
    return value.lower().removesuffix(".")


def parse_seconds(value: str, env: Env) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", value) or not float(value):
        raise ConfigError(f"{printable(value)!r} is not a number of seconds above 0")
    return float(value)


def expand(path: str, env: Env) -> str:
    """PATH with a leading ~ or %h/ and with $VAR expanded: a systemd env file expands nothing."""
    home = env.get("HOME") or env.get("USERPROFILE") or os.path.expanduser("~")
    path = re.sub(r"^(~|%h)/", "$HOME/", path)
    try:
        return Template(os.path.expanduser(path)).substitute({**env, "HOME": home})
    except (KeyError, ValueError) as e:
        raise ConfigError(f"{printable(path)!r}: a variable is not set (a mere $ is $$)") from e


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixAddress(NamedTuple):
    path: str
    mode: int

    def __str__(self) -> str:
        return f"unix:{printable(self.path)}"


def parse_address(value: str, env: Env) -> Union[Address, UnixAddress]:
    unix = re.fullmatch(r"unix:([^?]*)(?:\?mode=(0?[0-7]{3}))?", value)
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\[\]:/\s]+)):([0-9]{1,5})", value)
    path = expand(unix[1], env) if unix else ""
    if unix and path.startswith("/") and hasattr(socket, "AF_UNIX"):
        return UnixAddress(path, int(unix[2] or "600", 8))
    if match and int(match[3]) <= 65535:
        return Address(match[1] or match[2], int(match[3]))
    raise ConfigError(f"{printable(value)!r} is none of HOST:PORT, [V6]:PORT, unix:/path?mode=0660")


def parse_upstream(value: str, env: Env) -> Upstream:
    if value.startswith("exec:"):
        command = shlex.split(value[len("exec:") :])
        if not command or not command[0]:
            raise ConfigError("exec: without a command")
        return Upstream(command=(expand(command[0], env), *command[1:]))
    path = expand(value.removeprefix("unix:"), env)
    if not path.startswith("/"):
        raise ConfigError(f"{printable(value)!r} is neither an absolute path nor exec:COMMAND")
    return Upstream(path)


def parse_pin(value: str, env: Env) -> Listed:
    """The one authorized_keys line, which may have comments and empty lines around it."""
    lines = [line for line in value.splitlines() if line.strip()[:1] not in ("", "#")]
    if "PRIVATE KEY" in value:
        raise ConfigError("a private key, where the public one (the .pub file) belongs")
    if len(lines) != 1:
        raise ConfigError(f"one line with a public key is needed, {len(lines)} are there")
    return parse_key_line(lines[0])


def parse_confirm(value: str, env: Env) -> Upstream:
    """The askpass program, with the environment that tells it to ask for a yes."""
    import shutil  # for this alone: it would cost every start

    program = shutil.which(expand(value, env), path=env.get("PATH", os.defpath))
    if not program:
        raise ConfigError(f"{printable(value)!r} is no program that can be run")
    return Upstream("", (program,), "askpass program", {**env, "SSH_ASKPASS_PROMPT": "confirm"})


class File(NamedTuple):
    """A file that SETTING names; it is read each time anew."""

    path: str
    setting: str

    def read(self, parse: Callable[[str], _T], private: bool = False) -> _T:
        """PARSE of the text of a regular file of at most MAX_FILE bytes, which belongs to this user
        alone if it is PRIVATE; a ConfigError names setting and file."""
        nonblock = getattr(os, "O_NONBLOCK", 0)  # a FIFO would be waited for
        try:
            with open(self.path, "rb", opener=lambda p, flags: os.open(p, flags | nonblock)) as f:
                found = os.fstat(f.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise ConfigError("not a regular file")
                if private and hasattr(os, "geteuid"):
                    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
                        raise ConfigError("it must be yours (chown), and only yours (chmod 600)")
                data = f.read(MAX_FILE + 1)
            if len(data) > MAX_FILE:
                raise ConfigError(f"larger than {MAX_FILE >> 10} KiB")
            if not private or data[-1:] == b"\n" or not 0 <= time.time() - found.st_mtime < 1:
                return parse(data.decode("utf-8", "replace"))
        except (OSError, ProxyError) as e:
            why = f"{e.strerror}" if isinstance(e, OSError) else f"{e}"
            if private and isinstance(e, FileNotFoundError):
                why += f" (`{PROGRAM} token NAME` makes it)"
            raise ConfigError(f"{self.setting}: can't use {printable(self.path)!r}: {why}") from e
        time.sleep(0.1)  # someone may be writing it: half a token, or half a leash
        return self.read(parse, private)


class Option(NamedTuple):
    """A setting: its variable without SSH_AGENT_PROXY_, a row of --help, and how it is read (a
    ProxyError or ValueError says why it can't be). One with a path only is a File."""

    variable: str
    default: str
    metavar: str
    help: str
    parse: Callable[[str, Env], Any]

    @property
    def flag(self) -> str:
        return "--" + self.variable.lower().replace("_", "-")


OPTIONS = (
    Option("ADDR", "127.0.0.1:7221", "HOST:PORT", "where to listen, or unix:/path; several are "
           "separated by commas; port 0 picks one", each(parse_address)),
    Option("NAMESPACE", "git", "NAMES", "SSHSIG namespaces that may be signed, separated by "
           "commas; the first is the default", each(parse_namespace)),
    Option("UPSTREAM", "", "AGENT", "the agent: its socket's /path, or exec:COMMAND; unset: "
           "$SSH_AUTH_SOCK, else the first well-known socket", parse_upstream),
    Option("PUBKEY", "", "LINE", "an authorized_keys line: sign with this key only", parse_pin),
    Option("PUBKEY_FILE", "", "FILE", "a file with that line, read at each request", expand),
    Option("TOKEN_FILE", "", "FILE", "bearer tokens, one of which every request needs", expand),
    Option("PAYLOADS", "any", "KINDS", "what may be signed: any, or of commit, tag, push",
           lambda value, env: parse_kinds(value)),
    Option("CONFIRM", "", "PROGRAM", "an askpass; it must agree to every signature", parse_confirm),
    Option("CONFIRM_FOR", "0", "SECONDS", "how long its yes holds for the same client and kind",
           lambda value, env: 0.0 if value == "0" else parse_seconds(value, env)),
    Option("ALLOWED_HOSTS", "", "NAMES", "further names that a Host header may carry, separated "
           "by commas, .suffix for all below it", each(parse_host)),
    Option("TIMEOUT", "120", "SECONDS", "for one whole exchange with the agent, a touch included",
           parse_seconds),
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """The command line of COMMANDS, each with what it does; a mistake is an exception, one line."""

    def __init__(self, commands: Mapping[str, str]) -> None:
        super().__init__(
            prog=PROGRAM,
            usage=f"{PROGRAM} [COMMAND] [OPTIONS]",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description="Signs git commits for containers with a key that stays in your ssh-agent."
            "\n\ncommands:\n" + "\n".join(f"  {name:<21} {commands[name]}" for name in commands),
            epilog="Each setting is a variable too (--addr: SSH_AGENT_PROXY_ADDR); an option wins.",
        )
        self.add_argument("command", nargs="*", help=argparse.SUPPRESS)
        self.add_argument("-V", "--version", action="version", version=f"{PROGRAM} {VERSION}")
        loudness = self.add_mutually_exclusive_group()
        loudness.add_argument("-v", "--verbose", action="store_true", help="debug lines in the log")
        loudness.add_argument("-q", "--quiet", action="store_true", help="warnings and audit lines")
        self.add_argument("--console", action="store_true", help=argparse.SUPPRESS)
        for option in OPTIONS:
            default = f" ({option.default})" if option.default else ""
            self.add_argument(option.flag, metavar=option.metavar, help=option.help + default)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{printable(message)} (see {PROGRAM} --help)")


class Config(NamedTuple):
    """Everything that was set. Nothing else reads the environment."""

    command: tuple[str, ...]
    level: int
    sockets: tuple[str, ...]  # the well-known ones
    unknown: tuple[str, ...]  # variables that look like ours
    addr: tuple[Union[Address, UnixAddress], ...]
    namespace: tuple[str, ...]
    payloads: tuple[str, ...]
    confirm_for: float
    timeout: float
    upstream: Optional[Upstream] = None
    pubkey: Optional[Listed] = None
    pubkey_file: Optional[File] = None
    token_file: Optional[File] = None
    confirm: Optional[Upstream] = None
    allowed_hosts: tuple[str, ...] = ()

    @classmethod
    def from_env(cls, env: Env, argv: Sequence[str], commands: Mapping[str, str]) -> "Config":
        """From os.environ and sys.argv[1:]; ConfigError names the setting that is wrong."""
        given = Parser(commands).parse_intermixed_args(argv)
        prefix = "SSH_AGENT_PROXY_"
        known = {prefix + name for name in ("URL", "PUBKEY_URL", "CURL")}  # the shim's own
        sock = env.get("SSH_AUTH_SOCK")
        values: dict[str, Any] = {"upstream": Upstream(sock)} if sock else {}
        for option in OPTIONS:
            field, name = option.variable.lower(), prefix + option.variable
            known.add(name)
            if getattr(given, field):
                name = option.flag
            try:
                if text := getattr(given, field) or env.get(name) or option.default:
                    value = option.parse(text, env)
                    values[field] = File(value, name) if option.parse is expand else value
            except (ProxyError, ValueError) as e:
                raise ConfigError(f"{name}: {e}") from e
        if "token_file" in values:
            known.add(prefix + "TOKEN")  # the shim's: without that file it protects nothing
        config = cls(
            command=tuple(given.command),
            level=logging.DEBUG if given.verbose else AUDIT if given.quiet else logging.INFO,
            sockets=well_known_sockets(sys.platform, expand("$HOME", env),
                                       env.get("XDG_RUNTIME_DIR", "")),
            unknown=tuple(sorted(n for n in env if n.startswith(prefix) and n not in known)),
            **values,
        )  # fmt: skip
        for address in config.addr:
            if isinstance(address, UnixAddress) and address.mode & 0o077 and not config.token_file:
                raise ConfigError(f"{prefix}ADDR: mode {address.mode:04o} lets others in, which "
                                  f"needs a token: set {prefix}TOKEN_FILE")  # fmt: skip
        if config.confirm_for and not config.confirm:
            raise ConfigError(f"{prefix}CONFIRM_FOR: nobody is asked: set {prefix}CONFIRM too")
        config.pinned()  # a file that can't be read is a setting that is wrong
        return config

    def pinned(self, token: Optional[Token] = None) -> Wanted:
        """The key that alone signs, for TOKEN's client, if any."""
        file = self.pubkey_file
        pin = self.pubkey or (file and file.read(lambda text: parse_pin(text, {})))
        if token and token.key and not (pin and pin.key.fingerprint == token.key):
            return Wanted(fingerprint=token.key, pinned="the key= of this token")
        return Wanted(pin.key, "", "SSH_AGENT_PROXY_PUBKEY", pin.comment) if pin else Wanted()

    def tokens(self, added: str = "") -> Sequence[Token]:
        """Those who may ask, with a line ADDED; none where everyone may."""
        if not self.token_file:
            return ()
        return self.token_file.read(lambda text: parse_tokens(text + added), private=True)


# ---------------------------------------------------------------------------------------- HTTP

MAX_HEAD = 16 * 1024
MAX_FIELDS = 100
MAX_LINE = 4096  # of a chunked body
MAX_BODY = 1 << 30
HEAD_SECONDS = 10  # from the accept
GAP_SECONDS = 30  # between two pieces of a body
REQUEST_SECONDS = 600  # from the accept to the body's last byte
ANSWER_SECONDS = 10  # for a client that doesn't read
BUFFER = 256 * 1024

PLACES = 128
LINGERERS = 16  # connections that have their answer, and whose client may still be sending
SPARE_THREADS = 16  # beyond those, for each address
LINGER_SECONDS = 5
LINGER_GAP = 2

# RFC 9110 section 5.6.2 (token) and 5.5 (field-value), RFC 3986 (a target without a fragment).
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(
    rb"(" + _TOKEN + rb") "
    rb"((?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?\[\]]|%[0-9A-Fa-f]{2})+) "
    rb"HTTP/([0-9])\.([0-9])"
)
_FIELD = re.compile(rb"(" + _TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")

# Fields of which a second one would leave open which of them counts.
_SINGLE = frozenset((
    "host", "content-length", "transfer-encoding", "expect", "authorization", "sec-fetch-site",
    "sshsig-namespace", "sshsig-hash", "sshsig-key",
))  # fmt: skip


class Head(NamedTuple):
    """A request's head."""

    method: str
    path: str  # with the query, where there is one: no path of ours has one
    minor: int  # HTTP/1.minor
    hosts: tuple[str, ...]  # authorities: of the Host field and of a target in absolute form
    fields: dict[str, str]  # by lower-case name; a field that stands twice has its last value
    length: Optional[int]  # Content-Length, if any
    chunked: bool


def read_line(stream: BinaryIO, limit: int, what: str) -> bytes:
    """A line of at most LIMIT bytes off STREAM, without its CR LF.

    A bare CR or LF is where two readers disagree on what a line is: RequestError 400.
    """
    line = stream.readline(limit)
    if line.endswith(b"\r\n") and line.find(b"\r") == len(line) - 2:
        return line[:-2]
    if len(line) == limit:
        raise RequestError(431, f"{what} is too large")
    if b"\n" in line or b"\r" in line[:-1]:
        raise RequestError(400, f"a bare CR or LF in {what}")
    raise RequestError(400, f"the request ended inside {what}")


def parse_field(line: bytes) -> tuple[str, str]:
    """A field line (RFC 9112 section 5): its name in lower case, and its value."""
    match = _FIELD.fullmatch(line)
    if match:
        return match.group(1).decode().lower(), match.group(2).strip(b" \t").decode("latin-1")
    if line[:1] in (b" ", b"\t"):
        raise RequestError(400, "a header line begins with a blank: folded headers are refused")
    name = re.split(rb"[: \t]", line)[0]  # no more of it is told: the value may be secret
    if line[len(name) :].lstrip(b" \t").startswith(b":") and line[len(name)] != ord(":"):
        raise RequestError(400, f"a blank before the colon of header {printable(name, 60)!r}")
    raise RequestError(400, f"a malformed header line: {printable(name, 60)!r}")


def parse_framing(fields: Mapping[str, str], minor: int) -> tuple[Optional[int], bool]:
    """RFC 9112 section 6: Content-Length if any, and whether the body is chunked."""
    coding = fields.get("transfer-encoding")
    length = fields.get("content-length")
    if coding is not None:
        if length is not None:
            raise RequestError(400, "both Content-Length and Transfer-Encoding")
        if minor == 0:
            raise RequestError(400, "Transfer-Encoding in HTTP/1.0")
        if coding.lower() != "chunked":
            raise RequestError(400, f"Transfer-Encoding {printable(coding, 60)!r}: not chunked")
        return None, True
    if length is None:
        return None, False
    if not re.fullmatch("[0-9]+", length):
        raise RequestError(400, f"Content-Length {printable(length, 60)!r} is no number")
    length = length.lstrip("0") or "0"
    # Python refuses to read numbers of thousands of digits.
    return int(length) if len(length) < 19 else MAX_BODY + 1, False


def read_head(stream: BinaryIO) -> Head:
    """A head, the empty line behind it included (RFC 9112); RequestError 400 or 431.

    Strict where the standard library is lenient: whatever RFC 9112 lets a server refuse is refused.
    """
    what = "the request's head"
    first = read_line(stream, MAX_HEAD, what)
    left = MAX_HEAD - len(first) - 2
    match = _REQUEST_LINE.fullmatch(first)
    if not match:
        raise RequestError(400, f"a malformed request line: {printable(first, 60)!r}")
    method, target, major, minor = (part.decode() for part in match.groups())
    if (major, minor) not in (("1", "1"), ("1", "0")):
        raise RequestError(400, f"HTTP/{major}.{minor} is not spoken here: use HTTP/1.1")
    fields: dict[str, str] = {}
    number = 0
    while line := read_line(stream, left, what):
        left -= len(line) + 2
        name, value = parse_field(line)
        if name in fields and name in _SINGLE:
            raise RequestError(400, f"header {name!r} stands twice")
        fields[name] = value
        number += 1
        if number > MAX_FIELDS:
            raise RequestError(431, f"more than {MAX_FIELDS} header fields")

    hosts = []
    if "host" in fields:
        hosts.append(parse_authority(fields["host"]))
    elif minor == "1":
        raise RequestError(400, "HTTP/1.1 without a Host header")
    if target[:7].lower() == "http://":
        authority, slash, path = target[7:].partition("/")
        hosts.append(parse_authority(authority))
        target = slash + path or "/"
    elif not target.startswith("/"):
        raise RequestError(400, f"a request target of another form: {printable(target, 60)!r}")

    length, chunked = parse_framing(fields, int(minor))
    if minor == "1" and fields.get("expect", "100-continue").lower() != "100-continue":
        raise RequestError(400, f"Expect {printable(fields['expect'], 60)!r} can't be met")
    return Head(method, target, int(minor), tuple(hosts), fields, length, chunked)


def chunk_sizes(stream: BinaryIO) -> Iterator[int]:
    """The chunks' sizes of a chunked body (RFC 9112 section 7.1); RequestError 400, 413 or 431.

    The caller reads that many bytes off STREAM before it asks for the next.
    """
    total = 0
    while True:
        line = read_line(stream, MAX_LINE, "a chunk's size")
        match = _CHUNK.fullmatch(line)
        if not match:
            raise RequestError(400, f"a malformed chunk size: {printable(line, 60)!r}")
        size = int(match.group(1), 16)
        if not size:
            break
        total += size
        if total > MAX_BODY:
            raise RequestError(413, "more than 1 GiB to sign")
        yield size
        if stream.read(2) != b"\r\n":
            raise RequestError(400, "a chunk is not of the size announced")
    for _ in range(MAX_FIELDS + 1):  # trailers, which mean nothing here, and the empty line
        line = read_line(stream, MAX_LINE, "a trailer")
        if not line:
            return
        parse_field(line)
    raise RequestError(431, f"more than {MAX_FIELDS} trailer fields")


class Answer(NamedTuple):
    status: int
    content_type: str
    body: bytes
    fields: tuple[tuple[str, str], ...] = ()


def plain(status: int, text: str, *fields: tuple[str, str]) -> Answer:
    return Answer(status, "text/plain; charset=utf-8", (text + "\n").encode(), fields)


BUSY = plain(503, "busy: too many requests at once, try again", ("Retry-After", "1"))

# The one place where kinds of errors become statuses.
STATUSES: dict[type[ProxyError], int] = {
    WireError: 502,
    AgentUnreachable: 503,
    NoUsableKey: 503,
    AgentTimeout: 504,
    AgentRefused: 403,
    KeyNotHeld: 404,
    ConfigError: 503,
    ClientGone: 400,
}


def read_shim() -> bytes:
    """shim.sh from beside this file or from the same zip; 404 where only this file was copied."""
    try:
        loader = globals()["__loader__"]
        folder = os.path.dirname(os.path.realpath(__file__))
        return bytes(loader.get_data(os.path.join(folder, "shim.sh")))
    except OSError as e:
        raise RequestError(404, "no shim.sh beside this copy of the program: copy it too, from "
                                "where the program came") from e  # fmt: skip


class Client(io.RawIOBase):
    """A client's connection, as a stream of what it sends; every wait for that is bounded."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.since = time.monotonic()  # when its last byte came
        self.limit = self.since + HEAD_SECONDS
        self.begun = False  # it has sent something
        # Under the server's lock, for it may give this one's place to another connection:
        self.reading = True  # it may; once False, the answer is the thread's own to give
        self.evicted = False  # it did
        self.told = False  # and has answered in our stead

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """RequestError 408 where nothing came in time; ClientGone."""
        left = min(self.limit - time.monotonic(), GAP_SECONDS)
        if left <= 0 and self.limit:
            raise RequestError(408, "the request took too long to arrive")
        try:
            self.socket.settimeout(max(0, left))
            size = self.socket.recv_into(buffer)
        except (socket.timeout, BlockingIOError) as e:
            raise RequestError(408, "the request took too long to arrive") from e
        except OSError as e:
            raise ClientGone(f"the connection broke: {e.strerror or e}") from e
        if size:
            self.since = time.monotonic()
            self.begun = True
        if self.evicted:
            raise ClientGone("its place was given to another")
        return size


def peer_fields(sock: socket.socket, address: Any) -> dict[str, str]:
    """Who is at the other end, as the kernel shows it: an address, or a Unix socket's process."""
    if sock.family != getattr(socket, "AF_UNIX", None):
        return {"peer": str(Address(*address[:2]))}
    if sys.platform == "darwin":
        SOL_LOCAL, LOCAL_PEERCRED, LOCAL_PEERPID = 0, 1, 2
        uid = struct.unpack_from("II", sock.getsockopt(SOL_LOCAL, LOCAL_PEERCRED, 76))[1]
        pid = sock.getsockopt(SOL_LOCAL, LOCAL_PEERPID)
    else:
        ucred = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid = struct.unpack_from("iI", ucred)
    return {"peer": "unix", "pid": f"{pid}", "uid": f"{uid}"}


# What the log shows of a payload, and how much of each.
NOTED = dict.fromkeys(("subject", "author", "committer", "encoding", "tagger", "pusher"), 100)


class Handler:
    """One connection: one request, one answer, one line in the log."""

    def __init__(self, connection: socket.socket, address: Any, proxy: "Server") -> None:
        self.command = ""  # until the head is read
        self.request = connection
        self.proxy = proxy
        self.accepted = time.monotonic()
        self.client = Client(connection)
        self.stream = io.BufferedReader(self.client, BUFFER // 4)
        self.whole = False  # the request is read to its end
        self.peer = peer_fields(connection, address)
        self.token: Optional[Token] = None
        self.payload: Optional[Payload] = None
        self.noted: dict[str, str] = {}  # for the log

    def handle(self) -> None:
        if not self.proxy.admit(self):
            self.client.begun = True  # as far as the gentle close goes
            self.send(BUSY)
            return
        try:
            answer = self.answer(self.read_request())
        except ProxyError as e:
            if not self.client.begun:
                return
            if isinstance(e, RequestError):
                answer = plain(e.status, str(e), *e.fields)
            else:
                answer = plain(STATUSES[type(e)], str(e))
            if isinstance(e, ClientGone):
                self.noted["outcome"] = "gone"
        except Exception as e:  # a fault of ours must not take the thread with it
            LOG.error("internal error: %s: %s", type(e).__name__, printable(str(e)))
            LOG.debug("where it happened", exc_info=True)
            answer = plain(500, "internal error: the proxy's log says more")
        if self.proxy.claim(self):
            self.send(answer)
        elif not self.client.told:  # its first bytes came while its place was being given away
            self.send(BUSY)

    def has_sent(self) -> bool:
        """Are there bytes that we have not read? Then it is not the client that is waited for."""
        return bool(select.select([self.request], [], [], 0)[0])

    def read_request(self) -> Head:
        first = self.stream.peek(5)[:5]
        self.command = "HEAD" if first == b"HEAD " else ""  # for errors too
        if first[:1] == b"\x16":
            raise RequestError(400, "this is TLS: use http://, not https://")
        if not first:
            raise ClientGone("a connection without a request")
        head = read_head(self.stream)
        self.client.limit = self.accepted + REQUEST_SECONDS
        self.whole = not head.chunked and not head.length
        return head

    def read_body(self, head: Head, hash_algorithm: str) -> tuple[bytes, Payload]:
        """The digest of the body, hashed as it arrives, and what it is."""
        if head.minor and "expect" in head.fields:
            try:
                self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            except OSError as e:
                raise ClientGone(f"the connection broke: {e.strerror or e}") from e
        hasher = hashlib.new(hash_algorithm)
        total, nul, kept = 0, False, bytearray()
        for left in chunk_sizes(self.stream) if head.chunked else [head.length or 0]:
            total += left
            data = bytearray(min(left, BUFFER))
            buffer = memoryview(data)
            while left:
                size = self.stream.readinto1(buffer[:left])
                if not size:
                    raise RequestError(400, "the request ended inside its body")
                hasher.update(buffer[:size])
                nul = nul or data.find(0, 0, size) >= 0
                kept += buffer[: min(size, KEPT - len(kept))]
                left -= size
        if not total:
            raise RequestError(400, "an empty body: there is nothing to sign")
        self.whole = True
        self.payload = parse_payload(bytes(kept), total, nul)
        self.noted["kind"] = self.payload.kind
        self.noted["digest"] = f"{hash_algorithm}:{hasher.hexdigest()}"
        return hasher.digest(), self.payload

    def answer(self, head: Head) -> Answer:
        """Decides in the order of what costs least."""
        self.command = head.method
        self.noted = {"method": head.method, "path": head.path.partition("?")[0]}  # no secret
        for host in head.hosts:
            check_host(host, self.proxy.config.allowed_hosts)
        check_browser(head.fields)
        if head.path not in self.ROUTES:
            known = ", ".join(self.ROUTES)
            raise RequestError(404, f"no such path: there are {known}, without a query")
        methods, route = self.ROUTES[head.path]
        if head.method not in methods:
            allow = ", ".join(methods)
            raise RequestError(405, f"{head.path} takes {allow}", ("Allow", allow))
        if head.path not in ("/healthz", "/shim"):
            self.check_token(head.fields.get("authorization"))
        return route(self, head)

    def check_token(self, authorization: Optional[str]) -> None:
        try:
            tokens = self.proxy.config.tokens()
        except ConfigError as e:
            self.noted["reason"] = str(e)
            raise RequestError(503, "the proxy's token file can't be used: its log says why") from e
        if tokens:
            self.token = check_token(authorization, tokens)
            self.noted["token"] = self.token.name

    def answer_sign(self, head: Head) -> Answer:
        namespace, hash_algorithm, wanted = self.choices(head)
        if not head.chunked and head.length is None:
            self.whole = False  # it may send one all the same
            raise RequestError(411, "a body with Content-Length or chunked is needed")
        if head.length and head.length > MAX_BODY:
            raise RequestError(413, "more than 1 GiB to sign")
        digest, payload = self.read_body(head, hash_algorithm)
        check_payload(payload, (self.token and self.token.payloads) or self.proxy.config.payloads)
        self.keep_place()
        if self.proxy.consent:
            self.ask_person(self.proxy.consent, payload, namespace, wanted.name)
        admitted = self.token
        self.check_token(head.fields.get("authorization"))
        if self.token != admitted:
            raise RequestError(403, "the line of this token was changed meanwhile: try again")
        data = signed_data(namespace, hash_algorithm, digest)
        with self.proxy.agents.exchange(self.request) as exchange:
            key, signature = request_signature(exchange, wanted, data)
        block = armor(sshsig(key.blob, namespace, hash_algorithm, signature))
        self.noted["key"] = key.fingerprint
        if finished := payload.object_id(block):
            self.noted["id"] = finished
        self.noted["outcome"] = "signed"
        return Answer(200, "application/x-ssh-signature", block)

    def ask_person(self, consent: Consent, payload: Payload, namespace: str, key: str) -> None:
        who = self.peer.get("uid") or self.peer["peer"].rpartition(":")[0]
        names = [v if n == "peer" else f"{n} {v}" for n, v in self.peer.items()]
        if self.token:
            who = self.token.digest.hex()
            names.append(f"token {self.token.name}")
        holds = f"for {consent.hold:g} s, and every {payload.kind}" if consent.hold else ""
        facts = {"asked by": ", ".join(names), "key": key or "the first that the agent lists",
                 "namespace": namespace, "a yes holds": holds}  # fmt: skip
        what = (who, payload.kind, namespace, key)
        consent.obtain(consent_prompt(payload, facts), what, self.request)

    def answer_publickey(self, head: Head) -> Answer:
        wanted = self.choices(head)[2]
        self.keep_place()
        with self.proxy.agents.exchange(self.request) as exchange:
            listed = choose(list_keys(exchange), wanted)
        self.noted["key"] = listed.key.fingerprint
        line = f"{listed.key.line} {printable(listed.comment)}".rstrip()
        return plain(200, line, ("Cache-Control", "no-cache"))

    ROUTES: dict[str, tuple[tuple[str, ...], Callable[["Handler", Head], Answer]]] = {
        "/sign": (("POST",), answer_sign),
        "/publickey": (("GET", "HEAD"), answer_publickey),
        "/healthz": (("GET", "HEAD"), lambda *_: plain(200, "ok")),
        "/shim": (("GET", "HEAD"), lambda *_: Answer(200, "text/x-shellscript", read_shim())),
    }

    def choices(self, head: Head) -> tuple[str, str, Wanted]:
        """Namespace, hash algorithm and key, by the request's SSHSIG-* fields and the settings."""
        config, fields = self.proxy.config, head.fields
        namespace = choose_namespace(fields.get("sshsig-namespace"), config.namespace)
        self.noted["namespace"] = namespace
        hash_algorithm = fields.get("sshsig-hash", HASHES[0])
        if hash_algorithm not in HASHES:
            raise RequestError(400, f"SSHSIG-Hash {printable(hash_algorithm, 60)!r}: neither "
                                    f"{' nor '.join(HASHES)}")  # fmt: skip
        pin = config.pinned(self.token)
        return namespace, hash_algorithm, choose_key(fields.get("sshsig-key"), pin)

    def keep_place(self) -> None:
        """The request is read: from now on it is ours that takes time."""
        if not self.proxy.claim(self):
            raise ClientGone("its place was given to another")

    def send(self, answer: Answer) -> None:
        """The log's line, and then the answer: no signature leaves that is not on record."""
        status, body = answer.status, answer.body
        outcome = "served" if status < 400 else "refused" if status < 500 else "failed"
        if answer is BUSY:
            outcome = "busy"
        noted = {
            "outcome": outcome,
            "status": str(status),
            **self.peer,
            "ms": str(round(1000 * (time.monotonic() - self.accepted))),
            **self.noted,
        }
        if self.payload:
            noted.update({n: v for n, v in self.payload.fields.items() if n in NOTED})
        if status >= 400:
            noted.setdefault("reason", body.decode().rstrip("\n"))
        line = " ".join([f"{n}={quoted(v, NOTED.get(n, 1000))}" for n, v in noted.items()])
        LOG.log(logging.INFO if noted["outcome"] == "served" else AUDIT, "%s", line)

        when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        head = (f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
                f"Server: {PROGRAM}/{VERSION}\r\nDate: {when}\r\n"
                f"Content-Type: {answer.content_type}\r\nContent-Length: {len(body)}\r\n"
                "Connection: close\r\n")  # fmt: skip
        head += "".join([f"{name}: {value}\r\n" for name, value in answer.fields]) + "\r\n"
        data = head.encode() + (b"" if self.command == "HEAD" else body)
        with contextlib.suppress(OSError):  # it went away: the log has what it would have got
            self.request.settimeout(ANSWER_SECONDS)
            self.request.sendall(data)
            # Here, not at the close: a client that reads to the end need not wait for what is left.
            self.request.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Ends the connection such that an answer reaches a client that is still sending: bytes
        that nobody has read would make the system throw the answer away."""
        with contextlib.suppress(OSError, ProxyError):
            if self.whole:
                self.client.limit = 0  # what is here now, or nothing (408)
                self.whole = not self.stream.peek(1)
            if not self.whole and self.client.begun:
                self.proxy.linger(self)
                self.request.settimeout(LINGER_GAP)
                buffer = bytearray(BUFFER // 4)
                end = time.monotonic() + LINGER_SECONDS
                while self.request.recv_into(buffer) and time.monotonic() < end:
                    pass
        self.proxy.leave(self)


class Listener(NamedTuple):
    """A socket that listens, and what the log calls it."""

    socket: socket.socket
    name: str
    inode: tuple[int, int] = (0, 0)  # of a Unix socket's file, with its device

    def close(self) -> None:
        with contextlib.suppress(OSError):
            # Closing alone leaves threads in accept, and they would take one more each.
            self.socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            if self.inode != (0, 0):
                path = self.socket.getsockname()
                found = os.lstat(path)  # before the close: no other file has this number yet
                if (found.st_dev, found.st_ino) == self.inode:
                    os.unlink(path)
        self.socket.close()


def clear_stale(path: str) -> None:
    """Removes the socket of a program that has ended; ConfigError where it is anything else."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ConfigError("it is there, and no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return os.unlink(path)
        except OSError:
            pass  # whoever it is, it lives
    raise ConfigError("another program listens there")


def listen_unix(address: UnixAddress) -> Listener:
    """A Unix socket, which has its mode from its first instant; ProxyError."""
    umask = os.umask(0o777 & ~address.mode)
    try:
        if os.path.lexists(address.path):
            clear_stale(address.path)
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(address.path)
        sock.listen(1024)
        found = os.lstat(address.path)
        return Listener(sock, str(address), (found.st_dev, found.st_ino))
    except (OSError, ConfigError) as e:
        why = e.strerror or str(e) if isinstance(e, OSError) else e
        raise ProxyError(f"cannot listen on {address}: {why} (another path is "
                         "chosen by SSH_AGENT_PROXY_ADDR)") from e  # fmt: skip
    finally:
        os.umask(umask)


def listen(address: Union[Address, UnixAddress]) -> list[Listener]:
    """Listening sockets at ADDRESS, for a name at all it has; ProxyError where there is none."""
    if isinstance(address, UnixAddress):
        return [listen_unix(address)]
    listeners: list[Listener] = []
    error: Optional[OSError] = None
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        raise ProxyError(f"cannot listen on {address}: no such name ({e})") from e
    for family, _, _, _, where in found:
        v6 = family == socket.AF_INET6
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
            if os.name == "posix":  # on Windows it would let two programs have the same port
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if v6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if sys.platform == "linux":
                # An address that comes later (docker0, a VPN) can be listed from the start.
                level, freebind = (socket.IPPROTO_IPV6, 78) if v6 else (socket.IPPROTO_IP, 15)
                sock.setsockopt(level, freebind, 1)
            sock.bind(where)
            sock.listen(1024)
            listeners.append(Listener(sock, str(Address(*sock.getsockname()[:2]))))
        except OSError as e:
            error = e
    # Else it may be a name's other address, which this system has no use for.
    if error and (not listeners or error.errno == errno.EADDRINUSE):
        taken = error.errno == errno.EADDRINUSE
        why = f"port {address.port} is in use" if taken else error.strerror
        raise ProxyError(f"cannot listen on {address}: {why} (another is chosen by "
                         "SSH_AGENT_PROXY_ADDR)") from error  # fmt: skip
    return listeners


class Server:
    """Threads that wait in accept, each a whole connection at a time; one more is started when the
    last free one takes a connection. At most PLACES requests have a place at once."""

    def __init__(self, config: Config, agents: Agents, listeners: Sequence[Listener]) -> None:
        self.config = config
        self.agents = agents
        self.listeners = listeners
        self.consent = config.confirm and Consent(
            config.confirm, config.timeout, config.confirm_for, agents.commands
        )
        self.lock = threading.RLock()
        self.threads = dict.fromkeys(listeners, 0)
        self.free = dict.fromkeys(listeners, 0)  # those waiting in accept
        self.places: set[Handler] = set()
        self.lingering: dict[Handler, None] = {}  # in the order in which they came
        self.stopping = False

    def start_thread(self, listener: Listener) -> None:
        with self.lock:
            # Those beyond what can have a place or linger are about to be free.
            if self.threads[listener] >= PLACES + LINGERERS + SPARE_THREADS:
                return
            try:
                threading.Thread(target=self.work, args=(listener,), daemon=True).start()
            except RuntimeError as e:  # the system has no more: those that are there go on
                LOG.warning("cannot start another thread: %s", e)
                return
            self.threads[listener] += 1
            self.free[listener] += 1

    def work(self, listener: Listener) -> None:
        while True:
            try:
                connection, peer = listener.socket.accept()
            except OSError as e:
                if self.stopping:
                    return
                if e.errno != errno.ECONNABORTED:
                    LOG.error("cannot take a connection on %s: %s", listener.name, e.strerror)
                    time.sleep(0.1)  # no file descriptors, say: a tight loop would not help
                continue
            with self.lock:
                self.free[listener] -= 1
                last = not self.free[listener]
            if last and not self.stopping:
                self.start_thread(listener)
            try:
                if not self.stopping:
                    with contextlib.closing(Handler(connection, peer, self)) as handler:
                        handler.handle()
            except Exception as e:  # noqa: BLE001  it must not take the thread with it
                LOG.error("internal error: %s: %s", type(e).__name__, printable(str(e)))
            finally:
                connection.close()
                with self.lock:
                    self.free[listener] += 1

    def admit(self, handler: Handler) -> bool:
        """A place for HANDLER's connection, where need be that of the one which has kept us waiting
        longest for its own bytes; False where all requests are read whole."""
        with self.lock:
            if len(self.places) >= PLACES:
                waiting = [h for h in self.places if h.client.reading]
                if not waiting:
                    return False
                waiting.sort(key=lambda h: h.client.since)
                idle = [h for h in waiting if not h.has_sent()]
                self._evict((idle or waiting)[0])
            self.places.add(handler)
            return True

    def _evict(self, victim: Handler) -> None:
        """While the lock is held, VICTIM's own thread neither answers nor closes."""
        self.places.discard(victim)  # whatever becomes of it
        victim.client.reading = False
        victim.client.evicted = True
        with contextlib.suppress(OSError):
            if not victim.client.begun and not victim.has_sent():
                victim.request.shutdown(socket.SHUT_RD)
                return
            victim.client.begun = victim.client.told = True
            victim.send(BUSY)
        self.linger(victim)

    def claim(self, handler: Handler) -> bool:
        """Is the answer HANDLER's to give? From now on its place is safe until it is given."""
        with self.lock:
            handler.client.reading = False
            return not handler.client.evicted

    def linger(self, handler: Handler) -> None:
        """HANDLER has answered and gives its place back; it reads on until its client is done."""
        with self.lock:
            self.places.discard(handler)
            self.lingering[handler] = None
            if len(self.lingering) > LINGERERS:
                oldest = next(iter(self.lingering))
                del self.lingering[oldest]
                with contextlib.suppress(OSError):
                    oldest.request.shutdown(socket.SHUT_RDWR)

    def leave(self, handler: Handler) -> None:
        """HANDLER is about to close its connection."""
        with self.lock:
            self.places.discard(handler)
            self.lingering.pop(handler, None)

    def stop(self) -> None:
        """No further connections, and an end to those on which no request has begun."""
        self.stopping = True
        for listener in self.listeners:
            listener.close()
        with self.lock:
            for handler in self.places:
                if not handler.client.begun:
                    with contextlib.suppress(OSError):
                        handler.request.shutdown(socket.SHUT_RDWR)


# ------------------------------------------------------------------------------------- Service

DRAIN_SECONDS = 10


class StderrHandler(logging.Handler):
    """The log on stderr: what would have to wait is dropped and counted, but see emit()."""

    # What a pipe takes whole or not at all, and without waiting where it says that it can be
    # written to (pipe(7), PIPE_BUF).
    MAX_LINE = 4096

    def __init__(self) -> None:
        super().__init__()
        layout = "%(asctime)s %(levelname)s %(message)s"
        self.setFormatter(logging.Formatter(layout, "%Y-%m-%dT%H:%M:%S%z"))
        self.lost = 0
        self.cut = b""  # what ends the last line, where a terminal took only part of it
        self.stalled = False  # nobody reads: even a signature's line was waited for in vain
        self.fd = 2
        with contextlib.suppress(OSError, AttributeError):
            # A terminal that nobody reads takes part of a line and then waits; opened for us alone
            # it can be told not to.
            self.fd = os.open(os.ttyname(2), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if self.lost:
            line = f"({self.lost} lines before this one could not be written) {line}"
        data = self.cut + line.encode("utf-8", "backslashreplace")[: self.MAX_LINE - 2] + b"\n"
        written = 0
        # Whoever floods the log with refusals must not push a signature out of it.
        signed = record.levelno == AUDIT and record.getMessage().startswith("outcome=signed ")
        patience = 0.5 if signed and not self.stalled else 0
        with contextlib.suppress(OSError):  # closed: there is nobody to tell
            if os.name != "posix" or select.select([], [self.fd], [], patience)[1]:
                written = os.write(self.fd, data)
        self.stalled = not written and (self.stalled or signed)
        if written:
            self.cut = b"\n" if written < len(data) else b""
            self.lost = 0
        self.lost += written < len(data)


def start_log(level: int) -> None:
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # never shown
    logging.addLevelName(AUDIT, "AUDIT")
    logging._srcfile = None  # nor where a line comes from
    LOG.propagate = False
    LOG.setLevel(level)
    LOG.handlers[:] = [StderrHandler()]


def catch_signals() -> socket.socket:
    """SIGTERM and SIGINT, wherever the system delivers them, as bytes to wait for."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    return receiver


# ------------------------------------------------------------------------------------ Commands

COMMANDS = {
    "serve": "run the proxy in the foreground (also without a command)",
    "token NAME": "add a fresh token of that name to the token file, and print it",
    "shim": "print shim.sh, the container's side",
}


def raise_file_limit() -> None:
    """Room for every place's connection and agent: macOS starts with 256 file descriptors."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 8 * PLACES if hard == resource.RLIM_INFINITY else min(8 * PLACES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def warn_of_weak_settings(config: Config, listeners: Sequence[Listener]) -> None:
    for name in config.unknown:
        LOG.warning("%s is set, but is no setting of this program", printable(name))
    for listener in listeners:
        where = listener.socket.getsockname()
        local = isinstance(where, str) or ipaddress.ip_address(where[0]).is_loopback
        if not local and not config.token_file:
            LOG.warning("%s is not a loopback address: whoever reaches it can have anything signed "
                        "(SSH_AGENT_PROXY_TOKEN_FILE asks for a token)", listener.name)  # fmt: skip


def report_agent(config: Config, agents: Agents) -> None:
    """What the log says at the start of the keys, or of why there are none yet."""
    try:
        wanted = config.pinned()
        with agents.exchange() as exchange:
            listed = list_keys(exchange)
            key = choose(listed, wanted).key
    except ProxyError as e:
        LOG.warning("/sign can't work yet: %s", e)
        return
    LOG.info("signing with %s%s", key.name, "" if wanted.pinned else " unless another is named")
    if len(listed) > 1 and not wanted.pinned:
        LOG.warning("the agent holds %d keys and none is pinned: SSH_AGENT_PROXY_PUBKEY pins one",
                    len(listed))  # fmt: skip


def serve(config: Config) -> int:
    """Runs until SIGTERM or SIGINT, then finishes what is in flight, within DRAIN_SECONDS."""
    steps = harden(sys.platform)
    config.tokens()  # a file that can't be used is a setting that is wrong
    for step in steps:
        level = logging.DEBUG if step.in_force or step.expected else logging.WARNING
        state = "in force" if step.in_force else "not in force"
        LOG.log(level, "%s: %s (%s)", step.name, state, step.state)
    raise_file_limit()
    signals = catch_signals()
    agents = Agents(config.upstream, config.sockets, config.timeout)
    listeners: list[Listener] = []
    try:
        for address in config.addr:
            listeners += listen(address)
    except ProxyError:
        for listener in listeners:
            listener.close()
        raise
    server = Server(config, agents, listeners)
    threading.stack_size(256 * 1024)
    for listener in listeners:
        server.start_thread(listener)
    names = ", ".join(f'"{name}"' for name in config.namespace)
    for listener in server.listeners:
        LOG.info("listening on %s (namespace %s)", listener.name, names)
    warn_of_weak_settings(config, server.listeners)
    # An agent that hangs must hold up neither requests nor a signal.
    threading.Thread(target=report_agent, args=(config, agents), daemon=True).start()

    signals.recv(1)
    LOG.info("stopping")
    server.stop()
    end = time.monotonic() + DRAIN_SECONDS
    while (server.places or server.lingering) and time.monotonic() < end:
        if select.select([signals], [], [], 0.02)[0]:
            break  # a second signal: at once
    agents.commands.end()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # Python would be killed by one on its way out
    return 0


def output(data: bytes) -> int:
    """Writes DATA, and what argparse has left, to standard output; ProxyError where it can't be."""
    if sys.stdout is None:
        raise ProxyError("cannot write to standard output: it is closed")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would try again, and complain
        raise ProxyError(f"cannot write to standard output: {e.strerror}") from e
    return 0


def add_token(config: Config, name: str) -> int:
    """A fresh token for NAME, at the end of the token file."""
    import secrets

    file = config.token_file
    if not file:
        raise ConfigError("SSH_AGENT_PROXY_TOKEN_FILE (--token-file) is not set: it says where "
                          "tokens are kept")  # fmt: skip
    if not _TOKEN_NAME.fullmatch(name):
        raise ConfigError(f"{printable(name)!r} can't be a token's name: letters, digits, '.', "
                          "'_' and '-' can")  # fmt: skip
    token = secrets.token_urlsafe(32)
    os.umask(0o077)  # for every folder that is missing
    try:
        os.makedirs(os.path.dirname(file.path) or ".", exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
        with open(os.open(file.path, flags, 0o600), "ab", 0) as f:
            last = file.read(lambda text: text[-1:], private=True)
            added = f"{token} {name}\n" if last in ("", "\n") else f"\n{token} {name}\n"
            config.tokens(added)  # what can't be read is not added to
            size = os.fstat(f.fileno()).st_size
            if size + len(added) > MAX_FILE:
                raise OSError(errno.EFBIG, f"it would be larger than {MAX_FILE >> 10} KiB")
            if f.write(added.encode()) < len(added):
                f.truncate(size)  # part of a token would be one that is easy to guess
                raise OSError(errno.ENOSPC, "there is no room for it")
    except OSError as e:
        raise ProxyError(f"cannot write {printable(file.path)!r}: {e.strerror}") from e
    return output(f"{token}\n".encode())


def run(env: Env, argv: Sequence[str]) -> int:
    """A command's exit status."""
    try:
        config = Config.from_env(env, argv, COMMANDS)
    except SystemExit as e:  # --help, --version
        output(b"")
        return int(e.code or 0)
    start_log(config.level)
    words = config.command or ("serve",)
    if words == ("serve",):
        return serve(config)
    if words == ("shim",):
        return output(read_shim())
    if words[0] == "token" and len(words) == 2:
        return add_token(config, words[1])
    raise ConfigError(f"{printable(' '.join(words))!r} is none of serve, token NAME and shim")


def main(argv: Sequence[str]) -> int:
    """ARGV without the program's name. Exit status: 0, 1 it could not run, 2 wrong settings."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # closed: a socket would get that number, and the log
            os.open(os.devnull, os.O_RDWR)
    try:
        return run(os.environ, argv)
    except KeyboardInterrupt:
        return 130
    except ProxyError as e:
        status, why = 2 if isinstance(e, ConfigError) else 1, str(e)
    except OSError as e:  # of the system: no file descriptors, say
        status, why = 1, f"cannot run: {e.strerror or e}"
    with contextlib.suppress(OSError):  # nobody can be told
        os.write(2, f"{PROGRAM}: {why}\n".encode("utf-8", "backslashreplace"))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
