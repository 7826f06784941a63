"""The user service, under a real systemd of a throwaway account: see systemd-user."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from conftest import RELAY, ROOT, Keys, cannot_run, clean_env, copy_tree, need, rows, run, wait_for
from test_make import make, path_without, refused, stand_in, without_folders

UID = 4242
HOME = Path("/home/tester")
RUNTIME = Path(f"/run/user/{UID}")
UNITS = HOME / ".config/systemd/user"
UNIT = UNITS / "ssh-agent-proxy.service"
SANDBOX = UNITS / "ssh-agent-proxy.service.d/sandbox.conf"
ENV = HOME / ".config/ssh-agent-proxy/env"
TEMPLATE = ROOT / "contrib/systemd/env"
BECOME = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
NAME = "ssh-agent-proxy"
URL = "http://127.0.0.1:7221"
SYSTEMS = (".system", ".journal", ".manager.log")  # in the account's home, of systemd-user


class Manager:
    """A user manager, and an account that has make, git and a copy of the project."""

    def __init__(self, *options: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sap.", dir="/tmp"))
        self.python = os.path.realpath(sys.executable)
        self.make_argv = ["make", "--no-print-directory", f"PYTHON={self.python}"]
        prefix = Path(os.path.realpath(sys.base_prefix))
        mount = [] if str(prefix).startswith("/usr") else ["-p", str(prefix)]
        copy_tree(self.folder / "tree")
        run(["chown", "-R", f"{UID}:{UID}", self.folder])
        self.process = subprocess.Popen(
            [ROOT / "tests/systemd-user", "-u", str(UID), *mount, *options, str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout
        ready = self.process.stdout.readline().split()
        if not ready:
            _, why = self.process.communicate(timeout=60)
            shutil.rmtree(self.folder)
            cannot_run(f"no systemd user manager can be started here: {why.decode().strip()}")
        self.pid = int(ready[1])

    def stop(self) -> None:
        _, said = self.process.communicate(timeout=30)
        shutil.rmtree(self.folder)
        assert said == b"", said.decode()
        assert self.process.returncode == 0

    def outside(self, path: Path) -> Path:
        """Where PATH of the account's home is for us."""
        return self.folder / path.relative_to(HOME)

    def root(self, *argv: Any, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        enter = ["nsenter", "-t", self.pid, "--mount", "--pid", "--net", "--root"]
        return run([*enter, *argv], check=check)

    def run(self, *argv: Any, check: bool = True, **env: str) -> subprocess.CompletedProcess[bytes]:
        variables: Dict[str, str] = {
            "HOME": str(HOME),
            "USER": "tester",
            "LOGNAME": "tester",
            "LANG": "C.UTF-8",
            "PATH": f"{HOME}/.local/bin:/usr/local/bin:/usr/bin:/bin",
            "XDG_RUNTIME_DIR": str(RUNTIME),
            **env,
        }
        env_argv = ["env", "-i", *(f"{name}={value}" for name, value in variables.items())]
        in_tree = ["sh", "-c", 'cd ~/tree && exec "$@"', "sh"]
        return self.root(*BECOME, *env_argv, *in_tree, *argv, check=check)

    def text(self, *argv: Any, **env: str) -> str:
        return self.run(*argv, **env).stdout.decode().strip()

    def sh(self, script: str, **env: str) -> str:
        return self.text("sh", "-euc", script, **env)

    def make(self, *args: str, **env: str) -> str:
        """What it says."""
        return self.run(*self.make_argv, *args, **env).stdout.decode()

    def install(self, **env: str) -> str:
        return self.make("install-systemd", **env)

    def refuses(self, *args: str, **env: str) -> str:
        """What make says as it fails; unless told otherwise, to install the service."""
        argv = [*self.make_argv, *(args or ("install-systemd",))]
        answer = self.run(*argv, check=False, **env)
        assert answer.returncode != 0
        return answer.stderr.decode()

    def answers(self, port: int = 7221) -> bool:
        answer = self.curl(f"http://127.0.0.1:{port}/healthz", check=False)
        assert answer.returncode in (0, 7)  # 7: nothing listens there
        return answer.stdout == b"ok\n"

    def ctl(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        return self.run("systemctl", "--user", *args, check=check)

    def show(self, name: str, unit: str = NAME) -> str:
        return self.ctl("show", f"--property={name}", "--value", unit).stdout.decode().strip()

    def main_pid(self) -> int:
        return int(self.show("MainPID"))

    def write(self, path: Path, text: str, mode: int = 0o600) -> None:
        there = self.outside(path)
        self.run("mkdir", "-p", path.parent)
        there.write_text(text)
        there.chmod(mode)
        os.chown(there, UID, UID)

    def settings(self, **values: Any) -> None:
        """The env file, and a start with it."""
        lines = [f"SSH_AGENT_PROXY_{name}={value}\n" for name, value in values.items()]
        self.write(ENV, "".join(lines))
        self.ctl("restart", NAME)

    def drop_in(self, text: str, name: str = "zz.conf") -> Path:
        """A setting of the user's."""
        path = SANDBOX.with_name(name)
        self.write(path, f"[Service]\n{text}\n", 0o644)
        self.ctl("daemon-reload")
        return path

    def source(self, name: str, change: Callable[[str], str]) -> None:
        """Changes a file of the copy of the project."""
        path = self.outside(HOME / "tree" / name)
        path.write_text(change(path.read_text()))

    def files(self) -> List[str]:
        """What there is in the account's home, without what is there from the start."""
        names = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*")
                 if path.is_symlink() or path.is_file()]  # fmt: skip
        own = (*SYSTEMS, "tree", ".config/systemd/user.conf", ".gnupg")
        return sorted(name for name in names if not name.startswith(own))

    def agent(self, path: Path, key: Path) -> str:
        """A real ssh-agent at PATH, which holds KEY: its number."""
        self.run("mkdir", "-p", "-m", "700", path.parent)
        said = self.text("ssh-agent", "-a", path)
        number = re.search(r"SSH_AGENT_PID=(\d+)", said)
        assert number
        self.write(HOME / "key", key.read_text())
        self.run("ssh-add", "-q", HOME / "key", SSH_AUTH_SOCK=str(path))
        self.run("rm", HOME / "key")
        return number[1]

    def exists(self, path: Path) -> bool:
        return self.run("test", "-e", path, check=False).returncode == 0

    def curl(self, *args: Any, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        return self.run("curl", "-qsS", "--noproxy", "*", *args, check=check)


def boot(*options: str) -> Iterator[Manager]:
    for program, package in [("systemctl", "systemd"), ("nsenter", "util-linux")]:
        need(program, package)
    if os.geteuid() != 0:
        cannot_run("a systemd user manager of the tests' own: run them as root")
    manager = Manager(*options)
    yield manager
    manager.stop()


# What marks each test that has a manager: it needs the machine for itself.
ALONE = [pytest.param(None, marks=pytest.mark.alone, id="alone")]


@pytest.fixture(params=ALONE)
def manager() -> Iterator[Manager]:
    """Nothing is installed."""
    yield from boot("-j")


@pytest.fixture(scope="module", params=ALONE)
def installed() -> Iterator[Manager]:
    """The service runs, with the settings that it comes with; the tests change nothing of it."""
    for manager in boot("-j"):
        manager.install()
        yield manager


# ---------------------------------------------------------------- what is installed


def test_it_is_installed_and_started_by_one_command(manager: Manager) -> None:
    told = manager.install()
    assert "ssh-agent-proxy.service runs: listening on 127.0.0.1:7221" in told
    assert "The whole sandbox is in force.\n" in told
    assert "loginctl enable-linger" in told
    names = "ActiveState", "UnitFileState", "FragmentPath", "DropInPaths"
    assert [*map(manager.show, names)] == ["active", "enabled", str(UNIT), str(SANDBOX)]
    assert manager.answers()
    assert manager.files() == [
        ".config/ssh-agent-proxy/env",
        ".config/systemd/user/default.target.wants/ssh-agent-proxy.service",
        ".config/systemd/user/ssh-agent-proxy.service",
        ".config/systemd/user/ssh-agent-proxy.service.d/sandbox.conf",
        ".local/bin/ssh-agent-proxy",
        ".local/bin/ssh-agent-proxy-sign",
    ]
    assert manager.text("stat", "-c", "%a", ENV.parent, ENV).split() == ["700", "600"]
    assert manager.outside(ENV).read_bytes() == TEMPLATE.read_bytes()
    no_trace_of_the_trial(manager)


def no_trace_of_the_trial(manager: Manager) -> None:
    assert "trial" not in manager.text("systemctl", "--user", "list-units", "--all")
    assert not manager.exists(RUNTIME / "systemd/user")
    assert not manager.exists(RUNTIME / "ssh-agent-proxy-trial")


def test_a_trial_that_is_interrupted_leaves_no_traces(manager: Manager) -> None:
    real = manager.text("sh", "-c", "command -v systemctl")
    manager.write(HOME / "stand-in/systemctl", "#!/bin/sh\n"
                  'case $* in *"start ssh-agent-proxy-trial"*) kill $PPID ;; esac\n'
                  f'exec {real} "$@"\n', 0o755)  # fmt: skip
    manager.refuses(PATH=f"{HOME}/stand-in:/usr/local/bin:/usr/bin:/bin")
    assert not manager.exists(UNIT)
    assert manager.sh("ls /tmp") == ""
    no_trace_of_the_trial(manager)


def test_systemd_has_no_complaint_and_calls_it_exposed_by_at_most_2_0(installed: Manager) -> None:
    answer = installed.run("systemd-analyze", "--user", "--man=no", "verify", UNIT)
    assert (answer.stdout, answer.stderr) == (b"", b"")
    argv = ["systemd-analyze", "--user", "--no-pager", "--threshold=20", "security", NAME]
    answer = installed.run(*argv, check=False)
    assert answer.returncode == 0, answer.stdout.decode()


def test_the_running_process_is_held_to_the_units_limits(installed: Manager) -> None:
    pid = installed.main_pid()
    status = installed.root("cat", f"/proc/{pid}/status").stdout.decode()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    held = [fields[name] for name in ("Umask", "NoNewPrivs", "Seccomp", "CapBnd")]
    assert held == ["0077", "1", "2", 16 * "0"]
    limits = installed.root("cat", f"/proc/{pid}/limits").stdout.decode()
    assert re.search(r"(?m)^Max core file size +0 +0 ", limits)


def test_only_its_own_folder_can_be_written(installed: Manager) -> None:
    # As the account, where the service sees the files.
    touch = ["nsenter", "-t", installed.main_pid(), "--mount", *BECOME, "touch"]
    for folder in (HOME, ENV.parent, Path("/tmp"), Path("/var/tmp"), RUNTIME, RUNTIME / "systemd"):
        answer = installed.root(*touch, folder / "a-file-of-the-tests", check=False)
        assert b"Read-only file system" in answer.stderr, folder
    own = RUNTIME / NAME / "a-file-of-the-tests"
    installed.root(*touch, own)
    installed.root("rm", own)


def test_an_upgrade_and_changed_settings_which_are_kept_take_effect(manager: Manager) -> None:
    manager.install()
    version = re.compile('(?m)^VERSION = ".*"')
    manager.source("ssh_agent_proxy.py", lambda text: version.sub('VERSION = "97.0.1"', text))
    manager.install()
    head = manager.curl("-I", f"{URL}/healthz").stdout.decode()
    assert "Server: ssh-agent-proxy/97.0.1\r\n" in head
    manager.write(ENV, "SSH_AGENT_PROXY_ADDR=127.0.0.1:7222\n")
    manager.install()
    assert manager.outside(ENV).read_text() == "SSH_AGENT_PROXY_ADDR=127.0.0.1:7222\n"
    assert manager.answers(7222)


def test_settings_that_can_not_be_read_are_not_left_out(manager: Manager) -> None:
    # systemd would start it without.
    manager.write(ENV, "SSH_AGENT_PROXY_PAYLOADS=commit\n", 0)
    assert f"{ENV} is no file that you can read" in manager.refuses()
    assert manager.files() == [str(ENV.relative_to(HOME))]
    manager.run("chmod", "600", ENV)
    manager.install()
    manager.run("chmod", "000", ENV)
    assert manager.ctl("restart", NAME, check=False).returncode != 0
    assert not manager.answers()


def test_twice_is_as_good_as_once_whatever_the_paths(manager: Manager) -> None:
    # Not through make, whose own recipes can't have all of these in BINDIR.
    odd = HOME / """a %h $HOME ${x} "b" 'c' \\d [e]*?"""
    manager.make("build")
    manager.run("mkdir", "-p", odd / "bin", odd / "etc")
    manager.run("cp", "dist/ssh-agent-proxy", odd / "bin")
    manager.write(odd / "etc/env", "SSH_AGENT_PROXY_ADDR=127.0.0.1:7223\n")
    env = {"BINDIR": f"{odd}/bin", "CONFIG_DIR": f"{odd}/etc", "SYSTEMD_USER_DIR": str(UNITS)}
    state = "find ~/.config ! -name '*.log' -printf '%p %i %T@\\n' | sort"

    def install() -> str:
        manager.run("sh", "contrib/systemd.sh", "ready", **env)
        return manager.text("sh", "contrib/systemd.sh", "install", **env)

    install()
    assert manager.answers(7223)
    before, pid = manager.sh(state), manager.main_pid()
    told = install()
    assert (manager.sh(state), manager.main_pid()) == (before, pid)
    assert "Written" not in told
    # One that was interrupted is made good.
    manager.ctl("stop", NAME)
    manager.outside(SANDBOX).unlink()
    install()
    assert manager.answers(7223)
    assert manager.show("DropInPaths") == str(SANDBOX)


# ---------------------------------------------------------------- what was there before

OTHER = """\
# Installed by `make install-systemd`.
[Service]
Type=exec
ExecStart=/bin/sleep 1000
EnvironmentFile=%h/.config/ssh-agent-proxy/env
[Install]
WantedBy=default.target
"""


def test_the_service_of_another_program_of_that_name_is_replaced_and_kept(
        manager: Manager, keys: Keys) -> None:  # fmt: skip
    manager.agent(HOME / "agent", keys["ed25519"])
    settings = "SSH_AUTH_SOCK=%h/agent\nSSH_AGENT_PROXY_ADDR=127.0.0.1:7221\n"
    manager.write(ENV, settings, 0o600)
    manager.write(UNIT, OTHER, 0o644)
    manager.ctl("enable", "--now", UNIT.name)
    manager.install()
    assert manager.outside(UNIT.with_name(UNIT.name + ".old")).read_text() == OTHER
    assert manager.outside(ENV).read_text() == settings
    assert manager.curl(f"{URL}/publickey").stdout.decode().strip() == keys.line("ed25519")
    # What was kept is not overwritten.
    manager.write(UNIT, OTHER, 0o644)
    assert f"{UNIT} was not written by make" in manager.refuses()
    assert manager.outside(UNIT).read_text() == OTHER


def test_drop_ins_of_others_are_named_with_what_they_change(manager: Manager) -> None:
    mine = manager.drop_in("ProtectHome=no", "zz mine.conf")
    told = manager.install()
    assert f"The sandbox is in force, but for what these change:\n{mine}\n\n" in told
    # What another program has left does not go on running that.
    left = manager.drop_in("Type=exec\nExecStart=\nExecStart=/bin/sleep 1000", "override.conf")
    told = manager.refuses()
    assert f"would not run {HOME}/.local/bin/ssh-agent-proxy" in told
    assert f"\n{left}\n" in told
    assert manager.show("ActiveState") == "inactive"
    manager.outside(left).unlink()
    manager.drop_in("WorkingDirectory=%h/nothing", "zz mine.conf")
    assert f"These have a say too:\n{mine}\n" in manager.refuses()


# ---------------------------------------------------------------- settings

def test_a_line_that_systemd_passes_over_is_refused(manager: Manager) -> None:
    name = "SSH_AGENT_PROXY_PAYLOADS"
    for line in (f"export {name}=commit", f"\ufeff{name}=commit", f"{name}: commit"):
        manager.write(ENV, line + "\n")
        line = line.partition("=")[0]
        assert f"{ENV}: systemd would pass over this line: {line}" in manager.refuses()
    assert manager.files() == [str(ENV.relative_to(HOME))]


def test_examples_and_other_lines_that_systemd_takes_are_handed_on(manager: Manager) -> None:
    odd = ("# a comment \\\nthat goes on\n\r\n  ; another\nODD = 31  \r\n"
           "A=\\\ngoes on\n\tB=\"two\n lines\"\nC='git'\n")  # fmt: skip
    manager.write(ENV, odd + re.sub(r"(?m)^#(SSH_AGENT_PROXY_)", r"\1", TEMPLATE.read_text()))
    manager.make("systemd-ready")
    unit = "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'env -0 >%h/env'\n"
    unit += f"EnvironmentFile={ENV}\n"
    manager.write(UNITS / "show.service", unit, 0o644)
    manager.ctl("daemon-reload")
    manager.ctl("start", "show")
    got = manager.outside(HOME / "env").read_text().split("\0")
    expected = {"ODD=31", "A=goes on", "B=two\n lines", "C=git"}
    assert expected | {f"{name}={value}" for name, value in dict(examples()).items()} <= set(got)


def test_a_socket_that_the_sandbox_forbids_is_told_why(manager: Manager) -> None:
    manager.write(ENV, "SSH_AGENT_PROXY_ADDR=unix:~/s\n")
    told = manager.refuses()
    assert f"can write in {RUNTIME}/ssh-agent-proxy alone: see {SANDBOX}" in told


def test_a_folder_that_no_unit_can_name_or_systemd_does_not_read_is_refused(
        manager: Manager) -> None:  # fmt: skip
    told = manager.refuses("install-systemd", f"SYSTEMD_USER_DIR={HOME}/units")
    assert f"does not look for units in {HOME}/units" in told
    for value in ("~/x", "/a\tb"):
        for name in ("CONFIG_DIR", "SYSTEMD_USER_DIR"):
            assert value in manager.refuses("install-systemd", f"{name}={value}")
    assert manager.files() == []


def test_an_agent_that_only_the_shell_knows_is_told_of(manager: Manager, keys: Keys) -> None:
    path = Path("/tmp/ssh-of-the-shell/agent.1")
    manager.agent(path, keys["ed25519"])
    told = manager.install(SSH_AUTH_SOCK=str(path))
    assert f"This shell's agent is at {path}, which the service doesn't know." in told
    manager.settings(UPSTREAM=path)
    assert "This shell's agent" not in manager.install(SSH_AUTH_SOCK=str(path))


# ---------------------------------------------------------------- what does not work


def test_a_wrong_setting_is_told_and_not_tried_again(manager: Manager) -> None:
    manager.write(ENV, "SSH_AGENT_PROXY_PAYLOADS=everything\n")
    told = manager.refuses()
    assert "ssh-agent-proxy.service did not start:\n" in told
    assert "SSH_AGENT_PROXY_PAYLOADS: " in told
    assert f"the settings are in {ENV}" in told
    # Were it to be tried again, it would be "activating" now.
    names = "ActiveState", "ExecMainStatus", "NRestarts"
    assert [*map(manager.show, names)] == ["failed", "2", "0"]
    assert [line["PRIORITY"] for line in logged(manager, "ssh-agent-proxy: SSH_AGENT")] == ["3"]


def test_a_program_that_does_not_run_is_no_service(manager: Manager) -> None:
    manager.source("ssh_agent_proxy.py", lambda text: "raise SystemExit('no proxy today')\n")
    assert "no proxy today" in manager.refuses()
    assert not manager.exists(UNITS)
    assert not manager.exists(ENV)


# ---------------------------------------------------------------- where no manager runs


# The target, the stand-ins and variables, what is said.
NO_BUS = {"systemctl": "echo 'Failed to connect to bus: No medium found' >&2; exit 1"}
NO_MANAGER = rows([
    ("install", "install-systemd", NO_BUS, {}, ["to connect to bus", "loginctl enable-linger"]),
    ("status", "status", NO_BUS, {}, ["to connect to bus"]),
    ("real systemctl", "install-systemd", {}, {"XDG_RUNTIME_DIR": "/nothing"},
     ["sudo loginctl enable-linger"]),
    # It does nothing then, and exits 0.
    ("taken for a chroot", "install-systemd", {}, {"SYSTEMD_OFFLINE": "1"}, ["ignoring"]),
    ("WSL", "install-systemd",
     {"systemctl": "exit 1", "uname": "echo 5.15.90.1-microsoft-standard-WSL2"}, {},
     ["systemd=true under [boot] in /etc/wsl.conf"]),
    ("sudo", "install-systemd", {"systemctl": "exit 1"}, {"SUDO_USER": "someone"},
     ["without sudo"]),
])  # fmt: skip


@pytest.mark.parametrize(("target", "stand_ins", "env", "expected"), NO_MANAGER)
def test_without_a_user_manager_nothing_is_changed_and_the_way_out_is_told(
        tree: Path, home: Path, target: str, stand_ins: Dict[str, str], env: Dict[str, str],
        expected: List[str]) -> None:  # fmt: skip
    if not stand_ins:
        need("systemctl", "systemd")
    for name, script in stand_ins.items():
        env = {**env, "PATH": stand_in(home / "bin", name, script)}
    told = refused(tree, home, target, **env)
    assert [text for text in [*expected, "no systemd runs for you"] if text not in told] == []


def test_without_systemd_nothing_is_changed(tree: Path, home: Path) -> None:
    path = path_without("systemctl", home / "bin")
    for program in ["grep", "id", "uname"]:
        (home / "bin" / program).symlink_to(need(program, program))
    told = refused(tree, home, "install-systemd", PATH=path)
    assert "there is no systemd here (no systemctl)" in told
    assert "`make install` will do" in told


def test_a_folder_of_units_with_a_blank_is_known_as_systemd_quotes_it(
        tree: Path, home: Path) -> None:  # fmt: skip
    units = home / """a b's "c" $d"""
    path = stand_in(home / "bin", "systemctl",
                    'printf \'%s\\n\' "/etc/systemd/user \\"$QUOTED\\" /usr/lib/systemd/user"')
    env = clean_env(home, PATH=path, XDG_RUNTIME_DIR=str(home), BINDIR=f"{home}/bin",
                    CONFIG_DIR=f"{home}/etc", SYSTEMD_USER_DIR=str(units),
                    QUOTED=re.sub(r'([$"])', r"\\\1", str(units)))  # fmt: skip
    assert run(["sh", "contrib/systemd.sh", "ready"], cwd=tree, env=env).stderr == b""


# ---------------------------------------------------------------- where there can be no sandbox


@pytest.fixture(scope="module", params=ALONE)
def hardened() -> Iterator[Manager]:
    """No user namespaces, as on a hardened system; nothing is installed."""
    yield from boot("-c")


def test_without_user_namespaces_the_drop_in_is_left_out_and_an_older_one_removed(
        hardened: Manager) -> None:  # fmt: skip
    hardened.write(SANDBOX, (ROOT / "contrib/systemd/sandbox.conf").read_text(), 0o644)
    told = hardened.install()
    assert "sandbox.conf does not start on this system: it allows no user namespaces" in told
    assert "217/USER" in told
    assert f"Removed: {SANDBOX}\n" in told
    assert not hardened.exists(SANDBOX.parent)
    assert hardened.answers()
    no_trace_of_the_trial(hardened)
    pid = hardened.main_pid()
    hardened.install()
    assert hardened.main_pid() == pid


def test_a_drop_in_that_can_not_be_mounted_is_left_out_without_traces(manager: Manager) -> None:
    # Ends as it does where users may have namespaces, but mount nothing in them.
    manager.source("contrib/systemd/sandbox.conf",
                   lambda text: text + "BindReadOnlyPaths=%h/nothing\n")  # fmt: skip
    told = manager.install()
    assert "does not start on this system: it lets no user mount anything, 226/NAMESPACE." in told
    assert not manager.exists(SANDBOX)


# ---------------------------------------------------------------- signing


PLACES = {
    "runtime": RUNTIME / "ssh-agent.socket",
    "home": HOME / ".1password/agent.sock",
    "tmp": Path("/tmp/ssh-0123456789ab/agent.7"),
}

COMMIT = """
git init -q ~/repository
cd ~/repository
git config user.name Tester
git config user.email tester@example.com
git config gpg.format ssh
git config gpg.ssh.program "$HOME/.local/bin/ssh-agent-proxy-sign"
git config gpg.ssh.defaultKeyCommand "$HOME/.local/bin/ssh-agent-proxy-sign key"
git commit -q -S --allow-empty -m 'A commit'
echo "tester@example.com $1" >~/signers
git -c gpg.ssh.allowedSignersFile="$HOME/signers" verify-commit HEAD 2>&1
"""


def commit(manager: Manager, key: str) -> None:
    told = manager.text("sh", "-euc", COMMIT, "sh", key)
    assert 'Good "git" signature for tester@example.com' in told


@pytest.mark.parametrize("place", [*PLACES, "exec"])
def test_a_commit_is_signed_by_an_agent_in(manager: Manager, keys: Keys, place: str) -> None:
    # In the whole sandbox, and by an agent that was started anew under it, too.
    path = PLACES.get(place, PLACES["runtime"])
    number = manager.agent(path, keys["ed25519"])
    manager.install()
    manager.write(HOME / "relay.py", RELAY)
    relay = f"exec:{manager.python} {HOME}/relay.py {path}"
    manager.settings(UPSTREAM=relay if place == "exec" else path)
    commit(manager, keys.line("ed25519"))
    manager.run("kill", number)
    wait_for(lambda: not manager.exists(path), message=f"{path} is removed")
    manager.agent(path, keys["other"])
    commit(manager, keys.line("other"))


def test_status_pubkey_and_logs_tell_of_the_service(manager: Manager, keys: Keys) -> None:
    path = PLACES["runtime"]
    manager.agent(path, keys["ed25519"])
    # (Debian 13's manager has an agent of its own in SSH_AUTH_SOCK.)
    manager.write(ENV, f"SSH_AGENT_PROXY_UPSTREAM={path}\n")
    manager.install()
    wanted = f"listening on 127.0.0.1:7221, using the agent at '{path}'"
    wait_for(lambda: manager.show("StatusText") == wanted, 5, f"the status {wanted}")
    assert f'Status: "{wanted}"' in manager.make("status")
    elsewhere = {"SSH_AGENT_PROXY_PUBKEY_URL": "http://127.0.0.1:9/"}
    assert manager.make("pubkey", **elsewhere).strip() == keys.line("ed25519")

    commit(manager, keys.line("ed25519"))
    lines = wait_for(lambda: logged(manager, "outcome=signed "), message="the signature's line")
    assert [(line["PRIORITY"], line["SYSLOG_IDENTIFIER"]) for line in lines] == [("5", NAME)]
    told = manager.make("logs", "ARGS=--output=cat --lines=5 --no-pager")
    assert lines[0]["MESSAGE"] in told
    landlock = logged(manager, "Landlock: ")[0]["MESSAGE"]
    assert re.match("Landlock: (in force |.*(this kernel has none|not enabled))", landlock)


def logged(manager: Manager, start: str) -> List[Dict[str, Any]]:
    """What the journal has of this run of the service that begins so."""
    argv = ["journalctl", "--user", "--quiet", f"--user-unit={NAME}", "--output=json"]
    argv += [f"_SYSTEMD_INVOCATION_ID={manager.show('InvocationID')}"]
    lines = [json.loads(line) for line in manager.text(*argv).splitlines()]
    return [line for line in lines if line["MESSAGE"].startswith(start)]


def test_the_folder_of_a_socket_outlives_the_service(manager: Manager, keys: Keys) -> None:
    # As a container has it mounted.
    manager.agent(PLACES["runtime"], keys["ed25519"])
    manager.install()
    tokens = ENV.with_name("tokens")
    token = manager.text(f"{HOME}/.local/bin/ssh-agent-proxy", "token", "me",
                         "--token-file", tokens)  # fmt: skip
    manager.settings(ADDR="unix:$XDG_RUNTIME_DIR/ssh-agent-proxy/socket", TOKEN_FILE=tokens,
                     UPSTREAM=PLACES["runtime"])  # fmt: skip
    path = RUNTIME / NAME / "socket"
    folder = manager.text("stat", "-c", "%i %a", path.parent)
    assert folder.endswith(" 700")
    manager.ctl("stop", NAME)
    assert not manager.exists(path)
    manager.ctl("start", NAME)
    assert manager.text("stat", "-c", "%i %a", path.parent) == folder
    url = f"PROXY_URL=unix:{path}"
    told = manager.make("pubkey", url, SSH_AGENT_PROXY_TOKEN=token)
    assert told.strip() == keys.line("ed25519")
    assert "a token is needed" in manager.refuses("pubkey", url)


# ---------------------------------------------------------------- how it ends, and comes back


ASKPASS = """\
#!/bin/sh
: >"$RUNTIME_DIRECTORY/asked"
until [ -e "$RUNTIME_DIRECTORY/yes" ]; do sleep 0.05; done
"""


def test_a_prompt_is_no_yes_and_no_no_when_it_stops(manager: Manager, keys: Keys) -> None:
    # The askpass program must not get the signal that is meant for the proxy.
    manager.agent(PLACES["runtime"], keys["ed25519"])
    manager.write(HOME / "askpass", ASKPASS, 0o700)
    manager.install()
    manager.settings(UPSTREAM=PLACES["runtime"], CONFIRM=HOME / "askpass")
    enter = ["nsenter", "-t", str(manager.pid), "--net"]
    request = subprocess.Popen(
        [*enter, "curl", "-qsS", "--noproxy", "*", "-m", "30", "-w", "%{http_code}",
         "--data-binary", "hello", f"{URL}/sign"], stdout=subprocess.PIPE,
    )  # fmt: skip
    folder = RUNTIME / NAME
    wait_for(lambda: manager.exists(folder / "asked"), message="the prompt is there")
    manager.ctl("stop", "--no-block", NAME)
    wait_for(lambda: manager.show("ActiveState") == "deactivating")
    manager.run("touch", folder / "yes")
    out, _ = request.communicate(timeout=20)
    assert out.endswith(b"-----END SSH SIGNATURE-----\n200"), out
    wait_for(lambda: manager.show("ActiveState") == "inactive")
    assert manager.show("Result") == "success"


@pytest.mark.parametrize("name", ["KILL", "HUP", "ABRT"])
def test_one_that_dies_answers_again_within_two_seconds(installed: Manager, name: str) -> None:
    pid = installed.main_pid()
    installed.run("kill", f"-{name}", str(pid))
    died = time.monotonic()
    wait_for(lambda: installed.main_pid() not in (0, pid), message="another one")
    wait_for(installed.answers)
    assert time.monotonic() - died < 2


def test_one_that_dies_at_each_start_is_given_up_and_installing_tries_anew(
        manager: Manager) -> None:  # fmt: skip
    manager.install()
    breaks = manager.drop_in("ExecStartPre=/bin/false\nRestartSec=1ms")
    manager.ctl("restart", NAME, check=False)
    wait_for(lambda: manager.show("ActiveState") == "failed", 60, "it is given up")
    assert manager.show("NRestarts") in ("19", "20")  # 257 does not count the last one
    manager.outside(breaks).unlink()
    manager.ctl("daemon-reload")
    manager.install()
    assert manager.answers()


# ---------------------------------------------------------------- uninstalling


def test_uninstalling_leaves_the_settings_and_the_users_own_drop_in(manager: Manager) -> None:
    manager.install()
    mine = manager.drop_in("Nice=1")
    manager.make("uninstall")
    told = manager.make("uninstall-systemd")
    kept = sorted(str(path.relative_to(HOME)) for path in (ENV, mine))
    assert manager.files() == kept
    assert f"Kept: {ENV}\nKept: {mine}\n" in told
    assert f"Removed: {UNIT}\n" in told
    assert [*map(manager.show, ("LoadState", "ActiveState"))] == ["not-found", "inactive"]
    assert not manager.exists(RUNTIME / NAME)
    assert not manager.answers()
    assert "No service is installed" in manager.make("uninstall-systemd")
    assert manager.files() == kept


def test_without_a_home_nothing_is_installed_at_the_root(tree: Path, home: Path) -> None:
    for target in ("install", "uninstall", "install-systemd", "uninstall-systemd"):
        assert refused(tree, home, target, HOME="").startswith("HOME is not set: set it, or PREFIX")
    # A variable that bash makes where there is none is not make's.
    argv = ["env", "-u", "HOME", "make", "SHELL=/bin/bash", f"PYTHON={sys.executable}"]
    answer = run([*argv, "install-systemd"], cwd=tree, env=clean_env(home), check=False)
    assert answer.stderr.startswith(b"HOME is not set: set it, or PREFIX")
    told = refused(tree, home, "install-systemd", f"PREFIX={home}", HOME="")
    assert told.startswith("HOME is not set: set it, or CONFIG_DIR and SYSTEMD_USER_DIR")


def test_what_there_is_nothing_to_show_of_is_told(manager: Manager) -> None:
    for target in ("status", "logs"):
        assert "no service is installed: make install-systemd" in manager.refuses(target)
    manager.install()
    # All the programs but that one.
    manager.sh("mkdir ~/most; ln -s /usr/bin/* ~/most; rm ~/most/journalctl")
    assert "there is no journalctl here" in manager.refuses("logs", PATH=f"{HOME}/most")


# ---------------------------------------------------------------- for packagers


UNIT_DIR = "usr/lib/systemd/user"
PACKAGES = rows([
    ("settings of all", ["CONFIG_DIR=/etc/ssh-agent-proxy"], "-/etc/ssh-agent-proxy/env",
     {"etc/ssh-agent-proxy/env": 0o644}),
    ("settings of each user", [], "-%h/.config/ssh-agent-proxy/env", {}),
])  # fmt: skip


@pytest.mark.parametrize(("args", "env_file", "env"), PACKAGES)
def test_a_package_gets_files_and_no_manager_is_asked(
    tree: Path, home: Path, short: Path, args: List[str], env_file: str, env: Dict[str, int]
) -> None:
    package = short / "the package"
    settings = ["PREFIX=/usr", f"DESTDIR={package}", f"SYSTEMD_USER_DIR=/{UNIT_DIR}", *args]
    path = stand_in(home / "bin", "systemctl", "echo asked >&2; exit 1")
    answer = make(tree, home, "install-systemd", *settings, PATH=path)
    assert b"asked" not in answer.stderr
    left_out = f"Not written: {env_file[1:]} (it is each user's own)\n"
    assert (left_out in answer.stdout.decode()) == (not env)
    assert without_folders(package) == {
        "usr/bin/ssh-agent-proxy": 0o755,
        "usr/bin/ssh-agent-proxy-sign": 0o755,
        f"{UNIT_DIR}/ssh-agent-proxy.service": 0o644,
        **env,
    }
    unit = (package / UNIT_DIR / UNIT.name).read_text()
    assert '\nExecStart=:"/usr/bin/ssh-agent-proxy"\n' in unit
    assert f"\nEnvironmentFile={env_file}\n" in unit
    assert "\nRestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_VSOCK\n" in unit
    assert str(home) not in unit
    make(tree, home, "uninstall-systemd", *settings, PATH=path)
    assert not (package / UNIT_DIR / UNIT.name).exists()


@pytest.mark.parametrize("release, name, vsock", rows([
    ("WSL2", "5.15.167.4-microsoft-standard-WSL2", "", " AF_VSOCK"),
    ("WSL with a kernel of its own", "6.6.1", "Debian", " AF_VSOCK"),
    ("not WSL", "6.1.0-18-amd64", "", ""),
]))  # fmt: skip
def test_under_wsl_the_unit_lets_a_program_of_windows_be_reached(
        home: Path, release: str, name: str, vsock: str) -> None:  # fmt: skip
    path = stand_in(home / "bin", "uname", f"echo {release}")
    folders = {"BINDIR": "/b", "CONFIG_DIR": "/c", "SYSTEMD_USER_DIR": "/u", "DESTDIR": ""}
    env = clean_env(home, PATH=path, WSL_DISTRO_NAME=name, **folders)
    unit = run(["sh", ROOT / "contrib/systemd.sh", "render"], env=env).stdout.decode()
    assert f"\nRestrictAddressFamilies=AF_UNIX AF_INET AF_INET6{vsock}\n" in unit


# ---------------------------------------------------------------- the template of the settings


def examples() -> List[Tuple[str, str]]:
    """Name and value of each setting in the template, commented out or not."""
    found = re.findall(r"(?m)^#?(SSH_AGENT_PROXY_[A-Z_]+)=(.*)$", TEMPLATE.read_text())
    return [(name, value) for name, value in found]


def test_the_template_has_every_setting_of_the_program_and_sets_none() -> None:
    from ssh_agent_proxy import OPTIONS

    assert {name for name, _ in examples()} == {f"SSH_AGENT_PROXY_{o.variable}" for o in OPTIONS}
    lines = TEMPLATE.read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == []


def test_the_program_takes_each_example(home: Path) -> None:
    from ssh_agent_proxy import COMMANDS, Config

    stand_in(home / "bin", "ssh-askpass", "exit 0")
    (home / ".ssh").mkdir()
    (home / ".ssh/id_ed25519.pub").write_text(dict(examples())["SSH_AGENT_PROXY_PUBKEY"])
    env = {"HOME": str(home), "XDG_RUNTIME_DIR": "/run/user/1", "PATH": str(home / "bin")}
    for name, value in examples():
        others = dict(env, SSH_AGENT_PROXY_CONFIRM="ssh-askpass") if "_FOR" in name else env
        default = Config.from_env(others, [], COMMANDS)
        config = Config.from_env({**others, name: value}, [], COMMANDS)
        field = name[len("SSH_AGENT_PROXY_") :].lower()
        assert getattr(config, field) != getattr(default, field), value
