"""A Windows pipe as the agent under WSL, where Windows PowerShell relays to it.

Neither runs here: a stand-in for PowerShell decodes the very command that it is given.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import types
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from conftest import Agent, Proxy, ask, post, rows, wait_for
from test_service import with_hook
from test_upstream import nothing_is_waited_for_without_end

import ssh_agent_proxy as sap

__all__ = ["nothing_is_waited_for_without_end"]

PIPE = "//./pipe/openssh-ssh-agent"
WSL = {"WSL_DISTRO_NAME": "Debian"}

# ---------------------------------------------------------------- the setting

NAMES = [
    # name, value, the pipe's name
    ("backslashes", r"\\.\pipe\openssh-ssh-agent", "openssh-ssh-agent"),
    ("slashes", "//./pipe/openssh-ssh-agent", "openssh-ssh-agent"),
    ("capitals", r"\\.\PIPE\Agent", "Agent"),
    ("one character", "//./pipe/x", "x"),
    ("247 characters", "//./pipe/" + "x" * 247, "x" * 247),
    ("all that is printable", "//./pipe/ !#$%&()*+,-.09:;<=>?@AZ[]^_`az{|}~",
     " !#$%&()*+,-.09:;<=>?@AZ[]^_`az{|}~"),
]  # fmt: skip

WRONG = [
    ("no name", "//./pipe/"),
    ("248 characters", "//./pipe/" + "x" * 248),
    ("a slash in it", "//./pipe/a/b"),
    ("a backslash in it", "\\\\.\\pipe\\a\\b"),
    ("a quote", "//./pipe/it's"),
    ("a double quote", '//./pipe/"x"'),
    ("another quote to PowerShell", "//./pipe/it\u2019s"),
    ("a control character", "//./pipe/a\x1b[31m"),
    ("a line break", "//./pipe/a\n"),
    ("not ASCII", "//./pipe/é"),
    ("a letter whose capital is an I", "//./p\u0131pe/x"),
    ("another machine's", r"\\host\pipe\x"),
    ("another machine's, with slashes", "//host/pipe/x"),
    ("another machine's, in capitals", "//HOST/PIPE/x"),
    ("its backslashes eaten", r"\.pipeopenssh-ssh-agent"),
    ("every second one eaten", r"\.\pipe\openssh-ssh-agent"),
    ("eaten twice", ".pipeopenssh-ssh-agent"),
]


@pytest.mark.parametrize("value, name", rows(NAMES))
def test_a_pipe_of_this_machine_is_taken_in_both_spellings(value: str, name: str) -> None:
    upstream = sap.parse_upstream(value, WSL)
    assert upstream.path == "//./pipe/" + name
    assert upstream.command  # by which Landlock is known not to be in force


@pytest.mark.parametrize("value", rows(WRONG))
def test_what_is_no_pipe_of_this_machine_is_refused_with_the_spelling_to_use(value: str) -> None:
    for env in WSL, {}:
        with pytest.raises(sap.ConfigError) as e:
            sap.parse_upstream(value, env)
        assert str(e.value).isprintable()
        assert "//./pipe/NAME" in str(e.value)
        assert not value.isascii() or not value.isprintable() or f"'{value}'"[:200] in str(e.value)


@pytest.mark.parametrize("release, name, there", rows([
    ("WSL2", "5.15.167.4-microsoft-standard-WSL2", "", True),
    ("WSL1", "4.4.0-19041-Microsoft", "", True),
    ("WSL with a kernel of its own", "6.6.1", "Debian", True),
    ("not WSL", "6.1.0-18-amd64", "", False),
]))  # fmt: skip
@pytest.mark.parametrize("value", [PIPE, PIPE.replace("/", "\\")])
def test_a_pipe_is_for_wsl_known_by_its_kernel_or_its_variable(
    monkeypatch: pytest.MonkeyPatch, release: str, name: str, there: bool, value: str
) -> None:
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(release=release))
    no = pytest.raises(sap.ConfigError, match=re.escape(f"'{value}' is a pipe of Windows'"))
    with contextlib.nullcontext() if there else no:
        assert sap.parse_upstream(value, {"WSL_DISTRO_NAME": name}).path == PIPE


# ---------------------------------------------------------------- where PowerShell is

MOUNT_TABLES = [
    ("nothing", "", []),
    ("usual", "C:\\134 /mnt/c 9p rw,dirsync,aname=drvfs 0 0\n", ["/mnt/c"]),
    ("each kind", "a /a 9p rw 0 0\nb /b drvfs rw 0 0\nc /c virtiofs rw 0 0\n", ["/a", "/b", "/c"]),
    ("others", "a /9p ext4 rw 0 0\n9p /b tmpfs 9p 0 0\nx /c 9p2000 rw 0 0\n", []),
    ("escapes", "a /my\\040drive\\134\\011\\012x 9p rw 0 0\n", ["/my drive\\\t\nx"]),
    ("a line in a name", "a /a\x0bb\x85\u2028c 9p rw 0 0\n", ["/a\x0bb\x85\u2028c"]),
    ("short lines", "\n \n9p\na 9p\na /b 9p\n", ["/b"]),
    ("no escapes", "a /a\\9\\777\\04 9p rw 0 0", ["/a\\9\\777\\04"]),
]


@pytest.mark.parametrize("table, drives", rows(MOUNT_TABLES))
def test_windows_drives_are_found_in_the_mount_table(table: str, drives: List[str]) -> None:
    found = [program.partition("/Windows/System32/")[0] for program in sap.powershells(table)]
    assert found == ["/mnt/c", *drives]


# ---------------------------------------------------------------- what PowerShell says

CLIXML = (
    '#< CLIXML\r\n<Objs Version="1.1.0.1" '
    'xmlns="http://schemas.microsoft.com/powershell/2004/04"><Obj S="progress" RefId="0">'
    '<TN RefId="0"><T>System.Object</T></TN><MS><I64 N="SourceId">1</I64><PR N="Record">'
    "<AV>Preparing modules for first use.</AV></PR></MS></Obj>{}</Objs>"
)
BLOCKED = (
    '<S S="Error">Cannot invoke method. Method invocation is supported only _x000D__x000A_</S>'
    '<S S="Error">on core types in this language mode: &lt;x&gt; &amp;amp;_x000D__x000A_</S>'
)
ERROR = "Cannot invoke method. Method invocation is supported only on core types in this language"
CUT = CLIXML.partition("{}")[0] + '<S S="Error">b'


@pytest.mark.parametrize("said, words", rows([
    ("nothing", b"", ""),
    ("a line", b"Access is denied.\r\n", "Access is denied."),
    ("lines", b"a\r\nb\n\n  c", "a b c"),
    ("not UTF-8", b"Zugriff verweigert \x81ber", r"Zugriff verweigert \x81ber"),
    ("CLIXML without an error", CLIXML.format("").encode(), ""),
    ("CLIXML", CLIXML.format(BLOCKED).encode(), ERROR + " mode: <x> &amp;"),
    ("CLIXML behind words, and cut", b"a\n" + CUT.encode(), "a b"),
    ("an escape sequence", CLIXML.format('<S S="Error">_x001B_[31m_xD800_</S>').encode(),
     "\x1b[31m\ud800"),
    ("a bomb", b"#< CLIXML" + 1000 * b'<S S="Error">', ""),
]))  # fmt: skip
def test_what_powershell_complains_of_is_one_line(said: bytes, words: str) -> None:
    assert sap.plain_words(said) == words


def test_the_script_is_ascii_and_writes_nothing_but_what_it_relays() -> None:
    script = sap._RELAY
    assert script.isascii()
    assert script.count("NAME") == 1 and "'NAME'" in script
    assert script.index("try {") < script.index("::new(")  # whatever fails is caught
    for opening, closing in "{}", "()", "[]", "''":
        assert script.count(opening) == script.count(closing)
    # What a line's value would be is written to stdout: each is kept, or there is none.
    void = (".Connect(500)", ".Wait()", ".WriteLine($why.Message)", "'Identification')")
    for line in map(str.strip, script.splitlines()):
        assert "(" not in line or "=" in line or line.startswith("if ") or line.endswith(void)


# ---------------------------------------------------------------- a stand-in for PowerShell

# Beside it stand the sockets that the pipes' names lead to. TROUBLE is what it does instead.
STAND_IN = """#!{python} -IS
import base64, os, re, signal, socket, sys, threading, time
here = {here!r}
open(here + "/pids", "a").write("%d\\n" % os.getpid())
open(here + "/interop", "a").write(os.environ.get("WSL_INTEROP", "none") + "\\n")
*options, command = sys.argv[1:]
script = base64.b64decode(command, validate=True).decode("utf-16-le")
found = re.search(r"::new\\(\\s*'\\.', '([^']+)', 'InOut', 'Asynchronous', '(\\w+)'\\)", script)
if options != "-NoProfile -NonInteractive -InputFormat None -EncodedCommand".split():
    sys.exit("wrong options: %r" % options)
