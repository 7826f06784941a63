"""What make builds: the same bytes wherever that is, and nothing but its own code when it runs."""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from conftest import (
    PROXY, SHIM, Agent, Proxy, bound_by_modes, cannot_run, clean_env, copy_tree, http, need, run,
    short_folder, wait_for,
)  # fmt: skip
from test_make import MAKE, PYTHON, files, link_venv, long_rows, make, mode, stand_in

BUILD = Path("contrib", "build.py")
FORMS = ["zipapp", *long_rows("shiv")]


# ---------------------------------------------------------------- what is built


@pytest.mark.long
def test_every_python_of_this_machine_builds_the_same_bytes(tree: Path, home: Path) -> None:
    # A version manager's too, which stand beside the one of this run.
    beside = Path(sys.base_prefix).parent.glob("3.*/bin/python3")
    built = {}
    for python in {PYTHON, "/usr/bin/python3", *map(str, beside)}:
        argv = [python, "-I", tree / BUILD, home / "built", "/usr/bin/python3"]
        test = "import sys; sys.exit(sys.version_info < (3, 9))"
        if run([python, "-I", "-c", test], check=False).returncode == 0:
            run(argv, env=clean_env(home))
            built[python] = (home / "built").read_bytes()
    assert PYTHON in built
    assert len(set(built.values())) == 1, list(built)


BUILT = {"build": "ssh-agent-proxy", "build-shiv": "ssh-agent-proxy.shiv"}


@pytest.mark.parametrize("target", ["build", *long_rows("build-shiv")])
def test_two_clones_at_two_times_are_built_to_the_same_bytes(
        tree: Path, home: Path, short: Path, target: str) -> None:  # fmt: skip
    elsewhere = copy_tree(short / "another clone")
    for clone in (tree, elsewhere):
        shiv_python()
        link_venv(clone, "has-shiv")
    make(tree, home, target, TZ="UTC")
    for name in ("ssh_agent_proxy.py", "shim.sh"):
        os.utime(elsewhere / name, (1, 2_000_000_000))
        (elsewhere / name).chmod(0o700)
    before = os.umask(0o077)
    try:
        make(elsewhere, home, target, TZ="Asia/Tokyo", LANG="C", SOURCE_DATE_EPOCH="1")
    finally:
        os.umask(before)
    assert files(tree / "dist") == [BUILT[target]]
    first, second = (path / "dist" / BUILT[target] for path in (tree, elsewhere))
    assert first.read_bytes() == second.read_bytes()
    assert mode(first) == mode(second) == 0o755


@pytest.mark.parametrize("form", FORMS)
def test_it_holds_the_sources_uncompressed(form: str, built: Callable[[str], Path]) -> None:
    folder = "site-packages/" if form == "shiv" else ""
    assert built(form).read_bytes().startswith(f"#!{PYTHON} -I\n".encode())
    with zipfile.ZipFile(built(form)) as archive:
        assert archive.read(f"{folder}shim.sh") == SHIM.read_bytes()
        assert archive.read(f"{folder}ssh_agent_proxy.py") == PROXY.read_bytes()
        assert archive.testzip() is None
        members = archive.infolist()
    assert {each.compress_type for each in members} == {zipfile.ZIP_STORED}
    assert {each.external_attr >> 16 for each in members} == {0o100644}
    assert {each.date_time for each in members} == {(1980, 1, 1, 0, 0, 0)}
    if form == "zipapp":
        names = {each.filename for each in members}
        assert names == {"__main__.py", "shim.sh", "ssh_agent_proxy.py"}


def test_the_first_line_names_the_systems_python_or_the_one_that_is_set(
        tree: Path, home: Path) -> None:  # fmt: skip
    default = {"PATH": stand_in(home / "default", "python3", f"exec '{PYTHON}' \"$@\"")}
    chosen = f"#!{PYTHON} -I\n"
    for arguments, env, first_line in (
        ([f"PYTHON={PYTHON}"], {}, chosen),
        ([], {"PYTHON": PYTHON}, chosen),
        ([], default, "#!/usr/bin/python3 -I\n"),
    ):
        run([MAKE, "build", *arguments], cwd=tree, env=clean_env(home, **env))
        with open(tree / "dist" / "ssh-agent-proxy", "rb") as f:
            assert f.readline().decode() == first_line


