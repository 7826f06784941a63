"""How the agent is reached: real agents, commands, discovery; and an agent that lies and stalls."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest
from conftest import (
    PROXY,
    Agent,
    Answer,
    Keys,
    Proxy,
    clean_env,
    http,
    message,
    need,
    rows,
    run,
    wait_for,
)

import ssh_agent_proxy as sap

StartAgent = Callable[..., Agent]
StartProxy = Callable[..., Proxy]
ScriptedAgent = Callable[[Callable[[socket.socket], None]], Path]

LISTS_NONE = "the agent lists no keys (none added, or it is locked)"


def sign(proxy: Proxy, key: Optional[str] = None, seconds: float = 30) -> Answer:
    headers = {"SSHSIG-Key": key} if key else {}
    return http(proxy.port, "POST", "/sign", b"payload", headers, seconds)


def fingerprint(line: str) -> str:
    return sap.parse_key_line(line)[0].fingerprint


def signer(answer: Answer) -> bytes:
    """The key blob in an armored signature."""
    assert answer.status == 200, answer.text
    blob = base64.b64decode(b"".join(answer.body.splitlines()[1:-1]))
    with sap.Reader(blob, "signature") as r:
        assert r.take(10) == b"SSHSIG\0\0\0\1"
        key, *_ = (r.string() for _ in range(5))
    return key


def accepts(sock: Path) -> bool:
    """Does somebody listen there? (A socket stands there a little earlier.)"""
    with socket.socket(socket.AF_UNIX) as s, contextlib.suppress(OSError):
        s.connect(str(sock))
        return True
    return False


def is_by(answer: Answer, keys: Keys, name: str) -> bool:
    return signer(answer) == base64.b64decode(keys.line(name).split()[1])


# ---------------------------------------------------------------- OpenSSH's agent


def test_a_key_counts_from_the_request_after_it_was_added(
    agent: Agent, keys: Keys, start_proxy: StartProxy
) -> None:
    proxy = start_proxy(upstream=agent.sock)
    assert sign(proxy).status == 503
    agent.add(keys["ed25519"])
    assert is_by(sign(proxy), keys, "ed25519")


def test_a_removed_key_is_gone_with_the_next_request(proxy: Proxy, agent: Agent) -> None:
    assert sign(proxy).status == 200
    agent.delete_all()
    assert sign(proxy).status == 503


def test_a_rotated_key_signs_the_next_request(proxy: Proxy, agent: Agent, keys: Keys) -> None:
    assert is_by(sign(proxy), keys, "ed25519")
    agent.delete_all()
    agent.add(keys["other"])
    assert http(proxy.port, "GET", "/publickey").text.strip() == keys.line("other")
    assert is_by(sign(proxy), keys, "other")


NAMING = ["not at all", "by its line", "by its fingerprint", "pinned"]


@pytest.fixture
def named(agent: Agent, keys: Keys, start_proxy: StartProxy) -> Callable[[str], Any]:
    """A proxy and the SSHSIG-Key field with which keys["ed25519"] is named in that manner."""

    def start(naming: str) -> Tuple[Proxy, Optional[str]]:
        line = keys.line("ed25519")
        pin = ["--pubkey", line] if naming == "pinned" else []
        proxy = start_proxy(*pin, upstream=agent.sock)
        return proxy, {"by its line": line, "by its fingerprint": fingerprint(line)}.get(naming)

    return start


@pytest.mark.parametrize("naming", NAMING)
def test_an_empty_agent_is_told(named: Callable[[str], Any], naming: str) -> None:
    proxy, key = named(naming)
    answer = sign(proxy, key)
    assert (answer.status, answer.text) == (503, LISTS_NONE + "\n")


@pytest.mark.parametrize("naming", NAMING)
def test_a_locked_agent_signs_once_it_is_unlocked(
    named: Callable[[str], Any], agent: Agent, keys: Keys, naming: str
) -> None:
    agent.add(keys["ed25519"])
    proxy, key = named(naming)
    agent.lock()
    answer = sign(proxy, key)
    assert (answer.status, answer.text) == (503, LISTS_NONE + "\n")
    agent.unlock()
    assert is_by(sign(proxy, key), keys, "ed25519")


@pytest.mark.parametrize("naming", NAMING)
def test_the_key_that_is_meant_signs(
    named: Callable[[str], Any], agent: Agent, keys: Keys, naming: str
) -> None:
    if naming != "not at all":
        agent.add(keys["other"])
    agent.add(keys["ed25519"])
    proxy, key = named(naming)
    assert is_by(sign(proxy, key), keys, "ed25519")


@pytest.mark.parametrize("naming", ["by its line", "by its fingerprint"])
def test_a_named_key_that_the_agent_does_not_hold_is_not_found(
    named: Callable[[str], Any], agent: Agent, keys: Keys, naming: str
) -> None:
    agent.add(keys["other"])
    proxy, key = named(naming)
    answer = sign(proxy, key)
    assert answer.status == 404
    assert fingerprint(keys.line("ed25519")) in answer.text
    field = {"SSHSIG-Key": key}
    assert http(proxy.port, "GET", "/publickey", headers=field).status == 404


def test_a_pinned_key_that_the_agent_does_not_hold_is_unavailable(
    named: Callable[[str], Any], agent: Agent, keys: Keys
) -> None:
    agent.add(keys["other"])
    proxy, _ = named("pinned")
    for answer in (sign(proxy), http(proxy.port, "GET", "/publickey")):
        assert answer.status == 503
        assert fingerprint(keys.line("ed25519")) in answer.text
    agent.add(keys["ed25519"])
    assert is_by(sign(proxy), keys, "ed25519")


def test_another_key_than_the_pinned_one_is_refused(
    named: Callable[[str], Any], agent: Agent, keys: Keys
) -> None:
    agent.add(keys["ed25519"])
    agent.add(keys["other"])
    proxy, _ = named("pinned")
    for line in (keys.line("other"), fingerprint(keys.line("other"))):
        answer = sign(proxy, line)
        assert answer.status == 403
        assert "SSH_AGENT_PROXY_PUBKEY" in answer.text
    for line in (keys.line("ed25519"), fingerprint(keys.line("ed25519"))):
        assert is_by(sign(proxy, line), keys, "ed25519")


@pytest.mark.parametrize("as_option", [True, False], ids=["option", "variable"])
def test_a_key_file_is_read_again_when_it_changes(
    agent: Agent, keys: Keys, start_proxy: StartProxy, home: Path, as_option: bool
) -> None:
    agent.add(keys["ed25519"])
    agent.add(keys["other"])
    pin = home / "pin.pub"
    pin.write_text(f"# the one that signs\n\n{keys.line('other')}\n")
    args = ["--pubkey-file", pin] if as_option else []
    env = {} if as_option else {"SSH_AGENT_PROXY_PUBKEY_FILE": "~/pin.pub"}
    proxy = start_proxy(*args, upstream=agent.sock, env=env)
    assert is_by(sign(proxy), keys, "other")
    pin.write_text(keys.line("ed25519") + "\n")
    assert is_by(sign(proxy), keys, "ed25519")


BROKEN = [
    ("empty", b""),
    ("two keys", b"%b%b"),
    ("no key", b"nothing of use\n"),
    ("half a key", b"%.40b"),
    ("no text", b"\xff\xfe\0\0"),
    ("huge", b"#" * 100000 + b"\n%b"),
]


@pytest.mark.parametrize("content", rows(BROKEN))
def test_a_key_file_that_breaks_later_is_unavailable_until_it_is_mended(
    agent: Agent, keys: Keys, start_proxy: StartProxy, home: Path, content: bytes
) -> None:
    agent.add(keys["ed25519"])
    line = keys.line("ed25519").encode() + b"\n"
    pin = home / "pin.pub"
    pin.write_bytes(line)
    proxy = start_proxy("--pubkey-file", pin, upstream=agent.sock)
    assert sign(proxy).status == 200
    pin.write_bytes(content % (content.count(b"%") * (line,)))
    for answer in (sign(proxy), http(proxy.port, "GET", "/publickey")):
        assert answer.status == 503
        assert str(pin) in answer.text
        assert "--pubkey-file" in answer.text
    pin.write_bytes(line)
    assert sign(proxy).status == 200


def test_a_key_file_that_vanishes_is_unavailable(
    agent: Agent, keys: Keys, start_proxy: StartProxy, home: Path
) -> None:
    agent.add(keys["ed25519"])
    pin = home / "pin.pub"
    pin.write_text(keys.line("ed25519"))
    proxy = start_proxy("--pubkey-file", pin, upstream=agent.sock)
    pin.unlink()
    answer = sign(proxy)
    assert answer.status == 503
    assert f"can't use '{pin}': No such file or directory" in answer.text


def test_a_key_file_that_becomes_a_fifo_holds_nobody_up(
    agent: Agent, keys: Keys, start_proxy: StartProxy, home: Path
) -> None:
    agent.add(keys["ed25519"])
    pin = home / "pin.pub"
    pin.write_text(keys.line("ed25519"))
    proxy = start_proxy("--pubkey-file", pin, upstream=agent.sock)
    pin.unlink()
    os.mkfifo(pin)
    answer = sign(proxy)
    assert answer.status == 503
    assert "not a regular file" in answer.text


def test_a_pinned_line_makes_the_key_file_count_for_nothing(
    agent: Agent, keys: Keys, start_proxy: StartProxy
) -> None:
    agent.add(keys["other"])
    agent.add(keys["ed25519"])
    env = {
        "SSH_AGENT_PROXY_PUBKEY": keys.line("ed25519"),
        "SSH_AGENT_PROXY_PUBKEY_FILE": "/nowhere/pin.pub",
    }
    assert is_by(sign(start_proxy(upstream=agent.sock, env=env)), keys, "ed25519")


def test_a_stopped_agent_is_too_late_and_signs_once_it_goes_on(
    agent: Agent, keys: Keys, start_proxy: StartProxy
) -> None:
    agent.add(keys["ed25519"])
    proxy = start_proxy("--timeout", "1", upstream=agent.sock)
    assert sign(proxy).status == 200
    agent.process.send_signal(signal.SIGSTOP)
    before = time.monotonic()
    answer = sign(proxy)
    assert answer.status == 504
    assert "did not answer in time" in answer.text
    assert 0.9 < time.monotonic() - before < 5
    agent.process.send_signal(signal.SIGCONT)
    assert sign(proxy).status == 200


def test_an_agent_killed_and_started_again_at_its_path_signs(
    proxy: Proxy, agent: Agent, keys: Keys
) -> None:
    agent.process.kill()
    agent.process.wait(10)
    answer = sign(proxy)
    assert answer.status == 503
    assert f"no answer from the agent at '{agent.sock}': nobody listens" in answer.text
    agent.sock.unlink()
    answer = sign(proxy)
    assert answer.status == 503
    assert "no such socket" in answer.text
    agent.start()
    assert sign(proxy).status == 503
    agent.add(keys["ed25519"])
    assert sign(proxy).status == 200


def test_an_agent_that_is_no_socket_is_told(start_proxy: StartProxy, short: Path) -> None:
    path = short / "file"
    path.touch()
    answer = sign(start_proxy(upstream=path))
    assert answer.status == 503
    assert "that is no socket" in answer.text


def test_an_agent_at_a_path_that_is_too_long_is_unavailable(
    start_proxy: StartProxy, short: Path
) -> None:
    answer = sign(start_proxy(upstream=short / ("x" * 200)))
    assert answer.status == 503
    assert "too long" in answer.text


class AskingAgent(Agent):
    """One that asks a person for each signature with a key of `ssh-add -c`."""

    def start(self) -> None:
        self.askpass = self.sock.with_name("askpass")
        self.says("exit 1")
        self.process = subprocess.Popen(
            ["ssh-agent", "-D", "-a", str(self.sock)],
            stdout=subprocess.DEVNULL,
            env={
                "PATH": os.environ["PATH"],
                "SSH_ASKPASS": str(self.askpass),
                "SSH_ASKPASS_REQUIRE": "force",
                "DISPLAY": ":none",
            },
        )
        self.pid = self.process.pid
        wait_for(lambda: accepts(self.sock), message="ssh-agent")

    def says(self, shell: str) -> None:
        self.askpass.write_text(f"#!/bin/sh\n{shell}\n")
        self.askpass.chmod(0o755)


@pytest.mark.parametrize("naming", NAMING)
def test_a_person_who_says_no_to_the_agent_refuses(
    short: Path, keys: Keys, start_proxy: StartProxy, naming: str
) -> None:
    agent = AskingAgent(short / "asking")
    try:
        agent.add(keys["ed25519"], "-c")
        line = keys.line("ed25519")
        pin = ["--pubkey", line] if naming == "pinned" else []
        key = {"by its line": line, "by its fingerprint": fingerprint(line)}.get(naming)
        proxy = start_proxy(*pin, upstream=agent.sock)
        answer = sign(proxy, key)
        assert answer.status == 403
        assert "refused to sign" in answer.text
        agent.says("exit 0")
        assert is_by(sign(proxy, key), keys, "ed25519")
    finally:
        agent.stop()


def test_several_keys_are_warned_about_at_the_start(
    agent: Agent, keys: Keys, start_proxy: StartProxy
) -> None:
    agent.add(keys["ed25519"])
    agent.add(keys["other"])
    proxy = start_proxy(upstream=agent.sock)
    proxy.wait_log(r"WARNING .*2 keys.*SSH_AGENT_PROXY_PUBKEY")


@pytest.mark.parametrize("pinned", [False, True])
def test_nothing_is_warned_about_where_the_key_is_certain(
    agent: Agent, keys: Keys, start_proxy: StartProxy, pinned: bool
) -> None:
    agent.add(keys["ed25519"])
    if pinned:
        agent.add(keys["other"])
    pin = ["--pubkey", keys.line("ed25519")] if pinned else []
    proxy = start_proxy(*pin, upstream=agent.sock)
    proxy.wait_log(re.escape(fingerprint(keys.line("ed25519"))))
    assert sign(proxy).status == 200
    assert "keys" not in proxy.log()


def test_two_agents_one_after_the_other_are_both_asked_anew(
    start_agent: StartAgent, keys: Keys, start_proxy: StartProxy, short: Path
) -> None:
    """The path is looked at by every request: what stands there may be a link that moves."""
    first, second, link = start_agent(), start_agent(), short / "link"
    first.add(keys["ed25519"])
    second.add(keys["other"])
    link.symlink_to(first.sock)
    proxy = start_proxy(upstream=link)
    assert is_by(sign(proxy), keys, "ed25519")
    link.unlink()
    link.symlink_to(second.sock)
    assert is_by(sign(proxy), keys, "other")


# ---------------------------------------------------------------- gpg-agent

PINENTRY = """#!/bin/sh
echo OK
while read -r word rest; do
    case $word in
    GETPIN) echo 'D passphrase'; echo OK ;;
    BYE) echo OK; exit ;;
    *) echo OK ;;
    esac
