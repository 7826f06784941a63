"""Writes the zipapp: python contrib/build.py TARGET INTERPRETER [PYTHON]

INTERPRETER stands in its first line, this one's own path when it is empty. With a PYTHON that
has shiv, TARGET is what shiv makes of the same sources.

The same sources make the same bytes, whoever builds them, where, when and with which Python
(and, with shiv, by which installation of the same version): names, order, times and modes of the
members are fixed, and nothing is compressed.
"""

import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Dict

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("shim.sh", "ssh_agent_proxy.py")
# An `import ssh_agent_proxy` would do as well, but zipimport compiles a module twice then, to tell
# its file name, which is most of the time that a start takes. The archive is the file itself, even
# where it was started through a link: the proxy looks for the shim in there.
# The shim is read at once: after an upgrade another file is at that path, and what the loader knows
# of the old one would cut a piece out of it.
MAIN = """\
import sys

if sys.version_info < (3, 9):
    sys.exit("ssh-agent-proxy needs Python 3.9 or newer, this is %d.%d" % sys.version_info[:2])

import importlib.machinery
import importlib.util
import os
import zipimport

archive = os.path.realpath(sys.path.pop(0))
loader = zipimport.zipimporter(archive)
origin = os.path.join(archive, "ssh_agent_proxy.py")
spec = importlib.machinery.ModuleSpec("ssh_agent_proxy", loader, origin=origin)
spec.has_location = True
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
exec(loader.get_code(spec.name), vars(module))
shim = os.path.join(archive, "shim.sh")
content = loader.get_data(shim)
read = loader.get_data
loader.get_data = lambda path: content if path == shim else read(path)
sys.exit(module.main(sys.argv[1:]))
"""
# shiv calls a function without arguments.
SHIV_START = "start_ssh_agent_proxy"
SHIV_MAIN = """\
import sys


def main():
    if sys.version_info < (3, 9):
        sys.exit("ssh-agent-proxy needs Python 3.9 or newer, this is %d.%d" % sys.version_info[:2])

    import ssh_agent_proxy

    return ssh_agent_proxy.main(sys.argv[1:])
"""
EPOCH = "315532800"  # 1980, where the times of a zip begin


def first_line(interpreter: str) -> bytes:
    # The kernel takes the first word as the program and cuts a long line (older Linux: at 127).
    line = os.fsencode(f"#!{interpreter} -I\n")
    if not os.path.isabs(interpreter) or len(line.split()) != 2 or len(line) > 127:
        sys.exit(f"build: {interpreter!r} can't stand in a script's first line: it takes an "
                 "absolute path without blanks, of at most 120 bytes; choose another PYTHON")
    return line


def executable_zip(interpreter: str, members: Dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    out.write(first_line(interpreter))
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(members.items()):
            member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            member.create_system = 3  # Unix, on Windows too: says what the mode is
            member.external_attr = 0o100644 << 16
            archive.writestr(member, content)
    return out.getvalue()


def zipapp(interpreter: str) -> bytes:
    members = {name: (ROOT / name).read_bytes() for name in SOURCES}
    members["__main__.py"] = MAIN.encode()
    return executable_zip(interpreter, members)


def shiv(interpreter: str, python: str) -> bytes:
    first_line(interpreter)  # before shiv's own, longer, complaint
    with tempfile.TemporaryDirectory() as folder:
        packages = Path(folder, "site-packages")
        packages.mkdir()
        for name in SOURCES:
            (packages / name).write_bytes((ROOT / name).read_bytes())
        (packages / f"{SHIV_START}.py").write_text(SHIV_MAIN, "ascii")
        made = Path(folder, "made")
        # --no-modify: what it has unpacked is compared before it is run.
        argv = [python, "-I", "-m", "shiv", "--reproducible", "--no-modify", "--entry-point",
                f"{SHIV_START}:main", "--site-packages", str(packages), "--output-file", str(made)]
        done = subprocess.run(argv, env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH}, check=False)
        if done.returncode:
            sys.exit(f"build: shiv failed, with exit status {done.returncode}")
        with zipfile.ZipFile(made) as archive:
            # The order and the modes of shiv's own members are those of its installation.
            members = {name: archive.read(name) for name in archive.namelist()}
    return executable_zip(interpreter, members)


def write(target: Path, content: bytes) -> None:
    if target.is_file() and target.read_bytes() == content and target.stat().st_mode & 0o111:
        # Untouched when it is right already: a `sudo make install` after `make build` leaves no
        # file of root's here.
        return
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    try:  # whole or not at all
        temporary.write_bytes(content)
        temporary.chmod(0o755)
        temporary.replace(target)
    finally:
        if temporary.exists():
            temporary.unlink()


def main(target: str, interpreter: str, *python: str) -> None:
    interpreter = interpreter or sys.executable
    write(Path(target), shiv(interpreter, *python) if python else zipapp(interpreter))
    if not os.path.exists(interpreter):
        print(f"build: there is no {interpreter} on this machine; to have it run here: "
              f"make PYTHON={sys.executable} …")


if __name__ == "__main__":
    main(*sys.argv[1:])
