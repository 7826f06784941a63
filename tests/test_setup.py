"""`setup`: real git, proxy and agent, homes of all kinds, and repositories that mean harm."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import pytest
from conftest import SHIM, Agent, Keys, clean_env, fingerprint, need, rows, run
from test_shim import (
    ARMOR,
    CALLED,
    LINE,
    NOBODY,
    SHELLS,
    URL,
    Done,
    Served,
    answer,
    in_a_namespace,
    liar,
    on,
    on_linux,
    serve,
    served,
    tree,
)

__all__ = ["liar", "served"]  # fixtures

OWN = ".config/ssh-agent-proxy"
CONFIG = "[user]\n\tname = Me\n\temail = me@example.com\n"
LINES = """\
# ssh-agent-proxy-sign setup
[includeIf "gitdir:**"]
    path = ~/.config/ssh-agent-proxy/gitconfig
"""
GOOD = "ok   the next commit will be signed, and verify"
UNTIL = "FAIL git commits nothing until that is mended; then run `ssh-agent-proxy-sign setup` again"


class Report:
    """What setup said: at most 12 lines, the last of which says whether it is well."""

    def __init__(self, done: Done[bytes]) -> None:
        self.status = done.returncode
        self.text = done.stdout.decode("ascii")
        self.lines = self.text.splitlines()
        assert done.stderr == b"", done
        assert 1 <= len(self.lines) <= 12, self.text
        for line in self.lines:
            assert re.fullmatch(r"(ok  |warn|FAIL|todo) [ -~]+", line), line
            assert len(line) < 700, line
        assert self.lines[-1][:4] == ("FAIL" if self.status else "ok  "), self.text
        assert ("FAIL" in self.text) == (self.status == 1), self.text
        assert "no-gpg-sign" not in self.text
        assert "gpgsign=false" not in self.text


class Place:
    """A home, the shim in it, and a repository."""

    def __init__(self, shell: str, home: Path, keys: Keys, env: Dict[str, str]) -> None:
        need(shell, shell)
        self.home = home
        self.shim = home.parent / "bin" / "ssh-agent-proxy-sign"
        self.shim.parent.mkdir()
        self.shim.symlink_to(SHIM)
        self.argv = [*CALLED.get(shell, [shell]), str(self.shim)]
        self.env = {k: v for k, v in clean_env(home.parent).items() if not k.startswith("GIT_A")}
        del self.env["GIT_COMMITTER_NAME"], self.env["GIT_COMMITTER_EMAIL"]
        self.env.update(env, HOME=str(home), KEYS=str(keys.folder), SHIM=str(self.shim))
        assert keys["ed25519"] and keys["other"]  # they are made
        self.config = home / ".gitconfig"
        self.config.write_text(CONFIG)
        self.repository = home.parent / "repository"
        self.sh("git init -q -b main ../repository")
        self.commit()

    def sh(self, script: str, where: Optional[Path] = None, check: bool = True) -> Done[bytes]:
        return run(["sh", "-euc", script], env=self.env, cwd=where or self.home, check=check)

    def __call__(
        self, *options: str, where: Optional[Path] = None, before: Sequence[str] = (), **env: str
    ) -> Report:
        argv = [*before, *self.argv, "setup", *options]
        done = run(argv, env={**self.env, **env}, cwd=where or self.home, check=False)
        left = [p for p in Path(self.env["TMPDIR"]).iterdir() if "signing_key_tmp" not in p.name]
        assert left == []
        return Report(done)

    def commit(self, **env: str) -> str:
        """What git says of the signature of a commit made now, or of why there is none."""
        self.env.update(env)
        script = "git commit -q --allow-empty -m x && git log -1 --format=%G? 2>/dev/null"
        done = self.sh(script, where=self.repository, check=False)
        return done.stdout.decode().strip() or done.stderr.decode()

    def own(self) -> Dict[str, bytes]:
        """Every file under the home, with what it holds."""
        return tree(self.home)

    def refuses(self, told: str, *options: str, **more: Any) -> Report:
        report = self(*options, **more)
        assert report.status == 1, report.text
        assert told in report.text, report.text
        return report

    def is_well(self, *told: str, verdict: str = GOOD, **more: Any) -> Report:
        report = self(**more)
        assert report.lines[-1] == verdict, report.text
        assert not [one for one in told if one not in report.text], report.text
        return report


@pytest.fixture(params=[on(shell) for shell in SHELLS])
def place(request: Any, home: Path, keys: Keys, served: Served) -> Place:
    """Under every shell."""
    return Place(request.param, home, keys, served)


@pytest.fixture
def one(home: Path, keys: Keys, served: Served) -> Place:
    return Place("dash", home, keys, served)


# ---------------------------------------------------------------- there and back


def test_it_signs_and_a_second_run_changes_nothing_and_undo_leaves_it_as_it_was(
    place: Place, served: Served, keys: Keys
) -> None:
    before = place.own()
    report = place.is_well("todo register as a *signing* key", keys.line("ed25519"))
    shown = fingerprint(keys["ed25519"])
    assert f"todo compare: `ssh-agent-proxy check` on the host must show {shown}" in report.lines
    assert place.config.read_text() == CONFIG + LINES
    own = place.own()
    signatures = len(served.proxy.lines("outcome=signed"))
    assert place().lines == [line for line in report.lines if not line.startswith("ok   tags")]
    assert place.own() == own
    assert len(served.proxy.lines("outcome=signed")) == signatures
    assert place("--sign").status == 0
    assert len(served.proxy.lines("outcome=signed")) == signatures + 1
    del place.env[URL]
    assert place.commit() == "G"
    undone = place("--undo")
    assert undone.lines == ["ok   undone: git signs no commit by itself"]
    assert place.own() == before
    assert place("--undo").lines == undone.lines
    assert place.commit() == "N"


def some(table: Sequence[Any], *names: str) -> List[Any]:
    """Rows, of which those but NAMES are for whoever runs all tests."""
    return [
        pytest.param(*row[1:], id=row[0], marks=[] if row[0] in names else pytest.mark.long)
        for row in table
    ]


# What stands in ~/.gitconfig first.
CONFIGS = [
    ("no end of its last line", CONFIG[:-1]),
    ("carriage returns", CONFIG.replace("\n", "\r\n")),
    ("lines of another include", f"{CONFIG}[includeIf \"gitdir:**\"]\n    path = ~/x\n"),
    ("an empty line at its end", f"{CONFIG}\n\n"),
    ("a value with a line end", f"{CONFIG}[alias]\n\tx = \"!a\\nb\" \\\n  c\n"),
]


@pytest.mark.parametrize("text", some(CONFIGS, "no end of its last line"))
def test_the_bytes_of_gitconfig_come_back(place: Place, text: str) -> None:
    place.config.write_bytes(text.encode())
    place.config.chmod(0o640)
    place.is_well()
    assert place.commit() == "G"
    assert place("--undo").status == 0
    assert place.config.read_bytes() == f"{text.removesuffix(chr(10))}\n".encode()
    assert place.config.stat().st_mode & 0o777 == 0o640


# Where git's file is: what is done before, the file that gets the lines, what undo leaves.
FILES = [
    ("none", "rm .gitconfig", ".gitconfig"),
    ("a link", "mv .gitconfig real; ln -s real .gitconfig", "real"),
    ("a dangling link", "mv .gitconfig x; ln -s real .gitconfig", "real"),
    ("XDG's", "mkdir -p .config/git; mv .gitconfig .config/git/config", ".config/git/config"),
    ("both", "mkdir -p .config/git; cp .gitconfig .config/git/config", ".gitconfig"),
    ("another home of XDG's", "mkdir -p x/git; mv .gitconfig x/git/config", "x/git/config"),
    ("GIT_CONFIG_GLOBAL's", "mv .gitconfig $(printf 'given\\033')", "given\x1b"),
]


@pytest.mark.parametrize("script, written", some(FILES, "a link", "GIT_CONFIG_GLOBAL's"))
def test_the_lines_go_where_git_would_write(script: str, written: str, one: Place) -> None:
    one.env.update(EMAIL="me@example.com", GIT_COMMITTER_NAME="C", GIT_AUTHOR_NAME="A")
    if written.startswith("x/"):
        one.env["XDG_CONFIG_HOME"] = str(one.home / "x")
    if written.startswith("given"):
        one.env["GIT_CONFIG_GLOBAL"] = str(one.home / written)
    one.sh(script)
    before = one.own()
    links = [p for p in one.home.iterdir() if p.is_symlink()]
    one.is_well()
    assert (one.home / written).read_text().endswith(LINES)
    assert all(p.is_symlink() for p in links)
    assert one.commit() == "G"
    assert one("--undo").status == 0
    after = one.own()
    if "real" not in before and "real" in after:
        assert after.pop("real") == after.pop(".gitconfig") == b""
    assert after == before
    assert all(p.is_symlink() for p in links)


MOUNTED = 'cd "$HOME" && mount --bind copy .gitconfig && '


@on_linux
@pytest.mark.parametrize("options", ["", "-o remount,ro,bind"])
def test_a_mounted_gitconfig_stays_mounted(one: Place, options: str) -> None:
    """Nothing can be renamed over it; and what is mounted read-only is not written to."""
    one.sh("cp .gitconfig copy")
    script = MOUNTED
    if options:
        script += f"mount {options} .gitconfig && "
        one.refuses("docs/containers.md", before=in_a_namespace(script + 'exec "$@"'))
        assert not (one.home / OWN).exists()
        one.config.write_text(CONFIG + LINES)
        one.sh("cp .gitconfig copy")
        one.refuses("cannot be taken away", "--undo", before=in_a_namespace(script + 'exec "$@"'))
        assert sorted(one.own()) == [".gitconfig", "copy"]
        return
    one.is_well(before=in_a_namespace(script + 'exec "$@"'))
    assert (one.home / "copy").read_text() == CONFIG + LINES
    assert one.config.read_text() == CONFIG
    report = one("--undo", before=in_a_namespace(script + 'exec "$@"'))
    assert report.status == 0
    assert one.own() == {".gitconfig": CONFIG.encode(), "copy": CONFIG.encode()}


def test_two_runs_at_once_do_no_harm(one: Place) -> None:
    argv = [*one.argv, "setup"]
    started = [
        subprocess.Popen(argv, env=one.env, stdout=subprocess.DEVNULL) for _ in range(3)
    ]
    assert [process.wait(30) for process in started] == [0, 0, 0]
    one.is_well()
    assert one.commit() == "G"
    assert one("--undo").status == 0
    assert one.own() == {".gitconfig": CONFIG.encode()}


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_include_of_the_users_own_stays(one: Place, when: str) -> None:
    script = "echo '[alias]' >x; git config --global include.path '~/x'"
    if when == "before":
        one.sh(script)
    one.is_well()
    if when == "after":
        one.sh(script)
    one.is_well()
    assert one.commit() == "G"
    assert b"path = ~/x" in one.sh("cat .gitconfig").stdout
    assert one("--undo").status == 0
    one.sh("git config --global include.path | grep -x '~/x'")


# ---------------------------------------------------------------- what is there already

GLOBAL = "git config --global "
OTHER_KEYS = [
    ("a Mac's signer", f"{GLOBAL}gpg.ssh.program /Applications/1Password.app/op-ssh-sign",
     "gpg.ssh.program = '/Applications/1Password.app/op-ssh-sign' (file:HOME/.gitconfig)"),
    ("a Windows' signer", f"{GLOBAL}gpg.ssh.program 'C:/Program Files/1Password/op.exe'",
     "gpg.ssh.program = 'C:/Program Files/1Password/op.exe'"),
    ("a dead key", f"{GLOBAL}user.signingkey /Users/me/.ssh/id.pub",
     "user.signingkey = '/Users/me/.ssh/id.pub'"),
    ("an empty key", f": >empty.pub; {GLOBAL}user.signingkey '~/empty.pub'",
     "user.signingkey = 'HOME/empty.pub'"),
    ("an empty value", f"{GLOBAL}user.signingkey ''", "user.signingkey = ''"),
    ("a GPG id", f"{GLOBAL}user.signingkey ABCDEF0123456789; {GLOBAL}gpg.format openpgp",
     "gpg.format = 'openpgp'"),
    ("a relative key", f"cp $KEYS/ed25519.pub .; {GLOBAL}user.signingkey ed25519.pub",
     "user.signingkey = 'ed25519.pub'"),
    ("a folder", f"mkdir k.pub; {GLOBAL}user.signingkey '~/k.pub'",
     "user.signingkey = 'HOME/k.pub'"),
    ("nobody's key", f"{GLOBAL}user.signingkey 'key::{NOBODY}'", "user.signingkey = 'key::ssh"),
    ("no signing", f"{GLOBAL}commit.gpgsign false", "commit.gpgsign = 'false'"),
    ("a dead signers file", f"{GLOBAL}gpg.ssh.allowedSignersFile /Users/me/signers",
     "gpg.ssh.allowedSignersFile = '/Users/me/signers'"),
    ("a path beyond ASCII", "mkdir \u00e4; echo '[gpg]format=openpgp' >\u00e4/x; "
     + GLOBAL + "include.path ~/\u00e4/x",
     "gpg.format = 'openpgp' (file:\"HOME/\\303\\244/x"),
    ("escapes", f"{GLOBAL}gpg.ssh.program \"$(printf '/a\\033[2J\\n\\303\\244')\"",
     "gpg.ssh.program = '/a?[2J???'"),
]  # fmt: skip


SHORT = ["a Mac's signer", "an empty key", "a GPG id", "a relative key", "nobody's key",
         "a path beyond ASCII"]  # fmt: skip


@pytest.mark.parametrize("script, told", some(OTHER_KEYS, *SHORT))
def test_what_cannot_be_used_is_overridden_and_named(one: Place, script: str, told: str) -> None:
    one.sh(script)
    before = one.own()
    report = one.is_well("warn overridden: ", told.replace("HOME", str(one.home)))
    own = one.own()
    assert one().lines == [line for line in report.lines if not line.startswith("ok   tags")]
    assert one.own() == own
    assert one.commit() == "G"
    assert one("--undo").status == 0
    assert one.own() == before


KEPT = [
    ("a .pub file", "$KEYS/ed25519.pub"),
    ("a private key's name", "$KEYS/ed25519"),
    ("the home's", "~/.ssh/k.pub"),
    ("itself", "key::$(cut -d ' ' -f 1,2 $KEYS/ed25519.pub)"),
]


@pytest.mark.parametrize("key", some(KEPT, "itself"))
def test_a_key_that_can_be_used_is_kept(one: Place, key: str) -> None:
    one.sh(f'mkdir .ssh; cp $KEYS/ed25519.pub .ssh/k.pub; {GLOBAL}user.signingkey "{key}"')
    one.is_well()
    assert "signingkey" not in (one.home / OWN / "gitconfig").read_text()
    assert one.commit() == "G"


def test_a_usable_key_that_is_not_the_first_is_asked_for(
    one: Place, keys: Keys, agent: Agent
) -> None:
    for name in ("ed25519", "other"):
        agent.add(keys[name])
    one.sh(f"{GLOBAL}user.signingkey $KEYS/other.pub")
    one.refuses("answered 404")
    with serve(agent) as env:
        one.env.update(env)
        one.is_well(fingerprint(keys["other"]))
        one.is_well(fingerprint(keys["other"]))
        assert len(env.proxy.lines("outcome=signed")) == 1
    assert "other" not in (one.home / OWN / "allowed_signers").read_text()


# ---------------------------------------------------------------- whom to trust


def test_another_key_for_the_same_address_is_trusted_by_its_fingerprint_alone(
    place: Place, keys: Keys, agent: Agent
) -> None:
    place.is_well()
    agent.add(keys["other"])
    old, new = fingerprint(keys["ed25519"]), fingerprint(keys["other"])
    signers = place.home / OWN / "allowed_signers"
    before = signers.read_bytes()
    with serve(agent) as env:
        place.env.update(env)
        report = place.refuses(f"trusted for me@example.com is the key {old}")
        assert f"what signs now is {new}" in report.text
        assert f"--trust {new}" not in report.text
        assert place.commit() == "U"
        place.refuses("and --trust names another", "--trust", old)
        assert env.proxy.lines("outcome=signed")[1:] == []
        assert signers.read_bytes() == before
        assert place("--trust", new).lines[-1] == GOOD
        assert place.is_well().lines[-1] == GOOD
        assert place.commit() == "G"
    assert signers.read_text().count(' namespaces="git" ssh-ed25519 ') == 2


SIGNERS = [
    ("with the line", 'echo "me@example.com $(cut -d " " -f 1,2 $KEYS/ed25519.pub)" >s', 0),
    ("with it for all", 'echo "* namespaces=\\"git\\" $(cat $KEYS/ed25519.pub)" >s', 0),
    ("without it", 'echo "# me@example.com $(cat $KEYS/ed25519.pub)" >s', 1),
    ("with another's", 'echo "you@example.com $(cat $KEYS/other.pub)" >s', 1),
]  # fmt: skip


@pytest.mark.parametrize("script, status", some(SIGNERS, "with the line", "without it"))
def test_signers_of_the_users_own_are_not_touched(
    one: Place, keys: Keys, script: str, status: int
) -> None:
    one.sh(f"{script}; {GLOBAL}gpg.ssh.allowedSignersFile '~/s'")
    before = (one.home / "s").read_bytes()
    for _ in range(2):
        if status:
            key = " ".join(keys.line("ed25519").split()[:2])
            one.refuses(f'lacks this line: me@example.com namespaces="git" {key}')
        else:
            one.is_well()
    assert (one.home / "s").read_bytes() == before
    assert not (one.home / OWN / "allowed_signers").exists()
    assert one("--undo").status == 0
    assert (one.home / "s").exists()


def test_lines_of_others_stay_in_our_signers(one: Place, keys: Keys) -> None:
    signers = one.home / OWN / "allowed_signers"
    signers.parent.mkdir(parents=True)
    lines = ["# mine", "", f"you@example.com {keys.line('other')}", "me@example.org *"]
    signers.write_text("\n".join(lines))
    one.is_well()
    assert one.commit() == "G"
    assert one("--undo").status == 0
    assert signers.read_text().splitlines() == lines


# ---------------------------------------------------------------- what wins over the settings

HERE = "cd ../repository; git config "
WINS = [
    ("the format, here", f"{HERE}gpg.format openpgp",
     "FAIL gpg.format is openpgp (file:.git/config): git config --local --unset-all gpg.format"),
    ("the signer, here", f"{HERE}gpg.ssh.program ./evil",
     "FAIL gpg.ssh.program is ./evil (file:.git/config): git config --local --unset-all"),
    ("the signing, here", f"{HERE}commit.gpgsign off",
     "FAIL commit.gpgsign is false (file:.git/config): git config --local --unset-all commit."),
    ("no boolean, here", f"{HERE}commit.gpgsign maybe", "FAIL commit.gpgsign is maybe (file:.git/"),
    ("a later line", "$SHIM setup >/dev/null; printf '[gpg]\\nformat = x509\\n' >>.gitconfig",
     "FAIL gpg.format is x509 (file:HOME/.gitconfig): git config --file 'HOME/.gitconfig' --unset"),
    ("an include of theirs", "$SHIM setup >/dev/null; echo '[commit]gpgsign=0' >'it'\"'\"'s'; \
      printf '[include]\\npath = ~/it%ss' \"'\" >>.gitconfig",
     "FAIL commit.gpgsign is false (file:HOME/it's): git config --file 'HOME/it'\\''s' --unset"),
]  # fmt: skip


@pytest.mark.parametrize("script, told", some(WINS, "the signing, here", "an include of theirs"))
def test_what_wins_is_named_with_its_origin_and_its_cure(
    one: Place, script: str, told: str
) -> None:
    one.sh(script)
    report = one.refuses(told.replace("HOME", str(one.home)), where=one.repository)
    assert "is mended" in report.lines[-1]
    fault = next(line for line in report.lines if told.split()[1] in line)
    one.sh(fault.split("): ")[1], where=one.repository)
    one.is_well(where=one.repository)


ENVIRONMENT = [
    ("by count", {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "gpg.format",
                  "GIT_CONFIG_VALUE_0": "openpgp"}, "gpg.format is openpgp (command line:)"),
    ("by parameters", {"GIT_CONFIG_PARAMETERS": "'commit.gpgsign'='false'"},
     "commit.gpgsign is false (command line:): take it out of this shell's GIT_CONFIG_COUNT or"),
]  # fmt: skip


@pytest.mark.parametrize("env, told", rows(ENVIRONMENT))
def test_what_the_environment_sets_is_named(one: Place, env: Dict[str, str], told: str) -> None:
    one.refuses(told, **env)
    (one.home / "elsewhere").write_text("[gpg]\n\tformat = x\n")
    one.is_well(where=one.repository, GIT_CONFIG=str(one.home / "elsewhere"))
    assert (one.home / "elsewhere").read_text() == "[gpg]\n\tformat = x\n"


def test_a_key_of_the_folders_own_is_its_own_affair(one: Place) -> None:
    one.sh("echo '[user]signingkey=~/k.pub' >x; git config --global "
           'includeIf.gitdir:**/repository/.path "~/x"')  # fmt: skip
    report = one.is_well(where=one.repository, verdict=GOOD.replace(
        " will", " outside this repository will"))  # fmt: skip
    told = f"user.signingkey = '{one.home}/k.pub' (file:{one.home}/x)"
    assert told in report.text
    one.is_well()
    one.sh("rm x")
    one.is_well(where=one.repository)
    one.sh("git config gpg.ssh.allowedSignersFile x", where=one.repository)
    assert "gpg.ssh.allowedSignersFile = 'x' (file:.git/config)" in one(where=one.repository).text


# ---------------------------------------------------------------- only where there is a remote

REMOTE = "ok   the next commit in a repository that has a remote will be signed, and verify"


def test_only_repositories_with_a_remote_are_signed(place: Place) -> None:
    assert place("--remote-only").lines[-1] == REMOTE
    place.is_well(verdict=REMOTE, where=place.repository)
    assert LINES.replace("gitdir:**", "hasconfig:remote.*.url:**") in place.config.read_text()
    assert place.commit() == "N"
    place.sh("git remote add origin https://example.com/x", where=place.repository)
    assert place.commit() == "G"
    place.is_well(verdict=REMOTE, where=place.repository)
    assert place("--undo").status == 0
    assert place.own() == {".gitconfig": CONFIG.encode()}
    place.is_well()
    place.refuses("setup --undo` first", "--remote-only")


def test_signing_everywhere_stands_against_remote_only(one: Place) -> None:
    one.sh(f"{GLOBAL}commit.gpgsign yes")
    before = one.own()
    cure = f"git config --file '{one.config}' --unset-all commit.gpgsign"
    report = one.refuses(f"without a remote too (file:{one.config}): {cure}", "--remote-only")
    assert "nothing was written" in report.lines[-1]
    assert one.own() == before


# ---------------------------------------------------------------- where nothing is written

MAIL = "git config --global user.email YOU@EXAMPLE.COM"
SETTLED = [
    ("no mail address", f"{GLOBAL}--unset user.email", {}, MAIL),
    ("a blank in it", f"{GLOBAL}user.email 'me @example.com'", {}, "(me @example.com): git"),
    ("a pattern", f"{GLOBAL}user.email '*@example.com'", {}, "(*@example.com): git"),
    ("two", f"{GLOBAL}user.email 'a@b,c@d'", {}, MAIL),
    ("no @", f"{GLOBAL}user.email me", {}, MAIL),
    ("escapes", f"{GLOBAL}user.email \"$(printf 'a\\033[2J@b')\"", {}, "(a?[2J@b): git"),
    ("no name", f"{GLOBAL}--unset user.name", {}, "user.name 'YOUR NAME' && git config"),
    ("no HOME", "", {"HOME": ""}, MAIL),
    ("no HOME, but an address", "", {"HOME": "", "EMAIL": "a@b"}, "HOME is '', which is not the"),
    ("a relative HOME", "", {"HOME": "x", "EMAIL": "a@b"}, "HOME is 'x', which is not the whole"),
    ("a HOME that is missing", "", {"HOME": "/x/y", "EMAIL": "a@b"}, "HOME is '/x/y', which"),
    ("a device", "", {"GIT_CONFIG_GLOBAL": "/dev/null", "EMAIL": "a@b"}, "/dev/null is no regular"),
    ("a file for our folder", "mkdir .config; : >.config/ssh-agent-proxy", {}, "cannot be written"),
    ("broken settings", "echo '[' >.gitconfig", {}, "git does not run: bad config line 1 in file"),
    ("no git", "", {"PATH": "EMPTY"}, "its package is called git"),
    ("an old git", "echo 2.33.9 >git", {}, "git version 2.33.9 is too old to sign with SSH keys"),
    ("an ancient git", "echo 1.9.1 >git", {}, "git version 1.9.1 is too old"),
    ("no TMPDIR", "", {"TMPDIR": "/x/y"}, "no folder can be made in /x/y: set TMPDIR"),
]  # fmt: skip


@on_linux
def test_an_address_that_git_makes_up_is_none(one: Place) -> None:
    """It does where the host's name has a dot."""
    before = in_a_namespace('hostname a.example.com && exec "$@"')
    one.sh(f"{GLOBAL}--unset user.email")
    one.refuses(MAIL, before=[*before[:1], "--uts", *before[1:]])


