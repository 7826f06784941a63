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
from typing import Any, Callable, Iterator, List

import pytest
from conftest import (
    PROXY,
    ROOT,
    Agent,
    Keys,
    Proxy,
    clean_env,
    http,
    message,
    parse_answer,
    raw,
    read_message,
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

    def __init__(self, home: Path, agent: Agent, stderr: int, redirection: str = "") -> None:
        with socket.create_server(("127.0.0.1", 0)) as s:
            self.port = s.getsockname()[1]
        words = [sys.executable, str(PROXY), "--addr", f"127.0.0.1:{self.port}"]
        words += ["--upstream", str(agent.sock)]
        line = "exec " + " ".join(map(shlex.quote, words)) + " " + redirection
        self.process = subprocess.Popen(
            ["sh", "-c", line],
            env=clean_env(home),
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
    """run_with(stderr, redirection=""): the proxy, writing its log there."""
    agent.add(keys["ed25519"])
    started: List[Running] = []

    def start(stderr: int, redirection: str = "") -> Running:
        started.append(Running(home, agent, stderr, redirection))
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
