"""Compression of a whole Flax model, layer by layer in the order of its data flow."""

import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from dsf_jax.pipeline.pace import Pace, Task, compile_seconds
from dsf_jax.pipeline.plan import Plan, check_grams, order_stages, plan_layers, share_budget
from dsf_jax.pipeline.processes import all_agree, share
from dsf_jax.pipeline.report import LayerReport, Progress, Report
from dsf_jax.pipeline.resume import WorkDirectory, fingerprint
from dsf_jax.pipeline.rules import Rules
from dsf_jax.pipeline.settings import Calibration, Execution, check_choice, read_settings
from dsf_jax.pipeline.solve import (
    Assignment,
    LayerSolution,
    check_method,
    fit_to_dense,
    solve,
    stack_limit,
)
from dsf_jax.solvers.problem import check_density
from dsf_jax.solvers.rounding import check_values
from dsf_jax.trace.batches import TokenWeights, read_batches
from dsf_jax.trace.calibration import CalibrationPass
from dsf_jax.trace.jaxprs import Device
from dsf_jax.trace.network import Network, read_network


class Compressed(NamedTuple):
    """A compressed model (for linen, its variables) and what became of each layer."""

    model: Any
    report: Report


def compress_model(
    model: nnx.Module | nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "dsf",
    density: float = 0.5,
    rules: Rules = (),
    options: Mapping[str, Any] | None = None,
    budget: Literal["uniform", "sensitivity"] = "uniform",
    values: str | None = None,
    calibration: Calibration | None = None,
    execution: Execution | None = None,
    variables: Any = None,
    rngs: Any = None,
    forward: Callable[[Any, Any], Any] | None = None,
    token_weights: TokenWeights = None,
    callback: Callable[[Progress], None] | None = None,
    **former: Any,
) -> Compressed:
    """Prunes or factorizes the layers of a Flax model, calibrated on batches of its inputs.

    Each layer's matrix W is replaced so that tr((V - W) G (V - W)^T) is small, where G is the Gram
    matrix of the inputs that the layer sees once all layers before it are compressed. Which layers
    come before which is read off the traced forward pass. The pass of each batch is halted before
    each stage, the layers whose inputs are then final (q, k and v; gate and up), and goes on with
    the new weights: the whole costs one forward pass, and no product runs twice, plus n in^2
    multiplications per distinct layer input of n rows. A layer whose inputs are all zero is pruned
    by magnitude, or factorized as if its inputs were alike, and the report says so.

    Args:
      model: An `nnx.Module`, or a linen module together with `variables`; it is left as it is.
      batches: Calibration inputs, pytrees of arrays. What is no array in one, such as a flag, a
        string, a number or None, stays fixed while the model is traced.
      method: "magnitude", "wanda", "sparsegpt", "admm", "dsf" or "dsf-published"; see `METHODS`.
      density: Kept non-zeros over out * in of each layer; for a factor pair both factors'.
      rules: `Rule`s, or regular expressions, by module path; the first that matches a whole path
        applies. Embeddings, the output head, adapters of low rank and depthwise convolutions are
        left alone unless a rule without `skip` names them. A layer that alone makes an output of
        the model is its head where the output is as wide as the vocabulary of an embedding, or
        where it has one of the usual names (`rules.HEAD`); of others the report says that they make
        the output.
      options: Further keyword arguments of the method, such as dict(pattern="2:4"): for pruning
        those of `prune`, for "dsf" the fields of `Options`.
      budget: "uniform" gives each layer `density`; "sensitivity" shares `density` of all layers'
        entries so that the sum of their relative output errors, probed by Wanda on the dense
        model's inputs, is least. It helps where layers differ much; on the byte-level language
        model of the examples it was no better than uniform. A density in a rule stays.
      values: "int8" or "float8_e4m3fn" where the model is to be packed with such values: each
        layer's values are rounded to them, with a scale for every row, and the second factor of a
        pair is refitted to the rounding of the first (`dsf_jax.solvers.rounding`). The arrays stay
        of their type, errors in the report are those after rounding, and `pack` with the same
        `values` stores what was found here. None rounds nothing.
      calibration: What the layers are fitted to; None means `Calibration()`.
      execution: Where the work is done; None means `Execution()`. The result does not depend on it.
      variables: Variables of a linen module.
      rngs: Random keys that a linen module draws from, by name, as in `module.apply`; the same for
        every batch.
      forward: `forward(model, batch)`; default `model(batch)`, `model(*batch)` for a tuple,
        `model(**batch)` for a dict. NNX models run in evaluation mode; a linen module is bound.
      token_weights: Where each batch has the weights of its tokens, such as a mask that is 0 for
        padding: a key of a dict, a position in a tuple, or a function of the batch. With weights w
        `[*tokens]`, the leading axes of layers' inputs, G is sum w x x^T, so that Wanda's norms
        and the errors in the report count no padding either. The report says where inputs are not
        one for each token. None lets all count alike.
      callback: Called with a `Progress` after each layer; `print_progress` prints it.
      **former: Fields of `Calibration` and `Execution` in their former place, with a
        DeprecationWarning.

    Returns:
      `Compressed(model, report)`: a new model. A pruned matrix has zeros in the kernel it was; a
      factor pair is a `FactorPair` (linen: a `FactorizedKernel`, see `factorized_kernels`).
      `dsf_jax.pack` turns either into MACKO matrices.

    Raises:
      TypeError: The model, a rule or a keyword is not of a kind that is known.
      ValueError: An argument cannot be served, a rule matches nothing, or weights or activations
        are NaN or infinite; the message names the layer. But for activations, all of it is said
        before anything is computed.
      FloatingPointError: A method came to NaN.

    References:
      Layer-sequential calibration: SparseGPT, arXiv 2301.00774, and Double Sparse Factorization,
      arXiv 2409.18850.
    """
    began = time.perf_counter()
    calibration, execution = read_settings(calibration, execution, former)
    check_method(method)
    check_density(density)
    check_choice("budget", budget, ("uniform", "sensitivity"))
    check_values(values)
    network = read_network(model, variables, forward, rngs)
    batches = read_batches(batches, token_weights)
    keep, local = execution.keep_activations, execution.local
    present = CalibrationPass(network, batches, keep, local)
    plan = plan_layers(present, rules, Assignment(method, density, dict(options or {}), values))
    stages = order_stages(present, list(plan.assignments), calibration)
    grams = None
    if calibration.grams is not None:
        grams = check_grams(calibration.grams, present, list(plan.assignments))
    if budget == "sensitivity":
        plan = share_budget(plan, present, grams, density)
    directory = None
    if execution.work_dir is not None:
        settings = {
            "assignments": {path: dataclasses.asdict(a) for path, a in plan.assignments.items()},
            "calibration": calibration.mode,
            "target": calibration.target,
            "blocks": calibration.blocks,
            "paths": network.paths,
            "fixed": [batch.static for batch in batches],
        }
        if execution.work_key is None:
            data = [(batch.arrays, batch.token_weights) for batch in batches]
            mark = fingerprint(settings, network.leaves, data, grams)
        else:
            mark = fingerprint(settings | {"key": execution.work_key})
        directory = WorkDirectory(execution.work_dir, mark)
    sequential = calibration.mode == "sequential"
    dense = None
    if sequential and calibration.target == "dense":
        dense = CalibrationPass(network, batches, keep, local)
        dense.start(present.stages)
    run = _Run(present, dense, grams, plan, execution.solvers, directory, callback, stages)
    for done, paths in enumerate(stages):
        run.solve_stage(paths, done if sequential else None)
    layers = sorted(run.reports, key=lambda layer: present.index[layer.path])
    listed_bytes = sum(entry.bytes_before for entry in (*layers, *plan.others))
    report = Report(
        layers=tuple(layers),
        other_bytes=sum(getattr(leaf, "nbytes", 0) for leaf in network.leaves) - listed_bytes,
        others=plan.others,
        stages=len(stages),
        seconds=time.perf_counter() - began,
    )
    return Compressed(_assemble(network, present, run.leaves, run.pairs), report)


