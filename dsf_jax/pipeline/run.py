"""Compression of a whole Flax model, layer by layer in the order of its data flow."""

import concurrent.futures
import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dsf_jax.nn import layers as flax_layers
from dsf_jax.pipeline.allocation import allocate_densities, probe_errors
from dsf_jax.pipeline.report import LayerReport, Progress, Report
from dsf_jax.pipeline.resume import WorkDirectory, fingerprint
from dsf_jax.pipeline.rules import Rule, Rules, default_skip, match_rules
from dsf_jax.pipeline.solve import Assignment, LayerSolution, check_method, solve, stack_limit
from dsf_jax.solvers.problem import check_density, is_finite
from dsf_jax.trace import stages
from dsf_jax.trace.calibration import CalibrationPass, check_batches
from dsf_jax.trace.dataflow import Layer
from dsf_jax.trace.network import Network, read_network

# Of the mean diagonal of G: keeps a short calibration from being fitted too closely.
CORRECTION_DAMPING = 0.1


class Compressed(NamedTuple):
    """A compressed model (for linen, its variables) and what became of each layer."""

    model: Any
    report: Report


def compress_model(
    model,
    batches: Iterable,
    *,
    method: str = "dsf",
    density: float = 0.5,
    rules: Rules = (),
    options: Mapping[str, Any] | None = None,
    calibration: str = "sequential",
    target: str = "layer",
    blocks: str | None = None,
    budget: str = "uniform",
    keep_activations: str = "device",
    grams: Mapping[str, jax.Array] | None = None,
    variables=None,
    forward: Callable | None = None,
    devices: Sequence[jax.Device] | None = None,
    work_dir=None,
    callback: Callable[[Progress], None] | None = None,
) -> Compressed:
    """Prunes or factorizes the layers of a Flax model, calibrated on batches of its inputs.

    Each layer's matrix W is replaced so that tr((V - W) G (V - W)^T) is small, where G is the Gram
    matrix of the inputs that the layer sees once all layers before it are compressed. Which layers
    come before which is read off the traced forward pass. The pass of each batch is halted before
    each group of layers whose inputs are then final (q, k and v; gate and up), and goes on with the
    new weights: the whole costs one forward pass, and no operation runs twice, plus n in^2
    multiplications per distinct layer input of n rows.

    Args:
      model: An `nnx.Module`, or a linen module together with `variables`; it is left as it is.
      batches: Calibration inputs, pytrees of arrays.
      method: "magnitude", "wanda", "sparsegpt", "admm", "dsf" or "dsf-published"; see `METHODS`.
      density: Kept non-zeros over out * in of each layer; for a factor pair both factors'.
      rules: `Rule`s, or regular expressions, by module path; the first that matches a whole path
        applies. Embeddings, the output head (by its name, `rules.HEAD`) and depthwise convolutions
        are left alone unless a rule without `skip` names them.
      options: Further keyword arguments of the method, such as `pattern="2:4"`.
      calibration: "sequential" as above, or "one-pass": every layer on the inputs that the dense
        model gives it, with all Gram matrices held at once.
      target: What a layer's output is matched to: "layer", what its dense weights give on the
        inputs that it now sees, or "dense", what it gave in the dense model, so that a layer also makes
        up for the errors of those before it: W is replaced by W (C + c I)(G + c I)^-1 first, where
        C = sum x y^T of dense inputs x and present ones y, c = `CORRECTION_DAMPING` of G's mean
        diagonal. Costs a second forward pass, in step with the first.
      blocks: Regular expression; layers whose path begins with a match, and for which the matched
        text is the same, are one group, calibrated together. r"layers/\\d+" halts once per
        transformer block. Costs a second pass through what lies between such layers.
      budget: "uniform" gives each layer `density`; "sensitivity" shares `density` of all layers'
        entries so that the sum of their relative output errors, probed by Wanda on the dense
        model's inputs, is least. It helps where layers differ much; on the byte-level language
        model of the examples it was no better than uniform. A density in a rule stays.
      keep_activations: Where each batch's values wait between groups: "device", "host", or
        "nowhere", which runs every group from the batch again: as many passes as groups.
      grams: Gram matrices as `gram_matrices` gives them, to compress one model in several ways
        without calibrating again; "one-pass" only. Of the batches only the shapes then count.
      variables: Variables of a linen module.
      forward: `forward(model, batch)`; default `model(batch)`, `model(*batch)` for a tuple,
        `model(**batch)` for a dict. NNX models run in evaluation mode; a linen module is bound.
      devices: Devices over which layers are spread; those of other processes of
        `jax.distributed` may be among them, if every process makes the same call (each calibrates
        for itself, and layers are shared out). Default: one. The result does not depend on it.
      work_dir: Directory for finished layers. A run that was killed reads them back and goes on;
        results of another model, batches or settings are refused.
      callback: Called with a `Progress` after each layer; `print_progress` prints it.

    Returns:
      `Compressed(model, report)`: a new model. A pruned matrix has zeros in the kernel it was; a
      factor pair is a `FactorPair` (linen: a `FactorizedKernel`, see `factorized_kernels`).
      `export.pack` turns either into MACKO matrices.

    Raises:
      TypeError, ValueError: Arguments that cannot be served, weights or activations that are NaN
        or infinite (the message names the layer), a rule that matches nothing, a method of two
        factors for a layer that has no such form.

    References:
      Layer-sequential calibration: SparseGPT, arXiv 2301.00774, and Double Sparse Factorization,
      arXiv 2409.18850.
    """
    began = time.perf_counter()
    check_method(method)
    check_density(density)
    _check_choice("calibration", calibration, ("sequential", "one-pass"))
    _check_choice("target", target, ("layer", "dense"))
    _check_choice("budget", budget, ("uniform", "sensitivity"))
    _check_choice("keep_activations", keep_activations, ("device", "host", "nowhere"))
    devices = list(devices or jax.local_devices()[:1])
    network = read_network(model, variables, forward)
    batches = check_batches(batches)
    local = [device for device in devices if device.process_index == jax.process_index()]
    flow = CalibrationPass(network, batches, keep_activations, local or jax.local_devices()[:1])
    chosen, skipped = _assign(flow, rules, Assignment(method, density, dict(options or {})))
    _check_layers(network, flow, chosen)

    if grams is not None:
        grams = _check_grams(grams, flow, chosen, calibration)
    if budget == "sensitivity":
        asked = {path for path, rule in match_rules(rules, chosen).items() if rule and rule.density}
        _share_budget(network, flow, grams, chosen, density, exclude=asked)
    directory = None
    if work_dir is not None:
        settings = {
            "assignments": {path: dataclasses.asdict(a) for path, a in chosen.items()},
            "calibration": calibration,
            "target": target,
            "blocks": blocks,
            "paths": network.paths,
        }
        directory = WorkDirectory(work_dir, fingerprint(settings, network.leaves, batches, grams))

    groups = _order(flow, chosen, blocks, calibration)
    dense = None
    if target == "dense" and calibration == "sequential":
        dense = CalibrationPass(network, batches, keep_activations, flow.devices)
        dense.start(flow.stages)
    run = _Run(network, flow, dense, grams, chosen, devices, directory, callback)
    for stage, paths in enumerate(groups, start=1):
        if calibration == "sequential":
            flow.advance(stage - 1, run.leaves)
            if dense is not None:
                dense.advance(stage - 1, network.leaves)
        run.solve_group(paths)
    layers = sorted(run.reports, key=lambda layer: flow.index[layer.path])
    compressed_bytes = sum(layer.bytes_before for layer in layers)
    report = Report(
        layers=tuple(layers),
        other_bytes=sum(getattr(leaf, "nbytes", 0) for leaf in network.leaves) - compressed_bytes,
        skipped=skipped,
        groups=len(groups),
        seconds=time.perf_counter() - began,
    )
    return Compressed(_assemble(network, flow, run.leaves, run.pairs), report)


