"""The state of a refinement on disk, so that a run that was killed goes on where it was."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from dsf_jax.pipeline.resume import claim, fingerprint


class Checkpoints:
    """A directory of Orbax checkpoints of one run.

    Orbax renames a checkpoint to its place once it is whole, so that a killed run leaves none that
    is half written.

    Args:
      path: The directory; it is made if there is none.
      mark: The run's fingerprint.

    Raises:
      ValueError: The directory holds another run, or a checkpoint that is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], mark: str):
        # Imported only where it is used: it takes seconds.
        from orbax import checkpoint as orbax

        self.orbax, self.path = orbax, pathlib.Path(path).absolute()
        claim(self.path, mark, "model, teacher, batches or settings")
        options = orbax.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        with self._reading():
            self.manager = orbax.CheckpointManager(self.path / "checkpoints", options=options)

    def save(self, step: int, state: Any, known: dict[str, Any]) -> None:
        """Writes a state, and what is known beside it as JSON."""
        arguments = self.orbax.args
        if step == self.manager.latest_step():  # a run that stopped says so; the one before stays
            self.manager.delete(step)
        self.manager.save(
            step,
            args=arguments.Composite(
                state=arguments.StandardSave(state),
                known=arguments.JsonSave({"known": known, "checksum": fingerprint(known)}),
            ),
        )

    def load(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest state and what is known beside it; None where there is none.

        Args:
          like: A state of the same structure, shapes, dtypes and shardings.

        Raises:
          ValueError: The checkpoint is damaged.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        arguments = self.orbax.args
        abstract = jax.tree.map(self.orbax.utils.to_shape_dtype_struct, like)
        with self._reading():
            found = self.manager.restore(
                step,
                args=arguments.Composite(
                    state=arguments.StandardRestore(abstract), known=arguments.JsonRestore()
                ),
            )
            told = found["known"]
            if told["checksum"] != fingerprint(told["known"]):
                raise ValueError("its numbers do not match their checksum")
        return found["state"], told["known"]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Names the directory in what Orbax raises for damaged files, which is of many types."""
        try:
            yield
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{self.path / 'checkpoints'} holds a checkpoint that is damaged ({said}). Remove "
                "the folder of its last step, and the run goes on from the one before"
            ) from error

    def close(self) -> None:
        self.manager.close()
