"""The time of a training step: dense and variational, ours beside its peers, in one run.

Every variant runs in a process of its own. They take turns, a chunk of steps each, for several
rounds; a chunk during which other processes had the CPU is run again. So the ratios hold where the
machine's speed drifts; times from different runs do not compare. It needs the extra ``bench``; a
peer that is not installed is left out, and the run says so.

    python -m benchmarks.step_time --workloads lenet300 lenet5 --out step_time.json
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.workloads import MATRIX_PRODUCT, Variant, variants
from experiments.environment import environment
from experiments.report import write_json

# Of one core, while a chunk runs: more than this, and the chunk counts as disturbed.
_DISTURBED = 0.1
_ATTEMPTS = 4
_MODULES = {'cplxmodule': 'cplxmodule', 'pytorch-ard': 'torch_ard'}
_PACKAGES = ('torch', 'cplxmodule', 'pytorch-ard')

WorkloadName = Literal['lenet300', 'lenet5', 'vgg', 'transformer']


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    workloads: tuple[WorkloadName, ...] = ('lenet300', 'lenet5', 'vgg', 'transformer')
    """The networks; Adam, batches of 100 images, or 32 texts of 64 tokens."""
    only: tuple[str, ...] = ()
    """Time only the variants whose name holds one of these, for example jax."""
    rounds: int = 9
    """How often each variant has its turn."""
    seconds: float = 2.0
    """How long a turn lasts; one step at least."""
    out: Path | None = None
    """Write what was measured to this file, as JSON."""


class _Process:
    """A worker, and what it has measured."""

    def __init__(self, workload: str, variant: Variant) -> None:
        self.variant = variant
        self.chunks: list[dict[str, float]] = []
        # A file, not a pipe: nobody reads along, and a full pipe would stop the worker.
        self._errors = tempfile.TemporaryFile('w+')  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'benchmarks.worker', workload, json.dumps(variant)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'},
        )  # fmt: skip
        ready = self._answer()
        self.compile_seconds, self.flops = ready['compile_seconds'], ready['flops']

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or ['nothing on stderr']
            raise RuntimeError(f'{self.variant} failed: {lines[-1]}')
        return json.loads(line)

    def turn(self, seconds: float) -> None:
        """Times one chunk, again if it was disturbed."""
        for _ in range(_ATTEMPTS):
            print(seconds, file=self._process.stdin, flush=True)
            chunk = self._answer()
            if chunk['others_share'] < _DISTURBED:
                break
        self.chunks.append(chunk)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def result(self) -> dict[str, Any]:
        milliseconds = 1000 * np.asarray([chunk['step_seconds'] for chunk in self.chunks])
        low, median, high = np.percentile(milliseconds, [10, 50, 90])
        return {
            **self.variant._asdict(),
            'step_ms': {'p10': low, 'median': median, 'p90': high},
            'rounds_ms': milliseconds.tolist(),
            'disturbed_rounds': sum(c['others_share'] >= _DISTURBED for c in self.chunks),
            'peak_mib': max(chunk['peak_bytes'] for chunk in self.chunks) / 2**20,
            'compile_seconds': self.compile_seconds,
            'flops': self.flops,
        }


def _installed(variant: Variant) -> bool:
    module = _MODULES.get(variant.implementation, variant.framework)
    return importlib.util.find_spec(module) is not None


def _measure(workload: str, options: Options, console: Console) -> list[dict[str, Any]]:
    wanted = options.only or ('',)
    chosen = [v for v in variants(workload) if any(part in str(v) for part in wanted)]
    if not chosen:
        names = ', '.join(map(str, variants(workload)))
        print(f'error: --only {" ".join(options.only)!r} leaves none of: {names}', file=sys.stderr)
        sys.exit(2)
    for variant in chosen:
        if not _installed(variant):
            console.print(f'left out, not installed: {variant}', style='yellow')
    processes: list[_Process] = []
    try:
        with Progress(console=console, transient=True) as progress:
            ready = [v for v in chosen if _installed(v)]
            task = progress.add_task(workload, total=len(ready) * (1 + options.rounds))
            for variant in ready:
                progress.update(task, description=f'{workload}: compiling {variant}')
                try:
                    processes.append(_Process(workload, variant))
                except RuntimeError as error:
                    console.print(str(error), style='red', markup=False)
                progress.advance(task)
            for number in range(options.rounds):
                progress.update(task, description=f'{workload}: round {number + 1}')
                for process in processes:
                    process.turn(options.seconds)
                    progress.advance(task)
        return [process.result() for process in processes]
    finally:
        for process in processes:
            process.close()


def _ratio(slow: dict[str, Any], fast: dict[str, Any]) -> float:
    """How many times as long, round by round, in the median."""
    return float(np.median(np.divide(slow['rounds_ms'], fast['rounds_ms'])))


def ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that count, as far as their variants were measured."""

    def fastest(implementation: str, framework: str) -> dict[str, Any] | None:
        peers = implementation == 'peer'
        of_kind = [
            r for r in results
            if r['framework'] == framework and r['num_samples'] == 1
            and (r['implementation'] != 'dense' if peers else r['implementation'] == implementation)
        ]  # fmt: skip
        return min(of_kind, key=lambda r: r['step_ms']['median'], default=None)

    ours, dense = fastest('svd_jax', 'jax'), fastest('dense', 'jax')
    unchanged = fastest('svd.apply', 'jax')
    product = fastest(MATRIX_PRODUCT.implementation, 'jax')
    peer, their_dense = fastest('peer', 'torch'), fastest('dense', 'torch')
    many = [r for r in results if r['num_samples'] > 1]
    figures = {}
    if ours and peer:
        figures['fastest peer over svd_jax'] = _ratio(peer, ours)
    if ours and dense:
        figures['svd_jax over its dense'] = _ratio(ours, dense)
        figures['memory of svd_jax over its dense'] = ours['peak_mib'] / dense['peak_mib']
    if ours and unchanged:
        figures['svd.apply over svd_jax'] = _ratio(unchanged, ours)
    if peer and their_dense:
        figures['fastest peer over its dense'] = _ratio(peer, their_dense)
    if ours and many:
        figures[f'{many[0]["num_samples"]} draws over 1'] = _ratio(many[0], ours)
    for name, result in (('svd_jax', ours), ('our dense', dense)):
        if result and product:
            # The floor: its own matrix products, at the rate of large ones.
            share = product['flops'] / result['flops']
            figures[f'{name} over its floor'] = _ratio(result, product) * share
    return figures


