"""What the tests share: real agents, the real proxy, throwaway homes, nothing of the user's."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from pathlib import Path
from typing import (
    Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple,
    Union,
)  # fmt: skip

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROXY = ROOT / "ssh_agent_proxy.py"
SHIM = ROOT / "shim.sh"
sys.path.insert(0, str(ROOT))

KEY_KINDS = {
    "ed25519": ["-t", "ed25519"],
    "other": ["-t", "ed25519"],
    "rsa2048": ["-t", "rsa", "-b", "2048"],
    "rsa3072": ["-t", "rsa", "-b", "3072"],
    "rsa4096": ["-t", "rsa", "-b", "4096"],
    "ecdsa256": ["-t", "ecdsa", "-b", "256"],
    "ecdsa384": ["-t", "ecdsa", "-b", "384"],
    "ecdsa521": ["-t", "ecdsa", "-b", "521"],
}

# ---------------------------------------------------------------- which run, when, and beside which

MARKS = {
    "alone": "needs the machine for itself: nothing else runs meanwhile; in `make test-all` only",
    "long": "a table that nobody need wait for; in `make test-all` only",
    "windows": "of the program on Windows: see windows.py; in `make test-windows` only",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in another order")
    parser.addoption("--windows", type=Path, metavar="FOLDER", help="those on Windows: windows.py")
    parser.addoption("--screen", action="store_true", help="of these, those that run alone")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if config.getoption("windows"):
        import windows

        config.pluginmanager.register(windows)


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    if not config.getoption("windows"):
        items[:] = [item for item in items if not item.get_closest_marker("windows")]
    if sys.platform == "win32":
        import windows

        items[:] = windows.inside(items)
    seed = config.getoption("shuffle")
    if seed is not None:
        # Those of a file stay together: what they share is made once.
        random.Random(seed).shuffle(items)
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: files.index(item.path))
    # Last, so that one process does not wait for the others again and again.
    items.sort(key=runs_alone)


def runs_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Of several processes that run tests, one that runs alone has the others wait."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    import fcntl

    with open(__file__, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if runs_alone(item) else fcntl.LOCK_SH)
        try:
            return (yield)
        finally:
            # Closing would not do: a process that a test has forked may still hold it.
            fcntl.flock(lock, fcntl.LOCK_UN)


_deselected: List[str] = []


def pytest_deselected(items: Sequence[Any]) -> None:
    _deselected.extend(str(item) for item in items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["deselected"] = _deselected


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Has the last line count what was not selected, which it does not by itself."""
    if not _deselected:  # each process leaves out the same
        left_out = getattr(node, "workeroutput", {}).get("deselected", [])
        node.config.hook.pytest_deselected(items=left_out)


# ---------------------------------------------------------------- programs that may be missing


def cannot_run(reason: str) -> NoReturn:
    """A failure in CI; elsewhere the test is counted, and named at the end."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def need(program: str, package: str) -> str:
    """The path of PROGRAM."""
    return shutil.which(program) or cannot_run(f"{program} is missing: install {package}")


def rows(table: Sequence[Any]) -> List[Any]:
    """What pytest makes of a table whose first column is a name."""
    return [pytest.param(*row[1:], id=row[0]) for row in table]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    missing: Dict[str, List[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        _, _, reason = report.longrepr
        missing.setdefault(reason.removeprefix("Skipped: "), []).append(report.nodeid)
    for reason, tests in sorted(missing.items()):
        terminalreporter.write_line(f"not run: {reason} ({', '.join(tests)})")


# ---------------------------------------------------------------- running things


def run(
    argv: Sequence[Any], env: Optional[Dict[str, str]] = None, cwd: Optional[Path] = None,
    input: Optional[bytes] = None, check: bool = True, timeout: float = 120,
) -> subprocess.CompletedProcess[bytes]:  # fmt: skip
    done = subprocess.run(
        [str(a) for a in argv], env=env, cwd=cwd, input=input,
        stdin=subprocess.DEVNULL if input is None else None, capture_output=True, timeout=timeout,
    )  # fmt: skip
    if check and done.returncode:
        words = " ".join(str(a) for a in argv)
        pytest.fail(f"{words}: exit {done.returncode}\n{done.stdout!r}\n{done.stderr.decode()}")
    return done


def bound_by_modes() -> List[str]:
    """In front of a command: file modes bind it, as they bind everybody but root; nor is it root
    to itself, who some shells think may read all."""
    someone = ["--user", "--map-user=1000", "--map-group=1000"]
    return [] if os.geteuid() else [need("unshare", "util-linux"), *someone]


def call(home: Path, *argv: Any, **env: Any) -> subprocess.CompletedProcess[bytes]:
    """The program, with those arguments, to its end."""
    return run([sys.executable, PROXY, *argv], env=clean_env(home, **env), check=False, timeout=20)


def one_line(said: bytes) -> str:
    """SAID, which is one line of the program's, or of its log once there is one."""
    lines = said.decode().splitlines()
    assert len(lines) == 1, said
    assert re.match(r"ssh-agent-proxy: |[0-9T:+-]+ ERROR ", lines[0]), said
    return lines[0]


