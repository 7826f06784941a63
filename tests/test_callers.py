"""Who calls ssh-keygen to sign, as Debian has them."""

import shutil
from pathlib import Path

import pytest
from conftest import GIT_CONFIG, SHIM, Keys, run, set_up_debian
from test_shim import Served, served

__all__ = ["served"]  # a fixture

OURS = "/usr/local/bin/ssh-agent-proxy-sign"
PACKAGES = "git,openssh-client,curl,jujutsu,stgit,git-absorb,python3-dulwich,patatt"
GIT = GIT_CONFIG.format(program=OURS, signers="/root/signers", public="/root/key.pub") + f"""\
[user]
    name = Me
    email = me@example.com
[patatt]
    ssh-keygen-bin = {OURS}
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
    "setup, hooks of git's settings": ("""git config --global hook.x.command false
        git config --global hook.x.event reference-transaction # from git 2.54 on
        ssh-agent-proxy-sign setup | tail -n 1; git config --global --remove-section hook.x""",
        "will be signed, and verify\nG\n"),
}  # fmt: skip


@pytest.mark.alone
def test_what_callers_make_is_signed_and_verifies(
        keys: Keys, served: Served, tmp_path: Path) -> None:  # fmt: skip
    """They would make commits that nobody can tell from anyone's."""
    debian, line = tmp_path / "debian", keys.line("ed25519")
    set_up_debian(debian, "testing", f"--include={PACKAGES}")
    shutil.copy(SHIM, debian / OURS[1:])
    home = debian / "root"
    (home / "keyring/openssh/example.com/me").mkdir(parents=True)
    for name in ("key.pub", "keyring/openssh/example.com/me/default"):
        (home / name).write_text(line)
    (home / "signers").write_text(f"me@example.com,git {line}")
    (home / ".gitconfig").write_text(GIT)
    inside = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child",
              "--mount-proc", "--root", debian, "--wd", "/", "bash", "-euc"]  # fmt: skip
    env = {"HOME": "/root", "PATH": "/usr/local/bin:/usr/bin:/bin", "EDITOR": "true", **served}
    said = {}
    for name, (script, _) in REAL.items():
        script = START + script.replace("KEY", line) + END
        said[name] = run([*inside, script], env, check=False).stdout.decode()
    assert {name: said[name] for name in REAL if not said[name].endswith(REAL[name][1])} == {}
    shutil.rmtree(debian)
