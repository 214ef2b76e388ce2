"""The rate of matrix products that a device reaches: what model FLOP utilisation is a share of."""

import time

import torch


@torch.inference_mode()
def matmul_rate(device: str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest square product within about `seconds`, 2 n³ for [n, n] by [n, n].

    Args:
        device: cpu or cuda.
        dtype: of the product.
        seconds: how long to try, after one product to warm up.
    """
    n = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, deadline = float("inf"), None
    while deadline is None or time.perf_counter() < deadline:
        start = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        if deadline is None:
            deadline = time.perf_counter() + seconds
        else:
            best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
