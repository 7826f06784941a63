"""RFC 4251 section 5: the data types, written and read."""

from __future__ import annotations

import random
import tracemalloc
from typing import Callable

import pytest
from conftest import rows

import ssh_agent_proxy as sap

# Section 5's own examples first. A name-list is read as the string that it is in.
STRINGS = [
    ("the string of the specification", "00000007 74657374696e67", b"testing"),
    ("the empty name-list of the specification", "00000000", b""),
    ("the name-list of the specification with one name", "00000004 7a6c6962", b"zlib"),
    ("the name-list of the specification", "00000009 7a6c69622c6e6f6e65", b"zlib,none"),
    ("a string with a NUL in it", "00000003 610062", b"a\0b"),
    ("a string that looks like a length", "00000004 00000004", b"\0\0\0\4"),
    ("a string of bytes that are no text", "00000002 fffe", b"\xff\xfe"),
]

NUMBERS = [
    ("the uint32 of the specification", "uint32", "29b7f4aa", 699921578),
    ("the least uint32", "uint32", "00000000", 0),
    ("the greatest uint32", "uint32", "ffffffff", 2**32 - 1),
    ("a uint32 with its bytes in order", "uint32", "01020304", 0x01020304),
]

MPINTS = [
    ("the mpint of the specification", "00000008 09a378f9b2e332a7", 0x9A378F9B2E332A7),
    ("the mpint of the specification with its high bit set", "00000002 0080", 0x80),
    ("the least", "00000001 01", 1),
    ("the greatest of one byte", "00000001 7f", 0x7F),
    ("the greatest of two bytes, the first of them zero", "00000002 00ff", 0xFF),
    ("the least of two bytes that needs no zero", "00000002 0100", 0x100),
]

WRONG = "thing: an mpint not positive, or with a needless leading zero"

NO_MPINTS = [
    ("the zero of the specification", "00000000", WRONG),
    ("the -1234 of the specification", "00000002 edcc", WRONG),
    ("the -deadbeef of the specification", "00000005 ff21524111", WRONG),
    ("minus one", "00000001 ff", WRONG),
    ("the least negative one of one byte", "00000001 80", WRONG),
    ("zero as a byte", "00000001 00", WRONG),
    ("zero as two bytes", "00000002 0000", WRONG),
    ("a zero before a byte that needs none", "00000002 007f", WRONG),
    ("two zeros before a byte that needs one", "00000003 000080", WRONG),
    ("a length and nothing behind it", "00000001", "thing: 1 bytes expected, 0 there"),
]

SHORT = [
    ("a uint32 of nothing", "uint32", "", "thing: 4 bytes expected, 0 there"),
    ("a uint32 of three bytes", "uint32", "000000", "thing: 4 bytes expected, 3 there"),
    ("a string of nothing", "string", "", "thing: 4 bytes expected, 0 there"),
    ("a string with half a length", "string", "0000", "thing: 4 bytes expected, 2 there"),
    ("a string without its last byte", "string", "00000003 6162", "thing: 3 bytes expected, 2 "),
    ("a string of 2^31 bytes", "string", "80000000 61", "thing: 2147483648 bytes expected, 1 "),
    ("a string of 2^32-4 bytes", "string", "fffffffc 61", "thing: 4294967292 bytes expected, 1 "),
    ("a string of 2^32-1 bytes", "string", "ffffffff 61", "thing: 4294967295 bytes expected, 1 "),
    ("an mpint of 2^32-1 bytes", "mpint", "ffffffff 01", "thing: 4294967295 bytes expected, 1 "),
]

READS = ("uint32", "string", "mpint")


def read(method: str, data: bytes) -> object:
    """DATA as one value, all of it."""
    with sap.Reader(data, "thing") as r:
        value: object = getattr(r, method)()
        return value


@pytest.mark.parametrize("data, value", rows(STRINGS))
def test_a_string_is_written_and_read(data: str, value: bytes) -> None:
    assert sap.string(value) == bytes.fromhex(data)
    assert read("string", bytes.fromhex(data)) == value


@pytest.mark.parametrize("method, data, value", rows(NUMBERS))
def test_a_number_is_read(method: str, data: str, value: int) -> None:
    assert read(method, bytes.fromhex(data)) == value


