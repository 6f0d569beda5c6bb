"""Products together with what a transformer's block does around them, for decoding.

A decode step multiplies one vector by each matrix, in microseconds. The norm before a projection,
the gate before the last one and the sum with the residual stream after it are tiny, but each costs
the start of a kernel of its own; and so does the next product. On CUDA one kernel does a product
with all of that, or a chain of them; everywhere else, and for more than one vector, they are the
same operations one after the other.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from macko_jax.format.promotion import own_promotion
from macko_jax.format.sharded import Matrix, ShardedMatrix
from macko_jax.gpu.kernel import Fusion, Problem, problem_of
from macko_jax.ops import sharded
from macko_jax.ops.activations import rms_norm, swiglu
from macko_jax.ops.mesh import spread, vary_alike, without_varying
from macko_jax.ops.primitive import define_impl, multiply


class Step(NamedTuple):
    """One product of a chain, add + A f(x), with x the result of the step before.

    Attributes:
      linear: A, a MackoMatrix or a ShardedMatrix; in `flax_nnx.chain` a MackoLinear.
      norm, gated: as in `fused_spmv`.
      add: as in `fused_spmv`, or the number of an earlier step, from 0, whose result is added.
      kept: whether its result is among those of the chain. The last step's always is.
    """

    linear: Any
    norm: tuple[jax.Array, float] | None = None
    gated: bool = False
    add: jax.Array | int | None = None
    kept: bool = False


def fused_spmv(
    matrix: Matrix,
    x: jax.Array,
    *,
    norm: tuple[jax.Array, float] | None = None,
    gated: bool = False,
    add: jax.Array | None = None,
) -> jax.Array:
    """add + A f(x): a sparse product with a norm or a gate before, and a sum after it.

    f(x) is x / sqrt(mean(x^2) + eps) * scale (RMSNorm, arXiv 1910.07467) where `norm` is given, and
    silu(x[:cols]) * x[cols:] (SwiGLU, arXiv 2002.05202) where `gated`. One 16-bit or float32 vector
    on CUDA takes one kernel, which computes f and the sum in float32; otherwise f(x) is rounded to
    the type of x, the product to its own, as the separate operations do. Differentiable like
    `spmv`.

    Args:
      matrix: A [rows, cols].
      x: [..., cols], or [..., 2 cols] where `gated`.
      norm: (scale [cols], eps).
      gated: whether x holds a gate and what it lets through.
      add: [..., rows], or any shape that broadcasts to it: a residual stream, or a bias.

    Returns:
      [..., rows] in the type of `spmv(matrix, x)`.

    Raises:
      ValueError: both a norm and a gate, or shapes that do not fit.
    """
    step = Step(matrix, norm, gated, add)
    _check(step, x.shape, [])
    if isinstance(matrix, ShardedMatrix):
        return sharded.chain(x, [step], _chain, None)[-1]
    nothing = norm is None and not gated and add is None and matrix.scales is None
    if nothing or not _fits(step, x):
        return _compose(x, step)
    [y] = _one_vector(x, [step])
    return y


def fused_chain(
    x: jax.Array, steps: Sequence[Step], *, blank: jax.Array | None = None
) -> list[jax.Array]:
    """Products of which each takes the result of the one before, as `fused_spmv` computes them.

    On CUDA, one 16-bit vector takes one kernel for all of them, if every matrix has as many rows as
    the GPU has SMs, and rows and columns in whole eights. Differentiable like `spmv`.

    Two chains at once on one GPU can wait for each other for ever; see `macko_jax.experimental`.

    Args:
      x: of the first product.
      steps: the products.
      blank: what the kernel needs to start from: uint16, 0xFFFF everywhere, `blanks(steps)` of
        them. Made here if it is not given; a kernel that runs before can make it for less.

    Returns:
      The results, each [..., rows], of the steps that are `kept`, and of the last.

    Raises:
      ValueError: no steps, both a norm and a gate, or shapes that do not fit.
    """
    if not steps:
        raise ValueError("fused_chain needs at least one step")
    for i, step in enumerate(steps):
        rows = [earlier.linear.shape[0] for earlier in steps[:i]]
        _check(step, (*x.shape[:-1], *rows[-1:]) if i else x.shape, rows)
    needed = blanks(steps)
    if blank is not None and (blank.shape, blank.dtype) != ((needed,), jnp.uint16):
        raise ValueError(
            f"blank has {needed} elements of uint16 here, got {list(blank.shape)} {blank.dtype}"
        )
    if any(isinstance(step.linear, ShardedMatrix) for step in steps):
        return sharded.chain(x, steps, _chain, blank)
    return _chain(x, steps, blank)


def _chain(x, steps, blank=None) -> list[jax.Array]:
    """The results of a chain of matrices that are whole."""
    dtypes = {x.dtype, *(a.dtype for s in steps for a in (s.linear, *_extras(s).values()))}
    if len(steps) > 1 and len(dtypes) == 1 and all(_fits(step, x) for step in steps):
        return _one_vector(x, steps, blank)
    return in_turn(x, steps, _fused_step)


def blanks(steps: Sequence[Step]) -> int:
    """Length of the array `blank` of a chain: one element for every row, but for the last step.

    Of matrices in shards that is all devices' together, and only where one kernel goes on.
    """
    if any(isinstance(step.linear, ShardedMatrix) for step in steps):
        return sharded.blanks(steps)
    return sum(step.linear.shape[0] for step in steps[:-1])


def in_turn(x, steps, apply) -> list:
    """The results of a chain, each by `apply(x, step)`, where `step.add` is an array or None."""
    results = []
    for step in steps:
        if isinstance(step.add, int):
            step = step._replace(add=results[step.add])
        x = apply(x, step)
        results.append(x)
    return [result for step, result in zip(steps[:-1], results) if step.kept] + [x]


def _check(step, x_shape, earlier_rows):
    """Raises ValueError for a step that does not fit x, or the rows of the steps before it."""
    matrix, norm, gated, add, _ = step
    rows, cols = matrix.shape
    if norm is not None and gated:
        raise ValueError("fused_spmv takes a norm or a gate before the product, not both")
    expected = 2 * cols if gated else cols
    if not x_shape or x_shape[-1] != expected:
        raise ValueError(
            f"fused_spmv of a {list(matrix.shape)} matrix takes x of shape [..., {expected}] "
            f"{'with' if gated else 'without'} a gate, got {list(x_shape)}"
        )
    if norm is not None and norm[0].shape != (cols,):
        raise ValueError(
            f"the norm's scale of a {list(matrix.shape)} matrix has shape [{cols}], got "
            f"{list(norm[0].shape)}"
        )
    if isinstance(add, int):
        if not (0 <= add < len(earlier_rows) and earlier_rows[add] == rows):
            raise ValueError(
                f"step {len(earlier_rows)} adds the result of step {add} to {rows} rows; the steps "
                f"before it have {earlier_rows} rows"
            )
    elif add is not None and (add.shape or (1,))[-1] not in (1, rows):
        raise ValueError(
            f"what a {list(matrix.shape)} matrix's product is added to, add [..., {rows}], got "
            f"{list(add.shape)}"
        )


def _fits(step, x) -> bool:
    """Whether the primitive computes the step."""
    matrix, add = step.linear, step.add
    one = math.prod(x.shape[:-1]) == 1
    whole = add is None or isinstance(add, int) or add.size == matrix.shape[0]
    stack = matrix.values.ndim > 1
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    # On a mesh every device has a product of its own, which the primitive `spmv` sees to.
    return one and whole and not stack and floating and not spread([x, *jax.tree.leaves(matrix)])


def _extras(step) -> dict[str, jax.Array]:
    """The operands of a step that come on top of its matrix."""
    extras = {}
    if step.norm is not None:
        extras["scale"] = step.norm[0]
    if step.add is not None and not isinstance(step.add, int):
        extras["add"] = step.add.reshape(1, -1)
    return extras


def _fused_step(x, step):
    return fused_spmv(step.linear, x, norm=step.norm, gated=step.gated, add=step.add)


def _compose(x, step):
    """The operations of one step."""
    if step.norm is not None:
        x = rms_norm(x, *step.norm)
    if step.gated:
        x = swiglu(x)
    y = multiply(step.linear, x)
    if step.add is None:
        return y
    with own_promotion():
        return (step.add + y).astype(y.dtype)


def _one_vector(x, steps, blank=None):
    fusions = tuple(
        Fusion(
            eps=None if step.norm is None else step.norm[1],
            gated=step.gated,
            add=step.add is not None,
            added=step.add if isinstance(step.add, int) else None,
            scaled=step.linear.scales is not None,
            kept=step.kept or i == len(steps) - 1,
        )
        for i, step in enumerate(steps)
    )
    parts = [(step.linear, _extras(step)) for step in steps]
    results = _fused(fusions, x.reshape(1, -1), parts, [] if blank is None else [blank])
    return [y.reshape(*x.shape[:-1], y.shape[1]) for y in results]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fused(fusions, x, parts, blank):
    """The product, or chain, as one operation of JAX; `parts` are (matrix, extras) of each step."""
    operands, tree = jax.tree.flatten((x, parts, blank))
    return _fused_p.bind(*vary_alike(*operands), fusions=fusions, tree=tree)


@_fused.defjvp
def _fused_jvp(fusions, primals, tangents):
    return jax.jvp(functools.partial(_separate, fusions), primals, tangents)


def _separate(fusions, x, parts, blank):
    """The product, or chain, as what it is made of."""
    del blank
    steps = [_step(fusion, part) for fusion, part in zip(fusions, parts)]
    return in_turn(x, steps, _fused_step) if len(steps) > 1 else [_compose(x, *steps)]


def _step(fusion: Fusion, part) -> Step:
    matrix, extras = part
    norm = None if fusion.eps is None else (extras["scale"], fusion.eps)
    return Step(matrix, norm, fusion.gated, extras.get("add", fusion.added), fusion.kept)


def _one_kernel(fusions, x, parts, blank):
    """The same in one kernel, or None where it does not serve."""
    from macko_jax.gpu import chain, spmv, staging

    out_dtype = _out_dtype(x, parts)
    problems = tuple(
        problem_of("spmv", matrix.layout, matrix.values, x, out_dtype, fusion=fusion)
        for fusion, (matrix, _) in zip(fusions, parts)
    )
    if why_no_kernel(*problems) is not None:
        return None
    matrices = [(matrix.values, *matrix.positions) for matrix, _ in parts]
    around = [
        [(extras | {"row_scales": matrix.scales})[name] for name in fusion.operands]
        for fusion, (matrix, extras) in zip(fusions, parts)
    ]
    if len(parts) == 1:
        return [spmv.run(spmv.plan(problems[0]), *matrices[0], x, *around[0])]
    plan = chain.plan(problems)
    exchange = blank[0] if blank else jnp.full(plan.exchanged, staging.BLANK, jnp.uint16)
    operands = [a for arrays in zip(matrices, around) for part in arrays for a in part]
    results = chain.run(plan, exchange, x, *operands)
    return [y[None] for y in results]


def why_no_kernel(*problems: Problem) -> str | None:
    """None if one kernel computes a product with its fusion, or a chain, or the reason why not."""
    from macko_jax.gpu import select
    from macko_jax.ops import self_check

    return select.why_not_fused(problems) or self_check.why_not(*problems)


def _out_dtype(x, parts):
    return functools.reduce(jnp.promote_types, [matrix.dtype for matrix, _ in parts], x.dtype)


def _lower(*operands, on_cuda, fusions, tree):
    arguments = fusions, *jax.tree.unflatten(tree, operands)
    results = _one_kernel(*arguments) if on_cuda else None
    return _separate(*arguments) if results is None else results


def _batch(operands, dims, *, fusions, tree):
    def one(*operands):
        return _separate(fusions, *jax.tree.unflatten(tree, operands))

    results = jax.vmap(one, in_axes=dims)(*operands)
    return results, [0] * len(results)


def _transpose(cotangents, *operands, fusions, tree):
    """Where what is computed is linear, as a product without a norm is in x."""
    linear = [i for i, a in enumerate(operands) if ad.is_undefined_primal(a)]

    def of(*values):
        known = dict(zip(linear, values))
        filled = [known.get(i, a) for i, a in enumerate(operands)]
        return _separate(fusions, *jax.tree.unflatten(tree, filled))

    terms = jax.linear_transpose(of, *(operands[i].aval for i in linear))(
        [ad.instantiate_zeros(c) for c in cotangents]
    )
    known = dict(zip(linear, terms))
    return [known.get(i) for i in range(len(operands))]


def _abstract(*operands, fusions, tree):
    x, parts, _ = jax.tree.unflatten(tree, operands)
    return [
        x.update(shape=(1, matrix.shape[0]), dtype=_out_dtype(x, parts), weak_type=False)
        for fusion, (matrix, _) in zip(fusions, parts)
        if fusion.kept
    ]


_fused_p = Primitive("macko_fused_spmv")
_fused_p.multiple_results = True
define_impl(_fused_p, ("fusions", "tree"))
_fused_p.def_abstract_eval(_abstract)
batching.primitive_batchers[_fused_p] = _batch
ad.primitive_transposes[_fused_p] = _transpose
for _platform in None, "cuda":
    _function = functools.partial(_lower, on_cuda=_platform == "cuda")
    _rule = mlir.lower_fun(_function, multiple_results=True)
    mlir.register_lowering(_fused_p, without_varying(_rule), platform=_platform)
