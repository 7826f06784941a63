"""What the process has given up: read from the system, and tried from another process."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest
from conftest import PROXY, ROOT, Agent, Keys, Proxy, cannot_run, clean_env, http, run, wait_for

import ssh_agent_proxy as p

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")

UNLIMITED = resource.RLIM_INFINITY

# Runs the rest of its command line with another limit on locked memory and without the powers of
# root, which would go past that limit and past the check of who may look into whose memory. Core
# dumps are on beforehand. Where Yama asks for consent to be traced, it is given, to anyone.
LAUNCHER = """\
import ctypes, os, resource, sys
limit, keep, *argv = sys.argv[1:]
libc = ctypes.CDLL(None)
PR_CAPBSET_DROP, PR_SET_PTRACER, ANY = 24, 0x59616D61, ctypes.c_ulong(-1)
libc.prctl(PR_SET_PTRACER, ANY, 0, 0, 0)
for capability in range(64):
    if keep != "keep" and os.geteuid() == 0:
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
if limit:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, 2 * (int(limit),))
_, hard = resource.getrlimit(resource.RLIMIT_CORE)
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
os.execv(argv[0], argv)
"""


@pytest.fixture
def launcher(short: Path) -> List[str]:
    """The command that the launcher is, without its arguments."""
    script = short / "launcher.py"
    script.write_text(LAUNCHER)
    return [sys.executable, str(script)]


def program(folder: Path, *words: str) -> str:
    """For start_proxy's PYTHON: WORDS in front of the script and its arguments."""
    script = folder / "start"
    script.write_text('#!/bin/sh\nexec ' + " ".join(map(shlex.quote, words)) + ' "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def start_limited(
    short: Path, launcher: List[str], agent: Agent, keys: Keys, start_proxy: Callable[..., Proxy]
) -> Callable[..., Proxy]:
    """start_limited(limit of locked memory in bytes or None): without the powers of root."""
    agent.add(keys["ed25519"])

    def start(limit: Optional[int] = None) -> Proxy:
        words = [*launcher, "" if limit is None else str(limit), "drop", sys.executable]
        return start_proxy(upstream=agent.sock, python=program(short, *words))

    return start


def status(pid: int) -> Dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def kib(pid: int, field: str) -> int:
    return int(status(pid)[field].split()[0])


# ---------------------------------------------------------------- what the system says


def test_no_core_dump(start_limited: Callable[..., Proxy]) -> None:
    proxy = start_limited()
    limits = Path(f"/proc/{proxy.pid}/limits").read_text()
    assert re.search(r"^Max core file size +0 +0 +bytes", limits, re.M)


def test_no_new_privileges(proxy: Proxy) -> None:
    assert status(proxy.pid)["NoNewPrivs"] == "1"
    assert status(os.getpid())["NoNewPrivs"] == "0", "it is so for the tests already"


# ---------------------------------------------------------------- memory that is locked, or not

MEMLOCK_LINE = "memory kept out of swap"


def sign_at_once(proxy: Proxy, agent: Agent, number: int) -> List[int]:
    """As many requests as that, all waiting for the agent at the same time; their statuses."""
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(number) as pool:
            running = [pool.submit(http, proxy.port, "POST", "/sign", b"x") for _ in range(number)]
            try:
                wait_for(lambda: kib(proxy.pid, "Threads") > number, 20, f"{number} threads")
            finally:
                os.kill(agent.pid, signal.SIGCONT)
            return [one.result().status for one in running]
    finally:
        os.kill(agent.pid, signal.SIGCONT)


FINITE = [0, 64 << 10, 8 << 20]


@pytest.mark.parametrize("limit", FINITE)
def test_with_a_finite_limit_nothing_is_locked_and_one_warning_says_so(
    limit: int, start_limited: Callable[..., Proxy]
) -> None:
    proxy = start_limited(limit)
    assert kib(proxy.pid, "VmLck") == 0
    assert proxy.stop() == 0
    lines = [line for line in proxy.log().splitlines() if MEMLOCK_LINE in line]
    assert len(lines) == 1
    assert " WARNING " in lines[0]
    assert "RLIMIT_MEMLOCK" in lines[0]
    assert f"{limit >> 10} KiB" in lines[0]


