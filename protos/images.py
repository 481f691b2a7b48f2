"""The limits of images that models are shown, shared by the services that take them from people and clients."""

IMAGE_TYPES = frozenset(("image/png", "image/jpeg", "image/gif", "image/webp"))
"""The types that all providers take."""
MAX_IMAGE_BYTES = 5 * 1024 * 1024
"""The largest image that all providers take."""
