"""The code on the how-to pages runs, from top to bottom."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / 'docs'


@pytest.mark.parametrize('page', ['any_model.md'])
def test_the_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r'^```python\n(.*?)^```', (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    )
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
