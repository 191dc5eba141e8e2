"""The rest of a labeled set is a pool with the labeled ids and without labels."""

import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from pipeline.errors import SourceError
from pipeline.labeled.reader import LabeledSource, read_labeled
from pipeline.schema import READ
from pipeline.sources.extents import content_fingerprint
from pipeline.sources.rest import GONE_FILE, RestPool
from pipeline.storage import location
from pipeline.tables import write_table


def stored(tmp_path, **values):
    config = {"kind": "synthetic", "count": 100, "test_count": 20, "size": 16, **values}
    found = read_labeled(TypeAdapter(LabeledSource).validate_python(config))
    at = location(tmp_path / "labeled.parquet")
    write_table(at, found.table)
    return at, found


def test_read__rest_rows_only(tmp_path):
    at, found = stored(tmp_path, fraction=0.3)
    pool = RestPool()
    tables = [pool.read(extent) for extent in pool.slices(16, at)]
    whole = pa.concat_tables(tables)
    assert whole.schema.equals(READ)
    roles = found.table["role"].to_pylist()
    rest = found.table.filter(pa.array([role == "rest" for role in roles]))
    assert whole["id"].to_pylist() == rest["id"].to_pylist()
    assert whole["image"].to_pylist() == rest["image"].to_pylist()
    assert max(len(table) for table in tables) <= 16


def test_read__rest_rows_that_do_not_lie_together(tmp_path):
    at, found = stored(tmp_path, fraction=0.3)
    shuffled = found.table.take(pa.array([*range(40, len(found.table)), *range(40)]))
    write_table(at, shuffled)
    pool = RestPool()
    ids = [i for e in pool.slices(16, at) for i in pool.read(e)["id"].to_pylist()]
    pairs = zip(shuffled["id"].to_pylist(), shuffled["role"].to_pylist(), strict=True)
    assert ids == [i for i, role in pairs if role == "rest"]


def test_slices__same_content_same_fingerprint(tmp_path):
    prints = []
    for name in ("a", "b"):
        at, _ = stored(tmp_path / name, fraction=0.3)
        prints.append([extent.fingerprint for extent in RestPool().slices(16, at)])
    assert prints[0] == prints[1]


def test_slices__no_rest(tmp_path):
    at, found = stored(tmp_path, fraction=0.3)
    roles = pa.array([role != "rest" for role in found.table["role"].to_pylist()])
    write_table(at, found.table.filter(roles))
    with pytest.raises(SourceError, match=r"no face left for source kind 'rest'; set labeled.frac"):
        list(RestPool().slices(16, at))


def test_read__forgotten_rows_leave_and_slices_stay_as_they_were(tmp_path):
    at, found = stored(tmp_path, fraction=0.3)
    pool = RestPool()
    before = list(pool.slices(16, at))
    was = pa.concat_tables(pool.read(extent) for extent in before)
    roles = found.table["role"].to_pylist()
    lost = [roles.index("train"), roles.index("rest"), len(roles) - 1 - roles[::-1].index("rest")]
    rows = sorted((row, roles[row]) for row in lost)
    known = {"fingerprint": content_fingerprint(at), "rows": rows}
    (at.parent / GONE_FILE).write_json(known)
    write_table(at, found.table.filter(pa.array([row not in lost for row in range(len(roles))])))
    assert list(pool.slices(16, at)) == before
    now = pa.concat_tables(pool.read(extent) for extent in before)
    stay = pa.array([row not in lost for row in was["position"].to_pylist()])
    assert now.equals(was.filter(stay))
    assert len(now) == len(was) - 2
    one = now["position"][3].as_py()
    extent = next(e for e in before if e.start <= one < e.stop)
    assert pool.read(extent, [one])["id"].to_pylist() == [now["id"][3].as_py()]
