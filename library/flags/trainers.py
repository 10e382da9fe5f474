"""Which groups of flags each training script takes."""

from library.flags.config_file import ConfigFileFlags
from library.flags.dataset import CacheFlags, CaptionFlags, DatasetFlags, TextCacheFlags
from library.flags.model import ModelFlags, ReadingFlags
from library.flags.monitor import PreviewFlags, ValidationFlags
from library.flags.network import NetworkFlags
from library.flags.objective import LossFlags, NoiseFlags
from library.flags.optimizer import OptimizerFlags, SchedulerFlags
from library.flags.output import EmaFlags, HubFlags, LoggingFlags, MetadataFlags, OutputFlags
from library.flags.retired import RetiredFlags
from library.flags.run import AttentionFlags, DistributedFlags, MemoryFlags, PrecisionFlags, StepFlags, StrictFlags

TRAINER: tuple[type, ...] = (
    ModelFlags,
    DatasetFlags,
    CaptionFlags,
    CacheFlags,
    OutputFlags,
    MetadataFlags,
    HubFlags,
    EmaFlags,
    OptimizerFlags,
    SchedulerFlags,
    StepFlags,
    PrecisionFlags,
    AttentionFlags,
    MemoryFlags,
    NoiseFlags,
    LossFlags,
    PreviewFlags,
    ValidationFlags,
    LoggingFlags,
    DistributedFlags,
    ConfigFileFlags,
    StrictFlags,
    RetiredFlags,
)
TRAIN_NETWORK: tuple[type, ...] = (NetworkFlags, *TRAINER)
WITH_TEXT_CACHE: tuple[type, ...] = (TextCacheFlags, ReadingFlags)
"""What comes on top for families newer than Stable Diffusion 2.x: their text is worth caching."""
