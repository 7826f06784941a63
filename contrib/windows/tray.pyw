r"""ssh-agent-proxy behind a tray icon of Windows: the same server, with a menu.

    pythonw -I -B tray.pyw            serves until Exit, logoff, or WM_CLOSE to its window
    pythonw -I -B tray.pyw --remove   ends a running one and removes what it has written, silently

It is set as the program on a console is, by SSH_AGENT_PROXY_* variables of the user, and needs
Windows 10 version 1703 or newer. An installer ends it by WM_CLOSE to the window whose class is
`ssh-agent-proxy tray`: what is in flight is finished, within 4 seconds. What it writes, and
--remove takes away:

    HKCU\Software\Microsoft\Windows\CurrentVersion\Run, ssh-agent-proxy    Start at login
    HKCU\Software\ssh-agent-proxy, ListenOn                                Listen on
    %LOCALAPPDATA%\ssh-agent-proxy\tray.log, tray.log.1                    the log

The file reads from top to bottom; each section uses only what stands above it:

    Head        imports, the server that it runs
    Settings    what the registry and the environment say
    Menu        what is shown for which state
    Win32       constants, structures and functions, named as Microsoft names them
    Work        what takes its time, in threads: the server, the public key
    Tray        window, icon, menu
    Start       one instance, --remove, main()
"""

import sys

if __name__ == "__main__":
    sys.dont_write_bytecode = True  # nothing is written beside the program
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        # The script's own directory: a file named ctypes.py beside it is not ours to run.
        del sys.path[0]

import contextlib
import ctypes
import logging
import logging.handlers
import os
import queue
import select
import socket
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER
from ctypes.wintypes import (
    ATOM,
    BOOL,
    BYTE,
    DWORD,
    HANDLE,
    HBRUSH,
    HGLOBAL,
    HICON,
    HINSTANCE,
    HMENU,
    HMODULE,
    HWND,
    LPARAM,
    LPCWSTR,
    LPVOID,
    MSG,
    UINT,
    WCHAR,
    WORD,
    WPARAM,
)
from typing import Any, NamedTuple, Optional

if sys.platform == "win32":
    import winreg

HERE = os.path.dirname(os.path.abspath(__file__))
# Beside it where it is installed, two folders up in the project's tree. (Last on the path, and only
# for this: nothing that lies there is to stand in for a module of Python's.)
_BESIDE = os.path.exists(os.path.join(HERE, "ssh_agent_proxy.py"))
sys.path.append(HERE if _BESIDE else os.path.dirname(os.path.dirname(HERE)))
import ssh_agent_proxy as proxy  # noqa: E402

sys.path.pop()

LOG = proxy.LOG
NAME = proxy.PROGRAM
# Windows gives 5 seconds at logoff.
DRAIN_SECONDS = 4.0
END_SECONDS = 4.5
AGAIN_SECONDS = 5.0  # that a port may take to be free again

# ------------------------------------------------------------------------------------ Settings

RUN = r"Software\Microsoft\Windows\CurrentVersion\Run"
# What Task Manager and Settings write when a startup app is turned off there or on again.
APPROVED = r"Software\Microsoft\Windows\CurrentVersion\Explorer\StartupApproved\Run"
# REST_NOCURRENTUSERRUN (RESTRICTIONS, shlobj_core.h) is DisableCurrentUserRun in here.
POLICIES = r"Software\Microsoft\Windows\CurrentVersion\Policies\Explorer"
OURS = rf"Software\{NAME}"
LISTEN_ON = "ListenOn"
MAX_RUN = 260  # "Run and RunOnce Registry Keys": no longer command line

ADDR = "SSH_AGENT_PROXY_ADDR"
TOKEN_FILE = "SSH_AGENT_PROXY_TOKEN_FILE"  # noqa: S105  a variable's name
# IPv4 alone, for that is what WSL2's NAT and container engines come by; a global IPv6 address, as
# most machines have, would be open to the internet with nothing but the firewall before it.
ADDRESSES = {"this computer": "127.0.0.1:7221", "all networks": "0.0.0.0:7221"}
HERE_ONLY, EVERYWHERE = ADDRESSES


class Login(NamedTuple):
    """Whether Windows starts us at login, and why that can't be changed here, if so."""

    on: bool
    fixed: str = ""


def login_state(entry: Any, ours: str, approved: Any, policies: Sequence[Any]) -> Login:
    """By the Run ENTRY, our own command line, Windows' APPROVED value and its POLICIES."""
    if any(policies):
        return Login(False, "forbidden by a policy")
    # Twelve bytes, the first of which is even where it is on (02, 06), and odd where it is off.
    if entry and isinstance(approved, bytes) and approved[:1] and approved[0] & 1:
        return Login(False, "turned off in Task Manager, Startup apps")
    return Login(entry == ours)


def choose_address(env: Mapping[str, str], kept: Any) -> tuple[str, str]:
    """Which of ADDRESSES, "" for another one, and why there is no choice, if so."""
    if env.get(ADDR):
        return "", f"set by {ADDR}"
    if not env.get(TOKEN_FILE):  # whatever was chosen while there was one
        return HERE_ONLY, f"needs tokens: set {TOKEN_FILE}"
    known = isinstance(kept, str) and kept in ADDRESSES  # the registry has values of any kind
    return (kept if known else HERE_ONLY), ""


