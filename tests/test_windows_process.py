"""The process where Windows differs: inside a tray, its log, its console, what it gives up."""

import ctypes
import errno
import fcntl
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
from unittest.mock import Mock

import pytest
from conftest import (
    PROXY, ROOT, Proxy, ask, call, clean_env, connect, get, one_line, parse_answer, post, raw,
    read_all, rows, run, wait_for,
)  # fmt: skip
from test_http import Scripted, gate
from test_service import LINE, say

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


@pytest.mark.parametrize("drain, status", [(10, 200), (0.2, 503)])
def test_in_a_thread_what_is_in_flight_is_finished_within_a_bound_and_each_line_has_its_level(
        start_proxy: Callable[..., Proxy], gate: Scripted, scripted_agent: Callable[..., Path],
        drain: float, status: int) -> None:  # fmt: skip
    gate.comment = b"a\n\x1b\xe2\x80\xae"
    proxy = start_proxy("-v", upstream=scripted_agent(gate), python=hosted(drain))
    proxy.wait_log(rf"the host knows \['127\.0\.0\.1:{proxy.port}'\]$")
    client = begin(proxy.port, gate)
    proxy.process.send_signal(signal.SIGTERM)
    proxy.wait_log(" INFO stopping")
    if status == 200:
        gate.gate.set()
    assert parse_answer(read_all(client, 5)).status == status
    assert proxy.process.wait(5) == 0
    proxy.wait_log(" AUDIT outcome=")
    assert all(re.fullmatch(LINE, line) and line.isprintable() for line in proxy.lines())


def test_a_start_that_fails_there_says_why_and_never_that_it_listens(
        start_proxy: Callable[..., Proxy]) -> None:  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as busy:
        name = f"127.0.0.1:{busy.getsockname()[1]}"
        proxy = start_proxy(addr=name, python=hosted(10), wait=False)
        proxy.wait_log(f"^cannot listen on {name}: port ")
    assert proxy.process.wait(5) == 1
    assert "the host knows" not in proxy.log()


# ---------------------------------------------------------------- what the process gives up

POLICY, STRUCTURE = ctypes.c_int, [ctypes.c_void_p, ctypes.c_size_t]
DECLARED = {
    "GetErrorMode": [wintypes.UINT],
    "SetErrorMode": [wintypes.UINT, wintypes.UINT],
    "GetCurrentProcess": [wintypes.HANDLE],
    "SetProcessMitigationPolicy": [wintypes.BOOL, POLICY, *STRUCTURE],
    "GetProcessMitigationPolicy": [wintypes.BOOL, wintypes.HANDLE, POLICY, *STRUCTURE],
}
STEPS = ["no crash dumps", "no extension points", "no remote or low-integrity images",
         "strict handle checks"]  # fmt: skip


def make_kernel32(granted: int = -1) -> Any:
    """What kernel32.dll does, where it grants of what is asked for the bits of GRANTED."""
    asked: Dict[Any, int] = {}  # by the number of the policy, in the order of asking

    def set_policy(policy: int, buffer: Any, size: int) -> int:
        asked[policy] = dword(buffer, size).value
        return 1

    def get_policy(process: int, policy: int, buffer: Any, size: int) -> int:
        assert process == -1
        dword(buffer, size).value = asked[policy] & granted
        return 1

    kernel32 = Mock([*DECLARED], asked=asked)
    kernel32.SetErrorMode.side_effect = lambda mode: asked.update(mode=mode)
    kernel32.GetErrorMode.side_effect = lambda: asked["mode"] & granted
    kernel32.GetCurrentProcess.return_value = -1
    kernel32.SetProcessMitigationPolicy.side_effect = set_policy
    kernel32.GetProcessMitigationPolicy.side_effect = get_policy
    return kernel32


def dword(buffer: Any, size: int) -> Any:
    assert size == ctypes.sizeof(wintypes.DWORD)
    return ctypes.cast(buffer, ctypes.POINTER(wintypes.DWORD)).contents


def test_on_windows_each_step_is_asked_for_and_strict_handles_come_last() -> None:
    kernel32 = make_kernel32()
    assert [step.name for step in p._harden_windows(kernel32)] == STEPS
    assert [*kernel32.asked.items()] == [("mode", 0x3), (6, 0x1), (10, 0x3), (3, 0x3)]


@pytest.mark.parametrize("granted", [0, 1, -1])
def test_what_windows_does_not_grant_whole_is_not_in_force(granted: int) -> None:
    """Its word that a policy is set is not taken for it."""
    steps = p._harden_windows(make_kernel32(granted))
    assert [step.in_force for step in steps] == [bits & granted == bits for bits in (2, 1, 3, 3)]


