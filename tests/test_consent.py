"""A person is asked before each signature: what they are shown, and what counts as a yes.

The askpass program is mostly a script that notes what it was asked and does what the test says;
once it is a real one, on a screen.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest
from conftest import (
    PROXY,
    SHIM,
    Agent,
    Answer,
    Keys,
    Proxy,
    cannot_run,
    clean_env,
    http,
    message,
    need,
    parse_answer,
    read_message,
    rows,
    run,
    wait_for,
)

import ssh_agent_proxy as sap

TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
AUTHOR = b"A U Thor <author@example.com>"
COMMITTER = b"C O Mitter <committer@example.com>"
BEGIN = b"-----BEGIN SSH SIGNATURE-----\n"


def commit(subject: bytes = b"a subject", author: bytes = AUTHOR) -> bytes:
    """A commit without parents, as git hands it to its signer."""
    who = b"author %s 1700000000 +0000\ncommitter %s 1700000000 +0000\n" % (author, COMMITTER)
    return b"tree %s\n" % TREE.encode() + who + b"\n" + subject + b"\n"


def tag(subject: bytes = b"a subject", tagger: bytes = COMMITTER, name: bytes = b"v1") -> bytes:
    head = b"object %s\ntype commit\ntag %s\n" % (TREE.encode(), name)
    return head + b"tagger %s 1700000000 +0000\n\n%s\n" % (tagger, subject)


def push(ref: bytes = b"refs/heads/main", pushee: bytes = b"https://example.com/x.git") -> bytes:
    pusher = b"pusher SHA256:%s  1700000000 +0000\n" % (b"A" * 43)
    ids = b"%s %s" % (b"0" * 40, TREE.encode())
    head = b"certificate version 0.1\n" + pusher + b"pushee %s\nnonce 1-a\n\n" % pushee
    return head + b"%s %s\n%s refs/heads/other\n" % (ids, ref, ids)


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
    arguments: Tuple[str, ...]

    @property
    def prompt(self) -> str:
        assert len(self.arguments) == 1, self.arguments
        return self.arguments[0]

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
            pid, mode, *arguments = note.read_bytes().decode().split("\0")[:-1]
            found.append(Asked(int(pid), mode, tuple(arguments)))
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

    def number(self, name: str) -> int:
        """What the script wrote into the file NAME."""
        file = self.folder / name
        return int(wait_for(lambda: file.exists() and file.read_text().strip(), message=name))

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


@pytest.fixture
def askpass(short: Path) -> Iterator[Askpass]:
    askpass = Askpass(short / "askpass")
    yield askpass
    askpass.end()


@pytest.fixture
def confirming(
    agent: Agent, keys: Keys, askpass: Askpass, start_proxy: Callable[..., Proxy]
) -> Callable[..., Proxy]:
    """Starts a proxy that asks ASKPASS, in front of an agent with one key."""
    agent.add(keys["ed25519"])

    def start(*args: Any, **more: Any) -> Proxy:
        return start_proxy("--confirm", askpass.program, *args, upstream=agent.sock, **more)

    return start


class Request:
    """A request to sign, on its way."""

    def __init__(
        self,
        to: Any,
        payload: bytes = b"",
        source: str = "127.0.0.1",
        **headers: str,
    ) -> None:
        payload = payload or commit()
        if isinstance(to, Proxy):
            where = ("127.0.0.1", to.port)
            self.socket = socket.create_connection(where, 20, source_address=(source, 0))
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(20)
            self.socket.connect(str(to))
        fields = {"Host": "localhost", "Content-Length": str(len(payload))}
        fields.update({name.replace("_", "-"): value for name, value in headers.items()})
        head = "POST /sign HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in fields.items())
        self.socket.sendall(head.encode() + b"\r\n" + payload)

    def answer(self) -> Answer:
        with self.socket, self.socket.makefile("rb") as f:
            return parse_answer(f.read())

    def close(self) -> None:
        self.socket.close()


def signed(answer: Answer) -> None:
    assert (answer.status, answer.body[: len(BEGIN)]) == (200, BEGIN), answer


def not_confirmed(answer: Answer) -> None:
    assert answer.status == 403, answer
    assert answer.text.startswith("not confirmed: "), answer
    assert answer.text.count("\n") == 1, answer


class Shared(NamedTuple):
    """One proxy for a whole table."""

    proxy: Proxy
    askpass: Askpass


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sap.", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def share(folder: Path, keys: Keys, *args: Any) -> Iterator[Shared]:
    folder.mkdir()
    agent = Agent(folder / "agent")
    agent.add(keys["ed25519"])
    askpass = Askpass(folder / "askpass")
    argv = [sys.executable, PROXY, "--addr", "127.0.0.1:0", "--upstream", agent.sock]
    argv += ["--confirm", askpass.program, *args]
    proxy = Proxy([str(a) for a in argv], clean_env(folder))
    yield Shared(proxy, askpass)
    proxy.stop()
    agent.stop()
    askpass.end()
    assert "Traceback" not in proxy.log(), proxy.log()


@pytest.fixture(scope="module")
def patient(folder: Path, keys: Keys) -> Iterator[Shared]:
    yield from share(folder / "patient", keys)


@pytest.fixture(scope="module")
def hasty(folder: Path, keys: Keys) -> Iterator[Shared]:
    """It waits half a second, then it is a no."""
    yield from share(folder / "hasty", keys, "--timeout", "0.5")


# ---------------------------------------------------------------- what is a yes, and what is a no

YES = [
    ("exit-0", "exit 0"),
    ("an-empty-line", "echo"),
    ("yes", "echo yes"),
    ("yes-without-a-newline", "printf yes"),
    ("yes-in-capitals", "echo YES"),
    ("yes-in-both", "echo Yes"),
    ("yes-and-a-carriage-return", "printf 'yes\\r\\n'"),
    ("an-empty-line-with-carriage-return", "printf '\\r\\n'"),
    ("yes-and-further-lines", "printf 'yes\\nand more\\n'"),
    ("yes-and-further-lines-without-an-end", "echo yes; head -c 5000 /dev/zero | tr '\\0' x"),
    ("yes-and-complaints-on-stderr", "echo no >&2; echo yes"),
]

NO = [
    ("exit-1", "exit 1"),
    ("yes-and-exit-1", "echo yes; exit 1"),
    ("exit-255", "exit 255"),
    ("no", "echo no"),
    ("y", "echo y"),
    ("yess", "echo yess"),
    ("yes-and-a-word", "echo yes please"),
    ("yes-behind-a-blank", "echo ' yes'"),
    ("yes-before-a-blank", "echo 'yes '"),
    ("a-blank", "echo ' '"),
    ("a-passphrase", "echo 'correct horse'"),
    ("no-behind-2000-blanks", "printf '%2000s\\n' no"),
    ("yes-in-the-second-line", "printf 'no\\nyes\\n'"),
    ("binary", "printf '\\377\\376'"),
    ("a-long-line", "head -c 5000 /dev/zero | tr '\\0' y"),
    ("SIGKILL", "kill -KILL $$"),
    ("SIGTERM", "kill -TERM $$"),
    ("SIGTERM-after-yes", "echo yes; kill -TERM $$"),
]

NO_IN_TIME = [
    ("no-answer", "exec sleep 600"),
    ("no-answer-after-yes", "echo yes; exec sleep 600"),
    ("output-without-end", "exec yes"),
    ("output-without-end-or-newline", "exec cat /dev/zero"),
    ("stdout-closed-and-running-on", "exec >&-; exec sleep 600"),
    ("a-child-left-behind-with-stdout", "sleep 600 & exit 0"),
    ("ignoring-SIGTERM", "trap '' TERM; while :; do read -r x <\"$here/answers\"; done"),
]


@pytest.mark.parametrize("does", rows(YES))
def test_a_yes(patient: Shared, does: str) -> None:
    patient.askpass.does(does)
    signed(http(patient.proxy.port, "POST", "/sign", commit()))


@pytest.mark.parametrize("does", rows(NO))
def test_everything_else_is_a_no(patient: Shared, does: str) -> None:
    patient.askpass.does(does)
    not_confirmed(http(patient.proxy.port, "POST", "/sign", commit()))


@pytest.mark.parametrize("does", rows(NO_IN_TIME))
def test_no_answer_in_time_is_a_no_and_nothing_runs_on(hasty: Shared, does: str) -> None:
    hasty.askpass.does(does)
    before = len(hasty.askpass.asked())
    not_confirmed(http(hasty.proxy.port, "POST", "/sign", commit()))
    started = hasty.askpass.wait(before + 1)
    wait_for(lambda: not group(started.pid), message="an end of all that the askpass started")


def test_output_without_end_takes_no_memory(hasty: Shared) -> None:
    hasty.askpass.does("exit 1")
    not_confirmed(http(hasty.proxy.port, "POST", "/sign", commit()))  # what every askpass takes
    hasty.askpass.does("exec cat /dev/zero")

    def peak() -> int:
        status = Path(f"/proc/{hasty.proxy.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+([0-9]+) kB", status)[0])

    before = peak()
    not_confirmed(http(hasty.proxy.port, "POST", "/sign", commit()))
    assert peak() - before < 4096


def group(leader: int) -> List[int]:
    """The processes that run in this process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, its = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its) == leader and state != "Z":
                found.append(int(folder.name))
    return found


