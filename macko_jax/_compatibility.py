"""Which versions of JAX the package is tested with; importing this module checks the one here."""

import re
import warnings

import jax

OLDEST, NEWEST = (0, 10, 2), (0, 12)  # from the first release to any patch of the second


def check_jax(version: str) -> None:
    """Warns when `version` of JAX is outside the tested range; the package may still work."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST or numbers[:2] > NEWEST:
        oldest, newest = (".".join(map(str, numbers)) for numbers in (OLDEST, NEWEST))
        warnings.warn(
            f"macko_jax is tested with jax {oldest} to {newest}.x, found {version}. If something "
            f"breaks, install 'jax>={oldest},<{NEWEST[0]}.{NEWEST[1] + 1}'.",
            stacklevel=2,
        )


check_jax(jax.__version__)
