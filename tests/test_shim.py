"""The shim: beside the real ssh-keygen, under many shells, and before servers that lie."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import pty
import re
import select
import shlex
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import pytest
from conftest import (
    ROOT,
    SHIM,
    Agent,
    Keys,
    Proxy,
    clean_env,
    need,
    run,
    wait_for,
)

Done = subprocess.CompletedProcess  # of bytes

BEGIN = b"-----BEGIN SSH SIGNATURE-----\n"
END = b"-----END SSH SIGNATURE-----\n"
ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI"
NOBODY = f"{ED25519}AIA{'A' * 40}"
ANYBODY = f"{ED25519}{'A' * 43}"
LINE = f"{ED25519}G+AP/nFcsfyv59CnvXHrJIzz616r+Cxm5ewm+0N3Qhw"
OTHER = f"{ED25519}H{'B' * 42}"
COMMIT = b"tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\nauthor A <a@b> 0 +0000\n\nmessage\n"
TAG = b"object 4b825dc642cb6eb9a060e54bf8d69288fbee4904\ntype tree\ntag v1\n\nmessage\n"
OURS = "ssh-agent-proxy-sign"



def armored(line: str = LINE, namespace: str = "git", hash: str = "sha512") -> bytes:
    """What looks like a signature by the key in LINE (PROTOCOL.sshsig); its last field does not."""

    def string(data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + data

    key = base64.b64decode(line.split()[1])
    fields = [key, namespace.encode(), b"", hash.encode(), string(b"ssh-ed25519") + bytes(68)]
    blob = b"SSHSIG" + (1).to_bytes(4, "big") + b"".join(map(string, fields))
    text = base64.b64encode(blob)
    return BEGIN + b"".join(text[i : i + 70] + b"\n" for i in range(0, len(text), 70)) + END


ARMOR = armored()
HOSTILE_NAMES = [
    "a b",
    " ",
    "-x",
    "--help",
    "-",
    "a[1]{x,y}",
    "@a",
    "a;type=x",
    "a,b",
    "a\nb",
    "a\\b",
    '"a"',
    "'a'",
    "$(id)",
    "`id`",
    "*",
    "?",
    "~",
    "#1",
    "%41",
    "\u00e4\u202e",
    "a\x1b[2J",
    "x" * 240,
]

# How each shell is called, as what it is called here, and the package that has it.
SHELLS: Dict[str, Tuple[List[str], str]] = {
    "dash": (["dash"], "dash"),
    "bash": (["bash"], "bash"),
    "busybox": (["busybox", "sh"], "busybox"),
    "zsh": (["zsh", "--emulate", "sh"], "zsh"),
    "ksh": (["ksh"], "ksh"),
    "mksh": (["mksh"], "mksh"),
    "yash": (["yash"], "yash"),
    "posh": (["posh"], "posh"),
}


on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="looks at /proc, /dev/full or a namespace of Linux"
)


class Shim:
    """The shim under one shell, in a folder and a home that it must leave as they were."""

    def __init__(self, shell: Sequence[str], folder: Path, home: Path) -> None:
        self.argv = [*shell, str(SHIM)]
        self.folder = folder
        self.env = clean_env(home)

    def __call__(
        self,
        *args: Union[str, Path],
        input: Optional[bytes] = None,
        env: Optional[Dict[str, str]] = None,
        cwd: Optional[Path] = None,
    ) -> Done[bytes]:
        return run(
            [*self.argv, *args],
            env={**self.env, **(env or {})},
            cwd=cwd or self.folder,
            input=input,
            check=False,
        )

    def sign(self, *args: Union[str, Path], **more: Any) -> Done[bytes]:
        return self("-Y", "sign", "-n", "git", *args, **more)

    def start(self, *args: Union[str, Path], **more: Any) -> subprocess.Popen[bytes]:
        more.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(
            [*self.argv, *map(str, args)],
            env=self.env,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Where the tests run in the background these two are ignored.
            preexec_fn=lambda: [
                signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGQUIT)
            ],
            **more,
        )

    def file(self, name: str = "m", content: bytes = COMMIT) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def key(self, name: str, *lines: str) -> Path:
        path = self.folder / name
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    def temporary(self) -> List[str]:
        """What is left of the shim's own files."""
        folders = [self.folder, Path(self.env["TMPDIR"])]
        return [str(path) for f in folders for path in f.rglob(f"*{OURS}*")]


def make_shim(name: str, folder: Path, home: Path, test: str) -> Shim:
    argv, package = SHELLS[name]
    need(argv[0], package)
    return Shim(argv, folder, home)


def leaves_nothing(shim: Shim) -> None:
    assert shim.temporary() == []


@pytest.fixture(params=["dash", "bash", "busybox"])
def shim(request: Any, tmp_path: Path, home: Path) -> Iterator[Shim]:
    """Under each of the shells that /bin/sh is nearly everywhere."""
    yield (made := make_shim(request.param, tmp_path, home, request.node.nodeid))
    leaves_nothing(made)


@pytest.fixture(params=SHELLS)
def any_shim(request: Any, tmp_path: Path, home: Path) -> Iterator[Shim]:
    """Under every shell, for what they do not agree on."""
    yield (made := make_shim(request.param, tmp_path, home, request.node.nodeid))
    leaves_nothing(made)


@pytest.fixture
def one_shim(tmp_path: Path, home: Path) -> Iterator[Shim]:
    """Under /bin/sh, for what does not depend on the shell."""
    yield (made := Shim(["sh"], tmp_path, home))
    leaves_nothing(made)


class Served(Dict[str, str]):
    """The environment of a shim for which the real proxy signs, and what stands behind it."""

    agent: Agent
    proxy: Proxy
    socket: Path  # where it listens, too

    def at(self, where: str) -> Dict[str, str]:
        """The same, asked over http or unix."""
        return {**self, "SSH_AGENT_PROXY_URL": f"unix:{self.socket}"} if where == "unix" else self


@contextlib.contextmanager
def serve(keys: Keys, *options: str, tokens: str = "") -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="sap.", dir="/tmp") as folder:
        home = Path(folder)
        agent = Agent(home / "agent")
        agent.add(keys["ed25519"])
        argv = [sys.executable, str(ROOT / "ssh_agent_proxy.py"), *options,
                "--addr", f"127.0.0.1:0,unix:{home}/socket",
                "--upstream", str(agent.sock)]  # fmt: skip
        if tokens:
            (home / "tokens").touch(0o600)
            (home / "tokens").write_text(tokens)
            argv += ["--token-file", str(home / "tokens")]
        proxy = Proxy(argv, clean_env(home))
        env = Served(SSH_AGENT_PROXY_URL=f"{proxy.url}/sign")
        env.agent, env.proxy, env.socket = agent, proxy, home / "socket"
        try:
            yield env
        finally:
            proxy.stop()
            agent.stop()


@pytest.fixture(scope="module")
def served(keys: Keys) -> Iterator[Served]:
    """One real proxy for all the tests that change nothing about it: the agent holds ed25519."""
    with serve(keys, "--namespace", "git,file,--") as env:
        yield env


# Each is known to the proxy by a name of its own, which the log tells.
TOKENS = {name: f"s3cr3t-{name}.~_+/-Z==" for name in ("variable", "file", "home")}


@pytest.fixture(scope="module")
def guarded(keys: Keys) -> Iterator[Served]:
    """The same with a token file."""
    with serve(keys, tokens="".join(f"{TOKENS[name]} {name}\n" for name in TOKENS)) as env:
        yield env


class Liar:
    """A server that sends what it is told to, once for each connection, the last one for ever."""

    def __init__(self, *answers: Union[bytes, Callable[[socket.socket], None]]) -> None:
        self.answers = list(answers)
        self.requests: List[bytes] = []
        self.gone = threading.Event()
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/sign"
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
            if callable(what):
                what(connection)
            else:
                connection.sendall(what)

    def hold(self, connection: socket.socket) -> None:
        """An agent that waits for a person: no answer until the client has gone."""
        connection.recv(1)
        self.gone.set()

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


def answer(
    body: bytes, status: str = "200 OK", server: Optional[str] = "ssh-agent-proxy/1", **more: str
) -> bytes:
    fields = {"Server": server, "Content-Length": str(len(body)), "Connection": "close", **more}
    lines = [f"{name}: {value}\r\n" for name, value in fields.items() if value is not None]
    return f"HTTP/1.1 {status}\r\n{''.join(lines)}\r\n".encode() + body


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


def verified(keys: Keys, signature: bytes, data: bytes, name: str = "ed25519") -> None:
    """Real ssh-keygen finds the signature good, and made with the key NAME."""
    with tempfile.TemporaryDirectory() as folder:
        signers, armor = Path(folder) / "signers", Path(folder) / "armor"
        signers.write_text(f"me {keys.line(name)}\n")
        armor.write_bytes(signature)
        run(
            ["ssh-keygen", "-Y", "verify", "-n", "git", "-I", "me", "-f", signers, "-s", armor],
            input=data,
        )


# ---------------------------------------------------------------- beside the real ssh-keygen

# Each is given to both, in folders that hold the same files; what comes out must be the same,
# messages aside. KEY is a private key with its .pub, both held by an agent.
COMMAND_LINES = {
    "git's own": "-Y sign -n git -f KEY m",
    "git's own with a literal key": "-Y sign -n git -f KEY -U m",
    "a public key file": "-Y sign -n git -U -f KEY.pub m",
    "options first": "-n git -f KEY -Y sign m",
    "glued": "-Ysign -ngit -fKEY m",
    "grouped": "-qUYsign -n git -f KEY m",
    "grouped, with a value glued": "-qngit -Y sign -f KEY m",
    "grouped, with a value apart": "-Y sign -f KEY -qn git m",
    "quiet": "-q -Y sign -n git -f KEY m",
    "verbose": "-Y sign -vvv -n git -f KEY m",
    "two dashes": "-Y sign -n git -f KEY -- m",
    "two dashes before a dash": "-Y sign -n git -f KEY -- -x",
    "two dashes before two dashes": "-Y sign -n git -f KEY -- --",
    "a value of two dashes": "-Y sign -n git -f KEY -n -- m",
    "no file": "-Y sign -n git -f KEY",
    "a dash": "-Y sign -n git -f KEY -",
    "two dashes and a dash": "-Y sign -n git -f KEY -- -",
    "two dashes and nothing": "-Y sign -n git -f KEY --",
    "several files": "-Y sign -n git -f KEY m n -x",
    "a second file that is missing": "-Y sign -n git -f KEY m missing n",
    "a dash among files": "-Y sign -n git -f KEY m - n",
    "a dash before a file": "-Y sign -n git -f KEY - m",
    "a dash after a file": "-Y sign -n git -f KEY m -",
    "two dashes as files": "-Y sign -n git -f KEY - -",
    "an option after a file": "-Y sign -n git -f KEY m -q",
    "another namespace": "-Y sign -n file -f KEY m",
    "the last namespace": "-Y sign -n file -n git -f KEY m",
    "the last key": "-Y sign -n git -f missing -f KEY m",
    "the last operation": "-Y verify -Y sign -n git -f KEY m",
    "sha256": "-Y sign -n git -f KEY -O hashalg=sha256 m",
    "sha512": "-Y sign -n git -f KEY -Ohashalg=sha512 m",
    "hashalg in capitals": "-Y sign -n git -f KEY -OHASHALG=sha256 m",
    "the last hashalg": "-Y sign -n git -f KEY -O hashalg=md5 -O hashalg=sha256 m",
    "an earlier good hashalg": "-Y sign -n git -f KEY -O hashalg=sha256 -O hashalg=md5 m",
    "another hashalg": "-Y sign -n git -f KEY -O hashalg=md5 m",
    "a hashalg in capitals": "-Y sign -n git -f KEY -O hashalg=SHA256 m",
    "an empty hashalg": "-Y sign -n git -f KEY -O hashalg= m",
    "two hashalgs in one": "-Y sign -n git -f KEY -O hashalg=sha256,sha512 m",
    "an unknown -O": "-Y sign -n git -f KEY -O foo=bar m",
    "an -O of -Y verify": "-Y sign -n git -f KEY -O verify-time=20200101 m",
    "a hashalg without a value": "-Y sign -n git -f KEY -O hashalg m",
    "an unknown option": "-Y sign -n git -f KEY -j m",
    "an unknown option in a group": "-Y sign -n git -f KEY -qj m",
    "a long option": "-Y sign -n git -f KEY --file m",
    "an option without its value": "-Y sign -n git -f",
    "an empty namespace": "-Y sign -n EMPTY -f KEY m",
    "an empty key": "-Y sign -n git -f EMPTY m",
    "an empty file name": "-Y sign -n git -f KEY EMPTY",
    "a missing file": "-Y sign -n git -f KEY missing",
    "a folder": "-Y sign -n git -f KEY folder",
    "a file in a missing folder": "-Y sign -n git -f KEY missing/m",
    "a file in a folder": "-Y sign -n git -f KEY folder/m",
}


# Success, standard output, and the files that are there in the end.
Outcome = Tuple[bool, bytes, Dict[str, bytes]]


def words(line: str, key: Path) -> List[str]:
    return ["" if w == "EMPTY" else w.replace("KEY", str(key)) for w in line.split()]


def tree(folder: Path) -> Dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def real_answers(keys: Keys, served: Served) -> Callable[[str], Outcome]:
    """What the real ssh-keygen does with a command line, asked once."""
    known: Dict[str, Outcome] = {}

    def ask(line: str) -> Outcome:
        if line not in known:
            with tempfile.TemporaryDirectory() as folder:
                lay_out(Path(folder))
                env = clean_env(Path(folder) / "home", SSH_AUTH_SOCK=served.agent.sock)
                done = run(
                    ["ssh-keygen", *words(line, keys["ed25519"])],
                    env=env, cwd=Path(folder), input=COMMIT, check=False,
                )  # fmt: skip
                known[line] = done.returncode == 0, done.stdout, tree(Path(folder))
        return known[line]

    return ask


def lay_out(folder: Path) -> None:
    (folder / "folder").mkdir()
    for name in ("m", "n", "-x", "--", "-", "folder/m"):
        (folder / name).write_bytes(f"this is {name}\n".encode())


@pytest.mark.parametrize("line", COMMAND_LINES.values(), ids=COMMAND_LINES.keys())
def test_a_command_line_does_what_it_does_to_ssh_keygen(
    any_shim: Shim, line: str, keys: Keys, served: Served, real_answers: Any
) -> None:
    lay_out(any_shim.folder)
    done = any_shim(*words(line, keys["ed25519"]), input=COMMIT, env=served)
    success, stdout, files = real_answers(line)
    assert (done.returncode == 0) == success, done.stderr
    assert done.stdout == stdout
    assert tree(any_shim.folder) == files
    if success:
        assert done.stderr == b""
    else:
        assert re.fullmatch(rf"{OURS}: [ -~]+\n", done.stderr.decode()), done.stderr
        assert b"usage:" not in done.stderr


