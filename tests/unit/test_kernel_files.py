"""Which kernel files are loaded, built again or refused, and what a build leaves behind.

Kernels here are small C libraries, so neither the DSL nor a GPU is needed; a C compiler is.
"""

from __future__ import annotations

import errno
import grp
import json
import os
import pwd
import resource
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from megamoe import compile, kernel_files
from megamoe.config import MoEConfig, select
from megamoe.kernel_files import (
    DamagedKernel,
    KernelDirectoryError,
    KernelError,
    KernelFileError,
    UntrustedKernel,
)
from tests.children import STRANGER, collect, in_child, start

CONFIG = MoEConfig(8, 2, 256, 128, 64, 2)
KERNEL = select(CONFIG)
NAME = compile.kernel_name(CONFIG, KERNEL)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(CONFIG).items()]
#: Larger than a page by far: a part of it that is missing is noticed late.
SOURCE = """
char payload[200000] = {1};
const char *version = "%s";
void _mlir_megamoe__mlir_ciface_entry(void **packed) {}
void _mlir_megamoe_cuda_init(void **packed) {}
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files to others")


class Toolchain:
    """In the DSL's place: counts builds, and compiles C."""

    function_name = "entry"

    def __init__(self):
        self.builds = self.exports = 0
        self.version = "4.8.1"

    def compile_kernel(self, config, kernel):
        self.builds += 1
        return self

    def dump_to_object(self, function_prefix):
        self.exports += 1
        with tempfile.TemporaryDirectory() as directory:
            stem = Path(directory) / function_prefix
            stem.with_suffix(".c").write_text(SOURCE % self.version)
            subprocess.run(["cc", "-fPIC", "-c", "-o", f"{stem}.o", f"{stem}.c"], check=True)
            return stem.with_suffix(".o").read_bytes()


