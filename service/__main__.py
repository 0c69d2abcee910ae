"""`python -m service` and the console script `arrowquant`."""

from service.cli.app import app


def main() -> None:
    """Run the command that the arguments name."""
    app(prog_name="arrowquant")


if __name__ == "__main__":
    main()