def test_every_command_line_of_the_table_was_tried_for_success_and_failure(
    real_answers: Any,
) -> None:
    outcomes = [real_answers(line)[0] for line in COMMAND_LINES.values()]
    assert outcomes.count(True) > 20
    assert outcomes.count(False) > 15


@pytest.mark.parametrize("size", [1, 511, 4096, 1 << 20, 3 << 20])
def test_a_file_of_any_size_and_content_is_signed_as_it_is(
    one_shim: Shim, size: int, keys: Keys, served: Served
) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    file = one_shim.file("data", data[:size])
    run(["ssh-keygen", "-q", "-Y", "sign", "-n", "git", "-f", keys["ed25519"], file])
    expected = (one_shim.folder / "data.sig").read_bytes()
    assert one_shim.sign("-f", keys["ed25519"], "data", env=served).returncode == 0
    assert (one_shim.folder / "data.sig").read_bytes() == expected
    assert one_shim.sign(input=data[:size], env=served).stdout == expected


@pytest.mark.parametrize(
    "options, fragment",
    [
        (["-C", "comment"], "there is no signing with -C"),
        (["-l"], "there is no signing with -l"),
        (["-s", "file"], "there is no signing with -s"),
        (["-\x1b"], "there is no signing with -?"),
        (["-O", "no\x1b[2Jgood"], "not no?[2Jgood"),
        (["-O", "hashalg=\n"], "-O hashalg=? is unknown"),
        (["-n", "a b"], "namespace a b:"),
        (["-n", "a\r\nSSHSIG-Key: x"], "namespace a??SSHSIG-Key: x:"),
        (["-n", "a,b"], "namespace a,b:"),
        (["-n", "n\u00e4me"], "namespace n??me:"),
        (["-n", "a" * 256], "longer than 255"),
        (["-f", ""], "-f names no key"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused_before_anyone_is_asked(
    shim: Shim, liar: Any, options: List[str], fragment: str
) -> None:
    server = liar(answer(ARMOR))
    shim.file()
    done = shim.sign(*options, "m", env={"SSH_AGENT_PROXY_URL": server.url})
    assert fragment in said(done)
    assert server.requests == []
    assert not (shim.folder / "m.sig").exists()


def test_the_namespace_is_git_where_none_is_named(shim: Shim, liar: Any) -> None:
    server = liar(answer(ARMOR))
    shim.file()
    env = {"SSH_AGENT_PROXY_URL": server.url}
    assert shim("-Y", "sign", "m", env=env).returncode == 0
    assert b"\r\nSSHSIG-Namespace: git\r\n" in server.requests[0]


# ---------------------------------------------------------------- the rest is ssh-keygen's


@pytest.mark.parametrize(
    "operation", ["-l", "-Y verify", "-Y check-novalidate", "-Y find-principals"]
)
def test_what_is_not_signing_is_handed_to_ssh_keygen(
    any_shim: Shim, operation: str, keys: Keys
) -> None:
    folder = any_shim.folder
    any_shim.key("signers", f"me {keys.line('ed25519')}")
    any_shim.file()
    run(["ssh-keygen", "-q", "-Y", "sign", "-n", "git", "-f", keys["ed25519"], "m"], cwd=folder)
    argv = {
        "-l": ["-l", "-f", f"{keys['ed25519']}.pub"],
        "-Y verify": ["-Y", "verify", "-n", "git", "-I", "me", "-f", "signers", "-s", "m.sig"],
        "-Y check-novalidate": ["-Y", "check-novalidate", "-n", "git", "-s", "m.sig"],
        "-Y find-principals": ["-Y", "find-principals", "-f", "signers", "-s", "m.sig"],
    }[operation]
    expected = run(["ssh-keygen", *argv], cwd=folder, input=COMMIT)
    done = any_shim(*argv, input=COMMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected.stdout, expected.stderr)


def test_every_word_arrives_at_ssh_keygen_as_it_was(shim: Shim) -> None:
    bin_folder = shim.folder / "bin"
    bin_folder.mkdir()
    (bin_folder / "ssh-keygen").write_text('#!/bin/sh\nprintf "<%s>" "$@"\nexit 7\n')
    (bin_folder / "ssh-keygen").chmod(0o755)
    argv = ["-Y", "verify", "", "a b", "-x*", "$HOME", "line\nend", "--", "-Y", "sign"]
    done = shim(*argv, env={"PATH": f"{bin_folder}:{os.environ['PATH']}"})
    assert done.returncode == 7
    assert done.stdout.decode() == "".join(f"<{word}>" for word in argv)


def test_without_ssh_keygen_the_package_that_has_it_is_named(shim: Shim) -> None:
    shell = Path(need(shim.argv[0], shim.argv[0])).resolve()
    done = run([shell, *shim.argv[1:], "-Y", "verify"], env={"PATH": "/nowhere"}, check=False)
    assert "package openssh-client" in said(done)


def test_the_shim_under_the_name_of_ssh_keygen_finds_the_real_one(shim: Shim, keys: Keys) -> None:
    bin_folder = shim.folder / "bin"
    bin_folder.mkdir()
    (bin_folder / "ssh-keygen").symlink_to(SHIM)
    path = f"{bin_folder}:{os.environ['PATH']}"
    done = shim("-l", "-f", f"{keys['ed25519']}.pub", env={"PATH": path})
    assert done.stdout.startswith(b"256 SHA256:")


# ---------------------------------------------------------------- which key signs


def sent_key(request: bytes) -> Optional[str]:
    found = re.search(rb"\r\nSSHSIG-Key: ([^\r\n]*)\r\n", request)
    return found.group(1).decode() if found else None


KEY_FILES = {
    "a line": (f"{LINE}\n", LINE),
    "a line with a comment": (f"{LINE} me@home and more\n", LINE),
    "no line end": (LINE, LINE),
    "a carriage return": (f"{LINE}\r\n", LINE),
    "a carriage return after the comment": (f"{LINE} me\r\n", LINE),
    "comments and empty lines first": (f"# x\n\n#\n{LINE} me\n", LINE),
    "blanks before and between": (f"  \t{LINE.replace(' ', chr(9) + ' ')}  me\n", LINE),
    "the first of two": (f"{LINE} me\n{LINE}AA you\n", LINE),
    "garbage first": (f"hello\n{LINE}\n", LINE),
    "a certificate": (
        "ssh-ed25519-cert-v01@openssh.com AAAAIHNz c\n",
        "ssh-ed25519-cert-v01@openssh.com AAAAIHNz",
    ),
    "a security key": (
        "sk-ssh-ed25519@openssh.com AAAAGnNr+w== c\n",
        "sk-ssh-ed25519@openssh.com AAAAGnNr+w==",
    ),
    "the key that nobody holds": (f"{NOBODY} {OURS}\n", None),
}


@pytest.mark.parametrize("content, expected", KEY_FILES.values(), ids=KEY_FILES.keys())
@pytest.mark.parametrize("suffix", ["", ".pub"])
def test_the_key_in_the_file_is_asked_for_without_its_comment(
    shim: Shim, liar: Any, content: str, expected: Optional[str], suffix: str
) -> None:
    server = liar(answer(armored(expected or OTHER)))
    shim.file()
    (shim.folder / f"key{suffix}").write_bytes(content.encode())
    done = shim.sign("-f", "key", "m", env={"SSH_AGENT_PROXY_URL": server.url})
    assert done.returncode == 0, done.stderr
    assert sent_key(server.requests[0]) == expected


def test_no_key_named_is_the_proxys_own_choice_and_nothing_is_fetched(
    shim: Shim, liar: Any
) -> None:
    server = liar(answer(ARMOR))
    shim.file()
    assert shim.sign("m", env={"SSH_AGENT_PROXY_URL": server.url}).returncode == 0
    assert [r.split()[:2] for r in server.requests] == [[b"POST", b"/sign"]]
    assert sent_key(server.requests[0]) is None


def test_a_key_in_a_pipe_is_read(shim: Shim, liar: Any) -> None:
    server = liar(answer(ARMOR))
    shim.file()
    shim.env["SSH_AGENT_PROXY_URL"] = server.url
    reading, writing = os.pipe()
    os.write(writing, f"{LINE}\n".encode())
    os.close(writing)
    process = shim.start(
        "-Y", "sign", "-f", f"/dev/fd/{reading}", "m", pass_fds=[reading]
    )
    os.close(reading)
    assert process.communicate(timeout=30) == (b"", b"")
    assert sent_key(server.requests[0]) == LINE


UNUSABLE_KEYS = {
    "a GPG id": ("ABCDEF0123456789", {}, "ABCDEF0123456789, which is no file"),
    "an address": ("me@example.com", {}, "me@example.com, which is no file"),
    "a literal key": (f"key::{LINE}", {}, "which is a key where this git takes only a file"),
    "a private key": ("./key", {"key": "-----BEGIN OPENSSH PRIVATE KEY-----\n"}, "private one"),
    "a public key in a private one": (
        "./key",
        {"key": f"-----BEGIN OPENSSH PRIVATE KEY-----\n{LINE}\n"},
        "no public key in ./key",
    ),
    "another text": ("./key", {"key": "hello world\n"}, "no public key in ./key"),
    "another text in .pub": ("./key", {"key.pub": "hello world\n"}, "nor in ./key.pub"),
    "a key with a bad type": ("./key", {"key": "ssh-\x1b AAAA\n"}, "no public key in ./key"),
    "a key with a bad blob": ("./key", {"key": "ssh-rsa AAAA\x1bB\n"}, "no public key in ./key"),
    "a header in the blob": ("./key", {"key": "ssh-rsa AAAA:x\n"}, "no public key in ./key"),
    "a name with an escape": ("\x1b]0;x\x07/../me@home\u202e", {}, None),
}


@pytest.mark.parametrize("key, files, fragment", UNUSABLE_KEYS.values(), ids=UNUSABLE_KEYS.keys())
def test_no_other_key_signs_where_git_names_one_without_a_public_key(
    shim: Shim, liar: Any, key: str, files: Dict[str, str], fragment: Optional[str]
) -> None:
    server = liar(answer(b"no\n", "503 Service Unavailable"))
    shim.file()
    for name, content in files.items():
        (shim.folder / name).write_text(content)
    line = said(shim.sign("-f", key, "m", env={"SSH_AGENT_PROXY_URL": server.url}))
    if fragment:
        assert fragment in line
        assert server.requests == []
    assert not (shim.folder / "m.sig").exists()


def test_a_key_that_cannot_be_read_is_not_replaced(one_shim: Shim, liar: Any) -> None:
    server = liar(answer(f"{LINE}\n".encode()))
    one_shim.file()
    (one_shim.folder / "key.pub").mkdir()
    done = one_shim.sign("-f", "./key.pub", "m", env={"SSH_AGENT_PROXY_URL": server.url})
    assert "no public key in ./key.pub" in said(done)
    assert server.requests == []


@pytest.mark.parametrize(
    "name, written", [("k.pub", "k.pub"), ("k", "k.pub"), ("a/b/k", "a/b/k.pub")]
)
@pytest.mark.parametrize("empty", [False, True], ids=["missing", "empty"])
def test_a_key_file_that_is_not_there_is_fetched(
    shim: Shim, keys: Keys, served: Served, name: str, written: str, empty: bool
) -> None:
    shim.file()
    path = shim.folder / written
    if empty:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    done = shim.sign("-f", shim.folder / name, "m", env=served)
    assert (done.returncode, done.stderr) == (0, b"")
    verified(keys, (shim.folder / "m.sig").read_bytes(), COMMIT)
    assert path.read_text().splitlines()[1] == keys.line("ed25519")
    assert path.read_text().startswith("# fetched from ssh-agent-proxy")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    fingerprint = run(["ssh-keygen", "-l", "-f", path]).stdout
    assert fingerprint == run(["ssh-keygen", "-l", "-f", f"{keys['ed25519']}.pub"]).stdout


def test_a_folder_made_for_the_key_is_the_users_own(
    one_shim: Shim, served: Served
) -> None:
    one_shim.file()
    assert one_shim.sign("-f", one_shim.folder / ".ssh/k", "m", env=served).returncode == 0
    assert stat.S_IMODE((one_shim.folder / ".ssh").stat().st_mode) == 0o700


def test_where_the_fetched_key_cannot_be_written_it_signs_all_the_same(
    shim: Shim, keys: Keys, served: Served
) -> None:
    shim.file()
    shim.file("notafolder")
    done = shim.sign("-f", shim.folder / "notafolder/k.pub", "m", env=served)
    assert (done.returncode, done.stderr) == (0, b"")
    verified(keys, (shim.folder / "m.sig").read_bytes(), COMMIT)


def test_a_key_that_cannot_be_fetched_is_an_error_and_leaves_no_file(
    shim: Shim, liar: Any
) -> None:
    server = liar(answer(b"the agent lists no keys\n", "503 Service Unavailable"))
    shim.file()
    done = shim.sign("-f", "./k.pub", "m", env={"SSH_AGENT_PROXY_URL": server.url})
    assert "/publickey answered 503: the agent lists no keys" in said(done)
    assert sorted(p.name for p in shim.folder.iterdir() if p.name != "sap") == ["m"]


@pytest.mark.parametrize("body", [b"", b"\n", b"hello\n", b"ssh-rsa\n", b"<p>\n", b"ssh-rsa A:\n"])
def test_what_is_no_public_key_is_not_taken_for_one(one_shim: Shim, liar: Any, body: bytes) -> None:
    server = liar(answer(body))
    one_shim.file()
    env = {"SSH_AGENT_PROXY_URL": server.url}
    assert "200 without a public key" in said(one_shim.sign("-f", "./k.pub", "m", env=env))
    assert "200 without a public key" in said(one_shim("pubkey", env=env))
    assert not (one_shim.folder / "k.pub").exists()


def test_two_first_commits_at_once_fetch_the_key_both(
    shim: Shim, keys: Keys, served: Served
) -> None:
    shim.env.update(served)
    names = [f"m{number}" for number in range(4)]
    for name in names:
        shim.file(name)
    key = shim.folder / "k.pub"
    started = [shim.start("-Y", "sign", "-n", "git", "-f", str(key), name) for name in names]
    for process in started:
        assert process.communicate(timeout=60) == (b"", b"")
        assert process.returncode == 0
    for name in names:
        verified(keys, (shim.folder / f"{name}.sig").read_bytes(), COMMIT)
    assert key.read_text().splitlines()[1] == keys.line("ed25519")


# ---------------------------------------------------------------- rotation


@pytest.fixture
def rotating(agent: Agent, keys: Keys, start_proxy: Callable[..., Proxy]) -> Tuple[Agent, str]:
    agent.add(keys["ed25519"])
    return agent, f"{start_proxy(upstream=agent.sock).url}/sign"


def rotate(agent: Agent, keys: Keys) -> None:
    agent.delete_all()
    agent.add(keys["other"])


def test_a_fetched_key_that_was_rotated_is_replaced_and_signs(
    shim: Shim, keys: Keys, rotating: Tuple[Agent, str]
) -> None:
    agent, url = rotating
    shim.file()
    assert shim.sign("-f", "./k", "m", env={"SSH_AGENT_PROXY_URL": url}).returncode == 0
    rotate(agent, keys)
    done = shim.sign("-f", "./k", "m", env={"SSH_AGENT_PROXY_URL": url})
    assert (done.returncode, done.stderr) == (0, b"")
    verified(keys, (shim.folder / "m.sig").read_bytes(), COMMIT, "other")
    lines = (shim.folder / "k.pub").read_text().splitlines()
    assert lines[0].startswith("# fetched from ssh-agent-proxy")
    assert lines[1:] == [keys.line("other")]


def test_standard_input_is_signed_again_after_a_rotation(
    shim: Shim, keys: Keys, rotating: Tuple[Agent, str]
) -> None:
    agent, url = rotating
    env = {"SSH_AGENT_PROXY_URL": url}
    assert shim.sign("-f", "./k", input=COMMIT, env=env).returncode == 0
    rotate(agent, keys)
    verified(keys, shim.sign("-f", "./k", input=COMMIT, env=env).stdout, COMMIT, "other")


def test_a_key_that_the_user_chose_is_never_replaced(
    shim: Shim, keys: Keys, rotating: Tuple[Agent, str]
) -> None:
    agent, url = rotating
    shim.file()
    shim.key("k.pub", "# mine", keys.line("ed25519"))
    rotate(agent, keys)
    line = said(shim.sign("-f", "./k", "m", env={"SSH_AGENT_PROXY_URL": url}))
    assert "answered 404: " in line
    assert "(asked for the key in ./k.pub)" in line
    assert (shim.folder / "k.pub").read_text() == f"# mine\n{keys.line('ed25519')}\n"


def test_a_file_that_git_made_for_this_signature_is_not_named(
    shim: Shim, keys: Keys, rotating: Tuple[Agent, str]
) -> None:
    agent, url = rotating
    shim.file()
    shim.key(".git_signing_key_tmpAbCdEf", keys.line("ed25519"))
    rotate(agent, keys)
    key = "./.git_signing_key_tmpAbCdEf"
    line = said(shim.sign("-f", key, "m", env={"SSH_AGENT_PROXY_URL": url}))
    assert "answered 404: " in line
    assert "git_signing_key" not in line
    assert not (shim.folder / "m.sig").exists()


REFUSALS = {
    "not held": ("404 Not Found", "the agent does not hold it", "ssh-agent-proxy/1", True),
    "another is pinned": ("403 Forbidden", "this proxy signs with x", "ssh-agent-proxy/1", True),
    "a person's no": ("403 Forbidden", "not agreed to", "ssh-agent-proxy/1", False),
    "a policy's no": ("403 Forbidden", "this is no commit", "ssh-agent-proxy/1", False),
    "the agent's no": ("403 Forbidden", "the agent refuses", "ssh-agent-proxy/1", False),
    "no agent": ("503 Unavailable", "no agent", "ssh-agent-proxy/1", False),
    "another server's": ("404 Not Found", "no such page", "nginx", False),
    "another server's pin": ("403 Forbidden", "this proxy signs with x", "nginx", False),
}


@pytest.mark.parametrize("status, reason, server, other", REFUSALS.values(), ids=REFUSALS.keys())
def test_another_key_is_tried_once_and_no_refusal_is_asked_around(
    shim: Shim, liar: Any, status: str, reason: str, server: str, other: bool
) -> None:
    """What a person, a policy or the agent has refused must not be signed with another key."""
    refusal = answer(f"{reason}\n".encode(), status, server)
    there = liar(refusal, answer(f"{OTHER} x\n".encode()), refusal)
    shim.file()
    shim.key("k.pub", "# fetched from ssh-agent-proxy, replaced", LINE)
    line = said(shim.sign("-f", "./k.pub", "m", env={"SSH_AGENT_PROXY_URL": there.url}))
    assert (reason if server != "nginx" else "is not ssh-agent-proxy") in line
    methods = [request.split()[0] for request in there.requests]
    assert methods == ([b"POST", b"GET", b"POST"] if other else [b"POST"])
    assert (OTHER in (shim.folder / "k.pub").read_text()) == other


def test_the_refusal_is_told_when_there_is_no_other_key(shim: Shim, liar: Any) -> None:
    server = liar(answer(b"not held\n", "404 Not Found"), answer(f"{LINE}\n".encode()))
    shim.file()
    shim.key("k.pub", "# fetched from ssh-agent-proxy, replaced", LINE)
    done = shim.sign("-f", "./k.pub", "m", env={"SSH_AGENT_PROXY_URL": server.url})
    assert "answered 404: not held" in said(done)
    assert len(server.requests) == 2


# ---------------------------------------------------------------- the key that nobody holds


def test_a_commit_with_the_key_that_nobody_holds_is_signed(
    shim: Shim, keys: Keys, served: Served
) -> None:
    shim.file()
    shim.key("k", f"{NOBODY} ssh-agent-proxy-any")
    assert shim.sign("-U", "-f", "./k", "m", env=served).returncode == 0
    verified(keys, (shim.folder / "m.sig").read_bytes(), COMMIT)


def test_a_push_certificate_with_the_key_that_nobody_holds_is_refused(
    shim: Shim, liar: Any
) -> None:
    server = liar(answer(ARMOR))
    shim.file("m", b"certificate version 0.1\npusher SHA256:x 0 +0000\n")
    shim.key("k", f"{NOBODY} ssh-agent-proxy-any")
    done = shim.sign("-U", "-f", "./k", "m", env={"SSH_AGENT_PROXY_URL": server.url})
    assert "push certificate names a key that nobody holds" in said(done)
    assert server.requests == []


def test_a_push_certificate_with_a_real_key_is_signed(shim: Shim, liar: Any) -> None:
    server = liar(answer(ARMOR))
    shim.file("m", b"certificate version 0.1\npusher SHA256:x 0 +0000\n")
    shim.key("k", LINE)
    env = {"SSH_AGENT_PROXY_URL": server.url}
    assert shim.sign("-f", "./k", "m", env=env).returncode == 0


def test_a_key_for_which_anyone_can_forge_is_neither_sent_nor_taken_for_nobodys(
    shim: Shim, liar: Any
) -> None:
    """A forgery by it would be Good to git wherever it was once made an allowed signer."""
    server = liar(answer(ARMOR))
    shim.file()
    shim.key("k", f"{ANYBODY} ssh-agent-proxy-any")
    line = said(shim.sign("-U", "-f", "./k", "m", env={"SSH_AGENT_PROXY_URL": server.url}))
    assert line.startswith("the key in ./k is 32 zero bytes, for which anyone can forge")
    assert server.requests == []


@pytest.mark.parametrize("served_key", [NOBODY, ANYBODY], ids=["nobody's", "anybody's"])
def test_a_key_that_nobody_can_have_is_not_taken_from_the_proxy(
    shim: Shim, liar: Any, served_key: str
) -> None:
    """Who registers or trusts what pubkey prints trusts whoever can forge for it."""
    server = liar(answer(f"{served_key} me\n".encode()))
    shim.file()
    env = {"SSH_AGENT_PROXY_URL": server.url}
    for argv in (["pubkey"], ["pubkey", "k.pub"], ["-Y", "sign", "-f", "./k", "m"]):
        assert "a key that nobody can have" in said(shim(*argv, env=env))
    assert shim("key", env=env).stdout.decode() == f"{NOBODY} ssh-agent-proxy-any\n"
    assert tree(shim.folder).keys() == {"m"}


def test_the_key_that_nobody_holds_is_no_point_of_the_curve() -> None:
    """Else somebody could make signatures that verify with it."""
    p = 2**255 - 19
    d = -121665 * pow(121666, p - 2, p)
    y = int.from_bytes(base64.b64decode(NOBODY.split()[1])[-32:], "little")
    x_squared = (y * y - 1) * pow(d * y * y + 1, p - 2, p) % p
    assert pow(x_squared, (p - 1) // 2, p) == p - 1, "there is an x"
    assert NOBODY.split()[1] in SHIM.read_text()


# ---------------------------------------------------------------- pubkey and key


def test_pubkey_prints_what_the_proxy_serves(any_shim: Shim, keys: Keys, served: Served) -> None:
    done = any_shim("pubkey", env=served)
    assert done.stdout.decode() == f"{keys.line('ed25519')}\n"
    assert (done.returncode, done.stderr) == (0, b"")


def test_pubkey_writes_to_a_path(shim: Shim, keys: Keys, served: Served) -> None:
    path = shim.key("-a b.pub", "what was there before")
    done = shim("pubkey", f"./{path.name}", env=served)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert path.read_text() == f"{keys.line('ed25519')}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize(
    "argv, fragment",
    [
        (["pubkey", "a", "b"], "one PATH at most"),
        (["pubkey", "-x"], "takes a PATH and no options"),
        (["pubkey", "file/x"], "cannot write file/x"),
        (["pubkey", "folder"], "cannot write folder"),
        (["key", "x"], "takes no arguments"),
    ],
)
def test_a_command_that_cannot_be_done_says_why(
    shim: Shim, served: Served, argv: List[str], fragment: str
) -> None:
    (shim.folder / "folder").mkdir()
    shim.file("file")
    assert fragment in said(shim(*argv, env=served))
    assert sorted(p.name for p in shim.folder.iterdir() if p.name != "sap") == ["file", "folder"]


def test_pubkey_that_fails_leaves_the_file_as_it_was(shim: Shim, liar: Any) -> None:
    path = shim.key("k.pub", LINE)
    server = liar(answer(b"no key\n", "503 Service Unavailable"))
    said(shim("pubkey", path, env={"SSH_AGENT_PROXY_URL": server.url}))
    assert path.read_text() == f"{LINE}\n"


def test_what_a_comment_holds_does_not_reach_the_terminal(shim: Shim, liar: Any) -> None:
    server = liar(answer(f"{LINE} me\x1b[2J\u202e\x07\nssh-rsa AAAA second\n".encode()))
    env = {"SSH_AGENT_PROXY_URL": server.url}
    assert shim("pubkey", env=env).stdout.decode() == f"{LINE} me?[2J????\n"


@pytest.mark.parametrize(
    "line, printed",
    [
        (f"{LINE} me", f"{LINE} me"),
        ("ecdsa-sha2-nistp256 AAAAE2Vj me", "key::ecdsa-sha2-nistp256 AAAAE2Vj me"),
        ("sk-ssh-ed25519@openssh.com AAAAGnNr", "key::sk-ssh-ed25519@openssh.com AAAAGnNr"),
    ],
)
def test_key_prints_what_every_git_takes(
    any_shim: Shim, liar: Any, line: str, printed: str
) -> None:
    server = liar(answer(f"{line}\n".encode()))
    done = any_shim("key", env={"SSH_AGENT_PROXY_URL": server.url})
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, f"{printed}\n", b"")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/sign", "ftp://x/sign", "unix:/nowhere", None], ids=str
)
def test_key_gives_one_that_nobody_holds_when_the_proxy_cannot_be_asked(
    any_shim: Shim, liar: Any, url: Optional[str]
) -> None:
    server = liar(answer(b"<html>\n", server="nginx"))
    done = any_shim("key", env={"SSH_AGENT_PROXY_URL": url or server.url})
    assert done.returncode == 0
    assert done.stdout.decode() == f"{NOBODY} ssh-agent-proxy-any\n"
    assert re.fullmatch(rf"{OURS}: [ -~]+\n", done.stderr.decode())


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "url, fragment",
    [
        ("ftp://127.0.0.1/sign", "must begin with http:// or https://"),
        ("127.0.0.1:7221/sign", "must begin with http:// or https://"),
        ("-K/etc/passwd", "must begin with http:// or https://"),
        ("HTTP://127.0.0.1/sign", "must begin with http:// or https://"),
        ("unix:run/x.sock", "must begin with /"),
        ("unix:", "must begin with /"),
        ("unix:-K/etc/passwd", "must begin with /"),
        ("UNIX:/run/x.sock", "or unix:/"),
        ("http://127.0.0.1:7221", "must name a path"),
        ("http://127.0.0.1:7221/", "must name a path"),
        ("http:///sign", "must name a path"),
        ("http://me:secret@127.0.0.1/sign", "must not carry a user name or password"),
        ("http://127.0.0.1/sign\nHost: x", "is no URL"),
        ("http://127.0.0.1/\rsign", "is no URL"),
        ("http://127.0.0.1/a b", "is no URL"),
        ("http://127.0.0.1/\x1b[2Jsign", "is no URL"),
        ("http://127.0.0.1/s?x", "is no URL"),
        ("http://127.0.0.1/{a,b}", "is no URL"),
        ("http://ex\u00e4mple/sign", "is no URL"),
        ("http://127.0.0.1/a\\b", "is no URL"),
        ("http://127.0.0.1/$(id)", "is no URL"),
    ],
)
def test_a_url_that_cannot_be_asked_is_named(any_shim: Shim, url: str, fragment: str) -> None:
    any_shim.file()
    line = said(any_shim.sign("m", env={"SSH_AGENT_PROXY_URL": url}))
    assert line.startswith("SSH_AGENT_PROXY_URL ")
    assert fragment in line
    assert "secret" not in line


