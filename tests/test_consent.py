"""A person is asked before each signature: what they are shown, and what counts as a yes.

The askpass program is mostly a script that notes what it was asked and does what the test says;
once it is a real one, on a screen.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import pytest
from conftest import (
    FINGERPRINT, ID, TEXTS, Agent, Answer, Keys, Proxy, Repository, StartProxy, StartScripted, ask,
    can_be_seen, cannot_run, clean_env, commit, connect, fingerprint, get, need, post, private_file,
    push, read_all, refused, rows, run, tag, the_one_answer, wait_for,
)  # fmt: skip
from test_http import Scripted

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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


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


@pytest.fixture
def confirming(agent_with_key: Agent, askpass: Askpass, start_proxy: StartProxy) -> StartProxy:
    """Starts a proxy that asks ASKPASS, in front of an agent with one key."""

    def start(*args: Any, **more: Any) -> Proxy:
        more.setdefault("upstream", agent_with_key.sock)
        return start_proxy("--confirm", askpass.program, *args, **more)

    return start


class Request:
    """A request to sign, on its way."""

    def __init__(
        self, to: Union[Proxy, Path], payload: bytes = b"", *fields: str, source: str = "127.0.0.1"
    ) -> None:
        if isinstance(to, Path):
            self.socket = connect(to)
        else:
            where = ("127.0.0.1", to.port)
            self.socket = socket.create_connection(where, 20, source_address=(source, 0))
        self.socket.sendall(post(payload or commit(), *fields))
        self.close = self.socket.close

    def answer(self) -> Answer:
        with self.socket:
            return the_one_answer(read_all(self.socket, 30))


def signed(request: Request) -> None:
    answer = request.answer()
    assert (answer.status, answer.body[: len(BEGIN)]) == (200, BEGIN), answer


def not_confirmed(request: Request) -> str:
    text = refused(request.answer(), 403).text
    assert text.startswith("not confirmed: ")
    return text


def asks(program: Path, hold: float = 0, timeout: float = 10) -> sap.Consent:
    """What asks the person, in this process."""
    return sap.Consent(sap.Upstream("", (str(program),)), hold, sap.Agents(None, (), timeout))


@pytest.fixture
def client() -> Iterator[socket.socket]:
    """The connection of somebody who waits for the answer."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours


# ---------------------------------------------------------------- what is a yes, and what is a no

ANSWERS = [
    ("exit 0", "exit 0", True),
    ("yes in both cases", "echo Yes", True),
    ("yes and a carriage return", "printf 'yes\\r\\n'", True),
    ("an empty line with carriage return", "printf '\\r\\n'", True),
    ("yes and further lines", "echo yes; head -c 5000 /dev/zero | tr '\\0' x", True),
    ("yes and complaints on stderr", "echo no >&2; echo yes", True),
    ("yes and exit 1", "echo yes; exit 1", False),
    ("yess", "echo yess", False),
    ("yes behind a blank", "echo ' yes'", False),
    ("no behind 2000 blanks", "printf '%2000s\\n' no", False),
    ("yes in the second line", "printf 'no\\nyes\\n'", False),
    ("binary", "printf '\\377\\376'", False),
    ("SIGTERM after yes", "echo yes; kill -TERM $$", False),
]

NO_IN_TIME = [
    ("no answer after yes", "echo yes; exec sleep 600"),
    ("output without end", "exec cat /dev/zero"),
    ("stdout closed and running on", "exec >&-; exec sleep 600"),
    ("a child left behind with stdout", "sleep 600 & exit 0"),
    ("ignoring SIGTERM", "trap '' TERM; while :; do read -r x <\"$here/answers\"; done"),
]


def obtain(
    consent: sap.Consent, client: socket.socket, what: str = "kind", seconds: float = 0
) -> bool:
    """Does the person agree?"""
    try:
        consent.obtain("a prompt", (what,), seconds, client)
    except sap.RequestError as e:
        assert e.status == 403
        assert str(e).startswith("not confirmed: ")
        return False
    return True


@pytest.mark.parametrize(("does", "yes"), rows(ANSWERS))
def test_what_is_a_yes_and_everything_else_is_a_no(
        does: str, yes: bool, askpass: Askpass, client: socket.socket) -> None:  # fmt: skip
    askpass.does(does)
    assert obtain(asks(askpass.program), client) == yes
    assert len(askpass.asked()) == 1


