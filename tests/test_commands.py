"""The command line as a person meets it: what is printed, where, and with what exit status."""

import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, List

import pytest
from conftest import (
    PROXY, RELAY, SHIM, Agent, Keys, Proxy, ask, call, cannot_run, clean_env, get, http, need_ipv6,
    one_line, raw, read_all, refused, rows, run,
)  # fmt: skip
from test_build import lay_out_modules

import ssh_agent_proxy as p

StartProxy = Callable[..., Proxy]


def shell(home: Path, redirection: str, *argv: str) -> subprocess.CompletedProcess[bytes]:
    """The program, with its streams redirected as the shell does it."""
    words = [sys.executable, str(PROXY), *argv]
    line = "exec " + " ".join(map(shlex.quote, words)) + f" {redirection}"
    return run(["sh", "-c", line], env=clean_env(home), check=False, timeout=20)


def instead(line: str) -> List[str]:
    """For start_proxy's PYTHON: LINE runs in place of the repository's script."""
    return ["sh", "-c", f'shift; {line} "$@"', "sh"]


PYTHON = shlex.quote(sys.executable)


# ---------------------------------------------------------------- --help, --version, -v, -q


def test_help_names_every_option_and_command(home: Path) -> None:
    done = call(home, "--help")
    assert (done.returncode, done.stderr) == (0, b"")
    assert call(home, "-h").stdout == done.stdout
    text = done.stdout.decode()
    words = ["-h", "--help", "-V", "--version", "-v", "--verbose", "-q", "--quiet"]
    for word in [*words, *(o.flag for o in p.OPTIONS), *p.COMMANDS, "SSH_AGENT_PROXY_ADDR"]:
        assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text), word
    assert max(map(len, text.splitlines())) <= 100
    for option in ("-V", "--version"):
        assert call(home, option).stdout.decode() == f"ssh-agent-proxy {p.VERSION}\n"

def test_quiet_keeps_warnings_and_audit_lines_only(
        short: Path, agent: Agent, keys: Keys, start_proxy: StartProxy) -> None:  # fmt: skip
    agent.add(keys["ed25519"])
    agent.add(keys["other"])  # two keys and none pinned: worth a warning
    proxy = start_proxy("-q", upstream=agent.sock, addr=f"unix:{short}/s", wait=False)
    proxy.wait_log("WARNING the agent holds 2 keys")
    assert ask(short / "s", get("/healthz")).status == 200
    assert ask(short / "s", get("/nope")).status == 404
    assert proxy.stop() == 0
    levels = [line.split()[1] for line in proxy.log().splitlines()]
    assert levels.count("AUDIT") == 1
    assert set(levels) == {"AUDIT", "WARNING"}


# ---------------------------------------------------------------- words and their order


def test_serve_among_its_options_and_again_at_once_without_the_word(
        agent_with_key: Agent, start_proxy: StartProxy) -> None:  # fmt: skip
    """The port is free by then."""
    words = ["--timeout", "5", "serve", "--console", "-v"]
    first = start_proxy(*words, upstream=agent_with_key.sock)
    assert http(first.port, "POST", "/sign", b"x").status == 200
    assert first.stop() == 0
    assert first.lines(" DEBUG ")
    second = start_proxy(upstream=agent_with_key.sock, addr=f"127.0.0.1:{first.port}")
    assert http(second.port, "POST", "/sign", b"x").status == 200
    second.wait_log("signing with")
    assert second.lines(" DEBUG ") == []

@pytest.mark.parametrize("words", [
    ["shim"], ["--console", "-q", "shim"], ["shim", "--addr", "127.0.0.1:1"],
])  # fmt: skip
def test_shim_is_printed_byte_for_byte_wherever_options_stand(
        words: List[str], home: Path) -> None:  # fmt: skip
    done = call(home, *words)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == SHIM.read_bytes()


WRONG_WORDS = [
    ("no command", ["nope"], "nope"),
    ("a word after serve", ["serve", "now"], "now"),
    ("a word after check", ["check", "twice"], "'check twice'"),
    ("no option", ["--nope"], "--nope"),
    ("an escape sequence", ["--no\x1b[2Jpe"], "--no"),
    ("not even a unique beginning counts", ["--add", "127.0.0.1:0"], "--add"),
    ("an option without its value", ["--addr"], "--addr"),
    ("verbose and quiet", ["-v", "-q"], "-q"),
    ("a value for a switch", ["--console=x"], "--console"),
    ("--sign with serve", ["serve", "--sign"], "--sign"),
    ("--sign with token", ["token", "name", "--sign"], "--sign"),
    ("a wrong setting that the command has no use for", ["shim", "--addr", "a\nb"], r"'a\\nb'"),
]


@pytest.mark.parametrize(("words", "expected"), rows(WRONG_WORDS))
def test_a_wrong_command_line_is_one_line_and_exit_2(
        words: List[str], expected: str, home: Path) -> None:  # fmt: skip
    done = call(home, *words, SSH_AGENT_PROXY_ADDR="127.0.0.1:0")
    assert (done.returncode, done.stdout) == (2, b"")
    said = one_line(done.stderr)
    assert expected in said
    assert said.isprintable()