@pytest.mark.parametrize("limit", FINITE)
def test_with_a_finite_limit_threads_and_bodies_go_on(
    limit: int, start_limited: Callable[..., Proxy], agent: Agent
) -> None:
    proxy = start_limited(limit)
    assert sign_at_once(proxy, agent, 128) == [200] * 128
    assert http(proxy.port, "POST", "/sign", bytes(64 << 20)).status == 200
    assert "cannot start another thread" not in proxy.log()


# What a system without a limit says, where this process has the power to lock all the same. A
# finite soft limit can be raised there.
PRETEND = f"""\
import resource, runpy, sys
soft, sys.argv = int(sys.argv[1]), sys.argv[2:]
get, put = resource.getrlimit, resource.setrlimit
def getrlimit(which):
    return (soft, resource.RLIM_INFINITY) if which == resource.RLIMIT_MEMLOCK else get(which)
def setrlimit(which, limits):
    global soft
    if which == resource.RLIMIT_MEMLOCK:
        soft = limits[0]
    else:
        put(which, limits)
resource.getrlimit, resource.setrlimit = getrlimit, setrlimit
runpy.run_path({str(PROXY)!r}, run_name="__main__")
"""

REALLY = """\
import os, resource, sys
resource.setrlimit(resource.RLIMIT_MEMLOCK, (int(sys.argv[1]), resource.RLIM_INFINITY))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""

CAP_IPC_LOCK = 1 << 14


def may_be_unlimited() -> bool:
    test = "import resource as r; r.setrlimit(r.RLIMIT_MEMLOCK, 2 * (r.RLIM_INFINITY,))"
    return run([sys.executable, "-c", test], check=False).returncode == 0


@pytest.fixture(params=[UNLIMITED, 64 << 10], ids=["no limit", "one that can be raised"])
def unlimited(
    request: pytest.FixtureRequest, short: Path, agent: Agent, keys: Keys,
    start_proxy: Callable[..., Proxy],
) -> Proxy:  # fmt: skip
    """The proxy where the memory that may be locked has no (hard) limit."""
    agent.add(keys["ed25519"])
    script = short / "unlimited.py"
    if may_be_unlimited():
        script.write_text(REALLY)
    elif int(status(os.getpid())["CapEff"], 16) & CAP_IPC_LOCK:
        script.write_text(PRETEND)
    else:
        cannot_run("RLIMIT_MEMLOCK can't be unlimited here: run this as root (prlimit --memlock)")
    words = [sys.executable, str(script), str(request.param)]
    return start_proxy(upstream=agent.sock, python=program(short, *words))


def test_without_a_limit_all_memory_is_locked(unlimited: Proxy) -> None:
    locked, size = kib(unlimited.pid, "VmLck"), kib(unlimited.pid, "VmSize")
    assert locked > size / 2
    assert unlimited.stop() == 0
    assert f" INFO {MEMLOCK_LINE}: in force" in unlimited.log()


def test_without_a_limit_threads_and_bodies_cost_no_more_than_they_use(
    unlimited: Proxy, agent: Agent
) -> None:
    before = kib(unlimited.pid, "VmRSS")
    assert before < 48 << 10
    assert sign_at_once(unlimited, agent, 128) == [200] * 128
    assert http(unlimited.port, "POST", "/sign", bytes(64 << 20)).status == 200
    assert kib(unlimited.pid, "VmRSS") - before < 24 << 10


# ---------------------------------------------------------------- what harden() says of it

HARDEN = f"""\
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import ssh_agent_proxy as p
steps = [(s.name, s.in_force, s.state, s.expected) for s in p.harden(sys.platform)]
with open("/proc/self/status") as f:
    status = f.read()
with open("/proc/self/limits") as f:
    limits = f.read()
