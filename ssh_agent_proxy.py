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
    Listening       where clients come in: ports and Unix sockets
    HTTP            requests read strictly, answers, the server
    Service         the log, the service manager, signals
    Commands        serve, check, token, shim, main()
"""

import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    # The script's own directory: a file named hmac.py beside it is not ours to run.
    del sys.path[0]

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
    """The agent can't be used now: nobody answers there, or it lists no key to sign with."""

class PinnedKeyMissing(AgentError):
    """The agent lists keys, and the one that alone may sign is not among them."""

class AgentTimeout(ProxyError):
    """The agent did not answer in time."""

class AgentRefused(ProxyError):
    """The agent holds the key and does not want to sign with it."""

class KeyNotHeld(ProxyError):
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


def _shown(character: str, special: str) -> str:
    if character in special:
        return "\\" + character
    if character.isprintable() and character not in _UNSEEN:
        return character
    return character.encode("unicode_escape").decode()


def printable(text: Union[str, bytes], limit: int = 200, special: str = "") -> str:
    """Foreign text for a log, a prompt or an error: one line, of at most LIMIT characters. Control,
    bidi and invisible ones become escapes of Python's, SPECIAL ones are led by a backslash."""
    if isinstance(text, bytes):
        text = text[: 4 * limit].decode("utf-8", "backslashreplace")
    text = text[: limit + 1]
    harmless = text.isprintable() and _UNSEEN.isdisjoint(text) and set(special).isdisjoint(text)
    if harmless and len(text) <= limit:
        return text
    pieces = [_shown(character, special) for character in text]
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
    """Reads RFC 4251 section 5's data types off DATA, which is WHAT, to its very end; WireError."""

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

    def uint32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def string(self) -> bytes:
        return self.take(self.uint32())

    def mpint(self) -> int:
        """A positive mpint in its one right encoding, which is all that keys and signatures use."""
        value = self.string()
        number = int.from_bytes(value, "big", signed=True)
        if number <= 0 or len(value) != number.bit_length() // 8 + 1:
            raise WireError(f"{self.what}: an mpint not positive, or with a needless leading zero")
        return number


# ------------------------------------------------------------------------------ Agent protocol

SSH_AGENT_FAILURE = 5
SSH_AGENTC_REQUEST_IDENTITIES = 11
SSH_AGENT_IDENTITIES_ANSWER = 12
SSH_AGENTC_SIGN_REQUEST = 13
SSH_AGENT_SIGN_RESPONSE = 14

SSH_AGENT_RSA_SHA2_512 = 4

MAX_AGENT_MESSAGE = 256 * 1024  # what OpenSSH's own client takes at most


def sign_request(key_blob: bytes, data: bytes, flags: int) -> bytes:
    """SSH_AGENTC_SIGN_REQUEST (RFC 9987)."""
    return (
        byte(SSH_AGENTC_SIGN_REQUEST)
        + string(key_blob)
        + string(data)
        + uint32(flags)
    )  # fmt: skip


def parse_identities_answer(reply: bytes) -> Optional[list[tuple[bytes, bytes]]]:
    """SSH_AGENT_IDENTITIES_ANSWER (RFC 9987), keys and comments; None for SSH_AGENT_FAILURE."""
    if reply == byte(SSH_AGENT_FAILURE):
        return None
    with Reader(reply, "identities answer") as r:
        if r.take(1) != byte(SSH_AGENT_IDENTITIES_ANSWER):
            raise WireError(f"{r.what}: message type {reply[0]}")
        return [(r.string(), r.string()) for _ in range(r.uint32())]


def parse_sign_response(reply: bytes) -> Optional[bytes]:
    """SSH_AGENT_SIGN_RESPONSE (RFC 9987), its signature; None for SSH_AGENT_FAILURE."""
    if reply == byte(SSH_AGENT_FAILURE):
        return None
    with Reader(reply, "sign response") as r:
        if r.take(1) != byte(SSH_AGENT_SIGN_RESPONSE):
            raise WireError(f"{r.what}: message type {reply[0]}")
        return r.string()


# -------------------------------------------------------------------------------------- SSHSIG

# The types of keys and their bits, as ssh-keygen -l shows them; an RSA key has its own.
_BITS = {
    "ssh-ed25519": 256, "sk-ssh-ed25519@openssh.com": 256, "ssh-rsa": 0,
    "ecdsa-sha2-nistp256": 256, "sk-ecdsa-sha2-nistp256@openssh.com": 256,
    "ecdsa-sha2-nistp384": 384, "ecdsa-sha2-nistp521": 521,
}  # fmt: skip
# PROTOCOL.certkeys: a certificate's type and that of the key in it.
_CERTIFICATES = {plain.partition("@")[0] + "-cert-v01@openssh.com": plain for plain in _BITS}

HASHES = ("sha512", "sha256")  # the first is what ssh-keygen takes unasked


class PublicKey(NamedTuple):
    """A public key or certificate whose every field has been looked at."""

    type: str
    blob: bytes  # as it stands in an authorized_keys line and in SSHSIG
    plain_type: str  # a certificate's key's; else the same as above
    plain_blob: bytes
    bits: int

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


def _read_key(r: Reader, plain_type: str) -> int:
    """Reads the fields of a plain key behind its type; its bits."""
    bits = _BITS[plain_type]
    if "ed25519" in plain_type:
        size = len(r.string())
        if size != 32:
            raise WireError(f"public key: an Ed25519 key of {size} bytes")
    elif plain_type == "ssh-rsa":
        exponent = r.mpint()
        bits = r.mpint().bit_length()  # of the modulus
        if not 1024 <= bits <= 16384 or exponent < 3:  # what OpenSSH makes and verifies
            raise WireError(f"public key: an RSA key of {bits} bits")
    else:  # RFC 5656
        curve = r.string()
        point = r.string()
        if curve != b"nistp%d" % bits:
            raise WireError(f"public key: {plain_type} with curve {printable(curve, 20)!r}")
        coordinate = (bits + 7) // 8  # bytes
        if len(point) != 1 + 2 * coordinate or point[0] != 4:
            raise WireError(f"public key: not an uncompressed point of nistp{bits}")
    if plain_type.startswith("sk-"):
        r.string()  # application
    return bits


def parse_public_key(blob: bytes) -> PublicKey:
    """A key blob or certificate (RFC 4253 section 6.6, RFC 5656, 8709, PROTOCOL.certkeys, .u2f)."""
    with Reader(blob, "public key") as r:
        key_type = r.string().decode("ascii", "backslashreplace")
        plain_type = _CERTIFICATES.get(key_type, key_type)
        if plain_type not in _BITS:
            raise WireError(f"public key: SSHSIG can't use type {printable(key_type, 60)!r}")
        certificate = key_type != plain_type
        if certificate:
            r.string()  # nonce
        start = r.at
        bits = _read_key(r, plain_type)
        plain_blob = string(plain_type.encode()) + blob[start : r.at]
        if certificate:
            r.take(8 + 4)  # serial, type
            r.string()  # key id
            r.string()  # valid principals
            r.take(8 + 8)  # valid after, valid before
            for _ in ("critical options", "extensions", "reserved", "signature key", "signature"):
                r.string()
    return PublicKey(key_type, blob, plain_type, plain_blob, bits)


class Listed(NamedTuple):
    """A key with its comment, from an agent's list or an authorized_keys line."""

    key: PublicKey
    comment: str


def parse_key_line(line: str) -> Listed:
    """An authorized_keys line without options; no WireError quotes it: it may be a private key."""
    words = line.split(None, 2)
    key_type, encoded, comment = words + [""] * (3 - len(words))
    if "PRIVATE KEY" in line:
        raise WireError("a private key, where the public one (the .pub file) belongs")
    if key_type.startswith(("SHA256:", "MD5:")):
        raise WireError("a fingerprint, where the whole line of the public key belongs")
    if _CERTIFICATES.get(key_type, key_type) not in _BITS or not encoded:
        raise WireError("not a public key like 'ssh-ed25519 AAAA…', of a type SSHSIG can use")
    try:
        key = parse_public_key(base64.b64decode(encoded, validate=True))
    except ValueError as e:
        raise WireError(f"the base64 after {key_type!r} is damaged") from e
    if key.type != key_type:
        raise WireError(f"a line of type {key_type!r} with a key of type {key.type!r} in it")
    return Listed(key, comment.strip())


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
    """WireError unless the agent's SIGNATURE has the form that belongs to KEY (RFC 8709 section 6,
    RFC 8332 section 3, RFC 5656 section 3.1.2, PROTOCOL.u2f); it is not verified here."""
    what = "the agent's signature"
    expected = "rsa-sha2-512" if key.plain_type == "ssh-rsa" else key.plain_type
    with Reader(signature, what) as r:
        algorithm = r.string().decode("ascii", "backslashreplace")
        if algorithm != expected:
            raise WireError(f"{what} is of algorithm {printable(algorithm, 60)!r}, not {expected}")
        blob = r.string()
        if key.plain_type.startswith("sk-"):
            r.take(1)  # flags
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
# What git check-ref-format refuses: at the start, anywhere or at the end; and as a character.
_NO_REF = r"[./]|[^\n]*(?:\.\.|@\{|/[./]|[./]\n|\.lock[/\n])"
_REF = rf"(?!{_NO_REF})[^\x00- \x7f~^:?*\[\\]+"
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


def _is_utf8_to_git(data: bytes) -> bool:
    """Unicode's noncharacters are well-formed, and yet no UTF-8 to git (its utf8.c)."""
    with contextlib.suppress(UnicodeDecodeError):
        codes = [] if data.isascii() else map(ord, data.decode())
        return not any(0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE for code in codes)
    return False


class Payload(NamedTuple):
    """What is to be signed: its kind, and what it says by git's own names, as the client wrote it:
    of parents and refs their number; subject is the message's first line, or the first ref."""

    kind: str  # of KINDS
    size: int
    fields: dict[str, str]
    data: bytes  # the first KEPT bytes

    def object_id(self, block: bytes) -> str:
        """The id of the commit or tag that BLOCK, the armored signature, completes; else ""."""
        named = self.fields.get("tree") or self.fields.get("object")
        if not named or self.size > len(self.data):
            return ""
        uses_sha1 = len(named) == 40
        if self.kind == "commit":
            # Git 2.47 has such a commit signed first, and then encodes it anew.
            if "encoding" not in self.fields and not _is_utf8_to_git(self.data):
                return ""
            header = b"gpgsig" if uses_sha1 else b"gpgsig-sha256"
            folded = block.rstrip().replace(b"\n", b"\n ")
            signed = self.data.replace(b"\n\n", b"\n%b %b\n\n" % (header, folded), 1)
        else:
            signed = self.data + block
        whole = b"%b %d\0%b" % (self.kind.encode(), len(signed), signed)
        digest = hashlib.new("sha1" if uses_sha1 else "sha256", whole, usedforsecurity=False)
        return digest.hexdigest()


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
# What Python lacks on Windows, where no code that needs it is reached.
AF_UNIX: Any = getattr(socket, "AF_UNIX", None)
POLLIN = getattr(select, "POLLIN", 0)
poll: Any = getattr(select, "poll", object)


class Upstream(NamedTuple):
    """Where an agent is: a Unix socket's path, a Windows pipe's, or a command that speaks the agent
    protocol; with both, the command is the way to that pipe."""

    path: str = ""
    command: tuple[str, ...] = ()
    role: str = "agent command"
    env: Optional[Mapping[str, str]] = None  # for a command; None: as ours
    folder: Optional[str] = None  # where a command is started; None: where we are

    def __str__(self) -> str:
        if self.command:
            return f"{self.role} {printable(self.path or self.command[0])!r}"
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


def _end_group(leader: int, kill: bool) -> None:
    """LEADER has not been waited for: its number is nobody else's yet."""
    if sys.platform != "win32":  # no command is run there
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL if kill else signal.SIGTERM)


def _why(path: str, e: OSError) -> str:
    """Why nobody could be reached at a Unix socket, for a person."""
    if e.errno == errno.ENOENT:
        return "no such socket (is the agent running?)"
    if e.errno == errno.EACCES:
        return "permission denied (it, or its folder, is another user's)"
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
        self.poll = poll()
        if client and POLLIN:
            # Linux shows a close even behind bytes that nobody reads; elsewhere it has to be read.
            self.poll.register(client, getattr(select, "POLLRDHUP", POLLIN))

    def milliseconds(self, seconds: Optional[float] = None) -> float:
        """Until the deadline, or SECONDS if that is less; AgentTimeout."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise AgentTimeout(f"{self.what} did not answer in time")
        seconds = left if seconds is None else min(left, seconds)
        return 1000 * seconds + 1  # not before the deadline, or the last turns would spin

    def wait(self, seconds: Optional[float] = None) -> list[int]:
        """The file descriptors in POLL that are ready, [] after SECONDS."""
        ready = [descriptor for descriptor, _ in self.poll.poll(self.milliseconds(seconds))]
        client = self.client
        if client and client.fileno() in ready:
            self.look_at(client)
            self.poll.unregister(client)
        return ready

    def look_at(self, client: socket.socket) -> None:
        """ClientGone, unless it is bytes that made it ready."""
        sent = b""
        if not hasattr(select, "POLLRDHUP"):
            with contextlib.suppress(OSError):
                sent = client.recv(1, socket.MSG_PEEK)
        if not sent:
            raise ClientGone("the client went away before it was answered")
        self.client = None  # nobody reads them, and they hide a close: sending the answer shows it


class ProcessGroups(set[int]):
    """The process groups that run for us; none is started any more once they are ended."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.ended = False

    def end(self) -> None:
        """At the end of the program: no command outlives it."""
        with self.lock:  # one that is being started is among them, or never will be
            self.ended = True
        for kill in (False, True):
            for group in tuple(self):
                _end_group(group, kill)
            end = time.monotonic() + EXEC_GRACE
            while self and time.monotonic() < end:
                time.sleep(0.01)


