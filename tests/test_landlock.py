"""Landlock: what code that runs inside the proxy can still do, and could do without it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import importlib
import json
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple
from unittest import mock

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
    parse_answer,
    rows,
    run,
)

import ssh_agent_proxy as p

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux's")

# ---------------------------------------------------------------- the proxy, with a hook in it

# GET /shim reads shim.sh in a worker thread. Instead it does here what a file says, which names
# functions of this module, and answers what came of them.
INSIDE = f"""\
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import test_landlock
sys.exit(test_landlock.inside(sys.argv[1], sys.argv[2], sys.argv[4:]))
"""


class Place(NamedTuple):
    """Where something is attempted, and what outside of the process stands ready for it."""

    folder: str  # holds a file "old", an empty folder "empty", a program "program"
    pid: int  # of a process outside
    tcp4: int  # the ports of listening sockets
    tcp6: int
    abstract: str  # the names of a stream socket and a datagram socket, without their NUL
    stream: str  # the paths of such sockets
    datagram: str


def perform(plan: str) -> bytes:
    """For each [function's name, place] in the file PLAN: "" once it is done, else why not."""
    with open(plan, encoding="utf-8") as f:
        steps = json.load(f)
    results = []
    for name, place in steps:
        try:
            globals()[name](Place(*place))
            results.append("")
        except Exception as e:  # noqa: BLE001  the test is to see it
            number = e.errno if isinstance(e, OSError) else None
            results.append(errno.errorcode.get(number or 0, "") or f"{type(e).__name__}: {e}")
    return json.dumps(results).encode()


def inside(mode: str, folder: str, argv: List[str]) -> int:
    """The proxy in the process of its own: as it is ("with"), or without Landlock ("without")."""
    os.chdir(f"{folder}/cwd")
    plan, own_plan = f"{folder}/plan", f"{folder}/plan.threads"
    confine, stop, findings = p.confine, p.Server.stop, p.agent_findings

    def confined(folders: Sequence[str]) -> p.Step:
        # The log tells how many threads there are beforehand: they would stay free.
        p.LOG.info("threads before it: %d", len(os.listdir("/proc/self/task")))
        return confine(folders) if mode == "with" else p.Step("Landlock", False, "left out")

    def from_the_main_thread(server: p.Server) -> None:
        p.LOG.info("in the main thread: %s", perform(own_plan).decode())
        stop(server)

    def from_the_reporting_thread(*args: Any) -> Iterator[Any]:
        yield 20, f"in the reporting thread: {perform(own_plan).decode()}"
        yield from findings(*args)

    with contextlib.ExitStack() as replaced:
        for owner, name, instead in (
            (p, "confine", confined),
            (p, "read_shim", lambda: perform(plan)),
            (p.Server, "stop", from_the_main_thread),
            (p, "agent_findings", from_the_reporting_thread),
        ):
            replaced.enter_context(mock.patch.object(owner, name, instead))
        return p.main(argv)


# ---------------------------------------------------------------- attempts: files


def path(at: Place, name: str = "old") -> str:
    return f"{at.folder}/{name}"


def write(at: Place) -> None:
    with open(path(at), "r+b") as f:
        f.write(b"new")


def append(at: Place) -> None:
    with open(path(at), "ab") as f:
        f.write(b"new")


def overwrite(at: Place) -> None:
    with open(path(at), "wb") as f:
        f.write(b"new")


def open_for_writing(at: Place) -> None:
    os.close(os.open(path(at), os.O_WRONLY))


def reopen_for_writing(at: Place) -> None:
    with open(path(at), "rb") as f:
        os.close(os.open(f"/proc/self/fd/{f.fileno()}", os.O_WRONLY))


def truncate(at: Place) -> None:
    os.truncate(path(at), 0)


def truncate_while_reading(at: Place) -> None:
    os.close(os.open(path(at), os.O_RDONLY | os.O_TRUNC))


def create(at: Place) -> None:
    os.close(os.open(path(at, "new"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def create_while_reading(at: Place) -> None:
    os.close(os.open(path(at, "new-to-read"), os.O_RDONLY | os.O_CREAT, 0o600))


def create_nameless(at: Place) -> None:
    os.close(os.open(at.folder, os.O_WRONLY | os.O_TMPFILE, 0o600))


def create_at_home(at: Place) -> None:
    with open(os.path.expanduser("~/.profile"), "w", encoding="utf-8"):
        pass


def create_here(at: Place) -> None:
    with open("sitecustomize.py", "w", encoding="utf-8"):
        pass


def create_temporary(at: Place) -> None:
    number, _ = tempfile.mkstemp(dir=os.environ["TMPDIR"])
    os.close(number)


def create_in_shared_memory(at: Place) -> None:
    name = f"/dev/shm/{os.path.basename(os.path.dirname(at.folder))}.{os.getpid()}"
    with open(name, "xb"):
        os.unlink(name)


def write_to_dev_null(at: Place) -> None:
    with open(os.devnull, "wb") as f:
        f.write(b"x")


def write_to_proc(at: Place) -> None:
    with open("/proc/self/comm", "wb") as f:
        f.write(b"renamed")


def remove(at: Place) -> None:
    os.unlink(path(at))


def remove_folder(at: Place) -> None:
    os.rmdir(path(at, "empty"))


def rename(at: Place) -> None:
    os.rename(path(at), path(at, "renamed"))


def rename_folder(at: Place) -> None:
    os.rename(path(at, "empty"), path(at, "full"))


def replace(at: Place) -> None:
    os.replace(path(at), path(at, "program"))


def move(at: Place) -> None:
    os.rename(path(at), path(at, "empty/old"))


def link(at: Place) -> None:
    os.link(path(at), path(at, "linked"))


def link_elsewhere(at: Place) -> None:
    os.link(path(at), path(at, "empty/linked"))


def symlink(at: Place) -> None:
    os.symlink("old", path(at, "symbolic"))


def make_folder(at: Place) -> None:
    os.mkdir(path(at, "folder"))


def make_fifo(at: Place) -> None:
    os.mkfifo(path(at, "fifo"))


def make_file(at: Place) -> None:
    os.mknod(path(at, "made"))


def make_character_device(at: Place) -> None:
    os.mknod(path(at, "null"), 0o600 | 0o020000, os.makedev(1, 3))


def make_block_device(at: Place) -> None:
    os.mknod(path(at, "disk"), 0o600 | 0o060000, os.makedev(1, 0))


def make_socket(at: Place) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path(at, "socket"))


def command_a_device(at: Place) -> None:
    with open("/dev/urandom", "rb") as f:
        fcntl.ioctl(f, 0x80045200, bytes(4))  # RNDGETENTCNT: anyone may ask


# ---------------------------------------------------------------- attempts: programs


def in_a_child(do: Callable[[], Any]) -> None:
    """What would replace the process: in a copy of this thread, which is as confined as it is."""
    child = os.fork()
    if not child:
        try:
            do()
        except OSError as e:
            os._exit(e.errno or 255)
        finally:
            os._exit(255)
    status = os.waitpid(child, 0)[1]
    number = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 255
    if number:
        raise OSError(number, "in the child")


def execute(at: Place) -> None:
    in_a_child(lambda: os.execv("/bin/true", ["true"]))


def execute_own(at: Place) -> None:
    in_a_child(lambda: os.execv(path(at, "program"), ["program"]))


def execute_what_is_open(at: Place) -> None:
    with open("/bin/true", "rb") as f:
        in_a_child(lambda: os.execve(f.fileno(), ["true"], {}))


def execute_from_memory(at: Place) -> None:
    memory = os.memfd_create("program")
    with open("/bin/true", "rb") as f, open(memory, "wb") as m:
        m.write(f.read())
        m.flush()
        in_a_child(lambda: os.execve(memory, ["true"], {}))


def execute_by_the_loader(at: Place) -> None:
    """The program that runs programs which can only be read."""
    with open("/bin/true", "rb") as f:
        loader = re.search(rb"/lib[^\0]*/ld[^\0]*", f.read())
    assert loader
    in_a_child(lambda: os.execv(loader[0].decode(), ["ld.so", "/bin/true"]))


def spawn(at: Place) -> None:
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


def start_program(at: Place) -> None:
    subprocess.run(["/bin/true"], check=True)


def start_python(at: Place) -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


def start_shell(at: Place) -> None:
    status = os.system("exit 7")
    if os.WEXITSTATUS(status) != 7:
        raise PermissionError(errno.EACCES, f"status {status}")


# ---------------------------------------------------------------- attempts: TCP


def bind4(at: Place) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))


def bind6(at: Place) -> None:
    with socket.socket(socket.AF_INET6) as s:
        s.bind(("::1", 0))


def serve_tcp(at: Place) -> None:
    socket.create_server(("", 0)).close()


def connect4(at: Place) -> None:
    socket.create_connection(("127.0.0.1", at.tcp4), 5).close()


def connect6(at: Place) -> None:
    socket.create_connection(("::1", at.tcp6), 5).close()


def connect_mapped(at: Place) -> None:
    with socket.socket(socket.AF_INET6) as s:
        s.connect(("::ffff:127.0.0.1", at.tcp4))


def connect_without_waiting(at: Place) -> None:
    with socket.socket() as s:
        s.setblocking(False)
        number = s.connect_ex(("127.0.0.1", at.tcp4))
        if number not in (0, errno.EINPROGRESS):
            raise OSError(number, os.strerror(number))


# ---------------------------------------------------------------- attempts: other processes


def connect_abstract(at: Place) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(f"\0{at.abstract}.stream")


def send_abstract(at: Place) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(b"x", f"\0{at.abstract}.datagram")


def ask_for_signal(at: Place) -> None:
    os.kill(at.pid, 0)


def send_signal(at: Place) -> None:
    os.kill(at.pid, signal.SIGURG)  # which does nothing, unless it is waited for


def send_signal_to_group(at: Place) -> None:
    os.killpg(at.pid, signal.SIGURG)


def send_signal_by_descriptor(at: Place) -> None:
    pidfd_send_signal, pidfd_open = 424, 434
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.argtypes = [ctypes.c_long] * 5
    fd = libc.syscall(pidfd_open, at.pid, 0, 0, 0)
    if libc.syscall(pidfd_send_signal, fd, signal.SIGURG, 0, 0):
        raise OSError(ctypes.get_errno(), "")
    os.close(fd)


def kill_parent(at: Place) -> None:
    os.kill(os.getppid(), signal.SIGURG)


# ---------------------------------------------------------------- what is to go on


def read(at: Place) -> None:
    with open(path(at), "rb") as f:
        assert f.read()


def list_folder(at: Place) -> None:
    assert "old" in os.listdir(at.folder)


def read_about_itself(at: Place) -> None:
    with open("/proc/self/status", "rb") as f:
        assert f.read()


def connect_socket(at: Place) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(at.stream)


def send_datagram(at: Place) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(b"x", at.datagram)


def import_late(at: Place) -> None:
    name = next(n for n in ("wave", "mailbox", "plistlib", "netrc") if n not in sys.modules)
    importlib.import_module(name)


def signal_itself(at: Place) -> None:
    os.kill(os.getpid(), 0)


def pair_of_sockets(at: Place) -> None:
    for one in socket.socketpair():
        one.close()


REFUSED: List[Tuple[str, Callable[[Place], None]]] = [
    ("writing", write),
    ("appending", append),
    ("overwriting", overwrite),
    ("opening for writing", open_for_writing),
    ("opening what is open, for writing", reopen_for_writing),
    ("truncating by name", truncate),
    ("truncating while opened to read", truncate_while_reading),
    ("creating", create),
    ("creating while opened to read", create_while_reading),
    ("creating without a name", create_nameless),
    ("creating in the home", create_at_home),
    ("creating in the working directory", create_here),
    ("creating a temporary file", create_temporary),
    ("creating in shared memory", create_in_shared_memory),
    ("writing to /dev/null", write_to_dev_null),
    ("writing to /proc", write_to_proc),
    ("removing", remove),
    ("removing a folder", remove_folder),
    ("renaming", rename),
    ("renaming a folder", rename_folder),
    ("replacing", replace),
    ("moving", move),
    ("a link", link),
    ("a link in another folder", link_elsewhere),
    ("a symbolic link", symlink),
    ("a folder", make_folder),
    ("a FIFO", make_fifo),
    ("a file, by mknod", make_file),
    ("a character device", make_character_device),
    ("a block device", make_block_device),
    ("a socket", make_socket),
    ("a command to a device", command_a_device),
    ("a program", execute),
    ("a program in the home", execute_own),
    ("a program that is open", execute_what_is_open),
    ("a program in memory that needs the loader", execute_from_memory),
    ("a program, by the loader", execute_by_the_loader),
    ("a program, by posix_spawn", spawn),
    ("a program, by subprocess", start_program),
    ("Python", start_python),
    ("a shell", start_shell),
    ("a port on IPv4", bind4),
    ("a port on IPv6", bind6),
    ("a server", serve_tcp),
    ("a connection on IPv4", connect4),
    ("a connection on IPv6", connect6),
    ("a connection on IPv4 from IPv6", connect_mapped),
    ("a connection that is not waited for", connect_without_waiting),
    ("an abstract socket", connect_abstract),
    ("a datagram to an abstract socket", send_abstract),
    ("asking whether a process is there", ask_for_signal),
    ("a signal", send_signal),
    ("a signal to a group", send_signal_to_group),
    ("a signal by a descriptor", send_signal_by_descriptor),
    ("a signal to the parent", kill_parent),
]
GOES_ON: List[Tuple[str, Callable[[Place], None]]] = [
    ("reading a file", read),
    ("listing a folder", list_folder),
    ("reading about itself", read_about_itself),
    ("a socket in the file system", connect_socket),
    ("a datagram to one", send_datagram),
    ("importing a module", import_late),
    ("a signal to itself", signal_itself),
    ("a pair of sockets", pair_of_sockets),
]
# (What /proc shows of a process without PR_SET_DUMPABLE is root's.)
NEED_ROOT = [make_character_device, make_block_device, write_to_proc]
NEED_IPV6 = [bind6, connect6]

# ---------------------------------------------------------------- starting it


def landlock_abi() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def need_landlock(abi: int = 6) -> None:
    if landlock_abi() < abi:
        cannot_run(f"Landlock of ABI {abi} is needed: Linux 6.12, with landlock in its LSMs")


def listener(kind: int, family: int, address: Any) -> socket.socket:
    s = socket.socket(family, kind)
    s.bind(address)
    if kind == socket.SOCK_STREAM:
        s.listen(64)
    return s


class World:
    """The folder that all of it happens in, and what stands ready outside of the process."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sap.", dir="/tmp"))
        (self.folder / "home").mkdir()
        (self.folder / "cwd").mkdir()
        stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
        self.abstract = self.folder.name
        where = str(self.folder / "outside")
        tcp4 = listener(stream, socket.AF_INET, ("127.0.0.1", 0))
        self.sockets = [
            tcp4,
            listener(stream, socket.AF_UNIX, f"\0{self.abstract}.stream"),
            listener(datagram, socket.AF_UNIX, f"\0{self.abstract}.datagram"),
            listener(stream, socket.AF_UNIX, f"{where}.stream"),
            listener(datagram, socket.AF_UNIX, f"{where}.datagram"),
        ]
        tcp6 = 0
        try:
            self.sockets.append(listener(stream, socket.AF_INET6, ("::1", 0)))
            tcp6 = self.sockets[-1].getsockname()[1]
        except OSError:
            pass
        self.process = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
        )
        self.plan()
        self.plan(name="plan.threads")
        self.rest = (self.process.pid, tcp4.getsockname()[1], tcp6, self.abstract,
                     f"{where}.stream", f"{where}.datagram")  # fmt: skip

    def place(self, folder: str) -> List[Any]:
        """A folder below this one, with something in it to be harmed."""
        path = self.folder / folder
        if not (path / "old").exists():
            (path / "empty").mkdir(parents=True, exist_ok=True)
            (path / "old").write_text("old\n")
            (path / "program").write_text("#!/bin/sh\nexit 0\n")
            (path / "program").chmod(0o755)
        return [str(path), *self.rest]

    def plan(self, *steps: Tuple[Callable[[Place], None], str], name: str = "plan") -> None:
        plan = [[do.__name__, self.place(folder)] for do, folder in steps]
        (self.folder / name).write_text(json.dumps(plan))

    def close(self) -> None:
        for s in self.sockets:
            s.close()
        self.process.kill()
        self.process.communicate()
        run(["rm", "-rf", self.folder])


@pytest.fixture(scope="module")
def outside() -> Iterator[World]:
    """One for all that is only looked at."""
    outside = World()
    yield outside
    outside.close()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


# Without the powers of root, to which Landlock is given in another way.
POWERLESS = """\
import ctypes, os, sys
for capability in range(64):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
os.execv(sys.argv[1], sys.argv[1:])
"""


def command(world: World, mode: str = "with", powers: bool = True) -> str:
    """For start_proxy's PYTHON: the script and its arguments follow."""
    words = [sys.executable, "-c", INSIDE, mode, str(world.folder)]
    if not powers:
        words = [sys.executable, "-c", POWERLESS, *words]
    script = world.folder / f"start.{mode}.{powers}"
    script.write_text("#!/bin/sh\nexec " + shlex.join(words) + ' "$@"\n')
    script.chmod(0o755)
    return str(script)


def results(answer: Any) -> List[str]:
    assert answer.status == 200, answer.text
    found = json.loads(answer.body)
    assert isinstance(found, list)
    return found


def attempt(world: World, proxy: Proxy, do: Callable[[Place], None], folder: str) -> str:
    """What came of it in a worker thread: "" once it is done, else why not."""
    world.plan((do, folder))
    return results(http(proxy.port, "GET", "/shim"))[0]


ALL = [do for _, do in REFUSED + GOES_ON]


def snapshot(folder: Path) -> Dict[str, Tuple[int, int, int]]:
    """What there is, of which kind and size, and when it was last changed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name != "tmp" and path.parent.name != "tmp":
            seen = path.lstat()
            found[str(path)] = (seen.st_mode, seen.st_size, seen.st_mtime_ns)
    return found


def all_of_it(world: World, mode: str, powers: bool = True) -> Tuple[Dict[str, str], bool]:
    """What came of each attempt in a proxy of its own, and whether any file was touched."""
    label = f"{mode}.{powers}"
    env = clean_env(world.folder / "home")
    argv = [command(world, mode, powers), str(PROXY), "--addr", "127.0.0.1:0"]
    argv += ["--upstream", str(world.folder / "nowhere")]
    proxy = Proxy(argv, env)
    try:
        world.plan(*((do, f"{label}/{do.__name__}") for do in ALL))
        before = snapshot(world.folder)
        found = results(http(proxy.port, "GET", "/shim", seconds=60))
        touched = snapshot(world.folder) != before
    finally:
        assert proxy.stop() == 0, proxy.log()
    assert "Traceback" not in proxy.log()
    return dict(zip((do.__name__ for do in ALL), found)), touched


@pytest.fixture(scope="module")
def confined(outside: World) -> Tuple[Dict[str, str], bool]:
    need_landlock()
    return all_of_it(outside, "with")


@pytest.fixture(scope="module")
def powerless(outside: World) -> Tuple[Dict[str, str], bool]:
    need_landlock()
    return all_of_it(outside, "with", powers=False)


@pytest.fixture(scope="module")
def free(outside: World) -> Dict[str, str]:
    return all_of_it(outside, "without")[0]


def can_be_tried(do: Callable[[Place], None], outside: World) -> None:
    if do in NEED_ROOT and os.geteuid():
        cannot_run("only root makes devices, or writes to /proc there: run this as root")
    if do in NEED_IPV6 and not Place("", *outside.rest).tcp6:
        cannot_run("this machine has no [::1]: switch IPv6 on for lo")


# ---------------------------------------------------------------- inside, from a worker thread


@pytest.mark.parametrize("do", rows(REFUSED))
def test_code_inside_is_refused(
    do: Callable[[Place], None],
    confined: Tuple[Dict[str, str], bool],
    free: Dict[str, str],
    outside: World,
) -> None:
    can_be_tried(do, outside)
    assert free[do.__name__] == "", "not even without Landlock: this shows nothing"
    assert confined[0][do.__name__] in ("EACCES", "EPERM", "EXDEV")


@pytest.mark.parametrize("do", rows(REFUSED))
def test_code_inside_without_the_powers_of_root_is_refused(
    do: Callable[[Place], None], powerless: Tuple[Dict[str, str], bool], outside: World
) -> None:
    can_be_tried(do, outside)
    assert powerless[0][do.__name__] in ("EACCES", "EPERM", "EXDEV")


@pytest.mark.parametrize("do", rows(GOES_ON))
def test_what_the_proxy_needs_goes_on(
    do: Callable[[Place], None],
    confined: Tuple[Dict[str, str], bool],
    powerless: Tuple[Dict[str, str], bool],
) -> None:
    assert [confined[0][do.__name__], powerless[0][do.__name__]] == ["", ""]


def test_all_attempts_together_touched_no_file(
    confined: Tuple[Dict[str, str], bool], powerless: Tuple[Dict[str, str], bool]
) -> None:
    assert (confined[1], powerless[1]) == (False, False)


# ---------------------------------------------------------------- every thread, and what is served


@pytest.fixture
def start_inside(
    world: World, agent: Agent, keys: Keys, start_proxy: Callable[..., Proxy]
) -> Callable[..., Proxy]:
    """start_inside(mode="with", *args, **options): with the hook, in front of a real agent."""
    agent.add(keys["ed25519"])

    def start(*args: Any, mode: str = "with", **options: Any) -> Proxy:
        options.setdefault("upstream", agent.sock)
        return start_proxy(*args, python=command(world, mode), **options)

    return start


@pytest.mark.parametrize(
    ("mode", "expected"), [("with", "EACCES"), ("without", "")], ids=["with", "without"]
)
def test_each_thread_is_refused(
    mode: str, expected: str, world: World, start_inside: Callable[..., Proxy]
) -> None:
    need_landlock()
    world.plan((write, "own"))
    world.plan((write, "own"), name="plan.threads")
    proxy = start_inside(mode=mode)
    assert results(http(proxy.port, "GET", "/shim")) == [expected]
    proxy.wait_log(re.escape(f'in the reporting thread: ["{expected}"]'))
    assert proxy.stop() == 0
    assert f'in the main thread: ["{expected}"]' in proxy.log()


def test_no_thread_was_started_before_it(start_inside: Callable[..., Proxy]) -> None:
    # One that was would stay free.
    start_inside().wait_log(r"threads before it: 1$")


def test_confined_it_signs_and_keeps_its_records(
    start_inside: Callable[..., Proxy], keys: Keys, short: Path
) -> None:
    need_landlock()
    proxy = start_inside("-v")
    proxy.wait_log("Landlock: in force")
    answer = http(proxy.port, "POST", "/sign", b"x")
    assert answer.status == 200
    block = short / "x.sig"
    block.write_bytes(answer.body)
    argv = ["ssh-keygen", "-Y", "check-novalidate", "-n", "git", "-s", block]
    assert b"Good" in run(argv, input=b"x").stdout
    assert http(proxy.port, "GET", "/publickey").text == keys.line("ed25519") + "\n"
    proxy.wait_log(" AUDIT outcome=signed status=200 ")


def test_confined_it_reads_its_files_again(
    start_inside: Callable[..., Proxy], keys: Keys, short: Path
) -> None:
    need_landlock()
    tokens, pin = short / "tokens", short / "pin"
    tokens.touch(0o600)
    tokens.write_text("first\n")
    pin.write_text(keys.line("ed25519") + "\n")
    proxy = start_inside("--token-file", tokens, "--pubkey-file", pin)
    bearer = {"Authorization": "Bearer second"}
    assert http(proxy.port, "POST", "/sign", b"x", bearer).status == 401
    tokens.write_text("second\n")
    assert http(proxy.port, "POST", "/sign", b"x", bearer).status == 200
    pin.write_text(keys.line("other") + "\n")
    assert http(proxy.port, "POST", "/sign", b"x", bearer).status == 503


def test_confined_it_finds_an_agent_that_starts_later(
    start_inside: Callable[..., Proxy], start_agent: Callable[..., Agent], keys: Keys, short: Path
) -> None:
    need_landlock()
    proxy = start_inside(upstream=short / "later")
    assert http(proxy.port, "POST", "/sign", b"x").status == 503
    start_agent(short / "later").add(keys["ed25519"])
    assert http(proxy.port, "POST", "/sign", b"x").status == 200


def test_confined_it_serves_a_crowd(start_inside: Callable[..., Proxy]) -> None:
    need_landlock()
    proxy = start_inside()
    waiting = [socket.create_connection(("127.0.0.1", proxy.port), 10) for _ in range(50)]
    try:
        assert http(proxy.port, "POST", "/sign", b"x").status == 200
        assert len(os.listdir(f"/proc/{proxy.pid}/task")) > 50
    finally:
        for one in waiting:
            one.close()


# ---------------------------------------------------------------- addresses that are Unix sockets


def over_unix(path: Path, target: str) -> Any:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(10)
        s.connect(str(path))
        s.sendall(f"GET {target} HTTP/1.0\r\n\r\n".encode())
        answer = b""
        while True:
            piece = s.recv(65536)
            if not piece:
                return parse_answer(answer)
            answer += piece


def unix(*paths: Path) -> str:
    return ",".join(f"unix:{path}" for path in paths)


def test_without_tcp_the_socket_is_removed_at_the_end(
    world: World, start_inside: Callable[..., Proxy]
) -> None:
    need_landlock()
    world.place("own")
    path = world.folder / "own/s"
    world.plan((create, "own"))
    proxy = start_inside(addr=unix(path), wait=False)
    proxy.wait_log("listening on unix:")
    assert results(over_unix(path, "/shim")) == ["EACCES"]
    assert proxy.stop() == 0
    assert not path.exists()


def test_two_sockets_in_two_folders_are_removed_at_the_end(
    world: World, start_inside: Callable[..., Proxy]
) -> None:
    need_landlock()
    paths = [world.folder / name / "s" for name in ("one", "two")]
    world.place("one")
    world.place("two")
    proxy = start_inside(addr=f"{unix(*paths)},127.0.0.1:0")
    assert attempt(world, proxy, remove, "one") == ""
    assert attempt(world, proxy, remove, "two") == ""
    assert attempt(world, proxy, remove, "three") == "EACCES"
    assert proxy.stop() == 0
    assert [path.exists() for path in paths] == [False, False]


def test_a_socket_in_a_folder_given_by_a_link_is_removed_at_the_end(
    world: World, start_inside: Callable[..., Proxy]
) -> None:
    need_landlock()
    world.place("really/own")
    (world.folder / "link").symlink_to("really")
    proxy = start_inside(addr=f"{unix(world.folder / 'link/own/s')},127.0.0.1:0")
    assert (world.folder / "really/own/s").is_socket()
    assert attempt(world, proxy, remove, "really/own") == ""
    assert attempt(world, proxy, remove, "really") == "EACCES"
    assert proxy.stop() == 0
    assert not (world.folder / "really/own/s").exists()


def test_another_socket_in_its_place_stays(
    world: World, start_inside: Callable[..., Proxy]
) -> None:
    need_landlock()
    world.place("own")
    path = world.folder / "own/s"
    proxy = start_inside(addr=f"{unix(path)},127.0.0.1:0")
    path.unlink()
    with listener(socket.SOCK_STREAM, socket.AF_UNIX, str(path)):
        assert proxy.stop() == 0
        assert path.is_socket()


BESIDE_A_SOCKET = [
    ("removing a file", remove, "own", ""),
    ("removing a file below", remove, "own/below", ""),
    ("removing a file above", remove, ".", "EACCES"),
    ("removing a file in another folder", remove, "other", "EACCES"),
    ("creating a file", create, "own", "EACCES"),
    ("creating a file below", create, "own/below", "EACCES"),
    ("writing to a file", write, "own", "EACCES"),
    ("truncating a file", truncate, "own", "EACCES"),
    ("renaming a file", rename, "own", "EACCES"),
    ("replacing a file", replace, "own", "EACCES"),
    ("moving a file", move, "own", "EACCES"),
    ("a link", link, "own", "EACCES"),
    ("a folder", make_folder, "own", "EACCES"),
    ("a socket", make_socket, "own", "EACCES"),
    ("removing a folder", remove_folder, "own", "EACCES"),
    ("a program", execute_own, "own", "EACCES"),
]


def test_in_a_sockets_folder_files_can_be_removed_and_no_more(
    world: World, start_inside: Callable[..., Proxy]
) -> None:
    need_landlock()
    world.place("own")
    proxy = start_inside(addr=f"{unix(world.folder / 'own/s')},127.0.0.1:0")
    for name, do, folder, expected in reversed(BESIDE_A_SOCKET):  # the removals come last
        found = attempt(world, proxy, do, folder)
        assert found == expected or (expected and found == "EXDEV"), name


def test_without_a_socket_of_its_own_no_file_can_be_removed(
    world: World, start_inside: Callable[..., Proxy]
) -> None:
    need_landlock()
    proxy = start_inside()
    for folder in ("own", "home", "cwd"):
        assert attempt(world, proxy, remove, folder) == "EACCES"


# ---------------------------------------------------------------- where a program has to be run


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


def needs_a_program(setting: str, folder: Path, agent: Agent) -> Dict[str, str]:
    """The variables with which each signature starts one."""
    if setting == "SSH_AGENT_PROXY_UPSTREAM":
        words = [sys.executable, "-c", RELAY, str(agent.sock)]
        return {setting: f"exec:{shlex.join(words)}"}
    askpass = folder / "askpass"
    askpass.write_text("#!/bin/sh\necho yes\n")
    askpass.chmod(0o755)
    return {setting: str(askpass), "SSH_AGENT_PROXY_UPSTREAM": str(agent.sock)}


SETTINGS = ["SSH_AGENT_PROXY_UPSTREAM", "SSH_AGENT_PROXY_CONFIRM"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_where_a_program_has_to_be_run_it_is_run_and_the_log_tells_the_price(
    setting: str, world: World, agent: Agent, start_inside: Callable[..., Proxy]
) -> None:
    env = needs_a_program(setting, world.folder, agent)
    proxy = start_inside(upstream=None, env=env)
    assert http(proxy.port, "POST", "/sign", b"x").status == 200
    assert attempt(world, proxy, write, "own") == ""
    proxy.wait_log(rf" WARNING .*Landlock: not in force \({setting} .*\)$")


@pytest.mark.parametrize("setting", SETTINGS)
def test_where_a_program_has_to_be_run_check_tells_the_price(
    setting: str, world: World, agent: Agent, keys: Keys
) -> None:
    agent.add(keys["ed25519"])
    env = clean_env(world.folder / "home", **needs_a_program(setting, world.folder, agent))
    done = run([sys.executable, PROXY, "check", "--addr", "127.0.0.1:0"], env=env)
    lines = [line for line in done.stdout.decode().splitlines() if "Landlock" in line]
    assert len(lines) == 1
    assert re.fullmatch(rf"warn +Landlock: not in force \({setting} .*\)", lines[0])


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
# How long struct landlock_ruleset_attr is: what is longer has to end in zeros.
SIZES = {1: 8, 2: 8, 3: 8, 4: 16, 5: 16, 6: 24, 7: 24}


def bits(names: Dict[str, Tuple[int, int]], abi: int) -> int:
    return sum(1 << bit for bit, since in names.values() if since <= abi)


# Answers for the kernel which ABI it has; all else goes on to it, and is told.
OTHER_ABI = f"""\
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import test_landlock
test_landlock.under(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
"""


def under(abi: int, plan: str, folders: List[str]) -> None:
    """Prints what is asked of a kernel with that ABI, what confine() says, what came of PLAN."""
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
    print(json.dumps([asked, step, json.loads(perform(plan))]))


class Under(NamedTuple):
    asked: List[Any]  # number of the call, its arguments
    in_force: bool
    state: str
    refused: List[str]  # names of those attempts that were


BY_ABI: List[Tuple[Callable[[Place], None], int]] = [
    (write, 1), (create, 1), (remove, 1), (move, 1), (make_socket, 1), (execute, 1),
    (truncate, 3), (bind4, 4), (connect4, 4), (command_a_device, 5), (connect_abstract, 6),
    (send_signal, 6),
]  # fmt: skip
ABIS = [1, 2, 3, 4, 5, 6, 7, 99]


@pytest.fixture(scope="module")
def under_abi(outside: World) -> Callable[..., Under]:
    """under_abi(abi, *folders): each is tried once."""
    known: Dict[Any, Under] = {}

    def look(abi: int, *folders: Path) -> Under:
        need_landlock()
        if (abi, folders) not in known:
            outside.plan(*((do, f"under/{abi}/{do.__name__}") for do, _ in BY_ABI))
            argv = [sys.executable, "-c", OTHER_ABI, abi, outside.folder / "plan", *folders]
            asked, step, came = json.loads(run(argv).stdout)
            refused = [do.__name__ for (do, _), result in zip(BY_ABI, came) if result]
            known[abi, folders] = Under(asked, step[1], step[2], refused)
        return known[abi, folders]

    return look


@pytest.mark.parametrize("abi", ABIS)
def test_each_abi_is_asked_for_all_that_it_has(
    abi: int, under_abi: Callable[..., Under]
) -> None:
    number, (attributes, size, flags, _) = under_abi(abi).asked[0]
    attributes = bytes.fromhex(attributes)
    assert (number, flags or 0) == (444, 0)
    assert size == len(attributes)
    assert struct.unpack("=QQQ", attributes) == (
        bits(FILES, abi), bits(NETWORK, abi), bits(SCOPES, abi))  # fmt: skip
    assert not attributes[SIZES.get(abi, 24) :].strip(b"\0"), "E2BIG: that kernel knows no more"


@pytest.mark.parametrize("abi", ABIS)
def test_each_abi_refuses_what_it_can(abi: int, under_abi: Callable[..., Under]) -> None:
    found = under_abi(abi)
    assert found.in_force
    assert found.refused == [do.__name__ for do, since in BY_ABI if since <= abi]


@pytest.mark.parametrize("abi", ABIS)
def test_each_abi_is_named_with_what_it_covers(abi: int, under_abi: Callable[..., Under]) -> None:
    state = under_abi(abi).state
    assert f"ABI {abi}" in state
    assert "no program" in state
    assert ("no TCP" in state) == (abi >= 4)
    assert ("no signal" in state) == (abi >= 6)


@pytest.mark.parametrize("abi", [1, 2])
def test_where_files_can_be_truncated_nobody_says_that_none_is_written(
    abi: int, under_abi: Callable[..., Under]
) -> None:
    found = under_abi(abi)
    assert truncate.__name__ not in found.refused
    assert "truncate" in found.state or "no file written" not in found.state


def test_a_folders_rule_is_for_removing_files_alone(
    under_abi: Callable[..., Under], outside: World
) -> None:
    outside.place("ruled")
    asked = under_abi(7, outside.folder / "ruled").asked
    rules = [words for number, words in asked if number == 445]
    assert [struct.unpack("=Q", bytes.fromhex(words[2])[:8]) for words in rules] == [(1 << 5,)]