done
"""


@pytest.fixture
def gpg_agent(short: Path) -> Iterator[Path]:
    """The SSH socket of a real gpg-agent of its own, which holds nothing yet."""
    program = need("gpg-agent", "gpg-agent")
    folder, pinentry = short / "g", short / "pinentry"
    folder.mkdir(mode=0o700)
    pinentry.write_text(PINENTRY)
    pinentry.chmod(0o755)
    (folder / "gpg-agent.conf").write_text(
        "enable-ssh-support\n"
        f"pinentry-program {pinentry}\n"
        "s2k-count 65536\n"  # how often a passphrase is hashed: by default a second of it
    )
    subprocess.run(
        [program, "--homedir", str(folder), "--daemon"],
        env=clean_env(short, GNUPGHOME=folder),
        stdout=subprocess.DEVNULL,  # it stays open in the background
        stderr=subprocess.DEVNULL,
        timeout=60,
        check=True,
    )
    # Its sockets are in the folder, for that is not the usual one.
    sock, control = folder / "S.gpg-agent.ssh", folder / "S.gpg-agent"
    try:
        wait_for(lambda: accepts(sock), message="gpg-agent's SSH socket")
        yield sock
    finally:
        # It runs in the background under a number that only it knows.
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(10)
            s.connect(str(control))
            s.sendall(b"KILLAGENT\n")
            while s.recv(4096):
                pass
        wait_for(lambda: not control.exists(), message="gpg-agent's end")


@pytest.mark.parametrize("name", ["ed25519", "rsa2048", "rsa3072", "ecdsa256"])
def test_gpg_agent_signs(
    gpg_agent: Path, keys: Keys, start_proxy: StartProxy, tmp_path: Path, name: str
) -> None:
    env = {"PATH": os.environ["PATH"]}
    run(["ssh-add", "-q", keys[name]], env=dict(env, SSH_AUTH_SOCK=str(gpg_agent)))
    proxy = start_proxy(upstream=gpg_agent)
    for key in (None, keys.line(name), fingerprint(keys.line(name))):
        answer = sign(proxy, key)
        assert is_by(answer, keys, name)
        if name != "ecdsa256":
            # By the same agent: one RSA signature in 256 it gives without a leading zero.
            public = keys[name].with_suffix(".pub")
            sign_it = ["ssh-keygen", "-Y", "sign", "-f", public, "-n", "git"]
            by_agent = dict(env, SSH_AUTH_SOCK=str(gpg_agent))
            assert answer.body == run(sign_it, by_agent, input=b"payload").stdout
        block = tmp_path / "block"
        block.write_bytes(answer.body)
        verify = ["ssh-keygen", "-Y", "check-novalidate", "-n", "git", "-s", block]
        run(verify, env, input=b"payload")


def test_gpg_agent_without_keys_is_told(gpg_agent: Path, start_proxy: StartProxy) -> None:
    answer = sign(start_proxy(upstream=gpg_agent))
    assert (answer.status, answer.text) == (503, LISTS_NONE + "\n")


def test_gpg_agent_that_does_not_hold_the_named_key_is_told(
    gpg_agent: Path, keys: Keys, start_proxy: StartProxy
) -> None:
    env = {"PATH": os.environ["PATH"], "SSH_AUTH_SOCK": str(gpg_agent)}
    run(["ssh-add", "-q", keys["other"]], env=env)
    assert sign(start_proxy(upstream=gpg_agent), keys.line("ed25519")).status == 404


# ---------------------------------------------------------------- commands

RELAY = """
import os, select, socket, sys
agent = socket.socket(socket.AF_UNIX)
agent.connect(sys.argv[1])
while True:
    for ready in select.select([0, agent], [], [])[0]:
        data = os.read(0, 65536) if ready == 0 else agent.recv(65536)
        if not data:
            sys.exit()
        if ready == 0:
            agent.sendall(data)
        else:
            os.write(1, data)
