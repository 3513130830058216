from tests.cli.conftest import clean_environment, run

__all__ = ["clean_environment", "run"]