def wait_for(what: Callable[[], Any], seconds: float = 10, message: Any = "") -> Any:
    """The first true value of WHAT(), or a failure with MESSAGE (or its value) after SECONDS."""
    end = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > end:
            told = message() if callable(message) else message
            pytest.fail(f"not within {seconds} s: {told or what}")
        time.sleep(0.005)


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Has what the test does in this process fail where it takes longer."""
    if sys.platform == "win32":  # afterwards
        begin = time.monotonic()
        yield
        assert time.monotonic() - begin < seconds
        return

    def too_late(*signal_: Any) -> None:
        pytest.fail(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def clean_env(home: Path, **more: Any) -> Dict[str, str]:
    temporary = home / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    env = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "TMPDIR": str(temporary),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "A U Thor",
        "GIT_AUTHOR_EMAIL": "author@example.com",
        "GIT_COMMITTER_NAME": "C O Mitter",
        "GIT_COMMITTER_EMAIL": "committer@example.com",
    }
    env.update({name: str(value) for name, value in more.items()})
    return env


def private_file(path: Path, text: str) -> Path:
    """A file of TEXT at PATH that is the user's alone, as a token file must be."""
    path.write_text(text)
    path.chmod(0o600)
    return path


def need_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
    except OSError:
        cannot_run("this machine has no [::1]: switch IPv6 on for lo")


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A private directory with a short name: the path of a Unix socket holds 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="sap.", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def short() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def home(short: Path) -> Path:
    path = short / "home"
    path.mkdir()
    return path


def copy_tree(path: Path) -> Path:
    """The project without its history, its tests, and what was made in it."""
    made = shutil.ignore_patterns(".git", ".venv", "dist", "tests", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, path, ignore=made)
    return path


@pytest.fixture
def tree(short: Path) -> Path:
    return copy_tree(short / "a tree")


def set_up_debian(root: Path, suite: str, *options: str) -> None:
    """In a folder, from the mirror that this machine has its packages from."""
    if os.geteuid():
        cannot_run("only root can set a Debian up in a folder: sudo make test-all")
    sites = ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages"]
    mirrors = run([*sites, "Label: Debian"]).stdout.decode().split()
    lean = ["--dpkgopt=force-unsafe-io", "--aptopt=Acquire::Languages none"]
    lean += ["--aptopt=Acquire::Check-Valid-Until no"]  # of a mirror that is behind
    argv = [need("mmdebstrap", "mmdebstrap"), "--quiet", "--variant=apt", *lean, *options]
    done = run([*argv, suite, root, *mirrors[:1]], check=False, timeout=600)
    if done.returncode:
        cannot_run(f"no Debian from {mirrors[:1]}: {done.stderr.decode().splitlines()[:1]}")


# ---------------------------------------------------------------- keys and agents


class Keys(Dict[str, Path]):
    """Private keys by name, each made when it is first asked for; NAME.pub stands beside it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        import fcntl

        path = self.folder / name
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes that run tests, one makes it
            if not path.exists():
                argv = ["ssh-keygen", "-q", "-N", "", "-C", f"{name}@test", "-f", path]
                run([*argv, *KEY_KINDS[name]])
        self[name] = path
        return path

    def line(self, name: str) -> str:
        """The public key as an authorized_keys line."""
        return self[name].with_suffix(".pub").read_text().strip()


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """The same for all processes that run tests: an RSA key takes its time."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    (folder / "keys").mkdir(exist_ok=True)
    return Keys(folder / "keys")


