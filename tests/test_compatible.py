"""The shim beside the real ssh-keygen: hundreds of command lines, and what each makes of them."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest
from conftest import Agent, Keys, clean_env, commit, run, short_folder
from test_shim import SHELLS, Served, Shim, on, said, serve
from test_sshsig import openssh

# What is right comes first and is drawn more often, or nothing would ever be signed. FOLDER is the
# one that both run in; LITERAL is a key itself, and no file's name.
KEYS = ["k/ed25519", "k/rsa2048", "k/ed25519.pub", "FOLDER/k/rsa2048.pub", "k/.pub alone",
        "k/.tmpAb3dEf", "FOLDER/k/not there", "LITERAL", "key::LITERAL",
        "k/private alone", "k/missing", "k", ""]  # fmt: skip
HASHES = ["hashalg=sha256", "HASHALG=sha512", "HashAlg=sha256",
          "hashalg=SHA256", "hashalg=md5", "hashalg=", "hashalg", "foo=bar", ""]  # fmt: skip
NAMESPACES = ["git", "file", "--", ""]
# Those with a .sig in their name have one already: a file, a link, a folder.
FILES = ["m", "folder/m", "a b", "line\nend", "*", "link to m", "file.sig", "to m.sig",
         "to nothing.sig", ".git_signing_buffer_tmpAb3dEf", "-",
         "folder.sig", "empty", "missing", "folder", "missing/m", "-x", "--", ""]  # fmt: skip
# What takes an operand for its value; what ssh-keygen has for other purposes, or does not know.
LACKING = ["-N", "-f", "-vO"]
FOREIGN = ["-l", "-K", "-qy", "-Ccomment", "-4", "-\u00e4", "-q4", "--file", *LACKING]
QUESTION = re.compile(rb"(?s).*? already exists\.\nOverwrite \(y/n\)\? ")


class Case(NamedTuple):
    options: Dict[str, str]  # those that count
    argv: List[str]  # all of them, as they are spelled
    operands: List[str]
    foreign: str
    input: bytes


def draw(seed: int) -> Case:
    dice = random.Random(seed)

    def likely(values: Sequence[str], right: int) -> str:
        return dice.choice(values[:right] if dice.random() < 0.8 else values)

    options = [("Y", "sign")]
    options += [("n", likely(NAMESPACES, 2))] if dice.random() < 0.9 else []
    options += [("f", likely(KEYS, 9))] if dice.random() < 0.9 else []
    options += [("O", likely(HASHES, 3)) for _ in range(dice.choice([0, 0, 0, 1, 1, 2]))]
    options += [(flag, "") for flag in "qvvU" if dice.random() < 0.3]
    dice.shuffle(options)
    for letter, values in (("n", NAMESPACES), ("f", KEYS), ("Y", ["verify", "x"])):
        if dice.random() < 0.1:
            options.insert(0, (letter, dice.choice(values)))  # the last one counts
    argv: List[str] = []
    grouped = False  # may more stand behind the last one?
    for letter, value in options:
        argv += [] if grouped and dice.random() < 0.5 else ["-"]
        argv[-1] += letter
        grouped = letter in "qvU"
        if value and dice.random() < 0.4:
            argv[-1] += value
        elif not grouped:
            argv.append(value)
    foreign = dice.choice(FOREIGN) if dice.random() < 0.2 else ""
    if foreign:
        argv.insert(len(argv) if foreign in LACKING else 0, foreign)
    operands = [likely(FILES, 11) for _ in range(dice.choice([0, 1, 1, 1, 2, 3]))]
    operands[:0] = ["--"] if dice.random() < 0.4 else []
    input = b"y\n" * 4 + commit() if operands or dice.random() < 0.9 else b""
    return Case(dict(options), argv, operands, foreign, input)


def promised(case: Case) -> Optional[List[str]]:
    """What ssh-keygen has to be asked to do what the shim promises; None, where that refuses."""
    argv, key = list(case.argv), case.options.get("f")
    if case.foreign:
        return None  # an option that has nothing to do with signing could not be heeded
    if key == "k/private alone":
        return None  # no private key is read, not even for the public one that is in it
    if not case.input:
        return None  # the proxy signs no empty payload (nor a file of that kind, below)
    if "n" not in case.options:
        argv += ["-n", "git"]  # the namespace is git's, unless it is said
    if key is None:
        argv += ["-f", "k/ed25519"]  # the key is the proxy's choice, unless it is said
    elif key in ("LITERAL", "key::LITERAL", "FOLDER/k/not there"):
        argv += ["-f", "k/ed25519"]  # a key is itself; what is not there is fetched
    return argv + [name.replace("empty", "missing") for name in case.operands]


def same(block: bytes) -> bytes:
    """What two signatures have in common: OpenSSH 10 takes rsa-sha2-256 for RSA and sha256."""
    blob = base64.b64decode(b"".join(block.splitlines()[1:-1])) if b"SSH SIG" in block else b""
    return blob.partition(b"rsa-sha2-")[0] if b"sha256" in blob and openssh() >= 10 else block


Tree = Dict[str, Tuple[int, bytes]]  # what each is, with its mode, and what is in it


def tree(folder: Path) -> Tree:
    found = {}
    for path in folder.rglob("*"):
        content = same(path.read_bytes()) if path.is_file() else b""
        content = os.fsencode(os.readlink(path)) if path.is_symlink() else content
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, content)
    return found


class Both:
    """What both are run on: an agent with two keys, a proxy in front of it, and a folder each."""

    def __init__(self, folder: Path, keys: Keys, served: Served) -> None:
        self.served, self.folder, self.files = served, folder, folder / "files"
        for name in ("folder", "folder.sig.sig", "k"):
            (self.files / name).mkdir(parents=True)
        (self.files / "link to m").symlink_to("m")
        for name in FILES:
            if name not in ("missing", "folder", "missing/m", "-", ""):
                (self.files / name).write_text(f"this is {name}\n" * (name != "empty"))
        (self.files / "file.sig.sig").touch(0o600)
        (self.files / "to m.sig.sig").symlink_to("m")
        (self.files / "to nothing.sig.sig").symlink_to("missing")
        for name in ("ed25519", "rsa2048"):
            shutil.copy(keys[name], self.files / "k")
            shutil.copy(f"{keys[name]}.pub", self.files / "k")
        shutil.copy(keys["ed25519"], self.files / "k/private alone")
        for name in ("k/.pub alone.pub", "k/.tmpAb3dEf"):
            shutil.copy(f"{keys['rsa2048']}.pub", self.files / name)
        self.literal = keys.line("ed25519")
        self.env = clean_env(folder / "home", SSH_AUTH_SOCK=served.agent.sock)

    @contextlib.contextmanager
    def laid_out(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            yield Path(shutil.copytree(self.files, f"{folder}/x", symlinks=True))

    def words(self, argv: Sequence[str], folder: Path) -> List[str]:
        return [w.replace("LITERAL", self.literal).replace("FOLDER", str(folder)) for w in argv]

    def ssh_keygen(self, argv: Sequence[str], folder: Path, input: bytes) -> Any:
        words = ["ssh-keygen", *self.words(argv, folder)]
        return run(words, env=self.env, cwd=folder, input=input, check=False)

    def expected(self, case: Case) -> Tuple[bool, bytes, Tree]:
        """By ssh-keygen's own word: success, standard output, and what is there in the end."""
        with self.laid_out() as folder:
            before, argv = tree(folder), promised(case)
            if argv is None:
                return False, b"", before
            for name in ("file", "to m", "to nothing"):  # it is replaced, and nothing is asked
                (folder / f"{name}.sig.sig").unlink()
            done = self.ssh_keygen(argv, folder, case.input)
            old = {name: before[name] for name in before if ".sig.sig" in name}
            stdout = same(QUESTION.sub(b"", done.stdout))
            return done.returncode == 0, stdout, {**old, **tree(folder)}


