"""What a payload is: git's commits, tags and push certificates as real git writes them, and the
rest of the world, which is "other"."""

import random
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from conftest import (
    Agent, Keys, Repository, StartProxy, ask, fingerprint, post, post_chunked, rows, run, within,
)  # fmt: skip
from conftest import message as s  # a string of RFC 4251 looks like one
from test_http import chunks

import ssh_agent_proxy as sap

FORMATS = ("sha1", "sha256")  # of object ids
BEGIN = b"-----BEGIN SSH SIGNATURE-----\n"
MIB = 1 << 20


def parse(payload: bytes) -> sap.Payload:
    """As a request's body is looked at: its beginning, its size, and whether it holds a NUL."""
    return sap.parse_payload(payload[: sap.KEPT], len(payload), b"\0" in payload)


def kind(payload: bytes) -> str:
    return parse(payload).kind


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

# Of a repository that is pushed to: keeps which refs a signed push changes.
PRE_RECEIVE = """#!/bin/sh
set -eu
[ -n "${GIT_PUSH_CERT:-}" ] || exit 0
cat >../changed
"""

# What the scenarios are told in. Messages are formats of printf.
WORDS = r"""
set -eu
commit() { git commit -q --allow-empty -m "${1-A commit}"; }
message() { printf "$1" | git commit -q --allow-empty --cleanup=verbatim -F -; }
write() { printf "$1\n" >"$1"; git add "$1"; }
encoded() { printf "$2" | git -c i18n.commitEncoding="$1" commit -q --allow-empty -F -; }
by() { # NAME ADDRESS [ENCODING]
    GIT_AUTHOR_NAME=$(printf "$1") GIT_AUTHOR_EMAIL=$(printf "$2")
    GIT_COMMITTER_NAME=$GIT_AUTHOR_NAME GIT_COMMITTER_EMAIL=$GIT_AUTHOR_EMAIL
    encoded "${3-UTF-8}" 'By somebody'
}
branch() { # off main, with a commit
    git checkout -q -b "$1" main
    write "$1"
    commit "On $1"
    git checkout -q main
}
tag() { printf "$2" | git tag -s --cleanup=verbatim -F - "$1"; }
tags() { write file; commit Base; tag first 'Of the commit\n'; git tag -s -m 'Of it' second "$1"; }
further() { # headers that git itself does not write, and that --amend keeps
    {
        printf 'tree %s\n' "$(git write-tree)"
        for parent in ${parents-}; do printf 'parent %s\n' "$(git rev-parse "$parent")"; done
        printf 'author A U Thor <a@example.com> 1600000000 -0330\ncommitter C <c> 1 +0000\n'
        printf "$1\nNot signed\n"
    } >../object
    git update-ref HEAD "$(git hash-object -w -t commit ../object)"
    git -c i18n.commitEncoding="${2-UTF-8}" commit -q --amend --allow-empty -m Amended
}
peer() {
    git init -q --bare --template= --object-format="$FORMAT" ../peer
    mkdir ../peer/hooks
    cp ../pre-receive ../peer/hooks
    printf '[receive]\ncertNonceSeed = a seed\nadvertisePushOptions = true\n' >>../peer/config
}
pushed() { # after a first push of main, which is there then
    peer
    commit Base
    git push -q ../peer main main:old
    commit More
    git push -q --signed "${to-../peer}" "$@"
}
"""


class Lab(Repository):
    """A repository in which git signs everything, and all that it had signed."""

    def __init__(self, folder: Path, public: Path, id_format: str = "sha1") -> None:
        self.folder = folder
        self.store = folder / "captured"
        self.store.mkdir()
        for name, script in (("signer", SIGNER), ("pre-receive", PRE_RECEIVE)):
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        super().__init__(folder, "", public, id_format, program=folder / "signer")
        date = "1700000000 +0200"
        self.env.update(
            CAPTURED=str(self.store), FORMAT=id_format, GIT_AUTHOR_DATE=date,
            GIT_COMMITTER_DATE=date,
        )  # fmt: skip

    def play(self, script: str) -> None:
        run(["sh", "-c", WORDS + script], env=self.env, cwd=self.path)

    @property
    def captured(self) -> List[Tuple[bytes, bytes]]:
        """Payload and armored signature of each."""
        files = sorted(p for p in self.store.iterdir() if p.suffix != ".sig")
        return [(p.read_bytes(), Path(f"{p}.sig").read_bytes()) for p in files]


