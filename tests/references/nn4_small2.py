"""nn4.small2 layer by layer in PyTorch, as PAPER.md 3 tells it: the slow, plain truth for tests."""

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, conv2d, linear, max_pool2d, pad, relu

# name: (pool kind, stride of the trained network's pool, stride of the block); the pool branch is projected where weights say so.
BLOCKS = {
    "3a": ("max", 2, 1),
    "3b": ("l2", 3, 1),
    "3c": ("max", 2, 2),
    "4a": ("l2", 3, 1),
    "4e": ("max", 2, 2),
    "5a": ("l2", 3, 1),
    "5b": ("max", 2, 1),
}


def local_response_norm(x: torch.Tensor) -> torch.Tensor:
    """Each channel over (1 + alpha / 5 * squares of it and two neighbours on each side) ** 0.75: Torch divides alpha by the size."""
    out = torch.empty_like(x)
    for channel in range(x.shape[1]):
        near = x[:, max(channel - 2, 0) : channel + 3]
        out[:, channel] = x[:, channel] / (1 + 1e-4 / 5 * near.square().sum(1)) ** 0.75
    return out


def l2_pool(x: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    """sqrt(9 x mean of squares) over 3x3."""
    return (9 * avg_pool2d(x.square(), 3, stride, padding)).sqrt()


def forward(tensors: dict[str, np.ndarray], images: np.ndarray, released: bool) -> np.ndarray:
    """float [n, 96, 96, 3] in 0..1 -> [n, 128], in float64. `tensors` by Keras-OpenFace's names, without ".csv", in Torch's shapes.

    `released`: the trained network's pools; otherwise all branches of a block pool with the block's own stride, padded by 1.
    """
    weights = {name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in tensors.items()}

    def unit(x: torch.Tensor, conv: str, norm: str, stride: int = 1) -> torch.Tensor:
        kernel = weights[f"{conv}_w"]
        y = conv2d(x, kernel, weights[f"{conv}_b"], stride, padding=kernel.shape[-1] // 2)
        column = {letter: weights[f"{norm}_{letter}"][:, None, None] for letter in "wbmv"}
        return relu((y - column["m"]) / (column["v"] + 1e-5).sqrt() * column["w"] + column["b"])

    x = torch.from_numpy(np.asarray(images, np.float64)).permute(0, 3, 1, 2)
    x = unit(x, "conv1", "bn1", 2)
    x = local_response_norm(max_pool2d(x, 3, 2, 1))
    x = unit(x, "conv2", "bn2")
    x = local_response_norm(unit(x, "conv3", "bn3"))
    x = max_pool2d(x, 3, 2, 1)
    for name, (kind, pool_stride, stride) in BLOCKS.items():
        block = f"inception_{name}"
        outputs = []
        for branch in ("3x3", "5x5"):
            if f"{block}_{branch}_conv1_w" in weights:
                y = unit(x, f"{block}_{branch}_conv1", f"{block}_{branch}_bn1")
                outputs.append(unit(y, f"{block}_{branch}_conv2", f"{block}_{branch}_bn2", stride))
        steps = (pool_stride, 0) if released else (stride, 1)
        y = max_pool2d(x, 3, *steps) if kind == "max" else l2_pool(x, *steps)
        if f"{block}_pool_conv_w" in weights:
            y = unit(y, f"{block}_pool_conv", f"{block}_pool_bn")
        rows = outputs[0].shape[2] - y.shape[2]
        low, high = rows // 2, rows - rows // 2
        outputs.append(pad(y, (low, high, low, high)))
        if f"{block}_1x1_conv_w" in weights:
            outputs.append(unit(x, f"{block}_1x1_conv", f"{block}_1x1_bn"))
        x = torch.cat(outputs, 1)
    x = x.mean((2, 3))
    return linear(x, weights["dense_w"], weights["dense_b"]).numpy()