@pytest.fixture(scope="module")
def both(keys: Keys, tmp_path_factory: Any) -> Iterator[Both]:
    with short_folder() as folder:
        agent = Agent(folder / "agent")
        for name in ("ed25519", "rsa2048"):  # the first is the proxy's choice
            agent.add(keys[name])
        with serve(agent, "--namespace", "git,file,--") as served:
            umask = os.umask(0o27)  # as any may be that FILE.sig has to heed
            yield Both(tmp_path_factory.mktemp("both"), keys, served)
            os.umask(umask)
        agent.stop()


CASES = [on("dash", range(i, i + 40), name=str(i)) for i in range(0, 200, 40)]
CASES += [on(shell, range(160 + 40 * i, 240 + 40 * i)) for i, shell in enumerate(SHELLS[1:])]


@pytest.mark.parametrize("shell, seeds", CASES)
def test_a_command_line_does_what_it_does_to_ssh_keygen(
    shell: str, seeds: Sequence[int], tmp_path: Path, home: Path, both: Both
) -> None:
    """Whatever calls ssh-keygen would sign something else, or nothing, with the shim."""
    shim = Shim(shell, tmp_path, home)
    for case in map(draw, seeds):
        with both.laid_out() as shim.folder:
            words = both.words([*case.argv, *case.operands], shim.folder)
            done = shim(*words, input=case.input, env=both.served)
            files = tree(shim.folder)
        fetched = files.pop("k/not there.pub", None)
        outcome = done.returncode == 0, same(done.stdout), files
        assert outcome == both.expected(case), (case, done.stderr)
        if done.returncode == 0:
            assert done.stderr == b"", case
            assert (fetched is None) == (case.options.get("f") != "FOLDER/k/not there"), case
        else:
            assert said(done)
    assert list(Path(shim.env["TMPDIR"]).iterdir()) == []


