"""Real git, signing through the shim and the proxy, and verifying what came out."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Set, Tuple

import pytest
from conftest import (
    SHIM,
    Agent,
    Keys,
    Proxy,
    clean_env,
    fingerprint,
    http,
    message,
    private_file,
    read_message,
    rows,
    run,
)

BEGIN = b"-----BEGIN SSH SIGNATURE-----\n"
COMMITTER = "committer@example.com"


class Repository:
    """A repository of its own, in a home with all that CONFIG says of signing."""

    def __init__(self, path: Path, env: Dict[str, str], *options: str) -> None:
        self.path = path
        self.env = env
        path.mkdir(parents=True)
        self.git("init", "-q", "-b", "main", *options)

    def git(self, *args: Any, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        return run(["git", *args], env=self.env, cwd=self.path, check=check)

    def text(self, *args: Any) -> str:
        return self.git(*args).stdout.decode()

    def commit(self, name: str, *options: str) -> None:
        """A commit that adds the file NAME, its name being the message."""
        self.add(name)
        self.git("commit", "-q", "-m", name, *options)

    def add(self, name: str) -> None:
        (self.path / name).write_text(f"{name}\n")
        self.git("add", name)

    def subjects(self) -> List[str]:
        return self.text("log", "--format=%s").splitlines()

    def signatures(self) -> List[str]:
        """What git says of the signature of each commit that HEAD reaches."""
        return self.text("log", "--format=%G?").split()

    def everything(self) -> List[str]:
        """What must not change when a commit fails."""
        refs = self.text("for-each-ref")
        return [refs, self.text("ls-files", "--stage"), self.text("status", "--porcelain")]


class Signing:
    """A home in which git signs everything through the shim, and knows whose keys to trust."""

    def __init__(self, home: Path, keys: Keys) -> None:
        self.home = home
        self.shim = home / "bin" / "ssh-agent-proxy-sign"
        self.shim.parent.mkdir()
        shutil.copyfile(SHIM, self.shim)
        self.shim.chmod(0o755)
        self.env = clean_env(home)
        self.signers = home / "allowed signers"
        self.trust(keys.line("ed25519"))
        self.configure("gpg.format", "ssh")
        self.configure("gpg.ssh.program", str(self.shim))
        self.configure("gpg.ssh.allowedSignersFile", str(self.signers))
        self.configure("commit.gpgsign", "true")
        self.configure("tag.gpgsign", "true")

    def configure(self, name: str, value: str) -> None:
        run(["git", "config", "--global", name, value], env=self.env)

    def trust(self, line: str) -> None:
        with self.signers.open("a") as f:
            f.write(f"{COMMITTER} {line}\n")

    def use(self, url: str) -> None:
        self.env["SSH_AGENT_PROXY_URL"] = f"{url}/sign"

    def repository(self, name: str = "repository", *options: str) -> Repository:
        return Repository(self.home / name, self.env, *options)

    def left_behind(self) -> Set[str]:
        """What stands in TMPDIR and is not git's own: it leaves the file of a literal key there."""
        names = os.listdir(self.env["TMPDIR"])
        return {name for name in names if not name.startswith(".git_signing_key_tmp")}


@pytest.fixture
def signing(home: Path, keys: Keys, proxy: Proxy) -> Signing:
    """Signs with the key in ed25519.pub, through the proxy in front of the agent that holds it."""
    signing = Signing(home, keys)
    signing.use(proxy.url)
    signing.configure("user.signingkey", str(keys["ed25519"]) + ".pub")
    return signing


def split_commit(commit: bytes) -> Tuple[bytes, bytes]:
    """A signed commit as git stores it: what was signed, and the signature."""
    head, _, message = commit.partition(b"\n\n")
    payload, signature, inside = [], [], False
    for line in head.split(b"\n"):
        name, _, value = line.partition(b" ")
        inside = name in (b"gpgsig", b"gpgsig-sha256") or (inside and not name)
        if inside:
            signature.append(value + b"\n")
        else:
            payload.append(line)
    return b"\n".join(payload) + b"\n\n" + message, b"".join(signature).rstrip(b"\n") + b"\n"


