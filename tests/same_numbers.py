"""Do a CPU, an H100 and an H200 give the same bits? Outputs of small layers with fixed inputs.

    python -m tests.same_numbers OUT.npz --device cpu
    python -m tests.same_numbers OUT.npz --device cuda --kernel-dir DIR
    python -m tests.same_numbers --compare A.npz B.npz

The order of all sums is fixed, so two GPUs of an architecture must agree bit for bit. A CPU differs
by `ex2` and `rcp`, which it rounds correctly and a GPU to within two units in the last place; an
element of FC1's output may then be rounded to its neighbour.
"""

from __future__ import annotations

import argparse
import hashlib
import sys

import numpy as np
import torch

from megamoe import MegaMoE, quantize_weights
from tests.gpu.configs import CONFIGS

LAYERS = (
    "narrow", "odd_hidden", "one_expert_per_rank", "block_narrow", "block_odd", "channel_narrow",
    "channel_odd", "mxfp4_narrow", "mxfp4_odd", "mxfp4_token_narrow",
    "mxfp4_token_odd", "int4_narrow", "int4_odd",
)  # fmt: skip
NUM_SMS = 2


def inputs(config: dict) -> tuple[tuple, list, list, list]:
    """(weights, xs, topk_idx, topk_weights), the same wherever NumPy runs."""
    random = np.random.Generator(np.random.PCG64(7))

    def drawn(*shape) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape, np.float32))

    experts, hidden, inner = (
        config[name] for name in ("num_experts", "hidden_size", "intermediate_size")
    )
    weights = (
        (drawn(experts, 2 * inner, hidden) / hidden**0.5).bfloat16(),
        (drawn(experts, hidden, inner) / inner**0.5).bfloat16(),
    )
    if config["precision"] != "bf16":
        weights = quantize_weights(*weights, config["precision"])
    tokens, top_k = min(config["max_tokens_per_rank"], 48), config["top_k"]
    xs, ids, router = [], [], []
    for _ in range(config["num_ranks"]):
        xs.append(drawn(tokens, hidden).bfloat16())
        scores = torch.from_numpy(random.random((tokens, experts), np.float32))
        ids.append(scores.topk(min(top_k, experts)).indices)
        missing = top_k - ids[-1].shape[1]
        ids[-1] = torch.nn.functional.pad(ids[-1], (0, missing), value=-1).contiguous()
        router.append(torch.from_numpy(random.random((tokens, top_k), np.float32)))
    return weights, xs, ids, router


def outputs(name: str, device: str, kernel_dir: str | None) -> np.ndarray:
    """Rows of all ranks as bits of bfloat16."""
    config = dict(CONFIGS[name])
    weights, *arguments = inputs(config)
    world, kernel = config.pop("num_ranks"), config.pop("kernel")
    with MegaMoE(
        **config, world=world, device=device, num_sms=NUM_SMS, kernel_dir=kernel_dir,
        kernel_options=kernel or None,
    ) as moe:  # fmt: skip
        moe.load_weights(*(None if w is None else w.to(device) for w in weights))
        ys = moe(*([t.to(device) for t in column] for column in arguments))
        moe.synchronize()
        return torch.cat([y.cpu() for y in ys]).view(torch.int16).numpy()


def compare(first: str, second: str) -> int:
    """Print how far two files agree; 1 unless they are of the same inputs."""
    one, two = np.load(first), np.load(second)
    for name in LAYERS:
        if f"{name} inputs" not in one or str(one[f"{name} inputs"]) != str(two[f"{name} inputs"]):
            print(f"{name}: other inputs")
            return 1
        a, b = (
            torch.from_numpy(of[name]).view(torch.bfloat16).float().numpy() for of in (one, two)
        )
        equal = (one[name] == two[name]).mean()
        error = np.linalg.norm(a - b) / np.linalg.norm(a)
        print(f"{name:20} {100 * equal:8.3f} % equal, relative error {error:.2e}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.same_numbers", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernel-dir")
    args = parser.parse_args()
    if args.compare:
        return compare(*args.files)
    found = {}
    for name in LAYERS:
        _, *arguments = inputs(CONFIGS[name])
        digest = hashlib.sha256()
        for column in arguments:
            for tensor in column:
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        found[f"{name} inputs"] = np.array(digest.hexdigest())
        found[name] = outputs(name, args.device, args.kernel_dir)
        print(name, flush=True)
    np.savez(args.files[0], **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
