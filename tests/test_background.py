"""Pieces of work beside the caller: their order, their errors, how many wait."""

import os
import signal
from threading import Event, Thread, Timer

import pytest

from common.background import Background


@pytest.fixture
def background():
    """A function that makes them, and ends them after the test."""
    made = []

    def make(unfinished: int) -> Background:
        made.append(Background(unfinished))
        return made[-1]

    yield make
    for one in made:
        one.close()


def fail():
    raise OSError("No space left on device")


def test_pieces_are_done_beside_the_caller_and_in_order(background):
    beside, gate, done = background(3), Event(), []
    beside.submit(gate.wait)
    for number in (1, 2):
        beside.submit(lambda number=number: done.append(number))
    assert done == []
    gate.set()
    beside.wait()
    assert done == [1, 2]


def test_with_none_unfinished_the_caller_waits(background):
    done = []
    background(0).submit(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(OSError, match="No space left"):
        background(0).submit(fail)


def test_a_full_queue_makes_the_caller_wait(background):
    beside, gate = background(2), Event()
    beside.submit(gate.wait)
    beside.submit(lambda: None)
    third = Thread(target=beside.submit, args=(lambda: None,))
    third.start()
    third.join(0.1)
    waited = third.is_alive()
    gate.set()
    third.join(10)
    assert waited and not third.is_alive()


def test_an_error_comes_with_the_next_piece(background):
    beside, gate, done = background(2), Event(), []

    def fail_later():
        gate.wait()
        fail()

    beside.submit(fail_later)
    gate.set()
    beside._thread.submit(lambda: None).result()  # which is behind it
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            beside.submit(lambda: done.append("next"))
    beside.close()
    assert done == []


def test_an_error_comes_with_the_end_and_leaves_out_what_was_behind_it(background):
    beside, gate, done = background(3), Event(), []
    beside.submit(gate.wait)
    beside.submit(fail)
    beside.submit(lambda: done.append("behind"))
    gate.set()
    with pytest.raises(OSError, match="No space left"):
        beside.wait()
    beside.close()
    assert done == []


def test_close_finishes_what_waits_and_raises_nothing(background):
    beside, gate, done = background(3), Event(), []
    beside.submit(gate.wait)
    beside.submit(lambda: done.append(1))
    beside.submit(fail)
    gate.set()
    beside.close()
    assert done == [1]


def test_a_piece_whose_waiting_was_interrupted_is_waited_for_again(background):
    beside, gate, done = background(0), Event(), []

    def work():
        gate.wait()
        done.append(1)

    Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        beside.submit(work)
    assert done == []
    gate.set()
    beside.wait()
    assert done == [1]