def fingerprint(key: Path) -> str:
    """As ssh-keygen tells it."""
    return run(["ssh-keygen", "-lf", key]).stdout.decode().split()[1]


def listens(sock: Path) -> bool:
    """Does somebody? (The socket stands there a little earlier.)"""
    with socket.socket(socket.AF_UNIX) as s:
        return s.connect_ex(str(sock)) == 0


class Agent:
    """A real `ssh-agent`, in the foreground, ended by PID."""

    how: Dict[str, Any] = {}  # to start it besides: see Popen

    def __init__(self, sock: Path, **env: str) -> None:
        self.sock = sock
        self.env = dict(os.environ, SSH_AUTH_SOCK=str(sock))
        self.its_env = {"PATH": os.environ["PATH"], **env}
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["ssh-agent", "-D", "-a", str(self.sock)], stdout=subprocess.DEVNULL, env=self.its_env,
            **self.how,
        )  # fmt: skip
        self.pid = self.process.pid
        wait_for(lambda: listens(self.sock), message="ssh-agent's socket")

    def add(self, path: Path, *options: str) -> None:
        run(["ssh-add", "-q", *options, path], env=self.env)

    def delete_all(self) -> None:
        run(["ssh-add", "-q", "-D"], env=self.env)

    def _lock(self, option: str) -> None:
        # ssh-add asks for the password through an askpass program.
        askpass = self.sock.with_name(self.sock.name + ".askpass")
        askpass.write_text("#!/bin/sh\necho secret\n")
        askpass.chmod(0o755)
        env = dict(self.env, SSH_ASKPASS=str(askpass), SSH_ASKPASS_REQUIRE="force")
        run(["ssh-add", option], env=env)
        askpass.unlink()

    def lock(self) -> None:
        self._lock("-x")

    def unlock(self) -> None:
        self._lock("-X")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(10)


StartAgent = Callable[..., Agent]


@pytest.fixture
def start_agent(short: Path) -> Iterator[Callable[..., Agent]]:
    started: List[Agent] = []

    def start(path: Optional[Path] = None) -> Agent:
        agent = Agent(path or short / f"agent{len(started)}")
        started.append(agent)
        return agent

    yield start
    for agent in started:
        agent.stop()


@pytest.fixture
def agent(start_agent: StartAgent) -> Agent:
    return start_agent()


@pytest.fixture(scope="session")
def agent_with_key(keys: Keys) -> Iterator[Agent]:
    """One for all tests that leave it as it is: it holds the key ed25519."""
    with short_folder() as folder:
        agent = Agent(folder / "agent")
        agent.add(keys["ed25519"])
        yield agent
        agent.stop()


def read_message(connection: socket.socket) -> bytes:
    """One message of the agent protocol without its length, b"" at the end; nothing behind it."""

    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = connection.recv(size - len(data))
            if not piece:
                return b""
            data += piece
        return data

    return exactly(int.from_bytes(exactly(4), "big"))


def message(payload: bytes) -> bytes:
    """A message of the agent protocol; a string of RFC 4251 looks the same."""
    return len(payload).to_bytes(4, "big") + payload


def listing(*entries: Tuple[bytes, bytes]) -> bytes:
    """An agent's answer that lists these keys, each with its comment."""
    keys = b"".join(message(key) + message(comment) for key, comment in entries)
    return message(b"\x0c" + len(entries).to_bytes(4, "big") + keys)


class ScriptedAgent:
    """An agent that does what no real one does: lies, stalls, dies. HANDLER has a connection each,
    in a thread of its own."""

    def __init__(self, sock: Path, handler: Callable[[socket.socket], None]) -> None:
        self.sock = sock
        self.handler = handler
        self.connections: List[socket.socket] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(sock))
        self.listener.listen(256)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # stopped
            while True:
                connection, _ = self.listener.accept()
                self.connections.append(connection)
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the proxy went away first
            self.handler(connection)

    def stop(self) -> None:
        for sock in [self.listener, *self.connections]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


