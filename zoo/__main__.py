"""`python -m zoo`: the command line; `python -m zoo SCRIPT.py ...`: a script with the zoo's models registered."""

import sys


def main() -> None:
    """Run what the arguments say."""
    arguments = sys.argv[1:]
    if not arguments or not arguments[0].endswith('.py'):
        from .cli import app

        app()
        return
    from .scripts import find_script, run_script

    try:
        path = find_script(arguments[0])
    except FileNotFoundError as error:
        sys.exit(f'python -m zoo: {error}')
    run_script(path, arguments[1:])


if __name__ == '__main__':
    main()