@pytest.mark.parametrize(
    "write, value, data",
    [
        (sap.byte, 0, "00"),
        (sap.byte, 255, "ff"),
        (sap.uint32, 699921578, "29b7f4aa"),
        (sap.uint32, 0, "00000000"),
        (sap.uint32, 2**32 - 1, "ffffffff"),
    ],
)
def test_a_number_is_written(write: Callable[[int], bytes], value: int, data: str) -> None:
    assert write(value) == bytes.fromhex(data)


@pytest.mark.parametrize("write, value", [(sap.byte, 256), (sap.uint32, 2**32), (sap.uint32, -1)])
def test_a_number_that_does_not_fit_is_never_written(
    write: Callable[[int], bytes], value: int
) -> None:
    with pytest.raises(OverflowError):
        write(value)


@pytest.mark.parametrize("data, value", rows(MPINTS))
def test_a_positive_mpint_is_read(data: str, value: int) -> None:
    assert read("mpint", bytes.fromhex(data)) == value


@pytest.mark.parametrize("data, error", rows(NO_MPINTS))
def test_an_mpint_that_no_key_or_signature_has_is_refused(data: str, error: str) -> None:
    with pytest.raises(sap.WireError) as e:
        read("mpint", bytes.fromhex(data))
    assert str(e.value) == error


@pytest.mark.parametrize("method, data, error", rows(SHORT))
def test_bytes_that_are_missing_are_told(method: str, data: str, error: str) -> None:
    with pytest.raises(sap.WireError) as e:
        read(method, bytes.fromhex(data))
    assert str(e.value).startswith(error)


@pytest.mark.parametrize("method", READS)
@pytest.mark.parametrize("extra", [1, 2, 1000])
def test_bytes_left_over_are_told(method: str, extra: int) -> None:
    one = {"uint32": bytes(4)}.get(method, b"\0\0\0\1\1")
    with pytest.raises(sap.WireError) as e:
        read(method, one + bytes(extra))
    assert str(e.value) == f"thing: {extra} bytes left over"


def test_a_reader_that_was_never_asked_tells_what_is_left_over() -> None:
    with pytest.raises(sap.WireError) as e, sap.Reader(b"abc", "thing"):
        pass
    assert str(e.value) == "thing: 3 bytes left over"


def test_a_reader_of_nothing_is_left_in_peace() -> None:
    with sap.Reader(b"", "thing"):
        pass


def test_an_error_inside_is_not_hidden_by_the_bytes_left_over() -> None:
    with pytest.raises(ZeroDivisionError), sap.Reader(b"abc", "thing"):
        raise ZeroDivisionError


def test_values_follow_each_other() -> None:
    data = bytes.fromhex("0000000a 00000003616263 000000020080 0007")
    with sap.Reader(data, "thing") as r:
        assert (r.uint32(), r.string(), r.mpint()) == (10, b"abc", 128)
        assert r.take(2) == b"\0\7"


@pytest.mark.parametrize("method", ["string", "mpint"])
def test_an_announced_length_takes_no_memory(method: str) -> None:
    tracemalloc.start()
    try:
        for length in ("ffffffff", "fffffff0", "80000000", "7fffffff", "40000000"):
            with pytest.raises(sap.WireError):
                read(method, bytes.fromhex(length) + b"\1" * 16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_what_a_reader_takes_is_what_was_written() -> None:
    chance = random.Random(4251)
    for _ in range(300):
        values = [chance.randbytes(chance.choice([0, 1, 3, 4, 5, 255, 256])) for _ in range(5)]
        with sap.Reader(b"".join(map(sap.string, values)), "thing") as r:
            assert [r.string() for _ in values] == values


def test_random_bytes_raise_nothing_but_wire_errors() -> None:
    chance = random.Random(1)
    outcomes = set()
    for _ in range(5000):
        # Mostly small numbers: lengths that fit are rare among random bytes.
        data = bytes(chance.choice((0, 0, 0, 1, 2, 5, 0x7F, 0x80, 0xFF)) for _ in range(20))
        r = sap.Reader(data, "thing")
        try:
            with r:
                while r.at < len(data):
                    getattr(r, chance.choice(READS))()
            outcomes.add("read")
        except sap.WireError as e:
            assert str(e).startswith("thing: ")
            outcomes.add("refused")
        assert r.at <= len(data)
    assert outcomes == {"read", "refused"}
