"""The LaunchAgent, with a stand-in for macOS's launchctl."""

import os
import plistlib
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
from conftest import ROOT, SHIM, Agent, Proxy, http, rows, run
from test_make import files, make, mode, path_without, refused, snapshot, stand_in

DOMAIN = f"gui/{os.getuid()}"
JOB = f"{DOMAIN}/ssh-agent-proxy"

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
        user.mkdir()
        self.tree, self.home, self.user = tree, home, user
        self.launchd = home / "launchd"
        self.launchd.mkdir()
        stand_in(home / "mac", "launchctl", LAUNCHCTL)
        path = stand_in(home / "mac", "sleep", SLEEP)
        self.plist = user / "Library" / "LaunchAgents" / "ssh-agent-proxy.plist"
        self.log = user / "Library" / "Logs" / "ssh-agent-proxy.log"
        self.settings = user / ".config" / "ssh-agent-proxy" / "env"
        self.env = {"HOME": str(user), "PATH": path, "JOB": JOB, "LAUNCHD": str(self.launchd)}

    def make(self, *args: str) -> None:
        make(self.tree, self.home, *args, **self.env)

    def fails(self, *args: str) -> str:
        """What it says."""
        answer = make(self.tree, self.home, *args, check=False, **self.env)
        assert answer.returncode != 0
        return answer.stderr.decode()

    def install(self) -> List[str]:
        """What launchctl was asked to do."""
        self.make("install-launchd")
        return self.calls()

    def calls(self) -> List[str]:
        """The same since the last time, without questions."""
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
        return dict(plistlib.loads(self.plist.read_bytes()))


@pytest.fixture
def mac(tree: Path, home: Path, short: Path) -> Mac:
    return Mac(tree, home, short / """two  blanks R&D <b> it's "me" @LOG@ ]]> --><key> ü %h\\1""")


# ---------------------------------------------------------------- the plist


def test_it_says_what_launchd_shall_do_whatever_the_users_name(mac: Mac) -> None:
    assert mac.install() == [f"enable {JOB}", f"bootstrap {DOMAIN} {mac.plist}"]
    assert mac.written() == {
        "Label": "ssh-agent-proxy",
        "ProgramArguments": [str(mac.user / ".local" / "bin" / "ssh-agent-proxy"), "serve"],
        "EnvironmentVariables": {},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,
        "ExitTimeOut": 15,
        "ProcessType": "Interactive",
        "Umask": 0o077,
        "StandardErrorPath": str(mac.log),
    }
    assert (mac.launchd / "loaded").read_bytes() == mac.plist.read_bytes()
    assert [mode(mac.log), mode(mac.plist)] == [0o600, 0o600]
    assert files(mac.plist.parent) == ["ssh-agent-proxy.plist"]


