"""What a config may say: the typed blocks of every YAML, the rules between keys, and what settings ask of a machine.

A stage has a module of its own; the names that others use are imported from here.
"""

from posttrain.config.schema.data import (
    FORM_CUES,
    HASHES,
    Answer,
    DataConfig,
    Fields,
    FilesSource,
    GeneratorSource,
    HubSource,
    MadeSource,
    Mapped,
    RejectionSampledSource,
    Source,
)
from posttrain.config.schema.evaluation import EvalConfig, EvalData, Generation
from posttrain.config.schema.grpo import BUILT_IN_REWARDS, Curriculum, GrpoConfig, Reward, Rewards, Rollouts, is_own_reward
from posttrain.config.schema.shared import MODEL_FOLDER, Engine, Kernels, Model, Settings, Tokenizer, Tracking, trackers_of
from posttrain.config.schema.training import Hub, Lora, PassRate, SftConfig, TrainConfig, TrainData

__all__ = [
    "BUILT_IN_REWARDS",
    "FORM_CUES",
    "HASHES",
    "MODEL_FOLDER",
    "Answer",
    "Curriculum",
    "DataConfig",
    "Engine",
    "EvalConfig",
    "EvalData",
    "Fields",
    "FilesSource",
    "Generation",
    "GeneratorSource",
    "GrpoConfig",
    "Hub",
    "HubSource",
    "Kernels",
    "Lora",
    "MadeSource",
    "Mapped",
    "Model",
    "PassRate",
    "RejectionSampledSource",
    "Reward",
    "Rewards",
    "Rollouts",
    "Settings",
    "SftConfig",
    "Source",
    "Tokenizer",
    "Tracking",
    "TrainConfig",
    "TrainData",
    "is_own_reward",
    "trackers_of",
]
