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
    Upstream        how the agent is reached, and asked
    Policy          browsers and hosts: may this be signed?
    Hardening       what the process gives up
    Config          settings, from the environment and the command line
    HTTP            requests read strictly, answers, the server
    Service         the log, signals
    Commands        serve, shim, main()

A signature's way is a straight line: HTTP reads, Policy allows, SSHSIG says what is to be signed,
Upstream asks the agent, SSHSIG checks and armors, one line is logged, HTTP answers.
"""

import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    # The script's own directory: a file named hmac.py beside it is not ours to run.
    del sys.path[0]

# (No `from __future__` either: it would come first.)
import argparse
import base64
import binascii
import contextlib
import errno
import hashlib
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
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import responses
from http.server import BaseHTTPRequestHandler
from string import Template
from typing import Any, BinaryIO, NamedTuple, NoReturn, Optional, Union, cast

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
    0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x3164, 0xFFA0,
    *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0),
)))  # fmt: skip


def printable(text: Union[str, bytes], limit: int = 200) -> str:
    """Foreign text for a log, a prompt or an error: one line, of at most LIMIT characters.

    Control, bidi, zero-width and other invisible characters become escapes as in Python's source.
    """
    if isinstance(text, bytes):
        text = text[: 4 * limit].decode("utf-8", "backslashreplace")
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isprintable() and _UNSEEN.isdisjoint(text):
        return text
    return "".join(
        c if c.isprintable() and c not in _UNSEEN else c.encode("unicode_escape").decode()
        for c in text
    )


_PLAIN_WORD = re.compile(r"[!#-<>-\[\]-~]+")  # printable ASCII but blank, quote, = and backslash


def quoted(text: str) -> str:
    """A log line's value: bare where it is one plain word, else in quotes that can be undone."""
    if _PLAIN_WORD.fullmatch(text):
        return text
    doubled = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{printable(doubled, 1000)}"'


# ---------------------------------------------------------------------------------------- Wire


def byte(value: int) -> bytes:
    return value.to_bytes(1, "big")


def uint32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def string(value: bytes) -> bytes:
    return uint32(len(value)) + value


class Reader:
    """Reads RFC 4251 section 5's data types off DATA; leaving it proves that nothing is left over.

    Every error is a WireError that begins with WHAT.
    """

    def __init__(self, data: bytes, what: str) -> None:
        self.data = data
        self.what = what
        self.at = 0

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        left = len(self.data) - self.at
        if kind is None and left:
            raise WireError(f"{self.what}: {left} bytes left over")

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            left = len(self.data) - self.at
            raise WireError(f"{self.what}: {size} bytes expected, {left} there")
        taken = self.data[self.at : end]
        self.at = end
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

# A key's type and the signature algorithm that belongs to it.
ALGORITHMS = {
    "ssh-ed25519": "ssh-ed25519",
    "ssh-rsa": "rsa-sha2-512",
    "ecdsa-sha2-nistp256": "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384": "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521": "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com": "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com": "sk-ecdsa-sha2-nistp256@openssh.com",
}

# PROTOCOL.certkeys: a certificate's type and that of the key in it.
CERTIFICATES = {
    "ssh-ed25519-cert-v01@openssh.com": "ssh-ed25519",
    "ssh-rsa-cert-v01@openssh.com": "ssh-rsa",
    "ecdsa-sha2-nistp256-cert-v01@openssh.com": "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384-cert-v01@openssh.com": "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521-cert-v01@openssh.com": "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519-cert-v01@openssh.com": "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256-cert-v01@openssh.com": "sk-ecdsa-sha2-nistp256@openssh.com",
}

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
        """For a person."""
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
    except (ValueError, binascii.Error) as e:
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
    lines = [text[at : at + 70] for at in range(0, len(text), 70)]
    head, foot = b"-----BEGIN SSH SIGNATURE-----", b"-----END SSH SIGNATURE-----"
    return b"\n".join([head, *lines, foot, b""])


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


# ------------------------------------------------------------------------------------ Upstream

EXEC_GRACE = 0.5  # seconds between SIGTERM and SIGKILL for a command's process group
HINT_SECONDS = 1.0  # for a look at the other agents, all together
MAX_STDERR_LINES = 20  # of a command, per exchange, in the log


class Upstream(NamedTuple):
    """Where an agent is: a Unix socket's path, or a command that speaks the agent protocol."""

    path: str = ""
    command: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.command:
            return f"agent command {printable(self.command[0])!r}"
        return f"agent at {printable(self.path)!r}"


def well_known_sockets(platform: str, home: str, runtime: str) -> tuple[str, ...]:
    """Where agents have their sockets unless told otherwise; RUNTIME is $XDG_RUNTIME_DIR or ""."""
    if platform == "win32":
        return ()
    if platform == "darwin":
        paths = [
            f"{home}/Library/Group Containers/2BUA8C4S2C.com.1password/t/agent.sock",
            f"{home}/.1password/agent.sock",
            f"{home}/Library/Containers/com.maxgoedjen.Secretive.SecretAgent/Data/socket.ssh",
            "/opt/homebrew/var/run/yubikey-agent.sock",
            "/usr/local/var/run/yubikey-agent.sock",
        ]
    else:
        paths = [f"{home}/.1password/agent.sock"]
    if runtime:
        paths += [
            f"{runtime}/yubikey-agent/yubikey-agent.sock",
            f"{runtime}/ssh-agent.socket",
            f"{runtime}/gcr/ssh",
            f"{runtime}/keyring/ssh",
            f"{runtime}/gnupg/S.gpg-agent.ssh",
        ]
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
        try:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                return "that is no socket"
        except OSError:
            return "no such socket (is the agent running?)"
        return "nobody listens on that socket (the agent that made it has ended)"
    return e.strerror or str(e)


