"""The shim under Git for Windows, of which nothing runs here: a stand-in rewrites as MSYS2 does.

There sh, cat and mv are MSYS2's, and know /c/Users and C:/Users alike; git and curl are Windows'
own, and know C:/Users alone. Here ./C: is a link to /, so that both spellings name the same file.
"""

import os
from pathlib import Path
from typing import Dict, List

import pytest
from conftest import SHIM, Keys, clean_env, need, rows, run
from test_shim import COMMIT, TOKENS, URL, Served, Shim, guarded, on, said, served, shim, tree

__all__ = ["guarded", "served", "shim"]  # fixtures

SHELLS = [on("dash"), on("bash"), on("busybox")]  # (bash is what runs there)

# /x, alone or behind = in a word, becomes C:/msys64/x, unless that is forbidden; and to such a
# program no path is known that begins with a slash.
CURL = """#!/bin/sh
for word; do
    shift
    case ${MSYS_NO_PATHCONV:+no}${MSYS2_ARG_CONV_EXCL:-}:$word in
    :/*) word=C:/msys64$word ;;
    :--*=/*) word=${word%%=*}=C:/msys64${word#*=} ;;
    esac
    case $word in
    /*) word=/no/such$word ;;
    [A-Za-z]:[\\\\/]*) word=$(printf '%s' "${word#??}" | tr '\\\\' /) ;;
    esac
    set -- "$@" "$word"
done
exec REAL "$@"
"""
CYGPATH = """#!/bin/sh
[ "$1 $2 $#" = '-m -- 3' ] || exit 64
echo "$3" >>"$CYGPATH_LOG"
printf '%s\\n' "C:$3"
"""


