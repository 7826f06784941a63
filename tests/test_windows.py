"""The harness of windows.py itself, and what runs inside the Windows Python."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import windows as harness
from conftest import PROXY, ROOT, Agent, clean_env, need, rows, run
from windows import Lab

pytestmark = pytest.mark.windows


def test_the_program_is_a_windows_process() -> None:
    assert run([sys.executable, "-c", "import sys; print(sys.platform)"]).stdout == b"win32\n"


def test_what_needs_no_process_holds_inside_the_windows_python(home: Path) -> None:
    argv = [sys.executable, "-m", "pytest", "-c", "NUL", "--rootdir=.", "--confcutdir=."]
    argv += ["-p", "no:cacheprovider", "-q", *(f"tests/{name}" for name in harness.INSIDE)]
    # (Sources are UTF-8, and their paths may be longer than a line.)
    done = run(argv, env=clean_env(home, PYTHONUTF8="1"), cwd=ROOT, check=False)
    passed = re.search(r"(?m)^(\d+) passed in ", done.stdout.decode())
    assert passed, done.stdout.decode()
    harness.counts["run inside the Windows Python"] = int(passed[1])


# ---------------------------------------------------------------- the Python of the installer

# Every module that the two programs import anywhere, and what Python loads by itself when asked for
# a host's name, a code page, a traceback.
IMPORT_ALL = """
import ast, importlib, sys
wanted = {"encodings.idna", "encodings.cp932", "unicodedata", "tokenize"}
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as f:
        for node in ast.walk(ast.parse(f.read())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                wanted.add(node.module)
missing = []
for name in sorted(wanted - {"ssh_agent_proxy"}):
    try:
        importlib.import_module(name)
    except ImportError:
        missing.append(name)
print(*missing)
print(sys.flags.isolated, sys.flags.dont_write_bytecode, *sys.path, sep="|")
"""


@pytest.fixture(scope="module")
def carried() -> Path:
    """The same folder for all, made once."""
    python = os.path.realpath(sys.executable)
    run([need("make", "make"), "-s", "windows-python", f"PYTHON={python}"], cwd=ROOT, timeout=300)
    return ROOT / "dist" / "windows-python"


def test_the_carried_python_has_what_the_programs_import(
        carried: Path, home: Path, windows: Lab) -> None:  # fmt: skip
    script = home / "import all.py"
    script.write_text(IMPORT_ALL)
    programs = [PROXY, *(ROOT / "contrib" / "windows").glob("*.pyw")]
    env = windows.env(home, PYTHONPATH="/tmp", PYTHONINSPECT="1", PYTHONHOME="/tmp")
    argv = [carried / "pythonw.exe", "-I", "-B", script, *programs]
    said = windows.wine(*argv, env=env).stdout.decode()
    missing, path = said.splitlines()
    assert set(missing.split()) <= {"fcntl", "grp", "pwd", "resource"}  # Linux's
    folder = windows.path(carried)
    assert path == f"1|1|{folder}\\python313.zip|{folder}"


def test_the_carried_python_runs_the_program(
        carried: Path, agent_with_key: Agent, home: Path, windows: Lab) -> None:  # fmt: skip
    before = sorted(carried.iterdir())
    argv = ["check", "--addr", "127.0.0.1:0", "--upstream", windows.pipe(agent_with_key.sock)]
    python = [carried / "pythonw.exe", "-I", "-B"]
    done = windows.wine(*python, PROXY, *argv, env=windows.env(home))
    assert done.stdout.splitlines()[1].startswith(b"ok   it holds ssh-ed25519 "), done
    # Wine takes each policy and has none in force: its word alone is not taken.
    steps = re.findall(rb"(?m)^(.{4}) [^:]*: (.*in force) \((?:GetErrorMode|policy) ", done.stdout)
    assert steps == [(b"ok  ", b"in force"), *3 * [(b"warn", b"not in force")]], done
    assert sorted(carried.iterdir()) == before


def test_its_launcher_is_called_by_our_name(carried: Path) -> None:
    found = "FileDescription\0ssh-agent-proxy\0".encode("utf-16-le")
    assert found in (carried / "pythonw.exe").read_bytes().replace(bytes(4), bytes(2))


EMBEDDABLES = rows([
    ("another name", "python-3.13.11-amd64.exe", {}, "not "),
    ("no archive", "python-3.13.11-embed-amd64.zip", None, "not a zip file"),
    ("another version in it", "python-3.13.10-embed-amd64.zip", {}, "not what its name says"),
    ("no licence", "python-3.13.11-embed-amd64.zip", {"LICENSE.txt": None}, "not what its name"),
    ("a path", "python-3.13.11-embed-amd64.zip", {"../x": b""}, "not what its name says"),
])  # fmt: skip
EMBEDDABLE = {"pythonw.exe": b"MZ", "python313.dll": "3.13.11".encode("utf-16-le"),
              "python313.zip": b"", "python313._pth": b".", "LICENSE.txt": b"PSF"}  # fmt: skip


def embeddable(folder: Path, name: str, changes: Any) -> subprocess.CompletedProcess[bytes]:
    package = folder / name
    if changes is None:
        package.write_bytes(b"no archive")
    else:
        with zipfile.ZipFile(package, "w") as archive:
            for member, content in {**EMBEDDABLE, **changes}.items():
                if content is not None:
                    archive.writestr(member, content)
    script = ROOT / "contrib" / "windows" / "python.py"
    # (By env: it is Linux's Python that runs this.)
    return run(["env", sys.executable, script, folder / "made", package], check=False)


def test_the_embeddable_package_of_python_org_is_taken_as_it_is(tmp_path: Path) -> None:
    done = embeddable(tmp_path, "python-3.13.11-embed-amd64.zip", {})
    assert done.stdout.startswith(b"CPython 3.13.11, SHA-256 "), done
    assert {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()} == EMBEDDABLE


@pytest.mark.parametrize(("name", "changes", "said"), EMBEDDABLES)
def test_what_is_no_embeddable_package_is_refused(
        tmp_path: Path, name: str, changes: Any, said: str) -> None:  # fmt: skip
    done = embeddable(tmp_path, name, changes)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"WINDOWS_PYTHON") and said.encode() in done.stderr
    assert not (tmp_path / "made").exists()
