"""``python -m service.cli`` is ``catmerge``."""

from service.cli import main

if __name__ == "__main__":
    main()
