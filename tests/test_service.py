"""The process in its surroundings: signals, the log and where it goes, idling, threads."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import pytest
from conftest import (
    PROXY, ROOT, Agent, Keys, Proxy, StartAgent, StartProxy, StartScripted, ask, cannot_run,
    clean_env, get, http, listens, log_fields, parse_answer, post, raw, read_all, request_lines,
    rows, the_one_answer, tuned, wait_for,
)  # fmt: skip
from test_http import START, Clients, Scripted, clients, gate, gated

import ssh_agent_proxy
from ssh_agent_proxy import AUDIT, LOG, ServiceManager, StderrHandler

__all__ = ["clients", "gate", "gated"]  # fixtures

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")

LINE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (DEBUG|INFO|AUDIT|WARNING|ERROR) \S.*"


def end(proxy: Proxy, seconds: float = 10) -> int:
    """The exit status, once the process has ended by itself."""
    return proxy.process.wait(seconds)


def with_hook(code: str) -> List[str]:
    """For start_proxy's PYTHON: the program, once CODE has changed it (as p)."""
    before = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ssh_agent_proxy as p"
    return [sys.executable, "-c", f"{before}\n{code}\nsys.exit(p.main(sys.argv[2:]))"]


# ---------------------------------------------------------------- signals


def begin(proxy: Proxy, gate: Scripted, clients: Clients) -> socket.socket:
    """A request that waits for the agent."""
    (client,) = clients.open(proxy.port, post(b"x"))
    wait_for(lambda: gate.signing == 1, message="the request is at the agent")
    return client


def test_a_second_signal_ends_it_at_once_and_says_so(
        gate: Scripted, gated: Proxy, clients: Clients) -> None:  # fmt: skip
    """The person may have touched the key by then: what became of it is on record."""
    client = begin(gated, gate, clients)
    clients.open(gated.port, START)
    gated.process.send_signal(signal.SIGTERM)
    gated.wait_log(" INFO stopping")
    assert gated.process.poll() is None
    gated.process.send_signal(signal.SIGINT)
    assert end(gated, 5) == 0  # of the ten seconds that it would wait
    assert parse_answer(read_all(client)).text == "the proxy is about to end\n"
    ends = [log_fields(line) for line in request_lines(gated.log())]
    assert [line["reason"] for line in ends] == 2 * ["the proxy is about to end"]
    assert {(line["outcome"], line["status"]) for line in ends} == {("failed", "503")}


def test_what_does_not_end_is_waited_for_with_a_bound(
    gate: Scripted, scripted_agent: StartScripted, start_proxy: StartProxy, clients: Clients
) -> None:
    proxy = start_proxy(upstream=scripted_agent(gate), python=tuned(DRAIN_SECONDS=0.5))
    begin(proxy, gate, clients)
    started = time.monotonic()
    proxy.process.send_signal(signal.SIGTERM)
    assert end(proxy) == 0
    assert time.monotonic() - started >= 0.5


def test_a_signal_during_the_start_is_no_traceback(
        agent_with_key: Agent, start_proxy: StartProxy) -> None:  # fmt: skip
    # Wherever it hits: as soon as the process is there, and some milliseconds later each time.
    for pause in range(0, 100, 20):
        proxy = start_proxy(upstream=agent_with_key.sock, wait=False)
        threading.Event().wait(pause / 1000)
        proxy.process.send_signal(signal.SIGTERM)
        assert end(proxy) in (0, -signal.SIGTERM)


# ---------------------------------------------------------------- idle


def wakeups(pid: int) -> int:
    """How often all threads of a process together gave up the processor to wait for something."""
    number = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            status = (task / "status").read_text()
            match = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.M)
            assert match
            number += int(match.group(1))
    return number


@linux
def test_idle_it_wakes_for_nothing(proxy: Proxy) -> None:
    assert http(proxy.port, "POST", "/sign", b"x").status == 200

    def quiet() -> bool:
        before = wakeups(proxy.pid)
        time.sleep(0.1)
        return wakeups(proxy.pid) == before

    wait_for(quiet, message="the end of what belongs to the start")
    before = wakeups(proxy.pid)
    time.sleep(1)  # what is looked for is that nothing happens
    assert wakeups(proxy.pid) == before


@linux
def test_threads_are_used_again(proxy: Proxy) -> None:
    for _ in range(50):
        assert http(proxy.port, "POST", "/sign", b"x").status == 200
    # One may be about to finish while its client comes again already.
    assert len(os.listdir(f"/proc/{proxy.pid}/task")) <= 5


