"""What a payload is: git's commits, tags and push certificates as real git writes them, and the
rest of the world, which is "other"."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import random
import re
import shlex
import socket
import sys
import tarfile
from email.message import EmailMessage
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

import pytest
from conftest import (
    ROOT,
    Agent,
    Answer,
    Keys,
    Proxy,
    cannot_run,
    clean_env,
    need,
    parse_answer,
    rows,
    run,
)

import ssh_agent_proxy as sap

FORMATS = ("sha1", "sha256")  # of object ids
DIGITS = {"sha1": 40, "sha256": 64}
KINDS = ("commit", "tag", "push", "other")
BEGIN = b"-----BEGIN SSH SIGNATURE-----\n"
MIB = 1 << 20
KIB_300 = 300 * 1024


def parse(payload: bytes) -> sap.Payload:
    """As a request's body is looked at: its beginning, its size, and whether it holds a NUL."""
    return sap.parse_payload(payload[: sap.KEPT], len(payload), b"\0" in payload)


def kind(payload: bytes) -> str:
    return parse(payload).kind


def text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


# ---------------------------------------------------------------- what real git hands its signer

# Git's gpg.ssh.program: keeps what it is handed and what ssh-keygen makes of it, in order.
SIGNER = """#!/bin/sh
set -eu
for file; do :; done
number=$(ls "$CAPTURED" | wc -l)
number=$((1000 + number / 2))
cp -- "$file" "$CAPTURED/$number"
ssh-keygen "$@"
cp -- "$file.sig" "$CAPTURED/$number.sig"
"""

# Keeps each push certificate that a repository is handed, named by its order.
PRE_RECEIVE = """#!/bin/sh
set -eu
[ -z "${GIT_PUSH_CERT:-}" ] ||
    git cat-file blob "$GIT_PUSH_CERT" >"received-$(ls | grep -c received-)"
"""

# A repository whose server asks for signed pushes without a nonce, or with one of its own: the
# first line of what git's own server says is changed, and nothing is received.
RECEIVE_PACK = r"""#!{python}
import re, subprocess, sys
said = subprocess.run(["git", "receive-pack", "--http-backend-info-refs", sys.argv[1]],
                      stdout=subprocess.PIPE, check=True).stdout
size = int(said[:4], 16)
first = re.sub(rb"push-cert=[^ \n]+", {capability!r}, said[4:size])
sys.stdout.buffer.write(b"%04x" % (len(first) + 4) + first + said[size:])
sys.stdout.flush()
sys.stdin.buffer.read()
"""


class Captured(NamedTuple):
    """What git had signed."""

    payload: bytes
    block: bytes  # the armored signature


class Push(NamedTuple):
    pushee: str
    changed: Set[str]  # the refs that it has changed


class Lab:
    """A repository in which git signs everything, and all that it had signed."""

    def __init__(self, folder: Path, key: Path, id_format: str) -> None:
        self.folder = folder
        self.id_format = id_format
        self.key = key
        self.path = folder / "repository"
        self.store = folder / "captured"
        self.pushes: List[Push] = []
        self.store.mkdir(parents=True)
        self.path.mkdir()
        signer = folder / "signer"
        signer.write_text(SIGNER)
        signer.chmod(0o755)
        date = "1700000000 +0200"
        self.env = clean_env(folder, CAPTURED=self.store, GIT_EDITOR="true")
        self.env.update(GIT_AUTHOR_DATE=date, GIT_COMMITTER_DATE=date)
        self.configure(
            ("gpg.format", "ssh"),
            ("gpg.ssh.program", signer),
            ("user.signingkey", f"{key}.pub"),
            ("commit.gpgsign", "true"),
            ("tag.gpgsign", "true"),
        )
        self.init(self.path)

    def configure(self, *settings: Tuple[str, Any]) -> None:
        """As variables: less to start than `git config`."""
        first = int(self.env.get("GIT_CONFIG_COUNT", "0"))
        for number, (name, value) in enumerate(settings, first):
            self.env[f"GIT_CONFIG_KEY_{number}"] = name
            self.env[f"GIT_CONFIG_VALUE_{number}"] = str(value)
        self.env["GIT_CONFIG_COUNT"] = str(first + len(settings))

    def init(self, path: Path, *options: str) -> None:
        argv = ["git", "init", "-q", "--template=", "-b", "main", *options]
        argv += [f"--object-format={self.id_format}"] if self.id_format != "sha1" else []
        done = run([*argv, path], env=self.env, check=False)
        if done.returncode:
            assert self.id_format != "sha1", done.stderr
            cannot_run(f"this git makes no {self.id_format} repository: install 2.29 or newer")

    def git(self, *args: Any, input: bytes = b"", check: bool = True, **env: str) -> bytes:
        done = run(["git", *args], {**self.env, **env}, self.path, input, check)
        return done.stdout if check else done.stderr

    def line(self, *args: Any, **options: Any) -> str:
        return self.git(*args, **options).decode().strip()

    def commit(self, message: Any = "A commit", *options: str, **env: str) -> None:
        if isinstance(message, str):
            message = message.encode()
        self.git("commit", "-q", "--allow-empty", "-F", "-", *options, input=message, **env)

    def branch(self, name: str, *messages: str) -> None:
        """A branch off main, with a commit for each of MESSAGES; main is checked out after."""
        self.git("checkout", "-q", "-b", name, "main")
        for message in messages:
            (self.path / message).write_text(message)
            self.git("add", message)
            self.commit(message)
        self.git("checkout", "-q", "main")

    def write(self, name: str) -> None:
        (self.path / name).write_text(f"{name}\n")
        self.git("add", name)

    def object(self, kind: str, content: bytes) -> str:
        """Written as it is, whatever git thinks of it."""
        argv = ["hash-object", "-w", "--literally", "-t", kind, "--stdin"]
        return self.line(*argv, input=content)

    def peer(self) -> Path:
        """A repository to push to."""
        path = self.folder / "peer"
        self.init(path, "--bare")
        hook = path / "hooks" / "pre-receive"
        hook.parent.mkdir()
        hook.write_text(PRE_RECEIVE)
        hook.chmod(0o755)
        with (path / "config").open("a") as f:
            f.write("[receive]\ncertNonceSeed = a seed\nadvertisePushOptions = true\n")
        return path

    def push(self, *args: Any, to: str = "../peer", pushee: str = "") -> None:
        """Notes what came of it, at PEER."""
        before = self.refs()
        self.git("push", "-q", "--signed", to, *args)
        after = self.refs()
        changed = {name for name, _ in set(before.items()) ^ set(after.items())}
        self.pushes.append(Push(pushee or to, changed))

    def refs(self) -> Dict[str, str]:
        listed = self.git("-C", "../peer", "for-each-ref", "--format=%(refname) %(objectname)")
        lines = listed.decode().splitlines()
        return {name: value for name, _, value in (line.rpartition(" ") for line in lines)}

    def push_to(self, capability: bytes, *args: Any) -> str:
        """To a server that says CAPABILITY in place of push-cert=NONCE; what git says of it."""
        path = self.folder / "receive-pack"
        path.write_text(RECEIVE_PACK.format(python=sys.executable, capability=capability))
        path.chmod(0o755)
        self.pushes.append(Push("../peer", set()))
        argv = ["push", "-q", "--signed", f"--receive-pack={shlex.quote(str(path))}", "../peer"]
        return self.git(*argv, *args, check=False).decode()

    @property
    def captured(self) -> List[Captured]:
        files = sorted(p for p in self.store.iterdir() if p.suffix != ".sig")
        return [Captured(p.read_bytes(), Path(f"{p}.sig").read_bytes()) for p in files]

    def finished(self) -> Dict[Tuple[str, bytes], str]:
        """The ids of git's own commits and tags, by their kind and by what was signed of them."""
        listed = self.line("cat-file", "--batch-all-objects", "--batch-check")
        found = {}
        for name, kind, _ in map(str.split, listed.splitlines()):
            if kind in ("commit", "tag"):
                found[kind, unsigned(kind, self.git("cat-file", kind, name))] = name
        return found


def unsigned(kind: str, content: bytes) -> bytes:
    """A commit or tag as git stores it, without its signature."""
    if kind == "tag":
        return content.partition(BEGIN)[0]
    head, blank, message = content.partition(b"\n\n")
    kept, inside = [], False
    for line in head.split(b"\n"):
        inside = line.startswith((b"gpgsig ", b"gpgsig-sha256 ")) or (inside and line[:1] == b" ")
        kept += [] if inside else [line]
    return b"\n".join(kept) + blank + message


# ---- scenarios: what a person does in a repository


def root(lab: Lab) -> None:
    lab.write("file")
    lab.commit("The first")


def normal(lab: Lab) -> None:
    lab.commit("One")
    lab.write("file")
    lab.commit("Two\n\nWith a body\n\nof paragraphs")


def merge(lab: Lab) -> None:
    lab.commit("Base")
    lab.branch("topic", "topic")
    lab.git("merge", "-q", "--no-ff", "-m", "A merge", "topic")


def octopus(lab: Lab) -> None:
    lab.commit("Base")
    names = [f"topic{number}" for number in range(12)]
    for name in names:
        lab.branch(name, name)
    lab.git("merge", "-q", "--no-ff", "-m", "An octopus", *names)


def merge_of_a_signed_tag(lab: Lab) -> None:
    lab.commit("Base")
    lab.branch("topic", "topic")
    lab.git("tag", "-s", "-m", "A release\n\nwith a body\n\n\nand more", "v1", "topic")
    lab.git("merge", "-q", "--no-ff", "-m", "A merge of a tag", "v1")


def octopus_of_signed_tags(lab: Lab) -> None:
    lab.commit("Base")
    for name in ("one", "two"):
        lab.branch(name, name)
        lab.git("tag", "-s", "-m", f"Tag {name}", f"v{name}", name)
    lab.git("merge", "-q", "--no-ff", "-m", "Two tags", "vone", "vtwo")


def amended_merge_of_a_signed_tag(lab: Lab) -> None:
    merge_of_a_signed_tag(lab)
    lab.git("commit", "-q", "--amend", "-m", "Amended")


def amended(lab: Lab) -> None:
    lab.commit("One")
    lab.git("commit", "-q", "--amend", "-m", "Two", "--allow-empty")


def rebased(lab: Lab) -> None:
    lab.commit("Base")
    lab.branch("topic", "a", "b", "c")
    lab.commit("Main goes on")
    lab.git("rebase", "-q", "main", "topic")


def squashed(lab: Lab) -> None:
    lab.commit("Base")
    lab.branch("topic", "a", "b")
    lab.git("checkout", "-q", "topic")
    lab.write("c")
    lab.git("commit", "-q", "--fixup", "HEAD~1")
    lab.git("rebase", "-q", "-i", "--autosquash", "main", GIT_SEQUENCE_EDITOR="true")


def cherry_picked(lab: Lab) -> None:
    lab.commit("Base")
    lab.branch("topic", "a")
    lab.commit("Main goes on")
    lab.git("cherry-pick", "-x", "topic")


def reverted(lab: Lab) -> None:
    lab.write("file")
    lab.commit("Base")
    lab.write("other")
    lab.commit("A mistake")
    lab.git("revert", "--no-edit", "HEAD")


def mailed(lab: Lab) -> None:
    lab.commit("Base")
    lab.branch("topic", "a")
    mail = lab.git("format-patch", "--stdout", "main..topic")
    lab.git("am", "-q", input=mail)


def plumbed(lab: Lab) -> None:
    tree = lab.line("write-tree")
    lab.git("commit-tree", "-S", tree, "-F", "-", input=b"By commit-tree, no newline")


def empty_message(lab: Lab) -> None:
    lab.git("commit", "-q", "--allow-empty", "--allow-empty-message", "-m", "")