class Exchange(Watch, contextlib.AbstractContextManager["Exchange"]):
    """One connection to an agent, or one run of a command."""

    def __init__(self, upstream: Upstream, deadline: float, client: Optional[socket.socket] = None,
                 groups: Optional[ProcessGroups] = None) -> None:  # fmt: skip
        super().__init__(f"the {upstream}", deadline, client)
        self.upstream = upstream
        self.groups = ProcessGroups() if groups is None else groups
        self.process: Any = None
        self.stderr_lines = 0
        try:
            self._open()
        except OSError as e:
            if upstream.command:
                raise AgentError(f"cannot run {self.what}: {e.strerror}") from e
            raise AgentError(f"no answer from {self.what}: {_why(upstream.path, e)}") from e

    def _open(self) -> None:
        self.socket = socket.socket(AF_UNIX)
        try:
            if self.upstream.command:
                self._spawn()
            else:
                self._connect()
            self.poll.register(self.socket, POLLIN)
        except BaseException:
            self.end()
            raise

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
        with theirs, self.groups.lock:
            self._check_end()
            self.process = subprocess.Popen(
                self.upstream.command, stdin=theirs.fileno(), stdout=theirs.fileno(),
                stderr=subprocess.PIPE, start_new_session=True, env=self.upstream.env,
                cwd=self.upstream.folder,
            )  # fmt: skip
            self.groups.add(self.process.pid)
        self.poll.register(self.process.stderr, POLLIN)

    def wait(self, seconds: Optional[float] = None) -> list[int]:
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
        with contextlib.suppress(OSError):
            return self.socket.recv(65536)
        return b""

    def _send(self, data: bytes) -> None:
        self.socket.settimeout(max(0, self.deadline - time.monotonic()))
        self.socket.sendall(data)

    def ask(self, request: bytes) -> bytes:
        """Sends REQUEST and returns the reply, both without the length that leads them."""
        with contextlib.suppress(OSError):  # it hung up, or takes nothing: reading tells which
            self._send(string(request))
        reply = b""
        size = 0
        while len(reply) < 4 + size:
            piece = self._receive()
            if not piece and not reply:
                raise AgentError(self._end_and_explain("without an answer"))
            if not piece:
                raise WireError(self._end_and_explain("in the middle of its answer"))
            reply += piece
            if len(reply) >= 4:
                size = int.from_bytes(reply[:4], "big")
                if not 0 < size <= MAX_AGENT_MESSAGE:
                    raise WireError(f"{self.what} announced a message of {size} bytes")
        if len(reply) > 4 + size:
            raise WireError(f"{self.what} sent {len(reply) - 4 - size} bytes more than announced")
        return reply[4:]

    def _end_and_explain(self, when: str) -> str:
        """How it hung up; a command that is about to end is given the time to."""
        if self.process:
            self.socket.close()
        if not self.process or not self._log_until_silent():
            return f"{self.what} hung up {when}"
        self.end()
        self._check_end()
        status = self.process.returncode
        how = f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"
        where = "; its words are in the proxy's log" if self.stderr_lines else ""
        return f"{self.what} {how} {when}{where}"

    def _log_until_silent(self) -> bool:
        """Logs a command's stderr until its whole group has gone; False if not in EXEC_GRACE."""
        words = Watch("", time.monotonic() + EXEC_GRACE, None)
        words.poll.register(self.process.stderr, POLLIN)
        with contextlib.suppress(AgentTimeout):
            while words.wait():
                if not self._log_stderr():
                    return True
        return False

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
        if self.groups.ended:
            raise AgentError("the proxy is about to end")

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Closes the connection, and ends a command that still runs, with its whole group."""
        self.socket.close()
        if self.process and self.process.returncode is None:
            _end_group(self.process.pid, kill=False)
            self._log_until_silent()
            _end_group(self.process.pid, kill=True)
        if self.process:
            self.groups.discard(self.process.pid)
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
    """The keys that can be used, in the agent's order; AgentError where there is none."""
    identities = parse_identities_answer(exchange.ask(byte(SSH_AGENTC_REQUEST_IDENTITIES)))
    if not identities:  # or it refuses to list them
        raise AgentError("the agent lists no keys (none added, or it is locked)")
    listed = []
    for key_blob, comment in identities:
        # What the agent holds besides is its own business: keys of types that nobody here knows.
        with contextlib.suppress(WireError):
            key = parse_public_key(key_blob)
            listed.append(Listed(key, comment.decode("utf-8", "backslashreplace")))
    if not listed:
        raise AgentError(f"{exchange.what} lists keys, but none of a type that SSHSIG can use")
    return listed


def choose(listed: Sequence[Listed], wanted: Wanted) -> Listed:
    """The key among those LISTED that is WANTED; KeyNotHeld, or PinnedKeyMissing."""
    for candidate in listed:
        if wanted.fits(candidate.key):
            return Listed(candidate.key, wanted.comment or candidate.comment)
    others = f"the agent does not hold it, but {count(len(listed), 'other')}"
    if wanted.pinned:
        why = f"the pinned key {wanted.name} is missing: {others}; add it there"
        raise PinnedKeyMissing(f"{why}, or change {wanted.pinned}")
    raise KeyNotHeld(f"no key {wanted.name}: {others}; add it there, or sign with another")


def request_signature(exchange: Exchange, wanted: Wanted, namespace: str, hash_algorithm: str,
                      digest: bytes) -> tuple[PublicKey, bytes]:  # fmt: skip
    """The key that signed, and the armored signature, checked; a known key costs no listing."""
    data = signed_data(namespace, hash_algorithm, digest)
    key = wanted.key or choose(list_keys(exchange), wanted).key
    signature = parse_sign_response(exchange.ask(sign_request(key.blob, data, key.flags)))
    if signature is None:
        if wanted.key:
            choose(list_keys(exchange), wanted)  # raises where it is not held, which is not refused
        raise AgentRefused(f"the agent refused to sign with {key.name} (declined, late, locked?)")
    check_signature(key, signature)
    return key, armor(sshsig(key.blob, namespace, hash_algorithm, signature))


# ---- a Windows pipe, and WSL's way to it: elsewhere, read on at reach()

PIPES = "//./pipe/"  # \\.\pipe\ as it survives a shell, an env file and a message
WINDOWS_AGENT = PIPES + "openssh-ssh-agent"
CLIENT_LOOK = 0.25  # seconds between two looks whether there is still a client to wait for

# Why a pipe can't be had, by the Windows error; it is also the script's exit status.
_NO_PIPE = {
    2: "no such pipe (Windows' own agent is started by an administrator's Set-Service ssh-agent "
    "-StartupType Automatic; Start-Service ssh-agent, 1Password's in its settings for developers)",
    5: "access denied (is that agent another user's, or started as administrator?)",
}

if sys.platform == "win32":
    import _winapi  # what subprocess and multiprocessing stand on

    # CreateFileW's dwFlagsAndAttributes: the pipe's server may see who we are, and not act as us
    # (ImpersonateNamedPipeClient). Whoever is first can make a pipe of any name.
    SECURITY_SQOS_PRESENT = 0x00100000
    SECURITY_IDENTIFICATION = 0x00010000

    class PipeExchange(Exchange):
        """One connection to an agent's named pipe, by overlapped I/O: every wait can end."""

        handle = 0

        def _open(self) -> None:
            name = self.upstream.path.replace("/", "\\")
            access = _winapi.GENERIC_READ | _winapi.GENERIC_WRITE
            flags = _winapi.FILE_FLAG_OVERLAPPED | SECURITY_SQOS_PRESENT | SECURITY_IDENTIFICATION
            how = (access, 0, _winapi.NULL, _winapi.OPEN_EXISTING, flags, _winapi.NULL)
            tries = 0  # more, once it was busy: its server may make it anew for each client
            while not self.handle:
                try:
                    self.handle = _winapi.CreateFile(name, *how)
                except OSError as e:
                    tries = 100 if e.winerror == _winapi.ERROR_PIPE_BUSY else tries - 1
                    if tries < 0:
                        why = _NO_PIPE.get(e.winerror, e.strerror)
                        raise AgentError(f"no answer from the {self.upstream}: {why}") from e
                    self.what = f"the {self.upstream}, whose pipe was busy,"
                    time.sleep(0.01)
                    with contextlib.suppress(OSError):  # ERROR_SEM_TIMEOUT
                        _winapi.WaitNamedPipe(name, self._slice())  # (0: its server's choice)

        def _slice(self) -> int:
            """Milliseconds for the next wait; ClientGone, AgentTimeout."""
            if self.client and select.select([self.client], [], [], 0)[0]:
                self.look_at(self.client)
            return int(self.milliseconds(CLIENT_LOOK))

        def _finish(self, begun: "_winapi.Overlapped") -> None:
            """Waits until what was BEGUN has ended; OSError where it failed."""
            ended = _winapi.WAIT_TIMEOUT
            try:
                while ended == _winapi.WAIT_TIMEOUT:
                    ended = _winapi.WaitForMultipleObjects([begun.event], False, self._slice())
            except BaseException:
                with contextlib.suppress(OSError):  # it may have ended meanwhile, or failed
                    begun.cancel()
                    begun.GetOverlappedResult(True)  # waits until nothing writes to its buffer
                raise
            begun.GetOverlappedResult(True)

        def _send(self, data: bytes) -> None:
            self._finish(_winapi.WriteFile(self.handle, data, overlapped=True)[0])

        def _receive(self) -> bytes:
            with contextlib.suppress(OSError):  # ERROR_BROKEN_PIPE: it has hung up
                begun, _ = _winapi.ReadFile(self.handle, 65536, overlapped=True)
                self._finish(begun)
                return begun.getbuffer() or b""
            return b""

        def end(self) -> None:
            if self.handle:
                _winapi.CloseHandle(self.handle)
                self.handle = 0


POWERSHELL = "Windows/System32/WindowsPowerShell/v1.0/powershell.exe"
DRIVE = "/mnt/c"
MOUNTS = "/proc/mounts"

# For Windows PowerShell 5.1 and PowerShell 7. No value may be left over, for it would be written to
# stdout too, and no cmdlet is used: for loading one is reported. Connect says TimeoutException
# where there is no pipe, and ERROR_SEM_TIMEOUT, 0x80070079, where it is busy: ten minutes at most.
_RELAY = """
$ProgressPreference = 'SilentlyContinue'
try {
    $pipe = [System.IO.Pipes.NamedPipeClientStream]::new(
        '.', 'NAME', 'InOut', 'Asynchronous', 'Identification')
    for ($left = 1200; -not $pipe.IsConnected; $left--) {
        try {
            $pipe.Connect(500)
        } catch {
            $code = $_.Exception.GetBaseException().HResult
            if ($code -ne -2147024775 -or $left -lt 1) { throw }
        }
    }
    $up = [Console]::OpenStandardInput().CopyToAsync($pipe)
    $down = $pipe.CopyToAsync([Console]::OpenStandardOutput())
    $both = [System.Threading.Tasks.Task[]]@($up, $down)
    $both[[System.Threading.Tasks.Task]::WaitAny($both)].Wait()
    exit 0
} catch {
    $why = $_.Exception.GetBaseException()
    $status = 1
    if ($why -is [System.TimeoutException]) { $status = 2 }
    if ($why -is [System.UnauthorizedAccessException]) { $status = 5 }
    [Console]::Error.WriteLine($why.Message)
    exit $status
}
"""


def powershells(mounts: str) -> list[str]:
    """Where it may stand, by the text of /proc/mounts."""
    drives = [DRIVE]
    for line in mounts.split("\n"):  # (splitlines would let a folder's name make a line)
        fields = line.split(" ")
        if len(fields) > 2 and fields[2] in ("9p", "drvfs", "virtiofs"):
            drives.append(re.sub(r"\\([01][0-7]{2})", lambda c: chr(int(c[1], 8)), fields[1]))
    return [f"{drive}/{POWERSHELL}" for drive in drives]


def by_powershell(upstream: Upstream) -> Upstream:
    """With the command that relays to UPSTREAM's pipe, as things are now."""
    with open(MOUNTS, encoding="utf-8", errors="surrogateescape", newline="\n") as f:
        programs = powershells(f.read(1 << 20))
    program = next(filter(os.path.isfile, programs), "")
    if not program:
        tried = ", ".join([*map(printable, programs[:3]), *("…" for _ in programs[3:4])])
        raise AgentError(f"no Windows drive with PowerShell is mounted (tried: {tried})")
    env = dict(upstream.env or {})
    with socket.socket(AF_UNIX) as s:
        s.setblocking(False)
        try:
            s.connect(env.get("WSL_INTEROP", ""))
        except OSError:
            env.pop("WSL_INTEROP", None)  # of a session that has ended; without, WSL finds another
    script = _RELAY.replace("NAME", upstream.path[len(PIPES) :])  # which has no quote in it
    encoded = base64.b64encode(script.encode("utf-16-le")).decode()
    options = ("-NoProfile", "-NonInteractive", "-InputFormat", "None", "-EncodedCommand", encoded)
    # Windows looks for programs and libraries in the current folder too: none of ours there.
    return upstream._replace(command=(program, *options), env=env, folder=os.path.dirname(program))


def plain_words(said: bytes) -> str:
    """What PowerShell said, as one line; what no script has caught is CLIXML ([MS-PSRP] 2.2.5)."""
    text, mark, xml = said.decode("utf-8", "backslashreplace").partition("#< CLIXML")
    if mark:
        import html  # for this alone: it would cost every start

        errors = html.unescape("".join(re.findall('<S S="Error">([^<]*)', xml)))
        text += re.sub("_x([0-9A-F]{4})_", lambda code: chr(int(code[1], 16)), errors)
    return " ".join(text.split())


