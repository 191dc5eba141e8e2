"""The best points of a search, judged by whole trainings of the student: Ray Tune, halved by folds.

The finalists are trained on one teacher member's space after the other; after 1, 2, 4 ... members
the worse half leaves. All of a rung are judged on the same faces, so they are compared in pairs. A
training is never cut short: midway through a cosine schedule an accuracy says little of its end.
The labels alone run through all members beside them, and never win.

Departs from ASHA, which lets a trial go on by what has come back before it: there the winner
depends on which worker was faster, and the same seed is to give the same point.
Cost: with F finalists and M members at most F + F/2 * (M - 1) + M trainings of the student's
length. A finished training is a file; a search that was killed goes on with the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import flow
from pipeline.config import digest
from pipeline.job import Job
from pipeline.policy import Mask, OperatingPoint, passes
from pipeline.querying import faces_of
from pipeline.search import Verdict
from pipeline.spaces import FinalistsConfig, Space
from pipeline.storage import Location, location, to_json
from pipeline.streaming import room
from pipeline.tables import read_table
from pipeline.training import runs, student
from pipeline.training.finalist import Contest, Outcome, contest
from pipeline.training.runs import TrainConfig
from pipeline.trials import asked_by, worker_of
from pipeline.tuning import grid

LABELS = "labels"
"""Stands for a point where a training sees the labels alone."""


@dataclass(frozen=True)
class Final:
    """Judges finalists; :func:`pipeline.search.search` calls it."""

    job: Job
    config: FinalistsConfig
    spaces: Sequence[Space]
    ids: Sequence[str]
    """Of the spaces' pool faces (P)."""
    kept: Location
    """Folder of finished trainings."""

    def __call__(self, points: Sequence[OperatingPoint], seen: Mask) -> Verdict:
        """Train and judge.

        Args:
            points: the finalists, the search's best first.
            seen: which labeled faces (N,) the search may see.
        """
        made = self._contest(points, seen)
        names = [*(point.digest[:12] for point in points), LABELS]
        alone, members = len(points), len(self.spaces)
        found: dict[tuple[int, int], Outcome] = {}
        standing, done = list(range(alone)), 0
        while done < members:
            upto = min(max(1, 2 * done), members)
            entries = [(f, m) for m in range(done, upto) for f in [*standing, alone]]
            self._train(made, names, entries)
            for f, m in entries:
                at = _file(self.kept, names[f], m)
                found[f, m] = Outcome.model_validate(at.read_json())
            done = upto
            if done < members:
                standing = best_half(standing, found)
        return verdict(standing, alone, found)

    def _contest(self, points: Sequence[OperatingPoint], seen: Mask) -> Contest:
        job, at = self.job, self.job.run.artifact("teach").dir
        own = flow.started(job, job.recipe.student)
        if self.config.steps is not None:
            own = own.model_copy(update={"steps": self.config.steps})
        folds = read_table(at / runs.FOLDS_FILE)
        faces = faces_of(job, self.ids)
        views = list(job.views)
        source = [views.index(name) for name in faces["source"].to_pylist()]
        faces = faces.take(pa.array(np.argsort(source, kind="stable")))
        place = pc.index_in(faces["id"], pa.array(self.ids)).to_numpy()
        return Contest(
            handed=flow.handed(job),
            student=own,
            alone=student.control(own, None, job.recipe.control),
            teacher=at.uri,
            seed=job.recipe.seed,
            ids=folds["id"].to_pylist(),
            fold=folds["fold"].to_numpy(),
            taught=np.asarray(seen),
            faces=faces,
            soft=np.stack([space.soft[place] for space in self.spaces]),
            kept=np.stack(
                [[passes(space.rows, point)[place] for space in self.spaces] for point in points]
            ),
        )

    def _train(
        self, made: Contest, names: Sequence[str], entries: Sequence[tuple[int, int]]
    ) -> None:
        """Run the trainings that have no file yet."""
        open_ = [(f, m) for f, m in entries if not _file(self.kept, names[f], m).exists()]
        place = self.job.recipe.train
        grid(
            _trial,
            [{"finalist": f, "member": m, "name": names[f]} for f, m in open_],
            {"made": made, "kept": self.kept.uri, "place": place.model_dump(mode="json")},
            name="finalists",
            trainings=len(open_),
            each=asked_by(place),
            there=room(self.job.recipe.stream),
            work=self.job.run.scratch / "tune",
        )


def depends(job: Job) -> dict[str, str]:
    """What finalists depend on beside scores: the student's settings, labels, what it starts as."""
    own, config = job.recipe.student, job.recipe.control
    said = [own.model_dump(mode="json"), config.model_dump(mode="json")]
    return {
        "student": digest(said),
        "labeled": flow.training_digest(job),
        **flow.backbone_input(job, own.model),
    }


def best_half(standing: Sequence[int], found: Mapping[tuple[int, int], Outcome]) -> list[int]:
    """The better half of the finalists, the odd one included; of equals those named first."""
    order = sorted(standing, key=lambda f: -_right(found, f)[0])
    return sorted(order[: (len(standing) + 1) // 2])


def verdict(
    standing: Sequence[int], alone: int, found: Mapping[tuple[int, int], Outcome]
) -> Verdict:
    """The best of those that stood to the end, and what that was worth.

    Args:
        standing: finalists that were judged by all members.
        alone: what stands for the labels alone in `found`.
        found: outcomes by finalist and member.
    """
    best = max(standing, key=lambda f: (_right(found, f)[0], -f))
    said = {f: _right(found, f) for f in {f for f, _ in found}}
    return Verdict(
        best=best,
        accuracy=[said[f][0] for f in sorted(said) if f != alone],
        estimates={
            "student_accuracy_in_search": said[best][0],
            "student_accuracy": said[best][1],
            "student_accuracy_labels_only": said[alone][1],
            "student_winners_curse": said[best][0] - said[best][1],
            "passes": sum(one.passes for one in found.values()),
        },
    )


def _right(found: Mapping[tuple[int, int], Outcome], finalist: int) -> tuple[float, float]:
    """Accuracy in the half that the search sees, and in the other one."""
    own = [one for (f, _), one in found.items() if f == finalist]
    right, judged = sum(one.right for one in own), sum(one.judged for one in own)
    held, judged_held = sum(o.right_held for o in own), sum(o.judged_held for o in own)
    return right / max(judged, 1), held / max(judged_held, 1)


def _trial(config: Mapping[str, Any], made: Contest, kept: str, place: Mapping[str, Any]) -> None:
    """One Tune trial; runs in a worker."""
    from ray import tune

    worker = worker_of(TrainConfig.model_validate(place))
    one = config["item"]
    finalist = None if one["name"] == LABELS else one["finalist"]
    found = contest(made, finalist, one["member"], worker)
    at = _file(location(kept), one["name"], one["member"])
    at.create(to_json(found.model_dump(mode="json")))
    tune.report({"trainings": 1})


def _file(kept: Location, name: str, member: int) -> Location:
    return kept / f"{name}-m{member}.json"
