"""The process in its surroundings: signals, the log and where it goes, idling, threads."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import pytest
from conftest import (
    PROXY,
    ROOT,
    Agent,
    Keys,
    Proxy,
    cannot_run,
    clean_env,
    http,
    message,
    parse_answer,
    raw,
    read_message,
    rows,
    run,
    wait_for,
)

import ssh_agent_proxy
from ssh_agent_proxy import AUDIT, SSH_AGENTC_SIGN_REQUEST, StderrHandler

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")

LINE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (DEBUG|INFO|AUDIT|WARNING|ERROR) \S.*"

END = [signal.SIGTERM, signal.SIGINT]


def end(proxy: Proxy, seconds: float = 5) -> int:
    """The exit status, once the process has ended by itself."""
    return proxy.process.wait(seconds)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", END)
def test_a_signal_ends_it_with_exit_status_0(number: int, proxy: Proxy) -> None:
    proxy.process.send_signal(number)
    assert end(proxy) == 0
    proxy.wait_log(" INFO stopping")


class Waiting:
    """A request that waits for an agent, which answers once it is released."""

    def __init__(self, agent: Agent, scripted_agent: Callable[..., Path]) -> None:
        self.agent = agent
        self.arrived, self.released = threading.Event(), threading.Event()
        self.sock = scripted_agent(self.relay)

    def relay(self, connection: socket.socket) -> None:
        while True:
            request = read_message(connection)
            if not request:
                return
            if request[0] == SSH_AGENTC_SIGN_REQUEST:
                self.arrived.set()
                self.released.wait(30)
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(str(self.agent.sock))
                s.sendall(message(request))
                connection.sendall(message(read_message(s)))

    def begin(self, proxy: Proxy) -> None:
        self.client = socket.create_connection(("127.0.0.1", proxy.port), 10)
        self.client.sendall(b"POST /sign HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx")
        assert self.arrived.wait(10)

    def answer(self) -> int:
        data = b""
        while True:
            piece = self.client.recv(65536)
            if not piece:
                return parse_answer(data).status
            data += piece


@pytest.fixture
def waiting(agent: Agent, keys: Keys, scripted_agent: Callable[..., Path]) -> Iterator[Waiting]:
    agent.add(keys["ed25519"])
    waiting = Waiting(agent, scripted_agent)
    yield waiting
    waiting.client.close()
    waiting.released.set()


def connect_refused(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as s:
            s.settimeout(1)
            return s.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("number", END)
def test_what_is_in_flight_is_finished(
    number: int, waiting: Waiting, start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy(upstream=waiting.sock)
    waiting.begin(proxy)
    proxy.process.send_signal(number)
    proxy.wait_log(" INFO stopping")
    wait_for(lambda: connect_refused(proxy.port), message="no further connections")
    assert proxy.process.poll() is None
    waiting.released.set()
    assert waiting.answer() == 200
    assert end(proxy) == 0
    proxy.wait_log("AUDIT outcome=signed status=200")


@pytest.mark.parametrize("second", END)
def test_a_second_signal_ends_it_at_once(
    second: int, waiting: Waiting, start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy(upstream=waiting.sock)
    waiting.begin(proxy)
    proxy.process.send_signal(signal.SIGTERM)
    proxy.wait_log(" INFO stopping")
    assert proxy.process.poll() is None
    proxy.process.send_signal(second)
    assert end(proxy, 2) == 0


def test_what_does_not_end_is_waited_for_with_a_bound(
    short: Path, waiting: Waiting, start_proxy: Callable[..., Proxy]
) -> None:
    # A bound of half a second instead of ten, to see it reached.
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ssh_agent_proxy as p; "
            "assert p.DRAIN_SECONDS == 10; p.DRAIN_SECONDS = 0.5; "
            "sys.exit(p.main(sys.argv[2:]))")  # fmt: skip
    script = short / "start"
    words = [sys.executable, "-c", code]
    script.write_text("#!/bin/sh\nexec " + " ".join(map(shlex.quote, words)) + ' "$@"\n')
    script.chmod(0o755)
    proxy = start_proxy(upstream=waiting.sock, python=str(script))
    waiting.begin(proxy)
    started = time.monotonic()
    proxy.process.send_signal(signal.SIGTERM)
    assert end(proxy, 5) == 0
    assert time.monotonic() - started >= 0.5


def test_a_connection_without_a_request_holds_up_no_end(proxy: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as idle:
        # A request after it shows that it was accepted.
        assert http(proxy.port, "GET", "/healthz").status == 200
        proxy.process.send_signal(signal.SIGTERM)
        assert end(proxy, 5) == 0
        assert idle.recv(1) == b""


def test_a_signal_during_the_start_is_no_traceback(
    agent: Agent, start_proxy: Callable[..., Proxy]
) -> None:
    # Wherever it hits: as soon as the process is there, and some milliseconds later each time.
    for pause in range(0, 100, 10):
        proxy = start_proxy(upstream=agent.sock, wait=False)
        threading.Event().wait(pause / 1000)
        proxy.process.send_signal(signal.SIGTERM)
        assert end(proxy) in (0, -signal.SIGTERM)


# ---------------------------------------------------------------- idle


def wakeups(pid: int) -> int:
    """How often all threads of a process together gave up the processor to wait for something."""
    number = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        match = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", (task / "status").read_text(), re.M)
        assert match
        number += int(match.group(1))
    return number


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


@linux
def test_idle_it_wakes_for_nothing(proxy: Proxy) -> None:
    assert http(proxy.port, "POST", "/sign", b"x").status == 200

    def quiet() -> bool:
        before = wakeups(proxy.pid)
        time.sleep(0.1)
        return wakeups(proxy.pid) == before

    wait_for(quiet, message="the end of what belongs to the start")
    before = wakeups(proxy.pid)
    time.sleep(2)  # what is looked for is that nothing happens
    assert wakeups(proxy.pid) == before


@linux
def test_threads_are_used_again(proxy: Proxy) -> None:
    for _ in range(200):
        assert http(proxy.port, "POST", "/sign", b"x").status == 200
    assert threads(proxy.pid) <= 5


@linux
def test_threads_of_a_crowd_are_used_again(proxy: Proxy) -> None:
    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            list(pool.map(lambda _: http(proxy.port, "POST", "/sign", b"x"), range(64)))
    # One may be about to finish while its client comes again already.
    assert threads(proxy.pid) <= 2 * 16 + 3


# ---------------------------------------------------------------- the log


def test_every_line_has_time_and_level(
    agent: Agent, keys: Keys, start_proxy: Callable[..., Proxy]
) -> None:
    agent.add(keys["ed25519"])
    proxy = start_proxy("-v", upstream=agent.sock)
    hostile = "x\u202e\u200b\x9b\xff".encode()
    for request in (
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"GET /" + hostile + b" HTTP/1.0\r\n\r\n",
        b"GET /%0aforged HTTP/1.0\r\n\r\n",
        b"POST /sign HTTP/1.0\r\nContent-Length: 1\r\nSSHSIG-Key: " + hostile + b"\r\n\r\nx",
        b"POST /sign HTTP/1.0\r\nContent-Length: 1\r\nSSHSIG-Namespace: \xe2\x80\xa8\r\n\r\nx",
        b"\x00\x1b[2J\r\r\n\n",
    ):
        raw(proxy.port, request)
    agent.stop()
    assert http(proxy.port, "POST", "/sign", b"x").status == 503
    assert proxy.stop() == 0
    lines = proxy.log().splitlines()
    assert len(lines) > 8
    for line in lines:
        assert re.fullmatch(LINE, line), line
        assert line.isprintable()


def test_one_line_for_each_request(proxy: Proxy) -> None:
    proxy.wait_log("signing with")
    before = len(proxy.log().splitlines())
    for status, request in (
        (200, b"GET /healthz HTTP/1.0\r\n\r\n"),
        (404, b"GET /nope HTTP/1.0\r\n\r\n"),
        (400, b"nonsense\r\n\r\n"),
        (200, b"POST /sign HTTP/1.0\r\nContent-Length: 1\r\n\r\nx"),
    ):
        assert parse_answer(raw(proxy.port, request)).status == status
    assert proxy.stop() == 0
    lines = [line for line in proxy.log().splitlines()[before:] if "stopping" not in line]
    assert [re.findall(r" status=(\d+) ", line) for line in lines] == [
        ["200"], ["404"], ["400"], ["200"]]  # fmt: skip


def test_a_connection_that_sends_nothing_is_no_line(proxy: Proxy) -> None:
    proxy.wait_log("signing with")
    before = proxy.log()
    for _ in range(5):
        socket.create_connection(("127.0.0.1", proxy.port), 10).close()
    assert http(proxy.port, "GET", "/healthz").status == 200
    assert proxy.stop() == 0
    assert len(proxy.log()[len(before) :].splitlines()) == 2  # the request, and the end


def test_a_signature_is_on_record_before_it_leaves(proxy: Proxy) -> None:
    proxy.wait_log("signing with")
    for number in range(1, 6):
        assert http(proxy.port, "POST", "/sign", b"x").status == 200
        # The line was written before the answer; only the test's own reader may lag behind.
        wait_for(lambda: proxy.log().count("outcome=signed") == number, 2)  # noqa: B023


# ---------------------------------------------------------------- where the log goes


class Running:
    """The proxy with a standard error of the test's own making, on a port picked beforehand."""

    def __init__(self, home: Path, agent: Agent, stderr: int, redirection: str = "",
                 options: Sequence[str] = (), program: Sequence[str] = (str(PROXY),),
                 **env: str) -> None:  # fmt: skip
        with socket.create_server(("127.0.0.1", 0)) as s:
            self.port = s.getsockname()[1]
        words = [sys.executable, *program, "--addr", f"127.0.0.1:{self.port}"]
        words += ["--upstream", str(agent.sock), *options]
        line = "exec " + " ".join(map(shlex.quote, words)) + " " + redirection
        self.process = subprocess.Popen(
            ["sh", "-c", line],
            env=clean_env(home, **env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        self.pid = self.process.pid
        wait_for(self.answers, message="the proxy's first answer")

    def answers(self) -> bool:
        assert self.process.poll() is None, "it ended"
        try:
            return http(self.port, "GET", "/healthz").status == 200
        except (ConnectionError, AssertionError):
            return False

    def sign(self, times: int) -> None:
        """Each signature takes far less than the time it is given, unless the log holds it up."""
        for _ in range(times):
            assert http(self.port, "POST", "/sign", b"x", seconds=5).status == 200

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(5)
        finally:
            self.process.kill()
            self.process.wait(5)


@pytest.fixture
def run_with(home: Path, agent: Agent, keys: Keys) -> Iterator[Callable[..., Running]]:
    """run_with(stderr, redirection="", …): the proxy, writing its log there."""
    agent.add(keys["ed25519"])
    started: List[Running] = []

    def start(stderr: int, redirection: str = "", **more: Any) -> Running:
        started.append(Running(home, agent, stderr, redirection, **more))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()
        running.process.wait(5)


def read_all(fd: int) -> bytes:
    """What stands in a pipe or terminal now."""
    os.set_blocking(fd, False)
    data = b""
    while True:
        try:
            piece = os.read(fd, 65536)
        except (BlockingIOError, OSError):
            return data
        if not piece:
            return data
        data += piece


@linux
def test_a_full_pipe_holds_up_no_signature(run_with: Callable[..., Running]) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, 1031, 4096)  # F_SETPIPE_SZ: full after some twenty lines
    running = run_with(writer)
    os.close(writer)
    running.sign(60)
    kept = read_all(reader).decode().splitlines()
    assert all(re.fullmatch(LINE, line) for line in kept)
    # Once there is room again the log goes on, and tells how much is missing.
    running.sign(1)
    more = wait_for(lambda: read_all(reader).decode(), message="a line after the stall")
    match = re.search(r"\b(\d+) lines", more)
    assert match
    signed = sum("outcome=signed" in line for line in kept)
    assert signed + int(match.group(1)) >= 60
    assert running.stop() == 0
    os.close(reader)


@linux
def test_a_terminal_that_nobody_reads_holds_up_no_signature(
    run_with: Callable[..., Running]
) -> None:
    master, terminal = os.openpty()
    running = run_with(terminal)
    os.close(terminal)
    running.sign(400)
    assert running.stop() == 0
    assert b"listening on" in read_all(master)
    os.close(master)


def test_a_pipe_whose_reader_has_gone_holds_up_no_signature(
    run_with: Callable[..., Running]
) -> None:
    reader, writer = os.pipe()
    running = run_with(writer)
    os.close(writer)
    os.close(reader)
    running.sign(20)
    assert running.stop() == 0


def test_a_full_disk_holds_up_no_signature(run_with: Callable[..., Running]) -> None:
    running = run_with(subprocess.DEVNULL, "2>/dev/full" if os.path.exists("/dev/full") else "")
    running.sign(20)
    assert running.stop() == 0


@pytest.mark.parametrize("redirection", ["2>&-", "<&- 2>&-", "<&- >&- 2>&-", ">&-", "<&-"])
def test_closed_streams_hold_up_no_signature(
    redirection: str, run_with: Callable[..., Running]
) -> None:
    running = run_with(subprocess.DEVNULL, redirection)
    running.sign(20)
    assert running.stop() == 0


def test_a_closed_stderr_sends_the_log_to_nobody_else(run_with: Callable[..., Running]) -> None:
    # Number 2 must not become a client's connection, or the agent's.
    running = run_with(subprocess.DEVNULL, "<&- >&- 2>&-")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: raw(running.port, b"GET /healthz HTTP/1.0\r\n\r\n"),
                                range(64)))  # fmt: skip
    assert {parse_answer(answer).body for answer in answers} == {b"ok\n"}
    assert not [answer for answer in answers if b"outcome=" in answer]


