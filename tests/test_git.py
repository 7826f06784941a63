"""Real git, signing through the shim and the proxy, and verifying what came out."""

import os
import re
import shlex
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, List, Set

import pytest
from conftest import (
    SHIM, Agent, Keys, Proxy, Repository, fingerprint, message, private_file, read_message, rows,
    run,
)  # fmt: skip

BEGIN = b"-----BEGIN SSH SIGNATURE-----\n"
COMMITTER = "committer@example.com"
URL = "SSH_AGENT_PROXY_URL"
NOWHERE = {URL: "http://127.0.0.1:1/sign"}


@pytest.fixture
def repository(home: Path, keys: Keys, proxy: Proxy) -> Repository:
    """Signs with the key in ed25519.pub, through the proxy in front of the agent that holds it."""
    return Repository(home, f"{proxy.url}/sign", keys["ed25519"].with_suffix(".pub"))


def name_the_key(way: str, repository: Repository, program: Path = SHIM) -> None:
    home, public = repository.path.parent, repository.public
    if way == "command":
        repository.git("config", "--global", "--unset", "user.signingkey")
        command = f"{shlex.quote(str(program))} key"
        repository.git("config", "--global", "gpg.ssh.defaultKeyCommand", command)
        return
    if way == "private file":  # only its .pub stands there, as in a container
        shutil.copy(public, home / "key.pub")
    named = {
        "public file": public,
        "private file": home / "key",
        "literal": f"key::{public.read_text()}",
        "literal without key::": public.read_text(),
        "missing file": home / "keys/signing.pub",
        "missing private file": home / "keys/signing",
    }
    repository.git("config", "--global", "user.signingkey", named[way])


WAYS = ["public file", "private file", "literal", "literal without key::", "missing file",
        "missing private file", "command"]  # fmt: skip


def signatures(repository: Repository, *revisions: str) -> List[str]:
    """What git says of the signature of each commit, by default of those that HEAD reaches."""
    return repository.git("log", "--format=%G?", *revisions).split()


def left_behind(repository: Repository) -> Set[str]:
    """What stands in TMPDIR and is not git's own: it leaves the file of a literal key there."""
    names = os.listdir(repository.env["TMPDIR"])
    return {name for name in names if not name.startswith(".git_signing_key_tmp")}


def refused(repository: Repository) -> str:
    """Tries a commit, which must leave everything as it was; what git says."""
    (repository.path / "more").touch()
    repository.git("add", "more")
    state = ["status", "--porcelain=v2", "--branch", "--ignored"]
    before = repository.git(*state)
    done = repository.run("commit", "-m", "more", check=False)
    assert done.returncode != 0
    assert repository.git(*state) == before
    assert left_behind(repository) == set()
    said = done.stderr.decode()
    assert "usage:" not in said
    return said


# ---------------------------------------------------------------- every flow that signs

GOOD = f'Good "git" signature for {COMMITTER} with ED25519 key SHA256:'


@pytest.mark.parametrize("id_format", ["sha1", "sha256"])
def test_a_commit_and_a_tag_are_verified_by_git_and_signed_as_by_ssh_keygen(
    id_format: str, home: Path, keys: Keys, proxy: Proxy, ssh_keygen: Callable[[bytes], bytes]
) -> None:
    public = keys["ed25519"].with_suffix(".pub")
    repository = Repository(home, f"{proxy.url}/sign", public, id_format)
    repository.commit("one")
    assert GOOD in repository.git("log", "--show-signature", "-1")
    assert GOOD in repository.run("verify-commit", "HEAD").stderr.decode()
    stored = repository.run("cat-file", "commit", "HEAD").stdout
    parts = re.fullmatch(rb"(?s)(.*?\n)gpgsig(?:-sha256)? (.*?\n)(?! )(.*)", stored)
    assert parts
    head, signature, rest = parts.groups()
    assert signature.replace(b"\n ", b"\n") == ssh_keygen(head + rest)
    repository.git("tag", "-s", "-m", "the first", "v1")
    assert GOOD in repository.run("verify-tag", "v1").stderr.decode()
    payload, begin, rest = repository.run("cat-file", "tag", "v1").stdout.partition(BEGIN)
    assert begin + rest == ssh_keygen(payload)


# ---------------------------------------------------------------- git push --signed

# Writes down what git makes of a push.
HOOK = """#!/bin/sh
printf '%s\\n' "$GIT_PUSH_CERT_STATUS" "$GIT_PUSH_CERT_NONCE_STATUS" "$GIT_PUSH_CERT_SIGNER" \\
    "$GIT_PUSH_CERT_KEY" >seen
git cat-file blob "$GIT_PUSH_CERT" >certificate
"""


