"""A Llama-architecture decoder in Flax NNX: the model, its KV cache and its generation loop.

One file for the Llama family: RMSNorm, rotary embeddings, grouped-query attention and SwiGLU,
with the options that tell Llama 2 and 3, Mistral, Qwen2 and Qwen3 apart in `Config`. The dense and
the sparse model are the same code: they differ only in what stands in place of each `nnx.Linear`.
Projections that share an input are one matrix (`qkv`, `gate_up`), so that a decode step reads
every weight in four products a layer.

Shapes: B batch, T tokens of this call, S slots of the cache, H query heads, K key-value heads,
D head dimension, E hidden size.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsf_jax.nn.layers import FactorPair
from macko_jax import Step, flax_nnx
from macko_jax.ops.fused import blanks, in_turn, rms_norm, swiglu


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the training context.

    `kind` is "linear" (every frequency is divided by `factor`) or "llama3" (only wavelengths
    longer than the original context are, with a ramp between the two frequency factors).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a model. Fields that Hugging Face's config.json has keep their names there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm of each query and key head before the rotation
    tie_word_embeddings: bool = False
    sliding_windows: tuple[int | None, ...] | None = None  # one entry a layer; None sees everything

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        windows = self.sliding_windows
        if windows is not None and len(windows) != self.num_hidden_layers:
            raise ValueError(
                f"sliding_windows has {len(windows)} entries for {self.num_hidden_layers} layers"
            )


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

    def __call__(self, qkv, positions, rotary, layer_cache, blanks):
        """What tokens attend to, before `out`, from their queries, keys and values.

        Args:
          qkv: [B, T, (H + 2 K) * D].
          positions, rotary, layer_cache: where the tokens are, and what was before them.
          blanks: length of the array that `macko_jax.fused_chain` needs for what follows.

        Returns:
          [B, T, H * D]; the layer's cache with these tokens; and that array, or None.
        """
        batch, length, _ = qkv.shape
        blank = None
        qkv = qkv.reshape(batch, length, self.heads + 2 * self.kv_heads, self.head_dim)
        query, key, value = jnp.split(qkv, [self.heads, self.heads + self.kv_heads], axis=2)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if layer_cache is not None and length == 1 and _has_decode_kernel(layer_cache):
            if self.query_norm is not None:
                qkv = jnp.concatenate([query, key, value], axis=2)
            mixed, layer_cache, blank = _decode_kernel().attend(
                qkv.reshape(batch, -1),
                rotary,
                layer_cache,
                positions[:, 0],
                heads=self.heads,
                window=self.window,
                blanks=blanks,
            )
        else:
            query, key = _rotate(query, rotary), _rotate(key, rotary)
            new = jnp.stack([key, value], axis=3).swapaxes(1, 2)
            whole = layer_cache is None
            layer_cache = new if whole else _write(layer_cache, new, positions)
            if whole and _fits_flash_attention(query, self.window):
                mixed = jax.nn.dot_product_attention(
                    query, key, value, is_causal=True, implementation="cudnn"
                )
            else:
                mixed = _attention(query, layer_cache, positions, self.window)
        return mixed.reshape(batch, length, self.heads * self.head_dim), layer_cache, blank


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


def _chain(x, steps, packed, dropout=None, blank=None):
    """Applies steps, each to the result of the one before: the results kept, and the last.

    `packed` is `_packed(steps)`. Packed layers are given all of a step, since for one token they do
    that in one kernel. Dropout applies to what is added to something.
    """
    if dropout is None and packed is not None:
        return flax_nnx.chain(x, packed, blank=blank)
    return in_turn(x, steps, functools.partial(_apply, dropout=dropout))


def _apply(x, step, dropout):
    """One step of a chain."""
    linear, norm, gated, add, _ = step
    if isinstance(linear, flax_nnx.MackoLinear) and dropout is None:
        return linear.fused(x, norm=norm, gated=gated, add=add)
    x = x if norm is None else rms_norm(x, *norm)
    y = linear(swiglu(x) if gated else x)
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
        needed = blanks(packed) if packed else 0
        mixed, layer_cache, blank = self.attention(qkv, positions, rotary, layer_cache, needed)
        x, *qkv = _chain(mixed, steps, packed, dropout, blank)
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


# Rotary position embeddings (Su et al., arXiv 2104.09864), halves rotated against each other.


def rotary_frequencies(config):
    """Angular frequency of each of the head_dim / 2 rotated pairs, float32."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        # Wavelengths per original context: many stay, few are stretched, a ramp lies between.
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        ramp = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        keep = jnp.clip(ramp, 0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / scaling.factor
    raise ValueError(f"rope scaling {scaling.kind!r} is not supported; use 'linear' or 'llama3'")


def rotation(positions, config):
    """(cos, sin), each [B, T, 1, D/2] float32."""
    angles = positions[..., None, None].astype(jnp.float32) * rotary_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x, rotary):
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


