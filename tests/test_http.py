"""Requests as bytes, the server as a whole: framing, order, places, limits, the end."""

import contextlib
import io
import os
import random
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Set, Tuple, Union

import pytest
from conftest import (
    HOST, PROXY, Agent, Answer, Keygen, Keys, Proxy, ScriptedAgent, StartProxy, StartScripted, ask,
    clean_env, connect, get, lines, lines_until_now, listing, log_fields, logged, message, need,
    parse_answer, post, post_chunked, private_file, raw, read_all, read_message, refused,
    request_lines, rows, run, short_folder, the_one_answer, tuned, wait_for,
)  # fmt: skip

import ssh_agent_proxy as p

MIB = 1 << 20
PAGE = "Origin: http://evil.example"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

linux = pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")


def chunks(body: bytes, sizes: Sequence[int]) -> bytes:
    """BODY in chunks of SIZES, the rest in one more."""
    out, at = [], 0
    for size in [*sizes, len(body)]:
        piece = body[at : at + size]
        at += len(piece)
        if piece:
            out.append(b"%x\r\n%s\r\n" % (len(piece), piece))
    return b"".join(out) + b"0\r\n\r\n"


def clean(proxy: Proxy) -> None:
    """Nothing that was sent has shown a fault."""
    assert "Traceback" not in proxy.log(), proxy.log()
    assert "internal error" not in proxy.log(), proxy.log()


# ---------------------------------------------------------------- agents that do as they are told


class Scripted:
    """A handler for scripted agents: holds one key, signs with zeros (once the gate is open),
    remembers what it was asked."""

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
                connection.sendall(listing((self.key.blob, self.comment)))
                continue
            assert self.gate.wait(60)
            signature = p.string(b"ssh-ed25519") + p.string(bytes(64))
            connection.sendall(message(p.byte(p.SSH_AGENT_SIGN_RESPONSE) + p.string(signature)))


class Shared(NamedTuple):
    """A proxy that many tests share, in front of a scripted agent."""

    proxy: Proxy
    agent: Scripted

    @property
    def port(self) -> int:
        return self.proxy.port

    def ask(self, data: bytes) -> Tuple[bytes, List[str]]:
        """What comes back for DATA, and the lines that the log has for it."""
        return logged(self.proxy, self.port, data)


@contextlib.contextmanager
def shared_proxy(keys: Keys, *args: str, **constants: float) -> Iterator[Shared]:
    with short_folder() as folder:
        agent = Scripted(keys.line("ed25519"))
        listening = ScriptedAgent(folder / "agent", agent)
        argv = [*tuned(**constants), str(PROXY), "--addr", "127.0.0.1:0", *args]
        argv += ["--upstream", str(listening.sock)]
        proxy = Proxy(argv, clean_env(folder / "home"))
        proxy.wait_log("signing with")  # from now on only requests make it ask
        agent.asked.clear()
        yield Shared(proxy, agent)
        assert proxy.stop() == 0
        listening.stop()
        clean(proxy)


@pytest.fixture(scope="module")
def shared(keys: Keys) -> Iterator[Shared]:
    with shared_proxy(keys) as shared:
        yield shared


@pytest.fixture(scope="module")
def quick(keys: Keys) -> Iterator[Shared]:
    """A proxy that soon loses its patience with a head, with gaps in a body, and with a request."""
    patience = dict.fromkeys(["HEAD_SECONDS", "GAP_SECONDS", "LINGER_SECONDS", "LINGER_GAP"], 0.4)
    with shared_proxy(keys, **patience, REQUEST_SECONDS=1.5) as shared:
        yield shared


@pytest.fixture
def gate(keys: Keys) -> Iterator[Scripted]:
    """A scripted agent that lets requests to sign wait."""
    scripted = Scripted(keys.line("ed25519"))
    scripted.gate.clear()
    yield scripted
    scripted.gate.set()


@pytest.fixture
def gated(
    gate: Scripted, scripted_agent: StartScripted, start_proxy: StartProxy
) -> Iterator[Proxy]:
    """A proxy in front of it."""
    proxy = start_proxy(upstream=scripted_agent(gate))
    proxy.wait_log("signing with")
    gate.asked.clear()
    yield proxy
    gate.gate.set()
    clean(proxy)


def peak_memory(pid: int) -> int:
    """In bytes."""
    match = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert match
    return 1024 * int(match.group(1))


def all_read(port: int) -> None:
    """No bytes and no connections wait in the system for the server at PORT any more."""
    ESTABLISHED, CLOSE_WAIT, LISTEN = "01", "08", "0A"

    def waiting() -> int:
        total = 0
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, _, state, queues, *_ = line.split()
            if state in (ESTABLISHED, CLOSE_WAIT, LISTEN) and int(local.split(":")[1], 16) == port:
                total += int(queues.split(":")[1], 16)
        return total

    wait_for(lambda: not waiting(), message="the proxy takes what was sent")


def readable(sockets: Sequence[socket.socket]) -> Set[socket.socket]:
    return set(select.select(sockets, [], [], 0)[0])


# ================================================================ pure: a head