def test_each_function_of_windows_is_declared() -> None:
    kernel32 = make_kernel32()
    p._harden_windows(kernel32)
    for name, types in DECLARED.items():
        function = getattr(kernel32, name)
        assert [function.restype, *function.argtypes] == types, name


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
        event: int, number: int, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
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


def seconds(handler: p.StderrHandler, text: str) -> float:
    """How long it takes to say TEXT."""
    start = time.monotonic()
    say(handler, text)
    return time.monotonic() - start


def flood(handler: p.StderrHandler, lines: int) -> None:
    for _ in range(lines):
        say(handler, "outcome=refused " + "x" * 1000)


# (Behind 70 lines in a pipe of 64 KiB there is room for some to wait.)
@pytest.mark.parametrize("lines", [70, 1000])
def test_on_windows_a_stalled_log_holds_up_one_signature_for_half_a_second(
        piped: Piped, lines: int) -> None:  # fmt: skip
    """As that of a console does in which text is selected."""
    flood(piped[0], lines)
    assert 0.5 <= seconds(piped[0], "outcome=signed 1") < 2
    assert seconds(piped[0], "outcome=signed 2") < 0.25
    assert seconds(piped[0], "outcome=refused 3") < 0.25
    flood(piped[0], 1000)
    assert seconds(piped[0], "outcome=signed 4") < 0.25


def test_on_windows_too_no_line_is_cut_and_what_was_lost_is_counted(piped: Piped) -> None:
    handler, reader = piped
    flood(handler, 1000)
    # Somebody reads again: it waits for room.
    writer = threading.Thread(target=say, args=(handler, "outcome=signed status=200"))
    writer.start()
    text = b""
    while b"outcome=signed" not in text:
        text += os.read(reader, 65536)
    writer.join()
    *lines, last = text.decode().splitlines()
    assert all(line.endswith(" outcome=refused " + "x" * 1000) for line in lines)
    assert last.endswith(" outcome=signed status=200")
    lost = re.findall(r"\((\d+) lines before this one could not be written\)", text.decode())
    assert sum(map(int, lost)) == 1000 - len(lines) > 0


def test_at_the_end_what_is_on_its_way_is_waited_for(piped: Piped) -> None:
    handler, reader = piped
    os.write(handler.fd, bytes(65536))  # as much as Linux lets wait in a pipe
    say(handler, "the last line")
    slow = threading.Timer(0.1, os.read, [reader, 65536])
    slow.start()
    handler.close()
    assert os.read(reader, 65536).endswith(b" the last line\n")
    slow.join()


# ---------------------------------------------------------------- connections, settings, addresses

# A hundred that Windows' accept tells of, before each that comes.
RESET = """
import os, socket, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import ssh_agent_proxy as p
accept, resets = socket.socket.accept, iter([ConnectionResetError] * 100)
def tell(listener):
    for reset in resets:
        raise reset
    return accept(listener)
socket.socket.accept = tell
sys.exit(p.main(sys.argv[2:]))
"""


def test_connections_that_were_reset_before_they_were_taken_hold_up_nobody(
        start_proxy: Callable[..., Proxy]) -> None:  # fmt: skip
    proxy = start_proxy(python=[sys.executable, "-c", RESET])
    assert ask(proxy.port, get("/healthz")).status == 200
    assert not proxy.lines("cannot take a connection")


HOME = r"C:\Users\Jörg"
WINDOWS = {"UserProfile": HOME, "PROGRAMFILES(X86)": r"C:\Program Files (x86)",
           "D": r"C:\$Recycle", "HOME": HOME}  # fmt: skip
PATHS = rows([
    ("in any case", r"%UserProfile%\tokens", HOME + r"\tokens"),
    ("with brackets", r"%ProgramFiles(x86)%\t", r"C:\Program Files (x86)\t"),
    ("a dollar in it", r"%D%\t", r"C:\$Recycle\t"),
    ("as elsewhere", r"$HOME/t", HOME + "/t"),
    ("the home", r"~\t", HOME + "/t"),
    ("the home, as elsewhere", "~/t", HOME + "/t"),
    ("one percent sign", r"C:\100%\t", r"C:\100%\t"),
])  # fmt: skip


@pytest.mark.parametrize(("path", "expanded"), PATHS)
def test_on_windows_a_paths_variables_are_expanded_as_everywhere_there(
        path: str, expanded: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "platform", "win32")
    assert p.expand(path, WINDOWS) == expanded


def test_a_variable_of_windows_that_is_not_set_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert p.expand("/a/%B%/c", {}) == "/a/%B%/c"
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(p.ConfigError, match="'%B%/c': a variable is not set"):
        p.expand("%B%/c", {})


