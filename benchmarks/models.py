"""Models of other libraries, eight couplings each, built as their users build them; and our own chain.

Their conditioners are smooth: at the kink of a ReLU a difference in the last bit becomes a whole sample's
gradient, and fused and unfused gradients could not be compared.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridflow.flow import FlowStep
from hybridflow.flow.multiscale import StepChain
from hybridflow.flow.prior import standard_normal_log_prob

__all__ = ["MODELS", "Density", "chain"]

COUPLINGS = 8


class Density(nn.Module):
    """A flow of any library as `model(x)` → log p(x), (B,)."""

    def __init__(self, flow: Any, log_prob: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.flow = flow
        self._log_prob = log_prob

    def forward(self, x: Tensor) -> Tensor:
        return self._log_prob(self.flow, x)


def _dense(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, outputs)
    )


def normflows(size: int) -> Density:
    import normflows as nf

    flows: list[nn.Module] = []
    for _ in range(COUPLINGS):
        net = _dense(size // 2, size)
        flows += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(size, mode="swap")]
        flows += [nf.flows.ActNorm(size)]
    base = nf.distributions.DiagGaussian(size, trainable=False)
    return Density(nf.NormalizingFlow(base, flows), lambda flow, x: flow.log_prob(x))


def nflows(size: int) -> Density:
    from nflows import distributions, flows, transforms
    from nflows.nn.nets import ResidualNet

    net = partial(ResidualNet, hidden_features=64, activation=nn.functional.silu)
    layers: list[nn.Module] = []
    for i in range(COUPLINGS):
        mask = (torch.arange(size) % 2 == i % 2).float()
        layers += [transforms.ActNorm(size)]
        layers += [transforms.AffineCouplingTransform(mask, net)]
    base = distributions.StandardNormal([size])
    flow = flows.Flow(transforms.CompositeTransform(layers), base)
    return Density(flow, lambda flow, x: flow.log_prob(x))


def zuko(size: int) -> Density:
    import zuko

    options = {"hidden_features": (64, 64), "activation": nn.SiLU}
    flow = zuko.flows.RealNVP(size, transforms=COUPLINGS, **options)
    return Density(flow, lambda flow, x: flow().log_prob(x))


def FrEIA(size: int) -> Density:
    from FrEIA import framework, modules

    flow = framework.SequenceINN(size)
    for i in range(COUPLINGS):
        flow.append(modules.ActNorm)
        flow.append(modules.AffineCouplingOneSided, subnet_constructor=_dense)
        flow.append(modules.PermuteRandom, seed=i)

    def log_prob(flow: Any, x: Tensor) -> Tensor:
        z, log_det = flow(x)
        return standard_normal_log_prob(z) + log_det

    return Density(flow, log_prob)


MODELS: dict[str, Callable[[int], Density]] = {
    "normflows": normflows,
    "nflows": nflows,
    "zuko": zuko,
    "FrEIA": FrEIA,
}


def _convolutions(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 3, padding=1), nn.SiLU(), nn.Conv2d(hidden, outputs, 3, padding=1)
    )


def chain(channels: int, hidden: int, couplings: int) -> StepChain:
    """Our own steps for images, one after the other."""
    kept, moved = (channels + 1) // 2, channels // 2
    return StepChain(
        FlowStep(channels, _convolutions(kept, hidden, 2 * moved), flip=bool(i % 2))
        for i in range(couplings)
    )
