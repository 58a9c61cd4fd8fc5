"""Few-shot examples of the question's own subject, for a task file that holds many subjects. Imports lm-eval."""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.samplers import ContextSampler


class SubjectSampler(ContextSampler):
    """Takes the first examples of the subject.

    lm-eval's MMLU is one task for each subject, and takes the first examples of that task. One file holds all subjects.
    """

    def sample(
        self, n: int, eval_doc: Mapping[str, Any] | None = None, df: Any = None, **_: Any
    ) -> Sequence[Mapping[str, Any]]:
        """The first ``n`` examples of ``eval_doc``'s subject; fewer if there are no more."""
        # lm-eval names the question to samplers of tasks that have neither test_split nor fewshot_split.
        assert eval_doc is not None
        return [each for each in self.df if each["subject"] == eval_doc["subject"]][:n]