def test_a_file_gets_whole_lines(run_with: Callable[..., Running], short: Path) -> None:
    file = short / "log"
    with file.open("wb") as f:
        running = run_with(f.fileno())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(running.sign, [10] * 8))
    assert running.stop() == 0
    lines = file.read_text().splitlines()
    assert all(re.fullmatch(LINE, line) for line in lines)
    assert sum("outcome=signed" in line for line in lines) == 80


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("x", AUDIT, "", 0, text, None, None)


def fill(handler: StderrHandler) -> None:
    """Until a line is lost: a flood of refusals, say."""
    while not handler.lost:
        handler.emit(record("outcome=refused " + "x" * 1000))


def test_a_flood_of_refusals_pushes_no_signature_out_of_the_log() -> None:
    reader, writer = os.pipe()
    handler = StderrHandler("")
    handler.fd = writer
    fill(handler)
    slow = threading.Timer(0.1, os.read, [reader, 65536])
    slow.start()
    handler.emit(record("outcome=signed status=200"))
    slow.join()
    assert handler.lost == 0
    assert os.read(reader, 65536).endswith(b" outcome=signed status=200\n")
    os.close(reader)
    os.close(writer)


def test_where_nobody_reads_a_signature_waits_once_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    handler = StderrHandler("")
    handler.fd = writer
    fill(handler)
    waits = []

    def no_select(r: Any, w: Any, x: Any, seconds: float) -> Any:
        waits.append(seconds)
        return select.select(r, w, x, 0)

    only = types.SimpleNamespace(select=no_select)
    monkeypatch.setattr(ssh_agent_proxy, "select", only)
    for text in ("outcome=signed 1", "outcome=signed 2", "outcome=refused 3", "outcome=signed 4"):
        handler.emit(record(text))
    assert waits[0] > 0
    assert waits[1:] == [0, 0, 0]
    os.read(reader, 65536)
    handler.emit(record("outcome=refused 5"))  # somebody reads again
    fill(handler)
    waits.clear()
    handler.emit(record("outcome=signed 6"))
    assert waits[0] > 0
    os.close(reader)
    os.close(writer)


