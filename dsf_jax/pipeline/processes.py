"""What the processes of `jax.distributed` tell each other while they share out layers."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsf_jax.pipeline.solve import LayerSolution


def all_agree(found: bool) -> bool:
    """Whether every process found something; each of them has to ask."""
    if jax.process_count() == 1:
        return found
    return bool(np.all(multihost_utils.process_allgather(np.array(found))))


def share(solution: LayerSolution | None, owner: int) -> LayerSolution:
    """Hands a solution from the process that solved it to all others.

    Args:
      solution: The solution, in the process that solved it; elsewhere it is not looked at.
      owner: Index of that process.

    Returns:
      The solution, in every process.
    """
    mine = solution if jax.process_index() == owner else None
    shapes = np.zeros((3, 3), np.int64)
    numbers = np.zeros(3, np.float64)
    method = np.zeros(128, np.uint8)
    if mine is not None:
        for i, array in enumerate((mine.product, mine.left, mine.right)):
            shapes[i] = 0 if array is None else array.shape
        numbers[:] = mine.nonzeros, mine.error, mine.seconds
        name = mine.method.encode()[: method.size]
        method[: len(name)] = list(name)
    # As bytes, since 64-bit numbers would be rounded on their way through JAX.
    header = (shapes.view(np.uint8).ravel(), numbers.view(np.uint8), method)
    header = _from_owner(header, mine is not None)
    shapes = header[0].view(np.int64).reshape(3, 3)
    nonzeros, error, seconds = header[1].view(np.float64)
    arrays = [np.zeros(shape, np.float32) for shape in shapes]
    if mine is not None:
        held = (mine.product, mine.left, mine.right)
        arrays = [zero if array is None else array for array, zero in zip(held, arrays)]
    product, left, right = _from_owner(arrays, mine is not None)
    return LayerSolution(
        product,
        left if left.size else None,
        right if right.size else None,
        header[2].tobytes().rstrip(b"\0").decode(),
        int(nonzeros),
        float(error),
        float(seconds),
    )


def _from_owner(arrays: tuple | list, is_owner: bool) -> list[np.ndarray]:
    return [np.array(a) for a in multihost_utils.broadcast_one_to_all(arrays, is_owner)]