print(json.dumps([steps, status, limits]))
"""


def harden(launcher: List[str], limit: str, keep: str) -> Any:
    done = run([*launcher, limit, keep, sys.executable, "-c", HARDEN])
    assert done.stderr == b""
    return json.loads(done.stdout)


def test_each_step_says_what_is_in_force(launcher: List[str]) -> None:
    steps, said, limits = harden(launcher, str(64 << 10), "drop")
    assert [name for name, _, _, _ in steps] == [
        "no core dumps",
        "no debugger, no reading of memory",
        "no new privileges",
        MEMLOCK_LINE,
    ]
    assert [in_force for _, in_force, _, _ in steps] == [True, True, True, False]
    assert "NoNewPrivs:\t1" in said
    assert "VmLck:\t       0 kB" in said
    assert re.search(r"^Max core file size +0 +0 ", limits, re.M)


REFUSE = """\
import ctypes, resource
def refused(*args):
    raise ValueError("not allowed")
resource.setrlimit = refused
real = ctypes.CDLL
class Refusing:
    def __init__(self, libc):
        class Prctl:
            def __call__(self, option, *rest):
                return {3: 1, 39: 0}.get(option, -1)  # what is read back: dumpable, and no more
        self.prctl, self.mlockall, self.syscall = Prctl(), libc.mlockall, libc.syscall
ctypes.CDLL = lambda *args, **options: Refusing(real(*args, **options))
"""


def test_a_step_that_fails_is_not_called_in_force(launcher: List[str]) -> None:
    argv = [*launcher, str(64 << 10), "drop", sys.executable, "-c", REFUSE + HARDEN]
    steps, _, _ = json.loads(run(argv).stdout)
    assert [in_force for _, in_force, _, _ in steps] == [False] * 4
    assert all(state for _, _, state, _ in steps)


def test_a_step_that_fails_is_one_warning_and_no_end(
    short: Path, launcher: List[str], agent: Agent, start_proxy: Callable[..., Proxy]
) -> None:
    script = short / "refuse.py"
    script.write_text(REFUSE + "import runpy, sys\nsys.argv = sys.argv[1:]\n"
                      f"runpy.run_path({str(PROXY)!r}, run_name='__main__')\n")  # fmt: skip
    words = [*launcher, str(64 << 10), "drop", sys.executable, str(script)]
    proxy = start_proxy(upstream=agent.sock, python=program(short, *words))
    assert http(proxy.port, "GET", "/healthz").status == 200
    warnings = [line for line in proxy.log().splitlines() if "not in force" in line]
    assert len(warnings) == 5  # without the fourth, no Landlock
    assert all(" WARNING " in line for line in warnings)


def test_an_unknown_system_is_left_alone() -> None:
    assert p.harden("plan9") == []


# ---------------------------------------------------------------- what is said, and what is so

# The program with a hook: GET /shim answers what the system says of the process (in one of its
# worker threads); after `check` that is printed.
INSIDE = f"""\
import ctypes, json, os, resource, sys
sys.path.insert(0, {str(ROOT)!r})
libc = ctypes.CDLL(None)  # before anything is put in its place
import ssh_agent_proxy as p
flags, argv = sys.argv[1].split(","), sys.argv[3:]
{{pretend}}
def facts():
    with open("/proc/thread-self/status") as f:
        status = dict(line.rstrip("\\n").split(":\\t", 1) for line in f if ":\\t" in line)
    with open("/proc/self/limits") as f:
        core = next(line.split()[4:6] for line in f if line.startswith("Max core file size"))
    try:
        os.close(os.open("/dev/null", os.O_WRONLY))
        confined = False
    except PermissionError:
        confined = True
    return [core == ["0", "0"], libc.prctl(3, 0, 0, 0, 0) == 0, status["NoNewPrivs"] == "1",
            status["VmLck"].split()[0] != "0", confined]
def harden(platform, real=p.harden):
    steps = real(platform) if "unhardened" not in flags else []
    if "dumpable" in flags:
        libc.prctl(4, 1, 0, 0, 0)
    return steps
p.harden = harden
p.read_shim = lambda: json.dumps(facts()).encode()
status = p.main(argv)
if "check" in argv:
    print(json.dumps(facts()))