# Attention over the tokens of one call, and over a cache.


@functools.cache
def _flash_attention():
    """Whether cuDNN's fused attention serves the default device."""
    if jax.default_backend() != "gpu":
        return False
    query = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)

    def loss(query, key, value):
        mixed = jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )
        return mixed.astype(jnp.float32).sum()

    try:
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key).compile()
    except Exception:  # whatever is missing (cuDNN, a supported GPU), XLA's attention remains
        return False
    return True


def _fits_flash_attention(query, window):
    """Whether cuDNN serves the queries [B, T, H, D] of whole sequences."""
    length, narrow = query.shape[1], query.dtype in (jnp.bfloat16, jnp.float16)
    whole = window is None or window >= length
    return narrow and whole and length % 64 == 0 and _flash_attention()


def _decode_kernel():
    from examples.llama import decode_attention  # half a second of imports that only GPUs need

    return decode_attention


def _has_decode_kernel(layer_cache):
    """Whether a kernel rotates one token, adds it to a cache and attends to the live slots."""
    return jax.default_backend() == "gpu" and _decode_kernel().fits(layer_cache)


def _attention(query, layer_cache, positions, window):
    """Attention of queries [B, T, H, D] at `positions` [B, T] over the slots of a cache."""
    keys, values = layer_cache[..., 0, :], layer_cache[..., 1, :]
    batch, length, heads, head_dim = query.shape
    kv_heads, slots = keys.shape[1:3]
    # Rows of queries per key head, so that both products run along the cache as it lies in memory.
    query = query.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    wide = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bkgtd,bksd->bkgts", query, keys, **wide) / math.sqrt(head_dim)
    # A slot holds the key of the position of that number: later slots are empty or padding.
    slot, position = jnp.arange(slots), positions[:, None, None, :, None]
    visible = slot <= position
    if window is not None:
        visible &= slot > position - window
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkgts,bksd->bkgtd", weights, values, **wide).astype(query.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