# A program for exec: with the path of an agent's socket as its argument.
RELAY = """\
import socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect(sys.argv[1])
    while True:
        data = sys.stdin.buffer.raw.read(65536)
        if not data:
            break
        s.sendall(data)
        sys.stdout.buffer.raw.write(s.recv(65536))
"""


StartScripted = Callable[..., Path]


@pytest.fixture
def scripted_agent(short: Path) -> Iterator[Callable[..., Path]]:
    """Starts a ScriptedAgent with the handler given; its path."""
    started: List[ScriptedAgent] = []

    def start(handler: Callable[[socket.socket], None]) -> Path:
        started.append(ScriptedAgent(short / f"scripted{len(started)}", handler))
        return started[-1].sock

    yield start
    for agent in started:
        agent.stop()


# ---------------------------------------------------------------- the proxy


class Proxy:
    """`ssh_agent_proxy.py serve` as a process of its own."""

    def __init__(self, argv: List[str], env: Dict[str, str], wait: bool = True, **how: Any) -> None:
        """HOW: see Popen; with a stderr, the log goes there and is not read here."""
        self._log: List[str] = []
        how = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, **how}
        self.process = subprocess.Popen(argv, env=env, **how)
        self.pid = self.process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            # (Wine's start takes long on a machine that is busy.)
            self.port = int(self.wait_log(r"listening on \S+:(\d+) ", 30).group(1))
            self.url = f"http://127.0.0.1:{self.port}"

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self._log.append(line.decode("utf-8", "backslashreplace"))

    def log(self) -> str:
        return "".join(self._log)

    def lines(self, what: str = "") -> List[str]:
        """Those of the log that have WHAT in them."""
        return [line for line in self.log().splitlines() if what in line]

    def wait_log(self, pattern: str, seconds: float = 10) -> re.Match[str]:
        def found() -> Optional[re.Match[str]]:
            over = self.process.poll() is not None
            if over:
                self._reader.join(5)
            match = re.search(pattern, self.log(), re.M)
            if over and not match:
                pytest.fail(f"exit {self.process.returncode} without {pattern!r}:\n{self.log()}")
            return match

        return wait_for(found, seconds, lambda: f"{pattern!r} in the log:\n{self.log()}")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait(5)
        self._reader.join(5)
        return status


class FileLogged(Proxy):
    """Its log is a file in FOLDER, which it makes: what stands there can be read without delay."""

    def __init__(self, folder: Path, *args: Any) -> None:
        folder.mkdir()
        self.file = folder / "log"
        argv = [sys.executable, PROXY, "--addr", "127.0.0.1:0", *args]
        with self.file.open("wb") as log:
            # Where a system shares its processors by session, it has its own share.
            super().__init__(list(map(str, argv)), clean_env(folder / "home"), stderr=log,
                             start_new_session=True)  # fmt: skip

    def log(self) -> str:
        return self.file.read_text()


TUNED = """
import json, os, sys
sys.path.insert(0, os.path.dirname(sys.argv[2]))
import ssh_agent_proxy as p
for name, value in json.loads(sys.argv[1]).items():
    assert type(getattr(p, name)) in (int, float), name
    setattr(p, name, value)
sys.exit(p.main(sys.argv[3:]))
"""


def tuned(**constants: float) -> List[str]:
    """For start_proxy's PYTHON: some of its constants are others, for no test waits 30 s."""
    return [sys.executable, "-c", TUNED, json.dumps(constants)]


StartProxy = Callable[..., Proxy]


@pytest.fixture
def start_proxy(home: Path) -> Iterator[Callable[..., Proxy]]:
    started: List[Proxy] = []

    def start(
            *args: Any, env: Optional[Dict[str, str]] = None, upstream: Any = None,
            python: Union[str, Sequence[str]] = sys.executable, wait: bool = True,
            addr: Optional[str] = "127.0.0.1:0") -> Proxy:  # fmt: skip
        """PYTHON: a program, or a command line, which the script and its arguments follow."""
        argv = [python] if isinstance(python, str) else list(python)
        argv += [str(PROXY)]
        argv += ["--addr", addr] if addr else []
        argv += ["--upstream", str(upstream)] if upstream else []
        argv += [str(a) for a in args]
        proxy = Proxy(argv, clean_env(home, **(env or {})), wait)
        started.append(proxy)
        return proxy

    yield start
    for proxy in started:
        proxy.stop()
        assert "Traceback" not in proxy.log(), proxy.log()


