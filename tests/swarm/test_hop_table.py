"""The table of hops has a row for each server, the one that took longest first."""

from __future__ import annotations

from slowllm.swarm.hop_table import PeerTimes, hop_table


def test_the_table_shows_where_the_time_went_and_what_was_rebuilt() -> None:
    times = {
        "a" * 20: PeerTimes("desk (aaaaaa)", 6, 0.5, 0.25, 1.0),
        "b" * 20: PeerTimes("bbbbbb", 1200, 10.0, 0.0, 2.0),
    }
    assert hop_table(times, {"b" * 20: 3}).splitlines() == [
        "hop            requests  network s  queue s  compute s  rebuilt",
        "bbbbbb            1,200      10.00     0.00       2.00        3",
        "desk (aaaaaa)         6       0.50     0.25       1.00        0",
    ]
