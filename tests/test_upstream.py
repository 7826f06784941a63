"""How the agent is reached: real agents, commands, discovery; and an agent that lies and stalls.

Most of it happens in this process; what a client of the running proxy sees of it stands last.
"""

import base64
import contextlib
import hashlib
import logging
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Sequence, Set, Tuple, Union

import pytest
from conftest import (
    RELAY, Agent, Keys, Proxy, ScriptedAgent, StartAgent, StartProxy, clean_env, connect, get, http,
    listens, listing, message, need, post, post_chunked, read_message, rows, run, short_folder,
    wait_for, within,
)  # fmt: skip

import ssh_agent_proxy as sap


s = message  # a string of RFC 4251 looks like a message of the agent protocol
DIGEST = hashlib.sha512(b"payload").digest()
ANY = sap.Wanted()
LISTS_NONE = "the agent lists no keys (none added, or it is locked)"
TOO_LATE = "did not answer in time"


@pytest.fixture(autouse=True)
def nothing_is_waited_for_without_end() -> Iterator[None]:
    with within(60):
        yield


def sign(
        upstream: Union[Path, sap.Upstream, None], wanted: sap.Wanted = ANY, timeout: float = 20,
        places: Sequence[Path] = ()) -> Tuple[bytes, bytes]:  # fmt: skip
    """The key blob that signs and the armored signature, asked for as a request is."""
    if isinstance(upstream, Path):
        upstream = sap.Upstream(str(upstream))
    agents = sap.Agents(upstream, [str(place) for place in places], timeout)
    with agents.exchange() as exchange:
        key, block = sap.request_signature(exchange, wanted, "git", "sha512", DIGEST)
    return key.blob, block


def signer(*args: Any, **options: Any) -> bytes:
    return sign(*args, **options)[0]


def refusal(kind: type, *args: Any, **options: Any) -> str:
    """Why nothing was signed, which is one printable line."""
    with pytest.raises(kind) as e:
        sign(*args, **options)
    assert type(e.value) is kind
    assert str(e.value).isprintable()
    return str(e.value)


def blob(keys: Keys, name: str) -> bytes:
    return base64.b64decode(keys.line(name).split()[1])


def named(keys: Keys, naming: str, name: str = "ed25519") -> sap.Wanted:
    """That key, as a request or a setting may want it."""
    key = sap.parse_key_line(keys.line(name)).key
    return {
        "not at all": ANY,
        "by its line": sap.Wanted(key),
        "by its fingerprint": sap.Wanted(fingerprint=key.fingerprint),
        "pinned": sap.Wanted(key, pinned="--pubkey"),
    }[naming]


NAMING = ["not at all", "by its line", "by its fingerprint", "pinned"]

# ---------------------------------------------------------------- OpenSSH's agent


@pytest.mark.parametrize("naming", NAMING)
def test_what_the_agent_holds_counts_from_the_next_request(
        agent: Agent, keys: Keys, naming: str) -> None:  # fmt: skip
    wanted = named(keys, naming)
    assert refusal(sap.AgentError, agent.sock, wanted) == LISTS_NONE
    agent.add(keys["ed25519"])
    agent.add(keys["other"])
    assert signer(agent.sock, wanted) == blob(keys, "ed25519")
    agent.lock()
    assert refusal(sap.AgentError, agent.sock, wanted) == LISTS_NONE
    agent.unlock()
    agent.delete_all()
    agent.add(keys["other"])
    if naming == "not at all":
        assert signer(agent.sock, wanted) == blob(keys, "other")
    else:
        kind = sap.PinnedKeyMissing if naming == "pinned" else sap.KeyNotHeld
        told = refusal(kind, agent.sock, wanted)
        assert f"key {wanted.name}" in told and "does not hold it, but 1 other" in told