def environment(choice: str) -> dict[str, str]:
    """What the server is set by."""
    env = dict(os.environ)
    if choice:
        env[ADDR] = ADDRESSES[choice]
    return env


def command_line() -> str:
    """What starts this very file, without a console; the installer's shortcut has the same. (-I: no
    PYTHON* variable counts, not even PYTHONINSPECT, which a file python3XX._pth does not stop.)"""
    windowed = os.path.join(os.path.dirname(sys.executable), "pythonw.exe")
    python = windowed if os.path.exists(windowed) else sys.executable
    return subprocess.list2cmdline([python, "-I", "-B", os.path.abspath(__file__)])


def log_folder() -> str:
    """ConfigError where Windows has not told where such things belong."""
    local = os.environ.get("LOCALAPPDATA", "")
    if not os.path.isabs(local):
        raise proxy.ConfigError("LOCALAPPDATA is no folder: there is no place for the log")
    return os.path.join(local, NAME)


def read_value(key: str, name: str, root: Optional[int] = None) -> Any:
    """None where there is none, or none that may be read."""
    try:
        with winreg.OpenKey(root or winreg.HKEY_CURRENT_USER, key) as opened:
            return winreg.QueryValueEx(opened, name)[0]
    except OSError:
        return None


def write_value(key: str, name: str, value: str) -> None:
    with winreg.CreateKeyEx(winreg.HKEY_CURRENT_USER, key, 0, winreg.KEY_SET_VALUE) as opened:
        winreg.SetValueEx(opened, name, 0, winreg.REG_SZ, value)


def remove_value(key: str, name: str) -> None:
    user, may = winreg.HKEY_CURRENT_USER, winreg.KEY_SET_VALUE
    with contextlib.suppress(FileNotFoundError), winreg.OpenKey(user, key, 0, may) as opened:
        winreg.DeleteValue(opened, name)


def read_login() -> Login:
    roots = (winreg.HKEY_LOCAL_MACHINE, winreg.HKEY_CURRENT_USER)
    policies = [read_value(POLICIES, "DisableCurrentUserRun", root) for root in roots]
    entry, approved = read_value(RUN, NAME), read_value(APPROVED, NAME)
    return login_state(entry, command_line(), approved, policies)


def remove_settings() -> None:
    remove_value(RUN, NAME)
    remove_value(APPROVED, NAME)
    remove_value(OURS, LISTEN_ON)
    with contextlib.suppress(OSError):  # while it is installed, the installer's values are below
        winreg.DeleteKey(winreg.HKEY_CURRENT_USER, OURS)


def start_at_login(wanted: bool) -> None:
    """OSError where Windows won't have it."""
    if not wanted:
        remove_value(RUN, NAME)
        return
    line = command_line()
    if len(line) > MAX_RUN:
        raise OSError(0, f"Windows starts no command of more than {MAX_RUN} characters at login")
    write_value(RUN, NAME, line)


def first_run() -> bool:
    """Whether this is the first one, which has Windows start us at login; OSError."""
    first = read_value(OURS, LISTEN_ON) is None
    entry = read_value(RUN, NAME)
    # After an upgrade another Python may start the same file.
    outdated = entry != command_line() and os.path.abspath(__file__) in str(entry)
    if first:
        write_value(OURS, LISTEN_ON, HERE_ONLY)
    if first or outdated:
        start_at_login(True)
    return first


# ---------------------------------------------------------------------------------------- Menu


class State(NamedTuple):
    """How the server is."""

    listening: tuple[str, ...] = ()
    trouble: str = ""  # why it does not run
    ending: bool = False


class Item(NamedTuple):
    """A line of the menu: what it says, with & before the letter that chooses it, and what it does;
    greyed where that is nothing."""

    label: str
    action: str = ""
    ticked: bool = False
    items: tuple["Item", ...] = ()


SEPARATOR = Item("")


def state_lines(state: State) -> list[str]:
    if state.ending:
        return ["Ending: what was begun is finished first"]
    if state.trouble:
        # Whole, in lines that fit on a screen.
        return textwrap.wrap(f"Not running: {state.trouble}", 80)
    return [f"Listening on {name}" for name in state.listening] or ["Starting"]


def menu_items(state: State, login: Login, choice: str, fixed: str, copying: bool) -> list[Item]:
    """CHOICE and FIXED are choose_address's; COPYING: the agent is being asked already."""
    why = f" ({login.fixed})" if login.fixed else ""
    if not choice:
        here = Item(f"This computer ({fixed})")
    else:
        here = Item("&This computer", HERE_ONLY, choice == HERE_ONLY)
    if fixed:
        networks = Item(f"All networks ({fixed})")
    else:
        label = "&All networks (WSL2 NAT, others; Windows Firewall asks)"
        networks = Item(label, EVERYWHERE, choice == EVERYWHERE)
    return [
        *(Item(line.replace("&", "&&")) for line in state_lines(state)),
        SEPARATOR,
        Item(f"&Start at login{why}", "" if login.fixed else "login", login.on),
        Item("&Listen on", items=(here, networks)),
        Item("Copying the public key") if copying else Item("&Copy public key", "copy"),
        Item("&Open log", "log"),
        SEPARATOR,
        Item("E&xit", "exit"),
    ]


