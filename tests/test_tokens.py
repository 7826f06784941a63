"""Bearer tokens: the file that holds them, who comes in, on which leash, and `token NAME`."""

import contextlib
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
    HOST, PROXY, Agent, Answer, Keys, Proxy, ask, call, cannot_run, clean_env, commit, connect, get,
    log_fields, logged, one_line, post, post_chunked, private_file, push, read_all, refused, rows,
    run, short_folder, tag, the_one_answer,
)  # fmt: skip
from test_http import clean, shared_proxy

import ssh_agent_proxy as p

# No text of a log or an answer may hold this: each token of these tests begins with it.
SECRET = "s3cr3t"
TOKEN = SECRET + "-Tok3n._~+/AZaz09"
SECOND = SECRET + "-second-of-these"
WRONG = SECRET + "-of-nobody-here"
FINGERPRINT = "SHA256:" + 43 * "a"
VARIABLE = "SSH_AGENT_PROXY_TOKEN_FILE"

COMMIT = commit()
PAYLOADS = {"commit": COMMIT, "tag": tag(), "push": push(), "other": b"hello"}


def bearer(token: str = TOKEN) -> str:
    return f"Authorization: Bearer {token}"


# ================================================================ pure: the file


@pytest.mark.parametrize(("line", "name", "key", "payloads"), rows([
    ("a token alone", TOKEN, "line 1", "", ()),
    ("every character of a name", f"{TOKEN} AZaz09._-", "AZaz09._-", "", ()),
    ("a key", f"{TOKEN} key={FINGERPRINT}", "line 1", FINGERPRINT, ()),
    ("payloads", f"{TOKEN} payloads=tag,push", "line 1", "", ("tag", "push")),
    ("any payloads", f"{TOKEN} payloads=any", "line 1", "", ("commit", "tag", "push", "other")),
    ("all", f"{TOKEN} box payloads=tag key={FINGERPRINT}", "box", FINGERPRINT, ("tag",)),
    ("blanks and tabs around and between", f" \t{TOKEN} \t box\t\tpayloads=tag \t", "box", "",
     ("tag",)),
    ("a name like an option's", f"{TOKEN} key", "key", "", ()),
    ("a # at the next line's start", f"{TOKEN} box\n#{SECOND}", "box", "", ()),
]))  # fmt: skip
def test_a_line_is_a_token_its_name_and_its_leash(
        line: str, name: str, key: str, payloads: Tuple[str, ...]) -> None:  # fmt: skip
    (token,) = p.parse_tokens(line)
    assert (token.name, token.key, token.payloads) == (name, key, payloads)
    assert p.check_token(f"Bearer {TOKEN}", [token]) is token


LONG = 16 * "a"


@pytest.mark.parametrize("token", [
    LONG, "Az09-._~+/Az09-._~+/", LONG + "===", "-" + LONG, "key" + LONG + "=", "f" * 4096,
])  # fmt: skip
def test_every_b64token_is_a_token_and_is_not_kept_in_memory(token: str) -> None:
    for rest in ("", " box", " payloads=tag"):
        tokens = p.parse_tokens(token + rest)
        assert p.check_token(f"Bearer {token}", tokens) is tokens[0]
        assert token not in repr(tokens)


