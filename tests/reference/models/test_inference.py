"""Volumes window by window: the whole answer, each window told its own sample's attribute."""

import dataclasses
import weakref

import numpy as np
import pytest
import torch
from harness.volumes import CPU, FRAME, STAGED
from torch import nn

from dmoe_layer import DMoE, routing
from reference_models.metrics.loads import ExpertLoads
from reference_models.models.inference import infer

pytestmark = pytest.mark.usefixtures("one_thread")


class Local(nn.Module):
    """A voxel's answer depends on what lies up to 2 voxels away, and on its sample's attribute."""

    def __init__(self, norm=False):
        super().__init__()
        self.before = nn.Conv3d(1, 4, 3, padding=1)
        self.layer = DMoE(4, n_experts=4, channel_dim=1, attribute_sizes=3, residual=True)
        self.after = nn.Conv3d(4, 2, 3, padding=1)
        self.norm = nn.InstanceNorm3d(4, affine=True) if norm else nn.Identity()
        self.eval()

    def forward(self, image_BCS):
        return self.after(self.norm(self.layer(self.before(image_BCS))).relu())


class Told(nn.Module):
    """Answers every voxel with its sample's attribute; experts see the body alone."""

    def __init__(self):
        super().__init__()
        self.layer = DMoE(1, n_experts=4, k=1, channel_dim=1, attribute_sizes=3).eval()
        self.routed, self.bodies = [], []

    def forward(self, image_B1S, body_BS=None):
        inside = torch.ones_like(image_B1S[:, 0], dtype=torch.bool) if body_BS is None else body_BS
        self.bodies.append(inside)
        _, everywhere = self.layer(image_B1S, return_routing=True)
        told_BS = everywhere.attributes.reshape(image_B1S[:, 0].shape)
        with routing(told_BS[:, 0, 0, 0]) as scope:
            self.layer(image_B1S, mask=inside)
        self.routed += scope.routings
        return torch.stack([told_BS, told_BS + 1], 1).float()


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def answered(model, *inputs, told=((0,), (2,)), frame=FRAME, windows=3, loads=None):
    with torch.no_grad():
        return infer(
            model,
            inputs,
            torch.tensor(told),
            windows=frame.windows(windows),
            device=CPU,
            observe=None if loads is None else loads.add,
        )


@pytest.mark.parametrize("windows", [1, 3])
def test_windows_give_the_whole_volumes_answer_where_none_cuts_a_neighbourhood(windows):
    model, image = Local(), noise(2, 1, 56, 40, 32)
    told = torch.tensor([[0], [2]])
    with torch.no_grad(), routing(told):
        whole = model(image)
    windowed = answered(model, image, windows=windows)
    # Windows of 32 begin at 0, 16 and 24, at 0 and 8, and at 0: at their ends inside of the volume
    # they do not see 2 voxels further.
    safe = torch.zeros(56, 40, 32, dtype=torch.bool)
    cut = [*range(14, 18), *range(22, 26), *range(30, 34), *range(46, 50)]
    free = [torch.tensor([i for i in range(56) if i not in cut])]
    free += [torch.tensor([i for i in range(40) if i not in (6, 7, 8, 9, 30, 31, 32, 33)])]
    safe[free[0][:, None], free[1][None]] = True
    torch.testing.assert_close(windowed[:, :, safe], whole[:, :, safe], atol=1e-5, rtol=1e-5)
    assert (windowed - whole)[:, :, ~safe].abs().max() > 1e-3


def test_a_patch_that_holds_the_volume_gives_the_whole_volumes_answer_of_any_network():
    model, image = Local(norm=True), noise(2, 1, 32, 32, 32)
    with torch.no_grad(), routing(torch.tensor([[0], [2]])):
        whole = model(image)
    torch.testing.assert_close(answered(model, image), whole, atol=1e-6, rtol=1e-6)
    smaller = dataclasses.replace(FRAME, patch=(32, 32, 16))
    assert (answered(model, image, frame=smaller) - whole).abs().max() > 1e-3