def test_the_log_says_that_it_was_not_confirmed(patient: Shared) -> None:
    patient.askpass.does("exit 1")
    not_confirmed(http(patient.proxy.port, "POST", "/sign", commit(b"for the log")))
    line = patient.proxy.wait_log(r'^.*subject="for the log".*$').group()
    assert "outcome=refused" in line
    assert "status=403" in line
    assert "not confirmed: " in line


@pytest.mark.parametrize("how", ["removed", "not-executable", "another-folder", "not-a-program"])
def test_a_program_that_is_gone_later_is_a_no(
    askpass: Askpass, confirming: Callable[..., Proxy], how: str
) -> None:
    askpass.does("exit 0")
    proxy = confirming()
    if how == "removed":
        askpass.program.unlink()
    elif how == "not-executable":
        askpass.program.chmod(0o644)
    elif how == "another-folder":
        askpass.program.unlink()
        askpass.program.mkdir()
    else:
        askpass.program.write_bytes(b"\x7fELF\0")
    answer = http(proxy.port, "POST", "/sign", commit())
    not_confirmed(answer)
    assert "askpass program" in answer.text
    proxy.wait_log(re.escape(str(askpass.program)))


def test_it_is_told_that_a_yes_is_wanted(patient: Shared) -> None:
    patient.askpass.does("exit 0")
    before = len(patient.askpass.asked())
    signed(http(patient.proxy.port, "POST", "/sign", commit()))
    asked = patient.askpass.wait(before + 1)
    assert asked.mode == "confirm"
    assert len(asked.arguments) == 1


# ---------------------------------------------------------------- the setting


def refused_start(home: Path, *args: Any, **variables: Any) -> str:
    argv = [sys.executable, PROXY, "--addr", "127.0.0.1:0", "--upstream", "/nowhere", *args]
    done = run(argv, env=clean_env(home, **variables), check=False, timeout=20)
    error = done.stderr.decode()
    assert done.returncode == 2, error
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    "value", ["nowhere/askpass", "{home}", "{home}/plain", "plain", "no-such-program-here",
              "$NO_SUCH_VARIABLE/askpass", "~/nothing"],
)  # fmt: skip
def test_what_is_no_program_stops_the_start(home: Path, value: str) -> None:
    (home / "plain").write_text("#!/bin/sh\n")
    (home / "plain").chmod(0o644)
    value = value.format(home=home)
    error = refused_start(home, "--confirm", value, PATH=f"{home}:{os.environ['PATH']}")
    assert "--confirm: " in error
    assert value.lstrip("~") in error


