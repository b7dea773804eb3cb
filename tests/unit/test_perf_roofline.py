"""Work and bounds of routings small enough to count by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from perf.against.roofline import H200, Work, roofline_of, routed_counts, work_of
from perf.workload.cases import MODELS, Case, Model, make_inputs

H, I = 256, 128  # noqa: E741
MODEL = Model("hand", hidden=H, intermediate=I, num_experts=4, top_k=2)
EXPERT_BYTES = 3 * H * I * 2
TOKEN_BYTES = 2 * H * 2 + 2 * 8  # in, out, two routes

#: Rank 0 owns experts 0 and 1, rank 1 owns 2 and 3. From rank 0: 3 slots stay, 1 goes to rank 1, 2
#: are masked. From rank 1: 2 go to rank 0, none stays.
IDS = [
    torch.tensor([[0, 1], [0, 3], [-1, -1]], dtype=torch.int32),
    torch.tensor([[0, 1]], dtype=torch.int32),
]


def case_of(ranks_per_gpu: int) -> Case:
    return Case(MODEL, num_ranks=2, tokens=3, ranks_per_gpu=ranks_per_gpu)


def test_counts_leave_masked_slots_out():
    assert routed_counts(case_of(1), IDS).tolist() == [[2, 1, 0, 1], [1, 1, 0, 0]]


def test_work_per_gpu():
    work = work_of(case_of(1), IDS)
    assert work.flops == (5 * 6 * H * I, 1 * 6 * H * I)
    assert work.hbm_bytes == (2 * EXPERT_BYTES + 3 * TOKEN_BYTES, 1 * EXPERT_BYTES + TOKEN_BYTES)
    # GPU 0 pulls 2 rows and gets 1 back; GPU 1 pulls 1 and gets 2 back.
    assert work.nvlink_bytes == (3 * H * 2, 3 * H * 2)


@pytest.mark.parametrize(
    "precision,weight_bytes,token_scales",
    [
        ("fp8_block", 3 * H * I + 4 * (3 * H * I // 128**2), H // 128),
        ("fp8_channel", 3 * H * I + 4 * (2 * I + H), 1),
        ("fp8_mxfp4", 3 * H * I // 2 + 3 * H * I // 32, H // 128),
        ("fp8_mxfp4_token", 3 * H * I // 2 + 3 * H * I // 32, 1),
        ("fp8_int4", 3 * H * I // 2 + 4 * (3 * H * I // 128), H // 128),
    ],
)
def test_bytes_of_fp8_have_their_scales(precision, weight_bytes, token_scales):
    """Weights and rows that travel are stored in few bits; input, results and output are bf16."""
    work = work_of(dataclasses.replace(case_of(1), precision=precision), IDS)
    assert work.flops == work_of(case_of(1), IDS).flops
    assert work.hbm_bytes == (2 * weight_bytes + 3 * TOKEN_BYTES, weight_bytes + TOKEN_BYTES)
    # GPU 0 pulls 2 rows and sends 1; 1 result comes back and 2 leave: more leaves it.
    there, back = H + 4 * token_scales, 2 * H
    assert work.nvlink_bytes == (there + 2 * back, there + 2 * back)


def test_ranks_that_share_a_gpu_add_up_and_send_nothing():
    work = work_of(case_of(2), IDS)
    assert work.flops == (6 * 6 * H * I,)
    assert work.hbm_bytes == (3 * EXPERT_BYTES + 4 * TOKEN_BYTES,)
    assert work.nvlink_bytes == (0,)
    assert roofline_of(work, H200).bound != "nvlink"


def test_ranks_are_dealt_to_gpus_in_turn():
    """Four ranks on two GPUs: ranks 0 and 2 share one, so their traffic is no NVLink traffic."""
    case = Case(MODEL, num_ranks=4, tokens=1, ranks_per_gpu=2)
    token = torch.tensor([[2, 2]], dtype=torch.int32)
    none = torch.full((1, 2), -1, dtype=torch.int32)
    assert work_of(case, [token, none, none, none]).nvlink_bytes == (0, 0)
    assert work_of(case, [none, token, none, none]).nvlink_bytes == (2 * H * 2, 2 * H * 2)


@pytest.mark.parametrize(
    ("work", "bound", "us"),
    [
        (Work((780 * 10**9,), (0,), (0,)), "math", 1000),
        (Work((0, 0), (0, 43 * 10**9), (0, 0)), "hbm", 10_000),
        (Work((0, 0), (10**6, 0), (33 * 10**7, 0)), "nvlink", 1000),
    ],
)
def test_the_slowest_ceiling_on_the_busiest_gpu_bounds(work, bound, us):
    roofline = roofline_of(work, H200)
    assert roofline.bound == bound
    assert roofline.us == pytest.approx(us)
    assert roofline.share(2 * us) == pytest.approx(0.5)


def test_tflops_are_useful_and_per_gpu():
    work = Work((3 * 10**12, 10**12), (0, 0), (0, 0))
    assert work.tflops(us=1e6) == pytest.approx(2)


def test_v3_bounds_at_the_ends():
    """One token streams the weights of K experts, 4096 tokens those of all."""
    model = MODELS["v3"]
    one, many = (Case(model, num_ranks=1, tokens=tokens) for tokens in (1, 4096))
    decode = roofline_of(work_of(one, [i.topk_idx for i in make_inputs(one)]), H200)
    assert decode.bound == "hbm"
    assert decode.us == pytest.approx(8 * 3 * 7168 * 2048 * 2 / 4.3e6, rel=1e-3)
    ids = torch.randint(256, (4096, 8), dtype=torch.int32)
    work = work_of(many, [ids])
    assert work.flops == (6 * 4096 * 8 * 7168 * 2048,)  # 3.7 ms
    # Of 256 experts the weights weigh more than the math of 4096 tokens on one GPU: 5.24 ms.
    prefill = roofline_of(work, H200)
    assert prefill.bound == "hbm"
    assert prefill.us == pytest.approx(256 * 3 * 7168 * 2048 * 2 / 4.3e6, rel=1e-2)
