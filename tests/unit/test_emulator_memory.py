"""Litmus tests of the emulator's memory model: what is an error, and what is merely late."""

from __future__ import annotations

import numpy as np
import pytest

from megamoe.emulator.errors import OutOfBounds, UnorderedAccess, UnwrittenRead
from megamoe.emulator.memory import GPU, SYS, Data, Memory, Word


class Litmus:
    """Agents a, b, c on ranks 0, 0, 1; ten rows of data and two words on rank 0."""

    def __init__(self, fresh=True):
        self.memory = Memory()
        self.a, self.b, self.c = self.memory.build([(0, 0, "a"), (0, 1, "b"), (1, 0, "c")])
        for agent in (self.a, self.b, self.c):
            agent.launch = 1
        array = np.zeros((10, 256), np.int32)
        self.data = Data(self.memory, "data", 0, array, 64, 4, fresh, copied=True)
        words = np.zeros(2, np.int32)
        self.word, self.other = (Word(self.memory, "word", 0, i, words, i) for i in range(2))

    def add(self, agent, word, scope=GPU, release=True):
        word.touch(agent, word.atomics, "atomic on")
        word.apply(word.value + 1)
        if release:
            self.memory.release(agent, word, scope)
        else:
            self.memory.relaxed(agent, word, scope, reads=True, writes=True)

    def acquire(self, agent, word, scope=GPU):
        word.touch(agent, word.polls, "wait on")
        self.memory.acquire(agent, word, scope)


@pytest.fixture
def litmus() -> Litmus:
    return Litmus()


def test_release_acquire_orders(litmus):
    litmus.data.write(litmus.a, 3, 7)
    litmus.add(litmus.a, litmus.word)
    assert not litmus.data.array.any()  # still held back: nobody has looked
    litmus.acquire(litmus.b, litmus.word)
    assert (litmus.data.read(litmus.b, 3) == 7).all()


def test_no_order_without_acquire(litmus):
    litmus.data.write(litmus.a, 3, 7)
    litmus.add(litmus.a, litmus.word)
    with pytest.raises(
        UnorderedAccess, match=r"role b: read of data\[3\].*write of rank 0.*role a"
    ):
        litmus.data.read(litmus.b, 3)


def test_no_order_for_what_follows_the_release(litmus):
    litmus.data.write(litmus.a, 2, 7)
    litmus.add(litmus.a, litmus.word)
    litmus.data.write(litmus.a, 3, 7)
    litmus.acquire(litmus.b, litmus.word)
    litmus.data.read(litmus.b, 2)
    with pytest.raises(UnorderedAccess):
        litmus.data.read(litmus.b, 3)


def test_relaxed_orders_nothing_without_a_fence(litmus):
    litmus.data.write(litmus.a, 3, 7)
    litmus.add(litmus.a, litmus.word, release=False)
    litmus.acquire(litmus.b, litmus.word)
    with pytest.raises(UnorderedAccess):
        litmus.data.read(litmus.b, 3)


def test_fence_then_relaxed_is_a_release(litmus):
    litmus.data.write(litmus.a, 3, 7)
    litmus.memory.fence(litmus.a)
    litmus.data.write(litmus.a, 4, 7)
    litmus.add(litmus.a, litmus.word, SYS, release=False)
    litmus.acquire(litmus.c, litmus.word, SYS)
    litmus.data.read(litmus.c, 3)
    with pytest.raises(UnorderedAccess):
        litmus.data.read(litmus.c, 4)


def test_relaxed_then_fence_is_an_acquire(litmus):
    litmus.data.write(litmus.a, 3, 7)
    litmus.add(litmus.a, litmus.word)
    litmus.memory.relaxed(litmus.b, litmus.word, GPU, reads=True, writes=False)
    with pytest.raises(UnorderedAccess):
        litmus.data.read(litmus.b, 3)
    litmus.memory.fence(litmus.b)
    litmus.data.read(litmus.b, 3)


@pytest.mark.parametrize("released,acquired", [(GPU, SYS), (SYS, GPU), (GPU, GPU)])
def test_gpu_scope_does_not_reach_another_rank(litmus, released, acquired):
    litmus.data.write(litmus.a, 3, 7)
    litmus.add(litmus.a, litmus.word, released)
    litmus.acquire(litmus.c, litmus.word, acquired)
    with pytest.raises(UnorderedAccess):
        litmus.data.read(litmus.c, 3)


