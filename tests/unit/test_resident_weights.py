"""Weights of a layer after the first load: new values, new tensors, what graphs may hold."""

from __future__ import annotations

import pytest
import torch

from megamoe.precision import PRECISIONS
from tests.nights import at_night, built
from tests.unit.layers import (
    READ_WHERE_THEY_ARE,
    W,
    check,
    inputs,
    loaded,
    make,
    same,
    weights,
)

E_LOCAL = 4


def addresses(moe) -> list[int]:
    return [tensor.data_ptr() for _, tensor in moe.kernel_tensors()]


def overwrite(given, other, by_data: bool = False) -> None:
    """New values in the same tensors; `by_data`: so that torch does not count a write."""
    for tensor, new in zip(given, other, strict=True):
        if tensor is not None:
            (tensor.data if by_data else tensor).copy_(new)


@pytest.mark.parametrize(
    ("precision", "how"),
    [
        *(at_night(n, "load") if n not in READ_WHERE_THEY_ARE else (n, "load") for n in PRECISIONS),
        *((name, "refresh") for name in READ_WHERE_THEY_ARE),
    ],
)
def test_new_values_in_place_keep_every_address(precision, how):
    arguments, given = inputs(), weights(precision)
    moe = make(precision=precision)
    moe.load_weights(*given)
    before, version = addresses(moe), moe.weights_version
    moe._captured = True  # as by a graph
    for seed in (2, 3):
        overwrite(given, weights(precision, seed), by_data=True)
        if how == "load":
            moe.load_weights(*given)
        else:
            moe.refresh_scales()
        assert addresses(moe) == before and moe.weights_version == version
        check(moe(*arguments), *arguments, precision, given=weights(precision, seed))


@pytest.mark.parametrize("precision", built())
def test_experts_that_come_one_by_one_keep_every_address(precision):
    """`load_experts`: into memory of the layer, then into the same."""
    arguments, moe = inputs(), make(precision=precision)
    places = []
    for seed in (2, 3):
        given, seen = weights(precision, seed), []

        def read(expert, into, given=given, seen=seen):
            seen.append(expert)
            for tensor, new in zip(into.present, given.of(expert).present, strict=True):
                tensor.copy_(new)

        moe.load_experts(read)
        moe._captured = True  # as by a graph
        places.append(addresses(moe))
        assert seen == list(range(len(given.w13)))
        check(moe(*arguments), *arguments, precision, given=given)
    assert places[0] == places[1] and moe.weights_version == 1


def test_a_write_that_torch_counts_is_seen_by_the_next_forward():
    arguments, given, other = inputs(), weights("fp8_block"), weights("fp8_block", 2)
    moe = make(precision="fp8_block")
    moe.load_weights(*given)
    check(moe(*arguments), *arguments, "fp8_block")
    overwrite(given, other)
    check(moe(*arguments), *arguments, "fp8_block", given=other)
    with torch.inference_mode():
        overwrite(given, weights("fp8_block", 3))
        check(moe(*arguments), *arguments, "fp8_block", given=weights("fp8_block", 3))


@pytest.mark.parametrize("precision", READ_WHERE_THEY_ARE)
def test_other_tensors_after_a_capture_are_refused_unless_asked_for(precision):
    arguments, other = inputs(), weights(precision, 2)
    moe = loaded(precision)
    version = moe.weights_version
    moe.load_weights(*other)  # nothing was captured
    assert moe.weights_version == version + 1
    moe._captured = True
    with pytest.raises(ValueError, match="other addresses than those that a captured CUDA graph"):
        moe.load_weights(*weights(precision))
    check(moe(*arguments), *arguments, precision, given=other)
    assert moe.weights_version == version + 1
    moe.load_weights(*weights(precision), replace=True)
    assert moe.weights_version == version + 2
    check(moe(*arguments), *arguments, precision)
    moe.load_weights(*other)  # whoever replaces them captures again


@pytest.mark.parametrize("precision", READ_WHERE_THEY_ARE)
@pytest.mark.parametrize("how", ["attribute", "data", "storage"])
def test_tensors_that_are_put_in_their_place_are_read(precision, how):
    """`parameter.data = ...` moves a weight without a word to the layer."""
    arguments, other = inputs(), weights(precision, 2)
    given = [None if t is None else torch.nn.Parameter(t, False) for t in weights(precision)]
    moe = make(precision=precision)
    moe.load_weights(*given)
    for name, tensor in other._asdict().items():
        if tensor is None:
            continue
        if how == "attribute":
            setattr(moe, name, torch.nn.Parameter(tensor, False))
        elif how == "data":
            getattr(moe, name).data = tensor
        else:
            getattr(moe, name).set_(tensor)
    check(moe(*arguments), *arguments, precision, given=other)
    moe._captured = True
    moe.w13.data = moe.w13.data.clone()
    with pytest.raises(ValueError, match="other addresses"):
        moe(*arguments)


