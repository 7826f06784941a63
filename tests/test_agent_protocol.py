"""RFC 9987: what is asked of an agent, and how its answers are read."""

from typing import Any, Callable

import pytest
from conftest import rows

import ssh_agent_proxy as sap

IDENTITIES, SIGNED = sap.parse_identities_answer, sap.parse_sign_response
Parse = Callable[[bytes], Any]

REQUESTS = [
    ("the keys", sap.byte(sap.SSH_AGENTC_REQUEST_IDENTITIES), "0b"),
    ("a signature", sap.sign_request(b"KEY", b"DATA", sap.SSH_AGENT_RSA_SHA2_512),
     "0d 00000003 4b4559 00000004 44415441 00000004"),
]  # fmt: skip

A = (b"A", b"a")
B = (b"BB", b"")

READ = [
    ("no keys", IDENTITIES, "0c 00000000", []),
    ("two keys in their order, one without a comment", IDENTITIES,
     "0c 00000002 00000002 4242 00000000 00000001 41 00000001 61", [B, A]),
    ("a comment that is no text", IDENTITIES, "0c 00000001 00000001 41 00000002 ff0a",
     [(b"A", b"\xff\n")]),
    ("an empty key blob, which is for others to refuse", IDENTITIES,
     "0c 00000001 00000000 00000000", [(b"", b"")]),
    ("a refusal to list", IDENTITIES, "05", None),
    ("a signature", SIGNED, "0e 00000003 736967", b"sig"),
    ("an empty one, which is for others to refuse", SIGNED, "0e 00000000", b""),
    ("a refusal to sign", SIGNED, "05", None),
]  # fmt: skip

REFUSED = [
    ("a refusal to list and more", IDENTITIES, "05 00", "message type 5"),
    ("a signature for a list", IDENTITIES, "0e 00000000", "message type 14"),
    ("fewer keys than announced", IDENTITIES, "0c 00000002 00000001 41 00000001 61",
     "4 bytes expected, 0 there"),
    ("a key blob of 2^32-1 bytes", IDENTITIES, "0c 00000001 ffffffff 41 00000000",
     "4294967295 bytes expected, 5 there"),
    ("no signature", SIGNED, "", "1 bytes expected, 0 there"),
    ("a refusal to sign and more", SIGNED, "05 00", "message type 5"),
    ("a list for a signature", SIGNED, "0c 00000000", "message type 12"),
    ("a signature of 2^32-1 bytes", SIGNED, "0e ffffffff 73",
     "4294967295 bytes expected, 1 there"),
    ("a signature and a byte more", SIGNED, "0e 00000003 736967 00", "1 bytes left over"),
]  # fmt: skip


@pytest.mark.parametrize("request_, data", rows(REQUESTS))
def test_a_request_is_the_specification_s(request_: bytes, data: str) -> None:
    assert request_ == bytes.fromhex(data)


@pytest.mark.parametrize("parse, reply, value", rows(READ))
def test_an_answer_is_read(parse: Parse, reply: str, value: Any) -> None:
    assert parse(bytes.fromhex(reply)) == value


@pytest.mark.parametrize("parse, reply, error", rows(REFUSED))
def test_an_answer_to_something_else_is_refused(parse: Parse, reply: str, error: str) -> None:
    with pytest.raises(sap.WireError) as e:
        parse(bytes.fromhex(reply))
    what = "identities answer" if parse is IDENTITIES else "sign response"
    assert str(e.value) == f"{what}: {error}"


@pytest.mark.parametrize("parse, data", rows([
    ("a list", IDENTITIES, "0c 00000002 00000002 4242 00000000 00000001 41 00000001 61"),
    ("a signature", SIGNED, "0e 0000000a 00010203040506070809"),
]))  # fmt: skip
def test_an_answer_cut_or_extended_anywhere_is_refused(parse: Parse, data: str) -> None:
    reply = bytes.fromhex(data)
    assert parse(reply) is not None
    for wrong in (*(reply[:size] for size in range(len(reply))), reply + b"\0", reply + reply):
        with pytest.raises(sap.WireError):
            parse(wrong)
