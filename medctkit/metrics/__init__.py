"""Labels and scores to tables with 95 % intervals; knows no model."""

from medctkit.metrics.scores import (
    compare,
    evaluate,
    mean_draws,
    p_texts,
    result_table,
    summary,
    thresholds_from_validation,
)

__all__ = ["compare", "evaluate", "mean_draws", "p_texts", "result_table", "summary", "thresholds_from_validation"]