class WslExchange(Exchange):
    """One run of Windows PowerShell, which relays to a pipe."""

    said = b""

    def _spawn(self) -> None:
        self.upstream = by_powershell(self.upstream)
        try:
            super()._spawn()
        except OSError as e:
            if e.errno != errno.ENOEXEC:
                raise
            raise AgentError(
                "WSL starts no Windows programs (interop is off): unless /etc/wsl.conf wants that, "
                "`echo :WSLInterop:M::MZ::/init:PF | sudo tee /etc/binfmt.d/WSLInterop.conf; "
                "sudo systemctl restart systemd-binfmt` mends it"
            ) from e

    def _log_stderr(self) -> bool:
        data = os.read(self.process.stderr.fileno(), 4096)
        self.said = (self.said + data)[: 16 * 1024]
        return bool(data)

    def end(self) -> None:
        super().end()
        words = plain_words(self.said)
        if words and not self.stderr_lines:
            self.stderr_lines = 1
            LOG.warning("%s: %s", self.upstream, printable(words, 1000))

    def _end_and_explain(self, when: str) -> str:
        told = super()._end_and_explain(when)
        if b"Vsock" in self.said:
            return f"{told}: WSL needs AF_VSOCK, which RestrictAddressFamilies= of a unit forbids"
        why = _NO_PIPE.get(self.process.returncode)
        return f"no answer from the agent at {self.upstream.path!r}: {why}" if why else told


def reach(upstream: Upstream, deadline: float, client: Optional[socket.socket],
          groups: ProcessGroups) -> Exchange:  # fmt: skip
    """An exchange with the agent at UPSTREAM."""
    if sys.platform == "win32":
        if upstream.path.startswith(PIPES):
            return PipeExchange(upstream, deadline, client, groups)
        raise AgentError(f"SSH_AUTH_SOCK is '{printable(upstream.path)}', which no Windows program "
                         f"can reach: SSH_AGENT_PROXY_UPSTREAM={WINDOWS_AGENT} is Windows' own")
    if upstream.path and upstream.command:
        return WslExchange(upstream, deadline, client, groups)
    return Exchange(upstream, deadline, client, groups)


class Agents:
    """The agent that was set, or the first well-known one that answers; nothing it says is kept."""

    def __init__(self, upstream: Optional[Upstream], places: Sequence[str], timeout: float,
                 tell: Callable[[str], None] = lambda state: None) -> None:  # fmt: skip
        self.upstream = upstream
        self.places = places  # the well-known sockets
        self.timeout = timeout  # seconds, for the whole exchange of a request
        self.tell = tell  # the service manager
        self.last: Optional[Upstream] = None  # the agent in use, as the log last named it
        self.groups = ProcessGroups()

    @contextlib.contextmanager
    def exchange(self, client: Optional[socket.socket] = None) -> Iterator[Exchange]:
        """A fresh connection for one request; where it is of no help, the error names another."""
        try:
            with self._connect(client) as exchange:
                if exchange.upstream != self.last:
                    self.last = exchange.upstream
                    LOG.info("using the %s", exchange.upstream)
                yield exchange
                self.tell(f"using the {exchange.upstream}")
        except AgentError as e:
            # Whether another agent has that one key is not looked for.
            hint = "" if isinstance(e, PinnedKeyMissing) else self.hint()
            error = type(e)(f"{e}{hint}")
            self.tell(str(error))
            raise error from e

    def _connect(self, client: Optional[socket.socket]) -> Exchange:
        deadline = time.monotonic() + self.timeout
        if self.upstream:
            return reach(self.upstream, deadline, client, self.groups)
        for path in self.places:
            with contextlib.suppress(AgentError):
                return Exchange(Upstream(path), deadline, client)
        tried = ", ".join(["SSH_AUTH_SOCK (unset)", *map(printable, self.places)])
        raise AgentError(f"no agent found: set SSH_AGENT_PROXY_UPSTREAM (tried: {tried})")

    def hint(self) -> str:
        """Names another well-known agent that has keys, where the one in use is of no help."""
        in_use = self.upstream or self.last or Upstream()
        deadline = time.monotonic() + HINT_SECONDS
        for path in self.places:
            if os.path.realpath(path) == os.path.realpath(in_use.path):
                continue
            with contextlib.suppress(ProxyError), Exchange(Upstream(path), deadline) as exchange:
                keys = count(len(list_keys(exchange)), "key")
                return f"; another has {keys}: set SSH_AGENT_PROXY_UPSTREAM={printable(path)}"
        return ""


# -------------------------------------------------------------------------------------- Policy

# What nobody on the network can claim, unlike single labels and .local (but this machine's own).
_OWN_HOSTS = ("127.0.0.1", "localhost", ".localhost", ".internal")

_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.?")
_AUTHORITY = re.compile(rf"(?:\[([0-9A-Fa-f:.]+)\]|({_HOST_NAME.pattern}|))(?::[0-9]{{0,5}})?")


def parse_authority(value: str) -> str:
    """The host in a Host header or an absolute target, in lower case; RequestError 400."""
    match = _AUTHORITY.fullmatch(value)
    if match:
        v6, name = match.groups()
        if name is not None:
            return str(name).rstrip(".").lower()
        with contextlib.suppress(ValueError):  # no address between the brackets
            return str(ipaddress.IPv6Address(v6))
    raise RequestError(400, f"Host {printable(value)!r} is malformed")


def check_host(host: str, allowed: Sequence[str]) -> None:
    """Is HOST a name of ours? Otherwise a page may have made its own name resolve to this machine
    (DNS rebinding), and reads our answers as if they were its own: 421."""
    own = socket.gethostname().lower().rstrip(".")
    bare = own.partition(".")[0]
    ours = [*_OWN_HOSTS, *allowed]
    if bare:
        ours += [own, bare, f"{bare}.local"]
    for name in ours:
        if host == name or (name.startswith(".") and host.endswith(name)):
            return
    with contextlib.suppress(ValueError):  # a name
        ipaddress.ip_address(host)
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
    known = pin.key or wanted.key
    if known:
        same = wanted.fits(known) and pin.fits(known)
    else:
        same = pin.fingerprint in ("", wanted.fingerprint)
    if not same:
        raise RequestError(403, f"this proxy signs with {pin.name} only, not with {wanted.name}: "
                                f"use that key, or change {pin.pinned}")  # fmt: skip
    return Wanted(known, wanted.fingerprint, pin.pinned, pin.comment)


def parse_kinds(text: str, env: Optional[Mapping[str, str]] = None) -> tuple[str, ...]:
    """Kinds of payload, as a setting, with ENV, or a leash names them; no error quotes a leash."""
    if text == "any":
        return KINDS
    kinds = tuple(map(str.strip, text.split(",")))
    if not set(kinds) <= set(KINDS[:-1]):
        shown = "" if env is None else f"{printable(text)!r}: "
        some = ", ".join(KINDS[:-1])
        raise ConfigError(f"{shown}payloads are any, or of {some}, separated by commas")
    return kinds


class Token(NamedTuple):
    """A line of the token file: who may come, and how long the leash is."""

    digest: bytes  # the token itself is not kept
    name: str
    key: str = ""  # the fingerprint of the only one
    payloads: tuple[str, ...] = ()  # empty: as set for all


_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750's b64token
_TOKEN_NAME = re.compile(r"[A-Za-z0-9._-]+")
# What somebody made up can be guessed; `token NAME` takes 43 characters of chance.
MIN_TOKEN = 16


def parse_leash(words: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The key and the payloads of a token's options, each of which may be missing; ConfigError."""
    if not all("=" in word for word in words):
        raise ConfigError("a word without = behind the name")
    options = dict(word.partition("=")[::2] for word in words)
    if len(options) < len(words):
        raise ConfigError("an option stands twice")
    if not options.keys() <= {"key", "payloads"}:
        raise ConfigError("another option than key= and payloads=")
    if "key" in options and not _FINGERPRINT.fullmatch(options["key"]):
        raise ConfigError("key= is no SHA256: fingerprint")
    payloads = parse_kinds(options["payloads"]) if "payloads" in options else ()
    return options.get("key", ""), payloads


def parse_token(line: str, number: int) -> Token:
    """TOKEN [NAME] [key=SHA256:…] [payloads=KINDS]; ConfigError, which quotes no token."""
    token, *words = re.split(r"[ \t]+", line.strip(" \t\r"))
    name = words.pop(0) if words and "=" not in words[0] else ""
    if not _TOKEN.fullmatch(token):
        raise ConfigError("its first word is no bearer token")
    if len(token) < MIN_TOKEN:
        raise ConfigError(f"a token of fewer than {MIN_TOKEN} characters can be guessed: "
                          f"`{PROGRAM} token NAME` makes a good one")  # fmt: skip
    if name and not _TOKEN_NAME.fullmatch(name):
        raise ConfigError("the name is not of letters, digits, '.', '_' and '-'")
    digest = hashlib.sha256(token.encode()).digest()
    return Token(digest, name or f"line {number}", *parse_leash(words))


def parse_tokens(text: str) -> list[Token]:
    """The token file; a ConfigError names the line."""
    tokens: dict[bytes, Token] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip(" \t\r") and not line.startswith("#"):
            try:
                token = parse_token(line, number)
                if token.digest in tokens:
                    raise ConfigError("the same token as before")
                tokens[token.digest] = token
            except ConfigError as e:
                raise ConfigError(f"line {number}: {e}") from e
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


def consent_prompt(payload: Payload, facts: Mapping[str, str]) -> str:
    """What the person is asked, one fact a line, what we know ourselves first. Only these lines
    begin with •: a screen may wrap a text such that it looks like another line."""
    what = f"this {payload.kind}"
    if payload.kind == "other":
        what = f"something that is no git commit, tag or push ({count(payload.size, 'byte')})"
    lines = [f"Sign {what}?", ""]
    for name, text in (*facts.items(), *payload.fields.items()):
        told = " ".join(text.replace("•", "-").split())
        if told:
            lines.append(f"• {name}: {printable(told, 80)}")
    return "\n".join(lines)


def boottime() -> float:
    """A clock that goes on in suspend: what was agreed to before a night is over after it."""
    if sys.platform == "win32":
        return time.monotonic()
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Consent:
    """Asks a person before each signature, one at a time, through an askpass program. A yes holds
    HOLD seconds for the same client, recognised kind, namespace and key."""

    def __init__(self, askpass: Upstream, hold: float, agents: Agents) -> None:
        self.askpass = askpass
        self.hold = hold
        self.agents = agents  # whose timeout counts for a person too
        self.lock = threading.Lock()
        self.agreed: dict[tuple[str, ...], float] = {}  # and until when

    def holds(self, what: tuple[str, ...]) -> bool:
        return boottime() < self.agreed.get(what, 0)

    def ask(self, payload: Payload, namespace: str, wanted: Wanted, peer: dict[str, str],
            token: Optional[Token], client: socket.socket) -> Wanted:  # fmt: skip
        """The very key that was shown, if the person agrees, or has agreed, to what PEER asks for;
        else 403. (Another one that the agent lists first by then has not been agreed to.)"""
        key = wanted.key
        if not key:
            with self.agents.exchange(client) as exchange:
                key = choose(list_keys(exchange), wanted).key
        who = peer.get("uid") or peer["peer"].rpartition(":")[0]
        names = [v if n == "peer" else f"{n} {v}" for n, v in peer.items()]
        if token:
            who = token.digest.hex()
            names.append(f"token {token.name}")
        seconds = 0 if payload.kind == "other" else self.hold
        scope = f"for {seconds:g} s, and every {payload.kind}" if seconds else ""
        facts = {"asked by": ", ".join(names), "key": key.name, "namespace": namespace,
                 "a yes holds": scope}  # fmt: skip
        prompt = consent_prompt(payload, facts)
        self.obtain(prompt, (who, payload.kind, namespace, key.line), seconds, client)
        return wanted._replace(key=key)

    def obtain(self, prompt: str, what: tuple[str, ...], seconds: float,
               client: socket.socket) -> None:  # fmt: skip
        """403 without a yes, as OpenSSH understands it; it holds SECONDS for the same WHAT."""
        if self.holds(what):
            return  # another's prompt may be open for long
        deadline = time.monotonic() + self.agents.timeout
        queue = Watch("the person, with another prompt,", deadline, client)
        try:
            while not self.lock.acquire(timeout=0.1):
                queue.wait(0)
            try:
                queue.wait(0)  # nobody is asked for a client that has left
                if not self.holds(what):
                    self.show(prompt, deadline, client)
                    self.agreed[what] = boottime() + seconds
            finally:
                self.lock.release()
        except (AgentError, AgentTimeout, AgentRefused) as e:
            raise RequestError(403, f"not confirmed: {e}") from e

    def show(self, prompt: str, deadline: float, client: socket.socket) -> None:
        """Shows PROMPT; AgentRefused unless the answer is a yes."""
        words = (*self.askpass.command, os.fsdecode(prompt.encode()))
        program = self.askpass._replace(command=words)
        try:
            with Exchange(program, deadline, client, self.agents.groups) as exchange:
                status, answer = exchange.result(1024)
        except ClientGone:
            time.sleep(1)  # or a click on its way to this prompt would hit the next
            raise
        first_line = re.split(b"[\r\n]", answer)[0]
        if status or first_line.lower() not in (b"", b"yes"):
            why = f"exit status {status}" if status else repr(printable(answer, 40))
            raise AgentRefused(f"the prompt was declined, or could not be shown ({why})")


# ----------------------------------------------------------------------------------- Hardening


class Step(NamedTuple):
    """A measure, and whether the system says that it took effect."""

    name: str
    in_force: bool
    state: str
    expected: bool = False  # not to be had on this system at all: told by check, not at each start


def process_facts(pid: str) -> dict[str, str]:
    """What Linux says of a process: /proc/PID/status, and the soft limits of /proc/PID/limits."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as f:
        facts = {name: value.strip() for name, _, value in (line.partition(":") for line in f)}
    with open(f"/proc/{pid}/limits", encoding="ascii") as f:
        facts.update({line[:26].rstrip(): line[26:].split()[0] for line in f})
    return facts


def _no_core(resource: Any) -> Step:
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    return Step("no core dumps", limits == (0, 0), f"RLIMIT_CORE {limits[0]}")


def _lock_memory(libc: Any, resource: Any, platform: str) -> Step:
    """Only without a limit: with a finite one mlockall succeeds, and later threads can't start."""
    import ctypes

    MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4  # the last is Linux's alone
    libc.mlockall.argtypes = [ctypes.c_int]
    libc.mlockall.restype = ctypes.c_int
    name, unlimited = "memory kept out of swap", resource.RLIM_INFINITY
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (unlimited, unlimited))
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != unlimited:
        return Step(name, False, f"RLIMIT_MEMLOCK is {limit >> 10} KiB, not unlimited")
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE | (MCL_ONFAULT if platform == "linux" else 0)):
        error = ctypes.get_errno()
        return Step(name, False, f"mlockall: {os.strerror(error)}", expected=error == errno.ENOSYS)
    if not os.path.exists("/proc/self/status"):
        return Step(name, True, "mlockall")
    locked = process_facts("self").get("VmLck", "0 kB")
    return Step(name, locked != "0 kB", f"VmLck {locked}")


