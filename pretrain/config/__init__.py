"""The configuration of a run: what it consists of, how it is read and written, and what may change when a run is resumed."""

from unfold.pretrain.config.distill import DistillConfig
from unfold.pretrain.config.evaluation import EvaluationConfig
from unfold.pretrain.config.read import (
    FREE_ON_RESUME,
    add_overrides,
    changes_on_resume,
    flatten,
    load_config,
    parse_config,
    read_settings,
    with_vocab_size,
)
from unfold.pretrain.config.saved import parse_saved, saved_settings
from unfold.pretrain.config.schema import (
    CHANGEABLE_ON_RESUME,
    CheckpointConfig,
    DataConfig,
    FaultConfig,
    MonitorConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    accumulation_steps,
)
from unfold.pretrain.config.stages import RunStage, StageConfig
from unfold.pretrain.config.trained import RateConfig
from unfold.pretrain.config.yaml_text import read_yaml

__all__ = [
    "CHANGEABLE_ON_RESUME",
    "FREE_ON_RESUME",
    "CheckpointConfig",
    "DataConfig",
    "DistillConfig",
    "EvaluationConfig",
    "FaultConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RateConfig",
    "RunConfig",
    "RunStage",
    "ScheduleConfig",
    "TrainConfig",
    "StageConfig",
    "accumulation_steps",
    "add_overrides",
    "changes_on_resume",
    "flatten",
    "load_config",
    "parse_config",
    "parse_saved",
    "read_settings",
    "read_yaml",
    "saved_settings",
    "with_vocab_size",
]
