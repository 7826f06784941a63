"""RFC 9987: what is asked of an agent, and how its answers are read."""

from __future__ import annotations

import base64
import random
import socket
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
from conftest import Agent, Keys, message, read_message, rows, run

import ssh_agent_proxy as sap

REQUESTS = [
    ("the keys", sap.request_identities(), "0b"),
    (
        "a signature",
        sap.sign_request(b"KEY", b"DATA", 0),
        "0d 00000003 4b4559 00000004 44415441 00000000",
    ),
    (
        "a signature with rsa-sha2-512",
        sap.sign_request(b"KEY", b"DATA", sap.SSH_AGENT_RSA_SHA2_512),
        "0d 00000003 4b4559 00000004 44415441 00000004",
    ),
    ("a signature of nothing", sap.sign_request(b"", b"", 0), "0d 00000000 00000000 00000000"),
]

A = (b"A", b"a")
B = (b"BB", b"")

# None: the agent says FAILURE.
LISTS: List[Tuple[str, str, Optional[List[Tuple[bytes, bytes]]]]] = [
    ("no keys", "0c 00000000", []),
    ("one key", "0c 00000001 00000001 41 00000001 61", [A]),
    ("a key without a comment", "0c 00000001 00000002 4242 00000000", [B]),
    ("two keys in their order", "0c 00000002 00000002 4242 00000000 00000001 41 00000001 61",
     [B, A]),
    ("a key twice", "0c 00000002 00000001 41 00000001 61 00000001 41 00000001 61", [A, A]),
    ("a comment that is no text", "0c 00000001 00000001 41 00000002 ff0a",
     [(b"A", b"\xff\n")]),
    ("an empty key blob, which is for others to refuse", "0c 00000001 00000000 00000000",
     [(b"", b"")]),
    ("a refusal", "05", None),
]  # fmt: skip

NO_LISTS = [
    ("nothing", "", "1 bytes expected, 0 there"),
    ("a refusal and more", "05 00", "message type 5"),
    ("a success", "06", "message type 6"),
    ("a refused extension", "1c", "message type 28"),
    ("the refusal of another protocol", "66", "message type 102"),
    ("the request itself", "0b", "message type 11"),
    ("a signature", "0e 00000000", "message type 14"),
    ("the list of SSH 1", "02 00000000", "message type 2"),
    ("no number of keys", "0c", "4 bytes expected, 0 there"),
    ("half a number of keys", "0c 0000", "4 bytes expected, 2 there"),
    ("no keys and a byte more", "0c 00000000 00", "1 bytes left over"),
    ("more keys than announced", "0c 00000001 00000001 41 00000001 61 00000001 41 00000001 61",
     "10 bytes left over"),
    ("fewer keys than announced", "0c 00000002 00000001 41 00000001 61",
     "4 bytes expected, 0 there"),
    ("2^32-1 keys", "0c ffffffff 00000001 41 00000001 61", "4 bytes expected, 0 there"),
    ("2^32-1 keys and none of them", "0c ffffffff", "4 bytes expected, 0 there"),
    ("a key blob that is cut", "0c 00000001 00000002 41", "2 bytes expected, 1 there"),
    ("a key blob of 2^32-1 bytes", "0c 00000001 ffffffff 41 00000000",
     "4294967295 bytes expected, 5 there"),
    ("a key without its comment", "0c 00000001 00000001 41", "4 bytes expected, 0 there"),
    ("a comment that is cut", "0c 00000001 00000001 41 00000002 61", "2 bytes expected, 1 there"),
    ("a comment of 2^32-1 bytes", "0c 00000001 00000001 41 ffffffff 61",
     "4294967295 bytes expected, 1 there"),
]  # fmt: skip

SIGNATURES: List[Tuple[str, str, Optional[bytes]]] = [
    ("a signature", "0e 00000003 736967", b"sig"),
    ("an empty one, which is for others to refuse", "0e 00000000", b""),
    ("a refusal", "05", None),
]

NO_SIGNATURES = [
    ("nothing", "", "1 bytes expected, 0 there"),
    ("a refusal and more", "05 00", "message type 5"),
    ("a success", "06", "message type 6"),
    ("a list of keys", "0c 00000000", "message type 12"),
    ("the request's own type", "0d 00000000", "message type 13"),
    ("no string", "0e", "4 bytes expected, 0 there"),
    ("half a length", "0e 0000", "4 bytes expected, 2 there"),
    ("a signature that is cut", "0e 00000003 7369", "3 bytes expected, 2 there"),
    ("a signature of 2^32-1 bytes", "0e ffffffff 73", "4294967295 bytes expected, 1 there"),
    ("a signature and a byte more", "0e 00000003 736967 00", "1 bytes left over"),
]


