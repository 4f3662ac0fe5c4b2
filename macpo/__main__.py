"""`python -m macpo` is `macpo`."""

from macpo.cli import main

if __name__ == "__main__":
    main()
