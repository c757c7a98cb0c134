"""The workloads in PyTorch: dense, by its packages for Sparse Variational Dropout, and by hand."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.workloads import NUM_BATCHES, NUM_DATA, WORKLOADS, Program, Variant

Layer = Callable[..., nn.Module]


class _Handwritten:
    """What a user would write: two linear operations, and the noise."""

    weight: torch.Tensor

    def add_log_sigma2(self) -> None:
        self.log_sigma2 = nn.Parameter(torch.full_like(self.weight, -10.0))

    def sample(self, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        return mean + torch.sqrt(variance + 1e-8) * torch.randn_like(mean)

    def kl(self) -> torch.Tensor:
        log_alpha = self.log_sigma2 - 2 * torch.log(self.weight.abs() + 1e-8)
        fit = 0.63576 * torch.sigmoid(-1.87320 - 1.48695 * log_alpha)
        return (fit + 0.5 * F.softplus(-log_alpha)).sum()


class _Linear(nn.Linear, _Handwritten):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.add_log_sigma2()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = F.linear(x * x, self.log_sigma2.exp())
        return self.sample(F.linear(x, self.weight, self.bias), variance)


class _Conv(nn.Conv2d, _Handwritten):
    def __init__(self, inputs: int, outputs: int, size: int, padding: int = 0) -> None:
        super().__init__(inputs, outputs, size, padding=padding)
        self.add_log_sigma2()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = F.conv2d(x * x, self.log_sigma2.exp(), padding=self.padding)
        return self.sample(super().forward(x), variance)


def _layers(implementation: str) -> tuple[Layer, Layer, Callable[[nn.Module], Any]]:
    """The linear layer, the convolution, and the KL of a network of them."""
    if implementation == 'dense':
        return nn.Linear, nn.Conv2d, lambda network: 0.0
    if implementation == 'hand-written':
        return (
            _Linear,
            _Conv,
            lambda network: sum(
                layer.kl() for layer in network.modules() if isinstance(layer, _Handwritten)
            ),
        )
    if implementation == 'cplxmodule':
        from cplxmodule.nn import relevance

        return (
            relevance.LinearVD,
            relevance.Conv2dVD,
            lambda network: sum(relevance.penalties(network)),
        )
    if implementation == 'pytorch-ard':
        import torch_ard

        return torch_ard.LinearARD, torch_ard.Conv2dARD, torch_ard.get_ard_reg
    raise ValueError(f'unknown implementation {implementation!r}')


class _Block(nn.Module):
    """A block of a Transformer, and a classifier for each position."""

    def __init__(self, linear: Layer, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_0, self.norm_1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)
        self.classify = linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm_0(x)
        query, key, value = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm_1(x)), approximate='tanh'))
        return self.classify(x)


def network(workload: str, implementation: str) -> nn.Module:
    """The network of a workload, of an implementation's layers."""
    linear, conv, _ = _layers(implementation)
    if workload == 'lenet300':
        return nn.Sequential(
            nn.Flatten(),
            linear(784, 300), nn.ReLU(), linear(300, 100), nn.ReLU(), linear(100, 10),
        )  # fmt: skip
    if workload == 'lenet5':
        return nn.Sequential(
            conv(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
            conv(20, 50, 5), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), linear(800, 500), nn.ReLU(), linear(500, 10),
        )  # fmt: skip
    if workload == 'vgg':
        layers: list[nn.Module] = []
        channels = 3
        for stage in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
            for features in stage:
                layers += [
                    conv(channels, features, 3, padding=1), nn.BatchNorm2d(features), nn.ReLU(),
                ]  # fmt: skip
                channels = features
            layers.append(nn.MaxPool2d(2))
        head = [nn.Flatten(), linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), linear(512, 10)]
        return nn.Sequential(*layers, *head)
    return _Block(linear, 128, 4, WORKLOADS[workload].classes)


def build(workload: str, variant: Variant) -> Program:
    """The training step of a workload, with fused Adam and the batches on the device."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model = network(workload, variant.implementation).to(device)
    kl = _layers(variant.implementation)[-1]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    inputs, targets = (torch.as_tensor(a, device=device) for a in WORKLOADS[workload].batches())
    if inputs.ndim == 5:  # images: PyTorch has their channels first
        inputs = inputs.permute(0, 1, 4, 2, 3).contiguous()

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = model(x)
        data_term = F.cross_entropy(logits.flatten(0, -2), y.flatten())
        return data_term + kl(model) / NUM_DATA

    if variant.mode == 'compiled':
        loss = torch.compile(loss)

    def run(count: int) -> None:
        for i in range(count):
            optimiser.zero_grad()
            loss(inputs[i % NUM_BATCHES], targets[i % NUM_BATCHES]).backward()
            optimiser.step()
        if device.type == 'cuda':
            torch.cuda.synchronize()

    return Program(run)


def device_peak_bytes() -> int | None:
    """Peak memory of the accelerator, since the start of the process; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
