"""Who calls ssh-keygen to sign: each as its source has it, and those that Debian has, really."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Iterator, List

import pytest
from conftest import SHIM, Agent, Keys, cannot_run, clean_env, commit, need, rows, run
from test_shim import Served, Shim, serve, tree

# ---------------------------------------------------------------- as their sources have it

# What was read is named by its version, or by the commit that the file was taken from. Temporary
# files are called as theirs are; those that hold a literal key have no line end.
CALLERS = [
    # git 2.55, gpg-interface.c
    ("git", "-Y sign -n git -f key.pub .git_signing_buffer_tmpAb3dEf"),
    ("git, literal", "-Y sign -n git -f .git_signing_key_tmpAb3dEf -U .git_signing_buffer_tmpX"),
    ("git, principals", "-Y find-principals -f signers -s old.sig -Overify-time=20231114221320"),
    ("git, verify", "-Y verify -n git -f signers -I me@a -s old.sig -Overify-time=20231114"),
    ("git, unknown", "-Y check-novalidate -n git -s old.sig -Overify-time=20231114221320"),
    # jj, lib/src/ssh_signing.rs, 081ecb809a31; standard output is the signature
    ("jj", "-Y sign -f key.pub -n git"),
    ("jj, literal key", "-Y sign -f jj-signing-key-Ab3dEf -n git"),
    ("jj, principals", "-Y find-principals -f signers -s old.sig"),
    ("jj, verify", "-Y verify -s old.sig -I me@a -f signers -n git"),
    ("jj, unknown", "-Y check-novalidate -s old.sig -n git"),
    # GitButler, crates/but-core/src/commit/mod.rs, 0200aa5e061f
    ("GitButler", "-Y sign -n git -f .tmpAb3dEf -U .tmpGh6jKl"),
    # gitui, asyncgit/src/sync/sign.rs, 04275401b6bb (-U where the program is called ssh-keygen)
    ("gitui", "-Y sign -n git -f key.pub -U"),
    # git-ps, src/ps/private/git/signers/ssh_signer.rs, 036192053573
    ("git-ps", "-Y sign -n git -f .tmp_signing_key"),
    # Sapling, eden/scm/sapling/signing.py
    ("Sapling", "-Y sign -n git -f .sl_signing_key_ab3def_h -U .sl_signing_buffer_ab3def_h"),
    # dulwich 1.2.21, dulwich/signature.py: its signer is always called git
    ("dulwich", "-Y sign -f key.pub -n git data.git"),
    ("dulwich, verify", "-Y verify -f signers -I git -n git -s old.sig"),
    # patatt 0.8.0, which attests the kernel's patches
    ("patatt", "-Y sign -n patatt -f key.pub"),
    ("patatt, fingerprint", "-l -f key.pub"),
    # The page on which Gitea and Forgejo have a key proved
    ("Gitea", "-Y sign -n gitea -f key.pub"),
    # What manuals tell people
    ("a person", "-Y sign -f key -n file data.git .tmpGh6jKl"),
    ("a person, input", "-q -Y sign -n file -f key -"),
]


@pytest.fixture(scope="module")
def served(agent_with_key: Agent) -> Iterator[Served]:
    with serve(agent_with_key, "--namespace", "git,file,patatt,gitea") as env:
        yield env


def lay_out(folder: Path, argv: List[str], keys: Keys) -> None:
    folder.mkdir()
    for name in ("key", "key.pub"):
        shutil.copy(keys["ed25519"].with_suffix(Path(name).suffix), folder / name)
    line = keys.line("ed25519")
    (folder / "signers").write_text(f"me@a,git {line}\n")
    for before, word in zip(argv, argv[1:]):  # what it makes itself
        if word.startswith((".", "jj-", "data")):
            (folder / word).write_bytes(line.encode() if before == "-f" else commit())
    (folder / "old").write_bytes(commit())
    run(["ssh-keygen", "-q", "-Y", "sign", "-n", "git", "-f", "key", "old"], cwd=folder)


@pytest.mark.parametrize("command", rows(CALLERS))
def test_a_caller_gets_what_ssh_keygen_would_give_it(
    command: str, keys: Keys, served: Served, tmp_path: Path, home: Path
) -> None:
    """Its users could not sign, or would see good signatures called bad."""
    shim, argv = Shim("dash", tmp_path, home), command.split()
    shim.folder, theirs = tmp_path / "ours", tmp_path / "theirs"
    lay_out(shim.folder, argv, keys)
    ours = shim(*argv, input=commit(), env=served)
    lay_out(theirs, argv, keys)
    env = clean_env(home, SSH_AUTH_SOCK=served.agent.sock)
    expected = run(["ssh-keygen", *argv], env, theirs, commit())
    (theirs / ".git_signing_key_tmpAb3dEf").unlink(missing_ok=True)  # of which git leaves its own
    assert (ours.returncode, ours.stdout) == (0, expected.stdout)
    assert tree(shim.folder) == tree(theirs)


# ---------------------------------------------------------------- as Debian has them

PACKAGES = "git,openssh-client,curl,jujutsu,stgit,git-absorb,python3-dulwich,patatt"
GIT = """\
[user]
    name = Me
    email = me@example.com
    signingkey = /root/key.pub
