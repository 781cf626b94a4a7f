"""Run cogflow's command line, see :mod:`cogflow.cli`."""

from cogflow.cli import run_process

if __name__ == "__main__":
    run_process()