MODES = ["-Y verify", "-Yfind-principals", "-Y check-novalidate", "-Y match-principals",
         "-l", "-lvEmd5", "-y", "-L", "-Ysignature", "-Y x"]  # fmt: skip
VALUES = {
    "-f": ["signers", "k/ed25519", "k/rsa2048.pub", "missing"],
    "-I": ["me@example.com", "other", ""],
    "-n": ["git", "file", ""],
    "-s": ["m.sig", "m", "missing"],
    "-O": ["verify-time=20260101", "print-pubkey", "verify-time=x", "hashalg=sha256"],
    "-r": ["k/rsa2048.pub", "k/ed25519.pub", "missing"],
}


@pytest.mark.parametrize("shell", [on(shell) for shell in SHELLS])
def test_what_is_not_signing_is_what_ssh_keygen_makes_of_it(
    shell: str, tmp_path: Path, home: Path, both: Both
) -> None:
    """Git and jj would call a good signature bad, or a bad one good."""
    shim, dice = Shim(shell, tmp_path, home), random.Random(1)
    with both.laid_out() as folder:
        shim.folder = folder
        (folder / "signers").write_text(f"me@example.com {both.literal}\n")
        both.ssh_keygen(["-Y", "sign", "-n", "git", "-f", "k/ed25519", "m"], folder, b"")
        for number in range(120 if shell == "dash" else 30):
            argv = MODES[number % len(MODES)].split()
            for letter, values in VALUES.items():
                if dice.random() < (0.2 if letter in "-O-r" else 0.95):
                    argv += [letter, values[0] if dice.random() < 0.7 else dice.choice(values)]
            argv += dice.choice([[], [], [], ["--"], ["m"], ["a b", "line\nend"]])
            input = dice.choice([b"this is m\n", b"another"])
            ours, after = shim(*argv, input=input, env=both.env), tree(folder)
            theirs = both.ssh_keygen(argv, folder, input)
            for name in ("returncode", "stdout", "stderr"):
                assert getattr(ours, name) == getattr(theirs, name), argv
            assert after == tree(folder), argv
