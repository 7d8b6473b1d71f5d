"""A value more or less in a trained model: all others' outputs stay to the bit, and train on."""

import copy

import pytest
import torch
import torch.distributed as dist
from harness.layers import eval_layer, make_quiet
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dmoe_layer import AttributeRouter, DMoE, insert_after, routing, swap_mlps
from dmoe_layer.surgery import add_attribute_value, remove_attribute_value

# attribute_sizes, the attribute that changes, unknown, attributes of a batch
LAYERS = {
    "one attribute": (3, 0, "error", [0, 2, 1, 2]),
    "one value": (1, 0, "error", [0, 0, 0, 0]),
    "a learned unknown": (3, 0, "learned", [0, -1, 1, 2]),
    "an averaged unknown": (3, 0, "average", [0, 1, 1, 2]),
    "the first of two": ((3, 2), 0, "learned", [[2, 1], [-1, 0], [1, -1], [0, 1]]),
    "the second of two": ((3, 2), 1, "learned", [[2, 1], [-1, 0], [1, -1], [0, 1]]),
    "the middle one of three": ((2, 3, 2), 1, "average", [[0, 1, -1], [-1, 0, 1], [1, 2, 0]]),
}
layers = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())


def outcome(layer, x, attributes, noisy=False):
    """Output and routing, of a call of which the seed is always the same."""
    layer.train(noisy)
    torch.manual_seed(1)
    y, routed = layer(x, torch.tensor(attributes), return_routing=True)
    return y, routed.logits, routed.gates, routed.expert_indices


def same_bits(found, expected):
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("start", ["mean", 0])
@pytest.mark.parametrize("noisy", [False, True])
@layers
def test_every_other_value_routes_as_before_to_the_bit(case, noisy, start):
    sizes, attribute, unknown, attributes = case
    layer = DMoE(6, n_experts=4, attribute_sizes=sizes, unknown=unknown, dropout=0.1)
    x = torch.randn(len(attributes), 7, 6)
    before = outcome(layer, x, attributes, noisy)
    new = add_attribute_value(layer, attribute, start)
    old = sizes if isinstance(sizes, tuple) else (sizes,)
    grown = (*old[:attribute], new + 1, *old[attribute + 1 :])
    assert new == old[attribute]
    assert layer.attribute_sizes == layer.router.attribute_sizes
    assert layer.attribute_sizes == (grown if isinstance(sizes, tuple) else new + 1)
    assert same_bits(outcome(layer, x, attributes, noisy), before)


@layers
def test_removing_the_new_value_gives_back_what_was(case):
    sizes, attribute, unknown, attributes = case
    layer = DMoE(6, n_experts=4, attribute_sizes=sizes, unknown=unknown)
    before, x = copy.deepcopy(layer), torch.randn(len(attributes), 7, 6)
    new = add_attribute_value(layer, attribute)
    assert remove_attribute_value(layer, new, attribute) == {old: old for old in range(new)}
    assert (layer.attribute_sizes, layer.router.sizes) == (sizes, before.router.sizes)
    state, state_before = layer.state_dict(), before.state_dict()
    assert state.keys() == state_before.keys()
    assert all(torch.equal(state[name], state_before[name]) for name in state)
    assert same_bits(outcome(layer, x, attributes), outcome(before, x, attributes))


def test_a_value_out_of_the_middle_moves_those_above_it_down_and_says_so():
    layer = make_quiet(attribute_sizes=(2, 4), unknown="learned")
    x = torch.randn(4, 3, 6)
    before = outcome(layer, x, [[0, 0], [1, 2], [-1, 3], [1, -1]])
    moved = remove_attribute_value(layer, 1, attribute=1)
    assert moved == {0: 0, 2: 1, 3: 2}
    after = outcome(layer, x, [[0, moved[0]], [1, moved[2]], [-1, moved[3]], [1, -1]])
    assert same_bits(after, before)
    with pytest.raises(ValueError, match="got 3"):
        layer(x[:1], torch.tensor([[0, 3]]))


