"""The harness of windows.py itself, and what runs inside the Windows Python."""

import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_env, run
from windows import INSIDE

pytestmark = pytest.mark.windows


def test_the_program_is_a_windows_process() -> None:
    assert run([sys.executable, "-c", "import sys; print(sys.platform)"]).stdout == b"win32\n"


def test_the_pure_sections_hold_there(home: Path) -> None:
    argv = [sys.executable, "-m", "pytest", "-c", "NUL", "--rootdir=.", "--confcutdir=."]
    argv += ["-p", "no:cacheprovider", "-q", *(f"tests/{name}" for name in INSIDE)]
    told = run(argv, env=clean_env(home), cwd=ROOT).stdout.decode()
    assert re.search(r"(?m)^\d+ passed in ", told), told
