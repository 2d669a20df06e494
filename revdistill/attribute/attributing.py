"""One attribution in one directory: score, train again without random subsets, find flipped labels; and outlive being
killed in between.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from revdistill.attribute import found as checkpoints
from revdistill.attribute import harmful
from revdistill.attribute import result as results
from revdistill.attribute.arguments import checked_weights
from revdistill.attribute.check import Check, mean_known, predicted_losses, random_subsets, spearman
from revdistill.attribute.experiment import Experiment
from revdistill.attribute.flipping import LEFT_OUT, SAID, Flipped, accuracies_without, figures, left_out
from revdistill.attribute.found import Found, Scored
from revdistill.attribute.result import Result
from revdistill.attribute.retraining import retrain_pieces
from revdistill.attribute.side_by_side import how_many
from revdistill.attribute.smoothness import smoothness
from revdistill.outer.files import replacing
from revdistill.outer.job import Job

CHUNK = 10  # retrainings between two checkpoints, side by side: another number would round otherwise
FLIPPED_NAME = "flipped.json"


class Attributing(Job[Result]):
    """The steps of an attribution; each is saved as it ends. Several processes make as many steps of one kind at once:
    a chunk of retrainings each, or the trainings of one kind of examples left out.

    Args:
        directory: see Job.
        experiment: what is attributed.
        resume: see Job.
    """

    noun, verb = "attribution", "attribute"
    checkpoint, results = checkpoints.FILE_NAME, (results.FILE_NAME, harmful.FILE_NAME, FLIPPED_NAME)
    stops_within_a_step = True  # the first step is a whole attribution, which takes minutes

    def __init__(self, directory: Path, experiment: Experiment, *, resume: bool = False) -> None:
        self.experiment, self.found = experiment, Found()
        c = experiment.config
        self._steps: list[tuple[str, Callable[[], tuple[Found, str]]]] = [("attribution", self._score)]
        if c.check:
            self._subsets = random_subsets(len(experiment.examples), c.drop, c.retrainings, c.seed)
            self._steps.append(("smoothness", self._smoothness))
            self._steps += [("retrainings", self._retrain)] * -(-c.retrainings // CHUNK)
        if c.flip:
            self._steps += [("flipped labels", self._train_without)] * len(LEFT_OUT)
        super().__init__(directory, resume=resume, save_every=0.0, processes=experiment.processes)

    @property
    def total(self) -> int:
        return len(self._steps)

    @property
    def outer_step(self) -> int:
        found = self.found
        retrained = 0 if found.actual is None else -(-len(found.actual) // CHUNK)
        return (found.scored is not None) + (found.smoothness is not None) + retrained + len(found.accuracies)

    def step(self) -> tuple[dict[str, Any], str]:
        name, make = self._steps[self.outer_step]
        self.found, shown = make()
        return {"step": self.outer_step - 1, "part": name, "found": shown}, shown

    def fingerprint(self) -> int:
        found, scored = self.found, self.found.scored
        numbers = [found.smoothness or 0.0, *(a for each in found.accuracies.values() for a in each)]
        arrays = [np.array(numbers), *(() if found.actual is None else (found.actual,))]
        if scored is not None:
            arrays += [scored.scores, scored.losses, scored.training_losses, np.array(scored.accuracy)]
        digest = hashlib.blake2b(b"".join(a.tobytes() for a in arrays), digest_size=6).digest()
        return int.from_bytes(digest, "big")

    def save(self, path: Path) -> None:
        checkpoints.save(path, self.experiment, self.found)

    def restore(self, path: Path) -> None:
        self.found = checkpoints.restore(path, self.experiment)

    def finish(self) -> Result:
        scored, c = self._scored, self.experiment.config
        result = Result(scored, self._checked() if c.check else None, self._figures() if c.flip else None)
        if not self.processes.first:
            return result
        harmful.write(self.directory / harmful.FILE_NAME, self.experiment, scored.harm)
        if result.flipped is not None:
            with replacing(self.directory / FLIPPED_NAME) as temporary:
                temporary.write_text(json.dumps(result.flipped.to_dict(), indent=2) + "\n")
        results.write(self.directory / results.FILE_NAME, self.experiment, result)
        return result

    @property
    def _scored(self) -> Scored:
        assert self.found.scored is not None
        return self.found.scored

    def _score(self) -> tuple[Found, str]:
        return self.processes.alike(self._scored_now)

    def _scored_now(self) -> tuple[Found, str]:
        e = self.experiment
        found = e.attribute()
        assert found.theta is not None
        arrays = found.to_numpy()
        scored = Scored(
            arrays["scores"], arrays["losses"], e.training_losses(found.theta), e.test_accuracy(found.theta)
        )
        return replace(self.found, scored=scored), f"test accuracy {scored.accuracy:.1%}"

    def _smoothness(self) -> tuple[Found, str]:
        c = self.experiment.config
        found = smoothness(self.experiment.run(), c.drop, c.seed, processes=self.processes)
        return replace(self.found, smoothness=found), f"smoothness {found:.2f}"

    def _retrain(self) -> tuple[Found, str]:
        before = self.found.actual
        done = 0 if before is None else len(before)
        run, weights = self.experiment.run(), ~self._subsets[done : done + CHUNK * self.processes.size]
        rows = checked_weights(weights, run.examples).to(run.device, run.dtype)
        pieces = [piece for chunk in torch.split(rows, CHUNK) for piece in torch.split(chunk, how_many(run))]
        losses = retrain_pieces(run, pieces, processes=self.processes).losses.cpu().numpy()
        actual = losses if before is None else np.concatenate([before, losses])
        found = replace(self.found, actual=actual)
        return found, f"LDS {self._lds(actual):.3f} of {len(actual)} retrainings"

    def _lds(self, actual: np.ndarray) -> float:
        """The mean over the queries so far."""
        scored, dropped = self._scored, self._subsets[: len(actual)].numpy()
        predicted = predicted_losses(scored.scores.astype(np.float64), scored.losses.astype(np.float64), dropped)
        return float(mean_known(spearman(predicted, actual.T)))

    def _train_without(self) -> tuple[Found, str]:
        before, e, scored = self.found.accuracies, self.experiment, self._scored
        names = LEFT_OUT[len(before) : len(before) + self.processes.size]
        without = [left_out(name, e.flipped.numpy(), scored.harm, scored.training_losses) for name in names]
        each = accuracies_without(e, without, self.processes)
        found = replace(self.found, accuracies={**before, **dict(zip(names, each, strict=True))})
        shown = [f"{np.mean(own):.1%} ({SAID[name]} left out)" for name, own in zip(names, each, strict=True)]
        return found, f"accuracy {', '.join(shown)}"

    def _checked(self) -> Check:
        c, scored, found = self.experiment.config, self._scored, self.found
        assert found.actual is not None
        assert found.smoothness is not None
        return Check.of(
            torch.from_numpy(scored.scores),
            torch.from_numpy(scored.losses),
            self._subsets,
            torch.from_numpy(found.actual),
            drop=c.drop,
            seed=c.seed,
            smoothness=found.smoothness,
        )

    def _figures(self) -> Flipped:
        scored = self._scored
        return figures(self.experiment, scored.harm, scored.training_losses, self.found.accuracies)
