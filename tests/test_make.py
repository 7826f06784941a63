"""The Makefile: its demo, what it builds, installs and removes, and what it says is missing."""

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from conftest import ROOT, bound_by_modes, clean_env, need, run, wait_for

MAKE = shutil.which("make") or "make"
# Not the venv's link: its path may be long or have a blank in it, where the project's has.
PYTHON = os.path.realpath(sys.executable)
CTRL_C = signal.SIGINT, "-"  # goes to all processes
SIGTERM = signal.SIGTERM, ""
long = pytest.mark.long


def long_rows(*values: Any) -> List[Any]:
    return [pytest.param(value, marks=long) for value in values]


def make(
    tree: Path, home: Path, *args: str, check: bool = True, **env: str
) -> "subprocess.CompletedProcess[bytes]":
    argv = [MAKE, "--no-print-directory", *args]
    if not any(arg.startswith("PYTHON=") for arg in args) and "PYTHON" not in env:
        argv.append(f"PYTHON={PYTHON}")
    return run(argv, cwd=tree, env=clean_env(home, **env), check=check, timeout=180)


def start(argv: List[str], tree: Path, env: Dict[str, str]) -> "subprocess.Popen[bytes]":
    """In a session of its own. Ctrl-C counts, though a runner in the background ignores it."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(argv, cwd=tree, env=env, start_new_session=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def alive(group: int) -> bool:
    """Whether a process of the group lives; a zombie does not, where the system tells them."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    if sys.platform == "linux":
        return False
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def files(folder: Path) -> List[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def snapshot(folder: Path) -> Dict[str, Any]:
    """All that is below it: modes, and what files and links hold."""
    found: Dict[str, Any] = {}
    for name in files(folder):
        path = folder / name
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = mode(path), None if path.is_dir() else path.read_bytes()
    return found


def stand_in(folder: Path, name: str, script: str) -> str:
    """A PATH that finds SCRIPT as NAME first."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


# ---------------------------------------------------------------- help


def test_make_alone_lists_every_target(tree: Path, home: Path) -> None:
    targets = re.findall(r"(?m)^([a-z-]+):.*##", (tree / "Makefile").read_text())
    assert {"help", "demo", "run", "test", "test-all", "lint", "check", "bench"} <= set(targets)
    assert {"build", "install", "uninstall", "clean"} <= set(targets)
    told = make(tree, home, "PREFIX=/usr", "DESTDIR=/package").stdout.decode()
    assert re.findall(r"(?m)^make ([a-z-]+) +\S", told) == targets
    # And where things would be installed.
    assert re.search(r"(?m)^BINDIR +/usr/bin ", told)
    assert re.search(r"(?m)^DESTDIR +/package ", told)


# ---------------------------------------------------------------- test, test-all


FEW_TESTS = """
import pytest, time
from conftest import need

@pytest.fixture(autouse=True)
def noted(request):
    note(f"begin {request.node.name}")
    time.sleep(0.05)
    yield
    note(f"end {request.node.name}")

def note(line):
    with open("noted", "a") as f:
        f.write(f"{line}\\n")

@pytest.mark.parametrize("number", range(6))
def test_side_by_side(number): pass

@pytest.mark.alone
@pytest.mark.parametrize("number", range(3))
def test_alone(number): pass

@pytest.mark.long
def test_long(): pass

def test_of_a_program(): need("no-such-program", "its-package")
"""


@pytest.fixture
def few_tests(tree: Path) -> Path:
    """The project with few tests, and with this run's own venv as make leaves one."""
    link_venv(tree, "has-test-tools")
    (tree / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tree / "tests")
    (tree / "tests" / "test_few.py").write_text(FEW_TESTS)
    return tree


def link_venv(tree: Path, *holds: str) -> None:
    venv = tree / ".venv" / "{}.{}".format(*sys.version_info[:2])
    venv.mkdir(parents=True)
    for name in ("bin", "lib", "pyvenv.cfg"):
        (venv / name).symlink_to(Path(sys.prefix, name))
    (venv / "made-of").write_text(f"{PYTHON}\n")
    for name in holds:
        (venv / name).write_text("")


SAYS = "not run: no-such-program is missing: install its-package "
TEST_RUNS = [
    pytest.param("test", {}, 0, "6 passed, 1 skipped, 4 deselected", SAYS),
    pytest.param("test-all", {}, 0, "10 passed, 1 skipped", SAYS, marks=long),
    pytest.param("test-all", {"CI": "1"}, 2, "1 failed, 10 passed", "FAILED tests/", marks=long),
]


@pytest.mark.parametrize(("target", "env", "status", "counted", "says"), TEST_RUNS)
def test_make_test_says_which_tests_were_not_run(
    few_tests: Path, home: Path, target: str, env: Any, status: int, counted: str, says: str
) -> None:
    none = "NPM_PACKAGES=", "WINE="
    answer = make(few_tests, home, target, "ARGS=-n 2", *none, check=False, **env)
    told = answer.stdout.decode()
    assert answer.returncode == status, told
    assert re.search(rf"(?m)^=+ {counted} in ", told), told
    assert f"\n{says}" in told
    # Those that need the machine for themselves get it: else they fail now and then.
    noted = (few_tests / "noted").read_text().splitlines()
    alone = [number for number, line in enumerate(noted) if "begin test_alone" in line]
    assert len(alone) == (3 if target == "test-all" else 0)
    for number in alone:
        assert noted[number + 1] == noted[number].replace("begin", "end")


@pytest.mark.parametrize(("env", "status"), [({}, 0), ({"CI": "1"}, 2)])
def test_without_wine_the_tests_on_windows_are_not_run_and_that_is_said(
        few_tests: Path, home: Path, env: Dict[str, str], status: int) -> None:  # fmt: skip
    path = path_without("wine", home / "bin")
    (home / "bin" / "cat").symlink_to(shutil.which("cat") or "")
    answer = make(few_tests, home, "test-windows", check=False, PATH=path, **env)
    assert answer.returncode == status
    said = answer.stderr.decode()
    assert "missing: wine, x86_64-w64-mingw32-gcc\n" in said
    assert re.search(r"(?m)apt-get install wine gcc-mingw-w64-x86-64-win32$", said)
    told = answer.stdout.decode()
    assert told == ("" if status else "The tests on Windows were not run.\n")


# ---------------------------------------------------------------- demo


class Demo:
    """`sh contrib/demo.sh` in a session of its own, with a directory for all that it may leave."""

    def __init__(self, tree: Path, home: Path, argv: Optional[List[str]], **env: str) -> None:
        self.home = home.parent / "demo home"
        self.home.mkdir()
        self.tmp = home.parent / "t mp"
        self.tmp.mkdir()
        environment = clean_env(home, PYTHON=PYTHON, **env)
        environment.update(HOME=str(self.home), TMPDIR=str(self.tmp))
        argv = argv or ["sh", "contrib/demo.sh"]
        self.process: Any = start(argv, tree, environment)
        (home / "demo.pid").write_text(f"{self.process.pid}\n")

    def end(self) -> str:
        """What it printed, once it has ended and has been seen to leave nothing."""
        closed = self.process.stdout.closed
        out = b"" if closed else self.process.communicate(timeout=60)[0]
        self.process.wait(60)
        # One that was interrupted together with it may need a moment to be gone.
        wait_for(lambda: not alive(self.process.pid), message="the demo's processes are gone")
        assert files(self.tmp) == []
        assert files(self.home) == []
        return out.decode()

    def signs_all(self) -> str:
        out = self.end()
        assert self.process.returncode == 0, out
        assert out.count('Good "git" signature') == 3, out
        return out


@pytest.fixture
def start_demo(tree: Path, home: Path) -> Iterator[Any]:
    started: List[Demo] = []

    def start(argv: Optional[List[str]] = None, **env: str) -> Demo:
        started.append(Demo(tree, home, argv, **env))
        return started[-1]

    yield start
    for demo in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(demo.process.pid, signal.SIGKILL)
        demo.process.stdout.close()
        demo.process.wait(10)


def test_demo_signs_a_commit_a_tag_and_a_merge(start_demo: Any) -> None:
    out = start_demo([MAKE, "demo"]).signs_all()
    good = re.findall(r'\$ git verify-(\w+) \w+\nGood "git" signature for (\S+) with ED25519', out)
    assert good == [(kind, "demo@example.com") for kind in ("commit", "tag", "commit")], out
    assert "$ git merge" in out


@long
@pytest.mark.parametrize("shell", ["bash", "busybox", "dash", "ksh", "mksh", "yash", "zsh"])
def test_demo_runs_as_well_under(start_demo: Any, home: Path, shell: str) -> None:
    (home / "bin").mkdir()
    (home / "bin" / "sh").symlink_to(need(shell, shell))
    start_demo(PATH=f"{home}/bin:{os.environ['PATH']}").signs_all()


def test_demo_uses_no_setting_of_the_users(start_demo: Any, home: Path) -> None:
    config = home / "gitconfig"
    config.write_text('[gpg "ssh"]\nprogram = /nonexistent\n[core]\nhooksPath = /nonexistent\n')
    (home / "hashlib.py").write_text("raise SystemExit('not the real one')\n")
    nowhere = dict.fromkeys(["GIT_DIR", "SSH_AUTH_SOCK"], str(home / "nowhere"))
    nobody = dict.fromkeys(["SSH_AGENT_PROXY_URL", "http_proxy", "HTTP_PROXY"], "http://127.0.0.1:9")
    wrong = {"SSH_AGENT_PROXY_ADDR": "nonsense", "SSH_AGENT_PROXY_NAMESPACE": "file"}
    theirs = {"GIT_CONFIG_GLOBAL": str(config), "PYTHONPATH": str(home)}
    start_demo(**nowhere, **nobody, **wrong, **theirs).signs_all()


def interrupt(home: Path, moment: str, kind: Any) -> str:
    """A PATH on which a command like MOMENT interrupts the demo: so each moment is met exactly,
    whatever the machine is doing."""
    number, group = kind
    when, command = moment.split(" ", 1)
    tool = command.split(" ", 1)[0]
    real = f"'{shutil.which(tool)}' \"$@\""
    steps = [
        f"until [ -s '{home}/demo.pid' ]; do :; done",
        f"kill -{int(number)} {group}$(cat '{home}/demo.pid')",
        f"touch '{home}/interrupted'",
    ]
    steps = [*steps, f"exec {real}"] if when == "before" else [real, *steps]
    pattern = command.replace(" ", "\\ ")
    met = f'case "{tool} $*" in {pattern}) ;; *) exec {real} ;; esac'
    return stand_in(home / "interrupting", tool, "\n".join([met, *steps]))


MOMENTS = [
    pytest.param("after mktemp *", SIGTERM, "sh"),
    pytest.param("before git commit *", CTRL_C, "sh"),
    pytest.param("before git --version", SIGTERM, "sh", marks=long),
    pytest.param("after mktemp *", CTRL_C, "sh", marks=long),
    # Where $! is 0 before a process was started, and `kill 0` means everybody.
    pytest.param("after mktemp *", SIGTERM, "yash", marks=long),
    pytest.param("before ssh-add *", CTRL_C, "sh", marks=long),
    pytest.param("before sed *", SIGTERM, "sh", marks=long),
]


@pytest.mark.parametrize(("moment", "kind", "shell"), MOMENTS)
def test_interrupted_demo_leaves_nothing(
        start_demo: Any, home: Path, moment: str, kind: Any, shell: str) -> None:  # fmt: skip
    path = interrupt(home, moment, kind)
    (home / "interrupting" / "sh").symlink_to(need(shell, shell))
    demo = start_demo(PATH=path)
    out = demo.end()
    assert demo.process.returncode == 128 + kind[0], out
    assert "Nothing of it stays" not in out


@pytest.mark.parametrize("kind", [SIGTERM, *long_rows(CTRL_C)])
def test_interrupted_cleaning_goes_on(start_demo: Any, home: Path, kind: Any) -> None:
    start_demo(PATH=interrupt(home, "before rm -rf *-demo.??????", kind)).signs_all()
    assert (home / "interrupted").exists()


@pytest.mark.parametrize("kind", [SIGTERM, *long_rows(CTRL_C)])
def test_interrupted_make_leaves_nothing(start_demo: Any, home: Path, kind: Any) -> None:
    # The signal goes to make, which has to pass it on to the demo and wait for it.
    demo = start_demo([MAKE, "demo"], PATH=interrupt(home, "before git tag *", kind))
    out = demo.end()
    assert demo.process.returncode != 0
    assert out.count('Good "git" signature') == 1, out


@long
def test_demo_whose_reader_goes_away_leaves_nothing(start_demo: Any) -> None:
    demo = start_demo()
    for line in demo.process.stdout:
        if line.startswith(b"The proxy stands"):
            break
    demo.process.stdout.close()
    demo.end()
    assert demo.process.returncode != 0


# What is broken, and how; what is told then, the last of it by the proxy's log.
BROKEN = [
    ("ssh_agent_proxy.py", "raise SystemExit('no proxy today')\n",
     ["the proxy did not start", "no proxy today"]),
    ("shim.sh", 'case $* in *"-Y sign"*) echo "no signature today" >&2; exit 1 ;; esac\n',
     ["no signature today", "listening on"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "script", "told"), BROKEN)
def test_demo_shows_why_it_failed(
        start_demo: Any, tree: Path, name: str, script: str, told: List[str]) -> None:  # fmt: skip
    first_line, _, rest = (tree / name).read_text().partition("\n")
    (tree / name).write_text(f"{first_line}\n{script}{rest}")
    demo = start_demo()
    out = demo.end()
    assert demo.process.returncode not in (0, 130, 143)
    for line in told:
        assert line in out


# ---------------------------------------------------------------- what is missing


def path_without(tool: str, folder: Path) -> str:
    """A PATH on which the programs of demo and test stand, but for TOOL."""
    folder.mkdir()
    openssh = ["ssh", "ssh-agent", "ssh-add", "ssh-keygen"]
    for program in ["sh", "env", "dirname", "git", "curl", *openssh]:
        found = shutil.which(program)
        if program != tool and found:
            (folder / program).symlink_to(found)
    return str(folder)


def refused(tree: Path, home: Path, target: str, *args: str, **env: str) -> str:
    """What make TARGET says when it does not want to, having started and made nothing."""
    before = files(tree)
    answer = make(tree, home, target, *args, check=False, **env)
    assert answer.returncode != 0
    assert answer.stdout == b""
    assert files(tree) == before
    assert files(home / "tmp") == []
    return answer.stderr.decode()


POOR = f"case $2 in *ensurepip*) exit 1 ;; esac; exec '{PYTHON}' \"$@\""
CLIENT = "openssh-client", "openssh-clients"
VENV = "python{}.{}-venv".format(*sys.version_info[:2])
# What is missing, or what a stand-in says or does; what make says of it, and the packages.
LACKS = [
    ("demo", "git", "", "git", "git", "git"),
    ("demo", "ssh-add", "", "ssh-add", *CLIENT),
    ("test", "ssh-agent", "", "ssh-agent", *CLIENT),
    ("test-all", "ssh-keygen", "", "ssh-keygen", *CLIENT),
    ("bench", "curl", "", "curl", "curl", "curl"),
    ("demo", "python-of-tomorrow", "", "python-of-tomorrow", "python3", "python3"),
    ("build", "python-of-tomorrow", "", "python-of-tomorrow", "python3", "python3"),
    ("demo", "git", "echo git version 2.30.2", "git 2.34 or newer (here: 2.30.2)", "git", "git"),
    ("demo", "curl", "echo curl 7.64.0", "curl 7.68 or newer (here: 7.64.0)", "curl", "curl"),
    ("test", "python3", "echo 3.8.18", "python3 3.9 or newer (here: 3.8.18)", *["python3"] * 2),
    # As Debian's Python is before python3-venv.
    ("lint", "python3", POOR, "the venv module of python3", VENV, "python3"),
]


@pytest.mark.parametrize(("target", "tool", "script", "told", "debian", "fedora"), LACKS)
def test_what_a_target_lacks_is_named_before_it_does_anything(
    tree: Path, home: Path, target: str, tool: str, script: str, told: str, debian: str, fedora: str
) -> None:
    path = stand_in(home / "old", tool, script) if script else path_without(tool, home / "bin")
    python = tool if tool.startswith("python") else PYTHON
    says = refused(tree, home, target, f"PYTHON={python}", PATH=path)
    assert f"missing: {told}\n" in says
    assert re.search(f"(?m)Debian, Ubuntu: +apt-get install {debian}$", says)
    assert re.search(f"(?m)Fedora: +dnf install {fedora}$", says)
    assert re.search(r"(?m)Alpine: +apk add \S+$", says)
    assert re.search(r"(?m)macOS: +brew install \S+$", says)


def test_packages_are_named_once(home: Path) -> None:
    env = clean_env(home, PATH="/nonexistent", PYTHON="/nonexistent/python")
    argv = [shutil.which("sh"), ROOT / "contrib" / "need.sh", "python", "venv", "git", "ssh-add"]
    answer = run([*argv, "curl", "ssh-agent", "ssh-keygen"], env=env, check=False)
    assert answer.returncode == 1
    told = answer.stderr.decode()
    assert "missing: /nonexistent/python, git, ssh-add, curl, ssh-agent, ssh-keygen\n" in told
    assert re.search("(?m)apt-get install python3 git openssh-client curl$", told)


# ---------------------------------------------------------------- install, uninstall, clean


INSTALLED = ["ssh-agent-proxy", "ssh-agent-proxy-sign"]


def without_folders(folder: Path) -> Dict[str, int]:
    return {name: mode(folder / name) for name in files(folder) if not (folder / name).is_dir()}


def test_install_replaces_what_is_there(tree: Path, home: Path) -> None:
    bindir = home / "bin"
    bindir.mkdir()
    (home / "theirs").write_text("theirs")
    (bindir / "ssh-agent-proxy").symlink_to(home / "theirs")
    (bindir / "ssh-agent-proxy-sign").write_text("old")
    for _ in range(2):
        path = f"{bindir}:{os.environ['PATH']}"
        told = make(tree, home, "install", f"BINDIR={bindir}", PATH=path).stdout.decode()
        assert "is not on your PATH" not in told
        assert without_folders(bindir) == dict.fromkeys(INSTALLED, 0o755)
        assert not (bindir / "ssh-agent-proxy").is_symlink()
        assert (bindir / "ssh-agent-proxy-sign").read_bytes() == (tree / "shim.sh").read_bytes()
    assert (home / "theirs").read_text() == "theirs"


def test_a_package_is_installed_below_destdir_and_removed_from_there(
        tree: Path, home: Path) -> None:  # fmt: skip
    settings = ["PREFIX=/usr", "DESTDIR=the package"]
    package = tree / "the package"
    bindir = package / "usr" / "bin"
    bindir.mkdir(parents=True)
    (bindir / "ssh-agent").write_text("another program")
    (bindir / "ssh-agent-proxy-sign.old").symlink_to("ssh-agent")
    (bindir / ".ssh-agent-proxy").write_text("hidden")
    before = snapshot(package)
    make(tree, home, "install", *settings)
    assert set(snapshot(package)) - set(before) == {f"usr/bin/{name}" for name in INSTALLED}
    for _ in range(2):
        make(tree, home, "uninstall", *settings)
        assert snapshot(package) == before
    assert files(home) == ["tmp"]


@pytest.mark.parametrize("name", ["it's a \"b\"  `c` #1;&<d>(e) *?[f]\\ü", "-rf"])
def test_a_home_may_have_any_name(tree: Path, home: Path, short: Path, name: str) -> None:
    user = short / name
    user.mkdir()
    bindir = user / ".local" / "bin"
    told = make(tree, home, "help", HOME=str(user)).stdout.decode()
    assert f"PREFIX           {user}/.local " in told
    told = make(tree, home, "install", HOME=str(user)).stdout.decode()
    assert f"Installed ssh-agent-proxy and ssh-agent-proxy-sign in {bindir}\n" in told
    assert f"\n{bindir} is not on your PATH" in told
    assert without_folders(user) == {f".local/bin/{name}": 0o755 for name in INSTALLED}
    make(tree, home, "uninstall", HOME=str(user))
    assert files(user) == [".local", ".local/bin"], "folders stay, whoever made them"
    # All of this in each variable, at once.
    settings = [f"PREFIX={user}/{name}", f"DESTDIR={short}/{name}"]
    below = Path(f"{short}/{name}{user}/{name}/bin")
    told = make(tree, home, "install", *settings).stdout.decode()
    assert "is not on your PATH" not in told
    assert without_folders(below) == dict.fromkeys(INSTALLED, 0o755)
    make(tree, home, "uninstall", *settings)
    assert without_folders(user) == {}


CLOSED = [
    ("closed", "it is not writable"),
    ("closed/bin", "Permission denied"),
    ("file", "File exists"),
    ("file/bin", "Not a directory"),
]


@pytest.mark.parametrize(("name", "why"), CLOSED)
def test_a_bindir_that_cannot_be_written_to_is_one_clear_line(
        tree: Path, home: Path, short: Path, name: str, why: str) -> None:  # fmt: skip
    (short / "closed").mkdir(mode=0o555)
    (short / "file").write_text("theirs")
    argv = [*bound_by_modes(), MAKE, "install", f"PYTHON={PYTHON}", f"BINDIR={short / name}"]
    answer = run(argv, cwd=tree, env=clean_env(home), check=False)
    assert answer.returncode != 0
    lines = answer.stderr.decode().splitlines()
    assert lines[0] == f"cannot install into {short / name}: {why}"
    assert "make install BINDIR=$HOME/bin" in lines[1]
    assert [line for line in lines[2:] if not line.startswith("make: ***")] == []
    assert files(short / "closed") == []
    assert (short / "file").read_text() == "theirs"


@pytest.mark.parametrize("name", INSTALLED)
def test_a_folder_in_a_programs_place_is_not_filled(tree: Path, home: Path, name: str) -> None:
    (home / "bin" / name).mkdir(parents=True)
    answer = make(tree, home, "install", f"BINDIR={home}/bin", check=False)
    assert answer.returncode != 0
    told = answer.stderr.decode()
    assert f"{home}/bin/{name} is a folder, and no program: move it away\n" in told
    assert files(home / "bin" / name) == []


# The tool that is interrupted, and when; by what.
HALF = 'for word; do from=$to to=$word; done; head -c 1000 "$from" >"$to"'
INSTALLING = {
    "half copied": ("install", f"{HALF}\nINTERRUPTION\nREAL"),
    "copied": ("mv", "INTERRUPTION\nREAL"),
    "moved": ("mv", "REAL\nINTERRUPTION"),
}
INTERRUPTIONS = {
    "ctrl-c": "kill -INT 0",
    "sigterm": 'until [ -s "$PID_FILE" ]; do :; done; kill -TERM $(cat "$PID_FILE")',
    "sigkill": "kill -KILL 0",
}


@pytest.mark.parametrize("how", ["ctrl-c", *long_rows("sigterm", "sigkill")])
@pytest.mark.parametrize("moment", ["half copied", *long_rows("copied", "moved")])
@pytest.mark.parametrize("program", INSTALLED)
def test_an_interrupted_install_leaves_the_old_or_the_new(
    tree: Path, home: Path, short: Path, program: str, moment: str, how: str
) -> None:
    bindir, pid_file = short / "bin", home / "pid"
    bindir.mkdir()
    for name in INSTALLED:
        (bindir / name).write_text("old")
    tool, steps = INSTALLING[moment]
    met = f"case $* in */.{program}.new*) ;; *) exec REAL ;; esac\n{steps}"
    met = met.replace("REAL", f"'{shutil.which(tool)}' \"$@\"")
    path = stand_in(home / "interrupting", tool, met.replace("INTERRUPTION", INTERRUPTIONS[how]))
    argv = [MAKE, "install", f"PYTHON={PYTHON}", f"BINDIR={bindir}"]
    process = start(argv, tree, clean_env(home, PATH=path, PID_FILE=pid_file))
    pid_file.write_text(str(process.pid))
    told = process.communicate(timeout=60)[0].decode()
    assert process.returncode != 0, told
    wait_for(lambda: not alive(process.pid), message="all of make is gone")
    sources = [tree / "dist" / "ssh-agent-proxy", tree / "shim.sh"]
    new = {name: source.read_bytes() for name, source in zip(INSTALLED, sources)}
    for name in INSTALLED:
        assert (bindir / name).read_bytes() in (b"old", new[name])
    if how != "sigkill":  # which nobody can clean up after
        assert files(bindir) == INSTALLED
    make(tree, home, "install", f"BINDIR={bindir}")
    assert {name: (bindir / name).read_bytes() for name in files(bindir)} == new


@pytest.mark.parametrize("target", ["install", "uninstall"])
def test_a_bindir_that_no_shell_expanded_is_refused(tree: Path, home: Path, target: str) -> None:
    told = refused(tree, home, target, "BINDIR=~/bin")
    assert "BINDIR must be an absolute path, not ~/bin" in told


def test_clean_removes_what_was_made(tree: Path, home: Path) -> None:
    before = files(tree)
    make(tree, home, "build")
    for made in (".venv/3.9/bin", "__pycache__", ".mypy_cache", ".ruff_cache"):
        (tree / made).mkdir(parents=True)
    make(tree, home, "clean")
    assert files(tree) == before