def test_an_empty_variable_counts_as_unset(shim: Shim, served: Served) -> None:
    shim.file()
    names = ["TOKEN", "TOKEN_FILE", "PUBKEY_URL", "CURL"]
    empty = {f"SSH_AGENT_PROXY_{name}": "" for name in names}
    assert shim.sign("-f", "./k", "m", env={**served, **empty}).returncode == 0


def test_the_public_key_is_asked_for_where_it_is_said_to_be(shim: Shim, liar: Any) -> None:
    elsewhere = liar(answer(f"{LINE} me\n".encode()))
    env = {
        "SSH_AGENT_PROXY_URL": "http://127.0.0.1:1/other",
        "SSH_AGENT_PROXY_PUBKEY_URL": f"http://127.0.0.1:{elsewhere.port}/x/y",
    }
    assert shim("pubkey", env=env).stdout.decode() == f"{LINE} me\n"
    assert elsewhere.requests[0].startswith(b"GET /x/y HTTP/1.1\r\n")


def test_a_sign_url_of_another_form_needs_the_other_one_too(shim: Shim) -> None:
    line = said(shim("pubkey", env={"SSH_AGENT_PROXY_URL": "http://127.0.0.1:1/other"}))
    assert "set SSH_AGENT_PROXY_PUBKEY_URL" in line


