"""What PyTorch has but does not promise: every private name that this package calls stands here.

Each was seen in all of PyTorch 2.8 to 2.15. Where one is gone, what needs it takes a
slower road or raises an error that says so. (``lazy.py`` overrides three private methods of
PyTorch's lazy modules, and says there what happens when their names change.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])


def backward_pass() -> int:
    """The number of the backward pass that this thread is at work in, -1 outside of one.

    Raises:
        RuntimeError: PyTorch no longer tells. Guessing would record recomputed calls twice.
    """
    current = getattr(torch._C, "_current_graph_task_id", None)
    if current is None:
        raise RuntimeError(
            f"routing: PyTorch {torch.__version__} does not tell which backward pass a thread is "
            "in (torch._C._current_graph_task_id), so a scope cannot tell a call from its "
            "recompute. Use a version that README.md names, or pass layer(x, attributes)."
        )
    number: int = current()
    return number


def in_functional_derivative(x: Tensor) -> bool:
    """Whether torch.func takes a derivative of what is done with ``x``.

    Where its transforms cannot be told apart any more, all of them count: a tensor inside of one
    has no storage of its own.
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
    active = [level.key() for level in stack() or ()]
    return kinds.Jvp in active or (torch.is_grad_enabled() and kinds.Grad in active)


def has_onednn_linear() -> bool:
    """Whether :func:`onednn_linear` can be called: PyTorch has oneDNN, and its operator."""
    built = bool(torch.backends.mkldnn.is_available())
    return built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x_RI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
    """x·wᵀ + b by oneDNN, whose operator torch.compile's code calls."""
    # It reads a bias as if without gaps.
    b_O = None if b_O is None else b_O.contiguous()
    y_RO: Tensor = torch.ops.mkldnn._linear_pointwise(x_RI, w_OI, b_O, "none", [], "")
    return y_RO


def constant_for_dynamo(function: Function) -> Function:
    """Marks a function of which a compiled graph shall take the result, without tracing it.

    ``torch.compiler.assume_constant_result`` does the same, but imports all of Dynamo and Triton.
    Where Dynamo no longer reads the mark, it traces the function, or breaks the graph there.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_for_dynamo  # which, up to PyTorch 2.11, it cannot trace
def has_autocast(device: str) -> bool:
    """Whether PyTorch's autocast knows this type of device."""
    return torch.amp.is_autocast_available(device)


def program_capture() -> object:
    """What is turning this thread's calls into a program, None if nothing is.

    ``torch.jit.trace``, ``make_fx`` and, through them, ``torch.export`` and ONNX. One capture is
    told from another by ``is``. ``torch.compile`` is none: what its program has read is guarded.

    Raises:
        RuntimeError: calls may be captured, and PyTorch no longer tells.
    """
    return _program_capture(torch.compiler.is_dynamo_compiling())


@constant_for_dynamo  # which up to PyTorch 2.11 takes is_exporting() to be true for torch.compile
def _program_capture(in_dynamo: bool) -> object:
    if in_dynamo:
        return "torch.export" if torch.compiler.is_exporting() else None
    if trace := getattr(torch._C, "_get_tracing_state", torch.jit.is_tracing)():
        return trace
    # It is slow to import, and before it is nothing can be captured.
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if proxies is None or not _dispatches_to_python():
        return None
    proxy_mode = getattr(proxies, "get_proxy_mode", None)
    if proxy_mode is None:
        raise RuntimeError(
            f"routing: PyTorch {torch.__version__} does not tell whether calls are captured "
            "(torch.fx.experimental.proxy_tensor.get_proxy_mode), so a scope cannot keep its "
            "attributes out of a program. Use a version that README.md names, or pass "
            "layer(x, attributes)."
        )
    return proxy_mode()