@pytest.fixture
def proxy(agent: Agent, keys: Keys, start_proxy: StartProxy) -> Proxy:
    agent.add(keys["ed25519"])
    return start_proxy(upstream=agent.sock)


# ---------------------------------------------------------------- HTTP by hand


class Answer(NamedTuple):
    status: int
    headers: Dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


def parse_answer(data: bytes) -> Answer:
    """The final answer in DATA; interim ones (100 Continue) before it are passed over."""
    head, separator, body = data.partition(b"\r\n\r\n")
    assert separator, f"no whole answer in {data!r}"
    lines = head.decode("latin-1").split("\r\n")
    match = re.fullmatch(r"HTTP/1\.1 (\d{3}) .+", lines[0])
    assert match, f"not a status line: {lines[0]!r}"
    status = int(match.group(1))
    if status == 100:
        return parse_answer(body)
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(": ")
        assert name.lower() not in headers, f"{name} stands twice"
        headers[name.lower()] = value
    return Answer(status, headers, body)


def raw(port: int, data: bytes, seconds: float = 10) -> bytes:
    """Sends DATA over a new connection and reads to the end of what comes back."""
    with socket.create_connection(("127.0.0.1", port), seconds) as s, s.makefile("rb") as answer:
        s.sendall(data)
        return answer.read()


def http(
        port: int, method: str, path: str, body: Optional[bytes] = None,
        headers: Optional[Dict[str, str]] = None, seconds: float = 30) -> Answer:  # fmt: skip
    fields = {"Host": f"127.0.0.1:{port}"}
    if body is not None:
        fields["Content-Length"] = str(len(body))
    fields.update(headers or {})
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in fields.items())
    return parse_answer(raw(port, head.encode("latin-1") + b"\r\n" + (body or b""), seconds))


# ---------------------------------------------------------------- what is signed

ID = b"1234567890" * 4
FINGERPRINT = b"SHA256:" + b"a" * 43
AUTHOR = b"A U Thor <author@example.com>"
COMMITTER = b"C O Mitter <committer@example.com>"
WHEN = b" 1700000000 +0100\n"


def commit(
        subject: bytes = b"Subject", author: bytes = AUTHOR, committer: bytes = COMMITTER,
        id: bytes = ID) -> bytes:  # fmt: skip
    """A commit without parents, as git hands it to its signer."""
    head = b"tree " + id + b"\nauthor " + author + WHEN + b"committer " + committer + WHEN
    return head + b"\n" + subject + b"\n"


def tag(subject: bytes = b"Subject", tagger: bytes = COMMITTER) -> bytes:
    head = b"object " + ID + b"\ntype commit\ntag v1\ntagger " + tagger + WHEN
    return head + b"\n" + subject + b"\n"


def push(ref: bytes = b"refs/heads/main", pushee: bytes = b"https://example.com/x.git") -> bytes:
    head = b"certificate version 0.1\npusher " + FINGERPRINT + b" " + WHEN
    ids = ID + b" " + ID
    refs = ids + b" " + ref + b"\n" + ids + b" refs/heads/other\n"
    return head + b"pushee " + pushee + b"\nnonce 1-a\n\n" + refs


# ---------------------------------------------------------------- hostile texts

