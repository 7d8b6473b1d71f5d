"""How the files of images, of volumes and of their masks may end."""

from __future__ import annotations

from collections.abc import Sequence

NIFTI = (".nii.gz", ".nii")
VOLUMES = (*NIFTI, ".mha", ".nrrd")  # the latter two by SimpleITK
LOSSLESS = (".png", ".tif", ".tiff", ".bmp")  # as the masks of images have to be
IMAGES = (*LOSSLESS, ".jpg", ".jpeg")
ENDINGS = (*VOLUMES, *IMAGES)


def split_ending(name: str, endings: Sequence[str] = ENDINGS) -> tuple[str, str | None]:
    """Takes a file's name apart, into what stands before its ending and which of `endings` it has.

    By hand, as `Path.suffix` of .nii.gz is .gz. Upper and lower case are alike; the ending is None
    if it is none of these.

    Example:
        >>> split_ending("b.v2.NII.gz"), split_ending("notes.txt")
        (('b.v2', '.nii.gz'), ('notes.txt', None))
    """
    ending = next((ending for ending in endings if name.lower().endswith(ending)), None)
    return (name if ending is None else name[: -len(ending)]), ending