# A commit, a tag and a push certificate that have all there is: the tables below start here.
EVERYTHING = r"""
peer; commit Base; branch topic
parents='main topic'
further 'x-note one\n two\n \n three\nchange-id zyx\n' ISO-8859-1
git -c i18n.commitEncoding=ISO-8859-1 commit -q --amend -m 'Subject

Body'
git tag -s -m Subject -m Body v1
git push -q --signed ../peer main main:other -o 'a=b c' -o ''
"""

SCENARIOS: List[Tuple[str, str, bytes, str]] = [
    # name, the kinds that git has signed in order, what must stand in one of them, how
    ("everything", "commit commit commit commit tag push",
     rb"^parent \w+\nparent \w+\n(?:.*\n){2}encoding ISO-8859-1\nx-note one\n two\n \n three\n",
     EVERYTHING),
    ("root", "commit", rb"\Atree \w+\nauthor ", "write file; commit"),
    ("merge of a signed tag", "commit commit tag commit",
     rb"^mergetag object \w+\n type commit\n(?: .*\n)+ \n with a body\n",
     ("commit; branch topic; git tag -s -m 'A release' -m 'with a body' v1 topic\n"
      "git merge -q --no-ff -m Merged v1")),
    ("message: empty", "commit", rb"^committer .*\n\n\Z",
     "git commit -q --allow-empty --allow-empty-message -m ''"),
    ("message: leading empty lines", "commit", rb"0\n\n\n\nAfter", r"message '\n\nAfter two\n'"),
    ("message: looks like headers", "commit", rb"\n\ntree ",
     r"message 'tree 1234\nauthor A <a> 1 +0000\n\nNo\n'"),
    ("author: no address", "commit", rb"^author x <> 17", "by ' x ' ''"),
    ("author: very long", "commit", rb"^author (?:Long ){1500}",
     "by \"$(printf '%01500d' 0 | sed 's/0/Long /g')\" a@b"),
    ("date: the last", "commit", rb"^author .*> 18446744073709551614 \+1400\n",
     "export GIT_AUTHOR_DATE='@18446744073709551614 +1400'; commit"),
    ("encoding: unknown to anyone", "commit", rb"^encoding x-none\n\n\xff",
     r"encoded x-none '\377\n'"),
    ("encoding: of names", "commit", rb"^author Caf\xe9 <\xe9@x> ",
     r"by 'Caf\351' '\351@x' ISO-8859-1"),
    ("headers: names that begin like git's", "commit", rb"^trees x\nparent-of x\nauthors x\n",
     r"further 'trees x\nparent-of x\nauthors x\ncommitter2 x\nencodings x\n'"),
    ("tag of a commit", "commit tag tag", rb"^type commit\ntag second\n", "tags HEAD"),
    ("tag of a blob", "commit tag tag", rb"^type blob\ntag second\n", "tags HEAD:file"),
    ("tag of a tag", "commit tag tag", rb"^type tag\ntag second\n", "tags first"),
    ("tag: Latin-1", "commit tag", rb"^tag caf\xe9\n",
     r"""commit; tag "$(printf 'caf\351')" 'caf\351\n'"""),
    ("tag: punctuation", "commit tag", rb"^tag x@y,\(z\)='\{\}\"&;\|<>\$!#%\n",
     "commit; tag 'x@y,(z)='\\''{}\"&;|<>$!#%' 'A tag'"),
    ("tag: empty message", "commit tag", rb"^tagger .*\n\n\Z", "commit; tag v1 ''"),
    ("tag: no newline at the end", "commit tag", rb"\n\nNone\Z", "commit; tag v1 None"),
    ("tag: 300 KiB", "commit tag", rb"\n\n0{307200}\Z", "commit; tag v1 '%0307200d'"),
    ("push: one ref", "commit commit push",
     rb"\Acertificate version 0\.1\npusher SHA256:\S{43} .*\npushee \.\./peer\nnonce \S+\n\n",
     "pushed main"),
    ("push: a delete and two new", "commit commit push", rb"^0+ \w+ refs/heads/new\n",
     "pushed :old main:new main:refs/notes/x"),
    ("push: a URL with a password", "commit commit push", rb"^pushee file:///",
     "to=file://user:secret@$PWD/../peer; pushed main"),
]  # fmt: skip


