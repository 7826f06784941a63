"""`check`: each thing that can be wrong is one line that names it, its cause and the way out."""

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple
from unittest.mock import Mock

import pytest
from conftest import (
    FINGERPRINT, PROXY, RELAY, Agent, Keys, Proxy, StartAgent, StartProxy, StartScripted, call,
    cannot_run, clean_env, fingerprint, http, listing, message, need, need_ipv6, one_line,
    private_file, read_message, rows, run,
)  # fmt: skip

import ssh_agent_proxy as p

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")

NAME = "SSH_AGENT_PROXY_"
SERVER = f"{p.PROGRAM}/{p.VERSION}"
SECRET = "c2VjcmV0LXRva2VuLW9mLXRoZS10ZXN0"
Handler = Callable[[socket.socket], Any]

# ---------------------------------------------------------------- running it, reading it


class Report(NamedTuple):
    """What check says, a line each, of which every one has a mark and nothing invisible."""

    lines: List[str]
    status: Optional[int] = None  # none: a part of it was asked for alone

    def found(self, pattern: str) -> List[str]:
        return [line for line in self.lines if re.search(pattern, line)]

    def one(self, pattern: str) -> str:
        """The only line that PATTERN is found in."""
        found = self.found(pattern)
        assert len(found) == 1, (pattern, self.lines)
        return found[0]

    def marked(self, mark: str) -> List[str]:
        """The lines with that mark, but for what this machine lets a process give up."""
        return [line for line in self.found(f"^{mark}") if not re.search(r"in force \(", line)]

    def fails(self, *words: str) -> str:
        """The one line that says why /sign would not work, with the WORDS in it."""
        assert self.status in (1, None)
        found = self.marked("FAIL")
        assert len(found) == 1, self.lines
        for word in words:
            assert word in found[0]
        return found[0]

    def works(self) -> None:
        assert self.marked("FAIL") == []
        assert self.status in (0, None)


def report(lines: Iterable[str], status: Optional[int] = None) -> Report:
    lines = list(lines)
    for line in lines:
        assert re.match(r"(ok  |warn|FAIL) \S", line), lines
        assert line.isprintable(), lines
    return Report(lines, status)


def parse(done: subprocess.CompletedProcess[bytes]) -> Report:
    assert done.stderr == b""
    text = done.stdout.decode()
    assert text.endswith("\n")
    return report(text[:-1].split("\n"), done.returncode)


def check(home: Path, *argv: Any, **env: Any) -> Report:
    """The whole of it, as a person runs it."""
    addr = [] if "--addr" in argv else ["--addr", "127.0.0.1:0"]
    return parse(call(home, "check", *addr, *argv, **env))


def part(findings: Iterable[p.Finding]) -> Report:
    return report(f"{p.MARKS[level]} {text}" for level, text in findings)


def configured(*argv: Any, **env: Any) -> p.Config:
    env = {"HOME": "/nowhere", "PATH": os.environ["PATH"], **env}
    words = ["check", *map(str, argv)]
    return p.Config.from_env({n: str(v) for n, v in env.items()}, words, p.COMMANDS)


def of_agent(*argv: Any, **env: Any) -> Report:
    """What it says of the agent and its keys."""
    config = configured(*argv, **env)
    return part(p.agent_findings(config, p.Agents(config.upstream, config.sockets, config.timeout)))


def of_addresses(addr: str) -> Report:
    """What it says of where the proxy is to listen."""
    return part(p.address_findings(configured("--addr", addr)))


def files(folder: Path) -> Dict[str, Tuple[int, ...]]:
    """What stands in FOLDER and below it, and what would show a change of it."""
    found = {}
    for path in folder.rglob("*"):
        s = path.lstat()
        stamp = () if path.is_dir() else (s.st_size, s.st_mtime_ns)
        found[str(path)] = (s.st_ino, s.st_mode, *stamp)
    return found


# ---------------------------------------------------------------- all of it


