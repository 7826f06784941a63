"""The tray: contrib/windows/tray.pyw, and its icon."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

from conftest import ROOT

TRAY = ROOT / "contrib/windows/tray.pyw"


def load(path: Path) -> Any:
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
    spec = importlib.util.spec_from_loader(path.stem, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_icon_is_what_its_script_draws() -> None:
    icon = TRAY.with_name("ssh-agent-proxy.ico")
    assert load(TRAY.with_name("icon.py")).icon() == icon.read_bytes()