@pytest.mark.parametrize("request_, data", rows(REQUESTS))
def test_a_request_is_the_specification_s(request_: bytes, data: str) -> None:
    assert request_ == bytes.fromhex(data)


@pytest.mark.parametrize("reply, keys", rows(LISTS))
def test_a_list_is_read(reply: str, keys: Optional[List[Tuple[bytes, bytes]]]) -> None:
    assert sap.parse_identities_answer(bytes.fromhex(reply)) == keys


@pytest.mark.parametrize("reply, error", rows(NO_LISTS))
def test_a_list_that_is_none_is_refused(reply: str, error: str) -> None:
    with pytest.raises(sap.WireError) as e:
        sap.parse_identities_answer(bytes.fromhex(reply))
    assert str(e.value) == f"identities answer: {error}"


@pytest.mark.parametrize("reply, signature", rows(SIGNATURES))
def test_a_signature_is_read(reply: str, signature: Optional[bytes]) -> None:
    assert sap.parse_sign_response(bytes.fromhex(reply)) == signature


@pytest.mark.parametrize("reply, error", rows(NO_SIGNATURES))
def test_a_signature_that_is_none_is_refused(reply: str, error: str) -> None:
    with pytest.raises(sap.WireError) as e:
        sap.parse_sign_response(bytes.fromhex(reply))
    assert str(e.value) == f"sign response: {error}"


LONG: Dict[Callable[[bytes], Any], bytes] = {
    sap.parse_identities_answer: bytes.fromhex(
        "0c 00000003 00000002 4242 00000000 00000001 41 00000001 61 00000001 41 00000003 616263"
    ),
    sap.parse_sign_response: bytes.fromhex("0e 0000000a 00010203040506070809"),
}


@pytest.mark.parametrize("parse", LONG, ids=lambda parse: parse.__name__)
def test_an_answer_cut_or_extended_anywhere_is_refused(parse: Callable[[bytes], Any]) -> None:
    reply = LONG[parse]
    assert parse(reply) is not None
    for size in range(len(reply)):
        with pytest.raises(sap.WireError):
            parse(reply[:size])
    for extra in range(256):
        with pytest.raises(sap.WireError):
            parse(reply + bytes([extra]))


@pytest.mark.parametrize("parse", LONG, ids=lambda parse: parse.__name__)
def test_an_answer_with_bytes_changed_is_read_or_refused(parse: Callable[[bytes], Any]) -> None:
    chance = random.Random(9987)
    outcomes = set()
    for _ in range(5000):
        reply = bytearray(LONG[parse])
        for _ in range(chance.randint(1, 3)):
            reply[chance.randrange(len(reply))] = chance.choice((0, 1, 5, 0x7F, 0xFF))
        try:
            parse(bytes(reply))
            outcomes.add("read")
        except sap.WireError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def ask(agent: Agent, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(10)
        s.connect(str(agent.sock))
        s.sendall(message(request))
        return read_message(s)


def test_a_real_agent_s_list_is_that_of_ssh_add(agent: Agent, keys: Keys) -> None:
    for name in ("ed25519", "rsa2048", "ecdsa256"):
        agent.add(keys[name])
    listed = sap.parse_identities_answer(ask(agent, sap.request_identities()))
    lines = run(["ssh-add", "-L"], env=agent.env).stdout.splitlines()
    assert listed == [
        (base64.b64decode(blob), comment)
        for _, blob, comment in (line.split(b" ", 2) for line in lines)
    ]
    assert len(lines) == 3


def test_an_empty_agent_s_list_is_empty(agent: Agent) -> None:
    assert sap.parse_identities_answer(ask(agent, sap.request_identities())) == []


def test_a_real_agent_understands_a_sign_request(agent: Agent, keys: Keys) -> None:
    agent.add(keys["rsa2048"])
    blob = base64.b64decode(keys.line("rsa2048").split()[1])
    reply = ask(agent, sap.sign_request(blob, b"data", sap.SSH_AGENT_RSA_SHA2_512))
    signature = sap.parse_sign_response(reply)
    assert signature is not None
    assert signature.startswith(b"\0\0\0\x0crsa-sha2-512\0\0\1\0")
    assert len(signature) == 4 + 12 + 4 + 256


def test_a_real_agent_s_refusal_is_none(agent: Agent, keys: Keys) -> None:
    blob = base64.b64decode(keys.line("ed25519").split()[1])
    assert sap.parse_sign_response(ask(agent, sap.sign_request(blob, b"data", 0))) is None
