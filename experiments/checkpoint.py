"""Checkpoints of training, by orbax: atomic, the last two kept, a damaged one passed over."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.errors import UsageError

FORMAT = 1
_KEPT = 2


class Checkpoints:
    """The checkpoints in a folder, one per saved epoch, each a state and a few facts about it.

    Args:
      folder: where they lie; created at the first save.
      experiment: the network's name, which a checkpoint must agree with.
      advice: what to do if none of them can be used; ends the error messages.
      say: called with a line when a damaged checkpoint is passed over.
    """

    def __init__(
        self, folder: Path, experiment: str, advice: str, say: Callable[[str], None]
    ) -> None:
        self._folder, self._experiment = folder.absolute(), experiment
        self._advice, self._say = advice, say
        self._damaged: set[int] = set()

    def _epochs(self) -> list[int]:
        """Newest first. Orbax renames a checkpoint to its number once it is complete."""
        if not self._folder.is_dir():
            return []
        names = [path.name for path in self._folder.iterdir()]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def save(self, epoch: int, state: Any, facts: dict[str, Any]) -> None:
        """Saves the state after an epoch, then deletes all but the last two that can be read.

        Raises:
          UsageError: there was no room; the checkpoints before are as they were.
        """
        facts = {
            **facts, 'format': FORMAT, 'experiment': self._experiment, 'epoch': epoch,
            'shapes': _shapes(state.params),
        }  # fmt: skip
        final = self._folder / str(epoch)
        self._remove_unfinished()
        # Only a damaged one can be there: a run goes on from the newest that can be read.
        self._remove(epoch)
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(
                    final,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave(facts)
                    ),
                )
            # A kill before this line leaves a checkpoint that is good but not verified.
            self._digest_file(epoch).write_text(json.dumps(_digests(final)))
        except Exception as error:
            self._remove_unfinished()
            if not _is_no_space(error):
                raise
            good = [saved for saved in self._epochs() if saved not in self._damaged]
            raise UsageError(
                f'no space left to save epoch {epoch} in {self._folder}: free some and --resume; '
                + (f'the checkpoint of epoch {good[0]} is intact' if good else 'none was saved yet')
            ) from error
        self._damaged.discard(epoch)
        good = [saved for saved in self._epochs() if saved not in self._damaged]
        for old in self._damaged.union(good[_KEPT:]):
            self._remove(old)
        self._damaged.clear()

    def _digest_file(self, epoch: int) -> Path:
        return self._folder / f'{epoch}.sha256.json'

    def _remove(self, epoch: int) -> None:
        self._digest_file(epoch).unlink(missing_ok=True)
        shutil.rmtree(self._folder / str(epoch), ignore_errors=True)

    def _verify(self, epoch: int) -> None:
        """Compares the files with their digests.

        Not every flipped bit makes orbax fail, and when it does fail, the reads that it drops may
        print pages when the process ends.

        Raises:
          ValueError: a file is not as it was written.
        """
        try:
            before = json.loads(self._digest_file(epoch).read_bytes())
        except (OSError, ValueError):
            return  # killed before or while they were written
        after = _digests(self._folder / str(epoch))
        for name, digest in before.items():
            if after.get(name) != digest:
                raise ValueError(
                    f'{name} is {"not as it was written" if name in after else "gone"}'
                )

    def _remove_unfinished(self) -> None:
        """Deletes what saves that were killed or found no room have left."""
        for path in self._folder.glob('*.orbax-checkpoint-tmp*'):
            shutil.rmtree(path, ignore_errors=True)

    def _facts(self, epoch: int) -> dict[str, Any]:
        with _checkpointer() as checkpointer:
            found = checkpointer.restore(
                self._folder / str(epoch), args=ocp.args.Composite(facts=ocp.args.JsonRestore())
            )
        return found['facts']

    def _state(self, epoch: int, like: Any) -> Any:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with _checkpointer() as checkpointer:
            found = checkpointer.restore(
                self._folder / str(epoch),
                args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
            )
        return found['state']

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that can be read, and its facts; None if there is none.

        Args:
          like: a state whose structure and placement to restore to: where the checkpoint was
            written, on a GPU or not, plays no part.

        Raises:
          UsageError: the checkpoint is of a later format or another network, or all are damaged.
        """
        epochs = self._epochs()
        for epoch in epochs:
            try:
                self._verify(epoch)
                facts = self._facts(epoch)
                self._check(facts, like)
                state = self._state(epoch, like)
            except UsageError:
                raise
            except Exception as error:  # whatever a truncated file may cause
                self._damaged.add(epoch)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
                self._say(
                    f'the checkpoint of epoch {epoch} is damaged, trying the one before ({reason})'
                )
            else:
                return state, facts
        if epochs:
            raise UsageError(f'no checkpoint in {self._folder} can be read: {self._advice}')
        return None

    def _check(self, facts: dict[str, Any], like: Any) -> None:
        if facts['format'] > FORMAT:
            raise UsageError(
                f'the checkpoint in {self._folder} has format {facts["format"]}, this version '
                f'reads up to {FORMAT}: upgrade svd_jax'
            )
        if facts['experiment'] != self._experiment:
            raise UsageError(
                f'the checkpoint in {self._folder} is of {facts["experiment"]}, not of '
                f'{self._experiment}: {self._advice}'
            )
        if facts['shapes'] != _shapes(like.params):
            raise UsageError(
                f'the checkpoint in {self._folder} holds arrays of other names or shapes: '
                f'{self._advice}'
            )


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    """A checkpointer that does not log the traceback of an exception which is handled here."""
    logger = logging.getLogger('absl')
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            yield checkpointer
    finally:
        logger.setLevel(level)


def _shapes(tree: Any) -> dict[str, list[int]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): list(np.shape(leaf))
        for path, leaf in leaves
    }


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def _is_no_space(error: BaseException) -> bool:
    """Whether a disk or a quota is full; the C++ below orbax tells it in words only."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, 'errno', None) in codes or any(
        os.strerror(code) in str(error) for code in codes
    )
