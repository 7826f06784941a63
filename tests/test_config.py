"""Settings, from dictionaries and as a person gives them; each wrong one is named in one line."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import pytest
from conftest import PROXY, Agent, Keys, Proxy, clean_env, http, run

import ssh_agent_proxy as p

HOME = "/home/someone"


def config(*argv: str, **variables: str) -> p.Config:
    """VARIABLES by their names after SSH_AGENT_PROXY_; those in capitals alone would be others."""
    env = {"HOME": HOME}
    env.update({f"SSH_AGENT_PROXY_{name}": value for name, value in variables.items()})
    return p.Config.from_env(env, argv, p.COMMANDS)


def from_env(**env: str) -> p.Config:
    return p.Config.from_env({"HOME": HOME, **env}, [], p.COMMANDS)


def setting(c: p.Config, variable: str) -> object:
    return getattr(c, variable.lower())


def pin(c: p.Config) -> str:
    """The line of the key that alone signs, "" where any may."""
    pinned = c.pinned()
    return f"{pinned.key.line} {pinned.comment}".strip() if pinned.key else ""


def option(variable: str) -> str:
    return "--" + variable.lower().replace("_", "-")


# ---------------------------------------------------------------- what is taken


def test_defaults() -> None:
    c = config()
    assert c.command == ("serve",)
    assert c.addr == (("127.0.0.1", 7221),)
    assert c.namespace == ("git",)
    assert c.upstream is None
    assert pin(c) == ""
    assert c.allowed_hosts == ()
    assert c.timeout == 120
    assert c.level == logging.INFO
    assert c.unknown == ()


GOOD: List[Tuple[str, str, object]] = [
    ("ADDR", "127.0.0.1:1", (("127.0.0.1", 1),)),
    ("ADDR", "localhost:65535", (("localhost", 65535),)),
    ("ADDR", "[::1]:7221", (("::1", 7221),)),
    ("ADDR", "[fe80::1%eth0]:7221", (("fe80::1%eth0", 7221),)),
    ("ADDR", "0.0.0.0:0", (("0.0.0.0", 0),)),
    ("ADDR", "127.0.0.1:1,[::1]:2, host-1.example:3",
     (("127.0.0.1", 1), ("::1", 2), ("host-1.example", 3))),
    ("ADDR", "unix:/run/proxy", (("/run/proxy", 0o600),)),
    ("ADDR", "unix:~/proxy?mode=0600,127.0.0.1:1", ((f"{HOME}/proxy", 0o600), ("127.0.0.1", 1))),
    ("ADDR", "unix:/run/a b/c?mode=700", (("/run/a b/c", 0o700),)),
    ("NAMESPACE", "file", ("file",)),
    ("NAMESPACE", "git,file", ("git", "file")),
    ("NAMESPACE", "!\"#$%&'()*+-./~", ("!\"#$%&'()*+-./~",)),
    ("NAMESPACE", 255 * "n", (255 * "n",)),
    ("UPSTREAM", "/run/agent", p.Upstream("/run/agent")),
    ("UPSTREAM", "unix:/run/agent", p.Upstream("/run/agent")),
    ("UPSTREAM", "exec:socat - UNIX:/a",
     p.Upstream(command=("socat", "-", "UNIX:/a"))),
    ("UPSTREAM", "exec:a 'b c' \"d e\" f\\ g",
     p.Upstream(command=("a", "b c", "d e", "f g"))),
    ("UPSTREAM", "exec:ssh host 'echo $HOME; x | y'",
     p.Upstream(command=("ssh", "host", "echo $HOME; x | y"))),
    ("ALLOWED_HOSTS", "box", ("box",)),
    ("ALLOWED_HOSTS", "box.example,.Corp.Example, x_y",
     ("box.example", ".corp.example", "x_y")),
    ("PAYLOADS", "any", ("commit", "tag", "push", "other")),
    ("PAYLOADS", "commit", ("commit",)),
    ("PAYLOADS", "push, commit", ("push", "commit")),
    ("CONFIRM_FOR", "0", 0),
    ("TIMEOUT", "5", 5),
    ("TIMEOUT", "0.25", 0.25),
    ("TIMEOUT", "86400", 86400),
]  # fmt: skip


@pytest.mark.parametrize(("variable", "value", "expected"), GOOD)
def test_a_variable_sets(variable: str, value: str, expected: object) -> None:
    assert setting(config(**{variable: value}), variable) == expected


@pytest.mark.parametrize(("variable", "value", "expected"), GOOD)
def test_an_option_sets_the_same(variable: str, value: str, expected: object) -> None:
    assert setting(config(option(variable), value), variable) == expected
    assert setting(config(f"{option(variable)}={value}"), variable) == expected


@pytest.mark.parametrize(
    ("variable", "loses", "wins"),
    [
        ("ADDR", "127.0.0.1:1", "127.0.0.1:2"),
        ("NAMESPACE", "a", "b"),
        ("UPSTREAM", "/a", "/b"),
        ("ALLOWED_HOSTS", "a", "b"),
        ("TIMEOUT", "1", "2"),
    ],
)
def test_an_option_beats_its_variable(variable: str, loses: str, wins: str) -> None:
    both = config(option(variable), wins, **{variable: loses})
    assert setting(both, variable) == setting(config(**{variable: wins}), variable)


def test_an_option_beats_a_variable_that_is_wrong() -> None:
    assert config("--timeout", "2", TIMEOUT="never").timeout == 2


def test_the_pubkey_option_beats_its_variable(keys: Keys) -> None:
    c = config("--pubkey", keys.line("other"), PUBKEY=keys.line("ed25519"))
    assert pin(c) == keys.line("other")


@pytest.mark.parametrize("variable", [o.variable for o in p.OPTIONS])
def test_an_empty_variable_counts_as_unset(variable: str) -> None:
    assert config(**{variable: ""}) == config()


def test_an_empty_ssh_auth_sock_counts_as_unset() -> None:
    assert from_env(SSH_AUTH_SOCK="").upstream is None


def test_ssh_auth_sock_is_the_agent_unless_one_is_set() -> None:
    assert from_env(SSH_AUTH_SOCK="/sock").upstream == p.Upstream("/sock")
    both = from_env(SSH_AUTH_SOCK="/sock", SSH_AGENT_PROXY_UPSTREAM="/set")
    assert both.upstream == p.Upstream("/set")


def test_the_well_known_sockets_stand_in_the_home_and_the_runtime_directory() -> None:
    c = from_env(XDG_RUNTIME_DIR="/run/user/7")
    assert c.sockets == p.well_known_sockets(sys.platform, HOME, "/run/user/7")
    places = (f"{HOME}/", "/run/user/7/", "/opt/", "/usr/")
    assert all(path.startswith(places) for path in c.sockets)
    assert len(c.sockets) > len(config().sockets) > 0


def test_verbose_and_quiet_set_the_level() -> None:
    assert config("-v").level == config("--verbose").level == logging.DEBUG
    assert config("-q").level == config("--quiet").level == p.AUDIT
    assert logging.INFO < p.AUDIT < logging.WARNING


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~/agent", f"{HOME}/agent"),
        ("unix:~/agent", f"{HOME}/agent"),
        ("%h/agent", f"{HOME}/agent"),
        ("unix:%h/agent", f"{HOME}/agent"),
        ("$HOME/agent", f"{HOME}/agent"),
        ("${HOME}/agent", f"{HOME}/agent"),
        ("/run/$WHO/a-${WHO}.sock", "/run/me/a-me.sock"),
        ("/run/%h/agent", "/run/%h/agent"),
        ("/run/~/agent", "/run/~/agent"),
        ("$NESTED", "/run/$WHO"),
    ],
)
def test_paths_are_expanded(given: str, meant: str) -> None:
    c = from_env(SSH_AGENT_PROXY_UPSTREAM=given, WHO="me", NESTED="/run/$WHO")
    assert c.upstream == p.Upstream(meant)


def test_a_commands_program_is_expanded() -> None:
    c = from_env(SSH_AGENT_PROXY_UPSTREAM="exec:~/bin/relay x")
    assert c.upstream == p.Upstream(command=(f"{HOME}/bin/relay", "x"))


# ---------------------------------------------------------------- the pinned key


@pytest.mark.parametrize("before", ["", "# a comment\n\n", "\n  \n"])
@pytest.mark.parametrize("after", ["", "\n", "\r\n", "\n\n# more\n"])
def test_a_pin_may_have_comments_and_empty_lines_around_it(
    before: str, after: str, keys: Keys, tmp_path: Path
) -> None:
    file = tmp_path / "pin"
    file.write_bytes((before + keys.line("ed25519") + after).encode())
    assert pin(config(PUBKEY=file.read_text())) == keys.line("ed25519")
    assert pin(config(PUBKEY_FILE=str(file))) == keys.line("ed25519")


def test_a_pin_without_a_comment(keys: Keys) -> None:
    bare = " ".join(keys.line("ed25519").split()[:2])
    assert pin(config(PUBKEY=bare)) == bare


def test_a_pins_file_may_be_named_from_the_home(keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text(keys.line("ed25519"))
    env = {"HOME": str(tmp_path), "D": str(tmp_path)}
    for name in "~/key.pub", "%h/key.pub", "$D/key.pub":
        c = p.Config.from_env({**env, "SSH_AGENT_PROXY_PUBKEY_FILE": name}, [], p.COMMANDS)
        assert pin(c) == keys.line("ed25519")


def test_a_pins_file_is_ignored_beside_a_pin(keys: Keys, tmp_path: Path) -> None:
    c = config(PUBKEY=keys.line("ed25519"), PUBKEY_FILE=str(tmp_path / "missing"))
    assert pin(c) == keys.line("ed25519")


def test_a_pins_file_is_read_again_when_it_changes(keys: Keys, tmp_path: Path) -> None:
    file = tmp_path / "pin"
    file.write_text(keys.line("ed25519"))
    c = config(PUBKEY_FILE=str(file))
    file.write_text(keys.line("other"))
    assert pin(c) == keys.line("other")


def test_a_pins_file_that_goes_or_breaks_pins_nothing_else(keys: Keys, tmp_path: Path) -> None:
    file = tmp_path / "pin"
    file.write_text(keys.line("ed25519"))
    c = config(PUBKEY_FILE=str(file))
    file.write_text("broken")
    with pytest.raises(p.ConfigError, match=re.escape(str(file))):
        c.pinned()
    file.unlink()
    with pytest.raises(p.ConfigError, match=re.escape(str(file))):
        c.pinned()


def test_a_folder_in_a_file_s_place_costs_no_file_descriptor(tmp_path: Path) -> None:
    file = p.File(str(tmp_path), "X")
    before = os.listdir("/dev/fd")
    for _ in range(3):
        with pytest.raises(p.ConfigError, match="directory"):
            file.read(str)
    assert os.listdir("/dev/fd") == before


def test_what_is_wrong_with_a_file_just_written_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("half=a token")
    path.chmod(0o600)
    with pytest.raises(p.ConfigError) as raised:
        p.File(str(path), "X").read(p.parse_tokens, private=True)
    assert str(raised.value).count("can't use") == 1


def test_a_running_proxy_follows_the_pins_file(
    agent: Agent, keys: Keys, tmp_path: Path, start_proxy: Callable[..., Proxy]
) -> None:
    agent.add(keys["ed25519"])
    agent.add(keys["other"])
    file = tmp_path / "pin"
    file.write_text(keys.line("other"))
    proxy = start_proxy("--pubkey-file", file, upstream=agent.sock)
    assert http(proxy.port, "GET", "/publickey").text.strip() == keys.line("other")
    file.write_text(keys.line("ed25519"))
    assert http(proxy.port, "GET", "/publickey").text.strip() == keys.line("ed25519")
    file.unlink()
    for answer in http(proxy.port, "GET", "/publickey"), http(proxy.port, "POST", "/sign", b"x"):
        assert answer.status == 503
        assert f"--pubkey-file: can't use '{file}': No such file" in answer.text


# ---------------------------------------------------------------- what is not taken

ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"

# The variable, its value, and words that the error must have in it.
BAD: List[Tuple[str, str, List[str]]] = [
    ("ADDR", "127.0.0.1", ["'127.0.0.1'", "HOST:PORT"]),
    ("ADDR", "7221", ["'7221'", "HOST:PORT"]),
    ("ADDR", ":7221", ["':7221'", "HOST:PORT"]),
    ("ADDR", "127.0.0.1:", ["'127.0.0.1:'", "HOST:PORT"]),
    ("ADDR", "127.0.0.1:65536", ["'127.0.0.1:65536'"]),
    ("ADDR", "127.0.0.1:-1", ["'127.0.0.1:-1'"]),
    ("ADDR", "127.0.0.1:+1", ["'127.0.0.1:+1'"]),
    ("ADDR", "127.0.0.1:http", ["'127.0.0.1:http'"]),
    ("ADDR", "127.0.0.1:\u0661", ["'127.0.0.1:\u0661'"]),
    ("ADDR", "::1:7221", ["'::1:7221'", "]:PORT"]),
    ("ADDR", "[::1]", ["'[::1]'"]),
    ("ADDR", "[::1:7221", ["'[::1:7221'"]),
    ("ADDR", "http://127.0.0.1:7221", ["'http://127.0.0.1:7221'"]),
    ("ADDR", "127.0.0.1:1 127.0.0.1:2", ["'127.0.0.1:1 127.0.0.1:2'"]),
    ("ADDR", "127.0.0.1:1,", ["''"]),
    ("ADDR", ",", ["''"]),
    ("ADDR", "unix:", ["'unix:'", "unix:/path"]),
    ("ADDR", "unix:run/proxy", ["'unix:run/proxy'"]),
    ("ADDR", "unix:/run/proxy?", ["'unix:/run/proxy?'", "?mode=0660"]),
    ("ADDR", "unix:/run/proxy?mode=", ["'unix:/run/proxy?mode='"]),
    ("ADDR", "unix:/run/proxy?mode=66", ["'unix:/run/proxy?mode=66'"]),
    ("ADDR", "unix:/run/proxy?mode=0888", ["'unix:/run/proxy?mode=0888'"]),
    ("ADDR", "unix:/run/proxy?mode=01777", ["'unix:/run/proxy?mode=01777'"]),
    ("ADDR", "unix:/run/proxy?mode=rw", ["'unix:/run/proxy?mode=rw'"]),
    ("ADDR", "unix:/run/proxy?owner=me", ["'unix:/run/proxy?owner=me'"]),
    ("ADDR", "unix:$NOT_SET_HERE/proxy", ["$NOT_SET_HERE", "not set"]),
    ("ADDR", "\x1b[2Jhost:1\u202e", ["x1b[2Jhost:1", "u202e"]),
    ("ADDR", "a\nb:1", ["'a", "b:1'"]),
    ("NAMESPACE", "a b", ["'a b'", "printable ASCII"]),
    ("NAMESPACE", "git,", ["''"]),
    ("NAMESPACE", ",git", ["''"]),
    ("NAMESPACE", "é", ["'é'"]),
    ("NAMESPACE", "a\x7f", ["x7f"]),
    ("NAMESPACE", 256 * "n", ["255"]),
    ("UPSTREAM", "relative/agent", ["'relative/agent'", "absolute path", "exec:"]),
    ("UPSTREAM", "unix:", ["absolute path"]),
    ("UPSTREAM", "unix:relative", ["'unix:relative'"]),
    ("UPSTREAM", "~nosuchuser/agent", ["'~nosuchuser/agent'"]),
    ("UPSTREAM", "$NOT_SET_HERE/agent", ["$NOT_SET_HERE", "not set"]),
    ("UPSTREAM", "exec:", ["exec:"]),
    ("UPSTREAM", "exec:  ", ["exec:"]),
    ("UPSTREAM", "exec:''", ["exec:"]),
    ("UPSTREAM", "exec:socat 'x", ["quotation"]),
    ("UPSTREAM", "exec:$NOT_SET_HERE/x", ["$NOT_SET_HERE", "not set"]),
    ("UPSTREAM", "http://127.0.0.1/", ["'http://127.0.0.1/'"]),
    ("PUBKEY", "nonsense", ["not a public key"]),
    ("PUBKEY", "SHA256:dGhlIGZpbmdlcnByaW50IG9mIG5vYm9keXMga2V5IQA", ["fingerprint"]),
    ("PUBKEY", "ssh-ed25519", ["not a public key"]),
    ("PUBKEY", "ssh-ed25519 !!!!", ["base64"]),
    ("PUBKEY", "ssh-ed25519 AAAAé", ["base64"]),
    ("PUBKEY", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5", ["public key"]),
    ("PUBKEY", ED25519 + "AAAA", ["left over"]),
    ("PUBKEY", ED25519.replace("ssh-ed25519", "ssh-rsa"), ["'ssh-rsa'", "'ssh-ed25519'"]),
    ("PUBKEY", "ssh-dss AAAAB3NzaC1kc3MAAAAA", ["not a public key"]),
    ("PUBKEY", f'command="x" {ED25519}', ["not a public key"]),
    ("PUBKEY", f"{ED25519}\n{ED25519}", ["one line", "2"]),
    ("PUBKEY", "# only a comment", ["one line", "0"]),
    ("PUBKEY", "-----BEGIN OPENSSH PRIVATE KEY-----\nx", ["private key", ".pub"]),
    ("PUBKEY_FILE", "/nowhere/key.pub", ["can't use '/nowhere/key.pub': No such file"]),
    ("PUBKEY_FILE", "$NOT_SET_HERE/key.pub", ["$NOT_SET_HERE", "not set"]),
    ("PUBKEY_FILE", "/dev/zero", ["can't use '/dev/zero': not a regular file"]),
    ("ALLOWED_HOSTS", "a b", ["'a b'", "host name"]),
    ("ALLOWED_HOSTS", "http://box", ["'http://box'"]),
    ("ALLOWED_HOSTS", "box:80", ["'box:80'"]),
    ("ALLOWED_HOSTS", "*.example.com", ["'*.example.com'", ".suffix"]),
    ("ALLOWED_HOSTS", ".", ["'.'"]),
    ("ALLOWED_HOSTS", "..a", ["'..a'"]),
    ("ALLOWED_HOSTS", "a..b", ["'a..b'"]),
    ("ALLOWED_HOSTS", "bücher.example", ["'bücher.example'"]),
    ("TIMEOUT", "soon", ["'soon'", "seconds"]),
    ("TIMEOUT", "0", ["'0'", "above 0"]),
    ("TIMEOUT", "0.0", ["'0.0'"]),
    ("TIMEOUT", "-1", ["'-1'"]),
    ("TIMEOUT", "1e3", ["'1e3'"]),
    ("TIMEOUT", "nan", ["'nan'"]),
    ("TIMEOUT", "inf", ["'inf'"]),
    ("TIMEOUT", "2 m", ["'2 m'"]),
    ("TIMEOUT", "99999999999", ["'99999999999'"]),
    ("TIMEOUT", "\u0663", ["'\u0663'"]),
    ("TOKEN_FILE", "$NOT_SET_HERE/tokens", ["$NOT_SET_HERE", "not set"]),
    ("PAYLOADS", "commits", ["commit, tag, push"]),
    ("PAYLOADS", "commit,", ["commit, tag, push"]),
    ("PAYLOADS", "commit,any", ["commit, tag, push"]),
    ("PAYLOADS", "other", ["commit, tag, push"]),
    ("PAYLOADS", "Commit", ["commit, tag, push"]),
    ("CONFIRM", "/nowhere/askpass", ["'/nowhere/askpass'", "can be run"]),
    ("CONFIRM", "no-such-askpass", ["'no-such-askpass'", "can be run"]),
    ("CONFIRM", "/etc/passwd", ["'/etc/passwd'", "can be run"]),
    ("CONFIRM_FOR", "ever", ["'ever'", "seconds"]),
    ("CONFIRM_FOR", "-1", ["'-1'", "seconds"]),
]


def named(rows: List[Tuple[str, str, List[str]]]) -> List[str]:
    return [f"{variable}={value[:30]!a}" for variable, value, _ in rows]


def check_error(error: str, name: str, words: List[str]) -> None:
    assert error.startswith(f"{name}: ")
    for word in words:
        assert word in error
    assert error.isprintable()
    assert len(error) < 600


@pytest.mark.parametrize(("variable", "value", "words"), BAD, ids=named(BAD))
def test_a_wrong_variable_is_named(variable: str, value: str, words: List[str]) -> None:
    with pytest.raises(p.ConfigError) as raised:
        config(**{variable: value})
    check_error(str(raised.value), f"SSH_AGENT_PROXY_{variable}", words)


@pytest.mark.parametrize(("variable", "value", "words"), BAD, ids=named(BAD))
def test_a_wrong_option_is_named(variable: str, value: str, words: List[str]) -> None:
    with pytest.raises(p.ConfigError) as raised:
        config(f"{option(variable)}={value}")
    check_error(str(raised.value), option(variable), words)


def test_a_socket_that_lets_others_in_needs_tokens(tmp_path: Path) -> None:
    address = "127.0.0.1:1,unix:/run/proxy?mode=0660"
    for mode in "0660", "0606", "0640", "0610", "0601":
        with pytest.raises(p.ConfigError, match="SSH_AGENT_PROXY_TOKEN_FILE") as raised:
            config(ADDR=address.replace("0660", mode))
        check_error(str(raised.value), "SSH_AGENT_PROXY_ADDR", [f"mode {mode}"])
    assert config(ADDR=address, TOKEN_FILE=str(tmp_path / "tokens")).addr[1].mode == 0o660
    assert config(ADDR=address.replace("0660", "0700")).addr[1].mode == 0o700


def test_a_yes_is_kept_only_where_there_is_someone_to_ask() -> None:
    with pytest.raises(p.ConfigError, match="set SSH_AGENT_PROXY_CONFIRM too") as raised:
        config(CONFIRM_FOR="600")
    check_error(str(raised.value), "SSH_AGENT_PROXY_CONFIRM_FOR", [])
    assert config(CONFIRM_FOR="600", CONFIRM="/bin/sh").confirm_for == 600


def test_an_askpass_program_may_stand_on_the_path(tmp_path: Path) -> None:
    program = tmp_path / "my-askpass"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    env = {"PATH": f"/nowhere:{tmp_path}", "SSH_AGENT_PROXY_CONFIRM": "my-askpass"}
    upstream = p.Config.from_env(env, [], p.COMMANDS).confirm
    assert upstream and upstream.command == (str(program),)
    assert upstream.env == {**env, "SSH_ASKPASS_PROMPT": "confirm"}


@pytest.mark.parametrize("addition", ["", ".pub"])
def test_files_that_hold_no_public_key(addition: str, keys: Keys, tmp_path: Path) -> None:
    key = keys["ed25519"].read_bytes()
    public = keys.line("ed25519").encode() + b"\n"
    fifo, folder = tmp_path / "fifo", tmp_path / "folder"
    os.mkfifo(fifo)
    folder.mkdir()
    files: Dict[str, Tuple[bytes, str]] = {
        "private": (key, "a private key, where the public one (the .pub file) belongs"),
        "both": (key + public, "a private key"),
        "empty": (b"", "0 are there"),
        "comments": (b"# one\n\n# two\n", "0 are there"),
        "two": (public + public, "2 are there"),
        "binary": (bytes(range(256)), "one line with a public key is needed"),
        "large": (public + b"#" * (64 << 10), "larger than 64 KiB"),
    }
    for name, (content, _) in files.items():
        (tmp_path / (name + addition)).write_bytes(content)
    reasons = {name + addition: reason for name, (_, reason) in files.items()}
    reasons.update({"fifo": "not a regular file", "folder": "can't use"})
    for name, reason in reasons.items():
        path = tmp_path / name
        with pytest.raises(p.ConfigError, match=re.escape(reason)) as raised:
            config("--pubkey-file", str(path))
        check_error(str(raised.value), "--pubkey-file", [str(path)])


# ---------------------------------------------------------------- as a process


def start_wrong(home: Path, *argv: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    env = clean_env(home, **{"SSH_AGENT_PROXY_ADDR": "127.0.0.1:0", **env})
    return run([sys.executable, PROXY, *argv], env=env, check=False, timeout=20)


def one_line(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line of a program that ended for its settings."""
    assert done.returncode == 2, done
    assert done.stdout == b""
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    prefix = "ssh-agent-proxy: "
    assert lines[0].startswith(prefix)
    return lines[0][len(prefix) :]