def test_a_copied_value_routes_as_the_one_it_was_copied_from():
    layer, x = make_quiet(attribute_sizes=(3, 2), unknown="learned"), torch.randn(4, 3, 6)
    old = [[0, 1], [1, 0], [2, -1], [-1, -1]]
    before = outcome(layer, x, old)
    assert add_attribute_value(layer, 1, start=1) == 2
    assert add_attribute_value(layer, 1, start=-1) == 3
    new = [[0, 2], [1, 0], [2, 3], [-1, 3]]
    assert same_bits(outcome(layer, x, new), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_value_that_starts_at_the_mean_routes_as_the_average_of_the_others(dtype):
    options = {"attribute_sizes": 3, "n_experts": 4, "noise": "never"}
    router = AttributeRouter(6, **options, dtype=dtype)
    average = AttributeRouter(6, **options, unknown="average", dtype=dtype)
    average.load_state_dict(router.state_dict())
    x = torch.randn(2, 5, 6, dtype=dtype)
    true = average(x, torch.tensor([-1, -1])).logits
    new = add_attribute_value(router)
    found = router(x, torch.tensor([new, new])).logits
    rtol = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(found, true, rtol=rtol, atol=rtol)


def make_model():
    """A swapped MLP that stands twice, an inserted layer, a plain mixture, a router of its own."""
    mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    model = nn.ModuleDict(
        {
            "blocks": nn.Sequential(mlp, nn.LayerNorm(6), mlp),
            "stem": nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()),
            "plain": DMoE(6, n_experts=4),
            "router": AttributeRouter(6, n_experts=4, attribute_sizes=3),
        }
    )
    swap_mlps(model, "blocks.[02]", n_experts=4, attribute_sizes=3, upcycle=True)
    insert_after(model, "stem.0", n_experts=4, attribute_sizes=3)
    return model.eval()


def test_all_layers_of_a_model_get_the_value_and_shared_ones_get_it_once():
    model = make_model()
    x, image = torch.randn(2, 5, 6), torch.randn(2, 1, 8, 8)

    def run(attributes):
        with routing(torch.tensor(attributes)) as r:
            y = model["plain"](model["blocks"](x)), model["stem"](image)
        return *y, *(routed.logits for routed in r.routings)

    before = run([0, 2])
    assert model["blocks"][0] is model["blocks"][2]
    assert add_attribute_value(model, start=2) == 3
    for router in (model["blocks"][0].router, model["stem"][0].moe.router, model["router"]):
        assert (router.attribute_sizes, router.sizes) == (4, (4,))
        assert router.w_A2ED.shape[0] == router.bias.shape[0] == 4
    assert model["plain"].attribute_sizes is None
    assert same_bits(run([0, 2]), before)
    # The plain mixture's calls are recorded with the attributes, which it does not look at.
    assert same_bits(run([0, 3]), before)
    with routing(torch.tensor([4])), pytest.raises(ValueError, match="got 4"):
        model["blocks"](x)


def test_two_modules_that_share_their_parameters_get_one_row_more():
    one, two = AttributeRouter(6, attribute_sizes=3), AttributeRouter(6, attribute_sizes=3)
    two.w_A2ED, two.bias = one.w_A2ED, one.bias
    add_attribute_value(nn.ModuleList([one, two]))
    assert one.sizes == two.sizes == (4,)
    assert two.w_A2ED is one.w_A2ED
    assert one.w_A2ED.shape[0] == 4