def tooltip(state: State) -> str:
    if state.ending:
        return f"{NAME}: ending"
    if state.trouble:
        return f"{NAME}: not running: {state.trouble}"
    return f"{NAME}: {', '.join(state.listening) or 'starting'}"


def fitting(text: str, size: int) -> str:
    """TEXT for an array of SIZE WCHARs, the last of which is 0; nothing is cut in two."""
    while len(text.encode("utf-16-le")) // 2 > size - 1:
        text = text[:-2] + "…"
    return text


# --------------------------------------------------------------------------------------- Win32

# winuser.h
WM_NULL = 0x0000
WM_DESTROY = 0x0002
WM_CLOSE = 0x0010
WM_QUERYENDSESSION = 0x0011
WM_ENDSESSION = 0x0016
WM_CONTEXTMENU = 0x007B
WM_TIMER = 0x0113
WM_USER = 0x0400
WM_APP = 0x8000
MF_STRING = 0x0000
MF_GRAYED = 0x0001
MF_CHECKED = 0x0008
MF_POPUP = 0x0010
MF_SEPARATOR = 0x0800
TPM_RIGHTBUTTON = 0x0002
TPM_RIGHTALIGN = 0x0008
TPM_NONOTIFY = 0x0080
TPM_RETURNCMD = 0x0100
SM_MENUDROPALIGNMENT = 40
SM_CXSMICON = 49
SM_CYSMICON = 50
IMAGE_ICON = 1
LR_LOADFROMFILE = 0x0010
IDI_APPLICATION = 32512
MSGFLT_ALLOW = 1
SMTO_ABORTIFHUNG = 0x0002
MB_OK = 0x0000
MB_ICONERROR = 0x0010
MB_ICONINFORMATION = 0x0040
MB_SETFOREGROUND = 0x00010000
CF_UNICODETEXT = 13
# windef.h: (DPI_AWARENESS_CONTEXT)-4
DPI_AWARENESS_CONTEXT_PER_MONITOR_AWARE_V2 = -4
# shellapi.h
NIM_ADD = 0
NIM_MODIFY = 1
NIM_DELETE = 2
NIM_SETFOCUS = 3
NIM_SETVERSION = 4
NIF_MESSAGE = 0x01
NIF_ICON = 0x02
NIF_TIP = 0x04
NIF_INFO = 0x10
NIF_SHOWTIP = 0x80
NIIF_INFO = 0x01
NIIF_ERROR = 0x03
NIIF_RESPECT_QUIET_TIME = 0x80
NIN_SELECT = WM_USER + 0
NIN_KEYSELECT = NIN_SELECT | 0x1
NOTIFYICON_VERSION_4 = 4
# winbase.h, winnt.h, winerror.h
GMEM_MOVEABLE = 0x0002
SYNCHRONIZE = 0x00100000
PROCESS_TERMINATE = 0x0001
WAIT_OBJECT_0 = 0
WAIT_ABANDONED = 0x80

INT = ctypes.c_int
LRESULT = ctypes.c_ssize_t
UINT_PTR = DWORD_PTR = SIZE_T = ctypes.c_size_t
# (Elsewhere than on Windows, where the menu's part alone is of use, there is no WINFUNCTYPE.)
_function_type = getattr(ctypes, "WINFUNCTYPE", ctypes.CFUNCTYPE)
WNDPROC = _function_type(LRESULT, HWND, UINT, WPARAM, LPARAM)


class WNDCLASSW(ctypes.Structure):
    _fields_ = [
        ("style", UINT),
        ("lpfnWndProc", WNDPROC),
        ("cbClsExtra", INT),
        ("cbWndExtra", INT),
        ("hInstance", HINSTANCE),
        ("hIcon", HICON),
        ("hCursor", HANDLE),
        ("hbrBackground", HBRUSH),
        ("lpszMenuName", LPCWSTR),
        ("lpszClassName", LPCWSTR),
    ]


class GUID(ctypes.Structure):
    _fields_ = [
        ("Data1", DWORD),
        ("Data2", WORD),
        ("Data3", WORD),
        ("Data4", BYTE * 8),
    ]


class NOTIFYICONDATAW(ctypes.Structure):
    _fields_ = [
        ("cbSize", DWORD),
        ("hWnd", HWND),
        ("uID", UINT),
        ("uFlags", UINT),
        ("uCallbackMessage", UINT),
        ("hIcon", HICON),
        ("szTip", WCHAR * 128),
        ("dwState", DWORD),
        ("dwStateMask", DWORD),
        ("szInfo", WCHAR * 256),
        ("uVersion", UINT),  # a union with uTimeout
        ("szInfoTitle", WCHAR * 64),
        ("dwInfoFlags", DWORD),
        ("guidItem", GUID),
        ("hBalloonIcon", HICON),
    ]


