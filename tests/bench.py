"""How fast, how small, how quiet: every figure in one run, as `make bench` prints it.

    python tests/bench.py [--quick] [FIGURE ...]

Each figure is a ratio (or a difference) of medians between two things that are measured in turn,
A B A B ..., on the same machine in the same minute; the milliseconds beside it say how fast the
machine is. What is compared with what, and why that is fair, stands with each figure below. It
needs ssh-agent, ssh-add, ssh-keygen, git and curl, uses an agent, keys and repositories of its
own in a temporary directory, and leaves nothing behind. It judges nobody: the exit status is 0
unless something could not be run at all.
"""

import argparse
import base64
import contextlib
import hashlib
import multiprocessing
import multiprocessing.pool
import os
import platform
import re
import selectors
import shutil
import signal
import socket
import socketserver
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import pytest
from conftest import PROXY, ROOT, Agent, FileLogged, Keys, clean_env, listens, run, wait_for, within
from conftest import message as string

# Never a version manager's wrapper of that name on the path, which costs time at each start.
PYTHON = sys.executable
NAMESPACE = b"git"
MIB = 1 << 20
FIGURE_SECONDS = 300  # for one figure, at most
PAYLOAD = b"""\
tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904
parent 1f7a7a472abf3dd9643fd615f6da379c4acb3e3a
author Bench <bench@example.com> 1700000000 +0000
committer Bench <bench@example.com> 1700000000 +0000

A commit as git hands it to the signer
"""


class Failed(Exception):
    """Something could not be run; the message says what, and why as far as that is known.

    (What conftest raises instead does not find its way out of another process.)
    """


# -- One exchange: what a client does, and what it must get ---------------------------------------


class Exchange(NamedTuple):
    """A request over a new connection; the address is a Unix path (agent) or a port (HTTP)."""

    address: Union[str, int]
    request: bytes
    ends_with: bytes

    def connect(self) -> socket.socket:
        if isinstance(self.address, str):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(self.address)
        else:
            connection = socket.socket(socket.AF_INET)
            connection.connect(("127.0.0.1", self.address))
        return connection

    def read(self, connection: socket.socket) -> bytes:
        answer = more = connection.recv(65536)
        while more and not self.is_whole(answer):
            more = connection.recv(65536)
            answer += more
        return answer

    def is_whole(self, answer: bytes) -> bool:
        """An agent's by its length; an HTTP one ends with the connection."""
        if not isinstance(self.address, str) or len(answer) < 4:
            return False
        return len(answer) >= 4 + struct.unpack_from(">I", answer)[0]

    def check(self, answer: bytes) -> None:
        # Ed25519 signatures are deterministic: the right answer is known to the last byte.
        if not answer.endswith(self.ends_with):
            what = "the agent" if isinstance(self.address, str) else "the proxy"
            raise Failed(f"{what} gave a wrong answer: {answer[:300]!r}")

    def seconds(self) -> float:
        """Run it once, from connect to close, and say how long that took."""
        began = time.perf_counter()
        with self.connect() as connection:
            connection.sendall(self.request)
            answer = self.read(connection)
        took = time.perf_counter() - began
        self.check(answer)
        return took