def test_a_line_that_a_terminal_took_in_part_is_counted_and_ended() -> None:
    master, slave = pty.openpty()
    try:
        os.set_blocking(slave, False)
        os.set_blocking(master, False)
        handler = StderrHandler("")
        handler.fd = slave

        def say(text: str) -> None:
            handler.emit(logging.LogRecord("x", logging.INFO, "", 0, text, None, None))

        for _ in range(1000):
            say("x" * 1001)
            if handler.cut:
                break
        assert handler.cut, "no line was cut: this terminal takes all or nothing"
        say("lost as well")
        taken = b""
        while select.select([master], [], [], 0)[0]:
            taken += os.read(master, 65536)
        say("the next")
        assert select.select([master], [], [], 10)[0]
        last = os.read(master, 65536).decode().replace("\r\n", "\n")
    finally:
        os.close(slave)
        os.close(master)
    assert not taken.endswith(b"\n")
    assert re.fullmatch(r"\n\(2 lines before this one could not be written\) .* the next\n", last)


# ---------------------------------------------------------------- the journal


def journal() -> Tuple[socket.socket, socket.socket, str]:
    """What the journal reads, what a service has as stderr, and what JOURNAL_STREAM then is."""
    ours, theirs = socket.socketpair()
    found = os.fstat(theirs.fileno())
    return ours, theirs, f"{found.st_dev}:{found.st_ino}"