sys.exit(status)
"""

# Memory that may be locked without a limit, where that can't be had: as PRETEND does.
WITHOUT_LIMIT = """\
if "unlimited" in flags or "raisable" in flags:
    get, put = resource.getrlimit, resource.setrlimit
    soft = 65536 if "raisable" in flags else resource.RLIM_INFINITY
    def getrlimit(which):
        return (soft, resource.RLIM_INFINITY) if which == resource.RLIMIT_MEMLOCK else get(which)
    def setrlimit(which, limits):
        global soft
        if which == resource.RLIMIT_MEMLOCK:
            soft = limits[0]
        else:
            put(which, limits)
    resource.getrlimit, resource.setrlimit = getrlimit, setrlimit
"""
INSIDE = INSIDE.replace("{pretend}\n", WITHOUT_LIMIT)

# Runs the rest of its command line where the kernel answers some system calls with an error, or
# with 0 and does nothing: [name, error, [[number of an argument, value, whether it has it], ...]].
SECCOMP = """\
import ctypes, errno, json, os, platform, struct, sys
rules, argv = json.loads(sys.argv[1]), sys.argv[2:]
NUMBERS = {"landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446}
ARCHITECTURES = {
    "x86_64": (0xC000003E, {"prctl": 157, "mlockall": 151, "setrlimit": 160, "prlimit64": 302}),
    "aarch64": (0xC00000B7, {"prctl": 167, "mlockall": 230, "setrlimit": 164, "prlimit64": 261}),
}
if platform.machine() not in ARCHITECTURES:
    sys.exit("its system calls are not known here")
audit, more = ARCHITECTURES[platform.machine()]
NUMBERS.update(more)
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
KILL, ERROR, ALLOW = 0x80000000, 0x50000, 0x7FFF0000
code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL)]
for name, number, conditions in rules:
    left = 2 * len(conditions) + 1
    code += [(LOAD, 0, 0, 0), (EQUAL, 0, left, NUMBERS[name])]
    for index, value, equal in conditions:
        left -= 2
        skip = (0, left) if equal else (left, 0)
        code += [(LOAD, 0, 0, 16 + 8 * index), (EQUAL, *skip, value)]
    code += [(RETURN, 0, 0, ERROR | number)]
code += [(RETURN, 0, 0, ALLOW)]
data = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
program = Program(len(code), ctypes.addressof(data))
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_SECCOMP, FILTER, PR_SET_NO_NEW_PRIVS = 22, 2, 38
def install():
    return libc.prctl(PR_SET_SECCOMP, FILTER, ctypes.byref(program), 0, 0) == 0
if not install() and (libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or not install()):
    sys.exit(os.strerror(ctypes.get_errno()))
os.execv(argv[0], argv)
"""

STEPS = [
    "no core dumps",
    "no debugger, no reading of memory",
    "no new privileges",
    MEMLOCK_LINE,
    "Landlock",
]
CORE, DEBUGGER, PRIVILEGES, MEMORY, LANDLOCK = range(5)

Rule = Tuple[str, int, List[List[Any]]]
LANDLOCK_CALLS = ["landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"]


def landlock_answers(number: int, *calls: str) -> List[Rule]:
    return [(name, number, []) for name in calls or LANDLOCK_CALLS]


NO_NEW_LIMIT: List[List[Any]] = [[2, 0, False]]


class Surroundings(NamedTuple):
    """Where the program is started; what is known of it: which steps can't be, and why."""

    rules: List[Rule] = []
    powers: str = "drop"  # or "keep": those of root
    limit: str = str(8 << 20)
    flags: str = ""
    refused: Dict[int, str] = {MEMORY: "RLIMIT_MEMLOCK is 8192 KiB"}
    known: bool = True  # else whatever is so has to be said, and no more is known


