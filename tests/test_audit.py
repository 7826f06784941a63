"""The log's line for each request: it can be undone exactly, it is there before the answer is, and
it names what real git makes of a signature."""

import contextlib
import hashlib
import os
import re
import shlex
import socket
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import pytest
from conftest import (
    FINGERPRINT, TEXTS, Agent, Answer, FileLogged, Keys, Repository, can_be_seen, commit,
    connect, fingerprint, get, message, need, parse_answer, post, private_file, push, read_message,
    rows, run, short_folder, tag,
)  # fmt: skip
from test_make import stand_in
from test_readme import ALL, blocks

MAX_LINE = 4096  # bytes, its end included: what a pipe takes whole

# ---------------------------------------------------------------- a line, undone

_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}) ([A-Z]+) (.*)")
_ESCAPE = r'\\(?:[\\"nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})'
_FIELD = re.compile(r'([a-z]+)=(?:([!#-<>-\[\]-~]+)|"((?:[^"\\]|' + _ESCAPE + r')*)")(?: (?=.)|\Z)')
LETTERS = {"n": "\n", "r": "\r", "t": "\t"}

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

    def has_just(self, names: str) -> None:
        assert sorted(self.fields) == sorted(names.split())


def parse_line(data: bytes) -> Line:
    """A line without its end; an AssertionError where it is not exactly of the form promised."""
    text = data.decode()
    assert len(data) + 1 < MAX_LINE, f"cut, or nearly: {text}"
    assert all(map(can_be_seen, text)), ascii(text)
    match = _LINE.fullmatch(text)
    assert match, text
    line = Line(match[2], {}, {})
    rest = match[3]
    while rest:
        field = _FIELD.match(rest)
        assert field, f"no field: {rest}"
        name, bare, inside = field.groups()
        assert name not in line.fields, f"{name} stands twice: {text}"
        line.fields[name] = undo(inside) if bare is None else bare
        line.raw[name] = inside if bare is None else bare
        rest = rest[field.end() :]
    peer = ["peer", "pid", "uid"] if line.fields.get("peer") == "unix" else ["peer"]
    expected = ["outcome", "status", *peer, "ms"]
    assert list(line.fields)[: len(expected)] == expected, text
    assert line.fields["ms"].isdigit() and line.fields["status"].isdigit(), text
    assert line.level == ("INFO" if line.fields["outcome"] == "served" else "AUDIT"), text
    return line


START = "2026-01-31T23:59:59+0100 AUDIT outcome=signed status=200 peer=127.0.0.1:4711 ms=7"


# ---------------------------------------------------------------- a proxy whose log is a file


class Logged(FileLogged):
    """What it has logged can be told request by request."""

    def __init__(self, folder: Path, *args: Any) -> None:
        super().__init__(folder, *args)
        self.asked = 0

    def requests(self, start: int = 0) -> List[Line]:
        """Each request's line, from the byte START of the log on."""
        with self.file.open("rb") as f:
            f.seek(start)
            whole = f.read()
        assert not whole or whole.endswith(b"\n"), "half a line"
        return [parse_line(line) for line in whole.split(b"\n") if b" outcome=" in line]

    def ask(self, data: bytes, end: bool = False) -> Tuple[Answer, Line]:
        """The answer to DATA, and the line that the log had when its first byte came."""
        self.asked += 1
        before = self.file.stat().st_size
        with connect(self.port) as s:
            s.sendall(data)
            if end:
                s.shutdown(socket.SHUT_WR)
            received = s.recv(1)
            lines = self.requests(before)
            peer = "{}:{}".format(*s.getsockname())
            while piece := s.recv(65536):
                received += piece
        answer = parse_answer(received)
        (line,) = [line for line in lines if line.fields["peer"] == peer]
        assert line.fields["status"] == str(answer.status)
        return answer, line

    def end(self) -> None:
        assert self.stop() == 0
        assert "Traceback" not in self.log() and "internal error" not in self.log(), self.log()
        # (Where git asks, the tests do not.)
        assert not self.asked or len(self.requests()) == self.asked


