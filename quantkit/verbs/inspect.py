"""What a folder or file holds, from its headers."""

from __future__ import annotations

from quantkit.containers.describe import Inspection, describe
from quantkit.options.verbs import Inspect
from quantkit.sources import open_source
from quantkit.verbs import verb


@verb(Inspect)
def inspect(options: Inspect) -> Inspection:
    """Read headers and report what the model is made of; no weight is read.

    Raises:
        SourceError: nothing there, or not a model that can be read.
    """
    return describe(open_source(options.model, options.revision, options.trust_remote_code))
