"""Landlock: what code that runs inside the proxy can still do, and could do without it."""

import contextlib
import ctypes
import errno
import fcntl
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple
from unittest import mock

import pytest
from conftest import ROOT, Agent, Proxy, StartProxy, cannot_run, http, need, run

import ssh_agent_proxy as p

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux's")


@pytest.fixture(autouse=True)
def landlock() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1)) < 6:
        cannot_run("Landlock of ABI 6 is needed: Linux 6.12, with landlock in its LSMs")


# ---------------------------------------------------------------- what is attempted


class Place(NamedTuple):
    """Where something is attempted, and what outside of the process stands ready for it."""

    folder: str  # holds a file "old", an empty folder "empty"
    pid: int  # of a process outside
    tcp: int  # the port of a listening socket
    abstract: str  # the name of a socket, without its NUL
    socket: str  # the path of one in the file system

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"


Attempt = Callable[[Place], Any]
READ, WRITE, CREATE = os.O_RDONLY, os.O_WRONLY, os.O_CREAT


def opened(path: Any, flags: int) -> None:
    os.close(os.open(path, flags, 0o600))


def command_to_a_device() -> None:
    with open("/dev/urandom", "rb") as f:
        fcntl.ioctl(f, 0x80045200, bytes(4))  # RNDGETENTCNT: anyone may ask


def bind(family: int, address: Any) -> None:
    with socket.socket(family) as s:
        s.bind(address)


def connect(family: int, address: Any) -> None:
    with socket.socket(family) as s:
        s.settimeout(5)
        s.connect(address)


# (SIGURG does nothing, unless it is waited for.)
REFUSED: Dict[str, Attempt] = {
    "writing": lambda at: opened(at.path("old"), WRITE),
    "truncating": lambda at: os.truncate(at.path("old"), 0),
    "creating": lambda at: opened(at.path("new"), WRITE | CREATE),
    "removing": lambda at: os.unlink(at.path("old")),
    "removing a folder": lambda at: os.rmdir(at.path("empty")),
    "moving": lambda at: os.rename(at.path("old"), at.path("empty/old")),
    "a link": lambda at: os.link(at.path("old"), at.path("linked")),
    "a symbolic link": lambda at: os.symlink("old", at.path("symbolic")),
    "a folder": lambda at: os.mkdir(at.path("folder")),
    "a FIFO": lambda at: os.mkfifo(at.path("fifo")),
    "a socket": lambda at: bind(socket.AF_UNIX, at.path("socket")),
    "a command to a device": lambda at: command_to_a_device(),
    "a program": lambda at: subprocess.run(["/bin/true"], check=True),
    "a port": lambda at: bind(socket.AF_INET, ("127.0.0.1", 0)),
    "a connection": lambda at: connect(socket.AF_INET, ("127.0.0.1", at.tcp)),
    "an abstract socket": lambda at: connect(socket.AF_UNIX, f"\0{at.abstract}"),
    "a signal": lambda at: os.kill(at.pid, signal.SIGURG),
}
LATE = ("wave", "mailbox", "plistlib", "netrc")
GOES_ON: Dict[str, Attempt] = {
    "reading a file": lambda at: opened(at.path("old"), READ),
    "listing a folder": lambda at: os.listdir(at.folder),
    "a socket in the file system": lambda at: connect(socket.AF_UNIX, at.socket),
    "importing": lambda at: importlib.import_module(next(n for n in LATE if n not in sys.modules)),
    "a signal to itself": lambda at: os.kill(os.getpid(), 0),
}
ALL = {**REFUSED, **GOES_ON}


def perform(plan: str) -> bytes:
    """For each [attempt's name, place] in the file PLAN: "" once it is done, else why not."""
    with open(plan, encoding="utf-8") as f:
        steps = json.load(f)
    results = []
    for name, place in steps:
        try:
            ALL[name](Place(*place))
            results.append("")
        except Exception as e:  # noqa: BLE001  the test is to see it
            number = e.errno if isinstance(e, OSError) else None
            results.append(errno.errorcode.get(number or 0, "") or f"{type(e).__name__}: {e}")
    return json.dumps(results).encode()


# ---------------------------------------------------------------- the proxy, with a hook in it


def in_this_module(call: str) -> List[str]:
    """The command line of a Python that evaluates CALL, with what follows in `words`."""
    code = f"""\
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import test_landlock
words = sys.argv[1:]
sys.exit(test_landlock.{call})
"""
    return [sys.executable, "-c", code]


