"""What ``from_pretrained`` of Hugging Face's transformers finds in modules with parameters.

It builds a model on "meta", loads it, and gives the parameters that the checkpoint lacks memory as
it comes. Then it draws those of the modules that it knows, and tells every module so by setting
its ``_is_hf_initialized``. A layer of ours, which it does not know, draws its own when it is told.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

# What from_pretrained must rename in checkpoints of before; lazy.py does for load_state_dict.
FORMER_NAMES = {"b1_EH": "w1_bias", "b2_ED": "w2_bias", "b_A2E": "bias"}


class Pretrained(nn.Module):
    """Draws the parameters that a checkpoint lacks, when transformers loads the model around it."""

    # Of copies of a part that was on "meta" the values can only come from a checkpoint.
    _copied_on_meta = False
    _has_values = True

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None: ...

    @property
    def _is_hf_initialized(self) -> bool:
        """Whether the parameters have values; transformers leaves the module alone then."""
        return self._has_values

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        # While transformers' functions stand in the place of nn.init's, those leave alone what
        # was loaded. Before transformers 5 they did not, and nobody could tell what was.
        if value and not self._has_values and _is_replaced(nn.init.uniform_):
            self._draw_missing()
        self._has_values = value

    def _expect_values(self) -> None:
        """Notes, before the parameters are drawn for the first time, whether that has an effect."""
        on_meta = any(parameter.is_meta for parameter in self.parameters(recurse=False))
        self._has_values = not on_meta and not _is_replaced(nn.init.uniform_)

    def _draw_missing(self) -> None:
        missing = [
            name
            for name, parameter in self.named_parameters(recurse=False)
            if not getattr(parameter, "_is_hf_initialized", False)
        ]
        if missing and self._copied_on_meta:
            raise RuntimeError(
                f"from_pretrained: the checkpoint has no {', '.join(missing)} for a DMoE whose "
                "experts start as an MLP (upcycle=True), and the MLP had no weights yet when it "
                "was replaced. Load the model with its MLPs, then swap: model = "
                "from_pretrained(...); swap_mlps(model, ..., upcycle=True)."
            )
        if missing and all(name.endswith("bias") for name in missing):
            raise RuntimeError(
                f"from_pretrained: the checkpoint has the weights of a {type(self).__name__}, but "
                f"no {', '.join(missing)}. Biases had other names once: rename them, "
                f"from_pretrained(..., key_mapping={FORMER_NAMES})."
            )
        self.reset_parameters()


def _is_replaced(function: object) -> bool:
    return getattr(function, "__module__", "") != "torch.nn.init"
