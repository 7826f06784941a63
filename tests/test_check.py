"""`check`: each thing that can be wrong is one line that names it, its cause and the way out."""

from __future__ import annotations

import base64
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import pytest
import test_upstream
from conftest import (
    PROXY,
    Agent,
    Keys,
    Proxy,
    cannot_run,
    clean_env,
    http,
    message,
    need,
    read_message,
    rows,
    run,
    wait_for,
)
from test_commands import need_ipv6, one_line

import ssh_agent_proxy as p

gpg_agent = test_upstream.gpg_agent

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")

NAME = "SSH_AGENT_PROXY_"
SERVER = f"{p.PROGRAM}/{p.VERSION}"
StartAgent = Callable[..., Agent]
StartProxy = Callable[..., Proxy]
Scripted = Callable[..., Path]

# ---------------------------------------------------------------- running it, reading it


class Report(NamedTuple):
    """What check printed, a line each, of which every one has a mark and nothing invisible."""

    status: int
    lines: List[str]

    def found(self, pattern: str) -> List[str]:
        return [line for line in self.lines if re.search(pattern, line)]

    def one(self, pattern: str) -> str:
        """The only line that PATTERN is found in."""
        found = self.found(pattern)
        assert len(found) == 1, (pattern, self.lines)
        return found[0]

    def none(self, pattern: str) -> None:
        assert not self.found(pattern), self.lines

    def marked(self, mark: str) -> List[str]:
        """The lines with that mark, but for what this machine lets a process give up."""
        return [line for line in self.found(f"^{mark}") if not re.search(r"in force \(", line)]

    def fails(self) -> str:
        """The one line that says why /sign would not work."""
        assert self.status == 1
        found = self.marked("FAIL")
        assert len(found) == 1, self.lines
        return found[0]

    def works(self) -> None:
        assert not self.marked("FAIL")
        assert self.status == 0


def parse(done: subprocess.CompletedProcess[bytes]) -> Report:
    text = done.stdout.decode()
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    # As with every other command, a wrong setting is told on stderr too.
    told = lines[0].replace("FAIL ", "ssh-agent-proxy: ") + "\n" if done.returncode == 2 else ""
    assert done.stderr.decode() == told
    for line in lines:
        assert re.match(r"(ok  |warn|FAIL) \S", line), lines
        assert line.isprintable(), lines
    return Report(done.returncode, lines)


def start(home: Path, *argv: Any, **env: Any) -> subprocess.CompletedProcess[bytes]:
    """`check` with those arguments, to its end, which comes whatever the others do."""
    set_here = "--addr" in argv or NAME + "ADDR" in env
    addr = [] if set_here else ["--addr", "127.0.0.1:0"]
    words = [sys.executable, PROXY, "check", *addr, *argv]
    return run(words, env=clean_env(home, **env), check=False, timeout=20)


def check(home: Path, *argv: Any, **env: Any) -> Report:
    return parse(start(home, *argv, **env))


def refused(home: Path, *argv: Any, **env: Any) -> str:
    """The one line of a report on settings that can't be right."""
    report = check(home, *argv, **env)
    assert report.status == 2
    assert len(report.lines) == 1, report.lines
    assert report.lines[0].startswith("FAIL ")
    return report.lines[0]


def fingerprint(line: str) -> str:
    return p.parse_key_line(line).key.fingerprint


def files(folder: Path) -> Dict[str, Tuple[int, ...]]:
    """What stands in FOLDER and below it, and what would show a change of it."""
    found = {}
    for path in folder.rglob("*"):
        s = path.lstat()
        stamp = () if path.is_dir() else (s.st_size, s.st_mtime_ns)
        found[str(path)] = (s.st_ino, s.st_mode, *stamp)
    return found


@pytest.fixture
def key(agent: Agent, keys: Keys) -> str:
    """The line of the one key that the agent holds."""
    agent.add(keys["ed25519"])
    return keys.line("ed25519")


@pytest.fixture
def nobody(short: Path) -> Callable[..., Report]:
    """`check` as a user without any right to what the tests made."""
    if os.geteuid() != 0:
        cannot_run("another user's process: run the tests as root")
    setpriv = [need("setpriv", "util-linux"), "--reuid=65534", "--regid=65534", "--clear-groups"]
    python = "/usr/bin/python3"  # which another user can run, wherever ours is
    if not os.access(python, os.X_OK):
        cannot_run(f"{python} is missing: install python3")
    program = short / PROXY.name
    shutil.copyfile(PROXY, program)
    program.chmod(0o644)
    short.chmod(0o755)
    home = short / "nobody"
    home.mkdir()
    env = clean_env(home)
    for path in (home, home / "tmp"):
        os.chown(path, 65534, 65534)

    def call(*argv: Any, **more: Any) -> Report:
        addr = [] if "--addr" in argv else ["--addr", "127.0.0.1:0"]
        words = [*setpriv, python, program, "check", *addr, *argv]
        more = {name: str(value) for name, value in more.items()}
        return parse(run(words, env={**env, **more}, check=False, timeout=20))

    return call


# ---------------------------------------------------------------- the agent and its keys


def test_an_agent_with_a_key_is_exit_0(home: Path, agent: Agent, key: str) -> None:
    check(home, "--upstream", agent.sock).works()


def test_the_agent_and_its_key_are_told_to_the_letter(home: Path, agent: Agent, key: str) -> None:
    report = check(home, "--upstream", agent.sock)
    assert report.lines[:2] == [
        f"ok   asking the agent at '{agent.sock}'",
        f"ok   it holds ssh-ed25519 {fingerprint(key)} ed25519@test",
    ]


def test_every_key_is_a_line_in_the_agents_order(home: Path, agent: Agent, keys: Keys) -> None:
    names = ["rsa2048", "ed25519", "ecdsa256"]
    for name in names:
        agent.add(keys[name])
    found = check(home, "--upstream", agent.sock).found("^ok   it holds ")
    listed = run(["ssh-add", "-l"], env=agent.env).stdout.decode().splitlines()
    assert [line.split()[-2:] for line in found] == [line.split()[1:3] for line in listed]
    assert [line.split()[-3] for line in found] == [keys.line(n).split()[0] for n in names]


def test_the_first_of_several_keys_signs(home: Path, agent: Agent, keys: Keys) -> None:
    agent.add(keys["other"])
    agent.add(keys["ed25519"])
    line = check(home, "--upstream", agent.sock).one("signing with ")
    assert line.startswith(f"ok   signing with {fingerprint(keys.line('other'))} ")


def test_several_keys_of_which_none_is_pinned_are_a_warning(
    home: Path, agent: Agent, keys: Keys
) -> None:
    agent.add(keys["other"])
    agent.add(keys["ed25519"])
    report = check(home, "--upstream", agent.sock)
    line = report.one("pinned")
    assert line.startswith("warn ")
    assert "2 keys" in line
    assert NAME + "PUBKEY" in line
    report.works()


def test_one_key_is_no_warning(home: Path, agent: Agent, key: str) -> None:
    assert check(home, "--upstream", agent.sock).marked("warn") == []


def test_several_keys_of_which_one_is_pinned_are_no_warning(
    home: Path, agent: Agent, keys: Keys
) -> None:
    agent.add(keys["other"])
    agent.add(keys["ed25519"])
    report = check(home, "--upstream", agent.sock, "--pubkey", keys.line("ed25519"))
    assert report.marked("warn") == []


def test_the_agent_of_ssh_auth_sock_is_used(home: Path, agent: Agent, key: str) -> None:
    report = check(home, SSH_AUTH_SOCK=agent.sock)
    assert report.one(" asking ") == f"ok   asking the agent at '{agent.sock}'"


def test_the_upstream_wins_over_ssh_auth_sock(home: Path, agent: Agent, key: str) -> None:
    check(home, "--upstream", agent.sock, SSH_AUTH_SOCK="/nowhere").works()