def test_an_agent_with_a_key_is_told_to_the_letter_and_exit_0(
        home: Path, agent_with_key: Agent, keys: Keys) -> None:  # fmt: skip
    sock, name = agent_with_key.sock, fingerprint(keys["ed25519"])
    told = check(home, SSH_AUTH_SOCK=sock)
    told.works()
    assert told.lines[:3] == [
        f"ok   asking the agent at '{sock}'",
        f"ok   it holds ssh-ed25519 {name} ed25519@test",
        f"ok   signing with {name} unless another is named",
    ]
    assert re.fullmatch(r"ok   127\.0\.0\.1:\d+ is free to listen on", told.lines[3])
    assert told.lines[4] == "ok   may ask: whoever reaches that; payloads any, namespaces git"
    assert told.marked("warn") == []


def test_each_token_is_told_with_its_leash_and_not_shown(
        home: Path, short: Path, agent_with_key: Agent) -> None:  # fmt: skip
    leash = f"payloads=push key={FINGERPRINT.decode()}"
    text = f"{SECRET} name\n{SECRET}2\n{SECRET}3 box {leash}\n{SECRET}4 any payloads=any\n"
    path = private_file(short / "tokens", text)
    told = check(home, "--upstream", agent_with_key.sock, "--token-file", path,
                 "--payloads", "commit,tag", "--namespace", "git,file")  # fmt: skip
    told.works()
    assert told.found("may ask") == [
        "ok   may ask: token name; payloads commit,tag, namespaces git,file",
        "ok   may ask: token line 2; payloads commit,tag, namespaces git,file",
        "ok   may ask: token box; payloads push, namespaces git,file, key " + FINGERPRINT.decode(),
        "ok   may ask: token any; payloads any, namespaces git,file",
    ]
    assert told.found(SECRET[:8]) == []


# ---------------------------------------------------------------- the agent and its keys


def test_every_key_is_a_line_in_the_agents_order_and_the_first_signs(
        agent: Agent, keys: Keys) -> None:  # fmt: skip
    names = ["rsa2048", "ed25519", "ecdsa256"]
    for name in names:
        agent.add(keys[name])
    told = of_agent("--upstream", agent.sock)
    listed = run(["ssh-add", "-l"], env=agent.env).stdout.decode().splitlines()
    found = told.found("^ok   it holds ")
    assert [line.split()[-2:] for line in found] == [line.split()[1:3] for line in listed]
    assert [line.split()[-3] for line in found] == [keys.line(n).split()[0] for n in names]
    assert told.one("signing with ").startswith(f"ok   signing with {listed[0].split()[1]} ")
    line = told.one("^warn ")
    assert "holds 3 keys and none is pinned" in line
    assert NAME + "PUBKEY" in line
    told.works()


@pytest.mark.parametrize("setting", [NAME + "PUBKEY", NAME + "PUBKEY_FILE"])
def test_the_pinned_key_signs_and_its_setting_is_named(
        setting: str, agent: Agent, keys: Keys) -> None:  # fmt: skip
    agent.add(keys["other"])
    agent.add(keys["ed25519"])

    def told_of(name: str) -> Report:
        file = keys[name].with_suffix(".pub")
        value = str(file) if "FILE" in setting else file.read_text()
        return of_agent("--upstream", agent.sock, **{setting: value})

    told = told_of("ed25519")
    told.works()
    name = fingerprint(keys["ed25519"])
    assert told.one("signing with ") == f"ok   signing with {name}, pinned by {setting}"
    assert told.marked("warn") == []
    name = fingerprint(keys["ecdsa256"])
    told_of("ecdsa256").fails("does not hold it, but 2 others", name, setting)


