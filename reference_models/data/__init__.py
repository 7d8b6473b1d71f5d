"""Data sets for the reference models, each of the same samples: `open_dataset` opens any."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import DataError
from .cases import Attribute, Dataset
from .fairseg import ATTRIBUTES as FAIRSEG_ATTRIBUTES
from .fairseg import FairSeg
from .ham10000 import VALUES as HAM10000_VALUES
from .ham10000 import Ham10000
from .nifti import CT_WINDOW, Nifti
from .phantom import Phantom, PhantomSettings


@dataclass(frozen=True)
class DataSettings:
    """Which data, from where, by which attributes, and how split."""

    data: Literal["fairseg", "ham10000", "mni152", "phantom", "nifti"]
    """Which data set."""
    root: Path | None = None
    """Folder of its files; mni152 and phantom have none."""
    attributes: tuple[str, ...] = ()
    """What the router knows: fairseg has race (default), gender, ethnicity, language,
    maritalstatus and age; ham10000 has age (default), sex and localization; nifti has the columns
    of its attributes.csv, the first by default."""
    splits: Path | None = None
    """A splits file (json), such as every run leaves in its folder; without it, the data set's own
    split, and the rest by seed."""
    split_seed: int = 0
    """Of what the data set's own split leaves open."""
    cache: Path | None = None
    """Folder of decoded and resized cases, shared by runs; ~/.cache/dmoe-frames by default."""
    ct_window: tuple[float, float] = CT_WINDOW
    """Hounsfield units that CT (a channel of that name, of nifti) is clipped to."""
    mni152: Literal["middle", "upper"] = "middle"
    """Which slices of mni152 are held out for test and validation."""
    phantom: PhantomSettings = field(default_factory=PhantomSettings)
    """What the phantom is made of."""


def open_dataset(
    settings: DataSettings,
    *,
    damaged: list[DataError] | None = None,
    known: tuple[Attribute, ...] = (),
) -> Dataset:
    """Lists the cases and reads their attributes; images are read by `Dataset.load`.

    Args:
        settings: which data set.
        damaged: for `check`: given a list, faults of single cases are put there and the cases
            left out, and without attributes named, all that the files hold are read.
        known: for a trained run: its attributes, by whose values and order data are read that
            have no fixed ones (nifti); without attributes named, it is these that are read.

    Raises:
        DataError: no such folder or attribute, or files are missing or damaged.

    Example:
        >>> open_dataset(DataSettings("phantom")).attributes[0].values
        ('site 1', 'site 2', 'site 3')
    """
    if settings.data in ("mni152", "phantom"):
        if settings.root is not None:
            raise DataError(f"{settings.data} is made, not read: leave root ({settings.root}) out")
        dataset: Dataset
        if settings.data == "phantom":
            dataset = Phantom(settings.phantom)
        else:
            from .mni152 import Mni152  # nilearn takes seconds to import

            dataset = Mni152(settings.mni152)
        own = tuple(attribute.name for attribute in dataset.attributes)
        if settings.attributes not in ((), own):
            raise DataError(
                f"attributes: {settings.data} has {', '.join(own)} alone, got "
                f"{', '.join(settings.attributes)}"
            )
        return dataset
    if settings.root is None or not settings.root.is_dir():
        raise DataError(f"root: {settings.data} needs the folder of its files, got {settings.root}")
    repeated = len(set(settings.attributes)) < len(settings.attributes)
    if settings.data == "nifti":
        if repeated:
            raise DataError(f"attributes: {', '.join(settings.attributes)}: name each once")
        names = settings.attributes or tuple(attribute.name for attribute in known)
        wanted = None if damaged is not None and not names else names
        return Nifti(settings.root, wanted, damaged, ct_window=settings.ct_window, known=known)
    own = FAIRSEG_ATTRIBUTES if settings.data == "fairseg" else tuple(HAM10000_VALUES)
    if repeated or not set(settings.attributes) <= set(own):
        raise DataError(
            f"attributes: {settings.data} has {', '.join(own)}, each to be named once, got "
            f"{', '.join(settings.attributes)}"
        )
    default = own[:1] if damaged is None else None
    kind = FairSeg if settings.data == "fairseg" else Ham10000
    return kind(settings.root, settings.attributes or default, damaged)
