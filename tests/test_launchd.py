"""The LaunchAgent, with a stand-in for macOS's launchctl."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Sequence

import pytest
from conftest import SHIM, Agent, Keys, Proxy, http, rows
from test_make import copy_project, files, make, mode, path_without, refused, snapshot, stand_in

JOB = f"gui/{os.getuid()}/ssh-agent-proxy"
DOMAIN = f"gui/{os.getuid()}"

# Loaded is what the file "loaded" says. A job that was booted out is there as long as the file
# "draining" has lines, of which each `sleep` takes one.
LAUNCHCTL = r"""
cd "$LAUNCHD" || exit 70
printf '%s\n' "$*" >>calls
there() { [ -e loaded ] || [ -s draining ]; }
fails() { printf '%s\n' "$2" >&2; exit "$1"; }
[ ! -e old ] || case $1 in print | enable | boot*) fails 64 'Unrecognized subcommand' ;; esac
case $1 in
print) [ "$2" = "$JOB" ] && there || fails 113 'Could not find service' ;;
list) [ "$2" = ssh-agent-proxy ] && [ -e old ] && there || fails 113 'Could not find service' ;;
enable) rm -f disabled ;;
bootstrap)
    [ ! -e refuses ] || fails 125 'Bootstrap failed: 125: no such domain'
    ! there || fails 5 'Bootstrap failed: 5: Input/output error'
    [ ! -e disabled ] || fails 119 'Bootstrap failed: 119: Service is disabled'
    cp "$3" loaded ;;
