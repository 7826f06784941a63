"""Writes the LaunchAgent: python contrib/launchd/fill.py PROGRAM LOG SETTINGS PLIST

PROGRAM and LOG are the paths that stand in it, SETTINGS is the file with the variables, which
need not be there. PLIST is what is written, whole or not at all; LOG is made, for its owner only.
"""

import os
import plistlib
import re
import sys
from pathlib import Path
from typing import Dict
from xml.parsers.expat import ExpatError
from xml.sax.saxutils import escape

TEMPLATE = Path(__file__).resolve().parent / "ssh-agent-proxy.plist.in"


def settings(path: Path) -> Dict[str, str]:
    """The NAME=VALUE lines of a systemd EnvironmentFile, as systemd reads them.

    What would take more than one line or a backslash to say there is refused, and so is what
    systemd passes over with a warning: nothing is guessed.
    """
    found: Dict[str, str] = {}
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return found
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(" \t\r")
        if not line or line[0] in "#;":
            continue
        name, separator, value = line.partition("=")
        name, value = name.rstrip(" \t"), value.lstrip(" \t")
        where = f"{path}: line {number}: "
        if not separator or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            sys.exit(f"{where}not NAME=VALUE")
        if "\\" in value:
            sys.exit(f"{where}a backslash in {name} is not understood here")
        if value[:1] in ("'", '"'):
            quote, value = value[0], value[1:]
            if value[-1:] != quote or quote in value[:-1]:
                sys.exit(f"{where}{name} does not end with the {quote} that it begins with")
            value = value[:-1]
        found[name] = value
    return found


def plist(program: str, log: str, variables: Dict[str, str]) -> bytes:
    lines = [
        f"\n        <key>{escape(name)}</key>\n        <string>{escape(value)}</string>"
        for name, value in variables.items()
    ]
    values = {"PROGRAM": escape(program), "LOG": escape(log), "SETTINGS": "".join(lines)}
    # In one pass: what is filled in may have such words in it.
    text = re.sub("@([A-Z]+)@", lambda match: values[match.group(1)], TEMPLATE.read_text("utf-8"))
    content = text.encode()
    read = plistlib.loads(content)
    if (read["ProgramArguments"][0], read["StandardErrorPath"]) != (program, log):
        raise ValueError("a path would be read as another one")
    if read["EnvironmentVariables"] != variables:
        raise ValueError("a setting would be read as another one")
    return content


def write(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.chmod(0o600)  # the settings are in it
        temporary.replace(target)
    finally:
        if temporary.exists():
            temporary.unlink()


def main(program: str, log: str, variables: str, target: str) -> None:
    try:
        content = plist(program, log, settings(Path(variables)))
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        # launchd would make it, for everybody to read: it tells what was signed.
        os.close(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
        write(Path(target), content)
    except OSError as e:
        sys.exit(f"cannot write {target}: {e.filename}: {e.strerror}")
    except (ValueError, ExpatError) as e:  # control characters, what is not UTF-8
        sys.exit(f"cannot write {target}: its paths and settings can't stand in a plist: {e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