def test_a_wrong_public_key_url_is_named(shim: Shim) -> None:
    line = said(shim("pubkey", env={"SSH_AGENT_PROXY_PUBKEY_URL": "http://x\ny/"}))
    assert line.startswith("SSH_AGENT_PROXY_PUBKEY_URL is http://x?y/")


def test_without_a_url_the_proxys_own_default_is_asked(one_shim: Shim) -> None:
    recorder = record_curl(one_shim)
    one_shim.file()
    one_shim.sign("m", env=recorder)
    assert recorded(one_shim)[-1] == "http://127.0.0.1:7221/sign"


# ---------------------------------------------------------------- the token

# What the shim asks the proxy for, and how.
WAYS = ["file", "pipe", "stdin", "streamed", "pubkey", "key", "fetched"]


def ask(shim: Shim, way: str, env: Dict[str, str]) -> Done[bytes]:
    shim.file()
    if way == "pipe":
        argv = ["sh", "-c", 'mkfifo pipe && { cat m >pipe & exec "$@"; }', "sh", *shim.argv]
        return run([*argv, "-Y", "sign", "pipe"], {**shim.env, **env}, shim.folder, check=False)
    more = {"TMPDIR": f"{shim.folder}/nowhere"} if way == "streamed" else {}
    argv = {
        "file": ["-Y", "sign", "m"],
        "fetched": ["-Y", "sign", "-f", "./k", "m"],
        "pubkey": ["pubkey"],
        "key": ["key"],
    }.get(way, ["-Y", "sign"])
    return shim(*argv, input=COMMIT, env={**env, **more})


def well_asked(shim: Shim, way: str, done: Done[bytes], keys: Keys) -> None:
    assert (done.returncode, done.stderr) == (0, b"")
    if way in ("pubkey", "key"):
        assert done.stdout.decode() == f"{keys.line('ed25519')}\n"
    elif way in ("stdin", "streamed"):
        verified(keys, done.stdout, COMMIT)
    else:
        name = "pipe.sig" if way == "pipe" else "m.sig"
        verified(keys, (shim.folder / name).read_bytes(), COMMIT)
    if way == "fetched":
        assert (shim.folder / "k.pub").read_text().endswith(f"\n{keys.line('ed25519')}\n")


@pytest.mark.parametrize("where", ["http", "unix"])
@pytest.mark.parametrize("way", WAYS)
def test_the_token_opens_the_proxy(
    any_shim: Shim, keys: Keys, guarded: Served, way: str, where: str
) -> None:
    env = {**guarded.at(where), "SSH_AGENT_PROXY_TOKEN": TOKENS["variable"]}
    well_asked(any_shim, way, ask(any_shim, way, env), keys)
    assert os.listdir(any_shim.env["TMPDIR"]) == []


def home_token(shim: Shim, content: str) -> Path:
    path = Path(shim.env["HOME"], ".config", "ssh-agent-proxy", "token")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    "set_to, taken",
    [
        ({"TOKEN": TOKENS["variable"], "TOKEN_FILE": "token", "HOME": ""}, "variable"),
        ({"TOKEN": TOKENS["variable"], "TOKEN_FILE": "missing"}, "variable"),
        ({"TOKEN": TOKENS["variable"]}, "variable"),
        ({"TOKEN_FILE": "token", "HOME": ""}, "file"),
        ({"TOKEN_FILE": "token"}, "file"),
        ({"TOKEN": "", "TOKEN_FILE": "token"}, "file"),
        ({"TOKEN": "", "TOKEN_FILE": "", "HOME": ""}, "home"),
        ({"HOME": ""}, "home"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
def test_the_token_is_the_variables_else_the_files_else_that_of_the_home(
    any_shim: Shim, guarded: Served, set_to: Dict[str, str], taken: str
) -> None:
    any_shim.key("token", TOKENS["file"])
    if "HOME" in set_to:
        home_token(any_shim, f"{TOKENS['home']}\n")
    env = {f"SSH_AGENT_PROXY_{name}": set_to[name] for name in set_to if name != "HOME"}
    data = os.urandom(16)
    done = any_shim.sign(input=data, env={**guarded, **env})
    assert (done.returncode, done.stderr) == (0, b"")
    digest = hashlib.sha512(data).hexdigest()
    guarded.proxy.wait_log(rf"outcome=signed .* token={taken} .* digest=sha512:{digest}\b")


def test_without_a_home_there_is_no_token_of_it(shim: Shim, served: Served) -> None:
    argv = ["sh", "-c", 'unset HOME; exec "$@"', "sh", *shim.argv, "pubkey"]
    assert run(argv, {**shim.env, **served}, shim.folder).stderr == b""


TOKEN_FILES = {
    "a line": "{}\n",
    "no line end": "{}",
    "a carriage return": "{}\r\n",
    "a carriage return and no line end": "{}\r",
    "the line of the host": "{} name key=SHA256:abc payloads=commit,tag\n",
    "the line of the host with a carriage return": "{} name\r\n",
    "comments and empty lines first": "# ours\n\n#TOKEN\n \t \n\r\n{}\n",
    "blanks before and behind": " \t{}\t \n",
    "the first of two": "{}\nanother\n",
}


@pytest.mark.parametrize("content", TOKEN_FILES.values(), ids=TOKEN_FILES.keys())
def test_the_token_is_the_first_word_of_a_file(
    any_shim: Shim, keys: Keys, guarded: Served, content: str
) -> None:
    path = any_shim.folder / "-a token"
    path.write_bytes(content.format(TOKENS["file"]).encode())
    env = {**guarded, "SSH_AGENT_PROXY_TOKEN_FILE": path.name}
    well_asked(any_shim, "pubkey", any_shim("pubkey", env=env), keys)


def test_a_token_is_read_from_a_pipe(shim: Shim, keys: Keys, guarded: Served) -> None:
    reading, writing = os.pipe()
    os.write(writing, f"{TOKENS['file']}\n".encode())
    os.close(writing)
    shim.env.update(guarded, SSH_AGENT_PROXY_TOKEN_FILE=f"/dev/fd/{reading}")
    process = shim.start("pubkey", pass_fds=[reading])
    os.close(reading)
    assert process.communicate(timeout=30) == (f"{keys.line('ed25519')}\n".encode(), b"")


BROKEN_TOKENS = [
    "s3cr3t s3cr3t",
    " s3cr3t",
    "s3cr3t ",
    "s3cr3t\n",
    "s3cr3t\r",
    "s3cr3t\r\nX-Header: x",
    's3cr3t"\nurl = "http://127.0.0.1/',
    "s3cr3t\\",
    "s3cr3t\x1b[2J",
    "s3cr3t\x7f",
    "s3cr3t\u00e4",
    "s3cr3t,",
    "s3cr3t%",
    "s3cr3t$(id)",
    "=s3cr3t",
    "s3cr3t=s3cr3t",
    "==",
    "*",
]


@pytest.mark.parametrize("token", BROKEN_TOKENS, ids=ascii)
def test_what_is_no_token_is_refused_and_not_shown(
    any_shim: Shim, liar: Any, token: str
) -> None:
    server = liar(answer(ARMOR))
    env = {"SSH_AGENT_PROXY_URL": server.url, "SSH_AGENT_PROXY_TOKEN": token}
    line = said(any_shim.sign(input=COMMIT, env=env))
    assert line.startswith("what SSH_AGENT_PROXY_TOKEN holds is no token: ")
    assert "s3cr3t" not in line
    assert server.requests == []


@pytest.mark.parametrize("set_by", ["SSH_AGENT_PROXY_TOKEN_FILE", "HOME"])
@pytest.mark.parametrize("content", ["s3cr3t,", 's3cr3t"', "# x\n=s3cr3t", "s3cr3t\u00e4\u00e4"])
def test_what_is_no_token_in_a_file_is_refused_and_not_shown(
    any_shim: Shim, liar: Any, content: str, set_by: str
) -> None:
    server = liar(answer(ARMOR))
    path = home_token(any_shim, f"{content}\n")
    env = {"SSH_AGENT_PROXY_URL": server.url}
    if set_by != "HOME":
        path = path.rename(any_shim.folder / "token\x1b")
        env[set_by] = str(path)
    line = said(any_shim.sign(input=COMMIT, env=env))
    shown = str(path).replace("\x1b", "?")
    assert line.startswith(f"what {shown} holds is no token: ")
    assert "s3cr3t" not in line
    assert server.requests == []


NO_TOKEN_IN = {
    "missing": "there is no missing here: is it mounted?",
    "./missing/token": "there is no ./missing/token here, nor ./missing: is it mounted?",
    "/missing/folder/token": "there is no /missing/folder/token here, nor /missing: is it mounted?",
    "m/token": "there is no m/token here, for m is no folder",
    "link": "there is no link here, for link is a link to what is not here: is it mounted?",
    "folder": "folder is a folder (container engines make one where there was nothing to mount)",
    "empty": "empty holds none",
    "comments": "comments holds none",
    "closed": "closed cannot be read: permission denied",
    "closed folder/token": "closed folder/token cannot be reached: permission denied in "
    "closed folder",
    "closed folder/a/token": "closed folder/a/token cannot be reached: permission denied in "
    "closed folder",
    "\x1b[2J\n\x7f": "there is no ?[2J?? here: is it mounted?",
}


@pytest.fixture
def lay_out_tokens() -> Iterator[Callable[[Path], None]]:
    closed: List[Path] = []

    def lay_out_in(folder: Path) -> None:
        folder.chmod(0o755)
        (folder / "m").write_bytes(COMMIT)
        (folder / "link").symlink_to("/nowhere/token")
        (folder / "folder").mkdir()
        (folder / "empty").touch()
        (folder / "comments").write_text("# s3cr3t\n\n \n")
        (folder / "closed").write_text("s3cr3t\n")
        (folder / "closed folder").mkdir()
        for name in ("closed", "closed folder"):
            (folder / name).chmod(0)
            closed.append(folder / name)

    yield lay_out_in
    for path in closed:
        path.chmod(0o700)


@pytest.mark.parametrize("name", NO_TOKEN_IN, ids=ascii)
def test_a_token_file_without_a_token_is_told_what_is_wrong_with_it(
    any_shim: Shim, liar: Any, name: str, lay_out_tokens: Any
) -> None:
    server = liar(answer(f"{LINE}\n".encode()))
    lay_out_tokens(any_shim.folder)
    env = {"SSH_AGENT_PROXY_URL": server.url, "SSH_AGENT_PROXY_TOKEN_FILE": name}
    argv = [*as_nobody(any_shim), *any_shim.argv, "pubkey"]
    line = said(run(argv, {**any_shim.env, **env}, any_shim.folder, check=False))
    assert line == f"SSH_AGENT_PROXY_TOKEN_FILE gives no token: {NO_TOKEN_IN[name]}"
    assert server.requests == []


def test_from_a_folder_that_is_closed_the_search_for_a_token_ends(
    any_shim: Shim, lay_out_tokens: Any
) -> None:
    """Not even "." is a folder there."""
    lay_out_tokens(any_shim.folder)
    folder = any_shim.folder / "closed folder"
    folder.chmod(0o755)
    argv = [*as_nobody(any_shim), "sh", "-c", 'cd "$1"; chmod 0 .; shift; exec "$@"', "sh",
            "closed folder", *any_shim.argv, "pubkey"]  # fmt: skip
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
    env = {**any_shim.env, "SSH_AGENT_PROXY_TOKEN_FILE": "token"}
    line = said(run(argv, env, any_shim.folder, check=False))
    assert "token cannot be reached: permission denied in ." in line


# The one that is looked for unasked: what is there, and what is said of it once a token is missed.
HOME_TOKENS = {
    "missing": "neither SSH_AGENT_PROXY_TOKEN nor SSH_AGENT_PROXY_TOKEN_FILE is set, and there "
    "is no PATH here: put it into one of them",
    "empty": "PATH holds none: put it there",
    "a folder": "PATH is a folder (container engines make one where there was nothing to mount)",
    "closed": "PATH cannot be read: permission denied",
}


def make_home_token(shim: Shim, state: str) -> Path:
    path = home_token(shim, "" if state == "empty" else f"{TOKENS['home']}\n")
    if state in ("missing", "a folder"):
        path.unlink()
    if state == "a folder":
        path.mkdir()
    if state == "closed":
        path.chmod(0)
    return path


@pytest.mark.parametrize("state", HOME_TOKENS)
def test_where_the_home_has_no_token_a_proxy_that_wants_none_signs(
    any_shim: Shim, keys: Keys, served: Served, state: str
) -> None:
    make_home_token(any_shim, state)
    argv = [*as_nobody(any_shim, Path(any_shim.env["HOME"])), *any_shim.argv, "pubkey"]
    done = run(argv, {**any_shim.env, **served}, any_shim.folder, check=False)
    well_asked(any_shim, "pubkey", done, keys)


@pytest.mark.parametrize("state", HOME_TOKENS)
def test_where_the_home_has_no_token_and_one_is_wanted_it_is_said_why(
    any_shim: Shim, guarded: Served, state: str
) -> None:
    path = make_home_token(any_shim, state)
    argv = [*as_nobody(any_shim, Path(any_shim.env["HOME"])), *any_shim.argv, "pubkey"]
    line = said(run(argv, {**any_shim.env, **guarded}, any_shim.folder, check=False))
    assert "/publickey answered 401: a token is needed" in line
    assert HOME_TOKENS[state].replace("PATH", str(path)) in line


@pytest.mark.parametrize("way", WAYS)
def test_without_a_token_the_proxys_word_and_what_to_do_are_told(
    shim: Shim, guarded: Served, way: str
) -> None:
    done = ask(shim, way, guarded)
    if way == "key":  # git would not pass a failure on
        assert done.returncode == 0
        assert done.stdout.decode() == f"{NOBODY} ssh-agent-proxy-any\n"
        done = Done(done.args, 1, b"", done.stderr)
    line = said(done)
    assert "answered 401: a token is needed: `ssh-agent-proxy token NAME` makes one" in line
    assert "(neither SSH_AGENT_PROXY_TOKEN nor SSH_AGENT_PROXY_TOKEN_FILE is set, and " in line
    assert not list(shim.folder.glob("*.sig"))


def test_a_token_that_the_proxy_does_not_know_is_told_by_where_it_stands(
    any_shim: Shim, guarded: Served
) -> None:
    path = home_token(any_shim, "s3cr3t-old\n")
    for env, place in [
        ({"SSH_AGENT_PROXY_TOKEN": "s3cr3t-old"}, "SSH_AGENT_PROXY_TOKEN"),
        ({"SSH_AGENT_PROXY_TOKEN_FILE": str(path)}, path),
        ({}, path),
    ]:
        line = said(any_shim("pubkey", env={**guarded, **env}))
        assert "/publickey answered 401: this token is not one of the proxy's" in line
        assert line.endswith(f"(what was sent is the one in {place}: put another there)")
        assert "s3cr3t" not in line


def sent_token(request: bytes) -> Optional[str]:
    found = re.findall(rb"(?i)\r\nAuthorization:([^\r\n]*)", request)
    assert len(found) <= 1
    return found[0].decode() if found else None


def test_without_a_token_none_is_sent(shim: Shim, liar: Any) -> None:
    server = liar(answer(ARMOR))
    assert shim.sign(input=COMMIT, env={"SSH_AGENT_PROXY_URL": server.url}).stdout == ARMOR
    assert sent_token(server.requests[0]) is None


def test_the_token_is_sent_with_the_second_try_too(any_shim: Shim, liar: Any) -> None:
    server = liar(b"", answer(ARMOR))
    env = {"SSH_AGENT_PROXY_URL": server.url, "SSH_AGENT_PROXY_TOKEN": "s3cr3t"}
    assert any_shim.sign(input=COMMIT, env=env).stdout == ARMOR
    assert [sent_token(request) for request in server.requests] == [" Bearer s3cr3t"] * 2


def test_the_token_is_sent_with_all_that_a_rotation_asks(any_shim: Shim, liar: Any) -> None:
    refusal = answer(b"no such key\n", "404 Not Found")
    server = liar(refusal, answer(f"{OTHER} x\n".encode()), answer(armored(OTHER)))
    any_shim.file()
    any_shim.key("k.pub", "# fetched from ssh-agent-proxy, replaced", LINE)
    env = {"SSH_AGENT_PROXY_URL": server.url, "SSH_AGENT_PROXY_TOKEN": "s3cr3t"}
    assert any_shim.sign("-f", "./k.pub", "m", env=env).returncode == 0
    assert [sent_token(request) for request in server.requests] == [" Bearer s3cr3t"] * 3


def test_where_a_redirect_points_the_token_is_not_sent(shim: Shim, liar: Any) -> None:
    other = liar(answer(ARMOR))
    server = liar(answer(b"", "307 Temporary Redirect", Location=other.url))
    env = {"SSH_AGENT_PROXY_URL": server.url, "SSH_AGENT_PROXY_TOKEN": "s3cr3t"}
    assert "answered 307" in said(shim.sign(input=COMMIT, env=env))
    assert sent_token(server.requests[0]) == " Bearer s3cr3t"
    assert other.requests == []


OTHER_PLACES = {
    "the same": ("http://127.0.0.1:{port}/sign", True),
    "another port": ("http://127.0.0.1:1/sign", False),
    "another host": ("http://localhost:{port}/sign", False),
    "another scheme": ("https://127.0.0.1:{port}/sign", False),
    "a name that begins so": ("http://127.0.0.1:{port}0/sign", False),
    "a socket": ("unix:/nowhere", False),
    "unset": ("", False),
}


@pytest.mark.parametrize("sign_url, sent", OTHER_PLACES.values(), ids=OTHER_PLACES.keys())
def test_the_token_goes_to_the_host_of_the_sign_url_alone(
    any_shim: Shim, liar: Any, sign_url: str, sent: bool
) -> None:
    """Whoever serves the public key could sign as this container."""
    server = liar(answer(b"a token is needed\n", "401 Unauthorized"))
    env = {
        "SSH_AGENT_PROXY_URL": sign_url.format(port=server.port),
        "SSH_AGENT_PROXY_PUBKEY_URL": f"http://127.0.0.1:{server.port}/publickey",
        "SSH_AGENT_PROXY_TOKEN": "s3cr3t",
    }
    line = said(any_shim("pubkey", env=env))
    assert ("to the host of SSH_AGENT_PROXY_URL alone, and this is another" in line) != sent
    assert sent_token(server.requests[0]) == (" Bearer s3cr3t" if sent else None)


def test_who_makes_a_tunnel_is_not_sent_the_token(shim: Shim, liar: Any) -> None:
    tunnel = liar(b"HTTP/1.1 200 Connection established\r\n\r\nno TLS")
    env = {
        "SSH_AGENT_PROXY_URL": "https://host.internal/sign",
        "SSH_AGENT_PROXY_TOKEN": "s3cr3t",
        "https_proxy": f"http://127.0.0.1:{tunnel.port}",
    }
    assert "no trusted TLS connection" in said(shim.sign(input=COMMIT, env=env))
    assert tunnel.requests[0].startswith(b"CONNECT host.internal:443 ")
    assert sent_token(tunnel.requests[0]) is None


SOURCES = {"variable": "SSH_AGENT_PROXY_TOKEN", "file": "SSH_AGENT_PROXY_TOKEN_FILE"}


def token_from(shim: Shim, source: str) -> Dict[str, str]:
    path = shim.key("token", "s3cr3t-file", "s3cr3t-next")
    return {SOURCES[source]: str(path) if source == "file" else "s3cr3t-variable"}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("way", ["file", "stdin", "streamed", "pubkey"])
def test_curl_gets_the_token_neither_as_an_argument_nor_in_its_environment(
    any_shim: Shim, way: str, source: str
) -> None:
    where = any_shim.folder
    config = "/dev/fd/4" if way == "streamed" else "-"
    script = f"""
        printf '%s\\n' "$@" >"{where}/argv"
        env >"{where}/env"
        for config; do :; done
        [ "$config" = - ] || exec <"$config"
        cat >"{where}/config"
        exit 7
    """
    # Were one of the shim's own variables in the environment, it would be passed on.
    own = set(re.findall(r"[a-z_]+(?==)|(?<=read -r )[a-z_]+", SHIM.read_text()))
    assert {"token", "rest", "word", "value"} <= own
    env = {**dict.fromkeys(own, "x"), **fake_curl(any_shim, script), **token_from(any_shim, source)}
    env["SSH_AGENT_PROXY_URL"] = "http://127.0.0.1:1/sign"
    assert "s3cr3t" not in said(ask(any_shim, way, env))
    assert recorded(any_shim)[-2:] == ["-K", config]
    assert "s3cr3t" not in (where / "argv").read_text()
    passed_on = [line for line in (where / "env").read_text().splitlines() if "s3cr3t" in line]
    given = ["SSH_AGENT_PROXY_TOKEN=s3cr3t-variable"]
    assert passed_on == (given if source == "variable" else [])
    expected = f'header = "Authorization: Bearer s3cr3t-{source}"\n'
    assert (where / "config").read_text() == expected


@pytest.mark.parametrize("source", SOURCES)
def test_a_trace_does_not_show_the_token_nor_does_a_shell_that_exports_all_pass_it_on(
    any_shim: Shim, source: str
) -> None:
    script = f'env >"{any_shim.folder}/env"; exit 7'
    env = {**any_shim.env, **fake_curl(any_shim, script), **token_from(any_shim, source)}
    argv = [*any_shim.argv[:-1], "-ax", any_shim.argv[-1], "-Y", "sign"]
    done = run(argv, env, any_shim.folder, input=COMMIT, check=False)
    assert b"find_token" in done.stderr, "it was traced so far"
    assert b"s3cr3t" not in done.stderr
    left = (any_shim.folder / "env").read_text()
    assert left.count("s3cr3t") == (1 if source == "variable" else 0)


@on_linux
@pytest.mark.parametrize("way", ["file", "stdin", "streamed", "pubkey"])
def test_no_argument_and_no_file_that_others_can_read_ever_holds_the_token(
    any_shim: Shim, liar: Any, way: str
) -> None:
    """As the kernel saw it, programs that ended at once included."""
    server = liar(answer(b"no\n", "503 Service Unavailable"))
    trace = any_shim.folder / "trace"
    calls = "execve,open,openat,openat2,creat,memfd_create,umask,fchmod,chmod,write,writev,pwrite64"
    shell = any_shim.argv
    any_shim.argv = [
        need("strace", "strace"), "-f", "-y", "-v", "-s", "65536", "-o", str(trace),
        "-e", f"trace={calls}", "-e", "signal=none", *shell,
    ]  # fmt: skip
    env = {"SSH_AGENT_PROXY_URL": server.url, **token_from(any_shim, "file")}
    assert "answered 503: no" in said(ask(any_shim, way, env))
    assert sent_token(server.requests[0]) == " Bearer s3cr3t-file"
    lines = trace.read_text().splitlines()
    programs = [line for line in lines if " execve(" in line]
    assert any("/curl" in line for line in programs)
    assert not [line for line in programs if "s3cr3t" in line]
    masks: Dict[str, int] = {}  # of each process that set one
    modes: Dict[str, int] = {}  # of each file that was made
    written = []
    for line in lines:
        pid, _, call = line.partition(" ")
        if mask := re.match(r" *umask\((0\d*)\)", call):
            masks[pid] = int(mask.group(1), 8)
        made = re.match(r' *open(?:at)?\(.*O_CREAT.*, (0\d+)\) = \d+<(.*)>$', call)
        if made:
            name = made.group(2)
            modes[name] = int(made.group(1), 8) & ~masks.get(pid, 0o022)
        if call.lstrip().startswith(("write", "pwrite")) and "s3cr3t" in call:
            target = re.match(r" *\w+\(\d+<(.*?)>(?:\(deleted\))?,", call)
            assert target, call
            written.append(target.group(1).replace(" (deleted)", ""))
    assert written, "the shell has written the here-document somewhere"
    for name in written:
        if not name.startswith(("pipe:", "socket:", "TCP:", "UNIX")):
            assert modes[name] & 0o077 == 0, (name, oct(modes[name]))


@on_linux
@pytest.mark.parametrize(  # posh dies there, of any script with a here-document
    "any_shim", [name for name in SHELLS if name != "posh"], indirect=True
)
def test_where_the_token_cannot_be_handed_over_it_is_said_what_is_missing(
    any_shim: Shim, liar: Any
) -> None:
    """Some shells make a temporary file of a here-document, others need none."""
    server = liar(answer(ARMOR))
    script = f"""
        mount -t tmpfs none disk && cp m "{SHIM}" disk && cd disk || exit 99
        for folder in /tmp /dev/shm /var/tmp; do
            mount -t tmpfs -o ro none "$folder" || exit 99
        done
        "$@" ./shim.sh -Y sign m
        echo "$?"; ls -A
    """
    (any_shim.folder / "disk").mkdir()
    any_shim.file()
    done = run(
        [need("unshare", "util-linux"), "--user", "--map-root-user", "--mount", "sh", "-c", script,
         "sh", *any_shim.argv[:-1]],
        env={**any_shim.env, "TMPDIR": "/tmp", "SSH_AGENT_PROXY_TOKEN": "s3cr3t",
             "SSH_AGENT_PROXY_URL": server.url},
        cwd=any_shim.folder, check=False,
    )  # fmt: skip
    if server.requests:
        assert (done.stdout, done.stderr) == (b"0\nm\nm.sig\nshim.sh\n", b"")
        assert sent_token(server.requests[0]) == " Bearer s3cr3t"
    else:
        assert done.stdout == b"1\nm\nshim.sh\n"
        done = Done(done.args, 1, b"", done.stderr)
        assert "could not be handed the token: it takes a place for temporary files" in said(done)


# ---------------------------------------------------------------- the Unix socket


@pytest.mark.parametrize("way", WAYS)
def test_a_socket_is_asked_for_all_that_a_port_is(
    any_shim: Shim, keys: Keys, served: Served, way: str
) -> None:
    well_asked(any_shim, way, ask(any_shim, way, served.at("unix")), keys)


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "sign"], ids=ascii)
def test_the_path_of_a_socket_may_hold_anything(
    shim: Shim, keys: Keys, served: Served, short: Path, name: str
) -> None:
    folder = short / name[:60]
    folder.mkdir()
    (folder / name[:1]).symlink_to(served.socket)
    env = {"SSH_AGENT_PROXY_URL": f"unix:{folder}/{name[:1]}"}
    well_asked(shim, "fetched", ask(shim, "fetched", env), keys)