class Exchange:
    """One connection to an agent. Every wait ends by DEADLINE (time.monotonic), or with the client.

    CLIENT is the connection of whoever waits for the answer: ClientGone where it closes.
    COMMANDS holds the process groups that run, for whoever has to end them.
    """

    def __init__(
        self,
        upstream: Upstream,
        deadline: float,
        client: Optional[socket.socket] = None,
        commands: Optional[set[int]] = None,
    ) -> None:
        self.upstream = upstream
        self.commands = set() if commands is None else commands
        self.deadline = deadline
        self.client = client
        self.process: Any = None
        self.stderr_lines = 0
        self.poll = select.poll()
        if client:
            # Linux shows a close even behind bytes that nobody reads; elsewhere it has to be read.
            self.poll.register(client, getattr(select, "POLLRDHUP", select.POLLIN))
        try:
            self.socket = socket.socket(socket.AF_UNIX)
        except OSError as e:  # no file descriptors, say
            raise AgentUnreachable(f"no way to the {upstream}: {e.strerror}") from e
        try:
            if upstream.command:
                self._spawn()
            else:
                self.socket.setblocking(False)
                self._connect()
            self.poll.register(self.socket, select.POLLIN)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _connect(self) -> None:
        pause = 0.01
        while True:
            try:
                return self.socket.connect(self.upstream.path)
            except BlockingIOError:
                # The agent's backlog is full: it hangs, or is about to go on.
                self._wait(pause)
                pause = min(2 * pause, 0.2)
            except OSError as e:
                why = _why(self.upstream.path, e)
                raise AgentUnreachable(f"no answer from the {self.upstream}: {why}") from e

    def _spawn(self) -> None:
        import subprocess  # for commands only: it would cost every start

        self.socket.close()
        try:
            self.socket, theirs = socket.socketpair()
            self.socket.setblocking(False)
            with theirs:
                self.process = subprocess.Popen(
                    self.upstream.command,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    bufsize=0,
                )
        except OSError as e:
            raise AgentUnreachable(f"cannot run the {self.upstream}: {e.strerror}") from e
        self.commands.add(self.process.pid)
        os.set_blocking(self.process.stderr.fileno(), False)
        self.poll.register(self.process.stderr, select.POLLIN)

    def _wait(self, seconds: Optional[float] = None) -> None:
        """Until the agent's connection is ready, or for SECONDS."""
        while True:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise AgentTimeout(f"the {self.upstream} did not answer in time")
            wait = left if seconds is None else min(left, seconds)
            ready = [fd for fd, _ in self.poll.poll(1000 * wait + 1)]
            if self.client and self.client.fileno() in ready:
                self._look_at(self.client)
            if self.process and self.process.stderr.fileno() in ready:
                if not self._log_stderr():
                    self.poll.unregister(self.process.stderr)
            if seconds is not None or self.socket.fileno() in ready:
                return

    def _look_at(self, client: socket.socket) -> None:
        if not hasattr(select, "POLLRDHUP"):
            with contextlib.suppress(ConnectionError):
                if client.recv(1, socket.MSG_PEEK):
                    # Bytes that nobody will read hide a close: it shows when the answer is sent.
                    return self.poll.unregister(client)
        raise ClientGone("the client went away before the agent answered")

    def _log_stderr(self) -> bool:
        """What the command complains of, into the log; False once it can't any more."""
        data = os.read(self.process.stderr.fileno(), 4096)
        for line in data.splitlines():
            self.stderr_lines += 1
            if self.stderr_lines <= MAX_STDERR_LINES and line.strip():
                LOG.warning("%s: %s", self.upstream, printable(line))
        return bool(data)

    def ask(self, request: bytes) -> bytes:
        """Sends REQUEST and returns the reply, both without the length that leads them."""
        data = string(request)
        while data:
            try:
                data = data[self.socket.send(data) :]
            except BlockingIOError:
                self.poll.modify(self.socket, select.POLLIN | select.POLLOUT)
                self._wait()
                self.poll.modify(self.socket, select.POLLIN)
            except OSError:
                break  # it hung up; reading tells what there is to be told
        reply = b""
        expected = 4
        while len(reply) < expected:
            self._wait()
            try:
                piece = self.socket.recv(65536)
            except BlockingIOError:
                continue
            except OSError:
                piece = b""  # it hung up on what we wrote
            if not piece and not reply:
                raise AgentUnreachable(f"the {self.upstream} hung up without an answer")
            if not piece:
                raise WireError(f"the {self.upstream} hung up in the middle of its answer")
            reply += piece
            if expected == 4 and len(reply) >= 4:
                size = int.from_bytes(reply[:4], "big")
                if not 0 < size <= MAX_AGENT_MESSAGE:
                    raise WireError(f"the {self.upstream} announced a message of {size} bytes")
                expected = 4 + size
        if len(reply) > expected:
            left = len(reply) - expected
            raise WireError(f"the {self.upstream} sent {left} bytes more than it announced")
        return reply[4:]

    def close(self) -> None:
        """Ends a command with its whole group: its stderr ends when everybody in it has gone."""
        self.socket.close()
        if self.process:
            _kill_group(self.process.pid, signal.SIGTERM)
            end = time.monotonic() + EXEC_GRACE
            last_words = select.poll()
            last_words.register(self.process.stderr, select.POLLIN)
            while last_words.poll(max(0, 1000 * (end - time.monotonic()))):
                if not self._log_stderr() or time.monotonic() > end:
                    break
            _kill_group(self.process.pid, signal.SIGKILL)
            self.commands.discard(self.process.pid)
            self.process.wait()
            self.process.stderr.close()