class Pieces(io.BytesIO):
    """Bytes that come in pieces of at most SIZE."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data)
        self.size = size

    def readinto(self, buffer: Any) -> int:
        return super().readinto(memoryview(buffer)[: self.size])


def head_of(data: bytes, size: int = 1 << 16) -> Tuple[p.Head, bytes]:
    """The head in DATA, and what stands behind it."""
    stream = io.BufferedReader(Pieces(data, size), 1 << 16)
    return p.read_head(stream), stream.read()


def refuses_head(data: bytes, status: int = 400) -> None:
    with pytest.raises(p.RequestError) as e:
        head_of(data)
    assert e.value.status == status, data
    assert str(e.value).isprintable()


HEADS: List[Tuple[str, bytes, Dict[str, Any]]] = [
    ("shortest", b"GET / HTTP/1.0\r\n\r\n",
     {"method": "GET", "path": "/", "minor": 0, "hosts": (), "fields": {}, "length": None}),
    ("host", b"GET / HTTP/1.1\r\nHost: a:1\r\n\r\n", {"minor": 1, "hosts": ("a",)}),
    ("any method", b"get!#$%&'*+-.^_`|~9 / HTTP/1.0\r\n\r\n", {"method": "get!#$%&'*+-.^_`|~9"}),
    ("every sort of path", b"GET /-._~!$&'()*+,;=:@%2fA9?/?b=c HTTP/1.0\r\n\r\n",
     {"path": "/-._~!$&'()*+,;=:@%2fA9?/?b=c"}),
    ("absolute", b"GET http://A:1/b HTTP/1.1\r\nHost: c\r\n\r\n",
     {"path": "/b", "hosts": ("c", "a")}),
    ("absolute, no path", b"GET HTTP://a HTTP/1.0\r\n\r\n", {"path": "/", "hosts": ("a",)}),
    ("field names", b"GET / HTTP/1.0\r\nX-Y: z\r\nx!#$%&'*+-.^_`|~9: 1\r\n\r\n",
     {"fields": {"x-y": "z", "x!#$%&'*+-.^_`|~9": "1"}}),
    ("blanks around values", b"GET / HTTP/1.0\r\nA: \t b \t c\t \r\nD:e\r\nF:\r\nG: \t \r\n\r\n",
     {"fields": {"a": "b \t c", "d": "e", "f": "", "g": ""}}),
    ("values", b"GET / HTTP/1.0\r\nA::b: c:\r\nD: \x80\xff\r\n\r\n",
     {"fields": {"a": ":b: c:", "d": "\x80\xff"}}),
    ("a harmless field twice", b"GET / HTTP/1.0\r\nA: 1\r\na: 2\r\n\r\n", {"fields": {"a": "2"}}),
    ("length", b"PUT / HTTP/1.0\r\nContent-Length: " + 30 * b"0" + b"7\r\n\r\n",
     {"length": 7, "chunked": False}),
    ("chunked", b"PUT / HTTP/1.1\r\nHost: a\r\nTRANSFER-ENCODING:Chunked\r\n\r\n",
     {"length": None, "chunked": True}),
    ("expect", b"PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\n\r\n",
     {"fields": {"host": "a", "expect": "100-Continue"}}),
]  # fmt: skip

@pytest.mark.parametrize(("data", "expected"), rows(HEADS))
def test_a_head_is_read_in_whatever_pieces_it_comes_and_malformed_where_it_ends_early(
        data: bytes, expected: Dict[str, Any]) -> None:  # fmt: skip
    for size in (1, 2, 3, 5, len(data) + 5):
        head, rest = head_of(data + b"rest\n", size)
        assert {name: getattr(head, name) for name in expected} == expected
        assert rest == b"rest\n"
    for end in range(len(data)):
        refuses_head(data[:end])


def test_a_head_may_have_16_kib_and_100_fields_and_no_more() -> None:
    def of_size(size: int) -> bytes:
        start = b"GET / HTTP/1.0\r\nA: "
        return start + b"b" * (size - len(start) - 4) + b"\r\n\r\n"

    def of_fields(number: int) -> bytes:
        return b"GET / HTTP/1.0\r\n" + b"".join(b"A%d:\r\n" % n for n in range(number)) + b"\r\n"

    assert head_of(of_size(16384) + b"\n\r\n")[1] == b"\n\r\n"
    for rest in (b"", b"rest", b"\n", b"\r"):
        refuses_head(of_size(16385) + rest, 431)
    refuses_head(line_of(b"GET /" + b"a" * 17408 + b" HTTP/1.1"), 431)
    assert len(head_of(of_fields(100))[0].fields) == 100
    refuses_head(of_fields(101), 431)


def test_the_limits_are_those_that_are_promised() -> None:
    assert (p.HEAD_SECONDS, p.GAP_SECONDS, p.REQUEST_SECONDS) == (10, 30, 600)
    assert (p.PLACES, p.LINGERERS, p.DRAIN_SECONDS) == (128, 16, 10)
    assert (p.MAX_HEAD, p.MAX_FIELDS, p.MAX_BODY) == (16384, 100, 1 << 30)


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


BAD_REQUEST_LINES = [
    b"", b"\r\nGET /healthz HTTP/1.1", b"\rGET /healthz HTTP/1.1", b"GET /healthz HTTP/1.1\r",
    # Its three words.
    b"GET /healthz", b"GET HTTP/1.1", b"/healthz HTTP/1.1", b" /healthz HTTP/1.1",
    b"GET  /healthz HTTP/1.1", b"GET\t/healthz\tHTTP/1.1", b"GET /healthz HTTP/1.1 ",
    b"GET /healthz a HTTP/1.1", b"G(T /healthz HTTP/1.1", b"G\xc3\x89T /healthz HTTP/1.1",
    # Versions, and other protocols.
    b"GET /healthz http/1.1", b"GET /healthz HTTP/0.9", b"GET /healthz HTTP/1.2",
    b"GET /healthz HTTP/1.10", b"GET /healthz HTTP/1,1", b"PRI * HTTP/2.0\r\n\r\nSM",
    b"SSH-2.0-OpenSSH_9.2", b"\x00\x00\x00\x01\x0b",
    # Targets.
    b"GET healthz HTTP/1.1", b"GET ?a HTTP/1.1", b"OPTIONS * HTTP/1.1",
    b"CONNECT localhost:80 HTTP/1.1", b"GET https://localhost/healthz HTTP/1.1",
    b"GET http://a@localhost/ HTTP/1.1", b"GET http://[::z]/ HTTP/1.1",
    b"GET /healthz#a HTTP/1.1", b'GET /healthz"outcome="signed HTTP/1.1', b"GET /<h> HTTP/1.1",
    b"GET \\healthz HTTP/1.1", b"GET /healthz\x00 HTTP/1.1", b"GET /healthz\x1b[31m HTTP/1.1",
    b"GET /h\xc3\xa9 HTTP/1.1", b"GET /healthz% HTTP/1.1", b"GET /healthz%zz HTTP/1.1",
]  # fmt: skip

BAD_FIELDS = [
    # Line ends, and folds.
    b"A: b\nC: d", b"A: b\rc", b"\rA: b", b"A: b\r", b"A: b\rContent-Length: 5", b"\nA: b",
    b"A: b\r\n c", b"A: b\r\n\tc", b"A: b\r\n ",
    # Names.
    b"A : b", b"Content-Length : 5", b"A", b": b", b"A B: c", b"A(B): c", b"A\x00: b",
    b"\xc3\x84: b",
    # Values.
    b"A: \x00", b"Content-Length: 5\x00", b"A: b\x0bc", b"A: \x1b[31m", b"A: \x7f",
    # Fields that would count, and stand twice.
    HOST.rstrip(), b"Host: evil.example", b"Content-Length: 0\r\nContent-Length: 0",
    b"Content-Length: 5\r\nContent-Length: 6", b"SSHSIG-Key: a\r\nSSHSIG-Key: b",
    b"SSHSIG-Namespace: git\r\nSSHSIG-Namespace: git",
    b"SSHSIG-Hash: sha512\r\nsshsig-hash: sha256",
    b"Authorization: Bearer a\r\nAuthorization: Bearer b",
    b"Sec-Fetch-Site: none\r\nSec-Fetch-Site: none",
    b"Expect: 100-continue\r\nExpect: 100-continue",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    # Lengths and codings together.
    b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nContent-Length: 0",
    b"Expect: 200-ok", b"Expect:", b"Expect: \xc2\x9d",
]  # fmt: skip

BAD_LENGTHS = [
    b"", b"5, 5", b"+5", b"-5", b"0x5", b"5.0", b"1e1", b"five", b"\xb2", b"5_0", b'"5"',
]  # fmt: skip

BAD_CODINGS = [
    b"", b"identity", b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b"xchunked",
    b"chunked;a=b", b"chunked\xa0", b"\x85chunked",
]  # fmt: skip

BAD_HEADS = [
    *map(line_of, BAD_REQUEST_LINES),
    *map(field_of, BAD_FIELDS),
    b"GET / HTTP/1.1\r\nHost: a@localhost\r\n\r\n",
    *(field_of(b"Content-Length: " + length, SIGN) for length in BAD_LENGTHS),
    *(field_of(b"Transfer-Encoding: " + coding, SIGN) for coding in BAD_CODINGS),
    START + b"\n",
    b"GET /healthz HTTP/1.1\nHost: localhost\n\n",
    b"GET /healthz HTTP/1.1\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n Host: localhost\r\n\r\n",
    b"GET http://localhost/healthz HTTP/1.1\r\n\r\n",
    b"GET /healthz HTTP/1.0\r\n" + HOST + HOST + b"\r\n",
    b"POST /sign HTTP/1.0\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
    b"POST /sign HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
]


@pytest.mark.parametrize("data", BAD_HEADS, ids=ascii)
def test_a_malformed_head_is_refused(data: bytes) -> None:
    refuses_head(data)


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
    ("three chunks", b"1\r\nh\r\n3\r\nell\r\n1\r\no\r\n0\r\n\r\n", b"hello"),
    ("hexadecimal", b"b\r\nhello world\r\nB\r\nhello world\r\n0\r\n\r\n", 2 * b"hello world"),
    ("leading zeros", b"0005\r\nhello\r\n000\r\n\r\n", b"hello"),
    ("extensions", b"5;a=b\r\nhello\r\n0 \t; c = \"d\"\r\n\r\n", b"hello"),
    ("trailers", b"5\r\nhello\r\n0\r\nA: b\r\nC:\r\n\r\n", b"hello"),
    ("line ends as data", b"6\r\n\r\n0\r\n\r\r\n0\r\n\r\n", b"\r\n0\r\n\r"),
    ("100 trailers", b"1\r\nx\r\n0\r\n" + b"A: b\r\n" * 100 + b"\r\n", b"x"),
]

@pytest.mark.parametrize(("data", "body"), rows(CHUNKED))
def test_a_chunked_body_is_read_in_whatever_pieces_it_comes_and_malformed_where_it_ends_early(
        data: bytes, body: bytes) -> None:  # fmt: skip
    for size in (1, 2, 3, 5, 7, len(data)):
        assert body_of(data + b"rest\r\n", size) == (body, b"rest\r\n"), size
    for end in range(0, len(data), 1 if len(data) < 400 else 37):
        with pytest.raises(p.RequestError) as e:
            body_of(data[:end])
        assert e.value.status == 400


# Each is in the place of a body of five bytes, or ends it wrongly.
BAD_CHUNKS = [
    # Sizes.
    b"\r\nhello", b";a\r\nhello", b"g\r\nhello", b"+5\r\nhello", b"0x5\r\nhello", b"0_5\r\nhello",
    b" 5\r\nhello", b"5 \r\nhello", b"5 a\r\nhello", b"5;\x00\r\nhello", b"5;a\rb\r\nhello",
    b"5\r\r\nhello", b"5\nhello", b"\xef\xbc\x95\r\nhello", b"10000000000000005\r\nhello",
    # More or less than announced.
    b"4\r\nhello", b"6\r\nhello",
]  # fmt: skip

BAD_CHUNKED: List[Tuple[bytes, int]] = [
    *((chunk + b"\r\n0\r\n\r\n", 400) for chunk in BAD_CHUNKS),
    *((b"5\r\nhello" + end + b"0\r\n\r\n", 400) for end in (b"\n", b"\r", b"ab", b"")),
    *((b"5\r\nhello\r\n0" + end, 400)
      for end in (b"\r\n\n", b"\n\r\n", b"\r\nA: b\r\n c\r\n\r\n", b"\r\nA: \x00\r\n\r\n")),
    *((b"5\r\nhello\r\n0\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
      (b"5;" + b"a" * 20000, 431), (b"5\r\nhello\r\n0\r\nA: " + b"a" * 20000, 431)),
    (b"40000001\r\n", 413),  # one byte over 1 GiB
    (b"5\r\nhello\r\n3ffffffc\r\n", 413),
    (b"ffffffffffffffff\r\n", 413),
]  # fmt: skip


@pytest.mark.parametrize(("data", "status"), BAD_CHUNKED, ids=lambda value: ascii(value)[:60])
def test_a_malformed_chunked_body_is_refused_in_whatever_pieces_it_comes(
        data: bytes, status: int) -> None:  # fmt: skip
    for size in (1, 3, len(data)):
        with pytest.raises(p.RequestError) as e:
            body_of(data, size)
        assert e.value.status == status
        assert str(e.value).isprintable()
def test_a_chunked_body_of_1_gib_in_all_is_not_too_large() -> None:
    stream = io.BytesIO(b"5\r\nhello\r\n3ffffffb\r\n")
    sizes = p.chunk_sizes(stream)
    assert stream.read(next(sizes)) == b"hello"
    assert next(sizes) == (1 << 30) - 5


# ================================================================ requests that are refused

# By more than their head, or by what it means.
REFUSED: List[Tuple[str, bytes, int]] = [
    ("no length", SIGN + b"\r\n", 411),
    ("a length of 5000 digits", SIGN + b"Content-Length: " + 5000 * b"9" + b"\r\n\r\n", 413),
    ("1 GiB and a byte", post(b"", length=(1 << 30) + 1), 413),
    ("a length of 0", post(b""), 400),
    ("no chunk", post_chunked(b"0\r\n\r\n"), 400),
    ("a malformed chunk", post_chunked(b"\x1b]0;a\x07\r\n"), 400),
    ("a key that nobody holds", signing(b"SSHSIG-Key: SHA256:" + b"A" * 43), 404),
    ("a malformed namespace", signing(b"SSHSIG-Namespace: a\x85outcome=signed"), 400),
    ("another namespace", signing(b'SSHSIG-Namespace: a"=\\"'), 403),
    ("a hash in capitals", signing(b"SSHSIG-Hash: SHA512"), 400),
    ("another hash", signing(b"SSHSIG-Hash: sha1\x85"), 400),
    ("a malformed key", signing(b"SSHSIG-Key: ssh-ed25519 \x9b \x85a"), 400),
    *(
        (f"path {path}", get(path), 404)
        for path in (
            "/", "/healthz/", "/healthz?", "/HEALTHZ", "//healthz", "/./healthz", "/%68ealthz",
            "/%0d%0a%1b[31m%e2%80%ae", "/'=a",
        )
    ),
    ("a query behind /sign", b"POST /sign?a" + post(b"hello")[10:], 404),
    *(
        (f"method {method} {path}", method.encode() + get(path)[3:], 405)
        for method, path in (
            ("GET", "/sign"), ("post", "/sign"), ("OPTIONS", "/sign"), ("POST", "/healthz"),
            ("DELETE", "/publickey"), ("POST", "/shim"), ("A'|^`", "/healthz"),
        )
    ),
    ("another host", b"GET /healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
    ("another host in HTTP/1.0", b"GET /healthz HTTP/1.0\r\nHost: evil.example\r\n\r\n", 421),
    ("a page", signing(b"Origin: http://evil.example"), 403),
    # Of those whose head is malformed every eighth, for they go one way.
    *((ascii(data), data, 400) for data in BAD_HEADS[::8]),
    ("17 KiB", field_of(b"A: " + b"b" * 17408, SIGN) + b"a\nb\rc", 431),
]  # fmt: skip


@pytest.mark.parametrize(("data", "status"), rows(REFUSED))
def test_a_refusal_is_one_answer_and_one_harmless_line_and_the_agent_is_not_asked_to_sign(
        data: bytes, status: int, shared: Shared) -> None:  # fmt: skip
    shared.agent.asked.clear()
    received, log = shared.ask(data)
    refused(the_one_answer(received), status)
    assert shared.agent.signing == 0
    if status != 404 or b"SSHSIG-Key" not in data:
        assert shared.agent.asked == []
    (line,) = log
    assert line.isprintable()
    # Nobody writes a field of his own into the line.
    fields = log_fields(line)
    assert (fields["outcome"], fields["status"]) == ("refused", str(status))
    assert re.sub(r'"(?:[^"\\]|\\.)*"', "", line).count("outcome=") == 1
    assert fields["ms"].isdigit()
    assert "reason" in fields


def test_tls_is_told_what_would_be_right(shared: Shared) -> None:
    assert "use http://" in refused(ask(shared.port, b"\x16\x03\x01" + bytes(165)), 400).text


PARTS = [
    ("part of a request line", b"GET /hea"),
    ("all but the empty line", START),
    ("a head without its body", post(b"", length=5)),
    ("part of a body", post(bytes(100000), length=1 << 30)),
    ("part of a chunk", post_chunked(b"5\r\nhell")),
    ("all but the last line", post_chunked(b"5\r\nhello\r\n0\r\n")),
]


def test_allow_names_the_methods(shared: Shared) -> None:
    for path in ("/healthz", "/publickey", "/shim"):
        assert ask(shared.port, b"PUT" + get(path)[3:]).headers["allow"] == "GET, HEAD"
    assert ask(shared.port, get("/sign")).headers["allow"] == "POST"


EVIL = "Host: evil.example"
LENGTH = "Content-Length: 5"
HUGE = "Content-Length: 1073741825"
NOBODYS = "SSHSIG-Key: SHA256:" + "A" * 43

# Each request has two faults; the status is that of the one that is looked at first.
ORDER: List[Tuple[str, str, List[str], str, int]] = [
    ("framing before host", "POST /sign", [EVIL, LENGTH, LENGTH], "", 400),
    ("host before browser", "POST /sign", [EVIL, PAGE, LENGTH], "hello", 421),
    ("host before path", "GET /nope", [EVIL], "", 421),
    ("browser before path", "GET /nope", [PAGE], "", 403),
    ("path before method", "DELETE /nope", [], "", 404),
    ("method before headers", "PUT /sign", ["SSHSIG-Hash: md5", LENGTH], "hello", 405),
    ("a bad header before length", "POST /sign", ["SSHSIG-Hash: md5"], "", 400),
    ("a namespace before length", "POST /sign", ["SSHSIG-Namespace: file"], "", 403),
    ("length before agent", "POST /sign", [NOBODYS], "", 411),
    ("size before agent", "POST /sign", [NOBODYS, HUGE], "", 413),
    ("body before agent", "POST /sign", [NOBODYS, "Transfer-Encoding: chunked"], "0\r\n\r\n", 400),
]


def request(first: str, fields: Sequence[str]) -> bytes:
    """A head with a Host, where there is none in FIELDS."""
    host = [] if any(field.startswith("Host") for field in fields) else ["Host: localhost"]
    return f"{first} HTTP/1.1\r\n".encode() + lines([*host, *fields]) + b"\r\n"


@pytest.mark.parametrize(("first", "fields", "body", "status"), rows(ORDER))
def test_checks_come_in_order(
        first: str, fields: List[str], body: str, status: int, shared: Shared) -> None:  # fmt: skip
    shared.agent.asked.clear()
    refused(ask(shared.port, request(first, fields) + body.encode()), status)
    assert shared.agent.asked == []


@pytest.mark.parametrize("framing", ["Content-Length: 1073741824", "Transfer-Encoding: chunked"])
def test_what_needs_only_the_head_is_decided_before_the_body(framing: str, shared: Shared) -> None:
    """No byte of the body is ever sent; an interim answer would count as a second one."""
    shared.agent.asked.clear()
    for first, field, status in (
        ("POST /sign", EVIL, 421),
        ("POST /sign", PAGE, 403),
        ("POST /sign", "SSHSIG-Hash: md5", 400),
        ("PUT /sign", "A: b", 405),
        ("GET /healthz", "A: b", 200),
    ):
        for expect in ([], ["Expect: 100-continue"]):
            data = request(first, [framing, *expect, field])
            assert ask(shared.port, data).status == status
    assert shared.agent.asked == []


# ================================================================ requests that are served


@pytest.mark.parametrize("comment", [b"me", b"a\nssh-ed25519 AA b", b"\x1b[31mred\xff"], ids=ascii)
def test_publickey_is_the_line_of_the_key_that_signs_its_comment_escaped(
        comment: bytes, shared: Shared) -> None:  # fmt: skip
    shared.agent.comment = comment
    answer = ask(shared.port, get("/publickey"))
    shared.agent.comment = b"scripted"
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.text[-1] == "\n" and answer.text[:-1].isprintable()
    assert answer.text.startswith(shared.agent.key.line + " ")
    assert comment != b"me" or answer.text.endswith(" me\n")


@pytest.mark.parametrize("data", [
    post(b"hello", "Connection: keep-alive"),
    b"POST /sign HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /sign HTTP/1.0\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello",
    post_chunked(b"5;a=b\r\nhello\r\n0\r\nA: b\r\n\r\n"),
], ids=ascii)  # fmt: skip
def test_sign_answers_with_the_block_that_ssh_keygen_writes(
        data: bytes, proxy: Proxy, ssh_keygen: Keygen) -> None:  # fmt: skip
    answer = ask(proxy.port, data)
    assert (answer.status, answer.body) == (200, ssh_keygen(b"hello"))
    assert answer.headers["content-type"] == "application/x-ssh-signature"


@pytest.mark.parametrize("path", ["/healthz", "/publickey", "/shim"])
def test_head_is_get_without_the_body(path: str, shared: Shared) -> None:
    whole = parse_answer(raw(shared.port, get(path)))
    head = parse_answer(raw(shared.port, b"HEAD" + get(path)[3:]))
    assert head.body == b""
    assert head.status == 200
    assert {**head.headers, "date": ""} == {**whole.headers, "date": ""}
    for field in (EVIL, "A : b"):
        assert parse_answer(raw(shared.port, b"HEAD" + get(path, field)[3:])).body == b""


FIRST: List[Tuple[str, bytes, int, int]] = [
    ("an upgrade", get("/healthz", "Connection: Upgrade, HTTP2-Settings"), 200, 0),
    ("no chunk", get("/healthz", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 200, 0),
    ("a body that nobody needs", get("/healthz", "Content-Length: 5") + b"hello", 200, 0),
    ("sign, keep-alive", post(b"x", "Connection: keep-alive"), 200, 1),
    ("sign, chunked", post_chunked(chunks(b"x", [])), 200, 1),
    ("nonsense", b"a\r\n\r\n", 400, 0),
]


@pytest.mark.parametrize(("first", "status", "signatures"), rows(FIRST))
def test_a_second_request_is_never_read(
        first: bytes, status: int, signatures: int, shared: Shared) -> None:  # fmt: skip
    shared.agent.asked.clear()
    received, log = shared.ask(first + post(b"y"))
    assert the_one_answer(received).status == status
    assert shared.agent.signing == signatures
    assert len(log) == 1


def test_a_peer_over_ipv6_is_shown_like_an_address(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--upstream", "/none", addr="[::1]:0")
    with socket.create_connection(("::1", proxy.port), 10) as s:
        peer = f"[::1]:{s.getsockname()[1]}"
        s.sendall(b"GET /healthz HTTP/1.1\r\nHost: [::1]\r\n\r\n")
        assert the_one_answer(read_all(s)).status == 200
    wait_for(lambda: request_lines(proxy.log()))
    assert log_fields(request_lines(proxy.log())[0])["peer"] == peer


def test_a_client_that_waits_is_told_to_go_on(proxy: Proxy, ssh_keygen: Keygen) -> None:
    expect = "Expect: 100-continue"
    for head, body in [(post(b"", expect, length=5), b"hello"),
                       (post_chunked(b"", expect), chunks(b"hello", [2]))]:  # fmt: skip
        with connect(proxy.port) as s:
            s.sendall(head)
            assert s.recv(len(CONTINUE), socket.MSG_WAITALL) == CONTINUE
            assert not readable([s])
            s.sendall(body)
            assert the_one_answer(read_all(s)).body == ssh_keygen(b"hello")


HEAD_SIZE = len(post(b"", length=99999))
SIZES = [1, 2, (1 << 16) - HEAD_SIZE, (1 << 16) - 1, 1 << 16, (1 << 18) + 1, MIB + 1, 16 * MIB]


@pytest.mark.parametrize("size", SIZES)
def test_bodies_of_every_size_are_signed_as_ssh_keygen_does(
        size: int, proxy: Proxy, ssh_keygen: Keygen) -> None:  # fmt: skip
    payload = random.Random(size).randbytes(size)
    in_chunks = chunks(payload, [1, 7, size // 3, size // 4])
    for hash_algorithm in ("sha512", "sha256"):
        expected = ssh_keygen(payload, hash_algorithm)
        field = f"SSHSIG-Hash: {hash_algorithm}"
        for data in (post(payload, field), post_chunked(in_chunks, field)):
            assert ask(proxy.port, data).body == expected


def test_curl_is_served_in_all_its_ways(proxy: Proxy, short: Path, ssh_keygen: Keygen) -> None:
    payload = random.Random(3).randbytes(3 * MIB)
    (short / "file").write_bytes(payload)
    expected = ssh_keygen(payload)
    argv = [need("curl", "curl"), "-qsS", "--noproxy", "*", "--max-time", "30", f"{proxy.url}/sign"]
    for way in (
        ["-X", "POST", "-T", short / "file"],
        ["-H", "Expect: 100-continue", "-X", "POST", "-T", "-"],  # in chunks
        ["--http1.0", "--data-binary", "@-"],
    ):
        assert run([*argv, *way], input=payload).stdout == expected, way


@linux
def test_memory_stays_flat_under_a_large_body(shared: Shared) -> None:
    piece = bytes(4 * MIB)
    raw(shared.port, post(piece))
    before = peak_memory(shared.proxy.pid)
    with connect(shared.port) as s:
        s.sendall(post_chunked(b""))
        for _ in range(16):
            s.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        s.sendall(b"0\r\n\r\n")
        assert the_one_answer(read_all(s, 60)).status == 200
    assert peak_memory(shared.proxy.pid) - before < 4 * MIB


def send_all_before_reading(where: Union[int, Path], head: bytes) -> Answer:
    """The answer to HEAD and 32 MiB, more than any buffer of the system's takes."""
    with connect(where) as s:
        s.sendall(head)
        for _ in range(8):
            s.sendall(bytes(4 * MIB))
        return the_one_answer(read_all(s))


