"""Settings, from dictionaries and as a person gives them; each wrong one is named in one line."""

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
from conftest import Agent, Keys, Proxy, audited, http, private_file

import ssh_agent_proxy as p

HOME = "/home/someone"


def config(*argv: str, **variables: str) -> p.Config:
    """VARIABLES by their names after SSH_AGENT_PROXY_; those in capitals alone would be others."""
    env = {"HOME": HOME}
    env.update({f"SSH_AGENT_PROXY_{name}": value for name, value in variables.items()})
    return p.Config.from_env(env, argv, p.COMMANDS)


def from_env(**env: str) -> p.Config:
    return p.Config.from_env({"HOME": HOME, **env}, [], p.COMMANDS)


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
    ("ADDR", "[::1]:7221", (("::1", 7221),)),
    ("ADDR", "[fe80::1%eth0]:7221", (("fe80::1%eth0", 7221),)),
    ("ADDR", "0.0.0.0:0", (("0.0.0.0", 0),)),
    ("ADDR", "127.0.0.1:1,[::1]:2, host-1.example:3",
     (("127.0.0.1", 1), ("::1", 2), ("host-1.example", 3))),
    ("ADDR", "unix:~/proxy?mode=0600,127.0.0.1:1", ((f"{HOME}/proxy", 0o600), ("127.0.0.1", 1))),
    ("NAMESPACE", "git,file", ("git", "file")),
    ("NAMESPACE", "!\"#$%&'()*+-./~", ("!\"#$%&'()*+-./~",)),
    ("NAMESPACE", 255 * "n", (255 * "n",)),
    ("UPSTREAM", "unix:/run/agent", p.Upstream("/run/agent")),
    ("UPSTREAM", "exec:~/bin/relay 'b c' \"d e\" f\\ g",
     p.Upstream(command=(f"{HOME}/bin/relay", "b c", "d e", "f g"))),
    ("UPSTREAM", "exec:ssh host 'echo $HOME; x | y'",
     p.Upstream(command=("ssh", "host", "echo $HOME; x | y"))),
    ("ALLOWED_HOSTS", "box.example,.Corp.Example, x_y",
     ("box.example", ".corp.example", "x_y")),
    ("PAYLOADS", "any", ("commit", "tag", "push", "other")),
    ("PAYLOADS", "push, commit", ("push", "commit")),
    ("CONFIRM_FOR", "0", 0),
    ("TIMEOUT", "0.25", 0.25),
    ("TIMEOUT", "86400", 86400),
]  # fmt: skip


@pytest.mark.parametrize(("variable", "value", "expected"), GOOD)
def test_a_variable_and_its_option_set_the_same(
        variable: str, value: str, expected: object) -> None:  # fmt: skip
    """Else a setting means another thing in the env file than on the command line."""
    for argv in [option(variable), value], [f"{option(variable)}={value}"]:
        assert getattr(config(*argv), variable.lower()) == expected
    assert getattr(config(**{variable: value}), variable.lower()) == expected


def test_an_option_beats_its_variable_even_one_that_is_wrong(keys: Keys) -> None:
    """Else what a person types for one run is not what holds."""
    assert config("--timeout", "2", TIMEOUT="1").timeout == 2
    assert config("--timeout", "2", TIMEOUT="never").timeout == 2
    assert config("--namespace", "b", NAMESPACE="a").namespace == ("b",)
    c = config("--pubkey", keys.line("other"), PUBKEY=keys.line("ed25519"))
    assert pin(c) == keys.line("other")
    c = config("--pubkey-file", f"{keys['other']}.pub", PUBKEY=keys.line("ed25519"))
    assert pin(c) == keys.line("other")


def test_an_empty_variable_counts_as_unset() -> None:
    """Else an env file's `NAME=` stops the start."""
    for o in p.OPTIONS:
        assert config(**{o.variable: ""}) == config(), o.variable
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


@pytest.mark.parametrize(("given", "meant"), [
    ("~/agent", f"{HOME}/agent"),
    ("unix:%h/agent", f"{HOME}/agent"),
    ("$HOME/agent", f"{HOME}/agent"),
    ("/run/$WHO/a-${WHO}.sock", "/run/me/a-me.sock"),
    ("/run/%h/agent", "/run/%h/agent"),
    ("/run/~/agent", "/run/~/agent"),
    ("$NESTED", "/run/$WHO"),
])  # fmt: skip
def test_paths_are_expanded(given: str, meant: str) -> None:
    c = from_env(SSH_AGENT_PROXY_UPSTREAM=given, WHO="me", NESTED="/run/$WHO")
    assert c.upstream == p.Upstream(meant)


# ---------------------------------------------------------------- the pinned key