SURROUNDINGS: List[Tuple[str, Surroundings]] = [
    ("a plain shell", Surroundings(powers="keep", limit="", known=False)),
    ("no powers", Surroundings()),
    ("no powers, no limit", Surroundings(limit="none", flags="unlimited", known=False)),
    ("powers, a limit that can be raised", Surroundings(
        powers="keep", limit="", flags="raisable", known=False)),
    ("a limit of 64 KiB", Surroundings(
        limit=str(64 << 10), refused={MEMORY: "RLIMIT_MEMLOCK is 64 KiB"})),
    ("a limit of 0", Surroundings(limit="0", refused={MEMORY: "RLIMIT_MEMLOCK is 0 KiB"})),
    ("mlockall refused", Surroundings(
        [("mlockall", errno.EPERM, [])], flags="unlimited",
        refused={MEMORY: os.strerror(errno.EPERM)})),
    ("mlockall that does nothing", Surroundings(
        [("mlockall", 0, [])], flags="unlimited", refused={MEMORY: "VmLck 0 kB"})),
    ("Linux without Landlock", Surroundings(
        landlock_answers(errno.ENOSYS), "keep", known=False,
        refused={LANDLOCK: "this kernel has none"})),
    ("Landlock not switched on", Surroundings(
        landlock_answers(errno.EOPNOTSUPP), "keep", known=False,
        refused={LANDLOCK: "not enabled at boot"})),
    ("Landlock forbidden", Surroundings(
        landlock_answers(errno.EPERM), "keep", known=False,
        refused={LANDLOCK: os.strerror(errno.EPERM)})),
    ("Landlock forbidden at the last", Surroundings(
        landlock_answers(errno.EPERM, "landlock_restrict_self"), "keep", known=False,
        refused={LANDLOCK: os.strerror(errno.EPERM)})),
    ("too many rulesets", Surroundings(
        landlock_answers(errno.E2BIG, "landlock_restrict_self"), "keep", known=False,
        refused={LANDLOCK: os.strerror(errno.E2BIG)})),
    ("Landlock that does nothing", Surroundings(
        landlock_answers(0, "landlock_restrict_self"), "keep", known=False,
        refused={LANDLOCK: "could be written"})),
    ("dumpable not to be changed", Surroundings(
        [("prctl", errno.EPERM, [[0, 4, True]])], "keep", known=False,
        refused={DEBUGGER: "PR_GET_DUMPABLE 1"})),
    ("limits not to be changed", Surroundings(
        [("prlimit64", errno.EPERM, NO_NEW_LIMIT), ("setrlimit", errno.EPERM, [])],
        "keep", known=False)),
    ("no new privileges refused", Surroundings(
        [("prctl", errno.EINVAL, [[0, 38, True]])], "keep", known=False,
        refused={PRIVILEGES: "PR_GET_NO_NEW_PRIVS 0"})),
    ("no new privileges refused, no powers", Surroundings(
        [("prctl", errno.EINVAL, [[0, 38, True]])],
        refused={PRIVILEGES: "PR_GET_NO_NEW_PRIVS 0", LANDLOCK: os.strerror(errno.EPERM),
                 MEMORY: "RLIMIT_MEMLOCK is 8192 KiB"})),
]  # fmt: skip


@pytest.fixture
def surrounded(short: Path) -> Callable[[Surroundings], List[str]]:
    """The command that starts the program in such surroundings, hook included."""

    def words(where: Surroundings) -> List[str]:
        limit = where.limit
        if limit == "none":
            limit = str(UNLIMITED) if may_be_unlimited() else str(8 << 20)
        scripts = {"seccomp": SECCOMP, "launcher": LAUNCHER, "inside": INSIDE}
        for name, text in scripts.items():
            (short / name).write_text(text)
        python = [sys.executable, "-I", "-S"]
        argv = [*python, str(short / "inside"), where.flags]
        if where.powers == "drop":
            argv = [*python, str(short / "launcher"), "", "drop", *argv]
        if where.rules:
            argv = [*python, str(short / "seccomp"), json.dumps(where.rules), *argv]
        if os.geteuid() and any([0, 38, True] in given for _, _, given in where.rules):
            cannot_run("only root has a seccomp filter without giving up new privileges")
        return [*python, str(short / "launcher"), limit, "keep", *argv]

    return words


def claims(lines: List[str], good: str, bad: str) -> List[bool]:
    """Which of the steps LINES say are in force, each once, behind such a mark or level."""
    found = []
    for step in STEPS:
        about = [line for line in lines if step in line]
        assert len(about) == 1, f"{step}: {about}"
        refused = "not in force" in about[0]
        assert re.match(bad if refused else good, about[0]), about
        assert refused or "in force" in about[0]
        found.append(not refused)
    return found