@pytest.mark.parametrize(("head", "status"), rows([
    ("from a page", post(b"", PAGE, length=32 * MIB), 403),
    ("nonsense", b"nonsense\r\n\r\n", 400),
    ("a body that nobody needs", get("/healthz", "Content-Length: 33554432"), 200),
]))  # fmt: skip
def test_an_answer_reaches_a_client_that_sends_all_before_it_reads(
        head: bytes, status: int, shared: Shared) -> None:  # fmt: skip
    assert send_all_before_reading(shared.port, head).status == status


@pytest.mark.parametrize("size", [1, 65536])
def test_a_client_that_never_closes_nor_stops_sending_is_left(size: int, quick: Shared) -> None:
    with connect(quick.port) as s:
        s.sendall(get("/nope"))
        if size == 1:
            refused(the_one_answer(read_all(s)), 404)
        # Once it has closed both ways a byte sent to it is answered by a reset.
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            end = time.monotonic() + 10
            while time.monotonic() < end:
                s.sendall(bytes(size))


# ================================================================ clients that are slow


def test_a_connection_that_sends_nothing_is_closed_in_silence(quick: Shared) -> None:
    assert quick.ask(b"") == (b"", [])


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_goes_without_a_word_is_no_line_in_the_log(
        reset: bool, shared: Shared) -> None:  # fmt: skip
    before = len(lines_until_now(shared.proxy, shared.port))
    with connect(shared.port) as s:
        if reset:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert len(lines_until_now(shared.proxy, shared.port)) == before + 1