class _Run:
    """The loop's state: the leaves as they now are, and what was solved."""

    def __init__(self, network, flow, dense, grams, chosen, devices, directory, callback):
        self.flow, self.dense, self.grams = flow, dense, grams
        self.chosen, self.devices = chosen, devices
        self.directory, self.callback = directory, callback
        self.leaves = list(network.leaves)
        self.pairs: dict[str, LayerSolution] = {}
        self.reports: list[LayerReport] = []
        self.began = time.perf_counter()
        self.solved_work = 0.0
        self.work_left = sum(_work(flow.layer(path)) for path in chosen)

    def solve_group(self, paths):
        missing = []
        for path in paths:
            solution = self._resumed(path)
            if solution is None:
                missing.append(path)
            else:
                self._take(path, solution, resumed=True)
        for path, solution in self._solve(missing):
            self._take(path, solution, resumed=False)

    def _resumed(self, path):
        if self.directory is None:
            return None
        solution = self.directory.load(path)
        if jax.process_count() > 1:  # all processes must agree on what is left to do
            seen = multihost_utils.process_allgather(np.array(solution is not None))
            solution = solution if seen.all() else None
        return solution

    def _solve(self, paths) -> Iterator[tuple[str, LayerSolution]]:
        """Solves the layers of a group, each on the device that it falls to."""
        with_inputs = [path for path in paths if self.flow.layer(path).uses]
        grams, cross = {}, {}
        if self.grams is not None:
            grams = {path: self.grams[path] for path in with_inputs}
        elif with_inputs:
            grams = self.flow.grams(with_inputs, self.leaves)
        if self.dense is not None and with_inputs:
            cross = self.flow.cross_grams(with_inputs, self.leaves, self.dense)
        # Dealt out by size, so that the largest of a group do not meet on one device.
        by_size = sorted(paths, key=lambda path: -_work(self.flow.layer(path)))
        owner = {path: self.devices[i % len(self.devices)] for i, path in enumerate(by_size)}

        def task(alike):
            weights = {}
            for path in alike:
                layer = self.flow.layer(path)
                weights[path] = layer.read(self.leaves[layer.leaf])
                if path in cross:
                    weights[path] = _correct(weights[path], grams[path], cross[path])
            solutions = solve(weights, grams, self.chosen[alike[0]], owner[alike[0]])
            if self.directory is not None:
                for path in alike:
                    self.directory.save(path, solutions[path])
            return solutions.items()

        mine = [path for path in paths if owner[path].process_index == jax.process_index()]
        stacks = self._alike(mine, owner)
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
            yield path, _share(solutions.get(path), owner[path].process_index)

    def _alike(self, paths, owner) -> list[list[str]]:
        """The paths, those together that a device solves faster in one program."""
        stacks = []
        open_stacks = {}
        for path in paths:
            layer, device = self.flow.layer(path), owner[path]
            room = stack_limit(self.chosen[path], layer, device)
            key = (layer.rows, layer.cols, repr(self.chosen[path]), device)
            if room < 2 or len(open_stacks.get(key, ())) % room == 0:
                open_stacks[key] = []
                stacks.append(open_stacks[key])
            open_stacks[key].append(path)
        return stacks

    def _take(self, path, solution, resumed):
        """Puts a solution into the leaves and reports it."""
        layer = self.flow.layer(path)
        self.leaves[layer.leaf] = layer.write(
            self.leaves[layer.leaf], jnp.asarray(solution.product)
        )
        if solution.left is not None:
            self.pairs[path] = solution
        shape = (layer.rows, layer.cols)
        itemsize = self.leaves[layer.leaf].dtype.itemsize
        kept = layer.size
        if solution.left is not None:
            kept = solution.left.size + solution.right.size
        self.reports.append(
            LayerReport(
                path,
                layer.kind,
                shape if layer.groups == 1 else (layer.groups, *shape),
                solution.nonzeros,
                layer.size * itemsize,
                kept * itemsize,
                method=solution.method,
                inner=None if solution.left is None else solution.left.shape[-1],
                error=solution.error,
                seconds=solution.seconds,
                resumed=resumed,
            )
        )
        self.work_left -= _work(layer)
        self.solved_work += 0 if resumed else _work(layer)
        if self.callback is not None:
            spent = time.perf_counter() - self.began
            rate = self.solved_work / spent
            left = self.work_left / rate if rate else None
            total = len(self.chosen)
            self.callback(Progress(len(self.reports), total, self.reports[-1], left))


