"""A Llama-architecture decoder in Flax NNX.

One model for the Llama family: RMSNorm, rotary embeddings, grouped-query attention and SwiGLU,
with the options that tell Llama 2 and 3, Mistral, Qwen2 and Qwen3 apart in `Config`. The dense and
the sparse model are the same code: they differ only in what stands in place of each `nnx.Linear`.
Projections that share an input are one matrix (`qkv`, `gate_up`), so that a decode step reads
every weight in four products a layer.

Shapes: B batch, T tokens of this call, S slots of the cache, H query heads, K key-value heads,
D head dimension, E hidden size.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llama import attention, parallel
from examples.llama.cache import Cache, write
from examples.llama.rope import rotate, rotation
from macko_jax import flax_nnx
from macko_jax.experimental import Step
from macko_jax.nn.pairs import FactorPair
from macko_jax.ops.fused import blanks, in_turn, rms_norm, swiglu


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32."""

    def __init__(self, size, eps, param_dtype):
        self.scale = nnx.Param(jnp.ones(size, param_dtype))
        self.eps = eps

    def __call__(self, x):
        return rms_norm(x, *self.parameters())

    def parameters(self):
        """(scale, eps), as the steps of a chain take them."""
        return self.scale[...], self.eps


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary position embeddings."""

    def __init__(self, config, window, linear, param_dtype):
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.window = window
        self.qkv = linear(
            config.hidden_size,
            (self.heads + 2 * self.kv_heads) * self.head_dim,
            use_bias=config.qkv_bias,
        )
        self.out = linear(self.heads * self.head_dim, config.hidden_size)
        norm = functools.partial(RMSNorm, self.head_dim, config.rms_norm_eps, param_dtype)
        self.query_norm = norm() if config.qk_norm else None
        self.key_norm = norm() if config.qk_norm else None
        self.mesh = None  # over which heads go, see parallel.py

    def __call__(self, qkv, positions, rotary, layer_cache, blanks):
        """What tokens attend to, before `out`, from their queries, keys and values.

        Args:
          qkv: [B, T, (H + 2 K) * D].
          positions, rotary, layer_cache: where the tokens are, and what was before them.
          blanks: length of the array that `experimental.fused_chain` needs for what follows.

        Returns:
          [B, T, H * D]; the layer's cache with these tokens; and that array, or None.
        """
        count = 1 if self.mesh is None else self.mesh.shape[parallel.AXIS]
        norms = [] if self.query_norm is None else [self.query_norm, self.key_norm]
        arrays = positions, rotary, layer_cache, [norm.scale[...] for norm in norms]
        mix = functools.partial(self._mix, count=count, blanks=blanks // count)
        blank = parallel.P(parallel.AXIS)
        out_specs = parallel.LAST, parallel.HEADS, blank
        in_specs = parallel.LAST, parallel.P(), parallel.P(), parallel.HEADS, parallel.P()
        return parallel.by_device(self.mesh, mix, in_specs, out_specs)(qkv, *arrays)

    def _mix(self, qkv, positions, rotary, layer_cache, scales, *, count, blanks):
        """The same for the heads of one device of `count`, with the scales of the head norms."""
        batch, length, _ = qkv.shape
        heads, kv_heads, blank = self.heads // count, self.kv_heads // count, None
        qkv = qkv.reshape(batch, length, heads + 2 * kv_heads, self.head_dim)
        query, key, value = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        if scales:
            query, key = (
                rms_norm(x, scale, self.query_norm.eps) for x, scale in zip((query, key), scales)
            )
        if layer_cache is not None and length == 1 and attention.has_decode_kernel(layer_cache):
            if scales:
                qkv = jnp.concatenate([query, key, value], axis=2)
            mixed, layer_cache, blank = attention.decode_kernel().attend(
                qkv.reshape(batch, -1),
                rotary,
                layer_cache,
                positions[:, 0],
                heads=heads,
                window=self.window,
                blanks=blanks,
            )
        else:
            query, key = rotate(query, rotary), rotate(key, rotary)
            new = jnp.stack([key, value], axis=3).swapaxes(1, 2)
            whole = layer_cache is None
            layer_cache = new if whole else write(layer_cache, new, positions)
            if whole and attention.fits_flash_attention(query, self.window):
                mixed = jax.nn.dot_product_attention(
                    query, key, value, is_causal=True, implementation="cudnn"
                )
            else:
                mixed = attention.attend(query, layer_cache, positions, self.window)
        return mixed.reshape(batch, length, heads * self.head_dim), layer_cache, blank


class MLP(nnx.Module):
    """The matrices of SwiGLU: down(silu(gate(x)) * up(x)), with gate and up in one."""

    def __init__(self, config, linear):
        self.gate_up = linear(config.hidden_size, 2 * config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)


def _packed(steps):
    """The steps as those of packed layers, a pair of factors as two; None if one is not packed."""
    packed, ends = [], []
    for step in steps:
        linear, norm, gated, add, kept = step
        add = ends[add] if isinstance(add, int) else add
        if isinstance(linear, FactorPair):
            packed += [Step(linear.right, norm, gated), Step(linear.left, add=add, kept=kept)]
        else:
            packed.append(step._replace(add=add))
        ends.append(len(packed) - 1)
    return packed if all(isinstance(s.linear, flax_nnx.MackoLinear) for s in packed) else None


def _chain(x, steps, packed, dropout=None, blank=None, mesh=None):
    """Applies steps, each to the result of the one before: the results kept, and the last.

    `packed` is `_packed(steps)`. Packed layers are given all of a step, since for one token they do
    that in one kernel. Dropout applies to what is added to something.
    """
    if dropout is None and packed is not None:
        return flax_nnx.chain(x, packed, blank=blank)
    return in_turn(x, steps, functools.partial(_apply, dropout=dropout, mesh=mesh))


def _apply(x, step, dropout, mesh):
    """One step of a chain. On a mesh every device has gates and what they let through."""
    linear, norm, gated, add, _ = step
    if isinstance(linear, flax_nnx.MackoLinear) and dropout is None:
        return linear.fused(x, norm=norm, gated=gated, add=add)
    x = x if norm is None else rms_norm(x, *norm)
    if gated:
        x = parallel.by_device(mesh, swiglu, (parallel.LAST,), parallel.LAST)(x)
    y = linear(x)
    if add is None:
        return y
    return add + (y if dropout is None else dropout(y))


class Block(nnx.Module):
    """One decoder layer: attention and MLP, each normalized before and added to the stream."""

    def __init__(self, config, window, linear, param_dtype):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype)
        self.attention = Attention(config, window, linear, param_dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype)
        self.mlp = MLP(config, linear)
        self.mesh = None  # of its devices, see parallel.py

    def __call__(self, x, positions, rotary, layer_cache, dropout):
        x, _, layer_cache = self.advance(
            x, self.project(x), positions, rotary, layer_cache, dropout, None
        )
        return x, layer_cache

    def project(self, x):
        """Queries, keys and values of x [B, T, E]."""
        steps = [self._projection()]
        [qkv] = _chain(x, steps, _packed(steps))
        return qkv

    def advance(self, x, qkv, positions, rotary, layer_cache, dropout, following):
        """The stream x after this layer, `project` of it by the next one, and this layer's cache.

        The projection is what the block `following` begins with, None at the end: from attention to
        attention, packed layers are one chain.
        """
        steps = [
            Step(self.attention.out, add=x),
            Step(self.mlp.gate_up, norm=self.mlp_norm.parameters()),
            Step(self.mlp.down, gated=True, add=0, kept=following is not None),
        ]
        if following is not None:
            steps.append(following._projection())
        packed = _packed(steps)
        matrices = [step._replace(linear=step.linear.matrix) for step in packed or []]
        needed = blanks(matrices) if packed else 0
        mixed, layer_cache, blank = self.attention(qkv, positions, rotary, layer_cache, needed)
        x, *qkv = _chain(mixed, steps, packed, dropout, blank, self.mesh)
        return x, *(qkv or [None]), layer_cache

    def _projection(self):
        return Step(self.attention.qkv, norm=self.attention_norm.parameters())


class Llama(nnx.Module):
    """A decoder-only language model.

    Args:
      config: the model's shape.
      dtype: what is computed in (normalization and attention weights: always float32).
      param_dtype: what parameters are held in.
      rngs: random streams; "params" initializes the weights.
    """

    def __init__(self, config, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs):
        init = nnx.initializers.normal(0.02)
        linear = functools.partial(
            nnx.Linear,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=init,
            rngs=rngs,
        )
        windows = config.sliding_windows or (None,) * config.num_hidden_layers
        self.config = config
        self.dtype = dtype
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=init,
            rngs=rngs,
        )
        self.layers = nnx.List([Block(config, window, linear, param_dtype) for window in windows])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype)
        self.head = (
            None if config.tie_word_embeddings else linear(config.hidden_size, config.vocab_size)
        )

    def __call__(self, tokens, *, dropout=None):
        """Next-token logits of whole sequences.

        Args:
          tokens: [B, T] integers.
          dropout: applied to each branch before it is added to the residual stream, if given.

        Returns:
          [B, T, vocab] logits in float32.
        """
        hidden, _ = self.hidden(tokens, dropout=dropout)
        return self.logits(hidden)

    def hidden(self, tokens, cache=None, *, dropout=None):
        """Final hidden states [B, T, E], and the cache extended by these tokens.

        Without a cache the tokens begin their sequences, and the cache that comes back has a slot
        for each of them.
        """
        x, cache = through(self.layers, self.embed(tokens), self.config, cache, dropout)
        return self.norm(x), cache

    def logits(self, hidden):
        """Logits in float32 of hidden states [..., E]."""
        return logits(self.embed, self.head, hidden)


def through(blocks, x, config, cache=None, dropout=None):
    """The stream x [B, T, E] after some blocks, and their cache extended by these tokens."""
    batch, length, _ = x.shape
    start = jnp.zeros(batch, jnp.int32) if cache is None else cache.lengths
    positions = start[:, None] + jnp.arange(length)
    rotary = rotation(positions, config)
    qkv, layer_caches = blocks[0].project(x), []
    for i, block in enumerate(blocks):
        layer_cache = None if cache is None else cache.layers[i]
        following = blocks[i + 1] if i + 1 < len(blocks) else None
        x, qkv, layer_cache = block.advance(
            x, qkv, positions, rotary, layer_cache, dropout, following
        )
        layer_caches.append(layer_cache)
    return x, Cache(tuple(layer_caches), start + length)


def logits(embed, head, hidden):
    """Logits in float32 of hidden states [..., E]; without a head, by the embedding's table."""
    return (embed.attend if head is None else head)(hidden).astype(jnp.float32)
