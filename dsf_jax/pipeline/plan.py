"""What is asked for each layer of a model, checked before anything is computed."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsf_jax.pipeline.allocation import allocate_densities, probe_errors
from dsf_jax.pipeline.rules import Rule, Rules, default_skip, match_rules
from dsf_jax.pipeline.settings import Calibration
from dsf_jax.pipeline.solve import METHODS, Assignment, check_method
from dsf_jax.solvers.methods import Method
from dsf_jax.solvers.problem import is_finite
from dsf_jax.trace import stages
from dsf_jax.trace.calibration import CalibrationPass
from dsf_jax.trace.dataflow import Layer
from dsf_jax.trace.network import Network
from macko_jax.nn import report
from macko_jax.nn.pairs import why_no_pair


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of each layer.

    Attributes:
      assignments: What is asked for each layer that is compressed, by path.
      singles: For each layer that was to become a pair of factors and cannot, why it gets the best
        single matrix.
      others: What to report of each other layer or parameter matrix, which stays as it is.
      fixed: Paths of layers whose density a rule names.
      remarks: What else there is to say of a layer that is compressed.
    """

    assignments: Mapping[str, Assignment]
    singles: Mapping[str, str]
    others: tuple[report.LayerReport, ...]
    fixed: frozenset[str]
    remarks: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def note(self, path: str) -> str:
        """What the report says of a layer that is compressed."""
        return "; ".join(said[path] for said in (self.singles, self.remarks) if path in said)


def plan_layers(dense: CalibrationPass, rules: Rules, default: Assignment) -> Plan:
    """Decides by the rules what becomes of each layer of a model, and checks that it can.

    Args:
      dense: The pass of the dense model.
      rules: The first that matches a layer's path applies.
      default: What is asked where a rule does not say.

    Returns:
      The plan.

    Raises:
      TypeError: A rule is no `Rule`.
      ValueError: A rule matches nothing, asks for what a layer or a method has not, or leaves
        nothing to do; a layer's weights are not finite.
    """
    matched = match_rules(rules, [layer.path for layer in dense.layers])
    assignments, skipped, fixed, remarks = {}, {}, set(), dict(dense.remarks)
    for layer in dense.layers:
        rule = matched[layer.path]
        reason = _why_skipped(layer, rule, dense.layers)
        if reason:
            skipped[layer.path] = reason
            continue
        assignments[layer.path] = _assign(layer, rule, default)
        if rule is not None and rule.density is not None:
            fixed.add(layer.path)
        if rule is None and layer.gives_output:
            head = (
                f"makes an output of the model; Rule({layer.path!r}, skip=True) leaves it as it is"
            )
            remarks[layer.path] = "; ".join(filter(None, (head, remarks.get(layer.path))))
    others = _report_others(dense, skipped)
    if not assignments:
        raise ValueError(
            "no layer is left to compress: "
            + ("; ".join(f"{entry.path}: {entry.note}" for entry in others) or "none was found")
        )
    singles = _why_singles(dense, assignments)
    for path in singles:
        assignments[path] = _best_single(assignments[path])
    for path in assignments:
        layer = dense.layer(path)
        if not is_finite(layer.read(dense.network.leaves[layer.leaf])):
            raise ValueError(f"layer {path!r}: its weights hold NaN or infinity")
    return Plan(assignments, singles, others, frozenset(fixed), remarks)


def _why_skipped(layer: Layer, rule: Rule | None, layers: Sequence[Layer]) -> str | None:
    if rule is None:
        return default_skip(layer, layers)
    return f"rule {rule.path!r}" if rule.skip else None


def _assign(layer: Layer, rule: Rule | None, default: Assignment) -> Assignment:
    """What is asked for a layer, with its options checked."""
    asked = rule or Rule(".*")
    name = asked.method or default.method
    check_method(name, layer.path)
    method = METHODS[name]
    if asked.options is not None:
        options = dict(asked.options)
    elif name == default.method:
        options = dict(default.options)
    else:
        options = _options_for(method, default.options)
    assignment = Assignment(name, asked.density or default.density, options, default.values)
    unknown = sorted(set(options) - set(method.option_names))
    if unknown:
        source = "options" if asked.options is None else f"the options of rule {asked.path!r}"
        raise ValueError(
            f"layer {layer.path!r}: {source} hold {', '.join(map(repr, unknown))}, which method "
            f"{name!r} does not take; it takes {', '.join(method.option_names)}"
        )
    method.check(options, assignment.density, (layer.rows, layer.cols), layer.path)
    if method.gives_pairs and (layer.groups > 1 or layer.stack):
        # Groups and slices share one parameter, so all are pairs or none is.
        options["compare_single"] = False
    return assignment


def _report_others(
    dense: CalibrationPass, skipped: Mapping[str, str]
) -> tuple[report.LayerReport, ...]:
    """What to report of the layers that are skipped and of parameters that are no layer's."""
    network, entries = dense.network, {}
    for layer in dense.layers:
        if layer.path in skipped:
            matrices = layer.read(network.leaves[layer.leaf])
            matrices = matrices if layer.groups > 1 else matrices[0]
            entries[layer.leaf, layer.path] = layer.kind, matrices, skipped[layer.path]
    with_layers = {layer.leaf for layer in dense.layers}
    for leaf, reason in dense.notes.items():
        if leaf not in with_layers:
            path = network.module_path(leaf)
            entries[leaf, path] = "parameter", network.leaves[leaf], reason
    return tuple(
        report.report_as_it_is(path, *entries[leaf, path]) for leaf, path in sorted(entries)
    )