bootout) there || fails 3 'Boot-out failed: 3: No such process'; rm -f loaded ;;
load) [ -e refuses ] || cp "$3" loaded ;;
unload) rm -f loaded ;;
*) fails 64 'Unrecognized subcommand' ;;
esac
"""
SLEEP = 'cd "$LAUNCHD" && sed -i.before 1d draining && printf "sleep\\n" >>calls'


class Mac:
    """A user of a Mac, as far as make can see."""

    def __init__(self, tree: Path, home: Path, user: Path) -> None:
        self.tree, self.home, self.user = tree, home, user
        self.launchd = home / "launchd"
        self.launchd.mkdir()
        stand_in(home / "mac", "launchctl", LAUNCHCTL)
        (home / "mac" / "sleep").write_text(f"#!/bin/sh\n{SLEEP}\n")
        (home / "mac" / "sleep").chmod(0o755)
        self.plist = user / "Library" / "LaunchAgents" / "ssh-agent-proxy.plist"
        self.log = user / "Library" / "Logs" / "ssh-agent-proxy.log"
        self.settings = user / ".config" / "ssh-agent-proxy" / "env"

    def make(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        path = f"{self.home / 'mac'}:{os.environ['PATH']}"
        return make(self.tree, self.home, *args, check=check, HOME=str(self.user), PATH=path,
                    JOB=JOB, LAUNCHD=str(self.launchd))  # fmt: skip

    def calls(self) -> List[str]:
        """What launchctl was asked to do, without questions."""
        file = self.launchd / "calls"
        if not file.exists():
            return []
        calls = file.read_text().splitlines()
        file.unlink()
        return [call for call in calls if call.split()[0] not in ("print", "list")]

    def set(self, text: str) -> None:
        self.settings.parent.mkdir(parents=True, exist_ok=True)
        self.settings.write_text(text)

    def written(self) -> Dict[str, Any]:
        content: Dict[str, Any] = plistlib.loads(self.plist.read_bytes())
        return content


@pytest.fixture
def tree(short: Path) -> Path:
    return copy_project(short / "a tree")


@pytest.fixture
def mac(tree: Path, home: Path, short: Path) -> Mac:
    (short / "user").mkdir()
    return Mac(tree, home, short / "user")


# ---------------------------------------------------------------- the plist

USERS = ["user", "two  blanks", "R&D <b>", "it's \"me\"", "@LOG@ ]]>", "--><key>", "ünïcode",
         "%h\\1"]  # fmt: skip


@pytest.mark.parametrize("name", USERS)
def test_it_says_what_launchd_shall_do_whatever_the_users_name(
    tree: Path, home: Path, short: Path, name: str
) -> None:
    user = short / name
    user.mkdir()
    mac = Mac(tree, home, user)
    mac.make("install-launchd")
    assert mac.written() == {
        "Label": "ssh-agent-proxy",
        "ProgramArguments": [str(user / ".local" / "bin" / "ssh-agent-proxy"), "serve"],
        "EnvironmentVariables": {},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 60,
        "ExitTimeOut": 15,
        "ProcessType": "Interactive",
        "Umask": 0o077,
        "StandardErrorPath": str(user / "Library" / "Logs" / "ssh-agent-proxy.log"),
    }
    assert mac.calls() == [f"enable {JOB}", f"bootstrap {DOMAIN} {mac.plist}"]
    assert (mac.launchd / "loaded").read_bytes() == mac.plist.read_bytes()


def test_it_names_the_program_where_it_was_installed(mac: Mac, short: Path) -> None:
    mac.make("install-launchd", f"BINDIR={short}/a & b")
    program = Path(mac.written()["ProgramArguments"][0])
    assert program == short / "a & b" / "ssh-agent-proxy"
    assert mode(program) == 0o755


def test_the_log_is_its_owners_and_the_plist_for_launchd_to_read(mac: Mac) -> None:
    before = os.umask(0o002)
    try:
        mac.make("install-launchd")
    finally:
        os.umask(before)
    assert mode(mac.log) == 0o600
    assert mode(mac.plist) == 0o600
    assert files(mac.plist.parent) == ["ssh-agent-proxy.plist"]


def test_what_the_plist_starts_serves(
    mac: Mac, agent: Agent, keys: Keys
) -> None:
    agent.add(keys["ed25519"])
    mac.set(f"SSH_AGENT_PROXY_ADDR=127.0.0.1:0\nSSH_AUTH_SOCK='{agent.sock}'\n")
    mac.make("install-launchd")
    plist = mac.written()
    env = {"HOME": str(mac.user), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
    proxy = Proxy(plist["ProgramArguments"], {**env, **plist["EnvironmentVariables"]})
    try:
        assert http(proxy.port, "POST", "/sign", b"x").status == 200
        assert http(proxy.port, "GET", "/shim").body == SHIM.read_bytes()
    finally:
        # An exit that launchd takes for the end, by what KeepAlive says.
        assert proxy.stop() == 0


# ---------------------------------------------------------------- settings

LINES = rows([
    ("plain", "A=b", {"A": "b"}),
    ("several", "A=b\nC_1=d\n", {"A": "b", "C_1": "d"}),
    ("the last of two", "A=b\nA=c", {"A": "c"}),
    ("comments", "# x\n;y=z\n\n \t\nA=b # not one", {"A": "b # not one"}),
    ("commented out", "#A=b\n", {}),
    ("empty", "A=\nB=''\n", {"A": "", "B": ""}),
    ("blanks around", "  A = b c \t\r\n", {"A": "b c"}),
    ("double quotes", 'A="b  \'c"', {"A": "b  'c"}),
    ("single quotes", "A=' b \"c '", {"A": ' b "c '}),
    ("quotes inside", "A=it's \"so\"", {"A": "it's \"so\""}),
    ("what XML knows", "A=<b>&amp;]]>", {"A": "<b>&amp;]]>"}),
    ("nothing is expanded", "A=$HOME %h `b` $(c) @LOG@", {"A": "$HOME %h `b` $(c) @LOG@"}),
    ("an equals sign", "A=exec:b --c=d", {"A": "exec:b --c=d"}),
    ("no line", "", {}),
])  # fmt: skip


@pytest.mark.parametrize(("text", "variables"), LINES)
def test_settings_are_read_as_systemd_would(
    mac: Mac, text: str, variables: Dict[str, str]
) -> None:
    mac.set(text)
    mac.make("install-launchd")
    assert mac.written()["EnvironmentVariables"] == variables


REFUSED = rows([
    ("no value", "A", "line 1: not NAME=VALUE"),
    ("a shell's export", "\nexport A=b", "line 2: not NAME=VALUE"),
    ("no name", "=b", "line 1: not NAME=VALUE"),
    ("a backslash", "A=b\\", "line 1: a backslash in A is not understood here"),
    ("an open quote", 'A="b', 'line 1: A does not end with the " that it begins with'),
    ("a lone quote", "A='", "line 1: A does not end with the ' that it begins with"),
    ("two quoted parts", "A='b' 'c'", "line 1: A does not end with the ' that it begins with"),
    ("more after a quote", "A='b' # c", "line 1: A does not end with the ' that it begins with"),
    ("a control character", "A=b\x01", "can't stand in a plist"),
    ("a NUL", "A=b\x00", "can't stand in a plist"),
    ("what is not UTF-8", b"A=\xff", "can't stand in a plist"),
])  # fmt: skip


@pytest.mark.parametrize(("text", "why"), REFUSED)
def test_settings_that_might_mean_something_else_change_nothing(
    mac: Mac, text: Any, why: str
) -> None:
    mac.set("A=as it was\n")
    mac.make("install-launchd")
    mac.calls()
    before = snapshot(mac.user / "Library")
    mac.settings.write_bytes(text if isinstance(text, bytes) else text.encode())
    answer = mac.make("install-launchd", check=False)
    assert answer.returncode != 0
    errors = answer.stderr.decode()
    assert why in errors
    assert str(mac.settings if "line" in why else mac.plist) in errors
    assert "Traceback" not in errors
    assert snapshot(mac.user / "Library") == before
    assert mac.calls() == []


def test_settings_may_be_elsewhere(mac: Mac, short: Path) -> None:
    (short / "else where").mkdir()
    (short / "else where" / "env").write_text("SSH_AGENT_PROXY_ADDR=127.0.0.1:7222\n")
    mac.make("install-launchd", f"CONFIG_DIR={short}/else where")
    assert mac.written()["EnvironmentVariables"] == {"SSH_AGENT_PROXY_ADDR": "127.0.0.1:7222"}


# ---------------------------------------------------------------- again, and no longer


def test_a_second_install_puts_the_new_settings_into_force(mac: Mac) -> None:
    mac.make("install-launchd")
    once = snapshot(mac.user)
    mac.calls()
    mac.log.write_text("what it said\n")
    mac.set("A=b\n")
    mac.make("install-launchd")
    boots = [f"bootout {JOB}", f"enable {JOB}", f"bootstrap {DOMAIN} {mac.plist}"]
    assert mac.calls() == boots
    assert mac.log.read_text() == "what it said\n"
    assert (mac.launchd / "loaded").read_bytes() == mac.plist.read_bytes()
    assert mac.written()["EnvironmentVariables"] == {"A": "b"}
    mac.settings.unlink()
    mac.log.write_text("")
    mac.make("install-launchd")
    shutil.rmtree(mac.user / ".config")
    assert snapshot(mac.user) == once


def test_a_proxy_that_is_still_finishing_is_waited_for(mac: Mac) -> None:
    mac.make("install-launchd")
    mac.calls()
    (mac.launchd / "draining").write_text("x\n" * 3)
    mac.make("install-launchd")
    boots = [f"enable {JOB}", f"bootstrap {DOMAIN} {mac.plist}"]
    assert mac.calls() == [f"bootout {JOB}", "sleep", "sleep", "sleep", *boots]


@pytest.mark.parametrize("target", ["install-launchd", "uninstall-launchd"])
def test_a_proxy_that_does_not_go_is_told(mac: Mac, target: str) -> None:
    mac.make("install-launchd")
    (mac.launchd / "draining").write_text("x\n" * 100)
    answer = mac.make(target, check=False)
    assert answer.returncode != 0
    assert f"launchd still has {JOB}: launchctl bootout {JOB}\n" in answer.stderr.decode()
    assert mac.plist.exists()


def test_one_that_was_disabled_is_enabled(mac: Mac) -> None:
    (mac.launchd / "disabled").write_text("")
    mac.make("install-launchd")
    assert (mac.launchd / "loaded").exists()


def test_an_old_launchctl_is_spoken_to_as_it_knows(mac: Mac) -> None:
    (mac.launchd / "old").write_text("")
    mac.make("install-launchd")
    assert (mac.launchd / "loaded").read_bytes() == mac.plist.read_bytes()
    assert mac.calls()[-1] == f"load -w {mac.plist}"
    mac.make("uninstall-launchd")
    assert mac.calls()[-1] == f"unload {mac.plist}"
    assert not (mac.launchd / "loaded").exists()


def test_a_launchd_that_refuses_is_told_with_its_reason(mac: Mac) -> None:
    (mac.launchd / "refuses").write_text("")
    answer = mac.make("install-launchd", check=False)
    assert answer.returncode != 0
    why = f"launchd did not take {mac.plist}: Bootstrap failed: 125: no such domain\n"
    assert why in answer.stderr.decode()


def test_uninstall_leaves_log_and_settings_and_programs(mac: Mac) -> None:
    mac.set("A=b\n")
    mac.make("install-launchd")
    mac.log.write_text("what it said\n")
    mac.calls()
    before = snapshot(mac.user)
    mac.make("uninstall-launchd")
    assert mac.calls() == [f"bootout {JOB}"]
    del before["Library/LaunchAgents/ssh-agent-proxy.plist"]
    assert snapshot(mac.user) == before
    mac.make("uninstall-launchd")
    assert mac.calls() == []
    assert snapshot(mac.user) == before


def test_one_that_was_never_installed_can_be_uninstalled(mac: Mac) -> None:
    mac.make("uninstall-launchd")
    assert files(mac.user) == []


# ---------------------------------------------------------------- where it can't be


@pytest.mark.parametrize("target", ["install-launchd", "uninstall-launchd"])
def test_without_launchctl_it_says_so_and_writes_nothing(
    tree: Path, home: Path, short: Path, target: str
) -> None:
    (short / "user").mkdir()
    path = path_without("launchctl", home / "bin")
    (home / "bin" / "id").symlink_to(str(shutil.which("id")))
    told = refused(tree, home, target, PATH=path, HOME=str(short / "user"))
    assert told.startswith("there is no launchctl here: launchd is macOS's (on Linux: make ")
    assert len([line for line in told.splitlines() if not line.startswith("make: ***")]) == 1
    assert files(short / "user") == []


NOT_SO: Sequence[Any] = rows([
    ("with sudo", [], {"SUDO_UID": "501"}, "without sudo, please"),
    ("with DESTDIR", ["DESTDIR=/package"], {}, "not with DESTDIR"),
])  # fmt: skip


@pytest.mark.parametrize(("args", "env", "why"), NOT_SO)
def test_it_is_refused_before_anything_is_written(
    mac: Mac, tree: Path, home: Path, args: List[str], env: Dict[str, str], why: str
) -> None:
    path = f"{home / 'mac'}:{os.environ['PATH']}"
    given = dict(env, HOME=str(mac.user), PATH=path, LAUNCHD=str(mac.launchd))
    assert why in refused(tree, home, "install-launchd", *args, **given)
    assert files(mac.user) == []
    assert mac.calls() == []