Play = Callable[[str, str], Lab]  # of a scenario and a format
Good = Callable[[str, str], bytes]  # of a kind and a format


@pytest.fixture(scope="session")
def public(keys: Keys) -> Path:
    return keys["ed25519"].with_suffix(".pub")


@pytest.fixture(scope="module")
def lab(public: Path, tmp_path_factory: pytest.TempPathFactory) -> Play:
    """What git had signed in a scenario, played once."""
    made: Dict[Tuple[str, str], Lab] = {}
    scripts = {name: script for name, _, _, script in SCENARIOS}

    def play(name: str, id_format: str) -> Lab:
        if (name, id_format) not in made:
            lab = Lab(tmp_path_factory.mktemp("lab"), public, id_format)
            lab.play(scripts[name])
            made[name, id_format] = lab
        return made[name, id_format]

    return play


def commit_by_git(lab: Lab, name: str, payload: bytes) -> Dict[str, bytes]:
    """A commit's fields, by git's log, in the commit's own encoding."""
    named = re.search(rb"\A(?:.+\n)*?encoding (.+)\n", payload)
    encoding = named[1].decode() if named else "UTF-8"
    form = "--format=%T%x00%P%x00%an <%ae>%x00%cn <%ce>%x00%B"
    argv = ["-c", f"i18n.logOutputEncoding={encoding}", "log", "-1", form, name]
    tree, parents, author, committer, body = lab.run(*argv).stdout.split(b"\0")
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
    form = "%(tag)%00%(object)%00%(type)%00%(taggername) %(taggeremail)%00%(contents:subject)"
    told = lab.run("for-each-ref", f"--format={form}", f"refs/tags/{name}").stdout
    tag, target, kind, tagger, subject = told.rstrip(b"\n").split(b"\0")
    # Git finds no signature behind a message without a newline, and takes it for the message.
    subject = subject.partition(BEGIN.rstrip())[0]
    return {"tag": tag, "object": target, "type": kind, "tagger": tagger, "subject": subject}


def push_by_git(lab: Lab, payload: bytes) -> Dict[str, bytes]:
    """A push certificate's fields, by what has come of it."""
    changed = (lab.folder / "changed").read_bytes().splitlines()
    pushee = re.search(rb"^pushee (.+)$", payload, re.M)
    assert pushee and b"secret" not in payload
    return {
        "pusher": fingerprint(lab.public).encode(),
        "pushee": pushee[1],
        "subject": changed[0].split()[2],
        "refs": str(len(changed)).encode(),
    }


CORE = ("everything", "root", "merge of a signed tag", "tag of a commit", "push: one ref")
PLAYED = [
    pytest.param(*row[:3], id_format, id=f"{row[0]}-{id_format}")
    for row in SCENARIOS for id_format in FORMATS if id_format == "sha1" or row[0] in CORE
]  # fmt: skip


@pytest.mark.parametrize("name, kinds, holds, id_format", PLAYED)
def test_what_git_signs_is_recognised_with_its_fields_and_its_id(
        name: str, kinds: str, holds: bytes, id_format: str, lab: Play) -> None:  # fmt: skip
    """The log names what was signed as git will show it."""
    here = lab(name, id_format)
    payloads = [payload for payload, _ in here.captured]
    assert any(re.search(holds, payload, re.M) for payload in payloads), payloads
    assert [kind(payload) for payload in payloads] == kinds.split(), payloads
    for payload, block in here.captured:
        parsed = parse(payload)
        made = parsed.object_id(block)
        if made:
            assert here.git("cat-file", "-t", made) == parsed.kind
        else:
            assert parsed.kind == "push" or len(payload) > sap.KEPT
        if parsed.kind == "commit":
            told = commit_by_git(here, made, payload)
        elif parsed.kind == "tag":
            told = tag_by_git(here, parsed.fields["tag"])
        else:
            told = push_by_git(here, payload)
        assert sorted(parsed.fields) == sorted(told)
        for field, value in parsed.fields.items():
            whole = told[field].decode("utf-8", "surrogateescape")
            # A long text may be cut, after more than anybody would read.
            assert value == whole or (len(value) >= 200 and whole.startswith(value)), field