def stand_in(one: Place) -> None:
    """A git that says to be of the version in ~/git."""
    git = one.shim.parent / "git"
    real = need("git", "git")
    said = f"exec echo git version $(cat {one.home}/git)"
    git.write_text(f'#!/bin/sh\n[ "$2" != version ] || {said}\nexec {real} "$@"\n')
    git.chmod(0o755)
    one.env["PATH"] = f"{one.shim.parent}:{one.env['PATH']}"


SOON = ["no mail address", "a pattern", "a relative HOME", "a device", "no git", "an old git"]


@on_linux
@pytest.mark.parametrize("script, env, told", some(SETTLED, *SOON))
def test_nothing_is_written_before_it_is_settled(
    one: Place, tmp_path: Path, script: str, env: Dict[str, str], told: str
) -> None:
    if env.get("PATH"):
        for program in ("tr", "mktemp", "sed", "tail", "rm", "rmdir", "head", "cat"):
            (tmp_path / program).symlink_to(need(program, "coreutils"))
        env = {"PATH": str(tmp_path)}
        one.argv[0] = need("dash", "dash")
    one.sh(script)
    if (one.home / "git").exists():
        stand_in(one)
    device = env.get("GIT_CONFIG_GLOBAL")
    files = one.own()
    folder = (one.home / ".config").exists()
    name = {} if "name" in told else {"GIT_COMMITTER_NAME": "C", "GIT_AUTHOR_NAME": "A"}
    # (/dev/null is mounted over itself: nothing that goes wrong here can replace it.)
    before = in_a_namespace('mount --bind /dev/null /dev/null && exec "$@"') if device else []
    report = one.refuses(told, before=before, **{**name, **env})
    assert len(report.lines) == 1
    assert one.own() == files
    assert (one.home / ".config").exists() == folder