@pytest.fixture
def remote(home: Path, repository: Repository) -> Path:
    """A bare repository that asks for signed pushes."""
    path = home / "remote.git"
    repository.git("init", "-q", "--bare", path)
    repository.git("-C", path, "config", "receive.certNonceSeed", "s")
    hook = path / "hooks/pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(HOOK)
    hook.chmod(0o755)
    return path


# Not a private key's name with only the .pub beside it: git asks the real ssh-keygen for that
# key's fingerprint, which wants the very file.
@pytest.mark.parametrize("way", ["public file", "literal", "literal without key::", "command"])
def test_a_signed_push_is_verified_by_the_remote(
        way: str, repository: Repository, remote: Path, keys: Keys) -> None:  # fmt: skip
    name_the_key(way, repository)
    repository.commit("one")
    repository.git("push", "-q", "--signed", remote, "main")
    signer = fingerprint(keys["ed25519"])
    assert (remote / "seen").read_text().splitlines() == ["G", "OK", COMMITTER, signer]
    assert f"\npusher {signer}  " in (remote / "certificate").read_text()


def test_a_push_certificate_of_nobody_is_refused(
        repository: Repository, remote: Path, proxy: Proxy) -> None:  # fmt: skip
    """The proxy comes back between git's two questions: it names nobody's key by then."""
    repository.commit("one")
    name_the_key("command", repository)
    command = f"env {URL}={NOWHERE[URL]} {shlex.quote(str(SHIM))} key"
    repository.git("config", "--global", "gpg.ssh.defaultKeyCommand", command)
    pushed = repository.run("push", "-q", "--signed", remote, "main", check=False)
    assert pushed.returncode != 0
    assert "this push certificate names a key that nobody holds" in pushed.stderr.decode()
    assert repository.git("-C", remote, "for-each-ref") == ""
    assert proxy.log().count("path=/sign") == 1  # the commit's


# ---------------------------------------------------------------- how git is told the key


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_name_the_key_signs_with_that_key(
    way: str, repository: Repository, home: Path, agent: Agent, keys: Keys
) -> None:
    """By a command it is the one that is there by then, after a rotation too."""
    name_the_key(way, repository)
    with (home / "signers").open("a") as signers:
        signers.write(f"{COMMITTER} {keys.line('other')}\n")
    repository.commit("one")
    agent.delete_all()
    for name in ("other",) if way == "command" else ("other", "ed25519"):
        agent.add(keys[name])
    repository.commit("two")
    repository.git("tag", "-s", "-m", "the first", "v1")
    repository.git("verify-tag", "v1")
    signed = [f"G {fingerprint(keys[key])}" for key in (name, "ed25519")]
    assert repository.git("log", "--format=%G? %GF").splitlines() == signed


# ---------------------------------------------------------------- what a person sees when it fails

# What the proxy is started with (OTHER is a key), what becomes of the agent that holds ed25519 or
# of the proxy, how git names its key, and what the shim says of URL, a key by its fingerprint.
@pytest.mark.parametrize("options, fate, way, told", rows([
    ("another is pinned", "--pubkey OTHER", "", "public file",
     "URL answered 403: this proxy signs with OTHER only, not with ED25519"),
    ("the pinned one is not held", "--pubkey OTHER", "", "command",
     "URL answered 503: the pinned key OTHER is missing: the agent does not hold it, but 1 other"),
    ("the agent is locked", "", "lock", "command", "URL answered 503: the agent lists no keys"),
    ("the agent is gone", "", "stop", "public file", "URL answered 503: no answer from the agent"),
    ("the proxy is gone", "", "proxy", "command",
     "nothing listens at URL (connection refused): is ssh-agent-proxy running on the host"),
    ("the namespace", "--namespace file", "", "command",
     "URL answered 403: namespace 'git' is not allowed here: SSH_AGENT_PROXY_NAMESPACE is file"),
]))  # fmt: skip
def test_a_commit_that_cannot_be_signed_fails_with_the_proxys_reason(
        repository: Repository, agent: Agent, keys: Keys, start_proxy: Callable[..., Proxy],
        options: str, fate: str, way: str, told: str) -> None:  # fmt: skip
    """A person would not know what to do; or the commit would be there unsigned."""
    for name in ("other", "ed25519"):
        told = told.replace(name.upper(), fingerprint(keys[name]))
    words = [keys.line("other") if word == "OTHER" else word for word in options.split()]
    proxy = start_proxy(*words, upstream=agent.sock)
    repository.env[URL] = f"{proxy.url}/sign"
    name_the_key(way, repository)
    fates = {"lock": agent.lock, "stop": agent.stop, "proxy": proxy.stop, "": lambda: None}
    fates[fate]()
    said = refused(repository)
    assert told.replace("URL", repository.env[URL]) in said
    assert "user.signingKey needs to be set" not in said