def test_gpu_fence_does_not_reach_another_rank(litmus):
    litmus.data.write(litmus.a, 3, 7)
    litmus.memory.fence(litmus.a, GPU)
    litmus.add(litmus.a, litmus.word, SYS, release=False)
    litmus.acquire(litmus.c, litmus.word, SYS)
    with pytest.raises(UnorderedAccess):
        litmus.data.read(litmus.c, 3)


def test_order_is_transitive_across_scopes(litmus):
    litmus.data.write(litmus.a, 3, 7)
    litmus.add(litmus.a, litmus.word, GPU)
    litmus.acquire(litmus.b, litmus.word, GPU)
    litmus.add(litmus.b, litmus.other, SYS)
    litmus.acquire(litmus.c, litmus.other, SYS)
    assert (litmus.data.read(litmus.c, 3) == 7).all()


def test_atomics_keep_what_others_released(litmus):
    litmus.data.write(litmus.a, 3, 7)
    litmus.add(litmus.a, litmus.word)
    litmus.add(litmus.b, litmus.word, release=False)
    litmus.acquire(litmus.b, litmus.word)
    litmus.data.read(litmus.b, 3)


def test_a_plain_store_ends_what_was_released(litmus):
    litmus.add(litmus.a, litmus.word)
    litmus.word.write(litmus.a, 0)
    assert litmus.word.visible_to(0, GPU) == []


def test_write_after_read_needs_order(litmus):
    litmus.data.write(litmus.a, slice(0, 8), 1)
    litmus.memory.hand_over([litmus.a, litmus.b])
    litmus.data.read(litmus.b, slice(2, 6), (64, 128))
    litmus.data.write(litmus.a, 1, 2)
    litmus.data.write(litmus.a, 2, 2, (0, 64))
    with pytest.raises(UnorderedAccess, match=r"write to data\[5\].*read of rank 0.*role b"):
        litmus.data.write(litmus.a, slice(5, 7), 2)
    litmus.memory.hand_over([litmus.a, litmus.b])
    litmus.data.write(litmus.a, slice(5, 7), 2)


def test_write_after_write_needs_order(litmus):
    litmus.data.write(litmus.a, 1, 1)
    with pytest.raises(UnorderedAccess, match="not ordered after the write"):
        litmus.data.write(litmus.b, np.array([4, 1]), 2)


def test_ordered_writes_land_in_order(litmus):
    litmus.data.write(litmus.a, 1, 1)
    litmus.memory.hand_over([litmus.a, litmus.b])
    litmus.data.write(litmus.b, 1, 2)
    litmus.memory.flush(litmus.b, litmus.b.time)
    litmus.memory.flush(litmus.a, litmus.a.time)
    assert (litmus.data.array[1] == 2).all()


def test_own_stores_are_seen(litmus):
    litmus.data.write(litmus.a, 1, 1)
    assert (litmus.data.read(litmus.a, 1) == 1).all()


def test_bulk_copy_needs_its_group_wait(litmus):
    source = [3]
    litmus.data.bulk_write(litmus.a, 1, source, (0, 256))
    litmus.add(litmus.a, litmus.word)
    litmus.acquire(litmus.b, litmus.word)
    with pytest.raises(UnorderedAccess):
        litmus.data.read(litmus.b, 1)
    source[0] = 5  # the copy has not read its buffer yet
    litmus.data.complete(litmus.a, *litmus.a.bulk.pop()[1:])
    litmus.add(litmus.a, litmus.word)
    litmus.acquire(litmus.b, litmus.word)
    assert (litmus.data.read(litmus.b, 1) == 5).all()


def test_async_proxy_needs_a_fence_of_the_reader(litmus):
    litmus.data.write(litmus.a, 1, 1)
    litmus.memory.proxy_fence(litmus.a)
    litmus.add(litmus.a, litmus.word)
    litmus.acquire(litmus.b, litmus.word)
    with pytest.raises(UnorderedAccess, match="the write and a proxy fence of rank 0"):
        litmus.data.read(litmus.b, 1, asynchronous=True)
    litmus.memory.proxy_fence(litmus.b)
    litmus.data.read(litmus.b, 1, asynchronous=True)


