"""`setup`: real git, proxy and agent, homes of all kinds, and repositories that mean harm."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import pytest
import test_shim
from conftest import SHIM, Agent, Keys, cannot_run, clean_env, fingerprint, need, rows, run
from test_shim import URL, Done, Served, in_a_namespace, liar, on_linux, serve, served, tree

__all__ = ["liar", "served"]  # fixtures

OWN = ".config/ssh-agent-proxy"
CONFIG = "[user]\n\tname = Me\n\temail = me@example.com\n"
LINES = """\
# ssh-agent-proxy-sign setup
[includeIf "gitdir:**"]
    path = ~/.config/ssh-agent-proxy/gitconfig
"""
NOWHERE = {URL: "http://127.0.0.1:1/sign"}
GLOBAL = "git config --global "
PLAIN = {".gitconfig": CONFIG.encode()}
GOOD = "ok   the next commit will be signed, and verify"
UNVERIFIED = "ok   signs; not verified here: "
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
            assert re.fullmatch(r"(ok  |warn|FAIL|todo) [ -~]{1,694}", line), line
        assert self.lines[-1][:4] == ("FAIL" if self.status else "ok  "), self.text
        assert ("FAIL" in self.text) == (self.status == 1), self.text
        assert not re.search("no-gpg-sign|gpgsign=false", self.text)


class Place:
    """A home, the shim in it, and a repository."""

    def __init__(self, shell: str, home: Path, keys: Keys, env: Dict[str, str]) -> None:
        need(shell, shell)
        self.home = home
        self.folder = home / OWN
        self.shim = home.parent / "bin" / "ssh-agent-proxy-sign"
        self.shim.parent.mkdir()
        self.shim.symlink_to(SHIM)
        self.argv = [*test_shim.CALLED.get(shell, [shell]), str(self.shim)]
        self.env = {k: v for k, v in clean_env(home.parent).items() if not k.startswith("GIT_A")}
        del self.env["GIT_COMMITTER_NAME"], self.env["GIT_COMMITTER_EMAIL"]
        self.env.update(env, HOME=str(home), KEYS=str(keys.folder), SHIM=str(self.shim))
        assert keys["ed25519"] and keys["other"]  # they are made
        self.config = home / ".gitconfig"
        self.config.write_text(CONFIG)
        self.repository = home.parent / "repository"
        self.sh("git init -q -b main ../repository")

    def sh(self, script: str, where: Optional[Path] = None, **env: str) -> Done[bytes]:
        return run(["sh", "-euc", script], env={**self.env, **env}, cwd=where or self.home)

    def __call__(
        self, *options: str, where: Optional[Path] = None, before: Sequence[str] = (), **env: str
    ) -> Report:
        argv = [*before, *self.argv, "setup", *options]
        done = run(argv, env={**self.env, **env}, cwd=where or self.home, check=False)
        assert not [p for p in Path(self.env["TMPDIR"]).glob("*") if "_key_tmp" not in p.name]
        return Report(done)

    def commit(self) -> str:
        """What git says of the signature of a commit made now, or of why there is none."""
        script = "git commit -q --allow-empty -m x && git log -1 --format=%G? --no-show-signature"
        done = run(["sh", "-c", script], env=self.env, cwd=self.repository, check=False)
        return done.stdout.decode().strip() or done.stderr.decode()

    def has_only(self, *programs: str) -> None:
        folder = self.home.parent / "few"
        folder.mkdir()
        for program in programs:
            (folder / program).symlink_to(need(program, "coreutils"))
        self.argv[0] = need("dash", "dash")
        self.env["PATH"] = str(folder)

    def wrap(self, program: str, script: str) -> str:
        """A PATH on which SCRIPT is run before that program."""
        wrapper = self.shim.parent / program
        wrapper.write_text(f'#!/bin/sh\n{script}\nexec {need(program, program)} "$@"\n')
        wrapper.chmod(0o755)
        return f"{wrapper.parent}:{self.env['PATH']}"

    def git_says(self, version: str) -> None:
        """It is then that of another, by its own word."""
        said = f'[ "$2" != version ] || exec echo "git version {version}"'
        self.env["PATH"] = self.wrap("git", said)

    def refuses(self, told: str, *options: str, **more: Any) -> Report:
        report = self(*options, **more)
        assert (report.status, told in report.text) == (1, True), report.text
        return report

    def is_well(self, *told: str, verdict: str = GOOD, **more: Any) -> Report:
        report = self(**more)
        assert report.lines[-1] == verdict, report.text
        assert not [one for one in told if one not in report.text], report.text
        return report


@pytest.fixture(params=[test_shim.on(shell) for shell in test_shim.SHELLS])
def place(request: Any, home: Path, keys: Keys, served: Served) -> Place:
    """Under every shell."""
    return Place(request.param, home, keys, served)


@pytest.fixture
def one(home: Path, keys: Keys, served: Served) -> Place:
    return Place("dash", home, keys, served)


def some(table: Sequence[Any], *names: str) -> List[Any]:
    """Rows, of which those but NAMES are for whoever runs all tests."""
    marks: Dict[str, Any] = dict.fromkeys(names, ())
    long = pytest.mark.long
    return [pytest.param(*row[1:], id=row[0], marks=marks.get(row[0], long)) for row in table]


# ---------------------------------------------------------------- there and back, whatever is there


def test_it_signs_and_a_second_run_changes_nothing_and_undo_leaves_it_as_it_was(
        place: Place, served: Served, keys: Keys) -> None:  # fmt: skip
    place.config.write_text(CONFIG[:-1])
    place.config.chmod(0o640)
    report = place.is_well("todo register as a *signing* key", keys.line("ed25519"))
    shown = fingerprint(keys["ed25519"])
    assert f"todo compare: `ssh-agent-proxy check` on the host must show {shown}" in report.lines
    assert place.config.read_text() == CONFIG + LINES
    own = tree(place.home)
    signatures = len(served.proxy.lines("outcome=signed"))
    assert place().lines == [line for line in report.lines if not line.startswith("ok   tags")]
    assert tree(place.home) == own
    assert len(served.proxy.lines("outcome=signed")) == signatures
    assert place("--sign").status == 0
    assert tree(place.home) == own
    assert len(served.proxy.lines("outcome=signed")) == signatures + 1
    del place.env[URL]
    assert place.commit() == "G"
    for _ in range(2):
        assert place("--undo").lines == ["ok   undone: git signs no commit by itself"]
        assert tree(place.home) == PLAIN
    assert place.config.stat().st_mode & 0o777 == 0o640
    assert place.commit() == "N"


@on_linux
def test_a_mounted_gitconfig_stays_mounted(one: Place) -> None:
    (one.home / "copy").write_text(CONFIG)
    before = in_a_namespace('cd "$HOME" && mount --bind copy .gitconfig && exec "$@"')
    one.is_well(before=before)
    assert (one.home / "copy").read_text() == CONFIG + LINES
    assert one("--undo", before=before).status == 0
    assert tree(one.home) == {**PLAIN, "copy": CONFIG.encode()}


@on_linux
def test_a_gitconfig_that_is_mounted_read_only_is_not_written_to(one: Place) -> None:
    before = in_a_namespace('cd "$HOME" && mount --bind copy .gitconfig && '
                            'mount -o remount,ro,bind .gitconfig && exec "$@"')  # fmt: skip
    (one.home / "copy").write_text(CONFIG)
    one.refuses("docs/containers.md", before=before)
    assert not one.folder.exists()
    one.sh(f"mkdir -p {OWN}; echo $SSH_AGENT_PROXY_URL >{OWN}/url")
    one.refuses("docs/containers.md", before=before)
    assert sorted(tree(one.home)) == [f"{OWN}/url", ".gitconfig", "copy"]
    one.is_well()
    one.refuses("docs/containers.md", before=before)
    assert one.commit() == "G"
    assert one("--undo").status == 0
    (one.home / "copy").write_text(CONFIG + LINES)
    one.refuses("cannot be taken away", "--undo", before=before)
    assert sorted(tree(one.home)) == [".gitconfig", "copy"]


def test_two_runs_at_once_do_no_harm(one: Place) -> None:
    argv = [*one.argv, "setup"]
    started = [subprocess.Popen(argv, env=one.env, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(30) for process in started] == [0, 0]
    assert one.commit() == "G"
    assert one("--undo").status == 0
    assert tree(one.home) == PLAIN


def test_what_another_undo_is_writing_is_not_taken_for_all_of_it(one: Place) -> None:
    one.is_well()
    before = one.config.read_text()
    for program in ("cat", "sed"):  # to these it is empty, as it is to a reader just then
        empty = '[ "${2:-$1}" != "$HOME/.gitconfig" ] || set -- ${2+"$1"} /dev/null'
        path = one.wrap(program, empty)
    one("--undo", PATH=path)
    assert one.config.read_text() == before


@on_linux
def test_a_full_disk_leaves_no_half_of_a_line(one: Place) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    config = CONFIG + "# as long as there is room\n".rjust(page - len(CONFIG) - 50, "#")
    (one.home.parent / "before").write_text(config)
    before = in_a_namespace(f'mount -t tmpfs -o size={2 * page} none "$HOME" && cd "$HOME" && '
                            'cp ../before .gitconfig && { "$@"; } && exit; '
                            'cp .gitconfig ../after; exit 1')  # fmt: skip
    one.refuses(".gitconfig or ~/.config/ssh-agent-proxy cannot be written", before=before)
    assert (one.home.parent / "after").read_text() == config


def test_a_report_that_nobody_reads_leaves_nothing_behind(place: Place) -> None:
    done = place.sh(f'{shlex.join(place.argv)} setup | true; ls -A "$TMPDIR"')
    assert (done.stdout, done.stderr) == (b"", b"")


def test_an_include_of_the_users_own_stays(one: Place) -> None:
    one.is_well()
    one.sh(f"echo '[alias]' >x; {GLOBAL}include.path '~/x'")
    assert one.commit() == "G"
    assert one("--undo").status == 0
    one.sh(f"{GLOBAL}include.path | grep -x '~/x'")


def test_the_lines_are_taken_out_of_both_files_that_git_reads(one: Place) -> None:
    one.sh("mkdir -p .config/git; mv .gitconfig .config/git/config")
    one.is_well()
    one.sh("cp .config/git/config .gitconfig")
    assert one("--undo").status == 0
    assert tree(one.home) == {**PLAIN, ".config/git/config": CONFIG.encode()}


def test_only_repositories_with_a_remote_are_signed(place: Place) -> None:
    verdict = GOOD.replace(" will", " in a repository that has a remote will")
    assert place("--remote-only").lines[-1] == verdict
    place.is_well(verdict=verdict, where=place.repository)
    assert LINES.replace("gitdir:**", "hasconfig:remote.*.url:**") in place.config.read_text()
    assert place.commit() == "N"
    place.sh("git remote add origin https://example.com/x", where=place.repository)
    assert place.commit() == "G"
    place.is_well(verdict=verdict, where=place.repository)
    assert place("--undo").status == 0
    assert tree(place.home) == PLAIN
    place.is_well(SHELLOPTS="noclobber")  # which bash obeys
    place.refuses("setup --undo` first", "--remote-only")


# What is done before, and what is told. First the file that gets the lines,
FILES = [
    ("none", "rm .gitconfig", "by HOME/.gitconfig"),
    ("a link", "mv .gitconfig real; ln -s real .gitconfig", "by HOME/.gitconfig"),
    ("a dangling link", "mv .gitconfig x; ln -s real .gitconfig", "by HOME/.gitconfig"),
    ("XDG's", "mkdir -p .config/git; mv .gitconfig .config/git/config", "by HOME/.config/git/"),
    ("both", "mkdir -p .config/git; cp .gitconfig .config/git/config", "by HOME/.gitconfig"),
    ("another home of XDG's", "mkdir -p x/git; mv .gitconfig x/git/config", "by HOME/x/git/config"),
    ("GIT_CONFIG_GLOBAL's", r"mv .gitconfig $(printf 'given\033')", "by HOME/given?"),
    ("carriage returns", r"printf '[user]\r\n\tname = Me\r\n' >.gitconfig", ""),
    ("another's lines", f"echo '{LINES}' | sed 's/gitconfig/x/' >>.gitconfig", ""),
    ("a mark alone", f"echo '{LINES.splitlines()[0]}' >>.gitconfig", ""),
    ("empty lines at its end", r"printf '\n\n' >>.gitconfig", ""),
    ("a line end in a value", r"printf '[x]\ny = \"a\\nb\" \\\n c\n' >>.gitconfig", ""),
]
# then what cannot be used,
PROGRAM = f"{GLOBAL}gpg.ssh.program "
KEY = f"{GLOBAL}user.signingkey "
SIGNERS = f"{GLOBAL}gpg.ssh.allowedSignersFile "
UNUSABLE = [
    ("another's signer", f"{PROGRAM}/op-x", "gpg.ssh.program = '/op-x' (file:HOME/.gitconfig)"),
    ("escapes", rf'{PROGRAM}"$(printf "/a\033[2J\n\303\244")"', "gpg.ssh.program = '/a?[2J???'"),
    ("a path beyond ASCII", f"mkdir ä; echo '[gpg]format=x509' >ä/x; {GLOBAL}include.path ~/ä/x",
     "gpg.format = 'x509' (file:\"HOME/\\303\\244/x"),
    ("a dead key", f"{KEY}'~/.ssh/gone.pub'", "user.signingkey = 'HOME/.ssh/gone.pub'"),
    ("an empty key", f": >k.pub; {KEY}'~/k.pub'", "user.signingkey = 'HOME/k.pub'"),
    ("an empty value", f"{KEY}''", "user.signingkey = ''"),
    ("a GPG id", f"{KEY}ABCDEF01; {GLOBAL}gpg.format openpgp",
     "gpg.format = 'openpgp' (file:HOME/.gitconfig); user.signingkey = 'ABCDEF01' (file"),
    ("a relative key", f"cp $KEYS/other.pub k.pub; {KEY}k.pub", "user.signingkey = 'k.pub'"),
    ("a folder", f"mkdir k.pub; {KEY}'~/k.pub'", "user.signingkey = 'HOME/k.pub'"),
    ("nobody's key", f"{KEY}'key::{test_shim.NOBODY}'", "user.signingkey = 'key::ssh-ed25519 AAA"),
    ("anybody's key", f"{KEY}'{test_shim.ANYBODY}'", "user.signingkey = 'ssh-ed25519 AAA"),
    ("relative signers", f": >s; {SIGNERS}s", "gpg.ssh.allowedSignersFile = 's'"),
    ("no signing", f"{GLOBAL}commit.gpgsign false", "commit.gpgsign = 'false'"),
    ("a dead signers file", f"{SIGNERS}'~/gone'", "gpg.ssh.allowedSignersFile = 'HOME/gone'"),
]  # fmt: skip
# and what can.
PUBLIC = "$(cut -d ' ' -f 1,2 $KEYS/ed25519.pub)"
USABLE = [
    ("a private key's name", f"{KEY}$KEYS/ed25519", ""),
    ("a key of the home's", f"mkdir k; cp $KEYS/ed25519.pub k; {KEY}'~/k/ed25519.pub'", ""),
    ("a key itself", f'{KEY}"key::{PUBLIC}"', ""),
    ("the signatures in each log", f"{GLOBAL}log.showSignature true", ""),
    ("the same signer", f"{PROGRAM}ssh-agent-proxy-sign", ""),
    ("signers", f'{SIGNERS}"~/s"; echo me@example.com {PUBLIC} >s', ""),
    ("signers for all", f"{SIGNERS}'~/s'; echo '* namespaces=\"git\"' {PUBLIC} me >s", ""),
]
SOON = ["a link", "a mark alone", "GIT_CONFIG_GLOBAL's",
        "a path beyond ASCII", "nobody's key", "a key itself"]


@pytest.mark.parametrize("script, told", some([*FILES, *UNUSABLE, *USABLE], *SOON))
def test_what_is_there_is_used_or_named_and_comes_back(one: Place, script: str, told: str) -> None:
    one.env.update(EMAIL="me@example.com", GIT_COMMITTER_NAME="C", GIT_AUTHOR_NAME="A")
    one.env["POSIXLY_CORRECT"] = "1"  # GNU's programs take options first then, and N forgets
    if "x/git" in script:
        one.env["XDG_CONFIG_HOME"] = f"{one.home}/x"
    if "given" in script:
        one.env["GIT_CONFIG_GLOBAL"] = f"{one.home}/given\x1b"
    one.sh(script)
    before = tree(one.home)
    links = [p for p in one.home.iterdir() if p.is_symlink()]
    for _ in range(2):
        report = one.is_well(told.replace("HOME", str(one.home)))
        assert ("warn overridden: " in report.text) == ("=" in told)
    assert one.commit() == "G"
    assert one("--undo").status == 0
    if links and not before.get(".gitconfig"):
        before.update({".gitconfig": b"", "real": b""})
    assert tree(one.home) == before
    assert [p for p in one.home.iterdir() if p.is_symlink()] == links


def test_a_key_that_is_not_the_first_is_asked_for(one: Place, keys: Keys, agent: Agent) -> None:
    for name in ("ed25519", "other"):
        agent.add(keys[name])
    one.sh(f"{GLOBAL}user.signingkey $KEYS/other.pub")
    one.refuses("answered 404")
    with serve(agent) as env:
        one.env.update(env)
        one.is_well(fingerprint(keys["other"]))
        one.is_well(fingerprint(keys["other"]))
        assert len(env.proxy.lines("outcome=signed")) == 1


HERE = "cd ../repository; git config "
SET_UP = "$SHIM setup >/dev/null; "
# What is done before, and what of it is named.
WINS = [
    ("format", f"{HERE}gpg.format openpgp", "gpg.format is openpgp (file:.git/config)"),
    ("signer", f"{HERE}gpg.ssh.program ./x", "gpg.ssh.program is ./x (file:.git/config)"),
    ("signing", f"{HERE}commit.gpgsign off", "commit.gpgsign is false (file:.git/config)"),
    ("no boolean", f"{HERE}commit.gpgsign maybe", "commit.gpgsign is maybe (file:.git/config)"),
    ("a worktree's", f"{HERE}extensions.worktreeConfig 1; git config --worktree gpg.format x509",
     "gpg.format is x509 (file:.git/config.worktree)"),
    ("a later line", rf"{SET_UP}printf '[gpg]\nformat = y\nformat = x509' >>.gitconfig",
     "gpg.format is x509 (file:HOME/.gitconfig)"),
    ("an include of theirs", SET_UP + "echo '[commit]gpgsign=0' >\"it's\"; "
     r"""printf "[include]\npath = ~/it's" >>.gitconfig""",
     "commit.gpgsign is false (file:HOME/it's)"),
]  # fmt: skip


@pytest.mark.parametrize("script, told", some(WINS, "signing", "an include of theirs"))
def test_what_wins_is_named_with_its_origin_and_cure(one: Place, script: str, told: str) -> None:
    one.sh(script)
    report = one.refuses(told := told.replace("HOME", str(one.home)), where=one.repository)
    mended = "in this repository will not" if script.startswith(HERE) else "commit will not"
    assert f"{mended} be signed until that is mended" in report.lines[-1]
    cure = next(line.split("): ")[1] for line in report.lines if line.startswith(f"FAIL {told}: "))
    one.sh(cure, where=one.repository)
    one.is_well(where=one.repository)


def test_what_no_command_takes_out_is_named(one: Place) -> None:
    one.sh(f"{HERE}include.path x; echo '[commit]gpgsign=0' >.git/x")
    cure = "(file:.git/x): take it out of that file"
    one.refuses(f"FAIL commit.gpgsign is false {cure}", where=one.repository)
    cure = "(command line:): take it out of this shell's GIT_CONFIG_COUNT or GIT_CONFIG_PARAMETERS"
    settings = "'commit.gpgsign'='false'"
    one.refuses(f"FAIL commit.gpgsign is false {cure}", GIT_CONFIG_PARAMETERS=settings)


def test_a_key_and_signers_of_the_folders_own_are_its_own_affair(one: Place) -> None:
    one.sh("echo '[user]signingkey=~/k.pub' >x")
    one.sh(f"{GLOBAL}includeIf.gitdir:**/repository/.path '~/x'")
    one.sh(f"{HERE}gpg.ssh.allowedSignersFile x; git config gpg.ssh.defaultKeyCommand y")
    told = f"warn this repository has its own user.signingkey = '{one.home}/k.pub' (file:{one.home}"
    told += "/x); gpg.ssh.defaultKeyCommand = 'y' (file:.git/config); gpg.ssh.allowedSignersFile = "
    verdict = GOOD.replace(" will", " outside this repository will")
    one.is_well(told, verdict=verdict, where=one.repository, GIT_CONFIG="/dev/null")
    one.is_well()


# ---------------------------------------------------------------- whom to trust


def test_another_key_for_the_same_address_is_trusted_by_its_fingerprint_alone(
        place: Place, keys: Keys, agent: Agent) -> None:  # fmt: skip
    place.is_well()
    agent.add(keys["other"])
    old, new = fingerprint(keys["ed25519"]), fingerprint(keys["other"])
    signers = place.folder / "allowed_signers"
    before = signers.read_bytes()
    address = (place.folder / "url").read_text()
    with serve(agent) as env:
        place.env.update(env)
        report = place.refuses(f"trusted for me@example.com is the key {old}")
        assert (place.folder / "url").read_text() == address
        assert f"what signs now is {new}" in report.text
        assert f"--trust {new}" not in report.text
        assert place.commit() == "U"
        place.refuses("and --trust names another", "--trust", old)
        assert env.proxy.lines("outcome=signed")[1:] == []
        assert signers.read_bytes() == before
        assert place("--trust", new).lines[-1] == GOOD
        place.is_well()
        assert place.commit() == "G"
    assert signers.read_text().count(' namespaces="git" ssh-ed25519 ') == 2


def test_signers_of_the_users_own_are_not_touched(one: Place, keys: Keys) -> None:
    one.sh(f"echo '# me@example.com' {PUBLIC} >s; {SIGNERS}'~/s'")
    before = tree(one.home)
    key = " ".join(keys.line("ed25519").split()[:2])
    one.refuses(f'lacks this line: me@example.com namespaces="git" {key}')
    assert "igners" not in (one.folder / "gitconfig").read_text()
    assert not (one.folder / "allowed_signers").exists()
    assert one("--undo").status == 0
    assert tree(one.home) == before


def test_who_trusts_another_key_is_not_shown_a_strangers_line(one: Place, keys: Keys) -> None:
    one.sh(f"echo 'me@example.com {keys.line('other')}' >s; {SIGNERS}'~/s'")
    report = one.refuses(f"is the key {fingerprint(keys['other'])}, and what signs now is")
    assert "lacks this line" not in report.text


def test_lines_of_others_stay_in_our_signers(one: Place, keys: Keys) -> None:
    signers = one.folder / "allowed_signers"
    signers.parent.mkdir(parents=True)
    lines = ["# mine", "", f"you@example.com {keys.line('other')}", "me@example.org *"]
    signers.write_text("\n".join(lines))
    signers.chmod(0o666)
    one.is_well()
    assert signers.stat().st_mode & 0o777 == 0o644
    assert one.commit() == "G"
    assert one("--undo").status == 0
    assert signers.read_text().splitlines() == lines


# ---------------------------------------------------------------- where nothing is written

MAIL = "git config --global user.email YOU@EXAMPLE.COM"
# What is done before, the environment, and what is told.
SETTLED = [
    ("no mail address", f"{GLOBAL}--unset user.email", {}, MAIL),
    ("a pattern", f"{GLOBAL}user.email '*@example.com'", {}, "(*@example.com): git"),
    ("two", f"{GLOBAL}user.email a@b@c", {}, MAIL),
    ("no @", f"{GLOBAL}user.email me", {}, MAIL),
    ("escapes", f"{GLOBAL}user.email \"$(printf 'a\\033[2J@b')\"", {}, "(a?[2J@b): git"),
    ("no name", f"{GLOBAL}--unset user.name", {}, "user.name 'YOUR NAME' && git config"),
    ("no HOME", "", {"HOME": ""}, "not the whole path of a folder here; without it EMAIL must"),
    ("a relative HOME", "", {"HOME": ".", "EMAIL": "a@b"}, "HOME is '.', which is not the whole"),
    ("a HOME that is missing", "", {"HOME": "/x/y", "EMAIL": "a@b"}, "HOME is '/x/y', which"),
    ("a device", "", {"GIT_CONFIG_GLOBAL": "/dev/null", "EMAIL": "a@b"}, "/dev/null is no regular"),
    ("a file for our folder", "mkdir .config; : >.config/ssh-agent-proxy", {}, "cannot be written"),
    ("no value", "printf '[user]\\nname\\n' >>.gitconfig", {}, "'user.name' in file "),
    ("broken settings", "echo '[' >.gitconfig", {}, "git does not run: bad config line 1 in file"),
    ("no git", "", {"GIT": ""}, "its package is called git"),
    ("an old git", "", {"GIT": "2.33.9"}, "git version 2.33.9 is too old to sign with SSH keys"),
    ("an ancient git", "", {"GIT": "1.9.1"}, "git version 1.9.1 is too old"),
    ("no condition", "", {"OPTION": "--remote-only", "GIT": "2.35.8"}, "takes git 2.36 or newer"),
    ("signing all", f"{GLOBAL}commit.gpgsign yes", {"OPTION": "--remote-only"}, "without a remote"),
    ("no TMPDIR", "", {"TMPDIR": "/x/y"}, "no folder can be made in /x/y: set TMPDIR"),
]  # fmt: skip
FIRST = ["no mail address", "a pattern", "a relative HOME", "a device", "no git", "an old git"]


@on_linux
@pytest.mark.parametrize("script, env, told", some(SETTLED, *FIRST))
def test_nothing_is_written_before_it_is_settled(
        one: Place, script: str, env: Dict[str, str], told: str) -> None:  # fmt: skip
    one.sh(script)
    # Git makes an address up where the host's name has a dot. (/dev/null is mounted over itself:
    # nothing that goes wrong here can replace it.)
    before = in_a_namespace('mount --bind /dev/null /dev/null && hostname a.b.c && exec "$@"')
    before.insert(1, "--uts")
    if env.get("GIT"):
        one.git_says(env["GIT"])
    elif "GIT" in env:
        one.has_only("tr", "mktemp", "sed", "tail", "rm", "rmdir", "head", "cat")
        before = []
    files = tree(one.home), [*one.home.rglob("*")]
    name = {} if "name" in told else {"GIT_COMMITTER_NAME": "C", "GIT_AUTHOR_NAME": "A"}
    options = env.get("OPTION", "").split()
    report = one.refuses(told, *options, before=before, **{**name, **env})
    assert [line[:24] for line in report.lines[1:]] in ([], ["FAIL nothing was written"])
    assert (tree(one.home), [*one.home.rglob("*")]) == files


TAGS = [("2.34.1", "warn"), ("2.43.1.windows.1", "warn"), ("2.43.2", "ok  "),
        ("2.50.1 (Apple Git-155)", "ok  "), ("3.0.rc1", "ok  ")]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("version, well", TAGS)
def test_what_an_older_git_does_with_tags_is_said(one: Place, version: str, well: str) -> None:
    one.git_says(version)
    one.is_well(f"{well} tags: ")


def test_a_key_that_git_cannot_be_handed_is_told(one: Place, keys: Keys, agent: Agent) -> None:
    agent.add(keys["ecdsa256"])
    one.git_says("2.34.1")
    with serve(agent) as env:
        one.env.update(env)
        report = one.refuses("takes a key such as ecdsa-sha2-nistp256 from a file only")
        one.sh("mkdir .ssh; " + report.lines[0].split("only: ")[1])
        one.is_well()


@pytest.mark.parametrize("words", ["--help", "--trust", "--trust SHA256:x", "--undo --sign x"])
def test_wrong_usage_is_2(one: Place, words: str) -> None:
    done = run([*one.argv, "setup", *words.split()], env=one.env, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"setup takes [--remote-only] [--trust SHA256:...] [--sign] or --undo" in done.stderr
    assert tree(one.home) == PLAIN


def test_the_program_must_be_a_file_that_can_be_run(place: Place) -> None:
    script = SHIM.read_bytes()
    *sh, _ = place.argv
    copy = place.home / "it's a \"copy\".sh"
    copy.write_bytes(script)
    (place.home / "sh").write_bytes(script)
    before = tree(place.home)
    for words in (["-c", script.decode(), "sh"], [copy.name]):
        done = run([*sh, *words, "setup"], env=place.env, cwd=place.home, check=False)
        assert (done.returncode, done.stdout[:20]) == (1, b"FAIL git needs this ")
    assert tree(place.home) == before
    copy.chmod(0o755)
    done = run([*sh, f"./{copy.name}", "setup"], env=place.env, cwd=place.home)
    assert done.stdout.decode().endswith(f"{GOOD}\n")
    assert place.commit() == "G"


# ---------------------------------------------------------------- the proof, and what fails it


def test_a_proof_that_fails_leaves_the_settings_and_trusts_nobody(
        place: Place, agent: Agent, keys: Keys, served: Served) -> None:  # fmt: skip
    """A commit then fails; it never goes unsigned."""
    agent.add(keys["ed25519"])
    with serve(agent, "--payloads", "tag") as refusing:
        for env, told in ((NOWHERE, "nothing listens at http"), (refusing, "answered 403: ")):
            place.env.update(env)
            report = place.refuses(told)
            assert report.lines[1:] == [UNTIL]
            assert {*tree(place.home)} - {f"{OWN}/url"} == {f"{OWN}/gitconfig", ".gitconfig"}
            assert told in place.commit()
    place.env.update(served)
    place.is_well()
    assert place.commit() == "G"


SERVED = test_shim.served_key(test_shim.LINE)
LIKE_OURS = b"no ssh-agent-proxy-sign: all is well\n"
# What is done before, what is answered, and what is told.
UNTRUSTED = rows([
    ("a signature that does not verify", "", [SERVED, SERVED, test_shim.answer(test_shim.ARMOR)],
     "that verifies: "),
    ("a word like ours", "", [SERVED, SERVED, test_shim.answer(LIKE_OURS, "403 Forbidden")],
     "answered 403: no ssh-agent-proxy-sign: all is well"),
    ("another key than git names", f"{KEY}$KEYS/ed25519", [SERVED],
     "user.signingkey names another key than http"),
    ("nobody's key", "", [test_shim.served_key(test_shim.NOBODY)],
     "answered 200 without a public key"),
])  # fmt: skip


@pytest.mark.parametrize("script, answers, told", UNTRUSTED)
def test_a_key_without_a_proof_is_not_trusted(
        one: Place, liar: Any, script: str, answers: List[bytes], told: str) -> None:  # fmt: skip
    one.sh(script)
    report = one.refuses(told, **liar(*answers).env)
    assert report.lines[-1] == UNTIL
    assert {*tree(one.home)} - {f"{OWN}/url"} == {f"{OWN}/gitconfig", ".gitconfig"}


def test_what_was_relied_on_is_kept_or_named(one: Place, agent: Agent, keys: Keys) -> None:
    agent.add(keys["ed25519"])
    one.is_well()
    assert (one.folder / "url").read_text() == f"{one.env[URL]}\n"
    with serve(agent, tokens="s3cr3t-s3cr3t-s3cr3t one\n") as env:
        report = one(SSH_AGENT_PROXY_TOKEN="s3cr3t-s3cr3t-s3cr3t", **env)
        assert len(env.proxy.lines("outcome=signed")) == 1  # whoever answers there now
        assert "relies on SSH_AGENT_PROXY_TOKEN of this shell" in report.text
        assert "~/.config/ssh-agent-proxy/token (mode 0600)" in report.text
        assert "s3cr3t" not in report.text
        (one.folder / "token").write_text("s3cr3t-s3cr3t-s3cr3t\n")
        del one.env[URL]
        one.is_well()
        assert one.commit() == "G"
    before = (one.folder / "url").read_text()
    one.refuses("nothing listens", **NOWHERE)
    assert (one.folder / "url").read_text() == before
    one.sh(f"{GLOBAL}commit.gpgsign true")
    told = f"ok   undone: git signs commits as file:{one.config} says"
    assert one("--undo").lines == [told]
    assert [name for name in tree(one.home) if OWN in name] == [f"{OWN}/token"]


@pytest.mark.parametrize("missing", some([("none", ""), ("sum", "sha256sum")], "none"))
def test_without_ssh_keygen_it_signs_unverified(one: Place, keys: Keys, missing: str) -> None:
    small = "git curl sh mktemp sed tail rm rmdir cat mkdir chmod mv cp cmp tr cut base64 sha256sum"
    one.has_only(*small.replace(missing, "").split())
    report = one()
    assert report.status == 0
    missed = f"{UNVERIFIED}ssh-keygen is missing: it comes in package openssh-client"
    assert report.lines[-1].startswith(missed)
    line = " ".join(keys.line("ed25519").split()[:2])
    shown = line if missing else fingerprint(keys["ed25519"])
    assert f"on the host must show {shown}" in report.text
    assert (one.folder / "allowed_signers").read_text() == (
        "# ssh-agent-proxy-sign setup: signed, and not verified\n"
        f'me@example.com namespaces="git" {line}\n'
    )
    assert one().lines[-1] == report.lines[-1]
    one("--undo")
    assert one("--remote-only").lines[-1][:47] == "ok   signs in a repository that has a remote; n"
    assert one("--undo").status == 0
    assert tree(one.home) == PLAIN


def test_a_user_of_a_number_alone_signs_unverified(one: Place) -> None:
    path = one.wrap("ssh-keygen", "echo No user exists for uid 1234 >&2; exit 255")
    one.is_well(verdict=f"{UNVERIFIED}ssh-keygen takes a user that /etc/passwd knows", PATH=path)


@on_linux
def test_settings_of_the_environment_do_where_the_home_is_read_only(one: Place) -> None:
    before = in_a_namespace('mount --bind "$HOME" "$HOME" && mount -o remount,ro,bind "$HOME" && '
                            'exec "$@"')  # fmt: skip
    report = one.refuses("docs/containers.md#where-gitconfig-cant-be-written", before=before)
    assert f"{one.config} or ~/.config/ssh-agent-proxy cannot be written" in report.lines[0]
    settings = {"gpg.format": "ssh", "gpg.ssh.program": "ssh-agent-proxy-sign",
                "gpg.ssh.defaultKeyCommand": "ssh-agent-proxy-sign key", "commit.gpgsign": "1",
                "tag.forceSignAnnotated": "0"}  # fmt: skip
    path = f"{one.shim.parent}:{one.env['PATH']}"
    env = {"GIT_CONFIG_COUNT": "5", "PATH": path, "GIT_TRACE": "1", "GIT_TRACE2": "1"}
    for number, (key, value) in enumerate(settings.items()):
        env.update({f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value})
    verdict = f"{UNVERIFIED}git has no file of allowed signers with this key in it"
    one.is_well(before=before, verdict=verdict, **env)
    assert tree(one.home) == PLAIN
    one.refuses("nothing listens", before=before, **{**env, **NOWHERE})
    assert "overridden" not in one.is_well(**env).text
    one.config.write_text(CONFIG)
    one.is_well(before=before, verdict=verdict, **env)
    for key, value in settings.items():
        one.sh(f"{GLOBAL}{key} '{value}'")
    env = {"PATH": path, "where": one.repository, "before": before}
    one.is_well(verdict=verdict, **env)
    one.sh(f"{HERE}gpg.format x509")
    one.refuses("FAIL gpg.format is x509 (file:.git/config)", **env)
    one.sh(f"{KEY}gone")
    one.is_well()
    one.refuses("cannot be taken away", "--undo", before=before)


# ---------------------------------------------------------------- a repository that means harm

EVIL = """
    core.fsmonitor core.pager pager.config pager.version core.hooksPath core.editor core.sshCommand
    core.askPass alias.config alias.rev-parse alias.commit gpg.program gpg.ssh.program diff.external
    gpg.ssh.defaultKeyCommand gpg.ssh.allowedSignersFile user.signingkey user.email user.name
    init.templateDir include.path filter.x.clean commit.template credential.helper
