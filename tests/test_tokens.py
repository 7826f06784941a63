"""Bearer tokens: the file that holds them, who comes in, on which leash, and `token NAME`."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import pytest
from conftest import (
    HOST,
    PROXY,
    Agent,
    Answer,
    Keys,
    Proxy,
    ask,
    call,
    cannot_run,
    clean_env,
    commit,
    connect,
    get,
    log_fields,
    logged,
    one_line,
    parse_answer,
    post,
    post_chunked,
    private_file,
    read_all,
    refused,
    request_lines,
    rows,
    run,
    short_folder,
    tag,
    the_one_answer,
)
from test_http import clean

import ssh_agent_proxy as p

# No text of a log or an answer may hold this: each token of these tests begins with it.
SECRET = "s3cr3t"
TOKEN = SECRET + "-Tok3n._~+/AZaz09"
SECOND = SECRET + "-second-of-these"
WRONG = SECRET + "-of-nobody-here"
FINGERPRINT = "SHA256:" + 43 * "a"
VARIABLE = "SSH_AGENT_PROXY_TOKEN_FILE"

COMMIT = commit()
PAYLOADS = {"commit": COMMIT, "tag": tag(), "other": b"hello"}


def bearer(token: str = TOKEN) -> str:
    return f"Authorization: Bearer {token}"


def must_be_root() -> None:
    if os.geteuid() != 0:
        cannot_run("only root can give a file to another user: run the tests as root")


# ================================================================ pure: the file


@pytest.mark.parametrize(("line", "name", "key", "payloads"), rows([
    ("a token alone", TOKEN, "line 1", "", ()),
    ("a name", f"{TOKEN} box", "box", "", ()),
    ("every character of a name", f"{TOKEN} AZaz09._-", "AZaz09._-", "", ()),
    ("a name of digits", f"{TOKEN} 1", "1", "", ()),
    ("a key", f"{TOKEN} key={FINGERPRINT}", "line 1", FINGERPRINT, ()),
    ("a name and a key", f"{TOKEN} box key={FINGERPRINT}", "box", FINGERPRINT, ()),
    ("payloads", f"{TOKEN} payloads=commit", "line 1", "", ("commit",)),
    ("several payloads", f"{TOKEN} payloads=tag,commit,push", "line 1", "",
     ("tag", "commit", "push")),
    ("any payloads", f"{TOKEN} payloads=any", "line 1", "", ("commit", "tag", "push", "other")),
    ("all", f"{TOKEN} box key={FINGERPRINT} payloads=tag", "box", FINGERPRINT, ("tag",)),
    ("options in another order", f"{TOKEN} box payloads=tag key={FINGERPRINT}", "box",
     FINGERPRINT, ("tag",)),
    ("blanks and tabs around and between", f" \t{TOKEN} \t box\t\tpayloads=tag \t", "box", "",
     ("tag",)),
    ("a name like an option's", f"{TOKEN} key", "key", "", ()),
    ("a # behind the line's start", f"{TOKEN} box\n#{SECOND}", "box", "", ()),
]))  # fmt: skip
def test_a_line_is_a_token_its_name_and_its_leash(
    line: str, name: str, key: str, payloads: Tuple[str, ...]
) -> None:
    (token,) = p.parse_tokens(line)
    assert (token.name, token.key, token.payloads) == (name, key, payloads)
    assert p.check_token(f"Bearer {TOKEN}", [token]) is token


LONG = 16 * "a"


@pytest.mark.parametrize("token", [
    LONG, "Az09-._~+/Az09-._~+/", LONG + "=", LONG + "===", "-" + LONG, "key" + LONG + "=",
    base64.b64encode(bytes(range(256))).decode(), base64.urlsafe_b64encode(bytes(20)).decode(),
    "f" * 4096,
])  # fmt: skip
def test_every_b64token_is_a_token(token: str) -> None:
    for rest in ("", " box", " payloads=tag"):
        tokens = p.parse_tokens(token + rest)
        assert p.check_token(f"Bearer {token}", tokens) is tokens[0]


@pytest.mark.parametrize("odd", [
    "=", "==", "=a", "a=b", "a==b", "a=b=", '"a"', "a,b", "a;b", "a:b", "a%20b", "a%", "a#b", "a@b",
    "a!b", "a$b", "a&b", "a*b", "a|b", "<a>", "(a)", "a\\b", "\u00e4", "a\u00e4", "\u0661",
    "\uff41", "a\x00", "\x00", "a\x07b", "a\x1b[31m", "a\u200bb", "\ufeffa", "\ufffd", "Bearer:a",
], ids=ascii)  # fmt: skip
def test_what_is_no_b64token_breaks_the_file(odd: str) -> None:
    for token in (odd, odd + LONG):
        with pytest.raises(p.ConfigError, match="line 1: "):
            p.parse_tokens(f"{token} box\n")


@pytest.mark.parametrize("token", ["x", 15 * "a", 14 * "a" + "="])
def test_a_token_that_can_be_guessed_breaks_the_file_and_the_way_out_is_named(token: str) -> None:
    with pytest.raises(p.ConfigError, match=r"^line 2: .*16 characters.*`\S+ token NAME`"):
        p.parse_tokens(f"# mine\n{token} box\n")


# Each word that might be a token begins as one: none may be shown.
BROKEN: List[Tuple[str, str, int]] = [
    # What an editor shows as two lines, or as one word, must not make a token another's name.
    *[(f"{c!a} for a blank", f"{TOKEN}{c}{SECOND}", 1)
      for c in "\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028"],
    ("two names", f"{TOKEN} {SECOND} {SECRET}", 1),
    *[(f"a name with {c!r}", f"{TOKEN} {SECRET}{c}", 1) for c in ",;:/+~@%!*\"'()<>\\\u00e4\x00"],
    ("a comment behind the token", f"{TOKEN} # {SECRET}", 1),
    ("an indented comment", f"{TOKEN}\n # {SECRET}", 2),
    ("the same token twice", f"{TOKEN} box\n{TOKEN} jar", 2),
    ("the same token twice, with others between", f"{TOKEN}\n#\n{SECOND}\n\n{TOKEN}", 5),
    ("key= twice", f"{TOKEN} key={FINGERPRINT} key={FINGERPRINT}", 1),
    ("payloads= twice", f"{TOKEN} payloads=tag payloads=tag", 1),
    ("an unknown option", f"{TOKEN} {SECRET}=1", 1),
    ("an option without a name", f"{TOKEN} ={SECRET}", 1),
    ("key= without a value", f"{TOKEN} key=", 1),
    ("payloads= without a value", f"{TOKEN} payloads=", 1),
    ("key= that is no fingerprint", f"{TOKEN} key={SECRET}", 1),
    ("key= that is too short", f"{TOKEN} key={FINGERPRINT[:-1]}", 1),
    ("key= that is too long", f"{TOKEN} key={FINGERPRINT}a", 1),
    ("an unknown kind", f"{TOKEN} payloads={SECRET}", 1),
    ("the kind other", f"{TOKEN} payloads=other", 1),
    ("a kind in capitals", f"{TOKEN} payloads=Commit", 1),
    ("an empty kind between", f"{TOKEN} payloads=commit,,tag", 1),
    ("a mistake behind good lines", f"# mine\n{TOKEN} box\n\n{SECOND} jar {SECRET}\n", 4),
]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), rows(BROKEN))
def test_a_broken_line_is_named_by_its_number_and_not_shown(text: str, number: int) -> None:
    with pytest.raises(p.ConfigError) as e:
        p.parse_tokens(text)
    said = str(e.value)
    assert f"line {number}:" in said
    assert len(said) > len(f"line {number}: ")
    assert said.isprintable()
    assert SECRET not in said


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_file_has_comments_and_empty_lines_and_is_read_to_its_end(end: str) -> None:
    third = SECRET + "-third-of-these"
    lines = [
        f"# {SECRET}", "#", f"#{TOKEN} box", f"{TOKEN} box", "", " \t", f"{SECOND} payloads=tag",
        f"# {TOKEN}", third,
    ]  # fmt: skip
    for last in ("", end):
        tokens = p.parse_tokens(end.join(lines) + last)
        assert [token.name for token in tokens] == ["box", "line 7", "line 9"]
        assert tokens[1].payloads == ("tag",)
        assert p.check_token(f"Bearer {third}", tokens) is tokens[2]


def test_a_token_is_not_kept_in_memory() -> None:
    for token in p.parse_tokens(f"{TOKEN} box\n{SECOND}\n"):
        assert SECRET not in repr(token)


# ================================================================ pure: the Authorization field

TAKEN = [
    "Bearer {}", "bearer {}", "BEARER {}", "bEARER {}",
    "Bearer  {}", "Bearer    {}",  # RFC 9110 section 11.4: one blank or more
]  # fmt: skip

NOT_TAKEN: List[Tuple[str, Optional[str]]] = [
    ("none", None),
    ("only the scheme", "Bearer"),
    ("another scheme", f"Basic {TOKEN}"),
    ("a scheme that begins alike", f"BearerX {TOKEN}"),
    ("a colon", f"Bearer: {TOKEN}"),
    ("a tab", f"Bearer\t{TOKEN}"),
    ("no blank", f"Bearer{TOKEN}"),
    ("the scheme twice", f"Bearer Bearer {TOKEN}"),
    ("a list of tokens", f"Bearer {TOKEN},{TOKEN}"),
    ("in quotes", f'Bearer "{TOKEN}"'),
    ("in percent", "Bearer " + "".join(f"%{c:02x}" for c in TOKEN.encode())),
    ("wrong", f"Bearer {WRONG}"),
    ("shorter", f"Bearer {TOKEN[:-1]}"),
    ("longer", f"Bearer {TOKEN}x"),
    ("padded", f"Bearer {TOKEN}="),
    ("in another case", f"Bearer {TOKEN.swapcase()}"),
    ("with a byte beyond ASCII", f"Bearer {TOKEN}\xa0"),
    ("in full width", f"Bearer {TOKEN.replace('s', chr(0xFF53))}"),
]


@pytest.mark.parametrize("form", TAKEN)
def test_the_field_holds_the_token(form: str) -> None:
    tokens = p.parse_tokens(f"{SECOND}\n{TOKEN} box\n")
    assert p.check_token(form.format(TOKEN), tokens) is tokens[1]


@pytest.mark.parametrize("value", rows(NOT_TAKEN))
def test_anything_else_than_a_token_of_the_file_is_401(value: Optional[str]) -> None:
    with pytest.raises(p.RequestError) as e:
        p.check_token(value, p.parse_tokens(f"{SECOND}\n{TOKEN} box\n"))
    assert e.value.status == 401
    assert e.value.fields == (("WWW-Authenticate", "Bearer"),)
    assert SECRET not in str(e.value).lower()


@pytest.mark.parametrize("given", [TOKEN, SECOND, WRONG, ""])
def test_every_token_is_compared_in_constant_time_also_behind_the_right_one(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: List[Tuple[Any, Any]] = []
    real = hmac.compare_digest

    def spy(a: Any, b: Any) -> bool:
        compared.append((a, b))
        return real(a, b)

    tokens = p.parse_tokens(f"{TOKEN}\n{SECOND}\n{SECRET}-third-of-these\n")
    monkeypatch.setattr(hmac, "compare_digest", spy)
    try:
        p.check_token(f"Bearer {given}", tokens)
    except p.RequestError:
        assert given in (WRONG, "")
    assert len(compared) == 3
    for a, b in compared:
        # Digests: a comparison of texts of different lengths would tell the length.
        assert isinstance(a, bytes)
        assert len(a) == len(b) == hashlib.sha256().digest_size
    assert TOKEN.encode() not in [value for pair in compared for value in pair]


# ================================================================ a proxy that many tests share


class Door:
    """A proxy with a token file of its own, which tests write anew; nothing is told in advance."""

    def __init__(self, folder: Path, agent: Agent, *args: str) -> None:
        self.folder = folder
        self.path = folder / "tokens"
        self.write(f"{TOKEN} box\n")
        argv = [sys.executable, str(PROXY), "--addr", "127.0.0.1:0", "-v", *args]
        argv += ["--upstream", str(agent.sock)]
        self.proxy = Proxy(argv, clean_env(folder / "home", **{VARIABLE: self.path}))
        self.port = self.proxy.port

    def clear(self) -> None:
        if self.path.is_dir() and not self.path.is_symlink():
            self.path.rmdir()
        elif self.path.is_symlink() or self.path.exists():
            self.path.unlink()

    def write(self, text: str, mode: int = 0o600) -> None:
        self.clear()
        self.path.write_bytes(text.encode())
        self.path.chmod(mode)

    def raw(self, data: bytes) -> Tuple[bytes, Dict[str, str]]:
        """What comes back for DATA, and the line that the log has for it."""
        received, (line,) = logged(self.proxy, self.port, data)
        assert SECRET not in self.proxy.log()
        return received, log_fields(line)

    def ask(self, data: bytes) -> Tuple[Answer, Dict[str, str]]:
        received, fields = self.raw(data)
        return the_one_answer(received), fields

    def status(self, token: str, data: bytes = b"") -> int:
        """The status of a signature for the holder of TOKEN."""
        return self.ask(data or post(COMMIT, bearer(token)))[0].status


@pytest.fixture(scope="module")
def open_door(keys: Keys) -> Iterator[Callable[..., Door]]:
    """Proxies by their further arguments, each started once, in front of an agent of two keys."""
    doors: Dict[Tuple[str, ...], Door] = {}
    with short_folder() as folder:
        agent = Agent(folder / "agent")
        agent.add(keys["ed25519"])
        agent.add(keys["other"])

        def start(*args: str) -> Door:
            if args not in doors:
                own = folder / str(len(doors))
                own.mkdir()
                doors[args] = Door(own, agent, *args)
            doors[args].write(f"{TOKEN} box\n")
            return doors[args]

        yield start
        for door in doors.values():
            assert door.proxy.stop() == 0
            clean(door.proxy)
            assert SECRET not in door.proxy.log()
        agent.stop()


@pytest.fixture
def door(open_door: Callable[..., Door]) -> Door:
    return open_door()


def unauthorized(answer: Answer) -> Answer:
    refused(answer, 401)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert SECRET not in answer.text.lower()
    assert "ssh-agent-proxy token NAME" in answer.text
    return answer


# ---------------------------------------------------------------- who comes in


def test_the_holder_of_a_token_is_served(door: Door) -> None:
    answer, fields = door.ask(post(COMMIT, "Authorization: bearer  " + TOKEN))
    assert answer.status == 200
    assert answer.body.startswith(b"-----BEGIN SSH SIGNATURE-----\n")
    assert (fields["outcome"], fields["token"]) == ("signed", "box")
    answer, fields = door.ask(get("/publickey", bearer()))
    assert answer.status == 200
    assert fields["token"] == "box"


@pytest.mark.parametrize(("fields", "why"), rows([
    ("none", [], "a token is needed"),
    ("another scheme", [f"Authorization: Basic {TOKEN}"], "a token is needed"),
    ("wrong", [bearer(WRONG)], "this token is not one of the proxy's"),
    ("two tokens", [bearer(f"{TOKEN} {TOKEN}")], "this token is not one of the proxy's"),
]))  # fmt: skip
def test_nobody_else_is_served(fields: List[str], why: str, door: Door) -> None:
    for data in (post(COMMIT, *fields), get("/publickey", *fields)):
        answer, noted = door.ask(data)
        assert unauthorized(answer).text.startswith(why)
        assert (noted["outcome"], noted["status"]) == ("refused", "401")
        assert "token" not in noted
        assert "digest" not in noted


# What a client shows to everybody anyway: a log may hold it.
SHOWN = "shown-Tok3n-of-these"


@pytest.mark.parametrize(("data", "status"), rows([
    ("in a cookie", get("/publickey", f"Cookie: token={SHOWN}"), 401),
    ("for a proxy", get("/publickey", f"Proxy-Authorization: Bearer {SHOWN}"), 401),
    ("in the body", post(f"access_token={SHOWN}".encode(),
                         "Content-Type: application/x-www-form-urlencoded"), 401),
    ("behind a question mark", get(f"/publickey?access_token={SHOWN}"), 404),
    ("in the target's authority",
     f"GET http://{SHOWN}@localhost/publickey HTTP/1.1\r\n".encode() + HOST + b"\r\n", 400),
    ("in a trailer", post_chunked(b"1\r\nx\r\n0\r\n" + bearer(SHOWN).encode() + b"\r\n\r\n"), 401),
]))  # fmt: skip
def test_a_token_is_taken_from_nowhere_else(data: bytes, status: int, door: Door) -> None:
    door.write(f"{SHOWN} box\n")
    assert door.status(SHOWN) == 200
    refused(door.ask(data)[0], status)


def head(path: str, *fields: str) -> bytes:
    return b"HEAD" + get(path, *fields)[3:]


@pytest.mark.parametrize("path", ["/healthz", "/shim"])
def test_health_and_shim_need_no_token(path: str, door: Door) -> None:
    for fields in ((), (bearer("wrong"),), (bearer(),)):
        for asked in (get, head):
            data, noted = door.raw(asked(path, *fields))
            assert parse_answer(data).status == 200
            assert "token" not in noted


def test_an_unnamed_token_is_its_line_in_the_log(door: Door) -> None:
    door.write(f"# mine\n\n{SECOND}\n{TOKEN}\n")
    answer, fields = door.ask(post(COMMIT, bearer()))
    assert answer.status == 200
    assert fields["token"] == "line 4"


def test_without_a_token_file_a_token_is_not_looked_at(proxy: Proxy) -> None:
    for fields in ((), (bearer(),), ("Authorization: nonsense",)):
        assert ask(proxy.port, post(COMMIT, *fields)).status == 200
    assert SECRET not in proxy.log()


# ---------------------------------------------------------------- the order of checks

BEFORE: List[Tuple[str, bytes, int]] = [
    ("host", b"GET /publickey HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
    ("path", get("/nope"), 404),
    ("a query", get("/publickey?"), 404),
    ("method", get("/sign"), 405),
]

BEHIND: List[Tuple[str, bytes]] = [
    ("a namespace that is not allowed", post(COMMIT, "SSHSIG-Namespace: file")),
    ("a key that is malformed", get("/publickey", "SSHSIG-Key: nonsense")),
    ("no length", b"POST /sign HTTP/1.1\r\n" + HOST + b"\r\n"),
    ("an empty body", post(b"")),
    # Nothing of a body is waited for, and nobody is told to go on.
    ("a body that is to come", post(b"", length=1 << 30)),
    ("a body that waits", post(b"", "Expect: 100-continue", length=1 << 30)),
    ("a malformed chunk", post_chunked(b"nonsense\r\n")),
]


@pytest.mark.parametrize(("data", "status"), rows(BEFORE))
def test_what_is_checked_before_the_token(data: bytes, status: int, door: Door) -> None:
    for text in (f"{TOKEN}\n", "broken\n\n"):
        door.write(text)
        answer, _ = door.ask(data)
        refused(answer, status)
        assert "www-authenticate" not in answer.headers


@pytest.mark.parametrize("data", rows(BEHIND))
def test_what_is_checked_behind_the_token(data: bytes, door: Door) -> None:
    unauthorized(door.ask(data)[0])


def test_the_agent_is_not_asked_for_those_who_have_no_token(
    scripted_agent: Callable[..., Path], start_proxy: Callable[..., Proxy], short: Path
) -> None:
    asked: List[int] = []
    path = private_file(short / "tokens", f"{TOKEN}\n")
    upstream = scripted_agent(lambda connection: asked.append(1))
    proxy = start_proxy("--token-file", path, upstream=upstream)
    proxy.wait_log("/sign can't work yet")
    asked.clear()
    for data in (post(COMMIT), get("/publickey"), post(COMMIT, bearer(WRONG))):
        unauthorized(ask(proxy.port, data))
    assert not asked
    assert ask(proxy.port, get("/publickey", bearer())).status in (502, 503)
    assert asked


# ---------------------------------------------------------------- leashes: key=


def fingerprint(keys: Keys, name: str) -> str:
    return p.parse_key_line(keys.line(name)).key.fingerprint


def leashed(door: Door, keys: Keys, name: str) -> None:
    door.write(f"{TOKEN} box key={fingerprint(keys, name)}\n{SECOND} jar\n")


def verified(keys: Keys, name: str, folder: Path, block: bytes) -> bool:
    """Has that key made BLOCK, for COMMIT? As ssh-keygen sees it."""
    (folder / "signers").write_text(f"me {keys.line(name)}\n")
    (folder / "block").write_bytes(block)
    argv = ["ssh-keygen", "-Y", "verify", "-f", folder / "signers", "-I", "me", "-n", "git"]
    return run([*argv, "-s", folder / "block"], input=COMMIT, check=False).returncode == 0


def naming(keys: Keys, how: str, name: str) -> List[str]:
    return {
        "nothing": [],
        "line": [f"SSHSIG-Key: {keys.line(name)}"],
        "fingerprint": [f"SSHSIG-Key: {fingerprint(keys, name)}"],
    }[how]


@pytest.mark.parametrize("pin", ["", "ed25519", "other"])
@pytest.mark.parametrize("key", ["ed25519", "other"])
def test_a_tokens_key_signs_whatever_is_pinned_for_all(
    key: str, pin: str, open_door: Callable[..., Door], keys: Keys, short: Path
) -> None:
    door = open_door(*(["--pubkey", keys.line(pin)] if pin else []))
    leashed(door, keys, key)
    for how in ("nothing", "line", "fingerprint"):
        named = naming(keys, how, key)
        answer, fields = door.ask(post(COMMIT, bearer(), *named))
        assert answer.status == 200, answer
        assert verified(keys, key, short, answer.body)
        assert fields["key"] == fingerprint(keys, key)
        answer, _ = door.ask(get("/publickey", bearer(), *named))
        assert answer.text.split()[:2] == keys.line(key).split()[:2]


@pytest.mark.parametrize("pin", ["", "ed25519", "other"])
@pytest.mark.parametrize(("key", "named"), [
    ("ed25519", "other"), ("other", "ed25519"), ("ed25519", "rsa2048"),
])  # fmt: skip
def test_another_key_than_the_tokens_is_refused(
    key: str, named: str, pin: str, open_door: Callable[..., Door], keys: Keys
) -> None:
    door = open_door(*(["--pubkey", keys.line(pin)] if pin else []))
    leashed(door, keys, key)
    for how in ("line", "fingerprint"):
        fields = [bearer(), *naming(keys, how, named)]
        for data in (post(COMMIT, *fields), get("/publickey", *fields)):
            answer = refused(door.ask(data)[0], 403)
            assert fingerprint(keys, key) in answer.text
            if key != pin:  # else both say so
                assert "key=" in answer.text


def test_a_tokens_key_that_the_agent_lacks_is_no_usable_key(door: Door, keys: Keys) -> None:
    leashed(door, keys, "rsa2048")
    for how in ("nothing", "line", "fingerprint"):
        fields = [bearer(), *naming(keys, how, "rsa2048")]
        for data in (post(COMMIT, *fields), get("/publickey", *fields)):
            answer = refused(door.ask(data)[0], 503)
            assert fingerprint(keys, "rsa2048") in answer.text
    assert door.status(SECOND) == 200


def test_a_token_without_key_is_under_the_general_pin(
    open_door: Callable[..., Door], keys: Keys
) -> None:
    door = open_door("--pubkey", keys.line("other"))
    leashed(door, keys, "ed25519")
    answer, fields = door.ask(post(COMMIT, bearer(SECOND)))
    assert answer.status == 200
    assert fields["key"] == fingerprint(keys, "other")
    answer, _ = door.ask(post(COMMIT, bearer(SECOND), *naming(keys, "line", "ed25519")))
    assert "--pubkey" in refused(answer, 403).text or "PUBKEY" in answer.text


# ---------------------------------------------------------------- leashes: payloads=


@pytest.mark.parametrize(("general", "leash", "allowed"), rows([
    ("any, narrowed to commits", "any", "commit", {"commit"}),
    ("any, narrowed to two", "any", "tag,commit", {"tag", "commit"}),
    ("any, as it is", "any", "any", {"commit", "tag", "other"}),
    ("commits, replaced by tags", "commit", "tag", {"tag"}),
    ("commits, widened to all", "commit", "any", {"commit", "tag", "other"}),
    ("any, without a leash", "any", "", {"commit", "tag", "other"}),
    ("commits, without a leash", "commit", "", {"commit"}),
]))  # fmt: skip
def test_a_tokens_payloads_replace_the_general_setting(
    general: str, leash: str, allowed: Set[str], open_door: Callable[..., Door]
) -> None:
    door = open_door("--payloads", general)
    door.write(f"{TOKEN} box{leash and ' payloads=' + leash}\n{SECOND} payloads=push\n")
    for kind, payload in PAYLOADS.items():
        answer, fields = door.ask(post(payload, bearer()))
        assert fields["kind"] == kind
        if kind in allowed:
            assert answer.status == 200, answer
            continue
        refused(answer, 403)
        assert f"kind {kind}" in answer.text
        assert ("payloads=" if leash else "SSH_AGENT_PROXY_PAYLOADS") in answer.text
        assert (leash or general) in answer.text


# ---------------------------------------------------------------- the file changes


def test_a_token_is_revoked_by_deleting_its_line(door: Door) -> None:
    for _ in range(3):
        door.write(f"{TOKEN} box\n{SECOND} jar\n")
        assert door.status(TOKEN) == door.status(SECOND) == 200
        door.write(f"{SECOND} jar\n")
        unauthorized(door.ask(post(COMMIT, bearer()))[0])
        assert door.status(SECOND) == 200


def test_a_change_that_leaves_size_and_time_as_they_were_counts(door: Door) -> None:
    door.write(f"{TOKEN}\n")
    before = door.path.stat()
    assert door.status(TOKEN) == 200
    other = TOKEN[:-1] + "8"
    with door.path.open("r+") as f:
        f.write(f"{other}\n")
    os.utime(door.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (door.path.stat().st_size, door.path.stat().st_ino) == (before.st_size, before.st_ino)
    assert door.status(TOKEN) == 401
    assert door.status(other) == 200


@pytest.mark.parametrize(("later", "status"), rows([
    ("deleted", f"{SECOND} jar\n", 401),
    ("on a shorter leash", f"{TOKEN} box payloads=tag\n", 403),
    ("unchanged", f"# but for this comment\n{TOKEN} box\n", 200),
]))  # fmt: skip
def test_a_token_counts_until_the_request_is_whole(later: str, status: int, door: Door) -> None:
    # Who holds the body back must not outlast the line.
    request = post(COMMIT, bearer())
    with connect(door.port) as s:
        s.sendall(b"POST /sign HTTP/1.1\r\n" + HOST + f"{bearer()}\r\nExpect: 100-continue\r\n"
                  f"Content-Length: {len(COMMIT)}\r\n\r\n".encode())  # fmt: skip
        assert s.recv(100).startswith(b"HTTP/1.1 100 ")  # the token has been looked at
        door.write(later)
        s.sendall(COMMIT)
        assert the_one_answer(read_all(s)).status == status
    if status != 200:
        assert door.ask(request)[0].status == status


def test_a_line_that_is_being_written_is_waited_for(door: Door) -> None:
    door.path.write_text("")
    with door.path.open("a") as f, connect(door.port) as s:
        f.write(f"{TOKEN} box")  # its leash is yet to come
        f.flush()
        s.sendall(post(b"anything", bearer()))
        s.settimeout(0.05)
        with pytest.raises(socket.timeout):
            s.recv(1)
        f.write(" payloads=commit\n")
        f.flush()
        assert refused(the_one_answer(read_all(s)), 403)


def test_a_last_line_without_an_end_counts_all_the_same(door: Door) -> None:
    door.write(f"{TOKEN} box")
    assert door.status(TOKEN) == 200
    os.utime(door.path, (2**32, 2**32))  # a time that is yet to come is no reason to wait
    assert door.status(TOKEN) == 200


@pytest.mark.parametrize("line", rows([
    ("with a control character", bearer(SHOWN) + "\x7f"), ("without its colon", f"Bearer {SHOWN}"),
    ("with another separator", f"Authorization; {SHOWN}"),
    ("behind a blank", f"Authorization : Bearer {SHOWN}"),
]))  # fmt: skip
def test_of_a_malformed_header_the_value_is_not_told(line: str, door: Door) -> None:
    received, fields = door.raw(post(COMMIT, line))
    refused(the_one_answer(received), 400)
    assert SHOWN.encode() not in received
    assert SHOWN not in str(fields)


def replace_by_fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def replace_by_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))
    path.chmod(0o600)


def give_away(path: Path) -> None:
    must_be_root()
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    os.chown(path, 65534, -1)


def written(text: str, mode: int = 0o600) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text)
        path.chmod(mode)

    return write


# How the file can't be used, and what is said of it.
UNUSABLE: List[Tuple[str, Callable[[Path], None], str]] = [
    ("gone", lambda path: None, "No such file"),
    ("a link to nothing", lambda path: path.symlink_to(path.parent / "nothing"), "No such file"),
    ("a link to itself", lambda path: path.symlink_to(path), "[Ss]ymbolic links"),
    ("a directory", lambda path: path.mkdir(0o700), "[Ii]s a directory|not a regular file"),
    ("a FIFO", replace_by_fifo, "not a regular file"),
    ("a socket", replace_by_socket, "No such device|not a regular file"),
    ("a device", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    ("too large", written(f"{TOKEN}\n" + 65536 * "#"), "larger than 64 KiB"),
    ("empty", written(""), "no token in it.*token NAME"),
    ("only comments", written(f"#{TOKEN}\n"), "no token in it.*token NAME"),
    ("a broken line", written(f"# mine\n{TOKEN} box\n{SECOND} {SECRET} {SECRET}\n"), "line 3: "),
    *[(f"of mode {mode:04o}", written(f"{TOKEN}\n", mode), r"chmod 600")
      for mode in (0o640, 0o604, 0o620, 0o602, 0o610, 0o601)],
    ("another user's", give_away, r"must be yours"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "why"), rows(UNUSABLE))
def test_of_a_file_that_can_not_be_used_setting_path_and_reason_are_told(
    spoil: Callable[[Path], None], why: str, short: Path
) -> None:
    path = short / "tokens"
    spoil(path)
    with pytest.raises(p.ConfigError) as e:
        p.File(str(path), VARIABLE).read(p.parse_tokens, private=True)
    assert str(e.value).startswith(f"{VARIABLE}: ")
    assert str(path) in str(e.value)
    assert re.search(why, str(e.value))
    assert SECRET not in str(e.value)


# These are tried with the program too.
FEW = [row for row in UNUSABLE if row[0] in ("a FIFO", "empty", "a broken line", "of mode 0640")]


@pytest.mark.parametrize(("spoil", "why"), rows([UNUSABLE[0], *FEW]))
def test_a_file_that_can_not_be_used_any_more_closes_the_door_until_it_can(
    spoil: Callable[[Path], None], why: str, door: Door
) -> None:
    assert door.status(TOKEN) == 200
    door.clear()
    spoil(door.path)
    for data in (post(COMMIT, bearer()), get("/publickey")):
        answer, fields = door.ask(data)
        refused(answer, 503)
        # What the file holds and where it is concerns nobody but its owner.
        assert "token file" in answer.text
        assert "log" in answer.text
        assert str(door.path) not in answer.text
        assert not re.search(r"line \d", answer.text)
        assert fields["outcome"] == "failed"
        assert f"{VARIABLE}: can't use '{door.path}'" in fields["reason"]
        assert re.search(why, fields["reason"]), fields["reason"]
    assert ask(door.port, get("/healthz")).status == 200
    assert ask(door.port, get("/shim")).status == 200
    door.write(f"{TOKEN} box\n")
    assert door.status(TOKEN) == 200


def test_with_a_broken_file_it_does_not_start(home: Path) -> None:
    path = private_file(home / "tokens", f"# mine\n{TOKEN} {SECRET} {SECRET}\n")
    done = call(home, "--addr", "127.0.0.1:0", "--token-file", path, **{VARIABLE: "/x"})
    assert (done.returncode, done.stdout) == (2, b"")
    line = one_line(done.stderr)
    assert f" ERROR --token-file: can't use '{path}': line 2: " in line
    assert SECRET not in line


def test_a_file_that_is_missing_is_known_before_anything_is_listened_on(home: Path) -> None:
    done = call(home, "--addr", f"unix:{home}/proxy", "--token-file", home / "tokens")
    assert done.returncode == 2
    assert "ssh-agent-proxy token NAME" in one_line(done.stderr)
    assert os.listdir(home) == ["tmp"]


def test_a_file_that_is_closed_to_others_is_taken(door: Door) -> None:
    for mode in (0o600, 0o400, 0o700):
        door.write(f"{TOKEN}\n", mode)
        assert door.status(TOKEN) == 200


def test_a_link_to_a_good_file_is_followed(door: Door) -> None:
    elsewhere = door.folder / "elsewhere"
    elsewhere.write_text(f"{TOKEN}\n")
    elsewhere.chmod(0o600)
    door.clear()
    door.path.symlink_to(elsewhere)
    assert door.status(TOKEN) == 200
    elsewhere.chmod(0o644)
    assert door.status(TOKEN) == 503


# ---------------------------------------------------------------- what is never shown


def test_no_token_stands_in_a_log_an_argument_or_an_answer(
    agent_with_key: Agent, start_proxy: Callable[..., Proxy], short: Path
) -> None:
    path = private_file(short / "tokens", f"{TOKEN} box\n{SECOND}\n")
    proxy = start_proxy("-v", upstream=agent_with_key.sock, env={VARIABLE: str(path)})
    answers = b""
    for token in (TOKEN, SECOND, SECRET, f"{SECRET} {SECRET}", f"{SECRET}\xff"):
        for data in (
            post(COMMIT, bearer(token)),
            get("/publickey", bearer(token)),
            get("/nope", bearer(token)),
            post(COMMIT, bearer(token), "Origin: x"),
            post(COMMIT, bearer(token), bearer(token)),
            post(COMMIT, bearer(token), "SSHSIG-Hash: md5"),
        ):
            answers += ask(proxy.port, data).body
    path.write_text(f"{TOKEN} {SECRET} {SECRET}\n")
    answers += ask(proxy.port, post(COMMIT, bearer())).body
    assert SECRET.encode() not in answers
    if sys.platform == "linux":
        for name in ("cmdline", "environ"):
            assert SECRET.encode() not in Path(f"/proc/{proxy.pid}/{name}").read_bytes()
    assert proxy.stop() == 0
    assert len(request_lines(proxy.log())) == 31
    assert SECRET not in proxy.log()


@pytest.mark.skipif(sys.platform != "linux", reason="any address can be bound on Linux only")
def test_beyond_loopback_a_token_file_is_asked_for_unless_there_is_one(
    short: Path, start_proxy: Callable[..., Proxy]
) -> None:
    path = private_file(short / "tokens", f"{TOKEN}\n")
    foreign = "192.0.2.1:0"  # of no machine (RFC 5737)
    proxy = start_proxy(addr=foreign, upstream=short / "none")
    assert VARIABLE in proxy.wait_log("WARNING .*192.0.2.1.*").group(0)
    proxy = start_proxy("--token-file", path, addr=foreign, upstream=short / "none")
    proxy.wait_log("/sign can't work yet")
    assert proxy.stop() == 0
    assert not re.search("WARNING .*192.0.2.1", proxy.log())


# ================================================================ token NAME


def add(home: Path, *argv: Any, file: Optional[Path] = None) -> Tuple[int, str, str]:
    """`token …`: its status, and what it says on stdout and stderr."""
    more = {VARIABLE: file} if file else {}
    done = call(home, "token", *argv, **more)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def added(home: Path, file: Path, name: str = "box") -> str:
    status, out, err = add(home, name, file=file)
    assert (status, err) == (0, "")
    assert re.fullmatch(r"[A-Za-z0-9._~+/-]+=*\n", out)
    return out[:-1]


def test_a_token_is_made_and_printed_alone_and_a_second_differs(home: Path) -> None:
    file = home / "tokens"
    first = added(home, file, "AZaz09._-")
    assert file.read_text() == f"{first} AZaz09._-\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(first) * 6 >= 256  # bits that nobody guesses
    second = added(home, file, "b")
    assert first != second
    assert file.read_text() == f"{first} AZaz09._-\n{second} b\n"


@pytest.mark.parametrize("mask", ["000", "077"])
def test_whatever_the_umask_nobody_else_can_read_what_is_made(mask: str, home: Path) -> None:
    file = home / "a" / "b" / "c" / "tokens"
    script = f'umask {mask}; exec "$@"'
    argv = ["sh", "-c", script, "sh", sys.executable, PROXY, "token", "box"]
    run(argv, env=clean_env(home, **{VARIABLE: file}))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (*file.parents, file)}
    assert modes["tokens"] == 0o600
    assert {name: oct(modes[name]) for name in "abc"} == dict.fromkeys("abc", "0o700")


@pytest.mark.parametrize(("before", "between"), rows([
    ("a line without its end", b"abcdefghijklmnop jar", b"\n"),
    ("a comment without its end", b"abcdefghijklmnop jar\n# mine", b"\n"),
    ("lines of Windows", b"# mine\r\nabcdefghijklmnop jar\r\n", b""),
]))  # fmt: skip
def test_what_stands_in_the_file_stays(before: bytes, between: bytes, home: Path) -> None:
    file = home / "tokens"
    file.write_bytes(before)
    file.chmod(0o600)
    inode = file.stat().st_ino
    token = added(home, file)
    assert file.read_bytes() == before + between + f"{token} box\n".encode()
    assert file.stat().st_ino == inode
    p.parse_tokens(file.read_text())


def test_what_is_printed_signs_at_once(door: Door, home: Path) -> None:
    token = added(home, door.path, "fresh")
    answer, fields = door.ask(post(COMMIT, bearer(token)))
    assert answer.status == 200
    assert fields["token"] == "fresh"
    assert door.status(TOKEN) == 200
    assert token not in door.proxy.log()


def test_the_option_names_the_file_too_and_its_path_is_expanded(home: Path) -> None:
    done = call(home, "--upstream", home / "none", "--token-file", "~/tokens", "token", "box")
    assert (done.returncode, done.stderr) == (0, b"")  # no agent is needed
    assert (home / "tokens").read_text() == done.stdout.decode()[:-1] + " box\n"


def test_tokens_added_at_once_are_all_there(home: Path) -> None:
    file = home / "tokens"
    env = clean_env(home, **{VARIABLE: file})
    argv = [sys.executable, str(PROXY), "token"]
    started = [
        subprocess.Popen([*argv, f"box{n}"], env=env, stdout=subprocess.PIPE) for n in range(4)
    ]
    printed = [process.communicate(timeout=20)[0].decode()[:-1] for process in started]
    assert [process.returncode for process in started] == 4 * [0]
    expected = {f"{token} box{n}" for n, token in enumerate(printed)}
    assert {line for line in file.read_text().splitlines() if line} == expected
    assert len(set(printed)) == 4


@pytest.mark.parametrize("words", [["a=b"], ["#a"], ["a\nb"], ["a\u202eb"], [], ["box", "jar"]])
def test_a_bad_name_is_exit_2_and_nothing_is_made(words: List[str], home: Path) -> None:
    status, out, err = add(home, *words, file=home / "tokens")
    assert (status, out) == (2, "")
    line = one_line(err.encode())
    assert line.isprintable()
    assert "name" in line.lower()
    assert "no such command" not in line  # there is one
    assert os.listdir(home) == ["tmp"]


def test_a_leash_stands_behind_the_name_and_holds(door: Door, home: Path) -> None:
    leash = ["payloads=commit,push", f"key={FINGERPRINT}"]
    status, out, _ = add(home, "box", *leash, file=door.path)
    assert status == 0
    assert door.path.read_text().endswith(f"{out.strip()} box {' '.join(leash)}\n")
    assert door.status(out.strip(), post(b"x", bearer(out.strip()))) == 403


@pytest.mark.parametrize("leash", [
    ["key=SHA256:x"], ["key="], ["payloads=commits"], ["payloads="], ["payloads=commit,", "tag"],
    ["payloads=commit, tag"], ["payloads=commit\n"], ["payloads=tag", "payloads=commit"],
    ["colour=red"], ["payloads=tag", "jar"],
])  # fmt: skip
def test_a_leash_that_can_not_be_right_is_exit_2_and_nothing_is_made(
    leash: List[str], home: Path
) -> None:
    """Else a container has more leash than its user thinks, or the proxy starts no more."""
    status, out, err = add(home, "box", *leash, file=home / "tokens")
    assert (status, out) == (2, "")
    line = one_line(err.encode())
    assert line.isprintable()
    assert repr(" ".join(leash))[1:-1].replace("\\", "\\\\") in line
    assert os.listdir(home) == ["tmp"]


def test_without_a_file_it_is_exit_2_and_the_setting_is_named(home: Path) -> None:
    done = call(home, "token", "box", **{VARIABLE: ""})
    assert (done.returncode, done.stdout) == (2, b"")
    assert VARIABLE in one_line(done.stderr)


# A FIFO has no reader, a device no mode of ours: whatever they are, it ends in one line.
@pytest.mark.parametrize(("spoil", "why"), rows([row for row in FEW if row[0] != "empty"]))
def test_nothing_is_added_to_a_file_that_can_not_be_used(
    spoil: Callable[[Path], None], why: str, home: Path
) -> None:
    file = home / "tokens"
    spoil(file)
    before = file.lstat()
    text = file.read_bytes() if stat.S_ISREG(before.st_mode) else b""
    status, out, err = add(home, "box", file=file)
    assert status in (1, 2)
    assert out == ""
    line = one_line(err.encode())
    assert str(file) in line
    assert SECRET not in line
    if stat.S_ISREG(before.st_mode):
        assert status == 2
        assert re.search(why, line), line
        assert file.read_bytes() == text
    after = file.lstat()
    assert (after.st_mode, after.st_ino, after.st_size) == (
        before.st_mode, before.st_ino, before.st_size
    )  # fmt: skip


def test_nothing_is_added_that_would_make_the_file_too_large(door: Door, home: Path) -> None:
    start = f"{TOKEN}\n"
    door.write(start + (65530 - len(start)) * "#" + "\n")
    before = door.path.read_bytes()
    status, out, err = add(home, "box", file=door.path)
    assert status in (1, 2)
    assert out == ""
    assert str(door.path) in one_line(err.encode())
    assert door.path.read_bytes() == before
    assert door.status(TOKEN) == 200


@pytest.mark.parametrize("room", [0, 12])
def test_a_token_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was(
    room: int, home: Path
) -> None:
    # A part of a token would be a token too, and a short one: easy to guess.
    file = home / "tokens"
    start = f"{TOKEN} jar\n"
    before = start + (1023 - room - len(start)) * "#" + "\n"
    file.write_text(before)
    file.chmod(0o600)
    # The limit for files stands in for the disk: it lets as much through as fits.
    limits = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)); "
    argv = [sys.executable, "-c", limits + "os.execv(sys.argv[1], sys.argv[1:])"]
    argv += [sys.executable, str(PROXY), "token", "box"]
    done = run(argv, env=clean_env(home, **{VARIABLE: file}), check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert str(file) in one_line(done.stderr)
    assert file.read_text() == before


def test_a_file_where_a_folder_should_be_is_exit_1_in_one_line(home: Path) -> None:
    (home / "file").write_text("")
    status, out, err = add(home, "box", file=home / "file" / "tokens")
    assert (status, out) == (1, "")
    assert str(home / "file") in one_line(err.encode())


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
@pytest.mark.parametrize("before", ["", f"{TOKEN} jar\n", f"{TOKEN} jar"])
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_a_token_that_nobody_could_be_told_is_in_no_file_and_exit_1(
    redirection: str, before: str, home: Path
) -> None:
    file = private_file(home / "tokens", before)
    argv = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, PROXY, "token", "box"]
    done = run(argv, env=clean_env(home, **{VARIABLE: file}), check=False)
    assert done.returncode == 1
    assert "standard output" in one_line(done.stderr)
    assert file.read_text() == before