def message(data: bytes, *options: str) -> Callable[[Lab], None]:
    return lambda lab: lab.commit(data, "--cleanup=verbatim", *options)


def author(name: str, email: str, encoding: str = "UTF-8") -> Callable[[Lab], None]:
    def make(lab: Lab) -> None:
        lab.configure(("i18n.commitEncoding", encoding))
        who = {"AUTHOR_NAME": name, "AUTHOR_EMAIL": email}
        who.update(COMMITTER_NAME=name, COMMITTER_EMAIL=email)
        lab.commit("By somebody", **{f"GIT_{n}": value for n, value in who.items()})

    return make


def dated(date: str) -> Callable[[Lab], None]:
    return lambda lab: lab.commit("At a time", GIT_AUTHOR_DATE=date, GIT_COMMITTER_DATE=date)


def encoded(name: str, data: bytes) -> Callable[[Lab], None]:
    def make(lab: Lab) -> None:
        lab.configure(("i18n.commitEncoding", name))
        lab.commit(data)

    return make


def pushed(*refspecs: str, **options: str) -> Callable[[Lab], None]:
    """After a first push of main, which is there when REFSPECS are pushed."""

    def make(lab: Lab) -> None:
        lab.peer()
        lab.commit("Base")
        lab.git("push", "-q", "../peer", "main", "main:old")
        lab.commit("More")
        named = {name: value.format(lab.folder / "peer") for name, value in options.items()}
        lab.push(*refspecs, **named)

    return make


def pushed_many(lab: Lab) -> None:
    lab.peer()
    lab.commit("Base")
    names = [f"refs/heads/many/{number}" for number in range(300)]
    lab.git("update-ref", "--stdin", input="".join(f"create {n} HEAD\n" for n in names).encode())
    lab.push("refs/heads/*:refs/heads/*")


def pushed_without_nonce(lab: Lab) -> None:
    lab.peer()
    lab.commit("Base")
    assert "remote end hung up" in lab.push_to(b"push-cert", "main:anew")


def further(headers: bytes, *options: str) -> Callable[[Lab], None]:
    """A commit with further HEADERS, which `git commit --amend` keeps."""

    def make(lab: Lab) -> None:
        tree = lab.line("write-tree")
        content = f"tree {tree}\nauthor A <a> 1 +0000\ncommitter C <c> 1 +0000\n".encode()
        name = lab.object("commit", content + headers + b"\nWritten by another program\n")
        lab.git("update-ref", "HEAD", name)
        lab.git(*options, "commit", "-q", "--amend", "--allow-empty", "-m", "Amended")

    return make


def tag_of(what: str) -> Callable[[Lab], None]:
    def make(lab: Lab) -> None:
        lab.write("file")
        lab.commit("Base")
        lab.git("tag", "-s", "-m", "Of the commit", "first")
        lab.git("tag", "-s", "-m", f"Of {what}\n\nAnd more", "second", what)

    return make


def tag_named(name: str, data: bytes = b"A tag\n") -> Callable[[Lab], None]:
    def make(lab: Lab) -> None:
        lab.commit("Base")
        lab.git("tag", "-s", "--cleanup=verbatim", "-F", "-", name, input=data)

    return make


def everything(lab: Lab) -> None:
    """A commit, a tag and a push certificate that have all there is; the tables below start here.

    The commit is the third that is signed.
    """
    lab.peer()
    lab.commit("Base")
    lab.branch("topic", "topic")
    ids = [lab.line("rev-parse", name) for name in ("main^{tree}", "main", "topic")]
    head = "tree {}\nparent {}\nparent {}\n".format(*ids).encode()
    head += b"author A U Thor <a@example.com> 1600000000 -0330\ncommitter C <c> 1 +0000\n"
    further = b"x-note one\n two\n \n three\nchange-id zyx\n"
    lab.git("update-ref", "HEAD", lab.object("commit", head + further + b"\nNot signed\n"))
    encoding = ["-c", "i18n.commitEncoding=ISO-8859-1"]
    lab.git(*encoding, "commit", "-q", "--amend", "--allow-empty", "-m", "Subject\n\nBody")
    lab.git("tag", "-s", "-m", "Subject\n\nBody", "v1")
    lab.push("main", "main:other", "-o", "a=b", "-o", "c")


SCENARIOS: List[Tuple[str, str, bytes, Callable[[Lab], None]]] = [
    # name, the kinds that git has signed in order, what must stand in one of them, how
    ("everything", "commit commit commit tag push",
     rb"^parent \w+\nparent \w+\n(?:.*\n){2}encoding ISO-8859-1\nx-note one\n two\n \n three\n",
     everything),
    ("root", "commit", rb"\Atree \w+\nauthor ", root),
    ("normal", "commit commit", rb"\Atree \w+\nparent \w+\nauthor ", normal),
    ("merge", "commit commit commit", rb"^parent \w+\nparent \w+\nauthor ", merge),
    ("octopus", "commit " * 14, rb"^(?:parent \w+\n){13}author ", octopus),
    ("merge of a signed tag", "commit commit tag commit",
     rb"^mergetag object \w+\n type commit\n(?: .*\n)+ \n with a body\n \n", merge_of_a_signed_tag),
    ("octopus of signed tags", "commit commit tag commit tag commit",
     rb"^mergetag object (?:.*\n)+mergetag object ", octopus_of_signed_tags),
    ("amended merge of a signed tag", "commit commit tag commit commit",
     rb"^mergetag (?:.*\n)+\nAmended\n", amended_merge_of_a_signed_tag),
    ("amended", "commit commit", rb"\n\nTwo\n", amended),
    ("rebased", "commit " * 8, rb"\n\nc\n", rebased),
    ("squashed", "commit " * 6, rb"\n\nb\n", squashed),
    ("cherry-picked", "commit " * 4, rb"\(cherry picked from commit \w+\)", cherry_picked),
    ("reverted", "commit " * 3, rb'\n\nRevert "A mistake"\n', reverted),
    ("mailed", "commit " * 3, rb"\n\na\n", mailed),
    ("plumbed", "commit", rb"no newline\Z", plumbed),
    ("message: empty", "commit", rb"^committer .*\n\n\Z", empty_message),
    ("message: leading empty lines", "commit", rb"0\n\n\n\nAfter", message(b"\n\nAfter two\n")),
    ("message: leading blanks", "commit", rb"\n\n \t Blanks", message(b" \t Blanks\n")),
    ("message: a comment", "commit", rb"\n\n# Not", message(b"# Not a comment\n\n# nor this\n")),
    ("message: no newline", "commit", rb"None\Z", message(b"None")),
    ("message: CR LF", "commit", rb"One\r\n\r\nTwo\r\n", message(b"One\r\n\r\nTwo\r\n")),
    ("message: control characters", "commit", rb"\x1b\[31m", message(b"\x1b[31mRed\x07\x7f\n")),
    ("message: looks like headers", "commit", rb"\n\ntree ",
     message(b"tree " + b"a" * 40 + b"\nauthor A <a> 1 +0000\n\nNo\n")),
    ("message: Latin-1 without saying so", "commit", "\n\ncafé\n".encode(), message(b"caf\xe9\n")),
    ("message: 300 KiB", "commit", rb"x{90}\n\Z",
     message(b"Long\n\n" + (b"x" * 99 + b"\n") * 3072)),
    ("message: a line of 300 KiB", "commit", rb"\n\nyyyy", message(b"y" * KIB_300)),
    ("author: no address", "commit", rb"^author x <> 17", author(" x ", "")),
    ("author: one letter", "commit", rb"^author x <y> 17", author("x", "y")),
    ("author: unicode", "commit", "^author Ünï ☃ <ü@ß> ".encode(), author("Ünï ☃", "ü@ß")),
    ("author: Latin-1", "commit", "^author Café <é@x> ".encode(), author("Caf\udce9", "\udce9@x")),
    ("author: bidi override", "commit", "^author \u202ex <".encode(), author("\u202ex", "a@b")),
    ("author: very long", "commit", rb"^author (?:Long ){1500}", author("Long " * 1500, "l" * 500)),
    ("author: quotes within", "commit", rb'^author x "Q" y <', author('x "Q" y', "a@b")),
    ("author: in quotes", "commit", rb"^author Q R <", author('"Q R"', "a@b")),
    ("author: a tab", "commit", rb"^author a\tb <c\td> ", author("a\tb", "c\td")),
    ("author: control characters", "commit", rb"^author a\x01b\x7fc\rd <",
     author("a\x01b\x7fc\rd", "a@b")),
    ("author: a line break", "commit", rb"^author ab <cd> ", author("a\nb", "c\nd")),
    ("author: angle brackets", "commit", rb"^author a b c <de> ", author("a <b> c", "<d>e")),
    ("author: blanks in the address", "commit", rb"<a b c@d e> ", author("A", "a b c@d e")),
    ("author: two blanks within", "commit", rb"^author a  b <c> ", author("a  b", "c")),
    ("author: looks like a date", "commit", rb"^author x 1 \+0000 <", author("x 1 +0000", "a@b")),
    *[(f"date: {date}", "commit", b"^author .*> %s\n" % re.escape(date.lstrip("@")).encode(),
       dated(date)) for date in (
        "@0 +0000", "@1 +0000", "@2 -0330", "1700000000 +1400", "1700000000 -1200",
        "1700000000 +0545", "@4102444800 +0000", "@99999999999 +0000", "@9223372036854775807 +0000",
        "@18446744073709551614 +0000",
    )],
    ("encoding: ISO-8859-1", "commit", rb"^encoding ISO-8859-1\n\ncaf\xe9",
     encoded("ISO-8859-1", b"caf\xe9\n")),
    ("encoding: Shift_JIS", "commit", rb"^encoding Shift_JIS\n\n\x83",
     encoded("Shift_JIS", "カ".encode("shift_jis"))),
    ("encoding: KOI8-R", "commit", rb"^encoding KOI8-R\n", encoded("KOI8-R", b"\xf0\xd2\xc9\n")),
    ("encoding: Windows-1252", "commit", rb"^encoding Windows-1252\n",
     encoded("Windows-1252", b"\x93Quoted\x94\n")),
    ("encoding: unknown to anyone", "commit", rb"^encoding x-none\n\n\xff",
     encoded("x-none", b"\xff\n")),
    ("encoding: of names", "commit", rb"^author Caf\xe9 <\xe9@x> ",
     author("Caf\udce9", "\udce9@x", "ISO-8859-1")),
    ("encoding: UTF-8 is not named", "commit", "0\n\ncafé".encode(),
     encoded("UTF-8", "café\n".encode())),
    ("headers: of jj", "commit", rb"^change-id zyx\n\nAmended\n", further(b"change-id zyx\n")),
    ("headers: of GitButler", "commit", rb"^gitbutler-headers-version 2\ngitbutler-change-id 1a\n",
     further(b"gitbutler-headers-version 2\ngitbutler-change-id 1a\ngitbutler-conflicted 3\n")),
    ("headers: of hg-git", "commit", rb"^HG:extra branch:stable\n",
     further(b"HG:rename-source hg\nHG:extra branch:stable\n")),
    ("headers: folded", "commit", rb"^x-note one\n  two\n \n four\n\n",
     further(b"x-note one\n  two\n \n four\n")),
    ("headers: one twice", "commit", rb"^x-a 1\nx-a 2\n\n", further(b"x-a 1\nx-a 2\n")),
    ("headers: an empty value", "commit", rb"^x-empty \n\n", further(b"x-empty \n")),
    ("headers: blanks around a value", "commit", rb"^x-blank   x  \n\n",
     further(b"x-blank   x  \n")),
    ("headers: a tab in a name", "commit", rb"^x\ty z\n\n", further(b"x\ty z\n")),
    ("headers: Latin-1", "commit", rb"^x-\xe9 \xe9\n\n",
     further(b"x-\xe9 \xe9\n", "-c", "i18n.commitEncoding=ISO-8859-1")),
    ("headers: after the encoding", "commit", rb"^encoding KOI8-R\nchange-id zyx\n\n",
     further(b"change-id zyx\n", "-c", "i18n.commitEncoding=KOI8-R")),
    ("headers: 100 KiB", "commit", rb"^x-long (?:yes ){25600}\n",
     further(b"x-long " + b"yes " * 25600 + b"\n")),
    ("headers: names that begin like git's", "commit", rb"^trees x\nparent-of x\nauthors x\n",
     further(b"trees x\nparent-of x\nauthors x\ncommitter2 x\nencodings x\n")),
    ("tag of a commit", "commit tag tag", rb"^type commit\ntag second\n", tag_of("HEAD")),
    ("tag of a tree", "commit tag tag", rb"^type tree\ntag second\n", tag_of("HEAD^{tree}")),
    ("tag of a blob", "commit tag tag", rb"^type blob\ntag second\n", tag_of("HEAD:file")),
    ("tag of a tag", "commit tag tag", rb"^type tag\ntag second\n", tag_of("first")),
    ("tag: slashes", "commit tag", rb"^tag a/b/c-1\.0\+rc\n", tag_named("a/b/c-1.0+rc")),
    ("tag: unicode", "commit tag", "^tag ü/☃\n".encode(), tag_named("ü/☃")),
    ("tag: Latin-1", "commit tag", rb"^tag caf\xe9\n", tag_named("caf\udce9", b"caf\xe9\n")),
    ("tag: punctuation", "commit tag", rb"^tag x@y,\(z\)='\{\}\"&;\|<>\$!#%\n",
     tag_named("x@y,(z)='{}\"&;|<>$!#%")),
    ("tag: a long name", "commit tag", rb"^tag (?:long){50}\n", tag_named("long" * 50)),
    ("tag: named like a branch", "commit tag", rb"^tag refs/heads/x\n", tag_named("refs/heads/x")),
    ("tag: empty message", "commit tag", rb"^tagger .*\n\n\Z", tag_named("v1", b"")),
    ("tag: no newline at the end", "commit tag", rb"\n\nNone\Z", tag_named("v1", b"None")),
    ("tag: 300 KiB", "commit tag", rb"\n\nx{307200}\Z", tag_named("v1", b"x" * KIB_300)),
    ("push: one ref", "commit commit push",
     rb"\Acertificate version 0\.1\npusher SHA256:\S{43} .*\npushee \.\./peer\nnonce \S+\n\n",
     pushed("main")),
    ("push: many refs", "commit push", rb"(?:\w+ \w+ refs/heads/many/\d+\n){300}", pushed_many),
    ("push: options", "commit commit push", rb"^push-option a=b c\npush-option \npush-option z\n\n",
     pushed("main", "-o", "a=b c", "-o", "", "-o", "z")),
    ("push: a delete", "commit commit push", rb"^\w+ 0+ refs/heads/old\n", pushed(":old")),
    ("push: a delete and two new", "commit commit push", rb"^0+ \w+ refs/heads/new\n",
     pushed(":old", "main:new", "main:refs/notes/x")),
    ("push: a forced one", "commit commit push", rb"refs/heads/main\n", pushed("+main~0:main")),
    ("push: unicode", "commit commit push", "refs/heads/ü/☃\n".encode(),
     pushed("main:refs/heads/ü/☃")),
    ("push: a URL with a password", "commit commit push", rb"^pushee file:///",
     pushed("main", to="file://user:secret@{}", pushee="file://{}")),
    ("push: no nonce", "commit push", rb"^pushee \.\./peer\n\n", pushed_without_nonce),
]