def test_a_compiled_model_takes_the_new_value_and_refuses_the_next():
    layer, x = eval_layer(), torch.randn(2, 5, 16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    before = compiled(x, torch.tensor([0, 2]))
    add_attribute_value(layer, start=2)
    assert torch.equal(compiled(x, torch.tensor([0, 3])), before)
    with pytest.raises(ValueError, match="got 4"):
        compiled(x, torch.tensor([0, 4]))


def step(layer, optimizer, seed, attributes):
    torch.manual_seed(seed)
    x = torch.randn(2, 5, 6)
    loss = layer(x, torch.tensor(attributes)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_goes_on_for_the_others_as_if_nothing_had_happened(optimizer):
    twins = [make_quiet(), make_quiet()]
    twins[1].load_state_dict(twins[0].state_dict())
    held = [optimizer(twin.parameters()) for twin in twins]
    for twin, its in zip(twins, held, strict=True):
        last = step(twin, its, 1, [0, 2])  # kept: its graph must not hold the old shape
    new = add_attribute_value(twins[0], start=1, optimizer=held[0])
    state = held[0].state[twins[0].router.w_A2ED]
    for value in state.values():
        assert not torch.is_tensor(value) or not value.ndim or torch.equal(value[new], value[1])
    for seed in (2, 3):
        losses = [step(t, its, seed, [2, 1]) for t, its in zip(twins, held, strict=True)]
        assert torch.equal(*losses)
    for (name, found), (_, true) in zip(*(t.named_parameters() for t in twins), strict=True):
        assert torch.equal(found[:new] if "router" in name else found, true), name
    assert last.requires_grad
    step(twins[0], held[0], 4, [new, 1])  # and the new value learns
    assert torch.isfinite(twins[0].router.w_A2ED).all()
    moved = remove_attribute_value(twins[0], 0, optimizer=held[0])
    step(twins[0], held[0], 5, [moved[new], moved[1]])


def test_a_removed_values_state_goes_and_the_others_stay():
    layer = make_quiet(attribute_sizes=4)
    optimizer = torch.optim.Adam(layer.parameters())
    step(layer, optimizer, 1, [0, 3])
    before = copy.deepcopy(optimizer.state[layer.router.w_A2ED])
    remove_attribute_value(layer, 1, optimizer=optimizer)
    after = optimizer.state[layer.router.w_A2ED]
    assert before["exp_avg"][3].any()
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[key], before[key][[0, 2, 3]])
    assert after["step"] == before["step"]


def test_gradients_that_are_being_added_up_stay():
    layer, x = make_quiet(), torch.randn(2, 5, 6)
    layer(x, torch.tensor([0, 2])).square().mean().backward()
    before = layer.router.w_A2ED.grad.clone()
    add_attribute_value(layer)
    grad = layer.router.w_A2ED.grad
    assert torch.equal(grad[:3], before)
    assert before[2].any()
    assert not grad[3].any()
    layer(x, torch.tensor([3, 2])).square().mean().backward()
    assert layer.router.w_A2ED.grad[3].any()


def test_a_forward_pass_from_before_raises_in_its_backward():
    layer = make_quiet()
    loss = layer(torch.randn(2, 5, 6), torch.tensor([0, 2])).sum()
    add_attribute_value(layer)
    with pytest.raises(RuntimeError, match="shape"):
        loss.backward()


def test_an_optimizer_that_was_not_told_raises_and_never_trains_the_old_rows():
    layer = make_quiet()
    optimizer = torch.optim.Adam(layer.parameters())
    step(layer, optimizer, 1, [0, 2])
    add_attribute_value(layer)
    with pytest.raises(RuntimeError, match="size"):
        step(layer, optimizer, 2, [0, 2])


def test_what_was_changed_inside_ddp_trains_once_it_is_wrapped_anew():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer, x = make_quiet(), torch.randn(2, 5, 6)
        wrapped = DistributedDataParallel(layer)
        wrapped(x, torch.tensor([0, 1])).sum().backward()
        with pytest.raises(ValueError, match=r"ddp\.module"):
            add_attribute_value(wrapped)
        add_attribute_value(wrapped.module)
        again = DistributedDataParallel(wrapped.module)  # while the first is still there
        again.zero_grad()
        for _ in range(2):  # DDP tells in the second what it missed in the first
            again(x, torch.tensor([3, 1])).square().mean().backward()
        assert layer.router.w_A2ED.grad[3].any()
    finally:
        dist.destroy_process_group()