def reasons(where: Surroundings, lines: List[str]) -> None:
    for step, why in where.refused.items():
        if where.known or step != MEMORY:
            assert any(STEPS[step] in line and why in line for line in lines), (why, lines)


@pytest.mark.parametrize("where", [pytest.param(w, id=name) for name, w in SURROUNDINGS])
def test_the_log_says_what_is_so(
    where: Surroundings, surrounded: Callable[[Surroundings], List[str]], short: Path, agent: Agent,
    start_proxy: Callable[..., Proxy],
) -> None:  # fmt: skip
    proxy = start_proxy(upstream=agent.sock, python=program(short, *surrounded(where)))
    proxy.wait_log("listening on")
    lines = proxy.log().split("listening on")[0].splitlines()
    said = claims(lines, r"\S+ INFO ", r"\S+ WARNING ")
    so = json.loads(http(proxy.port, "GET", "/shim").body)
    assert said == so
    outside = status(proxy.pid)
    limits = Path(f"/proc/{proxy.pid}/limits").read_text()
    assert so[CORE] == bool(re.search(r"^Max core file size +0 +0 ", limits, re.M))
    assert so[PRIVILEGES] == (outside["NoNewPrivs"] == "1")
    assert so[MEMORY] == (outside["VmLck"] != "0 kB")
    reasons(where, lines)
    if where.known:
        assert [step for step in range(5) if not so[step]] == sorted(where.refused)


@pytest.mark.parametrize("where", [pytest.param(w, id=name) for name, w in SURROUNDINGS])
def test_check_says_what_is_so(
    where: Surroundings, surrounded: Callable[[Surroundings], List[str]], home: Path, agent: Agent,
    keys: Keys,
) -> None:  # fmt: skip
    agent.add(keys["ed25519"])
    argv = [*surrounded(where), PROXY, "check", "--addr", "127.0.0.1:0", "--upstream", agent.sock]
    *lines, so = run(argv, env=clean_env(home)).stdout.decode().splitlines()
    assert claims(lines, "ok +", "warn +") == json.loads(so)
    reasons(where, lines)


# ---------------------------------------------------------------- another process of the same user

# Looks into a process, in one way after the other: "" where it could, else why not.
LOOK = """\
import ctypes, errno, json, os, re, struct, sys
pid = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
libc.ptrace.restype = libc.syscall.restype = ctypes.c_long
ATTACH, DETACH, SEIZE = 16, 17, 0x4206
PIDFD_OPEN, PIDFD_GETFD = 434, 438
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result
def read(name, start=0):
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY)
    try:
        return os.pread(fd, 64, start)
    finally:
        os.close(fd)
def somewhere():
    # Where it can't be known any address will do: who may not look gets to hear that first.
    try:
        return int(read("maps").split(b"-")[0], 16)
    except OSError:
        return 0x10000
def memory():
    assert read("mem", somewhere())
def write_memory():
    os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR))
def copy_memory():
    mine = ctypes.create_string_buffer(64)
    here = struct.pack("PN", ctypes.addressof(mine), 64)
    there = struct.pack("PN", somewhere(), 64)
    check(libc.process_vm_readv(pid, here, ctypes.c_ulong(1), there, ctypes.c_ulong(1),
                                ctypes.c_ulong(0)))
def attach():
    check(libc.ptrace(ATTACH, pid, 0, 0))
    os.waitpid(pid, 0x40000000)  # __WALL
    check(libc.ptrace(DETACH, pid, 0, 0))
def seize():
    check(libc.ptrace(SEIZE, pid, 0, 0))  # until this process ends
def environment():
    read("environ")
def layout():
    read("maps")
def files():
    os.readlink(f"/proc/{pid}/fd/2")
def descriptor():
    fd = check(libc.syscall(PIDFD_OPEN, pid, 0))
    check(libc.syscall(PIDFD_GETFD, fd, 2, 0))
found = {}
for look in (memory, write_memory, copy_memory, environment, layout, files, descriptor, attach,
             seize):
    try:
        look()
        found[look.__name__] = ""
    except OSError as e:
        found[look.__name__] = errno.errorcode[e.errno]
print(json.dumps(found))
"""
LOOKS = ["memory", "write_memory", "copy_memory", "environment", "layout", "files", "descriptor",
         "attach", "seize"]  # fmt: skip