@jax.jit
def _correct(weights, gram, cross):
    """Weights whose outputs on the present inputs are nearest to the dense model's outputs."""
    size = jnp.trace(gram, axis1=-2, axis2=-1) / gram.shape[-1]
    damping = (CORRECTION_DAMPING * size + 1e-30)[:, None, None] * jnp.eye(gram.shape[-1])
    # The transposed system, since the unknown stands on the left of G.
    right = jnp.matmul(
        weights.astype(jnp.float32), cross + damping, precision=jax.lax.Precision.HIGHEST
    )
    factor = jax.scipy.linalg.cho_factor(gram + damping)
    return jax.scipy.linalg.cho_solve(factor, right.swapaxes(-1, -2)).swapaxes(-1, -2)


def _work(layer: Layer) -> float:
    """Size of a layer's problem in multiplications, up to a factor that all methods share."""
    return float(layer.size) * layer.cols


def _check_choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _assign(flow: CalibrationPass, rules, default: Assignment):
    """What is asked for each layer that is compressed, and why each other one is not."""
    matched = match_rules(rules, [layer.path for layer in flow.layers])
    chosen, skipped = {}, {}
    for layer in flow.layers:
        rule = matched[layer.path]
        reason = f"rule {rule.path!r}" if rule and rule.skip else None
        if rule is None:
            reason = default_skip(layer)
        if reason:
            skipped[layer.path] = reason
            continue
        rule = rule or Rule(".*")
        assignment = Assignment(
            rule.method or default.method,
            rule.density or default.density,
            dict(default.options if rule.options is None else rule.options),
        )
        check_method(assignment.method, layer.path)
        if assignment.solver.gives_pairs and (layer.groups > 1 or layer.stack):
            # Groups and slices share one parameter, so all are pairs or none is.
            assignment = dataclasses.replace(
                assignment, options={**assignment.options, "compare_single": False}
            )
        chosen[layer.path] = assignment
    for leaf, reason in flow.notes.items():
        if all(layer.leaf != leaf for layer in flow.layers):
            skipped[flow.network.module_path(leaf)] = reason
    if not chosen:
        raise ValueError(
            "no layer is left to compress: "
            + ("; ".join(f"{path}: {why}" for path, why in skipped.items()) or "none was found")
        )
    return chosen, skipped