"""

# What each script of a test begins with: it leaves its own number in a file.
NOTES_ITSELF = """
import os, signal, subprocess, sys, time
open(sys.argv[1], 'a').write('%d\\n' % os.getpid())
"""


class Command:
    """A script that stands in for an agent's relay, and the processes that it starts."""

    def __init__(self, folder: Path, text: str, *args: Any) -> None:
        self.script, self.pids = folder / "command.py", folder / "pids"
        self.script.write_text(NOTES_ITSELF + text)
        self.pids.touch()
        self.upstream = "exec:" + shlex.join(
            [sys.executable, str(self.script), str(self.pids), *map(str, args)]
        )

    def started(self) -> List[int]:
        return [int(word) for word in self.pids.read_text().split()]

    def left(self, proxy: Proxy) -> List[int]:
        """Those that still run, and those that the proxy has not waited for."""
        return [pid for pid in self.started() if not self.gone(pid, proxy)]

    def gone(self, pid: int, proxy: Proxy) -> bool:
        try:
            os.kill(pid, 0)
            # A grandchild that has ended is for PID 1 to wait for, which in containers waits for
            # nobody.
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        except (ProcessLookupError, FileNotFoundError):
            return True
        return state == "Z" and int(parent) != proxy.pid

    def kill(self) -> None:
        for pid in self.started():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def command(short: Path) -> Iterator[Callable[..., Command]]:
    made: List[Command] = []

    def make(text: str, *args: Any) -> Command:
        made.append(Command(short, text, *args))
        return made[-1]

    yield make
    for one in made:
        one.kill()  # where the proxy did not, the test has said so


def test_a_command_relays_to_the_agent(
    agent: Agent, keys: Keys, start_proxy: StartProxy, command: Callable[..., Command]
) -> None:
    agent.add(keys["ed25519"])
    relay = command(RELAY.replace("sys.argv[1]", "sys.argv[2]"), agent.sock)
    proxy = start_proxy(upstream=relay.upstream)
    proxy.wait_log("signing with")  # the look at the start is over
    for key in (None, keys.line("ed25519"), fingerprint(keys.line("ed25519"))):
        before = len(relay.started())
        assert is_by(sign(proxy, key), keys, "ed25519")
        assert len(relay.started()) == before + 1  # one process for each exchange
    assert http(proxy.port, "GET", "/publickey").text.strip() == keys.line("ed25519")
    assert sign(proxy, keys.line("other")).status == 404
    wait_for(lambda: not relay.left(proxy))


QUOTED = [
    ("a blank in single quotes", "{python} '{folder}/a b.py' {sock}", "a b.py"),
    ("a blank in double quotes", '{python} "{folder}/a b.py" "{sock}"', "a b.py"),
    ("a blank behind a backslash", "{python} {folder}/a\\ b.py {sock}", "a b.py"),
    ("a quote in quotes", "{python} \"{folder}/it's.py\" {sock}", "it's.py"),
    ("what only a shell would act on", "{python} '{folder}/$(x);*.py' {sock}", "$(x);*.py"),
    ("blanks around", "  {python}   {folder}/c.py  {sock} ", "c.py"),
    ("the home in the program's path", "~/python {folder}/c.py {sock}", "c.py"),
    ("systemd's home in the program's path", "%h/python {folder}/c.py {sock}", "c.py"),
    ("a variable in the program's path", "$HOME/python {folder}/c.py {sock}", "c.py"),
]


@pytest.mark.parametrize("form, name", rows(QUOTED))
def test_a_command_is_split_as_a_shell_would(
    agent: Agent, keys: Keys, start_proxy: StartProxy, short: Path, home: Path, form: str, name: str
) -> None:
    agent.add(keys["ed25519"])
    (short / name).write_text(RELAY)
    (home / "python").symlink_to(sys.executable)
    upstream = "exec:" + form.format(python=sys.executable, folder=short, sock=agent.sock)
    assert is_by(sign(start_proxy(upstream=upstream)), keys, "ed25519")


CANNOT_RUN = [
    ("missing", "/nowhere/relay", "No such file or directory"),
    ("not on the path", "no-such-program-anywhere", "No such file or directory"),
    ("a directory", "/", "Permission denied"),
    ("no program", str(PROXY.with_name("LICENSE")), "Permission denied"),
]


@pytest.mark.parametrize("word, reason", rows(CANNOT_RUN))
def test_a_command_that_cannot_be_run_is_unavailable(
    start_proxy: StartProxy, word: str, reason: str
) -> None:
    proxy = start_proxy(upstream=f"exec:{word} some arguments")
    answer = sign(proxy)
    assert answer.status == 503
    assert word in answer.text
    assert reason in answer.text
    proxy.wait_log(r"WARNING .*" + re.escape(word))


STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
CHILD = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], {})"
FAMILY = f"""
for _ in range(2):
    open(sys.argv[1], 'a').write('%d\\n' % {CHILD.format("")}.pid)
"""
FLOOD = """
os.set_blocking(2, True)
while True:
    os.write(2, b'flood\\n' * 1000)
"""
FLOODS = """
for _ in range(4):
    if os.fork() == 0:
        open(sys.argv[1], 'a').write('%d\\n' % os.getpid())
        break
""" + FLOOD
READ_ALL = """
while os.read(0, 65536):
    pass
"""

TROUBLE = [
    ("exits at once", "sys.exit(3)", 503, "hung up without an answer"),
    ("is killed", "os.kill(os.getpid(), signal.SIGKILL)", 503, "hung up without an answer"),
    ("reads and exits", "os.read(0, 65536)", 503, "hung up without an answer"),
    ("exits within the length", "os.write(1, b'\\0\\0')", 502, "in the middle"),
    ("exits within the answer", "os.write(1, b'\\0\\0\\0\\5\\x0c\\0')", 502, "in the middle"),
    ("answers as a shell does", "print('sh: 1: npiperelay: not found')", 502, "announced"),
    ("hangs", "time.sleep(1000)", 504, "did not answer in time"),
    ("hangs with children", FAMILY + "time.sleep(1000)", 504, "did not answer in time"),
    ("exits at once, its children hang", FAMILY, 504, "did not answer in time"),
    ("ignores SIGTERM", STUBBORN + "time.sleep(1000)", 504, "did not answer in time"),
    ("ignores SIGTERM with children", STUBBORN + FAMILY + "time.sleep(1000)", 504, "in time"),
    ("reads and never answers", READ_ALL, 504, "did not answer in time"),
    ("floods stderr", FLOOD, 504, "did not answer in time"),
    ("floods stderr and ignores SIGTERM", STUBBORN + FLOOD, 504, "did not answer in time"),
    ("floods stderr with children, all ignore SIGTERM", STUBBORN + FLOODS, 504, "in time"),
    ("closes stderr and hangs", "os.close(2)\ntime.sleep(1000)", 504, "did not answer in time"),
]  # fmt: skip


@pytest.mark.parametrize("text, status, words", rows(TROUBLE))
def test_a_command_in_trouble_is_told_and_ended(
    start_proxy: StartProxy,
    command: Callable[..., Command],
    text: str,
    status: int,
    words: str,
) -> None:
    one = command(text)
    proxy = start_proxy("--timeout", "1", upstream=one.upstream)
    wait_for(one.started, message="the look at the agent at the start")
    answer = sign(proxy, seconds=10)
    assert answer.status == status
    assert words in answer.text
    wait_for(lambda: len(one.started()) >= 2 and not one.left(proxy), 5, "their end")
    assert proxy.log().count("flood") <= 2 * 30  # the look at the start, and the request
    assert http(proxy.port, "GET", "/healthz").status == 200


def test_a_command_s_last_words_are_in_the_log_escaped(
    start_proxy: StartProxy, command: Callable[..., Command]
) -> None:
    words = b"cannot reach \x1b[31mthe agent\x1b[0m \xff\xe2\x80\xae\r\nsecond\0line"
    proxy = start_proxy(upstream=command(f"os.write(2, {words!r})\nsys.exit(1)").upstream)
    assert sign(proxy).status == 503
    proxy.wait_log(r"cannot reach \\x1b\[31mthe agent\\x1b\[0m \\xff\\u202e$")
    proxy.wait_log(r"second\\x00line$")
    assert all(line.isprintable() for line in proxy.log().splitlines())


def test_a_command_that_ignores_sigterm_may_answer_first(
    agent: Agent, keys: Keys, start_proxy: StartProxy, command: Callable[..., Command]
) -> None:
    agent.add(keys["ed25519"])
    relay = RELAY.replace("sys.argv[1]", "sys.argv[2]").replace("sys.exit()", "time.sleep(1000)")
    one = command(STUBBORN + relay, agent.sock)
    proxy = start_proxy(upstream=one.upstream)
    assert is_by(sign(proxy, seconds=10), keys, "ed25519")
    wait_for(lambda: not one.left(proxy), 5, "the command's end")


def test_a_grandchild_that_left_the_group_holds_no_answer_up(
    agent: Agent, keys: Keys, start_proxy: StartProxy, command: Callable[..., Command]
) -> None:
    agent.add(keys["ed25519"])
    daemon = FAMILY.replace("range(2)", "range(1)").replace(", )", ", start_new_session=True)")
    one = command(daemon + RELAY.replace("sys.argv[1]", "sys.argv[2]"), agent.sock)
    proxy = start_proxy(upstream=one.upstream)
    assert is_by(sign(proxy, seconds=10), keys, "ed25519")