class Windows:
    """What Git Bash sets and has on its path."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "windows"
        self.bin.mkdir()
        self.log = self.bin / "log"
        self.log.touch()
        self.program("curl", CURL.replace("REAL", need("curl", "curl")))
        self.program("cygpath", CYGPATH)
        path = f"{self.bin}:{os.environ['PATH']}"
        self.env = {"MSYSTEM": "MINGW64", "PATH": path, "CYGPATH_LOG": str(self.log)}

    def program(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def asked(self) -> List[str]:
        """The paths for which a program was started to spell them."""
        return self.log.read_text().splitlines()


@pytest.fixture
def windows(short: Path) -> Windows:
    return Windows(short)


@pytest.fixture
def env(windows: Windows, served: Served, shim: Shim) -> Dict[str, str]:
    (shim.folder / "C:").symlink_to("/")
    return {**served, **windows.env}


# ---------------------------------------------------------------- what is signed


@pytest.mark.parametrize("shim", SHELLS, indirect=True)
# How FILE is spelled, and whether a program has to be started for it.
@pytest.mark.parametrize("spelled, started", rows([
    ("as git does", "C:FOLDER/.git_signing_buffer_tmpAb3dEf", False),
    ("as a person does", "C:FOLDER/a b", False),
    ("as sh does", "FOLDER/m", True),
    ("not in whole", "m", False),
]))  # fmt: skip
@pytest.mark.parametrize("forbidden", ["", "MSYS_NO_PATHCONV", "MSYS2_ARG_CONV_EXCL"])
def test_a_file_is_signed_however_its_path_is_spelled(
    shim: Shim, env: Dict[str, str], windows: Windows, spelled: str, started: bool, forbidden: str
) -> None:
    path = shim.file(spelled.rpartition("/")[2])
    told = spelled.replace("FOLDER", str(shim.folder))
    done = shim.sign(told, env={**env, **({forbidden: "*"} if forbidden else {})})
    assert (done.returncode, done.stderr) == (0, b"")
    assert shim.signature(path.name).startswith(b"-----BEGIN SSH SIGNATURE-----\n")
    assert set(windows.asked()) == ({str(path)} if started else set())


@pytest.mark.parametrize("shim", SHELLS, indirect=True)
def test_standard_input_is_signed(shim: Shim, env: Dict[str, str], windows: Windows) -> None:
    done = shim.sign(input=COMMIT, env={**env, "SSH_AGENT_PROXY_TOKEN": ""})
    assert done.stdout.startswith(b"-----BEGIN SSH SIGNATURE-----\n"), done
    assert windows.asked() == [shim.env["TMPDIR"]]


def test_a_path_with_backslashes_is_asked_about(
        shim: Shim, env: Dict[str, str], windows: Windows) -> None:  # fmt: skip
    """(What it is to be spelled like only cygpath knows, and here there is no such file.)"""
    assert "cannot be signed" in said(shim.sign("C:\\Users\\m", env=env))
    assert windows.asked() == ["C:\\Users\\m"]


# ---------------------------------------------------------------- keys, tokens and URLs


@pytest.mark.parametrize("shim", SHELLS, indirect=True)
# As Windows' programs write them: Notepad, PowerShell 5.1's > and Out-File -Encoding utf8.
@pytest.mark.parametrize("encoding, mark", rows([
    ("lines of Windows", "utf-8", ""),
    ("UTF-8 with a mark", "utf-8", "\ufeff"),
    ("UTF-16", "utf-16-le", "\ufeff"),
]))  # fmt: skip
def test_a_file_that_a_program_of_windows_wrote_is_read(
    shim: Shim, guarded: Served, keys: Keys, windows: Windows, encoding: str, mark: str
) -> None:
    def text(*lines: str) -> bytes:
        return (mark + "".join(f"{line}\r\n" for line in lines)).encode(encoding)

    shim.file("k", text("# mine", keys.line("ed25519") + " me"))
    shim.file("bare", text(keys.line("ed25519")))
    shim.file("t", text(TOKENS["file"]))
    env = {**guarded, **windows.env, "SSH_AGENT_PROXY_TOKEN_FILE": "t"}
    for key in ("k", "bare"):
        done = shim.sign("-f", key, "m", env=env)
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_url_that_an_editor_of_windows_wrote_is_read(shim: Shim, env: Dict[str, str]) -> None:
    note = Path(shim.env["HOME"]) / ".config/ssh-agent-proxy/url"
    note.parent.mkdir(parents=True)
    note.write_bytes(env.pop(URL).encode() + b"\r\n")
    assert shim.sign("m", env=env).returncode == 0


def test_a_key_that_is_not_there_is_fetched_to_a_path_of_windows(
        shim: Shim, env: Dict[str, str], windows: Windows) -> None:  # fmt: skip
    (shim.folder / "C:").unlink()
    (shim.folder / "C:").mkdir()
    assert shim.sign("-f", "C:/Users/me/.ssh/id", "m", env=env).returncode == 0
    assert b" AAAA" in tree(shim.folder)["C:/Users/me/.ssh/id.pub"]
    assert windows.asked() == []


def test_elsewhere_that_is_no_whole_path(shim: Shim, served: Served) -> None:
    """The settings of a Windows host come into a container with its .gitconfig."""
    text = said(shim.sign("-f", "C:/Users/me/.ssh/id.pub", "m", env=served))
    assert "C:/Users/me/.ssh/id.pub, which is no public key" in text
    assert shim.files() == ["m"]


def test_a_socket_is_refused_with_a_word(shim: Shim, windows: Windows) -> None:
    text = said(shim.sign("m", env={**windows.env, URL: "unix:/x"}))
    assert "unix:/PATH (not on Windows" in text


# ---------------------------------------------------------------- setup


def test_setup_writes_paths_that_git_can_run_and_read(
        short: Path, home: Path, served: Served, windows: Windows) -> None:  # fmt: skip
    """The proof fails here: git itself, being Linux's, looks for C:/ in its own folder."""
    (short / "C:").symlink_to("/")
    program = windows.bin / "ssh-agent-proxy-sign"
    program.symlink_to(SHIM)
    (home / ".gitconfig").write_text("[user]\n\tname = Me\n\temail = me@example.com\n")
    cygpath = CYGPATH.replace('"C:$3"', '"$(case $3 in *tmp) ;; *) printf C: ;; esac)$3"')
    windows.program("cygpath", cygpath)
    env = {**clean_env(home), **served, **windows.env, "HOME": str(home)}
    done = run(["dash", str(program), "setup"], env=env, cwd=short, check=False)
    written = (home / ".config/ssh-agent-proxy/gitconfig").read_text()
    assert f"program = C:{program}\n" in written, done
    assert f"defaultKeyCommand = 'C:{program}' key\n" in written
    assert f"allowedSignersFile = C:{home}/.config/ssh-agent-proxy/allowed_signers" in written