def _check_layers(network: Network, flow: CalibrationPass, chosen):
    """Checks that weights are finite, and that layers asked to become pairs can."""
    paired = {path for path, assignment in chosen.items() if assignment.solver.gives_pairs}
    for path in paired:
        leaf = flow.layer(path).leaf
        slices = {layer.path for layer in flow.layers if layer.leaf == leaf}
        if not slices <= paired:
            raise ValueError(
                f"layer {path!r}: all slices of a stack must become pairs, or none; "
                f"{sorted(slices - paired)} would not"
            )
    for path, assignment in chosen.items():
        layer = flow.layer(path)
        if not is_finite(layer.read(network.leaves[layer.leaf])):
            raise ValueError(f"layer {path!r}: its weights hold NaN or infinity")
        if assignment.solver.gives_pairs:
            reason = _why_no_pair(network, layer)
            if reason:
                raise ValueError(
                    f"layer {path!r}: {reason}; give it a method of one matrix, "
                    f"Rule({path!r}, method='admm'), or Rule({path!r}, skip=True)"
                )


def _check_grams(grams, flow: CalibrationPass, chosen, calibration):
    """Given Gram matrices as `[groups, in, in]`, or a ValueError where they do not fit."""
    if calibration != "one-pass":
        raise ValueError(
            "grams are those of the dense model's inputs: they need calibration='one-pass', got "
            f"{calibration!r}"
        )
    checked = {}
    for path in chosen:
        layer = flow.layer(path)
        if not layer.uses:
            continue
        if path not in grams:
            raise ValueError(
                f"layer {path!r}: grams lacks it; take them from gram_matrices(model, batches), or "
                f"skip the layer by Rule({path!r}, skip=True)"
            )
        wanted = (layer.groups, layer.cols, layer.cols)
        gram = jnp.asarray(grams[path])
        if gram.shape not in (wanted, wanted[1:] if layer.groups == 1 else wanted):
            raise ValueError(f"layer {path!r}: its Gram matrix must be {wanted}, got {gram.shape}")
        checked[path] = gram.reshape(wanted)
    return checked


def _share_budget(network, flow, grams, chosen, density, exclude):
    """Replaces the densities in `chosen` by those of least summed error."""
    paths = [path for path in chosen if path not in exclude]
    if grams is None:
        grams = flow.grams([path for path in paths if flow.layer(path).uses], network.leaves)
    curves, sizes = {}, {}
    for path in paths:
        layer = flow.layer(path)
        weights = layer.read(network.leaves[layer.leaf])
        curves[path] = probe_errors(weights, grams.get(path), density, path)
        sizes[path] = layer.size
    for path, share in allocate_densities(curves, sizes, density).items():
        chosen[path] = dataclasses.replace(chosen[path], density=share)