@pytest.mark.parametrize("precision", built())
def test_kernel_tensors_are_what_a_launch_reads(precision):
    """Expert rows may be moved by who balances load: first axis of each, expert by expert."""
    moe = loaded(precision)
    tensors = dict(moe.kernel_tensors())
    assert list(tensors)[:2] == ["w13", "w2"]
    operand = PRECISIONS[precision].weights
    laid_out = operand.tile_scales  # anew
    kind = "tile_scales" if laid_out else "scale"
    assert list(tensors)[2:] == [f"w13_{kind}", f"w2_{kind}"] * operand.has_scales
    assert all(len(tensor) == W * E_LOCAL for tensor in tensors.values())
    given = moe._held()
    for name in ("w13", "w2"):
        assert tensors[name] is getattr(given, name)
    if not laid_out:  # else the tables follow from the given scales
        order = torch.randperm(W * E_LOCAL, generator=torch.Generator().manual_seed(5))
        for tensor in tensors.values():
            bits = tensor.view(torch.uint8)
            bits.copy_(bits[order].clone())
        xs, ids, router = inputs()
        moved = weights(precision)
        moved = moved._replace(
            **{
                name: t.view(torch.uint8)[order].view(t.dtype)
                for name, t in moved._asdict().items()
                if t is not None
            }
        )
        moe.refresh_scales()
        check(moe(xs, ids, router), xs, ids, router, precision, given=moved)


@pytest.mark.parametrize("precision", READ_WHERE_THEY_ARE)
def test_weights_are_held_as_what_they_were(precision):
    moe = loaded(precision)
    names = [name for name, tensor in weights(precision)._asdict().items() if tensor is not None]
    assert set(names) <= {name for name, _ in moe.named_buffers()}
    assert not list(moe.parameters()) and sorted(moe.state_dict()) == sorted(names)
    given = [None if t is None else torch.nn.Parameter(t, False) for t in weights(precision)]
    moe.load_weights(*given)
    assert sorted(name for name, _ in moe.named_parameters()) == sorted(names)
    assert moe.w13 is given[0]
    assert sorted(moe.state_dict()) == sorted(names)


@pytest.mark.parametrize("precision", built())
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("has_weights", [False, True])
def test_state_dicts(precision, assign, has_weights):
    """In checkpoint layout, into a layer with weights or without; in place unless assigned."""
    arguments, other = inputs(), weights(precision, 2)
    state = {name: t for name, t in other._asdict().items() if t is not None}
    moe = loaded(precision) if has_weights else make(precision=precision)
    held = moe.state_dict()
    assert not held or sorted(held) == sorted(state)
    moe._captured = has_weights and not assign
    model = torch.nn.ModuleDict({"experts": moe})
    model.load_state_dict({f"experts.{k}": v for k, v in state.items()}, assign=assign)
    check(moe(*arguments), *arguments, precision, given=other)
    for name, tensor in moe.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8))
        if precision not in READ_WHERE_THEY_ARE:
            continue
        assert (tensor.data_ptr() == state[name].data_ptr()) == assign
        if has_weights and not assign:
            assert tensor.data_ptr() == held[name].data_ptr()


def test_state_dicts_that_do_not_fit_are_torch_errors():
    moe = loaded()
    state = moe.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for w13"):
        moe.load_state_dict({**state, "w13": state["w13"][:2]})
    with pytest.raises(RuntimeError, match="Missing key.*w2"):
        moe.load_state_dict({"w13": state["w13"]})
    with pytest.raises(RuntimeError, match="Unexpected key.*w13_scale"):
        moe.load_state_dict({**state, "w13_scale": torch.ones(1)})
    moe._captured = True
    with pytest.raises(RuntimeError, match="other addresses"):
        moe.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)


def freed(tensor: torch.Tensor) -> torch.Tensor:
    other = tensor.clone()
    other.untyped_storage().resize_(0)
    return other


@pytest.mark.parametrize("name", ["w13", "w2", "w13_scale"])
def test_weights_whose_memory_was_freed_are_refused(name):
    given = weights("fp8_channel")
    moe = make(precision="fp8_channel")
    with pytest.raises(ValueError, match=f"{name} has no memory of its own"):
        moe.load_weights(*given._replace(**{name: freed(getattr(given, name))}))
    moe.load_weights(*given)
    arguments = inputs()
    check(moe(*arguments), *arguments, "fp8_channel")
    getattr(moe, name).untyped_storage().resize_(0)  # by a sharded data parallel wrapper, say
    with pytest.raises(ValueError, match=f"{name} has no memory of its own"):
        moe(*arguments)


@pytest.mark.parametrize("argument", range(3))
def test_inputs_whose_memory_was_freed_are_refused(argument):
    """In FP8 an address of 0 would mean that x is staged already: that of an earlier batch."""
    for precision in ("bf16", "fp8_block"):
        moe, arguments = loaded(precision), list(inputs())
        arguments[argument] = [arguments[argument][0], freed(arguments[argument][1])]
        with pytest.raises(ValueError, match=r"\[1\] has no memory of its own"):
            moe(*arguments)


def test_a_wrapper_around_tensors_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    xs, ids, router = inputs()
    moe = loaded()
    with pytest.raises(ValueError, match=r"x\[0\] .*\(TwoTensor\)"):
        moe([TwoTensor(xs[0], xs[0]), xs[1]], ids, router)
    arguments = inputs()
    assert same(moe(*arguments), moe(*arguments))
