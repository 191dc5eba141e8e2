"""score: everything that decisions are made of, from stored embeddings; no threshold in here.

For each face: calibrated probabilities, disagreement of the teacher's members, the nearest class
prototype and the vote of the nearest labeled faces. A slice costs one FAISS search and runs at
memory speed, so new prototypes or another temperature re-score a pool without a forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field

from pipeline.artifacts import Teacher, load_teacher, on_node
from pipeline.config import Actors, Config
from pipeline.embedding import EmbedConfig, Embedder, spread
from pipeline.errors import LedgerError, ModelError
from pipeline.ledger import Ledger
from pipeline.placement import Operator, chain
from pipeline.plan import Slice
from pipeline.schema import OK, matrix, scores_schema, with_label_names
from pipeline.similarity import Neighbors, nearest_prototypes, unit, vote
from pipeline.sources.reader import PoolSource, SliceReader, read_slice
from pipeline.sources.removals import Removals
from pipeline.storage import Location


class ScoreConfig(Config):
    """How faces are compared with the labeled ones."""

    neighbors: int = Field(default=10, ge=1)  # labeled faces that vote
    neighbor_tau: float = Field(default=0.07, gt=0)  # weight of a vote: exp(cosine / tau)
    threads: int = Field(default=1, ge=1)  # FAISS and torch threads of one actor
    run_in: Literal["actor", "embed"] = "embed"  # embed: in the embedding actor
    pool: Actors = (1, 1)  # fewest and most actors of its own
    num_cpus: float = Field(default=0.25, gt=0)  # of one actor


def score_table(
    embeddings: pa.Table, teacher: Teacher, neighbors: Neighbors, k: int, tau: float = 0.07
) -> pa.Table:
    """Score rows of a slice.

    Args:
        embeddings: schema `embeddings_schema`; rows whose status is not ok keep status and reason.
        teacher: gives temperature, prototypes and the bank's labels and ids.
        neighbors: index of `teacher.bank`, made with `teacher.bank_ids`.
        k: neighbors that vote; ids beyond the size of the bank are null.
        tau: weight of a vote is exp(cosine / tau).

    Returns:
        schema `scores_schema(len(label_names), k)` in the order given, label_names in its metadata.
    """
    names = np.array(teacher.label_names, dtype=object)
    good = pc.equal(embeddings.column("status"), OK).to_numpy()
    kept = embeddings.filter(pa.array(good))
    x = unit(matrix(kept.column("embedding"), teacher.width))
    logits = matrix(kept.column("logits"), len(teacher.members) * len(names))
    logits = logits.reshape(len(kept), len(teacher.members), len(names))

    each = teacher.member_probs(torch.from_numpy(logits)).numpy()
    probs = each.mean(axis=1)
    ranked = np.sort(probs, axis=1)
    near, near_similarity, near_margin = nearest_prototypes(
        x, teacher.prototypes.cpu().numpy(), teacher.prototype_labels.cpu().numpy()
    )
    found, similarity = neighbors.search(x, k)
    label, agreement = vote(teacher.bank_labels.cpu().numpy()[found], similarity, len(names), tau)
    ids = np.full((len(kept), k), None, dtype=object)
    ids[:, : found.shape[1]] = np.array(teacher.bank_ids, dtype=object)[found]

    schema = with_label_names(scores_schema(len(names), k), teacher.label_names)
    scored = {
        "probs": probs,
        "pseudo_label": names[probs.argmax(axis=1)],
        "confidence": ranked[:, -1],
        "margin": ranked[:, -1] - ranked[:, -2],
        "disagreement": np.maximum(_entropy(probs) - _entropy(each).mean(axis=1), 0),
        "prototype_label": names[near],
        "prototype_similarity": near_similarity,
        "prototype_margin": near_margin,
        "neighbor_label": names[label],
        "neighbor_agreement": agreement,
        "neighbor_similarity": similarity[:, 0],
        "neighbor_ids": ids,
    }
    columns = [embeddings.column(name) for name in ("id", "status", "reason")]
    columns += [spread(rows, good, schema.field(name).type) for name, rows in scored.items()]
    return pa.Table.from_arrays(columns, schema=schema)


def _entropy(p: np.ndarray) -> np.ndarray:
    """Over the last axis, in nats."""
    return -(p * np.log(np.maximum(p, np.finfo(p.dtype).tiny))).sum(axis=-1)


class Scorer:
    """Embeddings of a slice -> committed scores of that slice."""

    def __init__(
        self,
        teacher_at: Location,
        ledger_at: Location,
        embed_ledger_at: Location,
        config: ScoreConfig,
    ) -> None:
        """Load the teacher and index its bank once.

        Raises:
            ModelError: the teacher has no prototypes or no labeled bank.
        """
        import faiss

        torch.set_num_threads(config.threads)
        faiss.omp_set_num_threads(config.threads)
        self._teacher = load_teacher(on_node(teacher_at))
        if not len(self._teacher.bank_ids) or not len(self._teacher.prototypes):
            raise ModelError(
                f"{teacher_at.uri}: {len(self._teacher.prototypes)} prototypes and "
                f"{len(self._teacher.bank_ids)} labeled faces; scoring needs at least one of each"
            )
        self._neighbors = Neighbors(self._teacher.bank.numpy(), self._teacher.bank_ids)
        self._ledger = Ledger(ledger_at)
        self._embedded = Ledger(embed_ledger_at)
        self._config = config

    def __call__(self, slice: Slice, embeddings: pa.Table | None) -> pa.Table:
        """Commit the scores, naming the content of the embeddings they were made from.

        Args:
            slice: the unit of work.
            embeddings: as committed by embed; None, or a table without that column, reads them
                from its ledger.

        Returns:
            One row for the yield meter: rows, quarantined and one count per class name.

        Raises:
            LedgerError: the slice has no committed embeddings.
        """
        began = time.perf_counter()
        stored = self._embedded.find(slice.key)
        if stored is None:
            raise LedgerError(f"slice {slice.key} has no committed embeddings to score")
        if embeddings is None or "embedding" not in embeddings.column_names:
            embeddings = self._embedded.read(slice.key)
        scores = score_table(
            embeddings,
            self._teacher,
            self._neighbors,
            self._config.neighbors,
            self._config.neighbor_tau,
        )
        quarantined = scores.column("probs").null_count
        self._ledger.commit(
            slice,
            scores,
            quarantined=quarantined,
            reads={"embed": stored.sha256},
            seconds=time.perf_counter() - began,
        )
        labels = scores.column("pseudo_label").to_pylist()
        counts = {name: [labels.count(name)] for name in self._teacher.label_names}
        return pa.table({"rows": [scores.num_rows], "quarantined": [quarantined], **counts})


def embed_and_score(
    teacher_at: Location,
    sources: Mapping[str, PoolSource],
    removals: Removals,
    configs: tuple[EmbedConfig, ScoreConfig],
    ledgers: tuple[Location, Location],
) -> tuple[Callable[[Slice], pa.Table], list[Operator]]:
    """The pass that reads, embeds and scores a pool once.

    Read tasks and scoring actors of their own keep an accelerator busy. A host of few cores runs
    faster with fewer processes: one actor that reads, embeds and scores several slices at a time.

    Args:
        teacher_at: teacher folder.
        sources: by the recipe's name.
        removals: faces that are not read.
        configs: of embedding and of scoring; they say what runs where.
        ledgers: of the embeddings and of the scores.

    Returns:
        What the pass's read tasks read, and its operators.
    """
    embed, score = configs
    views = {name: (source.crop, source.color) for name, source in sources.items()}
    home = Operator(
        Embedder,
        (teacher_at, ledgers[0], views, embed),
        "embed",
        pool=embed.pool,
        num_cpus=embed.num_cpus,
        num_gpus=embed.num_gpus,
        calls=embed.streams,
    )
    read: Callable[[Slice], pa.Table] = nothing
    together, apart = [home], [scorer(teacher_at, *ledgers, score)]
    if embed.read_in == "actor":
        together.insert(0, Operator(SliceReader, (sources, removals), "read"))
    else:
        read = partial(read_slice, sources=sources, removals=removals)
    if score.run_in == "embed":
        together, apart = [*together, *apart], []
    return read, [chain(together, home), *apart]


def scorer(
    teacher_at: Location, embedded: Location, into: Location, config: ScoreConfig
) -> Operator:
    """Actors that score what is embedded."""
    args = (teacher_at, into, embedded, config)
    return Operator(Scorer, args, "score", pool=config.pool, num_cpus=config.num_cpus)


def nothing(slice: Slice) -> pa.Table:
    """What read tasks read in a pass whose operators open the sources or ledgers themselves."""
    return pa.table({})