Play = Callable[[str, str], Lab]  # of a scenario and a format
Good = Callable[[str, str], bytes]  # of a kind and a format
Thing = Callable[[str], bytes]  # of a name


@pytest.fixture(scope="module")
def lab(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Play:
    """What git had signed in a scenario, played once."""
    need("git", "git")
    made: Dict[Tuple[str, str], Lab] = {}
    steps = {name: step for name, _, _, step in SCENARIOS}

    def play(name: str, id_format: str) -> Lab:
        if (name, id_format) not in made:
            folder = tmp_path_factory.mktemp("lab")
            lab = Lab(folder, keys["ed25519"], id_format)
            steps[name](lab)
            made[name, id_format] = lab
        return made[name, id_format]

    return play


of_each_format = pytest.mark.parametrize("id_format", FORMATS)


@of_each_format
@pytest.mark.parametrize("name, kinds, holds", rows([(n, n, k, h) for n, k, h, _ in SCENARIOS]))
def test_what_git_signs_is_recognised(
    name: str, kinds: str, holds: bytes, id_format: str, lab: Play
) -> None:
    payloads = [captured.payload for captured in lab(name, id_format).captured]
    assert any(re.search(holds, payload, re.M) for payload in payloads), payloads
    assert [kind(payload) for payload in payloads] == kinds.split(), payloads
    assert [parse(payload).size for payload in payloads] == [len(p) for p in payloads]


def commit_by_git(lab: Lab, name: str, payload: bytes) -> Dict[str, bytes]:
    """A commit's fields, by git's log, in the commit's own encoding."""
    named = re.search(rb"\A(?:.+\n)*?encoding (.+)\n", payload)
    encoding = named[1].decode() if named else "UTF-8"
    form = "--format=%T%x00%P%x00%an <%ae>%x00%cn <%ce>%x00%B"
    argv = ["-c", f"i18n.logOutputEncoding={encoding}", "log", "-1", form, name]
    tree, parents, author, committer, body = lab.git(*argv).split(b"\0")
    return {
        "subject": body.lstrip(b"\n").partition(b"\n")[0],
        "author": author,
        "committer": committer,
        "tree": tree,
        "parents": str(len(parents.split())).encode(),
        **({"encoding": named[1]} if named else {}),
    }


def tag_by_git(lab: Lab, name: str) -> Dict[str, bytes]:
    """A tag's fields, by for-each-ref."""
    # (Git finds no signature behind a message without a newline, and takes it for the message.)
    atoms = "contents:subject tag object type"
    form = "%00".join(f"%({atom})" for atom in atoms.split())
    form += "%00%(taggername) %(taggeremail)%00%(objectname)"
    for line in lab.git("for-each-ref", f"--format={form}", "refs/tags").splitlines():
        subject, tag, target, kind, tagger, itself = line.split(b"\0")
        if itself.decode() == name:
            subject = subject.partition(BEGIN.rstrip())[0]
            values = {"subject": subject, "tag": tag, "tagger": tagger, "object": target}
            return {**values, "type": kind}
    raise AssertionError(f"git has no tag {name}")


def push_by_git(lab: Lab, push: Push, payload: bytes) -> Dict[str, bytes]:
    """A push certificate's fields, by what has come of it."""
    changed = push.changed or {"refs/heads/anew"}
    first = min(changed, key=lambda ref: payload.index(f" {ref}\n".encode()))
    pusher = run(["ssh-keygen", "-l", "-f", f"{lab.key}.pub"]).stdout.split()[1]
    values = {"subject": first, "refs": str(len(changed)), "pushee": push.pushee}
    return {"pusher": pusher, **{name: value.encode() for name, value in values.items()}}


def fields_by_git(lab: Lab) -> Iterator[Tuple[bytes, Dict[str, bytes]]]:
    finished = lab.finished()
    pushes = iter(lab.pushes)
    for payload, _ in lab.captured:
        if ("commit", payload) in finished:
            yield payload, commit_by_git(lab, finished["commit", payload], payload)
        elif ("tag", payload) in finished:
            yield payload, tag_by_git(lab, finished["tag", payload])
        else:
            yield payload, push_by_git(lab, next(pushes), payload)


@of_each_format
@pytest.mark.parametrize("name", rows([(name, name) for name, *_ in SCENARIOS]))
def test_the_fields_are_what_git_says(name: str, id_format: str, lab: Play) -> None:
    for payload, expected in fields_by_git(lab(name, id_format)):
        fields = parse(payload).fields
        assert sorted(fields) == sorted(expected)
        for field, value in fields.items():
            whole = text(expected[field])
            # A long text may be cut, after more than anybody would read.
            assert value == whole or (len(value) >= 200 and whole.startswith(value)), field


@of_each_format
@pytest.mark.parametrize("name", rows([(name, name) for name, *_ in SCENARIOS]))
def test_the_id_is_that_of_the_object_that_git_makes(name: str, id_format: str, lab: Play) -> None:
    here = lab(name, id_format)
    finished = here.finished()
    for payload, block in here.captured:
        parsed = parse(payload)
        expected = finished.get((parsed.kind, payload), "")
        assert bool(expected) == (parsed.kind != "push"), "git has not made this object"
        if len(payload) > sap.KEPT:
            expected = ""
        assert parsed.object_id(block) == expected


@of_each_format
def test_a_push_certificate_arrives_as_it_was_signed(id_format: str, lab: Play) -> None:
    here = lab("push: options", id_format)
    received = (here.folder / "peer" / "received-0").read_bytes()
    assert [c.payload + c.block for c in here.captured if kind(c.payload) == "push"] == [received]


@of_each_format
@pytest.mark.parametrize("pushed", rows([
    ("a nonce with a colon", b"push-cert=a:b"),
    ("a nonce of 257 characters", b"push-cert=" + b"a" * 257),
]))  # fmt: skip
def test_git_signs_no_push_certificate_with_such_a_nonce(
    pushed: bytes, id_format: str, keys: Keys, tmp_path: Path
) -> None:
    lab = Lab(tmp_path, keys["ed25519"], id_format)
    lab.peer()
    lab.commit("Base")
    assert "invalid" in lab.push_to(pushed, "main") and "nonce" in lab.push_to(pushed, "main")
    assert [kind(payload) for payload, _ in lab.captured] == ["commit"]


@of_each_format
def test_git_refuses_a_nul_in_a_commit_message(id_format: str, keys: Keys, tmp_path: Path) -> None:
    lab = Lab(tmp_path, keys["ed25519"], id_format)
    argv = ["commit", "--allow-empty", "-F", "-"]
    assert b"a NUL byte in commit log message" in lab.git(*argv, input=b"x\0y\n", check=False)
    assert lab.captured == []


@of_each_format
def test_a_tag_with_a_nul_in_its_message_which_git_does_make_is_other(
    id_format: str, keys: Keys, tmp_path: Path
) -> None:
    """Git shows nothing of what stands behind a NUL: nobody knows what such a tag says."""
    lab = Lab(tmp_path, keys["ed25519"], id_format)
    lab.commit("Base")
    lab.git("tag", "-s", "--cleanup=verbatim", "-F", "-", "v1", input=b"Shown\n\0hidden\n")
    assert b"hidden" not in lab.git("tag", "-l", "--format=%(contents)")
    (_, _), (payload, block) = lab.captured
    assert payload.endswith(b"Shown\n\0hidden\n")
    assert kind(payload) == "other"
    assert parse(payload).fields == {}
    assert parse(payload).object_id(block) == ""


# ---------------------------------------------------------------- almost what git writes


@pytest.fixture(scope="module")
def good(lab: Play) -> Good:
    """A payload of the kind given that has all there is, from real git."""

    def find(kind: str, id_format: str) -> bytes:
        payloads = [captured.payload for captured in lab("everything", id_format).captured]
        beginning = {"commit": b"tree ", "tag": b"object ", "push": b"certificate "}[kind]
        return [payload for payload in payloads if payload.startswith(beginning)][-1]

    return find


def changed(payload: bytes, pattern: bytes, to: Any) -> bytes:
    """PAYLOAD with the first match of PATTERN replaced; it has to have one, and be another then."""
    result, number = re.subn(pattern, to, payload, count=1, flags=re.M)
    assert number == 1 and result != payload, f"{pattern!r} changes nothing in {payload!r}"
    return result


def other_hash(match: re.Match[bytes]) -> bytes:
    """A line with an object id of the other hash."""
    return match[1] + b"a" * (104 - len(match[2])) + match[3]


# What is done to an identity's line, in a commit's author and committer and in a tag's tagger.
IDENTITY = [
    # name, pattern behind the name of the header, what it becomes
    ("missing", rb"^WHO .*\n", b""),
    ("twice", rb"^(WHO .*\n)", rb"\1\1"),
    ("upper-case", rb"^WHO ", b"WHO "),
    ("a tab behind the header's name", rb"^(WHO) ", rb"\1\t"),
    ("no header's name", rb"^WHO ", b""),
    ("no value", rb"^WHO .*", lambda m: m[0].split()[0]),
    ("an empty value", rb"^WHO .*", lambda m: m[0].split()[0] + b" "),
    ("only a name", rb"^(WHO \w).* <.*", rb"\1"),
    ("< in the name", rb"^(WHO \w)", rb"\1<"),
    ("> in the name", rb"^(WHO \w)", rb"\1>"),
    ("< in the address", rb"^(WHO .*<\w)", rb"\1<"),
    ("> in the address", rb"^(WHO .*<\w)", rb"\1>"),
    ("two addresses", rb"^(WHO .*)(<.*>)", rb"\1\2 \2"),
    ("no address", rb"^(WHO .*) <.*>", rb"\1"),
    ("an address that is not closed", rb"^(WHO .*)>", rb"\1"),
    ("an address that is not opened", rb"^(WHO .*)<", rb"\1"),
    ("no blank before the address", rb"^(WHO .*) <", rb"\1<"),
    ("a tab before the address", rb"^(WHO .*) <", rb"\1\t<"),
    ("no name, and no blank for it", rb"^(WHO ).* <", rb"\1<"),
    ("no blank before the date", rb"^(WHO .*)> ", rb"\1>"),
    ("two blanks before the date", rb"^(WHO .*)> ", rb"\1>  "),
    ("a tab before the date", rb"^(WHO .*)> ", rb"\1>\t"),
    ("no date", rb"^(WHO .*> )\d+ ", rb"\1"),
    ("no date and no timezone", rb"^(WHO .*>).*", rb"\1"),
    ("a negative date", rb"^(WHO .*> )", rb"\1-"),
    ("a date with a sign", rb"^(WHO .*> )", rb"\1+"),
    ("a date of 21 digits", rb"^(WHO .*> )\d+", rb"\g<1>" + b"1" * 21),
    ("a date with zeros in front", rb"^(WHO .*> )", rb"\g<1>00"),
    ("a date with a fraction", rb"^(WHO .*> \d+)", rb"\1.5"),
    ("a date in hexadecimal", rb"^(WHO .*> )\d+", rb"\g<1>0x6553f100"),
    ("a letter in the date", rb"^(WHO .*> \d)\d", rb"\1l"),
    ("a date in digits of another script", rb"^(WHO .*> )\d+", b"\\g<1>\xd9\xa1\xd9\xa7"),
    ("a date in words", rb"^(WHO .*> ).*", rb"\1Tue Nov 14 22:13:20 2023 +0000"),
    ("two blanks before the timezone", rb"^(WHO .*\d) ", rb"\1  "),
    ("a tab before the timezone", rb"^(WHO .*\d) ", rb"\1\t"),
    ("no blank before the timezone", rb"^(WHO .*\d) ", rb"\1"),
    ("no timezone", rb"^(WHO .*) [+-]\d{4}$", rb"\1"),
    ("no timezone, but its blank", rb"^(WHO .* )[+-]\d{4}$", rb"\1"),
    ("a timezone of 3 digits", rb"^(WHO .*)\d$", rb"\1"),
    ("a timezone of 5 digits", rb"^(WHO .*)$", rb"\g<1>0"),
    ("a timezone without a sign", rb"^(WHO .*)[+-](\d{4})$", rb"\1\2"),
    ("a timezone with a colon", rb"^(WHO .*)(\d\d)$", rb"\1:\2"),
    ("a timezone by name", rb"^(WHO .*)[+-]\d{4}$", rb"\1CEST"),
    ("a letter in the timezone", rb"^(WHO .*)\d$", rb"\1O"),
    ("a blank at the end", rb"^(WHO .*)$", rb"\1 "),
    ("a tab at the end", rb"^(WHO .*)$", rb"\1\t"),
    ("CR LF", rb"^(WHO .*)$", rb"\1\r"),
    ("more behind it", rb"^(WHO .*)$", rb"\1 x"),
    ("a vertical tab for the newline", rb"^(WHO .*)\n", rb"\1\v"),
    ("a NUL in the name", rb"^(WHO \w)", b"\\1\0"),
    ("a NUL in the address", rb"^(WHO .*<\w)", b"\\1\0"),
    ("a NUL for the newline", rb"^(WHO .*)\n", b"\\1\0"),
    ("folded", rb"^(WHO .*)$", rb"\1\n more"),
    ("an empty line before it", rb"^(WHO )", rb"\n\1"),
]

# And to a line with an object id.
LINE_WITH_ID = [
    ("one digit too few", rb"^(WHO .*)\w$", rb"\1"),
    ("one digit too many", rb"^(WHO .*)$", rb"\1a"),
    ("no digits", rb"^(WHO ).*", rb"\1"),
    ("no id", rb"^WHO .*", lambda m: m[0].split()[0]),
    ("a digit in upper case", rb"^(WHO ).", rb"\1A"),
    ("a letter that is no digit", rb"^(WHO ).", rb"\1g"),
    ("in upper case", rb"^WHO ", b"WHO "),
    ("the other hash's length", rb"^(WHO )(\w+)(\n)", other_hash),
    ("a tab for the blank", rb"^(WHO) ", rb"\1\t"),
    ("two blanks", rb"^(WHO) ", rb"\1  "),
    ("no blank", rb"^(WHO) ", rb"\1"),
    ("a blank before it", rb"^(WHO )", rb" \1"),
    ("a blank at the end", rb"^(WHO .*)$", rb"\1 "),
    ("CR LF", rb"^(WHO .*)$", rb"\1\r"),
    ("a NUL for the newline", rb"^(WHO .*)\n", b"\\1\0"),
    ("a NUL for a digit", rb"^(WHO .*)\w$", b"\\1\0"),
    ("folded", rb"^(WHO .*)$", rb"\1\n more"),
    ("an empty line behind it", rb"^(WHO .*)$", rb"\1\n"),
    ("a comma and another", rb"^(WHO (.*))$", rb"\1,\2"),
]


def lines(kind: str, header: str, table: List[Any]) -> List[Any]:
    """TABLE for one header: WHO in a pattern stands for it, in a replacement for it in capitals."""

    def fill(what: Any, word: str) -> Any:
        return what.replace(b"WHO", word.encode()) if isinstance(what, bytes) else what

    return [
        (kind, f"{header}: {name}", fill(pattern, header), fill(to, header.upper()))
        for name, pattern, to in table
    ]


NOT_QUITE: List[Tuple[str, str, bytes, Any]] = [
    # kind, name, pattern, what it becomes
    *lines("commit", "tree", LINE_WITH_ID),
    *lines("commit", "parent", LINE_WITH_ID),
    *lines("commit", "author", IDENTITY),
    *lines("commit", "committer", IDENTITY),
    ("commit", "no tree", rb"\Atree .*\n", b""),
    ("commit", "tree twice", rb"\A(tree .*\n)", rb"\1\1"),
    ("commit", "a parent before the tree", rb"\A(tree .*\n)(parent .*\n)", rb"\2\1"),
    ("commit", "the tree behind the parents", rb"\A(tree .*\n)((?:parent .*\n)+)", rb"\2\1"),
    ("commit", "a parent behind the author", rb"^(parent .*\n)(author .*\n)", rb"\2\1"),
    ("commit", "a parent behind the committer", rb"^(parent .*\n)(author .*\ncommitter .*\n)",
     rb"\2\1"),
    ("commit", "author and committer swapped", rb"^(author .*\n)(committer .*\n)", rb"\2\1"),
    ("commit", "only author and committer", rb"\Atree .*\n(?:parent .*\n)+", b""),
    ("commit", "a tagger for the author", rb"^author ", b"tagger "),
    ("commit", "a header between author and committer", rb"^(committer )", rb"x-a b\n\1"),
    ("commit", "the encoding before the committer", rb"^(committer .*\n)(encoding .*\n)", rb"\2\1"),
    ("commit", "a second tree behind the committer", rb"^(tree .*\n)((?:.*\n)*)(encoding )",
     rb"\1\2\1\3"),
    ("commit", "a second parent behind the encoding", rb"^(encoding .*\n)",
     rb"\1parent " + b"a" * 40 + b"\n"),
    ("commit", "a second author among the headers", rb"^(author .*\n)((?:.*\n)*)(change-id )",
     rb"\1\2\1\3"),
    ("commit", "a second committer at the end", rb"^(committer .*\n)((?:.*\n)*)(change-id .*\n)",
     rb"\1\2\3\1"),
    ("commit", "any author among the headers", rb"^(change-id )", rb"author x\n\1"),
    ("commit", "any tree among the headers", rb"^(change-id )", rb"tree x\n\1"),
    ("commit", "an empty parent among the headers", rb"^(change-id )", rb"parent \n\1"),
    ("commit", "the encoding twice", rb"^(encoding .*\n)", rb"\1\1"),
    ("commit", "an encoding behind a further header", rb"^(encoding .*\n)(x-note .*\n(?: .*\n)+)",
     rb"\2\1"),
    ("commit", "an encoding without a value", rb"^encoding .*", b"encoding"),
    ("commit", "an encoding with a tab for the blank", rb"^encoding ", rb"encoding\t"),
    ("commit", "an encoding with CR LF", rb"^(encoding .*)", rb"\1\r"),
    ("commit", "an encoding with a NUL", rb"^encoding ", b"encoding \0"),
    ("commit", "an encoding that is folded", rb"^(encoding .*)", rb"\1\n more"),
    ("commit", "a folded line before any header", rb"^encoding .*\nx-note one\n", b""),
    ("commit", "a header without a value", rb"^change-id .*", b"change-id"),
    ("commit", "a header with a tab for the blank", rb"^change-id ", rb"change-id\t"),
    ("commit", "a header with a NUL in its name", rb"^change-id ", b"change\0id "),
    ("commit", "a header with a NUL in its value", rb"^change-id ", b"change-id \0"),
    ("commit", "a NUL in a folded line", rb"^ two", b" t\0o"),
    ("commit", "a NUL for a folded line's blank", rb"^ two", b"\0two"),
    ("commit", "a tab for a folded line's blank", rb"^ two", b"\ttwo"),
    ("commit", "no empty line", rb"\n\n", b"\n"),
    ("commit", "no empty line, nothing behind the head", rb"\n\n[\s\S]*", b"\n"),
    ("commit", "no newline behind the head", rb"\n\n[\s\S]*", b""),
    ("commit", "CR LF for the empty line", rb"\n\n", b"\n\r\n"),
    ("commit", "a tab in the empty line", rb"\n\n", b"\n\t\n"),
    ("commit", "a NUL for the empty line", rb"\n\n", b"\n\0\n"),
    ("commit", "a NUL at the message's start", rb"\n\n", b"\n\n\0"),
    ("commit", "a NUL at the message's end", rb"\Z", b"\0"),
    ("commit", "an empty line in front", rb"\A", b"\n"),
    ("commit", "a blank in front", rb"\A", b" "),
    ("commit", "a byte order mark in front", rb"\A", b"\xef\xbb\xbf"),
    ("commit", "git's own header of the object", rb"\A", b"commit 300\0"),
    ("commit", "CR LF throughout", rb"[\s\S]+", lambda m: m[0].replace(b"\n", b"\r\n")),
    ("commit", "CR throughout", rb"[\s\S]+", lambda m: m[0].replace(b"\n", b"\r")),
    ("commit", "in UTF-16", rb"[\s\S]+", lambda m: m[0].decode().encode("utf-16")),
    # (A tag has but one id: of the other length, it is a tag of the other hash.)
    *lines("tag", "object", [row for row in LINE_WITH_ID if row[2] is not other_hash]),
    *lines("tag", "tagger", IDENTITY),
    ("tag", "no object", rb"\Aobject .*\n", b""),
    ("tag", "object twice", rb"\A(object .*\n)", rb"\1\1"),
    ("tag", "a tree for the object", rb"\Aobject ", b"tree "),
    ("tag", "type before object", rb"\A(object .*\n)(type .*\n)", rb"\2\1"),
    ("tag", "tag before type", rb"^(type .*\n)(tag .*\n)", rb"\2\1"),
    ("tag", "tagger before tag", rb"^(tag .*\n)(tagger .*\n)", rb"\2\1"),
    ("tag", "no type", rb"^type .*\n", b""),
    ("tag", "type twice", rb"^(type .*\n)", rb"\1\1"),
    *[("tag", f"type {text(word)!r}", rb"^type .*", b"type " + word) for word in (
        b"", b"commits", b"Commit", b"COMMIT", b"note", b"ofs-delta", b"commit ", b" commit",
        b"commit\r", b"commit\0", b"commit tree", b"tre", b"1",
    )],
    ("tag", "a tab behind type", rb"^type ", rb"type\t"),
    ("tag", "no tag", rb"^tag .*\n", b""),
    ("tag", "tag twice", rb"^(tag .*\n)", rb"\1\1"),
    ("tag", "a tab behind tag", rb"^tag ", rb"tag\t"),
    ("tag", "no name", rb"^tag .*", b"tag "),
    ("tag", "no name, nor a blank", rb"^tag .*", b"tag"),
    *[("tag", f"a name with {character!r}", rb"^tag v1", b"tag v" + character + b"1")
      for character in (bytes([value]) for value in b" \t\r\v\f\0\x01\x1b\x1f\x7f~^:?*[")],
    ("tag", "a name with a backslash", rb"^tag v1", lambda m: b"tag v\\1"),
    *[("tag", f"a name that git refuses: {name!r}", rb"^tag v1", b"tag " + name)
      for name in (b".v1", b"-v1", b"/v1", b"v1/", b"v1.", b"v..1", b"v//1", b"v/.1", b"v@{1",
                   b"v1.lock", b"v.lock/1")],
    ("tag", "a blank behind the name", rb"^(tag .*)", rb"\1 "),
    ("tag", "CR LF behind the name", rb"^(tag .*)", rb"\1\r"),
    ("tag", "a header behind the tagger", rb"^(tagger .*\n)", rb"\1encoding UTF-8\n"),
    ("tag", "a signature as a header", rb"^(tagger .*\n)", rb"\1gpgsig x\n"),
    ("tag", "no empty line", rb"\n\n", b"\n"),
    ("tag", "no empty line, nothing behind the head", rb"\n\n[\s\S]*", b"\n"),
    ("tag", "no newline behind the head", rb"\n\n[\s\S]*", b""),
    ("tag", "CR LF for the empty line", rb"\n\n", b"\n\r\n"),
    ("tag", "a blank in the empty line", rb"\n\n", b"\n \n"),
    ("tag", "a NUL at the message's start", rb"\n\n", b"\n\n\0"),
    ("tag", "a NUL at the message's end", rb"\Z", b"\0"),
    ("tag", "an empty line in front", rb"\A", b"\n"),
    ("tag", "a byte order mark in front", rb"\A", b"\xef\xbb\xbf"),
    ("tag", "git's own header of the object", rb"\A", b"tag 300\0"),
    ("tag", "CR LF throughout", rb"[\s\S]+", lambda m: m[0].replace(b"\n", b"\r\n")),
    *[("push", f"version {text(word)!r}", rb"\Acertificate version .*",
       b"certificate version " + word)
      for word in (b"", b"0", b"0.2", b"1.0", b"0.10", b"00.1", b"0.1 ", b"0.1\r", b"0.1\0")],
    ("push", "no version", rb"\A.*\n", b""),
    ("push", "the version twice", rb"\A(.*\n)", rb"\1\1"),
    ("push", "an empty line in front", rb"\A", b"\n"),
    ("push", "a byte order mark in front", rb"\A", b"\xef\xbb\xbf"),
    ("push", "a certificate in capitals", rb"\Ac", b"C"),
    ("push", "no pusher", rb"^pusher .*\n", b""),
    ("push", "pusher twice", rb"^(pusher .*\n)", rb"\1\1"),
    ("push", "pusher before the version", rb"\A(.*\n)(pusher .*\n)", rb"\2\1"),
    ("push", "pusher behind pushee", rb"^(pusher .*\n)(pushee .*\n)", rb"\2\1"),
    ("push", "a pusher by name", rb"^pusher \S+  ", b"pusher C O Mitter <committer@example.com> "),
    ("push", "a pusher by GnuPG's key", rb"^pusher \S+", b"pusher 0123456789ABCDEF"),
    ("push", "a pusher by MD5", rb"^pusher \S+", b"pusher MD5:" + b":".join([b"0a"] * 16)),
    ("push", "a fingerprint of 42 characters", rb"^(pusher \S+)\S", rb"\1"),
    ("push", "a fingerprint of 44 characters", rb"^(pusher \S+)", rb"\1A"),
    ("push", "a fingerprint with padding", rb"^(pusher \S+)", rb"\1="),
    ("push", "a fingerprint in base64url", rb"^(pusher SHA256:).", rb"\1_"),
    ("push", "a fingerprint without its hash", rb"^pusher SHA256:", b"pusher "),
    ("push", "a fingerprint of another hash", rb"^pusher SHA256:", b"pusher SHA512:"),
    ("push", "no blank before the date", rb"^(pusher \S+)  ", rb"\1"),
    ("push", "three blanks before the date", rb"^(pusher \S+)  ", rb"\1   "),
    ("push", "a tab before the date", rb"^(pusher \S+)  ", rb"\1\t"),
    ("push", "no date", rb"^(pusher \S+  ).*", rb"\1"),
    ("push", "a negative date", rb"^(pusher \S+  )", rb"\1-"),
    ("push", "a letter in the date", rb"^(pusher \S+  )\d", rb"\1l"),
    ("push", "a date with zeros in front", rb"^(pusher \S+  )", rb"\g<1>00"),
    ("push", "no timezone", rb"^(pusher .*) \S+$", rb"\1"),
    ("push", "a timezone of 3 digits", rb"^(pusher .*)\d$", rb"\1"),
    ("push", "a timezone of 5 digits", rb"^(pusher .*)$", rb"\g<1>0"),
    ("push", "a blank behind the timezone", rb"^(pusher .*)$", rb"\1 "),
    ("push", "CR LF behind the pusher", rb"^(pusher .*)$", rb"\1\r"),
    ("push", "pushee twice", rb"^(pushee .*\n)", rb"\1\1"),
    ("push", "pushee behind nonce", rb"^(pushee .*\n)(nonce .*\n)", rb"\2\1"),
    ("push", "an empty pushee", rb"^pushee .*", b"pushee "),
    ("push", "a pushee without a value", rb"^pushee .*", b"pushee"),
    ("push", "a pushee with a NUL", rb"^(pushee .*)", b"\\1\0"),
    ("push", "nonce twice", rb"^(nonce .*\n)", rb"\1\1"),
    ("push", "an empty nonce", rb"^nonce .*", b"nonce "),
    ("push", "a nonce without a value", rb"^nonce .*", b"nonce"),
    ("push", "a nonce with a blank", rb"^(nonce .*)", rb"\1 x"),
    ("push", "a nonce with a control character", rb"^(nonce .*)", b"\\1\x1b"),
    ("push", "a nonce with a colon", rb"^(nonce .*)", rb"\1:"),
    ("push", "a nonce of 257 characters", rb"^nonce .*", b"nonce " + b"a" * 257),
    ("push", "a nonce with a NUL", rb"^(nonce .*)", b"\\1\0"),
    ("push", "nonce behind the options", rb"^(nonce .*\n)((?:push-option .*\n)+)", rb"\2\1"),
    ("push", "an option without a value", rb"^push-option .*", b"push-option"),
    ("push", "an option that is folded", rb"^(push-option .*)", rb"\1\n more"),
    ("push", "an option with a NUL", rb"^(push-option .*)", b"\\1\0"),
    ("push", "a header that is none", rb"^(push-option )", rb"x-a b\n\1"),
    ("push", "a folded line", rb"^(push-option )", rb" x\n\1"),
    ("push", "no empty line", rb"\n\n", b"\n"),
    ("push", "a second empty line", rb"\n\n", b"\n\n\n"),
    ("push", "a blank in the empty line", rb"\n\n", b"\n \n"),
    ("push", "no refs", rb"\n\n[\s\S]*", b"\n\n"),
    ("push", "no refs and no empty line", rb"\n\n[\s\S]*", b"\n"),
    ("push", "an id with a digit too few", rb"(\n\n)\w", rb"\1"),
    ("push", "an id with a digit too many", rb"(\n\n)", rb"\g<1>a"),
    ("push", "an id in upper case", rb"(\n\n\w+ )\w", rb"\1A"),
    ("push", "ids of two hashes", rb"(\n\n)(\w+)( )", other_hash),
    ("push", "ids of two hashes in two lines", rb"(\n)(\w+)( \w+ \S+\n)\Z", other_hash),
    ("push", "one id in a line", rb"(\n\n)\w+ ", rb"\1"),
    ("push", "three ids in a line", rb"(\n\n)(\w+ )", rb"\1\2\2"),
    ("push", "a tab between ids", rb"(\n\n\w+) ", rb"\1\t"),
    ("push", "two blanks between ids", rb"(\n\n\w+) ", rb"\1  "),
    ("push", "a tab before the ref", rb" (refs/.*\n)\Z", rb"\t\1"),
    ("push", "no ref behind the ids", rb" refs/.*\n\Z", rb"\n"),
    ("push", "an empty ref", rb" refs/.*\n\Z", rb" \n"),
    *[("push", f"a ref with {character!r}", rb"^(.* refs/heads)/", b"\\1" + character)
      for character in (bytes([value]) for value in b" \t\r\v\0\x01\x1b\x7f~^:?*[")],
    ("push", "a ref with a backslash", rb"^(.* refs/heads)/", rb"\1\\"),
    ("push", "a blank behind the last ref", rb"\n\Z", rb" \n"),
    ("push", "CR LF behind the last ref", rb"\n\Z", rb"\r\n"),
    ("push", "no newline at the end", rb"\n\Z", b""),
    ("push", "an empty line at the end", rb"\Z", b"\n"),
    ("push", "a line of text at the end", rb"\Z", b"more\n"),
    ("push", "text without a newline at the end", rb"\Z", b"x"),
    ("push", "a NUL at the end", rb"\Z", b"\0"),
    ("push", "a signature at the end", rb"\Z", BEGIN + b"AAAA\n-----END SSH SIGNATURE-----\n"),
    ("push", "CR LF throughout", rb"[\s\S]+", lambda m: m[0].replace(b"\n", b"\r\n")),
]


@of_each_format
@pytest.mark.parametrize("of, pattern, to", rows([
    (f"{of}: {name}", of, pattern, to) for of, name, pattern, to in NOT_QUITE
]))  # fmt: skip
def test_what_is_not_quite_gits_is_other(
    of: str, pattern: bytes, to: Any, id_format: str, good: Good
) -> None:
    payload = changed(good(of, id_format), pattern, to)
    parsed = parse(payload)
    assert parsed == sap.Payload("other", len(payload), {}, payload)
    assert sap.parse_payload(payload) == parsed
    assert parsed.object_id(BEGIN) == ""


STILL: List[Tuple[str, str, bytes, Any, Dict[str, Optional[str]]]] = [
    # kind, name, pattern, what it becomes, what its fields are then
    ("commit", "no parent", rb"(?:^parent .*\n)+", b"", {"parents": "0"}),
    ("commit", "three parents", rb"^(parent .*\n)", rb"\1\1", {"parents": "3"}),
    ("commit", "no encoding", rb"^encoding .*\n", b"", {"encoding": None}),
    ("commit", "lines of blanks before the subject", rb"\n\n.*", b"\n\n \n\t\r\n\v\f\n\n Real",
     {"subject": " Real"}),
    ("commit", "a line of blanks for a message", rb"\n\n[\s\S]*", b"\n\n \n", {"subject": ""}),
    ("tag", "lines of blanks before the subject", rb"\n\n.*", b"\n\n \n\r\nReal",
     {"subject": "Real"}),
    ("commit", "no further headers", rb"^x-note (?:.*\n)*?\n", b"\n", {}),
    ("commit", "a header's empty value", rb"^change-id .*", b"change-id ", {}),
    ("commit", "a header twice", rb"^(change-id .*\n)", rb"\1\1", {}),
    ("commit", "a folded line of three blanks", rb"^ two", b"   ", {}),
    ("commit", "no message", rb"\n\n[\s\S]*", b"\n\n", {"subject": ""}),
    ("commit", "another subject", rb"\n\n.*", b"\n\nX", {"subject": "X"}),
    ("commit", "tree lines in the message", rb"\Z", b"tree x\n\ntree y\n", {}),
    ("commit", "another author", rb"^author .*> ", b"author X <y> ", {"author": "X <y>"}),
    ("commit", "another committer", rb"^committer .*> ", b"committer X <y> ",
     {"committer": "X <y>"}),
    *[("tag", f"of a {word}", rb"^type .*", b"type " + word.encode(), {"type": word})
      for word in ("tree", "blob", "tag")],
    *[("tag", f"a name that git takes: {name}", rb"^tag v1", f"tag {name}".encode(), {"tag": name})
      for name in ("v.1", "v-1", "a/b/c", "@v", "v@1", "v.locked", "v{1}", "HEAD1")],
    ("tag", "another name", rb"^tag .*", b"tag x/y", {"tag": "x/y"}),
    ("tag", "another tagger", rb"^tagger .*> ", b"tagger X <y> ", {"tagger": "X <y>"}),
    ("tag", "no message", rb"\n\n[\s\S]*", b"\n\n", {"subject": ""}),
    ("tag", "another subject", rb"\n\n.*", b"\n\nX", {"subject": "X"}),
    ("push", "no options", rb"(?:^push-option .*\n)+", b"", {}),
    ("push", "no nonce", rb"^nonce .*\n", b"", {}),
    ("push", "a nonce of 256 characters", rb"^nonce .*", b"nonce " + b"aZ09-./+=_" * 25 + b"-" * 6,
     {}),
    ("push", "another pushee", rb"^pushee .*", b"pushee x y", {"pushee": "x y"}),
    ("push", "one ref", rb"^\w+ \w+ refs.*\n\Z", b"", {"refs": "1"}),
    ("push", "another ref", rb"(\n\n.*)refs/.*", rb"\1refs/x", {"subject": "refs/x"}),
    ("push", "bytes that are no UTF-8", rb"(\n\n.*)refs/.*", b"\\1refs/\xff",
     {"subject": "refs/\udcff"}),
]


@of_each_format
@pytest.mark.parametrize("of, pattern, to, fields", rows([
    (f"{of}: {name}", of, pattern, to, fields) for of, name, pattern, to, fields in STILL
]))  # fmt: skip
def test_what_git_could_have_written_is_still_recognised(
    of: str,
    pattern: bytes,
    to: Any,
    fields: Dict[str, Optional[str]],
    id_format: str,
    good: Good,
) -> None:
    before = good(of, id_format)
    after = parse(changed(before, pattern, to))
    assert after.kind == of
    expected = {**parse(before).fields, **fields}
    assert after.fields == {n: value for n, value in expected.items() if value is not None}


@of_each_format
def test_a_push_may_name_no_pushee(id_format: str, good: Good) -> None:
    before = good("push", id_format)
    after = parse(changed(before, rb"^pushee .*\n", b""))
    assert after.kind == "push"
    assert after.fields == {n: v for n, v in parse(before).fields.items() if n != "pushee"}


@of_each_format
@pytest.mark.parametrize("of", ["commit", "tag", "push"])
def test_no_beginning_is_taken_for_the_whole(of: str, id_format: str, good: Good) -> None:
    payload = good(of, id_format)
    last = rb"refs/.*\n" if of == "push" else rb"\n\n"
    ends = [match.end() for match in re.finditer(last, payload)]
    for size in range(len(payload)):
        begun = payload[:size]
        whole = size in ends if of == "push" else size >= ends[0]
        assert kind(begun) == (of if whole else "other"), begun


# ---------------------------------------------------------------- other things that are signed


def string(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def der_content(data: bytes) -> Tuple[int, int]:
    """Where the content of the SEQUENCE that DATA begins with begins and ends (X.690)."""
    assert data[0] == 0x30
    start = 2 + (data[1] & 0x7F if data[1] & 0x80 else 0)
    return start, start + (int.from_bytes(data[2:start], "big") if start > 2 else data[1])


class Maker:
    """What else a key may be asked to sign, by those who make it."""

    def __init__(self, keys: Keys, folder: Path) -> None:
        self.key = keys["ed25519"]
        self.blob = base64.b64decode(keys.line("ed25519").split()[1])
        self.folder = folder

    def ssh_authentication(self) -> bytes:
        """RFC 4252 section 7: what signs a user in somewhere."""
        return (
            string(hashlib.sha256(b"a session").digest())
            + b"\x32"  # SSH_MSG_USERAUTH_REQUEST
            + string(b"git")
            + string(b"ssh-connection")
            + string(b"publickey")
            + b"\x01"
            + string(b"ssh-ed25519")
            + string(self.blob)
        )

    def sshsig(self) -> bytes:
        """PROTOCOL.sshsig: what is signed for a file."""
        digest = hashlib.sha512(b"a file").digest()
        return b"SSHSIG" + string(b"file") + string(b"") + string(b"sha512") + string(digest)

    def ssh_certificate(self) -> bytes:
        """PROTOCOL.certkeys: what a certificate authority signs."""
        copy = self.folder / "certified.pub"
        copy.write_bytes(Path(f"{self.key}.pub").read_bytes())
        run(["ssh-keygen", "-q", "-s", self.key, "-I", "someone", "-n", "root", copy])
        line = (self.folder / "certified-cert.pub").read_bytes()
        blob = base64.b64decode(line.split()[1])
        signature = string(string(b"ssh-ed25519") + string(bytes(64)))
        assert blob[-len(signature) :].startswith(signature[:23]), "the signature stands last"
        return blob[: -len(signature)]

    def x509(self, form: str) -> bytes:
        argv = ["req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=tree", "-days", "9"]
        argv += ["-keyout", self.folder / "x509.key", "-outform", form]
        return run([need("openssl", "openssl"), *argv]).stdout

    def x509_certificate(self) -> bytes:
        """RFC 5280: TBSCertificate, the first element of the outer SEQUENCE, in DER."""
        whole = self.x509("DER")
        start, end = der_content(whole)
        assert end == len(whole)
        inner = whole[start:]
        return inner[: der_content(inner)[1]]

    def pem(self) -> bytes:
        return self.x509("PEM")

    def private_key(self) -> bytes:
        return self.key.read_bytes()

    def mail(self) -> bytes:
        mail = EmailMessage()
        mail["From"], mail["To"] = "A U Thor <author@example.com>", "committer@example.com"
        mail["Subject"] = "tree"
        mail.set_content("object\ntree\n")
        return mail.as_bytes()

    def json(self) -> bytes:
        return json.dumps({"tree": "a" * 40, "author": "A <a> 1 +0000"}, indent=1).encode()

    def token(self) -> bytes:
        """RFC 7515 section 5.1: what is signed of a JWT."""
        parts = [json.dumps(part).encode() for part in ({"alg": "EdDSA"}, {"sub": "tree"})]
        return b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)

    def tls(self) -> bytes:
        """RFC 8446 section 4.4.3: a server's CertificateVerify."""
        context = b"TLS 1.3, server CertificateVerify"
        return b" " * 64 + context + b"\0" + hashlib.sha256(b"a handshake").digest()

    def tarball(self) -> bytes:
        """Its first member is named like the beginning of a commit."""
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("tree " + "a" * 40), io.BytesIO())
        return file.getvalue()

    def compressed(self) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            tar.addfile(tarfile.TarInfo("tree"), io.BytesIO())
        return file.getvalue()

    def git_tree(self) -> bytes:
        return b"100644 file\0" + bytes(20) + b"40000 tree\0" + bytes(20)

    def git_pack(self) -> bytes:
        return b"PACK" + (2).to_bytes(4, "big") + (0).to_bytes(4, "big") + bytes(20)

    def git_bundle(self) -> bytes:
        return b"# v2 git bundle\n" + b"a" * 40 + b" refs/heads/main\n\n"

    def git_blob(self) -> bytes:
        return b"tree\n"

    def patch(self) -> bytes:
        return b"From " + b"a" * 40 + b" Mon Sep 17 00:00:00 2001\nFrom: A <a>\n\n---\n"

    def http(self) -> bytes:
        return b"POST /sign HTTP/1.1\r\nHost: localhost\r\n\r\ntree"

    def script(self) -> bytes:
        return b"#!/bin/sh\ntree\n"

    def nothing(self) -> bytes:
        return b""

    def a_newline(self) -> bytes:
        return b"\n"

    def a_blank(self) -> bytes:
        return b" "

    def a_nul(self) -> bytes:
        return b"\0"

    def the_word_tree(self) -> bytes:
        return b"tree "


