"""What `medctkit` offers, for editors and type checkers: names that `__init__.py` reads here and loads on first use."""

from medctkit import attention as attention
from medctkit import cohort as cohort
from medctkit import course as course
from medctkit import deploy as deploy
from medctkit import experiments as experiments
from medctkit import findings as findings
from medctkit import lora as lora
from medctkit import metrics as metrics
from medctkit import model as model
from medctkit import phantom as phantom
from medctkit import scans as scans
from medctkit import training as training
from medctkit import viewers as viewers
from medctkit import zero_shot as zero_shot
from medctkit.cohort import CTReportDataset as CTReportDataset
from medctkit.cohort import sample_ct as sample_ct
from medctkit.findings import FINDINGS as FINDINGS
from medctkit.lora import add_lora as add_lora
from medctkit.lora import load_adapter as load_adapter
from medctkit.model import CTCLIPConfig as CTCLIPConfig
from medctkit.model import CTCLIPModel as CTCLIPModel
from medctkit.model import load_base as load_base
from medctkit.model import load_mini_base as load_mini_base
from medctkit.quickstart import classify as classify
from medctkit.scans import CTVolume as CTVolume
from medctkit.scans import PreprocessConfig as PreprocessConfig
from medctkit.scans import preprocess as preprocess
from medctkit.scans import read_volume as read_volume
from medctkit.training import FineTuneConfig as FineTuneConfig
from medctkit.training import finetune as finetune
from medctkit.zero_shot import ZeroShotClassifier as ZeroShotClassifier

__version__: str
