"""The proxy on a Unix socket: who may connect, whose file it is, who is seen to ask."""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest
from conftest import (
    PROXY,
    Agent,
    Answer,
    Keys,
    Proxy,
    cannot_run,
    clean_env,
    message,
    need,
    read_message,
    rows,
    run,
    wait_for,
)
from test_commands import call, one_line
from test_http import (
    CONTINUE,
    MIB,
    PAGE,
    Scripted,
    busy,
    chunks,
    clean,
    get,
    log_fields,
    post,
    post_chunked,
    read_all,
    readable,
    refused,
    request_lines,
    ssh_keygen,
    the_one_answer,
)

import ssh_agent_proxy as p

__all__ = ["ssh_keygen"]  # a fixture

TOKEN_SETTING = "SSH_AGENT_PROXY_TOKEN_FILE"
linux = pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")


def connect(path: Path) -> socket.socket:
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(10)
    s.connect(str(path))
    return s


def ask(path: Path, data: bytes) -> Answer:
    with connect(path) as s:
        s.sendall(data)
        return the_one_answer(read_all(s))


def served(path: Path) -> bool:
    return ask(path, get("/healthz")).body == b"ok\n"


def audited(proxy: Proxy, number: int = 1) -> Dict[str, str]:
    """The NUMBERth line that the log has for a request."""
    wait_for(lambda: len(request_lines(proxy.log())) >= number, message="a line in the log")
    return log_fields(request_lines(proxy.log())[number - 1])


@pytest.fixture
def start_unix(start_proxy: Callable[..., Proxy]) -> Callable[..., Proxy]:
    """Starts the proxy at addresses of which at least one is a Unix socket, and waits for each."""

    def start(*addresses: str, args: Tuple[Any, ...] = (), **more: Any) -> Proxy:
        proxy = start_proxy(*args, addr=",".join(addresses), wait=False, **more)
        wait_for(
            lambda: proxy.log().count("listening on ") == len(addresses)
            or proxy.process.poll() is not None,
            message="it listens",
        )
        assert proxy.process.poll() is None, proxy.log()
        return proxy

    return start


@pytest.fixture
def token_file(short: Path) -> Path:
    path = short / "tokens"
    path.write_text("tok3n box\n")
    path.chmod(0o600)
    return path


BEARER = "Authorization: Bearer tok3n"


class Front(NamedTuple):
    """A proxy that many tests share, at a Unix socket in front of a real agent."""

    path: Path
    proxy: Proxy
    pid: int

    def lines(self) -> int:
        """How many lines the log has for requests, once it has all of those until now."""
        marker = f"/marker{len(self.proxy.log())}"
        ask(self.path, get(marker))
        wait_for(lambda: f"path={marker} " in self.proxy.log(), message="the marker's line")
        return len(request_lines(self.proxy.log()))

    def ask(self, data: bytes) -> Tuple[Answer, Dict[str, str]]:
        """What comes back for DATA, and the line that the log has for it."""
        before = self.lines()
        answer = ask(self.path, data)
        return answer, audited(self.proxy, before + 1)


@pytest.fixture(scope="module")
def front(keys: Keys) -> Iterator[Front]:
    folder = Path(tempfile.mkdtemp(prefix="sap.", dir="/tmp"))
    agent = Agent(folder / "agent")
    agent.add(keys["ed25519"])
    path = folder / "proxy"
    argv = [sys.executable, str(PROXY), "--addr", f"unix:{path}", "--upstream", str(agent.sock)]
    proxy = Proxy(argv, clean_env(folder / "home"), wait=False)
    proxy.wait_log("listening on unix:")
    yield Front(path, proxy, proxy.pid)
    status = proxy.stop()
    agent.stop()
    left = path.exists()
    shutil.rmtree(folder)
    clean(proxy)
    assert (status, left) == (0, False)


# ================================================================ the setting


def addresses(value: str, **env: str) -> List[Any]:
    return list(p.Config.from_env(env, ["--addr", value], {}).addr)


@pytest.mark.parametrize(("value", "expected"), rows([
    ("a path", "unix:/run/proxy", ("/run/proxy", 0o600)),
    ("its mode", "unix:/run/proxy?mode=0600", ("/run/proxy", 0o600)),
    ("its mode without the zero", "unix:/run/proxy?mode=600", ("/run/proxy", 0o600)),
    ("another mode that opens it to nobody", "unix:/run/proxy?mode=0700", ("/run/proxy", 0o700)),
    ("a tilde", "unix:~/proxy", ("/home/me/proxy", 0o600)),
    ("systemd's specifier", "unix:%h/proxy", ("/home/me/proxy", 0o600)),
    ("a variable", "unix:$RUN/proxy", ("/run/me/proxy", 0o600)),
    ("a variable in braces", "unix:${RUN}/proxy?mode=600", ("/run/me/proxy", 0o600)),
    ("dollars", "unix:/a$$b", ("/a$b", 0o600)),
    ("characters of every sort", "unix:/a b:c[d]=e&f#g\u00e4", ("/a b:c[d]=e&f#g\u00e4", 0o600)),
]))  # fmt: skip
def test_an_address_is_a_path_and_its_mode(value: str, expected: Tuple[str, int]) -> None:
    (address,) = addresses(value, HOME="/home/me", RUN="/run/me")
    assert (address.path, address.mode) == expected


def test_addresses_of_both_sorts_are_separated_by_commas() -> None:
    first, second, third = addresses("unix:/a, 127.0.0.1:1 ,unix:/b?mode=0600")
    assert (first.path, second.port, third.path) == ("/a", 1, "/b")