@pytest.mark.parametrize("does", rows(NO_IN_TIME))
def test_no_answer_in_time_is_a_no_and_nothing_runs_on_nor_takes_memory(
        does: str, askpass: Askpass, client: socket.socket) -> None:  # fmt: skip
    askpass.does(does)
    tracemalloc.start()
    assert not obtain(asks(askpass.program, timeout=0.5), client)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    is_over(askpass.wait())


@pytest.mark.parametrize("mode", [None, 0o644, 0o755])
def test_a_program_that_is_gone_later_is_a_no(
        askpass: Askpass, confirming: StartProxy, mode: Optional[int]) -> None:  # fmt: skip
    """Or can't be run, or is none."""
    proxy = confirming()
    askpass.program.unlink()
    if mode:
        askpass.program.write_bytes(b"\x7fELF\0")
        askpass.program.chmod(mode)
    assert "askpass program" in not_confirmed(Request(proxy))
    proxy.wait_log(re.escape(str(askpass.program)))


# ---------------------------------------------------------------- one at a time


def test_no_two_prompts_are_open_at_once(askpass: Askpass, confirming: StartProxy) -> None:
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


def test_the_time_in_the_queue_counts(askpass: Askpass, confirming: StartProxy) -> None:
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
        ignores: str, askpass: Askpass, confirming: StartProxy) -> None:  # fmt: skip
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


