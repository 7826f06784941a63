"""The installer for Windows: what is in it, and, under Wine, what it does.

Wine sets no UPGRADINGPRODUCTCODE: there an upgrade removes the settings, as a removal does. What a
real one keeps is shown by setting that property.
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from conftest import PROXY, ROOT, Agent, clean_env, copy_tree, http, need, run, wait_for
from test_make import MAKE, PYTHON, files, make, snapshot

long = pytest.mark.long
MSI = Path("contrib", "windows", "msi.py")
VERSION = re.search(r'(?m)^VERSION = "(.+)"', PROXY.read_text("utf-8"))[1]  # type: ignore[index]
NEXT = "9.9.9"
INSTALLED = ["LICENSE", "shim.sh", "ssh-agent-proxy.ico", "ssh_agent_proxy.py", "tray.pyw"]
CONSOLE = "ssh-agent-proxy.exe"
# A folder that stands in for the Python: names that are no identifiers, folders without files.
PYTHON_FILES = ["pythonw.exe", "python313.dll", "Lib/a-b/c d.py", "Lib/a-b/" + "e" * 70 + ".py"]


def need_tools() -> None:
    need("wixl", "wixl")
    need("msiinfo", "msitools")
    need("x86_64-w64-mingw32-gcc", "gcc-mingw-w64-x86-64-win32")


def set_version(tree: Path, version: str) -> Path:
    program = tree / "ssh_agent_proxy.py"
    program.write_text(program.read_text("utf-8").replace(f'"{VERSION}"', f'"{version}"'), "utf-8")
    return tree


def build(tree: Path, python: Path, check: bool = True, **env: Any) -> Any:
    argv = [PYTHON, "-I", tree / MSI, tree / "dist", python]
    return run(argv, env=clean_env(tree.parent, **env), check=check)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    for name in PYTHON_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture(scope="module")
def msi(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Path:
    need_tools()
    tree = copy_tree(tmp_path_factory.mktemp("msi") / "a tree")
    built = build(tree, python)
    assert built.stderr == b"", "wixl left nothing out"
    assert files(tree / "dist") == [f"ssh-agent-proxy-{VERSION}.msi"]
    return tree / "dist" / f"ssh-agent-proxy-{VERSION}.msi"


def table(msi: Path, name: str) -> List[Dict[str, str]]:
    """The rows: first come the columns' names, their types, and the table's name."""
    # (It writes streams, as of icons, into the folder it runs in.)
    told = run(["msiinfo", "export", msi, name], cwd=msi.parent.parent).stdout.decode()
    columns, _, _, *rows = (line.split("\t") for line in told.splitlines())
    return [dict(zip(columns, row)) for row in rows]


def properties(msi: Path) -> Dict[str, str]:
    return {row["Property"]: row["Value"] for row in table(msi, "Property")}


def summary(msi: Path) -> Dict[str, str]:
    lines = run(["msiinfo", "suminfo", msi]).stdout.decode().splitlines()
    return dict(line.split(": ", 1) for line in lines)


# ---------------------------------------------------------------- what is in it


@long
def test_it_is_for_one_user_without_an_administrator(msi: Path) -> None:
    assert summary(msi)["Source"] == "10 (a)", "Word Count: compressed (2), no elevation (8)"
    assert summary(msi)["Template"] == "x64;1033"
    assert "ALLUSERS" not in properties(msi)
    assert {row["Root"] for row in table(msi, "Registry")} == {"1"}, "HKEY_CURRENT_USER"
    parents = {row["Directory"]: row["Directory_Parent"] for row in table(msi, "Directory")}
    assert (parents["INSTALLDIR"], parents["PROGRAMS"]) == ("PROGRAMS", "LocalAppDataFolder")


@long
def test_every_file_is_in_it_and_nothing_else(msi: Path, python: Path, home: Path) -> None:
    run(["msiextract", "-C", home, msi])
    extracted = home / "Programs" / "ssh-agent-proxy"
    expected = {f"python/{name}": python / name for name in files(python)}
    for name in INSTALLED:
        folder = ROOT if (ROOT / name).exists() else ROOT / "contrib" / "windows"
        expected[name] = folder / name
    assert files(extracted) == sorted([*expected, "python", CONSOLE])
    for name, source in expected.items():
        assert source.is_dir() or (extracted / name).read_bytes() == source.read_bytes()


@long
def test_each_folder_is_a_component_that_leaves_nothing(msi: Path) -> None:
    directories = {row["Directory"] for row in table(msi, "Directory")}
    ours = {name for name in directories if name == "INSTALLDIR" or name.startswith("folder.")}
    assert ours == {row["DirProperty"] for row in table(msi, "RemoveFile")}
    components = {row["Component"]: row for row in table(msi, "Component")}
    assert ours | {"shortcut"} == set(components)
    assert {row["Attributes"] for row in components.values()} == {"4"}, "RegistryKeyPath"
    values = {row["Registry"]: row for row in table(msi, "Registry")}
    assert {values[row["KeyPath"]]["Component_"] for row in components.values()} == set(components)
    # The tray alone writes the entry under Run, and the settings.
    assert {row["Key"] for row in values.values()} == {r"Software\ssh-agent-proxy\installed"}


UPGRADE_CODE = "{A86C6E01-FD04-480F-ADC2-B98C619D9DC0}"  # never another one
TRAY = '-I -B "[#tray.pyw]"'
TABLES = {
    "Property": [
        ("Property", "Value"),
        ("ProductName", "ssh-agent-proxy"),
        ("ProductVersion", VERSION),
        ("Manufacturer", "ssh-agent-proxy"),
        ("UpgradeCode", UPGRADE_CODE),
        ("SecureCustomProperties", "OLDERVERSION;NEWERVERSION"),
        ("REINSTALLMODE", "amus"),
        ("ARPPRODUCTICON", "ssh_agent_proxy.ico"),
    ],
    "Icon": [("Name",), ("ssh_agent_proxy.ico",)],
    "Shortcut": [
        ("Directory_", "Name", "Target", "Arguments", "Icon_"),
        ("ProgramMenuFolder", "SSHAGENT|ssh-agent-proxy", "[#python.pythonw.exe]", TRAY,
         "ssh_agent_proxy.ico"),
    ],
    # VersionMinInclusive (256), OnlyDetect (2).
    "Upgrade": [
        ("UpgradeCode", "VersionMin", "VersionMax", "Attributes", "ActionProperty"),
        (UPGRADE_CODE, "0.0.0", VERSION, "256", "OLDERVERSION"),
        (UPGRADE_CODE, VERSION, "", "2", "NEWERVERSION"),
    ],
    "LaunchCondition": [
        ("Condition",), ("NOT ALLUSERS",), ("Installed OR NOT NEWERVERSION",),
    ],
    # A DLL in the Binary table (1) or a program in the File table (18), which may fail (64); as the
    # user (not 2048), when the script runs (1024) or at once, waited for or not (128).
    "CustomAction": [
        ("Action", "Type", "Source", "Target"),
        ("EndTray", str(1 + 64), "msi_actions.dll", "EndTray"),
        ("RemoveSettings", str(18 + 64 + 1024), "python.pythonw.exe", f"{TRAY} --remove"),
        ("StartTray", str(18 + 64 + 128), "python.pythonw.exe", TRAY),
    ],
    "InstallExecuteSequence": [
        ("Action", "Condition"),
        ("EndTray", ""),
        ("RemoveSettings", 'REMOVE="ALL" AND NOT UPGRADINGPRODUCTCODE'),
        ("StartTray", 'NOT (REMOVE="ALL") AND (UILevel > 2 OR TRAYWASRUNNING)'),
    ],
}  # fmt: skip


@long
@pytest.mark.parametrize("name", TABLES)
def test_the_table_has_these_rows(name: str, msi: Path) -> None:
    columns, *expected = TABLES[name]
    assert set(expected) <= {tuple(row[c] for c in columns) for row in table(msi, name)}


@long
def test_each_long_name_has_a_short_one(msi: Path) -> None:
    names = [row["FileName"] for row in table(msi, "File")]
    names += [row["DefaultDir"] for row in table(msi, "Directory") if row["Directory_Parent"]]
    short = [name.partition("|")[0] for name in names]
    assert not [name for name in short if not re.fullmatch(r"\.|\w{1,8}(\.\w{1,3})?", name)]
    assert len(set(short) - {"."}) == len(short) - short.count(".")
    assert "ssh_agent_proxy.py" in {name.rpartition("|")[2] for name in names}


# As Microsoft numbers the standard actions.
ORDER = ["FindRelatedProducts", "LaunchConditions", "EndTray", "InstallValidate",
         "InstallInitialize", "RemoveExistingProducts", "ProcessComponents", "RemoveSettings",
         "RemoveFiles", "InstallFiles", "InstallFinalize", "StartTray"]  # fmt: skip


@long
def test_the_actions_come_in_order(msi: Path) -> None:
    rows = {row["Action"]: int(row["Sequence"]) for row in table(msi, "InstallExecuteSequence")}
    numbers = [rows[action] for action in ORDER]
    assert numbers == sorted(set(numbers))


@long
def test_two_trees_at_two_times_are_built_to_the_same_bytes(
        msi: Path, python: Path, tree: Path) -> None:  # fmt: skip
    for path in tree.rglob("*.*"):
        os.utime(path, (1, 2_000_000_000))
    before = os.umask(0o077)
    try:
        build(tree, python, TZ="Asia/Tokyo", SOURCE_DATE_EPOCH="1")
    finally:
        os.umask(before)
    assert (tree / "dist" / msi.name).read_bytes() == msi.read_bytes()


@long
def test_a_version_has_one_product_code_and_its_bytes_a_package_code(
        msi: Path, python: Path, tree: Path, short: Path) -> None:  # fmt: skip
    (tree / "shim.sh").write_text("exit 1\n")
    newer = set_version(copy_tree(short / "newer"), NEXT)
    build(tree, python)
    build(newer, python)
    built = [msi, tree / "dist" / msi.name, newer / "dist" / f"ssh-agent-proxy-{NEXT}.msi"]
    first, second, third = (properties(path)["ProductCode"] for path in built)
    assert first == second != third
    assert len({summary(path)["Revision number (UUID)"] for path in built}) == 3


# ---------------------------------------------------------------- make


def test_build_all_makes_the_installer_too(tree: Path, home: Path) -> None:
    commands = make(tree, home, "-n", "build-all").stdout.decode()
    targets = ["dist/ssh-agent-proxy", "dist/ssh-agent-proxy.shiv", "dist dist/windows-python"]
    made = re.findall(r"(?m)-I contrib/(?:build|windows/msi)\.py (.*?)(?: \"|$)", commands)
    assert made == targets


def test_what_is_missing_is_said_before_anything_is_made(tree: Path, home: Path) -> None:
    tools = home / "bin"
    tools.mkdir()
    for name in ("sh", "env", "sed", "awk", "printf"):
        (tools / name).symlink_to(need(name, name))
    done = make(tree, home, "msi", check=False, PATH=str(tools))
    assert done.stderr.startswith(b"missing: wixl, x86_64-w64-mingw32-gcc\n")
    assert not (tree / "dist").exists()


@long
def test_a_version_that_windows_cannot_compare_is_refused(tree: Path, python: Path) -> None:
    told = build(set_version(tree, "1.2.3rc1"), python, check=False).stderr.decode()
    assert told == ("msi: the VERSION of ssh_agent_proxy.py must be three numbers, as in 1.2.3: "
                    "Windows Installer compares nothing else\n")


@long
def test_a_failing_wixl_leaves_the_old_one(tree: Path, python: Path) -> None:
    need_tools()
    (tree / "dist").mkdir()
    old = tree / "dist" / f"ssh-agent-proxy-{VERSION}.msi"
    old.write_text("the old one")
    (tree / "contrib/windows/ssh-agent-proxy.wxs").write_text("<Wix")
    done = build(tree, python, check=False)
    assert done.stderr.decode().endswith("msi: wixl failed, with exit status 1\n")
    assert (old.read_text(), files(tree / "dist")) == ("the old one", [old.name])


# ---------------------------------------------------------------- what it does


def on_windows(test: Any) -> Any:
    """There is one registry, and one tray."""
    return pytest.mark.windows(pytest.mark.alone(test))


KEY = r"HKCU\Software\ssh-agent-proxy"
RUN = r"HKCU\Software\Microsoft\Windows\CurrentVersion\Run"
UNINSTALL = r"HKLM\Software\Microsoft\Windows\CurrentVersion\Uninstall"
TRAY_PROGRAM = rb"\Programs\ssh-agent-proxy\python\pythonw.exe"
ERROR_INSTALL_FAILURE = 1603 % 256  # what Linux has of it


class Installer:
    """The two versions, and what is there after them. The tray's port is a free one."""

    def __init__(self, windows: Any, display: str, old: Path, new: Path) -> None:
        self.windows, self.old, self.new = windows, old, new
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        address = f"127.0.0.1:{self.port}"
        self.env = {**windows.env(), "SSH_AGENT_PROXY_ADDR": address, "DISPLAY": display}
        user = windows.folder / "prefix" / "drive_c" / "users" / getpass.getuser()
        self.local = user / "AppData" / "Local"
        self.folder = self.local / "Programs" / "ssh-agent-proxy"
        menu = user / "AppData/Roaming/Microsoft/Windows/Start Menu/Programs"
        self.shortcut = menu / "ssh-agent-proxy.lnk"

    def wine(self, *argv: Any) -> int:
        # (No pipe: the tray would inherit it.)
        null = subprocess.DEVNULL
        options = {"stdin": null, "stdout": null, "stderr": null, "timeout": 120}
        return subprocess.run(["wine", *map(str, argv)], env=self.env, **options).returncode

    def install(self, msi: Path, *options: str) -> int:
        return self.wine("msiexec", "/i", self.windows.path(msi), *(options or ["/qn"]))

    def remove(self, msi: Path, *options: str) -> int:
        return self.wine("msiexec", "/x", self.windows.path(msi), "/qn", *options)

    def start(self) -> None:
        """What the shortcut names. (Not every Wine opens a shortcut itself.)"""
        content = self.shortcut.read_bytes()
        program = re.search(rb"[A-Z]:\\[^\0]+\.exe", content)
        argument = re.search(rb'-\0I\0 \0-\0B\0 \0"\0((?:[^"]\0)+)"\0', content)
        assert program and argument, content
        script = argument.group(1).decode("utf-16-le")
        null = subprocess.DEVNULL
        argv = ["wine", program.group().decode(), "-I", "-B", script]
        subprocess.Popen(argv, env=self.env, stdin=null, stdout=null, stderr=null)
        wait_for(self.serving, 30, "the tray")

    def processes(self) -> List[int]:
        """The tray's. (One that starts is not serving yet.)"""
        prefix = f"WINEPREFIX={self.env['WINEPREFIX']}\0".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                its_program = (process / "cmdline").read_bytes().split(b"\0")[0]
                if TRAY_PROGRAM in its_program and prefix in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found

    def serving(self) -> str:
        """The version that answers."""
        try:
            return http(self.port, "GET", "/healthz").headers["server"].rpartition("/")[2]
        except ConnectionRefusedError:
            return ""


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> List[Path]:
    """The MSI of this version and that of the next, with the Python that they are to have."""
    need_tools()
    run([MAKE, "windows-python", f"PYTHON={PYTHON}"], cwd=ROOT, timeout=300)
    built = []
    for version in (VERSION, NEXT):
        tree = set_version(copy_tree(tmp_path_factory.mktemp("version") / "a tree"), version)
        build(tree, ROOT / "dist" / "windows-python")
        built.append(tree / "dist" / f"ssh-agent-proxy-{version}.msi")
    return built


