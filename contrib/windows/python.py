"""A Windows CPython, put together on Linux: the one that the MSI carries, and that of the tests.

    python contrib/windows/python.py FOLDER [EMBEDDABLE]

FOLDER is laid out as that package of python.org's is, flat:

    pythonw.exe       runs what it is given, without a console: `pythonw -I -B tray.pyw`
    python3XX.dll     the interpreter; vcruntime140*.dll, libffi-8.dll: what it needs
    *.pyd             extension modules
    python3XX.zip     the standard library, compiled
    python3XX._pth    says that modules come from these two places alone: no PYTHON* variable, no
                      site-packages, no current folder, not the script's own folder either
    LICENSE.txt       of all that is in here

Nothing is ever written into it: all that is imported from it is compiled already.

PyPI's panda3d is the one package there that carries CPython for Windows as its makers built and
signed it: DLLs and extension modules, without the standard library, which comes from a Linux Python
of the same minor version (modules.txt: what of it), and without pythonw.exe, for which launcher.c
stands in. EMBEDDABLE is python.org's package itself, python-3.X.Y-embed-amd64.zip, whose
pythonw.exe is signed, too: for releases.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Callable, Iterable, Iterator, Optional, Tuple

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
    """The DLLs and extension modules of CPython, without Tk, tests and what is part of
    Windows."""
    with zipfile.ZipFile(wheel(series, cache)) as archive:
        for member in archive.namelist():
            folder, _, name = member.rpartition("/")
            lower = name.lower()
            unwanted = lower.startswith(("api-ms-", "tcl", "tk", "_tk", "_test")) or ".cp" in lower
            if folder == "deploy_libs" and lower.endswith((".dll", ".pyd")) and not unwanted:
                yield name, archive.read(member)


# What Windows calls a program by, in a notification and in Task Manager (VERSIONINFO resource;
# 0x0409, 1200: English, Unicode).
RESOURCES = """
1 24 "{here}/launcher.manifest"
1 VERSIONINFO
BEGIN
    BLOCK "StringFileInfo" BEGIN
        BLOCK "040904B0" BEGIN
            VALUE "FileDescription", "{name}"
            VALUE "ProductName", "{name}"
        END
    END
    BLOCK "VarFileInfo" BEGIN
        VALUE "Translation", 0x0409, 1200
    END
END
"""


def build_launcher(target: Path, dll: str, *options: str, icon: Optional[Path] = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        resources = Path(folder, "launcher.rc")
        text = RESOURCES.format(here=HERE, name="ssh-agent-proxy")
        resources.write_text(text + (f'1 ICON "{icon}"\n' if icon else ""), "utf-8")
        compiled = str(Path(folder, "launcher.o"))
        subprocess.run([WINDRES, str(resources), compiled], check=True)
        # (No time of the build in it: the same sources make the same bytes.)
        argv = [GCC, "-Os", "-s", "-municode", "-Wall", "-Wextra", "-Werror"]
        argv += ["-Wl,--no-insert-timestamp", f'-DPYTHON_DLL=L"{dll}"', *options]
        argv += ["-o", str(target), str(HERE / "launcher.c"), compiled]
        subprocess.run(argv, check=True)


# ---------------------------------------------------------------- what the MSI carries

CARRIED = "3.13"  # the newest that is there
EXTENSIONS = ("_ctypes", "_queue", "_socket", "select", "unicodedata")
LIBRARIES = ("python313.dll", "vcruntime140.dll", "vcruntime140_1.dll", "libffi-8.dll")
# Run by the Linux Python: compiles the modules whose paths it reads, and writes the archive given.
# The same modules make the same bytes: no time, no path of this machine is in them.
COMPILE = """
import importlib.util, marshal, sys, zipfile
library, target = sys.argv[1:]
with zipfile.ZipFile(target, "w") as archive:
    for name in sys.stdin.read().splitlines():
        with open(f"{library}/{name}", "rb") as f:
            source = f.read()
        flags = (0b01).to_bytes(4, "little")  # told apart by a hash that is not compared
        head = importlib.util.MAGIC_NUMBER + flags + importlib.util.source_hash(source)
        code = marshal.dumps(compile(source, name, "exec", dont_inherit=True))
        archive.writestr(zipfile.ZipInfo(f"{name}c", (1980, 1, 1, 0, 0, 0)), head + code)