PRIORITIES = [
    ("debug", 7, "it holds ssh-ed25519"),
    ("info", 6, "listening on"),
    ("audit", 5, "outcome=signed"),
    ("warning", 4, "the agent holds 2 keys"),
]


@linux
def test_in_the_journal_lines_have_priorities_and_no_time(
    run_with: Callable[..., Running], agent: Agent, keys: Keys
) -> None:
    agent.add(keys["other"])
    ours, theirs, stream = journal()
    with ours, theirs:
        running = run_with(theirs.fileno(), options=["-v"], JOURNAL_STREAM=stream)
        running.sign(1)
        text = ""

        def complete() -> bool:
            nonlocal text
            text += read_all(ours.fileno()).decode()
            return all(re.search(what, text) for _, _, what in PRIORITIES)

        wait_for(complete, message="a line of each level")
        assert running.stop() == 0
    lines = text.splitlines()
    assert all(re.fullmatch(r"<[3-7]>\S.*", line) for line in lines), text
    assert not any(re.match(r"<\d>(\d{4}-|DEBUG|INFO|AUDIT|WARNING|ERROR)", line) for line in lines)
    for name, number, what in PRIORITIES:
        about = [line for line in lines if re.search(what, line)]
        assert about[0].startswith(f"<{number}>"), name


