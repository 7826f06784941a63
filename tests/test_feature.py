"""The dev container feature: packaged by the real tool, installed where no engine is needed."""

import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from conftest import SHIM, Proxy, clean_env, copy_tree, need, rows, run, set_up_debian

import ssh_agent_proxy

FILES = {"devcontainer-feature.json", "install.sh", "shim.sh"}
NOWHERE = "http://127.0.0.1:1/sign"
MAKE = "git init -q /tmp/made; cd /tmp/made; git commit -q --allow-empty -m 1; git cat-file -p HEAD"
FIRST = ["sh", "-euc", MAKE]
START = ["/usr/local/share/ssh-agent-proxy/post-start"]


@pytest.fixture(scope="module")
def feature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that is made for a repository's .devcontainer."""
    tree = copy_tree(tmp_path_factory.mktemp("feature") / "a tree")
    run(["make", "devcontainer-feature"], cwd=tree)
    return tree / "dist/devcontainer-feature/ssh-agent-proxy"


class Image:
    """A folder that stands in for an image: what is run in there has it as its root."""

    def __init__(self, root: Path, feature: Path) -> None:
        self.root = root
        for folder in ("dev", "proc", "etc", "tmp", "bin", "usr/bin", "usr/local/bin"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "tmp").chmod(0o1777)
        shutil.copytree(feature, root / "feature")

    def copy(self, program: str) -> None:
        path = need(program, program)
        for file in (path, *re.findall(r"/\S+", run(["ldd", path]).stdout.decode())):
            target = self.root / file.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)

    def run(self, *argv: str, user: str = "", **env: Any) -> Any:
        script = 'cd "$1"; mount --rbind /dev dev; mount -t proc proc proc; shift; exec chroot "$@"'
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        apart += ["--user", "--map-root-user"] if os.geteuid() else []
        env = {**clean_env(self.root / "tmp/home"), "HOME": "/tmp", "TMPDIR": "/tmp", **env}
        env["PATH"] = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        del env["GIT_CONFIG_NOSYSTEM"]
        apart += ["sh", "-euc", script, "-", str(self.root)]
        whole = [*apart, *([f"--userspec={user}"] if user else []), ".", *argv]
        return run(whole, env=env, check=False)

    def signs(self, proxy: Proxy, user: str = "") -> bool:
        """Is a commit that USER makes in there signed, before the container starts and after?"""
        ours = {"user": user, "SSH_AGENT_PROXY_URL": f"{proxy.url}/sign"}
        done = [self.run(*argv, **ours) for argv in (FIRST, START, FIRST)]
        assert not any(one.returncode for one in done), done
        before, _, after = (b"\ngpgsig -----BEGIN SSH SIGNATURE-----\n" in d.stdout for d in done)
        assert before is after
        return before


@pytest.fixture
def busybox(short: Path, feature: Path) -> Image:
    """With nothing but busybox: no bash, no package manager, no git."""
    image = Image(short / "image", feature)
    image.copy("busybox")
    assert image.run(need("busybox", "busybox"), "--install", "-s", "/bin").returncode == 0
    return image


@pytest.mark.alone
def test_the_package_holds_what_is_installed(tmp_path: Path, feature: Path) -> None:
    tool = Path(sys.prefix, "npm/node_modules/.bin/devcontainer")
    path, out = f"{sys.prefix}/bin:{os.environ['PATH']}", tmp_path / "out"
    package = [need(str(tool), "it by `make venv-npm`"), "features", "package", "-o", out]
    run([*package, feature.parent], env=clean_env(tmp_path, PATH=path))
    with tarfile.open(out / "devcontainer-feature-ssh-agent-proxy.tgz") as packed:
        members = {member.name.lstrip("./"): member for member in packed if member.isfile()}
        shim = packed.extractfile(members["shim.sh"])
        assert shim and shim.read() == SHIM.read_bytes()
    assert set(members) == FILES
    assert members["install.sh"].mode & 0o111
    (listed,) = json.loads((out / "devcontainer-collection.json").read_text())["features"]
    assert listed["id"] == feature.name
    assert listed["version"] == ssh_agent_proxy.VERSION


@pytest.mark.parametrize(("remote_only", "version", "why"), rows([
    ("none", "false", "", "missing: git curl ssh-keygen. Put them into the image (packages git,"),
    ("too old to sign", "false", "2.33.9", "git is 2.33.9, and SSH signatures need 2.34 or newer"),
    ("too old for remotes", "true", "2.35.1", "git is 2.35.1, and remoteOnly needs 2.36 or newer"),
]))  # fmt: skip
def test_a_git_that_is_missing_or_too_old_is_named_before_anything_is_installed(
        busybox: Image, remote_only: str, version: str, why: str) -> None:  # fmt: skip
    for program in ("git", "curl") if version else ():
        path = busybox.root / "usr/bin" / program
        path.write_text(f"#!/bin/sh\necho git version {version}\n")
        path.chmod(0o755)
    done = busybox.run("/feature/install.sh", REMOTEONLY=remote_only)
    assert done.returncode == 1
    assert why in done.stderr.decode()
    assert not (busybox.root / "usr/local/bin/ssh-agent-proxy-sign").exists()


@pytest.mark.parametrize(("remote_only", "signed"), [("false", True), ("true", False)])
def test_a_new_repository_signs_unless_only_those_with_a_remote_are_to(
        busybox: Image, proxy: Proxy, remote_only: str, signed: bool) -> None:  # fmt: skip
    for program in ("git", "curl"):
        busybox.copy(program)
    for _ in range(2):  # an image is built on one that has it
        assert busybox.run("/feature/install.sh", REMOTEONLY=remote_only).returncode == 0
    assert busybox.run(*START, SSH_AGENT_PROXY_URL=NOWHERE).returncode == 0  # whatever it says
    assert busybox.signs(proxy) is signed
    busybox.run("git", "-C", "/tmp/made", "remote", "add", "origin", "https://example.com/x")
    assert busybox.signs(proxy)


@pytest.mark.alone
def test_debian_gets_what_is_missing_and_any_user_signs(
        short: Path, feature: Path, proxy: Proxy) -> None:  # fmt: skip
    set_up_debian(short / "image", "bookworm")
    image = Image(short / "image", feature)
    for file in ("etc/resolv.conf", "etc/hosts"):
        shutil.copy(f"/{file}", image.root / file)
    for shell in ([], ["bash"]):  # by its first line that is dash
        assert image.run(*shell, "/feature/install.sh").returncode == 0
    assert shutil.which("ssh-keygen", path=image.root / "usr/bin")
    assert image.signs(proxy, "65534:65534")