# ---------------------------------------------------------------- the log


def test_every_line_has_time_and_level(agent: Agent, keys: Keys, start_proxy: StartProxy) -> None:
    agent.add(keys["ed25519"])
    proxy = start_proxy("-v", upstream=agent.sock)
    hostile = "x\u202e\u200b\x9b\xff".encode()
    for request in (
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"GET /" + hostile + b" HTTP/1.0\r\n\r\n",
        b"POST /sign HTTP/1.0\r\nContent-Length: 1\r\nSSHSIG-Key: " + hostile + b"\r\n\r\nx",
        b"\x00\x1b[2J\r\r\n\n",
    ):
        raw(proxy.port, request)
    agent.stop()
    assert http(proxy.port, "POST", "/sign", b"x").status == 503
    assert proxy.stop() == 0
    assert len(proxy.lines()) > 6
    for line in proxy.lines():
        assert re.fullmatch(LINE, line), line
        assert line.isprintable()


# ---------------------------------------------------------------- where the log goes


class Running(Proxy):
    """With a standard error of the test's own making, on a Unix socket."""

    def __init__(self, folder: Path, agent: Agent, stderr: int, redirection: str = "",
                 options: Sequence[str] = (), program: Sequence[str] = (sys.executable, str(PROXY)),
                 **env: str) -> None:  # fmt: skip
        self.sock = folder / "proxy"
        words = ["sh", "-c", f'exec "$@" {redirection}', "sh", *program, *options]
        words += ["--addr", f"unix:{self.sock}", "--upstream", str(agent.sock)]
        super().__init__(words, clean_env(folder / "home", **env), wait=False, stderr=stderr)
        wait_for(lambda: listens(self.sock), message="the proxy's socket")

    def sign(self, times: int) -> None:
        """Each signature takes far less than the time it is given, unless the log holds it up."""
        for _ in range(times):
            assert ask(self.sock, post(b"x")).status == 200


Start = Callable[..., Running]


@pytest.fixture
def run_with(short: Path, agent_with_key: Agent) -> Iterator[Start]:
    """run_with(stderr, redirection="", …): the proxy, writing its log there."""
    started: List[Running] = []

    def start(stderr: int, redirection: str = "", **more: Any) -> Running:
        started.append(Running(short, agent_with_key, stderr, redirection, **more))
        return started[-1]

    yield start
    for running in started:
        running.stop()


def written(fd: int) -> bytes:
    """What stands in a pipe or terminal now."""
    os.set_blocking(fd, False)
    data = b""
    with contextlib.suppress(OSError):
        while piece := os.read(fd, 65536):
            data += piece
    return data


def pipe() -> Tuple[int, int]:
    """Full after some twenty lines."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, 1031, 4096)  # F_SETPIPE_SZ
    return reader, writer


def small_journal() -> Tuple[int, int]:
    """What it reads, and what a service has as standard error."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return ours.detach(), theirs.detach()


def stream(fd: int) -> str:
    """What JOURNAL_STREAM is for that standard error."""
    found = os.fstat(fd)
    return f"{found.st_dev}:{found.st_ino}"


@linux
@pytest.mark.parametrize(
    ("make", "line"), [(pipe, LINE), (small_journal, r"<[3-7]>\S.*")], ids=["pipe", "journal"]
)
def test_a_log_that_stalls_holds_up_no_signature_and_is_told_of(
        make: Callable[[], Tuple[int, int]], line: str, run_with: Start) -> None:  # fmt: skip
    reader, writer = make()
    running = run_with(writer, JOURNAL_STREAM=stream(writer) if make is small_journal else "")
    os.close(writer)
    running.sign(60)
    kept = written(reader).decode().splitlines()
    signed = sum("outcome=signed" in line for line in kept)
    assert kept
    assert signed < 60, "it did not stall"
    assert all(re.fullmatch(line, one) for one in kept)
    # Once there is room again the log goes on, and tells how much is missing.
    running.sign(1)
    more = wait_for(lambda: written(reader).decode(), message="a line after the stall")
    match = re.search(r"\((\d+) lines before this one could not be written\) ", more)
    assert match
    assert signed + int(match.group(1)) >= 60
    assert running.stop() == 0
    os.close(reader)