Start = Callable[..., Logged]


@contextlib.contextmanager
def starting() -> Iterator[Start]:
    with short_folder() as folder, contextlib.ExitStack() as stack:

        def start(*args: Any) -> Logged:
            proxy = Logged(folder / str(len(os.listdir(folder))), *args)
            stack.callback(proxy.end)
            return proxy

        yield start


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as start:
        yield start


ODD_NAMESPACES = ['a"b', "c\\d", "e=f", "\\n", '"', "=", "outcome=signed", '"' * 255]


@pytest.fixture(scope="module")
def shared(agent_with_key: Agent) -> Iterator[Logged]:
    """In front of a real agent, with odd namespaces allowed."""
    names = ",".join(["git", *ODD_NAMESPACES])
    with starting() as start:
        yield start("--upstream", agent_with_key.sock, "--namespace", names)


@pytest.fixture(scope="module")
def for_git(agent_with_key: Agent) -> Iterator[Logged]:
    with starting() as start:
        yield start("--upstream", agent_with_key.sock)


# ---------------------------------------------------------------- hostile texts

# Where a text stands, what is sent then, and the field that it becomes.
PLACES: List[Tuple[str, Callable[[bytes], bytes], str]] = [
    ("commit", lambda text: commit(subject=text), "subject"),
    ("commit", lambda text: commit(author=text + b" <a@b>"), "author"),
    ("commit", lambda text: commit(committer=text + b" <a@b>"), "committer"),
    ("tag", lambda text: tag(subject=text), "subject"),
    ("tag", lambda text: tag(tagger=text + b" <a@b>"), "tagger"),
    ("push", push, "subject"),
]
PEOPLE = ("author", "committer", "tagger")


def shown(text: bytes) -> str:
    """As text: a byte that is no UTF-8 is told as \\xNN."""
    return text.decode("utf-8", "surrogateescape")


@pytest.mark.parametrize("text", rows(TEXTS))
def test_a_payloads_text_is_undone_to_what_was_sent(text: bytes, shared: Logged) -> None:
    """Else a commit's message reads like another line, or hides what was signed."""
    for kind, made_of, name in PLACES:
        sent = b"refs/heads/" + text if kind == "push" else text
        answer, line = shared.ask(post(made_of(sent)))
        assert answer.status == 200
        if kind == "push":  # as git check-ref-format has it, as far as the texts go
            formed = text and not re.search(rb"[\x00- \x7f~^:?*\[\\]", text)
        else:
            formed = name == "subject" or b"\n" not in text  # a header ends there
        assert line.fields["kind"] == (kind if formed else "other"), made_of(text)[:200]
        if not formed:
            assert not {"subject", "pusher", *PEOPLE} & set(line.fields)
        elif name in PEOPLE:
            assert line.holds(name, shown(text + b" <a@b>"))
        else:
            assert line.holds(name, shown(sent.partition(b"\n")[0]))


