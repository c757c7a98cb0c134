"""The code on the how-to pages runs, from top to bottom, and no page has a dead link."""

from pathlib import Path

import pytest

from pages import ROOT, code_blocks, dead_links

DOCS = ROOT / 'docs'


@pytest.mark.usefixtures('quick_compilation')
@pytest.mark.parametrize('page', ['any_model.md', 'units.md'])
def test_the_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks(DOCS / page)
    assert blocks
    names: dict[str, object] = {}
    for _, block in blocks:
        exec(block, names)


@pytest.mark.parametrize('page', sorted(DOCS.glob('*.md')), ids=lambda page: page.stem)
def test_links_exist(page: Path) -> None:
    assert dead_links(page) == []
