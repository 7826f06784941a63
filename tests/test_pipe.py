"""An agent behind a Windows named pipe, for the program on Windows (see windows.py).

What Wine can't show: that the pipe's server may not act as its client, who may open which pipe, and
how Windows' own agent and 1Password's behave. Here a relay stands in front of an agent of Linux.
"""

import functools
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from conftest import (
    ROOT, Proxy, ask, call, connect, get, one_line, parse_answer, post, read_all, rows, run,
    wait_for,
)  # fmt: skip
from test_http import Clients, Scripted, clients, gate, gated
from test_upstream import HONEST, LIST, SIG, Liar, Step, cut, drip, liar, send, stall

__all__ = ["clients", "gate", "gated", "liar"]  # fixtures

pytestmark = pytest.mark.windows

StartProxy = Callable[..., Proxy]
POST = post(b"payload")
WINDOWS_OWN = "SSH_AGENT_PROXY_UPSTREAM=//./pipe/openssh-ssh-agent"

# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("name, value", rows([
    ("a Unix path", "UPSTREAM", "/tmp/agent.sock"),
    ("a command", "UPSTREAM", "exec:ssh-agent"),
    ("another machine's pipe", "UPSTREAM", r"\\host\pipe\x"),
    ("backslashes that an env file has eaten", "UPSTREAM", r"\.pipeopenssh-ssh-agent"),
    ("an askpass program", "CONFIRM", "askpass.exe"),
]))  # fmt: skip
def test_what_does_not_work_on_windows_is_a_wrong_setting(
        home: Path, name: str, value: str) -> None:  # fmt: skip
    done = call(home, "check", **{f"SSH_AGENT_PROXY_{name}": value})
    told = one_line(done.stderr)
    assert (done.returncode, done.stdout) == (2, b"")
    assert f": SSH_AGENT_PROXY_{name}: '{value}'" in told
    assert name == "CONFIRM" or "//./pipe/NAME" in told


GIT_BASH = "/tmp/ssh-XXXXXX/agent.1"
NO_PIPE = "no answer from the agent at '//./pipe/{}': no such pipe ("
UNREACHABLE = "SSH_AUTH_SOCK is '{}', which no Windows program can reach: " + WINDOWS_OWN

AGENTS = [
    # name, SSH_AUTH_SOCK, why there is no answer
    ("none", "", NO_PIPE.format("openssh-ssh-agent")),
    ("Git Bash's", GIT_BASH, UNREACHABLE.format(GIT_BASH)),
    ("another machine's pipe", r"\\host\pipe\x", UNREACHABLE.format(r"\\host\pipe\x")),
    ("a pipe", r"\\.\pipe\nobody", NO_PIPE.format("nobody")),
]


@pytest.mark.parametrize("sock, why", rows(AGENTS))
def test_of_the_session_s_agents_only_a_pipe_counts(home: Path, sock: str, why: str) -> None:
    done = call(home, "check", "--addr", "127.0.0.1:0", SSH_AUTH_SOCK=sock)
    assert done.returncode == 1
    assert f"FAIL /sign can't work yet: {why}" in done.stdout.decode()


# ---------------------------------------------------------------- an agent that lies and stalls

TOLD = [
    # name, what the agent does, status, words
    ("tells the truth", HONEST, 200, "BEGIN SSH SIGNATURE"),
    ("tells it a byte at a time", [drip(LIST, 0), send(SIG)], 200, "BEGIN SSH SIGNATURE"),
    ("announces 4 GiB and sends a lot", [send(b"\xff" * 300000)], 502, "announced a message of 42"),
    ("sends a byte behind the message", [send(LIST + b"\0")], 502, "1 bytes more"),
    ("closes once asked", [cut(b"")], 503, "hung up without an answer"),
    ("closes before the last byte", [cut(LIST[:-1])], 502, "hung up in the middle of its answer"),
    ("stalls", [stall], 504, "did not answer in time"),
    ("stalls when it is to sign", [send(LIST), stall], 504, "did not answer in time"),
    ("drips", [drip(LIST, 0.05)], 504, "did not answer in time"),
]


