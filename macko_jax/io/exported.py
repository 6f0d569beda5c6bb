"""Matrices as arguments of functions that `jax.export` serializes.

What is serialized of a pytree's type is the text of its metadata; `Exported.serialize` and
`jax.export.deserialize` need nothing but that this package is imported in both programs.
"""

import json

import jax.export

from macko_jax.format.factors import FactorizedKernel
from macko_jax.format.matrix import MackoMatrix
from macko_jax.format.validate import check_metadata


def _to_bytes(metadata) -> bytes:
    shape, encoding, lanes = metadata
    return json.dumps({"shape": list(shape), "encoding": encoding, "lanes": lanes}).encode()


def _from_bytes(text) -> tuple:
    try:
        described = json.loads(bytes(text))
        metadata = tuple(described["shape"]), described["encoding"], described["lanes"]
        check_metadata(*metadata)
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"an exported function takes a MackoMatrix whose description is damaged ({error}); "
            "export it again"
        ) from error
    return metadata


def register() -> None:
    """Tells `jax.export` how the types of this package are written."""
    jax.export.register_pytree_node_serialization(
        MackoMatrix,
        serialized_name="macko_jax.MackoMatrix",
        serialize_auxdata=_to_bytes,
        deserialize_auxdata=_from_bytes,
    )
    jax.export.register_pytree_node_serialization(
        FactorizedKernel,
        serialized_name="macko_jax.FactorizedKernel",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
    )
