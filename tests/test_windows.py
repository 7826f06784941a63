"""The harness of windows.py itself, and what runs inside the Windows Python."""

import re
import sys
from pathlib import Path

import pytest
import windows
from conftest import ROOT, clean_env, run

pytestmark = pytest.mark.windows


def test_the_program_is_a_windows_process() -> None:
    assert run([sys.executable, "-c", "import sys; print(sys.platform)"]).stdout == b"win32\n"


def test_what_needs_no_process_holds_inside_the_windows_python(home: Path) -> None:
    argv = [sys.executable, "-m", "pytest", "-c", "NUL", "--rootdir=.", "--confcutdir=."]
    argv += ["-p", "no:cacheprovider", "-q", *(f"tests/{name}" for name in windows.INSIDE)]
    # (Sources are UTF-8, and their paths may be longer than a line.)
    done = run(argv, env=clean_env(home, PYTHONUTF8="1"), cwd=ROOT, check=False)
    passed = re.search(r"(?m)^(\d+) passed in ", done.stdout.decode())
    assert passed, done.stdout.decode()
    windows.counts["run inside the Windows Python"] = int(passed[1])