# A request for /shim is an internal error there.
FAILING = f"""\
import sys
sys.path.insert(0, {str(ROOT)!r})
import ssh_agent_proxy as p
def fail():
    raise ZeroDivisionError("a test's own")
p.read_shim = fail
sys.exit(p.main(sys.argv[1:]))
"""

@linux
def test_in_the_journal_an_internal_error_is_an_error(run_with: Callable[..., Running]) -> None:
    ours, theirs, stream = journal()
    with ours, theirs:
        running = run_with(theirs.fileno(), program=["-c", FAILING], JOURNAL_STREAM=stream)
        raw(running.port, b"GET /shim HTTP/1.0\r\n\r\n")
        lines = read_all(ours.fileno()).decode().splitlines()
    assert [line[:3] for line in lines if "internal error: ZeroDivisionError" in line] == ["<3>"]


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, 7), (logging.INFO, 6), (AUDIT, 5), (logging.WARNING, 4), (logging.ERROR, 3)],
)
def test_each_level_has_its_priority(level: int, priority: int) -> None:
    reader, writer = os.pipe()
    handler = StderrHandler("")
    handler.fd, handler.journal = writer, True
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.emit(logging.LogRecord("x", level, "", 0, "text", None, None))
    assert os.read(reader, 100) == f"<{priority}>text\n".encode()
    os.close(reader)
    os.close(writer)


NOT_THE_JOURNAL = rows([
    ("another socket's", "{device}:{other}"),
    ("another device's", "1{device}:{inode}"),
    ("the other way round", "{inode}:{device}"),
    ("no inode", "{device}:"),
    ("no device", ":{inode}"),
    ("a blank before it", " {device}:{inode}"),
    ("a line after it", "{device}:{inode}\n"),
    ("more after it", "{device}:{inode}:1"),
    ("words", "the journal"),
    ("empty", ""),
])  # fmt: skip