def _order(flow: CalibrationPass, chosen, blocks, calibration) -> list[list[str]]:
    """Groups of paths in the order in which they are solved; prepares `flow` to advance so."""
    paths = [layer.path for layer in flow.layers if layer.path in chosen]
    if calibration == "one-pass":
        return [paths]
    units = {}
    for path in paths if blocks is not None else ():
        match = re.match(blocks, path)
        if match:
            units.setdefault(match.group(), []).append(flow.index[path])
    if blocks is not None and not units:
        raise ValueError(f"blocks={blocks!r} matches the beginning of no path among {paths}")
    indices = [flow.index[path] for path in paths]
    flow.start(
        {
            shape: stages.order_layers(traced, indices, list(units.values()))
            for shape, traced in flow.flows.items()
        }
    )
    first = next(iter(flow.stages.values()))
    return [[flow.layers[i].path for i in group] for group in first.members]


def _share(solution: LayerSolution | None, owner: int) -> LayerSolution:
    """Hands a solution from the process that solved it to all others."""
    is_owner = jax.process_index() == owner
    shapes = np.zeros((3, 3), np.int64)
    numbers = np.zeros(3, np.float64)
    method = np.zeros(64, np.uint8)
    if is_owner:
        for i, array in enumerate((solution.product, solution.left, solution.right)):
            shapes[i] = 0 if array is None else array.shape
        numbers[:] = solution.nonzeros, solution.error, solution.seconds
        name = solution.method.encode()
        method[: len(name)] = list(name)
    # As bytes, since 64-bit numbers would be rounded on their way through JAX.
    header = (shapes.view(np.uint8).ravel(), numbers.view(np.uint8), method)
    header = [np.array(a) for a in multihost_utils.broadcast_one_to_all(header, is_owner)]
    shapes = header[0].view(np.int64).reshape(3, 3)
    nonzeros, error, seconds = header[1].view(np.float64)
    method = header[2].tobytes().rstrip(b"\0").decode()
    arrays = [np.zeros(shape, np.float32) for shape in shapes]
    if is_owner:
        held = (solution.product, solution.left, solution.right)
        arrays = [zero if array is None else array for array, zero in zip(held, arrays)]
    arrays = [np.asarray(a) for a in multihost_utils.broadcast_one_to_all(arrays, is_owner)]
    product, left, right = (array if array.size else None for array in arrays)
    return LayerSolution(product, left, right, method, int(nonzeros), float(error), float(seconds))


def _why_no_pair(network: Network, layer: Layer) -> str | None:
    """Why a layer of the model cannot become a pair of factors; None if it can."""
    if network.paths[layer.leaf][-1] != "kernel":
        return f"its parameter {'/'.join(network.paths[layer.leaf])} is no kernel of a Flax layer"
    if "#" in layer.path:
        return "its kernel is used in parts"
    if layer.path.endswith("]") and not layer.view.steps[0][0].startswith("["):
        return "its kernel is stacked along an axis that is not the first"
    return flax_layers.why_no_pair(network.modules.get(network.module_path(layer.leaf)))


def _assemble(network: Network, flow: CalibrationPass, leaves, pairs: dict[str, LayerSolution]):
    """The model with its new leaves, and factor pairs in the place of the layers they solve."""
    by_leaf = {}
    for path, solution in pairs.items():
        layer = flow.layer(path)
        by_leaf.setdefault(layer.leaf, {})[layer.stack] = solution
    factors = {}
    for leaf, members in by_leaf.items():
        # Slices of one stack may differ in their inner dimension: zeros fill up the narrow ones.
        inner = max(solution.left.shape[-1] for solution in members.values())
        stack = tuple(1 + max(indices) for indices in zip(*members))
        groups, rows, _ = next(iter(members.values())).left.shape
        left = np.zeros((*stack, groups, rows, inner), np.float32)
        cols = next(iter(members.values())).right.shape[-1]
        right = np.zeros((*stack, groups, inner, cols), np.float32)
        for index, solution in members.items():
            own = solution.left.shape[-1]
            left[(*index, ..., slice(own))] = solution.left
            right[(*index, slice(None), slice(own))] = solution.right
        factors[leaf] = jnp.asarray(left), jnp.asarray(right)
    return network.substitute(leaves, factors)