def _harden_linux(libc: Any) -> list[Step]:
    import ctypes

    PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
    PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
    libc.prctl.argtypes = [ctypes.c_int, *4 * [ctypes.c_ulong]]
    libc.prctl.restype = ctypes.c_int

    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    dumpable = libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    no_new_privs = libc.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
    return [
        Step("no debugger, no reading of memory", dumpable == 0, f"PR_GET_DUMPABLE {dumpable}"),
        Step("no new privileges", no_new_privs == 1, f"PR_GET_NO_NEW_PRIVS {no_new_privs}"),
    ]


def _harden_macos(libc: Any) -> list[Step]:
    import ctypes

    PT_DENY_ATTACH = 31
    libc.ptrace.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    libc.ptrace.restype = ctypes.c_int

    # The system has no call that reads this one back: its answer is all there is.
    denied = libc.ptrace(PT_DENY_ATTACH, 0, None, 0)
    attach = "PT_DENY_ATTACH" if denied == 0 else f"ptrace: {os.strerror(ctypes.get_errno())}"
    return [Step("no debugger, no reading of memory", denied == 0, attach)]


def _harden_windows(kernel32: Any) -> list[Step]:
    """With the names of errhandlingapi.h, processthreadsapi.h and winnt.h."""
    import ctypes
    from ctypes.wintypes import BOOL, DWORD, HANDLE, UINT

    SEM_FAILCRITICALERRORS, SEM_NOGPFAULTERRORBOX = 0x0001, 0x0002
    # Of enum PROCESS_MITIGATION_POLICY. The structure of each is one DWORD, Flags, with these bits.
    ProcessStrictHandleCheckPolicy = 3
    RaiseExceptionOnInvalidHandleReference, HandleExceptionsPermanentlyEnabled = 1, 2
    ProcessExtensionPointDisablePolicy = 6
    DisableExtensionPoints = 1
    ProcessImageLoadPolicy = 10
    NoRemoteImages, NoLowMandatoryLabelImages = 1, 2
    PROCESS_MITIGATION_POLICY, PVOID, SIZE_T = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
    set_policy = kernel32.SetProcessMitigationPolicy
    get_policy = kernel32.GetProcessMitigationPolicy
    for function, restype, *argtypes in (
        (kernel32.SetErrorMode, UINT, UINT),
        (kernel32.GetErrorMode, UINT),
        (kernel32.GetCurrentProcess, HANDLE),
        (set_policy, BOOL, PROCESS_MITIGATION_POLICY, PVOID, SIZE_T),
        (get_policy, BOOL, HANDLE, PROCESS_MITIGATION_POLICY, PVOID, SIZE_T),
    ):
        function.restype, function.argtypes = restype, argtypes

    def mitigate(name: str, policy: int, flags: int) -> Step:
        wanted, found = DWORD(flags), DWORD()
        set_policy(policy, ctypes.byref(wanted), ctypes.sizeof(wanted))
        get_policy(kernel32.GetCurrentProcess(), policy, ctypes.byref(found), ctypes.sizeof(found))
        return Step(name, found.value & flags == flags, f"policy {policy} has {found.value:#x}")

    # No fault is reported to anyone, with a dump of the memory (see UnhandledExceptionFilter).
    kernel32.SetErrorMode(SEM_FAILCRITICALERRORS | SEM_NOGPFAULTERRORBOX)
    mode = kernel32.GetErrorMode()
    return [
        Step("no crash dumps", bool(mode & SEM_NOGPFAULTERRORBOX), f"GetErrorMode {mode:#x}"),
        mitigate("no extension points", ProcessExtensionPointDisablePolicy, DisableExtensionPoints),
        mitigate("no remote or low-integrity images", ProcessImageLoadPolicy,
                 NoRemoteImages | NoLowMandatoryLabelImages),
        # Last: from here on a handle that is none ends the process.
        mitigate("strict handle checks", ProcessStrictHandleCheckPolicy,
                 RaiseExceptionOnInvalidHandleReference | HandleExceptionsPermanentlyEnabled),
    ]  # fmt: skip


def harden(platform: str) -> list[Step]:
    """Takes from this process what it doesn't need. To be called before any secret is read."""
    if sys.platform == "win32":
        from ctypes import WinDLL

        return _harden_windows(WinDLL("kernel32"))
    systems = {"linux": _harden_linux, "darwin": _harden_macos}
    if platform not in systems:
        return []
    import ctypes
    import resource

    libc = ctypes.CDLL(None, use_errno=True)
    return [_no_core(resource), *systems[platform](libc), _lock_memory(libc, resource, platform)]


def confine(folders: Sequence[str]) -> Step:
    """Landlock (landlock(7)) for this thread and those that it starts from now on: no file written,
    made or removed, but for what is removed in FOLDERS and below; no program file started, no TCP
    port bound or connected to, no process outside signalled. Reading, what is open already and
    sockets in the file system go on. So does code: a program that needs no loader can be made in
    memory (memfd_create(2)), confined like this one."""
    import ctypes

    CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # on every architecture of today
    CREATE_RULESET_VERSION, RULE_PATH_BENEATH = 1, 1
    # LANDLOCK_ACCESS_FS_*, by the ABI that brought them: all but READ_FILE and READ_DIR.
    RIGHTS = {1: 0x1FF3, 2: 0x2000, 3: 0x4000, 5: 0x8000}
    REMOVE_FILE, BIND_CONNECT_TCP, SCOPE_SOCKET_SIGNAL = 0x20, 3, 3
    COVERED = {1: "no program file started, no file made", 3: "no file written",
               4: "no TCP connect or bind", 6: "no signal outside"}  # fmt: skip
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.argtypes = [ctypes.c_long, *4 * [ctypes.c_void_p]]  # each an int or bytes
    libc.syscall.restype = ctypes.c_long

    def call(number: int, *words: Union[int, bytes, None]) -> int:
        result = int(libc.syscall(number, *words, *(4 - len(words)) * [None]))
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    try:
        abi = call(CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
        rights = sum(bits for since, bits in RIGHTS.items() if since <= abi)
        net = BIND_CONNECT_TCP if abi >= 4 else 0
        scoped = SCOPE_SOCKET_SIGNAL if abi >= 6 else 0
        # struct landlock_ruleset_attr: an older kernel takes a longer one that ends in zeros.
        ruleset = call(CREATE_RULESET, struct.pack("=QQQ", rights, net, scoped), 24, 0)
        for folder in folders:
            beneath = os.open(folder, getattr(os, "O_PATH", 0))  # (0: only Linux has it)
            # struct landlock_path_beneath_attr
            call(ADD_RULE, ruleset, RULE_PATH_BENEATH, struct.pack("=Qi", REMOVE_FILE, beneath))
            os.close(beneath)
        call(RESTRICT_SELF, ruleset)
        os.close(ruleset)
    except OSError as e:
        why = {errno.ENOSYS: "this kernel has none", errno.EOPNOTSUPP: "not enabled at boot"}
        return Step("Landlock", False, why.get(e.errno or 0, f"forbidden here: {e.strerror}"))
    with contextlib.suppress(OSError):
        os.close(os.open(os.devnull, os.O_WRONLY))
        return Step("Landlock", False, "asked for, and yet a file could be written")
    covered = [what for since, what in COVERED.items() if since <= abi]
    return Step("Landlock", True, f"ABI {abi}: {', '.join(covered)}")


# -------------------------------------------------------------------------------------- Config

PREFIX = "SSH_AGENT_PROXY_"
MAX_FILE = 64 * 1024

Env = Mapping[str, str]
_T = TypeVar("_T")


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
    """PATH with ~ or %h/, $VAR, on Windows %VAR%, expanded: a systemd env file expands nothing."""
    home = env.get("HOME") or env.get("USERPROFILE") or os.path.expanduser("~")
    slash = r"[/\\]" if sys.platform == "win32" else "/"
    path = re.sub(f"^(~|%h){slash}", "$HOME/", path)
    try:
        if sys.platform == "win32":
            values = {name.upper(): value.replace("$", "$$") for name, value in env.items()}
            path = re.sub("%([^%]+)%", lambda found: values[found[1].upper()], path)
        return Template(os.path.expanduser(path)).substitute({**env, "HOME": home})
    except (KeyError, ValueError) as e:
        raise ConfigError(f"{printable(path)!r}: a variable is not set (a mere $ is $$)") from e


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        host = printable(self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


class UnixAddress(NamedTuple):
    path: str
    mode: int

    def __str__(self) -> str:
        return f"unix:{printable(self.path)}"


def parse_address(value: str, env: Env) -> Union[Address, UnixAddress]:
    """A port of a host, or a Unix socket."""
    unix = re.fullmatch(r"unix:([^?]*)(?:\?mode=(0?[0-7]{3}))?", value)
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\[\]:/\s]+)):([0-9]{1,5})", value)
    path = expand(unix[1], env) if unix else ""
    if unix and not hasattr(socket, "AF_UNIX"):
        raise ConfigError(f"{printable(value)!r}: no Unix sockets here (Windows): use HOST:PORT")
    if unix and path.startswith("/"):
        return UnixAddress(path, int(unix[2] or "600", 8))
    if match and int(match[3]) <= 65535:
        return Address(match[1] or match[2], int(match[3]))
    raise ConfigError(f"{printable(value)!r} is none of HOST:PORT, [V6]:PORT, unix:/path?mode=0660")


# In either spelling; and another machine's, which would pass for a Unix path.
_PIPE = re.compile(r"(?:\\\\\.\\(?i:pipe)\\|//\./(?i:pipe)/)([ !#-&(-.0-\[\]-~]{1,247})", re.ASCII)
_FOREIGN_PIPE = re.compile("//[^/]+/pipe(/|$)", re.IGNORECASE)


def parse_upstream(value: str, env: Env) -> Upstream:
    """A socket's path, a pipe, or a command."""
    pipe = _PIPE.fullmatch(value)
    shown = f"'{printable(value)}'"  # without a second backslash for each
    if sys.platform == "win32":
        if pipe:
            return Upstream(PIPES + pipe[1])
        raise ConfigError(f"{shown} does not work on Windows: write {PIPES}NAME, the name of a "
                          f"pipe of this machine, as in {WINDOWS_AGENT}")  # fmt: skip
    if pipe:
        if "microsoft" in os.uname().release.lower() or env.get("WSL_DISTRO_NAME"):
            return Upstream(PIPES + pipe[1], (POWERSHELL,), "Windows PowerShell for", env)
        raise ConfigError(f"{shown} is a pipe of Windows': it works there and on WSL2 alone")
    if value.startswith("exec:"):
        try:
            command = shlex.split(value[len("exec:") :])
        except ValueError as e:
            raise ConfigError(f"{printable(value)!r}: {e}") from e
        if not command or not command[0]:
            raise ConfigError(f"{printable(value)!r} is exec: without a command")
        return Upstream(command=(expand(command[0], env), *command[1:]))
    path = expand(value.removeprefix("unix:"), env)
    if not path.startswith("/") or _FOREIGN_PIPE.match(path):
        raise ConfigError(f"{shown} is none of an absolute path, {PIPES}NAME, exec:COMMAND")
    return Upstream(path)


def parse_pin(value: str, env: Optional[Env] = None) -> Listed:
    """The one authorized_keys line among comments and empty ones; no error quotes any of it."""
    lines = [line for line in value.splitlines() if line.strip()[:1] not in ("", "#")]
    if len(lines) != 1 and "PRIVATE KEY" not in value:
        raise ConfigError(f"one line with a public key is needed, {len(lines)} are there")
    return parse_key_line(value if "PRIVATE KEY" in value else lines[0])


def parse_confirm(value: str, env: Env) -> Upstream:
    """The askpass program, with the environment that tells it to ask for a yes."""
    if sys.platform == "win32":
        raise ConfigError(f"'{printable(value)}': no askpass program works on Windows")
    import shutil  # for this alone: it would cost every start

    program = shutil.which(expand(value, env), path=env.get("PATH", os.defpath))
    if not program:
        raise ConfigError(f"{printable(value)!r} is no program that can be run")
    return Upstream("", (program,), "askpass program", {**env, "SSH_ASKPASS_PROMPT": "confirm"})