class Wanted(NamedTuple):
    """What is to sign: that key, or the listed one with that fingerprint, or the first listed."""

    key: Optional[PublicKey] = None
    fingerprint: str = ""
    pinned: bool = False  # by a setting, not named by the request
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
    if identities is None:
        raise NoUsableKey(f"the {exchange.upstream} refuses to list its keys (is it locked?)")
    if not identities:
        raise NoUsableKey("the agent lists no keys (none added, or it is locked)")
    listed = []
    for key_blob, comment in identities:
        # What the agent holds besides is its own business: keys of types that nobody here knows.
        with contextlib.suppress(WireError):
            key = parse_public_key(key_blob)
            listed.append(Listed(key, comment.decode("utf-8", "backslashreplace")))
    if not listed:
        raise NoUsableKey(f"the {exchange.upstream} lists {count(len(identities), 'key')}, "
                          "none of a type that can be used for SSHSIG")  # fmt: skip
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
    """The key that signed DATA, and its signature, checked.

    A key known beforehand is asked for straight away, without a listing.
    """
    key = wanted.key or choose(list_keys(exchange), wanted).key
    signature = parse_sign_response(exchange.ask(sign_request(key.blob, data, key.flags)))
    if signature is None:
        if wanted.key:
            choose(list_keys(exchange), wanted)  # "not held" is another thing than "refused"
        raise AgentRefused(f"the {exchange.upstream} refused to sign with {key.name} (declined, "
                           "timed out, or locked there)")  # fmt: skip
    check_signature(key, signature)
    return key, signature


class Agents:
    """The agent that was set, or the first well-known one that answers.

    Nothing that an agent says is kept. TIMEOUT, in seconds, bounds the whole exchange of a request.
    """

    def __init__(
        self, upstream: Optional[Upstream], sockets: Sequence[str], timeout: float
    ) -> None:
        self.upstream = upstream
        self.sockets = sockets
        self.timeout = timeout
        self.last: Optional[Upstream] = None  # the agent in use, as the log last named it
        self.commands: set[int] = set()  # the process groups that run for us

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
        for path in self.sockets:
            with contextlib.suppress(AgentUnreachable):
                return Exchange(Upstream(path), deadline, client)
        places = ", ".join(map(printable, self.sockets))
        raise AgentUnreachable("no agent found: set SSH_AGENT_PROXY_UPSTREAM (SSH_AUTH_SOCK is not "
                               f"set, and nobody answers at {places})")  # fmt: skip

    def end_commands(self) -> None:
        """At the end of the program: no command outlives it."""
        end = time.monotonic() + EXEC_GRACE
        for group in tuple(self.commands):
            _kill_group(group, signal.SIGTERM)
        while self.commands and time.monotonic() < end:
            time.sleep(0.01)
        for group in tuple(self.commands):
            _kill_group(group, signal.SIGKILL)

    def hint(self) -> str:
        """Names another well-known agent that has keys, where the one in use is of no help."""
        used = self.upstream or self.last
        deadline = time.monotonic() + HINT_SECONDS
        for path in self.sockets:
            if used and os.path.realpath(path) == os.path.realpath(used.path):
                continue
            with contextlib.suppress(ProxyError):
                with Exchange(Upstream(path), deadline) as exchange:
                    number = len(list_keys(exchange))
                return (f"; the {exchange.upstream} has {count(number, 'key')}: "
                        f"SSH_AGENT_PROXY_UPSTREAM={printable(path)} selects it")  # fmt: skip
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
    try:
        ipaddress.ip_address(host)
        return
    except ValueError:
        pass  # a name
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


def choose_key(named: Optional[str], pinned: Optional[Listed]) -> Wanted:
    """The pinned key, else the one that the request names, else any; 400, or 403."""
    pin = Wanted(pinned.key, pinned=True, comment=pinned.comment) if pinned else Wanted()
    if named is None:
        return pin
    if re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", named):
        wanted = Wanted(fingerprint=named)
    else:
        try:
            wanted = Wanted(parse_key_line(named).key)
        except WireError as e:
            raise RequestError(400, f"SSHSIG-Key: {e}") from e
    if not pin.key:
        return wanted
    if not wanted.fits(pin.key):
        raise RequestError(403, f"this proxy signs with {pin.name} only, not with {wanted.name}: "
                                "use that key, or change SSH_AGENT_PROXY_PUBKEY")  # fmt: skip
    return pin


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


def _lock_memory(libc: Any) -> Step:
    """Only without a limit: with a finite one mlockall succeeds, and later threads can't start."""
    import ctypes
    import resource

    MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
    name = "memory kept out of swap"
    unlimited = resource.RLIM_INFINITY
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != unlimited:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (unlimited, unlimited))
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != unlimited:
        return Step(name, False, f"RLIMIT_MEMLOCK is {limit >> 10} KiB, not unlimited")
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT):
        return Step(name, False, f"mlockall: {os.strerror(ctypes.get_errno())}")
    with open("/proc/self/status", encoding="ascii", errors="replace") as f:
        locked = next((line.split()[1] for line in f if line.startswith("VmLck:")), "0")
    return Step(name, locked != "0", f"VmLck {locked} kB")