"""


def modules(library: Path) -> Iterator[str]:
    """The paths, below LIBRARY, of the modules that modules.txt names."""
    for line in (HERE / "modules.txt").read_text("ascii").splitlines():
        if not line or line.startswith("#"):
            continue
        path = library / line.removesuffix(".*").replace(".", "/")
        if line.endswith(".*"):
            found = sorted(path.rglob("*.py"))
        else:
            found = [path / "__init__.py"] if path.is_dir() else [path.with_suffix(".py")]
        yield from (file.relative_to(library).as_posix() for file in found)


def licences(library: Path) -> str:
    for place in library, library.parent.parent:
        if (place / "LICENSE.txt").exists():
            return (place / "LICENSE.txt").read_text("utf-8")
    return sys.exit(f"python: there is no LICENSE.txt in {library}")


def from_pypi(target: Path, cache: Path) -> None:
    python = linux_python(CARRIED)
    if not python:
        sys.exit(
            f"missing: python{CARRIED}, whose standard library the MSI carries\n"
            "  or WINDOWS_PYTHON, python.org's Windows embeddable package (64-bit), as in:\n"
            "  make msi WINDOWS_PYTHON=python-3.13.11-embed-amd64.zip"
        )
    library = standard_library(python)
    wanted = {*LIBRARIES, *(f"{name}.pyd".lower() for name in EXTENSIONS)}
    for name, content in binaries(CARRIED, cache):
        if name.lower() in wanted:
            (target / name.lower()).write_bytes(content)
    zipped = target / "python313.zip"
    argv = [python, "-I", "-c", COMPILE, str(library), str(zipped)]
    subprocess.run(argv, input="\n".join(modules(library)), text=True, check=True)
    (target / "python313._pth").write_text("python313.zip\n.\n", "ascii")
    texts = [licences(library), (HERE / "licences.txt").read_text("utf-8")]
    (target / "LICENSE.txt").write_text("\n".join(texts), "utf-8")
    icon = HERE / "ssh-agent-proxy.ico"
    build_launcher(target / "pythonw.exe", "python313.dll", "-mwindows", icon=icon)


# python.org's, by its name and by what is in it.
EMBEDDABLE = re.compile(r"python-(3\.(\d+)\.\d+)-embed-amd64\.zip")


def from_python_org(target: Path, package: Path) -> None:
    match = EMBEDDABLE.fullmatch(package.name)
    if not match or not package.is_file():
        sys.exit(f"WINDOWS_PYTHON must be python.org's python-3.X.Y-embed-amd64.zip, not {package}")
    stem = f"python3{match[2]}"
    try:
        with zipfile.ZipFile(package) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as e:
        sys.exit(f"WINDOWS_PYTHON: {package}: {e}")
    expected = {"pythonw.exe", f"{stem}.dll", f"{stem}.zip", f"{stem}._pth", "LICENSE.txt"}
    flat = all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in members)
    # (Windows' version resource, in UTF-16.)
    version = match[1].encode("utf-16-le") in members.get(f"{stem}.dll", b"")
    if not flat or not version or expected - set(members):
        sys.exit(f"WINDOWS_PYTHON: {package} is not what its name says")
    told = hashlib.sha256(package.read_bytes()).hexdigest()
    print(f"CPython {match[1]}, SHA-256 {told}: compare it with python.org's page of that release")
    for name, content in members.items():
        (target / name).write_bytes(content)


def make_once(
    folder: Path, recipe: str, sources: Iterable[str], make: Callable[[Path], None]
) -> None:
    """Has MAKE fill FOLDER, whole or not at all, unless it did so by the same RECIPE and SOURCES.

    Another process that makes the same waits for this one, and finds it made.
    """
    wanted = hashlib.sha256(recipe.encode())
    for name in sources:
        wanted.update((HERE / name).read_bytes() if (HERE / name).exists() else b"")
    new, stamp = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.made-of")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists() and stamp.exists() and stamp.read_text() == wanted.hexdigest():
            return
        for old in new, folder:
            shutil.rmtree(old, ignore_errors=True)
        stamp.unlink(missing_ok=True)
        new.mkdir()
        make(new)
        new.rename(folder)
        stamp.write_text(wanted.hexdigest())


def main(folder: str, embeddable: str = "") -> None:
    target = Path(folder).absolute()
    sources = ("python.py", "launcher.c", "launcher.manifest", "licences.txt", "modules.txt",
               "ssh-agent-proxy.ico")  # fmt: skip
    if embeddable:
        package = Path(embeddable)
        made_of = hashlib.sha256(package.read_bytes()).hexdigest() if package.is_file() else ""
        make_once(target, made_of, sources, lambda new: from_python_org(new, package))
    else:
        cache = target.parent / "wheels"
        make_once(target, sys.version, sources, lambda new: from_pypi(new, cache))


# ---------------------------------------------------------------- what the tests run


def whole_python(target: Path, series: str, python: str, cache: Path) -> None:
    """With all of the standard library: TARGET/python.exe, pythonw.exe, DLLs, Lib."""
    (target / "DLLs").mkdir(parents=True)
    for name, content in binaries(series, cache):
        beside = name.lower().startswith(("python3", "vcruntime"))
        (target / ("" if beside else "DLLs") / name).write_bytes(content)
    unwanted = shutil.ignore_patterns(*UNWANTED)
    shutil.copytree(standard_library(python), target / "Lib", ignore=unwanted)
    dll = f"python{series.replace('.', '')}.dll"
    build_launcher(target / "python.exe", dll)
    build_launcher(target / "pythonw.exe", dll, "-mwindows")
    # (Modules of both systems are compiled alike.)
    argv = [python, "-m", "compileall", "-q", "-j", "0", str(target / "Lib")]
    subprocess.run(argv, check=False, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(*sys.argv[1:])
