"""The command ``python -m loralib.export``, see :mod:`loralib.interop.export`."""

import sys

from loralib.interop.export import export_merged, main

__all__ = ["export_merged", "main"]

if __name__ == "__main__":
    sys.exit(main())
