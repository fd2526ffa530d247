"""The pages: each link, heading, file, module, command and test that they name exists; the example and the pictures are true."""

from __future__ import annotations

import ast
import re
import shlex
import string
from functools import cache
from pathlib import Path

import pytest

from tests.benchmarks.pictures import EXAMPLE, LETTERS, PICTURES, layout_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
ROOMS = ("kernels", "model", "pretrain", "data_prep", "launch", "unfold")
FOLDERS = (*ROOMS, "tests", "docs")
SKIPPED = {".venv", ".git", "demo", "runs", "build"}
# Named in the pages, and rightly not here.
EXCEPTIONS = {
    "preprocess_data.py": "Megatron's",
    "convert_hf_to_gguf.py": "llama.cpp's",
}


def code_of(page: str) -> list[str]:
    """All inline code and all fenced blocks of a page."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", page, re.S | re.M)
    return [*fenced, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page, flags=re.S | re.M))]


def words_of(page: str) -> set[str]:
    """The words of a page's code, without punctuation around them."""
    return {word.strip(string.punctuation.replace("/", "").replace("_", "")) for code in code_of(page) for word in code.split()}


@cache
def anchors(path: Path) -> set[str]:
    """What a link may name behind the # of a page: its headings, as GitHub writes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if not i else f"{name}-{i}" for name, last in found.items() for i in range(last + 1)}


@cache
def source_files() -> list[Path]:
    """Python, shell, templates, configurations and make: whatever may cite a page."""
    kinds = {".py", ".sh", ".j2", ".yaml", ".toml"}
    inside = [p for p in ROOT.rglob("*") if not SKIPPED & set(p.relative_to(ROOT).parts)]
    return sorted(p for p in inside if p.suffix in kinds or p.name in ("Makefile", "run"))


def problem_of_link(page: Path, target: str) -> str:
    """What is wrong with a link of a page; '' if nothing is."""
    if re.match(r"[a-z]+:", target):
        return ""
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.exists():
        return f"{target}: there is no {name}"
    if anchor and anchor not in anchors(path):
        return f"{target}: {path.name} has no heading of that name"
    return ""


def problem_of_module(name: str) -> str:
    """What is wrong with a dotted name that begins in unfold or tests."""
    parts = name.split(".")
    path = ROOT / parts[0]
    for i, part in enumerate(parts[1:], 1):
        room = ROOT / part if path == ROOT / "unfold" and part in ROOMS else path / part
        if room.is_dir():
            path = room
            continue
        file = room.with_suffix(".py")
        defined_in = file if file.exists() else path / "__init__.py"
        rest = parts[i + 1 :] if file.exists() else parts[i:]
        return "" if not rest or (defined_in.exists() and rest[0] in defined(defined_in)) else f"{name}: no {rest[0]}"
    return ""


@cache
def defined(path: Path) -> set[str]:
    """Names at the top of a module, those of imports and of __all__ included."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        else:
            names |= {n.value if isinstance(n, ast.Constant) else n.id for n in ast.walk(node) if hasattr(n, "id") or is_text(n)}
    return names


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def problem_of_path(word: str) -> str:
    """What is wrong with a word that looks like a file or folder of the project."""
    path, first = word.split("::")[0], word.split("/")[0]
    if "/" not in path:
        return "" if any(p.name == path for p in source_files()) else f"{word}: no file of that name"
    if first not in FOLDERS or set("<>{}$@=") & set(path):
        return ""  # of a run, of an export, a placeholder
    if "*" in path:
        return "" if list(ROOT.glob(path)) else f"{word}: nothing matches"
    return "" if (ROOT / path).exists() else f"{word}: does not exist"


@cache
def subcommands(room: str) -> set[str]:
    """What may follow ``python -m ROOM``; empty where anything may."""
    files = {"pretrain": "pretrain/command.py", "launch": "launch/arguments.py", "data_prep": "data_prep/arguments.py"}
    return set(re.findall(r"add_parser\(\s*\"([\w-]+)\"", (ROOT / files[room]).read_text()))


