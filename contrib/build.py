"""Writes the zipapp: python contrib/build.py TARGET INTERPRETER

The same sources make the same bytes, whoever builds them, where, when and with which Python:
names, order, times and modes of the members are fixed, and nothing is compressed.
"""

import io
import os
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAIN = """\
import sys

if sys.version_info < (3, 9):
    sys.exit("ssh-agent-proxy needs Python 3.9 or newer, this is %d.%d" % sys.version_info[:2])

import ssh_agent_proxy

sys.exit(ssh_agent_proxy.main(sys.argv[1:]))
"""


def first_line(interpreter: str) -> bytes:
    # The kernel takes the first word as the program and cuts a long line (older Linux: at 127).
    line = os.fsencode(f"#!{interpreter} -I\n")
    if not os.path.isabs(interpreter) or len(line.split()) != 2 or len(line) > 127:
        sys.exit(f"build: {interpreter!r} can't stand in a script's first line: it takes an "
                 "absolute path without blanks, of at most 120 bytes; choose another PYTHON")
    return line


def zipapp(interpreter: str) -> bytes:
    members = {
        "__main__.py": MAIN.encode(),
        "shim.sh": (ROOT / "shim.sh").read_bytes(),
        "ssh_agent_proxy.py": (ROOT / "ssh_agent_proxy.py").read_bytes(),
    }
    out = io.BytesIO()
    out.write(first_line(interpreter))
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            member.create_system = 3  # Unix, on Windows too: says what the mode is
            member.external_attr = 0o100644 << 16
            archive.writestr(member, content)
    return out.getvalue()


def main(target: Path, interpreter: str) -> None:
    content = zipapp(interpreter)
    if not (target.is_file() and target.read_bytes() == content):
        # Whole or not at all. (And untouched when it is right already: a `sudo make install`
        # after `make build` leaves no file of root's here.)
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}")
        try:
            temporary.write_bytes(content)
            temporary.chmod(0o755)
            temporary.replace(target)
        finally:
            if temporary.exists():
                temporary.unlink()
    if not os.path.exists(interpreter):
        print(f"build: there is no {interpreter} on this machine; to have it run here: "
              f"make PYTHON={sys.executable} …")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] or sys.executable)
