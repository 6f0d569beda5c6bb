"""Solutions for 8-bit values: rounded once, refitted, and packed as they were found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import macko_jax
from dsf_jax.solvers.problem import Problem, relative_output_error
from dsf_jax.solvers.pruners import prune_problem
from dsf_jax.solvers.rounding import round_rows, round_solution
from dsf_jax.solvers.solution import Factorization
from macko_jax.format import quantization
from tests.dsf_cases import real_layer

FLOAT16 = np.dtype("float16")


def nearly_factored():
    """A matrix near the product of two sparse factors, with a real layer's Gram matrix."""
    rng = np.random.default_rng(0)
    left, right = (
        rng.standard_normal(shape) * (rng.random(shape) < 0.3) for shape in ((64, 96), (96, 128))
    )
    noise = 0.03 * np.abs(left @ right).mean() * rng.standard_normal((64, 128))
    gram = real_layer("l0.query")[1][:128, :128]
    problem = Problem.of((left @ right + noise).astype(np.float32), gram)
    left, right = (jnp.asarray(factor, jnp.float32) for factor in (left, right))
    return problem, Factorization(left, right, "dsf", problem.error(left @ right), {})


@pytest.mark.slow
@pytest.mark.parametrize("held", ["float16", "bfloat16"])
def test_second_factor_makes_up_for_the_rounding_of_the_first(held):
    problem, pair = nearly_factored()
    as_held = [factor.astype(held).astype(jnp.float32) for factor in pair.factors]
    error = problem.error(as_held[0] @ as_held[1])
    found = round_solution(problem, pair, "int8", np.dtype(jnp.dtype(held)))
    plain = [
        quantization.dequantize(*quantization.quantize(factor.astype(held), "int8"))
        for factor in pair.factors
    ]
    rounded = problem.error(plain[0].astype(jnp.float32) @ plain[1].astype(jnp.float32))
    assert found.relative_error < rounded
    assert found.relative_error < 1.06 * error
    for before, after in zip(pair.factors, found.factors):
        assert not np.any((before == 0) & (after != 0))  # the masks stay
        matrix = macko_jax.compress(after.astype(held), dtype="int8")
        stored = macko_jax.decompress(matrix).astype(jnp.float32)
        np.testing.assert_array_equal(stored, after.astype(held).astype(jnp.float32))
        values = quantization.quantize(np.asarray(after.astype(held)), "int8")
        exact = values[0].astype(np.float32) * values[1].astype(np.float32)[:, None]
        np.testing.assert_array_equal(exact, after)
    np.testing.assert_allclose(
        found.relative_error, relative_output_error(problem.weight, found.product(), problem.gram)
    )


@pytest.mark.slow
def test_one_matrix_is_rounded_with_its_inputs_in_view():
    problem, _ = nearly_factored()
    pruned = prune_problem(problem, "wanda", density=0.4)
    found = round_solution(problem, Factorization(pruned, None, "wanda", 0.0, {}), "int8", FLOAT16)
    assert found.right is None
    nearest = quantization.settle(pruned.astype(jnp.float16), "int8")
    change, plain = (np.asarray(other - pruned, np.float64) for other in (found.left, nearest))
    loss = [np.trace(each @ np.asarray(problem.gram) @ each.T) for each in (change, plain)]
    assert loss[0] < 0.85 * loss[1]  # 0.77 is found
    assert not np.any((pruned == 0) & (found.left != 0))
    matrix = macko_jax.compress(found.left.astype(jnp.float16), dtype="int8")
    np.testing.assert_array_equal(macko_jax.decompress(matrix), found.left.astype(jnp.float16))
    np.testing.assert_allclose(
        found.relative_error, relative_output_error(problem.weight, found.left, problem.gram)
    )


@pytest.mark.parametrize("dtype", quantization.NAMES)
def test_rows_are_rounded_with_what_they_are_multiplied_by_in_view(dtype):
    """Beside rounding each entry to the nearest value, also over more than a block of columns."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((24, 150)) * (rng.random((24, 150)) < 0.6)
    matrix[3] = 0
    matrix = matrix.astype(np.float32)
    inputs = rng.standard_normal((400, 20)) @ rng.standard_normal((20, 150))
    inputs += 0.3 * rng.standard_normal(inputs.shape)
    inputs[:, 7] = 0
    gram = (inputs.T @ inputs).astype(np.float32)
    rounded = jax.jit(
        lambda x, s: (
            round_rows(x, s, dtype, FLOAT16),
            quantization.settle(x.astype(jnp.float16), dtype),
        ),
        compiler_options=quantization.COMPILER_OPTIONS,
    )
    found, nearest = (np.asarray(a) for a in rounded(matrix, gram))

    def loss(other):
        change = (other - matrix).astype(np.float64)
        return np.einsum("ij,jk,ik->i", change, gram, change)

    rows = np.delete(np.arange(24), 3)
    assert (loss(found) <= loss(nearest) * (1 + 1e-4)).all()
    assert loss(found)[rows].sum() < 0.3 * loss(nearest)[rows].sum()  # 0.11 and 0.03 are found
    assert not found[matrix == 0].any() and np.isfinite(found).all()
    values, scales = quantization.quantize(found.astype(np.float16), dtype)
    again = values.astype(np.float32) * scales.astype(np.float32)[:, None]
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("dtype", quantization.NAMES)
@pytest.mark.parametrize("held", ["float16", "bfloat16", "float32"])
def test_settled_matrices_are_quantized_without_loss(dtype, held):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((300, 32)) * np.exp(3 * rng.standard_normal((300, 1)))
    weight = jnp.asarray(weight, held)
    settle = jax.jit(
        lambda w: quantization.settle(w, dtype), compiler_options=quantization.COMPILER_OPTIONS
    )
    settled = np.asarray(settle(weight))
    values, scales = quantization.quantize(np.asarray(settled.astype(held)), dtype)
    again = values.astype(np.float32) * scales.astype(np.float32)[:, None]
    tolerance = 2.0**-22 if held == "float32" else 0
    np.testing.assert_allclose(again, settled, rtol=tolerance)
    once = quantization.quantize(np.asarray(weight), dtype)
    once = once[0].astype(np.float32) * once[1].astype(np.float32)[:, None]
    exact = np.asarray(weight, np.float32)
    assert np.linalg.norm(settled - exact) < 1.05 * np.linalg.norm(once - exact)
