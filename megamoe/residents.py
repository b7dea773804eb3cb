"""The weights of a layer: which tensors its launches read, where, and since when.

Launches read the given tensors where they are, and scales of weight blocks from tables that are
laid out for the kernel. A CUDA graph holds the addresses of all of them. So tables are allocated
once and rewritten in place, and `weights_version` counts how often an address has changed.

Neighbours: `weights` says what is legal and how tables look, `module` launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megamoe.arguments import resolve_device
from megamoe.config import MoEConfig
from megamoe.fourbit import format_of
from megamoe.precision import Precision
from megamoe.reference import Weights
from megamoe.weights import (
    check_weights,
    empty_tile_scales,
    empty_weights,
    pack_weights,
    resident_shapes,
    unpack_weights,
    write_tile_scales,
)

TABLES = ("w13_tile_scales", "w2_tile_scales")


class ResidentWeights(torch.nn.Module):
    """A module that holds expert weights as buffers, or as parameters if that is what it was given,
    and hands them to launches (`_read`).

    A subclass sets `config`, `device` and `num_local_experts` (experts of all ranks that live in
    this process) and then calls `_declare`; `_settle_on` is its way from "meta" to a device.
    """

    config: MoEConfig
    device: torch.device
    num_local_experts: int

    def _declare(self) -> None:
        """Declare the weights, of which there are none yet."""
        self._names = tuple(resident_shapes(*self._sizes()))
        #: Groups of 4-bit weights that loading has rounded anew: MXFP4's because their exponents
        #: were too far below the highest of their row, INT4's because they held a -8.
        self.requantized_groups = 0
        for name in (*self._names, *TABLES):
            self._parameters.pop(name, None)  # of a layer that ends
            self.register_buffer(name, None, persistent=name not in TABLES)
        self._version, self._captured = 0, False
        self._addresses: list[int] = []
        self._watched: list[tuple] = []

    def _sizes(self) -> tuple[Precision, int, int, int]:
        config = self.config
        return config.recipe, self.num_local_experts, config.hidden_size, config.intermediate_size

    def _read(self, weights: list[Weights], tables: list[tuple]) -> None:
        """Let launches read these from now on; by rank: weights, and the scales of w13 and w2 or
        Nones.
        """
        raise NotImplementedError

    def _settle_on(self, device: torch.device) -> None:
        """Allocate on a device, after "meta"."""
        raise NotImplementedError

    def _check_open(self) -> None:
        """Raise ValueError if the layer was closed."""

    def _check_settled(self) -> None:
        """Raise ValueError if the layer is on "meta"."""
        if self.device.type == "meta":
            raise ValueError("the layer is on device 'meta': call to_empty(device='cuda') first")

    # ---------------------------------------------------------------- for users
    def load_weights(
        self,
        w13: torch.Tensor,
        w2: torch.Tensor,
        w13_scale: torch.Tensor | None = None,
        w2_scale: torch.Tensor | None = None,
        replace: bool = False,
    ) -> None:
        """Take the experts of the ranks of this process, in checkpoint layout.

        w13: [n, 2I, H], gate rows then up rows; w2: [n, H, I]; bfloat16, or float8_e4m3fn for the
        precisions "fp8_block" and "fp8_channel". w13_scale, w2_scale: float32, what the stored
        weights are multiplied by; for "fp8_block" [n, 2I/128, H/128] and [n, H/128, I/128], for
        "fp8_channel" [n, 2I] and [n, H]. In MXFP4 w13 is uint8 [n, 2I, H/2] and w2 uint8
        [n, H, I/2], two e2m1 codes a byte, the first in the low nibble, and the scales are
        exponents of two, uint8 or float8_e8m0fnu [n, 2I, H/32] and [n, H, I/32]; in INT4 the
        codes are two's complement, and the scales float32 or bfloat16 [n, 2I, H/128] and
        [n, H, I/128]. `megamoe.quantize_weights` makes all four. n is E if all ranks live here,
        e = E / W with a process per rank (its experts are number rank * e and following). With
        shared experts those of each rank are followed by the shared ones: n is W or once e + S.

        All are contiguous and on the device, and start at a multiple of 16 bytes. Raises
        ValueError, naming the tensor, otherwise. Weights are not copied: the layer holds them as
        buffers of these names, or as parameters if that is what they are, and a forward reads what
        they hold then. Only scales of weight blocks are laid out anew, now and by `refresh_scales`.
        4-bit weights are copied, into the order in which the kernel reads them: the given tensors
        can be freed, loading again writes into the same place, and new values come only so.
        Exponents are kept to 2^-11 of the largest of their row; lower groups are rounded to that
        and counted (`requantized_groups`), and so are groups of integers with a -8, which becomes
        -7.

        Once a CUDA graph has captured a forward, tensors at other addresses are refused, because
        the graph reads the old ones; `replace` takes them, for who captures again
        (`weights_version` changes).
        """
        self._check_open()
        weights = Weights(w13, w2, w13_scale, w2_scale)
        if self.config.recipe.weights.packed:
            weights = self._pack(weights)
        self._check_weights(weights, replace)
        for name in self._names:
            self._hold(name, getattr(weights, name))
        self._adopt(replace)

    @torch.no_grad()
    def load_experts(self, read: Callable[[int, Weights], object]) -> None:
        """Load one expert after the other: beside the weights themselves, memory is needed for
        one expert at most.

        read(expert, weights) writes an expert into `weights`: tensors as `load_weights` takes them,
        of this expert alone (without the first axis), on the layer's device. Experts are 0..n-1 in
        order, n and what else is legal as there. Values go into the tensors that the layer has, so
        under captured graphs too, or into new ones. An error of `read` is passed on, and so is a
        ValueError for 4-bit weights with a scale that is not finite: a layer without weights then
        still has none, one with weights has some new experts, and is to be loaded again.

        Raises ValueError for a layer that was closed or is on "meta".
        """
        self._check_open()
        self._check_settled()
        there = self._held() if self._holds_any() else None
        if there is not None:
            self._check_weights(there, replace=False)
        with torch.inference_mode(False):  # rewritten inside and outside of it
            weights = there or empty_weights(*self._sizes(), self.device, resident=True)
        try:
            with torch.inference_mode():
                self.requantized_groups = self._fill(weights, read)
            for name in self._names:
                self._hold(name, getattr(weights, name))
        finally:
            if self._holds_any():  # after an error, so that new experts have their own scales
                self._adopt()

    def refresh_scales(self) -> None:
        """Bring new values of w13_scale and w2_scale to the next launch, and to replays of graphs
        that were captured before. Runs on the current stream and may itself be captured.

        For precision="fp8_block" only this, or loading again, does it for certain: a forward by
        itself notices what torch counts as a write (not `tensor.data.copy_`), a replay nothing.
        Other precisions have no scales that are laid out anew.
        """
        self._check_open()
        self._adopt()

    def kernel_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """(name, tensor) of what launches read of the weights: w13, w2 and their scales as the
        kernel has them. The first axis of each is the expert: who moves expert rows, or writes new
        ones, does it in all of them (or in the given tensors, and then calls `refresh_scales`).
        """
        held = self._held()
        matrices = [("w13", held.w13), ("w2", held.w2)]
        tables = self._tables()
        if tables is not None:
            return matrices + list(zip(TABLES, tables, strict=True))
        return matrices + [(name, getattr(held, name)) for name in self._names[2:]]

    @property
    def weights_version(self) -> int:
        """Changes whenever launches read weights at other addresses; a CUDA graph captured under
        another version reads memory that may be freed.
        """
        return self._version

    # ---------------------------------------------------------------- what is held
    def _held(self) -> Weights:
        """The weights that the module has now; ValueError if it has none."""
        found: dict[str, torch.Tensor] = {}
        for name in self._names:
            tensor: torch.Tensor | None = self._parameters.get(name)
            tensor = self._buffers.get(name) if tensor is None else tensor
            if tensor is None:
                raise ValueError("weights are not loaded: call load_weights(w13, w2) first")
            found[name] = tensor
        return Weights(**found)

    def _holds_any(self) -> bool:
        return any(
            held.get(name) is not None
            for name in self._names
            for held in (self._buffers, self._parameters)
        )

    def _hold(self, name: str, tensor: torch.Tensor) -> None:
        self._buffers.pop(name, None)
        self._parameters.pop(name, None)
        if isinstance(tensor, torch.nn.Parameter):
            self.register_parameter(name, tensor)
        else:
            self.register_buffer(name, tensor)

    def _check_weights(self, given: Weights, replace: bool) -> None:
        """Raise ValueError unless `_adopt` may take these."""
        check_weights(self.config, self.num_local_experts, self.device, given, resident=True)
        moved = self._addresses and _places(given) != self._addresses
        if moved and self._captured and not replace:
            raise ValueError(
                "weights are at other addresses than those that a captured CUDA graph reads: write "
                "new values into the tensors that the layer has, or load with replace=True and "
                "capture again"
            )

    def _pack(self, given: Weights) -> Weights:
        """4-bit weights of a checkpoint as the kernel reads them: in the place of those that the
        layer has, if any.
        """
        form = format_of(self.config.recipe.weights)
        given = Weights(*given[:2], *map(form.own_scales, given[2:]))
        check_weights(self.config, self.num_local_experts, self.device, given)
        if self.device.type == "meta":
            return empty_weights(*self._sizes(), self.device, resident=True)
        there = self._held() if self._holds_any() else None
        packed, self.requantized_groups = pack_weights(given, there)
        return packed

    def _fill(self, weights: Weights, read: Callable[[int, Weights], object]) -> int:
        """Read all experts into resident weights; how many groups were rounded anew."""
        recipe, experts, hidden, intermediate = self._sizes()
        if not recipe.weights.packed:
            for expert in range(experts):
                read(expert, weights.of(expert))
            return 0
        one, changed = empty_weights(recipe, 1, hidden, intermediate, self.device), 0
        for expert in range(experts):
            read(expert, one.of(0))
            changed += pack_weights(one, weights, [expert])[1]
        return changed

    def _adopt(self, replace: bool = False) -> None:
        """Let launches read what the module holds; captured graphs get new scales too."""
        held = self._held()
        self._check_weights(held, replace)
        places = _places(held)
        if places != self._addresses:
            self._addresses, self._captured = places, False
            self._version += 1
        if self.device.type != "meta":
            self._lay_out_scales(held)
        self._watched = self._watch(held)
        tensors = [tensor for _, tensor in self.kernel_tensors()]
        scales: Sequence[torch.Tensor | None] = tensors[2:] or [None, None]
        local = self.config.local_experts
        parts = [slice(at, at + local) for at in range(0, self.num_local_experts, local)]
        self._read(
            [held.of(part) for part in parts],
            [tuple(None if scale is None else scale[part] for scale in scales) for part in parts],
        )

    def _lay_out_scales(self, held: Weights) -> None:
        tables = self._tables()
        if tables is None:
            tables = empty_tile_scales(self.config, self.num_local_experts, self.device)
            for name, table in zip(TABLES, tables or (), strict=False):
                self.register_buffer(name, table, persistent=False)
        if tables is not None:
            write_tile_scales(held, *tables)

    def _tables(self) -> tuple[torch.Tensor, ...] | None:
        """(w13_tile_scales, w2_tile_scales) where scales are laid out anew."""
        tables = [table for name in TABLES if (table := self._buffers[name]) is not None]
        return tuple(tables) or None

    def _adopt_changes(self) -> None:
        """Before a launch: take weights that were put elsewhere, and scales that were written as
        far as torch counts that. Every forward asks, so it is a microsecond.
        """
        for store, name, tensor, address, writes in self._watched:
            if (
                store.get(name) is not tensor
                or tensor.data_ptr() != address
                or (writes is not None and tensor._version != writes)
            ):
                self._adopt()
                return
        if not self._watched:
            self._held()  # which says that there are none

    def _watch(self, held: Weights) -> list[tuple]:
        """(where the module holds it, name, tensor, address, writes that torch has counted): the
        last for scales that are laid out anew.
        """
        watched = []
        for name in self._names:
            tensor = getattr(held, name)
            store = self._parameters if name in self._parameters else self._buffers
            counted = self._tables() is not None and name.endswith("_scale")
            writes = tensor._version if counted and not tensor.is_inference() else None
            watched.append((store, name, tensor, tensor.data_ptr(), writes))
        return watched

    # ---------------------------------------------------------------- as torch calls it
    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """As of any module; 4-bit weights in the layout of checkpoints, so of another memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.config.recipe.weights.packed and self._holds_any():
            unpacked = unpack_weights(self._held(), self.config.recipe.weights)
            destination.update((prefix + name, getattr(unpacked, name)) for name in self._names)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *lists) -> None:
        """As of any module: values are copied into the weights that are there, or with assign=True
        take their place. A layer without weights gets some.
        """
        if self.config.recipe.weights.packed:
            state_dict = self._packed_state(state_dict, prefix, lists[-1])
        given = [state_dict.get(prefix + name) for name in self._names]
        complete = all(tensor is not None for tensor in given)
        if complete and not self._holds_any():
            copies = not local_metadata.get("assign_to_params_buffers")
            if copies and not self.config.recipe.weights.packed:  # which were packed just now
                given = [*empty_weights(*self._sizes(), self.device).present]
            for name, tensor in zip(self._names, given, strict=True):
                self._hold(name, tensor)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        errors = lists[-1]
        if complete and not errors:
            try:
                self._adopt()
            except ValueError as error:
                errors.append(str(error))

    def _packed_state(self, state_dict, prefix, errors) -> dict:
        """A state with the 4-bit weights as the layer holds them."""
        names = {name: prefix + name for name in self._names}
        if not all(key in state_dict for key in names.values()):
            return state_dict
        try:
            found = {name: state_dict[key] for name, key in names.items()}
            packed = self._pack(
                Weights(**{n: t if t.is_meta else t.to(self.device) for n, t in found.items()})
            )
        except ValueError as error:
            errors.append(str(error))
            return state_dict
        return dict(state_dict) | {key: getattr(packed, n) for n, key in names.items()}

    def _apply(self, fn, recurse=True):
        """`.to` and its like: to where and what the layer is; from "meta", where it shall be."""
        held = [tensor for tensor in (*self.buffers(), *self.parameters())]
        for dtype in {torch.bfloat16, *(tensor.dtype for tensor in held)}:
            sample = fn(torch.empty(0, dtype=dtype, device=self.device))
            if sample.dtype != dtype:
                raise ValueError(
                    f"a layer of precision={self.config.precision!r} keeps its dtypes: {dtype} "
                    f"cannot become {sample.dtype}"
                )
        there = resolve_device(sample.device)
        if there != self.device:
            if self.device.type != "meta":
                raise ValueError(
                    f"a layer stays on its device, {self.device}, and cannot go to {there}: make "
                    "one there, or make it on 'meta' and call to_empty(device=...)"
                )
            self._settle_on(there)
        super()._apply(fn, recurse)
        if held:
            self._adopt()
        return self


def _places(weights: Weights) -> list[int]:
    return [tensor.data_ptr() for tensor in weights.present]