# ---------------------------------------------------------------- every flow that signs


GOOD = f'Good "git" signature for {COMMITTER} with ED25519 key SHA256:'


@pytest.mark.parametrize("id_format", ["sha1", "sha256"])
def test_a_commit_and_a_tag_are_verified_by_git_and_signed_as_by_ssh_keygen(
    id_format: str, signing: Signing, ssh_keygen: Callable[[bytes], bytes]
) -> None:
    repository = signing.repository("repository", f"--object-format={id_format}")
    repository.commit("one")
    assert GOOD in repository.text("log", "--show-signature", "-1")
    assert GOOD in repository.git("verify-commit", "HEAD").stderr.decode()
    payload, signature = split_commit(repository.git("cat-file", "commit", "HEAD").stdout)
    assert signature == ssh_keygen(payload)
    repository.git("tag", "-s", "-m", "the first", "v1")
    assert GOOD in repository.git("verify-tag", "v1").stderr.decode()
    payload, begin, rest = repository.git("cat-file", "tag", "v1").stdout.partition(BEGIN)
    assert begin + rest == ssh_keygen(payload)


def test_all_that_git_makes_of_commits_is_signed(signing: Signing) -> None:
    """An amended, merged, rebased, picked or reverted commit would stand there unsigned."""
    repository = signing.repository()
    repository.commit("base")
    repository.git("checkout", "-q", "-b", "side")
    for name in "one", "two":
        repository.commit(name)
    first = repository.git("cat-file", "commit", "HEAD").stdout
    repository.git("commit", "-q", "--amend", "-m", "another two")
    assert split_commit(repository.git("cat-file", "commit", "HEAD").stdout)[1] not in first
    repository.git("checkout", "-q", "main")
    repository.commit("main")
    repository.git("rebase", "-q", "main", "side")
    repository.git("checkout", "-q", "main")
    repository.git("cherry-pick", "side")
    repository.git("revert", "--no-edit", "HEAD")
    assert repository.subjects() == ['Revert "another two"', "another two", "main", "base"]
    repository.git("merge", "-q", "-m", "merge", "side")
    assert repository.text("log", "-1", "--format=%p").count(" ") == 1
    assert repository.signatures() == ["G"] * 7
    assert repository.text("log", "-3", "--format=%G?", "side").split() == ["G"] * 3


# ---------------------------------------------------------------- git push --signed


class Remote:
    """A bare repository that asks for signed pushes, and writes down what git makes of them."""

    def __init__(self, signing: Signing) -> None:
        self.path = signing.home / "remote.git"
        self.seen = signing.home / "seen"
        run(["git", "init", "-q", "--bare", self.path], env=signing.env)
        run(["git", "-C", self.path, "config", "receive.certNonceSeed", "s"], env=signing.env)
        hook = self.path / "hooks" / "pre-receive"
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(
            "#!/bin/sh\n"
            "printf '%s\\n' \"$GIT_PUSH_CERT_STATUS\" \"$GIT_PUSH_CERT_NONCE_STATUS\" "
            "\"$GIT_PUSH_CERT_SIGNER\" \"$GIT_PUSH_CERT_KEY\" "
            f">{shlex.quote(str(self.seen))}\n"
            f"git cat-file blob \"$GIT_PUSH_CERT\" >{shlex.quote(str(self.seen))}.certificate\n"
        )
        hook.chmod(0o755)


# Not a private key's name with only the .pub beside it: git asks the real ssh-keygen for that
# key's fingerprint, which wants the very file.
@pytest.mark.parametrize("way", ["public file", "literal", "literal without key::", "command"])
def test_a_signed_push_is_verified_by_the_remote(way: str, signing: Signing, keys: Keys) -> None:
    name_the_key(way, signing, keys)
    remote = Remote(signing)
    repository = signing.repository()
    repository.commit("one")
    repository.git("push", "-q", "--signed", remote.path, "main")
    seen = remote.seen.read_text().splitlines()
    assert seen == ["G", "OK", COMMITTER, fingerprint(keys["ed25519"])]
    certificate = Path(f"{remote.seen}.certificate").read_text()
    assert f"\npusher {fingerprint(keys['ed25519'])}  " in certificate


