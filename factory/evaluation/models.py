"""Predictors and losses by the names that the command line takes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from factory.evaluation.arms import Task
    from factory.predictors.fitted import Predictor
    from factory.predictors.losses import TaskLoss

LOSSES = ("cross_entropy", "balanced_softmax", "class_balanced_focal", "logit_adjustment")
DEFAULT_MODEL = {"classification": "mobilenetv2_100", "segmentation": "unet"}


def parse_model(task: "Task", text: str, weights: str | None = None) -> "Predictor":
    """The predictor that `--model` names.

    Args:
        text: a timm name, small_cnn or probe:TIMM_NAME; for segmentation unet, attention_unet … [?width=N], or
            unet:ENCODER.
        weights: local safetensors file.

    Raises:
        ValueError: no such architecture, or weights that do not belong to it.
    """
    from factory.predictors.classifiers import Classifier, FeatureProbe
    from factory.predictors.segmenters import Segmenter

    if task == "classification":
        if text.startswith("probe:"):
            return FeatureProbe(architecture=text.removeprefix("probe:"), weights=weights)
        return Classifier(architecture=text, weights=weights)
    name, _, encoder = text.partition(":")
    name, _, option = name.partition("?")
    if option and not (option.startswith("width=") and option.removeprefix("width=").isdigit()):
        raise ValueError(f"--model {text!r}: the one option of a segmenter is ?width=N")
    width = int(option.removeprefix("width=")) if option else Segmenter.width
    return Segmenter(architecture=name, encoder=encoder or None, weights=weights, width=width)


def parse_loss(task: "Task", name: str | None) -> "TaskLoss | None":
    """The loss that `--loss` names; None is the task's own.

    Raises:
        ValueError: no such loss, or one of classification for segmentation.
    """
    from factory.predictors.losses import TASK_LOSSES

    if name is None:
        return None
    if task != "classification" or name not in LOSSES:
        raise ValueError(f"--loss {name!r}: want one of {', '.join(LOSSES)}, of classification only")
    kinds = {kind.__name__: kind for kind in TASK_LOSSES}
    loss: TaskLoss = kinds["".join(word.capitalize() for word in name.split("_"))]()
    return loss