@pytest.mark.parametrize("with_stderr", [False, True], ids=["silent", "flooding"])
def test_a_client_that_goes_away_takes_its_command_with_it(
    start_proxy: StartProxy, command: Callable[..., Command], with_stderr: bool
) -> None:
    one = command(FAMILY + (FLOOD if with_stderr else "time.sleep(1000)"))
    # The look at the start ends with its own request, so that only one is left to look at.
    proxy = start_proxy("--timeout", "30", upstream=one.upstream)
    wait_for(lambda: len(one.started()) == 3, message="the look at the agent at the start")
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(POST)
        wait_for(lambda: len(one.started()) == 6, message="the command")
    mine = one.started()[3:]
    wait_for(lambda: not set(mine) & set(one.left(proxy)), 2, "the command's end")


def test_a_command_of_the_look_at_the_start_does_not_outlive_the_proxy(
    start_proxy: StartProxy, command: Callable[..., Command]
) -> None:
    one = command(FAMILY + "time.sleep(1000)")
    proxy = start_proxy(upstream=one.upstream)
    wait_for(lambda: len(one.started()) == 3, message="the look at the agent at the start")
    assert proxy.stop() == 0
    wait_for(lambda: not one.left(proxy), 5, "the command's end")


def test_a_command_of_a_request_does_not_outlive_the_proxy(
    start_proxy: StartProxy, command: Callable[..., Command]
) -> None:
    one = command(FAMILY + "time.sleep(1000)")
    proxy = start_proxy(upstream=one.upstream)
    wait_for(lambda: len(one.started()) == 3, message="the look at the agent at the start")
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(POST)
        wait_for(lambda: len(one.started()) == 6, message="the command")
        proxy.process.send_signal(signal.SIGTERM)
        proxy.wait_log("stopping")
        assert proxy.stop() == 0  # at the second signal, at once
    mine = one.started()[3:]
    wait_for(lambda: not set(mine) & set(one.left(proxy)), 5, "the command's end")


def test_failing_commands_cost_no_file_descriptor(start_proxy: StartProxy, few_files: str) -> None:
    proxy = start_proxy(upstream="exec:false", python=few_files)
    missing = start_proxy(upstream="exec:/nowhere/relay", python=few_files)
    for _ in range(2 * FEW):
        assert "No such file" in sign(missing).text
    for _ in range(FEW):
        assert "hung up without an answer" in sign(proxy).text


# ---------------------------------------------------------------- discovery

WELL_KNOWN = [
    "{home}/.1password/agent.sock",
    "{runtime}/yubikey-agent/yubikey-agent.sock",
    "{runtime}/ssh-agent.socket",
    "{runtime}/gcr/ssh",
    "{runtime}/keyring/ssh",
    "{runtime}/gnupg/S.gpg-agent.ssh",
    "{home}/.gnupg/S.gpg-agent.ssh",
]

linux_places = pytest.mark.skipif(sys.platform != "linux", reason="the places of Linux")


@pytest.fixture
def places(short: Path, home: Path) -> List[Path]:
    """Where agents may stand, in the order of looking, with the folders made."""
    found = [Path(p.format(home=home, runtime=short / "run")) for p in WELL_KNOWN]
    for place in found:
        place.parent.mkdir(parents=True, exist_ok=True)
    return found


@pytest.fixture
def runtime(short: Path) -> Dict[str, str]:
    return {"XDG_RUNTIME_DIR": str(short / "run")}


def in_use(place: Path) -> str:
    return "using the agent at " + re.escape(repr(str(place)))


def test_the_places_of_linux_are_looked_at_in_their_order() -> None:
    assert list(sap.well_known_sockets("linux", "/h", "/r")) == [
        place.format(home="/h", runtime="/r") for place in WELL_KNOWN
    ]


def test_the_places_of_linux_without_a_runtime_directory_are_those_of_the_home() -> None:
    assert list(sap.well_known_sockets("linux", "/h", "")) == [
        "/h/.1password/agent.sock",
        "/h/.gnupg/S.gpg-agent.ssh",
    ]


def test_the_places_of_macos_begin_with_1password_and_secretive() -> None:
    places = sap.well_known_sockets("darwin", "/h", "")
    assert places[0].startswith("/h/Library/Group Containers/2BUA8C4S2C.com.1password/")
    assert any("Secretive" in place for place in places)
    assert any("yubikey-agent" in place for place in places)
    assert places[-1] == "/h/.gnupg/S.gpg-agent.ssh"


def test_no_place_is_looked_at_on_windows() -> None:
    assert sap.well_known_sockets("win32", "C:/h", "") == ()


@linux_places
def test_the_first_agent_that_answers_is_used_and_each_change_logged(
    places: List[Path], runtime: Dict[str, str], start_agent: StartAgent, keys: Keys,
    start_proxy: StartProxy,
) -> None:  # fmt: skip
    agents = [start_agent(place) for place in places]
    for agent in agents:
        agent.add(keys["ed25519"])
    proxy = start_proxy(env=runtime)
    for agent in agents:
        assert sign(proxy).status == 200
        proxy.wait_log(in_use(agent.sock))
        agent.process.kill()  # its socket stays behind, and nobody listens on it
        agent.process.wait(10)
        assert agent.sock.exists()
    answer = sign(proxy)
    assert answer.status == 503
    for place in places:
        assert str(place) in answer.text
    used = re.findall("using the agent at '([^']+)'", proxy.log())
    assert used == [str(place) for place in places]


@linux_places
def test_an_agent_started_later_is_found(
    places: List[Path], runtime: Dict[str, str], start_agent: StartAgent, keys: Keys,
    start_proxy: StartProxy,
) -> None:  # fmt: skip
    proxy = start_proxy(env=runtime)
    answer = sign(proxy)
    assert answer.status == 503
    assert "SSH_AGENT_PROXY_UPSTREAM" in answer.text
    assert str(places[2]) in answer.text
    proxy.wait_log("WARNING .*no agent found")
    late = start_agent(places[2])
    late.add(keys["ed25519"])
    assert is_by(sign(proxy), keys, "ed25519")
    proxy.wait_log(in_use(places[2]))
    # and one that comes before it in the order, from then on
    first = start_agent(places[0])
    first.add(keys["other"])
    assert is_by(sign(proxy), keys, "other")
    proxy.wait_log(in_use(places[0]))


@linux_places
def test_the_agent_in_use_is_named_once_not_at_each_request(
    places: List[Path], runtime: Dict[str, str], start_agent: StartAgent, keys: Keys,
    start_proxy: StartProxy,
) -> None:  # fmt: skip
    start_agent(places[3]).add(keys["ed25519"])
    proxy = start_proxy(env=runtime)
    for _ in range(5):
        assert sign(proxy).status == 200
    assert len(re.findall("using the agent", proxy.log())) == 1


@linux_places
def test_a_dead_ssh_auth_sock_is_not_passed_over(
    places: List[Path], runtime: Dict[str, str], start_agent: StartAgent, keys: Keys,
    start_proxy: StartProxy, short: Path,
) -> None:  # fmt: skip
    start_agent(places[0]).add(keys["ed25519"])
    env = dict(runtime, SSH_AUTH_SOCK=str(short / "dead"))
    answer = sign(start_proxy(env=env))
    assert answer.status == 503
    assert f"no answer from the agent at '{short / 'dead'}'" in answer.text


@linux_places
def test_an_empty_ssh_auth_sock_variable_counts_as_unset(
    places: List[Path], runtime: Dict[str, str], start_agent: StartAgent, keys: Keys,
    start_proxy: StartProxy,
) -> None:  # fmt: skip
    start_agent(places[0]).add(keys["ed25519"])
    env = dict(runtime, SSH_AUTH_SOCK="", SSH_AGENT_PROXY_UPSTREAM="")
    assert sign(start_proxy(env=env)).status == 200


def test_ssh_auth_sock_is_used_before_any_known_place(
    places: List[Path], runtime: Dict[str, str], start_agent: StartAgent, keys: Keys,
    start_proxy: StartProxy,
) -> None:  # fmt: skip
    start_agent(places[0]).add(keys["other"])
    mine = start_agent()
    mine.add(keys["ed25519"])
    env = dict(runtime, SSH_AUTH_SOCK=str(mine.sock))
    proxy = start_proxy(env=env)
    assert is_by(sign(proxy), keys, "ed25519")
    proxy.wait_log(in_use(mine.sock))


def test_the_setting_is_used_before_ssh_auth_sock(
    agent: Agent, start_agent: StartAgent, keys: Keys, start_proxy: StartProxy
) -> None:
    agent.add(keys["other"])
    mine = start_agent()
    mine.add(keys["ed25519"])
    env = {"SSH_AUTH_SOCK": str(agent.sock), "SSH_AGENT_PROXY_UPSTREAM": str(mine.sock)}
    assert is_by(sign(start_proxy(env=env)), keys, "ed25519")


