"""How much of a training step is in memory at once."""

import torch

BYTES_A_LATENT = 14
"""Peak of the dense path for each latent of each token, in float32: z and up to two gradients of it, and a mask."""
BYTES_A_PAIR = 70
"""Peak of the sparse path for each active latent of a token: coordinates and values, in both orders, and what sorts them."""

PART_BYTES = {"cpu": 7 * 2**29, "cuda": 7 * 2**32}
"""Of a part of a step, at most, by the two numbers above: 3.5 GiB and 28 GiB."""
SLICES_HELD = 4
"""Slices of latents (ops.py), at most, that ghost gradients and the search for active latents hold beside a part."""


def part_bytes(device: torch.device, weight_bytes: int, slice_bytes: int) -> int:
    """What a part of a step may take on this device.

    PART_BYTES on a CPU, where the system decides what is free. On a GPU that is halved until it fits in what is free there,
    less two sets of gradients and the slices; halved, so that a run that is resumed on a GPU with a little more or less
    memory still cuts its batches alike.

    Args:
        device: of the autoencoder, with its optimiser's state.
        weight_bytes: of the autoencoder, and of a set of gradients.
        slice_bytes: of a slice.
    """
    most = PART_BYTES[device.type]
    if device.type != "cuda":
        return most
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, to be used again
    room = free + cached - 2 * weight_bytes - SLICES_HELD * slice_bytes
    smallest = slice_bytes // 8
    while most > max(room, smallest):
        most //= 2
    return most


def latent_bytes(density: float, sparse: bool) -> float:
    """Peak bytes for each latent of each token.

    Args:
        density: share of latents that are active.
        sparse: which path.
    """
    return density * BYTES_A_PAIR if sparse else BYTES_A_LATENT
