"""The table of metrics: the same rows as text and as Parquet, whole after a kill, and cut where a run resumes."""

import numpy as np
import pytest

from jrl.run import log

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
