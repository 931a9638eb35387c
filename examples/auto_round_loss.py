"""auto-round's command line with a loss of ours: the loss first, then auto-round's own options.

    python examples/auto_round_loss.py "huber(delta=1)" --model DIR --scheme W2A16 --dataset text.jsonl --output_dir OUT

Written for auto-round 0.16.1 (`pip install "swquant[auto-round]"`).
"""

from __future__ import annotations

import sys

from swquant import SwquantError
from swquant.integrations.auto_round import auto_round_loss


def main() -> None:
    """Run auto-round within the context."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    loss = sys.argv.pop(1)
    try:
        with auto_round_loss(loss):
            from auto_round.cli.main import run

            run()
    except SwquantError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
