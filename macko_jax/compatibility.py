"""Which versions of JAX the package is tested with."""

import re
import warnings

OLDEST, NEWEST = (0, 10, 2), (0, 11)  # from the first release to any patch of the second


def check_jax(version: str) -> None:
    """Warns when `version` of JAX is outside the tested range; the package may still work."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST or numbers[:2] > NEWEST:
        warnings.warn(
            f"macko_jax is tested with jax {'.'.join(map(str, OLDEST))} to "
            f"{'.'.join(map(str, NEWEST))}.x, found {version}. If something breaks, install "
            f"'jax>={'.'.join(map(str, OLDEST))},<{NEWEST[0]}.{NEWEST[1] + 1}'.",
            stacklevel=3,
        )