THINGS = [name for name in vars(Maker) if name != "x509" and not name.startswith("_")]


@pytest.fixture(scope="module")
def thing(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Thing:
    maker = Maker(keys, tmp_path_factory.mktemp("things"))
    made: Dict[str, bytes] = {}
    return lambda name: made.setdefault(name, getattr(maker, name)())


@pytest.mark.parametrize("name", THINGS)
def test_what_is_not_gits_is_other(name: str, thing: Thing) -> None:
    assert kind(thing(name)) == "other"


@of_each_format
@pytest.mark.parametrize("of", ["commit", "tag"])
@pytest.mark.parametrize("name", THINGS)
def test_within_a_message_it_makes_the_payload_nothing_else(
    name: str, of: str, id_format: str, good: Good, thing: Thing
) -> None:
    """What git's own head stands in front of can be read as nothing but git's."""
    inside = thing(name)
    payload = changed(good(of, id_format), rb"\n\n[\s\S]*", lambda m: b"\n\nX\n" + inside)
    assert kind(payload) == ("other" if b"\0" in inside else of)
    assert payload.startswith((b"tree ", b"object "))


@of_each_format
@pytest.mark.parametrize("of", ["commit", "tag", "push"])
@pytest.mark.parametrize("name", [name for name in THINGS if name != "nothing"])
def test_in_front_of_a_payload_it_makes_it_other(
    name: str, of: str, id_format: str, good: Good, thing: Thing
) -> None:
    payload = good(of, id_format)
    assert kind(thing(name) + payload) == "other"
    assert kind(thing(name) + b"\n" + payload) == "other"


@of_each_format
@pytest.mark.parametrize("name", [name for name in THINGS if name != "nothing"])
def test_behind_a_push_certificate_it_makes_it_other(
    name: str, id_format: str, good: Good, thing: Thing
) -> None:
    assert kind(good("push", id_format) + thing(name)) == "other"


@of_each_format
@pytest.mark.parametrize("second", ["commit", "tag", "push"])
def test_what_follows_a_commit_or_a_tag_is_its_message(
    second: str, id_format: str, good: Good
) -> None:
    for first in ("commit", "tag"):
        before, after = (parse(good(first, id_format) + rest) for rest in (
            b"", good(second, id_format)
        ))  # fmt: skip
        assert after.kind == first
        assert after.fields == before.fields


# ---------------------------------------------------------------- large ones, and hostile ones

TREE = b"tree " + b"a" * 40 + b"\n"
PARENT = b"parent " + b"b" * 40 + b"\n"
AUTHOR = b"author A <a> 1 +0000\n"
COMMITTER = b"committer C <c> 1 +0000\n"
COMMIT = TREE + AUTHOR + COMMITTER
TAG = b"object " + b"a" * 40 + b"\ntype commit\ntag v1\n"
TAGGER = b"tagger C <c> 1 +0000\n"
PUSH = b"certificate version 0.1\npusher SHA256:" + b"A" * 43 + b"  1 +0000\n"
REF = b"0" * 40 + b" " + b"a" * 40 + b" refs/heads/x\n"


def fill(piece: bytes, *around: bytes) -> bytes:
    """PIECE as often as KEPT has room for with what stands AROUND it."""
    return piece * ((sap.KEPT - sum(map(len, around))) // len(piece))


def filled(before: bytes, piece: bytes, after: bytes = b"") -> bytes:
    return before + fill(piece, before, after) + after


DECIDE = """
import sys
sys.path.insert(0, sys.argv[1])
import ssh_agent_proxy as sap
payload = sys.stdin.buffer.read()
parsed = sap.parse_payload(payload[:sap.KEPT], len(payload), b"\\0" in payload)
print(parsed.kind, parsed.size, parsed.fields.get("parents") or parsed.fields.get("refs"))
"""


@pytest.mark.parametrize("payload, expected", rows([
    # name, payload, kind with the number of parents or refs
    ("100,000 parents", TREE + PARENT * 100000 + AUTHOR + COMMITTER + b"\nx", "other None"),
    ("5,000 parents", TREE + PARENT * 5000 + AUTHOR + COMMITTER + b"\nx", "commit 5000"),
    ("parents and no author", filled(TREE, PARENT), "other None"),
    ("parents and a broken author", filled(TREE, PARENT, b"author <\n\nx"), "other None"),
    ("parents and one too short", filled(TREE, PARENT, b"parent b\n" + AUTHOR), "other None"),
    ("folded lines", filled(COMMIT + b"x y\n", b" z\n", b"\nx"), "commit 0"),
    ("folded lines, no message", filled(COMMIT + b"x y\n", b" z\n"), "other None"),
    ("folded lines and a bad one", filled(COMMIT + b"x y\n", b" z\n", b"z\n\nx"), "other None"),
    ("folded lines of nothing", filled(COMMIT + b"x y\n", b" \n", b"z\n\nx"), "other None"),
    ("headers", filled(COMMIT, b"x y\n", b"\nx"), "commit 0"),
    ("headers and no end", filled(COMMIT, b"x y\n"), "other None"),
    ("headers and a bad one", filled(COMMIT, b"x y\n", b"xy\n\nx"), "other None"),
    ("headers, folded, and a bad one", filled(COMMIT, b"x y\n z\n", b"xy\n\nx"), "other None"),
    ("headers, folded, and an author", filled(COMMIT, b"x y\n z\n", AUTHOR + b"\nx"), "other None"),
    ("a header of blanks", filled(COMMIT + b"x", b" "), "other None"),
    ("a header of words", filled(COMMIT, b"x y "), "other None"),
    ("a header's name without an end", filled(COMMIT, b"x"), "other None"),
    ("a header's value without an end", filled(COMMIT + b"x ", b"y"), "other None"),
    ("empty lines", filled(COMMIT, b"\n"), "commit 0"),
    ("empty lines behind a tag", filled(TAG + TAGGER, b"\n"), "tag None"),
    ("blanks for an author", filled(TREE + b"author", b" "), "other None"),
    ("openings for an author", filled(TREE + b"author", b" <"), "other None"),
    ("closings for an author", filled(TREE + b"author a <", b">"), "other None"),
    ("addresses for an author", filled(TREE + b"author ", b"a <b> 1 +0000 "), "other None"),
    ("words for an author", filled(TREE + b"author ", b"a "), "other None"),
    ("one word for an author", filled(TREE + b"author ", b"a"), "other None"),
    ("an address without an end", filled(TREE + b"author a <", b"b"), "other None"),
    ("authors", filled(TREE, AUTHOR), "other None"),
    ("a long author", filled(TREE + b"author ", b"a b ", b" <c> 1 +0000\n" + COMMITTER + b"\nx"),
     "commit 0"),
    ("digits for a date", filled(TREE + b"author a <b> ", b"1"), "other None"),
    ("an encoding without an end", filled(COMMIT + b"encoding ", b"x"), "other None"),
    ("a tag's name without an end", filled(TAG[:-3], b"v"), "other None"),
    ("a tag's slashes", filled(TAG[:-1], b"/x"), "other None"),
    ("taggers", filled(TAG, TAGGER), "other None"),
    ("refs", filled(PUSH + b"\n", REF), f"push {(sap.KEPT - len(PUSH) - 1) // len(REF)}"),
    ("refs and a bad one", filled(PUSH + b"\n", REF, b"x"), "other None"),
    ("refs of nothing", filled(PUSH + b"\n", REF[:-2]), "other None"),
    ("options", filled(PUSH, b"push-option \n", b"\n" + REF), "push 1"),
    ("options and no refs", filled(PUSH, b"push-option \n", b"\n"), "other None"),
    ("options and a bad one", filled(PUSH, b"push-option \n", b"push\n\n" + REF), "other None"),
    ("pushees", filled(PUSH, b"pushee x\n", b"\n" + REF), "other None"),
    ("a nonce without an end", filled(PUSH + b"nonce ", b"x"), "other None"),
    ("one letter", b"a" * (4 * MIB), "other None"),
    ("blanks", b" " * (4 * MIB), "other None"),
    ("newlines", b"\n" * (4 * MIB), "other None"),
    ("zeros", bytes(4 * MIB), "other None"),
    ("trees", filled(b"", TREE), "other None"),
    ("the word tree", filled(b"", b"tree "), "other None"),
    ("certificates", filled(b"", PUSH), "other None"),
]))  # fmt: skip
def test_a_hostile_payload_is_decided(payload: bytes, expected: str) -> None:
    """In a process of its own: a parser that tries every way to read it would take hours."""
    of, number = expected.split()
    argv = [sys.executable, "-c", DECIDE, ROOT]
    answer = run(argv, input=payload, timeout=20).stdout.decode()
    assert answer.split() == [of, str(len(payload)), number]


def commit_with_head(size: int) -> bytes:
    """A commit whose head, the empty line included, has SIZE bytes."""
    before, after = COMMIT + b"x ", b"\n\n"
    return before + b"y" * (size - len(before + after)) + after + b"Subject\n\nBody\n"


def test_256_kib_of_a_payload_are_kept() -> None:
    assert sap.KEPT == 256 * 1024


def test_a_commit_is_known_by_a_head_and_the_beginning_of_its_subject() -> None:
    payload = commit_with_head(sap.KEPT - 1)
    assert parse(payload).kind == "commit"
    assert parse(payload).size == len(payload)


@pytest.mark.parametrize("head", [sap.KEPT, sap.KEPT + 1], ids=["the subject", "the head's end"])
def test_what_does_not_fit_is_other(head: int) -> None:
    payload = commit_with_head(head)
    assert parse(payload) == sap.Payload("other", len(payload), {}, payload[: sap.KEPT])


@pytest.mark.parametrize("blank", [b"\n", b" \n", b"\t\r\v\f\n", b" "], ids=repr)
@pytest.mark.parametrize("head", rows([("commit", COMMIT), ("tag", TAG + TAGGER)]))
def test_a_subject_that_nobody_could_see_makes_other(head: bytes, blank: bytes) -> None:
    # Git skips what is blank, and shows the line behind it.
    filling = blank * (sap.KEPT // len(blank) + 1)
    assert kind(head + b"\n" + filling + b"\nHidden\n") == "other"
    fits = parse(head + b"\n" + filling[: 1000 * len(blank)] + b"\nShown\n" + b"x" * MIB)
    assert fits.fields["subject"] == "Shown"


def test_the_subject_is_the_one_that_git_shows(home: Path) -> None:
    env = clean_env(home)
    run(["git", "init", "-q", home / "r"], env=env)
    for blank in (b"", b"\n", b" \n", b"\t\n\r\n \n", b"\n\n\f\n\v\n"):
        payload = re.sub(rb"(?m)^tree .*", b"tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904", COMMIT)
        payload = re.sub(rb"(?m)^parent .*\n", b"", payload) + b"\n" + blank + b"Real\n\nBody\n"
        made = run(["git", "hash-object", "-t", "commit", "-w", "--stdin"], env=env,
                   cwd=home / "r", input=payload)  # fmt: skip
        shown = run(["git", "log", "-1", "--format=%s", made.stdout.decode().strip()], env=env,
                    cwd=home / "r")  # fmt: skip
        assert parse(payload).fields["subject"] == shown.stdout.decode().strip() == "Real"


@pytest.mark.parametrize("of, head", rows([
    ("commit", "commit", COMMIT), ("tag", "tag", TAG + TAGGER),
]))  # fmt: skip
def test_a_message_may_go_on_beyond_what_is_kept(of: str, head: bytes) -> None:
    payload = head + b"\nSubject\n\n" + b"x" * MIB
    parsed = parse(payload)
    assert (parsed.kind, parsed.size) == (of, len(payload))
    assert parsed.fields["subject"] == "Subject"
    assert parsed.data == payload[: sap.KEPT]
    assert parsed.object_id(BEGIN) == ""


@pytest.mark.parametrize("head", rows([("commit", COMMIT), ("tag", TAG + TAGGER)]))
def test_a_nul_beyond_what_is_kept_makes_other(head: bytes) -> None:
    payload = head + b"\nSubject\n\n" + b"x" * MIB
    assert kind(payload + b"\0") == "other"
    assert sap.parse_payload(payload[: sap.KEPT], len(payload) + 1, True).fields == {}


def test_a_push_certificate_that_is_not_seen_whole_is_other() -> None:
    """The part that is kept ends with a whole line, and so would be a certificate by itself."""
    refs = REF * 1000
    before = PUSH + b"push-option "
    option = b"x" * (sap.KEPT - len(before) - len(b"\n\n") - len(refs))
    whole = before + option + b"\n\n" + refs
    assert len(whole) == sap.KEPT
    assert kind(whole) == "push"
    assert kind(whole + REF) == "other"


@of_each_format
@pytest.mark.parametrize("of", ["commit", "tag"])
def test_an_object_of_just_256_kib_still_has_its_id(
    of: str, id_format: str, keys: Keys, tmp_path: Path
) -> None:
    lab = Lab(tmp_path, keys["ed25519"], id_format)
    lab.commit("Base")

    def make(size: int) -> Captured:
        argv = ["--cleanup=verbatim", "-F", "-"]
        argv += ["v1", "-f", "main^{tree}"] if of == "tag" else ["--amend", "--allow-empty"]
        lab.git(of, *argv, input=b"x" * size)
        return lab.captured[-1]

    head = len(make(1).payload) - 1
    for size, has_id in ((sap.KEPT, True), (sap.KEPT + 1, False)):
        payload, block = make(size - head)
        assert len(payload) == size
        name = lab.line("rev-parse", "v1" if of == "tag" else "HEAD")
        assert parse(payload).object_id(block) == (name if has_id else "")


@pytest.mark.parametrize("encoding", [
    "rot13", "idna", "punycode", "undefined", "unicode_escape", "utf-7", "utf-16", "zlib", "hex",
])  # fmt: skip
def test_an_encoding_is_nothing_to_run(encoding: str) -> None:
    """Python has codecs of these names, that fail, unpack, or take quadratic time."""
    head = COMMIT + f"encoding {encoding}\n".encode()
    parsed = parse(filled(head + b"\n", b"xn--"))
    assert parsed.kind == "commit"
    assert parsed.fields["subject"].startswith("xn--xn--")


# ---------------------------------------------------------------- real git as the judge


def mutations(payload: bytes, rng: random.Random, number: int) -> Iterator[bytes]:
    """PAYLOAD with one byte of its head replaced, inserted, left out, or two swapped."""
    head = payload.index(b"\n\n") + 2
    telling = b"\n\r\t\0 <>+-09afAFgx\x7f\x80\xff:~"
    for _ in range(number):
        at = rng.randrange(head)
        new = bytes([rng.choice(telling) if rng.random() < 0.7 else rng.randrange(256)])
        before, byte, after = payload[:at], payload[at : at + 1], payload[at + 1 :]
        yield rng.choice((
            before + new + after,
            before + new + byte + after,
            before + after,
            before + after[:1] + byte + after[1:],
        ))  # fmt: skip


def complaints(lab: Lab, of: str, payloads: Iterable[bytes]) -> List[str]:
    """What git's fsck has to say of objects with these contents, but not of what they name."""
    folder = lab.folder / "objects"
    folder.mkdir()
    paths = []
    for number, payload in enumerate(payloads):
        path = folder / str(number)
        path.write_bytes(payload)
        paths.append(f"{path}\n")
    names = lab.git("hash-object", "-w", "--literally", "-t", of, "--stdin-paths",
                    input="".join(paths).encode()).split()  # fmt: skip
    assert len(names) == len(paths)
    argv = ["git", "fsck", "--strict", "--no-dangling", "--no-progress"]
    done = run(argv, lab.env, lab.path, check=False)
    said = (done.stdout + done.stderr).decode("utf-8", "backslashreplace").splitlines()
    # Git's word for a name like v1. is "info": it makes no ref of it, but takes the tag.
    return [
        line for line in said
        if re.match(r"(error|warning|fatal)\b", line) and ": badTagName:" not in line
    ]  # fmt: skip


@of_each_format
@pytest.mark.parametrize("of", ["commit", "tag"])
def test_git_takes_whatever_is_recognised(
    of: str, id_format: str, good: Good, keys: Keys, tmp_path: Path
) -> None:
    payload = good(of, id_format)
    samples = {*mutations(payload, random.Random(0), 1500)} - {payload}
    kinds = {sample: kind(sample) for sample in samples}
    assert set(kinds.values()) == {of, "other"}
    recognised = sorted(sample for sample in samples if kinds[sample] == of)
    assert min(len(recognised), len(samples) - len(recognised)) > 100, "a test of nothing"
    lab = Lab(tmp_path, keys["ed25519"], id_format)
    assert complaints(lab, of, recognised) == []


def test_the_judge_complains_of_what_is_wrong(keys: Keys, tmp_path: Path) -> None:
    lab = Lab(tmp_path, keys["ed25519"], "sha1")
    bad = COMMIT.replace(b"> 1", b"> 01") + b"\nx\n"
    (complaint,) = complaints(lab, "commit", [COMMIT + b"\nx\n", bad])
    assert "zeroPaddedDate" in complaint


@of_each_format
def test_a_mutated_push_certificate_is_a_push_certificate_or_other(
    id_format: str, good: Good
) -> None:
    kinds = [kind(sample) for sample in mutations(good("push", id_format), random.Random(0), 3000)]
    assert set(kinds) == {"push", "other"}


def test_no_bytes_at_all_are_an_exception(good: Good) -> None:
    rng = random.Random(0)
    words = sorted({
        word for of in ("commit", "tag", "push") for id_format in FORMATS
        for word in re.findall(rb"[ \n]|[^ \n]+", good(of, id_format))
    })  # fmt: skip
    for _ in range(3000):
        payload = b"".join(rng.choice(words) for _ in range(rng.randrange(40)))
        assert kind(payload) in ("commit", "tag", "push", "other")
        assert parse(payload).object_id(BEGIN) == "" or kind(payload) in ("commit", "tag")


# ---------------------------------------------------------------- through the running proxy


class Door:
    """The running proxy, by whichever way it is reached."""

    def __init__(self, proxy: Proxy, family: int, address: Any) -> None:
        self.proxy = proxy
        self.family = family
        self.address = address

    def sign(self, pieces: Iterable[bytes], chunked: bool = True, length: int = 0) -> Answer:
        """The answer to PIECES: each a chunk, or all of them of the LENGTH announced."""
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {length}"
        with socket.socket(self.family) as s:
            s.settimeout(60)
            s.connect(self.address)
            s.sendall(f"POST /sign HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode())
            for piece in pieces:
                s.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            if chunked:
                s.sendall(b"0\r\n\r\n")
            answer = b""
            while True:
                received = s.recv(65536)
                if not received:
                    return parse_answer(answer)
                answer += received

    def memory(self) -> int:
        """The most that the proxy has ever had in memory, in bytes."""
        status = Path(f"/proc/{self.proxy.pid}/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)
        assert found
        return 1024 * int(found[1])


@pytest.fixture(params=["tcp", "unix"])
def door(
    request: pytest.FixtureRequest,
    short: Path,
    agent: Agent,
    keys: Keys,
    start_proxy: Callable[..., Proxy],
) -> Callable[..., Door]:
    """Starts the proxy with the options given."""
    agent.add(keys["ed25519"])

    def start(*options: str) -> Door:
        if request.param == "tcp":
            proxy = start_proxy(*options, upstream=agent.sock)
            return Door(proxy, socket.AF_INET, ("127.0.0.1", proxy.port))
        path = str(short / "proxy")
        proxy = start_proxy(*options, upstream=agent.sock, addr=f"unix:{path}", wait=False)
        proxy.wait_log(r"listening on unix:\S+ ")
        return Door(proxy, socket.AF_UNIX, path)

    return start


def verified(block: bytes, payload: bytes, folder: Path) -> bool:
    file = folder / "block.sig"
    file.write_bytes(block)
    argv = ["ssh-keygen", "-q", "-Y", "check-novalidate", "-n", "git", "-s", file]
    return run(argv, input=payload, check=False).returncode == 0


@pytest.mark.parametrize("allowed", rows([
    (setting, setting.split(",") if setting != "any" else KINDS) for setting in (
        "any", "commit", "tag", "push", "commit,tag", "commit,push", "tag,push", "push,tag,commit",
    )
]))  # fmt: skip
def test_only_the_kinds_that_are_allowed_are_signed(
    allowed: List[str],
    request: pytest.FixtureRequest,
    door: Callable[..., Door],
    good: Good,
    thing: Thing,
    tmp_path: Path,
) -> None:
    setting = "any" if len(allowed) == len(KINDS) else ",".join(allowed)
    here = door("--payloads", setting)
    payloads = {of: good(of, "sha1") for of in KINDS if of != "other"}
    payloads["other"] = thing("ssh_authentication")
    for of, payload in payloads.items():
        answer = here.sign([payload])
        if of in allowed:
            assert answer.status == 200, (of, answer)
            assert verified(answer.body, payload, tmp_path)
        else:
            assert answer.status == 403, (of, answer)
            assert answer.text.startswith(f"a payload of kind {of} is not allowed here: ")
            assert "SSH_AGENT_PROXY_PAYLOADS" in answer.text and setting in answer.text


@of_each_format
def test_all_that_git_signs_is_signed_as_what_it_is(
    id_format: str, door: Callable[..., Door], good: Good
) -> None:
    here = door("--payloads", "commit,tag,push")
    for of in ("commit", "tag", "push"):
        assert here.sign([good(of, id_format)]).status == 200, of
        here.proxy.wait_log(rf" kind={of} ")


def test_what_is_not_allowed_is_not_asked_of_the_agent(
    scripted_agent: Callable[..., Path],
    start_proxy: Callable[..., Proxy],
    good: Good,
) -> None:
    asked: List[int] = []
    sock = scripted_agent(lambda connection: asked.append(1))
    proxy = start_proxy("--payloads", "commit", upstream=sock)
    proxy.wait_log("/sign can't work yet")  # it has asked once, for the keys
    asked.clear()
    here = Door(proxy, socket.AF_INET, ("127.0.0.1", proxy.port))
    assert here.sign([good("tag", "sha1")]).status == 403
    assert asked == []
    assert here.sign([good("commit", "sha1")]).status in (502, 503)
    assert asked == [1]


def split(payload: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    at = 0
    for size in sizes:
        if at >= len(payload):
            return
        yield payload[at : at + size]
        at += size


@pytest.mark.parametrize("sizes", rows([
    ("a byte at a time", lambda: itertools.repeat(1)),
    ("seven bytes at a time", lambda: itertools.repeat(7)),
    ("all at once", lambda: itertools.repeat(MIB)),
]))  # fmt: skip
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "length"])
def test_a_payload_is_recognised_however_it_arrives(
    sizes: Callable[[], Iterable[int]],
    chunked: bool,
    door: Callable[..., Door],
    good: Good,
) -> None:
    here = door("--payloads", "commit")
    payload = good("commit", "sha256")
    assert here.sign(split(payload, sizes()), chunked, len(payload)).status == 200
    payload = payload[:-1] + b"\0"
    assert here.sign(split(payload, sizes()), chunked, len(payload)).status == 403


@pytest.mark.parametrize("size", rows([("odd pieces", 4099), ("one piece", MIB)]))
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "length"])
def test_exactly_256_kib_of_a_payload_are_looked_at(
    size: int, chunked: bool, door: Callable[..., Door]
) -> None:
    here = door("--payloads", "commit")
    for head, status in ((sap.KEPT - 1, 200), (sap.KEPT, 403)):
        payload = commit_with_head(head)
        pieces = split(payload, itertools.repeat(size))
        assert here.sign(pieces, chunked, len(payload)).status == status


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "length"])
def test_a_commit_with_a_message_of_64_mib_is_signed_in_flat_memory(
    chunked: bool, door: Callable[..., Door], tmp_path: Path
) -> None:
    here = door("--payloads", "commit")
    head = COMMIT + b"\nSubject\n\n"
    line = b"A line of the message of a very large commit, as nobody would write it by hand.\n"
    piece = line * (MIB // len(line))

    def sign(count: int, *rest: bytes) -> Answer:
        pieces = itertools.chain([head], itertools.repeat(piece, count), rest)
        size = len(head) + count * len(piece) + sum(map(len, rest))
        return here.sign(pieces, chunked, size)

    assert sign(2).status == 200
    before = here.memory()
    answer = sign(64)
    assert answer.status == 200
    for rest in ([b"\0"], [b"\0", piece, piece]):  # at the end, and long before it
        refused = sign(64, *rest)
        assert refused.status == 403
        assert "a payload of kind other" in refused.text
    assert here.memory() - before < 4 * MIB
    assert verified(answer.body, head + 64 * piece, tmp_path)