def test_a_click_on_its_way_to_a_prompt_that_goes_hits_no_other(
        askpass: Askpass, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The next prompt waits a second where one has been taken away."""
    pauses: List[float] = []
    clock = types.SimpleNamespace(**vars(time))
    clock.sleep = pauses.append
    monkeypatch.setattr(sap, "time", clock)
    consent = asks(askpass.program)
    ours, theirs = socket.socketpair()

    def leave() -> None:
        askpass.wait()
        theirs.close()

    thread = threading.Thread(target=leave)
    thread.start()
    with ours, pytest.raises(sap.ClientGone):
        obtain(consent, ours)
    thread.join()
    assert pauses[-1] == 1
    assert not consent.lock.locked()


def test_those_that_leave_the_queue_are_never_asked_for(
        short: Path, askpass: Askpass, confirming: StartProxy) -> None:  # fmt: skip
    """Neither while it stands nor as it moves on."""
    proxy = confirming(addr=f"127.0.0.1:0,unix:{short}/socket")
    # A Unix socket, since its close is seen at once.
    first = Request(short / "socket", commit(b"first"))
    asked = askpass.wait()
    early = Request(short / "socket", commit(b"leaving"))
    assert ask(proxy.port, get("/healthz")).status == 200  # it is in the queue by now
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
        short: Path, askpass: Askpass, keys: Keys, confirming: StartProxy) -> None:  # fmt: skip
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
        (post(commit(), token, "Origin: http://localhost"), 403),
        (post(commit(), token).replace(b"Host: localhost", b"Host: evil.example"), 421),
        (post(commit(), "Authorization: Bearer a-guess-of-20-bytes."), 401),
        (post(commit(), token, "SSHSIG-Namespace: file"), 403),
        (post(commit(), token, "SSHSIG-Hash: md5"), 400),
        (post(commit(), token, other_key), 403),
        (post(tag(), token), 403),
        (post(b"", token), 400),
    ]:
        assert ask(proxy.port, data).status == status, data
    assert [asked.pid for asked in askpass.asked()] == [opened.pid]
    assert group(opened.pid)
    askpass.answer()
    signed(request)


# ---------------------------------------------------------------- the agent


@pytest.fixture
def watched(
    keys: Keys, scripted_agent: StartScripted, confirming: StartProxy
) -> Tuple[Proxy, Scripted]:
    """A proxy, and its agent, which has been asked nothing yet."""
    scripted = Scripted(keys.line("ed25519"))
    proxy = confirming(upstream=scripted_agent(scripted))
    proxy.wait_log("signing with")
    scripted.asked.clear()
    return proxy, scripted


@pytest.mark.parametrize(("how", "status", "signatures"), [("exit 0", 200, 1), ("exit 1", 403, 0)])
def test_without_a_yes_the_agent_hears_of_nothing(
    how: str, status: int, signatures: int, watched: Tuple[Proxy, Scripted], askpass: Askpass
) -> None:
    proxy, scripted = watched
    request = Request(proxy, commit(), f"SSHSIG-Key: {scripted.key.line}")
    askpass.wait()
    assert scripted.asked == []
    askpass.answer(how)
    assert request.answer().status == status
    assert scripted.asked == signatures * [sap.SSH_AGENTC_SIGN_REQUEST]


# ---------------------------------------------------------------- the proxy's own end


def stop(proxy: Proxy, signals: int) -> None:
    """The first one is noted before there is another."""
    for _ in range(signals):
        proxy.process.send_signal(signal.SIGTERM)
        proxy.wait_log("stopping")
    assert proxy.process.wait(30) == 0


@pytest.mark.parametrize("signals", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_end_of_the_proxy_is_the_end_of_the_prompt_and_no_other_comes(
        askpass: Askpass, confirming: StartProxy, signals: int) -> None:  # fmt: skip
    askpass.does(f"sleep 600 & {WAITS}")
    proxy = confirming()
    requests = [Request(proxy, commit(b"%d" % n)) for n in range(20)]
    asked = askpass.wait()
    assert ask(proxy.port, get("/healthz")).status == 200  # the others are in the queue by now
    stop(proxy, signals)
    is_over(asked)
    for request in requests:
        request.close()
    assert askpass.started() == [asked.pid]


def test_a_prompt_that_the_end_of_the_proxy_closes_is_no_yes(
        watched: Tuple[Proxy, Scripted], askpass: Askpass) -> None:  # fmt: skip
    """It is sent SIGTERM; one that leaves with exit 0 at that has not been agreed to."""
    proxy, scripted = watched
    askpass.does("trap 'exit 0' TERM; sleep 600 >/dev/null 2>&1 & : >\"$here/ready\"; wait")
    request = Request(proxy, commit(), f"SSHSIG-Key: {scripted.key.line}")
    wait_for((askpass.folder / "ready").exists)
    stop(proxy, 2)
    request.close()
    assert scripted.asked == []


# ---------------------------------------------------------------- a yes that holds


def test_a_rebase_asks_once_and_a_tag_within_once_more(
        home: Path, askpass: Askpass, keys: Keys, confirming: StartProxy) -> None:  # fmt: skip
    askpass.does("exit 0")
    proxy = confirming("--confirm-for", "600")
    repo = Repository(home, f"{proxy.url}/sign", keys["ed25519"].with_suffix(".pub"))
    for number in range(6):
        repo.git("commit", "-q", "--allow-empty", "-m", f"commit {number}")
    editor = "sed -i '3a exec git tag -s -m middle middle'"
    repo.git("rebase", "-q", "-i", "-S", "--no-ff", "--keep-empty", "HEAD~5",
             GIT_SEQUENCE_EDITOR=editor)  # fmt: skip
    assert repo.git("log", "--format=%G?", "HEAD~5..").split() == 5 * ["G"]
    repo.git("verify-tag", "middle")
    of_commit, of_tag = askpass.asked()
    assert of_commit.mode == "confirm"
    assert of_commit.facts["subject"] == "commit 0"
    assert of_commit.facts["namespace"] == "git"
    assert of_commit.facts["key"] == fingerprint(keys["ed25519"])
    assert re.fullmatch(r"127\.0\.0\.1:[0-9]+", of_commit.facts["asked by"])
    assert of_commit.facts["a yes holds"] == "for 600 s, and every commit"
    assert of_tag.facts["a yes holds"] == "for 600 s, and every tag"


@pytest.fixture
def holding(short: Path, askpass: Askpass, confirming: StartProxy) -> Proxy:
    """A yes holds, for longer than any test takes; the person agrees to all."""
    askpass.does("exit 0")
    addr = f"127.0.0.1:0,unix:{short}/socket"
    return confirming("--confirm-for", "600", "--namespace", "git,file", addr=addr)


def test_a_yes_holds_for_the_same_kind_namespace_and_address_and_for_nothing_else(
        askpass: Askpass, holding: Proxy) -> None:  # fmt: skip
    signed(Request(holding))
    signed(Request(holding, commit(b"another")))  # from another port
    assert len(askpass.asked()) == 1
    file = "SSHSIG-Namespace: file"
    for number, (payload, fields, source) in enumerate([
        (tag(), [], 1), (push(), [], 1), (commit(), [file], 1), (commit(), [], 2),
    ], 2):  # fmt: skip
        for _ in range(2):
            signed(Request(holding, payload, *fields, source=f"127.0.0.{source}"))
            assert len(askpass.asked()) == number
    signed(Request(holding))
    assert len(askpass.asked()) == 5  # and the first still holds
    for number in (6, 7):  # nobody knows what it was: the next may be anything
        signed(Request(holding, b"anything"))
        assert "a yes holds" not in askpass.wait(number).facts


@pytest.mark.parametrize("named", [False, True])
def test_the_key_that_was_shown_signs_and_a_yes_to_it_is_none_to_another(
    named: bool, agent: Agent, keys: Keys, askpass: Askpass, confirming: StartProxy
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
        agent: Agent, askpass: Askpass, confirming: StartProxy) -> None:  # fmt: skip
    assert Request(confirming(upstream=agent.sock)).answer().status == 503
    assert askpass.started() == []


@pytest.mark.skipif(sys.platform != "linux", reason="CLOCK_BOOTTIME is Linux's")
def test_a_yes_ends_however_often_it_is_used_and_in_a_suspend_too(
    askpass: Askpass, client: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was agreed to in the evening is over in the morning, though the laptop was closed."""
    askpass.does("exit 0")
    consent = asks(askpass.program, hold=600)
    clock = types.SimpleNamespace(**vars(time))
    monkeypatch.setattr(sap, "time", clock)
    for asleep, asked in [(0, 1), (0, 1), (400, 1), (601, 2)]:
        clock.clock_gettime = lambda which, asleep=asleep: (
            time.clock_gettime(which) + asleep * (which == time.CLOCK_BOOTTIME)
        )
        assert obtain(consent, client, seconds=600)
        assert len(askpass.asked()) == asked


def test_a_yes_to_a_unix_peer_holds_for_its_uid_and_not_for_another_uid_or_an_address(
        short: Path, askpass: Askpass, holding: Proxy) -> None:  # fmt: skip
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
        short: Path, askpass: Askpass, confirming: StartProxy) -> None:  # fmt: skip
    askpass.does("exit 0")
    secrets = [f"secret-of-20-bytes-{n}" for n in range(3)]
    text = f"{secrets[0]} laptop\n{secrets[1]}\n{secrets[2]} {'n' * 5000}\n"
    proxy = confirming("--confirm-for", "600", "--token-file", private_file(short / "t", text))
    for token, source in [(0, 1), (0, 1), (1, 1), (1, 1), (0, 2), (2, 1)]:
        field = f"Authorization: Bearer {secrets[token]}"
        signed(Request(proxy, commit(), field, source=f"127.0.0.{source}"))
    names = [asked.facts["asked by"].partition("token ")[2] for asked in askpass.asked()]
    assert names[:2] == ["laptop", "line 2"]
    assert names[2].startswith(20 * "n") and len(names) == 3
    for asked in askpass.asked():
        well_formed(asked.prompt)
        assert "secret" not in asked.prompt