def test_without_any_setting_a_well_known_agent_is_used(
    home: Path, short: Path, start_agent: StartAgent, keys: Keys
) -> None:
    agent = start_agent(short / "ssh-agent.socket")
    agent.add(keys["ed25519"])
    report = check(home, XDG_RUNTIME_DIR=short)
    assert report.one(" asking ") == f"ok   asking the agent at '{agent.sock}'"
    report.works()


def test_no_agent_at_all_is_told_with_all_the_places(home: Path, short: Path) -> None:
    line = check(home, XDG_RUNTIME_DIR=short).fails()
    for word in (NAME + "UPSTREAM", "SSH_AUTH_SOCK (unset)"):
        assert word in line
    for path in p.well_known_sockets(sys.platform, str(home), str(short)):
        assert path in line


def nothing(path: Path) -> None:
    pass


def dead(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


UNREACHABLE = [
    ("nothing there", nothing, "no such socket"),
    ("a socket that nobody listens on", dead, "nobody listens on that socket"),
    ("a file", Path.touch, "that is no socket"),
    ("a folder", Path.mkdir, "that is no socket"),
]


@pytest.mark.parametrize(("make", "cause"), rows(UNREACHABLE))
@pytest.mark.parametrize("variable", ["SSH_AUTH_SOCK", NAME + "UPSTREAM"])
def test_an_agent_that_is_not_there_is_named_with_the_cause_and_the_setting(
    variable: str, make: Callable[[Path], None], cause: str, home: Path, short: Path
) -> None:
    make(short / "agent")
    line = check(home, **{variable: short / "agent"}).fails()
    assert f"'{short}/agent'" in line
    assert cause in line
    assert variable in line


@linux
def test_another_users_agent_is_permission_denied(
    nobody: Callable[..., Report], agent: Agent, key: str
) -> None:
    line = nobody("--upstream", agent.sock).fails()
    assert f"'{agent.sock}'" in line
    assert "permission denied" in line
    assert NAME + "UPSTREAM" in line


def empty(agent: Agent, keys: Keys) -> None:
    pass


def locked(agent: Agent, keys: Keys) -> None:
    agent.add(keys["ed25519"])
    agent.lock()


USELESS = [("none added", empty), ("locked", locked)]


@pytest.mark.parametrize("prepare", [row[1] for row in USELESS], ids=[row[0] for row in USELESS])
def test_an_agent_without_keys_is_named_with_the_cause_and_the_ways_out(
    prepare: Callable[[Agent, Keys], None], home: Path, agent: Agent, keys: Keys
) -> None:
    prepare(agent, keys)
    line = check(home, "--upstream", agent.sock).fails()
    for word in ("lists no keys", "locked", "ssh-add", NAME + "UPSTREAM"):
        assert word in line


def test_an_agent_without_keys_is_told_by_its_path(home: Path, agent: Agent) -> None:
    report = check(home, "--upstream", agent.sock)
    report.fails()
    assert report.one(" asking ") == f"ok   asking the agent at '{agent.sock}'"


def test_an_agent_with_an_empty_list_is_not_told_of_as_one_that_signs(
    home: Path, agent: Agent
) -> None:
    report = check(home, "--upstream", agent.sock)
    report.none("signing with|holds")


USELESS_UPSTREAMS = [
    *USELESS,
    ("dead", lambda agent, keys: agent.stop()),
]


@pytest.mark.parametrize(
    "prepare", [row[1] for row in USELESS_UPSTREAMS], ids=[row[0] for row in USELESS_UPSTREAMS]
)
def test_another_well_known_agent_with_keys_is_named_with_the_setting_that_selects_it(
    prepare: Callable[[Agent, Keys], None],
    home: Path,
    short: Path,
    start_agent: StartAgent,
    keys: Keys,
) -> None:
    first, other = start_agent(), start_agent(short / "ssh-agent.socket")
    prepare(first, keys)
    other.add(keys["other"])
    environment = {"XDG_RUNTIME_DIR": short, "SSH_AUTH_SOCK": first.sock}
    line = check(home, **environment).fails()
    assert "has 1 key" in line
    match = re.search(r"set (SSH_AGENT_PROXY_UPSTREAM)=(\S+)$", line)
    assert match
    check(home, **environment, **{match[1]: match[2]}).works()


def test_another_well_known_agent_without_keys_is_not_named(
    home: Path, short: Path, start_agent: StartAgent
) -> None:
    first, other = start_agent(), start_agent(short / "ssh-agent.socket")
    assert str(other.sock) not in check(
        home, XDG_RUNTIME_DIR=short, SSH_AUTH_SOCK=first.sock
    ).fails()


def wire(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def identities(*keys: Tuple[bytes, bytes]) -> bytes:
    """The answer that lists those key blobs and comments."""
    listed = b"".join(wire(blob) + wire(comment) for blob, comment in keys)
    return message(b"\x0c" + len(keys).to_bytes(4, "big") + listed)


def blob(line: str) -> bytes:
    return base64.b64decode(line.split()[1])


UNUSABLE = [
    (wire(b"ssh-dss") + b"x", b"dsa@test"),
    (wire(b"ssh-\x1b[31m\n\xff") + b"x", b"\x1b[31m"),
    (b"", b""),
]


def test_an_agent_with_unusable_keys_only_is_told(
    home: Path, scripted_agent: Scripted
) -> None:
    path = scripted_agent(answering(identities(*UNUSABLE)))
    line = check(home, "--upstream", path).fails()
    for word in (f"'{path}'", "none of a type", NAME + "UPSTREAM"):
        assert word in line


def test_an_unusable_key_is_passed_over(home: Path, scripted_agent: Scripted, keys: Keys) -> None:
    ours = keys.line("ed25519")
    path = scripted_agent(answering(identities(*UNUSABLE, (blob(ours), b"usable"))))
    report = check(home, "--upstream", path)
    assert report.one(" holds ").endswith(f" {fingerprint(ours)} usable")
    assert report.one("signing with ").startswith(f"ok   signing with {fingerprint(ours)} ")
    assert report.marked("warn") == []


def answering(*answers: bytes) -> Callable[[socket.socket], None]:
    """For a scripted agent: those answers, one to each request of a connection."""

    def handle(connection: socket.socket) -> None:
        for answer in answers:
            if not read_message(connection):
                return
            connection.sendall(answer)

    return handle


# ---------------------------------------------------------------- an agent that can't be believed


def hang_up(connection: socket.socket) -> None:
    pass


LIES = [
    ("hangs up at once", hang_up, "hung up without an answer"),
    ("hangs up on the request", answering(b""), "hung up without an answer"),
    ("hangs up in its answer", answering(b"\0\0\0\x05\x0c\0"), "hung up in the middle"),
    ("announces 4 GiB", answering(b"\xff\xff\xff\xff"), "announced a message of 4294967295 bytes"),
    ("announces nothing", answering(b"\0\0\0\0"), "announced a message of 0 bytes"),
    ("sends more than announced", answering(message(b"\x0c\0\0\0\0") + b"x"), "1 bytes more"),
    ("refuses to list", answering(message(b"\x05")), "lists no keys (none added, or it is locked)"),
]


@pytest.mark.parametrize(("handler", "cause"), rows(LIES))
def test_an_agent_that_breaks_the_protocol_is_named_with_what_it_did(
    handler: Callable[[socket.socket], None], cause: str, home: Path, scripted_agent: Scripted
) -> None:
    path = scripted_agent(handler)
    report = check(home, "--upstream", path)
    assert cause in report.fails()
    assert report.one("^ok .*agent") == f"ok   asking the agent at '{path}'"


NO_LISTS = [
    ("of another type", message(b"\x0e"), "message type 14"),
    ("shorter than it says", message(b"\x0c\0\0\0\x01"), "4 bytes expected"),
    ("of four billion keys", message(b"\x0c\xff\xff\xff\xff"), "bytes expected"),
    ("with bytes left over", message(b"\x0c\0\0\0\0x"), "1 bytes left over"),
]


@pytest.mark.parametrize(("answer", "cause"), rows(NO_LISTS))
def test_a_list_that_is_none_is_told(
    answer: bytes, cause: str, home: Path, scripted_agent: Scripted
) -> None:
    line = check(home, "--upstream", scripted_agent(answering(answer))).fails()
    assert cause in line


def test_an_agent_that_hangs_is_named_once_the_timeout_is_over(
    home: Path, agent: Agent, key: str
) -> None:
    agent.process.send_signal(signal.SIGSTOP)
    line = check(home, "--upstream", agent.sock, "--timeout", "0.3").fails()
    assert f"'{agent.sock}'" in line
    assert "did not answer in time" in line


def drip(connection: socket.socket) -> None:
    connection.sendall((4096).to_bytes(4, "big"))
    while True:
        connection.sendall(b"\x0c")
        time.sleep(0.01)


def test_an_agent_that_drips_is_bounded_by_the_timeout(
    home: Path, scripted_agent: Scripted
) -> None:
    line = check(home, "--upstream", scripted_agent(drip), "--timeout", "0.3").fails()
    assert "did not answer in time" in line


HOSTILE = "a\x1b[31m\r\nFAIL b\u202e\u200bc\x9b\udcff"
ESCAPED = r"a\x1b[31m\r\nFAIL b\u202e\u200bc\x9b"


def test_a_hostile_comment_is_escaped_on_its_line(
    home: Path, scripted_agent: Scripted, keys: Keys
) -> None:
    comment = HOSTILE.encode("utf-8", "surrogateescape")
    path = scripted_agent(answering(identities((blob(keys.line("ed25519")), comment))))
    assert ESCAPED in check(home, "--upstream", path).one(" holds ")


def test_a_comment_of_100_kb_is_cut(home: Path, scripted_agent: Scripted, keys: Keys) -> None:
    listed = identities((blob(keys.line("ed25519")), 100_000 * b"x"))
    line = check(home, "--upstream", scripted_agent(answering(listed))).one(" holds ")
    assert len(line) < 500


def test_a_hostile_path_of_an_agent_is_escaped_on_its_line(home: Path, short: Path) -> None:
    line = check(home, SSH_AUTH_SOCK=f"{short}/{HOSTILE}").fails()
    assert ESCAPED in line.replace(2 * "\\", "\\")


# ---------------------------------------------------------------- an agent that is a command


@pytest.fixture
def bridge(short: Path, agent: Agent) -> str:
    """A command that speaks to the agent for us."""
    program = short / "bridge"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, socket, sys, threading\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        f"s.connect({str(agent.sock)!r})\n"
        "def answers():\n"
        "    while data := s.recv(65536): os.write(1, data)\n"
        "threading.Thread(target=answers, daemon=True).start()\n"
        "while data := os.read(0, 65536): s.sendall(data)\n"
    )
    program.chmod(0o755)
    return str(program)


def test_an_agent_behind_a_command_is_told(home: Path, bridge: str, key: str) -> None:
    report = check(home, "--upstream", f"exec:{bridge}")
    report.one(f"^ok   asking the agent command '{bridge}'$")
    assert fingerprint(key) in report.one(" holds ")
    report.works()


COMMANDS = [
    ("that is not there", "exec:no-such-program", "'no-such-program'", "No such file"),
    ("that ends without a word", "exec:true", "'true'", "hung up without an answer"),
]


@pytest.mark.parametrize(("upstream", "name", "cause"), rows(COMMANDS))
def test_a_command_is_named_with_the_cause(
    upstream: str, name: str, cause: str, home: Path
) -> None:
    line = check(home, "--upstream", upstream).fails()
    for word in (name, cause, NAME + "UPSTREAM"):
        assert word in line


# ---------------------------------------------------------------- the pinned key

# How the key is pinned, and how that setting is called.
WAYS = [
    ("--pubkey", "--pubkey"),
    (NAME + "PUBKEY", NAME + "PUBKEY"),
    ("--pubkey-file", "--pubkey-file"),
    (NAME + "PUBKEY_FILE", NAME + "PUBKEY_FILE"),
]
EACH_WAY = pytest.mark.parametrize("way", [way for way, _ in WAYS])


def pinned(way: str, text: str, short: Path) -> Tuple[List[str], Dict[str, str]]:
    """Arguments and environment that pin TEXT in that way."""
    if "file" in way.lower():
        (short / "pin").write_text(text)
        text = str(short / "pin")
    return ([way, text], {}) if way.startswith("--") else ([], {way: text})


def names_setting(line: str, way: str) -> bool:
    """Does LINE name that setting, as an option or as a variable, and not a longer one?"""
    variable = way if way.startswith(NAME) else NAME + way[2:].upper().replace("-", "_")
    flag = "--" + variable[len(NAME) :].lower().replace("_", "-")
    return bool(re.search(rf"({re.escape(flag)}|{variable})(?![\w-])", line))


@EACH_WAY
def test_the_pinned_key_signs_and_its_setting_is_named(
    way: str, home: Path, short: Path, agent: Agent, keys: Keys
) -> None:
    agent.add(keys["other"])
    agent.add(keys["ed25519"])
    argv, env = pinned(way, keys.line("ed25519") + "\n", short)
    report = check(home, "--upstream", agent.sock, *argv, **env)
    line = report.one("signing with ")
    assert line.startswith(f"ok   signing with {fingerprint(keys.line('ed25519'))}, pinned by ")
    assert names_setting(line, way), line
    report.works()


@EACH_WAY
def test_a_pinned_key_that_is_not_held_is_named_with_its_setting(
    way: str, home: Path, short: Path, agent: Agent, key: str, keys: Keys
) -> None:
    argv, env = pinned(way, keys.line("other"), short)
    line = check(home, "--upstream", agent.sock, *argv, **env).fails()
    assert fingerprint(keys.line("other")) in line
    assert "does not hold it, but 1 other" in line
    assert names_setting(line, way), line


def test_a_pinned_key_and_an_agent_without_keys_is_exit_1(
    home: Path, agent: Agent, keys: Keys
) -> None:
    line = check(home, "--upstream", agent.sock, "--pubkey", keys.line("ed25519")).fails()
    assert "lists no keys" in line


BAD_PINS = [
    ("a fingerprint", "SHA256:" + 43 * "A", "fingerprint"),
    ("nonsense", "nonsense", "not a public key"),
    ("a key of a type that can't be used", "ssh-dss AAAAB3NzaC1kc3M= x", "not a public key"),
    ("damaged base64", "ssh-ed25519 AAAA*", "damaged"),
    ("half a key", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA==", "32 bytes expected"),
    ("a comment alone", "# nothing", "one line with a public key is needed, 0"),
]


@pytest.mark.parametrize(("text", "cause"), rows(BAD_PINS))
@pytest.mark.parametrize("way", ["--pubkey", NAME + "PUBKEY_FILE"])
def test_a_pin_that_is_no_public_key_is_told(
    way: str, text: str, cause: str, home: Path, short: Path
) -> None:
    argv, env = pinned(way, text, short)
    line = refused(home, *argv, **env)
    assert line.startswith(f"FAIL {way}: ")
    assert cause in line


def test_two_pins_are_told(home: Path, keys: Keys) -> None:
    line = refused(home, "--pubkey", keys.line("ed25519") + "\n" + keys.line("other"))
    assert line.startswith("FAIL --pubkey: ")
    assert "one line with a public key is needed, 2" in line


@pytest.mark.parametrize("part", ["the whole", "without its head", "in one line"])
@pytest.mark.parametrize("way", ["--pubkey", NAME + "PUBKEY_FILE"])
def test_nothing_of_a_private_key_is_shown(
    way: str, part: str, home: Path, short: Path, keys: Keys
) -> None:
    text = keys["ed25519"].read_text()
    body = text.splitlines()[1:-1]
    text = {"the whole": text, "without its head": "\n".join(body), "in one line": "".join(body)}[
        part
    ]
    argv, env = pinned(way, text, short)
    line = refused(home, *argv, **env)
    assert line.startswith(f"FAIL {way}: ")
    assert not [at for at in range(len(body[0]) - 8) if body[0][at : at + 8] in line]


@EACH_WAY
def test_a_private_key_is_called_one(way: str, home: Path, short: Path, keys: Keys) -> None:
    argv, env = pinned(way, keys["ed25519"].read_text(), short)
    line = refused(home, *argv, **env)
    assert "a private key" in line
    assert ".pub" in line


FILES = [
    ("missing", nothing, "No such file"),
    ("empty", Path.touch, "one line with a public key is needed, 0"),
    ("a folder", Path.mkdir, "directory"),
    ("a pipe", os.mkfifo, "not a regular file"),
    ("a socket", dead, ""),
]


@pytest.mark.parametrize(("make", "cause"), rows(FILES))
def test_a_pubkey_file_that_is_none_is_named_with_the_cause(
    make: Callable[[Path], None], cause: str, home: Path, short: Path
) -> None:
    make(short / "pin")
    line = refused(home, "--pubkey-file", short / "pin")
    assert line.startswith(f"FAIL --pubkey-file: can't use '{short}/pin': ")
    assert cause in line


@linux
def test_a_pubkey_file_that_can_not_be_read_is_named_with_the_cause(
    nobody: Callable[..., Report], short: Path, keys: Keys
) -> None:
    (short / "pin").write_text(keys.line("ed25519"))
    (short / "pin").chmod(0o600)
    report = nobody("--pubkey-file", short / "pin")
    assert report.status == 2
    assert report.lines == [f"FAIL --pubkey-file: can't use '{short}/pin': Permission denied"]


# ---------------------------------------------------------------- where it listens


@pytest.fixture
def on(home: Path, agent: Agent, key: str) -> Callable[..., Report]:
    """`check` with those addresses, the agent's side being fine."""
    clean_env(home)  # makes its folder for what is temporary

    def call(addr: str, *argv: Any, **env: Any) -> Report:
        return check(home, "--upstream", agent.sock, "--addr", addr, *argv, **env)

    return call


On = Callable[..., Report]


@pytest.fixture
def taken() -> Iterator[Callable[..., int]]:
    """taken(HANDLER): a port where another program answers each connection so."""
    listeners: List[socket.socket] = []
    held: List[socket.socket] = []

    def start(handler: Callable[[socket.socket], None]) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def one(connection: socket.socket) -> None:
            try:
                handler(connection)
            except OSError:
                pass  # check went away first
            connection.close()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                held.append(connection)
                threading.Thread(target=one, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        return int(listener.getsockname()[1])

    yield start
    for sock in listeners + held:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        sock.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


def test_a_free_port_is_told(on: On) -> None:
    port = free_port()
    report = on(f"127.0.0.1:{port}")
    assert report.one(f":{port}") == f"ok   127.0.0.1:{port} is free to listen on"
    report.works()


def test_every_address_is_told(on: On, short: Path) -> None:
    port = free_port()
    report = on(f"127.0.0.1:{port},unix:{short}/s")
    assert report.one(f":{port}").startswith("ok   ")
    assert report.one(f"unix:{short}/s").startswith("ok   ")


def test_the_proxy_that_runs_there_already_is_known(on: On, proxy: Proxy) -> None:
    report = on(f"127.0.0.1:{proxy.port}")
    line = report.one(f":{proxy.port}")
    assert line.startswith("ok   ")
    assert SERVER in line
    report.works()


def test_the_proxy_that_is_asked_is_not_disturbed(on: On, proxy: Proxy) -> None:
    on(f"127.0.0.1:{proxy.port}")
    assert http(proxy.port, "POST", "/sign", b"x").status == 200


def saying(answer: bytes) -> Callable[[socket.socket], None]:
    def handle(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(answer)

    return handle


def mute(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


def trickle(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"x")
        time.sleep(0.01)


OTHERS = [
    ("another server", saying(b"HTTP/1.0 200 OK\r\nServer: other/1.0\r\n\r\nok\n")),
    ("no Server header", saying(b"HTTP/1.0 200 OK\r\n\r\nok\n")),
    ("our name behind another", saying(b"HTTP/1.0 200 OK\r\nServer: x ssh-agent-proxy/1\r\n\r\n")),
    ("our name, longer", saying(b"HTTP/1.0 200 OK\r\nServer: ssh-agent-proxy2/1\r\n\r\n")),
    ("escapes", saying(b"HTTP/1.0 200 OK\r\nServer: \x1b[31m\xe2\x80\xae\x00\xff\r\n\r\n")),
    ("garbage", saying(bytes(range(256)) * 64)),
    ("closes at once", lambda connection: None),
    ("mute", mute),
    ("drips for ever", trickle),
]


@pytest.mark.parametrize("handler", [row[1] for row in OTHERS], ids=[row[0] for row in OTHERS])
def test_a_port_of_another_program_is_told_with_the_setting(
    handler: Callable[[socket.socket], None], on: On, taken: Callable[..., int]
) -> None:
    port = taken(handler)
    line = on(f"127.0.0.1:{port}").fails()
    for word in (f"127.0.0.1:{port}", "in use", NAME + "ADDR"):
        assert word in line


def test_a_server_that_takes_our_name_is_escaped(on: On, taken: Callable[..., int]) -> None:
    evil = b"\x1b[31m\xe2\x80\xae\x07\xff" + 3000 * b"x"
    port = taken(saying(b"HTTP/1.0 200 OK\r\nServer: " + SERVER.encode() + evil + b"\r\n\r\n"))
    line = on(f"127.0.0.1:{port}").one(f":{port}")
    assert rf"{SERVER}\x1b[31m\u202e\x07\xff" in line
    assert len(line) < 500


@linux
def test_an_address_of_another_machine_is_a_warning(on: On, short: Path) -> None:
    (short / "tokens").write_text("token\n")
    (short / "tokens").chmod(0o600)
    report = on("203.0.113.9:7221", "--token-file", short / "tokens")
    line = report.one("203")
    assert line.startswith("warn ")
    assert "no address of this machine" in line
    report.works()


@linux
def test_an_ipv6_address_of_another_machine_is_a_warning(on: On, short: Path) -> None:
    need_ipv6()
    (short / "tokens").write_text("token\n")
    (short / "tokens").chmod(0o600)
    line = on("[2001:db8::1]:7221", "--token-file", short / "tokens").one("2001")
    assert line.startswith("warn ")


# None of these has a name server asked.
NO_NAMES = [
    ("an empty label", "no..such.host"),
    ("a label that is too long", 64 * "x" + ".test"),
    ("an unknown interface", "[::1%nosuchif]"),
    ("a control character", "a\x1bb"),
    ("a bidi override", "a\u202eb"),
    ("no UTF-8", "a\udcffb"),
]


@pytest.mark.parametrize("host", [row[1] for row in NO_NAMES], ids=[row[0] for row in NO_NAMES])
def test_a_host_that_is_none_is_one_line(host: str, home: Path, agent: Agent, key: str) -> None:
    report = check(home, "--upstream", agent.sock, "--addr", f"{host}:7221")
    assert report.status in (1, 2)  # no name, or never one
    assert len(report.marked("FAIL")) == 1


def test_a_host_without_an_address_is_named(on: On) -> None:
    line = on("[::1%nosuchif]:7221").fails()
    assert "[::1%nosuchif]:7221" in line
    assert "SSH_AGENT_PROXY_ADDR" in line


def test_the_same_port_twice_is_told_for_serve_would_not_start(on: On) -> None:
    port = free_port()
    on(f"127.0.0.1:{port},127.0.0.1:{port}").fails()


@linux
def test_a_port_is_free_for_those_who_may_have_it(
    nobody: Callable[..., Report], short: Path
) -> None:
    # Where a container lets everybody have the low ports, that is what is to be told.
    first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    line = nobody("--addr", "127.0.0.1:11").one("127.0.0.1:11")
    if first > 11:
        assert line.startswith("FAIL cannot listen on 127.0.0.1:11: Permission denied")
        assert NAME + "ADDR" in line
    else:
        assert line.startswith("ok   ")


UNIX = [
    ("free", nothing, "ok   ", ""),
    ("stale", dead, "ok   ", ""),
    ("a file", Path.touch, "FAIL ", "no socket"),
    ("a folder", Path.mkdir, "FAIL ", "no socket"),
]


@pytest.mark.parametrize(("make", "mark", "cause"), rows(UNIX))
def test_a_unix_address_is_told(
    make: Callable[[Path], None], mark: str, cause: str, on: On, short: Path
) -> None:
    make(short / "s")
    line = on(f"unix:{short}/s").one(f"unix:{short}/s")
    assert line.startswith(mark)
    assert cause in line
    assert mark == "ok   " or NAME + "ADDR" in line


# (A stale socket is removed, as by serve: nobody can have any use for it.)
LEFT = [row for row in UNIX if row[0] != "stale"]


@pytest.mark.parametrize("make", [row[1] for row in LEFT], ids=[row[0] for row in LEFT])
def test_a_unix_address_is_left_as_it_was(
    make: Callable[[Path], None], on: On, short: Path
) -> None:
    make(short / "s")
    before = files(short)
    on(f"unix:{short}/s")
    assert files(short) == before


def test_a_proxy_on_a_unix_address_is_known(
    on: On, short: Path, agent: Agent, start_proxy: StartProxy
) -> None:
    proxy = start_proxy(upstream=agent.sock, addr=f"unix:{short}/s", wait=False)
    proxy.wait_log("listening on ")
    before = files(short)
    report = on(f"unix:{short}/s")
    line = report.one(f"unix:{short}/s")
    assert line.startswith("ok   ")
    assert SERVER in line
    report.works()
    assert files(short) == before


def test_another_programs_unix_socket_is_told_and_left(
    on: On, short: Path, start_agent: StartAgent
) -> None:
    other = start_agent(short / "s")
    before = files(short)
    line = on(f"unix:{short}/s").fails()
    for word in (f"unix:{short}/s", "another program listens there", NAME + "ADDR"):
        assert word in line
    assert files(short) == before
    assert other.answers()


def test_a_mute_program_on_a_unix_address_is_told(on: On, short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(short / "s"))
        s.listen(16)
        assert "another program" in on(f"unix:{short}/s").fails()


def test_a_unix_address_in_a_missing_folder_is_told(on: On, short: Path) -> None:
    line = on(f"unix:{short}/missing/s").fails()
    assert f"unix:{short}/missing/s" in line
    assert "No such file or directory" in line


def test_a_unix_address_that_is_too_long_is_told(on: On, short: Path) -> None:
    line = on(f"unix:{short}/" + 120 * "x").fails()
    assert f"unix:{short}/xxx" in line
    assert "too long" in line


@linux
def test_a_unix_address_in_anothers_folder_is_told(
    nobody: Callable[..., Report], short: Path
) -> None:
    line = nobody("--addr", f"unix:{short}/s").one(f"unix:{short}/s")
    assert line.startswith("FAIL ")
    assert "Permission denied" in line


def test_a_hostile_unix_address_is_escaped(on: On, short: Path) -> None:
    report = on(f"unix:{short}/a\x1b\u202eb")
    assert report.one("unix:").startswith(f"ok   unix:{short}/a\\x1b\\u202eb ")


# ---------------------------------------------------------------- beyond loopback, and tokens


OPEN = ["0.0.0.0", "[::]"]
LOOPBACK = ["127.0.0.1", "127.0.0.2", "localhost", "[::1]"]


@pytest.mark.parametrize("host", OPEN)
def test_listening_beyond_loopback_without_a_token_is_a_warning(host: str, on: On) -> None:
    if host == "[::]":
        need_ipv6()
    report = on(f"{host}:0")
    line = report.one("not a loopback address")
    assert line.startswith(f"warn {host}:0 ")
    assert NAME + "TOKEN_FILE" in line
    report.works()


@pytest.mark.parametrize("host", LOOPBACK)
def test_listening_on_loopback_is_no_warning(host: str, on: On) -> None:
    if host == "[::1]":
        need_ipv6()
    assert on(f"{host}:0").marked("warn") == []


@pytest.mark.parametrize("host", OPEN)
def test_listening_beyond_loopback_with_a_token_is_no_warning(
    host: str, on: On, short: Path
) -> None:
    if host == "[::]":
        need_ipv6()
    (short / "tokens").write_text("token\n")
    (short / "tokens").chmod(0o600)
    assert on(f"{host}:0", "--token-file", short / "tokens").marked("warn") == []


SECRET = "c2VjcmV0LXRva2VuLW9mLXRoZS10ZXN0"


def token_file(short: Path, text: str, mode: int = 0o600) -> Path:
    """A token file that was written a while ago."""
    path = short / "tokens"
    path.write_text(text)
    path.chmod(mode)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    return path


TOKENS = [
    ("for the group", f"{SECRET}\n", 0o640, "chmod 600"),
    ("for others", f"{SECRET}\n", 0o604, "chmod 600"),
    ("empty", "", 0o600, "no token in it"),
    ("comments only", "# nothing\n", 0o600, "no token in it"),
    ("no bearer token", f"{SECRET}!\n", 0o600, "line 1: its first word"),
    ("a token twice", f"{SECRET}\n\n{SECRET} b\n", 0o600, "line 3: the same token"),
    ("an unknown option", f"{SECRET} a color={SECRET}\n", 0o600, "line 1: another option"),
    ("no fingerprint", f"{SECRET} key={SECRET}\n", 0o600, "line 1: key="),
    ("no payload", f"{SECRET} payloads={SECRET}\n", 0o600, "line 1: payloads are"),
    ("token and name exchanged", f"name! {SECRET}\n", 0o600, "line 1: its first word"),
]


@pytest.mark.parametrize(("text", "mode", "cause"), rows(TOKENS))
def test_a_token_file_that_can_not_be_used_is_named_with_the_cause(
    text: str, mode: int, cause: str, home: Path, short: Path
) -> None:
    path = token_file(short, text, mode)
    line = refused(home, "--token-file", path)
    assert line.startswith(f"FAIL --token-file: can't use '{path}': ")
    assert cause in line


# Its line is broken such that any of the words might be what is complained of.
QUOTABLE = [row[:2] for row in TOKENS if row[1].count(SECRET) > 1 or "!" in row[1]]


@pytest.mark.parametrize("text", [row[1] for row in QUOTABLE], ids=[row[0] for row in QUOTABLE])
def test_a_token_file_that_can_not_be_used_is_not_quoted(
    text: str, home: Path, short: Path
) -> None:
    assert SECRET[:8] not in refused(home, "--token-file", token_file(short, text))


def test_a_token_file_that_is_missing_is_named_with_the_way_out(home: Path, short: Path) -> None:
    line = refused(home, **{NAME + "TOKEN_FILE": short / "tokens"})
    assert line.startswith(f"FAIL {NAME}TOKEN_FILE: can't use '{short}/tokens': No such file")
    assert "token NAME" in line


def test_a_folder_for_a_token_file_is_told(home: Path, short: Path) -> None:
    assert "directory" in refused(home, "--token-file", short)


@linux
def test_a_token_file_of_another_user_is_told(home: Path, short: Path) -> None:
    if os.geteuid() != 0:
        cannot_run("another user's file: run the tests as root")
    path = token_file(short, f"{SECRET}\n")
    os.chown(path, 65534, -1)
    assert "chown" in refused(home, "--token-file", path)


@pytest.mark.parametrize("text", ["", f"{SECRET}!"], ids=["empty", "broken"])
def test_a_token_file_that_was_just_written_is_named_once(
    text: str, home: Path, short: Path
) -> None:
    path = token_file(short, text)
    os.utime(path)
    assert refused(home, "--token-file", path).count(str(path)) == 1


def test_a_token_file_that_is_fine_is_exit_0_and_not_quoted(
    home: Path, short: Path, agent: Agent, key: str
) -> None:
    path = token_file(short, f"{SECRET} name\n")
    report = check(home, "--upstream", agent.sock, "--token-file", path)
    report.works()
    report.none(SECRET[:8])


# ---------------------------------------------------------------- settings

# A setting's variable, a value that can't be right, and what is said of it.
BAD = [
    ("ADDR", "127.0.0.1", "'127.0.0.1' is none of HOST:PORT"),
    ("NAMESPACE", "a b", "'a b'"),
    ("UPSTREAM", "relative/path", "'relative/path' is neither"),
    ("PUBKEY", "nonsense", "not a public key"),
    ("PUBKEY_FILE", "/nowhere/pin", "'/nowhere/pin'"),
    ("TOKEN_FILE", "/nowhere/tokens", "'/nowhere/tokens'"),
    ("PAYLOADS", "commits", "commit, tag, push"),
    ("CONFIRM", "no-such-program", "'no-such-program' is no program"),
    ("CONFIRM_FOR", "10m", "'10m' is not a number"),
    ("ALLOWED_HOSTS", "a b", "'a b'"),
    ("TIMEOUT", "0", "'0' is not a number"),
]


def test_a_bad_value_of_every_setting_is_tried() -> None:
    assert [row[0] for row in BAD] == [option.variable for option in p.OPTIONS]


@pytest.mark.parametrize(("variable", "value", "cause"), BAD, ids=[row[0] for row in BAD])
@pytest.mark.parametrize("by", ["option", "variable"])
def test_a_bad_value_is_one_line_that_names_the_setting_and_exit_2(
    by: str, variable: str, value: str, cause: str, home: Path
) -> None:
    name = NAME + variable
    if by == "option":
        name = "--" + variable.lower().replace("_", "-")
    line = refused(home, name, value) if by == "option" else refused(home, **{name: value})
    assert line.startswith(f"FAIL {name}: ")
    assert cause in line


def test_empty_variables_count_as_unset(home: Path, agent: Agent, key: str) -> None:
    # (An empty address would be the one that everybody has.)
    names = [NAME + option.variable for option in p.OPTIONS if option.variable != "ADDR"]
    check(home, SSH_AUTH_SOCK=agent.sock, **dict.fromkeys(names, "")).works()


TOGETHER = [
    ("a mode without a token", ["--addr", "unix:/tmp/s?mode=0660"], NAME + "TOKEN_FILE"),
    ("a yes that holds and nobody to ask", ["--confirm-for", "60"], NAME + "CONFIRM too"),
]


@pytest.mark.parametrize(("argv", "way_out"), rows(TOGETHER))
def test_settings_that_do_not_fit_are_one_line_and_exit_2(
    argv: List[str], way_out: str, home: Path
) -> None:
    assert way_out in refused(home, *argv)


WORDS = [
    ("an option that there is not", ["check", "--sing"], "--sing"),
    ("a word too many", ["check", "twice"], "check twice"),
    ("the option before the command", ["--timeout", "x", "check"], "--timeout"),
]


@pytest.mark.parametrize(("argv", "named"), rows(WORDS))
def test_a_wrong_command_line_is_one_line_and_exit_2(
    argv: List[str], named: str, home: Path
) -> None:
    done = run([sys.executable, PROXY, *argv], env=clean_env(home), check=False)
    report = parse(done)
    assert report.status == 2
    assert report.one("^FAIL ").find(named) > 0


UNKNOWN = [NAME + "UPSTRAEM", NAME + "ADDRESS", NAME, NAME + "X\x1b\u202e", NAME + "TOKEN"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_variable_that_is_no_setting_is_a_warning(
    name: str, home: Path, agent: Agent, key: str
) -> None:
    report = check(home, SSH_AUTH_SOCK=agent.sock, **{name: "value-of-it"})
    line = report.one("no setting")
    assert line.startswith(f"warn {p.printable(name)} is set")
    report.works()
    report.none("value-of-it")


@pytest.mark.parametrize("name", ["URL", "PUBKEY_URL", "CURL"])
def test_a_variable_of_the_containers_side_is_no_warning(
    name: str, home: Path, agent: Agent, key: str
) -> None:
    report = check(home, SSH_AUTH_SOCK=agent.sock, **{NAME + name: "x"})
    assert report.marked("warn") == []


# ---------------------------------------------------------------- what the process gives up

STEPS = ["no core dumps", "no debugger, no reading of memory", "no new privileges",
         "memory kept out of swap", "Landlock"]  # fmt: skip


@linux
@pytest.mark.parametrize("step", STEPS)
def test_each_step_is_a_line_whose_mark_is_its_state(
    step: str, home: Path, agent: Agent, key: str
) -> None:
    line = check(home, "--upstream", agent.sock).one(f" {step}: ")
    assert re.fullmatch(rf"(ok  |warn) {step}: (not )?in force \(.+\)", line)
    assert line.startswith("warn") == ("not in force" in line)


def steps(text: str) -> List[str]:
    """Each step and whether it is in force, in any text."""
    return sorted(re.findall(rf"((?:{'|'.join(STEPS)}): (?:not )?in force) \(", text))


@linux
@pytest.mark.parametrize("confirm", ["", "true"])
def test_each_step_is_in_force_as_it_is_in_serve(
    confirm: str, home: Path, agent: Agent, key: str, start_proxy: StartProxy
) -> None:
    env = {NAME + "CONFIRM": confirm}
    proxy = start_proxy(upstream=agent.sock, env=env)
    told = steps("\n".join(check(home, "--upstream", agent.sock, **env).lines))
    assert len(told) == len(STEPS)
    assert told == steps(proxy.log())


@linux
def test_memory_that_can_not_be_locked_is_a_warning_with_the_limit(
    nobody: Callable[..., Report], agent: Agent
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    line = nobody("--upstream", agent.sock).one(" memory kept out of swap: ")
    if hard == resource.RLIM_INFINITY:
        assert line.startswith("ok   ")
    else:
        assert line.startswith("warn ")
        assert f"RLIMIT_MEMLOCK is {hard >> 10} KiB" in line


@linux
def test_landlock_is_not_in_force_for_a_command(home: Path, bridge: str, key: str) -> None:
    report = check(home, "--upstream", f"exec:{bridge}")
    line = report.one(" Landlock: ")
    assert line.startswith("warn Landlock: not in force (")
    assert NAME + "UPSTREAM runs a program" in line
    report.works()


@linux
def test_landlock_is_not_in_force_where_a_person_is_asked(
    home: Path, agent: Agent, key: str
) -> None:
    report = check(home, "--upstream", agent.sock, "--confirm", "true")
    line = report.one(" Landlock: ")
    assert line.startswith("warn Landlock: not in force (")
    assert NAME + "CONFIRM runs a program" in line
    report.works()


# ---------------------------------------------------------------- the user service


class Systemctl:
    """A stand-in on PATH, which says what it is told to and notes how it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = folder / "asked"
        folder.mkdir()
        self.env = {"PATH": f"{folder}:{os.environ['PATH']}"}

    def does(self, line: str) -> None:
        program = self.folder / "systemctl"
        asked = shlex.quote(str(self.asked))
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>{asked}\n{line}\n')
        program.chmod(0o755)


@pytest.fixture
def systemctl(short: Path) -> Systemctl:
    return Systemctl(short / "bin")


def facts(pid: int) -> Dict[str, str]:
    """What the kernel says of a process, by the names that check uses."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        found[name] = value.strip()
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        match = re.match(r"(Max .+?)  +(\S+)  +\S+", line)
        if match:
            found[match[1]] = match[2]
    return found


FACTS = ["NoNewPrivs", "VmLck", "Max core file size", "Max locked memory"]


@linux
@pytest.mark.parametrize("fact", FACTS)
def test_of_the_running_service_the_kernels_facts_are_told(
    fact: str, home: Path, agent: Agent, proxy: Proxy, systemctl: Systemctl
) -> None:
    systemctl.does(f"echo {proxy.pid}")
    line = check(home, "--upstream", agent.sock, **systemctl.env).one("service")
    assert f"PID {proxy.pid}" in line
    assert re.search(rf"{fact} {re.escape(facts(proxy.pid)[fact])}(,|;|\)|$)", line)


@linux
def test_a_service_without_its_locks_is_a_warning(
    home: Path, agent: Agent, key: str, systemctl: Systemctl
) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        systemctl.does(f"echo {process.pid}")
        report = check(home, "--upstream", agent.sock, **systemctl.env)
    finally:
        process.kill()
        process.wait()
    line = report.one("service")
    assert line.startswith("warn ")
    assert "NoNewPrivs 0" in line
    report.works()


@linux
def test_systemctl_is_asked_for_the_users_service(
    home: Path, agent: Agent, systemctl: Systemctl
) -> None:
    systemctl.does("echo 0")
    check(home, "--upstream", agent.sock, **systemctl.env)
    words = systemctl.asked.read_text().split()
    assert {"--user", "show", "--property=MainPID"} <= set(words)
    assert words[-1] in (p.PROGRAM, f"{p.PROGRAM}.service")


NO_SERVICE = [
    ("not running", "echo 0"),
    ("no manager", "echo 'Failed to connect to bus' >&2; exit 1"),
    ("nonsense", "echo nonsense"),
    ("two numbers", "echo 1 1"),
    ("another folder of /proc", "echo self"),
    ("a way out of /proc and back", "echo ../proc/self"),
    ("a process that has ended", "echo 4194305"),  # beyond what Linux gives out
    ("escapes", r"printf '\033[31m1\n'"),
    ("killed", "kill -9 $$"),
]


@linux
@pytest.mark.parametrize("line", [row[1] for row in NO_SERVICE], ids=[row[0] for row in NO_SERVICE])
def test_a_service_that_does_not_run_is_no_line(
    line: str, home: Path, agent: Agent, key: str, systemctl: Systemctl
) -> None:
    systemctl.does(line)
    report = check(home, "--upstream", agent.sock, **systemctl.env)
    assert systemctl.asked.exists()
    report.none("service")
    report.works()


@linux
def test_a_systemctl_that_hangs_is_not_waited_for(
    home: Path, agent: Agent, key: str, systemctl: Systemctl
) -> None:
    systemctl.does("exec sleep 60")
    check(home, "--upstream", agent.sock, **systemctl.env).works()


def test_without_systemctl_there_is_no_line(home: Path, agent: Agent, key: str) -> None:
    report = check(home, "--upstream", agent.sock, PATH="/nowhere")
    report.none("service|systemctl")
    report.works()


# ---------------------------------------------------------------- --sign


@pytest.mark.parametrize("name", ["ed25519", "rsa2048", "ecdsa256", "ecdsa384", "ecdsa521"])
def test_a_signature_of_each_type_is_verified(
    name: str, home: Path, agent: Agent, keys: Keys
) -> None:
    agent.add(keys[name])
    report = check(home, "--upstream", agent.sock, "--sign")
    line = report.one("test signature")
    assert line.startswith("ok   ")
    assert 'Good "git" signature' in line
    assert fingerprint(keys.line(name)) in line
    report.works()


def test_the_pinned_key_makes_the_test_signature(home: Path, agent: Agent, keys: Keys) -> None:
    agent.add(keys["other"])
    agent.add(keys["ed25519"])
    report = check(home, "--upstream", agent.sock, "--sign", "--pubkey", keys.line("ed25519"))
    line = report.one("test signature")
    assert line.startswith("ok   ")
    assert fingerprint(keys.line("ed25519")) in line


def test_the_test_signature_is_of_the_default_namespace(
    home: Path, agent: Agent, key: str
) -> None:
    report = check(home, "--upstream", agent.sock, "--sign", "--namespace", "file,git")
    assert 'Good "file" signature' in report.one("test signature")


def test_a_command_makes_a_test_signature(home: Path, bridge: str, key: str) -> None:
    line = check(home, "--upstream", f"exec:{bridge}", "--sign").one("test signature")
    assert line.startswith("ok   ")


def test_gpg_agent_makes_a_test_signature(gpg_agent: Path, home: Path, keys: Keys) -> None:
    env = {"PATH": os.environ["PATH"], "SSH_AUTH_SOCK": str(gpg_agent)}
    run(["ssh-add", "-q", keys["ed25519"]], env=env)
    report = check(home, "--upstream", gpg_agent, "--sign")
    assert report.one("test signature").startswith("ok   ")
    report.works()


@pytest.fixture
def requests(scripted_agent: Scripted, keys: Keys) -> Tuple[Path, List[int]]:
    """An agent that lists a key and refuses to sign, and the numbers of what it was asked."""
    numbers: List[int] = []

    def handle(connection: socket.socket) -> None:
        while True:
            request = read_message(connection)
            if not request:
                return
            numbers.append(request[0])
            listing = request[0] == p.SSH_AGENTC_REQUEST_IDENTITIES
            answer = identities((blob(keys.line("ed25519")), b"x"))
            connection.sendall(answer if listing else message(b"\x05"))

    return scripted_agent(handle), numbers


def test_without_sign_no_signature_is_asked_for(
    home: Path, requests: Tuple[Path, List[int]]
) -> None:
    check(home, "--upstream", requests[0]).works()
    assert set(requests[1]) == {p.SSH_AGENTC_REQUEST_IDENTITIES}


def test_with_sign_a_refusal_is_exit_1(home: Path, requests: Tuple[Path, List[int]]) -> None:
    line = check(home, "--upstream", requests[0], "--sign").fails()
    for word in ("test signature", "refused to sign"):
        assert word in line
    assert p.SSH_AGENTC_SIGN_REQUEST in requests[1]


@pytest.fixture
def asking_agent(short: Path, keys: Keys) -> Iterator[Callable[[int], Path]]:
    """asking_agent(STATUS): a real agent, whose person is asked at each use and ends so."""
    started: List[subprocess.Popen[bytes]] = []

    def start(status: int) -> Path:
        askpass, path = short / "askpass", short / "asking"
        askpass.write_text(f'#!/bin/sh\necho "$1" >{short}/asked\nexit {status}\n')
        askpass.chmod(0o755)
        env = {"SSH_ASKPASS": str(askpass), "SSH_ASKPASS_REQUIRE": "force"}
        env["PATH"] = os.environ["PATH"]
        argv = ["ssh-agent", "-D", "-a", str(path)]
        started.append(subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL))
        wait_for(lambda: test_upstream.accepts(path), message="ssh-agent's socket")
        run(["ssh-add", "-q", "-c", keys["ed25519"]], env={**env, "SSH_AUTH_SOCK": str(path)})
        return path

    yield start
    for process in started:
        process.terminate()
        process.wait(10)


def test_a_signature_that_the_person_declines_is_exit_1(
    home: Path, short: Path, asking_agent: Callable[[int], Path]
) -> None:
    line = check(home, "--upstream", asking_agent(1), "--sign").fails()
    assert "declined" in line
    assert (short / "asked").exists()


def test_a_signature_that_the_person_agrees_to_is_verified(
    home: Path, short: Path, asking_agent: Callable[[int], Path]
) -> None:
    check(home, "--upstream", asking_agent(0), "--sign").works()
    assert (short / "asked").exists()


def test_without_sign_the_person_is_not_asked(
    home: Path, short: Path, asking_agent: Callable[[int], Path]
) -> None:
    check(home, "--upstream", asking_agent(1)).works()
    assert not (short / "asked").exists()


def signing(algorithm: bytes, signature: bytes) -> bytes:
    return message(b"\x0e" + wire(wire(algorithm) + wire(signature)))


WRONG = [
    ("a signature of something else", signing(b"ssh-ed25519", 64 * b"\x01"), "not verify"),
    ("another algorithm", signing(b"ssh-\x1b[1m", 64 * b"\x01"), "is of algorithm"),
    ("a signature that is too short", signing(b"ssh-ed25519", 63 * b"\x01"), "63 bytes"),
    ("a list", message(b"\x0c\0\0\0\0"), "message type 12"),
]


@pytest.mark.parametrize(("answer", "cause"), rows(WRONG))
def test_a_wrong_signature_is_exit_1(
    answer: bytes, cause: str, home: Path, scripted_agent: Scripted, keys: Keys
) -> None:
    def handle(connection: socket.socket) -> None:
        listed = identities((blob(keys.line("ed25519")), b"x"))
        while True:
            request = read_message(connection)
            if not request:
                return
            listing = request[0] == p.SSH_AGENTC_REQUEST_IDENTITIES
            connection.sendall(listed if listing else answer)

    line = check(home, "--upstream", scripted_agent(handle), "--sign").fails()
    assert "test signature" in line
    assert cause in line


def test_an_agent_that_hangs_while_it_signs_is_bounded(
    home: Path, scripted_agent: Scripted, keys: Keys
) -> None:
    ended = threading.Event()

    def handle(connection: socket.socket) -> None:
        answering(identities((blob(keys.line("ed25519")), b"x")))(connection)
        if read_message(connection):
            ended.wait(30)

    path = scripted_agent(handle)
    line = check(home, "--upstream", path, "--sign", "--timeout", "0.3").fails()
    ended.set()
    assert "test signature" in line
    assert "did not answer in time" in line


def test_without_ssh_keygen_the_signature_is_made_and_not_verified(
    home: Path, agent: Agent, key: str
) -> None:
    report = check(home, "--upstream", agent.sock, "--sign", PATH="/nowhere")
    line = report.one("test signature")
    assert line.startswith("warn ")
    assert "not verified" in line
    assert "ssh-keygen" in line
    report.works()


def test_no_test_signature_is_tried_where_no_key_can_make_one(home: Path, agent: Agent) -> None:
    report = check(home, "--upstream", agent.sock, "--sign")
    report.fails()
    report.none("test signature")


def test_sign_leaves_nothing_behind(home: Path, short: Path, agent: Agent, key: str) -> None:
    clean_env(home)  # makes its folder for what is temporary
    before = files(short)
    check(home, "--upstream", agent.sock, "--sign").works()
    assert files(short) == before


def test_without_room_for_a_temporary_file_that_is_told_and_nothing_left(
    home: Path, short: Path, agent: Agent, key: str
) -> None:
    argv = [sys.executable, str(PROXY), "check", "--addr", "127.0.0.1:0", "--sign"]
    limited = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *argv, "--upstream", str(agent.sock)]
    env = clean_env(home)
    before = files(short)
    report = parse(run(limited, env=env, check=False, timeout=20))
    line = report.one("test signature")
    assert line.startswith("warn ")
    assert "not verified" in line
    report.works()
    assert files(short) == before


OTHER_COMMANDS = [["serve"], [], ["token", "name"], ["shim"]]


@pytest.mark.parametrize("words", OTHER_COMMANDS, ids=["serve", "none", "token", "shim"])
def test_sign_with_another_command_is_refused(words: List[str], home: Path) -> None:
    done = run([sys.executable, PROXY, *words, "--sign"], env=clean_env(home), check=False)
    assert done.returncode == 2
    assert done.stdout == b""
    assert "--sign" in one_line(done.stderr)


# ---------------------------------------------------------------- where the report goes


def redirected(
    home: Path, agent: Agent, redirection: str, *argv: str
) -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, str(PROXY), "check", "--upstream", str(agent.sock), "--addr",
             "127.0.0.1:0", *argv]  # fmt: skip
    line = "exec " + " ".join(map(shlex.quote, words)) + f" {redirection}"
    return run(["sh", "-c", line], env=clean_env(home), check=False, timeout=20)


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_a_report_that_can_not_be_written_is_one_line_and_exit_1(
    redirection: str, home: Path, agent: Agent, key: str
) -> None:
    done = redirected(home, agent, redirection)
    assert done.returncode == 1
    assert "standard output" in one_line(done.stderr)


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_a_wrong_setting_that_can_not_be_reported_is_still_told(
    redirection: str, home: Path, agent: Agent
) -> None:
    done = redirected(home, agent, redirection, "--timeout", "x")
    assert done.returncode == 2
    assert "--timeout" in one_line(done.stderr)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_the_report_needs_no_stderr(
    redirection: str, home: Path, agent: Agent, key: str
) -> None:
    report = parse(redirected(home, agent, redirection))
    report.works()
    report.one("signing with ")


def test_a_reader_that_went_away_is_one_line_and_exit_1(
    home: Path, agent: Agent, key: str
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, str(PROXY), "check", "--upstream", str(agent.sock)]
    argv += ["--addr", "127.0.0.1:0"]
    done = subprocess.run(
        argv, env=clean_env(home), stdout=writing, stderr=subprocess.PIPE, timeout=20, check=False
    )
    os.close(writing)
    assert done.returncode == 1
    assert "standard output" in one_line(done.stderr)


# ---------------------------------------------------------------- while the proxy runs


def test_an_agent_that_comes_and_goes_is_told_as_the_running_proxy_sees_it(
    home: Path, short: Path, start_agent: StartAgent, keys: Keys, start_proxy: StartProxy
) -> None:
    env = {"SSH_AUTH_SOCK": str(short / "agent")}
    proxy = start_proxy(env=env)

    def both() -> Tuple[int, int]:
        report = check(home, "--addr", f"127.0.0.1:{proxy.port}", **env)
        assert report.one(f":{proxy.port}").startswith("ok   ")
        return report.status, http(proxy.port, "POST", "/sign", b"x").status

    assert both() == (1, 503)
    agent = start_agent(short / "agent")
    assert both() == (1, 503)  # without a key
    agent.add(keys["ed25519"])
    assert both() == (0, 200)
    agent.stop()
    assert both() == (1, 503)


def test_check_and_the_running_proxy_name_the_same_key(
    home: Path, agent: Agent, keys: Keys, start_proxy: StartProxy
) -> None:
    for name in ("rsa2048", "ed25519"):
        agent.add(keys[name])
    proxy = start_proxy(upstream=agent.sock)
    line = check(home, "--upstream", agent.sock).one("signing with ")
    assert fingerprint(http(proxy.port, "GET", "/publickey").text) in line


def test_a_check_changes_nothing_in_the_home(
    home: Path, short: Path, agent: Agent, key: str
) -> None:
    clean_env(home)
    before = files(short)
    check(home, "--upstream", agent.sock).works()
    assert files(short) == before