VERSIONS = [
    ("2.34.1", "warn tags: "),
    ("2.43.1.windows.1", "warn tags: "),
    ("2.43.2", "ok   tags: "),
    ("2.50.1 (Apple Git-155)", "ok   tags: "),
    ("3.0.rc1", "ok   tags: "),
]


@pytest.mark.long
@pytest.mark.parametrize("version, tags", VERSIONS)
def test_what_an_older_git_does_with_tags_is_said(one: Place, version: str, tags: str) -> None:
    (one.home / "git").write_text(version)
    stand_in(one)
    one.is_well(tags)
    if version == "2.34.1":
        assert one("--undo").status == 0
        one.refuses("--remote-only takes git 2.36 or newer", "--remote-only")


def test_a_key_that_git_cannot_be_handed_is_told(one: Place, keys: Keys, agent: Agent) -> None:
    agent.add(keys["ecdsa256"])
    (one.home / "git").write_text("2.34.1")
    stand_in(one)
    with serve(agent) as env:
        one.env.update(env)
        report = one.refuses("takes a key such as ecdsa-sha2-nistp256 from a file only")
        one.env["PATH"] = f"{one.shim.parent}:{one.env['PATH']}"
        one.sh("mkdir .ssh; " + report.lines[0].split("only: ")[1])
        one.is_well()