@pytest.mark.parametrize("data", rows(PARTS))
def test_a_request_that_stalls_is_too_slow_and_one_that_ends_early_malformed(
        data: bytes, quick: Shared, shared: Shared) -> None:  # fmt: skip
    for one in (quick, shared):
        one.agent.asked.clear()
    received, log = quick.ask(data)
    refused(the_one_answer(received), 408)
    assert [log_fields(line)["status"] for line in log] == ["408"]
    with connect(shared.port) as s:
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        refused(the_one_answer(read_all(s)), 400)
    assert quick.agent.asked == shared.agent.asked == []


@pytest.mark.parametrize(("start", "drop", "pause"), rows([
    ("head", START + b"A: ", b"a", 0.05),
    # A byte is always there when the proxy looks.
    ("head, hardly a pause", START + b"A: ", b"a", 0.0001),
    ("length, hardly a pause", post(b"", length=1 << 30), b"a", 0.0001),
    ("chunked", post_chunked(b""), b"1\r\na\r\n", 0.05),
    # Chunks of a byte, faster than anybody reads them.
    ("chunked, no pause", post_chunked(b""), 100000 * b"1\r\na\r\n", 0),
]))  # fmt: skip
def test_what_drips_is_too_slow_as_a_whole(
        start: bytes, drop: bytes, pause: float, quick: Shared) -> None:  # fmt: skip
    with connect(quick.port) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        s.sendall(start)
        end = time.monotonic() + 10
        while not select.select([s], [], [], pause)[0]:
            assert time.monotonic() < end, "it is still being read"
            s.sendall(drop)
        refused(the_one_answer(read_all(s)), 408)


