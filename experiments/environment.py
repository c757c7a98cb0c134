"""What a result was measured on."""

import importlib.metadata
import platform
from typing import Any

import jax

import svd_jax as svd


def environment(*more: str) -> dict[str, Any]:
    """The device, and the versions of what computes on it.

    Args:
      more: further packages to name, as far as they are installed.
    """
    device = jax.devices()[0]
    versions = {'python': platform.python_version(), 'svd_jax': svd.__version__}
    for package in ('jax', 'jaxlib', 'flax', 'optax', 'numpy'):
        versions[package] = importlib.metadata.version(package)
    for package in more:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {'device': f'{device.platform}: {device.device_kind}', 'versions': versions}
