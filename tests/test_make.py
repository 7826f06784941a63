"""The Makefile: its demo, what it builds, installs and removes, and what it says is missing."""

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
from conftest import ROOT, clean_env, need, run, wait_for

MAKE = shutil.which("make") or "make"
# Not the venv's link: its path may be long or have a blank in it, where the project's has.
PYTHON = os.path.realpath(sys.executable)
SIGNALS = {"ctrl-c": (signal.SIGINT, "-"), "sigterm": (signal.SIGTERM, "")}


@pytest.fixture
def tree(short: Path) -> Path:
    return copy_project(short / "a tree")


def copy_project(path: Path) -> Path:
    """Without its history, its tests, and what was made in it."""
    made = shutil.ignore_patterns(".git", ".venv", "dist", "tests", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, path, ignore=made)
    return path


def make(
    tree: Path, home: Path, *args: str, check: bool = True, **env: str
) -> "subprocess.CompletedProcess[bytes]":
    argv = [MAKE, "--no-print-directory", *args]
    if not any(arg.startswith("PYTHON=") for arg in args) and "PYTHON" not in env:
        argv.append(f"PYTHON={PYTHON}")
    return run(argv, cwd=tree, env=clean_env(home, **env), check=check)


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


def bound_by_modes() -> List[str]:
    """In front of a command: file modes bind it, as they bind everybody but root."""
    if os.geteuid() != 0:
        return []
    powers = "--bounding-set=-dac_override,-dac_read_search"
    return [need("setpriv", "util-linux"), powers, "--inh-caps=-all"]


# ---------------------------------------------------------------- help


def test_make_alone_lists_every_target(tree: Path, home: Path) -> None:
    targets = re.findall(r"(?m)^([a-z-]+):.*##", (tree / "Makefile").read_text())
    assert {"help", "demo", "run", "test", "lint", "check", "bench"} <= set(targets)
    assert {"build", "install", "uninstall", "clean"} <= set(targets)
    listed = re.findall(r"(?m)^make ([a-z-]+) +\S", make(tree, home).stdout.decode())
    assert listed == targets


def test_help_shows_where_things_would_be_installed(tree: Path, home: Path) -> None:
    told = make(tree, home, "help", "PREFIX=/usr", "DESTDIR=/package").stdout.decode()
    assert re.search(r"(?m)^BINDIR +/usr/bin ", told)
    assert re.search(r"(?m)^DESTDIR +/package ", told)


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
        # A runner in the background ignores SIGINT, and what it starts inherits that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = subprocess.Popen(
                argv or ["sh", "contrib/demo.sh"],
                cwd=tree,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        (home / "demo.pid").write_text(f"{self.process.pid}\n")

    def end(self) -> str:
        """What it printed, once it has ended and has been seen to leave nothing."""
        out = b""
        if self.process.stdout and not self.process.stdout.closed:
            out, _ = self.process.communicate(timeout=60)
        self.process.wait(60)
        # One that was interrupted together with it may need a moment to be gone.
        wait_for(lambda: not session(self.process.pid), 1, "the demo's processes are gone")
        assert files(self.tmp) == []
        assert files(self.home) == []
        return out.decode()

    def kill(self) -> None:
        for line in session(self.process.pid):
            os.kill(int(line.split()[0]), signal.SIGKILL)
        if self.process.stdout:
            self.process.stdout.close()
        self.process.wait(10)


@pytest.fixture
def start_demo(tree: Path, home: Path) -> Iterator[Any]:
    started: List[Demo] = []

    def start(argv: Optional[List[str]] = None, **env: str) -> Demo:
        started.append(Demo(tree, home, argv, **env))
        return started[-1]

    yield start
    for demo in started:
        demo.kill()


