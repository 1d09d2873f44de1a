"""The command ``python -m loralib.export``, see :mod:`loralib.interop.export`."""

import sys

from loralib.interop.export import export_merged, load_base, load_base_of, main, quiet_transformers, revision_of

__all__ = ["export_merged", "load_base", "load_base_of", "main", "quiet_transformers", "revision_of"]

if __name__ == "__main__":
    sys.exit(main())