# ---------------------------------------------------------------- the shim, where it is


def test_a_script_copied_alone_says_that_shim_sh_is_missing_until_it_is_there(
        home: Path, start_proxy: StartProxy) -> None:  # fmt: skip
    copy = Path(shutil.copyfile(PROXY, home / PROXY.name))
    done = run([sys.executable, copy, "shim"], env=clean_env(home), check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert "shim.sh" in one_line(done.stderr)
    proxy = start_proxy(python=instead(f"exec {PYTHON} {copy}"))
    assert "shim.sh" in refused(http(proxy.port, "GET", "/shim"), 404).text
    shutil.copyfile(SHIM, home / "shim.sh")
    answer = http(proxy.port, "GET", "/shim")
    assert answer.headers["content-type"] == "text/x-shellscript"
    assert answer.body == SHIM.read_bytes()


# ---------------------------------------------------------------- where it listens


def test_each_address_is_listened_on_and_none_of_loopback_is_warned_about(
        agent_with_key: Agent, start_proxy: StartProxy) -> None:  # fmt: skip
    """Of a name all that the system says."""
    need_ipv6()
    named = {where[0] for *_, where in socket.getaddrinfo("localhost", 0, proto=socket.IPPROTO_TCP)}
    proxy = start_proxy(addr="127.0.0.2:0,[::1]:0,localhost:0", upstream=agent_with_key.sock)
    proxy.wait_log("signing with")
    found = re.findall(r"listening on \[?(\S+?)\]?:(\d+) \(", proxy.log())
    assert sorted(host for host, _ in found) == sorted(["127.0.0.2", "::1", *named])
    for host, port in found:
        with socket.create_connection((host, int(port)), 10) as s:
            s.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert read_all(s).endswith(b"\r\n\r\nok\n")
    assert proxy.stop() == 0
    assert proxy.lines("loopback") == []


def test_a_name_that_has_an_address_twice_is_listened_on_once(
        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Two lines in /etc/hosts do that."""
    found = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: 2 * found)
    listeners = p.listen(p.Address("localhost", 0))
    for listener in listeners:
        listener.close()
    assert len(listeners) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="IP_FREEBIND is Linux's")
@pytest.mark.parametrize("host", ["192.0.2.1", "[2001:db8::1]", "0.0.0.0"])
def test_an_address_beyond_loopback_is_listened_on_though_it_comes_later_and_warned_about(
        host: str, agent_with_key: Agent, start_proxy: StartProxy) -> None:  # fmt: skip
    if ":" in host:
        need_ipv6()
    proxy = start_proxy(addr=f"{host}:0", upstream=agent_with_key.sock)
    proxy.wait_log(rf"INFO listening on {re.escape(host)}:[1-9]\d* ")
    proxy.wait_log(rf"WARNING {re.escape(host)}:\d+ is not a loopback address")
    assert proxy.stop() == 0


def test_a_busy_port_is_named_and_no_other_address_listened_on(
        proxy: Proxy, home: Path, short: Path) -> None:  # fmt: skip
    """Else a start that failed leaves a dead socket behind."""
    done = call(home, "--addr", f"127.0.0.1:0,unix:{short}/s,127.0.0.1:{proxy.port}")
    assert done.returncode == 1
    assert b"listening on" not in done.stderr
    said = done.stderr.splitlines()[-1].decode()
    assert f"port {proxy.port} is in use" in said
    assert "SSH_AGENT_PROXY_ADDR" in said
    assert not (short / "s").exists()
    assert http(proxy.port, "GET", "/healthz").status == 200


def test_more_file_descriptors_are_asked_for_where_few_are_allowed(
        home: Path, agent_with_key: Agent, start_proxy: StartProxy) -> None:  # fmt: skip
    """macOS starts with 256, and 128 requests need 128 connections to the agent too."""
    proxy = start_proxy(upstream=agent_with_key.sock, python=instead(
        f"ulimit -S -n 64; exec {PYTHON} {PROXY}"
    ))  # fmt: skip
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(8 * p.PLACES, hard)
    assert resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE) == (wanted, hard)


# ---------------------------------------------------------------- without an agent


def test_without_an_agent_it_starts_and_says_what_was_looked_for_until_one_is_there(
    home: Path, keys: Keys, start_agent: Callable[..., Agent], start_proxy: StartProxy
) -> None:
    runtime = home / "run"
    runtime.mkdir()
    proxy = start_proxy(env={"XDG_RUNTIME_DIR": str(runtime)})
    proxy.wait_log("WARNING .*no agent found")
    for answer in http(proxy.port, "POST", "/sign", b"x"), http(proxy.port, "GET", "/publickey"):
        assert "SSH_AGENT_PROXY_UPSTREAM" in refused(answer, 503).text
        for path in p.well_known_sockets(sys.platform, str(home), str(runtime)):
            assert path in answer.text
    assert http(proxy.port, "GET", "/healthz").status == 200
    start_agent(runtime / "ssh-agent.socket").add(keys["ed25519"])
    assert http(proxy.port, "POST", "/sign", b"x").status == 200
    proxy.wait_log(r"using the agent at '\S+/ssh-agent\.socket'")


@pytest.mark.parametrize("sock", ["/", "relative", 200 * "/long", "~/$x", "a\udcffb"])
def test_a_hopeless_ssh_auth_sock_is_a_503(sock: str, start_proxy: StartProxy) -> None:
    proxy = start_proxy(env={"SSH_AUTH_SOCK": sock})
    refused(http(proxy.port, "POST", "/sign", b"x"), 503)
    proxy.wait_log("WARNING /sign can't work yet")


# ---------------------------------------------------------------- neighbours that would be modules

@pytest.mark.parametrize("way", rows([
    ("from its directory", "cd FOLDER && exec PYTHON ssh_agent_proxy.py"),
    ("symlink elsewhere",
     ("mkdir FOLDER.d && cp FOLDER/hmac.py FOLDER/logging.py FOLDER.d && cd FOLDER && "
      "ln -s FOLDER/ssh_agent_proxy.py FOLDER.d/link && exec PYTHON FOLDER.d/link")),
    ("-I", "cd FOLDER && exec PYTHON -I ssh_agent_proxy.py"),
    ("PYTHONSAFEPATH", "cd FOLDER && exec env PYTHONSAFEPATH=1 PYTHON ssh_agent_proxy.py"),
]))  # fmt: skip
def test_a_neighbours_module_never_runs(
        way: str, short: Path, agent_with_key: Agent, start_proxy: StartProxy) -> None:  # fmt: skip
    """Nor what it imports later on: for a request, a command as the agent, a debug line."""
    folder = short / "hostile"
    lay_out_modules(folder, short / "ran")
    for file in (PROXY, SHIM):
        shutil.copyfile(file, folder / file.name)
    (short / "relay").write_text(RELAY)
    line = re.sub(r"PYTHON(?!SAFE)", lambda _: PYTHON, way).replace("FOLDER", str(folder))
    upstream = f"exec:{PYTHON} -I {short}/relay {agent_with_key.sock}"
    proxy = start_proxy("-v", upstream=upstream, python=instead(line))
    assert http(proxy.port, "POST", "/sign", b"x").status == 200
    assert http(proxy.port, "POST", "/sign", b"", {"SSHSIG-Key": "x"}).status == 400
    assert b"HTTP/1.1 400 " in raw(proxy.port, b"nonsense\r\n\r\n")
    assert proxy.stop() == 0
    assert not (short / "ran").exists()


# ---------------------------------------------------------------- streams that take nothing


@pytest.mark.parametrize(("word", "redirection"), [
    ("shim", ">&-"), ("shim", ">/dev/full"), ("check", ">&-"), ("check", ">/dev/full"),
    ("--version", ">/dev/full"),
])  # fmt: skip
def test_what_could_not_be_printed_is_no_success(word: str, redirection: str, home: Path) -> None:
    if "full" in redirection and not os.path.exists("/dev/full"):
        cannot_run("this system has no /dev/full")
    done = shell(home, redirection, word)
    assert done.returncode == 1
    assert "standard output" in one_line(done.stderr)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_a_wrong_setting_is_exit_2_even_when_nobody_can_be_told(
        redirection: str, home: Path) -> None:  # fmt: skip
    done = shell(home, redirection, "--addr", "x")
    assert (done.returncode, done.stdout) == (2, b"")


# ---------------------------------------------------------------- odd environments


def test_without_any_environment_it_serves(agent_with_key: Agent, start_proxy: StartProxy) -> None:
    program = instead(f"exec env -i {PYTHON} {shlex.quote(str(PROXY))}")
    proxy = start_proxy(upstream=agent_with_key.sock, python=program)
    assert http(proxy.port, "POST", "/sign", b"x").status == 200


@pytest.mark.parametrize("locale", [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "no_SUCH.locale"},
    {"PYTHONIOENCODING": "ascii:strict"},
], ids=lambda locale: " ".join(locale.values()))  # fmt: skip
def test_no_locale_gives_a_traceback(
        locale: Dict[str, str], home: Path, start_proxy: StartProxy) -> None:  # fmt: skip
    assert call(home, "shim", **locale).stdout == SHIM.read_bytes()
    done = call(home, "--addr", "é\u202e\udcff:x", **locale)
    assert done.returncode == 2
    one_line(done.stderr)
    env = {**locale, "SSH_AUTH_SOCK": "/é\udcff", "SSH_AGENT_PROXY_\udcffé": "x"}
    proxy = start_proxy(env=env)
    assert http(proxy.port, "POST", "/sign", b"x", {"SSHSIG-Key": "é"}).status == 400
    assert http(proxy.port, "POST", "/sign", b"x").status == 503