def _open_at_once(path: str, flags: int) -> int:
    """For open(): a FIFO would be waited for. What it makes is the user's alone."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o600)


class File(NamedTuple):
    """A file that SETTING names; it is read each time anew."""

    path: str
    setting: str

    def read(self, parse: Callable[[str], _T], private: bool = False) -> _T:
        """PARSE of the text of a regular file of at most MAX_FILE bytes, which belongs to this user
        alone if it is PRIVATE; a ConfigError names setting and file."""
        try:
            with open(self.path, "rb", opener=_open_at_once) as f:
                found = os.fstat(f.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise ConfigError("not a regular file")
                if private and hasattr(os, "geteuid"):
                    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
                        raise ConfigError("it must be yours (chown), and only yours (chmod 600)")
                data = f.read(MAX_FILE + 1)
            if len(data) > MAX_FILE:
                raise ConfigError(f"larger than {MAX_FILE >> 10} KiB")
            fresh = 0 <= time.time() - found.st_mtime < 1
            being_written = private and fresh and not data.endswith(b"\n")
            if not being_written:
                return parse(data.decode("utf-8-sig", "replace"))
        except (OSError, ProxyError) as e:
            why = f"{e.strerror}" if isinstance(e, OSError) else f"{e}"
            if private and isinstance(e, FileNotFoundError):
                why += f" (`{PROGRAM} token NAME` makes it)"
            raise ConfigError(f"{self.setting}: can't use {printable(self.path)!r}: {why}") from e
        time.sleep(0.1)  # what is there may be half a token, or half a leash
        return self.read(parse, private)


class Option(NamedTuple):
    """A setting: its variable without SSH_AGENT_PROXY_, a row of --help, how it is read, or each of
    SEVERAL between commas (ProxyError, ValueError). One with a path only is a File."""

    variable: str
    default: str
    metavar: str
    help: str
    parse: Callable[[str, Env], Any]
    several: bool = False

    @property
    def field(self) -> str:
        return self.variable.lower()

    @property
    def flag(self) -> str:
        return "--" + self.field.replace("_", "-")


OPTIONS = (
    Option("ADDR", "127.0.0.1:7221", "HOST:PORT", "where to listen, or unix:/path; several are "
           "separated by commas; port 0 picks one", parse_address, several=True),
    Option("NAMESPACE", "git", "NAMES", "SSHSIG namespaces that may be signed, separated by "
           "commas; the first is the default", parse_namespace, several=True),
    Option("UPSTREAM", "", "AGENT", "the agent: its socket's /path, //./pipe/NAME, exec:COMMAND; "
           "unset: $SSH_AUTH_SOCK, else the first well-known one", parse_upstream),
    Option("PUBKEY", "", "LINE", "an authorized_keys line: sign with this key only", parse_pin),
    Option("PUBKEY_FILE", "", "FILE", "a file with that line, read at each request", expand),
    Option("TOKEN_FILE", "", "FILE", "bearer tokens, one of which every request needs", expand),
    Option("PAYLOADS", "any", "KINDS", "what may be signed: any, or of commit, tag, push",
           parse_kinds),
    Option("CONFIRM", "", "PROGRAM", "an askpass; it must agree to every signature", parse_confirm),
    Option("CONFIRM_FOR", "0", "SECONDS", "how long its yes holds for the same client and kind",
           lambda value, env: 0 if value == "0" else parse_seconds(value, env)),
    Option("ALLOWED_HOSTS", "", "NAMES", "further names that a Host header may carry, separated "
           "by commas, .suffix for all below it", parse_host, several=True),
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
        self.set_defaults(level=logging.INFO)
        loudness = self.add_mutually_exclusive_group()
        loudness.add_argument("-v", "--verbose", action="store_const", dest="level",
                              const=logging.DEBUG, help="debug lines in the log")
        loudness.add_argument("-q", "--quiet", action="store_const", dest="level",
                              const=AUDIT, help="warnings and audit lines")
        self.add_argument("--console", action="store_true", help=argparse.SUPPRESS)
        self.add_argument("--sign", action="store_true", help="with check: make a test signature")
        for option in OPTIONS:
            default = f" ({option.default})" if option.default else ""
            self.add_argument(option.flag, metavar=option.metavar, help=option.help + default)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{printable(message)} (see {PROGRAM} --help)")


def read_settings(env: Env, given: argparse.Namespace) -> dict[str, Any]:
    """What was set, by the names of Config's fields; ConfigError names the one that is wrong."""
    values: dict[str, Any] = {}
    for option in OPTIONS:
        name, text = PREFIX + option.variable, env.get(PREFIX + option.variable)
        if getattr(given, option.field):
            name, text = option.flag, getattr(given, option.field)
        text = text or option.default
        if not text:
            continue
        try:
            parts = map(str.strip, text.split(",")) if option.several else [text]
            parsed = tuple(option.parse(part, env) for part in parts)
        except (ProxyError, ValueError) as e:
            raise ConfigError(f"{name}: {e}") from e
        value: Any = parsed if option.several else parsed[0]
        values[option.field] = File(value, name) if option.parse is expand else value
    if given.pubkey_file and not given.pubkey:  # an option wins, over that variable too
        values.pop("pubkey", None)
    return values


def agent_of_session(env: Env) -> Optional[Upstream]:
    """The agent of SSH_AUTH_SOCK; on Windows its own where that is unset."""
    sock = env.get("SSH_AUTH_SOCK", "")
    with contextlib.suppress(ConfigError):  # in an env file it is nobody's but ours to expand
        sock = expand(sock, env)
    if sys.platform == "win32":
        with contextlib.suppress(ConfigError):  # whatever is no pipe is told once it is wanted
            return parse_upstream(sock or WINDOWS_AGENT, env)
    return Upstream(sock) if sock else None


class Config(NamedTuple):
    """Everything that was set. Nothing else reads the environment."""

    command: tuple[str, ...]
    level: int
    sign: bool  # with check
    journal_stream: str  # systemd's: what stderr is connected to
    notify_socket: str  # and where to tell it how we are
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
        values = {"upstream": agent_of_session(env), **read_settings(env, given)}
        known = {PREFIX + option.variable for option in OPTIONS}
        known |= {PREFIX + name for name in ("URL", "PUBKEY_URL", "CURL")}  # the shim's
        if "token_file" in values:
            known.add(PREFIX + "TOKEN")  # the shim's: without that file it protects nothing
        config = cls(
            command=tuple(given.command) or ("serve",),
            level=given.level,
            sign=given.sign,
            journal_stream=env.get("JOURNAL_STREAM", ""),
            notify_socket=env.get("NOTIFY_SOCKET", ""),
            sockets=well_known_sockets(
                sys.platform, expand("$HOME", env), env.get("XDG_RUNTIME_DIR", "")
            ),
            unknown=tuple(sorted(n for n in env if n.startswith(PREFIX) and n not in known)),
            **values,
        )
        config.check_together()
        return config

    def check_together(self) -> None:
        """Settings that are right one by one and can't be together; ConfigError."""
        for address in self.addr:
            if isinstance(address, UnixAddress) and address.mode & 0o077 and not self.token_file:
                raise ConfigError(f"{PREFIX}ADDR: '{address}?mode={address.mode:04o}' lets others "
                                  f"in, which needs a token: set {PREFIX}TOKEN_FILE")  # fmt: skip
        if self.confirm_for and not self.confirm:
            raise ConfigError(f"{PREFIX}CONFIRM_FOR: '{self.confirm_for:g}' seconds for the yes of "
                              f"a person whom nobody asks: set {PREFIX}CONFIRM too")  # fmt: skip
        self.pinned()  # a file that can't be read is a setting that is wrong

    def pinned(self, token: Optional[Token] = None) -> Wanted:
        """The key that alone signs, for TOKEN's client, if any."""
        pin, setting = self.pubkey, PREFIX + "PUBKEY"
        if self.pubkey_file and not pin:
            pin, setting = self.pubkey_file.read(parse_pin), self.pubkey_file.setting
        leash = token.key if token else ""
        if pin and leash in ("", pin.key.fingerprint):  # a key known whole saves a listing
            return Wanted(pin.key, "", setting, pin.comment)
        return Wanted(fingerprint=leash, pinned="the key= of this token") if leash else Wanted()

    def tokens(self) -> Sequence[Token]:
        """Those who may ask; none where everyone may."""
        return self.token_file.read(parse_tokens, private=True) if self.token_file else ()


# ----------------------------------------------------------------------------------- Listening


class Listener(NamedTuple):
    """A socket that listens, and what the log calls it."""

    socket: socket.socket
    name: str
    file: Optional[os.stat_result] = None  # a Unix socket's
    early: bool = False  # it waits for its address to become one of this machine's

    def close(self) -> None:
        with contextlib.suppress(OSError):
            # Closing alone leaves threads in accept, and they would take one more each.
            self.socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            path = self.socket.getsockname()
            # Before the close: no other file has this number yet.
            if self.file and os.path.samestat(self.file, os.lstat(path)):
                os.unlink(path)
        self.socket.close()


def listen_unix(address: UnixAddress) -> Listener:
    """A Unix socket, with its mode at once, in place of an ended program's; OSError."""
    if os.path.lexists(address.path):
        if not stat.S_ISSOCK(os.lstat(address.path).st_mode):
            raise OSError(errno.EEXIST, "it is there, and no socket")
        with socket.socket(AF_UNIX) as probe:
            probe.setblocking(False)
            if probe.connect_ex(address.path) != errno.ECONNREFUSED:  # whoever it is, it lives
                raise OSError(errno.EEXIST, "another program listens there")
        os.unlink(address.path)
    sock = socket.socket(AF_UNIX)
    umask = os.umask(0o777 & ~address.mode)
    try:
        sock.bind(address.path)
    finally:
        os.umask(umask)
    sock.listen(1024)
    return Listener(sock, str(address), os.lstat(address.path))


def listen_tcp(family: int, where: Any) -> Listener:
    """A socket at an address of getaddrinfo's; OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    if sys.platform == "win32":  # or any program could take the port as well, and the requests
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    early = False
    try:
        sock.bind(where)
    except OSError as e:
        early = sys.platform == "linux" and e.errno == errno.EADDRNOTAVAIL
        if not early:
            raise
        # IP_FREEBIND: an address that comes later (docker0, a VPN) can be listed from the start.
        sock.setsockopt(socket.IPPROTO_IP, 15, 1)
        sock.bind(where)
    sock.listen(1024)
    return Listener(sock, str(Address(*sock.getsockname()[:2])), early=early)


def listen(address: Union[Address, UnixAddress]) -> list[Listener]:
    """Listening sockets at ADDRESS, for a name at all it has; ProxyError where there is none."""
    listeners: list[Listener] = []
    try:
        if isinstance(address, UnixAddress):
            return [listen_unix(address)]
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        # A name may have an address twice: two lines in /etc/hosts do that.
        for family, where in dict.fromkeys((family, where) for family, _, _, _, where in found):
            try:
                listeners.append(listen_tcp(family, where))
            except OSError as e:
                if e.errno == errno.EADDRINUSE:
                    raise OSError(e.errno, f"port {address.port} is in use") from e
                if e.errno == errno.EACCES and sys.platform == "win32":
                    show = "netsh interface ipv4 show excludedportrange protocol=tcp"
                    text = f"Windows, or a program, keeps port {address.port} (`{show}` tells)"
                    raise OSError(e.errno, text) from e
                error = e  # it may be a name's other address, which this system has no use for
        if not listeners:
            raise error
    except (OSError, UnicodeError) as e:
        why = getattr(e, "strerror", "no such name") or e
        raise ProxyError(f"cannot listen on {address}: {why} (SSH_AGENT_PROXY_ADDR sets it)") from e
    return listeners


# ---------------------------------------------------------------------------------------- HTTP

MAX_HEAD = 16 * 1024
MAX_FIELDS = 100
MAX_LINE = 4096  # of a chunk's size
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

# RFC 9110 section 5.6.2 (token) and 5.5 (field-value), RFC 3986 (what a target is made of), and
# RFC 9112 section 3.2 (a path, also behind http:// and an authority).
_NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_CHAR = r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@?\[\]]|%[0-9A-Fa-f]{2})"
_TARGET = rf"(?! )(?:(?i:http)://({_CHAR}*))?(/(?:/|{_CHAR})*)?"
_REQUEST_LINE = re.compile(rf"({_NAME}) {_TARGET} HTTP/1\.([01])")
_FIELD = re.compile(rf"({_NAME}):([\t\x20-\x7e\x80-\xff]*)")
_CHUNK = re.compile(r"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")

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


def read_line(stream: BinaryIO, limit: int, what: str) -> str:
    """A line of at most LIMIT bytes off STREAM, a character for each, without its CR LF. A bare CR
    or LF is where two readers disagree on what a line is: RequestError 400."""
    line = stream.readline(limit)
    text = line[:-2]
    if line.endswith(b"\r\n") and b"\r" not in text:
        return text.decode("latin-1")
    if len(line) == limit:
        raise RequestError(431, f"{what} is too large")
    if b"\n" in line or b"\r" in line[:-1]:
        raise RequestError(400, f"a bare CR or LF in {what}")
    raise RequestError(400, f"the request ended inside {what}")


def read_fields(stream: BinaryIO, left: int, what: str) -> Iterator[tuple[str, str]]:
    """Field lines (RFC 9112 section 5), LEFT bytes at most: names in lower case, and values."""
    for _ in range(MAX_FIELDS + 1):
        line = read_line(stream, left, what)
        if not line:
            return
        left -= len(line) + 2
        match = _FIELD.fullmatch(line)
        if not match:
            name = re.split("[: \t]", line)[0]  # no more of it is told: the value may be secret
            raise RequestError(400, f"a malformed or folded header: {printable(name, 60)!r}")
        yield match[1].lower(), match[2].strip(" \t")
    raise RequestError(431, f"more than {MAX_FIELDS} fields in {what}")


def read_head(stream: BinaryIO) -> Head:
    """A head and the empty line behind it; RequestError 400 or 431. Strict where the standard
    library is lenient: whatever RFC 9112 lets a server refuse is refused."""
    what = "the request's head"
    first = read_line(stream, MAX_HEAD, what)
    match = _REQUEST_LINE.fullmatch(first)
    if not match:
        raise RequestError(400, f"no HTTP/1.1 request for a path: {printable(first, 60)!r}")
    method, authority, path, minor = match.groups()
    fields: dict[str, str] = {}
    for name, value in read_fields(stream, MAX_HEAD - len(first) - 2, what):
        if name in fields and name in _SINGLE:
            raise RequestError(400, f"header {name!r} stands twice")
        fields[name] = value

    if minor == "1" and "host" not in fields:
        raise RequestError(400, "HTTP/1.1 without a Host header")
    hosts = [parse_authority(h) for h in (fields.get("host"), authority) if h is not None]
    if minor == "1" and fields.get("expect", "100-continue").lower() != "100-continue":
        raise RequestError(400, f"Expect {printable(fields['expect'], 60)!r} can't be met")

    coding, length = fields.get("transfer-encoding"), fields.get("content-length")
    if coding is not None and (length is not None or minor == "0" or coding.lower() != "chunked"):
        raise RequestError(400, "Transfer-Encoding: only chunked, in HTTP/1.1, without a length")
    if length is not None and not re.fullmatch("[0-9]+", length):
        raise RequestError(400, f"Content-Length {printable(length, 60)!r} is no number")
    # Python refuses to read numbers of thousands of digits; 19 are too many bytes already.
    size = None if length is None else int(length.lstrip("0")[:19] or "0")
    return Head(method, path or "/", int(minor), tuple(hosts), fields, size, coding is not None)


def chunk_sizes(stream: BinaryIO) -> Iterator[int]:
    """A body's chunk sizes (RFC 9112 7.1), each read off STREAM before the next; 400, 413, 431."""
    total = 0
    while True:
        line = read_line(stream, MAX_LINE, "a chunk's size")
        match = _CHUNK.fullmatch(line)
        if not match:
            raise RequestError(400, f"a malformed chunk size: {printable(line, 60)!r}")
        size = int(match[1], 16)
        if not size:
            break
        total += size
        if total > MAX_BODY:
            raise RequestError(413, "more than 1 GiB to sign")
        yield size
        if stream.read(2) != b"\r\n":
            raise RequestError(400, "a chunk is not of the size announced")
    list(read_fields(stream, MAX_HEAD, "the trailer"))  # it means nothing here


