"""`python -m vitedge`."""

from vitedge.cli.main import main

if __name__ == "__main__":
    main()