# One of each kind of value: what else is wrong is for the tables above.
PROCESSES = [
    row
    for row in BAD
    if row[1] in ("127.0.0.1", "unix:run/proxy", "a\nb:1", "commits", "a b", "relative/agent",
                  "exec:", "nonsense", "/nowhere/key.pub", "*.example.com", "soon", "0")
]  # fmt: skip


@pytest.mark.parametrize(("variable", "value", "words"), PROCESSES, ids=named(PROCESSES))
def test_a_wrong_variable_ends_the_program_with_one_line(
    variable: str, value: str, words: List[str], home: Path
) -> None:
    name = f"SSH_AGENT_PROXY_{variable}"
    check_error(one_line(start_wrong(home, **{name: value})), name, words)


@pytest.mark.parametrize("command", ["serve", "shim"])
def test_a_wrong_option_ends_every_command_with_one_line(command: str, home: Path) -> None:
    check_error(one_line(start_wrong(home, command, "--addr", "x")), "--addr", ["'x'"])


@pytest.mark.parametrize("given", ["PUBKEY", "PUBKEY_FILE", "--pubkey", "--pubkey-file"])
@pytest.mark.parametrize("damage", ["none", "without its first line", "one line"])
def test_a_private_key_is_never_echoed(given: str, damage: str, keys: Keys, home: Path) -> None:
    lines = keys["ed25519"].read_text().splitlines()
    secret = lines[1:-1]
    shown = {"none": lines, "without its first line": lines[1:], "one line": ["".join(secret)]}
    text = "\n".join(shown[damage])
    file = home / "key"
    file.write_text(text)
    value = str(file) if given.lower().endswith("file") else text
    if given.startswith("-"):
        done = start_wrong(home, f"{given}={value}")
    else:
        done = start_wrong(home, **{f"SSH_AGENT_PROXY_{given}": value})
    said = one_line(done)
    for line in secret:
        for at in range(0, len(line) - 8, 4):
            assert line[at : at + 8] not in said


