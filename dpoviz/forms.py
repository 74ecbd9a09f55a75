"""The two readings of β, the two forms of the loss: which number multiplies h."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    Number = TypeVar("Number", float, Tensor, float | Tensor)

Form = Literal["inverse", "standard"]
FORMS: tuple[Form, ...] = ("inverse", "standard")


def scale(beta: Number, form: Form) -> Number:
    """Return the scale s that multiplies h in the loss.

        s = 1/β (inverse),    s = β (standard)

    Args:
        beta: a positive finite number, or (B,) of them.
        form: "inverse" or "standard".

    Returns:
        A number if `beta` is a number, and (B,) if it is (B,); differentiable in beta.

    Raises:
        ValueError: `form` is neither "inverse" nor "standard", or `beta` is neither a positive finite number nor a
            floating (B,) of them.
    """
    if form not in FORMS:
        raise ValueError(f"form: got {form!r}, expected 'inverse' (s = 1/beta) or 'standard' (s = beta)")
    if isinstance(beta, bool) or not isinstance(beta, Real):
        from dpoviz.validation import require_positive_rows  # imports torch, which plain numbers do not need

        require_positive_rows("beta", beta)  # type: ignore[arg-type]  # what is no tensor is refused there
    elif not 0 < beta < math.inf:
        raise ValueError(f"beta: got {beta!r}, expected a positive finite number or a tensor of shape (B,)")
    return 1 / beta if form == "inverse" else beta