@pytest.fixture
def toolchain(monkeypatch, tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler (cc)")
    toolchain = Toolchain()
    monkeypatch.setattr(compile, "HAVE_DSL", True)
    monkeypatch.setattr(compile, "compile_kernel", toolchain.compile_kernel)
    monkeypatch.setattr(compile, "dsl_version", lambda: toolchain.version)
    monkeypatch.setattr(compile, "_runtime_archive", lambda: "-lc")
    monkeypatch.setattr(compile, "cuda_runtime", lambda: None)
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MEGAMOE_TRUST_KERNELS", raising=False)
    return toolchain


@pytest.fixture
def cache(toolchain, tmp_path) -> Path:
    """The cache, with a kernel."""
    compile.load(CONFIG, KERNEL)
    return tmp_path / "cache"


@pytest.fixture
def kernel_dir(toolchain, tmp_path) -> Path:
    """Kernels built ahead of time."""
    compile.build(CONFIG, KERNEL, tmp_path / "kernels")
    return tmp_path / "kernels"


def load(directory: Path | None = None) -> Path:
    return compile.load(CONFIG, KERNEL, directory).path


def library_of(directory: Path) -> Path:
    return directory / f"{NAME}.so"


def described(directory: Path) -> dict:
    return json.loads((directory / f"{NAME}.json").read_text())


# --- Damage ---------------------------------------------------------------------------------------


def cut(library: Path, description: Path) -> None:
    os.truncate(library, library.stat().st_size // 2)


def flip(library: Path, description: Path) -> None:
    code = bytearray(library.read_bytes())
    code[len(code) // 2] ^= 1
    library.write_bytes(code)


def describe(text: str):
    return lambda library, description: description.write_text(text)


def edit(change):
    def damage(library: Path, description: Path) -> None:
        held = json.loads(description.read_text())
        change(held)
        description.write_text(json.dumps(held))

    return damage


DAMAGES = {
    "cut": (cut, r"\.so is damaged: \d+ bytes, not the \d+ described"),
    "empty": (lambda library, _: os.truncate(library, 0), r"\.so is damaged: 0 bytes"),
    "flip": (flip, r"\.so is damaged: its SHA-256"),
    "no_description": (lambda _, description: description.unlink(), r"\.json is missing"),
    "no_json": (describe("{"), r"\.json is no description"),
    "zeros": (describe("\0" * 900), r"\.json is no description"),
    "deep": (describe("[" * 100_000), r"\.json is no description"),
    "list": (describe("[]"), "it has no 'files'"),
    "no_entry": (edit(lambda d: d.pop("entry")), "no 'entry'"),
    "not_described": (edit(lambda d: d["files"].clear()), "SHA-256 are missing"),
    "no_digest": (edit(lambda d: d["files"][f"{NAME}.so"].pop("sha256")), "SHA-256 are missing"),
    "arguments": (edit(lambda d: d["arguments"].pop()), "for other arguments"),
}
every_damage = pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)


@every_damage
def test_a_damaged_kernel_in_the_cache_is_built_again(damage, message, toolchain, cache):
    damage(library_of(cache), cache / f"{NAME}.json")

    def again():
        with pytest.warns(RuntimeWarning, match=f"{message}.*; building it again"):
            path = load()
        assert toolchain.builds == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load() == path  # now it is whole
        return path

    assert in_child(again) == str(library_of(cache))
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".so"]


@every_damage
def test_a_damaged_kernel_in_kernel_dir_is_refused(damage, message, toolchain, cache, kernel_dir):
    damage(library_of(kernel_dir), kernel_dir / f"{NAME}.json")
    before = {path.name: path.read_bytes() for path in kernel_dir.iterdir()}

    def refused():
        with pytest.raises(DamagedKernel, match=f"{kernel_dir}.*{message}"):
            load(kernel_dir)

    in_child(refused)
    assert {path.name: path.read_bytes() for path in kernel_dir.iterdir()} == before
    assert toolchain.builds == 2  # of the fixtures


def test_a_description_without_a_library_is_refused_in_kernel_dir(toolchain, cache, kernel_dir):
    library_of(kernel_dir).unlink()
    with pytest.raises(DamagedKernel, match=rf"{kernel_dir}/{NAME}\.so is missing"):
        load(kernel_dir)


def test_without_the_dsl_a_damaged_kernel_in_the_cache_is_an_error(toolchain, cache, monkeypatch):
    flip(library_of(cache), cache / f"{NAME}.json")
    monkeypatch.setattr(compile, "HAVE_DSL", False)
    with pytest.raises(DamagedKernel, match="its SHA-256"):
        load()


def test_processes_that_build_the_same_kernel_all_get_it(toolchain, cache):
    flip(library_of(cache), cache / f"{NAME}.json")
    children = [start(load) for _ in range(4)]
    assert {collect(child) for child in children} == {str(library_of(cache))}
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".so"]
    kernel_files.verified(cache, NAME)


def test_the_command_builds_a_damaged_kernel_again(toolchain, kernel_dir, capsys):
    cut(library_of(kernel_dir), kernel_dir / f"{NAME}.json")
    with pytest.warns(RuntimeWarning, match="building it again"):
        assert compile.main(["--out", str(kernel_dir), *FLAGS]) == 0
    assert compile.main(["--out", str(kernel_dir), *FLAGS]) == 0
    assert toolchain.builds == 2
    assert load(kernel_dir) == library_of(kernel_dir)


