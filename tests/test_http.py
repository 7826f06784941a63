"""Requests as bytes, the server as a whole: framing, order, places, limits, the end, the log."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

import pytest
from conftest import (
    PROXY,
    ROOT,
    SHIM,
    Agent,
    Answer,
    Keys,
    Proxy,
    clean_env,
    http,
    message,
    need,
    parse_answer,
    raw,
    read_message,
    run,
    wait_for,
)

import ssh_agent_proxy as p

HOST = b"Host: localhost\r\n"
MIB = 1 << 20

linux = pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")


def get(path: str, *fields: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + lines(fields) + b"\r\n"


def post(body: bytes, *fields: str, length: Optional[int] = None) -> bytes:
    """A POST to /sign; LENGTH, where the body is to differ from what is announced."""
    length = len(body) if length is None else length
    head = b"POST /sign HTTP/1.1\r\n" + HOST + f"Content-Length: {length}\r\n".encode()
    return head + lines(fields) + b"\r\n" + body


def post_chunked(body: bytes, *fields: str) -> bytes:
    """A POST to /sign of a body that is already in chunks."""
    head = b"POST /sign HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n"
    return head + lines(fields) + b"\r\n" + body


def lines(fields: Iterable[str]) -> bytes:
    return "".join(f"{field}\r\n" for field in fields).encode("latin-1")


def chunks(body: bytes, sizes: Iterable[int]) -> bytes:
    """BODY in chunks of SIZES, the rest in one more."""
    out, at = [], 0
    for size in [*sizes, len(body)]:
        piece = body[at : at + size]
        at += len(piece)
        if piece:
            out.append(b"%x\r\n%s\r\n" % (len(piece), piece))
    return b"".join(out) + b"0\r\n\r\n"


# ---------------------------------------------------------------- what every answer is like


def answers_in(data: bytes) -> int:
    return len(re.findall(rb"^HTTP/1\.1 [1-5]\d\d ", data, re.M))


def the_one_answer(data: bytes) -> Answer:
    """The answer in all that came over a connection: there is one, and nothing behind it."""
    answer = parse_answer(data)
    assert answers_in(data) == 1, data
    assert answer.headers["connection"] == "close"
    assert re.fullmatch(r"ssh-agent-proxy/\d+\.\d+\.\d+", answer.headers["server"])
    assert len(answer.body) == int(answer.headers["content-length"])
    assert not [name for name in answer.headers if name.startswith("access-control")]
    return answer


def refused(answer: Answer, status: int) -> Answer:
    """An error that tells a person what to do, in one line."""
    assert answer.status == status, answer
    assert answer.headers["content-type"].startswith("text/plain")
    assert re.fullmatch(r"[^\n]{10,}\n", answer.text), answer.text
    assert answer.text[:-1].isprintable(), answer.text
    assert ("retry-after" in answer.headers) == ("busy" in answer.text)
    assert ("allow" in answer.headers) == (status == 405)
    return answer


def read_all(connection: socket.socket, seconds: float = 10) -> bytes:
    """What comes until the proxy ends the connection."""
    connection.settimeout(seconds)
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10)


def name_of(s: socket.socket) -> str:
    """The client's address as the log shows it."""
    return "{}:{}".format(*s.getsockname())


def cut(port: int, data: bytes) -> bytes:
    """The answer to DATA from a client that sends nothing more."""
    with connect(port) as s:
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        return read_all(s)


# ---------------------------------------------------------------- agents that do as they are told


class Scripted:
    """A handler for scripted agents: holds one key, signs with zeros, remembers what it was asked.

    While the gate is shut, requests to sign wait.
    """

    def __init__(self, line: str) -> None:
        self.key = p.parse_key_line(line)[0]
        self.comment = b"scripted"
        self.asked: List[int] = []
        self.gate = threading.Event()
        self.gate.set()

    @property
    def signing(self) -> int:
        return self.asked.count(p.SSH_AGENTC_SIGN_REQUEST)

    def __call__(self, connection: socket.socket) -> None:
        while request := read_message(connection):
            self.asked.append(request[0])
            if request[0] == p.SSH_AGENTC_REQUEST_IDENTITIES:
                reply = p.byte(p.SSH_AGENT_IDENTITIES_ANSWER) + p.uint32(1)
                reply += p.string(self.key.blob) + p.string(self.comment)
            else:
                assert self.gate.wait(60)
                signature = p.string(b"ssh-ed25519") + p.string(bytes(64))
                reply = p.byte(p.SSH_AGENT_SIGN_RESPONSE) + p.string(signature)
            connection.sendall(message(reply))


class Shared:
    """A proxy that many tests share, in front of a scripted agent."""

    def __init__(self, line: str, constants: Dict[str, Any], *args: str) -> None:
        # The paths of Unix sockets are short.
        self.folder = Path(tempfile.mkdtemp(prefix="sap.", dir="/tmp"))
        self.agent = Scripted(line)
        path = self.folder / "agent"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(64)
        threading.Thread(target=self.serve, daemon=True).start()
        self.proxy = start_tuned(self.folder, constants, "--upstream", str(path), *args)
        self.port, self.pid = self.proxy.port, self.proxy.pid
        self.proxy.wait_log("signing with")  # from now on only requests make it ask
        self.agent.asked.clear()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.one, args=(connection,), daemon=True).start()

    def one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.agent(connection)

    def ask(self, data: bytes) -> Tuple[bytes, List[str]]:
        """What comes back for DATA, and the lines that the log has for this connection."""
        before = len(self.proxy.log())
        with connect(self.port) as s:
            peer = name_of(s)
            s.sendall(data)
            received = read_all(s)
        return received, self.lines_of(peer, before)

    def lines_of(self, peer: str, before: int) -> List[str]:
        """The lines for PEER, once the log has all that happened until now."""
        with connect(self.port) as s:
            marker = name_of(s)
            s.sendall(get("/marker"))
            read_all(s)
        wait_for(lambda: f"peer={marker} " in self.proxy.log()[before:], message="a line")
        log = self.proxy.log()[before:]
        return [line for line in request_lines(log) if log_fields(line)["peer"] == peer]

    def stop(self) -> None:
        status = self.proxy.stop()
        self.listener.close()
        shutil.rmtree(self.folder)
        clean(self.proxy)
        assert status == 0


def start_tuned(folder: Path, constants: Dict[str, Any], *args: Any, **env: str) -> Proxy:
    """The proxy with some of its constants changed, for no test waits 30 real seconds."""
    driver = folder / "driver.py"
    driver.write_text(
        "import json, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import ssh_agent_proxy as p\n"
        "for name, value in json.loads(sys.argv[1]).items():\n"
        "    assert type(getattr(p, name)) in (int, float), name\n"
        "    setattr(p, name, value)\n"
        "sys.exit(p.main(sys.argv[2:]))\n"
    )
    argv = [sys.executable, str(driver), json.dumps(constants), "--addr", "127.0.0.1:0"]
    return Proxy([*argv, *map(str, args)], clean_env(folder / "home", **env))


def clean(proxy: Proxy) -> None:
    """Nothing that was sent has shown a fault."""
    assert "Traceback" not in proxy.log(), proxy.log()
    assert "internal error" not in proxy.log(), proxy.log()


@pytest.fixture(scope="module")
def shared(keys: Keys) -> Iterator[Shared]:
    shared = Shared(keys.line("ed25519"), {})
    yield shared
    shared.stop()


LINGER = {"LINGER_SECONDS": 0.4, "LINGER_GAP": 0.4}


@pytest.fixture(scope="module")
def quick(keys: Keys) -> Iterator[Shared]:
    """A proxy that soon loses its patience with a head, and with gaps in a body."""
    shared = Shared(keys.line("ed25519"), {"HEAD_SECONDS": 0.4, "GAP_SECONDS": 0.4, **LINGER})
    yield shared
    shared.stop()


@pytest.fixture(scope="module")
def hurried(keys: Keys) -> Iterator[Shared]:
    """A proxy that gives a whole request little time."""
    shared = Shared(keys.line("ed25519"), {"REQUEST_SECONDS": 0.8, **LINGER})
    yield shared
    shared.stop()


@pytest.fixture
def tuned(short: Path) -> Iterator[Callable[..., Proxy]]:
    started: List[Proxy] = []

    def start(constants: Dict[str, Any], *args: Any) -> Proxy:
        started.append(start_tuned(short, constants, *args))
        return started[-1]

    yield start
    for proxy in started:
        proxy.stop()
        clean(proxy)


@pytest.fixture
def gate(keys: Keys) -> Iterator[Scripted]:
    """A scripted agent that lets requests to sign wait."""
    scripted = Scripted(keys.line("ed25519"))
    scripted.gate.clear()
    yield scripted
    scripted.gate.set()


@pytest.fixture
def gated(
    gate: Scripted,
    scripted_agent: Callable[..., Path],
    start_proxy: Callable[..., Proxy],
) -> Iterator[Proxy]:
    """A proxy in front of it."""
    proxy = start_proxy(upstream=scripted_agent(gate))
    proxy.wait_log("signing with")
    gate.asked.clear()
    yield proxy
    gate.gate.set()
    clean(proxy)


# ---------------------------------------------------------------- looking at a process


