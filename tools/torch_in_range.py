"""Exit with 0 if this interpreter has a torch that swquant can use as it is, with 1 otherwise; reads no torch code."""

import importlib.metadata
import sys

LEAST, BELOW = (2, 6), (2, 14)

try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit(1)
numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
print(
    f"torch {version} is installed already", "and stays as it is." if LEAST <= numbers < BELOW else "but out of range."
)
sys.exit(0 if LEAST <= numbers < BELOW else 1)
