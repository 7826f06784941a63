"""The tests on Windows: what `make test-windows` adds to conftest (pytest --windows=FOLDER).

FOLDER is what contrib/windows/wine.py makes: a real Windows Python, with pytest, and a Wine prefix
of its own. Three kinds of tests run then:

- Those of the files in DRIVEN, as they are: the test itself is Linux's, but each Python that it
  starts (a command whose first word is sys.executable) is the Windows one, so that the proxy is a
  Windows process. Each word of its command line, and each variable, that is the path of a Unix
  socket becomes the name of a pipe that leads to it. What can't hold there is in LEFT_OUT, with
  its reason, and counted at the end.
- Those with the mark `windows`, whatever their file; they run in no other way. All of the above
  holds for them too, so that start_proxy, call and run give them the program on Windows. Those that
  write to the registry or need the screen carry the mark `alone` as well. The fixture `windows` is
  the Lab below:
      windows.wine("msiexec", "/i", path)  any program of Windows', to its end
      windows.env(home)                    the environment that starts one, for a Popen
      windows.path(path)                   a path as a Windows program has to be given it
      windows.pipe(sock)                   the pipe that leads to a Unix socket
      windows.python                       the words that start a Python, before its arguments
- The pure sections' own tests, INSIDE, run there as they stand by the Windows Python's own pytest.

How the program ends is not shown by these: Windows has no SIGTERM, so Proxy.stop() ends it at once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import pytest

DRIVEN = {"test_commands.py", "test_config.py", "test_http.py", "test_policy.py", "test_tokens.py"}
INSIDE = ["test_agent_protocol.py", "test_wire.py"]
LEFT_OUT: Dict[str, List[str]] = {}


class Lab:
    """Where Windows programs run: Wine, with the prefix and the Python of FOLDER."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = ["wine", str(folder / "python" / "python.exe")]
        # The first program of Windows' has Wine start others, which keep what it was given: no
        # test would see the end of its output.
        self._pipes = Pipes(self)

    def env(self, home: Optional[Path] = None, **more: Any) -> Dict[str, str]:
        from conftest import clean_env

        return self.add_to(clean_env(home, **more) if home else dict(os.environ))

    def add_to(self, env: Dict[str, str]) -> Dict[str, str]:
        wine = {
            "WINEPREFIX": str(self.folder / "prefix"),
            "WINEDEBUG": "-all",
            # It has neither .NET nor a browser, and no window is to say so; no menu of Linux is
            # written to.
            "WINEDLLOVERRIDES": "mscoree,mshtml,winemenubuilder.exe=",
            # Where Wine's processes find each other.
            "TMPDIR": str(self.folder / "tmp"),
        }
        return {**env, **wine}

    def wine(self, *argv: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
        from conftest import run

        return run(["wine", *argv], env=options.pop("env", self.env()), **options)

    @staticmethod
    def path(path: Path) -> str:
        return "Z:" + str(path).replace("/", "\\")

    def pipe(self, sock: Any) -> str:
        return self._pipes.leading_to(str(sock))

    def words(self, words: Sequence[Any]) -> List[str]:
        """A command line, or a variable: what names an agent's socket names a pipe there."""
        said = [str(word) for word in words]
        for i, word in enumerate(said):
            if word.startswith("/") and Path(word).is_socket():
                said[i] = self.pipe(word)
            elif word.startswith("/") and "--upstream" in said[:i][-1:]:
                said[i] = "//./pipe/nobody-serves-this"
        return said

    def close(self) -> None:
        self._pipes.close()


class Pipes:
    """Each Unix socket that is asked for as a pipe, by one Windows process (pipes.py)."""

    def __init__(self, lab: Lab) -> None:
        self.names: Dict[str, str] = {}
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        threading.Thread(target=self._accept, daemon=True).start()
        port = str(self.listener.getsockname()[1])
        script = str(Path(__file__).with_name("pipes.py"))
        self.process = subprocess.Popen(
            [*lab.python, script, port],
            env=lab.env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._say("ready")

    def leading_to(self, sock: str) -> str:
        with self.lock:
            for name, path in self.names.items():
                if path == sock:
                    return "//./pipe/" + name
            name = f"test-{secrets.token_hex(8)}"
            self.names[name] = sock
            self._say(f"serve \\\\.\\pipe\\{name}")
            return "//./pipe/" + name

    def _say(self, words: str) -> None:
        """And waits until it is done."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{words}\n".encode())
        self.process.stdin.flush()
        assert self.process.stdout.readline().decode().strip() == words

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
            name = b""
            while not name.endswith(b"\n"):
                name += client.recv(1)
            server.connect(self.names[name.decode().strip().rpartition("\\")[2]])
            threading.Thread(target=copy, args=(client, server), daemon=True).start()
            copy(server, client)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(10)
        self.listener.close()


def copy(source: socket.socket, to: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            to.sendall(data)
    for side in source, to:
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)


def windows_popen(lab: Lab) -> Any:
    """subprocess.Popen, but a Python is the Windows one."""

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, argv: Any, *args: Any, **options: Any) -> None:
            self.on_windows = not isinstance(argv, str) and str(argv[0]) == sys.executable
            self.ended = False
            if self.on_windows:
                argv = [*lab.python, *lab.words(argv[1:])]
                env = dict(options.get("env") or os.environ)
                options["env"] = lab.add_to(dict(zip(env, lab.words([*env.values()]))))
                # A Windows Python does not start where one of these is a regular file, as what
                # pytest captures is.
                for stream in "stdin", "stdout", "stderr":
                    options.setdefault(stream, subprocess.DEVNULL)
            super().__init__(argv, *args, **options)

        def send_signal(self, sig: int) -> None:
            self.ended = self.ended or sig == signal.SIGTERM
            super().send_signal(sig)

        def wait(self, timeout: Optional[float] = None) -> int:
            status = super().wait(timeout)
            return 0 if self.on_windows and self.ended and status == -signal.SIGTERM else status

        def communicate(self, *args: Any, **options: Any) -> Any:
            """What is printed there has other line ends; the log has not."""
            said = super().communicate(*args, **options)
            return tuple(text.replace(b"\r\n", b"\n") if text else text for text in said)

    return Popen


# ---------------------------------------------------------------- what --windows has pytest do

left_out: Dict[str, int] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    names = {item.nodeid.rpartition("/")[2]: item for item in items}
    unwanted = set()
    for reason, tests in LEFT_OUT.items():
        for test in tests:
            found = {name for name in names if name == test or name.startswith(f"{test}[")}
            its_file = [name for name in names if name.startswith(test.partition("::")[0])]
            if its_file and not found and not any("::" in arg for arg in config.args):
                raise pytest.UsageError(f"windows.py leaves out {test}, which is not there")
            left_out[reason] = left_out.get(reason, 0) + len(found)
            unwanted |= found
    for name, item in names.items():
        if not item.get_closest_marker("windows") and item.path.name not in DRIVEN:
            unwanted.add(name)
    items[:] = [item for name, item in names.items() if name not in unwanted]


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = left_out
    elif session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK  # TESTS names others


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """(Each process leaves out the same.)"""
    left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for reason, count in left_out.items():
        terminalreporter.write_line(f"left out on Windows: {count:3} {reason}")


@pytest.fixture(scope="session")
def windows(request: pytest.FixtureRequest) -> Iterator[Lab]:
    lab = Lab(request.config.getoption("windows").resolve())
    yield lab
    lab.close()


@pytest.fixture(scope="session", autouse=True)
def pythons_are_of_windows(windows: Lab) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", windows_popen(windows))
        yield