def test_the_variable_is_named_where_it_names_no_program(home: Path) -> None:
    error = refused_start(home, SSH_AGENT_PROXY_CONFIRM="/nowhere/askpass")
    assert "SSH_AGENT_PROXY_CONFIRM: '/nowhere/askpass' is no program" in error


@pytest.mark.parametrize("by", ["option", "variable"])
def test_a_time_for_a_yes_that_nobody_is_asked_for_stops_the_start(home: Path, by: str) -> None:
    if by == "option":
        error = refused_start(home, "--confirm-for", "600")
    else:
        error = refused_start(home, SSH_AGENT_PROXY_CONFIRM_FOR="600")
    assert re.search(r"CONFIRM_FOR|--confirm-for", error)
    assert re.search(r"CONFIRM\b|--confirm\b", error)


@pytest.mark.parametrize("value", ["x", "-1", "inf", "10m", "٣", "9" * 30])
def test_a_time_that_is_no_number_of_seconds_stops_the_start(home: Path, value: str) -> None:
    error = refused_start(home, "--confirm", "true", f"--confirm-for={value}")
    assert "--confirm-for: " in error


@pytest.mark.parametrize("value", ["{program}", "askpass", "~/askpass", "%h/askpass",
                                   "$WHERE/askpass", "${{WHERE}}/askpass"])  # fmt: skip
def test_how_the_program_may_be_named(
    agent: Agent, keys: Keys, askpass: Askpass, start_proxy: Callable[..., Proxy], value: str
) -> None:
    agent.add(keys["ed25519"])
    askpass.does("exit 0")
    env = {"WHERE": askpass.folder, "PATH": f"{askpass.folder}:{os.environ['PATH']}"}
    if value[0] in "~%":
        env["HOME"] = askpass.folder
    proxy = start_proxy("--confirm", value.format(program=askpass.program), upstream=agent.sock,
                        env=env)  # fmt: skip
    signed(http(proxy.port, "POST", "/sign", commit()))
    assert len(askpass.asked()) == 1


# ---------------------------------------------------------------- one at a time


