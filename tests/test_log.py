"""The table of metrics: the same rows as text and as Parquet, whole after a kill, and cut where a run resumes."""

import numpy as np
import pytest

from jrl.run import RunError, log

LABELS = [{"cell": "lr=1", "seed": 0}, {"cell": "lr=1", "seed": 1}, {"cell": "lr=2", "seed": 0}]


def rows(first, count):
    updates = np.arange(first, first + count)
    metrics = {
        name: np.arange(3 * count, dtype=np.float32).reshape(3, count) + 100 * first + k for k, name in enumerate("ab")
    }
    metrics["b"][0, 0] = np.nan
    return updates, updates * 10, metrics


@pytest.fixture(params=[log.CsvTable, log.ParquetTable])
def table(request, tmp_path):
    made = request.param(tmp_path / "metrics", LABELS)
    made.write(*rows(1, 4))
    made.write(*rows(5, 2))
    return made


def same(read, *parts):
    env_steps, metrics = read
    np.testing.assert_array_equal(env_steps, np.concatenate([part[1] for part in parts]))
    for name in "ab":
        np.testing.assert_array_equal(metrics[name], np.concatenate([part[2][name] for part in parts], axis=1))


def test_what_is_written_is_read(table):
    same(table.read(), rows(1, 4), rows(5, 2))


@pytest.mark.parametrize("updates", [0, 3, 4, 6, 9])
def test_rows_after_the_checkpoint_are_dropped(table, updates):
    table.truncate(updates)
    whole = rows(1, 4), rows(5, 2)
    if updates == 0:
        return table.write(*rows(1, 4)) or same(table.read(), rows(1, 4))
    kept = [(u[u <= updates], s[u <= updates], {k: m[:, u <= updates] for k, m in ms.items()}) for u, s, ms in whole]
    same(table.read(), *kept)
    table.write(*rows(updates + 1, 1))
    same(table.read(), *kept, rows(updates + 1, 1))


def test_a_table_without_some_rows_is_refused(table):
    assert len(log.read_whole(table, 6, 1, 10)[0]) == 6
    for updates, every, last in ((7, 1, 6), (5, 1, 6)):
        with pytest.raises(
            RunError, match=f"metrics is damaged: rows are missing after update {last}, and .* is of {updates}"
        ):
            log.read_whole(table, updates, every, 10)
    table.write(*rows(9, 1))
    assert len(log.read_whole(table, 9, 3, 10)[0]) == 7  # rows of three updates each, but for the first
    with pytest.raises(RunError, match="rows are missing after update 6, and the checkpoint is of 9"):
        log.read_whole(table, 9, 1, 10)


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    table = log.CsvTable(tmp_path / "metrics.csv", LABELS)
    table.write(*rows(1, 4))
    whole = table.path.read_text()
    unreadable, short = "it cannot be read", "rows are missing after update"
    for text, why in (
        ("", f"{short} 0"),
        (whole.replace("seed", "sEed"), unreadable),
        (whole.replace("40,", "a,"), unreadable),
        (whole[:-20], f"{short} 3"),  # in the middle of a row
    ):
        table.path.write_text(text)
        with pytest.raises(RunError, match=rf"metrics\.csv is damaged: {why}"):
            log.read_whole(table, 4, 1, 10)


def test_what_is_no_row_is_dropped_with_all_after_it(tmp_path):
    table = log.CsvTable(tmp_path / "metrics.csv", LABELS)
    table.write(*rows(1, 4))
    whole = table.path.read_bytes()
    for tail in (b"\xff\x00\r\n", b"5" * 5000 + b"\r\n", b"3", b"7,70,lr=1,0,1,2\r\n1,10,lr=1,0,1,2\r\n"):
        table.path.write_bytes(whole + tail)
        table.truncate(4)
        assert table.path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"x" * 50])
def test_a_damaged_file_of_parquet_is_named(damage, tmp_path):
    table = log.ParquetTable(tmp_path / "metrics", LABELS)
    table.write(*rows(1, 4))
    (path,) = table.path.iterdir()
    path.write_bytes(damage)
    with pytest.raises(RunError, match=f"{path.name} is damaged: it cannot be read"):
        table.truncate(4)
    table.truncate(0)
    assert not [*table.path.iterdir()]  # of an update that is made again, it need not be read


def test_a_half_written_file_is_dropped(tmp_path):
    table = log.ParquetTable(tmp_path / "metrics", LABELS)
    table.write(*rows(1, 4))
    whole = next((tmp_path / "metrics").glob("*.parquet"))
    (tmp_path / "metrics/000000005.tmp").write_bytes(whole.read_bytes()[:50])
    same(table.read(), rows(1, 4))
    table.truncate(4)
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["000000001.parquet"]


def test_other_programs_read_parquet_as_one_table(tmp_path):
    import pandas

    table = log.ParquetTable(tmp_path / "metrics", LABELS)
    table.write(*rows(1, 4))
    table.write(*rows(5, 2))
    frame = pandas.read_parquet(tmp_path / "metrics")
    assert list(frame.columns) == ["update", "env_steps", "cell", "seed", "a", "b"] and len(frame) == 18
    chosen = frame[(frame.cell == "lr=2") & (frame["update"] == 6)]
    assert chosen.a.tolist() == [rows(5, 2)[2]["a"][2, 1]]


def test_thousands_of_members_get_a_folder_and_a_few_a_text_file(tmp_path):
    few, many = ([{"seed": i} for i in range(n)] for n in (log.CSV_MEMBERS, log.CSV_MEMBERS + 1))
    assert log.table(tmp_path, few).path.name == "metrics.csv"
    assert log.table(tmp_path, many).path.name == "metrics"
