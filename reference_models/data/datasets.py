"""The table of data sets: what each one needs, which attributes it has, and how it is opened.

To add one: write its `Dataset` in a file of its own, and put its name into `DataSettings.data` and
a row into `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import DataError
from . import fairseg, ham10000
from .cases import Attribute, Dataset
from .folder import Folder
from .intensities import CT_WINDOW
from .mni152 import HeldOut, Mni152, Normalised
from .nnunet import read_layout
from .phantom import Phantom, PhantomSettings
from .splits import Fold
from .table import UNKNOWN_TEXTS

FORMER_NAMES = {Folder.former_name: Folder.name}  # which recipes and commands of old still say


@dataclass(frozen=True)
class DataSettings:
    """Which data, from where, by which attributes, and how split."""

    data: Literal["fairseg", "ham10000", "mni152", "phantom", "folder", "nifti"]
    """The data set. folder: a folder of your own, in nnU-Net's layout; nifti: its former name."""
    root: Path | None = None
    """Folder of its files; mni152 and phantom have none."""
    attributes: tuple[str, ...] = ()
    """What the router knows: fairseg has race (default), gender, ethnicity, language,
    maritalstatus and age; ham10000 has age (default), sex and localization; a folder has the
    columns of its attributes.csv, the first by default."""
    splits: Path | None = None
    """A splits file (json), such as every run leaves in its folder, or nnU-Net's
    splits_final.json. Without it, a splits_final.json in the folder, else the data set's own split,
    and the rest by seed."""
    fold: Fold | None = None
    """Which fold, from 0: its val is the validation split. Of a splits_final.json, the first by
    default; where there is none, folds are made by subject, stratified by the default attribute.
    all: every case but the test cases is trained on, and none is held out."""
    folds: int | None = None
    """Number of folds that are made where there is no splits_final.json, 5 by default."""
    split_seed: int = 0
    """Seed by which cases are split that the data set's own split leaves open."""
    unknown_texts: tuple[str, ...] = UNKNOWN_TEXTS
    """Cells of a csv that say that a value is not known, in upper or lower case; an empty cell and
    the word unknown always do. If one of these is a value of yours, such as none of a contrast
    phase, give the others."""
    cache: Path | None = None
    """Folder of decoded and resized cases, shared by runs; ~/.cache/dmoe-frames by default."""
    ct_window: tuple[float, float] = CT_WINDOW
    """Hounsfield units that CT (a channel of that name, in a folder) is clipped to."""
    mni152: HeldOut = "middle"
    """The slices of mni152 that are held out for test and validation."""
    mni152_normalised: Normalised = "slice"
    """Over what the intensities of mni152 have mean 0 and variance 1: each slice by itself, or the
    whole head, so that a tissue looks the same in all slices."""
    phantom: PhantomSettings = field(default_factory=PhantomSettings)
    """What the phantom is made of."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", FORMER_NAMES.get(self.data, self.data))


@dataclass(frozen=True)
class Request:
    """What a data set is asked for when it is opened.

    Args:
        settings: what the user gave.
        root: the folder of its files; of a data set that is made, nothing is read from it.
        names: of the attributes to read. None: all that its files hold. Empty, where `Source` has
            no names to choose from: the default one.
        damaged, known: as of `open_dataset`.
    """

    settings: DataSettings
    root: Path
    names: tuple[str, ...] | None
    damaged: list[DataError] | None
    known: tuple[Attribute, ...]


@dataclass(frozen=True)
class Source:
    """A row of `DATASETS`.

    Args:
        create: opens the data set that a request describes.
        needs_root: whether it is read from a folder; if not, it is made and takes none.
        attributes: names to choose from, the default one first. Empty where they are known only
            once the data set is open: as columns of its files, or by what it is made of.
        axes: spatial axes of a sample: 2 of images, 3 of volumes; or what finds them in the folder.
        settings: those of `DataSettings` that are this data set's alone.
    """

    create: Callable[[Request], Dataset]
    needs_root: bool
    attributes: tuple[str, ...] = ()
    axes: int | Callable[[Path], int] = 2
    settings: tuple[str, ...] = ()


DATASETS = {
    "fairseg": Source(
        lambda request: fairseg.FairSeg(
            request.root, request.names, request.damaged, request.settings.unknown_texts
        ),
        needs_root=True,
        attributes=fairseg.ATTRIBUTES,
    ),
    "ham10000": Source(
        lambda request: ham10000.Ham10000(
            request.root, request.names, request.damaged, request.settings.unknown_texts
        ),
        needs_root=True,
        attributes=ham10000.ATTRIBUTES,
    ),
    "mni152": Source(
        lambda request: Mni152(request.settings.mni152, request.settings.mni152_normalised),
        needs_root=False,
        settings=("mni152", "mni152_normalised"),
    ),
    "phantom": Source(
        lambda request: Phantom(request.settings.phantom), needs_root=False, settings=("phantom",)
    ),
    "folder": Source(
        lambda request: Folder(
            request.root,
            request.names,
            request.damaged,
            ct_window=request.settings.ct_window,
            known=request.known,
            unknown_texts=request.settings.unknown_texts,
        ),
        needs_root=True,
        axes=lambda root: read_layout(root).axes,
        settings=("ct_window",),
    ),
}


def find_source(name: str) -> Source:
    """Looks up a row of `DATASETS`.

    Raises:
        DataError: there is no data set of that name.

    Example:
        >>> find_source("fairseg").axes
        2
    """
    if name not in DATASETS:
        raise DataError(f"data: got {name!r}, expected one of {', '.join(DATASETS)}")
    return DATASETS[name]


def find_axes(settings: DataSettings) -> int | None:
    """Finds how many spatial axes samples have, before the data set is opened.

    Returns:
        2 of images, 3 of volumes; None where the folder decides, and there is none yet.

    Raises:
        DataError: there is no data set of that name, or the folder does not say.
    """
    axes, root = find_source(settings.data).axes, settings.root
    if isinstance(axes, int):
        return axes
    return axes(root) if root is not None and root.is_dir() else None


def unused_settings(name: str) -> tuple[str, ...]:
    """Names the settings of data, as in `data.phantom`, that are other data sets' alone."""
    return tuple(
        f"data.{setting}"
        for other, source in DATASETS.items()
        if other != name
        for setting in source.settings
    )


