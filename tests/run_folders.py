"""What tests of the experiments share: to start a run, and to read what it left behind."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import config, report

ROOT = Path(__file__).parents[1]
TIMES = ('train_seconds', 'steps_per_second', 'seconds', 'images_per_second')


def main(experiment: Any, *arguments: str) -> None:
    """An experiment, from its command line on, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['experiment', *arguments])
        recipes = getattr(experiment, 'RECIPES', None)
        config.command_line(experiment.run, experiment.DEFAULTS, experiment.__doc__, recipes)


def refused(capfd: pytest.CaptureFixture[str], experiment: Any, *arguments: str) -> str:
    """The one line on stderr, after exit code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(experiment, *arguments)
    said = capfd.readouterr()
    assert exit_.value.code == 2
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith('error: ')
    assert said.out == ''
    return lines[0]


@contextlib.contextmanager
def interrupted_in_the_second_epoch() -> Iterator[None]:
    """Of a run with one dispatch an epoch: after its steps and before its row."""
    advance, calls = report.Report.advance, []

    def interrupted(self: report.Report, done: int) -> None:
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt
        advance(self, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.Report, 'advance', interrupted)
        yield


def state_of(out: Path, epoch: int | None = None) -> dict[str, Any]:
    """The newest checkpoint, or that of an epoch, read without the code under test."""
    folders = (folder for folder in (out / 'checkpoints').iterdir() if folder.name.isdecimal())
    epoch = epoch or max(int(folder.name) for folder in folders)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        found = checkpointer.restore((out / 'checkpoints' / str(epoch)).absolute(), args=args)
    return jax.tree.map(np.asarray, found['state'])


def params_of(out: Path, epoch: int | None = None) -> dict[str, Any]:
    return state_of(out, epoch)['params']


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / 'summary.json').read_text())


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """A row per epoch."""
    return [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TIMES}