@linux
def test_a_terminal_that_nobody_reads_holds_up_no_signature(run_with: Start) -> None:
    master, terminal = os.openpty()
    running = run_with(terminal)
    os.close(terminal)
    running.sign(100)
    assert running.stop() == 0
    assert b"listening on" in written(master)
    os.close(master)


def test_a_reader_that_has_gone_holds_up_no_signature(run_with: Start) -> None:
    reader, writer = pipe()
    running = run_with(writer)
    os.close(writer)
    os.close(reader)
    running.sign(5)
    assert running.stop() == 0


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_and_a_full_disk_hold_up_no_signature(
        redirection: str, run_with: Start) -> None:  # fmt: skip
    running = run_with(subprocess.DEVNULL, redirection)
    running.sign(5)
    # Number 2 must not have become a client's connection, or the agent's.
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(running.sock, get("/healthz")), range(16)))
    assert {answer.body for answer in answers} == {b"ok\n"}
    assert running.stop() == 0


# ---------------------------------------------------------------- one line, and the next


def say(handler: StderrHandler, text: str, level: int = AUDIT) -> None:
    handler.emit(logging.LogRecord("x", level, "", 0, text, None, None))


def fill(handler: StderrHandler) -> None:
    """Until a line is lost: a flood of refusals, say."""
    while not handler.lost:
        say(handler, "outcome=refused " + "x" * 1000)


Piped = Tuple[StderrHandler, int]


@pytest.fixture
def piped() -> Iterator[Piped]:
    """A log that goes into a pipe, and where that is read."""
    reader, writer = os.pipe()
    handler = StderrHandler("")
    handler.fd = writer
    yield handler, reader
    os.close(reader)
    os.close(writer)


def test_a_flood_of_refusals_pushes_no_signature_out_of_the_log(piped: Piped) -> None:
    handler, reader = piped
    fill(handler)
    slow = threading.Timer(0.1, os.read, [reader, 65536])
    slow.start()
    say(handler, "outcome=signed status=200")
    slow.join()
    assert handler.lost == 0
    assert os.read(reader, 65536).endswith(b" outcome=signed status=200\n")


def test_where_nobody_reads_a_signature_waits_once_and_no_more(
        monkeypatch: pytest.MonkeyPatch, piped: Piped) -> None:  # fmt: skip
    handler, reader = piped
    fill(handler)
    waits = []

    def no_select(r: Any, w: Any, x: Any, seconds: float) -> Any:
        waits.append(seconds)
        return select.select(r, w, x, 0)

    monkeypatch.setattr(ssh_agent_proxy, "select", types.SimpleNamespace(select=no_select))
    for text in ("outcome=signed 1", "outcome=signed 2", "outcome=refused 3", "outcome=signed 4"):
        say(handler, text)
    assert waits == [0.5, 0, 0, 0]
    os.read(reader, 65536)
    say(handler, "outcome=refused 5")  # somebody reads again
    fill(handler)
    waits.clear()
    say(handler, "outcome=signed 6")
    assert waits == [0.5]


def test_a_line_that_a_terminal_took_in_part_is_counted_and_ended() -> None:
    master, slave = pty.openpty()
    os.set_blocking(slave, False)
    handler = StderrHandler("")
    handler.fd = slave
    for _ in range(1000):
        say(handler, "x" * 1001, logging.INFO)
        if handler.cut:
            break
    assert handler.cut, "no line was cut: this terminal takes all or nothing"
    say(handler, "lost as well", logging.INFO)
    taken = written(master)
    say(handler, "the next", logging.INFO)
    assert select.select([master], [], [], 10)[0]
    last = os.read(master, 65536).decode().replace("\r\n", "\n")
    os.close(slave)
    os.close(master)
    assert not taken.endswith(b"\n")
    assert re.fullmatch(r"\n\(2 lines before this one could not be written\) .* the next\n", last)


# ---------------------------------------------------------------- the journal


PRIORITIES = {
    "it holds ssh-ed25519": 7,
    "listening on": 6,
    "outcome=signed": 5,
    "SSH_AGENT_PROXY_NONSENSE is set": 4,
    "internal error: ZeroDivisionError": 3,
}


