"""Progress of long work: silent, unless a program installs bars, as the commands do."""

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Protocol, TypeVar, runtime_checkable

Item = TypeVar("Item")


@runtime_checkable
class Bar(Protocol):
    """A progress bar: tqdm's, or one with the same methods."""

    def __enter__(self) -> "Bar":
        """Show the bar."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object:
        """Close the bar."""

    def update(self, n: float = 1) -> object:
        """Advance the bar by n units."""


class SilentBar:
    """A progress bar that shows nothing."""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: float = 1) -> None:
        """Ignore the progress."""


def _make_silent_bar(**_: object) -> Bar:
    return SilentBar()


_make_bar: Callable[..., Bar] = _make_silent_bar


def install(make_bar: Callable[..., Bar]) -> Callable[..., Bar]:
    """Show progress with bars from now on.

    Args:
      make_bar: called with the keyword arguments of `bar`; returns a Bar.

    Returns:
      The function that made bars before.
    """
    global _make_bar
    before, _make_bar = _make_bar, make_bar
    return before


def bar(*, total: int | None, unit: str, description: str, initial: int = 0, scaled: bool = False) -> Bar:
    """Make a bar for work that is about to begin.

    Args:
      total: number of units of the whole work; None if unknown.
      unit: what is counted, like "image" or "B".
      description: the work, in a word or two.
      initial: number of units that are done already.
      scaled: show thousands and millions of units by their prefixes.
    """
    return _make_bar(total=total, unit=unit, description=description, initial=initial, scaled=scaled)


def follow(items: Iterable[Item], *, total: int | None, unit: str, description: str) -> Iterator[Item]:
    """Yield the items, and count them with a bar.

    Args:
      items: anything iterable.
      total: number of items; None if unknown.
      unit: what an item is, like "image".
      description: the work, in a word or two.
    """
    with bar(total=total, unit=unit, description=description) as shown:
        for item in items:
            yield item
            shown.update()