def test_a_socket_is_asked_past_every_proxy_of_the_environment(
    shim: Shim, keys: Keys, served: Served, liar: Any
) -> None:
    other = liar(answer(b"", "403 Forbidden", None))
    names = ["http_proxy", "all_proxy", "ALL_PROXY", "https_proxy"]
    env = dict.fromkeys(names, f"http://127.0.0.1:{other.port}")
    well_asked(shim, "file", ask(shim, "file", {**served.at("unix"), **env}), keys)
    assert other.requests == []
    said(shim("pubkey", env={**served.at("unix"), **env, **record_curl(shim)}))
    argv = recorded(shim)
    assert argv[argv.index("--noproxy") + 1] == "*", "whatever this curl makes of a proxy there"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/other", "http://127.0.0.1:1/sign", "unix:/x"])
def test_the_public_key_is_asked_for_at_a_socket_of_its_own(
    shim: Shim, keys: Keys, served: Served, url: str
) -> None:
    env = {
        "SSH_AGENT_PROXY_URL": url,
        "SSH_AGENT_PROXY_PUBKEY_URL": f"unix:{served.socket}",
    }
    well_asked(shim, "pubkey", shim("pubkey", env=env), keys)


def test_a_public_key_socket_without_a_whole_path_is_named(shim: Shim) -> None:
    line = said(shim("pubkey", env={"SSH_AGENT_PROXY_PUBKEY_URL": "unix:x\n"}))
    assert line.startswith("SSH_AGENT_PROXY_PUBKEY_URL is unix:x?: the path after unix: must")


RUNNING = ": is ssh-agent-proxy running on the host, with that address, and the socket's folder "
NO_SOCKET = " is not a socket (container engines make a folder where there was nothing to mount)"
UNANSWERED = {
    "missing": f"there is no HERE/missing here{RUNNING}mounted here?",
    "no/folder": f"there is no HERE/no/folder here, nor HERE/no{RUNNING}mounted here?",
    "link": f"there is no HERE/link here, for HERE/link is a link to what is not here{RUNNING}"
    "mounted here?",
    "m/socket": "there is no HERE/m/socket here, for HERE/m is no folder",
    "m": f"HERE/m{NO_SOCKET}: SSH_AGENT_PROXY_URL must name the one that ssh-agent-proxy listens",
    "folder": f"HERE/folder{NO_SOCKET}: SSH_AGENT_PROXY_URL must name the one that",
    "stale": "nobody listens on HERE/stale: is ssh-agent-proxy running on the host?",
    "not ours": "HERE/not ours: permission denied: the socket is not open to this user",
    "closed folder/socket": "HERE/closed folder/socket cannot be reached: permission denied in "
    "HERE/closed folder",
    "x" * 120: "HERE/" + "x" * 120 + " is longer than the path of a socket can be",
    "\x1b[2J\n\x7fusage:": "there is no HERE/?[2J??usage  here",
    "agent": "unix:HERE/agent closed the connection without an answer: try again, and see that it "
    "is the socket of ssh-agent-proxy, whose log tells more, and not an agent's own",
}


