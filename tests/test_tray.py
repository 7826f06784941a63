"""The tray: contrib/windows/tray.pyw, and its icon."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from conftest import ROOT, rows

TRAY = ROOT / "contrib/windows/tray.pyw"


def load(path: Path) -> Any:
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
    spec = importlib.util.spec_from_loader(path.stem, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


tray = load(TRAY)


def test_the_icon_is_what_its_script_draws() -> None:
    icon = TRAY.with_name("ssh-agent-proxy.ico")
    assert load(TRAY.with_name("icon.py")).icon() == icon.read_bytes()


# ---------------------------------------------------------------------------------- what it knows

# What stands in the Run entry (of ours or another), in StartupApproved and in the policies; whether
# we are started at login, and why that can't be changed.
LOGIN = [
    ("no entry", None, None, (None, None), False, ""),
    ("our entry", "ours", None, (None, None), True, ""),
    ("approved", "ours", b"\x02" + bytes(11), (None, 0), True, ""),
    ("approved again", "ours", b"\x06" + bytes(11), (None, None), True, ""),
    ("turned off", "ours", b"\x03\0\0\0" + b"\x55" * 8, (None, None), False, "Task Manager"),
    ("turned off elsewhere", "other", b"\x07" + bytes(11), (None, None), False, "Task Manager"),
    ("turned off, then removed", None, b"\x03" + bytes(11), (None, None), False, ""),
    ("nonsense", "ours", "3", (None, None), True, ""),
    ("empty", "ours", b"", (None, None), True, ""),
    ("another copy's", "other", None, (None, None), False, ""),
    ("this machine's policy", "ours", None, (1, None), False, "policy"),
    ("this user's policy", None, b"\x02" + bytes(11), (None, 1), False, "policy"),
]


@pytest.mark.parametrize("entry, approved, policies, on, fixed", rows(LOGIN))
def test_start_at_login_tells_the_truth(
    entry: Any, approved: Any, policies: Any, on: bool, fixed: str
) -> None:
    found = tray.login_state(entry, "ours", approved, policies)
    assert found.on == on
    assert fixed in found.fixed and bool(fixed) == bool(found.fixed)


ADDR, TOKENS = {"SSH_AGENT_PROXY_ADDR": "[::1]:1"}, {"SSH_AGENT_PROXY_TOKEN_FILE": "x"}
ADDRESSES = [
    ("nothing kept", {**TOKENS}, None, "this computer", ""),
    ("kept", {**TOKENS}, "all networks", "all networks", ""),
    ("nonsense kept", {**TOKENS}, "0.0.0.0:1", "this computer", ""),
    ("a number kept", {**TOKENS}, 1, "this computer", ""),
    ("tokens gone", {}, "all networks", "this computer", "SSH_AGENT_PROXY_TOKEN_FILE"),
    ("tokens empty", dict.fromkeys(TOKENS, ""), "all networks", "this computer", "needs tokens"),
    ("set otherwise", {**ADDR, **TOKENS}, "all networks", "", "set by SSH_AGENT_PROXY_ADDR"),
    ("set empty", {**dict.fromkeys(ADDR, ""), **TOKENS}, "all networks", "all networks", ""),
]


@pytest.mark.parametrize("env, kept, choice, fixed", rows(ADDRESSES))
def test_all_networks_need_tokens_and_a_set_address_wins(
    env: Dict[str, str], kept: Any, choice: str, fixed: str
) -> None:
    found, why = tray.choose_address(env, kept)
    assert found == choice
    assert fixed in why and bool(fixed) == bool(why)


def shown(items: List[Any]) -> List[str]:
    """A menu as text: [x] ticked, - greyed, > with a menu of its own."""
    lines = []
    for item in items:
        mark = "[x] " if item.ticked else "" if item.action or item.items else "- "
        lines.append(mark + item.label + (" >" if item.items else ""))
        lines += ["    " + line for line in shown(item.items)]
    return lines


LISTENING = ("127.0.0.1:7221",)
MENUS = [
    (
        "first run",
        (LISTENING,), (True,), "this computer", "needs tokens: set X", False,
        ["- Listening on 127.0.0.1:7221", "- ", "[x] &Start at login", "&Listen on >",
         "    [x] &This computer", "    - All networks (needs tokens: set X)", "&Copy public key",
         "&Open log", "- ", "E&xit"],
    ),
    (
        "set otherwise, turned off",
        (("a:1", "b:2"),), (False, "a policy"), "", "set by X", True,
        ["- Listening on a:1", "- Listening on b:2", "- ", "- &Start at login (a policy)",
         "&Listen on >", "    - This computer (set by X)", "    - All networks (set by X)",
         "- Copying the public key", "&Open log", "- ", "E&xit"],
    ),
    (
        "with tokens",
        (), (False,), "all networks", "", False,
        ["- Starting", "- ", "&Start at login", "&Listen on >", "    &This computer",
         "    [x] &All networks (WSL2 NAT, others; Windows Firewall asks)", "&Copy public key",
         "&Open log", "- ", "E&xit"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("state, login, choice, fixed, copying, expected", rows(MENUS))
def test_the_menu_shows_how_things_are(
    state: Any, login: Any, choice: str, fixed: str, copying: bool, expected: List[str]
) -> None:
    items = tray.menu_items(tray.State(*state), tray.Login(*login), choice, fixed, copying)
    assert shown(items) == expected


def test_why_it_does_not_run_stands_in_the_menu_whole() -> None:
    why = "port 7221 is in use by R&D, and " + "very long words " * 20
    items = tray.menu_items(tray.State(trouble=why), tray.Login(True), "", "", False)
    lines = [item.label for item in items[: items.index(tray.SEPARATOR)]]
    assert max(map(len, lines)) <= 90
    # & alone would underline what follows it.
    assert " ".join(lines) == f"Not running: {why.strip()}".replace("&", "&&")


TIPS = [
    ("starting", (), "ssh-agent-proxy: starting"),
    ("listening", (("a:1", "b:2"),), "ssh-agent-proxy: a:1, b:2"),
    ("in trouble", ((), "x"), "ssh-agent-proxy: not running: x"),
    ("ending", (("a:1",), "", True), "ssh-agent-proxy: ending"),
]


@pytest.mark.parametrize("state, tip", rows(TIPS))
def test_the_tooltip_tells_where_it_listens(state: Tuple[Any, ...], tip: str) -> None:
    assert tray.tooltip(tray.State(*state)) == tip


FITTING = [
    ("fits", "abc", "abc"),
    ("is cut", "abcd", "ab…"),
    ("pairs fit", "a\U0001f511", "a\U0001f511"),
    ("pairs are not cut in two", "\U0001f511\U0001f511", "…"),
]


@pytest.mark.parametrize("text, fits", rows(FITTING))
def test_a_text_fits_into_windows_structures(text: str, fits: str) -> None:
    assert tray.fitting(text, 4) == fits


# ------------------------------------------------------------------------------------------- log


def test_the_log_is_rotated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    handler = tray.LogFile()
    record = logging.LogRecord("x", logging.INFO, "", 0, "x" * 3000, (), None)
    for _ in range(1000):
        handler.emit(record)
    handler.close()
    folder = tmp_path / "ssh-agent-proxy"
    assert sorted(os.listdir(folder)) == ["tray.log", "tray.log.1"]
    assert 1 << 19 < (folder / "tray.log.1").stat().st_size <= 1 << 20


def test_a_log_that_cannot_be_renamed_is_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    handler = tray.LogFile()
    handler.maxBytes = 100
    (tmp_path / "ssh-agent-proxy/tray.log.1/held open").mkdir(parents=True)
    for number in range(9):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, f"line {number}", (), None))
    handler.close()
    text = (tmp_path / "ssh-agent-proxy/tray.log").read_text()
    assert [line[-1] for line in text.splitlines()] == list("012345678")


@pytest.mark.parametrize("place", [None, "", "relative"])
def test_a_log_without_a_place_is_a_setting_that_is_wrong(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    if place is not None:
        monkeypatch.setenv("LOCALAPPDATA", place)
    with pytest.raises(tray.proxy.ConfigError, match="LOCALAPPDATA"):
        tray.LogFile()


def test_what_starts_it_at_login_keeps_pythons_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", r"C:\Some where\pythonw.exe")
    monkeypatch.setattr(sys, "argv", ["tray.pyw"])
    monkeypatch.setattr(sys, "orig_argv", ["pythonw", "-B", "-I", "tray.pyw"], raising=False)
    assert tray.command_line() == rf'"C:\Some where\pythonw.exe" -B -I {TRAY}'