@linux
def test_in_the_journal_lines_have_priorities_and_no_time(run_with: Start) -> None:
    ours, theirs = map(socket.socket.detach, socket.socketpair())
    text = ""

    def complete() -> bool:
        nonlocal text
        text += written(ours).decode()
        return all(what in text for what in PRIORITIES)

    # A request for /shim is an internal error there.
    program = [*with_hook("p.read_shim = lambda: 1 / 0"), "-"]
    running = run_with(theirs, options=["-v"], program=program, JOURNAL_STREAM=stream(theirs),
                       SSH_AGENT_PROXY_NONSENSE="1")  # fmt: skip
    running.sign(1)
    ask(running.sock, get("/shim"))
    wait_for(complete, message="a line of each level")
    assert running.stop() == 0
    lines = text.splitlines()
    # A traceback, which -v shows, is one as well.
    assert all(re.fullmatch(r"<[3-7]>\S.*", line) for line in lines), text
    assert re.search("(?m)^<7>where it happened.*read_shim.*ZeroDivisionError", text)
    assert not any(re.match(r"<\d>(\d{4}-|DEBUG|INFO|AUDIT|WARNING|ERROR)", line) for line in lines)
    for what, number in PRIORITIES.items():
        assert [line[:3] for line in lines if what in line][:1] == [f"<{number}>"], what
    os.close(ours)
    os.close(theirs)


NOT_THE_JOURNAL = rows([
    ("another socket's", "{device}:1{inode}"),
    ("another device's", "1{device}:{inode}"),
    ("a line after it", "{device}:{inode}\n"),
    ("empty", ""),
])  # fmt: skip


@pytest.mark.parametrize("value", NOT_THE_JOURNAL)
def test_where_stderr_is_not_the_journal_lines_have_time_and_level(
        value: str, piped: Piped) -> None:  # fmt: skip
    logging.addLevelName(AUDIT, "AUDIT")
    found = os.fstat(2)
    handler = StderrHandler(value.format(device=found.st_dev, inode=found.st_ino))
    handler.fd = piped[0].fd
    say(handler, "text")
    assert re.fullmatch(LINE + "\n", os.read(piped[1], 100).decode())


# ---------------------------------------------------------------- what ends it

BUSY = "cannot listen on 127.0.0.1:"
WRONG = "SSH_AGENT_PROXY_TIMEOUT"
LAST_LINES = rows([
    ("a busy port", {}, BUSY, 1, "TIME ERROR "),
    ("a busy port, in the journal", {"JOURNAL_STREAM": ""}, BUSY, 1, "<3>"),
    ("a wrong setting", {WRONG: "x"}, WRONG, 2, "ssh-agent-proxy: "),
    ("one, in the journal", {WRONG: "x", "JOURNAL_STREAM": ""}, WRONG, 2, "<3>ssh-agent-proxy: "),
    ("no token file", {"SSH_AGENT_PROXY_TOKEN_FILE": "/nowhere"}, "/nowhere", 2, "TIME ERROR "),
])  # fmt: skip


@pytest.mark.parametrize(("env", "what", "status", "start"), LAST_LINES)
def test_the_last_line_of_a_failed_start_has_its_level_and_it_is_not_ready(
    home: Path, manager: Manager, env: Dict[str, str], what: str, status: int, start: str
) -> None:
    env = {**env, "NOTIFY_SOCKET": manager.variable}
    ours, theirs = map(socket.socket.detach, socket.socketpair())
    if "JOURNAL_STREAM" in env:
        env = {**env, "JOURNAL_STREAM": stream(theirs)}
    with socket.create_server(("127.0.0.1", 0)) as busy:
        argv = [sys.executable, str(PROXY), "--addr", f"127.0.0.1:{busy.getsockname()[1]}"]
        done = subprocess.run(argv, env=clean_env(home, **env), stderr=theirs, timeout=20)
    last = written(ours).decode().splitlines()[-1]
    os.close(ours)
    os.close(theirs)
    assert done.returncode == status
    assert manager.listen() == []
    begins = re.escape(start).replace("TIME", r"[0-9T:+-]+")
    assert re.fullmatch(f"{begins}.*{what}.*", last), last


HOOKS = rows([
    ("a thread", "p.agent_findings = lambda *args: 1 / 0", 0),
    ("the main thread", "p.DRAIN_SECONDS = None", 1),
])  # fmt: skip


@pytest.mark.parametrize(("code", "status"), HOOKS)
def test_a_fault_that_ends_a_thread_is_a_line_with_its_level(
        code: str, status: int, run_with: Start, short: Path) -> None:  # fmt: skip
    with (short / "log").open("wb") as f:
        running = run_with(f.fileno(), program=[*with_hook(code), "-"])
    assert running.stop() == status
    lines = (short / "log").read_text().splitlines()
    assert all(re.fullmatch(LINE, line) for line in lines), lines
    assert [line for line in lines if re.search(r" ERROR internal error.*Traceback.*Error", line)]


