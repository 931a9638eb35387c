"""``python -m swquant``."""

from swquant.cli import main

if __name__ == "__main__":
    main()