def _print(workload: str, results: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=f'{workload}: a training step')
    table.add_column('', no_wrap=True)
    for heading in ('ms', 'p10', 'p90', 'MiB', 'compile s'):
        table.add_column(heading, justify='right', no_wrap=True)
    for result in results:
        variant = Variant(**{name: result[name] for name in Variant._fields})
        times = result['step_ms']
        table.add_row(
            str(variant),
            *(f'{times[name]:.2f}' for name in ('median', 'p10', 'p90')),
            f'{result["peak_mib"]:.0f}',
            f'{result["compile_seconds"]:.1f}',
        )
    console.print(table)
    disturbed = sum(result['disturbed_rounds'] for result in results)
    if disturbed:
        console.print(f'chunks during which others had the CPU: {disturbed}', style='yellow')
    for name, value in ratios(results).items():
        console.print(f'{name}: {value:.2f}')
    console.print()


def main(options: Options) -> None:
    console = Console()
    measured: dict[str, Any] = {}
    for workload in options.workloads:
        results = _measure(workload, options, console)
        _print(workload, results, console)
        measured[workload] = {'variants': results, 'ratios': ratios(results)}
    if options.out:
        # Only now is a device taken: the workers had it, and a GPU's memory, to themselves.
        cores = len(os.sched_getaffinity(0))
        facts = {**environment(*_PACKAGES), 'cores': cores, 'workloads': measured}
        write_json(options.out, facts)
        console.print(f'written: {options.out}')


if __name__ == '__main__':
    main(tyro.cli(tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Options), description=__doc__))
