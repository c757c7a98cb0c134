"""What tests of pages share: the code that a page shows, and the links that lead nowhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def code_blocks(page: Path, language: str = 'python') -> list[tuple[str, str]]:
    """The fenced blocks of a language, in order, each with the heading that it stands under."""
    text = page.read_text()
    found = re.finditer(rf'^```{language}\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
    headings = ['', *re.findall(r'^#+ (.*)$', text, re.MULTILINE)]
    places = [0, *(match.start() for match in re.finditer(r'^#+ .*$', text, re.MULTILINE))]
    return [
        (headings[sum(place <= match.start() for place in places) - 1], match[1]) for match in found
    ]


def links(page: Path) -> list[str]:
    """Where the page links to, within the project."""
    return re.findall(r'\]\((?!https?:)([^)#]+)\)', page.read_text())


def dead_links(page: Path) -> list[str]:
    """Those that are not there."""
    return [target for target in links(page) if not (page.parent / target).exists()]