@pytest.mark.parametrize("name", UNANSWERED, ids=ascii)
def test_a_socket_that_does_not_answer_is_told_why(
    any_shim: Shim, short: Path, served: Served, name: str
) -> None:
    here = short / "here"
    here.mkdir()
    for folder in ("folder", "closed folder"):
        (here / folder).mkdir()
    (here / "closed folder").chmod(0o700 if os.geteuid() == 0 else 0)
    (here / "m").touch()
    (here / "link").symlink_to("/nowhere/socket")
    (here / "agent").symlink_to(served.agent.sock)
    argv = any_shim.argv
    if name != "agent":  # which root's own is for root only
        argv = [*as_nobody(any_shim, here), *argv]
    with contextlib.ExitStack() as stack:
        for socket_name in ("not ours", "stale"):
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.bind(str(here / socket_name))
            (here / socket_name).chmod(0o666)
            one.listen(1)
        one.close()
        (here / "not ours").chmod(0)
        env = {**any_shim.env, "SSH_AGENT_PROXY_URL": f"unix:{here}/{name}"}
        line = said(run([*argv, "pubkey"], env, any_shim.folder, check=False))
    assert line.startswith(UNANSWERED[name].replace("HERE", str(here)))
    (here / "closed folder").chmod(0o700)


def test_what_answers_at_a_socket_and_is_not_ours_is_told(shim: Shim, short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{short}/a socket\n")
        listener.listen(1)
        shim.env["SSH_AGENT_PROXY_URL"] = f"unix:{short}/a socket\n"
        process = shim.start("pubkey")
        connection, _ = listener.accept()
        with connection:
            request = read_request(connection)
            connection.sendall(answer(b"", server="docker"))
        stdout, stderr = process.communicate(timeout=30)
    assert request.startswith(b"GET /publickey HTTP/1.1\r\nHost: localhost\r\n")
    line = said(Done([], process.returncode, stdout, stderr))
    place = f"unix:{short}/a socket?"
    assert line.startswith(f"what answers at {place} is not ssh-agent-proxy (status 200, Server: ")


def test_a_curl_without_sockets_is_told(shim: Shim) -> None:
    env = {**fake_curl(shim, "exit 48"), "SSH_AGENT_PROXY_URL": "unix:/x"}
    assert said(shim("pubkey", env=env)).endswith("/fake curl was built without Unix sockets")


def test_git_commits_with_a_token_over_a_socket(
    any_shim: Shim, keys: Keys, guarded: Served
) -> None:
    """Real git, whose gpg.ssh.program is one word: the shim by a script that names the shell."""
    program = any_shim.folder / "signer"
    words = " ".join(shlex.quote(word) for word in any_shim.argv)
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(0o755)
    signers = any_shim.key("signers", f"committer@example.com {keys.line('ed25519')}")
    home_token(any_shim, f"# for this container\n{TOKENS['home']} home\n")
    env = {**any_shim.env, **guarded.at("unix")}
    repository = any_shim.folder / "repository"
    run(["git", "init", "-q", "-b", "main", repository], env)

    def git(*args: str) -> str:
        return run(["git", *args], env, repository).stdout.decode()

    for name, value in [
        ("gpg.format", "ssh"),
        ("gpg.ssh.program", str(program)),
        ("gpg.ssh.defaultKeyCommand", f"{shlex.quote(str(program))} key"),
        ("gpg.ssh.allowedSignersFile", str(signers)),
    ]:
        git("config", name, value)
    git("commit", "-q", "-S", "--allow-empty", "-m", "signed")
    git("tag", "-s", "-m", "signed", "v1")
    git("verify-commit", "HEAD")
    git("verify-tag", "v1")
    commit = git("rev-parse", "HEAD").strip()
    guarded.proxy.wait_log(rf"outcome=signed .*peer=unix .*token=home .* id={commit}\b")


# ---------------------------------------------------------------- curl


def fake_curl(shim: Shim, script: str) -> Dict[str, str]:
    path = shim.folder / "fake curl"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"SSH_AGENT_PROXY_CURL": str(path)}


def record_curl(shim: Shim) -> Dict[str, str]:
    return fake_curl(shim, f'printf "%s\\n" "$@" >"{shim.folder}/argv"; exit 7')


def recorded(shim: Shim) -> List[str]:
    return (shim.folder / "argv").read_text().splitlines()


def test_curl_is_told_what_it_must_keep_to(shim: Shim) -> None:
    shim.file()
    said(shim.sign("m", env=record_curl(shim)))
    argv = recorded(shim)
    assert argv[0] == "-q", "only as the first option does it keep ~/.curlrc from being read"
    assert "-L" not in argv
    assert argv[argv.index("--noproxy") + 1] == "*"
    assert 1 <= int(argv[argv.index("--connect-timeout") + 1]) <= 30
    assert 240 < int(argv[argv.index("--max-time") + 1]) <= 600, "the agent's 120 s, twice"


def test_the_users_curlrc_is_not_read(shim: Shim, served: Served) -> None:
    Path(shim.env["HOME"], ".curlrc").write_text('url = "http://127.0.0.1:1/"\nfail-early\nhead\n')
    shim.file()
    done = shim.sign("m", env=served)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "127.1", "sub.localhost"])
def test_a_loopback_url_is_asked_past_the_proxy_of_the_environment(
    shim: Shim, liar: Any, host: str
) -> None:
    server, other = liar(answer(ARMOR)), liar(answer(b"", "403 Forbidden", None))
    shim.file()
    env = {
        "SSH_AGENT_PROXY_URL": f"http://{host}:{server.port}/sign",
        "http_proxy": f"http://127.0.0.1:{other.port}",
        "ALL_PROXY": f"http://127.0.0.1:{other.port}",
    }
    done = shim.sign("m", env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    assert other.requests == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1.example", "host.internal", "localhost.example", "10.0.0.1"]
)
def test_another_url_uses_the_proxy_of_the_environment(
    shim: Shim, liar: Any, host: str
) -> None:
    way = liar(answer(ARMOR))
    shim.file()
    url = f"http://{host}/sign"
    env = {"SSH_AGENT_PROXY_URL": url, "http_proxy": f"http://127.0.0.1:{way.port}"}
    assert shim.sign("m", env=env).returncode == 0
    assert way.requests[0].startswith(f"POST {url} HTTP/1.1\r\n".encode())


def test_ipv6_loopback_is_asked_directly(shim: Shim) -> None:
    shim.file()
    env = {**record_curl(shim), "SSH_AGENT_PROXY_URL": "http://[::1]:7221/sign"}
    said(shim.sign("m", env=env))
    argv = recorded(shim)
    assert argv[argv.index("--noproxy") + 1] == "*"
    assert argv[-1] == "http://[::1]:7221/sign"


def test_a_commit_is_sent_at_once_without_waiting_for_a_100(one_shim: Shim, liar: Any) -> None:
    server = liar(answer(ARMOR))
    one_shim.file("m", b"x" * (2 << 20))
    assert one_shim.sign("m", env={"SSH_AGENT_PROXY_URL": server.url}).returncode == 0
    assert b"\r\nexpect:" not in server.requests[0].lower()
    assert server.requests[0].endswith(b"\r\n\r\n" + b"x" * (2 << 20))


CURL_ENDS = {
    2: "must be that or newer",
    5: "the http_proxy for",
    6: "is not known here",
    7: "is ssh-agent-proxy running on the host",
    18: "closed the connection without an answer",
    28: "in time (10 s to connect, 300 s in all)",
    60: "no trusted TLS connection (curl's exit status 60)",
    99: "ended with exit status 99",
    120: "could not be handed the token",
}


@pytest.mark.parametrize("status", CURL_ENDS)
def test_each_end_of_curl_is_told_in_words(one_shim: Shim, status: int) -> None:
    one_shim.file()
    fragment = CURL_ENDS[status] if status != 18 else "broke off"
    assert fragment in said(one_shim.sign("m", env=fake_curl(one_shim, f"exit {status}")))


@pytest.mark.parametrize("token", ["", "s3cr3t"], ids=["no token", "a token"])
@pytest.mark.parametrize("curl", ["/nowhere/curl\x1b[2J", "/etc/passwd"])
def test_without_curl_it_is_said_what_to_install(
    any_shim: Shim, curl: str, token: str
) -> None:
    any_shim.file()
    env = {"SSH_AGENT_PROXY_CURL": curl, "SSH_AGENT_PROXY_TOKEN": token}
    line = said(any_shim.sign("m", env=env))
    assert "cannot be run: install curl" in line


# ---------------------------------------------------------------- answers that are none

NOT_OURS = "is not ssh-agent-proxy"
NO_SIGNATURE = "200 without a whole signature"

LIES: Dict[str, Tuple[bytes, str]] = {
    "another server": (answer(ARMOR, server="nginx"), f"{NOT_OURS} (status 200, Server: nginx)"),
    "no server": (answer(ARMOR, server=None), f"{NOT_OURS} (status 200, Server: none)"),
    "a server like ours": (answer(ARMOR, server="ssh-agent-proxyish/1"), NOT_OURS),
    "a policy's page": (answer(b"<html>usage: Blocked", "403 Forbidden", "x"), NOT_OURS),
    "a server with an escape": (answer(ARMOR, server="a\x1b[2Jb"), "Server: a?[2Jb)"),
    "a server that says usage:": (answer(ARMOR, server="usage: x"), "Server: usage  x)"),
    "a proxy's sign-in": (answer(b"", "407 Proxy Authentication Required", None), NOT_OURS),
    "a redirect": (
        answer(b"", "302 Found", Location="http://127.0.0.1:1/x"),
        "answered 302: no reason given",
    ),
    "a reason": (answer(b"too large\n", "413 Content Too Large"), "answered 413: too large"),
    "two lines of reason": (answer(b"one\ntwo\n", "400 Bad Request"), "answered 400: one"),
    "a reason with an escape": (answer(b"a\x1b]0;x\x07\xc2\x9b\n", "403 X"), "403: a?]0;x?"),
    "a reason that says usage:": (answer(b"ssh-keygen usage: x\n", "403 X"), "usage  x"),
    "a long reason": (answer(b"a" * 5000, "500 X"), "500: " + "a" * 300),
    "a reason without end": (answer(b"busy", "503 X"), "answered 503: busy"),
    "another success": (answer(ARMOR, "201 Created"), "answered 201: -----BEGIN"),
    "nothing in it": (answer(b""), NO_SIGNATURE),
    "a page": (answer(b"<html>\n"), NO_SIGNATURE),
    "half a signature": (answer(ARMOR[:40]), NO_SIGNATURE),
    "no last line": (answer(BEGIN + b"U1NI\n"), NO_SIGNATURE),
    "nothing between": (answer(BEGIN + END), NO_SIGNATURE),
    "an empty line": (answer(BEGIN + b"\n" + END), NO_SIGNATURE),
    "an empty line inside": (answer(BEGIN + b"U1NI\n\nU1NI\n" + END), NO_SIGNATURE),
    "something before": (answer(b"x\n" + ARMOR), NO_SIGNATURE),
    "something after": (answer(ARMOR + b"x\n"), NO_SIGNATURE),
    "an empty line after": (answer(ARMOR + b"\n"), NO_SIGNATURE),
    "two of them": (answer(ARMOR + ARMOR), NO_SIGNATURE),
    "no base64": (answer(BEGIN + b"U1NI!\n" + END), NO_SIGNATURE),
    "a blank": (answer(BEGIN + b"U1 NI\n" + END), NO_SIGNATURE),
    "carriage returns": (answer(ARMOR.replace(b"\n", b"\r\n")), NO_SIGNATURE),
    "a header inside": (answer(BEGIN + b"A: b\nU1NI\n" + END), NO_SIGNATURE),
    "bytes beyond ASCII": (answer(BEGIN + b"U1\xe4\xff\n" + END), NO_SIGNATURE),
    "shorter than it says": (
        answer(ARMOR).replace(b"Content-Length: ", b"Content-Length: 9"),
        "broke off",
    ),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP"),
    "nothing": (b"", "closed the connection without an answer"),
    "only half a head": (b"HTTP/1.1 200 OK\r\nServer: ssh-agent-pro", "broke off"),
    "longer than any signature": (answer(BEGIN + b"U1NI\n" * 50000 + END), "could not be kept"),
    "an endless page": (
        b"HTTP/1.1 200 OK\r\nServer: ssh-agent-proxy/1\r\n\r\n" + b"A" * 500000,
        "could not be kept",
    ),
}


@pytest.mark.parametrize("lie, fragment", LIES.values(), ids=LIES.keys())
def test_what_is_no_signature_of_the_proxy_is_not_taken_for_one(
    any_shim: Shim, liar: Any, lie: bytes, fragment: str
) -> None:
    server = liar(lie)
    any_shim.file()
    (any_shim.folder / "m.sig").write_bytes(b"what was there before")
    line = said(any_shim.sign("m", env={"SSH_AGENT_PROXY_URL": server.url}))
    assert fragment in line
    assert server.url in line
    assert (any_shim.folder / "m.sig").read_bytes() == b"what was there before"
    assert tree(any_shim.folder).keys() == {"m", "m.sig"}


@pytest.mark.parametrize("lie, fragment", LIES.values(), ids=LIES.keys())
def test_what_is_no_signature_is_not_printed(
    one_shim: Shim, liar: Any, lie: bytes, fragment: str
) -> None:
    server = liar(lie)
    done = one_shim.sign(input=COMMIT, env={"SSH_AGENT_PROXY_URL": server.url})
    assert fragment in said(done)


