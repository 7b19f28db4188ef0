"""The hybrid step: one batch, one Adam step of the discriminator, one of the flow.

Written so that it can be captured as a CUDA graph: static shapes, no host reads, random numbers from the
device's default generator, the step count and every schedule in device tensors.
"""

import torch
from torch import Tensor, nn

from hybridflow.config import ObjectiveConfig, OptimiserConfig
from hybridflow.data import Batches
from hybridflow.discriminator import Discriminator
from hybridflow.errors import InputError
from hybridflow.flow import MixtureFlow, dequantise
from hybridflow.objective import (
    adversarial_d,
    adversarial_g,
    boundary_sample,
    joint_nll,
    nll,
    pseudo_label,
    supervised,
)
from hybridflow.phases import phase

__all__ = ["HybridStep"]


class HybridStep:
    """One call trains discriminator and flow on one batch of labelled and one of unlabelled data.

    Args:
        model: flow and mixture, θ.
        discriminator: φ.
        labelled, unlabelled: where the batches come from.
        levels: grey levels of the data, None for continuous data.
        terms: weights; a term of weight 0 is not computed, but for `sup_d`, which is always shown.
        optimiser: Adam, clipping, schedule and averaging.
        total_steps: length of the schedule.
        autocast: whether the networks run in bfloat16.
    """

    def __init__(
        self,
        model: MixtureFlow,
        discriminator: Discriminator,
        labelled: Batches,
        unlabelled: Batches,
        *,
        levels: int | None,
        terms: ObjectiveConfig,
        optimiser: OptimiserConfig,
        total_steps: int,
        autocast: bool = False,
    ) -> None:
        self.model, self.discriminator = model, discriminator
        self.labelled, self.unlabelled = labelled, unlabelled
        self.levels, self.terms = levels, terms
        self.dims = sum(model.flow.latent_sizes)
        self.device = model.prior.means.device
        self.autocast = autocast
        self.total_steps = total_steps
        self.optimiser_config = optimiser
        self.count = torch.zeros((), dtype=torch.int64, device=self.device)
        self.optimiser_g = self._adam(model, optimiser.lr_g, optimiser.beta1_g)
        self.optimiser_d = self._adam(discriminator, optimiser.lr_d, optimiser.beta1_d)
        self.average_g = _averaged(model)
        self.average_d = _averaged(discriminator)

    def __call__(self) -> dict[str, Tensor]:
        """Train on the next batch; returns each term's value and the two losses, 0-d tensors."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self._step()

    def _step(self) -> dict[str, Tensor]:
        w = self.terms
        with phase("data"):
            x_l, y = self.labelled.next()
            x_u, _ = self.unlabelled.next()
            assert y is not None
            sizes = [len(x_l), len(x_u)]
            x = dequantise(torch.cat((x_l, x_u)), self.levels)

        with phase("flow"):
            joint = self.model.joint_log_prob(x)
            joint_l, joint_u = joint.split(sizes)
        if w.w_adv_d or w.w_adv_g:
            with phase("sampling"):
                z_k, soft_labels = boundary_sample(self.model.prior, len(x_u), w.beta)
                z_n = torch.randn(len(x_u), self.model.flow.latent_sizes[1], device=self.device)
                generated = self.model.inverse(z_k, z_n)
                sizes.append(len(generated))
                x = torch.cat((x, generated.detach()))

        with phase("discriminator"):
            l_l, l_u, *l_generated = self.discriminator(x).split(sizes)
            terms_d = {"sup_d": supervised(l_l, y)}
            if w.w_adv_d:
                terms_d["adv_d"] = adversarial_d(l_u, *l_generated)
            if w.w_pl_d:
                terms_d["pl_d"] = pseudo_label(l_u, joint_u.softmax(1))
            loss_d = self._weighted(terms_d)
        with phase("backward of the discriminator"):
            gradients = _gradients(loss_d, self.discriminator)
        with phase("optimisers"):
            self._update(self.optimiser_d, gradients)

        with phase("objective of the flow"):
            terms_g = {}
            if w.w_sup_g:
                terms_g["sup_g"] = supervised(joint_l, y, w.threshold)
            if w.w_nll:
                terms_g["nll"] = nll(joint, self.dims)
            if w.w_joint:
                terms_g["joint"] = joint_nll(joint_l, y, self.dims) + nll(joint_u, self.dims)
            if w.w_adv_g:
                terms_g["adv_g"] = adversarial_g(self.discriminator(generated), soft_labels)
            if w.w_pl_g:
                terms_g["pl_g"] = pseudo_label(joint_u, l_u.softmax(1))
            loss_g = self._weighted(terms_g)
        with phase("backward of the flow"):
            gradients = _gradients(loss_g, self.model)
        with phase("optimisers"):
            self._update(self.optimiser_g, gradients)
            self._advance()

        terms = {"loss_d": loss_d, **terms_d, "loss_g": loss_g, **terms_g}
        return {name: value.detach() for name, value in terms.items()}

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        return torch.stack(
            [getattr(self.terms, f"w_{name}") * t for name, t in terms.items()]
        ).sum()

    def _update(self, optimiser: torch.optim.Optimizer, gradients: tuple[Tensor, ...]) -> None:
        """One Adam step, at the learning rate of the schedule."""
        parameters = optimiser.param_groups[0]["params"]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = _laid_out_as(parameter, gradient)
        nn.utils.clip_grad_norm_(parameters, self.optimiser_config.clip, foreach=True)
        optimiser.step()

    def _advance(self) -> None:
        """Average the weights, count the step, set the next learning rates: all on the device."""
        config = self.optimiser_config
        t = self.count
        weight = 1 - torch.clamp((1 + t) / (10 + t), max=config.ema_decay)
        _move_towards(self.average_g, self.model, weight)
        _move_towards(self.average_d, self.discriminator, weight)
        t.add_(1)
        left = (1 - t / self.total_steps) / (1 - config.decay_from)
        self.optimiser_g.param_groups[0]["lr"].copy_(config.lr_g * left.clamp(0, 1))
        self.optimiser_d.param_groups[0]["lr"].copy_(config.lr_d * left.clamp(0, 1))

    def _adam(self, network: nn.Module, lr: float, beta1: float) -> torch.optim.Adam:
        return torch.optim.Adam(
            _trained(network),
            lr=torch.tensor(lr, device=self.device),
            betas=(beta1, 0.999),
            fused=True,
            capturable=self.device.type == "cuda",
        )

    def start_averages(self) -> None:
        """Start the weight averages from the weights as they are now."""
        self.average_g |= _averaged(self.model)
        self.average_d |= _averaged(self.discriminator)

    def averaged_states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """State dicts of the model and of the discriminator with the averaged weights."""
        return (
            {**self.model.state_dict(), **self.average_g},
            {**self.discriminator.state_dict(), **self.average_d},
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the random state, as one flat dictionary."""
        state = _prefixed("labelled", self.labelled.state_dict())
        state |= _prefixed("unlabelled", self.unlabelled.state_dict())
        return state | self._tensors()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict`, in place, so that captured graphs follow.

        Raises:
            InputError: a tensor is missing, or its shape differs.
        """
        for name, tensor in self._tensors().items():
            if name not in state or state[name].shape != tensor.shape:
                got = tuple(state[name].shape) if name in state else "nothing"
                raise InputError(f"state: {name}: got {got}, want shape {tuple(tensor.shape)}")
            tensor.detach().copy_(state[name])
        for name, batches in ("labelled", self.labelled), ("unlabelled", self.unlabelled):
            batches.load_state_dict({k: state[f"{name}.{k}"] for k in batches.state_dict()})

    def _tensors(self) -> dict[str, Tensor]:
        """The live tensors that a step changes."""
        return {
            "count": self.count,
            **_prefixed("model", self.model.state_dict()),
            **_prefixed("discriminator", self.discriminator.state_dict()),
            **_prefixed("average_g", self.average_g),
            **_prefixed("average_d", self.average_d),
            **_prefixed("optimiser_g", _adam_state(self.optimiser_g)),
            **_prefixed("optimiser_d", _adam_state(self.optimiser_d)),
        }


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def _gradients(loss: Tensor, network: nn.Module) -> tuple[Tensor, ...]:
    """Of the network's parameters alone."""
    return torch.autograd.grad(loss, _trained(network), allow_unused=True, materialize_grads=True)


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the parameter's strides, which fused Adam takes for granted."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _averaged(network: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}


@torch.no_grad()
def _move_towards(averages: dict[str, Tensor], network: nn.Module, weight: Tensor) -> None:
    old, new = list(averages.values()), list[Tensor](_trained(network))
    difference = torch._foreach_sub(new, old)
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(old, difference)


def _adam_state(optimiser: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's moments and step counts by parameter number, made now if no step has been taken yet."""
    group = optimiser.param_groups[0]
    state = {"lr": group["lr"]}
    for i, parameter in enumerate(group["params"]):
        of_parameter = optimiser.state[parameter]
        if not of_parameter:
            of_parameter["step"] = torch.zeros((), device=parameter.device)
            of_parameter["exp_avg"] = torch.zeros_like(parameter)
            of_parameter["exp_avg_sq"] = torch.zeros_like(parameter)
        state |= {f"{i}.{name}": tensor for name, tensor in of_parameter.items()}
    return state
