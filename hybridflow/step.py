"""The hybrid step: one batch, one Adam step of the discriminator, one of the flow.

Written so that it can be captured as a CUDA graph: static shapes, no host reads, random numbers from the
device's default generator, the step count and every schedule in device tensors.
"""

import torch
from torch import Tensor
from torch.func import functional_call

from hybridflow.config import ObjectiveConfig, OptimiserConfig, Precision, StrongConfig
from hybridflow.data import Batches, strong_view
from hybridflow.discriminator import Discriminator
from hybridflow.errors import InputError
from hybridflow.flow import MixtureFlow, dequantise
from hybridflow.objective import (
    adversarial_d,
    adversarial_g,
    boundary_sample,
    certain_shares,
    class_thresholds,
    consistency,
    feature_matching,
    joint_nll,
    nll,
    pseudo_label,
    supervised,
)
from hybridflow.optimiser import Optimiser
from hybridflow.phases import phase
from hybridflow.precision import arithmetic

__all__ = ["HybridStep"]

_STRONG = StrongConfig()
_FORGET = 0.01  # weight of a batch in the running shares of certain images


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
        strong: ranges of the strong views, of images, that consistency asks for.
        precision: arithmetic of the networks.
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
        strong: StrongConfig = _STRONG,
        precision: Precision = "fp32",
    ) -> None:
        self.model, self.discriminator = model, discriminator
        self.labelled, self.unlabelled = labelled, unlabelled
        self.levels, self.terms, self.strong = levels, terms, strong
        self.dims = sum(model.flow.latent_sizes)
        self.device = model.prior.means.device
        self.precision: Precision = precision
        self.total_steps = total_steps
        self.certain = torch.zeros(len(model.prior.means), device=self.device)
        self.count = torch.zeros((), dtype=torch.int64, device=self.device)
        self.optimiser_g = Optimiser(model, optimiser.lr_g, optimiser.beta1_g, optimiser)
        self.optimiser_d = Optimiser(discriminator, optimiser.lr_d, optimiser.beta1_d, optimiser)

    def __call__(self) -> dict[str, Tensor]:
        """Train on the next batch; returns each term's value and the two losses, 0-d tensors."""
        with arithmetic(self.precision, self.device):
            return self._step()

    def _step(self) -> dict[str, Tensor]:
        w = self.terms
        with phase("data"):
            labelled, y = self.labelled.next()
            unlabelled, _ = self.unlabelled.next()
            assert y is not None
            batches = [labelled, unlabelled]
            if w.w_con_d or w.w_con_g:
                assert self.levels is not None
                batches.append(strong_view(unlabelled, self.strong, self.levels))
            elif w.w_joint_con:
                batches.append(self.unlabelled.another_view())
            sizes = [len(labelled), len(unlabelled)]
            x = dequantise(torch.cat(batches), self.levels)
            x, view = x[: sum(sizes)], x[sum(sizes) :]
            x_u = x[sizes[0] :]

        with phase("flow"):
            flow_sees_view = w.w_con_g or w.w_joint_con
            joint = self.model.joint_log_prob(torch.cat((x, view)) if flow_sees_view else x)
            joint, joint_view = joint[: len(x)], joint[len(x) :]
            joint_l, joint_u = joint.split(sizes)
        seen = [x]
        if w.w_adv_d or w.w_adv_g or w.w_fm_g:
            with phase("sampling"):
                z_k, soft_labels = boundary_sample(self.model.prior, len(x_u), w.beta)
                z_n = torch.randn(len(x_u), self.model.flow.latent_sizes[1], device=self.device)
                generated = self.model.inverse(z_k, z_n)
                seen.append(generated.detach())
        if w.w_con_d:
            seen.append(view)

        with phase("discriminator"):
            logits, *others = self.discriminator(torch.cat(seen)).split([len(s) for s in seen])
            l_l, l_u = logits.split(sizes)
            judged = self._judged(x_u, l_u)
            confidence = self._confidence(judged)
            terms_d = {"sup_d": supervised(l_l, y, smoothing=w.smoothing)}
            if w.w_adv_d:
                terms_d["adv_d"] = adversarial_d(l_u, others[0])
            if w.w_pl_d:
                terms_d["pl_d"] = pseudo_label(l_u, joint_u.softmax(1))
            if w.w_con_d:
                terms_d["con_d"] = consistency(others[-1], judged, confidence)
            loss_d = self._weighted(terms_d)
        with phase("backward of the discriminator"):
            gradient = self.optimiser_d.gradient(loss_d)
        with phase("optimisers"):
            self.optimiser_d.step(gradient)

        with phase("objective of the flow"):
            terms_g = {}
            if w.w_sup_g:
                terms_g["sup_g"] = supervised(joint_l, y, w.threshold, w.smoothing)
            if w.w_nll:
                terms_g["nll"] = nll(joint, self.dims)
            if w.w_joint:
                terms_g["joint"] = joint_nll(joint_l, y, self.dims) + nll(joint_u, self.dims)
            if w.w_joint_con:
                terms_g["joint_con"] = joint_nll(joint_view, joint_u.argmax(1), self.dims)
            if w.w_adv_g:
                terms_g["adv_g"] = adversarial_g(self.discriminator(generated), soft_labels)
            if w.w_fm_g:
                features = self.discriminator.features(torch.cat((generated, x_u)))
                terms_g["fm_g"] = feature_matching(*features.split(len(generated)))
            if w.w_pl_g:
                terms_g["pl_g"] = pseudo_label(joint_u, judged)
            if w.w_con_g:
                terms_g["con_g"] = consistency(joint_view, judged, confidence)
            loss_g = self._weighted(terms_g)
        with phase("backward of the flow"):
            gradient = self.optimiser_g.gradient(loss_g)
        with phase("optimisers"):
            self.optimiser_g.step(gradient)
            for optimiser in (self.optimiser_g, self.optimiser_d):
                optimiser.advance(self.count, self.total_steps)
            self.count.add_(1)

        terms = {"loss_d": loss_d, **terms_d, "loss_g": loss_g, **terms_g}
        return {name: value.detach() for name, value in terms.items()}

    @torch.no_grad()
    def _judged(self, x: Tensor, logits: Tensor) -> Tensor:
        """p(k | x, real) of unlabelled images for the terms that go by it; `logits` are the current ones."""
        w = self.terms
        if w.teacher == "averaged" and (w.w_con_d or w.w_con_g or w.w_pl_g):
            self.discriminator.eval()
            logits = functional_call(self.discriminator, self.optimiser_d.average, (x,))
            self.discriminator.train()
        return logits.softmax(1)

    def _confidence(self, judged: Tensor) -> float | Tensor:
        """What consistency asks of these probabilities."""
        w = self.terms
        if not w.curriculum:
            return w.confidence
        self.certain.lerp_(certain_shares(judged, w.confidence), _FORGET)
        return class_thresholds(self.certain, w.confidence)

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        return torch.stack(
            [getattr(self.terms, f"w_{name}") * t for name, t in terms.items()]
        ).sum()

    def start_averages(self) -> None:
        """Start the weight averages from the weights as they are now."""
        self.optimiser_g.start_average()
        self.optimiser_d.start_average()

    def averaged_states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """State dicts of the model and of the discriminator with the averaged weights."""
        return (
            {**self.model.state_dict(), **self.optimiser_g.average},
            {**self.discriminator.state_dict(), **self.optimiser_d.average},
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
            **({"certain": self.certain} if self.terms.curriculum else {}),
            **_prefixed("model", self.model.state_dict()),
            **_prefixed("discriminator", self.discriminator.state_dict()),
            **_prefixed("average_g", self.optimiser_g.average),
            **_prefixed("average_d", self.optimiser_d.average),
            **_prefixed("optimiser_g", self.optimiser_g.tensors()),
            **_prefixed("optimiser_d", self.optimiser_d.tensors()),
        }


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