@pytest.mark.parametrize("encoding, message, has_id", rows([
    ("UTF-8", b"", "é \ufdcf\ufdf0\ufffd\U0010fffd".encode(), True),
    ("Latin-1 that says so", b"encoding ISO-8859-1\n", b"\xe9", True),
    ("Latin-1 that does not", b"", b"\xe9", False),
    ("no character", b"", "\ufdef".encode(), False),
    ("the last that is none", b"", "\U0010ffff".encode(), False),
]))  # fmt: skip
def test_only_a_commit_that_git_leaves_as_it_is_has_an_id(
        encoding: bytes, message: bytes, has_id: bool) -> None:  # fmt: skip
    """What is no UTF-8 and does not say what it is, git 2.47 has signed before it encodes it."""
    commit = parse(COMMIT + encoding + b"\n" + message + b"\n")
    assert bool(commit.object_id(BEGIN)) == has_id
    assert parse(TAG + TAGGER + b"\n" + message).object_id(BEGIN)  # git encodes no tag


def test_what_stands_behind_a_nul_git_does_not_show_and_it_makes_other(
        public: Path, tmp_path: Path) -> None:  # fmt: skip
    """Git refuses one in a commit; of a tag with one nobody knows what it says."""
    lab = Lab(tmp_path, public)
    argv = ["commit", "--allow-empty", "-F", "-"]
    told = lab.run(*argv, input=b"x\0y\n", check=False).stderr
    assert b"a NUL byte in commit log message" in told
    assert lab.captured == []
    lab.play(r"commit; tag v1 'Shown\n\000hidden\n'")
    assert "hidden" not in lab.git("tag", "-l", "--format=%(contents)")
    (_, _), (payload, block) = lab.captured
    assert payload.endswith(b"Shown\n\0hidden\n")
    assert (parse(payload).kind, parse(payload).fields) == ("other", {})
    assert parse(payload).object_id(block) == ""


# ---------------------------------------------------------------- almost what git writes


@pytest.fixture(scope="module")
def good(lab: Play) -> Good:
    """A payload of the kind given that has all there is, from real git."""

    def find(kind: str, id_format: str) -> bytes:
        payloads = [payload for payload, _ in lab("everything", id_format).captured]
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
    ("< in the name", rb"^(WHO \w)", rb"\1<"),
    ("< in the address", rb"^(WHO .*<\w)", rb"\1<"),
    ("an address that is not closed", rb"^(WHO .*)>", rb"\1"),
    ("no blank before the address", rb"^(WHO .*) <", rb"\1<"),
    ("no blank before the date", rb"^(WHO .*)> ", rb"\1>"),
    ("no date", rb"^(WHO .*> )\d+ ", rb"\1"),
    ("a negative date", rb"^(WHO .*> )", rb"\1-"),
    ("a date of 21 digits", rb"^(WHO .*> )\d+", rb"\g<1>" + b"1" * 21),
    ("a date with zeros in front", rb"^(WHO .*> )", rb"\g<1>00"),
    ("no timezone", rb"^(WHO .*) [+-]\d{4}$", rb"\1"),
    ("a timezone of 3 digits", rb"^(WHO .*)\d$", rb"\1"),
    ("a timezone of 5 digits", rb"^(WHO .*)$", rb"\g<1>0"),
    ("a NUL in the name", rb"^(WHO \w)", b"\\1\0"),
    ("folded", rb"^(WHO .*)$", rb"\1\n more"),
]

# And to a line with an object id.
LINE_WITH_ID = [
    ("one digit too few", rb"^(WHO .*)\w$", rb"\1"),
    ("one digit too many", rb"^(WHO .*)$", rb"\1a"),
    ("a digit in upper case", rb"^(WHO ).", rb"\1A"),
    ("a letter that is no digit", rb"^(WHO ).", rb"\1g"),
    ("the other hash's length", rb"^(WHO )(\w+)(\n)", other_hash),
]


def lines(kind: str, header: str, table: List[Any]) -> List[Any]:
    """TABLE for one header: WHO in a pattern stands for it."""
    return [
        (kind, f"{header}: {name}", pattern.replace(b"WHO", header.encode()), to)
        for name, pattern, to in table
    ]


