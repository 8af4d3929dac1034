"""Functions from one checkpoint to another, or to files of another layout. They read nothing and compose."""

from weightkit.transforms.cast import cast
from weightkit.transforms.experts import keep_experts, read_kept
from weightkit.transforms.shard import merge, shard
from weightkit.transforms.strip import strip_mtp
from weightkit.transforms.to_fp8 import cast_to_fp8

__all__ = ["cast", "cast_to_fp8", "keep_experts", "merge", "read_kept", "shard", "strip_mtp"]