TEXTS = [
    ("empty", b""),
    ("quotes and backslashes", b'a"b\\c \\" b=c \\\\" \\'),
    ("literal escapes", b"a\\nb \\x1b\\u202e\\U000e0001\\\\"),
    ("looks like fields", b'" outcome=refused id=1 digest="'),
    ("looks like lines of a prompt", "fix • author: Someone Else • key: SHA256:x •".encode()),
    ("a line break and a line", b"a\n2026-01-01T00:00:00+0000 AUDIT outcome=signed status=200"),
    ("a carriage return", b"real\rauthor: Someone Else"),
    ("all controls", bytes(c for c in [*range(1, 32), 127] if c != 10)),
    ("escapes and C1 controls", "\x1b[2J\x1b]0;title\x07 a\x85\x9b31m\x90".encode()),
    ("unseen", "a\u202e\u2066\u200b\ufeff\U000e0041\ufe0f\u3164\u2028\u00a0\ue000".encode()),
    ("letters of all sizes", "aé☃\U0001d4b3 …".encode()),
    ("no UTF-8", b"caf\xe9 \xff a\xed\xa0\x80b \xc3"),
    ("blanks around", b"  both  "),
    ("blanks between", b"real" + 200 * b" " + b"author: Someone Else"),
    ("markup, shell and format", b"&lt;b&gt; $(touch /tmp/x) `id` ${HOME} ; %s%n {0} ' --help"),
    ("100 characters", b"b" * 100),
    ("101 characters", b"b" * 101),
    ("10,000 quotes", b'"' * 10000),
    ("10,000 long escapes", "\U000e0041".encode() * 10000),
    ("10,000 bytes of Latin-1", b"\xe9" * 10000),
]

# Seen as nothing, or as a blank, though Unicode calls them letters, marks or symbols.
BLANK_LOOKING = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0}
BLANK_LOOKING |= {*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0000, 0xE1000)}


def can_be_seen(c: str) -> bool:
    """Neither control nor format, private, unassigned or a blank other than " "."""
    return c == " " or (unicodedata.category(c)[0] not in "CZ" and ord(c) not in BLANK_LOOKING)


# ---------------------------------------------------------------- git

GIT_CONFIG = """\
[gpg]
    format = ssh
[gpg "ssh"]
    program = {program}
    allowedSignersFile = {signers}
[user]
    signingkey = {public}
[commit]
    gpgsign = true
[tag]
    gpgsign = true
"""