"""
SPECIAL = {"core.hooksPath": "THEIRS/hooks", "init.templateDir": "THEIRS", "include.path": "../x",
           "user.email": "evil@example.com", "user.signingkey": "\x1b]0;x\x07"}  # fmt: skip


def test_nothing_that_a_repository_names_is_run_written_or_trusted(place: Place) -> None:
    """By its settings, its hooks, and the variables that lead to it."""
    theirs, git = place.home.parent / "theirs", place.repository / ".git"
    evil = theirs / "evil"
    script = f"""
        mkdir -p {theirs}/hooks
        printf '#!/bin/sh\necho "$0 $*" >>{theirs}/ran\n' >{evil}
        chmod +x {evil}
        for name in post-commit pre-commit commit-msg post-index-change; do
            ln -s {evil} {theirs}/hooks/$name
        done
        cp -P {theirs}/hooks/* {git}/hooks
        {GLOBAL} core.hooksPath {theirs}/hooks # nor do the user's own take part
        {GLOBAL} core.fsmonitor {theirs}/hooks/pre-commit; echo '[gpg]format=x509' >{theirs}/config
        cd {place.repository}
    """
    for name in EVIL.split():
        command = f"!{evil}" if name.startswith(("alias", "credential")) else evil
        script += f"git config {name} '{SPECIAL.get(name, command)}'\n"
    place.sh(script.replace("THEIRS", str(theirs)))
    before = tree(theirs), tree(place.repository)
    leading = {"GIT_DIR": git, "GIT_COMMON_DIR": git, "GIT_WORK_TREE": place.repository,
               "GIT_INDEX_FILE": git / "index", "GIT_OBJECT_DIRECTORY": git / "objects",
               "GIT_TEMPLATE_DIR": theirs, "GIT_CONFIG": git / "config"}  # fmt: skip
    for env in ({}, {name: str(path) for name, path in leading.items()}):
        report = place("--sign", where=place.repository, **env)
        assert f"FAIL gpg.ssh.program is {evil} (file:" in report.text
        assert "for me@example.com" in report.text
    assert (tree(theirs), tree(place.repository)) == before
    assert "evil" not in str(tree(place.home))
    place.is_well()


@on_linux
def test_a_repository_of_another_user_is_refused_as_git_does(one: Place) -> None:
    if os.getuid() != 0:
        cannot_run("gives a folder away, which only root can")
    folder = one.home.parent / "it's theirs"
    one.repository.rename(folder)
    run(["chown", "-R", "12345", folder])
    report = one.refuses("FAIL git refuses this: fatal: detected dubious owner", where=folder)
    assert "the next commit in this repository will not be signed" in report.lines[-1]
    one.sh(report.text.split("this directory, call: ")[1].splitlines()[0])
    one.is_well(where=folder)
    one.sh("echo '[' >.git/config", where=folder)
    one.refuses("git refuses this: fatal: bad config line 1", where=folder)
