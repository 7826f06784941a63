"""Where the tests of Windows run: python contrib/windows/wine.py FOLDER

Makes FOLDER, once: `python` is a real Windows Python with this interpreter's pytest, `prefix` a
Wine of its own, which knows nothing of the user's and writes nothing elsewhere.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Dict

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


def main(target: str) -> None:
    folder = Path(target).absolute()
    known = sorted(windows_python.WHEELS, key=lambda series: -int(series[2:]))
    candidates = [windows_python.MINE, *known] if windows_python.MINE in known else known
    found = ((series, windows_python.linux_python(series)) for series in candidates)
    series, linux_python = next((pair for pair in found if pair[1]), ("", None))
    if not linux_python:
        sys.exit(f"missing: Python {' or '.join(known)}, whose standard library is run on Windows")

    def make_it(new: Path) -> None:
        print(f"making {target}, once: CPython {series} for Windows, under Wine", flush=True)
        make(new, series, linux_python or "")

    sources = ("wine.py", "python.py", "launcher.c", "launcher.manifest")
    recipe = f"{series} {linux_python} {sys.version}"
    windows_python.make_once(folder, recipe, sources, make_it)


if __name__ == "__main__":
    main(*sys.argv[1:])
