"""Adam with clipping, a schedule and weight averaging, over a network's weights as one vector."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from hybridflow.config import OptimiserConfig

__all__ = ["Optimiser"]


class Optimiser:
    """Trains a network whose trained parameters become views of one vector, in place.

    So each of clipping, Adam and averaging is a single call, whatever the number of layers: of a flow
    of dozens of couplings, hundreds of small ones would take longer than their arithmetic. The learning
    rate lies on the device.

    Args:
        network: its parameters have to stay where they are from now on: load states in place.
        lr: learning rate at the start.
        beta1: Adam's β1.
        config: clipping, schedule and averaging.

    Attributes:
        average: the averaged weights by their names.
        lr: the learning rate of the next step, 0-d.
    """

    def __init__(
        self, network: nn.Module, lr: float, beta1: float, config: OptimiserConfig
    ) -> None:
        self._config, self._lr, self._beta1 = config, lr, beta1
        named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self._orders = [_order(p) for p in self.parameters]
        self.weights = nn.Parameter(self.vector([p.detach() for p in self.parameters]))
        for parameter, view in zip(self.parameters, self.views(self.weights), strict=True):
            parameter.data = view
        self._averaged = self.weights.detach().clone()
        self.average = dict(zip(named, self.views(self._averaged), strict=True))
        device = self.weights.device
        self.lr = torch.tensor(lr, device=device)
        self._taken = torch.zeros((), device=device)
        self._moments = torch.zeros_like(self._averaged), torch.zeros_like(self._averaged)

    def vector(self, tensors: Iterable[Tensor]) -> Tensor:
        """The elements of as many tensors as there are parameters, in the order of these in memory."""
        pairs = zip(tensors, self._orders, strict=True)
        return torch.cat(
            [(t if order is None else t.permute(order)).flatten() for t, order in pairs]
        )

    def views(self, vector: Tensor) -> list[Tensor]:
        """Parts of such a vector in the shapes and memory formats of the parameters, sharing its memory."""
        parts = vector.detach().split([p.numel() for p in self.parameters])
        return [
            v.as_strided(p.shape, p.stride()) for v, p in zip(parts, self.parameters, strict=True)
        ]

    def gradient(self, loss: Tensor) -> Tensor:
        """Of the loss with respect to these weights alone, as one vector."""
        # What the forward kept in float32 the backward takes in float32 too.
        with torch.autocast(loss.device.type, enabled=False):
            gradients = torch.autograd.grad(
                loss, self.parameters, allow_unused=True, materialize_grads=True
            )
            return self.vector(gradients)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """One Adam step along the gradient, whose norm is clipped in place."""
        shrink = self._config.clip / (torch.linalg.vector_norm(gradient) + 1e-6)
        self.weights.grad = gradient.mul_(shrink.clamp(max=1))
        # The function, since a torch.optim.Adam imports the compiler, which takes longer than all else
        # before the first step.
        adam(
            params=[self.weights],
            grads=[gradient],
            exp_avgs=[self._moments[0]],
            exp_avg_sqs=[self._moments[1]],
            max_exp_avg_sqs=[],
            state_steps=[self._taken],
            fused=True,
            capturable=gradient.is_cuda,
            amsgrad=False,
            beta1=self._beta1,
            beta2=0.999,
            lr=self.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
        torch.clear_autocast_cache()  # casts of the weights as they were

    @torch.no_grad()
    def advance(self, count: Tensor, total_steps: int) -> None:
        """Average the weights after `count` + 1 steps (0-d), and set the next learning rate."""
        weight = 1 - torch.clamp((1 + count) / (10 + count), max=self._config.ema_decay)
        self._averaged.lerp_(self.weights, weight)
        left = (1 - (count + 1) / total_steps) / (1 - self._config.decay_from)
        self.lr.copy_(self._lr * left.clamp(0, 1))

    def start_average(self) -> None:
        """Start the average from the weights as they are now."""
        self._averaged.copy_(self.weights.detach())

    def tensors(self) -> dict[str, Tensor]:
        """Adam's live tensors, which a resumed run needs beside weights and averages."""
        first, second = self._moments
        return {"lr": self.lr, "step": self._taken, "exp_avg": first, "exp_avg_sq": second}


def _order(parameter: Tensor) -> list[int] | None:
    """Its dimensions from the slowest to the fastest in memory; None if that is their own order."""
    if parameter.is_contiguous():
        return None
    return sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
