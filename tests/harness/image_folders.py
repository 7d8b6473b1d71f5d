"""Small folders of images, as FairSeg, HAM10000 and nnU-Net lay them out."""

import json
import zipfile

import numpy as np
from PIL import Image

from reference_models.data import DataSettings

CODES = {"race": 2, "gender": 0, "ethnicity": 1, "language": 0, "maritalstatus": 3}


def fundus():
    return np.arange(24 * 31, dtype=np.uint8).reshape(24, 31)


def disc(dtype=np.int8):
    mask = np.zeros((24, 31), np.int16)
    mask[8:16, 10:22], mask[10:14, 13:18] = -1, -2
    return mask.astype(dtype)


def write_npz(root, number, **members):
    """One file in the real format; None leaves a member out."""
    content = {"slo_fundus": fundus(), "disc_cup_mask": disc(), "age": 64.0, **CODES} | members
    path = root / f"data_{number:05}.npz"
    raw = {name: content.pop(name) for name in [*content] if isinstance(content[name], bytes)}
    np.savez_compressed(path, **{k: np.asarray(v) for k, v in content.items() if v is not None})
    with zipfile.ZipFile(path, "a") as archive:
        for name, stored in raw.items():
            archive.writestr(f"{name}.npy", stored)
    return path


def fairseg_folder(root, n=12, **members):
    for number in range(1, n + 1):
        write_npz(root, number, **{"race": number % 3} | members)
    names = [f"data_{number:05}.npz" for number in range(1, n + 1)]
    (root / "train.txt").write_text("\n".join(names[: n - 2]) + "\n", encoding="utf-8")
    (root / "test.txt").write_text("\n".join(names[n - 2 :]), encoding="utf-8")
    return DataSettings("fairseg", root)


def ham_folder(root, n=12, name="HAM10000", **columns):
    root = root / name
    for folder in ("HAM10000_images", "HAM10000_segmentations", "split"):
        (root / folder).mkdir(parents=True)
    rows = []
    for i in range(n):
        image_id = f"ISIC_{i:07}"
        pixels = np.full((20, 30, 3), (200, 120, 40), np.uint8)
        Image.fromarray(pixels).save(root / f"HAM10000_images/{image_id}.jpg", quality=95)
        mask = np.zeros((20, 30), np.uint8)
        mask[5:15, 10:25] = 255
        Image.fromarray(mask).save(root / f"HAM10000_segmentations/{image_id}_segmentation.png")
        row = {
            "": i,
            "lesion_id": f"HAM_{i // 2:07}",
            "image_id": image_id,
            "age": 45.0,
            "Path": f"HAM10000_images/{image_id}.jpg",
            "Sex": "MF"[i % 2],
            "Age_multi": i % 5,
            "localization": "lower extremity",
        }
        rows.append(row | {k: v[i] if isinstance(v, list) else v for k, v in columns.items()})
    write_ham_tables(root, rows)
    return DataSettings("ham10000", root), rows


def write_ham_tables(root, rows):
    for split, part in (("train", rows[:8]), ("val", rows[8:10]), ("test", rows[10:])):
        lines = [",".join(part[0]), *(",".join(map(str, row.values())) for row in part)]
        (root / "split" / f"new_{split}.csv").write_text("\n".join(lines), encoding="utf-8")


def echoes(number=0, size=(20, 30)):
    """A grey picture, unlike its neighbours."""
    return np.random.default_rng(number).integers(1, 255, size).astype(np.uint8)


def nodule(number=0, size=(20, 30)):
    mask = np.zeros(size, np.uint8)
    mask[5 : 9 + number % 5, 10:20], mask[12:16, 3:8] = 1, 2
    return mask


def write_image_layout(root, **changes):
    content = {
        "channel_names": {"0": "ultrasound"},
        "labels": {"background": 0, "nodule": 1, "vessel": 2},
        "file_ending": ".png",
    } | changes
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def nnunet_images(root, n=10, ending=".png", mask_ending=".png", **changes):
    """`n` outlined ultrasound images as nnU-Net lays them out, of sites A and B in turn."""
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    for i in range(n):
        Image.fromarray(echoes(i)).save(root / f"imagesTr/u{i}_0000{ending}")
        Image.fromarray(nodule(i)).save(root / f"labelsTr/u{i}{mask_ending}")
    write_image_layout(root, file_ending=ending, **changes)
    rows = "\n".join(["case,site", *(f"u{i},{'AB'[i % 2]}" for i in range(n))])
    (root / "attributes.csv").write_text(rows, encoding="utf-8")
    return DataSettings("folder", root)