def test_no_two_prompts_are_open_at_once(
    askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    askpass.does(f'mkdir "$here/open" || touch "$here/overlap"; {WAITS}')
    proxy = confirming()
    requests = [Request(proxy, commit(b"%d" % n)) for n in range(5)]
    for number in range(1, 6):
        askpass.wait(number)
        assert http(proxy.port, "GET", "/healthz").status == 200  # gives a second one its time
        askpass.answer('rmdir "$here/open"')
    for request in requests:
        signed(request.answer())
    assert not (askpass.folder / "overlap").exists()
    subjects = [asked.facts["subject"] for asked in askpass.asked()]
    assert sorted(subjects) == list("01234")


def test_the_time_in_the_queue_counts(askpass: Askpass, confirming: Callable[..., Proxy]) -> None:
    askpass.does("sleep 0.4")
    proxy = confirming("--timeout", "1")
    answers = [r.answer() for r in [Request(proxy) for _ in range(20)]]
    late = [answer for answer in answers if answer.status != 200]
    for answer in late:
        not_confirmed(answer)
    # Twenty times 0.4 s are more than a second: not all have had a prompt of their own.
    assert any("another prompt" in answer.text for answer in late)
    assert len(askpass.started()) < 20


def test_a_client_that_goes_away_takes_its_prompt_along_and_the_next_is_asked(
    askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    askpass.does(f'sleep 600 & echo $! >"$here/child"; {WAITS}')
    proxy = confirming()
    first = Request(proxy, commit(b"first"))
    asked = askpass.wait()
    child = askpass.number("child")
    second = Request(proxy, commit(b"second"))
    first.close()
    wait_for(lambda: not runs(asked.pid), message="the end of the askpass")
    wait_for(lambda: not runs(child), message="the end of what it started")
    assert askpass.wait(2).facts["subject"] == "second"
    askpass.answer('kill "$!"')
    signed(second.answer())
    assert len(askpass.asked()) == 2
    proxy.wait_log(r"outcome=gone .*subject=first")


@pytest.mark.parametrize(("shown", "expected"), [(True, [1]), (False, [])])
def test_a_click_on_its_way_to_a_prompt_that_goes_hits_no_other(
    shown: bool, expected: List[float], monkeypatch: pytest.MonkeyPatch
) -> None:
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
        patch.setattr(sap, "time", types.SimpleNamespace(
            sleep=pauses.append, monotonic=time.monotonic
        ))  # fmt: skip
        with pytest.raises(sap.ClientGone):
            consent.obtain("60", ("someone",), ours)
    thread.join()
    assert pauses == expected
    assert not consent.lock.locked()
    ours.close()

def test_a_client_that_goes_away_ends_an_askpass_that_ignores_it(
    askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    askpass.does(f'trap "" TERM; {WAITS}')
    request = Request(confirming())
    asked = askpass.wait()
    request.close()
    wait_for(lambda: not runs(asked.pid), message="the end of the askpass")


def test_a_client_that_goes_away_in_the_queue_is_never_asked_for(
    askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    proxy = confirming()
    first = Request(proxy, commit(b"first"))
    askpass.wait()
    second = Request(proxy, commit(b"second"))
    third = Request(proxy, commit(b"third"))
    second.close()
    proxy.wait_log(r"outcome=gone .*subject=second")
    askpass.answer()
    signed(first.answer())
    assert askpass.wait(2).facts["subject"] == "third"
    askpass.answer()
    signed(third.answer())
    assert len(askpass.asked()) == 2


def test_those_that_leave_the_queue_as_it_moves_on_are_never_asked_for(
    short: Path, askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    proxy = confirming(addr=f"127.0.0.1:0,unix:{short}/socket")
    first = Request(short / "socket", commit(b"first"))
    asked = askpass.wait()
    # A Unix socket, since its close is seen at once.
    queue = [Request(short / "socket", commit(b"leaving")) for _ in range(10)]
    assert http(proxy.port, "GET", "/healthz").status == 200
    for request in queue:
        request.close()
    askpass.answer()
    signed(first.answer())
    wait_for(lambda: len(re.findall("outcome=gone .*subject=leaving", proxy.log())) == 10)
    assert askpass.started() == [asked.pid]


def test_an_open_prompt_holds_up_nothing_else_and_nothing_else_is_asked_about(
    short: Path, askpass: Askpass, keys: Keys, confirming: Callable[..., Proxy]
) -> None:
    tokens = short / "tokens"
    tokens.write_text("secret laptop\n")
    tokens.chmod(0o600)
    proxy = confirming("--token-file", tokens, "--payloads", "commit",
                       "--pubkey", keys.line("ed25519"))  # fmt: skip
    token = {"Authorization": "Bearer secret"}
    request = Request(proxy, **token)
    opened = askpass.wait()

    def ask(method: str, path: str, body: Optional[bytes] = None, **more: str) -> int:
        headers = {**token, **{name.replace("_", "-"): value for name, value in more.items()}}
        return http(proxy.port, method, path, body, headers).status

    assert ask("GET", "/healthz") == 200
    assert ask("GET", "/publickey") == 200
    assert ask("GET", "/shim") == 200
    assert ask("POST", "/sign", commit(), Origin="http://localhost") == 403
    assert ask("POST", "/sign", commit(), Sec_Fetch_Site="same-origin") == 403
    assert ask("POST", "/sign", commit(), Host="evil.example") == 421
    assert ask("POST", "/sign", commit(), Authorization="Bearer guessed") == 401
    assert ask("POST", "/sign", commit(), SSHSIG_Namespace="file") == 403
    assert ask("POST", "/sign", commit(), SSHSIG_Hash="md5") == 400
    assert ask("POST", "/sign", commit(), SSHSIG_Key=keys.line("other")) == 403
    assert ask("POST", "/sign", tag()) == 403
    assert ask("POST", "/sign", b"anything") == 403
    assert ask("POST", "/sign", b"") == 400
    assert [asked.pid for asked in askpass.asked()] == [opened.pid]
    assert runs(opened.pid)
    askpass.answer()
    signed(request.answer())


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
def watched(
    scripted_agent: Callable[..., Path], askpass: Askpass, start_proxy: Callable[..., Proxy]
) -> Iterator[Tuple[Watched, Proxy]]:
    agent = Watched(scripted_agent)
    proxy = start_proxy("--confirm", askpass.program, upstream=agent.path)
    proxy.wait_log("can't work yet")  # it has listed the keys, for the log
    agent.asked.clear()
    yield agent, proxy


def test_the_agent_is_asked_after_the_yes(
    watched: Tuple[Watched, Proxy], askpass: Askpass, keys: Keys
) -> None:
    agent, proxy = watched
    request = Request(proxy, SSHSIG_Key=keys.line("ed25519"))
    askpass.wait()
    assert agent.asked == []
    askpass.answer()
    assert request.answer().status == 503  # refused, and no key is listed
    assert sap.SSH_AGENTC_SIGN_REQUEST in agent.asked


@pytest.mark.parametrize("how", ["no", "killed", "gone"])
def test_without_a_yes_the_agent_hears_of_nothing(
    watched: Tuple[Watched, Proxy], askpass: Askpass, keys: Keys, how: str
) -> None:
    agent, proxy = watched
    request = Request(proxy, SSHSIG_Key=keys.line("ed25519"))
    askpass.wait()
    if how == "gone":
        request.close()
    else:
        askpass.answer("exit 1" if how == "no" else "kill $$")
        not_confirmed(request.answer())
    proxy.wait_log("outcome=gone" if how == "gone" else "outcome=refused")
    assert agent.asked == []


# ---------------------------------------------------------------- the proxy's own end


def stop(proxy: Proxy, signals: int) -> None:
    for number in range(signals):
        proxy.process.send_signal(signal.SIGTERM)
        if not number:
            proxy.wait_log("stopping")


def test_a_prompt_that_is_open_at_the_end_can_still_be_answered(
    askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    proxy = confirming()
    request = Request(proxy)
    askpass.wait()
    stop(proxy, 1)
    askpass.answer()
    signed(request.answer())
    assert proxy.process.wait(20) == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_the_end_of_the_proxy_is_the_end_of_the_prompt(
    askpass: Askpass, confirming: Callable[..., Proxy], signals: int
) -> None:
    askpass.does(f'sleep 600 & echo $! >"$here/child"; {WAITS}')
    proxy = confirming()
    request = Request(proxy)
    asked = askpass.wait()
    child = askpass.number("child")
    stop(proxy, signals)
    assert proxy.process.wait(30) == 0
    wait_for(lambda: not runs(asked.pid), message="the end of the askpass")
    wait_for(lambda: not runs(child), message="the end of what it started")
    request.close()


def test_no_prompt_out_of_the_queue_outlives_the_proxy(
    askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    """As one prompt is ended, the next in the queue must not come."""
    proxy = confirming()
    requests = [Request(proxy, commit(b"%d" % n)) for n in range(20)]
    askpass.wait()
    assert http(proxy.port, "GET", "/healthz").status == 200  # the others are in the queue by now
    stop(proxy, 2)
    assert proxy.process.wait(30) == 0
    wait_for(lambda: not running(askpass), message="the end of every askpass")
    for request in requests:
        request.close()
    assert len(askpass.started()) == 1


def running(askpass: Askpass) -> List[int]:
    """The processes that run this script."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = file.read_bytes().split(b"\0")
            if str(askpass.program).encode() in words[:2]:
                found.append(int(file.parent.name))
    return found


def test_a_prompt_that_the_end_of_the_proxy_closes_is_no_yes(
    watched: Tuple[Watched, Proxy], askpass: Askpass, keys: Keys
) -> None:
    """It is sent SIGTERM; one that leaves with exit 0 at that has not been agreed to."""
    agent, proxy = watched
    askpass.does("trap 'exit 0' TERM; sleep 600 >/dev/null 2>&1 & : >\"$here/ready\"; wait")
    request = Request(proxy, SSHSIG_Key=keys.line("ed25519"))
    wait_for((askpass.folder / "ready").exists)
    stop(proxy, 2)
    assert proxy.process.wait(30) == 0
    request.close()
    assert agent.asked == []


# ---------------------------------------------------------------- a yes that holds


class Repository:
    """A repository whose commits are signed through the shim and PROXY, by the key KEY."""

    def __init__(self, home: Path, proxy: Proxy, keys: Keys) -> None:
        self.path = home / "repository"
        self.shim = home / "ssh-agent-proxy-sign"
        shutil.copyfile(SHIM, self.shim)
        self.shim.chmod(0o755)
        self.env = clean_env(home, SSH_AGENT_PROXY_URL=f"{proxy.url}/sign")
        signers = home / "signers"
        signers.write_text(f"committer@example.com {keys.line('ed25519')}\n")
        run(["git", "init", "-q", "-b", "main", self.path], env=self.env)
        for name, value in {
            "gpg.format": "ssh",
            "gpg.ssh.program": self.shim,
            "gpg.ssh.allowedSignersFile": signers,
            "user.signingkey": f"{keys['ed25519']}.pub",
        }.items():
            self.git("config", name, value)

    def git(self, *args: Any, check: bool = True, **env: Any) -> subprocess.CompletedProcess[bytes]:
        return run(["git", *args], env={**self.env, **env}, cwd=self.path, check=check)

    def text(self, *args: Any) -> str:
        return self.git(*args).stdout.decode().strip()

    def signing(self, *args: Any) -> subprocess.Popen[bytes]:
        """Git, on its way."""
        return subprocess.Popen(
            ["git", *map(str, args)], env=self.env, cwd=self.path,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip


def test_a_rebase_of_thirty_commits_asks_once_and_a_tag_within_once_more(
    home: Path, keys: Keys, askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    askpass.does("exit 0")
    repository = Repository(home, confirming("--confirm-for", "600"), keys)
    for number in range(31):
        repository.git("commit", "-q", "--allow-empty", "-m", f"commit {number}")
    editor = "sed -i '15a exec git tag -s -m middle middle'"
    repository.git("rebase", "-q", "-i", "-S", "--no-ff", "--keep-empty", "HEAD~30",
                   GIT_SEQUENCE_EDITOR=editor)  # fmt: skip
    assert repository.text("log", "--format=%G?", "HEAD~30..").split() == 30 * ["G"]
    repository.git("verify-tag", "middle")
    prompts = [asked.prompt.split("\n")[0] for asked in askpass.asked()]
    assert prompts == ["Sign this commit?", "Sign this tag?"]
    holds = [asked.facts["a yes holds"] for asked in askpass.asked()]
    assert holds == ["for 600 s, and every commit", "for 600 s, and every tag"]


@pytest.fixture
def holding(short: Path, askpass: Askpass, confirming: Callable[..., Proxy]) -> Proxy:
    """A yes holds, for longer than any test takes; the person agrees to all."""
    askpass.does("exit 0")
    addr = f"127.0.0.1:0,unix:{short}/socket"
    return confirming("--confirm-for", "600", "--namespace", "git,file", addr=addr)


def test_a_yes_holds_for_the_same_address_whatever_the_port(
    askpass: Askpass, holding: Proxy
) -> None:
    first, second = Request(holding), Request(holding, commit(b"another"))
    assert first.socket.getsockname()[1] != second.socket.getsockname()[1]
    signed(first.answer())
    signed(second.answer())
    assert len(askpass.asked()) == 1


CHANGES: List[Tuple[str, Dict[str, Any]]] = [
    ("kind-tag", {"payload": tag()}),
    ("kind-push", {"payload": push()}),
    ("kind-other", {"payload": b"anything"}),
    ("namespace", {"SSHSIG_Namespace": "file"}),
    ("address", {"source": "127.0.0.2"}),
]


@pytest.mark.parametrize("changed", rows(CHANGES))
def test_a_yes_holds_for_nothing_else(
    askpass: Askpass, holding: Proxy, changed: Dict[str, Any]
) -> None:
    signed(Request(holding).answer())
    signed(Request(holding, **changed).answer())
    assert len(askpass.asked()) == 2
    signed(Request(holding, **changed).answer())
    signed(Request(holding).answer())
    assert len(askpass.asked()) == 2  # and the first still holds


def test_a_yes_holds_for_one_named_key(
    agent: Agent, keys: Keys, askpass: Askpass, holding: Proxy
) -> None:
    agent.add(keys["other"])
    signed(Request(holding, SSHSIG_Key=keys.line("ed25519")).answer())
    signed(Request(holding, SSHSIG_Key=keys.line("other")).answer())
    signed(Request(holding, SSHSIG_Key=keys.line("other")).answer())
    fingerprints = [run(["ssh-keygen", "-lf", keys[name]]).stdout.decode().split()[1]
                    for name in ("ed25519", "other")]  # fmt: skip
    assert [asked.facts["key"] for asked in askpass.asked()] == fingerprints


def test_a_yes_to_a_unix_peer_holds_for_its_uid_and_not_for_another_uid_or_an_address(
    short: Path, askpass: Askpass, holding: Proxy
) -> None:
    if os.geteuid():
        cannot_run("only root can be somebody else")
    curl = need("curl", "curl")
    path = short / "socket"
    signed(Request(path).answer())
    signed(Request(path).answer())
    assert len(askpass.asked()) == 1

    def as_another(uid: int) -> bytes:
        argv = [curl, "-sS", "--unix-socket", str(path), "--data-binary", "@-",
                "http://localhost/sign"]  # fmt: skip
        done = subprocess.run(argv, input=commit(), stdout=subprocess.PIPE, user=uid,
                              group=uid, extra_groups=[], timeout=20)  # fmt: skip
        return done.stdout

    short.chmod(0o711)
    path.chmod(0o666)  # the proxy would want tokens for that, and then the token counts
    assert as_another(65534).startswith(BEGIN)
    assert as_another(65534).startswith(BEGIN)
    assert len(askpass.asked()) == 2
    assert re.search(r"\b65534\b", askpass.wait(2).facts["asked by"])
    signed(Request(holding).answer())
    assert len(askpass.asked()) == 3


def test_a_yes_holds_for_one_token(
    short: Path, askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    askpass.does("exit 0")
    tokens = short / "tokens"
    tokens.write_text("first-secret laptop\nsecond-secret laptop\n")
    tokens.chmod(0o600)
    proxy = confirming("--confirm-for", "600", "--token-file", tokens)
    for token, number in (("first", 1), ("first", 1), ("second", 2), ("second", 2), ("first", 2)):
        headers = {"Authorization": f"Bearer {token}-secret"}
        signed(http(proxy.port, "POST", "/sign", commit(), headers))
        assert len(askpass.asked()) == number
    other_place = Request(proxy, source="127.0.0.2", Authorization="Bearer first-secret")
    signed(other_place.answer())
    assert len(askpass.asked()) == 2


def test_a_yes_ends_however_often_it_is_used(
    askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    askpass.does("exit 0")
    proxy = confirming("--confirm-for", "1")

    def asked_again() -> bool:
        signed(Request(proxy).answer())
        return len(askpass.asked()) == 2

    wait_for(asked_again)


def test_without_a_time_each_signature_is_asked_for(
    askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    askpass.does("exit 0")
    proxy = confirming()
    for number in range(1, 4):
        signed(Request(proxy).answer())
        assert len(askpass.asked()) == number


def test_a_no_is_not_remembered(askpass: Askpass, confirming: Callable[..., Proxy]) -> None:
    proxy = confirming("--confirm-for", "600")
    requests = [Request(proxy) for _ in range(3)]
    for number, answer in ((1, "exit 1"), (2, "exit 1"), (3, "exit 0")):
        askpass.wait(number)
        askpass.answer(answer)
    statuses = sorted(request.answer().status for request in requests)
    assert statuses == [200, 403, 403]
    signed(Request(proxy).answer())
    assert len(askpass.asked()) == 3


def test_a_no_does_not_end_a_yes_to_something_else(
    askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    proxy = confirming("--confirm-for", "600")
    askpass.does("exit 0")
    signed(Request(proxy).answer())
    askpass.does("exit 1")
    not_confirmed(Request(proxy, tag()).answer())
    signed(Request(proxy).answer())
    assert len(askpass.asked()) == 2


def test_those_in_the_queue_ride_on_the_first_yes(
    askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    proxy = confirming("--confirm-for", "600")
    requests = [Request(proxy, commit(b"%d" % n)) for n in range(5)]
    askpass.wait()
    askpass.answer()
    for request in requests:
        signed(request.answer())
    assert len(askpass.asked()) == 1


# ---------------------------------------------------------------- what the prompt says


def ask(shared: Shared, payload: bytes, **headers: str) -> Asked:
    """What is asked about PAYLOAD."""
    before = len(shared.askpass.asked())
    shared.askpass.does("exit 0")
    signed(Request(shared.proxy, payload, **headers).answer())
    return shared.askpass.wait(before + 1)


def test_what_is_said_of_a_commit_by_git(
    home: Path, keys: Keys, askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    askpass.does("exit 0")
    repository = Repository(home, confirming(), keys)
    (repository.path / "file").write_text("content\n")
    repository.git("add", "file")
    repository.git("commit", "-q", "-m", "unsigned")
    repository.git("commit", "-q", "--allow-empty", "-S", "-m", "The first line\n\nAnd more.")
    asked = askpass.wait()
    assert asked.prompt.startswith("Sign this commit?\n")
    facts = asked.facts
    by = facts.pop("asked by")
    assert re.search(r"(^|\s)127\.0\.0\.1(:[0-9]+)?\b", by)
    key = run(["ssh-keygen", "-lf", keys["ed25519"]]).stdout.decode().split()[1]
    assert facts == {
        "subject": "The first line",
        "author": "A U Thor <author@example.com>",
        "committer": "C O Mitter <committer@example.com>",
        "tree": repository.text("rev-parse", "HEAD^{tree}"),
        "parents": "1",
        "namespace": "git",
        "key": key,
    }


def test_what_is_said_of_a_tag_by_git(
    home: Path, keys: Keys, askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    askpass.does("exit 0")
    repository = Repository(home, confirming(), keys)
    repository.git("commit", "-q", "--allow-empty", "-m", "unsigned")
    repository.git("tag", "-s", "-m", "The first line", "v1")
    asked = askpass.wait()
    assert asked.prompt.startswith("Sign this tag?\n")
    facts = asked.facts
    for name in ("asked by", "key"):
        assert facts.pop(name)
    assert facts == {
        "subject": "The first line",
        "tag": "v1",
        "tagger": "C O Mitter <committer@example.com>",
        "object": repository.text("rev-parse", "HEAD"),
        "type": "commit",
        "namespace": "git",
    }


def test_what_is_said_of_a_push(patient: Shared) -> None:
    asked = ask(patient, push())
    assert asked.prompt.startswith("Sign this push?\n")
    facts = asked.facts
    for name in ("asked by", "key"):
        assert facts.pop(name)
    assert facts == {
        "subject": "refs/heads/main",
        "refs": "2",
        "pusher": "SHA256:" + 43 * "A",
        "pushee": "https://example.com/x.git",
        "namespace": "git",
    }


def test_of_what_is_none_of_git_s_the_size_is_said_and_nothing_of_its_text(patient: Shared) -> None:
    asked = ask(patient, b"subject: a commit of yours\n" * 4)
    assert asked.prompt.startswith("Sign ")
    assert "no git commit" in asked.prompt
    assert "108 bytes" in asked.prompt
    assert "of yours" not in asked.prompt


def test_the_prompt_names_the_token(
    short: Path, askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    askpass.does("exit 0")
    tokens = short / "tokens"
    tokens.write_text(f"secret-one laptop\nsecret-two\nsecret-three {'n' * 5000}\n")
    tokens.chmod(0o600)
    proxy = confirming("--token-file", tokens)
    for token, name in (("one", "laptop"), ("two", "line 2"), ("three", 20 * "n")):
        headers = {"Authorization": f"Bearer secret-{token}"}
        signed(http(proxy.port, "POST", "/sign", commit(), headers))
        asked = askpass.asked()[-1]
        assert f"token {name}" in asked.facts["asked by"]
        assert "secret" not in asked.prompt
        well_formed(asked)


def test_the_prompt_names_a_unix_peer(
    short: Path, askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    askpass.does("exit 0")
    confirming(addr=f"127.0.0.1:0,unix:{short}/socket")
    signed(Request(short / "socket").answer())
    by = askpass.wait().facts["asked by"]
    assert "unix" in by
    assert re.search(rf"\b{os.getpid()}\b", by)
    assert re.search(rf"\b{os.geteuid()}\b", by)


# ---------------------------------------------------------------- what it can be made to say

LABELS = {
    "subject", "author", "committer", "tree", "parents", "tag", "tagger", "object", "type",
    "refs", "pusher", "pushee", "namespace", "key", "asked by", "a yes holds", "encoding",
}  # fmt: skip

# Unicode's Default_Ignorable_Code_Point, and blanks that are letters or symbols to it.
INVISIBLE = {
    chr(number)
    for first, last in (
        (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5),
        (0x180B, 0x180F), (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x2800, 0x2800),
        (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8),
        (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
    )
    for number in range(first, last + 1)
}  # fmt: skip


def well_formed(asked: Asked) -> None:
    """Whatever the client wrote, a line is a line of ours."""
    assert asked.prompt.startswith("Sign ")
    lines = asked.prompt.split("\n")
    assert asked.prompt.splitlines() == lines
    assert lines[0].endswith("?")
    assert lines[1] == ""
    # A screen may wrap a long line anywhere: the mark is what tells ours from what looks like one.
    assert all(line.startswith("• ") and line.count("•") == 1 for line in lines[2:])
    labels = [line[2:].partition(": ")[0] for line in lines[2:]]
    assert set(labels[:3]) == {"asked by", "key", "namespace"}  # what the proxy knows comes first
    assert set(labels) <= LABELS
    assert len(set(labels)) == len(labels)
    assert {"key", "namespace", "asked by"} <= set(labels)
    for line in lines:
        assert line.isprintable()
        assert not INVISIBLE & set(line)
        assert "  " not in line
        assert len(line) <= 100


HOSTILE = [
    ("carriage-return", "real\rauthor: Someone Else"),
    ("vertical-tab", "real\vauthor: Someone Else"),
    ("form-feed", "real\fauthor: Someone Else"),
    ("file-separator", "real\x1cauthor: Someone Else"),
    ("next-line", "real\x85author: Someone Else"),
    ("line-separator", "real\u2028author: Someone Else"),
    ("paragraph-separator", "real\u2029author: Someone Else"),
    ("tabs", "real\t\t\t\tauthor: Someone Else"),
    ("backspaces", "evil" + 4 * "\b" + "good"),
    ("escape-colour", "\x1b[31mred\x1b[0m"),
    ("escape-title", "\x1b]0;title\x07"),
    ("escape-clear", "\x1b[2J\x1b[HSign nothing?"),
    ("csi-8-bit", "\x9b2J"),
    ("delete", "a\x7fb"),
    ("bidi-override", "\u202egnihtemos\u202c"),
    ("bidi-isolate", "\u2066\u2067\u2068hidden\u2069"),
    ("arabic-letter-mark", "\u061c\u200e\u200f"),
    ("zero-width", "a\u200b\u200c\u200d\u2060\ufeffb"),
    ("soft-hyphen", "pass\u00adword"),
    ("tag-characters", "v1" + "".join(chr(0xE0000 + ord(c)) for c in "hidden")),
    ("variation-selectors", "a\ufe0f\U000e0100"),
    ("hangul-fillers", "\u115f\u1160\u3164\uffa0"),
    ("braille-blank", 100 * "\u2800" + "author: Someone Else"),
    ("no-break-spaces", 200 * "\u00a0" + "author: Someone Else"),
    ("ideographic-spaces", 200 * "\u3000" + "author: Someone Else"),
    ("blanks", "real" + 200 * " " + "author: Someone Else"),
    ("only-blanks", 200 * " "),
    ("long", 10_000 * "x"),
    ("long-and-wide", 10_000 * "\u6f22"),
    ("long-escapes", 10_000 * "\u202e"),
    ("further-lines", "fix: typo author: Someone Else key: SHA256:x asked by: nobody"),
    ("marked-lines", "fix: typo • author: Someone Else • key: SHA256:x •"),
    ("a-prompt", "Sign this commit?"),
    ("an-option", "-h"),
    ("a-long-option", "--help"),
    ("an-option-s-end", "--"),
    ("markup", "<span size='1'>&lt;b&gt;</span>&amp;"),
    ("shell", "$(touch /tmp/x) `id` ${HOME} ; exit 0 ' \""),
    ("format", "%s%s%n {0} \\n \\x41"),
    ("surrogates", "\ud800\udfff"),
    ("private-use", "\ue000\U0010fffd"),
    ("noncharacters", "\ufffe\uffff\U0010ffff"),
]  # fmt: skip


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def person(text: str) -> bytes:
    return b"%s <x@example.com>" % encoded(re.sub("[<>]", "", text))


@pytest.mark.parametrize("text", rows(HOSTILE))
def test_no_text_of_a_commit_breaks_out_of_its_line(patient: Shared, text: str) -> None:
    asked = ask(patient, commit(encoded(text), author=person(text)))
    assert asked.prompt.startswith("Sign this commit?\n")
    well_formed(asked)
    assert asked.facts["namespace"] == "git"
    assert asked.facts["tree"] == TREE


@pytest.mark.parametrize("text", rows(HOSTILE))
def test_no_text_of_another_payload_breaks_out_of_its_line(text: str) -> None:
    facts = {"namespace": "git", "key": "SHA256:x", "asked by": "127.0.0.1:1"}
    for data in (tag(encoded(text), person(text)), push(pushee=encoded(text))):
        payload = sap.parse_payload(data)
        asked = Asked(0, "", (sap.consent_prompt(payload, facts),))
        assert asked.prompt.startswith(f"Sign this {payload.kind}?\n")
        assert payload.kind in ("tag", "push")
        well_formed(asked)
        assert facts.items() <= asked.facts.items()


def test_bytes_that_are_no_text_are_escaped(patient: Shared) -> None:
    asked = ask(patient, commit(b"\xff\xfe\xc0\xae\x80", author=b"\xe9 <\xa0@example.com>"))
    well_formed(asked)
    assert asked.facts["subject"] == r"\udcff\udcfe\udcc0\udcae\udc80"
    assert asked.facts["author"] == r"\udce9 <\udca0@example.com>"


@pytest.mark.parametrize("text", rows([
    ("long", 10_000 * "x"), ("wide", 10_000 * "\u6f22"), ("escapes", 10_000 * "\u202e"),
]))  # fmt: skip
def test_a_line_that_was_cut_says_so(patient: Shared, text: str) -> None:
    assert ask(patient, commit(encoded(text))).facts["subject"].endswith("…")


@pytest.mark.parametrize("text", rows([
    ("latin", "Ünïcödé, naïve façade"), ("greek", "Ένα μήνυμα"), ("japanese", "日本語の説明"),
    ("hebrew", "שלום עולם"), ("emoji", "🚀 launch"), ("quotes", "it's \"quoted\" <b> & 100%"),
    ("backslash", r"C:\new"),
]))  # fmt: skip
def test_text_that_does_no_harm_is_shown_as_it_is(patient: Shared, text: str) -> None:
    assert ask(patient, commit(encoded(text))).facts["subject"] == text


def test_a_commit_made_by_hash_object_is_asked_for_in_lines_of_ours(
    home: Path, keys: Keys, askpass: Askpass, confirming: Callable[..., Proxy]
) -> None:
    """Git itself refuses little of what a commit may hold; here it amends one."""
    askpass.does("exit 0")
    repository = Repository(home, confirming(), keys)
    repository.git("commit", "-q", "--allow-empty", "-m", "unsigned")
    tree = repository.text("rev-parse", "HEAD^{tree}").encode()
    hostile = "real\vauthor: Someone Else\u2028key: none\x1b[2J\u202e"
    data = commit(encoded(hostile), b"\x1b[2J\xc2\x85\xe2\x80\xae <a@example.com>")
    file = home / "commit"
    file.write_bytes(data.replace(TREE.encode(), tree))
    name = repository.text("hash-object", "-t", "commit", "-w", "--literally", file)
    repository.git("reset", "-q", "--hard", name)
    repository.git("commit", "-q", "--amend", "--no-edit", "--allow-empty", "-S",
                   "--cleanup=verbatim")  # fmt: skip
    asked = askpass.wait()
    well_formed(asked)
    assert asked.facts["subject"].startswith("real author: Someone Else key: none")
    assert asked.facts["author"].endswith("<a@example.com>")


def test_whatever_is_not_seen_is_escaped() -> None:
    """All of Unicode."""
    for first in range(0, sys.maxunicode + 1, 256):
        text = "".join(map(chr, range(first, first + 256)))
        shown = sap.printable(text, 10_000)
        assert shown.isprintable(), hex(first)
        assert not INVISIBLE & set(shown), hex(first)


@pytest.mark.parametrize("size", [0, 1, 79, 80, 81, 82, 1000])
@pytest.mark.parametrize("character", ["x", "\n", "\u202e", "\U000e0041", "é"])
def test_what_is_shown_has_a_limit(size: int, character: str) -> None:
    shown = sap.printable(size * character, 80)
    assert len(shown) <= 80
    whole = sap.printable(size * character, 100_000)
    assert shown == whole or (shown.endswith("…") and whole.startswith(shown[:-1]))


@pytest.mark.parametrize("data", rows([
    ("commit", commit(b"subject: x\r\x85asked by: y")), ("tag", tag(b"\x1b\x85\ttype: x")),
    ("push", push("refs/heads/\u202e\u2028x".encode())), ("other", b"\x1b[2J\nkey: x\n"),
]))  # fmt: skip
def test_the_prompt_alone_is_well_formed(data: bytes) -> None:
    facts = {"namespace": "git", "key": "SHA256:\u202e\nkey: x", "asked by": "x\n\x1b[2J, token \n"}
    well_formed(Asked(0, "", (sap.consent_prompt(sap.parse_payload(data), facts),)))


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


@pytest.mark.parametrize(
    ("button", "subject"),
    rows([
        ("yes", "Yes", "Fix what nobody had seen"),
        ("no", "No", "Fix what nobody had seen"),
        ("hostile", "No", "-h " + 100 * "W \u202e " + "\v".join(30 * ["author: Someone Else"])),
    ]),
)  # fmt: skip
def test_a_real_askpass_shows_the_prompt_and_its_button_decides(
    agent: Agent, home: Path, keys: Keys, screen: Screen, start_proxy: Callable[..., Proxy],
    button: str, subject: str,
) -> None:  # fmt: skip
    agent.add(keys["ed25519"])
    proxy = start_proxy("--confirm", screen.askpass, upstream=agent.sock, env=screen.env)
    repository = Repository(home, proxy, keys)
    git = repository.signing("commit", "--allow-empty", "-S", "-m", subject)
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
        assert repository.text("log", "--format=%G? %s") == f"G {subject}"
    else:
        assert git.returncode != 0
        assert "not confirmed: " in error
        assert repository.git("rev-parse", "-q", "--verify", "HEAD", check=False).stdout == b""
