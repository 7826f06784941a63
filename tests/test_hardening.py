"""What the process has given up: read from the system, and tried from another process."""

import ctypes
import errno
import json
import logging
import os
import re
import resource
import signal
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple

import pytest
from conftest import PROXY, ROOT, Agent, Keys, Proxy, cannot_run, clean_env, http, run, wait_for
from test_check import STEPS

import ssh_agent_proxy as p

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")

UNLIMITED = resource.RLIM_INFINITY
CAP_IPC_LOCK = 1 << 14

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

# The program with a hook: GET /shim answers what the system says of the process (in one of its
# worker threads). By its flags it may lock memory without a limit where that can't be had, is not
# hardened, or is made dumpable afterwards. Its second argument has calls that are answered with an
# error, or with 0, and do nothing.
INSIDE = f"""\
import ctypes, json, os, resource, sys
sys.path.insert(0, {str(ROOT)!r})
libc = ctypes.CDLL(None)  # before anything is put in its place
import ssh_agent_proxy as p
flags, answers, argv = sys.argv[1].split(","), json.loads(sys.argv[2]), sys.argv[4:]

# A function of libc, of which some calls don't reach the kernel.
class Call:
    def __init__(self, name, real):
        self.__dict__.update(name=name, real=real)
    def __setattr__(self, name, value):
        setattr(self.real, name, value)
    def __call__(self, *args):
        number = answers.get(self.name, answers.get(f"{{self.name}} {{args[0]}}"))
        if number is None:
            return self.real(*args)
        ctypes.set_errno(number)
        return -1 if number else 0

class Libc:
    def __init__(self, *args, real=ctypes.CDLL, **options):
        self.real = real(*args, **options)
    def __getattr__(self, name):
        call = Call(name, getattr(self.real, name))
        setattr(self, name, call)
        return call

if answers:
    ctypes.CDLL = Libc

if "raisable" in flags:
    get, put = resource.getrlimit, resource.setrlimit
    faked = {{resource.RLIMIT_MEMLOCK: (65536, resource.RLIM_INFINITY)}}
    resource.getrlimit = lambda which: faked.get(which) or get(which)
    def setrlimit(which, limits):
        if which in faked:
            faked[which] = limits
        else:
            put(which, limits)
    resource.setrlimit = setrlimit
if "fixed" in flags:
    def setrlimit(which, limits):
        raise ValueError("not allowed to raise maximum limit")
    resource.setrlimit = setrlimit

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
sys.exit(p.main(argv))
"""

def status(pid: int) -> Dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def kib(pid: int, field: str) -> int:
    return int(status(pid)[field].split()[0])


# ---------------------------------------------------------------- what is said, and what is so

CORE, DEBUGGER, PRIVILEGES, MEMORY, LANDLOCK = range(5)

# Calls of prctl and syscall by their first argument.
SET_DUMPABLE, SET_NO_NEW_PRIVS, RESTRICT_SELF = "prctl 4", "prctl 38", "syscall 446"
LANDLOCK_CALLS = ["syscall 444", "syscall 445", RESTRICT_SELF]


class Surroundings(NamedTuple):
    """Where the program is started; what is known of it: which steps can't be, and why."""

    answers: Dict[str, int] = {}
    powers: str = "drop"  # or "keep": those of root
    limit: str = str(8 << 20)
    flags: str = ""
    refused: Dict[int, str] = {MEMORY: "RLIMIT_MEMLOCK is 8192 KiB"}
    known: bool = True  # else whatever is so has to be said, and no more is known


def without_landlock(number: int, why: str, *calls: str) -> Surroundings:
    answers = dict.fromkeys(calls or LANDLOCK_CALLS, number)
    return Surroundings(answers, "keep", refused={LANDLOCK: why}, known=False)


SURROUNDINGS = {
    "a plain shell": Surroundings(powers="keep", limit="", known=False),
    "no powers": Surroundings(),
    "powers, a limit that can be raised": Surroundings(
        powers="keep", limit="", flags="raisable", known=False),
    "mlockall refused": Surroundings(
        {"mlockall": errno.EPERM}, flags="raisable", refused={MEMORY: os.strerror(errno.EPERM)}),
    "mlockall that does nothing": Surroundings(
        {"mlockall": 0}, flags="raisable", refused={MEMORY: "VmLck 0 kB"}),
    "Linux without Landlock": without_landlock(errno.ENOSYS, "this kernel has none"),
    "Landlock not switched on": without_landlock(errno.EOPNOTSUPP, "not enabled at boot"),
    "too many rulesets": without_landlock(errno.E2BIG, os.strerror(errno.E2BIG), RESTRICT_SELF),
    "Landlock that does nothing": without_landlock(0, "could be written", RESTRICT_SELF),
    "dumpable not to be changed": Surroundings(
        {SET_DUMPABLE: errno.EPERM},
        refused={DEBUGGER: "PR_GET_DUMPABLE 1", MEMORY: "RLIMIT_MEMLOCK is 8192 KiB"}),
    "limits not to be changed": Surroundings(
        flags="fixed", refused={CORE: "RLIMIT_CORE", MEMORY: "RLIMIT_MEMLOCK is 8192 KiB"}),
    "no new privileges refused": Surroundings(
        {SET_NO_NEW_PRIVS: errno.EINVAL},
        refused={PRIVILEGES: "PR_GET_NO_NEW_PRIVS 0", LANDLOCK: os.strerror(errno.EPERM),
                 MEMORY: "RLIMIT_MEMLOCK is 8192 KiB"}),
}  # fmt: skip


