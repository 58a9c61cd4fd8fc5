"""Damage against size as a page: one search, or the searches of a sweep."""

from collections.abc import Mapping
from pathlib import Path

from serving.report.page import write_page
from serving.report.removal_charts import curve_chart
from toolchain.outputs import writes_file
from toolchain.plan.plan import PruningPlan


@writes_file
def render_curve(plans: Mapping[str, PruningPlan], out: Path, *, force: bool = False) -> None:
    """Renders the page.

    Args:
        plans: By directory; all of one model and one metric.
        out: The HTML file.
        force: Replace an existing file.

    Raises:
        SenteiError: ``out`` exists.
        MissingDependencyError: jinja2 or plotly is not installed.
    """
    document = next(iter(plans.values())).document
    searches = []
    for directory, plan in plans.items():
        total = plan.steps[0].num_block_parameters
        searches.append(
            {
                "label": f"To {plan.document.target_sparsity:.1%}",
                "directory": directory,
                "stopped": plan.document.stopped_because,
                "steps": [
                    {
                        "number": step.number,
                        "sparsity": f"{1 - step.num_block_parameters / total:.1%}",
                        "metric": f"{step.metric:.4g}",
                        "label": step.label,
                    }
                    for step in plan.steps
                ],
            }
        )
    # One on other windows, or of compensated models, is of no point of these.
    limit = document.limit
    if limit and (limit.metric != document.metric or limit.windows or document.compensation):
        limit = None
    write_page(
        "curve.html.j2",
        out,
        name=document.base_model.name,
        metric=document.metric,
        source=document.metric_source or "the calibration text",
        lower=not document.metric_higher_is_better,
        chart=curve_chart(list(plans.values()), limit.value if limit else None),
        searches=searches,
    )