WRONG = [
    "unix:", "unix", "unix:proxy", "unix:./proxy", "unix:../proxy", "unix:?mode=0600", "UNIX:/a",
    "unix:@proxy", "unix:\x00proxy", "/run/proxy", "unix:$NOWHERE/proxy", "unix:$EMPTY",
    "unix:/a$", "unix:/a?", "unix:/a?mode", "unix:/a?mode=", "unix:/a?mode=8", "unix:/a?mode=99",
    "unix:/a?mode=0999", "unix:/a?mode=+x", "unix:/a?mode=u=rw", "unix:/a?mode=rw",
    "unix:/a?mode=6", "unix:/a?mode=60", "unix:/a?mode=0o600", "unix:/a?mode=0x180",
    "unix:/a?mode=00600", "unix:/a?mode=6000", "unix:/a?mode=1600", "unix:/a?mode=4600",
    "unix:/a?mode=-600", "unix:/a?mode=600x", "unix:/a?mode=600 0", "unix:/a?mode=0688",
    "unix:/a?mode=\u0666\u0660\u0660", "unix:/a?mode=600&mode=600", "unix:/a?mode=600?mode=600",
    "unix:/a?mode=600#", "unix:/a?MODE=600", "unix:/a?owner=me", "unix:/a?x=1&mode=600",
    "unix:/a,", ",unix:/a", "unix:/a,unix:", "unix:/a,b",
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=ascii)
def test_what_is_no_address_is_a_wrong_setting(value: str) -> None:
    with pytest.raises(p.ConfigError, match=r"^--addr: ") as e:
        addresses(value, EMPTY="")
    assert str(e.value).isprintable()


@pytest.mark.parametrize("value", ["unix:proxy", "unix:/tmp/a?mode=0999", "unix:", "unix:$NONE/a"])
def test_a_wrong_address_is_exit_2_in_one_line(value: str, home: Path) -> None:
    done = call(home, SSH_AGENT_PROXY_ADDR=value)
    assert done.returncode == 2
    assert one_line(done.stderr).startswith("ssh-agent-proxy: SSH_AGENT_PROXY_ADDR: ")


OPEN_MODES = ["0660", "660", "0606", "0640", "0604", "0620", "0610", "0601", "0602", "666", "0777"]


@pytest.mark.parametrize("mode", OPEN_MODES)
def test_a_mode_that_lets_others_in_needs_a_token_file(mode: str) -> None:
    for value in (f"unix:/a?mode={mode}", f"127.0.0.1:0,unix:/b,unix:/a?mode={mode}"):
        with pytest.raises(p.ConfigError) as e:
            addresses(value)
        assert TOKEN_SETTING in str(e.value)
        assert "ADDR" in str(e.value)
        env = {TOKEN_SETTING: "/tokens"}
        assert addresses(value, **env)[-1].mode == int(mode, 8)


def test_a_mode_that_lets_others_in_without_a_token_file_is_exit_2(home: Path, short: Path) -> None:
    path = short / "proxy"
    done = call(home, "--addr", f"unix:{path}?mode=0660")
    assert done.returncode == 2
    assert TOKEN_SETTING in one_line(done.stderr)
    assert not path.exists()


# ================================================================ its mode


def mode_of(path: Path) -> str:
    found = path.lstat()
    assert stat.S_ISSOCK(found.st_mode)
    return f"{stat.S_IMODE(found.st_mode):04o}"


