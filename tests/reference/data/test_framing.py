"""Framing: the network's square holds the crop's shape, and a mask finds its way back."""

import numpy as np
import pytest
import torch

from reference_models.data.cases import Sample
from reference_models.data.framing import ImageFraming


def sample(image_CS, mask_S):
    return Sample("case", image_CS, mask_S, (0,), (1.0, 1.0))


def ellipses(height, width):
    """Three classes with smooth borders."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    radius = np.hypot(y / 0.8, x / 0.7)
    return (radius < 1).astype(np.uint8) + (np.hypot(y - 0.1, x + 0.1) < 0.4)


@pytest.mark.parametrize("native", [(64, 64), (61, 83), (97, 40), (33, 120)])
@pytest.mark.parametrize("crop", [None, 50, 1000])
@pytest.mark.parametrize("size", [48, 96, 300])
def test_a_frame_goes_back_to_the_native_mask(native, crop, size):
    framing = ImageFraming(size, crop)
    mask = ellipses(*native)
    given = sample(np.stack([mask, mask]).astype(np.float32), mask)
    frame = framing.apply(given)
    image_CS, mask_S = frame.image_CS, frame.mask_S
    assert image_CS.shape == (2, size, size)
    assert image_CS.dtype == np.float32
    assert mask_S.dtype == np.uint8
    logits_KHW = torch.nn.functional.one_hot(torch.from_numpy(mask_S).long(), 3).permute(2, 0, 1)
    restored = framing.restore(logits_KHW, given)
    kept = [min(length, crop or length) for length in native]
    starts = [(length - k) // 2 for length, k in zip(native, kept, strict=True)]
    window = tuple(slice(s, s + k) for s, k in zip(starts, kept, strict=True))
    outside = np.ones(native, bool)
    outside[window] = False
    assert not restored[outside].any()
    wrong = (restored != mask)[window]
    # A pixel off the truth is one whose neighbourhood, as wide as a frame's pixel, has two labels.
    reach = int(np.ceil(max(kept) / size)) if size < max(kept) else 1
    padded = np.pad(mask[window], reach, mode="edge")
    shape = mask[window].shape
    near = np.zeros(shape, bool)
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            near |= padded[dy : dy + shape[0], dx : dx + shape[1]] != mask[window]
    assert not (wrong & ~near).any()
    assert wrong.mean() < 0.03
    if size == max(kept):
        assert not wrong.any()


def test_frames_keep_the_aspect_ratio_and_crop_the_middle():
    image = np.zeros((1, 40, 60), np.float32)
    image[0, 10:30, 20:40] = 1  # a square in the middle stays one
    given = sample(image, image[0].astype(np.uint8))
    frame = ImageFraming(30).apply(given)
    framed, labels = frame.image_CS, frame.mask_S
    rows, columns = np.nonzero(labels)
    assert (np.ptp(rows), np.ptp(columns)) == (9, 9)
    assert framed[0, :5].max() == 0  # padded with zeros
    cropped = ImageFraming(20, crop=20).apply(given)
    assert cropped.image_CS.min() == 1
    assert cropped.mask_S.min() == 1
    with pytest.raises(ValueError, match=r"got shape \(3, 20, 30\), expected \(K, 30, 30\)"):
        ImageFraming(30).restore(torch.zeros(3, 20, 30), given)
    with pytest.raises(ValueError, match="size"):
        ImageFraming(0)


def test_shrinking_averages_instead_of_picking_pixels():
    rows, columns = np.indices((64, 64))
    board_CS = ((rows + columns) % 2)[None].astype(np.float32)
    frame = ImageFraming(16).apply(sample(board_CS, np.zeros((64, 64), np.uint8)))
    np.testing.assert_allclose(frame.image_CS, 0.5, atol=0.02)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_shrinking_does_not_shift_a_mask(factor):
    rows, columns = np.indices((96, 96))
    disc_S = (np.hypot(rows - 40.3, columns - 51.7) < 25).astype(np.uint8)
    frame = ImageFraming(96 // factor).apply(sample(disc_S[None].astype(np.float32), disc_S))
    centre = (np.argwhere(frame.mask_S).mean(0) + 0.5) * factor - 0.5
    np.testing.assert_allclose(centre, (40.3, 51.7), atol=0.3)