def tasks(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def memory(pid: int, name: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert match
    return 1024 * int(match.group(1))


def unread(port: int) -> int:
    """How many bytes and connections wait in the system for the server at PORT (sock_diag(7))."""
    established, close_wait, listening = 1 << 1, 1 << 8, 1 << 10
    states = established | close_wait | listening
    request = struct.pack("=BBBxI", socket.AF_INET, socket.IPPROTO_TCP, 0, states)
    request += struct.pack(">HH", port, 0) + bytes(44)
    dump_by_family = (20, 0x301, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 4) as s:
        s.send(struct.pack("=IHHII", 16 + len(request), *dump_by_family) + request)
        total = 0
        while True:
            data = s.recv(1 << 16)
            while data:
                size, kind = struct.unpack_from("=IH", data)
                assert kind in (3, 20), kind
                if kind == 3:
                    return total
                total += int(struct.unpack_from("=I", data, 72)[0])
                data = data[size:]


def all_read(port: int) -> None:
    wait_for(lambda: not unread(port), message="the proxy takes what was sent")


def readable(sockets: Sequence[socket.socket]) -> Set[socket.socket]:
    poll = select.poll()
    for s in sockets:
        poll.register(s, select.POLLIN)
    found = {fd for fd, _ in poll.poll(0)}
    return {s for s in sockets if s.fileno() in found}


def by_hand(agent: Agent, port: int, *args: str) -> List[str]:
    """The command line of a proxy whose stderr is the test's own business."""
    argv = [sys.executable, str(PROXY), "--addr", f"127.0.0.1:{port}"]
    return [*argv, "--upstream", str(agent.sock), *args]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def request_lines(log: str) -> List[str]:
    """The lines that the log has for requests."""
    return [line for line in log.splitlines() if "outcome=" in line]


def log_fields(line: str) -> Dict[str, str]:
    return {
        name: value[1:-1] if value.startswith('"') else value
        for name, value in re.findall(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^ "]*)(?= |$)', line)
    }


@pytest.fixture
def ssh_keygen(keys: Keys, short: Path) -> Callable[..., bytes]:
    """What `ssh-keygen -Y sign` makes of a payload, with the key ed25519 for git."""

    def sign(payload: bytes, hash_algorithm: str = "sha512") -> bytes:
        path = short / "payload"
        path.write_bytes(payload)
        path.with_suffix(".sig").unlink(missing_ok=True)
        argv = ["ssh-keygen", "-q", "-Y", "sign", "-n", "git", "-O", f"hashalg={hash_algorithm}"]
        run([*argv, "-f", keys["ed25519"], path])
        return path.with_suffix(".sig").read_bytes()

    return sign


# ================================================================ pure: a head


class Pieces(io.RawIOBase):
    """DATA in pieces of at most SIZE bytes, and then the end."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data = data
        self.size = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.data[: min(self.size, len(buffer))]
        self.data = self.data[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)


def head_of(data: bytes, size: int = 1 << 16) -> Tuple[p.Head, bytes]:
    """The head in DATA, and what stands behind it."""
    stream = io.BufferedReader(Pieces(data, size), 1 << 16)
    return p.read_head(stream), stream.read()


HEADS: List[Tuple[str, bytes, Dict[str, Any]]] = [
    ("shortest", b"GET / HTTP/1.0\r\n\r\n", {"method": "GET", "path": "/", "minor": 0}),
    ("no host in 1.0", b"GET / HTTP/1.0\r\n\r\n", {"hosts": (), "fields": {}}),
    ("host", b"GET / HTTP/1.1\r\nHost: a:1\r\n\r\n", {"minor": 1, "hosts": ("a",)}),
    ("empty host", b"GET / HTTP/1.1\r\nHost:\r\n\r\n", {"hosts": ("",)}),
    ("any method", b"get!#$%&'*+-.^_`|~9 / HTTP/1.0\r\n\r\n", {"method": "get!#$%&'*+-.^_`|~9"}),
    ("query", b"GET /a?b=c HTTP/1.0\r\n\r\n", {"path": "/a?b=c"}),
    ("every sort of path", b"GET /-._~!$&'()*+,;=:@%2fA9?/ HTTP/1.0\r\n\r\n",
     {"path": "/-._~!$&'()*+,;=:@%2fA9?/"}),
    ("absolute", b"GET http://A:1/b HTTP/1.1\r\nHost: c\r\n\r\n",
     {"path": "/b", "hosts": ("c", "a")}),
    ("absolute, 1.0", b"GET http://a/b HTTP/1.0\r\n\r\n", {"path": "/b", "hosts": ("a",)}),
    ("absolute, no path", b"GET http://a HTTP/1.0\r\n\r\n", {"path": "/", "hosts": ("a",)}),
    ("absolute, in capitals", b"GET HTTP://a/ HTTP/1.0\r\n\r\n", {"path": "/", "hosts": ("a",)}),
    ("field names", b"GET / HTTP/1.0\r\nX-Y: z\r\nx!#$%&'*+-.^_`|~9: 1\r\n\r\n",
     {"fields": {"x-y": "z", "x!#$%&'*+-.^_`|~9": "1"}}),
    ("blanks around values", b"GET / HTTP/1.0\r\nA: \t b \t c\t \r\nD:e\r\nF:\r\nG: \t \r\n\r\n",
     {"fields": {"a": "b \t c", "d": "e", "f": "", "g": ""}}),
    ("colons in values", b"GET / HTTP/1.0\r\nA::b: c:\r\n\r\n", {"fields": {"a": ":b: c:"}}),
    ("bytes beyond ASCII", b"GET / HTTP/1.0\r\nA: \x80\xff\r\n\r\n", {"fields": {"a": "\x80\xff"}}),
    ("a harmless field twice", b"GET / HTTP/1.0\r\nA: 1\r\na: 2\r\n\r\n", {"fields": {"a": "2"}}),
    ("length", b"PUT / HTTP/1.0\r\nContent-Length: 5\r\n\r\n", {"length": 5, "chunked": False}),
    ("length 0", b"PUT / HTTP/1.0\r\nContent-Length: 0\r\n\r\n", {"length": 0}),
    ("length with zeros", b"PUT / HTTP/1.0\r\nContent-Length: 007\r\n\r\n", {"length": 7}),
    ("length of 1 GiB", b"PUT / HTTP/1.0\r\nContent-Length: 1073741824\r\n\r\n",
     {"length": 1 << 30}),
    ("no length", b"PUT / HTTP/1.0\r\n\r\n", {"length": None, "chunked": False}),
    ("chunked", b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
     {"length": None, "chunked": True}),
    ("chunked in capitals", b"PUT / HTTP/1.1\r\nHost: a\r\nTRANSFER-ENCODING:CHUNKED\r\n\r\n",
     {"chunked": True}),
    ("expect", b"PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\n\r\n",
     {"fields": {"host": "a", "expect": "100-Continue"}}),
]  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), [h[1:] for h in HEADS], ids=[h[0] for h in HEADS])
def test_a_head_is_read_field_by_field(data: bytes, expected: Dict[str, Any]) -> None:
    head, rest = head_of(data + b"rest\n")
    assert {name: getattr(head, name) for name in expected} == expected
    assert rest == b"rest\n"


@pytest.mark.parametrize("data", [h[1] for h in HEADS], ids=[h[0] for h in HEADS])
def test_a_head_in_pieces_of_every_size_is_the_same(data: bytes) -> None:
    whole = head_of(data + b"rest")
    for size in range(1, len(data) + 1):
        assert head_of(data + b"rest", size) == whole, size


@pytest.mark.parametrize("data", [h[1] for h in HEADS], ids=[h[0] for h in HEADS])
def test_a_head_that_ends_early_is_malformed(data: bytes) -> None:
    for end in range(len(data)):
        with pytest.raises(p.RequestError) as e:
            head_of(data[:end])
        assert e.value.status == 400, end


@pytest.mark.parametrize("digits", [10, 18, 19, 20, 100, 5000])
def test_a_length_of_many_digits_is_more_than_can_be_signed(digits: int) -> None:
    head, _ = head_of(b"PUT / HTTP/1.0\r\nContent-Length: " + b"9" * digits + b"\r\n\r\n")
    assert head.length is not None
    assert head.length > p.MAX_BODY


def test_a_length_with_thousands_of_zeros_is_read() -> None:
    head, _ = head_of(b"PUT / HTTP/1.0\r\nContent-Length: " + b"0" * 5000 + b"7\r\n\r\n")
    assert head.length == 7


def test_a_head_may_have_16_kib_and_100_fields() -> None:
    start = b"GET / HTTP/1.0\r\n"
    for size, right in ((16384, True), (16385, False)):
        data = start + b"A: " + b"b" * (size - len(start) - 7) + b"\r\n\r\n"
        assert len(data) == size
        if right:
            assert head_of(data + b"\n\r\n")[1] == b"\n\r\n"
        else:
            for rest in (b"", b"rest", b"\n", b"\r"):
                with pytest.raises(p.RequestError) as e:
                    head_of(data + rest)
                assert e.value.status == 431
    for number, right in ((100, True), (101, False)):
        data = start + b"".join(b"A%d:\r\n" % n for n in range(number)) + b"\r\n"
        if right:
            assert len(head_of(data)[0].fields) == 100
        else:
            with pytest.raises(p.RequestError) as e:
                head_of(data)
            assert e.value.status == 431


def test_the_limits_are_those_that_are_promised() -> None:
    assert (p.HEAD_SECONDS, p.GAP_SECONDS, p.REQUEST_SECONDS) == (10, 30, 600)
    assert (p.PLACES, p.LINGERERS, p.DRAIN_SECONDS) == (128, 16, 10)
    assert (p.MAX_HEAD, p.MAX_FIELDS, p.MAX_BODY) == (16384, 100, 1 << 30)


# ================================================================ pure: a chunked body


def body_of(data: bytes, size: int = 1 << 16) -> Tuple[bytes, bytes]:
    """The body in DATA, and what stands behind it."""
    stream = io.BufferedReader(Pieces(data, size), 1 << 16)
    body = b""
    for chunk in p.chunk_sizes(stream):
        piece = stream.read(chunk)
        if len(piece) != chunk:
            raise p.RequestError(400, "ended inside a chunk")
        body += piece
    return body, stream.read()


CHUNKED: List[Tuple[str, bytes, bytes]] = [
    ("nothing", b"0\r\n\r\n", b""),
    ("one chunk", b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    ("three chunks", b"1\r\nh\r\n3\r\nell\r\n1\r\no\r\n0\r\n\r\n", b"hello"),
    ("hexadecimal, small", b"b\r\nhello world\r\n0\r\n\r\n", b"hello world"),
    ("hexadecimal, large", b"B\r\nhello world\r\n0\r\n\r\n", b"hello world"),
    ("leading zeros", b"0005\r\nhello\r\n000\r\n\r\n", b"hello"),
    ("extension", b"5;a=b\r\nhello\r\n0;c\r\n\r\n", b"hello"),
    ("extension behind blanks", b"5 \t; a = \"b\"\r\nhello\r\n0 ;\r\n\r\n", b"hello"),
    ("trailers", b"5\r\nhello\r\n0\r\nA: b\r\nC:\r\n\r\n", b"hello"),
    ("line ends as data", b"6\r\n\r\n0\r\n\r\r\n0\r\n\r\n", b"\r\n0\r\n\r"),
    ("all bytes", b"100\r\n" + bytes(range(256)) + b"\r\n0\r\n\r\n", bytes(range(256))),
    ("100 trailers", b"1\r\nx\r\n0\r\n" + b"A: b\r\n" * 100 + b"\r\n", b"x"),
]


@pytest.mark.parametrize(("data", "body"), [c[1:] for c in CHUNKED], ids=[c[0] for c in CHUNKED])
def test_a_chunked_body_in_pieces_of_every_size_is_the_same(data: bytes, body: bytes) -> None:
    for size in range(1, len(data) + 1):
        assert body_of(data + b"rest\r\n", size) == (body, b"rest\r\n"), size


@pytest.mark.parametrize("data", [c[1] for c in CHUNKED], ids=[c[0] for c in CHUNKED])
def test_a_chunked_body_that_ends_early_is_malformed(data: bytes) -> None:
    for end in range(0, len(data), 1 if len(data) < 400 else 37):
        with pytest.raises(p.RequestError) as e:
            body_of(data[:end])
        assert e.value.status == 400, end


BAD_CHUNKED: List[Tuple[str, bytes, int]] = [
    ("no size", b"\r\nhello\r\n0\r\n\r\n", 400),
    ("only an extension", b";a\r\nhello\r\n0\r\n\r\n", 400),
    ("no digit", b"g\r\nhello\r\n0\r\n\r\n", 400),
    ("a sign", b"+5\r\nhello\r\n0\r\n\r\n", 400),
    ("a minus", b"-5\r\nhello\r\n0\r\n\r\n", 400),
    ("0x", b"0x5\r\nhello\r\n0\r\n\r\n", 400),
    ("an underscore", b"0_5\r\nhello\r\n0\r\n\r\n", 400),
    ("a leading blank", b" 5\r\nhello\r\n0\r\n\r\n", 400),
    ("a trailing blank", b"5 \r\nhello\r\n0\r\n\r\n", 400),
    ("a trailing tab", b"5\t\r\nhello\r\n0\r\n\r\n", 400),
    ("a word behind the size", b"5 a\r\nhello\r\n0\r\n\r\n", 400),
    ("a NUL behind the size", b"5\x00\r\nhello\r\n0\r\n\r\n", 400),
    ("a NUL in an extension", b"5;\x00\r\nhello\r\n0\r\n\r\n", 400),
    ("a CR in an extension", b"5;a\rb\r\nhello\r\n0\r\n\r\n", 400),
    ("two CR", b"5\r\r\nhello\r\n0\r\n\r\n", 400),
    ("a bare LF behind the size", b"5\nhello\r\n0\r\n\r\n", 400),
    ("a bare LF behind an extension", b"5;a\nhello\r\n0\r\n\r\n", 400),
    ("a bare LF behind the data", b"5\r\nhello\n0\r\n\r\n", 400),
    ("a bare CR behind the data", b"5\r\nhello\r0\r\n\r\n", 400),
    ("two bytes in place of CR LF", b"5\r\nhello\n\r0\r\n\r\n", 400),
    ("two letters in place of CR LF", b"5\r\nhelloab0\r\n\r\n", 400),
    ("nothing behind the data", b"5\r\nhello0\r\n\r\n", 400),
    ("more data than announced", b"4\r\nhello\r\n0\r\n\r\n", 400),
    ("less data than announced", b"6\r\nhello\r\n0\r\n\r\n", 400),
    ("a bare LF at the end", b"5\r\nhello\r\n0\r\n\n", 400),
    ("a bare LF behind the last size", b"5\r\nhello\r\n0\n\r\n", 400),
    ("a bare LF behind a trailer", b"5\r\nhello\r\n0\r\nA: b\n\r\n", 400),
    ("a trailer without a colon", b"5\r\nhello\r\n0\r\nA\r\n\r\n", 400),
    ("a folded trailer", b"5\r\nhello\r\n0\r\nA: b\r\n c\r\n\r\n", 400),
    ("a blank before a trailer's colon", b"5\r\nhello\r\n0\r\nA : b\r\n\r\n", 400),
    ("a NUL in a trailer", b"5\r\nhello\r\n0\r\nA: \x00\r\n\r\n", 400),
    ("101 trailers", b"5\r\nhello\r\n0\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
    ("full-width digits", "\uff15\r\nhello\r\n0\r\n\r\n".encode(), 400),
    ("one byte over 1 GiB", b"40000001\r\n", 413),
    ("one byte over 1 GiB, leading zeros", b"0000000040000001\r\n", 413),
    ("one byte over 1 GiB in two chunks", b"5\r\nhello\r\n3ffffffc\r\n", 413),
    ("2**32", b"100000000\r\n", 413),
    ("2**64 - 1", b"ffffffffffffffff\r\n", 413),
    ("2**64 + 5", b"10000000000000005\r\nhello\r\n0\r\n\r\n", 400),
]


@pytest.mark.parametrize(
    ("data", "status"), [b[1:] for b in BAD_CHUNKED], ids=[b[0] for b in BAD_CHUNKED]
)
def test_a_malformed_chunked_body_is_refused_in_pieces_of_every_size(
    data: bytes, status: int
) -> None:
    for size in (1, 2, 3, 5, 7, 11, len(data)):
        with pytest.raises(p.RequestError) as e:
            body_of(data, size)
        assert e.value.status == status
        assert str(e.value).isprintable()


def test_a_chunked_body_of_1_gib_in_all_is_not_too_large() -> None:
    stream = io.BytesIO(b"5\r\nhello\r\n3ffffffb\r\n")
    sizes = p.chunk_sizes(stream)
    assert next(sizes) == 5
    assert stream.read(5) == b"hello"
    assert next(sizes) == (1 << 30) - 5


@pytest.mark.parametrize("where", ["size", "trailer"])
def test_a_line_of_a_chunked_body_that_does_not_end_is_refused(where: str) -> None:
    line = {"size": b"5;", "trailer": b"5\r\nhello\r\n0\r\nA: "}[where] + b"a" * 20000
    with pytest.raises(p.RequestError) as e:
        body_of(line)
    assert e.value.status in (400, 431)


def test_random_bytes_raise_nothing_but_request_errors() -> None:
    rng = random.Random(4)
    alphabet = [b"\r\n", b"\n", b"\r", b":", b" ", b"a", b"5", b"0", b";", b"\x00", b"\xff", b"/"]
    alphabet += [b"GET / HTTP/1.1\r\n", b"Host: a\r\n", b"Content-Length: ", b"\r\n\r\n", b"http://"]
    alphabet += [b"Transfer-Encoding: chunked\r\n", b"[::1]", b"%", b"Expect: ", b"HTTP/1.0"]
    for _ in range(3000):
        data = b"".join(rng.choices(alphabet, k=rng.randrange(30)))
        for read in (head_of, body_of):
            for prefix in (b"", b"GET / HTTP/1.1\r\nHost: a\r\n"):
                with contextlib.suppress(p.RequestError):
                    read(prefix + data)


# ================================================================ requests that are refused

START = b"GET /healthz HTTP/1.1\r\n" + HOST
SIGN = b"POST /sign HTTP/1.1\r\n" + HOST


HELLO = b"5\r\nhello\r\n0\r\n\r\n"


def line_of(first: bytes) -> bytes:
    return first + b"\r\n" + HOST + b"\r\n"


def field_of(field: bytes, start: bytes = START) -> bytes:
    return start + field + b"\r\n\r\n"


def signing(fields: bytes) -> bytes:
    """A request for a signature whose only fault is in FIELDS."""
    return SIGN + b"Content-Length: 5\r\n" + fields + b"\r\n\r\nhello"


MALFORMED: List[Tuple[str, bytes, int]] = [
    # The request line.
    ("nothing but an empty line", b"\r\n\r\n", 400),
    ("an empty line first", b"\r\n" + get("/healthz"), 400),
    ("a bare LF first", b"\n" + get("/healthz"), 400),
    ("no version", line_of(b"GET /healthz"), 400),
    ("no target", line_of(b"GET HTTP/1.1"), 400),
    ("an empty target", line_of(b"GET  HTTP/1.1"), 400),
    ("no method", line_of(b"/healthz HTTP/1.1"), 400),
    ("an empty method", line_of(b" /healthz HTTP/1.1"), 400),
    ("two blanks before the target", line_of(b"GET  /healthz HTTP/1.1"), 400),
    ("two blanks before the version", line_of(b"GET /healthz  HTTP/1.1"), 400),
    ("tabs for blanks", line_of(b"GET\t/healthz\tHTTP/1.1"), 400),
    ("a blank at the line's end", line_of(b"GET /healthz HTTP/1.1 "), 400),
    ("a blank in the target", line_of(b"GET /healthz a HTTP/1.1"), 400),
    ("a form feed for a blank", line_of(b"GET\x0c/healthz HTTP/1.1"), 400),
    ("a method with a parenthesis", line_of(b"G(T /healthz HTTP/1.1"), 400),
    ("a method with a colon", line_of(b"GET: /healthz HTTP/1.1"), 400),
    ("a method beyond ASCII", line_of(b"G\xc3\x89T /healthz HTTP/1.1"), 400),
    ("a method with a NUL", line_of(b"GET\x00 /healthz HTTP/1.1"), 400),
    ("a version in small letters", line_of(b"GET /healthz http/1.1"), 400),
    ("HTTP/0.9", line_of(b"GET /healthz HTTP/0.9"), 400),
    ("HTTP/1.2", line_of(b"GET /healthz HTTP/1.2"), 400),
    ("HTTP/1.10", line_of(b"GET /healthz HTTP/1.10"), 400),
    ("HTTP/1", line_of(b"GET /healthz HTTP/1"), 400),
    ("HTTP/01.1", line_of(b"GET /healthz HTTP/01.1"), 400),
    ("HTTP/1,1", line_of(b"GET /healthz HTTP/1,1"), 400),
    ("HTTP/+1.1", line_of(b"GET /healthz HTTP/+1.1"), 400),
    ("HTTP/2.0", line_of(b"GET /healthz HTTP/2.0"), 400),
    ("HTTP/2's preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ("another protocol's version", line_of(b"GET /healthz RTSP/1.1"), 400),
    ("TLS", b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(160), 400),
    ("SSH", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 400),
    ("an agent's client", b"\x00\x00\x00\x01\x0b\r\n\r\n", 400),
    ("a target without a slash", line_of(b"GET healthz HTTP/1.1"), 400),
    ("a target of a query", line_of(b"GET ?a HTTP/1.1"), 400),
    ("a target of an asterisk", line_of(b"OPTIONS * HTTP/1.1"), 400),
    ("a target of an authority", line_of(b"CONNECT localhost:80 HTTP/1.1"), 400),
    ("a target of https", line_of(b"GET https://localhost/healthz HTTP/1.1"), 400),
    ("a target of a file", line_of(b"GET file:///healthz HTTP/1.1"), 400),
    ("an absolute target with a user", line_of(b"GET http://a@localhost/ HTTP/1.1"), 400),
    ("an absolute target with a bad port", line_of(b"GET http://localhost:a/ HTTP/1.1"), 400),
    ("an absolute target with a bad address", line_of(b"GET http://[::z]/ HTTP/1.1"), 400),
    ("a fragment", line_of(b"GET /healthz#a HTTP/1.1"), 400),
    ("a quote in the target", line_of(b'GET /healthz"a HTTP/1.1'), 400),
    ("a backslash in the target", line_of(b"GET \\healthz HTTP/1.1"), 400),
    ("angle brackets in the target", line_of(b"GET /<healthz> HTTP/1.1"), 400),
    ("braces in the target", line_of(b"GET /{healthz} HTTP/1.1"), 400),
    ("a pipe in the target", line_of(b"GET /healthz|a HTTP/1.1"), 400),
    ("a NUL in the target", line_of(b"GET /healthz\x00 HTTP/1.1"), 400),
    ("an escape character in the target", line_of(b"GET /healthz\x1b[0m HTTP/1.1"), 400),
    ("a target beyond ASCII", line_of(b"GET /h\xc3\xa9 HTTP/1.1"), 400),
    ("a lone percent sign", line_of(b"GET /healthz% HTTP/1.1"), 400),
    ("a percent sign and one digit", line_of(b"GET /healthz%4 HTTP/1.1"), 400),
    ("a percent sign and no hex", line_of(b"GET /healthz%zz HTTP/1.1"), 400),
    # Line ends.
    ("a bare LF behind the request line", b"GET /healthz HTTP/1.1\n" + HOST + b"\r\n", 400),
    ("a bare LF behind a field", START + b"A: b\nC: d\r\n\r\n", 400),
    ("a bare LF at the head's end", START + b"\n", 400),
    ("bare LFs throughout", b"GET /healthz HTTP/1.1\nHost: localhost\n\n", 400),
    ("a bare CR in the request line", line_of(b"GET /healthz\rHTTP/1.1"), 400),
    ("a bare CR in a value", field_of(b"A: b\rc"), 400),
    ("a bare CR in a name", field_of(b"A\rB: c"), 400),
    ("a bare CR before a field", field_of(b"\rA: b"), 400),
    ("two CRs before an LF", field_of(b"A: b\r"), 400),
    ("a smuggled field behind a CR", field_of(b"A: b\rContent-Length: 5"), 400),
    # Fields.
    ("a folded field", field_of(b"A: b\r\n c"), 400),
    ("a field folded by a tab", field_of(b"A: b\r\n\tc"), 400),
    ("a fold of blanks alone", field_of(b"A: b\r\n "), 400),
    ("a blank before the first field", b"GET /healthz HTTP/1.1\r\n Host: localhost\r\n\r\n", 400),
    ("a blank before the colon", field_of(b"A : b"), 400),
    ("a tab before the colon", field_of(b"A\t: b"), 400),
    ("a blank before Content-Length's colon", field_of(b"Content-Length : 5", SIGN), 400),
    ("a blank before Host's colon", b"GET /healthz HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
    ("a field without a colon", field_of(b"A"), 400),
    ("a field without a name", field_of(b": b"), 400),
    ("a field of a colon", field_of(b":"), 400),
    ("a blank in a name", field_of(b"A B: c"), 400),
    ("a parenthesis in a name", field_of(b"A(B): c"), 400),
    ("a quote in a name", field_of(b'"A": c'), 400),
    ("a NUL in a name", field_of(b"A\x00: b"), 400),
    ("a name beyond ASCII", field_of(b"\xc3\x84: b"), 400),
    ("a NUL in a value", field_of(b"A: \x00"), 400),
    ("a NUL behind a length", field_of(b"Content-Length: 5\x00", SIGN), 400),
    ("a control character in a value", field_of(b"A: \x01"), 400),
    ("a vertical tab in a value", field_of(b"A: b\x0bc"), 400),
    ("an escape character in a value", field_of(b"A: \x1b[31m"), 400),
    ("a DEL in a value", field_of(b"A: \x7f"), 400),
    # Host.
    ("no Host", b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    ("no Host, but an absolute target", b"GET http://localhost/healthz HTTP/1.1\r\n\r\n", 400),
    ("the same Host twice", field_of(HOST.rstrip()), 400),
    ("two Hosts", field_of(b"Host: evil.example"), 400),
    ("two Hosts in HTTP/1.0", b"GET /healthz HTTP/1.0\r\n" + HOST + HOST + b"\r\n", 400),
    *(
        (f"Host {host!r}", b"GET /healthz HTTP/1.1\r\nHost: " + host + b"\r\n\r\n", 400)
        for host in (
            b"localhost/", b"a@localhost", b"local host", b"localhost,evil.example", b"::1",
            b"localhost:a", b"localhost:-1", b"[::1", b"[::g]", b"http://localhost", b"localhost#",
            b"localhost\\", b"\xe2\x80\xae", b"local%68ost", b"[::1%25lo]",
        )
    ),
    # Lengths and codings.
    ("two lengths", signing(b"Content-Length: 5"), 400),
    ("two different lengths", signing(b"Content-Length: 6"), 400),
    ("two lengths in HTTP/1.0",
     b"POST /sign HTTP/1.0\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400),
    ("two lengths with another path", field_of(b"Content-Length: 0\r\nContent-Length: 0"), 400),
    *(
        (f"length {length!r}", SIGN + b"Content-Length: " + length + b"\r\n\r\nhello", 400)
        for length in (
            b"", b"5, 5", b"5,5", b"5 5", b"+5", b"-5", b"0x5", b"5.0", b"1e1", b"5;", b"five",
            b"\xb2", b"\xef\xbc\x95", b"5_0", b'"5"', b"0,5", b"-0",
        )
    ),
    ("a length and chunked", signing(b"Transfer-Encoding: chunked"), 400),
    ("chunked and a length", post_chunked(HELLO, "Content-Length: 5"), 400),
    ("a length of 0 and chunked", post_chunked(HELLO, "Content-Length: 0"), 400),
    ("chunked in HTTP/1.0",
     b"POST /sign HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n" + HELLO, 400),
    ("chunked twice", post_chunked(HELLO, "Transfer-Encoding: chunked"), 400),
    ("chunked, then identity", post_chunked(HELLO, "Transfer-Encoding: identity"), 400),
    *(
        (f"coding {coding!r}", field_of(b"Transfer-Encoding: " + coding, SIGN) + HELLO, 400)
        for coding in (
            b"", b"identity", b"gzip", b"gzip, chunked", b"chunked, gzip", b"chunked, chunked",
            b"chunked,", b",chunked", b"xchunked", b"chunked;a=b", b'"chunked"', b"chu nked",
            b"chunked\xa0", b"\x85chunked",
        )
    ),
    ("no length", SIGN + b"\r\n", 411),
    ("no length in HTTP/1.0", b"POST /sign HTTP/1.0\r\n\r\nhello", 411),
    ("no length, but a type", SIGN + b"Content-Type: text/plain\r\n\r\nhello", 411),
    ("1 GiB and a byte", post(b"", length=(1 << 30) + 1), 413),
    ("a length of 2**64", post(b"", length=1 << 64), 413),
    ("a length of 5000 digits", SIGN + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
    ("an unknown expectation", signing(b"Expect: 200-ok"), 400),
    ("an empty expectation", signing(b"Expect:"), 400),
    ("two expectations", signing(b"Expect: 100-continue\r\nExpect: 100-continue"), 400),
    # The head's size.
    ("17 KiB in a value", field_of(b"A: " + b"b" * 17408), 431),
    ("17 KiB in a value, and a body", field_of(b"A: " + b"b" * 17408, SIGN) + b"a\nb\rc", 431),
    ("17 KiB in many values", field_of(b"A: %s\r\n" % (b"b" * 900) * 19 + b"C: d"), 431),
    ("17 KiB in a name", field_of(b"A" * 17408 + b": b"), 431),
    ("17 KiB in the target", line_of(b"GET /" + b"a" * 17408 + b" HTTP/1.1"), 431),
    ("17 KiB without a line end", b"a" * 17408, 431),
    ("101 fields", field_of(b"A: b\r\n" * 99 + b"C: d"), 431),
    ("1000 fields", field_of(b"A: b\r\n" * 999 + b"C: d"), 431),
    # What the fields of a request for a signature say.
    ("two namespaces", signing(b"SSHSIG-Namespace: git\r\nSSHSIG-Namespace: git"), 400),
    ("two hashes", signing(b"SSHSIG-Hash: sha512\r\nsshsig-hash: sha256"), 400),
    ("two keys", signing(b"SSHSIG-Key: a\r\nSSHSIG-Key: b"), 400),
    ("two authorizations", signing(b"Authorization: Bearer a\r\nAuthorization: Bearer b"), 400),
    *(
        (f"namespace {namespace!r}", signing(b"SSHSIG-Namespace: " + namespace), status)
        for namespace, status in (
            (b"", 400), (b"a b", 400), (b"git,git", 400), (b"g\xc3\xaft", 400), (b"a" * 256, 400),
            (b"file", 403), (b"a" * 255, 403),
        )
    ),
    *(
        (f"hash {name!r}", signing(b"SSHSIG-Hash: " + name), 400)
        for name in (
            b"", b"sha1", b"SHA512", b"sha-512", b"sha384", b"sha512,sha256", b"\xff", b"md5",
        )
    ),
    *(
        (f"key {key!r}", signing(b"SSHSIG-Key: " + key), 400)
        for key in (
            b"", b"a", b"SHA256:", b"SHA256:abc", b"MD5:00", b"ssh-ed25519", b"ssh-ed25519 AAAA",
            b"ssh-ed25519 \xff", b"ssh-dss AAAA", b"-----BEGIN OPENSSH PRIVATE KEY-----",
        )
    ),
    ("a key that nobody holds", signing(b"SSHSIG-Key: SHA256:" + b"A" * 43), 404),
    # Bodies.
    ("a length of 0", post(b""), 400),
    ("a length of many zeros", SIGN + b"Content-Length: 000\r\n\r\n", 400),
    ("a length of 0 in HTTP/1.0", b"POST /sign HTTP/1.0\r\nContent-Length: 0\r\n\r\n", 400),
    ("no chunk", post_chunked(b"0\r\n\r\n"), 400),
    *((f"chunked: {name}", post_chunked(data), status) for name, data, status in BAD_CHUNKED),
    # Paths and methods.
    *(
        (f"path {path}", get(path), 404)
        for path in (
            "/", "/nope", "/healthz/", "/healthz?", "/healthz?a=b", "/HEALTHZ", "/health",
            "//healthz", "/./healthz", "/a/../healthz", "/%68ealthz", "/healthz%00", "/healthz;a",
            "/publickey?", "/shim?a", "/sign?namespace=git", "/healthz,", "/.git/config",
        )
    ),
    ("a query behind /sign", b"POST /sign?a" + post(b"hello")[10:], 404),
    *(
        (f"method {method} {path}", method.encode() + get(path)[3:], 405)
        for method, path in (
            ("GET", "/sign"), ("HEAD", "/sign"), ("PUT", "/sign"), ("post", "/sign"),
            ("OPTIONS", "/sign"), ("POST", "/healthz"), ("get", "/healthz"), ("TRACE", "/healthz"),
            ("DELETE", "/publickey"), ("POST", "/publickey"), ("POST", "/shim"), ("PATCH", "/shim"),
            ("PROPFIND", "/healthz"), ("CONNECT", "/healthz"), ("GETGET", "/healthz"),
        )
    ),
    # Whose request it is.
    ("another host",
     b"POST /sign HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 5\r\n\r\nhello", 421),
    ("an empty host", b"GET /healthz HTTP/1.1\r\nHost:\r\n\r\n", 421),
    ("another host in the target", line_of(b"GET http://evil.example/healthz HTTP/1.1"), 421),
    ("an absolute target without a host", line_of(b"GET http:///healthz HTTP/1.1"), 421),
    ("a page", signing(b"Origin: http://evil.example"), 403),
    ("a browser", signing(b"Sec-Fetch-Site: same-origin"), 403),
    ("two Sec-Fetch-Sites", signing(b"Sec-Fetch-Site: none\r\nSec-Fetch-Site: none"), 400),
]  # fmt: skip


def test_there_are_plenty_of_malformed_requests() -> None:
    assert len(MALFORMED) > 200
    assert len({name for name, _, _ in MALFORMED}) == len(MALFORMED)


@pytest.mark.parametrize(
    ("data", "status"), [m[1:] for m in MALFORMED], ids=[m[0] for m in MALFORMED]
)
def test_a_malformed_request_gets_one_answer_and_the_agent_is_not_asked_to_sign(
    data: bytes, status: int, shared: Shared
) -> None:
    shared.agent.asked.clear()
    received, log = shared.ask(data)
    if not data.startswith(b"HEAD"):
        refused(the_one_answer(received), status)
    assert received.startswith(b"HTTP/1.1 %d " % status)
    assert shared.agent.signing == 0
    if status != 404 or b"SSHSIG-Key" not in data:
        assert shared.agent.asked == []
    assert len(log) == 1
    assert log_fields(log[0])["status"] == str(status)
    assert log[0].isprintable()


CUT: List[Tuple[str, bytes]] = [
    ("inside the method", b"GE"),
    ("inside the request line", b"GET /healthz HT"),
    ("behind the request line", b"GET /healthz HTTP/1.1\r\n"),
    ("inside a CR LF", b"GET /healthz HTTP/1.1\r"),
    ("inside a field", START + b"A: b"),
    ("before the empty line", START),
    ("inside the empty line", START + b"\r"),
    ("before the body", post(b"", length=5)),
    ("inside the body", post(b"hell", length=5)),
    ("inside a large body", post(bytes(100000), length=1 << 30)),
    ("before the first chunk", post_chunked(b"")),
    ("inside a chunk's size", post_chunked(b"5")),
    ("inside a chunk", post_chunked(b"5\r\nhell")),
    ("behind a chunk", post_chunked(b"5\r\nhello")),
    ("behind a chunk's end", post_chunked(b"5\r\nhello\r\n")),
    ("before the last empty line", post_chunked(b"5\r\nhello\r\n0\r\n")),
    ("inside the trailers", post_chunked(b"5\r\nhello\r\n0\r\nA: b\r\n")),
    ("inside a chunk of the largest size", post_chunked(b"40000000\r\nhello")),
]


@pytest.mark.parametrize("data", [c[1] for c in CUT], ids=[c[0] for c in CUT])
def test_a_request_that_ends_early_is_malformed(data: bytes, shared: Shared) -> None:
    shared.agent.asked.clear()
    refused(the_one_answer(cut(shared.port, data)), 400)
    assert shared.agent.asked == []


def test_allow_names_the_methods(shared: Shared) -> None:
    for path in ("/healthz", "/publickey", "/shim"):
        answer = refused(http(shared.port, "PUT", path, b"x"), 405)
        assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}
    assert refused(http(shared.port, "GET", "/sign"), 405).headers["allow"] == "POST"


# ---------------------------------------------------------------- which fault comes first

EVIL = "Host: evil.example"
PAGE = "Origin: http://evil.example"
LENGTH = "Content-Length: 5"
HUGE = "Content-Length: 1073741825"

# Each request has two faults; the status is that of the one that is looked at first.
ORDER: List[Tuple[str, str, List[str], str, int]] = [
    ("framing before host", "POST /sign", [EVIL, LENGTH, LENGTH], "", 400),
    ("framing before browser", "POST /sign", ["Host: a.localhost", PAGE, LENGTH, LENGTH], "", 400),
    ("framing before path", "GET /nope", ["Host: a.localhost", "A : b"], "", 400),
    ("host before browser", "POST /sign", [EVIL, PAGE, LENGTH], "hello", 421),
    ("host before path", "GET /nope", [EVIL], "", 421),
    ("host before method", "DELETE /sign", [EVIL], "", 421),
    ("host before length", "POST /sign", [EVIL], "", 421),
    ("host before size", "POST /sign", [EVIL, HUGE], "", 421),
    ("browser before path", "GET /nope", [PAGE], "", 403),
    ("browser before method", "OPTIONS /sign", [PAGE], "", 403),
    ("browser before length", "POST /sign", [PAGE], "", 403),
    ("browser before size", "POST /sign", [PAGE, HUGE], "", 403),
    ("path before method", "DELETE /nope", [], "", 404),
    ("path before headers", "POST /nope", ["SSHSIG-Hash: md5", LENGTH], "hello", 404),
    ("path before length", "POST /nope", [], "", 404),
    ("path before size", "POST /nope", [HUGE], "", 404),
    ("method before headers", "PUT /sign", ["SSHSIG-Hash: md5", LENGTH], "hello", 405),
    ("method before length", "PUT /sign", [], "", 405),
    ("method before size", "PUT /sign", [HUGE], "", 405),
    ("a bad header before length", "POST /sign", ["SSHSIG-Hash: md5"], "", 400),
    ("a bad header before size", "POST /sign", ["SSHSIG-Key: a", HUGE], "", 400),
    ("a namespace before length", "POST /sign", ["SSHSIG-Namespace: file"], "", 403),
    ("a namespace before size", "POST /sign", ["SSHSIG-Namespace: file", HUGE], "", 403),
    ("length before agent", "POST /sign", ["SSHSIG-Key: SHA256:" + "A" * 43], "", 411),
    ("size before agent", "POST /sign", ["SSHSIG-Key: SHA256:" + "A" * 43, HUGE], "", 413),
    ("body before agent", "POST /sign",
     ["SSHSIG-Key: SHA256:" + "A" * 43, "Transfer-Encoding: chunked"], "0\r\n\r\n", 400),
]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "fields", "body", "status"), [o[1:] for o in ORDER], ids=[o[0] for o in ORDER]
)
def test_checks_come_in_order(
    first: str, fields: List[str], body: str, status: int, shared: Shared
) -> None:
    shared.agent.asked.clear()
    hosts = [] if any(f.startswith("Host") for f in fields) else ["Host: localhost"]
    head = f"{first} HTTP/1.1\r\n".encode() + lines(hosts + fields) + b"\r\n"
    refused(the_one_answer(raw(shared.port, head + body.encode())), status)
    assert shared.agent.asked == []


@pytest.mark.parametrize(
    ("first", "fields", "status"),
    [
        ("POST /sign", ["Host: evil.example"], 421),
        ("POST /sign", ["Host: localhost", PAGE], 403),
        ("POST /sign", ["Host: localhost", "SSHSIG-Namespace: file"], 403),
        ("POST /sign", ["Host: localhost", "SSHSIG-Hash: md5"], 400),
        ("POST /sign", ["Host: localhost", "SSHSIG-Key: a"], 400),
        ("POST /nope", ["Host: localhost"], 404),
        ("PUT /sign", ["Host: localhost"], 405),
        ("POST /healthz", ["Host: localhost"], 405),
        ("GET /healthz", ["Host: localhost"], 200),
        ("GET /publickey", ["Host: localhost"], 200),
    ],
)
@pytest.mark.parametrize("body", ["length", "chunked"])
@pytest.mark.parametrize("expect", [False, True])
def test_what_needs_only_the_head_is_decided_before_the_body(
    first: str, fields: List[str], status: int, body: str, expect: bool, shared: Shared
) -> None:
    framing = {"length": "Content-Length: 1073741824", "chunked": "Transfer-Encoding: chunked"}
    fields = [*fields, framing[body]] + (["Expect: 100-continue"] if expect else [])
    # No byte of the body is ever sent; an interim answer would count as a second one.
    head = f"{first} HTTP/1.1\r\n".encode() + lines(fields) + b"\r\n"
    answer = the_one_answer(raw(shared.port, head))
    assert answer.status == status


def test_too_large_a_length_is_refused_before_the_body(shared: Shared) -> None:
    for expect in ((), ("Expect: 100-continue",)):
        refused(the_one_answer(raw(shared.port, post(b"", *expect, length=(1 << 30) + 1))), 413)


# ================================================================ requests that are served


def test_healthz_is_ok(shared: Shared) -> None:
    shared.agent.asked.clear()
    answer = the_one_answer(raw(shared.port, get("/healthz")))
    assert (answer.status, answer.body) == (200, b"ok\n")
    assert shared.agent.asked == []


def test_publickey_is_the_line_of_the_key_that_signs(proxy: Proxy, keys: Keys) -> None:
    answer = the_one_answer(raw(proxy.port, get("/publickey")))
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.text == keys.line("ed25519") + "\n"


def test_shim_is_the_script_beside_the_program(shared: Shared) -> None:
    answer = the_one_answer(raw(shared.port, get("/shim")))
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/x-shellscript"
    assert answer.body == SHIM.read_bytes()


def test_where_only_the_program_was_copied_the_shim_is_not_found(short: Path, home: Path) -> None:
    copy = Path(shutil.copy(PROXY, short))
    argv = [sys.executable, str(copy), "--addr", "127.0.0.1:0", "--upstream", str(short / "none")]
    proxy = Proxy(argv, clean_env(home))
    try:
        assert "shim.sh" in refused(the_one_answer(raw(proxy.port, get("/shim"))), 404).text
    finally:
        proxy.stop()


def test_sign_answers_with_the_block_that_ssh_keygen_writes(
    proxy: Proxy, ssh_keygen: Callable[..., bytes]
) -> None:
    answer = the_one_answer(raw(proxy.port, post(b"payload\n")))
    assert (answer.status, answer.body) == (200, ssh_keygen(b"payload\n"))
    assert answer.headers["content-type"] == "application/x-ssh-signature"


@pytest.mark.parametrize("path", ["/healthz", "/publickey", "/shim"])
def test_head_is_get_without_the_body(path: str, shared: Shared) -> None:
    whole = parse_answer(raw(shared.port, get(path)))
    head = parse_answer(raw(shared.port, b"HEAD" + get(path)[3:]))
    assert head.body == b""
    assert head.status == 200
    assert {**head.headers, "date": ""} == {**whole.headers, "date": ""}


def test_an_error_answer_to_head_has_no_body(shared: Shared) -> None:
    for data in (
        b"HEAD /nope HTTP/1.1\r\n" + HOST + b"\r\n",
        b"HEAD /sign HTTP/1.1\r\n" + HOST + b"\r\n",
        b"HEAD /healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    ):
        assert parse_answer(raw(shared.port, data)).body == b""


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("connection", [None, "keep-alive", "close", "Upgrade, HTTP2-Settings"])
def test_every_answer_ends_the_connection(
    version: str, connection: Optional[str], shared: Shared
) -> None:
    field = f"Connection: {connection}\r\n" if connection else ""
    for first, body in (("GET /healthz", ""), ("POST /sign", "x"), ("GET /nope", "")):
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        data = f"{first} HTTP/{version}\r\nHost: localhost\r\n{field}{length}\r\n{body}".encode()
        the_one_answer(raw(shared.port, data))


def test_http_1_0_signs_too(proxy: Proxy, ssh_keygen: Callable[..., bytes]) -> None:
    data = b"POST /sign HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello"
    assert the_one_answer(raw(proxy.port, data)).body == ssh_keygen(b"hello")


@pytest.mark.parametrize("body", ["length", "chunked", "missing"])
def test_a_body_where_none_belongs_is_of_no_interest(body: str, shared: Shared) -> None:
    framed = {
        "length": get("/healthz", "Content-Length: 5") + b"hello",
        "chunked": get("/healthz", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n",
        "missing": get("/healthz", "Content-Length: 5"),
    }[body]
    assert the_one_answer(raw(shared.port, framed)).body == b"ok\n"


SECOND = b"POST /sign HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\ny"


FIRST: List[Tuple[str, bytes, int, int]] = [
    ("healthz", get("/healthz"), 200, 0),
    ("publickey", get("/publickey"), 200, 0),
    ("keep-alive", get("/healthz", "Connection: keep-alive"), 200, 0),
    ("keep-alive in HTTP/1.0", b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200, 0),
    ("no such path", get("/nope"), 404, 0),
    ("a length of 0", get("/healthz", "Content-Length: 0"), 200, 0),
    ("no chunk", get("/healthz", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 200, 0),
    ("head", b"HEAD" + get("/healthz")[3:], 200, 0),
    ("sign", post(b"x"), 200, 1),
    ("sign, keep-alive", post(b"x", "Connection: keep-alive"), 200, 1),
    ("sign, chunked", post_chunked(chunks(b"x", [])), 200, 1),
    ("sign, an empty body", post(b""), 400, 0),
    ("sign, from a page", post(b"x", PAGE), 403, 0),
    ("nonsense", b"a\r\n\r\n", 400, 0),
]


@pytest.mark.parametrize(
    ("first", "status", "signatures"), [f[1:] for f in FIRST], ids=[f[0] for f in FIRST]
)
def test_a_second_request_is_never_read(
    first: bytes, status: int, signatures: int, shared: Shared
) -> None:
    shared.agent.asked.clear()
    received, log = shared.ask(first + SECOND)
    assert received.startswith(b"HTTP/1.1 %d " % status)
    assert answers_in(received) == 1
    assert shared.agent.signing == signatures
    assert len(log) == 1


# ---------------------------------------------------------------- 100 (Continue)

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_client_that_waits_is_told_to_go_on(
    framing: str, proxy: Proxy, ssh_keygen: Callable[..., bytes]
) -> None:
    expect = "Expect: 100-continue"
    head, body = {
        "length": (post(b"", expect, length=5), b"hello"),
        "chunked": (post_chunked(b"", expect), chunks(b"hello", [2])),
    }[framing]
    with connect(proxy.port) as s:
        s.sendall(head)
        interim = b""
        while len(interim) < len(CONTINUE):
            piece = s.recv(1024)
            assert piece, interim
            interim += piece
        assert interim == CONTINUE
        s.sendall(body)
        assert the_one_answer(read_all(s)).body == ssh_keygen(b"hello")


def test_a_client_that_does_not_wait_is_served_too(
    proxy: Proxy, ssh_keygen: Callable[..., bytes]
) -> None:
    data = raw(proxy.port, post(b"hello", "Expect: 100-continue"))
    assert parse_answer(data).body == ssh_keygen(b"hello")
    assert data.count(b"HTTP/1.1 200 ") == 1


def test_http_1_0_knows_no_interim_answer(proxy: Proxy, ssh_keygen: Callable[..., bytes]) -> None:
    data = b"POST /sign HTTP/1.0\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello"
    assert the_one_answer(raw(proxy.port, data)).body == ssh_keygen(b"hello")


def test_nobody_is_told_to_go_on_unasked(proxy: Proxy, ssh_keygen: Callable[..., bytes]) -> None:
    with connect(proxy.port) as s:
        s.sendall(post(b"", length=5))
        all_read(proxy.port)
        s.sendall(b"hello")
        assert the_one_answer(read_all(s)).body == ssh_keygen(b"hello")


# ---------------------------------------------------------------- bodies of all sizes


def payload_of(size: int) -> bytes:
    return random.Random(size).getrandbits(8 * size).to_bytes(size, "big")


HEAD_SIZE = len(post(b"", length=99999))
EDGES = sorted(
    {1, 2, 3, 1 << 12, 100000, MIB + 1}
    | {edge + off for edge in (1 << 16, 1 << 17, 1 << 18, 1 << 19) for off in (-1, 0, 1)}
    | {edge - HEAD_SIZE + off for edge in (1 << 14, 1 << 15, 1 << 16) for off in (-1, 0, 1)}
)


def test_bodies_of_every_size_are_signed_as_ssh_keygen_does(
    proxy: Proxy, ssh_keygen: Callable[..., bytes]
) -> None:
    rng = random.Random(1)
    for size in EDGES:
        payload = payload_of(size)
        expected = ssh_keygen(payload)
        sizes = [rng.randrange(1, 1 + max(1, size // 3)) for _ in range(5)]
        for data in (post(payload), post_chunked(chunks(payload, sizes))):
            assert the_one_answer(raw(proxy.port, data)).body == expected, size


@pytest.mark.parametrize("hash_algorithm", ["sha512", "sha256"])
def test_16_mib_are_signed_as_ssh_keygen_does(
    hash_algorithm: str, proxy: Proxy, ssh_keygen: Callable[..., bytes]
) -> None:
    payload = payload_of(MIB) * 16
    expected = ssh_keygen(payload, hash_algorithm)
    field = f"SSHSIG-Hash: {hash_algorithm}"
    for data in (post(payload, field), post_chunked(chunks(payload, [1, 77777, 5 * MIB]), field)):
        assert the_one_answer(raw(proxy.port, data)).body == expected


@pytest.mark.parametrize("hash_algorithm", ["sha512", "sha256"])
def test_a_byte_is_signed_as_ssh_keygen_does(
    hash_algorithm: str, proxy: Proxy, ssh_keygen: Callable[..., bytes]
) -> None:
    for byte in (b"\x00", b"\n", b"\xff"):
        answer = the_one_answer(raw(proxy.port, post(byte, f"SSHSIG-Hash: {hash_algorithm}")))
        assert answer.body == ssh_keygen(byte, hash_algorithm)


def test_a_body_in_chunks_of_a_byte_with_extensions_and_trailers_is_signed(
    proxy: Proxy, ssh_keygen: Callable[..., bytes]
) -> None:
    payload = payload_of(2000)
    data = b"".join(b"001;a=%d\r\n%c\r\n" % (n, byte) for n, byte in enumerate(payload))
    answer = the_one_answer(raw(proxy.port, post_chunked(data + b"0\r\nA: b\r\n\r\n")))
    assert answer.body == ssh_keygen(payload)


@linux
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_request_split_anywhere_is_the_same(
    framing: str, proxy: Proxy, ssh_keygen: Callable[..., bytes]
) -> None:
    data = {"length": post(b"hello"), "chunked": post_chunked(chunks(b"hello", [2]))}[framing]
    expected = ssh_keygen(b"hello")
    for at in range(1, len(data)):
        with connect(proxy.port) as s:
            s.sendall(data[:at])
            all_read(proxy.port)
            s.sendall(data[at:])
            assert the_one_answer(read_all(s)).body == expected, at


@linux
def test_a_request_byte_by_byte_is_the_same(
    proxy: Proxy, ssh_keygen: Callable[..., bytes]
) -> None:
    with connect(proxy.port) as s:
        for byte in post_chunked(chunks(b"hello", [2])):
            s.sendall(bytes([byte]))
            all_read(proxy.port)
        assert the_one_answer(read_all(s)).body == ssh_keygen(b"hello")


def curl(proxy: Proxy, *args: Any, input: Optional[bytes] = None) -> bytes:
    need("curl", "curl")
    argv = ["curl", "-q", "-s", "-S", "--noproxy", "*", "--max-time", "30", *args]
    return run([*argv, f"{proxy.url}/sign"], input=input).stdout


def test_curl_is_served_in_all_its_ways(
    proxy: Proxy, short: Path, ssh_keygen: Callable[..., bytes]
) -> None:
    file = short / "file"
    chunked = ["-H", "Transfer-Encoding: chunked"]
    for size in (1, 5 * MIB):
        payload = payload_of(size)
        file.write_bytes(payload)
        expected = ssh_keygen(payload)
        assert curl(proxy, "--data-binary", f"@{file}") == expected
        assert curl(proxy, *chunked, "--data-binary", f"@{file}") == expected
        assert curl(proxy, "-X", "POST", "-T", file) == expected
        assert curl(proxy, "-X", "POST", "-T", "-", input=payload) == expected  # chunked
        expect = ["-H", "Expect: 100-continue"]
        assert curl(proxy, *expect, "--data-binary", f"@{file}") == expected
        assert curl(proxy, *expect, *chunked, "--data-binary", f"@{file}") == expected
        assert curl(proxy, "--http1.0", "--data-binary", f"@{file}") == expected


@linux
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_memory_stays_flat_under_a_body_of_256_mib(framing: str, shared: Shared) -> None:
    piece = bytes(4 * MIB)
    raw(shared.port, post(piece))
    before = memory(shared.pid, "VmHWM")
    with connect(shared.port) as s:
        if framing == "length":
            s.sendall(post(b"", length=64 * len(piece)))
            for _ in range(64):
                s.sendall(piece)
        else:
            s.sendall(post_chunked(b""))
            for _ in range(64):
                s.sendall(b"%x\r\n" % len(piece))
                s.sendall(piece)
                s.sendall(b"\r\n")
            s.sendall(b"0\r\n\r\n")
        assert the_one_answer(read_all(s, 60)).status == 200
    assert memory(shared.pid, "VmHWM") - before < 4 * MIB


# ---------------------------------------------------------------- clients that are still sending


UNWELCOME: List[Tuple[str, bytes, int]] = [
    ("from a page", post(b"", PAGE, length=64 * MIB), 403),
    ("chunked, from a page", post_chunked(b"4000000\r\n", PAGE), 403),
    ("to no such path", b"PUT /nope" + post(b"", length=64 * MIB)[10:], 404),
    ("by another method", b"PUT /sign" + post(b"", length=64 * MIB)[10:], 405),
    ("too large", post(b"", length=1 << 40), 413),
    ("nonsense", b"nonsense\r\n\r\n", 400),
    ("chunked, nonsense", post_chunked(b"nonsense\r\n"), 400),
    ("a body that nobody needs", get("/healthz", "Content-Length: 67108864"), 200),
]


@pytest.mark.parametrize(
    ("head", "status"), [u[1:] for u in UNWELCOME], ids=[u[0] for u in UNWELCOME]
)
def test_an_answer_reaches_a_client_that_sends_all_before_it_reads(
    head: bytes, status: int, shared: Shared
) -> None:
    with connect(shared.port) as s:
        s.sendall(head)
        for _ in range(16):
            s.sendall(bytes(4 * MIB))
        assert the_one_answer(read_all(s)).status == status


def test_an_answer_reaches_a_client_that_never_said_how_much_it_sends(shared: Shared) -> None:
    with connect(shared.port) as s:
        s.sendall(SIGN + b"\r\n")
        wait_for(lambda: readable([s]))
        for _ in range(16):
            s.sendall(bytes(4 * MIB))
        refused(the_one_answer(read_all(s)), 411)


def test_an_answer_reaches_curl_that_is_still_sending(proxy: Proxy, short: Path) -> None:
    file = short / "file"
    with file.open("wb") as f:
        f.truncate(64 * MIB)
    for how in (["-X", "POST", "-T", file], ["--data-binary", f"@{file}"]):
        for expect in ("Expect:", "Expect: 100-continue"):
            answer = curl(proxy, "-H", PAGE, "-H", expect, "-w", "%{http_code}", *how)
            assert answer.endswith(b"\n403"), answer


def test_a_client_that_never_stops_sending_is_left(quick: Shared) -> None:
    with connect(quick.port) as s:
        s.sendall(get("/nope"))
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                s.sendall(bytes(65536))


def test_a_client_that_never_closes_is_left(quick: Shared) -> None:
    with connect(quick.port) as s:
        s.sendall(b"nonsense\r\n\r\n")
        refused(the_one_answer(read_all(s)), 400)
        wait_for(lambda: hung_up(s), message="the proxy closes its side for good")


def hung_up(s: socket.socket) -> bool:
    """Has the other side closed both ways? A byte sent to it is answered by a reset then."""
    try:
        s.send(b"x")
    except OSError:
        return True
    return False


# ================================================================ clients that are slow


def test_a_connection_that_sends_nothing_is_closed_in_silence(quick: Shared) -> None:
    assert quick.ask(b"") == (b"", [])


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_a_connection_that_goes_without_a_word_is_no_line_in_the_log(
    how: str, shared: Shared
) -> None:
    before = len(shared.proxy.log())
    with connect(shared.port) as s:
        peer = name_of(s)
        if how == "reset":
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how == "half-close":
            s.shutdown(socket.SHUT_WR)
            assert read_all(s) == b""
    assert shared.lines_of(peer, before) == []


SLOW = [
    ("part of a request line", b"GET /hea"),
    ("part of a field", START + b"A:"),
    ("all but the empty line", START),
    ("a head without its body", post(b"", length=5)),
    ("part of a body", post(b"hell", length=5)),
    ("a chunked head", post_chunked(b"")),
    ("part of a chunk's size", post_chunked(b"5")),
    ("part of a chunk", post_chunked(b"5\r\nhell")),
    ("all but the last chunk", post_chunked(b"5\r\nhello\r\n")),
    ("all but the last line", post_chunked(b"5\r\nhello\r\n0\r\n")),
]


@pytest.mark.parametrize("data", [s[1] for s in SLOW], ids=[s[0] for s in SLOW])
def test_a_request_that_stalls_is_too_slow(data: bytes, quick: Shared) -> None:
    quick.agent.asked.clear()
    received, log = quick.ask(data)
    refused(the_one_answer(received), 408)
    assert quick.agent.asked == []
    assert [log_fields(line)["status"] for line in log] == ["408"]


def drip(port: int, start: bytes, drop: bytes, pause: float) -> bytes:
    """The answer to START and then DROP over and over, one at each PAUSE, for at most 5 s."""
    with connect(port) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        s.sendall(start)
        end = time.monotonic() + 5
        while not select.select([s], [], [], pause)[0]:
            assert time.monotonic() < end, "it is still being read"
            s.sendall(drop)
        return read_all(s)


# The second hardly pauses: a byte is always there when the proxy looks.
PAUSES = [0.05, 0.0001]


@pytest.mark.parametrize("pause", PAUSES)
def test_a_head_that_drips_is_too_slow(pause: float, quick: Shared) -> None:
    refused(the_one_answer(drip(quick.port, START + b"A: ", b"a", pause)), 408)


@pytest.mark.parametrize("pause", PAUSES)
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_that_drips_is_too_slow_as_a_whole(
    framing: str, pause: float, hurried: Shared
) -> None:
    start, drop = {
        "length": (post(b"", length=1 << 30), b"a"),
        "chunked": (post_chunked(b""), b"1\r\na\r\n"),
    }[framing]
    refused(the_one_answer(drip(hurried.port, start, drop, pause)), 408)


def test_a_body_that_never_pauses_is_too_slow_as_a_whole(hurried: Shared) -> None:
    # Chunks of a byte, faster than anybody reads them.
    start = post_chunked(b"")
    refused(the_one_answer(drip(hurried.port, start, 100000 * b"1\r\na\r\n", 0)), 408)


def test_a_body_with_short_gaps_is_in_time(
    keys: Keys, scripted_agent: Callable[..., Path], tuned: Callable[..., Proxy]
) -> None:
    # The head has its time, the body has more: a gap is no sum of gaps.
    scripted = Scripted(keys.line("ed25519"))
    constants = {"HEAD_SECONDS": 0.3, "GAP_SECONDS": 0.4}
    proxy = tuned(constants, "--upstream", scripted_agent(scripted))
    with connect(proxy.port) as s:
        s.sendall(post(b"", length=9))
        for _ in range(8):
            s.sendall(b"x")
            assert not select.select([s], [], [], 0.1)[0], read_all(s)
        s.sendall(b"x")
        assert the_one_answer(read_all(s)).status == 200


# ================================================================ 128 places


class Clients:
    """Connections that stay open until the test is over."""

    def __init__(self) -> None:
        self.opened: List[socket.socket] = []

    def open(self, port: int, data: bytes, number: int = 1) -> List[socket.socket]:
        """NUMBER connections that have sent DATA, the first few one after the other."""
        for n in range(number):
            self.opened.append(connect(port))
            self.opened[-1].sendall(data)
            if n < 4 and sys.platform == "linux":
                all_read(port)
        if sys.platform == "linux":
            all_read(port)
        return self.opened[len(self.opened) - number :]


@pytest.fixture
def clients() -> Iterator[Clients]:
    """To be asked for last, so that the connections are closed before the proxy ends."""
    clients = Clients()
    yield clients
    for s in clients.opened:
        s.close()


def busy(data: bytes) -> None:
    busy_answer(the_one_answer(data))


def busy_answer(answer: Answer) -> None:
    assert "busy" in refused(answer, 503).text
    assert int(answer.headers["retry-after"]) > 0


def served(port: int) -> bool:
    return the_one_answer(raw(port, get("/healthz"))).body == b"ok\n"


@linux
def test_the_129th_takes_the_place_of_the_longest_idle_connection(
    proxy: Proxy, clients: Clients
) -> None:
    sockets = clients.open(proxy.port, b"", 1)
    # Threads may note the times of connections that come together in another order.
    assert all(served(proxy.port) for _ in range(5))
    sockets += clients.open(proxy.port, b"", 127)
    assert readable(sockets) == set()
    (newcomer,) = clients.open(proxy.port, START)
    wait_for(lambda: readable(sockets))
    assert readable(sockets) == {sockets[0]}
    assert read_all(sockets[0]) == b""
    newcomer.sendall(b"\r\n")
    assert the_one_answer(read_all(newcomer)).status == 200
    # The others keep theirs.
    for s in sockets[1:]:
        s.sendall(get("/healthz"))
        assert the_one_answer(read_all(s)).status == 200
    wait_for(lambda: len(request_lines(proxy.log())) == 133)


@linux
def test_the_129th_puts_off_the_head_that_has_been_waited_for_longest(
    proxy: Proxy, clients: Clients
) -> None:
    sockets = clients.open(proxy.port, b"POST /sign HTTP/1.1\r\nHost: loc", 128)
    sockets[0].sendall(b"al")  # now the second has been silent for longest
    all_read(proxy.port)
    assert served(proxy.port)
    wait_for(lambda: readable(sockets))
    assert readable(sockets) == {sockets[1]}
    busy(read_all(sockets[1]))
    sockets[0].sendall(b"host\r\nContent-Length: 1\r\n\r\nx")
    assert the_one_answer(read_all(sockets[0])).status == 200
    wait_for(lambda: len(request_lines(proxy.log())) >= 3)
    statuses = [log_fields(line)["status"] for line in request_lines(proxy.log())]
    assert sorted(statuses) == ["200", "200", "503"]


@linux
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_the_129th_puts_off_the_body_that_has_been_waited_for_longest(
    framing: str, proxy: Proxy, clients: Clients
) -> None:
    start, rest = {
        "length": (post(b"hel", length=5), b"lo"),
        "chunked": (post_chunked(b"5\r\nhel"), b"lo\r\n0\r\n\r\n"),
    }[framing]
    sockets = clients.open(proxy.port, start, 128)
    sockets[0].sendall(rest[:1])
    all_read(proxy.port)
    for evicted in (1, 2):
        assert served(proxy.port)
        wait_for(lambda: readable(sockets))
        assert readable(sockets) == {sockets[evicted]}
        busy(read_all(sockets[evicted]))
        # The place that the newcomer had is free again, and taken.
        sockets[evicted : evicted + 1] = clients.open(proxy.port, start)
    sockets[0].sendall(rest[1:])
    assert the_one_answer(read_all(sockets[0])).status == 200


@linux
def test_a_connection_that_is_put_off_can_still_be_sending(proxy: Proxy, clients: Clients) -> None:
    sockets = clients.open(proxy.port, post(b"hell", length=8 * MIB), 128)
    assert served(proxy.port)
    sockets[0].sendall(bytes(8 * MIB))
    busy(read_all(sockets[0]))


@linux
def test_where_128_wait_for_the_agent_the_129th_is_busy_at_once(
    gate: Scripted, gated: Proxy, clients: Clients
) -> None:
    sockets = clients.open(gated.port, post(b"x"), 128)
    wait_for(lambda: gate.signing == 128, message="all wait for the agent")
    silent = connect(gated.port)
    busy(read_all(silent))  # before it has sent a byte
    silent.close()
    busy(raw(gated.port, get("/healthz")))
    busy(raw(gated.port, post(b"x")))
    # One that sends much before it reads is told so too.
    busy(raw(gated.port, post(bytes(8 * MIB))))
    # Many that don't close: each has its answer, and they don't hold a thread each.
    waiting = clients.open(gated.port, b"", 400)
    wait_for(lambda: len(readable(waiting)) == 400)
    assert tasks(gated.pid) < 170
    for s in waiting:
        busy(read_all(s))
    assert gate.signing == 128
    assert readable(sockets) == set()
    gate.gate.set()
    for s in sockets:
        assert the_one_answer(read_all(s)).status == 200
    assert served(gated.port)


@linux
@pytest.mark.parametrize(
    "data", [b"", START, post(b"hell", length=5)], ids=["idle", "head", "body"]
)
def test_a_request_that_waits_for_the_agent_keeps_its_place(
    data: bytes, gate: Scripted, gated: Proxy, clients: Clients
) -> None:
    sockets = clients.open(gated.port, post(b"x"), 127)
    wait_for(lambda: gate.signing == 127)
    (last,) = clients.open(gated.port, data)
    (newcomer,) = clients.open(gated.port, START)
    if data:
        busy(read_all(last))
    else:
        assert read_all(last) == b""
    newcomer.sendall(b"\r\n")
    assert the_one_answer(read_all(newcomer)).status == 200
    gate.gate.set()
    for s in sockets:
        assert the_one_answer(read_all(s)).status == 200


@linux
def test_threads_stay_few_under_repeated_evictions(proxy: Proxy, clients: Clients) -> None:
    most = 0
    for n in range(600):
        clients.opened.append(connect(proxy.port))
        clients.opened[-1].sendall([b"", START, post(b"hell", length=5)][n % 3])
        most = max(most, tasks(proxy.pid))
    assert served(proxy.port)
    # 128 places, 16 that are closed gently, 16 that are about to be free, and the main thread.
    assert most < 170


def test_a_flood_of_idle_connections_keeps_nobody_out(
    proxy: Proxy, ssh_keygen: Callable[..., bytes], clients: Clients
) -> None:
    expected = ssh_keygen(b"hello")
    for _ in range(40):
        clients.opened += [connect(proxy.port) for _ in range(10)]
        assert the_one_answer(raw(proxy.port, post(b"hello"))).body == expected


def stopped(pid: int) -> bool:
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def all_at_once(proxy: Proxy, number: int, data: bytes, clients: Clients) -> List[Answer]:
    """The answers to NUMBER requests that are there, sent in full, before the proxy looks."""
    os.kill(proxy.pid, signal.SIGSTOP)
    wait_for(lambda: stopped(proxy.pid))
    sockets = [connect(proxy.port) for _ in range(number)]
    clients.opened += sockets
    for s in sockets:
        s.sendall(data)
    os.kill(proxy.pid, signal.SIGCONT)
    return [the_one_answer(read_all(s, 30)) for s in sockets]


@linux
def test_200_at_once_are_all_served_in_the_end(
    proxy: Proxy, ssh_keygen: Callable[..., bytes], clients: Clients
) -> None:
    expected = ssh_keygen(b"hello")
    left = 200
    while left:
        answers = all_at_once(proxy, left, post(b"hello"), clients)
        signed = [answer for answer in answers if answer.status == 200]
        assert {answer.body for answer in signed} == {expected}
        left -= len(signed)


@linux
@pytest.mark.parametrize("size", [1, 50000])
def test_a_client_that_has_sent_its_request_is_never_turned_away_in_silence(
    size: int, agent: Agent, keys: Keys, tuned: Callable[..., Proxy], clients: Clients
) -> None:
    # With few places newcomers take them from clients that have done their part.
    agent.add(keys["ed25519"])
    proxy = tuned({"PLACES": 2}, "--upstream", agent.sock)
    for _ in range(10):
        for answer in all_at_once(proxy, 50, post(bytes(size)), clients):
            if answer.status != 200:
                busy_answer(answer)


def test_healthz_answers_while_the_agent_hangs(
    gate: Scripted, gated: Proxy, clients: Clients
) -> None:
    sockets = clients.open(gated.port, post(b"x"), 20)
    wait_for(lambda: gate.signing == 20)
    for _ in range(20):
        assert served(gated.port)
    gate.gate.set()
    for s in sockets:
        assert the_one_answer(read_all(s)).status == 200


# ================================================================ statuses that the agent causes


def test_an_agent_that_lies_is_a_bad_gateway(
    scripted_agent: Callable[..., Path], start_proxy: Callable[..., Proxy]
) -> None:
    def lie(connection: socket.socket) -> None:
        while read_message(connection):
            connection.sendall(message(b"\x63lie"))

    proxy = start_proxy(upstream=scripted_agent(lie))
    for data in (post(b"x"), get("/publickey")):
        refused(the_one_answer(raw(proxy.port, data)), 502)


def test_an_agent_that_is_not_there_is_unavailable(
    short: Path, start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy(upstream=short / "none")
    for data in (post(b"x"), get("/publickey")):
        answer = refused(the_one_answer(raw(proxy.port, data)), 503)
        assert str(short / "none") in answer.text


def test_an_agent_that_hangs_is_a_gateway_timeout(
    gate: Scripted, scripted_agent: Callable[..., Path], start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy("--timeout", "0.3", upstream=scripted_agent(gate))
    refused(the_one_answer(raw(proxy.port, post(b"x"))), 504)
    assert the_one_answer(raw(proxy.port, get("/publickey"))).status == 200


def test_an_agent_that_refuses_is_a_refusal(
    agent: Agent, keys: Keys, home: Path, start_proxy: Callable[..., Proxy]
) -> None:
    # A key that must be confirmed, and nobody there to do it.
    agent.add(keys["ed25519"], "-c")
    proxy = start_proxy(upstream=agent.sock)
    assert http(proxy.port, "GET", "/publickey").status == 200
    for fields in ((), (f"SSHSIG-Key: {keys.line('ed25519')}",)):
        refused(the_one_answer(raw(proxy.port, post(b"x", *fields))), 403)


# ================================================================ the end


def refuses_connections(port: int) -> bool:
    try:
        connect(port).close()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_what_is_in_flight_is_finished(
    number: int, gate: Scripted, gated: Proxy
) -> None:
    waiting = connect(gated.port)
    waiting.sendall(post(b"x"))
    sending = connect(gated.port)
    sending.sendall(post(b"he", length=5))
    starting = connect(gated.port)
    starting.sendall(b"GET /heal")
    if sys.platform == "linux":
        all_read(gated.port)
    wait_for(lambda: gate.signing == 1)
    os.kill(gated.pid, number)
    wait_for(lambda: refuses_connections(gated.port), message="it stops accepting")
    sending.sendall(b"llo")
    starting.sendall(b"thz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert the_one_answer(read_all(starting)).body == b"ok\n"
    wait_for(lambda: gate.signing == 2)
    assert gated.process.poll() is None
    gate.gate.set()
    for s in (waiting, sending):
        assert the_one_answer(read_all(s)).status == 200
        s.close()
    starting.close()
    assert gated.process.wait(5) == 0
    assert len(request_lines(gated.log())) == 3


@linux
def test_idle_connections_dont_delay_the_end(proxy: Proxy, clients: Clients) -> None:
    sockets = clients.open(proxy.port, b"", 20)
    os.kill(proxy.pid, signal.SIGTERM)
    assert proxy.process.wait(5) == 0  # ten seconds are for requests
    for s in sockets:
        assert read_all(s) == b""


def test_the_end_waits_for_requests_within_bounds(
    gate: Scripted, scripted_agent: Callable[..., Path], tuned: Callable[..., Proxy]
) -> None:
    proxy = tuned({"DRAIN_SECONDS": 0.3}, "--upstream", scripted_agent(gate))
    with connect(proxy.port) as s:
        s.sendall(post(b"x"))
        wait_for(lambda: gate.signing == 1)
        os.kill(proxy.pid, signal.SIGTERM)
        assert proxy.process.wait(5) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(second: int, gate: Scripted, gated: Proxy) -> None:
    with connect(gated.port) as s:
        s.sendall(post(b"x"))
        wait_for(lambda: gate.signing == 1)
        os.kill(gated.pid, signal.SIGTERM)
        wait_for(lambda: refuses_connections(gated.port))
        assert gated.process.poll() is None
        os.kill(gated.pid, second)
        assert gated.process.wait(5) == 0


# ================================================================ the log


def test_the_log_has_a_line_for_each_request_in_their_order(proxy: Proxy, keys: Keys) -> None:
    requests = [
        (get("/healthz"), {"status": "200", "method": "GET", "path": "/healthz"}),
        (post(b"x"), {"status": "200", "method": "POST", "path": "/sign", "namespace": "git",
                      "key": p.parse_key_line(keys.line("ed25519"))[0].fingerprint}),
        (get("/publickey"), {"status": "200", "path": "/publickey"}),
        (get("/nope"), {"status": "404", "path": "/nope"}),
        (post(b"x", PAGE), {"status": "403", "path": "/sign"}),
        (post(b"x", "SSHSIG-Namespace: file"), {"status": "403"}),
        (b"nonsense\r\n\r\n", {"status": "400"}),
    ]  # fmt: skip
    peers = []
    for data, _ in requests:
        with connect(proxy.port) as s:
            peers.append(f"127.0.0.1:{s.getsockname()[1]}")
            s.sendall(data)
            read_all(s)
    wait_for(lambda: len(request_lines(proxy.log())) >= len(requests))
    found = request_lines(proxy.log())
    assert len(found) == len(requests)
    for line, (_, expected), peer in zip(found, requests, peers):
        fields = log_fields(line)
        assert {name: fields[name] for name in expected} == expected
        assert fields["peer"] == peer
        assert fields["ms"].isdigit()
        assert ("reason" in fields) == (fields["status"] != "200")


def test_the_line_stands_in_the_log_before_the_answer_leaves(
    agent: Agent, keys: Keys, short: Path, home: Path
) -> None:
    agent.add(keys["ed25519"])
    port, log = free_port(), short / "log"
    with log.open("wb") as f:
        process = subprocess.Popen(by_hand(agent, port), env=clean_env(home), stderr=f)
    try:
        wait_for(lambda: "listening on" in log.read_text())
        for n in range(1, 30):
            http(port, "POST", "/sign", b"x")
            assert len(request_lines(log.read_text())) == n
    finally:
        process.terminate()
        assert process.wait(10) == 0


HOSTILE = [
    ("a path of escapes", get("/%0d%0a%1b[31m%e2%80%ae")),
    ("a path with quotes", get("/'=a")),
    ("a raw escape character in the path", line_of(b"GET /\x1b[31m HTTP/1.1")),
    ("a CR in the path", line_of(b"GET /\r HTTP/1.1")),
    ("bidi in the path", line_of("GET /\u202e HTTP/1.1".encode())),
    ("a double quote in the path", line_of(b'GET /"outcome="signed HTTP/1.1')),
    ("an escape sequence of one byte in the host", b"GET / HTTP/1.1\r\nHost: \x9b31m\r\n\r\n"),
    ("bidi in the host", "GET / HTTP/1.1\r\nHost: a\u202eb\r\n\r\n".encode()),
    ("a line of the log in the host", b"GET / HTTP/1.1\r\nHost: a outcome=signed\r\n\r\n"),
    ("a NEL in the namespace", post(b"x", "SSHSIG-Namespace: a\x85outcome=signed")),
    ("quotes in the namespace", post(b"x", 'SSHSIG-Namespace: a"=\\"')),
    ("a zero-width space in the hash", SIGN + "SSHSIG-Hash: \u200b\r\n\r\n".encode()),
    ("an escape in a key", post(b"x", "SSHSIG-Key: ssh-ed25519 \x9b \x85a")),
    ("a NUL in a field", field_of(b"A\x00: b")),
    ("an odd method", b"A'|^` /healthz HTTP/1.1\r\n" + HOST + b"\r\n"),
    ("a BEL in an expectation", signing(b"Expect: \xc2\x9d")),
    ("an odd coding", SIGN + b"Transfer-Encoding: \x9d\r\n\r\n"),
    ("an odd length", SIGN + b"Content-Length: \x9d\r\n\r\n"),
    ("an odd chunk", post_chunked(b"\x1b]0;a\x07\r\n")),
]


@pytest.mark.parametrize("data", [h[1] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_hostile_text_makes_one_harmless_line(data: bytes, shared: Shared) -> None:
    received, log = shared.ask(data)
    answer = the_one_answer(received)
    refused(answer, answer.status)
    assert answer.status in (400, 403, 404, 405)
    assert all(line.isprintable() for line in shared.proxy.log().split("\n"))
    (line,) = log
    # Nobody writes a field of his own into the line.
    assert log_fields(line)["status"] == str(answer.status)
    outside_quotes = re.sub(r'"(?:[^"\\]|\\.)*"', "", line)
    assert outside_quotes.count("outcome=") == 1
    assert "signed" not in outside_quotes


@pytest.mark.parametrize("where", ["path", "path in quotes", "method"])
def test_no_length_of_text_hides_who_asked(where: str, shared: Shared) -> None:
    word = b"=" if where == "path in quotes" else b"a"
    first = word * 15000 + b" /" if where == "method" else b"GET /" + word * 15000
    received, log = shared.ask(line_of(first + b" HTTP/1.1"))
    refused(the_one_answer(received), 404)
    (line,) = log  # found by its peer
    assert log_fields(line)["status"] == "404"
    assert log_fields(line)["ms"].isdigit()


def test_a_peer_over_ipv6_is_shown_like_an_address(start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy("--upstream", "/none", addr="[::1]:0")
    with socket.create_connection(("::1", proxy.port), 10) as s:
        peer = f"[::1]:{s.getsockname()[1]}"
        s.sendall(b"GET /healthz HTTP/1.1\r\nHost: [::1]\r\n\r\n")
        assert the_one_answer(read_all(s)).status == 200
    wait_for(lambda: request_lines(proxy.log()))
    assert log_fields(request_lines(proxy.log())[0])["peer"] == peer


@pytest.mark.parametrize(
    "comment",
    [
        b"a\nssh-ed25519 AAAA b",
        b"a\r\nX: y",
        b"\x1b[31mred",
        "a\u202eb\u200bc".encode(),
        b"\xff\x00",
    ],
    ids=str,
)
def test_a_hostile_key_comment_is_escaped(
    comment: bytes,
    keys: Keys,
    scripted_agent: Callable[..., Path],
    start_proxy: Callable[..., Proxy],
) -> None:
    scripted = Scripted(keys.line("ed25519"))
    scripted.comment = comment
    proxy = start_proxy(upstream=scripted_agent(scripted))
    answer = the_one_answer(raw(proxy.port, get("/publickey")))
    assert answer.text.endswith("\n")
    assert answer.text[:-1].isprintable()
    assert answer.text.startswith(scripted.key.line + " ")
    the_one_answer(raw(proxy.port, post(b"x")))
    wait_for(lambda: "/sign" in proxy.log())
    assert all(line.isprintable() for line in proxy.log().split("\n"))


def test_quiet_keeps_refusals_and_signatures(
    agent: Agent, keys: Keys, home: Path
) -> None:
    agent.add(keys["ed25519"])
    port = free_port()
    proxy = Proxy(by_hand(agent, port, "-q"), clean_env(home), wait=False)
    try:
        wait_for(lambda: not refuses_connections(port))
        for data in (get("/healthz"), get("/publickey"), get("/nope")):
            raw(port, data)
        for data in (post(b"x"), post(b"x", PAGE)):
            raw(port, data)
    finally:
        assert proxy.stop() == 0
    fields = [log_fields(line) for line in request_lines(proxy.log())]
    assert [(f["path"], f["status"]) for f in fields] == [
        ("/nope", "404"),
        ("/sign", "200"),
        ("/sign", "403"),
    ]
    assert "listening on" not in proxy.log()


def test_a_stalled_stderr_never_stalls_signing(
    agent: Agent, keys: Keys, home: Path, ssh_keygen: Callable[..., bytes]
) -> None:
    agent.add(keys["ed25519"])
    port = free_port()
    process = subprocess.Popen(
        by_hand(agent, port), env=clean_env(home), stderr=subprocess.PIPE
    )
    assert process.stderr
    try:
        wait_for(lambda: not refuses_connections(port))
        long = get("/" + "a" * 900)
        for _ in range(200):  # more than any pipe takes
            assert the_one_answer(raw(port, long)).status == 404
        expected = ssh_keygen(b"hello")
        for _ in range(5):
            assert the_one_answer(raw(port, post(b"hello"))).body == expected
        assert the_one_answer(raw(port, get("/healthz"))).status == 200
        # Read again, it goes on, and no line was torn.
        os.set_blocking(process.stderr.fileno(), False)
        log = os.read(process.stderr.fileno(), MIB)
        assert len(log) < 150000
        raw(port, get("/after"))
        process.terminate()
        assert process.wait(10) == 0
        os.set_blocking(process.stderr.fileno(), True)
        log += process.stderr.read()
        assert b"path=/after " in log
        for line in log.decode().splitlines():
            assert re.match(r"(\(\d+ lines .*\) )?\d{4}-\d\d-\d\dT\S+ [A-Z]+ ", line), line
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_stderr_that_nobody_reads_any_more_never_stalls_signing(
    proxy: Proxy, ssh_keygen: Callable[..., bytes]
) -> None:
    assert proxy.process.stderr
    expected = ssh_keygen(b"hello")
    # The reader in the tests holds the pipe's only other end: in its place goes an empty file.
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), proxy.process.stderr.fileno())
    raw(proxy.port, get("/healthz"))  # ends a read that is under way
    for _ in range(5):
        assert the_one_answer(raw(proxy.port, post(b"hello"))).body == expected
    assert proxy.stop() == 0


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stderr_never_stalls_signing(
    closed: str, agent: Agent, keys: Keys, home: Path, ssh_keygen: Callable[..., bytes]
) -> None:
    agent.add(keys["ed25519"])
    port = free_port()
    argv = ["sh", "-c", f'exec "$@" {closed}', "sh", *by_hand(agent, port)]
    process = subprocess.Popen(argv, env=clean_env(home))
    try:
        expected = ssh_keygen(b"hello")
        wait_for(lambda: process.poll() is not None or not refuses_connections(port))
        for _ in range(5):
            assert process.poll() is None, f"it has ended with status {process.poll()}"
            # No line of the log goes into somebody's answer either.
            assert the_one_answer(raw(port, post(b"hello"))).body == expected
            refused(the_one_answer(raw(port, get("/nope"))), 404)
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


# ================================================================ whatever else may come

SEEDS = [
    get("/healthz"),
    get("/publickey", "SSHSIG-Hash: sha256"),
    get("http://localhost/shim"),
    post(b"hello"),
    post(b"hello", "Expect: 100-continue", "SSHSIG-Namespace: git"),
    post_chunked(chunks(b"hello, world", [3, 4])),
    post_chunked(b"5;a=b\r\nhello\r\n0\r\nA: b\r\n\r\n", "SSHSIG-Key: SHA256:" + "A" * 43),
    b"POST /sign HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello",
]

SPLICES = [
    b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\x00", b"\xff", b"\x1b", b"%", b"0", b"9" * 30,
    b"[::1]", b"http://", b"\r\n\r\n", b"Host: a\r\n", b"Content-Length: 5\r\n", b"HTTP/1.1", b";",
    b"Transfer-Encoding: chunked\r\n", "\u202e".encode(), b"A: " + b"b" * 5000 + b"\r\n",
    b"ffffffff",
]  # fmt: skip


def mutant(rng: random.Random) -> bytes:
    data = bytearray(rng.choice(SEEDS))
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 5, 20)))
        how = rng.randrange(5)
        if how == 0:
            data[at:end] = bytes(rng.randrange(256) for _ in range(end - at))
        elif how == 1:
            del data[at:end]
        elif how == 2:
            data[at:at] = data[at:end]
        elif how == 3:
            data[at:at] = rng.choice(SPLICES)
        else:
            data[at:at] = rng.choice(SEEDS)[rng.randrange(10) :][: rng.randrange(60)]
    return bytes(data)


def test_mutated_requests_get_one_answer_each_and_show_no_fault(shared: Shared) -> None:
    rng = random.Random(20)
    statuses = set()
    for _ in range(800):
        data = mutant(rng)
        received = cut(shared.port, data)
        if not data:
            continue
        assert received, data
        if received.startswith(CONTINUE):
            received = received[len(CONTINUE) :]
        answer = parse_answer(received)
        assert answers_in(received) == 1, data
        statuses.add(answer.status)
    # 400 is also what a client gets that closes its side before it has its answer.
    assert statuses <= {200, 400, 403, 404, 405, 411, 413, 421, 431}, statuses
    assert {200, 400, 404, 405, 421} <= statuses
    assert the_one_answer(raw(shared.port, get("/healthz"))).status == 200
    clean(shared.proxy)
    assert all(line.isprintable() for line in shared.proxy.log().split("\n"))