def dead(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


@pytest.mark.parametrize("variable", ["SSH_AUTH_SOCK", NAME + "UPSTREAM"])
def test_an_agent_that_is_not_there_is_named_with_the_cause_and_the_setting(
        variable: str, short: Path) -> None:  # fmt: skip
    dead(short / "agent")
    told = of_agent(**{variable: short / "agent"})
    told.fails(f"'{short}/agent'", "nobody listens on that socket", variable)


@pytest.mark.parametrize("locked", [False, True])
def test_an_agent_without_keys_is_named_with_the_cause_and_the_ways_out(
        locked: bool, agent: Agent, keys: Keys) -> None:  # fmt: skip
    if locked:
        agent.add(keys["ed25519"])
        agent.lock()
    told = of_agent("--upstream", agent.sock)
    told.fails("lists no keys", "locked", "ssh-add", NAME + "UPSTREAM")
    assert told.one(" asking ") == f"ok   asking the agent at '{agent.sock}'"
    assert told.found("signing with|holds") == []
    argv = ["--pubkey", keys.line("ed25519")]
    of_agent("--upstream", agent.sock, *argv).fails("lists no keys")


@pytest.mark.parametrize("gone", [False, True])
def test_another_well_known_agent_with_keys_is_named_with_the_setting_that_selects_it(
        gone: bool, short: Path, start_agent: StartAgent, keys: Keys) -> None:  # fmt: skip
    """On a Mac the agent of SSH_AUTH_SOCK is Apple's empty one, and 1Password's is another."""
    first, other = start_agent(), start_agent(short / "ssh-agent.socket")
    if gone:
        first.stop()
    environment = {"XDG_RUNTIME_DIR": short, "SSH_AUTH_SOCK": first.sock}
    assert str(other.sock) not in of_agent(**environment).fails()
    other.add(keys["other"])
    line = of_agent(**environment).fails("has 1 key")
    match = re.search(r"set (SSH_AGENT_PROXY_UPSTREAM)=(\S+)$", line)
    assert match
    of_agent(**environment, **{match[1]: match[2]}).works()


HOSTILE = "a\x1b[31m\r\nFAIL b\u202e\u200bc\x9b\udcff"
ESCAPED = r"a\x1b[31m\r\nFAIL b\u202e\u200bc\x9b"


def test_hostile_text_is_escaped_on_its_line_and_cut(
        short: Path, scripted_agent: StartScripted, keys: Keys) -> None:  # fmt: skip
    comment = HOSTILE.encode("utf-8", "surrogateescape") + 100_000 * b"x"
    listed = listing((p.parse_key_line(keys.line("ed25519")).key.blob, comment))
    path = scripted_agent(lambda c: (read_message(c), c.sendall(listed)))
    line = of_agent("--upstream", path).one(" holds ")
    assert ESCAPED in line
    assert len(line) < 500
    line = of_agent(SSH_AUTH_SOCK=f"{short}/{HOSTILE}").fails()
    assert ESCAPED in line.replace(2 * "\\", "\\")


@linux
def test_an_agent_behind_a_command_is_told_and_signs_and_keeps_landlock_out(
        home: Path, short: Path, agent_with_key: Agent, keys: Keys) -> None:  # fmt: skip
    (short / "relay").write_text(RELAY)
    argv = [sys.executable, str(short / "relay"), str(agent_with_key.sock)]
    told = check(home, "--upstream", f"exec:{shlex.join(argv)}", "--sign")
    told.one(f"^ok   asking the agent command '{sys.executable}'$")
    assert fingerprint(keys["ed25519"]) in told.one(" holds ")
    assert told.one("test signature").startswith("ok   ")
    line = told.one(" Landlock: ")
    assert line.startswith(f"warn Landlock: not in force ({NAME}UPSTREAM runs a program")
    told.works()


# ---------------------------------------------------------------- where it listens


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


def test_every_free_address_is_told(short: Path) -> None:
    port = free_port()
    assert of_addresses(f"127.0.0.1:{port},unix:{short}/a\x1b\u202eb").lines == [
        f"ok   127.0.0.1:{port} is free to listen on",
        f"ok   unix:{short}/a\\x1b\\u202eb is free to listen on",
    ]
    assert files(short) == {}


@pytest.mark.parametrize(("host", "asked"), [("0.0.0.0", "127.0.0.1"), ("::", "::1")])
def test_whoever_listens_everywhere_is_asked_here_for_windows_connects_to_no_wildcard(
        host: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    connect = Mock(side_effect=OSError)
    monkeypatch.setattr(p.socket, "create_connection", connect)
    assert p.who_listens(p.Address(host, 1), 2) == ""
    connect.assert_called_once_with((asked, 1), 2)


def test_the_proxy_that_runs_there_already_is_known_and_not_disturbed(
        short: Path, agent_with_key: Agent, start_proxy: StartProxy) -> None:  # fmt: skip
    proxy = start_proxy(upstream=agent_with_key.sock, addr=f"127.0.0.1:0,unix:{short}/s")
    proxy.wait_log("listening on unix:")
    before = files(short)
    assert of_addresses(f"127.0.0.1:{proxy.port},unix:{short}/s").lines == [
        f"ok   {SERVER} answers at 127.0.0.1:{proxy.port} already",
        f"ok   {SERVER} answers at unix:{short}/s already",
    ]
    assert files(short) == before
    assert http(proxy.port, "POST", "/sign", b"x").status == 200


def saying(answer: bytes) -> Handler:
    return lambda connection: (connection.recv(4096), connection.sendall(answer))


def mute(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


def trickle(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"x")
        time.sleep(0.01)


OTHERS = [
    ("another server", saying(b"HTTP/1.0 200 OK\r\nServer: other/1.0\r\n\r\nok\n")),
    ("our name behind another", saying(b"HTTP/1.0 200 OK\r\nServer: x ssh-agent-proxy/1\r\n\r\n")),
    ("our name, longer", saying(b"HTTP/1.0 200 OK\r\nServer: ssh-agent-proxy2/1\r\n\r\n")),
    ("garbage", saying(bytes(range(256)) * 64)),
    ("closes at once", lambda connection: None),
    ("mute", mute),
    ("drips for ever", trickle),
]


@pytest.mark.parametrize("handler", rows(OTHERS))
def test_a_socket_of_another_program_is_told_with_the_setting_and_left(
        handler: Handler, scripted_agent: StartScripted) -> None:  # fmt: skip
    path = scripted_agent(handler)
    before = files(path.parent)
    told = of_addresses(f"unix:{path}")
    told.fails(f"unix:{path}", "another program listens there", NAME + "ADDR")
    assert files(path.parent) == before


def test_ports_of_other_programs_are_told_with_the_setting_and_asked_side_by_side() -> None:
    with contextlib.ExitStack() as stack:
        mute = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(8)]
        names = [f"127.0.0.1:{s.getsockname()[1]}" for s in mute]
        start = time.monotonic()
        told = of_addresses(",".join(names))
        assert time.monotonic() - start < 10  # two seconds each were sixteen
    for name, line in zip(names, told.lines):
        assert line.startswith(f"FAIL cannot listen on {name}: port ")
        assert "is in use" in line and NAME + "ADDR" in line


@linux
@pytest.mark.parametrize(("listens", "asked", "mark", "what"), [
    ("0.0.0.0", "127.0.0.1", "warn", ", and at every other address of this machine"),
    ("127.0.0.1", "0.0.0.0", "warn", ", but not at every address of this machine"),
    ("0.0.0.0", "0.0.0.0", "ok  ", ""),
    ("127.0.0.1", "localhost", "ok  ", ""),
])  # fmt: skip
def test_a_proxy_that_listens_elsewhere_than_it_is_set_to_is_told_apart(
    listens: str, asked: str, mark: str, what: str, agent_with_key: Agent, start_proxy: StartProxy
) -> None:
    """Else who has closed it to the network thinks that it is closed, and the old one runs on."""
    port = start_proxy(upstream=agent_with_key.sock, addr=f"{listens}:0").port
    line = f"{mark} {SERVER} answers at {asked}:{port} already{what}"
    assert of_addresses(f"{asked}:{port}").lines == [line]


def test_a_server_that_takes_our_name_is_escaped(scripted_agent: StartScripted) -> None:
    evil = b"\x1b[31m\xe2\x80\xae\x07\xff" + 3000 * b"x"
    head = b"HTTP/1.0 200 OK\r\nServer: " + SERVER.encode() + evil + b"\r\n\r\n"
    path = scripted_agent(saying(head))
    line = of_addresses(f"unix:{path}").one("unix:")
    assert rf"{SERVER}\x1b[31m\u202e\x07\xff" in line
    assert len(line) < 500


@linux
@pytest.mark.parametrize("host", ["203.0.113.9", "[2001:db8::1]"])
def test_an_address_of_another_machine_is_a_warning(host: str) -> None:
    if ":" in host:
        need_ipv6()
    line = of_addresses(f"{host}:7221").one("7221")
    assert line == f"warn {host}:7221 is no address of this machine (yet)"


# (None of these has a name server asked.)
@pytest.mark.parametrize("host", ["no..such.host", "[::1%nosuchif]", "a\u202eb"])
def test_a_host_that_is_none_is_named(host: str) -> None:
    of_addresses(f"{host}:7221").fails(p.printable(host), "SSH_AGENT_PROXY_ADDR")


def test_the_same_port_twice_is_told_for_serve_would_not_start() -> None:
    """By its cause, which is no other program: nobody else is asked what check holds itself."""
    port = free_port()
    for first in ("127.0.0.1", "0.0.0.0"):
        told = of_addresses(f"{first}:{port},127.0.0.1:{port}")
        told.fails("not all at once: cannot listen on 127.0.0.1:", f"{port}", NAME + "ADDR")


@linux
def test_what_the_user_may_not_have_is_told(short: Path, agent_with_key: Agent) -> None:
    if os.geteuid() != 0:
        cannot_run("another user's process: run the tests as root")
    python = "/usr/bin/python3"  # which another user can run, wherever ours is
    if not os.access(python, os.X_OK):
        cannot_run(f"{python} is missing: install python3")
    program = Path(shutil.copyfile(PROXY, short / PROXY.name))
    program.chmod(0o644)
    short.chmod(0o755)
    sock = agent_with_key.sock
    words = [need("setpriv", "util-linux"), "--reuid=65534", "--regid=65534", "--clear-groups"]
    words += [python, str(program), "check", "--addr", f"unix:{short}/s", "--upstream", str(sock)]
    told = parse(run(words, env=clean_env(short / "nobody"), check=False, timeout=20))
    assert told.status == 1
    assert f"'{sock}'" in told.one(f"^FAIL .*permission denied.*{NAME}UPSTREAM")
    assert "Permission denied" in told.one(f"^FAIL .*unix:{short}/s")


UNIX = [
    ("stale", "s", dead, "ok   ", "free to listen on"),
    ("a file", "s", Path.touch, "FAIL ", "no socket"),
    ("a folder", "s", Path.mkdir, "FAIL ", "no socket"),
    ("a missing folder", "missing/s", lambda path: None, "FAIL ", "No such file or directory"),
    ("too long", 120 * "x", lambda path: None, "FAIL ", "too long"),
]


@pytest.mark.parametrize(("name", "make", "mark", "cause"), rows(UNIX))
def test_a_unix_address_is_told_and_left_as_it_was(
    name: str, make: Callable[[Path], None], mark: str, cause: str, short: Path
) -> None:
    make(short / name)
    before = files(short)
    line = of_addresses(f"unix:{short}/{name}").one(f"unix:{short}/{name[:100]}")
    assert line.startswith(mark)
    assert cause in line
    assert mark == "ok   " or NAME + "ADDR" in line
    # (A stale socket is removed, as by serve: nobody can have any use for it.)
    assert files(short) == (before if mark == "FAIL " else {})


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(("host", "beyond"), [
    ("127.0.0.2", False), ("localhost", False), ("[::1]", False), ("0.0.0.0", True), ("[::]", True),
])  # fmt: skip
def test_listening_beyond_loopback_without_a_token_is_a_warning(
        host: str, beyond: bool, short: Path) -> None:  # fmt: skip
    """Whoever reaches it can have anything signed."""
    if "::" in host:
        need_ipv6()
    argv = ["--addr", f"{host}:0"]
    told = part(p.weak_settings(configured(*argv)))
    assert len(told.lines) == beyond
    if beyond:
        assert told.lines[0].startswith(f"warn {host}:0 is not a loopback address")
        assert NAME + "TOKEN_FILE" in told.lines[0]
    argv += ["--token-file", private_file(short / "tokens", f"{SECRET}\n")]
    assert part(p.weak_settings(configured(*argv))).lines == []


@pytest.mark.parametrize(("addr", "tokens", "told"), [
    ("127.0.0.1:0", "", True), ("unix:/s,127.0.0.1:0", "", True), ("unix:/s", "", False),
    ("127.0.0.1:0", f"{SECRET}\n", False),
])  # fmt: skip
def test_a_yes_that_holds_for_everyone_on_this_machine_is_a_warning(
        addr: str, tokens: str, told: bool, short: Path) -> None:  # fmt: skip
    argv = ["--addr", addr, "--confirm", "true", "--confirm-for", "600"]
    if tokens:
        argv += ["--token-file", private_file(short / "tokens", tokens)]
    found = part(p.weak_settings(configured(*argv))).found("yes holds for everyone")
    assert len(found) == told
    assert all(line.startswith("warn ") and NAME + "TOKEN_FILE" in line for line in found)


def test_a_variable_that_is_no_setting_is_a_warning() -> None:
    name = NAME + "X\x1b\u202e"
    told = part(p.weak_settings(configured(**{name: "value-of-it"})))
    assert told.one("no setting").startswith(f"warn {p.printable(name)} is set")
    assert told.found("value-of-it") == []


def test_a_wrong_setting_is_told_once_and_exit_2(home: Path) -> None:
    done = call(home, "check", "--token-file", "/nowhere")
    assert (done.returncode, done.stdout) == (2, b"")
    said = "ssh-agent-proxy: --token-file: can't use '/nowhere'"
    assert one_line(done.stderr).startswith(said)


# ---------------------------------------------------------------- what the process gives up

STEPS = ["no core dumps", "no debugger, no reading of memory", "no new privileges",
         "memory kept out of swap", "Landlock"]  # fmt: skip


def steps(text: str) -> List[str]:
    """Each step and whether it is in force, in any text."""
    return sorted(re.findall(rf"((?:{'|'.join(STEPS)}): (?:not )?in force) \(", text))


@linux
@pytest.mark.parametrize("confirm", ["", "true"])
def test_each_step_is_a_line_and_in_force_as_it_is_in_serve(
    confirm: str, home: Path, agent_with_key: Agent, start_proxy: StartProxy
) -> None:
    env = {NAME + "CONFIRM": confirm}
    proxy = start_proxy(upstream=agent_with_key.sock, env=env)
    told = check(home, "--upstream", agent_with_key.sock, **env)
    assert len(steps("\n".join(told.lines))) == len(STEPS)
    assert steps("\n".join(told.lines)) == steps(proxy.log())
    for step in STEPS:
        line = told.one(f" {step}: ")
        assert re.fullmatch(rf"(ok  |warn) {step}: (not )?in force \(.+\)", line)
        assert line.startswith("warn") == ("not in force" in line)
    if confirm:
        assert f"not in force ({NAME}CONFIRM runs a program" in told.one(" Landlock: ")


# ---------------------------------------------------------------- the user service


@pytest.fixture
def service_is(short: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Report]:
    """What check says of the service where systemctl, which notes how it was asked, does LINE."""
    monkeypatch.setenv("PATH", f"{short}:{os.environ['PATH']}")

    def service_is(line: str) -> Report:
        program = short / "systemctl"
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>{short}/asked\n{line}\n')
        program.chmod(0o755)
        told = part(p.service_findings())
        assert (short / "asked").exists()
        return told

    return service_is


@linux
def test_of_the_running_service_the_kernels_facts_are_told(
        proxy: Proxy, service_is: Callable[[str], Report], short: Path) -> None:  # fmt: skip
    line = service_is(f"echo {proxy.pid}").one("service")
    words = (short / "asked").read_text().split()
    assert {"--user", "show", "--property=MainPID"} <= set(words)
    assert words[-1] == p.PROGRAM
    status = Path(f"/proc/{proxy.pid}/status").read_text()
    facts = dict(reversed(re.findall(r"^(VmLck|NoNewPrivs):\s*(.*)$", status, re.M)))
    limits = Path(f"/proc/{proxy.pid}/limits").read_text()
    facts.update(re.findall(r"^(Max core file size|Max locked memory) +(\S+)", limits, re.M))
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    weak = facts["NoNewPrivs"] != "1" or facts["VmLck"] == "0 kB"
    mark = "warn" if weak else "ok  "
    assert line == f"{mark} the user service runs as PID {proxy.pid}: {told}"


NO_SERVICE = [
    ("not running", "echo 0"),
    ("no manager", "echo 'Failed to connect to bus' >&2; exit 1"),
    ("two numbers", "echo 1 1"),
    ("another folder of /proc", "echo self"),
    ("a process that has ended", "echo 4194305"),  # beyond what Linux gives out
]
HANGS = pytest.param("exec sleep 60", marks=pytest.mark.long, id="hangs")


@linux
@pytest.mark.parametrize("line", [*rows(NO_SERVICE), HANGS])
def test_a_service_that_does_not_run_is_no_line(
        line: str, service_is: Callable[[str], Report]) -> None:  # fmt: skip
    assert service_is(line).lines == []


# ---------------------------------------------------------------- --sign


@pytest.mark.parametrize("name", ["ed25519", "rsa2048", "ecdsa256", "ecdsa384", "ecdsa521"])
def test_a_signature_of_each_type_is_verified(
        name: str, home: Path, agent: Agent, keys: Keys) -> None:  # fmt: skip
    agent.add(keys["other"])
    agent.add(keys[name])
    argv = ["--sign", "--pubkey", keys.line(name), "--namespace", "file,git"]
    told = check(home, "--upstream", agent.sock, *argv)
    line = told.one("test signature")
    assert line.startswith(f"ok   test signature by {fingerprint(keys[name])}: ")
    assert 'Good "file" signature' in line
    told.works()


def signing(algorithm: bytes, signature: bytes) -> bytes:
    return message(b"\x0e" + p.string(p.string(algorithm) + p.string(signature)))


WRONG_SIGNATURES = [
    ("refused", [message(b"\x05")], "refused to sign"),
    ("of something else", [signing(b"ssh-ed25519", 64 * b"\x01")], "not verify"),
    ("none", [], "did not answer in time"),
]


@pytest.mark.parametrize(("answers", "cause"), rows(WRONG_SIGNATURES))
def test_a_wrong_signature_is_exit_1_and_none_is_asked_for_without_sign(
    answers: List[bytes], cause: str, home: Path, scripted_agent: StartScripted, keys: Keys
) -> None:
    listed = listing((p.parse_key_line(keys.line("ed25519")).key.blob, b"x"))
    asked = []

    def handle(connection: socket.socket) -> None:
        while request := read_message(connection):
            asked.append(request[0])
            listing = request[0] == p.SSH_AGENTC_REQUEST_IDENTITIES
            connection.sendall(listed if listing else b"".join(answers))

    path = scripted_agent(handle)
    check(home, "--upstream", path).works()
    assert asked == [p.SSH_AGENTC_REQUEST_IDENTITIES]
    argv = ["--sign", "--timeout", "20" if answers else "0.3"]
    check(home, "--upstream", path, *argv).fails("test signature", cause)


def test_without_ssh_keygen_and_systemctl_it_is_made_and_not_verified(
        home: Path, agent_with_key: Agent) -> None:  # fmt: skip
    told = check(home, "--upstream", agent_with_key.sock, "--sign", PATH="/nowhere")
    line = told.one("test signature")
    assert line.startswith("warn ")
    assert "not verified" in line
    assert "ssh-keygen" in line
    assert told.found("service|systemctl") == []
    told.works()


def test_no_test_signature_is_tried_where_no_key_can_make_one(home: Path, agent: Agent) -> None:
    told = check(home, "--upstream", agent.sock, "--sign")
    told.fails("lists no keys")
    assert told.found("test signature") == []


@pytest.mark.parametrize("limit", ["unlimited", "0"])
def test_sign_leaves_nothing_behind_even_without_room_for_a_temporary_file(
        limit: str, home: Path, short: Path, agent_with_key: Agent) -> None:  # fmt: skip
    argv = ["sh", "-c", f'ulimit -f {limit}; exec "$@"', "sh", sys.executable, PROXY, "check"]
    argv += ["--addr", "127.0.0.1:0", "--sign", "--upstream", agent_with_key.sock]
    env = clean_env(home)
    before = files(short)
    told = parse(run(argv, env=env, check=False, timeout=20))
    line = told.one("test signature")
    assert line.startswith("warn " if limit == "0" else "ok   ")
    assert ("not verified" in line) == (limit == "0")
    told.works()
    assert files(short) == before
