r"""The tests on Windows: what `make test-windows` adds to conftest (pytest --windows=FOLDER).

FOLDER is what contrib/windows/wine.py makes: a real Windows Python, with pytest, and a Wine prefix
of its own. Three kinds of tests run then:

- Those of the files in DRIVEN, as they are: the test itself is Linux's, but each Python that it
  starts (a command whose first word is sys.executable) is the Windows one, so that the proxy is a
  Windows process. Each word of its command line, and each variable, that is the path of a Unix
  socket becomes the name of a pipe that leads to it. What can't hold there is in LEFT_OUT, with
  its reason, and counted at the end.
- Those with the mark `windows`, whatever their file; they run in no other way. All of the above
  holds for them too, so that start_proxy, call and run give them the program on Windows. Those that
  write to the registry or need the screen carry the mark `alone` as well, and are run by --screen,
  in one process. The fixture `windows` is the Lab below:
      windows.screen()                     a screen, met by a new Wine, as long as it is entered
      windows.wine("msiexec", "/i", path)  any program of Windows', to its end
      windows.registry(r"HKCU\...")        what a key and those below it hold, as text
      windows.env(home)                    the environment that starts one, for a Popen
      windows.path(path)                   a path as a Windows program has to be given it
      windows.pipe(sock)                   the pipe that leads to a Unix socket
      windows.python                       the words that start a Python, before its arguments
- What the files in INSIDE test without a process of its own (the pure sections, tables of bytes),
  as it stands, by the Windows Python's own pytest (test_windows.py).

How the program ends is not shown by these: Windows has no SIGTERM, so Proxy.stop() ends it at once.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import pytest

DRIVEN = {"test_check.py", "test_commands.py", "test_config.py", "test_http.py", "test_policy.py",
          "test_tokens.py"}  # fmt: skip
INSIDE = ["test_agent_protocol.py", "test_audit.py", "test_check.py", "test_config.py",
          "test_http.py", "test_payload.py", "test_policy.py", "test_sshsig.py", "test_tokens.py",
          "test_wire.py"]  # fmt: skip
# Whoever asks for one of these needs what Linux alone has here: ssh-keygen, sockets, folders.
LINUX_ALONE = {"keys", "short"}

# What can't hold on Windows, by the reason: a test, or with a * all whose names begin so.
LEFT_OUT: Dict[str, List[str]] = {
    "a Unix socket as an address, or as the agent": [
        "test_check.py::test_an_agent_with_a_key_is_told_to_the_letter_and_exit_0",
        "test_check.py::test_the_proxy_that_runs_there_already_is_known_and_not_disturbed",
        "test_commands.py::test_a_busy_port_is_named_and_no_other_address_listened_on",
        "test_commands.py::test_quiet_keeps_warnings_and_audit_lines_only",
        "test_commands.py::test_without_an_agent_it_starts_and_says_what_was_looked_for_until*",
        "test_config.py::test_a_socket_that_lets_others_in_needs_tokens",
        "test_config.py::test_a_variable_and_its_option_set_the_same[ADDR-unix*",
        "test_config.py::test_a_variable_and_its_option_set_the_same[UPSTREAM-*",
        "test_config.py::test_a_wrong_setting_is_named[ADDR-unix*",
        "test_config.py::test_a_wrong_setting_is_named[UPSTREAM-*",
        "test_config.py::test_an_empty_variable_counts_as_unset",
        "test_config.py::test_defaults",
        "test_config.py::test_paths_are_expanded",
        "test_config.py::test_ssh_auth_sock_is_the_agent_unless_one_is_set",
        "test_config.py::test_the_well_known_sockets_stand_in_the_home_and_the_runtime_directory",
        "test_config.py::test_without_unix_sockets_there_is_no_address_of_one",
        "test_tokens.py::test_with_a_file_that_can_not_be_used_it_does_not_start",
    ],
    "exec: and CONFIRM": [
        "test_check.py::test_an_agent_behind_a_command_is_told_and_signs_and_keeps_landlock_out",
        "test_config.py::test_a_wrong_setting_is_named[CONFIRM-*",
        "test_config.py::test_a_yes_is_kept_only_where_there_is_someone_to_ask",
        "test_config.py::test_an_askpass_program_may_stand_on_the_path_or_in_the_home",
    ],
    "modes of files": [
        "test_tokens.py::test_a_file_that_can_not_be_used_any_more_closes_the_door_until_it_can",
        "test_tokens.py::test_a_token_is_made_and_printed_alone_and_a_second_differs",
        "test_tokens.py::test_nothing_is_added_to_a_file_that_can_not_be_used[of mode*",
    ],
    "signals, and limits of a process": [
        "test_http.py::test_a_signal_ends_it_and_what_is_in_flight_is_finished",
        "test_tokens.py::test_a_token_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was",
    ],
    "hardening that is Linux's, its way to the system, its home": [
        "test_check.py::test_each_step_is_a_line_and_in_force_as_it_is_in_serve",
        "test_commands.py::test_an_address_beyond_loopback_is_listened_on_though_it_comes_later*",
        "test_tokens.py::test_what_stands_in_the_file_stays",
    ],
    "a locale, and text that is none, as Linux has them": [
        "test_commands.py::test_no_locale_gives_a_traceback",
    ],
    "a wait for a lock, which Wine gives up after 10 ms, and Windows after 10 s": [
        "test_tokens.py::test_tokens_added_at_once_are_all_there",
    ],
    "ssh-keygen, which Wine has not": [
        "test_check.py::test_a_signature_of_each_type_is_verified",
        "test_check.py::test_a_wrong_signature_is_exit_1_and_none_is_asked_for_without_sign",
        "test_check.py::test_without_ssh_keygen_and_systemctl_it_is_made_and_not_verified",
    ],
}


def name_of(item: pytest.Item) -> str:
    return item.nodeid.rpartition("tests/")[2]


def left_out(items: List[pytest.Item]) -> Dict[Tuple[str, str], Set[str]]:
    """The names that each pattern of LEFT_OUT leaves out, by its reason and itself."""
    found = {}
    for reason, patterns in LEFT_OUT.items():
        for pattern in patterns:
            words = ".*".join(map(re.escape, pattern.split("*"))) + r"(\[.*\])?"
            matches = re.compile(words, re.DOTALL).fullmatch
            found[reason, pattern] = set(filter(matches, map(name_of, items)))
    return found


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
        return {
            **env,
            "WINEPREFIX": str(self.folder / "prefix"),
            "WINEDEBUG": "-all",
            # It has neither .NET nor a browser, and no window is to say so; no menu of Linux is
            # written to.
            "WINEDLLOVERRIDES": "mscoree,mshtml,winemenubuilder.exe=",
            # Where Wine's processes find each other.
            "TMPDIR": str(self.folder / "tmp"),
        }

    def wine(self, *argv: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
        from conftest import run

        return run(["wine", *argv], env=options.pop("env", self.env()), **options)

    def registry(self, key: str) -> str:
        query = ["reg", "query", key, "/s"]
        return self.wine(*query, check=False, input=b"").stdout.decode(errors="replace")

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

    def end(self) -> None:
        """Of whatever runs."""
        self._pipes.close()
        subprocess.run(["wineserver", "-k"], env=self.env(), check=False)
        subprocess.run(["wineserver", "-w"], env=self.env(), check=True, timeout=30)

    @contextlib.contextmanager
    def screen(self) -> Iterator[str]:
        """Its DISPLAY. Wine's desktop stays on the screen that it was first shown on, even once
        that is gone: each has a Wine of its own."""
        from conftest import need

        argv = [need("Xvfb", "xvfb"), "-displayfd", "1", "-screen", "0", "1280x1024x24", "-noreset"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(argv, **options) as screen:
            try:
                display = f":{screen.stdout.readline().decode().strip()}"
                self.end()
                self._pipes = Pipes(self)
                yield display
            finally:
                self.end()
                screen.terminate()

    def close(self) -> None:
        self._pipes.close()


class Pipes:
    """Each Unix socket that is asked for as a pipe, by one Windows process (pipes.py)."""

    def __init__(self, lab: Lab) -> None:
        self.served: Set[str] = set()
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
        """(A pipe's name has no slash in it, and a socket's here no exclamation mark.)"""
        name = sock.replace("/", "!")
        with self.lock:
            if name not in self.served:
                self._say(f"serve \\\\.\\pipe\\{name}")
                self.served.add(name)
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
                name += client.recv(1) or b"\n"  # it ended before it had said a name
            server.connect(name.decode().strip().rpartition("\\")[2].replace("!", "/"))
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

# What is said at the end.
counts: Dict[str, int] = {}


def inside(items: List[pytest.Item]) -> List[pytest.Item]:
    """Those that run in the Windows Python itself."""
    unwanted = set().union(*left_out(items).values())
    return [item for item in items if name_of(item) not in unwanted and not is_of_linux(item)]


def has_mark(item: pytest.Item, name: str) -> bool:
    return item.get_closest_marker(name) is not None


def is_of_linux(item: pytest.Item) -> bool:
    fixtures = getattr(item, "fixturenames", ())
    return has_mark(item, "skipif") or not LINUX_ALONE.isdisjoint(fixtures)


def is_driven(item: pytest.Item) -> bool:
    return has_mark(item, "windows") or (item.path.name in DRIVEN and is_of_linux(item))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    files = {item.path.name for item in items}
    unwanted: Set[str] = set()
    for (reason, pattern), found in left_out(items).items():
        of_file = pattern.partition("::")[0] in files
        if of_file and not found and not any("::" in arg for arg in config.args):
            counts[f"left out, and not there: {pattern}"] = 0
        counts[f"left out: {reason}"] = counts.get(f"left out: {reason}", 0) + len(found)
        unwanted |= found
    # Each test with a screen has a Wine begun anew, which leaves no room for another's.
    screen = config.getoption("screen")
    wanted = (item for item in items if is_driven(item) and name_of(item) not in unwanted)
    items[:] = [item for item in wanted if has_mark(item, "alone") == screen]


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["windows"] = counts
    elif any(what.startswith("left out, and not there") for what in counts):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    elif session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK  # TESTS names others


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """(Each process leaves out the same.)"""
    counts.update(getattr(node, "workeroutput", {}).get("windows", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for what, count in counts.items():
        terminalreporter.write_line(f"on Windows: {count:4} {what}")


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
