"""`python -m llamory` is the command line."""

from llamory.cli import main

if __name__ == "__main__":
    main()