def problems_of_commands(code: str) -> list[str]:
    problems = []
    for module, follows in re.findall(r"python3? (?:-s )?(?:-m )([\w.]+)(?: +([a-z][\w-]*)\b)?", code):
        if module.split(".")[0] not in FOLDERS:
            continue
        if module in ("pretrain", "launch", "data_prep"):
            if follows and follows not in subcommands(module):
                problems.append(f"python -m {module} {follows}: no such command")
        elif not any((ROOT / module.replace(".", "/")).with_suffix(s).exists() for s in (".py", "")):
            problems.append(f"python -m {module}: no such module")
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", code, re.M):
        if not re.search(rf"^{target}:", makefile, re.M):
            problems.append(f"make {target}: no such target")
    return problems


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    text = re.sub(r"`[^`\n]*`", "", text)
    targets = re.findall(r"\]\(([^()\s]+)\)", text)
    assert not [problem for target in targets if (problem := problem_of_link(page, target))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_named_exists(page):
    text = page.read_text()
    words = words_of(text) - EXCEPTIONS.keys()
    problems = [problem for code in code_of(text) for problem in problems_of_commands(code)]
    tests = "\n".join(p.read_text() for p in source_files() if p.is_relative_to(ROOT / "tests"))
    for word in sorted(words):
        if re.fullmatch(r"[\w./*-]+\.py(::.*)?", word) or re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]*", word):
            problems.append(problem_of_path(word))
        elif re.fullmatch(r"(unfold|tests)(\.\w+)+", word):
            problems.append(problem_of_module(word))
        elif re.fullmatch(r"test_\w+", word):
            problems.append("" if f"def {word}(" in tests else f"{word}: no such test")
    assert not [problem for problem in problems if problem]


def test_the_commands_of_the_paper_are_complete():
    """They cannot be run here; every one is at least a whole command line."""
    from unfold.data_prep.arguments import build_parser as prepare
    from unfold.launch.arguments import build_parser as launch
    from unfold.pretrain.command import build_parser as pretrain

    parsers = {"data_prep": prepare(), "launch": launch(), "pretrain": pretrain()}
    blocks = re.findall(r"^```\n(.*?)^```", (DOCS / "paper.md").read_text(), re.S | re.M)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("python -m ")]
    assert len(commands) > 8
    for command in commands:
        room, *arguments = shlex.split(command)[2:]
        parsers[room].parse_args(arguments)  # a wrong flag ends the test


def test_code_cites_pages_that_are_there():
    """``docs/method.md#selection`` in code is a link like any other; pages outside of the project are not cited."""
    problems = []
    for path in source_files():
        text = path.read_text()
        for target in re.findall(r"docs/([\w-]+\.md(?:#[\w-]+)?)", text):
            problems.append(problem_of_link(DOCS / "x.md", target) and f"{path.relative_to(ROOT)}: docs/{target}")
        problems += [f"{path.relative_to(ROOT)}: {cited}" for cited in re.findall(r"\b(?:METHOD|DESIGN|FACTS)\.md", text)]
    own = str(Path(__file__).relative_to(ROOT))
    assert not [problem for problem in problems if problem and not problem.startswith(own)]


def test_every_page_can_be_found():
    """From the README, link by link."""
    found, open_pages = set(), [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop()
        if page in found or not page.exists():
            continue
        found.add(page)
        for target in re.findall(r"\]\(([^()\s#:]+\.md)[^()]*\)", page.read_text()):
            open_pages.append((page.parent / target).resolve())
    assert set(PAGES) <= found, f"no link leads to {sorted(p.name for p in set(PAGES) - found)}"


def test_the_worked_example_is_exact():
    layout = layout_of(17, EXAMPLE)
    mask = layout.intervals.dense_mask()[0].int()
    block = re.search(r"^```\n( +\.{5}g.*?)^```", (DOCS / "method.md").read_text(), re.S | re.M).group(1)
    tokens, *rows = block.rstrip().split("\n")
    assert tokens.strip() == "".join(LETTERS[i] for i in layout.level[0].tolist())
    assert len(rows) == 3
    for row in rows:
        number, letter, seen = row.split()
        assert tokens.strip()[int(number)] == letter
        assert seen == "".join(map(str, mask[int(number), : int(number) + 1].tolist()))


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_what_the_code_draws(name):
    assert (DOCS / name).read_text() == PICTURES[name](), "run: python -m tests.benchmarks.pictures"
