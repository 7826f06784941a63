"""The proxy on a Unix socket: who may connect, whose file it is, who is seen to ask."""

import os
import re
import signal
import socket
import stat
import struct
import sys
import types
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest
from conftest import (
    Agent, Proxy, ask, audited, call, cannot_run, listens, need, post, private_file, read_all,
    refused, request_lines, rows, run, the_one_answer, wait_for,
)  # fmt: skip
from test_check import files
from test_http import (
    MIB, PAGE, Clients, Scripted, clients, gate, linux, readable, send_all_before_reading, served,
)  # fmt: skip

import ssh_agent_proxy as p

__all__ = ["clients", "gate"]  # fixtures

BEARER = "Authorization: Bearer tok3n-of-the-tests"


@pytest.fixture
def start_unix(start_proxy: Callable[..., Proxy]) -> Callable[..., Proxy]:
    """Starts the proxy at addresses of which at least one is a Unix socket, and waits for each."""

    def start(*addresses: str, args: Tuple[Any, ...] = (), **more: Any) -> Proxy:
        proxy = start_proxy(*args, addr=",".join(addresses), wait=False, **more)
        proxy.wait_log("(?s)" + len(addresses) * "listening on .*")
        return proxy

    return start


# ================================================================ the setting


def addresses(value: str, **env: str) -> List[Any]:
    return list(p.Config.from_env(env, ["--addr", value], {}).addr)


@pytest.mark.parametrize(("value", "expected"), [
    ("unix:/run/proxy", ("/run/proxy", 0o600)),
    ("unix:~/proxy?mode=0700", ("/home/me/proxy", 0o700)),
    ("unix:${RUN}/proxy?mode=600", ("/run/me/proxy", 0o600)),
    ("unix:/a$$b", ("/a$b", 0o600)),
    ("unix:/a b:c[d]=e&f#g\u00e4", ("/a b:c[d]=e&f#g\u00e4", 0o600)),
])  # fmt: skip
def test_an_address_is_a_path_and_its_mode(value: str, expected: Tuple[str, int]) -> None:
    (address,) = addresses(value, HOME="/home/me", RUN="/run/me")
    assert (address.path, address.mode) == expected


WRONG = [
    "unix:", "unix", "unix:proxy", "unix:./proxy", "unix:?mode=0600", "UNIX:/a", "unix:\x00proxy",
    "/run/proxy", "unix:$NOWHERE/proxy", "unix:$EMPTY", "unix:/a?", "unix:/a?mode",
    "unix:/a?mode=", "unix:/a?mode=8", "unix:/a?mode=60", "unix:/a?mode=00600",
    "unix:/a?mode=0o600", "unix:/a?mode=1600", "unix:/a?mode=-600", "unix:/a?mode=600x",
    "unix:/a?mode=0688", "unix:/a?mode=\u0666\u0660\u0660", "unix:/a?mode=600&mode=600",
    "unix:/a?MODE=600", "unix:/a?owner=me", "unix:/a,", ",unix:/a", "unix:/a,unix:", "unix:/a,b",
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=ascii)
def test_what_is_no_address_is_a_wrong_setting(value: str) -> None:
    with pytest.raises(p.ConfigError, match=r"^--addr: ") as e:
        addresses(value, EMPTY="")
    assert str(e.value).isprintable()


# ================================================================ its mode


def mode_of(path: Path) -> str:
    found = path.lstat()
    assert stat.S_ISSOCK(found.st_mode)
    return f"{stat.S_IMODE(found.st_mode):04o}"


