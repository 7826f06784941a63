"""The rules that keep the program readable in an evening, held against its source."""

import ast
import dis
import functools
import os
import re
import sys
import sysconfig
from pathlib import Path
from types import CodeType
from typing import Dict, List, Set, Tuple

import pytest
from conftest import PROXY, ROOT, SHIM

SOURCE = PROXY.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
DOCSTRING = ast.get_docstring(TREE, clean=False) or ""

# Sections that are bytes in and values or errors out.
PURE = ("Wire", "Agent protocol", "SSHSIG", "Payload")

PLAN = ["Head", "Wire", "Agent protocol", "SSHSIG", "Payload", "Upstream", "Policy", "Hardening",
        "Config", "Listening", "HTTP", "Service", "Commands"]  # fmt: skip

# What may stand at the top; the second line is what tools put there.
PLANNED = {"ssh_agent_proxy.py", "shim.sh", "tests", "contrib", "docs", "Makefile", "README.md",
           "LICENSE", ".gitignore", ".ci"}  # fmt: skip
MADE = {".git", ".venv", "dist", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"}


@functools.cache
def headings() -> List[Tuple[int, str]]:
    """The line and the name of each section, the first of which has no heading."""
    found = ((n, re.fullmatch(r"# -{10,} (\S.*)", line)) for n, line in enumerate(LINES, 1))
    return [(number, match.group(1)) for number, match in found if match]


def section_of(line: int) -> str:
    return ["Head", *(name for number, name in headings() if number <= line)][-1]


def looked_up(code: CodeType) -> Set[str]:
    """The names that CODE looks up in the module, in whatever function inside it."""
    instructions = dis.get_instructions(code)
    names = {i.argval for i in instructions if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(looked_up(c) for c in code.co_consts if isinstance(c, CodeType)))


@functools.cache
def compiled() -> List[CodeType]:
    """Each statement at the top. (Annotations, as for this file, are not evaluated.)"""
    return [compile(ast.Module([s], []), "<statement>", "exec") for s in TREE.body]


def module_names() -> Dict[str, int]:
    """What the module defines or imports, and the index of the first statement that does."""
    names: Dict[str, int] = {}
    for index, code in enumerate(compiled()):
        for instruction in dis.get_instructions(code):
            if instruction.opname == "STORE_NAME":
                names.setdefault(instruction.argval, index)
    return names


def names_used_in(section: str) -> Set[str]:
    used = zip(TREE.body, map(looked_up, compiled()))
    return set().union(*(names for s, names in used if section_of(s.lineno) == section))


def uses() -> List[Set[int]]:
    """For each statement at the top: the indices of those that define what it uses."""
    defined = module_names()
    return [{defined[name] for name in looked_up(c) & set(defined)} for c in compiled()]


def reachable(graph: List[Set[int]], start: int) -> Set[int]:
    seen: Set[int] = set()
    left = [start]
    while left:
        for following in graph[left.pop()] - seen:
            seen.add(following)
            left.append(following)
    return seen


# ---------------------------------------------------------------- the whole file


def test_the_programs_can_be_read_in_an_evening() -> None:
    assert len(LINES) <= 3200
    assert len(SHIM.read_text("utf-8").splitlines()) <= 1800
    begins = [number for number, _ in headings()] + [len(LINES)]
    lengths = [end - begin for begin, end in zip(begins, begins[1:])]
    assert max(lengths) <= 650


def test_the_docstring_maps_the_sections_in_the_order_of_the_plan() -> None:
    mapped = re.findall(r"^    (\S.*?)  +\S", DOCSTRING, re.M)
    assert mapped == PLAN
    assert [name for _, name in headings()] == PLAN[1:]
    assert {section_of(statement.lineno) for statement in TREE.body} == set(PLAN)


def test_the_script_metadata_names_the_oldest_python() -> None:
    assert SOURCE.startswith(
        '#!/usr/bin/env python3\n# /// script\n# requires-python = ">=3.9"\n# ///\n'
    )


# ---------------------------------------------------------------- imports


def standard_library() -> Set[str]:
    if sys.version_info >= (3, 10):
        return set(sys.stdlib_module_names)
    files = Path(sysconfig.get_paths()["stdlib"]).iterdir()
    extensions = {"select", "binascii", "resource", "_winapi"}
    return set(sys.builtin_module_names) | {file.stem for file in files} | extensions


def test_it_imports_the_standard_library_only() -> None:
    modules: Set[str] = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add((node.module or "").split(".")[0])
    assert modules - standard_library() == set()


def test_what_is_imported_at_the_top_is_in_one_place_and_used_by_many() -> None:
    imports = [s for s in TREE.body if isinstance(s, (ast.Import, ast.ImportFrom))]
    assert {section_of(statement.lineno) for statement in imports} == {"Head"}
    names = {alias.name for s in imports if isinstance(s, ast.Import) for alias in s.names}
    assert names & {"ctypes", "subprocess", "resource"} == set()


# ---------------------------------------------------------------- from top to bottom


def test_nothing_is_used_above_its_definition() -> None:
    # What calls each other in a circle must stand in some order.
    graph = uses()
    early = []
    for index, used in enumerate(graph):
        for later in (i for i in used if i > index):
            if index not in reachable(graph, later):
                user, definition = TREE.body[index], TREE.body[later]
                early.append(f"line {user.lineno} uses what line {definition.lineno} defines")
    assert early == []


def test_no_section_uses_a_later_one() -> None:
    # Not even in a circle.
    place = [PLAN.index(section_of(statement.lineno)) for statement in TREE.body]
    for index, used in enumerate(uses()):
        for definition in used:
            assert place[definition] <= place[index], ast.unparse(TREE.body[index])[:200]


@pytest.mark.parametrize("section", PURE)
def test_a_pure_section_knows_no_system(section: str) -> None:
    system = {"os", "socket", "select", "time", "threading", "signal", "logging", "LOG", "open",
              "stat", "print", "input", "RequestError", "ConfigError", "AgentError"}  # fmt: skip
    assert names_used_in(section)
    assert names_used_in(section) & system == set()


def test_only_the_agents_own_section_speaks_to_an_agent() -> None:
    speak = {"SSH_AGENTC_REQUEST_IDENTITIES", "sign_request"}
    assert [name for name in PLAN if names_used_in(name) & speak] == ["Upstream"]


# ---------------------------------------------------------------- what code must not do


def test_nothing_runs_at_import_but_definitions() -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    body = list(TREE.body)
    for statement in TREE.body:
        if isinstance(statement, ast.If) and "sys.platform" in ast.unparse(statement.test):
            body.remove(statement)
            body += statement.body
    others = [s for s in body if not isinstance(s, allowed)]
    assert [type(s) for s in others] == [ast.Expr, ast.If, ast.If]
    for statement in others[1:]:
        assert isinstance(statement, ast.If)
        assert ast.unparse(statement.test).startswith("__name__ == '__main__'")


def test_no_global_changes() -> None:
    assert [n.lineno for n in ast.walk(TREE) if isinstance(n, ast.Global)] == []


def test_the_environment_is_read_in_main_only() -> None:
    readers = set()
    for statement in TREE.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
                readers.add(getattr(statement, "name", f"line {statement.lineno}"))
    assert readers == {"main"}


def test_c_functions_are_declared() -> None:
    # Each function of a C library that is called has its argtypes and restype set.
    functions = [ast.unparse(n) for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]
    for text in [text for text in functions if "ctypes.CDLL" in text]:
        for name in set(re.findall(r"\blibc\.(\w+)\(", text)):
            assert f"libc.{name}.argtypes" in text, name
            assert f"libc.{name}.restype" in text, name
        assert "use_errno=True" in text


# ---------------------------------------------------------------- docstrings


def test_every_error_and_every_longer_function_and_class_says_what_it_is() -> None:
    # Short ones say it by their names: what fits a glance needs no sentence.
    missing = []
    for node in TREE.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or ast.get_docstring(node):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        bases = getattr(node, "bases", [])
        is_error = any(ast.unparse(base).endswith(("Error", "Exception")) for base in bases)
        if is_error or (length > 10 and not node.name.startswith("_")):
            missing.append(node.name)
    assert missing == []


def test_docstrings_begin_with_one_sentence() -> None:
    documented = [n for n in ast.walk(TREE) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    for text in filter(None, map(ast.get_docstring, documented)):
        assert re.search(r"[.?:)]$", text.split("\n\n")[0]), text


# ---------------------------------------------------------------- the repository


def test_nothing_but_what_is_planned_stands_at_the_top() -> None:
    found = set(os.listdir(ROOT)) - MADE
    assert found - PLANNED == set()
    assert {"ssh_agent_proxy.py", "shim.sh", "tests", "Makefile", "LICENSE"} <= found
    for program in PROXY, SHIM:
        assert os.access(program, os.X_OK), f"chmod +x {program.name}"


def test_the_version_is_one() -> None:
    match = re.search(r'^VERSION = "(\d+\.\d+\.\d+)"$', SOURCE, re.M)
    assert match
    assert SOURCE.count(match.group(1)) == 1
