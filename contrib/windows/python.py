"""A Windows CPython, put together on Linux.

PyPI's panda3d is the one package there that carries CPython for Windows as its makers built and
signed it: DLLs and extension modules, without the standard library, which is the same on every
system and comes from a Linux Python of the same minor version, and without python.exe, for which
launcher.c stands in.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Iterator, Optional, Tuple

MINE = "{}.{}".format(*sys.version_info)
HERE = Path(__file__).resolve().parent
WINDRES = "x86_64-w64-mingw32-windres"
GCC = "x86_64-w64-mingw32-gcc"
PACKAGE = "panda3d==1.10.16"
# The wheels' sums, by what they are for; 3.11 holds CPython 3.11.9, 3.13 holds 3.13.11.
WHEELS = {
    "3.9": "11e5f1cd734827ca7925eaab993aaa06c9ac3e0b4d933fd44a99f048803702a1",
    "3.10": "3f5e084314a842875f9fbb2d6276c4bf80faa277592d90620a3b90717c4847e5",
    "3.11": "37acfb92655c4226879f95c988e2ef1449a53c54486d6c1ebc00e2772429af82",
    "3.12": "f6493e2ecc0d1b7c1556a999556e5278cbc9484fe5fe1e159a1ccc02b870b18f",
    "3.13": "0e505261bb58d8402d0099c291f1a3459acfdd38f3e7d666e72aa2e1ea5dc46f",
}
# What no program needs that is run here: tests, IDLE, Tk, and what belongs to the Linux Python.
UNWANTED = (
    "__pycache__", "*-packages", "lib-dynload", "test", "tests", "idlelib", "tkinter", "turtledemo",
    "ensurepip", "lib2to3", "pydoc_data", "config-*", "_sysconfigdata*",
)  # fmt: skip


def linux_python(series: str) -> Optional[str]:
    """A Python of that minor version on this machine, of its real path, that really runs."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    found = [sys.executable] if series == MINE else [shutil.which(f"python{series}") or ""]
    found += [str(path) for path in sorted(root.glob(f"{series}.*/bin/python{series}"))]
    for python in filter(None, found):
        argv = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.stdout.strip() == series:
            return python
    return None


def standard_library(python: str) -> Path:
    argv = [python, "-c", "import sysconfig; print(sysconfig.get_path('stdlib'))"]
    return Path(subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())


def wheel(series: str, cache: Path) -> Path:
    """PACKAGE for SERIES, fetched into CACHE where it is not there yet."""
    kept = cache / f"{PACKAGE}-{WHEELS[series]}.whl"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            wanted = Path(folder, "wanted")
            wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEELS[series]}\n", "ascii")
            argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            argv += ["--disable-pip-version-check", "--only-binary=:all:", "--platform=win_amd64"]
            argv += [f"--python-version={series}", "--require-hashes", f"--dest={folder}"]
            subprocess.run([*argv, f"--requirement={wanted}"], check=True)
            (fetched,) = Path(folder).glob("*.whl")
            fetched.replace(kept)
    if hashlib.sha256(kept.read_bytes()).hexdigest() != WHEELS[series]:
        sys.exit(f"{kept} is not what it was: remove it")
    return kept


def binaries(series: str, cache: Path) -> Iterator[Tuple[str, bytes]]:
    """The DLLs and extension modules of CPython, without Tk and what is part of Windows."""
    with zipfile.ZipFile(wheel(series, cache)) as archive:
        for member in archive.namelist():
            folder, _, name = member.rpartition("/")
            lower = name.lower()
            unwanted = lower.startswith(("api-ms-", "tcl", "tk", "_tkinter"))
            if folder == "deploy_libs" and lower.endswith((".dll", ".pyd")) and not unwanted:
                yield name, archive.read(member)


def build_launcher(target: Path, series: str, *options: str, icon: Optional[Path] = None) -> None:
    dll = f"python{series.replace('.', '')}.dll"
    with tempfile.TemporaryDirectory() as folder:
        resources = Path(folder, "launcher.rc")
        lines = [f'1 24 "{HERE}/launcher.manifest"'] + ([f'1 ICON "{icon}"'] if icon else [])
        resources.write_text("\n".join(lines) + "\n", "utf-8")
        compiled = str(Path(folder, "launcher.o"))
        subprocess.run([WINDRES, str(resources), compiled], check=True)
        # (No time of the build in it: the same sources make the same bytes.)
        argv = [GCC, "-Os", "-s", "-municode", "-Wall", "-Wextra", "-Werror"]
        argv += ["-Wl,--no-insert-timestamp", f'-DPYTHON_DLL=L"{dll}"', *options]
        argv += ["-o", str(target), str(HERE / "launcher.c"), compiled]
        subprocess.run(argv, check=True)


def whole_python(target: Path, series: str, python: str, cache: Path) -> None:
    """With all of the standard library: TARGET/python.exe, pythonw.exe, DLLs, Lib."""
    (target / "DLLs").mkdir(parents=True)
    for name, content in binaries(series, cache):
        beside = name.lower().startswith(("python3", "vcruntime"))
        (target / ("" if beside else "DLLs") / name).write_bytes(content)
    unwanted = shutil.ignore_patterns(*UNWANTED)
    shutil.copytree(standard_library(python), target / "Lib", ignore=unwanted)
    build_launcher(target / "python.exe", series)
    build_launcher(target / "pythonw.exe", series, "-mwindows")
    # (Modules of both systems are compiled alike.)
    argv = [python, "-m", "compileall", "-q", "-j", "0", str(target / "Lib")]
    subprocess.run(argv, check=False, stdout=subprocess.DEVNULL)
