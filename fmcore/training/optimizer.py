"""AdamW with the usual parameter groups, Muon for matrices if wanted, and their state as plain named tensors."""

from collections.abc import Container, Iterable, Mapping, Sequence

import torch

STATE_NAMES = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")


def make_optimizers(
    kind: str, parameters: Iterable[tuple[str, torch.nn.Parameter]], layers: Iterable[torch.nn.Module], *,
    betas: tuple[float, float], weight_decay: float,
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """The optimizers of all trainable parameters. kind: adamw; or muon, for the matrices of the decoder's layers.

    Muon's update is scaled to the size that AdamW's has (Liu et al. 2025, arXiv 2502.16982), so that one rate serves
    both. Embedding, head, norms and biases stay with AdamW.
    """
    trainable = {name: parameter for name, parameter in parameters if parameter.requires_grad}
    if kind == "adamw":
        return [make_adamw(trainable.items(), betas=betas, weight_decay=weight_decay)]
    inner = {parameter for layer in layers for parameter in layer.parameters() if parameter.ndim == 2}
    matrices = [parameter for parameter in trainable.values() if parameter in inner]
    rest = [(name, parameter) for name, parameter in trainable.items() if parameter not in inner]
    return [
        make_adamw(rest, betas=betas, weight_decay=weight_decay),
        torch.optim.Muon(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
    ]


def make_adamw(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], *, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: weight decay on matrices, none on norms and biases."""
    trainable = [parameter for _, parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=1e-8, fused=True)


def step_unless(bad: torch.Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Update the weights, unless `bad`, a bool on the device.

    AdamW's fused kernels look at it themselves, as they do for torch's GradScaler, so that nobody waits for it: a step
    that is left out touches neither weights nor moments, nor the count of steps. Muon has to be waited for.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif not bad:
            optimizer.step()


def state_tensors(
    optimizers: Sequence[torch.optim.Optimizer], names: dict[torch.Tensor, str]
) -> dict[str, torch.Tensor]:
    """`<parameter>/<state>` -> tensor."""
    return {
        f"{names[parameter]}/{key}": state[key].contiguous()
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key in STATE_NAMES
        if key in state
    }


def empty_state(parameters: Mapping[str, torch.Tensor], there: Container[str]) -> dict[str, torch.Tensor]:
    """`<parameter>/<state>` -> tensor to read into, shaped and spread over processes as the parameter is.

    there: the names that were saved; a parameter that had no state yet has none of them.
    """
    return {
        f"{name}/{key}": torch.zeros(()) if key == "step" else torch.zeros_like(parameter, requires_grad=False)
        for name, parameter in parameters.items()
        for key in STATE_NAMES
        if f"{name}/{key}" in there
    }


def load_state(
    optimizers: Sequence[torch.optim.Optimizer], names: dict[torch.Tensor, str], tensors: dict[str, torch.Tensor]
) -> None:
    """Put saved state back in place of what there is; parameters that had no state yet get none."""
    for optimizer in optimizers:
        optimizer.state.clear()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                state = {key: tensors[f"{name}/{key}"] for key in STATE_NAMES if f"{name}/{key}" in tensors}
                if state:
                    device = parameter.device
                    optimizer.state[parameter] = {key: tensor.to(device) for key, tensor in state.items()}