@linux_places
@pytest.mark.parametrize("state", ["dead", "empty", "locked"])
@pytest.mark.parametrize("setting", ["SSH_AUTH_SOCK", "SSH_AGENT_PROXY_UPSTREAM"])
def test_another_agent_that_has_keys_is_hinted_at(
    places: List[Path], runtime: Dict[str, str], start_agent: StartAgent, keys: Keys,
    start_proxy: StartProxy, state: str, setting: str,
) -> None:  # fmt: skip
    mine, other = start_agent(), start_agent(places[4])
    other.add(keys["ed25519"])
    if state == "dead":
        mine.stop()
    if state == "locked":
        mine.add(keys["other"])
        mine.lock()
    proxy = start_proxy(env={**runtime, setting: str(mine.sock)})
    hint = f"SSH_AGENT_PROXY_UPSTREAM={places[4]}"
    for answer in (
        sign(proxy),
        sign(proxy, keys.line("other")),
        http(proxy.port, "GET", "/publickey"),
    ):
        assert answer.status == 503
        assert hint in answer.text
    proxy.wait_log("WARNING .*" + re.escape(hint))


@linux_places
def test_the_first_place_that_is_empty_is_used_and_a_later_one_hinted_at(
    places: List[Path], runtime: Dict[str, str], start_agent: StartAgent, keys: Keys,
    start_proxy: StartProxy,
) -> None:  # fmt: skip
    start_agent(places[1])
    start_agent(places[5]).add(keys["ed25519"])
    answer = sign(start_proxy(env=runtime))
    assert answer.status == 503
    assert LISTS_NONE in answer.text
    assert f"SSH_AGENT_PROXY_UPSTREAM={places[5]}" in answer.text


@linux_places
def test_no_agent_is_hinted_at_that_has_no_keys_or_is_the_one_in_use(
    places: List[Path], runtime: Dict[str, str], start_agent: StartAgent, start_proxy: StartProxy
) -> None:
    mine = start_agent()
    start_agent(places[0])
    places[1].symlink_to(mine.sock)
    answer = sign(start_proxy(upstream=mine.sock, env=runtime))
    assert (answer.status, answer.text) == (503, LISTS_NONE + "\n")


@linux_places
def test_an_agent_that_hangs_is_no_hint_and_holds_the_answer_up_only_briefly(
    places: List[Path], runtime: Dict[str, str], start_agent: StartAgent, keys: Keys,
    start_proxy: StartProxy,
) -> None:  # fmt: skip
    mine, other = start_agent(), start_agent(places[0])
    other.add(keys["ed25519"])
    proxy = start_proxy(upstream=mine.sock, env=runtime)
    other.process.send_signal(signal.SIGSTOP)
    answer = sign(proxy, seconds=5)
    assert (answer.status, answer.text) == (503, LISTS_NONE + "\n")


FORMS = [
    ("a path", "{home}/a", {}),
    ("unix:", "unix:{home}/a", {}),
    ("the home", "~/a", {}),
    ("unix: and the home", "unix:~/a", {}),
    ("systemd's home", "%h/a", {}),
    ("unix: and systemd's home", "unix:%h/a", {}),
    ("a variable", "$PLACE/a", {"PLACE": "{home}"}),
    ("a variable in braces", "${PLACE}/a", {"PLACE": "{home}"}),
    ("two variables", "$ONE/${TWO}", {"ONE": "{home}", "TWO": "a"}),
    ("a variable behind unix:", "unix:$PLACE/a", {"PLACE": "{home}"}),
    ("a variable in the middle", "{home}${SLASH}a", {"SLASH": "/"}),
    ("a percent sign in the middle", "{home}/a%h", {}),
    ("a blank", "{home}/a b", {}),
]


@pytest.mark.parametrize("form, env", rows(FORMS))
def test_a_path_is_expanded(
    agent: Agent, keys: Keys, start_proxy: StartProxy, home: Path, form: str, env: Dict[str, str]
) -> None:
    agent.add(keys["ed25519"])
    for name in ("a", "a%h", "a b"):
        (home / name).symlink_to(agent.sock)
    env = {name: value.replace("{home}", str(home)) for name, value in env.items()}
    env["SSH_AGENT_PROXY_UPSTREAM"] = form.replace("{home}", str(home))
    assert is_by(sign(start_proxy(env=env)), keys, "ed25519")


def test_an_option_s_path_is_expanded_too(
    agent: Agent, keys: Keys, start_proxy: StartProxy, home: Path
) -> None:
    agent.add(keys["ed25519"])
    (home / "a").symlink_to(agent.sock)
    proxy = start_proxy(upstream="~/$NAME", env={"NAME": "a"})
    assert is_by(sign(proxy), keys, "ed25519")


NO_PLACES = [
    ("a variable that is not set", "$NOWHERE/a", "NOWHERE"),
    ("a variable in braces that is not set", "/a/${NOWHERE}", "NOWHERE"),
    ("a variable of a command that is not set", "exec:$NOWHERE/relay", "NOWHERE"),
    ("a relative path", "a/b", "'a/b'"),
    ("a relative path behind unix:", "unix:a/b", "a/b"),
    ("unix: alone", "unix:", "unix:"),
    ("exec: alone", "exec:", "exec:"),
    ("exec: and blanks", "exec:  ", "exec:"),
    ("a quote that is not closed", "exec:relay 'a", "quotation"),
]


@pytest.mark.parametrize("value, words", rows(NO_PLACES))
def test_an_upstream_that_cannot_be_is_a_wrong_setting(
    start_proxy: StartProxy, value: str, words: str
) -> None:
    proxy = start_proxy(env={"SSH_AGENT_PROXY_UPSTREAM": value}, wait=False)
    assert proxy.process.wait(10) == 2
    proxy.stop()
    (line,) = proxy.log().splitlines()
    assert "SSH_AGENT_PROXY_UPSTREAM: " in line
    assert words in line


# ---------------------------------------------------------------- an agent that lies


def s(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def read_request(connection: socket.socket) -> bytes:
    """One message without its length, and not a byte of the next; b"" at the end."""
    size = connection.recv(4, socket.MSG_WAITALL)
    if len(size) < 4:
        return b""
    return connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)


def listing(*entries: Tuple[bytes, bytes]) -> bytes:
    return b"\x0c" + struct.pack(">I", len(entries)) + b"".join(s(k) + s(c) for k, c in entries)


def response(signature: bytes) -> bytes:
    return b"\x0e" + s(signature)


FAILURE = message(b"\5")
SIG64 = bytes(range(1, 65))
TAIL = b"\1\0\0\0\x2a"
SKED, SKEC = b"sk-ssh-ed25519@openssh.com", b"sk-ecdsa-sha2-nistp256@openssh.com"
P256 = b"ecdsa-sha2-nistp256"
ED_CERT = b"ssh-ed25519-cert-v01@openssh.com"

ED = s(b"ssh-ed25519") + s(bytes(range(32)))
ED2 = s(b"ssh-ed25519") + s(bytes(range(1, 33)))
RSA = s(b"ssh-rsa") + s(b"\1\0\1") + s(b"\0\x80" + b"\1" * 255)
EC = s(P256) + s(b"nistp256") + s(b"\4" + bytes(64))
SK_ED = s(SKED) + s(bytes(32)) + s(b"ssh:")
SK_EC = s(SKEC) + s(b"nistp256") + s(b"\4" + bytes(64)) + s(b"ssh:")
CERT = (
    s(ED_CERT) + s(b"nonce") + ED[len(s(b"ssh-ed25519")) :] + bytes(8) + b"\0\0\0\1" + s(b"id")
    + s(b"") + bytes(8) + b"\xff" * 8 + s(b"") + s(b"") + s(b"") + s(ED) + s(b"signature")
)  # fmt: skip
UNKNOWN = s(b"ssh-xmss@openssh.com") + s(b"key")
R, S = s(b"\5"), s(b"\7")

LIST = message(listing((ED, b"comment")))
SIG = message(response(s(b"ssh-ed25519") + s(SIG64)))


class Step(NamedTuple):
    """What the agent does once it has read a request, or at once."""

    act: Callable[[socket.socket], Any]
    reads: bool = True


class HangUp(Exception):
    """The agent closes the connection."""


def send(data: bytes) -> Step:
    return Step(lambda c: c.sendall(data))


def cut(data: bytes, reads: bool = True) -> Step:
    def act(c: socket.socket) -> None:
        c.sendall(data)
        raise HangUp

    return Step(act, reads)


def stall(data: bytes = b"", reads: bool = True) -> Step:
    """Sends no more than DATA, and waits for the proxy to lose patience."""
    return Step(lambda c: (c.sendall(data), read_request(c)), reads)


def drip(data: bytes) -> Step:
    def act(c: socket.socket) -> None:
        for one in data:
            c.sendall(bytes([one]))
            time.sleep(0.05)

    return Step(act)


def after(seconds: float, data: bytes) -> Step:
    return Step(lambda c: (time.sleep(seconds), c.sendall(data)))


def by(key: bytes, signature: bytes) -> List[Step]:
    """It lists that key alone, and answers with that signature."""
    return [send(message(listing((key, b"comment")))), send(message(response(signature)))]