class _Run:
    """The stages of one call: the leaves as they now are, and what was solved.

    Args:
      present: The pass of the model as it now is.
      dense: The pass of the dense model, where layers are fitted to its outputs.
      grams: Gram matrices that were given.
      plan: What is asked for each layer.
      devices: Devices over which layers are spread.
      directory: Where finished layers are kept.
      callback: Called after each layer.
      stages: Paths of the layers of each stage.
    """

    def __init__(
        self,
        present: CalibrationPass,
        dense: CalibrationPass | None,
        grams: Mapping[str, jax.Array] | None,
        plan: Plan,
        devices: Sequence[Device],
        directory: WorkDirectory | None,
        callback: Callable[[Progress], None] | None,
        stages: Sequence[Sequence[str]],
    ):
        self.present, self.dense, self.grams = present, dense, grams
        self.plan, self.assignments, self.devices = plan, plan.assignments, devices
        self.directory, self.callback = directory, callback
        self.leaves = list(present.network.leaves)
        self.pairs: dict[str, LayerSolution] = {}
        self.reports: list[LayerReport] = []
        self.pace = Pace([self._tasks(paths) for paths in stages])

    def solve_stage(self, paths: Sequence[str], done: int | None) -> None:
        """Solves the layers of a stage, or reads them back, and puts them into the leaves.

        Args:
          paths: The layers.
          done: How many stages are done, for the passes to advance to; None for one pass only.
        """
        began, compiled = time.perf_counter(), compile_seconds()
        if done is not None:
            self.present.advance(done, self.leaves)
            if self.dense is not None:
                self.dense.advance(done, self.present.network.leaves)
        missing = []
        for path in paths:
            solution = None if self.directory is None else self.directory.load(path)
            # All processes must agree on what is left to do.
            if self.directory is not None and not all_agree(solution is not None):
                solution = None
            if solution is None:
                missing.append(path)
            else:
                self._take(path, solution, resumed=True)
        grams, cross = self._inputs(missing)
        self.pace.calibrated(time.perf_counter() - began, compile_seconds() - compiled)
        for path, solution in self._solve(missing, grams, cross):
            self._take(path, solution, resumed=False)

    def _inputs(self, paths: Sequence[str]) -> tuple[dict, dict]:
        """Gram matrices of layers' inputs and, for a dense target, their cross products."""
        paths = [path for path in paths if self.present.layer(path).uses]
        if not paths:
            return {}, {}
        if self.grams is not None:
            grams = {path: self.grams[path] for path in paths}
        else:
            grams = self.present.grams(paths, self.leaves)
        if self.dense is None:
            return grams, {}
        return grams, self.present.cross_grams(paths, self.leaves, self.dense)

    def _solve(
        self, paths: Sequence[str], grams: Mapping[str, jax.Array], cross: Mapping[str, jax.Array]
    ) -> Iterator[tuple[str, LayerSolution]]:
        """Solves layers, each on the device that it falls to."""
        owner = self._deal(paths)

        def task(alike: Sequence[str]) -> Iterable[tuple[str, LayerSolution]]:
            weights = {}
            for path in alike:
                layer = self.present.layer(path)
                weights[path] = layer.read(self.leaves[layer.leaf])
                if path in cross:
                    weights[path] = fit_to_dense(weights[path], grams[path], cross[path])
            held = self.leaves[self.present.layer(alike[0]).leaf].dtype
            solutions = solve(weights, grams, self.assignments[alike[0]], owner[alike[0]], held)
            if self.directory is not None:
                for path in alike:
                    self.directory.save(path, solutions[path])
            return solutions.items()

        every = self._alike(paths, owner)
        here = jax.process_index()
        stacks = [alike for alike in every if owner[alike[0]].process_index == here]
        if len(self.devices) == 1:
            yield from itertools.chain.from_iterable(map(task, stacks))
            return
        with concurrent.futures.ThreadPoolExecutor(len(self.devices)) as pool:
            solved = itertools.chain.from_iterable(pool.map(task, stacks))
            if jax.process_count() == 1:
                yield from solved
                return
            solutions = dict(solved)
        for path in paths:
            yield path, share(solutions.get(path), owner[path].process_index)

    def _deal(self, paths: Sequence[str]) -> dict[str, Device]:
        """The device of each layer: from the largest on, the one that has least to do so far."""
        owner, load = {}, dict.fromkeys(self.devices, 0.0)
        for path in sorted(paths, key=lambda path: -self._work(path)):
            owner[path] = min(self.devices, key=load.__getitem__)
            load[owner[path]] += self._work(path)
        return owner

    def _alike(self, paths: Sequence[str], owner: Mapping[str, Device]) -> list[list[str]]:
        """The paths, those together that a device solves faster in one program."""
        stacks: list[list[str]] = []
        open_stacks: dict[tuple, list[str]] = {}
        for path in paths:
            layer, device = self.present.layer(path), owner[path]
            room = stack_limit(self.assignments[path], layer, device)
            held = self.leaves[layer.leaf].dtype
            key = (layer.rows, layer.cols, held, repr(self.assignments[path]), device)
            if room < 2 or len(open_stacks.get(key, ())) % room == 0:
                open_stacks[key] = []
                stacks.append(open_stacks[key])
            open_stacks[key].append(path)
        return stacks

    def _work(self, path: str) -> float:
        layer = self.present.layer(path)
        return layer.groups * self.assignments[path].solver.work((layer.rows, layer.cols))

    def _tasks(self, paths: Sequence[str]) -> dict[str, Task]:
        """The layers of a stage as the estimate of the time left sees them."""
        tasks = {}
        for path, device in self._deal(paths).items():
            layer, asked = self.present.layer(path), self.assignments[path]
            program = (layer.rows, layer.cols, asked.method, repr(asked.options), device)
            tasks[path] = Task(asked.method, program, self._work(path), device)
        return tasks

    def _take(self, path: str, solution: LayerSolution, resumed: bool) -> None:
        """Puts a solution into the leaves and reports it."""
        layer = self.present.layer(path)
        self.leaves[layer.leaf] = layer.write(
            self.leaves[layer.leaf], jnp.asarray(solution.product)
        )
        if solution.left is not None:
            self.pairs[path] = solution
        shape = (layer.rows, layer.cols)
        itemsize = self.leaves[layer.leaf].dtype.itemsize
        kept = sum(factor.size for factor in solution.factors)
        self.reports.append(
            LayerReport(
                path,
                layer.kind,
                shape if layer.groups == 1 else (layer.groups, *shape),
                solution.nonzeros,
                layer.size * itemsize,
                kept * itemsize,
                self.plan.note(path),
                method=solution.method,
                inner=None if solution.left is None else solution.left.shape[-1],
                error=solution.error,
                seconds=solution.seconds,
                compile_seconds=solution.compile_seconds,
                resumed=resumed,
            )
        )
        if resumed:
            self.pace.resumed(path)
        else:
            self.pace.solved(path, solution.seconds, solution.compile_seconds)
        if self.callback is not None:
            total = len(self.assignments)
            self.callback(
                Progress(len(self.reports), total, self.reports[-1], self.pace.seconds_left())
            )


