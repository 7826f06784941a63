"""The tray: contrib/windows/tray.pyw, and its icon."""

import contextlib
import importlib.machinery
import importlib.util
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
from conftest import PROXY, ROOT, Agent, Keys, need, private_file, rows, run, wait_for

TRAY = ROOT / "contrib/windows/tray.pyw"


def load(path: Path) -> Any:
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
    spec = importlib.util.spec_from_loader(path.stem, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


tray = load(TRAY)


def test_the_icon_is_what_its_script_draws() -> None:
    icon = TRAY.with_name("ssh-agent-proxy.ico")
    assert load(TRAY.with_name("icon.py")).icon() == icon.read_bytes()


# ---------------------------------------------------------------------------------- what it knows

# What stands in the Run entry (of ours or another), in StartupApproved and in the policies; whether
# we are started at login, and why that can't be changed.
LOGIN = [
    ("no entry", None, None, (None, None), False, ""),
    ("our entry", "ours", None, (None, None), True, ""),
    ("approved", "ours", b"\x02" + bytes(11), (None, 0), True, ""),
    ("approved again", "ours", b"\x06" + bytes(11), (None, None), True, ""),
    ("turned off", "ours", b"\x03\0\0\0" + b"\x55" * 8, (None, None), False, "Task Manager"),
    ("turned off elsewhere", "other", b"\x07" + bytes(11), (None, None), False, "Task Manager"),
    ("turned off, then removed", None, b"\x03" + bytes(11), (None, None), False, ""),
    ("nonsense", "ours", "3", (None, None), True, ""),
    ("empty", "ours", b"", (None, None), True, ""),
    ("another copy's", "other", None, (None, None), False, ""),
    ("this machine's policy", "ours", None, (1, None), False, "policy"),
    ("this user's policy", None, b"\x02" + bytes(11), (None, 1), False, "policy"),
]


@pytest.mark.parametrize("entry, approved, policies, on, fixed", rows(LOGIN))
def test_start_at_login_tells_the_truth(
        entry: Any, approved: Any, policies: Any, on: bool, fixed: str) -> None:  # fmt: skip
    found = tray.login_state(entry, "ours", approved, policies)
    assert found.on == on
    assert fixed in found.fixed and bool(fixed) == bool(found.fixed)


ADDR, TOKENS = {"SSH_AGENT_PROXY_ADDR": "[::1]:1"}, {"SSH_AGENT_PROXY_TOKEN_FILE": "x"}
ADDRESSES = [
    ("nothing kept", {**TOKENS}, None, "this computer", ""),
    ("kept", {**TOKENS}, "all networks", "all networks", ""),
    ("nonsense kept", {**TOKENS}, "0.0.0.0:1", "this computer", ""),
    ("a number kept", {**TOKENS}, 1, "this computer", ""),
    ("a list kept", {**TOKENS}, ["all networks"], "this computer", ""),
    ("tokens gone", {}, "all networks", "this computer", "SSH_AGENT_PROXY_TOKEN_FILE"),
    ("tokens empty", dict.fromkeys(TOKENS, ""), "all networks", "this computer", "needs tokens"),
    ("set otherwise", {**ADDR, **TOKENS}, "all networks", "", "set by SSH_AGENT_PROXY_ADDR"),
    ("set empty", {**dict.fromkeys(ADDR, ""), **TOKENS}, "all networks", "all networks", ""),
]


@pytest.mark.parametrize("env, kept, choice, fixed", rows(ADDRESSES))
def test_all_networks_need_tokens_and_a_set_address_wins(
        env: Dict[str, str], kept: Any, choice: str, fixed: str) -> None:  # fmt: skip
    found, why = tray.choose_address(env, kept)
    assert found == choice
    assert fixed in why and bool(fixed) == bool(why)


def shown(items: List[Any]) -> List[str]:
    """A menu as text: [x] ticked, - greyed, > with a menu of its own."""
    lines = []
    for item in items:
        mark = "[x] " if item.ticked else "" if item.action or item.items else "- "
        lines.append(mark + item.label + (" >" if item.items else ""))
        lines += ["    " + line for line in shown(item.items)]
    return lines


LISTENING = ("127.0.0.1:7221",)
MENUS = [
    (
        "first run",
        (LISTENING,), (True,), "this computer", "needs tokens: set X", False,
        ["- Listening on 127.0.0.1:7221", "- ", "[x] &Start at login", "&Listen on >",
         "    [x] &This computer", "    - All networks (needs tokens: set X)", "&Copy public key",
         "&Open log", "- ", "E&xit"],
    ),
    (
        "set otherwise, turned off",
        (("a:1", "b:2"),), (False, "a policy"), "", "set by X", True,
        ["- Listening on a:1", "- Listening on b:2", "- ", "- &Start at login (a policy)",
         "&Listen on >", "    - This computer (set by X)", "    - All networks (set by X)",
         "- Copying the public key", "&Open log", "- ", "E&xit"],
    ),
    (
        "with tokens",
        (), (False,), "all networks", "", False,
        ["- Starting", "- ", "&Start at login", "&Listen on >", "    &This computer",
         "    [x] &All networks (WSL2 NAT, others; Windows Firewall asks)", "&Copy public key",
         "&Open log", "- ", "E&xit"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("state, login, choice, fixed, copying, expected", rows(MENUS))
def test_the_menu_shows_how_things_are(
    state: Any, login: Any, choice: str, fixed: str, copying: bool, expected: List[str]
) -> None:
    items = tray.menu_items(tray.State(*state), tray.Login(*login), choice, fixed, copying)
    assert shown(items) == expected


def test_why_it_does_not_run_stands_in_the_menu_whole() -> None:
    why = "port 7221 is in use by R&D, and " + "very long words " * 20
    items = tray.menu_items(tray.State(trouble=why), tray.Login(True), "", "", False)
    lines = [item.label for item in items[: items.index(tray.SEPARATOR)]]
    assert max(map(len, lines)) <= 90
    # & alone would underline what follows it.
    assert " ".join(lines) == f"Not running: {why.strip()}".replace("&", "&&")


TIPS = [
    ("starting", (), "ssh-agent-proxy: starting"),
    ("listening", (("a:1", "b:2"),), "ssh-agent-proxy: a:1, b:2"),
    ("in trouble", ((), "x"), "ssh-agent-proxy: not running: x"),
    ("ending", (("a:1",), "", True), "ssh-agent-proxy: ending"),
]


@pytest.mark.parametrize("state, tip", rows(TIPS))
def test_the_tooltip_tells_where_it_listens(state: Tuple[Any, ...], tip: str) -> None:
    assert tray.tooltip(tray.State(*state)) == tip


FITTING = [
    ("fits", "abc", "abc"),
    ("is cut", "abcd", "ab…"),
    ("pairs fit", "a\U0001f511", "a\U0001f511"),
    ("pairs are not cut in two", "\U0001f511\U0001f511", "…"),
]


@pytest.mark.parametrize("text, fits", rows(FITTING))
def test_a_text_fits_into_windows_structures(text: str, fits: str) -> None:
    assert tray.fitting(text, 4) == fits


# ------------------------------------------------------------------------------------------- log


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    return tmp_path / "ssh-agent-proxy"


def test_the_log_is_rotated_once(local: Path) -> None:
    handler = tray.LogFile()
    record = logging.LogRecord("x", logging.INFO, "", 0, "x" * 3000, (), None)
    for _ in range(1000):
        handler.emit(record)
    handler.close()
    assert sorted(os.listdir(local)) == ["tray.log", "tray.log.1"]
    assert 1 << 19 < (local / "tray.log.1").stat().st_size <= 1 << 20


def test_a_log_that_cannot_be_renamed_is_written_on(local: Path) -> None:
    handler = tray.LogFile()
    handler.maxBytes = 100
    (local / "tray.log.1/held open").mkdir(parents=True)
    for number in range(9):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, f"line {number}", (), None))
    handler.close()
    lines = (local / "tray.log").read_text().splitlines()
    assert [line[-1] for line in lines] == list("012345678")


def test_a_log_that_cannot_be_opened_for_once_goes_on(
        local: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(logging, "raiseExceptions", False)
    handler = tray.LogFile()
    handler.maxBytes = 1
    record = logging.LogRecord("x", logging.INFO, "", 0, "it goes on", (), None)
    for change in lambda: shutil.rmtree(local), local.mkdir, handler.close:
        handler.emit(record)
        change()
    assert (local / "tray.log").read_text().endswith(" it goes on\n")


@pytest.mark.parametrize("place", [None, "", "relative"])
def test_a_log_without_a_place_is_a_setting_that_is_wrong(
        place: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    if place is not None:
        monkeypatch.setenv("LOCALAPPDATA", place)
    with pytest.raises(tray.proxy.ConfigError, match="LOCALAPPDATA"):
        tray.LogFile()


@pytest.mark.parametrize("there", ["python.exe", "pythonw.exe"])
def test_what_starts_it_at_login_opens_no_console(
        there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / there).touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "a b" / "python.exe"))
    assert tray.command_line() == f'"{tmp_path}/a b/{there}" -I -B {TRAY}'


class Willing:
    """A Windows that does whatever it is asked."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 1


def test_one_that_is_ended_while_it_starts_is_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(env: Any, signals: socket.socket, ready: Any, patience: float) -> str:
        signals.recv(1)
        ready(["an address"])
        return ""

    monkeypatch.setattr(tray, "read_value", lambda *_: None)
    monkeypatch.setattr(tray, "run_server", serve)
    icon = tray.Tray(Willing())
    icon.start()
    icon.end()
    icon.server.join(5)
    icon.calls.get()()  # it listens
    assert icon.state.ending


INTERNAL = "internal error: ZeroDivisionError (see the log)"
# What is broken, in the course of what; what can't be done then, and what the menu says.
BROKEN = [
    ("the first run", "first_run", "begin", "Start at login can't be set", "the server's end"),
    ("the start", "environment", "begin", "not running", INTERNAL),
    ("the copy", "public_key", "fetch_key", "No public key was copied", ""),
]


@pytest.mark.parametrize("broken, does, what, trouble", rows(BROKEN))
def test_an_error_that_nobody_thought_of_is_told_in(
        broken: str, does: str, what: str, trouble: str, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    monkeypatch.setattr(tray, "read_value", lambda *_: None)
    monkeypatch.setattr(tray, "first_run", lambda: False)
    monkeypatch.setattr(tray, "run_server", lambda *_: "the server's end")
    monkeypatch.setattr(tray, broken, lambda *_: 1 // 0)
    icon = tray.Tray(Willing())
    getattr(icon, does)()
    if icon.server or icon.copying:
        icon.calls.get(timeout=5)()
    assert f"{what}: {INTERNAL}" in caplog.messages
    assert "lambda *_: 1 // 0" in caplog.text, "where it happened"
    assert (icon.state.trouble, icon.copying) == (trouble, False)


# ------------------------------------------------------------------------------------ on a screen

RUN = r"HKCU\Software\Microsoft\Windows\CurrentVersion\Run"
KEY = r"HKCU\Software\ssh-agent-proxy"
# What a Windows program pastes, as Python writes a text.
PASTE = r"""
import ctypes, ctypes.wintypes
user32, kernel32 = ctypes.WinDLL("user32"), ctypes.WinDLL("kernel32")
user32.GetClipboardData.restype = ctypes.wintypes.HANDLE
kernel32.GlobalLock.argtypes = [ctypes.wintypes.HANDLE]
kernel32.GlobalLock.restype = ctypes.c_wchar_p
if user32.OpenClipboard(None) and (data := user32.GetClipboardData(13)):
    print(ascii(kernel32.GlobalLock(data)))
"""

# Takes the icon away, as an Explorer that ends does, and then says what a new one says.
NEW_TASKBAR = r"""
import ctypes, runpy, sys
tray = runpy.run_path(sys.argv[1])
win32, data = tray["Win32"](), tray["NOTIFYICONDATAW"](uID=1)
data.cbSize, data.hWnd = ctypes.sizeof(data), win32.FindWindowW("ssh-agent-proxy tray", None)
assert win32.Shell_NotifyIconW(tray["NIM_DELETE"], ctypes.byref(data))
assert not win32.Shell_NotifyIconW(tray["NIM_MODIFY"], ctypes.byref(data))
win32.PostMessageW(data.hWnd, win32.RegisterWindowMessageW("TaskbarCreated"), 0, 0)
"""


class Desktop:
    """The tray, installed in a folder and on a screen of its own; its port is a free one."""

    def __init__(self, windows: Any, folder: Path, display: str) -> None:
        self.windows, self.folder = windows, folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.script = folder / "tray.pyw"
        self.script.write_text(TRAY.read_text().replace(":7221", f":{self.port}"))
        for path in (PROXY, TRAY.with_name("ssh-agent-proxy.ico")):
            shutil.copy(path, folder)
        self.env = windows.env(folder, DISPLAY=display)
        self.started: List[subprocess.Popen[bytes]] = []

    def start(self, *argv: str, **env: Any) -> subprocess.Popen[bytes]:
        # Its output is a pipe: with a file there Python does not start under Wine.
        words = [*self.windows.python, "-I", "-B", self.windows.path(self.script), *argv]
        process = subprocess.Popen(
            words,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.started.append(process)
        return process

    def log(self) -> str:
        paths = [path for folder in self.log_folders() for path in folder.glob("tray.log")]
        return "".join(path.read_text() for path in paths)

    def log_folders(self) -> List[Path]:
        users = self.windows.folder / "prefix/drive_c/users"
        return list(users.glob("*/AppData/Local/ssh-agent-proxy"))

    def logged(self, pattern: str, times: int = 1) -> None:
        wait_for(lambda: len(re.findall(pattern, self.log())) >= times, 20, self.log)

    def at_login(self) -> bool:
        return str(self.script).replace("/", "\\") in self.windows.registry(RUN)

    def paste(self) -> str:
        return run([*self.windows.python, "-c", PASTE], env=self.env).stdout.decode().strip()

    def tell(self, *words: str) -> str:
        return run([need("xdotool", "xdotool"), *words], env=self.env, check=False).stdout.decode()

    def windows_shown(self) -> List[str]:
        return self.tell("search", "--onlyvisible", "--name", ".*").split()

    def choose(self, *letters: str) -> None:
        """In the menu, by the letters that are underlined."""
        place = wait_for(lambda: self.tell("search", "--name", "Wine System Tray"), 20)
        geometry = self.tell("getwindowgeometry", "--shell", place.split()[0])
        x, y = (int(re.findall(rf"{axis}=(\d+)", geometry)[0]) + 10 for axis in "XY")
        opens = ["mousemove", str(x), str(y), "click", "3"]
        for letter in letters:
            before = set(self.windows_shown())
            self.tell(*opens)
            wait_for(lambda before=before: set(self.windows_shown()) - before, 10, "no menu")
            opens = ["key", letter]
        self.tell(*opens)

    def answers(self, host: str = "127.0.0.1") -> bool:
        with contextlib.suppress(OSError), socket.create_connection((host, self.port), 5) as s:
            s.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            return b"\r\n\r\nok\n" in s.makefile("rb").read()
        return False

    def log_off(self) -> None:
        """Ends the session and begins the next; not waited for, for the tray may come with it."""
        argv = ["wine", "wineboot", "--end-session"]
        null = subprocess.DEVNULL
        started = subprocess.Popen(argv, env=self.env, stdin=null, stdout=null, stderr=null)
        self.started.append(started)

    def close(self) -> None:
        """As an uninstall would: nothing of it is left, and it does not run."""
        assert self.start("--remove").wait(30) == 0
        for process in self.started:
            process.wait(10)
        assert not self.at_login()
        assert "ListenOn" not in self.windows.registry(KEY)
        assert self.log_folders() == []


@pytest.fixture
def desktop(windows: Any, tmp_path: Path) -> Iterator[Desktop]:
    with windows.screen() as display:
        desktop = Desktop(windows, tmp_path, display)
        yield desktop
        desktop.close()


def on_a_screen(test: Any) -> Any:
    return pytest.mark.windows(pytest.mark.alone(test))


@on_a_screen
def test_a_first_run_listens_and_starts_at_login_until_told_not_to(desktop: Desktop) -> None:
    desktop.start()
    desktop.logged(f"listening on 127.0.0.1:{desktop.port} ")
    assert desktop.answers()
    assert desktop.at_login()
    desktop.choose("s")
    wait_for(lambda: not desktop.at_login())
    desktop.choose("s")
    wait_for(desktop.at_login)


ENDINGS = [
    ("Exit", lambda desktop: desktop.choose("x")),
    ("an uninstall", lambda desktop: desktop.start("--remove")),
    ("logoff", lambda desktop: (desktop.choose("s"), desktop.log_off())),
]


@on_a_screen
@pytest.mark.parametrize("end", rows(ENDINGS))
def test_what_was_begun_is_finished_at(end: Any, desktop: Desktop) -> None:
    process = desktop.start()
    desktop.logged("listening on")
    with socket.create_connection(("127.0.0.1", desktop.port), 10) as client:
        client.sendall(b"GET /healthz HTTP/1.0\r\nX: ")
        end(desktop)
        desktop.logged("stopping")
        with pytest.raises(subprocess.TimeoutExpired):  # (Wine takes 2 s to remove an icon.)
            process.wait(2.5)
        client.sendall(b"y\r\n\r\n")
        assert b"\r\n\r\nok\n" in client.makefile("rb").read()
    assert process.wait(10) == 0


@on_a_screen
def test_what_never_ends_is_given_4_seconds(desktop: Desktop) -> None:
    process = desktop.start()
    desktop.logged("listening on")
    with socket.create_connection(("127.0.0.1", desktop.port), 10) as client:
        client.sendall(b"POST /sign HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        desktop.choose("x")
        begun = time.monotonic()
        assert b"the proxy is about to end" in client.makefile("rb").read()
        assert 3 < time.monotonic() - begun < 4.9
    assert process.wait(10) == 0


@on_a_screen
def test_the_next_session_starts_it(desktop: Desktop) -> None:
    process = desktop.start()
    desktop.logged("listening on")
    desktop.log_off()
    assert process.wait(10) == 0
    desktop.logged("listening on", times=2)
    assert desktop.answers()


@on_a_screen
def test_a_second_start_says_that_one_runs(desktop: Desktop) -> None:
    kept = ("/v", "ListenOn", "/d", "this computer", "/f")  # a first run has a balloon of its own
    desktop.windows.wine("reg", "add", KEY, *kept, env=desktop.env)
    desktop.start()
    desktop.logged("listening on")
    before = desktop.windows_shown()
    assert desktop.start().wait(20) == 0
    wait_for(lambda: set(desktop.windows_shown()) - set(before), 5, "no balloon")
    assert desktop.answers()


@on_a_screen
def test_one_that_starts_while_another_ends_waits_for_that(desktop: Desktop) -> None:
    first = desktop.start()
    desktop.logged("listening on")
    with socket.create_connection(("127.0.0.1", desktop.port), 10) as client:
        client.sendall(b"GET ")
        desktop.choose("x")
        second = desktop.start()
        assert first.wait(10) == 0
        desktop.logged("listening on", times=2)
        assert second.poll() is None


# Until its standard input ends.
EVENT = r"""
import ctypes
assert ctypes.WinDLL("kernel32").CreateEventW(None, True, False, "Local\\ssh-agent-proxy tray")
print("made", flush=True)
input()
"""


@on_a_screen
def test_another_programs_event_of_that_name_hinders_neither_start_nor_removal(
        desktop: Desktop) -> None:  # fmt: skip
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    argv = [*desktop.windows.python, "-c", EVENT]
    with subprocess.Popen(argv, env=desktop.env, **pipes) as other:
        assert other.stdout and other.stdin
        assert other.stdout.readline().strip() == b"made"
        process = desktop.start()
        desktop.logged("listening on")
        assert desktop.start().wait(20) == 0
        assert process.poll() is None
        assert desktop.start("--remove").wait(20) == process.wait(20) == 0
        other.stdin.write(b"\n")


@on_a_screen
def test_all_networks_are_listened_on_where_there_are_tokens(desktop: Desktop) -> None:
    tokens = private_file(desktop.folder / "tokens", "0123456789abcdef name\n")
    process = desktop.start(SSH_AGENT_PROXY_TOKEN_FILE=desktop.windows.path(tokens))
    desktop.logged("listening on 127.0.0.1:")
    assert not desktop.answers("127.0.0.2")
    desktop.choose("l", "a")
    desktop.logged("listening on 0.0.0.0:")
    assert desktop.answers("127.0.0.2")
    assert process.poll() is None  # the same one, with its icon
    desktop.choose("l", "t")
    wait_for(lambda: not desktop.answers("127.0.0.2"))
    desktop.choose("l", "a")
    wait_for(lambda: desktop.answers("127.0.0.2"))
    desktop.choose("x")
    assert process.wait(10) == 0
    desktop.start()  # without tokens
    desktop.logged("WARNING listening for this computer alone: SSH_AGENT_PROXY_TOKEN_FILE is no")
    assert not desktop.answers("127.0.0.2")


@on_a_screen
def test_the_public_key_is_copied(desktop: Desktop, agent: Agent, keys: Keys) -> None:
    desktop.start(SSH_AGENT_PROXY_UPSTREAM=desktop.windows.pipe(agent.sock))
    desktop.logged("listening on")
    desktop.choose("c")
    desktop.logged("WARNING No public key was copied: the agent lists no keys")
    agent.add(keys["ed25519"])
    desktop.choose("c")
    line = keys.line("ed25519") + "\r\n"
    wait_for(lambda: desktop.paste() == ascii(line), 20)


@on_a_screen
def test_a_busy_port_is_told_and_tried_again(desktop: Desktop) -> None:
    with socket.create_server(("127.0.0.1", desktop.port)):
        process = desktop.start(SSH_AGENT_PROXY_TOKEN_FILE=desktop.windows.path(PROXY))
        desktop.logged("ERROR not running: SSH_AGENT_PROXY_TOKEN_FILE: ")
        desktop.choose("x")
        assert process.wait(10) == 0
        process = desktop.start(SSH_AGENT_PROXY_TOKEN_FILE="")
        port = f"127.0.0.1:{desktop.port}"
        desktop.logged(f"ERROR not running: cannot listen on {port}: port .* is in use")
    desktop.choose("l", "t")
    desktop.logged("listening on")
    assert process.poll() is None and desktop.answers()


@on_a_screen
def test_the_icon_comes_back_with_a_new_taskbar(desktop: Desktop) -> None:
    process = desktop.start()
    desktop.logged("listening on")
    desktop.choose("s")
    run([*desktop.windows.python, "-c", NEW_TASKBAR, desktop.script], env=desktop.env)
    desktop.choose("x")
    assert process.wait(10) == 0


@on_a_screen
def test_without_a_taskbar_it_serves_and_says_so(desktop: Desktop) -> None:
    drivers = r"HKCU\Software\Wine\Drivers"
    desktop.windows.wine("reg", "add", drivers, "/v", "Graphics", "/d", "null", "/f")
    try:
        process = desktop.start(DISPLAY="")
        desktop.logged("WARNING no icon: there is no taskbar")
        desktop.logged("listening on")
        assert desktop.answers()
        assert desktop.start("--remove", DISPLAY="").wait(20) == process.wait(20) == 0
    finally:
        desktop.windows.wine("reg", "delete", drivers, "/v", "Graphics", "/f")


@on_a_screen
def test_what_the_installer_keeps_below_its_key_stops_no_removal(desktop: Desktop) -> None:
    desktop.windows.wine("reg", "add", rf"{KEY}\installed", "/v", "x", "/f")
    desktop.start()
    desktop.logged("listening on")
    try:
        assert "ListenOn" in desktop.windows.registry(KEY)
        assert desktop.start("--remove").wait(20) == 0
        assert "ListenOn" not in desktop.windows.registry(KEY)
    finally:
        desktop.windows.wine("reg", "delete", rf"{KEY}\installed", "/f")
