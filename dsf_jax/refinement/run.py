"""Refinement of a compressed Flax model: distillation of the whole, or block by block."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from dsf_jax.pipeline.resume import fingerprint
from dsf_jax.pipeline.settings import check_choice
from dsf_jax.refinement import blocks
from dsf_jax.refinement.objectives import divergence, spread, squared_distance
from dsf_jax.refinement.report import BlockReport, RefineReport
from dsf_jax.refinement.settings import Settings
from dsf_jax.refinement.student import Student, choose_trained
from dsf_jax.refinement.training import Part, Trained, Trainer
from dsf_jax.refinement.watching import Watcher, with_pairs
from dsf_jax.trace.batches import Batch, TokenWeights, read_batches
from dsf_jax.trace.network import Network, call, read_network


class Refined(NamedTuple):
    """A refined model (for linen, its variables) and what became of it."""

    model: Any
    report: RefineReport


def refine(
    model: nnx.Module | nn.Module,
    batches: Iterable[Any],
    *,
    teacher: Any,
    stage: str = "model",
    variables: Any = None,
    rngs: Any = None,
    forward: Callable[[Any, Any], Any] | None = None,
    token_weights: TokenWeights = None,
    held_out: Iterable[Any] | None = None,
    **settings: Any,
) -> Refined:
    """Trains a compressed model towards the dense model that it was made from.

    stage="model" distils: over batches of inputs it makes

        sum_t w_t KL(p_t || q_t) / sum_t w_t

    small, where p_t and q_t are the distributions that the dense and the compressed model give
    for token t (the softmax of their logits, in float32) and w_t is the token's weight. With
    `hidden`, `hidden_weight` times the mean relative error of the outputs of modules is added, as
    it is made small for blocks.

    stage="block" goes through the blocks of the model in order. With the masks fixed it makes, for
    each of them,

        sum_t w_t ||y_t - F(x_t)||^2 / ||y_t||^2  /  sum_t w_t

    small over the values of the block F, where x_t is what the compressed and refined blocks before
    it make of token t, and y_t is the dense model's own output of the block, so that a block makes
    up for the errors before it. With target="prefix" the dense block's output for x_t takes the
    place of y_t; with relative_to="batch" it is sum_t w_t ||y_t - F(x_t)||^2 / sum_t w_t ||y_t||^2,
    which a few tokens with outputs much larger than the others' decide. The whole model's pass is
    repeated for each block; `refine_block` is for those who hold the inputs of their blocks.

    Zeros stay as they are in every matrix that was pruned; so packed sizes stay. By default a
    matrix was pruned if some of its entries are exactly zero: layers' kernels, both factors of a
    pair, the slices of a stack, but not embeddings and not the head.

    Args:
      model: An `nnx.Module`, or a linen module with `variables`, as `compress_model` gives it: with
        pruned matrices, pairs of factors, or both; it is left as it is.
      batches: Inputs as for `compress_model`. Each is one step; passes are shuffled.
      teacher: The dense model: an `nnx.Module`; for linen the dense variables of the same module,
        or (module, variables). It may be any model that gives logits of the same shape.
      stage: "model" or "block".
      variables: Variables of a linen module.
      rngs: Random keys of a linen module that draws numbers, by name.
      forward: `forward(model, batch)`, of which the first array is taken as the logits; the default
        is that of `compress_model`. Models run in evaluation mode.
      token_weights: Where batches have the weights of their tokens, as for `compress_model`.
      held_out: Batches on which the loss is measured as well: at the start, at the end, and in
        between.
      **settings: How to train; the same as those of `refine_block`, and

        - `temperature` (1.0): both logits are divided by it; the loss is multiplied by its square.
        - `hidden` (None): a regular expression of paths of modules whose outputs are matched too,
          where models call them; `hidden_weight` (1.0) is what they count.
        - `blocks` (None): a regular expression of the paths of blocks, such as r"layers/\\d+"; None
          takes the longest list of modules of one class that holds compressed layers.
        - `target` ("dense"): "dense" or "prefix", see above.
        - `mesh` (None): a `jax.sharding.Mesh`. Batches are shared out along their first axis and
          parameters are on all devices; the loss is that of one device.

    Returns:
      `Refined(model, report)`: a new model of the same structure and types.

    Raises:
      TypeError: A model or a keyword is not of a kind that is known.
      ValueError: An argument cannot be served: the message says which, and what is allowed.
      FloatingPointError: The loss was not finite from the first steps on. Later the training stops
        with a RuntimeWarning, and the last good model is what is returned; it is stopped as well
        where the loss comes to 4 times what it was at first.

    References:
      Distillation: Hinton et al., arXiv 1503.02531. Matching of blocks: "transformer matching" of
      3BASiL, arXiv 2603.01376. Masks that move: RigL, Evci et al., arXiv 1911.11134.
    """
    began = time.perf_counter()
    check_choice("stage", stage, ("model", "block"))
    read = _settings(settings)
    sources = _Sources(model, variables, teacher, rngs, with_pairs(forward or call))
    parts = read_batches(batches, token_weights)
    others = [] if held_out is None else read_batches(held_out, token_weights)
    if stage == "block":
        return _refine_blocks(sources, parts, others, read, began)
    return _refine_model(sources, parts, others, read, began)


def refine_block(
    block: nnx.Module | nn.Module,
    dense_block: Any,
    inputs: Iterable[Any],
    *,
    targets: Sequence[Any] | None = None,
    variables: Any = None,
    rngs: Any = None,
    forward: Callable[[Any, Any], Any] | None = None,
    token_weights: TokenWeights = None,
    held_out: Iterable[Any] | None = None,
    name: str = "",
    steps_made: dict | None = None,
    **settings: Any,
) -> Refined:
    """Trains a compressed block towards the dense block; see `refine`, stage="block".

    Args:
      block: An `nnx.Module`, or a linen module with `variables`; it is left as it is.
      dense_block: The block that it was made from, as `teacher` of `refine`.
      inputs: Batches of what the block is called with, such as hidden states `[B, T, features]`.
      targets: What its output should be for each batch, such as the dense model's own; None takes
        what the dense block makes of the inputs.
      variables, rngs, forward, token_weights: As for `refine`; the first array that `forward` gives
        is the output.
      held_out: Inputs on which the error is measured as well, towards the dense block.
      name: What to call the block in messages and in the report.
      steps_made: A dict, the same for several calls, by which blocks that are alike in all but
        their numbers share compiled programs; `forward` then has to be the same function.
      **settings: How to train.

        - `steps`: How many; or `seconds`: how long, of which a few steps at the beginning are timed
          to find their number. One of the two is needed.
        - `learning_rate` (1e-4): of the default optimizer, Adam on gradients of norm 1 at most,
          with a warm-up and a cosine.
        - `optimizer` (None): any optax optimizer in its place, with a rate of its own.
        - `masks` ("fixed"): "rechosen" drops the smallest weights now and then and lets in as many
          where the gradient is largest, as RigL does; N:M patterns stay.
        - `values` (None): "int8" or "float8_e4m3fn" where the model is to be packed so: the forward
          pass rounds, and `pack` with the same `values` stores the result unchanged.
        - `layers` (None): which layers are compressed, where zeros do not say it: the `Report` of
          `compress_model`, or regular expressions of their paths.
        - `relative_to` ("token"): what squared distances are relative to, "token" or "batch"; see
          `refine`.
        - `train` ("compressed"): what is trained: compressed layers, biases and the scales of
          norms; "all" parameters; or regular expressions of the paths of parameters.
        - `accumulate` (1): batches a step; their gradients are added up one after the other.
        - `remat` (False): keeps only the products of the forward pass, and computes the rest again.
        - `compute_dtype` (None): type of weights and inputs in the forward pass, "bfloat16" say;
          None takes those that the model has. Modules with a `dtype` of their own keep it. Master
          weights and the optimizer's state are float32, and float16 has a dynamic loss scale.
        - `seed` (0): of the order of batches.
        - `work_dir` (None): directory of checkpoints (Orbax), one every `save_seconds` (60). A run
          that was killed goes on where it was; one of another model or settings is refused.
        - `callback` (None): called with a `RefineProgress`; `print_progress` prints it.

    Returns:
      `Refined(block, report)`.

    Raises:
      TypeError, ValueError, FloatingPointError: As `refine`.
    """
    began = time.perf_counter()
    read = _settings(settings)
    sources = _Sources(block, variables, dense_block, rngs, with_pairs(forward or call))
    batches = read_batches(inputs, token_weights)
    others = [] if held_out is None else read_batches(held_out, token_weights)
    if targets is not None and len(targets) != len(batches):
        raise ValueError(f"{len(batches)} batches of inputs and {len(targets)} targets; give each")
    network, dense = sources.student(), sources.teacher()
    student, trained, report = _match(
        network, dense, batches, others, targets, read, name, read.layers, forward, steps_made
    )
    leaves = student.merge(network.leaves, trained.leaves)
    whole = _report("block", [(student, network, leaves)], [(trained, report)], began)
    return Refined(network.substitute(leaves, {}), whole)


def _settings(settings: dict[str, Any]) -> Settings:
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in settings:
        if name not in known:
            raise TypeError(
                f"unexpected keyword argument {name!r}; settings are {', '.join(known)}"
            )
    return Settings(**settings)


@dataclasses.dataclass(frozen=True)
class _Sources:
    """The two models as they were given."""

    model: Any
    variables: Any
    dense: Any
    rngs: Any
    forward: Callable[[Any, Any], Any]

    def student(self, forward: Callable | None = None) -> Network:
        """The compressed model taken apart."""
        return read_network(self.model, self.variables, forward or self.forward, self.rngs)

    def teacher(self, forward: Callable | None = None) -> Network:
        """The dense model taken apart."""
        forward = forward or self.forward
        if isinstance(self.dense, nnx.Module):
            return read_network(self.dense, None, forward)
        if isinstance(self.dense, tuple):
            module, variables = self.dense
            return read_network(module, variables, forward, self.rngs)
        if isinstance(self.model, nnx.Module):
            raise TypeError(
                "the dense model has to be an nnx.Module, or (module, variables) of linen, got a "
                f"{type(self.dense).__name__}"
            )
        return read_network(self.model, self.dense, forward, self.rngs)


def _parts(batches: Sequence[Batch], targets: Sequence[Any] | None = None) -> list[Part]:
    given = targets if targets is not None else [None] * len(batches)
    return [
        Part(
            (batch.form, None if target is None else target.shape),
            batch.fill,
            batch.arrays,
            batch.token_weights,
            target,
        )
        for batch, target in zip(batches, given)
    ]


def _remat(apply: Callable, settings: Settings) -> Callable:
    """The forward pass, of which with `remat` only products of two axes and more are kept."""
    if not settings.remat:
        return apply
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def rematerialized(leaves: Any, batch: Any) -> list:
        taken = Batch.of(batch)
        run = lambda leaves, arrays: apply(leaves, taken.fill(arrays))
        return jax.checkpoint(run, policy=policy)(leaves, taken.arrays)

    return rematerialized


def _mark(settings: Settings, optional: Any, *trees: Any) -> str | None:
    if settings.work_dir is None:
        return None
    return fingerprint(settings.recorded() | {"more": optional}, *trees)


def _data(batches: Sequence[Batch]) -> list:
    return [(batch.arrays, batch.token_weights) for batch in batches]


# The whole model.


class _Outputs:
    """A forward pass that gives the logits, and the outputs of modules by path.

    Attributes:
      paths: Of these modules, known once it is traced.
    """

    def __init__(self, forward: Callable[[Any, Any], Any], pattern: str | None):
        self.forward, self.pattern = forward, pattern
        self.paths: list[str] = []

    def __call__(self, model: Any, batch: Any) -> list:
        if self.pattern is None:
            return [first_array(self.forward(model, batch))]
        expression = re.compile(self.pattern)
        watcher = Watcher(self.forward, lambda path: expression.fullmatch(path) is not None)
        output, calls = watcher(model, batch)
        self.paths = sorted(calls)
        return [first_array(output), *(calls[path][-1].result for path in self.paths)]


def first_array(result: Any) -> jax.Array:
    """The first array of what a forward pass gives."""
    arrays = [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]
    if not arrays:
        raise ValueError(f"the forward pass gives no array; it gives a {type(result).__name__}")
    return arrays[0]


def _refine_model(
    sources: _Sources, batches: list[Batch], held_out: list[Batch], settings: Settings, began: float
) -> Refined:
    ours, theirs = (_Outputs(sources.forward, settings.hidden) for _ in range(2))
    network, dense = sources.student(ours), sources.teacher(theirs)
    student = choose_trained(network, batches[0], settings.layers, settings.train)
    _check_outputs(network, dense, batches[0], ours, theirs, settings)
    apply = _remat(network.apply, settings)

    def objective(leaves, others, batch, weights, target):
        del target
        logits, *hidden = apply(leaves, batch)
        wanted, *states = jax.lax.stop_gradient(dense.apply(others, batch))
        spread_weights = spread(weights, logits.shape[:-1])
        count = jnp.sum(spread_weights)
        total: Any = divergence(wanted, logits, spread_weights, settings.temperature)
        for state, output in zip(states, hidden):
            each = settings.hidden_weight / len(states)
            spread_state = spread(weights, state.shape[:-1])
            apart, size = squared_distance(state, output, spread_state, settings.relative_to)
            total += each * count * apart / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)
        return total, count

    mark = _mark(settings, _names(batches, student), network.leaves, dense.leaves, _data(batches))
    trainer = Trainer(
        student,
        network.leaves,
        objective,
        dense.leaves,
        _parts(batches),
        _parts(held_out),
        settings,
        mark,
    )
    trained = trainer.run()
    leaves = student.merge(network.leaves, trained.leaves)
    report = _report("model", [(student, network, leaves)], [(trained, None)], began)
    return Refined(network.substitute(leaves, {}), report)


def _names(batches: Sequence[Batch], student: Student) -> list:
    return [student.names, [repr(batch.static) for batch in batches]]


def _check_outputs(
    network: Network,
    dense: Network,
    batch: Batch,
    ours: _Outputs,
    theirs: _Outputs,
    settings: Settings,
) -> None:
    """Raises a ValueError unless both models give logits, and states, of one shape."""
    found, wanted = (
        jax.eval_shape(lambda leaves, arrays, a=a: a(leaves, batch.fill(arrays)), leaves, arrays)
        for a, leaves, arrays in (
            (network.apply, network.leaves, batch.arrays),
            (dense.apply, dense.leaves, batch.arrays),
        )
    )
    if settings.hidden is not None and (not ours.paths or ours.paths != theirs.paths):
        raise ValueError(
            f"hidden={settings.hidden!r} has to match modules that both models call: it matches "
            f"{ours.paths or 'none'} of the compressed and {theirs.paths or 'none'} of the dense "
            "model"
        )
    for name, one, other in zip(["logits", *ours.paths], found, wanted):
        if one.shape != other.shape:
            raise ValueError(
                f"{name}: the compressed model gives {one.shape} and the dense model {other.shape}"
            )


# Blocks.


def _match(
    network: Network,
    dense: Network,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    targets: Sequence[Any] | None,
    settings: Settings,
    name: str,
    layers: Any,
    forward: Any,
    steps: dict | None,
) -> tuple[Student, Trained, BlockReport]:
    """Trains one block; its report.

    Blocks of one form share a step, if `steps` is given for all; `forward` tells passes apart.
    """
    began = time.perf_counter()
    student = choose_trained(network, batches[0], layers, settings.train)
    apply, apply_dense = _remat(network.apply, settings), dense.apply  # no arrays are held

    def objective(leaves, others, batch, weights, target):
        output = apply(leaves, batch)[0]
        if target is None:
            target = jax.lax.stop_gradient(apply_dense(others, batch)[0])
        if target.shape != output.shape:
            raise ValueError(
                f"{name or 'the block'} gives {output.shape}, and is to give {target.shape}"
            )
        spread_weights = spread(weights, output.shape[:-1])
        return squared_distance(target, output, spread_weights, settings.relative_to)

    mark = _mark(
        settings,
        [name, _names(batches, student)],
        network.leaves,
        dense.leaves,
        _data(batches),
        targets,
    )
    parts = _parts(batches, targets)
    trainer = Trainer(
        student,
        network.leaves,
        objective,
        dense.leaves,
        parts,
        _parts(held_out),
        settings,
        mark,
        name,
        (network.form, dense.form, forward),
        steps,
    )
    before = trainer.measure(parts)
    trained = trainer.run()
    report = BlockReport(
        path=name,
        before=before,
        after=trainer.measure(parts),
        losses=tuple(trained.losses),
        seconds=time.perf_counter() - began,
        stopped=trained.stopped,
    )
    return student, trained, report


def _refine_blocks(
    sources: _Sources, batches: list[Batch], held_out: list[Batch], settings: Settings, began: float
) -> Refined:
    whole = sources.student()
    paths = blocks.find(sources, batches[0], settings)
    ours = blocks.Capture(sources.student, sources.forward, paths, batches[0])
    theirs = blocks.Capture(sources.teacher, sources.forward, paths, batches[0])
    leaves, done, reports, steps = list(whole.leaves), [], [], {}
    for path in paths:
        own = dataclasses.replace(settings, work_dir=blocks.directory(settings, path))
        inputs = ours.inputs(leaves, batches, path)
        others = ours.inputs(leaves, held_out, path)
        targets = None
        if settings.target == "dense":
            targets = theirs.results(theirs.network.leaves, batches, path)
        network, dense = ours.block(leaves, path), theirs.block(theirs.network.leaves, path)
        layers = blocks.layers_of(settings.layers, path)
        student, trained, report = _match(
            network, dense, inputs, others, targets, own, path, layers, None, steps
        )
        new = student.merge(network.leaves, trained.leaves)
        done.append((student, network, new))
        reports.append((trained, report))
        leaves = blocks.put(whole, leaves, path, network, new)
    return Refined(whole.substitute(leaves, {}), _report("block", done, reports, began))


def _report(
    stage: str,
    students: Sequence[tuple[Student, Network, list]],
    found: Sequence[tuple[Trained, BlockReport | None]],
    began: float,
) -> RefineReport:
    before = after = parameters = 0
    for student, network, leaves in students:
        for index, layers in zip(student.trained, student.matrices):
            kept = int(jnp.count_nonzero(network.leaves[index]))
            parameters += kept if layers else network.leaves[index].size
            if layers:
                before, after = before + kept, after + int(jnp.count_nonzero(leaves[index]))
    stopped = [
        f"{report.path}: {trained.stopped}" if report and report.path else trained.stopped
        for trained, report in found
        if trained.stopped
    ]
    return RefineReport(
        stage=stage,
        steps=max(trained.steps for trained, _ in found),
        losses=tuple(float(x) for trained, _ in found for x in trained.losses),
        held_out=tuple((int(s), float(x)) for trained, _ in found for s, x in trained.held_out),
        blocks=tuple(report for _, report in found if report is not None),
        parameters=parameters,
        nonzeros=(before, after),
        seconds=time.perf_counter() - began,
        stopped="; ".join(stopped) or None,
    )