@pytest.fixture
def proxy(start_proxy: StartProxy, liar: Liar) -> Proxy:
    """Once its look at the agent, at the start, is over."""
    proxy = start_proxy("--timeout", "2", upstream=liar.be(HONEST))
    proxy.wait_log("signing with")
    liar.left()
    return proxy


def test_an_agent_s_answers_by_a_pipe_are_those_by_a_socket(proxy: Proxy, liar: Liar) -> None:
    for name, steps, status, words in TOLD:
        liar.be(steps)
        before = time.monotonic()
        answer = ask(proxy.port, POST)
        assert (answer.status, words in answer.text) == (status, True), (name, answer)
        assert (1.9 if status == 504 else 0) < time.monotonic() - before < 4, name
        liar.left()


@pytest.mark.parametrize("more", [b"", b"GET /healthz HTTP/1.1\r\n\r\n"])
def test_a_client_that_waits_is_answered_whatever_it_sends_behind(
        proxy: Proxy, liar: Liar, more: bytes) -> None:  # fmt: skip
    liar.be([send(LIST), lambda c: (time.sleep(0.6), c.sendall(SIG))])
    with connect(proxy.port) as client:
        client.sendall(POST)
        liar.asked(2)
        client.sendall(more)
        assert client.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("steps, request_", rows([
    ("before the list", [stall], get("/publickey")),
    ("before the signature", [send(LIST), stall], POST),
]))  # fmt: skip
def test_a_client_that_goes_away_ends_the_exchange_within_a_second(
    start_proxy: StartProxy, liar: Liar, steps: List[Step], request_: bytes
) -> None:
    proxy = start_proxy(upstream=liar.be(HONEST))
    proxy.wait_log("signing with")
    liar.be(steps)
    with connect(proxy.port) as client:
        client.sendall(request_)
        liar.asked(len(steps))
    before = time.monotonic()
    proxy.wait_log("outcome=gone")
    liar.left()
    assert time.monotonic() - before < 1.5


def test_requests_run_side_by_side(gate: Scripted, gated: Proxy, clients: Clients) -> None:
    waiting = clients.open(gated.port, POST, 24)
    wait_for(lambda: gate.signing == 24, message="all are at the agent")
    assert ask(gated.port, get("/healthz")).status == 200
    gate.gate.set()
    assert [parse_answer(read_all(client)).status for client in waiting] == [200] * 24


# ---------------------------------------------------------------- the pipe itself

# With one instance, which is taken until a line comes in; then there is none, and one that is made
# anew serves whoever comes, once.
BUSY = """
import _winapi as w, contextlib, sys, time
make = lambda: w.CreateNamedPipe(sys.argv[1], w.PIPE_ACCESS_DUPLEX, 0, 2, 4096, 4096, 0, w.NULL)
taken = make(), w.CreateFile(sys.argv[1], w.GENERIC_READ, 0, w.NULL, w.OPEN_EXISTING, 0, w.NULL)
print("taken", flush=True)
sys.stdin.readline()
[w.CloseHandle(end) for end in taken]
time.sleep(0.1)
pipe = make()
with contextlib.suppress(OSError):  # ERROR_PIPE_CONNECTED: the client was quicker
    w.ConnectNamedPipe(pipe)
for answer in sys.argv[2:]:
    w.ReadFile(pipe, 4096)
    w.WriteFile(pipe, bytes.fromhex(answer))
sys.stdin.readline()
"""


@pytest.fixture
def busy() -> Iterator[Tuple[str, Callable[[], Any]]]:
    """The name of a pipe that is taken, and what makes another of that name."""
    name = rf"\\.\pipe\busy-{secrets.token_hex(8)}"
    argv = [sys.executable, "-c", BUSY, name, LIST.hex(), SIG.hex()]
    ends = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, bufsize=0, stderr=subprocess.DEVNULL, **ends) as process:
        assert process.stdin and process.stdout
        assert process.stdout.read(5) == b"taken"
        yield name, functools.partial(process.stdin.write, b"\n")
        process.kill()


