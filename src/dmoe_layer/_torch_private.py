"""All private names of PyTorch that this package calls, and what happens if one is missing.

Each of them exists in all of PyTorch 2.8 to 2.15. If one is missing, the code that needs it takes a
slower path, or raises an error that says so. (``lazy.py`` overrides three private methods of
PyTorch's lazy modules, and says there what happens if their names change.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])


def backward_pass() -> int:
    """The number of the backward pass in which this thread is at work, -1 outside of one.

    Raises:
        RuntimeError: PyTorch no longer tells. A guess could record recomputed calls twice.
    """
    current = getattr(torch._C, "_current_graph_task_id", None)
    if current is None:
        raise RuntimeError(
            f"routing: PyTorch {torch.__version__} does not tell which backward pass a thread is "
            "in (torch._C._current_graph_task_id), so a scope cannot tell a call from its "
            "recompute. Use a version of PyTorch that the documentation lists as tested, or pass "
            "the attributes to the layer, layer(x, attributes)."
        )
    number: int = current()
    return number


def in_functional_derivative(x: Tensor) -> bool:
    """Whether torch.func takes a derivative of what is done with ``x``.

    If its transforms can no longer be told apart, each of them counts. A tensor inside of a
    transform has no storage of its own.
    """
    functorch = getattr(torch._C, "_functorch", None)
    stack = getattr(functorch, "get_interpreter_stack", None)
    kinds = getattr(functorch, "TransformType", None)
    if stack is None or kinds is None:
        try:
            x.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return True
        return False
    levels = stack()
    if not levels:
        return False
    active = [level.key() for level in levels]
    return kinds.Jvp in active or (torch.is_grad_enabled() and kinds.Grad in active)


def has_onednn_linear() -> bool:
    """Whether ``onednn_linear`` can be called: PyTorch has oneDNN, and its operator."""
    built = bool(torch.backends.mkldnn.is_available())
    return built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x_RI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
    """Computes x·wᵀ + b by oneDNN, whose operator the code of torch.compile calls."""
    # It ignores the strides of a bias.
    b_O = None if b_O is None else b_O.contiguous()
    y_RO: Tensor = torch.ops.mkldnn._linear_pointwise(x_RI, w_OI, b_O, "none", [], "")
    return y_RO


def constant_for_dynamo(function: Function) -> Function:
    """Marks a function whose result a compiled graph takes as a constant, without tracing it.

    ``torch.compiler.assume_constant_result`` does the same, but imports all of Dynamo and Triton.
    If Dynamo no longer reads the mark, it traces the function, or breaks the graph there.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_for_dynamo  # which, up to PyTorch 2.11, it cannot trace
def has_autocast(device: str) -> bool:
    """Whether PyTorch's autocast knows this type of device."""
    return torch.amp.is_autocast_available(device)


def program_capture() -> object:
    """The capture that turns this thread's calls into a program, or None.

    A capture comes from ``torch.jit.trace``, from ``make_fx`` or, through them, from
    ``torch.export`` and ONNX. Two captures are compared by ``is``. ``torch.compile`` is no capture,
    because it guards what its program has read.

    Raises:
        RuntimeError: Calls may be captured, but PyTorch no longer tells.
    """
    return _program_capture(torch.compiler.is_dynamo_compiling())


@constant_for_dynamo  # Up to PyTorch 2.11 it takes is_exporting() to be true for torch.compile.
def _program_capture(in_dynamo: bool) -> object:
    if in_dynamo:
        return "torch.export" if torch.compiler.is_exporting() else None
    if trace := getattr(torch._C, "_get_tracing_state", torch.jit.is_tracing)():
        return trace
    # The import is slow, and nothing can be captured before it.
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if proxies is None or not _dispatches_to_python():
        return None
    proxy_mode = getattr(proxies, "get_proxy_mode", None)
    if proxy_mode is None:
        raise RuntimeError(
            f"routing: PyTorch {torch.__version__} does not tell whether calls are captured "
            "(torch.fx.experimental.proxy_tensor.get_proxy_mode), so a scope cannot keep its "
            "attributes out of a program. Use a version of PyTorch that the documentation lists "
            "as tested, or pass the attributes to the layer, layer(x, attributes)."
        )
    return proxy_mode()