def test_a_push_certificate_of_nobody_is_refused(
    signing: Signing, keys: Keys, proxy: Proxy
) -> None:
    # The proxy comes back between git's two questions: the certificate names nobody's key by then.
    remote = Remote(signing)
    repository = signing.repository()
    repository.commit("one")
    name_the_key("command", signing, keys)
    command = signing.home / "command"
    dead = "SSH_AGENT_PROXY_URL=http://127.0.0.1:1/sign"
    command.write_text(f"#!/bin/sh\nexec env {dead} {shlex.quote(str(signing.shim))} key\n")
    command.chmod(0o755)
    signing.configure("gpg.ssh.defaultKeyCommand", str(command))
    pushed = repository.git("push", "-q", "--signed", remote.path, "main", check=False)
    assert pushed.returncode != 0
    assert "this push certificate names a key that nobody holds" in pushed.stderr.decode()
    assert run(["git", "-C", remote.path, "for-each-ref"], env=signing.env).stdout == b""
    assert proxy.log().count("path=/sign") == 1  # the commit's


# ---------------------------------------------------------------- how git is told the key


def name_the_key(way: str, signing: Signing, keys: Keys) -> None:
    if way == "command":
        run(["git", "config", "--global", "--unset", "user.signingkey"], env=signing.env)
        signing.configure("gpg.ssh.defaultKeyCommand", f"{shlex.quote(str(signing.shim))} key")
        return
    public = f"{keys['ed25519']}.pub"
    # There is only the .pub beside that name, as in a container.
    shutil.copyfile(public, signing.home / "key.pub")
    named = {
        "public file": public,
        "private file": str(signing.home / "key"),
        "literal": f"key::{keys.line('ed25519')}",
        "literal without key::": keys.line("ed25519"),
        "missing file": str(signing.home / "keys" / "signing.pub"),
        "missing private file": str(signing.home / "keys" / "signing"),
    }
    signing.configure("user.signingkey", named[way])


WAYS = ["public file", "private file", "literal", "literal without key::", "missing file",
        "missing private file", "command"]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_name_the_key_signs_with_that_key(
    way: str, signing: Signing, agent: Agent, keys: Keys
) -> None:
    name_the_key(way, signing, keys)
    repository = signing.repository()
    repository.commit("one")
    # Another key comes first in the agent: the one that git names is what signs.
    if way != "command":
        agent.delete_all()
        agent.add(keys["other"])
        agent.add(keys["ed25519"])
    repository.commit("two")
    repository.git("tag", "-s", "-m", "the first", "v1")
    assert repository.signatures() == ["G", "G"]
    repository.git("verify-tag", "v1")


def test_with_a_key_command_the_next_commit_is_signed_with_a_rotated_key(
    signing: Signing, agent: Agent, keys: Keys
) -> None:
    name_the_key("command", signing, keys)
    signing.trust(keys.line("other"))
    repository = signing.repository()
    repository.commit("one")
    agent.delete_all()
    agent.add(keys["other"])
    repository.commit("two")
    signers = repository.text("log", "--format=%GF").split()
    assert signers == [fingerprint(keys["other"]), fingerprint(keys["ed25519"])]
    assert repository.signatures() == ["G", "G"]


def test_with_a_key_command_a_commit_without_the_proxy_fails_and_says_why(
    signing: Signing, keys: Keys
) -> None:
    name_the_key("command", signing, keys)
    repository = signing.repository()
    repository.commit("one")
    signing.use("http://127.0.0.1:1")
    said = refused(repository, signing)
    assert "nothing listens at http://127.0.0.1:1/sign (connection refused)" in said
    assert "SSH_AGENT_PROXY_URL" in said
    assert "user.signingKey needs to be set" not in said


# ---------------------------------------------------------------- what a person sees when it fails


def git_version() -> Tuple[int, ...]:
    match = re.search(rb"\d+(\.\d+)+", run(["git", "--version"]).stdout)
    assert match
    return tuple(int(number) for number in match.group().split(b"."))