def may_be_unlimited() -> bool:
    test = "import resource as r; r.setrlimit(r.RLIMIT_MEMLOCK, 2 * (r.RLIM_INFINITY,))"
    return run([sys.executable, "-c", test], check=False).returncode == 0


def surrounded(where: Surroundings, short: Path) -> List[str]:
    """The command that starts the program in such surroundings, hook included."""
    launcher, inside = short / "launcher", short / "inside"
    launcher.write_text(LAUNCHER)
    inside.write_text(INSIDE)
    python = [sys.executable, "-I", "-S"]
    return [*python, str(launcher), where.limit, where.powers,
            *python, str(inside), where.flags, json.dumps(where.answers)]  # fmt: skip


def claims(lines: List[str]) -> List[bool]:
    """Which of the steps LINES say are in force, each once, behind the level that it has."""
    found = []
    for step in STEPS:
        about = [line for line in lines if step in line]
        assert len(about) == 1, f"{step}: {about}"
        refused = "not in force" in about[0]
        assert re.match(r"\S+ WARNING " if refused else r"\S+ INFO ", about[0]), about
        assert refused or "in force" in about[0]
        found.append(not refused)
    return found


LONG = ["mlockall that does nothing", "too many rulesets", "limits not to be changed"]
LATER = [pytest.param(name, marks=pytest.mark.long) for name in LONG]


@pytest.mark.parametrize("name", [*(name for name in SURROUNDINGS if name not in LONG), *LATER])
def test_the_log_says_what_is_so(
    name: str, short: Path, agent_with_key: Agent, start_proxy: Callable[..., Proxy]
) -> None:
    where = SURROUNDINGS[name]
    proxy = start_proxy(upstream=agent_with_key.sock, python=surrounded(where, short))
    lines = proxy.log().split("listening on")[0].splitlines()
    so = json.loads(http(proxy.port, "GET", "/shim").body)
    assert claims(lines) == so
    for step, why in where.refused.items():
        if where.known or step != MEMORY:
            assert any(STEPS[step] in line and why in line for line in lines), (why, lines)
    if where.known:
        assert [step for step in range(5) if not so[step]] == sorted(where.refused)


NOT_PERMITTED = f"not in force (ptrace: {os.strerror(errno.EPERM)})"


@pytest.mark.parametrize(
    ("refused", "level", "told"),
    [(0, logging.INFO, "in force (PT_DENY_ATTACH)"), (errno.EPERM, logging.WARNING, NOT_PERMITTED)],
)
def test_what_macos_can_not_do_is_told_by_check_and_is_no_line_at_each_start(
        monkeypatch: pytest.MonkeyPatch, refused: int, level: int, told: str) -> None:  # fmt: skip
    def answer(number: int) -> Callable[..., int]:
        def call(*args: object) -> int:
            ctypes.set_errno(number)
            return -1 if number else 0

        return call

    libc = types.SimpleNamespace(ptrace=answer(refused), mlockall=answer(errno.ENOSYS))
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **options: libc)
    monkeypatch.setattr(resource, "setrlimit", lambda *args: None)
    monkeypatch.setattr(resource, "getrlimit", lambda which: 2 * (
        0 if which == resource.RLIMIT_CORE else UNLIMITED,))  # fmt: skip
    core, debugger, memory = p.hardening_findings(p.harden("darwin"))
    assert core == (logging.INFO, "no core dumps: in force (RLIMIT_CORE 0)")
    assert debugger[0] == level
    assert debugger[1].endswith(f": {told}")
    assert memory[0] == logging.DEBUG
    assert memory[1].endswith(f"not in force (mlockall: {os.strerror(errno.ENOSYS)})")
    assert p.MARKS[memory[0]] == "ok  "