NOT_QUITE: List[Tuple[str, str, bytes, Any]] = [
    # kind, name, pattern, what it becomes
    *lines("commit", "tree", LINE_WITH_ID),
    *lines("commit", "parent", LINE_WITH_ID),
    *lines("commit", "author", IDENTITY),
    *lines("commit", "committer", IDENTITY),
    ("commit", "tree twice", rb"\A(tree .*\n)", rb"\1\1"),
    ("commit", "a parent behind the author", rb"^(parent .*\n)(author .*\n)", rb"\2\1"),
    ("commit", "author and committer swapped", rb"^(author .*\n)(committer .*\n)", rb"\2\1"),
    ("commit", "a second parent behind the encoding", rb"^(encoding .*\n)",
     rb"\1parent " + b"a" * 40 + b"\n"),
    ("commit", "a tree among the headers", rb"^(change-id )", rb"tree x\n\1"),
    ("commit", "any author among the headers", rb"^(change-id )", rb"author x\n\1"),
    ("commit", "the encoding twice", rb"^(encoding .*\n)", rb"\1\1"),
    ("commit", "an encoding without a value", rb"^encoding .*", b"encoding"),
    ("commit", "a header without a value", rb"^change-id .*", b"change-id"),
    ("commit", "a tab for a folded line's blank", rb"^ two", b"\ttwo"),
    ("commit", "no empty line", rb"\n\n", b"\n"),
    ("commit", "a NUL at the message's end", rb"\Z", b"\0"),
    # (A tag has but one id: of the other length, it is a tag of the other hash.)
    *lines("tag", "object", [row for row in LINE_WITH_ID if row[2] is not other_hash]),
    *lines("tag", "tagger", IDENTITY),
    ("tag", "tag before type", rb"^(type .*\n)(tag .*\n)", rb"\2\1"),
    *[("tag", f"type {word!r}", rb"^type .*", b"type " + word) for word in (
        b"", b"commits", b"Commit", b"note", b"commit\r",
    )],
    ("tag", "no tag", rb"^tag .*\n", b""),
    ("tag", "no name", rb"^tag .*", b"tag "),
    *[("tag", f"a name with {character!r}", rb"^tag v1", b"tag v" + character + b"1")
      for character in (bytes([value]) for value in b" \t\r\0\x1f\x7f~^:?*[")],
    ("tag", "a name with a backslash", rb"^tag v1", lambda m: b"tag v\\1"),
    *[("tag", f"a name that git refuses: {name!r}", rb"^tag v1", b"tag " + name)
      for name in (b".v1", b"-v1", b"/v1", b"v1/", b"v1.", b"v..1", b"v//1", b"v/.1", b"v@{1",
                   b"v1.lock", b"v.lock/1")],
    ("tag", "a header behind the tagger", rb"^(tagger .*\n)", rb"\1encoding UTF-8\n"),
    ("tag", "CR LF throughout", rb"[\s\S]+", lambda m: m[0].replace(b"\n", b"\r\n")),
    *[("push", f"version {word!r}", rb"\Acertificate version .*",
       b"certificate version " + word)
      for word in (b"", b"0.2", b"0.10", b"0.1 ", b"0.1\r")],
    ("push", "no pusher", rb"^pusher .*\n", b""),
    ("push", "pusher behind pushee", rb"^(pusher .*\n)(pushee .*\n)", rb"\2\1"),
    ("push", "a pusher by name", rb"^pusher \S+  ", b"pusher C O Mitter <committer@example.com> "),
    ("push", "a fingerprint of 42 characters", rb"^(pusher \S+)\S", rb"\1"),
    ("push", "a fingerprint in base64url", rb"^(pusher SHA256:).", rb"\1_"),
    ("push", "a fingerprint of another hash", rb"^pusher SHA256:", b"pusher SHA512:"),
    ("push", "three blanks before the date", rb"^(pusher \S+)  ", rb"\1   "),
    ("push", "pushee twice", rb"^(pushee .*\n)", rb"\1\1"),
    ("push", "an empty pushee", rb"^pushee .*", b"pushee "),
    ("push", "a nonce of 257 characters", rb"^nonce .*", b"nonce " + b"a" * 257),
    ("push", "nonce behind the options", rb"^(nonce .*\n)((?:push-option .*\n)+)", rb"\2\1"),
    ("push", "a header that is none", rb"^(push-option )", rb"x-a b\n\1"),
    ("push", "no refs", rb"\n\n[\s\S]*", b"\n\n"),
    ("push", "ids of two hashes", rb"(\n\n)(\w+)( )", other_hash),
    ("push", "a ref that git refuses", rb"^(.* refs/heads)/", rb"\1..x/"),
    ("push", "a ref with a control character", rb"^(.* refs/heads)/", b"\\1\x1b/"),
    ("push", "no newline at the end", rb"\n\Z", b""),
    ("push", "a signature at the end", rb"\Z", BEGIN + b"AAAA\n-----END SSH SIGNATURE-----\n"),
]