def test_a_clock_that_shows_the_very_limit_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows' moves in steps of 16 ms, and a wait of 0 would be none."""
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(p.RequestError, match="took too long"):
        client = p.Client(ours)
        monkeypatch.setattr(p.time, "monotonic", lambda: client.limit)
        client.read(1)


def test_what_comes_while_silence_is_ended_is_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        handler = p.Handler(ours, None)  # type: ignore[arg-type]
        monkeypatch.setattr(handler, "has_sent", lambda: bool(not theirs.send(b"GET")))
        assert handler.end_silence()
        assert handler.stream.read1(9) == b"GET"


def test_a_body_with_short_gaps_is_in_time(quick: Shared) -> None:
    """The head has its time, the body has more: a gap is no sum of gaps."""
    with connect(quick.port) as s:
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

    def open(self, where: Union[int, Path], data: bytes, number: int = 1) -> List[socket.socket]:
        """NUMBER connections that have sent DATA, the first few one after the other."""
        counted = isinstance(where, int) and sys.platform == "linux"
        for n in range(number):
            self.opened.append(connect(where))
            self.opened[-1].sendall(data)
            if n < 4 and counted:
                all_read(where)
        if counted:
            all_read(where)
        return self.opened[len(self.opened) - number :]


@pytest.fixture
def clients() -> Iterator[Clients]:
    """To be asked for last, so that the connections are closed before the proxy ends."""
    clients = Clients()
    yield clients
    for s in clients.opened:
        s.close()


