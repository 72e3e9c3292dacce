"""Lines and records: complete and ordered for all chunk sizes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from prefect_mlprojects._support.output import (
    MAX_RECORD_BYTES,
    MAX_RECORD_LINES,
    LineSplitter,
    OutputTail,
    RecordJoiner,
    TailedOutput,
)
from prefect_mlprojects.types import StreamName


def split(chunks: list[bytes], max_characters: int = 200_000) -> list[str]:
    splitter = LineSplitter(max_characters)
    return [line for chunk in chunks for line in splitter.feed(chunk)] + splitter.close()


def test_lines_are_split_at_all_line_endings() -> None:
    assert split([b"a\nb\r\nc\rd"]) == ["a", "b", "c", "d"]
    assert split([b"a\r", b"\nb"]) == ["a", "b"]
    assert split([b"a\r", b"b\n"]) == ["a", "b"]
    assert split([b"\n\n"]) == ["", ""]
    assert split([b""]) == []


def test_of_a_progress_bar_one_refresh_a_second_and_the_last_are_kept() -> None:
    splitter = LineSplitter(refresh_seconds=1.0)
    seen = [splitter.feed(f"\r{step} %".encode(), 100 + step / 10) for step in range(25)]
    assert [line for lines in seen for line in lines] == ["0 %", "10 %", "20 %"]
    assert splitter.feed(b"\rdone\nnext\r\n50", 103.0) == ["done", "next"]
    assert splitter.feed(b" %\r60 %\r", 103.1) == ["50 %"]
    assert splitter.feed(b"\n\n", 103.2) == ["60 %", ""]
    assert splitter.feed(b"70 %\r", 103.3) == []
    assert splitter.close() == ["70 %"]


def test_tail_keeps_progress_bar_once() -> None:
    class Sink:
        data = b""

        def write(self, stream: StreamName, data: bytes) -> None:
            self.data += data

    sink = Sink()
    output = TailedOutput(sink)
    shown = b"start\n" + b"".join(b"\r%d %%" % step for step in range(100)) + b"\nTraceback\n"
    output.write("stderr", shown)
    assert output.close() == ("start", "99 %", "Traceback")
    assert sink.data == shown


def test_incomplete_lines_are_kept() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"loa") == []
    assert splitter.feed(b"ding\nx") == ["loading"]
    assert splitter.close() == ["x"]


def test_invalid_utf_8_and_split_characters_are_decoded() -> None:
    assert split([b"\xc3", b"\xa9\n"]) == ["é"]
    assert split([b"\xff\n\xc3"]) == ["\ufffd", "\ufffd"]


def test_overlong_line_is_split() -> None:
    lines = split([b"x" * 300, b"y" * 900_000, b"\nz\n"], max_characters=1000)
    assert "".join(lines[:-1]) == "x" * 300 + "y" * 900_000
    assert lines[-1] == "z"
    assert max(map(len, lines)) == 1000


@given(st.binary(), st.lists(st.integers(0, 40), max_size=10))
def test_lines_do_not_depend_on_chunks(data: bytes, cuts: list[int]) -> None:
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    assert split([data[a:b] for a, b in itertools.pairwise(places)]) == split([data])


def test_slow_lines_are_separate_records_and_fast_lines_are_joined() -> None:
    joiner = RecordJoiner()
    assert [record.text for record in joiner.add("stdout", ["a"], 10.0)] == ["a"]
    assert [record.text for record in joiner.add("stdout", ["b"], 11.0)] == ["b"]
    assert joiner.add("stdout", ["c"], 11.001) == []
    assert joiner.add("stdout", ["d"], 11.002) == []
    assert joiner.deadline() == 11.501
    assert [(record.text, record.time) for record in joiner.flush(11.6)] == [("c\nd", 11.001)]
    assert joiner.deadline() is None


def test_record_of_both_streams_is_named_output() -> None:
    joiner = RecordJoiner()
    joiner.add("stdout", ["a", "b"], 1.0)
    joiner.add("stderr", ["c"], 1.01)
    (record,) = joiner.flush(2.0)
    assert (record.stream, record.text) == ("output", "a\nb\nc")


@given(
    st.lists(
        st.tuples(st.sampled_from(["stdout", "stderr"]), st.lists(st.text(max_size=20), max_size=700), st.floats(0, 1)),
        max_size=8,
    )
)
def test_records_are_complete_ordered_and_bounded(chunks: list[tuple[StreamName, list[str], float]]) -> None:
    joiner, now, records, lines = RecordJoiner(), 0.0, [], []
    for stream, some, pause in chunks:
        now += pause
        lines += some
        records += joiner.add(stream, some, now)
    records += joiner.flush(now)
    assert "\n".join(record.text for record in records) == "\n".join(lines)
    assert all(record.text.count("\n") < MAX_RECORD_LINES for record in records)


def test_records_stay_below_prefect_s_size_limit() -> None:
    joiner = RecordJoiner()
    records = joiner.add("stdout", ["é" * 100_000] * 20, 1.0) + joiner.flush(1.0)
    assert sum(record.text.count("é") for record in records) == 2_000_000
    assert max(len(record.text.encode()) for record in records) <= MAX_RECORD_BYTES


def test_tail_keeps_last_lines() -> None:
    tail = OutputTail(max_lines=2, max_characters=5)
    for line in ["one", "", "two", "threethree"]:
        tail.add(line)
    assert tail.lines() == ("two", "three…")
