"""A person is asked before each signature: what they are shown, and what counts as a yes.

The askpass program is mostly a script that notes what it was asked and does what the test says;
once it is a real one, on a screen.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import pytest
from conftest import (
    FINGERPRINT,
    ID,
    PROXY,
    TEXTS,
    Agent,
    Answer,
    Keys,
    Proxy,
    Repository,
    ask,
    can_be_seen,
    cannot_run,
    clean_env,
    commit,
    connect,
    fingerprint,
    get,
    message,
    need,
    post,
    private_file,
    push,
    read_all,
    read_message,
    rows,
    run,
    short_folder,
    tag,
    the_one_answer,
    wait_for,
)

import ssh_agent_proxy as sap

BEGIN = b"-----BEGIN SSH SIGNATURE-----\n"

# ---------------------------------------------------------------- an askpass program that we are

# First it notes who it is and all that it was given; then it does what the test says.
NOTES = """#!/bin/sh
here='{folder}'
: >"$here/started/$$"
printf '%s\\0' "$$" "$SSH_ASKPASS_PROMPT" "$@" >"$here/.$$"
mv "$here/.$$" "$here/asked/$$"
"""

# Waits for a line from the test, and does what that says: `exit 1`.
WAITS = """
read -r answer <"$here/answers"
eval "$answer"
"""


class Asked(NamedTuple):
    pid: int
    mode: str
    prompt: str

    @property
    def facts(self) -> Dict[str, str]:
        """What stands behind each label."""
        lines = [line for line in self.prompt.split("\n")[1:] if line]
        return dict(line.lstrip("• ").split(": ", 1) for line in lines)


class Askpass:
    def __init__(self, folder: Path, does: str = WAITS) -> None:
        self.folder = folder
        self.program = folder / "askpass"
        (folder / "asked").mkdir(parents=True)
        (folder / "started").mkdir()
        os.mkfifo(folder / "answers")
        self.does(does)

    def does(self, what: str) -> None:
        fresh = self.folder / "fresh"
        fresh.write_text(NOTES.format(folder=self.folder) + what)
        fresh.chmod(0o755)
        fresh.replace(self.program)

    def asked(self) -> List[Asked]:
        """Each time that it was run, the first one first."""
        notes = sorted((self.folder / "asked").iterdir(), key=lambda f: f.stat().st_mtime_ns)
        found = []
        for note in notes:
            pid, mode, prompt = note.read_bytes().decode().split("\0")[:-1]  # one argument
            found.append(Asked(int(pid), mode, prompt))
        return found

    def started(self) -> List[int]:
        """Each time that it was run at all, if only for an instant."""
        return [int(name) for name in os.listdir(self.folder / "started")]

    def wait(self, number: int = 1) -> Asked:
        """The prompt of that NUMBER, once it is there."""
        wait_for(lambda: len(self.asked()) >= number, message=f"prompt {number}")
        return self.asked()[number - 1]

    def answer(self, line: str = "exit 0") -> None:
        """To the prompt that is open."""

        def opened() -> Optional[int]:
            with contextlib.suppress(OSError):  # nobody reads yet
                return os.open(self.folder / "answers", os.O_WRONLY | os.O_NONBLOCK)
            return None

        fd = wait_for(opened, message="a prompt that waits for an answer")
        with open(fd, "w") as f:
            f.write(line + "\n")

    def end(self) -> None:
        """What a proxy at fault has left."""
        for pid in self.started():
            if runs(pid):
                os.kill(pid, signal.SIGKILL)


def runs(pid: int) -> bool:
    """Does it run? (An orphan that has ended may wait for a PID 1 that waits for nobody.)"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def group(leader: int) -> List[int]:
    """The processes that run in this process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, its = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its) == leader and state != "Z":
                found.append(int(folder.name))
    return found


def is_over(asked: Asked) -> None:
    wait_for(lambda: not group(asked.pid), message="an end of all that the askpass started")


@pytest.fixture
def askpass(short: Path) -> Iterator[Askpass]:
    askpass = Askpass(short / "askpass")
    yield askpass
    askpass.end()


Confirming = Callable[..., Proxy]


@pytest.fixture
def confirming(
    agent_with_key: Agent, askpass: Askpass, start_proxy: Callable[..., Proxy]
) -> Confirming:
    """Starts a proxy that asks ASKPASS, in front of an agent with one key."""

    def start(*args: Any, **more: Any) -> Proxy:
        more.setdefault("upstream", agent_with_key.sock)
        return start_proxy("--confirm", askpass.program, *args, **more)

    return start


class Request:
    """A request to sign, on its way."""

    def __init__(
        self, to: Union[Proxy, Path], payload: bytes = b"", *fields: str, source: str = ""
    ) -> None:
        if source:
            assert isinstance(to, Proxy)
            where = ("127.0.0.1", to.port)
            self.socket = socket.create_connection(where, 20, source_address=(source, 0))
        else:
            self.socket = connect(to if isinstance(to, Path) else to.port)
        self.socket.sendall(post(payload or commit(), *fields))

    def answer(self) -> Answer:
        with self.socket:
            return the_one_answer(read_all(self.socket, 30))

    def close(self) -> None:
        self.socket.close()


def signed(request: Request) -> None:
    answer = request.answer()
    assert (answer.status, answer.body[: len(BEGIN)]) == (200, BEGIN), answer


def not_confirmed(request: Request) -> str:
    answer = request.answer()
    assert answer.status == 403, answer
    assert answer.text.startswith("not confirmed: "), answer
    assert answer.text.count("\n") == 1, answer
    return answer.text


class Shared(NamedTuple):
    """One proxy for a whole table."""

    proxy: Proxy
    askpass: Askpass

    def asks(self, payload: bytes) -> Asked:
        """What is asked about PAYLOAD, which the person agrees to."""
        before = len(self.askpass.asked())
        self.askpass.does("exit 0")
        signed(Request(self.proxy, payload))
        return self.askpass.wait(before + 1)


@contextlib.contextmanager
def sharing(agent: Agent, *args: Any) -> Iterator[Shared]:
    with short_folder() as folder:
        askpass = Askpass(folder / "askpass")
        argv = [sys.executable, PROXY, "--addr", "127.0.0.1:0", "--upstream", agent.sock]
        argv += ["--confirm", askpass.program, *args]
        proxy = Proxy([str(a) for a in argv], clean_env(folder))
        yield Shared(proxy, askpass)
        proxy.stop()
        askpass.end()
        assert "Traceback" not in proxy.log(), proxy.log()


@pytest.fixture(scope="module")
def patient(agent_with_key: Agent) -> Iterator[Shared]:
    with sharing(agent_with_key) as shared:
        yield shared


@pytest.fixture(scope="module")
def hasty(agent_with_key: Agent) -> Iterator[Shared]:
    """It waits half a second, then it is a no."""
    with sharing(agent_with_key, "--timeout", "0.5") as shared:
        yield shared


# ---------------------------------------------------------------- what is a yes, and what is a no

YES = [
    ("exit 0", "exit 0"),
    ("an empty line", "echo"),
    ("yes", "echo yes"),
    ("yes without a newline", "printf yes"),
    ("yes in both cases", "echo Yes"),
    ("yes and a carriage return", "printf 'yes\\r\\n'"),
    ("an empty line with carriage return", "printf '\\r\\n'"),
    ("yes and further lines without an end", "echo yes; head -c 5000 /dev/zero | tr '\\0' x"),
    ("yes and complaints on stderr", "echo no >&2; echo yes"),
]

NO = [
    ("exit 1", "exit 1"),
    ("yes and exit 1", "echo yes; exit 1"),
    ("no", "echo no"),
    ("y", "echo y"),
    ("yess", "echo yess"),
    ("yes and a word", "echo yes please"),
    ("yes behind a blank", "echo ' yes'"),
    ("a blank", "echo ' '"),
    ("no behind 2000 blanks", "printf '%2000s\\n' no"),
    ("yes in the second line", "printf 'no\\nyes\\n'"),
    ("binary", "printf '\\377\\376'"),
    ("a long line", "head -c 5000 /dev/zero | tr '\\0' y"),
    ("SIGKILL", "kill -KILL $$"),
    ("SIGTERM after yes", "echo yes; kill -TERM $$"),
]

NO_IN_TIME = [
    ("no answer", "exec sleep 600"),
    ("no answer after yes", "echo yes; exec sleep 600"),
    ("output without end", "exec yes"),
    ("stdout closed and running on", "exec >&-; exec sleep 600"),
    ("a child left behind with stdout", "sleep 600 & exit 0"),
    ("ignoring SIGTERM", "trap '' TERM; while :; do read -r x <\"$here/answers\"; done"),
]


@pytest.mark.parametrize("does", rows(YES))
def test_a_yes(patient: Shared, does: str) -> None:
    patient.askpass.does(does)
    signed(Request(patient.proxy))


@pytest.mark.parametrize("does", rows(NO))
def test_everything_else_is_a_no(patient: Shared, does: str) -> None:
    patient.askpass.does(does)
    not_confirmed(Request(patient.proxy))


@pytest.mark.parametrize("does", rows(NO_IN_TIME))
def test_no_answer_in_time_is_a_no_and_nothing_runs_on(hasty: Shared, does: str) -> None:
    hasty.askpass.does(does)
    before = len(hasty.askpass.asked())
    not_confirmed(Request(hasty.proxy))
    is_over(hasty.askpass.wait(before + 1))


def test_output_without_end_takes_no_memory(hasty: Shared) -> None:
    hasty.askpass.does("exit 1")
    not_confirmed(Request(hasty.proxy))  # what every askpass takes
    hasty.askpass.does("exec cat /dev/zero")

    def peak() -> int:
        status = Path(f"/proc/{hasty.proxy.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+([0-9]+) kB", status)[0])

    before = peak()
    not_confirmed(Request(hasty.proxy))
    assert peak() - before < 4096


@pytest.mark.parametrize("how", ["removed", "not executable", "a folder", "not a program"])
def test_a_program_that_is_gone_later_is_a_no(
    askpass: Askpass, confirming: Confirming, how: str
) -> None:
    proxy = confirming()
    askpass.program.unlink()
    if how == "a folder":
        askpass.program.mkdir()
    elif how != "removed":
        askpass.program.write_bytes(b"\x7fELF\0")
        askpass.program.chmod(0o644 if how == "not executable" else 0o755)
    assert "askpass program" in not_confirmed(Request(proxy))
    proxy.wait_log(re.escape(str(askpass.program)))


# ---------------------------------------------------------------- one at a time


def test_no_two_prompts_are_open_at_once(askpass: Askpass, confirming: Confirming) -> None:
    """Else a person's click answers another question than the one that was read."""
    askpass.does(f'mkdir "$here/open" || touch "$here/overlap"; {WAITS}')
    proxy = confirming()
    requests = [Request(proxy, commit(b"%d" % n)) for n in range(5)]
    for number in range(1, 6):
        askpass.wait(number)
        assert ask(proxy.port, get("/healthz")).status == 200  # gives a second one its time
        askpass.answer('rmdir "$here/open"')
    for request in requests:
        signed(request)
    assert not (askpass.folder / "overlap").exists()
    subjects = [asked.facts["subject"] for asked in askpass.asked()]
    assert sorted(subjects) == list("01234")