@pytest.mark.parametrize("of, pattern, to", rows([
    (f"{of}: {name}", of, pattern, to) for of, name, pattern, to in NOT_QUITE
]))  # fmt: skip
def test_what_is_not_quite_gits_is_other(of: str, pattern: bytes, to: Any, good: Good) -> None:
    payload = changed(good(of, "sha1"), pattern, to)
    parsed = parse(payload)
    assert parsed == sap.Payload("other", len(payload), {}, payload)
    assert sap.parse_payload(payload) == parsed
    assert parsed.object_id(BEGIN) == ""


STILL: List[Tuple[str, str, bytes, Any, Dict[str, Optional[str]]]] = [
    # kind, name, pattern, what it becomes, what its fields are then
    ("commit", "no parent", rb"(?:^parent .*\n)+", b"", {"parents": "0"}),
    ("commit", "lines of blanks before the subject", rb"\n\n.*", b"\n\n \n\t\r\n\v\f\n\n Real",
     {"subject": " Real"}),
    ("commit", "a line of blanks for a message", rb"\n\n[\s\S]*", b"\n\n \n", {"subject": ""}),
    ("tag", "lines of blanks before the subject", rb"\n\n.*", b"\n\n \n\r\nReal",
     {"subject": "Real"}),
    ("commit", "a folded line of three blanks", rb"^ two", b"   ", {}),
    *[("tag", f"a name that git takes: {name}", rb"^tag v1", f"tag {name}".encode(), {"tag": name})
      for name in ("v.1", "v-1", "a/b/c", "@v", "v.locked", "v{1}")],
    ("push", "no pushee", rb"^pushee .*\n", b"", {"pushee": None}),
    ("push", "no options", rb"(?:^push-option .*\n)+", b"", {}),
    ("push", "no nonce", rb"^nonce .*\n", b"", {}),
    ("push", "a nonce of 256 characters", rb"^nonce .*", b"nonce " + b"aZ09-./+=_" * 25 + b"-" * 6,
     {}),
    ("push", "bytes that are no UTF-8", rb"(\n\n.*)refs/.*", b"\\1refs/\xff",
     {"subject": "refs/\udcff"}),
]


@pytest.mark.parametrize("of, pattern, to, fields", rows([
    (f"{of}: {name}", of, pattern, to, fields) for of, name, pattern, to, fields in STILL
]))  # fmt: skip
def test_what_git_could_have_written_is_still_recognised(
    of: str, pattern: bytes, to: Any, fields: Dict[str, Optional[str]], good: Good
) -> None:
    before = good(of, "sha1")
    after = parse(changed(before, pattern, to))
    assert after.kind == of
    expected = {**parse(before).fields, **fields}
    assert after.fields == {n: value for n, value in expected.items() if value is not None}


@pytest.mark.parametrize("of", ["commit", "tag", "push"])
def test_no_beginning_is_taken_for_the_whole(of: str, good: Good) -> None:
    payload = good(of, "sha1")
    last = rb"refs/.*\n" if of == "push" else rb"\n\n"
    ends = [match.end() for match in re.finditer(last, payload)]
    for size in range(len(payload)):
        begun = payload[:size]
        whole = size in ends if of == "push" else size >= ends[0]
        assert kind(begun) == (of if whole else "other"), begun


# ---------------------------------------------------------------- other things that are signed