def test_without_the_dsl_the_command_refuses_a_damaged_kernel(
    toolchain, kernel_dir, capsys, monkeypatch
):
    cut(library_of(kernel_dir), kernel_dir / f"{NAME}.json")
    monkeypatch.setattr(compile, "HAVE_DSL", False)
    assert compile.main(["--out", str(kernel_dir), *FLAGS]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megamoe.compile: ") and error.count("\n") == 1
    assert f"{library_of(kernel_dir)} is damaged" in error


# --- Versions -------------------------------------------------------------------------------------


def test_a_kernel_of_another_dsl_is_built_again_in_the_cache_only(toolchain, cache, kernel_dir):
    assert described(cache)["dsl"] == "4.8.1"
    toolchain.version = "4.8.2"
    assert load(kernel_dir) == library_of(kernel_dir)
    assert described(kernel_dir)["dsl"] == "4.8.1"
    assert toolchain.builds == 2
    assert load() == library_of(cache)
    assert described(cache)["dsl"] == "4.8.2"
    assert load() == library_of(cache)
    assert toolchain.builds == 3


def test_a_process_keeps_the_library_that_it_has_loaded(toolchain, cache):
    def replaced():
        first = compile.load(CONFIG, KERNEL)
        toolchain.version = "4.8.2"
        with library_of(cache).open("rb") as mapped:
            before = library_of(cache).read_bytes()
            second = compile.load(CONFIG, KERNEL)
            assert mapped.read() == before != library_of(cache).read_bytes()
        assert second is not first  # though its path is the same
        assert compile.load(CONFIG, KERNEL) is second

    in_child(replaced)


def test_without_the_dsl_a_kernel_of_any_dsl_is_loaded(toolchain, cache, monkeypatch):
    monkeypatch.setattr(compile, "HAVE_DSL", False)
    monkeypatch.setattr(compile, "dsl_version", lambda: None)
    assert load() == library_of(cache)


def test_the_command_builds_a_kernel_of_another_dsl_again(toolchain, kernel_dir, capsys):
    toolchain.version = "4.8.2"
    assert compile.main(["--out", str(kernel_dir), *FLAGS]) == 0
    assert described(kernel_dir)["dsl"] == "4.8.2"


@pytest.mark.compile
def test_the_version_is_that_of_the_installed_dsl():
    from importlib.metadata import version

    assert compile.dsl_version() == version("nvidia-cutlass-dsl")


# --- Trust ----------------------------------------------------------------------------------------

PLACES = {
    "library": library_of,
    "description": lambda directory: directory / f"{NAME}.json",
    "directory": lambda directory: directory,
    "ancestor": lambda directory: directory.parent,
}


def refuses(directory: Path | None, match: str) -> None:
    with pytest.raises(UntrustedKernel, match=match) as caught:
        load(directory)
    assert "MEGAMOE_TRUST_KERNELS=1" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_what_everybody_can_write_is_refused(place, in_cache, cache, kernel_dir, monkeypatch):
    directory = cache if in_cache else kernel_dir
    place = PLACES[place](directory)
    place.chmod(0o757)
    wanted = None if in_cache else kernel_dir
    refuses(wanted, rf"{place} \(mode 0757\) is open to everybody.*chmod go-w {place}; or")
    for value in ("", "0", "yes"):
        monkeypatch.setenv("MEGAMOE_TRUST_KERNELS", value)
        refuses(wanted, "is open to everybody")
    monkeypatch.setenv("MEGAMOE_TRUST_KERNELS", "1")
    assert load(wanted) == library_of(directory)
    monkeypatch.delenv("MEGAMOE_TRUST_KERNELS")
    place.chmod(0o755)
    assert load(wanted) == library_of(directory)


@needs_root
@pytest.mark.parametrize(
    ("user", "group", "mode", "message"),
    [
        (0, STRANGER, 0o775, rf"\(mode 0775\) is open to group {STRANGER}.*chmod go-w"),
        (STRANGER, 0, 0o755, f"belongs to uid {STRANGER}.*chown 0"),
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_what_a_group_can_write_or_another_user_has_is_refused(
    place, user, group, mode, message, kernel_dir
):
    place = PLACES[place](kernel_dir)
    os.chown(place, user, group)
    place.chmod(mode)
    refuses(kernel_dir, f"{place} {message} {place}")
    os.chown(place, 0, STRANGER)
    place.chmod(0o755)
    assert load(kernel_dir) == library_of(kernel_dir)


@needs_root
def test_what_belongs_to_root_or_to_the_user_is_loaded(kernel_dir, monkeypatch):
    """As from a package that root installed, read-only."""
    library_of(kernel_dir).chmod(0o444)
    kernel_dir.chmod(0o555)
    os.chown(kernel_dir / f"{NAME}.json", STRANGER, -1)
    refuses(kernel_dir, f"belongs to uid {STRANGER}")
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert load(kernel_dir) == library_of(kernel_dir)
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER + 1)
    refuses(kernel_dir, f"belongs to uid {STRANGER}")


def test_every_place_is_named_at_once(kernel_dir):
    for place in (kernel_dir, library_of(kernel_dir)):
        place.chmod(0o757)
    refuses(kernel_dir, f"chmod go-w {kernel_dir}; chmod go-w {library_of(kernel_dir)}; or")


def test_a_cache_that_everybody_can_write_gets_no_kernel(toolchain, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    refuses(None, "cache .* is open to everybody")
    assert toolchain.builds == 0


def test_a_sticky_directory_protects_directories_but_not_kernels(kernel_dir, tmp_path):
    """/tmp: everybody makes entries there, and replaces only what is theirs."""
    tmp_path.chmod(0o1777)
    assert load(kernel_dir) == library_of(kernel_dir)
    kernel_dir.chmod(0o1777)
    refuses(kernel_dir, rf"\(mode 1777\).*Way out: a directory of your own in {kernel_dir}; or")


def test_links_are_judged_by_what_they_lead_to(kernel_dir, tmp_path):
    open_dir = tmp_path / "open"
    open_dir.mkdir()
    (open_dir / "kernels").symlink_to(kernel_dir)
    open_dir.chmod(0o777)  # the link may be replaced, but only what it leads to is loaded
    assert load(open_dir / "kernels") == library_of(kernel_dir)
    library = library_of(kernel_dir)
    library.rename(open_dir / "code")
    library.symlink_to(open_dir / "code")
    refuses(kernel_dir, f"{open_dir} .*is open to everybody")
    open_dir.chmod(0o755)
    assert load(kernel_dir) == library  # whatever the file is called there
    library.unlink()
    library.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DamagedKernel, match=f"{library} is missing"):
        load(kernel_dir)


@pytest.mark.parametrize(
    ("listed", "primary", "group", "private"),
    [
        ([], [], "me", True),
        (["me"], [], "me", True),
        (["me", "eve"], [], "me", False),
        ([], ["eve"], "me", False),
        ([], [], "staff", False),
        (["nobody-knows"], [], "me", False),
    ],
)
def test_a_private_group_is_nobody_else(listed, primary, group, private, kernel_dir, monkeypatch):
    """Where umask is 002 everything is open to a group that has only the user in it."""
    me, gid = os.geteuid(), kernel_dir.stat().st_gid
    accounts = [SimpleNamespace(pw_name="me", pw_uid=me, pw_gid=gid)]
    accounts.append(
        SimpleNamespace(pw_name="eve", pw_uid=STRANGER, pw_gid=gid if primary else STRANGER)
    )
    by_uid = {account.pw_uid: account for account in accounts}
    monkeypatch.setattr(pwd, "getpwall", lambda: accounts)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: by_uid[uid])
    monkeypatch.setattr(
        grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=group, gr_gid=gid, gr_mem=listed)
    )
    library_of(kernel_dir).chmod(0o775)
    kernel_dir.chmod(0o775)
    if private:
        assert load(kernel_dir) == library_of(kernel_dir)
    else:
        refuses(kernel_dir, f"open to group {group}")


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022])
def test_what_is_built_is_open_to_nobody_else(umask, toolchain, tmp_path, monkeypatch):
    cache, out = tmp_path / "home" / "cache", tmp_path / "out" / "kernels"
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(cache))
    before = os.umask(umask)
    try:
        load()
        compile.build(CONFIG, KERNEL, out)
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {modes[place] for place in (cache.parent, cache)} == {0o700}
    assert {modes[place] for place in (out.parent, out)} == {0o755}  # others may read it
    assert {modes[directory / f"{NAME}.json"] for directory in (cache, out)} == {0o644}
    assert {modes[library_of(directory)] for directory in (cache, out)} == {0o755}
    assert load() == library_of(cache)
    assert load(out) == library_of(out)


