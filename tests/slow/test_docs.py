"""The pages of docs, followed as `tests/test_docs.py` follows README: in shares those that start benchmarks."""

import pages
import pytest
from pages import reader, things  # noqa: F401
from share import SHARE

SHORT = [page.stem for page in pages.PAGES if page.parent.name == "docs" and page.stem not in pages.LONG]
FOLLOWED = [*SHORT, *pages.LONG[: max(1, round(len(pages.LONG) * SHARE))]]


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_commands_of_a_page_run_in_their_order(name, reader, call):  # noqa: F811
    pages.follow(pages.ROOT / f"docs/{name}.md", call)
