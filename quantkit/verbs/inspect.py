"""What a folder or file holds, from its headers."""

from __future__ import annotations

from quantkit.cli import console
from quantkit.containers.describe import Inspection, describe
from quantkit.options.verbs import Inspect
from quantkit.progress import size
from quantkit.sources import open_source
from quantkit.verbs import verb


@verb(Inspect)
def inspect(options: Inspect) -> Inspection:
    """Read headers and report what the model is made of; no weight is read.

    Raises:
        SourceError: nothing there, or not a model that can be read.
    """
    return describe(open_source(options.model, options.revision, options.trust_remote_code))


def print_inspect(found: Inspection, tensors: bool) -> None:
    kinds = ", ".join(f"{count} {name}" for name, count in found.types.items())
    console.results.print(
        f"{found.model}: {found.architecture}, {found.scheme}\n"
        f"{found.parameters / 1e6:.1f} M weights in {size(found.bytes)}, "
        f"{found.bits_per_weight:.2f} bits per weight\n"
        f"tensors: {kinds}",
        markup=False,
    )
    if tensors:
        # Not a rich table: on a narrow screen it would cut names off.
        width = max(len(tensor["name"]) for tensor in found.tensors)
        for tensor in found.tensors:
            shape = " x ".join(map(str, tensor["shape"]))
            line = f"{tensor['name']:<{width}}  {shape:<16}  {tensor['type']:<6}  {size(tensor['bytes'])}"
            console.results.print(line, markup=False)