if not os.path.samefile(".", os.path.dirname(__file__)):
    sys.exit("wrong folder")
if not found or found[2] != "Identification" or "SilentlyContinue" not in script:
    sys.exit("wrong script")
exec(os.environ.get("TROUBLE", ""))
with socket.socket(socket.AF_UNIX) as s:
    try:
        s.connect(here + "/" + found[1])
    except FileNotFoundError:
        os.write(2, b"The operation has timed out.\\r\\n")
        sys.exit(2)
    def down():
        while data := s.recv(65536):
            os.write(1, data)
        os._exit(0)
    threading.Thread(target=down, daemon=True).start()
    while data := os.read(0, 65536):
        s.sendall(data)
"""


class Windows:
    """A drive of Windows' with a stand-in for PowerShell, on a mount that is not /mnt/c."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in "pids", "interop":
            (folder / name).touch()
        self.powershell = folder / "the c drive" / sap.POWERSHELL
        self.powershell.parent.mkdir(parents=True)
        self.powershell.write_text(STAND_IN.format(python=sys.executable, here=str(folder)))
        self.powershell.chmod(0o755)
        self.mounts = folder / "mounts"
        self.mounts.write_text(f"/dev/x / ext4 rw 0 0\nC: {folder}/the\\040c\\040drive 9p rw 0 0\n")

    def serve(self, agent: Path, pipe: str = PIPE) -> None:
        (self.folder / pipe[len("//./pipe/") :]).symlink_to(agent)

    def noted(self, name: str) -> List[str]:
        return (self.folder / name).read_text().splitlines()

    def left(self) -> List[str]:
        return [pid for pid in self.noted("pids") if Path(f"/proc/{pid}").exists()]