# What each function returns, and what it takes.
PROTOTYPES: dict[str, dict[str, tuple[Any, ...]]] = {
    "kernel32": {
        "CreateMutexW": (HANDLE, LPVOID, BOOL, LPCWSTR),
        "GetModuleHandleW": (HMODULE, LPCWSTR),
        "GlobalAlloc": (HGLOBAL, UINT, SIZE_T),
        "GlobalFree": (HGLOBAL, HGLOBAL),
        "GlobalLock": (LPVOID, HGLOBAL),
        "GlobalUnlock": (BOOL, HGLOBAL),
        "OpenProcess": (HANDLE, DWORD, BOOL, DWORD),
        "TerminateProcess": (BOOL, HANDLE, UINT),
        "WaitForSingleObject": (DWORD, HANDLE, DWORD),
    },
    "shell32": {
        "Shell_NotifyIconW": (BOOL, DWORD, POINTER(NOTIFYICONDATAW)),
    },
    "user32": {
        "AppendMenuW": (BOOL, HMENU, UINT, UINT_PTR, LPCWSTR),
        "ChangeWindowMessageFilterEx": (BOOL, HWND, UINT, DWORD, LPVOID),
        "CloseClipboard": (BOOL,),
        "CreatePopupMenu": (HMENU,),
        "CreateWindowExW": (
            HWND, DWORD, LPCWSTR, LPCWSTR, DWORD, INT, INT, INT, INT, HWND, HMENU, HINSTANCE,
            LPVOID,
        ),
        "DefWindowProcW": (LRESULT, HWND, UINT, WPARAM, LPARAM),
        "DestroyIcon": (BOOL, HICON),
        "DestroyMenu": (BOOL, HMENU),
        "DestroyWindow": (BOOL, HWND),
        "DispatchMessageW": (LRESULT, POINTER(MSG)),
        "EmptyClipboard": (BOOL,),
        "EndMenu": (BOOL,),
        "FindWindowW": (HWND, LPCWSTR, LPCWSTR),
        "GetDpiForWindow": (UINT, HWND),
        "GetMessageW": (BOOL, POINTER(MSG), HWND, UINT, UINT),
        "GetSystemMetrics": (INT, INT),
        "GetSystemMetricsForDpi": (INT, INT, UINT),
        "GetWindowThreadProcessId": (DWORD, HWND, POINTER(DWORD)),
        "KillTimer": (BOOL, HWND, UINT_PTR),
        "LoadIconW": (HICON, HINSTANCE, LPVOID),  # MAKEINTRESOURCEW is no text
        "LoadImageW": (HANDLE, HINSTANCE, LPCWSTR, UINT, INT, INT, UINT),
        "MessageBoxW": (INT, HWND, LPCWSTR, LPCWSTR, UINT),
        "OpenClipboard": (BOOL, HWND),
        "PostMessageW": (BOOL, HWND, UINT, WPARAM, LPARAM),
        "PostQuitMessage": (None, INT),
        "RegisterClassW": (ATOM, POINTER(WNDCLASSW)),
        "RegisterWindowMessageW": (UINT, LPCWSTR),
        "SendMessageTimeoutW": (
            LRESULT, HWND, UINT, WPARAM, LPARAM, UINT, UINT, POINTER(DWORD_PTR),
        ),
        "SetClipboardData": (HANDLE, UINT, HANDLE),
        "SetForegroundWindow": (BOOL, HWND),
        "SetProcessDpiAwarenessContext": (BOOL, HANDLE),
        "SetTimer": (UINT_PTR, HWND, UINT_PTR, UINT, LPVOID),
        "TrackPopupMenu": (BOOL, HMENU, UINT, INT, INT, INT, HWND, LPVOID),
    },
}  # fmt: skip


class Win32:
    """The functions above, by their names."""

    def __init__(self) -> None:
        for library, functions in PROTOTYPES.items():
            dll = ctypes.WinDLL(library, use_last_error=True)
            for name, (restype, *argtypes) in functions.items():
                function = getattr(dll, name)
                function.restype, function.argtypes = restype, argtypes
                setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:  # for the type checker
        raise AttributeError(name)


def last_error() -> OSError:
    return ctypes.WinError(ctypes.get_last_error())


# ---------------------------------------------------------------------------------------- Work


class LogFile(logging.handlers.RotatingFileHandler):
    """1 MiB, and the one before it. A program that holds the file open keeps it from being renamed:
    it is written on to then, for what is signed must be on record."""

    def __init__(self) -> None:
        folder = log_folder()
        os.makedirs(folder, exist_ok=True)
        super().__init__(
            os.path.join(folder, "tray.log"),
            maxBytes=1 << 20,
            backupCount=1,
            encoding="utf-8",
            errors="backslashreplace",
        )
        self.setFormatter(proxy.OneLine())

    def doRollover(self) -> None:
        if self.stream:
            self.stream.close()
        self.stream = None  # what can't be opened now is tried again
        with contextlib.suppress(OSError):
            os.replace(self.baseFilename, f"{self.baseFilename}.1")
        self.stream = self._open()


def start_log() -> None:
    """No server runs without it; OSError or ConfigError."""
    if not LOG.handlers:
        proxy.start_log(logging.INFO, LogFile())


def reason(e: Exception) -> str:
    """Why something can't be done, in a line; what was not thought of goes into the log, whole."""
    if isinstance(e, proxy.ProxyError):
        return str(e)
    if isinstance(e, OSError):
        return e.strerror or str(e)
    LOG.error("internal error", exc_info=e)
    return f"internal error: {type(e).__name__} (see the log)"


