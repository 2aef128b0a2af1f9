from ..inspection.conftest import digit, folder, trained  # noqa: F401