def test_an_unknown_system_is_left_alone() -> None:
    assert p.harden("plan9") == []


# ---------------------------------------------------------------- memory that is locked, or not


def all_is_signed(proxy: Proxy, agent: Agent) -> None:
    """Of as many requests as may be, all waiting for the agent at the same time; and a long one."""
    os.kill(agent.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(128) as pool:
        running = [pool.submit(http, proxy.port, "POST", "/sign", b"x") for _ in range(128)]
        try:
            wait_for(lambda: kib(proxy.pid, "Threads") > 128, 20, "a thread for each")
        finally:
            os.kill(agent.pid, signal.SIGCONT)
    assert [one.result().status for one in running] == 128 * [200]
    assert http(proxy.port, "POST", "/sign", bytes(64 << 20)).status == 200


def test_with_a_finite_limit_threads_and_bodies_go_on(
    short: Path, start_proxy: Callable[..., Proxy], agent: Agent, keys: Keys
) -> None:
    agent.add(keys["ed25519"])
    proxy = start_proxy(upstream=agent.sock, python=surrounded(Surroundings(), short))
    all_is_signed(proxy, agent)
    assert "cannot start another thread" not in proxy.log()


def test_without_a_limit_all_memory_is_locked_and_costs_no_more_than_is_used(
    short: Path, agent: Agent, keys: Keys, start_proxy: Callable[..., Proxy]
) -> None:
    unlimited = may_be_unlimited()
    if not unlimited and not int(status(os.getpid())["CapEff"], 16) & CAP_IPC_LOCK:
        cannot_run("RLIMIT_MEMLOCK can't be unlimited here: run this as root (prlimit --memlock)")
    agent.add(keys["ed25519"])
    limit = str(UNLIMITED if unlimited else 8 << 20)
    where = Surroundings(powers="keep", limit=limit, flags="raisable")
    proxy = start_proxy(upstream=agent.sock, python=surrounded(where, short))
    assert kib(proxy.pid, "VmLck") > kib(proxy.pid, "VmSize") / 2
    before = kib(proxy.pid, "VmRSS")
    assert before < 48 << 10
    all_is_signed(proxy, agent)
    assert kib(proxy.pid, "VmRSS") - before < 24 << 10


# ---------------------------------------------------------------- another process of the same user

# Looks into a process, in one way after the other: "" where it could, else why not.
LOOK = """\
import ctypes, errno, json, sys
pid, found = int(sys.argv[1]), {"memory": "", "attach": ""}
try:
    open(f"/proc/{pid}/mem", "rb").close()
except OSError as e:
    found["memory"] = errno.errorcode[e.errno]
libc = ctypes.CDLL(None, use_errno=True)
PTRACE_SEIZE = 0x4206  # which stops nothing, and is over when we are
if libc.ptrace(PTRACE_SEIZE, pid, None, None):
    found["attach"] = errno.errorcode[ctypes.get_errno()]
print(json.dumps(found))
"""


def test_no_other_process_of_the_user_looks_into_it(
        short: Path, start_proxy: Callable[..., Proxy]) -> None:  # fmt: skip
    look = short / "look"
    look.write_text(LOOK)
    found = {}
    for flags in ("", "dumpable"):
        words = surrounded(Surroundings(flags=flags), short)
        proxy = start_proxy(upstream=short / "nowhere", python=words)
        *launched, _, _, _ = words
        found[flags] = json.loads(run([*launched, look, proxy.pid]).stdout)
    if any(found["dumpable"].values()):
        cannot_run(f"no process may look into another here, {found['dumpable']}: see "
                   "kernel.yama.ptrace_scope")  # fmt: skip
    assert set(found[""].values()) <= {"EACCES", "EPERM"}


def leaves_a_core(argv: List[str], folder: Path) -> bool:
    argv = [*argv, str(PROXY), "--addr", "127.0.0.1:0", "--upstream", f"{folder}/nowhere"]
    proxy = Proxy(argv, clean_env(folder / "home"), cwd=folder)
    os.kill(proxy.pid, signal.SIGABRT)
    end = os.waitid(os.P_PID, proxy.pid, os.WEXITED | os.WNOWAIT)
    assert end
    assert end.si_status == signal.SIGABRT
    proxy.stop()
    return end.si_code == 3  # CLD_DUMPED


def test_its_end_leaves_no_core(short: Path) -> None:
    if not leaves_a_core(surrounded(Surroundings(flags="unhardened"), short), short):
        cannot_run("no process leaves a core here: see ulimit -Hc, kernel.core_pattern")
    for core in short.glob("core*"):
        core.unlink()
    assert not leaves_a_core(surrounded(Surroundings(), short), short)
    assert not list(short.glob("core*"))