class Liar:
    """A scripted agent whose behaviour each test sets, and a proxy in front of it."""

    def __init__(self, folder: Path, timeout: str) -> None:
        path = folder / "liar"
        self.steps: List[Step] = []
        self.closed: List[bool] = []  # for each connection: has the proxy closed it?
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(64)
        threading.Thread(target=self.serve, daemon=True).start()
        argv = [sys.executable, str(PROXY), "--addr", "127.0.0.1:0", "--upstream", str(path)]
        self.steps = HONEST
        self.proxy = Proxy([*argv, "--timeout", timeout], clean_env(folder))
        # Later connections are the tests' own.
        self.proxy.wait_log("signing with")
        wait_for(lambda: self.closed == [True])

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.one, args=(connection,), daemon=True).start()

    def one(self, connection: socket.socket) -> None:
        number = len(self.closed)
        self.closed.append(False)
        with connection:
            connection.settimeout(30)
            try:
                for step in self.steps:
                    if step.reads and not read_request(connection):
                        break
                    step.act(connection)
                while connection.recv(65536):
                    pass
            except (HangUp, ConnectionError):
                pass
            except socket.timeout:
                return
        self.closed[number] = True

    def ask(self, steps: List[Step], key: Optional[bytes] = None) -> Answer:
        """What a request comes to when the agent behaves like that."""
        self.steps, self.closed = steps, []
        line = f"{key[4:].partition(bytes(1))[0].decode()} " if key else ""
        named = line + base64.b64encode(key).decode() if key else None
        answer = sign(self.proxy, named, 20)
        wait_for(lambda: self.closed and all(self.closed), 5, "the agent's connection is closed")
        return answer

    def stop(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        assert self.proxy.stop() == 0
        assert "Traceback" not in self.proxy.log()
        assert "internal error" not in self.proxy.log()
        assert all(line.isprintable() for line in self.proxy.log().splitlines())


HONEST = [send(LIST), send(SIG)]


def liar_fixture(timeout: str) -> Iterator[Liar]:
    folder = Path(tempfile.mkdtemp(prefix="sap.", dir="/tmp"))
    try:
        made = Liar(folder, timeout)
        yield made
        made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def liar() -> Iterator[Liar]:
    yield from liar_fixture("20")


@pytest.fixture(scope="module")
def staller() -> Iterator[Liar]:
    yield from liar_fixture("1")


# What stands in a lie's place where the truth is told: each answers 200.
TRUTHS = [
    ("Ed25519", HONEST),
    ("RSA", by(RSA, s(b"rsa-sha2-512") + s(b"\1" * 256))),
    ("ECDSA", by(EC, s(P256) + s(R + S))),
    ("sk Ed25519", by(SK_ED, s(SKED) + s(SIG64) + TAIL)),
    ("sk ECDSA", by(SK_EC, s(SKEC) + s(R + S) + TAIL)),
    ("a certificate", by(CERT, s(b"ssh-ed25519") + s(SIG64))),
    ("a list of 256 KiB", [send(message(listing((ED, b"c" * (262144 - 5 - 8 - len(ED)))))),
                           send(SIG)]),
    ("a byte at a time", [Step(lambda c: [c.sendall(bytes([b])) for b in LIST]), send(SIG)]),
    ("in two pieces", [Step(lambda c: (c.sendall(LIST[:3]), c.sendall(LIST[3:]))), send(SIG)]),
    ("a list before it is asked for", [Step(lambda c: c.sendall(LIST), reads=False),
                                       send(b""), send(SIG)]),
]  # fmt: skip


@pytest.mark.parametrize("steps", rows(TRUTHS))
def test_a_scripted_agent_that_tells_the_truth_is_believed(liar: Liar, steps: List[Step]) -> None:
    answer = liar.ask(steps)
    assert answer.status == 200, answer.text


def known(name: str, steps: List[Step], status: int, words: str) -> Tuple[Any, ...]:
    """The request names the key ED, so that the first message asks for the signature."""
    return name, steps, status, words, ED


UNREACHABLE, MIDDLE, WRONG = "hung up without an answer", "in the middle", "agent's signature"
ANNOUNCED, LEFT, MISSING = "announced", "left over", "bytes expected"
LOCKED, USELESS = LISTS_NONE, "none of a type"

LIES = [
    # the message
    ("announces 0 bytes", [send(bytes(4))], 502, ANNOUNCED),
    ("announces 256 KiB and 1", [send(struct.pack(">I", 262145))], 502, ANNOUNCED),
    ("announces 2 GiB", [send(b"\x80\0\0\0")], 502, ANNOUNCED),
    ("announces 4 GiB", [send(b"\xff\xff\xff\xff")], 502, ANNOUNCED),
    ("announces 4 GiB and sends a lot", [send(b"\xff" * 100000)], 502, ANNOUNCED),
    ("sends text", [send(b"SSH-2.0-OpenSSH_9.2p1\r\n")], 502, ANNOUNCED),
    ("sends HTTP", [send(b"HTTP/1.1 400 Bad Request\r\n\r\n")], 502, ANNOUNCED),
    ("sends a byte behind the message", [send(LIST + b"\0")], 502, "1 bytes more"),
    ("answers both requests at once", [send(LIST + SIG)], 502, "bytes more"),
    ("answers twice", [send(LIST + LIST)], 502, "bytes more"),
    ("closes at once", [cut(b"", reads=False)], 503, UNREACHABLE),
    ("closes once asked", [cut(b"")], 503, UNREACHABLE),
    ("closes within the length", [cut(b"\0\0\0")], 502, MIDDLE),
    ("closes behind the length", [cut(LIST[:4])], 502, MIDDLE),
    ("closes within the list", [cut(LIST[:20])], 502, MIDDLE),
    ("closes before the list's last byte", [cut(LIST[:-1])], 502, MIDDLE),
    ("closes behind the list", [cut(LIST)], 503, UNREACHABLE),
    ("lists unasked, then closes", [cut(LIST, reads=False)], 503, UNREACHABLE),
    ("closes when asked to sign", [send(LIST), cut(b"")], 503, UNREACHABLE),
    ("closes within the signature's length", [send(LIST), cut(SIG[:1])], 502, MIDDLE),
    ("closes within the signature", [send(LIST), cut(SIG[:-1])], 502, MIDDLE),
    # the list
    ("refuses to list", [send(FAILURE)], 503, LOCKED),
    ("refuses with a byte more", [send(message(b"\5\0"))], 502, "message type 5"),
    ("lists nothing", [send(message(listing()))], 503, LISTS_NONE),
    ("says success", [send(message(b"\6"))], 502, "message type 6"),
    ("fails as to an extension", [send(message(b"\x1c"))], 502, "message type 28"),
    ("signs instead", [send(SIG)], 502, "message type 14"),
    ("repeats the request", [send(message(b"\x0b"))], 502, "message type 11"),
    ("lists in a type of its own", [send(message(b"\xff" + LIST[5:]))], 502, "message type 255"),
    ("lists 2^32-1 keys", [send(message(b"\x0c\xff\xff\xff\xff"))], 502, MISSING),
    ("lists 2^32-1 keys and two", [send(message(b"\x0c\xff\xff\xff\xff" + LIST[9:] + LIST[9:]))],
     502, MISSING),
    ("lists more than it counts", [send(message(listing() + s(ED) + s(b"")))], 502, LEFT),
    ("lists fewer than it counts", [send(message(b"\x0c\0\0\0\2" + LIST[9:]))], 502, MISSING),
    ("has no count", [send(message(b"\x0c"))], 502, MISSING),
    ("has half a count", [send(message(b"\x0c\0\0"))], 502, MISSING),
    ("a byte behind the list", [send(message(LIST[4:] + b"\0"))], 502, LEFT),
    ("a key of 2^32-1 bytes", [send(message(b"\x0c\0\0\0\1\xff\xff\xff\xff" + ED))], 502, MISSING),
    ("a key without a comment", [send(message(b"\x0c\0\0\0\1" + s(ED)))], 502, MISSING),
    ("a comment of 2^32-1 bytes", [send(message(b"\x0c\0\0\0\1" + s(ED) + b"\xff" * 8))], 502,
     MISSING),
    ("lists only keys of no use", [send(message(listing((UNKNOWN, b"x"), (b"", b""))))], 503,
     USELESS),
    ("lists only damaged keys", [send(message(listing((ED[:-1], b""), (ED + b"\0", b""))))], 503,
     USELESS),
    ("lists 30000 empty keys", [send(message(listing(*(30000 * [(b"", b"")]))))], 503, USELESS),
    # the signature
    ("refuses to sign", [send(LIST), send(FAILURE)], 403, "refused to sign"),
    ("refuses with a byte more to sign", [send(LIST), send(message(b"\5\5"))], 502, "type 5"),
    ("lists instead", [send(LIST), send(LIST)], 502, "message type 12"),
    ("signs with success", [send(LIST), send(message(b"\6"))], 502, "message type 6"),
    ("announces 0 bytes of signature", [send(LIST), send(bytes(4))], 502, ANNOUNCED),
    ("announces 4 GiB of signature", [send(LIST), send(b"\xff" * 8)], 502, ANNOUNCED),
    ("signs and more", [send(LIST), send(SIG + b"\0")], 502, "1 bytes more"),
    ("a byte behind the signature", [send(LIST), send(message(SIG[4:] + b"\0"))], 502, LEFT),
    ("a signature of 2^32-1 bytes", [send(LIST), send(message(b"\x0e\xff\xff\xff\xff" + SIG64))],
     502, MISSING),
    ("an empty signature", by(ED, b""), 502, WRONG),
    ("no algorithm", by(ED, s(b"") + s(SIG64)), 502, WRONG),
    ("an algorithm that is no text", by(ED, s(b"\x1b[2J\n\xff") + s(SIG64)), 502, "x1b[2J"),
    ("a signature without its blob", by(ED, s(b"ssh-ed25519")), 502, MISSING),
    ("a signature of 63 bytes", by(ED, s(b"ssh-ed25519") + s(SIG64[1:])), 502, "63 bytes"),
    ("a signature of 65 bytes", by(ED, s(b"ssh-ed25519") + s(SIG64 + b"\0")), 502, "65 bytes"),
    ("a signature of no bytes", by(ED, s(b"ssh-ed25519") + s(b"")), 502, "0 bytes"),
    ("flags and counter from a plain key", by(ED, s(b"ssh-ed25519") + s(SIG64) + TAIL), 502, LEFT),
    ("the signature of another type", by(ED, s(b"rsa-sha2-512") + s(b"\1" * 256)), 502, WRONG),
    ("the signature of an sk key", by(ED, s(SKED) + s(SIG64) + TAIL), 502, WRONG),
    ("a certificate's type for algorithm", by(CERT, s(ED_CERT) + s(SIG64)), 502, WRONG),
    ("RSA with SHA-1", by(RSA, s(b"ssh-rsa") + s(b"\1" * 256)), 502, "'ssh-rsa'"),
    ("RSA with SHA-256", by(RSA, s(b"rsa-sha2-256") + s(b"\1" * 256)), 502, "'rsa-sha2-256'"),
    ("RSA with a byte more", by(RSA, s(b"rsa-sha2-512") + s(b"\1" * 257)), 502, "257 bytes"),
    ("RSA of no bytes", by(RSA, s(b"rsa-sha2-512") + s(b"")), 502, "0 bytes"),
    ("ECDSA of another curve", by(EC, s(b"ecdsa-sha2-nistp384") + s(R + S)), 502, WRONG),
    ("ECDSA with r = 0", by(EC, s(P256) + s(s(b"") + S)), 502, "not positive"),
    ("ECDSA with s = 0", by(EC, s(P256) + s(R + s(b""))), 502, "not positive"),
    ("ECDSA with r < 0", by(EC, s(P256) + s(s(b"\xff") + S)), 502, "not positive"),
    ("ECDSA with s padded", by(EC, s(P256) + s(R + s(b"\0\7"))), 502, "leading zero"),
    ("ECDSA with r too large", by(EC, s(P256) + s(s(b"\1" + bytes(32)) + S)), 502, "too large"),
    ("ECDSA without s", by(EC, s(P256) + s(R)), 502, MISSING),
    ("ECDSA with a third number", by(EC, s(P256) + s(R + S + S)), 502, LEFT),
    ("ECDSA as DER", by(EC, s(P256) + s(bytes.fromhex("3006020105020107"))), 502, MISSING),
    ("sk Ed25519 without flags", by(SK_ED, s(SKED) + s(SIG64)), 502, MISSING),
    ("sk Ed25519 without a counter", by(SK_ED, s(SKED) + s(SIG64) + b"\1"), 502, MISSING),
    ("sk Ed25519 with a byte more", by(SK_ED, s(SKED) + s(SIG64) + TAIL + b"\0"), 502, LEFT),
    ("sk Ed25519 as a plain one", by(SK_ED, s(b"ssh-ed25519") + s(SIG64)), 502, WRONG),
    ("sk ECDSA without flags", by(SK_EC, s(SKEC) + s(R + S)), 502, MISSING),
    ("sk ECDSA as a plain one", by(SK_EC, s(P256) + s(R + S)), 502, WRONG),
    ("sk ECDSA of a browser", by(SK_EC, s(b"webauthn-" + SKEC) + s(R + S) + TAIL), 502, WRONG),
    # a known key, asked for straight away
    known("refuses, and holds the key", [send(FAILURE), send(LIST)], 403, "refused to sign"),
    known("refuses, and holds another", [send(FAILURE), send(message(listing((ED2, b""))))], 404,
          "does not hold"),
    known("refuses everything", [send(FAILURE), send(FAILURE)], 503, LOCKED),
    known("refuses, and lists nothing", [send(FAILURE), send(message(listing()))], 503,
          LISTS_NONE),
    known("refuses, then closes", [send(FAILURE), cut(b"")], 503, UNREACHABLE),
    known("refuses, then closes in the middle", [send(FAILURE), cut(b"\0")], 502, MIDDLE),
    known("refuses, then lists wrongly", [send(FAILURE), send(message(b"\x0c"))], 502, MISSING),
    known("refuses and lists at once", [send(FAILURE + LIST)], 502, "bytes more"),
    known("lists when asked to sign", [send(LIST)], 502, "message type 12"),
]  # fmt: skip


@pytest.mark.parametrize("steps, status, words, key", rows([(*row, None)[:5] for row in LIES]))
def test_a_lie_is_told_and_hurts_nobody(
    liar: Liar, steps: List[Step], status: int, words: str, key: Optional[bytes]
) -> None:
    answer = liar.ask(steps, key)
    assert (answer.status, words in answer.text) == (status, True), answer.text
    assert answer.text[:-1].isprintable()
    assert answer.text.endswith("\n")
    assert liar.ask(HONEST).status == 200


@pytest.mark.parametrize(
    "steps, key",
    rows([
        ("when asked for a list", [stall()], None),
        ("within the length", [stall(LIST[:2])], None),
        ("behind the length", [stall(LIST[:4])], None),
        ("before the last byte", [stall(LIST[:-1])], None),
        ("without reading", [stall(b"", reads=False)], None),
        ("when asked to sign", [send(LIST), stall()], None),
        ("within the signature", [send(LIST), stall(SIG[:-1])], None),
        ("when asked to sign with a known key", [stall()], ED),
        ("when asked for a list after a refusal", [send(FAILURE), stall()], ED),
        ("by dripping", [drip(LIST)], None),
        ("by dripping the signature of a known key", [drip(SIG)], ED),
        ("by 0.7 of the time for each message", [after(0.7, LIST), after(0.7, SIG)], None),
    ]),
)  # fmt: skip
def test_a_stall_is_too_late_and_hurts_nobody(
    staller: Liar, steps: List[Step], key: Optional[bytes]
) -> None:
    before = time.monotonic()
    answer = staller.ask(steps, key)
    assert answer.status == 504
    assert "did not answer in time" in answer.text
    assert 0.9 < time.monotonic() - before < 5
    assert staller.ask(HONEST).status == 200


def test_an_agent_that_accepts_nobody_any_more_is_too_late(
    start_proxy: StartProxy, short: Path
) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(short / "full"))
        listener.listen(0)
        proxy = start_proxy("--timeout", "1", upstream=short / "full")
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(short / "full"))
        before = time.monotonic()
        assert sign(proxy).status == 504
        assert 0.9 < time.monotonic() - before < 5


