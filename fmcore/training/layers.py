"""What a decoder's layers are prepared with before training: compiled, or computed again instead of kept."""

import functools
import os
from collections.abc import Sequence

import psutil
import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fmcore.errors import RecipeError
from fmcore.model.build import decoder_of

# torch.compile pays where the steps it shortens are worth more than the seconds it takes, each time a training is
# started. On a CPU three times what benchmarks/compiling.py measured at 9 M; on a GPU from published ratios.
COMPILE_FLOPS = {"cpu": 1e14, "cuda": 1e17}
TRAINED_BYTES = 16  # per trained parameter: weight, gradient and two moments, fp32
COPY_BYTES = 12  # per trained parameter of what is copied to be saved: weight and moments, in the CPU's memory
COUNTED_TOKENS = 1024  # a row of them is computed to count what it needs
USABLE = 0.85  # of the free memory; the rest is for what the allocator cannot use


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder's layers: the longest list of modules in it."""
    lists = [child for child in decoder_of(model).children() if isinstance(child, torch.nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def pays_to_compile(flops: float, device: torch.device) -> bool:
    """Whether a training of so many FLOPs is worth compiling for. The same training always gets the same answer."""
    return flops >= COMPILE_FLOPS.get(device.type, float("inf"))


def compile_layers(layers: Sequence[torch.nn.Module], device: torch.device) -> None:
    """Have each layer's forward compiled when it is first run; static shapes, so that layers share one program.

    Raises RecipeError where this machine cannot compile.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler shows as many kinds
        first = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"execution.compile: this machine cannot compile ({first}); install a C++ compiler, or set it to off"
        ) from error
    for layer in layers:
        # forward alone: the hooks of FSDP2, which come after, stay outside
        layer.forward = torch.compile(layer.forward, dynamic=False)


def recompute(layers: Sequence[torch.nn.Module]) -> None:
    """Keep no activations of these layers: the backward pass computes them again, to the same bits."""
    for layer in layers:
        # forward alone, so that hooks that gather a layer's weights run once
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def kept_bytes(model: PreTrainedModel, seq_len: int) -> int:
    """Bytes that the backward pass needs of one row of seq_len tokens: counted, on a real forward pass.

    Of two documents, as packed rows have them; of long rows a part is counted.
    """
    tokens = min(seq_len, COUNTED_TOKENS)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    row = torch.arange(tokens)[None]
    positions = row % -(-tokens // 2)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = decoder_of(model)(
            input_ids=row % model.get_input_embeddings().num_embeddings, position_ids=positions, use_cache=False
        ).last_hidden_state
    del hidden  # alive until here, so that no two tensors had the same place
    return sum(kept.values()) * seq_len // tokens


def layers_to_recompute(
    model: PreTrainedModel, *, rows: int, seq_len: int, num_bytes: int, world: int, device: torch.device
) -> int:
    """How many layers' activations cannot be kept in the memory that is free.

    rows: of a micro-batch; num_bytes: of a number in the activations (4 in fp32, 2 in bf16); world: processes that
    share the model.
    """
    layers = decoder_layers(model)
    if not layers:
        return 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    state = (TRAINED_BYTES * trained + 4 * (total - trained)) / world
    if num_bytes < 4 and world == 1:
        state += num_bytes * total  # what is computed with stays beside the fp32 weights
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        state += COPY_BYTES * trained / world
    kept = kept_bytes(model, seq_len) * rows * num_bytes / 4
    missing = state + kept - USABLE * free
    if missing <= 0:
        return 0
    per_layer = kept / len(layers) - rows * seq_len * model.config.hidden_size * num_bytes  # its input is kept
    return min(len(layers), -int(-missing // max(1.0, per_layer)))
