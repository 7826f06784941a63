"""What make builds: the same bytes wherever that is, and nothing but its own code when it runs."""

from __future__ import annotations

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
    PROXY,
    SHIM,
    Agent,
    Keys,
    Proxy,
    cannot_run,
    clean_env,
    http,
    need,
    run,
    wait_for,
)
from test_make import (
    MAKE,
    PYTHON,
    bound_by_modes,
    copy_project,
    files,
    make,
    mode,
    stand_in,
)

BUILD = Path("contrib", "build.py")


@pytest.fixture
def tree(short: Path) -> Path:
    return copy_project(short / "a tree")


# ---------------------------------------------------------------- what is built


def pythons() -> List[str]:
    """The interpreters of this machine that the project knows, the one of this run first."""
    found = [PYTHON, "/usr/bin/python3"]
    for number in range(9, 15):
        found.append(shutil.which(f"python3.{number}") or "")
    # A version manager's, beside the one of this run.
    found += map(str, sorted(Path(sys.base_prefix).parent.glob("3.*/bin/python3")))
    usable: List[str] = []
    for python in dict.fromkeys(os.path.realpath(python) for python in found if python):
        test = "import sys; sys.exit(sys.version_info < (3, 9))"
        try:
            if run([python, "-I", "-c", test], check=False).returncode == 0:
                usable.append(python)
        except OSError:
            pass  # there is none of that name
    return usable


def test_every_python_of_this_machine_builds_the_same_bytes(tree: Path, home: Path) -> None:
    built = {}
    for python in pythons():
        target = home / str(len(built))
        run([python, "-I", tree / BUILD, target, "/usr/bin/python3"], env=clean_env(home))
        built[python] = target.read_bytes()
    assert PYTHON in built
    assert len(set(built.values())) == 1, list(built)


def test_two_clones_at_two_times_are_built_to_the_same_bytes(
    tree: Path, home: Path, short: Path
) -> None:
    make(tree, home, "build", TZ="UTC")
    elsewhere = copy_project(short / "another clone")
    for name in ("ssh_agent_proxy.py", "shim.sh"):
        os.utime(elsewhere / name, (1, 2_000_000_000))
        (elsewhere / name).chmod(0o700)
    before = os.umask(0o077)
    try:
        make(elsewhere, home, "build", TZ="Asia/Tokyo", LANG="C", SOURCE_DATE_EPOCH="1")
    finally:
        os.umask(before)
    first, second = (path / "dist" / "ssh-agent-proxy" for path in (tree, elsewhere))
    assert first.read_bytes() == second.read_bytes()
    assert mode(first) == mode(second) == 0o755


def members(path: Path) -> Dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return {
            each.filename: (each.date_time, each.external_attr, archive.read(each.filename))
            for each in archive.infolist()
        }


def test_the_python_that_is_set_is_in_the_first_line_and_nowhere_else(
    tree: Path, home: Path
) -> None:
    built = tree / "dist" / "ssh-agent-proxy"
    make(tree, home, "build", f"PYTHON={PYTHON}")
    chosen = members(built)
    assert first_line(tree) == f"#!{PYTHON} -I\n"
    run([MAKE, "build"], cwd=tree, env=default_python(home))
    assert members(built) == chosen
    assert first_line(tree) == "#!/usr/bin/python3 -I\n"


def default_python(home: Path) -> Dict[str, str]:
    """An environment in which make's own default for PYTHON is the Python of this run."""
    return clean_env(home, PATH=stand_in(home / "default", "python3", f"exec '{PYTHON}' \"$@\""))


def test_zipapp_holds_the_sources_uncompressed(tree: Path, home: Path) -> None:
    make(tree, home, "build")
    assert files(tree / "dist") == ["ssh-agent-proxy"]
    assert mode(tree / "dist" / "ssh-agent-proxy") == 0o755
    with zipfile.ZipFile(tree / "dist" / "ssh-agent-proxy") as archive:
        members = {member.filename: member for member in archive.infolist()}
        assert set(members) == {"__main__.py", "shim.sh", "ssh_agent_proxy.py"}
        assert {m.compress_type for m in members.values()} == {zipfile.ZIP_STORED}
        assert {m.external_attr >> 16 for m in members.values()} == {0o100644}
        assert archive.read("shim.sh") == (tree / "shim.sh").read_bytes()
        assert archive.read("ssh_agent_proxy.py") == (tree / "ssh_agent_proxy.py").read_bytes()


