"""Products with what a decoder does around them, and chains of them, in one GPU kernel each.

**Two chains at once can wait for each other for ever.** The blocks of a chain's kernel wait for
each other's results, so all of them have to run at the same time, one on every SM. They do unless
another kernel holds SMs and waits in turn, as a second chain does. So let no two chains of a
program be independent of each other (those of a model's layers follow one another), and run one
such program at a time on a GPU.

What is here may change from version to version. `fused_spmv` is a product with a norm or a gate
before it and a sum after it, which waits for nobody.
"""

from macko_jax.ops.fused import Step, fused_chain, fused_spmv

__all__ = ["Step", "fused_chain", "fused_spmv"]