def test_what_the_plist_starts_serves(mac: Mac, agent_with_key: Agent, short: Path) -> None:
    # Program and settings may be elsewhere.
    (short / "else where").mkdir()
    settings = f"SSH_AGENT_PROXY_ADDR=127.0.0.1:0\nSSH_AUTH_SOCK='{agent_with_key.sock}'\n"
    (short / "else where" / "env").write_text(settings)
    mac.make("install-launchd", f"CONFIG_DIR={short}/else where", f"BINDIR={short}/a & b")
    plist = mac.written()
    assert plist["ProgramArguments"][0] == f"{short}/a & b/ssh-agent-proxy"
    env = {"HOME": str(mac.user), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
    proxy = Proxy(plist["ProgramArguments"], {**env, **plist["EnvironmentVariables"]})
    try:
        assert http(proxy.port, "POST", "/sign", b"x").status == 200
        assert http(proxy.port, "GET", "/shim").body == SHIM.read_bytes()
    finally:
        # An exit that launchd takes for the end, by what KeepAlive says.
        assert proxy.stop() == 0


# ---------------------------------------------------------------- settings

# Lines, and the value of the last one's variable.
SETTINGS = {
    "PLAIN=b": "b",
    "TWICE=b\nTWICE=c": "c",
    "# x\n;y=z\n\n \t\nCOMMENT=b # not one": "b # not one",
    "EMPTY=''": "",
    "BLANKS = b c \t\r": "b c",
    "  DOUBLE=\"b  'c\"": "b  'c",
    "SINGLE=' b \"c '": ' b "c ',
    "INSIDE=it's \"so\"": "it's \"so\"",
    "XML=<b>&amp;]]>": "<b>&amp;]]>",
    "ALONE=$HOME %h `b` $(c) @LOG@": "$HOME %h `b` $(c) @LOG@",
}


def test_settings_are_read_as_systemd_would(mac: Mac) -> None:
    mac.set("\n".join([*SETTINGS, "#COMMENTED=out\n"]))
    mac.install()
    names = [lines.rpartition("\n")[2].partition("=")[0].strip() for lines in SETTINGS]
    assert mac.written()["EnvironmentVariables"] == dict(zip(names, SETTINGS.values()))


REFUSED = rows([
    ("no value", b"A", "line 1: not NAME=VALUE"),
    ("a shell's export", b"\nexport A=b", "line 2: not NAME=VALUE"),
    ("a backslash", b"A=b\\", "line 1: a backslash in A is not understood here"),
    ("an open quote", b'A="b', 'line 1: A does not end with the " that it begins with'),
    ("a lone quote", b"A='", "line 1: A does not end with the ' that it begins with"),
    ("two quoted parts", b"A='b' 'c'", "line 1: A does not end with the ' that it begins with"),
    ("a control character", b"A=b\x01", "can't stand in a plist"),
    ("what is not UTF-8", b"A=\xff", "can't stand in a plist"),
])  # fmt: skip


@pytest.mark.parametrize(("text", "why"), REFUSED)
def test_settings_that_might_mean_something_else_write_nothing(
        short: Path, text: bytes, why: str) -> None:  # fmt: skip
    settings, plist = short / "env", short / "plist"
    settings.write_bytes(text)
    plist.write_text("as it was")
    fill = [sys.executable, "-I", ROOT / "contrib/launchd/fill.py"]
    answer = run([*fill, short / "program", short / "log", settings, plist], check=False)
    assert answer.returncode != 0
    errors = answer.stderr.decode()
    assert f"{settings}: {why}" in errors or (str(plist) in errors and why in errors)
    assert "Traceback" not in errors
    assert plist.read_text() == "as it was"
    assert files(short) == ["env", "plist"]


# ---------------------------------------------------------------- again, and no longer


def test_a_second_install_puts_the_new_settings_into_force(mac: Mac) -> None:
    mac.install()
    mac.log.write_text("what it said\n")
    (mac.launchd / "disabled").write_text("")
    mac.set("A=b\n")
    boots = [f"bootout {JOB}", f"enable {JOB}", f"bootstrap {DOMAIN} {mac.plist}"]
    assert mac.install() == boots
    assert mac.log.read_text() == "what it said\n"
    assert (mac.launchd / "loaded").read_bytes() == mac.plist.read_bytes()
    assert mac.written()["EnvironmentVariables"] == {"A": "b"}
    # With settings that can't be read it goes on as it is.
    before = snapshot(mac.user / "Library")
    mac.set("A")
    assert "not NAME=VALUE" in mac.fails("install-launchd")
    assert mac.calls() == []
    assert snapshot(mac.user / "Library") == before


@pytest.mark.long
def test_a_proxy_that_is_still_finishing_is_waited_for_with_a_bound(mac: Mac) -> None:
    mac.install()
    (mac.launchd / "draining").write_text("x\n" * 3)
    boots = [f"enable {JOB}", f"bootstrap {DOMAIN} {mac.plist}"]
    assert mac.install() == [f"bootout {JOB}", "sleep", "sleep", "sleep", *boots]
    for target in ("install-launchd", "uninstall-launchd"):
        (mac.launchd / "draining").write_text("x\n" * 100)
        told = mac.fails(target)
        assert f"launchd still has {JOB}: launchctl bootout {JOB}\n" in told
        assert mac.plist.exists()


@pytest.mark.long
def test_an_old_launchctl_is_spoken_to_as_it_knows(mac: Mac) -> None:
    (mac.launchd / "old").write_text("")
    assert mac.install()[-1] == f"load -w {mac.plist}"
    assert (mac.launchd / "loaded").read_bytes() == mac.plist.read_bytes()
    mac.make("uninstall-launchd")
    assert mac.calls()[-1] == f"unload {mac.plist}"
    assert not (mac.launchd / "loaded").exists()


@pytest.mark.long
def test_a_launchd_that_refuses_is_told_with_its_reason(mac: Mac) -> None:
    (mac.launchd / "refuses").write_text("")
    why = f"launchd did not take {mac.plist}: Bootstrap failed: 125: no such domain\n"
    assert why in mac.fails("install-launchd")


def test_uninstall_leaves_log_and_settings_and_programs(mac: Mac) -> None:
    mac.make("uninstall-launchd")  # where it was never installed
    assert files(mac.user) == []
    mac.set("A=b\n")
    mac.install()
    mac.log.write_text("what it said\n")
    before = snapshot(mac.user)
    mac.make("uninstall-launchd")
    assert mac.calls() == [f"bootout {JOB}"]
    del before["Library/LaunchAgents/ssh-agent-proxy.plist"]
    assert snapshot(mac.user) == before


# ---------------------------------------------------------------- where it can't be


def test_where_it_can_not_be_nothing_is_written_and_that_is_told(mac: Mac, home: Path) -> None:
    path = path_without("launchctl", home / "bin")
    (home / "bin" / "id").symlink_to(str(shutil.which("id")))
    linux = "there is no launchctl here: launchd is macOS's (on Linux: make install-systemd)"
    for told, env, *args in [
        (linux, {"PATH": path}, "install-launchd"),
        (linux, {"PATH": path}, "uninstall-launchd"),
        ("without sudo, please", {"SUDO_UID": "501"}, "install-launchd"),
        ("not with DESTDIR", {}, "install-launchd", "DESTDIR=/package"),
    ]:
        assert told in refused(mac.tree, home, *args, **{**mac.env, **env})
    assert (files(mac.user), mac.calls()) == ([], [])
