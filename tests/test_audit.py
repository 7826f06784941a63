"""The log's line for each request: it can be undone exactly, it is there before the answer is, and
it names what real git makes of a signature."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

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
    read_message,
    rows,
    run,
    wait_for,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux shows")
README = ROOT / "README.md"
MAX_LINE = 4096  # bytes, its end included: what a pipe takes whole

# ---------------------------------------------------------------- a line, undone

_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}) ([A-Z]+) (.*)")
_ESCAPE = r'\\(?:[\\"nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})'
_FIELD = re.compile(
    r'([a-z]+)=(?:([!#-<>-\[\]-~]+)|"((?:[^"\\]|' + _ESCAPE + r')*)")(?: |\Z)'
)
LETTERS = {"n": "\n", "r": "\r", "t": "\t"}

# Seen as nothing, or as a blank, though Unicode calls them letters, marks or symbols.
BLANK_LOOKING = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0}
BLANK_LOOKING |= {*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0000, 0xE1000)}


def can_be_seen(c: str) -> bool:
    """Neither control nor format, private, unassigned or a blank other than " "."""
    return c == " " or (unicodedata.category(c)[0] not in "CZ" and ord(c) not in BLANK_LOOKING)


def undo(text: str) -> str:
    def one(match: re.Match[str]) -> str:
        letter, digits = match[0][1], match[0][2:]
        return chr(int(digits, 16)) if digits else LETTERS.get(letter, letter)

    return re.sub(_ESCAPE, one, text)


class Line(NamedTuple):
    """One request, as the log has it."""

    level: str
    fields: Dict[str, str]  # in order, undone
    raw: Dict[str, str]  # as they stand there, without the quotes

    def holds(self, name: str, text: str, limit: int = 100) -> bool:
        """Is field NAME all of TEXT, or, where that needs more than LIMIT characters, its start?"""
        value, raw = self.fields[name], self.raw[name]
        if value == text:
            return True
        # An escape is up to 10 characters long, and none is cut in two.
        whole = limit - 10 <= len(raw) <= limit
        return whole and raw[-1] == "…" and text.startswith(value[:-1])


def has_just(line: Line, names: str) -> None:
    assert sorted(line.fields) == sorted(names.split())


def parse_line(data: bytes) -> Line:
    """A line without its end; an AssertionError where it is not exactly of the form promised."""
    text = data.decode()
    assert len(data) + 1 < MAX_LINE, f"cut, or nearly: {text}"
    assert all(map(can_be_seen, text)), ascii(text)
    match = _LINE.fullmatch(text)
    assert match, text
    fields: Dict[str, str] = {}
    raw: Dict[str, str] = {}
    rest = match[3]
    while rest:
        field = _FIELD.match(rest)
        assert field, f"no field: {rest}"
        name, bare, inside = field.groups()
        assert name not in fields, f"{name} stands twice: {text}"
        fields[name] = undo(inside) if bare is None else bare
        raw[name] = inside if bare is None else bare
        rest = rest[field.end() :]
        assert rest or not field[0].endswith(" "), f"a blank at the end: {text}"
    line = Line(match[2], fields, raw)
    peer = ["peer", "pid", "uid"] if fields.get("peer") == "unix" else ["peer"]
    expected = ["outcome", "status", *peer, "ms"]
    assert list(fields)[: len(expected)] == expected, text
    assert fields["ms"].isdigit() and fields["status"].isdigit(), text
    assert line.level == ("INFO" if fields["outcome"] == "served" else "AUDIT"), text
    return line


START = "2026-01-31T23:59:59+0100 AUDIT outcome=signed status=200 peer=127.0.0.1:4711 ms=7"


@pytest.mark.parametrize("field, value", rows([
    ("a bare word", "path=/sign", "/sign"),
    ("in quotes", 'path="a b"', "a b"),
    ("empty", 'path=""', ""),
    ("a quote", r'path="\""', '"'),
    ("a backslash", r'path="\\"', "\\"),
    ("a backslash before n", r'path="\\n"', "\\n"),
    ("a line break", r'path="\n"', "\n"),
    ("an escape of each length", r'path="\x1b\u202e\U000e0001"', "\x1b\u202e\U000e0001"),
    ("text that looks like a field", r'path="a\" b=c"', 'a" b=c'),
]))  # fmt: skip
def test_a_line_of_the_form_promised_is_undone(field: str, value: str) -> None:
    assert parse_line(f"{START} {field}".encode()).fields["path"] == value


@pytest.mark.parametrize("bad", rows([
    ("a blank in a bare word", "path=a b"),
    ("a quote in a bare word", 'path=a"b"'),
    ("= in a bare word", "path=a=b"),
    ("a backslash in a bare word", r"path=a\nb"),
    ("an empty bare word", "path= kind=x"),
    ("a quote without end", 'path="a'),
    ("an escape without end", 'path="\\'),
    ("a quote that the text ends", 'path="a" b"'),
    ("an unknown escape", r'path="\q"'),
    ("an escape cut in two", r'path="\u20"'),
    ("a name twice", "kind=tag kind=tag"),
    ("two blanks", "kind=tag  path=a"),
    ("a blank at the end", "kind=tag "),
    ("an escape character", 'path="\x1b"'),
    ("a bidi override", 'path="\u202e"'),
    ("a zero-width blank", 'path="\u200b"'),
    ("a tag", 'path="\U000e0041"'),
    ("a variation selector", 'path="\ufe0f"'),
    ("a line separator", 'path="\u2028"'),
    ("a no-break blank", 'path="\u00a0"'),
    ("4096 bytes", "path=" + "a" * 4009),
]))  # fmt: skip
def test_a_line_of_another_form_is_noticed(bad: str) -> None:
    with pytest.raises(AssertionError):
        parse_line(f"{START} {bad}".encode())


# ---------------------------------------------------------------- a proxy whose log is a file


class Logged:
    """The proxy as a process of its own; what it has logged can be read without delay."""

    def __init__(
        self, folder: Path, *args: Any, unix: bool = False, wrapper: Tuple[Any, ...] = ()
    ) -> None:
        self.file = folder / "log"
        self.asked = 0
        self.socket = folder / "s" if unix else None
        addr = f"unix:{self.socket}" if unix else "127.0.0.1:0"
        argv = [*wrapper, sys.executable, PROXY, "--addr", addr, *args]
        with self.file.open("wb") as log:
            self.process = subprocess.Popen(
                [str(a) for a in argv],
                env=clean_env(folder / "home"),
                stdin=subprocess.DEVNULL,
                stderr=log,
            )

    @property
    def url(self) -> str:
        return f"unix:{self.socket}" if self.socket else f"http://127.0.0.1:{self.port}/sign"

    def listens(self) -> bool:
        assert self.process.poll() is None, self.file.read_text()
        if self.socket:  # with -q the log does not tell
            with socket.socket(socket.AF_UNIX) as s:
                return s.connect_ex(str(self.socket)) == 0
        found = re.search(r"listening on 127\.0\.0\.1:(\d+) ", self.file.read_text())
        self.port = int(found[1]) if found else 0
        return bool(found)

    def lines(self, start: int = 0) -> List[Line]:
        """Each request's line, from the byte START of the log on."""
        with self.file.open("rb") as f:
            f.seek(start)
            whole = f.read()
        assert not whole or whole.endswith(b"\n"), "half a line"
        return [parse_line(line) for line in whole.split(b"\n") if b" outcome=" in line]

    def size(self) -> int:
        return self.file.stat().st_size

    def of(self, peer: str) -> List[Line]:
        return [line for line in self.lines() if line.fields["peer"] == peer]

    def connect(self) -> socket.socket:
        """For a request, which is one line in the end."""
        self.asked += 1
        if self.socket:
            s = socket.socket(socket.AF_UNIX)
            s.settimeout(20)
            s.connect(str(self.socket))
            return s
        return socket.create_connection(("127.0.0.1", self.port), 20)

    def ask_all(self, data: bytes, end: bool = False) -> Tuple[Answer, List[Line]]:
        """The answer to DATA, and the lines that the log had more when its first byte came."""
        before = self.size()
        with self.connect() as s:
            s.sendall(data)
            if end:
                s.shutdown(socket.SHUT_WR)
            received = s.recv(1)
            lines = self.lines(before)
            peer = "unix" if self.socket else name_of(s)
            while piece := s.recv(65536):
                received += piece
        return parse_answer(received), [line for line in lines if line.fields["peer"] == peer]

    def ask(self, data: bytes, end: bool = False) -> Tuple[Answer, Line]:
        answer, (line,) = self.ask_all(data, end)
        assert line.fields["status"] == str(answer.status)
        return answer, line

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(20)
        log = self.file.read_text()
        assert "Traceback" not in log and "internal error" not in log, log
        assert status == 0
        # (Where git asks, the tests do not.)
        assert not self.asked or len(self.lines()) == self.asked