# The KV cache.


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["layers", "lengths"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values seen so far.

    layers: for each layer its keys and values, [B, K, S, 2, D].
    lengths: [B] int32, tokens held per sequence. Slots beyond are never visible, so prompts of
      unequal length are padded at their end and `lengths` set back to the true ones.
    """

    layers: tuple
    lengths: jax.Array

    @property
    def slots(self):
        return self.layers[0].shape[2]


@functools.partial(jax.jit, static_argnames="slots")
def widen(cache, slots):
    """The cache with empty slots added, up to `slots` in all."""
    more = [(0, 0), (0, 0), (0, slots - cache.slots), (0, 0), (0, 0)]
    return dataclasses.replace(cache, layers=tuple(jnp.pad(layer, more) for layer in cache.layers))


def _write(layer_cache, new, positions):
    """The cache of a layer with the keys and values [B, K, T, 2, D] of some positions."""
    new = new.astype(layer_cache.dtype)
    if len(layer_cache) == 1:  # one sequence: a slice update, which XLA does in place
        return jax.lax.dynamic_update_slice(layer_cache, new, (0, 0, positions[0, 0], 0, 0))
    rows = jnp.arange(len(layer_cache))[:, None]
    return layer_cache.at[rows, :, positions].set(new.swapaxes(1, 2))


# Generation.

SMALLEST_CACHE = 512  # slots, unless a generation needs fewer


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature 0 takes the likeliest token. Otherwise logits are divided by the temperature,
    and what is drawn from is cut to the `top_k` likeliest tokens and to the fewest tokens that
    hold `top_p` of the probability.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None (no cut), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    def __call__(self, key, logits):
        """Tokens [B] drawn from logits [B, vocab]."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p < 1:
            ranked = jnp.sort(logits, axis=-1, descending=True)
            before = jnp.cumsum(jax.nn.softmax(ranked), axis=-1) - jax.nn.softmax(ranked)
            least = jnp.min(jnp.where(before < self.top_p, ranked, jnp.inf), -1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What modules are but their arrays, as jitted functions tell their arguments apart.

    Every call of such a function asks for the hash, which for a graph of modules takes
    milliseconds; here it is computed once.
    """

    graph: nnx.GraphDef
    tree: jax.tree_util.PyTreeDef

    def __eq__(self, other):
        return self is other or (
            isinstance(other, Structure) and self.graph == other.graph and self.tree == other.tree
        )

    @functools.cached_property
    def _hash(self):
        return hash((self.graph, self.tree))

    def __hash__(self):
        return self._hash


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["structure"]
)
@dataclasses.dataclass(frozen=True)
class Piece:
    """Modules taken apart, as an argument of jitted functions."""

    structure: Structure
    arrays: tuple

    @classmethod
    def of(cls, modules):
        """Of a module, or a list or tuple of some."""
        graph, state = nnx.split(modules)
        arrays, tree = jax.tree.flatten(state)
        return cls(Structure(graph, tree), tuple(arrays))

    def build(self):
        """The modules again."""
        return nnx.merge(self.structure.graph, jax.tree.unflatten(self.structure.tree, self.arrays))


LAYERS_A_CALL = 4  # of a prefill; preparing a call takes the host some 0.6 to 1.2 ms


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ends", "layers"], meta_fields=["config"]
)
@dataclasses.dataclass(frozen=True)
class Parts:
    """A model taken apart, once, since that takes milliseconds.

    ends: embedding, last norm and head.
    layers: every `LAYERS_A_CALL` of the layers, of one structure where they are alike.
    """

    config: Config
    ends: Piece
    layers: tuple[Piece, ...]

    @classmethod
    def of(cls, model):
        blocks, layers, known = list(model.layers), [], {}
        for first in range(0, len(blocks), LAYERS_A_CALL):
            piece = Piece.of(blocks[first : first + LAYERS_A_CALL])
            structure = known.setdefault(piece.structure, piece.structure)
            layers.append(dataclasses.replace(piece, structure=structure))
        ends = Piece.of((model.embed, model.norm, model.head))
        return cls(model.config, ends, tuple(layers))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["token", "cache", "key", "drawn"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Generation:
    """Where a generation stands.

    token: [B] the last tokens drawn, not yet in the cache.
    cache: keys and values of everything before.
    key: of all draws; the i-th uses `fold_in(key, i)`, however draws are shared out to calls.
    drawn: int32, how many tokens have been drawn for each prompt.
    """

    token: jax.Array
    cache: Cache
    key: jax.Array
    drawn: jax.Array


def prefill(parts, tokens, lengths, key, sampling):
    """Reads the prompts and draws the first token after each.

    The device is given some layers at a time: it starts on the first while the host prepares the
    others, and layers that are alike share compiled code.

    Args:
      parts: the model.
      tokens: [B, T] prompts, padded at the end.
      lengths: [B] true lengths.
      key, sampling: how tokens are drawn.

    Returns:
      A `Generation` with a cache of T slots.
    """
    x, layer_caches = embed(parts.ends, tokens), []
    for piece in parts.layers:
        x, more = read(piece, x, parts.config)
        layer_caches += more
    return first_token(parts.ends, x, Cache(tuple(layer_caches), lengths), key, sampling)


@jax.jit
def embed(ends, tokens):
    """The stream [B, T, E] of tokens [B, T] before the first layer."""
    table, _, _ = ends.build()
    return table(tokens)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="x")
def read(piece, x, config):
    """The stream of prompts after some layers, and these layers' caches; x is consumed."""
    x, cache = through(piece.build(), x, config)
    return x, cache.layers


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def first_token(ends, x, cache, key, sampling):
    """The `Generation` after the first draw, from the last layer's x; the cache is consumed."""
    table, norm, head = ends.build()
    last = jnp.take_along_axis(norm(x), (cache.lengths - 1)[:, None, None], axis=1)[:, 0]
    token = sampling(jax.random.fold_in(key, 0), logits(table, head, last))
    return Generation(token, cache, key, jnp.int32(1))


@functools.partial(jax.jit, static_argnames=("steps", "sampling"), donate_argnames="generation")
def decode(parts, generation, steps, sampling):
    """Draws `steps` further tokens on the device, without a visit to the host.

    Args:
      parts: the model.
      generation: where to go on, with `steps` free slots at least; it is consumed.
      steps, sampling: how many tokens are drawn, and how.

    Returns:
      Tokens [B, steps], and the `Generation` after them.
    """

    def step(now, _):
        # Built inside the loop: the modules are then traced at the loop's own level.
        table, norm, head = parts.ends.build()
        blocks = [block for piece in parts.layers for block in piece.build()]
        x, cache = through(blocks, table(now.token[:, None]), parts.config, now.cache)
        key = jax.random.fold_in(now.key, now.drawn)
        token = sampling(key, logits(table, head, norm(x)[:, 0]))
        return Generation(token, cache, now.key, now.drawn + 1), token

    generation, tokens = jax.lax.scan(step, generation, length=steps)
    return tokens.T, generation


def generate(model, prompts, new_tokens, *, sampling=Sampling(), seed=0, chunk=32):
    """Continues prompts, yielding the new tokens in chunks as they come.

    Args:
      model: a `Llama`, dense or with substituted layers, or its `Parts`, which saves taking it apart
        again for every call (some 20 ms for 32 layers).
      prompts: B sequences of token ids, each of at least one token.
      new_tokens: how many tokens to draw for each prompt.
      sampling: how tokens are drawn.
      seed: of the random draws.
      chunk: tokens per yield; a larger chunk visits the host less often.

    Yields:
      [B, n] int32 arrays on the host, `new_tokens` columns in all: one column, then chunks.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("generate needs at least one prompt, each of at least one token")
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")
    parts = model if isinstance(model, Parts) else Parts.of(model)
    longest = int(lengths.max())
    if longest + new_tokens > parts.config.max_position_embeddings:
        raise ValueError(
            f"the longest prompt ({longest} tokens) and {new_tokens} new tokens exceed the "
            f"model's {parts.config.max_position_embeddings} positions; shorten one of them"
        )
    padded = np.zeros((len(prompts), _round_up(longest)), np.int32)
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = prompt
    calls = draw(parts, padded, lengths, new_tokens, jax.random.key(seed), sampling, chunk)
    left = new_tokens
    for tokens in one_ahead(calls):
        yield jax.device_get(tokens)[:, :left]
        left -= tokens.shape[1]


def one_ahead(calls):
    """The results of calls, each after the next call is queued: the device need not wait."""
    for result, _ in itertools.pairwise(itertools.chain(calls, [None])):
        yield result


def draw(parts, tokens, lengths, new_tokens, key, sampling, chunk):
    """The calls of the device behind `generate`.

    Args:
      parts: the model.
      tokens, lengths: prompts [B, T], padded at the end, and their true lengths [B], NumPy arrays.
      new_tokens: how many tokens are wanted; the last chunk may hold more.
      key, sampling: how tokens are drawn.
      chunk: tokens per call.

    Yields:
      Tokens on the device, without waiting for them: [B, 1] after the prompts, then [B, chunk].
    """
    live = int(lengths.max())
    full = final_slots(live, new_tokens, chunk)
    generation = prefill(parts, tokens, lengths, key, sampling)
    yield generation.token[:, None]
    for _ in range(0, new_tokens - 1, chunk):
        cache = generation.cache
        if cache.slots < live + chunk:
            enough = full if _has_decode_kernel(cache.layers[0]) else cache_slots(live + chunk)
            generation = dataclasses.replace(generation, cache=widen(cache, min(enough, full)))
        live += chunk
        drawn, generation = decode(parts, generation, chunk, sampling)
        yield drawn


def final_slots(prompt, new_tokens, chunk):
    """Slots that a generation needs at its end, when the last chunk has been drawn whole."""
    return _round_up(prompt + _round_up(new_tokens - 1, chunk))


def cache_slots(live):
    """Slots to hold `live` tokens: 512, 768, 1024, 1536, 2048, ..., of which a third may be empty.

    Where attention passes over every slot its work then follows the live length, and few sizes mean
    few compilations.
    """
    octave = SMALLEST_CACHE
    while octave < live:
        octave *= 2
    halfway = octave * 3 // 4
    return halfway if octave > SMALLEST_CACHE and live <= halfway else octave


def _round_up(count, multiple=64):
    return -(-count // multiple) * multiple