def refused(repository: Repository, signing: Signing) -> str:
    """Tries a commit, which must leave everything as it was; what git says."""
    repository.add("more")
    before = repository.everything()
    done = repository.git("commit", "-m", "more", check=False)
    assert done.returncode != 0
    assert repository.everything() == before
    assert signing.left_behind() == set()
    there = {name for name in os.listdir(repository.path) if name != ".git"}
    assert there == set(repository.text("ls-files").splitlines())
    said = done.stderr.decode()
    assert "usage:" not in said
    return said


# What the proxy is started with (OTHER is a key), what the agent holds and how it fares, how git
# names its key, the proxy's status, and what git says besides the proxy's own reason.
REASONS = [
    ("no keys", "", [], "public file", 503, "the agent lists no keys"),
    ("another is pinned", "--pubkey OTHER", ["ed25519", "other"], "public file", 403, "other"),
    ("the pinned one is not held", "--pubkey OTHER", ["ed25519"], "command", 503, "other"),
    ("the key is not held", "", ["other"], "public file", 404, "ed25519"),
    ("the agent is locked", "", ["ed25519", "locked"], "public file", 503, "it is locked"),
    ("the agent is gone", "", ["ed25519", "gone"], "public file", 503, "agent"),
    ("the namespace", "--namespace file", ["ed25519"], "command", 403, "SSH_AGENT_PROXY_NAMESPACE"),
]


@pytest.mark.parametrize("options, held, way, status, told", rows(REASONS))
def test_a_commit_that_cannot_be_signed_fails_with_the_proxys_reason(
    signing: Signing, agent: Agent, keys: Keys, start_proxy: Callable[..., Proxy],
    options: str, held: List[str], way: str, status: int, told: str,
) -> None:  # fmt: skip
    """A person would not know what to do; or the commit would be there unsigned."""
    words = [keys.line("other") if word == "OTHER" else word for word in options.split()]
    proxy = start_proxy(*words, upstream=agent.sock)
    signing.use(proxy.url)
    name_the_key(way, signing, keys)
    agent.delete_all()
    for name in held:
        if name == "locked":
            agent.lock()
        elif name == "gone":
            agent.stop()
        else:
            agent.add(keys[name])
    said = refused(signing.repository(), signing)
    fields = {} if way == "command" else {"SSHSIG-Key": keys.line("ed25519")}
    reason = http(proxy.port, "POST", "/sign", b"x", {"SSHSIG-Namespace": "git", **fields})
    assert reason.status == status
    assert reason.text.strip() in said
    assert (fingerprint(keys[told]) if told in keys else told) in said


def test_a_tag_that_could_not_be_signed_is_not_there_or_is_called_unsigned(
    signing: Signing, agent: Agent
) -> None:
    # Git before 2.43.2 makes the tag whatever the signer says.
    repository = signing.repository()
    repository.commit("one")
    agent.delete_all()
    done = repository.git("tag", "-s", "-m", "the first", "v1", check=False)
    said = done.stderr.decode()
    assert "the agent lists no keys" in said
    if repository.text("tag"):
        assert git_version() < (2, 43, 2)
        assert "this tag is NOT signed: git tag -d it" in said
    else:
        assert done.returncode != 0
    assert signing.left_behind() == set()


# ---------------------------------------------------------------- odd places, odd sizes, many


@pytest.mark.parametrize("way", ["public file", "missing file", "command"])
def test_odd_characters_in_every_path(way: str, signing: Signing, keys: Keys) -> None:
    odd = signing.home / "a b'c\"d\ne$f;*[x]{y}é\\"
    (odd / "tmp").mkdir(parents=True)
    shutil.copyfile(signing.shim, odd / "the shim")
    (odd / "the shim").chmod(0o755)
    signing.shim = odd / "the shim"
    signing.configure("gpg.ssh.program", str(signing.shim))
    signing.env["TMPDIR"] = str(odd / "tmp")
    name_the_key(way, signing, keys)
    key = odd / "signing.pub"
    if way == "public file":
        shutil.copyfile(f"{keys['ed25519']}.pub", key)
    if way != "command":
        signing.configure("user.signingkey", str(key))
    repository = Repository(odd / "repository", signing.env)
    repository.commit("one")
    assert repository.signatures() == ["G"]
    assert signing.left_behind() == set()
    expected = {"tmp", "the shim", "repository"} | ({"signing.pub"} if way != "command" else set())
    assert set(os.listdir(odd)) == expected
    assert not list(odd.rglob("*.sig"))


