"""The table of data sets: what each one needs, which attributes it has, and how it is opened.

To add a data set, write its `Dataset` class in a file of its own, add its name to
`DataSettings.data`, and add a row to `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

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

# For a flag that takes several words, and none by default: `--help` would show "(default: )".
OR_NONE = tyro.conf.arg(help_behavior_hint=lambda words: f"(default: {words or 'None'})")
FORMER_NAMES = {Folder.former_name: Folder.name}  # older recipes and commands still have these


@dataclass(frozen=True)
class DataSettings:
    """Says which data are used, where they lie, by which attributes, and how they are split."""

    data: Literal["fairseg", "ham10000", "mni152", "phantom", "folder", "nifti"]
    """The data set.
    - folder: your own images or volumes, in a folder
      of nnU-Net's layout. Its former name is nifti.
    - fairseg: Harvard-FairSeg, which you download.
    - ham10000: HAM10000, which you download.
    - mni152: slices of the MNI152 brain; no download.
    - phantom: made-up images; no download."""
    root: Path | None = None
    """Folder that holds the files of the data set. Leave
    it out for mni152 and phantom, which have no
    files."""
    attributes: Annotated[tuple[str, ...], OR_NONE] = ()
    """The attributes by whose values the cases are
    grouped; in training, the router receives them.
    Without this flag, the first of these is used:
    - fairseg: race, gender, ethnicity, language,
      maritalstatus, age.
    - ham10000: age, sex, localization.
    - folder: the columns of its attributes.csv."""
    splits: Path | None = None
    """File that says which cases are for training,
    validation and test: the splits.json of another
    run, or a splits_final.json of nnU-Net. Without
    this flag a splits_final.json in the folder is
    used. Without that, the data set's own split is
    used, and --split-seed splits the rest."""
    fold: Fold | None = None
    """Number of the fold, counted from 0. The validation
    cases are those that the fold holds out. The folds
    are those of a splits_final.json or, without one,
    are made by subject and stratified by the default
    attribute. Without this flag the first fold of a
    splits_final.json is used, or else no fold.
    - all: train on every case except the test cases,
      and hold out none."""
    folds: int | None = None
    """Number of folds to make if there is no
    splits_final.json. None: 5, as nnU-Net makes."""
    split_seed: int = 0
    """Seed that splits the cases which the data set's
    own split leaves open. Give all runs that you
    compare the same one."""
    unknown_texts: tuple[str, ...] = UNKNOWN_TEXTS
    """Texts in a csv that mean that a value is unknown,
    in upper or lower case. An empty cell and the word
    unknown always mean that. If one of these texts is
    a value in your data, such as none for a contrast
    phase, give the other texts only."""
    cache: Path | None = None
    """Folder that stores decoded and resized cases, so
    that later epochs and runs start faster. It may
    grow large. None: ~/.cache/dmoe-frames."""
    ct_window: tuple[float, float] = CT_WINDOW
    """Lowest and highest Hounsfield unit, to which
    channels named CT in a folder are clipped. The
    default shows soft tissue."""
    mni152: HeldOut = "middle"
    """Which slices of mni152 are held out for validation
    and test: those in the middle of the head, or
    upper ones."""
    mni152_normalised: Normalised = "slice"
    """How the intensities of mni152 are brought to mean
    0 and variance 1.
    - slice: each slice by itself.
    - head: the whole head at once, so that a tissue
      looks the same in all slices."""
    phantom: PhantomSettings = field(default_factory=PhantomSettings)
    """Settings of the made-up images of --data phantom."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", FORMER_NAMES.get(self.data, self.data))


@dataclass(frozen=True)
class Request:
    """The arguments with which a data set is opened.

    Args:
        settings: the user's settings.
        root: the folder of the data set's files. A made-up data set reads nothing from it.
        names: the names of the attributes to read. None: all that the files hold. Empty: the
            default attribute, where `Source` lists no names to choose from.
        damaged, known: as for `open_dataset`.
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
        needs_root: whether the data set is read from a folder. If not, it is made up.
        attributes: names to choose from, the default one first. Empty if they are known only once
            the data set is open, as columns of its files or from its settings.
        axes: number of spatial axes of a sample, 2 for images and 3 for volumes, or a function that
            finds that number in the folder.
        settings: the fields of `DataSettings` that only this data set uses.
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
        DataError: no data set has that name.

    Example:
        >>> find_source("fairseg").axes
        2
    """
    if name not in DATASETS:
        raise DataError(f"data: got {name!r}, expected one of {', '.join(DATASETS)}")
    return DATASETS[name]


def find_axes(settings: DataSettings) -> int | None:
    """Finds how many spatial axes the samples have, before the data set is opened.

    Returns:
        2 for images, 3 for volumes; None if the folder decides and does not exist yet.

    Raises:
        DataError: no data set has that name, or the folder's dataset.json cannot be read.
    """
    axes, root = find_source(settings.data).axes, settings.root
    if isinstance(axes, int):
        return axes
    return axes(root) if root is not None and root.is_dir() else None


def unused_settings(name: str) -> tuple[str, ...]:
    """Names the settings, such as `data.phantom`, that only other data sets than `name` use."""
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
        known: the attributes of a trained run. They are read unless `settings` names others. A
            folder's attributes then have these values, in this order, and a case with another
            value is a fault.

    Raises:
        DataError: the data set, its folder or an attribute does not exist, or files are missing or
            damaged.

    Example:
        >>> open_dataset(DataSettings("phantom")).attributes[0].values
        ('site 1', 'site 2', 'site 3')
    """
    source = find_source(settings.data)
    if source.needs_root and (settings.root is None or not settings.root.is_dir()):
        raise DataError(
            f"root: got {settings.root}, expected the folder that holds the files of "
            f"{settings.data}; name it by --root."
        )
    if not source.needs_root and settings.root is not None:
        raise DataError(
            f"root: got {settings.root}, but {settings.data} is not read from files; leave --root "
            "out."
        )
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
            f"attributes: got {', '.join(settings.attributes)}, but {settings.data} has only "
            f"{', '.join(own)}; leave --attributes out."
        )
    return dataset


def _require_choice(settings: DataSettings, own: tuple[str, ...]) -> None:
    """Raises unless the attributes asked for are among `own`, each named once.

    If `own` is empty, the data set itself checks whether its files have such attributes.
    """
    names = settings.attributes
    repeated = len(set(names)) < len(names)
    if own and (repeated or not set(names) <= set(own)):
        raise DataError(
            f"attributes: got {', '.join(names)}, but {settings.data} has {', '.join(own)}; name "
            "some of these, each once."
        )
    if repeated:
        raise DataError(f"attributes: got {', '.join(names)}; name each attribute once.")