# As somebody who is not root, by a number that is nobody's.
SOMEBODY = """\
import os, sys
os.setgroups([])
os.setresgid(*3 * [int(sys.argv[1])])
os.setresuid(*3 * [int(sys.argv[1])])
os.execv(sys.argv[2], sys.argv[2:])
"""
NUMBER = 54321


def as_somebody(python: str, *words: str) -> List[str]:
    return [sys.executable, "-c", SOMEBODY, str(NUMBER), python, *words]


def anyones_python() -> str:
    """A Python that users other than root can run, too."""
    for python in filter(os.path.exists, (sys.executable, "/usr/bin/python3")):
        argv = as_somebody(python, "-c", "import ctypes, sys; assert sys.version_info >= (3, 9)")
        if not run(argv, check=False).returncode:
            return python
    return cannot_run("no Python that users other than root can run: install python3")


@pytest.fixture(scope="module", params=["root without powers", "somebody"])
def looked(request: pytest.FixtureRequest) -> Iterator[Dict[str, Dict[str, str]]]:
    """What the same user's other process sees of the program, and of one that is dumpable."""
    folder = Path(tempfile.mkdtemp(prefix="sap.", dir="/tmp"))
    try:
        for name in ("ssh_agent_proxy.py", "shim.sh"):
            (folder / name).write_bytes((ROOT / name).read_bytes())
        (folder / "inside").write_text(INSIDE.replace(repr(str(ROOT)), repr(str(folder))))
        (folder / "look").write_text(LOOK)
        (folder / "launcher").write_text(LAUNCHER)
        launcher = [str(folder / "launcher"), "", "drop"]
        env = clean_env(folder / "home")
        if request.param == "somebody" and os.geteuid() == 0:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NUMBER, NUMBER)
            python = anyones_python()
            words = [*as_somebody(python), *launcher, python]
        else:
            words = [sys.executable, *launcher, sys.executable]
        found = {}
        for flags in ("", "dumpable"):
            argv = [*words, str(folder / "inside"), flags, "-", "--addr", "127.0.0.1:0"]
            proxy = Proxy([*argv, "--upstream", str(folder / "nowhere")], env)
            try:
                owner = os.stat(f"/proc/{proxy.pid}").st_uid
                assert owner == (NUMBER if "somebody" in words[2] else owner)
                found[flags] = json.loads(run([*words, folder / "look", proxy.pid]).stdout)
            finally:
                assert proxy.stop() == 0, proxy.log()
        yield found
    finally:
        run(["rm", "-rf", folder])


@pytest.mark.parametrize("look", LOOKS)
def test_no_other_process_of_the_user_looks_into_it(
    look: str, looked: Dict[str, Dict[str, str]]
) -> None:
    if looked["dumpable"][look]:
        cannot_run(f"no process may look into another here, {looked['dumpable'][look]}: see "
                   "kernel.yama.ptrace_scope")  # fmt: skip
    assert looked[""][look] in ("EACCES", "EPERM")


def end_by(number: int, argv: List[Any], folder: Path) -> bool:
    """Whether a process that such a signal ends leaves a core."""
    core = ["--addr", "127.0.0.1:0", "--upstream", str(folder / "nowhere")]
    with subprocess.Popen([*argv, *core], env=clean_env(folder / "home"), cwd=folder,
                          stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:  # fmt: skip
        assert process.stderr
        for line in process.stderr:
            if b"listening on" in line:
                break
        process.send_signal(number)
        end = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert end
        assert end.si_status == number
        return end.si_code == 3  # CLD_DUMPED


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV])
def test_its_end_leaves_no_core(
    number: int, surrounded: Callable[[Surroundings], List[str]], short: Path, home: Path
) -> None:
    words = [*surrounded(Surroundings(flags="unhardened")), str(PROXY)]
    if not end_by(number, words, short):
        cannot_run("no process leaves a core here: see ulimit -Hc, kernel.core_pattern")
    for core in short.glob("core*"):
        core.unlink()
    assert not end_by(number, [*surrounded(Surroundings()), str(PROXY)], short)
    assert not list(short.glob("core*"))
