"""Memory apart from the heap: what is kept there stays as it was, and goes back when nothing looks at it."""

import gc
import threading
import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from s2cd.apart import Rooms, apart

ARRAYS = hnp.arrays(
    st.sampled_from([np.uint8, np.uint16, np.float32]), hnp.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=9)
)


@given(st.lists(ARRAYS | st.binary(max_size=30)))
def test_copies_are_equal_and_share_nothing(buffers):
    copies = apart(buffers)
    for buffer, copy in zip(buffers, copies, strict=True):
        if isinstance(buffer, bytes):
            assert (copy.dtype, copy.tobytes()) == (np.uint8, buffer)
        else:
            assert copy.dtype == buffer.dtype
            assert np.array_equal(copy, buffer, equal_nan=copy.dtype.kind == "f")
            assert not np.shares_memory(copy, buffer)
    for copy in copies:
        copy[...] = 0
    for number, copy in enumerate(copies):
        copy[...] = number
    assert all((copy == number).all() for number, copy in enumerate(copies))


@given(ARRAYS)
def test_a_room_holds_what_was_copied(array):
    assert np.array_equal(Rooms().copy(array), array, equal_nan=array.dtype.kind == "f")


def test_memory_is_used_again_only_when_no_view_of_it_is_left():
    rooms = Rooms()
    first = rooms.copy(np.arange(12, dtype=np.uint16).reshape(3, 4))
    place, view = first.ctypes.data, first[1:, ::2]
    del first
    gc.collect()
    assert rooms.spare_bytes == 0
    other = rooms.copy(np.zeros((3, 4), np.uint16))
    assert other.ctypes.data != place
    assert view.tolist() == [[4, 6], [8, 10]]
    del view
    assert rooms.spare_bytes == 24
    assert rooms.copy(np.ones(3, np.uint16)).ctypes.data != place  # of another size
    again = rooms.copy(np.ones(24, np.uint8))
    assert again.ctypes.data == place
    assert not other.any()


def test_what_was_not_used_for_long_goes_back_to_the_kernel():
    rooms = Rooms()
    kept = [rooms.copy(np.zeros(4096, np.uint8)) for _ in range(3)]
    del kept[0]
    time.sleep(1)
    del kept[0]
    rooms.free(idle=0.5)
    assert rooms.spare_bytes == 4096
    rooms.free()
    assert rooms.spare_bytes == 0
    assert not kept[0].any()


def test_threads_never_get_the_same_memory():
    rooms, until, wrong = Rooms(), time.monotonic() + 0.5, []

    def work(number):
        while time.monotonic() < until:
            copies = [rooms.copy(np.full(512, number, np.uint8)) for _ in range(3)]
            rooms.free(idle=0.001)
            if any((copy != number).any() for copy in copies):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