def exporting() -> bool:
    """Whether this thread's calls are being made into a program that leaves Python.

    By ``torch.export``, or what goes by it (``torch.onnx``, AOTInductor), or ``torch.jit.trace``.
    ``torch.compile`` and ``make_fx`` make programs that stay where this package is.
    """
    return _exporting(torch.compiler.is_dynamo_compiling())


@constant_for_dynamo  # as _program_capture
def _exporting(in_dynamo: bool) -> bool:
    if getattr(torch._C, "_get_tracing_state", torch.jit.is_tracing)():
        return True
    # All threads are told that one exports.
    return torch.compiler.is_exporting() and (in_dynamo or _dispatches_to_python())


def assert_in_program(condition: Tensor, message: str) -> None:
    """Makes a program that is being captured raise unless ``condition`` holds when it runs.

    Exporters to ONNX leave it out, and the programs of PyTorch's that no longer has it are
    without: what must not pass in silence needs a second hindrance.
    """
    check = getattr(torch, "_assert_async", None)
    if check is not None and not torch.onnx.is_in_onnx_export():
        check(condition, message)


def _dispatches_to_python() -> bool:
    """Whether any mode can see this thread's calls: one of an export in another thread cannot.

    The modes of an export stand in a list that all threads share. Where PyTorch cannot be asked
    any more, they count in each of them.
    """
    included = getattr(torch._C, "_dispatch_tls_is_dispatch_key_included", None)
    keys = getattr(torch._C, "DispatchKey", None)
    if included is None or keys is None:
        return True
    return included(keys.PreDispatch) or included(keys.Python)


def operators_are_seen() -> bool:
    """Whether anything sees this thread's operators as they are called.

    ``torch.jit.trace``, dispatch modes (fake tensors, ``make_fx``, FLOP counters) or torch.func.
    Where PyTorch cannot be asked any more, they count as seen.
    """
    included = getattr(torch._C, "_dispatch_tls_is_dispatch_key_included", None)
    front = getattr(getattr(torch._C, "DispatchKey", None), "FuncTorchDynamicLayerFrontMode", None)
    if included is None or front is None or included(front):
        return True
    return _dispatches_to_python() or torch.jit.is_tracing()


def is_batched(tensor: Tensor) -> bool:
    """Whether ``autograd.grad(is_grads_batched=True)`` runs over it; unknown counts as yes."""
    functorch = getattr(torch._C, "_functorch", None)
    asked = getattr(functorch, "is_legacy_batchedtensor", None)
    return True if asked is None else bool(asked(tensor))


def function_of_operator(operator: Any) -> Callable[..., Any]:
    """The Python function that a ``torch.library.custom_op`` was made of.

    Where PyTorch keeps it under another name, the operator itself, which costs more time.
    """
    function: Callable[..., Any] = getattr(operator, "_init_fn", operator)
    return function


def known_while_compiling(condition: bool) -> bool:
    """Whether a condition on open sizes holds for all of them; no new guard comes of asking.

    Where PyTorch cannot be asked any more, nothing is known.
    """
    try:
        from torch.fx.experimental.symbolic_shapes import statically_known_true
    except ImportError:
        return False
    return statically_known_true(condition)


def stop_being_lazy(module: nn.Module) -> None:
    """Removes the hooks by which a ``LazyModuleMixin`` waits for its first input, if it has them.

    Where PyTorch keeps them under other names they stay, and each call checks its input twice.
    """
    for name in ("_initialize_hook", "_load_hook"):
        if (hook := vars(module).pop(name, None)) is not None:
            hook.remove()


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a forward hook, the module's or everybody's, sees what the module returns.

    Where PyTorch keeps them under other names, one counts as there.
    """
    everybodys = getattr(nn.modules.module, "_global_forward_hooks", True)
    return bool(getattr(module, "_forward_hooks", True)) or bool(everybodys)


def drop_forward_hooks(module: nn.Module) -> None:
    """Removes the forward hooks of a module and of all in it, whoever has registered them.

    Where PyTorch keeps them under other names they stay.
    """
    for part in module.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            getattr(part, name, {}).clear()
