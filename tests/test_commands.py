"""The command line as a person meets it: what is printed, where, and with what exit status."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Callable, Dict, List

import pytest
from conftest import (
    PROXY,
    SHIM,
    Agent,
    Keys,
    Proxy,
    call,
    cannot_run,
    clean_env,
    http,
    need_ipv6,
    one_line,
    parse_answer,
    raw,
    run,
)

import ssh_agent_proxy as p

MAIN = "import sys, ssh_agent_proxy\nsys.exit(ssh_agent_proxy.main(sys.argv[1:]))\n"


def shell(home: Path, redirection: str, *argv: str) -> subprocess.CompletedProcess[bytes]:
    """The same, with its streams redirected as the shell does it."""
    words = [sys.executable, str(PROXY), *argv]
    line = "exec " + " ".join(map(shlex.quote, words)) + f" {redirection}"
    return run(["sh", "-c", line], env=clean_env(home), check=False, timeout=20)


def instead(folder: Path, line: str) -> str:
    """For start_proxy's PYTHON: a program that runs LINE in place of the repository's script."""
    script = folder / "start"
    script.write_text(f'#!/bin/sh\nshift\n{line} "$@"\n')
    script.chmod(0o755)
    return str(script)


PYTHON = shlex.quote(sys.executable)


# ---------------------------------------------------------------- --help, --version, -v, -q


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_every_option_and_command(option: str, home: Path) -> None:
    done = call(home, option)
    assert done.returncode == 0
    assert done.stderr == b""
    text = done.stdout.decode()
    flags = ["-h", "--help", "-V", "--version", "-v", "--verbose", "-q", "--quiet"]
    for word in [*flags, *(o.flag for o in p.OPTIONS), *p.COMMANDS, "SSH_AGENT_PROXY_ADDR"]:
        assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text), word
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("flag", [o.flag for o in p.OPTIONS])
def test_every_setting_of_the_table_is_an_option(flag: str, home: Path) -> None:
    assert flag in (
        "--addr", "--namespace", "--upstream", "--pubkey", "--pubkey-file", "--token-file",
        "--payloads", "--confirm", "--confirm-for", "--allowed-hosts", "--timeout",
    )  # fmt: skip



@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(option: str, home: Path) -> None:
    done = call(home, option)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == f"ssh-agent-proxy {p.VERSION}\n"


def test_the_server_header_has_the_version(proxy: Proxy) -> None:
    answer = http(proxy.port, "GET", "/healthz")
    assert answer.headers["server"] == f"ssh-agent-proxy/{p.VERSION}"


def test_quiet_keeps_warnings_and_audit_lines_only(
    home: Path, agent: Agent, keys: Keys, start_proxy: Callable[..., Proxy]
) -> None:
    agent.add(keys["ed25519"])
    agent.add(keys["other"])  # two keys and none pinned: worth a warning
    # A port that was free a moment ago: with -q the log does not say which it is.
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    proxy = start_proxy("-q", upstream=agent.sock, addr=f"127.0.0.1:{port}", wait=False)
    proxy.wait_log("WARNING the agent holds 2 keys")
    assert http(port, "GET", "/healthz").status == 200
    assert http(port, "POST", "/sign", b"x").status == 200
    assert proxy.stop() == 0
    levels = [line.split()[1] for line in proxy.log().splitlines()]
    assert levels.count("AUDIT") == 1
    assert set(levels) == {"AUDIT", "WARNING"}


def test_verbose_adds_debug_lines(
    agent: Agent, keys: Keys, start_proxy: Callable[..., Proxy]
) -> None:
    agent.add(keys["ed25519"])
    start_proxy("-v", upstream=agent.sock).wait_log(r" DEBUG \S")
    proxy = start_proxy(upstream=agent.sock)
    proxy.stop()
    assert " DEBUG " not in proxy.log()


# ---------------------------------------------------------------- words and their order


@pytest.mark.parametrize(
    "words",
    [
        ["serve"],
        ["--console"],
        ["serve", "--console", "-v"],
        ["--timeout", "5", "serve"],
        ["--timeout", "5", "serve", "--namespace", "git"],
    ],
)
def test_serve_with_and_without_the_word(
    words: List[str], agent: Agent, start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy(*words, upstream=agent.sock)
    assert http(proxy.port, "GET", "/healthz").body == b"ok\n"
    assert proxy.stop() == 0


@pytest.mark.parametrize("words", [["--console", "shim"], ["shim", "--console"], ["-q", "shim"],
                                   ["shim", "--addr", "127.0.0.1:1"]])  # fmt: skip
def test_options_stand_before_and_after_the_command(words: List[str], home: Path) -> None:
    done = call(home, *words)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == SHIM.read_bytes()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nope"], "nope"),
        (["serve", "now"], "now"),
        (["shim", "x"], "x"),
        (["shim", "serve"], "serve"),
        (["--nope"], "--nope"),
        (["--no\x1b[2Jpe"], "--no"),
        (["serve", "-x"], "-x"),
        (["--add", "127.0.0.1:0"], "--add"),  # not even a unique beginning counts
        (["--addr"], "--addr"),
        (["-v", "-q"], "-q"),
        (["--quiet", "--verbose"], "-v"),
        (["--console=x"], "--console"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(
    words: List[str], expected: str, home: Path
) -> None:
    done = call(home, *words, SSH_AGENT_PROXY_ADDR="127.0.0.1:0")
    assert done.returncode == 2
    assert done.stdout == b""
    said = one_line(done.stderr)
    assert expected in said
    assert said.isprintable()


# ---------------------------------------------------------------- shim


def test_shim_is_printed_byte_for_byte(home: Path) -> None:
    done = call(home, "shim")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == SHIM.read_bytes()


def test_shim_is_served_byte_for_byte(proxy: Proxy) -> None:
    answer = http(proxy.port, "GET", "/shim")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/x-shellscript"
    assert answer.body == SHIM.read_bytes()


def test_a_copied_script_says_that_shim_sh_is_missing(home: Path) -> None:
    copy = home / "ssh_agent_proxy.py"
    shutil.copyfile(PROXY, copy)
    done = run([sys.executable, copy, "shim"], env=clean_env(home), check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert "shim.sh" in one_line(done.stderr)


def test_a_copied_script_answers_404_for_the_shim(
    home: Path, start_proxy: Callable[..., Proxy]
) -> None:
    copy = home / "ssh_agent_proxy.py"
    shutil.copyfile(PROXY, copy)
    proxy = start_proxy(python=instead(home, f"exec {PYTHON} {copy}"))
    answer = http(proxy.port, "GET", "/shim")
    assert answer.status == 404
    assert "shim.sh" in answer.text
    assert len(answer.text.splitlines()) == 1
    # A copy that comes later is there.
    shutil.copyfile(SHIM, home / "shim.sh")
    assert http(proxy.port, "GET", "/shim").body == SHIM.read_bytes()


def test_through_a_symlink_the_shim_is_the_one_beside_the_script(home: Path) -> None:
    link = home / "ssh-agent-proxy"
    link.symlink_to(PROXY)
    done = run([sys.executable, link, "shim"], env=clean_env(home), check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == SHIM.read_bytes()


# ---------------------------------------------------------------- where it listens


def test_the_listening_line_to_the_letter(proxy: Proxy) -> None:
    lines = [line for line in proxy.log().splitlines() if "listening on" in line]
    assert len(lines) == 1
    _, level, text = lines[0].split(" ", 2)
    assert level == "INFO"
    assert text == f'listening on 127.0.0.1:{proxy.port} (namespace "git")'


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
        return True
    except OSError:
        return False


def ask(host: str, port: int) -> bytes:
    with socket.create_connection((host, port), 10) as s:
        s.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        answer = b""
        while True:
            piece = s.recv(4096)
            if not piece:
                return parse_answer(answer).body
            answer += piece


def listening(proxy: Proxy) -> Dict[str, int]:
    found = re.findall(r"listening on (\S+):(\d+) \(", proxy.log())
    return {host: int(port) for host, port in found}


def test_an_ipv6_address(agent: Agent, start_proxy: Callable[..., Proxy]) -> None:
    need_ipv6()
    proxy = start_proxy(addr="[::1]:0", upstream=agent.sock)
    assert list(listening(proxy)) == ["[::1]"]
    assert ask("::1", proxy.port) == b"ok\n"


def test_several_addresses(agent: Agent, start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy(addr="127.0.0.1:0,127.0.0.2:0", upstream=agent.sock)
    proxy.wait_log(r"listening on 127\.0\.0\.2")
    where = listening(proxy)
    assert list(where) == ["127.0.0.1", "127.0.0.2"]
    assert [ask(host, port) for host, port in where.items()] == [b"ok\n", b"ok\n"]


def test_a_name_is_all_its_addresses(agent: Agent, start_proxy: Callable[..., Proxy]) -> None:
    found = socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
    hosts = {str(where[0]) for _, _, _, _, where in found if ":" not in str(where[0]) or has_ipv6()}
    proxy = start_proxy(addr="localhost:0", upstream=agent.sock)
    for host in hosts:
        proxy.wait_log(rf"listening on \[?{re.escape(host)}\]?:\d+ ")
    where = listening(proxy)
    assert {host.strip("[]") for host in where} == hosts
    assert {ask(host.strip("[]"), port) for host, port in where.items()} == {b"ok\n"}


def test_loopback_addresses_are_not_warned_about(
    agent: Agent, start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy(addr="localhost:0,127.0.0.2:0", upstream=agent.sock)
    assert proxy.stop() == 0
    assert "loopback" not in proxy.log()


@pytest.mark.skipif(sys.platform != "linux", reason="IP_FREEBIND is Linux's")
def test_an_address_that_comes_later_is_listened_on_and_warned_about(
    agent: Agent, start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy(addr="192.0.2.1:0,[2001:db8::1]:0" if has_ipv6() else "192.0.2.1:0",
                        upstream=agent.sock)  # fmt: skip
    hosts = ["192.0.2.1"] + (["[2001:db8::1]"] if has_ipv6() else [])
    for host in hosts:
        proxy.wait_log(rf"INFO listening on {re.escape(host)}:[1-9]\d* ")
        proxy.wait_log(rf"WARNING {re.escape(host)}:\d+ is not a loopback address")
    assert proxy.stop() == 0


def test_every_address_is_warned_about(agent: Agent, start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy(addr="0.0.0.0:0", upstream=agent.sock)
    proxy.wait_log(r"WARNING 0\.0\.0\.0:\d+ is not a loopback address")


def test_a_busy_port_is_named(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        done = call(home, "--addr", f"127.0.0.1:{port}")
    assert done.returncode == 1
    said = done.stderr.decode().splitlines()[-1]
    assert said.startswith("ssh-agent-proxy: ")
    assert f"port {port} is in use" in said
    assert "SSH_AGENT_PROXY_ADDR" in said


def test_a_second_proxy_on_the_same_port_ends_and_the_first_goes_on(
    proxy: Proxy, home: Path
) -> None:
    done = call(home, "--addr", f"127.0.0.1:{proxy.port}")
    assert done.returncode == 1
    assert f"port {proxy.port} is in use" in done.stderr.decode()
    assert http(proxy.port, "GET", "/healthz").status == 200


def test_one_busy_port_of_several_listens_nowhere(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        done = call(home, "--addr", f"127.0.0.1:0,127.0.0.1:{port}")
    assert done.returncode == 1
    assert "listening on" not in done.stderr.decode()


def test_a_port_is_free_again_at_once(
    agent: Agent, keys: Keys, start_proxy: Callable[..., Proxy]
) -> None:
    agent.add(keys["ed25519"])
    first = start_proxy(upstream=agent.sock)
    assert http(first.port, "POST", "/sign", b"x").status == 200
    assert first.stop() == 0
    second = start_proxy(upstream=agent.sock, addr=f"127.0.0.1:{first.port}")
    assert http(second.port, "POST", "/sign", b"x").status == 200


def test_an_unknown_host_is_named(home: Path) -> None:
    # A name with an empty label: no name server is asked.
    done = call(home, "--addr", "no..such.host:1")
    assert done.returncode in (1, 2)
    said = done.stderr.decode().splitlines()[-1]
    assert said.startswith("ssh-agent-proxy: ")
    assert "no..such.host" in said


# ---------------------------------------------------------------- without an agent


def test_without_an_agent_it_starts_and_says_what_was_looked_for(
    home: Path, start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy(env={"XDG_RUNTIME_DIR": str(home / "run")})
    proxy.wait_log("WARNING .*no agent found")
    for answer in http(proxy.port, "POST", "/sign", b"x"), http(proxy.port, "GET", "/publickey"):
        assert answer.status == 503
        assert len(answer.text.splitlines()) == 1
        assert "SSH_AGENT_PROXY_UPSTREAM" in answer.text
        for path in p.well_known_sockets(sys.platform, str(home), str(home / "run")):
            assert path in answer.text
    assert http(proxy.port, "GET", "/healthz").status == 200


def test_an_agent_started_later_is_found(
    home: Path, keys: Keys, start_agent: Callable[..., Agent], start_proxy: Callable[..., Proxy]
) -> None:
    runtime = home / "run"
    runtime.mkdir()
    proxy = start_proxy(env={"XDG_RUNTIME_DIR": str(runtime)})
    assert http(proxy.port, "POST", "/sign", b"x").status == 503
    start_agent(runtime / "ssh-agent.socket").add(keys["ed25519"])
    assert http(proxy.port, "POST", "/sign", b"x").status == 200
    proxy.wait_log(r"using the agent at '\S+/ssh-agent\.socket'")


def test_a_dead_ssh_auth_sock_is_not_replaced_by_another_agent(
    home: Path, keys: Keys, start_agent: Callable[..., Agent], start_proxy: Callable[..., Proxy]
) -> None:
    runtime = home / "run"
    runtime.mkdir()
    start_agent(runtime / "ssh-agent.socket").add(keys["ed25519"])
    env = {"XDG_RUNTIME_DIR": str(runtime), "SSH_AUTH_SOCK": str(home / "dead")}
    proxy = start_proxy(env=env)
    answer = http(proxy.port, "POST", "/sign", b"x")
    assert answer.status == 503
    assert f"SSH_AGENT_PROXY_UPSTREAM={runtime}/ssh-agent.socket" in answer.text
    proxy.wait_log(f"WARNING .*SSH_AGENT_PROXY_UPSTREAM={runtime}/ssh-agent.socket")


@pytest.mark.parametrize("sock", ["/nowhere", "/", "relative", 200 * "/long", "~/$x", "a\udcffb"])
def test_a_hopeless_ssh_auth_sock_is_a_503(
    sock: str, start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy(env={"SSH_AUTH_SOCK": sock})
    answer = http(proxy.port, "POST", "/sign", b"x")
    assert answer.status == 503
    assert len(answer.text.splitlines()) == 1
    proxy.wait_log("WARNING /sign can't work yet")


# ---------------------------------------------------------------- neighbours that would be modules


@pytest.fixture
def hostile(short: Path, home: Path) -> Path:
    """The script among files with every name of the standard library, which tell when they run."""
    folder = short / "hostile"
    folder.mkdir()
    mark = short / "ran"
    content = f"open({str(mark)!r}, 'a').write(__name__ + '\\n')\n"
    for file in Path(sysconfig.get_paths()["stdlib"]).iterdir():
        is_module = file.suffix == ".py" or (file / "__init__.py").exists()
        if is_module and file.stem != "__future__":  # that one has its own test
            (folder / f"{file.stem}.py").write_text(content)
    for name in "_socket", "_hashlib", "_ssl", "_ctypes", "resource", "select", "binascii":
        (folder / f"{name}.py").write_text(content)
    assert (folder / "hmac.py").exists()
    assert (folder / "logging.py").exists()
    shutil.copyfile(PROXY, folder / PROXY.name)
    shutil.copyfile(SHIM, folder / SHIM.name)
    return folder


def test_the_hostile_neighbours_would_run(hostile: Path, home: Path) -> None:
    (hostile / "script.py").write_text("import hmac\n")
    run([sys.executable, hostile / "script.py"], env=clean_env(home))
    assert (hostile.parent / "ran").read_text() == "hmac\n"


WAYS = {
    "absolute path": "exec PYTHON FOLDER/ssh_agent_proxy.py",
    "relative path": "cd FOLDER/.. && exec PYTHON hostile/ssh_agent_proxy.py",
    "from its directory": "cd FOLDER && exec PYTHON ssh_agent_proxy.py",
    "symlink beside it": "ln -s ssh_agent_proxy.py FOLDER/link && exec PYTHON FOLDER/link",
    "symlink elsewhere": "mkdir FOLDER.d && cp FOLDER/hmac.py FOLDER/logging.py FOLDER.d && "
    "ln -s FOLDER/ssh_agent_proxy.py FOLDER.d/link && cd FOLDER && exec PYTHON FOLDER.d/link",
    "-I": "cd FOLDER && exec PYTHON -I ssh_agent_proxy.py",
    "-E -s": "cd FOLDER && exec PYTHON -E -s ssh_agent_proxy.py",
    "PYTHONSAFEPATH": "cd FOLDER && exec env PYTHONSAFEPATH=1 PYTHON ssh_agent_proxy.py",
}
if sys.version_info >= (3, 11):
    WAYS["-P"] = "cd FOLDER && exec PYTHON -P ssh_agent_proxy.py"


@pytest.mark.parametrize("way", WAYS)
def test_a_neighbours_module_never_runs(
    way: str, hostile: Path, agent: Agent, keys: Keys, start_proxy: Callable[..., Proxy]
) -> None:
    # Everything that it imports later on too: a request, a command as the agent, a debug line.
    agent.add(keys["ed25519"])
    relay = hostile.parent / "relay"
    relay.write_text(RELAY)
    line = re.sub(r"PYTHON(?!SAFE)", lambda _: PYTHON, WAYS[way])
    line = line.replace("FOLDER", shlex.quote(str(hostile)))
    upstream = f"exec:{PYTHON} -I {relay} {agent.sock}"
    proxy = start_proxy("-v", upstream=upstream, python=instead(hostile.parent, line))
    assert http(proxy.port, "POST", "/sign", b"x").status == 200
    assert http(proxy.port, "POST", "/sign", b"", {"SSHSIG-Key": "x"}).status == 400
    assert http(proxy.port, "GET", "/healthz").status == 200
    assert b"HTTP/1.1 400 " in raw(proxy.port, b"nonsense\r\n\r\n")
    assert proxy.stop() == 0
    ran = hostile.parent / "ran"
    assert not ran.exists(), ran.read_text()


def test_a_neighbour_named___future___never_runs(hostile: Path, home: Path) -> None:
    shutil.copyfile(hostile / "hmac.py", hostile / "__future__.py")
    done = run([sys.executable, hostile / PROXY.name, "-V"], env=clean_env(home), check=False)
    assert not (hostile.parent / "ran").exists()
    assert done.returncode == 0


RELAY = """\
import os, socket, sys, threading
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
def pump():
    while True:
        data = os.read(0, 65536)
        if not data:
            os._exit(0)
        s.sendall(data)
