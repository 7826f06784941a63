"""The head's way for foreign text into a log; RFC 4251 section 5: the data types."""

import tracemalloc
from typing import Any, Callable

import pytest
from conftest import can_be_seen, rows

import ssh_agent_proxy as sap

# ---------------------------------------------------------------- foreign text

SHOWN = [
    # name, text, as it is shown within 20 characters, special characters
    ("text beyond ASCII", "hüben ☃", "hüben ☃", ""),
    ("bytes", "hüben".encode(), "hüben", ""),
    ("bytes that are no UTF-8", b"a\xff\xe2\x80", r"a\xff\xe2\x80", ""),
    ("line breaks", "a\r\nb\x85c\u2028d", r"a\r\nb\x85c\u2028d", ""),
    ("an escape sequence", "\x1b[2J\x7f", r"\x1b[2J\x7f", ""),
    ("a surrogate", "a\udcff", r"a\udcff", ""),
    ("special characters", 'a"b\\c', r"a\"b\\c", '"\\'),
    ("as much as fits", "x" * 20, "x" * 20, ""),
    ("one character too many", "x" * 21, "x" * 19 + "…", ""),
    ("an escape that would be cut", "x" * 17 + "\x1b" * 9, "x" * 17 + "…", ""),
    ("an escape that just fits", "x" * 16 + "\x1b", "x" * 16 + r"\x1b", ""),
    ("far too many bytes", b"x" * 10**6, "x" * 19 + "…", ""),
]

VALUES = [
    ("a word", "git", "git"),
    ("a path", "/run/user/0/agent.sock", "/run/user/0/agent.sock"),
    ("nothing", "", '""'),
    ("a blank", "a b", '"a b"'),
    ("an equals sign", "a=b", '"a=b"'),
    ("a quote and a backslash", 'a"\\', r'"a\"\\"'),
    ("text beyond ASCII", "hüben", '"hüben"'),
    ("a line break", "a\nb", r'"a\nb"'),
]


@pytest.mark.parametrize("text, shown, special", rows(SHOWN))
def test_foreign_text_is_shown_as_one_harmless_line(text: str, shown: str, special: str) -> None:
    assert sap.printable(text, 20, special) == shown
    # 200 characters unless told otherwise.
    assert sap.printable("x" * 201) == "x" * 199 + "…" != sap.printable("x" * 200)


def test_of_unicode_what_can_be_seen_is_shown_and_nothing_else() -> None:
    """But for the planes that hold ideographs, private characters or nothing."""
    for first in (*range(0, 0x20000, 256), *range(0xE0000, 0xE1100, 256)):
        text = {chr(number) for number in range(first, first + 256)}
        seen = set(filter(can_be_seen, text))
        shown = set(sap.printable("".join(text), 10_000))
        assert seen <= shown, hex(first)
        assert not shown & (text - seen), hex(first)


@pytest.mark.parametrize("text, value", rows(VALUES))
def test_a_value_in_the_log_is_one_that_can_be_read_back(text: str, value: str) -> None:
    assert sap.quoted(text) == value


# ---------------------------------------------------------------- the data types

# Section 5's own examples first. A name-list is read as the string that it is in.
READ = [
    ("the uint32 of the specification", "uint32", "29b7f4aa", 699921578),
    ("the greatest uint32", "uint32", "ffffffff", 2**32 - 1),
    ("the string of the specification", "string", "00000007 74657374696e67", b"testing"),
    ("the empty name-list of the specification", "string", "00000000", b""),
    ("the name-list of the specification", "string", "00000009 7a6c69622c6e6f6e65", b"zlib,none"),
    ("a string that looks like a length", "string", "00000004 00000004", b"\0\0\0\4"),
    ("the mpint of the specification", "mpint", "00000008 09a378f9b2e332a7", 0x9A378F9B2E332A7),
    ("the specification's with its high bit set", "mpint", "00000002 0080", 0x80),
    ("the least mpint", "mpint", "00000001 01", 1),
    ("the least of two bytes without a zero", "mpint", "00000002 0100", 0x100),
]

WRONG = "an mpint not positive, or with a needless leading zero"

REFUSED = [
    ("a uint32 of nothing", "uint32", "", "4 bytes expected, 0 there"),
    ("a uint32 of three bytes", "uint32", "000000", "4 bytes expected, 3 there"),
    ("a uint32 and a byte more", "uint32", "00000000 00", "1 bytes left over"),
    ("a string without its last byte", "string", "00000003 6162", "3 bytes expected, 2 there"),
    ("a string of 2^32-1 bytes", "string", "ffffffff 61", "4294967295 bytes expected, 1 there"),
    ("a string and two bytes more", "string", "00000001 01 0101", "2 bytes left over"),
    ("the zero of the specification", "mpint", "00000000", WRONG),
    ("the -1234 of the specification", "mpint", "00000002 edcc", WRONG),
    ("minus one", "mpint", "00000001 ff", WRONG),
    ("zero as a byte", "mpint", "00000001 00", WRONG),
    ("a zero before a byte that needs none", "mpint", "00000002 007f", WRONG),
    ("two zeros before a byte that needs one", "mpint", "00000003 000080", WRONG),
]


def read(method: str, data: bytes) -> object:
    """DATA as one value, all of it."""
    with sap.Reader(data, "thing") as r:
        value: object = getattr(r, method)()
        return value


@pytest.mark.parametrize("method, data, value", rows(READ))
def test_a_value_is_read(method: str, data: str, value: object) -> None:
    assert read(method, bytes.fromhex(data)) == value


@pytest.mark.parametrize("method, data, error", rows(REFUSED))
def test_what_is_no_such_value_is_refused(method: str, data: str, error: str) -> None:
    with pytest.raises(sap.WireError) as e:
        read(method, bytes.fromhex(data))
    assert str(e.value) == f"thing: {error}"


@pytest.mark.parametrize("write, value, data", [
    (sap.byte, 255, "ff"),
    (sap.uint32, 699921578, "29b7f4aa"),
    (sap.uint32, 2**32 - 1, "ffffffff"),
    (sap.string, b"testing", "00000007 74657374696e67"),
])  # fmt: skip
def test_a_value_is_written_where_it_fits(
        write: Callable[[Any], bytes], value: Any, data: str) -> None:  # fmt: skip
    assert write(value) == bytes.fromhex(data)
    if set(data) == {"f"}:
        with pytest.raises(OverflowError):
            write(value + 1)


def test_values_follow_each_other_and_an_error_inside_is_not_hidden_by_what_is_left_over() -> None:
    data = bytes.fromhex("0000000a 00000003616263 000000020080 0007")
    with sap.Reader(data, "thing") as r:
        assert (r.uint32(), r.string(), r.mpint(), r.take(2)) == (10, b"abc", 128, b"\0\7")
    with pytest.raises(ZeroDivisionError), sap.Reader(b"abc", "thing"):
        raise ZeroDivisionError


@pytest.mark.parametrize("method", ["string", "mpint"])
def test_an_announced_length_takes_no_memory(method: str) -> None:
    tracemalloc.start()
    try:
        for length in ("ffffffff", "80000000", "40000000"):
            with pytest.raises(sap.WireError):
                read(method, bytes.fromhex(length) + b"\1" * 16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