def test_a_tag_that_could_not_be_signed_is_not_there_or_is_called_unsigned(
        repository: Repository, agent: Agent) -> None:  # fmt: skip
    """Git before 2.43.2 makes the tag whatever the signer says."""
    repository.commit("one")
    agent.delete_all()
    done = repository.run("tag", "-s", "-m", "the first", "v1", check=False)
    said = done.stderr.decode()
    assert "the agent lists no keys" in said
    if repository.git("tag"):
        version = re.findall(r"\d+", repository.git("--version"))
        assert tuple(map(int, version)) < (2, 43, 2)
        assert "this tag is NOT signed: git tag -d it" in said
    else:
        assert done.returncode != 0
    assert left_behind(repository) == set()


# ---------------------------------------------------------------- odd places, and many at once


@pytest.mark.parametrize("way", ["public file", "missing file", "command"])
def test_odd_characters_in_every_path(way: str, home: Path, keys: Keys, proxy: Proxy) -> None:
    odd = home / "a b'c\"d\ne$f;*[x]{y}é\\"
    odd.mkdir()
    program = Path(shutil.copy(SHIM, odd / "the shim"))
    public = Path(shutil.copy(keys["ed25519"].with_suffix(".pub"), odd / "signing.pub"))
    repository = Repository(odd, f"{proxy.url}/sign", public, program=program)
    name_the_key(way, repository, program)
    repository.commit("one")
    assert signatures(repository) == ["G"]
    assert left_behind(repository) == set()
    there = {".gitconfig", "repository", "signers", "signing.pub", "the shim", "tmp"}
    assert set(os.listdir(odd)) - {"keys"} == there
    assert not list(odd.rglob("*.sig"))


def commit_at_once(repository: Repository, number: int) -> None:
    """In as many worktrees: each has its own commit in the end, and all are signed."""
    repository.commit("base", "--no-gpg-sign")
    folders = [repository.path.parent / f"worktree-{n}" for n in range(number)]
    for folder in folders:
        repository.git("worktree", "add", "-q", folder)
    argv = ["git", "commit", "-q", "--allow-empty", "-m"]
    with ThreadPoolExecutor(number) as pool:
        list(pool.map(lambda f: run([*argv, f.name], env=repository.env, cwd=f), folders))
    there = repository.git("log", "--branches=worktree*", "--not", "main", "--format=%G? %D %s")
    assert sorted(there.splitlines()) == sorted(f"G {f.name} {f.name}" for f in folders)
    assert left_behind(repository) == set()


@pytest.mark.parametrize("way", ["missing file", "command"])
def test_first_commits_at_once_are_all_signed_and_fetch_one_whole_key_file(
        way: str, repository: Repository, home: Path, keys: Keys) -> None:  # fmt: skip
    name_the_key(way, repository)
    commit_at_once(repository, 20)
    if way == "missing file":
        assert os.listdir(home / "keys") == ["signing.pub"]
        fetched = (home / "keys/signing.pub").read_text()
        assert fetched.splitlines()[1] == keys.line("ed25519")


@pytest.mark.long
def test_a_hundred_commits_with_one_token_and_a_slow_agent_are_all_signed_each_its_own(
        repository: Repository, agent: Agent, home: Path, start_proxy: Callable[..., Proxy],
        scripted_agent: Callable[..., Path]) -> None:  # fmt: skip
    """More than the token's half of the places: some are told to come again."""

    def slowly(connection: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as real:
            real.connect(str(agent.sock))
            while request := read_message(connection):
                real.sendall(message(request))
                answer = read_message(real)
                if request[0] == 13:  # SSH_AGENTC_SIGN_REQUEST
                    time.sleep(4)
                connection.sendall(message(answer))

    tokens = private_file(home / "tokens", "0123456789abcdef one\n")
    proxy = start_proxy("--token-file", tokens, upstream=scripted_agent(slowly))
    repository.env.update({URL: f"{proxy.url}/sign", "SSH_AGENT_PROXY_TOKEN": "0123456789abcdef"})
    commit_at_once(repository, 100)
    assert "busy: too many requests of this token" in proxy.log()