def _harden_linux() -> list[Step]:
    import ctypes

    PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
    PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
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
        _lock_memory(libc),
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
    locked = libc.mlockall(MCL_CURRENT | MCL_FUTURE)
    error = ctypes.get_errno()
    memory = "mlockall" if locked == 0 else f"mlockall: {os.strerror(error)}"
    return [
        _no_core(),
        Step("no debugger, no reading of memory", denied == 0, attach),
        Step("memory kept out of swap", locked == 0, memory, expected=error == errno.ENOSYS),
    ]


def harden(platform: str) -> list[Step]:
    """Takes from this process what it doesn't need. To be called before any secret is read."""
    if platform == "linux":
        return _harden_linux()
    if platform == "darwin":
        return _harden_macos()
    return []


# -------------------------------------------------------------------------------------- Config

MAX_KEY_FILE = 64 * 1024

# What they would forbid must not be signed because this version can't forbid it.
UNSUPPORTED = ("TOKEN_FILE", "PAYLOADS", "CONFIRM", "CONFIRM_FOR")
SHIMS_OWN = ("URL", "PUBKEY_URL", "TOKEN", "CURL")

Env = Mapping[str, str]


class Setting(NamedTuple):
    """A setting as it was found: NAME is what the person calls it, the variable or the option."""

    name: str
    value: str

    def wrong(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.name}: {reason}")


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_addresses(setting: Setting, env: Env) -> tuple[Address, ...]:
    addresses = []
    for part in map(str.strip, setting.value.split(",")):
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\[\]:/\s]+)):([0-9]{1,5})", part)
        if not match or int(match.group(3)) > 65535:
            raise setting.wrong(f"{printable(part)!r} is neither HOST:PORT nor [V6]:PORT")
        addresses.append(Address(match.group(1) or match.group(2), int(match.group(3))))
    return tuple(addresses)


def parse_namespaces(setting: Setting, env: Env) -> tuple[str, ...]:
    names = tuple(map(str.strip, setting.value.split(",")))
    for name in names:
        if not _NAMESPACE.fullmatch(name):
            raise setting.wrong(f"{printable(name)!r} is not 1 to 255 printable ASCII characters")
    return names


def parse_hosts(setting: Setting, env: Env) -> tuple[str, ...]:
    hosts = []
    for part in map(str.strip, setting.value.lower().split(",") if setting.value else ()):
        if not _HOST_NAME.fullmatch(part[1:] if part.startswith(".") else part):
            raise setting.wrong(f"{printable(part)!r} is not a host name or .suffix")
        hosts.append(part[:-1] if part.endswith(".") else part)
    return tuple(hosts)


def parse_seconds(setting: Setting, env: Env) -> float:
    value = setting.value
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", value) or not float(value):
        raise setting.wrong(f"{printable(value)!r} is not a number of seconds above 0")
    return float(value)


def home_directory(env: Env) -> str:
    return env.get("HOME") or env.get("USERPROFILE") or os.path.expanduser("~")


def expand(setting: Setting, path: str, env: Env) -> str:
    """PATH with a leading ~ or %h/ and with $VAR expanded: a systemd env file expands nothing."""
    if path == "~" or path.startswith(("~/", "%h/")):
        path = home_directory(env) + path[2 if path[0] == "%" else 1 :]
    elif path.startswith("~"):
        path = os.path.expanduser(path)
    try:
        expanded = Template(path).substitute(env)
    except (KeyError, ValueError) as e:
        raise setting.wrong(f"{printable(path)!r} names a variable that is not set, or has a $ "
                            "without a name ($$ stands for one)") from e  # fmt: skip
    if "\0" in expanded:
        raise setting.wrong("a NUL in a path")
    return expanded


def parse_upstream(setting: Setting, env: Env) -> Optional[Upstream]:
    """None where neither this nor SSH_AUTH_SOCK is set: one is looked for at each request."""
    value = setting.value
    if not value:
        return Upstream(env["SSH_AUTH_SOCK"]) if env.get("SSH_AUTH_SOCK") else None
    if value.startswith("exec:"):
        try:
            command = shlex.split(value[len("exec:") :])
        except ValueError as e:
            raise setting.wrong(f"{printable(value)!r}: {str(e).lower()}") from e
        if not command or not command[0]:
            raise setting.wrong("exec: without a command")
        return Upstream(command=(expand(setting, command[0], env), *command[1:]))
    path = expand(setting, value[len("unix:") :] if value.startswith("unix:") else value, env)
    if not path.startswith("/"):
        raise setting.wrong(f"{printable(value)!r} is neither a socket's absolute path nor "
                            "exec:COMMAND")  # fmt: skip
    return Upstream(path)


def parse_pin(setting: Setting, env: Env) -> Optional[Listed]:
    """The one authorized_keys line, which may have comments and empty lines around it."""
    lines = [line for line in setting.value.splitlines() if line.strip()[:1] not in ("", "#")]
    if "PRIVATE KEY" in setting.value:
        raise setting.wrong("a private key, where the public one (the .pub file) belongs")
    if not setting.value:
        return None
    if len(lines) != 1:
        raise setting.wrong(f"one line with a public key is needed, {len(lines)} are there")
    try:
        return parse_key_line(lines[0])
    except WireError as e:
        raise setting.wrong(str(e)) from e


def parse_file(setting: Setting, env: Env) -> Optional[Setting]:
    return setting._replace(value=expand(setting, setting.value, env)) if setting.value else None