def inside(mode: str, folder: str, argv: List[str]) -> int:
    """The proxy; where MODE is "without", without Landlock.

    GET /shim reads shim.sh in a worker thread. Instead it does what the file "plan" says, and
    answers what came of it.
    """
    own_plan = f"{folder}/plan.threads"
    confine, stop, findings = p.confine, p.Server.stop, p.agent_findings

    def confined(folders: Sequence[str]) -> p.Step:
        # The log tells how many threads there are beforehand: they would stay free.
        p.LOG.info("threads before it: %d", len(os.listdir("/proc/self/task")))
        return p.Step("Landlock", False, "left out") if mode == "without" else confine(folders)

    def from_the_main_thread(server: p.Server) -> None:
        p.LOG.info("in the main thread: %s", perform(own_plan).decode())
        stop(server)

    def from_the_reporting_thread(*args: Any) -> Iterator[Any]:
        yield 20, f"in the reporting thread: {perform(own_plan).decode()}"
        yield from findings(*args)

    p.confine = confined
    p.read_shim = lambda: perform(f"{folder}/plan")
    p.Server.stop = from_the_main_thread  # type: ignore[method-assign]
    p.agent_findings = from_the_reporting_thread
    return p.main(argv)


class World:
    """The folder that all of it happens in, and the port of a socket outside of the process."""

    def __init__(self, folder: Path, tcp: int) -> None:
        self.folder = folder
        self.rest = (os.getpid(), tcp, folder.name, str(folder / "outside"))
        self.plan(name="plan.threads")

    def place(self, folder: str) -> List[Any]:
        """A folder below this one, with something in it to be harmed."""
        path = self.folder / folder
        (path / "empty").mkdir(parents=True, exist_ok=True)
        (path / "old").write_text("old\n")
        return [str(path), *self.rest]

    def plan(self, *steps: Tuple[str, str], name: str = "plan") -> None:
        """What is to be attempted next, and in which folder."""
        plan = [[attempt, self.place(folder)] for attempt, folder in steps]
        (self.folder / name).write_text(json.dumps(plan))

    def attempt(self, proxy: Proxy, *steps: Tuple[str, str]) -> List[str]:
        """What came of each in a worker thread: "" once it is done, else why not."""
        self.plan(*steps)
        found: List[str] = json.loads(http(proxy.port, "GET", "/shim", seconds=60).body)
        return found


@pytest.fixture
def world(short: Path) -> Iterator[World]:
    with socket.create_server(("127.0.0.1", 0)) as tcp, contextlib.ExitStack() as stack:
        for name in (f"\0{short.name}", str(short / "outside")):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(name)
            listener.listen()
        yield World(short, tcp.getsockname()[1])


@pytest.fixture
def start_inside(world: World, agent_with_key: Agent, start_proxy: StartProxy) -> StartProxy:
    """start_inside(mode="with", *args, **options): with the hook, in front of a real agent."""

    def start(*args: Any, mode: str = "with", **options: Any) -> Proxy:
        call = in_this_module("inside(words[0], words[1], words[3:])")
        python = [*call, mode, str(world.folder)]
        return start_proxy(*args, python=python, upstream=agent_with_key.sock, **options)

    return start


# ---------------------------------------------------------------- inside, from each thread


@pytest.mark.parametrize("mode, refused", [("with", REFUSED), ("without", {})])
def test_code_inside_is_refused_and_what_the_proxy_needs_goes_on(
    mode: str, refused: Dict[str, Attempt], world: World, start_inside: StartProxy
) -> None:
    came = world.attempt(start_inside(mode=mode), *((name, name) for name in ALL))
    assert [name for name, why in zip(ALL, came) if why] == list(refused), came
    assert set(came) <= {"", "EACCES", "EPERM", "EXDEV"}, came


def test_each_thread_is_refused(world: World, start_inside: StartProxy) -> None:
    world.plan(("writing", "own"), name="plan.threads")
    proxy = start_inside()
    # A thread that was started before would stay free.
    proxy.wait_log(r"threads before it: 1$")
    proxy.wait_log(r'in the reporting thread: \["EACCES"\]')
    assert proxy.stop() == 0
    assert 'in the main thread: ["EACCES"]' in proxy.log()


# ---------------------------------------------------------------- addresses that are Unix sockets


def test_in_the_folders_of_sockets_one_by_a_link_files_can_be_removed_and_no_more(
        world: World, start_inside: StartProxy) -> None:  # fmt: skip
    for folder in ("one", "really/own"):
        world.place(folder)
    (world.folder / "link").symlink_to("really")
    paths = [world.folder / "one/s", world.folder / "link/own/s"]
    proxy = start_inside(addr=f"unix:{paths[0]},unix:{paths[1]},127.0.0.1:0")
    assert (world.folder / "really/own/s").is_socket()
    refused = ["a program", "removing a folder", "a socket", "writing", "creating"]
    came = world.attempt(proxy, *((name, "really/own") for name in refused))
    assert came == ["EACCES"] * len(refused)
    folders = ["one", "really/own/below", "really/own", "really", "another"]
    came = world.attempt(proxy, *(("removing", folder) for folder in folders))
    assert came == ["", "", "", "EACCES", "EACCES"]
    assert proxy.stop() == 0
    assert [path.exists() for path in paths] == [False, False]