@pytest.mark.parametrize("before, after", [
    ("\ufeff# a comment\n\n", "\n"), ("\n  \n", "\r\n"), ("", "\n\n# more\n"),
])  # fmt: skip
def test_a_pin_may_have_comments_and_empty_lines_around_it(
        before: str, after: str, keys: Keys, tmp_path: Path) -> None:  # fmt: skip
    line = keys.line("ed25519")
    file = tmp_path / "pin"
    file.write_bytes((before + line + after).encode())
    assert pin(config(PUBKEY_FILE=str(file))) == line
    assert pin(config(PUBKEY=file.read_text("utf-8-sig"), PUBKEY_FILE="/ignored")) == line


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
    file.write_text("broken")
    for answer in http(proxy.port, "GET", "/publickey"), http(proxy.port, "POST", "/sign", b"x"):
        assert answer.status == 503
        # Where it is concerns nobody but its owner.
        assert answer.text == "the file of --pubkey-file can't be used: the proxy's log says why\n"
    assert f"--pubkey-file: can't use '{file}': not a public key" in audited(proxy, 3)["reason"]


@pytest.mark.parametrize("text, reason", [
    ("{key}", "a private key, where the public one (the .pub file) belongs"),
    ("", "0 are there"), ("{line}\n{line}\n", "2 are there"),
    ("# PRIVATE KEY\n{line}\n{line}\n", "a private key"),
    ("{line}\n" + (64 << 10) * "#", "larger than 64 KiB"),
], ids=["private", "empty", "two", "two below a comment", "large"])  # fmt: skip
def test_a_file_that_holds_no_public_key_is_named_with_the_reason(
        text: str, reason: str, keys: Keys, tmp_path: Path) -> None:  # fmt: skip
    path = tmp_path / "key.pub"
    text = text.replace("{key}", keys["ed25519"].read_text())
    path.write_text(text.replace("{line}", keys.line("ed25519")))
    before = os.listdir("/dev/fd")
    with pytest.raises(p.ConfigError, match=re.escape(reason)) as raised:
        config("--pubkey-file", str(path))
    check_error(str(raised.value), "--pubkey-file", [str(path)])
    assert os.listdir("/dev/fd") == before


def test_what_is_wrong_with_a_file_just_written_is_said_once(tmp_path: Path) -> None:
    path = private_file(tmp_path / "tokens", "half=a token")
    with pytest.raises(p.ConfigError) as raised:
        p.File(str(path), "X").read(p.parse_tokens, private=True)
    assert str(raised.value).count("can't use") == 1


# ---------------------------------------------------------------- what is not taken

ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"

# The variable, its value, and words that the error must have in it.
BAD: List[Tuple[str, str, List[str]]] = [
    ("ADDR", "127.0.0.1", ["'127.0.0.1'", "HOST:PORT"]),
    ("ADDR", ":7221", ["':7221'", "HOST:PORT"]),
    ("ADDR", "127.0.0.1:65536", ["'127.0.0.1:65536'"]),
    ("ADDR", "127.0.0.1:\u0661", ["'127.0.0.1:\u0661'"]),
    ("ADDR", "::1:7221", ["'::1:7221'", "]:PORT"]),
    ("ADDR", "127.0.0.1:1,", ["''"]),
    ("ADDR", "unix:run/proxy", ["'unix:run/proxy'", "unix:/path"]),
    ("ADDR", "unix:/run/proxy?mode=66", ["'unix:/run/proxy?mode=66'", "?mode=0660"]),
    ("ADDR", "\x1b[2Jhost:1\u202e", ["x1b[2Jhost:1", "u202e"]),
    ("NAMESPACE", "a b", ["'a b'", "printable ASCII"]),
    ("NAMESPACE", "git,", ["''"]),
    ("NAMESPACE", "a\x7f", ["x7f"]),
    ("NAMESPACE", 256 * "n", ["255"]),
    ("UPSTREAM", "relative/agent", ["'relative/agent'", "absolute path", "exec:"]),
    ("UPSTREAM", "$NOT_SET_HERE/agent", ["$NOT_SET_HERE", "not set"]),
    ("UPSTREAM", "exec:  ", ["'exec:  '", "without a command"]),
    ("UPSTREAM", "exec:socat 'x", ['"exec:socat \'x"', "quotation"]),
    ("PUBKEY", "nonsense", ["not a public key"]),
    ("PUBKEY", f"{ED25519}\n{ED25519}", ["one line", "2"]),
    ("PUBKEY", "# only a comment", ["one line", "0"]),
    ("PUBKEY_FILE", "/nowhere/key.pub", ["can't use '/nowhere/key.pub': No such file"]),
    ("ALLOWED_HOSTS", "a b", ["'a b'", "host name"]),
    ("ALLOWED_HOSTS", "box:80", ["'box:80'"]),
    ("ALLOWED_HOSTS", "*.example.com", ["'*.example.com'", ".suffix"]),
    ("ALLOWED_HOSTS", ".", ["'.'"]),
    ("TIMEOUT", "soon", ["'soon'", "seconds"]),
    ("TIMEOUT", "0", ["'0'", "above 0"]),
    ("TIMEOUT", "1e3", ["'1e3'"]),
    ("TIMEOUT", "99999999999", ["'99999999999'"]),
    ("TIMEOUT", "\u0663", ["'\u0663'"]),
    ("TOKEN_FILE", "$NOT_SET_HERE/tokens", ["$NOT_SET_HERE", "not set"]),
    ("PAYLOADS", "commits", ["'commits'", "commit, tag, push"]),
    ("PAYLOADS", "commit,any", ["'commit,any'", "commit, tag, push"]),
    ("CONFIRM", "/etc/passwd", ["'/etc/passwd'", "can be run"]),
    ("CONFIRM_FOR", "ever", ["'ever'", "seconds"]),
]


