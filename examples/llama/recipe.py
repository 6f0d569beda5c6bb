"""What a checkpoint is compressed to: method and density of each layer, and how it is packed."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import dsf_jax
import macko_jax
from dsf_jax.pipeline.settings import check_choice
from dsf_jax.solvers.methods import METHODS, check_method
from dsf_jax.solvers.problem import check_density
from dsf_jax.solvers.rounding import check_values

GIVEN = "given"  # the method that packs what somebody else has pruned
LAYERS = ("attention/qkv", "attention/out", "mlp/gate_up", "mlp/down")  # of a block


def paths(config):
    """The paths of all layers of a model that can be compressed, in the order of the data flow."""
    return [f"layers/{i}/{layer}" for i in range(config.num_hidden_layers) for layer in LAYERS]


@dataclasses.dataclass(frozen=True)
class BlockRefinement:
    """How each block is trained towards the dense one, once its layers are solved.

    Attributes:
      steps: of `dsf_jax.refine_block`, one batch of windows each.
      rate: its learning rate.

    Raises:
      ValueError: one is not positive.
    """

    steps: int = 400
    rate: float = 2e-4

    def __post_init__(self):
        if self.steps < 1 or not 0 < self.rate < math.inf:
            raise ValueError(
                f"refinement takes a positive number of steps and a positive rate, got {self}"
            )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a checkpoint is compressed to.

    Attributes:
      method: a name in `dsf_jax`'s METHODS, or "given": the zeros are those that are there.
      density: kept non-zeros over all entries of a layer, in (0, 1].
      target_bytes: size of the packed model's files in the place of a density, in bytes.
      budget: "uniform" gives each layer the density; "sensitivity" shares the model's so that the
        sum of relative output errors, probed by Wanda on the dense model, is least.
      rules: `dsf_jax.Rule`s by paths such as "layers/3/mlp/down"; the first that matches applies.
        A density in a rule is kept, whatever the budget or the target.
      pattern: N:M pattern of the pruning methods, such as "2:4".
      dsf_options: options of the methods that give two factors, fields of `dsf_jax.Options`.
      values: "int8" or "float8_e4m3fn" to store values in 8 bits; None keeps the checkpoint's type.
      whole_blocks: calibrate the layers of a block together, on what the block gives while it is
        dense, as the programs of Wanda's and SparseGPT's authors do, so that several devices share
        them; False calibrates each on what the compressed ones before it give.
      refine: how each block is refined; None refines none.
      encoding: of the packed matrices; None chooses the fastest for the device at hand.

    Raises:
      ValueError: a field is out of its range, or does not go with the method.
    """

    method: str = "wanda"
    density: float = 0.5
    target_bytes: int | None = None
    budget: str = "uniform"
    rules: tuple[dsf_jax.Rule, ...] = ()
    pattern: str | None = None
    dsf_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    values: str | None = None
    whole_blocks: bool = False
    refine: BlockRefinement | None = None
    encoding: str | None = None

    def __post_init__(self):
        if self.method != GIVEN:
            check_method(self.method)
        check_density(self.density)
        check_choice("budget", self.budget, ("uniform", "sensitivity"))
        check_values(self.values)
        if self.method == GIVEN and self._asks_to_solve():
            raise ValueError(
                "method 'given' packs the zeros that are there: it takes no target_bytes, no "
                "budget, no pattern, no dsf_options, no whole_blocks, no refinement, and no rules "
                "but those that skip; examples.refine_llm refines what somebody else has pruned"
            )
        if self.pattern and (self.target_bytes or self.budget != "uniform"):
            raise ValueError(
                f"pattern {self.pattern!r} says how many weights stay: it goes with "
                "budget='uniform' and without target_bytes"
            )

    def _asks_to_solve(self):
        return bool(
            self.target_bytes
            or self.budget != "uniform"
            or self.pattern
            or self.dsf_options
            or self.whole_blocks
            or self.refine
            or any(not rule.skip for rule in self.rules)
        )

    def assign(self, config):
        """The rule of each layer of a model by path, None where there is none.

        Raises:
          ValueError: a rule matches no layer.
        """
        return dsf_jax.Rule.assign(self.rules, paths(config))

    def method_of(self, rule):
        """The method of a layer to which `rule`, or None, applies."""
        return (rule and rule.method) or self.method

    def options_of(self, method):
        """The options of the recipe that a method takes."""
        if METHODS[method].gives_pairs:
            return dict(self.dsf_options)
        return {"pattern": self.pattern} if self.pattern else {}

    def block_rules(self, assigned, index, densities):
        """The rules by which `dsf_jax.compress_model` does with a block what the recipe asks for.

        Args:
          assigned: what `assign` gave.
          index: the block's number.
          densities: of its layers that are not skipped, by path in the model.
        """
        rules = []
        for layer in LAYERS:
            path = f"layers/{index}/{layer}"
            rule = assigned[path]
            if rule is not None and rule.skip:
                rules.append(dsf_jax.Rule(re.escape(layer), skip=True))
                continue
            method = self.method_of(rule)
            options = self.options_of(method) if rule is None or rule.options is None else None
            rules.append(
                dsf_jax.Rule(
                    re.escape(layer),
                    density=densities[path],
                    method=method,
                    options=rule.options if options is None else options,
                )
            )
        return rules

    def packing_rules(self, assigned, index):
        """The rules by which `dsf_jax.pack` packs a block."""
        skipped = [
            layer
            for layer in LAYERS
            if (rule := assigned[f"layers/{index}/{layer}"]) is not None and rule.skip
        ]
        return [
            *(macko_jax.Rule(re.escape(layer), skip=True) for layer in skipped),
            *(
                macko_jax.Rule(re.escape(layer), dtype=self.values, encoding=self.encoding)
                for layer in LAYERS
                if layer not in skipped
            ),
        ]

    def settings(self):
        """The recipe as a JSON object, for the record of a run."""
        described = dataclasses.asdict(self)
        return described | {"rules": [dataclasses.asdict(rule) for rule in self.rules]}