def test_a_busy_pipe_is_waited_for_until_its_turn_or_the_end_of_the_time(
        start_proxy: StartProxy, busy: Tuple[str, Callable[[], Any]]) -> None:  # fmt: skip
    name, make_room = busy
    proxy = start_proxy("--timeout", "4", upstream=name)
    answer = ask(proxy.port, POST)
    assert answer.status == 504
    assert ", whose pipe was busy, did not answer in time" in answer.text
    proxy.wait_log("/sign can't work yet")  # its own look at the start has no turn to take
    threading.Timer(1, make_room).start()
    assert ask(proxy.port, POST).status == 200


def test_a_client_that_goes_away_before_a_busy_pipe_is_noticed(
        start_proxy: StartProxy, busy: Tuple[str, Callable[[], Any]]) -> None:  # fmt: skip
    proxy = start_proxy(upstream=busy[0])
    with connect(proxy.port) as client:
        client.sendall(POST)
        time.sleep(0.5)
    proxy.wait_log("outcome=gone", 2)


# In the Windows Python: what the program opens and closes, before a server that takes these steps.
INSIDE = """
import _winapi as w, os, sys, threading, time
sys.path.insert(0, os.getcwd())
import ssh_agent_proxy as sap
NAME = "//./pipe/inside-%d" % os.getpid()
LIST, SIG = map(bytes.fromhex, sys.argv[1:3])
opened, left, create, close = [], [], w.CreateFile, w.CloseHandle
def CreateFile(*args):
    opened.append(args)
    left.append(create(*args))
    return left[-1]
def CloseHandle(handle):
    if handle in left:
        left.remove(handle)
    close(handle)
w.CreateFile, w.CloseHandle = CreateFile, CloseHandle
def serve(pipe, steps):
    w.ConnectNamedPipe(pipe, overlapped=True).GetOverlappedResult(True)
    for step in steps:
        w.ReadFile(pipe, 4096, overlapped=True)[0].GetOverlappedResult(True)
        time.sleep(0 if step else 0.7)
        w.WriteFile(pipe, step or bytes(4), overlapped=True)[0].GetOverlappedResult(True)
    close(pipe)
def sign(*steps):
    mode = w.PIPE_ACCESS_DUPLEX | w.FILE_FLAG_OVERLAPPED
    pipe = w.CreateNamedPipe(NAME.replace("/", chr(92)), mode, 0, 255, 64, 64, 0, w.NULL)
    server = threading.Thread(target=serve, args=(pipe, steps), daemon=True)
    server.start()
    try:
        with sap.Agents(sap.Upstream(NAME), (), 0.5).exchange() as exchange:
            sap.request_signature(exchange, sap.Wanted(), "git", "sha512", bytes(64))
        return "signed"
    except sap.ProxyError as e:
        return type(e).__name__
    finally:
        server.join(5)
"""


def inside(code: str) -> str:
    """What CODE prints there."""
    argv = [sys.executable, "-c", INSIDE + code, LIST.hex(), SIG.hex()]
    return run(argv, cwd=ROOT).stdout.decode()


def test_the_pipe_is_opened_so_that_its_server_cannot_act_as_the_user() -> None:
    access = 0x80000000 | 0x40000000  # GENERIC_READ, GENERIC_WRITE
    # FILE_FLAG_OVERLAPPED, SECURITY_SQOS_PRESENT, SECURITY_IDENTIFICATION
    flags = 0x40000000 | 0x00100000 | 0x00010000
    told = inside("print(sign(LIST, SIG), [args[1:] for args in opened])")
    assert told == f"signed {[(access, 0, 0, 3, flags, 0)]}\n"


def test_no_exchange_costs_a_handle() -> None:
    ends = "[(LIST, SIG), (), (LIST[:9],), (LIST,), (LIST + LIST,), (None,), (bytes(4),)]"
    assert inside(f"for steps in {ends}: sign(*steps)\nprint(len(opened), left)") == "7 []\n"
