"""Kernel keys, the command line, and building and finding libraries without a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megamoe import compile, router_config, signature
from megamoe.config import MoEConfig, select
from megamoe.router_config import RouterConfig

CONFIG = MoEConfig(8, 2, 256, 128, 64, 2)


def test_the_key_is_stable_and_separates_configurations():
    name = compile.kernel_name(CONFIG, select(CONFIG))
    assert name == compile.kernel_name(MoEConfig(8, 2, 256, 128, 64, 2), select(CONFIG))
    others = [
        compile.kernel_name(MoEConfig(8, 2, 256, 128, 65, 2), select(CONFIG)),
        compile.kernel_name(MoEConfig(8, 2, 256, 128, 64, 1), select(CONFIG)),
        compile.kernel_name(CONFIG, select(CONFIG, lag_waves=3)),
        compile.kernel_name(CONFIG, dataclasses.replace(select(CONFIG), arch="sm_99a")),
    ]
    assert len({name, *others}) == 5
    assert name.startswith("megamoe-bf16-sm_90a-")
    assert others[-1].startswith("megamoe-bf16-sm_99a-")


def test_the_key_changes_with_the_sources(monkeypatch):
    name = compile.kernel_name(CONFIG, select(CONFIG))
    monkeypatch.setattr(compile, "source_digest", lambda: "another version")
    assert compile.kernel_name(CONFIG, select(CONFIG)) != name


def test_the_digest_covers_what_shapes_a_kernel(tmp_path, monkeypatch):
    for path in ("megamoe/kernels/sm90", "workspace"):
        (tmp_path / path).mkdir(parents=True)
    source = tmp_path / "megamoe" / "schedule.py"
    host = tmp_path / "megamoe" / "module.py"
    source.write_text("a")
    host.write_text("a")
    monkeypatch.setattr(compile, "__file__", str(tmp_path / "megamoe" / "compile.py"))
    digest = compile.source_digest.__wrapped__
    first = digest()
    host.write_text("b")
    assert digest() == first
    source.write_text("b")
    assert digest() != first


def test_the_cache_directory_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path))
    assert compile.cache_dir() == tmp_path
    monkeypatch.delenv("MEGAMOE_CACHE_DIR")
    assert compile.cache_dir().name == "megamoe"


def test_without_the_dsl_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(compile, "HAVE_DSL", False)
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path))
    with pytest.raises(compile.KernelNotFound, match="elsewhere with 'python -m megamoe.compile'"):
        compile.load(CONFIG, select(CONFIG))
    with pytest.raises(compile.KernelNotFound, match="holds no megamoe-bf16-sm_90a-"):
        compile.load(CONFIG, select(CONFIG), kernel_dir=tmp_path / "kernels")


def test_a_missing_dsl_is_named_before_a_missing_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for have_dsl, message in ((False, "nvidia-cutlass-dsl is not installed"), (True, "C compiler")):
        monkeypatch.setattr(compile, "HAVE_DSL", have_dsl)
        with pytest.raises(compile.KernelNotFound, match=message):
            compile.build(CONFIG, select(CONFIG), tmp_path / "kernels")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-experts 9 --num-ranks 2", "num_experts=9 is not divisible by num_ranks=2"),
        ("--num-experts 8 --num-ranks 0", "num_ranks=0"),
        ("--num-experts 8 --hidden-size 100", "hidden_size=100"),
        ("--list /no/such.json", "'/no/such.json'"),
        ("--num-experts 8 --arch sm_70", "arch='sm_70' is not supported; choose one of ['sm_90a']"),
        ("--num-experts 2048", "num_experts=2048 is too large"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message, tmp_path, capsys):
    base = "--top-k 2 --hidden-size 256 --intermediate-size 128 --max-tokens-per-rank 8"
    status = compile.main(["--out", str(tmp_path), *base.split(), *arguments.split()])
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


ENTRY = dataclasses.asdict(CONFIG)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(ENTRY), "must hold a JSON list of objects"),
        ("[8]", "must hold a JSON list of objects"),
        ("{", "Expecting property name"),
        (json.dumps([ENTRY | {"top_k": "2"}]), "top_k='2' must be an integer"),
        (json.dumps([ENTRY | {"kernel": {"block_m": 0}}]), "block_m=0"),
        (json.dumps([ENTRY | {"kernel": {"arch": "sm_70"}}]), "arch='sm_70'"),
        (json.dumps([ENTRY | {"kernel": {"stages": 3}}]), "no field 'stages', did you mean 'num_"),
    ],
)
def test_a_bad_list_ends_in_one_line(text, message, tmp_path, capsys):
    (tmp_path / "list.json").write_text(text)
    assert compile.main(["--out", str(tmp_path), "--list", str(tmp_path / "list.json")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def fake_compiler(directory: Path, monkeypatch, script: str) -> Path:
    """The C compiler from now on, beside a DSL."""
    monkeypatch.setattr(compile, "HAVE_DSL", True)
    path = directory / "cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=":")
    return path


@pytest.mark.parametrize("last", ["echo 'ld: file format not recognized' >&2; ", ""])
def test_a_linker_that_fails_ends_in_one_line(last, tmp_path, monkeypatch, capsys):
    class Compiled:
        function_name = "entry"

        def dump_to_object(self, function_prefix):
            return b""

    linker = fake_compiler(tmp_path, monkeypatch, f"echo more >&2; {last}exit 3")
    monkeypatch.setattr(compile, "compile_kernel", lambda *_: Compiled())
    monkeypatch.setattr(compile, "_runtime_archive", lambda: "runtime.a")
    (tmp_path / "list.json").write_text(json.dumps([ENTRY]))
    out = tmp_path / "out"
    assert compile.main(["--out", str(out), "--list", str(tmp_path / "list.json")]) == 2
    error = capsys.readouterr().err
    assert f"{linker} failed with status 3" in error
    assert error.endswith(": ld: file format not recognized\n" if last else ": more\n")
    assert error.count("\n") == 1
    assert not list(out.iterdir())


def test_missing_arguments_are_named(tmp_path, capsys):
    assert compile.main(["--out", str(tmp_path), "--num-experts", "8"]) == 2
    assert "top_k" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"router": {"num_experts": 8, "top_k": 9}}, "top_k=9 must be in 1..8"),
        ({"router": {"num_experts": 8}}, "top_k"),
        ({"router": {"num_experts": 8, "top_k": 2, "groups": 2}}, "'groups'"),
        ({"router": 8}, "must hold 'router', an object"),
        ({"router": {}, "num_experts": 8}, "must hold 'router', an object"),
        ({"router": {"num_experts": 8, "top_k": 2}, "arch": "sm_70"}, "arch='sm_70'"),
    ],
)
def test_a_bad_router_ends_in_one_line(entry, message, tmp_path, capsys):
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    assert compile.main(["--out", str(tmp_path), "--list", str(tmp_path / "list.json")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.compile
def test_a_router_is_built_by_the_command_line_and_found(tmp_path, monkeypatch, capsys):
    """The same from a list; and loaded from there where neither DSL nor cache have it."""
    fields = {"num_experts": 32, "top_k": 2, "score": "sigmoid", "renormalize": False}
    flags = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
    flags[2] = "score=sigmoid"
    assert compile.main(["--cpu", "--out", str(tmp_path), "--router", *flags]) == 0
    program = compile.router_program(RouterConfig(**fields))
    library = tmp_path / f"{program.name(cpu=True)}.so"
    described = json.loads(library.with_suffix(".json").read_text())
    assert described["router"]["score"] == "sigmoid" and described["arch"] == "sm_90a"
    assert described["arguments"] == [name for name, _ in router_config.ARGUMENTS]
    before = library.stat().st_mtime_ns
    (tmp_path / "list.json").write_text(json.dumps([{"router": fields}]))
    listed = ["--cpu", "--out", str(tmp_path), "--list", str(tmp_path / "list.json")]
    assert compile.main(listed) == 0
    assert library.stat().st_mtime_ns == before  # found, not built again
    assert capsys.readouterr().out.count(str(library)) == 2
    monkeypatch.setattr(compile, "HAVE_DSL", False)
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("MEGAMOE_TRUST_KERNELS", "1")
    assert compile.load_program(program, tmp_path, cpu=True).path == library
    other = compile.router_program(RouterConfig(32, 3))
    with pytest.raises(compile.KernelNotFound, match="RouterConfig.*top_k=3"):
        compile.load_program(other, tmp_path)


@pytest.mark.compile
@pytest.mark.slow
def test_build_from_a_list_then_find_it(tmp_path, capsys):
    entry = ENTRY | {"kernel": {"pool_blocks": 4, "group_blocks": 2}}
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    command = ["--out", str(tmp_path), "--list", str(tmp_path / "list.json")]
    assert compile.main(command) == 0
    kernel = select(CONFIG, pool_blocks=4, group_blocks=2)
    library = tmp_path / f"{compile.kernel_name(CONFIG, kernel)}.so"
    assert library.exists()
    described = json.loads(library.with_suffix(".json").read_text())
    assert described["arguments"] == [name for name, _ in signature.ARGUMENTS]
    assert described["config"]["num_ranks"] == 2
    before = library.stat().st_mtime_ns
    assert compile.main(command) == 0  # found, not built again
    assert library.stat().st_mtime_ns == before
    capsys.readouterr()


def test_the_extras_admit_the_versions_of_serving_engines():
    """vLLM 0.33.0 and SGLang 0.5.23 pin this DSL and torch 2.14."""
    root = Path(compile.__file__).resolve().parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (dsl,) = map(Requirement, extras["compile"])
    assert dsl.extras == {"cu13"}
    (tested,) = (r for r in map(Requirement, extras["test"]) if r.name == dsl.name)
    (tested,) = (specifier.version for specifier in tested.specifier)
    assert all(version in dsl.specifier for version in ("4.8.0", tested))
    (torch,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "torch")
    assert "2.14.1" in torch.specifier and "2.9.0" in torch.specifier


def test_a_launcher_packs_its_arguments_in_place():
    seen = {}

    def entry(packed, count):
        pointers = list(packed)
        seen["count"] = count.value
        for (name, kind), pointer in zip(signature.ARGUMENTS, pointers, strict=True):
            seen[name] = ctypes.cast(pointer, ctypes.POINTER(kind))[0]

    launcher = compile.Launcher(entry)
    launcher.set(rank=3, timeout_ns=1 << 40)
    launcher(0xABC, x=1 << 45, num_tokens=7)
    assert seen["count"] == len(signature.ARGUMENTS)
    assert (seen["rank"], seen["timeout_ns"], seen["x"]) == (3, 1 << 40, 1 << 45)
    assert (seen["num_tokens"], seen["stream"]) == (7, 0xABC)


def test_a_launch_that_cuda_refuses_raises():
    def entry(packed, count):
        ctypes.cast(packed[count.value - 1], ctypes.POINTER(ctypes.c_int32))[0] = 701

    with pytest.raises(RuntimeError, match="CUDA error 701"):
        compile.Launcher(entry)(0)
