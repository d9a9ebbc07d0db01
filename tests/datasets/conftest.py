"""Makes the fixtures of the toy dataset available here."""

from tests.toy_dataset import _one_thread, data_folder, tiny  # noqa: F401
