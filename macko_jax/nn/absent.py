"""What stands for the kernel of a layer that no longer has one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NoReturn

import numpy as np


@dataclasses.dataclass(frozen=True)
class AbsentKernel:
    """The shape and dtype of a kernel that is packed or factorized, without its numbers.

    Models read `layer.kernel.shape` in their forward pass, and get it. Whoever asks for more is
    told what there is in the kernel's place.

    Attributes:
        shape: of the kernel in one layer, without the axes of a stack.
        dtype: of the values that stand for it.
        message: what there is in its place.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    message: str

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(self.message)

    def __getitem__(self, index: Any) -> NoReturn:
        raise AttributeError(self.message)

    def __array__(self, *args, **kwargs) -> NoReturn:
        raise TypeError(self.message)

    def __jax_array__(self) -> NoReturn:
        raise TypeError(self.message)