@linux
@pytest.mark.parametrize("value", NOT_THE_JOURNAL)
def test_where_stderr_is_not_the_journal_lines_have_time_and_level(
    value: str, run_with: Callable[..., Running]
) -> None:
    ours, theirs, stream = journal()
    device, _, inode = stream.partition(":")
    value = value.format(device=device, inode=inode, other=os.fstat(ours.fileno()).st_ino)
    with ours, theirs:
        running = run_with(theirs.fileno(), JOURNAL_STREAM=value)
        assert running.stop() == 0
        lines = read_all(ours.fileno()).decode().splitlines()
    assert any("listening on" in line for line in lines)
    assert all(re.fullmatch(LINE, line) for line in lines)


@linux
def test_a_journal_that_stalls_holds_up_no_signature(run_with: Callable[..., Running]) -> None:
    ours, theirs, stream = journal()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # full after some lines
        running = run_with(theirs.fileno(), JOURNAL_STREAM=stream)
        running.sign(60)
        kept = read_all(ours.fileno()).decode().splitlines()
        signed = sum("outcome=signed" in line for line in kept)
        assert kept
        assert signed < 60, "it did not stall"
        assert all(re.fullmatch(r"<[3-7]>\S.*", line) for line in kept)
        running.sign(1)
        more = wait_for(lambda: read_all(ours.fileno()).decode(), message="a line after the stall")
        match = re.match(r"<5>\((\d+) lines before this one could not be written\) ", more)
        assert match
        assert signed + int(match.group(1)) >= 60
        assert running.stop() == 0


@linux
def test_a_journal_that_goes_away_holds_up_no_signature(run_with: Callable[..., Running]) -> None:
    ours, theirs, stream = journal()
    running = run_with(theirs.fileno(), JOURNAL_STREAM=stream)
    theirs.close()
    ours.close()
    running.sign(20)
    assert running.stop() == 0


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

    @property
    def status(self) -> str:
        """The last one that it was told."""
        found = re.findall(r"^STATUS=(.*)$", "\n".join(self.listen()), re.M)
        return str(found[-1]) if found else ""

    def wait_status(self, pattern: str) -> None:
        wait_for(lambda: re.fullmatch(pattern, self.status), message=f"STATUS={pattern}")


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
def start_notifying(start_proxy: Callable[..., Proxy], manager: Manager) -> Callable[..., Proxy]:
    """Nothing but the message says that it is ready; PORT is what that names, where it is one."""

    def start(*args: Any, **options: Any) -> Proxy:
        env = {"NOTIFY_SOCKET": manager.variable, **options.pop("env", {})}
        proxy = start_proxy(*args, env=env, wait=False, **options)
        port = re.search(r"127\.0\.0\.1:(\d+)", manager.wait("^READY=1$"))
        proxy.port = int(port.group(1)) if port else 0
        return proxy

    return start


@linux
@either
def test_ready_is_told_once_it_answers(
    manager: Manager, start_notifying: Callable[..., Proxy], agent: Agent
) -> None:
    proxy = start_notifying(upstream=agent.sock)
    assert http(proxy.port, "GET", "/healthz").status == 200
    assert manager.listen()[0] == f"READY=1\nSTATUS=listening on 127.0.0.1:{proxy.port}"
    assert proxy.stop() == 0
    assert sum("READY=1" in text for text in manager.listen()) == 1