def run_server(env: Mapping[str, str], signals: socket.socket,
               ready: Callable[[Sequence[str]], None], patience: float) -> str:  # fmt: skip
    """Serves until SIGNALS has a byte; READY is told where, once it does. Returns why it ended, ""
    where it was asked to."""
    deadline = time.monotonic() + patience
    try:
        start_log()
        config = proxy.Config.from_env(env, (), proxy.COMMANDS)
        while True:
            try:
                proxy.serve(config, signals, ready, DRAIN_SECONDS)
                return ""
            except (proxy.ProxyError, OSError):
                # The port is ours alone, which Windows grants once all that was accepted there is
                # over ("Using SO_REUSEADDR and SO_EXCLUSIVEADDRUSE").
                if time.monotonic() > deadline or select.select([signals], [], [], 0.25)[0]:
                    raise
    except Exception as e:  # noqa: BLE001  reason() logs it
        why = reason(e)
        LOG.error("not running: %s", why)
        return why


def public_key(env: Mapping[str, str]) -> tuple[str, str]:
    """What GET /publickey answers, and the key's fingerprint; ProxyError."""
    config = proxy.Config.from_env(env, (), proxy.COMMANDS)
    agents = proxy.Agents(config.upstream, config.sockets, config.timeout)
    with agents.exchange() as exchange:
        listed = proxy.choose(proxy.list_keys(exchange), config.pinned())
    line = f"{listed.key.line} {proxy.printable(listed.comment)}".rstrip()
    return line, listed.key.fingerprint


# ---------------------------------------------------------------------------------------- Tray

WINDOW_CLASS = f"{NAME} tray"  # what an installer, and a second start, look for
MUTEX = rf"Local\{WINDOW_CLASS}"  # of this session
WM_CALL = WM_APP + 1  # something for the thread of the window to do
WM_ICON = WM_APP + 2  # from the icon
ICON_TIMER, END_TIMER = 1, 2
ICON_SECONDS = 5  # between tries to show it

# What a second start sends to the window of the first, and the answers.
HELLO = f"{NAME}: hello"
SHOWN, NOT_SHOWN, ENDING = 1, 2, 3