def busy(of: Union[Answer, socket.socket]) -> None:
    answer = of if isinstance(of, Answer) else the_one_answer(read_all(of))
    assert "busy" in refused(answer, 503).text
    assert int(answer.headers["retry-after"]) > 0


def all_signed(sockets: Sequence[socket.socket]) -> None:
    for s in sockets:
        assert the_one_answer(read_all(s)).status == 200


def served(where: Union[int, Path]) -> bool:
    return ask(where, get("/healthz")).body == b"ok\n"


@linux
@pytest.mark.parametrize(("start", "rest"), rows([
    ("idle", b"", get("/healthz")),
    ("head", b"POST /sign HTTP/1.1\r\nHost: loc", b"alhost\r\nContent-Length: 1\r\n\r\nx"),
    ("body", post(b"hel", length=5), b"lo"),
    ("chunked body", post_chunked(b"5\r\nhel"), b"lo\r\n0\r\n\r\n"),
]))  # fmt: skip
def test_the_129th_takes_the_place_of_the_one_that_has_been_waited_for_longest(
        start: bytes, rest: bytes, proxy: Proxy, clients: Clients) -> None:  # fmt: skip
    sockets = clients.open(proxy.port, start, 2)
    # Threads may note the times of connections that come together in another order.
    assert all(served(proxy.port) for _ in range(5))
    time.sleep(0.02)  # a step of Windows' clock
    sockets += clients.open(proxy.port, start, 126)
    assert readable(sockets) == set()
    sockets[0].sendall(rest[:1])  # now the second has been silent for longest
    all_read(proxy.port)
    assert served(proxy.port)
    wait_for(lambda: readable(sockets))
    assert readable(sockets) == {sockets[1]}
    if start:
        busy(sockets[1])
    else:
        assert read_all(sockets[1]) == b""
    for s in (sockets[0], sockets[-1]):
        s.sendall(rest[1:] if s is sockets[0] else rest)
        assert the_one_answer(read_all(s)).status == 200
    log = lines_until_now(proxy, proxy.port)
    statuses = [log_fields(line)["status"] for line in log]
    assert sorted(statuses) == 8 * ["200"] + ["404"] + ["503"] * bool(start)


