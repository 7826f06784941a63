"""Writes the installer for Windows: python contrib/windows/msi.py FOLDER PYTHON

FOLDER/ssh-agent-proxy-VERSION.msi holds the proxy, the shim, the tray and the folder PYTHON, a
Windows Python with a pythonw.exe in it; and ssh-agent-proxy.exe, which runs the proxy in a console.
ssh-agent-proxy.wxs says what it does; here stands what depends on the files. Needs wixl (of
msitools) and a C compiler for Windows (of mingw-w64).

The same sources and the same versions of these two make the same bytes. A version has one product
code, so that it is never installed twice; the package code, by which Windows Installer knows the
bytes again, is made of them.
"""

import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path, PurePosixPath
from typing import Dict, List, Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.dont_write_bytecode = True
import python as windows_python  # noqa: E402

ROOT = HERE.parent.parent
SOURCES = (
    ROOT / "LICENSE",
    ROOT / "shim.sh",
    ROOT / "ssh_agent_proxy.py",
    HERE / "ssh-agent-proxy.ico",
    HERE / "tray.pyw",
)
# Whatever is told apart by a GUID has the one of its name in here.
NAMESPACE = uuid.UUID("076e8a77-c45e-4617-b693-3ee129acacea")
CONSOLE = "ssh-agent-proxy.exe"
PYTHON_DLL = re.compile(r"python3\d+\.dll")
EPOCH = 315532800  # 1980, where the times of a cabinet begin


def guid(name: str) -> str:
    return f"{{{uuid.uuid5(NAMESPACE, name)}}}".upper()


def version() -> str:
    """As the program tells it."""
    source = (ROOT / "ssh_agent_proxy.py").read_text("utf-8")
    match = re.search(r'(?m)^VERSION = "(\d{1,2}\.\d{1,2}\.\d{1,4})"$', source)
    if not match:
        sys.exit("msi: the VERSION of ssh_agent_proxy.py must be three numbers, as in 1.2.3: "
                 "Windows Installer compares nothing else")
    return match.group(1)


# ---------------------------------------------------------------- the files


def staged(folder: Path, python: Path) -> List[PurePosixPath]:
    """The paths below FOLDER of what is installed, copied there."""
    for source in SOURCES:
        shutil.copyfile(source, folder / source.name)
    shutil.copytree(python, folder / "python", copy_function=shutil.copyfile)
    dlls = [path.name for path in python.iterdir() if PYTHON_DLL.fullmatch(path.name)]
    if len(dlls) != 1:
        sys.exit(f"msi: one python3XX.dll is needed in {python}")
    windows_python.build_launcher(folder / CONSOLE, dlls[0], "-DSSH_AGENT_PROXY")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        os.utime(path, (EPOCH, EPOCH))
    return [PurePosixPath(path.relative_to(folder)) for path in files]


def identifier(path: PurePosixPath) -> str:
    """PATH as tables can name it: 72 letters, digits, `_` and `.`, with what stands before it."""
    name = ".".join(path.parts)
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]{,50}", name):
        return name
    return f"_{uuid.uuid5(NAMESPACE, str(path)).hex}"


def filename(path: PurePosixPath) -> str:
    """Its last part as Windows Installer wants it: a name of at most 8.3 characters has to be
    given, with `|` and the name after it where that is longer. (One that is nobody else's.)"""
    if re.fullmatch(r"\w{1,8}(\.\w{1,3})?", path.name, re.ASCII):
        return path.name
    extension = re.sub(r"[^.\w]", "", path.suffix)[:4]
    return f"{uuid.uuid5(NAMESPACE, str(path)).hex[:8]}{extension}|{path.name}"


