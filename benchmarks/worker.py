"""A process that times one variant of one workload, when told to.

Each variant has a process of its own, so that no framework's threads, memory or compiler get into
another's way. It reads the number of seconds that a chunk shall last, one a line, and writes what
it measured as a line of JSON; the first line that it writes says that it is ready.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.workloads import WORKLOADS, Variant


def resident_bytes(field: str) -> int:
    """``VmRSS``, what the process holds, or ``VmHWM``, the most that it held."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f'no {field} in /proc/self/status')


def _others_seconds() -> float:
    """CPU seconds that other processes have had so far, on all cores."""
    machine, own = psutil.cpu_times(), time.process_time()
    return machine.user + machine.nice + machine.system + getattr(machine, 'steal', 0.0) - own


def _serve(workload: str, variant: Variant) -> None:
    if variant.framework == 'jax':
        from benchmarks import ours as framework
    else:
        from benchmarks import peers as framework  # type: ignore[no-redef]
    imported = resident_bytes('VmRSS')
    steps, flops = framework.build(workload, variant)
    quantum = WORKLOADS[workload].dispatch if variant.mode == 'scan' else 1
    started = time.perf_counter()
    steps(quantum)
    compiled = time.perf_counter() - started
    steps(quantum)
    started = time.perf_counter()
    steps(quantum)
    step_seconds = (time.perf_counter() - started) / quantum
    # From here on, the peak is that of training, not that of compiling.
    Path('/proc/self/clear_refs').write_text('5')
    _write({'compile_seconds': compiled, 'flops': flops})
    for line in sys.stdin:
        count = max(1, round(float(line) / step_seconds / quantum)) * quantum
        others, started = _others_seconds(), time.perf_counter()
        steps(count)
        seconds = time.perf_counter() - started
        step_seconds = seconds / count
        peak = framework.device_peak_bytes()
        _write(
            {
                'step_seconds': step_seconds,
                'others_share': (_others_seconds() - others) / seconds,
                'peak_bytes': resident_bytes('VmHWM') - imported if peak is None else peak,
            }
        )


def _write(message: dict[str, Any]) -> None:
    print(json.dumps(message), file=_ANSWERS, flush=True)


if __name__ == '__main__':
    # Whatever a library prints goes to stderr: stdout is for the answers alone.
    _ANSWERS = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    _serve(sys.argv[1], Variant(*json.loads(sys.argv[2])))