def first_line(tree: Path) -> str:
    with open(tree / "dist" / "ssh-agent-proxy", "rb") as f:
        return f.readline().decode()


def test_zipapp_runs_with_the_python_of_the_environment(tree: Path, home: Path) -> None:
    make(tree, home, "build", PYTHON=PYTHON)
    assert first_line(tree) == f"#!{PYTHON} -I\n"


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
    built = tree / "dist" / "ssh-agent-proxy"
    before = built.stat()
    make(tree, home, "build")
    assert (built.stat().st_ino, built.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    built.write_bytes(b"something else")
    make(tree, home, "build")
    assert zipfile.is_zipfile(built)


def test_an_interrupted_build_leaves_the_old_one_and_nothing_else(tree: Path, home: Path) -> None:
    make(tree, home, "build")
    built = tree / "dist" / "ssh-agent-proxy"
    built.write_bytes(b"the old one")
    # The moment at which the new one stands beside it.
    script = (
        "import pathlib, runpy, sys\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        "pathlib.Path.replace = interrupted\n"
        f"sys.argv = ['build.py', {str(built)!r}, '/usr/bin/python3']\n"
        f"runpy.run_path({str(tree / BUILD)!r}, run_name='__main__')\n"
    )
    assert run([PYTHON, "-c", script], env=clean_env(home), check=False).returncode != 0
    assert built.read_bytes() == b"the old one"
    assert files(tree / "dist") == ["ssh-agent-proxy"]


@pytest.mark.parametrize("target", ["build-darwin"])
def test_a_target_that_is_another_name_for_build(tree: Path, home: Path, target: str) -> None:
    make(tree, home, "build")
    built = (tree / "dist" / "ssh-agent-proxy").read_bytes()
    make(tree, home, "clean")
    make(tree, home, target)
    assert files(tree / "dist") == ["ssh-agent-proxy"]
    assert (tree / "dist" / "ssh-agent-proxy").read_bytes() == built


def test_the_scripts_own_metadata_is_what_uv_and_pipx_read() -> None:
    # As the specification of inline script metadata has it: one block, TOML behind "# ".
    lines = PROXY.read_text("utf-8").split("\n")
    begin = lines.index("# /// script")
    end = lines.index("# ///")
    assert [line for line in lines if re.match(r"# /// \w", line)] == ["# /// script"]
    content = lines[begin + 1 : end]
    assert all(line == "#" or line.startswith("# ") for line in content)
    text = "\n".join(line[2:] for line in content)
    assert text == 'requires-python = ">=3.9"'  # no dependency
    if sys.version_info >= (3, 11):
        import tomllib

        assert tomllib.loads(text) == {"requires-python": ">=3.9"}


# ---------------------------------------------------------------- what runs


@pytest.fixture
def program(tree: Path, home: Path, short: Path) -> Path:
    """As installed; what is installed does not need the tree that it came from."""
    make(tree, home, "install", f"BINDIR={short}/a bin")
    shutil.rmtree(tree)
    return short / "a bin" / "ssh-agent-proxy"


@pytest.fixture
def start(home: Path) -> Iterator[Callable[..., Proxy]]:
    """start(PROGRAM, AGENT, ENV): `serve`, listening."""
    started: List[Proxy] = []

    def start(argv: List[Any], agent: Agent, env: Dict[str, str]) -> Proxy:
        words = [*argv, "--addr", "127.0.0.1:0", "--upstream", agent.sock]
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
    program: Path, agent: Agent, home: Path, start: Callable[..., Proxy]
) -> None:
    proxy = start([program], agent, clean_env(home))
    longer = program.with_name("longer")
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(longer, "x") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content if name == "__main__.py" else b"# another\n" + content)
    longer.replace(program)
    assert http(proxy.port, "GET", "/shim").body == SHIM.read_bytes()
    program.unlink()
    assert http(proxy.port, "GET", "/shim").body == SHIM.read_bytes()


def test_it_tells_the_version_of_the_source(program: Path, home: Path) -> None:
    version = re.search(r'(?m)^VERSION = "(.+)"', PROXY.read_text("utf-8"))
    assert version
    told = run([program, "--version"], env=clean_env(home)).stdout.decode()
    assert told == f"ssh-agent-proxy {version.group(1)}\n"