def test_of_a_long_traceback_the_end_is_kept(piped: Piped) -> None:
    handler, reader = piped

    try:
        raise ValueError("x" * 5000 + "at the\nbottom")
    except ValueError:
        info = sys.exc_info()
    handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, "internal error", None, info))
    line = os.read(reader, 65536).decode()
    assert re.fullmatch(r"\S+ ERROR internal error.*at the\\nbottom\n", line)


# ---------------------------------------------------------------- the service manager


class Manager:
    """The socket on which a service manager is told."""

    def __init__(self, variable: str) -> None:
        """VARIABLE is NOTIFY_SOCKET: a path, or an abstract name behind an @."""
        self.variable = variable
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + variable[1:] if variable.startswith("@") else variable)
        self.socket.setblocking(False)
        self.told: List[str] = []

    def listen(self) -> List[str]:
        """All that it was told until now."""
        while True:
            try:
                self.told.append(self.socket.recv(65536).decode())
            except BlockingIOError:
                return self.told

    def wait(self, pattern: str) -> str:
        """The first message with it."""
        found: str = wait_for(
            lambda: next((text for text in self.listen() if re.search(pattern, text, re.M)), ""),
            message=f"{pattern} to the service manager",
        )
        return found

    def wait_status(self, pattern: str) -> None:
        """The last one that it was told matches."""

        def last() -> Any:
            found = re.findall(r"^STATUS=(.*)$", "\n".join(self.listen()), re.M)
            return found and re.fullmatch(pattern, found[-1])

        wait_for(last, message=f"STATUS={pattern}")


FORMS = ["{folder}/notify", "@{folder}/notify"]
either = pytest.mark.parametrize(
    "manager", FORMS, ids=["a path", "an abstract name"], indirect=True
)


@pytest.fixture
def manager(request: pytest.FixtureRequest, short: Path) -> Iterator[Manager]:
    manager = Manager(getattr(request, "param", FORMS[0]).format(folder=short))
    yield manager
    manager.socket.close()


@pytest.fixture
def start_notifying(start_proxy: StartProxy, manager: Manager) -> StartProxy:
    """Nothing but the message says that it is ready; PORT is what that names, where it is one."""

    def start(*args: Any, **options: Any) -> Proxy:
        env = {"NOTIFY_SOCKET": manager.variable, **options.pop("env", {})}
        proxy = start_proxy(*args, env=env, wait=False, **options)
        manager.wait("^READY=1$")
        port = re.search(r"127\.0\.0\.1:(\d+)", manager.told[0])
        proxy.port = int(port.group(1)) if port else 0
        return proxy

    return start


@linux
@either
def test_ready_is_told_once_it_answers_at_all_addresses(
    manager: Manager, start_notifying: StartProxy, agent: Agent, short: Path
) -> None:
    proxy = start_notifying(upstream=agent.sock, addr=f"127.0.0.1:0,unix:{short}/s")
    assert http(proxy.port, "GET", "/healthz").status == 200
    assert ask(short / "s", get("/healthz")).status == 200
    assert proxy.stop() == 0
    where = f"STATUS=listening on 127.0.0.1:{proxy.port}, unix:{short}/s"
    assert manager.listen()[0] == where
    assert manager.listen().count("READY=1") == 1


@linux
@either
def test_another_agent_changes_the_status_under_landlock_too(
    manager: Manager, start_notifying: StartProxy, start_agent: StartAgent, keys: Keys, short: Path
) -> None:
    (short / "gcr").mkdir()
    first, second = start_agent(short / "ssh-agent.socket"), start_agent(short / "gcr/ssh")
    for agent in (first, second):
        agent.add(keys["ed25519"])
    proxy = start_notifying(env={"XDG_RUNTIME_DIR": str(short)})
    if not proxy.wait_log("Landlock: (in force)?")[1]:
        cannot_run("Landlock is needed: Linux 5.13 or newer, with landlock in its LSMs")
    where = f"listening on 127.0.0.1:{proxy.port}"
    manager.wait_status(re.escape(f"{where}, using the agent at '{first.sock}'"))
    first.stop()
    assert http(proxy.port, "POST", "/sign", b"x").status == 200
    manager.wait_status(re.escape(f"{where}, using the agent at '{second.sock}'"))