def test_a_python_that_no_first_line_can_name_is_refused(tree: Path, home: Path) -> None:
    (home / "a b").mkdir()
    python = home / "a b" / "python"
    python.symlink_to(PYTHON)
    answer = make(tree, home, "build", f"PYTHON={python}", check=False)
    assert answer.returncode != 0
    assert "a b/python' can't stand in a script's first line" in answer.stderr.decode()
    assert not (tree / "dist").exists()


def test_a_right_build_is_left_untouched(tree: Path, home: Path) -> None:
    make(tree, home, "build")
    target = tree / "dist" / "ssh-agent-proxy"
    before = target.stat()
    make(tree, home, "build-darwin")
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    target.write_bytes(b"something else")
    make(tree, home, "build-darwin")
    assert zipfile.is_zipfile(target)


def test_an_interrupted_build_leaves_the_old_one_and_nothing_else(tree: Path, home: Path) -> None:
    target = tree / "dist" / "ssh-agent-proxy"
    target.parent.mkdir()
    target.write_bytes(b"the old one")
    # The moment at which the new one stands beside it.
    script = (
        "import pathlib, runpy, sys\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        "pathlib.Path.replace = interrupted\n"
        f"sys.argv = ['build.py', {str(target)!r}, '/usr/bin/python3']\n"
        f"runpy.run_path({str(tree / BUILD)!r}, run_name='__main__')\n"
    )
    assert run([PYTHON, "-c", script], env=clean_env(home), check=False).returncode != 0
    assert target.read_bytes() == b"the old one"
    assert files(tree / "dist") == ["ssh-agent-proxy"]


# ---------------------------------------------------------------- what runs


def shiv_python() -> str:
    """The Python of the venv that runs the tests; make puts shiv into it."""
    if not importlib.util.find_spec("shiv"):
        cannot_run("shiv is missing: make test installs it, or pip install shiv")
    return sys.executable


@pytest.fixture(scope="module")
def built() -> Iterator[Callable[[str], Path]]:
    """built(FORM): made once, in a tree that is not there any more when it runs."""
    with short_folder() as folder:

        def build(form: str) -> Path:
            target = folder / form / "ssh-agent-proxy"
            if not target.exists():
                tree = copy_tree(folder / "a tree")
                target.parent.mkdir()
                if form == "zipapp":
                    make(tree, folder, "install", f"BINDIR={target.parent}")
                else:
                    argv = [PYTHON, "-I", tree / BUILD, target, PYTHON, shiv_python()]
                    run(argv, env=clean_env(folder))
                shutil.rmtree(tree)
            return target

        yield build


@pytest.fixture
def program(built: Callable[[str], Path], short: Path) -> Path:
    """A copy, in a folder of its own."""
    (short / "a bin").mkdir()
    return Path(shutil.copy(built("zipapp"), short / "a bin"))


@pytest.fixture
def start(agent_with_key: Agent) -> Iterator[Callable[..., Proxy]]:
    """start(PROGRAM, ENV): `serve`, listening."""
    started: List[Proxy] = []

    def start(argv: List[Any], env: Dict[str, str]) -> Proxy:
        words = [*argv, "--addr", "127.0.0.1:0", "--upstream", agent_with_key.sock]
        started.append(Proxy([str(word) for word in words], env))
        return started[-1]

    yield start
    for proxy in started:
        proxy.stop()
        assert "Traceback" not in proxy.log(), proxy.log()


def works(proxy: Proxy) -> None:
    """It signs, hands out the shim, and ends well."""
    answer = http(proxy.port, "POST", "/sign", b"x")
    assert answer.status == 200, answer.text
    assert answer.body.startswith(b"-----BEGIN SSH SIGNATURE-----")
    assert http(proxy.port, "GET", "/shim").body == SHIM.read_bytes()
    assert proxy.stop() == 0


def test_one_that_runs_hands_out_its_own_shim_after_an_upgrade(
        program: Path, home: Path, start: Callable[..., Proxy]) -> None:  # fmt: skip
    proxy = start([program], clean_env(home))
    longer = program.with_name("longer")
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(longer, "x") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content if name == "__main__.py" else b"# another\n" + content)
    longer.replace(program)
    assert http(proxy.port, "GET", "/shim").body == SHIM.read_bytes()
    program.unlink()
    assert http(proxy.port, "GET", "/shim").body == SHIM.read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_it_tells_the_version_and_the_shim_of_the_source(
        form: str, built: Callable[[str], Path], home: Path) -> None:  # fmt: skip
    version = re.search(r'(?m)^VERSION = "(.+)"', PROXY.read_text("utf-8"))
    assert version
    told = run([built(form), "--version"], env=clean_env(home)).stdout.decode()
    assert told == f"ssh-agent-proxy {version.group(1)}\n"
    assert run([built(form), "shim"], env=clean_env(home)).stdout == SHIM.read_bytes()
    wrong = run([built(form), "--addr", "nonsense"], env=clean_env(home), check=False)
    assert wrong.returncode == 2, "the program's own exit status"


