"""What reading and writing cost, as the recorder tells it: against clocks of the test's own."""

import time

import torch

from tests.model.decoding import make_decoder, text
from unfold.model.config import GistConfig
from unfold.model.decode.cost import Recorder, describe_cost
from unfold.model.decode.generation import Sampling


def test_times_of_answers():
    recorder = Recorder()

    def tokens():
        time.sleep(0.05)
        yield from ((0, 7), (1, 8))
        for _ in range(2):
            time.sleep(0.02)
            yield 0, 9

    with recorder.reading():
        time.sleep(0.1)
    time.sleep(0.2)  # between reading and writing nothing counts
    assert list(recorder.writing(tokens())) == [(0, 7), (1, 8), (0, 9), (0, 9)]
    assert len(recorder.first) == 2 and len(recorder.after) == 2
    assert all(0.15 <= seconds < 0.3 for seconds in recorder.first) and all(0.02 <= seconds < 0.1 for seconds in recorder.after)
    cost = recorder.to_dict()
    assert cost["first_token_s"] == sum(recorder.first) / 2 and cost["token_s"] == sum(recorder.after) / 2
    recorder.begin()  # an answer for which nothing was read
    recorder.token()
    assert recorder.first[2] < 0.05


def test_memory_is_of_the_time_since_the_recorder_was_made():
    large = torch.ones(64 << 20, dtype=torch.uint8)
    before = Recorder().peak
    del large
    recorder = Recorder()
    assert recorder.peak < before - (32 << 20)
    large = torch.ones(96 << 20, dtype=torch.uint8)
    del large
    assert recorder.peak > before


def test_nothing_written():
    assert describe_cost({"first_token_s": None, "token_s": None, "peak_memory_bytes": 1 << 30}) == ["-", "-", "1.00"]


def test_of_a_decoder(build):
    decoder = make_decoder(build, GistConfig((4, 2), recall="suffix"))
    recorder, began = Recorder(decoder.device), time.perf_counter()
    with recorder.reading():
        sequences = [decoder.start() for _ in range(3)]
        for sequence in sequences:
            decoder.read_context(sequence, text(40))
    assert len(list(recorder.writing(decoder.stream(sequences, Sampling(5))))) == 15
    spent = time.perf_counter() - began
    assert len(recorder.first) == 3 and len(recorder.after) == 12
    # Three sequences go on side by side: the time of one round passes for each of them.
    assert recorder.first[0] + sum(recorder.after) / 3 <= spent