@pytest.fixture
def installer(windows: Any, versions: List[Path]) -> Iterator[Installer]:
    with windows.screen() as display:
        installer = Installer(windows, display, *versions)
        yield installer
        for msi in (installer.new, installer.old):
            if installer.folder.exists():
                installer.remove(msi)
        wait_for(lambda: not installer.processes(), message="the tray's end")


@on_windows
def test_one_that_shows_itself_starts_the_tray(installer: Installer) -> None:
    assert installer.install(installer.old, "/qb") == 0
    assert wait_for(installer.serving, 30, "the tray") == VERSION


@on_windows
def test_what_the_shortcut_names_serves_and_writes_nothing_beside_it(installer: Installer) -> None:
    installer.install(installer.old)
    before = snapshot(installer.folder)
    installer.start()
    assert installer.serving() == VERSION
    assert "ssh-agent-proxy" in installer.windows.registry(RUN)
    assert snapshot(installer.folder) == before


@on_windows
def test_the_console_program_checks_and_makes_tokens(
        installer: Installer, home: Path, agent_with_key: Agent) -> None:  # fmt: skip
    installer.install(installer.old)
    folder = home / "Jürgen ☃"
    shutil.copytree(installer.folder, folder)
    before = snapshot(folder)
    tokens = installer.windows.path(folder.with_name("tökens ☃"))
    # Python would go on asking, or look for its modules elsewhere, if these counted.
    env = {**installer.env, "PYTHONINSPECT": "1", "PYTHONHOME": "/tmp"}

    def console(*argv: str) -> Any:
        return run(["wine", folder / CONSOLE, *argv], env=env, check=False)

    added = console("token", "wsl", "payloads=commit,tag", "--token-file", tokens)
    line = added.stdout.strip() + b" wsl payloads=commit,tag\n"
    assert (added.returncode, folder.with_name("tökens ☃").read_bytes()) == (0, line)
    upstream = installer.windows.pipe(agent_with_key.sock)
    checked = console("check", "--upstream", upstream)
    assert (checked.returncode, checked.stderr) == (0, b"")
    assert f"ok   127.0.0.1:{installer.port} is free".encode() in checked.stdout
    refused = console("check", "--wrong", 'a "b ☃')
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert 'unrecognized arguments: --wrong a "b ☃'.encode() in refused.stderr
    assert snapshot(folder) == before


