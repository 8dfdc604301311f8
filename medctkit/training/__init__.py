"""Fine-tuning: settings, objectives and the one loop."""

from medctkit.training.loop import FineTuneResult, finetune, learning_rate_factor, step_gradients
from medctkit.training.objectives import contrastive_loss, finding_prompt_loss, report_prompts
from medctkit.training.settings import FineTuneConfig

__all__ = [
    "FineTuneConfig",
    "FineTuneResult",
    "contrastive_loss",
    "finding_prompt_loss",
    "finetune",
    "learning_rate_factor",
    "report_prompts",
    "step_gradients",
]
