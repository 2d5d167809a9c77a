"""Which packages there are; all else is in pyproject.toml, which cannot both find them and add one from elsewhere."""

from setuptools import find_packages, setup

setup(
    # The page's files lie in vis/, where the original has them, and are installed as captioner/page/.
    packages=[*find_packages(include=["captioner", "captioner.*"]), "captioner.page"],
    package_dir={"captioner.page": "vis"},
)
