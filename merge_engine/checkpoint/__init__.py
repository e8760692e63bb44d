"""Checkpoints on disk: safetensors headers, shards and index; read ranges, write streams."""

from merge_engine.checkpoint.adapted import open_reference
from merge_engine.checkpoint.adapter import open_adapter
from merge_engine.checkpoint.config import encode_config, merged_config
from merge_engine.checkpoint.config_layers import LayerOrigin, is_about_layers, stacked_config
from merge_engine.checkpoint.header import Header, OutputTensor, TensorInfo, encode_header, read_header
from merge_engine.checkpoint.hub import locate
from merge_engine.checkpoint.output_check import check_disk_space, check_output_folder
from merge_engine.checkpoint.shard_writer import ShardWriter, write_shard
from merge_engine.checkpoint.shards import DEFAULT_SHARD_SIZE, ShardLayout, parse_size, plan_shards
from merge_engine.checkpoint.sidecar import (
    MANIFEST_NAME,
    REPORT_NAMES,
    carried_files,
    find_side_files,
    strange_model_files,
    tokenizer_files,
)
from merge_engine.checkpoint.source import AdapterFiles, Checkpoint, input_label, open_checkpoint
from merge_engine.checkpoint.strict_json import parse_settings, read_settings
from merge_engine.checkpoint.tie_flags import tie_flag
from merge_engine.checkpoint.transaction import CheckpointTransaction
from merge_engine.checkpoint.writer import CheckpointWriter

__all__ = [
    "DEFAULT_SHARD_SIZE",
    "MANIFEST_NAME",
    "REPORT_NAMES",
    "AdapterFiles",
    "Checkpoint",
    "CheckpointTransaction",
    "CheckpointWriter",
    "Header",
    "LayerOrigin",
    "OutputTensor",
    "ShardLayout",
    "ShardWriter",
    "TensorInfo",
    "carried_files",
    "check_disk_space",
    "check_output_folder",
    "encode_config",
    "encode_header",
    "find_side_files",
    "input_label",
    "is_about_layers",
    "locate",
    "merged_config",
    "open_adapter",
    "open_checkpoint",
    "open_reference",
    "parse_settings",
    "parse_size",
    "plan_shards",
    "read_header",
    "read_settings",
    "stacked_config",
    "strange_model_files",
    "tie_flag",
    "tokenizer_files",
    "write_shard",
]
