"""The GGUF container: one file, or several parts, as llama.cpp reads it.

`plan` says which tensors the file holds and what each is made of; the caller chooses a type for each and gives the
packed rows; `file_keys` makes the keys; `GgufWriter` writes into a folder of `runs.outputs.staged_files`. The reader is
`quantkit.containers.gguf.read.GgufSource`.
"""

from quantkit.containers.gguf.architectures import WRITABLE
from quantkit.containers.gguf.keys import architecture_of, file_keys, limits, origin, parts_ends, remarks
from quantkit.containers.gguf.probe import cut_otherwise
from quantkit.containers.gguf.tensors import GgufTensor, plan
from quantkit.containers.gguf.write import GgufWriter, head_bytes, packed_bytes, part_names

__all__ = [
    "WRITABLE",
    "GgufTensor",
    "GgufWriter",
    "architecture_of",
    "cut_otherwise",
    "file_keys",
    "head_bytes",
    "limits",
    "origin",
    "packed_bytes",
    "part_names",
    "parts_ends",
    "plan",
    "remarks",
]