BAD_OPTIONS = [["x"], ["--help"], ["--trust"], ["--trust", "SHA256:x"], ["--undo", "--sign", "x"]]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=" ".join)
def test_wrong_usage_is_2(one: Place, options: List[str]) -> None:
    done = run([*one.argv, "setup", *options], env=one.env, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"setup takes [--remote-only] [--trust SHA256:...] [--sign] or --undo" in done.stderr
    assert one.own() == {".gitconfig": CONFIG.encode()}


def test_the_program_must_be_a_file_that_can_be_run(place: Place) -> None:
    script = SHIM.read_bytes()
    sh = place.argv[:-1]
    (place.home / "sh").write_bytes(script)
    (place.home / "copy.sh").write_bytes(script)
    before = place.own()
    argv = [*sh, "-c", script.decode(), "sh", "setup"]
    done = run(argv, env=place.env, cwd=place.home, check=False)
    assert (done.returncode, done.stdout[:20]) == (1, b"FAIL git needs this ")
    done = run([*sh, "copy.sh", "setup"], env=place.env, cwd=place.home, check=False)
    assert (done.returncode, done.stdout[:20]) == (1, b"FAIL git needs this ")
    assert place.own() == before
    copy = place.home / "it's a \"copy\".sh"
    copy.write_bytes(script)
    copy.chmod(0o755)
    argv = [*sh, f"./{copy.name}", "setup"]
    assert run(argv, env=place.env, cwd=place.home).stdout.decode().endswith(f"{GOOD}\n")
    assert place.commit() == "G"


# ---------------------------------------------------------------- the proof, and what fails it


def test_a_proof_that_fails_leaves_the_settings_and_trusts_nobody(
    place: Place, served: Served
) -> None:
    """A commit then fails; it never goes unsigned."""
    place.env[URL] = "http://127.0.0.1:1/sign"
    report = place.refuses("nothing listens at http://127.0.0.1:1/")
    assert report.lines[1:] == [UNTIL]
    assert sorted(place.own()) == [f"{OWN}/gitconfig", ".gitconfig"]
    assert "nothing listens at" in place.commit()
    place.env[URL] = served[URL]
    place.is_well()
    assert place.commit() == "G"


def test_a_key_that_cannot_sign_is_not_trusted(one: Place, agent: Agent, keys: Keys) -> None:
    agent.add(keys["ed25519"])
    with serve(agent, "--payloads", "tag") as env:
        report = one.refuses("answered 403: ", **env)
        assert report.lines[1:] == [UNTIL]
    assert not (one.home / OWN / "allowed_signers").exists()
    assert "403" in one.commit(**env) or "listens" in one.commit()


def test_a_key_whose_signature_does_not_verify_is_not_trusted(one: Place, liar: Any) -> None:
    key = answer(f"{LINE} me\n".encode())
    server = liar(key, key, answer(ARMOR))
    report = one.refuses("that verifies: ", **server.env)
    assert report.lines[1:] == [UNTIL]
    assert not (one.home / OWN / "allowed_signers").exists()


def test_a_key_that_nobody_holds_is_not_trusted(one: Place, liar: Any) -> None:
    server = liar(answer(f"{NOBODY} me\n".encode()))
    one.refuses("answered 200 without a public key", **server.env)
    assert not (one.home / OWN / "allowed_signers").exists()
    assert not (one.home / OWN / "url").exists()


def test_the_address_is_kept_and_what_else_was_relied_on_is_named(
    one: Place, agent: Agent, keys: Keys, served: Served
) -> None:
    agent.add(keys["ed25519"])
    one.is_well()
    assert (one.home / OWN / "url").read_text() == f"{served[URL]}\n"
    with serve(agent, tokens="s3cr3t-s3cr3t-s3cr3t one\n") as env:
        report = one(SSH_AGENT_PROXY_TOKEN="s3cr3t-s3cr3t-s3cr3t", **env)
        assert "relies on SSH_AGENT_PROXY_TOKEN of this shell" in report.text
        assert "~/.config/ssh-agent-proxy/token (mode 0600)" in report.text
        assert "s3cr3t" not in report.text
        (one.home / OWN / "token").write_text("s3cr3t-s3cr3t-s3cr3t\n")
        del one.env[URL]
        one.is_well()
        assert one.commit() == "G"
    before = (one.home / OWN / "url").read_text()
    one.refuses("nothing listens", **{URL: "http://127.0.0.1:1/sign"})
    assert (one.home / OWN / "url").read_text() == before
    assert one("--undo").status == 0
    assert [name for name in one.own() if OWN in name] == [f"{OWN}/token"]


@pytest.fixture
def without_ssh_keygen(one: Place) -> Place:
    """The programs that a small container has."""
    folder = one.home.parent / "few"
    folder.mkdir()
    for name in ["git", "curl", "sh", "mktemp", "sed", "tail", "rm", "rmdir", "cat", "mkdir",
                 "chmod", "mv", "cp", "cmp", "tr", "base64", "sha256sum", "cut"]:  # fmt: skip
        (folder / name).symlink_to(need(name, "coreutils"))
    one.argv[0] = need("dash", "dash")
    one.env["PATH"] = str(folder)
    return one


@pytest.mark.parametrize("missing", some([("none", ""), ("sum", "sha256sum")], "none"))
def test_without_ssh_keygen_it_signs_and_says_that_it_is_not_verified(
    missing: str, without_ssh_keygen: Place, keys: Keys
) -> None:
    one = without_ssh_keygen
    if missing:
        (one.home.parent / "few" / missing).unlink()
    report = one()
    assert report.status == 0
    assert report.lines[-1].startswith("ok   signs; not verified here: ssh-keygen is missing")
    assert "package openssh-client" in report.lines[-1]
    line = " ".join(keys.line("ed25519").split()[:2])
    shown = line if missing else fingerprint(keys["ed25519"])
    assert f"on the host must show {shown}" in report.text
    written = (one.home / OWN / "allowed_signers").read_text()
    assert written == ("# ssh-agent-proxy-sign setup: signed, and not verified\n"
                       f'me@example.com namespaces="git" {line}\n')  # fmt: skip
    assert one().lines[-1] == report.lines[-1]
    assert one("--undo").status == 0
    assert one.own() == {".gitconfig": CONFIG.encode()}


# ---------------------------------------------------------------- where nothing can be written

COUNTED = {
    "gpg.format": "ssh",
    "gpg.ssh.program": "ssh-agent-proxy-sign",
    "gpg.ssh.defaultKeyCommand": "ssh-agent-proxy-sign key",
    "commit.gpgsign": "1",
}


def counted() -> Dict[str, str]:
    env = {"GIT_CONFIG_COUNT": str(len(COUNTED))}
    for number, (key, value) in enumerate(COUNTED.items()):
        env.update({f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value})
    return env


@on_linux
def test_settings_of_the_environment_do_where_the_home_is_read_only(one: Place) -> None:
    before = in_a_namespace('mount --bind "$HOME" "$HOME" && mount -o remount,ro,bind "$HOME" && '
                            'exec "$@"')  # fmt: skip
    report = one.refuses("docs/containers.md#where-gitconfig-cant-be-written", before=before)
    assert f"{one.config} or ~/.config/ssh-agent-proxy cannot be written" in report.lines[0]
    env = {**counted(), "PATH": f"{one.shim.parent}:{one.env['PATH']}"}
    report = one(before=before, **env)
    assert report.lines[-1] == ("ok   signs; not verified here: git has no file of allowed signers "
                                "with this key in it")  # fmt: skip
    assert one.own() == {".gitconfig": CONFIG.encode()}
    one.refuses("nothing listens", before=before, **{**env, URL: "http://127.0.0.1:1/sign"})
    one.is_well(**env)
    one.config.write_text(CONFIG)
    assert one(before=before, **env).lines == report.lines


# ---------------------------------------------------------------- a repository that means harm


def test_nothing_that_a_repository_names_is_run_written_or_trusted(
    place: Place, served: Served
) -> None:
    evil = place.home.parent / "evil"
    evil.write_text(f"#!/bin/sh\necho \"$0 $*\" >>{place.home.parent}/ran\n")
    evil.chmod(0o755)
    settings = {
        "core.fsmonitor": evil, "core.pager": evil, "pager.config": evil, "pager.version": evil,
        "core.hooksPath": evil.parent / "hooks", "core.editor": evil, "core.sshCommand": evil,
        "alias.config": f"!{evil}", "alias.rev-parse": f"!{evil}", "alias.commit": f"!{evil}",
        "gpg.program": evil, "gpg.ssh.program": evil, "gpg.ssh.defaultKeyCommand": evil,
        "gpg.ssh.allowedSignersFile": place.home.parent / "theirs", "diff.external": evil,
        "user.email": "evil@example.com", "user.name": "\x1b[2J", "user.signingkey": "\x1b]0;x\x07",
        "init.templateDir": evil.parent / "template", "include.path": "../more\x1b[31m",
        "filter.x.clean": evil, "commit.template": evil, "core.askPass": evil,
        "credential.helper": f"!{evil}",
    }  # fmt: skip
    for name in ("post-commit", "pre-commit", "commit-msg", "post-index-change"):
        for folder in ("hooks", "template/hooks", "repository/.git/hooks"):
            hook = evil.parent / folder / name
            hook.parent.mkdir(parents=True, exist_ok=True)
            hook.symlink_to(evil)
    for key, value in settings.items():
        run(["git", "config", key, value], env=place.env, cwd=place.repository)
    place.sh(f"{GLOBAL}core.hooksPath {evil.parent}/hooks")  # nor do the user's own take part
    before = {p: p.read_bytes() for p in place.repository.rglob("*") if p.is_file()}
    git = place.repository / ".git"
    for env in (
        {},
        {"GIT_DIR": git, "GIT_WORK_TREE": place.repository, "GIT_INDEX_FILE": git / "index"},
        {"GIT_TEMPLATE_DIR": evil.parent / "template", "GIT_COMMON_DIR": git, "GIT_DIR": git},
        {"GIT_OBJECT_DIRECTORY": git / "objects", "GIT_CONFIG": git / "config"},
    ):
        report = place("--sign", where=place.repository, **{k: str(v) for k, v in env.items()})
        assert f"FAIL gpg.ssh.program is {evil} (file:" in report.text
        assert "for me@example.com" in report.text
    assert not (place.home.parent / "ran").exists()
    assert before == {p: p.read_bytes() for p in place.repository.rglob("*") if p.is_file()}
    assert "evil" not in str(place.own())
    outside = place.is_well()
    assert outside.status == 0


@on_linux
def test_a_repository_of_another_user_is_refused_as_git_does(one: Place) -> None:
    if os.getuid() != 0:
        pytest.skip("gives a folder away, which only root can")
    folder = one.home.parent / "it's theirs"
    one.repository.rename(folder)
    run(["chown", "-R", "12345", folder])
    refused = "FAIL git refuses this: fatal: detected dubious ownership in repository at"
    report = one.refuses(refused, where=folder)
    assert "the next commit in this repository will not be signed" in report.lines[-1]
    told = next(line for line in report.lines if "safe.directory" in line)
    cure = told.split("this directory, call: ")[1]
    one.sh(cure)
    one.is_well(where=folder)
    one.sh("echo '[' >.git/config", where=folder)
    one.refuses("git refuses this: fatal: bad config line 1", where=folder)