def test_where_windows_disagree_the_one_whose_middle_is_nearer_weighs_more():
    class Mean(nn.Module):
        def forward(self, image_BCS):
            return torch.zeros_like(image_BCS) + image_BCS.mean((2, 3, 4), keepdim=True)

    image = torch.zeros(1, 1, 48, 32, 32)
    image[:, :, 32:] = 1  # seen by the second window alone, as one half of it
    blended = answered(Mean(), image, told=[[0]])[0, 0, :, 16, 16]
    assert blended[:16].abs().max() < 1e-6
    torch.testing.assert_close(blended[32:], torch.full((16,), 0.5))
    between = blended[16:32]
    assert (between.diff() > 0).all()
    torch.testing.assert_close(between + between.flip(0), torch.full((16,), 0.5))
    assert between[0] < 0.01


@pytest.mark.parametrize("windows", [1, 2, 5])
def test_every_window_is_told_its_own_samples_attribute(windows):
    # Of 3 windows a sample, so that some batches are of both samples.
    logits = answered(Told(), noise(3, 1, 64, 32, 32), told=[[2], [0], [1]], windows=windows)
    for sample, value in zip(logits, (2.0, 0.0, 1.0), strict=True):
        torch.testing.assert_close(sample[0], torch.full((64, 32, 32), value))


def test_a_volume_smaller_than_the_patch_is_not_padded_with_what_is_no_air():
    with pytest.raises(
        ValueError, match=r"got volumes of \(32, 31, 40\) voxels, expected at least"
    ):
        answered(Told(), noise(2, 1, 32, 31, 40))


def test_the_body_is_cut_as_the_image_is():
    class Both(nn.Module):
        def forward(self, image_B1S, body_BS):
            assert body_BS.dtype == torch.bool
            return image_B1S - body_BS[:, None].float()

    body = noise(2, 40, 48, 32) > 0.3
    assert not answered(Both(), body[:, None].float(), body).any()


def test_loads_are_shares_of_all_windows_tokens_inside_the_body():
    class Inside(Told):
        def forward(self, image_B1S, body_BS):
            with torch.no_grad():
                y, routed = self.layer(image_B1S, mask=body_BS, return_routing=True)
            self.routed.append(routed)
            return torch.cat([y, -y], 1)

    # One sample all of whose body lies in the first of three windows, one with a body everywhere.
    body = torch.ones(2, 64, 32, 32, dtype=torch.bool)
    body[0, 5:] = False
    model, image = Inside(), noise(2, 1, 64, 32, 32, seed=1)
    image[0] += 2  # so that the windows' own shares differ
    tables = []
    for windows in (1, 4):
        loads = ExpertLoads(STAGED)
        answered(model, image, body, told=[[1], [1]], windows=windows, loads=loads)
        tables.append(loads.tables()["stage"])
    chosen = torch.cat([routed.expert_indices for routed in model.routed[:6]]).flatten()
    assert len(chosen) == 5 * 32 * 32 + 3 * 32**3
    shares = (torch.bincount(chosen, minlength=4) / len(chosen)).tolist()
    for table in tables:
        assert table[1] == pytest.approx(shares, abs=1e-6)
        assert table[0] == table[2] == (0, 0, 0, 0)


def test_no_routing_outlives_its_window_batch():
    alive, most = weakref.WeakSet(), []

    class Watched(Local):
        def forward(self, image_BCS):
            most.append(len(alive))
            y, routed = self.layer(self.before(image_BCS), return_routing=True)
            for tensor in (routed.logits, routed.expert_indices):
                alive.add(tensor)
            return self.after(y)

    answered(Watched(), noise(2, 1, 64, 48, 32), loads=ExpertLoads(STAGED), windows=2)
    assert len(most) == 6
    assert set(most) == {0}