def check_error(error: str, name: str, words: List[str]) -> None:
    """One line that begins with the setting's NAME and has the WORDS in it."""
    assert error.startswith(f"{name}: ")
    for word in words:
        assert word in error
    assert error.isprintable()
    assert len(error) < 600


@pytest.mark.parametrize(("variable", "value", "words"), BAD)
def test_a_wrong_setting_is_named(variable: str, value: str, words: List[str]) -> None:
    """Else a person doesn't know which of eleven settings to mend."""
    with pytest.raises(p.ConfigError) as raised:
        config(**{variable: value})
    check_error(str(raised.value), f"SSH_AGENT_PROXY_{variable}", words)
    with pytest.raises(p.ConfigError) as raised:
        config(f"{option(variable)}={value}")
    check_error(str(raised.value), option(variable), words)


def test_a_wrong_value_of_every_setting_is_tried() -> None:
    assert {row[0] for row in BAD} == {o.variable for o in p.OPTIONS}


def test_a_socket_that_lets_others_in_needs_tokens(tmp_path: Path) -> None:
    address = "127.0.0.1:1,unix:/run/proxy?mode=0660"
    for mode in "0660", "0606", "0640", "0610", "0601":
        with pytest.raises(p.ConfigError, match="SSH_AGENT_PROXY_TOKEN_FILE") as raised:
            config(ADDR=address.replace("0660", mode))
        check_error(str(raised.value), "SSH_AGENT_PROXY_ADDR", [f"mode={mode}'"])
    assert config(ADDR=address, TOKEN_FILE=str(tmp_path / "tokens")).addr[1].mode == 0o660
    assert config(ADDR=address.replace("0660", "0700")).addr[1].mode == 0o700


def test_a_yes_is_kept_only_where_there_is_someone_to_ask() -> None:
    with pytest.raises(p.ConfigError, match="set SSH_AGENT_PROXY_CONFIRM too") as raised:
        config(CONFIRM_FOR="600")
    check_error(str(raised.value), "SSH_AGENT_PROXY_CONFIRM_FOR", ["'600'"])
    assert config(CONFIRM_FOR="600", CONFIRM="/bin/sh").confirm_for == 600


@pytest.mark.parametrize("name", ["my-askpass", "~/my-askpass", "%h/my-askpass", "$D/my-askpass"])
def test_an_askpass_program_may_stand_on_the_path_or_in_the_home(
        name: str, tmp_path: Path) -> None:  # fmt: skip
    program = tmp_path / "my-askpass"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    env = {"PATH": f"/nowhere:{tmp_path}", "HOME": str(tmp_path), "D": str(tmp_path)}
    env["SSH_AGENT_PROXY_CONFIRM"] = name
    upstream = p.Config.from_env(env, [], p.COMMANDS).confirm
    assert upstream and upstream.command == (str(program),)
    assert upstream.env == {**env, "SSH_ASKPASS_PROMPT": "confirm"}


def test_without_unix_sockets_there_is_no_address_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(p.socket, "AF_UNIX")
    with pytest.raises(p.ConfigError, match="unix:/run/proxy"):
        config(ADDR="unix:/run/proxy")


@pytest.mark.parametrize("given", ["PUBKEY", "PUBKEY_FILE", "--pubkey", "--pubkey-file"])
def test_a_private_key_is_never_echoed(given: str, keys: Keys, home: Path) -> None:
    """A message stands in terminals, journals and bug reports."""
    lines = keys["ed25519"].read_text().splitlines()
    secret = lines[1:-1]
    for shown in lines, secret, [" ".join(secret)], ["".join(secret)]:
        value = "\n".join(shown)
        if given.lower().endswith("file"):
            value = str(private_file(home / "key", value))
        with pytest.raises(p.ConfigError) as raised:
            config(given, value) if given.startswith("-") else config(**{given: value})
        for line in secret:
            for at in range(0, len(line) - 8, 4):
                assert line[at : at + 8] not in str(raised.value)


# ---------------------------------------------------------------- variables of nobody


@pytest.mark.parametrize(("variables", "unknown"), [
    ({"ADRESS": "127.0.0.1:1", "PIN": "x"}, ("SSH_AGENT_PROXY_ADRESS", "SSH_AGENT_PROXY_PIN")),
    ({"URL": "x", "PUBKEY_URL": "x", "CURL": "x"}, ()),  # the shim's
    ({"TOKEN": "x"}, ("SSH_AGENT_PROXY_TOKEN",)),  # the shim's too, but protects nothing here
    ({"TOKEN": "x", "TOKEN_FILE": "/tokens"}, ()),
])  # fmt: skip
def test_a_variable_that_looks_like_ours_is_known_to_be_none(
        variables: Dict[str, Any], unknown: Tuple[str, ...]) -> None:  # fmt: skip
    """Else a setting with a typing error is silently not in force."""
    assert config(**variables).unknown == unknown
