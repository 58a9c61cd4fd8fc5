"""A metric that runs the whole model itself: a person's own function, or answers that the model writes."""

from abc import ABC, abstractmethod

from transformers import PreTrainedModel


class ModelMetric(ABC):
    """Nothing can be shared between candidates that only the metric sees: the model is run as a whole for each.

    Attributes:
        name: As in the plan.
        source: What it is measured on, as in the plan; ``None`` where that is not known.
        source_sha256: Of that, as it was read.
        higher_is_better: ``False`` for losses.
    """

    name: str
    source: str | None
    source_sha256: str | None
    higher_is_better: bool

    def prepare(self, walk: object) -> None:  # noqa: B027 (no metric of this kind has to)
        """Looks at the unpruned model, before anything is removed."""

    @abstractmethod
    def __call__(self, model: PreTrainedModel) -> float:
        """The metric of the model as it is; finite."""