# How it may be called. It is in "a bin"; the folder that is worked in, "cwd", is hostile.
WAYS = {
    "by its path": "exec '../a bin/ssh-agent-proxy'",
    "from its folder": "cd '../a bin' && exec ./ssh-agent-proxy",
    "on the PATH": "PATH=\"$PWD/../a bin:$PATH\" && exec ssh-agent-proxy",
    "a link to it": "ln -s '../a bin/ssh-agent-proxy' link && exec ./link",
    "a link beside it": "cd '../a bin' && ln -s ssh-agent-proxy link && exec ./link",
    "a link to a link": "ln -s '../a bin/ssh-agent-proxy' one && ln -s one two && exec ./two",
    "a link on the PATH": "ln -s \"$PWD/../a bin/ssh-agent-proxy\" agent-proxy && "
    'PATH="$PWD:$PATH" && exec agent-proxy',
    "a link to its folder": "ln -s '../a bin' folder && exec folder/ssh-agent-proxy",
    "by an interpreter": "cp '../a bin/ssh-agent-proxy' x.pyz && exec PYTHON -I x.pyz",
}


def mark(path: Path) -> str:
    return f"open({str(path)!r}, 'a').write(__name__ + '\\n')\n"


def lay_out_modules(folder: Path, ran: Path) -> None:
    """A file for each name that might be imported, which tells when it runs."""
    folder.mkdir(exist_ok=True)
    names = {"ssh_agent_proxy", "sitecustomize", "usercustomize", "__main__", "zipimport"}
    for path in Path(sysconfig.get_paths()["stdlib"]).iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            names.add(path.stem)
    # Without those that it starts with, it would end before it has run anything.
    loaded = run([PYTHON, "-I", "-c", "import sys; print(*sys.modules)"]).stdout.decode().split()
    for name in names - set(loaded) | {"__main__"}:
        (folder / f"{name}.py").write_text(mark(ran))
    (folder / "http.py").unlink()  # a package goes first, anyway
    (folder / "http").mkdir()
    (folder / "http" / "__init__.py").write_text(mark(ran))
    (folder / "shim.sh").write_text("echo another shim\n")
    (folder / "evil.pth").write_text(f"import sys; {mark(ran)}")
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
    return clean_env(
        home,
        PYTHONPATH=short / "cwd",
        PYTHONSTARTUP=short / "cwd" / "hmac.py",
        PYTHONUSERBASE=short / "base",
        PYTHONPYCACHEPREFIX=short / "cache",
    )


@pytest.mark.parametrize(
    ("script", "name"),
    [("import hmac", "hmac"), ("", "sitecustomize"), ("", "usercustomize")],
)
def test_the_hostile_modules_would_run(
    hostile: Dict[str, str], short: Path, script: str, name: str
) -> None:
    if name == "usercustomize":
        hostile["PYTHONPATH"] = ""
    run([PYTHON, "-c", script], env=hostile, cwd=short / "cwd", check=False)
    assert name in (short / "ran").read_text().split()


@pytest.mark.parametrize("way", WAYS)
def test_it_runs_no_code_but_its_own(
    way: str,
    program: Path,
    hostile: Dict[str, str],
    short: Path,
    agent: Agent,
    keys: Keys,
    start: Callable[..., Proxy],
) -> None:
    agent.add(keys["ed25519"])
    lay_out_modules(short / "a bin", short / "ran")
    for name in ("PYTHONHOME", "PYTHONPLATLIBDIR", "PYTHONINSPECT", "PYTHONWARNINGS"):
        hostile[name] = str(short / "cwd")
    line = WAYS[way].replace("PYTHON", shlex.quote(PYTHON))
    argv = ["sh", "-c", f'cd "$0" && {line} "$@"', short / "cwd"]
    works(start([*argv, "-v"], agent, hostile))
    assert not (short / "ran").exists(), (short / "ran").read_text()
    assert not (short / "cache").exists()