@pytest.mark.parametrize("mask", [0o000, 0o077, 0o777])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o700])
def test_it_has_its_mode_from_its_first_instant_whatever_the_umask(
        mode: int, mask: int, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A chmod behind bind would come too late for who connects in between."""
    path = short / "proxy"
    bind, modes = socket.socket.bind, []

    def seen(sock: socket.socket, address: str) -> None:
        bind(sock, address)
        modes.append(mode_of(path))

    monkeypatch.setattr(socket.socket, "bind", seen)
    before = os.umask(mask)
    try:
        (listener,) = p.listen(p.UnixAddress(str(path), mode))
    finally:
        after = os.umask(before)
    assert after == mask  # what else the proxy makes has the user's
    assert [*modes, mode_of(path)] == 2 * [f"{mode:04o}"]
    listener.close()


@linux
def test_a_folder_that_opens_what_is_made_in_it_does_not_open_the_socket(
        short: Path, start_unix: Callable[..., Proxy]) -> None:  # fmt: skip
    # Where a folder has a default access list, the umask does not count for what is made there.
    folder = short / "folder"
    folder.mkdir()
    # acl(5) as Linux keeps it: tag, permissions, id.
    USER_OBJ, USER, GROUP_OBJ, MASK, OTHER, NOBODY = 1, 2, 4, 16, 32, 0xFFFFFFFF
    entries = [(USER_OBJ, 7, NOBODY), (USER, 7, 65534), (GROUP_OBJ, 7, NOBODY), (MASK, 7, NOBODY),
               (OTHER, 7, NOBODY)]  # fmt: skip
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(folder, "system.posix_acl_default", acl)
    (folder / "file").touch(0o666)
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o666  # that it works as said
    start_unix(f"unix:{folder}/proxy", upstream=short / "none")
    assert mode_of(folder / "proxy") == "0600"  # with an access list the middle digit is the mask


# ================================================================ several addresses


def test_every_address_is_served(
        agent_with_key: Agent, short: Path, start_unix: Callable[..., Proxy],
        ssh_keygen: Callable[..., bytes]) -> None:  # fmt: skip
    first, second = short / "first", short / "second"
    addresses = (f"unix:{first}", "127.0.0.1:0", f"unix:{second}")
    proxy = start_unix(*addresses, upstream=agent_with_key.sock)
    port = int(proxy.wait_log(r"listening on 127\.0\.0\.1:(\d+) ").group(1))
    expected = ssh_keygen(b"hello")
    for number, where in enumerate([first, port, second, port], 1):
        assert ask(where, post(b"hello")).body == expected
        fields = audited(proxy, number)
        assert fields["peer"].startswith("127.0.0.1:" if where == port else "unix")
        named = (None, None) if where == port else (str(os.getpid()), str(os.geteuid()))
        assert (fields.get("pid"), fields.get("uid")) == named
    for where in (first, port):
        evil = b"GET /publickey HTTP/1.1\r\nHost: evil.example\r\n\r\n"
        assert [ask(where, data).status for data in (evil, post(b"x", PAGE))] == [421, 403]
    assert proxy.stop() == 0
    assert not first.exists()
    assert not second.exists()
    # Nobody is warned of who could reach these.
    assert not re.search("WARNING .*(loopback|unix:)", proxy.log())


# ================================================================ what stands there already


def left_by_the_dead(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


def test_what_a_killed_proxy_leaves_is_replaced(short: Path) -> None:
    path = short / "proxy"
    left_by_the_dead(path)
    path.chmod(0o777)
    (listener,) = p.listen(p.UnixAddress(str(path), 0o600))
    assert listens(path)
    assert mode_of(path) == "0600"
    listener.close()
    assert not path.exists()


def can_not_listen(path: Path) -> str:
    """What is said of it."""
    with pytest.raises(p.ProxyError) as e:
        p.listen(p.UnixAddress(str(path), 0o600))
    line = str(e.value)
    assert line.isprintable()
    assert str(path.parent) in line
    assert "SSH_AGENT_PROXY_ADDR" in line  # the way out
    return line


def test_a_second_proxy_is_refused_and_the_first_goes_on(
        short: Path, home: Path, start_unix: Callable[..., Proxy]) -> None:  # fmt: skip
    path = short / "proxy"
    proxy = start_unix(f"unix:{path}", upstream=short / "none")
    done = call(home, "--addr", f"127.0.0.1:0,unix:{path}", "--upstream", home / "none")
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.search(rb" ERROR cannot listen on .* another program listens there", done.stderr)
    assert served(path)
    assert proxy.stop() == 0
    # A look whether it lives is no request.
    assert len(request_lines(proxy.log())) == 1


@pytest.mark.parametrize("kind", rows([
    ("a listener that does not answer", socket.SOCK_STREAM),
    ("a listener whose queue is full", -socket.SOCK_STREAM),
    ("datagrams", socket.SOCK_DGRAM),
    ("sequenced packets", socket.SOCK_SEQPACKET),
]))  # fmt: skip
def test_a_socket_of_a_living_program_is_never_touched(kind: int, short: Path) -> None:
    path = short / "theirs"
    with socket.socket(socket.AF_UNIX, abs(kind)) as theirs, socket.socket(socket.AF_UNIX) as first:
        theirs.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            theirs.listen(0)
        if kind < 0:
            first.connect(str(path))
        before = files(short)
        assert "another program listens there" in can_not_listen(path)
        assert files(short) == before


@pytest.mark.parametrize(("where", "why"), rows([
    ("a folder that is missing", "missing/proxy", "No such file or directory"),
    ("a file for a folder", "file/proxy", "Not a directory"),
    ("a file", "file", "no socket"),
    ("a folder", "folder", "no socket"),
    ("a FIFO", "pipe", "no socket"),
    ("a link to a dead socket", "link", "no socket"),
    ("a link to nothing", "broken", "no socket"),
    ("a path of 108 bytes", "", "too long"),
]))  # fmt: skip
def test_what_is_no_socket_and_can_not_be_is_one_clear_line_and_never_touched(
        where: str, why: str, short: Path) -> None:  # fmt: skip
    (short / "file").write_text("mine\n")
    (short / "folder").mkdir()
    os.mkfifo(short / "pipe")
    left_by_the_dead(short / "dead")
    (short / "link").symlink_to("dead")
    (short / "broken").symlink_to("nothing")
    before = files(short)
    assert why in can_not_listen(short / (where or "x" * (107 - len(str(short)))))
    assert files(short) == before
    # One byte less can be.
    path = short / ("x" * (106 - len(str(short))))
    p.listen(p.UnixAddress(str(path), 0o600))[0].close()
    assert files(short) == before


# ================================================================ what is left behind


@pytest.mark.parametrize("now", ["another socket", "a link to where it was moved to", "nothing"])
def test_what_is_not_its_own_any_more_is_not_removed(now: str, short: Path) -> None:
    path = short / "proxy"
    (listener,) = p.listen(p.UnixAddress(str(path), 0o600))
    path.rename(short / "moved")
    if now == "another socket":
        left_by_the_dead(path)
    elif now != "nothing":
        path.symlink_to("moved")
    before = files(short)
    listener.close()
    assert files(short) == before


# ================================================================ who asks


def test_another_user_is_let_in_by_mode_and_token_and_named(
        short: Path, agent_with_key: Agent, start_unix: Callable[..., Proxy]) -> None:  # fmt: skip
    if os.geteuid() != 0:
        cannot_run("only root can be another user: run the tests as root")
    uid = 4000000000
    argv = [need("setpriv", "util-linux"), f"--reuid={uid}", f"--regid={uid - 1}", "--clear-groups"]
    argv += [need("curl", "curl"), "-qs", "--max-time", "20", "-w", "%{http_code}"]
    argv += ["http://localhost/publickey", "--unix-socket"]
    short.chmod(0o711)
    tokens = private_file(short / "tokens", "tok3n-of-the-tests box\n")
    path, closed = short / "proxy", short / "closed"
    proxy = start_unix(f"unix:{path}?mode=0666", f"unix:{closed}", upstream=agent_with_key.sock,
                       args=("--token-file", tokens))  # fmt: skip
    assert run([*argv, closed, "-H", BEARER], check=False).returncode == 7  # could not connect
    assert run([*argv, path]).stdout.endswith(b"401")
    assert audited(proxy, 1)["uid"] == str(uid)
    assert run([*argv, path, "-H", BEARER]).stdout.endswith(b"200")
    fields = audited(proxy, 2)
    assert (fields["peer"], fields["uid"], fields["token"]) == ("unix", str(uid), "box")
    refused(send_all_before_reading(path, post(b"", length=32 * MIB)), 401)


def test_on_macos_the_process_and_its_user_are_told_by_its_own_options(
        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    # sys/un.h and sys/ucred.h: SOL_LOCAL 0, LOCAL_PEERCRED 1 (a struct xucred: version, uid,
    # number of groups, 16 groups), LOCAL_PEERPID 2 (an int).
    monkeypatch.setattr(sys, "platform", "darwin")
    xucred = struct.pack("@IIh16I", 0, 4294967294, 1, 20, *15 * [7])
    answers = {(0, 1, len(xucred)): xucred, (0, 2): 4711}
    stub: Any = types.SimpleNamespace(
        family=socket.AF_UNIX, getsockopt=lambda *option: answers[option]
    )
    assert p.peer_fields(stub, "") == {"peer": "unix", "pid": "4711", "uid": "4294967294"}


def test_a_place_is_taken_from_one_address_for_another(
    short: Path, agent_with_key: Agent, start_unix: Callable[..., Proxy], clients: Clients
) -> None:
    """Those who can only reach the one socket can't lock out those at the other."""
    first, second = short / "first", short / "second"
    start_unix(f"unix:{first}", f"unix:{second}", upstream=agent_with_key.sock)
    opened = clients.open(first, b"", 140)
    wait_for(lambda: readable(opened), message="all places are taken")
    assert read_all(opened[0]) == b""  # in the order in which they were idle
    assert opened[-1] not in readable(opened)
    assert ask(second, post(b"hello")).status == 200


# ================================================================ the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_removed_at_once_so_that_the_next_takes_its_path_while_one_drains(
        number: int, short: Path, gate: Scripted, scripted_agent: Callable[..., Path],
        start_unix: Callable[..., Proxy], clients: Clients) -> None:  # fmt: skip
    path = short / "proxy"
    proxy = start_unix(f"unix:{path}", f"unix:{short}/b", upstream=scripted_agent(gate))
    (idle,) = clients.open(path, b"")
    (waiting,) = clients.open(path, post(b"x"))
    wait_for(lambda: gate.signing == 1)
    os.kill(proxy.pid, number)
    wait_for(lambda: not path.exists())
    assert read_all(idle) == b""
    start_unix(f"unix:{path}", upstream=short / "none")
    assert proxy.process.poll() is None
    gate.gate.set()
    assert the_one_answer(read_all(waiting)).status == 200
    waiting.close()
    assert proxy.process.wait(10) == 0
    assert not (short / "b").exists()
    assert served(path)