class Tray:
    """The icon and what it does. All of it runs in the thread of its window, which never waits:
    what takes time runs in threads of their own, and calls back by later()."""

    def __init__(self, win32: Win32) -> None:
        self.win32 = win32
        self.state = State()
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.server: Optional[threading.Thread] = None
        self.stopper: Optional[socket.socket] = None  # a byte to it ends the server
        self.copying = False
        self.stopping = False  # has it been asked to end?
        self.restarting = False  # and is it to begin anew then?
        self.shown = False  # is the icon there?
        self.missed = False  # and is that on record?
        self.hicon = None
        self.taskbar_created = win32.RegisterWindowMessageW("TaskbarCreated")
        self.hello = win32.RegisterWindowMessageW(HELLO)
        self.window_class = WNDCLASSW(lpszClassName=WINDOW_CLASS)  # as long as the window is there
        self.window_class.lpfnWndProc = WNDPROC(self.window_procedure)
        self.window_class.hInstance = win32.GetModuleHandleW(None)
        if not win32.RegisterClassW(ctypes.byref(self.window_class)):
            raise last_error()
        # Not under HWND_MESSAGE: those windows are told neither TaskbarCreated nor of a logoff.
        instance = self.window_class.hInstance
        self.hwnd = win32.CreateWindowExW(
            0, WINDOW_CLASS, NAME, 0, 0, 0, 0, 0, None, None, instance, None
        )
        if not self.hwnd:
            raise last_error()
        # Else Explorer's broadcast would not reach a tray that runs elevated.
        win32.ChangeWindowMessageFilterEx(self.hwnd, self.taskbar_created, MSGFLT_ALLOW, None)

    def begin(self) -> None:
        with contextlib.suppress(proxy.ProxyError, OSError):  # which start() tells
            start_log()
        self.show_icon()
        try:
            if first_run():
                self.balloon("It runs behind this icon: a click on it shows what can be set.")
        except Exception as e:  # noqa: BLE001  reason() logs it
            self.complain("Start at login can't be set", reason(e))
        self.start()

    def run(self) -> None:
        """Until the window is gone."""
        message = MSG()
        while self.win32.GetMessageW(ctypes.byref(message), None, 0, 0) > 0:
            self.win32.DispatchMessageW(ctypes.byref(message))

    def later(self, what: Callable[[], None]) -> None:
        """Has the thread of the window do it, once it waits for messages; called from any."""
        self.calls.put(what)
        self.win32.PostMessageW(self.hwnd, WM_CALL, 0, 0)

    # -- messages

    def window_procedure(self, hwnd: int, message: int, wparam: int, lparam: int) -> int:
        try:
            answer = self.handle(message, wparam, lparam)
        except Exception:  # an icon that does nothing is better than none
            LOG.exception("internal error")
            answer = None
        if answer is None:
            return int(self.win32.DefWindowProcW(hwnd, message, wparam, lparam))
        return answer

    def handle(self, message: int, wparam: int, lparam: int) -> Optional[int]:
        """The answer to a message, None where Windows' own is right. (Sleep needs none: a listening
        socket outlives it, and each request opens its agent's pipe anew.)"""
        if message == WM_CALL:
            self.calls.get_nowait()()
        elif message == WM_ICON:
            # NOTIFYICON_VERSION_4: the event in the low word, the place in WPARAM.
            if lparam & 0xFFFF in (WM_CONTEXTMENU, NIN_SELECT, NIN_KEYSELECT):
                x, y = (ctypes.c_short(wparam >> shift & 0xFFFF).value for shift in (0, 16))
                # Not now: it may have come while one of our own calls waits for Explorer.
                self.later(lambda: self.show_menu(x, y))
        elif message == WM_TIMER:
            if wparam == END_TIMER:
                self.win32.DestroyWindow(self.hwnd)
            else:
                self.show_icon()
        elif message == self.taskbar_created:
            # Explorer has begun anew, or the main display has another resolution.
            self.shown = False
            self.show_icon()
        elif message == self.hello:
            return self.say_hello()
        elif message == WM_QUERYENDSESSION:
            return 1  # what is asked is whether we mind: another program may
        elif message == WM_ENDSESSION:
            if wparam:
                self.end_session()
        elif message == WM_CLOSE:
            self.end()
        elif message == WM_DESTROY:
            self.win32.Shell_NotifyIconW(NIM_DELETE, ctypes.byref(self.notification()))
            self.win32.PostQuitMessage(0)
        else:
            return None
        return 0

    # -- the icon

    def notification(self, flags: int = 0) -> NOTIFYICONDATAW:
        data = NOTIFYICONDATAW(
            hWnd=self.hwnd, uID=1, uFlags=flags, uCallbackMessage=WM_ICON, hIcon=self.hicon
        )
        data.cbSize = ctypes.sizeof(data)
        data.uVersion = NOTIFYICON_VERSION_4
        data.szTip = fitting(tooltip(self.state), 128)
        return data

    def load_icon(self) -> Any:
        """In the size that this display's resolution has it."""
        win32 = self.win32
        dpi = win32.GetDpiForWindow(self.hwnd)
        size = [win32.GetSystemMetricsForDpi(side, dpi) for side in (SM_CXSMICON, SM_CYSMICON)]
        path = os.path.join(HERE, f"{NAME}.ico")
        icon = win32.LoadImageW(None, path, IMAGE_ICON, *size, LR_LOADFROMFILE)
        return icon or win32.LoadIconW(None, IDI_APPLICATION)

    def show_icon(self) -> None:
        """Where there is no taskbar (yet), it is tried again: Explorer may still be starting."""
        if self.shown:
            return
        call, old, self.hicon = self.win32.Shell_NotifyIconW, self.hicon, self.load_icon()
        data = self.notification(NIF_MESSAGE | NIF_ICON | NIF_TIP | NIF_SHOWTIP)
        # One that Explorer was too busy to confirm is there all the same.
        self.shown = bool(call(NIM_ADD, ctypes.byref(data)) or call(NIM_MODIFY, ctypes.byref(data)))
        if self.shown:
            call(NIM_SETVERSION, ctypes.byref(data))
            self.win32.KillTimer(self.hwnd, ICON_TIMER)
        else:
            if not self.missed:
                LOG.warning("no icon: there is no taskbar to show it in (yet)")
            self.missed = True
            self.win32.SetTimer(self.hwnd, ICON_TIMER, ICON_SECONDS * 1000, None)
        if old:
            self.win32.DestroyIcon(old)

    def update(self) -> None:
        data = self.notification(NIF_ICON | NIF_TIP | NIF_SHOWTIP)
        self.win32.Shell_NotifyIconW(NIM_MODIFY, ctypes.byref(data))

    def balloon(self, text: str, flag: int = NIIF_INFO) -> bool:
        """False where it can't be shown."""
        data = self.notification(NIF_INFO | NIF_SHOWTIP)
        data.szInfo = fitting(text, 256)
        data.szInfoTitle = NAME
        data.dwInfoFlags = flag | NIIF_RESPECT_QUIET_TIME
        return self.shown and bool(self.win32.Shell_NotifyIconW(NIM_MODIFY, ctypes.byref(data)))

    def complain(self, what: str, why: object) -> None:
        LOG.warning("%s: %s", what, why)
        self.balloon(f"{what}: {why}", NIIF_ERROR)

    def say_hello(self) -> int:
        if self.state.ending:
            return ENDING
        where = ", ".join(self.state.listening)
        text = self.state.trouble and f"It runs, and can't serve: {self.state.trouble}"
        return SHOWN if self.balloon(text or f"It is running already. {where}") else NOT_SHOWN

    # -- the server

    def choice(self) -> tuple[str, str]:
        return choose_address(os.environ, read_value(OURS, LISTEN_ON))

    def become(self, state: State) -> None:
        self.state = state
        self.update()

    def start(self, patience: float = 0) -> None:
        try:
            self.start_server(patience)
        except Exception as e:  # noqa: BLE001  reason() logs it
            why = reason(e)
            LOG.error("not running: %s", why)
            self.not_running(why)

    def start_server(self, patience: float) -> None:
        choice = self.choice()[0]
        if choice == HERE_ONLY and read_value(OURS, LISTEN_ON) == EVERYWHERE:
            LOG.warning("listening for this computer alone: %s is no longer set", TOKEN_FILE)
        env = environment(choice)
        signals, self.stopper = socket.socketpair()
        self.stopping = self.restarting = False

        def serve() -> None:
            with signals:
                why = run_server(env, signals, ready, patience)
            self.later(lambda: self.server_ended(why))

        def ready(names: Sequence[str]) -> None:
            self.later(lambda: self.server_listens(names))

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        self.server = server
        self.become(State())

    def stop(self) -> None:
        """Asks the server to finish; once, for a second byte would cut off what it is finishing."""
        if self.stopper and not self.stopping:
            self.stopping = True
            with contextlib.suppress(OSError):  # it has ended by itself
                self.stopper.send(b"x")

    def server_listens(self, names: Sequence[str]) -> None:
        if not self.stopping:  # it was asked to end before it listened
            self.become(State(tuple(names)))

    def server_ended(self, why: str) -> None:
        if self.stopper:
            self.stopper.close()
        self.server = self.stopper = None
        if self.state.ending:
            self.win32.DestroyWindow(self.hwnd)
        elif self.restarting:
            self.start(AGAIN_SECONDS)
        else:
            self.not_running(why or "it has ended")

    def not_running(self, why: str) -> None:
        self.become(State(trouble=why))
        self.balloon(f"Nothing can be signed: {why}", NIIF_ERROR)

    def end(self) -> None:
        if self.state.ending:
            return
        self.stop()
        self.become(State(ending=True))
        self.win32.EndMenu()
        # Without a server at once, and with one that hangs in the end too.
        patience = int(END_SECONDS * 1000) if self.server else 0
        self.win32.SetTimer(self.hwnd, END_TIMER, patience, None)

    def end_session(self) -> None:
        """Here alone it is waited: when this returns, the process may be gone."""
        server = self.server
        self.end()
        if server:
            server.join(END_SECONDS)
        self.win32.DestroyWindow(self.hwnd)

    # -- the menu

    def show_menu(self, x: int, y: int) -> None:
        win32 = self.win32
        items = menu_items(self.state, read_login(), *self.choice(), self.copying)
        actions = [""]  # by the numbers that Windows gives back; 0 is none
        menu = self.make_menu(items, actions)
        aligned = TPM_RIGHTALIGN if win32.GetSystemMetrics(SM_MENUDROPALIGNMENT) else 0
        flags = aligned | TPM_RIGHTBUTTON | TPM_NONOTIFY | TPM_RETURNCMD
        # Without this, and the message behind it, the menu would stay at a click elsewhere
        # ("TrackPopupMenu function", Remarks).
        win32.SetForegroundWindow(self.hwnd)
        chosen = win32.TrackPopupMenu(menu, flags, x, y, 0, self.hwnd, None)
        win32.PostMessageW(self.hwnd, WM_NULL, 0, 0)
        win32.DestroyMenu(menu)
        if chosen:
            self.act(actions[chosen])
        else:
            win32.Shell_NotifyIconW(NIM_SETFOCUS, ctypes.byref(self.notification()))

    def make_menu(self, items: Sequence[Item], actions: list[str]) -> Any:
        menu = self.win32.CreatePopupMenu()
        for item in items:
            flags, number = MF_STRING, 0
            if item is SEPARATOR:
                flags = MF_SEPARATOR
            elif item.items:
                flags, number = MF_POPUP, self.make_menu(item.items, actions)
            elif item.action:
                number = len(actions)
                actions.append(item.action)
            else:
                flags = MF_GRAYED
            if item.ticked:
                flags |= MF_CHECKED
            self.win32.AppendMenuW(menu, flags, number, item.label)
        return menu

    def act(self, action: str) -> None:
        if action in ADDRESSES:
            self.listen_on(action)
        elif action == "login":
            self.toggle_login()
        elif action == "copy":
            self.fetch_key()
        elif action == "log":
            self.open_log()
        elif action == "exit":
            self.end()

    def toggle_login(self) -> None:
        try:
            start_at_login(not read_login().on)
        except OSError as e:
            self.complain("Start at login can't be changed", reason(e))

    def listen_on(self, choice: str) -> None:
        """From now on; choosing what is chosen already tries again what failed."""
        try:
            write_value(OURS, LISTEN_ON, choice)
        except OSError as e:
            self.complain("the choice can't be kept", reason(e))
        if self.server:
            self.restarting = True
            self.stop()
        else:
            self.start()

    def fetch_key(self) -> None:
        env = environment(self.choice()[0])

        def work() -> None:
            try:
                line, about = public_key(env)
            except Exception as e:  # noqa: BLE001  reason() logs it
                line, about = "", reason(e)
            self.later(lambda: self.key_fetched(line, about))

        threading.Thread(target=work, daemon=True).start()
        self.copying = True

    def key_fetched(self, line: str, about: str) -> None:
        """LINE, and the key's fingerprint; or "", and why there is none."""
        self.copying = False
        try:
            if not line:
                raise proxy.ProxyError(about)
            self.copy(line + "\r\n")
        except (proxy.ProxyError, OSError) as e:
            self.complain("No public key was copied", reason(e))
        else:
            self.balloon(f"The public key was copied: {about}")

    def copy(self, text: str) -> None:
        """Onto the clipboard; OSError."""
        win32, data = self.win32, text.encode("utf-16-le") + b"\0\0"
        for _ in range(10):  # another program has it open, which none does for long
            if win32.OpenClipboard(self.hwnd):
                break
            time.sleep(0.02)
        else:
            raise last_error()
        try:
            win32.EmptyClipboard()
            memory = win32.GlobalAlloc(GMEM_MOVEABLE, len(data))
            if not memory:
                raise last_error()
            ctypes.memmove(win32.GlobalLock(memory), data, len(data))
            win32.GlobalUnlock(memory)
            if not win32.SetClipboardData(CF_UNICODETEXT, memory):
                error = last_error()
                win32.GlobalFree(memory)  # else it is the system's
                raise error
        finally:
            win32.CloseClipboard()

    def open_log(self) -> None:
        """In Notepad, by its path: what opens a file by its kind would bring the code of other
        programs into this process."""
        windows = os.environ.get("SYSTEMROOT", r"C:\Windows")
        notepad = os.path.join(windows, "System32", "notepad.exe")
        try:
            subprocess.Popen((notepad, os.path.join(log_folder(), "tray.log")))
        except (proxy.ProxyError, OSError) as e:
            self.complain("Notepad can't show the log", reason(e))


