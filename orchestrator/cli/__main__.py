"""`python -m orchestrator.cli`."""

from orchestrator.cli import script

if __name__ == "__main__":
    script()
