"""Models that are no Flax modules: what they are, and what to give in their place."""

from typing import Any

# By the package that a model's class, or one of its bases, comes from.
_REMEDIES = {
    "equinox": (
        "an Equinox module; only Flax models are read. macko_jax.compress packs its weights one by "
        "one, [out, in] as Equinox has them, and matrix @ x multiplies by them"
    ),
    "haiku": (
        "a part of Haiku; only Flax models are read. Write the model in Flax, or pack its weights "
        "one by one: macko_jax.compress(w.T)"
    ),
    "transformers": (
        "a model of Hugging Face transformers, which holds a linen module: give model.module, with "
        "variables={'params': model.params}"
    ),
    "torch": "a PyTorch module; only Flax models are read",
    "keras": "a Keras model; only Flax models are read",
}


def describe_other(model: Any) -> str:
    """What a model is that is no Flax module, and the remedy, as the rest of a sentence."""
    kind = type(model)
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
    known = next((_REMEDIES[name] for name in packages if name in _REMEDIES), None)
    if known is None and _looks_like_haiku(model):
        known = _REMEDIES["haiku"]
    name = f"{kind.__module__}.{kind.__qualname__}"
    return f"got {name}" if known is None else f"got {name}: {known}"


def _looks_like_haiku(model: Any) -> bool:
    """Whether it is a `hk.Transformed`: a tuple of functions that are called init and apply."""
    return getattr(model, "_fields", None) == ("init", "apply")