@pytest.fixture
def windows(short: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Windows]:
    made = Windows(short)
    monkeypatch.setattr(sap, "MOUNTS", str(made.mounts))
    monkeypatch.setattr(sap, "DRIVE", str(short / "nowhere"))
    yield made
    for pid in made.noted("pids"):  # where the program did not, the test has said so
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def listed(value: str = PIPE, timeout: float = 20, client: Any = None, **env: str) -> List[str]:
    """The comments of the keys that the agent lists."""
    upstream = sap.parse_upstream(value, {**os.environ, **WSL, **env})
    with sap.Agents(upstream, (), timeout).exchange(client) as exchange:
        return [key.comment for key in sap.list_keys(exchange)]


def refusal(kind: type, *args: Any, **env: Any) -> str:
    with pytest.raises(kind) as e:
        listed(*args, **env)
    assert type(e.value) is kind
    assert str(e.value).isprintable()
    return str(e.value)


@pytest.mark.parametrize("value", [PIPE, r"\\.\pipe\openssh-ssh-agent", r"\\.\pipe\a $(b) & c"])
def test_an_agent_behind_a_pipe_is_asked_by_a_process_of_its_own_each_time(
        windows: Windows, agent_with_key: Agent, value: str) -> None:  # fmt: skip
    windows.serve(agent_with_key.sock, value.replace("\\", "/"))
    assert listed(value) == listed(value) == ["ed25519@test"]
    assert len(windows.noted("pids")) == 2
    assert windows.left() == []


def test_a_session_s_interop_is_handed_on_only_where_something_accepts_there(
        windows: Windows, agent_with_key: Agent, short: Path) -> None:  # fmt: skip
    windows.serve(agent_with_key.sock)
    dead, live = str(short / "dead_interop"), str(short / "live_interop")
    with socket.socket(socket.AF_UNIX) as ended:
        ended.bind(dead)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(live)
        listener.listen()
        for interop in (dead, live, str(short / "gone"), "x" * 200, ""):
            assert listed(WSL_INTEROP=interop) == ["ed25519@test"]
    assert windows.noted("interop") == ["none", live, "none", "none", "none"]


HANG = "time.sleep(1000)"
SAYS = "os.write(2, {!r}); sys.exit({})"
WORDS = "; its words are in the proxy's log"
NO_ANSWER = "no answer from the agent at '//./pipe/openssh-ssh-agent': "
IT = "the Windows PowerShell for '//./pipe/openssh-ssh-agent' "
ENDED = IT + "ended with exit status 1 without an answer"

