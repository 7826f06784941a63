"""The process where Windows differs: inside a tray, its log, its console, what it gives up."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from ctypes import wintypes
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from conftest import (
    PROXY, ROOT, Proxy, ask, call, clean_env, connect, get, one_line, parse_answer, post, raw,
    read_all, rows, run, wait_for,
)  # fmt: skip
from test_http import Scripted, gate
from test_service import LINE

import ssh_agent_proxy as p

__all__ = ["gate"]  # fixtures

# ---------------------------------------------------------------- in a thread of another program

# SIGTERM is a byte for serve, whose outcome is the process's.
HOST = f"""
import logging, os, signal, socket, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import ssh_agent_proxy as p
config = p.Config.from_env(os.environ, sys.argv[3:], p.COMMANDS)
handler = logging.StreamHandler()
handler.setFormatter(p.OneLine())
p.start_log(config.level, handler)
ours, theirs = socket.socketpair()
signal.signal(signal.SIGTERM, lambda *_: ours.send(b"x"))
ends = []

def host():
    try:
        ready = lambda names: p.LOG.info("the host knows %s", names)
        ends.append(p.serve(config, theirs, ready, float(sys.argv[1])))
    except p.ProxyError as e:
        ends.append(str(e))

thread = threading.Thread(target=host)
thread.start()
thread.join()
sys.exit(ends[0])
"""


def hosted(drain: float) -> List[str]:
    """For start_proxy's PYTHON: it runs in a thread of a program that is not ours."""
    return [sys.executable, "-c", HOST, str(drain)]


def begin(port: int, gate: Scripted) -> socket.socket:
    """A request that waits for the agent."""
    client = connect(port)
    client.sendall(post(b"x"))
    wait_for(lambda: gate.signing == 1, message="the request is at the agent")
    return client


def test_in_a_thread_it_says_where_it_listens_finishes_what_is_in_flight_and_gives_0(
    start_proxy: Callable[..., Proxy], gate: Scripted, scripted_agent: Callable[..., Path]
) -> None:
    proxy = start_proxy(upstream=scripted_agent(gate), python=hosted(10))
    proxy.wait_log(rf"the host knows \['127\.0\.0\.1:{proxy.port}'\]$")
    client = begin(proxy.port, gate)
    proxy.process.send_signal(signal.SIGTERM)
    proxy.wait_log(" INFO stopping")
    gate.gate.set()
    assert parse_answer(read_all(client)).status == 200
    assert proxy.process.wait(5) == 0


def test_there_too_a_drain_has_a_bound(
    start_proxy: Callable[..., Proxy], gate: Scripted, scripted_agent: Callable[..., Path]
) -> None:
    proxy = start_proxy(upstream=scripted_agent(gate), python=hosted(0.2))
    client = begin(proxy.port, gate)
    start = time.monotonic()
    proxy.process.send_signal(signal.SIGTERM)
    assert parse_answer(read_all(client)).text == "the proxy is about to end\n"
    assert proxy.process.wait(5) == 0
    assert time.monotonic() - start >= 0.2