def under_umask(folder: Path, mask: str) -> str:
    """For start_proxy's PYTHON: ours, with that umask."""
    script = folder / f"umask{mask}"
    script.write_text(f'#!/bin/sh\numask {mask}\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("mask", ["000", "022", "077", "0177", "777"])
def test_each_has_its_mode_whatever_the_umask(
    mask: str, short: Path, token_file: Path, start_unix: Callable[..., Proxy]
) -> None:
    # As written: not less for others, who have been let in, and not more.
    modes = {"a": "", "b": "?mode=0660", "c": "?mode=666", "d": "?mode=0700", "e": ""}
    proxy = start_unix(
        *[f"unix:{short}/{name}{mode}" for name, mode in modes.items()],
        args=("--token-file", token_file), python=under_umask(short, mask), upstream=short / "none",
    )  # fmt: skip
    found = [mode_of(short / name) for name in modes]
    assert found == ["0600", "0660", "0666", "0700", "0600"]
    if sys.platform == "linux":
        match = re.search(r"^Umask:\s+(\d+)$", Path(f"/proc/{proxy.pid}/status").read_text(), re.M)
        assert match
        assert int(match.group(1), 8) == int(mask, 8)  # what else it makes has the user's
    assert all(served(short / name) for name in modes)


def acl(*entries: Tuple[int, int, int]) -> bytes:
    """An access list as Linux keeps it (acl(5)): tag, permissions, id."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@linux
def test_a_folder_that_opens_what_is_made_in_it_does_not_open_the_socket(
    short: Path, start_unix: Callable[..., Proxy]
) -> None:
    # Where a folder has a default access list, the umask does not count for what is made there.
    folder = short / "folder"
    folder.mkdir()
    USER_OBJ, USER, GROUP_OBJ, MASK, OTHER, NOBODY = 1, 2, 4, 16, 32, 0xFFFFFFFF
    entries = [(USER_OBJ, 7, NOBODY), (USER, 7, 65534), (GROUP_OBJ, 7, NOBODY), (MASK, 7, NOBODY),
               (OTHER, 7, NOBODY)]  # fmt: skip
    os.setxattr(folder, "system.posix_acl_default", acl(*entries))
    (folder / "file").touch(0o666)
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o666  # that it works as said
    start_unix(f"unix:{folder}/proxy", upstream=short / "none")
    assert mode_of(folder / "proxy") == "0600"  # with an access list the middle digit is the mask


@linux
@pytest.mark.parametrize(("asked", "mask"), [("", "0177"), ("?mode=0660", "0117")])
def test_it_has_its_mode_from_its_first_instant(
    asked: str, mask: str, short: Path, home: Path, token_file: Path
) -> None:
    # A chmod behind bind would come too late for who connects in between.
    path, trace = short / "proxy", short / "trace"
    calls = "umask,bind,listen,connect,/chmod,unlink,/^rename"
    # -D: the program is our child and gets our signals, strace is its grandchild.
    argv = [need("strace", "strace"), "-D", "-f", "-o", trace, "-e", f"trace={calls}"]
    argv += [sys.executable, PROXY, "--addr", f"unix:{path}{asked}", "--token-file", token_file]
    argv += ["--upstream", short / "none"]
    proxy = Proxy([str(word) for word in argv], clean_env(home), wait=False)
    try:
        proxy.wait_log("listening on unix:", 30)
        proxy.wait_log("/sign can't work yet", 30)
        assert served(path)
    finally:
        status = proxy.stop()
    assert status == 0
    wait_for(lambda: "+++ exited with 0 +++" in trace.read_text(), message="the trace is whole")
    seen = re.findall(rf'(?:(umask)\((\d+)\)|(bind|listen)\((?:\d+, {{.*"{path}"}})?)',
                      trace.read_text())  # fmt: skip
    names = [name or other for name, _, other in seen]
    at = names.index("bind")
    assert names[at - 1 : at + 2] == ["umask", "bind", "umask"]
    assert int(seen[at - 1][1], 8) == int(mask, 8)
    assert names.count("umask") == 2
    assert "chmod" not in trace.read_text()


# ================================================================ several addresses


def test_every_address_is_served(
    agent: Agent, keys: Keys, short: Path, start_unix: Callable[..., Proxy],
    ssh_keygen: Callable[..., bytes],
) -> None:  # fmt: skip
    agent.add(keys["ed25519"])
    first, second = short / "first", short / "second"
    proxy = start_unix(f"unix:{first}", "127.0.0.1:0", f"unix:{second}", upstream=agent.sock)
    port = int(proxy.wait_log(r"listening on 127\.0\.0\.1:(\d+) ").group(1))
    assert f"listening on unix:{first} (" in proxy.log()
    assert f"listening on unix:{second} (" in proxy.log()
    expected = ssh_keygen(b"hello")
    for n in range(3):
        assert ask(first, post(b"hello")).body == expected
        assert audited(proxy, 3 * n + 1)["peer"] == "unix"
        with socket.create_connection(("127.0.0.1", port), 10) as s:
            s.sendall(post(b"hello"))
            assert the_one_answer(read_all(s)).body == expected
        fields = audited(proxy, 3 * n + 2)
        assert fields["peer"].startswith("127.0.0.1:")
        assert not {"pid", "uid"} & fields.keys()
        assert ask(second, post(b"hello")).body == expected
        assert audited(proxy, 3 * n + 3)["peer"] == "unix"
    assert proxy.stop() == 0
    assert not first.exists()
    assert not second.exists()
    # Nobody is warned of who could reach these.
    assert not re.search("WARNING .*(loopback|unix:)", proxy.log())


@pytest.mark.parametrize("where", ["~/proxy", "%h/proxy", "$HOME/proxy", "${HOME}/proxy"])
def test_a_path_below_home_is_expanded(
    where: str, home: Path, start_unix: Callable[..., Proxy]
) -> None:
    proxy = start_unix(f"unix:{where}", upstream=home / "none")
    assert served(home / "proxy")
    assert f"listening on unix:{home}/proxy (" in proxy.log()


def test_a_hostile_path_makes_one_harmless_line(
    short: Path, start_unix: Callable[..., Proxy]
) -> None:
    path = short / "a\nb \x1b[31m\u202e"
    proxy = start_unix(f"unix:{path}", upstream=short / "none")
    assert served(path)
    line = next(line for line in proxy.log().splitlines() if "listening on" in line)
    assert line.isprintable()
    assert "(namespace" in line


# ================================================================ what stands there already


def left_by_the_dead(path: Path, kind: int = socket.SOCK_STREAM) -> None:
    with socket.socket(socket.AF_UNIX, kind) as s:
        s.bind(str(path))


def test_the_socket_of_a_dead_program_is_replaced(
    short: Path, start_unix: Callable[..., Proxy]
) -> None:
    path = short / "proxy"
    left_by_the_dead(path)
    path.chmod(0o777)
    start_unix(f"unix:{path}", upstream=short / "none")
    assert served(path)
    assert mode_of(path) == "0600"


def test_what_a_killed_proxy_leaves_is_replaced(
    short: Path, start_unix: Callable[..., Proxy]
) -> None:
    path = short / "proxy"
    first = start_unix(f"unix:{path}", upstream=short / "none")
    first.process.kill()
    first.process.wait(5)
    assert path.exists()
    second = start_unix(f"unix:{path}", upstream=short / "none")
    assert served(path)
    assert second.stop() == 0
    assert not path.exists()


def refuses_to_start(path: Path, home: Path, addr: str = "") -> str:
    done = call(home, "--addr", addr or f"unix:{path}", "--upstream", home / "none")
    assert (done.returncode, done.stdout) == (1, b"")
    # What the system could not harden is told before.
    *before, line = done.stderr.decode().splitlines()
    assert line.startswith("ssh-agent-proxy: ")
    assert [told for told in before if "not in force" not in told] == []
    assert line.isprintable()
    assert "SSH_AGENT_PROXY_ADDR" in line  # the way out
    return line


def test_a_second_proxy_is_refused_and_the_first_goes_on(
    short: Path, home: Path, start_unix: Callable[..., Proxy]
) -> None:
    path = short / "proxy"
    proxy = start_unix(f"unix:{path}", upstream=short / "none")
    inode = path.lstat().st_ino
    for addr in ("", f"unix:{path}?mode=0600", f"127.0.0.1:0,unix:{path}"):
        line = refuses_to_start(path, home, addr)
        assert str(path) in line
        assert "another program listens there" in line
        assert path.lstat().st_ino == inode
        assert served(path)
    assert proxy.stop() == 0
    # A look whether it lives is no request.
    assert len(request_lines(proxy.log())) == 3
    assert not path.exists()


def test_the_same_path_twice_is_refused_and_leaves_nothing(short: Path, home: Path) -> None:
    path = short / "proxy"
    refuses_to_start(path, home, f"unix:{path},unix:{path}")
    assert not path.exists()


@pytest.mark.parametrize("kind", rows([
    ("a listener that does not answer", socket.SOCK_STREAM),
    ("a listener whose queue is full", -socket.SOCK_STREAM),
    ("datagrams", socket.SOCK_DGRAM),
    ("sequenced packets", socket.SOCK_SEQPACKET),
]))  # fmt: skip
def test_a_socket_of_a_living_program_is_never_touched(kind: int, short: Path, home: Path) -> None:
    path = short / "theirs"
    with socket.socket(socket.AF_UNIX, abs(kind)) as theirs:
        theirs.bind(str(path))
        waiting = []
        if kind != socket.SOCK_DGRAM:
            theirs.listen(0)
        if kind < 0:
            waiting = [socket.socket(socket.AF_UNIX)]
            waiting[0].connect(str(path))
        inode = path.lstat().st_ino
        refuses_to_start(path, home)
        assert path.lstat().st_ino == inode
        if kind == socket.SOCK_DGRAM:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
                s.connect(str(path))
        for s in waiting:
            s.close()


def link_to_stale(path: Path) -> None:
    left_by_the_dead(path.with_name("target"))
    path.symlink_to("target")


def link_to_file(path: Path) -> None:
    path.with_name("target").write_text("mine\n")
    path.symlink_to("target")


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("mine\n")


NOT_SOCKETS: List[Tuple[str, Callable[[Path], None]]] = [
    ("a file", lambda path: path.write_text("mine\n") and None),
    ("an empty file", lambda path: path.touch()),
    ("a file without any permission", lambda path: path.touch(0)),
    ("a folder", full_folder),
    ("an empty folder", lambda path: path.mkdir()),
    ("a FIFO", lambda path: os.mkfifo(path)),
    ("a link to a file", link_to_file),
    ("a link to a dead socket", link_to_stale),
    ("a link to nothing", lambda path: path.symlink_to("nothing")),
    ("a link to itself", lambda path: path.symlink_to(path.name)),
    ("a link to a folder", lambda path: path.symlink_to(".")),
    ("a link to a device", lambda path: path.symlink_to("/dev/null")),
]


def state(folder: Path) -> Dict[str, Tuple[Any, ...]]:
    """All that stands in FOLDER, and nothing followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        text = path.read_text() if stat.S_ISREG(info.st_mode) and info.st_mode & 0o400 else ""
        text += os.readlink(path) if path.is_symlink() else ""
        found[str(path)] = (info.st_ino, info.st_mode, info.st_size, text)
    return found


@pytest.mark.parametrize("make", rows(NOT_SOCKETS))
def test_what_is_no_socket_is_never_touched(
    make: Callable[[Path], None], short: Path, home: Path
) -> None:
    folder = short / "folder"
    folder.mkdir()
    path = folder / "proxy"
    make(path)
    before = state(folder)
    line = refuses_to_start(path, home)
    assert str(path) in line
    assert "no socket" in line
    assert state(folder) == before


@pytest.mark.parametrize(("where", "why"), rows([
    ("a folder that is missing", "missing/proxy", "No such file or directory"),
    ("a file for a folder", "file/proxy", "Not a directory"),
    ("a path of 108 bytes", 108, "too long"),
    ("a path of 200 bytes", 200, "too long"),
    ("a path of 5000 bytes", 5000, "too long"),
]))  # fmt: skip
def test_a_path_that_can_not_be_is_one_clear_line(
    where: Any, why: str, short: Path, home: Path
) -> None:
    folder = short / "f"
    folder.mkdir()
    (folder / "file").touch()
    if isinstance(where, int):
        where = "x" * (where - len(str(folder)) - 1)
    before = state(folder)
    line = refuses_to_start(folder / where, home)
    assert str(folder) in line
    assert why in line
    assert state(folder) == before


def test_a_path_of_107_bytes_is_served(short: Path, start_unix: Callable[..., Proxy]) -> None:
    path = short / ("x" * (107 - len(str(short)) - 1))
    assert len(str(path)) == 107
    start_unix(f"unix:{path}", upstream=short / "none")
    assert served(path)


# ================================================================ what is left behind


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_removed_at_the_end(
    number: int, short: Path, start_unix: Callable[..., Proxy]
) -> None:
    folder = short / "folder"
    folder.mkdir()
    proxy = start_unix(f"unix:{folder}/a", f"unix:{folder}/b", upstream=short / "none")
    assert sorted(os.listdir(folder)) == ["a", "b"]
    os.kill(proxy.pid, number)
    assert proxy.process.wait(10) == 0
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    "then", ["a busy port", "a folder that is missing", "a file", "a live one"]
)
def test_it_is_removed_where_a_later_address_can_not_be_had(
    then: str, short: Path, home: Path
) -> None:
    folder = short / "folder"
    folder.mkdir()
    (folder / "file").touch()
    with socket.socket() as other, socket.socket(socket.AF_UNIX) as live:
        other.bind(("127.0.0.1", 0))
        other.listen()
        live.bind(str(folder / "live"))
        live.listen()
        later = {
            "a busy port": f"127.0.0.1:{other.getsockname()[1]}",
            "a folder that is missing": f"unix:{folder}/missing/proxy",
            "a file": f"unix:{folder}/file",
            "a live one": f"unix:{folder}/live",
        }[then]
        before = state(folder)
        refuses_to_start(folder, home, f"unix:{folder}/a,127.0.0.1:0,unix:{folder}/b,{later}")
        assert state(folder) == before