@pytest.mark.parametrize("text", rows(TEXTS))
def test_a_path_is_undone_to_what_was_sent(text: bytes, shared: Logged) -> None:
    target = b"/" + text
    answer, line = shared.ask(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert line.fields["outcome"] == "refused"
    assert line.fields["reason"] == answer.text.rstrip("\n")
    if answer.status == 404:
        assert line.holds("path", shown(target), 1000)
    else:
        assert not re.fullmatch(rb"[\w.~!$&'()*+,;=:@%/-]+", target, re.ASCII)  # RFC 3986
        line.has_just("outcome status peer ms reason")


def test_a_namespace_and_a_method_are_undone_to_what_was_sent(shared: Logged) -> None:
    for namespace in ODD_NAMESPACES:
        answer, line = shared.ask(post(b"x", f"SSHSIG-Namespace: {namespace}"))
        assert (answer.status, line.fields["namespace"]) == (200, namespace)
    for method in ("BREW", "!#$%&'*+-.^_`|~", "M" * 10000):
        data = get("/" + "p" * 5000).replace(b"GET", method.encode(), 1)
        answer, line = shared.ask(data)
        assert answer.status == 404
        assert line.holds("method", method, 1000)
        assert line.fields["reason"] == answer.text.rstrip("\n")


# What takes most room: a character of four bytes, an escape of ten characters, one of two.
HEAVY = {"large": "\U0001d4b3".encode(), "escaped": "\U000e0041".encode(), "quotes": b'"'}
NO_AGENT = "exec:/nowhere/" + 1000 * "\U0001d4b3"
SECRET = "s" * 20


@pytest.fixture(scope="module", params=["", NO_AGENT], ids=["signed", "failed"])
def heavy(request: Any, agent_with_key: Agent) -> Iterator[Logged]:
    """A proxy whose own settings are as long as can be."""
    with starting() as start, short_folder() as folder:
        tokens = private_file(folder / "tokens", f"{SECRET} {'t' * 1500}\n")
        yield start(
            "--upstream", request.param or agent_with_key.sock,
            "--namespace", '"' * 255, "--token-file", tokens,
        )  # fmt: skip


@pytest.mark.parametrize("text", HEAVY)
def test_nothing_of_the_longest_line_is_lost(text: str, heavy: Logged, keys: Keys) -> None:
    many = HEAVY[text] * 2000
    payload = commit(many, many + b" <" + many + b">", many + b" <>", b"1" * 64)
    answer, line = heavy.ask(post(payload, f"Authorization: Bearer {SECRET}"))
    for name in ("subject", "author", "committer"):
        assert line.holds(name, shown(many)), name
    assert line.fields["namespace"] == '"' * 255
    assert line.fields["digest"] == "sha512:" + hashlib.sha512(payload).hexdigest()
    if answer.status == 200:
        line.has_just(f"{SIGNED} token id subject author committer")
        assert re.fullmatch("[0-9a-f]{64}", line.fields["id"])
        assert line.fields["key"] == fingerprint(keys["ed25519"])
    else:
        assert (answer.status, line.fields["outcome"]) == (503, "failed")
        assert line.holds("reason", answer.text.rstrip("\n"), 1000)


# ---------------------------------------------------------------- every outcome, before the answer


ASKED = "outcome status peer ms method path"
SIGNED = f"{ASKED} namespace kind digest key"
NO_HEAD = "outcome status peer ms reason"
NOT_SIGNED = f"{ASKED} namespace kind digest subject author committer reason"
NOT_HELD = f"SSHSIG-Key: {FINGERPRINT.decode()}"

# name, what is sent, outcome, status, the line's fields
OUTCOMES: List[Tuple[str, bytes, str, int, str]] = [
    ("a commit", post(commit()), "signed", 200, f"{SIGNED} id subject author committer"),
    ("a long commit", post(commit(b"x\n\n" + b"line\n" * 60_000)), "signed", 200,
     f"{SIGNED} subject author committer"),
    ("a commit in UTF-7", post(commit(b"+AGE-").replace(b"\n\n", b"\nencoding UTF-7\n\n")),
     "signed", 200, f"{SIGNED} id subject author committer encoding"),
    ("a tag", post(tag()), "signed", 200, f"{SIGNED} id subject tagger"),
    ("a push", post(push()), "signed", 200, f"{SIGNED} subject pusher"),
    ("something else", post(b"x"), "signed", 200, SIGNED),
    ("with SHA-256", post(b"x", "SSHSIG-Hash: sha256"), "signed", 200, SIGNED),
    ("/publickey", get("/publickey"), "served", 200, f"{ASKED} namespace key"),
    ("/healthz", get("/healthz"), "served", 200, ASKED),
    ("/shim", get("/shim"), "served", 200, ASKED),
    ("TLS", b"\x16\x03\x01\x02\x00\x01", "refused", 400, NO_HEAD),
    ("an empty body", post(b""), "refused", 400, f"{ASKED} namespace reason"),
    ("a page", post(b"x", "Origin: http://evil"), "refused", 403, f"{ASKED} reason"),
    ("a key not held", post(commit(), NOT_HELD), "refused", 404, NOT_SIGNED),
]  # fmt: skip


def is_right(answer: Answer, line: Line, outcome: str, status: int, names: str) -> None:
    assert answer.status == status
    assert (line.fields["outcome"], line.fields["status"]) == (outcome, str(status))
    line.has_just(names)
    if "reason" in line.fields:
        assert line.holds("reason", answer.text.rstrip("\n"), 1000)
    assert int(line.fields["ms"]) < 60000


@pytest.mark.parametrize("sent, outcome, status, names", rows(OUTCOMES))
def test_the_line_is_there_when_the_answer_begins(
    sent: bytes, outcome: str, status: int, names: str, shared: Logged, keys: Keys
) -> None:
    """Else something was signed that is not on record."""
    answer, line = shared.ask(sent, end=status == 400)
    is_right(answer, line, outcome, status, names)
    if "method" in line.fields:
        method, path = sent.decode().split(" ")[:2]
        assert (line.fields["method"], line.fields["path"]) == (method, path)
    if "key" in line.fields:
        assert line.fields["key"] == fingerprint(keys["ed25519"])
    if "digest" in line.fields:
        body = sent.partition(b"\r\n\r\n")[2]
        name = "sha256" if b"SSHSIG-Hash: sha256" in sent else "sha512"
        assert line.fields["digest"] == f"{name}:{hashlib.new(name, body).hexdigest()}"


# ---- where the person says no, the agent is at fault, or the client


def test_a_no_of_the_person_is_a_refusal(start: Start, agent_with_key: Agent) -> None:
    proxy = start("--upstream", agent_with_key.sock, "--confirm", need("false", "coreutils"))
    answer, line = proxy.ask(post(commit()))
    is_right(answer, line, "refused", 403, NOT_SIGNED)
    assert line.fields["reason"].startswith("not confirmed: ")


@pytest.mark.parametrize("reply, status, why", rows([
    ("lies", message(b"\x63lie"), 502, "message type 99"),
    ("stalls", b"", 504, "did not answer"),
]))  # fmt: skip
def test_an_agent_at_fault_is_a_failure(
    reply: bytes, status: int, why: str, start: Start, scripted_agent: Any, keys: Keys
) -> None:
    def does(connection: socket.socket) -> None:
        while read_message(connection):
            connection.sendall(reply)

    proxy = start("--upstream", scripted_agent(does), "--timeout", "0.3")
    for sent, names in [(post(commit(), f"SSHSIG-Key: {keys.line('ed25519')}"), NOT_SIGNED),
                        (get("/publickey"), f"{ASKED} namespace reason")]:  # fmt: skip
        answer, line = proxy.ask(sent)
        is_right(answer, line, "failed", status, names)
        assert re.search(why, answer.text)


# ---------------------------------------------------------------- what real git makes of it

BEGIN = b"-----BEGIN SSH SIGNATURE-----\n"


def signed_in(repository: Repository) -> Dict[str, Tuple[str, str]]:
    """Kind and subject of each signed commit and tag there is, reachable or not, by its id."""
    found = {}
    for line in repository.git("cat-file", "--batch-all-objects", "--batch-check").splitlines():
        name, kind, _ = line.split()
        if kind in ("commit", "tag"):
            head, _, text = repository.run("cat-file", kind, name).stdout.partition(b"\n\n")
            own = text.partition(BEGIN)[0] if kind == "tag" else text
            if own != text or re.search(rb"^gpgsig(-sha256)? ", head, re.M):
                found[name] = kind, shown(own.lstrip(b"\n").partition(b"\n")[0])
    return found


def work(repository: Repository) -> None:
    """What people do every day, and what few ever do."""
    git = repository.git
    repository.commit("first")
    repository.commit("second")
    git("commit", "-q", "--amend", "-m", "second, amended")
    git("tag", "-m", "The first release", "v1", "HEAD~1")
    git("tag", "-m", "A tag of it", "nested", "v1")
    git("checkout", "-q", "-b", "topic", "HEAD~1")
    repository.commit("topic")
    git("tag", "-m", "The topic's release", "topic-1")
    git("checkout", "-q", "main")
    # A signed tag of another line becomes the merge's mergetag.
    git("merge", "-q", "--no-ff", "--no-edit", "topic-1")
    assert "\nmergetag object " in git("cat-file", "commit", "HEAD")
    git("revert", "--no-edit", "HEAD~1")
    latin = ["-c", "i18n.commitEncoding=ISO-8859-1"]
    git(*latin, "commit", "-q", "--allow-empty", "-F", "-", input=b"caf\xe9 in Latin-1\n")
    for text in (b"", b"no line end", b'\tA "tab" \\n\n', b"\n\nTwo empty lines above\n"):
        git("commit", "-q", "--allow-empty", "--allow-empty-message", "--cleanup=verbatim",
            "-F", "-", input=text)  # fmt: skip
    git("commit-tree", "-S", "HEAD^{tree}", "-p", "HEAD", input=b"Plumbed\n")
    # Git puts the signature right behind that, and does not find it there again.
    git("tag", "--cleanup=verbatim", "-F", "-", "unended", input=b"no line end")


@pytest.mark.parametrize("kind, id_format", [("ed25519", "sha1"), ("ecdsa521", "sha256")])
def test_each_signed_object_is_on_record_once_with_its_id(
    kind: str, id_format: str, start: Start, agent: Agent, keys: Keys, home: Path
) -> None:
    agent.add(keys[kind])
    proxy = start("--upstream", agent.sock)
    repository = Repository(home, f"{proxy.url}/sign", keys[kind].with_suffix(".pub"), id_format)
    work(repository)
    names = ("id", "kind", "subject")
    signed = [line for line in proxy.requests() if line.fields["outcome"] == "signed"]
    logged = [tuple(line.fields.get(name, "") for name in names) for line in signed]
    found = signed_in(repository)
    assert len(found) > 5
    assert {len(name) for name in found} == {40 if id_format == "sha1" else 64}
    assert sorted(logged) == sorted((name, *what) for name, what in found.items())
    assert {line.fields["key"] for line in signed} == {fingerprint(keys[kind])}
    assert bypassing(repository, proxy) == []


@pytest.fixture
def repository(for_git: Logged, keys: Keys, home: Path) -> Repository:
    return Repository(home, f"{for_git.url}/sign", Path(f"{keys['ed25519']}.pub"))


# ---------------------------------------------------------------- what the pages say of it

# The fields of every line that the tests above have seen.
KNOWN = [f"outcome status peer pid uid ms method path token {row[-1]}".split() for row in OUTCOMES]
KNOWN.append(f"pid uid token encoding {NOT_SIGNED}".split())


def test_the_table_names_each_field() -> None:
    (table,) = re.findall(r"^\| (`outcome`.*?)\n\n", ALL, re.M | re.S)
    cells = [line.split("|")[1 if line[0] == "|" else 0] for line in table.split("\n")]
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    named += re.findall(r"`(pid|uid)`", table)
    assert sorted(named) == sorted({name for names in KNOWN for name in names})


def test_the_examples_are_lines_of_each_outcome() -> None:
    (example,) = [block for block in blocks(ALL, "") if "outcome=signed" in block]
    outcomes = set()
    for text in example.splitlines():
        # Hexadecimal digits and the time are cut there.
        line = parse_line(re.sub(r"^… ", START[:25], text).replace("…", "0").encode())
        outcomes.add(line.fields["outcome"])
        assert any(set(line.fields) <= set(names) for names in KNOWN), text
        assert ("reason" in line.fields) == (line.fields["status"] >= "400")
    assert outcomes == {"signed", "served", "refused", "failed", "gone", "busy"}


def recipe(what: str) -> str:
    """The one script in the pages that holds WHAT."""
    (found,) = [block for block in blocks(ALL, "sh") if what in block]
    return found


def bypassing(repository: Repository, proxy: Logged, *shell: str) -> List[str]:
    """What the recipe lists, with key= and log= set as its reader would."""
    script = recipe("comm -23")
    settings = {"key": fingerprint(repository.public), "log": shlex.quote(str(proxy.file))}
    for name, value in settings.items():
        assert len(re.findall(rf"^{name}=\S+", script, re.M)) == 1
        script = re.sub(rf"^{name}=\S+", f"{name}={value}", script, flags=re.M)
    file = repository.path.parent / "recipe.sh"
    file.write_text(script)
    left = sorted(os.listdir(repository.env["TMPDIR"]))
    done = run([*(shell or ["sh"]), file], env=repository.env, cwd=repository.path)
    assert done.stderr == b""
    assert sorted(os.listdir(repository.env["TMPDIR"])) == left
    return sorted(done.stdout.decode().splitlines())


def directly(repository: Repository, key: Path, *args: str) -> None:
    """Signed with the private key, the proxy not being asked."""
    repository.git("-c", "gpg.ssh.program=ssh-keygen", "-c", f"user.signingkey={key}", *args)


def test_what_was_signed_past_the_proxy_is_listed_and_nothing_else(
        repository: Repository, for_git: Logged, keys: Keys) -> None:  # fmt: skip
    work(repository)
    git = repository.git
    git("commit", "-q", "--no-gpg-sign", "--allow-empty", "-m", "unsigned")
    git("tag", "--no-sign", "-a", "-m", "unsigned", "unsigned")
    directly(repository, keys["other"], "commit", "-q", "--allow-empty", "-m", "Somebody else's")
    directly(repository, keys["other"], "tag", "-m", "Somebody else's", "of-another")
    directly(repository, keys["ed25519"], "commit", "-q", "--allow-empty", "-m", "past it")
    past = git("rev-parse", "HEAD")
    git("replace", past, "HEAD~1")
    directly(repository, keys["ed25519"], "tag", "-m", "past it", "past")
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
    for shell in (["sh"], ["bash"], ["busybox", "sh"]):
        need(shell[0], shell[0])
        listed = bypassing(repository, for_git, *shell)
        assert listed == [f"commit {past}", f"tag {hidden}"], shell


def test_what_was_amended_or_rebased_away_is_no_false_alarm(
        repository: Repository, for_git: Logged) -> None:  # fmt: skip
    assert bypassing(repository, for_git) == []
    work(repository)
    repository.git("checkout", "-q", "topic")
    repository.commit("then")
    repository.git("rebase", "-q", "main")
    repository.git("branch", "-q", "-D", "main")
    repository.git("reflog", "expire", "--expire=now", "--all")
    repository.git("gc", "-q", "--prune=now")
    logged = {line.fields.get("id") for line in for_git.requests()}
    assert len(logged - set(signed_in(repository))) > 2
    assert bypassing(repository, for_git) == []


def test_the_refusals_are_found_in_the_journal(short: Path) -> None:
    """No journald runs here: a stand-in prints what `-o cat` does, the lines as they are logged;
    what is shown is that the rest of the commands finds the right ones."""
    names = ("signed", "served", "refused", "failed", "gone", "busy")
    lines = [START.replace("signed", name) for name in names]
    lines += [f'{START} subject="x outcome={name} AUDIT x"' for name in names]
    lines[1] = lines[1].replace("AUDIT", "INFO")
    (short / "journal").write_text("\n".join(lines) + "\n")
    options = '" --user-unit ssh-agent-proxy -o cat "'
    script = f'case " $* " in *{options}*) exec cat {short}/journal ;; esac; exit 1'
    env = {"PATH": stand_in(short / "bin", "journalctl", script)}
    found = []
    for command in recipe("ssh-agent-proxy -o cat -f").splitlines():
        done = run(["sh", "-c", command], env=env)
        assert done.stderr == b""
        logged = [parse_line(line) for line in done.stdout.splitlines()]
        found.append(Counter(line.fields["outcome"] for line in logged))
    refused = {"refused": 1, "failed": 1, "gone": 1, "busy": 1}
    assert found == [{**refused, "signed": 7, "served": 1}, {"signed": 7}, refused]