def read_small_file(setting: Setting, limit: int) -> bytes:
    """The regular file that SETTING names, of at most LIMIT bytes; ConfigError names both."""
    path = printable(setting.value)
    try:
        # A FIFO would be waited for.
        fd = os.open(setting.value, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(fd, "rb") as f:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise setting.wrong(f"{path!r} is not a regular file")
            data = f.read(limit + 1)
    except OSError as e:
        raise setting.wrong(f"cannot read {path!r}: {e.strerror}") from e
    if len(data) > limit:
        raise setting.wrong(f"{path!r} is larger than {limit >> 10} KiB")
    return data


class Option(NamedTuple):
    """A setting: its variable without SSH_AGENT_PROXY_, a row of --help, and how it is read."""

    variable: str
    default: str
    metavar: str
    help: str
    parse: Callable[[Setting, Env], Any]

    @property
    def field(self) -> str:
        return self.variable.lower()

    @property
    def flag(self) -> str:
        return "--" + self.field.replace("_", "-")


OPTIONS = (
    Option("ADDR", "127.0.0.1:7221", "HOST:PORT", "where to listen, several separated by commas; "
           "port 0 picks one", parse_addresses),
    Option("NAMESPACE", "git", "NAMES", "SSHSIG namespaces that may be signed, separated by "
           "commas; the first is the default", parse_namespaces),
    Option("UPSTREAM", "", "AGENT", "the agent: its socket's /path or unix:/path, or exec:COMMAND "
           "that speaks its protocol; unset: $SSH_AUTH_SOCK, else the first well-known socket",
           parse_upstream),
    Option("PUBKEY", "", "LINE", "an authorized_keys line: sign with this key only", parse_pin),
    Option("PUBKEY_FILE", "", "FILE", "a file with that line, read at each request", parse_file),
    Option("ALLOWED_HOSTS", "", "NAMES", "further names that a Host header may carry, separated "
           "by commas, .suffix for all below it", parse_hosts),
    Option("TIMEOUT", "120", "SECONDS", "for one whole exchange with the agent, a touch included",
           parse_seconds),
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line and an exception like every other."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{printable(message)} (see {PROGRAM} --help)")


def argument_parser(commands: Mapping[str, str]) -> Parser:
    """COMMANDS: name and what it does."""
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [COMMAND] [OPTIONS]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Signs git commits for containers with a key that stays in your ssh-agent.\n\n"
        "commands:\n" + "\n".join(f"  {name:<21} {text}" for name, text in commands.items()),
        epilog="Each of these settings is also a variable: --addr is SSH_AGENT_PROXY_ADDR. "
        "An option wins.",
    )
    parser.add_argument("command", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("-V", "--version", action="version", version=f"{PROGRAM} {VERSION}")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="store_true", help="debug lines in the log")
    loudness.add_argument("-q", "--quiet", action="store_true", help="warnings and audit lines")
    parser.add_argument("--console", action="store_true", help=argparse.SUPPRESS)
    for option in OPTIONS:
        default = f" ({option.default})" if option.default else ""
        parser.add_argument(option.flag, metavar=option.metavar, help=option.help + default)
    return parser


class Config(NamedTuple):
    """Everything that was set. Nothing else reads the environment."""

    command: tuple[str, ...]
    level: int
    sockets: tuple[str, ...]  # the well-known ones
    unknown: tuple[str, ...]  # variables that look like ours
    addr: tuple[Address, ...]
    namespace: tuple[str, ...]
    upstream: Optional[Upstream]
    pubkey: Optional[Listed]
    pubkey_file: Optional[Setting]
    allowed_hosts: tuple[str, ...]
    timeout: float

    @classmethod
    def from_env(cls, env: Env, argv: Sequence[str], commands: Mapping[str, str]) -> "Config":
        """From os.environ and sys.argv[1:]; ConfigError names the setting that is wrong."""
        given = argument_parser(commands).parse_intermixed_args(argv)
        prefix = "SSH_AGENT_PROXY_"
        for variable in UNSUPPORTED:
            if env.get(prefix + variable):
                raise ConfigError(f"{prefix}{variable}: this version can't enforce it, so it does "
                                  "not start with it set")  # fmt: skip
        values = {}
        for option in OPTIONS:
            name = prefix + option.variable
            setting = Setting(name, env.get(name) or option.default)
            if getattr(given, option.field):
                setting = Setting(option.flag, getattr(given, option.field))
            values[option.field] = option.parse(setting, env)
        ours = (*[o.variable for o in OPTIONS], *SHIMS_OWN, *UNSUPPORTED)
        known = {prefix + name for name in ours}
        config = cls(
            command=tuple(given.command),
            level=logging.DEBUG if given.verbose else AUDIT if given.quiet else logging.INFO,
            sockets=well_known_sockets(
                sys.platform, home_directory(env), env.get("XDG_RUNTIME_DIR", "")
            ),
            unknown=tuple(sorted(n for n in env if n.startswith(prefix) and n not in known)),
            **values,
        )
        config.pinned()  # a file that can't be read is a setting that is wrong
        return config

    def pinned(self) -> Optional[Listed]:
        """The key that alone signs, if any; the file is read each time anew."""
        if self.pubkey or not self.pubkey_file:
            return self.pubkey
        text = read_small_file(self.pubkey_file, MAX_KEY_FILE).decode("utf-8", "replace")
        name = f"{self.pubkey_file.name}: {printable(self.pubkey_file.value)!r}"
        return parse_pin(Setting(name, text or "\n"), {})


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
    name, colon, _ = line.partition(b":")
    if colon and name.rstrip(b" \t") != name:
        raise RequestError(400, f"a blank before the colon of header {printable(name, 60)!r}")
    raise RequestError(400, f"a malformed header line: {printable(line, 60)!r}")


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
NO_SHIM = "no shim.sh beside this copy of the program: copy it too, from where the program came"

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
        raise RequestError(404, NO_SHIM) from e


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