def test_a_no_is_not_remembered_and_ends_no_yes_to_something_else(
        askpass: Askpass, client: socket.socket) -> None:  # fmt: skip
    consent = asks(askpass.program)
    answers = []
    for does, what in [("exit 1", "a"), ("exit 1", "a"), ("exit 0", "a"), ("exit 1", "b")]:
        askpass.does(does)
        answers.append(obtain(consent, client, what, seconds=600))
    assert answers == [False, False, True, False]
    assert obtain(consent, client, "a", seconds=600)
    assert len(askpass.asked()) == 4


def test_a_yes_that_holds_waits_for_no_other_prompt(askpass: Askpass, holding: Proxy) -> None:
    """Else a rebase fails because another container's question is left open."""
    signed(Request(holding))
    askpass.does(WAITS)
    other = Request(holding, tag())
    askpass.wait(2)
    signed(Request(holding))
    askpass.answer("exit 0")
    signed(other)


def test_those_in_the_queue_ride_on_the_first_yes(askpass: Askpass, confirming: StartProxy) -> None:
    proxy = confirming("--confirm-for", "600")
    requests = [Request(proxy, commit(b"%d" % n)) for n in range(5)]
    askpass.wait()
    askpass.answer()
    for request in requests:
        signed(request)
    assert len(askpass.asked()) == 1


# ---------------------------------------------------------------- what the prompt says


FACTS = {"asked by": "127.0.0.1:1", "key": "SHA256:x", "namespace": "git"}
TAGGER = "C O Mitter <committer@example.com>"
ID_TEXT = ID.decode()