def files_wxs(files: Sequence[PurePosixPath]) -> str:
    """A component for each folder. What marks it as installed is a value in the user's registry and
    not a file, as Windows Installer wants it in a profile (ICE38), where it also has to be told to
    remove a folder (ICE64)."""
    wix = Element("Wix", xmlns="http://schemas.microsoft.com/wix/2006/wi")
    fragment = SubElement(wix, "Fragment")
    group = SubElement(fragment, "ComponentGroup", Id="Files")
    directories: Dict[PurePosixPath, Element] = {}
    for folder in sorted({folder for file in files for folder in file.parents}):
        if folder.parts:
            its_id = f"folder.{identifier(folder)}"
            above = directories[folder.parent]
            directories[folder] = SubElement(above, "Directory", Id=its_id, Name=filename(folder))
        else:
            its_id = "INSTALLDIR"
            directories[folder] = SubElement(fragment, "DirectoryRef", Id=its_id)
        SubElement(group, "ComponentRef", Id=its_id)
        component = SubElement(
            directories[folder], "Component", Id=its_id, Guid=guid(f"folder {folder}")
        )
        SubElement(
            component, "RegistryValue", Root="HKCU", Key=r"Software\ssh-agent-proxy\installed",
            Name=str(folder), Type="integer", Value="1", KeyPath="yes",
        )  # fmt: skip
        SubElement(component, "RemoveFolder", Id=its_id, On="uninstall")
        for file in files:
            if file.parent == folder:
                name = filename(file)
                SubElement(component, "File", Id=identifier(file), Name=name, Source=str(file))
    return ElementTree.tostring(wix, "unicode")


# ---------------------------------------------------------------- the tools


def call(folder: Path, *argv: str) -> None:
    try:
        done = subprocess.run(argv, cwd=folder, check=False)
    except FileNotFoundError:
        sys.exit(f"msi: {argv[0]} is not here")
    if done.returncode:
        sys.exit(f"msi: {argv[0]} failed, with exit status {done.returncode}")


# [MS-OLEPS]: a property set stream has the identifier of its first set at 28 and the offset of that
# set at 44. A set begins with its size and how many properties it has, then come the number and the
# offset of each. A property begins with its type.
FMTID_SUMMARY_INFORMATION = uuid.UUID("f29f85e0-4ff9-1068-ab91-08002b27b3d9").bytes_le
PIDSI_REVNUMBER, PIDSI_CREATE_DTM, PIDSI_LASTSAVE_DTM = 9, 12, 13
VT_LPSTR, VT_FILETIME = 30, 64
FILETIME_OF_EPOCH = (EPOCH + 11_644_473_600) * 10_000_000  # in 100 ns since 1601


def reproducible(msi: bytes) -> bytes:
    """The same with other words for the time of building and the random package code of wixl's."""
    stream = msi.index(FMTID_SUMMARY_INFORMATION) - 28
    (offset,) = struct.unpack_from("<I", msi, stream + 44)
    summary = stream + offset
    (count,) = struct.unpack_from("<I", msi, summary + 4)
    numbers_and_offsets = struct.iter_unpack("<II", msi[summary + 8 : summary + 8 + 8 * count])
    place = {number: summary + offset for number, offset in numbers_and_offsets}

    made = bytearray(msi)
    for number in (PIDSI_CREATE_DTM, PIDSI_LASTSAVE_DTM):
        struct.pack_into("<IQ", made, place[number], VT_FILETIME, FILETIME_OF_EPOCH)
    struct.pack_into("<II39s", made, place[PIDSI_REVNUMBER], VT_LPSTR, 39, b"")
    package_code = guid(hashlib.sha256(made).hexdigest()).encode()
    struct.pack_into("<II39s", made, place[PIDSI_REVNUMBER], VT_LPSTR, 39, package_code)
    return bytes(made)


def build(python: Path) -> bytes:
    number = version()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary, "work")
        work.mkdir()
        Path(temporary, "files.wxs").write_text(files_wxs(staged(work, python)), "utf-8")
        call(work, windows_python.GCC, "-Os", "-s", "-shared", "-nostartfiles", "-Wall", "-Wextra",
             "-Wl,--no-insert-timestamp,--entry=0", "-o", "msi-actions.dll",
             str(HERE / "msi-actions.c"), "-lmsi", "-luser32")
        call(work, "wixl", "--arch", "x64", "--define", f"VERSION={number}",
             "--define", f"PRODUCT_CODE={guid(f'version {number}')}", "--output", "made.msi",
             str(HERE / "ssh-agent-proxy.wxs"), "../files.wxs")
        return reproducible((work / "made.msi").read_bytes())


def main(folder: str, python: str) -> None:
    target = Path(folder, f"ssh-agent-proxy-{version()}.msi")
    content = build(Path(python))
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    try:  # whole or not at all
        temporary.write_bytes(content)
        temporary.replace(target)
    finally:
        if temporary.exists():
            temporary.unlink()
    print(f"{target}: {len(content)} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