def test_a_good_key_among_garbage_is_taken(liar: Liar) -> None:
    garbage = [(UNKNOWN, b"x"), (b"", b""), (ED[:-1], b""), (b"\xff" * 50, b"\xff")]
    answer = liar.ask([send(message(listing(*garbage, (ED2, b"good"), *garbage))), send(SIG)])
    assert signer(answer) == ED2


def test_a_key_listed_twice_is_one(liar: Liar) -> None:
    twice = send(message(listing((ED, b"one"), (ED2, b"other"), (ED, b"two"))))
    assert signer(liar.ask([twice, send(SIG)])) == ED


def test_a_fingerprint_names_the_first_listed_key_that_has_it(liar: Liar) -> None:
    liar.steps = [send(message(listing((ED2, b""), (CERT, b"one"), (ED, b"two")))), send(SIG)]
    print_ = sap.parse_public_key(ED).fingerprint
    assert signer(sign(liar.proxy, print_)) == CERT


def test_a_known_key_is_asked_for_without_a_listing(liar: Liar) -> None:
    assert signer(liar.ask([send(SIG)], ED)) == ED


def test_what_is_asked_for_is_the_specification_s(
    start_proxy: StartProxy, scripted_agent: ScriptedAgent
) -> None:
    requests: List[bytes] = []

    def keep(connection: socket.socket) -> None:
        for reply in (message(listing((RSA, b""))), FAILURE):
            requests.append(read_request(connection))
            connection.sendall(reply)
        read_request(connection)

    path = scripted_agent(keep)
    assert sign(start_proxy(upstream=path)).status == 403
    (request,) = [r for r in requests if r[:1] == b"\x0d"]
    with sap.Reader(request, "request") as r:
        assert (r.take(1), r.string()) == (b"\x0d", RSA)
        assert r.string().startswith(b"SSHSIG" + s(b"git") + s(b"") + s(b"sha512"))
        assert r.uint32() == 4  # SSH_AGENT_RSA_SHA2_512


COMMENTS = [
    ("plain", b"me@here", "me@here"),
    ("none", b"", ""),
    ("of several words", b"me at home", "me at home"),
    ("beyond ASCII", "hüben".encode(), "hüben"),
    ("with a line break", b"a\nssh-ed25519 AAAA evil", r"a\nssh-ed25519 AAAA evil"),
    ("with a carriage return", b"a\rb", r"a\rb"),
    ("with a header's end", b"a\r\n\r\nHTTP/1.1", r"a\r\n\r\nHTTP/1.1"),
    ("with an escape sequence", b"\x1b[2J", r"\x1b[2J"),
    ("with a NUL", b"a\0b", r"a\x00b"),
    ("that is no UTF-8", b"a\xff\xfe", r"a\xff\xfe"),
    ("with a control character of Unicode", "a\x85b".encode(), r"a\x85b"),
    ("with a line separator", "a\u2028b".encode(), r"a\u2028b"),
    ("that turns the text around", "a\u202eb".encode(), r"a\u202eb"),
    ("with no width", "a\u200bb".encode(), r"a\u200bb"),
]


