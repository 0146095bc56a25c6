"""Checks before a run continues: which settings may change, and whether the data are the same."""

import logging
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import checkpoint
from ..config import ModelInfo, current_settings
from ..data.fingerprint import Fingerprint
from ..data.inventory import some
from ..errors import InputError, Unchecked

logger = logging.getLogger(__name__)

# Settings that do not change the numbers of a resumed run, up to rounding.
FREE_TO_CHANGE = frozenset(("accumulate", "eval_batch_size", "keep", "log_every", "workers", "max_damaged"))
PLACES = frozenset(("data", "data_dir"))  # The place of the data may change if the run recognizes them.
LENGTHS = frozenset(("epochs", "steps"))


class Data(NamedTuple):
    """The fingerprints of a run's data.

    Attributes:
      train: of the training examples.
      eval: of the evaluation examples.
    """

    train: Fingerprint
    eval: Fingerprint

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprints as config.json holds them."""
        return {name: part._asdict() for name, part in self._asdict().items()}

    @classmethod
    def from_json(cls, value: Unchecked) -> "Data":
        """Convert the value in config.json back.

        Args:
          value: from `to_json`.

        Raises:
          TypeError, AttributeError, ValueError: the value has another form.
        """
        data = cls(**{name: Fingerprint(**part) for name, part in value.items()})
        if not all(type(part.examples) is int and type(part.sha256) is str for part in data):
            raise ValueError("its fingerprint of the data is damaged")
        return data


# Settings


def require_same_settings(
    workdir: Path, settings: Mapping[str, Any], before: Mapping[str, Any], *, places_matter: bool
) -> None:
    """Raise InputError if settings would change the numbers of the run in a workdir.

    Args:
      workdir: the folder of the run.
      settings: the fields of the TrainConfig with which to continue.
      before: those with which it last started, as that version stored them.
      places_matter: whether the data must be in the same place.
    """
    unknown = before.keys() - settings.keys()
    if unknown:
        raise InputError(
            f"{workdir} holds a run with settings that this version does not know: {', '.join(sorted(unknown))}; "
            "continue it with the version that began it, or choose another `workdir`"
        )
    before = current_settings(before)
    free = FREE_TO_CHANGE | (frozenset() if places_matter else PLACES)
    changed = [key for key in settings if key not in free and settings[key] != before[key]]
    if before["steps"] and settings["steps"]:  # Then epochs have no effect.
        changed = [key for key in changed if key != "epochs"]
    if changed and LENGTHS.issuperset(changed):
        _require_growth(workdir, settings, before)
    elif changed:
        differences = ", ".join(f"{key} is {before[key]} there and {settings[key]} here" for key in changed)
        raise InputError(f"{workdir} holds a run with other settings: {differences}; choose another `workdir`")


def _require_growth(workdir: Path, settings: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raise InputError unless a run may become as long as its settings say."""
    unit = "steps" if before["steps"] else "epochs"
    was, wanted = before[unit], settings[unit]
    run = f"{workdir} holds a run of {was} {unit}"
    if bool(before["steps"]) != bool(settings["steps"]):
        raise InputError(f"{run}; change its length by `{unit}`, not in another unit")
    if wanted < was:
        raise InputError(f"{run}, which cannot shrink to {wanted}; leave `{unit}` as it is")
    reason = None
    if before["schedule"] != "constant":
        reason = (
            f"its {before['schedule']} schedule falls to 0 over the whole run, so a longer run has other learning "
            "rates from its first step on"
        )
    elif before["recalibrate"]:
        reason = f"it ends with {before['recalibrate']} steps that re-estimate batch norm's statistics (`recalibrate`)"
    if reason:
        raise InputError(
            f"{run}, which cannot grow to {wanted}: {reason}; choose another `workdir`, and begin with its weights: "
            f"`init_from` {workdir}"
        )


# Data


def require_same_data(
    workdir: Path, place: str, info: ModelInfo, data: Data, before: Data | None, *, changed_data: bool
) -> None:
    """Raise InputError if the run in a workdir was trained on other classes or examples; warn of accepted changes.

    Args:
      workdir: the folder of the run, with its model.json.
      place: name of the data.
      info: the ModelInfo of the network with the classes of the data.
      data: the Data to continue on.
      before: the Data of the last start; None if an older version wrote the workdir.
      changed_data: accept other examples of the same classes.
    """
    if data == before:
        return
    _require_same_classes(workdir, place, info)
    if before is None:
        logger.warning(
            "an older version wrote %s, without a fingerprint of its data: it is unknown whether %s still holds the "
            "examples that it was trained on",
            workdir,
            place,
        )
        return
    differences = "; ".join(
        _describe_change(what, then, now)
        for what, then, now in (("training", before.train, data.train), ("evaluation", before.eval, data.eval))
        if then != now
    )
    if not changed_data:
        raise InputError(
            f"{place} does not hold the examples that the run in {workdir} was trained on: {differences}; restore "
            "them, give `changed_data` to continue on the present examples, or choose another `workdir`"
        )
    logger.warning("%s continues on other examples than before: %s", workdir, differences)


def _describe_change(what: str, then: Fingerprint, now: Fingerprint) -> str:
    if then.examples == now.examples:
        return f"{what} has {now.examples:,} images as before, but with other names, sizes or labels"
    return f"{what} had {then.examples:,} images and has {now.examples:,} now"


def _require_same_classes(workdir: Path, place: str, now: ModelInfo) -> None:
    """Raise InputError unless the network of a workdir has the same names at the same labels."""
    try:
        before = checkpoint.read_info(workdir)
    except InputError as error:
        raise InputError(
            f"the classes of the run in {workdir} cannot be read from its {checkpoint.INFO}; restore the file, or "
            "choose another `workdir`"
        ) from error
    if (now.num_classes, now.classes) == (before.num_classes, before.classes):
        return
    if now.classes is None or before.classes is None:
        difference = f"{_count(before)} then, {_count(now)} now"
    else:
        missing, new = (
            [name for name in names if name not in others]
            for names, others in ((before.classes, now.classes), (now.classes, before.classes))
        )
        show = ascii if _forms(missing) & _forms(new) else str  # Names that look the same must differ in the message.
        named = {"missing": missing, "new": new}
        difference = ", ".join(f"{word}: {some([show(n) for n in names])}" for word, names in named.items() if names)
    raise InputError(
        f"the classes of {place} are not those that the run in {workdir} was trained on "
        f"({difference or 'another order'}); restore their names, or choose another `workdir`"
    )


def _count(info: ModelInfo) -> str:
    return f"{info.num_classes} classes {'without' if info.classes is None else 'with'} names"


def _forms(names: Iterable[str]) -> set[str]:
    return {unicodedata.normalize("NFC", name) for name in names}