def test_what_cannot_listen_is_not_ready(
    manager: Manager, start_proxy: Callable[..., Proxy], agent: Agent
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        addr = f"127.0.0.1:{s.getsockname()[1]}"
        proxy = start_proxy(upstream=agent.sock, addr=addr, wait=False,
                            env={"NOTIFY_SOCKET": manager.variable})  # fmt: skip
        assert end(proxy, 10) == 1
    assert manager.listen() == []


def test_the_status_names_all_addresses_and_the_agent(
    manager: Manager, start_notifying: Callable[..., Proxy], agent: Agent, keys: Keys, short: Path
) -> None:
    agent.add(keys["ed25519"])
    proxy = start_notifying(upstream=agent.sock, addr=f"127.0.0.1:0,unix:{short}/s")
    where = f"listening on 127.0.0.1:{proxy.port}, unix:{short}/s"
    assert manager.listen()[0] == f"READY=1\nSTATUS={where}"
    manager.wait_status(re.escape(f"{where}, using the agent at '{agent.sock}'"))


@linux
@either
def test_another_agent_changes_the_status_under_landlock_too(
    manager: Manager, start_notifying: Callable[..., Proxy], start_agent: Callable[..., Agent],
    keys: Keys, short: Path,
) -> None:  # fmt: skip
    (short / "gcr").mkdir()
    first, second = start_agent(short / "ssh-agent.socket"), start_agent(short / "gcr/ssh")
    for agent in (first, second):
        agent.add(keys["ed25519"])
    proxy = start_notifying(env={"XDG_RUNTIME_DIR": str(short)})
    if not re.search("Landlock.*: in force", proxy.log()):
        cannot_run("Landlock is needed: Linux 5.13 or newer, with landlock in its LSMs")
    where = f"listening on 127.0.0.1:{proxy.port}"
    manager.wait_status(re.escape(f"{where}, using the agent at '{first.sock}'"))
    first.stop()
    assert http(proxy.port, "POST", "/sign", b"x").status == 200
    manager.wait_status(re.escape(f"{where}, using the agent at '{second.sock}'"))


# The first request is served as soon as there is a thread for it.
EARLY = f"""\
import socket, sys
sys.path.insert(0, {str(ROOT)!r})
import ssh_agent_proxy as p
def start_thread(server, listener, real=p.Server.start_thread):
    p.Server.start_thread = real
    real(server, listener)
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(listener.socket.getsockname())
        s.sendall(b"GET /publickey HTTP/1.0\\r\\n\\r\\n")
        while s.recv(65536):
            pass
p.Server.start_thread = start_thread
sys.exit(p.main(sys.argv[2:]))
"""


def test_a_first_request_that_comes_early_is_in_the_status(
    manager: Manager, start_notifying: Callable[..., Proxy], agent: Agent, keys: Keys, short: Path
) -> None:
    agent.add(keys["ed25519"])
    script = short / "start"
    script.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", EARLY])} "$@"\n')
    script.chmod(0o755)
    start_notifying(upstream=agent.sock, addr=f"unix:{short}/s", python=str(script))
    manager.wait_status(rf"listening on unix:{short}/s, using the agent at '{agent.sock}'")


def test_an_agent_that_is_not_there_is_told_until_it_is(
    manager: Manager, start_notifying: Callable[..., Proxy], start_agent: Callable[..., Agent],
    keys: Keys, short: Path,
) -> None:  # fmt: skip
    proxy = start_notifying(upstream=short / "later")
    manager.wait_status(rf"listening on 127.0.0.1:{proxy.port}, .*no such socket.*")
    start_agent(short / "later").add(keys["ed25519"])
    assert http(proxy.port, "POST", "/sign", b"x").status == 200
    manager.wait_status(rf"listening on 127.0.0.1:{proxy.port}, using the agent at '{short}/later'")


def test_an_agent_without_keys_is_told_until_it_has_one(
    manager: Manager, start_notifying: Callable[..., Proxy], agent: Agent, keys: Keys
) -> None:
    proxy = start_notifying(upstream=agent.sock)
    manager.wait_status(r"listening on .*, .*the agent lists no keys.*")
    agent.add(keys["ed25519"])
    assert http(proxy.port, "POST", "/sign", b"x").status == 200
    manager.wait_status(rf"listening on 127.0.0.1:{proxy.port}, using the agent at '{agent.sock}'")


def test_an_agent_that_ends_is_told(
    manager: Manager, start_notifying: Callable[..., Proxy], agent: Agent, keys: Keys
) -> None:
    agent.add(keys["ed25519"])
    proxy = start_notifying(upstream=agent.sock)
    manager.wait_status(r".*, using the agent at .*")
    agent.stop()
    assert http(proxy.port, "POST", "/sign", b"x").status == 503
    manager.wait_status(r"listening on .*, .*no answer from the agent at .*")


def test_a_line_break_in_a_path_tells_nothing_of_its_own(
    manager: Manager, start_notifying: Callable[..., Proxy], short: Path
) -> None:
    start_notifying(upstream=f"{short}/x\nMAINPID=1")
    manager.wait_status(r"listening on .*MAINPID=1.*")
    assert not [line for text in manager.listen() for line in text.splitlines()
                if not line.startswith(("READY=1", "STATUS="))]  # fmt: skip


@linux
@either
def test_the_end_is_told_while_requests_are_finished(
    manager: Manager, start_notifying: Callable[..., Proxy], waiting: Waiting
) -> None:
    proxy = start_notifying(upstream=waiting.sock)
    waiting.begin(proxy)
    assert "STOPPING=1" not in "".join(manager.listen())
    proxy.process.send_signal(signal.SIGTERM)
    manager.wait("^STOPPING=1$")
    assert proxy.process.poll() is None
    waiting.released.set()
    assert waiting.answer() == 200
    assert end(proxy) == 0


@linux
@either
def test_a_manager_that_does_not_read_holds_up_nothing(
    manager: Manager, start_proxy: Callable[..., Proxy], agent: Agent, keys: Keys
) -> None:
    agent.add(keys["ed25519"])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as flood:
        flood.setblocking(False)
        flood.connect(manager.socket.getsockname())
        with pytest.raises(BlockingIOError):
            while True:
                flood.send(b"x")
        proxy = start_proxy(upstream=agent.sock, env={"NOTIFY_SOCKET": manager.variable})
        assert http(proxy.port, "POST", "/sign", b"x").status == 200
        assert proxy.stop() == 0
        assert proxy.log().count("NOTIFY_SOCKET") <= 1


NOBODY = rows([
    ("a socket that is missing", "{folder}/missing"),
    ("an abstract one that is missing", "@{folder}/missing"),
    ("a socket whose owner has gone", "{folder}/gone"),
    ("a stream socket", "{folder}/stream"),
    ("a file", "{folder}/file"),
    ("a folder", "{folder}"),
    ("a path that is too long", "{folder}/" + 200 * "x"),
    ("an abstract name that is too long", "@" + 200 * "x"),
    ("an @ alone", "@"),
    ("a machine's socket", "vsock:2:1234"),
    ("words", "the service manager"),
    ("a line break", "{folder}/x\nERROR forged"),
    ("bytes that are no text", "{folder}/\udcff"),
])  # fmt: skip


@linux
@pytest.mark.parametrize("value", NOBODY)
def test_where_nobody_can_be_told_one_warning_says_so(
    value: str, short: Path, start_proxy: Callable[..., Proxy], agent: Agent, keys: Keys
) -> None:
    agent.add(keys["ed25519"])
    Manager(f"{short}/gone").socket.close()
    (short / "file").touch()
    with socket.socket(socket.AF_UNIX) as stream:
        stream.bind(f"{short}/stream")
        stream.listen()
        env = {"NOTIFY_SOCKET": value.format(folder=short)}
        proxy = start_proxy(upstream=agent.sock, env=env)
        assert http(proxy.port, "POST", "/sign", b"x").status == 200
        assert proxy.stop() == 0
    lines = [line for line in proxy.log().splitlines() if "NOTIFY_SOCKET" in line]
    assert len(lines) == 1
    assert " WARNING " in lines[0]
    assert all(re.fullmatch(LINE, line) for line in proxy.log().splitlines())


def test_only_serve_tells_the_manager(
    manager: Manager, home: Path, agent: Agent, keys: Keys
) -> None:
    agent.add(keys["ed25519"])
    env = clean_env(home, NOTIFY_SOCKET=manager.variable)
    options = ["--addr", "127.0.0.1:0", "--upstream", str(agent.sock)]
    for command in (["check"], ["shim"], ["token", "x", "--token-file", str(home / "tokens")]):
        run([sys.executable, PROXY, *command, *options], env=env)
    # (systemctl, which check asks, tells it errors of its own.)
    assert not re.search("^(READY|STATUS|STOPPING)=", "\n".join(manager.listen()), re.M)


def test_without_the_variable_nobody_is_told(
    manager: Manager, start_proxy: Callable[..., Proxy], agent: Agent, keys: Keys
) -> None:
    # An empty one counts as none, and is no reason for a warning.
    agent.add(keys["ed25519"])
    proxy = start_proxy(upstream=agent.sock, env={"NOTIFY_SOCKET": ""})
    assert http(proxy.port, "POST", "/sign", b"x").status == 200
    assert proxy.stop() == 0
    assert manager.listen() == []
    assert "NOTIFY_SOCKET" not in proxy.log()