@pytest.mark.parametrize("odd", [
    "=", "=a", "a=b", "a=b=", '"a"', "a,b", "a;b", "a:b", "a%20b", "a#b", "a@b", "a\\b", "\u00e4",
    "\u0661", "\uff41", "a\x00", "a\x1b[31m", "a\u200bb", "\ufeffa", "Bearer:a",
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
    ("the same token twice", f"{TOKEN} box\n#\n{SECOND}\n\n{TOKEN} jar", 5),
    ("key= twice", f"{TOKEN} key={FINGERPRINT} key={FINGERPRINT}", 1),
    ("an unknown option", f"{TOKEN} {SECRET}=1", 1),
    ("payloads= without a value", f"{TOKEN} payloads=", 1),
    ("key= that is no fingerprint", f"{TOKEN} key={SECRET}", 1),
    ("an unknown kind", f"{TOKEN} payloads={SECRET}", 1),
    ("an empty kind between", f"{TOKEN} payloads=commit,,tag", 1),
    ("a mistake behind good lines", f"# mine\n{TOKEN} box\n\n{SECOND} jar {SECRET}\n", 4),
]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), rows(BROKEN))
def test_a_broken_line_is_named_by_its_number_and_not_shown(text: str, number: int) -> None:
    with pytest.raises(p.ConfigError) as e:
        p.parse_tokens(text)
    said = str(e.value)
    assert f"line {number}:" in said
    assert said.isprintable()
    assert SECRET not in said


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_file_has_comments_and_empty_lines_and_is_read_to_its_end(end: str) -> None:
    lines = [f"# {SECRET}", "#", f"#{TOKEN}", f"{TOKEN} box", "", " \t", f"{SECOND} payloads=tag"]
    for last in ("", end):
        tokens = p.parse_tokens(end.join(lines) + last)
        assert [token.name for token in tokens] == ["box", "line 7"]
        assert tokens[1].payloads == ("tag",)
        assert p.check_token(f"Bearer {SECOND}", tokens) is tokens[1]


# ================================================================ pure: the Authorization field

# RFC 9110 section 11.4: one blank or more.
@pytest.mark.parametrize("form", ["Bearer {}", "bEARER {}", "BEARER    {}"])
def test_the_field_holds_the_token(form: str) -> None:
    tokens = p.parse_tokens(f"{SECOND}\n{TOKEN} box\n")
    assert p.check_token(form.format(TOKEN), tokens) is tokens[1]


@pytest.mark.parametrize("value", [
    None, "Bearer", f"Basic {TOKEN}", f"Bearer\t{TOKEN}", f"Bearer{TOKEN}",
    f"Bearer {TOKEN},{TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Bearer {TOKEN}=",
    f"Bearer {TOKEN.swapcase()}", f"Bearer {TOKEN}\xa0",
], ids=ascii)  # fmt: skip
def test_anything_else_than_a_token_of_the_file_is_401(value: Optional[str]) -> None:
    with pytest.raises(p.RequestError) as e:
        p.check_token(value, p.parse_tokens(f"{SECOND}\n{TOKEN} box\n"))
    assert e.value.status == 401
    assert e.value.fields == (("WWW-Authenticate", "Bearer"),)
    assert SECRET not in str(e.value).lower()