class Answer(NamedTuple):
    status: int
    content_type: str
    body: bytes
    fields: tuple[tuple[str, str], ...] = ()


def plain(status: int, text: str, *fields: tuple[str, str]) -> Answer:
    return Answer(status, "text/plain; charset=utf-8", (text + "\n").encode(), fields)


RETRY = ("Retry-After", "1")
BUSY = plain(503, "busy: too many requests at once, try again", RETRY)

# The one place where kinds of errors become statuses; all others are 503.
STATUSES: dict[type[ProxyError], int] = {
    WireError: 502,
    AgentTimeout: 504,
    AgentRefused: 403,
    KeyNotHeld: 404,
    ClientGone: 400,
}


def read_shim() -> bytes:
    """shim.sh from beside this file or from the same zip; 404 where only this file was copied."""
    try:
        path = os.path.join(os.path.dirname(os.path.realpath(__file__)), "shim.sh")
        return bytes(globals()["__loader__"].get_data(path))
    except OSError as e:
        raise RequestError(404, "no shim.sh here: copy it too, from where this program came") from e


class Client(io.RawIOBase):
    """A client's connection, as a stream of what it sends; every wait for that is bounded."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.since = time.monotonic()  # when its last byte came
        self.limit = self.since + HEAD_SECONDS
        self.gap: float = GAP_SECONDS  # 0: what is here now, or nothing; less: no more is read
        self.begun = False  # it has sent something

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Optional[int]:
        """None where nothing is here and gap is 0; RequestError 408, ClientGone."""
        begin = time.monotonic()
        while True:
            left = min(self.limit, begin + self.gap) - time.monotonic()
            if left <= 0 and self.gap:
                raise RequestError(408, "the request took too long to arrive")
            try:
                self.socket.settimeout(max(0, min(left, CLIENT_LOOK)))
                size = self.socket.recv_into(buffer)
                break
            except BlockingIOError:
                return None
            except OSError as e:
                if e.errno:  # else it is time to look at the gap: on Windows nothing wakes us
                    raise ClientGone(f"the connection broke: {e.strerror or e}") from e
        self.since = time.monotonic()
        self.begun = self.begun or size > 0
        return size


def peer_fields(sock: socket.socket, address: Any) -> dict[str, str]:
    """Who is at the other end, as the kernel shows it: an address, or a Unix socket's process."""
    if sys.platform == "win32" or sock.family != AF_UNIX:
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

    def __init__(self, connection: socket.socket, proxy: "Server") -> None:
        self.connection = connection
        self.proxy = proxy
        self.accepted = time.monotonic()
        self.client = Client(connection)
        self.stream = io.BufferedReader(self.client, BUFFER // 4)
        # Both change under the server's lock, as does what has a place there.
        self.claimed = False  # it is read whole, and keeps its place until it is answered
        self.answered = False  # by one thread, or about to be: no other does
        self.whole = False  # all that belongs to the request has been read
        self.token: Optional[Token] = None
        self.payload: Optional[Payload] = None
        # What the log says beyond the answer's status and text.
        self.peer: dict[str, str] = {}
        self.outcome = ""
        self.reason = ""
        self.noted: dict[str, str] = {}  # what is known of the request, in the order of its checks

    def handle(self, address: Any) -> None:
        self.peer = peer_fields(self.connection, address)
        if not self.proxy.admit(self):
            if self.has_sent(0.1):  # one that sends nothing is told too, and is no line in the log
                self.record(BUSY)
            self.send(BUSY)
            self.part()
            return
        answer = self.answer()
        if not self.proxy.claim(self):
            answer = BUSY
        if self.client.begun:  # without a request there is no answer
            self.conclude(answer)
            self.part()

    def conclude(self, answer: Answer) -> None:
        """Gives ANSWER, unless another thread has: it took the place, or ends the proxy."""
        with self.proxy.lock:
            answered = self.answered
            self.answered = True
        if not answered:
            self.record(answer)
            self.send(answer)

    def answer(self) -> Answer:
        """What the client gets, errors included."""
        try:
            return self.decide()
        except ConfigError as e:  # where a file of ours is, and what is in it, is for the log alone
            self.reason = str(e)
            setting = self.reason.partition(":")[0]
            return plain(503, f"the file of {setting} can't be used: the proxy's log says why")
        except ProxyError as e:
            status = e.status if isinstance(e, RequestError) else STATUSES.get(type(e), 503)
            if isinstance(e, ClientGone):
                self.outcome = "gone"
            return plain(status, str(e), *getattr(e, "fields", ()))
        except Exception as e:  # a fault of ours must not take the thread with it
            LOG.error("internal error: %s: %s", type(e).__name__, printable(str(e)))
            LOG.debug("where it happened", exc_info=True)
            return plain(500, "internal error: the proxy's log says more")

    def has_sent(self, seconds: float = 0) -> bool:
        """Are there bytes that we have not read? Then it is not the client that is waited for."""
        return bool(select.select([self.connection], [], [], seconds)[0])

    def end_silence(self) -> bool:
        """Ends a connection without a request; what comes this moment is still read."""
        if self.client.begun or self.has_sent():
            return False
        self.client.gap = 0
        if sys.platform != "win32":  # there it wakes nobody, and what comes could not be read
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RD)
        return True

    def read_body(self, head: Head, hash_algorithm: str) -> tuple[bytes, Payload]:
        """The digest of the body, hashed as it arrives, and what it is."""
        if head.minor and "expect" in head.fields:
            with contextlib.suppress(OSError):  # it went away: reading will tell
                self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        hasher = hashlib.new(hash_algorithm)
        total, nul, kept = 0, False, bytearray()
        for left in chunk_sizes(self.stream) if head.chunked else [head.length or 0]:
            total += left
            while left:
                piece = self.stream.read1(min(left, BUFFER))
                if not piece:
                    raise RequestError(400, "the request ended inside its body")
                hasher.update(piece)
                nul = nul or b"\0" in piece
                kept += piece[: KEPT - len(kept)]
                left -= len(piece)
        if not total:
            raise RequestError(400, "an empty body: there is nothing to sign")
        self.payload = parse_payload(bytes(kept), total, nul)
        self.whole = True
        self.noted.update(kind=self.payload.kind, digest=f"{hash_algorithm}:{hasher.hexdigest()}")
        return hasher.digest(), self.payload

    def decide(self) -> Answer:
        """The answer, or why there is none: in the order of what costs least."""
        start = self.stream.peek(5)[:5]
        if start == b"HEAD ":
            self.noted["method"] = "HEAD"  # now, for errors in its head are answered likewise
        if start[:1] == b"\x16":
            raise RequestError(400, "this is TLS: use http://, not https://")
        head = read_head(self.stream)
        self.client.limit = self.accepted + REQUEST_SECONDS
        # A POST may bring a body that it does not announce.
        self.whole = not head.chunked and not head.length and head.method != "POST"
        path = head.path.partition("?")[0]  # what is behind it may be a secret
        self.noted.update(method=head.method, path=path)
        for host in head.hosts:
            check_host(host, self.proxy.config.allowed_hosts)
        check_browser(head.fields)
        if head.path not in self.ROUTES:
            raise RequestError(404, f"no path but {', '.join(self.ROUTES)}, without a query")
        methods, needs_token, answer = self.ROUTES[head.path]
        if head.method not in methods.split(", "):
            raise RequestError(405, f"{head.path} takes {methods}", ("Allow", methods))
        if needs_token:
            token = self.find_token(head)
            if token:
                self.noted["token"] = token.name
                self.proxy.share(self, token)
        return answer(self, head)

    def find_token(self, head: Head) -> Optional[Token]:
        """The token that the request holds, None where none is needed; 401."""
        tokens = self.proxy.config.tokens()
        return check_token(head.fields.get("authorization"), tokens) if tokens else None

    def answer_sign(self, head: Head) -> Answer:
        namespace, hash_algorithm, wanted = self.choices(head)
        if not head.chunked and head.length is None:
            raise RequestError(411, "a body with Content-Length or chunked is needed")
        if head.length and head.length > MAX_BODY:
            raise RequestError(413, "more than 1 GiB to sign")
        digest, payload = self.read_body(head, hash_algorithm)
        check_payload(payload, (self.token and self.token.payloads) or self.proxy.config.payloads)
        if not self.proxy.claim(self):
            return BUSY
        if self.proxy.consent:
            who = (self.peer, self.token, self.connection)
            wanted = self.proxy.consent.ask(payload, namespace, wanted, *who)
        if self.find_token(head) != self.token:
            raise RequestError(403, "the line of this token was changed meanwhile: try again")
        with self.proxy.agents.exchange(self.connection) as exchange:
            key, block = request_signature(exchange, wanted, namespace, hash_algorithm, digest)
        self.outcome = "signed"
        self.noted["key"] = key.fingerprint
        if finished := payload.object_id(block):
            self.noted["id"] = finished
        return Answer(200, "application/x-ssh-signature", block)

    def answer_publickey(self, head: Head) -> Answer:
        wanted = self.choices(head)[2]
        if not self.proxy.claim(self):
            return BUSY
        with self.proxy.agents.exchange(self.connection) as exchange:
            listed = choose(list_keys(exchange), wanted)
        self.noted["key"] = listed.key.fingerprint
        line = f"{listed.key.line} {printable(listed.comment)}".rstrip()
        return plain(200, line, ("Cache-Control", "no-cache"))

    # Methods, whether a token is needed where there are any, and what answers.
    ROUTES: dict[str, tuple[str, bool, Callable[["Handler", Head], Answer]]] = {
        "/sign": ("POST", True, answer_sign),
        "/publickey": ("GET, HEAD", True, answer_publickey),
        "/healthz": ("GET, HEAD", False, lambda *_: plain(200, "ok")),
        "/shim": ("GET, HEAD", False, lambda *_: Answer(200, "text/x-shellscript", read_shim())),
    }

    def choices(self, head: Head) -> tuple[str, str, Wanted]:
        """Namespace, hash algorithm and key, by the request's SSHSIG-* fields and the settings."""
        config, fields = self.proxy.config, head.fields
        namespace = choose_namespace(fields.get("sshsig-namespace"), config.namespace)
        self.noted["namespace"] = namespace
        hash_algorithm = fields.get("sshsig-hash", HASHES[0])
        if hash_algorithm not in HASHES:
            named = printable(hash_algorithm, 60)
            raise RequestError(400, f"SSHSIG-Hash {named!r}: neither {' nor '.join(HASHES)}")
        pin = config.pinned(self.token)
        return namespace, hash_algorithm, choose_key(fields.get("sshsig-key"), pin)

    def record(self, answer: Answer) -> None:
        """The log's line, before the answer: no signature leaves that is not on record."""
        usual = {2: "served", 4: "refused", 5: "failed"}[answer.status // 100]
        outcome = self.outcome or ("busy" if RETRY in answer.fields else usual)
        ms = round(1000 * (time.monotonic() - self.accepted))
        line = {"outcome": outcome, "status": f"{answer.status}", **self.peer, "ms": f"{ms}"}
        line |= self.noted
        if self.payload:
            line |= {n: v for n, v in self.payload.fields.items() if n in NOTED}
        if answer.status >= 400:
            line["reason"] = self.reason or answer.body.decode().rstrip("\n")
        words = [f"{name}={quoted(value, NOTED.get(name, 1000))}" for name, value in line.items()]
        LOG.log(logging.INFO if outcome == "served" else AUDIT, "%s", " ".join(words))

    def send(self, answer: Answer) -> None:
        status, content_type, body, fields = answer
        when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        head = (f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\n"
                f"Server: {PROGRAM}/{VERSION}\r\nDate: {when}\r\n"
                f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n")  # fmt: skip
        head += "".join([f"{name}: {value}\r\n" for name, value in fields]) + "\r\n"
        if self.noted.get("method") == "HEAD":
            body = b""
        with contextlib.suppress(OSError):  # it went away: the log has what it would have got
            self.connection.settimeout(ANSWER_SECONDS)
            self.connection.sendall(head.encode() + body)
            # Here, not at the close: a client that reads to the end need not wait for what is left.
            self.connection.shutdown(socket.SHUT_WR)

    def part(self) -> None:
        """Lets the answer reach a client still sending: unread bytes would have it thrown away."""
        self.client.limit = time.monotonic() + LINGER_SECONDS
        self.client.gap = 0
        with contextlib.suppress(ProxyError):
            if self.whole and not self.stream.peek(1):
                return
            self.client.gap = LINGER_GAP
            self.proxy.linger(self)
            while self.stream.read1(BUFFER // 4):
                pass


class Server:
    """Threads that wait in accept, each a whole connection at a time; one more is started when the
    last free one takes a connection. At most PLACES requests have a place at once."""

    def __init__(self, config: Config, agents: Agents, listeners: Sequence[Listener]) -> None:
        self.config = config
        self.agents = agents
        self.listeners = listeners
        self.consent = config.confirm and Consent(config.confirm, config.confirm_for, agents)
        self.lock = threading.RLock()
        self.threads = dict.fromkeys(listeners, 0)
        self.free = dict.fromkeys(listeners, 0)  # those waiting in accept
        self.places: set[Handler] = set()
        self.lingering: dict[Handler, None] = {}  # in the order in which they came
        self.stopping = False

    def start_thread(self, listener: Listener) -> None:
        with self.lock:
            # Those beyond what can have a place or linger are about to be free.
            if self.threads[listener] < PLACES + LINGERERS + SPARE_THREADS:
                try:
                    threading.Thread(target=self.work, args=(listener,), daemon=True).start()
                    self.threads[listener] += 1
                    self.free[listener] += 1
                except RuntimeError as e:  # the system has no more: those that are there go on
                    LOG.warning("cannot start another thread: %s", e)

    def work(self, listener: Listener) -> None:
        while not self.stopping:
            try:
                connection, address = listener.socket.accept()
            except OSError as e:
                if not (self.stopping or isinstance(e, ConnectionError)):  # already reset
                    LOG.error("cannot take a connection on %s: %s", listener.name, e.strerror)
                    time.sleep(0.1)  # no file descriptors, say: a tight loop would not help
                continue
            with self.lock:
                self.free[listener] -= 1
                if not self.free[listener]:
                    self.start_thread(listener)
            handler = Handler(connection, self)
            try:
                if not self.stopping:
                    handler.handle(address)
            except Exception as e:  # noqa: BLE001  it must not take the thread with it
                LOG.error("internal error: %s: %s", type(e).__name__, printable(str(e)))
            finally:
                with self.lock:
                    self.places.discard(handler)
                    self.lingering.pop(handler, None)
                    self.free[listener] += 1
                connection.close()

    def admit(self, handler: Handler) -> bool:
        """A place for HANDLER's connection; False where all requests are read whole."""
        with self.lock:
            if len(self.places) >= PLACES and not self.make_room():
                return False
            self.places.add(handler)
            return True

    def make_room(self) -> bool:
        """Takes the place of the connection that has kept us waiting longest for its own bytes."""
        waiting = [handler for handler in self.places if not handler.claimed]
        if not waiting:
            return False
        victim = min(waiting, key=lambda handler: (handler.has_sent(), handler.client.since))
        # While we hold the lock, its own thread neither answers nor closes.
        self.places.remove(victim)
        victim.client.gap = -1  # nothing more of the request is read
        if not victim.end_silence():
            victim.conclude(BUSY)
            self.linger(victim)
        return True

    def share(self, handler: Handler, token: Token) -> None:
        """HANDLER's client has TOKEN: 503 where that holds its share of the places already."""
        with self.lock:
            tokens = [other.token.digest for other in self.places if other.token]
            if tokens.count(token.digest) >= PLACES // 2:
                raise RequestError(503, "busy: too many requests of this token, try again", RETRY)
            handler.token = token

    def claim(self, handler: Handler) -> bool:
        """Has HANDLER still its place? From now on that is safe: what takes time is ours."""
        with self.lock:
            handler.claimed = handler in self.places and not handler.answered
            return handler.claimed

    def linger(self, handler: Handler) -> None:
        """HANDLER is answered and gives its place back; it reads on until its client is done."""
        with self.lock:
            self.places.discard(handler)
            self.lingering[handler] = None
            if len(self.lingering) > LINGERERS:
                oldest = next(iter(self.lingering))
                del self.lingering[oldest]
                oldest.client.gap = -1
                with contextlib.suppress(OSError):
                    oldest.connection.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """No further connections, and an end to those on which no request has begun."""
        self.stopping = True
        for listener in self.listeners:
            listener.close()
        with self.lock:
            for handler in self.places:
                handler.end_silence()

    def give_up(self) -> None:
        """Before the process ends: what it has not finished is on record, and its client told."""
        with self.lock:
            for handler in self.places:
                if handler.client.begun:
                    handler.conclude(plain(503, "the proxy is about to end"))


# ------------------------------------------------------------------------------------- Service

DRAIN_SECONDS = 10
CLOSE_SECONDS = 4  # of the 5 that Windows gives to a closed console
READY_SECONDS = 5  # that a service manager is waited for which is too busy to hear of READY=1

# sd-daemon(3): what the journal takes as a line's priority.
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, AUDIT: 5, logging.WARNING: 4, logging.ERROR: 3}


def is_journal(stream: str) -> bool:
    """STREAM is JOURNAL_STREAM: stderr's device and inode, as systemd gives it, if it is that."""
    found = os.fstat(2)
    return stream == f"{found.st_dev}:{found.st_ino}"


class OneLine(logging.Formatter):
    """Each record is one line, whatever is in it: a traceback's line breaks become escapes."""

    def __init__(self, layout: str = "%(asctime)s %(levelname)s %(message)s") -> None:
        super().__init__(layout, "%Y-%m-%dT%H:%M:%S%z")

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), StderrHandler.MAX_LINE)

    def formatException(self, ei: Any) -> str:
        return super().formatException(ei)[-3000:]  # where it happened, and what