def test_what_is_wrong_with_the_agent_is_told_until_it_is_mended(
    manager: Manager, start_notifying: StartProxy, start_agent: StartAgent, keys: Keys, short: Path
) -> None:
    proxy = start_notifying(upstream=short / "later")
    where = f"listening on 127.0.0.1:{proxy.port}, "
    manager.wait_status(f"{where}.*no such socket.*")
    agent = start_agent(short / "later")
    assert http(proxy.port, "POST", "/sign", b"x").status == 503
    manager.wait_status(f"{where}.*the agent lists no keys.*")
    agent.add(keys["ed25519"])
    assert http(proxy.port, "POST", "/sign", b"x").status == 200
    manager.wait_status(f"{where}using the agent at '{short}/later'")
    agent.stop()
    assert http(proxy.port, "POST", "/sign", b"x").status == 503
    manager.wait_status(f"{where}.*no answer from the agent at .*")


def test_a_line_break_in_a_path_tells_nothing_of_its_own(
        manager: Manager, start_notifying: StartProxy, short: Path) -> None:  # fmt: skip
    start_notifying(upstream=f"{short}/x\nMAINPID=1")
    manager.wait_status(r"listening on .*MAINPID=1.*")
    assert not [line for text in manager.listen() for line in text.splitlines()
                if not line.startswith(("READY=1", "STATUS="))]  # fmt: skip


def test_the_end_is_told_while_requests_are_finished(
        manager: Manager, start_notifying: StartProxy, gate: Scripted,
        scripted_agent: StartScripted, clients: Clients) -> None:  # fmt: skip
    proxy = start_notifying(upstream=scripted_agent(gate))
    client = begin(proxy, gate, clients)
    assert "STOPPING=1" not in "".join(manager.listen())
    proxy.process.send_signal(signal.SIGTERM)
    manager.wait("^STOPPING=1$")
    assert proxy.process.poll() is None
    gate.gate.set()
    assert the_one_answer(read_all(client)).status == 200
    client.close()
    assert end(proxy) == 0


@linux
def test_a_manager_that_does_not_read_holds_up_nothing_and_hears_of_ready_at_last(
        manager: Manager, start_proxy: StartProxy, agent_with_key: Agent) -> None:  # fmt: skip
    assert ssh_agent_proxy.READY_SECONDS == 5
    with flooded(manager):
        # A minute instead: this machine may be busy.
        proxy = start_proxy(upstream=agent_with_key.sock, python=tuned(READY_SECONDS=60),
                            env={"NOTIFY_SOCKET": manager.variable})  # fmt: skip
        assert http(proxy.port, "POST", "/sign", b"x").status == 200
        manager.wait("^READY=1$")
        assert proxy.stop() == 0
        assert proxy.log().count("NOTIFY_SOCKET") == 0


@contextlib.contextmanager
def flooded(manager: Manager) -> Iterator[None]:
    """Its queue is full."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as flood:
        flood.setblocking(False)
        flood.connect(manager.socket.getsockname())
        with pytest.raises(BlockingIOError):
            while True:
                flood.send(b"x")
        yield


@linux
def test_a_manager_that_never_reads_is_waited_for_with_a_bound(manager: Manager) -> None:
    with flooded(manager):
        told = ServiceManager(manager.variable)
        started = time.monotonic()
        told.tell("STATUS=whatever")
        assert time.monotonic() - started < 0.9
        told.tell("READY=1", 0.3)
        assert 0.3 <= time.monotonic() - started < 5
        assert "READY=1" not in manager.listen()
        # What was lost is told once there is room.
        told.tell("STATUS=whatever")
        assert manager.listen()[-1] == "STATUS=whatever"


NOBODY = rows([
    ("a socket that is missing", "{folder}/missing"),
    ("a stream socket", "{folder}/stream"),
    ("a path that is too long", "{folder}/" + 200 * "x"),
    ("an @ alone", "@"),
    ("a line break", "{folder}/x\nERROR forged"),
    ("bytes that are no text", "{folder}/\udcff"),
])  # fmt: skip


@linux
@pytest.mark.parametrize("value", NOBODY)
def test_where_nobody_can_be_told_one_warning_says_so(
    value: str, short: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOG, "propagate", True)
    with socket.socket(socket.AF_UNIX) as stream:
        stream.bind(f"{short}/stream")
        stream.listen()
        ServiceManager(value.format(folder=short)).tell("READY=1", 60)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "NOTIFY_SOCKET" in caplog.messages[0]
    assert caplog.messages[0].isprintable()