TROUBLE = [
    # name, what it does, error, the error's words, the log's
    ("no pipe", "", sap.AgentError, NO_ANSWER + "no such pipe (Windows' own agent is started by",
     "The operation has timed out."),
    ("access denied", SAYS.format(b"Access to the path is denied.\r\n", 5), sap.AgentError,
     NO_ANSWER + "access denied (", "Access to the path is denied."),
    ("another error", SAYS.format(b"Pipe hasn't been\r\n connected.\r\n", 1), sap.AgentError,
     ENDED + WORDS, "Pipe hasn't been connected."),
    ("a policy", SAYS.format(CLIXML.format(13000 * " " + BLOCKED).encode(), 1), sap.AgentError,
     ENDED + WORDS, ERROR),
    ("words without end", SAYS.format(b"x" * 60000, 1), sap.AgentError, ENDED + WORDS, "xxx"),
    ("not a word", "sys.exit(1)", sap.AgentError, ENDED, ""),
    ("a unit without AF_VSOCK",
     SAYS.format(b"<3>WSL (8 - ) ERROR: UtilBindVsockAnyPort:309: socket failed 97\n", 1),
     sap.AgentError, "WSL needs AF_VSOCK, which RestrictAddressFamilies=", "<3>WSL (8 - ) ERROR"),
    ("it dies", "os.kill(os.getpid(), 9)", sap.AgentError, IT + "was ended by signal 9", ""),
    ("words on stdout", "os.write(1, b'Windows PowerShell'); " + HANG, sap.WireError,
     IT + "announced a message of 1466527332 bytes", ""),
    ("it hangs, and ignores SIGTERM", "signal.signal(15, signal.SIG_IGN); " + HANG,
     sap.AgentTimeout, IT + "did not answer in time", ""),
]  # fmt: skip


@pytest.mark.parametrize("trouble, kind, words, log", rows(TROUBLE))
def test_trouble_is_told_in_one_line_each_and_ended(
        windows: Windows, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
        trouble: str, kind: type, words: str, log: str) -> None:  # fmt: skip
    caplog.set_level(logging.WARNING)
    if kind is not sap.AgentTimeout:
        monkeypatch.setattr(sap, "EXEC_GRACE", 10)  # a busy machine is slow at ending it
    timeout = 1 if kind is sap.AgentTimeout else 20
    assert words in refusal(kind, PIPE, timeout, TROUBLE=trouble)
    said = [record.getMessage() for record in caplog.records]
    prefix = "Windows PowerShell for '//./pipe/openssh-ssh-agent': "
    assert len(said) == bool(log)
    assert all(line.startswith(prefix + log) and len(line) < 1100 for line in said)
    assert windows.left() == []


def test_a_client_that_goes_away_takes_it_with_it(windows: Windows) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        leaving = threading.Thread(
            target=lambda: (wait_for(lambda: windows.noted("pids")), theirs.close())
        )
        leaving.start()
        refusal(sap.ClientGone, PIPE, 30, ours, TROUBLE=HANG)
        leaving.join()
    assert windows.left() == []


def test_interop_that_is_off_is_told_with_what_turns_it_on(windows: Windows) -> None:
    windows.powershell.write_bytes(b"\0\0")  # a program of no kind that the kernel knows
    told = refusal(sap.AgentError)
    assert told.startswith("WSL starts no Windows programs (interop is off)")
    assert ":WSLInterop:M::MZ::/init:PF" in told


def test_a_powershell_that_cannot_be_run_or_found_is_told(windows: Windows) -> None:
    windows.powershell.chmod(0o600)
    assert refusal(sap.AgentError) == f"cannot run {IT[:-1]}: Permission denied"
    windows.powershell.unlink()
    told = refusal(sap.AgentError)
    assert told.startswith("no Windows drive with PowerShell is mounted (tried: ")
    assert str(windows.powershell) in told


# ---------------------------------------------------------------- the program


def test_the_proxy_signs_by_windows_agent_and_says_what_guards_it(
    windows: Windows, agent_with_key: Agent, start_proxy: Callable[..., Proxy]
) -> None:
    python = with_hook(f"p.DRIVE, p.MOUNTS = '/nowhere', {str(windows.mounts)!r}")
    proxy = start_proxy(upstream=PIPE, python=python, env=WSL)
    proxy.wait_log("/sign can't work yet: " + NO_ANSWER.replace("(", r"\("))
    windows.serve(agent_with_key.sock)
    assert b"BEGIN SSH SIGNATURE" in ask(proxy.port, post(b"payload")).body
    assert proxy.lines("using the Windows PowerShell for '//./pipe/openssh-ssh-agent'")
    assert proxy.lines("Landlock: not in force (SSH_AGENT_PROXY_UPSTREAM runs a program)")