def test_the_time_in_the_queue_counts(askpass: Askpass, confirming: Confirming) -> None:
    askpass.does("sleep 0.4")
    proxy = confirming("--timeout", "1")
    answers = [r.answer() for r in [Request(proxy) for _ in range(20)]]
    late = [answer.text for answer in answers if answer.status != 200]
    # Twenty times 0.4 s are more than a second: not all have had a prompt of their own.
    assert all(text.startswith("not confirmed: ") for text in late)
    assert any("another prompt" in text for text in late)
    assert len(askpass.started()) < 20


@pytest.mark.parametrize("ignores", ["", "trap '' TERM; "])
def test_a_client_that_goes_away_takes_its_prompt_along_and_the_next_is_asked(
    ignores: str, askpass: Askpass, confirming: Confirming
) -> None:
    askpass.does(f"{ignores}sleep 600 & {WAITS}")
    proxy = confirming()
    first = Request(proxy, commit(b"first"))
    asked = askpass.wait()
    second = Request(proxy, commit(b"second"))
    first.close()
    is_over(asked)
    assert askpass.wait(2).facts["subject"] == "second"
    askpass.answer('kill -KILL "$!"')
    signed(second)
    assert len(askpass.asked()) == 2
    proxy.wait_log(r"outcome=gone .*subject=first")


