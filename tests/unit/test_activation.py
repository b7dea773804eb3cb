"""Activations: rows, the oracle's functions against scalar ones, the device's on a CPU."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from megamoe import reference
from megamoe.activation import ACTIVATIONS, ADD, MULTIPLY, column_operands
from megamoe.compile import cache_dir
from megamoe.dsl import HAVE_DSL
from megamoe.machine.machine import Machine
from megamoe.precision import PRECISIONS
from megamoe.reference import Epilogue, Weights
from tests.routing import make_routing
from tests.unit.test_reference import FLOAT32, recipe_with

#: Values of the parameters that each is tried with.
PARAMETERS = {
    "swiglu": [(None,), (0.75,)],
    "gpt_oss": [(7.0, 1.702), (0.5, 0.25), (None, 1.0)],
    "relu2": [()],
}
CASES = [(name, values) for name in PARAMETERS for values in PARAMETERS[name]]


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def scalar(name: str, gate: float, up: float, parameters: tuple) -> float:
    """One output, from the definition."""
    if name == "relu2":
        return max(gate, 0.0) ** 2
    if parameters[0] is not None:
        gate, up = min(gate, parameters[0]), max(-parameters[0], min(up, parameters[0]))
    if name == "swiglu":
        return gate * sigmoid(gate) * up
    return gate * sigmoid(parameters[1] * gate) * (up + 1.0)


def test_every_row_has_its_functions():
    assert reference.ACTIVATIONS.keys() == ACTIVATIONS.keys() == PARAMETERS.keys()
    for name, cases in PARAMETERS.items():
        assert all(len(values) == len(ACTIVATIONS[name].parameters) for values in cases)


@pytest.mark.compile
def test_every_row_has_a_function_on_the_device():
    from megamoe.kernels import activation

    assert activation.ACTIVATIONS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name,parameters", CASES)
def test_the_oracle_against_scalars(name, parameters):
    row, inner = ACTIVATIONS[name], 8
    sums = 4 * torch.randn(5, row.fc1_columns(inner), generator=torch.Generator().manual_seed(0))
    sums = sums.double()
    got = reference.ACTIVATIONS[name](sums, *parameters)
    assert got.shape == (5, inner)
    for r in range(5):
        for c in range(inner):
            up = sums[r, inner + c].item() if row.gated else 0.0
            assert got[r, c] == pytest.approx(scalar(name, sums[r, c].item(), up, parameters))


def test_gpt_oss_has_the_defaults_of_its_model():
    sums = 6 * torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    expected = reference.ACTIVATIONS["gpt_oss"](sums, 7.0, 1.702)
    assert torch.equal(reference.ACTIVATIONS["gpt_oss"](sums), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_layer_with_biases_against_a_loop(monkeypatch, name):
    """A bias of FC2 is weighted as the row is: the router weight is on the hidden row already."""
    recipe_with(monkeypatch, hidden=FLOAT32)
    row, tokens, top_k, experts, hidden, inner = ACTIVATIONS[name], 7, 2, 3, 16, 8
    rng = torch.Generator().manual_seed(2)
    x, w13, w2, b13, b2 = (
        torch.randn(*shape, generator=rng).double()
        for shape in (
            (tokens, hidden), (experts, row.fc1_columns(inner), hidden), (experts, hidden, inner),
            (experts, row.fc1_columns(inner)), (experts, hidden),
        )
    )  # fmt: skip
    [idx], [router] = make_routing("masked", 1, tokens, top_k, experts, 2)
    parameters = PARAMETERS[name][-1]
    y = reference.moe_forward(
        x, idx, router, *Weights(w13, w2), rounding=False,
        epilogue=Epilogue(name, parameters, b13, b2),
    )  # fmt: skip
    expected = torch.zeros(tokens, hidden).double()
    x = x.bfloat16().double()  # as it travels
    for t in range(tokens):
        for k in range(top_k):
            e = int(idx[t, k])
            if e >= 0:
                sums = w13[e] @ x[t] + b13[e]
                gates, ups = sums[:inner], sums[-inner:]
                pairs = zip(gates.tolist(), ups.tolist(), strict=True)
                row_I = torch.tensor([scalar(name, *pair, parameters) for pair in pairs])
                expected[t] += float(router[t, k]) * (w2[e] @ row_I.double() + b2[e])
    assert reference.relative_error(y, expected) < 1e-6  # scalars come as float32


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_an_epilogue_reads_by_column(precision, name):
    """A scale by output channel, then a bias."""
    operands = column_operands("w13", PRECISIONS[precision].weights, ACTIVATIONS[name])
    expected = [("w13_scales", MULTIPLY)] * (precision == "fp8_channel")
    expected += [("w13_bias", ADD)] * ACTIVATIONS[name].bias
    assert [(operand.name, operand.combines) for operand in operands] == expected


INNER = 8


@functools.cache
def kernel_of(name: str, directory):
    from tests.unit.activation_kernel import build

    return build(ACTIVATIONS[name], INNER, directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("activations")


def on_the_machine(kernel, sums: torch.Tensor, bias: torch.Tensor, limit, alpha) -> torch.Tensor:
    out = torch.full((32, INNER), math.nan)
    machine = Machine(cache_dir())
    for place, tensor in (("sums", sums), ("bias", bias), ("out", out)):
        machine.memory.add(place, tensor)
    kernel.launches.on_launch = machine.launch
    kernel.launcher()(
        0, sums=sums.data_ptr(), bias=bias.data_ptr(), out=out.data_ptr(),
        limit=math.inf if limit is None else limit, alpha=alpha,
    )  # fmt: skip
    kernel.launches.check()
    machine.run()
    return out


@pytest.mark.compile
@pytest.mark.skipif(not HAVE_DSL, reason="the kernel is built here")
@pytest.mark.parametrize("name,parameters", CASES)
def test_the_device_on_a_cpu(name, parameters, directory):
    row, rng = ACTIVATIONS[name], torch.Generator().manual_seed(3)
    sums = 3 * torch.randn(32, row.fc1_columns(INNER), generator=rng)
    sums[0] = 60.0 * torch.sign(sums[0])  # where an exponential is 2^-86 or 2^86
    bias = torch.randn(row.fc1_columns(INNER), generator=rng)
    limit, alpha = (*parameters, None, 0.0)[:2] if len(parameters) < 2 else parameters
    got = on_the_machine(kernel_of(name, directory), sums, bias, limit, alpha or 0.0)
    exact = (sums + bias if row.bias else sums).double()
    expected = reference.ACTIVATIONS[name](exact, *parameters)
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=1e-14)


@pytest.mark.compile
@pytest.mark.skipif(not HAVE_DSL, reason="the kernel is built here")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays_on_the_device(name, directory):
    row = ACTIVATIONS[name]
    sums = torch.ones(32, row.fc1_columns(INNER))
    sums[0, 0] = sums[1, -1] = math.nan
    got = on_the_machine(kernel_of(name, directory), sums, torch.zeros(2 * INNER), 0.5, 1.0)
    wrong = got.isnan().nonzero().tolist()
    # A pair shares a reciprocal, and so a NaN of a gate.
    assert [0, 0] in wrong and [1, INNER - 1] in wrong
    assert all(place in ([0, 0], [0, 1], [1, INNER - 2], [1, INNER - 1]) for place in wrong)