def session(number: int) -> List[str]:
    """PID and command of each live process of a session."""
    if sys.platform == "linux":
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                command = (folder / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == number and fields[0] != "Z":
                found.append(f"{folder.name} {command!r}")
        return found
    # Elsewhere by the group: none of the demo's processes leaves it.
    lines = run(["ps", "-A", "-o", "pgid=,pid=,stat=,command="]).stdout.decode().splitlines()
    rows = [line.split(None, 3) for line in lines]
    return [" ".join(row[1:]) for row in rows if row[0] == str(number) and row[2][0] != "Z"]


def test_demo_signs_a_commit_a_tag_and_a_merge(start_demo: Any) -> None:
    demo = start_demo([MAKE, "demo"])
    out = demo.end()
    assert demo.process.returncode == 0, out
    good = re.findall(r'\$ git verify-(\w+) \w+\nGood "git" signature for (\S+) with ED25519', out)
    assert good == [(kind, "demo@example.com") for kind in ("commit", "tag", "commit")], out
    assert "$ git merge" in out


@pytest.mark.parametrize("shell", ["bash", "busybox", "dash", "ksh", "mksh", "yash", "zsh"])
def test_demo_runs_as_well_under(start_demo: Any, home: Path, shell: str) -> None:
    (home / "bin").mkdir()
    (home / "bin" / "sh").symlink_to(need(shell, shell))
    demo = start_demo(PATH=f"{home}/bin:{os.environ['PATH']}")
    out = demo.end()
    assert demo.process.returncode == 0, out
    assert out.count('Good "git" signature') == 3


def test_demo_uses_no_setting_of_the_users(start_demo: Any, home: Path) -> None:
    config = home / "gitconfig"
    config.write_text('[gpg "ssh"]\nprogram = /nonexistent\n[core]\nhooksPath = /nonexistent\n')
    modules = home / "modules"
    modules.mkdir()
    (modules / "hashlib.py").write_text("raise SystemExit('not the real one')\n")
    demo = start_demo(
        GIT_CONFIG_GLOBAL=str(config),
        GIT_DIR="/nonexistent",
        PYTHONPATH=str(modules),
        SSH_AUTH_SOCK="/nonexistent",
        SSH_AGENT_PROXY_ADDR="nonsense",
        SSH_AGENT_PROXY_NAMESPACE="file",
        SSH_AGENT_PROXY_URL="http://127.0.0.1:9/sign",
        http_proxy="http://127.0.0.1:9",
        HTTP_PROXY="http://127.0.0.1:9",
    )
    out = demo.end()
    assert demo.process.returncode == 0, out
    assert out.count('Good "git" signature') == 3


@pytest.fixture
def interrupt(home: Path) -> Any:
    """interrupt(MOMENT, KIND): a PATH on which a command like MOMENT interrupts the demo.

    So each moment is met exactly, whatever the machine is doing. Ctrl-C goes to all processes,
    SIGTERM to the demo's shell alone.
    """

    def prepare(moment: str, kind: str) -> str:
        number, group = SIGNALS[kind]
        when, command = moment.split(" ", 1)
        tool = command.split(" ", 1)[0]
        pattern = command.replace(" ", "\\ ")
        folder = home / "interrupting"
        folder.mkdir()
        script = folder / tool
        script.write_text(
            "#!/bin/sh\n"
            "interrupt() {\n"
            f"    until [ -s '{home}/demo.pid' ]; do :; done\n"
            f"    kill -{int(number)} {group}$(cat '{home}/demo.pid')\n"
            f"    touch '{home}/interrupted'\n"
            "}\n"
            f'case "{tool} $*" in\n'
            f"{pattern}) [ {when} = after ] || interrupt ;;\n"
            f"*) exec '{shutil.which(tool)}' \"$@\" ;;\n"
            "esac\n"
            f"'{shutil.which(tool)}' \"$@\"\n"
            "status=$?\n"
            f"[ {when} = before ] || interrupt\n"
            "exit $status\n"
        )
        script.chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"

    return prepare


MOMENTS = [
    "before git --version",
    "after mktemp *",
    "before ssh-add *",
    "before sed *",
    "after git init *",
    "before git commit *",
    "before git merge *",
]


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_demo_leaves_nothing(
    start_demo: Any, interrupt: Any, moment: str, kind: str
) -> None:
    demo = start_demo(PATH=interrupt(moment, kind))
    out = demo.end()
    assert demo.process.returncode == 128 + SIGNALS[kind][0], out
    assert "Nothing of it stays" not in out


def test_demo_interrupted_before_it_started_a_process_ends_itself_alone(
    start_demo: Any, interrupt: Any, home: Path
) -> None:
    # In yash $! is 0 then, and `kill 0` means everybody.
    path = interrupt("after mktemp *", "sigterm")
    (home / "interrupting" / "sh").symlink_to(need("yash", "yash"))
    demo = start_demo(PATH=path)
    out = demo.end()
    assert demo.process.returncode == 128 + signal.SIGTERM, out


@pytest.mark.parametrize("kind", SIGNALS)
def test_interrupted_cleaning_goes_on(
    start_demo: Any, interrupt: Any, home: Path, kind: str
) -> None:
    demo = start_demo(PATH=interrupt("before rm -rf *-demo.??????", kind))
    out = demo.end()
    assert (home / "interrupted").exists()
    assert demo.process.returncode == 0, out


@pytest.mark.parametrize("kind", SIGNALS)
def test_interrupted_make_leaves_nothing(start_demo: Any, interrupt: Any, kind: str) -> None:
    # The signal goes to make, which has to pass it on to the demo and wait for it.
    demo = start_demo([MAKE, "demo"], PATH=interrupt("before git tag *", kind))
    out = demo.end()
    assert demo.process.returncode != 0
    assert out.count('Good "git" signature') == 1, out


def test_demo_whose_reader_goes_away_leaves_nothing(start_demo: Any) -> None:
    demo = start_demo()
    for line in demo.process.stdout:
        if line.startswith(b"The proxy stands"):
            break
    demo.process.stdout.close()
    demo.end()
    assert demo.process.returncode != 0


def test_demo_shows_why_the_proxy_did_not_start(start_demo: Any, tree: Path) -> None:
    (tree / "ssh_agent_proxy.py").write_text("raise SystemExit('no proxy today')\n")
    demo = start_demo()
    out = demo.end()
    assert demo.process.returncode == 1
    assert "the proxy did not start" in out
    assert "no proxy today" in out


def test_demo_shows_why_git_could_not_sign(start_demo: Any, tree: Path) -> None:
    shim = (tree / "shim.sh").read_text()
    (tree / "shim.sh").write_text(
        '#!/bin/sh\ncase $* in *"-Y sign"*) echo "no signature today" >&2; exit 1 ;; esac\n'
        + shim.partition("\n")[2]
    )
    demo = start_demo()
    out = demo.end()
    assert demo.process.returncode not in (0, 130, 143)
    assert "no signature today" in out
    assert "listening on" in out, "the proxy's log is shown too"


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


def stand_in(folder: Path, name: str, script: str) -> str:
    """A PATH that finds SCRIPT as NAME first."""
    folder.mkdir()
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def refused(tree: Path, home: Path, target: str, *args: str, **env: str) -> str:
    """What make TARGET says when it does not want to, having started and made nothing."""
    before = files(tree)
    answer = make(tree, home, target, *args, check=False, **env)
    assert answer.returncode != 0
    assert answer.stdout == b""
    assert files(tree) == before
    assert files(home / "tmp") == []
    return answer.stderr.decode()


@pytest.mark.parametrize("target", ["demo", "test"])
@pytest.mark.parametrize(
    ("tool", "debian", "fedora"),
    [
        ("git", "git", "git"),
        ("curl", "curl", "curl"),
        ("ssh-agent", "openssh-client", "openssh-clients"),
        ("ssh-add", "openssh-client", "openssh-clients"),
        ("ssh-keygen", "openssh-client", "openssh-clients"),
    ],
)
def test_a_missing_tool_is_named(
    tree: Path, home: Path, target: str, tool: str, debian: str, fedora: str
) -> None:
    told = refused(tree, home, target, PATH=path_without(tool, home / "bin"))
    assert f"missing: {tool}\n" in told
    assert re.search(f"(?m)Debian, Ubuntu: +apt-get install {debian}$", told)
    assert re.search(f"(?m)Fedora: +dnf install {fedora}$", told)
    assert re.search(f"(?m)Alpine: +apk add {debian}$", told)
    assert re.search(r"(?m)macOS: +brew install \S+$", told)


def test_packages_are_named_once(home: Path) -> None:
    env = clean_env(home, PATH="/nonexistent", PYTHON="/nonexistent/python")
    tools = ["python", "venv", "git", "ssh-add", "curl", "ssh-agent", "ssh-keygen"]
    sh = shutil.which("sh")
    answer = run([sh, ROOT / "contrib" / "need.sh", *tools], env=env, check=False)
    assert answer.returncode == 1
    told = answer.stderr.decode()
    assert "missing: /nonexistent/python, git, ssh-add, curl, ssh-agent, ssh-keygen\n" in told
    assert re.search("(?m)apt-get install python3 git openssh-client curl$", told)


@pytest.mark.parametrize("target", ["demo", "test", "lint", "build"])
def test_a_missing_python_is_named(tree: Path, home: Path, target: str) -> None:
    told = refused(tree, home, target, "PYTHON=python-of-tomorrow")
    assert "missing: python-of-tomorrow\n" in told
    assert re.search("(?m)apt-get install python3$", told)


@pytest.mark.parametrize(
    ("tool", "says", "told"),
    [
        ("git", "git version 2.30.2", "git 2.34 or newer (here: 2.30.2)"),
        ("curl", "curl 7.64.0 (x86_64-pc-linux-gnu)", "curl 7.68 or newer (here: 7.64.0)"),
    ],
)
def test_a_tool_that_is_too_old_is_named(
    tree: Path, home: Path, tool: str, says: str, told: str
) -> None:
    path = stand_in(home / "old", tool, f"echo '{says}'")
    assert f"missing: {told}\n" in refused(tree, home, "demo", PATH=path)


def test_a_python_that_is_too_old_is_named(tree: Path, home: Path) -> None:
    stand_in(home / "old", "python", "echo 3.8.18")
    told = refused(tree, home, "test", f"PYTHON={home}/old/python")
    assert "old/python 3.9 or newer (here: 3.8.18)" in told


@pytest.mark.parametrize("target", ["test", "lint"])
def test_a_python_without_venv_is_told_its_package(tree: Path, home: Path, target: str) -> None:
    # As Debian's is before python3-venv.
    script = f"case $2 in *ensurepip*) exit 1 ;; esac; exec '{PYTHON}' \"$@\""
    stand_in(home / "poor", "python", script)
    told = refused(tree, home, target, f"PYTHON={home}/poor/python")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert re.search(f"(?m)apt-get install python{version}-venv$", told)


# ---------------------------------------------------------------- install, uninstall, clean


INSTALLED = ["ssh-agent-proxy", "ssh-agent-proxy-sign"]


def without_folders(folder: Path) -> Dict[str, int]:
    return {name: mode(folder / name) for name in files(folder) if not (folder / name).is_dir()}


def test_install_puts_two_programs_below_the_home(tree: Path, home: Path, short: Path) -> None:
    user = short / "the user"
    user.mkdir()
    told = make(tree, home, "install", HOME=str(user)).stdout.decode()
    bindir = user / ".local" / "bin"
    assert without_folders(user) == {f".local/bin/{name}": 0o755 for name in INSTALLED}
    assert f"Installed ssh-agent-proxy and ssh-agent-proxy-sign in {bindir}\n" in told
    assert f"{bindir} is not on your PATH" in told


def test_install_is_quiet_about_a_path_that_is_right(tree: Path, home: Path) -> None:
    path = f"{home}/bin:{os.environ['PATH']}"
    told = make(tree, home, "install", f"BINDIR={home}/bin", PATH=path).stdout.decode()
    assert "is not on your PATH" not in told


def test_install_for_a_package_goes_below_destdir(tree: Path, home: Path, short: Path) -> None:
    package = short / "the package"
    told = make(tree, home, "install", "PREFIX=/usr", f"DESTDIR={package}").stdout.decode()
    assert without_folders(package) == {f"usr/bin/{name}": 0o755 for name in INSTALLED}
    assert files(home) == ["tmp"]
    assert "is not on your PATH" not in told


def test_install_replaces_what_is_there(tree: Path, home: Path) -> None:
    bindir = home / "bin"
    bindir.mkdir()
    (home / "theirs").write_text("theirs")
    (bindir / "ssh-agent-proxy").symlink_to(home / "theirs")
    (bindir / "ssh-agent-proxy-sign").write_text("old")
    make(tree, home, "install", f"BINDIR={bindir}")
    assert files(bindir) == INSTALLED
    assert not (bindir / "ssh-agent-proxy").is_symlink()
    assert (home / "theirs").read_text() == "theirs"
    assert (bindir / "ssh-agent-proxy-sign").read_bytes() == (tree / "shim.sh").read_bytes()


def test_uninstall_removes_what_install_put_there(tree: Path, home: Path, short: Path) -> None:
    settings = ["PREFIX=/usr", f"DESTDIR={short / 'package'}"]
    bindir = short / "package" / "usr" / "bin"
    bindir.mkdir(parents=True)
    (bindir / "ssh-agent").write_text("another program")
    make(tree, home, "install", *settings)
    make(tree, home, "uninstall", *settings)
    assert files(bindir) == ["ssh-agent"]
    make(tree, home, "uninstall", *settings)


def test_uninstall_leaves_everything_as_it_was_before_install(
    tree: Path, home: Path, short: Path
) -> None:
    package = short / "package"
    bindir = package / "usr" / "bin"
    bindir.mkdir(parents=True)
    (bindir / "ssh-agent").write_text("another program")
    (bindir / "ssh-agent-proxy-sign.old").symlink_to("ssh-agent")
    (bindir / ".ssh-agent-proxy").write_text("hidden")
    before = snapshot(package)
    make(tree, home, "install", "PREFIX=/usr", f"DESTDIR={package}")
    assert set(snapshot(package)) - set(before) == {f"usr/bin/{name}" for name in INSTALLED}
    make(tree, home, "uninstall", "PREFIX=/usr", f"DESTDIR={package}")
    assert snapshot(package) == before
    assert files(home) == ["tmp"]


def test_uninstall_leaves_the_folders_that_install_made(
    tree: Path, home: Path, short: Path
) -> None:
    (short / "user").mkdir()
    make(tree, home, "install", HOME=str(short / "user"))
    make(tree, home, "uninstall", HOME=str(short / "user"))
    assert files(short / "user") == [".local", ".local/bin"]


def test_install_twice_is_as_good_as_once(tree: Path, home: Path, short: Path) -> None:
    make(tree, home, "install", f"BINDIR={short}/bin")
    once = snapshot(short / "bin")
    make(tree, home, "install", f"BINDIR={short}/bin")
    assert snapshot(short / "bin") == once


def test_a_destdir_may_be_relative(tree: Path, home: Path) -> None:
    make(tree, home, "install", "PREFIX=/usr", "DESTDIR=the package")
    installed = {f"usr/bin/{name}": 0o755 for name in INSTALLED}
    assert without_folders(tree / "the package") == installed
    make(tree, home, "uninstall", "PREFIX=/usr", "DESTDIR=the package")
    assert without_folders(tree / "the package") == {}


AWKWARD = ["two  blanks", "it's", 'a "quoted" one', "a;b&c<d>(e)", "`f` *?[g]", "back\\slash", "#1",
           "-rf", "ünïcode"]  # fmt: skip


@pytest.mark.parametrize("name", AWKWARD)
def test_a_home_may_have_any_name(tree: Path, home: Path, short: Path, name: str) -> None:
    user = short / name
    user.mkdir()
    # All of this in each variable, at once.
    settings = [f"PREFIX={user}/{name}", f"DESTDIR={short}/{name}"]
    told = make(tree, home, "help", HOME=str(user)).stdout.decode()
    assert f"PREFIX           {user}/.local " in told
    told = make(tree, home, "install", HOME=str(user)).stdout.decode()
    assert f"\n{user}/.local/bin is not on your PATH" in told
    assert without_folders(user) == {f".local/bin/{name}": 0o755 for name in INSTALLED}
    make(tree, home, "uninstall", HOME=str(user))
    assert without_folders(user) == {}
    make(tree, home, "install", *settings)
    below = Path(f"{short}/{name}{user}/{name}/bin")
    assert without_folders(below) == dict.fromkeys(INSTALLED, 0o755)
    make(tree, home, "uninstall", *settings)
    assert without_folders(user) == {}


CLOSED = {
    "a folder that is not ours": ("closed", "it is not writable"),
    "a folder in one that is not ours": ("closed/bin", "Permission denied"),
    "a file": ("file", "File exists"),
    "a folder in a file": ("file/bin", "Not a directory"),
}


@pytest.mark.parametrize("what", CLOSED)
def test_a_bindir_that_cannot_be_written_to_is_one_clear_line(
    tree: Path, home: Path, short: Path, what: str
) -> None:
    name, why = CLOSED[what]
    (short / "closed").mkdir(mode=0o555)
    (short / "file").write_text("theirs")
    before = snapshot(short / "closed")
    argv = [*bound_by_modes(), MAKE, "install", f"PYTHON={PYTHON}", f"BINDIR={short / name}"]
    answer = run(argv, cwd=tree, env=clean_env(home), check=False)
    assert answer.returncode != 0
    lines = answer.stderr.decode().splitlines()
    assert lines[0] == f"cannot install into {short / name}: {why}"
    assert "make install BINDIR=$HOME/bin" in lines[1]
    assert [line for line in lines[2:] if not line.startswith("make: ***")] == []
    assert snapshot(short / "closed") == before
    assert (short / "file").read_text() == "theirs"


@pytest.mark.parametrize("name", INSTALLED)
def test_a_folder_in_a_programs_place_is_not_filled(tree: Path, home: Path, name: str) -> None:
    (home / "bin" / name).mkdir(parents=True)
    answer = make(tree, home, "install", f"BINDIR={home}/bin", check=False)
    assert answer.returncode != 0
    assert f"{home}/bin/{name} is a folder, and no program: move it away\n" in (
        answer.stderr.decode()
    )
    assert files(home / "bin" / name) == []


HALF = 'for word; do from=$to to=$word; done; head -c 1000 "$from" >"$to"'
INTERRUPTIONS = {
    "ctrl-c": "kill -INT 0",
    "sigterm": 'until [ -s "$PID_FILE" ]; do :; done; kill -TERM $(cat "$PID_FILE")',
    "sigkill": "kill -KILL 0",
}


@pytest.mark.parametrize("how", INTERRUPTIONS)
@pytest.mark.parametrize("moment", ["half copied", "copied", "moved"])
@pytest.mark.parametrize("program", INSTALLED)
def test_an_interrupted_install_leaves_the_old_or_the_new(
    tree: Path, home: Path, short: Path, program: str, moment: str, how: str
) -> None:
    bindir = short / "bin"
    bindir.mkdir()
    for name in INSTALLED:
        (bindir / name).write_text("old")
    tool = "install" if moment == "half copied" else "mv"
    real = f"'{shutil.which(tool)}' \"$@\""
    steps = {"half copied": [HALF, INTERRUPTIONS[how], real], "copied": [INTERRUPTIONS[how], real],
             "moved": [real, INTERRUPTIONS[how]]}[moment]  # fmt: skip
    met = f"case $* in */.{program}.new*) ;; *) exec {real} ;; esac"
    path = stand_in(home / "interrupting", tool, "\n".join([met, *steps]))
    pid_file = home / "pid"
    # A runner in the background ignores SIGINT, and what it starts inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [MAKE, "install", f"PYTHON={PYTHON}", f"BINDIR={bindir}"],
            cwd=tree,
            env=clean_env(home, PATH=path, PID_FILE=pid_file),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    pid_file.write_text(str(process.pid))
    assert process.wait(60) != 0
    wait_for(lambda: not session(process.pid), message="all of make is gone")
    new = {
        "ssh-agent-proxy": (tree / "dist" / "ssh-agent-proxy").read_bytes(),
        "ssh-agent-proxy-sign": (tree / "shim.sh").read_bytes(),
    }
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