def by_another_socket(path: Path) -> None:
    path.unlink()
    left_by_the_dead(path)


def by_a_socket_moved_there(path: Path) -> None:
    left_by_the_dead(path.with_name("new"))
    path.with_name("new").rename(path)


def by_a_file(path: Path) -> None:
    path.unlink()
    path.write_text("mine\n")


def by_a_link_to_itself_moved(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("replace", rows([
    ("another socket", by_another_socket),
    ("a socket that was moved there", by_a_socket_moved_there),
    ("a file", by_a_file),
    ("a link to where it was moved to", by_a_link_to_itself_moved),
    ("a folder", by_a_folder),
    ("nothing", lambda path: path.unlink()),
]))  # fmt: skip
def test_what_is_not_its_own_any_more_is_not_removed(
    replace: Callable[[Path], None], short: Path, start_unix: Callable[..., Proxy]
) -> None:
    folder = short / "folder"
    folder.mkdir()
    path = folder / "proxy"
    proxy = start_unix(f"unix:{path}", upstream=short / "none")
    replace(path)
    before = state(folder)
    assert proxy.stop() == 0
    assert state(folder) == before


def test_what_a_successor_made_is_not_removed(
    short: Path, start_unix: Callable[..., Proxy]
) -> None:
    path = short / "proxy"
    first = start_unix(f"unix:{path}", upstream=short / "none")
    path.unlink()
    start_unix(f"unix:{path}", upstream=short / "none")
    assert first.stop() == 0
    assert served(path)


# ================================================================ who asks


CURL = ["-qs", "--max-time", "20", "--unix-socket"]


def test_the_line_names_the_process_and_its_user(front: Front) -> None:
    for data in (
        post(b"hello"), get("/publickey"), get("/healthz"), get("/nope"), b"nonsense\r\n\r\n",
        get("/publickey", PAGE), b"GET /healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    ):  # fmt: skip
        _, fields = front.ask(data)
        assert (fields["peer"], fields["pid"], fields["uid"]) == (
            "unix", str(os.getpid()), str(os.geteuid())
        )  # fmt: skip


def test_another_process_is_named_by_its_own_pid(front: Front) -> None:
    before = front.lines()
    argv = [need("curl", "curl"), *CURL, str(front.path), "http://localhost/healthz"]
    started = [subprocess.Popen(argv, stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate(timeout=20)[0] for process in started] == 3 * [b"ok\n"]
    seen = {audited(front.proxy, before + n)["pid"] for n in (1, 2, 3)}
    assert seen == {str(process.pid) for process in started}


def test_it_is_who_connected_that_counts_not_who_uses_the_connection(front: Front) -> None:
    # The kernel notes it at connect: a descriptor that is handed on makes nobody else of it.
    before = front.lines()
    with connect(front.path) as s:
        script = f"import os; os.write({s.fileno()}, {get('/healthz')!r})"
        argv = [sys.executable, "-c", script]
        subprocess.run(argv, check=True, pass_fds=[s.fileno()], timeout=20)
        assert the_one_answer(read_all(s)).body == b"ok\n"
    assert audited(front.proxy, before + 1)["pid"] == str(os.getpid())


def another_user(uid: int) -> List[str]:
    if os.geteuid() != 0:
        cannot_run("only root can be another user: run the tests as root")
    return [need("setpriv", "util-linux"), f"--reuid={uid}", f"--regid={uid - 1}", "--clear-groups"]


@pytest.mark.parametrize("uid", [65534, 4000000000])
def test_another_user_is_let_in_by_mode_and_token_and_named(
    uid: int, short: Path, agent: Agent, keys: Keys, token_file: Path,
    start_unix: Callable[..., Proxy],
) -> None:  # fmt: skip
    agent.add(keys["ed25519"])
    setpriv = another_user(uid)
    short.chmod(0o711)
    path = short / "proxy"
    args = ("--token-file", token_file)
    proxy = start_unix(f"unix:{path}?mode=0666", args=args, upstream=agent.sock)
    url = "http://localhost/publickey"
    argv = [*setpriv, need("curl", "curl"), *CURL, str(path), "-w", "%{http_code}", url]
    assert run(argv).stdout.endswith(b"401")
    assert audited(proxy, 1)["uid"] == str(uid)
    done = run([*argv, "-H", BEARER])
    assert done.stdout.endswith(b"200")
    fields = audited(proxy, 2)
    assert (fields["peer"], fields["uid"], fields["token"]) == ("unix", str(uid), "box")


def test_another_user_is_not_let_in_by_the_usual_mode(
    short: Path, start_unix: Callable[..., Proxy]
) -> None:
    setpriv = another_user(65534)
    short.chmod(0o711)
    path = short / "proxy"
    proxy = start_unix(f"unix:{path}", upstream=short / "none")
    argv = [need("curl", "curl"), *CURL, str(path), "http://localhost/healthz"]
    assert run(argv).stdout == b"ok\n"
    assert run([*setpriv, *argv], check=False).returncode == 7  # could not connect
    assert proxy.stop() == 0
    assert len(request_lines(proxy.log())) == 1


class Stub:
    """A connection as other systems have it."""

    family = socket.AF_UNIX

    def __init__(self, answers: Dict[Tuple[int, int], Any]) -> None:
        self.answers = answers

    def getsockopt(self, level: int, name: int, size: int = 0) -> Any:
        answer = self.answers[level, name]
        assert size == (len(answer) if isinstance(answer, bytes) else 0)
        return answer


@pytest.mark.parametrize(("pid", "uid"), [(4711, 501), (1, 0), (99999, 4294967294)])
def test_on_macos_the_process_and_its_user_are_told_by_its_own_options(
    pid: int, uid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # sys/un.h and sys/ucred.h: SOL_LOCAL 0, LOCAL_PEERCRED 1 (a struct xucred: version, uid,
    # number of groups, 16 groups), LOCAL_PEERPID 2 (an int).
    monkeypatch.setattr(sys, "platform", "darwin")
    xucred = struct.pack("@IIh16I", 0, uid, 1, 20, *15 * [7])
    stub: Any = Stub({(0, 1): xucred, (0, 2): pid})
    assert p.peer_fields(stub, "") == {"peer": "unix", "pid": str(pid), "uid": str(uid)}


@pytest.mark.parametrize(("pid", "uid"), [(4711, 1000), (0, 65534), (1, 4294967294)])
def test_on_linux_they_are_told_by_so_peercred(
    pid: int, uid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # unix(7): pid, uid, gid. A process of another pid namespace has pid 0.
    monkeypatch.setattr(sys, "platform", "linux")
    ucred = struct.pack("@iII", pid, uid, 7)
    stub: Any = Stub({(socket.SOL_SOCKET, getattr(socket, "SO_PEERCRED", 17)): ucred})
    monkeypatch.setattr(socket, "SO_PEERCRED", 17, raising=False)
    assert p.peer_fields(stub, "") == {"peer": "unix", "pid": str(pid), "uid": str(uid)}


# ================================================================ the same rules hold


@pytest.mark.parametrize(("data", "status"), rows([
    ("a host of ours", get("/publickey"), 200),
    ("an address for a host", b"GET /publickey HTTP/1.1\r\nHost: 127.0.0.1:7221\r\n\r\n", 200),
    ("HTTP/1.0 without a host", b"GET /publickey HTTP/1.0\r\n\r\n", 200),
    ("an absolute target", b"GET http://localhost/publickey HTTP/1.1\r\nHost: localhost\r\n\r\n",
     200),
    ("a foreign host", b"GET /publickey HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
    ("a single label", b"POST /sign HTTP/1.1\r\nHost: proxy\r\nContent-Length: 1\r\n\r\nx", 421),
    ("an empty host", b"GET /publickey HTTP/1.1\r\nHost:\r\n\r\n", 421),
    ("a foreign target", b"GET http://a.example/publickey HTTP/1.1\r\nHost: localhost\r\n\r\n",
     421),
    ("no host", b"GET /publickey HTTP/1.1\r\n\r\n", 400),
    ("an origin", post(b"x", PAGE), 403),
    ("a page's site", get("/healthz", "Sec-Fetch-Site: cross-site"), 403),
    ("no such path", get("/nope"), 404),
    ("another method", get("/sign"), 405),
    ("no length", b"POST /sign HTTP/1.1\r\nHost: localhost\r\n\r\n", 411),
    ("an empty body", post(b""), 400),
    ("another namespace", post(b"x", "SSHSIG-Namespace: file"), 403),
    ("a head that is too large", get("/healthz", "A: " + 17000 * "a"), 431),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
]))  # fmt: skip
def test_requests_are_judged_as_over_tcp(data: bytes, status: int, front: Front) -> None:
    answer, fields = front.ask(data)
    assert fields["status"] == str(status)
    if status == 200:
        assert answer.status == 200
    else:
        refused(answer, status)


def test_tokens_are_asked_for_here_too(
    short: Path, agent: Agent, keys: Keys, token_file: Path, start_unix: Callable[..., Proxy]
) -> None:
    agent.add(keys["ed25519"])
    path = short / "proxy"
    args = ("--token-file", token_file)
    proxy = start_unix(f"unix:{path}", args=args, upstream=agent.sock)
    for fields in ((), ("Authorization: Bearer wrong",)):
        answer = refused(ask(path, post(b"x", *fields)), 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    assert served(path)
    assert ask(path, post(b"x", BEARER)).status == 200
    token_file.write_text("another\n")
    refused(ask(path, post(b"x", BEARER)), 401)
    noted = audited(proxy, 4)
    assert (noted["token"], noted["pid"]) == ("box", str(os.getpid()))


# ================================================================ bodies


@pytest.mark.parametrize("size", [1, 65535, 262145, 3 * MIB])
def test_bodies_are_signed_as_ssh_keygen_does(
    size: int, front: Front, keys: Keys, ssh_keygen: Callable[..., bytes]
) -> None:
    body = (b"0123456789abcde\n" * (size // 16 + 1))[:size]
    expected = ssh_keygen(body)
    assert ask(front.path, post(body)).body == expected
    chunked = post_chunked(chunks(body, [1, 5, 4096, 65537]))
    assert ask(front.path, chunked).body == expected


@linux
def test_64_mib_are_signed_in_flat_memory(front: Front, ssh_keygen: Callable[..., bytes]) -> None:
    piece = os.urandom(MIB)
    assert ask(front.path, post(piece)).status == 200

    def most() -> int:
        text = Path(f"/proc/{front.pid}/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0])

    before = most()
    with connect(front.path) as s:
        s.settimeout(60)
        s.sendall(post(b"", length=64 * MIB))
        for _ in range(64):
            s.sendall(piece)
        assert the_one_answer(read_all(s, 60)).body == ssh_keygen(64 * piece)
    assert most() - before < 4 * 1024


def test_a_client_that_waits_is_told_to_go_on(
    front: Front, ssh_keygen: Callable[..., bytes]
) -> None:
    with connect(front.path) as s:
        s.sendall(post(b"", "Expect: 100-continue", length=5))
        assert s.recv(len(CONTINUE), socket.MSG_WAITALL) == CONTINUE
        assert not select.select([s], [], [], 0)[0]
        s.sendall(b"hello")
        assert the_one_answer(read_all(s)).body == ssh_keygen(b"hello")


def test_a_request_byte_by_byte_is_the_same(
    front: Front, ssh_keygen: Callable[..., bytes]
) -> None:
    with connect(front.path) as s:
        for byte in post(b"hello"):
            s.sendall(bytes([byte]))
        assert the_one_answer(read_all(s)).body == ssh_keygen(b"hello")


@pytest.mark.parametrize(("head", "status"), rows([
    ("from a page", post(b"", PAGE, length=64 * MIB), 403),
    ("chunked, from a page", post_chunked(b"4000000\r\n", PAGE), 403),
    ("to a foreign host",
     b"POST /sign HTTP/1.1\r\nHost: a.example\r\nContent-Length: 67108864\r\n\r\n", 421),
    ("to no such path", b"PUT /nope" + post(b"", length=64 * MIB)[10:], 404),
    ("by another method", b"PUT /sign" + post(b"", length=64 * MIB)[10:], 405),
    ("without a length", b"POST /sign HTTP/1.1\r\nHost: localhost\r\n\r\n", 411),
    ("too large", post(b"", length=1 << 40), 413),
    ("nonsense", b"nonsense\r\n\r\n", 400),
]))  # fmt: skip
def test_an_answer_reaches_a_client_that_sends_all_before_it_reads(
    head: bytes, status: int, front: Front
) -> None:
    with connect(front.path) as s:
        s.sendall(head)
        for _ in range(16):
            s.sendall(bytes(4 * MIB))
        refused(the_one_answer(read_all(s)), status)


def test_a_401_reaches_a_client_that_sends_all_before_it_reads(
    short: Path, token_file: Path, start_unix: Callable[..., Proxy]
) -> None:
    path = short / "proxy"
    args = ("--token-file", token_file)
    start_unix(f"unix:{path}", args=args, upstream=short / "none")
    with connect(path) as s:
        s.sendall(post(b"", length=64 * MIB))
        for _ in range(16):
            s.sendall(bytes(4 * MIB))
        refused(the_one_answer(read_all(s)), 401)


# ================================================================ a client that goes away


@pytest.mark.parametrize("how", ["close", "shutdown", "killed"])
def test_a_client_that_goes_away_ends_the_agents_wait(
    how: str, short: Path, scripted_agent: Callable[..., Path], start_unix: Callable[..., Proxy]
) -> None:
    asked, over = threading.Event(), threading.Event()

    def prompt(connection: socket.socket) -> None:
        """An agent that waits for a touch until nobody waits for it any more."""
        while request := read_message(connection):
            if request[0] == p.SSH_AGENTC_REQUEST_IDENTITIES:
                connection.sendall(message(b"\x05"))
                continue
            asked.set()
            connection.settimeout(20)
            if connection.recv(1) == b"":
                over.set()

    path = short / "proxy"
    proxy = start_unix(f"unix:{path}", upstream=scripted_agent(prompt))
    line = f"SSHSIG-Key: ssh-ed25519 {ED25519}"
    if how == "killed":
        argv = [need("curl", "curl"), *CURL, str(path), "-H", line, "--data-binary", "x"]
        client = subprocess.Popen([*argv, "http://localhost/sign"], stdout=subprocess.DEVNULL)
        assert asked.wait(10)
        assert not over.is_set()
        client.kill()
        client.wait(5)
    else:
        s = connect(path)
        s.sendall(post(b"x", line))
        assert asked.wait(10)
        assert not over.is_set()
        if how == "close":
            s.close()
        else:
            s.shutdown(socket.SHUT_WR)
    # Promised is a second; the bound is for machines that are busy.
    assert over.wait(10)
    assert audited(proxy)["outcome"] == "gone"
    if how == "shutdown":
        assert the_one_answer(read_all(s)).status == 400
        s.close()


# Any 32 bytes are a key (RFC 8709).
ED25519 = "AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"


# ================================================================ many at once


def test_32_clients_are_served_side_by_side(
    front: Front, ssh_keygen: Callable[..., bytes]
) -> None:
    expected = ssh_keygen(b"hello")
    start = threading.Barrier(32)

    def client(_: int) -> List[bytes]:
        start.wait(20)
        return [ask(front.path, post(b"hello")).body for _ in range(4)]

    with ThreadPoolExecutor(32) as pool:
        for bodies in pool.map(client, range(32)):
            assert bodies == 4 * [expected]


@pytest.fixture
def opened() -> Iterator[List[socket.socket]]:
    """Connections that are closed before the proxy ends."""
    sockets: List[socket.socket] = []
    yield sockets
    for s in sockets:
        s.close()


def test_a_flood_of_idle_connections_keeps_nobody_out(
    front: Front, ssh_keygen: Callable[..., bytes], opened: List[socket.socket]
) -> None:
    expected = ssh_keygen(b"hello")
    for _ in range(20):
        opened += [connect(front.path) for _ in range(10)]
        assert ask(front.path, post(b"hello")).body == expected
    # Places are given away in the order in which they were idle.
    wait_for(lambda: len(readable(opened)) >= 200 - 128)
    assert read_all(opened[0]) == b""
    assert opened[-1] not in readable(opened)


def test_a_place_is_taken_from_one_address_for_another(
    short: Path, agent: Agent, keys: Keys, start_unix: Callable[..., Proxy],
    opened: List[socket.socket],
) -> None:  # fmt: skip
    # Those who can only reach the one socket can't lock out those at the other.
    agent.add(keys["ed25519"])
    first, second = short / "first", short / "second"
    start_unix(f"unix:{first}", f"unix:{second}", upstream=agent.sock)
    opened += [connect(first) for _ in range(140)]
    wait_for(lambda: readable(opened), message="all places are taken")
    assert ask(second, post(b"hello")).status == 200


class Gated(NamedTuple):
    path: Path
    proxy: Proxy
    agent: Scripted


@pytest.fixture
def gated(
    short: Path, keys: Keys, scripted_agent: Callable[..., Path], start_unix: Callable[..., Proxy]
) -> Iterator[Gated]:
    """In front of an agent that lets requests to sign wait."""
    scripted = Scripted(keys.line("ed25519"))
    path = short / "proxy"
    proxy = start_unix(f"unix:{path}", upstream=scripted_agent(scripted))
    proxy.wait_log("signing with")
    scripted.asked.clear()
    scripted.gate.clear()
    yield Gated(path, proxy, scripted)
    scripted.gate.set()


def test_where_128_wait_for_the_agent_a_further_one_is_busy(
    gated: Gated, opened: List[socket.socket]
) -> None:
    for _ in range(128):
        opened.append(connect(gated.path))
        opened[-1].sendall(post(b"x"))
    wait_for(lambda: gated.agent.signing == 128, message="all wait for the agent")
    with connect(gated.path) as s:
        busy(read_all(s))  # before it has sent a byte
    with connect(gated.path) as s:
        s.sendall(post(b"x"))
        busy(read_all(s))
    gated.agent.gate.set()
    for s in opened:
        assert the_one_answer(read_all(s)).status == 200
    assert served(gated.path)


# ================================================================ the end


def unread(s: socket.socket) -> int:
    """How much of what S has sent the proxy has not taken yet (unix(7), SIOCOUTQ)."""
    return int(struct.unpack("i", fcntl.ioctl(s, termios.TIOCOUTQ, bytes(4)))[0])


def can_connect(path: Path) -> bool:
    try:
        connect(path).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_what_is_in_flight_is_finished(
    number: int, gated: Gated, opened: List[socket.socket]
) -> None:
    waiting, sending, idle = (connect(gated.path) for _ in range(3))
    opened += [waiting, sending, idle]
    waiting.sendall(post(b"x"))
    sending.sendall(post(b"he", length=5))
    wait_for(lambda: gated.agent.signing == 1)
    # What is read counts as begun; what only waits for an accept is nobody's yet.
    if sys.platform == "linux":
        wait_for(lambda: not unread(sending), message="the second is begun")
    assert served(gated.path)
    os.kill(gated.proxy.pid, number)
    wait_for(lambda: not can_connect(gated.path), message="it stops accepting")
    wait_for(lambda: not gated.path.exists(), message="the socket goes at once")
    assert read_all(idle) == b""
    sending.sendall(b"llo")
    wait_for(lambda: gated.agent.signing == 2)
    assert gated.proxy.process.poll() is None
    gated.agent.gate.set()
    for s in (waiting, sending):
        assert the_one_answer(read_all(s)).status == 200
        s.close()
    assert gated.proxy.process.wait(5) == 0


def test_while_one_drains_the_next_takes_its_path(
    gated: Gated, short: Path, start_unix: Callable[..., Proxy]
) -> None:
    with connect(gated.path) as s:
        s.sendall(post(b"x"))
        wait_for(lambda: gated.agent.signing == 1)
        os.kill(gated.proxy.pid, signal.SIGTERM)
        wait_for(lambda: not gated.path.exists())
        start_unix(f"unix:{gated.path}", upstream=short / "none")
        gated.agent.gate.set()
        assert the_one_answer(read_all(s)).status == 200
    assert gated.proxy.process.wait(5) == 0
    assert served(gated.path)


# ================================================================ curl


def test_curl_is_served_in_all_its_ways(
    front: Front, keys: Keys, short: Path, home: Path, ssh_keygen: Callable[..., bytes]
) -> None:
    def curl(*args: Any, path: str = "/sign", input: Optional[bytes] = None) -> bytes:
        argv = [need("curl", "curl"), *CURL, front.path, "-S", *args, f"http://localhost{path}"]
        return run(argv, env=clean_env(home), input=input).stdout

    assert curl(path="/healthz") == b"ok\n"
    assert curl(path="/publickey") == keys.line("ed25519").encode() + b"\n"
    assert b"HTTP/1.1 200 OK" in curl("-I", path="/healthz")
    file = short / "file"
    for size in (5, 2 * MIB):
        payload = os.urandom(size)
        file.write_bytes(payload)
        expected = ssh_keygen(payload)
        assert curl("--data-binary", f"@{file}") == expected
        assert curl("-X", "POST", "-T", file) == expected
        assert curl("-X", "POST", "-T", "-", input=payload) == expected  # chunked
        assert curl("-H", "Expect: 100-continue", "--data-binary", f"@{file}") == expected
        assert curl("--http1.0", "--data-binary", f"@{file}") == expected
    with file.open("wb") as f:
        f.truncate(64 * MIB)
    for expect in ("Expect:", "Expect: 100-continue"):
        answer = curl("-H", PAGE, "-H", expect, "-w", "%{http_code}", "-X", "POST", "-T", file)
        assert answer.endswith(b"\n403"), answer