@pytest.mark.parametrize("given", [TOKEN, SECOND, WRONG, ""])
def test_every_token_is_compared_in_constant_time_also_behind_the_right_one(
        given: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    real, compared = hmac.compare_digest, []

    def spy(a: bytes, b: bytes) -> bool:
        # Digests: a comparison of texts of different lengths would tell the length.
        assert len(a) == len(b) == hashlib.sha256().digest_size
        compared.extend([a, b])
        return real(a, b)

    tokens = p.parse_tokens(f"{TOKEN}\n{SECOND}\n{SECRET}-third-of-these\n")
    monkeypatch.setattr(hmac, "compare_digest", spy)
    with contextlib.suppress(p.RequestError):
        p.check_token(f"Bearer {given}", tokens)
    assert len(compared) == 2 * 3
    assert TOKEN.encode() not in compared


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

    def write(self, text: str, mode: int = 0o600) -> None:
        self.path.unlink(missing_ok=True)
        private_file(self.path, text).chmod(mode)

    def ask(self, data: bytes) -> Tuple[Answer, Dict[str, str]]:
        """What comes back for DATA, and the line that the log has for it."""
        received, (line,) = logged(self.proxy, self.port, data)
        assert SECRET not in self.proxy.log()
        return the_one_answer(received), log_fields(line)

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


def test_nobody_else_is_served_nor_the_agent_asked_for_them(keys: Keys, short: Path) -> None:
    path = private_file(short / "tokens", f"{TOKEN}\n")
    none, wrong = "a token is needed", "this token is not one of the proxy's"
    with shared_proxy(keys, "--token-file", str(path)) as shared:
        for fields, why in ([], none), ([bearer(WRONG)], wrong):
            for data in (post(COMMIT, *fields), get("/publickey", *fields)):
                received, (line,) = shared.ask(data)
                assert unauthorized(the_one_answer(received)).text.startswith(why)
                noted = log_fields(line)
                assert (noted["outcome"], noted["status"]) == ("refused", "401")
                assert not {"token", "digest"} & set(noted)
        assert shared.agent.asked == []
        assert ask(shared.port, get("/publickey", bearer())).status == 200
        assert shared.agent.asked
        assert SECRET not in shared.proxy.log()


# What a client shows to everybody anyway: a log may hold it.
SHOWN = "shown-Tok3n-of-these"


@pytest.mark.parametrize(("data", "status"), rows([
    ("in a cookie", get("/publickey", f"Cookie: token={SHOWN}"), 401),
    ("in the body", post(f"access_token={SHOWN}".encode(),
                         "Content-Type: application/x-www-form-urlencoded"), 401),
    ("behind a question mark", get(f"/publickey?access_token={SHOWN}"), 404),
    ("in a trailer", post_chunked(b"1\r\nx\r\n0\r\n" + bearer(SHOWN).encode() + b"\r\n\r\n"), 401),
]))  # fmt: skip
def test_a_token_is_taken_from_nowhere_else(data: bytes, status: int, door: Door) -> None:
    door.write(f"{SHOWN} box\n")
    assert door.status(SHOWN) == 200
    refused(door.ask(data)[0], status)


@pytest.mark.parametrize("path", ["/healthz", "/shim"])
def test_health_and_shim_need_no_token(path: str, door: Door) -> None:
    for fields in ((), (bearer(WRONG),), (bearer(),)):
        answer, noted = door.ask(get(path, *fields))
        assert answer.status == 200
        assert "token" not in noted


def test_without_a_token_file_a_token_is_not_looked_at(proxy: Proxy) -> None:
    for fields in ((), (bearer(),), ("Authorization: nonsense",)):
        assert ask(proxy.port, post(COMMIT, *fields)).status == 200
    assert SECRET not in proxy.log()


@pytest.mark.parametrize(("data", "status"), rows([
    ("host", b"GET /publickey HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
    ("method", get("/sign"), 405),
    # From here on the token is what is missed first.
    ("a namespace that is not allowed", post(COMMIT, "SSHSIG-Namespace: file"), 401),
    ("a key that is malformed", get("/publickey", "SSHSIG-Key: nonsense"), 401),
    ("no length", b"POST /sign HTTP/1.1\r\n" + HOST + b"\r\n", 401),
    # Nothing of a body is waited for, and nobody is told to go on.
    ("a body that waits", post(b"", "Expect: 100-continue", length=1 << 30), 401),
]))  # fmt: skip
def test_the_token_is_checked_behind_the_method_and_before_the_headers(
        data: bytes, status: int, door: Door) -> None:  # fmt: skip
    answer, _ = door.ask(data)
    refused(answer, status)
    assert ("www-authenticate" in answer.headers) == (status == 401)


# ---------------------------------------------------------------- leashes


def fingerprint(keys: Keys, name: str) -> str:
    return p.parse_key_line(keys.line(name)).key.fingerprint


@pytest.mark.parametrize("pin", ["", "ed25519", "other"])
@pytest.mark.parametrize("key", ["ed25519", "other", "rsa2048"])
def test_a_tokens_key_alone_signs_whatever_is_pinned_for_all(
    key: str, pin: str, open_door: Callable[..., Door], keys: Keys, ssh_keygen: Any
) -> None:
    """The agent lacks rsa2048; a token without a key is under the general pin."""
    door = open_door(*(["--pubkey", keys.line(pin)] if pin else []))
    door.write(f"{TOKEN} box key={fingerprint(keys, key)}\n{SECOND}\n")
    _, noted = door.ask(post(COMMIT, bearer(SECOND)))
    assert (noted["status"], noted["token"]) == ("200", "line 2")
    assert noted["key"] == fingerprint(keys, pin or "ed25519")
    for named in ("ed25519", "other", "rsa2048"):
        status = 403 if named != key else 503 if key == "rsa2048" else 200
        ways = [keys.line(named), fingerprint(keys, named)]
        for field in [f"SSHSIG-Key: {way}" for way in ways] + ["A: b"] * (named == key):
            answer, noted = door.ask(post(COMMIT, bearer(), field))
            shown, _ = door.ask(get("/publickey", bearer(), field))
            if status == 200:
                assert (answer.status, answer.body) == (200, ssh_keygen(COMMIT, key=key))
                assert (noted["token"], noted["key"]) == ("box", fingerprint(keys, key))
                assert shown.text.split()[:2] == keys.line(key).split()[:2]
                continue
            for text in (refused(answer, status).text, refused(shown, status).text):
                assert fingerprint(keys, key) in text
                assert "key=" in text or key == pin or status == 503


@pytest.mark.parametrize(("general", "leash", "allowed"), rows([
    ("any, narrowed to two", "any", "tag,commit", {"tag", "commit"}),
    ("commits, replaced by tags", "commit", "tag", {"tag"}),
    ("commits, widened to all", "commit", "any", {"commit", "tag", "push", "other"}),
    ("two, without a leash", "commit,push", "", {"commit", "push"}),
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


def test_a_changed_line_counts_at_once_though_size_and_time_are_as_before(door: Door) -> None:
    door.write(f"{TOKEN}\n")
    before = door.path.stat()
    assert door.status(TOKEN) == 200
    other = TOKEN[:-1] + "8"
    with door.path.open("r+") as f:
        f.write(f"{other}\n")
    os.utime(door.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (door.path.stat().st_size, door.path.stat().st_ino) == (before.st_size, before.st_ino)
    unauthorized(door.ask(post(COMMIT, bearer()))[0])
    assert door.status(other) == 200


@pytest.mark.parametrize(("later", "status"), rows([
    ("deleted", f"{SECOND} jar\n", 401),
    ("on a shorter leash", f"{TOKEN} box payloads=tag\n", 403),
    ("unchanged", f"# but for this comment\n{TOKEN} box\n", 200),
]))  # fmt: skip
def test_a_token_counts_until_the_request_is_whole(later: str, status: int, door: Door) -> None:
    # Who holds the body back must not outlast the line.
    with connect(door.port) as s:
        s.sendall(post(b"", bearer(), "Expect: 100-continue", length=len(COMMIT)))
        assert s.recv(100).startswith(b"HTTP/1.1 100 ")  # the token has been looked at
        door.write(later)
        s.sendall(COMMIT)
        assert the_one_answer(read_all(s)).status == status
    if status != 200:
        assert door.status(TOKEN) == status


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


@pytest.mark.parametrize("line", [
    bearer(SHOWN) + "\x7f", f"Bearer {SHOWN}", f"Authorization : Bearer {SHOWN}",
])  # fmt: skip
def test_of_a_malformed_header_the_value_is_not_told(line: str, door: Door) -> None:
    answer, fields = door.ask(post(COMMIT, line))
    refused(answer, 400)
    assert SHOWN not in f"{answer} {fields}"


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        cannot_run("only root can give a file to another user: run the tests as root")
    os.chown(private_file(path, f"{TOKEN}\n"), 65534, -1)


def written(text: str, mode: int = 0o600) -> Callable[[Path], None]:
    return lambda path: private_file(path, text).chmod(mode)


# How the file can't be used, and what is said of it.
UNUSABLE: List[Tuple[str, Callable[[Path], None], str]] = [
    ("gone", lambda path: None, "No such file"),
    ("a directory", lambda path: path.mkdir(0o700), "[Ii]s a directory|not a regular file"),
    ("a FIFO", lambda path: os.mkfifo(path, 0o600), "not a regular file"),
    ("a device", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    ("too large", written(f"{TOKEN}\n" + 65536 * "#"), "larger than 64 KiB"),
    ("empty", written(""), "no token in it.*token NAME"),
    ("a broken line", written(f"# mine\n{TOKEN} box\n{SECOND} {SECRET} {SECRET}\n"), "line 3: "),
    *[(f"of mode {mode:04o}", written(f"{TOKEN}\n", mode), r"chmod 600")
      for mode in (0o640, 0o604, 0o620, 0o602, 0o610, 0o601)],
    ("another user's", give_away, r"must be yours"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "why"), rows(UNUSABLE))
def test_of_a_file_that_can_not_be_used_setting_path_and_reason_are_told(
        spoil: Callable[[Path], None], why: str, short: Path) -> None:  # fmt: skip
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
        spoil: Callable[[Path], None], why: str, door: Door) -> None:  # fmt: skip
    assert door.status(TOKEN) == 200
    door.path.unlink()
    spoil(door.path)
    for data in (post(COMMIT, bearer()), get("/publickey")):
        answer, fields = door.ask(data)
        refused(answer, 503)
        # What the file holds and where it is concerns nobody but its owner.
        assert answer.text == f"the file of {VARIABLE} can't be used: the proxy's log says why\n"
        assert fields["outcome"] == "failed"
        assert f"{VARIABLE}: can't use '{door.path}'" in fields["reason"]
        assert re.search(why, fields["reason"]), fields["reason"]
    # Closed to others it is taken again, behind a link too.
    elsewhere = private_file(door.folder / "elsewhere", f"{TOKEN}\n")
    door.path.unlink(missing_ok=True)
    door.path.symlink_to(elsewhere)
    for mode, status in ((0o600, 200), (0o400, 200), (0o700, 200), (0o644, 503)):
        elsewhere.chmod(mode)
        assert door.status(TOKEN) == status


@pytest.mark.parametrize(("text", "why"), rows([
    ("broken", f"# mine\n{TOKEN} {SECRET} {SECRET}\n", "line 2: "),
    ("missing", "", "No such file.*ssh-agent-proxy token NAME"),
]))  # fmt: skip
def test_with_a_file_that_can_not_be_used_it_does_not_start(
        text: str, why: str, home: Path) -> None:  # fmt: skip
    path = home / "tokens"
    if text:
        private_file(path, text)
    done = call(home, "--addr", f"unix:{home}/proxy", "--token-file", path, **{VARIABLE: "/x"})
    assert (done.returncode, done.stdout) == (2, b"")
    line = one_line(done.stderr)
    assert re.search(f" ERROR --token-file: can't use '{path}': {why}", line)
    assert SECRET not in line
    assert not (home / "proxy").exists()  # it was known before


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
    file = private_file(home / "tokens", "")
    file.write_bytes(before)
    inode = file.stat().st_ino
    done = call(home, "--token-file", "~/tokens", "token", "box")  # the option does too
    assert file.read_bytes() == before + between + done.stdout[:-1] + b" box\n"
    assert file.stat().st_ino == inode
    p.parse_tokens(file.read_text())


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


def test_what_is_printed_signs_at_once_on_the_leash_behind_its_name(door: Door, home: Path) -> None:
    status, out, _ = add(home, "fresh", "payloads=commit,push", file=door.path)
    token = out.strip()
    assert status == 0
    assert door.path.read_text() == f"{TOKEN} box\n{token} fresh payloads=commit,push\n"
    answer, fields = door.ask(post(COMMIT, bearer(token)))
    assert (answer.status, fields["token"]) == (200, "fresh")
    assert door.status(token, post(b"x", bearer(token))) == 403
    assert token not in door.proxy.log()


@pytest.mark.parametrize("words", [
    [], ["a=b"], ["#a"], ["a\nb"], ["a\u202eb"], ["box", "jar"], ["box", "key=SHA256:x"],
    ["box", "key="], ["box", "payloads=commits"], ["box", "payloads=commit,", "tag"],
    ["box", "payloads=commit, tag"], ["box", "payloads=commit\n"], ["box", "payloads=tag", "jar"],
    ["box", "payloads=tag", "payloads=commit"], ["box", "colour=red"],
])  # fmt: skip
def test_a_name_or_leash_that_can_not_be_right_is_exit_2_and_nothing_is_made(
        words: List[str], home: Path) -> None:  # fmt: skip
    """Else a container has more leash than its user thinks, or the proxy starts no more."""
    status, out, err = add(home, *words, file=home / "tokens")
    assert (status, out) == (2, "")
    line = one_line(err.encode())
    assert line.isprintable()
    assert "no such command" not in line  # there is one
    if any("=" in word for word in words[1:]):
        assert repr(" ".join(words[1:]))[1:-1].replace("\\", "\\\\") in line
    else:
        assert "name" in line.lower()
    assert os.listdir(home) == ["tmp"]


def test_without_a_file_it_is_exit_2_and_the_setting_is_named(home: Path) -> None:
    done = call(home, "token", "box", **{VARIABLE: ""})
    assert (done.returncode, done.stdout) == (2, b"")
    assert VARIABLE in one_line(done.stderr)


@pytest.mark.parametrize(("spoil", "why"), rows([
    *[row for row in FEW if row[0] != "empty"],
    ("as large as it may be", written(f"{TOKEN}\n" + 65500 * "#"), "larger than 64 KiB"),
]))  # fmt: skip
def test_nothing_is_added_to_a_file_that_can_not_be_used(
        spoil: Callable[[Path], None], why: str, home: Path) -> None:  # fmt: skip
    def state() -> Tuple[Any, ...]:
        found = file.lstat()
        text = file.read_bytes() if stat.S_ISREG(found.st_mode) else b""
        return found.st_mode, found.st_ino, found.st_size, text

    file = home / "tokens"
    spoil(file)
    before = state()
    status, out, err = add(home, "box", file=file)
    assert status in (1, 2)
    assert out == ""
    line = one_line(err.encode())
    assert str(file) in line
    assert SECRET not in line
    assert stat.S_ISFIFO(before[0]) or re.search(why, line), line  # it has no reader: that is told
    assert state() == before


def test_a_token_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was(home: Path) -> None:
    # A part of a token would be a token too, and a short one: easy to guess.
    start = f"{TOKEN} jar\n"
    before = start + (1011 - len(start)) * "#" + "\n"
    file = private_file(home / "tokens", before)
    # The limit for files stands in for the disk: it lets as much through as fits.
    limits = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)); "
    argv = [sys.executable, "-c", limits + "os.execv(sys.argv[1], sys.argv[1:])"]
    argv += [sys.executable, str(PROXY), "token", "box"]
    done = run(argv, env=clean_env(home, **{VARIABLE: file}), check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert str(file) in one_line(done.stderr)
    assert file.read_text() == before


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
@pytest.mark.parametrize("before", ["", f"{TOKEN} jar\n", f"{TOKEN} jar"])
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_a_token_that_nobody_could_be_told_is_in_no_file_and_exit_1(
        redirection: str, before: str, home: Path) -> None:  # fmt: skip
    file = private_file(home / "tokens", before)
    argv = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, PROXY, "token", "box"]
    done = run(argv, env=clean_env(home, **{VARIABLE: file}), check=False)
    assert done.returncode == 1
    assert "standard output" in one_line(done.stderr)
    assert file.read_text() == before