def name_of(s: socket.socket) -> str:
    return "{}:{}".format(*s.getsockname()[:2])


Start = Callable[..., Logged]


@contextlib.contextmanager
def starting() -> Iterator[Start]:
    folder = Path(tempfile.mkdtemp(prefix="sap.", dir="/tmp"))
    started: List[Logged] = []

    def start(*args: Any, **options: Any) -> Logged:
        own = folder / str(len(started))
        own.mkdir()
        proxy = Logged(own, *args, **options)
        started.append(proxy)
        wait_for(proxy.listens, message="the proxy listens")
        return proxy

    try:
        yield start
        for proxy in started:
            proxy.stop()
    finally:
        for proxy in started:
            if proxy.process.poll() is None:
                proxy.process.kill()
                proxy.process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as start:
        yield start


ODD_NAMESPACES = [
    'a"b', "c\\d", "e=f", "\\n", "\\", '"', "=", "''", "outcome=signed", "n" * 255, '"' * 255,
    "\\" * 255,
]  # fmt: skip


@pytest.fixture(scope="module")
def agent_with_key(keys: Keys) -> Iterator[Agent]:
    folder = Path(tempfile.mkdtemp(prefix="sap.", dir="/tmp"))
    agent = Agent(folder / "agent")
    agent.add(keys["ed25519"])
    yield agent
    agent.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def shared(agent_with_key: Agent) -> Iterator[Logged]:
    """In front of a real agent, with odd namespaces allowed."""
    with starting() as start:
        yield start(
            "--upstream", agent_with_key.sock, "--namespace", ",".join(["git", *ODD_NAMESPACES])
        )


@pytest.fixture(scope="module")
def for_git(agent_with_key: Agent) -> Iterator[Logged]:
    with starting() as start:
        yield start("--upstream", agent_with_key.sock)


