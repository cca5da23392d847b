"""`python -m chatlora` is `chatlora`."""

from chatlora.commands import main

if __name__ == "__main__":
    main()