def exporting() -> bool:
    """Whether this thread's calls become a program that runs without Python.

    ``torch.export`` makes such programs, what builds on it (``torch.onnx``, AOTInductor), and
    ``torch.jit.trace``. Programs of ``torch.compile`` and ``make_fx`` run with this package.
    """
    return _exporting(torch.compiler.is_dynamo_compiling())


@constant_for_dynamo  # as _program_capture
def _exporting(in_dynamo: bool) -> bool:
    if getattr(torch._C, "_get_tracing_state", torch.jit.is_tracing)():
        return True
    # PyTorch says in all threads that one of them exports.
    return torch.compiler.is_exporting() and (in_dynamo or _dispatches_to_python())


def assert_in_program(condition: Tensor, message: str) -> None:
    """Makes a program that is being captured raise an error if ``condition`` is false when it runs.

    An exporter to ONNX omits this check, and so does a PyTorch that no longer has the operator. An
    error that must not pass in silence needs a second protection.
    """
    check = getattr(torch, "_assert_async", None)
    if check is not None and not torch.onnx.is_in_onnx_export():
        check(condition, message)


def _dispatches_to_python() -> bool:
    """Whether any mode sees this thread's calls, unlike one of an export in another thread.

    The modes of an export are in a list that all threads share. If PyTorch no longer tells, they
    count in each thread.
    """
    included = getattr(torch._C, "_dispatch_tls_is_dispatch_key_included", None)
    keys = getattr(torch._C, "DispatchKey", None)
    if included is None or keys is None:
        return True
    return included(keys.PreDispatch) or included(keys.Python)


def operators_are_seen() -> bool:
    """Whether anything sees the operators that this thread calls.

    It may be ``torch.jit.trace``, a dispatch mode (fake tensors, ``make_fx``, FLOP counters) or
    torch.func. If PyTorch no longer tells, the operators count as seen.
    """
    included = getattr(torch._C, "_dispatch_tls_is_dispatch_key_included", None)
    keys: Any = getattr(torch._C, "DispatchKey", None)
    front = getattr(keys, "FuncTorchDynamicLayerFrontMode", None)
    if included is None or front is None:
        return True
    # Not by _dispatches_to_python, which would look all of them up again: every operator asks.
    modes = included(front) or included(keys.PreDispatch) or included(keys.Python)
    return modes or torch.jit.is_tracing()


# Whether ``autograd.grad(is_grads_batched=True)`` runs over a tensor; unknown counts as yes.
is_batched: Callable[[Tensor], bool] = getattr(
    getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", lambda tensor: True
)


def function_of_operator(operator: Any) -> Callable[..., Any]:
    """The Python function of which a ``torch.library.custom_op`` was made.

    If PyTorch has it under another name, this is the operator itself, which costs more time.
    """
    function: Callable[..., Any] = getattr(operator, "_init_fn", operator)
    return function


def known_while_compiling(condition: bool) -> bool:
    """Whether a condition on open sizes holds for all of them, without a new guard.

    If PyTorch no longer tells, nothing is known.
    """
    try:
        from torch.fx.experimental.symbolic_shapes import statically_known_true
    except ImportError:
        return False
    return statically_known_true(condition)


def stop_being_lazy(module: nn.Module) -> None:
    """Removes the hooks by which a ``LazyModuleMixin`` waits for its first input, if it has them.

    If PyTorch has them under other names they stay, and each call checks its input twice.
    """
    for name in ("_initialize_hook", "_load_hook"):
        if (hook := vars(module).pop(name, None)) is not None:
            hook.remove()


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a forward hook, of this module or of all, sees what it is given or returns.

    If PyTorch has the hooks under other names, the answer is yes.
    """
    everybodys = nn.modules.module
    return bool(
        getattr(everybodys, "_global_forward_hooks", True)
        or getattr(everybodys, "_global_forward_pre_hooks", True)
        or getattr(module, "_forward_hooks", True)
        or getattr(module, "_forward_pre_hooks", True)
    )


def drop_forward_hooks(module: nn.Module) -> None:
    """Removes all forward hooks of a module and of the modules in it.

    If PyTorch has them under other names they stay.
    """
    for part in module.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            getattr(part, name, {}).clear()