def fields_of(fields: Dict[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode("latin-1")


def post(body: bytes, **fields: str) -> bytes:
    named = {"Host": "localhost", "Content-Length": str(len(body))}
    named.update({name.replace("_", "-"): value for name, value in fields.items()})
    return b"POST /sign HTTP/1.1\r\n" + fields_of(named) + b"\r\n" + body


def get(path: str, method: str = "GET", **fields: str) -> bytes:
    named = {"Host": "localhost", **{n.replace("_", "-"): v for n, v in fields.items()}}
    return f"{method} {path} HTTP/1.1\r\n".encode() + fields_of(named) + b"\r\n"


ID = b"1234567890" * 4
WHEN = b" 1700000000 +0100\n"
FINGERPRINT = b"SHA256:" + b"a" * 43


def commit(
    subject: bytes = b"Subject",
    author: bytes = b"A U Thor <a@example.com>",
    committer: bytes = b"C O Mitter <c@example.com>",
    id: bytes = ID,
) -> bytes:
    head = b"tree " + id + b"\nauthor " + author + WHEN + b"committer " + committer + WHEN
    return head + b"\n" + subject


def tag(subject: bytes = b"Subject", tagger: bytes = b"T Agger <t@example.com>") -> bytes:
    head = b"object " + ID + b"\ntype commit\ntag v1\ntagger " + tagger + WHEN
    return head + b"\n" + subject


def push(ref: bytes = b"refs/heads/main") -> bytes:
    head = b"certificate version 0.1\npusher " + FINGERPRINT + b"  1700000000 +0100\n"
    return head + b"pushee ../peer\nnonce 1-a\n\n" + ID + b" " + ID + b" " + ref + b"\n"


# ---------------------------------------------------------------- hostile texts

TEXTS: List[Tuple[str, bytes]] = [
    ("plain", b"Fix it"),
    ("one word", b"word"),
    ("empty", b""),
    ("a quote", b'a"b'),
    ("nothing but quotes", b'"' * 40),
    ("a backslash", b"a\\b"),
    ("a backslash at the end", b"a\\"),
    ("backslash and quote", b'\\" b=c \\\\"'),
    ("a literal \\n", b"a\\nb"),
    ("literal escapes", b"\\x1b\\u202e\\U000e0001\\\\"),
    ("looks like fields", b'" outcome=refused id=' + ID + b' digest="'),
    ("looks like a field", b"key=value"),
    ("a line break and a line", b"a\n2026-01-01T00:00:00+0000 AUDIT outcome=signed status=200"),
    ("a carriage return", b"a\rb"),
    ("a tab", b"a\tb"),
    ("an escape sequence", b"\x1b[2J\x1b]0;title\x07\x1b[31mred"),
    ("all controls", bytes(c for c in [*range(1, 32), 127] if c != 10)),
    ("C1 controls", "a\x85\x9b31m\x90".encode()),
    ("bidi", "a\u202eb\u202d\u2066\u2067\u2068\u2069\u202c\u200f\u061c".encode()),
    ("zero-width", "a\u200bb\u200c\u200d\u2060\ufeff\u00ad".encode()),
    ("tags", "a\U000e0001\U000e0041\U000e007f".encode()),
    ("variation selectors", "a\ufe00\ufe0f\U000e0100\U000e01ef".encode()),
    ("blank letters", "a\u115f\u1160\u3164\uffa0\u2800\u034f\u17b4\u180b\u180e\u180f".encode()),
    ("line separators", "a\u2028b\u2029c".encode()),
    ("odd blanks", "a\u00a0\u2003\u3000\u202fb".encode()),
    ("private and unassigned", "\ue000\U000f0000\U0010ffff\ufffe\u0378".encode()),
    ("letters of all sizes", "aé☃\U0001d4b3".encode()),
    ("Latin-1", b"caf\xe9 \xff"),
    ("a surrogate in UTF-8", b"a\xed\xa0\x80b"),
    ("UTF-8 cut in two", "é".encode()[:1] + b"a" + "☃".encode()[:2]),
    ("blanks around", b"  both  "),
    ("a blank", b" "),
    ("an ellipsis at the end", "to be continued…".encode()),
    ("99 characters", b"b" * 99),
    ("100 characters", b"b" * 100),
    ("101 characters", b"b" * 101),
    ("100 characters and blanks", b"b " * 50),
    ("10,000 characters", b"c" * 10000),
    ("10,000 quotes", b'"' * 10000),
    ("10,000 long escapes", "\U000e0041".encode() * 10000),
    ("10,000 large characters", "\U0001d4b3".encode() * 10000),
    ("10,000 bytes of Latin-1", b"\xe9" * 10000),
]  # fmt: skip

FORMED: Dict[str, Callable[[bytes], bytes]] = {
    "commit subject": lambda text: commit(subject=text),
    "commit author": lambda text: commit(author=text + b" <a@b>"),
    "commit committer": lambda text: commit(committer=b"C <" + text + b">"),
    "tag subject": tag,
    "tag tagger": lambda text: tag(tagger=text + b" <>"),
    "push subject": push,
}


def shown(text: bytes) -> str:
    """As text: a byte that is no UTF-8 is told as \\xNN."""
    return text.decode("utf-8", "surrogateescape")


@pytest.mark.parametrize("text", rows(TEXTS))
@pytest.mark.parametrize("place", ["commit subject", "tag subject"])
def test_a_subject_is_undone_to_what_was_sent(place: str, text: bytes, shared: Logged) -> None:
    kind = place.split()[0]
    answer, line = shared.ask(post(FORMED[place](text)))
    assert (answer.status, line.fields["kind"]) == (200, kind)
    assert line.holds("subject", shown(text.partition(b"\n")[0]))


@pytest.mark.parametrize("text", rows(TEXTS))
@pytest.mark.parametrize("place", ["commit author", "commit committer", "tag tagger"])
def test_a_person_is_undone_to_what_was_sent(place: str, text: bytes, shared: Logged) -> None:
    kind, name = place.split()
    answer, line = shared.ask(post(FORMED[place](text)))
    assert answer.status == 200
    if b"\n" in text:  # a header ends there
        assert line.fields["kind"] == "other"
        assert not {"subject", "author", "committer", "tagger"} & set(line.fields)
    else:
        assert line.fields["kind"] == kind
        body = {"author": text + b" <a@b>", "committer": b"C <" + text + b">"}
        assert line.holds(name, shown(body.get(name, text + b" <>")))


@pytest.mark.parametrize("text", rows(TEXTS))
def test_a_ref_that_is_pushed_is_undone_to_what_was_sent(text: bytes, shared: Logged) -> None:
    ref = b"refs/heads/" + text
    answer, line = shared.ask(post(push(ref)))
    assert answer.status == 200
    # As git check-ref-format has it, as far as the texts go.
    may_be = text and not re.search(rb"[\x00- \x7f~^:?*\[\\]", text)
    assert line.fields["kind"] == ("push" if may_be else "other")
    if may_be:
        assert line.holds("subject", shown(ref))
        assert line.fields["pusher"] == FINGERPRINT.decode()
    else:
        assert not {"subject", "pusher"} & set(line.fields)


@pytest.mark.parametrize("text", rows(TEXTS))
def test_a_path_is_undone_to_what_was_sent(text: bytes, shared: Logged) -> None:
    target = b"/" + text
    answer, line = shared.ask(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert line.fields["outcome"] == "refused"
    assert line.fields["reason"] == answer.text.rstrip("\n")
    if re.fullmatch(rb"[\w.~!$&'()*+,;=:@%/-]+", target, re.ASCII):  # RFC 3986
        assert answer.status == 404
    if answer.status == 404:
        assert line.holds("path", shown(target), 1000)
    else:
        assert answer.status in (400, 431)
        has_just(line, "outcome status peer ms reason")


@pytest.mark.parametrize("namespace", ODD_NAMESPACES, ids=range(len(ODD_NAMESPACES)))
def test_a_namespace_is_undone_to_what_was_sent(namespace: str, shared: Logged) -> None:
    answer, line = shared.ask(post(b"x", SSHSIG_Namespace=namespace))
    assert answer.status == 200
    assert line.fields["namespace"] == namespace


FREE_FIELDS = ["SSHSIG-Namespace", "SSHSIG-Hash", "SSHSIG-Key", "Host", "Origin", "Authorization",
               "Expect", "Transfer-Encoding", "X"]  # fmt: skip


@pytest.mark.parametrize("text", rows(TEXTS))
def test_whatever_a_header_says_the_reason_is_the_one_answered(
    text: bytes, shared: Logged
) -> None:
    for name in FREE_FIELDS:
        named = {"Host": b"localhost", "Content-Length": b"1", name: text}
        if name == "Transfer-Encoding":
            del named["Content-Length"]
        head = b"".join(n.encode() + b": " + v + b"\r\n" for n, v in named.items())
        answer, line = shared.ask(b"POST /sign HTTP/1.1\r\n" + head + b"\r\nx", end=True)
        if answer.status != 200:
            assert line.holds("reason", answer.text.rstrip("\n"), 1000), name


def test_a_method_of_any_length_is_undone_to_what_was_sent(shared: Logged) -> None:
    for method in ("BREW", "!#$%&'*+-.^_`|~", "M" * 1000, "M" * 10000):
        answer, line = shared.ask(get("/" + "p" * 5000, method))
        assert answer.status == 404
        assert line.holds("method", method, 1000)
        assert line.fields["reason"] == answer.text.rstrip("\n")


# What takes most room: a character of four bytes, an escape of ten characters, one of two.
LARGE = "\U0001d4b3"
HEAVY = {"large": LARGE.encode(), "escaped": "\U000e0041".encode(), "quotes": b'"'}


@pytest.fixture(scope="module")
def heavy(agent_with_key: Agent) -> Iterator[Callable[[str], Tuple[Logged, Dict[str, str]]]]:
    """A proxy whose own settings are as long as can be, and the fields to send."""
    with starting() as start:
        made: Dict[str, Logged] = {}
        name = "t" * 1500
        fields = {"Authorization": f"Bearer {'s' * 20}", "SSHSIG-Namespace": '"' * 255}

        def one(upstream: str) -> Tuple[Logged, Dict[str, str]]:
            if upstream not in made:
                folder = Path(agent_with_key.sock).parent
                tokens = folder / "tokens"
                tokens.write_text(f"{'s' * 20} {name}\n")
                tokens.chmod(0o600)
                made[upstream] = start(
                    "--upstream", upstream, "--namespace", '"' * 255, "--token-file", tokens
                )
            return made[upstream], fields

        yield one


@pytest.mark.parametrize("text", HEAVY)
def test_nothing_of_the_longest_line_is_lost(
    text: str, heavy: Any, agent_with_key: Agent, keys: Keys
) -> None:
    proxy, fields = heavy(str(agent_with_key.sock))
    many = HEAVY[text] * 2000
    payload = commit(many, many + b" <" + many + b">", many + b" <>", b"1" * 64)
    answer, line = proxy.ask(post(payload, **fields))
    assert answer.status == 200
    has_just(line, f"{SIGNED} token id subject author committer")
    assert line.fields["digest"] == "sha512:" + hashlib.sha512(payload).hexdigest()
    assert re.fullmatch("[0-9a-f]{64}", line.fields["id"])
    assert line.fields["key"] == fingerprint(f"{keys['ed25519']}.pub")
    assert line.fields["namespace"] == '"' * 255
    for name in ("subject", "author", "committer"):
        assert line.holds(name, shown(many)), name


@pytest.mark.parametrize("text", HEAVY)
def test_nothing_of_the_longest_line_of_a_failure_is_lost(text: str, heavy: Any) -> None:
    proxy, fields = heavy("exec:/nowhere/" + LARGE * 1000)
    many = HEAVY[text] * 2000
    answer, line = proxy.ask(post(commit(many, many + b" <>", many + b" <>"), **fields))
    assert (answer.status, line.fields["outcome"]) == (503, "failed")
    assert line.holds("reason", answer.text.rstrip("\n"), 1000)
    for name in ("subject", "author", "committer"):
        assert line.holds(name, shown(many)), name


# ---------------------------------------------------------------- every outcome, before the answer


def fingerprint(key: Any) -> str:
    return run(["ssh-keygen", "-lf", key]).stdout.decode().split()[1]


ASKED = "outcome status peer ms method path"
SIGNED = f"{ASKED} namespace kind digest key"
CONNECT = get("/sign", "POST", Content_Length="5")

# name, what is sent, outcome, status, the line's fields in order
OUTCOMES: List[Tuple[str, bytes, str, int, str]] = [
    ("a commit", post(commit()), "signed", 200, f"{SIGNED} id subject author committer"),
    ("a tag", post(tag()), "signed", 200, f"{SIGNED} id subject tagger"),
    ("a push", post(push()), "signed", 200, f"{SIGNED} subject pusher"),
    ("something else", post(b"x"), "signed", 200, SIGNED),
    ("with SHA-256", post(b"x", SSHSIG_Hash="sha256"), "signed", 200, SIGNED),
    ("/publickey", get("/publickey"), "served", 200, f"{ASKED} namespace key"),
    ("HEAD /publickey", get("/publickey", "HEAD"), "served", 200, f"{ASKED} namespace key"),
    ("/healthz", get("/healthz"), "served", 200, ASKED),
    ("/shim", get("/shim"), "served", 200, ASKED),
    ("no HTTP", b"\x00\r\n\r\n", "refused", 400, "outcome status peer ms reason"),
    ("TLS", b"\x16\x03\x01\x02\x00\x01", "refused", 400, "outcome status peer ms reason"),
    ("no Host", b"GET / HTTP/1.1\r\n\r\n", "refused", 400, "outcome status peer ms reason"),
    ("an empty body", post(b""), "refused", 400, f"{ASKED} namespace reason"),
    ("a bad key", post(b"x", SSHSIG_Key="ssh-ed25519 x"), "refused", 400,
     f"{ASKED} namespace reason"),
    ("a bad hash", post(b"x", SSHSIG_Hash="md5"), "refused", 400, f"{ASKED} namespace reason"),
    ("a body that ends early", CONNECT + b"abc", "refused", 400, f"{ASKED} namespace reason"),
    ("a page", post(b"x", Origin="http://evil.example"), "refused", 403, f"{ASKED} reason"),
    ("another namespace", post(b"x", SSHSIG_Namespace="file"), "refused", 403, f"{ASKED} reason"),
    ("no such path", get("/nope"), "refused", 404, f"{ASKED} reason"),
    ("a key not held", post(tag(), SSHSIG_Key=FINGERPRINT.decode()), "refused", 404,
     f"{ASKED} namespace kind digest subject tagger reason"),
    ("another method", get("/sign"), "refused", 405, f"{ASKED} reason"),
    ("no length", get("/sign", "POST"), "refused", 411, f"{ASKED} namespace reason"),
    ("too much", get("/sign", "POST", Content_Length=str((1 << 30) + 1)), "refused", 413,
     f"{ASKED} namespace reason"),
    ("another host", get("/healthz", Host="evil.example"), "refused", 421, f"{ASKED} reason"),
    ("a large head", get("/healthz", X="x" * 20000), "refused", 431,
     "outcome status peer ms reason"),
]  # fmt: skip


def is_right(answer: Answer, line: Line, outcome: str, status: int, names: str) -> None:
    assert answer.status == status
    assert (line.fields["outcome"], line.fields["status"]) == (outcome, str(status))
    has_just(line, names)
    if "reason" in line.fields:
        assert line.holds("reason", answer.text.rstrip("\n"), 1000)
    assert int(line.fields["ms"]) < 60000


@pytest.mark.parametrize("sent, outcome, status, names", rows(OUTCOMES))
def test_the_line_is_there_when_the_answer_begins(
    sent: bytes, outcome: str, status: int, names: str, shared: Logged, keys: Keys
) -> None:
    answer, line = shared.ask(sent, end=status == 400)
    is_right(answer, line, outcome, status, names)
    if "method" in line.fields:
        method, path = sent.decode().split(" ")[:2]
        assert (line.fields["method"], line.fields["path"]) == (method, path)
    if "key" in line.fields:
        assert line.fields["key"] == fingerprint(f"{keys['ed25519']}.pub")
    if "digest" in line.fields:
        body = sent.partition(b"\r\n\r\n")[2]
        name = "sha256" if b"SSHSIG-Hash: sha256" in sent else "sha512"
        assert line.fields["digest"] == f"{name}:{hashlib.new(name, body).hexdigest()}"


@pytest.mark.parametrize("sent", rows([
    ("a commit", post(commit())), ("other", post(b"x")), ("no such path", get("/nope")),
    ("/healthz", get("/healthz")),
]))  # fmt: skip
def test_on_a_unix_socket_the_peer_is_a_process(
    sent: bytes, start: Start, agent_with_key: Agent
) -> None:
    _, line = start("--upstream", agent_with_key.sock, unix=True).ask(sent)
    assert line.fields["peer"] == "unix"
    assert line.fields["pid"] == str(os.getpid())
    assert line.fields["uid"] == str(os.getuid())


# ---- who may

TOKENS = """# a comment
first-secret ci
second-secret
third-secret leashed payloads=tag
fourth-secret pinned key=SHA256:{}
""".format("b" * 43)


@pytest.fixture(scope="module")
def guarded(agent_with_key: Agent) -> Iterator[Tuple[Logged, Path]]:
    with starting() as start:
        file = Path(agent_with_key.sock).parent / "guarded"
        file.write_text(TOKENS)
        file.chmod(0o600)
        yield start("--upstream", agent_with_key.sock, "--token-file", file), file


# name, the token, its name in the log, outcome, status, the fields after path
TOKEN_OUTCOMES: List[Tuple[str, str, str, str, int, str]] = [
    ("none", "", "", "refused", 401, "reason"),
    ("a wrong one", "nope", "", "refused", 401, "reason"),
    ("a named one", "first-secret", "ci", "signed", 200,
     "token namespace kind digest key id subject author committer"),
    ("one without a name", "second-secret", "line 3", "signed", 200,
     "token namespace kind digest key id subject author committer"),
    ("one for tags", "third-secret", "leashed", "refused", 403,
     "token namespace kind digest subject author committer reason"),
    ("one with a key that the agent lacks", "fourth-secret", "pinned", "failed", 503,
     "token namespace kind digest subject author committer reason"),
]  # fmt: skip


@pytest.mark.parametrize("token, name, outcome, status, names", rows(TOKEN_OUTCOMES))
def test_the_line_names_the_token_and_does_not_tell_it(
    token: str, name: str, outcome: str, status: int, names: str, guarded: Tuple[Logged, Path]
) -> None:
    proxy, _ = guarded
    fields = {"Authorization": f"Bearer {token}"} if token else {}
    answer, line = proxy.ask(post(commit(), **fields))
    is_right(answer, line, outcome, status, f"{ASKED} {names}")
    assert line.fields.get("token", "") == name
    assert "secret" not in proxy.file.read_text()


def test_a_broken_token_file_is_a_failure_whose_line_says_why(
    guarded: Tuple[Logged, Path]
) -> None:
    proxy, file = guarded
    file.write_text("a b c d\n")
    try:
        answer, line = proxy.ask(post(b"x"))
    finally:
        file.write_text(TOKENS)
    assert (answer.status, line.fields["outcome"]) == (503, "failed")
    has_just(line, f"{ASKED} reason")
    assert str(file) in line.fields["reason"] and "line 1" in line.fields["reason"]
    assert str(file) not in answer.text


@pytest.mark.parametrize("program, outcome, status", rows([
    ("yes", "true", "signed", 200), ("no", "false", "refused", 403),
]))  # fmt: skip
def test_what_the_person_said_is_one_line(
    program: str, outcome: str, status: int, start: Start, agent_with_key: Agent
) -> None:
    askpass = need(program, "coreutils")
    proxy = start("--upstream", agent_with_key.sock, "--confirm", askpass)
    answer, line = proxy.ask(post(tag()))
    names = {
        "signed": f"{SIGNED} id subject tagger",
        "refused": f"{ASKED} namespace kind digest subject tagger reason",
    }
    is_right(answer, line, outcome, status, names[outcome])
    if outcome == "refused":
        assert line.fields["reason"].startswith("not confirmed: ")


# ---- when the agent is at fault


def lying(connection: socket.socket) -> None:
    while read_message(connection):
        connection.sendall(message(b"\x0e\x00\x00\x00\x01x"))


def stalling(connection: socket.socket) -> None:
    while read_message(connection):
        pass


NO_ANSWER = f"{ASKED} namespace kind digest subject author committer reason"


@pytest.mark.parametrize("handler, outcome, status", rows([
    ("lies", lying, "failed", 502), ("stalls", stalling, "failed", 504),
    ("is not there", None, "failed", 503),
]))  # fmt: skip
def test_an_agent_at_fault_is_a_failure(
    handler: Any, outcome: str, status: int, start: Start, scripted_agent: Any, keys: Keys,
    short: Path,
) -> None:  # fmt: skip
    upstream = scripted_agent(handler) if handler else short / "nobody"
    proxy = start("--upstream", upstream, "--timeout", "0.3")
    key = " ".join(keys.line("ed25519").split()[:2])
    answer, line = proxy.ask(post(commit(), SSHSIG_Key=key))
    is_right(answer, line, outcome, status, NO_ANSWER)
    answer, line = proxy.ask(get("/publickey"))
    is_right(answer, line, outcome, status, f"{ASKED} namespace reason")


def test_an_agent_that_refuses_is_a_refusal(
    start: Start, agent: Agent, keys: Keys
) -> None:
    agent.add(keys["ed25519"], "-c")  # it would ask, and has nobody to ask through
    answer, line = start("--upstream", agent.sock).ask(post(commit()))
    is_right(answer, line, "refused", 403, NO_ANSWER)


def test_a_client_that_leaves_is_one_line(start: Start, scripted_agent: Any, keys: Keys) -> None:
    proxy = start("--upstream", scripted_agent(stalling), "-v")
    key = " ".join(keys.line("ed25519").split()[:2])
    with proxy.connect() as s:
        peer = name_of(s)
        s.sendall(post(commit(), SSHSIG_Key=key))
    wait_for(lambda: proxy.of(peer), message="a line")
    (line,) = proxy.of(peer)
    assert line.fields["outcome"] == "gone"
    has_just(line, NO_ANSWER)
    assert line.fields["subject"] == "Subject"


def test_a_client_that_breaks_off_is_one_line(shared: Logged) -> None:
    with shared.connect() as s:
        peer = name_of(s)
        s.sendall(CONNECT + b"abc")
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: shared.of(peer), message="a line")
    (line,) = shared.of(peer)
    assert line.fields["outcome"] in ("gone", "refused")  # where the end came first, and no reset
    has_just(line, f"{ASKED} namespace reason")


def test_one_that_finds_no_place_is_busy(start: Start, scripted_agent: Any, keys: Keys) -> None:
    waiting: List[socket.socket] = []

    def count(connection: socket.socket) -> None:
        while asked := read_message(connection):
            if asked[0] == 13:  # SSH_AGENTC_SIGN_REQUEST
                waiting.append(connection)

    proxy = start("--upstream", scripted_agent(count))
    sent = post(commit(), SSHSIG_Key=" ".join(keys.line("ed25519").split()[:2]))
    with contextlib.ExitStack() as stack:
        for _ in range(128):
            stack.enter_context(proxy.connect()).sendall(sent)
        wait_for(lambda: len(waiting) == 128, message="all wait for the agent")
        answer, line = proxy.ask(get("/healthz"))
        is_right(answer, line, "busy", 503, "outcome status peer ms reason")
        assert [line.fields["outcome"] for line in proxy.lines()] == ["busy"]
    wait_for(lambda: len(proxy.lines()) == 129, message="the others' lines")
    outcomes = Counter(line.fields["outcome"] for line in proxy.lines())
    assert outcomes == {"busy": 1, "gone": 128}


DRIVER = """
import sys
sys.path.insert(0, {root!r})
import ssh_agent_proxy
ssh_agent_proxy.HEAD_SECONDS = 0.3
sys.exit(ssh_agent_proxy.main(sys.argv[3:]))
"""


def test_a_request_that_is_too_slow_is_one_line_and_none_begun_is_none(
    start: Start, agent_with_key: Agent
) -> None:
    # Nobody waits ten seconds here; -c takes the place of the script's name.
    driver = (sys.executable, "-c", DRIVER.format(root=str(ROOT)))
    proxy = start("--upstream", agent_with_key.sock, wrapper=driver)
    with socket.create_connection(("127.0.0.1", proxy.port), 20) as silent:
        answer, line = proxy.ask(b"GET /healthz HT")
        is_right(answer, line, "refused", 408, "outcome status peer ms reason")
        assert silent.recv(1) == b""
        proxy.ask(get("/healthz"))
        assert len(proxy.lines()) == 2


# ---- by the system's own account


@linux
def test_the_line_is_written_before_the_answer_is_sent(
    start: Start, agent: Agent, keys: Keys, short: Path
) -> None:
    # Run as strace's child the proxy would not be ours to end: -D swaps the two.
    trace = short / "trace"
    argv = [need("strace", "strace"), "-D", "-f", "-qq", "-e", "trace=write,sendto,sendmsg"]
    agent.add(keys["ed25519"])
    strace = (*argv, "-s", "300", "-o", trace)
    proxy = start("--upstream", agent.sock, "--timeout", "20", wrapper=strace)
    for _, sent, _, status, _ in OUTCOMES:
        proxy.ask(sent, end=status == 400)
    agent.delete_all()
    answer, _ = proxy.ask(post(commit()))
    assert answer.status == 503
    proxy.stop()
    wait_for(lambda: not is_open(trace), message="strace has ended")
    steps = []
    for call in trace.read_text().splitlines():
        logged = re.search(r' write\(2, "\S+ \w+ outcome=\w+ status=(\d+) ', call)
        answered = re.search(r' send(?:to|msg)\(\d+, .*?"HTTP/1\.1 (\d+) ', call)
        for what, match in (("line", logged), ("answer", answered)):
            if match:
                steps.append((what, match[1]))
    expected = [*[str(row[3]) for row in OUTCOMES], "503"]
    assert steps == [(what, status) for status in expected for what in ("line", "answer")]


def is_open(path: Path) -> bool:
    """Does a process still write to PATH?"""
    inode = (path.stat().st_dev, path.stat().st_ino)
    for number in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found = number.stat()
            if (found.st_dev, found.st_ino) == inode:
                return True
    return False


def test_a_quiet_log_keeps_all_but_what_is_merely_served(
    start: Start, agent_with_key: Agent
) -> None:
    proxy = start("--upstream", agent_with_key.sock, "-q", unix=True)
    for name, sent, outcome, status, _ in OUTCOMES:
        _, lines = proxy.ask_all(sent, end=status == 400)
        logged = [line.fields["outcome"] for line in lines]
        assert logged == [outcome] * (outcome != "served"), name
        proxy.asked -= outcome == "served"


# ---------------------------------------------------------------- what real git makes of it


class Repository:
    """In a home whose git signs everything through the shim."""

    def __init__(self, home: Path, url: str, key: Path, id_format: str = "sha1") -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.path = home / "repository"
        self.env = clean_env(home, SSH_AGENT_PROXY_URL=url)
        self.now = 1700000000
        self.key = key
        settings = {
            "gpg.format": "ssh",
            "gpg.ssh.program": str(SHIM),
            "user.signingkey": str(key),
            "commit.gpgsign": "true",
            "tag.gpgsign": "true",
            "advice.nestedTag": "false",
        }
        for name, value in settings.items():
            run(["git", "config", "--global", name, value], env=self.env)
        run(["git", "init", "-q", "-b", "main", f"--object-format={id_format}", self.path],
            env=self.env)  # fmt: skip

    def git(self, *args: Any, input: Optional[bytes] = None) -> str:
        # No two objects are the same: each command has a second of its own.
        self.now += 1
        when = {f"GIT_{who}_DATE": f"{self.now} +0000" for who in ("AUTHOR", "COMMITTER")}
        env = {**self.env, **when, "GIT_EDITOR": "true"}
        return shown(run(["git", *args], env=env, cwd=self.path, input=input).stdout).strip()

    def commit(self, text: str, *options: str) -> str:
        """A commit of a file of its own."""
        (self.path / text.split()[0]).write_text(text)
        self.git("add", ".")
        self.git("commit", "-q", "-m", text, *options)
        return self.git("rev-parse", "HEAD")

    def directly(self, *args: Any) -> None:
        """Signed with the private key, the proxy not being asked."""
        native = ("gpg.ssh.program=ssh-keygen", f"user.signingkey={self.key.with_suffix('')}")
        self.git(*[word for setting in native for word in ("-c", setting)], *args)

    def signed(self) -> Dict[str, Tuple[str, str]]:
        """Kind and subject of each signed commit and tag there is, reachable or not, by its id."""
        listed = self.git("cat-file", "--batch-all-objects", "--batch-check")
        found = {}
        for line in listed.splitlines():
            name, kind, _ = line.split()
            if kind in ("commit", "tag"):
                argv = ["git", "cat-file", kind, name]
                data = run(argv, env=self.env, cwd=self.path).stdout
                head, _, text = data.partition(b"\n\n")
                if kind == "tag" and BEGIN in text:
                    found[name] = kind, subject_of(text.partition(BEGIN)[0])
                elif re.search(rb"^gpgsig(-sha256)? ", head, re.M):
                    found[name] = kind, subject_of(text)
        return found


def subject_of(text: bytes) -> str:
    return shown(text.lstrip(b"\n").partition(b"\n")[0])


BEGIN = b"-----BEGIN SSH SIGNATURE-----\n"


def everyday(repository: Repository) -> None:
    """What people do."""
    git = repository.git
    repository.commit("first")
    repository.commit("second")
    git("commit", "-q", "--amend", "-m", "second, amended")
    git("tag", "-m", "The first release", "v1", "HEAD~1")
    git("tag", "-m", "A tag of it", "nested", "v1")
    git("checkout", "-q", "-b", "topic", "HEAD~1")
    repository.commit("topic")
    git("checkout", "-q", "main")
    git("merge", "-q", "--no-ff", "-m", "Merge the topic", "topic")


def everything(repository: Repository) -> None:
    """All the ways in which git makes commits and tags."""
    everyday(repository)
    git = repository.git
    git("tag", "--no-sign", "light")
    assert git("cat-file", "-t", "light") == "commit"
    git("tag", "-m", "Of a tree", "tree", "HEAD^{tree}")
    git("tag", "-m", "Of a file", "blob", "HEAD:first")
    git("tag", "-m", "Of a tag of a tag", "nested-more", "nested")
    # A signed tag of another line becomes the merge's mergetag.
    git("checkout", "-q", "-b", "side", "v1^{}")
    repository.commit("side")
    git("tag", "-m", "The side's release", "side-1")
    git("checkout", "-q", "main")
    git("merge", "-q", "--no-ff", "--no-edit", "side-1")
    assert "\nmergetag object " in git("cat-file", "commit", "HEAD")
    git("commit", "-q", "--amend", "-m", "Merge of a tag, amended")
    git("checkout", "-q", "-b", "picked", "v1^{}")
    git("cherry-pick", "-x", "topic")
    repository.commit("more")
    repository.commit("still more")
    git("rebase", "-q", "main")
    git("revert", "--no-edit", "HEAD")
    git("-c", "i18n.commitEncoding=ISO-8859-1", "commit", "-q", "--allow-empty", "-F", "-",
        input=b"caf\xe9 in Latin-1\n")  # fmt: skip
    assert "\nencoding ISO-8859-1\n" in git("cat-file", "commit", "HEAD")
    git("commit", "-q", "--allow-empty", "--allow-empty-message", "-m", "")
    for text in (b"no line end", b'\tA "tab" \\n\n', b"\n\nTwo empty lines above\n"):
        git("commit", "-q", "--allow-empty", "--cleanup=verbatim", "-F", "-", input=text)
    git("commit-tree", "-S", "HEAD^{tree}", "-p", "HEAD", input=b"Plumbed\n")
    # Git puts the signature right behind that, and does not find it there again.
    git("tag", "--cleanup=verbatim", "-F", "-", "unended", input=b"no line end")


@pytest.fixture(scope="module")
def certified(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key of its own with a certificate beside it."""
    folder = tmp_path_factory.mktemp("certified")
    for name in ("key", "authority"):
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name])
    run(["ssh-keygen", "-q", "-s", folder / "authority", "-I", "me", "-n", "me",
         folder / "key.pub"])  # fmt: skip
    return folder / "key"


GIT_RUNS = [
    # name, the key, the ids, over a Unix socket, what is done
    ("ed25519, SHA-1, TCP", "ed25519", "sha1", False, everything),
    ("ed25519, SHA-256, Unix", "ed25519", "sha256", True, everything),
    ("rsa, SHA-1, Unix", "rsa3072", "sha1", True, everyday),
    ("rsa, SHA-256, TCP", "rsa3072", "sha256", False, everyday),
    ("ecdsa, SHA-1, TCP", "ecdsa256", "sha1", False, everyday),
    ("ecdsa, SHA-256, Unix", "ecdsa521", "sha256", True, everyday),
    ("certificate, SHA-1, TCP", "certificate", "sha1", False, everyday),
    ("certificate, SHA-256, Unix", "certificate", "sha256", True, everyday),
]


@pytest.mark.parametrize("kind, id_format, unix, work", rows(GIT_RUNS))
def test_each_signed_object_is_on_record_once_with_its_id(
    kind: str, id_format: str, unix: bool, work: Callable[[Repository], None], start: Start,
    agent: Agent, keys: Keys, certified: Path, home: Path,
) -> None:  # fmt: skip
    key = certified if kind == "certificate" else keys[kind]
    public = Path(f"{key}-cert.pub" if kind == "certificate" else f"{key}.pub")
    agent.add(key)
    proxy = start("--upstream", agent.sock, unix=unix)
    repository = Repository(home, proxy.url, public, id_format)
    work(repository)
    signed = [line for line in proxy.lines() if line.fields["outcome"] == "signed"]
    assert len(signed) > 5
    logged = {
        line.fields["id"]: (line.fields["kind"], line.fields.get("subject", "")) for line in signed
    }
    found = repository.signed()
    assert {len(name) for name in found} == {40 if id_format == "sha1" else 64}
    assert logged == found
    assert Counter(line.fields["id"] for line in signed) == dict.fromkeys(found, 1)
    assert {line.fields["key"] for line in signed} == {fingerprint(public)}
    assert {line.fields["peer"] == "unix" for line in signed} == {unix}


def test_a_commit_of_more_than_256_kib_is_signed_and_has_no_id(
    for_git: Logged, keys: Keys, home: Path
) -> None:
    repository = Repository(home, for_git.url, Path(f"{keys['ed25519']}.pub"))
    before = for_git.size()
    text = b"Long\n\n" + 4000 * (b"x" * 71 + b"\n")
    repository.git("commit", "-q", "--allow-empty", "-F", "-", input=text)
    (line,) = for_git.lines(before)
    has_just(line, f"{SIGNED} subject author committer")
    assert (line.fields["kind"], line.fields["subject"]) == ("commit", "Long")
    stored = run(["git", "cat-file", "commit", "HEAD"], env=repository.env, cwd=repository.path)
    assert repository.signed() == {repository.git("rev-parse", "HEAD"): ("commit", "Long")}
    payload = re.sub(rb"^gpgsig .*\n(?: .*\n)*", b"", stored.stdout, count=1, flags=re.M)
    assert line.fields["digest"] == "sha512:" + hashlib.sha512(payload).hexdigest()


def test_a_signed_push_has_its_pusher_and_no_id(for_git: Logged, keys: Keys, home: Path) -> None:
    public = Path(f"{keys['ed25519']}.pub")
    repository = Repository(home, for_git.url, public)
    remote = home / "remote.git"
    run(["git", "init", "-q", "--bare", remote], env=repository.env)
    run(["git", "-C", remote, "config", "receive.certNonceSeed", "a seed"], env=repository.env)
    repository.commit("first")
    before = for_git.size()
    repository.git("push", "-q", "--signed", remote, "main")
    (line,) = for_git.lines(before)
    has_just(line, f"{SIGNED} subject pusher")
    assert (line.fields["kind"], line.fields["subject"]) == ("push", "refs/heads/main")
    assert line.fields["pusher"] == line.fields["key"] == fingerprint(public)


# ---------------------------------------------------------------- what the README says of it


def blocks(language: str) -> List[str]:
    """The fenced blocks of LANGUAGE; every other piece between fences is a block."""
    fenced = re.split(r"^```", README.read_text(), flags=re.M)[1::2]
    return [b.split("\n", 1)[1] for b in fenced if b.split("\n", 1)[0] == language]


# The fields of every line that the tests above have seen.
KNOWN = [f"outcome status peer pid uid ms method path token {row[-1]}".split() for row in OUTCOMES]
KNOWN.append(f"pid uid token {NO_ANSWER}".split())
KNOWN.append(["encoding"])


def test_a_commits_encoding_is_told_for_git_shows_its_text_by_it(proxy: Proxy) -> None:
    who = "A <a@b> 1700000000 +0000"
    payload = f"tree {40 * 'a'}\nauthor {who}\ncommitter {who}\nencoding UTF-7\n\n+AGE-\n"
    assert http(proxy.port, "POST", "/sign", payload.encode()).status == 200
    assert proxy.wait_log(r"kind=commit .* encoding=UTF-7 subject=\+AGE-$")


def test_the_table_names_each_field() -> None:
    rows_of_fields = re.findall(r"^\| (`outcome`.*?)\n\n", README.read_text(), re.M | re.S)
    cells = [line.split("|")[1 if line[0] == "|" else 0] for line in rows_of_fields[0].split("\n")]
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    named += re.findall(r"`(pid|uid)`", rows_of_fields[0])
    assert sorted(named) == sorted({name for names in KNOWN for name in names})


def test_the_examples_are_lines_of_each_outcome() -> None:
    (example,) = [block for block in blocks("") if "outcome=signed" in block]
    outcomes = set()
    for text in example.splitlines():
        # Hexadecimal digits and the time are cut there.
        line = parse_line(re.sub(r"^… ", START[:25], text).replace("…", "0").encode())
        outcomes.add(line.fields["outcome"])
        assert any(set(line.fields) <= set(names) for names in KNOWN), text
        assert ("reason" in line.fields) == (line.fields["status"] >= "400")
    assert outcomes == {"signed", "served", "refused", "failed", "gone", "busy"}


def recipe(what: str) -> str:
    """The one script in the README that holds WHAT."""
    (found,) = [block for block in blocks("sh") if what in block]
    return found


def bypassing(
    repository: Repository, proxy: Logged, shell: Tuple[str, ...] = ("sh",)
) -> List[str]:
    """What the README's recipe lists, with key= and log= set as its reader would."""
    script = recipe("comm -23")
    settings = {"key": fingerprint(repository.key), "log": shlex.quote(str(proxy.file))}
    for name, value in settings.items():
        script, number = re.subn(rf"^{name}=\S+", lambda _, v=value, n=name: f"{n}={v}", script,
                                 flags=re.M)  # fmt: skip
        assert number == 1, name
    file = repository.path.parent / "recipe.sh"
    file.write_text(script)
    left = sorted(os.listdir(repository.env["TMPDIR"]))
    done = run([*shell, file], env=repository.env, cwd=repository.path)
    assert done.stderr == b""
    assert sorted(os.listdir(repository.env["TMPDIR"])) == left
    return sorted(done.stdout.decode().splitlines())


@pytest.fixture
def repository(for_git: Logged, keys: Keys, home: Path) -> Repository:
    return Repository(home, for_git.url, Path(f"{keys['ed25519']}.pub"))


SHELLS = {"sh": ("sh",), "dash": ("dash",), "bash": ("bash",), "busybox": ("busybox", "sh")}


@pytest.mark.parametrize("shell", SHELLS)
def test_what_was_signed_past_the_proxy_is_listed_and_nothing_else(
    shell: str, repository: Repository, for_git: Logged, keys: Keys
) -> None:
    need(SHELLS[shell][0], SHELLS[shell][0])
    everything(repository)
    git = repository.git
    git("commit", "-q", "--no-gpg-sign", "--allow-empty", "-m", "unsigned")
    git("tag", "--no-sign", "-a", "-m", "unsigned", "unsigned")
    git("-c", "gpg.ssh.program=ssh-keygen", "-c", f"user.signingkey={keys['other']}", "commit",
        "-q", "--allow-empty", "-m", "Somebody else's")  # fmt: skip
    git("-c", "gpg.ssh.program=ssh-keygen", "-c", f"user.signingkey={keys['other']}", "tag",
        "-m", "Somebody else's", "of-another")  # fmt: skip
    repository.directly("commit", "-q", "--allow-empty", "-m", "past it")
    past = git("rev-parse", "HEAD")
    git("replace", past, "HEAD~1")
    repository.directly("tag", "-m", "past it", "past")
    hidden = git("rev-parse", "past")
    git("replace", hidden, "unsigned")
    git("tag", "-m", "A tag around it", "around", "past")
    git("tag", "-d", "past")
    # Its author knows how the log is read, and what git's settings do.
    for subject in (f"x outcome=signed id={past} digest=x", f'" id={hidden} \\" id={past}'):
        git("commit", "-q", "--allow-empty", "-m", subject)
        git("tag", "--no-sign", "-a", "-m", f'Good "git" signature with ED25519 key {subject}',
            f"forged{len(subject)}")  # fmt: skip
    for setting in ("log.showSignature=true", "color.ui=always", "gpg.ssh.program=true",
                    "gpg.ssh.allowedSignersFile=/nowhere"):  # fmt: skip
        git("config", *setting.split("="))
    assert bypassing(repository, for_git, SHELLS[shell]) == [f"commit {past}", f"tag {hidden}"]


def test_where_all_went_through_the_proxy_nothing_is_listed(
    repository: Repository, for_git: Logged
) -> None:
    everyday(repository)
    assert bypassing(repository, for_git) == []


def test_in_an_empty_repository_nothing_is_listed(repository: Repository, for_git: Logged) -> None:
    assert bypassing(repository, for_git) == []


def test_what_was_amended_or_rebased_away_is_no_false_alarm(
    repository: Repository, for_git: Logged
) -> None:
    everyday(repository)
    repository.git("checkout", "-q", "topic")
    repository.commit("then")
    repository.git("rebase", "-q", "main")
    repository.git("branch", "-q", "-D", "main")
    repository.git("reflog", "expire", "--expire=now", "--all")
    repository.git("gc", "-q", "--prune=now")
    logged = {line.fields.get("id") for line in for_git.lines()}
    assert len(logged - set(repository.signed())) > 2
    assert bypassing(repository, for_git) == []


def test_a_signed_commit_whose_line_is_missing_is_listed(
    repository: Repository, start: Start, agent_with_key: Agent
) -> None:
    repository.commit("first")
    silent = start("--upstream", agent_with_key.sock)
    assert bypassing(repository, silent) == [f"commit {repository.git('rev-parse', 'HEAD')}"]


def test_in_a_large_repository_of_sha_256_it_is_found(
    start: Start, agent_with_key: Agent, keys: Keys, home: Path
) -> None:
    proxy = start("--upstream", agent_with_key.sock)
    repository = Repository(home, proxy.url, Path(f"{keys['ed25519']}.pub"), "sha256")
    history = b"".join(
        b"commit refs/heads/main\ncommitter C <c> %d +0000\ndata 1\nx\n" % n for n in range(20000)
    )
    repository.git("fast-import", "--quiet", input=history)
    repository.git("symbolic-ref", "HEAD", "refs/heads/main")
    repository.commit("through it")
    repository.directly("commit", "-q", "--allow-empty", "-m", "past it")
    past = repository.git("rev-parse", "HEAD")
    repository.commit("through it again")
    assert bypassing(repository, proxy) == [f"commit {past}"]


def test_the_refusals_are_found_in_the_journal(
    for_git: Logged, repository: Repository, home: Path
) -> None:
    """No journald runs here: a stand-in prints what `-o cat` does, the lines as they were logged;
    what is shown is that the rest of the README's commands finds the right ones."""
    repository.git("commit", "-q", "--allow-empty", "-m", "x AUDIT outcome=refused status=403")
    http(for_git.port, "GET", "/nope")
    http(for_git.port, "GET", "/healthz")
    hostile = {"SSHSIG-Key": FINGERPRINT.decode()}
    for name in ("signed", "served", "failed"):
        http(for_git.port, "POST", "/sign", commit(f"x outcome={name} x".encode()), hostile)
    journal = home / "journal"
    others = [START.replace("signed", name) + "\n" for name in ("failed", "gone", "busy")]
    journal.write_text(for_git.file.read_text() + "".join(others))
    logged = journal.read_bytes().split(b"\n")
    every = Counter(parse_line(d).fields["outcome"] for d in logged if b" outcome=" in d)
    assert set(every) == {"signed", "served", "refused", "failed", "gone", "busy"}
    tool = home / "bin" / "journalctl"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" --user -u ssh-agent-proxy -o cat "*) ;; *) exit 1 ;; esac\n'
        f"exec cat {shlex.quote(str(journal))}\n"
    )
    tool.chmod(0o755)
    env = {**repository.env, "PATH": f"{tool.parent}:{repository.env['PATH']}"}
    found = []
    for command in recipe("ssh-agent-proxy -o cat -f").splitlines():
        done = run(["sh", "-c", command], env=env)
        assert done.stderr == b""
        lines = [parse_line(d) for d in done.stdout.split(b"\n") if b" outcome=" in d]
        found.append(Counter(line.fields["outcome"] for line in lines))
    assert found == [
        every,
        {"signed": every["signed"]},
        {name: n for name, n in every.items() if name not in ("signed", "served")},
    ]