# --- Places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [".", "cache"])
def test_a_cache_that_is_a_file_is_named(below, toolchain, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path / "file" / below))
    with pytest.raises(KernelDirectoryError, match="Not a directory.*MEGAMOE_CACHE_DIR") as caught:
        load()
    assert str(tmp_path / "file") in str(caught.value)
    assert isinstance(caught.value, OSError) and caught.value.errno == errno.ENOTDIR


@pytest.mark.parametrize("place", ["/megamoe-not-here/cache", "closed/cache"])
def test_a_cache_that_cannot_be_made_is_named(place, toolchain, tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir(0o000)
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path / place))

    def refused():
        with pytest.raises(KernelDirectoryError) as caught:
            load()
        return caught.value

    said = in_child(refused, as_stranger=True)
    assert place in said and "Permission denied" in said and "MEGAMOE_CACHE_DIR" in said


def test_a_cache_that_cannot_be_written_is_named(toolchain, cache, monkeypatch):
    library_of(cache).unlink()
    os.chmod(cache, 0o555)

    def refused():
        # As another user, who may pass through: the directories above are private.
        os.chdir(cache)
        if os.geteuid() == 0:
            os.setuid(STRANGER)
        with pytest.raises(KernelDirectoryError) as caught:
            compile.build(CONFIG, KERNEL, ".")
        return caught.value

    said = in_child(refused)
    assert ". cannot be written to build a kernel: Permission denied" in said
    assert toolchain.builds == 1