THINGS = [
    ("SSH authentication, RFC 4252 section 7", s(bytes(32)) + b"\x32" + s(b"git")
     + s(b"ssh-connection") + s(b"publickey") + b"\1" + s(b"ssh-ed25519") + s(bytes(51))),
    ("a file, PROTOCOL.sshsig", b"SSHSIG" + s(b"file") + s(b"") + s(b"sha512") + s(bytes(64))),
    ("a JWT, RFC 7515", b"eyJhbGciOiAiRWREU0EifQ.eyJzdWIiOiAidHJlZSJ9"),
    ("a tar file", b"tree " + b"a" * 40 + bytes(467)),
]  # fmt: skip


@pytest.mark.parametrize("thing", rows(THINGS))
def test_what_is_not_gits_is_other_and_within_a_message_nothing_else(
        thing: bytes, good: Good) -> None:  # fmt: skip
    """What git's own head stands in front of can be read as nothing but git's."""
    assert kind(thing) == kind(b"") == "other"
    for of in ("commit", "tag", "push"):
        payload = good(of, "sha1")
        assert kind(thing + payload) == kind(thing + b"\n" + payload) == "other"
        message_of = payload if of == "push" else payload.partition(b"\n\n")[0] + b"\n\nX\n"
        assert kind(message_of + thing) == ("other" if of == "push" or b"\0" in thing else of)


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


