"""Long natural texts for tests: `import texts` works from every test file (pytest's pythonpath
holds tests/ and scripts/).
"""

from corpora import load


def hamlet() -> str:
    """About 180,000 characters of verse and stage directions."""
    return load("hamlet")


def king_james() -> str:
    """About 4.3 million characters of prose, one verse a line."""
    return load("king_james")


def stdlib_source() -> str:
    """About 700,000 characters of Python source."""
    return load("stdlib_source")
