"""The shim beside the real ssh-keygen: what each makes of a caller's command line, or of any."""

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
from conftest import Agent, Keys, clean_env, commit, rows, run, short_folder
from test_shim import SHELLS, Served, Shim, on, one_shim, said, serve, shim
from test_sshsig import openssh

__all__ = ["one_shim", "shim"]  # fixtures

# What is right comes first and is drawn more often, or nothing would ever be signed. FOLDER is the
# one that both run in; LITERAL is a key itself, and no file's name.
KEYS = ["k/ed25519", "k/rsa2048", "k/ed25519.pub", "FOLDER/k/rsa2048.pub", "k/.pub alone",
        "k/.tmpAb3dEf", "FOLDER/k/not there", "LITERAL", "key::LITERAL",
        "k/private alone", "k/missing", "k", ""]  # fmt: skip
HASHES = ["hashalg=sha256", "HASHALG=sha512", "HashAlg=sha256",
          "hashalg=SHA256", "hashalg=md5", "hashalg=", "hashalg", "foo=bar", ""]  # fmt: skip
NAMESPACES = ["git", "file", "--", ""]
# What stands at NAME.sig already, a file or a link to that, and is replaced by a new file.
THERE = {"file": "", "to m": "m", "to nothing": "missing", "to device": "/dev/full",
         ".git_signing_buffer_tmpGh6jKl": "m"}  # fmt: skip
FILES = [*THERE, "m", "folder/m", "a b", "line\nend", "*", "link to m",
         ".git_signing_buffer_tmpAb3dEf", "-", "beside a folder",
         "empty", "missing", "folder", "missing/m", "-x", "--", ""]  # fmt: skip
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
    operands = [likely(FILES, 12) for _ in range(dice.choice([0, 1, 1, 1, 2, 3]))]
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
        for name in ("folder", "beside a folder.sig", "k"):
            (self.files / name).mkdir(parents=True)
        (self.files / "link to m").symlink_to("m")
        for name in FILES:
            if name not in ("missing", "folder", "missing/m", "-", ""):
                (self.files / name).write_text(f"this is {name}\n" * (name != "empty"))
        for name, target in THERE.items():
            there = self.files / f"{name}.sig"
            there.symlink_to(target) if target else there.touch(0o400)
        for name in ("ed25519", "rsa2048"):
            shutil.copy(keys[name], self.files / "k")
            shutil.copy(f"{keys[name]}.pub", self.files / "k")
        shutil.copy(keys["ed25519"], self.files / "k/private alone")
        for name in ("k/.pub alone.pub", "k/.tmpAb3dEf"):
            shutil.copy(f"{keys['rsa2048']}.pub", self.files / name)
        self.literal = keys.line("ed25519")
        (self.files / "signers").write_text(f"me@a,git {self.literal}\n")
        argv = ["ssh-keygen", "-q", "-Y", "sign", "-n", "git", "-f", "k/ed25519", "old"]
        (self.files / "old").write_bytes(commit())
        run(argv, cwd=self.files)
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
            old = {f"{name}.sig": before[f"{name}.sig"] for name in THERE}
            for name in old:  # it is replaced, and nothing is asked
                (folder / name).unlink()
            done = self.ssh_keygen(argv, folder, case.input)
            stdout = same(QUESTION.sub(b"", done.stdout))
            return done.returncode == 0, stdout, {**old, **tree(folder)}


@pytest.fixture(scope="module")
def both(keys: Keys, tmp_path_factory: Any) -> Iterator[Both]:
    with short_folder() as folder:
        agent = Agent(folder / "agent")
        for name in ("ed25519", "rsa2048"):  # the first is the proxy's choice
            agent.add(keys[name])
        with serve(agent, "--namespace", "git,file,--,patatt") as served:
            umask = os.umask(0o27)  # as any may be that FILE.sig has to heed
            yield Both(tmp_path_factory.mktemp("both"), keys, served)
            os.umask(umask)
        agent.stop()


# ---------------------------------------------------------------- what calls ssh-keygen

# What was read is named by its version, or by the commit that the file was taken from; jj, dulwich
# and patatt are run themselves elsewhere. Temporary files are called as theirs are; those that hold
# a literal key have no line end.
CALLERS = [
    # git 2.55, gpg-interface.c
    ("git", "-Y sign -n git -f k/ed25519.pub .git_signing_buffer_tmpAb3dEf"),
    ("git, literal", "-Y sign -n git -f .git_signing_key_tmpAb3dEf -U .git_signing_buffer_tmpX"),
    ("git, principals", "-Y find-principals -f signers -s old.sig -Overify-time=20231114221320"),
    ("git, verify", "-Y verify -n git -f signers -I me@a -s old.sig -Overify-time=20231114"),
    ("git, unknown", "-Y check-novalidate -n git -s old.sig -Overify-time=20231114221320"),
    # GitButler, crates/but-core/src/commit/mod.rs, 0200aa5e061f
    ("GitButler", "-Y sign -n git -f .tmpAb3dEf -U .tmpGh6jKl"),
    # gitui, asyncgit/src/sync/sign.rs, 04275401b6bb (-U where the program is called ssh-keygen)
    ("gitui", "-Y sign -n git -f k/ed25519.pub -U"),
    # git-ps, src/ps/private/git/signers/ssh_signer.rs, 036192053573
    ("git-ps", "-Y sign -n git -f .tmp_signing_key"),
    # Sapling, eden/scm/sapling/signing.py
    ("Sapling", "-Y sign -n git -f .sl_signing_key_ab3def_h -U .sl_signing_buffer_ab3def_h"),
    # What manuals tell people
    ("a person", "-Y sign -f k/ed25519 -n file data.git .tmpGh6jKl"),
    ("a person, input", "-q -Y sign -n file -f k/ed25519 -"),
]


@pytest.mark.parametrize("command", rows(CALLERS))
def test_a_caller_gets_what_ssh_keygen_would_give_it(
        command: str, one_shim: Shim, both: Both) -> None:  # fmt: skip
    """Its users could not sign, or would see good signatures called bad."""
    argv, found = command.split(), []
    for ours in (True, False):
        with both.laid_out() as one_shim.folder:
            folder = one_shim.folder
            for before, word in zip(argv, argv[1:]):  # what it makes itself
                if word.startswith((".", "data")):
                    content = both.literal.encode() if before == "-f" else commit()
                    (folder / word).write_bytes(content)
            if ours:
                done = one_shim(*argv, input=commit(), env=both.served)
            else:
                done = both.ssh_keygen(argv, folder, commit())
                (folder / ".git_signing_key_tmpAb3dEf").unlink(missing_ok=True)  # it is git's own
            found.append((done.returncode, done.stdout, tree(folder)))
    assert found[0] == found[1]
    assert found[0][0] == 0


# ---------------------------------------------------------------- and what else may

CASES = [on("dash", range(i, i + 40), name=str(i)) for i in range(0, 200, 40)]
CASES += [on(shell, range(160 + 40 * i, 240 + 40 * i)) for i, shell in enumerate(SHELLS[1:])]


@pytest.mark.parametrize("shim, seeds", CASES, indirect=["shim"])
def test_a_command_line_does_what_it_does_to_ssh_keygen(
        shim: Shim, seeds: Sequence[int], both: Both) -> None:  # fmt: skip
    """Whatever calls ssh-keygen would sign something else, or nothing, with the shim."""
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
