"""Files inside installed wheels, read as data: found through the wheel's metadata, the package is never imported."""

import re
from importlib import metadata
from pathlib import Path


def wheel_files(package: str, version: str, pattern: str, setup: str) -> list[Path]:
    """Files of an installed distribution whose path matches the regular expression, in order.

    Raises ValueError, which names the command `setup`, where it is not installed, has another version or lacks them.
    """
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise ValueError(f"{package}=={version} is not installed; run `{setup}`") from None
    if distribution.version != version:
        raise ValueError(f"{package} {distribution.version} is installed, but {version} is needed; run `{setup}`")
    found = sorted(Path(str(file.locate())) for file in distribution.files or [] if re.search(pattern, str(file)))
    if not found or not all(file.is_file() for file in found):
        raise ValueError(f"{package}=={version} lacks its data files; run `{setup}` again")
    return found
