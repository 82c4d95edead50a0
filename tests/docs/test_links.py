"""Relative links and pictures of all Markdown pages exist, also of those outside the site (README, launch/, ...)."""

import re

import pytest

from tests.conftest import REPOSITORY

PAGES = [
    *(path.relative_to(REPOSITORY) for path in REPOSITORY.glob("*.md")),
    *(
        path.relative_to(REPOSITORY)
        for folder in ("docs", "launch", "slurm", "benchmarks")
        for path in (REPOSITORY / folder).rglob("*.md")
    ),
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_of_page_point_at_files(page):
    text = re.sub(r"^```.*?^```$", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    missing = [
        target
        for target in LINK.findall(text)
        if not re.match(r"[a-z]+:", target) and not (REPOSITORY / page).parent.joinpath(target).exists()
    ]
    assert missing == []