@pytest.mark.parametrize("way", WAYS)
def test_it_prints_the_shim_byte_for_byte(
    way: str, program: Path, home: Path, short: Path
) -> None:
    (short / "cwd").mkdir()
    (short / "cwd" / "shim.sh").write_text("echo another shim\n")
    line = WAYS[way].replace("PYTHON", shlex.quote(PYTHON))
    printed = run(["sh", "-c", f"{line} shim"], env=clean_env(home), cwd=short / "cwd").stdout
    assert printed == SHIM.read_bytes()


# ---------------------------------------------------------------- homes


HOMES = ["read-only", "closed", "missing", "a file", "not set", "empty"]


@pytest.fixture(params=HOMES)
def odd_home(request: pytest.FixtureRequest, home: Path, short: Path) -> Iterator[Dict[str, str]]:
    """An environment whose HOME can't be written to."""
    env = clean_env(home)
    odd = short / "odd home"
    env["HOME"] = str(odd)
    if request.param in ("read-only", "closed"):
        odd.mkdir(mode=0o500 if request.param == "read-only" else 0)
    elif request.param == "a file":
        odd.write_text("")
    elif request.param == "empty":
        env["HOME"] = ""
    elif request.param == "not set":
        del env["HOME"]
    yield env
    if odd.is_dir():
        odd.chmod(0o700)


def test_a_home_that_is_closed_is_closed_to_the_test(short: Path) -> None:
    (short / "odd home").mkdir(mode=0o500)
    done = run([*bound_by_modes(), "mkdir", short / "odd home" / "x"], check=False)
    assert done.returncode != 0


def test_it_works_without_a_home_to_write_to(
    program: Path,
    odd_home: Dict[str, str],
    agent: Agent,
    keys: Keys,
    start: Callable[..., Proxy],
) -> None:
    agent.add(keys["ed25519"])
    works(start([*bound_by_modes(), program], agent, odd_home))


# ---------------------------------------------------------------- what it writes

OPENING = re.compile(r'\b(?:open|openat|openat2|creat)\((?:AT_FDCWD, |\d+, )?"([^"]*)".*')


def written(trace: str) -> List[str]:
    """The paths that a trace of system calls shows as opened for writing, made, or changed."""
    found = []
    for line in trace.splitlines():
        if "+++ exited" in line or " --- SIG" in line:
            continue
        opened = OPENING.search(line)
        if opened and re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|creat\(", line):
            found.append(opened.group(1))
        elif not opened and not re.search(r"\) += -1 ", line):
            found.append(line)
    # The standard library's own cache, where nobody has filled it yet, is Python's to fill.
    own = [re.escape(os.path.realpath(sysconfig.get_paths()["stdlib"])) + "/.*__pycache__", "/dev/"]
    return [path for path in found if not re.match("|".join(own), path)]


def whole_trace(trace: Path, pid: int) -> str:
    text = trace.read_text()
    return text if re.search(rf"(?m)^{pid} +\+\+\+ exited with 0 ", text) else ""


# ("?": a system that has no such call is no error.)
TRACED = (
    "open", "openat", "creat", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "link",
    "linkat", "symlink", "symlinkat", "mknod", "mknodat", "truncate", "unlink", "unlinkat", "rmdir",
)  # fmt: skip


def test_it_unpacks_nothing_and_writes_no_file(
    program: Path,
    home: Path,
    short: Path,
    agent: Agent,
    keys: Keys,
    start: Callable[..., Proxy],
) -> None:
    agent.add(keys["ed25519"])
    before = files(home), files(short / "a bin")
    calls = ",".join(f"?{call}" for call in TRACED)
    trace = short / "trace"
    # -D: the process that is started, and gets the signals, is the program.
    argv = [need("strace", "strace"), "-D", "-f", "-e", f"trace={calls}", "-o", trace]
    proxy = start([*argv, program], agent, clean_env(home))
    works(proxy)
    text = wait_for(lambda: whole_trace(trace, proxy.pid), message="the end of the trace")
    assert str(program) in text
    assert written(text) == []
    assert (files(home), files(short / "a bin")) == before


def test_a_trace_tells_what_is_written(home: Path, short: Path) -> None:
    # Else the test above would hold whatever the program did.
    script = f"import os; open({str(home / 'made')!r}, 'w'); os.mkdir({str(home / 'folder')!r})"
    argv = [need("strace", "strace"), "-f", "-e", "trace=open,openat,mkdir,mkdirat", "-o"]
    run([*argv, short / "trace", PYTHON, "-I", "-c", script], env=clean_env(home))
    told = written((short / "trace").read_text())
    assert told[0] == str(home / "made")
    assert str(home / "folder") in told[1]
    assert len(told) == 2


# ---------------------------------------------------------------- with git


@pytest.mark.parametrize("form", ["zipapp", "shiv"])
def test_a_commit_is_signed_by_what_is_built(
    form: str,
    request: pytest.FixtureRequest,
    home: Path,
    agent: Agent,
    keys: Keys,
    start: Callable[..., Proxy],
) -> None:
    agent.add(keys["ed25519"])
    built = request.getfixturevalue("program" if form == "zipapp" else "shiv")
    proxy = start([built], agent, clean_env(home))
    # The shim as the program hands it out.
    shim = home / "ssh-agent-proxy-sign"
    shim.write_bytes(run([built, "shim"], env=clean_env(home)).stdout)
    shim.chmod(0o755)
    signers = home / "signers"
    signers.write_text(f"committer@example.com {keys.line('ed25519')}\n")
    git = [need("git", "git"), "-C", home / "repository"]
    env = clean_env(home, SSH_AGENT_PROXY_URL=f"{proxy.url}/sign")
    run([*git[:1], "init", "-q", home / "repository"], env=env)
    for setting in (
        "gpg.format=ssh",
        f"gpg.ssh.program={shim}",
        f"gpg.ssh.defaultKeyCommand={shim} key",
        f"gpg.ssh.allowedSignersFile={signers}",
    ):
        run([*git, "config", *setting.split("=", 1)], env=env)
    run([*git, "commit", "-q", "-S", "--allow-empty", "-m", "signed"], env=env)
    told = run([*git, "verify-commit", "HEAD"], env=env).stderr.decode()
    assert 'Good "git" signature for committer@example.com' in told
    assert proxy.stop() == 0


# ---------------------------------------------------------------- an old Python


def test_an_old_python_is_told_so(
    program: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 18))
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(program), run_name="__main__")
    assert ended.value.code == "ssh-agent-proxy needs Python 3.9 or newer, this is 3.8"