# --------------------------------------------------------------------------------------- Start


def alone(win32: Win32, mutex: Any) -> bool:
    """Whether no other one runs in this session, after a moment's wait for its end. MUTEX is ours
    then, as long as this process is there."""
    if mutex:
        return win32.WaitForSingleObject(mutex, 100) in (WAIT_OBJECT_0, WAIT_ABANDONED)
    # It can't be had: it is an elevated tray's or another user's; or another program has made
    # something else of that name, an event, say. The window alone tells.
    time.sleep(0.1)
    return not win32.FindWindowW(WINDOW_CLASS, None)


def is_first(win32: Win32) -> bool:
    """Whether no other one runs in this session; where one does, that is said. One that is about to
    end is waited for."""
    mutex = win32.CreateMutexW(None, False, MUTEX)
    hello = win32.RegisterWindowMessageW(HELLO)
    deadline = time.monotonic() + 2 * END_SECONDS  # Explorer may be slow to take its icon away
    while time.monotonic() < deadline:
        if alone(win32, mutex):
            return True
        answer = DWORD_PTR()
        first = win32.FindWindowW(WINDOW_CLASS, None)
        if first:
            timeout = 2000
            win32.SendMessageTimeoutW(
                first, hello, 0, 0, SMTO_ABORTIFHUNG, timeout, ctypes.byref(answer)
            )
            if answer.value == SHOWN:
                return False
            if answer.value == NOT_SHOWN:
                break
    box = MB_OK | MB_ICONINFORMATION | MB_SETFOREGROUND
    win32.MessageBoxW(None, "It is running already.", NAME, box)
    return False


