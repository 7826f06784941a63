"""The process where Windows differs: inside a tray, its log, its console, what it gives up."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Iterator, List

import pytest
from conftest import ROOT, clean_env, connect, parse_answer, post, read_all, wait_for
from test_http import Scripted, gate

__all__ = ["gate"]  # fixtures

# ---------------------------------------------------------------- in a thread of another program

# Each byte on its standard input is a signal; when it listens it prints where, and at its end what
# serve gave back.
HOST = f"""
import logging, os, socket, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import ssh_agent_proxy as p
config = p.Config.from_env(os.environ, sys.argv[3:], p.COMMANDS)
handler = logging.FileHandler(sys.argv[1], encoding="utf-8")
handler.setFormatter(p.OneLine())
p.start_log(config.level, handler)
ours, theirs = socket.socketpair()

def host():
    try:
        print(p.serve(config, theirs, lambda names: print(*names, flush=True), float(sys.argv[2])))
    except p.ProxyError as e:
        print(e)

thread = threading.Thread(target=host)
thread.start()
threading.Thread(target=lambda: [ours.send(b) for b in iter(lambda: os.read(0, 1), b"")],
                 daemon=True).start()
thread.join()
"""


class Host:
    def __init__(self, home: Path, log: Path, drain: float, *argv: str) -> None:
        self.log = log
        words = [sys.executable, "-c", HOST, str(log), str(drain), *argv]
        self.process = subprocess.Popen(
            words, env=clean_env(home), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def says(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().decode().strip()

    def signal(self) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"x")
        self.process.stdin.flush()


@pytest.fixture
def host(home: Path, short: Path) -> Iterator[Callable[..., Host]]:
    hosts: List[Host] = []

    def start(drain: float, *argv: str) -> Host:
        hosts.append(Host(home, short / "log", drain, *argv))
        return hosts[-1]

    yield start
    for started in hosts:
        started.process.kill()
        started.process.communicate()


def begin(name: str, gate: Scripted) -> socket.socket:
    """A request that waits for the agent of the proxy that says it listens at NAME."""
    client = connect(int(name.rpartition(":")[2]))
    client.sendall(post(b"x"))
    wait_for(lambda: gate.signing == 1, message="the request is at the agent")
    return client


def test_in_a_thread_it_says_where_it_listens_finishes_what_is_in_flight_and_gives_0(
    host: Callable[..., Host], gate: Scripted, scripted_agent: Callable[..., Path]
) -> None:
    running = host(10, "--addr", "127.0.0.1:0", "--upstream", str(scripted_agent(gate)))
    client = begin(running.says(), gate)
    running.signal()
    wait_for(lambda: " INFO stopping" in running.log.read_text())
    gate.gate.set()
    assert parse_answer(read_all(client)).status == 200
    assert running.says() == "0"
    assert running.process.wait(5) == 0


@pytest.mark.parametrize(("drain", "signals"), [(0.2, 1), (60, 2)])
def test_there_too_a_drain_has_a_bound_and_a_second_signal_ends_it_at_once(
    drain: float, signals: int, host: Callable[..., Host], gate: Scripted,
    scripted_agent: Callable[..., Path],
) -> None:  # fmt: skip
    running = host(drain, "--addr", "127.0.0.1:0", "--upstream", str(scripted_agent(gate)))
    client = begin(running.says(), gate)
    start = time.monotonic()
    for _ in range(signals):
        running.signal()
    assert parse_answer(read_all(client)).text == "the proxy is about to end\n"
    assert running.says() == "0"
    assert time.monotonic() - start >= (drain if signals == 1 else 0)


def test_a_start_that_fails_there_says_why_and_never_that_it_listens(
    host: Callable[..., Host]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        name = f"127.0.0.1:{busy.getsockname()[1]}"
        assert host(10, "--addr", name).says().startswith(f"cannot listen on {name}: port ")


def test_in_another_log_each_record_is_one_line_with_time_and_level(
    host: Callable[..., Host], gate: Scripted, scripted_agent: Callable[..., Path]
) -> None:
    gate.gate.set()
    gate.comment = b"a\n\x1b\xe2\x80\xae"
    running = host(10, "--addr", "127.0.0.1:0", "--upstream", str(scripted_agent(gate)), "-v")
    with connect(int(running.says().rpartition(":")[2])) as client:
        client.sendall(post(b"x"))
        assert parse_answer(read_all(client)).status == 200
    running.signal()
    assert running.says() == "0"
    lines = running.log.read_text().splitlines()
    assert [line for line in lines if " AUDIT outcome=signed " in line]
    for line in lines:
        assert line.isprintable()
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} [A-Z]+ \S", line)
