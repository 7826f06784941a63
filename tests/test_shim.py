"""The shim: beside the real ssh-keygen, under many shells, and before servers that lie."""

import base64
import contextlib
import os
import pty
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import pytest
from conftest import (
    PROXY, SHIM, Agent, Keys, Proxy, bound_by_modes, clean_env, fingerprint, message, need,
    private_file, rows, run, short_folder, wait_for,
)  # fmt: skip

Done = subprocess.CompletedProcess  # of bytes

BEGIN = b"-----BEGIN SSH SIGNATURE-----\n"
END = b"-----END SSH SIGNATURE-----\n"
ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI"
NOBODY = f"{ED25519}AIA{'A' * 40}"
ANYBODY = f"{ED25519}{'A' * 43}"
LINE = f"{ED25519}G+AP/nFcsfyv59CnvXHrJIzz616r+Cxm5ewm+0N3Qhw"
OTHER = f"{ED25519}H{'B' * 42}"
FETCHED = "# fetched from ssh-agent-proxy, replaced when the key there changes"
COMMIT = b"tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\nauthor A <a@b> 0 +0000\n\nmessage\n"
TAG = b"object 4b825dc642cb6eb9a060e54bf8d69288fbee4904\ntype tree\ntag v1\n\nmessage\n"
CERTIFICATE = b"certificate version 0.1\npusher SHA256:x 0 +0000\n"
OURS = "ssh-agent-proxy-sign"
URL = "SSH_AGENT_PROXY_URL"
NOWHERE = {URL: "http://127.0.0.1:1/sign"}

HOSTILE_NAMES = ["-x", "-", "a [1]{x,y}", "a;type=x,b", "a\nb\\", "\"a'$(id)`id`", "*", "~",
                 "\u00e4\u202e\x1b[2J", "x" * 240]  # fmt: skip

SHELLS = ["dash", "bash", "busybox", "zsh", "ksh", "mksh", "yash", "posh"]
# How those are called that are not sh by their name.
CALLED = {"busybox": ["busybox", "sh"], "zsh": ["zsh", "--emulate", "sh"]}

# What ends it, and with which status.
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="looks at /proc, /dev/full or a namespace of Linux"
)


class Shim:
    """The shim under one shell, in a folder and a home that it must leave as they were."""

    def __init__(self, shell: str, folder: Path, home: Path) -> None:
        need(shell, shell)
        self.argv = [*CALLED.get(shell, [shell]), str(SHIM)]
        self.folder = folder
        self.env = clean_env(home)
        self.file()

    def __call__(
        self, *args: Union[str, Path], input: Optional[bytes] = None,
        env: Optional[Dict[str, str]] = None, before: Sequence[str] = (),
    ) -> Done[bytes]:  # fmt: skip
        argv, env = [*before, *self.argv, *args], {**self.env, **(env or {})}
        return run(argv, env=env, cwd=self.folder, input=input, check=False)

    def sign(self, *args: Union[str, Path], **more: Any) -> Done[bytes]:
        return self("-Y", "sign", "-n", "git", *args, **more)

    def start(
            self, *args: str, env: Dict[str, str], stdin: int = subprocess.DEVNULL,
            stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:  # fmt: skip
        return subprocess.Popen(
            [*self.argv, *args], env={**self.env, **env}, cwd=self.folder,
            stdin=stdin, stdout=stdout, stderr=subprocess.PIPE,
            # Where the tests run in the background these are ignored.
            preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in SIGNALS],
        )  # fmt: skip

    def file(self, name: str = "m", content: bytes = COMMIT) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def program(self, name: str, script: str) -> Path:
        path = self.file(name, f"#!/bin/sh\n{script}\n".encode())
        path.chmod(0o755)
        return path

    def key(self, name: str, *lines: str) -> Path:
        return self.file(name, "".join(f"{line}\n" for line in lines).encode())

    def signature(self, name: str = "m") -> bytes:
        return (self.folder / f"{name}.sig").read_bytes()

    def files(self) -> List[str]:
        return sorted(tree(self.folder))

    def temporary(self) -> List[str]:
        """What is left of the shim's own files."""
        folders = [self.folder, Path(self.env["TMPDIR"])]
        return [str(path) for f in folders for path in f.rglob(f"*{OURS}*")]


def tree(folder: Path) -> Dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def on(shell: str, *values: Any, name: str = "") -> Any:
    """A row of a table for that shell; those but dash are for whoever runs all tests."""
    marks = () if shell == "dash" else pytest.mark.long
    return pytest.param(shell, *values, id=f"{shell}-{name}" if name else shell, marks=marks)


def under(names: str, lines: Sequence[Any], *everywhere: str) -> Any:
    """Each row under dash; those called EVERYWHERE, where shells may differ, under all."""
    assert set(everywhere) <= {line[0] for line in lines}
    cases = [
        on(shell, *line[1:], name=line[0])
        for shell in SHELLS
        for line in lines
        if shell == "dash" or line[0] in everywhere
    ]
    return pytest.mark.parametrize(f"shim, {names}", cases, indirect=["shim"])


def each(values: Iterable[str]) -> List[Tuple[str, str]]:
    """A table of those values, called by themselves."""
    return [(ascii(value)[1:-1], value) for value in values]


def made(request: Any, tmp_path: Path, home: Path) -> Iterator[Shim]:
    yield (made := Shim(getattr(request, "param", "dash"), tmp_path, home))
    assert made.temporary() == []


# Under every shell, for whatever they may not agree on; the same, for what must be seen whenever
# anything was changed; and under one, for what does not depend on the shell.
shim = pytest.fixture(params=[on(shell) for shell in SHELLS], name="shim")(made)
each_shim = pytest.fixture(params=SHELLS, name="each_shim")(made)
one_shim = pytest.fixture(name="one_shim")(made)


class Served(Dict[str, str]):
    """The environment of a shim for which the real proxy signs, and what stands behind it."""

    agent: Agent
    proxy: Proxy
    socket: Path  # where it listens, too


@contextlib.contextmanager
def serve(agent: Agent, *options: str, tokens: str = "") -> Iterator[Served]:
    with short_folder() as home:
        argv = [sys.executable, str(PROXY), *options,
                "--addr", f"127.0.0.1:0,unix:{home}/socket",
                "--upstream", str(agent.sock)]  # fmt: skip
        if tokens:
            argv += ["--token-file", str(private_file(home / "tokens", tokens))]
        proxy = Proxy(argv, clean_env(home))
        env = Served({URL: f"{proxy.url}/sign"})
        env.agent, env.proxy, env.socket = agent, proxy, home / "socket"
        try:
            yield env
        finally:
            proxy.stop()


@pytest.fixture(scope="module")
def served(agent_with_key: Agent) -> Iterator[Served]:
    """One real proxy for all the tests that change nothing about it."""
    with serve(agent_with_key, "--namespace", "git,file,patatt") as env:
        yield env


# Each is known to the proxy by a name of its own, which the log tells.
TOKENS = {name: f"s3cr3t-{name}.~_+/-Z==" for name in ("variable", "file", "home")}


@pytest.fixture(scope="module")
def guarded(agent_with_key: Agent) -> Iterator[Served]:
    """The same with a token file."""
    tokens = "".join(f"{TOKENS[name]} {name}\n" for name in TOKENS)
    with serve(agent_with_key, tokens=tokens) as env:
        yield env