class Repository:
    """In a home whose git signs everything through the shim and the proxy at URL, or by PROGRAM;
    PUBLIC is the key's .pub file."""

    def __init__(
        self, home: Path, url: str, public: Path, id_format: str = "sha1", program: Path = SHIM
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.path = home / "repository"
        self.public = public
        self.env = clean_env(home, SSH_AGENT_PROXY_URL=url, GIT_EDITOR="true")
        self.now = 1700000000
        paths = {"program": program, "signers": home / "signers", "public": public}
        quoted = {name: json.dumps(str(paths[name]), ensure_ascii=False) for name in paths}
        (home / ".gitconfig").write_text(GIT_CONFIG.format(**quoted))
        (home / "signers").write_text(f"committer@example.com {public.read_text()}")
        init = ["git", "init", "-q", "-b", "main", f"--object-format={id_format}", self.path]
        run(init, env=self.env)

    def run(
        self, *args: Any, input: Optional[bytes] = None, check: bool = True, **env: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """Git. No two objects are the same: each command has a second of its own."""
        self.now += 1
        when = f"{self.now} +0000"
        dates = {"GIT_AUTHOR_DATE": when, "GIT_COMMITTER_DATE": when}
        env = {**self.env, **dates, **env}
        return run(["git", *args], env=env, cwd=self.path, input=input, check=check)

    def git(self, *args: Any, **more: Any) -> str:
        """What git prints, without blanks around."""
        return self.run(*args, **more).stdout.decode("utf-8", "surrogateescape").strip()

    def commit(self, text: str, *options: str) -> str:
        """The id of a commit of a file of its own."""
        (self.path / text.split()[0]).write_text(text)
        self.git("add", ".")
        self.git("commit", "-q", "-m", text, *options)
        return self.git("rev-parse", "HEAD")


# ---------------------------------------------------------------- requests as bytes

HOST = b"Host: localhost\r\n"


def lines(fields: Iterable[str]) -> bytes:
    return "".join(f"{field}\r\n" for field in fields).encode("latin-1")


def get(path: str, *fields: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\n".encode() + HOST + lines(fields) + b"\r\n"


def post(body: bytes, *fields: str, length: Optional[int] = None) -> bytes:
    """A POST to /sign; LENGTH, where the body is to differ from what is announced."""
    length = len(body) if length is None else length
    head = b"POST /sign HTTP/1.1\r\n" + HOST + f"Content-Length: {length}\r\n".encode()
    return head + lines(fields) + b"\r\n" + body


def post_chunked(body: bytes, *fields: str) -> bytes:
    """A POST to /sign of a body that is already in chunks."""
    head = b"POST /sign HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n"
    return head + lines(fields) + b"\r\n" + body


def connect(where: Union[int, Path]) -> socket.socket:
    """A connection to the port of this machine, or to the Unix socket."""
    if isinstance(where, int):
        return socket.create_connection(("127.0.0.1", where), 10)
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(10)
    s.connect(str(where))
    return s


def read_all(connection: socket.socket, seconds: float = 10) -> bytes:
    """What comes until the proxy ends the connection."""
    connection.settimeout(seconds)
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


def the_one_answer(data: bytes) -> Answer:
    """The answer in all that came over a connection: there is one, and nothing behind it."""
    answer = parse_answer(data)
    assert len(re.findall(rb"^HTTP/1\.1 [1-5]\d\d ", data, re.M)) == 1, data
    assert answer.headers["connection"] == "close"
    assert re.fullmatch(r"ssh-agent-proxy/\d+\.\d+\.\d+", answer.headers["server"])
    assert len(answer.body) == int(answer.headers["content-length"])
    assert not [name for name in answer.headers if name.startswith("access-control")]
    return answer


def ask(where: Union[int, Path], data: bytes) -> Answer:
    """The one answer to DATA."""
    with connect(where) as s:
        s.sendall(data)
        return the_one_answer(read_all(s))


def refused(answer: Answer, status: int) -> Answer:
    """An error that tells a person what to do, in one line."""
    assert answer.status == status, answer
    assert answer.headers["content-type"].startswith("text/plain")
    assert re.fullmatch(r"[^\n]{10,}\n", answer.text), answer.text
    assert answer.text[:-1].isprintable(), answer.text
    assert ("retry-after" in answer.headers) == ("busy" in answer.text)
    assert ("allow" in answer.headers) == (status == 405)
    return answer


# ---------------------------------------------------------------- the log


def request_lines(log: str) -> List[str]:
    """The lines that the log has for requests."""
    return [line for line in log.splitlines() if "outcome=" in line]


def log_fields(line: str) -> Dict[str, str]:
    return {
        name: value[1:-1] if value.startswith('"') else value
        for name, value in re.findall(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^ "]*)(?= |$)', line)
    }


def audited(proxy: Proxy, number: int = 1) -> Dict[str, str]:
    """The NUMBERth line that the log has for a request."""
    wait_for(lambda: len(request_lines(proxy.log())) >= number, message="a line in the log")
    return log_fields(request_lines(proxy.log())[number - 1])


_markers = itertools.count()


def lines_until_now(proxy: Proxy, where: Union[int, Path]) -> List[str]:
    """The lines that the log has for requests, once it has those of all that are answered; the last
    one is of a request for this purpose."""
    marker = f"/marker{next(_markers)}"
    ask(where, get(marker))
    wait_for(lambda: f"path={marker} " in proxy.log(), message="the marker's line")
    return request_lines(proxy.log())


def logged(proxy: Proxy, where: Union[int, Path], data: bytes) -> Tuple[bytes, List[str]]:
    """What comes back for DATA, and the lines that the log has for it."""
    before = len(lines_until_now(proxy, where))
    with connect(where) as s:
        s.sendall(data)
        received = read_all(s)
    return received, lines_until_now(proxy, where)[before:-1]


# ---------------------------------------------------------------- what OpenSSH makes of it


Keygen = Callable[..., bytes]


@pytest.fixture
def ssh_keygen(keys: Keys) -> Callable[..., bytes]:
    """What `ssh-keygen -Y sign` makes of a payload."""

    def sign(
        payload: bytes, hash_algorithm: str = "sha512", key: str = "ed25519", namespace: str = "git"
    ) -> bytes:
        argv = ["ssh-keygen", "-q", "-Y", "sign", "-n", namespace, "-f", keys[key]]
        return run([*argv, "-O", f"hashalg={hash_algorithm}"], input=payload).stdout

    return sign