class StderrHandler(logging.Handler):
    """The log on stderr: what would have to wait is dropped and counted, but see emit()."""

    # What a pipe that can be written to takes whole and at once (pipe(7), PIPE_BUF).
    MAX_LINE = 4096

    def __init__(self, journal_stream: str) -> None:
        super().__init__()
        self.journal = is_journal(journal_stream)
        self.setFormatter(OneLine("%(message)s") if self.journal else OneLine())
        self.lost = 0
        self.cut = b""  # what ends the last line, where a terminal took only part of it
        self.stalled = False  # nobody reads: even a signature's line was waited for in vain
        self.fd = 2
        if sys.platform == "win32":
            return
        with contextlib.suppress(OSError):
            # A stopped terminal takes part of a line and then waits: opened for us alone, it won't.
            self.fd = os.open(os.ttyname(2), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if self.lost:
            line = f"({self.lost} lines before this one could not be written) {line}"
        if self.journal:
            line = f"<{PRIORITIES[record.levelno]}>{line}"
        data = self.cut + line.encode("utf-8", "backslashreplace")[: self.MAX_LINE - 2] + b"\n"
        # Whoever floods the log with refusals must not push a signature out of it.
        signed = record.levelno == AUDIT and record.message.startswith("outcome=signed ")
        written = self.write(data, 0.5 if signed and not self.stalled else 0)
        if not written:
            self.stalled = self.stalled or signed
            self.lost += 1
            return
        self.stalled = False
        self.lost = 0 if written == len(data) else 1
        self.cut = b"\n" * self.lost

    def write(self, data: bytes, patience: float) -> int:
        """How many bytes were taken within PATIENCE seconds."""
        with contextlib.suppress(OSError):  # closed: there is nobody to tell
            if select.select([], [self.fd], [], patience)[1]:
                return os.write(self.fd, data)
        return 0


class WindowsHandler(StderrHandler):
    """The same by a thread: Windows can't say if a write would wait, as while text is selected."""

    def __init__(self, journal_stream: str) -> None:
        import queue  # for Windows alone

        super().__init__(journal_stream)
        self.lines: Any = queue.Queue(64)  # each with an event, for when it is written
        self.late = False  # one was waited for in vain, and none has been written since
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self) -> None:
        line = b"\n"
        while line:
            line, done = self.lines.get()
            # (Opened, for that is how a console takes UTF-8.)
            with contextlib.suppress(OSError), open(self.fd, "wb", 0, closefd=False) as stderr:
                stderr.write(line)
            self.late = False
            done.set()

    def write(self, data: bytes, patience: float) -> int:
        import queue

        done = threading.Event()
        deadline = time.monotonic() + patience
        with contextlib.suppress(queue.Full):
            self.lines.put((data, done), timeout=0 if self.late else patience)
            if patience and not self.late:
                self.late = not done.wait(deadline - time.monotonic())
            return len(data)
        return 0

    def close(self) -> None:
        """At the program's end: what is on its way has half a second more."""
        self.write(b"", 0.5)
        self.thread.join(0.5)
        super().close()


def start_log(level: int, handler: logging.Handler) -> None:
    """From now on what LEVEL lets through is HANDLER's, each record a line (OneLine)."""
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # never shown
    logging.addLevelName(AUDIT, "AUDIT")
    logging._srcfile = None  # nor where a line comes from
    LOG.propagate = False
    LOG.setLevel(level)
    LOG.handlers[:] = [handler]
    # A fault of ours that ends a thread is one line as well.
    sys.excepthook = lambda *fault: LOG.error("internal error", exc_info=fault)
    threading.excepthook = lambda fault: LOG.error("internal error", exc_info=fault.exc_value)


class ServiceManager:
    """Whom we tell our state (sd_notify(3)); PATH is its NOTIFY_SOCKET, "" where there is none."""

    def __init__(self, path: str) -> None:
        self.told = ""  # what it knows
        self.socket: Optional[socket.socket] = None
        if not path or sys.platform == "win32":
            return
        sock = socket.socket(AF_UNIX, socket.SOCK_DGRAM)
        try:
            # Now: under Landlock no abstract one can be connected to any more.
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            self.socket = sock
        except OSError as e:
            LOG.warning("the service manager can't be told: NOTIFY_SOCKET %s: %s", quoted(path), e)
            sock.close()

    def tell(self, state: str, patience: float = 0) -> None:
        """Where its queue is full it is waited for, PATIENCE seconds; signing can't wait for it."""
        if self.socket is None or state == self.told:
            return
        # (A timeout is the object's, and one thread's patience is not another's.)
        with contextlib.suppress(OSError), self.socket.dup() as sock:  # full still, or it has gone
            sock.settimeout(patience)
            sock.send(state.encode())
            self.told = state


def console_event(event: int) -> bool:
    """What happens to our console (HandlerRoutine, consoleapi.h), in a thread of Windows' own. As
    soon as this returns from any but the first two the process is ended, and after 5 s anyway."""
    CTRL_C_EVENT, CTRL_BREAK_EVENT = 0, 1
    if event in (CTRL_C_EVENT, CTRL_BREAK_EVENT):
        signal.raise_signal(signal.SIGINT)
    else:  # CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT
        signal.raise_signal(signal.SIGTERM)
        time.sleep(5)  # the program ends meanwhile
    return True


def catch_signals() -> socket.socket:
    """SIGTERM and SIGINT, wherever the system delivers them, as bytes to wait for."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    if sys.platform == "win32":
        import ctypes

        kernel32 = ctypes.WinDLL("kernel32")
        HandlerRoutine = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_ulong)  # BOOL, DWORD
        kernel32.SetConsoleCtrlHandler.argtypes = [HandlerRoutine, ctypes.c_int]
        kernel32.SetConsoleCtrlHandler.restype = ctypes.c_int
        routine = HandlerRoutine(console_event)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(routine))  # as long as the process lives
        kernel32.SetConsoleCtrlHandler(routine, True)
    return receiver


# ------------------------------------------------------------------------------------ Commands

COMMANDS = {
    "serve": "run the proxy in the foreground (also without a command)",
    "check": "what would sign, where, how well guarded, and what is wrong",
    "token NAME [LEASH]": "add a token to the token file, print it; LEASH: payloads=tag key=...",
    "shim": "print shim.sh, the container's side",
}


def raise_file_limit() -> None:
    """Room for every place's connection and agent: macOS starts with 256 file descriptors."""
    if sys.platform == "win32":  # it has no such limit
        return
    import resource

    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 8 * PLACES if hard == resource.RLIM_INFINITY else min(8 * PLACES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def output(data: bytes) -> int:
    """Writes DATA, and what argparse has left, to standard output; ProxyError where it can't be."""
    if sys.stdout is None:
        raise ProxyError("cannot write to standard output: it is closed")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except OSError as e:
        del sys.stdout  # or Python would try again at its end, and complain
        raise ProxyError(f"cannot write to standard output: {e.strerror}") from e
    return 0


# What serve logs at its start and check prints: a level of logging, and a line.
Finding = tuple[int, str]
MARKS = {10: "ok  ", 20: "ok  ", 30: "warn", 40: "FAIL"}
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  Windows connects to none of them
WAYS_OUT = "; SSH_AGENT_PROXY_UPSTREAM or SSH_AUTH_SOCK names the agent, ssh-add adds keys to it"


def weak_settings(config: Config) -> Iterator[Finding]:
    """What is set and may not be meant."""
    for name in config.unknown:
        yield logging.WARNING, f"{printable(name)} is set, but is no setting of this program"
    for address in config.addr:
        if isinstance(address, UnixAddress) or config.token_file:
            continue
        with contextlib.suppress(OSError, UnicodeError):  # no such name, which listen() tells
            found = {where[0] for *_, where in socket.getaddrinfo(*address)}
            if not all(ipaddress.ip_address(host).is_loopback for host in found):
                yield logging.WARNING, (
                    f"{address} is not a loopback address: whoever reaches it can have anything "
                    "signed (SSH_AGENT_PROXY_TOKEN_FILE asks for a token)"
                )
    if config.confirm_for and not config.token_file:
        if any(isinstance(address, Address) for address in config.addr):
            yield logging.WARNING, (
                "a person's yes holds for everyone on this machine (SSH_AGENT_PROXY_CONFIRM_FOR): "
                "SSH_AGENT_PROXY_TOKEN_FILE tells clients apart"
            )


def sign_findings(config: Config, agents: Agents) -> Iterator[Finding]:
    """A test signature, made as for a container, and verified by ssh-keygen."""
    import subprocess
    import tempfile

    payload, namespace = b"a test signature\n", config.namespace[0]
    digest = hashlib.new(HASHES[0], payload).digest()
    try:
        with agents.exchange() as exchange:
            key, block = request_signature(exchange, config.pinned(), namespace, HASHES[0], digest)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "sig")
            with open(path, "wb") as f:
                f.write(block)
            argv = ("ssh-keygen", "-Y", "check-novalidate", "-n", namespace, "-s", path)
            done = subprocess.run(argv, input=payload, capture_output=True, timeout=10, check=False)
        said = printable((done.stdout or done.stderr).strip())
        level = logging.ERROR if done.returncode else logging.INFO
        yield level, f"test signature by {key.name}: {said}"
    except ProxyError as e:
        yield logging.ERROR, f"no test signature: {e}"
    except (OSError, subprocess.SubprocessError) as e:
        yield logging.WARNING, f"test signature: made, and not verified: {printable(str(e))}"