class Liar:
    """A server that sends what it is told to, once for each connection, the last one for ever."""

    def __init__(self, *answers: Any, sock: Optional[socket.socket] = None) -> None:
        """Each is bytes, or makes them of the connection; SOCK may listen elsewhere."""
        self.answers = list(answers)
        self.requests: List[bytes] = []
        self.left: List[socket.socket] = []
        self.sock = sock or socket.create_server(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/sign"
        self.env = {URL: self.url}
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.sock.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.requests.append(read_request(connection))
            what = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            connection.sendall((what(connection) or b"") if callable(what) else what)

    def hold(self, connection: socket.socket) -> None:
        """An agent that waits for a person: no answer until the client has left."""
        connection.recv(1)
        self.left.append(connection)

    def methods(self) -> List[bytes]:
        return [request.split()[0] for request in self.requests]

    def close(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self.thread.join(5)


def read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\ncontent-length: (\d+)", head)
    while length and len(body) < int(length.group(1)):
        body += connection.recv(65536)
    while b"chunked" in head and not body.endswith(b"0\r\n\r\n"):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def sent(request: bytes, name: str) -> Optional[str]:
    """The value of that field, which stands there once at most."""
    found = re.findall(rb"(?i)\r\n%s: ?([^\r\n]*)(?=\r\n)" % name.encode(), request)
    assert len(found) <= 1
    return found[0].decode() if found else None


def answer(
    body: bytes, status: str = "200 OK", server: Optional[str] = "ssh-agent-proxy/1", **more: str
) -> bytes:
    fields = {"Server": server, "Content-Length": str(len(body)), "Connection": "close", **more}
    lines = [f"{name}: {value}\r\n" for name, value in fields.items() if value is not None]
    return f"HTTP/1.1 {status}\r\n{''.join(lines)}\r\n".encode() + body


def armored(line: str = LINE, namespace: str = "git") -> bytes:
    """What looks like a signature by the key in LINE (PROTOCOL.sshsig); its last field does not."""
    key = base64.b64decode(line.split()[1])
    fields = [key, namespace.encode(), b"", b"sha512", message(b"ssh-ed25519") + bytes(68)]
    blob = b"SSHSIG" + (1).to_bytes(4, "big") + b"".join(map(message, fields))
    text = base64.b64encode(blob)
    return BEGIN + b"".join(text[i : i + 70] + b"\n" for i in range(0, len(text), 70)) + END


ARMOR = armored()
UNAVAILABLE = answer(b"no agent\n", "503 Service Unavailable")


def served_key(line: str) -> bytes:
    return answer(f"{line} me\n".encode())


def opened_by(event: threading.Event, answered: bytes) -> Callable[[Any], bytes]:
    """For a Liar: keeps the client waiting for the EVENT."""
    return lambda connection: answered if event.wait(30) else b""


@pytest.fixture
def liar() -> Iterator[Callable[..., Liar]]:
    started: List[Liar] = []

    def start(*answers: Any) -> Liar:
        started.append(Liar(*answers))
        return started[-1]

    yield start
    for one in started:
        one.close()


def said(done: Done[bytes]) -> str:
    """The one line that a failure is told by, held to what every such line keeps."""
    text = done.stderr.decode("ascii")
    assert done.returncode == 1, (done.returncode, text)
    assert re.fullmatch(rf"{OURS}: [ -~]+\n", text), text
    assert "usage:" not in text
    assert len(text) < 1000
    assert done.stdout == b""
    return text[len(OURS) + 2 : -1]


def fine(done: Done[bytes], stdout: bytes = b"") -> None:
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", stdout)


@pytest.fixture
def signed(ssh_keygen: Callable[[bytes], bytes]) -> bytes:
    return ssh_keygen(COMMIT)


# ---------------------------------------------------------------- beside the real ssh-keygen

@pytest.mark.parametrize("size", [1, 511, 4096, 6 << 20])
def test_a_file_of_any_size_and_content_is_signed_as_it_is(
    one_shim: Shim, size: int, keys: Keys, served: Served, ssh_keygen: Any
) -> None:
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    one_shim.file("data", data)
    fine(one_shim.sign("-f", keys["ed25519"], "data", env=served))
    expected = ssh_keygen(data)
    assert one_shim.signature("data") == expected
    fine(one_shim.sign(input=data, env=served), expected)


def test_what_is_not_signing_reaches_the_first_real_ssh_keygen_as_it_was(each_shim: Shim) -> None:
    """Git could not verify; nor is it the shim itself, where that stands on the path so."""
    for name in ("bin", "more"):
        (each_shim.folder / name).mkdir()
    (each_shim.folder / "bin" / "ssh-keygen").symlink_to(SHIM)
    each_shim.program("more/ssh-keygen", 'printf "<%s>" "$@"; cat; exit 7')
    path = f"{each_shim.folder}/bin:{each_shim.folder}/more:{os.environ['PATH']}"
    odd = ["-Y", "verify", "", "a b", "-x*", "$HOME", "line\nend", "--", "-Y", "sign"]
    for argv in (odd, ["-l", "-f", "k"], ["-Ysignature", "-O"], ["-lvEmd5", "-y", "sign"]):
        done = each_shim(*argv, input=b"data", env={"PATH": path})
        assert (done.returncode, done.stderr) == (7, b"")
        assert done.stdout.decode() == "".join(f"<{word}>" for word in argv) + "data"


def test_without_ssh_keygen_the_package_that_has_it_is_named(shim: Shim) -> None:
    shim.argv[0] = str(Path(need(shim.argv[0], "the shell")).resolve())
    (shim.folder / "printf").symlink_to("/usr/bin/printf")  # a program to posh and mksh
    assert "package openssh-client" in said(shim("-Y", "verify", env={"PATH": str(shim.folder)}))


# ---------------------------------------------------------------- refused before anyone is asked

PRIVATE = "-----BEGIN OPENSSH PRIVATE KEY-----\n"
NO_KEY = "no public key in ./key"

# The options of -Y sign, the content of ./key, and what is said.
REFUSED = [
    ("an option with a value", ["-C", "comment"], "", "there is no signing with -C"),
    ("an option for a terminal", ["-\x1b"], "", "there is no signing with -?"),
    ("an unknown -O", ["-O", "no\x1b[2Jgood"], "", "not no?[2Jgood"),
    ("another hash", ["-O", "hashalg=\n"], "", "-O hashalg=? is unknown"),
    ("a header", ["-n", "a\r\nSSHSIG-Key: x"], "", "-n 'a??SSHSIG-Key: x': a namespace"),
    ("two namespaces", ["-n", "a,b"], "", "-n 'a,b': a namespace has"),
    ("a namespace beyond ASCII", ["-n", "n\u00e4me"], "", "-n 'n?"),
    ("a long namespace", ["-n", "a" * 256], "", "aaa': a namespace has 1 to 255"),
    ("a key without a name", ["-f", ""], "", "user.signingkey is empty, which is no"),
    ("a GPG id", ["-f", "ABCDEF012345678"], "", "ABCDEF012345678, which is no public key"),
    ("a relative path", ["-f", "a/b.pub"], "", "(one is fetched only to a path that begins with"),
    ("a key of no known type", ["-f", "key::dss AAAA"], "", "no public key of a known type"),
    ("forgers' key itself", ["-f", ANYBODY], "", "user.signingkey is 32 zero bytes, for"),
    ("a private key", ["-f", "./key"], PRIVATE, "private one"),
    ("a key in a private one", ["-f", "./key"], f"{PRIVATE}{LINE}\n", NO_KEY),
    ("another text", ["-f", "./key"], "hello world\n", NO_KEY),
    ("a header in the blob", ["-f", "./key"], "ssh-rsa AAAA:x\n", NO_KEY),
    ("a device without end", ["-f", "/dev/zero"], "", "no public key in /dev/zero"),
    ("no blob", ["-f", "./key"], "ssh-rsa hello\n", NO_KEY),
    ("a folder", ["-f", "./folder"], "", "user.signingkey: ./folder.pub is a folder"),
    ("a key that anyone has", ["-f", "./key"], ANYBODY, "the key in ./key is 32 zero bytes, for"),
    ("a push by nobody", ["-f", "./key", "push"], NOBODY, "this push certificate names a key that"),
]


@under("options, key, told", REFUSED, "an unknown -O", "a namespace beyond ASCII", "a private key")
def test_what_cannot_be_meant_is_refused_before_anyone_is_asked(
        shim: Shim, liar: Any, options: List[str], key: str, told: str) -> None:  # fmt: skip
    """Another key, another namespace or another text would be signed than was meant."""
    server = liar(answer(ARMOR))
    shim.file("key", key.encode())
    shim.file("push", CERTIFICATE)
    (shim.folder / "folder.pub").mkdir()
    assert told in said(shim.sign(*options, "m", env=server.env))
    assert server.requests == []
    assert shim.files() == ["key", "m", "push"]


# ---------------------------------------------------------------- which key signs

CERTIFIED = "ssh-ed25519-cert-v01@openssh.com AAAAIHNz"
HARDWARE = "sk-ssh-ed25519@openssh.com AAAAGnNr+w=="
KEY_FILES = [
    ("no line end", LINE, LINE),
    ("a carriage return", f"{LINE}\r\n", LINE),
    ("a carriage return after the comment", f"{LINE} me@home and more\r\n", LINE),
    ("comments and empty lines first", f"# x\n\n#\nhello\n{LINE} me\n", LINE),
    ("blanks before and between", f"  \t{LINE.replace(' ', chr(9) + ' ')}  me\n", LINE),
    ("the first of two", f"{LINE} me\n{OTHER} you\n", LINE),
    ("a certificate", f"{CERTIFIED} c\n", CERTIFIED),
    ("a security key", f"{HARDWARE} c\n", HARDWARE),
    ("the key that nobody holds", f"{NOBODY} {OURS}\n", None),
]


@pytest.mark.parametrize("content, expected", rows(KEY_FILES))
def test_the_key_in_the_file_is_asked_for_without_its_comment(
        shim: Shim, liar: Any, content: str, expected: Optional[str]) -> None:  # fmt: skip
    """The commit would be signed with another key than git names, or not at all."""
    shim.key("key.pub", OTHER)
    for name in ("key", "more.pub"):
        server = liar(answer(armored(expected or OTHER)))
        shim.file()
        shim.file(name, content.encode())
        fine(shim.sign("-f", name.replace(".pub", ""), "m", env=server.env))
        assert sent(server.requests[0], "SSHSIG-Key") == expected
        assert server.methods() == [b"POST"]


@pytest.mark.parametrize("key", [LINE, f"key::{LINE} me@home", f"{LINE} x\n", f"{NOBODY} any"])
def test_a_key_that_is_no_file_but_the_key_itself_is_asked_for(
        shim: Shim, liar: Any, key: str) -> None:  # fmt: skip
    """Dulwich hands over what the key command printed, and could not sign."""
    server = liar(answer(ARMOR))
    fine(shim.sign("-f", key, "m", env=server.env))
    fine(shim.sign("-f", key, input=COMMIT, env=server.env), ARMOR)
    expected = None if key.startswith(NOBODY) else LINE
    assert [sent(r, "SSHSIG-Key") for r in server.requests] == [expected] * 2
    assert shim.files() == ["m", "m.sig"]


def test_a_key_in_the_home_is_the_homes_and_not_the_working_trees(shim: Shim, liar: Any) -> None:
    """A folder named ~ that a repository brings along would say which key signs."""
    server = liar(served_key(LINE), answer(ARMOR))
    (shim.folder / "~").mkdir()
    shim.key("~/k.pub", OTHER)
    fine(shim.sign("-f", "~/new/k", "m", env=server.env))
    assert server.methods() == [b"GET", b"POST"]
    assert Path(shim.env["HOME"], "new/k.pub").read_text() == f"{FETCHED}\n{LINE} me\n"
    fine(shim.sign("-f", "~/new/k", "m", env=server.env))
    assert sent(server.requests[-1], "SSHSIG-Key") == LINE
    assert shim.files() == ["m", "m.sig", "~/k.pub"]
    for home in ("", "here"):
        shim.env["HOME"] = home
        done = shim.sign("-f", "~/k", "m", env=server.env)
        assert "begins with ~/, and HOME is not" in said(done)
    assert len(server.requests) == 3


GITS_FILE = ".git_signing_buffer_tmpAb3dEf"
GITS_KEY = ".git_signing_key_tmpAb3dEf"
KEPT_KEYS = [
    ("git's own", GITS_KEY, answer(ARMOR), True),
    ("where nothing is signed", GITS_KEY, UNAVAILABLE, False),
    ("a longer name", f"{GITS_KEY}g", answer(ARMOR), False),
    ("another name", f"my{GITS_KEY}", answer(ARMOR), False),
    ("no letters", ".git_signing_key_tmp-b3dEf", answer(ARMOR), False),
    ("a person's", "k.pub", answer(ARMOR), False),
]


@under("name, answered, taken", KEPT_KEYS, "git's own", "no letters")
def test_gits_own_file_of_a_literal_key_is_taken_away_and_no_other(
        shim: Shim, liar: Any, name: str, answered: bytes, taken: bool) -> None:  # fmt: skip
    """Git leaves one behind at each signature; but a person's key file must not go."""
    server = liar(answered)
    for argv in (["m"], []):
        key = shim.key(name, LINE)
        done = shim.sign("-U", "-f", f"./{name}", *argv, input=COMMIT, env=server.env)
        assert (done.returncode == 0) == (answered != UNAVAILABLE)
        assert key.exists() != taken
    link = shim.folder / ".git_signing_key_tmpLinked"
    link.symlink_to(shim.key("mine", LINE))
    shim.sign("-U", "-f", link, "m", env=server.env)
    assert link.is_symlink()


def test_a_key_and_a_token_in_a_pipe_are_read(
        shim: Shim, keys: Keys, liar: Any, guarded: Served) -> None:  # fmt: skip
    """A shell's <(command) would be no key and no token."""
    server = liar(answer(ARMOR))
    fine(shim.sign("-f", "/dev/fd/0", "m", input=f"{LINE}\n".encode(), env=server.env))
    assert sent(server.requests[0], "SSHSIG-Key") == LINE
    env = {**guarded, "SSH_AGENT_PROXY_TOKEN_FILE": "/dev/fd/0"}
    printed = shim("pubkey", input=f"{TOKENS['file']}\n".encode(), env=env)
    fine(printed, f"{keys.line('ed25519')}\n".encode())


FETCHED_TO = [("k.pub", "k.pub"), ("empty.pub", "empty.pub"), ("a/b/k", "a/b/k.pub")]


@pytest.mark.parametrize("name, written", FETCHED_TO)
def test_a_key_file_that_is_not_there_is_fetched(
    shim: Shim, keys: Keys, served: Served, signed: bytes, name: str, written: str
) -> None:
    """A container's first commit would need somebody to copy the key first."""
    shim.file("empty.pub", b"")
    path = shim.folder / written
    fine(shim.sign("-f", shim.folder / name, "m", env=served))
    assert shim.signature() == signed
    assert path.read_text() == f"{FETCHED}\n{keys.line('ed25519')}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert path.parent == shim.folder or stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert fingerprint(path) == fingerprint(keys["ed25519"])
    # Where it can't be written, it signs all the same.
    fine(shim.sign("-f", path / "k.pub", "m", env=served))
    assert shim.signature() == signed


NO_KEYS = [
    ("a refusal", UNAVAILABLE, "/publickey answered 503: no agent"),
    ("nothing", answer(b""), "200 without a public key"),
    ("half a line", answer(b"ssh-rsa\n"), "200 without a public key"),
    ("a header", answer(b"ssh-rsa A:\n"), "200 without a public key"),
    ("two keys", served_key(f"{LINE}\n{OTHER}"), "200 without a public key"),
    ("an authority", served_key(f"cert-authority {LINE}"), "200 without a public key"),
    ("nobody's key", served_key(NOBODY), "200 without a public key"),
    ("anybody's key", served_key(ANYBODY), "200 without a public key"),
]


@under("answered, told", NO_KEYS, "nothing", "nobody's key")
def test_what_is_no_public_key_is_not_taken_for_one(
        shim: Shim, liar: Any, answered: bytes, told: str) -> None:  # fmt: skip
    """Who registers or trusts what pubkey prints would trust whoever can forge for it."""
    server = liar(answered)
    kept = shim.key("kept.pub", LINE)
    for argv in (["pubkey"], ["pubkey", "k.pub"], ["pubkey", "kept.pub"],
                 ["-Y", "sign", "-f", f"{shim.folder}/k", "m"]):  # fmt: skip
        assert told in said(shim(*argv, env=server.env))
    assert shim("key", env=server.env).stdout.decode() == f"{NOBODY} ssh-agent-proxy-any\n"
    assert shim.files() == ["kept.pub", "m"]
    assert kept.read_text() == f"{LINE}\n"


# ---------------------------------------------------------------- rotation


def test_a_fetched_key_that_was_rotated_is_replaced_and_signs(
    one_shim: Shim, agent: Agent, keys: Keys, proxy: Proxy, ssh_keygen: Any
) -> None:
    """Each container would need its key file removed by hand."""
    env = {URL: f"{proxy.url}/sign"}
    key = one_shim.folder / "k.pub"
    fine(one_shim.sign("-f", key, "m", env=env))
    agent.delete_all()
    agent.add(keys["other"])
    fine(one_shim.sign("-f", key, "m", env=env))
    assert one_shim.signature() == ssh_keygen(COMMIT, key="other")
    assert key.read_text() == f"{FETCHED}\n{keys.line('other')}\n"
    agent.delete_all()
    agent.add(keys["ed25519"])
    fine(one_shim.sign("-f", key, input=COMMIT, env=env), ssh_keygen(COMMIT))


PROXYS, NOT_OURS = "ssh-agent-proxy/1", "is not ssh-agent-proxy"
REFUSALS = [
    ("not held", 404, "the agent does not hold it", PROXYS, "POST GET POST"),
    ("another is pinned", 403, "this proxy signs with x", PROXYS, "POST GET POST"),
    ("there is no other", 404, "the agent does not hold it", PROXYS, "POST GET"),
    ("a person's no", 403, "not agreed to", PROXYS, "POST"),
    ("the agent's no", 403, "the agent refuses:this proxy signs with x", PROXYS, "POST"),
    ("no agent", 503, "no agent", PROXYS, "POST"),
    ("another server's", 404, "no such page", "nginx", "POST"),
    ("another server's pin", 403, "this proxy signs with x", "nginx", "POST"),
]


@under("status, reason, server, asked", REFUSALS, "another is pinned", "a person's no")
def test_another_key_is_tried_once_and_no_refusal_is_asked_around(
    shim: Shim, liar: Any, status: int, reason: str, server: str, asked: str
) -> None:
    """What a person, a policy or the agent has refused must not be signed with another key."""
    refusal = answer(f"{reason}\n".encode(), f"{status} X", server)
    there = liar(refusal, served_key(LINE if asked == "POST GET" else OTHER), refusal)
    key = shim.key("k.pub", FETCHED, LINE)
    line = said(shim.sign("-f", "./k.pub", "m", env=there.env))
    assert (f"answered {status}: {reason}" if server == PROXYS else NOT_OURS) in line
    assert there.methods() == asked.encode().split()
    other = asked == "POST GET POST"
    assert (OTHER in key.read_text()) == other
    # One that the user chose is never replaced. That of a literal key is git's, for this once. And
    # what was streamed can't be sent again.
    for name, origin in (("mine.pub", "#"), (GITS_KEY, "#"), ("k.pub", FETCHED)):
        there = liar(refusal)
        key = shim.key(name, origin, LINE)
        env = {**there.env, "TMPDIR": shim.env["TMPDIR"] if origin == "#" else "/nowhere"}
        line = said(shim.sign("-f", f"./{name}", input=COMMIT, env=env))
        if other:
            assert (f"(asked for the key in ./{name})" in line) == (name != GITS_KEY)
        assert there.methods() == [b"POST"]
        assert key.read_text() == f"{origin}\n{LINE}\n"


# ---------------------------------------------------------------- pubkey and key


def test_the_key_that_nobody_holds_is_no_point_of_the_curve() -> None:
    """Else somebody could make signatures that verify with it."""
    p = 2**255 - 19
    d = -121665 * pow(121666, p - 2, p)
    y = int.from_bytes(base64.b64decode(NOBODY.split()[1])[-32:], "little")
    x_squared = (y * y - 1) * pow(d * y * y + 1, p - 2, p) % p
    assert pow(x_squared, (p - 1) // 2, p) == p - 1, "there is an x"
    assert NOBODY.split()[1] in SHIM.read_text()


def test_pubkey_writes_what_the_proxy_serves_to_a_path(
        shim: Shim, keys: Keys, served: Served) -> None:  # fmt: skip
    path = shim.key("-a b.pub", "what was there before")
    fine(shim("pubkey", f"./{path.name}", env=served))
    assert path.read_text() == f"{keys.line('ed25519')}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("command, why", [
    ("pubkey a b", "one PATH at most"),
    ("pubkey -x", "one PATH at most, and no options"),
    ("pubkey m/x", "cannot write m/x"),
    ("pubkey folder", "cannot write folder: is it no plain file"),
    ("pubkey pipe", "cannot write pipe: is it no plain file"),
    ("pubkey link", "cannot write link: is it no plain file"),
    ("key x", "takes no arguments"),
])  # fmt: skip
def test_a_command_that_cannot_be_done_says_why(
        shim: Shim, served: Served, command: str, why: str) -> None:  # fmt: skip
    """A device, or /dev/stdout, would be a file from then on."""
    (shim.folder / "folder").mkdir()
    os.mkfifo(shim.folder / "pipe")
    (shim.folder / "link").symlink_to("/dev/null")
    assert why in said(shim(*command.split(), env=served))
    assert shim.files() == ["m"]
    assert os.readlink(shim.folder / "link") == "/dev/null"
    assert stat.S_ISFIFO((shim.folder / "pipe").stat().st_mode)


@pytest.mark.parametrize(("command", "line", "printed"), [
    ("pubkey", f"{LINE} me\x1b[2J\u202e\x07", f"{LINE} me?[2J?"),
    ("key", f"{LINE} me", f"{LINE} me"),
    ("key", "ecdsa-sha2-nistp256 AAAAE2Vj me", "key::ecdsa-sha2-nistp256 AAAAE2Vj me"),
])  # fmt: skip
def test_a_command_prints_the_key_as_every_terminal_and_git_takes_it(
        shim: Shim, liar: Any, command: str, line: str, printed: str) -> None:  # fmt: skip
    server = liar(answer(f"{line}\n".encode()))
    done = shim(command, env=server.env)
    # To yash a character is one, to the others so many bytes.
    done.stdout = re.sub(rb"[?]+", b"?", done.stdout)
    fine(done, f"{printed}\n".encode())


# ---------------------------------------------------------------- settings

PUBKEY_URL = "SSH_AGENT_PROXY_PUBKEY_URL"
URLS = [
    *((URL, url, f"{URL} is {url}: it must be http://") for url in [
        "-K/etc/passwd", "HTTP://127.0.0.1/sign", "unix:run/x.sock", "UNIX:/run/x.sock",
        "http://127.0.0.1:7221", "http://127.0.0.1:7221/", "http:///sign",
        "http://127.0.0.1/{a,b}", "http://127.0.0.1/a\\b",
    ]),
    (URL, "http://me:secret@127.0.0.1/sign", "is empty, or with a user name: it must"),
    (URL, "http://127.0.0.1/sign\nHost: x", "is http://127.0.0.1/sign?Host: x: it"),
    (URL, "http://ex\u00e4mple/sign", "is http://ex?"),
    (URL, "http://127.0.0.1:1/other", f"does not end in /sign: set {PUBKEY_URL}"),
    (PUBKEY_URL, "http://x\ny/", "is http://x?y/"),
    (PUBKEY_URL, "unix:x\n", "is unix:x?: it must be"),
]  # fmt: skip
URL_ROWS = [(ascii(url)[1:-1], name, url, told) for name, url, told in URLS]


@under(
    "name, url, told", URL_ROWS, "http://127.0.0.1/{a,b}", "http://ex\\xe4mple/sign", "unix:x\\n"
)
def test_a_url_that_cannot_be_asked_is_named(shim: Shim, name: str, url: str, told: str) -> None:
    """It stands on curl's command line, and in messages."""
    line = said(shim("pubkey", env={name: url}))
    assert line.startswith(f"{name} ")
    assert told in line
    assert "secret" not in line
    done = shim("key", env={name: url})
    assert (done.returncode, done.stdout.decode()) == (0, f"{NOBODY} ssh-agent-proxy-any\n")
    assert done.stderr.decode() == f"{OURS}: {line}\n"
    if name == URL and "/other" not in url:
        assert said(shim.sign("-f", LINE, env={name: url})) == line


@pytest.mark.parametrize("kept, told", [("http://x\n", "http://x: it"), ("", "empty, or")])
def test_a_kept_url_that_cannot_be_asked_is_named_by_its_file(
        one_shim: Shim, kept: str, told: str) -> None:  # fmt: skip
    note = home_token(one_shim, "").with_name("url")
    if kept:
        note.write_text(kept)
    else:
        note.mkdir()
    assert said(one_shim.sign("m")).startswith(f"{note} is {told}")


def test_the_public_key_is_asked_for_where_it_is_said_to_be(
        shim: Shim, liar: Any, keys: Keys, served: Served) -> None:  # fmt: skip
    elsewhere = liar(served_key(LINE))
    for url in ("http://127.0.0.1:1/other", "unix:/x"):
        env = {URL: url, PUBKEY_URL: f"http://127.0.0.1:{elsewhere.port}/x/y"}
        fine(shim("pubkey", env=env), f"{LINE} me\n".encode())
        assert elsewhere.requests[-1].startswith(b"GET /x/y HTTP/1.1\r\n")
        env[PUBKEY_URL] = f"unix:{served.socket}"
        fine(shim("pubkey", env=env), f"{keys.line('ed25519')}\n".encode())


# ---------------------------------------------------------------- the token, and the Unix socket

# What the shim asks the proxy for, and how.
WAYS = ["file", "pipe", "stdin", "streamed", "pubkey", "key", "fetched"]


def ask(shim: Shim, way: str, env: Dict[str, str]) -> Done[bytes]:
    shim.file()
    if way == "pipe":
        before = ["sh", "-c", '[ -p pipe ] || mkfifo pipe; cat m >pipe & exec "$@"', "sh"]
        return shim("-Y", "sign", "pipe", env=env, before=before)
    more = {"TMPDIR": f"{shim.folder}/nowhere"} if way == "streamed" else {}
    argv = {
        "file": ["-Y", "sign", "m"],
        "fetched": ["-Y", "sign", "-f", f"{shim.folder}/k", "m"],
        "pubkey": ["pubkey"],
        "key": ["key"],
    }.get(way, ["-Y", "sign"])
    return shim(*argv, input=COMMIT, env={**env, **more})


@pytest.fixture
def well_asked(keys: Keys, signed: bytes) -> Callable[[Shim, str, Done[bytes]], None]:
    def check(shim: Shim, way: str, done: Done[bytes]) -> None:
        assert (done.returncode, done.stderr) == (0, b"")
        line = f"{keys.line('ed25519')}\n"
        if way in ("pubkey", "key"):
            assert done.stdout.decode() == line
        elif way in ("stdin", "streamed"):
            assert done.stdout == signed
        else:
            assert shim.signature("pipe" if way == "pipe" else "m") == signed
        if way == "fetched":
            assert (shim.folder / "k.pub").read_text() == f"{FETCHED}\n{line}"
        assert os.listdir(shim.env["TMPDIR"]) == []

    return check


@pytest.mark.parametrize("way", WAYS)
def test_all_that_is_asked_reaches_the_proxy_with_its_token_over_a_port_and_a_socket(
    each_shim: Shim, guarded: Served, served: Served, well_asked: Any, way: str
) -> None:
    """Under that shell nothing could be signed in that way."""
    token = {"SSH_AGENT_PROXY_TOKEN": TOKENS["variable"]}
    for env in ({**guarded, **token}, {URL: f"unix:{served.socket}"}):
        for old in each_shim.folder.glob("*"):
            if old.is_file() or old.is_fifo():
                old.unlink()
        well_asked(each_shim, way, ask(each_shim, way, env))


def home_token(shim: Shim, content: str) -> Path:
    path = Path(shim.env["HOME"], ".config", "ssh-agent-proxy", "token")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    return path


TOKEN_SOURCES = [
    ("the variable", {"TOKEN": TOKENS["variable"], "TOKEN_FILE": "token"}, "variable"),
    ("past a file", {"TOKEN": TOKENS["variable"], "TOKEN_FILE": "missing"}, "variable"),
    ("the file", {"TOKEN": "", "TOKEN_FILE": "token"}, "file"),
    ("the home's", dict.fromkeys(["TOKEN", "TOKEN_FILE", "PUBKEY_URL", "CURL"], ""), "home"),
]


@pytest.mark.parametrize("set_to, taken", rows(TOKEN_SOURCES))
def test_the_token_is_the_variables_else_the_files_else_that_of_the_home(
        shim: Shim, liar: Any, set_to: Dict[str, str], taken: str) -> None:  # fmt: skip
    """And a variable that is empty counts as unset."""
    server = liar(served_key(LINE))
    shim.key("token", TOKENS["file"])
    home_token(shim, f"{TOKENS['home']}\n")
    env = {f"SSH_AGENT_PROXY_{name}": value for name, value in set_to.items()}
    fine(shim("pubkey", env={**server.env, **env}), f"{LINE} me\n".encode())
    assert sent(server.requests[0], "Authorization") == f"Bearer {TOKENS[taken]}"


TOKEN_FILES = {
    "a line": "{}\n",
    "no line end": "{}",
    "a carriage return and no line end": "{}\r",
    "the line of the host": "{} name key=SHA256:abc payloads=commit,tag\r\n",
    "comments and empty lines first": "# ours\n\n#TOKEN\n \t \n\r\n{}\n",
    "blanks before and behind": " \t{}\t \n",
    "the first of two": "{}\nanother\n",
}


@pytest.mark.parametrize("content", TOKEN_FILES.values(), ids=TOKEN_FILES.keys())
def test_the_token_is_the_first_word_of_a_file(
        shim: Shim, guarded: Served, well_asked: Any, content: str) -> None:  # fmt: skip
    path = shim.file("-a token", content.format(TOKENS["file"]).encode())
    env = {**guarded, "SSH_AGENT_PROXY_TOKEN_FILE": path.name}
    well_asked(shim, "pubkey", shim("pubkey", env=env))


BROKEN_TOKENS = ["s3cr3t s3cr3t", "s3cr3t\r\nX-Header: x", 's3cr3t"\nurl = "http://127.0.0.1/',
                 "s3cr3t\\", "s3cr3t\u00e4", "=s3cr3t", "s3cr3t=s3cr3t", "*"]  # fmt: skip


@under("token", each(BROKEN_TOKENS), "s3cr3t\\xe4", "s3cr3t\\\\", "*")
def test_what_is_no_token_is_refused_and_not_shown(shim: Shim, liar: Any, token: str) -> None:
    """It would be a header or a line of curl's configuration."""
    server = liar(answer(ARMOR))
    path = shim.file("token\x1b", f"# x\n{token}".encode())
    given = [("SSH_AGENT_PROXY_TOKEN", token, "SSH_AGENT_PROXY_TOKEN")]
    if not set(token) & set(" \r\n\u00e4"):  # in a file these end a word
        given.append(("SSH_AGENT_PROXY_TOKEN_FILE", str(path), f"{shim.folder}/token?"))
    for name, value, place in given:
        line = said(shim.sign(input=COMMIT, env={**server.env, name: value}))
        assert line.startswith(f"what {place} holds is no token: ")
        assert "s3cr3t" not in line
    assert server.requests == []


FOLDER = " is a folder (container engines make one where there was nothing to mount)"
NO_SUCH = "No such file or directory: is it mounted?"
NO_TOKEN_IN = {
    "missing": f"missing: {NO_SUCH}",
    "/missing/folder/token": f"/missing/folder/token: {NO_SUCH}",
    "m/token": "m/token: Not a directory: is it mounted?",
    "link": f"link: {NO_SUCH}",
    "folder": f"folder{FOLDER}",
    "empty": "empty holds none",
    "/dev/zero": "/dev/zero holds none",
    "comments": "comments holds none",
    "closed": "closed cannot be read: permission denied",
    "closed folder/token": "closed folder/token: Permission denied: is it mounted?",
    "\x1b[2J\n\x7f": f"?[2J??: {NO_SUCH}",
}


# The one that is looked for unasked: what is there, and what is said of it once a token is missed.
HOME_TOKENS = {
    "missing": f"(SSH_AGENT_PROXY_TOKEN is not set, and PATH: {NO_SUCH})",
    "empty": "and PATH holds none)",
    "a folder": f"PATH{FOLDER}",
}


@pytest.mark.parametrize("state", HOME_TOKENS)
def test_a_home_without_a_token_is_told_only_where_one_is_wanted(
    shim: Shim, guarded: Served, served: Served, well_asked: Any, state: str
) -> None:
    path = home_token(shim, "" if state == "empty" else f"{TOKENS['home']}\n")
    if state in ("missing", "a folder"):
        path.unlink()
    if state == "a folder":
        path.mkdir()
    well_asked(shim, "pubkey", shim("pubkey", env=served))
    line = said(shim("pubkey", env=guarded))
    assert "/publickey answered 401: a token is needed: `ssh-agent-proxy token NAME` makes" in line
    assert HOME_TOKENS[state].replace("PATH", str(path)) in line


def test_a_token_that_the_proxy_does_not_know_is_told_by_where_it_stands(
        shim: Shim, guarded: Served) -> None:  # fmt: skip
    path = home_token(shim, "s3cr3t-old\n")
    for env, place in [
        ({"SSH_AGENT_PROXY_TOKEN": "s3cr3t-old"}, "SSH_AGENT_PROXY_TOKEN"),
        ({"SSH_AGENT_PROXY_TOKEN_FILE": str(path)}, path),
        ({}, path),
    ]:
        line = said(shim("pubkey", env={**guarded, **env}))
        assert "/publickey answered 401: this token is not one of the proxy's" in line
        assert line.endswith(f"(what was sent is the one in {place}: put another there)")
        assert "s3cr3t" not in line


def test_the_token_is_sent_with_every_try_and_to_nobody_else(shim: Shim, liar: Any) -> None:
    other, tunnel = liar(answer(ARMOR)), liar(b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\nno TLS")
    away = answer(b"", "307 Temporary Redirect", Location=other.url)
    server = liar(b"", answer(b"", "404 X"), served_key(OTHER), answer(armored(OTHER)), away)
    shim.key("k.pub", FETCHED, LINE)
    env = {**server.env, "SSH_AGENT_PROXY_TOKEN": "s3cr3t"}
    fine(shim.sign("-f", "./k.pub", "m", env=env))
    assert "answered 307" in said(shim.sign("m", env=env))
    assert [sent(r, "Authorization") for r in server.requests] == ["Bearer s3cr3t"] * 5
    assert other.requests == []
    env = {**env, URL: "https://x.internal/sign", "https_proxy": tunnel.url}
    assert "https://x.internal/sign: no trusted TLS connection" in said(shim.sign("m", env=env))
    assert tunnel.requests[0].startswith(b"CONNECT x.internal:443 ")
    assert sent(tunnel.requests[0], "Authorization") is None


OTHER_PLACES = [
    ("the same", "http://127.0.0.1:{port}/sign", True),
    ("another port", "http://127.0.0.1:1/sign", False),
    ("another host", "http://localhost:{port}/sign", False),
    ("another scheme", "https://127.0.0.1:{port}/sign", False),
    ("a name that begins so", "http://127.0.0.1:{port}0/sign", False),
    ("the beginning of its name", "http://127.0.0.1:{start}/sign", False),
    ("a socket", "unix:/nowhere", False),
    ("unset", "", False),
]


@under("sign_url, is_sent", OTHER_PLACES, "the same", "another port")
def test_the_token_goes_to_the_host_of_the_sign_url_alone(
        shim: Shim, liar: Any, sign_url: str, is_sent: bool) -> None:  # fmt: skip
    """Whoever serves the public key could sign as this container."""
    server = liar(answer(b"a token is needed\n", "401 Unauthorized"))
    env = {
        URL: sign_url.format(port=server.port, start=server.port // 10),
        PUBKEY_URL: f"http://127.0.0.1:{server.port}/publickey",
        "SSH_AGENT_PROXY_TOKEN": "s3cr3t",
    }
    line = said(shim("pubkey", env=env))
    assert (f"to the host of {URL} alone, and this is another" in line) != is_sent
    assert sent(server.requests[0], "Authorization") == ("Bearer s3cr3t" if is_sent else None)


SOURCES = {"variable": "SSH_AGENT_PROXY_TOKEN", "file": "SSH_AGENT_PROXY_TOKEN_FILE"}


def token_from(shim: Shim, source: str) -> Dict[str, str]:
    path = shim.key("token", "s3cr3t-file", "s3cr3t-next")
    return {SOURCES[source]: str(path) if source == "file" else "s3cr3t-variable"}


@pytest.mark.parametrize("source", SOURCES)
def test_a_trace_does_not_show_the_token_nor_does_a_shell_that_exports_all_pass_it_on(
        shim: Shim, source: str) -> None:  # fmt: skip
    env = {**fake_curl(shim, f'env >"{shim.folder}/env"; exit 7'), **token_from(shim, source)}
    shim.argv.insert(-1, "-ax")
    done = shim("-Y", "sign", env=env, input=COMMIT)
    assert b"find_token" in done.stderr, "it was traced so far"
    assert b"s3cr3t" not in done.stderr
    left = (shim.folder / "env").read_text()
    assert left.count("s3cr3t") == (1 if source == "variable" else 0)


def traced(shim: Shim, calls: str) -> Path:
    """Where the kernel's view of it will be: those calls of all its programs."""
    trace = shim.folder / "trace"
    shim.argv = [need("strace", "strace"), "-f", "-y", "-v", "-s", "65536", "-e", "signal=none",
                 "-o", str(trace), "-e", f"trace={calls}", *shim.argv]  # fmt: skip
    return trace


@on_linux
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("way", ["file", "stdin", "streamed", "pubkey"])
def test_no_argument_no_environment_and_no_file_for_others_ever_holds_the_token(
        shim: Shim, liar: Any, way: str, source: str) -> None:  # fmt: skip
    """As the kernel saw it, programs that ended at once included."""
    server = liar(UNAVAILABLE)
    trace = traced(shim, "execve,umask,write,writev,pwrite64")
    # Were one of the shim's own variables in the environment, it would be passed on.
    own = set(re.findall(r"[a-z_]+(?==)|(?<=read -r )[a-z_]+", SHIM.read_text()))
    assert {"token", "rest", "word", "letter"} <= own
    env = {**dict.fromkeys(own, "x"), **server.env, **token_from(shim, source)}
    assert "answered 503: no" in said(ask(shim, way, env))
    assert sent(server.requests[0], "Authorization") == f"Bearer s3cr3t-{source}"
    assert sent(server.requests[0], "SSHSIG-Key") is None
    # That which came with the environment is passed on with it.
    lines = trace.read_text().replace('"SSH_AGENT_PROXY_TOKEN=s3cr3t-variable"', "").splitlines()
    programs = [line for line in lines if " execve(" in line]
    assert any("/curl" in line for line in programs)
    assert not [line for line in programs if "s3cr3t" in line]
    holds = r"^(\d+) +p?write\w*\(\d+<([^>]*)>(?:\(deleted\))?,.*s3cr3t"
    written = [match.groups() for match in (re.match(holds, line) for line in lines) if match]
    assert written, "the shell has written the here-document somewhere"
    for pid, name in written:
        if not name.startswith(("pipe:", "socket:", "TCP:", "UNIX")):
            assert [one for one in lines if re.match(rf"{pid} +umask\(077\b", one)], name


@on_linux
def test_where_the_token_cannot_be_handed_over_it_is_said_what_is_missing(
        shim: Shim, liar: Any) -> None:  # fmt: skip
    """Some shells make a temporary file of a here-document, others need none."""
    if shim.argv[0] == "posh":
        return  # it dies there, of any script with a here-document
    server = liar(answer(ARMOR))
    script = f"""
        mount -t tmpfs none disk && cp m "{SHIM}" disk && cd disk || exit 99
        for folder in /tmp /dev/shm /var/tmp; do
            mount -t tmpfs -o ro none "$folder" || exit 99
        done
        "$@" -Y sign m
        echo "$?"; ls -A
    """
    (shim.folder / "disk").mkdir()
    shim.argv[-1] = "./shim.sh"
    env = {**server.env, "TMPDIR": "/tmp", "SSH_AGENT_PROXY_TOKEN": "s3cr3t"}
    done = shim(env=env, before=in_a_namespace(script))
    if server.requests:
        assert (done.stdout, done.stderr) == (b"0\nm\nm.sig\nshim.sh\n", b"")
        assert sent(server.requests[0], "Authorization") == "Bearer s3cr3t"
    else:
        assert done.stdout == b"1\nm\nshim.sh\n"
        done = Done(done.args, 1, b"", done.stderr)
        assert "could not be handed the token: it takes a writable /tmp, or /dev/fd" in said(done)


def in_a_namespace(script: str) -> List[str]:
    unshare = need("unshare", "util-linux")
    return [unshare, "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]


MOUNTED = ": is it mounted? (its folder, with ssh-agent-proxy running on the host)"
NO_SOCKET = " is not a socket (engines make a folder where there was nothing to mount)"
UNANSWERED = {
    "missing": f"HERE/missing: No such file or directory{MOUNTED}",
    "folder": f"HERE/folder{NO_SOCKET}",
    "stale": "nobody listens on HERE/stale: is ssh-agent-proxy running on the host?",
    "not ours": "HERE/not ours: permission denied: the socket is not open to this user",
    "x" * 120: "HERE/" + "x" * 120 + " is longer than the path of a socket can be",
    "\x1b[2J\n\x7fusage:": "HERE/?[2J??usage : No such file or directory: is",
    "agent": "unix:HERE/agent closed the connection without an answer: try again, and see that it "
    "is ssh-agent-proxy's own, whose log tells more, and not an agent's",
}


@under("name", each(UNANSWERED), "missing", "stale", "agent")
def test_a_socket_that_does_not_answer_is_told_why(
        shim: Shim, short: Path, served: Served, name: str) -> None:  # fmt: skip
    here = short / "here"
    here.mkdir()
    (here / "folder").mkdir()
    (here / "agent").symlink_to(served.agent.sock)
    with socket.socket(socket.AF_UNIX) as stale, socket.socket(socket.AF_UNIX) as not_ours:
        for one, socket_name in ((stale, "stale"), (not_ours, "not ours")):
            one.bind(str(here / socket_name))
            (here / socket_name).chmod(0o666 if one is stale else 0)
        not_ours.listen(1)
        done = shim("pubkey", env={URL: f"unix:{here}/{name}"}, before=bound_by_modes())
    line = said(done)
    assert line.startswith(UNANSWERED[name].replace("HERE", str(here)))


# ---------------------------------------------------------------- curl


def fake_curl(shim: Shim, script: str) -> Dict[str, str]:
    return {"SSH_AGENT_PROXY_CURL": str(shim.program("fake curl", script))}


# All that it may be told. The youngest of them, the last, came with curl 7.54.
KNOWN_TO_CURL = """-q -s -g -i -w -H -X -T -K --connect-timeout --max-time --limit-rate --noproxy
    --unix-socket --suppress-connect-headers"""


def test_curl_is_told_what_it_must_keep_to_and_nothing_that_old_ones_do_not_know(
        one_shim: Shim, guarded: Served) -> None:  # fmt: skip
    """Ubuntu 20.04 has curl 7.68, which would only say that the option is unknown."""
    record = f'printf "%s\\n" "$@" >"{one_shim.folder}/argv"; exec curl "$@"'
    env = {**fake_curl(one_shim, record), "SSH_AGENT_PROXY_TOKEN": TOKENS["variable"]}
    options = set()
    for url in (guarded[URL], f"unix:{guarded.socket}"):
        for way in WAYS:
            assert ask(one_shim, way, {**env, URL: url}).returncode == 0
            argv = (one_shim.folder / "argv").read_text().splitlines()
            options |= {word for word in argv if re.match("-.", word)}
            assert argv[0] == "-q", "only as the first option does it keep ~/.curlrc unread"
            assert argv[argv.index("--noproxy") + 1] == "*"
            assert "Expect:" in argv, "else a large commit waits for a 100"
            assert 1 <= int(argv[argv.index("--connect-timeout") + 1]) <= 30
            assert 240 < int(argv[argv.index("--max-time") + 1]) <= 600, "the agent's 120 s, twice"
    assert options == set(KNOWN_TO_CURL.split())


CURL_ENDS = {
    2: "install a newer one",
    5: "http_proxy, which leads to http://127.0.0.1:7221/sign, names no host",
    6: "is not known here",
    7: "nothing listens at http://127.0.0.1:7221/sign (connection refused): is ssh-agent-proxy",
    18: "broke off",
    28: "no answer from http://127.0.0.1:7221/sign in time (600 s)",
    60: "no trusted TLS connection (curl's exit status 60)",
    99: "ended with exit status 99",
    120: "could not be handed the token",
}


@pytest.mark.parametrize("status", CURL_ENDS)
def test_each_end_of_curl_is_told_in_words(one_shim: Shim, status: int) -> None:
    # Without a URL a container would ask elsewhere too.
    script = f"echo took 600.1; exit {status}"
    env = {**fake_curl(one_shim, script), URL: "http://127.0.0.1:7221/sign"}
    assert CURL_ENDS[status] in said(one_shim.sign("m", env=env))
    env = {**fake_curl(one_shim, "exit 48"), URL: "unix:/x"}
    assert "/fake curl lacks something that curl 7.68 has" in said(one_shim.sign("m", env=env))


@pytest.mark.parametrize("token", ["", "s3cr3t"], ids=["no token", "a token"])
@pytest.mark.parametrize("curl", ["/nowhere/curl\x1b[2J", "/etc/passwd"])
def test_without_curl_it_is_said_what_to_install(shim: Shim, curl: str, token: str) -> None:
    env = {"SSH_AGENT_PROXY_CURL": curl, "SSH_AGENT_PROXY_TOKEN": token}
    assert "cannot be run: install curl" in said(shim.sign("m", env=env))


# ---------------------------------------------------------------- answers that are none

NO_SIGNATURE = "200 without the signature that was asked for"
TAIL = ARMOR[len(BEGIN) :]

LIES = [
    ("no server", answer(ARMOR, server=None), f"{NOT_OURS} (status 200, Server: none)"),
    ("another", answer(ARMOR, server="nginx"), f"{NOT_OURS} (status 200, Server: nginx)"),
    ("a server like ours", answer(ARMOR, server="ssh-agent-proxyish/1"), NOT_OURS),
    ("ours before it", answer(b"", "102 X").partition(b"Content")[0] + b"\r\n"
     + answer(ARMOR, server=None), NOT_OURS),
    ("a policy's page", answer(b"<html>usage: Blocked", "403 Forbidden", "x"), NOT_OURS),
    ("a server that says usage:", answer(ARMOR, server="usage: x"), "Server: usage  x)"),
    ("a redirect", answer(b"", "302 Found"), "answered 302: no reason given"),
    ("two lines of reason", answer(b"one\na second\n", "413 Too Large"), "answered 413: one"),
    ("a reason with an escape", answer(b"a\x1b]0;x\x07\xc2\x9b\n", "403 X"), "403: a?]0;x?"),
    ("a reason that says usage:", answer(b"ssh-keygen usage: x\n", "403 X"), "usage  x"),
    ("a long reason", answer(b"a" * 5000, "500 X"), "500: " + "a" * 300),
    ("another success", answer(ARMOR, "201 Created"), "answered 201: -----BEGIN"),
    ("nothing in it", answer(b""), NO_SIGNATURE),
    ("no last line", answer(ARMOR[: -len(END)]), NO_SIGNATURE),
    ("nothing between", answer(BEGIN + END), NO_SIGNATURE),
    ("an empty line", answer(ARMOR.replace(END, b"\n" + END)), NO_SIGNATURE),
    ("something after", answer(ARMOR + b"x\n"), NO_SIGNATURE),
    ("two of them", answer(ARMOR + ARMOR), NO_SIGNATURE),
    ("no base64", answer(ARMOR.replace(b"U1NI", b"U1N!")), NO_SIGNATURE),
    ("base64 behind its end", answer(ARMOR.replace(END, b"=A\n" + END)), NO_SIGNATURE),
    ("no SSHSIG", answer(ARMOR.replace(b"U1NIU0lH", b"U1NIU0lI")), NO_SIGNATURE),
    ("bytes beyond ASCII", answer(BEGIN + b"U1\xe4\xff\n" + TAIL), NO_SIGNATURE),
    ("too short", answer(ARMOR).replace(b"Length: ", b"Length: 9"), "broke off"),
    ("no HTTP", b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP"),
    ("nothing", b"", "closed the connection without an answer"),
    ("only half a head", b"HTTP/1.1 200 OK\r\nServer: ssh-agent-pro", "broke off"),
    ("a long signature", answer(BEGIN + (b"U1NI" * 17 + b"\n") * 2000 + END), "could not be kept"),
]
LIES_TO_SHELLS = ["another", "two lines of reason", "a reason with an escape", "a long reason",
                  "nothing in it", "nothing between", "no last line", "two of them",
                  "bytes beyond ASCII", "too short", "nothing",
                  "only half a head"]  # fmt: skip


@under("lie, told", LIES, *LIES_TO_SHELLS)
def test_what_is_no_signature_of_the_proxy_is_not_taken_for_one(
        shim: Shim, liar: Any, lie: bytes, told: str) -> None:  # fmt: skip
    """It would stand in the commit, or over the signature that was there."""
    server = liar(lie)
    shim.file("m.sig", b"what was there before")
    line = said(shim.sign("m", env=server.env))
    assert told in line
    assert "a second" not in line
    assert server.url in line
    assert shim.signature() == b"what was there before"
    shim.file(GITS_FILE)
    assert told in said(shim.sign(GITS_FILE, env=server.env))
    # Some gits look for that one's and not at the exit status.
    assert shim.files() == [GITS_FILE, "m", "m.sig"]
    # What is streamed is held to no length before it is read.
    assert told in said(ask(shim, "streamed" if len(lie) < 9999 else "stdin", server.env))


def test_an_answer_without_end_is_not_waited_for(shim: Shim, liar: Any) -> None:
    """It would fill the disk. (Under posh, which knows no limits, it does.)"""
    if shim.argv[0] == "posh":
        return
    gone = threading.Event()

    def pour(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nServer: ssh-agent-proxy/1\r\n\r\n" + BEGIN)
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(b"U1NI\n" * 1000)
        gone.set()

    assert "could not be kept" in said(shim.sign("m", env=liar(pour).env))
    assert gone.wait(5)


# What is asked for with -f (LINE or none), and what the signature names.
FORGERIES = [
    ("another key", LINE, LINE[:-3] + "AAA", "git"),
    ("another type", LINE, LINE.replace("C3Nz", "C3Nx"), "git"),
    ("a longer key", LINE, LINE + "AAAA", "git"),
    ("a shorter key", LINE, LINE[:-4], "git"),
    ("nobody's", "", NOBODY, "git"),
    ("anybody's", "", ANYBODY, "git"),
    ("the key behind another", LINE, OTHER + LINE.split()[1], "git"),
    ("another namespace", LINE, LINE, "file"),
    ("a namespace that begins so", LINE, LINE, "github"),
    ("a namespace that ends so", "", LINE, "digit"),
]


@under("asked, by, namespace", FORGERIES, "another key", "a shorter key", "another namespace")
def test_a_signature_by_another_key_or_for_something_else_is_not_written(
        shim: Shim, liar: Any, asked: str, by: str, namespace: str) -> None:  # fmt: skip
    """Git would put it into the commit as if it were the one that was asked for."""
    server = liar(answer(armored(by, namespace)))
    shim.key("k", asked)
    argv = ["-f", "./k", "m"] if asked else ["m"]
    assert NO_SIGNATURE in said(shim.sign(*argv, env=server.env))
    assert shim.files() == ["k", "m"]


SIGNERS = ["ed25519", "rsa2048", "rsa4096", "ecdsa256", "ecdsa384", "ecdsa521"]
KEYS_AND_CERTIFICATES = each(name for kind in SIGNERS for name in (kind, f"{kind}-cert"))


@under("name", KEYS_AND_CERTIFICATES, "ed25519", "rsa2048", "ecdsa256-cert")
def test_a_signature_of_each_type_of_key_is_known_for_its_own(
        shim: Shim, liar: Any, keys: Keys, name: str) -> None:  # fmt: skip
    """One that the real ssh-keygen made is written, and refused where another was asked for."""
    plain = name.replace("-cert", "")
    shim.file("k", keys[plain].read_bytes()).chmod(0o600)
    public = shim.key("k.pub", keys.line(plain))
    if plain != name:
        run(["ssh-keygen", "-q", "-s", keys["other"], "-I", "x", public])
        public.write_bytes((shim.folder / "k-cert.pub").read_bytes())
    another = "other" if plain == "ed25519" else "ed25519"
    for hash in ("sha256", "sha512"):
        argv = ["ssh-keygen", "-q", "-Y", "sign", "-n", "git", f"-Ohashalg={hash}"]
        run([*argv, "-f", public, "m"], cwd=shim.folder)
        made = shim.signature()
        (shim.folder / "m.sig").unlink()
        env = liar(answer(made)).env
        assert NO_SIGNATURE in said(shim.sign("-f", keys[another], "m", env=env))
        fine(shim.sign("-f", "./k.pub", "m", env=env))
        assert shim.signature() == made
        (shim.folder / "m.sig").unlink()


TRUTHS = {
    "fields with short names": answer(ARMOR).replace(b"Server: ", b"P: x\r\nq:\r\nServer: "),
    "interim answers before": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 X\r\nServer: x\r\n\r\n"
    + answer(ARMOR),
    "a name in another case": answer(ARMOR).replace(b"Server: ", b"sERVER:"),
    "no reason phrase": answer(ARMOR).replace(b" OK", b""),
    "ended by the connection": b"HTTP/1.0 200 OK\r\nServer: ssh-agent-proxy/1\r\n\r\n" + ARMOR,
}


@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS.keys())
def test_a_signature_is_taken_in_any_form_that_http_allows(
        shim: Shim, liar: Any, truth: bytes) -> None:  # fmt: skip
    server = liar(truth)
    fine(shim.sign("m", env=server.env))
    assert shim.signature() == ARMOR


def busy(seconds: str, server: str = "ssh-agent-proxy/1") -> bytes:
    return answer(b"busy\n", "503 Service Unavailable", server, **{"retry-AFTER": seconds})


KEY_THERE = served_key(LINE)
# How it is asked, what is answered, how often it asks, and how long it waits between.
TRIES = [
    ("a broken connection", "file", [b"", answer(ARMOR)], 2, []),
    ("two of them", "file", [b"", b"", answer(ARMOR)], 2, []),
    ("one in a pipe", "pipe", [b"", answer(ARMOR)], 1, []),
    ("one while streaming", "streamed", [b"", answer(ARMOR)], 1, []),
    ("busy", "file", [busy("0"), busy("2"), answer(ARMOR)], 3, ["9", "2"]),
    ("busy for stdin", "stdin", [busy("1"), answer(ARMOR)], 2, ["1"]),
    ("busy for the key", "key", [busy("1"), KEY_THERE], 2, ["1"]),
    ("busy for a fetched key", "fetched", [busy("1"), KEY_THERE, answer(ARMOR)], 3, ["1"]),
    ("busy in a pipe", "pipe", [busy("1"), answer(ARMOR)], 1, []),
    ("busy for two minutes", "file", [busy("3600")], 14, ["9"] * 13),
    ("another server's", "file", [busy("1", "nginx"), answer(ARMOR)], 1, []),
    ("no agent", "file", [UNAVAILABLE, answer(ARMOR)], 1, []),
]


@under("way, answers, asked, waits", TRIES, "two of them", "busy")
def test_what_may_be_asked_again_is_and_nothing_else(
    shim: Shim, liar: Any, way: str, answers: List[bytes], asked: int, waits: List[str]
) -> None:
    """A proxy that is busy or was restarted would fail the commit; or be asked for ever."""
    server = liar(*answers)
    (shim.folder / "bin").mkdir()
    slept = shim.file("slept", b"")
    shim.program("bin/sleep", f'echo "$1" >>"{slept}"')
    env = {**server.env, "PATH": f"{shim.folder}/bin:{os.environ['PATH']}"}
    done = ask(shim, way, env)
    assert (done.stderr == b"") == (asked == len(answers))
    assert len(server.requests) == asked
    if shim.argv[0] != "ksh":  # to which sleep is no program
        assert slept.read_text().split() == waits


# Curl's status, what it says, and how often it is asked.
BROKEN = [(52, "", 2), (55, "", 2), (56, "", 2), (56, "HTTP/1.1 200 OK", 1), (92, "", 1),
          (52, "took 4.9", 2), (52, "took 5.1", 1)]  # fmt: skip


@pytest.mark.parametrize("status, begun, asked", BROKEN)
def test_an_answer_that_had_not_begun_when_the_connection_broke_is_asked_for_again(
        one_shim: Shim, served: Served, status: int, begun: str, asked: int) -> None:  # fmt: skip
    """A second prompt for what was signed already; or a restart would fail the commit."""
    script = f"""
        echo x >>asked; [ "$(cat asked)" = x ] || exec curl "$@"
        echo '{begun}'; exit {status}
    """
    done = one_shim.sign("m", env={**served, **fake_curl(one_shim, script)})
    assert (one_shim.folder / "asked").read_text() == "x\n" * asked
    assert (done.returncode == 0) == (asked == 2)


@pytest.mark.parametrize("seconds, asked", [("50.1", 3), ("100.1", 1)])
def test_what_a_busy_proxy_took_counts_for_its_two_minutes(
        one_shim: Shim, seconds: str, asked: int) -> None:  # fmt: skip
    busy_then = busy("1").decode().replace("\r", "\\r").replace("\n", "\\n")
    script = f"echo x >>asked; printf '{busy_then}\\ntook {seconds}\\n'"
    (one_shim.folder / "bin").mkdir()
    one_shim.program("bin/sleep", "exit 0")
    env = {**fake_curl(one_shim, script), "PATH": f"{one_shim.folder}/bin:{os.environ['PATH']}"}
    assert "503: busy" in said(one_shim.sign("m", env=env))
    assert (one_shim.folder / "asked").read_text() == "x\n" * asked


def test_each_file_has_a_signature_of_its_own_whatever_the_one_before_took(
        one_shim: Shim, liar: Any) -> None:  # fmt: skip
    armors = [ARMOR, armored(OTHER), armored(CERTIFIED)]
    server = liar(answer(armors[0]), b"", *map(answer, armors[1:]))
    before = ["sh", "-c", 'mkfifo pipe; cat m >pipe & exec "$@"', "sh"]
    one_shim.file("n")
    fine(one_shim.sign("pipe", "m", "n", env=server.env, before=before))
    assert [one_shim.signature(name) for name in ("pipe", "m", "n")] == armors


def test_a_wait_for_a_busy_proxy_can_be_interrupted(shim: Shim, liar: Any) -> None:
    server = liar(busy("9"))
    process = shim.start("-Y", "sign", "m", env=server.env)
    wait_for(lambda: server.requests, message="the request")
    time.sleep(0.3)  # it has been answered by then, mostly
    process.terminate()
    started = time.monotonic()
    assert process.communicate(timeout=10) == (b"", b"")
    assert time.monotonic() - started < 5
    assert shim.files() == ["m"]


# ---------------------------------------------------------------- tags

TAGS = [
    ("nothing listens", TAG, ["-n", "git"], True),
    ("no key", TAG, ["-f", "nokey"], True),
    ("an unknown option", TAG, ["-l"], True),
    ("for something else", TAG, ["-n", "file"], False),
    ("a commit", COMMIT, [], False),
    ("a word that begins so", b"objection\n", [], False),
    ("a second line", b"\nobject x\n", [], False),
]


@under("content, options, is_tag", TAGS, "no key", "a second line")
def test_a_tag_that_git_makes_all_the_same_is_said_to_be_unsigned(
        shim: Shim, content: bytes, options: List[str], is_tag: bool) -> None:  # fmt: skip
    """Git before 2.43.2 makes it whatever the signer says, and it would be taken for signed."""
    shim.file("t", content)
    line = said(shim("-Y", "sign", *options, "t", env=NOWHERE))
    assert line.endswith("; this tag is NOT signed: git tag -d it") == is_tag
    assert ("tag" in line) == is_tag


# ---------------------------------------------------------------- files


NAMES = each(HOSTILE_NAMES)
FEW_NAMES = [name for name, value in NAMES if not value.isascii() or "\n" in value]


@under("name", NAMES, *FEW_NAMES, "-")
def test_a_file_a_folder_and_a_socket_may_have_any_name(
        shim: Shim, served: Served, short: Path, name: str) -> None:  # fmt: skip
    (short / f"x{name[:60]}").mkdir()
    there = short / f"x{name[:60]}" / name[:1]
    there.symlink_to(served.socket)
    env = {URL: f"unix:{there}"}
    folder = shim.folder / f"x{name[:99]}"
    folder.mkdir()
    for path in (shim.file(name), shim.file(f"{folder.name}/m")):
        operand = str(path.relative_to(shim.folder))
        fine(shim.sign("--", "./-" if name == operand == "-" else operand, env=env))
    fine(shim.sign("-f", f"{folder}/k", f"./{name}", env=env))
    assert {p.name for p in folder.iterdir()} == {"m", "m.sig", "k.pub"}
    assert shim.signature(name) == (folder / "m.sig").read_bytes()


NO_SIGNATURE_OF = {
    "usage:usage: a\x1b[2J\nb": f"cannot be signed: usage usage  a?[2J?b: {NO_SUCH}",
    "closed": "cannot be signed: closed cannot be read: permission denied",
    "n": "cannot write n.sig: is it a folder, or its own not writable, or the disk full?",
    "shut/m": "cannot write shut/m.sig: is it a folder, or its own not writable, or the disk full?",
}
UNUSABLE = [
    *((f"signed {key}", ["-Y", "sign", name], "", NO_SIGNATURE_OF[name])
      for key, name in each(NO_SIGNATURE_OF)),
    *((key, ["pubkey"], name, f"SSH_AGENT_PROXY_TOKEN_FILE gives no token: {NO_TOKEN_IN[name]}")
      for key, name in each(NO_TOKEN_IN)),
]  # fmt: skip


@under("argv, token_file, told", UNUSABLE, "missing", "closed", "comments", "signed shut/m")
def test_what_cannot_be_read_or_written_is_an_error_before_anyone_is_asked(
        shim: Shim, liar: Any, argv: List[str], token_file: str, told: str) -> None:  # fmt: skip
    server = liar(served_key(LINE))
    for folder in ("folder", "n.sig", "shut", "closed folder"):
        (shim.folder / folder).mkdir()
    for name, content in {"empty": "", "comments": "# x\n\n \n", "n": "x", "shut/m": "x"}.items():
        shim.file(name, content.encode())
    (shim.folder / "link").symlink_to("/nowhere/token")
    shim.file("closed").chmod(0)
    for folder, mode in (("closed folder", 0), ("shut", 0o555)):
        (shim.folder / folder).chmod(mode)
    env = {**server.env, "SSH_AGENT_PROXY_TOKEN_FILE": token_file}
    assert said(shim(*argv, env=env, before=bound_by_modes())) == told
    for folder in ("closed folder", "shut"):
        (shim.folder / folder).chmod(0o755)
    assert server.requests == []


@pytest.mark.parametrize("argv, taken", [(["m"], 6), ([], 10)], ids=["beside m", "in TMPDIR"])
def test_names_that_others_have_taken_are_left_alone(
    shim: Shim, served: Served, signed: bytes, argv: List[str], taken: int
) -> None:
    """Who may write there too could read, or change, what is signed; or would lose their file."""
    precious = shim.file("precious", b"precious")
    dangling = shim.folder / "dangling"
    made = [f"ln -s {precious}", f"ln -s {dangling}", "mkfifo", "ln -s /dev/full", ": >"] * 2
    folder = "." if argv else '"$TMPDIR"'
    # The process keeps its number over exec, and with it the names that it tries first.
    taking = [f"{made[digit]} {folder}/.{OURS}.$$.{digit}\n" for digit in range(taken)]
    before = ["sh", "-c", f'{"".join(taking)}exec "$@"', "sh"]
    done = shim.sign(*argv, input=COMMIT, env=served, before=before)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (shim.signature() if argv else done.stdout) == signed
    assert precious.read_bytes() == b"precious"
    assert not dangling.exists()
    left = [Path(path) for path in shim.temporary()]
    assert len(left) == taken
    for path in left:
        path.unlink()


@on_linux
@pytest.mark.parametrize("room", [0, 4096], ids=["for nothing", "for the answer only"])
def test_a_full_disk_leaves_what_was_there(shim: Shim, liar: Any, room: int) -> None:
    """On a file system of our own, filled up to the room that is given."""
    server = liar(answer(ARMOR))
    script = f"""
        mount -t tmpfs -o size=64k none disk && cd disk || exit 99
        printf 'commit\\n' >m; printf before >m.sig
        cat /dev/zero >filler 2>/dev/null
        [ {room} = 0 ] || {{ rm filler; head -c {60 * 1024 - 2 * 4096 - room} /dev/zero >filler; }}
        "$@"
        echo "$?"; cat m.sig; ls -A
    """
    (shim.folder / "disk").mkdir()
    done = shim("-Y", "sign", "m", env=server.env, before=in_a_namespace(script))
    if room:
        assert done.stdout == b"0\n" + ARMOR + b"filler\nm\nm.sig\n", done.stderr
    else:
        assert done.stdout == b"1\nbeforefiller\nm\nm.sig\n", done.stderr
        assert b"disk" in done.stderr


# ---------------------------------------------------------------- standard input and output


@on_linux
@pytest.mark.parametrize("where", [">/dev/full", ">&-"], ids=["full", "closed"])
@pytest.mark.parametrize("argv", [["-Y", "sign"], ["pubkey"], ["key"]], ids=" ".join)
def test_input_and_output_that_are_not_there_are_errors(
        shim: Shim, served: Served, argv: List[str], where: str) -> None:  # fmt: skip
    before = ["sh", "-c", f'exec "$@" {where}', "sh"]
    assert said(shim(*argv, env=served, input=COMMIT, before=before)).endswith(
        "could not be written"
    )
    before = ["sh", "-c", 'exec "$@" <&-', "sh"]
    assert said(shim("-Y", "sign", before=before)) == "there is no standard input to sign"


@on_linux
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2>unread"])
def test_a_failure_that_cannot_be_told_is_none_the_less_and_leaves_nothing_behind(
        shim: Shim, where: str) -> None:  # fmt: skip
    """A program that calls git may read its output alone."""
    os.mkfifo(shim.folder / "unread")
    shim.file(GITS_FILE)
    before = ["sh", "-c", f'exec 3<>unread && exec "$@" {where} 3<&-', "sh"]
    for argv in (["key"], ["pubkey"], ["-Y", "sign", GITS_FILE], ["-Y", "sign", "m"]):
        done = shim(*argv, env=NOWHERE, before=before)
        assert (done.returncode == 0) == (argv == ["key"] and done.stdout.startswith(b"ssh-"))
        assert os.listdir(shim.env["TMPDIR"]) == []
    assert where == "2>unread" or b"AIAAAA" in shim("key", env=NOWHERE, before=before).stdout
    assert shim.files() == [GITS_FILE, "m"]


@on_linux
def test_where_descriptors_cannot_be_seen_nothing_is_left_in_the_folder_for_temporary_files(
        shim: Shim, guarded: Served, well_asked: Any, liar: Any) -> None:  # fmt: skip
    """Sandboxes without /proc have no /dev/fd either: it would be ten files a commit."""
    before = in_a_namespace('mount -t tmpfs none /proc && exec "$@"')
    shim.argv[:0] = before
    for way in ("stdin", "pubkey", "key"):
        env = {**guarded, "SSH_AGENT_PROXY_TOKEN": TOKENS["variable"]}
        well_asked(shim, way, ask(shim, way, env))
    assert os.listdir(shim.env["TMPDIR"]) == []
    # Nor need they be seen by what gets no token.
    env.update({**NOWHERE, PUBKEY_URL: liar(served_key(LINE)).url, "TMPDIR": "/nowhere"})
    fine(shim("pubkey", env=env), f"{LINE} me\n".encode())


def test_standard_input_that_cannot_be_kept_whole_is_not_signed(shim: Shim, liar: Any) -> None:
    """On a full disk, or beyond what a file may hold, the signature would be that of a part."""
    server = liar(answer(ARMOR))
    before = ["sh", "-c", 'trap "" XFSZ; ulimit -f 8; exec "$@"', "sh"]
    done = shim.sign(input=COMMIT * 99, env=server.env, before=before)
    assert said(done) == "standard input could not be kept: is the disk full?"
    assert server.requests == []


# ---------------------------------------------------------------- interruptions

INTERRUPTED = [
    (signal.SIGINT, ["-Y", "sign", "m"], ""),
    (signal.SIGINT, ["-Y", "sign"], "s3cr3t"),
    (signal.SIGTERM, ["-Y", "sign", "m"], "s3cr3t"),
    (signal.SIGTERM, ["-Y", "sign", GITS_FILE], ""),
    (signal.SIGTERM, ["pubkey", "k"], "s3cr3t"),
    (signal.SIGHUP, ["-Y", "sign"], ""),
    (signal.SIGHUP, ["pubkey", "k"], ""),
]


@pytest.mark.parametrize("number", [0, *SIGNALS])
def test_standard_input_is_read_whole_before_anyone_is_asked(
        shim: Shim, liar: Any, number: int) -> None:  # fmt: skip
    """A slow producer would be cut off, and a second try would sign half."""
    server = liar(answer(ARMOR))
    process = shim.start("-Y", "sign", env=server.env, stdin=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(b"slow")
    process.stdin.flush()

    def copies() -> List[Path]:
        return [path for path in map(Path, shim.temporary()) if path.read_bytes() == b"slow"]

    (copy,) = wait_for(copies, message="the copy")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert server.requests == []
    if number:
        process.send_signal(number)
        assert process.wait(10) == SIGNALS[signal.Signals(number)]
        process.communicate()
        return
    assert process.communicate(b" producer", timeout=30) == (ARMOR, b"")
    assert server.requests[0].endswith(b"\r\n\r\nslow producer")
    assert sent(server.requests[0], "Content-Length") == "13"


@pytest.mark.parametrize("number, argv, token", INTERRUPTED)
def test_an_interrupted_wait_leaves_nothing_behind(
    each_shim: Shim, liar: Any, number: signal.Signals, argv: List[str], token: str
) -> None:
    """The agent's prompt would stay open, and a file in the working tree."""
    server: Liar = liar(lambda connection: server.hold(connection))
    for name in ("m", GITS_FILE):
        each_shim.file(name)
    process = each_shim.start(*argv, env={**server.env, "SSH_AGENT_PROXY_TOKEN": token})
    wait_for(lambda: server.requests, message="the request")
    process.send_signal(number)
    assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == SIGNALS[number]
    wait_for(lambda: server.left, message="the end of curl")
    assert each_shim.files() == [GITS_FILE, "m"]
    assert os.listdir(each_shim.env["TMPDIR"]) == []


@on_linux
def test_an_output_that_nobody_takes_is_no_fault_of_the_file(shim: Shim, liar: Any) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, b"full"):
            pass
    os.set_blocking(writing, True)
    server = liar(answer(ARMOR))
    process = shim.start("-Y", "sign", env=server.env, stdout=writing)
    wait_for(lambda: server.requests and not shim.temporary(), message="the signature")
    time.sleep(0.1)  # it is about to write; sooner its trap would end it as well
    process.send_signal(signal.SIGTERM)
    os.close(reading)
    assert process.communicate(timeout=10)[1] == b""
    os.close(writing)


@on_linux
def test_an_interruption_just_after_the_fork_leaves_no_curl_alone(shim: Shim, liar: Any) -> None:
    """Its number is not known yet. (Those two may miss a signal in their own `wait`, and go on.)"""
    if shim.argv[0] in ("yash", "zsh"):
        return
    server: Liar = liar(lambda connection: server.hold(connection))
    for _ in range(40):
        process = shim.start("-Y", "sign", "m", env=server.env)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text() and process.poll() is None:
            pass  # some microseconds matter
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            # To the two of pdksh's line it may come just before their `wait`, too.
            assert shim.argv[0] in ("mksh", "posh")
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=5)
    wait_for(lambda: len(server.left) == len(server.requests), message="the end of each curl")
    assert shim.files() == ["m"]


# ---------------------------------------------------------------- the terminal

# Takes the terminal named first for its own and every orphan for its child, then runs the rest
# there; says how many orphans it was left.
ON_TERMINAL = """
import ctypes, fcntl, os, signal, subprocess, sys, termios
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
child = os.fork()
if not child:
    if sys.argv[2] == "background":
        settings = termios.tcgetattr(terminal)
        settings[3] |= termios.TOSTOP
        termios.tcsetattr(terminal, termios.TCSANOW, settings)
        os.setpgid(0, 0)
    os.close(terminal)
    os.execvp(sys.argv[3], sys.argv[3:])
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.close(terminal)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
orphans = 0
try:
    while True:
        os.wait()
        orphans += 1
except ChildProcessError:
    print(status, orphans, flush=True)
"""
ANNOUNCEMENT = b"ssh-agent-proxy-sign: waiting for ssh-agent-proxy: touch your key?\r\n"


class Terminal:
    """A pseudo-terminal, and what was written to it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.name = os.ttyname(self.slave)

    def start(
        self, shim: Shim, server: Liar, *names: str, where: str = "foreground"
    ) -> subprocess.Popen[bytes]:
        """Has the SERVER sign those files."""
        shim.argv = [sys.executable, "-c", ON_TERMINAL, self.name, where, *shim.argv]
        return shim.start("-Y", "sign", *names, env=server.env)

    def read(self, seconds: float) -> bytes:
        """What arrives within SECONDS, as soon as it does."""
        ready, _, _ = select.select([self.master], [], [], seconds)
        return os.read(self.master, 65536) if ready else b""


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    yield (made := Terminal())
    os.close(made.master)
    os.close(made.slave)


def descendants(pid: int) -> List[int]:
    children: List[str] = []
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for child in map(int, children) for one in (child, *descendants(child))]


def the_timers_sleep(process: subprocess.Popen[bytes]) -> List[int]:
    """The shim, curl, the timer, and what that sleeps with, once all of them are there."""
    wait_for(lambda: len(descendants(process.pid)) >= 4, message="the timer's sleep")
    return descendants(process.pid)


def open_files(pid: int) -> List[str]:
    with contextlib.suppress(OSError):
        return [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return []


@on_linux
@pytest.mark.parametrize("where", ["foreground", "background"])
def test_a_wait_is_announced_on_the_terminal_and_holds_nothing_of_gits(
        shim: Shim, liar: Any, terminal: Terminal, where: str) -> None:  # fmt: skip
    """Nobody would know that the key waits to be touched; or git would wait for the timer."""
    if (shim.argv[0], where) == ("ksh", "background"):
        return  # it stops at the first word all the same
    started, opened = time.monotonic(), threading.Event()
    process = terminal.start(shim, liar(opened_by(opened, answer(ARMOR))), "m", where=where)
    assert terminal.read(20) == ANNOUNCEMENT
    assert time.monotonic() - started >= 2
    family = the_timers_sleep(process)
    git_holds = {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (1, 2)}
    assert all(name.startswith("pipe:") for name in git_holds)
    for pid in family[1:]:
        assert not git_holds & set(open_files(pid)), "git would wait for this one"
    opened.set()
    assert process.communicate(timeout=10) == (b"0 0\n", b"")
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)
    assert shim.signature() == ARMOR
    assert terminal.read(0) == b"", "said once"


@on_linux
@pytest.mark.long
def test_a_wait_for_a_busy_proxy_is_announced_once(
        shim: Shim, liar: Any, terminal: Terminal) -> None:  # fmt: skip
    process = terminal.start(shim, liar(*[busy("1")] * 4, answer(ARMOR)), "m")
    assert process.communicate(timeout=30) == (b"0 0\n", b"")
    assert terminal.read(0) == ANNOUNCEMENT
    assert shim.signature() == ARMOR


@on_linux
def test_a_terminal_that_was_stopped_does_not_hold_up_a_signature(
        shim: Shim, liar: Any, terminal: Terminal) -> None:  # fmt: skip
    """By Ctrl-S, or because nobody reads what an editor's terminal says."""
    opened = threading.Event()
    termios.tcflow(terminal.slave, termios.TCOOFF)
    process = terminal.start(shim, liar(opened_by(opened, answer(ARMOR))), "m")
    the_timers_sleep(process)
    time.sleep(2.5)
    opened.set()
    assert process.communicate(timeout=10)[0].startswith(b"0 ")
    termios.tcflow(terminal.slave, termios.TCOON)
    assert shim.signature() == ARMOR


@on_linux
@pytest.mark.parametrize("success", [True, False])
def test_quick_answers_are_not_announced_and_leave_no_process_to_process_one(
        each_shim: Shim, liar: Any, terminal: Terminal, success: bool) -> None:  # fmt: skip
    """In a container that is often a program that waits for none of them."""
    opened, answered = threading.Event(), answer(ARMOR if success else b"")
    names = [each_shim.file(f"m{number}").name for number in range(5)]
    process = terminal.start(each_shim, liar(opened_by(opened, answered)), *names)
    family = the_timers_sleep(process)
    opened.set()
    told, _ = process.communicate(timeout=30)
    assert told == (b"0 0\n" if success else b"1 0\n"), "status and orphans"
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)
    assert terminal.read(0) == b""


@on_linux
def test_ctrl_c_at_the_terminal_ends_all_of_it(shim: Shim, liar: Any, terminal: Terminal) -> None:
    server: Liar = liar(lambda connection: server.hold(connection))
    process = terminal.start(shim, server, "m")
    family = the_timers_sleep(process)
    wait_for(lambda: server.requests, message="the request")
    os.write(terminal.master, b"\x03")
    assert process.communicate(timeout=10) == (b"130 0\n", b"")
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)
    assert shim.files() == ["m"]


# ---------------------------------------------------------------- the file's own rules


def test_the_shim_needs_no_program_but_those_that_are_promised(
        one_shim: Shim, served: Served, signed: bytes) -> None:  # fmt: skip
    bin_folder = one_shim.folder / "bin"
    bin_folder.mkdir()
    for name in ["curl", "mktemp", "mv", "rm", "cat", "mkdir", "chmod", "sleep"]:
        (bin_folder / name).symlink_to(Path(need(name, name)).resolve())
    one_shim.argv[0] = str(Path(need("dash", "dash")).resolve())
    key = f"{one_shim.folder}/a/k"
    for argv in (["-Y", "sign", "-f", key, "m"], ["-Y", "sign"], ["pubkey"], ["pubkey", "k2"],
                 ["key"]):  # fmt: skip
        done = one_shim(*argv, env={**served, "PATH": str(bin_folder)}, input=COMMIT)
        assert (done.returncode, done.stderr) == (0, b""), argv
    assert one_shim.signature() == signed


MANY_LINES = pytest.param("dash", 2, marks=pytest.mark.long, id="dash-each other")
SOME_LINES = [on("dash", 20), *(on(shell, 60) for shell in SHELLS[1:])]


@pytest.mark.parametrize("shim, step", [*SOME_LINES, MANY_LINES], indirect=["shim"])
def test_a_download_that_broke_off_never_looks_like_a_signature_made(
        shim: Shim, liar: Any, step: int) -> None:  # fmt: skip
    """Git would take exit 0 for it, and some make an unsigned commit then."""
    size = SHIM.stat().st_size
    # But for those of the first two lines, whose loss no program can tell.
    lines = [found.end() for found in re.finditer(b"\\n", SHIM.read_bytes())][2:]
    server = liar(answer(ARMOR))
    shim.argv[-1] = str(shim.folder / "part")
    for end in [*lines[:-1:step], *range(size - 16, size)]:
        shim.file("part", SHIM.read_bytes()[:end])
        done = shim.sign("m", env=server.env)
        made = shim.folder / "m.sig"
        assert made.exists() == (done.returncode == 0), f"cut at {end}"
        if made.exists():
            assert made.read_bytes() == ARMOR, f"cut at {end}"
            made.unlink()