@on_windows
@pytest.mark.parametrize("running", [True, False])
def test_a_quiet_upgrade_starts_what_it_has_ended(installer: Installer, running: bool) -> None:
    assert installer.install(installer.old) == 0
    assert set(INSTALLED) < set(files(installer.folder))
    if running:
        installer.start()
    assert installer.install(installer.new) == 0
    if running:
        assert wait_for(installer.serving, 30, "the tray") == NEXT
    else:
        assert not installer.processes()
        assert "ssh-agent-proxy" not in installer.windows.registry(RUN)
    assert f'VERSION = "{NEXT}"' in (installer.folder / "ssh_agent_proxy.py").read_text("utf-8")
    shown = installer.windows.registry(UNINSTALL)
    assert re.findall(r"DisplayVersion +REG_SZ +(\S+)", shown) == [NEXT]


@on_windows
def test_an_older_version_is_refused(installer: Installer) -> None:
    installer.install(installer.new)
    installer.start()
    assert installer.install(installer.old) == ERROR_INSTALL_FAILURE
    assert installer.serving() == NEXT


@on_windows
def test_removal_ends_a_running_tray_and_leaves_nothing(installer: Installer) -> None:
    installer.install(installer.old)
    installer.start()
    log = installer.local / "ssh-agent-proxy"
    assert files(log) == ["tray.log"]
    assert installer.remove(installer.old) == 0
    assert not installer.processes()
    assert not [path for path in (installer.folder, installer.shortcut, log) if path.exists()]
    told = [installer.windows.registry(key) for key in (KEY, RUN, UNINSTALL)]
    assert not [line for line in told if "ssh-agent-proxy" in line]


@on_windows
def test_what_removes_it_for_an_upgrade_keeps_what_the_tray_wrote(installer: Installer) -> None:
    installer.install(installer.old)
    installer.start()
    assert installer.remove(installer.old, "UPGRADINGPRODUCTCODE={AN-UPGRADE}") == 0
    assert not installer.folder.exists()
    assert "ListenOn" in installer.windows.registry(KEY)
    assert "installed" not in installer.windows.registry(KEY)
    assert "ssh-agent-proxy" in installer.windows.registry(RUN)
    assert files(installer.local / "ssh-agent-proxy") == ["tray.log"]
    installer.install(installer.old)  # so that it is removed


@on_windows
def test_a_tray_that_hangs_is_ended_all_the_same(installer: Installer) -> None:
    installer.install(installer.old)
    installer.start()
    (pid,) = installer.processes()
    os.kill(pid, signal.SIGSTOP)
    assert installer.remove(installer.old) == 0
    assert not installer.folder.exists()