def test_an_old_python_is_told_so(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 18))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "argv", [str(program), "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(program), run_name="__main__")
    assert ended.value.code == "ssh-agent-proxy needs Python 3.9 or newer, this is 3.8"


# ---------------------------------------------------------------- what else might run


def mark(path: Path) -> str:
    return f"open({str(path)!r}, 'a').write(__name__ + '\\n')\n"


def lay_out_modules(folder: Path, ran: Path) -> None:
    """A file for each name that might be imported, which tells when it runs."""
    folder.mkdir(exist_ok=True)
    names = {"ssh_agent_proxy", "sitecustomize", "usercustomize", "__main__", "zipimport"}
    names |= {"_socket", "_hashlib", "_ssl", "_ctypes", "resource", "select", "binascii"}
    for path in Path(sysconfig.get_paths()["stdlib"]).iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            names.add(path.stem)
    # Without those that it starts with, it would end before it has run anything.
    loaded = run([PYTHON, "-I", "-c", "import sys; print(*sys.modules)"]).stdout.decode().split()
    for name in names - set(loaded) | {"__main__", "sitecustomize"}:
        (folder / f"{name}.py").write_text(mark(ran))
    (folder / "shim.sh").write_text("echo another shim\n")
    (folder / "pyvenv.cfg").write_text(f"home = {folder}\n")


def user_site(base: Path) -> Path:
    scheme = sysconfig.get_preferred_scheme("user") if sys.version_info >= (3, 10) else "posix_user"
    return Path(sysconfig.get_path("purelib", scheme, {"userbase": str(base)}))


@pytest.fixture
def hostile(short: Path, home: Path) -> Dict[str, str]:
    """An environment, with a folder to work in, that has Python run other code where it can."""
    ran = short / "ran"
    lay_out_modules(short / "cwd", ran)
    for base in (home / ".local", short / "base"):
        site = user_site(base)
        site.mkdir(parents=True)
        (site / "usercustomize.py").write_text(mark(ran))
        (site / "sitecustomize.py").write_text(mark(ran))
        (site / "evil.pth").write_text(f"import sys; {mark(ran)}")
    folders = {"PYTHONPATH": "cwd", "PYTHONUSERBASE": "base", "PYTHONPYCACHEPREFIX": "cache"}
    env = {name: short / folder for name, folder in folders.items()}
    return clean_env(home, PYTHONSTARTUP=short / "cwd" / "hmac.py", **env)


def test_the_hostile_modules_would_run(hostile: Dict[str, str], short: Path) -> None:
    for more in ({}, {"PYTHONPATH": ""}):
        argv = [PYTHON, "-c", "import hmac"]
        run(argv, env={**hostile, **more}, cwd=short / "cwd", check=False)
    ran = (short / "ran").read_text().split()
    assert {"hmac", "sitecustomize", "usercustomize"} <= set(ran)


# How it may be called, and what makes that possible. It is in "a bin"; the folder that is worked
# in, "cwd", is hostile.
WAYS = {
    "by its path": (":", "'../a bin/ssh-agent-proxy'"),
    "a link on the PATH": (
        "ln -s \"$PWD/../a bin/ssh-agent-proxy\" agent-proxy",
        'env PATH="$PWD:$PATH" agent-proxy',
    ),
    "from its folder": (":", "sh -c 'cd \"../a bin\" && exec ./ssh-agent-proxy \"$@\"' sh"),
    "a link to a link": ("ln -s '../a bin/ssh-agent-proxy' one && ln -s one two", "./two"),
    "by an interpreter": ("cp '../a bin/ssh-agent-proxy' x.pyz", "PYTHON -I x.pyz"),
    "through shiv": (":", "'../a bin/ssh-agent-proxy'"),
}


@pytest.mark.parametrize("way", [*list(WAYS)[:2], *long_rows(*list(WAYS)[2:])])
def test_it_runs_no_code_but_its_own_however_it_is_called(
        way: str, program: Path, built: Callable[[str], Path], hostile: Dict[str, str], short: Path,
        start: Callable[..., Proxy]) -> None:  # fmt: skip
    if way == "through shiv":
        shutil.copy(built("shiv"), program)
        hostile["SHIV_ROOT"] = str(short / "root")
    lay_out_modules(short / "a bin", short / "ran")
    for name in ("PYTHONHOME", "PYTHONPLATLIBDIR", "PYTHONINSPECT", "PYTHONWARNINGS"):
        hostile[name] = str(short / "cwd")
    prepare, line = WAYS[way]
    run(["sh", "-c", prepare], env=hostile, cwd=short / "cwd")
    line = line.replace("PYTHON", shlex.quote(PYTHON))
    argv = ["sh", "-c", f'cd "$0" && exec {line} "$@"', short / "cwd"]
    assert run([*argv, "shim"], env=hostile).stdout == SHIM.read_bytes()
    works(start([*argv, "-v"], hostile))
    assert not (short / "ran").exists(), (short / "ran").read_text()
    assert not (short / "cache").exists()


@pytest.mark.long
def test_through_shiv_a_source_that_was_edited_does_not_run(
        built: Callable[[str], Path], home: Path) -> None:  # fmt: skip
    argv = [built("shiv"), "--version"]
    run(argv, env=clean_env(home))
    (edited,) = home.glob(".shiv/*/site-packages/ssh_agent_proxy.py")
    edited.write_text(mark(home / "ran"))
    assert b"has been modified" in run(argv, env=clean_env(home), check=False).stderr
    assert not (home / "ran").exists()


# ---------------------------------------------------------------- homes, and what is written


@pytest.fixture(params=["read-only", "not set", *long_rows("missing", "a file", "empty")])
def odd_home(request: pytest.FixtureRequest, home: Path, short: Path) -> Dict[str, str]:
    """An environment whose HOME can't be written to."""
    odd = short / "odd home"
    odd.mkdir(mode=0o500)
    (short / "a file").write_text("")
    homes = {"read-only": odd, "missing": odd / "none", "a file": short / "a file"}
    env = clean_env(home, HOME=homes.get(request.param, ""))
    if request.param == "not set":
        del env["HOME"]
    return env


@pytest.mark.parametrize("form", FORMS)
def test_it_works_without_a_home_to_write_to(
        form: str, built: Callable[[str], Path], odd_home: Dict[str, str], short: Path,
        start: Callable[..., Proxy]) -> None:  # fmt: skip
    # Through shiv, where it is told where to unpack instead.
    (short / "root").mkdir()
    odd_home["SHIV_ROOT"] = str(short / "root")
    works(start([*bound_by_modes(), built(form)], odd_home))
    unpacked = {Path(name).name for name in files(short / "root")}
    assert not unpacked if form == "zipapp" else {"shim.sh", "ssh_agent_proxy.py"} <= unpacked
    assert files(short / "odd home") == []


# ("?": a system that has no such call is no error.)
TRACED = (
    "open", "openat", "creat", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "link",
    "linkat", "symlink", "symlinkat", "mknod", "mknodat", "truncate", "unlink", "unlinkat", "rmdir",
)  # fmt: skip
STRACE = ["-f", "-e", "trace=" + ",".join(f"?{call}" for call in TRACED), "-o"]


def changes(trace: str) -> List[str]:
    """The lines of a trace of system calls that open something for writing, make or change it."""
    opens = re.compile(r"\b(?:open|openat)\(")
    writes = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")
    # The standard library's own cache, where nobody has filled it yet, is Python's to fill.
    cache = re.escape(os.path.realpath(sysconfig.get_paths()["stdlib"])) + "/.*__pycache__"
    passed_over = re.compile(rf"\+\+\+ exited| --- SIG|\) += -1 |\"(?:{cache}|/dev/)")
    lines = [line for line in trace.splitlines() if not passed_over.search(line)]
    return [line for line in lines if writes.search(line) or not opens.search(line)]


def test_it_unpacks_nothing_and_writes_no_file(
        program: Path, home: Path, short: Path, start: Callable[..., Proxy]) -> None:  # fmt: skip
    # -D: the process that is started, and gets the signals, is the program.
    trace = short / "trace"
    proxy = start([need("strace", "strace"), "-D", *STRACE, trace, program], clean_env(home))
    works(proxy)
    ended = re.compile(rf"(?m)^{proxy.pid} +\+\+\+ exited with 0 ")
    wait_for(lambda: ended.search(trace.read_text()), message="the end of the trace")
    assert str(program) in trace.read_text()
    assert changes(trace.read_text()) == []
