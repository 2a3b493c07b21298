"""`python -m stamo_dist.cli`: the `stamo` command where no script is installed, as in the snapshot of a run."""

from stamo_dist.cli import main

if __name__ == "__main__":
    main()