@pytest.mark.parametrize(("shown", "expected"), [(True, [1]), (False, [])])
def test_a_click_on_its_way_to_a_prompt_that_goes_hits_no_other(
    shown: bool, expected: List[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next prompt waits a second where one has been taken away."""
    pauses: List[float] = []
    agents = sap.Agents(None, (), 10)
    consent = sap.Consent(sap.Upstream("", ("sleep",)), 0, agents)
    ours, theirs = socket.socketpair()

    def leave() -> None:
        if shown:
            wait_for(lambda: agents.commands, message="the askpass")
        theirs.close()

    thread = threading.Thread(target=leave)
    thread.start()
    if not shown:
        thread.join()
    with monkeypatch.context() as patch:
        clock = types.SimpleNamespace(**vars(time))
        clock.sleep = pauses.append
        patch.setattr(sap, "time", clock)
        with pytest.raises(sap.ClientGone):
            consent.obtain("60", ("someone",), 0, ours)
    thread.join()
    assert pauses == expected
    assert not consent.lock.locked()
    ours.close()


def test_those_that_leave_the_queue_are_never_asked_for(
    short: Path, askpass: Askpass, confirming: Confirming
) -> None:
    """Neither while it stands nor as it moves on."""
    proxy = confirming(addr=f"127.0.0.1:0,unix:{short}/socket")
    # A Unix socket, since its close is seen at once.
    first = Request(short / "socket", commit(b"first"))
    asked = askpass.wait()
    early = Request(short / "socket", commit(b"leaving"))
    early.close()
    proxy.wait_log("outcome=gone .*subject=leaving")
    queue = [Request(short / "socket", commit(b"leaving")) for _ in range(10)]
    assert ask(proxy.port, get("/healthz")).status == 200
    for request in queue:
        request.close()
    askpass.answer()
    signed(first)
    wait_for(lambda: len(re.findall("outcome=gone .*subject=leaving", proxy.log())) == 11)
    assert askpass.started() == [asked.pid]


def test_an_open_prompt_holds_up_nothing_else_and_nothing_else_is_asked_about(
    short: Path, askpass: Askpass, keys: Keys, confirming: Confirming
) -> None:
    tokens = private_file(short / "tokens", "a-secret-of-20-bytes laptop\n")
    proxy = confirming("--token-file", tokens, "--payloads", "commit",
                       "--pubkey", keys.line("ed25519"))  # fmt: skip
    token = "Authorization: Bearer a-secret-of-20-bytes"
    request = Request(proxy, commit(), token)
    opened = askpass.wait()
    other_key = f"SSHSIG-Key: {keys.line('other')}"
    for data, status in [
        (get("/healthz"), 200),
        (get("/publickey", token), 200),
        (get("/shim"), 200),
        (post(commit(), token, "Origin: http://localhost"), 403),
        (post(commit(), token).replace(b"Host: localhost", b"Host: evil.example"), 421),
        (post(commit(), "Authorization: Bearer a-guess-of-20-bytes."), 401),
        (post(commit(), token, "SSHSIG-Namespace: file"), 403),
        (post(commit(), token, "SSHSIG-Hash: md5"), 400),
        (post(commit(), token, other_key), 403),
        (post(tag(), token), 403),
        (post(b"anything", token), 403),
        (post(b"", token), 400),
    ]:
        assert ask(proxy.port, data).status == status, data
    assert [asked.pid for asked in askpass.asked()] == [opened.pid]
    assert runs(opened.pid)
    askpass.answer()
    signed(request)


# ---------------------------------------------------------------- the agent


class Watched:
    """An agent that refuses everything, and what it was asked."""

    def __init__(self, scripted_agent: Callable[..., Path]) -> None:
        self.asked: List[int] = []
        self.path = scripted_agent(self.serve)

    def serve(self, connection: socket.socket) -> None:
        self.asked.append(0)  # for the connection itself
        while request := read_message(connection):
            self.asked.append(request[0])
            connection.sendall(message(sap.byte(sap.SSH_AGENT_FAILURE)))


@pytest.fixture
def watched(scripted_agent: Callable[..., Path], confirming: Confirming) -> Tuple[Watched, Proxy]:
    agent = Watched(scripted_agent)
    proxy = confirming(upstream=agent.path)
    proxy.wait_log("can't work yet")  # it has listed the keys, for the log
    agent.asked.clear()
    return agent, proxy


@pytest.mark.parametrize("how", ["exit 0", "exit 1", "kill $$", "the client leaves"])
def test_without_a_yes_the_agent_hears_of_nothing(
    watched: Tuple[Watched, Proxy], askpass: Askpass, keys: Keys, how: str
) -> None:
    agent, proxy = watched
    request = Request(proxy, commit(), f"SSHSIG-Key: {keys.line('ed25519')}")
    askpass.wait()
    assert agent.asked == []
    if how == "the client leaves":
        request.close()
        proxy.wait_log("outcome=gone")
    else:
        askpass.answer(how)
        status = request.answer().status
    if how == "exit 0":
        assert status == 503  # refused, and no key is listed
        assert sap.SSH_AGENTC_SIGN_REQUEST in agent.asked
    else:
        assert agent.asked == []


# ---------------------------------------------------------------- the proxy's own end


def stop(proxy: Proxy, signals: int) -> None:
    for number in range(signals):
        proxy.process.send_signal(signal.SIGTERM)
        if not number:
            proxy.wait_log("stopping")


def test_a_prompt_that_is_open_at_the_end_can_still_be_answered(
    askpass: Askpass, confirming: Confirming
) -> None:
    proxy = confirming()
    request = Request(proxy)
    askpass.wait()
    stop(proxy, 1)
    askpass.answer()
    signed(request)
    assert proxy.process.wait(20) == 0


@pytest.mark.parametrize("signals", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_end_of_the_proxy_is_the_end_of_the_prompt_and_no_other_comes(
    askpass: Askpass, confirming: Confirming, signals: int
) -> None:
    askpass.does(f"sleep 600 & {WAITS}")
    proxy = confirming()
    requests = [Request(proxy, commit(b"%d" % n)) for n in range(20)]
    asked = askpass.wait()
    assert ask(proxy.port, get("/healthz")).status == 200  # the others are in the queue by now
    stop(proxy, signals)
    assert proxy.process.wait(30) == 0
    is_over(asked)
    for request in requests:
        request.close()
    assert askpass.started() == [asked.pid]


def test_a_prompt_that_the_end_of_the_proxy_closes_is_no_yes(
    watched: Tuple[Watched, Proxy], askpass: Askpass, keys: Keys
) -> None:
    """It is sent SIGTERM; one that leaves with exit 0 at that has not been agreed to."""
    agent, proxy = watched
    askpass.does("trap 'exit 0' TERM; sleep 600 >/dev/null 2>&1 & : >\"$here/ready\"; wait")
    request = Request(proxy, commit(), f"SSHSIG-Key: {keys.line('ed25519')}")
    wait_for((askpass.folder / "ready").exists)
    stop(proxy, 2)
    assert proxy.process.wait(30) == 0
    request.close()
    assert agent.asked == []


# ---------------------------------------------------------------- a yes that holds


@pytest.fixture
def repository(home: Path, keys: Keys) -> Callable[[Proxy], Repository]:
    return lambda proxy: Repository(home, f"{proxy.url}/sign", keys["ed25519"].with_suffix(".pub"))


def test_a_rebase_asks_once_and_a_tag_within_once_more(
    repository: Callable[[Proxy], Repository], askpass: Askpass, confirming: Confirming
) -> None:
    askpass.does("exit 0")
    repo = repository(confirming("--confirm-for", "600"))
    for number in range(6):
        repo.git("commit", "-q", "--allow-empty", "-m", f"commit {number}")
    editor = "sed -i '3a exec git tag -s -m middle middle'"
    repo.git("rebase", "-q", "-i", "-S", "--no-ff", "--keep-empty", "HEAD~5",
             GIT_SEQUENCE_EDITOR=editor)  # fmt: skip
    assert repo.git("log", "--format=%G?", "HEAD~5..").split() == 5 * ["G"]
    repo.git("verify-tag", "middle")
    prompts = [asked.prompt.split("\n")[0] for asked in askpass.asked()]
    assert prompts == ["Sign this commit?", "Sign this tag?"]
    holds = [asked.facts["a yes holds"] for asked in askpass.asked()]
    assert holds == ["for 600 s, and every commit", "for 600 s, and every tag"]


@pytest.fixture
def holding(short: Path, askpass: Askpass, confirming: Confirming) -> Proxy:
    """A yes holds, for longer than any test takes; the person agrees to all."""
    askpass.does("exit 0")
    addr = f"127.0.0.1:0,unix:{short}/socket"
    return confirming("--confirm-for", "600", "--namespace", "git,file", addr=addr)


CHANGES: List[Tuple[str, bytes, List[str], str]] = [
    ("kind tag", tag(), [], ""),
    ("kind push", push(), [], ""),
    ("namespace", commit(), ["SSHSIG-Namespace: file"], ""),
    ("address", commit(), [], "127.0.0.2"),
]


@pytest.mark.parametrize(("payload", "fields", "source"), rows(CHANGES))
def test_a_yes_holds_for_the_same_kind_namespace_and_address_and_for_nothing_else(
    payload: bytes, fields: List[str], source: str, askpass: Askpass, holding: Proxy
) -> None:
    signed(Request(holding))
    signed(Request(holding, commit(b"another")))  # from another port
    assert len(askpass.asked()) == 1
    signed(Request(holding, payload, *fields, source=source))
    assert len(askpass.asked()) == 2
    signed(Request(holding, payload, *fields, source=source))
    signed(Request(holding))
    assert len(askpass.asked()) == 2  # and the first still holds


def test_a_yes_holds_for_one_named_key(
    agent: Agent, keys: Keys, askpass: Askpass, confirming: Confirming
) -> None:
    askpass.does("exit 0")
    for name in ("ed25519", "other"):
        agent.add(keys[name])
    proxy = confirming("--confirm-for", "600", upstream=agent.sock)
    for name in ("ed25519", "other", "other", "ed25519"):
        signed(Request(proxy, commit(), f"SSHSIG-Key: {keys.line(name)}"))
    expected = [fingerprint(keys[name]) for name in ("ed25519", "other")]
    assert [asked.facts["key"] for asked in askpass.asked()] == expected


@pytest.mark.parametrize("named", [False, True])
def test_the_key_that_was_shown_signs_and_a_yes_to_it_is_none_to_another(
    named: bool, agent: Agent, keys: Keys, askpass: Askpass, confirming: Confirming
) -> None:
    """Else a person agrees to one key, and another signs: the first in the list may change."""
    agent.add(keys["ed25519"])
    field = [f"SSHSIG-Key: {fingerprint(keys['ed25519'])}"] if named else []
    proxy = confirming("--confirm-for", "600", upstream=agent.sock)
    request = Request(proxy, commit(), *field)
    assert askpass.wait().facts["key"] == fingerprint(keys["ed25519"])
    agent.delete_all()
    agent.add(keys["other"])
    askpass.answer("exit 0")
    assert request.answer().status == 404
    request = Request(proxy)
    assert askpass.wait(2).facts["key"] == fingerprint(keys["other"])
    askpass.answer("exit 1")
    not_confirmed(request)


def test_where_no_key_could_sign_nobody_is_asked(
    agent: Agent, askpass: Askpass, confirming: Confirming
) -> None:
    assert Request(confirming(upstream=agent.sock)).answer().status == 503
    assert askpass.started() == []


def test_a_yes_to_what_is_none_of_git_s_holds_for_nothing_else(
    askpass: Askpass, holding: Proxy
) -> None:
    """Nobody knows what it was: the next may be anything."""
    for number in (1, 2):
        signed(Request(holding, b"anything"))
        assert "a yes holds" not in askpass.wait(number).facts


@pytest.mark.skipif(sys.platform != "linux", reason="CLOCK_BOOTTIME is Linux's")
def test_a_yes_does_not_outlive_a_suspend(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was agreed to in the evening is over in the morning, though the laptop was closed."""
    command = ("sh", "-c", f"echo >>{short}/asked")
    consent = sap.Consent(sap.Upstream("", command), 600, sap.Agents(None, (), 10))
    clock = types.SimpleNamespace(**vars(time))
    monkeypatch.setattr(sap, "time", clock)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for asleep, asked in [(0, 1), (0, 1), (601, 2)]:
            clock.clock_gettime = lambda which, asleep=asleep: (
                time.clock_gettime(which) + asleep * (which == time.CLOCK_BOOTTIME)
            )
            consent.obtain("", ("someone",), 600, ours)
            assert len((short / "asked").read_text()) == asked


def test_a_yes_to_a_unix_peer_holds_for_its_uid_and_not_for_another_uid_or_an_address(
    short: Path, askpass: Askpass, holding: Proxy
) -> None:
    if os.geteuid():
        cannot_run("only root can be somebody else")
    curl = need("curl", "curl")
    path = short / "socket"
    signed(Request(path))
    signed(Request(path))
    by = askpass.wait().facts["asked by"]
    assert re.search(rf"unix.*\b{os.getpid()}\b.*\b{os.geteuid()}\b", by)
    assert len(askpass.asked()) == 1
    short.chmod(0o711)
    path.chmod(0o666)  # the proxy would want tokens for that, and then the token counts
    argv = [curl, "-sS", "--unix-socket", path, "--data-binary", "@-", "http://localhost/sign"]
    as_another = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *argv]
    for _ in range(2):
        assert run(as_another, input=commit()).stdout.startswith(BEGIN)
    assert len(askpass.asked()) == 2
    assert re.search(r"\b65534\b", askpass.wait(2).facts["asked by"])
    signed(Request(holding))
    assert len(askpass.asked()) == 3


def test_a_yes_holds_for_one_token_wherever_it_comes_from_and_the_prompt_names_it(
    short: Path, askpass: Askpass, confirming: Confirming
) -> None:
    askpass.does("exit 0")
    secrets = [f"secret-of-20-bytes-{n}" for n in range(3)]
    text = f"{secrets[0]} laptop\n{secrets[1]}\n{secrets[2]} {'n' * 5000}\n"
    proxy = confirming("--confirm-for", "600", "--token-file", private_file(short / "t", text))
    for token in (0, 0, 1, 1, 0, 2):
        signed(Request(proxy, commit(), f"Authorization: Bearer {secrets[token]}"))
    token = f"Authorization: Bearer {secrets[0]}"
    signed(Request(proxy, commit(), token, source="127.0.0.2"))
    names = [asked.facts["asked by"].partition("token ")[2] for asked in askpass.asked()]
    assert names[:2] == ["laptop", "line 2"]
    assert names[2].startswith(20 * "n") and len(names) == 3
    for asked in askpass.asked():
        well_formed(asked.prompt)
        assert "secret" not in asked.prompt


def test_a_yes_ends_however_often_it_is_used(askpass: Askpass, confirming: Confirming) -> None:
    askpass.does("exit 0")
    proxy = confirming("--confirm-for", "1")

    def asked_again() -> bool:
        signed(Request(proxy))
        return len(askpass.asked()) == 2

    wait_for(asked_again)


def test_without_a_time_each_signature_is_asked_for(patient: Shared) -> None:
    assert len({patient.asks(commit()).pid for _ in range(3)}) == 3


def test_a_no_is_not_remembered_and_ends_no_yes_to_something_else(
    askpass: Askpass, confirming: Confirming
) -> None:
    proxy = confirming("--confirm-for", "600")
    requests = [Request(proxy) for _ in range(3)]
    for number, answer in ((1, "exit 1"), (2, "exit 1"), (3, "exit 0")):
        askpass.wait(number)
        askpass.answer(answer)
    statuses = sorted(request.answer().status for request in requests)
    assert statuses == [200, 403, 403]
    askpass.does("exit 1")
    not_confirmed(Request(proxy, tag()))
    signed(Request(proxy))
    assert len(askpass.asked()) == 4


def test_a_yes_that_holds_waits_for_no_other_prompt(
    askpass: Askpass, holding: Proxy
) -> None:
    """Else a rebase fails because another container's question is left open."""
    signed(Request(holding))
    askpass.does(WAITS)
    other = Request(holding, tag())
    askpass.wait(2)
    signed(Request(holding))
    askpass.answer("exit 0")
    signed(other)


def test_those_in_the_queue_ride_on_the_first_yes(
    askpass: Askpass, confirming: Confirming
) -> None:
    proxy = confirming("--confirm-for", "600")
    requests = [Request(proxy, commit(b"%d" % n)) for n in range(5)]
    askpass.wait()
    askpass.answer()
    for request in requests:
        signed(request)
    assert len(askpass.asked()) == 1


# ---------------------------------------------------------------- what the prompt says


def test_what_is_said_of_a_commit_and_a_tag_by_git(
    repository: Callable[[Proxy], Repository], keys: Keys, askpass: Askpass,
    confirming: Confirming,
) -> None:  # fmt: skip
    askpass.does("exit 0")
    repo = repository(confirming())
    repo.git("commit", "-q", "--no-gpg-sign", "--allow-empty", "-m", "unsigned")
    repo.git("commit", "-q", "--allow-empty", "-m", "The first line\n\nAnd more.")
    repo.git("tag", "-m", "A tag's first line\n\nAnd more.", "v1")
    facts = [asked.facts for asked in askpass.asked()]
    kinds = [asked.prompt.split("\n")[0] for asked in askpass.asked()]
    assert kinds == ["Sign this commit?", "Sign this tag?"]
    assert {asked.mode for asked in askpass.asked()} == {"confirm"}
    for known in facts:
        assert re.fullmatch(r"127\.0\.0\.1:[0-9]+", known.pop("asked by"))
        assert known.pop("key") == fingerprint(keys["ed25519"])
        assert known.pop("namespace") == "git"
    of_commit, of_tag = facts
    assert of_commit == {
        "subject": "The first line",
        "author": "A U Thor <author@example.com>",
        "committer": "C O Mitter <committer@example.com>",
        "tree": repo.git("rev-parse", "HEAD^{tree}"),
        "parents": "1",
    }
    assert of_tag == {
        "subject": "A tag's first line",
        "tag": "v1",
        "tagger": "C O Mitter <committer@example.com>",
        "object": repo.git("rev-parse", "HEAD"),
        "type": "commit",
    }


FACTS = {"asked by": "127.0.0.1:1", "key": "SHA256:x", "namespace": "git"}


def prompt(data: bytes, facts: Dict[str, str] = FACTS) -> Asked:
    """What would be asked about a payload, of which a proxy knows FACTS."""
    return Asked(0, "", sap.consent_prompt(sap.parse_payload(data), dict(facts)))


def test_what_is_said_of_a_push() -> None:
    asked = prompt(push())
    assert asked.prompt.startswith("Sign this push?\n")
    assert asked.facts == {
        **FACTS,
        "subject": "refs/heads/main",
        "refs": "2",
        "pusher": FINGERPRINT.decode(),
        "pushee": "https://example.com/x.git",
    }


def test_of_what_is_none_of_git_s_the_size_is_said_and_nothing_of_its_text(
    patient: Shared,
) -> None:
    asked = patient.asks(b"subject: a commit of yours\n" * 4)
    first = "Sign something that is no git commit, tag or push (108 bytes)?"
    assert asked.prompt.split("\n")[0] == first
    assert "of yours" not in asked.prompt


# ---------------------------------------------------------------- what it can be made to say

LABELS = {
    "subject", "author", "committer", "tree", "parents", "tag", "tagger", "object", "type",
    "refs", "pusher", "pushee", "namespace", "key", "asked by", "a yes holds", "encoding",
}  # fmt: skip

def well_formed(text: str) -> None:
    """Whatever the client wrote, a line is a line of ours."""
    lines = text.split("\n")
    assert text.splitlines() == lines
    assert lines[0].startswith("Sign ") and lines[0].endswith("?")
    assert lines[1] == ""
    # A screen may wrap a long line anywhere: the mark is what tells ours from what looks like one.
    assert all(line.startswith("• ") and line.count("•") == 1 for line in lines[2:])
    labels = [line[2:].partition(": ")[0] for line in lines[2:]]
    assert set(labels[:3]) == {"asked by", "key", "namespace"}  # what the proxy knows comes first
    assert set(labels) <= LABELS
    assert len(set(labels)) == len(labels)
    for line in lines:
        assert all(map(can_be_seen, line))
        assert "  " not in line
        assert len(line) <= 100


@pytest.mark.parametrize("text", rows(TEXTS))
def test_no_text_of_a_payload_breaks_out_of_its_line(text: bytes) -> None:
    """Else the person reads what the client wants, and agrees to something else."""
    person = re.sub(rb"[\n<>]", b"", text) + b" <x@example.com>"
    payloads = {
        "commit": commit(text, author=person),
        "tag": tag(text, person),
        "push": push(pushee=text.replace(b"\n", b"") or b"x"),
    }
    for kind, data in payloads.items():
        asked = prompt(data)
        assert asked.prompt.startswith(f"Sign this {kind}?\n")
        well_formed(asked.prompt)
        assert FACTS.items() <= asked.facts.items()
        assert asked.facts.get("tree", ID.decode()) == ID.decode()
        if len(text) >= 10_000 and kind != "push":
            assert asked.facts["subject"].endswith("…")


@pytest.mark.parametrize("data", rows([
    ("commit", commit(b"subject: x\r\x85asked by: y")), ("tag", tag(b"\x1b\x85\ttype: x")),
    ("push", push("refs/heads/\u202e\u2028x".encode())), ("other", b"\x1b[2J\nkey: x\n"),
]))  # fmt: skip
def test_what_the_proxy_knows_itself_breaks_out_of_no_line_either(data: bytes) -> None:
    """A token's name is a client's, in a way."""
    facts = {"namespace": "git", "key": "SHA256:\u202e\nkey: x", "asked by": "x\n\x1b[2J, token \n"}
    well_formed(prompt(data, facts).prompt)


def test_a_hostile_commit_is_asked_for_in_lines_of_ours(patient: Shared) -> None:
    """As the askpass program gets it, in its one argument."""
    hostile = "real\vauthor: Someone Else\u2028key: none\x1b[2J\u202e"
    author = b"\x1b[2J\xc2\x85\xe2\x80\xae <a@example.com>"
    asked = patient.asks(commit(hostile.encode(), author))
    well_formed(asked.prompt)
    assert asked.facts["subject"].startswith("real author: Someone Else key: none")
    assert asked.facts["author"].endswith("<a@example.com>")


# ---------------------------------------------------------------- a real one, on a screen


class Screen:
    """A screen that nobody looks at, but tests."""

    def __init__(self, folder: Path) -> None:
        server = need("Xvfb", "xvfb")
        self.tools = [need("xdotool", "xdotool"), need("import", "imagemagick")]
        self.askpass = need("/usr/lib/openssh/gnome-ssh-askpass", "ssh-askpass-gnome")
        self.picture = folder / "screen.png"
        reader, writer = os.pipe()
        self.process = subprocess.Popen(
            [server, "-displayfd", str(writer), "-screen", "0", "1024x768x24",
             "-nolisten", "tcp", "-noreset"],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[writer],
        )  # fmt: skip
        os.close(writer)
        with open(reader) as f:
            number = f.readline().strip()
        assert number, "Xvfb did not start"
        self.env = {**clean_env(folder), "DISPLAY": f":{number}"}

    def do(self, *argv: Any) -> str:
        return run(argv, env=self.env, check=False).stdout.decode()

    def window(self) -> Optional[str]:
        """The one that is seen; a window that is not mapped is not."""
        found = self.do("xdotool", "search", "--onlyvisible", "--class", "askpass").split()
        assert len(found) < 2
        return found[0] if found else None

    def geometry(self, window: str) -> Dict[str, int]:
        text = self.do("xdotool", "getwindowgeometry", "--shell", window)
        return {n: int(v) for n, v in (line.split("=") for line in text.split())}

    def colours(self, crop: str) -> int:
        """How many there are in a part of a fresh picture."""
        self.do("import", "-window", "root", self.picture)
        return int(self.do("convert", self.picture, "-crop", crop, "-format", "%k", "info:") or 0)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def screen(short: Path) -> Iterator[Screen]:
    screen = Screen(short)
    yield screen
    screen.stop()


@pytest.mark.alone
@pytest.mark.parametrize(("button", "subject"), [
    ("Yes", "Fix what nobody had seen"),
    ("No", "-h " + 100 * "W \u202e " + "\v".join(30 * ["author: Someone Else"])),
], ids=["yes", "no, hostile"])  # fmt: skip
def test_a_real_askpass_shows_the_prompt_and_its_button_decides(
    agent_with_key: Agent, repository: Callable[[Proxy], Repository], screen: Screen,
    start_proxy: Callable[..., Proxy], button: str, subject: str,
) -> None:  # fmt: skip
    argv = ["--confirm", screen.askpass]
    repo = repository(start_proxy(*argv, upstream=agent_with_key.sock, env=screen.env))
    git = subprocess.Popen(
        ["git", "commit", "--allow-empty", "-S", "-m", subject], env=repo.env, cwd=repo.path,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    window = wait_for(screen.window, message="a window that is seen")
    # It has the size of its text, and fits the screen with its buttons.
    place = wait_for(
        lambda: (g := screen.geometry(window)) and g["WIDTH"] > 300 and g["HEIGHT"] > 150 and g
    )
    assert 0 <= place["X"] <= place["X"] + place["WIDTH"] <= 1024
    assert 0 <= place["Y"] <= place["Y"] + place["HEIGHT"] <= 768
    # Text in grey steps, many of them; an empty window has a handful of colours.
    crop = "{WIDTH}x{HEIGHT}+{X}+{Y}".format(**place)
    wait_for(lambda: screen.colours(crop) > 50, message="text in the window")
    side = 3 if button == "Yes" else 1

    def answered() -> bool:
        screen.do("xdotool", "mousemove", place["X"] + side * place["WIDTH"] // 4,
                  place["Y"] + place["HEIGHT"] - 15, "click", 1)  # fmt: skip
        return git.poll() is not None

    wait_for(answered)
    error = git.communicate()[1].decode()
    wait_for(lambda: not screen.window(), message="an end of the window")
    if button == "Yes":
        assert git.returncode == 0, error
        assert repo.git("log", "--format=%G? %s") == f"G {subject}"
    else:
        assert git.returncode != 0
        assert "not confirmed: " in error
        assert repo.git("rev-parse", "-q", "--verify", "HEAD", check=False) == ""
