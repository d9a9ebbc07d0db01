"""Makes the fixtures of the bundle tests available here."""

from tests.bundle.conftest import no_flushing, street, street_zip  # noqa: F401
