"""The project's docstrings and comments as Griffe reads them, for the API reference."""

import re

import griffe

SECTION = re.compile(r"(?<=\S)\n(?=(?:Args|Attributes|Raises|Returns|Yields):\n)")


class Docstrings(griffe.Extension):
    """Separate the sections of docstrings, and let comments describe the fields of dataclasses."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Put a blank line before each section, which Griffe asks for; it calls this for every object that it reads."""
        del kwargs
        if obj.docstring:
            obj.docstring.value = SECTION.sub("\n\n", obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: object) -> None:
        """Give a field the comment that stands at it; Griffe calls this for every attribute that it reads."""
        del kwargs
        if attr.docstring or not attr.lineno or not attr.endlineno or not isinstance(attr.parent, griffe.Class):
            return
        if comment := comment_at(attr.lines_collection[attr.filepath], attr.lineno - 1, attr.endlineno - 1):
            attr.docstring = griffe.Docstring(comment, parent=attr, lineno=attr.lineno)


def comment_at(lines: list[str], first: int, last: int) -> str:
    """Return the comment behind a statement, or the lines of comment before it, or "".

    Args:
      lines: those of the file.
      first: the index of the statement's first line.
      last: the index of its last line.
    """
    if behind := re.search(r"  # (.*)$", lines[last]):
        return behind[1]
    start = first
    while lines[start - 1].strip().startswith("# "):
        start -= 1
    return " ".join(line.strip().removeprefix("# ") for line in lines[start:first])