def test_a_start_that_fails_there_says_why_and_never_that_it_listens(
    start_proxy: Callable[..., Proxy]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        name = f"127.0.0.1:{busy.getsockname()[1]}"
        proxy = start_proxy(addr=name, python=hosted(10), wait=False)
        proxy.wait_log(f"^cannot listen on {name}: port ")
    assert proxy.process.wait(5) == 1
    assert "the host knows" not in proxy.log()


def test_in_another_log_each_record_is_one_line_with_time_and_level(
    start_proxy: Callable[..., Proxy], gate: Scripted, scripted_agent: Callable[..., Path]
) -> None:
    gate.gate.set()
    gate.comment = b"a\n\x1b\xe2\x80\xae"
    proxy = start_proxy("-v", upstream=scripted_agent(gate), python=hosted(10))
    assert ask(proxy.port, post(b"x")).status == 200
    assert proxy.stop() == 0
    assert proxy.lines(" AUDIT outcome=signed ")
    for line in proxy.lines():
        assert line.isprintable()
        assert re.fullmatch(LINE, line)


# ---------------------------------------------------------------- what the process gives up

ERROR_MODE = 0x0003
POLICIES = {6: 0x1, 10: 0x3, 3: 0x3}  # in the order in which they are asked for
STEPS = ["no crash dumps", "no extension points", "no remote or low-integrity images",
         "strict handle checks"]  # fmt: skip


class Kernel32:
    """What kernel32.dll does, where it grants of each policy the bits of GRANTED."""

    def __init__(self, granted: int) -> None:
        self.mode = 0
        self.policies: Dict[int, int] = {}

        def GetErrorMode() -> int:
            return self.mode & granted

        def SetErrorMode(mode: int) -> int:
            self.mode = mode
            return 0

        def GetCurrentProcess() -> int:
            return -1

        def SetProcessMitigationPolicy(policy: int, buffer: Any, size: int) -> int:
            self.policies[policy] = self.value(buffer, size).value & granted
            return 1

        def GetProcessMitigationPolicy(process: int, policy: int, buffer: Any, size: int) -> int:
            assert process == -1
            self.value(buffer, size).value = self.policies[policy]
            return 1

        self.__dict__.update({f.__name__: f for f in (
            GetErrorMode, SetErrorMode, GetCurrentProcess, SetProcessMitigationPolicy,
            GetProcessMitigationPolicy,
        )})  # fmt: skip

    @staticmethod
    def value(buffer: Any, size: int) -> Any:
        assert size == ctypes.sizeof(wintypes.DWORD)
        return ctypes.cast(buffer, ctypes.POINTER(wintypes.DWORD)).contents


def test_on_windows_each_step_is_asked_for_and_read_back_and_strict_handles_come_last() -> None:
    kernel32 = Kernel32(-1)
    steps = p._harden_windows(kernel32)
    assert (kernel32.mode, list(kernel32.policies.items())) == (ERROR_MODE, [*POLICIES.items()])
    assert [step.name for step in steps] == STEPS


@pytest.mark.parametrize("granted", [0, 1, -1])
def test_what_windows_does_not_grant_whole_is_not_in_force(granted: int) -> None:
    """Its word that a policy is set is not taken for it."""
    steps = p._harden_windows(Kernel32(granted))
    whole = [bits & granted == bits for bits in (0x2, *POLICIES.values())]
    assert [step.in_force for step in steps] == whole


def test_each_function_of_windows_is_declared() -> None:
    kernel32 = Kernel32(-1)
    p._harden_windows(kernel32)
    declared = {
        name: [function.restype, *function.argtypes]
        for name, function in vars(kernel32).items() if callable(function)
    }  # fmt: skip
    policy, structure = ctypes.c_int, [ctypes.c_void_p, ctypes.c_size_t]
    assert declared == {
        "GetErrorMode": [wintypes.UINT],
        "SetErrorMode": [wintypes.UINT, wintypes.UINT],
        "GetCurrentProcess": [wintypes.HANDLE],
        "SetProcessMitigationPolicy": [wintypes.BOOL, policy, *structure],
        "GetProcessMitigationPolicy": [wintypes.BOOL, wintypes.HANDLE, policy, *structure],
    }


# ---------------------------------------------------------------- the console

CTRL_C_EVENT, CTRL_BREAK_EVENT, CTRL_CLOSE_EVENT = 0, 1, 2
CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT = 5, 6


@pytest.mark.parametrize(("event", "number", "waits"), [
    (CTRL_C_EVENT, signal.SIGINT, False),
    (CTRL_BREAK_EVENT, signal.SIGINT, False),
    (CTRL_CLOSE_EVENT, signal.SIGTERM, True),
    (CTRL_LOGOFF_EVENT, signal.SIGTERM, True),
    (CTRL_SHUTDOWN_EVENT, signal.SIGTERM, True),
])  # fmt: skip
def test_an_event_of_the_console_is_a_signal_and_where_windows_would_end_us_it_waits(
    event: int, number: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: List[Any] = []
    monkeypatch.setattr(p.signal, "raise_signal", done.append)
    monkeypatch.setattr(p.time, "sleep", lambda seconds: done.append(float(seconds)))
    assert p.console_event(event)
    assert done == [number, *([5.0] if waits else [])]
    assert p.CLOSE_SECONDS < 5


# ---------------------------------------------------------------- its log

Piped = Tuple[p.WindowsHandler, int]


@pytest.fixture
def piped() -> Iterator[Piped]:
    """A log that goes into a pipe, and where that is read."""
    reader, writer = os.pipe()
    handler = p.WindowsHandler("")
    handler.fd = writer
    yield handler, reader
    os.close(reader)
    if handler.thread.is_alive():
        handler.close()
    os.close(writer)


def say(handler: p.StderrHandler, text: str) -> float:
    """And how long that took."""
    start = time.monotonic()
    handler.emit(logging.LogRecord("x", p.AUDIT, "", 0, text, None, None))
    return time.monotonic() - start


def flood(handler: p.StderrHandler, lines: int) -> None:
    for _ in range(lines):
        say(handler, "outcome=refused " + "x" * 1000)


# (Behind 70 lines in a pipe of 64 KiB there is room for some to wait.)
@pytest.mark.parametrize("lines", [70, 1000])
def test_on_windows_a_stalled_log_holds_up_one_signature_for_half_a_second(
    piped: Piped, lines: int
) -> None:
    """As that of a console does in which text is selected."""
    flood(piped[0], lines)
    waits = [say(piped[0], f"outcome={what}") for what in ("signed 1", "signed 2", "refused 3")]
    assert 0.5 <= waits[0] < 2
    assert max(waits[1:]) < 0.25


def test_on_windows_too_no_line_is_cut_and_what_was_lost_is_counted(piped: Piped) -> None:
    handler, reader = piped
    flood(handler, 1000)
    text = b""

    def read() -> None:
        nonlocal text
        while b"outcome=signed" not in text:
            text += os.read(reader, 65536)

    thread = threading.Thread(target=read)
    thread.start()
    say(handler, "outcome=signed status=200")  # somebody reads again: it waits for room
    thread.join(10)
    *lines, last = text.decode().splitlines()
    assert all(line.endswith(" outcome=refused " + "x" * 1000) for line in lines)
    assert last.endswith(" outcome=signed status=200")
    lost = re.findall(r"\((\d+) lines before this one could not be written\)", text.decode())
    assert sum(map(int, lost)) == 1000 - len(lines)


def test_on_windows_too_a_signature_s_line_is_written_before_its_answer_leaves(
    piped: Piped
) -> None:
    handler, reader = piped
    os.set_blocking(reader, False)
    for number in range(200):
        say(handler, f"outcome=signed {number}")
        assert os.read(reader, 65536).endswith(f"outcome=signed {number}\n".encode())


def test_at_the_end_what_is_on_its_way_is_waited_for(piped: Piped) -> None:
    handler, reader = piped
    os.write(handler.fd, bytes(65536))  # as much as Linux lets wait in a pipe
    say(handler, "the last line")
    slow = threading.Timer(0.1, os.read, [reader, 65536])
    slow.start()
    handler.close()
    assert os.read(reader, 65536).endswith(b" the last line\n")
    slow.join()


# ---------------------------------------------------------------- settings and addresses

HOME = r"C:\Users\Jörg"
PATHS = rows([
    ("in any case", r"%UserProfile%\tokens", HOME + r"\tokens"),
    ("with brackets", r"%ProgramFiles(x86)%\t", r"C:\Program Files (x86)\t"),
    ("a dollar in it", r"%D%\t", r"C:\$Recycle\t"),
    ("as elsewhere", r"$HOME/t", HOME + "/t"),
    ("the home", r"~\t", HOME + "/t"),
    ("the home, as elsewhere", "~/t", HOME + "/t"),
    ("one percent sign", r"C:\100%\t", r"C:\100%\t"),
])  # fmt: skip
WINDOWS = {
    "USERPROFILE": HOME, "PROGRAMFILES(X86)": r"C:\Program Files (x86)", "D": r"C:\$Recycle",
}  # fmt: skip


@pytest.mark.parametrize(("path", "expanded"), PATHS)
def test_on_windows_a_paths_variables_are_expanded_as_everywhere_there(
    path: str, expanded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert p.expand(path, {**WINDOWS, "HOME": HOME}) == expanded


def test_a_variable_of_windows_that_is_not_set_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert p.expand("/a/%B%/c", {}) == "/a/%B%/c"
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(p.ConfigError, match="'%B%/c': a variable is not set"):
        p.expand("%B%/c", {})


def test_a_port_that_windows_keeps_for_itself_is_told_with_what_shows_them(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "an attempt was made")

    monkeypatch.setattr(p, "listen_tcp", forbidden)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(p.ProxyError, match=r"keeps port 7221 .*excludedportrange.*_ADDR"):
        p.listen(p.Address("127.0.0.1", 7221))


def test_on_windows_no_program_of_the_current_folder_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows looks for one there first, and a repository may hold an ssh-keygen.exe."""
    name = "NoDefaultCurrentDirectoryInExePath"
    monkeypatch.setenv(name, "")  # to be as it was after the test
    monkeypatch.setattr(sys, "platform", "win32")
    assert p.main(["--version"]) == 0
    assert os.environ[name] == "1"


# ---------------------------------------------------------------- on Windows itself

windows = pytest.mark.windows
CTRL_C = b"\x03"


class Console(Proxy):
    """The proxy in a console, which a pseudo-terminal is to Wine; its log goes into a pipe."""

    def __init__(self, home: Path, *argv: str) -> None:
        self.keyboard, screen = pty.openpty()
        self._log: List[str] = []
        self.process = subprocess.Popen(
            [sys.executable, str(PROXY), "--addr", "127.0.0.1:0", *argv],
            env=clean_env(home, TERM="xterm"), stdin=screen, stdout=screen, stderr=subprocess.PIPE,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(screen)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(self.wait_log(r"listening on \S+:(\d+) ").group(1))

    def press(self, keys: bytes) -> None:
        os.write(self.keyboard, keys)


@pytest.fixture
def console(
    home: Path, gate: Scripted, scripted_agent: Callable[..., Path]
) -> Iterator[Console]:
    running = Console(home, "--upstream", str(scripted_agent(gate)))
    yield running
    running.stop()
    os.close(running.keyboard)


@windows
def test_ctrl_c_finishes_what_is_in_flight_and_is_exit_0(console: Console, gate: Scripted) -> None:
    client = begin(console.port, gate)
    console.press(CTRL_C)
    console.wait_log(" INFO stopping")
    gate.gate.set()
    assert parse_answer(read_all(client)).status == 200
    assert console.process.wait(10) == 0
    assert " outcome=signed " in console.log()
    assert "Traceback" not in console.log()


@windows
def test_a_second_ctrl_c_ends_it_at_once(console: Console, gate: Scripted) -> None:
    client = begin(console.port, gate)
    console.press(CTRL_C)
    console.wait_log(" INFO stopping")
    assert console.process.poll() is None
    console.press(CTRL_C)
    assert parse_answer(read_all(client, 5)).text == "the proxy is about to end\n"
    assert console.process.wait(5) == 0


# What Windows starts a thread with when the console is closed; GET /shim has it do that.
CLOSING = """
import ctypes, os, sys, threading
sys.path.insert(0, os.path.dirname(sys.argv[2]))
import ssh_agent_proxy as p
kernel32 = ctypes.WinDLL("kernel32")
kernel32.CtrlRoutine.argtypes = [ctypes.c_void_p]
def close():
    kernel32.CtrlRoutine(int(sys.argv[1]))
    os._exit(7)  # as Windows does
def read_shim():
    threading.Thread(target=close, daemon=True).start()
    return b"closing"
p.read_shim = read_shim
p.CLOSE_SECONDS = 1
sys.exit(p.main(sys.argv[3:]))
"""


@windows
@pytest.mark.parametrize("event", [CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT])
def test_a_closed_console_leaves_what_is_in_flight_some_seconds(
    event: int, gate: Scripted, scripted_agent: Callable[..., Path],
    start_proxy: Callable[..., Proxy],
) -> None:  # fmt: skip
    python = [sys.executable, "-c", CLOSING, str(event)]
    proxy = start_proxy(upstream=scripted_agent(gate), python=python)
    client = begin(proxy.port, gate)
    assert ask(proxy.port, get("/shim")).body == b"closing"
    start = time.monotonic()
    assert parse_answer(read_all(client)).text == "the proxy is about to end\n"
    assert 0.8 < time.monotonic() - start < 4
    assert proxy.process.wait(10) == 0


@windows
def test_a_log_that_nobody_reads_holds_up_no_request_there(home: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(PROXY), "--addr", "127.0.0.1:0"],
        env=clean_env(home), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stderr
        text = b""
        while not (match := re.search(rb"listening on \S+:(\d+) ", text)):
            text = process.stderr.readline()
        for _ in range(300):
            answer = raw(int(match[1]), get("/" + 1000 * "x"), 2)
            assert parse_answer(answer).status == 404
    finally:
        process.kill()
        process.communicate()


@windows
def test_no_other_program_gets_the_port_as_well(start_proxy: Callable[..., Proxy]) -> None:
    port = start_proxy().port
    code = (f"import socket as s; x = s.socket(); x.setsockopt(s.SOL_SOCKET, s.SO_REUSEADDR, 1)\n"
            f"try: x.bind(('127.0.0.1', {port})); print('bound')\n"
            "except OSError as e: print(e.errno)")  # fmt: skip
    done = run([sys.executable, "-c", code])
    assert int(done.stdout) in (errno.EACCES, 10048)


@windows
def test_a_user_whose_name_is_not_ascii_has_a_token_file(home: Path, short: Path) -> None:
    folder = short / "Jörg ☃"
    argv = ["token", "box", "--token-file", r"%folder%\tökens\file"]
    done = call(home, *argv, FOLDER=f"Z:{folder}".replace("/", "\\"), LC_ALL="C.UTF-8")
    token = done.stdout.decode().strip()
    assert (folder / "tökens" / "file").read_bytes() == f"{token} box\n".encode()
    done = call(home, "check", "--token-file", str(folder), LC_ALL="C.UTF-8")
    assert "Jörg ☃" in one_line(done.stderr)


@windows
def test_there_each_step_of_hardening_is_a_line_and_what_is_not_in_force_is_said(
    home: Path
) -> None:
    """Wine takes each policy and has none in force: its word alone is not taken."""
    lines = call(home, "check", "--addr", "127.0.0.1:0").stdout.decode().splitlines()
    found = [line for line in lines if "in force (" in line]
    assert found[0].startswith(f"ok   {STEPS[0]}: in force (GetErrorMode 0x")
    assert [line.partition(" (")[0] for line in found[1:]] == [
        f"warn {step}: not in force" for step in STEPS[1:]
    ]