def test_bytes_that_are_no_text_are_named_in_one_line(home: Path) -> None:
    env = {os.fsencode(n): os.fsencode(v) for n, v in clean_env(home, LC_ALL="C").items()}
    done = subprocess.run(
        [sys.executable, str(PROXY)],
        env={**env, b"SSH_AGENT_PROXY_ADDR": b"\xff\xfe:x"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
    )
    said = one_line(done)
    assert said.startswith("SSH_AGENT_PROXY_ADDR: ")
    assert "udcff" in said


# ---------------------------------------------------------------- variables of nobody


def test_a_variable_that_looks_like_ours_is_known_to_be_none() -> None:
    assert config(ADRESS="127.0.0.1:1", PIN="x").unknown == (
        "SSH_AGENT_PROXY_ADRESS",
        "SSH_AGENT_PROXY_PIN",
    )


@pytest.mark.parametrize("variable", ["URL", "PUBKEY_URL", "CURL"])
def test_the_shims_variables_are_not_unknown(variable: str) -> None:
    assert config(**{variable: "x"}).unknown == ()


def test_the_shims_token_alone_protects_nothing_and_is_warned_about() -> None:
    assert config(TOKEN="x").unknown == ("SSH_AGENT_PROXY_TOKEN",)
    assert config(TOKEN="x", TOKEN_FILE="/tokens").unknown == ()


def test_a_variable_that_looks_like_ours_is_warned_about(
    agent: Agent, start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy(upstream=agent.sock, env={"SSH_AGENT_PROXY_ADRESS": "x"})
    proxy.wait_log(r"WARNING .*SSH_AGENT_PROXY_ADRESS")


def test_without_unix_sockets_there_is_no_address_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(p.socket, "AF_UNIX")
    with pytest.raises(p.ConfigError, match="unix:/run/proxy"):
        config(ADDR="unix:/run/proxy")