# ---------------------------------------------------------------- where a program has to be run

def test_where_a_program_has_to_be_run_the_price_is_told(
        world: World, start_inside: StartProxy) -> None:  # fmt: skip
    proxy = start_inside("--confirm", need("true", "coreutils"))
    assert http(proxy.port, "POST", "/sign", b"x").status == 200
    assert world.attempt(proxy, ("writing", "own")) == [""]
    proxy.wait_log(r" WARNING Landlock: not in force \(SSH_AGENT_PROXY_CONFIRM .*\)$")


# ---------------------------------------------------------------- older kernels, and younger ones

# linux/landlock.h: the bit of each right, and the ABI that brought it. What is read is not asked
# for (READ_FILE, READ_DIR: bits 2 and 3).
FILES = {
    "EXECUTE": (0, 1), "WRITE_FILE": (1, 1), "REMOVE_DIR": (4, 1), "REMOVE_FILE": (5, 1),
    "MAKE_CHAR": (6, 1), "MAKE_DIR": (7, 1), "MAKE_REG": (8, 1), "MAKE_SOCK": (9, 1),
    "MAKE_FIFO": (10, 1), "MAKE_BLOCK": (11, 1), "MAKE_SYM": (12, 1), "REFER": (13, 2),
    "TRUNCATE": (14, 3), "IOCTL_DEV": (15, 5),
}  # fmt: skip
NETWORK = {"BIND_TCP": (0, 4), "CONNECT_TCP": (1, 4)}
SCOPES = {"ABSTRACT_UNIX_SOCKET": (0, 6), "SIGNAL": (1, 6)}


def bits(names: Dict[str, Tuple[int, int]], abi: int) -> int:
    return sum(1 << bit for bit, since in names.values() if since <= abi)


def under(abi: int, folders: List[str]) -> None:
    """Prints what is asked of a kernel with that ABI, and what confine() says."""
    asked = []
    create_ruleset, version = 444, 1
    kernel = ctypes.CDLL(None, use_errno=True)

    def syscall(number: int, *words: Any) -> int:
        if number == create_ruleset and words[2] == version:
            return abi
        asked.append([number, [w.hex() if isinstance(w, bytes) else w for w in words]])
        kernel.syscall.argtypes = [ctypes.c_long, *4 * [ctypes.c_void_p]]
        return int(kernel.syscall(number, *words))

    libc = types.SimpleNamespace(syscall=syscall)
    kernel.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which harden() does
    with mock.patch.object(ctypes, "CDLL", lambda *args, **options: libc):
        step = p.confine(folders)
    print(json.dumps([asked, step]))


def asked_under(abi: int, *folders: Path) -> Any:
    argv = in_this_module("under(int(words[0]), words[1:])")
    return json.loads(run([*argv, abi, *folders]).stdout)


ABIS = [3, 6, *(pytest.param(abi, marks=pytest.mark.long) for abi in (1, 2, 4, 5, 7, 99))]


@pytest.mark.parametrize("abi", ABIS)
def test_each_abi_is_asked_for_all_that_it_has_and_is_named_with_it(abi: int) -> None:
    asked, (_, in_force, state, _) = asked_under(abi)
    number, (attributes, size, flags, _) = asked[0]
    attributes = bytes.fromhex(attributes)
    assert (number, size, flags or 0) == (444, len(attributes), 0)
    assert struct.unpack("=QQQ", attributes) == (
        bits(FILES, abi), bits(NETWORK, abi), bits(SCOPES, abi))  # fmt: skip
    known = 8 if abi < 4 else 16 if abi < 6 else 24
    assert not attributes[known:].strip(b"\0"), "E2BIG: that kernel knows no more"

    assert in_force
    assert f"ABI {abi}: no program file started" in state
    assert ("no file written" in state) == (abi >= 3)  # before that a file can be truncated
    assert ("no TCP" in state) == (abi >= 4)
    assert ("no signal" in state) == (abi >= 6)


def test_a_folders_rule_is_for_removing_files_alone(short: Path) -> None:
    asked, _ = asked_under(7, short)
    rules = [words for number, words in asked if number == 445]
    assert [struct.unpack("=Q", bytes.fromhex(words[2])[:8]) for words in rules] == [(1 << 5,)]
