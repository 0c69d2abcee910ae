"""Writes the calibration of one of the two models: what its layers are fed in whole sampling runs, by timestep.

python examples/digits-dit/calibrate.py dit dit-calibration.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from digits.calibration import write_calibration

HERE = Path(__file__).parent


def main() -> None:
    """Sample and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("dit", "unet"))
    parser.add_argument("path", type=Path, help="of the safetensors file to write")
    parser.add_argument("--images", type=int, default=100, help="that are drawn")
    parser.add_argument("--steps", type=int, default=50, help="in which each is drawn; each is a timestep in the file")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    write_calibration(HERE / given.model, given.path, images=given.images, steps=given.steps, seed=given.seed)


if __name__ == "__main__":
    main()