@pytest.mark.parametrize("fence", ["none", "before the store", "after the release"])
def test_async_proxy_needs_a_fence_of_the_writer(litmus, fence):
    """Between its store and its release: ordinary reads need none."""
    if fence == "before the store":
        litmus.memory.proxy_fence(litmus.a)
    litmus.data.write(litmus.a, 1, 1)
    litmus.add(litmus.a, litmus.word)
    if fence == "after the release":
        litmus.memory.proxy_fence(litmus.a)
    litmus.acquire(litmus.b, litmus.word)
    litmus.memory.proxy_fence(litmus.b)
    litmus.data.read(litmus.b, 1)
    with pytest.raises(UnorderedAccess):
        litmus.data.read(litmus.b, 1, asynchronous=True)


def test_a_proxy_fence_covers_own_stores_only(litmus):
    litmus.data.write(litmus.a, 1, 1)
    litmus.memory.hand_over([litmus.a, litmus.b])
    litmus.data.write(litmus.b, 1, 2)
    litmus.memory.proxy_fence(litmus.a)
    litmus.memory.hand_over([litmus.a, litmus.b])
    litmus.memory.proxy_fence(litmus.b)
    assert (litmus.data.read(litmus.b, 1, asynchronous=True) == 2).all()
    litmus.memory.hand_over([litmus.a, litmus.b])
    litmus.data.write(litmus.a, 1, 3)
    litmus.memory.hand_over([litmus.a, litmus.b])
    litmus.memory.proxy_fence(litmus.b)
    with pytest.raises(UnorderedAccess):
        litmus.data.read(litmus.b, 1, asynchronous=True)


def test_a_bulk_store_needs_no_proxy_fence_of_its_writer(litmus):
    litmus.data.bulk_write(litmus.a, 1, [3], (0, 256))
    litmus.data.complete(litmus.a, *litmus.a.bulk.pop()[1:])
    litmus.add(litmus.a, litmus.word)
    litmus.acquire(litmus.b, litmus.word)
    litmus.memory.proxy_fence(litmus.b)
    assert (litmus.data.read(litmus.b, 1, asynchronous=True) == 3).all()


def test_unwritten_row(litmus):
    litmus.data.write(litmus.a, slice(0, 2), 1)
    litmus.data.write(litmus.a, 2, 1, (0, 128))
    with pytest.raises(UnwrittenRead, match=r"read of data\[2\] \(piece 2\) of rank 0"):
        litmus.data.read(litmus.a, slice(0, 4))


def test_bytes_of_an_earlier_launch_are_unwritten(litmus):
    litmus.data.write(litmus.a, 0, 1)
    litmus.a.launch = 2
    with pytest.raises(UnwrittenRead, match="nobody wrote in launch 2"):
        litmus.data.read(litmus.a, 0)


def test_padding_rows_keep_their_value():
    litmus = Litmus(fresh=False)
    litmus.a.launch = 2
    litmus.data.read(litmus.a, 0)


@pytest.mark.parametrize("rows", [10, -1, slice(8, 11), np.array([3, 12])])
def test_out_of_bounds(litmus, rows):
    with pytest.raises(OutOfBounds, match="of data on rank 0, which has 10 rows of 256"):
        litmus.data.write(litmus.a, rows, 0)


def test_held_back_stores_are_unwritten_without_order_checks(litmus):
    """The store buffers alone show a missing acquire."""
    litmus.memory.check_order = False
    litmus.data.write(litmus.a, 3, 7)
    litmus.add(litmus.a, litmus.word)
    with pytest.raises(UnwrittenRead):
        litmus.data.read(litmus.b, 3)
    litmus.acquire(litmus.b, litmus.word)
    litmus.data.read(litmus.b, 3)


def test_plain_access_to_a_counter_needs_order(litmus):
    litmus.add(litmus.a, litmus.word)
    with pytest.raises(UnorderedAccess, match=r"read of word\[0\]"):
        litmus.word.read(litmus.b)
    with pytest.raises(UnorderedAccess, match=r"write to word\[0\]"):
        litmus.word.write(litmus.b, 0)
    litmus.acquire(litmus.b, litmus.word)
    assert litmus.word.read(litmus.b) == 1
    litmus.word.write(litmus.b, 0)
    with pytest.raises(UnorderedAccess, match=r"atomic on word\[0\]"):
        litmus.add(litmus.a, litmus.word)


def test_poison_spares_what_is_already_written_for_the_launch(litmus):
    litmus.c.launch = 2
    litmus.data.write(litmus.c, 3, 7, (64, 128))
    litmus.memory.flush(litmus.c, litmus.c.time)
    litmus.data.refill(2, -1)
    assert (litmus.data.array[3, 64:128] == 7).all()
    assert (litmus.data.array[3, :64] == -1).all() and (litmus.data.array[4] == -1).all()