def test_without_a_home_the_way_out_is_named(toolchain, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MEGAMOE_CACHE_DIR")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(KernelFileError, match="set MEGAMOE_CACHE_DIR"):
        load()


@needs_root
def test_a_kernel_dir_that_is_hidden_is_not_replaced_by_the_cache(cache, kernel_dir, tmp_path):
    tmp_path.chmod(0o700)

    def refused():
        with pytest.raises(KernelDirectoryError, match="cannot be searched") as caught:
            load(kernel_dir)
        return caught.value

    assert str(kernel_dir) in in_child(refused, as_stranger=True)


def test_a_refusal_by_the_command_is_one_line(toolchain, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert compile.main(["--out", str(tmp_path / "file"), *FLAGS]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megamoe.compile: ") and error.count("\n") == 1
    assert f"{tmp_path}/file cannot be a directory for kernels: Not a directory" in error


# --- Room -----------------------------------------------------------------------------------------


def limit(size: int) -> None:
    """As a full disk: no file of this process grows beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("when", ["before", "compiling", "linking"])
def test_a_build_without_room_names_the_directory(when, toolchain, tmp_path, monkeypatch):
    def fill(passed_on):
        def full(*arguments):
            limit(100_000)
            return passed_on(*arguments)

        return full

    def refused():
        if when == "before":
            limit(100_000)
        else:
            name = {"compiling": "compile_kernel", "linking": "_runtime_archive"}[when]
            monkeypatch.setattr(compile, name, fill(getattr(compile, name)))
        with pytest.raises(KernelDirectoryError, match="no room in .*: File too large") as caught:
            load()
        assert caught.value.errno == errno.EFBIG
        assert toolchain.builds == (when != "before")
        assert toolchain.exports == (when == "linking")  # LLVM would have ended the process
        return caught.value

    assert str(tmp_path / "cache") in in_child(refused)
    assert not list((tmp_path / "cache").iterdir())


def failing_export(error: OSError):
    def export(self, function_prefix):
        try:
            raise error
        except OSError as reason:
            raise Exception("This is a bug in the DSL") from reason  # what the DSL says

    return export


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_bug_of_the_dsl(number, toolchain, tmp_path, monkeypatch):
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(Toolchain, "dump_to_object", failing_export(error))
    with pytest.raises(OSError, match=f"no room in {tmp_path}/cache to build") as caught:
        load()
    assert caught.value.errno == number and isinstance(caught.value, KernelError)
    assert os.strerror(number) in str(caught.value)
    assert "bug in the DSL" in str(caught.value.__cause__)  # for whoever must know
    assert not list((tmp_path / "cache").iterdir())


def test_another_failure_of_the_dsl_stays_as_it_is(toolchain, tmp_path, monkeypatch):
    monkeypatch.setattr(Toolchain, "dump_to_object", failing_export(OSError(errno.EIO, "broken")))
    with pytest.raises(Exception, match="bug in the DSL") as caught:
        load()
    assert not isinstance(caught.value, KernelError)
    assert not list((tmp_path / "cache").iterdir())


def test_a_full_directory_of_temporary_files_is_named(toolchain, tmp_path, monkeypatch):
    """The DSL writes its object file there, and LLVM ends the process if it cannot."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(KernelDirectoryError, match=f"{tmp_path}/temporary cannot.*TMPDIR"):
        load()
    assert toolchain.builds == 0


@pytest.mark.compile
def test_the_dsl_does_not_end_the_process_where_there_is_no_room(tmp_path):
    def refused():
        limit(50_000)
        with pytest.raises(KernelDirectoryError, match="no room in "):
            compile.build(CONFIG, select(CONFIG, pool_blocks=4, group_blocks=2), tmp_path)

    in_child(refused)
    assert not list(tmp_path.iterdir())