# ---------------------------------------------------------------- through shiv


def shiv_python() -> str:
    """The Python of the venv that runs the tests; make puts shiv into it."""
    if not importlib.util.find_spec("shiv"):
        cannot_run("shiv is missing: make test installs it, or pip install shiv")
    return sys.executable


def build_shiv(tree: Path, home: Path, target: Path, **env: str) -> Path:
    argv = [PYTHON, "-I", tree / BUILD, target, PYTHON, shiv_python()]
    run(argv, env=clean_env(home, **env))
    return target


@pytest.fixture
def shiv(tree: Path, home: Path, short: Path) -> Path:
    (short / "a bin").mkdir()
    target = build_shiv(tree, home, short / "a bin" / "ssh-agent-proxy")
    shutil.rmtree(tree)
    return target


def test_make_builds_it_with_the_shiv_of_its_venv(tree: Path, home: Path) -> None:
    venv = tree / ".venv" / "{}.{}".format(*sys.version_info[:2])
    # This run's own venv, with what make leaves in one when it has made it and put shiv into it.
    venv.mkdir(parents=True)
    for name in ("bin", "lib", "pyvenv.cfg"):
        (venv / name).symlink_to(Path(shiv_python()).parent.parent / name)
    (venv / "made-of").write_text(f"{PYTHON}\n")
    (venv / "has-shiv").write_text("")
    make(tree, home, "build-all")
    dist = tree / "dist"
    assert files(dist) == ["ssh-agent-proxy", "ssh-agent-proxy.shiv"]
    other = build_shiv(tree, home, home / "built by hand")
    assert (dist / "ssh-agent-proxy.shiv").read_bytes() == other.read_bytes()
    assert mode(dist / "ssh-agent-proxy.shiv") == 0o755
    assert zipapp_of(dist / "ssh-agent-proxy")["ssh_agent_proxy.py"] == (
        tree / "ssh_agent_proxy.py"
    ).read_bytes()


def zipapp_of(path: Path) -> Dict[str, bytes]:
    return {name: content for name, (_, _, content) in members(path).items()}