def in_turn(rounds: int, *what: Callable[[], float]) -> list[float]:
    """Medians of each, run in turn `rounds` times, so that what slows one down slows all."""
    taken: list[list[float]] = [[] for _ in what]
    for _ in range(max(2, rounds // 10)):
        for once in what:
            once()
    for _ in range(rounds):
        for times, once in zip(taken, what):
            times.append(once())
    return [statistics.median(times) for times in taken]


# -- What runs in processes of its own: clients, and a slow agent ----------------------------------


def client(exchange: Exchange, seconds: float, at_most: int) -> int:
    """Sign as often as possible for so long, or until there are enough."""
    done = 0
    end = time.perf_counter() + seconds
    while done < at_most and time.perf_counter() < end:
        exchange.seconds()
        done += 1
    return done


def clients_at_once(count: int, exchange: Exchange) -> float:
    """Send `count` requests at once, each over its own connection; seconds until all are done.

    One thread waits for all of them: the scheduling of 32 would be most of the figure.
    """
    began = time.perf_counter()
    answers: dict[socket.socket, bytes] = {}
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(count):
            connection = stack.enter_context(exchange.connect())
            connection.sendall(exchange.request)
            selector.register(connection, selectors.EVENT_READ)
        while len(answers) < count:
            for key, _ in selector.select():
                connection = key.fileobj  # type: ignore[assignment]
                answers[connection] = exchange.read(connection)
                selector.unregister(connection)
        took = time.perf_counter() - began
    for answer in answers.values():
        exchange.check(answer)
    return took


def slow_agent(path: str, delay: float, request: bytes, answer: bytes) -> None:
    """An agent that knows one request, and answers it after `delay` seconds."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            heard = self.request.recv(65536)
            if heard:
                time.sleep(delay)
                self.request.sendall(answer if heard == request else string(b"\x05"))

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True
        request_queue_size = 128

    Server(path, Handler).serve_forever()


def processes(count: int) -> multiprocessing.pool.Pool:
    """Each takes one of as many tasks, and none is alive after the `with`, whatever happened."""
    # Anew, not forked: nothing of the main program's is in them. A Ctrl-C reaches that alone.
    anew = multiprocessing.get_context("spawn")
    return anew.Pool(count, signal.signal, (signal.SIGINT, signal.SIG_IGN))


# -- The laboratory: everything that is started, and ends with the run ----------------------------


class Lab:
    """A temporary directory with a key, an agent, and whatever a figure starts in it."""

    def __init__(self, home: Path, quick: bool, stack: contextlib.ExitStack) -> None:
        self.home, self.quick, self.stack = home, quick, stack
        # As it is installed: by its name, started by its first line.
        self.shim = Path(shutil.copyfile(ROOT / "shim.sh", home / "ssh-agent-proxy-sign"))
        self.shim.chmod(0o755)
        # Nothing but the proxy's own setting leads to an agent.
        self.env = clean_env(home)
        # It tells of each client that leaves early; and see FileLogged.
        Agent.how = {"stderr": subprocess.DEVNULL, "start_new_session": True}
        keys = Keys(home)
        self.key = keys["ed25519"]
        self.public = " ".join(keys.line("ed25519").split()[:2])
        agent = Agent(home / "agent")
        stack.callback(agent.stop)
        agent.add(self.key)
        self.agent = str(agent.sock)
        (home / "payload").write_bytes(PAYLOAD)
        self.armor = self.signed(home / "payload")
        self.common: Optional[FileLogged] = None

    def run(self, *argv: Any) -> None:
        run(argv, env=self.env)

    def signed(self, file: Path) -> bytes:
        """As ssh-keygen does it."""
        self.run("ssh-keygen", "-q", "-Y", "sign", "-n", "git", "-f", self.key, file)
        return Path(f"{file}.sig").read_bytes()

    def seconds(
        self, *argv: Any, stdin: Path = Path(os.devnull), stdout: Path = Path(os.devnull)
    ) -> float:
        """How long one program takes, from the spawn to the end.

        `posix_spawn` itself, for `subprocess` adds a millisecond of Python to both sides of a
        ratio, which would flatter the slower one.
        """
        errors = self.home / "errors"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        files = [(str(stdin), os.O_RDONLY), (str(stdout), flags), (str(errors), flags)]
        words = [str(word) for word in argv]
        began = time.perf_counter()
        pid = os.posix_spawn(words[0], words, self.env, setpgroup=0, file_actions=[
            (os.POSIX_SPAWN_OPEN, number, path, mode, 0o600)
            for number, (path, mode) in enumerate(files)
        ])
        try:
            _, status = os.waitpid(pid, 0)
        except BaseException:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        took = time.perf_counter() - began
        if status:
            why = errors.read_text("utf-8", "replace").strip()[-500:]
            raise Failed(f"{' '.join(words[:3])} ... failed: {why}")
        return took

    def start_proxy(self, upstream: str = "") -> FileLogged:
        """Start one; its log goes to a file, for a reader here would cost the client time."""
        folder = self.home / f"proxy{len(list(self.home.iterdir()))}"
        proxy = FileLogged(folder, "--upstream", upstream or self.agent)
        self.stack.callback(proxy.stop)
        return proxy

    def proxy(self) -> FileLogged:
        """The one that figures share whose history doesn't matter; the shim's from then on."""
        if self.common is None:
            self.common = self.start_proxy()
            self.env["SSH_AGENT_PROXY_URL"] = f"http://127.0.0.1:{self.common.port}/sign"
        return self.common

    def direct(self, address: str = "") -> Exchange:
        """The agent's own signature: what `ssh-keygen -Y sign` asks it for."""
        signed = b"SSHSIG" + b"".join(map(
            string, (NAMESPACE, b"", b"sha512", hashlib.sha512(PAYLOAD).digest())
        ))
        blob = base64.b64decode(self.public.split()[1])
        request = string(b"\x0d" + string(blob) + string(signed) + struct.pack(">I", 0))
        lines = self.armor.decode("ascii").splitlines()
        block = base64.b64decode("".join(lines[1:-1]))
        # The block ends with the signature exactly as the agent gives it, length in front.
        signature = block[-(4 + 4 + len("ssh-ed25519") + 4 + 64):]
        return Exchange(address or self.agent, request, string(b"\x0e" + signature))

    def sign(self, port: int) -> Exchange:
        return self.post(port, f"Content-Length: {len(PAYLOAD)}", PAYLOAD, self.armor)

    def post(self, port: int, framing: str, content: bytes, armor: bytes) -> Exchange:
        head = (
            f"POST /sign HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nSSHSIG-Key: {self.public}\r\n"
            f"{framing}\r\n\r\n"
        )
        return Exchange(port, head.encode("ascii") + content, armor)


def resident(pid: int) -> float:
    """Resident MiB of a process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    except FileNotFoundError:
        return float(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)])) / 1024
    return int(re.findall(r"VmRSS:\s*(\d+)", status)[0]) / 1024


def switches(pid: int) -> Optional[dict[str, int]]:
    """For each thread how often it was switched away from; None where that can't be read.

    A thread that sleeps in the kernel calls nothing. It has to run for that, and then it either
    goes to sleep again or is interrupted: both are counted here. So no switch means no system
    call, with no tracer to disturb what is watched.
    """
    counts: dict[str, int] = {}
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            of_thread = re.findall(r"ctxt_switches:\s*(\d+)", status.read_text("ascii", "replace"))
            counts[status.parent.name] = sum(map(int, of_thread))
    return counts or None


# -- The figures ----------------------------------------------------------------------------------


class Figure(NamedTuple):
    what: str
    value: Optional[float]
    unit: str  # "x" is a ratio, "" a count; a unit that begins with "+" is a difference
    limit: float
    beside: str
    at_least: bool = False

    def line(self) -> str:
        bound = f"{'>=' if self.at_least else '<='} {self.limit:.3g}"
        measured, verdict = "-", "?"
        if self.value is not None:
            sign = "+" if self.unit.startswith("+") else ""
            decimals = 2 if self.unit else 0
            measured = f"{self.value:{sign}.{decimals}f} {self.unit.lstrip('+')}"
            fine = self.value >= self.limit if self.at_least else self.value <= self.limit
            verdict = "ok" if fine else "OVER"
        return f"{self.what:<34} {measured:>9}  {bound:<7} {verdict:<4} {self.beside}".rstrip()


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.{2 if seconds < 0.005 else 1}f} ms"


def sign(lab: Lab) -> Iterator[Figure]:
    """One signature over a new connection, connect to close: the proxy's to the agent's own."""
    direct, through = lab.direct(), lab.sign(lab.proxy().port)
    agent, proxy = in_turn(300 if lab.quick else 2000, direct.seconds, through.seconds)
    yield Figure("sign: new connection, known key", proxy / agent, "x", 1.6,
                 f"{ms(proxy)}; agent {ms(agent)}")


def clients(lab: Lab) -> Iterator[Figure]:
    """Signatures per second that 8 clients get together: through the proxy to directly.

    Eight processes, as eight containers would be: threads of one client would share a lock of
    their own, and one loop for all would be on one core.
    """
    count, seconds = 8, 0.5 if lab.quick else 1.0
    direct, through = lab.direct(), lab.sign(lab.proxy().port)
    with processes(count) as helpers:

        def per_second(exchange: Exchange) -> float:
            tasks = [(exchange, seconds, sys.maxsize)] * count
            return sum(helpers.starmap(client, tasks, chunksize=1)) / seconds

        agent, proxy = in_turn(
            3 if lab.quick else 7, lambda: per_second(direct), lambda: per_second(through)
        )
    yield Figure(f"clients: {count} at once, signatures/s", proxy / agent, "x", 0.85,
                 f"{proxy:.0f}/s; agent {agent:.0f}/s", at_least=True)


def slow(lab: Lab) -> Iterator[Figure]:
    """32 clients at once and an agent that takes 250 ms: what the proxy adds until all are done.

    The agent is one of our own, for a real one signs one after the other; what it answers was
    signed by the real one. Meanwhile /healthz is asked every 5 ms.
    """
    count, delay = 32, 0.25
    path = str(lab.home / "slow")
    direct = lab.direct(path)
    with processes(2) as helpers:
        helpers.apply_async(slow_agent, (path, delay, direct.request, direct.ends_with))
        wait_for(lambda: listens(Path(path)), message="the slow agent listens")
        proxy = lab.start_proxy(path)
        through = lab.sign(proxy.port)
        healthz = Exchange(
            proxy.port, f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{proxy.port}\r\n\r\n".encode(),
            b"\r\n\r\nok\n",
        )
        healthy: list[float] = []

        def crowd_seconds(exchange: Exchange) -> float:
            crowd = helpers.apply_async(clients_at_once, (count, exchange))
            end = time.perf_counter() + delay
            while time.perf_counter() < end:
                if exchange is through:
                    healthy.append(healthz.seconds())
                time.sleep(0.005)
            return crowd.get()

        first = crowd_seconds(through)
        alone, all_of_them = in_turn(
            4 if lab.quick else 12, lambda: crowd_seconds(direct), lambda: crowd_seconds(through)
        )
    yield Figure(f"slow: {count} clients, agent of 250 ms", 1000 * (all_of_them - alone),
                 "+ms", 30, f"{ms(all_of_them)}; agent {ms(alone)}; first {ms(first)}")
    yield Figure("slow: /healthz meanwhile", 1000 * statistics.median(healthy), "ms", 2,
                 f"slowest of {len(healthy)}: {ms(max(healthy))}")


def shim(lab: Lab) -> Iterator[Figure]:
    """The shim's whole run to a bare curl of the same request: each the least of three rounds."""
    proxy = lab.proxy()
    payload, existing = lab.home / "commit", lab.home / "commit.sig"
    gits_own = lab.home / ".git_signing_buffer_tmpAb3dEf"
    made, answer = Path(f"{gits_own}.sig"), lab.home / "answer"
    payload.write_bytes(PAYLOAD)
    gits_own.write_bytes(PAYLOAD)
    existing.write_bytes(b"an old signature")

    def fresh(written: Path, *argv: Any, **streams: Path) -> Callable[[], float]:
        def run() -> float:
            if written != existing:
                written.unlink(missing_ok=True)
            took = lab.seconds(*argv, **streams)
            if written.read_bytes() != lab.armor:
                raise Failed(f"{argv[0]}: a wrong signature")
            return took

        return run

    sign = [lab.shim, "-Y", "sign", "-n", "git", "-f", lab.key]
    runs = [
        fresh(answer, shutil.which("curl"), "-q", "-sS", "--noproxy", "*", "-o", answer,
              "-H", "SSHSIG-Namespace: git", "-H", f"SSHSIG-Key: {lab.public}",
              "--data-binary", f"@{payload}", f"http://127.0.0.1:{proxy.port}/sign"),
        fresh(made, *sign, gits_own),
        fresh(answer, *sign, stdin=payload, stdout=answer),
        fresh(existing, *sign, payload),
    ]
    rounds = [in_turn(10 if lab.quick else 70, *runs) for _ in range(3)]
    names = ["git's own call", "standard input", "over an existing FILE.sig"]
    for place, (name, bound) in enumerate(zip(names, (1.25, 1.45, 1.40)), 1):
        ratio, ours, bare = min((each[place] / each[0], each[place], each[0]) for each in rounds)
        yield Figure(f"shim: {name}", ratio, "x", bound, f"{ms(ours)}; curl {ms(bare)}")


def commit(lab: Lab) -> Iterator[Figure]:
    """A whole `git commit`: through the shim less natively, with `ssh-keygen` and the key file."""
    git = shutil.which("git")
    signers = lab.home / "signers"
    signers.write_text(f"bench@example.com {lab.public}\n", "ascii")
    lab.proxy()

    def repository(name: str, *settings: str) -> Callable[[], float]:
        path = lab.home / name
        lab.run("git", "init", "-q", path)
        for setting in (
            "user.name=Bench", "user.email=bench@example.com", "gpg.format=ssh",
            "commit.gpgsign=true", "gc.auto=0", f"gpg.ssh.allowedSignersFile={signers}", *settings,
        ):
            lab.run("git", "-C", path, "config", *setting.split("=", 1))
        return lambda: lab.seconds(git, "-C", path, "commit", "-q", "--allow-empty", "-m", "Bench")

    native, with_file, with_command = in_turn(
        10 if lab.quick else 60,
        repository("native", f"user.signingkey={lab.key}"),
        repository("file", f"user.signingkey={lab.key}", f"gpg.ssh.program={lab.shim}"),
        repository("command", f"gpg.ssh.defaultKeyCommand={lab.shim} key",
                   f"gpg.ssh.program={lab.shim}"),
    )
    for name in ("native", "file", "command"):
        # Verifying is ssh-keygen's work whoever signed.
        lab.run("git", "-C", lab.home / name, "-c", "gpg.ssh.program=ssh-keygen",
                "verify-commit", "HEAD")
    yield Figure("commit: with a key file", 1000 * (with_file - native), "+ms", 8,
                 f"{ms(with_file)}; ssh-keygen {ms(native)}")
    yield Figure("commit: with defaultKeyCommand", 1000 * (with_command - native), "+ms", 20,
                 f"{ms(with_command)}; ssh-keygen {ms(native)}")


def body(lab: Lab) -> Iterator[Figure]:
    """A body of 64 MiB, to one `sha512` over the same bytes in memory; and the proxy's memory.

    Sent from connect to answer; what is sent lies ready, so that the client only copies. The
    chunks are of 64 KiB less their frame, as curl cuts them.
    """
    data = b"\xa5\x5a\x00\xff" * (16 * MIB)
    cut = 65536 - 12
    pieces = [data[at:at + cut] for at in range(0, len(data), cut)]
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    (lab.home / "body").write_bytes(data)
    armor = lab.signed(lab.home / "body")

    def hashing() -> float:
        began = time.perf_counter()
        hashlib.sha512(data).digest()
        return time.perf_counter() - began

    # Memory first, of a proxy that has never seen a body: the growth is then all that it keeps.
    proxy = lab.start_proxy()
    lab.sign(proxy.port).seconds()
    by_length = lab.post(proxy.port, f"Content-Length: {len(data)}", data, armor)
    by_chunks = lab.post(proxy.port, "Transfer-Encoding: chunked", chunked, armor)
    before = resident(proxy.pid)
    seen, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(resident(proxy.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        by_length.seconds()
        by_chunks.seconds()
    finally:
        done.set()
        watcher.join()
    hashed, whole, cut_up = in_turn(
        5 if lab.quick else 15, hashing, by_length.seconds, by_chunks.seconds
    )
    yield Figure("body: 64 MiB by Content-Length", whole / hashed, "x", 1.6,
                 f"{ms(whole)}; hashing {ms(hashed)}")
    yield Figure("body: 64 MiB chunked", cut_up / hashed, "x", 2.5,
                 f"{ms(cut_up)}; hashing {ms(hashed)}")
    yield Figure("body: memory meanwhile, growth", max(seen) - before, "+MiB", 4,
                 f"{before:.2f} to {max(seen):.2f} MiB, {len(seen)} samples")


def start(lab: Lab) -> Iterator[Figure]:
    """From the spawn to the `listening on` line, to a whole `python -c 'import http.server'`;
    and the zipapp to the script."""

    def until(said: bytes, *argv: Any) -> float:
        """Until it says so, or has ended when that is nothing."""
        began = time.perf_counter()
        lines = [b""]
        with subprocess.Popen(argv, env=lab.env, stderr=subprocess.PIPE) as process:
            assert process.stderr
            while not said or said not in lines[-1]:
                lines.append(process.stderr.readline())
                if not lines[-1]:
                    break
            took = time.perf_counter() - began
            process.terminate()
        if said not in lines[-1]:
            raise Failed(f"{argv[1]} ended: {b''.join(lines)!r}")
        return took

    words = ["--addr", "127.0.0.1:0", "--upstream", lab.agent]
    built = lab.home / "ssh-agent-proxy"
    # Its first line is not used: PYTHON runs it.
    lab.run(PYTHON, ROOT / "contrib/build.py", built, "/usr/bin/python3")
    script, zipapp = [PYTHON, PROXY, *words], [PYTHON, "-I", built, *words]
    imported, listens, zipped = in_turn(
        8 if lab.quick else 40,
        lambda: until(b"", PYTHON, "-c", "import http.server"),
        lambda: until(b"listening on ", *script),
        lambda: until(b"listening on ", *zipapp),
    )
    yield Figure("start: until it listens", listens / imported, "x", 2.0,
                 f"{ms(listens)}; import http.server {ms(imported)}")
    yield Figure("start: zipapp, until it listens", zipped / listens, "x", 1.1,
                 f"{ms(zipped)}; the script {ms(listens)}")


def idle(lab: Lab) -> Iterator[Figure]:
    """Memory at rest and over many signatures, and how often a proxy at rest wakes up.

    The signatures come from 8 clients at once: threads that come and go are where memory stays.
    """
    count, few, many, seconds = 8, 1000, 10000, 10
    proxy = lab.start_proxy()
    exchange = lab.sign(proxy.port)
    fresh = resident(proxy.pid)
    with processes(count) as helpers:

        def signatures(number: int) -> float:
            helpers.starmap(client, [(exchange, 600, number // count)] * count, chunksize=1)
            return resident(proxy.pid)

        early = signatures(few)
        late = signatures(many - few)
    before = at_rest(proxy.pid)
    late = max(late, resident(proxy.pid))
    yield Figure("idle: memory, resident", max(fresh, late), "MiB", 28,
                 f"{fresh:.2f} MiB at start, {late:.2f} MiB at the end")
    yield Figure(f"idle: memory, growth {few} to {many}", late - early, "+MiB", 1,
                 f"{early:.2f} to {late:.2f} MiB")
    woken: Optional[int] = None
    if before is not None:
        time.sleep(seconds)
        after = switches(proxy.pid) or {}
        woken = sum(abs(after.get(task, 0) - before.get(task, 0)) for task in {*before, *after})
    yield Figure(f"idle: wake-ups in {seconds} s", woken, "", 0,
                 f"{len(before)} threads" if before is not None else "needs Linux's /proc")


def at_rest(pid: int) -> Optional[dict[str, int]]:
    """Wait until nothing has run for half a second, but not for ever: the switches until then."""
    before = None
    for _ in range(20):
        now = switches(pid)
        if now == before:
            break
        before = now
        time.sleep(0.5)
    return before


FIGURES: dict[str, Callable[[Lab], Iterator[Figure]]] = {
    figure.__name__: figure for figure in (sign, clients, slow, shim, commit, body, start, idle)
}


# -- The run --------------------------------------------------------------------------------------


def version(*argv: str) -> str:
    said = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    found = re.search(rb"(?:OpenSSH_|version |curl )([\w.]+)", said.stdout)
    return found.group(1).decode("ascii", "replace") if found else "?"


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Others' work on the same cores tells on a chain of three programs more than on one of two.
    load = os.getloadavg()[0]
    return (
        f"{cores} cores, load {load:.1f}, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, OpenSSH {version('ssh', '-V')}, "
        f"git {version('git', '--version')}, curl {version('curl', '--version')}"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("--quick", action="store_true", help="fewer rounds, rougher figures")
    args = parser.parse_args(argv)
    unknown = [name for name in args.figures if name not in FIGURES]
    if unknown:
        parser.error(f"no figure is called {unknown[0]!r}; there are {', '.join(FIGURES)}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    # /tmp, for a Unix socket's path has room for some 100 bytes and TMPDIR may have more.
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp"))
        try:
            print(machine(), end="\n\n")
            print(f"{'figure':<34} {'measured':>9}  {'limit':<7} {'':<4} medians", flush=True)
            lab = Lab(Path(home), args.quick, stack)
            for name in args.figures or FIGURES:
                # The clients' sockets have no limits of their own: a system call each.
                with within(FIGURE_SECONDS):
                    for figure in FIGURES[name](lab):
                        print(figure.line(), flush=True)
        except KeyboardInterrupt:
            return 130
        except (Failed, OSError, pytest.fail.Exception) as error:
            print(f"bench.py: {error}", file=sys.stderr)
            return 1
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
