"""Makes ``from_pretrained`` of Hugging Face's transformers draw the weights that are missing.

That function builds a model on "meta" and loads the checkpoint. Parameters that the checkpoint
lacks get memory with arbitrary numbers. Then it draws the weights of the modules that it knows, and
sets ``_is_hf_initialized`` of every module. It does not know the layers of this package, so a layer
draws its missing weights when that attribute is set.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

# Names of parameters in older checkpoints. lazy.py renames them for load_state_dict.
FORMER_NAMES = {"b1_EH": "w1_bias", "b2_ED": "w2_bias", "b_A2E": "bias"}


class Pretrained(nn.Module):
    """Draws the parameters that a checkpoint lacks, when transformers loads the model around it."""

    # If the MLP was on "meta" when it was copied, the values can only come from a checkpoint.
    _copied_on_meta = False
    _has_values = True

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None: ...

    @property
    def _is_hf_initialized(self) -> bool:
        """Whether the parameters have values, so that transformers does not draw them."""
        return self._has_values

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        # transformers replaces the functions of nn.init by its own, which do not change what was
        # loaded. Before transformers 5 it did not, and what was loaded was not known.
        if value and not self._has_values and _is_replaced(nn.init.uniform_):
            self._draw_missing()
        self._has_values = value

    def _expect_values(self) -> None:
        """Notes whether it has an effect to draw the parameters, before that happens first."""
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
                "was replaced. Load the model with its MLPs first, and then swap them: model = "
                "from_pretrained(...); swap_mlps(model, ..., upcycle=True)."
            )
        if missing and all(name.endswith("bias") for name in missing):
            raise RuntimeError(
                f"from_pretrained: the checkpoint has the weights of a {type(self).__name__}, but "
                f"no {', '.join(missing)}. In older checkpoints the biases have other names. "
                f"Rename them by from_pretrained(..., key_mapping={FORMER_NAMES})."
            )
        self.reset_parameters()


def _is_replaced(function: object) -> bool:
    return getattr(function, "__module__", "") != "torch.nn.init"
