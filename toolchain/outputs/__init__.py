"""What a command writes, and what it leaves for the next one: whole outputs, locks, and work to go on with."""

from toolchain.outputs.checks import check_output_directory, check_output_file, is_empty_directory, kind_of
from toolchain.outputs.claims import (
    claimed_directory,
    claimed_file,
    held,
    held_in_place,
    writes_directory,
    writes_file,
)
from toolchain.outputs.names import BENCHMARK, HEALING, PARTS, PROFILE, SEARCH, UNHEALED, Kind, beside
from toolchain.outputs.unfinished import START_OVER, Unfinished, begin_with, identity_on_disk
from toolchain.outputs.writing import new_directory, replace_directory, whole_file, write_text

__all__ = [
    "BENCHMARK",
    "HEALING",
    "PARTS",
    "PROFILE",
    "SEARCH",
    "START_OVER",
    "UNHEALED",
    "Kind",
    "Unfinished",
    "begin_with",
    "beside",
    "check_output_directory",
    "check_output_file",
    "claimed_directory",
    "claimed_file",
    "held",
    "held_in_place",
    "identity_on_disk",
    "is_empty_directory",
    "kind_of",
    "new_directory",
    "replace_directory",
    "whole_file",
    "write_text",
    "writes_directory",
    "writes_file",
]