@linux
def test_a_connection_that_is_put_off_can_still_be_sending(proxy: Proxy, clients: Clients) -> None:
    sockets = clients.open(proxy.port, post(b"hell", length=8 * MIB), 128)
    assert served(proxy.port)
    sockets[0].sendall(bytes(8 * MIB))
    busy(sockets[0])


@linux
def test_where_128_wait_for_the_agent_the_129th_is_busy_at_once(
        gate: Scripted, gated: Proxy, clients: Clients) -> None:  # fmt: skip
    sockets = clients.open(gated.port, post(b"x"), 127)
    wait_for(lambda: gate.signing == 127)
    # What waits for the agent keeps its place: the last one takes that of who came last.
    (sending,) = clients.open(gated.port, post(b"hell", length=5))
    sockets += clients.open(gated.port, post(b"x"))
    busy(sending)
    wait_for(lambda: gate.signing == 128, message="all wait for the agent")
    (silent,) = clients.open(gated.port, b"")
    busy(silent)  # before it has sent a byte
    busy(ask(gated.port, get("/healthz")))
    # One that sends much before it reads is told so too.
    busy(ask(gated.port, post(bytes(8 * MIB))))
    # Many that don't close: each has its answer, and they don't hold a thread each.
    waiting = clients.open(gated.port, b"", 200)
    wait_for(lambda: len(readable(waiting)) == 200)
    assert len(os.listdir(f"/proc/{gated.pid}/task")) < 170
    for s in waiting:
        busy(s)
    assert gate.signing == 128
    assert readable(sockets) == set()
    gate.gate.set()
    all_signed(sockets)
    lines = [log_fields(line) for line in lines_until_now(gated, gated.port)]
    assert sum(line["status"] == "503" for line in lines) == 3  # the silent ones have none


