"""Where the tests of Windows run: python contrib/windows/wine.py FOLDER

Makes FOLDER, once: `python` is a real Windows Python with this interpreter's pytest, `prefix` a
Wine of its own, which knows nothing of the user's and writes nothing elsewhere. Another process
that makes the same waits for this one; what is cut short leaves nothing that counts.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Dict, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.dont_write_bytecode = True
import python as windows_python  # noqa: E402

# pytest and what it is made of, all of it Python alone.
PACKAGES = ("pytest", "_pytest", "py.py", "pluggy", "iniconfig", "packaging", "pygments",
            "exceptiongroup", "tomli", "typing_extensions.py")  # fmt: skip


def environment(folder: Path) -> Dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "LANG": "C.UTF-8",
        "WINEPREFIX": str(folder / "prefix"),
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml,winemenubuilder.exe=",
    }


def wine(folder: Path, *argv: str) -> None:
    # Not into a pipe: the programs that Wine starts keep it open.
    with (folder / "log").open("ab") as log:
        subprocess.run(
            argv, env=environment(folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            check=True, timeout=300,
        )  # fmt: skip


def make(folder: Path, series: str, linux_python: str) -> None:
    for name in "home", "tmp":
        (folder / name).mkdir(parents=True)
    cache = folder.parent / "wheels"
    windows_python.whole_python(folder / "python", series, linux_python, cache)
    packages = folder / "python" / "Lib" / "site-packages"
    packages.mkdir()
    for name in PACKAGES:
        source = Path(sysconfig.get_path("purelib"), name)
        if source.is_dir():
            shutil.copytree(source, packages / name)
        elif source.exists():
            shutil.copy(source, packages)
    try:
        wine(folder, "wineboot", "--init")
        wine(folder, "wine", "winecfg", "-v", "win10")  # a new prefix calls itself Windows 7
    finally:
        wine(folder, "wineserver", "--kill")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(target: str) -> None:
    folder = Path(target).absolute()
    known = sorted(windows_python.WHEELS, key=lambda series: -int(series[2:]))
    candidates = [windows_python.MINE, *known] if windows_python.MINE in known else known
    found = ((series, windows_python.linux_python(series)) for series in candidates)
    series, linux_python = next((pair for pair in found if pair[1]), ("", None))
    if not linux_python:
        sys.exit(f"missing: Python {' or '.join(known)}, whose standard library is run on Windows")
    recipe = hashlib.sha256(f"{series} {linux_python} {sys.version}".encode())
    for source in "wine.py", "python.py", "launcher.c", "launcher.manifest":
        recipe.update(Path(__file__).with_name(source).read_bytes())
    with alone(folder.with_name(f"{folder.name}.lock")):
        stamp = folder / "made-of"
        if stamp.exists() and stamp.read_text() == recipe.hexdigest():
            return
        print(f"making {target}, once: CPython {series} for Windows, under Wine", flush=True)
        new = folder.with_name(f"{folder.name}.new")
        for old in new, folder:
            shutil.rmtree(old, ignore_errors=True)
        make(new, series, linux_python)
        (new / "made-of").write_text(recipe.hexdigest())
        new.rename(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