@pytest.mark.parametrize("name, why", rows([
    ("a dead one's", "dead", "nobody listens on that socket"),
    ("nothing", "missing", "no such socket"),
    ("a file", "file", "that is no socket"),
    ("a long path", 200 * "x", "too long"),
]))  # fmt: skip
def test_where_no_agent_can_be_the_cause_is_told(name: str, why: str, short: Path) -> None:
    (short / "file").touch()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short / "dead"))
    told = refusal(sap.AgentError, short / name)
    assert told.startswith(f"no answer from the agent at '{short}/{name[:20]}") and why in told


@pytest.mark.parametrize("naming", NAMING)
def test_a_person_who_says_no_to_the_agent_refuses(short: Path, keys: Keys, naming: str) -> None:
    askpass = short / "askpass"
    askpass.write_text("#!/bin/sh\nexit 1\n")
    askpass.chmod(0o755)
    always = {"SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":none"}
    agent = Agent(short / "asking", SSH_ASKPASS=str(askpass), **always)
    try:
        agent.add(keys["ed25519"], "-c")
        wanted = named(keys, naming)
        assert "refused to sign" in refusal(sap.AgentRefused, agent.sock, wanted)
        askpass.write_text("#!/bin/sh\n")
        assert signer(agent.sock, wanted) == blob(keys, "ed25519")
    finally:
        agent.stop()


# ---------------------------------------------------------------- gpg-agent

PINENTRY = """#!/bin/sh
echo OK
while read -r word rest; do
    [ "$word" != GETPIN ] || echo 'D passphrase'
    echo OK
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
    # (By default it hashes a passphrase for a second.)
    config = f"enable-ssh-support\npinentry-program {pinentry}\ns2k-count 65536\n"
    (folder / "gpg-agent.conf").write_text(config)
    agent = subprocess.Popen(
        [program, "--homedir", str(folder), "--daemon", "--no-detach"],
        env=clean_env(short, GNUPGHOME=folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    sock = folder / "S.gpg-agent.ssh"  # there, for that is not the usual folder
    try:
        wait_for(lambda: listens(sock), message="gpg-agent's SSH socket")
        yield sock
    finally:
        agent.terminate()
        agent.wait(10)


@pytest.mark.parametrize("name", ["ed25519", "rsa2048", "ecdsa256"])
def test_gpg_agent_signs(gpg_agent: Path, keys: Keys, tmp_path: Path, name: str) -> None:
    assert refusal(sap.AgentError, gpg_agent) == LISTS_NONE
    env = {"PATH": os.environ["PATH"], "SSH_AUTH_SOCK": str(gpg_agent)}
    run(["ssh-add", "-q", keys[name]], env=env)
    refusal(sap.KeyNotHeld, gpg_agent, named(keys, "by its line", "other"))
    for naming in NAMING:
        key, block = sign(gpg_agent, named(keys, naming, name))
        assert key == blob(keys, name)
        (tmp_path / "block").write_bytes(block)
        verify = ["-Y", "check-novalidate", "-n", "git", "-s", tmp_path / "block"]
        run(["ssh-keygen", *verify], input=b"payload")


# ---------------------------------------------------------------- commands

# What each script of a test begins with: it leaves its own number in a file.
NOTES_ITSELF = """
import os, signal, subprocess, sys, time
def note(pid): open({!r}, 'a').write('%d\\n' % pid)
note(os.getpid())
"""


class Command:
    """A script that stands in for an agent's relay, and the processes that it starts."""

    def __init__(self, folder: Path, text: str, *args: Any) -> None:
        self.script, self.pids = folder / "command.py", folder / "pids"
        self.script.write_text(NOTES_ITSELF.format(str(self.pids)) + text)
        self.pids.touch()
        words = (sys.executable, "-IS", self.script, *args)
        self.upstream = sap.Upstream(command=tuple(map(str, words)))
        self.setting = "exec:" + shlex.join(self.upstream.command)

    def started(self) -> List[int]:
        return [int(word) for word in self.pids.read_text().split()]

    def left(self) -> List[int]:
        """Those that still run, and those that nobody has waited for."""
        return [pid for pid in self.started() if not self.gone(pid)]

    def gone(self, pid: int) -> bool:
        try:
            # A grandchild that has ended is for PID 1 to wait for, which in containers waits for
            # nobody.
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        except (ProcessLookupError, FileNotFoundError):
            return True
        return state == "Z" and int(parent) == 1

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
        one.kill()  # where the program did not, the test has said so


STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
CHILD = "subprocess.Popen([sys.executable, '-IS', '-c', 'import time; time.sleep(1000)'], {})"
FAMILY = f"for _ in range(2): note({CHILD.format('')}.pid)\n"
DAEMON = f"note({CHILD.format('start_new_session=True')}.pid)\n"
HANG = "time.sleep(1000)"
FLOOD = """
os.set_blocking(2, True)
while True:
    os.write(2, b'flood\\n' * 1000)
"""
FLOODS = """
for _ in range(4):
    if os.fork() == 0:
        note(os.getpid())
        break
""" + FLOOD


@pytest.mark.parametrize("text", rows([
    ("alone", RELAY),
    ("ignoring SIGTERM", STUBBORN + RELAY.replace("break", HANG)),
    ("with a grandchild that left the group", DAEMON + RELAY),
]))  # fmt: skip
def test_a_command_relays_to_the_agent(
    agent_with_key: Agent, keys: Keys, command: Callable[..., Command], text: str
) -> None:
    relay = command(text, agent_with_key.sock)
    for naming in NAMING[:2]:
        before = len(relay.started())
        assert signer(relay.upstream, named(keys, naming)) == blob(keys, "ed25519")
        mine = relay.started()[before:]
        assert len(mine) == 1 + text.count("session")  # one process for each exchange
        assert relay.gone(mine[0])


@pytest.mark.parametrize("word, reason", rows([
    ("not on the path", "no-such-program-anywhere", "No such file or directory"),
    ("no program", sap.__file__.replace(sap.__name__ + ".py", "LICENSE"), "Permission denied"),
]))  # fmt: skip
def test_a_command_that_cannot_be_run_is_told(word: str, reason: str) -> None:
    told = refusal(sap.AgentError, sap.Upstream(command=(word, "some", "arguments")))
    assert told == f"cannot run the agent command '{word}': {reason}"


HUNG_UP = "hung up without an answer"

TROUBLE = [
    # name, script, error, its words; those that hang are given half a second
    ("exits with words", "time.sleep(0.1)\nos.write(2, b'no')\nsys.exit(1)", sap.AgentError,
     " ended with exit status 1 without an answer; its words are in the proxy's log"),
    ("hangs up, then ends", "os.close(0)\nos.close(1)\ntime.sleep(0.1)\nsys.exit(4)",
     sap.AgentError, " ended with exit status 4 without an answer"),
    ("hangs up, and goes on", "os.close(0)\nos.close(1)\n" + HANG, sap.AgentError, HUNG_UP),
    ("is killed", "os.kill(os.getpid(), signal.SIGKILL)", sap.AgentError,
     " was ended by signal 9 without an answer"),
    ("exits within the answer", "os.write(1, b'\\0\\0\\0\\5\\x0c\\0')", sap.WireError,
     " ended with exit status 0 in the middle of its answer"),
    ("answers as a shell does", "print('sh: 1: relay: not found')", sap.WireError, "announced"),
    ("hangs with children", FAMILY + HANG, sap.AgentTimeout, TOO_LATE),
    ("exits at once, its children hang", FAMILY, sap.AgentTimeout, TOO_LATE),
    ("floods stderr with children, all ignore SIGTERM", STUBBORN + FLOODS, sap.AgentTimeout,
     TOO_LATE),
    ("closes stderr and hangs", "os.close(2)\n" + HANG, sap.AgentTimeout, TOO_LATE),
]  # fmt: skip


@pytest.mark.parametrize("text, kind, words", rows(TROUBLE))
def test_a_command_in_trouble_is_told_and_ended(
        command: Callable[..., Command], caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch, text: str, kind: type, words: str) -> None:  # fmt: skip
    one = command(text)
    if " ended " in words:
        monkeypatch.setattr(sap, "EXEC_GRACE", 10)  # a busy machine is slow at ending it
    timeout = 0.5 if kind is sap.AgentTimeout else 20
    told = refusal(kind, one.upstream, timeout=timeout)
    assert told.startswith(f"the agent command '{sys.executable}' ") and words in told
    assert kind is sap.AgentTimeout or told.endswith(words) or "announced" in words
    assert one.started() or timeout < 1  # (on a busy machine it may not have come that far)
    wait_for(lambda: not one.left(), 5, "their end")
    assert len(caplog.records) <= sap.MAX_STDERR_LINES


def test_a_command_s_last_words_are_in_the_log_escaped(
        command: Callable[..., Command], caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    words = b"cannot reach \x1b[31mthe agent\x1b[0m \xff\xe2\x80\xae\r\nsecond\0line"
    caplog.set_level(logging.WARNING)
    refusal(sap.AgentError, command(f"os.write(2, {words!r})\nsys.exit(1)").upstream)
    who = f"agent command '{sys.executable}'"
    assert [record.getMessage() for record in caplog.records] == [
        who + r": cannot reach \x1b[31mthe agent\x1b[0m \xff\u202e",
        who + r": second\x00line",
    ]


def test_a_command_is_asked_to_end_before_it_is_killed(
    command: Callable[..., Command], short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has made it may take away."""
    monkeypatch.setattr(sap, "EXEC_GRACE", 10)
    note = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(open('{short}/note', 'w').close()))"
    one = command(f"{note}\nopen('{short}/ready', 'w').close()\n{HANG}")
    with sap.Agents(one.upstream, (), 20).exchange():
        wait_for((short / "ready").exists)
    assert (short / "note").exists()


def test_a_client_whose_network_failed_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reading says of it: here that it is not connected."""
    monkeypatch.delattr(sap.select, "POLLRDHUP")  # as elsewhere than on Linux
    with socket.socket() as client, pytest.raises(sap.ClientGone):
        sap.Watch("", 0, None).look_at(client)


@pytest.mark.parametrize("text", rows([("silent", FAMILY + HANG), ("flooding", FAMILY + FLOOD)]))
def test_a_client_that_goes_away_takes_its_command_with_it(
        command: Callable[..., Command], text: str) -> None:  # fmt: skip
    one = command(text)
    ours, theirs = socket.socketpair()
    agents = sap.Agents(one.upstream, (), 30)
    with ours, theirs:
        leaving = threading.Thread(
            target=lambda: (wait_for(lambda: len(one.started()) == 3), theirs.close())
        )
        leaving.start()
        with pytest.raises(sap.ClientGone), agents.exchange(ours) as exchange:
            sap.list_keys(exchange)
        leaving.join()
    wait_for(lambda: not one.left(), 5, "their end")


@pytest.mark.parametrize("while_", ["at the start", "a request waits"])
def test_no_command_outlives_the_proxy(
        start_proxy: StartProxy, command: Callable[..., Command], while_: str) -> None:  # fmt: skip
    one = command(FAMILY + HANG)
    proxy = start_proxy(upstream=one.setting)
    wait_for(lambda: len(one.started()) == 3, message="the look at the agent at the start")
    with connect(proxy.port) as client:
        if while_ == "a request waits":
            client.sendall(post(b"payload"))
            wait_for(lambda: len(one.started()) == 6, message="the command")
            proxy.process.send_signal(signal.SIGTERM)
            proxy.wait_log("stopping")
        assert proxy.stop() == 0  # at the second signal, at once
    wait_for(lambda: not one.left(), 5, "their end")


# ---------------------------------------------------------------- discovery


@pytest.fixture
def places(short: Path) -> List[Path]:
    """Where agents may stand, in the order of looking."""
    return [short / name for name in ("first", "second", "third")]


def test_the_places_that_are_looked_at_are_those_of_each_system() -> None:
    only_home = ("/h/.1password/agent.sock", "/h/.gnupg/S.gpg-agent.ssh")
    assert sap.well_known_sockets("linux", "/h", "") == only_home
    assert sap.well_known_sockets("linux", "/h", "/r") == (
        only_home[0],
        "/r/yubikey-agent/yubikey-agent.sock",
        "/r/ssh-agent.socket",
        "/r/gcr/ssh",
        "/r/keyring/ssh",
        "/r/gnupg/S.gpg-agent.ssh",
        only_home[1],
    )
    mac = sap.well_known_sockets("darwin", "/h", "")
    assert mac[0] == "/h/Library/Group Containers/2BUA8C4S2C.com.1password/t/agent.sock"
    assert mac[1] == only_home[0]
    assert mac[2] == "/h/Library/Containers/com.maxgoedjen.Secretive.SecretAgent/Data/socket.ssh"
    assert [place.rpartition("/")[2] for place in mac[3:5]] == ["yubikey-agent.sock"] * 2
    assert mac[5:] == only_home[1:]
    assert sap.well_known_sockets("win32", "C:/h", "") == ()


def test_the_first_agent_that_answers_is_used_and_each_change_logged_once(
    places: List[Path], start_agent: StartAgent, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    agents = sap.Agents(None, list(map(str, places)), 20)

    def used() -> str:
        with agents.exchange() as exchange:
            return sap.list_keys(exchange)[0].comment

    with pytest.raises(sap.AgentError) as e:
        used()
    tried = ", ".join(map(str, places))
    assert f"SSH_AGENT_PROXY_UPSTREAM (tried: SSH_AUTH_SOCK (unset), {tried})" in str(e.value)
    late = start_agent(places[1])
    late.add(keys["ed25519"])
    assert used() == used() == "ed25519@test"
    first = start_agent(places[0])  # from then on: it comes before the other in the order
    first.add(keys["other"])
    assert used() == "other@test"
    first.process.kill()  # its socket stays behind, and nobody listens on it
    first.process.wait(10)
    assert used() == "ed25519@test"
    assert [record.getMessage() for record in caplog.records] == [
        f"using the agent at '{places[number]}'" for number in (1, 0, 1)
    ]


def test_the_first_place_that_is_empty_is_used_and_a_later_one_hinted_at(
        places: List[Path], start_agent: StartAgent, keys: Keys) -> None:  # fmt: skip
    start_agent(places[0])
    later = start_agent(places[1])
    later.add(keys["ed25519"])
    later.add(keys["other"])
    told = refusal(sap.AgentError, None, places=places)
    assert told == f"{LISTS_NONE}; another has 2 keys: set SSH_AGENT_PROXY_UPSTREAM={places[1]}"


def test_no_agent_is_hinted_at_that_is_of_no_use(
        places: List[Path], start_agent: StartAgent, keys: Keys) -> None:  # fmt: skip
    """It has no keys, is the one in use, or hangs: that holds the answer up only briefly."""
    mine, hanging = start_agent(), start_agent(places[2])
    start_agent(places[0])
    places[1].symlink_to(mine.sock)
    hanging.add(keys["ed25519"])
    hanging.process.send_signal(signal.SIGSTOP)
    before = time.monotonic()
    assert refusal(sap.AgentError, mine.sock, places=places) == LISTS_NONE
    assert time.monotonic() - before < 10


def test_for_a_pinned_key_no_other_agent_is_hinted_at(
        places: List[Path], start_agent: StartAgent, keys: Keys) -> None:  # fmt: skip
    """It would be named for keys that are not the one."""
    mine, other = start_agent(), start_agent(places[0])
    for agent in (mine, other):
        agent.add(keys["other"])
    why = refusal(sap.PinnedKeyMissing, mine.sock, named(keys, "pinned"), places=places)
    assert why.endswith("but 1 other; add it there, or change --pubkey")


# ---------------------------------------------------------------- an agent that lies


def response(signature: bytes) -> bytes:
    return message(b"\x0e" + s(signature))


FAILURE = message(b"\5")
SIG64 = bytes(range(1, 65))
ED = s(b"ssh-ed25519") + s(bytes(range(32)))
ED2 = s(b"ssh-ed25519") + s(bytes(range(1, 33)))
RSA = s(b"ssh-rsa") + s(b"\1\0\1") + s(b"\0\x80" + b"\1" * 255)
UNKNOWN = s(b"ssh-xmss@openssh.com") + s(b"key")

LIST = listing((ED, b"comment"))
SIG = response(s(b"ssh-ed25519") + s(SIG64))


# What the agent does once it has read a request.
Step = Callable[[socket.socket], Any]


def send(data: bytes) -> Step:
    return lambda c: c.sendall(data)


def cut(data: bytes) -> Step:
    return lambda c: (c.sendall(data), c.shutdown(socket.SHUT_RDWR))


def stall(connection: socket.socket) -> None:
    """Waits for the other side to lose patience."""
    read_message(connection)


def drip(data: bytes, pause: float) -> Step:
    return lambda c: [(time.sleep(pause), c.sendall(data[i : i + 1])) for i in range(99)]


def late(data: bytes) -> Step:
    return lambda c: (time.sleep(0.35), c.sendall(data))


HONEST = [send(LIST), send(SIG)]


class Liar(ScriptedAgent):
    """A scripted agent whose behaviour each test sets."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "liar", self.behave)
        self.steps: List[Step] = HONEST
        self.requests: List[bytes] = []
        self.open: Set[socket.socket] = set()  # until the other side has closed

    def behave(self, connection: socket.socket) -> None:
        self.open.add(connection)
        with contextlib.suppress(ConnectionError):
            for step in self.steps:
                request = read_message(connection)
                if not request:
                    break
                self.requests.append(request)
                step(connection)
            while connection.recv(65536):
                pass
        self.open.discard(connection)

    def be(self, steps: List[Step]) -> Path:
        self.steps, self.requests = steps, []
        return self.sock

    def asked(self, times: int = 1) -> None:
        wait_for(lambda: len(self.requests) == times, message="the proxy's request")

    def left(self) -> None:
        wait_for(lambda: not self.open, 5, "the connection's end")


@pytest.fixture(scope="module")
def liar() -> Iterator[Liar]:
    with short_folder() as folder:
        made = Liar(folder)
        yield made
        made.stop()


GARBAGE = [(UNKNOWN, b"x"), (b"", b""), (ED[:-1], b""), (b"\xff" * 50, b"\xff")]

# What stands in a lie's place where the truth is told; and whose the signature is then.
TRUTHS = [
    ("a list of 256 KiB", [send(listing((ED, b"c" * (262144 - 5 - 8 - len(ED))))), send(SIG)], ED),
    ("a byte at a time", [drip(LIST, 0), send(SIG)], ED),
    ("a good key among garbage", [send(listing(*GARBAGE, (ED2, b""), *GARBAGE)), send(SIG)], ED2),
]  # fmt: skip


@pytest.mark.parametrize("steps, key", rows(TRUTHS))
def test_the_first_key_that_fits_signs_however_the_truth_is_told(
        liar: Liar, steps: List[Step], key: bytes) -> None:  # fmt: skip
    fingerprint = sap.parse_public_key(key).fingerprint
    assert signer(liar.be(steps), sap.Wanted(fingerprint=fingerprint)) == key
    liar.left()


Expected = Tuple[type, str]
ANNOUNCED = (sap.WireError, "announced")
LOCKED = (sap.AgentError, LISTS_NONE)
UNREACHABLE = (sap.AgentError, HUNG_UP)

LIES = [
    # the message
    ("announces 0 bytes", [send(bytes(4))], ANNOUNCED),
    ("announces 256 KiB and 1", [send(struct.pack(">I", 262145))], ANNOUNCED),
    ("announces 4 GiB and sends a lot", [send(b"\xff" * 100000)], ANNOUNCED),
    ("sends a byte behind the message", [send(LIST + b"\0")], (sap.WireError, "1 bytes more")),
    ("closes once asked", [cut(b"")], UNREACHABLE),
    ("closes before the list's last byte", [cut(LIST[:-1])], (sap.WireError, "in the middle")),
    # the list
    ("refuses to list", [send(FAILURE)], LOCKED),
    ("lists only keys of no use", [send(listing(*GARBAGE))], (sap.AgentError, "none of a type")),
    # the signature
    ("refuses to sign", [send(LIST), send(FAILURE)], (sap.AgentRefused, "refused to sign")),
]  # fmt: skip

LIES_OF_A_KNOWN_KEY = [
    # the first message asks for the signature
    ("refuses everything", [send(FAILURE), send(FAILURE)], LOCKED),
    ("refuses, then closes", [send(FAILURE), cut(b"")], UNREACHABLE),
]  # fmt: skip

THE_KEY = sap.Wanted(sap.parse_public_key(ED))
ALL_LIES = [(*row, ANY) for row in LIES] + [(*row, THE_KEY) for row in LIES_OF_A_KNOWN_KEY]


@pytest.mark.parametrize("steps, expected, wanted", rows(ALL_LIES))
def test_a_lie_is_told_and_its_connection_closed(
        liar: Liar, steps: List[Step], expected: Expected, wanted: sap.Wanted) -> None:  # fmt: skip
    kind, words = expected
    assert words in refusal(kind, liar.be(steps), wanted)
    liar.left()


def test_an_agent_that_hangs_up_before_it_is_asked_is_told(liar: Liar) -> None:
    agents = sap.Agents(sap.Upstream(str(liar.be([cut(LIST)]))), (), 20)
    with pytest.raises(sap.AgentError, match=HUNG_UP), agents.exchange() as exchange:
        sap.list_keys(exchange)
        exchange.ask(b"\x0b")


@pytest.mark.parametrize("steps, wanted", rows([
    ("when asked to sign with a known key", [stall], THE_KEY),
    ("when asked for a list after a refusal", [send(FAILURE), stall], THE_KEY),
    ("by dripping", [drip(LIST, 0.05)], ANY),
    ("by 0.7 of the time for each message", [late(LIST), late(SIG)], ANY),
]))  # fmt: skip
def test_a_stall_is_too_late(liar: Liar, steps: List[Step], wanted: sap.Wanted) -> None:
    before = time.monotonic()
    assert TOO_LATE in refusal(sap.AgentTimeout, liar.be(steps), wanted, timeout=0.5)
    assert 0.4 < time.monotonic() - before < 5


@pytest.fixture
def full(short: Path) -> Iterator[Path]:
    """The socket of an agent that accepts nobody any more."""
    with contextlib.ExitStack() as stack, contextlib.suppress(BlockingIOError):
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(short / "full"))
        listener.listen(0)
        try:
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(short / "full"))
        except BlockingIOError:
            yield short / "full"


def test_an_agent_that_accepts_nobody_any_more_is_too_late(full: Path) -> None:
    before = time.monotonic()
    assert TOO_LATE in refusal(sap.AgentTimeout, full, timeout=0.5)
    assert 0.4 < time.monotonic() - before < 5


def test_a_known_key_is_asked_for_straight_away_and_as_the_specification_says(liar: Liar) -> None:
    wanted = sap.Wanted(sap.parse_public_key(RSA))
    liar.be([send(response(s(b"rsa-sha2-512") + s(b"\1" * 256)))])
    assert signer(liar.sock, wanted) == RSA
    (request,) = liar.requests
    with sap.Reader(request, "request") as r:
        assert (r.take(1), r.string()) == (b"\x0d", RSA)
        assert r.string() == b"SSHSIG" + s(b"git") + s(b"") + s(b"sha512") + s(DIGEST)
        assert r.uint32() == 4  # SSH_AGENT_RSA_SHA2_512


def test_no_exchange_costs_a_file_descriptor(liar: Liar, short: Path) -> None:
    attempts = [(short / "nobody", HONEST)]
    attempts += [(liar.sock, row[1]) for row in LIES]
    attempts += [(sap.Upstream(command=(name,)), HONEST) for name in ("false", "/nowhere/relay")]
    before = len(os.listdir("/dev/fd"))
    for upstream, steps in attempts:
        liar.be(steps)
        with pytest.raises(sap.ProxyError):
            sign(upstream)
    # The agent's own ends of the connections are in this process too.
    wait_for(lambda: len(os.listdir("/dev/fd")) <= before, message="all are closed")


# ---------------------------------------------------------------- clients of the running proxy


@pytest.fixture
def proxy(start_proxy: StartProxy, liar: Liar) -> Proxy:
    """Before an agent that does not answer, once its look at the start is over."""
    proxy = start_proxy(upstream=liar.be(HONEST))
    proxy.wait_log("signing with")
    liar.left()
    liar.be([stall])
    return proxy


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


POST = post(b"payload")
CHUNKED = post_chunked(b"7\r\npayload\r\n0\r\n\r\n")


@pytest.mark.parametrize("request_, before, more, leave", rows([
    ("close", POST, [], b"", socket.socket.close),
    ("chunked, its sending side", CHUNKED, [], b"", lambda client: client.shutdown(socket.SHUT_WR)),
    ("GET, reset", get("/publickey"), [], b"", reset),
    ("between list and signature", POST, [send(LIST)], b"", socket.socket.close),
    # Linux alone shows a close behind them.
    *([("behind bytes that nobody reads", POST, [], b"GET /", socket.socket.close)]
      if sys.platform == "linux" else []),
]))  # fmt: skip
def test_a_client_that_goes_away_takes_its_agent_connection_with_it(
    liar: Liar, proxy: Proxy, request_: bytes, before: List[Step], more: bytes, leave: Any
) -> None:
    liar.be([*before, stall])
    with connect(proxy.port) as client:
        client.sendall(request_)
        liar.asked(len(liar.steps))
        client.sendall(more)
        leave(client)
        liar.left()
    proxy.wait_log("outcome=gone")


def test_a_client_that_goes_away_while_the_agent_accepts_nobody_is_noticed(
        start_proxy: StartProxy, full: Path) -> None:  # fmt: skip
    proxy = start_proxy(upstream=full)
    with connect(proxy.port) as client:
        client.sendall(POST)
    proxy.wait_log("outcome=gone", 5)


def test_neither_waiting_nor_bytes_behind_the_request_are_a_sign_that_the_client_left(
        liar: Liar, proxy: Proxy) -> None:  # fmt: skip
    sent = threading.Event()
    # The agent's own time: the proxy sees the bytes while it waits.
    liar.be([send(LIST), lambda c: (sent.wait(10), time.sleep(0.2), c.sendall(SIG))])
    with connect(proxy.port) as client:
        client.sendall(POST)
        liar.asked(2)
        client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        sent.set()
        assert client.recv(12) == b"HTTP/1.1 200"


def test_an_agent_that_hangs_at_the_start_holds_up_neither_requests_nor_the_end(
        start_proxy: StartProxy, liar: Liar) -> None:  # fmt: skip
    proxy = start_proxy(upstream=liar.be([stall]))
    liar.asked()
    assert http(proxy.port, "GET", "/healthz", seconds=5).status == 200
    proxy.process.send_signal(signal.SIGTERM)
    assert proxy.process.wait(5) == 0