threading.Thread(target=pump, daemon=True).start()
while True:
    data = s.recv(65536)
    if not data:
        break
    os.write(1, data)
"""


# ---------------------------------------------------------------- as a zipapp


@pytest.fixture
def zipapp(short: Path, home: Path) -> Path:
    folder = short / "app"
    folder.mkdir()
    shutil.copyfile(PROXY, folder / PROXY.name)
    shutil.copyfile(SHIM, folder / SHIM.name)
    (folder / "__main__.py").write_text(MAIN)
    target = short / "ssh-agent-proxy"
    run([sys.executable, "-m", "zipapp", folder, "-o", target], env=clean_env(home))
    shutil.rmtree(folder)
    return target


def test_a_zipapp_prints_version_and_shim(zipapp: Path, home: Path) -> None:
    env = clean_env(home)
    done = run([sys.executable, "-I", zipapp, "--version"], env=env)
    assert done.stdout.decode() == f"ssh-agent-proxy {p.VERSION}\n"
    assert run([sys.executable, "-I", zipapp, "shim"], env=env).stdout == SHIM.read_bytes()


def test_a_zipapp_serves(
    zipapp: Path, agent: Agent, keys: Keys, start_proxy: Callable[..., Proxy]
) -> None:
    agent.add(keys["ed25519"])
    program = instead(zipapp.parent, f"exec {PYTHON} -I {zipapp}")
    proxy = start_proxy(upstream=agent.sock, python=program)
    assert http(proxy.port, "POST", "/sign", b"x").status == 200
    assert http(proxy.port, "GET", "/shim").body == SHIM.read_bytes()
    assert proxy.stop() == 0


# ---------------------------------------------------------------- streams that take nothing


def no_trace(said: bytes) -> None:
    text = said.decode()
    assert "Traceback" not in text
    assert "Exception ignored" not in text


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_a_shim_that_could_not_be_written_is_exit_1(redirection: str, home: Path) -> None:
    if not os.path.exists("/dev/full"):
        redirection = ">&-"
    done = shell(home, redirection, "shim")
    no_trace(done.stderr)
    assert done.returncode == 1
    one_line(done.stderr)


def test_a_shim_for_a_reader_that_went_away_is_exit_1(home: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(PROXY), "shim"],
        env=clean_env(home),
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=20,
    )
    os.close(writer)
    no_trace(done.stderr)
    assert done.returncode == 1


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_a_text_for_a_full_disk_is_no_success(option: str, home: Path) -> None:
    if not os.path.exists("/dev/full"):
        cannot_run("this system has no /dev/full")
    done = shell(home, ">/dev/full", option)
    no_trace(done.stderr)
    assert done.returncode != 0


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_a_text_for_a_closed_stdout_is_no_traceback(option: str, home: Path) -> None:
    no_trace(shell(home, ">&-", option).stderr)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize("words", [["nope"], ["--addr", "x"]])
def test_a_wrong_setting_is_exit_2_even_when_nobody_can_be_told(
    redirection: str, words: List[str], home: Path
) -> None:
    done = shell(home, redirection, *words)
    assert done.returncode == 2
    no_trace(done.stdout)


# ---------------------------------------------------------------- odd environments


def test_an_empty_environment(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROXY), "--version"], env={}, capture_output=True, timeout=20
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_without_home_it_serves(
    short: Path, agent: Agent, keys: Keys, start_proxy: Callable[..., Proxy]
) -> None:
    agent.add(keys["ed25519"])
    program = instead(short, f"exec env -i {PYTHON} {shlex.quote(str(PROXY))}")
    proxy = start_proxy(upstream=agent.sock, python=program)
    assert http(proxy.port, "POST", "/sign", b"x").status == 200


WEIRD = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "no_SUCH.locale"},
    {"PYTHONIOENCODING": "ascii:strict"},
]


@pytest.mark.parametrize("locale", WEIRD, ids=[" ".join(locale.values()) for locale in WEIRD])
def test_no_locale_gives_a_traceback(
    locale: Dict[str, str], home: Path, start_proxy: Callable[..., Proxy]
) -> None:
    assert call(home, "--help", **locale).returncode == 0
    assert call(home, "shim", **locale).stdout == SHIM.read_bytes()
    for words in (["--addr", "é\u202e:x"], ["--pubkey", "x"], ["--\udcff"]):
        done = call(home, *words, **locale)
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr
    env = {**locale, "SSH_AUTH_SOCK": "/é\udcff", "SSH_AGENT_PROXY_\udcffé": "x"}
    proxy = start_proxy(env=env)
    assert http(proxy.port, "POST", "/sign", b"x", {"SSHSIG-Key": "é"}).status == 400
    assert http(proxy.port, "POST", "/sign", b"x").status == 503