def _assemble(
    network: Network,
    flow: CalibrationPass,
    leaves: Sequence[jax.Array],
    pairs: Mapping[str, LayerSolution],
) -> Any:
    """The model with its new leaves, and factor pairs in the place of the layers they solve."""
    by_leaf: dict[int, dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]] = {}
    for path, solution in pairs.items():
        layer = flow.layer(path)
        assert solution.left is not None and solution.right is not None
        by_leaf.setdefault(layer.leaf, {})[layer.stack] = solution.left, solution.right
    factors = {}
    for leaf, members in by_leaf.items():
        # Slices of one stack may differ in their inner dimension: zeros fill up the narrow ones.
        inner = max(left.shape[-1] for left, _ in members.values())
        stack = tuple(1 + max(indices) for indices in zip(*members))
        first_left, first_right = next(iter(members.values()))
        groups, rows, _ = first_left.shape
        lefts = np.zeros((*stack, groups, rows, inner), np.float32)
        rights = np.zeros((*stack, groups, inner, first_right.shape[-1]), np.float32)
        for index, (left, right) in members.items():
            own = left.shape[-1]
            lefts[(*index, ..., slice(own))] = left
            rights[(*index, slice(None), slice(own))] = right
        factors[leaf] = jnp.asarray(lefts), jnp.asarray(rights)
    return network.substitute(leaves, factors)