def test_a_port_that_windows_keeps_for_itself_is_told_with_what_shows_them(
        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def forbidden(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "an attempt was made")

    monkeypatch.setattr(p, "listen_tcp", forbidden)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(p.ProxyError, match=r"keeps port 7221 .*excludedportrange.*_ADDR"):
        p.listen(p.Address("127.0.0.1", 7221))


def test_on_windows_no_program_of_the_current_folder_is_run(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
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
        self.port = int(self.wait_log(r"listening on \S+:(\d+) ", 30).group(1))

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
def test_ctrl_c_waits_for_nobody_who_has_asked_for_nothing(console: Console) -> None:
    with connect(console.port):
        assert ask(console.port, get("/healthz")).status == 200  # (now that one too is taken)
        console.press(CTRL_C)
        assert console.process.wait(5) == 0


@windows
@pytest.mark.parametrize("again, status", [(False, 200), (True, 503)])
def test_ctrl_c_finishes_what_is_in_flight_and_a_second_ends_it_at_once(
        console: Console, gate: Scripted, again: bool, status: int) -> None:  # fmt: skip
    client = begin(console.port, gate)
    console.press(CTRL_C)
    console.wait_log(" INFO stopping")
    assert console.process.poll() is None
    if again:
        console.press(CTRL_C)
    else:
        gate.gate.set()
    assert parse_answer(read_all(client, 5)).status == status
    assert console.process.wait(5) == 0
    console.wait_log(" outcome=")
    assert "Traceback" not in console.log()


# What Windows starts a thread with when the console is closed; GET /shim has it do that.
CLOSING = """
import ctypes, os, sys, threading
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import ssh_agent_proxy as p
kernel32 = ctypes.WinDLL("kernel32")
kernel32.CtrlRoutine.argtypes = [ctypes.c_void_p]
def close():
    kernel32.CtrlRoutine(2)  # CTRL_CLOSE_EVENT
    os._exit(7)  # as Windows does
def read_shim():
    threading.Thread(target=close, daemon=True).start()
    return b"closing"
p.read_shim = read_shim
p.CLOSE_SECONDS = 1
sys.exit(p.main(sys.argv[2:]))
"""


@windows
def test_a_closed_console_leaves_what_is_in_flight_some_seconds(
    gate: Scripted, scripted_agent: Callable[..., Path], start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy(upstream=scripted_agent(gate), python=[sys.executable, "-c", CLOSING])
    client = begin(proxy.port, gate)
    start = time.monotonic()
    assert ask(proxy.port, get("/shim")).body == b"closing"
    assert parse_answer(read_all(client)).text == "the proxy is about to end\n"
    assert 0.8 < time.monotonic() - start < 4
    assert proxy.process.wait(10) == 0


DETACHED = """
import subprocess, sys
sys.exit(subprocess.call([sys.executable, *sys.argv[1:]], creationflags=8, close_fds=True))
"""


@windows
def test_without_standard_handles_as_pythonw_has_none_it_runs_all_the_same(home: Path) -> None:
    wrong = [sys.executable, "-c", DETACHED, PROXY, "--addr", "none"]
    assert run(wrong, env=clean_env(home), check=False).returncode == 2


def read_no_further(proxy: Proxy) -> None:
    """Than to where it says that it listens."""
    assert proxy.process.stderr
    for line in proxy.process.stderr:
        proxy._log.append(line.decode())
        if b" listening on " in line:
            break


@windows
def test_a_log_that_nobody_reads_holds_up_no_request_there(
        start_proxy: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(Proxy, "_read", read_no_further)
    port = start_proxy().port
    for _ in range(300):
        assert parse_answer(raw(port, get("/" + 1000 * "x"), 2)).status == 404


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


# Windows' LK_LOCK tries again after a second, ten times; Wine's after a millisecond. And what is
# added while another's token is not yet printed would be too early.
IN_TURN = f"""
import msvcrt, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import ssh_agent_proxy as p
lock, output = msvcrt.locking, p.output
def patient_lock(*words):
    for second in range(9):
        try:
            return lock(*words)
        except OSError:
            time.sleep(1)
    return lock(*words)
def slow_output(data):
    size = os.path.getsize(sys.argv[-1])
    time.sleep(0.5)
    assert os.path.getsize(sys.argv[-1]) == size
    return output(data)
msvcrt.locking, p.output = patient_lock, slow_output
sys.exit(p.main(sys.argv[1:]))
"""


@windows
def test_tokens_are_added_in_turn(home: Path) -> None:
    """Windows' C library seeks to the end and writes there, and two would write to one place."""
    file = home / "tokens"
    argv = [sys.executable, "-c", IN_TURN, "token", "box", "--token-file", str(file)]
    started = [
        subprocess.Popen(argv, env=clean_env(home), stdout=subprocess.PIPE) for _ in range(2)
    ]
    printed = [process.communicate(timeout=30)[0].decode().strip() for process in started]
    lines = file.read_text().splitlines()
    assert sorted(lines) == sorted(f"{token} box" for token in printed)