def open_dataset(
    settings: DataSettings,
    *,
    damaged: list[DataError] | None = None,
    known: tuple[Attribute, ...] = (),
) -> Dataset:
    """Lists the cases and reads their attributes; images are read by `Dataset.load`.

    Args:
        settings: which data set, and which of its attributes.
        damaged: a list that collects faults, or None. With None, the first faults are raised as an
            error. With a list (as `check` has one), the faults of single cases are added to it,
            those cases are left out, and all attributes that the files hold are read unless
            `settings` names some.
        known: the attributes of a trained run. They are read unless `settings` names others, and
            where the files decide which values an attribute has (folder), it has these, in this
            order; a case with another value is a fault.

    Raises:
        DataError: no such data set, folder or attribute, or files are missing or damaged.

    Example:
        >>> open_dataset(DataSettings("phantom")).attributes[0].values
        ('site 1', 'site 2', 'site 3')
    """
    source = find_source(settings.data)
    if source.needs_root and (settings.root is None or not settings.root.is_dir()):
        raise DataError(f"root: {settings.data} needs the folder of its files, got {settings.root}")
    if not source.needs_root and settings.root is not None:
        raise DataError(f"{settings.data} is made, not read: leave root ({settings.root}) out")
    if source.needs_root:
        _require_choice(settings, source.attributes)
    names: tuple[str, ...] | None = settings.attributes or tuple(a.name for a in known)
    if not names:
        names = source.attributes[:1] if damaged is None else None
    request = Request(settings, settings.root or Path(), names, damaged, known)
    dataset = source.create(request)
    own = tuple(attribute.name for attribute in dataset.attributes)
    if not source.needs_root and settings.attributes not in ((), own):
        raise DataError(
            f"attributes: {settings.data} has {', '.join(own)} alone, got "
            f"{', '.join(settings.attributes)}"
        )
    return dataset


def _require_choice(settings: DataSettings, own: tuple[str, ...]) -> None:
    """Where `own` is empty, the data set itself looks whether its files have such attributes."""
    names = settings.attributes
    repeated = len(set(names)) < len(names)
    if own and (repeated or not set(names) <= set(own)):
        raise DataError(
            f"attributes: {settings.data} has {', '.join(own)}, each to be named once, got "
            f"{', '.join(names)}"
        )
    if repeated:
        raise DataError(f"attributes: {', '.join(names)}: name each once")
