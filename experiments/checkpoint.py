"""Checkpoints of training, by orbax: atomic, the last two kept, a damaged one passed over."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.errors import UsageError

FORMAT = 1


def _shapes(tree: Any) -> dict[str, list[int]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): list(np.shape(leaf))
        for path, leaf in leaves
    }


class Checkpoints:
    """The checkpoints in a folder, one per saved epoch, each a state and a few facts about it.

    Args:
      folder: where they lie; created at the first save.
      experiment: the network's name, which a checkpoint must agree with.
      say: called with a line when a damaged checkpoint is passed over.
    """

    def __init__(self, folder: Path, experiment: str, say: Callable[[str], None]) -> None:
        self._folder, self._experiment, self._say = folder.absolute(), experiment, say

    def _epochs(self) -> list[int]:
        """Newest first. Orbax renames a checkpoint to its number once it is complete."""
        if not self._folder.is_dir():
            return []
        return sorted((int(p.name) for p in self._folder.iterdir() if p.name.isdigit()), reverse=True)

    def save(self, epoch: int, state: Any, facts: dict[str, Any]) -> None:
        """Saves the state after an epoch, then deletes all but the last two.

        Raises:
          UsageError: there was no room; the checkpoints before are as they were.
        """
        facts = {
            **facts, 'format': FORMAT, 'experiment': self._experiment, 'epoch': epoch,
            'shapes': _shapes(state.params),
        }  # fmt: skip
        final = self._folder / str(epoch)
        try:
            shutil.rmtree(final, ignore_errors=True)
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                checkpointer.save(
                    final,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave(facts)
                    ),
                )
        except Exception as error:
            if not _no_space(error):
                raise
            good = self._epochs()
            raise UsageError(
                f'no space left to save epoch {epoch} in {self._folder}: free some and --resume; '
                + (f'the checkpoint of epoch {good[0]} is intact' if good else 'none was saved yet')
            ) from error
        for old in self._epochs()[2:]:
            shutil.rmtree(self._folder / str(old), ignore_errors=True)

    def _facts(self, epoch: int) -> dict[str, Any]:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(
                self._folder / str(epoch), args=ocp.args.Composite(facts=ocp.args.JsonRestore())
            )
        return found['facts']

    def _state(self, epoch: int, like: Any) -> Any:
        target = None if like is None else jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(
                self._folder / str(epoch),
                args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
            )
        return found['state']

    def restore(self, like: Any = None) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that can be read, and its facts; None if there is none.

        Args:
          like: a state whose structure and placement to restore to; None gives nested dicts.

        Raises:
          UsageError: the checkpoint is of a later format or another network, or all are damaged.
        """
        epochs = self._epochs()
        for epoch in epochs:
            try:
                facts = self._facts(epoch)
                self._check(facts, like)
                return self._state(epoch, like), facts
            except UsageError:
                raise
            except Exception as error:  # whatever a truncated file may cause
                reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
                self._say(f'the checkpoint of epoch {epoch} is damaged, trying the previous ({reason})')
        if epochs:
            raise UsageError(
                f'no checkpoint in {self._folder} can be read: start again with another --out'
            )
        return None

    def _check(self, facts: dict[str, Any], like: Any) -> None:
        if facts['format'] > FORMAT:
            raise UsageError(
                f'the checkpoint in {self._folder} has format {facts["format"]}, this version reads '
                f'up to {FORMAT}: upgrade svd_jax'
            )
        if facts['experiment'] != self._experiment:
            raise UsageError(
                f'the checkpoint in {self._folder} is of {facts["experiment"]}, not of '
                f'{self._experiment}: choose one of the same network'
            )
        if like is not None and facts['shapes'] != _shapes(like.params):
            raise UsageError(
                f'the checkpoint in {self._folder} holds arrays of other names or shapes: choose '
                'one of the same network and method'
            )


def _no_space(error: BaseException) -> bool:
    text = str(error)
    return any(s in text for s in ('No space left', 'File too large', 'ENOSPC', 'Disk quota'))