def test_an_answer_without_end_is_not_waited_for(shim: Shim, liar: Any) -> None:
    gone = threading.Event()

    def pour(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nServer: ssh-agent-proxy/1\r\n\r\n" + BEGIN)
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(b"U1NI\n" * 1000)
        gone.set()

    server = liar(pour)
    shim.file()
    assert "could not be kept" in said(shim.sign("m", env={"SSH_AGENT_PROXY_URL": server.url}))
    assert gone.wait(5)


# What is asked for with -f and -n (LINE, git), what the signature names, and what is said of it.
BY_ANOTHER = "a signature by another key than was asked for"
FOR_ANOTHER = "a signature that is not for namespace git"
FORGERIES = {
    "another key": (LINE, OTHER, "git", BY_ANOTHER),
    "another at its end": (LINE, LINE[:-3] + "AAA", "git", BY_ANOTHER),
    "another type": (LINE, LINE.replace("C3Nz", "C3Nx"), "git", BY_ANOTHER),
    "a longer key": (LINE, LINE + "AAAA", "git", BY_ANOTHER),
    "a shorter key": (LINE, LINE[:-4], "git", BY_ANOTHER),
    "nobody's": ("", NOBODY, "git", BY_ANOTHER),
    "anybody's": ("", ANYBODY, "git", BY_ANOTHER),
    "another namespace": (LINE, LINE, "file", FOR_ANOTHER),
    "a namespace that begins so": (LINE, LINE, "github", FOR_ANOTHER),
    "a namespace that ends so": ("", LINE, "digit", FOR_ANOTHER),
    "another namespace and any key": ("", LINE, "file", FOR_ANOTHER),
}


@pytest.mark.parametrize("asked, by, namespace, told", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_signature_by_another_key_or_for_something_else_is_not_written(
    any_shim: Shim, liar: Any, asked: str, by: str, namespace: str, told: str
) -> None:
    """Git would put it into the commit as if it were the one that was asked for."""
    server = liar(answer(armored(by, namespace)))
    any_shim.file()
    any_shim.key("k", asked)
    argv = ["-f", "./k", "m"] if asked else ["m"]
    line = said(any_shim.sign(*argv, env={"SSH_AGENT_PROXY_URL": server.url}))
    assert told in line
    assert tree(any_shim.folder).keys() == {"m", "k"}


SIGNERS = ["ed25519", "rsa2048", "rsa3072", "rsa4096", "ecdsa256", "ecdsa384", "ecdsa521"]


@pytest.mark.parametrize("hash", ["sha256", "sha512"])
@pytest.mark.parametrize("name", [*SIGNERS, *(f"{name}-cert" for name in SIGNERS)])
def test_a_signature_of_each_type_of_key_is_known_for_its_own(
    shim: Shim, liar: Any, keys: Keys, name: str, hash: str
) -> None:
    """One that the real ssh-keygen made is written, and refused where another was asked for."""
    plain = name.replace("-cert", "")
    key, public = shim.folder / "k", shim.folder / "k.pub"
    key.write_bytes(keys[plain].read_bytes())
    key.chmod(0o600)
    public.write_text(keys.line(plain))
    shim.file()
    if plain != name:
        run(["ssh-keygen", "-q", "-s", keys["other"], "-I", "x", public])
        public.write_bytes((shim.folder / "k-cert.pub").read_bytes())
    run(["ssh-keygen", "-q", "-Y", "sign", "-n", "git", f"-Ohashalg={hash}", "-f", public, "m"],
        cwd=shim.folder)  # fmt: skip
    made = (shim.folder / "m.sig").read_bytes()
    (shim.folder / "m.sig").unlink()
    env = {"SSH_AGENT_PROXY_URL": liar(answer(made)).url}
    done = shim.sign("-f", "./k.pub", "m", env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (shim.folder / "m.sig").read_bytes() == made
    another = "other" if plain == "ed25519" else "ed25519"
    assert BY_ANOTHER in said(shim.sign("-f", keys[another], "m", env=env))


TRUTHS: Dict[str, bytes] = {
    "interim answers before": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 X\r\nServer: x\r\n\r\n"
    + answer(ARMOR),
    "a name in another case": answer(ARMOR).replace(b"Server: ", b"sERVER:"),
    "no reason phrase": answer(ARMOR).replace(b" OK", b""),
    "chunked": b"HTTP/1.1 200 OK\r\nServer: ssh-agent-proxy/1\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"%x\r\n%s\r\n0\r\n\r\n" % (len(ARMOR), ARMOR),
    "ended by the connection": b"HTTP/1.0 200 OK\r\nServer: ssh-agent-proxy/1\r\n\r\n" + ARMOR,
}


@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS.keys())
def test_a_signature_is_taken_in_any_form_that_http_allows(
    any_shim: Shim, liar: Any, truth: bytes
) -> None:
    server = liar(truth)
    any_shim.file()
    done = any_shim.sign("m", env={"SSH_AGENT_PROXY_URL": server.url})
    assert (done.returncode, done.stderr) == (0, b"")
    assert (any_shim.folder / "m.sig").read_bytes() == ARMOR


def test_an_answer_that_broke_before_its_status_is_asked_for_once_more(
    shim: Shim, liar: Any
) -> None:
    server = liar(b"", answer(ARMOR))
    shim.file()
    assert shim.sign("m", env={"SSH_AGENT_PROXY_URL": server.url}).returncode == 0
    assert len(server.requests) == 2
    assert server.requests[0] == server.requests[1]
    assert (shim.folder / "m.sig").read_bytes() == ARMOR


def test_it_is_asked_for_twice_and_not_for_ever(shim: Shim, liar: Any) -> None:
    server = liar(b"")
    shim.file()
    said(shim.sign("m", env={"SSH_AGENT_PROXY_URL": server.url}))
    assert len(server.requests) == 2


def test_what_another_proxy_says_of_a_tunnel_is_not_the_answer(shim: Shim, liar: Any) -> None:
    tunnel = liar(b"HTTP/1.1 200 Connection established\r\nServer: other\r\n\r\nno TLS")
    shim.file()
    url = "https://host.internal/sign"
    env = {"SSH_AGENT_PROXY_URL": url, "https_proxy": f"http://127.0.0.1:{tunnel.port}"}
    assert f"{url}: no trusted TLS connection" in said(shim.sign("m", env=env))
    assert tunnel.requests[0].startswith(b"CONNECT host.internal:443 ")


def test_where_nothing_listens_it_is_said_where_was_looked(any_shim: Shim) -> None:
    any_shim.file()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/sign"
    line = said(any_shim.sign("m", env={"SSH_AGENT_PROXY_URL": url}))
    assert f"nothing listens at {url}" in line
    assert "is ssh-agent-proxy running on the host" in line


def test_the_proxys_own_reason_is_told(shim: Shim, served: Served, keys: Keys) -> None:
    shim.file()
    assert "namespace" in said(shim("-Y", "sign", "-n", "other", "m", env=served))
    shim.file("empty", b"")
    assert "answered 400: " in said(shim.sign("empty", env=served))
    line = said(shim.sign("-f", keys["other"], "m", env=served))
    assert "answered 404: " in line


# ---------------------------------------------------------------- tags


@pytest.mark.parametrize(
    "why", ["nothing listens", "no key", "a wrong setting", "an unknown option", "a lie"]
)
def test_a_tag_that_git_makes_all_the_same_is_said_to_be_unsigned(
    shim: Shim, liar: Any, why: str
) -> None:
    shim.file("t", TAG)
    lie = liar(answer(b"no\n", "403 Forbidden"))
    argv = {"no key": ["-f", "nokey"], "an unknown option": ["-l"]}.get(why, [])
    url = {"a lie": lie.url, "a wrong setting": "ftp:"}.get(why, "http://127.0.0.1:1/sign")
    line = said(shim.sign(*argv, "t", env={"SSH_AGENT_PROXY_URL": url}))
    assert line.endswith("; this tag is NOT signed: git tag -d it")


@pytest.mark.parametrize("content", [COMMIT, b"objection\n", b"", b"\nobject x\n"])
def test_what_is_no_tag_is_not_said_to_be_one(shim: Shim, content: bytes) -> None:
    shim.file("t", content)
    line = said(shim.sign("t", env={"SSH_AGENT_PROXY_URL": "http://127.0.0.1:1/sign"}))
    assert "tag" not in line


def test_a_file_that_is_signed_for_something_else_is_no_tag(shim: Shim) -> None:
    shim.file("t", TAG)
    env = {"SSH_AGENT_PROXY_URL": "http://127.0.0.1:1/sign"}
    assert "tag" not in said(shim("-Y", "sign", "-n", "file", "t", env=env))


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_file_may_have_any_name(
    any_shim: Shim, keys: Keys, served: Served, name: str
) -> None:
    any_shim.file(name)
    done = any_shim.sign("--", f"./{name}" if name == "-" else name, env=served)
    assert (done.returncode, done.stderr) == (0, b"")
    verified(keys, (any_shim.folder / f"{name}.sig").read_bytes(), COMMIT)
    assert tree(any_shim.folder).keys() == {name, f"{name}.sig"}


def test_a_folder_may_have_any_name(any_shim: Shim, served: Served) -> None:
    folder = any_shim.folder / "-a [1]{x}\n;@*"
    folder.mkdir()
    (folder / "m").write_bytes(COMMIT)
    key = folder / "k"
    done = any_shim.sign("-f", str(key), "m", env=served, cwd=folder)
    assert (done.returncode, done.stderr) == (0, b"")
    assert {p.name for p in folder.iterdir()} == {"m", "m.sig", "k.pub"}


def test_a_name_in_a_message_does_no_harm(shim: Shim) -> None:
    line = said(shim.sign("usage: a\x1b[2J\nb\u202e"))
    assert line == "cannot sign usage  a?[2J?b???: there is no such file"


def test_a_file_that_is_a_pipe_is_signed(shim: Shim, keys: Keys, served: Served) -> None:
    pipe = shim.folder / "pipe"
    os.mkfifo(pipe)
    shim.env.update(served)
    process = shim.start("-Y", "sign", "-n", "git", "pipe")
    pipe.write_bytes(COMMIT)
    assert process.communicate(timeout=30) == (b"", b"")
    verified(keys, (shim.folder / "pipe.sig").read_bytes(), COMMIT)


def test_a_pipe_that_was_read_is_not_read_again(shim: Shim, liar: Any) -> None:
    server = liar(b"")
    pipe = shim.folder / "pipe"
    os.mkfifo(pipe)
    shim.env["SSH_AGENT_PROXY_URL"] = server.url
    process = shim.start("-Y", "sign", "-n", "git", "pipe")
    pipe.write_bytes(COMMIT)
    stdout, stderr = process.communicate(timeout=30)
    assert stdout == b""
    assert b"closed the connection without an answer" in stderr
    assert len(server.requests) == 1


def test_what_has_the_name_of_a_temporary_file_is_left_alone(
    any_shim: Shim, served: Served
) -> None:
    any_shim.file()
    precious = any_shim.file("precious", b"precious")
    # The process keeps its number over exec, and with it the names that it tries first.
    script = f"""
        ln -s precious .{OURS}.$$.0; ln -s dangling .{OURS}.$$.1; : >.{OURS}.$$.2
        mkfifo .{OURS}.$$.3
        exec "$@"
    """
    argv = ["sh", "-c", script, "sh", *any_shim.argv, "-Y", "sign", "m"]
    run(argv, env={**any_shim.env, **served}, cwd=any_shim.folder)
    assert (any_shim.folder / "m.sig").read_bytes().startswith(BEGIN)
    assert not (any_shim.folder / "m.sig").is_symlink()
    assert precious.read_bytes() == b"precious"
    assert not (any_shim.folder / "dangling").exists()
    left = any_shim.temporary()
    assert sorted(path[-2:] for path in left) == [".0", ".1", ".2", ".3"]
    for path in left:
        os.unlink(path)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_signature_has_the_mode_that_the_umask_says(
    shim: Shim, served: Served, mask: int
) -> None:
    shim.file()
    shim.env.update(served)
    argv = ["sh", "-c", f'umask {mask:o}; exec "$@"', "sh", *shim.argv, "-Y", "sign", "m"]
    run(argv, env=shim.env, cwd=shim.folder)
    mode = stat.S_IMODE((shim.folder / "m.sig").stat().st_mode)
    assert mode == 0o666 & ~mask


def test_a_signature_that_is_there_is_replaced(shim: Shim, keys: Keys, served: Served) -> None:
    shim.file()
    old = shim.folder / "m.sig"
    old.write_bytes(b"x" * 5000)
    old.chmod(0o400)
    assert shim.sign("m", env=served).returncode == 0
    verified(keys, old.read_bytes(), COMMIT)


def test_what_a_link_in_its_place_points_to_is_left_alone(shim: Shim, served: Served) -> None:
    shim.file()
    target = shim.file("target", b"precious")
    (shim.folder / "m.sig").symlink_to(target)
    assert shim.sign("m", env=served).returncode == 0
    assert target.read_bytes() == b"precious"
    assert (shim.folder / "m.sig").read_bytes().startswith(BEGIN)


def test_a_folder_in_its_place_is_an_error_before_anyone_is_asked(
    shim: Shim, liar: Any
) -> None:
    server = liar(answer(ARMOR))
    shim.file()
    (shim.folder / "m.sig").mkdir()
    line = said(shim.sign("m", env={"SSH_AGENT_PROXY_URL": server.url}))
    assert line == "cannot write m.sig: it is a directory"
    assert server.requests == []
    assert list((shim.folder / "m.sig").iterdir()) == []


def as_nobody(shim: Shim, *reached: Path) -> List[str]:
    """In front of a command: as someone whom file modes bind, which root is not; REACHED and the
    shim's folder can be."""
    if os.geteuid() != 0:
        return []
    folders = {parent for path in (shim.folder, *reached) for parent in (path, *path.parents)}
    for folder in folders:
        if stat.S_IMODE(folder.stat().st_mode) & 0o001 == 0:
            folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o011)
    return [need("setpriv", "util-linux"), "--reuid=65534", "--regid=65534", "--clear-groups"]


def test_a_folder_that_cannot_be_written_is_an_error_before_anyone_is_asked(
    shim: Shim, liar: Any
) -> None:
    server = liar(answer(ARMOR))
    shim.file()
    shim.folder.chmod(0o555)
    argv = [*as_nobody(shim), *shim.argv, "-Y", "sign", "m"]
    env = {**shim.env, "SSH_AGENT_PROXY_URL": server.url}
    done = run(argv, env=env, cwd=shim.folder, check=False)
    shim.folder.chmod(0o755)
    assert said(done).startswith("cannot write m.sig: is its folder writable")
    assert server.requests == []


def test_a_file_that_cannot_be_read_is_an_error(shim: Shim) -> None:
    shim.file().chmod(0)
    shim.folder.chmod(0o777)
    done = run([*as_nobody(shim), *shim.argv, "-Y", "sign", "m"], env=shim.env,
               cwd=shim.folder, check=False)  # fmt: skip
    assert said(done) == "cannot sign m: permission denied"


@on_linux
@pytest.mark.parametrize("room", [0, 4096], ids=["for nothing", "for the answer only"])
def test_a_full_disk_leaves_what_was_there(any_shim: Shim, liar: Any, room: int) -> None:
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
    (any_shim.folder / "disk").mkdir()
    unshare = need("unshare", "util-linux")
    done = run(
        [unshare, "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh",
         *any_shim.argv, "-Y", "sign", "m"],
        env={**any_shim.env, "SSH_AGENT_PROXY_URL": server.url},
        cwd=any_shim.folder, check=False,
    )  # fmt: skip
    if room:
        assert done.stdout == b"0\n" + ARMOR + b"filler\nm\nm.sig\n", done.stderr
    else:
        assert done.stdout == b"1\nbeforefiller\nm\nm.sig\n", done.stderr
        assert b"disk" in done.stderr


# ---------------------------------------------------------------- standard input and output


def test_standard_input_is_read_whole_before_anyone_is_asked(shim: Shim, liar: Any) -> None:
    server = liar(answer(ARMOR))
    shim.env["SSH_AGENT_PROXY_URL"] = server.url
    process = shim.start("-Y", "sign", stdin=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(b"slow")
    process.stdin.flush()
    kept = wait_for(lambda: list(Path(shim.env["TMPDIR"]).rglob("data")), message="the copy")[0]
    wait_for(lambda: kept.read_bytes() == b"slow", message="what was written so far")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert server.requests == []
    assert process.communicate(b" producer", timeout=30) == (ARMOR, b"")
    assert server.requests[0].endswith(b"\r\n\r\nslow producer")
    assert b"\r\nContent-Length: 13\r\n" in server.requests[0]


def test_where_standard_input_cannot_be_kept_it_is_streamed(
    any_shim: Shim, keys: Keys, served: Served
) -> None:
    done = any_shim.sign(input=COMMIT, env={**served, "TMPDIR": f"{any_shim.folder}/nowhere"})
    assert (done.returncode, done.stderr) == (0, b"")
    verified(keys, done.stdout, COMMIT)


@pytest.mark.parametrize("lie", ["another server", "a page", "nothing", "no HTTP", "a reason"])
def test_a_streamed_lie_is_not_taken_for_a_signature(
    any_shim: Shim, liar: Any, lie: str
) -> None:
    answered, fragment = LIES[lie]
    server = liar(answered)
    env = {"SSH_AGENT_PROXY_URL": server.url, "TMPDIR": f"{any_shim.folder}/nowhere"}
    assert fragment in said(any_shim.sign(input=COMMIT, env=env))
    assert len(server.requests) == 1


def test_commands_work_where_nothing_can_be_written(
    any_shim: Shim, keys: Keys, served: Served
) -> None:
    done = any_shim("pubkey", env={**served, "TMPDIR": f"{any_shim.folder}/nowhere"})
    assert done.stdout.decode() == f"{keys.line('ed25519')}\n"


@on_linux
@pytest.mark.parametrize("argv", [["-Y", "sign"], ["pubkey"]], ids=["sign", "pubkey"])
def test_output_that_cannot_be_written_is_an_error(
    shim: Shim, served: Served, argv: List[str]
) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*shim.argv, *argv], env={**shim.env, **served}, cwd=shim.folder,
            input=COMMIT, stdout=full, stderr=subprocess.PIPE, timeout=60,
        )  # fmt: skip
    done.stdout = b""
    assert said(done).endswith("could not be written")