@linux
def test_the_client_of_one_token_holds_half_of_the_places_and_keeps_no_other_out(
        gate: Scripted, short: Path, scripted_agent: StartScripted, start_proxy: StartProxy,
        clients: Clients) -> None:  # fmt: skip
    file = private_file(short / "tokens", "first-of-the-tokens one\nsecond-of-the-tokens two\n")
    proxy = start_proxy("--token-file", file, upstream=scripted_agent(gate))
    proxy.wait_log("signing with")
    one, two = (f"Authorization: Bearer {word}-of-the-tokens" for word in ("first", "second"))
    held = clients.open(proxy.port, post(b"x", one), 40)
    held += clients.open(proxy.port, post(b"", one, length=1), 24)  # those that are slow count too
    wait_for(lambda: gate.signing == 40)
    busy(ask(proxy.port, get("/publickey", one)))
    busy(send_all_before_reading(proxy.port, post(b"", one, length=32 * MIB)))
    log = [log_fields(line) for line in lines_until_now(proxy, proxy.port)[:-1]]
    assert [(line["outcome"], line["token"]) for line in log] == 2 * [("busy", "one")]
    held += clients.open(proxy.port, post(b"x", two))
    wait_for(lambda: gate.signing == 41)
    assert served(proxy.port)
    assert readable(held) == set()
    gate.gate.set()
    for s in held[40:64]:
        s.sendall(b"x")
    all_signed(held)
    assert ask(proxy.port, post(b"x", one)).status == 200


def stopped(pid: int) -> bool:
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


@linux
@pytest.mark.parametrize("size", [1, 50000])
def test_a_client_that_has_sent_its_request_is_never_turned_away_in_silence(
    size: int, agent: Agent, keys: Keys, start_proxy: StartProxy, clients: Clients
) -> None:
    """With few places newcomers take them from clients that have done their part."""
    agent.add(keys["ed25519"])
    proxy = start_proxy(python=tuned(PLACES=2), upstream=agent.sock)
    left = 200
    while left:  # those that come again are all served in the end
        os.kill(proxy.pid, signal.SIGSTOP)
        wait_for(lambda: stopped(proxy.pid))
        sockets = [connect(proxy.port) for _ in range(min(left, 50))]
        clients.opened += sockets
        for s in sockets:
            s.sendall(post(bytes(size)))  # it is there in full before the proxy looks
        os.kill(proxy.pid, signal.SIGCONT)
        for s in sockets:
            answer = the_one_answer(read_all(s, 30))
            if answer.status == 200:
                left -= 1
            else:
                busy(answer)
    clean(proxy)


# ================================================================ the agent, and the end


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_what_is_in_flight_is_finished(
        number: int, gate: Scripted, gated: Proxy, clients: Clients) -> None:  # fmt: skip
    (idle,) = clients.open(gated.port, b"")
    (waiting,) = clients.open(gated.port, post(b"x"))
    (sending,) = clients.open(gated.port, post(b"he", length=5))
    (starting,) = clients.open(gated.port, b"GET /heal")
    wait_for(lambda: gate.signing == 1)
    os.kill(gated.pid, number)
    assert read_all(idle) == b""
    with pytest.raises(OSError):  # it has stopped accepting
        connect(gated.port)
    sending.sendall(b"llo")
    starting.sendall(b"thz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert the_one_answer(read_all(starting)).body == b"ok\n"
    wait_for(lambda: gate.signing == 2)
    assert gated.process.poll() is None
    gate.gate.set()
    all_signed([waiting, sending])
    for s in clients.opened:
        s.close()
    assert gated.process.wait(10) == 0
    assert len(request_lines(gated.log())) == 3