# The payload, the first line, what is said besides FACTS.
SAID: List[Tuple[str, bytes, str, Dict[str, str]]] = [
    ("commit", commit(b"The first line\n\nAnd more."), "this commit",
     {"subject": "The first line", "author": "A U Thor <author@example.com>",
      "committer": TAGGER, "tree": ID_TEXT, "parents": "0"}),
    ("tag", tag(b"The first line\n\nAnd more."), "this tag",
     {"subject": "The first line", "tag": "v1", "tagger": TAGGER, "object": ID_TEXT,
      "type": "commit"}),
    ("push", push(), "this push",
     {"subject": "refs/heads/main", "refs": "2", "pusher": FINGERPRINT.decode(),
      "pushee": "https://example.com/x.git"}),
    ("none of git's", b"subject: a commit of yours\n" * 4,
     "something that is no git commit, tag or push (108 bytes)", {}),
]  # fmt: skip


def prompt(data: bytes, facts: Dict[str, str] = FACTS) -> Asked:
    """What would be asked about a payload, of which a proxy knows FACTS."""
    return Asked(0, "", sap.consent_prompt(sap.parse_payload(data), dict(facts)))


@pytest.mark.parametrize(("data", "what", "facts"), rows(SAID))
def test_what_is_said_of_each_kind(data: bytes, what: str, facts: Dict[str, str]) -> None:
    asked = prompt(data)
    assert asked.prompt.startswith(f"Sign {what}?\n")
    assert asked.facts == {**FACTS, **facts}
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


def test_what_the_proxy_knows_itself_breaks_out_of_no_line_either() -> None:
    """A token's name is a client's, in a way."""
    facts = {"namespace": "git", "key": "SHA256:\u202e\nkey: x", "asked by": "x\n\x1b[2J, token \n"}
    for data in (commit(b"subject: x\r\x85asked by: y"), b"\x1b[2J\nkey: x\n"):
        well_formed(prompt(data, facts).prompt)


# ---------------------------------------------------------------- a real one, on a screen


class Screen:
    """A screen that nobody looks at, but tests."""

    def __init__(self, folder: Path) -> None:
        need("xdotool", "xdotool")
        self.askpass = need("/usr/lib/openssh/gnome-ssh-askpass", "ssh-askpass-gnome")
        argv = [need("Xvfb", "xvfb"), "-displayfd", "1", "-screen", "0", "1024x768x24"]
        self.process = subprocess.Popen(
            [*argv, "-nolisten", "tcp", "-noreset"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdout
        number = self.process.stdout.readline().decode().strip()
        assert number, "Xvfb did not start"
        self.env = {**clean_env(folder), "DISPLAY": f":{number}"}

    def do(self, *argv: Any) -> str:
        return run(argv, env=self.env, check=False).stdout.decode()

    def window(self) -> str:
        """The one that is seen; a window that is not mapped is not."""
        return self.do("xdotool", "search", "--onlyvisible", "--class", "askpass").strip()

    def place(self, window: str) -> Optional[Dict[str, int]]:
        """Where it is, once it has the size of its text."""
        text = self.do("xdotool", "getwindowgeometry", "--shell", window)
        place = {n: int(v) for n, v in (line.split("=") for line in text.split())}
        return place if place["WIDTH"] > 300 and place["HEIGHT"] > 150 else None


@pytest.fixture
def screen(short: Path) -> Iterator[Screen]:
    screen = Screen(short)
    yield screen
    screen.process.terminate()
    screen.process.communicate(timeout=10)


@pytest.mark.alone
@pytest.mark.parametrize(("yes", "subject"), rows([
    ("yes", True, "Fix what nobody had seen"),
    ("no, hostile", False, "-h " + 100 * "W \u202e " + "\v".join(30 * ["author: Someone Else"])),
]))  # fmt: skip
def test_a_real_askpass_shows_the_prompt_and_its_button_decides(
    agent_with_key: Agent, screen: Screen, start_proxy: StartProxy, yes: bool, subject: str
) -> None:
    proxy = start_proxy("--confirm", screen.askpass, upstream=agent_with_key.sock, env=screen.env)
    request = Request(proxy, commit(subject.encode()))
    window = wait_for(screen.window, message="a window that is seen")
    place = wait_for(lambda: screen.place(window), message="a window with a text in it")
    right, bottom = place["X"] + place["WIDTH"], place["Y"] + place["HEIGHT"]
    # It fits the screen with its buttons.
    assert 0 <= place["X"] < right <= 1024
    assert 0 <= place["Y"] < bottom <= 768
    x = place["X"] + place["WIDTH"] * (3 if yes else 1) // 4

    def answered() -> bool:
        screen.do("xdotool", "mousemove", x, bottom - 15, "click", 1)
        return not screen.window()

    wait_for(answered, message="an end of the window")
    if yes:
        signed(request)
    else:
        not_confirmed(request)
