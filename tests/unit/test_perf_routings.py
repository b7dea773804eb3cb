"""Routings by name, with parameters, and recorded ones."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch

from perf.against.roofline import work_of
from perf.recording.environment import environment
from perf.running.points import Point
from perf.running.timing import EAGER, Times
from perf.workload import routings
from perf.workload.cases import MODELS, Case, make_inputs
from perf.workload.parts import MEGAMOE

EMULATED = MODELS["emulated"]  # 32 experts, top-4


def ids_of(routing: str, tokens: int = 2000, ranks: int = 4, **model) -> torch.Tensor:
    """[W, T, K]"""
    case = Case(dataclasses.replace(EMULATED, **model), ranks, tokens, routing=routing)
    return torch.stack([inputs.topk_idx for inputs in make_inputs(case)])


@pytest.mark.parametrize("routing", routings.ROUTINGS)
def test_ids_have_shape_type_and_range(routing):
    for inputs in make_inputs(Case(EMULATED, 4, 300, routing=routing)):
        ids = inputs.topk_idx
        assert ids.shape == (300, 4) and ids.dtype == torch.int32 and ids.is_contiguous()
        assert ids.min() >= (-1 if routing == "masked" else 0) and ids.max() < 32


@pytest.mark.parametrize("routing", routings.ROUTINGS)
def test_only_random_routing_names_an_expert_twice(routing):
    ordered = ids_of(routing, tokens=300).flatten(0, 1).sort(dim=1).values
    repeats = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    assert repeats.any() == (routing == "random")


def test_balanced_is_uniform_over_experts():
    counts = ids_of("balanced").flatten().long().bincount(minlength=32).double()
    assert (counts - counts.mean()).abs().max() < 6 * counts.mean() ** 0.5


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.2, 2.0])
def test_zipf_follows_its_exponent_and_ranks_agree_on_the_favourites(exponent):
    ids = ids_of(f"zipf:{exponent}", tokens=4000, top_k=1)
    share = ids.flatten().long().bincount(minlength=32).double().sort(descending=True).values
    expected = torch.arange(1, 33, dtype=torch.float64) ** -exponent
    assert (share / share.sum() - expected / expected.sum()).abs().max() < 0.02
    favourites = {int(rank.flatten().long().bincount().argmax()) for rank in ids}
    assert len(favourites) == 1 or exponent == 0


@pytest.mark.parametrize("text", ["skewed", "zipf", "zipf:1", "skewed:1.0"])
def test_skewed_is_zipf(text):
    assert torch.equal(ids_of(text), ids_of("zipf"))
    assert routings.canonical(text) == routings.label_of(text) == "zipf"
    assert routings.canonical("skewed:1.20") == "zipf:1.2"


@pytest.mark.parametrize("top_k", [1, 4])
def test_hot_expert_takes_its_share_of_the_tokens(top_k):
    assert ((ids_of("hot-expert", top_k=top_k) == 31).sum(dim=2) == 1).all()
    ids = ids_of("hot-expert:0.3", top_k=top_k)
    hot = (ids == 31).sum(dim=2)
    assert hot.max() == 1 and 0.27 < hot.double().mean() < 0.33
    assert (ids_of("hot-expert:0", top_k=top_k) < 31).all()


def test_a_hot_expert_leaves_some_tokens_to_others():
    model = dataclasses.replace(EMULATED, num_experts=1, top_k=1)
    with pytest.raises(ValueError, match="hot-expert:0.5 needs another expert"):
        Case(model, 1, 5, routing="hot-expert:0.5").check_routing(5)
    Case(model, 1, 5, routing="hot-expert").check_routing(5)
    assert not ids_of("hot-expert", ranks=1, num_experts=1, top_k=1).any()


@pytest.mark.parametrize("ranks", [2, 16])
def test_hot_rank_takes_its_share_of_the_tokens_whole(ranks):
    """At 16 ranks a rank has 2 experts, K is 4."""
    assert ids_of("hot-rank", tokens=50, ranks=ranks).unique().tolist() == [*range(32 // ranks)]
    ids = ids_of("hot-rank:0.6", ranks=ranks)
    there = ids < 32 // ranks
    assert torch.equal(there.any(dim=2), there.all(dim=2))
    assert 0.57 < there.double().mean() < 0.63
    assert ids.unique().numel() == 32
    assert (ids_of("hot-rank:0.6", ranks=1) < 32).all()


@pytest.mark.parametrize(("text", "share"), [("masked", 0.5), ("masked:0.2", 0.2)])
def test_masked_drops_its_share_of_the_slots_and_one_whole_token(text, share):
    ids = ids_of(text)
    assert share - 0.02 < (ids < 0).double().mean() < share + 0.02
    assert (ids[:, 0] == -1).all()


@pytest.mark.parametrize("name", ["hot-expert", "hot-rank", "masked"])
def test_a_default_has_one_spelling(name):
    default = routings.ROUTINGS[name].default
    assert routings.canonical(f"{name}:{default:.2f}") == name
    assert torch.equal(ids_of(f"{name}:{default}"), ids_of(name))
    assert routings.canonical(f"{name}:0.250") == f"{name}:0.25" == routings.label_of(f"{name}:.25")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hotrank:0.5", "'hotrank:0.5' is not a routing; did you mean hot-rank"),
        ("nothing", "choose from balanced, random, zipf"),
        ("balanced:2", "balanced takes no parameter"),
        ("zipf:x", "'x' is not a number"),
        ("zipf:", "'' is not a number"),
        ("zipf:9", "9 must be in 0..8"),
        ("masked:1.5", "1.5 must be in 0..1"),
        ("masked:nan", "nan must be in 0..1"),
        ("masked:-0.1", "-0.1 must be in 0..1"),
    ],
)
def test_wrong_routings_say_what_is_right(text, message):
    with pytest.raises(ValueError) as error:
        routings.canonical(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def save(path, ids) -> str:
    """A recorded file in the format of its suffix."""
    if path.suffix == ".npy":
        numpy.save(path, numpy.asarray(ids))
    else:
        torch.save(torch.as_tensor(ids), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".pt", ".npy"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_recorded_file_is_dealt_to_the_ranks(tmp_path, suffix, dtype):
    ids = torch.randint(-1, 32, (20, 4), dtype=dtype)
    path = save(tmp_path / f"ids{suffix}", ids)
    drawn = ids_of(path, tokens=5)
    assert drawn.dtype == torch.int32 and torch.equal(drawn.flatten(0, 1), ids.int())
    assert torch.equal(ids_of(path, tokens=2).flatten(0, 1), ids[:8].int())
    by_rank = save(tmp_path / f"ranks{suffix}", ids.view(4, 5, 4))
    assert torch.equal(ids_of(by_rank, tokens=2), ids.view(4, 5, 4)[:, :2].int())


def test_masks_are_known(tmp_path):
    none = save(tmp_path / "none.pt", torch.zeros(4, 4, dtype=torch.int32))
    some = save(tmp_path / "some.pt", torch.full((4, 4), -1))
    found = [routings.may_mask(text) for text in ("balanced", "masked", "masked:0.2", none, some)]
    assert found == [False, True, True, False, True]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(16, 3, dtype=torch.int64), "has 3 choices per token, top_k=4"),
        (torch.zeros(2, 16, 4, dtype=torch.int64), "is of 2 ranks, num_ranks=4"),
        (torch.zeros(16, 4, dtype=torch.int64), "holds 4 tokens for each of 4 ranks, fewer than"),
        (torch.zeros(4, 4, 4, dtype=torch.int64), "holds 4 tokens for each of 4 ranks"),
        (torch.full((20, 4), 32), "has expert ids 32..32, must be in -1..31"),
        (torch.full((20, 4), -2), "has expert ids -2..-2"),
        (torch.zeros(20, 4), "must hold a tensor of integers"),
        (torch.zeros(20, 4, dtype=torch.bool), "must hold integers of shape"),
        (torch.ones(20, 4, dtype=torch.int64).to_sparse(), "it holds no array of integers"),
        (torch.zeros(20, 4, dtype=torch.int64, device="meta"), "it holds no array of integers"),
        (torch.zeros(20, dtype=torch.int64), "of shape [N, K] or [W, N, K], not torch.int64 [20]"),
    ],
)
def test_a_recorded_file_is_checked(tmp_path, ids, message):
    case = Case(EMULATED, 4, 5, routing=save(tmp_path / "ids.pt", ids))
    with pytest.raises(ValueError) as error:
        case.check_routing(5)
    assert message in str(error.value) and str(tmp_path / "ids.pt") in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".npy"])
def test_a_file_that_holds_no_ids_is_refused(tmp_path, suffix):
    path = tmp_path / f"ids{suffix}"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        routings.recorded(str(path))
    path.write_text("text")
    with pytest.raises(ValueError, match="cannot be read: it holds no array"):
        routings.recorded(str(path))


def test_a_row_names_the_file_and_its_ids_not_its_place(tmp_path):
    path = save(tmp_path / "night.pt", torch.zeros(20, 4, dtype=torch.int64))
    case = Case(EMULATED, 4, 5, routing=path)
    work = work_of(case, [i.topk_idx for i in make_inputs(case)])
    point = Point(case, EAGER, MEGAMOE, Times((1.0,)), work, None, None)
    routing = point.row(environment("cpu")).routing
    assert routing.startswith("night.pt#") and "/" not in routing
    other = save(tmp_path / "day.pt", torch.ones(20, 4, dtype=torch.int64))
    assert routings.label_of(other).split("#")[1] != routing.split("#")[1]