def test_two_builds_through_shiv_are_byte_identical(tree: Path, home: Path, short: Path) -> None:
    first = build_shiv(tree, home, home / "first", TZ="UTC")
    elsewhere = copy_project(short / "another clone")
    for name in ("ssh_agent_proxy.py", "shim.sh"):
        os.utime(elsewhere / name, (1, 2_000_000_000))
        (elsewhere / name).chmod(0o700)
    before = os.umask(0o077)
    try:
        env = {"TZ": "Asia/Tokyo", "LANG": "C", "SOURCE_DATE_EPOCH": "1700000000"}
        second = build_shiv(elsewhere, home, home / "second", **env)
    finally:
        os.umask(before)
    assert first.read_bytes() == second.read_bytes()
    assert mode(first) == mode(second) == 0o755


def test_what_shiv_makes_holds_the_same_sources_uncompressed(shiv: Path) -> None:
    found = zipapp_of(shiv)
    assert found["site-packages/ssh_agent_proxy.py"] == PROXY.read_bytes()
    assert found["site-packages/shim.sh"] == SHIM.read_bytes()
    with zipfile.ZipFile(shiv) as archive:
        assert archive.testzip() is None
        assert {each.compress_type for each in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {each.external_attr >> 16 for each in archive.infolist()} == {0o100644}
        assert {each.date_time for each in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert shiv.read_bytes().startswith(f"#!{PYTHON} -I\n".encode())


def test_it_tells_its_version_through_shiv(shiv: Path, home: Path) -> None:
    env = clean_env(home)
    told = run([shiv, "--version"], env=env).stdout
    assert told == run([PYTHON, "-I", PROXY, "--version"], env=env).stdout
    wrong = run([shiv, "--addr", "nonsense"], env=env, check=False)
    assert wrong.returncode == 2, "the program's own exit status"


def test_a_failing_shiv_is_told_and_leaves_nothing(tree: Path, home: Path) -> None:
    stand_in(home / "bad", "python", "exit 3")
    argv = [PYTHON, "-I", tree / BUILD, home / "built", PYTHON, home / "bad" / "python"]
    answer = run(argv, env=clean_env(home), check=False)
    assert answer.stderr == b"build: shiv failed, with exit status 3\n"
    assert not (home / "built").exists()
    assert files(home / "tmp") == []


def test_through_shiv_it_unpacks_into_shiv_root_and_nowhere_else(
    shiv: Path,
    odd_home: Dict[str, str],
    short: Path,
    agent: Agent,
    keys: Keys,
    start: Callable[..., Proxy],
) -> None:
    agent.add(keys["ed25519"])
    odd_home["SHIV_ROOT"] = str(short / "root")
    (short / "root").mkdir()
    works(start([*bound_by_modes(), shiv], agent, odd_home))
    unpacked = {Path(name).name for name in files(short / "root")}
    assert {"shim.sh", "ssh_agent_proxy.py"} <= unpacked
    assert not (short / "odd home").is_dir() or files(short / "odd home") == []


def test_through_shiv_it_dies_where_it_can_unpack_nowhere(
    shiv: Path, home: Path, short: Path
) -> None:
    (short / "odd home").mkdir(mode=0o500)
    env = clean_env(home, HOME=short / "odd home")
    answer = run([*bound_by_modes(), shiv, "--version"], env=env, check=False)
    assert answer.returncode == 1
    assert b"PermissionError" in answer.stderr


def test_through_shiv_a_source_that_was_edited_does_not_run(shiv: Path, home: Path) -> None:
    env = clean_env(home)
    run([shiv, "--version"], env=env)
    unpacked = next(home.glob(".shiv/*/site-packages"))
    for name in ("ssh_agent_proxy.py", "hmac.py"):
        before = (unpacked / name).read_text() if (unpacked / name).exists() else None
        (unpacked / name).write_text(mark(home / "ran"))
        answer = run([shiv, "--version"], env=env, check=False)
        assert answer.returncode == 1
        assert b"has been modified" in answer.stderr
        assert not (home / "ran").exists()
        if before is None:
            (unpacked / name).unlink()
        else:
            (unpacked / name).write_text(before)
    run([shiv, "--version"], env=env)


def test_through_shiv_pythonpath_is_not_obeyed(
    shiv: Path, hostile: Dict[str, str], short: Path
) -> None:
    run([shiv, "--version"], env=hostile, cwd=short / "cwd")
    assert not (short / "ran").exists()
