"""What MkDocs needs to show pages that GitHub shows, too: their links to files of the repository, and narrow screens.

The site gets a page for each linked file. MkDocs calls the functions `on_...`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FOLDER = "repository"  # Of the site: README.md is the page repository/README.md, train.py is repository/train.py.md.
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".toml": "toml", ".json": "json"}
FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)
SHORT, LONG = 28, 60  # Characters: of code that stays on one line, of text that makes a cell of a table wide.
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(?=[)#])")


def place_of(page: str) -> str:
    """Return the file of the repository that a page shows."""
    inside = page.removeprefix(f"{FOLDER}/")
    return f"docs/{page}" if inside == page else inside


def page_of(place: str) -> str:
    """Return the page, or the picture, that shows a file of the repository."""
    if place.startswith("docs/"):
        return place.removeprefix("docs/")
    return f"{FOLDER}/{place}" if place.endswith(".md") else f"{FOLDER}/{place}.md"


def target_of(place: str, link: str) -> str:
    """Return the file of the repository that a link in another one leads to."""
    return normpath(PurePosixPath(place).parent / link)


def text_of(root: Path, place: str) -> str:
    """Return a file as Markdown: a page as it is, any other one as a block of code."""
    text = (root / place).read_text()
    if place.endswith(".md"):
        return text
    if place.endswith(".ipynb"):
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells)
    return f"# {place}\n\n````{LANGUAGES.get(Path(place).suffix, '')}\n{text}````\n"


def linked_files(root: Path, places: list[str]) -> Iterator[str]:
    """Yield the files outside docs/ to which pages link, and to which these link, in order."""
    seen = set(places)
    for place in places:  # It grows.
        for part in FENCE.split(text_of(root, place))[::2]:
            for link in LINK.findall(part):
                target = target_of(place, link)
                if target not in seen and not target.startswith("docs/") and (root / target).is_file():
                    seen.add(target)
                    places.append(target)
                    yield target


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the linked files."""
    root = Path(config.config_file_path).parent
    places = [place_of(file.src_uri) for file in files.documentation_pages()]
    for place in list(linked_files(root, places)):
        files.append(File.generated(config, page_of(place), content=text_of(root, place)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - MkDocs passes it.
    """Let links lead to pages of the site."""
    here = page.file.src_uri

    def to_page(match: re.Match[str]) -> str:
        target = page_of(target_of(place_of(here), match[1]))
        return relpath(target, PurePosixPath(here).parent) if files.get_file_from_path(target) else match[1]

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(to_page, part) for part in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, **kwargs: object) -> str:
    """Mark short code and long cells of tables, whose widths pages.css sets."""
    del kwargs
    html = re.sub(rf"<code>(?=[^<]{{1,{SHORT}}}</code>)", '<code class="short">', html)

    def to_cell(match: re.Match[str]) -> str:
        text = re.sub("<[^>]*>", "", match[1])
        return f'<td class="long">{match[1]}</td>' if len(text) >= LONG else match[0]

    return re.sub("<td>(.*?)</td>", to_cell, html)
