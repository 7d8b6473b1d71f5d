"""The endings of file names that images, volumes and masks may have."""

from __future__ import annotations

from collections.abc import Sequence

NIFTI = (".nii.gz", ".nii")
VOLUMES = (*NIFTI, ".mha", ".nrrd")  # SimpleITK reads the latter two
LOSSLESS = (".png", ".tif", ".tiff", ".bmp")  # masks of images must have one of these
IMAGES = (*LOSSLESS, ".jpg", ".jpeg")
ENDINGS = (*VOLUMES, *IMAGES)


def split_ending(name: str, endings: Sequence[str] = ENDINGS) -> tuple[str, str | None]:
    """Splits a file's name into the part before its ending, and the ending.

    `Path.suffix` would give .gz for .nii.gz. Upper and lower case do not matter. The ending is None
    if the name has none of `endings`.

    Example:
        >>> split_ending("b.v2.NII.gz"), split_ending("notes.txt")
        (('b.v2', '.nii.gz'), ('notes.txt', None))
    """
    ending = next((ending for ending in endings if name.lower().endswith(ending)), None)
    return (name if ending is None else name[: -len(ending)]), ending