def end_running(win32: Win32) -> None:
    """Ends the tray of this session, if one runs or is about to: as at logoff, else by force. While
    this process is there, no other one begins."""
    mutex, process = win32.CreateMutexW(None, False, MUTEX), None
    deadline = time.monotonic() + 2 * END_SECONDS
    while not alone(win32, mutex):
        window = win32.FindWindowW(WINDOW_CLASS, None)
        if window and not process:
            pid = DWORD()
            win32.GetWindowThreadProcessId(window, ctypes.byref(pid))
            process = win32.OpenProcess(SYNCHRONIZE | PROCESS_TERMINATE, False, pid)
            win32.PostMessageW(window, WM_CLOSE, 0, 0)
        if time.monotonic() > deadline:
            if process:
                win32.TerminateProcess(process, 1)
            break
    if process:  # which has its log open until it is gone
        win32.WaitForSingleObject(process, 2000)


def remove(win32: Win32) -> int:
    """Ends it, and takes away what it has written; a file that is not its own stays."""
    end_running(win32)
    try:
        remove_settings()
        for name in ("tray.log", "tray.log.1"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(log_folder(), name))
        with contextlib.suppress(FileNotFoundError):
            if not os.listdir(log_folder()):
                os.rmdir(log_folder())
    except (proxy.ProxyError, OSError):
        return 1
    return 0


def main(argv: Sequence[str]) -> int:
    """ARGV without the program's name."""
    win32 = Win32()
    if list(argv) == ["--remove"]:
        return remove(win32)
    # Refused where the program's manifest says it already, which is as good.
    win32.SetProcessDpiAwarenessContext(DPI_AWARENESS_CONTEXT_PER_MONITOR_AWARE_V2)
    try:
        if argv:
            raise proxy.ConfigError("it takes no options; SSH_AGENT_PROXY_* variables set it")
        if not is_first(win32):
            return 0
        tray = Tray(win32)
        tray.begin()
        tray.run()
    except Exception as e:  # noqa: BLE001  reason() logs it
        box = MB_OK | MB_ICONERROR | MB_SETFOREGROUND
        win32.MessageBoxW(None, f"cannot run: {reason(e)}", NAME, box)
        return proxy.failure(e)[0]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
