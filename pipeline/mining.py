"""mine: fetch the bytes of the selected faces once and store them with everything known about them.

One slice at a time, in any number of tasks: the selection says which faces, the faces table where
they stand and what their bytes hashed to, the scores what the teacher thought. Reads only what was
selected; a slice without selected faces opens no source.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import LedgerError
from pipeline.ledger import Ledger, Slice
from pipeline.schema import MINED, label_codes, label_names_of, matrix, with_label_names
from pipeline.sources.reader import PoolSource, fetch
from pipeline.storage import Location


def read_selection(at: Location, slice: Slice) -> pa.Table:
    """SELECTION rows of a slice from the ledger at `at`; what the pass reads."""
    return Ledger(at).read(slice.key)


class Miner:
    """Selection of a slice -> committed MINED table of that slice."""

    def __init__(
        self,
        at: Location,
        selection: Location,
        scores: Location,
        faces: Location,
        sources: Mapping[str, PoolSource],
        teacher: str,
        rule: str,
    ) -> None:
        """Open the ledgers.

        Args:
            at: ledger to commit to.
            selection: ledger of select.
            scores: ledger of score.
            faces: ledger of survey.
            sources: pool sources by the recipe's name.
            teacher: sha256 of the weights that scored.
            rule: digest of the operating point that selected.
        """
        self._mined = Ledger(at)
        self._inputs = {
            "select": Ledger(selection),
            "score": Ledger(scores),
            "survey": Ledger(faces),
        }
        self._sources = sources
        self._teacher, self._rule = teacher, rule

    def __call__(self, slice: Slice, selection: pa.Table) -> pa.Table:
        """Commit the mined faces of a slice.

        Args:
            slice: the unit of work.
            selection: its SELECTION rows, see :func:`read_selection`.

        Returns:
            One row for the yield meter: rows and one count per class name.

        Raises:
            LedgerError: an input is not committed, tables of the slice do not line up, or a face's
                bytes are not those that were surveyed.
            SourceError: the shard changed or is gone.
        """
        began = time.perf_counter()
        reads = {stage: self._digest(stage, slice) for stage in self._inputs}
        columns = ["id", "probs", "pseudo_label", "confidence"]
        scores = self._inputs["score"].read(slice.key, columns)
        faces = self._inputs["survey"].read(slice.key, ["id", "position", "group", "sha256"])
        for stage, table in (("score", scores), ("survey", faces)):
            if not table["id"].equals(selection["id"]):
                raise LedgerError(f"slice {slice.key}: faces of {stage} and select differ")
        names = label_names_of(scores.schema)
        table = self._table(slice, selection, scores, faces, names)
        self._mined.commit(slice, table, reads=reads, seconds=time.perf_counter() - began)
        labels = table["label"].to_pylist()
        return pa.table({"rows": [len(table)], **{name: [labels.count(name)] for name in names}})

    def _digest(self, stage: str, slice: Slice) -> str:
        commit = self._inputs[stage].winner(slice.key)
        if commit is None:
            raise LedgerError(f"slice {slice.key} has no commit of {stage} to mine from")
        return commit.sha256

    def _table(
        self,
        slice: Slice,
        selection: pa.Table,
        scores: pa.Table,
        faces: pa.Table,
        names: tuple[str, ...],
    ) -> pa.Table:
        """MINED rows, sorted by position."""
        schema = with_label_names(MINED, names)
        chosen = pc.indices_nonzero(selection["selected"])
        if not len(chosen):
            return schema.empty_table()
        chosen = chosen.take(pc.sort_indices(faces["position"].take(chosen)))
        kept, scored, surveyed = selection.take(chosen), scores.take(chosen), faces.take(chosen)
        read = fetch(slice, surveyed["position"].to_pylist(), self._sources)
        check_bytes(slice, surveyed, read)
        count = len(kept)
        columns = {
            "id": kept["id"],
            "image": read["image"],
            "label": kept["label"],
            "soft": _soft(kept["label"], scored, names),
            "weight": kept["weight"],
            "confidence": scored["confidence"],
            "group": surveyed["group"],
            "box": read["box"],
            "landmarks": read["landmarks"],
            "source": pa.repeat(slice.source, count),
            "shard": pa.repeat(slice.shard, count),
            "position": surveyed["position"],
            "sha256": surveyed["sha256"],
            "teacher": pa.repeat(self._teacher, count),
            "rule": pa.repeat(self._rule, count),
        }
        arrays = [columns[field.name].cast(field.type) for field in schema]
        return pa.Table.from_arrays(arrays, schema=schema)


def _soft(label: pa.ChunkedArray, scored: pa.Table, names: tuple[str, ...]) -> pa.Array:
    """The teacher's probabilities; a face that select named otherwise is wholly of that class."""
    renamed = pc.not_equal(label, scored["pseudo_label"]).to_numpy()
    if not renamed.any():
        return scored["probs"].combine_chunks()
    probs = matrix(scored["probs"], len(names))
    codes = label_codes(label.filter(pa.array(renamed)).to_pylist(), names)
    probs[renamed] = np.eye(len(names), dtype=np.float32)[codes]
    return pa.FixedSizeListArray.from_arrays(pa.array(probs.ravel()), len(names))


def check_bytes(slice: Slice, surveyed: pa.Table, read: pa.Table) -> None:
    """Raise LedgerError naming the first face whose bytes are not those that were surveyed.

    Args:
        slice: where the faces are from.
        surveyed: rows with `id` and `sha256` (of the encoded bytes).
        read: READ rows of the same faces, in the same order.
    """
    if not read["id"].equals(surveyed["id"]):
        raise LedgerError(
            f"slice {slice.key}: fetched {len(read)} faces, expected {len(surveyed)} from "
            f"{slice.shard}"
        )
    for name, image, digest in zip(
        surveyed["id"].to_pylist(), read["image"], surveyed["sha256"].to_pylist(), strict=True
    ):
        found = hashlib.sha256(image.as_buffer()).digest() if image.is_valid else None
        if found != digest:
            raise LedgerError(
                f"{name}: bytes hash to {found.hex()[:12] if found else 'nothing'}, surveyed as "
                f"{digest.hex()[:12] if digest else 'nothing'}; {slice.shard} changed after survey"
            )
