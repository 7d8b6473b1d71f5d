"""nnU-Net's own networks with experts: built, trained and validated with each case's attribute."""

import pytest
import torch
from harness.nnunet_home import SITE

from dmoe_layer import DMoE, MissingAttributesError, routing
from reference_models.errors import DataError

pytestmark = pytest.mark.usefixtures("home", "one_thread")
PLANS = {"nnUNetPlans": "PlainConvUNet", "nnUNetResEncUNetMPlans": "ResidualEncoderUNet"}


def site_index(case_ids):
    return ["AB".index(SITE[case_id]) for case_id in case_ids]


def listen(network):
    """The list of what the routers are told in each forward pass from now on."""
    told = []
    network.register_forward_pre_hook(
        lambda _, args: told.append(routing.attribute_values(args[0], 2)[:, 0].tolist())
    )
    return told


def experts(network):
    """The layers by name; the decoder holds the encoder once more."""
    return {n: m for n, m in network.named_modules() if isinstance(m, DMoE)}


@pytest.fixture
def ready(home, tmp_path, monkeypatch):
    """Makes trainers that write to a folder of the test's own, and are about to begin."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path))

    def make(*name_and_plans):
        trainer = home.trainer(*name_and_plans)
        trainer.initialize()
        return trainer

    return make


@pytest.mark.parametrize("plans", PLANS)
@pytest.mark.parametrize(
    ("name", "sizes", "n_experts", "hidden"),
    [
        ("ShortDMoE", (2,), 8, 4),
        ("ShortTwoColumns", (3, 2), 8, 4),
        ("ShortPlainMoE", None, 8, 4),
        ("ShortDense", None, 1, 8),
    ],
)
def test_a_layer_follows_each_stage_and_learns(ready, plans, name, sizes, n_experts, hidden):
    trainer = ready(name, plans)
    network = trainer.network
    assert type(network).__name__ == PLANS[plans]
    layers = experts(network)
    assert list(layers) == [
        f"encoder.stages.{i}.moe" for i in range(len(network.encoder.output_channels))
    ]
    for layer, width in zip(layers.values(), network.encoder.output_channels, strict=True):
        assert layer.w1_EHD.shape == (n_experts, hidden * width, width)
        assert layer.attribute_sizes == sizes
    loader, _ = trainer.get_dataloaders()
    loss = trainer.train_step(next(loader))["loss"]
    assert torch.isfinite(torch.as_tensor(loss))
    for layer in layers.values():
        gradients = {n: p.grad.abs().sum() for n, p in layer.named_parameters()}
        assert gradients["w1_EHD"] > 0
        # A router has nothing to learn from where there is one expert.
        assert (gradients["router.w_A2ED"] > 0) == (n_experts > 1)


def test_every_step_tells_each_sample_its_own_cases_attribute(ready):
    trainer = ready()
    told, keys = listen(trainer.network), []
    for loader, step in zip(
        trainer.get_dataloaders(), (trainer.train_step, trainer.validation_step), strict=True
    ):
        for _ in range(3):
            batch = next(loader)
            keys.append(batch["keys"])
            step(batch)
    assert told == [site_index(of_batch) for of_batch in keys]
    assert {0, 1} <= {index for of_batch in told for index in of_batch}


def test_the_balance_loss_is_part_of_the_training_loss_alone(ready):
    trainer = ready()
    batch = next(trainer.get_dataloaders()[0])
    trainer.optimizer.param_groups[0]["lr"] = 0.0  # so that steps can be compared
    scopes, losses = [], {}
    trainer.network.register_forward_hook(lambda *_: scopes.append(trainer.step))
    for trainer.balance in (0.0, 3.0):
        for step in (trainer.train_step, trainer.validation_step):
            trainer.network.train(step == trainer.train_step)
            torch.manual_seed(0)  # of the routers' noise
            losses[step.__name__, trainer.balance] = float(step(batch)["loss"])
            assert trainer.step is None
    balance = scopes[2].load_balancing_loss().item()
    assert balance > 0.5
    assert losses["train_step", 3.0] - losses["train_step", 0.0] == pytest.approx(3 * balance, 1e-4)
    assert losses["validation_step", 3.0] == losses["validation_step", 0.0]
    assert scopes[1::2] == [None, None]


def test_deep_supervision_stays_on(ready):
    trainer = ready()
    with routing(torch.tensor([0])):
        outputs = trainer.network(torch.randn(1, 1, *trainer.configuration_manager.patch_size))
    assert len(outputs) == len(trainer.network.encoder.output_channels) - 1


def test_a_compiled_network_gives_the_same(ready):
    # nnU-Net compiles networks on a GPU alone.
    network = ready().network.eval()
    compiled = torch.compile(network, backend="aot_eager")
    x = torch.randn(2, 1, 16, 16, 16)
    for values in ([0, 1], [1, 1]):
        with torch.no_grad(), routing(torch.tensor(values), record=False):
            for y, expected in zip(compiled(x), network(x), strict=True):
                torch.testing.assert_close(y, expected)


def test_nothing_is_answered_without_attributes(ready):
    with pytest.raises(MissingAttributesError):
        ready().network(torch.randn(1, 1, 16, 16, 16))


def test_validation_tells_each_window_its_own_cases_attribute_and_records_nothing(
    ready, monkeypatch
):
    from reference_models.nnunet import trainer as module

    trainer = ready()
    opened = []

    def opening(attributes, *, record):
        opened.append(record)
        return routing(attributes, record=record)

    monkeypatch.setattr(module, "routing", opening)
    told = listen(trainer.network)
    _, cases = trainer.do_split()
    trainer.inference_allowed_mirroring_axes = (0, 1, 2)
    load_case = trainer.dataset_class.load_case
    trainer.perform_actual_validation()
    assert len(cases) == 2
    assert told == [site for site in ([one] for one in site_index(cases)) for _ in range(8)]
    assert opened == [False, False]
    assert trainer.dataset_class.load_case is load_case


def test_the_class_that_the_page_derives_is_found_and_asks_for_its_columns(ready):
    with pytest.raises(DataError, match="has no column age; it has site, scanner"):
        ready("nnUNetTrainerDMoESiteAge")
