"""What autograd keeps for backward, told by the storages of the tensors that it saves."""

import contextlib

import torch


@contextlib.contextmanager
def saved_for_backward(*own, n_experts=None):
    """Yields (bytes, bytes a number) of each storage that is kept inside, by its address.

    Storages of ``own`` do not count, nor do tensors of ``n_experts`` first rows: the weights in
    another dtype.
    """
    own, saved = {t.untyped_storage().data_ptr() for t in own}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape[:1] != (n_experts,):
            saved[storage.data_ptr()] = storage.nbytes(), tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def bytes_of(saved):
    return sum(size for size, _ in saved.values())


def gradients_and_largest_saved(layer, x):
    """Output and gradients, and the numbers in the largest storage kept beside x and parameters."""
    torch.manual_seed(0)
    with saved_for_backward(x, *layer.parameters()) as saved:
        y = layer(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    return [y, *gradients], max(size // each for size, each in saved.values())
