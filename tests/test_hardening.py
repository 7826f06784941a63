"""What the process has given up: read from the system, and tried from another process."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
from conftest import PROXY, ROOT, Agent, Keys, Proxy, cannot_run, http, run, wait_for

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


ATTACH = """\
import ctypes, os, sys
pid = int(sys.argv[1])
PTRACE_SEIZE, PTRACE_O_EXITKILL = 0x4206, 0x100000
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = 4 * [ctypes.c_long]
libc.ptrace.restype = ctypes.c_long
try:
    with open(f"/proc/{pid}/mem", "rb"):
        print("memory open")
except OSError as e:
    print(e.strerror)
print("attached" if libc.ptrace(PTRACE_SEIZE, pid, 0, 0) == 0 else os.strerror(ctypes.get_errno()))
"""


@pytest.fixture
def attach(short: Path, launcher: List[str]) -> Callable[[int], List[str]]:
    """Tries to look into a process, as the same user: what came of reading, and of attaching."""
    script = short / "attach.py"
    script.write_text(ATTACH)

    def attempt(pid: int) -> List[str]:
        done = run([*launcher, "", "drop", sys.executable, script, pid])
        return done.stdout.decode().splitlines()

    return attempt


@pytest.fixture
def neighbour(launcher: List[str]) -> Iterator[int]:
    """The pid of a process of the same user's that has given up nothing."""
    argv = [*launcher, "", "drop", sys.executable, "-c", "print(); input()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()  # it runs
        yield process.pid
        process.kill()


def test_no_other_process_of_the_user_looks_into_it(
    start_limited: Callable[..., Proxy], attach: Callable[[int], List[str]], neighbour: int
) -> None:
    if attach(neighbour) != ["memory open", "attached"]:
        cannot_run("no process may trace another here: see kernel.yama.ptrace_scope")
    proxy = start_limited()
    assert attach(proxy.pid) == ["Permission denied", "Operation not permitted"]


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