def agent_findings(config: Config, agents: Agents) -> Iterator[Finding]:
    """Which agent and which key: or why there is none, which may be mended any time."""
    try:
        wanted = config.pinned()
        with agents.exchange() as exchange:
            yield logging.DEBUG, f"asking the {exchange.upstream}"
            listed = list_keys(exchange)
            for found, comment in listed:
                line = f"it holds {found.type} {found.name} {printable(comment)}"
                yield logging.DEBUG, line.rstrip()
            key = choose(listed, wanted).key
    except ProxyError as e:
        ways_out = "" if type(e) is not AgentError or "SSH_AGENT_PROXY_" in str(e) else WAYS_OUT
        yield logging.ERROR, f"/sign can't work yet: {e}{ways_out}"
        return
    why = f", pinned by {wanted.pinned}" if wanted.pinned else " unless another is named"
    yield logging.INFO, f"signing with {key.name}{why}"
    if len(listed) > 1 and not wanted.pinned:
        several = f"the agent holds {len(listed)} keys and none is pinned"
        yield logging.WARNING, f"{several}: SSH_AGENT_PROXY_PUBKEY pins one"
    if config.sign:
        yield from sign_findings(config, agents)


def lock_in(config: Config) -> list[Step]:
    """The last step of hardening: from here on nothing can be opened to write, nor be started."""
    if sys.platform != "linux":
        return []
    if config.upstream and config.upstream.command:
        return [Step("Landlock", False, "SSH_AGENT_PROXY_UPSTREAM runs a program")]
    if config.confirm:
        return [Step("Landlock", False, "SSH_AGENT_PROXY_CONFIRM runs a program")]
    folders = [os.path.dirname(a.path) for a in config.addr if isinstance(a, UnixAddress)]
    return [confine([folder for folder in folders if os.path.isdir(folder)])]


def hardening_findings(steps: Sequence[Step]) -> Iterator[Finding]:
    for step in steps:
        state = "in force" if step.in_force else "not in force"
        level = logging.INFO if step.in_force else logging.WARNING
        yield logging.DEBUG if step.expected else level, f"{step.name}: {state} ({step.state})"


def listen_on(addresses: Sequence[Union[Address, UnixAddress]]) -> list[Listener]:
    """On all of them, or ProxyError and on none."""
    listeners: list[Listener] = []
    try:
        for address in addresses:
            listeners += listen(address)
    except ProxyError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def serve(config: Config, signals: Optional[socket.socket] = None,
          ready: Callable[[Sequence[str]], object] = tuple, drain: Optional[float] = None,
          ) -> int:  # fmt: skip
    """Runs until a byte comes from SIGNALS (else catch_signals(); in any thread with them), then
    finishes what is in flight, within DRAIN seconds (DRAIN_SECONDS); a second byte ends it at once.
    READY is told what the listeners are called. The exit status; ProxyError, OSError: no start."""
    steps = harden(sys.platform)
    config.tokens()  # a file that can't be used is a setting that is wrong
    raise_file_limit()
    caught = catch_signals() if signals is None else signals
    manager = ServiceManager(config.notify_socket)
    listeners = listen_on(config.addr)
    places = [listener.name for listener in listeners]
    where = f"STATUS=listening on {', '.join(places)}"
    agents = Agents(config.upstream, config.sockets, config.timeout,
                    lambda state: manager.tell(f"{where}, {state}"))  # fmt: skip
    server = Server(config, agents, listeners)
    for finding in weak_settings(config):
        LOG.log(*finding)
    # Before the first thread: it holds for those that are started after it.
    steps += lock_in(config)
    for finding in hardening_findings(steps):
        LOG.log(*finding)
    manager.tell(where)  # before the first request has something to tell
    threading.stack_size(256 * 1024)
    for listener in listeners:
        server.start_thread(listener)
    names = ", ".join(f'"{name}"' for name in config.namespace)
    for place in places:
        LOG.info("listening on %s (namespace %s)", place, names)
    ready(places)

    def report() -> None:
        manager.tell("READY=1", READY_SECONDS)
        for level, text in agent_findings(config, agents):
            LOG.log(min(level, logging.WARNING), "%s", text)

    # A manager or an agent that hangs must hold up neither requests nor a signal.
    threading.Thread(target=report, daemon=True).start()

    number = caught.recv(1)[0]
    LOG.info("stopping")
    manager.tell("STOPPING=1")
    server.stop()
    if drain is None:
        closed = sys.platform == "win32" and number == signal.SIGTERM  # see console_event
        drain = CLOSE_SECONDS if closed else DRAIN_SECONDS
    end = time.monotonic() + drain
    while (server.places or server.lingering) and time.monotonic() < end:
        if select.select([caught], [], [], 0.02)[0]:
            break  # a second signal: at once
    server.give_up()
    agents.groups.end()
    if signals is None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # Python would be killed by one on its way out
    return 0


def who_listens(address: Union[Address, UnixAddress], patience: float) -> str:
    """The Server field of what answers there within PATIENCE seconds, or ""."""
    with contextlib.suppress(OSError, UnicodeError):
        if isinstance(address, UnixAddress):
            sock = socket.socket(AF_UNIX)
            sock.settimeout(patience)
            sock.connect(address.path)
        else:
            here = WILDCARDS.get(address.host, address.host)
            sock = socket.create_connection((here, address.port), patience)
        with sock:
            sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            found = re.search(rb"\r\nServer: ([^\r\n]*)\r\n", sock.recv(4096))
            return printable(found[1]) if found else ""
    return ""


def listens_elsewhere(address: Address) -> str:
    """What to add where the proxy at ADDRESS listens at more than that, or less; Linux shows it."""
    if sys.platform != "linux":
        return ""
    family, *_, (host, *_) = socket.getaddrinfo(*address)[0]
    wanted = ipaddress.ip_address(host).is_unspecified
    nobodys = "2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1"  # until all are taken
    try:
        listen_tcp(family, (nobodys, address.port)).close()
        return ", but not at every address of this machine" if wanted else ""
    except OSError:
        return "" if wanted else ", and at every other address of this machine"


def address_findings(config: Config) -> Iterator[Finding]:
    """Whether the proxy could listen there now, or does already."""
    end = time.monotonic() + 2  # for all who don't answer
    free = []
    for address in config.addr:
        try:
            listeners = listen(address)
        except ProxyError as e:
            server = who_listens(address, max(0.5, end - time.monotonic()))
            if not server.startswith(f"{PROGRAM}/"):
                yield logging.ERROR, str(e)
                continue
            elsewhere = listens_elsewhere(address) if isinstance(address, Address) else ""
            level = logging.WARNING if elsewhere else logging.INFO
            yield level, f"{server} answers at {address} already{elsewhere}"
            continue
        free.append(address)
        for listener in listeners:
            if listener.early:
                yield logging.WARNING, f"{address} is no address of this machine (yet)"
            else:
                yield logging.INFO, f"{listener.name} is free to listen on"
            listener.close()
    try:
        for listener in listen_on(free):
            listener.close()
    except ProxyError as e:
        yield logging.ERROR, f"each alone is free, not all at once: {e}"


def service_findings() -> Iterator[Finding]:
    """What the system says of the user service, where it runs."""
    import subprocess

    argv = ("systemctl", "--user", "show", "--property=MainPID", "--value", PROGRAM)
    names = ("NoNewPrivs", "VmLck", "Max core file size", "Max locked memory")
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):  # it does not
        done = subprocess.run(argv, capture_output=True, timeout=5, check=False)
        pid = int(done.stdout)
        facts = process_facts(str(pid))
        state = ", ".join(f"{name} {facts.get(name, 'unknown')}" for name in names)
        weak = facts.get("NoNewPrivs") != "1" or facts.get("VmLck") == "0 kB"
        level = logging.WARNING if weak else logging.INFO
        yield level, f"the user service runs as PID {pid}: {state}"


def asker_findings(config: Config, tokens: Sequence[Token]) -> Iterator[Finding]:
    """Who may ask for what: each token, with its leash."""
    for token in tokens or [Token(b"", "")]:
        who = f"token {printable(token.name)}" if tokens else "whoever reaches that"
        kinds = token.payloads or config.payloads
        payloads = "any" if kinds == KINDS else ",".join(kinds)
        key = f", key {token.key}" if token.key else ""
        what = f"payloads {payloads}, namespaces {','.join(config.namespace)}{key}"
        yield logging.INFO, f"may ask: {who}; {what}"


def check_findings(config: Config) -> Iterator[Finding]:
    """All that there is to know."""
    steps = harden(sys.platform)
    tokens = config.tokens()  # a file that can't be used is a setting that is wrong
    yield from agent_findings(config, Agents(config.upstream, config.sockets, config.timeout))
    yield from address_findings(config)
    yield from asker_findings(config, tokens)
    yield from weak_settings(config)
    yield from service_findings()
    yield from hardening_findings([*steps, *lock_in(config)])  # nothing can be tried after it


def check(config: Config) -> int:
    """Prints all there is to know, a line each; 0 where /sign would work, else 1."""
    if config.level > logging.DEBUG:
        LOG.setLevel(logging.WARNING)  # what it has to say is said here
    failed = False
    for level, text in check_findings(config):
        failed = failed or level == logging.ERROR
        output(f"{MARKS[level]} {text}\n".encode())
    return int(failed)


def check_leash(name: str, leash: Sequence[str]) -> None:
    """What `token` was given; ConfigError."""
    if not _TOKEN_NAME.fullmatch(name):
        raise ConfigError(f"{printable(name)!r} is no name of letters, digits, '.', '_' and '-'")
    words = " ".join(leash)
    try:
        if words.split() != list(leash):
            raise ConfigError("a blank in it, which would separate options")
        parse_leash(leash)
    except ConfigError as e:
        raise ConfigError(f"token {name}: {printable(words)!r}: {e}") from e


def add_token(config: Config, name: str, *leash: str) -> int:
    """A fresh token for NAME, at the end of the token file, with that LEASH."""
    import secrets

    file = config.token_file
    if not file:
        raise ConfigError("SSH_AGENT_PROXY_TOKEN_FILE (--token-file) is not set: where to add it?")
    check_leash(name, leash)
    token = secrets.token_urlsafe(32)
    line = " ".join([token, name, *leash]) + "\n"

    def ending(text: str) -> str:
        """What TEXT is to end with; what can't be read is not added to."""
        added = line if text == "" or text.endswith("\n") else "\n" + line
        parse_tokens(text + added)
        return added

    os.umask(0o077)  # for every folder that is missing
    try:
        os.makedirs(os.path.dirname(file.path) or ".", exist_ok=True)
        with open(file.path, "ab", 0, opener=_open_at_once) as f:
            if sys.platform == "win32":  # to append is to seek and to write there: one at a time
                import msvcrt

                with contextlib.suppress(OSError):  # no file, or held for 10 s: then without
                    f.seek(1 << 30)  # behind all that is read: what is locked nobody can read
                    msvcrt.locking(f.fileno(), msvcrt.LK_LOCK, 1)
            added = file.read(ending, private=True).encode()
            size = os.fstat(f.fileno()).st_size
            if size + len(added) > MAX_FILE:
                raise OSError(errno.EFBIG, f"it would be larger than {MAX_FILE >> 10} KiB")
            try:
                if f.write(added) < len(added):
                    raise OSError(errno.ENOSPC, "there is no room for it")
                return output(f"{token}\n".encode())
            except (OSError, ProxyError):
                # Half a token can be guessed, and an unprinted one is nobody's. (Another's stays.)
                if os.fstat(f.fileno()).st_size <= size + len(added):
                    f.truncate(size)
                raise
    except OSError as e:
        raise ProxyError(f"cannot write {printable(file.path)!r}: {e.strerror}") from e


def failure(e: Exception) -> tuple[int, str]:
    """The exit status, and what is to be said."""
    if isinstance(e, ProxyError):
        return 2 if isinstance(e, ConfigError) else 1, str(e)
    return 1, f"cannot run: {getattr(e, 'strerror', None) or e}"  # no file descriptors, say


def run(env: Env, argv: Sequence[str]) -> int:
    """A command's exit status."""
    try:
        config = Config.from_env(env, argv, COMMANDS)
    except SystemExit as e:  # --help, --version
        output(b"")
        return int(e.code or 0)
    on_stderr = WindowsHandler if sys.platform == "win32" else StderrHandler
    start_log(config.level, on_stderr(config.journal_stream))
    words = config.command
    if config.sign and words != ("check",):
        raise ConfigError("--sign: check alone makes a test signature")
    if words == ("serve",):
        try:
            return serve(config)
        except (ProxyError, OSError) as e:
            status, why = failure(e)
            LOG.error("%s", why)
            return status
    if words == ("check",):
        return check(config)
    if words == ("shim",):
        return output(read_shim())
    if words[0] == "token" and len(words) > 1:
        return add_token(config, *words[1:])
    raise ConfigError(f"{printable(' '.join(words))!r} is none of {', '.join(COMMANDS)}")


def main(argv: Sequence[str]) -> int:
    """ARGV without the program's name. Exit status: 0, 1 it could not run, 2 wrong settings."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # closed: a socket would get that number, and the log
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    if sys.platform == "win32":  # an ssh-keygen.exe in the current folder is not ours to run
        os.environ["NoDefaultCurrentDirectoryInExePath"] = "1"  # noqa: SIM112
    try:
        return run(os.environ, argv)
    except KeyboardInterrupt:
        return 130
    except (ProxyError, OSError) as e:
        status, why = failure(e)
    # For a person; a service's setting that is wrong is told before there is a log.
    in_journal = is_journal(os.environ.get("JOURNAL_STREAM", ""))
    priority = f"<{PRIORITIES[logging.ERROR]}>" if in_journal else ""
    with contextlib.suppress(OSError), open(2, "wb", 0, closefd=False) as stderr:
        stderr.write(f"{priority}{PROGRAM}: {why}\n".encode("utf-8", "backslashreplace"))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