def test_a_commit_in_an_empty_environment(signing: Signing) -> None:
    # Not even a HOME: what git needs to know stands in the repository.
    repository = signing.repository()
    temporary = signing.home / "other tmp"
    temporary.mkdir()
    config = (signing.home / ".gitconfig").read_text()
    with (repository.path / ".git" / "config").open("a") as f:
        f.write(f"{config}[user]\nname = C O Mitter\nemail = {COMMITTER}\n")
    url = signing.env["SSH_AGENT_PROXY_URL"]
    only = {"PATH": os.environ["PATH"], "TMPDIR": str(temporary), "SSH_AGENT_PROXY_URL": url}
    repository.add("one")
    argv = ["git", "commit", "-q", "-S", "-m", "one"]
    assert run([shutil.which("env"), "-i", *(f"{n}={v}" for n, v in only.items()), *argv],
               cwd=repository.path).stderr == b""  # fmt: skip
    assert repository.signatures() == ["G"]
    assert os.listdir(temporary) == []


# ---------------------------------------------------------------- many at once


@pytest.mark.parametrize("way", ["missing file", "command"])
def test_first_commits_at_once_are_all_signed_and_fetch_one_whole_key_file(
    way: str, signing: Signing, keys: Keys
) -> None:
    name_the_key(way, signing, keys)
    repositories = [signing.repository(str(n)) for n in range(20)]
    with ThreadPoolExecutor(len(repositories)) as pool:
        list(pool.map(lambda repository: repository.commit("one"), repositories))
    assert [r.signatures() for r in repositories] == [["G"]] * 20
    assert signing.left_behind() == set()
    if way == "missing file":
        folder = signing.home / "keys"
        assert os.listdir(folder) == ["signing.pub"]
        assert (folder / "signing.pub").read_text().splitlines()[1] == keys.line("ed25519")


@pytest.mark.long
def test_a_hundred_commits_with_one_token_and_a_slow_agent_are_all_signed_each_its_own(
    signing: Signing,
    agent: Agent,
    keys: Keys,
    start_proxy: Callable[..., Proxy],
    scripted_agent: Callable[..., Path],
) -> None:
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

    agent.add(keys["ed25519"])
    tokens = private_file(signing.home / "tokens", "0123456789abcdef one\n")
    proxy = start_proxy("--token-file", tokens, upstream=scripted_agent(slowly))
    signing.use(proxy.url)
    signing.env["SSH_AGENT_PROXY_TOKEN"] = "0123456789abcdef"
    repository = signing.repository()
    repository.commit("base", "--no-gpg-sign")
    folders = [signing.home / f"worktree-{n}" for n in range(100)]
    for folder in folders:
        repository.git("worktree", "add", "-q", folder)
    argv = ["git", "commit", "-q", "--allow-empty", "-m"]
    with ThreadPoolExecutor(len(folders)) as pool:
        list(pool.map(lambda f: run([*argv, f.name], env=signing.env, cwd=f), folders))
    there = repository.text("log", "--branches=worktree*", "--not", "main", "--format=%G? %D %s")
    assert sorted(there.splitlines()) == sorted(f"G {f.name} {f.name}" for f in folders)
    assert "busy: too many requests of this token" in proxy.log()
    assert signing.left_behind() == set()


@pytest.mark.long
def test_a_rebase_of_two_hundred_commits_is_signed_throughout(signing: Signing) -> None:
    repository = signing.repository()
    for number in range(201):
        repository.git("commit", "-q", "--allow-empty", "--no-gpg-sign", "-m", number)
    repository.git("rebase", "-q", "--force-rebase", "HEAD~200")
    assert repository.signatures() == ["G"] * 200 + ["N"]
    assert repository.subjects() == [str(number) for number in reversed(range(201))]