def _why_singles(dense: CalibrationPass, assignments: Mapping[str, Assignment]) -> dict[str, str]:
    """Why layers that are asked to become pairs of factors cannot, by path."""
    wanted = [path for path, asked in assignments.items() if asked.solver.gives_pairs]
    reasons = {path: _why_no_pair(dense.network, dense.layer(path)) for path in wanted}
    whole = [dense.layer(path) for path, reason in reasons.items() if reason is None]
    pairs = collections.Counter(layer.leaf for layer in whole)
    slices = collections.Counter(layer.leaf for layer in dense.layers)
    for layer in whole:
        if pairs[layer.leaf] < slices[layer.leaf]:
            reasons[layer.path] = "all slices of a stack become pairs, or none"
    return {
        path: f"{reason}: one matrix in place of two" for path, reason in reasons.items() if reason
    }


def _best_single(asked: Assignment) -> Assignment:
    """What is asked of a layer that was to become a pair and gets one matrix."""
    method = METHODS["admm"]
    options = _options_for(method, asked.options)
    return dataclasses.replace(asked, method=method.name, options=options)


def _options_for(method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of another method's options that this one takes, too."""
    return {name: options[name] for name in method.option_names if name in options}


def _why_no_pair(network: Network, layer: Layer) -> str | None:
    """Why a layer of the model cannot become a pair of factors; None if it can."""
    if network.paths[layer.leaf][-1] != "kernel":
        return f"its parameter {'/'.join(network.paths[layer.leaf])} is no kernel of a Flax layer"
    if "#" in layer.path:
        return "its kernel is used in parts"
    if layer.path.endswith("]") and not layer.view.steps[0][0].startswith("["):
        return "its kernel is stacked along an axis that is not the first"
    return why_no_pair(network.modules.get(network.module_path(layer.leaf)))


def check_grams(
    given: Mapping[str, Any], dense: CalibrationPass, paths: Sequence[str]
) -> dict[str, jax.Array]:
    """Gram matrices that a user gave, as `[groups, in, in]` for each of the paths that has inputs.

    Raises:
      ValueError: One is missing, or has another shape.
    """
    checked = {}
    for path in paths:
        layer = dense.layer(path)
        if not layer.uses:
            continue
        if path not in given:
            raise ValueError(
                f"layer {path!r}: grams lacks it; take them from gram_matrices(model, batches), or "
                f"skip the layer by Rule({path!r}, skip=True)"
            )
        wanted = (layer.groups, layer.cols, layer.cols)
        gram = jnp.asarray(given[path])
        if gram.shape not in (wanted, wanted[1:] if layer.groups == 1 else wanted):
            raise ValueError(f"layer {path!r}: its Gram matrix must be {wanted}, got {gram.shape}")
        checked[path] = gram.reshape(wanted)
    return checked


def share_budget(
    plan: Plan, dense: CalibrationPass, grams: Mapping[str, jax.Array] | None, density: float
) -> Plan:
    """The plan with the densities of least summed error, but where a rule names one."""
    leaves = dense.network.leaves
    paths = [path for path in plan.assignments if path not in plan.fixed]
    if grams is None:
        grams = dense.grams([path for path in paths if dense.layer(path).uses], leaves)
    curves, sizes = {}, {}
    for path in paths:
        layer = dense.layer(path)
        weights = layer.read(leaves[layer.leaf])
        curves[path] = probe_errors(weights, grams.get(path), density, path)
        sizes[path] = layer.size
    assignments = dict(plan.assignments)
    for path, share in allocate_densities(curves, sizes, density).items():
        assignments[path] = dataclasses.replace(assignments[path], density=share)
    return dataclasses.replace(plan, assignments=assignments)


def order_stages(
    present: CalibrationPass, paths: Sequence[str], calibration: Calibration
) -> list[list[str]]:
    """The paths of each stage, in the order in which they are solved.

    The pass is made ready to advance in that order.

    Raises:
      ValueError: `blocks` matches no path.
    """
    paths = [layer.path for layer in present.layers if layer.path in paths]
    if calibration.mode == "one-pass":
        return [paths]
    units: dict[str, list[int]] = {}
    if calibration.blocks is not None:
        for path in paths:
            match = re.match(calibration.blocks, path)
            if match:
                units.setdefault(match.group(), []).append(present.index[path])
        if not units:
            raise ValueError(
                f"blocks={calibration.blocks!r} matches the beginning of no path among {paths}"
            )
    indices = [present.index[path] for path in paths]
    present.start(
        {
            shape: stages.order_layers(flow, indices, list(units.values()))
            for shape, flow in present.flows.items()
        }
    )
    first = next(iter(present.stages.values()))
    return [[present.layers[i].path for i in members] for members in first.members]
