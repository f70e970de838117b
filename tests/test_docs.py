"""What the documents say is there: links lead somewhere, the version is one number."""

import re
from pathlib import Path

import pytest

import rnas

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_the_changelogs_newest_release_is_the_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]( - \d{4}-\d{2}-\d{2})?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == rnas.__version__
    assert all(date for _, date in headings[1:])