@pytest.mark.parametrize("comment, shown", rows(COMMENTS))
def test_a_key_s_comment_is_shown_as_one_printable_line(
    liar: Liar, comment: bytes, shown: str
) -> None:
    liar.steps = [send(message(listing((ED, comment))))]
    answer = http(liar.proxy.port, "GET", "/publickey")
    line = f"ssh-ed25519 {base64.b64encode(ED).decode()} {shown}".rstrip()
    assert (answer.status, answer.text) == (200, line + "\n")


def test_a_comment_of_100_kib_is_no_trouble(liar: Liar) -> None:
    liar.steps = [send(message(listing((ED, b"\n" * 100000))))]
    answer = http(liar.proxy.port, "GET", "/publickey")
    assert answer.status == 200
    assert len(answer.text.splitlines()) == 1


# ---------------------------------------------------------------- what a lie must not cost

FEW = 60


@pytest.fixture
def few_files(short: Path) -> str:
    """A Python that can open only a few files at once: one leaked by each request shows soon."""
    path = short / "python"
    path.write_text(f'#!/bin/sh\nulimit -n {FEW}\nexec {shlex.quote(sys.executable)} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_no_lie_costs_a_file_descriptor(
    start_proxy: StartProxy, scripted_agent: ScriptedAgent, few_files: str
) -> None:
    steps: List[Step] = []

    def behave(connection: socket.socket) -> None:
        with contextlib.suppress(HangUp):
            for step in list(steps):
                if step.reads and not read_request(connection):
                    return
                step.act(connection)
            read_request(connection)

    proxy = start_proxy(upstream=scripted_agent(behave), python=few_files)
    names = (
        "announces 4 GiB", "closes at once", "closes within the list", "refuses to list",
        "sends a byte behind the message", "refuses to sign", "an empty signature",
    )  # fmt: skip
    for steps[:], status in [(row[1], row[2]) for row in LIES if row[0] in names]:
        for _ in range(FEW):
            assert sign(proxy).status == status
    steps[:] = HONEST
    assert sign(proxy).status == 200


def peak(pid: int) -> int:
    """The most memory that the process ever had resident, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)
    assert found
    return int(found.group(1))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("name", ["announces 2 GiB", "announces 4 GiB", "lists 2^32-1 keys"])
def test_an_announced_length_takes_no_memory(liar: Liar, name: str) -> None:
    assert liar.ask(HONEST).status == 200
    before = peak(liar.proxy.pid)
    (steps,) = [row[1] for row in LIES if row[0] == name]
    for _ in range(20):
        assert liar.ask(steps).status == 502
    assert peak(liar.proxy.pid) - before < 4096


# ---------------------------------------------------------------- clients that go, and that wait

POST = b"POST /sign HTTP/1.1\r\nHost: localhost\r\nContent-Length: 7\r\n\r\npayload"
CHUNKED = (
    b"POST /sign HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3\r\npay\r\n4\r\nload\r\n0\r\n\r\n"
)
GET = b"GET /publickey HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Waiting:
    """An agent that answers in no hurry: each connection in its stages, and what the proxy did."""

    def __init__(self, replies: Sequence[bytes] = ()) -> None:
        self.replies = replies
        self.asked = threading.Semaphore(0)
        self.closed = threading.Semaphore(0)
        self.go_on = threading.Event()

    def __call__(self, connection: socket.socket) -> None:
        for reply in self.replies:
            if not read_request(connection):
                return
            connection.sendall(reply)
        if read_request(connection):
            self.asked.release()
            while connection.recv(65536):
                pass
            self.closed.release()


def close(client: socket.socket) -> None:
    client.close()


def close_sending_side(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.fixture
def waiting(start_proxy: StartProxy, scripted_agent: ScriptedAgent) -> Callable[..., Any]:
    """An agent that waits after those replies, and a proxy whose look at the start is over."""

    def start(replies: Sequence[bytes] = ()) -> Tuple[Waiting, Proxy]:
        agent = Waiting([LIST])
        proxy = start_proxy(upstream=scripted_agent(lambda c: agent(c)))
        proxy.wait_log("signing with")
        agent.replies = replies
        return agent, proxy

    return start


@pytest.mark.parametrize("leave", [close, close_sending_side, reset])
@pytest.mark.parametrize(
    "request_",
    rows([("Content-Length", POST), ("chunked", CHUNKED), ("GET", GET)]),
)
def test_a_client_that_goes_away_takes_its_agent_connection_with_it(
    waiting: Callable[..., Any], request_: bytes, leave: Callable[[socket.socket], None]
) -> None:
    agent, proxy = waiting()
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(request_)
        assert agent.asked.acquire(timeout=10)
        leave(client)
        assert agent.closed.acquire(timeout=1)
    proxy.wait_log("outcome=gone")


@pytest.mark.parametrize("leave", [close, close_sending_side, reset])
def test_a_client_that_goes_away_between_list_and_signature_is_noticed(
    waiting: Callable[..., Any], leave: Callable[[socket.socket], None]
) -> None:
    agent, proxy = waiting([LIST])
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(POST)
        assert agent.asked.acquire(timeout=10)
        leave(client)
        assert agent.closed.acquire(timeout=1)
    proxy.wait_log("outcome=gone")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system can't show it")
@pytest.mark.parametrize("leave", [close, close_sending_side, reset])
def test_bytes_that_nobody_reads_hide_no_client_that_goes_away(
    waiting: Callable[..., Any], leave: Callable[[socket.socket], None]
) -> None:
    agent, proxy = waiting()
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(POST)
        assert agent.asked.acquire(timeout=10)
        client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        leave(client)
        assert agent.closed.acquire(timeout=1)


def test_a_client_that_goes_away_while_the_agent_accepts_nobody_is_noticed(
    start_proxy: StartProxy, short: Path
) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(short / "full"))
        listener.listen(0)
        proxy = start_proxy(upstream=short / "full")
        with contextlib.suppress(BlockingIOError):
            while True:
                waits = stack.enter_context(socket.socket(socket.AF_UNIX))
                waits.setblocking(False)
                waits.connect(str(short / "full"))
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.sendall(POST)
        proxy.wait_log("outcome=gone", 2)


def test_a_client_that_waits_is_not_taken_for_gone(
    start_proxy: StartProxy, scripted_agent: ScriptedAgent
) -> None:
    def slow(connection: socket.socket) -> None:
        for reply in (LIST, SIG):
            read_request(connection)
            time.sleep(0.4)  # the agent's own time, as with a touch
            connection.sendall(reply)

    assert sign(start_proxy(upstream=scripted_agent(slow))).status == 200


def test_bytes_behind_the_request_are_no_sign_that_the_client_went_away(
    start_proxy: StartProxy, scripted_agent: ScriptedAgent
) -> None:
    asked, sent = threading.Event(), threading.Event()

    def slow(connection: socket.socket) -> None:
        for reply in (LIST, SIG):
            if read_request(connection)[:1] == b"\x0d":
                asked.set()
                assert sent.wait(10)
                time.sleep(0.2)  # the agent's own time: the proxy sees the bytes while it waits
            connection.sendall(reply)

    proxy = start_proxy(upstream=scripted_agent(slow))
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.settimeout(10)
        client.sendall(POST)
        assert asked.wait(10)
        client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        sent.set()
        assert client.recv(12) == b"HTTP/1.1 200"


def test_a_request_at_a_hanging_agent_holds_up_no_other(
    start_proxy: StartProxy, scripted_agent: ScriptedAgent
) -> None:
    hang, release = threading.Event(), threading.Event()
    hanging = threading.Semaphore(0)

    def sometimes(connection: socket.socket) -> None:
        read_request(connection)
        if hang.is_set():
            hanging.release()
            assert release.wait(30)
        connection.sendall(LIST)
        if read_request(connection):
            connection.sendall(SIG)

    proxy = start_proxy(upstream=scripted_agent(sometimes))
    proxy.wait_log("signing with")
    hang.set()
    answers: List[Answer] = []
    patient = [threading.Thread(target=lambda: answers.append(sign(proxy))) for _ in range(20)]
    for thread in patient:
        thread.start()
    for _ in patient:
        assert hanging.acquire(timeout=10)
    hang.clear()
    for _ in range(5):
        assert sign(proxy, seconds=5).status == 200
        assert http(proxy.port, "GET", "/healthz", seconds=5).status == 200
        assert http(proxy.port, "GET", "/publickey", seconds=5).status == 200
    assert answers == []
    release.set()
    for thread in patient:
        thread.join(10)
    assert [answer.status for answer in answers] == [200] * len(patient)


def test_an_agent_that_hangs_at_the_start_holds_up_neither_requests_nor_the_end(
    start_proxy: StartProxy, scripted_agent: ScriptedAgent
) -> None:
    asked = threading.Event()

    def hang(connection: socket.socket) -> None:
        read_request(connection)
        asked.set()
        read_request(connection)

    proxy = start_proxy(upstream=scripted_agent(hang))
    assert asked.wait(10)
    assert http(proxy.port, "GET", "/healthz", seconds=5).status == 200
    proxy.process.send_signal(signal.SIGTERM)
    assert proxy.process.wait(5) == 0