def test_no_standard_input_is_an_error(any_shim: Shim) -> None:
    script = 'exec "$@" <&-'
    done = run(["sh", "-c", script, "sh", *any_shim.argv, "-Y", "sign"], env=any_shim.env,
               cwd=any_shim.folder, check=False)  # fmt: skip
    assert said(done) == "there is no standard input to sign"


# ---------------------------------------------------------------- interruptions

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("what", ["file", "stdin", "pubkey"])
def test_an_interrupted_wait_leaves_nothing_behind(
    any_shim: Shim, liar: Any, number: signal.Signals, what: str
) -> None:
    server: Liar = liar(lambda connection: server.hold(connection))
    any_shim.env["SSH_AGENT_PROXY_URL"] = server.url
    any_shim.file()
    argv = {"file": ["-Y", "sign", "m"], "stdin": ["-Y", "sign"], "pubkey": ["pubkey", "k"]}[what]
    process = any_shim.start(*argv)
    wait_for(lambda: server.requests, message="the request")
    process.send_signal(number)
    assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == SIGNALS[number]
    assert server.gone.wait(5), "curl goes on without the shim"
    assert tree(any_shim.folder).keys() == {"m"}
    assert any_shim.temporary() == []


def test_an_interrupted_wait_with_a_token_ends_curl_too(any_shim: Shim, liar: Any) -> None:
    server: Liar = liar(lambda connection: server.hold(connection))
    any_shim.env.update(SSH_AGENT_PROXY_URL=server.url, SSH_AGENT_PROXY_TOKEN="s3cr3t")
    any_shim.file()
    process = any_shim.start("-Y", "sign", "m")
    wait_for(lambda: server.requests, message="the request")
    process.terminate()
    assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == SIGNALS[signal.SIGTERM]
    assert server.gone.wait(5), "curl goes on without the shim"
    assert tree(any_shim.folder).keys() == {"m"}
    assert os.listdir(any_shim.env["TMPDIR"]) == []


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_an_interrupted_reading_leaves_nothing_behind(
    any_shim: Shim, number: signal.Signals
) -> None:
    process = any_shim.start("-Y", "sign", stdin=subprocess.PIPE)
    wait_for(lambda: list(Path(any_shim.env["TMPDIR"]).rglob("data")), message="the copy")
    process.send_signal(number)
    process.wait(10)
    process.communicate()
    assert process.returncode == SIGNALS[number]
    assert any_shim.temporary() == []


# ---------------------------------------------------------------- the terminal

# Takes the terminal named first for its own, then runs the rest there.
ON_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
if sys.argv[2] == "background":
    settings = termios.tcgetattr(terminal)
    settings[3] |= termios.TOSTOP
    termios.tcsetattr(terminal, termios.TCSANOW, settings)
    child = os.fork()
    if child:
        os.close(terminal)
        sys.exit(os.waitpid(child, 0)[1] != 0)
    os.setpgid(0, 0)
os.close(terminal)
os.execvp(sys.argv[3], sys.argv[3:])
"""
ANNOUNCEMENT = b"ssh-agent-proxy-sign: waiting for the agent: touch your key?\r\n"


class Terminal:
    """A pseudo-terminal, and what was written to it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.name = os.ttyname(self.slave)

    def start(self, shim: Shim, *args: str, where: str = "foreground") -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, self.name, where, *shim.argv, *args],
            env=shim.env, cwd=shim.folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def read(self, seconds: float) -> bytes:
        """What arrives within SECONDS, as soon as it does."""
        ready, _, _ = select.select([self.master], [], [], seconds)
        return os.read(self.master, 65536) if ready else b""

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    made.close()


def descendants(pid: int) -> List[int]:
    found: List[int] = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if entry.name.isdigit():
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid:
                    found += [int(entry.name), *descendants(int(entry.name))]
    return found


def open_files(pid: int) -> List[str]:
    with contextlib.suppress(OSError):
        return [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return []


class Gate:
    """A server that keeps its client waiting until the test lets it through."""

    def __init__(self, liar: Any, answered: bytes = answer(ARMOR)) -> None:
        self.answered = answered
        self.opened = threading.Event()
        self.server: Liar = liar(self.wait)

    def wait(self, connection: socket.socket) -> None:
        self.opened.wait(30)
        connection.sendall(self.answered)


@on_linux
def test_a_wait_is_announced_on_the_terminal(
    any_shim: Shim, liar: Any, terminal: Terminal
) -> None:
    gate = Gate(liar)
    any_shim.env["SSH_AGENT_PROXY_URL"] = gate.server.url
    any_shim.file()
    started = time.monotonic()
    process = terminal.start(any_shim, "-Y", "sign", "m")
    assert terminal.read(20) == ANNOUNCEMENT
    assert time.monotonic() - started >= 2
    family = descendants(process.pid)
    assert len(family) >= 2, "curl and the timer"
    git_holds = {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (1, 2)}
    assert all(name.startswith("pipe:") for name in git_holds)
    for pid in family:
        assert not git_holds & set(open_files(pid)), "git would wait for this one"
    gate.opened.set()
    assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)
    assert (any_shim.folder / "m.sig").read_bytes() == ARMOR
    assert terminal.read(0) == b"", "said once"


def test_a_wait_in_the_background_is_announced_and_does_not_stop(
    shim: Shim, liar: Any, terminal: Terminal
) -> None:
    gate = Gate(liar)
    shim.env["SSH_AGENT_PROXY_URL"] = gate.server.url
    shim.file()
    process = terminal.start(shim, "-Y", "sign", "m", where="background")
    assert terminal.read(20) == ANNOUNCEMENT
    gate.opened.set()
    assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == 0


@on_linux
def test_a_quick_signature_is_not_announced_and_its_timer_is_gone(
    any_shim: Shim, liar: Any, terminal: Terminal
) -> None:
    gate = Gate(liar)
    any_shim.env["SSH_AGENT_PROXY_URL"] = gate.server.url
    any_shim.file()
    process = terminal.start(any_shim, "-Y", "sign", "m")
    # curl, the timer, and what the timer sleeps with.
    wait_for(lambda: len(descendants(process.pid)) >= 3, message="the timer's sleep")
    family = descendants(process.pid)
    gate.opened.set()
    assert process.communicate(timeout=10) == (b"", b"")
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)
    assert terminal.read(0) == b""


def test_many_signatures_in_a_row_wait_for_no_timer(
    shim: Shim, liar: Any, terminal: Terminal
) -> None:
    server = liar(answer(ARMOR))
    shim.env["SSH_AGENT_PROXY_URL"] = server.url
    names = [f"m{number}" for number in range(100)]
    for name in names:
        shim.file(name)
    process = terminal.start(shim, "-Y", "sign", *names)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 0
    assert all((shim.folder / f"{name}.sig").read_bytes() == ARMOR for name in names)
    assert terminal.read(0) == b""


# Takes the terminal for its own and every orphan for its child; says how many it was left.
AS_PROCESS_ONE = """
import ctypes, fcntl, os, subprocess, sys, termios
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
status = subprocess.call(sys.argv[2:])
orphans = 0
try:
    while True:
        os.wait()
        orphans += 1
except ChildProcessError:
    print(status, orphans)
"""


@on_linux
@pytest.mark.parametrize("success", [True, False])
def test_no_process_is_left_to_process_one(
    any_shim: Shim, liar: Any, terminal: Terminal, success: bool
) -> None:
    """In a container that is often a program that waits for none of them."""

    gate = Gate(liar, answer(ARMOR if success else b""))
    any_shim.env["SSH_AGENT_PROXY_URL"] = gate.server.url
    any_shim.file()
    process = subprocess.Popen(
        [sys.executable, "-c", AS_PROCESS_ONE, terminal.name, *any_shim.argv, "-Y", "sign", "m"],
        env=any_shim.env, cwd=any_shim.folder,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    # The shim, curl, the timer, and what that sleeps with.
    wait_for(lambda: len(descendants(process.pid)) >= 4, message="the timer's sleep")
    gate.opened.set()
    told, _ = process.communicate(timeout=30)
    assert told == (b"0 0\n" if success else b"1 0\n"), "status and orphans"


@on_linux
def test_ctrl_c_at_the_terminal_ends_all_of_it(
    any_shim: Shim, liar: Any, terminal: Terminal
) -> None:
    server: Liar = liar(lambda connection: server.hold(connection))
    any_shim.env["SSH_AGENT_PROXY_URL"] = server.url
    any_shim.file()
    process = terminal.start(any_shim, "-Y", "sign", "m")
    wait_for(lambda: len(descendants(process.pid)) >= 3, message="the timer's sleep")
    wait_for(lambda: server.requests, message="the request")
    family = descendants(process.pid)
    os.write(terminal.master, b"\x03")
    assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)
    assert tree(any_shim.folder).keys() == {"m"}


@on_linux
def test_the_timer_of_a_killed_shim_ends_and_says_nothing(
    one_shim: Shim, liar: Any, terminal: Terminal
) -> None:
    gate = Gate(liar)
    one_shim.env["SSH_AGENT_PROXY_URL"] = gate.server.url
    one_shim.file()
    process = terminal.start(one_shim, "-Y", "sign", "m")
    wait_for(lambda: len(descendants(process.pid)) >= 3, message="the timer's sleep")
    family = descendants(process.pid)
    process.kill()
    process.wait(10)
    gate.opened.set()
    wait_for(lambda: not any(map(open_files, family)), message="the end of the timer")
    assert terminal.read(0) == b""
    for path in one_shim.folder.glob(f".{OURS}*"):
        path.unlink()  # no one was left to do it


# ---------------------------------------------------------------- the file's own rules


def test_the_shim_needs_no_program_but_those_that_are_promised(
    one_shim: Shim, keys: Keys, served: Served
) -> None:
    bin_folder = one_shim.folder / "bin"
    bin_folder.mkdir()
    for name in ["curl", "mktemp", "mv", "rm", "cat", "dirname", "mkdir", "chmod"]:
        (bin_folder / name).symlink_to(Path(need(name, name)).resolve())
    shell = Path(need("dash", "dash")).resolve()
    env = {**one_shim.env, **served, "PATH": str(bin_folder)}
    one_shim.file()
    for argv in (
        ["-Y", "sign", "-f", "./a/k", "m"],
        ["-Y", "sign"],
        ["pubkey"],
        ["pubkey", "k2"],
        ["key"],
    ):
        done = run([shell, SHIM, *argv], env=env, cwd=one_shim.folder, input=COMMIT, check=False)
        assert (done.returncode, done.stderr) == (0, b""), argv
    verified(keys, (one_shim.folder / "m.sig").read_bytes(), COMMIT)


def cut_short(shim: Shim, server: Liar, ends: Sequence[int]) -> None:
    """Each part of the shim, up to one of ENDS, either signs or fails."""
    whole = SHIM.read_bytes()
    part = shim.folder / "part"
    shim.argv[-1] = str(part)
    shim.env["SSH_AGENT_PROXY_URL"] = server.url
    shim.file()
    for end in ends:
        part.write_bytes(whole[:end])
        done = shim.sign("m")
        made = shim.folder / "m.sig"
        if done.returncode == 0:
            assert made.read_bytes() == ARMOR, f"cut at {end}"
            made.unlink()
        else:
            assert not made.exists(), f"cut at {end}"


def line_ends() -> List[int]:
    """All but those of the first two lines, whose loss no program can tell."""
    return [found.end() for found in re.finditer(b"\n", SHIM.read_bytes())][2:]


def test_a_download_that_broke_off_never_looks_like_a_signature_made(
    any_shim: Shim, liar: Any
) -> None:
    """Git would take exit 0 for it, and some make an unsigned commit then."""
    size = SHIM.stat().st_size
    cut_short(any_shim, liar(answer(ARMOR)), [*line_ends()[:-1:100], *range(size - 16, size, 3)])


@pytest.mark.long
def test_a_download_that_broke_off_at_any_line_never_looks_like_a_signature_made(
    shim: Shim, liar: Any
) -> None:
    """The same for each line, and for each byte of the last one."""
    size = SHIM.stat().st_size
    cut_short(shim, liar(answer(ARMOR)), [*line_ends(), *range(size - 16, size)])


def test_the_shim_is_written_as_the_house_has_it() -> None:
    lines = SHIM.read_text().splitlines()
    assert lines[0] == "#!/bin/sh"
    assert lines[-1] == '{ main "$@"; }'
    assert "set -eu" in lines
    assert max(map(len, lines)) <= 100
    assert os.access(SHIM, os.X_OK)
    code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    for word in ("[[", "local ", "function ", "echo "):
        assert word not in code