def filled(before: bytes, piece: bytes, after: bytes = b"") -> bytes:
    """With PIECE between them as often as KEPT has room for."""
    return before + piece * ((sap.KEPT - len(before + after)) // len(piece)) + after


@pytest.mark.parametrize("payload, expected", rows([
    # name, payload, kind with the number of parents or refs
    ("5,000 parents", TREE + PARENT * 5000 + AUTHOR + COMMITTER + b"\nx", "commit 5000"),
    ("parents and a broken author", filled(TREE, PARENT, b"author <\n\nx"), "other None"),
    ("folded lines of nothing", filled(COMMIT + b"x y\n", b" \n", b"z\n\nx"), "other None"),
    ("headers and a bad one", filled(COMMIT, b"x y\n", b"xy\n\nx"), "other None"),
    ("a header of blanks", filled(COMMIT + b"x", b" "), "other None"),
    ("a header's value without an end", filled(COMMIT + b"x ", b"y"), "other None"),
    ("a slow encoding of Python's", filled(COMMIT + b"encoding idna\n\n", b"xn--"), "commit 0"),
    ("empty lines", filled(COMMIT, b"\n"), "commit 0"),
    ("addresses for an author", filled(TREE + b"author ", b"a <b> 1 +0000 "), "other None"),
    ("an address without an end", filled(TREE + b"author a <", b"b"), "other None"),
    ("a tag's name without an end", filled(TAG[:-3], b"v"), "other None"),
    ("refs", filled(PUSH + b"\n", REF), f"push {(sap.KEPT - len(PUSH) - 1) // len(REF)}"),
]))  # fmt: skip
def test_a_hostile_payload_is_decided(payload: bytes, expected: str) -> None:
    of, number = expected.split()
    with within(20):  # a parser that tries every way to read it would take hours
        parsed = parse(payload)
    assert (parsed.kind, parsed.size) == (of, len(payload))
    assert str(parsed.fields.get("parents") or parsed.fields.get("refs")) == number


def commit_with_head(size: int) -> bytes:
    """A commit whose head, the empty line included, has SIZE bytes."""
    before, after = COMMIT + b"x ", b"\n\n"
    return before + b"y" * (size - len(before + after)) + after + b"Subject\n\nBody\n"


HEADS = [("commit", "commit", COMMIT), ("tag", "tag", TAG + TAGGER)]


@pytest.mark.parametrize("blank", [b"\n", b" \n", b"\t\r\v\f\n", b" "], ids=repr)
@pytest.mark.parametrize("of, head", rows(HEADS))
def test_a_subject_that_nobody_could_see_makes_other(of: str, head: bytes, blank: bytes) -> None:
    # Git skips what is blank, and shows the line behind it.
    filling = blank * (sap.KEPT // len(blank) + 1)
    assert kind(head + b"\n" + filling + b"\nHidden\n") == "other"
    fits = parse(head + b"\n" + filling[: 1000 * len(blank)] + b"\nShown\n" + b"x" * MIB)
    assert (fits.kind, fits.fields["subject"]) == (of, "Shown")


@pytest.mark.parametrize("of, head", rows(HEADS))
def test_a_message_may_go_on_beyond_what_is_kept_but_not_with_a_nul(of: str, head: bytes) -> None:
    assert sap.KEPT == 256 * 1024
    payload = head + b"\nSubject\n\n" + b"x" * MIB
    parsed = parse(payload)
    assert (parsed.kind, parsed.size, parsed.data) == (of, len(payload), payload[: sap.KEPT])
    assert parsed.fields["subject"] == "Subject"
    assert parsed.object_id(BEGIN) == ""
    assert parse(payload[: sap.KEPT]).object_id(BEGIN) != ""
    assert kind(payload + b"\0") == kind(payload + b"\0x") == "other"


def test_a_push_certificate_that_is_not_seen_whole_is_other() -> None:
    """The part that is kept ends with a whole line, and so would be a certificate by itself."""
    refs = REF * 1000
    before = PUSH + b"push-option "
    option = b"x" * (sap.KEPT - len(before) - len(b"\n\n") - len(refs))
    whole = before + option + b"\n\n" + refs
    assert len(whole) == sap.KEPT
    assert kind(whole) == "push"
    assert kind(whole + REF) == "other"


# ---------------------------------------------------------------- real git as the judge


def mutations(payload: bytes, number: int) -> Iterator[bytes]:
    """PAYLOAD with one byte of its head replaced, inserted or left out."""
    head = payload.index(b"\n\n") + 2
    chance = random.Random(0)
    for _ in range(number):
        at = chance.randrange(head)
        new = bytes([chance.choice(b"\n\r\t\0 <>+-09afAFgx\x7f\x80\xff:~")])
        before, byte, after = payload[:at], payload[at : at + 1], payload[at + 1 :]
        yield before + chance.choice([new, new + byte, b""]) + after


@pytest.mark.parametrize("of", ["commit", "tag"])
def test_git_takes_whatever_is_recognised(
        of: str, good: Good, public: Path, tmp_path: Path) -> None:  # fmt: skip
    payload = good(of, "sha1")
    samples = set(mutations(payload, 150))
    recognised = {sample for sample in samples if kind(sample) == of}
    assert min(len(recognised), len(samples - recognised)) > 20, "a test of nothing"
    bad = re.sub(rb"> (?=\d)", b"> 0", payload, count=1)
    lab = Lab(tmp_path, public)
    for sample in (*recognised, bad):
        lab.git("hash-object", "-w", "--literally", "-t", of, "--stdin", input=sample)
    argv = ["git", "fsck", "--strict", "--no-dangling", "--no-progress"]
    done = run(argv, lab.env, lab.path, check=False)
    said = (done.stdout + done.stderr).decode("utf-8", "backslashreplace")
    complaints = re.findall(r"^(?:error|warning|fatal)\b.*", said, re.M)
    # Git's word for a name like v1. is "info": it makes no ref of it, but takes the tag.
    (complaint,) = (line for line in complaints if ": badTagName:" not in line)
    assert "zeroPaddedDate" in complaint


# ---------------------------------------------------------------- through the running proxy


LONG = COMMIT + b"\nSubject\n\n" + b"x" * MIB


def test_a_payload_is_recognised_however_it_arrives(
        agent_with_key: Agent, start_proxy: StartProxy, good: Good) -> None:  # fmt: skip
    proxy = start_proxy("--payloads", "commit", upstream=agent_with_key.sock)
    payload = good("commit", "sha256")
    for size, data, status in [
        # pieces of so many bytes, payload, status
        (1, payload, 200),
        (1, payload[:-1] + b"\0", 403),
        (40999, commit_with_head(sap.KEPT - 1), 200),  # one character of the subject is kept
        (40999, commit_with_head(sap.KEPT), 403),  # and here none
        (40999, LONG, 200),
        (40999, LONG + b"\0", 403),  # behind what is kept, and long before the end
        (40999, LONG + b"\0" + LONG, 403),
    ]:
        assert ask(proxy.port, post(data)).status == status
        in_chunks = chunks(data, [size] * (len(data) // size))
        assert ask(proxy.port, post_chunked(in_chunks)).status == status