class Handler(BaseHTTPRequestHandler):
    """One connection: one request, one answer, one line in the log."""

    server_version = f"{PROGRAM}/{VERSION}"
    command = ""  # until the head is read

    def setup(self) -> None:
        self.proxy: Server = self.server  # type: ignore[assignment]  # BaseServer to the library
        self.accepted = time.monotonic()
        self.client = Client(self.request)
        self.stream = io.BufferedReader(self.client, BUFFER // 4)
        self.whole = False  # the request is read to its end
        self.noted: dict[str, str] = {}  # for the log

    def handle(self) -> None:
        if not self.proxy.admit(self):
            self.client.begun = True  # as far as the gentle close goes
            self.noted["outcome"] = "busy"
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
            self.noted["outcome"] = "busy"
            self.send(BUSY)

    # ---- reading

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

    def read_body(self, head: Head, hash_algorithm: str) -> bytes:
        """The digest of the body, hashed as it arrives."""
        if head.minor and "expect" in head.fields:
            try:
                self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            except OSError as e:
                raise ClientGone(f"the connection broke: {e.strerror or e}") from e
        hasher = hashlib.new(hash_algorithm)
        total = 0
        for left in chunk_sizes(self.stream) if head.chunked else [head.length or 0]:
            total += left
            buffer = memoryview(bytearray(min(left, BUFFER)))
            while left:
                size = self.stream.readinto1(buffer[:left])
                if not size:
                    raise RequestError(400, "the request ended inside its body")
                hasher.update(buffer[:size])
                left -= size
        if not total:
            raise RequestError(400, "an empty body: there is nothing to sign")
        self.whole = True
        return hasher.digest()

    # ---- deciding, in the order of what costs least

    def answer(self, head: Head) -> Answer:
        self.command = head.method
        self.noted = {"method": head.method, "path": head.path}
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
        return route(self, head)

    def answer_sign(self, head: Head) -> Answer:
        namespace, hash_algorithm, wanted = self.choices(head)
        if not head.chunked and head.length is None:
            self.whole = False  # it may send one all the same
            raise RequestError(411, "a body with Content-Length or chunked is needed")
        if head.length and head.length > MAX_BODY:
            raise RequestError(413, "more than 1 GiB to sign")
        digest = self.read_body(head, hash_algorithm)
        data = signed_data(namespace, hash_algorithm, digest)
        self.keep_place()
        with self.proxy.agents.exchange(self.request) as exchange:
            key, signature = request_signature(exchange, wanted, data)
        self.noted["key"] = key.fingerprint
        self.noted["outcome"] = "signed"
        block = armor(sshsig(key.blob, namespace, hash_algorithm, signature))
        return Answer(200, "application/x-ssh-signature", block)

    def answer_publickey(self, head: Head) -> Answer:
        wanted = self.choices(head)[2]
        self.keep_place()
        with self.proxy.agents.exchange(self.request) as exchange:
            listed = choose(list_keys(exchange), wanted)
        self.noted["key"] = listed.key.fingerprint
        line = f"{listed.key.line} {printable(listed.comment)}".rstrip()
        return plain(200, line, ("Cache-Control", "no-cache"))

    def answer_healthz(self, head: Head) -> Answer:
        return plain(200, "ok")

    def answer_shim(self, head: Head) -> Answer:
        return Answer(200, "text/x-shellscript", read_shim())

    ROUTES = {
        "/sign": (("POST",), answer_sign),
        "/publickey": (("GET", "HEAD"), answer_publickey),
        "/healthz": (("GET", "HEAD"), answer_healthz),
        "/shim": (("GET", "HEAD"), answer_shim),
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
        return namespace, hash_algorithm, choose_key(fields.get("sshsig-key"), config.pinned())

    def keep_place(self) -> None:
        """The request is read: from now on it is ours that takes time."""
        if not self.proxy.claim(self):
            raise ClientGone("its place was given to another")

    # ---- answering

    def send(self, answer: Answer) -> None:
        """The log's line, and then the answer: no signature leaves that is not on record."""
        status, body = answer.status, answer.body
        outcome = "served" if status < 400 else "refused" if status < 500 else "failed"
        noted = {
            "outcome": outcome,
            "status": str(status),
            "peer": str(Address(*self.client_address[:2])),
            "ms": str(round(1000 * (time.monotonic() - self.accepted))),
            **self.noted,
        }
        if status >= 400:
            noted["reason"] = body.decode().rstrip("\n")
        line = " ".join([f"{name}={quoted(value)}" for name, value in noted.items()])
        LOG.log(logging.INFO if noted["outcome"] == "served" else AUDIT, "%s", line)

        head = [
            f"HTTP/1.1 {status} {responses[status]}",
            f"Server: {self.server_version}",
            time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT", time.gmtime()),
            f"Content-Type: {answer.content_type}",
            f"Content-Length: {len(body)}",
            "Connection: close",
            *[f"{name}: {value}" for name, value in answer.fields],
            "\r\n",
        ]
        data = "\r\n".join(head).encode() + (b"" if self.command == "HEAD" else body)
        with contextlib.suppress(OSError):  # it went away: the log has what it would have got
            self.request.settimeout(ANSWER_SECONDS)
            self.request.sendall(data)
            # Here, not at the close: a client that reads to the end need not wait for what is left.
            self.request.shutdown(socket.SHUT_WR)

    def finish(self) -> None:
        """Closes the connection such that an answer reaches a client that is still sending: bytes
        that nobody has read would make the system throw the answer away."""
        with contextlib.suppress(OSError, ProxyError):
            if self.whole:
                self.client.limit = 0  # what is here now, or nothing (408)
                self.whole = not self.stream.peek(1)
            if not self.whole and self.client.begun:
                self.proxy.linger(self)
                self.drain()
        self.proxy.leave(self)

    def drain(self) -> None:
        buffer = bytearray(BUFFER // 4)
        end = time.monotonic() + LINGER_SECONDS
        size = 1
        while size and time.monotonic() < end:
            self.request.settimeout(LINGER_GAP)
            size = self.request.recv_into(buffer)


class Listener(NamedTuple):
    socket: socket.socket
    name: str


def listen(address: Address) -> list[Listener]:
    """Listening sockets at ADDRESS, for a name at all it has; ProxyError where there is none."""
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
                IP_FREEBIND, IPV6_FREEBIND = 15, 78
                level = socket.IPPROTO_IPV6 if v6 else socket.IPPROTO_IP
                sock.setsockopt(level, IPV6_FREEBIND if v6 else IP_FREEBIND, 1)
            sock.bind(where)
            sock.listen(1024)
            listeners.append(Listener(sock, str(Address(*sock.getsockname()[:2]))))
        except OSError as e:
            error = e
            if e.errno == errno.EADDRINUSE:
                raise ProxyError(f"cannot listen on {address}: port {address.port} is in use "
                                 "(another is chosen by SSH_AGENT_PROXY_ADDR)") from e  # fmt: skip
    if not listeners:  # else it is a name's other address, which this system has no use for
        raise ProxyError(f"cannot listen on {address}: {error and error.strerror}") from error
    return listeners


class Server:
    """Threads that wait in accept, each a whole connection at a time; one more is started when the
    last free one takes a connection. At most PLACES requests have a place at once."""

    def __init__(self, config: Config, agents: Agents, listeners: Sequence[Listener]) -> None:
        self.config = config
        self.agents = agents
        self.listeners = listeners
        self.lock = threading.Lock()
        self.threads = dict.fromkeys(listeners, 0)
        self.free = dict.fromkeys(listeners, 0)  # those waiting in accept
        self.places: set[Handler] = set()
        self.lingering: dict[Handler, None] = {}  # in the order in which they came
        self.stopping = False

    def start(self) -> None:
        threading.stack_size(256 * 1024)
        for listener in self.listeners:
            self.start_thread(listener)

    def start_thread(self, listener: Listener) -> None:
        with self.lock:
            # Those beyond what can have a place or linger are about to be free.
            if self.threads[listener] >= PLACES + LINGERERS + SPARE_THREADS:
                return
            self.threads[listener] += 1
            self.free[listener] += 1
        try:
            threading.Thread(target=self.work, args=(listener,), daemon=True).start()
        except RuntimeError as e:  # the system has no more: those that are there go on
            with self.lock:
                self.threads[listener] -= 1
                self.free[listener] -= 1
            LOG.warning("cannot start another thread: %s", e)

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
                    Handler(connection, peer, cast(Any, self))
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
        self.places.discard(victim)
        victim.client.reading = False
        victim.client.evicted = True
        with contextlib.suppress(OSError):
            if not victim.client.begun and not victim.has_sent():
                victim.request.shutdown(socket.SHUT_RD)
                return
            victim.client.begun = victim.client.told = True
            victim.noted["outcome"] = "busy"
            victim.send(BUSY)
        self._linger(victim)

    def claim(self, handler: Handler) -> bool:
        """Is the answer HANDLER's to give? From now on its place is safe until it is given."""
        with self.lock:
            handler.client.reading = False
            return not handler.client.evicted

    def linger(self, handler: Handler) -> None:
        """HANDLER has answered and gives its place back; it reads on until its client is done."""
        with self.lock:
            self.places.discard(handler)
            self._linger(handler)

    def _linger(self, handler: Handler) -> None:
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
            with contextlib.suppress(OSError):
                # Closing alone leaves threads in accept, and they would take one more each.
                listener.socket.shutdown(socket.SHUT_RDWR)
            listener.socket.close()
        with self.lock:
            for handler in self.places:
                if not handler.client.begun:
                    with contextlib.suppress(OSError):
                        handler.request.shutdown(socket.SHUT_RDWR)

    @property
    def busy(self) -> bool:
        return bool(self.places or self.lingering)


# ------------------------------------------------------------------------------------- Service

DRAIN_SECONDS = 10


class StderrHandler(logging.Handler):
    """The log on stderr, which never waits: a line that would have to is dropped, and counted."""

    # What a pipe takes whole or not at all, and without waiting where it says that it can be
    # written to (pipe(7), PIPE_BUF).
    MAX_LINE = 4096

    def __init__(self) -> None:
        super().__init__()
        self.lost = 0
        self.cut = False  # the last line, by a terminal that took only part of it
        self.fd = 2
        with contextlib.suppress(OSError, AttributeError):
            # A terminal that nobody reads takes part of a line and then waits; opened for us alone
            # it can be told not to.
            self.fd = os.open(os.ttyname(2), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)

    def format(self, record: logging.LogRecord) -> str:
        """Time, level and message; the library's own does much more, and shows in every answer."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(record.created))
        line = f"{when} {record.levelname} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + logging.Formatter().formatException(record.exc_info)
        return line

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if self.lost:
            line = f"({self.lost} lines before this one could not be written) {line}"
        data = line.encode("utf-8", "backslashreplace")[: self.MAX_LINE - 2] + b"\n"
        if self.cut:
            data = b"\n" + data
        written = 0
        with contextlib.suppress(OSError):  # closed: there is nobody to tell
            written = os.write(self.fd, data) if self.writable() else 0
        if written:
            self.cut = written < len(data)
            self.lost = 0
        self.lost += written < len(data)

    def writable(self) -> bool:
        if not hasattr(select, "poll"):
            return True
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        return any(event & select.POLLOUT for _, event in poll.poll(0))


def start_log(level: int) -> None:
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # never shown
    logging.addLevelName(AUDIT, "AUDIT")
    LOG.propagate = False
    LOG.setLevel(level)
    LOG.handlers[:] = [StderrHandler()]


class Signals:
    """SIGTERM and SIGINT, wherever the system delivers them, as bytes to wait for."""

    def __init__(self) -> None:
        self.receiver, sender = socket.socketpair()
        sender.setblocking(False)
        self.sender = sender  # kept open
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)

    def wait(self, seconds: Optional[float] = None) -> bool:
        """Has a signal come, now or within SECONDS?"""
        self.receiver.settimeout(seconds)
        try:
            return bool(self.receiver.recv(1))
        except socket.timeout:
            return False


# ------------------------------------------------------------------------------------ Commands

COMMANDS = {
    "serve": "run the proxy in the foreground (also without a command)",
    "shim": "print shim.sh, the container's side",
}


def raise_file_limit() -> None:
    """Room for every place's connection and agent: macOS starts with 256 file descriptors."""
    if os.name != "posix":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8 * PLACES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY:
            wanted = max(soft, min(wanted, hard))
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def warn_of_weak_settings(config: Config, listeners: Sequence[Listener]) -> None:
    for name in config.unknown:
        LOG.warning("%s is set, but is no setting of this program", printable(name))
    for listener in listeners:
        host = listener.socket.getsockname()[0].partition("%")[0]
        if not ipaddress.ip_address(host).is_loopback:
            LOG.warning("%s is not a loopback address: whoever reaches it can have anything signed",
                        listener.name)  # fmt: skip


def report_agent(config: Config, agents: Agents) -> None:
    """What the log says at the start of the keys, or of why there are none yet."""
    try:
        wanted = choose_key(None, config.pinned())
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
    for step in harden(sys.platform):
        level = logging.DEBUG if step.in_force or step.expected else logging.WARNING
        state = "in force" if step.in_force else "not in force"
        LOG.log(level, "%s: %s (%s)", step.name, state, step.state)
    raise_file_limit()
    signals = Signals()
    agents = Agents(config.upstream, config.sockets, config.timeout)
    server = Server(config, agents, [one for a in config.addr for one in listen(a)])
    server.start()
    names = ", ".join(f'"{name}"' for name in config.namespace)
    for listener in server.listeners:
        LOG.info("listening on %s (namespace %s)", listener.name, names)
    warn_of_weak_settings(config, server.listeners)
    # An agent that hangs must hold up neither requests nor a signal.
    threading.Thread(target=report_agent, args=(config, agents), daemon=True).start()

    signals.wait()
    LOG.info("stopping")
    server.stop()
    end = time.monotonic() + DRAIN_SECONDS
    while server.busy and time.monotonic() < end:
        if signals.wait(0.02):
            break  # a second signal: at once
    agents.end_commands()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # Python would be killed by one on its way out
    return 0


@contextlib.contextmanager
def output() -> Iterator[None]:
    """Flushes what is written to standard output within; ProxyError where it can't be."""
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would try again, and complain
        raise ProxyError(f"cannot write to standard output: {e.strerror}") from e


def print_shim() -> int:
    shim = read_shim()
    if sys.stdout is None:
        raise ProxyError("cannot write shim.sh: standard output is closed")
    with output():
        sys.stdout.buffer.write(shim)
    return 0


def run(env: Env, argv: Sequence[str]) -> int:
    config = Config.from_env(env, argv, COMMANDS)
    start_log(config.level)
    command = " ".join(config.command or ("serve",))
    if command == "serve":
        return serve(config)
    if command == "shim":
        return print_shim()
    known = " and ".join(COMMANDS)
    raise ConfigError(f"no such command: {printable(command)!r} (there are {known})")


def complain(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody can be told
        os.write(2, f"{PROGRAM}: {text}\n".encode("utf-8", "backslashreplace"))


def main(argv: Sequence[str]) -> int:
    """ARGV without the program's name. Exit status: 0, 1 it could not run, 2 wrong settings."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # closed: a socket would get that number, and the log
            os.open(os.devnull, os.O_RDWR)
    try:
        try:
            return run(os.environ, argv)
        except SystemExit as e:  # --help, --version
            with output():
                return int(e.code or 0)
    except ConfigError as e:
        complain(str(e))
        return 2
    except ProxyError as e:
        complain(str(e))
        return 1
    except OSError as e:  # of the system: no file descriptors, say
        complain(f"cannot run: {e.strerror or e}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
