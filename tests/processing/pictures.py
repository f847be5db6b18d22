"""A test picture, for several test files."""

import numpy as np


def picture(height: int, width: int) -> np.ndarray:
    """Slopes, fine texture and edges, the same everywhere."""
    y, x = np.mgrid[:height, :width]
    return np.stack([7 * x + 3 * y, x * x // 5 + 11 * y, x ^ y], axis=-1).astype(np.uint8)