[gpg]
    format = ssh
[gpg "ssh"]
    program = /usr/local/bin/ssh-agent-proxy-sign
    allowedSignersFile = /root/signers
[commit]
    gpgsign = true
[patatt]
    ssh-keygen-bin = /usr/local/bin/ssh-agent-proxy-sign
    signingkey = openssh:/root/key.pub
    keyringsrc = /root/keyring
"""
# Each is run in a new repository; at the end all that HEAD reaches is verified.
START = """\
exec 2>&1; cd "$(mktemp -d)"; git init -q -b main
add() { echo "$1" >"$1"; git add "$1"; git commit -q -m "$1"; }
add base
"""
END = "\ngit log --format=%G? | sort -u"
JJ = """\
signing='{ backend = "ssh", behavior = "own", backends.ssh.program = "ssh-agent-proxy-sign" }'
jj() { command jj --quiet --config "signing=$signing" --config "signing.key='KEY'" "$@"; }
says() { jj "$@" log --no-graph -r @- -T 'signature.status() ++ " " ++ description'; }
jj git init --colocate .; echo 1 >a; jj commit -m one; jj describe -r @- -m two
says; says --config signing.backends.ssh.allowed-signers=/root/signers"""
JJ_SAYS = "unknown two\ngood two\nG\n"

REAL = {
    "git": ("""add a; add b; git tag -s -m v1 v1; git verify-tag v1 2>&1 | cut -c -4
        git checkout -q -b side HEAD~1; add c; git rebase -q main; add d; git checkout -q main
        git merge -q --no-ff -m merge side; git commit -q --amend -m new
        git revert --no-edit -m 1 HEAD >/dev/null""", "Good\nG\n"),
    "stgit": ("""stg init; stg new -m one; echo 1 >a; git add a; stg refresh; stg new --sign -m two
        echo 1 >b; git add b; stg refresh; stg pop; stg push; stg edit -m 2""", "G\n"),
    "git-absorb": ("""add a; add b; add c; echo more >>b; echo more >>c; git add .
        git absorb --base HEAD~2 --and-rebase""", "G\n"),
    "dulwich": ("""python3 -c '
from dulwich import porcelain as p
p.verify_commit(".", p.commit(".", message=b"two", sign=True))
p.tag_create(".", b"v1", message=b"x", annotated=True, sign=True)
p.verify_tag(".", b"v1")'
        git verify-tag v1 2>&1 | cut -c -4""", "Good\nG\n"),
    "patatt": ("""printf '%s\\n' 'From: Me <me@example.com>' 'Subject: one' '' text >mail
        patatt sign mail; patatt validate <mail""", "  PASS | me@example.com, -\nG\n"),
    "jj, a path": (JJ.replace("KEY", "/root/key.pub"), JJ_SAYS),
    "jj, a literal key": (JJ, JJ_SAYS),
    "jj, no such file": (JJ.replace("KEY", "~/new/key"), JJ_SAYS),
}  # fmt: skip


@pytest.fixture
def debian(keys: Keys, tmp_path: Path) -> Iterator[Path]:
    """The newest one in a folder, whose root signs through the shim."""
    need("mmdebstrap", "mmdebstrap")
    if os.geteuid():
        cannot_run("only root can set a Debian up in a folder: sudo make test-all")
    which = ["--format", "$(SITE)", "Created-By: Packages", "Label: Debian"]
    mirror = run(["apt-get", "indextargets", *which]).stdout.decode().split("\n")[0]
    root = tmp_path / "debian"
    options = ["--quiet", "--variant=apt", f"--include={PACKAGES}"]
    options += ["--aptopt=Acquire::Check-Valid-Until no"]  # of a mirror that is behind
    done = run(["mmdebstrap", *options, "testing", root, mirror], check=False, timeout=600)
    if done.returncode:
        cannot_run(f"no Debian from {mirror}: {done.stderr.decode().splitlines()[:1]}")
    shutil.copy(SHIM, root / "usr/local/bin/ssh-agent-proxy-sign")
    home, line = root / "root", keys.line("ed25519")
    (home / "keyring/openssh/example.com/me").mkdir(parents=True)
    for name in ("key.pub", "keyring/openssh/example.com/me/default"):
        (home / name).write_text(line)
    (home / "signers").write_text(f"me@example.com,git {line}")
    (home / ".gitconfig").write_text(GIT)
    yield root
    shutil.rmtree(root)


@pytest.mark.alone
def test_what_callers_make_is_signed_and_verifies(
    keys: Keys, served: Served, debian: Path
) -> None:
    """They would make commits that nobody can tell from anyone's."""
    inside = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child",
              "--mount-proc", "--root", debian, "--wd", "/", "bash", "-euc"]  # fmt: skip
    env = {"HOME": "/root", "PATH": "/usr/local/bin:/usr/bin:/bin", "EDITOR": "true", **served}
    said = {}
    for name, (script, _) in REAL.items():
        script = START + script.replace("KEY", keys.line("ed25519")) + END
        said[name] = run([*inside, script], env, check=False).stdout.decode()
    assert {name: said[name] for name in REAL if not said[name].endswith(REAL[name][1])} == {}
