"""What README and docs/ say: links that lead somewhere, commands that the program takes, settings as the schema has
them.
"""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from mmtard.cli import main
from mmtard.config import ATTACK_OBJECTIVES, METHODS, WEIGHTINGS
from mmtard.config.explain import all_settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
named = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def blocks(text):
    """(language, content) of each fenced block of a page, also of those inside a list."""
    fence = re.compile(r"^( *)```(\w*)$")
    block = None
    for line in text.splitlines():
        found = fence.match(line)
        if found and block is None:
            indent, language, block = len(found[1]), found[2], []
        elif found:
            yield language, "\n".join(block)
            block = None
        elif block is not None:
            block.append(line[indent:])


def anchors(path):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(path):
    """Every command line of a page's blocks, without comments, as words."""
    for language, block in blocks(path.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "sh", "bash") else ():
            if re.match(r"(mmtard|bash|sbatch|torchrun|python launch/submit\.py) ", line):
                yield shlex.split(line, comments=True)


@named
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda p: p.name)
def test_every_file_of_the_repository_that_a_page_names_is_there(page):
    """`mmtard/...`, `tests/...` and the like; a page may leave `mmtard/` away from a Python file."""
    for path in re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8")):
        if re.match(r"(mmtard|tests|docs|configs|launch|slurm)/", path) and "NAME" not in path:
            assert (ROOT / path).exists(), path
        elif path.endswith(".py") and "NAME" not in path:
            assert (ROOT / path).exists() or list((ROOT / "mmtard").rglob(path)), path


def test_the_page_of_methods_names_every_objective_weighting_and_attack_objective():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    missing = [name for name in (*METHODS, *WEIGHTINGS, *ATTACK_OBJECTIVES) if f"`{name}`" not in text]
    assert not missing, "docs/methods.md lacks them"


def test_the_page_of_commands_has_every_command():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    known = next(action.choices for action in main.parser()._actions if action.dest == "command" or action.choices)
    assert [name for name in known if not re.search(rf"`mmtard {name}\b", text)] == []


@named
def test_every_command_is_one_that_the_program_takes(page):
    for words in commands(page):
        if "-m" in words and words[words.index("-m") + 1] == "mmtard":  # under torchrun
            words = words[words.index("-m") + 1 :]
        if words[0] == "mmtard":
            assert callable(main.parse(words[1:]).run), words
        elif words[0] == "sbatch":
            assert any((ROOT / word).is_file() for word in words if word.endswith(".sh")), words
        elif words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words
        elif words[:2] == ["python", "launch/submit.py"]:
            from mmtard.launch import submit

            submit.parser("submit.py", "").parse_intermixed_args(words[2:])


@pytest.mark.slow
def test_every_command_that_needs_no_data_runs(tmp_path, monkeypatch, capfd):
    """Those that need weights or data of the reader's are run, at tiny size, by test_your_data.py."""
    monkeypatch.chdir(tmp_path)
    alone = ("configs", "init", "completion")
    lines = {tuple(w[1:]) for p in PAGES for w in commands(p) if w[0] == "mmtard"}
    mine = [w for w in lines if w[0] in alone or "--memory" in w or "--explain" in w or "--schema" in w]
    assert {w[0] for w in mine} >= {"configs", "init", "config"}
    for words in sorted(mine):
        assert main.main(list(words)) in (0, None), words
    assert "vitb32_mmtard" in capfd.readouterr().out and (tmp_path / "mine" / "vitb32_mmtard.yaml").is_file()


def test_there_is_something_to_check():
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) > 35 and {"mmtard", "bash", "sbatch", "torchrun", "python"} <= {words[0] for words in found}


def test_the_readme_is_read_in_one_sitting():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1200


def test_every_page_opens_with_what_the_reader_can_do_after_it():
    for page in sorted((ROOT / "docs").glob("*.md")):
        title, _, opening, *_ = page.read_text(encoding="utf-8").splitlines()
        assert title.startswith("# ") and (page.name == "index.md" or opening.startswith("After this page ")), page.name


def test_the_site_has_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = [page for entry in site["nav"] for page in _pages(entry)]
    assert sorted(pages) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def _pages(entry):
    if isinstance(entry, str):
        return [entry]
    return [
        page
        for value in entry.values()
        for item in (value if isinstance(value, list) else [value])
        for page in _pages(item)
    ]


def test_the_page_of_settings_is_that_of_the_schema():
    page = runpy.run_path(str(ROOT / "docs" / "make_settings.py"))["page"]
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page(all_settings()), (
        "run `python docs/make_settings.py`"
    )
