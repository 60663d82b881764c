"""AdamW's parameter groups, and its state through safetensors."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fmcore.training.optimizer import load_state, make_adamw, state_tensors


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2))


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    model(rows).square().sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def names(model: torch.nn.Module) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def test_groups() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = make_adamw(model.named_parameters(), betas=(0.8, 0.9), weight_decay=0.3)
    found = {names(model)[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert found == {"2.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.bias": 0.0}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}


def test_state_round_trip_continues_exactly(tmp_path: Path) -> None:
    """Three steps, saved and loaded into a new optimizer, three more: the bits of six in a row."""
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    model = network()
    optimizer = make_adamw(model.named_parameters(), **settings)
    for seed in range(3):
        step(model, optimizer, seed)
    save_file(state_tensors([optimizer], names(model)), tmp_path / "optimizer.safetensors")
    copy, cold = network(), network()
    copy.load_state_dict(model.state_dict())
    cold.load_state_dict(model.state_dict())
    resumed = make_adamw(copy.named_parameters(), **settings)
    load_state([resumed], names(copy), load_file(tmp_path / "optimizer.safetensors"))
    without = make_adamw(cold.named_parameters(), **settings)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(copy, resumed, seed)
        step(cold, without, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), cold.parameters(), strict=True))
